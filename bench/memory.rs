//! Memory of idle clients: `cargo bench --bench memory [-- CLIENTS]`, 10,000 if no number is given. Starts its own Postgres,
//! Flowgate and, where there is one, PgBouncer; so many clients log in, run one statement and stay. What a client holds is
//! what the proxy's resident memory has grown by, divided by them; then they leave, the next come, and leave.

#[path = "support/doors.rs"]
mod doors;

use std::env;
use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, ensure};
use doors::{connect, pgbouncer, serve};
use flowgate::config::ConnectUrl;
use flowgate::embedded::{Cluster, ClusterOptions};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::process::Child;
use tokio::task::spawn_blocking;
use tokio::time::sleep;

const CLIENTS: usize = 10_000;
/// Before those who count: whatever the first clients of all need is there.
const FIRST: usize = 100;
const ROUNDS: usize = 2;
/// Until all has been done that those who came or left make necessary.
const SETTLES: Duration = Duration::from_secs(15);
const FILES_BESIDE: u64 = 500;

fn main() -> anyhow::Result<()> {
    // `cargo bench` adds `--bench`.
    let mut count = env::args().skip(1).filter(|word| word != "--bench");
    let count = match count.next() {
        Some(word) => word
            .parse()
            .with_context(|| format!("`{word}` is no number of clients"))?,
        None => CLIENTS,
    };
    let maximum = getrlimit(Resource::Nofile).maximum;
    let needed = u64::try_from(count)? + FILES_BESIDE;
    ensure!(
        maximum.is_none_or(|maximum| maximum >= needed),
        "{needed} open files are needed: ulimit -n"
    );
    // Ours, and as much for whom we start.
    let limit = Rlimit {
        current: maximum,
        maximum,
    };
    setrlimit(Resource::Nofile, limit)?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(measure(count))
}

async fn measure(count: usize) -> anyhow::Result<()> {
    let cluster = Cluster::start(ClusterOptions {
        replicas: 0,
        ..ClusterOptions::default()
    })
    .await?;
    let primary = cluster.primary_url();
    let clients = [("FLOWGATE_POOL__MAX_CLIENTS", "15000")];
    let mut doors = vec![(
        "flowgate",
        serve(&primary, &["--pool-size", "5"], &clients).await?,
    )];
    doors.extend(
        pgbouncer(&primary, 5)
            .await?
            .map(|door| ("pgbouncer", door)),
    );
    println!(
        "| proxy | clients | bytes a client | resident MB before | with them | after they left |"
    );
    println!("|---|---:|---:|---:|---:|---:|");
    for (name, (proxy, url)) in &doors {
        let address: ConnectUrl = url.parse()?;
        crowd(&address, FIRST).await?;
        for _ in 0..ROUNDS {
            sleep(SETTLES).await;
            let before = resident(proxy)?;
            let clients = crowd(&address, count).await?;
            sleep(SETTLES).await;
            let with = resident(proxy)?;
            // They are clients still.
            drop(connect(url).await?);
            drop(clients);
            sleep(SETTLES).await;
            let after = resident(proxy)?;
            let each = with.saturating_sub(before) * 1024 / count;
            let [before, with, after] = [before, with, after].map(|kb| kb as f64 / 1024.0);
            println!("| {name} | {count} | {each} | {before:.1} | {with:.1} | {after:.1} |");
        }
    }
    Ok(())
}

async fn crowd(address: &ConnectUrl, count: usize) -> anyhow::Result<Vec<TcpStream>> {
    let (port, mut startup) = (address.port, vec![0, 3, 0, 0]);
    for word in ["user", &address.user, "database", &address.database, ""] {
        startup.extend_from_slice(word.as_bytes());
        startup.push(0);
    }
    let startup = message(None, &startup)?;
    let query = message(Some(b'Q'), b"select 1\0")?;
    spawn_blocking(move || {
        let log_in = |_| {
            let mut client = TcpStream::connect(("127.0.0.1", port))?;
            client.set_nodelay(true)?;
            ask(&mut client, &startup)?;
            ask(&mut client, &query)?;
            Ok(client)
        };
        (0..count).map(log_in).collect()
    })
    .await?
}

fn message(tag: Option<u8>, body: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut message: Vec<u8> = tag.into_iter().collect();
    message.extend_from_slice(&u32::try_from(body.len() + 4)?.to_be_bytes());
    message.extend_from_slice(body);
    Ok(message)
}

/// Sends, and reads up to ReadyForQuery.
fn ask(client: &mut TcpStream, bytes: &[u8]) -> anyhow::Result<()> {
    client.write_all(bytes)?;
    let (mut heard, mut buffer) = (Vec::new(), [0; 2048]);
    while !heard.ends_with(b"Z\0\0\0\x05I") {
        let read = client.read(&mut buffer)?;
        ensure!(read > 0, "refused: {}", String::from_utf8_lossy(&heard));
        heard.extend_from_slice(&buffer[..read]);
    }
    Ok(())
}

/// In kB.
fn resident(process: &Child) -> anyhow::Result<usize> {
    let pid = process.id().context("it runs")?;
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kb = line.and_then(|line| line.split_whitespace().next());
    Ok(kb.context("a size")?.parse()?)
}
