-- Gives tasks back to their queues whose worker has fallen silent: started longer ago than the step's timeout (else the flow's)
-- and 30 s. The fourth time a task is given up: its message is archived, and it stays `started` for somebody to look at.
-- Returns how many were given back.
-- Called by: `flowgate serve` on a schedule, or cron (`setup_requeue_stalled_tasks_cron`). Locks: the tasks, then their messages,
-- then the runs of tasks whose message is gone, all SKIP LOCKED: whoever holds one is ending or reading it, and the next call comes
-- soon. So it waits for nobody. Failure: the caller's, whole.
-- SECURITY DEFINER, so that whoever keeps the schedule needs no right on tables and queues.
--
-- No index finds started tasks: one on status or started_at would make every status change a non-HOT update. They are found by
-- two ways that cost little. A started task's message has been read (`start_tasks` sees to that) and is still in its queue, and
-- queues hold only what is not done: these are looked at in every call. A task started by other means, or whose message is gone
-- (a purged or dropped queue), is found by reading step_tasks itself, 8 MB a call, the next 8 MB in the next one; it gets a new message.
create or replace function pgflow.requeue_stalled_tasks()
returns integer
language plpgsql
volatile
security definer
set search_path = ''
-- Whatever the statistics say: a scan of step_tasks for the sake of a few messages is never what we want.
set enable_hashjoin = off
set enable_mergejoin = off
as $$
declare
    c_tries    constant integer := 3;
    c_grace    constant integer := 30;      -- seconds
    c_pages    constant bigint := 1024;     -- of step_tasks, read in one call
    v_first    bigint := c_pages * (
        nextval('flowgate.requeue_pass') % (1 + pg_relation_size('pgflow.step_tasks') / 8192 / c_pages));
    v_lost     record;
    v_flow     record;
    v_queue    text;
    v_read     record;
    v_stalled  pgflow.step_tasks[];
    v_task     pgflow.step_tasks;
    v_held     bigint[];
    v_there    bigint[];
    v_given_up bigint[];
    v_back     bigint[];
    v_requeued integer := 0;
begin
    select
        array_agg(t.flow_slug) as flow_slugs, array_agg(t.run_id) as run_ids, array_agg(t.step_slug) as step_slugs,
        array_agg(t.task_index) as task_indexes
    into v_lost
    from pgflow.step_tasks as t
    join pgflow.steps as d on d.flow_slug = t.flow_slug and d.step_slug = t.step_slug
    join pgflow.flows as f on f.flow_slug = t.flow_slug
    where t.ctid >= format('(%s,0)', v_first)::tid and t.ctid < format('(%s,0)', v_first + c_pages)::tid
      and t.status = 'started' and t.permanently_stalled_at is null
      and t.started_at < now() - make_interval(secs => coalesce(d.opt_timeout, f.opt_timeout) + c_grace);

    for v_flow in select f.flow_slug, f.opt_timeout from pgflow.flows as f order by f.flow_slug loop
        v_queue := format('pgmq.%I', 'q_' || lower(v_flow.flow_slug));
        continue when to_regclass(v_queue) is null;

        execute format(
            'select array_agg(t.run_id) as run_ids, array_agg(t.step_slug) as step_slugs,'
            '       array_agg(t.task_index) as task_indexes'
            ' from %s as m'
            ' join pgflow.step_tasks as t on t.flow_slug = $1 and t.message_id = m.msg_id'
            ' join pgflow.steps as d on d.flow_slug = $1 and d.step_slug = t.step_slug'
            ' where m.read_ct > 0 and t.status = ''started'' and t.permanently_stalled_at is null'
            '   and t.started_at < now() - make_interval(secs => coalesce(d.opt_timeout, $2) + $3)',
            v_queue)
        into v_read
        using v_flow.flow_slug, v_flow.opt_timeout, c_grace;
        continue when v_read.run_ids is null and v_flow.flow_slug <> all (coalesce(v_lost.flow_slugs, '{}'));

        -- Looked at again with the lock held: the worker may have come back meanwhile.
        -- Lateral, so that each is one look at the primary key: by statistics, a run has few tasks.
        select array_agg(locked.task)
        into v_stalled
        from (
            select stalled.task
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
                  and t.status = 'started' and t.permanently_stalled_at is null
                  and t.started_at < now() - make_interval(secs => coalesce(d.opt_timeout, v_flow.opt_timeout) + c_grace)
                  and exists (select from pgflow.runs as r where r.run_id = found.run_id and r.status = 'started')
                  and exists (
                      select from pgflow.step_states as s
                      where s.run_id = found.run_id and s.step_slug = found.step_slug and s.status = 'started')
                for no key update of t skip locked
            ) as stalled(task)
        ) as locked;
        continue when v_stalled is null;

        -- By what they say too: a queue that was dropped and made again counts its messages from 1 again. A message that is
        -- there and that we don't get is in somebody's hands right now: that task is left for the next call.
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

        v_back := '{}';
        v_given_up := '{}';
        foreach v_task in array v_stalled loop
            if v_task.message_id = any (v_held) then
                if v_task.requeued_count < c_tries then
                    v_back := v_back || v_task.message_id;
                else
                    v_given_up := v_given_up || v_task.message_id;
                end if;
            elsif v_task.message_id = any (v_there) then
                continue;
            elsif v_task.requeued_count < c_tries then
                -- Who fails the run or skips the step archives its messages, and would not see this one: so not while that is
                -- under way, nor after it.
                perform from pgflow.runs as r
                where r.run_id = v_task.run_id and r.status = 'started'
                for share skip locked;
                continue when not found;
                perform from pgflow.step_states as s
                where s.run_id = v_task.run_id and s.step_slug = v_task.step_slug and s.status = 'started';
                continue when not found;
                execute format(
                    'insert into %s (vt, message)'
                    ' values (clock_timestamp(), jsonb_build_object('
                    '     ''flow_slug'', $1, ''run_id'', $2, ''step_slug'', $3, ''task_index'', $4))'
                    ' returning msg_id', v_queue)
                into v_task.message_id
                using v_flow.flow_slug, v_task.run_id, v_task.step_slug, v_task.task_index;
            end if;

            update pgflow.step_tasks as t
            set status = case when v_task.requeued_count < c_tries then 'queued' else t.status end,
                started_at = case when v_task.requeued_count < c_tries then null else t.started_at end,
                last_worker_id = case when v_task.requeued_count < c_tries then null else t.last_worker_id end,
                last_requeued_at = case when v_task.requeued_count < c_tries then now() else t.last_requeued_at end,
                requeued_count = least(v_task.requeued_count + 1, c_tries),
                permanently_stalled_at = case when v_task.requeued_count < c_tries then null else now() end,
                message_id = v_task.message_id
            where t.run_id = v_task.run_id and t.step_slug = v_task.step_slug and t.task_index = v_task.task_index;
            v_requeued := v_requeued + (v_task.requeued_count < c_tries)::integer;
        end loop;

        execute format('update %s set vt = clock_timestamp() where msg_id = any ($1)', v_queue) using v_back;
        if v_given_up <> '{}' then
            perform pgmq.archive(v_flow.flow_slug::text, v_given_up::bigint[]);
        end if;
    end loop;
    return v_requeued;
end;
$$;

revoke all on function pgflow.requeue_stalled_tasks() from public;
