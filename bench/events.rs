//! Commit → subscriber latency: `cargo bench --bench events [-- LISTENERS…]`, 1 and 100 if none are named. Starts its own
//! Postgres and the proxy; one writer, connected to Postgres itself, commits one event every few milliseconds; every
//! listener must get every event, in order. Three ways, interleaved: `NOTIFY` to sessions of Postgres, the same to sessions
//! of the proxy, a run's events (`realtime.send`, outbox, wake-up, hub) to sessions of the proxy.

use std::env;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use flowgate::embedded::{Cluster, ClusterOptions};
use flowgate::schema::{self, InstallOptions};
use futures_util::{StreamExt, stream};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_postgres::{AsyncMessage, Client, NoTls};

const ROUNDS: usize = 3;
const EVENTS: usize = 300;
/// Between two commits: nothing queues.
const EVERY: Duration = Duration::from_millis(5);
const PATIENCE: Duration = Duration::from_secs(30);
const RUN: &str = "pgflow:run:67e55044-10b1-426f-9247-bb680e5fe0c8";

#[derive(Clone, Copy)]
enum Way {
    Direct,
    Notify,
    Outbox,
}

const WAYS: [(Way, &str); 3] = [
    (Way::Direct, "NOTIFY, direct"),
    (Way::Notify, "NOTIFY, through flowgate"),
    (Way::Outbox, "run events, through flowgate"),
];

/// One way's latencies in µs.
#[derive(Default)]
struct Latencies {
    /// From sending the statement.
    sent: Vec<u128>,
    /// From the writer's knowing that it is committed; 0 where the listener knew first.
    committed: Vec<u128>,
}

fn main() -> anyhow::Result<()> {
    // `cargo bench` adds `--bench`.
    let counts = env::args().skip(1).filter(|word| word != "--bench");
    let mut counts = counts
        .map(|word| {
            word.parse()
                .with_context(|| format!("`{word}` is no number of listeners"))
        })
        .collect::<anyhow::Result<Vec<usize>>>()?;
    if counts.is_empty() {
        counts = vec![1, 100];
    }
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(measure(&counts))
}

async fn measure(counts: &[usize]) -> anyhow::Result<()> {
    let most = counts.iter().max().context("nobody listens")?;
    let cluster = Cluster::start(ClusterOptions {
        settings: vec![("max_connections".to_owned(), (most + 50).to_string())],
        ..ClusterOptions::default()
    })
    .await?;
    let primary = cluster.primary_url();
    schema::install(&primary.parse()?, InstallOptions::default()).await?;
    let (proxy, through) = serve(&primary).await?;

    println!("| listeners | way | sent → heard p50 | p99 | committed → heard p50 | p99 |");
    println!("|---:|---|---:|---:|---:|---:|");
    for &count in counts {
        let mut all: [Latencies; 3] = Default::default();
        for _ in 0..ROUNDS {
            for ((way, _), latencies) in WAYS.into_iter().zip(&mut all) {
                round(way, count, &primary, &through, latencies).await?;
            }
        }
        for ((_, name), mut latencies) in WAYS.into_iter().zip(all) {
            let [sent, committed] = [&mut latencies.sent, &mut latencies.committed].map(|all| {
                all.sort_unstable();
                [all[all.len() / 2], all[all.len() * 99 / 100]]
            });
            println!(
                "| {count} | {name} | {} | {} | {} | {} |",
                sent[0], sent[1], committed[0], committed[1]
            );
        }
    }
    println!(
        "\nµs; {ROUNDS} interleaved rounds of {EVENTS} events, one every {EVERY:?}; every listener got every event, in order."
    );
    drop(proxy);
    cluster.stop().await?;
    Ok(())
}

async fn round(
    way: Way,
    count: usize,
    primary: &str,
    through: &str,
    latencies: &mut Latencies,
) -> anyhow::Result<()> {
    let (channel, write) = match way {
        Way::Direct | Way::Notify => ("bench", "select pg_notify('bench', $1)".to_owned()),
        Way::Outbox => (
            RUN,
            format!("select realtime.send($1::text::jsonb, 'bench', '{RUN}', false)"),
        ),
    };
    let url = match way {
        Way::Direct => primary,
        Way::Notify | Way::Outbox => through,
    };
    let (tell, mut heard) = mpsc::channel(EVENTS * count);
    let mut listeners = Vec::with_capacity(count);
    for listener in 0..count {
        listeners.push(listen(url, channel, listener, tell.clone()).await?);
    }
    let (writer, connection) = tokio_postgres::connect(primary, NoTls).await?;
    tokio::spawn(connection);
    let write = writer.prepare(&write).await?;

    let mut times = Vec::with_capacity(EVENTS);
    let mut ticks = interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for number in 0..EVENTS {
        ticks.tick().await;
        let sent = Instant::now();
        writer
            .execute(&write, &[&format!(r#"{{"n": {number}}}"#)])
            .await?;
        times.push((sent, Instant::now()));
    }
    let mut next = vec![0; count];
    for _ in 0..EVENTS * count {
        let (listener, number, at): (usize, usize, Instant) = timeout(PATIENCE, heard.recv())
            .await
            .context("an event is missing")?
            .context("the listeners are gone")?;
        ensure!(
            next[listener] == number,
            "listener {listener} expected {}, heard {number}",
            next[listener]
        );
        next[listener] += 1;
        let (sent, committed) = times[number];
        latencies.sent.push((at - sent).as_micros());
        latencies
            .committed
            .push(at.saturating_duration_since(committed).as_micros());
    }
    Ok(())
}

/// A session that listens, and tells when it heard what. Ends with its client.
async fn listen(
    url: &str,
    channel: &str,
    listener: usize,
    tell: mpsc::Sender<(usize, usize, Instant)>,
) -> anyhow::Result<Client> {
    let (client, mut connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(async move {
        let mut messages = stream::poll_fn(move |cx| connection.poll_message(cx));
        while let Some(Ok(message)) = messages.next().await {
            let AsyncMessage::Notification(event) = message else {
                continue;
            };
            let at = Instant::now();
            let payload: serde_json::Value = serde_json::from_str(event.payload())?;
            let number = payload["n"].as_u64().context("no number")?;
            tell.send((listener, usize::try_from(number)?, at)).await?;
        }
        anyhow::Ok(())
    });
    client
        .batch_execute(&format!("listen \"{channel}\""))
        .await?;
    Ok(client)
}

/// The proxy in front of `primary`, and its URL.
async fn serve(primary: &str) -> anyhow::Result<(Child, String)> {
    let free = TcpListener::bind("127.0.0.1:0").await?.local_addr()?;
    let proxy = Command::new(env!("CARGO_BIN_EXE_flowgate"))
        .args(["serve", "--auth", "trust", "--http", "off"])
        .args(["--log", "warn", "--primary", primary])
        .args(["--listen", &free.to_string()])
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let (_, behind) = primary.rsplit_once('@').context("a URL with a user")?;
    let (server, _) = behind.split_once('/').context("a URL with a database")?;
    let through = primary.replace(server, &free.to_string());
    let deadline = Instant::now() + PATIENCE;
    while tokio_postgres::connect(&through, NoTls).await.is_err() {
        if Instant::now() > deadline {
            bail!("the proxy does not answer at {free}");
        }
        tokio::task::yield_now().await;
    }
    Ok((proxy, through))
}
