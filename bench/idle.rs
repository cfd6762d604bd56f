//! What idle workers cost: `cargo bench --bench idle [-- WORKERS…]`, 200 if none are named. Starts its own Postgres, Flowgate
//! with a pool of 5 servers and, where there is one, PgBouncer with one for each worker and a few more: with fewer, workers wait for
//! each other's polls. So many workers poll one queue (2 s, every 100 ms) first in
//! vain, then with a message now and then, sent through the same door: statements and scans of the queue that reach Postgres, its
//! CPU and connections, and how long a message waits for a worker. Targets one after another, in one run.

use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, bail};
use flowgate::embedded::{Cluster, ClusterOptions};
use flowgate::schema::{self, InstallOptions};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::{Client, NoTls, SimpleQueryMessage};

const POLL: &str = "select msg_id from pgmq.read_with_poll('work', 600, 1, 2, 100)";
const SEND: &str = "select pgmq.send('work', '{}')";
const POOL: &str = "5";
/// Polls in vain are watched for so long.
const IDLE: Duration = Duration::from_secs(10);
const MESSAGES: usize = 100;
const PATIENCE: Duration = Duration::from_secs(30);
/// `USER_HZ`: what /proc counts CPU time in.
const TICKS: f64 = 100.0;

fn main() -> anyhow::Result<()> {
    // `cargo bench` adds `--bench`.
    let counts = env::args().skip(1).filter(|word| word != "--bench");
    let mut counts = counts
        .map(|word| {
            word.parse()
                .with_context(|| format!("`{word}` is no number of workers"))
        })
        .collect::<anyhow::Result<Vec<usize>>>()?;
    if counts.is_empty() {
        counts = vec![200];
    }
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(measure(&counts))
}

async fn measure(counts: &[usize]) -> anyhow::Result<()> {
    let most = counts.iter().max().context("no workers")?;
    let cluster = Cluster::start(ClusterOptions {
        settings: vec![("max_connections".to_owned(), (2 * most + 100).to_string())],
        ..ClusterOptions::default()
    })
    .await?;
    let primary = cluster.primary_url();
    schema::install(&primary.parse()?, InstallOptions::default()).await?;
    let observer = connect(&primary).await?;
    observer.batch_execute("select pgmq.create('work')").await?;
    let (_flowgate, through) = serve(&primary).await?;
    let bouncer = pgbouncer(&primary, most + 20).await?;
    let mut targets = vec![("direct", primary.clone())];
    targets.extend(bouncer.as_ref().map(|(_, url)| ("pgbouncer", url.clone())));
    targets.push(("flowgate", through));

    println!(
        "| workers | target | transactions/s | scans/s | CPU of Postgres % | its connections | sent → read p50 ms | p99 ms |"
    );
    println!("|---:|---|---:|---:|---:|---:|---:|---:|");
    for &count in counts {
        for (name, url) in &targets {
            let line = one(&observer, url, count).await?;
            println!("| {count} | {name} | {line} |");
        }
    }
    Ok(())
}

async fn one(observer: &Client, url: &str, count: usize) -> anyhow::Result<String> {
    let stop = Arc::new(AtomicBool::new(false));
    let (tell, mut heard) = mpsc::channel(MESSAGES * 2);
    let mut workers = Vec::new();
    for _ in 0..count {
        let client = connect(url).await?;
        let (stop, tell) = (Arc::clone(&stop), tell.clone());
        workers.push(tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                for message in client.simple_query(POLL).await? {
                    if let SimpleQueryMessage::Row(row) = message {
                        let id = row.get(0).context("an id")?.to_owned();
                        tell.send((id, Instant::now())).await?;
                    }
                }
            }
            anyhow::Ok(())
        }));
    }
    // All have polled once.
    sleep(Duration::from_secs(3)).await;
    let before = Reading::take(observer).await?;
    let began = Instant::now();
    sleep(IDLE).await;
    let seconds = began.elapsed().as_secs_f64();
    let after = Reading::take(observer).await?;

    let sender = connect(url).await?;
    let mut waits = Vec::with_capacity(MESSAGES);
    for _ in 0..MESSAGES {
        let sent = Instant::now();
        sender.simple_query(SEND).await?;
        let (_, at) = timeout(PATIENCE, heard.recv())
            .await
            .context("nobody reads")?
            .context("the workers are gone")?;
        waits.push((at - sent).as_secs_f64() * 1000.0);
        sleep(Duration::from_millis(20)).await;
    }
    stop.store(true, Ordering::Relaxed);
    for worker in workers {
        worker.await??;
    }
    waits.sort_by(f64::total_cmp);
    let at = |share: f64| waits[((waits.len() - 1) as f64 * share) as usize];
    let per_second = |of: fn(&Reading) -> f64| (of(&after) - of(&before)) / seconds;
    Ok(format!(
        "{:.1} | {:.1} | {:.1} | {} | {:.1} | {:.1}",
        // The readings themselves are one.
        per_second(|reading| reading.transactions),
        per_second(|reading| reading.scans),
        per_second(|reading| reading.cpu) * 100.0,
        after.connections,
        at(0.5),
        at(0.99)
    ))
}

/// What Postgres has done so far.
struct Reading {
    transactions: f64,
    scans: f64,
    /// Seconds, of all its processes.
    cpu: f64,
    connections: i64,
}

impl Reading {
    async fn take(observer: &Client) -> anyhow::Result<Self> {
        // Backends tell what they did at the end of a transaction, and not more than once a second.
        let sql = "select (select xact_commit + xact_rollback from pg_stat_database where datname = current_database())::float8,
                          (select seq_scan + coalesce(idx_scan, 0) from pg_stat_all_tables where relid = 'pgmq.q_work'::regclass)::float8,
                          (select count(*) from pg_stat_activity where datname = current_database() and backend_type = 'client backend'
                           and pid <> pg_backend_pid() and application_name not like 'flowgate%'),
                          pg_backend_pid()";
        let row = observer.query_one(sql, &[]).await?;
        let me: i32 = row.get(3);
        Ok(Self {
            transactions: row.get(0),
            scans: row.get(1),
            connections: row.get(2),
            cpu: cpu_of_cluster(me)?,
        })
    }
}

/// User and system time of the postmaster's children, those that have ended included.
fn cpu_of_cluster(backend: i32) -> anyhow::Result<f64> {
    let postmaster = stat(backend)?.parent;
    let mut ticks = stat(postmaster)?.of_the_dead;
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = name.to_str().and_then(|name| name.parse().ok()) else {
            continue;
        };
        // It may end while we look.
        if let Ok(stat) = stat(pid)
            && stat.parent == postmaster
        {
            ticks += stat.own;
        }
    }
    Ok(ticks / TICKS)
}

struct Stat {
    parent: i32,
    own: f64,
    of_the_dead: f64,
}

fn stat(pid: i32) -> anyhow::Result<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = text.rsplit_once(") ").context("a process")?;
    let fields: Vec<_> = fields.split(' ').collect();
    let number = |at: usize| -> anyhow::Result<f64> { Ok(fields[at].parse()?) };
    Ok(Stat {
        parent: fields[1].parse()?,
        own: number(11)? + number(12)?,
        of_the_dead: number(13)? + number(14)?,
    })
}

async fn connect(url: &str) -> anyhow::Result<Client> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
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

async fn serve(primary: &str) -> anyhow::Result<(Child, String)> {
    let free = TcpListener::bind("127.0.0.1:0").await?.local_addr()?;
    let proxy = Command::new(env!("CARGO_BIN_EXE_flowgate"))
        .args(["serve", "--auth", "trust", "--http", "off", "--pool-size"])
        .args([POOL, "--log", "warn", "--primary", primary])
        .args(["--listen", &free.to_string()])
        .env("FLOWGATE_POOL__MAX_CLIENTS", "5000")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let through = elsewhere(primary, &free.to_string())?;
    answers(&through, "flowgate").await?;
    Ok((proxy, through))
}

/// `None`: this machine has none.
async fn pgbouncer(primary: &str, pool: usize) -> anyhow::Result<Option<(Child, String)>> {
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
    let file = PathBuf::from(format!("/tmp/flowgate-bench-idle-{}.ini", free.port()));
    fs::write(
        &file,
        format!(
            "[databases]\n{database} = host={host} port={port} user={user}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
             listen_port = {}\nunix_socket_dir =\nauth_type = any\npool_mode = transaction\ndefault_pool_size = {pool}\nserver_idle_timeout = 5\n\
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
