//! What a session holds is its own, however many clients share a server, and stays with it, however many servers it meets.

use std::fmt::Write;

use futures_util::future::join_all;
use tokio::time::timeout;

use crate::support::chance::{Chance, seed};
use crate::support::pg::fresh_database;
use crate::support::proxy::{PATIENCE, Proxy, connect, sqlstate, text, try_text};
use crate::support::raw::{
    Raw, bind_text, close_statement, describe_portal, describe_statement, execute, first_columns,
    flush, parse, query, sync, tags, terminate, transcript,
};
use crate::support::wait::wait_until;

/// What is set, and what shows it.
const SETTINGS: &[(&str, &str, &str)] = &[
    (
        "set search_path = pg_catalog",
        "show search_path",
        "pg_catalog",
    ),
    (
        "set statement_timeout = '77s'",
        "show statement_timeout",
        "77s",
    ),
    (
        "set datestyle = 'German'",
        "select date '2024-02-03'",
        "03.02.2024",
    ),
    ("set time zone 'Asia/Tokyo'", "show time zone", "Asia/Tokyo"),
    ("set role pg_monitor", "select current_user", "pg_monitor"),
    (
        "set session authorization pg_monitor",
        "select session_user",
        "pg_monitor",
    ),
    (
        "set application_name = 'mine'",
        "show application_name",
        "mine",
    ),
    (
        "set my.own = 'x y'",
        "select coalesce(current_setting('my.own', true), '')",
        "x y",
    ),
    (
        "set session characteristics as transaction isolation level serializable",
        "show transaction_isolation",
        "serializable",
    ),
    (
        "set default_transaction_read_only = on",
        "show transaction_read_only",
        "on",
    ),
    (
        "select set_config('work_mem', '1234kB', false)",
        "show work_mem",
        "1234kB",
    ),
    (
        "begin; set work_mem = '2345kB'; commit",
        "show work_mem",
        "2345kB",
    ),
    ("set names 'LATIN1'", "show client_encoding", "LATIN1"),
    ("set xml option document", "show xmloption", "document"),
    ("set local_preload_libraries = ''", "show work_mem", "4MB"),
];

#[tokio::test]
async fn no_setting_leaks_and_each_holds_for_its_own_client() {
    let db = fresh_database().await;
    let direct = db.connect().await;
    for (set, show, wanted) in SETTINGS {
        if try_text(&direct, set).await.is_err() {
            continue;
        }
        direct.batch_execute("discard all").await.unwrap();
        let default = text(&direct, show).await;
        // Two servers, so that whoever is pinned to one leaves one to the rest.
        let proxy = Proxy::with_pool(&db, 2).await;
        let (one, two, three) = (
            proxy.connect().await,
            proxy.connect().await,
            proxy.connect().await,
        );
        one.batch_execute(set).await.unwrap();
        for round in 0..3 {
            assert_eq!(
                text(&two, show).await,
                default,
                "{set}: second client, round {round}"
            );
            assert_eq!(
                text(&one, show).await,
                *wanted,
                "{set}: its own client, round {round}"
            );
            assert_eq!(
                text(&three, show).await,
                default,
                "{set}: third client, round {round}"
            );
            // One of the servers is taken: the next request meets the other.
            two.batch_execute("begin").await.unwrap();
            assert_eq!(
                text(&one, show).await,
                *wanted,
                "{set}: elsewhere, round {round}"
            );
            two.batch_execute("commit").await.unwrap();
        }
        one.batch_execute("discard all").await.unwrap();
        assert_eq!(text(&one, show).await, default, "{set}: after discard all");
        one.batch_execute(set).await.unwrap();
        drop(one);
        let fourth = proxy.connect().await;
        for client in [&two, &three, &fourth] {
            client.batch_execute("begin").await.unwrap();
            assert_eq!(
                text(client, show).await,
                default,
                "{set}: after its client left"
            );
            client.batch_execute("commit").await.unwrap();
        }
        proxy.shut_down().await;
    }
}

#[tokio::test]
async fn what_a_transaction_sets_ends_with_it() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let (one, two) = (proxy.connect().await, proxy.connect().await);
    for script in [
        "begin; set local work_mem = '1MB'; commit",
        "begin; set work_mem = '1MB'; rollback",
        "set work_mem = '1MB'; select 1/0",
        "begin; set work_mem = '1MB'; select 1/0",
        "set work_mem = 'nonsense'",
        "set work_mem = '1MB'; reset work_mem",
        "set work_mem = '1MB'; reset all",
        "set work_mem = '1MB'; set work_mem = default",
        "set work_mem = '1MB'; set work_mem to default",
    ] {
        // Statement by statement and all in one.
        for parts in [script.split("; ").collect::<Vec<_>>(), vec![script]] {
            if parts.len() > 1 && script.starts_with("set work_mem = '1MB'; select") {
                continue;
            }
            // No error is an answer, too.
            for part in &parts {
                drop(try_text(&one, part).await);
            }
            drop(try_text(&one, "rollback").await);
            assert_eq!(text(&one, "show work_mem").await, "4MB", "{parts:?}");
            one.batch_execute("discard all").await.unwrap();
            assert_eq!(
                text(&two, "show work_mem").await,
                "4MB",
                "{parts:?}: another"
            );
        }
    }
    proxy.shut_down().await;
}

#[tokio::test]
async fn startup_parameters_and_options_are_the_clients_defaults() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let with = async |query: &str| connect(&format!("{}?{query}", proxy.url())).await;
    let plain = proxy.connect().await;
    let opted = with("options=-c%20work_mem%3D5MB%20-c%20search_path%3Dpg_catalog").await;
    let named = with("application_name=by%20name").await;
    for _ in 0..3 {
        assert_eq!(text(&plain, "show work_mem").await, "4MB");
        assert_eq!(text(&opted, "show work_mem").await, "5MB");
        assert_eq!(text(&opted, "show search_path").await, "pg_catalog");
        assert_eq!(text(&named, "show application_name").await, "by name");
        assert_eq!(text(&named, "show work_mem").await, "4MB");
        assert_eq!(text(&plain, "show application_name").await, "");
        opted.batch_execute("set work_mem = '6MB'").await.unwrap();
        assert_eq!(text(&plain, "show work_mem").await, "4MB");
        assert_eq!(text(&opted, "show work_mem").await, "6MB");
        opted.batch_execute("reset work_mem").await.unwrap();
        assert_eq!(text(&plain, "show work_mem").await, "4MB");
        assert_eq!(text(&opted, "show work_mem").await, "5MB");
        named
            .batch_execute("set application_name = 'other'")
            .await
            .unwrap();
        assert_eq!(text(&plain, "show application_name").await, "");
        named.batch_execute("reset application_name").await.unwrap();
        assert_eq!(text(&plain, "show application_name").await, "");
        assert_eq!(text(&named, "show application_name").await, "by name");
    }
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_wrong_startup_parameter_is_refused_in_postgres_words() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    for parameter in [
        ("work_mem", "lots"),
        ("no_such_thing", "1"),
        ("client_encoding", "KLINGON"),
        ("options", "-c nonsense=1"),
    ] {
        let mut said = Vec::new();
        for port in [db.url().port, proxy.port] {
            let mut raw = Raw::connect(port).await;
            let parameters = [
                ("user", "postgres"),
                ("database", db.name.as_str()),
                parameter,
            ];
            raw.send(&crate::support::raw::startup(
                crate::support::raw::PROTOCOL_3_0,
                &parameters,
            ))
            .await;
            let errors: Vec<_> = raw
                .until_end()
                .await
                .into_iter()
                .filter(|frame| frame.tag == b'E')
                .collect();
            said.push(transcript(&errors));
        }
        assert_eq!(said[0], said[1], "{parameter:?}");
    }
    assert_eq!(text(&proxy.connect().await, "select 1").await, "1");
    proxy.shut_down().await;
}

#[tokio::test]
async fn the_client_is_told_of_parameters_that_changed_and_of_its_own_only() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let mut one = proxy.raw_with(&[("application_name", "one")]).await;
    assert_eq!(one.parameters["application_name"], "one");
    one.query("begin").await;
    // Every server is busy: what a login is told comes from memory, and is true all the same.
    let mut two = proxy.raw_with(&[("application_name", "two")]).await;
    assert_eq!(two.parameters["application_name"], "two");
    one.query("commit").await;
    one.query("set datestyle = 'German'; set time zone 'Asia/Tokyo'")
        .await;
    assert_eq!(
        (
            one.parameters["DateStyle"].as_str(),
            one.parameters["TimeZone"].as_str()
        ),
        ("German, DMY", "Asia/Tokyo")
    );
    let usual = two.parameters.clone();
    for _ in 0..3 {
        two.query("select 1").await;
        assert_eq!(two.parameters, usual);
        one.query("select 1").await;
        assert_eq!(one.parameters["DateStyle"], "German, DMY");
        assert_eq!(one.parameters["application_name"], "one");
    }
    // The default changes under an idle server's feet, as ALTER SYSTEM and a reload do it.
    let direct = db.connect().await;
    direct
        .batch_execute(&format!(
            "alter role postgres in database {} set time zone 'Europe/Oslo'",
            db.name
        ))
        .await
        .unwrap();
    let three = proxy.raw_with(&[("options", "-c work_mem=3MB")]).await;
    assert_eq!(three.parameters["TimeZone"], "Europe/Oslo");
    proxy.shut_down().await;
}

#[tokio::test]
async fn what_only_a_server_can_hold_ties_its_client_and_is_gone_with_it() {
    let db = fresh_database().await;
    let holds = [
        (
            "create temp table mine (n int)",
            "select count(*) from mine",
            "temp_object",
        ),
        (
            "create temporary view mine as select 1",
            "select count(*) from mine",
            "temp_object",
        ),
        (
            "select 1 as n into temp mine",
            "select count(*) from mine",
            "temp_object",
        ),
        (
            "create table pg_temp.mine (n int)",
            "select count(*) from mine",
            "temp_object",
        ),
        (
            "begin; create temp table mine (n int); commit",
            "select count(*) from mine",
            "temp_object",
        ),
        (
            "select pg_advisory_lock(991)",
            "select pg_advisory_unlock(991)::int + 1",
            "advisory_lock",
        ),
        (
            "begin; declare mine cursor with hold for select 1; commit",
            "fetch 1 from mine",
            "hold_cursor",
        ),
        ("prepare mine as select 1", "execute mine", "sql_prepare"),
        ("load 'plpgsql'", "select 1", "load"),
    ];
    for (hold, works, reason) in holds {
        let proxy = Proxy::with_pool(&db, 2).await;
        let (one, two) = (proxy.connect().await, proxy.connect().await);
        one.batch_execute(hold).await.unwrap();
        let pins = format!("flowgate_pins_total{{reason=\"{reason}\"}}");
        wait_until(hold, PATIENCE, async || proxy.metric(&pins) == 1).await;
        for _ in 0..3 {
            let others = try_text(&two, works).await;
            assert!(
                reason == "load" || !matches!(&others, Ok(seen) if seen != "1"),
                "{hold}: seen by another"
            );
        }
        let held = text(&one, works).await;
        assert!(
            reason != "advisory_lock" || held == "2",
            "{hold}: its own client lost it"
        );
        one.batch_execute(if reason == "advisory_lock" {
            hold
        } else {
            "select 1"
        })
        .await
        .unwrap();
        drop(one);
        // Whoever comes next on any server finds nothing of it.
        let free = "select count(*) from pg_locks where locktype = 'advisory' and objid = 991";
        let direct = db.connect().await;
        wait_until("the lock is let go", PATIENCE, async || {
            text(&direct, free).await == "0"
        })
        .await;
        let three = proxy.connect().await;
        two.batch_execute("begin").await.unwrap();
        let others = try_text(&three, works).await;
        assert!(
            matches!(reason, "load" | "advisory_lock") || others.is_err(),
            "{hold}: left behind"
        );
        two.batch_execute("rollback").await.unwrap();
        proxy.shut_down().await;
    }
}

#[tokio::test]
async fn discard_all_unties() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let (one, two) = (proxy.connect().await, proxy.connect().await);
    one.batch_execute(
        "create temp table mine (n int); select pg_advisory_lock(992); prepare mine as select 1",
    )
    .await
    .unwrap();
    let waiting = async { text(&two, "select 'at last'").await };
    let untie = async { one.batch_execute("discard all").await.unwrap() };
    let (answer, ()) = timeout(PATIENCE, futures_util::future::join(waiting, untie))
        .await
        .unwrap();
    assert_eq!(answer, "at last");
    assert_eq!(
        sqlstate(try_text(&one, "select * from mine").await),
        "42P01"
    );
    assert_eq!(text(&two, "select pg_try_advisory_lock(992)").await, "t");
    proxy.shut_down().await;
}

#[tokio::test]
async fn session_mode_keeps_one_server_for_one_client() {
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, |config| {
        config.pool.mode = flowgate::config::PoolMode::Session;
        config.pool.size = 3.try_into().unwrap();
    })
    .await;
    let (one, two) = (proxy.connect().await, proxy.connect().await);
    let pid = "select pg_backend_pid()";
    let (first, second) = (text(&one, pid).await, text(&two, pid).await);
    assert_ne!(first, second);
    one.batch_execute("create temp table mine as select 1 as n; set work_mem = '1MB'")
        .await
        .unwrap();
    for _ in 0..5 {
        assert_eq!(
            (text(&one, pid).await, text(&two, pid).await),
            (first.clone(), second.clone())
        );
    }
    assert_eq!(text(&one, "select n from mine").await, "1");
    drop(one);
    let three = proxy.connect().await;
    assert!(try_text(&three, "select n from mine").await.is_err());
    assert_eq!(text(&three, "show work_mem").await, "4MB");
    proxy.shut_down().await;
}

/// Thirty clients on three servers, each with settings, transactions, prepared statements and locks of its own, in an order
/// of chance; after every step each finds exactly what it left. `FLOWGATE_SEED` repeats a run.
#[tokio::test]
async fn thirty_clients_on_three_servers_never_meet_anothers_session() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 3).await;
    let seed = seed();
    let direct = db.connect().await;
    let roles = ["pg_monitor", "pg_read_all_data", "pg_signal_backend"];
    direct
        .batch_execute("create table tally (client int, n int); grant all on tally to public")
        .await
        .unwrap();
    let clients = (0..30u64).map(async |me| {
        let client = proxy.connect().await;
        let mut chance = Chance(seed ^ me.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1);
        let mut belief = Belief::default();
        let own = client.prepare(&format!("select {me}::int4, $1::int4")).await.unwrap();
        let mut written = 0;
        for step in 0..60 {
            let value = chance.below(900) + 100;
            let mut done = String::new();
            match chance.below(12) {
                0 => {
                    client.batch_execute(&format!("set work_mem = '{value}kB'")).await.unwrap();
                    belief.work_mem = Some(value);
                }
                1 => {
                    client.batch_execute("reset work_mem").await.unwrap();
                    belief.work_mem = None;
                }
                2 => {
                    client.batch_execute(&format!("set my.own = 'c{me}v{value}'")).await.unwrap();
                    belief.own = format!("c{me}v{value}");
                }
                3 => {
                    let role = roles[usize::try_from(value % 3).unwrap()];
                    client.batch_execute(&format!("set role {role}")).await.unwrap();
                    belief.role = role.to_owned();
                }
                4 => {
                    client.batch_execute("reset role").await.unwrap();
                    belief.role = "postgres".to_owned();
                }
                5 => {
                    client.batch_execute("begin").await.unwrap();
                    client.batch_execute(&format!("set work_mem = '{value}kB'")).await.unwrap();
                    let ending = if chance.below(2) == 0 { "commit" } else { "rollback" };
                    client.batch_execute(ending).await.unwrap();
                    if ending == "commit" {
                        belief.work_mem = Some(value);
                    }
                }
                6 => drop(try_text(&client, "set work_mem = '111kB'; select 1/0").await.unwrap_err()),
                7 => {
                    client.batch_execute("discard all").await.unwrap();
                    belief = Belief::default();
                }
                8 => {
                    client.batch_execute("begin; select pg_advisory_xact_lock(5)").await.unwrap();
                    client.batch_execute(&format!("insert into tally values ({me}, {step}); set local work_mem = '222kB'")).await.unwrap();
                    client.batch_execute("commit").await.unwrap();
                    written += 1;
                }
                9 => {
                    client.batch_execute(&format!("set application_name = 'c{me}'")).await.unwrap();
                    belief.name = format!("c{me}");
                }
                10 => {
                    client.batch_execute(&format!("create temp table own as select {me} as n")).await.unwrap();
                    assert_eq!(text(&client, "select n from own").await, me.to_string());
                    client.batch_execute("discard all").await.unwrap();
                    belief = Belief::default();
                }
                _ => write!(done, "nothing").unwrap(),
            }
            // `discard all` has dropped it: a driver would know from its own call.
            let row = match client.query_one(&own, &[&step]).await {
                Ok(row) => row,
                Err(error) if error.code().is_some_and(|code| code.code() == "26000") => {
                    client.query_one(&format!("select {me}::int4, $1::int4"), &[&step]).await.unwrap()
                }
                Err(error) => panic!("seed {seed}, client {me}, step {step}: {error:?}"),
            };
            assert_eq!((row.get::<_, i32>(0) as u64, row.get::<_, i32>(1)), (me, step), "seed {seed}");
            let found = text(&client, "select concat_ws(',', current_setting('work_mem'), coalesce(current_setting('my.own', true), ''), current_user, current_setting('application_name'), to_regclass('own'))").await;
            assert_eq!(found, belief.to_string(), "seed {seed}, client {me}, step {step}");
        }
        let counted = text(&client, &format!("reset role; select count(*) from tally where client = {me}")).await;
        assert_eq!(counted, written.to_string(), "seed {seed}, client {me}");
    });
    timeout(PATIENCE * 4, join_all(clients)).await.unwrap();
    proxy.shut_down().await;
}

/// What a client should find.
struct Belief {
    work_mem: Option<u64>,
    own: String,
    role: String,
    name: String,
}

impl Default for Belief {
    fn default() -> Self {
        Self {
            work_mem: None,
            own: String::new(),
            role: "postgres".to_owned(),
            name: String::new(),
        }
    }
}

impl std::fmt::Display for Belief {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let work_mem = self
            .work_mem
            .map_or_else(|| "4MB".to_owned(), |kb| format!("{kb}kB"));
        write!(f, "{work_mem},{},{},{}", self.own, self.role, self.name)
    }
}

async fn server_of(client: &mut Raw) -> String {
    let frames = client.ask_frames(&query("select pg_backend_pid()")).await;
    first_columns(&frames).concat()
}

/// Leaves of two servers only one, another than that of `pid`; the other one stays in a transaction of the client returned.
async fn hold_server_of(pid: &str, proxy: &Proxy) -> Raw {
    let (mut one, mut two) = (proxy.raw().await, proxy.raw().await);
    one.query("begin").await;
    two.query("begin").await;
    let held = server_of(&mut one).await;
    let (holder, mut other) = if held == pid { (one, two) } else { (two, one) };
    other.query("commit").await;
    holder
}

/// One run of statement `s`, as drivers do it.
fn run(name: &str) -> Vec<u8> {
    let messages = [
        bind_text("", name, &[]),
        describe_portal(""),
        execute("", 0),
        sync(),
    ];
    messages.concat()
}

#[tokio::test]
async fn a_statement_whose_table_has_changed_is_refused_on_every_server_as_postgres_does() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 2).await;
    let direct = db.connect().await;
    let mut heard = Vec::new();
    for through in [false, true] {
        direct
            .batch_execute(
                "drop table if exists changing, log; create table changing (a int default 1); create table log (n int);
                 insert into changing values (7)",
            )
            .await
            .unwrap();
        let mut client = if through {
            proxy.raw().await
        } else {
            proxy.raw_direct().await
        };
        let texts = [
            ("reads", "select * from changing"),
            (
                "writes",
                "/* why */ insert into changing default values returning *",
            ),
            ("logs", "insert into log values (1)"),
        ];
        let mut lines = Vec::new();
        for (name, text) in texts {
            lines.push(client.ask(&[parse(name, text), sync()].concat()).await);
        }
        // Prepared again before the table changes, so that on one server there is another client's newer plan of it.
        let described = [parse("too", texts[0].1), describe_statement("too"), sync()].concat();
        lines.push(client.ask(&described).await);
        lines.push(client.ask(&run("reads")).await);
        let pid = server_of(&mut client).await;
        direct
            .batch_execute("alter table changing add b text default 'new'")
            .await
            .unwrap();
        // First on a server that has never seen any of them, then on that where they were prepared.
        let mut elsewhere = if through {
            Some(hold_server_of(&pid, &proxy).await)
        } else {
            None
        };
        for round in 0..2 {
            for name in ["reads", "writes", "too", "logs"] {
                lines.push(client.ask(&run(name)).await);
            }
            lines.push(
                client
                    .ask(&[describe_statement("reads"), sync()].concat())
                    .await,
            );
            // What came before it in the same request is undone, what comes after does not run.
            let among = [
                bind_text("", "logs", &[]),
                execute("", 0),
                bind_text("", "writes", &[]),
                execute("", 0),
                bind_text("", "logs", &[]),
                execute("", 0),
                sync(),
            ];
            lines.push(client.ask(&among.concat()).await);
            for step in [
                query("begin"),
                run("logs"),
                run("writes"),
                run("logs"),
                query("rollback"),
            ] {
                lines.push(client.ask(&step).await);
            }
            if let Some(holder) = &mut elsewhere {
                let other = server_of(&mut client).await;
                assert_eq!(other == pid, round == 1);
                holder.query("commit").await;
                let mut next = hold_server_of(&other, &proxy).await;
                std::mem::swap(holder, &mut next);
            }
        }
        lines.push(
            client
                .query("select (select count(*) from log), (select count(*) from changing)")
                .await,
        );
        let anew = [
            close_statement("writes"),
            parse("writes", texts[1].1),
            run("writes"),
        ]
        .concat();
        lines.push(client.ask(&anew).await);
        lines.push(client.ask(&run("writes")).await);
        // Back to what it was: the old plan will do again.
        direct
            .batch_execute("alter table changing drop b")
            .await
            .unwrap();
        lines.push(client.ask(&run("reads")).await);
        lines.push(client.ask(&run("writes")).await);
        heard.push(lines);
    }
    let refused = heard[0]
        .iter()
        .filter(|line| line.contains("cached plan must not"))
        .count();
    assert_eq!(refused, 13, "{:#?}", heard[0]);
    assert_eq!(heard[0], heard[1]);
    proxy.shut_down().await;
}

#[tokio::test]
async fn one_text_means_each_clients_own_table() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let direct = db.connect().await;
    direct
        .batch_execute(
            "create schema one; create schema two; create table one.mine (a int); create table two.mine (b text);
             insert into one.mine values (1); insert into two.mine values ('two')",
        )
        .await
        .unwrap();
    let mut clients = Vec::new();
    for schema in ["one", "two"] {
        let mut client = proxy.raw().await;
        client.query(&format!("set search_path = {schema}")).await;
        client
            .ask(&[parse("mine", "select * from mine"), sync()].concat())
            .await;
        clients.push((schema, client));
    }
    for _ in 0..3 {
        for (schema, client) in &mut clients {
            let mut own = proxy.raw_direct().await;
            own.query(&format!("set search_path = {schema}")).await;
            own.ask(&[parse("mine", "select * from mine"), sync()].concat())
                .await;
            assert_eq!(client.ask(&run("mine")).await, own.ask(&run("mine")).await);
        }
    }
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_client_that_sends_no_more_still_hears_of_a_statement_brought_along() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 2).await;
    let mut client = proxy.raw().await;
    client
        .ask(&[parse("s", "select 7 as n"), sync()].concat())
        .await;
    let pid = server_of(&mut client).await;
    let _holder = hold_server_of(&pid, &proxy).await;
    client.send(&run("s")).await;
    client.half_close().await;
    let frames = client.until_ready().await;
    assert_eq!(first_columns(&frames), ["7"]);
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_login_is_told_what_a_session_that_set_nothing_has() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let direct = proxy.raw_direct().await;
    let mut one = proxy.raw().await;
    for change in [
        "set client_encoding = 'LATIN1'; set time zone 'Asia/Tokyo'",
        "set session authorization pg_monitor",
    ] {
        one.query(change).await;
        assert_eq!(proxy.raw().await.parameters, direct.parameters, "{change}");
    }
    // The same from memory, while the only server is busy.
    one.query("begin").await;
    assert_eq!(proxy.raw().await.parameters, direct.parameters);
    assert_eq!(one.parameters["TimeZone"], "Asia/Tokyo");
    let said = one
        .query("rollback; select current_setting('timezone') || ' ' || current_user")
        .await;
    assert!(said.contains("Asia/Tokyo pg_monitor"), "{said}");
    proxy.shut_down().await;
}

/// Where Postgres is to refuse the second Parse of a name itself, it must know the name; for no longer than that.
#[tokio::test]
async fn a_name_prepared_twice_is_known_to_its_own_client_only() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let mut one = proxy.raw().await;
    let mut two = proxy.raw().await;
    let prepare = |text: &str| {
        let messages = [
            parse("mine", text),
            bind_text("", "mine", &[]),
            execute("", 0),
            sync(),
        ];
        messages.concat()
    };
    assert!(one.ask(&prepare("select 1")).await.contains("D 1"));
    for text in ["select 1", "select 2"] {
        let said = one.ask(&prepare(text)).await;
        assert!(said.contains("42P05"), "{said}");
        let names = "select count(*) from pg_prepared_statements where name = 'mine'";
        assert!(two.query(names).await.contains("D 0"));
        let bind = [bind_text("", "mine", &[]), execute("", 0), sync()].concat();
        let said = two.ask(&bind).await;
        assert!(said.contains("26000"), "{said}");
        assert!(one.ask(&bind).await.contains("D 1"));
    }
    proxy.shut_down().await;
}

/// asyncpg prepares with a Flush and no Sync; psycopg asks the view.
#[tokio::test]
async fn sql_knows_statements_prepared_by_message_inside_a_request_too() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let mut other = proxy.raw().await;
    other
        .ask(&[parse("theirs", "select 'theirs'"), sync()].concat())
        .await;
    let mut one = proxy.raw().await;
    for (name, sql) in [("mine", "select 7"), ("run", "execute mine")] {
        one.send(&[parse(name, sql), describe_statement(name), flush()].concat())
            .await;
        let described = one.until(b'T').await;
        assert_eq!(tags(&described), "1tT", "{}", transcript(&described));
    }
    let run = [bind_text("", "run", &[]), execute("", 0), sync()].concat();
    assert_eq!(first_columns(&one.ask_frames(&run).await), ["7"]);
    one.send(&[parse("again", "select 8"), flush()].concat())
        .await;
    one.until(b'1').await;
    let executed = one.ask_frames(&query("execute again")).await;
    assert_eq!(first_columns(&executed), ["8"], "{}", transcript(&executed));

    let view = query(
        "select concat_ws('|', name, statement, from_sql) from pg_prepared_statements order by prepare_time",
    );
    assert_eq!(
        first_columns(&one.ask_frames(&view).await),
        ["mine|select 7|f", "run|execute mine|f", "again|select 8|f"]
    );
    assert_eq!(
        first_columns(&other.ask_frames(&view).await),
        ["theirs|select 'theirs'|f"]
    );
    assert_eq!(first_columns(&one.ask_frames(&run).await), ["7"]);
    proxy.shut_down().await;
}

#[tokio::test]
async fn what_is_committed_and_chained_is_known_to_be_there() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let mut one = proxy.raw().await;
    for request in [
        "begin",
        "set work_mem = '77MB'",
        "commit and chain",
        "commit",
    ] {
        one.query(request).await;
    }
    let mut two = proxy.raw().await;
    let shown = two.ask_frames(&query("show work_mem")).await;
    assert_eq!(first_columns(&shown), ["4MB"]);
    let shown = one.ask_frames(&query("show work_mem")).await;
    assert_eq!(first_columns(&shown), ["77MB"]);
    proxy.shut_down().await;
}

/// While a client has its server to itself nobody asks what its functions leave there; before others get it, somebody must.
#[tokio::test]
async fn what_code_out_of_sight_left_is_found_when_its_client_lets_go() {
    let db = fresh_database().await;
    let direct = db.connect().await;
    direct
        .batch_execute(
            "create function hides() returns void language plpgsql as
                 $$ begin perform set_config('work_mem', '77MB', false), pg_advisory_lock(77); end $$",
        )
        .await
        .unwrap();
    let held = "select count(*) from pg_locks where locktype = 'advisory' and objid = 77 \
                and database = (select oid from pg_database where datname = current_database())";
    let proxy = Proxy::with_pool(&db, 1).await;
    for left_in in ["begin", "begin; prepare q as select 1"] {
        let mut one = proxy.raw().await;
        one.query(left_in).await;
        one.query("select hides()").await;
        assert_eq!(text(&direct, held).await, "1");
        one.send(&terminate()).await;
        one.until_end().await;
        wait_until("the lock is free", PATIENCE, async || {
            text(&direct, held).await == "0"
        })
        .await;
    }
    let mut one = proxy.raw().await;
    one.query("prepare q as select 1").await;
    one.query("select hides()").await;
    one.query("deallocate all").await;
    // It keeps what its function made, so the only server is its own until it leaves.
    assert_eq!(
        first_columns(&one.ask_frames(&query("show work_mem")).await),
        ["77MB"]
    );
    one.send(&terminate()).await;
    one.until_end().await;
    let mut two = proxy.raw().await;
    assert_eq!(
        first_columns(&two.ask_frames(&query("show work_mem")).await),
        ["4MB"]
    );
    assert_eq!(text(&direct, held).await, "0");
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_statement_whose_table_is_gone_can_be_deallocated_and_listed() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let mut one = proxy.raw().await;
    one.query("create table gone (n int)").await;
    one.ask(&[parse("s", "select * from gone"), sync()].concat())
        .await;
    one.ask(&[parse("t", "select n from gone"), sync()].concat())
        .await;
    one.query("begin; drop table gone").await;
    let names = query("select name from pg_prepared_statements where name = 's'");
    let listed = one.ask_frames(&names).await;
    assert!(tags(&listed).ends_with("CZ"), "{}", transcript(&listed));
    for (request, done) in [
        ("deallocate s", "C DEALLOCATE\nZ T"),
        ("deallocate t", "C DEALLOCATE\nZ T"),
        ("commit", "C COMMIT\nZ I"),
    ] {
        assert_eq!(one.query(request).await, done, "{request}");
    }
    proxy.shut_down().await;
}
