-- Runs of flows. The row is the run's mutex: whoever ends a step, fails the run or moves it on holds it until commit.
-- Written by: `start_flow`, the end of each step, `fail_task`.
-- INVARIANT: no index mentions a column that changes while a run is alive (status, remaining_steps, output, *_at but
-- started_at), so that every such change is a HOT update; the fill factor leaves the room for it.
create table if not exists pgflow.runs (
    run_id          uuid not null default gen_random_uuid(),
    flow_slug       text not null,
    status          text not null default 'started',
    input           jsonb not null,
    output          jsonb,
    remaining_steps integer not null default 0,
    started_at      timestamptz not null default now(),
    completed_at    timestamptz,
    failed_at       timestamptz,
    constraint runs_pkey primary key (run_id),
    constraint runs_flow_slug_fkey foreign key (flow_slug) references pgflow.flows (flow_slug),
    constraint runs_remaining_steps_check check (remaining_steps >= 0),
    constraint status_is_valid check (status in ('started', 'completed', 'failed')),
    constraint completed_at_or_failed_at check (completed_at is null or failed_at is null),
    constraint completed_at_is_after_started_at check (completed_at >= started_at),
    constraint failed_at_is_after_started_at check (failed_at >= started_at)
) with (fillfactor = 70);

-- For lists of a flow's runs in user interfaces; nothing in pgflow reads it.
create index if not exists runs_flow_slug_started_at_idx on pgflow.runs (flow_slug, started_at);
