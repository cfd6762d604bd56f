//! Replication connections through the proxy: Postgres' own programs for backups, WAL and logical decoding, and the protocol
//! message by message.

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};

use flowgate::config::AuthMethod;
use flowgate::embedded::{Cluster, ClusterOptions};
use tempfile::TempDir;
use tokio::process::Command;
use tokio::time::timeout;

use crate::support::proxy::{PATIENCE, Proxy, text};
use crate::support::raw::{
    self, PROTOCOL_3_0, PROTOCOL_3_2, Raw, copy_data, copy_done, error_code, first_columns, query,
    startup, tags, transcript,
};
use crate::support::wait::wait_until;

async fn cluster(password: Option<&str>) -> Cluster {
    Cluster::start(ClusterOptions {
        replicas: 0,
        password: password.map(str::to_owned),
        settings: vec![("wal_level".to_owned(), "logical".to_owned())],
        ..ClusterOptions::default()
    })
    .await
    .unwrap()
}

/// One of Postgres' own programs, from where the server is from; `None`: this installation does not bring it.
async fn program(cluster: &Cluster, name: &str) -> Option<PathBuf> {
    let admin = cluster.connect_primary().await.unwrap();
    let folder = text(
        &admin,
        "select setting from pg_config where name = 'BINDIR'",
    )
    .await;
    let path = Path::new(&folder).join(name);
    if path.exists() {
        return Some(path);
    }
    println!("skipped: no {name} in {folder}");
    None
}

async fn run(program: &Path, proxy: &Proxy, user: &str, dbname: &str, args: &[&str]) -> Output {
    let mut command = Command::new(program);
    command
        .arg("-d")
        .arg(format!(
            "host=127.0.0.1 port={} user={user} password=secret application_name=it {dbname}",
            proxy.port
        ))
        .args(args)
        .stdin(Stdio::null())
        .kill_on_drop(true);
    let output = timeout(PATIENCE, command.output()).await;
    let output = output.unwrap_or_else(|_| panic!("{} never ends", program.display()));
    let output = output.unwrap();
    assert!(
        output.status.success(),
        "{} {args:?}: {}",
        program.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    output
}

#[tokio::test]
async fn a_base_backup_is_taken_by_a_role_with_a_password() {
    let cluster = cluster(Some("control secret")).await;
    let (Some(backup), Some(verify)) = (
        program(&cluster, "pg_basebackup").await,
        program(&cluster, "pg_verifybackup").await,
    ) else {
        return;
    };
    let admin = cluster.connect_primary().await.unwrap();
    admin
        .batch_execute("create role backup replication login password 'secret'")
        .await
        .unwrap();
    let proxy = Proxy::before(&cluster.primary_url(), &[], |config| {
        config.auth.method = AuthMethod::Scram;
    })
    .await;
    let folder = TempDir::new().unwrap();
    let data = folder.path().join("data");
    let args = ["-D", data.to_str().unwrap(), "-X", "stream", "-c", "fast"];
    run(&backup, &proxy, "backup", "", &args).await;
    let verified = Command::new(&verify).arg(&data).output().await.unwrap();
    assert!(
        verified.status.success(),
        "{}",
        String::from_utf8_lossy(&verified.stderr)
    );
    // One connection for the files and one for the WAL written meanwhile, both gone.
    assert_eq!(proxy.metric("flowgate_replication_opened_total"), 2);
    assert!(
        proxy.metric("flowgate_replication_bytes_total{from=\"server\"}") > 20_000_000,
        "a cluster is larger than that"
    );
    assert!(proxy.metric("flowgate_replication_bytes_total{from=\"client\"}") > 0);
    wait_until("both are gone", PATIENCE, async || {
        proxy.metric("flowgate_replication_connections") == 0
    })
    .await;
    // A role that may not replicate is told so by Postgres itself.
    admin
        .batch_execute("create role plain login password 'secret'")
        .await
        .unwrap();
    let refused = Command::new(&backup)
        .arg("-d")
        .arg(format!(
            "host=127.0.0.1 port={} user=plain password=secret",
            proxy.port
        ))
        .args(["-D", folder.path().join("none").to_str().unwrap()])
        .output()
        .await
        .unwrap();
    let words = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        words.contains("must be superuser or replication role"),
        "{words}"
    );
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn wal_is_received_byte_for_byte() {
    let cluster = cluster(None).await;
    let Some(receive) = program(&cluster, "pg_receivewal").await else {
        return;
    };
    let proxy = Proxy::before(&cluster.primary_url(), &[], |_| {}).await;
    let admin = cluster.connect_primary().await.unwrap();
    run(
        &receive,
        &proxy,
        "postgres",
        "",
        &["--create-slot", "--slot", "made_by_it"],
    )
    .await;
    // One that keeps WAL from now on, which is where receiving begins.
    admin
        .batch_execute("select pg_create_physical_replication_slot('it', true)")
        .await
        .unwrap();
    let segment = text(&admin, "select pg_walfile_name(pg_current_wal_lsn())").await;
    admin
        .batch_execute(
            "create table noise as select g, repeat('x', 100) from generate_series(1, 20000) g;
             select pg_switch_wal(); create table more (); checkpoint",
        )
        .await
        .unwrap();
    let end = text(&admin, "select pg_current_wal_flush_lsn()").await;
    // It ends with the first word from beyond.
    admin.batch_execute("create table beyond ()").await.unwrap();
    let folder = TempDir::new().unwrap();
    run(
        &receive,
        &proxy,
        "postgres",
        "",
        &[
            "-D",
            folder.path().to_str().unwrap(),
            "--slot",
            "it",
            "--endpos",
            &end,
            "--no-loop",
        ],
    )
    .await;
    let ours = std::fs::read(folder.path().join(&segment)).unwrap();
    let theirs: Vec<u8> = admin
        .query_one(
            &format!("select pg_read_binary_file('pg_wal/{segment}')"),
            &[],
        )
        .await
        .unwrap()
        .get(0);
    assert!(ours == theirs, "{segment} differs");
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn changes_are_decoded_logically() {
    let cluster = cluster(None).await;
    let Some(recvlogical) = program(&cluster, "pg_recvlogical").await else {
        return;
    };
    let proxy = Proxy::before(&cluster.primary_url(), &[], |_| {}).await;
    let admin = cluster.connect_primary().await.unwrap();
    admin
        .batch_execute("create table told (id int primary key, word text); create publication p for table told")
        .await
        .unwrap();
    let slot = ["--slot", "s"];
    run(
        &recvlogical,
        &proxy,
        "postgres",
        "dbname=postgres",
        &[&slot[..], &["--create-slot", "-P", "pgoutput"]].concat(),
    )
    .await;
    admin
        .batch_execute("insert into told values (1, 'hear'), (2, 'me'); update told set word = 'this' where id = 2; truncate told")
        .await
        .unwrap();
    let end = text(&admin, "select pg_current_wal_flush_lsn()").await;
    let output = run(
        &recvlogical,
        &proxy,
        "postgres",
        "dbname=postgres",
        &[
            &slot[..],
            &["--start", "--endpos", &end, "--no-loop", "-f", "-"],
            &["-o", "proto_version=1", "-o", "publication_names=p"],
        ]
        .concat(),
    )
    .await;
    let heard = output.stdout;
    for word in [&b"told"[..], b"hear", b"me", b"this"] {
        assert!(
            heard.windows(word.len()).any(|bytes| bytes == word),
            "{} in {}",
            word.escape_ascii(),
            heard.escape_ascii()
        );
    }
    run(
        &recvlogical,
        &proxy,
        "postgres",
        "dbname=postgres",
        &[&slot[..], &["--drop-slot"]].concat(),
    )
    .await;
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}

/// What every test of messages begins with.
async fn physical(port: u16) -> Raw {
    Raw::login(port, "postgres", "postgres", &[("replication", "true")]).await
}

async fn logical(port: u16) -> Raw {
    Raw::login(port, "postgres", "postgres", &[("replication", "database")]).await
}

#[tokio::test]
async fn the_protocol_is_that_of_a_direct_connection() {
    let cluster = cluster(None).await;
    let proxy = Proxy::before(&cluster.primary_url(), &[], |config| {
        config.pool.size = 1.try_into().unwrap();
    })
    .await;
    for word in ["true", "on", "YES", "1", "t", "database"] {
        let mut transcripts = Vec::new();
        for port in [proxy.port, cluster.primary_port()] {
            let mode = [("replication", word)];
            let mut raw = Raw::login(port, "postgres", "postgres", &mode).await;
            let mut told: Vec<_> = raw.parameters.clone().into_iter().collect();
            let mut said = vec![transcript(&raw.ask_frames(&query("IDENTIFY_SYSTEM")).await)];
            for command in [
                "SHOW wal_level",
                "TIMELINE_HISTORY 1",
                "nonsense",
                "START_REPLICATION PHYSICAL 7/7 TIMELINE 99",
                "select 1 as one",
            ] {
                said.push(transcript(&raw.ask_frames(&query(command)).await));
            }
            // The position moves by itself.
            said[0] = said[0].split('|').take(2).collect();
            told.sort();
            transcripts.push((told, said));
        }
        assert_eq!(transcripts[0], transcripts[1], "replication={word}");
    }
    // What is no replication is pooled, whatever it is called.
    let plain = Raw::login(
        proxy.port,
        "postgres",
        "postgres",
        &[("replication", "off")],
    )
    .await;
    drop(plain);
    assert_eq!(proxy.metric("flowgate_replication_opened_total"), 6);
    for port in [proxy.port, cluster.primary_port()] {
        let mut raw = Raw::connect(port).await;
        raw.send(&startup(
            PROTOCOL_3_0,
            &[("user", "postgres"), ("replication", "perhaps")],
        ))
        .await;
        let frames = raw.until_end().await;
        assert_eq!(
            transcript(&frames),
            "E FATAL|22023|invalid value for parameter \"replication\": \"perhaps\"||Valid values are: \"false\", 0, \"true\", 1, \"database\"."
        );
    }
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn a_stream_goes_both_ways_until_either_side_ends_it() {
    let cluster = cluster(None).await;
    let proxy = Proxy::before(&cluster.primary_url(), &[], |_| {}).await;
    let admin = cluster.connect_primary().await.unwrap();
    let senders = "select count(*)::text from pg_stat_replication";

    // The client ends the stream and the connection is usable again.
    let mut raw = physical(proxy.port).await;
    start(&mut raw).await;
    wait_until("it streams", PATIENCE, async || {
        text(&admin, senders).await == "1"
    })
    .await;
    admin
        .batch_execute("create table while_streaming ()")
        .await
        .unwrap();
    let data = raw.read().await;
    assert_eq!((data.tag, data.body[0]), (b'd', b'w'), "{data:?}");
    // A standby's status, which asks for an answer at once.
    let status = [&b"r"[..], &[0; 32], &[1]].concat();
    raw.send(&copy_data(&status)).await;
    loop {
        let answer = raw.read().await;
        assert_eq!(answer.tag, b'd');
        if answer.body[0] == b'k' {
            break;
        }
    }
    raw.send(&copy_done()).await;
    let ended = raw.until_ready().await;
    assert!(
        tags(&ended).contains("cC") && tags(&ended).ends_with('Z'),
        "{}",
        tags(&ended)
    );
    let frames = raw.ask_frames(&query("IDENTIFY_SYSTEM")).await;
    assert_eq!(tags(&frames), "TDCZ");

    // The client just goes.
    start(&mut raw).await;
    drop(raw);
    wait_until("its sender is gone", PATIENCE, async || {
        text(&admin, senders).await == "0"
    })
    .await;

    // The server ends it.
    let mut raw = physical(proxy.port).await;
    start(&mut raw).await;
    let pid = raw.pid();
    let terminated = text(&admin, &format!("select pg_terminate_backend({pid})")).await;
    assert_eq!(terminated, "t", "the pid told is the sender's own");
    let frames = raw.until_end().await;
    assert_eq!(
        error_code(&frames).as_deref(),
        Some("57P01"),
        "{}",
        transcript(&frames)
    );

    // Terminate, and a client that only stops sending.
    let mut raw = logical(proxy.port).await;
    raw.send(&[query("select 'last words'"), raw::terminate()].concat())
        .await;
    let frames = raw.until_end().await;
    assert_eq!(first_columns(&frames), ["last words"]);
    let mut raw = logical(proxy.port).await;
    raw.send(&query("select 'half closed' from pg_sleep(0.1)"))
        .await;
    raw.half_close().await;
    assert_eq!(first_columns(&raw.until_end().await), ["half closed"]);
    wait_until("all are gone", PATIENCE, async || {
        proxy.metric("flowgate_replication_connections") == 0
            && proxy.metric("flowgate_clients") == 0
    })
    .await;
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}

/// Until CopyBothResponse.
async fn start(raw: &mut Raw) {
    let frames = raw.ask_frames(&query("IDENTIFY_SYSTEM")).await;
    let row = frames.iter().find(|frame| frame.tag == b'D').unwrap();
    let columns = transcript(std::slice::from_ref(row));
    let at = columns.split('|').nth(2).unwrap().to_owned();
    raw.send(&query(&format!("START_REPLICATION PHYSICAL {at}")))
        .await;
    assert_eq!(raw.read().await.tag, b'W');
}

#[tokio::test]
async fn a_command_of_a_replication_connection_is_cancelled() {
    let cluster = cluster(None).await;
    let proxy = Proxy::before(&cluster.primary_url(), &[], |_| {}).await;
    let admin = cluster.connect_primary().await.unwrap();
    let mut raw = Raw::connect(proxy.port).await;
    raw.send(&startup(
        PROTOCOL_3_2,
        &[
            ("user", "postgres"),
            ("database", "postgres"),
            ("replication", "database"),
        ],
    ))
    .await;
    raw.until_ready().await;
    assert_eq!(raw.key.len(), 4 + 32);
    raw.send(&query("select pg_sleep(600)")).await;
    let pid = raw.pid();
    wait_until("it sleeps", PATIENCE, async || {
        let state = format!("select state from pg_stat_activity where pid = {pid}");
        text(&admin, &state).await == "active"
    })
    .await;
    raw::cancel(proxy.port, &raw.key).await;
    let frames = raw.until_ready().await;
    assert_eq!(error_code(&frames).as_deref(), Some("57014"));
    assert_eq!(tags(&frames), "TEZ");
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn replication_connections_are_bounded_apart_from_the_pools() {
    let cluster = cluster(None).await;
    let proxy = Proxy::before(&cluster.primary_url(), &[], |config| {
        config.pool.size = 1.try_into().unwrap();
        config.replication.max_connections = 2;
    })
    .await;
    let one = physical(proxy.port).await;
    let _two = logical(proxy.port).await;
    let mut third = Raw::connect(proxy.port).await;
    let asks = [("user", "postgres"), ("replication", "true")];
    third.send(&startup(PROTOCOL_3_0, &asks)).await;
    let frames = third.until_end().await;
    assert_eq!(
        transcript(&frames),
        "E FATAL|53300|number of replication connections exceeds replication.max_connections (currently 2)"
    );
    assert_eq!(proxy.metric("flowgate_replication_refused_total"), 1);
    // The pool's only server is nobody's.
    assert_eq!(
        text(&proxy.connect().await, "select 'pooled'").await,
        "pooled"
    );
    drop(one);
    wait_until("a place is free", PATIENCE, async || {
        proxy.metric("flowgate_replication_connections") == 1
    })
    .await;
    physical(proxy.port).await;
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}

/// A stream has no end to wait for; it is told to go between two messages.
#[tokio::test]
async fn a_shutdown_ends_a_stream_in_words() {
    let cluster = cluster(None).await;
    let proxy = Proxy::before(&cluster.primary_url(), &[], |config| {
        config.listen.drain_timeout = PATIENCE;
    })
    .await;
    let mut streaming = physical(proxy.port).await;
    start(&mut streaming).await;
    let mut idle = logical(proxy.port).await;
    let admin = cluster.connect_primary().await.unwrap();
    admin
        .batch_execute("select pg_advisory_lock(7)")
        .await
        .unwrap();
    let mut waiting = logical(proxy.port).await;
    waiting
        .send(&query("select 'finished' from pg_advisory_xact_lock(7)"))
        .await;
    wait_until("it waits for its lock", PATIENCE, async || {
        let waiters =
            "select count(*)::text from pg_locks where locktype = 'advisory' and not granted";
        text(&admin, waiters).await == "1"
    })
    .await;
    let port = proxy.port;
    let shut_down = tokio::spawn(proxy.shut_down());
    for raw in [&mut streaming, &mut idle] {
        let frames = raw.until_end().await;
        assert_eq!(
            error_code(&frames).as_deref(),
            Some("57P01"),
            "{}",
            transcript(&frames)
        );
    }
    // A command under way is waited for, as a transaction is.
    admin
        .batch_execute("select pg_advisory_unlock(7)")
        .await
        .unwrap();
    let frames = waiting.until_end().await;
    assert_eq!(first_columns(&frames), ["finished"]);
    assert_eq!(error_code(&frames).as_deref(), Some("57P01"));
    shut_down.await.unwrap();
    let _nobody = tokio::net::TcpStream::connect(("127.0.0.1", port))
        .await
        .unwrap_err();
    cluster.stop().await.unwrap();
}
