//! Polls that wait for work wait in the proxy: answered as Postgres would, at next to no cost, and no message is lost or
//! handed to two.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, timeout};

use crate::support::pg::{TestDb, fresh_database};
use crate::support::proxy::{PATIENCE, Proxy, text};
use crate::support::raw::{
    Raw, bind_text, describe_portal, describe_statement, error_code, execute, extended,
    first_columns, flush, parse, query, sync, tags, terminate, transcript,
};
use crate::support::wait::wait_until;

async fn with_queue() -> TestDb {
    let db = fresh_database().await;
    let direct = db.connect().await;
    direct
        .batch_execute("select pgmq.create('work')")
        .await
        .unwrap();
    db
}

/// Messages by hand, behind the proxy's back or through it.
async fn put(client: &tokio_postgres::Client, count: usize) {
    let sql = format!(
        "select pgmq.send('work', jsonb_build_object('n', n)) from generate_series(1, {count}) as n"
    );
    client.batch_execute(&sql).await.unwrap();
}

fn poll(vt: u32, quantity: u32, seconds: u32) -> String {
    format!(
        "select msg_id, read_ct, message from pgmq.read_with_poll('work', {vt}, {quantity}, {seconds}, 50)"
    )
}

async fn parked(proxy: &Proxy, count: u64) {
    wait_until("polls are parked", PATIENCE, async || {
        proxy.metric("flowgate_parked") == count
    })
    .await;
}

/// The ways drivers send a poll; those in several parts wait for an answer between them.
fn spellings(seconds: u32) -> Vec<(&'static str, Vec<Vec<u8>>)> {
    let literal = poll(2, 10, seconds);
    let text = "select msg_id, message from pgmq.read_with_poll(queue_name => $1, vt => $2, qty => $3, max_poll_seconds => $4, poll_interval_ms => $5)";
    let seconds = seconds.to_string();
    let values = ["work", "2", "10", seconds.as_str(), "50"];
    let run =
        |statement: &str| [bind_text("", statement, &values), execute("", 0), sync()].concat();
    let described = [
        bind_text("", "named", &values),
        describe_portal(""),
        execute("", 0),
        sync(),
    ];
    vec![
        ("simple", vec![query(&literal)]),
        ("extended", vec![extended(text, &values)]),
        ("extended, literals", vec![extended(&literal, &[])]),
        (
            "described first",
            vec![
                [parse("", text), describe_statement(""), flush()].concat(),
                run(""),
            ],
        ),
        (
            "named",
            vec![[parse("named", text), sync()].concat(), described.concat()],
        ),
        (
            "named, described first",
            vec![
                [parse("other", text), describe_statement("other"), flush()].concat(),
                run("other"),
            ],
        ),
    ]
}

async fn say(client: &mut Raw, parts: &[Vec<u8>]) -> String {
    let mut heard = String::new();
    for (at, part) in parts.iter().enumerate() {
        client.send(part).await;
        let frames = if at + 1 < parts.len() && part.ends_with(&flush()) {
            client.until(b'T').await
        } else {
            client.until_ready().await
        };
        heard = heard + &transcript(&frames) + "\n";
    }
    heard
}

#[tokio::test]
async fn a_parked_poll_is_answered_word_for_word_as_postgres_answers() {
    let db = with_queue().await;
    let proxy = Proxy::without_replica(&db, |_| {}).await;
    let direct = db.connect().await;
    // Twice: the first of a kind finds out what the others are told.
    for round in 0..2 {
        let all = spellings(1).into_iter().map(async |(name, parts)| {
            let (mut ours, mut theirs) = (proxy.raw().await, proxy.raw_direct().await);
            let (a, b) = tokio::join!(say(&mut ours, &parts), say(&mut theirs, &parts));
            assert_eq!(a, b, "{name}, empty, round {round}");
        });
        join_all(all).await;
    }
    for (name, parts) in spellings(20) {
        let clean = "truncate pgmq.q_work restart identity";
        let (mut ours, mut theirs) = (proxy.raw().await, proxy.raw_direct().await);
        direct.batch_execute(clean).await.unwrap();
        put(&direct, 2).await;
        let a = say(&mut ours, &parts).await;
        direct.batch_execute(clean).await.unwrap();
        put(&direct, 2).await;
        let b = say(&mut theirs, &parts).await;
        assert_eq!(a, b, "{name}, two messages");
        assert!(a.contains(r#"{"n": 2}"#), "{a}");
    }
    assert!(proxy.metric("flowgate_parked_total") >= 6);
    assert!(proxy.metric("flowgate_park_answered_empty_total") >= 6);
    proxy.shut_down().await;
}

#[tokio::test]
async fn whatever_may_bring_work_wakes_a_worker() {
    let db = with_queue().await;
    let proxy = Proxy::without_replica(&db, |config| {
        config.poll.probe = Duration::from_secs(60);
    })
    .await;
    let direct = db.connect().await;
    direct
        .batch_execute("select pgflow.create_flow('work'); select pgflow.add_step('work', 'a')")
        .await
        .unwrap();
    let client = proxy.connect().await;
    let mut worker = proxy.raw().await;
    let waits = query(&poll(1, 5, 50));
    let feeds = [
        "select pgflow.start_flow('work', '{}')",
        "begin; select pgflow.start_flow('work', '{}'); commit",
        "select pgmq.send('work', '{}')",
        "insert into pgmq.q_work (vt, message) values (now(), '{}')",
        // Seen in time: the one just read is visible again after a second.
        "select 1",
    ];
    for feed in feeds {
        worker.send(&waits).await;
        parked(&proxy, 1).await;
        client.batch_execute(feed).await.unwrap();
        let rows = first_columns(&worker.until_ready().await);
        assert_eq!(rows.len(), 1, "{feed}");
        if feed.starts_with("insert") {
            // It stays for the next.
            continue;
        }
        client
            .batch_execute(&format!("select pgmq.delete('work', {}::bigint)", rows[0]))
            .await
            .unwrap();
    }
    proxy.shut_down().await;
}

#[tokio::test]
async fn what_nobody_told_us_of_is_found_by_looking() {
    let db = with_queue().await;
    let proxy = Proxy::without_replica(&db, |config| {
        config.poll.probe = Duration::from_millis(20);
    })
    .await;
    let direct = db.connect().await;
    let mut worker = proxy.raw().await;
    worker.send(&query(&poll(30, 5, 50))).await;
    parked(&proxy, 1).await;
    let console = proxy.console().await;
    let shown = console.simple_query("show parked").await.unwrap();
    let tokio_postgres::SimpleQueryMessage::Row(row) = &shown[1] else {
        panic!("{shown:?}");
    };
    assert_eq!(
        (row.get("queue"), row.get("waiting")),
        (Some("work"), Some("1"))
    );
    put(&direct, 3).await;
    assert_eq!(first_columns(&worker.until_ready().await).len(), 3);
    proxy.shut_down().await;
}

#[tokio::test]
async fn an_error_comes_at_once_and_to_everybody() {
    let db = with_queue().await;
    let proxy = Proxy::without_replica(&db, |_| {}).await;
    let direct = db.connect().await;
    let role = format!("{}_nobody", db.name);
    direct
        .batch_execute(&format!(
            "create role {role} login; grant usage on schema pgmq to {role}"
        ))
        .await
        .unwrap();
    let missing = query("select * from pgmq.read_with_poll('nowhere', 1, 1, 1000)");
    let refused = query("select * from pgmq.read_with_poll('work', 1, 1, 1000)");
    let asked = (0..8).map(async |_| {
        let mut client = Raw::login(proxy.port, &role, &db.name, &[]).await;
        let frames = client.ask_frames(&refused).await;
        assert_eq!(error_code(&frames).as_deref(), Some("42501"));
        let mut client = proxy.raw().await;
        let frames = client.ask_frames(&missing).await;
        assert_eq!(error_code(&frames).as_deref(), Some("42P01"));
        // The connection is as good as before.
        assert!(client.query("select 1").await.ends_with("Z I"));
    });
    timeout(PATIENCE, join_all(asked)).await.unwrap();
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_queue_dropped_under_its_waiters_is_told_to_all_of_them() {
    let db = with_queue().await;
    let proxy = Proxy::without_replica(&db, |config| {
        config.poll.probe = Duration::from_millis(50);
    })
    .await;
    let mut workers = Vec::new();
    for _ in 0..5 {
        let mut worker = proxy.raw().await;
        worker.send(&query(&poll(1, 1, 1000))).await;
        workers.push(worker);
    }
    parked(&proxy, 5).await;
    let direct = db.connect().await;
    direct
        .batch_execute("select pgmq.drop_queue('work')")
        .await
        .unwrap();
    for worker in &mut workers {
        let frames = worker.until_ready().await;
        assert_eq!(error_code(&frames).as_deref(), Some("42P01"));
    }
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_parked_client_may_cancel_leave_and_send_ahead() {
    let db = with_queue().await;
    let proxy = Proxy::without_replica(&db, |_| {}).await;
    let waits = query(&poll(60, 1, 1000));

    let mut cancels = proxy.raw().await;
    cancels.send(&waits).await;
    parked(&proxy, 1).await;
    cancels.cancel().await;
    let frames = cancels.until_ready().await;
    assert_eq!(error_code(&frames).as_deref(), Some("57014"));
    assert!(cancels.query("select 1").await.ends_with("Z I"));
    parked(&proxy, 0).await;

    let mut says_goodbye = proxy.raw().await;
    says_goodbye.send(&waits).await;
    let mut vanishes = proxy.raw().await;
    vanishes.send(&waits).await;
    parked(&proxy, 2).await;
    says_goodbye.send(&terminate()).await;
    drop(vanishes);
    parked(&proxy, 0).await;

    // What comes behind a poll is answered behind it.
    let mut ahead = proxy.raw().await;
    let text = "select msg_id from pgmq.read_with_poll('work', $1, 1, 1000, 50)";
    let all = [
        extended(text, &["60"]),
        query("select 'second'"),
        extended("select 'third'", &[]),
    ];
    ahead.send(&all.concat()).await;
    parked(&proxy, 1).await;
    put(&proxy.connect().await, 1).await;
    assert_eq!(tags(&ahead.until_ready().await), "12TDCZ");
    assert_eq!(first_columns(&ahead.until_ready().await), ["second"]);
    assert_eq!(first_columns(&ahead.until_ready().await), ["third"]);
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_poll_in_a_transaction_or_with_a_condition_is_postgres_own() {
    let db = with_queue().await;
    let proxy = Proxy::without_replica(&db, |_| {}).await;
    let client = proxy.connect().await;
    put(&client, 1).await;
    client.batch_execute("begin").await.unwrap();
    assert_eq!(text(&client, &poll(60, 1, 5)).await, "1");
    client.batch_execute("rollback").await.unwrap();
    let condition = "select read_ct from pgmq.read_with_poll('work', 0, 1, 5, 100, '{\"n\": 1}')";
    assert_eq!(text(&client, condition).await, "1", "it was rolled back");
    assert_eq!(proxy.metric("flowgate_parked_total"), 0);
    // And a session that owns its server keeps it.
    client
        .batch_execute("create temp table mine (n int)")
        .await
        .unwrap();
    assert_eq!(text(&client, &poll(60, 1, 5)).await, "1");
    assert_eq!(proxy.metric("flowgate_parked_total"), 0);
    proxy.shut_down().await;
}

#[tokio::test]
async fn idle_workers_cost_postgres_next_to_nothing() {
    const WORKERS: usize = 100;
    const POLLS: usize = 4;
    let db = with_queue().await;
    // Were each to hold one while it waits, most would wait for a server instead.
    let proxy = Proxy::with_pool(&db, 2).await;
    let mut workers = Vec::new();
    for at in 0..WORKERS {
        let name = format!("worker {at}");
        workers.push(proxy.raw_with(&[("application_name", &name)]).await);
    }
    let text = "select * from pgmq.read_with_poll(queue_name => $1, vt => $2, qty => $3, max_poll_seconds => $4, poll_interval_ms => $5)";
    let before = proxy.requests("primary");
    let began = Instant::now();
    let idle = workers.iter_mut().map(async |worker| {
        for _ in 0..POLLS {
            // As postgres.js does without prepared statements.
            worker
                .send(&[parse("", text), describe_statement(""), flush()].concat())
                .await;
            worker.until(b'T').await;
            let values = ["work", "2", "10", "2", "100"];
            worker
                .send(&[bind_text("", "", &values), execute("", 0), sync()].concat())
                .await;
            // Who waits for long, because all of them came at once, is told so.
            let answer = tags(&worker.until_ready().await);
            assert_eq!(answer.trim_start_matches('N'), "2CZ");
        }
    });
    join_all(idle).await;
    let seconds = began.elapsed().as_secs() + 1;
    let looks = proxy.metric("flowgate_park_probes_total");
    let reads = proxy.requests("primary") - before;
    // One a second and queue, and a few while all of them came.
    assert!(looks <= 2 * seconds + 5, "{looks} looks in {seconds} s");
    assert!(reads <= 3, "{reads} reads");
    proxy.shut_down().await;
}

/// Their deadlines come together with the answer of the one that found out.
#[tokio::test]
async fn polls_that_come_together_ask_postgres_once() {
    const WORKERS: usize = 60;
    let db = with_queue().await;
    let proxy = Proxy::with_pool(&db, 2).await;
    let mut workers = Vec::new();
    for _ in 0..WORKERS {
        workers.push(proxy.raw().await);
    }
    let before = proxy.requests("primary");
    let all = workers.iter_mut().map(async |worker| {
        worker.send(&query(&poll(1, 1, 1))).await;
        assert_eq!(tags(&worker.until_ready().await), "TCZ");
    });
    join_all(all).await;
    let reads = proxy.requests("primary") - before;
    // Whoever is waited for in vain for 5 s is not waited for any more.
    assert!(reads <= 10, "{reads} reads");
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_read_that_finds_no_taker_is_undone() {
    let db = with_queue().await;
    let proxy = Proxy::without_replica(&db, |config| {
        config.poll.probe = Duration::from_millis(20);
    })
    .await;
    let direct = db.connect().await;
    let direct = Arc::new(direct);
    // Reading takes a while: each message waits for a lock of ours.
    direct
        .batch_execute(
            "create function public.slow() returns trigger language plpgsql as $$ begin perform pg_advisory_xact_lock(4711); return new; end $$;
             create trigger slow before update on pgmq.q_work for each row execute function public.slow()",
        )
        .await
        .unwrap();
    let mut leaves = proxy.raw().await;
    leaves.send(&query(&poll(3600, 1, 1000))).await;
    parked(&proxy, 1).await;
    direct
        .batch_execute("select pg_advisory_lock(4711)")
        .await
        .unwrap();
    let sender = db.connect().await;
    put(&sender, 1).await;
    let waits = "select count(*) from pg_locks where locktype = 'advisory' and not granted and database = (select oid from pg_database where datname = current_database())";
    wait_until("the read waits", PATIENCE, async || {
        text(&sender, waits).await == "1"
    })
    .await;
    drop(leaves);
    parked(&proxy, 0).await;
    direct
        .batch_execute("select pg_advisory_unlock(4711)")
        .await
        .unwrap();
    // Its vt is an hour: only undoing it lets another have it, for the first time.
    let mut other = proxy.raw().await;
    other.send(&query(&poll(3600, 1, 1000))).await;
    let frames = other.until_ready().await;
    let rows: Vec<_> = frames.iter().filter(|frame| frame.tag == b'D').collect();
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0].texts()[1], "1");
    proxy.shut_down().await;
}
