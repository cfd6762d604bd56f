//! Many workers on flows that fail, skip and ask conditions, while stalled tasks are given back under their hands: nothing
//! deadlocks, nothing is lost, nothing is said twice.
//!
//! `FLOWGATE_SEED` repeats the chances taken, though not the order in which the server gets to them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::timeout;

use super::{Core, at_0_14, show, try_show};
use crate::core::invariants;
use crate::core::random_dags::{Chance, seed};

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_workers_skip_fail_and_complete_without_a_deadlock_or_a_loss() {
    let seed = seed();
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

    invariants::hold(&core, &format!("FLOWGATE_SEED={seed}")).await;
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
