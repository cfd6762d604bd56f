//! What is true of every database in which nobody is at work just now, whatever happened before, at both levels. Each rule is
//! a query for what breaks it.

use super::Core;

/// Copies every flow's queue and archive into `queued` and `archived`, so that rules can join them, and makes `abandoned`,
/// the tasks that a test left undone on purpose, if the test has not made it.
const GATHER: &str = "
create temp table if not exists abandoned (run_id uuid, step_slug text, task_index int);
drop table if exists queued, archived;
create temp table queued (msg_id bigint, message jsonb);
create temp table archived (msg_id bigint, message jsonb);
do $$
declare
    v_table text;
begin
    for v_table in select distinct lower(flow_slug) from pgflow.flows loop
        execute format('insert into queued select msg_id, message from pgmq.%I', 'q_' || v_table);
        execute format('insert into archived select msg_id, message from pgmq.%I', 'a_' || v_table);
    end loop;
end;
$$;
create or replace temp view task as
    select t.*, r.status as run_status, s.status as step_status, jsonb_build_object(
        'flow_slug', t.flow_slug, 'run_id', t.run_id, 'step_slug', t.step_slug, 'task_index', t.task_index) as message
    from pgflow.step_tasks as t join pgflow.runs as r using (run_id) join pgflow.step_states as s using (run_id, step_slug);
-- Each step's output as the contract has it, and as it is kept (0.14).
create or replace temp view step as
    select s.flow_slug, s.run_id, s.step_slug, s.status, s.remaining_tasks, s.remaining_deps, s.created_at, s.started_at,
        s.completed_at, s.failed_at, s.error_message, s.initial_tasks, d.step_type, r.status as run_status,
        to_jsonb(s) -> 'output' as kept, to_jsonb(s) ->> 'skip_reason' as skip_reason,
        (to_jsonb(s) ->> 'skipped_at')::timestamptz as skipped_at,
        case when d.step_type = 'map'
            then coalesce((select jsonb_agg(t.output order by t.task_index) from pgflow.step_tasks as t
                           where t.run_id = s.run_id and t.step_slug = s.step_slug), '[]')
            else coalesce((select t.output from pgflow.step_tasks as t
                           where t.run_id = s.run_id and t.step_slug = s.step_slug), 'null') end as output,
        not exists (select from pgflow.deps as e where e.flow_slug = s.flow_slug and e.dep_slug = s.step_slug) as leaf
    from pgflow.step_states as s
    join pgflow.steps as d using (flow_slug, step_slug)
    join pgflow.runs as r using (run_id);
-- Events of runs, and where each may stand among those of its transaction.
create or replace temp view said as
    select e.id, e.xid, e.seq, e.event, e.payload, substr(e.topic, 12)::uuid as run_id, e.payload ->> 'step_slug' as step_slug,
        case
            when e.event = 'run:started' then 0
            when e.event like 'step:%:completed' and not e.payload ? 'remaining_tasks' then 1
            when e.event like 'step:%:completed' then 2
            when e.event like 'step:%:started' then 3
            when e.event = 'run:failed' and not e.payload ? 'error_message' then 4
            when e.event like 'step:%:failed' then 5
            when e.event in ('run:failed', 'run:completed') then 6
            when e.event like 'step:%:skipped' then 7
        end as place
    from flowgate.event as e
    where e.topic like 'pgflow:run:%' and e.seq is not null;
";

const RULES: &[(&str, &str)] = &[
    (
        "a run has ended, or has a task that was abandoned on purpose and nothing else to do",
        "select r.run_id, r.flow_slug, t.step_slug, t.task_index, t.status from pgflow.runs as r
         left join task as t on t.run_id = r.run_id and t.status in ('queued', 'started') and t.step_status = 'started'
          and not exists (select from abandoned as a
                          where (a.run_id, a.step_slug, a.task_index) = (t.run_id, t.step_slug, t.task_index) and t.status = 'started')
         where r.status = 'started'
         and (t.run_id is not null or not exists (select from abandoned as a where a.run_id = r.run_id))",
    ),
    (
        "remaining_steps is the number of steps that are neither completed nor skipped",
        "select r.run_id, r.status, r.remaining_steps from pgflow.runs as r where r.remaining_steps <>
         (select count(*) from pgflow.step_states as s where s.run_id = r.run_id and s.status not in ('completed', 'skipped'))",
    ),
    (
        "remaining_tasks is the number of tasks that are not completed, and null where a step has not started or was skipped",
        "select run_id, step_slug, status, remaining_tasks from step as s where remaining_tasks is distinct from
         case when status <> 'skipped' and started_at is not null then (select count(*) from pgflow.step_tasks as t
            where t.run_id = s.run_id and t.step_slug = s.step_slug and t.status <> 'completed') end",
    ),
    (
        "remaining_deps is the number of dependencies that have not ended, unless the step was skipped for one of them",
        "select run_id, step_slug, remaining_deps from step as s where status <> 'skipped' and remaining_deps <>
         (select count(*) from pgflow.deps as d join pgflow.step_states as p on p.run_id = s.run_id and p.step_slug = d.dep_slug
          where d.flow_slug = s.flow_slug and d.step_slug = s.step_slug and p.status not in ('completed', 'skipped'))",
    ),
    (
        "a step that started has its tasks, numbered from 0, and one that did not has none",
        "select s.run_id, s.step_slug, s.status, s.initial_tasks, count(t.run_id), min(t.task_index), max(t.task_index)
         from step as s left join pgflow.step_tasks as t using (run_id, step_slug)
         group by s.run_id, s.step_slug, s.status, s.initial_tasks, s.started_at
         having count(t.run_id) <> case when s.started_at is null then 0 else s.initial_tasks end
         or (count(t.run_id) > 0 and (min(t.task_index) <> 0 or max(t.task_index) <> count(t.run_id) - 1))",
    ),
    (
        "a step whose dependencies have ended has started or was skipped, while its run goes on or is complete",
        "select run_id, step_slug from step where status = 'created' and remaining_deps = 0 and run_status <> 'failed'",
    ),
    (
        "only a failed run has a failed step, exactly one, or a failed task outside of skipped steps",
        "select r.run_id, r.status, count(s.run_id) from pgflow.runs as r
         left join pgflow.step_states as s on s.run_id = r.run_id and s.status = 'failed'
         group by r.run_id, r.status having count(s.run_id) <> case r.status when 'failed' then 1 else 0 end
         union all
         select run_id, run_status, task_index from task where status = 'failed' and run_status <> 'failed' and step_status <> 'skipped'",
    ),
    (
        "what ended says when, in the right column",
        "select run_id, status from pgflow.runs
         where (completed_at is not null, failed_at is not null) <> (status = 'completed', status = 'failed')
         union all
         select run_id, step_slug || status from pgflow.step_states
         where (completed_at is not null, failed_at is not null) <> (status = 'completed', status = 'failed')
            or (started_at is not null) <> (status <> 'created') and status not in ('failed', 'skipped')
         union all
         select run_id, step_slug || task_index || status from pgflow.step_tasks
         where (completed_at is not null, failed_at is not null, started_at is not null)
            <> (status = 'completed', status = 'failed', status <> 'queued')",
    ),
    (
        "a run that is complete has the outputs of its leaves, any other has none",
        "select r.run_id, r.status, r.output from pgflow.runs as r where r.output is distinct from
         case when r.status = 'completed' then
            (select jsonb_object_agg(s.step_slug, s.output) from step as s
             where s.run_id = r.run_id and s.leaf and s.status = 'completed') end",
    ),
    (
        "a step keeps the output it completed with, and no other",
        "select run_id, step_slug, status, kept, output from step where kept <> case when status = 'completed' then output else 'null' end",
    ),
    (
        "a step is skipped when something it depends on was, its condition is not met, or its handler failed",
        "select s.run_id, s.step_slug, s.status, s.skip_reason from step as s
         where (s.status = 'skipped') <> (s.skip_reason is not null) or (s.status = 'skipped') <> (s.skipped_at is not null)
            or s.skip_reason = 'handler_failed' and not exists (select from task as t where t.run_id = s.run_id
                and t.step_slug = s.step_slug and t.status = 'failed' and t.error_message = s.error_message)
            or s.skip_reason = 'dependency_skipped' and not exists (select from pgflow.deps as d join step as p
                on p.run_id = s.run_id and p.step_slug = d.dep_slug and p.status = 'skipped'
                where d.flow_slug = s.flow_slug and d.step_slug = s.step_slug)
            or s.skip_reason not in ('condition_unmet', 'handler_failed', 'dependency_skipped')",
    ),
    (
        "a message's id is that of one task",
        "select flow_slug, message_id, count(*) from task group by 1, 2 having count(*) > 1 or message_id is null",
    ),
    (
        "no message of a run that has ended is left in its queue",
        "select q.msg_id, q.message, r.status from queued as q
         join pgflow.runs as r on r.run_id = (q.message ->> 'run_id')::uuid where r.status <> 'started'",
    ),
    (
        "the message of a task that waits or runs is in the queue, that of any other task in the archive, and once",
        "select t.run_id, t.step_slug, t.task_index, t.status, t.run_status,
            (select count(*) from queued as q where q.msg_id = t.message_id and q.message = t.message) as queued,
            (select count(*) from archived as a where a.msg_id = t.message_id and a.message = t.message) as archived
         from task as t
         where ((select count(*) from queued as q where q.msg_id = t.message_id and q.message = t.message),
                (select count(*) from archived as a where a.msg_id = t.message_id and a.message = t.message))
            <> (case when t.run_status = 'started' and t.step_status = 'started' and t.status in ('queued', 'started')
                then (1::bigint, 0::bigint) else (0::bigint, 1::bigint) end)",
    ),
    (
        "there is no message without a task",
        "select * from (select message from queued union all select message from archived) as m
         where not exists (select from task as t where t.message = m.message)",
    ),
    (
        "events of a run are counted from 1 without a gap, in the order of their ids",
        "select run_id, count(*), min(seq), max(seq) from said group by run_id
         having (min(seq), max(seq), count(distinct seq)) <> (1, count(*), count(*))
         union all
         select run_id, id, seq, 0 from (select *, lag(id) over (partition by run_id order by seq) as earlier from said) as s
         where earlier > id",
    ),
    (
        "each thing that happened was said, once, and nothing else",
        "with happened as (
             select run_id, 'run:started' as event from pgflow.runs
             union all select run_id, 'run:' || status from pgflow.runs where status <> 'started'
             union all select run_id, 'step:' || step_slug || ':started' from step where started_at is not null and initial_tasks > 0
             union all select run_id, 'step:' || step_slug || ':' || status from step where status in ('completed', 'failed', 'skipped')
         )
         (select 'not said' as what, * from (select * from happened except all select run_id, event from said) as missing)
         union all
         (select 'too much', * from (select run_id, event from said except all select * from happened) as more)",
    ),
    (
        "the first event says that the run started, the last ones how it ended",
        "select s.run_id, s.seq, s.event from said as s
         join (select run_id, max(seq) as last from said group by run_id) as m using (run_id)
         join pgflow.runs as r using (run_id)
         where (s.event = 'run:started') <> (s.seq = 1)
            or (r.status = 'completed' and (s.event = 'run:completed') <> (s.seq = m.last))
            or (r.status = 'failed' and (s.event like '%:failed') <> (s.seq > m.last - 2))",
    ),
    (
        "a step starts before it ends, and after everything it depends on has ended",
        "select s.run_id, s.event, e.event from said as s join said as e
            on e.run_id = s.run_id and e.step_slug = s.step_slug and e.seq < s.seq and s.event like '%:started'
         union all
         select s.run_id, s.event, p.event from said as s
         join pgflow.runs as r using (run_id)
         join pgflow.deps as d on d.flow_slug = r.flow_slug and d.step_slug = s.step_slug
         left join said as p on p.run_id = s.run_id and p.step_slug = d.dep_slug and p.event ~ ':(completed|skipped)$'
         where (p.seq is null or p.seq > s.seq) and s.payload ->> 'skip_reason' is distinct from 'dependency_skipped'
         union all
         select s.run_id, s.event, s.payload ->> 'skip_reason' from said as s
         join pgflow.runs as r using (run_id)
         where s.payload ->> 'skip_reason' = 'dependency_skipped' and not exists (
            select from said as p join pgflow.deps as d on d.dep_slug = p.step_slug
            where p.run_id = s.run_id and p.event like '%:skipped' and p.seq < s.seq
              and d.flow_slug = r.flow_slug and d.step_slug = s.step_slug)",
    ),
    (
        "within a call it is said from the cause to the end, and steps start in the order of their slugs",
        "select run_id, seq, event from (
             select *, lag(place) over w as before, lag(step_slug) over w as slug_before from said where place is distinct from 7
             window w as (partition by xid, run_id order by seq)) as s
         where place is null or before > place or (place in (0, 1, 4, 5, 6) and before = place)
            or (place = 3 and before = 3 and step_slug < slug_before)",
    ),
    (
        "what is said agrees with the rows",
        "select s.run_id, s.event, s.payload from said as s join pgflow.runs as r using (run_id)
         where s.event like 'run:%' and s.payload <> jsonb_build_object('event_type', s.event, 'run_id', s.run_id,
               'flow_slug', r.flow_slug, 'status', split_part(s.event, ':', 2)) || case s.event
            when 'run:started' then jsonb_build_object('input', r.input, 'started_at', r.started_at, 'remaining_steps',
                (select count(*) from pgflow.step_states as o where o.run_id = r.run_id))
            when 'run:completed' then jsonb_build_object('output', r.output, 'completed_at', r.completed_at)
            else jsonb_build_object('failed_at', r.failed_at) || case when s.place = 4 then '{}' else jsonb_build_object('error_message',
                (select max(f.error_message) from pgflow.step_states as f where f.run_id = r.run_id and f.status = 'failed')) end
         end
         union all
         select s.run_id, s.event, s.payload from said as s join step as t using (run_id, step_slug)
         where s.payload <> jsonb_build_object('event_type', 'step:' || split_part(s.event, ':', 3), 'run_id', s.run_id,
               'step_slug', s.step_slug, 'status', split_part(s.event, ':', 3)) || case s.place
            when 1 then jsonb_build_object('output', t.output, 'completed_at', t.completed_at)
            when 2 then jsonb_build_object('output', '[]'::jsonb, 'started_at', t.started_at, 'completed_at', t.completed_at,
                'remaining_tasks', 0, 'remaining_deps', 0)
            when 3 then jsonb_build_object('started_at', t.started_at, 'remaining_tasks', t.initial_tasks, 'remaining_deps', 0)
            when 5 then jsonb_build_object('error_message', t.error_message, 'failed_at', t.failed_at)
            when 7 then jsonb_build_object('skip_reason', t.skip_reason, 'skipped_at', t.skipped_at) || case t.skip_reason
                when 'handler_failed' then jsonb_build_object('error_message', t.error_message)
                else jsonb_build_object('flow_slug', t.flow_slug) end
         end",
    ),
];

/// Fails with every rule that is broken, and by what (`about` says what to repeat).
pub(crate) async fn hold(core: &Core, about: &str) {
    core.run(GATHER).await;
    core.run("create index on queued (msg_id); create index on archived (msg_id); analyze queued; analyze archived")
        .await;
    let mut broken = String::new();
    for (rule, query) in RULES {
        let rows = core.show(query).await;
        if !rows.is_empty() {
            let some: Vec<_> = rows.lines().take(20).collect();
            broken += &format!("\n{rule}:\n{}\n", some.join("\n"));
        }
    }
    assert!(broken.is_empty(), "{about}: broken:\n{broken}");
}

#[tokio::test]
async fn each_rule_notices_what_breaks_it() {
    let core = Core::new().await;
    core.define("flow f(max_attempts => 1)\n map m\n a\n b < a, m")
        .await;
    core.start_flow("f", "[1, 2]", 1).await;
    core.take("f").await;
    for (step, index) in [("m", 0), ("m", 1), ("a", 0)] {
        core.complete(1, step, index, "1").await;
    }
    core.take("f").await;
    core.complete(1, "b", 0, "1").await;
    core.start_flow("f", "[1, 2]", 2).await;
    core.take("f").await;
    core.fail(2, "a", 0, "no").await;
    hold(&core, "two runs that ended").await;

    let damage = [
        "update pgflow.runs set remaining_steps = 1 where status = 'completed'",
        "update pgflow.runs set output = '{\"b\": 2}' where status = 'completed'",
        "update pgflow.runs set status = 'started', completed_at = null where status = 'completed'",
        "update pgflow.step_states set remaining_tasks = 2 where status = 'failed'",
        "update pgflow.step_states set remaining_tasks = remaining_tasks + 1 where status = 'started'",
        "update pgflow.step_states set remaining_deps = 1 where step_slug = 'a'",
        "update pgflow.step_states set status = 'failed', completed_at = null, failed_at = now() where step_slug = 'b'",
        "delete from pgflow.step_tasks where step_slug = 'm' and task_index = 1",
        "update pgflow.step_tasks set status = 'failed', failed_at = now(), completed_at = null where step_slug = 'b'",
        "update pgflow.step_tasks set completed_at = null where step_slug = 'b'",
        "update pgflow.step_tasks set message_id = 1",
        "insert into pgmq.q_f (vt, message) select now(), message from pgmq.a_f limit 1",
        "delete from pgmq.a_f where msg_id = 1",
        "update flowgate.event set seq = seq + 1 where event = 'run:completed'",
        "update flowgate.event set id = id + 1000 where event = 'step:a:started'",
        "insert into flowgate.event (topic, seq, event, payload) select topic, 9, event, payload from flowgate.event
         where event = 'run:completed'",
        "delete from flowgate.event where event = 'run:failed'",
        "update flowgate.event set seq = case seq when 2 then 3 when 3 then 2 else seq end",
        "update flowgate.event set seq = case seq when 1 then 2 when 2 then 1 else seq end",
        "update flowgate.event set payload = payload || '{\"more\": 1}' where event = 'run:completed'",
        "update flowgate.event set payload = payload - 'remaining_deps' where event = 'step:b:started'",
        "update flowgate.event set payload = payload || '{\"output\": 5}' where event = 'step:b:completed'",
    ];
    for sql in damage {
        core.run("begin").await;
        core.run(sql).await;
        core.run(GATHER).await;
        let mut noticed = 0;
        for (_, query) in RULES {
            noticed += usize::from(!core.show(query).await.is_empty());
        }
        core.run("rollback").await;
        assert!(noticed > 0, "nobody noticed: {sql}");
    }
}
