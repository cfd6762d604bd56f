//! `events.wake`: who is told that the outbox grew, and by what. Nothing here is found by the probe, which comes too late.

use std::time::Duration;

use flowgate::config::Wake;
use futures_util::future::join_all;
use serde_json::Value;
use tokio_postgres::Client;

use crate::support::pg::{TestDb, fresh_database};
use crate::support::proxy::{
    Hearing, PATIENCE, Proxy, connect_hearing, sqlstate, text, try_connect,
};
use crate::support::raw::{bind_text, copy_data, copy_done, execute, extended, function_call};
use crate::support::raw::{parse, query, sync, tags};
use crate::support::wait::wait_until;

const RUN: &str = "pgflow:run:67e55044-10b1-426f-9247-bb680e5fe0c8";
const HOUR: Duration = Duration::from_secs(3600);

/// Where a test's own code writes events from: `tell(n)`, a procedure, a trigger of `told`.
const CODE: &str = "
    create function tell(n int) returns void language plpgsql as $$
    begin perform realtime.send(jsonb_build_object('n', n), 'told', 'pgflow:run:67e55044-10b1-426f-9247-bb680e5fe0c8', false); end $$;
    create procedure tell_on(n int) language plpgsql as $$ begin perform tell(n); commit; end $$;
    create table told (n int);
    create function tell_of() returns trigger language plpgsql as $$ begin perform tell(new.n); return null; end $$;
    create trigger tell after insert on told for each row execute function tell_of();";

async fn observing(db: &TestDb) -> Proxy {
    Proxy::without_replica(db, |config| {
        config.events.wake = Wake::Observe;
        config.events.probe = HOUR;
        config.pool.size = 3.try_into().unwrap();
    })
    .await
}

/// Hears all events of runs.
async fn follower(proxy: &Proxy) -> (Client, Hearing) {
    let (client, hearing) = proxy.connect_hearing().await;
    client.batch_execute("listen pgflow_events").await.unwrap();
    (client, hearing)
}

async fn heard(hearing: &mut Hearing) -> i64 {
    let payload: Value = serde_json::from_str(hearing.notification().await.payload()).unwrap();
    payload["n"].as_i64().unwrap()
}

/// NOTIFYs of the outbox that Postgres itself sends to whoever listens.
struct Notified {
    client: Client,
    hearing: Hearing,
}

impl Notified {
    async fn listen(db: &TestDb) -> Self {
        let (client, hearing) = connect_hearing(&db.primary_url).await;
        client.batch_execute("listen flowgate_wake").await.unwrap();
        Self { client, hearing }
    }

    /// Those of transactions that were committed before this was asked.
    async fn count(&mut self) -> usize {
        let end = "select pg_notify('flowgate_wake', 'asked')";
        self.client.batch_execute(end).await.unwrap();
        let mut count = 0;
        while self.hearing.notification().await.payload() != "asked" {
            count += 1;
        }
        count
    }
}

#[tokio::test]
async fn what_passes_through_us_is_heard_without_a_notify() {
    let db = fresh_database().await;
    db.connect().await.batch_execute(CODE).await.unwrap();
    let proxy = observing(&db).await;
    let (_follower, mut hearing) = follower(&proxy).await;
    let mut notified = Notified::listen(&db).await;
    let mut client = proxy.raw().await;
    let oid = "select 'tell(int)'::regprocedure::oid::text";
    let oid: u32 = text(&db.connect().await, oid).await.parse().unwrap();
    let copied = [
        query("copy told from stdin"),
        copy_data(b"16\n"),
        copy_done(),
    ];
    let send = |n| format!("select realtime.send('{{\"n\": {n}}}', 'told', '{RUN}', false)");
    // What is sent, each as one write, and how many ReadyForQuery answer it.
    let ways = [
        (query(&send(1)), 1),
        (extended("select tell($1::int)", &["2"]), 1),
        (query(&format!("select 1; {}; select 2", send(3))), 1),
        (query("begin; select tell(4); commit"), 1),
        (
            [query("begin"), query("select tell(5)"), query("commit")].concat(),
            3,
        ),
        (
            [
                query("begin"),
                query("select tell(6)"),
                query("commit and chain"),
            ]
            .concat(),
            3,
        ),
        ([query("rollback"), query("select tell(7)")].concat(), 2),
        (query("do $$ begin perform tell(8); end $$"), 1),
        (query("call tell_on(9)"), 1),
        (query("insert into told values (10)"), 1),
        (
            [
                parse("", "insert into told values ($1::int)"),
                bind_text("", "", &["11"]),
                execute("", 0),
                sync(),
                extended("select tell($1::int)", &["12"]),
                query("begin"),
                extended("select tell($1::int)", &["13"]),
                query("commit"),
            ]
            .concat(),
            5,
        ),
        (query("prepare later as select tell(14)"), 1),
        (query("execute later"), 1),
        (function_call(oid, &["15"]), 1),
        (copied.concat(), 1),
        // What has begun since is not to be waited for.
        (
            [query("begin; select tell(17)"), query("commit; begin")].concat(),
            2,
        ),
        (query("rollback"), 1),
        (query("begin; select tell(18); commit; begin; select 1"), 1),
        (query("rollback"), 1),
        (
            [
                query("begin"),
                extended("select tell($1::int)", &["19"]),
                parse("", "commit"),
                bind_text("", "", &[]),
                execute("", 0),
                parse("", "begin"),
                bind_text("", "", &[]),
                execute("", 0),
                sync(),
            ]
            .concat(),
            3,
        ),
        (query("rollback"), 1),
        (
            query(&format!(
                "begin; select tell(20); prepare transaction '{}'",
                db.name
            )),
            1,
        ),
        (query(&format!("commit prepared '{}'", db.name)), 1),
    ];
    let mut next = 1;
    for (way, (bytes, answers)) in ways.iter().enumerate() {
        let expected = match way {
            10 => 3,
            11 | 16 | 18 | 20 | 21 => 0,
            _ => 1,
        };
        client.send(bytes).await;
        for _ in 0..*answers {
            let frames = client.until_ready().await;
            assert!(!tags(&frames).contains('E'), "{way}: {}", tags(&frames));
        }
        for _ in 0..expected {
            assert_eq!(heard(&mut hearing).await, next, "{way}");
            next += 1;
        }
    }
    assert_eq!(next, 21);
    assert!(proxy.metric("flowgate_event_observed_total") > 0);
    assert_eq!(proxy.metric("flowgate_event_wakeups_total"), 0);
    assert_eq!(notified.count().await, 0);
    proxy.shut_down().await;
}

#[tokio::test]
async fn what_tells_nothing_wakes_nobody() {
    let db = fresh_database().await;
    db.connect().await.batch_execute(CODE).await.unwrap();
    let proxy = observing(&db).await;
    let (_follower, mut hearing) = follower(&proxy).await;
    let client = proxy.connect().await;
    client.batch_execute("select tell(1)").await.unwrap();
    assert_eq!(heard(&mut hearing).await, 1);
    let looks = "flowgate_event_observed_total";
    wait_until("it was looked for", PATIENCE, async || {
        proxy.metric(looks) == 1
    })
    .await;

    for one in [
        "begin",
        "select tell(2)",
        "rollback",
        "set search_path = public",
        "reset search_path",
        "begin",
        "commit",
        "select pgflow.get_run_with_states('67e55044-10b1-426f-9247-bb680e5fe0c8')",
        "",
    ] {
        client.batch_execute(one).await.unwrap();
    }
    let failed = client.batch_execute("insert into told values ('x')").await;
    assert_eq!(sqlstate(failed), "22P02");
    client.batch_execute("begin").await.unwrap();
    let failed = client.batch_execute("select tell(2), 1/0").await;
    assert_eq!(sqlstate(failed), "22012");
    // A rollback by another name.
    client.batch_execute("commit").await.unwrap();

    client.batch_execute("select tell(3)").await.unwrap();
    assert_eq!(heard(&mut hearing).await, 3);
    wait_until("it was looked for", PATIENCE, async || {
        proxy.metric(looks) >= 2
    })
    .await;
    assert_eq!(proxy.metric(looks), 2);
    proxy.shut_down().await;
}

#[tokio::test]
async fn writers_that_bypass_us_and_followers_elsewhere_are_served_by_notify() {
    let db = fresh_database().await;
    let direct = db.connect().await;
    direct.batch_execute(CODE).await.unwrap();
    let (one, other) = (observing(&db).await, observing(&db).await);
    let (_first, mut here) = follower(&one).await;
    let mut notified = Notified::listen(&db).await;

    direct.batch_execute("select tell(1)").await.unwrap();
    assert_eq!(heard(&mut here).await, 1);
    assert_eq!(notified.count().await, 1, "by a writer that bypasses us");
    let client = one.connect().await;
    client.batch_execute("select tell(2)").await.unwrap();
    assert_eq!(heard(&mut here).await, 2);
    assert_eq!(notified.count().await, 0, "nobody else needs to know");

    let (second, mut there) = follower(&other).await;
    client.batch_execute("select tell(3)").await.unwrap();
    assert_eq!(heard(&mut here).await, 3);
    assert_eq!(heard(&mut there).await, 3);
    assert_eq!(notified.count().await, 1, "the other one needs to");
    // One that nobody follows through carries, too.
    drop(_first);
    client.batch_execute("select tell(4)").await.unwrap();
    assert_eq!(heard(&mut there).await, 4);
    let through = other.connect().await;
    through.batch_execute("select tell(5)").await.unwrap();
    assert_eq!(heard(&mut there).await, 5);
    drop(second);
    one.shut_down().await;
    other.shut_down().await;
    let readers = "select count(*)::text from flowgate.reader";
    assert_eq!(text(&direct, readers).await, "0");
}

#[tokio::test]
async fn no_reset_and_no_other_client_takes_from_a_server_who_observes_it() {
    let db = fresh_database().await;
    db.connect().await.batch_execute(CODE).await.unwrap();
    let proxy = Proxy::without_replica(&db, |config| {
        config.events.probe = HOUR;
        config.pool.size = 1.try_into().unwrap();
    })
    .await;
    let (_follower, mut hearing) = follower(&proxy).await;
    let mut notified = Notified::listen(&db).await;
    let shown = "show flowgate.wake";
    let client = proxy.connect().await;
    let mark = text(&client, shown).await;
    assert_eq!(mark.len(), 36, "{mark}");
    let readers = "select string_agg(reader_id::text, ',') from flowgate.reader";
    assert_eq!(text(&client, readers).await, mark);
    for change in [
        "reset all",
        "discard all",
        "set flowgate.wake = 'notify'; reset flowgate.wake",
    ] {
        client.batch_execute(change).await.unwrap();
        assert_eq!(text(&client, shown).await, mark, "{change}");
    }
    for undone in ["begin", "set flowgate.wake = 'notify'", "rollback"] {
        client.batch_execute(undone).await.unwrap();
    }
    assert_eq!(text(&client, shown).await, mark);
    // Who wants to be told of by Postgres is; the next client on that server is not.
    client
        .batch_execute("set flowgate.wake = 'notify'")
        .await
        .unwrap();
    client.batch_execute("select tell(1)").await.unwrap();
    assert_eq!(heard(&mut hearing).await, 1);
    assert_eq!(notified.count().await, 1);
    let next = proxy.connect().await;
    assert_eq!(text(&next, shown).await, mark);
    next.batch_execute("select tell(2)").await.unwrap();
    assert_eq!(heard(&mut hearing).await, 2);
    assert_eq!(notified.count().await, 0);
    proxy.shut_down().await;

    let proxy = Proxy::without_replica(&db, |config| config.events.wake = Wake::Notify).await;
    let client = proxy.connect().await;
    let shown = "select coalesce(current_setting('flowgate.wake', true), 'unset')";
    assert_eq!(text(&client, shown).await, "unset");
    proxy.shut_down().await;
}

#[tokio::test]
async fn no_event_waits_for_the_probe_however_many_write_here_and_there() {
    const WRITERS: i64 = 12;
    const EVENTS: i64 = 150;
    const LAP: i64 = 50;
    let db = fresh_database().await;
    let (one, other) = (observing(&db).await, observing(&db).await);
    let (_first, mut here) = follower(&one).await;
    let (_second, mut there) = follower(&other).await;
    let writers = (0..WRITERS).map(async |writer| {
        let client = match writer % 3 {
            0 => one.connect().await,
            1 => other.connect().await,
            _ => db.connect().await,
        };
        let send = format!(
            "select realtime.send(jsonb_build_object('n', $1::int8), 'told', 'pgflow:run:67e55044-10b1-426f-9247-{writer:012}', false)"
        );
        let send = client.prepare(&send).await.unwrap();
        (client, send)
    });
    let writers = join_all(writers).await;
    let direct = db.connect().await;
    let asleep = "select (count(*) = 2 and bool_and(asleep))::text from flowgate.reader";
    let write = async || {
        for lap in 0..EVENTS / LAP {
            join_all(writers.iter().map(async |(client, send)| {
                for n in lap * LAP + 1..=(lap + 1) * LAP {
                    client.execute(send, &[&n]).await.unwrap();
                }
            }))
            .await;
            wait_until("the readers are asleep again", PATIENCE, async || {
                text(&direct, asleep).await == "true"
            })
            .await;
        }
    };
    let hear = async |hearing: &mut Hearing| {
        let mut next = [1; WRITERS as usize];
        for _ in 0..WRITERS * EVENTS {
            let told = hearing.notification().await;
            let payload: Value = serde_json::from_str(told.payload()).unwrap();
            // The envelope names no topic: every writer's events count up, so together they are this many of each.
            let n = usize::try_from(payload["n"].as_i64().unwrap()).unwrap();
            assert_eq!(payload["seq"], payload["n"]);
            let writer = next.iter().position(|&next| next == n);
            next[writer.unwrap_or_else(|| panic!("{n} of {next:?}"))] += 1;
        }
        next
    };
    let (heard_here, heard_there, _) = tokio::join!(hear(&mut here), hear(&mut there), write());
    let all = [EVENTS as usize + 1; WRITERS as usize];
    assert_eq!((heard_here, heard_there), (all, all));
    one.shut_down().await;
    other.shut_down().await;
}

/// Two pools deep: PgBouncer refuses a startup parameter that it does not know, and so all that it would be sent of our own.
#[tokio::test]
async fn a_pooler_in_between_that_takes_no_setting_of_ours_is_logged_in_to_without() {
    let Some(program) = ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer"]
        .into_iter()
        .find(|path| std::path::Path::new(path).exists())
    else {
        println!("no pgbouncer here: not tried");
        return;
    };
    let db = fresh_database().await;
    db.connect().await.batch_execute(CODE).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .and_then(|socket| socket.local_addr())
        .unwrap()
        .port();
    let log = folder.path().join("log");
    let url = db.url();
    let wanted = format!(
        "[databases]\n* = host=127.0.0.1 port={} user={}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n\
         unix_socket_dir =\nauth_type = any\npool_mode = session\ndefault_pool_size = 50\nlogfile = {}\n",
        url.port,
        url.user,
        log.display()
    );
    let file = folder.path().join("ini");
    std::fs::write(&file, wanted).unwrap();
    std::fs::write(&log, "").unwrap();
    for path in [folder.path(), &file, &log] {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(path, mode).unwrap();
    }
    let mut command = tokio::process::Command::new(program);
    let me = std::fs::metadata("/proc/self").map(|me| std::os::unix::fs::MetadataExt::uid(&me));
    if me.is_ok_and(|me| me == 0) {
        command.args(["-u", "nobody"]);
    }
    let mut pgbouncer = command
        .args(["-q".as_ref(), file.as_os_str()])
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let between = format!("postgres://{}@127.0.0.1:{port}/{}", url.user, db.name);
    wait_until("pgbouncer answers", PATIENCE, async || {
        try_connect(&between).await.is_ok()
    })
    .await;
    let proxy = Proxy::before(&between, &[], |config| {
        config.events.wake = Wake::Observe;
        config.events.probe = HOUR;
    })
    .await;
    let (_follower, mut hearing) = follower(&proxy).await;
    let client = proxy.connect().await;
    let shown = "select coalesce(current_setting('flowgate.wake', true), 'unset')";
    assert_eq!(text(&client, shown).await, "unset");
    // So Postgres is to tell of what passes here, and does.
    for n in 1..=3 {
        let tell = format!("select tell({n})");
        client.batch_execute(&tell).await.unwrap();
        assert_eq!(heard(&mut hearing).await, n);
    }
    let said = std::fs::read_to_string(&log).unwrap();
    assert!(
        said.contains("unsupported startup parameter: flowgate.wake"),
        "{said}"
    );
    proxy.shut_down().await;
    pgbouncer.kill().await.unwrap();
}
