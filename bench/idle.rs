//! What idle workers cost: `cargo bench --bench idle [-- WORKERS…]`, 200 and 1,000 if none are named. Starts its own Postgres, Flowgate
//! with a pool of 5 servers and, where there is one, PgBouncer with one for each worker and a few more: with fewer, workers wait for
//! each other's polls. So many workers poll one queue (2 s, every 100 ms) first in
//! vain, then with a message now and then, sent through the same door: statements and scans of the queue that reach Postgres, its
//! CPU and connections, and how long a message waits for a worker. Targets one after another, in one run.

#[path = "support/cpu.rs"]
mod cpu;
#[path = "support/doors.rs"]
mod doors;

use std::env;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use cpu::cpu_of_cluster;
use doors::{connect, pgbouncer, serve};
use flowgate::embedded::{Cluster, ClusterOptions};
use flowgate::schema::{self, InstallOptions};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tokio_postgres::{Client, SimpleQueryMessage};

const POLL: &str = "select msg_id from pgmq.read_with_poll('work', 600, 1, 2, 100)";
const SEND: &str = "select pgmq.send('work', '{}')";
const POOL: &str = "5";
/// Longer than PgBouncer keeps an idle server here.
const SETTLING: Duration = Duration::from_secs(9);
/// Polls in vain are watched for so long.
const IDLE: Duration = Duration::from_secs(10);
const MESSAGES: usize = 100;
const PATIENCE: Duration = Duration::from_secs(30);

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
        counts = vec![200, 1000];
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
    let clients = [("FLOWGATE_POOL__MAX_CLIENTS", "5000")];
    let (_flowgate, through) = serve(&primary, &["--pool-size", POOL], &clients).await?;
    let postmaster = cluster.primary_pid().context("a postmaster")?;
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
            let line = one(&observer, postmaster, url, count).await?;
            println!("| {count} | {name} | {line} |");
        }
    }
    Ok(())
}

async fn one(
    observer: &Client,
    postmaster: u32,
    url: &str,
    count: usize,
) -> anyhow::Result<String> {
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
    // All have polled once, and PgBouncer has closed the servers of its turn: one that ends between two looks is counted twice.
    sleep(SETTLING).await;
    let before = Reading::take(observer, postmaster).await?;
    let began = Instant::now();
    sleep(IDLE).await;
    let seconds = began.elapsed().as_secs_f64();
    let after = Reading::take(observer, postmaster).await?;

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
    async fn take(observer: &Client, postmaster: u32) -> anyhow::Result<Self> {
        // Backends tell what they did at the end of a transaction, and not more than once a second.
        let sql = "select (select xact_commit + xact_rollback from pg_stat_database where datname = current_database())::float8,
                          (select seq_scan + coalesce(idx_scan, 0) from pg_stat_all_tables where relid = 'pgmq.q_work'::regclass)::float8,
                          (select count(*) from pg_stat_activity where datname = current_database() and backend_type = 'client backend'
                           and pid <> pg_backend_pid() and application_name not like 'flowgate%')";
        let row = observer.query_one(sql, &[]).await?;
        Ok(Self {
            transactions: row.get(0),
            scans: row.get(1),
            connections: row.get(2),
            cpu: cpu_of_cluster(postmaster)?,
        })
    }
}
