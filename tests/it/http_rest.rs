//! `/rest/v1`: what pgflow's client asks, and every way it can be refused.

use std::net::SocketAddr;

use serde_json::json;

use crate::support::core::{Core, run};
use crate::support::http::{KEY, Reply, Roles, ask, bearer, get, serving, token};
use crate::support::proxy::Proxy;

struct Stage {
    core: Core,
    roles: Roles,
    proxy: Proxy,
    at: SocketAddr,
}

async fn stage() -> Stage {
    let core = Core::new().await;
    core.define("flow f\na\nb < a").await;
    let roles = Roles::make(&core.db, &core.client).await;
    let (proxy, at) = serving(&core.db, &roles, |config| {
        config.http.cors = vec!["*".to_owned()];
    })
    .await;
    Stage {
        core,
        roles,
        proxy,
        at,
    }
}

async fn call(at: SocketAddr, function: &str, headers: &[&str], body: &str) -> Reply {
    let key = format!("apikey: {KEY}");
    let mut all = vec![
        key.as_str(),
        "content-type: application/json",
        "content-profile: pgflow",
    ];
    all.extend(headers);
    ask(at, "POST", &format!("/rest/v1/rpc/{function}"), &all, body).await
}

#[tokio::test]
async fn a_run_is_started_and_read_as_the_functions_say_it() {
    let stage = stage().await;
    let at = stage.at;
    let body = format!(
        "{{\"flow_slug\":\"f\",\"input\":{{\"n\":1.50}},\"run_id\":\"{}\"}}",
        run(1)
    );
    let started = call(at, "start_flow_with_states", &[], &body).await;
    assert_eq!(started.status, 200, "{started:?}");
    assert_eq!(
        started.headers["content-type"],
        "application/json; charset=utf-8"
    );
    assert_eq!(started.headers["access-control-allow-origin"], "*");
    assert!(started.body.contains("\"n\": 1.50"), "{started:?}");
    assert_eq!(started.json()["run"]["run_id"], run(1));
    assert_eq!(started.json()["steps"].as_array().unwrap().len(), 2);
    let body = format!("{{\"run_id\":\"{}\"}}", run(1));
    let read = call(at, "get_run_with_states", &[], &body).await;
    assert_eq!(read.json()["run"], started.json()["run"]);
    // Compressed or not, the connection goes on after it.
    for packing in ["gzip", "identity"] {
        let accept = format!("accept-encoding: {packing}");
        let key = format!("apikey: {KEY}");
        let body = r#"{"flow_slug":"f","input":{}}"#;
        let request = format!(
            "POST /rest/v1/rpc/start_flow_with_states HTTP/1.1\r\nhost: x\r\n{key}\r\n{accept}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        );
        let request =
            format!("{request}GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        let said = crate::support::http::exchange(at, request.as_bytes()).await;
        assert!(
            said.starts_with("HTTP/1.1 200 OK\r\n") && said.ends_with("ok\n"),
            "{said}"
        );
        assert_eq!(
            said.contains("content-encoding: gzip"),
            packing == "gzip",
            "{said}"
        );
    }
    let body = format!("{{\"run_id\":\"{}\"}}", run(2));
    let unknown = call(at, "get_run_with_states", &[], &body).await;
    assert_eq!((unknown.status, unknown.body.as_str()), (200, "null"));

    let key = format!("apikey: {KEY}");
    let object = "accept: application/vnd.pgrst.object+json";
    let flow = get(
        at,
        "/rest/v1/flows?select=*&flow_slug=eq.f",
        &[&key, object, "accept-profile: pgflow"],
    )
    .await;
    assert_eq!(flow.json()["flow_slug"], "f");
    let steps = get(
        at,
        "/rest/v1/steps?select=*&flow_slug=eq.f&order=step_index.asc",
        &[&key],
    )
    .await
    .json();
    let slugs: Vec<_> = steps
        .as_array()
        .unwrap()
        .iter()
        .map(|step| &step["step_slug"])
        .collect();
    assert_eq!(slugs, ["a", "b"]);
    let steps = get(
        at,
        "/rest/v1/steps?select=step_slug&order=step_index.desc&limit=1&offset=1",
        &[&key],
    )
    .await;
    assert_eq!(steps.json(), json!([{"step_slug": "a"}]));
    let none = get(at, "/rest/v1/steps?flow_slug=in.(x,y)", &[&key]).await;
    assert_eq!(none.body, "[]");
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn what_is_refused_is_refused_in_postgrests_words() {
    let stage = stage().await;
    let (at, roles) = (stage.at, &stage.roles);
    let start = "start_flow_with_states";
    let body = r#"{"flow_slug":"f","input":{}}"#;
    let reader = bearer(&roles.reader);
    let nobody = bearer(&roles.nobody);
    let bad = "authorization: Bearer a.b.c";
    let cases: [(&str, &[&str], &str, &str); 10] = [
        (start, &[bad], body, "401 PGRST301"),
        (start, &[&nobody], body, "403 42501"),
        (start, &[&reader], body, "403 42501"),
        (start, &[], "{", "400 PGRST102"),
        (start, &[], "[]", "400 PGRST102"),
        (start, &[], r#"{"flow_slug":"f"}"#, "404 PGRST202"),
        (
            start,
            &[],
            r#"{"flow_slug":"f","input":1,"odd":1}"#,
            "404 PGRST202",
        ),
        ("delete_flow_and_data", &[], "{}", "404 PGRST202"),
        (
            start,
            &[],
            r#"{"flow_slug":"none","input":{}}"#,
            "409 23503",
        ),
        (
            start,
            &[],
            r#"{"flow_slug":"f","input":{},"run_id":"x"}"#,
            "400 22P02",
        ),
    ];
    for (function, headers, body, refusal) in cases {
        let reply = call(at, function, headers, body).await;
        assert_eq!(
            reply.refusal(),
            refusal,
            "{function} {headers:?} {body}: {reply:?}"
        );
        let mut keys: Vec<_> = reply.json().as_object().unwrap().keys().cloned().collect();
        keys.sort();
        assert_eq!(keys, ["code", "details", "hint", "message"]);
    }
    let twice = format!(
        "{{\"flow_slug\":\"f\",\"input\":{{}},\"run_id\":\"{}\"}}",
        run(7)
    );
    assert_eq!(call(at, start, &[], &twice).await.status, 200);
    assert_eq!(call(at, start, &[], &twice).await.refusal(), "409 23505");

    let key = format!("apikey: {KEY}");
    let object = "accept: application/vnd.pgrst.object+json";
    for (path, headers, refusal) in [
        (
            "/rest/v1/flows?flow_slug=eq.none",
            vec![object],
            "406 PGRST116",
        ),
        ("/rest/v1/steps", vec![object], "406 PGRST116"),
        ("/rest/v1/none", vec![], "404 PGRST205"),
        ("/rest/v1/a/b", vec![], "404 PGRST125"),
        ("/rest/v1/flows?flow_slug=f", vec![], "400 PGRST100"),
        ("/rest/v1/flows?odd=eq.f", vec![], "400 42703"),
        ("/rest/v1/flows?created_at=eq.f", vec![], "400 22007"),
        (
            "/rest/v1/flows",
            vec!["accept-profile: public"],
            "406 PGRST106",
        ),
        ("/rest/v1/runs", vec![], "403 42501"),
    ] {
        let mut all = vec![key.as_str()];
        all.extend(&headers);
        let reply = get(at, path, &all).await;
        assert_eq!(reply.refusal(), refusal, "{path}: {reply:?}");
    }
    let one = get(at, "/rest/v1/flows?flow_slug=eq.none", &[&key, object]).await;
    assert_eq!(one.json()["details"], "The result contains 0 rows");
    let elsewhere = [
        &*key,
        "content-type: application/json",
        "content-profile: public",
    ];
    let elsewhere = ask(at, "POST", "/rest/v1/rpc/start_flow", &elsewhere, body).await;
    assert_eq!(elsewhere.refusal(), "406 PGRST106");
    // Not as a form would be sent, by a page that asked nobody.
    let form = ask(
        at,
        "POST",
        "/rest/v1/rpc/start_flow",
        &[&key, "content-type: text/plain"],
        body,
    )
    .await;
    assert_eq!(form.status, 415);
    let large = format!(
        "{{\"flow_slug\":\"f\",\"input\":\"{}\"}}",
        "x".repeat(9 << 20)
    );
    assert_eq!(call(at, start, &[], &large).await.status, 413);
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn a_users_claims_and_request_reach_policies_and_nobody_else() {
    let stage = stage().await;
    let (core, at, reader) = (&stage.core, stage.at, &stage.roles.reader);
    core.run(&format!(
        "create table pgflow.seen (n int); grant select on pgflow.flows to {reader}; \
         alter table pgflow.flows enable row level security; \
         create policy mine on pgflow.flows for select to {reader} using ( \
         current_setting('request.jwt.claims')::json ->> 'sub' = 'it''s' and current_user = '{reader}' \
         and current_setting('request.method') = 'GET' and current_setting('request.path') = '/flows' \
         and current_setting('request.headers')::json ->> 'x-mine' = 'yes' \
         and current_setting('request.cookies')::json ->> 'c' = 'd')"
    ))
    .await;
    let mine = format!(
        "authorization: Bearer {}",
        token(&json!({"role": reader, "sub": "it's"}))
    );
    let seen = async |token: &str, extra: &str| {
        let headers = [token, extra, "cookie: a=b; c=d"];
        let reply = get(at, "/rest/v1/flows", &headers).await;
        reply.json().as_array().unwrap().len()
    };
    for _ in 0..10 {
        assert_eq!(seen(&mine, "x-mine: yes").await, 1);
        assert_eq!(seen(&mine, "x-mine: no").await, 0);
        assert_eq!(seen(&bearer(reader), "x-mine: yes").await, 0);
    }
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn who_finds_no_connection_in_time_and_no_database_is_told_so() {
    let core = Core::new().await;
    core.define("flow f\na").await;
    let roles = Roles::make(&core.db, &core.client).await;
    let (proxy, at) = serving(&core.db, &roles, |config| {
        config.http.pool_size = 1.try_into().unwrap();
        config.pool.checkout_timeout = std::time::Duration::from_millis(300);
    })
    .await;
    let key = format!("apikey: {KEY}");
    let locker = core.db.connect().await;
    locker
        .batch_execute("begin; lock table pgflow.flows")
        .await
        .unwrap();
    let headers = [key.as_str()];
    let waiting = get(at, "/rest/v1/flows", &headers);
    let refused = async {
        // The one that waits in the database has the only connection.
        let waits = "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";
        crate::support::wait::wait_until("a wait", crate::support::proxy::PATIENCE, async || {
            crate::support::proxy::text(&core.client, waits).await == "1"
        })
        .await;
        let refused = get(at, "/rest/v1/steps", &headers).await;
        locker.batch_execute("rollback").await.unwrap();
        refused
    };
    let (answered, refused) = tokio::join!(waiting, refused);
    assert_eq!(answered.status, 200);
    assert_eq!(refused.refusal(), "504 PGRST003");
    assert_eq!(proxy.metric("flowgate_http_database_refused_total"), 1);
    // Kept connections that died are noticed by who reads; who writes is told.
    let kill = "select pg_terminate_backend(pid, 5000) from pg_stat_activity \
                where application_name = 'flowgate http' and datname = current_database()";
    core.run(kill).await;
    assert_eq!(get(at, "/rest/v1/flows", &headers).await.status, 200);
    proxy.shut_down().await;
}
