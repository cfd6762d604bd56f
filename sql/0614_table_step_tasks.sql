-- How often a task was given back to its queue because its worker had fallen silent, and when it was given up.
-- Written by: `requeue_stalled_tasks`. Locks: see the table's own file. Failure: aborts the install.
-- INVARIANT: as before, no index mentions a column that changes; `requeue_stalled_tasks` finds its tasks by their messages.
--
-- An upgrade takes over what `flowgate.requeue_stalled_tasks` counted at 0.7: a task that was given up stays so.
do $$
declare
    v_upgrade boolean := not exists (
        select from pg_catalog.pg_attribute as a
        where a.attrelid = 'pgflow.step_tasks'::regclass and a.attname = 'requeued_count' and not a.attisdropped);
begin
    alter table pgflow.step_tasks
        add column if not exists requeued_count         integer not null default 0,
        add column if not exists last_requeued_at       timestamptz,
        add column if not exists permanently_stalled_at timestamptz;

    if v_upgrade and to_regclass('flowgate.requeued_task') is not null then
        execute
            'update pgflow.step_tasks as t'
            ' set requeued_count = counted.requeued_count, last_requeued_at = counted.last_requeued_at,'
            '     permanently_stalled_at = counted.permanently_stalled_at'
            ' from flowgate.requeued_task as counted'
            ' where t.run_id = counted.run_id and t.step_slug = counted.step_slug and t.task_index = counted.task_index'
            '   and t.status in (''queued'', ''started'')';
    end if;
end;
$$;
