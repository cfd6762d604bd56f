-- Moves the tasks behind these messages to `started` and returns, for each task this very call moved, what its handler needs.
-- Called by: workers, after each poll that brought messages. Locks: the tasks, then their messages, both SKIP LOCKED: whoever
-- holds one is starting, ending or archiving it, so the call never waits and can't deadlock. Failure: the caller's; an unknown
-- worker is foreign key step_tasks_last_worker_id_fkey.
--
-- A message that was taken stays invisible for the task's timeout and 2 s, so it does not come back while the handler runs. It
-- counts as read from then on, also for a caller that got its id in another way: `requeue_stalled_tasks` goes by that.
-- Plans are generic: for the array of ids Postgres would otherwise plan anew at every call, for longer than it then runs.
-- Outputs are read once per (run, dependency), however many tasks of the call use them; a map over a map reads one task's
-- output per task, and a map over an array cuts its elements out of one decompressed copy.
create or replace function pgflow.start_tasks(flow_slug text, msg_ids bigint[], worker_id uuid)
returns setof pgflow.step_task_record
language plpgsql
volatile
set search_path = ''
set plan_cache_mode = force_generic_plan
set enable_seqscan = off
set jit = off
as $$
#variable_conflict use_column
declare
    v_run_ids     uuid[];
    v_steps       text[];
    v_indexes     integer[];
    v_message_ids bigint[];
    v_seconds     integer[];
    v_maps        boolean[];
    v_roots       boolean;
begin
    if coalesce(cardinality(start_tasks.msg_ids), 0) = 0 then
        return;
    end if;

    with free as materialized (
        select t.run_id, t.step_slug, t.task_index
        from pgflow.step_tasks as t
        where t.flow_slug = start_tasks.flow_slug
          and t.message_id = any (start_tasks.msg_ids)
          and t.status = 'queued'
          and exists (select from pgflow.runs as r where r.run_id = t.run_id and r.status = 'started')
          and exists (
              select from pgflow.step_states as s
              where s.run_id = t.run_id and s.step_slug = t.step_slug and s.status = 'started')
        for no key update of t skip locked
    ),
    started as (
        update pgflow.step_tasks as t
        set status = 'started', attempts_count = t.attempts_count + 1, started_at = greatest(now(), t.queued_at),
            last_worker_id = start_tasks.worker_id
        from free
        where t.run_id = free.run_id and t.step_slug = free.step_slug and t.task_index = free.task_index
          and t.status = 'queued'
        returning t.run_id, t.step_slug, t.task_index, t.message_id
    )
    select
        array_agg(started.run_id),
        array_agg(started.step_slug),
        array_agg(started.task_index),
        array_agg(started.message_id),
        array_agg(started.seconds),
        array_agg(started.is_map),
        bool_and(started.is_root)
    into v_run_ids, v_steps, v_indexes, v_message_ids, v_seconds, v_maps, v_roots
    from (
        select
            started.*, coalesce(d.opt_timeout, f.opt_timeout) + 2 as seconds, d.step_type = 'map' as is_map,
            d.deps_count = 0 as is_root
        from started
        join pgflow.steps as d on d.flow_slug = start_tasks.flow_slug and d.step_slug = started.step_slug
        join pgflow.flows as f on f.flow_slug = start_tasks.flow_slug
        order by started.message_id
    ) as started;

    if v_run_ids is null then
        return;
    end if;

    execute format(
        'update pgmq.%1$I as m'
        ' set vt = clock_timestamp() + make_interval(secs => ($2)[array_position($1, m.msg_id)]),'
        ' read_ct = greatest(m.read_ct, 1)'
        ' where m.msg_id = any (array('
        '   select q.msg_id from pgmq.%1$I as q where q.msg_id = any ($1) for no key update skip locked))',
        'q_' || lower(start_tasks.flow_slug))
    using v_message_ids, v_seconds;

    -- Roots read nothing but their run's input.
    if v_roots then
        return query
        with run as materialized (
            select
                r.run_id,
                case when jsonb_typeof(r.input) = 'array' then r.input || '[]'::jsonb else r.input end as input
            from pgflow.runs as r
            where r.run_id = any (v_run_ids)
        )
        select
            start_tasks.flow_slug,
            task.run_id,
            task.step_slug,
            case when task.is_map then run.input -> task.task_index else '{}'::jsonb end,
            task.message_id,
            task.task_index,
            case when not task.is_map then run.input end
        from unnest(v_run_ids, v_steps, v_indexes, v_message_ids, v_maps) with ordinality
            as task(run_id, step_slug, task_index, message_id, is_map, place)
        join run on run.run_id = task.run_id
        order by task.place;
        return;
    end if;

    return query
    with task as materialized (
        select s.run_id, s.step_slug, s.task_index, s.message_id, s.place, d.step_type, d.deps_count
        from unnest(v_run_ids, v_steps, v_indexes, v_message_ids) with ordinality
            as s(run_id, step_slug, task_index, message_id, place)
        join pgflow.steps as d on d.flow_slug = start_tasks.flow_slug and d.step_slug = s.step_slug
    ),
    -- What each step that was started in this call reads, per run.
    edge as materialized (
        select distinct task.run_id, task.step_slug, task.step_type, e.dep_slug, p.step_type as dep_type
        from task
        join pgflow.deps as e on e.flow_slug = start_tasks.flow_slug and e.step_slug = task.step_slug
        join pgflow.steps as p on p.flow_slug = start_tasks.flow_slug and p.step_slug = e.dep_slug
    ),
    -- Each dependency's output, whole, once. A map over a map doesn't need it. The || makes a decompressed copy for the cuts
    -- below; anything but an array is left alone. What was skipped has no output, and is not there.
    dep as materialized (
        select
            parent.run_id, parent.dep_slug,
            case when jsonb_typeof(p.output) = 'array' then p.output || '[]'::jsonb else p.output end as output
        from (
            select distinct edge.run_id, edge.dep_slug
            from edge
            where edge.step_type <> 'map' or edge.dep_type <> 'map'
        ) as parent
        join pgflow.step_states as p
          on p.run_id = parent.run_id and p.step_slug = parent.dep_slug and p.status = 'completed'
    ),
    run as materialized (
        select
            r.run_id,
            case when jsonb_typeof(r.input) = 'array' then r.input || '[]'::jsonb else r.input end as input
        from pgflow.runs as r
        where r.run_id in (
            select task.run_id from task where task.deps_count = 0)
    ),
    single as materialized (
        select edge.run_id, edge.step_slug, jsonb_object_agg(edge.dep_slug, dep.output) as deps
        from edge
        join dep on dep.run_id = edge.run_id and dep.dep_slug = edge.dep_slug
        where edge.step_type <> 'map'
        group by edge.run_id, edge.step_slug
    )
    select
        start_tasks.flow_slug,
        task.run_id,
        task.step_slug,
        case
            when task.step_type <> 'map' then
                coalesce(single.deps, '{}'::jsonb)
            when task.deps_count = 0 then
                run.input -> task.task_index
            when edge.dep_type = 'map' then
                (select coalesce(t.output, 'null'::jsonb)
                 from pgflow.step_tasks as t
                 where t.run_id = task.run_id and t.step_slug = edge.dep_slug and t.task_index = task.task_index)
            else
                dep.output -> task.task_index
        end,
        task.message_id,
        task.task_index,
        case when task.step_type <> 'map' and task.deps_count = 0 then run.input end
    from task
    left join run on run.run_id = task.run_id
    left join single on single.run_id = task.run_id and single.step_slug = task.step_slug
    left join edge on task.step_type = 'map' and edge.run_id = task.run_id and edge.step_slug = task.step_slug
    left join dep on dep.run_id = edge.run_id and dep.dep_slug = edge.dep_slug
    order by task.place;
end;
$$;
