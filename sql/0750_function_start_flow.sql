-- Starts a run and returns its row as it is after everything that could happen at once has happened.
-- Called by: applications. Locks: rows of its own only, and a key share of the flow's. Failure: the caller's, and no run is left:
-- unknown flow 23503, run_id used before 23505, input that is no array for a root map P0001. A condition that must be met and is
-- not is no failure of the call: it returns the failed run.
create or replace function pgflow.start_flow(flow_slug text, input jsonb, run_id uuid default null)
returns setof pgflow.runs
language plpgsql
volatile
set search_path = ''
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
as $$
#variable_conflict use_column
declare
    v_run       pgflow.runs;
    v_root_maps boolean;
    v_size      integer := 0;
    v_count     integer;
    v_steps     text[];
    v_types     text[];
    v_waits     integer[];
    v_roots     text[];
    v_sizes     integer[];
    v_delays    integer[];
    v_asks      boolean;
    v_taskless  boolean;
    v_events    text[];
    v_payloads  jsonb[];
begin
    -- Once: a step that is added meanwhile must be in all of what follows, or in nothing of it.
    select
        count(*), array_agg(s.step_slug order by s.step_index), array_agg(s.step_type order by s.step_index),
        array_agg(s.deps_count order by s.step_index), coalesce(bool_or(s.step_type = 'map' and s.deps_count = 0), false),
        coalesce(
            bool_or(s.required_input_pattern is not null or s.forbidden_input_pattern is not null)
                filter (where s.deps_count = 0),
            false),
        array_agg(s.step_slug order by s.step_slug) filter (where s.deps_count = 0),
        array_agg(case s.step_type when 'single' then 1 end order by s.step_slug) filter (where s.deps_count = 0),
        array_agg(coalesce(s.opt_start_delay, 0) order by s.step_slug) filter (where s.deps_count = 0)
    into v_count, v_steps, v_types, v_waits, v_root_maps, v_asks, v_roots, v_sizes, v_delays
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
        v_sizes := array_replace(v_sizes, null, v_size);
    end if;
    v_taskless := v_root_maps and v_size = 0;

    insert into pgflow.runs (run_id, flow_slug, input, remaining_steps)
    values (coalesce(start_flow.run_id, gen_random_uuid()), start_flow.flow_slug, start_flow.input, v_count)
    returning * into v_run;

    -- Roots start at once, unless there is a condition to look at before, or steps without tasks must be completed, with all that
    -- follows from it.
    insert into pgflow.step_states (
        flow_slug, run_id, step_slug, remaining_deps, initial_tasks, status, started_at, remaining_tasks)
    select
        v_run.flow_slug, v_run.run_id, s.step_slug, s.deps_count, task.initial,
        case when task.starts then 'started' else 'created' end,
        case when task.starts then now() end,
        case when task.starts then task.initial end
    from unnest(v_steps, v_types, v_waits) with ordinality as s(step_slug, step_type, deps_count, place)
    cross join lateral (
        select
            case when s.step_type <> 'map' then 1 when s.deps_count = 0 then v_size end as initial,
            s.deps_count = 0 and not v_taskless and not v_asks as starts
    ) as task
    order by s.place;

    v_events := array['run:started'];
    v_payloads := array[jsonb_build_object(
        'event_type', 'run:started', 'run_id', v_run.run_id, 'flow_slug', v_run.flow_slug, 'input', v_run.input,
        'status', v_run.status, 'remaining_steps', v_run.remaining_steps, 'started_at', v_run.started_at)];

    if v_roots is not null and not v_taskless and not v_asks then
        perform pgflow._spawn_tasks(
            v_run.flow_slug, v_run.run_id, v_roots, v_sizes, v_delays, v_events, v_payloads);
        return next v_run;
        return;
    end if;

    -- No steps at all, or some without tasks, or with a condition.
    perform flowgate.publish('pgflow:run:' || v_run.run_id, v_events, v_payloads);
    if v_asks and not pgflow.cascade_resolve_conditions(v_run.run_id) then
        return query select r.* from pgflow.runs as r where r.run_id = v_run.run_id;
        return;
    end if;
    if v_taskless or v_asks then
        perform pgflow.cascade_complete_taskless_steps(v_run.run_id);
        perform pgflow.start_ready_steps(v_run.run_id);
    end if;
    perform pgflow.maybe_complete_run(v_run.run_id);
    return query select r.* from pgflow.runs as r where r.run_id = v_run.run_id;
end;
$$;
