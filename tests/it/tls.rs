//! TLS in depth: logins bound to the connection (SCRAM-SHA-256-PLUS) on both sides, client certificates on both sides, `sslmode`
//! and direct TLS towards servers, certificates changed while clients are connected.

use std::sync::Arc;

use flowgate::config::{AuthMethod, ClientTls, Config};
use flowgate::embedded::Cluster;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::support::certs::{
    Certificate, Certs, EC, psql, set_hba, show, tls_cluster, with_certificate,
};
use crate::support::pg::fresh_database;
use crate::support::proxy::{PATIENCE, Proxy, sqlstate, text, try_connect};
use crate::support::raw::{self, Frame, Raw, message, startup, transcript, untagged};
use crate::support::wait::wait_until;

const RSA: [&str; 2] = ["-newkey", "rsa:2048"];

/// Clients log in by SCRAM over TLS with this certificate.
fn scram_over_tls(config: &mut Config, shown: &Certificate) {
    config.auth.method = AuthMethod::Scram;
    over_tls(config, shown);
}

fn over_tls(config: &mut Config, shown: &Certificate) {
    config.listen.tls = ClientTls::Allow;
    config.listen.tls_cert = Some(shown.cert.clone());
    config.listen.tls_key = Some(shown.key.clone());
}

async fn scram_cluster(certs: &Certs) -> (Cluster, Certificate) {
    let shown = certs.own("server", &EC);
    let cluster = tls_cluster(&shown, None, Some("control secret")).await;
    cluster
        .connect_primary()
        .await
        .unwrap()
        .batch_execute("create role alice login password 'wonderland'")
        .await
        .unwrap();
    (cluster, shown)
}

fn conninfo(port: u16, more: &str) -> String {
    format!("host=127.0.0.1 port={port} user=alice password=wonderland dbname=postgres {more}")
}

/// libpq computes the hash by itself, so each algorithm is checked against it.
#[tokio::test]
async fn libpq_binds_its_login_to_any_certificate_that_can_be_bound_to() {
    let Some(certs) = Certs::new() else { return };
    let (cluster, _) = scram_cluster(&certs).await;
    let pss = [
        "-newkey",
        "rsa:2048",
        "-sha384",
        "-sigopt",
        "rsa_padding_mode:pss",
    ];
    let algorithms: [(&str, Vec<&str>, bool); 9] = [
        ("rsa-sha1", [&RSA[..], &["-sha1"]].concat(), true),
        ("rsa-sha224", [&RSA[..], &["-sha224"]].concat(), true),
        ("rsa-sha256", [&RSA[..], &["-sha256"]].concat(), true),
        ("rsa-sha384", [&RSA[..], &["-sha384"]].concat(), true),
        ("rsa-sha512", [&RSA[..], &["-sha512"]].concat(), true),
        ("rsa-pss-sha384", pss.to_vec(), true),
        ("ec-sha256", [&EC[..], &["-sha256"]].concat(), true),
        ("ec-sha512", [&EC[..], &["-sha512"]].concat(), true),
        ("ed25519", vec!["-newkey", "ed25519"], false),
    ];
    for (name, algorithm, can_bind) in algorithms {
        let shown = certs.own(name, &algorithm);
        let proxy = Proxy::before(&cluster.primary_url(), &[], |config| {
            scram_over_tls(config, &shown);
        })
        .await;
        for (binding, works) in [("require", can_bind), ("prefer", true), ("disable", true)] {
            let info = conninfo(
                proxy.port,
                &format!("sslmode=require channel_binding={binding}"),
            );
            let Some(said) = psql(&info, "select session_user").await else {
                return;
            };
            assert_eq!(
                said.as_deref().ok(),
                works.then_some("alice"),
                "{name}, {binding}: {said:?}"
            );
        }
        // Nothing to bind to without TLS.
        let info = conninfo(proxy.port, "sslmode=disable channel_binding=require");
        let said = psql(&info, "select 1").await.unwrap().unwrap_err();
        assert!(said.contains("channel binding"), "{said}");
        let wrong = "password=wrong sslmode=require channel_binding=prefer";
        let said = psql(&conninfo(proxy.port, wrong), "select 1")
            .await
            .unwrap();
        let said = said.unwrap_err();
        assert!(
            said.contains("password authentication failed for user \"alice\""),
            "{said}"
        );
        proxy.shut_down().await;
    }
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn a_login_is_bound_on_both_sides_and_no_password_is_kept() {
    let Some(certs) = Certs::new() else { return };
    let (cluster, server) = scram_cluster(&certs).await;
    set_hba(&cluster, &["hostssl all all 127.0.0.1/32 scram-sha-256"]).await;
    let shown = certs.own("proxy", &RSA);
    let url = format!(
        "{}?sslmode=verify-full&sslrootcert={}&channel_binding=require",
        cluster.primary_url(),
        show(&server.cert)
    );
    let proxy = Proxy::before(&url, &[], |config| scram_over_tls(config, &shown)).await;
    let info = format!(
        "sslmode=verify-full sslrootcert={} channel_binding=require",
        show(&shown.cert)
    );
    let ssl = "select session_user, ssl from pg_stat_ssl where pid = pg_backend_pid()";
    let Some(said) = psql(&conninfo(proxy.port, &info), ssl).await else {
        return;
    };
    assert_eq!(said.as_deref(), Ok("alice|t"));
    // One side bound, the other not even encrypted.
    let said = psql(&conninfo(proxy.port, "sslmode=disable"), ssl).await;
    assert_eq!(said.unwrap().as_deref(), Ok("alice|t"));
    proxy.shut_down().await;

    // A server that lets us in without any proof has not bound anything.
    set_hba(&cluster, &["host all all 127.0.0.1/32 trust"]).await;
    let proxy = Proxy::before(&url, &[], |config| over_tls(config, &shown)).await;
    let refused = try_connect(&proxy.url()).await;
    assert_eq!(sqlstate(refused.map(drop)), "28000");
    proxy.shut_down().await;
    set_hba(&cluster, &["host all all 127.0.0.1/32 password"]).await;
    let proxy = Proxy::before(&url, &[], |config| over_tls(config, &shown)).await;
    let refused = try_connect(&proxy.url()).await;
    assert_eq!(sqlstate(refused.map(drop)), "28000");
    proxy.shut_down().await;
    // Without the demand, that will do.
    for more in ["", "&channel_binding=disable"] {
        let url = format!("{}?sslmode=require{more}", cluster.primary_url());
        let proxy = Proxy::before(&url, &[], |_| {}).await;
        assert_eq!(text(&proxy.connect().await, "select 'in'").await, "in");
        proxy.shut_down().await;
    }
    cluster.stop().await.unwrap();
}

/// The other end of our own handshake, with the answers said byte by byte.
struct TlsRaw {
    stream: TlsStream<TcpStream>,
}

async fn handshake(port: u16, shown: &Certificate, ask: bool, alpn: &[&str]) -> Option<TlsRaw> {
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(&shown.cert).unwrap())
        .unwrap();
    let mut config =
        ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    let mut tcp = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
    if ask {
        tcp.write_all(&untagged(&raw::SSL_REQUEST.to_be_bytes()))
            .await
            .unwrap();
        assert_eq!(tcp.read_u8().await.unwrap(), b'S');
    }
    let name = ServerName::try_from("localhost").unwrap();
    let connect = TlsConnector::from(Arc::new(config)).connect(name, tcp);
    let stream = timeout(PATIENCE, connect).await.unwrap().ok()?;
    Some(TlsRaw { stream })
}

impl TlsRaw {
    async fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
        self.stream.flush().await.unwrap();
    }

    /// `None` at the end.
    async fn read(&mut self) -> Option<Frame> {
        let read = async {
            let tag = self.stream.read_u8().await.ok()?;
            let length = self.stream.read_u32().await.ok()?;
            let mut body = vec![0; usize::try_from(length - 4).unwrap()];
            self.stream.read_exact(&mut body).await.ok()?;
            Some(Frame { tag, body })
        };
        timeout(PATIENCE, read).await.expect("the server speaks")
    }
}

fn sasl_initial(mechanism: &str, first: &str) -> Vec<u8> {
    let length = u32::try_from(first.len()).unwrap().to_be_bytes();
    message(
        b'p',
        &[mechanism.as_bytes(), &[0], &length, first.as_bytes()].concat(),
    )
}

/// As Postgres says it, word for word.
#[tokio::test]
async fn downgrades_and_wrong_bindings_are_refused_as_postgres_does() {
    let Some(certs) = Certs::new() else { return };
    let (cluster, shown) = scram_cluster(&certs).await;
    let proxy = Proxy::before(&cluster.primary_url(), &[], |config| {
        scram_over_tls(config, &shown);
    })
    .await;
    let (plain, plus) = ("SCRAM-SHA-256", "SCRAM-SHA-256-PLUS");
    // p=tls-server-end-point,, and a hash of something else.
    let another = "cD10bHMtc2VydmVyLWVuZC1wb2ludCwsc29tZXRoaW5nIGVsc2U=";
    let proof = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    let cases = [
        (plain, "y,,n=,r=abc", None, "28000"),
        (plain, "p=tls-server-end-point,,n=,r=abc", None, "08P01"),
        (plus, "n,,n=,r=abc", None, "08P01"),
        (plus, "y,,n=,r=abc", None, "08P01"),
        (plus, "p=tls-unique,,n=,r=abc", None, "08P01"),
        (
            plus,
            "p=tls-server-end-point,,n=,r=abc",
            Some(another),
            "28000",
        ),
        (plain, "n,,n=,r=abc", Some("biws"), "28P01"),
    ];
    for (mechanism, first, last, code) in cases {
        let mut said = Vec::new();
        for port in [cluster.primary_port(), proxy.port] {
            let mut client = handshake(port, &shown, true, &[]).await.unwrap();
            client
                .send(&startup(
                    raw::PROTOCOL_3_0,
                    &[("user", "alice"), ("database", "postgres")],
                ))
                .await;
            let offer = client.read().await.unwrap();
            assert_eq!(
                String::from_utf8_lossy(&offer.body[4..]),
                "SCRAM-SHA-256-PLUS\0SCRAM-SHA-256\0\0"
            );
            client.send(&sasl_initial(mechanism, first)).await;
            if let Some(binding) = last {
                let challenge = client.read().await.unwrap();
                let nonce = String::from_utf8_lossy(&challenge.body[4..]).into_owned();
                let nonce = nonce.split(',').next().unwrap();
                let last = format!("c={binding},{nonce},p={proof}");
                client.send(&message(b'p', last.as_bytes())).await;
            }
            let refusal = client.read().await.unwrap();
            assert_eq!(refusal.field(b'C').as_deref(), Some(code), "{first}");
            assert!(client.read().await.is_none());
            said.push(transcript(&[refusal]));
        }
        assert_eq!(said[0], said[1], "{mechanism} {first}");
    }
    // Without TLS, PLUS is neither offered nor taken.
    for port in [cluster.primary_port(), proxy.port] {
        let mut client = Raw::connect(port).await;
        client
            .send(&startup(
                raw::PROTOCOL_3_0,
                &[("user", "alice"), ("database", "postgres")],
            ))
            .await;
        let offer = client.read().await;
        assert_eq!(&offer.body[4..], b"SCRAM-SHA-256\0\0");
        client
            .send(&sasl_initial(plus, "p=tls-server-end-point,,n=,r=abc"))
            .await;
        assert_eq!(
            transcript(&client.until_end().await),
            "E FATAL|08P01|client selected an invalid SASL authentication mechanism"
        );
    }
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn direct_tls_needs_its_alpn() {
    let Some(certs) = Certs::new() else { return };
    let shown = certs.own("proxy", &EC);
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, |config| over_tls(config, &shown)).await;
    for (ask, alpn, works) in [
        (true, &[][..], true),
        (true, &["postgresql"][..], true),
        (false, &["postgresql"][..], true),
        (false, &["h2", "postgresql"][..], true),
        (false, &[][..], false),
        (false, &["h2"][..], false),
    ] {
        let greeting = async {
            let mut client = handshake(proxy.port, &shown, ask, alpn).await?;
            let user = [("user", "postgres"), ("database", db.name.as_str())];
            client.send(&startup(raw::PROTOCOL_3_0, &user)).await;
            client.read().await
        };
        let greeting = greeting.await.map(|frame| frame.tag);
        assert_eq!(greeting, works.then_some(b'R'), "{ask} {alpn:?}");
    }
    // Ours is another Flowgate's server: that way direct TLS is tried in both directions, whatever Postgres' version.
    let url = format!(
        "{}?sslmode=verify-full&sslrootcert={}&sslnegotiation=direct",
        proxy.url(),
        show(&shown.cert)
    );
    let before = Proxy::before(&url, &[], |_| {}).await;
    assert_eq!(
        text(&before.connect().await, "select 'through two'").await,
        "through two"
    );
    before.shut_down().await;
    proxy.shut_down().await;
}

/// What a balancer or a server of many names goes by.
#[tokio::test]
async fn a_server_is_told_its_name_and_the_protocol() {
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0))
        .await
        .unwrap();
    let port = listener.local_addr().unwrap().port();
    let proxy = Proxy::before(
        &format!("postgres://postgres@localhost:{port}/postgres?sslmode=require"),
        &[],
        |_| {},
    )
    .await;
    let client = tokio::spawn({
        let url = proxy.url();
        async move { try_connect(&url).await.map(drop) }
    });
    let hello = async {
        loop {
            let (mut tcp, _) = listener.accept().await.unwrap();
            let mut request = [0; 8];
            if tcp.read_exact(&mut request).await.is_err() {
                continue;
            }
            tcp.write_all(b"S").await.unwrap();
            let acceptor = rustls::server::Acceptor::default();
            let accepting = tokio_rustls::LazyConfigAcceptor::new(acceptor, tcp);
            let Ok(begun) = accepting.await else { continue };
            let hello = begun.client_hello();
            let name = hello.server_name().map(str::to_owned);
            let protocols: Vec<_> = hello
                .alpn()
                .into_iter()
                .flatten()
                .map(<[u8]>::to_vec)
                .collect();
            // The control role's connections look the same; either will do.
            return (name, protocols);
        }
    };
    let (name, protocols) = timeout(PATIENCE, hello).await.unwrap();
    assert_eq!(name.as_deref(), Some("localhost"));
    assert_eq!(protocols, [b"postgresql"]);
    drop(listener);
    assert!(client.await.unwrap().is_err());
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_handshake_that_is_never_finished_is_ended() {
    let Some(certs) = Certs::new() else { return };
    let shown = certs.own("proxy", &EC);
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, |config| {
        over_tls(config, &shown);
        config.listen.login_timeout = std::time::Duration::from_millis(300);
    })
    .await;
    let request = untagged(&raw::SSL_REQUEST.to_be_bytes());
    let hello = [0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];
    for sent in [&request[..], &hello[..], &hello[..1]] {
        let mut client = Raw::connect(proxy.port).await;
        client.send(sent).await;
        if sent == request {
            assert_eq!(client.bytes(1).await, b"S");
            client.send(&hello).await;
        }
        let mut rest = Vec::new();
        let ended = client.stream.read_to_end(&mut rest);
        drop(timeout(PATIENCE, ended).await.expect("it is hung up on"));
    }
    wait_until("they are counted", PATIENCE, async || {
        proxy.metric("flowgate_logins_failed_total") == 3
    })
    .await;
    proxy.shut_down().await;
}

#[tokio::test]
async fn clients_are_known_by_their_certificates() {
    let Some(certs) = Certs::new() else { return };
    let shown = certs.own("proxy", &EC);
    let (ours, theirs) = (certs.authority("ours"), certs.authority("theirs"));
    let db = fresh_database().await;
    // Without rules, everybody needs one, whatever it says.
    let proxy = Proxy::without_replica(&db, |config| {
        over_tls(config, &shown);
        config.listen.tls_client_ca = Some(ours.cert.clone());
    })
    .await;
    let login = |port: u16, user: &str, more: &str| {
        format!(
            "host=127.0.0.1 port={port} user={user} dbname={} {more}",
            db.name
        )
    };
    let with = |subject: &str, authority: &Certificate| {
        let certificate = certs.client(subject, authority);
        format!("sslmode=require {}", with_certificate(&certificate))
    };
    let anybody = with("anybody", &ours);
    let info = login(proxy.port, "postgres", &anybody);
    let Some(said) = psql(&info, "select session_user").await else {
        return;
    };
    assert_eq!(said.as_deref(), Ok("postgres"));
    for more in ["sslmode=require sslcert=/none", &with("anybody", &theirs)] {
        let said = psql(&login(proxy.port, "postgres", more), "select 1").await;
        assert!(said.unwrap().is_err(), "{more}");
    }
    proxy.shut_down().await;

    // With rules, the common name must be the user's, or the one the rule names.
    let rules = r#"
        [[access]]
        user = "postgres"
        method = "cert"
        [[access]]
        user = "worker"
        method = "cert"
        cert_name = "the worker's machine"
        [[access]]
        user = "guest"
        method = "trust"
    "#;
    db.connect()
        .await
        .batch_execute(
            "do $$ begin create role worker login; create role guest login; exception when duplicate_object then null; end $$",
        )
        .await
        .unwrap();
    let proxy = Proxy::without_replica(&db, |config| {
        over_tls(config, &shown);
        config.listen.tls_client_ca = Some(ours.cert.clone());
        config.access = crate::access::rules(rules, config);
    })
    .await;
    let none = "sslmode=require sslcert=/none".to_owned();
    let cases = [
        ("postgres", with("postgres", &ours), Ok("postgres")),
        (
            "postgres",
            with("worker", &ours),
            Err("certificate authentication failed for user \"postgres\""),
        ),
        (
            "postgres",
            none.clone(),
            Err("connection requires a valid client certificate"),
        ),
        (
            "postgres",
            "sslmode=disable".to_owned(),
            Err("no pg_hba.conf entry for host \"127.0.0.1\", user \"postgres\""),
        ),
        ("worker", with("the worker's machine", &ours), Ok("worker")),
        (
            "worker",
            with("worker", &ours),
            Err("certificate authentication failed for user \"worker\""),
        ),
        ("guest", none, Ok("guest")),
        ("guest", "sslmode=disable".to_owned(), Ok("guest")),
        // One that is shown must be good, needed or not.
        ("guest", with("guest", &theirs), Err("")),
    ];
    for (user, more, wanted) in cases {
        let said = psql(&login(proxy.port, user, &more), "select session_user").await;
        let said = said.unwrap();
        match wanted {
            Ok(user) => assert_eq!(said.as_deref(), Ok(user), "{user} {more}"),
            Err(words) => {
                let said = said.unwrap_err();
                assert!(said.contains(words), "{user} {more}: {said}");
            }
        }
    }
    assert_eq!(proxy.metric("flowgate_access_refused_total"), 1);
    proxy.shut_down().await;
}

#[tokio::test]
async fn servers_may_ask_for_our_certificate() {
    let Some(certs) = Certs::new() else { return };
    let (server, authority) = (certs.own("server", &EC), certs.authority("ours"));
    let cluster = tls_cluster(&server, Some(&authority), None).await;
    set_hba(&cluster, &["hostssl all all 127.0.0.1/32 cert"]).await;
    let of = |subject: &str| {
        let certificate = certs.client(subject, &authority);
        format!(
            "{}?sslmode=verify-full&sslrootcert={}&sslcert={}&sslkey={}",
            cluster.primary_url(),
            show(&server.cert),
            show(&certificate.cert),
            show(&certificate.key)
        )
    };
    let proxy = Proxy::before(&of("postgres"), &[], |_| {}).await;
    let seen =
        "select session_user || ' by ' || client_dn from pg_stat_ssl where pid = pg_backend_pid()";
    assert_eq!(
        text(&proxy.connect().await, seen).await,
        "postgres by /O=flowgate/CN=postgres"
    );
    proxy.shut_down().await;
    let without = format!("{}?sslmode=require", cluster.primary_url());
    for url in [of("somebody"), without] {
        let proxy = Proxy::before(&url, &[], |_| {}).await;
        let refused = try_connect(&proxy.url()).await;
        assert_eq!(sqlstate(refused.map(drop)), "28000");
        proxy.shut_down().await;
    }
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn allow_and_prefer_try_the_other_way() {
    let Some(certs) = Certs::new() else { return };
    let server = certs.own("server", &EC);
    let cluster = tls_cluster(&server, None, None).await;
    let seen = "select ssl::text from pg_stat_ssl where pid = pg_backend_pid()";
    let refused = "28000";
    for (hba, outcomes) in [
        (
            "host",
            [
                ("disable", "false"),
                ("allow", "false"),
                ("prefer", "true"),
                ("require", "true"),
            ],
        ),
        (
            "hostssl",
            [
                ("disable", refused),
                ("allow", "true"),
                ("prefer", "true"),
                ("require", "true"),
            ],
        ),
        (
            "hostnossl",
            [
                ("disable", "false"),
                ("allow", "false"),
                ("prefer", "false"),
                ("require", refused),
            ],
        ),
    ] {
        set_hba(&cluster, &[&format!("{hba} all all 127.0.0.1/32 trust")]).await;
        for (sslmode, wanted) in outcomes {
            let url = format!("{}?sslmode={sslmode}", cluster.primary_url());
            let proxy = Proxy::before(&url, &[], |_| {}).await;
            let outcome = match try_connect(&proxy.url()).await {
                Ok(client) => text(&client, seen).await,
                Err(error) => sqlstate(Err::<(), _>(error)),
            };
            assert_eq!(outcome, wanted, "{hba}, {sslmode}");
            proxy.shut_down().await;
        }
    }
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn a_new_certificate_is_for_new_connections() {
    let Some(certs) = Certs::new() else { return };
    let (old, new) = (certs.own("old", &EC), certs.own("new", &RSA));
    let db = fresh_database().await;
    let mut config = None;
    let proxy = Proxy::without_replica(&db, |proxied| {
        over_tls(proxied, &old);
        config = Some(proxied.clone());
    })
    .await;
    let mut config = config.unwrap();
    let mut client = handshake(proxy.port, &old, true, &[]).await.unwrap();
    let user = [("user", "postgres"), ("database", db.name.as_str())];
    client.send(&startup(raw::PROTOCOL_3_0, &user)).await;
    while client.read().await.unwrap().tag != b'Z' {}

    over_tls(&mut config, &new);
    proxy.reload_as(&config).await.unwrap();
    assert!(handshake(proxy.port, &new, true, &[]).await.is_some());
    assert!(handshake(proxy.port, &old, true, &[]).await.is_none());
    // Who is in stays in.
    client.send(&raw::query("select 'still here'")).await;
    let mut frames = Vec::new();
    while frames.last().is_none_or(|frame: &Frame| frame.tag != b'Z') {
        frames.push(client.read().await.unwrap());
    }
    assert_eq!(raw::first_columns(&frames), ["still here"]);

    // One that cannot be read changes nothing.
    config.listen.tls_cert = Some(new.key.clone());
    let Err(_unreadable) = proxy.reload_as(&config).await else {
        panic!("a key was taken for a certificate")
    };
    assert!(handshake(proxy.port, &new, true, &[]).await.is_some());
    proxy.shut_down().await;
}
