-- Starts a run and returns its row as it is after everything that could happen at once has happened.
-- Called by: applications. Locks: rows of its own only, and a key share of the flow's. Failure: the caller's, and no run is left:
-- unknown flow 23503, run_id used before 23505, input that is no array for a root map P0001.
create or replace function pgflow.start_flow(flow_slug text, input jsonb, run_id uuid default null)
returns setof pgflow.runs
language plpgsql
volatile
set search_path = ''
as $$
#variable_conflict use_column
declare
    v_run       pgflow.runs;
    v_root_maps boolean;
    v_size      integer := 0;
    v_steps     integer;
    v_asks      boolean;
begin
    select
        count(*),
        coalesce(bool_or(s.step_type = 'map' and s.deps_count = 0), false),
        coalesce(
            bool_or(
                s.deps_count = 0
                and (s.required_input_pattern is not null or s.forbidden_input_pattern is not null)),
            false)
    into v_steps, v_root_maps, v_asks
    from pgflow.steps as s
    where s.flow_slug = start_flow.flow_slug;

    if v_root_maps then
        if start_flow.input is null then
            raise exception 'Flow % has root map steps but input is NULL', start_flow.flow_slug;
        elsif jsonb_typeof(start_flow.input) <> 'array' then
            raise exception 'Flow % has root map steps but input is not an array (got %)',
                start_flow.flow_slug, jsonb_typeof(start_flow.input);
        end if;
        v_size := jsonb_array_length(start_flow.input);
    end if;

    insert into pgflow.runs (run_id, flow_slug, input, remaining_steps)
    values (coalesce(start_flow.run_id, gen_random_uuid()), start_flow.flow_slug, start_flow.input, v_steps)
    returning * into v_run;

    insert into pgflow.step_states (flow_slug, run_id, step_slug, remaining_deps, initial_tasks)
    select
        s.flow_slug, v_run.run_id, s.step_slug, s.deps_count,
        case when s.step_type <> 'map' then 1 when s.deps_count = 0 then v_size end
    from pgflow.steps as s
    where s.flow_slug = v_run.flow_slug
    order by s.step_index;

    perform realtime.send(
        jsonb_build_object(
            'event_type', 'run:started', 'run_id', v_run.run_id, 'flow_slug', v_run.flow_slug, 'input', v_run.input,
            'status', v_run.status, 'remaining_steps', v_run.remaining_steps, 'started_at', v_run.started_at),
        'run:started', 'pgflow:run:' || v_run.run_id, false);

    if v_asks and not pgflow.cascade_resolve_conditions(v_run.run_id) then
        return query select r.* from pgflow.runs as r where r.run_id = v_run.run_id;
        return;
    end if;
    if v_asks or (v_root_maps and v_size = 0) then
        perform pgflow.cascade_complete_taskless_steps(v_run.run_id);
    end if;
    perform pgflow.start_ready_steps(v_run.run_id);
    if v_steps = 0 or v_asks or (v_root_maps and v_size = 0) then
        perform pgflow.maybe_complete_run(v_run.run_id);
        return query select r.* from pgflow.runs as r where r.run_id = v_run.run_id;
    else
        return next v_run;
    end if;
end;
$$;
