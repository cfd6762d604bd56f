-- How often each task was put back into its queue because its worker went away, one row a task that ever was. The tables of pgflow
-- 0.7 have no place for it (0.14 counts in step_tasks itself; there this table stays empty).
-- A row with `permanently_stalled_at` is a task that was given up: it stays `started`, its message is in the archive, its run
-- waits. Deleting the row gives the task three more chances.
-- Written by: `flowgate.requeue_stalled_tasks`, which also takes rows away whose task has ended; `flowgate.prune`.
-- Read by: Flowgate's maintenance (`flowgate.stalled_tasks`), people. Locks: rows, SKIP LOCKED. Failure: the writers'.
-- No foreign key: deleting a run or failing one must not look here.
create table if not exists flowgate.requeued_task (
    run_id                 uuid not null,
    step_slug              text not null,
    task_index             integer not null,
    flow_slug              text not null,
    requeued_count         integer not null default 0,
    last_requeued_at       timestamptz,
    permanently_stalled_at timestamptz,
    primary key (run_id, step_slug, task_index)
);

create index if not exists requeued_task_stalled_idx on flowgate.requeued_task (flow_slug)
where permanently_stalled_at is not null;

-- Which part of a table this pass of `flowgate.requeue_stalled_tasks` looks through. A sequence, as passes must not wait for
-- each other.
create sequence if not exists flowgate.requeue_pass as bigint;
