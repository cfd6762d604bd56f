//! Many workers on flows that fail, skip and ask conditions, while stalled tasks are given back under their hands: nothing
//! deadlocks, nothing is lost, nothing is said twice.
//!
//! `FLOWGATE_SEED` repeats the chances taken, though not the order in which the server gets to them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::timeout;

use super::{Core, at_0_14, show, try_show};

const WORKERS: u64 = 16;
const FAILURES_PERCENT: u64 = 30;
const PATIENCE: Duration = Duration::from_secs(180);
const FLOWS: [&str; 3] = ["maps", "diamond", "asks"];

const DEFINITIONS: &str = r#"
    flow maps(max_attempts => 2, base_delay => 0)
    map items(when_exhausted => 'skip')
    map again < items(when_exhausted => 'skip-cascade')
    last < again
    beside < items
    flow diamond(max_attempts => 2, base_delay => 0)
    root(max_attempts => 6)
    left < root(when_exhausted => 'skip')
    right < root(when_exhausted => 'skip-cascade')
    middle < root
    end < left, right, middle
    alone < left(when_exhausted => 'skip')
    flow asks(max_attempts => 3, base_delay => 0)
    first(when_exhausted => 'skip')
    map list < first
    yes < first(required_input_pattern => '{"first": [1]}')
    no < first(forbidden_input_pattern => '{"first": [1]}', when_unmet => 'skip-cascade')
    after < no, list(when_exhausted => 'skip')
    must < yes, list(forbidden_input_pattern => '{"yes": 3}', when_unmet => 'fail', when_exhausted => 'skip')"#;

/// Each finds what breaks it.
const RULES: &[(&str, &str)] = &[
    ("every run has ended", "select run_id, flow_slug from pgflow.runs where status = 'started'"),
    (
        "remaining_steps counts what has not ended",
        "select run_id, remaining_steps from pgflow.runs as r where remaining_steps <> (select count(*) from pgflow.step_states as s
         where s.run_id = r.run_id and s.status not in ('completed', 'skipped'))",
    ),
    (
        "a run that is complete has the outputs of its completed leaves, any other has none",
        "select run_id, status, output from pgflow.runs as r where output is distinct from case when status = 'completed' then
         (select jsonb_object_agg(s.step_slug, s.output) from pgflow.step_states as s where s.run_id = r.run_id and s.status = 'completed'
          and not exists (select from pgflow.deps as e where e.flow_slug = s.flow_slug and e.dep_slug = s.step_slug)) end",
    ),
    (
        "a completed step's output is that of its tasks",
        "select run_id, step_slug, output from pgflow.step_states as s join pgflow.steps as d using (flow_slug, step_slug)
         where output is distinct from case when s.status = 'completed' then case when d.step_type = 'map'
          then coalesce((select jsonb_agg(t.output order by t.task_index) from pgflow.step_tasks as t
                         where (t.run_id, t.step_slug) = (s.run_id, s.step_slug)), '[]')
          else (select t.output from pgflow.step_tasks as t where (t.run_id, t.step_slug) = (s.run_id, s.step_slug)) end end",
    ),
    (
        "a completed step has completed tasks only, as many as were planned",
        "select s.run_id, s.step_slug from pgflow.step_states as s where s.status = 'completed' and s.initial_tasks <>
         (select count(*) from pgflow.step_tasks as t where (t.run_id, t.step_slug) = (s.run_id, s.step_slug) and t.status = 'completed')",
    ),
    (
        "a step is skipped for a reason",
        "select run_id, step_slug, skip_reason from pgflow.step_states as s join pgflow.steps as d using (flow_slug, step_slug)
         where s.status = 'skipped' and not case skip_reason
          when 'handler_failed' then exists (select from pgflow.step_tasks as t
            where (t.run_id, t.step_slug) = (s.run_id, s.step_slug) and t.status = 'failed' and t.error_message = s.error_message)
          when 'condition_unmet' then d.required_input_pattern is not null or d.forbidden_input_pattern is not null
          when 'dependency_skipped' then exists (select from pgflow.deps as e join pgflow.step_states as p
            on (p.run_id, p.step_slug, p.status) = (s.run_id, e.dep_slug, 'skipped')
            where (e.flow_slug, e.step_slug) = (s.flow_slug, s.step_slug)) end",
    ),
    (
        "only a failed run has a failed step, and it has one",
        "select r.run_id, r.status from pgflow.runs as r where (select count(*) from pgflow.step_states as s
         where s.run_id = r.run_id and s.status = 'failed') <> case r.status when 'failed' then 1 else 0 end",
    ),
    (
        "no message is left, and each is archived once",
        "select 'queued', message from (select message from pgmq.q_maps union all select message from pgmq.q_diamond
          union all select message from pgmq.q_asks) as q
         union all
         select 'archived ' || count(*), message from (select message from pgmq.a_maps union all select message from pgmq.a_diamond
          union all select message from pgmq.a_asks) as a group by message having count(*) > 1
         union all
         select 'tasks', to_jsonb(count(*)) from pgflow.step_tasks having count(*) <> (select count(*) from pgmq.a_maps)
          + (select count(*) from pgmq.a_diamond) + (select count(*) from pgmq.a_asks)",
    ),
    (
        "each thing that happened was said, once, and nothing else",
        "with happened as (
             select run_id, 'run:started' as event from pgflow.runs
             union all select run_id, 'run:' || status from pgflow.runs
             union all select run_id, 'step:' || step_slug || ':' || status from pgflow.step_states where status in ('completed', 'failed', 'skipped')
             union all select distinct run_id, 'step:' || step_slug || ':started' from pgflow.step_tasks),
         said as (select substr(topic, 12)::uuid as run_id, event from flowgate.event where seq is not null)
         (select 'not said' as what, * from (select * from happened except all select * from said) as missing)
         union all
         (select 'too much', * from (select * from said except all select * from happened) as more)",
    ),
    (
        "events are counted without a gap, from the run's start to its end",
        "select topic, count(*) from flowgate.event where seq is not null group by topic
         having (min(seq), max(seq)) <> (1, count(*)) or (array_agg(event order by seq))[1] <> 'run:started'
          or (array_agg(event order by seq desc))[1] not in ('run:completed', 'run:failed')",
    ),
    (
        "a parent's end is said before its child starts or ends",
        "select c.topic, c.event, p.event from flowgate.event as c
         join pgflow.runs as r on c.topic = 'pgflow:run:' || r.run_id
         join pgflow.deps as e on (e.flow_slug, e.step_slug) = (r.flow_slug, c.payload ->> 'step_slug')
         left join flowgate.event as p on p.topic = c.topic and p.payload ->> 'step_slug' = e.dep_slug and p.event ~ '(completed|skipped)$'
         where c.event like 'step:%' and c.payload ->> 'skip_reason' is distinct from 'dependency_skipped'
          and (p.seq > c.seq or p.seq is null)",
    ),
    (
        "a step that is skipped for its dependencies is so after one of them",
        "select c.topic, c.event from flowgate.event as c where c.payload ->> 'skip_reason' = 'dependency_skipped' and not exists (
          select from flowgate.event as p join pgflow.runs as r on p.topic = 'pgflow:run:' || r.run_id
          join pgflow.deps as e on (e.flow_slug, e.step_slug, e.dep_slug) = (r.flow_slug, c.payload ->> 'step_slug', p.payload ->> 'step_slug')
          where p.topic = c.topic and p.seq < c.seq and p.event like '%:skipped')",
    ),
];

/// Chances from a seed (splitmix64).
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_workers_skip_fail_and_complete_without_a_deadlock_or_a_loss() {
    let seed =
        std::env::var("FLOWGATE_SEED").map_or(20_261_123, |text| text.parse().expect("a number"));
    let core = at_0_14().await;
    core.define(DEFINITIONS).await;
    core.run(
        "select pgflow.start_flow('maps', (select jsonb_agg(i) from generate_series(1, 12) as i)) from generate_series(1, 15);
         select pgflow.start_flow('diamond', '{}') from generate_series(1, 40);
         select pgflow.start_flow('asks', '{}') from generate_series(1, 40)",
    )
    .await;
    let done = AtomicBool::new(false);
    let requeueing = async {
        let client = core.db.connect().await;
        while !done.load(Ordering::Acquire) {
            // As if three in a hundred workers had died a while ago.
            let stall = "update pgflow.step_tasks set queued_at = now() - interval '1 day', started_at = now() - interval '1 h'
                         where ctid = any (array(select ctid from pgflow.step_tasks where status = 'started' and random() < 0.03 and requeued_count < 2
                                                 for update skip locked));
                         select pgflow.requeue_stalled_tasks()";
            show(&client, stall).await;
        }
    };
    let workers = async {
        let ended =
            join_all((0..WORKERS).map(async |me| work(&core, Chance(seed ^ me)).await)).await;
        done.store(true, Ordering::Release);
        ended
    };
    let ended = timeout(PATIENCE, async { tokio::join!(workers, requeueing).0 })
        .await
        .unwrap_or_else(|_| panic!("FLOWGATE_SEED={seed}: not done after {PATIENCE:?}"));
    let errors: Vec<_> = ended.into_iter().filter_map(Result::err).collect();
    assert!(errors.is_empty(), "FLOWGATE_SEED={seed}: {errors:#?}");
    let deadlocks = "select pg_stat_force_next_flush(); select pg_stat_clear_snapshot();
                     select deadlocks from pg_stat_database where datname = current_database()";
    assert!(
        core.show(deadlocks).await.ends_with("\n0"),
        "FLOWGATE_SEED={seed}"
    );

    let mut broken = String::new();
    for (rule, query) in RULES {
        let rows = core.show(query).await;
        if !rows.is_empty() {
            let some: Vec<_> = rows.lines().take(20).collect();
            broken += &format!("\n{rule}:\n{}\n", some.join("\n"));
        }
    }
    assert!(broken.is_empty(), "FLOWGATE_SEED={seed}: broken:\n{broken}");
    // The chances are such that all of it happens.
    let fates = "select string_agg(distinct status || coalesce(' ' || skip_reason, ''), ', ') from pgflow.step_states where status in ('completed', 'failed', 'skipped')";
    assert_eq!(
        core.show(fates).await,
        "completed, failed, skipped condition_unmet, skipped dependency_skipped, skipped handler_failed"
    );
    assert_eq!(
        core.show("select count(distinct status) from pgflow.runs")
            .await,
        "2"
    );
}

async fn work(core: &Core, mut chance: Chance) -> Result<(), String> {
    let client = core.db.connect().await;
    let register = "insert into pgflow.workers (worker_id, queue_name, function_name) values (gen_random_uuid(), 'any', 'many') returning worker_id";
    let worker = show(&client, register).await;
    loop {
        let flow = FLOWS[usize::try_from(chance.below(3)).unwrap()];
        let qty = 1 + chance.below(8);
        let take = format!(
            "select run_id, step_slug, task_index from pgflow.start_tasks('{flow}',
             array(select msg_id from pgmq.read_with_poll('{flow}', 2, {qty}, 1, 20)), '{worker}')"
        );
        let tasks = try_show(&client, &take)
            .await
            .map_err(|error| format!("start_tasks: {error:?}"))?;
        for task in tasks.lines() {
            let mut parts = task.split(' ');
            let [run, step, index] = [(); 3].map(|()| parts.next().unwrap());
            let end = if chance.below(100) < FAILURES_PERCENT {
                format!(
                    "select pgflow.fail_task('{run}', '{step}', {index}, 'by chance {}')",
                    chance.below(1000)
                )
            } else {
                let output = match (step, chance.below(2)) {
                    ("first", 0) => "[1, 2]".to_owned(),
                    ("first", _) => "[]".to_owned(),
                    _ => chance.below(5).to_string(),
                };
                format!("select pgflow.complete_task('{run}', '{step}', {index}, '{output}')")
            };
            try_show(&client, &end)
                .await
                .map_err(|error| format!("{end}: {error:?}"))?;
        }
        let left = "select count(*) from pgflow.runs where status = 'started'";
        if tasks.is_empty() && show(&client, left).await == "0" {
            return Ok(());
        }
    }
}
