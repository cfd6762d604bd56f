//! Who may LISTEN to what: the database's grants and policies, as over HTTP; and what is revoked ends.

use std::collections::BTreeSet;
use std::time::Duration;

use serde_json::{Value, json};
use tokio_postgres::{AsyncMessage, Client};

use crate::support::chance::{Chance, seed};
use crate::support::core::{Core, run};
use crate::support::http::{EventSource, Roles, bearer, serving};
use crate::support::proxy::{Hearing, PATIENCE, Proxy, connect_hearing, sqlstate, text};
use crate::support::wait::wait_until;

const FLOW: &str = "flow f
                    a";

struct Stage {
    core: Core,
    roles: Roles,
    proxy: Proxy,
    at: std::net::SocketAddr,
}

async fn stage() -> Stage {
    let core = Core::new().await;
    core.define(FLOW).await;
    let roles = Roles::make(&core.db, &core.client).await;
    for role in [&roles.viewer, &roles.reader, &roles.nobody] {
        core.run(&format!("alter role {role} login")).await;
    }
    let (proxy, at) = serving(&core.db, &roles, |config| {
        config.http.recheck = Duration::from_millis(200);
    })
    .await;
    Stage {
        core,
        roles,
        proxy,
        at,
    }
}

impl Stage {
    async fn of_role(&self, role: &str) -> (Client, Hearing) {
        let url = self
            .proxy
            .url()
            .replace(&format!("//{}@", self.proxy.user), &format!("//{role}@"));
        connect_hearing(&url).await
    }
}

fn channel(n: u32) -> String {
    format!("pgflow:run:{}", run(n))
}

async fn listen(client: &Client, channel: &str) -> Result<(), tokio_postgres::Error> {
    client.batch_execute(&format!("listen \"{channel}\"")).await
}

async fn next(hearing: &mut Hearing) -> (String, Value) {
    let news = hearing.notification().await;
    let payload = serde_json::from_str(news.payload()).unwrap();
    (news.channel().to_owned(), payload)
}

/// What is told once nothing more may be told.
async fn ends(hearing: &mut Hearing, channel: &str) {
    let (told, payload) = next(hearing).await;
    assert_eq!(
        (told.as_str(), &payload["event_type"], &payload["code"]),
        (channel, &json!("error"), &json!("42501"))
    );
}

#[tokio::test]
async fn a_role_listens_to_what_it_may_see_and_is_refused_the_rest() {
    let stage = stage().await;
    let Roles {
        viewer,
        reader,
        nobody,
    } = &stage.roles;
    let many = ["pgflow:flow:f", "pgflow_events"];
    for (role, one_run, all) in [
        (viewer, true, false),
        (reader, true, true),
        (nobody, false, false),
    ] {
        let (client, mut hearing) = stage.of_role(role).await;
        let wanted = |allowed: bool| if allowed { "" } else { "42501" };
        let listened = listen(&client, &channel(1)).await;
        let code = |outcome: Result<(), _>| match outcome {
            Ok(()) => String::new(),
            error => sqlstate(error),
        };
        assert_eq!(code(listened), wanted(one_run), "{role}");
        let prepared = client
            .prepare(&format!("listen \"{}\"", channel(2)))
            .await
            .unwrap();
        let listened = client.execute(&prepared, &[]).await.map(drop);
        assert_eq!(code(listened), wanted(one_run), "{role}");
        for name in many {
            assert_eq!(
                code(listen(&client, name).await),
                wanted(all),
                "{role} {name}"
            );
        }
        // The session goes on, and Postgres' own channels are for all.
        client.batch_execute("listen plain").await.unwrap();
        client.batch_execute("notify plain").await.unwrap();
        assert_eq!(hearing.notification().await.channel(), "plain");
        // In a transaction it is too late when it counts.
        client
            .batch_execute("begin; listen \"pgflow_events\"; commit")
            .await
            .unwrap();
        let notices = hearing
            .now()
            .into_iter()
            .filter_map(|message| match message {
                Ok(AsyncMessage::Notice(notice)) => Some(notice.message().to_owned()),
                _ => None,
            });
        let wanted: Vec<_> = (!all)
            .then(|| "not listening to \"pgflow_events\": permission denied".to_owned())
            .into_iter()
            .collect();
        assert_eq!(notices.collect::<Vec<_>>(), wanted, "{role}");
    }
    let refused = {
        let (client, _hearing) = stage.of_role(nobody).await;
        let error = listen(&client, &channel(1)).await.unwrap_err();
        let error = error.as_db_error().unwrap();
        (
            error.message().to_owned(),
            error.detail().unwrap().to_owned(),
        )
    };
    assert_eq!(refused.0, "permission denied for run");
    assert_eq!(
        refused.1,
        format!(
            "Role \"{nobody}\" may not see what \"{}\" tells of.",
            channel(1)
        )
    );
    // The role counts that the session has.
    let (client, _hearing) = stage.proxy.connect_hearing().await;
    client
        .batch_execute(&format!("set role {nobody}"))
        .await
        .unwrap();
    assert_eq!(sqlstate(listen(&client, "pgflow_events").await), "42501");
    client.batch_execute("reset role").await.unwrap();
    listen(&client, "pgflow_events").await.unwrap();
    client
        .batch_execute(&format!("set session authorization {viewer}"))
        .await
        .unwrap();
    assert_eq!(sqlstate(listen(&client, "pgflow:flow:f").await), "42501");
    assert_eq!(text(&client, "select current_user").await, *viewer);
    assert!(stage.proxy.metric("flowgate_event_denied_total") > 0);
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn what_is_revoked_is_heard_no_more_and_its_listener_is_told() {
    let stage = stage().await;
    let (core, roles) = (&stage.core, &stage.roles);
    let (viewer, mut viewer_hears) = stage.of_role(&roles.viewer).await;
    let (reader, mut reader_hears) = stage.of_role(&roles.reader).await;
    let (owner, mut owner_hears) = stage.proxy.connect_hearing().await;
    listen(&viewer, &channel(1)).await.unwrap();
    listen(&reader, &channel(1)).await.unwrap();
    listen(&reader, "pgflow_events").await.unwrap();
    listen(&owner, "pgflow_events").await.unwrap();
    core.start_flow("f", "{}", 1).await;
    for (hearing, count) in [
        (&mut viewer_hears, 2),
        (&mut reader_hears, 4),
        (&mut owner_hears, 2),
    ] {
        for _ in 0..count {
            assert_eq!(next(hearing).await.1["run_id"], run(1));
        }
    }
    core.run(&format!(
        "revoke execute on function pgflow.get_run_with_states(uuid) from {}; \
         revoke select on pgflow.runs from {}",
        roles.viewer, roles.reader
    ))
    .await;
    ends(&mut viewer_hears, &channel(1)).await;
    let mut ended = BTreeSet::new();
    for _ in 0..2 {
        let (told, payload) = next(&mut reader_hears).await;
        assert_eq!(payload["code"], "42501");
        ended.insert(told);
    }
    assert_eq!(
        ended,
        BTreeSet::from([channel(1), "pgflow_events".to_owned()])
    );
    core.start_flow("f", "{}", 2).await;
    core.take("f").await;
    core.complete(1, "a", 0, "{}").await;
    for _ in 0..4 {
        next(&mut owner_hears).await;
    }
    // What is committed later comes behind it.
    for (client, hearing) in [(&viewer, &mut viewer_hears), (&reader, &mut reader_hears)] {
        client.batch_execute("listen fence").await.unwrap();
        core.run("notify fence").await;
        assert_eq!(hearing.notification().await.channel(), "fence");
        assert_eq!(sqlstate(listen(client, &channel(1)).await), "42501");
    }
    stage.proxy.shut_down().await;
}

/// Two tenants by the login's name, one by a setting of the session's.
async fn tenants(stage: &Stage) -> [String; 2] {
    let roles = ["a", "b"].map(|tenant| format!("{}_tenant_{tenant}", stage.core.db.name));
    let [a, b] = &roles;
    stage
        .core
        .run(&format!(
            "create role {a} login; create role {b} login; \
             grant usage on schema pgflow to {a}, {b}; grant select on pgflow.runs to {a}, {b}; \
             alter table pgflow.runs enable row level security; \
             create policy mine on pgflow.runs for select \
             using (input ->> 'tenant' in (right(current_user, 1), current_setting('app.tenant', true)))"
        ))
        .await;
    roles
}

fn of_tenant(tenant: &str) -> String {
    format!("{{\"tenant\": \"{tenant}\"}}")
}

#[tokio::test]
async fn policies_are_asked_when_a_run_begins_and_before_what_it_was_is_told() {
    let stage = stage().await;
    let [a, b] = &tenants(&stage).await;
    let core = &stage.core;
    let (mine, mut mine_hears) = stage.of_role(a).await;
    let (other, mut other_hears) = stage.of_role(b).await;
    // Nobody has heard of it, so everybody may wait for it.
    listen(&mine, &channel(1)).await.unwrap();
    listen(&other, &channel(1)).await.unwrap();
    core.start_flow("f", &of_tenant("a"), 1).await;
    for seq in 1..=2 {
        assert_eq!(next(&mut mine_hears).await.1["seq"], seq);
    }
    ends(&mut other_hears, &channel(1)).await;
    // There it is.
    for name in [channel(1), format!("{}@0", channel(1))] {
        assert_eq!(sqlstate(listen(&other, &name).await), "42501", "{name}");
        let (again, mut hearing) = stage.of_role(a).await;
        listen(&again, &name).await.unwrap();
        if name.ends_with("@0") {
            for seq in 1..=2 {
                assert_eq!(next(&mut hearing).await.1["seq"], seq);
            }
        }
    }
    // Its row is gone, what was told of it is not; of whom it was nobody can say any more.
    core.run(&format!(
        "delete from pgflow.step_tasks; delete from pgflow.step_states; delete from pgflow.runs where run_id = '{}'",
        run(1)
    ))
    .await;
    let (late, mut late_hears) = stage.of_role(b).await;
    match listen(&late, &format!("{}@0", channel(1))).await {
        Ok(()) => ends(&mut late_hears, &channel(1)).await,
        refused => assert_eq!(sqlstate(refused), "42501"),
    }
    // A policy that changes ends what went by it.
    core.start_flow("f", &of_tenant("a"), 2).await;
    let (mine, mut mine_hears) = stage.of_role(a).await;
    listen(&mine, &format!("{}@0", channel(2))).await.unwrap();
    next(&mut mine_hears).await;
    next(&mut mine_hears).await;
    core.run("alter policy mine on pgflow.runs using (false)")
        .await;
    ends(&mut mine_hears, &channel(2)).await;
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn whatever_runs_there_are_each_tenant_hears_its_own_and_no_others() {
    const RUNS: u32 = 40;
    let stage = stage().await;
    let [a, b] = &tenants(&stage).await;
    let (core, mut chance) = (&stage.core, Chance::of(seed(), 1));
    core.define("flow g\n a").await;
    // Who listens, to what, and the tenants it may see.
    let mut listeners = Vec::new();
    for (role, own) in [(a, "a"), (b, "b")] {
        for name in ["pgflow_events", "pgflow:flow:f", "pgflow:flow:g"] {
            for set in ["", "a", "b", "c"] {
                let (client, hearing) = stage.of_role(role).await;
                if !set.is_empty() {
                    let sql = format!("set app.tenant = '{set}'");
                    client.batch_execute(&sql).await.unwrap();
                }
                listen(&client, name).await.unwrap();
                listeners.push((client, hearing, name, [own, set]));
            }
        }
    }
    let mut over_http = Vec::new();
    for (role, own) in [(a, "a"), (b, "b")] {
        let stream = EventSource::open(stage.at, "/events", &[&bearer(role)]).await;
        over_http.push((stream, own));
    }
    let mut begun = Vec::new();
    for n in 1..=RUNS {
        let (tenant, flow) = (
            *chance.pick(&["a", "b", "c", "d"]),
            *chance.pick(&["f", "g"]),
        );
        core.start_flow(flow, &of_tenant(tenant), n).await;
        begun.push((n, tenant, flow));
        if chance.one_in(3) {
            core.take("f").await;
            core.take("g").await;
            let (of, ..) = *chance.pick(&begun);
            core.run(&format!(
                "select pgflow.complete_task(t.run_id, t.step_slug, 0, '{{}}') from pgflow.step_tasks t \
                 where t.run_id = '{}' and t.status = 'started'",
                run(of)
            ))
            .await;
        }
    }
    // The last that each of them hears.
    for (n, tenant) in [(101, "a"), (102, "b"), (103, "c")] {
        for (n, flow) in [(n, "f"), (n + 100, "g")] {
            core.start_flow(flow, &of_tenant(tenant), n).await;
            begun.push((n, tenant, flow));
        }
    }
    let wanted = async |name: &str, tenants: [&str; 2]| {
        let flow = name.strip_prefix("pgflow:flow:");
        let mut wanted = BTreeSet::new();
        for (n, tenant, of) in &begun {
            if tenants.contains(tenant) && flow.is_none_or(|flow| flow == *of) {
                let sql = format!(
                    "select count(*) from flowgate.event where topic = '{}'",
                    channel(*n)
                );
                let count: i64 = core.show(&sql).await.trim().parse().unwrap();
                wanted.extend((1..=count).map(|seq| (run(*n), seq)));
            }
        }
        wanted
    };
    for (_client, hearing, name, tenants) in &mut listeners {
        let wanted = wanted(name, *tenants).await;
        let mut heard = BTreeSet::new();
        while heard.len() < wanted.len() {
            let event = next(hearing).await.1;
            let run = event["run_id"].as_str().unwrap().to_owned();
            let key = (run, event["seq"].as_i64().unwrap());
            assert!(wanted.contains(&key), "{name} {tenants:?}: {event}");
            assert!(heard.insert(key), "{name} {tenants:?}: twice {event}");
        }
        assert!(hearing.now().is_empty(), "{name} {tenants:?}");
    }
    for (stream, own) in &mut over_http {
        let wanted = wanted("pgflow_events", [own, ""]).await;
        let mut heard = BTreeSet::new();
        while heard.len() < wanted.len() {
            let event = stream.next().await.unwrap().data;
            let run = event["run_id"].as_str().unwrap().to_owned();
            let key = (run, event["seq"].as_i64().unwrap());
            assert!(wanted.contains(&key) && heard.insert(key), "{own}: {event}");
        }
    }
    // One by one: whoever may not see a run may not listen to it, from wherever.
    let ((of_a, mut a_hears), (of_b, mut b_hears)) =
        (stage.of_role(a).await, stage.of_role(b).await);
    for (n, tenant, _) in &begun {
        let name = format!("{}@0", channel(*n));
        for (client, hearing, own) in [(&of_a, &mut a_hears, "a"), (&of_b, &mut b_hears, "b")] {
            let listened = listen(client, &name).await;
            if own == *tenant {
                listened.unwrap();
                assert_eq!(next(hearing).await.1["seq"], 1);
                client.batch_execute("unlisten *").await.unwrap();
                hearing.now();
            } else {
                assert_eq!(sqlstate(listened), "42501");
            }
        }
    }
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn what_listeners_may_see_is_asked_over_connections_that_may_be_lost() {
    let stage = stage().await;
    let [a, _] = &tenants(&stage).await;
    let core = &stage.core;
    let (mine, mut hearing) = stage.of_role(a).await;
    listen(&mine, "pgflow_events").await.unwrap();
    let kill = "select count(pg_terminate_backend(pid, 5000)) from pg_stat_activity \
                where application_name = 'flowgate sight' and datname = current_database()";
    let killer = core.db.connect().await;
    for n in 1..=20 {
        core.start_flow("f", &of_tenant(if n % 2 == 0 { "a" } else { "b" }), n)
            .await;
        killer.batch_execute(kill).await.unwrap();
    }
    for n in (2..=20).step_by(2) {
        for seq in 1..=2 {
            let event = next(&mut hearing).await.1;
            assert_eq!(
                (event["run_id"].as_str(), &event["seq"]),
                (Some(run(n).as_str()), &json!(seq))
            );
        }
    }
    // Nobody listens: nobody asks.
    drop(mine);
    wait_until("the session is gone", PATIENCE, async || {
        stage.proxy.metric("flowgate_clients") == 0
    })
    .await;
    stage.proxy.shut_down().await;
}

/// Who waits for a lock that somebody holds.
async fn waits(watcher: &Client, for_what: &str) {
    let waiting = format!("select count(*) from pg_locks where not granted and {for_what}");
    wait_until("somebody waits", PATIENCE, async || {
        text(watcher, &waiting).await != "0"
    })
    .await;
}

#[tokio::test]
async fn a_cancel_while_it_is_asked_who_listens_ends_that_listen_and_nothing_else() {
    let stage = stage().await;
    let core = &stage.core;
    let (client, mut hearing) = stage.of_role(&stage.roles.viewer).await;
    client.batch_execute("set app.tenant = 'a'").await.unwrap();
    let (holder, watcher) = (core.db.connect().await, core.db.connect().await);
    let hold = "begin; lock table pg_catalog.pg_policy in access exclusive mode";
    let asked = "relation = 'pg_catalog.pg_policy'::regclass";
    holder.batch_execute(hold).await.unwrap();
    let cancel = async || {
        waits(&watcher, asked).await;
        let token = client.cancel_token();
        token.cancel_query(tokio_postgres::NoTls).await.unwrap();
    };
    let name = channel(1);
    for _ in 0..3 {
        let (listened, ()) = tokio::join!(listen(&client, &name), cancel());
        assert_eq!(sqlstate(listened), "57014");
        assert_eq!(text(&client, "select 1").await, "1");
    }
    // When it is committed it is too late.
    client
        .batch_execute(&format!("begin; listen \"{name}\""))
        .await
        .unwrap();
    let release = async {
        cancel().await;
        waits(&watcher, asked).await;
        holder.batch_execute("commit").await.unwrap();
    };
    let (committed, ()) = tokio::join!(client.batch_execute("commit"), release);
    committed.unwrap();
    core.start_flow("f", "{}", 1).await;
    assert_eq!(next(&mut hearing).await.1["seq"], 1);
    assert_eq!(next(&mut hearing).await.1["seq"], 2);
    // And what Postgres gives up by itself.
    client.batch_execute("unlisten *").await.unwrap();
    client
        .batch_execute("set statement_timeout = '100ms'")
        .await
        .unwrap();
    holder.batch_execute(hold).await.unwrap();
    assert_eq!(sqlstate(listen(&client, &name).await), "57014");
    holder.batch_execute("rollback").await.unwrap();
    client
        .batch_execute("set statement_timeout = 0")
        .await
        .unwrap();
    listen(&client, &name).await.unwrap();
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn what_others_notify_does_not_wait_for_what_a_policy_has_yet_to_say() {
    let stage = stage().await;
    let [a, _] = &tenants(&stage).await;
    let core = &stage.core;
    core.run(
        "create function public.ajar() returns boolean language plpgsql as $$ \
         begin perform pg_advisory_xact_lock_shared(4242); return true; end $$; \
         alter policy mine on pgflow.runs using (public.ajar())",
    )
    .await;
    let (mine, mut hearing) = stage.of_role(a).await;
    for name in ["pgflow_events", "plain", "other"] {
        listen(&mine, name).await.unwrap();
    }
    let (holder, watcher) = (core.db.connect().await, core.db.connect().await);
    let hold = "select pg_advisory_lock(4242)";
    holder.batch_execute(hold).await.unwrap();
    core.start_flow("f", "{}", 1).await;
    // An event is in its queue, and nobody knows whether it may be told.
    waits(&watcher, "locktype = 'advisory' and objid = 4242").await;
    for n in 0..20 {
        let (channel, payload) = (["plain", "other"][n % 2], n.to_string());
        core.run(&format!("notify {channel}, '{payload}'")).await;
        let news = hearing.notification().await;
        assert_eq!((news.channel(), news.payload()), (channel, &*payload));
    }
    mine.batch_execute("notify plain, 'own'").await.unwrap();
    assert_eq!(hearing.notification().await.payload(), "own");
    holder
        .batch_execute("select pg_advisory_unlock(4242)")
        .await
        .unwrap();
    for seq in 1..=2 {
        let (told, event) = next(&mut hearing).await;
        assert_eq!((&*told, &event["seq"]), ("pgflow_events", &json!(seq)));
    }
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn policies_read_what_the_session_has_set_by_whatever_means() {
    let stage = stage().await;
    let [a, b] = &tenants(&stage).await;
    let core = &stage.core;
    for (n, tenant) in [(1, "a"), (2, "b"), (3, "c"), (4, "d")] {
        core.start_flow("f", &of_tenant(tenant), n).await;
    }
    let name = |n| format!("{}@0", channel(n));
    // For whoever logs in, everywhere or here.
    core.run(&format!(
        "alter role {a} set app.tenant = 'c'; alter role {b} in database {} set \"App.Tenant\" = 'd'",
        core.db.name
    ))
    .await;
    for (role, own, other) in [(a, 3, 4), (b, 4, 3)] {
        let (client, mut hearing) = stage.of_role(role).await;
        assert_eq!(sqlstate(listen(&client, &name(other)).await), "42501");
        for many in [name(own), "pgflow:flow:f@0-1:1:-1:1:".to_owned()] {
            listen(&client, &many).await.unwrap();
        }
        let mut heard = BTreeSet::new();
        for _ in 0..6 {
            let (told, event) = next(&mut hearing).await;
            heard.insert((told, event["run_id"].as_str().unwrap().to_owned()));
        }
        let first = if role == a { 1 } else { 2 };
        let wanted = [(channel(own), own), ("pgflow:flow:f".to_owned(), own)];
        let wanted = wanted
            .into_iter()
            .chain([("pgflow:flow:f".to_owned(), first)]);
        assert_eq!(heard, wanted.map(|(told, n)| (told, run(n))).collect());
    }
    // By a function, and in a policy by another.
    core.run(
        "create function public.tenant() returns text language sql stable as \
         $$ select current_setting('app.tenant', true) $$; \
         alter policy mine on pgflow.runs using (input ->> 'tenant' = public.tenant())",
    )
    .await;
    let (client, mut hearing) = stage.of_role(a).await;
    for (tenant, own, other) in [("b", 2, 3), ("d", 4, 2)] {
        let set = format!("select set_config('app.tenant', '{tenant}', false)");
        client.batch_execute(&set).await.unwrap();
        assert_eq!(sqlstate(listen(&client, &name(other)).await), "42501");
        listen(&client, &name(own)).await.unwrap();
        for seq in 1..=2 {
            let (told, event) = next(&mut hearing).await;
            assert_eq!((told, &event["seq"]), (channel(own), &json!(seq)));
        }
    }
    // In a transaction as well; names and operators of the session's own are nobody's.
    client
        .batch_execute(
            "create temp table pg_policy (x int); create temp table pg_class (x int); \
             select set_config('app.tenant', 'a', false); set search_path = pg_temp, public, pg_catalog",
        )
        .await
        .unwrap();
    client
        .batch_execute(&format!("begin; listen \"{}\"; commit", name(1)))
        .await
        .unwrap();
    assert_eq!(next(&mut hearing).await.0, channel(1));
    stage.proxy.shut_down().await;
}
