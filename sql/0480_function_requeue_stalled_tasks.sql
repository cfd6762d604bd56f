-- Puts tasks back into their queue whose worker went away: started longer ago than the step's timeout (else the flow's) and 30 s,
-- in a run that has not failed. A task that was put back three times already is given up instead: its message is archived, the
-- task stays `started`, flowgate.requeued_task says since when. Returns how many were put back, at most `max_tasks` a call.
-- Called by: Flowgate's maintenance every few seconds, until it returns less than `max_tasks`; anybody who was granted EXECUTE.
-- Where pgflow brings a function of that name (0.14), that one does the work and keeps the counts: this one then does nothing but
-- forget its own, and returns 0.
-- Locks: tasks, then their messages, then the runs of tasks whose message is gone, all SKIP LOCKED: whoever holds one is ending or
-- reading it, and the next call comes soon. So it waits for nobody (but who changes its counts by hand). Failure: the caller's, whole.
--
-- No index finds started tasks: one on status or started_at would make every status change a non-HOT update. They are found by
-- two ways that cost little. A started task's message has been read and is still in its queue, and queues hold only what is
-- not done: these are looked at in every call. A task whose message is gone (a purged or dropped queue) is found by reading
-- step_tasks itself, 8 MB a call, the next 8 MB in the next one. Figures in sql/README.md.
create or replace function flowgate.requeue_stalled_tasks(max_tasks integer default 1000)
returns integer
language plpgsql
volatile
security definer
set search_path = ''
set jit = off
-- Whatever the statistics say: a scan of step_tasks for the sake of a few messages is never what we want.
set enable_hashjoin = off
set enable_mergejoin = off
as $$
#variable_conflict use_column
declare
    c_tries    constant integer := 3;
    c_grace    constant integer := 30;      -- seconds
    c_pages    constant bigint := 1024;     -- of step_tasks, read in one call
    c_counts   constant bigint := 64;       -- of our own table
    v_pass     bigint := nextval('flowgate.requeue_pass');
    v_first    bigint;
    v_lost     record;
    v_flow     record;
    v_queue    text;
    v_read     record;
    v_stalled  pgflow.step_tasks[];
    v_back     pgflow.step_tasks[];
    v_task     pgflow.step_tasks;
    v_held     bigint[];
    v_there    bigint[];
    v_given_up bigint[];
    v_requeued integer := 0;
begin
    v_first := c_counts * (v_pass % (1 + pg_relation_size('flowgate.requeued_task') / 8192 / c_counts));
    delete from flowgate.requeued_task as q
    where q.ctid = any (array(
        select over.ctid
        from flowgate.requeued_task as over
        where over.ctid >= format('(%s,0)', v_first)::tid and over.ctid < format('(%s,0)', v_first + c_counts)::tid
          and not exists (
            select from pgflow.step_tasks as t
            join pgflow.runs as r on r.run_id = t.run_id
            where t.run_id = over.run_id and t.step_slug = over.step_slug and t.task_index = over.task_index
              and t.status in ('queued', 'started') and r.status = 'started')
        for update skip locked));

    if to_regprocedure('pgflow.requeue_stalled_tasks()') is not null then
        return 0;
    end if;

    v_first := c_pages * (v_pass % (1 + pg_relation_size('pgflow.step_tasks') / 8192 / c_pages));
    select
        array_agg(t.flow_slug) as flow_slugs, array_agg(t.run_id) as run_ids, array_agg(t.step_slug) as step_slugs,
        array_agg(t.task_index) as task_indexes
    into v_lost
    from (
        select t.flow_slug, t.run_id, t.step_slug, t.task_index
        from pgflow.step_tasks as t
        join pgflow.steps as d on d.flow_slug = t.flow_slug and d.step_slug = t.step_slug
        join pgflow.flows as f on f.flow_slug = t.flow_slug
        where t.ctid >= format('(%s,0)', v_first)::tid and t.ctid < format('(%s,0)', v_first + c_pages)::tid
          and t.status = 'started'
          and t.started_at < now() - make_interval(secs => coalesce(d.opt_timeout, f.opt_timeout) + c_grace)
          and exists (select from pgflow.runs as r where r.run_id = t.run_id and r.status <> 'failed')
          and not exists (
            select from flowgate.requeued_task as q
            where q.run_id = t.run_id and q.step_slug = t.step_slug and q.task_index = t.task_index
              and q.permanently_stalled_at is not null)
        limit requeue_stalled_tasks.max_tasks
    ) as t;

    for v_flow in select f.flow_slug, f.opt_timeout from pgflow.flows as f order by f.flow_slug loop
        exit when v_requeued >= requeue_stalled_tasks.max_tasks;
        v_queue := format('pgmq.%I', 'q_' || lower(v_flow.flow_slug));
        continue when to_regclass(v_queue) is null;

        execute format(
            'select array_agg(t.run_id) as run_ids, array_agg(t.step_slug) as step_slugs,'
            '       array_agg(t.task_index) as task_indexes'
            ' from (select t.run_id, t.step_slug, t.task_index'
            '       from %s as m'
            '       join pgflow.step_tasks as t on t.flow_slug = $1 and t.message_id = m.msg_id'
            '       join pgflow.steps as d on d.flow_slug = $1 and d.step_slug = t.step_slug'
            '       where m.read_ct > 0 and t.status = ''started'''
            '         and t.started_at < now() - make_interval(secs => coalesce(d.opt_timeout, $2) + $3)'
            '       limit $4) as t', v_queue)
        into v_read
        using v_flow.flow_slug, v_flow.opt_timeout, c_grace, requeue_stalled_tasks.max_tasks - v_requeued;
        continue when v_read.run_ids is null and v_flow.flow_slug <> all (coalesce(v_lost.flow_slugs, '{}'));

        -- Looked at again with the lock held: the worker may have come back meanwhile.
        -- Lateral, so that each is one look at the primary key: by statistics, a run has few tasks.
        select array_agg(locked.task)
        into v_stalled
        from (
            select task
            from (
                select * from unnest(v_read.run_ids, v_read.step_slugs, v_read.task_indexes)
                union
                select lost.run_id, lost.step_slug, lost.task_index
                from unnest(v_lost.flow_slugs, v_lost.run_ids, v_lost.step_slugs, v_lost.task_indexes)
                    as lost(flow_slug, run_id, step_slug, task_index)
                where lost.flow_slug = v_flow.flow_slug
            ) as found(run_id, step_slug, task_index)
            join pgflow.steps as d on d.flow_slug = v_flow.flow_slug and d.step_slug = found.step_slug
            cross join lateral (
                select t
                from pgflow.step_tasks as t
                where t.run_id = found.run_id and t.step_slug = found.step_slug and t.task_index = found.task_index
                  and t.status = 'started'
                  and t.started_at < now() - make_interval(secs => coalesce(d.opt_timeout, v_flow.opt_timeout) + c_grace)
                  and exists (select from pgflow.runs as r where r.run_id = found.run_id and r.status <> 'failed')
                for no key update of t skip locked
            ) as stalled(task)
            limit requeue_stalled_tasks.max_tasks - v_requeued
        ) as locked(task);
        continue when v_stalled is null;

        -- By what they say too: a queue that was dropped and made again counts its messages from 1 again.
        execute format(
            'select coalesce(array_agg(held.msg_id), ''{}'')'
            ' from (select m.msg_id'
            '       from unnest($1) as t'
            '       join %s as m on m.msg_id = t.message_id'
            '       where m.message @> jsonb_build_object('
            '           ''run_id'', t.run_id, ''step_slug'', t.step_slug, ''task_index'', t.task_index)'
            '       for update of m skip locked) as held', v_queue)
        into v_held
        using v_stalled;
        execute format(
            'select coalesce(array_agg(m.msg_id), ''{}'')'
            ' from unnest($1) as t'
            ' join %s as m on m.msg_id = t.message_id'
            ' where m.message @> jsonb_build_object('
            '     ''run_id'', t.run_id, ''step_slug'', t.step_slug, ''task_index'', t.task_index)', v_queue)
        into v_there
        using v_stalled;

        -- A message that is there and that we don't hold is in somebody's hands right now: that task is left for the next call.
        with given_up as (
            update flowgate.requeued_task as q
            set permanently_stalled_at = now()
            from unnest(v_stalled) as t
            where q.run_id = t.run_id and q.step_slug = t.step_slug and q.task_index = t.task_index
              and q.requeued_count >= c_tries
              and (t.message_id = any (v_held) or (t.message_id = any (v_there)) is not true)
            returning t.message_id
        )
        select array_agg(given_up.message_id)
        into v_given_up
        from given_up
        where given_up.message_id = any (v_held);
        if v_given_up is not null then
            perform pgmq.archive(v_flow.flow_slug::text, v_given_up::bigint[]);
        end if;

        select coalesce(array_agg(t), '{}')
        into v_back
        from unnest(v_stalled) as t
        where t.message_id = any (v_held)
          and not exists (
            select from flowgate.requeued_task as q
            where q.run_id = t.run_id and q.step_slug = t.step_slug and q.task_index = t.task_index
              and q.requeued_count >= c_tries);
        execute format('update %s set vt = clock_timestamp() where msg_id = any ($1)', v_queue)
        using array(select t.message_id from unnest(v_back) as t);

        for v_task in
            select t.*
            from unnest(v_stalled) as t
            where (t.message_id = any (v_there)) is not true
              and not exists (
                select from flowgate.requeued_task as q
                where q.run_id = t.run_id and q.step_slug = t.step_slug and q.task_index = t.task_index
                  and q.requeued_count >= c_tries)
        loop
            -- Who fails a run archives its messages, and would not see this one: so not while that is under way.
            perform from pgflow.runs as r
            where r.run_id = v_task.run_id and r.status <> 'failed'
            for share skip locked;
            continue when not found;
            execute format(
                'insert into %s (vt, message)'
                ' values (clock_timestamp(), jsonb_build_object('
                '     ''flow_slug'', $1, ''run_id'', $2, ''step_slug'', $3, ''task_index'', $4))'
                ' returning msg_id', v_queue)
            into v_task.message_id
            using v_flow.flow_slug, v_task.run_id, v_task.step_slug, v_task.task_index;
            v_back := v_back || v_task;
        end loop;

        update pgflow.step_tasks as t
        set status = 'queued', started_at = null, last_worker_id = null, message_id = back.message_id
        from unnest(v_back) as back
        where t.run_id = back.run_id and t.step_slug = back.step_slug and t.task_index = back.task_index;

        insert into flowgate.requeued_task as q (run_id, step_slug, task_index, flow_slug, requeued_count, last_requeued_at)
        select back.run_id, back.step_slug, back.task_index, back.flow_slug, 1, now()
        from unnest(v_back) as back
        on conflict (run_id, step_slug, task_index) do update
            set requeued_count = q.requeued_count + 1, last_requeued_at = excluded.last_requeued_at;

        v_requeued := v_requeued + cardinality(v_back);
    end loop;
    return v_requeued;
end;
$$;

revoke all on function flowgate.requeue_stalled_tasks(integer) from public;
