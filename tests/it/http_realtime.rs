//! `/realtime/v1/websocket`: Phoenix channels, both versions, told all from the beginning and nothing that is not theirs.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::{WebSocketStream, client_async};

use crate::support::core::{Core, run};
use crate::support::http::{KEY, Roles, ask, get, now, serving, token, token_of};
use crate::support::proxy::{PATIENCE, Proxy};
use crate::support::wait::wait_until;

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

/// A socket of version 1.0.0 or 2.0.0; what it says and hears is written as in 2.0.0.
struct Socket {
    stream: WebSocketStream<TcpStream>,
    version: u8,
}

impl Socket {
    async fn open(at: SocketAddr, version: u8) -> Self {
        Self::open_with(at, &format!("apikey={KEY}"), version).await
    }

    async fn open_with(at: SocketAddr, query: &str, version: u8) -> Self {
        let tcp = TcpStream::connect(at).await.unwrap();
        let url =
            format!("ws://{at}/realtime/v1/websocket?{query}&vsn={version}.0.0&log_level=info");
        let (stream, _response) = client_async(url, tcp).await.unwrap();
        Self { stream, version }
    }

    async fn say(&mut self, message: Value) {
        let text = if self.version == 1 {
            json!({"join_ref": message[0], "ref": message[1], "topic": message[2], "event": message[3], "payload": message[4]})
        } else {
            message
        };
        self.stream
            .send(Message::text(text.to_string()))
            .await
            .unwrap();
    }

    async fn join(&mut self, reference: &str, topic: &str, token: Option<&str>) {
        let mut payload = json!({"config": {"broadcast": {"ack": false, "self": false},
            "presence": {"key": "", "enabled": false}, "postgres_changes": [], "private": false}});
        if let Some(token) = token {
            payload["access_token"] = token.into();
        }
        self.say(json!([reference, reference, topic, "phx_join", payload]))
            .await;
    }

    async fn next_raw(&mut self) -> Option<Message> {
        let next = timeout(PATIENCE, self.stream.next())
            .await
            .expect("a message");
        next.and_then(Result::ok)
    }

    /// `[join_ref, ref, topic, event, payload]`, broadcasts always as in text.
    async fn next(&mut self) -> Value {
        match self.next_raw().await.expect("open") {
            Message::Text(text) => {
                let said: Value = serde_json::from_str(&text).unwrap();
                if self.version == 1 {
                    json!([
                        said["join_ref"],
                        said["ref"],
                        said["topic"],
                        said["event"],
                        said["payload"]
                    ])
                } else {
                    said
                }
            }
            Message::Binary(bytes) => {
                assert_eq!((bytes[0], bytes[4]), (4, 1));
                let lengths = [bytes[1], bytes[2], bytes[3]].map(usize::from);
                let (topic, rest) = bytes[5..].split_at(lengths[0]);
                let (event, rest) = rest.split_at(lengths[1]);
                let (meta, payload) = rest.split_at(lengths[2]);
                let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
                let parsed = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).unwrap();
                json!([null, null, text(topic), "broadcast",
                    {"type": "broadcast", "event": text(event), "payload": parsed(payload), "meta": parsed(meta)}])
            }
            other => panic!("{other:?}"),
        }
    }

    async fn joined(&mut self, reference: &str, topic: &str, token: Option<&str>) {
        self.join(reference, topic, token).await;
        let ok = json!([reference, reference, topic, "phx_reply", {"status": "ok", "response": {"postgres_changes": []}}]);
        loop {
            let said = self.next().await;
            // Channels joined before this one may be told again meanwhile.
            if said[2] == topic || said[4]["meta"]["replayed"] != true {
                return assert_eq!(said, ok);
            }
        }
    }

    /// The next broadcast: event, seq, and whether it is told again.
    async fn broadcast(&mut self) -> (String, i64, bool) {
        let said = self.next().await;
        assert_eq!(
            (&said[0], &said[1], &said[3]),
            (&Value::Null, &Value::Null, &json!("broadcast")),
            "{said}"
        );
        let payload = &said[4];
        assert_eq!(payload["type"], "broadcast");
        assert!(payload["meta"]["id"].is_string());
        (
            payload["event"].as_str().unwrap().to_owned(),
            payload["payload"]["seq"].as_i64().unwrap(),
            payload["meta"]["replayed"] == true,
        )
    }

    async fn close_code(&mut self) -> u16 {
        loop {
            match self.next_raw().await {
                Some(Message::Close(Some(frame))) => return frame.code.into(),
                Some(_) => {}
                None => panic!("closed without a word"),
            }
        }
    }
}

fn topic(n: u32) -> String {
    format!("realtime:pgflow:run:{}", run(n))
}

#[tokio::test]
async fn both_versions_join_hear_and_leave() {
    let stage = stage().await;
    let (core, at) = (&stage.core, stage.at);
    for version in [1, 2] {
        let n = u32::from(version);
        let mut socket = Socket::open(at, version).await;
        socket
            .say(json!([null, "1", "phoenix", "heartbeat", {}]))
            .await;
        let beat = json!([null, "1", "phoenix", "phx_reply", {"status": "ok", "response": {}}]);
        assert_eq!(socket.next().await, beat);
        socket.joined("2", &topic(n), None).await;
        core.start_flow("f", "{\"n\": 1}", n).await;
        assert_eq!(
            socket.broadcast().await,
            ("run:started".to_owned(), 1, false)
        );
        assert_eq!(
            socket.broadcast().await,
            ("step:a:started".to_owned(), 2, false)
        );
        // Nothing of this makes it close, or is answered.
        for odd in [
            json!([null, "3", topic(n), "presence", {}]),
            json!(["2", "3", topic(n), "broadcast", {}]),
            json!(["2", "3", topic(n), "odd", {}]),
            json!([null, "3", "phoenix", "odd", {}]),
            json!([null, "3", "realtime:unknown", "access_token", {"access_token": "x"}]),
        ] {
            socket.say(odd).await;
        }
        for odd in ["", "{", "[]", "null", "[1,2]"] {
            socket.stream.send(Message::text(odd)).await.unwrap();
        }
        socket
            .stream
            .send(Message::binary(vec![3, 1, 1]))
            .await
            .unwrap();
        // Joined again: the old one ends, the new one is told all from the beginning.
        socket.join("9", &topic(n), None).await;
        assert_eq!(
            socket.next().await,
            json!(["2", "2", topic(n), "phx_close", {}])
        );
        assert_eq!(socket.next().await[4]["status"], "ok");
        assert_eq!(
            socket.broadcast().await,
            ("run:started".to_owned(), 1, true)
        );
        assert_eq!(
            socket.broadcast().await,
            ("step:a:started".to_owned(), 2, true)
        );
        // And once more, a little later.
        assert_eq!(
            socket.broadcast().await,
            ("run:started".to_owned(), 1, true)
        );
        assert_eq!(
            socket.broadcast().await,
            ("step:a:started".to_owned(), 2, true)
        );
        core.take("f").await;
        core.complete(n, "a", 0, "{}").await;
        assert_eq!(
            socket.broadcast().await,
            ("step:a:completed".to_owned(), 3, false)
        );
        assert_eq!(
            socket.broadcast().await,
            ("step:b:started".to_owned(), 4, false)
        );
        socket
            .say(json!(["9", "10", topic(n), "phx_leave", {}]))
            .await;
        let left = json!(["9", "10", topic(n), "phx_reply", {"status": "ok", "response": {}}]);
        assert_eq!(socket.next().await, left);
        assert_eq!(
            socket.next().await,
            json!(["9", "9", topic(n), "phx_close", {}])
        );
        core.take("f").await;
        core.complete(n, "b", 0, "{}").await;
        socket
            .say(json!([null, "11", "phoenix", "heartbeat", {}]))
            .await;
        assert_eq!(socket.next().await[1], "11", "nothing of what was left");
        core.archive("f").await;
    }
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn an_answer_to_a_join_means_that_nothing_is_missed() {
    let stage = stage().await;
    let (core, at) = (&stage.core, stage.at);
    let mut socket = Socket::open(at, 2).await;
    for n in 1..=100 {
        socket.joined(&n.to_string(), &topic(n), None).await;
        core.start_flow("f", "{}", n).await;
        // Runs before this one are told again after a while.
        let mut first = async || loop {
            let (event, seq, again) = socket.broadcast().await;
            if !again {
                return (event, seq);
            }
        };
        assert_eq!(first().await, ("run:started".to_owned(), 1));
        assert_eq!(first().await, ("step:a:started".to_owned(), 2));
    }
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn the_answer_that_a_run_was_started_comes_before_its_events() {
    let stage = stage().await;
    let at = stage.at;
    let mut socket = Socket::open(at, 2).await;
    let key = format!("apikey: {KEY}");
    for n in 1..=30 {
        socket.joined(&n.to_string(), &topic(n), None).await;
        let body = format!(
            "{{\"flow_slug\":\"f\",\"input\":{{}},\"run_id\":\"{}\"}}",
            run(n)
        );
        let headers = [key.as_str(), "content-type: application/json"];
        let call = ask(
            at,
            "POST",
            "/rest/v1/rpc/start_flow_with_states",
            &headers,
            &body,
        );
        tokio::select! {
            biased;
            early = socket.next() => panic!("before the answer: {early}"),
            answer = call => assert_eq!(answer.status, 200),
        }
        assert_eq!(socket.broadcast().await.1, 1);
        assert_eq!(socket.broadcast().await.1, 2);
        socket
            .say(json!([n.to_string(), "0", topic(n), "phx_leave", {}]))
            .await;
        assert_eq!(socket.next().await[3], "phx_reply");
        assert_eq!(socket.next().await[3], "phx_close");
    }
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn who_may_not_see_a_run_does_not_join_it() {
    let stage = stage().await;
    let (at, roles) = (stage.at, &stage.roles);
    for query in ["apikey=wrong", "apikey=a.b.c", "x=y"] {
        let path = format!("/realtime/v1/websocket?{query}");
        let upgrade = [
            "upgrade: websocket",
            "connection: upgrade",
            "sec-websocket-version: 13",
            "sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==",
        ];
        let refused = get(at, &path, &upgrade).await;
        assert_eq!(refused.status, 401, "{refused:?}");
        assert!(refused.json()["error"].is_string());
    }
    let mut request = format!("ws://{at}/realtime/v1/websocket?apikey={KEY}")
        .into_client_request()
        .unwrap();
    request
        .headers_mut()
        .insert("origin", "https://evil.example".parse().unwrap());
    let tcp = TcpStream::connect(at).await.unwrap();
    assert!(
        client_async(request, tcp).await.is_err(),
        "a page of another origin"
    );

    let mut socket = Socket::open(at, 2).await;
    let refused = async |socket: &mut Socket, topic: &str, token: Option<&str>| {
        socket.join("1", topic, token).await;
        let reply = socket.next().await;
        assert_eq!(
            (&reply[3], &reply[4]["status"]),
            (&json!("phx_reply"), &json!("error")),
            "{reply}"
        );
        reply[4]["response"]["reason"].as_str().unwrap().to_owned()
    };
    let nobody = token_of(&roles.nobody);
    let why = refused(&mut socket, &topic(1), Some(&nobody)).await;
    assert_eq!(
        why,
        format!("Unauthorized: role \"{}\" may not see this", roles.nobody)
    );
    assert_eq!(
        refused(&mut socket, &topic(1), Some("a.b.c")).await,
        "the JWT's header is malformed"
    );
    let timeless = token(&json!({"role": roles.viewer}));
    assert_eq!(
        refused(&mut socket, &topic(1), Some(&timeless)).await,
        "The JWT lacks the claim exp"
    );
    let expired = token(&json!({"role": roles.viewer, "exp": now() - 60}));
    assert_eq!(
        refused(&mut socket, &topic(1), Some(&expired)).await,
        "JWT expired"
    );
    for bad in ["realtime:", "other", "realtime"] {
        assert_eq!(
            refused(&mut socket, bad, None).await,
            "Topic name required: realtime:<topic>"
        );
    }
    socket
        .say(json!(["1", "1", topic(1), "phx_join", {"config": {"private": true}}]))
        .await;
    assert_eq!(
        socket.next().await[4]["response"]["reason"],
        "Private channels are not supported"
    );
    assert_eq!(stage.proxy.metric("flowgate_http_joins_refused_total"), 8);
    // Others are untouched, and a key sent as a token is that key.
    socket.joined("2", &topic(1), Some(KEY)).await;
    socket
        .joined("3", &topic(2), Some(&token_of(&roles.viewer)))
        .await;
    stage.core.start_flow("f", "{}", 2).await;
    assert_eq!(socket.broadcast().await.1, 1);
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn a_channel_ends_with_its_token_or_its_rights_and_says_why() {
    let stage = stage().await;
    let (core, at, roles) = (&stage.core, stage.at, &stage.roles);
    let mut socket = Socket::open(at, 2).await;
    socket
        .joined("1", &topic(1), Some(&token_of(&roles.viewer)))
        .await;
    socket
        .joined("2", &topic(2), Some(&token_of(&roles.reader)))
        .await;
    core.start_flow("f", "{}", 2).await;
    assert_eq!(socket.broadcast().await.1, 1);
    assert_eq!(socket.broadcast().await.1, 2);
    let ended = async |socket: &mut Socket, reference: &str, n: u32, why: &str| {
        let said = socket.next().await;
        let channel = format!("pgflow:run:{}", run(n));
        let told =
            json!({"extension": "system", "status": "error", "message": why, "channel": channel});
        assert_eq!(said, json!([reference, null, topic(n), "system", told]));
        assert_eq!(
            socket.next().await,
            json!([reference, reference, topic(n), "phx_close", {}])
        );
    };
    let bad = json!(["1", "4", topic(1), "access_token", {"access_token": "a.b.c"}]);
    socket.say(bad).await;
    ended(&mut socket, "1", 1, "the JWT's header is malformed").await;
    core.run(&format!(
        "revoke select on pgflow.runs from {}",
        roles.reader
    ))
    .await;
    ended(
        &mut socket,
        "2",
        2,
        "Unauthorized: the role may not see this any more",
    )
    .await;
    // Within the grace that clocks are given when it joins.
    let short = token(&json!({"role": roles.viewer, "exp": now() - 5}));
    socket.joined("5", &topic(1), Some(&short)).await;
    ended(&mut socket, "5", 1, "Token has expired 0 seconds ago").await;
    // Renewed in time.
    socket
        .joined("6", &topic(1), Some(&token_of(&roles.viewer)))
        .await;
    socket
        .say(json!(["6", "7", topic(1), "access_token", {"access_token": token_of(&roles.viewer)}]))
        .await;
    core.start_flow("f", "{}", 1).await;
    assert_eq!(socket.broadcast().await.1, 1);
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn what_was_dropped_is_made_up_from_the_runs_state() {
    let stage = stage().await;
    let (core, at) = (&stage.core, stage.at);
    core.start_flow("f", "{}", 1).await;
    core.take("f").await;
    core.complete(1, "a", 0, "{\"x\": null}").await;
    core.run("delete from flowgate.event").await;
    let mut socket = Socket::open(at, 1).await;
    socket.joined("1", &topic(1), None).await;
    let mut told = Vec::new();
    for _ in 0..3 {
        let said = socket.next().await;
        let payload = &said[4]["payload"];
        assert_eq!(payload["run_id"], run(1), "{said}");
        told.push((
            said[4]["event"].as_str().unwrap().to_owned(),
            payload["status"].clone(),
            payload["output"].clone(),
        ));
    }
    told.sort_by(|a, b| a.0.cmp(&b.0));
    assert_eq!(told[0].0, "run:started");
    assert_eq!(
        told[1],
        (
            "step:a:completed".to_owned(),
            json!("completed"),
            json!({"x": null})
        )
    );
    assert_eq!(told[2].0, "step:b:started");
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn other_topics_are_heard_unless_they_are_private() {
    let stage = stage().await;
    let mut socket = Socket::open(stage.at, 2).await;
    socket.joined("1", "realtime:news", None).await;
    let send = |event: &str, private: bool| {
        format!("select realtime.send('{{\"n\": 1}}', '{event}', 'news', {private})")
    };
    stage.core.run(&send("hidden", true)).await;
    stage.core.run(&send("shown", false)).await;
    assert_eq!(socket.broadcast().await, ("shown".to_owned(), 2, false));
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn too_large_a_message_closes_its_socket_alone_and_shutdown_all() {
    let stage = stage().await;
    let (core, at) = (&stage.core, stage.at);
    let mut other = Socket::open(at, 2).await;
    other.joined("1", &topic(1), None).await;
    let mut large = Socket::open(at, 2).await;
    let sent = large.stream.send(Message::text("x".repeat(2 << 20))).await;
    assert!(sent.is_ok());
    assert_eq!(large.close_code().await, 1009);
    core.start_flow("f", "{}", 1).await;
    assert_eq!(other.broadcast().await.1, 1);
    assert_eq!(other.broadcast().await.1, 2);
    let closing = async { other.close_code().await };
    let ((), code) = tokio::join!(stage.proxy.shut_down(), closing);
    assert_eq!(code, 1012);
}

#[tokio::test]
async fn a_forged_token_is_nobodys() {
    let stage = stage().await;
    let (at, roles) = (stage.at, &stage.roles);
    let good = token_of(&roles.viewer);
    let parts: Vec<&str> = good.split('.').collect();
    let other = token(&json!({"role": stage.proxy.user, "exp": now() + 3600}));
    let others: Vec<&str> = other.split('.').collect();
    // {"alg":"none"}
    let none = "eyJhbGciOiJub25lIn0";
    let forged = [
        format!("{}.{}.{}", parts[0], others[1], parts[2]),
        format!("{}.{}.{}", parts[0], parts[1], others[2]),
        format!("{}.{}.", parts[0], parts[1]),
        format!("{none}.{}.", parts[1]),
        format!("{none}.{}.{}", parts[1], parts[2]),
    ];
    let mut socket = Socket::open(at, 2).await;
    for (n, forged) in forged.iter().enumerate() {
        let reference = n.to_string();
        socket.join(&reference, &topic(1), Some(forged)).await;
        let reply = socket.next().await;
        assert_eq!(reply[4]["status"], "error", "{forged}: {reply}");
        let upgrade = [
            "upgrade: websocket",
            "connection: upgrade",
            "sec-websocket-version: 13",
            "sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==",
        ];
        let path = format!("/realtime/v1/websocket?apikey={forged}");
        assert_eq!(get(at, &path, &upgrade).await.status, 401, "{forged}");
    }
    // One that is joined ends with it, and the socket goes on.
    socket.joined("j", &topic(1), Some(&good)).await;
    socket
        .say(json!(["j", "k", topic(1), "access_token", {"access_token": forged[0]}]))
        .await;
    let told = socket.next().await;
    assert_eq!(
        (&told[3], &told[4]["status"]),
        (&json!("system"), &json!("error"))
    );
    assert_eq!(socket.next().await[3], "phx_close");
    socket.joined("l", &topic(1), Some(&good)).await;
    stage.core.start_flow("f", "{}", 1).await;
    assert_eq!(socket.broadcast().await.1, 1);
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn policies_count_at_the_join_and_for_as_long_as_it_lasts() {
    let stage = stage().await;
    let (core, at, roles) = (&stage.core, stage.at, &stage.roles);
    core.run(&format!(
        "alter table pgflow.runs enable row level security; \
         create policy mine on pgflow.runs for select to {} \
         using (input ->> 'tenant' = current_setting('request.jwt.claims')::json ->> 'tenant')",
        roles.reader
    ))
    .await;
    for (n, tenant) in [(1, "a"), (2, "b"), (3, "a")] {
        core.start_flow("f", &format!("{{\"tenant\": \"{tenant}\"}}"), n)
            .await;
    }
    let of =
        |tenant: &str| token(&json!({"role": roles.reader, "tenant": tenant, "exp": now() + 3600}));
    let mut socket = Socket::open(at, 2).await;
    for (n, tenant, sees) in [
        (1, "a", true),
        (1, "b", false),
        (2, "a", false),
        (2, "b", true),
    ] {
        socket.join("1", &topic(n), Some(&of(tenant))).await;
        let mut reply = socket.next().await;
        while reply[3] != "phx_reply" {
            reply = socket.next().await;
        }
        let wanted = if sees { "ok" } else { "error" };
        assert_eq!(reply[4]["status"], wanted, "{n} {tenant}: {reply}");
        if sees {
            assert_eq!(
                socket.broadcast().await,
                ("run:started".to_owned(), 1, true)
            );
            assert_eq!(socket.broadcast().await.1, 2);
        }
    }
    core.run("alter policy mine on pgflow.runs using (input ->> 'tenant' = 'nobody')")
        .await;
    let mut last = Socket::open(at, 2).await;
    last.join("1", &topic(3), Some(&of("a"))).await;
    assert_eq!(last.next().await[4]["status"], "error");
    // What was joined by the policy as it was ends within the interval; what was replayed may be repeated before.
    let said = loop {
        let said = socket.next().await;
        if said[3] != "broadcast" && said[3] != "phx_close" {
            break said;
        }
    };
    assert_eq!(
        (&said[2], &said[3]),
        (&json!(topic(2)), &json!("system")),
        "{said}"
    );
    assert_eq!(
        said[4]["message"],
        "Unauthorized: the role may not see this any more"
    );
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn who_comes_back_is_told_all_that_happened_and_what_follows() {
    let stage = stage().await;
    let (core, at) = (&stage.core, stage.at);
    for version in [1, 2] {
        let n = u32::from(version);
        let mut socket = Socket::open(at, version).await;
        socket.joined("1", &topic(n), None).await;
        core.start_flow("f", "{}", n).await;
        assert_eq!(socket.broadcast().await.1, 1);
        drop(socket);
        core.take("f").await;
        core.complete(n, "a", 0, "{}").await;
        let mut socket = Socket::open(at, version).await;
        socket.joined("1", &topic(n), None).await;
        let mut last = 0;
        while last < 4 {
            let (event, seq, replayed) = socket.broadcast().await;
            assert!(replayed && seq == last + 1, "{event} {seq} after {last}");
            last = seq;
        }
        core.take("f").await;
        core.complete(n, "b", 0, "{}").await;
        // Its repeats aside, what follows comes once and in order.
        while last < 6 {
            let (event, seq, replayed) = socket.broadcast().await;
            if !replayed {
                assert_eq!(seq, last + 1, "{event}");
                last = seq;
            }
        }
    }
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn frames_that_are_none_end_their_socket_and_no_other() {
    let stage = stage().await;
    let (core, at) = (&stage.core, stage.at);
    let mut other = Socket::open(at, 2).await;
    other.joined("1", &topic(1), None).await;
    // (RFC 6455, "5. Data Framing")
    let malformed: [&[u8]; 7] = [
        b"\x81\x02hi",
        b"\xf1\x80\0\0\0\0",
        b"\x83\x80\0\0\0\0",
        b"\x80\x80\0\0\0\0",
        b"\x81\x82\0\0\0\0\xff\xfe",
        b"\x09\x80\0\0\0\0",
        b"\x81\xff\xff\xff\xff\xff\xff\xff\xff\xff\0\0\0\0",
    ];
    for bytes in malformed {
        let mut socket = Socket::open(at, 2).await;
        socket.joined("1", &topic(1), None).await;
        socket.stream.get_mut().write_all(bytes).await.unwrap();
        loop {
            match socket.next_raw().await {
                None | Some(Message::Close(_)) => break,
                Some(_) => {}
            }
        }
    }
    let upgrade = [
        "upgrade: websocket",
        "connection: upgrade",
        "sec-websocket-version: 13",
        "sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==",
    ];
    let path = format!("/realtime/v1/websocket?apikey={KEY}&vsn=3.0.0");
    assert_eq!(get(at, &path, &upgrade).await.status, 400);
    wait_until("only the other is left", PATIENCE, async || {
        stage
            .proxy
            .metric("flowgate_http_streams{kind=\"websocket\"}")
            == 1
    })
    .await;
    core.start_flow("f", "{}", 1).await;
    assert_eq!(other.broadcast().await.1, 1);
    stage.proxy.shut_down().await;
}

#[tokio::test]
async fn joins_sent_together_are_answered_in_their_order_and_the_later_of_a_topic_counts() {
    let stage = stage().await;
    for version in [1, 2] {
        let mut socket = Socket::open(stage.at, version).await;
        for (reference, n) in [("1", 1), ("2", 2), ("3", 3), ("4", 1)] {
            socket.join(reference, &topic(n), None).await;
        }
        socket.join("5", "realtime:", None).await;
        let leave = json!(["2", "6", topic(2), "phx_leave", {}]);
        socket.say(leave).await;
        let mut said = Vec::new();
        for _ in 0..8 {
            let next = socket.next().await;
            let status = next[4]["status"].as_str().unwrap_or("closed");
            said.push(format!("{} {status}", next[1].as_str().unwrap()));
        }
        let closed = said.iter().position(|said| said == "1 closed").unwrap();
        let again = said.iter().position(|said| said == "4 ok").unwrap();
        assert!(closed < again, "{said:?}");
        // When the one is closed says nothing of other topics.
        said.remove(closed);
        let expected = [
            "1 ok", "2 ok", "3 ok", "4 ok", "5 error", "6 ok", "2 closed",
        ];
        assert_eq!(said, expected);
    }
    stage.proxy.shut_down().await;
}

/// As realtime-js up to 2.11 does when its socket broke while it joined, and ever after.
#[tokio::test]
async fn who_joins_without_a_ref_is_served_and_told_of_an_error_at_each_try() {
    let stage = stage().await;
    stage.core.start_flow("f", "{}", 1).await;
    for version in [1, 2] {
        let mut socket = Socket::open(stage.at, version).await;
        // The end of the channel before would be taken for that of this one, and of others.
        for _ in 0..2 {
            socket.join("", &topic(1), None).await;
            let mut reply = socket.next().await;
            while reply[3] == "broadcast" {
                reply = socket.next().await;
            }
            assert_eq!(
                (&reply[1], &reply[3], &reply[4]["status"]),
                (&json!(""), &json!("phx_reply"), &json!("ok"))
            );
            let told = socket.next().await;
            assert_eq!(told, json!(["", null, topic(1), "phx_error", {}]));
            let event = socket.next().await;
            assert_eq!(event[3], "broadcast", "{event}");
        }
        // With a ref there is nothing to be told.
        let mut other = Socket::open(stage.at, version).await;
        other.join("1", &topic(1), None).await;
        assert_eq!(other.next().await[4]["status"], "ok");
        assert_eq!(other.next().await[3], "broadcast");
    }
    stage.proxy.shut_down().await;
}
