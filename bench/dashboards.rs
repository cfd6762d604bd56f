//! What dashboards cost that poll runs: `cargo bench --bench dashboards [-- --seconds N] [--clients N] [TARGET…]`. 500 clients
//! ask for the state of one of 50 runs each, twice a second and then as fast as they can, while workers finish some 25 tasks
//! a second of those runs through the same door. Starts its own Postgres with a replica, PgBouncer where there is one, and a
//! Flowgate for each of its configurations. Statements are counted by `pg_stat_statements` on the primary. An answer is stale
//! if it lacks a task of whose completion its worker knew before the question was sent.

#[path = "support/cpu.rs"]
mod cpu;
#[path = "support/doors.rs"]
mod doors;

use std::collections::VecDeque;
use std::env;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, bail};
use cpu::cpu_of_cluster;
use doors::{connect, pgbouncer, serve};
use flowgate::embedded::{Cluster, ClusterOptions};
use flowgate::schema::{self, InstallOptions};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep};
use tokio_postgres::{Client, SimpleQueryMessage};
use uuid::Uuid;

const RUNS: usize = 50;
/// A run has that many, one after the other.
const STEPS: usize = 100;
const WORKERS: usize = 5;
/// Between two tasks of a worker.
const PACE: Duration = Duration::from_millis(200);
/// Between two questions of a dashboard, unless it asks as fast as it can.
const EVERY: Duration = Duration::from_millis(500);
const WARM_UP: Duration = Duration::from_secs(2);
const WORKER: &str = "67e55044-10b1-426f-9247-bb680e5fe0c8";

/// Of Flowgate: its name here, whether it has the replica, and what it is told.
type Setting = (&'static str, bool, &'static [(&'static str, &'static str)]);
const SAMPLED: [(&str, &str); 2] = [
    ("FLOWGATE_ROUTE__SAMPLE_MS", "200"),
    ("FLOWGATE_ROUTE__REPLICA_WAIT_MS", "400"),
];
const EVENTUAL: (&str, &str) = ("FLOWGATE_ROUTE__CONSISTENCY", "eventual");
const SETTINGS: [Setting; 8] = [
    ("flowgate", false, &[]),
    ("flowgate, replica", true, &[]),
    (
        "flowgate, kept 250 ms",
        false,
        &[("FLOWGATE_CACHE__MAX_AGE_MS", "250")],
    ),
    (
        "flowgate, replica, kept 250 ms",
        true,
        &[("FLOWGATE_CACHE__MAX_AGE_MS", "250")],
    ),
    ("flowgate, replica, sampled every 200 ms", true, &SAMPLED),
    (
        "flowgate, replica, sampled every 200 ms, kept 250 ms",
        true,
        &[
            SAMPLED[0],
            SAMPLED[1],
            ("FLOWGATE_CACHE__MAX_AGE_MS", "250"),
        ],
    ),
    ("flowgate, replica, eventual", true, &[EVENTUAL]),
    (
        "flowgate, replica, eventual, kept 250 ms",
        true,
        &[EVENTUAL, ("FLOWGATE_CACHE__MAX_AGE_MS", "250")],
    ),
];

struct Options {
    phase: Duration,
    clients: usize,
    /// None: all of them.
    targets: Vec<String>,
}

fn main() -> anyhow::Result<()> {
    let mut options = Options {
        phase: Duration::from_secs(10),
        clients: 500,
        targets: Vec::new(),
    };
    // `cargo bench` adds `--bench`.
    let mut words = env::args().skip(1).filter(|word| word != "--bench");
    while let Some(word) = words.next() {
        match word.as_str() {
            "--seconds" | "--clients" => {
                let number = words.next().context("a number")?.parse::<u32>()?;
                if word == "--seconds" {
                    options.phase = Duration::from_secs(number.into());
                } else {
                    options.clients = usize::try_from(number)?;
                }
            }
            _ => options.targets.push(word),
        }
    }
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(measure(&options))
}

async fn measure(options: &Options) -> anyhow::Result<()> {
    let settings = |more: &[(&str, &str)]| {
        let most = (options.clients + 150).to_string();
        let all = [("max_connections", most.as_str())];
        let all = all.iter().chain(more);
        all.map(|&(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    };
    let counted = [
        ("shared_preload_libraries", "pg_stat_statements"),
        ("pg_stat_statements.track_planning", "off"),
    ];
    let options_of = |more: &[(&str, &str)]| ClusterOptions {
        settings: settings(more),
        ..ClusterOptions::default()
    };
    let cluster = Cluster::start(options_of(&counted))
        .await
        .context("is there pg_stat_statements (Debian: postgresql-contrib)?")?;
    let primary = cluster.primary_url();
    schema::install(&primary.parse()?, InstallOptions::default()).await?;
    let observer = connect(&primary).await?;
    observer
        .batch_execute("create extension pg_stat_statements")
        .await?;
    let steps: String = (1..=STEPS)
        .map(|n| match n {
            1 => "select pgflow.add_step('dash', 's1');".to_owned(),
            n => format!(
                "select pgflow.add_step('dash', 's{n}', array['s{}']);",
                n - 1
            ),
        })
        .collect();
    observer
        .batch_execute(&format!(
            "select pgflow.create_flow('dash'); {steps}
             insert into pgflow.workers (worker_id, queue_name, function_name) values ('{WORKER}', 'dash', 'bench')"
        ))
        .await?;

    println!(
        "| asked | target | answers/s | p50 ms | p99 ms | reads at the primary/s | Flowgate's own there/s | % of direct | CPU primary % | replica % | answers per CPU s of Postgres | × direct | stale | oldest ms |"
    );
    println!("|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|");
    for paced in [true, false] {
        let mut direct: Option<Outcome> = None;
        for target in 0..SETTINGS.len() + 2 {
            let name = match target {
                0 => "direct",
                1 => "pgbouncer",
                n => SETTINGS[n - 2].0,
            };
            let wanted = options.targets.is_empty()
                || target == 0
                || options.targets.iter().any(|target| target == name);
            if !wanted {
                continue;
            }
            let door = match target {
                0 => None,
                1 => match pgbouncer(&primary, 20).await? {
                    Some(door) => Some(door),
                    None => continue,
                },
                n => {
                    let (_, replica, told) = SETTINGS[n - 2];
                    let replica_url = cluster.replica_url(0);
                    let more: &[_] = if replica {
                        &["--replica", &replica_url]
                    } else {
                        &[]
                    };
                    Some(serve(&primary, more, told).await?)
                }
            };
            let url = door.as_ref().map_or(&primary, |(_, url)| url);
            let outcome = one(&observer, &cluster, url, paced, options).await?;
            let base = direct.as_ref().unwrap_or(&outcome);
            println!(
                "| {} | {name} | {} |",
                if paced { "2 Hz" } else { "at once" },
                outcome.beside(base)
            );
            direct.get_or_insert(outcome);
        }
    }
    Ok(())
}

struct Outcome {
    answers: f64,
    p50: f64,
    p99: f64,
    reads: f64,
    own: f64,
    cpu_primary: f64,
    cpu_replica: f64,
    stale: f64,
    oldest: f64,
}

impl Outcome {
    fn worth(&self) -> f64 {
        self.answers / (self.cpu_primary + self.cpu_replica)
    }

    fn beside(&self, direct: &Self) -> String {
        let statements = |of: &Self| of.reads + of.own;
        // Of as many answers.
        let share = statements(self) / self.answers / (direct.reads / direct.answers);
        format!(
            "{:.0} | {:.1} | {:.1} | {:.1} | {:.1} | {:.2} | {:.1} | {:.1} | {:.0} | {:.1} | {:.2} % | {:.0}",
            self.answers,
            self.p50,
            self.p99,
            self.reads,
            self.own,
            share * 100.0,
            self.cpu_primary * 100.0,
            self.cpu_replica * 100.0,
            self.worth(),
            self.worth() / direct.worth(),
            self.stale * 100.0,
            self.oldest
        )
    }
}

/// A run, and when each of its tasks was known to be done: the last few.
struct Run {
    id: Uuid,
    done: Mutex<(usize, VecDeque<Instant>)>,
}

const REMEMBERED: usize = 64;

impl Run {
    fn complete(&self) {
        let mut done = self.done.lock().expect("nobody panics");
        done.0 += 1;
        done.1.push_back(Instant::now());
        if done.1.len() > REMEMBERED {
            done.1.pop_front();
        }
    }

    fn count(&self) -> usize {
        self.done.lock().expect("nobody panics").0
    }

    /// How old an answer is at `at` that knows of `count` tasks: since when there was one more.
    fn age(&self, count: usize, at: Instant) -> Duration {
        let done = self.done.lock().expect("nobody panics");
        let missing = done.0.saturating_sub(count).min(done.1.len());
        let first = done.1.get(done.1.len() - missing);
        first.map_or(Duration::ZERO, |since| at.saturating_duration_since(*since))
    }
}

struct Phase {
    url: String,
    runs: Vec<Run>,
    counts: AtomicBool,
    stop: AtomicBool,
}

async fn one(
    observer: &Client,
    cluster: &Cluster,
    url: &str,
    paced: bool,
    options: &Options,
) -> anyhow::Result<Outcome> {
    // What the phase before has left is nobody's.
    observer
        .batch_execute("delete from pgmq.q_dash; checkpoint")
        .await?;
    let mut runs = Vec::new();
    for _ in 0..RUNS {
        let row = observer
            .query_one("select run_id from pgflow.start_flow('dash', '{}')", &[])
            .await?;
        let done = Mutex::default();
        runs.push(Run {
            id: row.get(0),
            done,
        });
    }
    let phase = Arc::new(Phase {
        url: url.to_owned(),
        runs,
        counts: AtomicBool::new(false),
        stop: AtomicBool::new(false),
    });
    let mut workers = Vec::new();
    for _ in 0..WORKERS {
        workers.push(tokio::spawn(work(Arc::clone(&phase))));
    }
    let mut dashboards = Vec::new();
    for n in 0..options.clients {
        let client = connect(url).await?;
        let phase = Arc::clone(&phase);
        let after = EVERY.mul_f64(n as f64 / options.clients as f64);
        dashboards.push(tokio::spawn(async move {
            dashboard(client, &phase, n % RUNS, paced.then_some(after)).await
        }));
    }
    sleep(WARM_UP).await;
    let before = Reading::take(observer, cluster).await?;
    phase.counts.store(true, SeqCst);
    let began = Instant::now();
    sleep(options.phase).await;
    phase.counts.store(false, SeqCst);
    let after = Reading::take(observer, cluster).await?;
    let seconds = began.elapsed().as_secs_f64();
    phase.stop.store(true, SeqCst);

    let mut answers = Vec::new();
    for dashboard in dashboards {
        answers.append(&mut dashboard.await??);
    }
    for worker in workers {
        worker.await??;
    }
    if answers.is_empty() {
        bail!("no answers");
    }
    answers.sort_by(|one, other| one.took.total_cmp(&other.took));
    let at = |share: f64| answers[((answers.len() - 1) as f64 * share) as usize].took;
    let per_second = |of: fn(&Reading) -> f64| (of(&after) - of(&before)) / seconds;
    let stale = answers.iter().filter(|answer| answer.age.is_some());
    let ages = answers.iter().filter_map(|answer| answer.age);
    Ok(Outcome {
        answers: answers.len() as f64 / seconds,
        p50: at(0.5),
        p99: at(0.99),
        reads: per_second(|reading| reading.reads),
        own: per_second(|reading| reading.own),
        cpu_primary: per_second(|reading| reading.cpu_primary),
        cpu_replica: per_second(|reading| reading.cpu_replica),
        stale: stale.count() as f64 / answers.len() as f64,
        oldest: ages.fold(0.0, f64::max),
    })
}

struct Answer {
    /// Milliseconds.
    took: f64,
    /// Of a stale one, in milliseconds.
    age: Option<f64>,
}

/// As `@pgflow/client` asks. `after`: not before, and then twice a second.
async fn dashboard(
    client: Client,
    phase: &Phase,
    run: usize,
    after: Option<Duration>,
) -> anyhow::Result<Vec<Answer>> {
    let run = &phase.runs[run];
    let read = format!("select pgflow.get_run_with_states('{}')", run.id);
    let mut ticks = after.map(|after| {
        let mut ticks = interval_at(Instant::now() + after, EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ticks
    });
    let mut answers = Vec::new();
    while !phase.stop.load(SeqCst) {
        if let Some(ticks) = &mut ticks {
            ticks.tick().await;
        }
        let (known, asked) = (run.count(), Instant::now());
        let said = client.simple_query(&read).await?;
        let took = asked.elapsed().as_secs_f64() * 1000.0;
        let row = said.iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => row.get(0),
            _ => None,
        });
        let done = STEPS - remaining(row.context("a run")?)?;
        if phase.counts.load(SeqCst) {
            let stale = done < known;
            let age = stale.then(|| run.age(done, asked).as_secs_f64() * 1000.0);
            answers.push(Answer { took, age });
        }
    }
    Ok(answers)
}

/// Steps that the run still has to do.
fn remaining(state: &str) -> anyhow::Result<usize> {
    let (_, behind) = state
        .split_once("\"remaining_steps\": ")
        .context("a run's state")?;
    let digits = behind.split(|c: char| !c.is_ascii_digit()).next();
    Ok(digits.context("a number")?.parse()?)
}

async fn work(phase: Arc<Phase>) -> anyhow::Result<()> {
    let client = connect(&phase.url).await?;
    while !phase.stop.load(SeqCst) {
        let poll = "select msg_id from pgflow.read_with_poll('dash', 600, 1, 1, 50)";
        for message in first_column(&client, poll).await? {
            let start = format!(
                "select run_id || ' ' || step_slug from pgflow.start_tasks('dash', array[{message}]::bigint[], '{WORKER}')"
            );
            for task in first_column(&client, &start).await? {
                let (run, step) = task.split_once(' ').context("a task")?;
                let id: Uuid = run.parse()?;
                let complete = format!("select pgflow.complete_task('{id}', '{step}', 0, '1')");
                client.simple_query(&complete).await?;
                if let Some(run) = phase.runs.iter().find(|run| run.id == id) {
                    run.complete();
                }
            }
        }
        sleep(PACE).await;
    }
    Ok(())
}

async fn first_column(client: &Client, sql: &str) -> anyhow::Result<Vec<String>> {
    let rows = client.simple_query(sql).await?;
    let first = |message: &SimpleQueryMessage| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
        _ => None,
    };
    Ok(rows.iter().filter_map(first).collect())
}

/// What Postgres has done so far.
struct Reading {
    /// Of runs, at the primary.
    reads: f64,
    /// Neither dashboards' nor workers'.
    own: f64,
    cpu_primary: f64,
    cpu_replica: f64,
}

impl Reading {
    async fn take(observer: &Client, cluster: &Cluster) -> anyhow::Result<Self> {
        let sql = "select coalesce(sum(calls) filter (where query like '%get_run_with_states%'), 0)::float8,
                          coalesce(sum(calls) filter (where query not like '%pgflow.%' and query not like '%pgmq.%' and query not like '%pg_stat_statements%'), 0)::float8
                   from pg_stat_statements";
        let row = observer.query_one(sql, &[]).await?;
        let cpu = |pid: Option<u32>| cpu_of_cluster(pid.context("a postmaster")?);
        Ok(Self {
            reads: row.get(0),
            own: row.get(1),
            cpu_primary: cpu(cluster.primary_pid())?,
            cpu_replica: cpu(cluster.replica_pid(0))?,
        })
    }
}
