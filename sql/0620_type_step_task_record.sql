-- The run's input, for steps that begin a run; theirs no longer holds it under "run". Called by: `start_tasks`. Locks: the type,
-- until the installer commits. Failure: aborts the install.
do $$
begin
    if not exists (
        select from pg_catalog.pg_attribute as a
        where a.attrelid = to_regclass('pgflow.step_task_record') and a.attname = 'flow_input' and not a.attisdropped
    ) then
        alter type pgflow.step_task_record add attribute flow_input jsonb;
    end if;
end;
$$;
