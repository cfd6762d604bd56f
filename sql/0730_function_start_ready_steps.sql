-- Starts every step whose dependencies are met: one message and one queued task each for its tasks, in order of task_index.
-- Called by: `start_flow`, `complete_task` and `fail_task`, where a step that was skipped, had no tasks or has a condition made
-- others ready; conditions have been looked at. Locks: run, then rows of steps that have not started. Failure: the caller's.
create or replace function pgflow.start_ready_steps(run_id uuid)
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
    v_flow_slug  text;
    v_started_at timestamptz;
    v_steps      text[];
    v_sizes      integer[];
    v_delays     integer[];
begin
    select r.flow_slug, greatest(now(), r.started_at)
    into v_flow_slug, v_started_at
    from pgflow.runs as r
    where r.run_id = start_ready_steps.run_id and r.status = 'started'
    for no key update;
    if not found then
        return;
    end if;

    with ready as (
        update pgflow.step_states as s
        set status = 'started', started_at = v_started_at, remaining_tasks = s.initial_tasks
        where s.run_id = start_ready_steps.run_id
          and s.status = 'created' and s.remaining_deps = 0 and s.initial_tasks > 0
        returning s.step_slug, s.initial_tasks
    )
    select
        array_agg(ready.step_slug order by ready.step_slug),
        array_agg(ready.initial_tasks order by ready.step_slug),
        array_agg(coalesce(d.opt_start_delay, 0) order by ready.step_slug)
    into v_steps, v_sizes, v_delays
    from ready
    join pgflow.steps as d on d.flow_slug = v_flow_slug and d.step_slug = ready.step_slug;

    if v_steps is not null then
        perform pgflow._spawn_tasks(
            v_flow_slug, start_ready_steps.run_id, v_steps, v_sizes, v_delays, '{}', '{}', v_started_at);
    end if;
end;
$$;
