-- Publishes `events`, and after them that these steps have started, and queues their tasks: one message and one queued task
-- each, in order of task_index. `sizes` are the numbers of tasks (1 or more), `delays` seconds; one element a step, in order
-- of step_slug. `started_at` is when they started.
-- Called by: whoever moves steps to `started` in the same transaction, holding the run: `start_flow`, `start_ready_steps`,
-- `complete_task`. Locks: none beyond its inserts. Failure: the caller's.
--
-- It writes the queue's table itself, in the columns that every pgmq since 1.4.4 has: pgmq.send_batch costs about as much
-- again, in functions that are planned anew at each call.
drop function if exists pgflow._spawn_tasks(text, uuid, text[], integer[], integer[], text[], jsonb[]);

create or replace function pgflow._spawn_tasks(
    flow_slug text, run_id uuid, step_slugs text[], sizes integer[], delays integer[], events text[], payloads jsonb[],
    started_at timestamptz default now())
returns void
language plpgsql
volatile
set search_path = ''
as $$
#variable_conflict use_column
declare
    v_events      text[] := _spawn_tasks.events;
    v_payloads    jsonb[] := _spawn_tasks.payloads;
    v_place       integer;
    v_message_id  bigint;
    v_message_ids bigint[];
begin
    for v_place in 1 .. cardinality(_spawn_tasks.sizes) loop
        v_events := v_events || ('step:' || _spawn_tasks.step_slugs[v_place] || ':started');
        v_payloads := v_payloads || jsonb_build_object(
            'event_type', 'step:started', 'run_id', _spawn_tasks.run_id, 'step_slug', _spawn_tasks.step_slugs[v_place],
            'status', 'started', 'started_at', _spawn_tasks.started_at, 'remaining_tasks', _spawn_tasks.sizes[v_place],
            'remaining_deps', 0);
    end loop;
    perform flowgate.publish('pgflow:run:' || _spawn_tasks.run_id, v_events, v_payloads);

    -- The cheapest statement there is to plan, as many times as needed, unless there is a map.
    if 1 = all (_spawn_tasks.sizes) then
        for v_place in 1 .. cardinality(_spawn_tasks.sizes) loop
            execute format(
                'insert into pgmq.%I (vt, message) values ($1, $2) returning msg_id',
                'q_' || lower(_spawn_tasks.flow_slug))
            into v_message_id
            using clock_timestamp() + make_interval(secs => _spawn_tasks.delays[v_place]),
                jsonb_build_object('flow_slug', _spawn_tasks.flow_slug, 'run_id', _spawn_tasks.run_id,
                    'step_slug', _spawn_tasks.step_slugs[v_place], 'task_index', 0);
            v_message_ids[v_place] := v_message_id;
        end loop;

        insert into pgflow.step_tasks (flow_slug, run_id, step_slug, message_id, task_index, queued_at)
        select
            _spawn_tasks.flow_slug, _spawn_tasks.run_id, task.step_slug, task.message_id, 0, _spawn_tasks.started_at
        from unnest(_spawn_tasks.step_slugs, v_message_ids) as task(step_slug, message_id);
        return;
    end if;

    for v_place in 1 .. cardinality(_spawn_tasks.sizes) loop
        -- Ids are drawn in the order that is asked for, so the n-th of them is the n-th task's.
        execute format(
            'with sent as ('
            '  insert into pgmq.%I (vt, message)'
            '  select clock_timestamp() + make_interval(secs => $4),'
            '         jsonb_build_object(''flow_slug'', $1, ''run_id'', $2, ''step_slug'', $3, ''task_index'', i)'
            '  from generate_series(0, $5 - 1) as i'
            '  order by i'
            '  returning msg_id)'
            ' select array_agg(sent.msg_id order by sent.msg_id) from sent',
            'q_' || lower(_spawn_tasks.flow_slug))
        into v_message_ids
        using _spawn_tasks.flow_slug, _spawn_tasks.run_id, _spawn_tasks.step_slugs[v_place],
            _spawn_tasks.delays[v_place], _spawn_tasks.sizes[v_place];

        insert into pgflow.step_tasks (flow_slug, run_id, step_slug, message_id, task_index, queued_at)
        select
            _spawn_tasks.flow_slug, _spawn_tasks.run_id, _spawn_tasks.step_slugs[v_place], sent.message_id, sent.place - 1,
            _spawn_tasks.started_at
        from unnest(v_message_ids) with ordinality as sent(message_id, place);
    end loop;
end;
$$;
