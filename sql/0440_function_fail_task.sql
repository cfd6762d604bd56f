-- Records that a started task failed: queued again after a delay that doubles, until its tries are used up; then task, step
-- and run have failed, and no message of the run stays in the queue. Returns the task's row; a task that has ended is not changed.
-- Called by: workers, once per failed try. Failure: the caller's, whole; the message comes back when its time is up.
-- Locks, until commit: a step's only task takes the run first, then the task; a map's task takes the task, and step and run, in this
-- order, only if the failure is final; then messages: the order of `complete_task` (sql/README.md, "Locks").
--
-- Rows are returned column by column: a call under way when an upgrade gives the table more columns still returns those it was
-- planned with, instead of failing after its work is done.
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
    v_topic        text := 'pgflow:run:' || fail_task.run_id;
    v_alone        boolean;
    v_max_attempts integer;
    v_base_delay   numeric;
    v_run_failed   boolean;
    v_task         pgflow.step_tasks;
    v_moved        boolean;
    v_first        boolean := false;
    v_delay        numeric;
begin
    select
        s.initial_tasks = 1, coalesce(d.opt_max_attempts, f.opt_max_attempts),
        coalesce(d.opt_base_delay, f.opt_base_delay), r.status = 'failed'
    into v_alone, v_max_attempts, v_base_delay, v_run_failed
    from pgflow.step_states as s
    join pgflow.runs as r on r.run_id = s.run_id
    join pgflow.steps as d on d.flow_slug = s.flow_slug and d.step_slug = s.step_slug
    join pgflow.flows as f on f.flow_slug = s.flow_slug
    where s.run_id = fail_task.run_id and s.step_slug = fail_task.step_slug;

    if v_alone then
        select r.status = 'failed' into v_run_failed
        from pgflow.runs as r
        where r.run_id = fail_task.run_id
        for no key update;
    end if;

    update pgflow.step_tasks as t
    set status = case when v_run_failed or t.attempts_count >= v_max_attempts then 'failed' else 'queued' end,
        failed_at = case when v_run_failed or t.attempts_count >= v_max_attempts then greatest(now(), t.started_at) end,
        started_at = case when v_run_failed or t.attempts_count >= v_max_attempts then t.started_at end,
        error_message = fail_task.error_message
    where t.run_id = fail_task.run_id and t.step_slug = fail_task.step_slug and t.task_index = fail_task.task_index
      and t.status = 'started'
    returning t.* into v_task;
    v_moved := found;
    if not v_moved then
        select t.* into v_task
        from pgflow.step_tasks as t
        where t.run_id = fail_task.run_id and t.step_slug = fail_task.step_slug and t.task_index = fail_task.task_index;
        if not found then
            return;
        end if;
    end if;

    if v_task.status = 'queued' and not v_run_failed then
        v_delay := case
            when v_base_delay = 0 then 0
            when v_task.attempts_count > 31 or v_base_delay * 2 ^ v_task.attempts_count > 2147483647 then 2147483647
            else pgflow.calculate_retry_delay(v_base_delay, v_task.attempts_count)
        end;
        execute format('update pgmq.%I set vt = $1 where msg_id = $2', 'q_' || lower(v_task.flow_slug))
        using now() + make_interval(secs => v_delay::double precision), v_task.message_id;
        return next (
            v_task.flow_slug, v_task.run_id, v_task.step_slug, v_task.message_id, v_task.task_index, v_task.status,
            v_task.attempts_count, v_task.error_message, v_task.output, v_task.queued_at, v_task.completed_at,
            v_task.failed_at, v_task.started_at, v_task.last_worker_id);
        return;
    end if;

    -- The first failure that is final fails step and run.
    if v_moved and not v_run_failed then
        update pgflow.step_states as s
        set status = 'failed', failed_at = v_task.failed_at, error_message = fail_task.error_message
        where s.run_id = v_task.run_id and s.step_slug = v_task.step_slug and s.status = 'started';
        if found then
            update pgflow.runs as r
            set status = 'failed', failed_at = v_task.failed_at
            where r.run_id = v_task.run_id and r.status = 'started';
            v_first := found;
            if not v_first then
                -- Another step failed it after this call's look.
                update pgflow.step_states as s
                set status = 'started', failed_at = null, error_message = null
                where s.run_id = v_task.run_id and s.step_slug = v_task.step_slug;
            end if;
        end if;
    end if;

    -- The run had failed already: the task is closed, and that is all.
    if not v_first then
        if v_moved or v_task.status = 'queued' then
            perform pgflow._archive_message(v_task.flow_slug, v_task.message_id);
        end if;
        return next (
            v_task.flow_slug, v_task.run_id, v_task.step_slug, v_task.message_id, v_task.task_index, v_task.status,
            v_task.attempts_count, v_task.error_message, v_task.output, v_task.queued_at, v_task.completed_at,
            v_task.failed_at, v_task.started_at, v_task.last_worker_id);
        return;
    end if;

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
    return next (
        v_task.flow_slug, v_task.run_id, v_task.step_slug, v_task.message_id, v_task.task_index, v_task.status,
        v_task.attempts_count, v_task.error_message, v_task.output, v_task.queued_at, v_task.completed_at, v_task.failed_at,
        v_task.started_at, v_task.last_worker_id);
end;
$$;
