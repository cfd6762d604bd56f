//! Reload: what changes is in force without any client noticing, what is wrong changes nothing, what takes a restart is named.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use flowgate::app::{Hooks, Reloaded, RereadError};
use flowgate::config::{self, ConnectUrl, Flags};
use tempfile::TempDir;
use tokio::time::timeout;

use crate::support::pg::{TestDb, fresh_database, replica_catches_up, shared};
use crate::support::proxy::{
    PATIENCE, Proxy, connect, connect_hearing, row, sqlstate, table, text, try_connect, try_text,
};
use crate::support::raw::{Raw, SSL_REQUEST, untagged};
use crate::support::wait::wait_until;

/// A proxy that was started from a file, and the file.
struct Filed {
    proxy: Proxy,
    folder: TempDir,
    logs: Arc<Mutex<Vec<String>>>,
}

impl Filed {
    /// `text` follows `[primary]` and what every test needs.
    async fn start(db: &TestDb, text: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("flowgate.toml");
        write(&path, db, text);
        let read = read_again(path);
        let config = read().unwrap();
        let logs = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&logs);
        let hooks = Hooks {
            reread: Some(Arc::new(read)),
            set_log: Some(Arc::new(move |filter| {
                log.lock().unwrap().push(filter.to_owned())
            })),
        };
        let proxy = Proxy::of_config(&config, &db.primary_url, hooks).await;
        Self {
            proxy,
            folder,
            logs,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, db: &TestDb, text: &str) {
        write(&self.path("flowgate.toml"), db, text);
    }
}

fn write(path: &Path, db: &TestDb, text: &str) {
    let whole = format!("{text}\n[primary]\nurl = \"{}\"\n", db.primary_url);
    std::fs::write(path, whole).unwrap();
}

fn read_again(path: PathBuf) -> impl Fn() -> Result<config::Config, RereadError> {
    move || {
        let text = std::fs::read_to_string(&path).map_err(|e| RereadError::File(e.to_string()))?;
        Ok(config::from_sources(
            Some((&path, &text)),
            std::iter::empty(),
            Flags::default(),
        )?)
    }
}

const LISTEN: &str =
    "[listen]\npostgres = \"127.0.0.1:0\"\nhttp = \"off\"\ndrain_timeout = \"1s\"\n";
const TRUST: &str = "[auth]\nmethod = \"trust\"\n";

#[tokio::test]
async fn a_reload_changes_pools_and_limits_under_way_and_nobody_notices() {
    let db = fresh_database().await;
    let filed = Filed::start(
        &db,
        &format!("{LISTEN}{TRUST}[pool]\nsize = 1\nmax_clients = 3\n"),
    )
    .await;
    let proxy = &filed.proxy;
    let console = proxy.console().await;
    let (busy, waiting) = (proxy.connect().await, proxy.connect().await);
    busy.batch_execute("begin; create table kept (n int); insert into kept values (1)")
        .await
        .unwrap();
    let pid = text(&busy, "select pg_backend_pid()").await;
    assert_eq!(
        sqlstate(try_connect(&proxy.url()).await),
        "53300",
        "max_clients"
    );
    let waits = tokio::spawn(async move { (text(&waiting, "select 'served'").await, waiting) });
    wait_until("one waits", PATIENCE, async || {
        row(&console, "SHOW POOLS", "database", &db.name).await["cl_waiting"] == "1"
    })
    .await;
    filed.write(
        &db,
        &format!("{LISTEN}{TRUST}[pool]\nsize = 2\nmax_clients = 10\n[log]\nfilter = \"debug\"\n"),
    );
    console.batch_execute("RELOAD").await.unwrap();
    // The second server is there for who waited, though the first is still taken.
    let (served, waiting) = timeout(PATIENCE, waits).await.unwrap().unwrap();
    assert_eq!(served, "served");
    assert_eq!(text(&busy, "select pg_backend_pid()").await, pid);
    busy.batch_execute("commit").await.unwrap();
    assert_eq!(text(&waiting, "select n from kept").await, "1");
    assert_eq!(text(&proxy.connect().await, "select 1").await, "1");
    let size = row(&console, "SHOW CONFIG pool.size", "key", "pool.size").await;
    assert_eq!(size["value"], "2");
    assert_eq!(*filed.logs.lock().unwrap(), ["debug"]);
    filed.proxy.shut_down().await;
}

#[tokio::test]
async fn a_wrong_file_changes_nothing_and_every_problem_is_told() {
    let db = fresh_database().await;
    let filed = Filed::start(&db, &format!("{LISTEN}{TRUST}[pool]\nsize = 3\n")).await;
    let console = filed.proxy.console().await;
    let client = filed.proxy.connect().await;
    let users = filed.path("users.txt");
    std::fs::write(&users, "not a line\n").unwrap();
    let problems = |outcome: Result<(), tokio_postgres::Error>| {
        let error = outcome.unwrap_err();
        let error = error.as_db_error().unwrap().clone();
        assert_eq!(error.code().code(), "F0000");
        error.detail().unwrap().to_owned()
    };
    filed.write(
        &db,
        &format!(
            "{LISTEN}[auth]\nmethod = \"trust\"\n[pool]\nsize = 0\nmode = \"never\"\nsise = 1\n"
        ),
    );
    let told = problems(console.batch_execute("reload").await);
    for key in ["pool.size", "pool.mode", "pool.sise"] {
        assert!(told.contains(key), "{told}");
    }
    // What only shows when it is used is found before anything is changed, too.
    filed.write(
        &db,
        &format!(
            "[pool]\nsize = 9\n[auth]\nmethod = \"trust\"\nusers_file = \"{}\"\n[listen]\npostgres = \"127.0.0.1:0\"\nhttp = \"off\"\ntls_cert = \"{}\"\ntls_key = \"{}\"\n",
            users.display(),
            users.display(),
            users.display()
        ),
    );
    let told = problems(console.batch_execute("reload").await);
    assert!(
        told.contains("auth.users_file") && told.contains("listen.tls"),
        "{told}"
    );
    let size = row(&console, "SHOW CONFIG pool.size", "key", "pool.size").await;
    assert_eq!(size["value"], "3");
    std::fs::remove_file(filed.path("flowgate.toml")).unwrap();
    let told = problems(console.batch_execute("reload").await);
    assert!(told.contains("No such file"), "{told}");
    assert_eq!(text(&client, "select 'untouched'").await, "untouched");
    filed.proxy.shut_down().await;
}

#[tokio::test]
async fn what_takes_a_restart_is_named_and_the_rest_is_in_force() {
    let db = fresh_database().await;
    let filed = Filed::start(&db, &format!("{LISTEN}{TRUST}")).await;
    let (console, mut heard) = connect_hearing(&filed.proxy.console_url()).await;
    filed.write(
        &db,
        &format!("[listen]\npostgres = \"127.0.0.1:1\"\nhttp = \"off\"\nthreads = 2\n{TRUST}[pool]\nsize = 5\n"),
    );
    console.batch_execute("reload").await.unwrap();
    let notice = match heard.next().await {
        Some(Ok(tokio_postgres::AsyncMessage::Notice(notice))) => notice,
        other => panic!("{other:?}"),
    };
    assert_eq!(
        notice.message(),
        "not changed before a restart: listen.postgres, listen.threads"
    );
    let shown = async |key: &str| {
        let found = row(&console, &format!("SHOW CONFIG {key}"), "key", key).await;
        found["value"].clone()
    };
    assert_eq!(shown("pool.size").await, "5");
    assert_eq!(shown("listen.threads").await, "1");
    assert_eq!(
        filed.proxy.reload().await.unwrap(),
        Reloaded {
            need_restart: vec!["listen.postgres", "listen.threads"]
        }
    );
    filed.proxy.shut_down().await;
}

/// The address that a file would make it safe for is in force only after a restart.
#[tokio::test]
async fn trust_is_not_let_in_by_an_address_that_is_not_in_force() {
    let db = fresh_database().await;
    let open = "[listen]\npostgres = \"0.0.0.0:0\"\nhttp = \"off\"\n";
    let filed = Filed::start(&db, &format!("{open}[auth]\nmethod = \"scram\"\n")).await;
    filed.write(&db, &format!("{LISTEN}{TRUST}"));
    let problems = filed.proxy.reload().await.unwrap_err().problems;
    assert!(problems[0].starts_with("auth.method"), "{problems:?}");
    // Nor by a rule.
    filed.write(&db, &format!("{LISTEN}[[access]]\nmethod = \"trust\"\n"));
    let problems = filed.proxy.reload().await.unwrap_err().problems;
    assert!(problems[0].contains("access"), "{problems:?}");
    filed.write(
        &db,
        &format!("{LISTEN}[auth]\nmethod = \"scram\"\n[pool]\nsize = 3\n"),
    );
    assert_eq!(
        filed.proxy.reload().await.unwrap().need_restart,
        ["listen.postgres"]
    );
    filed.proxy.shut_down().await;
}

#[tokio::test]
async fn a_role_taken_out_of_the_users_file_logs_in_no_more() {
    let db = fresh_database().await;
    let admin = shared().await.connect_primary().await.unwrap();
    let create = "do $$ begin create role leaver login; create role stayer login; exception when duplicate_object then null; end $$";
    admin.batch_execute(create).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let users = folder.path().join("users.txt");
    std::fs::write(
        &users,
        "\"leaver\" \"secret\"\n\"stayer\" \"secret\"\n\"postgres\" \"secret\"\n",
    )
    .unwrap();
    let text_of = |more: &str| {
        format!(
            "{LISTEN}[auth]\nusers_file = \"{}\"\n{more}",
            users.display()
        )
    };
    let filed = Filed::start(&db, &text_of("")).await;
    let url = |user: &str, password: &str, database: &str| {
        format!(
            "postgres://{user}:{password}@127.0.0.1:{}/{database}",
            filed.proxy.port
        )
    };
    let leaver = connect(&url("leaver", "secret", &db.name)).await;
    assert_eq!(text(&leaver, "select current_user").await, "leaver");
    let console = connect(&url("postgres", "secret", "flowgate")).await;
    // A mistake in the file leaves everybody where they were.
    std::fs::write(&users, "\"stayer\" \"other\"\n\"postgres\n").unwrap();
    assert!(console.batch_execute("reload").await.is_err());
    connect(&url("leaver", "secret", &db.name)).await;

    std::fs::write(&users, "\"stayer\" \"other\"\n\"postgres\" \"secret\"\n").unwrap();
    connect(&url("leaver", "secret", &db.name)).await;
    console.batch_execute("reload").await.unwrap();
    assert_eq!(
        sqlstate(try_connect(&url("leaver", "secret", &db.name)).await),
        "28P01"
    );
    assert_eq!(
        sqlstate(try_connect(&url("stayer", "secret", &db.name)).await),
        "28P01"
    );
    connect(&url("stayer", "other", &db.name)).await;
    assert_eq!(
        text(&leaver, "select 'still in'").await,
        "still in",
        "as in Postgres"
    );
    // Who may use the console changes likewise.
    assert_eq!(
        sqlstate(try_connect(&url("stayer", "other", "flowgate")).await),
        "42501"
    );
    filed.write(&db, &text_of("[console]\nadmin_users = [\"stayer\"]\n"));
    console.batch_execute("reload").await.unwrap();
    connect(&url("stayer", "other", "flowgate")).await;
    assert_eq!(
        sqlstate(try_connect(&url("postgres", "secret", "flowgate")).await),
        "42501"
    );
    filed.proxy.shut_down().await;
}

#[tokio::test]
async fn replicas_come_and_go() {
    let db = fresh_database().await;
    let filed = Filed::start(&db, &format!("{LISTEN}{TRUST}")).await;
    let proxy = &filed.proxy;
    let console = proxy.console().await;
    let client = proxy.connect().await;
    let setup = "select pgflow.create_flow('greet'); select pgflow.add_step('greet', 'hello')";
    client.batch_execute(setup).await.unwrap();
    replica_catches_up().await;
    let read = "select count(*) from pgflow.flows";
    assert_eq!(text(&client, read).await, "1");
    assert_eq!(proxy.requests("replica"), 0);

    let with = format!("{LISTEN}{TRUST}[[replica]]\nurl = \"{}\"\n", db.replica_url);
    filed.write(&db, &with);
    console.batch_execute("reload").await.unwrap();
    // The session that was there before reads there, too.
    wait_until("a replica answers", PATIENCE, async || {
        text(&client, read).await;
        proxy.requests("replica") > 0
    })
    .await;
    assert_eq!(
        row(&console, "SHOW REPLICAS", "replica", "replica-1").await["in_rotation"],
        "yes"
    );
    let servers = async || {
        let servers = table(&console, "SHOW SERVERS").await;
        let of = |row: &&_| -> bool {
            let row: &std::collections::BTreeMap<String, String> = row;
            row["upstream"] == "replica-1"
        };
        servers.iter().filter(of).count()
    };
    assert!(servers().await > 0);
    // A reload without a change leaves it in rotation, and its servers open.
    let opened = proxy.metric("flowgate_servers_opened_total");
    console.batch_execute("reload").await.unwrap();
    let answered = proxy.requests("replica");
    wait_until("it answers as before", PATIENCE, async || {
        text(&client, read).await;
        proxy.requests("replica") > answered
    })
    .await;
    assert_eq!(proxy.metric("flowgate_servers_opened_total"), opened);

    filed.write(&db, &format!("{LISTEN}{TRUST}"));
    console.batch_execute("reload").await.unwrap();
    wait_until("its servers are closed", PATIENCE, async || {
        servers().await == 0
    })
    .await;
    let answered = proxy.requests("replica");
    assert_eq!(text(&client, read).await, "1");
    assert_eq!(proxy.requests("replica"), answered);
    assert!(table(&console, "SHOW REPLICAS").await.is_empty());
    // And back again.
    filed.write(&db, &with);
    console.batch_execute("reload").await.unwrap();
    wait_until("a replica answers", PATIENCE, async || {
        text(&client, read).await;
        proxy.requests("replica") > answered
    })
    .await;
    filed.proxy.shut_down().await;
}

/// A certificate that signs itself; `None`: this machine has no `openssl`.
fn certificate(folder: &Path, name: &str) -> Option<()> {
    let path = |end: &str| folder.join(end).into_os_string();
    let made = Command::new("openssl")
        .args([
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
        ])
        .arg(format!("/CN={name}"))
        .arg("-keyout")
        .arg(path("server.key"))
        .arg("-out")
        .arg(path("server.crt"))
        .output()
        .ok()?;
    made.status.success().then_some(())
}

/// Whom the certificate that is served names: openssl's own client asks.
fn served(port: u16) -> String {
    let asked = Command::new("openssl")
        .args(["s_client", "-starttls", "postgres", "-connect"])
        .arg(format!("127.0.0.1:{port}"))
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&asked.stdout).into_owned();
    let line = said.lines().find(|line| line.starts_with("subject="));
    line.unwrap_or(&said).to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_certificate_is_served_to_who_connects_then() {
    let db = fresh_database().await;
    let folder = tempfile::tempdir().unwrap();
    if certificate(folder.path(), "first").is_none() {
        println!("skipped: no `openssl` on this machine to make a certificate with");
        return;
    }
    let path = |name: &str| folder.path().join(name).display().to_string();
    let text_of = |tls: &str| {
        format!(
            "{LISTEN}tls = \"{tls}\"\ntls_cert = \"{}\"\ntls_key = \"{}\"\n{TRUST}",
            path("server.crt"),
            path("server.key")
        )
    };
    let filed = Filed::start(&db, &text_of("allow")).await;
    let (port, console) = (filed.proxy.port, filed.proxy.console().await);
    let before = filed.proxy.connect().await;
    let asks = async || {
        tokio::task::spawn_blocking(move || served(port))
            .await
            .unwrap()
    };
    assert!(asks().await.contains("first"));
    certificate(folder.path(), "second").unwrap();
    assert!(asks().await.contains("first"), "not before it is told");
    console.batch_execute("reload").await.unwrap();
    assert!(asks().await.contains("second"));
    // Half a pair is refused, and the one in force stays.
    std::fs::write(path("server.key"), "no key").unwrap();
    assert!(console.batch_execute("reload").await.is_err());
    assert!(asks().await.contains("second"));
    certificate(folder.path(), "third").unwrap();
    filed.write(&db, &text_of("require"));
    console.batch_execute("reload").await.unwrap();
    assert_eq!(
        sqlstate(try_connect(&filed.proxy.url()).await),
        "28000",
        "TLS is required now"
    );
    assert_eq!(text(&before, "select 'still in'").await, "still in");
    filed.write(&db, &format!("{LISTEN}{TRUST}"));
    console.batch_execute("reload").await.unwrap();
    let mut raw = Raw::connect(port).await;
    raw.send(&untagged(&SSL_REQUEST.to_be_bytes())).await;
    assert_eq!(raw.bytes(1).await, b"N");
    filed.proxy.shut_down().await;
}

#[tokio::test]
async fn routing_changes_for_sessions_that_are_there() {
    let db = fresh_database().await;
    let replica = format!("[[replica]]\nurl = \"{}\"\n", db.replica_url);
    let filed = Filed::start(
        &db,
        &format!("{LISTEN}{TRUST}[route]\nreads = \"off\"\n{replica}"),
    )
    .await;
    let client = filed.proxy.connect().await;
    let read = "select count(*) from pg_catalog.pg_class";
    text(&client, read).await;
    assert_eq!(filed.proxy.requests("replica"), 0);
    filed.write(
        &db,
        &format!("{LISTEN}{TRUST}[route]\nreads = \"all\"\n{replica}"),
    );
    filed.proxy.reload().await.unwrap();
    wait_until("a replica answers", PATIENCE, async || {
        text(&client, read).await;
        filed.proxy.requests("replica") > 0
    })
    .await;
    // Inside a transaction nothing moves, whatever is reloaded meanwhile.
    client
        .batch_execute("begin isolation level repeatable read")
        .await
        .unwrap();
    let snapshot = text(&client, "select pg_current_snapshot()").await;
    filed.write(
        &db,
        &format!("{LISTEN}{TRUST}[pool]\nsize = 3\n[route]\nreads = \"off\"\n"),
    );
    filed.proxy.reload().await.unwrap();
    assert_eq!(
        text(&client, "select pg_current_snapshot()").await,
        snapshot
    );
    client.batch_execute("commit").await.unwrap();
    let answered = filed.proxy.requests("replica");
    text(&client, read).await;
    assert_eq!(filed.proxy.requests("replica"), answered);
    filed.proxy.shut_down().await;
}

/// The program itself, told by signal.
#[tokio::test]
async fn sighup_reloads_and_a_second_signal_ends_a_drain() {
    let db = fresh_database().await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("flowgate.toml");
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let listen = format!("[listen]\npostgres = \"127.0.0.1:{port}\"\nhttp = \"off\"\n{TRUST}");
    write(&path, &db, &format!("{listen}[pool]\nsize = 2\n"));
    let mut process = tokio::process::Command::new(env!("CARGO_BIN_EXE_flowgate"))
        .args(["serve", "--config"])
        .arg(&path)
        .stderr(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let pid = process.id().unwrap();
    let url: ConnectUrl = db.primary_url.parse().unwrap();
    let url = |database: &str| format!("postgres://{}@127.0.0.1:{port}/{database}", url.user);
    wait_until("it serves", PATIENCE, async || {
        try_connect(&url("flowgate")).await.is_ok()
    })
    .await;
    let console = connect(&url("flowgate")).await;
    let client = connect(&url(&db.name)).await;
    client.batch_execute("begin").await.unwrap();
    write(&path, &db, &format!("{listen}[pool]\nsize = 4\n"));
    signal(pid, "HUP");
    wait_until("it has reloaded", PATIENCE, async || {
        row(&console, "SHOW CONFIG pool.size", "key", "pool.size").await["value"] == "4"
    })
    .await;
    write(&path, &db, &format!("{listen}[pool]\nsize = 0\n"));
    signal(pid, "HUP");
    console.batch_execute("reload").await.unwrap_err();
    assert_eq!(
        row(&console, "SHOW CONFIG pool.size", "key", "pool.size").await["value"],
        "4"
    );
    assert_eq!(
        text(&client, "select 'mid-transaction'").await,
        "mid-transaction"
    );
    signal(pid, "TERM");
    wait_until("it drains", PATIENCE, async || {
        console.simple_query("show version").await.is_err()
    })
    .await;
    assert_eq!(text(&client, "select 'still there'").await, "still there");
    signal(pid, "TERM");
    let status = timeout(PATIENCE, process.wait()).await.unwrap().unwrap();
    assert!(status.success(), "{status}");
    assert!(try_text(&client, "select 1").await.is_err());
}

fn signal(pid: u32, name: &str) {
    let sent = Command::new("kill")
        .arg(format!("-{name}"))
        .arg(pid.to_string())
        .status();
    assert!(sent.unwrap().success());
}
