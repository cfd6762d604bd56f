-- Switches task-level signals on or off, for everybody. Returns the new state.
-- Called by: an administrator (the owner of step_tasks). Locks: SHARE ROW EXCLUSIVE on pgflow.step_tasks: waits for running
-- calls and holds new ones up for a moment, at most `lock_timeout`. Failure: the caller's.
create or replace function flowgate.set_task_events(enabled boolean)
returns boolean
language plpgsql
volatile
set search_path = ''
set lock_timeout = '2s'
as $$
begin
    if set_task_events.enabled then
        alter table pgflow.step_tasks enable trigger publish_task_events;
    else
        alter table pgflow.step_tasks disable trigger publish_task_events;
    end if;
    return set_task_events.enabled;
end;
$$;

revoke all on function flowgate.set_task_events(boolean) from public;
