-- Completes the run if no step remains, and publishes `events` and after them that it has completed; without a run to complete,
-- `events` alone. Its output is {step: output} over the completed steps that nothing depends on; skipped steps are left out, and
-- where nothing else is left, the output is null.
-- Called by: `maybe_complete_run`; `complete_task`, with the step that was the last. Locks: the run. Failure: the caller's.
create or replace function pgflow._complete_run(run_id uuid, events text[], payloads jsonb[])
returns void
language plpgsql
volatile
set search_path = ''
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
as $$
#variable_conflict use_column
declare
    v_run pgflow.runs;
begin
    update pgflow.runs as r
    set status = 'completed',
        completed_at = greatest(now(), r.started_at),
        output = (
            select jsonb_object_agg(s.step_slug, s.output)
            from pgflow.step_states as s
            where s.run_id = _complete_run.run_id
              and s.status = 'completed'
              and not exists (
                  select from pgflow.deps as e where e.flow_slug = s.flow_slug and e.dep_slug = s.step_slug)
        )
    where r.run_id = _complete_run.run_id and r.remaining_steps = 0 and r.status = 'started'
    returning r.* into v_run;

    if found then
        perform flowgate.publish(
            'pgflow:run:' || v_run.run_id,
            _complete_run.events || 'run:completed'::text,
            _complete_run.payloads || jsonb_build_object(
                'event_type', 'run:completed', 'run_id', v_run.run_id, 'flow_slug', v_run.flow_slug,
                'status', v_run.status, 'output', v_run.output, 'completed_at', v_run.completed_at));
    elsif cardinality(_complete_run.events) > 0 then
        perform flowgate.publish('pgflow:run:' || _complete_run.run_id, _complete_run.events, _complete_run.payloads);
    end if;
end;
$$;
