//! Too much to do: what is worth more is served first, what is worth least is refused early and in words, and nobody else notices.

use std::collections::BTreeMap;
use std::time::Duration;

use flowgate::config::{Config, Consistency, Priority, Role, RoleTerms};

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_postgres::Client;

use crate::support::pg::fresh_database;
use crate::support::proxy::{PATIENCE, Proxy, connect, row, text};
use crate::support::raw::{Frame, Raw, error_code, first_columns, query, tags, transcript};
use crate::support::wait::wait_until;

fn one_server(config: &mut Config) {
    config.pool.size = 1.try_into().unwrap();
}

/// As `SHOW LIMITS` has it of the primary.
async fn queued(console: &Client, class: &str) -> String {
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
    let mut crowd = crowd(&proxy, &console, 42).await;

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

fn role(name: &str, terms: RoleTerms) -> Role {
    Role {
        name: name.to_owned(),
        terms,
    }
}

#[tokio::test]
async fn under_load_a_read_gets_an_older_answer_that_says_so_but_never_one_before_its_own_writes() {
    let db = fresh_database().await;
    let direct = db.connect().await;
    let strict = format!("{}_strict", db.name);
    direct
        .batch_execute(&format!(
            "create role {strict} login; grant usage on schema pgflow to {strict}; grant select on pgflow.flows to {strict};
             select pgflow.create_flow('a')"
        ))
        .await
        .unwrap();
    let proxy = Proxy::without_replica(&db, |config| {
        one_server(config);
        config.shed.max_stale = Duration::from_secs(3_600);
        let stale = false;
        let terms = RoleTerms {
            stale,
            ..RoleTerms::default()
        };
        config.roles.push(role(&strict, terms));
    })
    .await;
    let console = proxy.console().await;
    let read = query("select count(*) from pgflow.flows");
    let mut reader = proxy.raw().await;
    let mut writer = proxy.raw().await;
    let mut other = Raw::login(proxy.port, &strict, &db.name, &[]).await;
    for client in [&mut reader, &mut other] {
        let answer = client.ask_frames(&read).await;
        assert_eq!(first_columns(&answer), ["1"]);
    }
    let frames = writer
        .ask_frames(&query("select pgflow.create_flow('b')"))
        .await;
    assert!(tags(&frames).ends_with("CZ"), "{}", transcript(&frames));
    let holders = [
        proxy.connect().await,
        connect(&other_url(&proxy, &strict)).await,
    ];
    for holder in &holders {
        holder.batch_execute("begin").await.unwrap();
    }
    let answer = reader.ask_frames(&read).await;
    assert_eq!(tags(&answer), "NTDCZ", "{}", transcript(&answer));
    let notice = answer[0].field(b'M').unwrap();
    assert!(
        notice.starts_with("the answer is ") && notice.ends_with(" ms old"),
        "{notice}"
    );
    assert_eq!(first_columns(&answer), ["1"]);
    let memory = "flowgate_shared_reads_total{answered_by=\"memory_under_load\"}";
    assert_eq!(proxy.metric(memory), 1);
    // These wait: one has written since, the other may not be told what is old.
    writer.send(&read).await;
    other.send(&read).await;
    wait_until("both wait", PATIENCE, async || {
        queued(&console, "read").await == "2"
    })
    .await;
    for holder in &holders {
        holder.batch_execute("commit").await.unwrap();
    }
    for client in [&mut writer, &mut other] {
        let answer = client.until_ready().await;
        assert_eq!(tags(&answer), "TDCZ", "{}", transcript(&answer));
        assert_eq!(first_columns(&answer), ["2"]);
    }
    let answer = reader.ask_frames(&read).await;
    assert_eq!(tags(&answer), "TDCZ");
    assert_eq!(first_columns(&answer), ["2"]);
    assert_eq!(proxy.metric(memory), 1);
    proxy.shut_down().await;
}

fn other_url(proxy: &Proxy, user: &str) -> String {
    format!(
        "postgres://{user}@127.0.0.1:{}/{}",
        proxy.port, proxy.database
    )
}

#[tokio::test]
async fn whoever_has_a_priority_is_served_by_it_and_a_role_has_no_more_servers_than_it_may() {
    let db = fresh_database().await;
    let direct = db.connect().await;
    let low = format!("{}_low", db.name);
    direct
        .batch_execute(&format!(
            "create table log (at serial, who text); create role {low} login;
             grant all on log, log_at_seq to {low}"
        ))
        .await
        .unwrap();
    let proxy = Proxy::without_replica(&db, |config| {
        config.pool.size = 3.try_into().unwrap();
        let terms = RoleTerms {
            priority: Priority::Low,
            max_servers: Some(1.try_into().unwrap()),
            ..RoleTerms::default()
        };
        config.roles.push(role(&low, terms));
    })
    .await;
    let console = proxy.console().await;
    let shown = row(&console, "SHOW LIMITS", "role", &low).await;
    assert_eq!(shown["priority"], "low");
    let url = other_url(&proxy, &low);
    let holder = connect(&url).await;
    let mut clients = Vec::new();
    for (who, startup, says) in [
        ("role", None, None),
        ("low", None, Some("set flowgate.priority = 'low'")),
        ("normal", Some("normal"), None),
        (
            "default",
            Some("high"),
            Some("set flowgate.priority to 'default'"),
        ),
        ("high", None, Some("set session flowgate.priority to high")),
        ("higher", Some("high"), None),
    ] {
        let startup: Vec<_> = startup
            .map(|priority| ("flowgate.priority", priority))
            .into_iter()
            .collect();
        let mut client = Raw::login(proxy.port, &low, &db.name, &startup).await;
        if let Some(says) = says {
            assert_eq!(tags(&client.ask_frames(&query(says)).await), "CZ");
        }
        clients.push((who, client));
    }
    holder.batch_execute("begin").await.unwrap();
    for (at, (who, client)) in clients.iter_mut().enumerate() {
        client
            .send(&query(&format!("insert into log (who) values ('{who}')")))
            .await;
        wait_until("it waits", PATIENCE, async || {
            queued(&console, "other").await == (at + 1).to_string()
        })
        .await;
    }
    let shown = row(&console, "SHOW LIMITS", "role", &low).await;
    assert_eq!(
        ["limit", "in_use", "queued"].map(|column| shown[column].as_str()),
        ["1", "1", "6"]
    );
    holder.batch_execute("commit").await.unwrap();
    for (_, client) in &mut clients {
        let answer = client.until_ready().await;
        assert_eq!(tags(&answer), "CZ", "{}", transcript(&answer));
    }
    let order = "select string_agg(who, ' ' order by at) from log";
    assert_eq!(
        text(&direct, order).await,
        "high higher normal role low default"
    );
    // A reload says otherwise.
    let mut config = crate::support::proxy::config(&db.primary_url, &[]);
    config.pool.size = 3.try_into().unwrap();
    let terms = RoleTerms {
        max_servers: Some(2.try_into().unwrap()),
        ..RoleTerms::default()
    };
    config.roles.push(role(&low, terms));
    proxy.reload_as(&config).await.unwrap();
    let shown = row(&console, "SHOW LIMITS", "role", &low).await;
    assert_eq!(
        (shown["limit"].as_str(), shown["priority"].as_str()),
        ("2", "normal")
    );
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

/// So many clients wait for the only server, each to keep it until `key` is unlocked.
async fn crowd(proxy: &Proxy, console: &Client, key: u32) -> Vec<Raw> {
    let mut crowd = Vec::new();
    for _ in 0..33 {
        let mut client = proxy.raw().await;
        let text = format!("select pg_advisory_xact_lock({key})");
        client.send(&query(&text)).await;
        crowd.push(client);
    }
    wait_until("they wait", PATIENCE, async || {
        queued(console, "other").await == "33"
    })
    .await;
    crowd
}

/// The holder of the only server lets go, and all in the crowd are served.
async fn disperse(holder: &Client, crowd: &mut [Raw]) {
    holder.batch_execute("commit").await.unwrap();
    for client in crowd {
        let answer = client.until_ready().await;
        assert!(tags(&answer).ends_with("CZ"), "{}", transcript(&answer));
    }
}

#[track_caller]
fn is_refusal(answer: &[Frame]) {
    let code = error_code(answer);
    assert_eq!(code.as_deref(), Some("53300"), "{}", transcript(answer));
    let detail = answer[0].field(b'D').unwrap();
    assert!(detail.starts_with("It is of class read"), "{detail}");
}

#[tokio::test]
async fn a_read_that_waits_already_is_refused_when_there_comes_to_be_too_much() {
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, one_server).await;
    let console = proxy.console().await;
    let mut readers = [proxy.raw().await, proxy.raw().await];
    let holder = proxy.connect().await;
    holder.batch_execute("begin").await.unwrap();
    for (reader, table) in readers.iter_mut().zip(["runs", "flows"]) {
        let text = format!("select count(*) from pgflow.{table}");
        reader.send(&query(&text)).await;
    }
    wait_until("they wait", PATIENCE, async || {
        queued(&console, "read").await == "2"
    })
    .await;
    let mut crowd = crowd(&proxy, &console, 43).await;
    // Nothing has come free.
    for reader in &mut readers {
        is_refusal(&reader.until_ready().await);
    }
    assert_eq!(queued(&console, "other").await, "33");
    assert_eq!(queued(&console, "read").await, "0");
    assert_eq!(proxy.metric("flowgate_shed_total{class=\"read\"}"), 2);
    disperse(&holder, &mut crowd).await;
    proxy.shut_down().await;
}

#[tokio::test]
async fn who_waits_for_anothers_answer_is_refused_as_early_as_others() {
    refuses_who_waits_for_another(&[]).await;
}

#[tokio::test]
async fn nor_is_a_replica_waited_for_that_is_away() {
    refuses_who_waits_for_another(&["postgres://postgres@127.0.0.1:1/postgres"]).await;
}

async fn refuses_who_waits_for_another(replicas: &[&str]) {
    let db = fresh_database().await;
    let proxy = Proxy::before(&db.primary_url, replicas, one_server).await;
    let console = proxy.console().await;
    let direct = db.connect().await;
    direct
        .batch_execute("begin; lock table pgflow.runs in access exclusive mode")
        .await
        .unwrap();
    let read = query("select count(*) from pgflow.runs");
    // It has the only server, and its query takes long.
    let mut first = proxy.raw().await;
    first.send(&read).await;
    let waits = format!(
        "select count(*) from pg_stat_activity where datname = '{}' and wait_event_type = 'Lock'",
        db.name
    );
    wait_until("it runs", PATIENCE, async || {
        text(&direct, &waits).await == "1"
    })
    .await;
    let mut crowd = crowd(&proxy, &console, 44).await;
    // The first of these waits for it, the others for the first of them.
    let mut readers = Vec::new();
    for _ in 0..3 {
        let mut reader = proxy.raw().await;
        reader.send(&read).await;
        readers.push(reader);
    }
    for reader in &mut readers {
        is_refusal(&reader.until_ready().await);
    }
    assert_eq!(proxy.metric("flowgate_shed_total{class=\"read\"}"), 3);
    // None of them has given up on the others before it was refused.
    let alone = "flowgate_shared_reads_total{answered_by=\"own_after_waiting\"}";
    assert_eq!(proxy.metric(alone), 0);
    assert!(first.is_quiet());
    disperse(&direct, &mut crowd).await;
    let answer = first.until_ready().await;
    assert_eq!(tags(&answer), "TDCZ", "{}", transcript(&answer));
    proxy.shut_down().await;
}

#[tokio::test]
async fn who_waits_for_what_a_replica_is_about_to_answer_is_not_refused_for_the_primarys_queue() {
    let db = fresh_database().await;
    let proxy = Proxy::start(&db, |config| {
        one_server(config);
        config.route.consistency = Consistency::Eventual;
    })
    .await;
    let console = proxy.console().await;
    let (direct, replica) = (db.connect().await, db.connect_replica().await);
    let read = query("select count(*) from pgflow.flows");
    let mut low = proxy.raw().await;
    low.ask(&query("set flowgate.priority = 'low'")).await;
    let mut warm = proxy.raw().await;
    wait_until("the replica answers", PATIENCE, async || {
        let before = proxy.requests("replica");
        warm.ask(&read).await;
        proxy.requests("replica") > before
    })
    .await;
    // So it is on the replica, once that has replayed it.
    direct
        .batch_execute("begin; lock table pgflow.flows in access exclusive mode")
        .await
        .unwrap();
    let locks = async |granted: bool| {
        let locks = format!(
            "select count(*) from pg_locks where relation = 'pgflow.flows'::regclass and granted = {granted}
             and database = (select oid from pg_database where datname = current_database())"
        );
        text(&replica, &locks).await
    };
    wait_until("it is locked", PATIENCE, async || locks(true).await == "1").await;
    let mut readers = vec![proxy.raw().await];
    readers[0].send(&read).await;
    wait_until("it runs", PATIENCE, async || locks(false).await == "1").await;
    let holder = proxy.connect().await;
    holder.batch_execute("begin").await.unwrap();
    let mut crowd = crowd(&proxy, &console, 45).await;
    // The first of these waits for it, the others for the first of them.
    for _ in 0..3 {
        let mut reader = proxy.raw().await;
        reader.send(&read).await;
        readers.push(reader);
    }
    // By then those who came before have looked whether there is any prospect, too.
    for _ in 0..2 {
        let refused = low.ask_frames(&query("select 1")).await;
        let code = error_code(&refused);
        assert_eq!(code.as_deref(), Some("53300"), "{}", transcript(&refused));
    }
    assert_eq!(proxy.metric("flowgate_shed_total{class=\"other\"}"), 2);
    assert_eq!(proxy.metric("flowgate_shed_total{class=\"read\"}"), 0);
    disperse(&holder, &mut crowd).await;
    direct.batch_execute("commit").await.unwrap();
    for reader in &mut readers {
        let answer = reader.until_ready().await;
        assert_eq!(tags(&answer), "TDCZ", "{}", transcript(&answer));
    }
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_read_with_an_older_answer_is_told_it_while_others_wait_for_the_same() {
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, |config| {
        one_server(config);
        config.shed.max_stale = Duration::from_secs(3_600);
    })
    .await;
    let console = proxy.console().await;
    let read = query("select count(*) from pgflow.flows");
    let mut strict = proxy.raw().await;
    let mut reader = proxy.raw().await;
    let frames = strict
        .ask_frames(&query("select pgflow.create_flow('a')"))
        .await;
    assert!(tags(&frames).ends_with("CZ"), "{}", transcript(&frames));
    let answer = reader.ask_frames(&read).await;
    assert_eq!(first_columns(&answer), ["1"]);
    let frames = strict
        .ask_frames(&query("select pgflow.create_flow('b')"))
        .await;
    assert!(tags(&frames).ends_with("CZ"), "{}", transcript(&frames));
    let holder = proxy.connect().await;
    holder.batch_execute("begin").await.unwrap();
    strict.send(&read).await;
    wait_until("it waits", PATIENCE, async || {
        queued(&console, "read").await == "1"
    })
    .await;
    // It need not wait for the query of the one that must see its own write.
    let answer = reader.ask_frames(&read).await;
    assert_eq!(tags(&answer), "NTDCZ", "{}", transcript(&answer));
    assert_eq!(first_columns(&answer), ["1"]);
    assert_eq!(queued(&console, "read").await, "1");
    assert!(strict.is_quiet());
    holder.batch_execute("commit").await.unwrap();
    let answer = strict.until_ready().await;
    assert_eq!(first_columns(&answer), ["2"]);
    proxy.shut_down().await;
}

/// A limit that may be anything from 4 to 20.
fn adaptive(config: &mut Config) {
    config.pool.size = 20.try_into().unwrap();
    config.shed.adaptive = true;
}

async fn limits(console: &Client) -> BTreeMap<String, String> {
    row(console, "SHOW LIMITS", "class", "other").await
}

async fn limit(console: &Client) -> usize {
    limits(console).await["adaptive_limit"].parse().unwrap()
}

/// As many clients as there may be servers, who ask the same until told to stop.
struct Busy {
    stop: watch::Sender<bool>,
    clients: JoinSet<usize>,
}

impl Busy {
    async fn with(proxy: &Proxy, sql: &'static str) -> Self {
        let (stop, stopped) = watch::channel(false);
        let mut clients = JoinSet::new();
        for _ in 0..20 {
            let (client, stopped) = (proxy.connect().await, stopped.clone());
            clients.spawn(async move {
                let mut served = 0;
                while !*stopped.borrow() {
                    client.batch_execute(sql).await.unwrap();
                    served += 1;
                }
                served
            });
        }
        Self { stop, clients }
    }

    /// What each of them was served.
    async fn stop(self) -> Vec<usize> {
        self.stop.send(true).unwrap();
        self.clients.join_all().await
    }
}

/// Teaches it that requests are short.
async fn usual_is_quick(proxy: &Proxy, console: &Client) {
    let quick = proxy.connect().await;
    wait_until("it is known what is usual", PATIENCE, async || {
        for _ in 0..20 {
            assert_eq!(text(&quick, "select 1").await, "1");
        }
        limits(console).await.contains_key("usual_us")
    })
    .await;
}

/// Requests that have become long, of which hardly any are let in.
async fn strained(proxy: &Proxy, console: &Client) -> Busy {
    usual_is_quick(proxy, console).await;
    let busy = Busy::with(proxy, "select pg_sleep(0.15)").await;
    held_back(console).await;
    busy
}

/// Before that has become usual, which takes some of them.
async fn held_back(console: &Client) {
    wait_until("hardly any are let in", PATIENCE, async || {
        let shown = limits(console).await;
        let number = |name: &str| shown[name].parse::<usize>().unwrap();
        number("adaptive_limit") <= 7 && number("queued") > 0
    })
    .await;
}

#[tokio::test]
async fn an_adaptive_limit_falls_when_all_grows_slow_refuses_nobody_and_rises_again() {
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, adaptive).await;
    let console = proxy.console().await;
    assert_eq!(limit(&console).await, 20);
    // More than the floor keep their servers: they count for nothing, and are never made to wait.
    let mut keeping = Vec::new();
    for _ in 0..3 {
        let inside = proxy.connect().await;
        inside.batch_execute("begin").await.unwrap();
        let pinned = proxy.connect().await;
        let pinning = "create temporary table mine (a int)";
        pinned.batch_execute(pinning).await.unwrap();
        keeping.extend([inside, pinned]);
    }
    usual_is_quick(&proxy, &console).await;
    wait_until("none of them counts", PATIENCE, async || {
        limits(&console).await["at_work"] == "0"
    })
    .await;
    let busy = Busy::with(&proxy, "select pg_sleep(0.15)").await;
    held_back(&console).await;
    for client in &keeping {
        assert_eq!(text(client, "select 1").await, "1");
    }
    let closed = proxy.metric("flowgate_servers_closed_total");
    assert_eq!(closed, 0, "idle servers stay");
    wait_until("that has become usual", PATIENCE, async || {
        limit(&console).await >= 10
    })
    .await;
    let latency = limits(&console).await["latency_us"].parse::<u64>().unwrap();
    assert!(latency >= 150_000, "{latency}");
    let served = busy.stop().await;
    assert!(served.iter().all(|served| *served > 0), "{served:?}");
    wait_until("nothing is at work", PATIENCE, async || {
        limits(&console).await["at_work"] == "0"
    })
    .await;
    proxy.shut_down().await;
}

#[tokio::test]
async fn requests_that_hold_all_of_an_adaptive_limit_stop_nobody_for_good() {
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, adaptive).await;
    let console = proxy.console().await;
    strained(&proxy, &console).await.stop().await;
    let direct = db.connect().await;
    direct
        .batch_execute("select pg_advisory_lock(45)")
        .await
        .unwrap();
    let mut holding = Vec::new();
    for _ in 0..8 {
        let mut session = proxy.raw().await;
        session
            .send(&query("select pg_advisory_xact_lock_shared(45)"))
            .await;
        holding.push(session);
    }
    wait_until("they hold all of it", PATIENCE, async || {
        limits(&console).await["at_work"].parse::<usize>().unwrap() >= 4
    })
    .await;
    let quick = proxy.connect().await;
    assert_eq!(text(&quick, "select 1").await, "1");
    wait_until("they count no more", PATIENCE, async || {
        limits(&console).await["at_work"] == "0"
    })
    .await;
    let listening = proxy.connect().await;
    listening.batch_execute("listen something").await.unwrap();
    direct
        .batch_execute("select pg_advisory_unlock(45)")
        .await
        .unwrap();
    for session in &mut holding {
        let answer = session.until_ready().await;
        assert!(tags(&answer).ends_with("CZ"), "{}", transcript(&answer));
    }
    wait_until("nothing is at work", PATIENCE, async || {
        limits(&console).await["at_work"] == "0"
    })
    .await;
    proxy.shut_down().await;
}

#[tokio::test]
async fn two_pools_take_turns_at_an_adaptive_limit_and_keep_their_servers() {
    let db = fresh_database().await;
    let other = fresh_database().await;
    let proxy = Proxy::without_replica(&db, |config| {
        adaptive(config);
        // All there may be are open; but what is waited for is a turn, not a server to be closed.
        config.pool.max_server_connections = Some(21.try_into().unwrap());
    })
    .await;
    let console = proxy.console().await;
    let busy = strained(&proxy, &console).await;
    let elsewhere = connect(&proxy.url().replace(&db.name, &other.name)).await;
    let pid = "select pg_backend_pid()";
    let own = text(&elsewhere, pid).await;
    for _ in 0..20 {
        assert_eq!(text(&elsewhere, pid).await, own);
    }
    let served = busy.stop().await;
    assert!(served.iter().all(|served| *served > 0), "{served:?}");
    assert_eq!(proxy.metric("flowgate_servers_closed_total"), 0);
    proxy.shut_down().await;
}

#[tokio::test]
async fn without_an_adaptive_limit_there_is_none() {
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, |_| {}).await;
    let console = proxy.console().await;
    assert_eq!(text(&proxy.connect().await, "select 1").await, "1");
    let shown = limits(&console).await;
    assert!(!shown.contains_key("adaptive_limit"), "{shown:?}");
    proxy.shut_down().await;
}
