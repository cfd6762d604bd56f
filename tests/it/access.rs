//! Who may come in, and from where: the rules of `[[access]]`, in Postgres' own words, and clients behind a balancer that names
//! them by PROXY headers.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use flowgate::config::{self, AccessRule, Config, Flags, ProxyProtocol};
use flowgate::embedded::{Cluster, ClusterOptions};
use tokio::net::TcpStream;

use crate::support::certs::{Certs, EC, psql, set_hba};
use crate::support::pg::fresh_database;
use crate::support::proxy::{PATIENCE, Proxy, text, try_connect};
use crate::support::raw::{self, PROTOCOL_3_0, Raw, error_code, startup, transcript};
use crate::support::wait::wait_until;

/// `[[access]]` as in a file, checked beside the certificates of `config`.
pub(crate) fn rules(text: &str, config: &Config) -> Vec<AccessRule> {
    let show = |path: &Option<std::path::PathBuf>| {
        path.as_ref()
            .map_or(String::new(), |path| path.display().to_string())
    };
    let listen = &config.listen;
    let file = format!(
        "{text}\n[listen]\ntls_cert = \"{}\"\ntls_key = \"{}\"\ntls_client_ca = \"{}\"\n[primary]\nurl = \"{}\"\n",
        show(&listen.tls_cert),
        show(&listen.tls_key),
        show(&listen.tls_client_ca),
        config.primary
    );
    let read = config::from_sources(
        Some((Path::new("access.toml"), &file)),
        std::iter::empty(),
        Flags::default(),
    );
    read.unwrap_or_else(|error| panic!("{error}")).access
}

/// What the server says to such a login, up to its end or to ReadyForQuery.
async fn login(port: u16, parameters: &[(&str, &str)]) -> String {
    let mut raw = Raw::connect(port).await;
    raw.send(&startup(PROTOCOL_3_0, parameters)).await;
    let frames = raw.until_ready().await;
    match frames.last() {
        Some(last) if last.tag == b'Z' => "in".to_owned(),
        _ => transcript(&frames),
    }
}

/// One statement at a time: CREATE DATABASE wants to be alone.
async fn cluster_of(roles: &str) -> Cluster {
    let cluster = Cluster::start(ClusterOptions {
        replicas: 0,
        ..ClusterOptions::default()
    })
    .await
    .unwrap();
    let admin = cluster.connect_primary().await.unwrap();
    for statement in roles.split(';') {
        admin.batch_execute(statement).await.unwrap();
    }
    cluster
}

#[tokio::test]
async fn the_first_rule_that_fits_decides_in_postgres_words() {
    let cluster = cluster_of(
        "create role alice login password 'wonderland'; create role bob login; create role mallory login superuser;
         create database alice; create database app",
    )
    .await;
    let toml = r#"
        [[access]]
        user = "mallory"
        method = "reject"
        [[access]]
        database = ["sameuser", "postgres"]
        user = ["alice", "postgres"]
        address = "127.0.0.0/8"
        method = "trust"
        [[access]]
        database = "replication"
        user = "postgres"
        address = ["::1", "127.0.0.1"]
        method = "trust"
        [[access]]
        user = "bob"
        address = "192.0.2.0/24"
    "#;
    // The same rules as Postgres reads them.
    set_hba(
        &cluster,
        &[
            "host all mallory all reject",
            "host sameuser,postgres alice,postgres 127.0.0.0/8 trust",
            "host replication postgres 127.0.0.1/32 trust",
            "host all bob 192.0.2.0/24 scram-sha-256",
        ],
    )
    .await;
    let url = cluster.primary_url();
    let proxy = Proxy::before(&url, &[], |config| config.access = rules(toml, config)).await;
    let cases: [(&[(&str, &str)], bool); 10] = [
        (&[("user", "alice"), ("database", "alice")], true),
        (&[("user", "alice"), ("database", "postgres")], true),
        (&[("user", "alice"), ("database", "app")], false),
        (&[("user", "postgres"), ("database", "postgres")], true),
        (&[("user", "mallory"), ("database", "postgres")], false),
        (&[("user", "bob"), ("database", "postgres")], false),
        (&[("user", "nobody"), ("database", "postgres")], false),
        (&[("user", "postgres"), ("replication", "true")], true),
        (&[("user", "alice"), ("replication", "true")], false),
        (&[("user", "mallory"), ("replication", "true")], false),
    ];
    let mut refused = 0;
    for (parameters, gets_in) in cases {
        let direct = login(cluster.primary_port(), parameters).await;
        let ours = login(proxy.port, parameters).await;
        assert_eq!(ours, direct, "{parameters:?}");
        assert_eq!(ours == "in", gets_in, "{parameters:?}: {ours}");
        refused += u64::from(!gets_in);
    }
    assert_eq!(proxy.metric("flowgate_access_refused_total"), refused);
    // The console is a database like any other to these rules.
    let console = login(proxy.port, &[("user", "alice"), ("database", "flowgate")]).await;
    assert!(console.contains("28000"), "{console}");
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn a_rule_may_ask_for_tls_or_a_password() {
    let Some(certs) = Certs::new() else { return };
    let shown = certs.own("proxy", &EC);
    let cluster = cluster_of("create role alice login password 'wonderland'").await;
    let toml = r#"
        [[access]]
        user = "alice"
        tls = "require"
    "#;
    let proxy = Proxy::before(&cluster.primary_url(), &[], |config| {
        config.listen.tls = config::ClientTls::Allow;
        config.listen.tls_cert = Some(shown.cert.clone());
        config.listen.tls_key = Some(shown.key.clone());
        config.access = rules(toml, config);
    })
    .await;
    let info = |more: &str| {
        format!(
            "host=127.0.0.1 port={} user=alice dbname=postgres {more}",
            proxy.port
        )
    };
    for (more, wanted) in [
        ("sslmode=require password=wonderland", Ok("alice")),
        (
            "sslmode=require password=wrong",
            Err("password authentication failed for user \"alice\""),
        ),
        (
            "sslmode=disable password=wonderland",
            Err(
                "no pg_hba.conf entry for host \"127.0.0.1\", user \"alice\", database \"postgres\", no encryption",
            ),
        ),
    ] {
        let Some(said) = psql(&info(more), "select session_user").await else {
            return;
        };
        match wanted {
            Ok(user) => assert_eq!(said.as_deref(), Ok(user), "{more}"),
            Err(words) => assert!(
                said.clone().unwrap_err().contains(words),
                "{more}: {said:?}"
            ),
        }
    }
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}

/// Rules changed while clients are connected are for those who come after.
#[tokio::test]
async fn rules_are_replaced_for_whoever_comes_next() {
    let db = fresh_database().await;
    let mut config = None;
    let proxy = Proxy::without_replica(&db, |proxied| config = Some(proxied.clone())).await;
    let mut config = config.unwrap();
    let client = proxy.connect().await;
    config.access = rules("[[access]]\nmethod = \"reject\"", &config);
    proxy.reload_as(&config).await.unwrap();
    let refused = try_connect(&proxy.url()).await.map(drop).unwrap_err();
    assert_eq!(refused.code().map(|code| code.code()), Some("28000"));
    assert_eq!(text(&client, "select 'still here'").await, "still here");
    proxy.shut_down().await;
}

// ---- PROXY headers ----

fn behind_balancer(config: &mut Config) {
    config.listen.proxy_protocol = ProxyProtocol::Require;
    config.listen.proxy_protocol_from = vec!["127.0.0.1".parse().unwrap()];
}

const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// Version 2: command, family, and what follows.
fn binary(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
    let length = u16::try_from(rest.len()).unwrap().to_be_bytes();
    [SIGNATURE, &[command, family], &length, rest].concat()
}

fn four(source: [u8; 4]) -> Vec<u8> {
    [&source[..], &[127, 0, 0, 1], &[0x30, 0x39, 0x19, 0x20]].concat()
}

#[tokio::test]
async fn a_client_is_whom_its_balancer_names() {
    let db = fresh_database().await;
    let toml = r#"
        [[access]]
        address = ["192.0.2.0/24", "2001:db8::/32"]
        method = "trust"
    "#;
    let proxy = Proxy::without_replica(&db, |config| {
        config.auth.allow_trust_anywhere = true;
        behind_balancer(config);
        let text = format!("{toml}\n[auth]\nallow_trust_anywhere = true\n");
        config.access = rules(&text, config);
    })
    .await;
    let six = |source: &str| {
        let source: std::net::Ipv6Addr = source.parse().unwrap();
        [&source.octets()[..], &[0; 16], &[0x30, 0x39, 0x19, 0x20]].concat()
    };
    let other = |host: &str| {
        format!(
            "E FATAL|28000|no pg_hba.conf entry for host \"{host}\", user \"postgres\", database \"{}\", no encryption",
            db.name
        )
    };
    let tlvs = [4, 0, 1, 0].repeat(1000);
    let cases: Vec<(Vec<u8>, String)> = vec![
        (
            b"PROXY TCP4 192.0.2.7 127.0.0.1 4711 6432\r\n".to_vec(),
            "in".into(),
        ),
        (
            b"PROXY TCP4 198.51.100.7 127.0.0.1 4711 6432\r\n".to_vec(),
            other("198.51.100.7"),
        ),
        (
            b"PROXY TCP6 2001:db8::7 ::1 4711 6432\r\n".to_vec(),
            "in".into(),
        ),
        (
            b"PROXY TCP6 2001:db9::7 ::1 4711 6432\r\n".to_vec(),
            other("2001:db9::7"),
        ),
        (binary(0x21, 0x11, &four([192, 0, 2, 8])), "in".into()),
        (
            binary(0x21, 0x11, &[&four([192, 0, 2, 8])[..], &tlvs].concat()),
            "in".into(),
        ),
        (binary(0x21, 0x11, &four([10, 0, 0, 1])), other("10.0.0.1")),
        (binary(0x21, 0x21, &six("2001:db8::9")), "in".into()),
        (binary(0x21, 0x21, &six("::ffff:192.0.2.9")), "in".into()),
        // The balancer for itself, or for somebody it does not know: then its own address counts.
        (b"PROXY UNKNOWN\r\n".to_vec(), other("127.0.0.1")),
        (binary(0x20, 0, &[]), other("127.0.0.1")),
        (
            binary(0x20, 0x11, &four([192, 0, 2, 8])),
            other("127.0.0.1"),
        ),
        (binary(0x21, 0x31, &[7; 216]), other("127.0.0.1")),
    ];
    let user = [("user", "postgres"), ("database", db.name.as_str())];
    for (header, wanted) in &cases {
        // Whole, header and login in one; and byte by byte.
        for step in [usize::MAX, 1] {
            let mut raw = Raw::connect(proxy.port).await;
            let sent = [&header[..], &startup(PROTOCOL_3_0, &user)].concat();
            for part in sent.chunks(step.min(sent.len())) {
                raw.send(part).await;
            }
            let frames = raw.until_ready().await;
            let said = match frames.last() {
                Some(last) if last.tag == b'Z' => "in".to_owned(),
                _ => transcript(&frames),
            };
            assert_eq!(said, *wanted, "{}", header.escape_ascii());
        }
    }
    assert_eq!(
        proxy.metric("flowgate_proxy_headers_refused_total{why=\"malformed\"}"),
        0
    );
    proxy.shut_down().await;
}

#[tokio::test]
async fn whoever_brings_no_good_header_is_closed_without_a_word() {
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, behind_balancer).await;
    let user = [("user", "postgres"), ("database", db.name.as_str())];
    let malformed: Vec<Vec<u8>> = vec![
        startup(PROTOCOL_3_0, &user),
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        b"PROXY TCP4 nobody 127.0.0.1 1 2\r\n".to_vec(),
        b"PROXY TCP4 192.0.2.7 127.0.0.1 1 2\n".to_vec(),
        [b"PROXY UNKNOWN ", &b"x".repeat(200)[..], b"\r\n"].concat(),
        binary(0x11, 0x11, &four([192, 0, 2, 8])),
        binary(0x22, 0x11, &four([192, 0, 2, 8])),
        binary(0x21, 0x11, &[1, 2, 3]),
        binary(0x21, 0x99, &four([192, 0, 2, 8])),
    ];
    for (at, bytes) in malformed.iter().enumerate() {
        let mut raw = Raw::connect(proxy.port).await;
        raw.try_send(bytes).await;
        let frames = raw.until_end().await;
        assert!(frames.is_empty(), "{}", transcript(&frames));
        wait_until("it is counted", PATIENCE, async || {
            proxy.metric("flowgate_proxy_headers_refused_total{why=\"malformed\"}") == at as u64 + 1
        })
        .await;
    }
    // Cut anywhere, it is nobody's business.
    let whole = binary(0x21, 0x11, &four([192, 0, 2, 8]));
    for cut in 0..whole.len() {
        let mut raw = Raw::connect(proxy.port).await;
        raw.send(&whole[..cut]).await;
        raw.half_close().await;
        assert!(raw.until_end().await.is_empty());
    }
    wait_until("they are gone", PATIENCE, async || {
        proxy.metric("flowgate_clients") == 0
    })
    .await;
    proxy.shut_down().await;

    let proxy = Proxy::without_replica(&db, |config| {
        behind_balancer(config);
        config.listen.proxy_protocol_from = vec!["10.0.0.0/8".parse().unwrap()];
    })
    .await;
    let mut raw = Raw::connect(proxy.port).await;
    raw.try_send(b"PROXY TCP4 10.0.0.1 127.0.0.1 4711 6432\r\n")
        .await;
    assert!(raw.until_end().await.is_empty());
    wait_until("it is counted", PATIENCE, async || {
        proxy.metric("flowgate_proxy_headers_refused_total{why=\"untrusted\"}") == 1
    })
    .await;
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_header_is_waited_for_no_longer_than_a_login() {
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, |config| {
        behind_balancer(config);
        config.listen.login_timeout = Duration::from_millis(200);
    })
    .await;
    for sent in [&b""[..], b"PROXY TCP4 192.0", SIGNATURE] {
        let mut raw = Raw::connect(proxy.port).await;
        raw.send(sent).await;
        assert!(raw.until_end().await.is_empty());
    }
    proxy.shut_down().await;
}

#[tokio::test]
async fn tls_begins_right_after_the_header() {
    let Some(certs) = Certs::new() else { return };
    let shown = certs.own("proxy", &EC);
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, |config| {
        behind_balancer(config);
        config.listen.tls = config::ClientTls::Require;
        config.listen.tls_cert = Some(shown.cert.clone());
        config.listen.tls_key = Some(shown.key.clone());
    })
    .await;
    // A balancer that puts the header ahead of whatever comes.
    let balancer = tokio::net::TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0)))
        .await
        .unwrap();
    let (port, behind) = (balancer.local_addr().unwrap().port(), proxy.port);
    let relayed = tokio::spawn(async move {
        while let Ok((mut client, _)) = balancer.accept().await {
            let mut server = TcpStream::connect(("127.0.0.1", behind)).await.unwrap();
            let header = b"PROXY TCP4 192.0.2.7 127.0.0.1 4711 6432\r\n";
            tokio::io::AsyncWriteExt::write_all(&mut server, header)
                .await
                .unwrap();
            // Either side may just go.
            drop(tokio::io::copy_bidirectional(&mut client, &mut server).await);
        }
    });
    let info = format!(
        "host=127.0.0.1 port={port} user=postgres dbname={} sslmode=verify-full sslrootcert={}",
        db.name,
        shown.cert.display()
    );
    if let Some(said) = psql(&info, "select 'encrypted'").await {
        assert_eq!(said.as_deref(), Ok("encrypted"));
    }
    relayed.abort();
    proxy.shut_down().await;
}

// ---- other Flowgates ----

/// Cancels through whichever of two proxies the balancer picks.
#[tokio::test]
async fn a_cancel_finds_its_client_through_another_flowgate() {
    let db = fresh_database().await;
    // Addresses are known once a proxy listens; those asked for are free a moment ago.
    for (protocol, named) in [
        (PROTOCOL_3_0, true),
        (raw::PROTOCOL_3_2, true),
        (raw::PROTOCOL_3_2, false),
    ] {
        let (one, two) = two_flowgates(&db, |config| {
            if !named {
                config.cluster.address = None;
            }
        })
        .await;
        let direct = db.connect().await;
        for (home, other) in [(&one, &two), (&two, &one)] {
            let mut raw = Raw::connect(home.port).await;
            let user = [("user", "postgres"), ("database", db.name.as_str())];
            raw.send(&startup(protocol, &user)).await;
            raw.until_ready().await;
            raw.send(&raw::query("select pg_sleep(600)")).await;
            let pid = raw.pid();
            wait_until("it sleeps", PATIENCE, async || {
                let state = format!("select state from pg_stat_activity where pid = {pid}");
                text(&direct, &state).await == "active"
            })
            .await;
            let forwarded = |proxy: &Proxy| proxy.metric("flowgate_cancels_forwarded_total");
            let (before, before_here) = (forwarded(other), forwarded(home));
            raw::cancel(other.port, &raw.key).await;
            let frames = raw.until_ready().await;
            assert_eq!(error_code(&frames).as_deref(), Some("57014"));
            // A key that says who made it is asked of that one alone: of three peers, one or all.
            let asked = forwarded(other) - before;
            let alone = named && protocol == raw::PROTOCOL_3_2;
            assert_eq!(asked, if alone { 1 } else { 2 });
            assert_eq!(forwarded(home), before_here, "it went on from there");
            // Once its client has left, a key is nobody's; the one who made it knows.
            let key = raw.key.clone();
            drop(raw);
            wait_until("it has left", PATIENCE, async || {
                home.metric("flowgate_clients") == 0
            })
            .await;
            raw::cancel(home.port, &key).await;
            let asked = forwarded(home) - before_here;
            assert_eq!(asked, if alone { 0 } else { 2 });
        }
        // Nobody's key goes to everybody once, and no further.
        let total = |name: &str| one.metric(name) + two.metric(name);
        let forwarded = total("flowgate_cancels_forwarded_total");
        raw::cancel(one.port, &[0, 0, 0, 7, 1, 2, 3, 4]).await;
        assert_eq!(total("flowgate_cancels_forwarded_total"), forwarded + 2);
        one.shut_down().await;
        two.shut_down().await;
    }
}

/// Each has the other for a peer, and one more that is not there.
async fn two_flowgates(
    db: &crate::support::pg::TestDb,
    tweak: impl Fn(&mut Config),
) -> (Proxy, Proxy) {
    let ports = [free_port(), free_port()];
    let nobody = format!("127.0.0.1:{}", free_port());
    let address = |port: u16| format!("127.0.0.1:{port}");
    let start = async |ours: u16, theirs: u16| {
        Proxy::without_replica(db, |config| {
            config.listen.postgres = address(ours).parse().unwrap();
            config.cluster.address = Some(address(ours));
            config.cluster.peers = vec![address(theirs), nobody.clone()];
            tweak(config);
        })
        .await
    };
    (
        start(ports[0], ports[1]).await,
        start(ports[1], ports[0]).await,
    )
}

fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    listener.local_addr().unwrap().port()
}

#[tokio::test]
async fn peers_behind_a_balancer_with_headers_get_one_too() {
    let db = fresh_database().await;
    let (one, two) = two_flowgates(&db, behind_balancer).await;
    let mut raw = Raw::connect(one.port).await;
    let header = b"PROXY TCP4 192.0.2.7 127.0.0.1 4711 6432\r\n";
    raw.send(header).await;
    let user = [("user", "postgres"), ("database", db.name.as_str())];
    raw.send(&startup(PROTOCOL_3_0, &user)).await;
    raw.until_ready().await;
    raw.send(&raw::query("select pg_sleep(600)")).await;
    let direct = db.connect().await;
    let pid = raw.pid();
    wait_until("it sleeps", PATIENCE, async || {
        let state = format!("select state from pg_stat_activity where pid = {pid}");
        text(&direct, &state).await == "active"
    })
    .await;
    let mut cancel = Raw::connect(two.port).await;
    let code = 80_877_102u32.to_be_bytes();
    let packet = raw::untagged(&[&code[..], &raw.key].concat());
    cancel.send(&[&header[..], &packet].concat()).await;
    assert!(cancel.until_end().await.is_empty());
    let frames = raw.until_ready().await;
    assert_eq!(error_code(&frames).as_deref(), Some("57014"));
    one.shut_down().await;
    two.shut_down().await;
}

/// While one is stuck, others are dropped and counted; nobody waits for long.
#[tokio::test]
async fn forwarding_is_bounded() {
    let db = fresh_database().await;
    // Takes a connection and never says a word.
    let deaf = tokio::net::TcpListener::bind(("127.0.0.1", 0))
        .await
        .unwrap();
    let proxy = Proxy::without_replica(&db, |config| {
        config.cluster.peers = vec![deaf.local_addr().unwrap().to_string()];
        config.cluster.forwards_max = 1.try_into().unwrap();
        config.pool.connect_timeout = Duration::from_secs(2);
    })
    .await;
    let port = proxy.port;
    let key = [0, 0, 0, 7, 1, 2, 3, 4];
    let stuck = tokio::spawn(async move { raw::cancel(port, &key).await });
    wait_until("it is under way", PATIENCE, async || {
        proxy.metric("flowgate_cancels_forwarded_total") == 1
    })
    .await;
    raw::cancel(port, &key).await;
    assert_eq!(proxy.metric("flowgate_cancels_dropped_total"), 1);
    stuck.await.unwrap();
    assert_eq!(proxy.metric("flowgate_cancels_forward_failures_total"), 1);
    proxy.shut_down().await;
}
