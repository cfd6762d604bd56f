//! More load than there is room for: `cargo bench --bench overload [-- SECONDS]`, 4 a phase if not named. Starts its own Postgres,
//! Flowgate (as it comes, with older answers allowed, with `shed.adaptive`) and, where there is one, PgBouncer, all with a pool of 20. First it measures what
//! Postgres can do with as many clients, who work, start runs and read as fast as they are answered. Then 1×, 2×, 4× and 8× of that is
//! asked of each target: more clients, each at its own pace, all of them connected before the first of them asks. Of each class: what
//! was answered, how fast, what was refused, and how late; and how soon all is well again when the load ends.

use std::collections::HashSet;
use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use flowgate::embedded::{Cluster, ClusterOptions};
use flowgate::schema::{self, InstallOptions};
use futures_util::future::poll_fn;
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::sync::{Barrier, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::{AsyncMessage, Client, NoTls, SimpleQueryMessage};

const POOL: usize = 20;
/// Clients at 1×.
const CROWD: Crowd = Crowd {
    workers: 4,
    starters: 2,
    dashboards: 32,
};
/// Clients that measure what can be done: as many as a pool has servers.
const MEASURING: Crowd = Crowd {
    dashboards: POOL - CROWD.workers - CROWD.starters,
    ..CROWD
};
const MULTIPLES: [usize; 4] = [1, 2, 4, 8];
/// Runs that dashboards look at, each at its own.
const WATCHED: usize = 64;
/// Tasks that wait while it is measured what can be done.
const BACKLOG: usize = 4_000;
const PATIENCE: Duration = Duration::from_secs(30);
/// One request may take that long.
const ANSWER_MAX: Duration = Duration::from_secs(60);

#[derive(Clone, Copy)]
struct Crowd {
    workers: usize,
    starters: usize,
    dashboards: usize,
}

/// How often a client asks; no more often than it is answered.
#[derive(Clone, Copy, Default)]
struct Paces {
    complete: Duration,
    start: Duration,
    read: Duration,
}

/// What clients ask for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Complete,
    Start,
    Read,
}

impl Class {
    const ALL: [Self; 3] = [Self::Complete, Self::Start, Self::Read];

    fn name(self) -> &'static str {
        match self {
            Self::Complete => "complete_task",
            Self::Start => "start_flow",
            Self::Read => "read",
        }
    }
}

/// What became of one class in one phase.
#[derive(Default)]
struct Outcome {
    answered: Vec<Duration>,
    refused: Vec<Duration>,
}

struct Phase {
    seconds: f64,
    classes: [Outcome; Class::ALL.len()],
    /// Reads answered from memory under load.
    older: u64,
    dropped: Vec<String>,
    well_again: Duration,
}

impl Phase {
    fn rate(&self, class: Class) -> f64 {
        self.classes[class as usize].answered.len() as f64 / self.seconds
    }
}

fn main() -> anyhow::Result<()> {
    // `cargo bench` adds `--bench`.
    let seconds = env::args().skip(1).find(|word| word != "--bench");
    let seconds = seconds.map_or(Ok(4), |word| {
        word.parse()
            .with_context(|| format!("`{word}` is no number of seconds"))
    })?;
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()?
        .block_on(measure(Duration::from_secs(seconds)))
}

async fn measure(length: Duration) -> anyhow::Result<()> {
    let most = MULTIPLES[MULTIPLES.len() - 1];
    let most = most * (CROWD.workers + CROWD.starters + CROWD.dashboards);
    let cluster = Cluster::start(ClusterOptions {
        settings: vec![("max_connections".to_owned(), (most + 100).to_string())],
        ..ClusterOptions::default()
    })
    .await?;
    let primary = cluster.primary_url();
    schema::install(&primary.parse()?, InstallOptions::default()).await?;
    let admin = connect(&primary).await?.client;
    admin
        .batch_execute("select pgflow.create_flow('bench'); select pgflow.add_step('bench', 'one')")
        .await?;
    let runs = start(&admin, WATCHED).await?;
    let (_flowgate, through) = serve(&primary, &[]).await?;
    let keeping = [
        ("FLOWGATE_SHED__MAX_STALE_MS", "5000"),
        ("FLOWGATE_CACHE__MAX_AGE_MS", "0"),
    ];
    let (_staling, older) = serve(&primary, &keeping).await?;
    let adapting = [("FLOWGATE_SHED__ADAPTIVE", "true")];
    let (_adapting, adaptive) = serve(&primary, &adapting).await?;
    let bouncer = pgbouncer(&primary).await?;
    let mut targets = vec![("direct", primary.clone())];
    targets.extend(bouncer.as_ref().map(|(_, url)| ("pgbouncer", url.clone())));
    targets.push(("flowgate", through));
    targets.push(("flowgate, max_stale_ms = 5000", older));
    targets.push(("flowgate, adaptive", adaptive));

    backlog(&admin, BACKLOG).await?;
    let capacity = one(&primary, MEASURING, Paces::default(), length, &runs).await?;
    let [complete, started, read] = Class::ALL.map(|class| capacity.rate(class));
    if complete == 0.0 || started == 0.0 || read == 0.0 {
        bail!("nothing was done in {length:?}: {:?}", capacity.dropped);
    }
    println!(
        "capacity with {POOL} clients: {complete:.0} complete_task/s, {started:.0} start_flow/s, {read:.0} reads/s\n"
    );
    let pace = |clients: usize, rate: f64| Duration::from_secs_f64(clients as f64 / rate);
    let paces = Paces {
        complete: pace(CROWD.workers, complete),
        start: pace(CROWD.starters, started),
        read: pace(CROWD.dashboards, read),
    };
    // More than can be completed in a phase.
    let tasks = (complete * length.as_secs_f64() * 1.5) as usize + 1_000;

    println!(
        "| target | load | class | answered/s | p50 ms | p99 ms | refused/s | refusal p99 ms | from memory |"
    );
    println!("|---|---:|---|---:|---:|---:|---:|---:|---:|");
    let mut summary = Vec::new();
    for (name, url) in &targets {
        let mut peak = None;
        for multiple in MULTIPLES {
            backlog(&admin, tasks).await?;
            let crowd = Crowd {
                workers: CROWD.workers * multiple,
                starters: CROWD.starters * multiple,
                dashboards: CROWD.dashboards * multiple,
            };
            let phase = one(url, crowd, paces, length, &runs).await?;
            for why in phase.dropped.iter().collect::<HashSet<_>>() {
                eprintln!("{name}, {multiple}×: {why}");
            }
            for class in Class::ALL {
                println!(
                    "| {name} | {multiple}× | {} | {} |",
                    class.name(),
                    phase.row(class)
                );
            }
            let completed = &phase.classes[Class::Complete as usize].answered;
            let here = (phase.rate(Class::Complete), millis(completed, 0.99));
            let (rate, late) = *peak.get_or_insert(here);
            summary.push(format!(
                "| {name} | {multiple}× | {:.0} % | {:.1}× | {:.0} | {} |",
                here.0 / rate * 100.0,
                here.1.unwrap_or(f64::NAN) / late.unwrap_or(f64::NAN),
                phase.well_again.as_secs_f64() * 1000.0,
                phase.dropped.len()
            ));
        }
    }
    println!(
        "\n| target | load | complete_task/s, of 1× | its p99, of 1× | well again after ms | connections dropped |"
    );
    println!("|---|---:|---:|---:|---:|---:|");
    summary.iter().for_each(|row| println!("{row}"));
    Ok(())
}

impl Phase {
    fn row(&self, class: Class) -> String {
        let Outcome { answered, refused } = &self.classes[class as usize];
        let older = match class {
            Class::Read => {
                let share = self.older as f64 / answered.len().max(1) as f64;
                format!("{:.0} %", share * 100.0)
            }
            Class::Complete | Class::Start => String::new(),
        };
        format!(
            "{:.0} | {} | {} | {:.0} | {} | {older}",
            self.rate(class),
            spelled(millis(answered, 0.5)),
            spelled(millis(answered, 0.99)),
            refused.len() as f64 / self.seconds,
            spelled(millis(refused, 0.99)),
        )
    }
}

/// So many runs, by their ids.
async fn start(client: &Client, count: usize) -> anyhow::Result<Vec<String>> {
    let sql = format!(
        "select (pgflow.start_flow('bench', '{{}}')).run_id from generate_series(1, {count})"
    );
    let rows = client.simple_query(&sql).await?;
    Ok(column(&rows, 0))
}

/// So many tasks wait, those left behind by the phase before among them.
async fn backlog(admin: &Client, tasks: usize) -> anyhow::Result<()> {
    let rows = admin
        .simple_query("select count(*) from pgmq.q_bench")
        .await?;
    let waiting: usize = column(&rows, 0)[0].parse()?;
    if waiting < tasks {
        start(admin, tasks - waiting).await?;
    }
    // Tasks that were started and not completed are to be had again.
    for sql in [
        "update pgflow.step_tasks set status = 'queued', started_at = null, last_worker_id = null where status = 'started'",
        "update pgmq.q_bench set vt = now()",
        "vacuum analyze pgmq.q_bench",
        "vacuum analyze pgflow.step_tasks",
        "checkpoint",
    ] {
        admin.batch_execute(sql).await?;
    }
    Ok(())
}

/// What a client saw: how long something took.
enum Seen {
    Answered(Class, Duration),
    Refused(Class, Duration),
    Dropped(String),
}

/// What all clients of a phase share.
struct Scene {
    begin: Barrier,
    stop: AtomicBool,
    tell: mpsc::Sender<Seen>,
    paces: Paces,
    /// Reads answered from memory under load.
    older: AtomicU64,
}

async fn one(
    url: &str,
    crowd: Crowd,
    paces: Paces,
    length: Duration,
    runs: &[String],
) -> anyhow::Result<Phase> {
    let probe = connect(url).await?;
    let quiet = probe_once(&probe.client, 20).await?;
    let all = crowd.workers + crowd.starters + crowd.dashboards;
    let mut connected = Vec::with_capacity(all);
    for _ in 0..all {
        connected.push(connect(url).await?);
    }
    let (tell, mut heard) = mpsc::channel(1 << 16);
    let scene = Arc::new(Scene {
        begin: Barrier::new(all + 1),
        stop: AtomicBool::new(false),
        tell,
        paces,
        older: AtomicU64::new(0),
    });
    let mut clients = JoinSet::new();
    for (at, client) in connected.into_iter().enumerate() {
        let scene = Arc::clone(&scene);
        let run = runs[at % runs.len()].clone();
        clients.spawn(async move {
            let done = if at < crowd.workers {
                work(&client.client, &scene).await
            } else if at < crowd.workers + crowd.starters {
                begin(&client.client, &scene).await
            } else {
                look(&client, &run, &scene).await
            };
            if let Err(error) = done {
                // Nobody listens any more when the phase is over.
                drop(scene.tell.send(Seen::Dropped(format!("{error:#}"))).await);
            }
        });
    }
    let gather = tokio::spawn(async move {
        let (mut classes, mut dropped) = (Default::default(), Vec::new());
        while let Some(seen) = heard.recv().await {
            let classes: &mut [Outcome; Class::ALL.len()] = &mut classes;
            match seen {
                Seen::Answered(class, took) => classes[class as usize].answered.push(took),
                Seen::Refused(class, took) => classes[class as usize].refused.push(took),
                Seen::Dropped(why) => dropped.push(why),
            }
        }
        (classes, dropped)
    });
    // Everybody is connected.
    scene.begin.wait().await;
    let began = Instant::now();
    sleep(length).await;
    let seconds = began.elapsed().as_secs_f64();
    scene.stop.store(true, Ordering::Relaxed);
    let ended = Instant::now();
    // Well again: as quick as before, ten times in a row.
    let mut in_row = 0;
    let mut well_again = Duration::ZERO;
    while in_row < 10 && ended.elapsed() < PATIENCE {
        let asked = ended.elapsed();
        if probe_once(&probe.client, 1).await? <= quiet * 2 + Duration::from_millis(2) {
            well_again = if in_row == 0 { asked } else { well_again };
            in_row += 1;
        } else {
            in_row = 0;
        }
    }
    if in_row < 10 {
        well_again = PATIENCE;
    }
    while let Some(joined) = clients.join_next().await {
        joined?;
    }
    let older = scene.older.load(Ordering::Relaxed);
    drop(scene);
    let (classes, dropped) = gather.await?;
    Ok(Phase {
        seconds,
        classes,
        older,
        dropped,
        well_again,
    })
}

/// `None`: there are none.
fn millis(what: &[Duration], share: f64) -> Option<f64> {
    let mut sorted = what.to_vec();
    sorted.sort();
    let place = (sorted.len().saturating_sub(1) as f64 * share) as usize;
    sorted.get(place).map(|took| took.as_secs_f64() * 1000.0)
}

fn spelled(millis: Option<f64>) -> String {
    millis.map_or("–".to_owned(), |millis| format!("{millis:.1}"))
}

/// The median of some starts.
async fn probe_once(client: &Client, times: usize) -> anyhow::Result<Duration> {
    let mut took = Vec::with_capacity(times);
    for _ in 0..times {
        let began = Instant::now();
        client
            .simple_query("select pgflow.start_flow('bench', '{}')")
            .await?;
        took.push(began.elapsed());
    }
    took.sort();
    Ok(took[times / 2])
}

impl Scene {
    fn goes_on(&self) -> bool {
        !self.stop.load(Ordering::Relaxed)
    }

    /// Asks, and tells what came of it; then waits for the next time. `None`: refused.
    async fn ask(
        &self,
        client: &Client,
        class: Class,
        sql: &str,
    ) -> anyhow::Result<Option<Vec<SimpleQueryMessage>>> {
        let pace = match class {
            Class::Complete => self.paces.complete,
            Class::Start => self.paces.start,
            Class::Read => self.paces.read,
        };
        let began = Instant::now();
        let asked = timeout(ANSWER_MAX, client.simple_query(sql));
        let (seen, rows) = match asked.await.context("no answer at all")? {
            Ok(rows) => (Seen::Answered(class, began.elapsed()), Some(rows)),
            Err(error) if is_refusal(&error) => (Seen::Refused(class, began.elapsed()), None),
            Err(error) => return Err(error.into()),
        };
        // What comes after the end is not this load's.
        if self.goes_on() {
            self.tell.send(seen).await?;
            sleep(pace.saturating_sub(began.elapsed())).await;
        }
        Ok(rows)
    }
}

fn is_refusal(error: &tokio_postgres::Error) -> bool {
    error.code().is_some_and(|code| code.code() == "53300")
}

/// A worker: polls, starts what it got, completes it.
async fn work(client: &Client, scene: &Scene) -> anyhow::Result<()> {
    let register = "insert into pgflow.workers (queue_name, worker_id, function_name)
                    values ('bench', gen_random_uuid(), 'bench') returning worker_id";
    let registered = client.simple_query(register).await;
    scene.begin.wait().await;
    let worker = column(&registered?, 0).remove(0);
    while scene.goes_on() {
        let poll = "select msg_id from pgmq.read_with_poll('bench', 60, 5, 1, 50)";
        let messages = match client.simple_query(poll).await {
            Ok(rows) => column(&rows, 0).join(","),
            Err(error) if is_refusal(&error) => continue,
            Err(error) => return Err(error.into()),
        };
        if messages.is_empty() {
            continue;
        }
        let start = format!(
            "select run_id, task_index from pgflow.start_tasks('bench', array[{messages}]::bigint[], '{worker}')"
        );
        let rows = match client.simple_query(&start).await {
            Ok(rows) => rows,
            Err(error) if is_refusal(&error) => continue,
            Err(error) => return Err(error.into()),
        };
        for (run, index) in column(&rows, 0).iter().zip(column(&rows, 1)) {
            let complete = format!("select pgflow.complete_task('{run}', 'one', {index}, '{{}}')");
            scene.ask(client, Class::Complete, &complete).await?;
            if !scene.goes_on() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Starts runs.
async fn begin(client: &Client, scene: &Scene) -> anyhow::Result<()> {
    scene.begin.wait().await;
    while scene.goes_on() {
        let sql = "select pgflow.start_flow('bench', '{}')";
        scene.ask(client, Class::Start, sql).await?;
    }
    Ok(())
}

/// A dashboard: one run's state, and the list of the latest.
async fn look(client: &Connected, run: &str, scene: &Scene) -> anyhow::Result<()> {
    let reads = [
        format!("select pgflow.get_run_with_states('{run}')"),
        "select run_id, status from pgflow.runs order by started_at desc limit 20".to_owned(),
    ];
    scene.begin.wait().await;
    for read in reads.iter().cycle() {
        if !scene.goes_on() {
            break;
        }
        let before = client.notices.load(Ordering::Relaxed);
        scene.ask(&client.client, Class::Read, read).await?;
        if scene.goes_on() && client.notices.load(Ordering::Relaxed) > before {
            scene.older.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}

struct Connected {
    client: Client,
    /// Answers from memory come with one.
    notices: Arc<AtomicU64>,
}

async fn connect(url: &str) -> anyhow::Result<Connected> {
    let (client, mut connection) = tokio_postgres::connect(url, NoTls).await?;
    let notices = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&notices);
    tokio::spawn(async move {
        while let Some(Ok(message)) = poll_fn(|cx| connection.poll_message(cx)).await {
            if matches!(&message, AsyncMessage::Notice(notice) if notice.message().ends_with("old"))
            {
                counted.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    Ok(Connected { client, notices })
}

fn column(rows: &[SimpleQueryMessage], at: usize) -> Vec<String> {
    let rows = rows.iter().filter_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(at).map(str::to_owned),
        _ => None,
    });
    rows.collect()
}

/// `url` with another host and port.
fn elsewhere(url: &str, address: &str) -> anyhow::Result<String> {
    let (_, behind) = url.rsplit_once('@').context("a URL with a user")?;
    let (server, _) = behind.split_once('/').context("a URL with a database")?;
    Ok(url.replace(server, address))
}

async fn answers(url: &str, who: &str) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while tokio_postgres::connect(url, NoTls).await.is_err() {
        if Instant::now() > deadline {
            bail!("{who} does not answer");
        }
        sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

async fn serve(primary: &str, env: &[(&str, &str)]) -> anyhow::Result<(Child, String)> {
    let free = TcpListener::bind("127.0.0.1:0").await?.local_addr()?;
    let proxy = Command::new(env!("CARGO_BIN_EXE_flowgate"))
        .args(["serve", "--auth", "trust", "--http", "off", "--pool-size"])
        .arg(POOL.to_string())
        .args(["--log", "warn", "--primary", primary])
        .args(["--listen", &free.to_string()])
        .envs(env.iter().copied())
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let through = elsewhere(primary, &free.to_string())?;
    answers(&through, "flowgate").await?;
    Ok((proxy, through))
}

/// `None`: this machine has none.
async fn pgbouncer(primary: &str) -> anyhow::Result<Option<(Child, String)>> {
    let places = ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer"];
    let Some(binary) = places
        .into_iter()
        .find(|place| fs::exists(place).is_ok_and(|is| is))
    else {
        eprintln!("no pgbouncer: it is left out");
        return Ok(None);
    };
    let free = TcpListener::bind("127.0.0.1:0").await?.local_addr()?;
    let (_, behind) = primary.rsplit_once('@').context("a URL with a user")?;
    let (server, database) = behind.split_once('/').context("a URL with a database")?;
    let (host, port) = server.split_once(':').context("a port")?;
    let user = primary
        .trim_start_matches("postgres://")
        .split(['@', ':'])
        .next()
        .context("a user")?;
    let file = PathBuf::from(format!("/tmp/flowgate-bench-overload-{}.ini", free.port()));
    fs::write(
        &file,
        format!(
            "[databases]\n{database} = host={host} port={port} user={user}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
             listen_port = {}\nunix_socket_dir =\nauth_type = any\npool_mode = transaction\ndefault_pool_size = {POOL}\n\
             max_client_conn = 5000\nquery_wait_timeout = 0\n",
            free.port()
        ),
    )?;
    let child = Command::new(binary)
        .args(["-q", "-u", "postgres"])
        .arg(&file)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let url = elsewhere(primary, &free.to_string())?;
    answers(&url, "pgbouncer").await?;
    fs::remove_file(&file)?;
    Ok(Some((child, url)))
}
