//! Who gets in: SCRAM through the proxy without a plaintext kept, the same refusal for a wrong password and an unknown user,
//! TLS as libpq's words say.

use std::path::{Path, PathBuf};
use std::process::Command;

use flowgate::config::{AuthMethod, ClientTls, Config};
use flowgate::embedded::{Cluster, ClusterOptions};
use tempfile::TempDir;

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
        ("nopassword", ""),
    ];
    for (user, password) in cases {
        let refused = try_connect(&url(&proxy, user, password))
            .await
            .map(drop)
            .unwrap_err();
        let Some(error) = refused.as_db_error() else {
            continue;
        };
        assert_eq!(error.code().code(), "28P01", "{user}");
        assert_eq!(
            error.message(),
            format!("password authentication failed for user \"{user}\"")
        );
        assert_eq!((error.detail(), error.hint()), (None, None));
    }
    // Message by message the exchange is the same until its end, for those who exist and those who do not.
    let mut exchanges = Vec::new();
    for user in ["alice", "nobody"] {
        let mut client = Raw::connect(proxy.port).await;
        client
            .send(&raw::startup(
                raw::PROTOCOL_3_0,
                &[("user", user), ("database", "postgres")],
            ))
            .await;
        let asked = client.read().await;
        let first = format!("SCRAM-SHA-256\0\0\0\0\x20n,,n={user},r=0123456789abcdef0123");
        let first = first.replace("n=nobody", "n=").replace("n=alice", "n=");
        let len = u8::try_from(first.len() - 18).unwrap();
        let first = first.replace('\x20', &char::from(len).to_string());
        client.send(&raw::message(b'p', first.as_bytes())).await;
        let challenge = client.read().await;
        let shape: String = String::from_utf8_lossy(&challenge.body[4..])
            .split(',')
            .map(|part| format!("{}{} ", &part[..2], part.len()))
            .collect();
        let iterations = String::from_utf8_lossy(&challenge.body)
            .split(",i=")
            .nth(1)
            .map(str::to_owned);
        exchanges.push((asked.body, challenge.tag, shape, iterations));
    }
    assert_eq!(exchanges[0], exchanges[1]);
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

/// A certificate that signs itself, by the `openssl` of this machine; `None`: there is none.
fn certificate(folder: &Path) -> Option<(PathBuf, PathBuf)> {
    let (cert, key) = (folder.join("cert.pem"), folder.join("key.pem"));
    let made = Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-days",
            "2",
        ])
        .args([
            "-subj",
            "/CN=localhost",
            "-addext",
            "subjectAltName=DNS:localhost,IP:127.0.0.1",
        ])
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .arg("-out")
        .arg(&cert)
        .arg("-keyout")
        .arg(&key)
        .output();
    match made {
        Ok(output) if output.status.success() => Some((cert, key)),
        Ok(output) => panic!("{}", String::from_utf8_lossy(&output.stderr)),
        Err(_) => {
            println!("skipped: no `openssl` on this machine to make a certificate with");
            None
        }
    }
}

#[tokio::test]
async fn tls_is_offered_and_demanded_as_configured() {
    let folder = TempDir::new().unwrap();
    let Some((cert, key)) = certificate(folder.path()) else {
        return;
    };
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
    let folder = TempDir::new().unwrap();
    let Some((cert, key)) = certificate(folder.path()) else {
        return;
    };
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
    let folder = TempDir::new().unwrap();
    let Some((cert, key)) = certificate(folder.path()) else {
        return;
    };
    // Postgres wants the key to be its own and nobody else's: its user owns what lies in its data folder.
    let Some(cluster) = tls_cluster(&cert, &key).await else {
        return;
    };
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

/// A cluster that offers TLS with this certificate.
async fn tls_cluster(cert: &Path, key: &Path) -> Option<Cluster> {
    let cluster = Cluster::start(ClusterOptions {
        replicas: 0,
        ..ClusterOptions::default()
    })
    .await
    .unwrap();
    let admin = cluster.connect_primary().await.unwrap();
    let data = text(&admin, "show data_directory").await;
    // Written by the server itself, so that it owns them whoever runs this test.
    for (name, from) in [("server.crt", cert), ("server.key", key)] {
        let pem = std::fs::read_to_string(from).unwrap();
        let copy = format!(
            "copy (select unnest(string_to_array('{}', E'\\n'))) to '{data}/{name}'",
            pem.trim()
        );
        admin.batch_execute(&copy).await.unwrap();
    }
    let mode = format!("copy (select 1) to program 'chmod 600 \"{data}/server.key\"'");
    admin.batch_execute(&mode).await.unwrap();
    for sql in ["alter system set ssl = on", "select pg_reload_conf()"] {
        admin.batch_execute(sql).await.unwrap();
    }
    if !text(&admin, "select pg_read_file('postgresql.auto.conf')")
        .await
        .contains("ssl")
    {
        return None;
    }
    let url = cluster.primary_url();
    crate::support::wait::wait_until("TLS is on", crate::support::proxy::PATIENCE, async || {
        let admin = flowgate::embedded::connect(&url).await.unwrap();
        text(&admin, "show ssl").await == "on"
    })
    .await;
    Some(cluster)
}
