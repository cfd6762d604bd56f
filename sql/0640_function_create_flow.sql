-- Makes a flow and its queue; an existing flow is returned as it is, whatever options are given. Null is the default of an option.
-- Called by: whoever defines flows; compiled pgflow migrations; `_create_flow_from_shape`. Locks: the flow's key until commit;
-- pgmq's while it makes the queue. Failure: the caller's (an invalid slug is check constraint slug_is_valid; over 47 characters
-- pgmq refuses the queue).
create or replace function pgflow.create_flow(
    flow_slug    text,
    max_attempts integer default null,
    base_delay   integer default null,
    timeout      integer default null
)
returns pgflow.flows
language plpgsql
volatile
set search_path = ''
as $$
#variable_conflict use_column
declare
    v_flow pgflow.flows;
begin
    insert into pgflow.flows (flow_slug, opt_max_attempts, opt_base_delay, opt_timeout)
    values (
        create_flow.flow_slug, coalesce(create_flow.max_attempts, 3), coalesce(create_flow.base_delay, 5),
        coalesce(create_flow.timeout, 60))
    on conflict (flow_slug) do nothing;

    if not exists (select from pgmq.list_queues() as q where q.queue_name = create_flow.flow_slug) then
        perform pgmq.create(create_flow.flow_slug::text);
    end if;

    select f.* into v_flow from pgflow.flows as f where f.flow_slug = create_flow.flow_slug;
    return v_flow;
end;
$$;
