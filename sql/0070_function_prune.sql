-- Deletes one small batch of what ended more than `retention` ago, of one kind: finished runs with all that belongs to them (at
-- most `max_runs`, and so few that they have 10 × `max_runs` tasks, but at least one); when there are none, archived messages of
-- flows' queues (10 × `max_runs`); when there are none, workers by their heartbeat. Returns how many of each; call it, each time in
-- a transaction of its own, until all three are 0.
-- Called by: Flowgate's maintenance, if `maintenance.prune_after` is set; `pgflow.prune_data_older_than`; anybody who was granted
-- EXECUTE. Works on the tables of any pgflow. A run that has not ended is never touched, however old.
-- Locks: steps, then runs, both SKIP LOCKED (a late callback may hold them), then what belongs to them: the order of
-- sql/README.md, "Locks". Failure: rolls back that batch.
--
-- Finding old finished runs takes no index of its own: completed_at and failed_at are never before started_at (constraints say
-- so), so a flow's finished runs are at the old end of runs (flow_slug, started_at), and pruning eats that index from its end. Each
-- batch passes over old runs that have not ended: 0.25 µs apiece. Figures, and what else was tried, in sql/README.md.
--
-- Workers are few a batch: the foreign key of step_tasks.last_worker_id has no index (it would make each start of a task a
-- non-HOT update), so Postgres reads all of step_tasks for each worker that is deleted.
create or replace function flowgate.prune(
    retention    interval,
    max_runs     integer default 1000,
    out runs     integer,
    out archived integer,
    out workers  integer
)
language plpgsql
volatile
security definer
set search_path = ''
set jit = off
set lock_timeout = '2s'
as $$
#variable_conflict use_column
declare
    v_before  timestamptz := now() - prune.retention;
    v_run_ids uuid[];
    v_flow    record;
    v_more    integer;
    v_table   text;
begin
    if prune.retention is null or prune.retention < interval '0' then
        raise exception 'retention must be a positive interval, not %', prune.retention
            using errcode = 'invalid_parameter_value';
    elsif coalesce(prune.max_runs, 0) < 1 then
        raise exception 'max_runs must be at least 1, not %', prune.max_runs
            using errcode = 'invalid_parameter_value';
    end if;
    runs := 0;
    archived := 0;
    workers := 0;
    -- Nested: a statement is planned as a whole, and this function is also there without pgflow.
    if to_regclass('pgflow.runs') is null then
        return;
    end if;

    with old as materialized (
        select ended.run_id, row_number() over () as place
        from pgflow.flows as f
        cross join lateral (
            select r.run_id
            from pgflow.runs as r
            where r.flow_slug = f.flow_slug and r.started_at < v_before
              and (r.completed_at < v_before or r.failed_at < v_before)
            order by r.started_at
            limit prune.max_runs
        ) as ended
        limit prune.max_runs
    ),
    weighed as (
        select
            old.run_id, old.place,
            sum(coalesce((select sum(s.initial_tasks) from pgflow.step_states as s where s.run_id = old.run_id), 0))
                over (order by old.place) as tasks
        from old
    )
    select array_agg(weighed.run_id)
    into v_run_ids
    from weighed
    where weighed.place = 1 or weighed.tasks <= 10 * prune.max_runs::bigint;

    if v_run_ids is not null then
        with step as materialized (
            select s.run_id from pgflow.step_states as s where s.run_id = any (v_run_ids) for update skip locked
        ),
        steps as (
            select s.run_id, count(*) as all_of_them from pgflow.step_states as s where s.run_id = any (v_run_ids)
            group by s.run_id
        ),
        free as (
            select step.run_id, count(*) as locked from step group by step.run_id
        )
        select array_agg(held.run_id)
        into v_run_ids
        from (
            select r.run_id
            from pgflow.runs as r
            left join steps on steps.run_id = r.run_id
            left join free on free.run_id = r.run_id
            where r.run_id = any (v_run_ids) and steps.all_of_them is not distinct from free.locked
            for update of r skip locked
        ) as held;
    end if;

    if v_run_ids is not null then
        for v_flow in
            select t.flow_slug, array_agg(t.message_id) as message_ids
            from pgflow.step_tasks as t
            where t.run_id = any (v_run_ids) and t.status <> 'completed' and t.message_id is not null
            group by t.flow_slug
        loop
            v_table := format('pgmq.%I', 'q_' || lower(v_flow.flow_slug));
            continue when to_regclass(v_table) is null;
            -- By their run too: a queue that was dropped and made again counts its messages from 1 again.
            execute format(
                'delete from %s as m where m.msg_id = any ($1) and m.message ->> ''run_id'' = any ($2::text[])', v_table)
            using v_flow.message_ids, v_run_ids;
        end loop;
        delete from flowgate.requeued_task as q where q.run_id = any (v_run_ids);
        delete from pgflow.step_tasks as t where t.run_id = any (v_run_ids);
        delete from pgflow.step_states as s where s.run_id = any (v_run_ids);
        delete from pgflow.runs as r where r.run_id = any (v_run_ids);
        get diagnostics runs = row_count;
        return;
    end if;

    for v_flow in select f.flow_slug from pgflow.flows as f order by f.flow_slug loop
        v_table := format('pgmq.%I', 'a_' || lower(v_flow.flow_slug));
        continue when to_regclass(v_table) is null;
        execute format(
            'delete from %1$s where msg_id = any (array('
            '  select a.msg_id from %1$s as a where a.archived_at < $1 order by a.archived_at limit $2'
            '  for update skip locked))', v_table)
        using v_before, 10 * prune.max_runs::bigint - archived;
        get diagnostics v_more = row_count;
        archived := archived + v_more;
        exit when archived >= 10 * prune.max_runs::bigint;
    end loop;
    if archived > 0 then
        return;
    end if;

    delete from pgflow.workers as w
    where w.worker_id = any (array(
        select idle.worker_id
        from pgflow.workers as idle
        where idle.last_heartbeat_at < v_before
        order by idle.last_heartbeat_at
        -- As many as make Postgres read some 400 MB of step_tasks, most of it cached.
        limit greatest(1, least(prune.max_runs, 50000 / (1 + pg_relation_size('pgflow.step_tasks') / 8192)))
        for update skip locked));
    get diagnostics workers = row_count;
end;
$$;

revoke all on function flowgate.prune(interval, integer) from public;
