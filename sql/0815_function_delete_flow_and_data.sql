-- Deletes a flow with everything that belongs to it: definition, runs, tasks, queue and archive. An unknown flow is nothing to do.
-- Called by: `ensure_flow_compiled`, where that may lose data; administrators. Failure: the caller's, whole; 55P03 if for 30 s
-- there was always a call at work that would not let go.
-- Locks: every row of the flow and its queue's tables. It waits for none of them while it holds another for longer than a moment
-- (less than `deadlock_timeout`), so it can't deadlock with workers, whatever order they come in; what they do then finds nothing.
create or replace function pgflow.delete_flow_and_data(p_flow_slug text)
returns void
language plpgsql
volatile
set search_path = ''
as $$
declare
    v_timeout  text := current_setting('lock_timeout');
    v_deadline timestamptz := clock_timestamp() + interval '30 s';
    v_tables   text;
    v_table    text;
    v_shared   boolean;
begin
    select string_agg(format('pgmq.%I', wanted.name), ', ' order by wanted.name desc)
    into v_tables
    from unnest(array['q_' || lower(p_flow_slug), 'a_' || lower(p_flow_slug)]) as wanted(name)
    where to_regclass(format('pgmq.%I', wanted.name)) is not null;
    -- Queues whose names differ in case only have their tables in common.
    v_shared := exists (
        select from pgmq.list_queues() as q
        where lower(q.queue_name) = lower(p_flow_slug) and q.queue_name <> p_flow_slug);

    perform set_config('lock_timeout', '300ms', true);
    loop
        begin
            perform from pgflow.flows as f where f.flow_slug = p_flow_slug for update;
            perform from pgflow.runs as r where r.flow_slug = p_flow_slug for update;
            perform from pgflow.step_states as s where s.flow_slug = p_flow_slug for update;
            perform from pgflow.step_tasks as t where t.flow_slug = p_flow_slug for update;
            if v_tables is not null and not v_shared then
                execute 'lock table ' || v_tables || ' in access exclusive mode';
            end if;
            exit;
        exception
            when lock_not_available or deadlock_detected then
                if clock_timestamp() > v_deadline then
                    raise;
                end if;
        end;
        perform pg_sleep(0.02 + random() * 0.05);
    end loop;
    perform set_config('lock_timeout', v_timeout, true);

    if v_shared then
        foreach v_table in array string_to_array(v_tables, ', ') loop
            execute 'delete from ' || v_table || ' where message ->> ''flow_slug'' = $1' using p_flow_slug;
        end loop;
    elsif exists (select from pgmq.list_queues() as q where q.queue_name = p_flow_slug) then
        perform pgmq.drop_queue(p_flow_slug::text);
    end if;

    delete from pgflow.step_tasks as t where t.flow_slug = p_flow_slug;
    delete from pgflow.step_states as s where s.flow_slug = p_flow_slug;
    delete from pgflow.runs as r where r.flow_slug = p_flow_slug;
    delete from pgflow.deps as e where e.flow_slug = p_flow_slug;
    delete from pgflow.steps as s where s.flow_slug = p_flow_slug;
    delete from pgflow.flows as f where f.flow_slug = p_flow_slug;
end;
$$;
