//! Channels over LISTEN, through the proxy: in force when acknowledged, transactional, complete and in order.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::Value;
use tokio::time::timeout;
use tokio_postgres::{AsyncMessage, Client};

use crate::support::pg::{TestDb, fresh_database};
use crate::support::proxy::{Hearing, PATIENCE, Proxy, connect_hearing, sqlstate, text};
use crate::support::raw::{Frame, Raw, extended, query, tags, transcript};
use crate::support::wait::wait_until;

#[tokio::test]
async fn a_listen_is_in_force_once_it_is_acknowledged() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 2).await;
    let direct = db.connect().await;
    for round in 0..200 {
        let (client, mut hearing) = proxy.connect_hearing().await;
        // Each time another channel: nobody listened on it before.
        client
            .batch_execute(&format!("listen round{round}"))
            .await
            .unwrap();
        direct
            .batch_execute(&format!("notify round{round}, '{round}'"))
            .await
            .unwrap();
        let heard = hearing.notification().await;
        assert_eq!(
            (heard.channel(), heard.payload()),
            (format!("round{round}").as_str(), round.to_string().as_str())
        );
    }
    // And on one channel, left and joined again.
    let (client, mut hearing) = proxy.connect_hearing().await;
    for round in 0..200 {
        client.batch_execute("listen same").await.unwrap();
        direct
            .batch_execute(&format!("notify same, '{round}'"))
            .await
            .unwrap();
        assert_eq!(hearing.notification().await.payload(), round.to_string());
        client.batch_execute("unlisten same").await.unwrap();
        // Between the two, and so for nobody, however soon the next LISTEN comes.
        direct
            .batch_execute("notify same, 'unheard'")
            .await
            .unwrap();
    }
    assert_eq!(text(&client, "select 1").await, "1");
    assert!(notifications(&mut hearing).is_empty());
    proxy.shut_down().await;
}

#[tokio::test]
async fn whoever_joins_a_channel_hears_nothing_from_before() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 2).await;
    let direct = db.connect().await;
    let (first, mut first_hears) = proxy.connect_hearing().await;
    first.batch_execute("listen busy").await.unwrap();
    for round in 0..100 {
        let (later, mut hearing) = proxy.connect_hearing().await;
        let before = "select pg_notify('busy', 'before ' || n) from generate_series(1, 20) n";
        direct.batch_execute(before).await.unwrap();
        if round % 2 == 0 {
            later.batch_execute("listen busy").await.unwrap();
        } else {
            let listen = later.prepare("listen busy").await.unwrap();
            later.execute(&listen, &[]).await.unwrap();
        }
        direct.batch_execute("notify busy, 'after'").await.unwrap();
        assert_eq!(hearing.notification().await.payload(), "after", "{round}");
        for n in 1..=20 {
            let heard = first_hears.notification().await;
            assert_eq!(heard.payload(), format!("before {n}"));
        }
        assert_eq!(first_hears.notification().await.payload(), "after");
    }
    proxy.shut_down().await;
}

#[tokio::test]
async fn what_a_session_sends_itself_comes_before_it_is_ready_again() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 2).await;
    let script = [
        query("notify own, 'nobody listens'"),
        query("listen own"),
        query("notify own, 'one'"),
        query("select pg_notify('own', 'two'), pg_notify('else', 'unheard')"),
        extended("select pg_notify('own', $1)", &["three"]),
        query("begin; notify own, 'four'; notify own, 'five'; commit"),
        query("begin"),
        query("notify own, 'six'"),
        extended("select pg_notify('own', $1)", &["seven"]),
        query("select 1"),
        query("commit"),
        query("begin; notify own, 'lost'; rollback"),
        query("notify own, 'lost'; select 1/0"),
        query("begin"),
        query("savepoint s"),
        query("notify own, 'lost'"),
        query("rollback to s"),
        query("notify own, 'eight'"),
        query("commit and chain"),
        query("rollback"),
        query("unlisten own"),
        query("notify own, 'lost'"),
    ];
    let hear = async |mut client: Raw| {
        let mut heard = Vec::new();
        for _ in 0..20 {
            for request in &script {
                let frames = client.ask_frames(request).await;
                let news = frames.iter().filter(|frame| frame.tag == b'A');
                let payloads: Vec<_> = news
                    .map(|frame| String::from_utf8_lossy(&frame.body[4..]).into_owned())
                    .collect();
                heard.push((tags(&frames), payloads));
            }
        }
        heard
    };
    let wanted = hear(proxy.raw_direct().await).await;
    assert_eq!(wanted[2].0, "CAZ");
    assert_eq!(wanted, hear(proxy.raw().await).await);
    assert_eq!(proxy.metric("flowgate_event_own_late_total"), 0);
    proxy.shut_down().await;
}

#[tokio::test]
async fn channels_are_postgres_names() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let (client, mut hearing) = proxy.connect_hearing().await;
    let direct = db.connect().await;
    let long = "l".repeat(70);
    let names = [
        ("Folded", "folded"),
        ("\"Not Folded\"", "Not Folded"),
        ("\"quo\"\"ted\"", "quo\"ted"),
        ("\"ümläut\"", "ümläut"),
        (long.as_str(), &long[..63]),
    ];
    for (written, name) in names {
        client
            .batch_execute(&format!("LISTEN {written}"))
            .await
            .unwrap();
        direct
            .execute("select pg_notify($1, 'x')", &[&name])
            .await
            .unwrap();
        assert_eq!(hearing.notification().await.channel(), name);
    }
    assert!(client.batch_execute("listen").await.is_err());
    for bad in [
        "pgflow:run:67e55044-10b1-426f-9247-bb680e5fe0c8@",
        "pgflow:run:67e55044-10b1-426f-9247-bb680e5fe0c8@-1",
        "pgflow_events@yesterday",
    ] {
        let refused = client.batch_execute(&format!("listen \"{bad}\"")).await;
        assert_eq!(sqlstate(refused), "22023", "{bad}");
    }
    client
        .batch_execute("/* why */ listen -- where\n commented ;")
        .await
        .unwrap();
    direct.batch_execute("notify commented").await.unwrap();
    assert_eq!(hearing.notification().await.channel(), "commented");
    // By message, prepared and pipelined.
    let listen = client.prepare("listen prepared").await.unwrap();
    client.execute(&listen, &[]).await.unwrap();
    direct.batch_execute("notify prepared").await.unwrap();
    assert_eq!(hearing.notification().await.channel(), "prepared");
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_listen_in_a_transaction_counts_when_it_commits() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 2).await;
    let (client, mut hearing) = proxy.connect_hearing().await;
    let direct = db.connect().await;
    let cases = [
        ("begin; listen a; commit", vec!["a"]),
        ("begin; listen b; rollback", vec![]),
        (
            "begin; savepoint s; listen c; rollback to s; listen d; commit",
            vec!["d"],
        ),
        ("begin; listen e; unlisten e; commit", vec![]),
        ("listen f; listen g", vec!["f", "g"]),
        ("listen h; select 1/0", vec![]),
    ];
    for (script, heard) in cases {
        for parts in [script.split("; ").collect::<Vec<_>>(), vec![script]] {
            if parts.len() > 1 && script.contains("1/0") {
                continue;
            }
            for part in parts {
                drop(client.batch_execute(part).await);
            }
            for channel in ["a", "b", "c", "d", "e", "f", "g", "h"] {
                direct
                    .execute("select pg_notify($1, '')", &[&channel])
                    .await
                    .unwrap();
            }
            for channel in &heard {
                assert_eq!(hearing.notification().await.channel(), *channel, "{script}");
            }
            settle(&client, &mut hearing, &direct).await;
            assert!(notifications(&mut hearing).is_empty(), "{script}");
            client.batch_execute("unlisten *").await.unwrap();
        }
    }
    // Within a transaction nothing is delivered.
    client.batch_execute("listen later").await.unwrap();
    client.batch_execute("begin").await.unwrap();
    direct.batch_execute("notify later").await.unwrap();
    let direct_sees = "select count(*) from pg_stat_activity";
    text(&direct, direct_sees).await;
    assert_eq!(text(&client, "select 1").await, "1");
    assert!(notifications(&mut hearing).is_empty());
    client.batch_execute("commit").await.unwrap();
    assert_eq!(hearing.notification().await.channel(), "later");
    proxy.shut_down().await;
}

#[tokio::test]
async fn notifications_name_the_backend_and_reach_their_own_session() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 2).await;
    let (client, mut hearing) = proxy.connect_hearing().await;
    client.batch_execute("listen own").await.unwrap();
    client
        .batch_execute("begin; notify own, 'first'; notify own, 'second'; commit")
        .await
        .unwrap();
    assert_eq!(hearing.notification().await.payload(), "first");
    assert_eq!(hearing.notification().await.payload(), "second");
    let direct = db.connect().await;
    let pid: i32 = text(&direct, "select pg_backend_pid()")
        .await
        .parse()
        .unwrap();
    direct.batch_execute("notify own, 'third'").await.unwrap();
    let third = hearing.notification().await;
    assert_eq!((third.payload(), third.process_id()), ("third", pid));
    client.batch_execute("discard all").await.unwrap();
    direct.batch_execute("notify own, 'unheard'").await.unwrap();
    settle(&client, &mut hearing, &direct).await;
    assert!(notifications(&mut hearing).is_empty());
    proxy.shut_down().await;
}

#[tokio::test]
async fn ten_thousand_notifications_reach_a_hundred_listeners_in_order() {
    const LISTENERS: usize = 100;
    const NOTIFICATIONS: usize = 10_000;
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 3).await;
    let mut listeners = Vec::new();
    for _ in 0..LISTENERS {
        let (client, hearing) = proxy.connect_hearing().await;
        client.batch_execute("listen firehose").await.unwrap();
        listeners.push((client, hearing));
    }
    let direct = db.connect().await;
    let send = async {
        for from in (0..NOTIFICATIONS).step_by(500) {
            let sql = format!(
                "select pg_notify('firehose', n::text) from generate_series({from}, {}) n",
                from + 499
            );
            direct.batch_execute(&sql).await.unwrap();
        }
    };
    let hear = join_all(listeners.iter_mut().map(async |(_client, hearing)| {
        for n in 0..NOTIFICATIONS {
            assert_eq!(hearing.notification().await.payload(), n.to_string());
        }
    }));
    timeout(PATIENCE * 4, futures_util::future::join(send, hear))
        .await
        .unwrap();
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_runs_events_come_in_order_on_every_channel_that_names_it() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 2).await;
    define_flow(&db, "greet").await;
    let (everything, mut all) = proxy.connect_hearing().await;
    everything
        .batch_execute("listen pgflow_events")
        .await
        .unwrap();
    let (one_flow, mut flow) = proxy.connect_hearing().await;
    one_flow
        .batch_execute("listen \"pgflow:flow:greet\"")
        .await
        .unwrap();
    let (other_flow, mut other) = proxy.connect_hearing().await;
    other_flow
        .batch_execute("listen \"pgflow:flow:else\"")
        .await
        .unwrap();
    let run = uuid::Uuid::new_v4();
    let (one_run, mut own) = proxy.connect_hearing().await;
    one_run
        .batch_execute(&format!("listen \"pgflow:run:{run}\""))
        .await
        .unwrap();

    let worker = proxy.connect().await;
    worker
        .batch_execute(&format!(
            "select pgflow.start_flow('greet', '{{\"to\": \"you\"}}', '{run}')"
        ))
        .await
        .unwrap();
    finish_run(&worker, "greet", run).await;

    let mut heard = Vec::new();
    for hearing in [&mut own, &mut flow, &mut all] {
        let mut events = Vec::new();
        loop {
            let event = event(hearing).await;
            let ended = event["event_type"] == "run:completed";
            events.push(event);
            if ended {
                break;
            }
        }
        let seqs: Vec<_> = events
            .iter()
            .map(|event| event["seq"].as_i64().unwrap())
            .collect();
        assert_eq!(
            seqs,
            (1..=seqs.len() as i64).collect::<Vec<_>>(),
            "{events:#?}"
        );
        assert!(
            events
                .iter()
                .all(|event| event["run_id"] == run.to_string() && event["cursor"].is_string()),
            "{events:#?}"
        );
        heard.push(events);
    }
    let types: Vec<_> = heard[0]
        .iter()
        .map(|event| event["event_type"].as_str().unwrap())
        .collect();
    assert!(
        types.starts_with(&["run:started"]) && types.contains(&"step:completed"),
        "{types:?}"
    );
    // Where to resume is said of many runs in more words.
    let plain = |events: &[Value]| -> Vec<Value> {
        let mut events = events.to_vec();
        for event in &mut events {
            event.as_object_mut().unwrap().remove("cursor");
        }
        events
    };
    assert_eq!(plain(&heard[0]), plain(&heard[1]));
    assert_eq!(heard[1], heard[2]);
    settle(&other_flow, &mut other, &db.connect().await).await;
    assert!(notifications(&mut other).is_empty());

    // Whoever comes late gets what follows the number it names, then what is new.
    for after in 0..heard[0].len() {
        let (late, mut hearing) = proxy.connect_hearing().await;
        late.batch_execute(&format!("listen \"pgflow:run:{run}@{after}\""))
            .await
            .unwrap();
        for wanted in &heard[0][after..] {
            assert_eq!(event(&mut hearing).await, *wanted, "after {after}");
        }
    }
    proxy.shut_down().await;
}

#[tokio::test]
async fn runs_are_followed_without_loss_while_the_upstream_listener_is_killed() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 2).await;
    define_flow(&db, "greet").await;
    let (client, mut hearing) = proxy.connect_hearing().await;
    client
        .batch_execute("listen \"pgflow:flow:greet\"")
        .await
        .unwrap();
    let (ordinary, mut told) = proxy.connect_hearing().await;
    ordinary.batch_execute("listen plain").await.unwrap();
    let direct = db.connect().await;
    let kill = "select count(pg_terminate_backend(pid)) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid() and application_name like 'flowgate%'";
    let worker = db.connect().await;
    let mut runs = Vec::new();
    let mut killed = 0;
    for n in 0..20 {
        let run = uuid::Uuid::new_v4();
        worker
            .batch_execute(&format!(
                "select pgflow.start_flow('greet', '{{}}', '{run}')"
            ))
            .await
            .unwrap();
        finish_run(&worker, "greet", run).await;
        runs.push(run);
        if n % 5 == 2 {
            killed += text(&direct, kill).await.parse::<i64>().unwrap();
        }
    }
    assert!(killed > 0, "there is no upstream listener to kill");
    let mut seen: HashMap<String, i64> = HashMap::new();
    let mut completed = 0;
    while completed < runs.len() {
        let event = event(&mut hearing).await;
        let last = seen
            .entry(event["run_id"].as_str().unwrap().to_owned())
            .or_default();
        let seq = event["seq"].as_i64().unwrap();
        // At least once, in order: no gap, a repetition is allowed.
        assert!(seq <= *last + 1, "a gap before {event}");
        if seq > *last {
            *last = seq;
            completed += usize::from(event["event_type"] == "run:completed");
        }
    }
    // An ordinary channel has no memory: its listener is cut off rather than left in silence.
    let end = loop {
        match told.next().await {
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
}

/// The sessions and permutations of `async-notify` in PostgreSQL's isolation tests: the same is heard at the same steps.
#[tokio::test]
async fn what_postgres_tests_of_notify_holds_through_the_proxy() {
    let steps = [
        ("notifier", "listenc", "LISTEN c1; LISTEN c2;"),
        ("notifier", "notify1", "NOTIFY c1;"),
        ("notifier", "notify2", "NOTIFY c2, 'payload';"),
        ("notifier", "notify3", "NOTIFY c3, 'payload3';"),
        (
            "notifier",
            "notifyf",
            "SELECT pg_notify('c2', NULL), pg_notify('c1', 'x' || n) FROM generate_series(1, 3) n;",
        ),
        (
            "notifier",
            "notifyd1",
            "NOTIFY c2, 'payload'; NOTIFY c1; NOTIFY \"c2\", 'payload';",
        ),
        (
            "notifier",
            "notifyd2",
            "NOTIFY c1; NOTIFY c1; NOTIFY c1, 'p1'; NOTIFY c1, 'p2'; NOTIFY c1, 'p1';",
        ),
        (
            "notifier",
            "notifys1",
            "BEGIN; NOTIFY c1, 'payload'; NOTIFY \"c2\", 'payload'; SAVEPOINT s1; NOTIFY c1, 'payload'; \
             NOTIFY c1, 'payloads'; NOTIFY \"c2\", 'payloads'; RELEASE SAVEPOINT s1; SAVEPOINT s2; \
             NOTIFY c1, 'rpayload'; NOTIFY c1, 'rpayloads'; ROLLBACK TO SAVEPOINT s2; COMMIT;",
        ),
        (
            "notifier",
            "usage",
            "SELECT pg_notification_queue_usage() > 0 AS nonzero;",
        ),
        (
            "notifier",
            "bignotify",
            "SELECT count(pg_notify('c1', s::text)) FROM generate_series(1, 1000) s;",
        ),
        ("listener", "llisten", "LISTEN c1; LISTEN c2;"),
        ("listener", "lcheck", "SELECT 1 AS x;"),
        ("listener", "lbegin", "BEGIN;"),
        ("listener", "lbegins", "BEGIN ISOLATION LEVEL SERIALIZABLE;"),
        ("listener", "lcommit", "COMMIT;"),
        ("listener", "lunlisten", "UNLISTEN *;"),
        ("listener2", "l2listen", "LISTEN c1;"),
        ("listener2", "l2check", "SELECT 1 AS x;"),
        ("listener2", "l2begin", "BEGIN;"),
        ("listener2", "l2commit", "COMMIT;"),
        ("listener2", "l2stop", "UNLISTEN *;"),
    ];
    let permutations = [
        "listenc notify1 notify2 notify3 notifyf",
        "listenc notifyd1 notifyd2 notifys1",
        "llisten notify1 notify2 notify3 notifyf lcheck",
        "listenc llisten notify1 notify2 notify3 notifyf lcheck",
        "llisten lunlisten notify1 lcheck",
        "l2listen l2begin notify1 lbegins llisten lcommit l2commit l2stop",
        // `l2check` is not Postgres's: what comes to an idle session may come before or after a BEGIN, but not behind a SELECT.
        "llisten l2listen lbegin notify1 lcheck l2check l2begin notifyd2 l2commit lcommit lcheck",
        // The first `usage` of the original asks for a queue that no other test uses.
        "llisten lbegin bignotify usage lcommit",
    ];
    let play = async |permutation: &str, mut sessions: HashMap<&'static str, Raw>| {
        let pids: HashMap<i32, &'static str> = sessions
            .iter()
            .map(|(name, raw)| (raw.pid(), *name))
            .collect();
        let mut heard = Vec::new();
        let mut held = HashMap::new();
        for step in permutation.split(' ') {
            let (session, _, sql) = steps.iter().find(|(_, name, _)| *name == step).unwrap();
            let frames = sessions
                .get_mut(session)
                .unwrap()
                .ask_frames(&query(sql))
                .await;
            let (news, others): (Vec<_>, Vec<_>) =
                frames.into_iter().partition(|frame| frame.tag == b'A');
            let news: Vec<_> = news
                .iter()
                .map(|frame| {
                    let pid = i32::from_be_bytes(frame.body[..4].try_into().unwrap());
                    (
                        pids[&pid],
                        String::from_utf8_lossy(&frame.body[4..]).into_owned(),
                    )
                })
                .collect();
            let others = transcript(&others);
            // What came before a BEGIN was there may be told before the transaction or after it.
            let early = if others.ends_with("C BEGIN\nZ T") {
                held.entry(session).or_insert(news);
                Vec::new()
            } else if others.ends_with("Z I") {
                let mut early: Vec<_> = held.remove(session).unwrap_or_default();
                early.extend(news);
                early
            } else {
                news
            };
            heard.push((step.to_owned(), early, others));
        }
        heard
    };
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 3).await;
    for permutation in permutations {
        let mut direct: HashMap<&'static str, Raw> = HashMap::new();
        let mut through: HashMap<&'static str, Raw> = HashMap::new();
        for name in ["notifier", "listener", "listener2"] {
            direct.insert(name, proxy.raw_direct().await);
            through.insert(name, proxy.raw().await);
        }
        let wanted = play(permutation, direct).await;
        assert_eq!(wanted, play(permutation, through).await, "{permutation}");
        wait_until("they are gone", PATIENCE, async || {
            proxy.metric("flowgate_clients") == 0
        })
        .await;
    }
    assert_eq!(proxy.metric("flowgate_event_own_late_total"), 0);
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_session_that_leaves_in_a_transaction_leaves_no_channel_behind() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    for script in [
        vec!["listen one", "begin"],
        vec!["begin", "listen two", "commit and chain"],
        vec!["listen three", "begin", "unlisten *", "listen four"],
    ] {
        let mut leaving = proxy.raw().await;
        for statement in &script {
            leaving.query(statement).await;
        }
        drop(leaving);
        let mut next = proxy.raw().await;
        assert_eq!(
            next.query("select pg_listening_channels()").await,
            proxy
                .raw_direct()
                .await
                .query("select pg_listening_channels()")
                .await,
            "{script:?}"
        );
    }
    proxy.shut_down().await;
}

/// Who knows that something was notified, and then asks a session that listens, has heard of it when the answer is there.
#[tokio::test]
async fn what_was_notified_before_a_request_is_heard_before_its_answer_ends() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 2).await;
    let mut listener = proxy.raw().await;
    listener.query("listen told").await;
    let mut other = proxy.raw().await;
    for round in 0..200 {
        other.query(&format!("notify told, '{round}'")).await;
        let frames = if round % 2 == 0 {
            listener.ask_frames(&query("select 1")).await
        } else {
            listener.ask_frames(&extended("select 1", &[])).await
        };
        let news: Vec<_> = frames.iter().filter(|frame| frame.tag == b'A').collect();
        assert_eq!(news.len(), 1, "{round}: {}", tags(&frames));
        let told = String::from_utf8_lossy(&news[0].body[4..]).into_owned();
        assert_eq!(told, format!("told\0{round}\0"));
    }
    proxy.shut_down().await;
}

/// Nothing is lost, and nothing doubled, between the commit of a LISTEN and the hub's taking over from its server.
#[tokio::test]
async fn a_listen_that_commits_under_fire_hears_everything_from_then_on_once() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 4).await;
    let direct = db.connect().await;
    let (_keeper, _heard) = {
        let (client, hearing) = proxy.connect_hearing().await;
        client.batch_execute("listen fire").await.unwrap();
        (client, hearing)
    };
    let stop = AtomicBool::new(false);
    let fire = async {
        let mut shot = 0;
        // The last of them after all listen: one that was under way then may have committed before.
        let mut last = false;
        while !last {
            last = stop.load(Ordering::Relaxed);
            shot += 1;
            let sql = format!("notify fire, '{shot}'");
            direct.batch_execute(&sql).await.unwrap();
        }
        shot
    };
    let join = async {
        let mut first = Vec::new();
        let mut sessions = Vec::new();
        for round in 0..16 {
            let mut session = proxy.raw().await;
            session.query("begin").await;
            session.query("listen fire").await;
            if round % 2 == 0 {
                session.query("listen more").await;
            }
            let frames = session.ask_frames(&query("commit")).await;
            first.push(frames);
            sessions.push(session);
        }
        stop.store(true, Ordering::Relaxed);
        (first, sessions)
    };
    let (last, (first, sessions)) = futures_util::future::join(fire, join).await;
    for (frames, mut session) in first.into_iter().zip(sessions) {
        let mut shots: Vec<u64> = frames.iter().filter_map(shot).collect();
        while shots.last() != Some(&last) {
            shots.extend(session.until(b'A').await.iter().filter_map(shot));
        }
        let wanted: Vec<u64> = (shots[0]..=last).collect();
        assert_eq!(shots, wanted);
    }
    proxy.shut_down().await;
}

fn shot(frame: &Frame) -> Option<u64> {
    let told = frame.body.get(4..).filter(|_| frame.tag == b'A')?;
    let payload = told.split(|&byte| byte == 0).nth(1)?;
    std::str::from_utf8(payload).ok()?.parse().ok()
}

// ---- the flow ----

/// One step, by the name of `hello`.
pub(crate) async fn define_flow(db: &TestDb, slug: &str) {
    let direct = db.connect().await;
    direct
        .batch_execute(&format!(
            "select pgflow.create_flow('{slug}'); select pgflow.add_step('{slug}', 'hello')"
        ))
        .await
        .unwrap();
}

/// Does the only task of one run, as a worker would.
pub(crate) async fn finish_run(worker: &Client, slug: &str, run: uuid::Uuid) {
    let messages = format!("select msg_id from pgmq.read_with_poll('{slug}', 30, 1, 5, 50)");
    let message = text(worker, &messages).await;
    let worker_id = uuid::Uuid::new_v4();
    worker
        .batch_execute(&format!(
            "insert into pgflow.workers (worker_id, queue_name, function_name) values ('{worker_id}', '{slug}', 'test') on conflict do nothing"
        ))
        .await
        .unwrap();
    worker
        .batch_execute(&format!(
            "select pgflow.start_tasks('{slug}', array[{message}]::bigint[], '{worker_id}')"
        ))
        .await
        .unwrap();
    worker
        .batch_execute(&format!(
            "select pgflow.complete_task('{run}', 'hello', 0, '\"hi\"'::jsonb)"
        ))
        .await
        .unwrap();
}

// ---- hearing ----

async fn event(hearing: &mut Hearing) -> Value {
    serde_json::from_str(hearing.notification().await.payload()).unwrap()
}

fn notifications(hearing: &mut Hearing) -> Vec<String> {
    let news = hearing
        .now()
        .into_iter()
        .filter_map(|news| match news.unwrap() {
            AsyncMessage::Notification(news) => {
                Some(format!("{}: {}", news.channel(), news.payload()))
            }
            _ => None,
        });
    news.collect()
}

/// Returns when all that was notified before has arrived: what comes last on a channel of its own is there.
async fn settle(client: &Client, hearing: &mut Hearing, direct: &Client) {
    client.batch_execute("listen settled").await.unwrap();
    direct.batch_execute("notify settled").await.unwrap();
    let heard = hearing.notification().await;
    assert_eq!(heard.channel(), "settled", "{heard:?}");
    client.batch_execute("unlisten settled").await.unwrap();
}

#[tokio::test]
async fn listeners_that_leave_are_forgotten_upstream() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let direct = db.connect().await;
    let (client, _hearing) = connect_hearing(&proxy.url()).await;
    client.batch_execute("listen brief").await.unwrap();
    drop(client);
    wait_until("the client is gone", PATIENCE, async || {
        proxy.metric("flowgate_clients") == 0
    })
    .await;
    direct.batch_execute("notify brief").await.unwrap();
    let (client, mut hearing) = connect_hearing(&proxy.url()).await;
    client.batch_execute("listen brief").await.unwrap();
    assert!(
        timeout(Duration::from_millis(50), hearing.next())
            .await
            .is_err(),
        "an old notification came"
    );
    proxy.shut_down().await;
}
