-- Edge functions that `ensure_workers` keeps running. Written by: workers, by `track_worker_function` when they start, and
-- `ensure_workers`. Locks: its rows, for a moment.
create table if not exists pgflow.worker_functions (
    function_name   text not null,
    enabled         boolean not null default true,
    debounce        interval not null default '6 seconds',
    last_invoked_at timestamptz,
    created_at      timestamptz not null default now(),
    updated_at      timestamptz not null default now(),
    constraint worker_functions_pkey primary key (function_name),
    constraint worker_functions_debounce_check check (debounce >= interval '1 second')
);
