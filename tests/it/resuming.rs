//! `LISTEN "pgflow_events@<cursor>"` and `"pgflow:flow:<slug>@<cursor>"`: what a cursor has not seen comes, once, and then what is new.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;
use tokio_postgres::Client;

use crate::support::chance::{Chance, seed};
use crate::support::core::{Core, run};
use crate::support::pg::{TestDb, fresh_database};
use crate::support::proxy::{Hearing, PATIENCE, Proxy, connect_hearing, sqlstate, text};
use crate::support::wait::wait_until;

const ALL: &str = "pgflow_events";
const FLOW: &str = "pgflow:flow:f";

/// An event of a run of flow `f`, counted by `n`.
fn send(run_id: &str, n: i64) -> String {
    format!(
        "select realtime.send('{{\"n\": {n}, \"flow_slug\": \"f\", \"run_id\": \"{run_id}\"}}', 'told', 'pgflow:run:{run_id}', false)"
    )
}

async fn listen(client: &Client, channel: &str) -> Result<(), tokio_postgres::Error> {
    client.batch_execute(&format!("listen \"{channel}\"")).await
}

#[derive(Clone, Debug)]
struct Told {
    n: i64,
    run: String,
    seq: i64,
    cursor: String,
    payload: Value,
}

async fn told(hearing: &mut Hearing, channel: &str) -> Told {
    let news = hearing.notification().await;
    assert_eq!(news.channel(), channel, "{}", news.payload());
    let payload: Value = serde_json::from_str(news.payload()).unwrap();
    Told {
        n: payload["n"].as_i64().unwrap_or(-1),
        run: payload["run_id"].as_str().unwrap_or_default().to_owned(),
        seq: payload["seq"].as_i64().unwrap_or(-1),
        cursor: payload["cursor"].as_str().unwrap_or_default().to_owned(),
        payload,
    }
}

async fn resumed(proxy: &Proxy, channel: &str, cursor: &str) -> (Client, Hearing) {
    let (client, hearing) = proxy.connect_hearing().await;
    listen(&client, &format!("{channel}@{cursor}"))
        .await
        .unwrap();
    (client, hearing)
}

/// These and nothing else, each once, those of a run in order.
async fn hear(hearing: &mut Hearing, channel: &str, wanted: &BTreeSet<i64>) -> Vec<Told> {
    let mut heard = Vec::new();
    let mut left = wanted.clone();
    let mut last: BTreeMap<String, i64> = BTreeMap::new();
    while !left.is_empty() {
        let event = told(hearing, channel).await;
        assert!(left.remove(&event.n), "{channel}: {event:?} of {wanted:?}");
        let before = last.insert(event.run.clone(), event.seq);
        assert!(before.is_none_or(|seq| seq + 1 == event.seq), "{event:?}");
        heard.push(event);
    }
    heard
}

/// Transactions that overlap: which event belongs to which is chosen, and when each of them commits.
async fn overlapping(db: &TestDb, chance: &mut Chance, from: i64, count: i64) {
    let clients = [db.connect().await, db.connect().await, db.connect().await];
    let mut open = [false; 3];
    for n in from..from + count {
        let at = usize::try_from(chance.below(3)).unwrap();
        if !open[at] {
            clients[at].batch_execute("begin").await.unwrap();
            open[at] = true;
        }
        // A run each, or they would wait for one another.
        let sql = send(&run(u32::try_from(at).unwrap()), n);
        clients[at].batch_execute(&sql).await.unwrap();
        for (at, open) in open.iter_mut().enumerate() {
            if *open && chance.one_in(4) {
                clients[at].batch_execute("commit").await.unwrap();
                *open = false;
            }
        }
    }
    for client in clients {
        client.batch_execute("commit").await.unwrap();
    }
}

#[tokio::test]
async fn from_every_cursor_what_it_had_not_seen_comes_once_and_then_what_is_new() {
    const EVENTS: i64 = 60;
    let mut chance = Chance::of(seed(), 7);
    for channel in [ALL, FLOW] {
        let db = fresh_database().await;
        let proxy = Proxy::without_replica(&db, |_| {}).await;
        let (client, mut hearing) = proxy.connect_hearing().await;
        listen(&client, channel).await.unwrap();
        overlapping(&db, &mut chance, 0, EVENTS).await;
        let mut all: BTreeSet<i64> = (0..EVENTS).collect();
        let heard = hear(&mut hearing, channel, &all).await;
        let direct = db.connect().await;
        for at in (0..heard.len()).step_by(3) {
            let seen: BTreeSet<i64> = heard[..=at].iter().map(|event| event.n).collect();
            let (client, mut hearing) = resumed(&proxy, channel, &heard[at].cursor).await;
            let wanted: BTreeSet<i64> = all.difference(&seen).copied().collect();
            let again = hear(&mut hearing, channel, &wanted).await;
            // The channel once more, from what came by resuming: that follows again.
            if !again.is_empty() {
                let at = chance.index(again.len());
                let rest: BTreeSet<i64> = again[at + 1..].iter().map(|event| event.n).collect();
                let name = format!("{channel}@{}", again[at].cursor);
                listen(&client, &name).await.unwrap();
                hear(&mut hearing, channel, &rest).await;
            }
            // Nothing came twice, or it would come now.
            let next = EVENTS + i64::try_from(at).unwrap();
            direct.batch_execute(&send(&run(9), next)).await.unwrap();
            let last = told(&mut hearing, channel).await;
            assert_eq!(last.n, next, "{last:?}");
            all.insert(next);
        }
        proxy.shut_down().await;
    }
}

#[tokio::test]
async fn what_commits_late_under_an_early_id_is_not_passed_over() {
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, |_| {}).await;
    let (client, mut hearing) = proxy.connect_hearing().await;
    listen(&client, ALL).await.unwrap();
    let (late, direct) = (db.connect().await, db.connect().await);
    late.batch_execute("begin").await.unwrap();
    late.batch_execute(&send(&run(1), 1)).await.unwrap();
    late.batch_execute(&send(&run(1), 2)).await.unwrap();
    let both = format!("begin; {}; {}; commit", send(&run(2), 3), send(&run(2), 4));
    direct.batch_execute(&both).await.unwrap();
    let early = hear(&mut hearing, ALL, &[3, 4].into()).await;
    let (_pending, mut pending) = resumed(&proxy, ALL, &early[0].cursor).await;
    hear(&mut pending, ALL, &[4].into()).await;
    late.batch_execute("commit").await.unwrap();
    hear(&mut pending, ALL, &[1, 2].into()).await;
    for (from, wanted) in [(1, &[1, 2][..]), (0, &[1, 2, 4])] {
        let (_client, mut hearing) = resumed(&proxy, ALL, &early[from].cursor).await;
        let wanted = wanted.iter().copied().collect();
        let again = hear(&mut hearing, ALL, &wanted).await;
        // From the middle of what came late: what had been told before it is not told again.
        let late = again.iter().find(|event| event.n == 1).unwrap();
        let (_client, mut hearing) = resumed(&proxy, ALL, &late.cursor).await;
        let first = told(&mut hearing, ALL).await;
        assert_eq!(first.n, 2, "{first:?}");
    }
    proxy.shut_down().await;
}

#[tokio::test]
async fn transactions_that_draw_their_ids_out_of_order_leave_no_gap() {
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, |_| {}).await;
    let (client, mut hearing) = proxy.connect_hearing().await;
    listen(&client, ALL).await.unwrap();
    let (old, direct) = (db.connect().await, db.connect().await);
    old.batch_execute("begin; select pg_current_xact_id()")
        .await
        .unwrap();
    direct.batch_execute(&send(&run(1), 1)).await.unwrap();
    let first = told(&mut hearing, ALL).await;
    direct.batch_execute(&send(&run(1), 2)).await.unwrap();
    old.batch_execute(&send(&run(2), 3)).await.unwrap();
    old.batch_execute("commit").await.unwrap();
    let (_client, mut resumed) = resumed(&proxy, ALL, &first.cursor).await;
    hear(&mut resumed, ALL, &[2, 3].into()).await;
    proxy.shut_down().await;
}

#[tokio::test]
async fn what_is_far_behind_comes_page_by_page_while_others_are_told_at_once() {
    const EVENTS: i64 = 1_700;
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, |config| {
        config.events.queue = 64.try_into().unwrap();
    })
    .await;
    let (client, mut hearing) = proxy.connect_hearing().await;
    listen(&client, FLOW).await.unwrap();
    let direct = db.connect().await;
    direct.batch_execute(&send(&run(1), 0)).await.unwrap();
    let start = told(&mut hearing, FLOW).await.cursor;
    client.batch_execute("unlisten *").await.unwrap();
    // One transaction each.
    let many = format!(
        "do $$ begin for i in 1..{EVENTS} loop perform realtime.send(jsonb_build_object('n', i, 'flow_slug', 'f', 'run_id', '{}'), \
         'told', 'pgflow:run:{}', false); commit; end loop; end $$",
        run(1),
        run(1)
    );
    direct.batch_execute(&many).await.unwrap();
    let (_client, mut resumed) = resumed(&proxy, FLOW, &start).await;
    let all = (1..=EVENTS).collect();
    hear(&mut resumed, FLOW, &all).await;
    assert!(proxy.metric("flowgate_event_replay_reads_total") >= 4);
    assert_eq!(proxy.metric("flowgate_event_gaps_total"), 0);
    direct.batch_execute(&send(&run(1), 9_999)).await.unwrap();
    assert_eq!(told(&mut resumed, FLOW).await.n, 9_999);
    proxy.shut_down().await;
}

#[tokio::test]
async fn nothing_is_lost_to_a_client_that_resumes_while_listeners_are_killed() {
    const EVENTS: i64 = 600;
    let db = fresh_database().await;
    let (one, other) = (
        Proxy::without_replica(&db, |_| {}).await,
        Proxy::without_replica(&db, |_| {}).await,
    );
    let writers = async {
        let mut chance = Chance::of(seed(), 8);
        let killer = db.connect().await;
        for from in (0..EVENTS).step_by(30) {
            overlapping(&db, &mut chance, from, 30).await;
            if chance.one_in(3) {
                let kill = "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() \
                            and application_name = 'flowgate events'";
                killer.batch_execute(kill).await.unwrap();
            }
        }
    };
    let follower = async {
        let mut chance = Chance::of(seed(), 9);
        let (client, mut hearing) = one.connect_hearing().await;
        listen(&client, ALL).await.unwrap();
        let mut session = client;
        let (mut heard, mut last) = (BTreeSet::new(), BTreeMap::new());
        while heard.len() < EVENTS as usize {
            let event = told(&mut hearing, ALL).await;
            let before: i64 = last.get(&event.run).copied().unwrap_or(0);
            assert!(event.seq <= before + 1, "{event:?} after {before}");
            last.insert(event.run.clone(), before.max(event.seq));
            heard.insert(event.n);
            // Elsewhere, too: what a cursor says holds for any Flowgate.
            if chance.one_in(20) {
                let proxy = *chance.pick(&[&one, &other]);
                (session, hearing) = resumed(proxy, ALL, &event.cursor).await;
            }
        }
        drop(session);
    };
    let started = async {
        listening(&one).await;
        writers.await;
    };
    tokio::join!(started, follower);
    one.shut_down().await;
    other.shut_down().await;
}

async fn listening(proxy: &Proxy) {
    wait_until("somebody listens", PATIENCE, async || {
        proxy.metric("flowgate_event_outbox_reads_total") > 0
    })
    .await;
}

#[tokio::test]
async fn a_gap_is_announced_where_the_outbox_was_dropped_or_is_another() {
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, |_| {}).await;
    let direct = db.connect().await;
    let (client, mut hearing) = proxy.connect_hearing().await;
    listen(&client, FLOW).await.unwrap();
    direct.batch_execute(&send(&run(1), 1)).await.unwrap();
    let seen = told(&mut hearing, FLOW).await;
    let id: i64 = seen.cursor.split('-').next().unwrap().parse().unwrap();
    direct.batch_execute(&send(&run(1), 2)).await.unwrap();
    direct
        .batch_execute("delete from flowgate.event")
        .await
        .unwrap();
    direct.batch_execute(&send(&run(2), 3)).await.unwrap();
    let (_client, mut again) = resumed(&proxy, FLOW, &seen.cursor).await;
    let gap = told(&mut again, FLOW).await.payload;
    let wanted = |from: i64, to: Value| serde_json::json!({"event_type": "gap", "flow_slug": "f", "from": from.to_string(), "to": to});
    assert_eq!(gap, wanted(id + 1, Value::from((id + 1).to_string())));
    assert_eq!(told(&mut again, FLOW).await.n, 3);
    // Of a server whose history has more transactions than this one's.
    let foreign = "5-900000000:900000000:-900000001:900000001:";
    let (_client, mut again) = resumed(&proxy, FLOW, foreign).await;
    let gap = told(&mut again, FLOW).await.payload;
    assert_eq!(gap, wanted(6, Value::Null));
    direct.batch_execute(&send(&run(2), 4)).await.unwrap();
    assert_eq!(told(&mut again, FLOW).await.n, 4);
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_long_cursor_is_read_whole_and_left_by_any_of_its_names() {
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, |_| {}).await;
    let direct = db.connect().await;
    let (client, mut hearing) = proxy.connect_hearing().await;
    listen(&client, ALL).await.unwrap();
    // A snapshot names all that are in progress.
    let mut open = Vec::new();
    for _ in 0..20 {
        let one = db.connect().await;
        one.batch_execute("begin; select pg_current_xact_id()")
            .await
            .unwrap();
        open.push(one);
    }
    for n in 1..=3 {
        direct.batch_execute(&send(&run(1), n)).await.unwrap();
    }
    let heard = hear(&mut hearing, ALL, &[1, 2, 3].into()).await;
    let name = format!("{ALL}@{}", heard[0].cursor);
    assert!(name.len() > 100, "{name}");
    let channels = "select coalesce(string_agg(c, ' '), '') from pg_listening_channels() c";
    let left: [&[&str]; 4] = [
        &["unlisten \"{}\""],
        &["unlisten pgflow_events"],
        &["begin", "unlisten \"{}\"", "commit"],
        &["begin; unlisten \"{}\"; commit"],
    ];
    let joined: [&[&str]; 4] = [
        &["listen \"{}\""],
        &["prepared"],
        &["begin", "listen \"{}\"", "commit"],
        &["begin; listen \"{}\"; listen elsewhere; commit"],
    ];
    for (join, leave) in joined.into_iter().zip(left) {
        let (client, mut hearing) = proxy.connect_hearing().await;
        let play = async |script: &[&str]| {
            for sql in script {
                if *sql == "prepared" {
                    let listen = client.prepare(&format!("listen \"{name}\"")).await.unwrap();
                    client.execute(&listen, &[]).await.unwrap();
                } else {
                    client
                        .batch_execute(&sql.replace("{}", &name))
                        .await
                        .unwrap();
                }
            }
        };
        play(join).await;
        hear(&mut hearing, ALL, &[2, 3].into()).await;
        let listed = text(&client, channels).await;
        assert!(
            listed.split(' ').any(|name| name == ALL),
            "{join:?}: {listed}"
        );
        // What is undone was not done.
        for undone in ["begin", "savepoint s"] {
            client.batch_execute(undone).await.unwrap();
        }
        play(&["unlisten \"{}\"", "rollback to s", "commit"]).await;
        play(&["begin", "unlisten \"{}\"", "rollback"]).await;
        let listed = text(&client, channels).await;
        assert!(
            listed.split(' ').any(|name| name == ALL),
            "{join:?}: {listed}"
        );
        play(leave).await;
        play(&["unlisten elsewhere"]).await;
        assert_eq!(text(&client, channels).await, "", "{leave:?}");
    }
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_malformed_cursor_is_refused_and_costs_nobody_anything() {
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, |_| {}).await;
    let direct = db.connect().await;
    let (client, mut hearing) = proxy.connect_hearing().await;
    listen(&client, ALL).await.unwrap();
    for bad in [
        "",
        "1",
        "yesterday",
        "1-1:1:",
        "-1-9:9:-9:9:",
        "1-9:9:-9:9:-",
        "1-9:9:-9:9:@2",
        "1-0:0:-9:9:",
        "1-5:9:7,6-9:9:",
        "1-5:9:9-9:9:",
        "1-5:9:5,-9:9:",
        "1-5:9:08-9:9:",
        "1-9:x:-9:9:",
        "99999999999999999999-9:9:-9:9:",
    ] {
        for channel in [ALL, FLOW] {
            let name = format!("{channel}@{bad}");
            assert_eq!(sqlstate(listen(&client, &name).await), "22023", "{name}");
            let prepared = client.prepare(&format!("listen \"{name}\"")).await.unwrap();
            let outcome = client.execute(&prepared, &[]).await;
            assert_eq!(sqlstate(outcome), "22023", "{name}");
        }
    }
    // Well formed, and of no snapshot there ever was.
    for odd in [
        "9-3:3:-4:9:4,5,6",
        "0-18446744073709551614:18446744073709551615:-1:1:",
        "7-1:1:-1:1:",
    ] {
        let (_client, mut hearing) = resumed(&proxy, FLOW, odd).await;
        direct.batch_execute(&send(&run(1), 1)).await.unwrap();
        while told(&mut hearing, FLOW).await.n != 1 {}
    }
    direct.batch_execute(&send(&run(1), 2)).await.unwrap();
    hear_last(&mut hearing, 2).await;
    assert_eq!(proxy.metric("flowgate_event_listener_lost_total"), 0);
    proxy.shut_down().await;
}

async fn hear_last(hearing: &mut Hearing, n: i64) {
    while told(hearing, ALL).await.n != n {}
}

#[tokio::test]
async fn who_may_not_see_a_run_does_not_see_it_by_a_cursor_either() {
    let core = Core::new().await;
    core.define("flow f\n a").await;
    let [none, some] = ["none", "some"].map(|role| format!("{}_{role}", core.db.name));
    core.run(&format!(
        "create role {none} login; create role {some} login; grant usage on schema pgflow to {none}, {some}; \
         grant select on pgflow.runs to {some}; alter table pgflow.runs enable row level security; \
         create policy mine on pgflow.runs for select using (input ->> 'of' = right(current_user, 4))"
    ))
    .await;
    let proxy = Proxy::without_replica(&core.db, |_| {}).await;
    let beginning = "0-3:3:-3:3:";
    for n in 1..=6 {
        let of = if n % 2 == 0 { "some" } else { "else" };
        core.start_flow("f", &format!("{{\"of\": \"{of}\"}}"), n)
            .await;
    }
    let of_role = |role: &str| {
        proxy
            .url()
            .replace(&format!("//{}@", proxy.user), &format!("//{role}@"))
    };
    for channel in [ALL, FLOW] {
        let name = format!("{channel}@{beginning}");
        let (refused, _hearing) = connect_hearing(&of_role(&none)).await;
        assert_eq!(sqlstate(listen(&refused, &name).await), "42501");
        let (client, mut hearing) = connect_hearing(&of_role(&some)).await;
        listen(&client, &name).await.unwrap();
        for n in [2, 4, 6] {
            for seq in 1..=2 {
                let event = told(&mut hearing, channel).await;
                assert_eq!((event.run.as_str(), event.seq), (&*run(n), seq));
            }
        }
    }
    proxy.shut_down().await;
}
