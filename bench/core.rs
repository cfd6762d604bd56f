//! pgflow's core in SQL, ours beside upstream's: `cargo bench --bench core [-- --help]`. Starts its own Postgres, installs ours
//! into one database and `@pgflow/core` 0.8.1 (from the npm registry, thrown away afterwards) into another, and drives the same
//! flows through both in turns, with workers that make the calls pgflow's TypeScript worker makes (unnamed statements,
//! batches of 10), each on a connection of its own. What is compared is the SQL: every answer is asked for, none is shared.

use std::cell::{Cell, RefCell};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::Parser;
use flowgate::embedded::{Cluster, ClusterOptions, connect};
use flowgate::schema::{self, InstallOptions};
use futures_util::future::try_join_all;
use serde_json::Value;
use tokio::task::LocalSet;
use tokio::time::{Instant, sleep};
use tokio_postgres::Client;
use tokio_postgres::types::Type;
use uuid::Uuid;

const BATCH: i32 = 10;
const START_FLOW: &str = "select * from pgflow.start_flow($1, $2)";
/// Kernel's USER_HZ: the unit of /proc/<pid>/stat.
const TICKS_A_SECOND: f64 = 100.0;
const PATIENCE: Duration = Duration::from_secs(900);

#[derive(Parser)]
struct Args {
    /// Of: single, diamond, map<N> (one map over the run's input), chain<N> (single → map of N → single)
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "single,diamond,map100,chain100,map1000,chain1000,chain10000"
    )]
    cases: Vec<Case>,
    #[arg(long, value_delimiter = ',', default_value = "1,8,32")]
    workers: Vec<usize>,
    /// Of: upstream, ours (wake-ups by NOTIFY, the default), quiet (ours, `flowgate.wake` = off)
    #[arg(long, value_delimiter = ',', default_value = "upstream,ours,quiet")]
    targets: Vec<Target>,
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Finished runs of five steps that are there from the start
    #[arg(long, default_value_t = 0)]
    finished: usize,
    /// Tasks a case and round, at most; upstream gets a tenth in maps of 1,000 and more, where its tasks cost most
    #[arg(long, default_value_t = 2000)]
    tasks: usize,
    /// `fsync = off`
    #[arg(long)]
    no_fsync: bool,
    /// Applied over ours: to try a change without a build
    #[arg(long)]
    overlay: Vec<PathBuf>,
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Case {
    Single,
    Diamond,
    Map(usize),
    Chain(usize),
}

impl std::str::FromStr for Case {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        let size = |number: &str| {
            let size = number.parse();
            size.map_err(|error| format!("`{word}` has no size: {error}"))
        };
        match word {
            "single" => Ok(Self::Single),
            "diamond" => Ok(Self::Diamond),
            _ => match (word.strip_prefix("map"), word.strip_prefix("chain")) {
                (Some(number), _) => Ok(Self::Map(size(number)?)),
                (_, Some(number)) => Ok(Self::Chain(size(number)?)),
                (None, None) => Err(format!("`{word}` is no case")),
            },
        }
    }
}

impl Case {
    fn name(self) -> String {
        match self {
            Self::Single => "single step".to_owned(),
            Self::Diamond => "diamond of 5".to_owned(),
            Self::Map(size) => format!("map of {size}"),
            Self::Chain(size) => format!("single → map of {size} → single"),
        }
    }

    /// What a connection that works for hours has behind it: a few runs of the same shape.
    fn warm_up(self) -> (Self, usize) {
        match self {
            Self::Single => (self, 8),
            Self::Diamond => (self, 2),
            Self::Map(size) => (Self::Map(size.min(8)), 2),
            Self::Chain(size) => (Self::Chain(size.min(8)), 3),
        }
    }

    fn define(self) -> &'static str {
        match self {
            Self::Single => "select pgflow.add_step($flow, 'only')",
            Self::Diamond => {
                "select pgflow.add_step($flow, 'a');
                 select pgflow.add_step($flow, 'b', array['a']);
                 select pgflow.add_step($flow, 'c', array['a']);
                 select pgflow.add_step($flow, 'd', array['a']);
                 select pgflow.add_step($flow, 'e', array['b', 'c', 'd'])"
            }
            Self::Map(_) => "select pgflow.add_step($flow, 'each', step_type => 'map')",
            Self::Chain(_) => {
                "select pgflow.add_step($flow, 'list');
                 select pgflow.add_step($flow, 'each', array['list'], step_type => 'map');
                 select pgflow.add_step($flow, 'sum', array['each'])"
            }
        }
    }

    fn tasks_a_run(self) -> usize {
        match self {
            Self::Single => 1,
            Self::Diamond => 5,
            Self::Map(size) => size,
            Self::Chain(size) => size + 2,
        }
    }

    fn size(self) -> usize {
        match self {
            Self::Single | Self::Diamond => 0,
            Self::Map(size) | Self::Chain(size) => size,
        }
    }

    fn input(self) -> Value {
        match self {
            Self::Map(size) => (0..size).map(element).collect(),
            _ => serde_json::json!({"n": 1}),
        }
    }

    /// What the handler of `step` answers.
    fn output(self, step: &str) -> Value {
        match (self, step) {
            (Self::Chain(size), "list") => (0..size).map(element).collect(),
            _ => serde_json::json!({"done": step, "value": 42}),
        }
    }
}

fn element(n: usize) -> Value {
    serde_json::json!({"url": format!("https://example.com/page/{n}")})
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    Upstream,
    Ours,
    Quiet,
}

impl std::str::FromStr for Target {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        match word {
            "upstream" => Ok(Self::Upstream),
            "ours" => Ok(Self::Ours),
            "quiet" => Ok(Self::Quiet),
            _ => Err(format!("`{word}` is no target")),
        }
    }
}

impl Target {
    fn name(self) -> &'static str {
        match self {
            Self::Upstream => "pgflow 0.8.1",
            Self::Ours => "flowgate",
            Self::Quiet => "flowgate, wake off",
        }
    }

    fn template(self) -> &'static str {
        match self {
            Self::Upstream => "template_upstream",
            Self::Ours | Self::Quiet => "template_ours",
        }
    }
}

/// One round of one case on one target.
#[derive(Default)]
struct Round {
    tasks: usize,
    seconds: f64,
    /// Of every process of Postgres, while tasks were worked on.
    cpu_ms: f64,
    wal_bytes: f64,
    /// µs a call: start_flow, start_tasks, complete_task.
    calls: [Vec<u64>; 3],
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    LocalSet::new().block_on(&runtime, measure(&args))
}

async fn measure(args: &Args) -> anyhow::Result<()> {
    let settings = [
        ("max_connections", "100"),
        ("shared_buffers", "512MB"),
        ("max_wal_size", "8GB"),
        ("checkpoint_timeout", "30min"),
        // What makes WAL bytes comparable: no full page images at all.
        ("full_page_writes", "off"),
        ("autovacuum", "off"),
    ];
    let cluster = Cluster::start(ClusterOptions {
        durable: !args.no_fsync,
        replicas: 0,
        settings: settings
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
        ..ClusterOptions::default()
    })
    .await?;
    let admin = cluster.connect_primary().await?;
    let server = cluster.primary_url();
    let url = |database: &str| {
        let (head, _) = server.rsplit_once('/').expect("a URL with a database");
        format!("{head}/{database}")
    };
    let postmaster = cluster.primary_pid().context("no postmaster")?;

    for target in &args.targets {
        let template = target.template();
        let there = "select exists (select from pg_database where datname = $1)";
        if admin.query_one(there, &[&template]).await?.get(0) {
            continue;
        }
        admin
            .batch_execute(&format!("create database {template}"))
            .await?;
        schema::install(&url(template).parse()?, InstallOptions::default()).await?;
        match target {
            Target::Upstream => upstream(&url(template)).await?,
            Target::Ours | Target::Quiet => {
                let client = connect(&url(template)).await?;
                for file in &args.overlay {
                    let text =
                        fs::read_to_string(file).with_context(|| file.display().to_string())?;
                    client
                        .batch_execute(&text)
                        .await
                        .with_context(|| file.display().to_string())?;
                }
            }
        }
        preload(&url(template), args.finished).await?;
    }

    let version: String = admin.query_one("select version()", &[]).await?.get(0);
    println!(
        "{version}; fsync {}; {} finished runs beforehand; medians of {} interleaved rounds\n",
        if args.no_fsync { "off" } else { "on" },
        args.finished,
        args.rounds
    );
    println!(
        "| flow | workers | SQL | tasks/s | × | runs/s | CPU ms/task | WAL kB/task | start_flow p50/p99 ms | start_tasks | complete_task |"
    );
    println!("|---|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|");
    for &case in &args.cases {
        for &workers in &args.workers {
            let mut rounds: Vec<Vec<Round>> = args.targets.iter().map(|_| Vec::new()).collect();
            for round in 0..args.rounds {
                for place in 0..args.targets.len() {
                    let place = (place + round) % args.targets.len();
                    let target = args.targets[place];
                    let share = if target == Target::Upstream && case.size() >= 1000 {
                        10
                    } else {
                        1
                    };
                    let runs = (args.tasks / share / case.tasks_a_run()).max(1);
                    admin
                        .batch_execute("drop database if exists bench with (force)")
                        .await?;
                    admin
                        .batch_execute(&format!(
                            "create database bench template {}",
                            target.template()
                        ))
                        .await?;
                    admin.batch_execute("checkpoint").await?;
                    let limit = if share > 1 {
                        args.tasks / share
                    } else {
                        usize::MAX
                    };
                    let done = drive(
                        &url("bench"),
                        target,
                        case,
                        workers,
                        runs,
                        limit,
                        postmaster,
                    )
                    .await;
                    rounds[place]
                        .push(done.with_context(|| format!("{}, {}", case.name(), target.name()))?);
                }
            }
            report(args, case, workers, &mut rounds);
        }
    }
    drop(admin);
    cluster.stop().await?;
    Ok(())
}

/// Replaces ours by upstream's, from its npm package. Events go to a plain table, as on Supabase.
async fn upstream(url: &str) -> anyhow::Result<()> {
    schema::uninstall(&url.parse()?).await?;
    let folder = tempfile::tempdir()?;
    let packed = Command::new("npm")
        .args(["pack", "--silent", "@pgflow/core@0.8.1"])
        .current_dir(&folder)
        .output()
        .context("npm")?;
    ensure!(
        packed.status.success(),
        "npm pack: {}",
        String::from_utf8_lossy(&packed.stderr)
    );
    let archive = String::from_utf8(packed.stdout)?;
    let unpacked = Command::new("tar")
        .args(["xzf", archive.trim()])
        .current_dir(&folder)
        .status()?;
    ensure!(unpacked.success(), "tar: {unpacked}");
    let client = connect(url).await?;
    client
        .batch_execute(
            "create schema realtime;
             create table realtime.messages (
                 topic text not null, extension text not null, payload jsonb, event text, private boolean default false,
                 updated_at timestamp not null default now(), inserted_at timestamp not null default now(),
                 id uuid not null default gen_random_uuid(), primary key (id, inserted_at)
             ) partition by range (inserted_at);
             create table realtime.messages_all partition of realtime.messages default;
             create function realtime.send(payload jsonb, event text, topic text, private boolean default true) returns void
             language plpgsql as $$
             begin
                 insert into realtime.messages (payload, event, topic, private, extension)
                 values (payload, event, topic, private, 'broadcast');
             end $$",
        )
        .await?;
    let migrations = folder.path().join("package/dist/supabase/migrations");
    let mut files: Vec<PathBuf> = fs::read_dir(&migrations)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    files.sort();
    ensure!(!files.is_empty(), "no migrations in the package");
    for file in files {
        apply(&client, &file).await?;
    }
    Ok(())
}

async fn apply(client: &Client, file: &Path) -> anyhow::Result<()> {
    // pgmq is there, though not as an extension.
    let text: String = fs::read_to_string(file)?
        .lines()
        .filter(|line| !line.to_ascii_lowercase().starts_with("create extension"))
        .flat_map(|line| [line, "\n"])
        .collect();
    let name = file.display().to_string();
    client.batch_execute(&text).await.context(name)?;
    client.batch_execute("reset all").await?;
    Ok(())
}

/// Runs of a diamond that ended long ago, as they would lie in the tables of either.
async fn preload(url: &str, runs: usize) -> anyhow::Result<()> {
    let client = connect(url).await?;
    if runs > 0 {
        client
            .batch_execute(&format!(
                "select pgflow.create_flow('old');
                 select pgflow.add_step('old', 'a');
                 select pgflow.add_step('old', 'b', array['a']);
                 select pgflow.add_step('old', 'c', array['a']);
                 select pgflow.add_step('old', 'd', array['a']);
                 select pgflow.add_step('old', 'e', array['b', 'c', 'd']);
                 set synchronous_commit = off;
                 insert into pgflow.runs (flow_slug, status, input, output, remaining_steps, started_at, completed_at)
                 select 'old', 'completed', '{{\"n\": 1}}', '{{\"e\": {{\"done\": \"e\"}}}}', 0, at, at + interval '5 s'
                 from generate_series(1, {runs}) as n, lateral (select now() - n * interval '1 s') as started(at);
                 insert into pgflow.step_states (flow_slug, run_id, step_slug, status, remaining_tasks, initial_tasks, created_at,
                     started_at, completed_at)
                 select 'old', r.run_id, s.step_slug, 'completed', 0, 1, r.started_at, r.started_at, r.completed_at
                 from pgflow.runs as r join pgflow.steps as s on s.flow_slug = 'old';
                 insert into pgflow.step_tasks (flow_slug, run_id, step_slug, message_id, status, attempts_count, output, queued_at,
                     started_at, completed_at)
                 select 'old', s.run_id, s.step_slug, row_number() over (), 'completed', 1,
                     '{{\"done\": \"e\", \"value\": 42}}', s.started_at, s.started_at, s.completed_at
                 from pgflow.step_states as s;
                 insert into pgmq.a_old (msg_id, read_ct, enqueued_at, vt, message)
                 select t.message_id, 1, t.queued_at, t.started_at, jsonb_build_object('flow_slug', t.flow_slug,
                     'run_id', t.run_id, 'step_slug', t.step_slug, 'task_index', 0)
                 from pgflow.step_tasks as t"
            ))
            .await?;
        client.batch_execute("vacuum analyze").await?;
    }
    Ok(())
}

/// What the workers of a round share.
struct Work {
    case: Case,
    left: Cell<usize>,
    started: RefCell<Vec<u64>>,
    completed: RefCell<Vec<u64>>,
}

impl Work {
    fn new(case: Case, tasks: usize) -> Self {
        let (started, completed) = (RefCell::default(), RefCell::default());
        Self {
            case,
            left: Cell::new(tasks),
            started,
            completed,
        }
    }
}

async fn drive(
    url: &str,
    target: Target,
    case: Case,
    workers: usize,
    runs: usize,
    limit: usize,
    postmaster: u32,
) -> anyhow::Result<Round> {
    let boss = session(url, target).await?;
    for flow in ["bench", "warm"] {
        boss.batch_execute(&format!("select pgflow.create_flow('{flow}')"))
            .await?;
        boss.batch_execute(&case.define().replace("$flow", &format!("'{flow}'")))
            .await?;
    }
    let mut clients = Vec::new();
    for _ in 0..workers {
        let client = session(url, target).await?;
        let (case, runs) = case.warm_up();
        for _ in 0..runs {
            client
                .query_typed(
                    START_FLOW,
                    &[(&"warm", Type::TEXT), (&case.input(), Type::JSONB)],
                )
                .await?;
        }
        clients.push(
            worker(
                client,
                target,
                "warm",
                &Work::new(case, runs * case.tasks_a_run()),
            )
            .await?,
        );
    }

    let mut round = Round::default();
    let input = case.input();
    for _ in 0..runs {
        let sent = Instant::now();
        boss.query_typed(START_FLOW, &[(&"bench", Type::TEXT), (&input, Type::JSONB)])
            .await?;
        round.calls[0].push(micros(sent));
    }

    let expected = (runs * case.tasks_a_run()).min(limit);
    let work = Rc::new(Work::new(case, expected));
    let (cpu, wal) = (cpu_ms(postmaster)?, wal_bytes(&boss).await?);
    let began = Instant::now();
    let workers = clients.into_iter().map(|client| {
        let work = Rc::clone(&work);
        tokio::task::spawn_local(
            async move { worker(client, target, "bench", &work).await.map(drop) },
        )
    });
    // Time ends with the last task, not with the polls that find nothing more.
    let mut ended = None;
    let handles: Vec<_> = workers.collect();
    while began.elapsed() < PATIENCE {
        if work.left.get() == 0 {
            ended = Some(began.elapsed());
            break;
        }
        if let Some(broken) = handles
            .iter()
            .position(tokio::task::JoinHandle::is_finished)
        {
            let broken = handles.into_iter().nth(broken).expect("it is there");
            broken.await??;
            bail!("a worker left before the work was done");
        }
        sleep(Duration::from_millis(1)).await;
    }
    let seconds = ended
        .context("the work was not done in time")?
        .as_secs_f64();
    round.cpu_ms = cpu_ms(postmaster)? - cpu;
    round.wal_bytes = wal_bytes(&boss).await? - wal;
    try_join_all(handles)
        .await?
        .into_iter()
        .collect::<anyhow::Result<Vec<()>>>()?;
    (round.tasks, round.seconds) = (expected, seconds);
    round.calls[1] = work.started.take();
    round.calls[2] = work.completed.take();

    if limit == usize::MAX {
        let open =
            "select count(*) from pgflow.runs where flow_slug = 'bench' and status <> 'completed'";
        let open: i64 = boss.query_one(open, &[]).await?.get(0);
        ensure!(open == 0, "{open} of {runs} runs are not completed");
    }
    Ok(round)
}

async fn session(url: &str, target: Target) -> anyhow::Result<Client> {
    let client = connect(url).await?;
    if target == Target::Quiet {
        client.batch_execute("set flowgate.wake = off").await?;
    }
    Ok(client)
}

/// Works until nothing is left; gives the connection back.
async fn worker(client: Client, target: Target, flow: &str, work: &Work) -> anyhow::Result<Client> {
    let id = Uuid::new_v4();
    let register = "insert into pgflow.workers (queue_name, worker_id, function_name) values ($1, $2, 'bench')";
    client
        .query_typed(register, &[(&flow, Type::TEXT), (&id, Type::UUID)])
        .await?;
    let poll = match target {
        Target::Upstream => "select msg_id from pgmq.read_with_poll($1, 30, $2, 1, 20)",
        Target::Ours | Target::Quiet => {
            "select msg_id from pgflow.read_with_poll($1, 30, $2, 1, 20)"
        }
    };
    let start = "select run_id, step_slug, input, task_index from pgflow.start_tasks($1, $2, $3)";
    let complete = "select pgflow.complete_task($1, $2, $3, $4)";
    while work.left.get() > 0 {
        let read = client
            .query_typed(poll, &[(&flow, Type::TEXT), (&BATCH, Type::INT4)])
            .await?;
        let messages: Vec<i64> = read.iter().map(|row| row.get(0)).collect();
        if messages.is_empty() {
            continue;
        }
        let sent = Instant::now();
        let tasks = client
            .query_typed(
                start,
                &[
                    (&flow, Type::TEXT),
                    (&messages, Type::INT8_ARRAY),
                    (&id, Type::UUID),
                ],
            )
            .await?;
        work.started.borrow_mut().push(micros(sent));
        for task in tasks {
            if work.left.get() == 0 {
                break;
            }
            let (run, step, index): (Uuid, String, i32) = (task.get(0), task.get(1), task.get(3));
            let output = work.case.output(&step);
            let sent = Instant::now();
            client
                .query_typed(
                    complete,
                    &[
                        (&run, Type::UUID),
                        (&step, Type::TEXT),
                        (&index, Type::INT4),
                        (&output, Type::JSONB),
                    ],
                )
                .await?;
            work.completed.borrow_mut().push(micros(sent));
            work.left.set(work.left.get().saturating_sub(1));
        }
    }
    Ok(client)
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).expect("no call takes that long")
}

async fn wal_bytes(client: &Client) -> anyhow::Result<f64> {
    let at = "select (pg_current_wal_insert_lsn() - '0/0')::float8";
    Ok(client.query_one(at, &[]).await?.get(0))
}

/// User and system time of every process of this Postgres, those that have ended included.
fn cpu_ms(postmaster: u32) -> anyhow::Result<f64> {
    let mut ticks = 0;
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
            continue; // it ended meanwhile
        };
        // The name, in parentheses, may hold anything; what follows are numbers.
        let Some((_, numbers)) = stat.rsplit_once(')') else {
            continue;
        };
        let field = |n: usize| {
            numbers
                .split_ascii_whitespace()
                .nth(n - 3)
                .and_then(|field| field.parse::<u64>().ok())
        };
        if pid == postmaster {
            ticks += [14, 15, 16, 17].into_iter().filter_map(field).sum::<u64>();
        } else if field(4) == Some(u64::from(postmaster)) {
            ticks += [14, 15].into_iter().filter_map(field).sum::<u64>();
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "ticks of minutes")]
    let ticks = ticks as f64;
    Ok(ticks * 1000.0 / TICKS_A_SECOND)
}

#[expect(clippy::cast_precision_loss, reason = "counts of thousands")]
fn report(args: &Args, case: Case, workers: usize, rounds: &mut [Vec<Round>]) {
    let rate = |round: &Round| round.tasks as f64 / round.seconds;
    // Ratios are of each round's own, so that a busy moment hits both.
    let base: Vec<f64> = rounds[0].iter().map(rate).collect();
    for (target, rounds) in args.targets.iter().zip(rounds) {
        let ratio = median(
            rounds
                .iter()
                .zip(&base)
                .map(|(round, base)| rate(round) / base),
        );
        let calls: Vec<String> = (0..3)
            .map(|call| {
                let mut all: Vec<u64> = rounds
                    .iter_mut()
                    .flat_map(|round| round.calls[call].drain(..))
                    .collect();
                all.sort_unstable();
                let at = |share: usize| {
                    all.get(all.len() * share / 100)
                        .map_or(0.0, |us| *us as f64 / 1000.0)
                };
                format!("{:.2}/{:.2}", at(50), at(99))
            })
            .collect();
        println!(
            "| {} | {workers} | {} | {:.0} | {ratio:.2} | {:.1} | {:.3} | {:.2} | {} |",
            case.name(),
            target.name(),
            median(rounds.iter().map(rate)),
            median(
                rounds
                    .iter()
                    .map(|round| round.tasks as f64 / case.tasks_a_run() as f64 / round.seconds)
            ),
            median(rounds.iter().map(|round| round.cpu_ms / round.tasks as f64)),
            median(
                rounds
                    .iter()
                    .map(|round| round.wal_bytes / 1000.0 / round.tasks as f64)
            ),
            calls.join(" | "),
        );
    }
}

fn median(numbers: impl Iterator<Item = f64>) -> f64 {
    let mut all: Vec<f64> = numbers.collect();
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied().unwrap_or(f64::NAN)
}
