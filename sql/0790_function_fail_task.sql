-- Records that a started task failed: queued again after a delay that doubles, until its tries are used up. Then the task has
-- failed, and what becomes of its step is said by `when_exhausted`: step and run fail, and no message of the run stays in the
-- queue; or the step is skipped, alone or with all that depends on it, and the run goes on. Returns the task's row; a task that
-- has ended is not changed, and a call for a step that has ended or was skipped only clears the message away.
-- Called by: workers, once per failed try. Failure: the caller's, whole; the message comes back when its time is up.
-- Locks, until commit: a step's only task takes the run first, then the task; a map's task takes the task, and step and run, in
-- this order, only if the failure is final; then rows of steps that have not started, then messages: the order of `complete_task`
-- (sql/README.md, "Locks").
create or replace function pgflow.fail_task(run_id uuid, step_slug text, task_index integer, error_message text)
returns setof pgflow.step_tasks
language plpgsql
volatile
set search_path = ''
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
as $$
#variable_conflict use_column
declare
    v_topic text := 'pgflow:run:' || fail_task.run_id;
    v_step  record;
    v_task  pgflow.step_tasks;
    v_moved boolean;
    v_first boolean := false;
    v_delay numeric;
begin
    select
        s.initial_tasks = 1 as alone, s.status, r.status as run_status, d.when_exhausted,
        coalesce(d.opt_max_attempts, f.opt_max_attempts) as max_attempts,
        coalesce(d.opt_base_delay, f.opt_base_delay)::numeric as base_delay
    into v_step
    from pgflow.step_states as s
    join pgflow.runs as r on r.run_id = s.run_id
    join pgflow.steps as d on d.flow_slug = s.flow_slug and d.step_slug = s.step_slug
    join pgflow.flows as f on f.flow_slug = s.flow_slug
    where s.run_id = fail_task.run_id and s.step_slug = fail_task.step_slug;

    if v_step.alone and v_step.status = 'started' then
        -- Whatever has become of the step meanwhile is seen in what follows.
        select r.status into v_step.run_status
        from pgflow.runs as r
        where r.run_id = fail_task.run_id
        for no key update;
    end if;

    -- In a failed run the task is closed, and that is all.
    update pgflow.step_tasks as t
    set status = case when v_step.run_status = 'failed' or t.attempts_count >= v_step.max_attempts then 'failed' else 'queued' end,
        failed_at = case
            when v_step.run_status = 'failed' or t.attempts_count >= v_step.max_attempts then greatest(now(), t.started_at)
        end,
        started_at = case
            when v_step.run_status = 'failed' or t.attempts_count >= v_step.max_attempts then t.started_at
        end,
        error_message = fail_task.error_message
    where t.run_id = fail_task.run_id and t.step_slug = fail_task.step_slug and t.task_index = fail_task.task_index
      and t.status = 'started'
      and (v_step.run_status = 'failed'
           or exists (
               select from pgflow.step_states as s
               where s.run_id = t.run_id and s.step_slug = t.step_slug and s.status = 'started'))
    returning t.* into v_task;
    v_moved := found;
    if not v_moved then
        select t.* into v_task
        from pgflow.step_tasks as t
        where t.run_id = fail_task.run_id and t.step_slug = fail_task.step_slug and t.task_index = fail_task.task_index;
        if not found then
            return;
        end if;
        select s.status into v_step.status
        from pgflow.step_states as s
        where s.run_id = v_task.run_id and s.step_slug = v_task.step_slug;
        -- Late.
        if v_step.run_status = 'failed' or v_step.status <> 'started' then
            perform pgflow._archive_message(v_task.flow_slug, v_task.message_id);
            return next v_task;
            return;
        end if;
    end if;

    if v_task.status = 'queued' then
        v_delay := case
            when v_step.base_delay = 0 then 0
            when v_task.attempts_count > 31 or v_step.base_delay * 2 ^ v_task.attempts_count > 2147483647
                then 2147483647
            else pgflow.calculate_retry_delay(v_step.base_delay, v_task.attempts_count)
        end;
        execute format('update pgmq.%I set vt = $1 where msg_id = $2', 'q_' || lower(v_task.flow_slug))
        using now() + make_interval(secs => v_delay::double precision), v_task.message_id;
        return next v_task;
        return;
    elsif not v_moved then
        return next v_task;
        return;
    end if;

    -- The first failure that is final ends the step: it is locked before the run (of a step of one task the run is held already).
    if v_step.run_status <> 'failed' then
        perform from pgflow.step_states as s
        where s.run_id = v_task.run_id and s.step_slug = v_task.step_slug and s.status = 'started'
        for no key update;
        if found then
            update pgflow.runs as r
            set status = case when v_step.when_exhausted = 'fail' then 'failed' else r.status end,
                failed_at = case when v_step.when_exhausted = 'fail' then v_task.failed_at end,
                remaining_steps = r.remaining_steps - case when v_step.when_exhausted = 'fail' then 0 else 1 end
            where r.run_id = v_task.run_id and r.status = 'started';
            v_first := found;
        end if;
    end if;
    if not v_first then
        perform pgflow._archive_message(v_task.flow_slug, v_task.message_id);
        return next v_task;
        return;
    end if;

    if v_step.when_exhausted = 'fail' then
        update pgflow.step_states as s
        set status = 'failed', failed_at = v_task.failed_at, error_message = fail_task.error_message
        where s.run_id = v_task.run_id and s.step_slug = v_task.step_slug;

        perform flowgate.publish(
            v_topic,
            array['step:' || v_task.step_slug || ':failed', 'run:failed'],
            array[
                jsonb_build_object(
                    'event_type', 'step:failed', 'run_id', v_task.run_id, 'step_slug', v_task.step_slug,
                    'status', 'failed', 'error_message', fail_task.error_message, 'failed_at', v_task.failed_at),
                jsonb_build_object(
                    'event_type', 'run:failed', 'run_id', v_task.run_id, 'flow_slug', v_task.flow_slug,
                    'status', 'failed', 'error_message', fail_task.error_message, 'failed_at', v_task.failed_at)]);

        -- Those of its siblings and of other steps too.
        perform pgflow._archive_run_messages(v_task.flow_slug, v_task.run_id, v_task.message_id);
        return next v_task;
        return;
    end if;

    update pgflow.step_states as s
    set status = 'skipped', skip_reason = 'handler_failed', skipped_at = v_task.failed_at, remaining_tasks = null,
        error_message = fail_task.error_message
    where s.run_id = v_task.run_id and s.step_slug = v_task.step_slug;

    perform flowgate.publish(
        v_topic,
        array['step:' || v_task.step_slug || ':skipped'],
        array[jsonb_build_object(
            'event_type', 'step:skipped', 'run_id', v_task.run_id, 'step_slug', v_task.step_slug, 'status', 'skipped',
            'skip_reason', 'handler_failed', 'error_message', fail_task.error_message, 'skipped_at', v_task.failed_at)]);

    -- Its siblings' too; their rows stay as they are, and what their workers report comes late.
    perform pgmq.archive(v_task.flow_slug::text, array_agg(t.message_id order by t.message_id))
    from pgflow.step_tasks as t
    where t.run_id = v_task.run_id and t.step_slug = v_task.step_slug
      and (t.status in ('queued', 'started') or t.task_index = v_task.task_index)
    having count(t.message_id) > 0;

    if v_step.when_exhausted = 'skip-cascade' then
        perform pgflow._cascade_force_skip_steps(v_task.run_id, v_task.step_slug, 'handler_failed');
    else
        -- A map has one dependency only: with that skipped, it has nothing to map.
        update pgflow.step_states as child
        set remaining_deps = child.remaining_deps - 1,
            initial_tasks = case when d.step_type = 'map' then 0 else child.initial_tasks end
        from pgflow.deps as e
        join pgflow.steps as d on d.flow_slug = e.flow_slug and d.step_slug = e.step_slug
        where e.flow_slug = v_task.flow_slug and e.dep_slug = v_task.step_slug
          and child.run_id = v_task.run_id and child.step_slug = e.step_slug and child.status = 'created';

        if not pgflow.cascade_resolve_conditions(v_task.run_id) then
            return next v_task;
            return;
        end if;
        perform pgflow.cascade_complete_taskless_steps(v_task.run_id);
        perform pgflow.start_ready_steps(v_task.run_id);
    end if;
    perform pgflow.maybe_complete_run(v_task.run_id);
    return next v_task;
end;
$$;
