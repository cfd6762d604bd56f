-- Lets a role start runs and look at them through pgflow's two SECURITY DEFINER functions, and read flow definitions: what
-- pgflow documents for users of its UI client. No right on runs, tasks, queues or the outbox.
-- Called by: an administrator (the owner of the objects). Locks: the catalog rows of what is granted. Failure: the caller's.
create or replace function flowgate.grant_viewer(role regrole)
returns void
language plpgsql
volatile
set search_path = ''
as $$
declare
    v_statement text;
begin
    foreach v_statement in array array[
        'grant usage on schema pgflow to %s',
        'grant execute on function pgflow.start_flow_with_states(text, jsonb, uuid) to %s',
        'grant execute on function pgflow.get_run_with_states(uuid) to %s',
        'grant select on table pgflow.flows, pgflow.steps to %s'
    ] loop
        execute format(v_statement, grant_viewer.role);
    end loop;
end;
$$;

revoke all on function flowgate.grant_viewer(regrole) from public;
