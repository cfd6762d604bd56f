-- Flow definitions.
-- Written by: `create_flow`. Read by: starting and every worker call. Locks: key share by each run and task that refers to it.
create table if not exists pgflow.flows (
    flow_slug        text not null,
    opt_max_attempts integer not null default 3,
    opt_base_delay   integer not null default 1,
    opt_timeout      integer not null default 60,
    created_at       timestamptz not null default now(),
    constraint flows_pkey primary key (flow_slug),
    constraint slug_is_valid check (pgflow.is_valid_slug(flow_slug)),
    constraint opt_max_attempts_is_nonnegative check (opt_max_attempts >= 0),
    constraint opt_base_delay_is_nonnegative check (opt_base_delay >= 0),
    constraint opt_timeout_is_positive check (opt_timeout > 0)
);
