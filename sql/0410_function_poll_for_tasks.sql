-- Deprecated in pgflow itself: says so and returns nothing. Called by: clients older than `start_tasks`. Locks, failure: none.
create or replace function pgflow.poll_for_tasks(
    queue_name       text,
    vt               integer,
    qty              integer,
    max_poll_seconds integer default 5,
    poll_interval_ms integer default 100
)
returns setof pgflow.step_task_record
language plpgsql
volatile
set search_path = ''
as $$
begin
    raise notice 'pgflow.poll_for_tasks is deprecated: read the queue, then call pgflow.start_tasks';
end;
$$;
