-- Completes every ready step that has no tasks (a map over nothing), wave after wave, and tells their dependents. Returns
-- how many steps it completed. A dependent map gets nothing to do itself and falls in the next wave; a dependent single runs.
-- Called by: `start_flow` and `complete_task`, when a step without tasks became ready. Locks: run, then step rows that have
-- not started (only holders of the run's lock touch those). Failure: the caller's; more than 50 waves raise.
create or replace function pgflow.cascade_complete_taskless_steps(run_id uuid)
returns integer
language plpgsql
volatile
set search_path = ''
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
as $$
#variable_conflict use_column
declare
    v_steps text[];
    v_total integer := 0;
    v_waves integer := 0;
begin
    perform from pgflow.runs as r where r.run_id = cascade_complete_taskless_steps.run_id for no key update;

    loop
        v_waves := v_waves + 1;
        if v_waves > 50 then
            raise exception 'Cascade loop exceeded safety limit of 50 iterations';
        end if;

        with done as (
            update pgflow.step_states as s
            set status = 'completed', started_at = now(), completed_at = now(), remaining_tasks = 0
            where s.run_id = cascade_complete_taskless_steps.run_id
              and s.status = 'created' and s.remaining_deps = 0 and s.initial_tasks = 0
            returning s.step_slug
        )
        select array_agg(done.step_slug order by done.step_slug) into v_steps from done;
        exit when v_steps is null;

        perform flowgate.publish(
            'pgflow:run:' || cascade_complete_taskless_steps.run_id,
            array_agg('step:' || s.step_slug || ':completed' order by done.place),
            array_agg(
                jsonb_build_object(
                    'event_type', 'step:completed', 'run_id', s.run_id, 'step_slug', s.step_slug, 'status', s.status,
                    'output', '[]'::jsonb, 'started_at', s.started_at, 'completed_at', s.completed_at,
                    'remaining_tasks', 0, 'remaining_deps', 0)
                order by done.place))
        from unnest(v_steps) with ordinality as done(step_slug, place)
        join pgflow.step_states as s
          on s.run_id = cascade_complete_taskless_steps.run_id and s.step_slug = done.step_slug;

        update pgflow.step_states as child
        set remaining_deps = child.remaining_deps - told.parents,
            initial_tasks = case when told.step_type = 'map' then 0 else child.initial_tasks end
        from (
            select d.flow_slug, d.step_slug, c.step_type, count(*)::integer as parents
            from pgflow.runs as r
            join pgflow.deps as d on d.flow_slug = r.flow_slug and d.dep_slug = any (v_steps)
            join pgflow.steps as c on c.flow_slug = d.flow_slug and c.step_slug = d.step_slug
            where r.run_id = cascade_complete_taskless_steps.run_id
            group by d.flow_slug, d.step_slug, c.step_type
        ) as told
        where child.run_id = cascade_complete_taskless_steps.run_id and child.step_slug = told.step_slug;

        update pgflow.runs as r
        set remaining_steps = r.remaining_steps - cardinality(v_steps)
        where r.run_id = cascade_complete_taskless_steps.run_id;

        v_total := v_total + cardinality(v_steps);
    end loop;

    return v_total;
end;
$$;
