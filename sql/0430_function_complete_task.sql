-- Completes a started task, and with its last task the step, and with its last step the run. Returns the task's row; a call
-- that comes late (task, step or run already ended) changes nothing. An output that a dependent map can't use fails the run.
-- Called by: workers, once per task. Failure: the caller's, whole; the worker then usually calls `fail_task`.
-- Locks, until commit: a step's only task takes the run first, then the task; a map's task takes the task, then the step, and the
-- run only if it is the last. Then rows of steps that have not started, then messages. `fail_task` goes the same two ways
-- (sql/README.md, "Locks").
--
-- A map's task that is not the last costs two HOT updates and the archive, however large the map, and holds the step's row,
-- for which all others of the map wait, as late and as briefly as it can. It looks at the run before: a failure that commits
-- after that look comes after this completion, and archives what is left.
--
-- Rows are returned column by column: a call under way when an upgrade gives the table more columns still returns those it was
-- planned with, instead of failing after its work is done.
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
    v_open      boolean;
    v_step_type text;
    v_map       text;
    v_output    jsonb;
    v_size      integer;
    v_left      integer;
    v_steps     text[];
    v_sizes     integer[];
    v_delays    integer[];
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
                     where e.flow_slug = d.flow_slug and e.dep_slug = d.step_slug and c.step_type = 'map'
                       -- Not one that was added to the flow after this run began.
                       and exists (
                           select from pgflow.step_states as waits
                           where waits.run_id = complete_task.run_id and waits.step_slug = e.step_slug
                             and waits.initial_tasks is null)
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
            -- It may have waited here while its task was put back and started again.
            completed_at = case when v_map is null then greatest(now(), t.started_at) end,
            failed_at = case when v_map is null then null else greatest(now(), t.started_at) end,
            error_message = case
                when v_map is null then t.error_message
                else '[TYPE_VIOLATION] Produced ' || coalesce(jsonb_typeof(complete_task.output), 'null') || ' instead of array'
            end,
            output = complete_task.output
        where t.run_id = complete_task.run_id and t.step_slug = complete_task.step_slug
          and t.task_index = complete_task.task_index and t.status = 'started'
        returning t.* into v_task;
    end if;

    if v_task.run_id is null then
        if v_remaining is not null then
            update pgflow.runs as r
            set remaining_steps = r.remaining_steps + 1
            where r.run_id = complete_task.run_id;
        end if;
        return query
        select
            t.flow_slug, t.run_id, t.step_slug, t.message_id, t.task_index, t.status, t.attempts_count, t.error_message,
            t.output, t.queued_at, t.completed_at, t.failed_at, t.started_at, t.last_worker_id
        from pgflow.step_tasks as t
        where t.run_id = complete_task.run_id and t.step_slug = complete_task.step_slug
          and t.task_index = complete_task.task_index;
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
        return;
    end if;

    if v_remaining is null then
        -- One of a map's tasks. Its row is this call's, so it is counted off whatever has become of the step meanwhile.
        update pgflow.step_states as s
        set remaining_tasks = s.remaining_tasks - 1
        where s.run_id = v_task.run_id and s.step_slug = v_task.step_slug
        returning s.remaining_tasks into v_left;

        if v_left = 0 then
            update pgflow.runs as r
            set remaining_steps = r.remaining_steps - 1
            where r.run_id = v_task.run_id and r.status = 'started'
            returning r.remaining_steps into v_remaining;
            if not found then
                -- The run failed after this call's look at it: then the last task came too late, and nothing has happened.
                update pgflow.step_states as s
                set remaining_tasks = s.remaining_tasks + 1
                where s.run_id = v_task.run_id and s.step_slug = v_task.step_slug;
                update pgflow.step_tasks as t
                set status = 'started', completed_at = null, output = null
                where t.run_id = v_task.run_id and t.step_slug = v_task.step_slug and t.task_index = v_task.task_index
                returning t.* into v_task;
                return next (
                    v_task.flow_slug, v_task.run_id, v_task.step_slug, v_task.message_id, v_task.task_index, v_task.status,
                    v_task.attempts_count, v_task.error_message, v_task.output, v_task.queued_at, v_task.completed_at,
                    v_task.failed_at, v_task.started_at, v_task.last_worker_id);
                return;
            end if;
            select d.step_type into v_step_type
            from pgflow.steps as d
            where d.flow_slug = v_task.flow_slug and d.step_slug = v_task.step_slug;
        end if;
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
        -- they run. A dependent that has nothing left to wait for starts here, unless there may be one without tasks.
        with told as (
            update pgflow.step_states as s
            set status = case
                    when tell.own then 'completed'
                    when s.remaining_deps = 1 and v_size is distinct from 0 then 'started'
                    else s.status
                end,
                remaining_deps = case when tell.own then s.remaining_deps else s.remaining_deps - 1 end,
                initial_tasks = coalesce(s.initial_tasks, v_size),      -- null only for a map, of which this is the parent
                remaining_tasks = case
                    when tell.own then 0
                    when s.remaining_deps = 1 and v_size is distinct from 0 then coalesce(s.initial_tasks, v_size)
                end,
                started_at = case
                    when not tell.own and s.remaining_deps = 1 and v_size is distinct from 0 then v_task.completed_at
                    else s.started_at
                end,
                completed_at = case when tell.own then v_task.completed_at end
            from (
                select v_task.step_slug as step_slug, true as own, 0 as start_delay
                union all
                select e.step_slug, false, coalesce(d.opt_start_delay, 0)
                from pgflow.deps as e
                join pgflow.steps as d on d.flow_slug = e.flow_slug and d.step_slug = e.step_slug
                where e.flow_slug = v_task.flow_slug and e.dep_slug = v_task.step_slug
            ) as tell
            where s.run_id = v_task.run_id and s.step_slug = tell.step_slug
            returning s.step_slug, s.status, s.initial_tasks, tell.start_delay
        )
        select array_agg(ready.step_slug), array_agg(ready.initial_tasks), array_agg(ready.start_delay)
        into v_steps, v_sizes, v_delays
        from (
            select told.step_slug, told.initial_tasks, told.start_delay
            from told
            where told.status = 'started'
            order by told.step_slug
        ) as ready;

        v_events := array['step:' || v_task.step_slug || ':completed'];
        v_payloads := array[jsonb_build_object(
            'event_type', 'step:completed', 'run_id', v_task.run_id, 'step_slug', v_task.step_slug,
            'status', 'completed', 'output', v_output, 'completed_at', v_task.completed_at)];
        if v_steps is not null then
            perform pgflow._spawn_tasks(
                v_task.flow_slug, v_task.run_id, v_steps, v_sizes, v_delays, v_events, v_payloads, v_task.completed_at);
        elsif v_remaining = 0 then
            perform pgflow._complete_run(v_task.run_id, v_events, v_payloads);
        else
            perform flowgate.publish('pgflow:run:' || v_task.run_id, v_events, v_payloads);
            if v_size = 0 then
                if v_remaining = pgflow.cascade_complete_taskless_steps(v_task.run_id) then
                    perform pgflow.maybe_complete_run(v_task.run_id);
                else
                    perform pgflow.start_ready_steps(v_task.run_id);
                end if;
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
    return next (
        v_task.flow_slug, v_task.run_id, v_task.step_slug, v_task.message_id, v_task.task_index, v_task.status,
        v_task.attempts_count, v_task.error_message, v_task.output, v_task.queued_at, v_task.completed_at, v_task.failed_at,
        v_task.started_at, v_task.last_worker_id);
end;
$$;
