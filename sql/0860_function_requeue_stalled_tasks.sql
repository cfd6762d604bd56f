-- Gives tasks back to their queues whose worker has fallen silent: started longer ago than the step's timeout (else the flow's)
-- and 30 s. The fourth time a task is given up: its message is archived, and it stays `started` for somebody to look at.
-- Returns how many were given back.
-- Called by: `flowgate serve` on a schedule, or cron (`setup_requeue_stalled_tasks_cron`). Locks: the tasks, then their messages,
-- SKIP LOCKED: a task that somebody is just ending is left alone; messages that are archived last of all. Failure: the caller's.
-- SECURITY DEFINER, so that whoever keeps the schedule needs no right on tables and queues.
--
-- Stalled tasks are found by their messages, which are in the queue as long as the task lives, and not by an index on the tasks'
-- status: that would cost every task two index entries and its HOT updates. `start_tasks` marks a message as read, so those that
-- were not are passed over; but for the oldest, since somebody may have started a task by other means.
create or replace function pgflow.requeue_stalled_tasks()
returns integer
language plpgsql
volatile
security definer
set search_path = ''
as $$
declare
    v_flow     text;
    v_queue    text;
    v_requeued bigint[];
    v_given_up bigint[];
    v_total    integer := 0;
begin
    for v_flow in select f.flow_slug from pgflow.flows as f order by f.flow_slug loop
        v_queue := 'q_' || lower(v_flow);
        continue when to_regclass(format('pgmq.%I', v_queue)) is null;

        execute format(
            'with alive as materialized ('
            '  select m.msg_id from pgmq.%1$I as m where m.read_ct > 0'
            '  union'
            '  (select m.msg_id from pgmq.%1$I as m order by m.msg_id limit 1000)),'
            ' stalled as materialized ('
            '  select t.run_id, t.step_slug, t.task_index'
            '  from alive'
            '  join pgflow.step_tasks as t on t.flow_slug = $1 and t.message_id = alive.msg_id'
            '  join pgflow.step_states as s on s.run_id = t.run_id and s.step_slug = t.step_slug'
            '  join pgflow.runs as r on r.run_id = t.run_id'
            '  join pgflow.steps as d on d.flow_slug = t.flow_slug and d.step_slug = t.step_slug'
            '  join pgflow.flows as f on f.flow_slug = t.flow_slug'
            '  where t.status = ''started'' and s.status = ''started'' and r.status = ''started'''
            '    and t.permanently_stalled_at is null'
            '    and t.started_at < now() - make_interval(secs => coalesce(d.opt_timeout, f.opt_timeout) + 30)'
            '  for no key update of t skip locked),'
            ' moved as ('
            '  update pgflow.step_tasks as t'
            '  set status = case when t.requeued_count < 3 then ''queued'' else t.status end,'
            '      started_at = case when t.requeued_count < 3 then null else t.started_at end,'
            '      last_worker_id = case when t.requeued_count < 3 then null else t.last_worker_id end,'
            '      last_requeued_at = case when t.requeued_count < 3 then now() else t.last_requeued_at end,'
            '      permanently_stalled_at = case when t.requeued_count < 3 then null else now() end,'
            '      requeued_count = least(t.requeued_count + 1, 3)'
            '  from stalled'
            '  where t.run_id = stalled.run_id and t.step_slug = stalled.step_slug and t.task_index = stalled.task_index'
            '    and t.status = ''started'''
            '  returning t.message_id, t.permanently_stalled_at is not null as given_up)'
            ' select array_agg(moved.message_id) filter (where not moved.given_up),'
            '        array_agg(moved.message_id) filter (where moved.given_up)'
            ' from moved',
            v_queue)
        into v_requeued, v_given_up
        using v_flow;

        if v_requeued is not null then
            execute format(
                'update pgmq.%1$I as m set vt = clock_timestamp() where m.msg_id in ('
                '  select q.msg_id from pgmq.%1$I as q where q.msg_id = any ($1) for no key update skip locked)',
                v_queue)
            using v_requeued;
            v_total := v_total + cardinality(v_requeued);
        end if;
        if v_given_up is not null then
            perform pgmq.archive(v_flow::text, v_given_up);
        end if;
    end loop;
    return v_total;
end;
$$;

revoke all on function pgflow.requeue_stalled_tasks() from public;
