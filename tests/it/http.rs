//! The HTTP plane: who is let in, what JSON says of runs, and streams that lose nothing and tell nobody what they may not see.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_postgres::Client;

use crate::support::core::{Core, run};
use crate::support::http::{
    EventSource, KEY, Message, Roles, ask, bearer, get, now, serving, token,
};
use crate::support::proxy::{PATIENCE, Proxy, text};
use crate::support::wait::wait_until;

const MINUTE: Duration = Duration::from_secs(60);
const FLOW: &str = "flow f
                    a
                    b < a";

struct Stage {
    core: Core,
    roles: Roles,
    proxy: Proxy,
    at: SocketAddr,
}

async fn stage() -> Stage {
    stage_with(|_| {}).await
}

async fn stage_with(tweak: impl FnOnce(&mut flowgate::config::Config)) -> Stage {
    let core = Core::new().await;
    core.define(FLOW).await;
    let roles = Roles::make(&core.db, &core.client).await;
    let (proxy, at) = serving(&core.db, &roles, tweak).await;
    Stage {
        core,
        roles,
        proxy,
        at,
    }
}

/// A run of `f` from its start to its end, through direct calls.
async fn work_off(core: &Core, n: u32) {
    for step in ["a", "b"] {
        core.take("f").await;
        core.complete(n, step, 0, "{}").await;
    }
}

fn seqs(messages: &[Message]) -> Vec<i64> {
    let seq = |message: &Message| message.data["seq"].as_i64().unwrap();
    messages.iter().map(seq).collect()
}

async fn take(stream: &mut EventSource, count: usize) -> Vec<Message> {
    let mut messages = Vec::new();
    while messages.len() < count {
        messages.push(stream.next().await.expect("the stream goes on"));
    }
    messages
}

#[tokio::test]
async fn who_is_nobody_is_refused_and_who_may_not_is_told_so() {
    let stage = stage().await;
    let (at, roles) = (stage.at, &stage.roles);
    for path in ["/runs", "/flows", "/events", "/rest/v1/flows"] {
        let refused = get(at, path, &[]).await;
        assert_eq!(refused.refusal(), "401 PGRST301", "{path}");
        assert_eq!(refused.headers["www-authenticate"], "Bearer");
        let refused = get(at, path, &["apikey: wrong"]).await;
        assert_eq!(refused.refusal(), "401 PGRST301", "{path}");
        let expired = token(&json!({"role": roles.reader, "exp": now() - 100}));
        let refused = get(at, path, &[&format!("authorization: Bearer {expired}")]).await;
        assert_eq!(refused.refusal(), "401 PGRST303", "{path}");
        let refused = get(at, path, &[&bearer("no such role")]).await;
        assert_eq!(refused.refusal(), "403 42501", "{path}");
        let refused = get(at, path, &[&bearer(&roles.nobody)]).await;
        assert_eq!(refused.refusal(), "403 42501", "{path}");
        // The word that would make it the control role itself.
        let refused = get(at, path, &[&bearer("none")]).await;
        assert_eq!(refused.refusal(), "403 42501", "{path}");
    }
    // In the URL, for those who set no headers; and what has none of it stays open.
    assert_eq!(
        get(at, &format!("/flows?apikey={KEY}"), &[]).await.status,
        200
    );
    let token = bearer(&roles.reader);
    let token = token.rsplit(' ').next().unwrap();
    assert_eq!(
        get(at, &format!("/runs?access_token={token}"), &[])
            .await
            .status,
        200
    );
    assert_eq!(get(at, "/healthz", &[]).await.body, "ok\n");
    // A viewer may look at what it knows, and lists nothing.
    let key = format!("apikey: {KEY}");
    assert_eq!(get(at, "/runs", &[&key]).await.refusal(), "403 42501");
    assert_eq!(get(at, "/events", &[&key]).await.refusal(), "403 42501");
    stage.core.start_flow("f", "{}", 1).await;
    let seen = get(at, &format!("/runs/{}", run(1)), &[&key]).await;
    assert_eq!(seen.json()["run"]["status"], "started");
    assert_eq!(seen.json()["tasks"], json!([]));
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn strangers_come_in_where_there_is_a_role_for_them() {
    let core = Core::new().await;
    core.define(FLOW).await;
    let roles = Roles::make(&core.db, &core.client).await;
    let (proxy, at) = serving(&core.db, &roles, |config| {
        config.http.anon_role = Some(roles.viewer.clone());
        config.http.cors = vec!["https://app.example".to_owned()];
    })
    .await;
    assert_eq!(
        get(at, "/flows", &[]).await.json()["flows"][0]["flow_slug"],
        "f"
    );
    // What it may not, it might after a login.
    assert_eq!(get(at, "/runs", &[]).await.refusal(), "401 42501");
    let asked = [
        "origin: https://app.example",
        "access-control-request-headers: apikey, x-odd",
    ];
    let preflight = ask(at, "OPTIONS", "/rest/v1/rpc/x", &asked, "").await;
    assert_eq!(preflight.status, 200);
    assert_eq!(
        preflight.headers["access-control-allow-origin"],
        "https://app.example"
    );
    assert_eq!(
        preflight.headers["access-control-allow-headers"],
        "apikey, x-odd"
    );
    let refused = get(at, "/rest/v1/none", &["origin: https://app.example"]).await;
    assert_eq!(
        refused.headers["access-control-allow-origin"],
        "https://app.example"
    );
    let other = get(at, "/flows", &["origin: https://evil.example"]).await;
    assert!(!other.headers.contains_key("access-control-allow-origin"));
    proxy.shut_down().await;
}

#[tokio::test]
async fn json_says_what_a_run_and_a_flow_are() {
    let stage = stage().await;
    let (core, at) = (&stage.core, stage.at);
    let reader = bearer(&stage.roles.reader);
    let headers = [reader.as_str()];
    for n in 1..=5 {
        core.start_flow("f", "{\"n\": 1.00}", n).await;
    }
    work_off(core, 2).await;

    let shown = get(at, &format!("/runs/{}", run(2)), &headers).await.json();
    assert_eq!(shown["run"]["status"], "completed");
    assert_eq!(
        shown["run"]["input"].to_string(),
        "{\"n\":1.00}".replace("1.00", "1.0")
    );
    let steps: Vec<_> = shown["steps"]
        .as_array()
        .unwrap()
        .iter()
        .map(|step| {
            (
                step["step_slug"].as_str().unwrap(),
                step["step_index"].as_i64(),
                &step["step_type"],
            )
        })
        .collect();
    assert_eq!(
        steps,
        [
            ("a", Some(0), &json!("single")),
            ("b", Some(1), &json!("single"))
        ]
    );
    assert_eq!(shown["tasks"][1]["step_slug"], "b");
    assert_eq!(shown["tasks"][1]["output"], json!({}));
    assert_eq!(shown["deps"], json!([{"step_slug": "b", "dep_slug": "a"}]));
    assert_eq!(shown["seq"], 6);

    let mut found = Vec::new();
    let mut next = String::new();
    loop {
        let page = get(at, &format!("/runs?limit=2&before={next}"), &headers)
            .await
            .json();
        for run in page["runs"].as_array().unwrap() {
            found.push(run["run_id"].as_str().unwrap().to_owned());
        }
        match page["next"].as_str() {
            Some(more) => next = more.to_owned(),
            None => break,
        }
    }
    let wanted: Vec<_> = (1..=5).rev().map(run).collect();
    assert_eq!(found, wanted);
    let some = get(at, "/runs?status=completed&flow=f", &headers)
        .await
        .json();
    assert_eq!(some["runs"].as_array().unwrap().len(), 1);
    assert_eq!(some["next"], json!(null));

    let flows = get(at, "/flows", &headers).await.json();
    assert_eq!(
        flows["flows"][0]["runs"],
        json!({"started": 4, "completed": 1})
    );
    let flow = get(at, "/flows/f", &headers).await.json();
    assert_eq!(flow["steps"][1]["step_slug"], "b");
    assert_eq!(flow["deps"][0]["dep_slug"], "a");

    for (path, refusal) in [
        (format!("/runs/{}", run(9)), "404 P0002"),
        ("/runs/x".to_owned(), "400 22P02"),
        ("/flows/none".to_owned(), "404 P0002"),
        ("/flows/a-b".to_owned(), "400 22023"),
        ("/runs?limit=0".to_owned(), "400 22023"),
        ("/runs?limit=x".to_owned(), "400 22023"),
        ("/runs?status=odd".to_owned(), "400 22023"),
        ("/runs?before=odd".to_owned(), "400 22023"),
        (format!("/runs?before=9_{}", run(1)), "400 22007"),
        ("/runs?flow=%27".to_owned(), "400 22023"),
        ("/events/runs/x".to_owned(), "400 22P02"),
        (format!("/events/runs/{}?cursor=x", run(1)), "400 22023"),
        (format!("/events/runs/{}?snapshot=1", run(9)), "404 P0002"),
        ("/events?cursor=12".to_owned(), "400 22023"),
        ("/events?snapshot=1".to_owned(), "400 22023"),
    ] {
        assert_eq!(get(at, &path, &headers).await.refusal(), refusal, "{path}");
    }
    let packed = get(at, "/flows", &[&reader, "accept-encoding: identity"]).await;
    assert!(!packed.headers.contains_key("content-encoding"));
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn a_run_is_followed_and_resumed_from_any_event() {
    let stage = stage().await;
    let (core, at) = (&stage.core, stage.at);
    let key = format!("apikey: {KEY}");
    let path = format!("/events/runs/{}", run(1));
    let mut stream = EventSource::open(at, &path, &[&key]).await;
    core.start_flow("f", "{}", 1).await;
    work_off(core, 1).await;
    let all = take(&mut stream, 6).await;
    assert_eq!(seqs(&all), [1, 2, 3, 4, 5, 6]);
    let names: Vec<_> = all
        .iter()
        .map(|message| message.data["event_type"].as_str().unwrap())
        .collect();
    assert_eq!(names[0], "run:started");
    assert_eq!(names[5], "run:completed");
    assert!(all.iter().all(|message| message.event == "message"));
    for (before, message) in all.iter().enumerate() {
        assert_eq!(message.id, (before + 1).to_string());
        let header = format!("last-event-id: {}", message.id);
        // The header counts more than the URL, as of a browser that comes back to where it began.
        let path = format!("{path}?snapshot=1&cursor=0");
        let mut again = EventSource::open(at, &path, &[&key, &header]).await;
        let rest = take(&mut again, 5 - before).await;
        assert_eq!(seqs(&rest), (before as i64 + 2..=6).collect::<Vec<_>>());
    }
    let mut again = EventSource::open(at, &format!("{path}?cursor=0"), &[&key]).await;
    assert_eq!(seqs(&take(&mut again, 6).await), [1, 2, 3, 4, 5, 6]);
    let mut again = EventSource::open(at, &format!("{path}?snapshot=1"), &[&key]).await;
    let first = again.next().await.unwrap();
    assert_eq!((first.event.as_str(), first.id.as_str()), ("snapshot", "6"));
    assert_eq!(first.data["run"]["status"], "completed");
    // A cursor from a history that is no more.
    let mut lost = EventSource::open(at, &format!("{path}?cursor=99"), &[&key]).await;
    let gap = lost.next().await.unwrap();
    assert_eq!(
        gap.data,
        json!({"event_type": "gap", "run_id": run(1), "from": 7, "to": 99})
    );
    stage.proxy.shut_down().await;
}

/// Several sessions start and work off runs until told to stop.
async fn load(core: &Core, until: tokio::sync::watch::Receiver<bool>) {
    let worker = async |client: Client| {
        while !*until.borrow() {
            let work = "select pgflow.start_flow('f', '{}'); \
                        select pgflow.complete_task(t.run_id, t.step_slug, t.task_index, '{}') from pgflow.start_tasks('f', \
                        array(select msg_id from pgmq.read('f', 600, 5)), 'aaaaaaaa-0000-4000-8000-000000000001') t";
            client.batch_execute(work).await.unwrap();
        }
    };
    let mut clients = Vec::new();
    for _ in 0..4 {
        clients.push(core.db.connect().await);
    }
    join_all(clients.into_iter().map(worker)).await;
}

#[tokio::test]
async fn from_the_snapshot_on_nothing_is_missing_and_nothing_comes_twice() {
    let stage = stage().await;
    let (core, at) = (&stage.core, stage.at);
    let key = format!("apikey: {KEY}");
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let follow = async {
        let client = core.db.connect().await;
        let newest = "select run_id from pgflow.runs where status = 'started' order by started_at desc limit 1";
        for round in 0..60 {
            let id = wait_for_run(&client, newest).await;
            let path = format!("/events/runs/{id}?snapshot=1");
            let mut stream = EventSource::open(at, &path, &[&key]).await;
            let first = stream.next().await.unwrap();
            assert_eq!(first.event, "snapshot");
            let mut seq = first.data["seq"].as_i64().unwrap();
            let mut completed: BTreeSet<String> = first.data["steps"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|step| step["status"] == "completed")
                .map(|step| step["step_slug"].as_str().unwrap().to_owned())
                .collect();
            let mut status = first.data["run"]["status"].as_str().unwrap().to_owned();
            while status == "started" {
                let message = stream.next().await.unwrap();
                seq += 1;
                assert_eq!(message.data["seq"], seq, "round {round}: {message:?}");
                match message.data["event_type"].as_str().unwrap() {
                    // What the snapshot had is not told again.
                    "step:completed" => {
                        let step = message.data["step_slug"].as_str().unwrap().to_owned();
                        assert!(completed.insert(step), "round {round}: {message:?}");
                    }
                    "run:completed" => status = "completed".to_owned(),
                    _ => {}
                }
            }
            assert_eq!((completed.len(), seq), (2, 6), "round {round}");
        }
        stop.send_replace(true);
    };
    tokio::join!(load(core, stopped), follow);
    stage.proxy.shut_down().await;
}

async fn wait_for_run(client: &Client, sql: &str) -> String {
    let mut id = String::new();
    wait_until("a run", PATIENCE, async || {
        id = text(client, sql).await;
        !id.is_empty()
    })
    .await;
    id
}

/// By run, the `seq`s that came.
type Told = BTreeMap<String, Vec<i64>>;

fn note(told: &mut Told, messages: &[Message]) -> usize {
    for message in messages {
        let run = message.data["run_id"].as_str();
        let run = run.unwrap_or_else(|| panic!("{message:?}")).to_owned();
        told.entry(run)
            .or_default()
            .push(message.data["seq"].as_i64().unwrap());
    }
    messages.len()
}

#[tokio::test]
async fn all_runs_are_followed_over_reconnects_without_a_miss_or_a_double() {
    let stage = stage().await;
    let (core, at) = (&stage.core, stage.at);
    let reader = bearer(&stage.roles.reader);
    let (stop, stopped) = tokio::sync::watch::channel(false);
    // In force before anything happens.
    let all = EventSource::open(at, "/events", &[&reader]).await;
    let flow = EventSource::open(at, "/events/flows/f", &[&reader]).await;
    let told = || (Told::new(), 0);
    let mut follows = [("/events", all, told()), ("/events/flows/f", flow, told())];
    // Round by round together: who is done and reads no more would be told of a gap.
    let both = async {
        for round in 0..40 {
            let once =
                async |(path, stream, (told, count)): &mut (&str, EventSource, (Told, usize))| {
                    *count += note(told, &take(stream, 7 + round % 5).await);
                    let last = format!("last-event-id: {}", stream.last_id);
                    *stream = EventSource::open(at, path, &[&reader, &last]).await;
                };
            join_all(follows.iter_mut().map(once)).await;
        }
        stop.send_replace(true);
    };
    tokio::join!(load(core, stopped), both);
    let sent = text(&core.client, "select count(*) from flowgate.event").await;
    let sent: usize = sent.parse().unwrap();
    for (_, mut stream, (mut told, count)) in follows {
        note(&mut told, &take(&mut stream, sent - count).await);
        for (run, seqs) in &told {
            let whole: Vec<i64> = (1..=seqs.len() as i64).collect();
            assert_eq!(*seqs, whole, "{run}");
        }
        assert_eq!(told.values().map(Vec::len).sum::<usize>(), sent);
    }
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn streams_go_on_while_the_listener_is_killed_again_and_again() {
    let stage = stage().await;
    let (core, at) = (&stage.core, stage.at);
    let reader = bearer(&stage.roles.reader);
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let mut stream = EventSource::open(at, "/events", &[&reader]).await;
    let mut told = Told::new();
    let mut count = 0;
    let kill = "select count(pg_terminate_backend(pid, 5000)) from pg_stat_activity \
                where application_name = 'flowgate events' and datname = current_database()";
    let killer = core.db.connect().await;
    let follow = async {
        for _ in 0..10 {
            count += note(&mut told, &take(&mut stream, 60).await);
            killer.batch_execute(kill).await.unwrap();
        }
        stop.send_replace(true);
    };
    tokio::join!(load(core, stopped), follow);
    let sent = text(&core.client, "select count(*) from flowgate.event").await;
    note(
        &mut told,
        &take(&mut stream, sent.parse::<usize>().unwrap() - count).await,
    );
    for (run, seqs) in &told {
        let whole: Vec<i64> = (1..=seqs.len() as i64).collect();
        assert_eq!(*seqs, whole, "{run}");
    }
    assert!(stage.proxy.metric("flowgate_event_listener_lost_total") > 0);
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn what_committed_late_under_an_early_id_is_not_passed_over_by_a_resume() {
    let stage = stage().await;
    let (core, at) = (&stage.core, stage.at);
    let reader = bearer(&stage.roles.reader);
    let mut stream = EventSource::open(at, "/events", &[&reader]).await;
    let late = core.db.connect().await;
    let start = |n| format!("select pgflow.start_flow('f', '{{}}', '{}')", run(n));
    late.batch_execute(&format!("begin; {}", start(1)))
        .await
        .unwrap();
    core.client.batch_execute(&start(2)).await.unwrap();
    let early = take(&mut stream, 2).await;
    assert!(early.iter().all(|message| message.data["run_id"] == run(2)));
    drop(stream);
    late.batch_execute("commit").await.unwrap();
    // After the second of the two, and after the first.
    for (from, wanted) in [(1, vec![1, 2]), (0, vec![1, 2, 2])] {
        let last = format!("last-event-id: {}", early[from].id);
        let mut again = EventSource::open(at, "/events", &[&reader, &last]).await;
        let mut seqs = seqs(&take(&mut again, wanted.len()).await);
        seqs.sort_unstable();
        assert_eq!(seqs, wanted);
    }
    // From the middle of what came late: what had been told before it is not told again.
    let last = format!("last-event-id: {}", early[1].id);
    let mut again = EventSource::open(at, "/events", &[&reader, &last]).await;
    let first = again.next().await.unwrap();
    assert_eq!(
        (&first.data["run_id"], &first.data["seq"]),
        (&json!(run(1)), &json!(1))
    );
    let last = format!("last-event-id: {}", first.id);
    let mut again = EventSource::open(at, "/events", &[&reader, &last]).await;
    let second = again.next().await.unwrap();
    assert_eq!(
        (&second.data["run_id"], &second.data["seq"]),
        (&json!(run(1)), &json!(2))
    );
    core.client.batch_execute(&start(3)).await.unwrap();
    assert_eq!(again.next().await.unwrap().data["run_id"], run(3));
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn a_gap_is_announced_where_the_outbox_was_dropped() {
    let stage = stage().await;
    let (core, at) = (&stage.core, stage.at);
    let reader = bearer(&stage.roles.reader);
    core.start_flow("f", "{}", 1).await;
    let mut stream = EventSource::open(at, "/events", &[&reader]).await;
    core.start_flow("f", "{}", 2).await;
    let seen = take(&mut stream, 2).await;
    drop(stream);
    core.start_flow("f", "{}", 3).await;
    core.run("delete from flowgate.event").await;
    core.start_flow("f", "{}", 4).await;
    let last = format!("last-event-id: {}", seen[1].id);
    let mut again = EventSource::open(at, "/events", &[&reader, &last]).await;
    let gap = again.next().await.unwrap().data;
    assert_eq!(gap["event_type"], "gap");
    assert_eq!(
        gap["from"],
        (seen[1].data["cursor"]
            .as_str()
            .unwrap()
            .parse::<i64>()
            .unwrap()
            + 1)
        .to_string()
    );
    assert_eq!(again.next().await.unwrap().data["run_id"], run(4));
    // Of a run: told by its seq.
    let path = format!("/events/runs/{}?cursor=0", run(3));
    let mut run3 = EventSource::open(at, &path, &[&reader]).await;
    assert_eq!(
        run3.next().await.unwrap().data,
        json!({"event_type": "gap", "run_id": run(3), "from": 1, "to": 2})
    );
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn a_policy_hides_runs_from_every_stream_and_list() {
    let stage = stage().await;
    let (core, at) = (&stage.core, stage.at);
    core.define("flow secret\n x").await;
    let reader = &stage.roles.reader;
    core.run(&format!(
        "alter table pgflow.runs enable row level security; \
         create policy mine on pgflow.runs for select to {reader} \
         using (flow_slug = current_setting('request.jwt.claims')::json ->> 'flow')"
    ))
    .await;
    let claims = json!({"role": reader, "flow": "f", "exp": now() + 3600});
    let headers = [&*format!("authorization: Bearer {}", token(&claims))];
    let mut all = EventSource::open(at, "/events", &headers).await;
    let mut flow = EventSource::open(at, "/events/flows/f", &headers).await;
    let mut secret = EventSource::open(at, "/events/flows/secret", &headers).await;
    core.start_flow("secret", "{}", 1).await;
    core.start_flow("f", "{}", 2).await;
    for stream in [&mut all, &mut flow] {
        let heard = take(stream, 2).await;
        assert!(heard.iter().all(|message| message.data["run_id"] == run(2)));
    }
    assert_eq!(
        get(at, &format!("/runs/{}", run(1)), &headers).await.status,
        404
    );
    assert_eq!(
        get(at, &format!("/events/runs/{}", run(1)), &headers)
            .await
            .status,
        404
    );
    assert_eq!(
        get(at, &format!("/runs/{}", run(2)), &headers).await.status,
        200
    );
    let listed = get(at, "/runs", &headers).await.json();
    assert_eq!(listed["runs"].as_array().unwrap().len(), 1);
    // From the beginning: what is resumed with is sifted as well.
    let resumed = EventSource::open(at, "/events?cursor=0-3:3:-3:3:", &headers);
    let heard = take(&mut resumed.await, 2).await;
    assert!(heard.iter().all(|message| message.data["run_id"] == run(2)));
    stage.proxy.shut_down().await;
    assert!(secret.next().await.is_none(), "nothing, and then the end");
}

#[tokio::test]
async fn what_is_revoked_or_expires_ends_its_streams_and_nobody_elses() {
    let stage = stage_with(|config| config.http.recheck = Duration::from_millis(100)).await;
    let (core, at, roles) = (&stage.core, stage.at, &stage.roles);
    let path = format!("/events/runs/{}", run(1));
    let (viewer, reader) = (bearer(&roles.viewer), bearer(&roles.reader));
    let mut of_viewer = EventSource::open(at, &path, &[&viewer]).await;
    let mut of_reader = EventSource::open(at, &path, &[&reader]).await;
    let mut all = EventSource::open(at, "/events", &[&reader]).await;
    core.run(&format!(
        "revoke execute on function pgflow.get_run_with_states(uuid) from {}",
        roles.viewer
    ))
    .await;
    let last = of_viewer.next().await.unwrap();
    assert_eq!(
        (last.event.as_str(), &last.data["code"]),
        ("error", &json!("42501"))
    );
    assert!(of_viewer.next().await.is_none());
    assert_eq!(get(at, &path, &[&viewer]).await.status, 404);

    core.start_flow("f", "{}", 1).await;
    assert_eq!(seqs(&take(&mut of_reader, 2).await), [1, 2]);
    assert_eq!(seqs(&take(&mut all, 2).await), [1, 2]);
    core.run(&format!(
        "revoke select on pgflow.runs from {}",
        roles.reader
    ))
    .await;
    for stream in [&mut of_reader, &mut all] {
        let last = stream.next().await.unwrap();
        assert_eq!(
            (last.event.as_str(), &last.data["code"]),
            ("error", &json!("42501"))
        );
        assert!(stream.next().await.is_none());
    }
    // Beyond the grace that clocks are given, it has expired when the stream begins.
    core.run(&format!("grant select on pgflow.runs to {}", roles.reader))
        .await;
    let short = token(&json!({"role": roles.reader, "exp": now() - 5}));
    let short = format!("authorization: Bearer {short}");
    let mut expiring = EventSource::open(at, "/events", &[&short]).await;
    let last = expiring.next().await.unwrap();
    assert_eq!(last.data["code"], "PGRST303");
    assert!(expiring.next().await.is_none());
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn a_slow_reader_is_told_of_a_gap_and_holds_up_nobody() {
    let stage = stage_with(|config| config.events.queue = 16.try_into().unwrap()).await;
    let (core, at) = (&stage.core, stage.at);
    let reader = bearer(&stage.roles.reader);
    let path = format!("/events/runs/{}", run(1));
    let mut slow = EventSource::open(at, &path, &[&reader]).await;
    let mut slow_of_all = EventSource::open(at, "/events", &[&reader]).await;
    let mut quick = EventSource::open(at, &path, &[&reader]).await;
    core.start_flow("f", "{}", 1).await;
    // More than sockets hold.
    let event = format!(
        "select realtime.send(jsonb_build_object('event_type', 'step:started', 'step_slug', 'a', 'run_id', '{0}', \
         'blob', repeat('x', 100000)), 'step:a:started', 'pgflow:run:{0}')",
        run(1)
    );
    let mut heard = 2;
    assert_eq!(seqs(&take(&mut quick, 2).await), [1, 2]);
    for _ in 0..300 {
        core.run(&event).await;
        heard += 1;
        assert_eq!(quick.next().await.unwrap().data["seq"], heard);
    }
    let (mut gaps, mut last) = (0, 0);
    while last < heard {
        let message = slow.next().await.unwrap();
        if message.data["event_type"] == "gap" {
            assert_eq!(message.data["from"], last + 1);
            gaps += 1;
        } else {
            let seq = message.data["seq"].as_i64().unwrap();
            assert!(
                seq > last && (seq == last + 1 || gaps > 0),
                "{last} then {seq}"
            );
            last = seq;
        }
    }
    assert!(gaps > 0);
    loop {
        let message = slow_of_all.next().await.unwrap();
        if message.data["event_type"] == "gap" {
            assert!(message.data["to"].is_string());
            break;
        }
    }
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn a_thousand_followers_get_every_event_of_their_run() {
    let stage = stage_with(|config| config.http.max_connections = 1_100.try_into().unwrap()).await;
    let (core, at) = (&stage.core, stage.at);
    let key = format!("apikey: {KEY}");
    let mut streams = Vec::new();
    for n in 0..1_000 {
        let path = format!("/events/runs/{}", run(n % 10 + 1));
        streams.push(EventSource::open(at, &path, &[&key]).await);
    }
    assert_eq!(
        stage.proxy.metric("flowgate_http_streams{kind=\"sse\"}"),
        1_000
    );
    for n in 1..=10 {
        core.start_flow("f", "{}", n).await;
    }
    core.take("f").await;
    for step in ["a", "b"] {
        for n in 1..=10 {
            core.complete(n, step, 0, "{}").await;
        }
        core.take("f").await;
    }
    let all = streams
        .iter_mut()
        .map(async |stream| seqs(&take(stream, 6).await));
    for seqs in join_all(all).await {
        assert_eq!(seqs, [1, 2, 3, 4, 5, 6]);
    }
    drop(streams);
    wait_until("all are gone", PATIENCE, async || {
        stage.proxy.metric("flowgate_http_streams{kind=\"sse\"}") == 0
    })
    .await;
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn streams_end_cleanly_when_we_go() {
    let stage = stage().await;
    let reader = bearer(&stage.roles.reader);
    let path = format!("/events/runs/{}", run(1));
    let mut one = EventSource::open(stage.at, &path, &[&reader]).await;
    let mut all = EventSource::open(stage.at, "/events", &[&reader]).await;
    stage.core.start_flow("f", "{}", 1).await;
    assert_eq!(seqs(&take(&mut one, 2).await), [1, 2]);
    stage.proxy.shut_down().await;
    assert!(one.next().await.is_none());
    while all.next().await.is_some() {}
}

#[tokio::test]
async fn a_stream_begins_behind_what_was_asked_before_it_on_its_connection() {
    let stage = stage().await;
    stage.core.start_flow("f", "{}", 1).await;
    let mut socket = TcpStream::connect(stage.at).await.unwrap();
    // More than sockets hold, so that answers wait in the server when the stream is asked for.
    let pages = 400;
    let mut asked = "GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n".repeat(pages);
    let token = bearer(&stage.roles.reader);
    asked += &format!(
        "GET /events/runs/{}?cursor=0 HTTP/1.1\r\nhost: x\r\n{token}\r\n\r\n",
        run(1)
    );
    let (mut reader, mut writer) = socket.split();
    // Both ways at once: a server stops reading while nobody reads its answers.
    let listening = async {
        let mut heard = Vec::new();
        let mut seen = 0;
        loop {
            let count = reader.read_buf(&mut heard).await.unwrap();
            assert_ne!(count, 0, "cut after {seen} bytes");
            let end = &heard[seen..];
            if end.windows(11).any(|found| found == b"run:started") {
                return String::from_utf8(heard).unwrap();
            }
            seen = heard.len().saturating_sub(11);
        }
    };
    let (heard, ()) = timeout(MINUTE, async {
        tokio::join!(listening, async {
            writer.write_all(asked.as_bytes()).await.unwrap();
        })
    })
    .await
    .expect("all answers");
    let heads = heard.matches("HTTP/1.1 200 OK").count();
    assert_eq!(heads, pages + 1);
    let (before, stream) = heard.rsplit_once("HTTP/1.1 200 OK").unwrap();
    assert!(stream.contains("content-type: text/event-stream"));
    assert!(stream.contains("transfer-encoding: chunked") && stream.contains("\r\ndate: "));
    let (head, _) = stream.split_once("\r\n\r\n").unwrap();
    assert!(!head.contains("content-length"), "{head}");
    assert!(!before.contains("event-stream"));
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn a_stream_has_no_body_for_head_and_no_chunks_for_an_old_client() {
    let stage = stage().await;
    stage.core.start_flow("f", "{}", 1).await;
    let token = bearer(&stage.roles.reader);
    let path = format!("/events/runs/{}?cursor=0", run(1));
    let head = ask(stage.at, "HEAD", &path, &[&token], "").await;
    assert_eq!((head.status, head.body.as_str()), (200, ""));
    assert_eq!(
        head.headers["content-type"],
        "text/event-stream; charset=utf-8"
    );
    assert!(!head.headers.contains_key("content-length"));
    let mut old = TcpStream::connect(stage.at).await.unwrap();
    let asked = format!("GET {path} HTTP/1.0\r\n{token}\r\n\r\n");
    old.write_all(asked.as_bytes()).await.unwrap();
    let mut heard = Vec::new();
    timeout(MINUTE, async {
        while !heard.windows(11).any(|found| found == b"run:started") {
            assert_ne!(old.read_buf(&mut heard).await.unwrap(), 0);
        }
    })
    .await
    .expect("an event");
    let heard = String::from_utf8(heard).unwrap();
    let (head, body) = heard.split_once("\r\n\r\n").unwrap();
    assert!(!head.contains("transfer-encoding"), "{head}");
    assert!(!head.contains("content-length"), "{head}");
    assert!(body.starts_with("retry: 1000\n\nid: "), "{body}");
    // It is told apart from one that is idle: the server sees that it goes.
    drop(old);
    wait_until("the stream's end", MINUTE, async || {
        stage.proxy.metric("flowgate_http_streams{kind=\"sse\"}") == 0
    })
    .await;
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn who_talks_over_a_stream_is_cut_and_nothing_of_it_kept() {
    let stage = stage().await;
    stage.core.start_flow("f", "{}", 1).await;
    let token = bearer(&stage.roles.reader);
    let mut socket = TcpStream::connect(stage.at).await.unwrap();
    let path = format!("/events/runs/{}?cursor=0", run(1));
    let asked = format!("GET {path} HTTP/1.1\r\nhost: x\r\n{token}\r\n\r\n");
    socket.write_all(asked.as_bytes()).await.unwrap();
    let mut heard = Vec::new();
    timeout(MINUTE, async {
        while !heard.windows(11).any(|found| found == b"run:started") {
            assert_ne!(socket.read_buf(&mut heard).await.unwrap(), 0);
        }
        let words = vec![b'x'; 64 * 1024];
        while socket.write_all(&words).await.is_ok() {}
    })
    .await
    .expect("it is cut");
    wait_until("the stream's end", MINUTE, async || {
        stage.proxy.metric("flowgate_http_streams{kind=\"sse\"}") == 0
    })
    .await;
    let cut = "flowgate_http_streams_talked_over_total";
    assert_eq!(stage.proxy.metric(cut), 1);
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn a_crowd_that_comes_at_once_waits_for_connections_instead_of_being_refused() {
    let stage = stage_with(|config| {
        config.http.pool_size = 1.try_into().unwrap();
        config.pool.connect_timeout = Duration::from_secs(2);
    })
    .await;
    let crowd = 30;
    for n in 1..=crowd {
        stage.core.start_flow("f", "{}", n).await;
    }
    let token = bearer(&stage.roles.reader);
    let seen = get(stage.at, "/runs", &[&token]).await;
    assert_eq!(seen.status, 200, "its one connection is there");
    // Longer than anybody may take to connect.
    let holder = stage.core.db.connect().await;
    let held = tokio::spawn(async move {
        let hold =
            "begin; lock table pgflow.runs in access exclusive mode; select pg_sleep(5); commit";
        holder.batch_execute(hold).await.unwrap();
    });
    wait_until("the table is held", MINUTE, async || {
        let locks = "select count(*) from pg_locks where relation = 'pgflow.runs'::regclass and mode = 'AccessExclusiveLock' and granted";
        text(&stage.core.client, locks).await == "1"
    })
    .await;
    let opened = (1..=crowd).map(|n| {
        let path = format!("/events/runs/{}?cursor=0", run(n));
        let (at, token) = (stage.at, token.clone());
        async move {
            let mut stream = EventSource::open(at, &path, &[&token]).await;
            take(&mut stream, 1).await.remove(0).data["run_id"].clone()
        }
    });
    let first = timeout(MINUTE, join_all(opened))
        .await
        .expect("all of them");
    for (n, run_id) in (1..=crowd).zip(first) {
        assert_eq!(run_id, run(n).to_string());
    }
    held.await.unwrap();
    assert_eq!(
        stage.proxy.metric("flowgate_http_database_refused_total"),
        0
    );
    stage.proxy.shut_down().await;
}
