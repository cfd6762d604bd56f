-- Completes the run if no step remains.
-- Called by: `start_flow` and `complete_task`, when steps without tasks may have been the last. Locks: the run. Failure: the
-- caller's.
create or replace function pgflow.maybe_complete_run(run_id uuid)
returns void
language plpgsql
volatile
set search_path = ''
as $$
begin
    perform pgflow._complete_run(maybe_complete_run.run_id, '{}', '{}');
end;
$$;
