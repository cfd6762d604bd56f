-- How often a task was given back to its queue because its worker had fallen silent, and when it was given up.
-- Written by: `requeue_stalled_tasks`. Locks: see the table's own file. Failure: aborts the install.
-- INVARIANT: as before, no index mentions a column that changes; `requeue_stalled_tasks` finds its tasks by their messages.
alter table pgflow.step_tasks
    add column if not exists requeued_count         integer not null default 0,
    add column if not exists last_requeued_at       timestamptz,
    add column if not exists permanently_stalled_at timestamptz;
