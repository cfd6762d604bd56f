-- Notes that there is an edge function of this name, for `ensure_workers`.
-- Called by: workers when they start. Locks: its row until commit. Failure: the caller's.
create or replace function pgflow.track_worker_function(function_name text)
returns void
language plpgsql
volatile
set search_path = ''
as $$
#variable_conflict use_column
begin
    insert into pgflow.worker_functions as known (function_name, updated_at)
    values (track_worker_function.function_name, clock_timestamp())
    on conflict (function_name) do update set updated_at = clock_timestamp();
end;
$$;
