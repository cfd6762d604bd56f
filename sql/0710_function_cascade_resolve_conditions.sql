-- Looks at every step that is ready and has a condition, and fails the run, skips the step, or skips it with all that depends on
-- it, where the condition is not met; again, until no step changes. Returns whether the run has not failed.
-- A condition is held against the run's input for a step that begins a run, else against {dependency: output} of the
-- dependencies that completed.
-- Called by: `start_flow`, `complete_task`, `fail_task` and `cascade_complete_taskless_steps`, when a step with a condition may
-- have become ready; always before ready steps are completed or started. Locks: the run, then rows of steps that have not started
-- (only holders of the run's lock touch those), then messages. Failure: the caller's; more than 50 rounds raise.
create or replace function pgflow.cascade_resolve_conditions(run_id uuid)
returns boolean
language plpgsql
volatile
set search_path = ''
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
as $$
#variable_conflict use_column
declare
    v_topic    text := 'pgflow:run:' || cascade_resolve_conditions.run_id;
    v_run      pgflow.runs;
    v_failing  text;
    v_skipped  text[];
    v_cascade  text[];
    v_step     text;
    v_events   text[];
    v_payloads jsonb[];
    v_rounds   integer := 0;
    v_now      timestamptz;
begin
    select r.* into v_run from pgflow.runs as r where r.run_id = cascade_resolve_conditions.run_id for no key update;
    if v_run.status <> 'started' then
        return v_run.status <> 'failed';
    end if;
    v_now := greatest(now(), v_run.started_at);

    loop
        v_rounds := v_rounds + 1;
        if v_rounds > 50 then
            raise exception 'cascade_resolve_conditions exceeded safety limit of 50 iterations';
        end if;

        with ready as (
            select
                d.step_slug, d.step_index, d.when_unmet, d.required_input_pattern, d.forbidden_input_pattern,
                case when d.deps_count = 0 then v_run.input else
                    coalesce(
                        (select jsonb_object_agg(parent.step_slug, parent.output)
                         from pgflow.deps as e
                         join pgflow.step_states as parent
                           on parent.run_id = s.run_id and parent.step_slug = e.dep_slug
                         where e.flow_slug = d.flow_slug and e.step_slug = d.step_slug and parent.status = 'completed'),
                        '{}'::jsonb)
                end as input
            from pgflow.step_states as s
            join pgflow.steps as d on d.flow_slug = s.flow_slug and d.step_slug = s.step_slug
            where s.run_id = v_run.run_id and s.status = 'created' and s.remaining_deps = 0
              and (d.required_input_pattern is not null or d.forbidden_input_pattern is not null)
        )
        select
            (array_agg(ready.step_slug order by ready.step_index) filter (where ready.when_unmet = 'fail'))[1],
            array_agg(ready.step_slug order by ready.step_index) filter (where ready.when_unmet = 'skip'),
            array_agg(ready.step_slug order by ready.step_index) filter (where ready.when_unmet = 'skip-cascade')
        into v_failing, v_skipped, v_cascade
        from ready
        where not coalesce(ready.input @> ready.required_input_pattern, true)
           or coalesce(ready.input @> ready.forbidden_input_pattern, false);

        if v_failing is not null then
            update pgflow.step_states as s
            set status = 'failed', failed_at = v_now, error_message = 'Condition not met'
            where s.run_id = v_run.run_id and s.step_slug = v_failing;
            update pgflow.runs as r set status = 'failed', failed_at = v_now where r.run_id = v_run.run_id
            returning r.* into v_run;

            perform flowgate.publish(
                v_topic,
                array['step:' || v_failing || ':failed', 'run:failed'],
                array[
                    jsonb_build_object(
                        'event_type', 'step:failed', 'run_id', v_run.run_id, 'step_slug', v_failing,
                        'status', 'failed', 'error_message', 'Condition not met', 'failed_at', v_run.failed_at),
                    jsonb_build_object(
                        'event_type', 'run:failed', 'run_id', v_run.run_id, 'flow_slug', v_run.flow_slug,
                        'status', v_run.status, 'error_message', 'Condition not met', 'failed_at', v_run.failed_at)]);
            perform pgflow._archive_run_messages(v_run.flow_slug, v_run.run_id, null);
            return false;
        end if;

        if v_skipped is not null then
            update pgflow.step_states as s
            set status = 'skipped', skip_reason = 'condition_unmet', skipped_at = v_now
            where s.run_id = v_run.run_id and s.step_slug = any (v_skipped);

            select
                array_agg('step:' || skipped.step_slug || ':skipped' order by skipped.place),
                array_agg(
                    jsonb_build_object(
                        'event_type', 'step:skipped', 'run_id', v_run.run_id, 'flow_slug', v_run.flow_slug,
                        'step_slug', skipped.step_slug, 'status', 'skipped', 'skip_reason', 'condition_unmet',
                        'skipped_at', v_now)
                    order by skipped.place)
            into v_events, v_payloads
            from unnest(v_skipped) with ordinality as skipped(step_slug, place);
            perform flowgate.publish(v_topic, v_events, v_payloads);

            -- A map has one dependency only: with that skipped, it has nothing to map.
            update pgflow.step_states as child
            set remaining_deps = child.remaining_deps - told.parents,
                initial_tasks = case when told.step_type = 'map' then 0 else child.initial_tasks end
            from (
                select e.step_slug, d.step_type, count(*)::integer as parents
                from pgflow.deps as e
                join pgflow.steps as d on d.flow_slug = e.flow_slug and d.step_slug = e.step_slug
                where e.flow_slug = v_run.flow_slug and e.dep_slug = any (v_skipped)
                group by e.step_slug, d.step_type
            ) as told
            where child.run_id = v_run.run_id and child.step_slug = told.step_slug and child.status = 'created';

            update pgflow.runs as r
            set remaining_steps = r.remaining_steps - cardinality(v_skipped)
            where r.run_id = v_run.run_id;
        end if;

        foreach v_step in array coalesce(v_cascade, '{}') loop
            perform pgflow._cascade_force_skip_steps(v_run.run_id, v_step, 'condition_unmet');
        end loop;
        exit when v_skipped is null;
    end loop;

    return true;
end;
$$;
