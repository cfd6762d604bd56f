//! Nothing a client leaves behind reaches another: a hundred clients dirty five servers in every way there is, and whoever
//! comes next looks at all of its session before it does the same.

use std::collections::{BTreeMap, HashMap};
use std::sync::Mutex;
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::Instant;
use tokio_postgres::Client;

use crate::support::chance::{Chance, Stretch, seed};
use crate::support::pg::fresh_database;
use crate::support::proxy::{PATIENCE, Proxy, text};
use crate::support::raw::{
    Raw, bind_text, copy_data, describe_statement, error_code, execute, first_columns, flush,
    parse, query, sync, tags, terminate, transcript,
};
use crate::support::wait::wait_until;

const CLIENTS: u64 = 100;
const SERVERS: usize = 5;

/// A row a fact, and one (`name=value`) a setting. Relations of a database's own only: the catalog's are locked by looking.
const SESSION: &str = "
    select 'user: ' || concat_ws(' ', current_user, session_user)
    union all select 'temporary relations: ' || count(*) from pg_class where relnamespace = pg_my_temp_schema()
    union all select 'temporary schema: ' || pg_my_temp_schema()
    union all select 'locks: ' || coalesce(string_agg(concat_ws(' ', locktype, mode, relation, objid), ', '), 'none') from pg_locks
        where pid = pg_backend_pid() and locktype <> 'virtualxid' and (relation is null or relation >= 16384)
    union all select 'prepared: ' || coalesce(string_agg(name, ', '), 'none') from pg_prepared_statements
        where from_sql or name not like 'flowgate\\_%'
    union all select 'cursors: ' || coalesce(string_agg(name, ', '), 'none') from pg_cursors where name <> ''
    union all select 'channels: ' || coalesce(string_agg(channel, ', '), 'none') from pg_listening_channels() as channel
    union all select 'transaction: ' || coalesce(pg_current_xact_id_if_assigned()::text, 'none')
    union all select 'own setting: ' || coalesce(nullif(current_setting('my.dirt', true), ''), 'none')
    union all select name || '=' || concat_ws('/', setting, reset_val) from pg_settings";

/// `FLOWGATE_SEED` repeats what each client does, `FLOWGATE_SOAK_SECONDS` goes on for that long.
#[tokio::test]
async fn a_hundred_dirty_clients_leave_nothing_to_each_other() {
    let db = fresh_database().await;
    let direct = db.connect().await;
    direct
        .batch_execute(
            "create table dirty (n int); create sequence drawn; grant all on dirty, drawn to public",
        )
        .await
        .unwrap();
    let proxy = Proxy::without_replica(&db, |config| {
        config.pool.size = SERVERS.try_into().unwrap();
        config.pool.checkout_timeout = Duration::from_secs(120);
    })
    .await;
    let mut fresh = Raw::login_url(&db.primary_url, &[]).await;
    let virgin = Virgin {
        told: fresh.parameters.clone(),
        session: session(&mut fresh).await.1,
        users: Mutex::new(HashMap::new()),
    };
    let seed = seed();
    let stretch = Stretch::of(4);
    let clients = (0..CLIENTS).map(async |me| {
        let mut client = Visitor {
            me,
            chance: Chance::of(seed, me),
        };
        let mut round = 0;
        while stretch.has(round) {
            client.visit(&proxy, &virgin, &direct).await;
            round += 1;
        }
        round
    });
    let visits: u64 = join_all(clients).await.into_iter().sum();

    // Who vanished has left nothing running, open or locked.
    let servers = format!(
        "from pg_stat_activity where datname = '{}' and pid <> pg_backend_pid() and application_name not like 'flowgate%'",
        db.name
    );
    for left in [
        format!("{servers} and state <> 'idle'"),
        format!("{servers} and pid in (select pid from pg_locks where locktype = 'advisory')"),
    ] {
        let show = format!(
            "select coalesce(string_agg(concat_ws(' ', pid, state, wait_event, now() - state_change, query), E'\\n'), '') {left}"
        );
        let mut found = String::new();
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            found = text(&direct, &show).await;
            if found.is_empty() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(
            found.is_empty(),
            "seed {seed}: left behind by clients that left:\n{found}"
        );
    }
    let users = virgin.users.into_inner().unwrap();
    let shared = users.values().filter(|users| users.len() > 1).count();
    println!(
        "{visits} visits on {} servers, {shared} of them used by several clients",
        users.len(),
    );
    assert!(shared > 0, "no server had two users: nothing was shown");
    proxy.shut_down().await;
}

/// What a session nobody has used is like, and who used which server.
struct Virgin {
    told: BTreeMap<String, String>,
    session: Vec<String>,
    users: Mutex<HashMap<String, Vec<u64>>>,
}

/// The server's pid, and all that can be seen of the session.
async fn session(raw: &mut Raw) -> (String, Vec<String>) {
    let frames = raw
        .ask_frames(&query(&format!(
            "select 'pid: ' || pg_backend_pid() union all {SESSION}"
        )))
        .await;
    assert!(error_code(&frames).is_none(), "{}", transcript(&frames));
    let mut rows = first_columns(&frames);
    let at = rows
        .iter()
        .position(|row| row.starts_with("pid: "))
        .unwrap();
    let pid = rows.swap_remove(at);
    rows.sort();
    (pid, rows)
}

struct Visitor {
    me: u64,
    chance: Chance,
}

/// How a session ends.
enum Leave {
    Discard,
    Terminate,
    Vanish,
}

impl Visitor {
    /// One connection, used for a while; between the sessions on it lies a DISCARD ALL.
    async fn visit(&mut self, proxy: &Proxy, virgin: &Virgin, direct: &Client) {
        let mut raw = proxy.raw().await;
        assert_eq!(raw.parameters, virgin.told, "client {}", self.me);
        loop {
            self.look(&mut raw, virgin).await;
            for _ in 0..=self.chance.below(3) {
                self.dirty(&mut raw).await;
            }
            match self.leave(&mut raw, direct).await {
                Leave::Discard => {}
                Leave::Terminate => {
                    raw.send(&terminate()).await;
                    break;
                }
                Leave::Vanish => break,
            }
        }
    }

    async fn look(&mut self, raw: &mut Raw, virgin: &Virgin) {
        let me = self.me;
        if self.chance.one_in(3) {
            // Nothing by these names, nor without one.
            for name in ["dirt", "dirt_sql", ""] {
                let bind = [bind_text("", name, &[]), execute("", 0), sync()].concat();
                let frames = raw.ask_frames(&bind).await;
                assert_eq!(
                    error_code(&frames).as_deref(),
                    Some("26000"),
                    "client {me}: statement {name:?}: {}",
                    transcript(&frames)
                );
            }
        }
        let (pid, found) = session(raw).await;
        let different: Vec<_> = found
            .iter()
            .filter(|row| !virgin.session.contains(row))
            .collect();
        let users = {
            let mut users = virgin.users.lock().unwrap();
            let users = users.entry(pid.clone()).or_default();
            users.push(me);
            users.clone()
        };
        assert!(
            different.is_empty() && found.len() == virgin.session.len(),
            "client {me}, {pid}, used by {users:?}: {different:#?}"
        );
        if self.chance.one_in(4) {
            let frames = raw.ask_frames(&query("select lastval()")).await;
            assert_eq!(
                error_code(&frames).as_deref(),
                Some("55000"),
                "client {me}, {pid}, used by {users:?}: {}",
                transcript(&frames)
            );
        }
    }

    /// Leaves something behind; whether Postgres lets it does not matter (the transaction may have failed, the role may not).
    async fn dirty(&mut self, raw: &mut Raw) {
        let me = self.me;
        let value = self.chance.below(900) + 100;
        let key = me * 1000 + value;
        let sql = match self.chance.below(34) {
            0 => format!("set work_mem = '{value}kB'"),
            1 => "set search_path = pg_catalog; set datestyle = 'German'".to_owned(),
            2 => format!("set my.dirt = '{value}'"),
            3 => "set time zone 'Asia/Tokyo'; set intervalstyle = 'iso_8601'".to_owned(),
            4 => "set session characteristics as transaction isolation level serializable, read only".to_owned(),
            5 => "set role pg_monitor".to_owned(),
            6 => "set session authorization pg_monitor".to_owned(),
            7 => format!("select set_config('work_mem', '{value}kB', false)"),
            8 => format!("select set_config('my.' || 'dirt', '{value}', false)"),
            9 => "begin".to_owned(),
            10 => format!("begin; set work_mem = '{value}kB'; select 1/0"),
            11 => "commit".to_owned(),
            12 => "rollback".to_owned(),
            13 => format!("begin; set local work_mem = '{value}kB'; commit"),
            14 => format!("set work_mem = '{value}kB'; select 1/0"),
            15 => format!("create temp table if not exists dirt as select {me} as n"),
            16 => "create temp view dirt_view as select 1; create temp sequence dirt_sequence".to_owned(),
            17 => "begin; create temp table dirt_in (n int); commit".to_owned(),
            18 => "create function pg_temp.dirt() returns int language sql as 'select 1'".to_owned(),
            19 => format!("select pg_advisory_lock({key})"),
            20 => format!("begin; select pg_advisory_lock_shared({key}); rollback"),
            21 => format!("begin; select pg_advisory_xact_lock({key}); insert into dirty values ({me})"),
            22 => "prepare dirt_sql as select 1".to_owned(),
            23 => "begin; declare dirt_cursor cursor with hold for select generate_series(1, 10); commit".to_owned(),
            24 => "begin; declare dirt_cursor cursor for select generate_series(1, 10); fetch 1 from dirt_cursor".to_owned(),
            25 => format!("listen dirt_{me}"),
            26 => format!("begin; listen dirt_{me}; savepoint s; listen dirt_s; notify dirt_{me}; commit"),
            27 => "select nextval('drawn'); select currval('drawn')".to_owned(),
            28 => "select nextval('drawn')".to_owned(),
            29 => "set client_encoding = 'LATIN1'; set application_name = 'dirt'".to_owned(),
            30 => "set default_transaction_read_only = on; set statement_timeout = '100s'".to_owned(),
            31 => {
                let text = format!("select {me}, $1::int");
                let bytes = [
                    parse("dirt", &text),
                    bind_text("", "dirt", &["1"]),
                    execute("", 0),
                    sync(),
                ];
                raw.ask(&bytes.concat()).await;
                return;
            }
            32 => {
                let text = format!("set work_mem = '{value}kB'");
                let bytes = [
                    parse("", &text),
                    bind_text("", "", &[]),
                    execute("", 0),
                    sync(),
                ];
                raw.ask(&bytes.concat()).await;
                return;
            }
            _ => {
                // Stays prepared, without a name; some of it fails.
                let text = if value.is_multiple_of(2) { "select 'unnamed'" } else { "selec" };
                raw.ask(&[parse("", text), sync()].concat()).await;
                return;
            }
        };
        let frames = raw.ask_frames(&query(&sql)).await;
        assert!(
            tags(&frames).contains('Z'),
            "client {me}: {sql}: {}",
            transcript(&frames)
        );
    }

    async fn leave(&mut self, raw: &mut Raw, direct: &Client) -> Leave {
        let me = self.me;
        match self.chance.below(12) {
            0..=3 => {
                raw.query("rollback").await;
                // The session's own user, whoever it was.
                let said = raw.query("discard all").await;
                assert!(said.contains("C DISCARD ALL"), "client {me}: {said}");
                return Leave::Discard;
            }
            4 | 5 => return Leave::Terminate,
            // Between requests, perhaps in a transaction.
            6 => {}
            7 => {
                raw.query("begin; insert into dirty values (0)").await;
            }
            // In the middle of a query, perhaps before Postgres has read it.
            8 => raw.send(&query("select pg_sleep(600)")).await,
            9 => {
                let sleep = format!("select pg_sleep(600), {me}");
                raw.query("rollback").await;
                raw.send(&query(&format!("begin; set work_mem = '1MB'; {sleep}")))
                    .await;
                let seen = format!(
                    "select count(*) from pg_stat_activity where state = 'active' and wait_event = 'PgSleep' and query like '%{sleep}'"
                );
                wait_until("it sleeps", PATIENCE * 4, async || {
                    text(direct, &seen).await == "1"
                })
                .await;
            }
            // With an answer on its way that nobody reads, and a message cut in two.
            10 => {
                let mut bytes = query("select repeat('x', 100000) from generate_series(1, 200)");
                bytes.extend_from_slice(&query("select 'cut'")[..7]);
                raw.send(&bytes).await;
            }
            // In the middle of COPY, or of a request of several messages.
            _ => {
                if self.chance.one_in(2) {
                    raw.query("rollback").await;
                    raw.send(&query("copy dirty from stdin")).await;
                    raw.send(&copy_data(b"1\n2\n")).await;
                } else {
                    let bytes = [
                        parse("dirt", "select 1"),
                        describe_statement("dirt"),
                        flush(),
                    ];
                    raw.send(&bytes.concat()).await;
                }
            }
        }
        Leave::Vanish
    }
}

/// What only a server can hold, and settings that every session has.
const HIDDEN: &[&str] = &["lock", "set", "listen", "temp", "cursor", "prepare", "role"];
/// What no view shows is kept from others, and lost to its maker when the server changes hands.
const UNSEEN: &str = "custom";

const HIDING: &str = "
    create function hidden_lock() returns void language sql as 'select pg_advisory_lock(77)';
    create function hidden_set() returns void language plpgsql as $$ begin set work_mem = '77MB'; end $$;
    create function hidden_listen() returns void language plpgsql as $$ begin listen hidden; end $$;
    create function hidden_temp() returns void language plpgsql as $$ begin create temp table hidden (n int); end $$;
    create function hidden_cursor() returns void language plpgsql as $$ begin execute 'declare hidden cursor with hold for select 1'; end $$;
    create function hidden_prepare() returns void language plpgsql as $$ begin execute 'prepare hidden as select 1'; end $$;
    create function hidden_role() returns void language plpgsql as $$ begin set role pg_monitor; end $$;
    create function hidden_custom() returns void language plpgsql as $$ begin perform set_config('my.dirt', 'hidden', false); end $$";

/// Rows of a session that are not in the virgin's. Whoever used plpgsql has loaded it.
fn news<'a>(found: &'a [String], wanted: &[String]) -> Vec<&'a String> {
    let is_new = |row: &&String| !wanted.contains(row) && !row.starts_with("plpgsql.");
    found.iter().filter(is_new).collect()
}

#[tokio::test]
async fn what_a_body_does_is_its_clients_alone_and_stays_with_it() {
    let db = fresh_database().await;
    let direct = db.connect().await;
    direct.batch_execute(HIDING).await.unwrap();
    let mut fresh = Raw::login_url(&db.primary_url, &[]).await;
    let (_, wanted) = session(&mut fresh).await;
    for hidden in HIDDEN.iter().copied().chain([UNSEEN]) {
        for how in [
            "select hidden_@()",
            "do $$ begin perform hidden_@(); end $$",
            "begin; select 1; select public.hidden_@(); commit",
        ] {
            let how = how.replace('@', hidden);
            let proxy = Proxy::with_pool(&db, 2).await;
            let mut one = proxy.raw().await;
            let said = one.query(&how).await;
            assert!(
                said.ends_with("Z I") && !said.starts_with('E'),
                "{how}: {said}"
            );
            // Others have the other server, or this one.
            let mut two = proxy.raw().await;
            let mut three = proxy.raw().await;
            for _ in 0..3 {
                for other in [&mut two, &mut three] {
                    let (_, found) = session(other).await;
                    assert!(
                        news(&found, &wanted).is_empty(),
                        "{how}: {:?}",
                        news(&found, &wanted)
                    );
                }
                let (_, found) = session(&mut one).await;
                let kept = news(&found, &wanted);
                assert!(
                    hidden == UNSEEN || !kept.is_empty(),
                    "{how}: lost to its maker"
                );
            }
            one.send(&terminate()).await;
            one.until_end().await;
            // Both servers.
            two.query("begin").await;
            for other in [&mut three, &mut two] {
                let (_, found) = session(other).await;
                let mut new = news(&found, &wanted);
                new.retain(|row| !row.starts_with("transaction: "));
                assert!(new.is_empty(), "{how}: {new:?}");
            }
            proxy.shut_down().await;
        }
    }
}

/// The question is for what is not known: nothing of Postgres' or pgflow's own.
#[tokio::test]
async fn only_what_is_not_known_is_asked_about() {
    let db = fresh_database().await;
    let direct = db.connect().await;
    direct
        .batch_execute("create table looked_at (n int); create function mine() returns int language sql as 'select 1'")
        .await
        .unwrap();
    let proxy = Proxy::with_pool(&db, 1).await;
    let mut raw = proxy.raw().await;
    let asked = || proxy.metric("flowgate_probes_total");
    for known in [
        "select count(*), lower('A'), now() from looked_at as l (n) where n in (1, 2)",
        "insert into looked_at (n) values (1), (coalesce(2, 3))",
        "insert into public.\"looked_at\" (\"n\") select n from looked_at",
        "select pgmq.create('q')",
        "select pgflow.create_flow('f', 1, 1, 1)",
        "create table other (n numeric(10, 2) default (abs(1)))",
        "with x (a) as (select 1), y as (select 2) select * from x, y",
    ] {
        let said = raw.query(known).await;
        assert!(!said.starts_with('E'), "{known}: {said}");
        assert_eq!(asked(), 0, "{known}");
    }
    for (unknown, times) in [
        ("select mine()", 1),
        ("select public.mine()", 2),
        ("select \"mine\"() from looked_at", 3),
        ("begin; select mine(); select mine(); commit", 4),
        ("do $$ begin end $$", 5),
        ("insert into looked_at (n) values (mine())", 6),
    ] {
        let said = raw.query(unknown).await;
        assert!(!said.starts_with('E'), "{unknown}: {said}");
        raw.query("select 1").await;
        assert_eq!(asked(), times, "{unknown}");
    }
    let bytes = [
        parse("", "select mine()"),
        bind_text("", "", &[]),
        execute("", 0),
        sync(),
    ];
    raw.ask(&bytes.concat()).await;
    raw.query("select 1").await;
    assert_eq!(asked(), 7);
    assert_eq!(
        proxy.metric("flowgate_pins_total{reason=\"function_body\"}"),
        0
    );
    proxy.shut_down().await;
}
