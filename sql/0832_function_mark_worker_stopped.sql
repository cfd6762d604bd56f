-- Notes that a worker stops, so that `ensure_workers` need not wait for its heartbeats to fail. An unknown worker is nothing to do.
-- Called by: workers when they stop. Locks: its row until commit. Failure: the caller's.
create or replace function pgflow.mark_worker_stopped(worker_id uuid)
returns void
language plpgsql
volatile
set search_path = ''
as $$
#variable_conflict use_column
begin
    update pgflow.workers as w set stopped_at = clock_timestamp() where w.worker_id = mark_worker_stopped.worker_id;
end;
$$;
