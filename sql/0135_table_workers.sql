-- Workers, registered by themselves; their heartbeat is an UPDATE they send every few seconds.
-- Written by: workers (plain SQL). Read by: the foreign key of step_tasks, user interfaces.
-- INVARIANT: no index on last_heartbeat_at, so that a heartbeat is a HOT update.
create table if not exists pgflow.workers (
    worker_id         uuid not null,
    queue_name        text not null,
    function_name     text not null,
    started_at        timestamptz not null default now(),
    deprecated_at     timestamptz,
    last_heartbeat_at timestamptz not null default now(),
    constraint workers_pkey primary key (worker_id)
) with (fillfactor = 50);
