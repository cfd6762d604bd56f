-- Completes a started task, and with its last task the step, and with its last step the run. Returns the task's row; a call
-- that comes late changes nothing: of a step that has ended or was skipped it only clears the message away. An output that a
-- dependent map can't use fails the run, and so may the condition of a step that becomes ready.
-- Called by: workers, once per task. Failure: the caller's, whole; the worker then usually calls `fail_task`.
-- Locks, until commit: a step's only task takes the run first, then the task; a map's task takes the task, then the step, and the
-- run only if it is the last. Then rows of steps that have not started, then messages. `fail_task` goes the same two ways
-- (sql/README.md, "Locks").
--
-- A map's task that is not the last costs two HOT updates and the archive, however large the map, and holds the step's row,
-- for which all others of the map wait, as late and as briefly as it can. It looks at run and step before: a failure of the run
-- that commits after that look comes after this completion, and archives what is left; of a step that was skipped after it,
-- the task is put back as it was. The array of a map's outputs is made once, by its last task, and kept in the step.
create or replace function pgflow.complete_task(run_id uuid, step_slug text, task_index integer, output jsonb)
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
    v_task      pgflow.step_tasks;
    v_step_type text;
    v_map       text;
    v_open      boolean;
    v_output    jsonb;
    v_size      integer;
    v_left      integer;
    v_late      boolean := false;
    v_asks      boolean;
    v_steps     text[];
    v_sizes     integer[];
    v_delays    integer[];
    v_started   timestamptz;
    v_remaining integer;
    v_problem   text;
    v_events    text[];
    v_payloads  jsonb[];
    v_queue     text;
    v_message   record;
begin
    -- How many tasks a step has is settled when it starts. Whether it is still open shows once the run or the task is held.
    select s.initial_tasks
    into v_size
    from pgflow.step_states as s
    where s.run_id = complete_task.run_id and s.step_slug = complete_task.step_slug and s.status = 'started';

    if v_size = 1 then
        -- A step's only task ends the step: count the step off, which takes the run's row.
        update pgflow.runs as r
        set remaining_steps = r.remaining_steps - 1
        where r.run_id = complete_task.run_id and r.status = 'started'
        returning r.remaining_steps, r.flow_slug into v_remaining, v_queue;

        if v_remaining is not null then
            select
                d.step_type,
                case when d.step_type = 'single' and jsonb_typeof(complete_task.output) is distinct from 'array' then
                    (select e.step_slug
                     from pgflow.deps as e
                     join pgflow.steps as c on c.flow_slug = e.flow_slug and c.step_slug = e.step_slug
                     join pgflow.step_states as child
                       on child.run_id = complete_task.run_id and child.step_slug = e.step_slug
                     where e.flow_slug = d.flow_slug and e.dep_slug = d.step_slug and c.step_type = 'map'
                       and child.status = 'created'
                     order by c.step_index
                     limit 1)
                end
            into v_step_type, v_map
            from pgflow.steps as d
            where d.flow_slug = v_queue and d.step_slug = complete_task.step_slug;
        end if;
        v_open := v_remaining is not null;
    else
        v_open := exists (
            select from pgflow.runs as r where r.run_id = complete_task.run_id and r.status = 'started');
    end if;

    if v_open then
        update pgflow.step_tasks as t
        set status = case when v_map is null then 'completed' else 'failed' end,
            completed_at = case when v_map is null then greatest(now(), t.started_at) end,
            failed_at = case when v_map is null then null else greatest(now(), t.started_at) end,
            error_message = case
                when v_map is null then t.error_message
                else '[TYPE_VIOLATION] Produced ' || coalesce(jsonb_typeof(complete_task.output), 'null') || ' instead of array'
            end,
            output = complete_task.output
        where t.run_id = complete_task.run_id and t.step_slug = complete_task.step_slug
          and t.task_index = complete_task.task_index and t.status = 'started'
          and exists (
              select from pgflow.step_states as s
              where s.run_id = t.run_id and s.step_slug = t.step_slug and s.status = 'started')
        returning t.* into v_task;
    end if;

    if v_task.run_id is null then
        if v_remaining is not null then
            update pgflow.runs as r
            set remaining_steps = r.remaining_steps + 1
            where r.run_id = complete_task.run_id;
        end if;
        select t.* into v_task
        from pgflow.step_tasks as t
        where t.run_id = complete_task.run_id and t.step_slug = complete_task.step_slug
          and t.task_index = complete_task.task_index;
        if found then
            perform pgflow._archive_message(v_task.flow_slug, v_task.message_id)
            from pgflow.step_states as s
            join pgflow.runs as r on r.run_id = s.run_id
            where s.run_id = v_task.run_id and s.step_slug = v_task.step_slug
              and s.status <> 'started' and r.status <> 'failed';
            return next v_task;
        end if;
        return;
    end if;

    if v_map is not null then
        v_problem := '[TYPE_VIOLATION] Map step ' || v_map || ' expects array input but dependency '
            || v_task.step_slug || ' produced ' || coalesce(jsonb_typeof(v_task.output), 'null');

        update pgflow.runs as r
        set status = 'failed', failed_at = v_task.failed_at, remaining_steps = r.remaining_steps + 1
        where r.run_id = v_task.run_id;
        update pgflow.step_states as s
        set status = 'failed', failed_at = v_task.failed_at, error_message = v_problem
        where s.run_id = v_task.run_id and s.step_slug = v_task.step_slug;

        perform flowgate.publish(
            'pgflow:run:' || v_task.run_id,
            array['run:failed', 'step:' || v_task.step_slug || ':failed'],
            array[
                jsonb_build_object(
                    'event_type', 'run:failed', 'run_id', v_task.run_id, 'flow_slug', v_task.flow_slug,
                    'status', 'failed', 'failed_at', v_task.failed_at),
                jsonb_build_object(
                    'event_type', 'step:failed', 'run_id', v_task.run_id, 'step_slug', v_task.step_slug,
                    'status', 'failed', 'error_message', v_problem, 'failed_at', v_task.failed_at)]);

        perform pgflow._archive_run_messages(v_task.flow_slug, v_task.run_id, v_task.message_id);
        return next v_task;
        return;
    end if;

    if v_remaining is null then
        -- One of a map's tasks.
        update pgflow.step_states as s
        set remaining_tasks = s.remaining_tasks - 1
        where s.run_id = v_task.run_id and s.step_slug = v_task.step_slug and s.status = 'started'
        returning s.remaining_tasks into v_left;
        v_late := not found;

        if v_left = 0 then
            update pgflow.runs as r
            set remaining_steps = r.remaining_steps - 1
            where r.run_id = v_task.run_id and r.status = 'started'
            returning r.remaining_steps into v_remaining;
            if not found then
                update pgflow.step_states as s
                set remaining_tasks = s.remaining_tasks + 1
                where s.run_id = v_task.run_id and s.step_slug = v_task.step_slug;
                v_late := true;
            end if;
        end if;
        if v_late then
            -- The step was skipped, or the run failed, after this call's look at them: then nothing has happened. Who did it
            -- archives the message.
            update pgflow.step_tasks as t
            set status = 'started', completed_at = null, output = null
            where t.run_id = v_task.run_id and t.step_slug = v_task.step_slug and t.task_index = v_task.task_index
            returning t.* into v_task;
            return next v_task;
            return;
        end if;
        v_step_type := 'map';
    end if;

    if v_remaining is not null then
        -- The step's last task.
        if v_step_type = 'map' then
            select jsonb_agg(t.output order by t.task_index), count(*)
            into v_output, v_size
            from pgflow.step_tasks as t
            where t.run_id = v_task.run_id and t.step_slug = v_task.step_slug and t.status = 'completed';
        else
            v_output := v_task.output;
            v_size := case when jsonb_typeof(v_output) = 'array' then jsonb_array_length(v_output) end;
        end if;

        -- The step and those that depend on it in one statement: checks are made ready to run once a statement, for longer than
        -- they run. A dependent that has nothing left to wait for starts here, unless there may be one without tasks, or a
        -- condition to look at.
        with told as (
            update pgflow.step_states as s
            set status = case
                    when tell.own then 'completed'
                    when s.remaining_deps = 1 and tell.starts then 'started'
                    else s.status
                end,
                output = case when tell.own then v_output end,
                remaining_deps = case when tell.own then s.remaining_deps else s.remaining_deps - 1 end,
                initial_tasks = coalesce(s.initial_tasks, v_size),      -- null only for a map, of which this is the parent
                remaining_tasks = case
                    when tell.own then 0
                    when s.remaining_deps = 1 and tell.starts then coalesce(s.initial_tasks, v_size)
                end,
                started_at = case
                    when not tell.own and s.remaining_deps = 1 and tell.starts then greatest(now(), s.created_at)
                    else s.started_at
                end,
                completed_at = case when tell.own then greatest(v_task.completed_at, s.started_at) end
            from (
                select v_task.step_slug as step_slug, true as own, 0 as start_delay, false as starts, false as asks
                union all
                select child.step_slug, false, child.start_delay, v_size is distinct from 0 and not child.asks, child.asks
                from (
                    select
                        e.step_slug, coalesce(d.opt_start_delay, 0) as start_delay,
                        -- Any of them.
                        bool_or(d.required_input_pattern is not null or d.forbidden_input_pattern is not null) over () as asks
                    from pgflow.deps as e
                    join pgflow.steps as d on d.flow_slug = e.flow_slug and d.step_slug = e.step_slug
                    where e.flow_slug = v_task.flow_slug and e.dep_slug = v_task.step_slug
                ) as child
            ) as tell
            where s.run_id = v_task.run_id and s.step_slug = tell.step_slug and (tell.own or s.status = 'created')
            returning s.step_slug, s.status, s.initial_tasks, s.remaining_deps, s.started_at, tell.start_delay, tell.asks
        )
        select
            array_agg(told.step_slug order by told.step_slug) filter (where told.status = 'started'),
            array_agg(told.initial_tasks order by told.step_slug) filter (where told.status = 'started'),
            array_agg(told.start_delay order by told.step_slug) filter (where told.status = 'started'),
            max(told.started_at) filter (where told.status = 'started'),
            bool_or(told.asks)
        into v_steps, v_sizes, v_delays, v_started, v_asks
        from told;

        v_events := array['step:' || v_task.step_slug || ':completed'];
        v_payloads := array[jsonb_build_object(
            'event_type', 'step:completed', 'run_id', v_task.run_id, 'step_slug', v_task.step_slug,
            'status', 'completed', 'output', v_output, 'completed_at', v_task.completed_at)];
        if v_steps is not null then
            perform pgflow._spawn_tasks(
                v_task.flow_slug, v_task.run_id, v_steps, v_sizes, v_delays, v_events, v_payloads, v_started);
        elsif v_remaining = 0 then
            perform pgflow._complete_run(v_task.run_id, v_events, v_payloads);
        else
            perform flowgate.publish('pgflow:run:' || v_task.run_id, v_events, v_payloads);
            if v_asks and not pgflow.cascade_resolve_conditions(v_task.run_id) then
                perform pgflow._archive_message(v_task.flow_slug, v_task.message_id);
                return next v_task;
                return;
            end if;
            if v_asks or v_size = 0 then
                perform pgflow.cascade_complete_taskless_steps(v_task.run_id);
                perform pgflow.start_ready_steps(v_task.run_id);
                perform pgflow.maybe_complete_run(v_task.run_id);
            end if;
        end if;
    end if;

    -- As `_archive_message` does it, which is worth the lines once a task.
    v_queue := lower(v_task.flow_slug);
    execute format('delete from pgmq.%I where msg_id = $1 returning msg_id, read_ct, enqueued_at, vt, message', 'q_' || v_queue)
    into v_message
    using v_task.message_id;
    if v_message.msg_id is not null then
        execute format('insert into pgmq.%I (msg_id, read_ct, enqueued_at, vt, message) values ($1, $2, $3, $4, $5)', 'a_' || v_queue)
        using v_message.msg_id, v_message.read_ct, v_message.enqueued_at, v_message.vt, v_message.message;
    end if;
    return next v_task;
end;
$$;
