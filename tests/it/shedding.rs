//! Too much to do: what is worth more is served first, what is worth least is refused early and in words, and nobody else notices.

use flowgate::config::Config;

use crate::support::pg::fresh_database;
use crate::support::proxy::{PATIENCE, Proxy, row, text};
use crate::support::raw::{Raw, error_code, query, tags, transcript};
use crate::support::wait::wait_until;

fn one_server(config: &mut Config) {
    config.pool.size = 1.try_into().unwrap();
}

/// As `SHOW LIMITS` has it of the primary.
async fn queued(console: &tokio_postgres::Client, class: &str) -> String {
    row(console, "SHOW LIMITS", "class", class).await["queued"].clone()
}

#[tokio::test]
async fn work_already_paid_for_goes_first_and_reads_are_refused_in_words() {
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, one_server).await;
    let console = proxy.console().await;
    let direct = db.connect().await;
    direct
        .batch_execute("select pg_advisory_lock(42)")
        .await
        .unwrap();
    let mut reader = proxy.raw().await;
    let mut worker = proxy.raw().await;
    let holder = proxy.connect().await;
    holder.batch_execute("begin").await.unwrap();
    // More than a burst: whoever of them gets the server keeps it until `direct` lets go.
    let mut crowd: Vec<Raw> = Vec::new();
    for _ in 0..33 {
        let mut client = proxy.raw().await;
        client
            .send(&query("select pg_advisory_xact_lock(42)"))
            .await;
        crowd.push(client);
    }
    wait_until("they wait", PATIENCE, async || {
        queued(&console, "other").await == "33"
    })
    .await;

    let refused = reader
        .ask_frames(&query("select count(*) from pgflow.runs"))
        .await;
    assert_eq!(
        error_code(&refused).as_deref(),
        Some("53300"),
        "{}",
        transcript(&refused)
    );
    let detail = refused[0].field(b'D').unwrap();
    assert!(detail.starts_with("It is of class read"), "{detail}");
    assert_eq!(
        refused[0].field(b'H').as_deref(),
        Some("Retry after 1000 ms.")
    );
    assert_eq!(
        row(&console, "SHOW LIMITS", "class", "read").await["refused"],
        "1"
    );
    assert_eq!(proxy.metric("flowgate_shed_total{class=\"read\"}"), 1);

    worker
        .send(&query(
            "select * from pgflow.start_tasks('none', array[1]::bigint[], gen_random_uuid())",
        ))
        .await;
    wait_until("it waits", PATIENCE, async || {
        queued(&console, "progress").await == "1"
    })
    .await;
    holder.batch_execute("commit").await.unwrap();
    let first = worker.until_ready().await;
    assert!(tags(&first).ends_with("CZ"), "{}", transcript(&first));
    assert_eq!(queued(&console, "progress").await, "0");

    direct
        .batch_execute("select pg_advisory_unlock(42)")
        .await
        .unwrap();
    for client in &mut crowd {
        let answer = client.until_ready().await;
        assert!(tags(&answer).ends_with("CZ"), "{}", transcript(&answer));
    }
    let served = reader.ask_frames(&query("select 1")).await;
    assert_eq!(tags(&served), "TDCZ", "{}", transcript(&served));
    assert_eq!(text(&holder, "select 1").await, "1");
    proxy.shut_down().await;
}

/// Long transactions on a small pool are no overload, and neither is a pause.
#[tokio::test]
async fn a_short_queue_refuses_nobody() {
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, one_server).await;
    let console = proxy.console().await;
    let holder = proxy.connect().await;
    let mut readers = Vec::new();
    for _ in 0..32 {
        readers.push(proxy.raw().await);
    }
    holder.batch_execute("begin").await.unwrap();
    for client in &mut readers {
        client
            .send(&query("select count(*) from pgflow.runs"))
            .await;
    }
    wait_until("they wait", PATIENCE, async || {
        queued(&console, "read").await == "32"
    })
    .await;
    holder.batch_execute("commit").await.unwrap();
    for client in &mut readers {
        let answer = client.until_ready().await;
        assert_eq!(tags(&answer), "TDCZ", "{}", transcript(&answer));
    }
    assert_eq!(proxy.metric("flowgate_shed_total{class=\"read\"}"), 0);
    proxy.shut_down().await;
}
