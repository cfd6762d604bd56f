-- Starts every step whose dependencies are met: one message and one queued task each for its tasks, in order of task_index.
-- Called by: `start_flow` and `complete_task`, where a step without tasks made others ready. Locks: run, then rows of steps
-- that have not started. Failure: the caller's.
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
    v_flow_slug text;
    v_steps     text[];
    v_sizes     integer[];
    v_delays    integer[];
begin
    select r.flow_slug into v_flow_slug
    from pgflow.runs as r
    where r.run_id = start_ready_steps.run_id and r.status <> 'failed'
    for no key update;
    if not found then
        return;
    end if;

    with ready as (
        update pgflow.step_states as s
        set status = case when s.initial_tasks = 0 then 'completed' else 'started' end,
            started_at = now(),
            completed_at = case when s.initial_tasks = 0 then now() end,
            remaining_tasks = s.initial_tasks
        where s.run_id = start_ready_steps.run_id
          and s.status = 'created' and s.remaining_deps = 0 and s.initial_tasks is not null
        returning s.step_slug, s.initial_tasks
    )
    select
        array_agg(ready.step_slug order by ready.step_slug),
        array_agg(ready.initial_tasks order by ready.step_slug),
        array_agg(coalesce(d.opt_start_delay, 0) order by ready.step_slug)
    into v_steps, v_sizes, v_delays
    from ready
    join pgflow.steps as d on d.flow_slug = v_flow_slug and d.step_slug = ready.step_slug;
    if v_steps is null then
        return;
    end if;

    -- Callers have completed steps without tasks already, with all that follows from it: only a direct call meets one.
    if 0 = any (v_sizes) then
        perform flowgate.publish(
            'pgflow:run:' || start_ready_steps.run_id,
            array_agg('step:' || step.slug || ':completed' order by step.slug),
            array_agg(
                jsonb_build_object(
                    'event_type', 'step:completed', 'run_id', start_ready_steps.run_id, 'step_slug', step.slug,
                    'status', 'completed', 'output', '[]'::jsonb, 'started_at', now(), 'completed_at', now(),
                    'remaining_tasks', 0, 'remaining_deps', 0)
                order by step.slug))
        from unnest(v_steps, v_sizes) as step(slug, size)
        where step.size = 0;

        select array_agg(step.slug), array_agg(step.size), array_agg(step.delay)
        into v_steps, v_sizes, v_delays
        from unnest(v_steps, v_sizes, v_delays) as step(slug, size, delay)
        where step.size > 0;
        if v_steps is null then
            return;
        end if;
    end if;

    perform pgflow._spawn_tasks(v_flow_slug, start_ready_steps.run_id, v_steps, v_sizes, v_delays, '{}', '{}');
end;
$$;
