-- Starts a run and returns it as `get_run_with_states` does.
-- Called by: pgflow's UI client. Locks and failure: those of `start_flow`.
-- SECURITY DEFINER, because its callers have no right on tables, queues or events: whoever may execute it may start any flow.
-- PUBLIC keeps EXECUTE as in pgflow itself, and can't reach it without USAGE on the schema.
create or replace function pgflow.start_flow_with_states(flow_slug text, input jsonb, run_id uuid default null)
returns jsonb
language plpgsql
volatile
security definer
set search_path = ''
as $$
declare
    v_run_id uuid;
begin
    select r.run_id
    into v_run_id
    from pgflow.start_flow(
        start_flow_with_states.flow_slug, start_flow_with_states.input, start_flow_with_states.run_id) as r;

    return pgflow.get_run_with_states(v_run_id);
end;
$$;
