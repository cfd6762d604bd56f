-- Completes a started task, and with its last task the step, and with its last step the run. Returns the task's row; a call
-- that comes late changes nothing: of a step that has ended or was skipped it only clears the message away. An output that a
-- dependent map can't use fails the run, and so may the condition of a step that becomes ready.
-- Called by: workers, once per task. Failure: the caller's, whole; the worker then usually calls `fail_task`.
-- Locks, until commit: the task's own step, then the run, only if this task ends the step, then the task and rows of steps that
-- have not started, then messages. `fail_task` goes the same way, so the two can't deadlock (sql/README.md, "Locks").
--
-- A task that does not end its step costs two HOT updates and the archive, however large the map. It looks at the run's
-- status after it has the step's lock, in a later statement, so a run whose failure was committed is seen as failed; a failure
-- that commits after that look comes after this completion, and archives what is left. The array of a map's outputs is made
-- once, by its last task, and kept in the step.
create or replace function pgflow.complete_task(run_id uuid, step_slug text, task_index integer, output jsonb)
returns setof pgflow.step_tasks
language plpgsql
volatile
set search_path = ''
as $$
#variable_conflict use_column
declare
    v_topic     text := 'pgflow:run:' || complete_task.run_id;
    v_counted   boolean;
    v_step      record;
    v_task      pgflow.step_tasks;
    v_run       pgflow.runs;
    v_output    jsonb := complete_task.output;
    v_map       text;
    v_size      integer;
    v_problem   text;
    v_ready     boolean;
    v_taskless  boolean;
    v_asks      boolean;
    v_remaining integer;
begin
    -- Locks the step and, if others remain, counts this task off: the usual task of a map needs no more of the step.
    update pgflow.step_states as s
    set remaining_tasks = s.remaining_tasks - 1
    where s.run_id = complete_task.run_id and s.step_slug = complete_task.step_slug
      and s.status = 'started' and s.remaining_tasks > 1;
    v_counted := found;

    if not v_counted then
        select s.status, s.remaining_tasks, s.initial_tasks, d.step_type
        into v_step
        from pgflow.step_states as s
        join pgflow.steps as d on d.flow_slug = s.flow_slug and d.step_slug = s.step_slug
        where s.run_id = complete_task.run_id and s.step_slug = complete_task.step_slug
        for no key update of s;

        if v_step.status is distinct from 'started' or v_step.remaining_tasks is distinct from 1 then
            if v_step.status <> 'started' then
                perform pgflow._archive_task_message(
                    complete_task.run_id, complete_task.step_slug, complete_task.task_index);
            end if;
            return query
            select t.*
            from pgflow.step_tasks as t
            where t.run_id = complete_task.run_id and t.step_slug = complete_task.step_slug
              and t.task_index = complete_task.task_index;
            return;
        end if;
        perform from pgflow.runs as r where r.run_id = complete_task.run_id for no key update;

        if v_step.step_type = 'single' and jsonb_typeof(v_output) is distinct from 'array' then
            select child.step_slug
            into v_map
            from pgflow.step_states as s
            join pgflow.deps as e on e.flow_slug = s.flow_slug and e.dep_slug = s.step_slug
            join pgflow.steps as d on d.flow_slug = e.flow_slug and d.step_slug = e.step_slug and d.step_type = 'map'
            join pgflow.step_states as child
              on child.run_id = s.run_id and child.step_slug = e.step_slug and child.status = 'created'
             and child.initial_tasks is null
            where s.run_id = complete_task.run_id and s.step_slug = complete_task.step_slug
            order by d.step_index
            limit 1;
        end if;
    end if;

    update pgflow.step_tasks as t
    set status = case when v_map is null then 'completed' else 'failed' end,
        completed_at = case when v_map is null then greatest(now(), t.started_at) end,
        failed_at = case when v_map is null then null else greatest(now(), t.started_at) end,
        error_message = case
            when v_map is null then t.error_message
            else '[TYPE_VIOLATION] Produced ' || coalesce(jsonb_typeof(v_output), 'null') || ' instead of array'
        end,
        output = v_output
    where t.run_id = complete_task.run_id and t.step_slug = complete_task.step_slug
      and t.task_index = complete_task.task_index and t.status = 'started'
      and exists (select from pgflow.runs as r where r.run_id = t.run_id and r.status <> 'failed')
    returning t.* into v_task;

    if not found then
        if v_counted then
            update pgflow.step_states as s
            set remaining_tasks = s.remaining_tasks + 1
            where s.run_id = complete_task.run_id and s.step_slug = complete_task.step_slug;
        end if;
        return query
        select t.*
        from pgflow.step_tasks as t
        where t.run_id = complete_task.run_id and t.step_slug = complete_task.step_slug
          and t.task_index = complete_task.task_index;
        return;
    end if;

    if v_counted then
        perform pgmq.archive(v_task.flow_slug::text, v_task.message_id::bigint);
        return next v_task;
        return;
    end if;

    if v_map is not null then
        v_problem := '[TYPE_VIOLATION] Map step ' || v_map || ' expects array input but dependency '
            || v_task.step_slug || ' produced ' || coalesce(jsonb_typeof(v_output), 'null');

        update pgflow.runs as r set status = 'failed', failed_at = v_task.failed_at where r.run_id = v_task.run_id
        returning r.* into v_run;
        update pgflow.step_states as s
        set status = 'failed', failed_at = v_task.failed_at, error_message = v_problem
        where s.run_id = v_task.run_id and s.step_slug = v_task.step_slug;

        perform realtime.send(
            jsonb_build_object(
                'event_type', 'run:failed', 'run_id', v_run.run_id, 'flow_slug', v_run.flow_slug,
                'status', v_run.status, 'failed_at', v_run.failed_at),
            'run:failed', v_topic, false);
        perform realtime.send(
            jsonb_build_object(
                'event_type', 'step:failed', 'run_id', v_task.run_id, 'step_slug', v_task.step_slug,
                'status', 'failed', 'error_message', v_problem, 'failed_at', v_run.failed_at),
            'step:' || v_task.step_slug || ':failed', v_topic, false);

        perform pgmq.archive(v_task.flow_slug::text, array_agg(t.message_id))
        from pgflow.step_tasks as t
        where t.run_id = v_task.run_id
          and (t.status in ('queued', 'started')
               or (t.step_slug = v_task.step_slug and t.task_index = v_task.task_index))
        having count(t.message_id) > 0;
        return next v_task;
        return;
    end if;

    -- The step's last task.
    if v_step.step_type = 'map' then
        select jsonb_agg(t.output order by t.task_index)
        into v_output
        from pgflow.step_tasks as t
        where t.run_id = v_task.run_id and t.step_slug = v_task.step_slug and t.status = 'completed';
        v_size := v_step.initial_tasks;
    elsif jsonb_typeof(v_output) = 'array' then
        v_size := jsonb_array_length(v_output);
    end if;

    update pgflow.step_states as s
    set status = 'completed', completed_at = v_task.completed_at, remaining_tasks = 0, output = v_output
    where s.run_id = v_task.run_id and s.step_slug = v_task.step_slug;

    with told as (
        update pgflow.step_states as child
        set remaining_deps = child.remaining_deps - 1,
            initial_tasks = coalesce(child.initial_tasks, v_size)       -- null only for a map, of which this is the parent
        from pgflow.deps as e
        join pgflow.steps as d on d.flow_slug = e.flow_slug and d.step_slug = e.step_slug
        where e.flow_slug = v_task.flow_slug and e.dep_slug = v_task.step_slug
          and child.run_id = v_task.run_id and child.step_slug = e.step_slug and child.status = 'created'
        returning
            child.remaining_deps, child.initial_tasks,
            d.required_input_pattern is not null or d.forbidden_input_pattern is not null as asks
    )
    select
        bool_or(told.remaining_deps = 0),
        bool_or(told.remaining_deps = 0 and told.initial_tasks = 0),
        bool_or(told.remaining_deps = 0 and told.asks)
    into v_ready, v_taskless, v_asks
    from told;

    update pgflow.runs as r
    set remaining_steps = r.remaining_steps - 1
    where r.run_id = v_task.run_id
    returning r.remaining_steps into v_remaining;

    perform realtime.send(
        jsonb_build_object(
            'event_type', 'step:completed', 'run_id', v_task.run_id, 'step_slug', v_task.step_slug,
            'status', 'completed', 'output', v_output, 'completed_at', v_task.completed_at),
        'step:' || v_task.step_slug || ':completed', v_topic, false);

    perform pgmq.archive(v_task.flow_slug::text, v_task.message_id::bigint);
    if v_asks and not pgflow.cascade_resolve_conditions(v_task.run_id) then
        return next v_task;
        return;
    end if;
    -- A step that was skipped may have made others ready, of any kind.
    if v_asks or v_taskless then
        perform pgflow.cascade_complete_taskless_steps(v_task.run_id);
    end if;
    if v_asks or v_ready then
        perform pgflow.start_ready_steps(v_task.run_id);
    end if;
    if v_asks or v_taskless or v_remaining = 0 then
        perform pgflow.maybe_complete_run(v_task.run_id);
    end if;
    return next v_task;
end;
$$;
