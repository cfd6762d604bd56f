-- Skips a step and everything that depends on it, directly or not, as far as it has not ended: the step for the reason given,
-- the others as `dependency_skipped`, parents before children. Returns how many steps it skipped; the caller looks whether the
-- run is then complete.
-- Called by: `cascade_resolve_conditions` and `fail_task` (when_unmet, when_exhausted = 'skip-cascade'). Failure: the caller's;
-- an unknown run is P0001. A failed run is left as it is.
-- Locks: maps that have started, then the run, then the other steps, then messages: the order of sql/README.md. Its callers hold
-- the run already and name a step none of whose dependents can have started. Only a call by hand on a step that has completed
-- meets such; a map that starts between the two locks is taken after the run, where a deadlock is possible.
create or replace function pgflow._cascade_force_skip_steps(run_id uuid, step_slug text, skip_reason text)
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
    v_flow     text;
    v_steps    text[];
    v_skipped  text[];
    v_events   text[];
    v_payloads jsonb[];
begin
    select r.flow_slug into v_flow from pgflow.runs as r where r.run_id = _cascade_force_skip_steps.run_id;
    if not found then
        raise exception 'Run not found: %', _cascade_force_skip_steps.run_id;
    end if;

    with recursive named as (
        select _cascade_force_skip_steps.step_slug as slug
        union
        select e.step_slug from named join pgflow.deps as e on e.flow_slug = v_flow and e.dep_slug = named.slug
    )
    select array_agg(named.slug) into v_steps from named;

    perform from pgflow.step_states as s
    where s.run_id = _cascade_force_skip_steps.run_id and s.step_slug = any (v_steps)
      and s.status = 'started' and s.initial_tasks > 1
    order by s.step_slug
    for no key update;
    perform from pgflow.runs as r
    where r.run_id = _cascade_force_skip_steps.run_id and r.status <> 'failed'
    for no key update;
    if not found then
        return 0;
    end if;

    -- A dependency is there before what depends on it, so it has the lower index.
    with skipped as (
        update pgflow.step_states as s
        set status = 'skipped', skipped_at = greatest(now(), s.created_at), remaining_tasks = null,
            skip_reason = case
                when s.step_slug = _cascade_force_skip_steps.step_slug then _cascade_force_skip_steps.skip_reason
                else 'dependency_skipped'
            end
        where s.run_id = _cascade_force_skip_steps.run_id and s.step_slug = any (v_steps)
          and s.status in ('created', 'started')
        returning s.step_slug
    )
    select array_agg(skipped.step_slug order by d.step_index)
    into v_skipped
    from skipped
    join pgflow.steps as d on d.flow_slug = v_flow and d.step_slug = skipped.step_slug;
    if v_skipped is null then
        return 0;
    end if;

    update pgflow.runs as r
    set remaining_steps = r.remaining_steps - cardinality(v_skipped)
    where r.run_id = _cascade_force_skip_steps.run_id;

    select
        array_agg('step:' || s.step_slug || ':skipped' order by skipped.place),
        array_agg(
            jsonb_build_object(
                'event_type', 'step:skipped', 'run_id', s.run_id, 'flow_slug', s.flow_slug, 'step_slug', s.step_slug,
                'status', s.status, 'skip_reason', s.skip_reason, 'skipped_at', s.skipped_at)
            order by skipped.place)
    into v_events, v_payloads
    from unnest(v_skipped) with ordinality as skipped(step_slug, place)
    join pgflow.step_states as s
      on s.run_id = _cascade_force_skip_steps.run_id and s.step_slug = skipped.step_slug;
    perform flowgate.publish('pgflow:run:' || _cascade_force_skip_steps.run_id, v_events, v_payloads);

    perform pgmq.archive(v_flow::text, array_agg(t.message_id order by t.message_id))
    from pgflow.step_tasks as t
    where t.run_id = _cascade_force_skip_steps.run_id and t.step_slug = any (v_skipped)
      and t.status in ('queued', 'started')
    having count(t.message_id) > 0;
    return cardinality(v_skipped);
end;
$$;
