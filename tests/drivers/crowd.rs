//! Many runs started at once and followed by everything that follows runs: each LISTEN driver, EventSource, pgflow's own client. Of
//! whatever is killed meanwhile, and whoever's pgflow is in the database, each follower is told of every event of each of its runs,
//! in order, once or more. The followers are processes (`node/`, `python/`, `follower`) that judge what they hear; here is what
//! happens to them. Each follows 60 runs, undisturbed LISTEN drivers 1,000; `FLOWGATE_FOLLOWERS` says how many each follows in
//! all crowds, and has it told what they met.
//!
//! One crowd at a time, on a cluster of their own that is started by the first: one of them restarts it.

use std::env;
use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use flowgate::embedded::{Cluster, ClusterOptions, connect};
use flowgate::schema::{self, InstallOptions};
use futures_util::future::{join, join_all, join3};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::Mutex;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::Client;
use uuid::Uuid;

use super::days::Driver;
use super::support::http::get;
use super::support::proxy::try_text;
use super::support::wait::wait_until;
use super::{Outcome, fetch};

/// What a run of one step tells.
pub(crate) const STORY: [&str; 4] = [
    "run:started",
    "step:started",
    "step:completed",
    "run:completed",
];
/// Connections of a follower, each with its share of the runs.
pub(crate) const SESSIONS: usize = 20;

const DRIVERS: [(&str, Driver); 7] = [
    ("node pg", Driver::Node("pg_followers.cjs")),
    ("postgres.js", Driver::Node("postgres_followers.cjs")),
    ("psycopg", Driver::Python("psycopg_followers.py")),
    ("asyncpg", Driver::Python("asyncpg_followers.py")),
    ("tokio-postgres", Driver::Tokio),
    (EVENT_SOURCE, Driver::Node("eventsource_followers.cjs")),
    (PGFLOW, Driver::Node("pgflow_followers.cjs")),
];
const EVENT_SOURCE: &str = "EventSource";
/// Starts its runs by itself.
const PGFLOW: &str = "@pgflow/client";
const KEY: &str = "sb_publishable_crowd";
/// How often something is done to them; a part of the runs ends after each.
const ROUNDS: usize = 4;
const WORKERS: usize = 3;
const PATIENCE: Duration = Duration::from_secs(300);
/// More than sockets hold, told to each slow reader.
const HEAVY_BYTES: usize = 6 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    Nothing,
    ListenerKilled,
    ProxyKilled,
    PrimaryRestarted,
    SlowReaders,
}

/// Whose pgflow there is in the database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Core {
    Ours,
    /// `@pgflow/core` from the npm registry, with `flowgate install --events-only` beside it.
    Upstreams,
}

fn asked() -> Option<usize> {
    let asked = env::var("FLOWGATE_FOLLOWERS").ok()?;
    Some(asked.parse().expect("a number of followers"))
}

/// The cluster is put back by a crowd that did well.
static TURN: Mutex<Option<Cluster>> = Mutex::const_new(None);

pub(crate) async fn crowd(fault: Fault, core: Core) -> Outcome {
    let mut commands = Vec::new();
    for (name, driver) in DRIVERS {
        match driver.command().await {
            Ok(command) => commands.push((name, command)),
            Err(reason) => return Outcome::Skipped(reason),
        }
        // And one that reads slowly.
        if fault == Fault::SlowReaders {
            commands.push((name, driver.command().await.unwrap()));
        }
    }
    let migrations = match fetch::node("node").await {
        Ok(packages) => packages.join("@pgflow/core/dist/supabase/migrations"),
        Err(reason) => return Outcome::Skipped(reason),
    };
    let mut turn = TURN.lock().await;
    let mut cluster = match turn.take() {
        Some(cluster) => cluster,
        None => Cluster::start(ClusterOptions {
            replicas: 0,
            settings: vec![("max_connections".to_owned(), "200".to_owned())],
            ..ClusterOptions::default()
        })
        .await
        .unwrap(),
    };
    let started = Instant::now();
    let url = database(&cluster, fault, core, &migrations).await;
    let proxy = Served::start(&url, fault).await;
    let told = gather(fault, &mut cluster, &url, proxy, commands).await;
    if asked().is_some() {
        println!("{core:?} {fault:?} in {:.1?}{told}", started.elapsed());
    }
    *turn = Some(cluster);
    Outcome::Passed
}

/// What the followers met, a line each.
async fn gather(
    fault: Fault,
    cluster: &mut Cluster,
    url: &str,
    mut proxy: Served,
    commands: Vec<(&'static str, Command)>,
) -> String {
    let few = runs_each();
    let listened = match fault {
        Fault::Nothing => asked().unwrap_or(1000),
        _ => few,
    };
    let runs = Runs {
        common: ids(listened),
        own: ids(few),
        slow: ids(slow_runs(fault)),
        slow_own: ids(slow_runs(fault)),
    };
    runs.note_heavy(&connect(url).await.unwrap()).await;
    let mut spawned = Vec::new();
    for (at, (name, mut command)) in commands.into_iter().enumerate() {
        let slow = fault == Fault::SlowReaders && at % 2 == 1;
        let followed = match (slow, name) {
            (false, PGFLOW) => &runs.own,
            (false, EVENT_SOURCE) => &runs.common[..few],
            (false, _) => &runs.common,
            (true, PGFLOW) => &runs.slow_own,
            (true, _) => &runs.slow,
        };
        let cut = matches!(fault, Fault::ProxyKilled | Fault::PrimaryRestarted);
        let command = command.env("FLOWGATE_CUT", u8::from(cut).to_string());
        spawned.push(Follower::spawn(name, slow, command, &proxy, followed));
    }
    join_all(spawned.iter_mut().map(Follower::ready)).await;
    join_all(spawned.iter_mut().map(Follower::begin)).await;
    // Their runs are started before anything happens: it is those who follow that are to lose nothing.
    for follower in spawned.iter_mut().filter(|one| one.name == PGFLOW) {
        assert_eq!(follower.line().await, "begun");
    }
    let (slow, quick): (Vec<_>, Vec<_>) = spawned.into_iter().partition(|one| one.slow);
    for follower in &slow {
        follower.signal(Signal::STOP);
    }

    let total = runs.all();
    let allowed = AtomicUsize::new(0);
    let killed = AtomicUsize::new(0);
    let faults = async {
        for round in 1..=ROUNDS {
            // In the middle of it: what this part tells is on its way.
            let part = total * round / ROUNDS;
            allowed.store(part, Ordering::Relaxed);
            match fault {
                Fault::Nothing | Fault::SlowReaders => {}
                Fault::ListenerKilled => {
                    wait_until("the next one is killed", PATIENCE, async || {
                        killed.load(Ordering::Relaxed) >= round
                    })
                    .await;
                }
                Fault::ProxyKilled => proxy.kill_and_restart().await,
                Fault::PrimaryRestarted => cluster.restart_primary().await.unwrap(),
            }
            done(url, part).await;
        }
    };
    let work = join_all((0..WORKERS).map(|_| work(url, &allowed, total)));
    let doing = join3(runs.start(url), faults, work);
    let hearing = join_all(quick.into_iter().map(Follower::verdict));
    let mut told = tokio::select! {
        (_, told) = join(doing, hearing) => told,
        never = kill_listeners(url, fault, &killed) => never,
    };
    for follower in &slow {
        follower.signal(Signal::CONT);
    }
    told.extend(join_all(slow.into_iter().map(Follower::verdict)).await);

    let mut note = String::new();
    match fault {
        Fault::Nothing => {
            for verdict in &told {
                verdict.listened_on();
            }
        }
        Fault::PrimaryRestarted => {}
        // Sockets hold a part; the rest waited in the outbox, for LISTEN drivers at least.
        Fault::SlowReaders => {
            let behind = proxy.metric("flowgate_event_behind_total").await;
            assert!(behind > 0, "no reader was slow enough");
            write!(note, "\n  fell behind {behind} times").unwrap();
        }
        // The last one may have gone when nobody was left to follow.
        Fault::ListenerKilled => {
            let lost = proxy.metric("flowgate_event_listener_lost_total").await;
            assert!(lost >= 3, "lost {lost} times");
        }
        Fault::ProxyKilled => {
            for verdict in &told {
                verdict.noticed();
            }
        }
    }
    told.iter().fold(note, |mut lines, verdict| {
        let slow = if verdict.slow { " (slow)" } else { "" };
        write!(lines, "\n  {}{slow}: {}", verdict.name, verdict.met).unwrap();
        lines
    })
}

fn runs_each() -> usize {
    asked().unwrap_or(60)
}

/// One in ten, but more than a queue holds; they are stopped until the others have heard all.
fn slow_runs(fault: Fault) -> usize {
    match fault {
        Fault::SlowReaders => (runs_each() / 10).max(16),
        _ => 0,
    }
}

// ---- the database ----

async fn database(
    cluster: &Cluster,
    fault: Fault,
    core: Core,
    migrations: &std::path::Path,
) -> String {
    let name = format!("crowd_{core:?}_{fault:?}").to_lowercase();
    let admin = cluster.connect_primary().await.unwrap();
    admin
        .batch_execute(&format!("create database {name}"))
        .await
        .unwrap();
    let server = cluster.primary_url();
    let url = format!("{}/{name}", server.strip_suffix("/postgres").unwrap());
    let place = url.parse().unwrap();
    schema::install(&place, InstallOptions::default())
        .await
        .unwrap();
    let client = connect(&url).await.unwrap();
    if core == Core::Upstreams {
        // pgmq stays.
        schema::uninstall(&place).await.unwrap();
        upstreams(&client, migrations).await;
        let options = InstallOptions {
            events_only: true,
            ..InstallOptions::default()
        };
        schema::install(&place, options).await.unwrap();
    }
    client
        .batch_execute(
            "do $$ begin create role crowd; exception when duplicate_object then null; end $$;
             select flowgate.grant_viewer('crowd');
             create table heavy (run_id uuid primary key);
             select pgflow.create_flow('greet'); select pgflow.add_step('greet', 'hello')",
        )
        .await
        .unwrap();
    url
}

/// Upstream's pgflow and a `realtime.send` as those who are not on Supabase write it.
async fn upstreams(client: &Client, migrations: &std::path::Path) {
    let stub = "create schema realtime; \
                create function realtime.send(payload jsonb, event text, topic text, private boolean default true) \
                returns void language plpgsql as $$ begin perform pg_notify(topic, payload::text); end $$";
    client.batch_execute(stub).await.unwrap();
    let mut files: Vec<_> = std::fs::read_dir(migrations)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    for file in files {
        // pgmq is there, though not as an extension.
        let text = std::fs::read_to_string(&file).unwrap();
        let lines = text
            .lines()
            .filter(|line| !line.to_ascii_lowercase().starts_with("create extension"));
        let text: String = lines.flat_map(|line| [line, "\n"]).collect();
        let applied = client.batch_execute(&text).await;
        applied.unwrap_or_else(|error| panic!("{}: {error:?}", file.display()));
        client.batch_execute("reset all").await.unwrap();
    }
}

// ---- the proxy ----

struct Served {
    primary: String,
    port: u16,
    http: SocketAddr,
    /// Events a subscriber may lag behind.
    queue: Option<usize>,
    process: Option<Child>,
}

impl Served {
    async fn start(primary: &str, fault: Fault) -> Self {
        // As much as a session that keeps up can be behind at worst.
        let share = runs_each().div_ceil(SESSIONS);
        let mut served = Self {
            primary: primary.to_owned(),
            port: port(),
            http: (Ipv4Addr::LOCALHOST, port()).into(),
            queue: (fault == Fault::SlowReaders).then_some((share * STORY.len() + 1).max(16)),
            process: None,
        };
        served.serve().await;
        served
    }

    async fn serve(&mut self) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_flowgate"));
        command
            .args(["serve", "--auth", "trust", "--log", "warn"])
            .args(["--primary", &self.primary])
            .args(["--listen", &format!("127.0.0.1:{}", self.port)])
            .args(["--http", &self.http.to_string()])
            .env("FLOWGATE_POOL__MAX_CLIENTS", "20000")
            .env("FLOWGATE_HTTP__MAX_CONNECTIONS", "20000")
            .env(
                "FLOWGATE_HTTP__API_KEYS",
                format!("[{{ key = \"{KEY}\", role = \"crowd\" }}]"),
            )
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .kill_on_drop(true);
        if let Some(queue) = self.queue {
            command.env("FLOWGATE_EVENTS__QUEUE", queue.to_string());
        }
        if asked().is_none() {
            command.stderr(Stdio::null());
        }
        self.process = Some(command.spawn().unwrap());
        wait_until("it serves", PATIENCE, async || {
            TcpStream::connect(self.http).await.is_ok()
                && get(self.http, "/readyz", &[]).await.status == 200
        })
        .await;
    }

    async fn kill_and_restart(&mut self) {
        let mut process = self.process.take().unwrap();
        process.kill().await.unwrap();
        self.serve().await;
    }

    async fn metric(&self, name: &str) -> u64 {
        let page = get(self.http, "/metrics", &[]).await.body;
        let value = page
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        value.map_or(0, |value| value.trim().parse().unwrap())
    }
}

/// Below those that connections are given: one of them could take it, or connect to itself, while nobody listens there.
fn port() -> u16 {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    loop {
        let at = std::process::id() as usize * 16 + NEXT.fetch_add(1, Ordering::Relaxed);
        let port = 20_000 + u16::try_from(at % 10_000).unwrap();
        if TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok() {
            return port;
        }
    }
}

// ---- the work ----

struct Runs {
    common: Vec<Uuid>,
    /// Of pgflow's client.
    own: Vec<Uuid>,
    slow: Vec<Uuid>,
    slow_own: Vec<Uuid>,
}

fn ids(count: usize) -> Vec<Uuid> {
    (0..count).map(|_| Uuid::new_v4()).collect()
}

fn array(runs: &[Uuid]) -> String {
    let ids: Vec<_> = runs.iter().map(Uuid::to_string).collect();
    format!("'{{{}}}'::uuid[]", ids.join(","))
}

impl Runs {
    fn all(&self) -> usize {
        self.common.len() + self.own.len() + self.slow.len() + self.slow_own.len()
    }

    /// What slow readers are told is large.
    async fn note_heavy(&self, direct: &Client) {
        for runs in [&self.slow, &self.slow_own] {
            let sql = format!("insert into heavy select unnest({})", array(runs));
            direct.batch_execute(&sql).await.unwrap();
        }
    }

    /// All at once, of those that nobody else starts.
    async fn start(&self, url: &str) {
        let runs = [self.common.as_slice(), &self.slow].concat();
        let lanes = runs.chunks(runs.len().div_ceil(8));
        let output = output("run");
        let ended = join_all(lanes.map(async |lane| {
            for some in lane.chunks(25) {
                let sql = format!(
                    "select count(*) from unnest({}) run, pgflow.start_flow('greet', {output}, run)
                     where not exists (select from pgflow.runs r where r.run_id = run)",
                    array(some)
                );
                insist(url, &sql).await;
            }
        }));
        timeout(PATIENCE, ended).await.expect("all are started");
    }
}

/// SQL for what the run `run` is given, or gives.
fn output(run: &str) -> String {
    let each = HEAVY_BYTES / slow_runs(Fault::SlowReaders);
    format!(
        "case when exists (select from heavy where run_id = {run}) then to_jsonb(repeat('f', {each})) else '\"hi\"' end"
    )
}

/// Until Postgres has done it, whatever becomes of that meanwhile.
async fn insist(url: &str, sql: &str) -> String {
    loop {
        if let Ok(client) = connect(url).await
            && let Ok(answer) = try_text(&client, sql).await
        {
            return answer;
        }
        sleep(Duration::from_millis(20)).await;
    }
}

const COMPLETED: &str = "select count(*) from pgflow.runs where status = 'completed'";

async fn done(url: &str, part: usize) {
    wait_until("a part of the runs has ended", PATIENCE, async || {
        insist(url, COMPLETED).await.parse::<usize>().unwrap() >= part
    })
    .await;
}

/// A worker past the proxy, until all runs have ended; no more of them than are allowed to. What it has begun is ended, or was
/// not begun, in the same transaction.
async fn work(url: &str, allowed: &AtomicUsize, total: usize) {
    let worker = Uuid::new_v4();
    let register = format!(
        "insert into pgflow.workers (worker_id, queue_name, function_name) values ('{worker}', 'greet', 'crowd')
         on conflict do nothing"
    );
    insist(url, &register).await;
    let output = output("t.run_id");
    let mut client = connect(url).await.ok();
    loop {
        let Some(connected) = &client else {
            sleep(Duration::from_millis(20)).await;
            client = connect(url).await.ok();
            continue;
        };
        let Ok(done) = try_text(connected, COMPLETED).await else {
            client = None;
            continue;
        };
        let done: usize = done.parse().unwrap();
        if done >= total {
            return;
        }
        let some = allowed.load(Ordering::Relaxed).saturating_sub(done).min(10);
        let sql = format!(
            "select count(*)
             from pgflow.start_tasks('greet', array(select msg_id from pgmq.read('greet', 60, {some})), '{worker}') t,
                pgflow.complete_task(t.run_id, t.step_slug, t.task_index, {output})"
        );
        let ended = if some == 0 {
            Ok("0".to_owned())
        } else {
            try_text(connected, &sql).await
        };
        match ended {
            Ok(ended) if ended == "0" => sleep(Duration::from_millis(20)).await,
            Ok(_) => {}
            Err(_lost) => client = None,
        }
    }
}

/// Every second, for good; never, if that is not the fault.
async fn kill_listeners<T>(url: &str, fault: Fault, killed: &AtomicUsize) -> T {
    loop {
        sleep(Duration::from_secs(1)).await;
        if fault == Fault::ListenerKilled {
            let sql = "select count(pg_terminate_backend(pid)) from pg_stat_activity
                       where application_name = 'flowgate events' and datname = current_database()";
            let count: usize = insist(url, sql).await.parse().unwrap();
            killed.fetch_add(count, Ordering::Relaxed);
        }
    }
}

// ---- those who follow ----

struct Follower {
    name: &'static str,
    slow: bool,
    runs: Vec<Uuid>,
    process: Child,
    to: ChildStdin,
    from: Lines<BufReader<ChildStdout>>,
    errors: JoinHandle<String>,
}

struct Verdict {
    name: &'static str,
    slow: bool,
    met: Value,
}

impl Verdict {
    /// Nothing happened to it: it was told over the connections it began with.
    fn listened_on(&self) {
        if self.name == EVENT_SOURCE || self.name == PGFLOW {
            return;
        }
        for what in ["reconnects", "gaps"] {
            assert_eq!(self.met[what], 0, "{}: {}", self.name, self.met);
        }
    }

    fn noticed(&self) {
        // pgflow's client connects again by itself and tells nobody; but then it is told everything again.
        let what = if self.name == PGFLOW {
            "repeats"
        } else {
            "reconnects"
        };
        assert!(
            self.met[what].as_u64() > Some(0),
            "{}: {}",
            self.name,
            self.met
        );
    }
}

impl Follower {
    fn spawn(
        name: &'static str,
        slow: bool,
        command: &mut Command,
        proxy: &Served,
        runs: &[Uuid],
    ) -> Self {
        let database = proxy.primary.rsplit('/').next().unwrap();
        let mut process = command
            .env(
                "FLOWGATE_URL",
                format!("postgres://postgres@127.0.0.1:{}/{database}", proxy.port),
            )
            .env("FLOWGATE_HTTP", format!("http://{}", proxy.http))
            .env("FLOWGATE_KEY", KEY)
            .env("FLOWGATE_PATIENCE", PATIENCE.as_secs().to_string())
            .env(
                "FLOWGATE_SESSIONS",
                if slow { 1 } else { SESSIONS }.to_string(),
            )
            .env("FLOWGATE_SLOW", u8::from(slow).to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let mut stderr = process.stderr.take().unwrap();
        let errors = tokio::spawn(async move {
            let mut errors = String::new();
            stderr.read_to_string(&mut errors).await.unwrap();
            errors
        });
        let to = process.stdin.take().unwrap();
        let from = BufReader::new(process.stdout.take().unwrap()).lines();
        Self {
            name,
            slow,
            runs: runs.to_vec(),
            process,
            to,
            from,
            errors,
        }
    }

    async fn say(&mut self, line: &str) {
        let line = format!("{line}\n");
        self.to.write_all(line.as_bytes()).await.unwrap();
    }

    /// The next line it says; with what it complained of, if there is none.
    async fn line(&mut self) -> String {
        let line = timeout(PATIENCE + Duration::from_secs(30), self.from.next_line()).await;
        match line {
            Ok(Ok(Some(line))) => line,
            Ok(_ended) => panic!(
                "{} has ended: {}",
                self.name,
                (&mut self.errors).await.unwrap()
            ),
            Err(_elapsed) => panic!("{} says nothing", self.name),
        }
    }

    async fn ready(&mut self) {
        let runs =
            serde_json::to_string(&self.runs.iter().map(Uuid::to_string).collect::<Vec<_>>());
        self.say(&runs.unwrap()).await;
        assert_eq!(self.line().await, "ready", "{}", self.name);
    }

    async fn begin(&mut self) {
        self.say("start").await;
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.process.id().unwrap()).unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
    }

    async fn verdict(mut self) -> Verdict {
        let line = self.line().await;
        let met: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(met["runs"], self.runs.len(), "{}", self.name);
        let least = self.runs.len() * STORY.len();
        // Of what pgflow's client missed it is told the outcome.
        if !(self.slow && self.name == PGFLOW) {
            let heard = met["events"].as_u64().unwrap() - met["repeats"].as_u64().unwrap();
            assert!(heard >= least as u64, "{}: {met}", self.name);
        }
        let Self { name, slow, .. } = self;
        Verdict { name, slow, met }
    }
}
