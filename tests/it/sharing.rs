//! Identical reads share a query, and nobody can tell: every answer is as new as its question, and of the one who asked.

use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use tokio_postgres::SimpleQueryMessage;

use crate::events::define_flow;
use crate::support::chance::{Chance, seed};
use crate::support::pg::{TestDb, fresh_database, replica_catches_up};
use crate::support::proxy::{PATIENCE, Proxy, connect, text};
use crate::support::raw::{bind_text, execute, first_columns, parse, query, sync, tags};
use crate::support::wait::wait_until;

const READ: &str = "select opt_max_attempts from pgflow.flows where flow_slug = 'greet'";

fn reads(proxy: &Proxy, answered_by: &str) -> u64 {
    proxy.metric(&format!(
        "flowgate_shared_reads_total{{answered_by=\"{answered_by}\"}}"
    ))
}

async fn with_flow() -> TestDb {
    let db = fresh_database().await;
    define_flow(&db, "greet").await;
    replica_catches_up().await;
    db
}

#[tokio::test]
async fn one_query_answers_all_who_asked_before_it_was_sent() {
    let db = with_flow().await;
    let proxy = Proxy::with_pool(&db, 3).await;
    let writer = db.connect().await;
    let bystander = proxy.connect().await;
    let simple = query(READ);
    let named = [bind_text("", "r", &[]), execute("", 0), sync()].concat();
    for (kind, request) in [("simple", simple), ("named", named)] {
        let mut readers = Vec::new();
        for _ in 0..20 {
            let mut reader = proxy.raw().await;
            reader.ask(&[parse("r", READ), sync()].concat()).await;
            readers.push(reader);
        }
        let (own, other) = (reads(&proxy, "own"), reads(&proxy, "other"));
        writer
            .batch_execute("begin; lock table pgflow.flows in access exclusive mode")
            .await
            .unwrap();
        readers[0].send(&request).await;
        let waits = "select count(*) from pg_locks where not granted and relation = 'pgflow.flows'::regclass";
        wait_until("the first is under way", PATIENCE, async || {
            text(&writer, waits).await == "1"
        })
        .await;
        for reader in &mut readers[1..] {
            reader.send(&request).await;
        }
        // Answered after all of them have been heard.
        text(&bystander, "select 1").await;
        writer
            .batch_execute(
                "update pgflow.flows set opt_max_attempts = opt_max_attempts + 7; commit",
            )
            .await
            .unwrap();
        let now = text(&writer, READ).await;
        for reader in &mut readers {
            let frames = reader.until_ready().await;
            let expected = if kind == "simple" { "TDCZ" } else { "2DCZ" };
            assert_eq!(tags(&frames), expected, "{kind}");
            assert_eq!(first_columns(&frames), [now.as_str()], "{kind}");
        }
        assert_eq!(reads(&proxy, "own") - own, 2, "{kind}");
        assert_eq!(reads(&proxy, "other") - other, 18, "{kind}");
    }
    proxy.shut_down().await;
}

#[tokio::test]
async fn an_answer_is_never_older_than_its_question() {
    const WRITES: i32 = 120;
    let db = with_flow().await;
    for replicas in [false, true] {
        let size = |config: &mut flowgate::config::Config| {
            config.pool.size = 3.try_into().unwrap();
            config.route.replica_wait = Duration::from_millis(5);
        };
        let proxy = if replicas {
            Proxy::start(&db, size).await
        } else {
            Proxy::without_replica(&db, size).await
        };
        let committed = AtomicI32::new(0);
        let done = AtomicBool::new(false);
        let writer = async {
            let client = proxy.connect().await;
            for n in 1..=WRITES {
                let write = format!("update pgflow.flows set opt_max_attempts = {n}");
                client.batch_execute(&write).await.unwrap();
                committed.store(n, Ordering::SeqCst);
            }
            done.store(true, Ordering::SeqCst);
        };
        let zero = db.connect().await;
        zero.batch_execute("update pgflow.flows set opt_max_attempts = 0")
            .await
            .unwrap();
        replica_catches_up().await;
        let readers = (0..24).map(|_| {
            let (proxy, committed, done) = (&proxy, &committed, &done);
            async move {
                let client = proxy.connect().await;
                let mut before = 0;
                while !done.load(Ordering::SeqCst) {
                    let asked = committed.load(Ordering::SeqCst).max(before);
                    before = text(&client, READ).await.parse().unwrap();
                    assert!(before >= asked, "{before}, and {asked} before it was asked");
                }
            }
        });
        tokio::join!(writer, join_all(readers));
        assert!(reads(&proxy, "other") > 0, "nothing was shared");
        proxy.shut_down().await;
    }
}

#[tokio::test]
async fn nobody_gets_what_another_may_see() {
    let seed = seed();
    let db = with_flow().await;
    let direct = db.connect().await;
    let role = |n: u64| format!("{}_reader{n}", db.name);
    direct
        .batch_execute(&format!(
            "select pgflow.create_flow('a'); select pgflow.create_flow('b'); select pgflow.create_flow('c');
             create role {one} login; create role {two} login;
             grant usage on schema pgflow to {one}, {two}; grant select on pgflow.flows to {one}, {two};
             alter table pgflow.flows enable row level security;
             create policy tenant on pgflow.flows to {one} using (flow_slug = current_setting('app.tenant', true));
             create policy others on pgflow.flows to {two} using (flow_slug <> current_setting('app.tenant', true))",
            one = role(1),
            two = role(2),
        ))
        .await
        .unwrap();
    let proxy = Proxy::with_pool(&db, 2).await;
    let clients = (0..40).map(|me| {
        let (db, proxy, role) = (&db, &proxy, &role);
        async move {
            let mut chance = Chance::of(seed, me);
            let which = 1 + me % 2;
            let url = format!(
                "postgres://{}@127.0.0.1:{}/{}",
                role(which),
                proxy.port,
                db.name
            );
            let client = connect(&url).await;
            let mut tenant = "a";
            client.batch_execute("set app.tenant = 'a'").await.unwrap();
            for _ in 0..60 {
                if chance.one_in(6) {
                    tenant = ["a", "b", "c"][chance.index(3)];
                    let set = format!("set app.tenant = '{tenant}'");
                    client.batch_execute(&set).await.unwrap();
                }
                let read = "select flow_slug from pgflow.flows order by 1";
                let rows: Vec<String> = client
                    .simple_query(read)
                    .await
                    .unwrap()
                    .iter()
                    .filter_map(|message| match message {
                        SimpleQueryMessage::Row(row) => row.get(0).map(str::to_owned),
                        _ => None,
                    })
                    .collect();
                let expected: Vec<_> = ["a", "b", "c", "greet"]
                    .into_iter()
                    .filter(|slug| (*slug == tenant) == (which == 1))
                    .collect();
                assert_eq!(rows, expected, "{tenant}, role {which}");
            }
        }
    });
    join_all(clients).await;
    assert!(reads(&proxy, "other") > 0, "nothing was shared");
    proxy.shut_down().await;
}

/// A setting of the application's own, made by a function, is on its server and in nobody's books.
#[tokio::test]
async fn nobody_gets_what_another_may_see_by_what_a_function_set() {
    let db = with_flow().await;
    let direct = db.connect().await;
    let role = format!("{}_reader", db.name);
    direct
        .batch_execute(&format!(
            "select pgflow.create_flow('a'); select pgflow.create_flow('b');
             create function log_in(who text) returns void language plpgsql as
                 $$ begin perform set_config('app.tenant', who, false); end $$;
             create role {role} login;
             grant usage on schema pgflow to {role}; grant select on pgflow.flows to {role};
             alter table pgflow.flows enable row level security;
             create policy tenant on pgflow.flows to {role} using (flow_slug = current_setting('app.tenant', true))",
        ))
        .await
        .unwrap();
    // A server each: whoever keeps its own keeps what the function has set there.
    let proxy = Proxy::with_pool(&db, 6).await;
    let url = format!("postgres://{role}@127.0.0.1:{}/{}", proxy.port, db.name);
    let clients = (0..6).map(|me| {
        let url = &url;
        async move {
            let client = connect(url).await;
            let tenant = ["a", "b"][me % 2];
            text(&client, &format!("select log_in('{tenant}')")).await;
            for _ in 0..60 {
                let read =
                    "select coalesce(string_agg(flow_slug, ','), 'nobody') from pgflow.flows";
                let seen = text(&client, read).await;
                assert!(seen == tenant || seen == "nobody", "{tenant} sees {seen}");
            }
        }
    });
    join_all(clients).await;
    proxy.shut_down().await;
}

#[tokio::test]
async fn an_error_is_everybodys_own_and_a_leader_that_leaves_takes_nobody_along() {
    let db = with_flow().await;
    let proxy = Proxy::with_pool(&db, 3).await;
    let writer = db.connect().await;
    let bystander = proxy.connect().await;
    let mut readers = Vec::new();
    for _ in 0..6 {
        readers.push(proxy.raw().await);
    }
    writer
        .batch_execute("begin; lock table pgflow.flows in access exclusive mode")
        .await
        .unwrap();
    // Not the upkeep, which may come to wait there, too.
    let waits = "select count(*) from pg_locks join pg_stat_activity using (pid) where not granted \
                 and relation = 'pgflow.flows'::regclass and application_name not like 'flowgate%'";
    readers[0].send(&query(READ)).await;
    wait_until("the first is under way", PATIENCE, async || {
        text(&writer, waits).await == "1"
    })
    .await;
    for reader in &mut readers[1..] {
        reader.send(&query(READ)).await;
        // In this order: the second leads the next flight.
        text(&bystander, "select 1").await;
    }
    readers[1].cancel().await;
    let frames = readers[1].until_ready().await;
    assert_eq!(tags(&frames), "EZ");
    drop(readers.remove(1));
    drop(readers.remove(0));
    writer
        .batch_execute("alter table pgflow.flows rename column opt_max_attempts to gone; commit")
        .await
        .unwrap();
    for reader in &mut readers {
        assert_eq!(tags(&reader.until_ready().await), "EZ");
        assert!(reader.query("select 1").await.ends_with("Z I"));
    }
    proxy.shut_down().await;
}
