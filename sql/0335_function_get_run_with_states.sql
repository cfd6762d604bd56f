-- A run and the states of its steps, as JSON; null for a run that does not exist.
-- Called by: user interfaces, often; Flowgate answers it from a replica or for many at once. Locks: none. Failure: none.
-- SECURITY DEFINER, because its callers have no right on tables: knowing a run's id is the right to see it. PUBLIC keeps
-- EXECUTE as in pgflow itself, and can't reach it without USAGE on the schema.
-- PL/pgSQL and not SQL: the plan is then kept by the connection instead of made at each call.
create or replace function pgflow.get_run_with_states(run_id uuid)
returns jsonb
language plpgsql
stable
security definer
set search_path = ''
as $$
#variable_conflict use_column
begin
    return (
        select jsonb_build_object(
            'run', to_jsonb(r),
            'steps', coalesce(
                (select jsonb_agg(to_jsonb(s)) from pgflow.step_states as s where s.run_id = r.run_id), '[]'::jsonb))
        from pgflow.runs as r
        where r.run_id = get_run_with_states.run_id
    );
end;
$$;
