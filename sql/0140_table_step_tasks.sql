-- One row a task, made when its step starts; `message_id` is its message in the flow's queue.
-- Written by: `start_ready_steps`, `start_tasks`, `complete_task`, `fail_task`.
-- INVARIANT: no index mentions a column that changes after the insert (status, *_at, last_worker_id …), so that every
-- status change is a HOT update; the fill factor leaves the room for two of them.
create table if not exists pgflow.step_tasks (
    flow_slug      text not null,
    run_id         uuid not null,
    step_slug      text not null,
    message_id     bigint,
    task_index     integer not null default 0,
    status         text not null default 'queued',
    attempts_count integer not null default 0,
    error_message  text,
    output         jsonb,
    queued_at      timestamptz not null default now(),
    completed_at   timestamptz,
    failed_at      timestamptz,
    started_at     timestamptz,
    last_worker_id uuid,
    constraint step_tasks_pkey primary key (run_id, step_slug, task_index),
    constraint step_tasks_flow_slug_fkey foreign key (flow_slug) references pgflow.flows (flow_slug),
    constraint step_tasks_run_id_fkey foreign key (run_id) references pgflow.runs (run_id),
    constraint step_tasks_run_id_step_slug_fkey foreign key (run_id, step_slug)
        references pgflow.step_states (run_id, step_slug),
    constraint step_tasks_last_worker_id_fkey foreign key (last_worker_id)
        references pgflow.workers (worker_id) on delete set null,
    constraint valid_status check (status in ('queued', 'started', 'completed', 'failed')),
    constraint output_valid_only_for_completed check (output is null or status in ('completed', 'failed')),
    constraint attempts_count_nonnegative check (attempts_count >= 0),
    constraint completed_at_or_failed_at check (completed_at is null or failed_at is null),
    constraint completed_at_is_after_queued_at check (completed_at >= queued_at),
    constraint failed_at_is_after_queued_at check (failed_at >= queued_at),
    constraint started_at_is_after_queued_at check (started_at >= queued_at),
    constraint completed_at_is_after_started_at check (completed_at >= started_at),
    constraint failed_at_is_after_started_at check (failed_at >= started_at)
) with (fillfactor = 60);

-- By message first: a plan made while the table is small must not find a flow's tasks by the flow and filter them.
-- Not unique: a queue that was dropped and made again counts its messages from 1 again.
create index if not exists step_tasks_message_id_idx on pgflow.step_tasks (message_id, flow_slug);
drop index if exists pgflow.step_tasks_flow_slug_message_id_idx;
