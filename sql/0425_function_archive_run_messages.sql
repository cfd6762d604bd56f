-- Archives the messages of all tasks of a run that are queued or started, and `message_id`: nothing of a failed run is worked on.
-- Called by: `complete_task` and `fail_task`, as the last thing they do when they fail a run, holding it. Locks: the messages,
-- in order of their ids. Failure: the caller's.
create or replace function pgflow._archive_run_messages(flow_slug text, run_id uuid, message_id bigint)
returns void
language plpgsql
volatile
set search_path = ''
as $$
#variable_conflict use_column
declare
    v_message_ids bigint[];
begin
    select array_agg(open.message_id order by open.message_id)
    into v_message_ids
    from (
        select t.message_id
        from pgflow.step_tasks as t
        where t.run_id = _archive_run_messages.run_id and t.status in ('queued', 'started') and t.message_id is not null
        union
        select _archive_run_messages.message_id
        where _archive_run_messages.message_id is not null
    ) as open;
    if v_message_ids is null then
        return;
    end if;

    -- pgmq deletes them as they lie; who sets the visibility of several takes them in order.
    execute format(
        'select from pgmq.%I as m where m.msg_id = any ($1) order by m.msg_id for update',
        'q_' || lower(_archive_run_messages.flow_slug))
    using v_message_ids;
    perform pgmq.archive(_archive_run_messages.flow_slug::text, v_message_ids);
end;
$$;
