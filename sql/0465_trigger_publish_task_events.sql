-- Task-level signals of `flowgate.publish_task_events`. Off until `flowgate.set_task_events(true)`; installing again leaves
-- it as it is. Off, since signals for everybody cost more than a tenth of a small task: figures in sql/README.md.
-- Called by: every update of pgflow.step_tasks, while on. Locks, failure: those of its function.
do $$
begin
    if not exists (
        select from pg_catalog.pg_trigger as t
        where t.tgrelid = 'pgflow.step_tasks'::regclass and t.tgname = 'publish_task_events'
    ) then
        create trigger publish_task_events
            after update on pgflow.step_tasks
            referencing old table as before_change new table as after_change
            for each statement
            execute function flowgate.publish_task_events();
        alter table pgflow.step_tasks disable trigger publish_task_events;
    end if;
end;
$$;
