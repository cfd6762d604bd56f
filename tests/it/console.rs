//! The admin console: PgBouncer's words, columns and numbers, by every protocol; who may do what; and that what it says it
//! does is done.

use std::collections::BTreeMap;
use std::time::Duration;

use flowgate::app::Manner;
use tokio::time::timeout;
use tokio_postgres::types::Type;

use crate::support::pg::{empty_database, fresh_database, shared};
use crate::support::proxy::{
    PATIENCE, Proxy, Table, connect, row, sqlstate, table, text, try_connect, try_text,
};
use crate::support::raw::{
    Raw, bind_text, describe_portal, describe_statement, error_code, execute, extended,
    first_columns, flush, message, parse, query, sync, tags, transcript,
};
use crate::support::wait::wait_until;

/// What PgBouncer 1.18 answers on this machine's Debian, column by column; and what came until 1.25.
const COLUMNS: &[(&str, &str)] = &[
    (
        "POOLS",
        "database user cl_active cl_waiting cl_active_cancel_req cl_waiting_cancel_req sv_active sv_active_cancel sv_being_canceled sv_idle sv_used sv_tested sv_login maxwait maxwait_us pool_mode load_balance_hosts",
    ),
    (
        "CLIENTS",
        "type user database replication state addr port local_addr local_port connect_time request_time wait wait_us close_needed ptr link remote_pid tls application_name prepared_statements id",
    ),
    (
        "SERVERS",
        "type user database replication state addr port local_addr local_port connect_time request_time wait wait_us close_needed ptr link remote_pid tls application_name prepared_statements id",
    ),
    (
        "STATS",
        "database total_server_assignment_count total_xact_count total_query_count total_received total_sent total_xact_time total_query_time total_wait_time total_client_parse_count total_server_parse_count total_bind_count avg_server_assignment_count avg_xact_count avg_query_count avg_recv avg_sent avg_xact_time avg_query_time avg_wait_time avg_client_parse_count avg_server_parse_count avg_bind_count",
    ),
    (
        "STATS_TOTALS",
        "database server_assignment_count xact_count query_count bytes_received bytes_sent xact_time query_time wait_time",
    ),
    (
        "STATS_AVERAGES",
        "database server_assignment_count xact_count query_count bytes_received bytes_sent xact_time query_time wait_time",
    ),
    ("TOTALS", "name value"),
    (
        "DATABASES",
        "name host port database force_user pool_size min_pool_size reserve_pool_size server_lifetime pool_mode load_balance_hosts max_connections current_connections max_client_connections current_client_connections paused disabled",
    ),
    (
        "USERS",
        "name pool_size reserve_pool_size pool_mode max_user_connections current_connections max_user_client_connections current_client_connections",
    ),
    ("CONFIG", "key value default changeable"),
    ("LISTS", "list items"),
    ("MEM", "name size used free memtotal"),
    ("STATE", "key value"),
    ("VERSION", "version"),
    ("DNS_HOSTS", "hostname ttl addrs"),
    // Ours.
    ("HELP", "command does"),
    (
        "REPLICAS",
        "replica in_rotation replayed lag_bytes host port servers",
    ),
    ("ROUTES", "destination requests"),
    ("PINS", "reason pins clients"),
    ("SUBSCRIBERS", "database channel kind subscribers queued"),
    ("PARKED", "database queue waiting reading longest_ms"),
    (
        "LIMITS",
        "upstream class role priority limit in_use queued refused",
    ),
    ("RUNS", "run_id writing seen_ms_ago subscribers"),
    (
        "UPSTREAMS",
        "upstream role host port servers max_servers connecting max_connecting starving_pools",
    ),
    ("MEMO", "statement_texts count"),
];

fn number(row: &BTreeMap<String, String>, column: &str) -> i64 {
    row.get(column)
        .unwrap_or_else(|| panic!("no {column} in {row:?}"))
        .parse()
        .unwrap()
}

fn numbers<const N: usize>(row: &BTreeMap<String, String>, columns: [&str; N]) -> [i64; N] {
    columns.map(|column| number(row, column))
}

#[tokio::test]
async fn every_table_has_pgbouncers_columns_in_both_protocols() {
    let db = fresh_database().await;
    let proxy = Proxy::start(&db, |_| ()).await;
    let client = proxy.connect().await;
    text(&client, "select 1").await;
    let console = proxy.console().await;
    let mut raw = Raw::login(proxy.port, &proxy.user, "flowgate", &[]).await;
    for (name, columns) in COLUMNS {
        let show = format!("SHOW {name}");
        let prepared = console.prepare(&show).await.unwrap();
        let names: Vec<_> = prepared.columns().iter().map(|c| c.name()).collect();
        let expected: Vec<_> = columns.split(' ').collect();
        assert_eq!(names[..expected.len()], expected, "{show}");
        assert!(
            prepared
                .columns()
                .iter()
                .all(|c| [Type::TEXT, Type::INT4, Type::INT8].contains(c.type_())),
            "{show}"
        );
        // The driver asks for binary values; whatever their type, each can be read.
        let rows = console.query(&prepared, &[]).await.unwrap();
        for row in &rows {
            for (at, column) in row.columns().iter().enumerate() {
                match *column.type_() {
                    Type::TEXT => drop(row.get::<_, Option<&str>>(at)),
                    Type::INT4 => drop(row.get::<_, Option<i32>>(at)),
                    _ => drop(row.get::<_, Option<i64>>(at)),
                }
            }
        }
        let simple = raw.query(&show).await;
        let batch = raw.ask(&extended(&show, &[])).await;
        assert!(
            simple.contains("C SHOW") && batch.contains("C SHOW"),
            "{simple}\n{batch}"
        );
    }
    proxy.shut_down().await;
}

#[tokio::test]
async fn pools_clients_and_servers_show_what_goes_on() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let console = proxy.console().await;
    let holder = proxy.raw_with(&[("application_name", "holder")]).await;
    let mut holder = holder;
    holder.query("begin").await;
    let pid = first_columns(&{
        holder.send(&query("select pg_backend_pid()")).await;
        holder.until_ready().await
    })
    .remove(0);
    let mut waiter = proxy.raw_with(&[("application_name", "waiter")]).await;
    waiter.send(&query("select 'served'")).await;
    let idle = proxy.raw_with(&[("application_name", "idle")]).await;

    let pools = async || row(&console, "SHOW POOLS", "database", &db.name).await;
    wait_until("one waits", PATIENCE, async || {
        number(&pools().await, "cl_waiting") == 1
    })
    .await;
    let pool = pools().await;
    assert_eq!(
        numbers(
            &pool,
            [
                "cl_active",
                "cl_waiting",
                "sv_active",
                "sv_idle",
                "sv_login"
            ]
        ),
        [2, 1, 1, 0, 0],
        "{pool:?}"
    );
    assert_eq!(
        (pool["user"].as_str(), pool["pool_mode"].as_str()),
        ("postgres", "transaction")
    );
    // It only grows.
    let longest = async || {
        let pool = pools().await;
        number(&pool, "maxwait") * 1_000_000 + number(&pool, "maxwait_us")
    };
    let before = longest().await;
    wait_until("the wait grows", PATIENCE, async || {
        longest().await > before
    })
    .await;

    let clients = table(&console, "SHOW CLIENTS").await;
    let client = |name: &str| {
        let named = |row: &&BTreeMap<_, _>| row["application_name"] == name;
        clients.iter().find(named).unwrap().clone()
    };
    let states = ["holder", "waiter", "idle"].map(|name| client(name)["state"].clone());
    assert_eq!(states, ["active", "waiting", "idle"], "{clients:?}");
    let servers = table(&console, "SHOW SERVERS").await;
    assert_eq!(servers.len(), 1, "{servers:?}");
    let server = &servers[0];
    assert_eq!(server["remote_pid"], pid);
    assert_eq!(server["state"], "active");
    assert_eq!(server["link"], client("holder")["ptr"]);
    assert_eq!(client("holder")["link"], server["ptr"]);
    assert_eq!(server["application_name"], "holder");
    assert_eq!(server["upstream"], "primary");
    // The socket's two ends.
    let direct = connect(&db.primary_url).await;
    let peer = "select client_addr || ':' || client_port from pg_stat_activity where pid = ";
    let peer = text(&direct, &format!("{peer}{pid}")).await;
    assert_eq!(
        peer.replace("/32", ""),
        format!("{}:{}", server["local_addr"], server["local_port"])
    );
    let local = holder.stream.local_addr().unwrap();
    let shown = client("holder");
    assert_eq!(
        (shown["addr"].as_str(), shown["port"].clone()),
        ("127.0.0.1", local.port().to_string())
    );
    // One row by its id.
    let id = &client("waiter")["id"];
    let one = table(&console, &format!("SHOW CLIENTS {id}")).await;
    assert_eq!(one.len(), 1);
    assert_eq!(one[0]["application_name"], "waiter");
    assert_eq!(table(&console, "SHOW CLIENTS 0").await, Table::new());

    holder.query("commit").await;
    assert_eq!(first_columns(&waiter.until_ready().await), ["served"]);
    wait_until("all is idle", PATIENCE, async || {
        numbers(
            &pools().await,
            ["cl_waiting", "sv_active", "sv_idle", "maxwait_us"],
        ) == [0, 0, 1, 0]
    })
    .await;
    // What a session is called now, what it has prepared, and why it is tied to its server.
    holder.query("set application_name = 'renamed'").await;
    holder.ask(&[parse("s", "select 1"), sync()].concat()).await;
    holder.query("create temp table t ()").await;
    let renamed = row(&console, "SHOW CLIENTS", "application_name", "renamed").await;
    assert_eq!(
        (
            renamed["pins"].as_str(),
            renamed["prepared_statements"].as_str(),
            renamed["state"].as_str()
        ),
        ("temp_object", "1", "active")
    );
    let pins = row(&console, "SHOW PINS", "reason", "temp_object").await;
    assert_eq!(
        (pins["pins"].as_str(), pins["clients"].as_str()),
        ("1", "1")
    );
    drop((holder, waiter, idle));
    wait_until("they have left", PATIENCE, async || {
        table(&console, "SHOW CLIENTS").await.len() == 1
    })
    .await;
    proxy.shut_down().await;
}

#[tokio::test]
async fn statistics_count_what_passed() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let console = proxy.console().await;
    let client = proxy.connect().await;
    let stats = async || {
        row(
            &console,
            &format!("SHOW STATS {}", db.name),
            "database",
            &db.name,
        )
        .await
    };
    let counts = [
        "total_xact_count",
        "total_query_count",
        "total_server_assignment_count",
        "total_client_parse_count",
        "total_bind_count",
    ];
    let before = stats().await;
    let [xacts, queries, assigned, parses, binds] = numbers(&before, counts);
    // Three transactions of one request, one of three.
    for _ in 0..2 {
        text(&client, "select 1").await;
    }
    text(&client, "select pg_sleep(0.05)").await;
    client.batch_execute("begin").await.unwrap();
    text(&client, "select 1").await;
    client.batch_execute("commit").await.unwrap();
    wait_until("all is told", PATIENCE, async || {
        number(&stats().await, "total_query_count") == queries + 6
    })
    .await;
    let after = stats().await;
    assert_eq!(
        numbers(&after, counts),
        [xacts + 4, queries + 6, assigned + 4, parses, binds]
    );
    let grew = |column: &str| number(&after, column) - number(&before, column);
    assert!(grew("total_query_time") >= 50_000, "{after:?}");
    assert!(
        grew("total_xact_time") >= grew("total_query_time"),
        "{after:?}"
    );
    assert_eq!(grew("total_wait_time"), 0, "nobody had to wait");
    // By prepared statement: the driver's Parse, and two Binds.
    let statement = client.prepare("select $1::int4").await.unwrap();
    for n in 0..2 {
        client.query(&statement, &[&n]).await.unwrap();
    }
    wait_until("all is told", PATIENCE, async || {
        let [.., now_parses, now_binds] = numbers(&stats().await, counts);
        (now_parses, now_binds) == (parses + 1, binds + 2)
    })
    .await;
    // Bytes, to the byte: a query of 4 KB, an answer of 8.
    let before = stats().await;
    let mut raw = proxy.raw().await;
    raw.query("select 1").await;
    let measured = stats().await;
    let filler = "x".repeat(4_000);
    let asked = query(&format!("select repeat('y', 8000) /* {filler} */"));
    raw.send(&asked).await;
    let answer = raw.until_ready().await;
    let answered: usize = answer.iter().map(|frame| frame.body.len() + 5).sum();
    wait_until("all is told", PATIENCE, async || {
        let now = stats().await;
        let grew = |column: &str| number(&now, column) - number(&measured, column);
        (grew("total_received"), grew("total_sent")) == (asked.len() as i64, answered as i64)
    })
    .await;
    assert!(number(&measured, "total_received") > number(&before, "total_received"));
    // A wait is a wait.
    let mut holder = proxy.raw().await;
    holder.query("begin").await;
    raw.send(&query("select 2")).await;
    wait_until("it waits", PATIENCE, async || {
        number(
            &row(&console, "SHOW POOLS", "database", &db.name).await,
            "cl_waiting",
        ) == 1
    })
    .await;
    holder.query("commit").await;
    raw.until_ready().await;
    assert!(number(&stats().await, "total_wait_time") > 0);
    // The same numbers, otherwise laid out.
    let whole = stats().await;
    let half = row(&console, "SHOW STATS_TOTALS", "database", &db.name).await;
    for column in [
        "xact_count",
        "query_count",
        "server_assignment_count",
        "xact_time",
        "bind_count",
    ] {
        assert_eq!(half[column], whole[&format!("total_{column}")], "{column}");
    }
    // An average time is that of one, so far: no period is over yet.
    let average = number(&whole, "total_query_time") / number(&whole, "total_query_count");
    assert_eq!(number(&whole, "avg_query_time"), average, "{whole:?}");
    let half = row(&console, "SHOW STATS_AVERAGES", "database", &db.name).await;
    assert_eq!(half["query_time"], whole["avg_query_time"]);
    let total = row(&console, "SHOW TOTALS", "name", "total_query_count").await;
    assert_eq!(
        total["value"], whole["total_query_count"],
        "the only database"
    );
    proxy.shut_down().await;
}

#[tokio::test]
async fn databases_users_lists_and_configuration_are_what_they_are() {
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, |config| {
        config.pool.size = 7.try_into().unwrap();
        config.pool.reserve_size = 3;
        config.pool.server_lifetime = Duration::from_secs(1234);
        config.pool.max_server_connections = Some(50.try_into().unwrap());
    })
    .await;
    let console = proxy.console().await;
    let clients = [proxy.connect().await, proxy.connect().await];
    for client in &clients {
        client.batch_execute("begin").await.unwrap();
    }
    let database = row(&console, "SHOW DATABASES", "name", &db.name).await;
    assert_eq!(
        numbers(
            &database,
            [
                "pool_size",
                "reserve_pool_size",
                "server_lifetime",
                "current_connections",
                "current_client_connections",
                "paused",
                "disabled"
            ]
        ),
        [7, 3, 1234, 2, 2, 0, 0]
    );
    let cluster: flowgate::config::ConnectUrl = db.primary_url.parse().unwrap();
    assert_eq!(
        (database["host"].as_str(), number(&database, "port")),
        (cluster.host.as_str(), i64::from(cluster.port))
    );
    let user = row(&console, "SHOW USERS", "name", "postgres").await;
    assert_eq!(
        numbers(&user, ["current_connections", "current_client_connections"]),
        [2, 2]
    );
    let lists = table(&console, "SHOW LISTS").await;
    let items = |list: &str| {
        let found = lists.iter().find(|row| row["list"] == list);
        number(found.unwrap(), "items")
    };
    assert_eq!(
        [
            "databases",
            "users",
            "pools",
            "used_clients",
            "login_clients",
            "used_servers"
        ]
        .map(items),
        [1, 1, 1, 3, 0, 2]
    );
    let upstream = row(&console, "SHOW UPSTREAMS", "upstream", "primary").await;
    assert_eq!(
        numbers(
            &upstream,
            [
                "servers",
                "max_servers",
                "connecting",
                "max_connecting",
                "starving_pools"
            ]
        ),
        [2, 50, 0, 10, 0]
    );
    let size = row(&console, "SHOW CONFIG pool.size", "key", "pool.size").await;
    assert_eq!(
        (
            size["value"].as_str(),
            size["default"].as_str(),
            size["changeable"].as_str()
        ),
        ("7", "20", "yes")
    );
    let port = row(&console, "SHOW CONFIG", "key", "listen.postgres").await;
    assert_eq!(port["changeable"], "no");
    let resident = row(&console, "SHOW MEM", "name", "resident_process").await;
    assert!(number(&resident, "memtotal") > 1 << 20);
    assert_eq!(
        text(&console, "show version").await,
        concat!("Flowgate ", env!("CARGO_PKG_VERSION"))
    );
    proxy.shut_down().await;
}

#[tokio::test]
async fn pause_lets_transactions_end_and_resume_serves_who_waited() {
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, |_| ()).await;
    let (admin, console) = (proxy.console().await, proxy.console().await);
    let direct = connect(&db.primary_url).await;
    let open = format!(
        "select count(*) from pg_stat_activity where datname = '{}' and application_name = 'paused'",
        db.name
    );
    let mut busy = proxy.raw_with(&[("application_name", "paused")]).await;
    let mut idle = proxy.raw_with(&[("application_name", "paused")]).await;
    busy.query("begin").await;
    idle.query("select 1").await;
    let name = db.name.clone();
    let pausing = tokio::spawn(async move {
        admin
            .batch_execute(&format!("pause \"{name}\""))
            .await
            .map(|()| admin)
    });
    // Idle servers go at once, the busy one's transaction goes on.
    wait_until("one server is left", PATIENCE, async || {
        text(&direct, &open).await == "1"
    })
    .await;
    assert!(!pausing.is_finished());
    let shown = row(&console, "SHOW DATABASES", "name", &db.name).await;
    assert_eq!(shown["paused"], "1");
    assert!(
        busy.query("select 'still here'")
            .await
            .contains("D still here")
    );
    busy.send(&query("commit")).await;
    busy.until_ready().await;
    let admin = timeout(PATIENCE, pausing).await.unwrap().unwrap().unwrap();
    // Its backend takes a moment to end.
    wait_until("no server is left", PATIENCE, async || {
        text(&direct, &open).await == "0"
    })
    .await;
    // Requests wait, so do logins; the database can be restarted, dropped and made again meanwhile.
    idle.send(&query("select 'served'")).await;
    let url = proxy.url();
    let login = tokio::spawn(async move { connect(&url).await });
    wait_until("it waits", PATIENCE, async || {
        number(
            &row(&console, "SHOW POOLS", "database", &db.name).await,
            "cl_waiting",
        ) == 1
    })
    .await;
    assert!(idle.is_quiet() && !login.is_finished());
    let pause = format!("pause \"{}\"", db.name);
    let resume = format!("resume \"{}\"", db.name);
    assert_eq!(sqlstate(admin.batch_execute(&pause).await), "55000");
    admin.batch_execute(&resume).await.unwrap();
    assert_eq!(first_columns(&idle.until_ready().await), ["served"]);
    let login = timeout(PATIENCE, login).await.unwrap().unwrap();
    assert_eq!(text(&login, "select 1").await, "1");
    assert_eq!(sqlstate(admin.batch_execute(&resume).await), "55000");

    // All databases; a PAUSE that waits can be cancelled, or ended by RESUME.
    busy.query("begin").await;
    let mut raw = Raw::login(proxy.port, &proxy.user, "flowgate", &[]).await;
    raw.send(&query("PAUSE")).await;
    let state = async || row(&console, "SHOW STATE", "key", "paused").await["value"] == "yes";
    wait_until("it is paused", PATIENCE, state).await;
    raw.cancel().await;
    assert_eq!(
        error_code(&raw.until_ready().await).as_deref(),
        Some("57014")
    );
    assert!(state().await, "paused all the same");
    console.batch_execute("resume").await.unwrap();
    raw.send(&query("PAUSE")).await;
    wait_until("it is paused", PATIENCE, state).await;
    console.batch_execute("resume").await.unwrap();
    assert_eq!(
        error_code(&raw.until_ready().await).as_deref(),
        Some("57014")
    );
    assert!(!state().await);
    assert!(busy.query("commit").await.contains("C COMMIT"));
    proxy.shut_down().await;
}

#[tokio::test]
async fn reconnect_replaces_servers_once_they_are_free() {
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, |_| ()).await;
    let console = proxy.console().await;
    let (busy, idle) = (proxy.connect().await, proxy.connect().await);
    let pid = "select pg_backend_pid()";
    busy.batch_execute("begin").await.unwrap();
    let before = [text(&busy, pid).await, text(&idle, pid).await];
    console.batch_execute("reconnect").await.unwrap();
    assert_ne!(text(&idle, pid).await, before[1]);
    assert_eq!(text(&busy, pid).await, before[0], "its transaction goes on");
    let server = row(&console, "SHOW SERVERS", "remote_pid", &before[0]).await;
    assert_eq!(server["close_needed"], "1");
    let waiting = proxy.console().await;
    let waiting = tokio::spawn(async move { waiting.batch_execute("wait_close").await });
    busy.batch_execute("commit").await.unwrap();
    timeout(PATIENCE, waiting).await.unwrap().unwrap().unwrap();
    assert_ne!(text(&busy, pid).await, before[0]);
    let servers = table(&console, "SHOW SERVERS").await;
    assert!(
        servers.iter().all(|server| server["close_needed"] == "0"),
        "{servers:?}"
    );
    proxy.shut_down().await;
}

#[tokio::test]
async fn kill_ends_clients_and_servers_and_kill_client_one_of_them() {
    let db = fresh_database().await;
    let other = fresh_database().await;
    let proxy = Proxy::without_replica(&db, |_| ()).await;
    let console = proxy.console().await;
    let elsewhere = format!(
        "postgres://postgres@127.0.0.1:{}/{}",
        proxy.port, other.name
    );
    let bystander = connect(&elsewhere).await;
    let direct = connect(&db.primary_url).await;
    let mut one = proxy.raw_with(&[("application_name", "one")]).await;
    let mut two = proxy.raw_with(&[("application_name", "two")]).await;
    one.send(&query("select pg_sleep(100)")).await;
    two.query("begin").await;
    let sleeping = "select count(*) from pg_stat_activity where query = 'select pg_sleep(100)'";
    wait_until("it sleeps", PATIENCE, async || {
        text(&direct, sleeping).await == "1"
    })
    .await;
    let id = row(&console, "SHOW CLIENTS", "application_name", "one").await["id"].clone();
    console
        .batch_execute(&format!("kill_client {id}"))
        .await
        .unwrap();
    let last = one.until_end().await;
    assert_eq!(
        error_code(&last).as_deref(),
        Some("57P01"),
        "{}",
        transcript(&last)
    );
    wait_until("its query is gone", PATIENCE, async || {
        text(&direct, &format!("{sleeping} and state = 'active'")).await == "0"
    })
    .await;
    assert_eq!(
        sqlstate(console.batch_execute(&format!("kill_client {id}")).await),
        "42704"
    );
    assert!(two.query("select 'spared'").await.contains("D spared"));

    console
        .batch_execute(&format!("kill {}", db.name))
        .await
        .unwrap();
    let last = two.until_end().await;
    assert_eq!(error_code(&last).as_deref(), Some("57P01"));
    wait_until("no server is left", PATIENCE, async || {
        let servers = table(&console, "SHOW SERVERS").await;
        servers
            .iter()
            .all(|server| server["database"] == other.name)
    })
    .await;
    assert_eq!(text(&bystander, "select 'untouched'").await, "untouched");
    // Who comes now waits for RESUME.
    let url = proxy.url();
    let login = tokio::spawn(async move { connect(&url).await });
    wait_until("somebody is logging in", PATIENCE, async || {
        row(&console, "SHOW LISTS", "list", "login_clients").await["items"] == "1"
    })
    .await;
    assert!(!login.is_finished());
    console
        .batch_execute(&format!("resume {}", db.name))
        .await
        .unwrap();
    let login = timeout(PATIENCE, login).await.unwrap().unwrap();
    assert_eq!(text(&login, "select 1").await, "1");
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_disabled_database_takes_no_new_clients() {
    let db = fresh_database().await;
    let untouched = empty_database().await;
    let proxy = Proxy::without_replica(&db, |_| ()).await;
    let console = proxy.console().await;
    let client = proxy.connect().await;
    console
        .batch_execute(&format!("disable {}", db.name))
        .await
        .unwrap();
    assert_eq!(sqlstate(try_connect(&proxy.url()).await), "55000");
    assert_eq!(text(&client, "select 'still in'").await, "still in");
    assert_eq!(
        row(&console, "SHOW DATABASES", "name", &db.name).await["disabled"],
        "1"
    );
    console
        .batch_execute(&format!("enable {}", db.name))
        .await
        .unwrap();
    assert_eq!(text(&proxy.connect().await, "select 1").await, "1");
    // One that nobody has used yet is known to Postgres; one that is not there, to nobody.
    console
        .batch_execute(&format!("disable {}", untouched.name))
        .await
        .unwrap();
    let elsewhere = format!(
        "postgres://postgres@127.0.0.1:{}/{}",
        proxy.port, untouched.name
    );
    assert_eq!(sqlstate(try_connect(&elsewhere).await), "55000");
    for command in [
        "pause",
        "resume",
        "disable",
        "enable",
        "kill",
        "reconnect",
        "wait_close",
    ] {
        let refused = console.batch_execute(&format!("{command} nosuchdb")).await;
        assert_eq!(sqlstate(refused), "3D000", "{command}");
    }
    proxy.shut_down().await;
}

#[tokio::test]
async fn admins_may_do_everything_stats_users_show_and_nobody_else_gets_in() {
    let db = fresh_database().await;
    let admin = shared().await.connect_primary().await.unwrap();
    let create =
        "do $$ begin create role looker login; exception when duplicate_object then null; end $$";
    admin.batch_execute(create).await.unwrap();
    let proxy = Proxy::without_replica(&db, |config| {
        config.console.stats_users = vec!["looker".to_owned()];
    })
    .await;
    let url = |user: &str| format!("postgres://{user}@127.0.0.1:{}/flowgate", proxy.port);
    assert_eq!(sqlstate(try_connect(&url("stranger")).await), "42501");
    let looker = connect(&url("looker")).await;
    assert!(
        !table(&looker, "SHOW POOLS").await.is_empty()
            || table(&looker, "SHOW LISTS").await.len() > 3
    );
    looker
        .batch_execute("set extra_float_digits = 3")
        .await
        .unwrap();
    for command in [
        "pause",
        "resume",
        "reload",
        "reconnect",
        "kill",
        "kill_client 1",
        "disable postgres",
        "enable postgres",
        "wait_close",
        "shutdown",
        "shutdown wait_for_clients",
    ] {
        assert_eq!(
            sqlstate(looker.batch_execute(command).await),
            "42501",
            "{command}"
        );
        assert_eq!(
            sqlstate(looker.query(command, &[]).await),
            "42501",
            "{command}"
        );
    }
    let console = proxy.console().await;
    console.batch_execute("reconnect").await.unwrap();
    proxy.shut_down().await;
}

#[tokio::test]
async fn commands_come_in_any_case_several_at_once_and_mistakes_are_named() {
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, |_| ()).await;
    let mut raw = Raw::login(proxy.port, &proxy.user, "flowgate", &[]).await;
    let mut ask = async |text: &str| {
        raw.send(&query(text)).await;
        let frames = raw.until_ready().await;
        (tags(&frames), error_code(&frames))
    };
    let none = None;
    assert_eq!(
        ask("-- hello\n sHow /* a /* b */ */ verSION ; ;").await,
        ("TDCZ".into(), none.clone())
    );
    assert_eq!(ask("").await, ("IZ".into(), none.clone()));
    assert_eq!(ask(" ; ").await, ("IZ".into(), none.clone()));
    assert_eq!(
        ask("SHOW VERSION; SET x = 1; show version").await,
        ("TDCCTDCZ".into(), none.clone())
    );
    assert_eq!(
        ask("show version; select 1; show version").await,
        ("TDCEZ".into(), Some("42601".into()))
    );
    assert_eq!(
        ask("show nothing").await,
        ("EZ".into(), Some("42601".into()))
    );
    assert_eq!(
        ask("kill_client seven").await,
        ("EZ".into(), Some("42601".into()))
    );
    assert_eq!(
        ask("resume 'app").await,
        ("EZ".into(), Some("42601".into()))
    );
    assert_eq!(
        ask("show server_version").await,
        ("TDCZ".into(), none.clone())
    );
    // Transactions as drivers open them.
    raw.send(&query("begin")).await;
    assert_eq!(raw.until_ready().await.last().unwrap().body, b"T");
    raw.send(&query("show nonsense")).await;
    assert_eq!(raw.until_ready().await.last().unwrap().body, b"E");
    raw.send(&query("show version")).await;
    assert_eq!(
        error_code(&raw.until_ready().await).as_deref(),
        Some("25P02")
    );
    raw.send(&query("rollback")).await;
    assert_eq!(raw.until_ready().await.last().unwrap().body, b"I");
    proxy.shut_down().await;
}

#[tokio::test]
async fn the_extended_protocol_is_spoken_as_postgres_speaks_it() {
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, |_| ()).await;
    let mut raw = Raw::login(proxy.port, &proxy.user, "flowgate", &[]).await;
    // Named statement, described, run twice, closed.
    raw.send(&[parse("s", "show version"), describe_statement("s"), flush()].concat())
        .await;
    assert_eq!(tags(&raw.until(b'T').await), "1tT");
    for _ in 0..2 {
        raw.send(
            &[
                bind_text("", "s", &[]),
                describe_portal(""),
                execute("", 0),
                sync(),
            ]
            .concat(),
        )
        .await;
        assert_eq!(tags(&raw.until_ready().await), "2TDCZ");
    }
    // Rows in pieces.
    raw.query("begin").await;
    let piece = [
        parse("", "show config"),
        bind_text("p", "", &[]),
        execute("p", 2),
        sync(),
    ];
    raw.send(&piece.concat()).await;
    assert_eq!(tags(&raw.until_ready().await), "12DDsZ");
    raw.send(&[execute("p", 3), sync()].concat()).await;
    assert_eq!(tags(&raw.until_ready().await), "DDDsZ");
    raw.send(&[execute("p", 0), sync()].concat()).await;
    let rest = raw.until_ready().await;
    assert!(
        tags(&rest).ends_with("DCZ") && rest.len() > 20,
        "{}",
        tags(&rest)
    );
    raw.query("commit").await;
    // After an error all is skipped up to the Sync.
    let wrong = [
        parse("", "show nothing"),
        bind_text("", "", &[]),
        execute("", 0),
        sync(),
    ];
    raw.send(&wrong.concat()).await;
    let frames = raw.until_ready().await;
    assert_eq!(
        (tags(&frames).as_str(), error_code(&frames).as_deref()),
        ("EZ", Some("42601"))
    );
    for (messages, code) in [
        (bind_text("", "nosuch", &[]), "26000"),
        (execute("nosuch", 0), "34000"),
        (parse("s", "show pools"), "42P05"),
        (parse("", "show pools; show pools"), "42601"),
        (
            [parse("", "show pools"), bind_text("", "", &["1"])].concat(),
            "08P01",
        ),
        (message(b'B', b"\0"), "08P01"),
        (message(b'F', b"\0\0\0\0"), "0A000"),
    ] {
        raw.send(&[messages, sync()].concat()).await;
        let frames = raw.until_ready().await;
        assert_eq!(
            error_code(&frames).as_deref(),
            Some(code),
            "{}",
            transcript(&frames)
        );
    }
    assert!(raw.query("show version").await.contains("D Flowgate"));
    proxy.shut_down().await;
}

#[tokio::test]
async fn listeners_and_runs_are_shown() {
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, |_| ()).await;
    let console = proxy.console().await;
    let (one, two) = (proxy.connect().await, proxy.connect().await);
    let define = "select pgflow.create_flow('greet'); select pgflow.add_step('greet', 'hello')";
    one.batch_execute(define).await.unwrap();
    let run = text(&one, "select run_id from pgflow.start_flow('greet', '{}')").await;
    for client in [&one, &two] {
        client
            .batch_execute(&format!("listen \"pgflow:run:{run}\""))
            .await
            .unwrap();
    }
    two.batch_execute("listen plain").await.unwrap();
    two.batch_execute("listen \"pgflow:flow:greet\"")
        .await
        .unwrap();
    let channels = table(&console, "SHOW SUBSCRIBERS").await;
    let shown: Vec<_> = channels
        .iter()
        .map(|row| {
            (
                row["channel"].clone(),
                row["kind"].clone(),
                row["subscribers"].clone(),
            )
        })
        .collect();
    let own = |channel: &str, kind: &str, count: &str| {
        (channel.to_owned(), kind.to_owned(), count.to_owned())
    };
    assert_eq!(
        shown,
        [
            own("pgflow:flow:greet", "flow", "1"),
            own(&format!("pgflow:run:{run}"), "run", "2"),
            own("plain", "ordinary", "1"),
        ]
    );
    let shown = row(&console, "SHOW RUNS", "run_id", &run).await;
    assert_eq!(
        (shown["subscribers"].as_str(), shown["writing"].as_str()),
        ("2", "0")
    );
    assert_eq!(table(&console, "SHOW PARKED").await, Table::new());
    drop((one, two));
    wait_until("nobody listens", PATIENCE, async || {
        table(&console, "SHOW SUBSCRIBERS").await.is_empty()
    })
    .await;
    proxy.shut_down().await;
}

/// Asks in the console, and waits for the proxy to end by itself.
async fn shut_down_by(proxy: Proxy, command: &str, expected: Manner) -> flowgate::app::App {
    let console = proxy.console().await;
    // The answer may be followed by the farewell at once.
    console.batch_execute(command).await.unwrap();
    let manner = timeout(PATIENCE, proxy.app().ending().asked())
        .await
        .unwrap();
    assert_eq!(manner, expected);
    proxy.into_app()
}

#[tokio::test]
async fn shutdown_comes_now_with_the_last_transaction_or_with_the_last_client() {
    let db = fresh_database().await;
    // Now: whoever is there is told to go.
    let proxy = Proxy::without_replica(&db, |_| ()).await;
    let mut busy = proxy.raw().await;
    busy.query("begin").await;
    let app = shut_down_by(proxy, "shutdown", Manner::Now).await;
    timeout(PATIENCE, app.shut_down_as(Manner::Now))
        .await
        .unwrap();
    assert_eq!(
        error_code(&busy.until_end().await).as_deref(),
        Some("57P01")
    );

    // With the last transaction: the idle go at once.
    let proxy = Proxy::without_replica(&db, |_| ()).await;
    let (mut busy, mut idle) = (proxy.raw().await, proxy.raw().await);
    busy.query("begin").await;
    let app = shut_down_by(proxy, "shutdown wait_for_servers", Manner::WhenServersFree).await;
    let ending = tokio::spawn(app.shut_down_as(Manner::WhenServersFree));
    assert_eq!(
        error_code(&idle.until_end().await).as_deref(),
        Some("57P01")
    );
    assert!(
        busy.query("select 'still here'")
            .await
            .contains("D still here")
    );
    assert!(!ending.is_finished());
    busy.send(&query("commit")).await;
    let frames = busy.until_end().await;
    assert!(
        transcript(&frames).contains("C COMMIT"),
        "{}",
        transcript(&frames)
    );
    timeout(PATIENCE, ending).await.unwrap().unwrap();

    // With the last client: everybody stays as long as they like, nobody new comes.
    let proxy = Proxy::without_replica(&db, |_| ()).await;
    let mut idle = proxy.raw().await;
    let (port, url) = (proxy.port, proxy.url());
    let app = shut_down_by(proxy, "shutdown wait_for_clients", Manner::WhenClientsLeft).await;
    let ending = tokio::spawn(app.shut_down_as(Manner::WhenClientsLeft));
    wait_until("nobody is let in", PATIENCE, async || {
        tokio::net::TcpStream::connect(("127.0.0.1", port))
            .await
            .is_err()
    })
    .await;
    assert!(try_connect(&url).await.is_err());
    for _ in 0..3 {
        assert!(idle.query("select 'served'").await.contains("D served"));
    }
    assert!(!ending.is_finished());
    drop(idle);
    timeout(PATIENCE, ending).await.unwrap().unwrap();
    assert_eq!(
        try_text(&connect(&db.primary_url).await, "select 1")
            .await
            .unwrap(),
        "1"
    );
}

#[tokio::test]
async fn replication_clients_are_shown_and_can_be_ended() {
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, |_| ()).await;
    let console = proxy.console().await;
    let login = async |mode: &str| {
        let more = [("replication", mode), ("application_name", mode)];
        Raw::login(proxy.port, "postgres", &db.name, &more).await
    };
    let (mut physical, mut logical) = (login("true").await, login("database").await);
    let client = async |mode: &str| row(&console, "SHOW CLIENTS", "application_name", mode).await;
    assert_eq!(client("true").await["replication"], "physical");
    assert_eq!(client("database").await["replication"], "logical");
    let logging_in = row(&console, "SHOW LISTS", "list", "login_clients").await;
    assert_eq!(logging_in["items"], "0");
    assert!(
        table(&console, "SHOW POOLS").await.is_empty(),
        "they are in none"
    );
    let kill = format!("kill_client {}", client("true").await["id"]);
    console.batch_execute(&kill).await.unwrap();
    let last = physical.until_end().await;
    assert_eq!(error_code(&last).as_deref(), Some("57P01"));
    assert!(logical.query("select 'spared'").await.contains("D spared"));
    console
        .batch_execute(&format!("kill {}", db.name))
        .await
        .unwrap();
    let last = logical.until_end().await;
    assert_eq!(error_code(&last).as_deref(), Some("57P01"));
    wait_until("both are gone", PATIENCE, async || {
        table(&console, "SHOW CLIENTS").await.len() == 1
    })
    .await;
    proxy.shut_down().await;
}
