-- Trigger: tells the outbox which tasks changed their status. One insert a statement, however many tasks it moved.
-- Called by: trigger publish_task_events on pgflow.step_tasks. Locks: none beyond the insert, since these signals carry no `seq`:
-- tasks of one run must not wait for each other because of them; they are ordered by `id`.
-- Failure: warns and lets the statement through without its signals.
-- SECURITY DEFINER, because workers have no right on the outbox; a trigger function can't be called in any other way.
--
-- It sends no wake-up: commits of a map's tasks would then be serialised by NOTIFY. The signals travel with the next wake-up
-- or with the reader's own probe. A session with `flowgate.wake` = 'tasks' pays for a wake-up per statement.
create or replace function flowgate.publish_task_events()
returns trigger
language plpgsql
volatile
security definer
set search_path = ''
as $$
begin
    insert into flowgate.event (topic, event, payload)
    select
        'pgflow:run:' || changed.run_id,
        'task:' || changed.step_slug || ':' || changed.task_index || ':' || changed.what,
        jsonb_build_object(
            'event_type', 'task:' || changed.what, 'run_id', changed.run_id, 'step_slug', changed.step_slug,
            'task_index', changed.task_index, 'attempts_count', changed.attempts_count, 'status', changed.status)
            || case
                when changed.what in ('failed', 'retrying') then
                    jsonb_build_object('error_message', changed.error_message)
                else '{}'::jsonb
            end
    from (
        select
            n.run_id, n.step_slug, n.task_index, n.attempts_count, n.status, n.error_message,
            case
                when n.status <> 'queued' then n.status
                -- `fail_task` leaves the worker and says why; who puts back a stalled task forgets the one and keeps the other.
                when n.last_worker_id is null and n.error_message is not distinct from o.error_message then 'requeued'
                else 'retrying'
            end as what
        from after_change as n
        join before_change as o
          on o.run_id = n.run_id and o.step_slug = n.step_slug and o.task_index = n.task_index
        where n.status <> o.status
    ) as changed;

    if found and current_setting('flowgate.wake', true) = 'tasks' then
        perform pg_notify('flowgate_wake', '');
    end if;
    return null;
exception
    when transaction_rollback or serialization_failure or deadlock_detected then
        raise;
    when others then
        raise warning 'task events were not sent: %', sqlerrm using errcode = sqlstate;
        return null;
end;
$$;

revoke all on function flowgate.publish_task_events() from public;
