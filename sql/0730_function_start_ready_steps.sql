-- Starts every step whose dependencies are met: one message and one queued task each for its tasks, in order of task_index.
-- Called by: `start_flow`, `complete_task` and `fail_task`, when a step became ready; conditions have been looked at.
-- Locks: run, then rows of steps that have not started. Failure: the caller's.
--
-- The whole step goes to its queue in one statement. It writes the queue's table itself, in the columns that every
-- pgmq since 1.4.4 has: pgmq.send_batch costs about as much again, in functions that are planned anew at each call.
create or replace function pgflow.start_ready_steps(run_id uuid)
returns void
language plpgsql
volatile
set search_path = ''
as $$
#variable_conflict use_column
declare
    v_step        record;
    v_message_ids bigint[];
begin
    perform from pgflow.runs as r where r.run_id = start_ready_steps.run_id and r.status = 'started' for no key update;
    if not found then
        return;
    end if;

    for v_step in
        with ready as (
            update pgflow.step_states as s
            set status = 'started', started_at = greatest(now(), s.created_at), remaining_tasks = s.initial_tasks
            where s.run_id = start_ready_steps.run_id
              and s.status = 'created' and s.remaining_deps = 0 and s.initial_tasks > 0
            returning s.flow_slug, s.run_id, s.step_slug, s.status, s.started_at, s.remaining_tasks
        )
        select ready.*, coalesce(d.opt_start_delay, 0) as start_delay
        from ready
        join pgflow.steps as d on d.flow_slug = ready.flow_slug and d.step_slug = ready.step_slug
        order by ready.step_slug
    loop
        perform realtime.send(
            jsonb_build_object(
                'event_type', 'step:started', 'run_id', v_step.run_id, 'step_slug', v_step.step_slug,
                'status', v_step.status, 'started_at', v_step.started_at,
                'remaining_tasks', v_step.remaining_tasks, 'remaining_deps', 0),
            'step:' || v_step.step_slug || ':started', 'pgflow:run:' || v_step.run_id, false);

        -- Ids are drawn row by row, so their order is that of task_index.
        execute format(
            'with sent as ('
            '  insert into pgmq.%I (vt, message)'
            '  select clock_timestamp() + make_interval(secs => $4),'
            '         jsonb_build_object(''flow_slug'', $1, ''run_id'', $2, ''step_slug'', $3, ''task_index'', i)'
            '  from generate_series(0, $5 - 1) as i'
            '  returning msg_id)'
            ' select array_agg(sent.msg_id order by sent.msg_id) from sent',
            'q_' || lower(v_step.flow_slug))
        into v_message_ids
        using v_step.flow_slug, v_step.run_id, v_step.step_slug, v_step.start_delay, v_step.remaining_tasks;

        insert into pgflow.step_tasks (flow_slug, run_id, step_slug, message_id, task_index, queued_at)
        select
            v_step.flow_slug, v_step.run_id, v_step.step_slug, sent.message_id, sent.place - 1, v_step.started_at
        from unnest(v_message_ids) with ordinality as sent(message_id, place);
    end loop;
end;
$$;
