-- Steps of a flow, with options that override the flow's where set.
-- Written by: `add_step`. Read by: starting and every worker call. Locks: key share by step_states and deps.
create table if not exists pgflow.steps (
    flow_slug        text not null,
    step_slug        text not null,
    step_type        text not null default 'single',
    step_index       integer not null default 0,
    deps_count       integer not null default 0,
    opt_max_attempts integer,
    opt_base_delay   integer,
    opt_timeout      integer,
    created_at       timestamptz not null default now(),
    opt_start_delay  integer,
    constraint steps_pkey primary key (flow_slug, step_slug),
    constraint steps_flow_slug_step_index_key unique (flow_slug, step_index),
    constraint steps_flow_slug_fkey foreign key (flow_slug) references pgflow.flows (flow_slug),
    constraint steps_step_slug_check check (pgflow.is_valid_slug(step_slug)),
    constraint steps_step_type_check check (step_type in ('single', 'map')),
    constraint steps_deps_count_check check (deps_count >= 0),
    constraint opt_max_attempts_is_nonnegative check (opt_max_attempts is null or opt_max_attempts >= 0),
    constraint opt_base_delay_is_nonnegative check (opt_base_delay is null or opt_base_delay >= 0),
    constraint opt_timeout_is_positive check (opt_timeout is null or opt_timeout > 0),
    constraint opt_start_delay_is_nonnegative check (opt_start_delay is null or opt_start_delay >= 0)
);
