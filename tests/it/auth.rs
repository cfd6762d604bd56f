//! Who gets in: SCRAM through the proxy without a plaintext kept, the same refusal for a wrong password and an unknown user,
//! TLS as libpq's words say.

use std::process::Command;

use flowgate::config::{AuthMethod, ClientTls, Config};
use flowgate::embedded::{Cluster, ClusterOptions};
use tempfile::TempDir;

use crate::support::certs::{Certificate, Certs, EC, tls_cluster};
use crate::support::pg::fresh_database;
use crate::support::proxy::{Proxy, sqlstate, text, try_connect};
use crate::support::raw::{self, Raw, error_code, transcript, untagged};

/// A cluster that asks everybody for a SCRAM password.
async fn strict_cluster() -> Cluster {
    let cluster = Cluster::start(ClusterOptions {
        replicas: 0,
        password: Some("control secret".to_owned()),
        ..ClusterOptions::default()
    })
    .await
    .unwrap();
    cluster
        .connect_primary()
        .await
        .unwrap()
        .batch_execute(
            "create role alice login password 'wonderland';
             create role expired login password 'wonderland' valid until '2001-01-01';
             create role nologin password 'wonderland';
             create role nopassword login;
             create role olden login;
             update pg_authid set rolpassword = 'md5' || md5('wonderlandolden') where rolname = 'olden';
             create role \"Odd Näme\" login password 'pässwörd ⚙'",
        )
        .await
        .unwrap();
    cluster
}

fn scram(config: &mut Config) {
    config.auth.method = AuthMethod::Scram;
}

fn url(proxy: &Proxy, user: &str, password: &str) -> String {
    let [user, password] = [user, password].map(|text| {
        text.bytes()
            .map(|byte| format!("%{byte:02x}"))
            .collect::<String>()
    });
    format!(
        "postgres://{user}:{password}@127.0.0.1:{}/postgres",
        proxy.port
    )
}

#[tokio::test]
async fn a_password_is_checked_here_and_opens_the_same_users_session_there() {
    let cluster = strict_cluster().await;
    let proxy = Proxy::before(&cluster.primary_url(), &[], scram).await;
    for (user, password) in [
        ("alice", "wonderland"),
        ("Odd Näme", "pässwörd ⚙"),
        ("postgres", "control secret"),
    ] {
        let client = try_connect(&url(&proxy, user, password))
            .await
            .unwrap_or_else(|error| panic!("{user}: {error:?}"));
        assert_eq!(text(&client, "select session_user").await, user);
    }
    // A changed password counts at once, for new sessions.
    cluster
        .connect_primary()
        .await
        .unwrap()
        .batch_execute("alter role alice password 'looking glass'")
        .await
        .unwrap();
    assert_eq!(
        sqlstate(
            try_connect(&url(&proxy, "alice", "wonderland"))
                .await
                .map(drop)
        ),
        "28P01"
    );
    let client = try_connect(&url(&proxy, "alice", "looking glass"))
        .await
        .unwrap();
    assert_eq!(text(&client, "select session_user").await, "alice");
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn whoever_is_refused_learns_nothing_about_why() {
    let cluster = strict_cluster().await;
    let proxy = Proxy::before(&cluster.primary_url(), &[], scram).await;
    let cases = [
        ("alice", "wrong"),
        ("alice", "wonderland "),
        ("nobody", "wonderland"),
        ("expired", "wonderland"),
        ("nologin", "wonderland"),
        ("nopassword", "wonderland"),
        ("olden", "wonderland"),
    ];
    for (user, password) in cases {
        let refused = try_connect(&url(&proxy, user, password))
            .await
            .map(drop)
            .unwrap_err();
        let error = refused.as_db_error().unwrap();
        assert_eq!(error.code().code(), "28P01", "{user}");
        assert_eq!(
            error.message(),
            format!("password authentication failed for user \"{user}\"")
        );
        assert_eq!((error.detail(), error.hint()), (None, None));
    }
    // Message by message the exchange is the same to its end, for those who may log in and those who may not: a stranger who
    // asks for a name learns nothing but that this password is wrong. (What it costs is counted in `wire/scram.rs`.)
    let mut exchanges = Vec::new();
    for user in [
        "alice",
        "nobody",
        "expired",
        "nologin",
        "nopassword",
        "olden",
    ] {
        let mut client = Raw::connect(proxy.port).await;
        client
            .send(&raw::startup(
                raw::PROTOCOL_3_0,
                &[("user", user), ("database", "postgres")],
            ))
            .await;
        let asked = client.read().await;
        let first = "n,,n=,r=0123456789abcdef0123";
        let length = u32::try_from(first.len()).unwrap().to_be_bytes();
        let initial = [b"SCRAM-SHA-256\0", &length[..], first.as_bytes()].concat();
        client.send(&raw::message(b'p', &initial)).await;
        let challenge = client.read().await;
        let text = String::from_utf8_lossy(&challenge.body[4..]).into_owned();
        let shape: String = text
            .split(',')
            .map(|part| format!("{}{} ", &part[..2], part.len()))
            .collect();
        let iterations = text.split(",i=").nth(1).map(str::to_owned);
        let nonce = text.split(',').next().unwrap();
        let proof = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
        let last = format!("c=biws,{nonce},p={proof}");
        client.send(&raw::message(b'p', last.as_bytes())).await;
        let refusal = transcript(&client.until_end().await).replace(user, "?");
        exchanges.push((asked.body, challenge.tag, shape, iterations, refusal));
    }
    for other in &exchanges[1..] {
        assert_eq!(exchanges[0], *other);
    }
    // Asked again, a made-up salt is the same as before, as a real one is.
    let mut salts = Vec::new();
    for user in ["alice", "alice", "nobody", "nobody", "expired", "expired"] {
        let mut client = Raw::connect(proxy.port).await;
        client
            .send(&raw::startup(raw::PROTOCOL_3_0, &[("user", user)]))
            .await;
        client.read().await;
        let initial = b"SCRAM-SHA-256\0\0\0\0\x0bn,,n=,r=abc";
        client.send(&raw::message(b'p', initial)).await;
        let challenge = client.read().await;
        let text = String::from_utf8_lossy(&challenge.body[4..]).into_owned();
        salts.push(text.split(',').nth(1).unwrap().to_owned());
    }
    assert!(
        salts.chunks(2).all(|twice| twice[0] == twice[1]),
        "{salts:?}"
    );
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn a_users_file_is_enough() {
    let cluster = strict_cluster().await;
    let folder = TempDir::new().unwrap();
    let control = cluster.connect_primary().await.unwrap();
    let verifier = text(
        &control,
        "select rolpassword from pg_authid where rolname = 'alice'",
    )
    .await;
    let users = folder.path().join("users.txt");
    std::fs::write(
        &users,
        format!("\"alice\" \"{verifier}\"\n\"postgres\" \"control secret\"\n"),
    )
    .unwrap();
    let proxy = Proxy::before(&cluster.primary_url(), &[], |config| {
        scram(config);
        config.auth.users_file = Some(users);
        config.auth.query = String::new();
    })
    .await;
    let client = try_connect(&url(&proxy, "alice", "wonderland"))
        .await
        .unwrap();
    assert_eq!(text(&client, "select session_user").await, "alice");
    // A plain password in the file logs in to a server that asks for SCRAM, too.
    let control = try_connect(&url(&proxy, "postgres", "control secret"))
        .await
        .unwrap();
    assert_eq!(text(&control, "select session_user").await, "postgres");
    assert_eq!(
        sqlstate(try_connect(&url(&proxy, "alice", "wrong")).await.map(drop)),
        "28P01"
    );
    assert_eq!(
        sqlstate(
            try_connect(&url(&proxy, "expired", "wonderland"))
                .await
                .map(drop)
        ),
        "28P01"
    );
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn broken_exchanges_end_in_words() {
    let cluster = strict_cluster().await;
    let proxy = Proxy::before(&cluster.primary_url(), &[], scram).await;
    let attempts: [&[u8]; 7] = [
        b"",
        b"wonderland\0",
        b"SCRAM-SHA-256\0",
        b"SCRAM-SHA-256\0\x7f\xff\xff\xffn,,n=,r=x",
        b"SCRAM-SHA-256\0\0\0\0\x09n,,n=,r=",
        b"SCRAM-SHA-256-PLUS\0\0\0\0\x0ap=x,,n=,r=",
        b"MD5\0\0\0\0\0",
    ];
    for attempt in attempts {
        let mut client = Raw::connect(proxy.port).await;
        client
            .send(&raw::startup(raw::PROTOCOL_3_0, &[("user", "alice")]))
            .await;
        assert_eq!(client.read().await.tag, b'R');
        client.send(&raw::message(b'p', attempt)).await;
        drop(tokio::io::AsyncWriteExt::shutdown(&mut client.stream).await);
        let frames = client.until_end().await;
        let code = error_code(&frames).unwrap_or_default();
        assert!(
            ["28P01", "08P01", "28000"].contains(&code.as_str()),
            "{attempt:?}: {}",
            transcript(&frames)
        );
        assert!(
            frames.iter().all(|frame| frame.tag == b'E'),
            "{attempt:?}: {}",
            transcript(&frames)
        );
    }
    // A query instead of a password.
    let mut client = Raw::connect(proxy.port).await;
    client
        .send(
            &[
                raw::startup(raw::PROTOCOL_3_0, &[("user", "alice")]),
                raw::query("select 1"),
            ]
            .concat(),
        )
        .await;
    drop(tokio::io::AsyncWriteExt::shutdown(&mut client.stream).await);
    let frames = client.until_end().await;
    assert_eq!(
        error_code(&frames).as_deref(),
        Some("08P01"),
        "{}",
        transcript(&frames)
    );
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}

// ---- TLS ----

#[tokio::test]
async fn tls_is_offered_and_demanded_as_configured() {
    let Some(certs) = Certs::new() else { return };
    let Certificate { cert, key } = certs.own("shown", &EC);
    if Command::new("psql").arg("--version").output().is_err() {
        println!("skipped: no `psql` on this machine to speak TLS with");
        return;
    }
    let db = fresh_database().await;
    let psql = |proxy: &Proxy, sslmode: &str| {
        let conninfo = format!(
            "host=127.0.0.1 port={} user=postgres dbname={} sslmode={sslmode} sslrootcert={}",
            proxy.port,
            db.name,
            cert.display()
        );
        let mut command = tokio::process::Command::new("psql");
        command.args([&conninfo, "-XAtc", "select repeat('tls', 100000)"]);
        command
    };
    for (tls, plain_works) in [(ClientTls::Allow, true), (ClientTls::Require, false)] {
        let proxy = Proxy::without_replica(&db, |config| {
            config.listen.tls = tls;
            config.listen.tls_cert = Some(cert.clone());
            config.listen.tls_key = Some(key.clone());
        })
        .await;
        for sslmode in ["require", "verify-ca", "verify-full"] {
            let output = psql(&proxy, sslmode).output().await.unwrap();
            assert!(
                output.status.success(),
                "{tls:?}, {sslmode}: {}",
                String::from_utf8_lossy(&output.stderr)
            );
            assert_eq!(output.stdout.len(), 300_001);
        }
        let output = psql(&proxy, "disable").output().await.unwrap();
        assert_eq!(
            output.status.success(),
            plain_works,
            "{tls:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        proxy.shut_down().await;
    }
}

/// CVE-2021-23214: what stands in the buffer when the handshake begins came from whoever is in the middle.
#[tokio::test]
async fn plaintext_behind_an_ssl_request_is_refused() {
    let Some(certs) = Certs::new() else { return };
    let Certificate { cert, key } = certs.own("shown", &EC);
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, |config| {
        config.listen.tls = ClientTls::Allow;
        config.listen.tls_cert = Some(cert);
        config.listen.tls_key = Some(key);
    })
    .await;
    let mut client = Raw::connect(proxy.port).await;
    let injected = raw::startup(raw::PROTOCOL_3_0, &[("user", "postgres")]);
    client
        .send(&[untagged(&raw::SSL_REQUEST.to_be_bytes()), injected].concat())
        .await;
    let frames = client.until_end().await;
    assert_eq!(
        error_code(&frames).as_deref(),
        Some("08P01"),
        "{}",
        transcript(&frames)
    );
    proxy.shut_down().await;
}

#[tokio::test]
async fn servers_are_reached_over_tls_and_their_certificate_is_checked() {
    let Some(certs) = Certs::new() else { return };
    let shown = certs.own("shown", &EC);
    let cluster = tls_cluster(&shown, None, None).await;
    let cert = &shown.cert;
    let plain = cluster.primary_url();
    let with = |query: &str| format!("{plain}?{query}");
    let seen = "select ssl::text from pg_stat_ssl where pid = pg_backend_pid()";
    for (query, encrypted) in [
        ("sslmode=disable", "false"),
        ("sslmode=prefer", "true"),
        ("sslmode=require", "true"),
    ] {
        let proxy = Proxy::before(&with(query), &[], |_| {}).await;
        assert_eq!(
            text(&proxy.connect().await, seen).await,
            encrypted,
            "{query}"
        );
        proxy.shut_down().await;
    }
    let trusted = with(&format!(
        "sslmode=verify-full&sslrootcert={}",
        cert.display()
    ));
    let proxy = Proxy::before(&trusted, &[], |_| {}).await;
    assert_eq!(text(&proxy.connect().await, seen).await, "true");
    proxy.shut_down().await;
    let untrusted = Proxy::before(&with("sslmode=verify-full"), &[], |_| {}).await;
    let refused = try_connect(&untrusted.url()).await;
    assert_eq!(sqlstate(refused.map(drop)), "08006");
    untrusted.shut_down().await;
    cluster.stop().await.unwrap();
}
