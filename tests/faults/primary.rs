//! The primary stops, crashes and comes back.

use std::time::Duration;

use tokio::time::{Instant, timeout};
use tokio_postgres::AsyncMessage;

use crate::cluster;
use crate::support::proxy::{PATIENCE, Proxy, sqlstate, text, try_text};
use crate::support::raw::{error_code, query, transcript};
use crate::support::wait::wait_until;

#[tokio::test]
async fn a_restart_is_survived_by_idle_clients_and_told_to_busy_ones() {
    for crash in [false, true] {
        let mut cluster = cluster(0).await;
        let proxy = Proxy::before(&cluster.primary_url(), &[], |config| {
            config.pool.connect_timeout = Duration::from_secs(2)
        })
        .await;
        let idle = proxy.connect().await;
        idle.batch_execute("set work_mem = '3MB'").await.unwrap();
        let statement = idle.prepare("select $1::int4 + 1").await.unwrap();
        let (follower, mut hearing) = proxy.connect_hearing().await;
        follower
            .batch_execute("listen \"pgflow:flow:greet\"")
            .await
            .unwrap();
        let mut busy = proxy.raw().await;
        busy.send(&query("select pg_sleep(70)")).await;
        let direct = cluster.connect_primary().await.unwrap();
        let sleeping = "select count(*) from pg_stat_activity where state = 'active' and query = 'select pg_sleep(70)'";
        wait_until("it sleeps", PATIENCE, async || {
            text(&direct, sleeping).await == "1"
        })
        .await;
        let mut open = proxy.raw().await;
        open.query("begin").await;

        if crash {
            cluster.kill_primary().await.unwrap();
        } else {
            cluster.stop_primary().await.unwrap();
        }
        for raw in [&mut busy, &mut open] {
            let frames = raw.until_end().await;
            let code = error_code(&frames).unwrap_or_default();
            assert!(
                ["57P01", "57P02", "08006"].contains(&code.as_str()),
                "crash {crash}: {}",
                transcript(&frames)
            );
        }
        // While it is down: refused at once, and the connection stays.
        for _ in 0..3 {
            let started = Instant::now();
            assert_eq!(
                sqlstate(try_text(&idle, "select 1").await),
                "57P03",
                "crash {crash}"
            );
            assert!(
                started.elapsed() < Duration::from_secs(6),
                "crash {crash}: {:?}",
                started.elapsed()
            );
        }
        cluster.start_primary().await.unwrap();
        wait_until("service resumes", PATIENCE, async || {
            try_text(&idle, "select 'back'").await.is_ok()
        })
        .await;
        assert_eq!(text(&idle, "show work_mem").await, "3MB", "crash {crash}");
        assert_eq!(
            idle.query_one(&statement, &[&41])
                .await
                .unwrap()
                .get::<_, i32>(0),
            42
        );

        // Followers of runs hear what happened while nobody listened upstream, and what comes.
        let run = text(&idle, "select run_id from pgflow.start_flow('greet', '{}')").await;
        let event = timeout(PATIENCE, hearing.notification()).await.unwrap();
        assert!(
            event.payload().contains(&run) && event.payload().contains("run:started"),
            "{event:?}"
        );
        proxy.shut_down().await;
        cluster.stop().await.unwrap();
    }
}

#[tokio::test]
async fn ordinary_listeners_are_cut_off_when_the_primary_goes() {
    let mut cluster = cluster(0).await;
    let proxy = Proxy::before(&cluster.primary_url(), &[], |_| {}).await;
    let (client, mut hearing) = proxy.connect_hearing().await;
    client.batch_execute("listen plain").await.unwrap();
    cluster.restart_primary().await.unwrap();
    let end = loop {
        match hearing.next().await {
            Some(Ok(AsyncMessage::Notice(_))) => {}
            other => break other,
        }
    };
    let Some(Err(error)) = end else {
        panic!("expected the end, not {end:?}")
    };
    assert_eq!(
        error.code().map(|code| code.code().to_owned()).as_deref(),
        Some("57P01"),
        "{error:?}"
    );
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn logins_fail_in_words_while_the_primary_is_down_from_the_start() {
    let mut cluster = cluster(0).await;
    let url = cluster.primary_url();
    cluster.stop_primary().await.unwrap();
    let proxy = Proxy::before(&url, &[], |config| {
        config.pool.connect_timeout = Duration::from_secs(2)
    })
    .await;
    let refused = crate::support::proxy::try_connect(&proxy.url()).await;
    assert_eq!(sqlstate(refused.map(drop)), "57P03");
    cluster.start_primary().await.unwrap();
    wait_until("logins work", PATIENCE, async || {
        crate::support::proxy::try_connect(&proxy.url())
            .await
            .is_ok()
    })
    .await;
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}
