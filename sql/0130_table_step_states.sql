-- One row a step of a run, made when the run starts. A started step's row is that step's mutex: `complete_task` and
-- `fail_task` hold it until commit. `remaining_tasks` is null before the step starts; `initial_tasks` is null while the size
-- of a map is not known.
-- Written by: `start_flow`, then whatever moves the run on.
-- INVARIANT: no index but the primary key, so that every status change and count is a HOT update.
create table if not exists pgflow.step_states (
    flow_slug       text not null,
    run_id          uuid not null,
    step_slug       text not null,
    status          text not null default 'created',
    remaining_tasks integer,
    remaining_deps  integer not null default 0,
    created_at      timestamptz not null default now(),
    started_at      timestamptz,
    completed_at    timestamptz,
    failed_at       timestamptz,
    error_message   text,
    initial_tasks   integer,
    constraint step_states_pkey primary key (run_id, step_slug),
    constraint step_states_flow_slug_fkey foreign key (flow_slug) references pgflow.flows (flow_slug),
    constraint step_states_run_id_fkey foreign key (run_id) references pgflow.runs (run_id),
    constraint step_states_flow_slug_step_slug_fkey foreign key (flow_slug, step_slug)
        references pgflow.steps (flow_slug, step_slug),
    constraint status_is_valid check (status in ('created', 'started', 'completed', 'failed')),
    constraint status_and_remaining_tasks_match check (status <> 'completed' or remaining_tasks = 0),
    constraint remaining_tasks_state_consistency check (status <> 'created' or remaining_tasks is null),
    constraint initial_tasks_known_when_started check (status <> 'started' or initial_tasks is not null),
    constraint step_states_initial_tasks_check check (initial_tasks is null or initial_tasks >= 0),
    constraint step_states_remaining_deps_check check (remaining_deps >= 0),
    constraint completed_at_or_failed_at check (completed_at is null or failed_at is null),
    constraint started_at_is_after_created_at check (started_at >= created_at),
    constraint completed_at_is_after_started_at check (completed_at >= started_at),
    constraint failed_at_is_after_started_at check (failed_at >= started_at)
) with (fillfactor = 70);
