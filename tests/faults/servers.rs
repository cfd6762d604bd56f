//! One server connection dies, or none is to be had.

use std::time::Duration;

use tokio::time::Instant;

use crate::cluster;
use crate::support::proxy::{PATIENCE, Proxy, connect, sqlstate, text, try_text};
use crate::support::raw::{error_code, query, tags, transcript};
use crate::support::wait::wait_until;

/// Ends every server of the pools, and waits until they are gone.
const PIDS: &str = "select pg_terminate_backend(pid, 5000) from pg_stat_activity where backend_type = 'client backend' and pid <> pg_backend_pid() and application_name not like 'flowgate%'";

#[tokio::test]
async fn a_server_killed_is_felt_only_by_who_was_using_it() {
    let cluster = cluster(0).await;
    let proxy = Proxy::before(&cluster.primary_url(), &[], |config| {
        config.pool.size = 2.try_into().unwrap()
    })
    .await;
    let direct = cluster.connect_primary().await.unwrap();
    let client = proxy.connect().await;
    // Idle: nobody notices.
    for round in 0..20 {
        assert_eq!(
            text(&client, &format!("select {round}")).await,
            round.to_string()
        );
        text(&direct, PIDS).await;
    }
    // Its settings come along to the next one.
    client.batch_execute("set work_mem = '3MB'").await.unwrap();
    text(&direct, PIDS).await;
    assert_eq!(text(&client, "show work_mem").await, "3MB");
    let statement = client.prepare("select $1::int4").await.unwrap();
    text(&direct, PIDS).await;
    assert_eq!(
        client
            .query_one(&statement, &[&5])
            .await
            .unwrap()
            .get::<_, i32>(0),
        5
    );

    // Mid-query: Postgres's own last words.
    let mut raw = proxy.raw().await;
    raw.send(&query("select pg_sleep(50)")).await;
    let sleeping = "select count(*) from pg_stat_activity where state = 'active' and query = 'select pg_sleep(50)'";
    wait_until("it sleeps", PATIENCE, async || {
        text(&direct, sleeping).await == "1"
    })
    .await;
    text(&direct, PIDS).await;
    let frames = raw.until_end().await;
    assert_eq!(
        (tags(&frames).as_str(), error_code(&frames).as_deref()),
        ("TE", Some("57P01")),
        "{}",
        transcript(&frames)
    );
    // Mid-transaction: told, not silently begun anew.
    let mut raw = proxy.raw().await;
    raw.query("begin; create table half (n int)").await;
    text(&direct, PIDS).await;
    let frames = raw.until_end().await;
    assert_eq!(
        error_code(&frames).as_deref(),
        Some("57P01"),
        "{}",
        transcript(&frames)
    );
    assert_eq!(text(&client, "select to_regclass('half')").await, "null");
    // Killed without a word.
    let mut raw = proxy.raw().await;
    raw.send(&query("select pg_backend_pid(), pg_sleep(51)"))
        .await;
    wait_until("it sleeps", PATIENCE, async || {
        text(
            &direct,
            &sleeping.replace(
                "select pg_sleep(50)",
                "select pg_backend_pid(), pg_sleep(51)",
            ),
        )
        .await
            == "1"
    })
    .await;
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn a_full_pool_refuses_in_time_and_the_connection_stays_usable() {
    let cluster = cluster(0).await;
    let proxy = Proxy::before(&cluster.primary_url(), &[], |config| {
        config.pool.size = 1.try_into().unwrap();
        config.pool.checkout_timeout = Duration::from_millis(300);
    })
    .await;
    let (holder, waiting) = (proxy.connect().await, proxy.connect().await);
    let mut raw = proxy.raw().await;
    holder.batch_execute("begin").await.unwrap();
    let started = Instant::now();
    let refused = sqlstate(try_text(&waiting, "select 1").await);
    assert_eq!(refused, "53300");
    assert!(started.elapsed() < Duration::from_secs(5));
    // By message: the error, then all up to the Sync is skipped.
    raw.send(&crate::support::raw::extended("select 1", &[]))
        .await;
    let frames = raw.until_ready().await;
    assert_eq!(
        (tags(&frames).as_str(), error_code(&frames).as_deref()),
        ("EZ", Some("53300"))
    );
    holder.batch_execute("commit").await.unwrap();
    assert_eq!(text(&waiting, "select 'served'").await, "served");
    assert!(raw.query("select 'served'").await.contains("D served"));
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn a_database_out_of_connections_is_passed_on() {
    let cluster = cluster(0).await;
    let admin = cluster.connect_primary().await.unwrap();
    admin
        .batch_execute("create role few login connection limit 1")
        .await
        .unwrap();
    let proxy = Proxy::before(&cluster.primary_url(), &[], |_| {}).await;
    let url = format!("postgres://few@127.0.0.1:{}/postgres", proxy.port);
    let first = connect(&url).await;
    first.batch_execute("begin").await.unwrap();
    let second = crate::support::proxy::try_connect(&url).await;
    if let Ok(second) = second {
        assert_eq!(sqlstate(try_text(&second, "select 1").await), "53300");
        first.batch_execute("commit").await.unwrap();
        assert_eq!(text(&second, "select 1").await, "1");
    }
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}
