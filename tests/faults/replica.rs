//! The replica lags, dies and comes back: reads are never wrong, and never wait for it long.

use std::time::Duration;

use tokio::time::Instant;
use tokio_postgres::Client;

use crate::cluster;
use crate::support::proxy::{PATIENCE, Proxy, text, try_text};
use crate::support::wait::wait_until;

async fn start(client: &Client) -> String {
    text(
        client,
        "select run_id from pgflow.start_flow('greet', '{}')",
    )
    .await
}

fn state(run: &str) -> String {
    format!("select pgflow.get_run_with_states('{run}')->'run'->>'status'")
}

/// Until a read of `run` is answered by the replica.
async fn replica_serves(proxy: &Proxy, client: &Client, run: &str) {
    wait_until("the replica serves", PATIENCE, async || {
        let before = proxy.requests("replica");
        drop(try_text(client, &state(run)).await);
        proxy.requests("replica") > before
    })
    .await;
}

#[tokio::test]
async fn a_replica_two_seconds_late_never_shows_an_old_state() {
    let cluster = cluster(1).await;
    cluster
        .set_replica_delay(0, Duration::from_secs(2))
        .await
        .unwrap();
    let proxy = Proxy::before(&cluster.primary_url(), &[&cluster.replica_url(0)], |_| {}).await;
    let (writer, reader) = (proxy.connect().await, proxy.connect().await);
    let old = start(&writer).await;
    for pair in 0..1_000 {
        let run = start(&writer).await;
        // Each read by one of the two: what a client wrote, and what another wrote to this run.
        let client = if pair % 2 == 0 { &writer } else { &reader };
        assert_eq!(text(client, &state(&run)).await, "started", "pair {pair}");
        if pair % 100 == 0 {
            let ours: i64 = text(&writer, "select count(*) from pgflow.runs")
                .await
                .parse()
                .unwrap();
            assert_eq!(ours, pair + 2, "pair {pair}");
        }
    }
    // It was not merely left out: what is old enough it may answer.
    replica_serves(&proxy, &reader, &old).await;
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn a_replica_killed_or_stopped_is_replaced_by_the_primary_and_comes_back() {
    let mut cluster = cluster(1).await;
    let proxy = Proxy::before(&cluster.primary_url(), &[&cluster.replica_url(0)], |_| {}).await;
    let client = proxy.connect().await;
    let run = start(&client).await;
    for crash in [true, false] {
        replica_serves(&proxy, &client, &run).await;
        if crash {
            cluster.kill_replica(0).await.unwrap();
        } else {
            cluster.stop_replica(0).await.unwrap();
        }
        for read in 0..200 {
            let started = Instant::now();
            assert_eq!(
                text(&client, &state(&run)).await,
                "started",
                "crash {crash}, read {read}"
            );
            assert!(
                started.elapsed() < Duration::from_secs(8),
                "crash {crash}: {:?}",
                started.elapsed()
            );
        }
        let newer = start(&client).await;
        assert_eq!(text(&client, &state(&newer)).await, "started");
        cluster.start_replica(0).await.unwrap();
    }
    replica_serves(&proxy, &client, &run).await;
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn reads_under_load_survive_the_replicas_death_without_one_error() {
    let mut cluster = cluster(1).await;
    let proxy = Proxy::before(&cluster.primary_url(), &[&cluster.replica_url(0)], |_| {}).await;
    let run = start(&proxy.connect().await).await;
    replica_serves(&proxy, &proxy.connect().await, &run).await;
    let (url, sql) = (proxy.url(), state(&run));
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let readers: Vec<_> = (0..8)
        .map(|_| {
            let (url, sql, stopped) = (url.clone(), sql.clone(), stopped.clone());
            tokio::spawn(async move {
                let client = crate::support::proxy::connect(&url).await;
                let mut reads = 0;
                while !*stopped.borrow() {
                    assert_eq!(text(&client, &sql).await, "started");
                    reads += 1;
                }
                reads
            })
        })
        .collect();
    cluster.kill_replica(0).await.unwrap();
    cluster.start_replica(0).await.unwrap();
    stop.send_replace(true);
    for reader in readers {
        assert!(reader.await.unwrap() > 0);
    }
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}
