//! More load than there is room for: `cargo bench --bench overload [-- SECONDS]`, 5 a cell if not named. Starts its own Postgres,
//! Flowgate and, where there is one, PgBouncer, both with a pool of 20. Workers (poll, start_tasks, complete_task), clients that start
//! runs and dashboards that read them, at 1×, 2×, 4× and 8× of what keeps the machine busy, each against every target in turn:
//! what becomes of complete_task, how reads are answered, and how soon all is well again when the load ends.

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
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};
use tokio_postgres::{AsyncMessage, Client, NoTls, SimpleQueryMessage};

const POOL: usize = 20;
/// Clients at 1×.
const WORKERS: usize = 4;
const STARTERS: usize = 2;
const DASHBOARDS: usize = 32;
/// A dashboard asks that often, as far as it is answered.
const EVERY: Duration = Duration::from_millis(50);
const MULTIPLES: [usize; 4] = [1, 2, 4, 8];
/// Runs that dashboards look at, each at its own.
const WATCHED: usize = 64;
/// Tasks that wait before each cell.
const BACKLOG: usize = 8_000;
const PATIENCE: Duration = Duration::from_secs(30);

fn main() -> anyhow::Result<()> {
    // `cargo bench` adds `--bench`.
    let seconds = env::args().skip(1).find(|word| word != "--bench");
    let seconds = seconds.map_or(Ok(5), |word| {
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
    let most = MULTIPLES[MULTIPLES.len() - 1] * (WORKERS + STARTERS + DASHBOARDS);
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
    let bouncer = pgbouncer(&primary).await?;
    let mut targets = vec![("direct", primary.clone())];
    targets.extend(bouncer.as_ref().map(|(_, url)| ("pgbouncer", url.clone())));
    targets.push(("flowgate", through));
    targets.push(("flowgate, max_stale_ms = 5000", older));

    println!(
        "| load | target | complete_task/s | p50 ms | p99 ms | reads/s | of these old | refused/s | refusal p99 ms | read p99 ms | well again ms | lost |"
    );
    println!("|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|");
    for multiple in MULTIPLES {
        for (name, url) in &targets {
            backlog(&admin).await?;
            let cell = one(url, multiple, length, &runs).await?;
            println!("| {multiple}× | {name} | {cell} |");
        }
    }
    Ok(())
}

/// So many runs, by their ids.
async fn start(client: &Client, count: usize) -> anyhow::Result<Vec<String>> {
    let sql = format!(
        "select (pgflow.start_flow('bench', '{{}}')).run_id from generate_series(1, {count})"
    );
    let rows = client.simple_query(&sql).await?;
    Ok(column(&rows, 0))
}

async fn backlog(admin: &Client) -> anyhow::Result<()> {
    let rows = admin
        .simple_query("select count(*) from pgmq.q_bench")
        .await?;
    let waiting: usize = column(&rows, 0)[0].parse()?;
    if waiting < BACKLOG {
        start(admin, BACKLOG - waiting).await?;
    }
    // The ones left behind by the cell before are to be had again.
    for sql in [
        "update pgmq.q_bench set vt = now()",
        "vacuum analyze pgmq.q_bench",
        "vacuum analyze pgflow.step_tasks",
        "checkpoint",
    ] {
        admin.batch_execute(sql).await?;
    }
    Ok(())
}

/// What a client saw, one line each.
enum Seen {
    Completed(Duration),
    Read(Duration),
    Refused(Duration),
    Lost(String),
}

async fn one(
    url: &str,
    multiple: usize,
    length: Duration,
    runs: &[String],
) -> anyhow::Result<String> {
    let probe = connect(url).await?;
    let quiet = probe_once(&probe.client, 20).await?;
    let stop = Arc::new(AtomicBool::new(false));
    let old = Arc::new(AtomicU64::new(0));
    let (tell, mut heard) = mpsc::channel(1 << 16);
    let mut clients = JoinSet::new();
    for _ in 0..WORKERS * multiple {
        let (client, stop, tell) = (connect(url).await?, Arc::clone(&stop), tell.clone());
        clients.spawn(async move { noted(work(&client.client, &stop, &tell).await, &tell).await });
    }
    for _ in 0..STARTERS * multiple {
        let (client, stop, tell) = (connect(url).await?, Arc::clone(&stop), tell.clone());
        clients.spawn(async move { noted(begin(&client.client, &stop).await, &tell).await });
    }
    for at in 0..DASHBOARDS * multiple {
        let (client, stop, tell) = (connect(url).await?, Arc::clone(&stop), tell.clone());
        let (run, old) = (runs[at % runs.len()].clone(), Arc::clone(&old));
        clients.spawn(async move {
            noted(look(&client, &run, &stop, &tell).await, &tell).await;
            old.fetch_add(client.notices.load(Ordering::Relaxed), Ordering::Relaxed);
        });
    }
    drop(tell);
    let gather = tokio::spawn(async move {
        let (mut completed, mut reads, mut refused) = (Vec::new(), Vec::new(), Vec::new());
        let mut lost = Vec::new();
        while let Some(seen) = heard.recv().await {
            match seen {
                Seen::Completed(took) => completed.push(took),
                Seen::Read(took) => reads.push(took),
                Seen::Refused(took) => refused.push(took),
                Seen::Lost(why) => lost.push(why),
            }
        }
        (completed, reads, refused, lost)
    });
    let began = Instant::now();
    sleep(length).await;
    let seconds = began.elapsed().as_secs_f64();
    stop.store(true, Ordering::Relaxed);
    let ended = Instant::now();
    // Well again: as quick as before, ten times in a row.
    let mut in_row = 0;
    let mut since = Duration::ZERO;
    while in_row < 10 && ended.elapsed() < PATIENCE {
        let asked = ended.elapsed();
        if probe_once(&probe.client, 1).await? <= quiet * 2 + Duration::from_millis(2) {
            since = if in_row == 0 { asked } else { since };
            in_row += 1;
        } else {
            in_row = 0;
        }
    }
    while let Some(joined) = clients.join_next().await {
        joined?;
    }
    let (completed, reads, refused, lost) = gather.await?;
    for why in lost.iter().collect::<HashSet<_>>() {
        eprintln!("{multiple}×: {why}");
    }
    let per_second = |what: &[Duration]| what.len() as f64 / seconds;
    Ok(format!(
        "{:.0} | {} | {} | {:.0} | {:.0} % | {:.0} | {} | {} | {:.0} | {}",
        per_second(&completed),
        at(&completed, 0.5),
        at(&completed, 0.99),
        per_second(&reads),
        old.load(Ordering::Relaxed) as f64 / reads.len().max(1) as f64 * 100.0,
        per_second(&refused),
        at(&refused, 0.99),
        at(&reads, 0.99),
        since.as_secs_f64() * 1000.0,
        lost.len()
    ))
}

/// Milliseconds.
fn at(what: &[Duration], share: f64) -> String {
    let mut sorted = what.to_vec();
    sorted.sort();
    let place = (sorted.len().saturating_sub(1) as f64 * share) as usize;
    sorted.get(place).map_or("–".to_owned(), |took| {
        format!("{:.1}", took.as_secs_f64() * 1000.0)
    })
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

async fn noted(done: anyhow::Result<()>, tell: &mpsc::Sender<Seen>) {
    if let Err(error) = done {
        // Nobody listens any more when the cell is over.
        drop(tell.send(Seen::Lost(format!("{error:#}"))).await);
    }
}

/// A worker: polls, starts what it got, completes it.
async fn work(client: &Client, stop: &AtomicBool, tell: &mpsc::Sender<Seen>) -> anyhow::Result<()> {
    let register = "insert into pgflow.workers (queue_name, worker_id, function_name)
                    values ('bench', gen_random_uuid(), 'bench') returning worker_id";
    let worker = column(&client.simple_query(register).await?, 0).remove(0);
    while !stop.load(Ordering::Relaxed) {
        let poll = "select msg_id from pgmq.read_with_poll('bench', 60, 5, 1, 50)";
        let messages = column(&client.simple_query(poll).await?, 0).join(",");
        if messages.is_empty() {
            continue;
        }
        let start = format!(
            "select run_id, task_index from pgflow.start_tasks('bench', array[{messages}]::bigint[], '{worker}')"
        );
        let rows = client.simple_query(&start).await?;
        for (run, index) in column(&rows, 0).iter().zip(column(&rows, 1)) {
            let complete = format!("select pgflow.complete_task('{run}', 'one', {index}, '{{}}')");
            let began = Instant::now();
            client.simple_query(&complete).await?;
            tell.send(Seen::Completed(began.elapsed())).await?;
        }
    }
    Ok(())
}

/// Starts runs.
async fn begin(client: &Client, stop: &AtomicBool) -> anyhow::Result<()> {
    while !stop.load(Ordering::Relaxed) {
        client
            .simple_query("select pgflow.start_flow('bench', '{}')")
            .await?;
        sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

/// A dashboard: one run's state, and the list of the latest.
async fn look(
    client: &Connected,
    run: &str,
    stop: &AtomicBool,
    tell: &mpsc::Sender<Seen>,
) -> anyhow::Result<()> {
    let reads = [
        format!("select pgflow.get_run_with_states('{run}')"),
        "select run_id, status from pgflow.runs order by started_at desc limit 20".to_owned(),
    ];
    for read in reads.iter().cycle() {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let began = Instant::now();
        match client.client.simple_query(read).await {
            Ok(_) => tell.send(Seen::Read(began.elapsed())).await?,
            Err(error) if error.code().is_some_and(|code| code.code() == "53300") => {
                tell.send(Seen::Refused(began.elapsed())).await?;
            }
            Err(error) => return Err(error.into()),
        }
        sleep(EVERY.saturating_sub(began.elapsed())).await;
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
