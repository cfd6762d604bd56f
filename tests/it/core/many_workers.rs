//! 32 workers on the same flows, three tries in ten failing: nothing deadlocks, nothing is lost, nothing is done twice.
//!
//! `FLOWGATE_TORTURE_SECONDS=60` keeps new runs coming for that long; without it the work is a fixed amount.
//! `FLOWGATE_SEED` repeats the chances taken, though not the order in which the server gets to them.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, timeout};

use super::random_dags::{Chance, seed};
use super::{Core, invariants, show, try_show};
use crate::support::wait::wait_until;

const WORKERS: u64 = 32;
const FAILURES_PERCENT: u64 = 30;
/// For the fixed amount of work, and for what is left when the time of a long run is over.
const PATIENCE: Duration = Duration::from_secs(180);

const FLOWS: [&str; 4] = ["wide", "diamond", "chain", "brittle"];
/// Of the brittle flow most runs fail, while the other tasks of the same map end one way or the other.
const DEFINITIONS: &str = "
    flow wide(max_attempts => 8, base_delay => 0)
    map items
    last < items
    flow diamond(max_attempts => 2, base_delay => 0)
    root
    left < root
    right < root
    middle < root
    end < left, right, middle
    flow chain(max_attempts => 6, base_delay => 0)
    list
    map each < list
    map again < each
    sum < again
    flow brittle(max_attempts => 2, base_delay => 0)
    map items
    map others
    last < items, others";

/// What the workers saw, all of them together.
#[derive(Default)]
struct Seen {
    /// How often start_tasks handed each task out: `run step index`.
    handed: Mutex<HashMap<String, u32>>,
    /// Every error; each is one too many.
    errors: Mutex<Vec<String>>,
    /// No run will be added.
    complete: AtomicBool,
}

impl Seen {
    fn failed(&self) -> bool {
        !self.errors.lock().unwrap().is_empty()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_workers_on_the_same_runs_never_deadlock_lose_or_repeat_a_task() {
    let seed = seed();
    let core = Core::new().await;
    core.define(DEFINITIONS).await;
    let seen = Seen::default();
    let torture = std::env::var("FLOWGATE_TORTURE_SECONDS").ok();
    let torture = torture.map(|text| Duration::from_secs(text.parse().expect("seconds")));

    let feeder = feed(&core, &seen, torture);
    let workers =
        join_all((0..WORKERS).map(async |me| work(&core, &seen, Chance(seed ^ me)).await));
    let limit = PATIENCE + torture.unwrap_or_default();
    let outcome = timeout(limit, async { tokio::join!(feeder, workers) }).await;

    let runs = core
        .show("select flow_slug, status, count(*) from pgflow.runs group by 1, 2 order by 1, 2")
        .await;
    eprintln!("FLOWGATE_SEED={seed}, {WORKERS} workers:\n{runs}");
    let errors = seen.errors.lock().unwrap().join("\n");
    assert_eq!(errors, "", "FLOWGATE_SEED={seed}");
    assert!(
        outcome.is_ok(),
        "FLOWGATE_SEED={seed}: not done after {limit:?}:\n{runs}"
    );

    // The server's own count of deadlocks, in case somebody's error went unseen.
    let deadlocks = "select pg_stat_force_next_flush(); select pg_stat_clear_snapshot();
                     select deadlocks from pg_stat_database where datname = current_database()";
    assert!(core.show(deadlocks).await.ends_with("\n0"));

    // As many hand-outs as attempts, task by task: none was handed to two callers, none was started for nobody.
    let attempts = core
        .show("select run_id || ' ' || step_slug || ' ' || task_index, attempts_count from pgflow.step_tasks")
        .await;
    let mut handed = std::mem::take(&mut *seen.handed.lock().unwrap());
    let mut wrong = Vec::new();
    for line in attempts.lines() {
        let (task, count) = line.rsplit_once(' ').unwrap();
        let count: u32 = count.parse().unwrap();
        let got = handed.remove(task).unwrap_or(0);
        if got != count {
            wrong.push(format!("{task}: attempt {count}, handed out {got} times"));
        }
    }
    assert!(
        wrong.is_empty() && handed.is_empty(),
        "FLOWGATE_SEED={seed}: {wrong:?} {handed:?}"
    );
    invariants::hold(&core, &format!("FLOWGATE_SEED={seed}")).await;
    // 30 % of failures: some runs end well, and of the flow with two tries some do not.
    let fates = core
        .show("select count(distinct status) from pgflow.runs")
        .await;
    assert_eq!(fates, "2", "{runs}");
}

/// Starts runs: a fixed number, or for as long as the torture lasts whenever few are left.
async fn feed(core: &Core, seen: &Seen, torture: Option<Duration>) {
    let client = core.db.connect().await;
    let batch = "select pgflow.start_flow('wide', (select jsonb_agg(i) from generate_series(1, 40) as i)) from generate_series(1, 4);
                 select pgflow.start_flow('diamond', '{}') from generate_series(1, 16);
                 select pgflow.start_flow('chain', '{}') from generate_series(1, 4);
                 select pgflow.start_flow('brittle', (select jsonb_agg(i) from generate_series(1, 12) as i)) from generate_series(1, 20)";
    let started = Instant::now();
    show(&client, batch).await;
    show(&client, batch).await;
    while !seen.failed() && torture.is_some_and(|lasts| started.elapsed() < lasts) {
        let few = "select count(*) < 30 from pgflow.runs where status = 'started'";
        wait_until("few runs are left", PATIENCE, async || {
            seen.failed() || show(&client, few).await == "t"
        })
        .await;
        show(&client, batch).await;
    }
    seen.complete.store(true, Ordering::Release);
}

async fn work(core: &Core, seen: &Seen, mut chance: Chance) {
    let client = core.db.connect().await;
    let register = "insert into pgflow.workers (worker_id, queue_name, function_name)
                    values (gen_random_uuid(), 'any', 'torture') returning worker_id";
    let worker = show(&client, register).await;
    // One error is enough: nobody waits for what will not come.
    while !seen.failed() {
        let flow = FLOWS[chance.below(4) as usize];
        let qty = 1 + chance.below(8);
        let poll = format!("select msg_id from pgflow.read_with_poll('{flow}', 2, {qty}, 1, 20)");
        let ids = match try_show(&client, &poll).await {
            Ok(ids) => ids.replace('\n', ","),
            Err(error) => {
                return seen.errors.lock().unwrap().push(format!("poll: {error:?}"));
            }
        };
        let start = format!(
            "select run_id || ' ' || step_slug || ' ' || task_index from pgflow.start_tasks('{flow}', '{{{ids}}}', '{worker}')"
        );
        let tasks = match try_show(&client, &start).await {
            Ok(tasks) => tasks,
            Err(error) => {
                return seen
                    .errors
                    .lock()
                    .unwrap()
                    .push(format!("start_tasks: {error:?}"));
            }
        };
        for task in tasks.lines() {
            *seen
                .handed
                .lock()
                .unwrap()
                .entry(task.to_owned())
                .or_default() += 1;
            let parts: Vec<_> = task.split(' ').collect();
            let (run, step, index) = (parts[0], parts[1], parts[2]);
            let end = if chance.below(100) < FAILURES_PERCENT {
                format!("select pgflow.fail_task('{run}', '{step}', {index}, 'by chance')")
            } else {
                let output = if step == "list" {
                    "[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]"
                } else {
                    "1"
                };
                format!("select pgflow.complete_task('{run}', '{step}', {index}, '{output}')")
            };
            if let Err(error) = try_show(&client, &end).await {
                return seen
                    .errors
                    .lock()
                    .unwrap()
                    .push(format!("{end}: {error:?}"));
            }
        }
        if tasks.is_empty() && seen.complete.load(Ordering::Acquire) {
            let left = "select count(*) from pgflow.runs where status = 'started'";
            if show(&client, left).await == "0" {
                return;
            }
        }
    }
}
