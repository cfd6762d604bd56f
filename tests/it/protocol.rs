//! The protocol where scripts do not reach: large messages, vanishing clients, cancellation, statements shared by clients
//! and servers. Message by message equality is `transcripts.rs`'s.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt, pin_mut};
use tokio::time::{Instant, timeout};
use tokio_postgres::Client;

use crate::support::pg::fresh_database;
use crate::support::proxy::{PATIENCE, Proxy, connect, row, sqlstate, text};
use crate::support::raw::{
    self, Raw, bind, bind_text, copy_data, describe_statement, error_code, execute, extended,
    first_columns, flush, parse, query, sync, tags, transcript,
};
use crate::support::wait::wait_until;

#[tokio::test]
async fn a_driver_does_a_days_work() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let mut client = proxy.connect().await;
    client
        .batch_execute("create table work (n int primary key, x text)")
        .await
        .unwrap();
    let insert = client
        .prepare("insert into work values ($1, $2)")
        .await
        .unwrap();
    // Pipelined: all under way at once.
    let inserts = (0..100).map(|n| {
        let (client, insert) = (&client, &insert);
        async move { client.execute(insert, &[&n, &format!("row {n}")]).await }
    });
    for inserted in futures_util::future::join_all(inserts).await {
        assert_eq!(inserted.unwrap(), 1);
    }
    let transaction = client.transaction().await.unwrap();
    transaction
        .execute("delete from work where n >= 50", &[])
        .await
        .unwrap();
    let portal = transaction
        .bind("select n from work order by n", &[])
        .await
        .unwrap();
    let mut seen = Vec::new();
    loop {
        let rows = transaction.query_portal(&portal, 7).await.unwrap();
        if rows.is_empty() {
            break;
        }
        seen.extend(rows.iter().map(|row| row.get::<_, i32>(0)));
    }
    assert_eq!(seen, (0..50).collect::<Vec<_>>());
    transaction.rollback().await.unwrap();
    assert_eq!(text(&client, "select count(*) from work").await, "100");

    let sink = client.copy_in("copy work from stdin").await.unwrap();
    pin_mut!(sink);
    for n in 100..200 {
        sink.send(Bytes::from(format!("{n}\tcopied\n")))
            .await
            .unwrap();
    }
    assert_eq!(sink.finish().await.unwrap(), 100);
    let out = client
        .copy_out("copy (select n from work order by n) to stdout")
        .await
        .unwrap();
    let lines: Vec<_> = out.map(|chunk| chunk.unwrap()).collect().await;
    assert_eq!(
        lines.concat(),
        (0..200)
            .map(|n| format!("{n}\n"))
            .collect::<String>()
            .into_bytes()
    );

    let duplicate = client.execute(&insert, &[&1, &"again"]).await;
    assert_eq!(sqlstate(duplicate), "23505");
    assert_eq!(text(&client, "select 'still here'").await, "still here");
    proxy.shut_down().await;
}

#[tokio::test]
async fn one_row_larger_than_any_buffer_arrives_whole() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let client = proxy.connect().await;
    let row = client
        .query_one("select repeat('y', 30000000) as big, 'end'", &[])
        .await
        .unwrap();
    assert_eq!(
        (row.get::<_, &str>(0).len(), row.get::<_, &str>(1)),
        (30_000_000, "end")
    );
    let big = text(&client, "select repeat('z', 30000000)").await;
    assert!(big.len() == 30_000_000 && big.bytes().all(|byte| byte == b'z'));
    proxy.shut_down().await;
}

#[tokio::test]
async fn large_parameters_and_texts_pass() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 4).await;
    let client = proxy.connect().await;
    let other = proxy.connect().await;
    let measure = client
        .prepare("select length($1::text), md5($1::text)")
        .await
        .unwrap();
    for megabytes in [1, 2, 20] {
        let big = "p".repeat(megabytes * 1_000_000 + megabytes);
        let wanted = text(&other, &format!("select md5(repeat('p', {}))", big.len())).await;
        let row = client.query_one(&measure, &[&big]).await.unwrap();
        let length = usize::try_from(row.get::<_, i32>(0)).unwrap();
        assert_eq!((length, row.get::<_, String>(1)), (big.len(), wanted));
    }
    let comment = "c".repeat(5_000_000);
    assert_eq!(
        text(&client, &format!("select 7 /* {comment} */")).await,
        "7"
    );
    assert_eq!(
        text(&client, &format!("select length('{comment}')")).await,
        "5000000"
    );
    // By Parse, unnamed and named; the named one, too large to be sent again, ties its client to the server.
    let mut raw = proxy.raw().await;
    let sql = format!("select 8 /* {comment} */");
    assert_eq!(
        raw.ask(&extended(&sql, &[])).await,
        "1\n2\nT ?column?:23/0\nD 8\nC SELECT 1\nZ I"
    );
    assert_eq!(
        raw.ask(&[parse("big", &sql), sync()].concat()).await,
        "1\nZ I"
    );
    text(&other, "select 1").await;
    let again = [bind("", "big", &[]), execute("", 0), sync()].concat();
    assert_eq!(raw.ask(&again).await, "2\nD 8\nC SELECT 1\nZ I");
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_large_transfer_both_ways_at_once_does_not_lock_up() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let raw = proxy.raw().await;
    // Each answer is as large as its question, and none is read before all are asked.
    let big = "e".repeat(3_000_000);
    let batch = [
        parse("", "select $1::text"),
        bind_text("", "", &[&big]),
        execute("", 0),
    ]
    .concat();
    let pipeline = [batch.repeat(5), sync()].concat();
    let Raw { stream, .. } = raw;
    let (mut reading, mut writing) = stream.into_split();
    let write = async {
        tokio::io::AsyncWriteExt::write_all(&mut writing, &pipeline)
            .await
            .unwrap()
    };
    let read = async {
        let (mut total, mut chunk) = (0, vec![0; 64 * 1024]);
        while total < 5 * 3_000_000 {
            total += tokio::io::AsyncReadExt::read(&mut reading, &mut chunk)
                .await
                .unwrap();
        }
    };
    timeout(PATIENCE, futures_util::future::join(write, read))
        .await
        .expect("no deadlock");
    proxy.shut_down().await;
}

#[tokio::test]
async fn an_error_in_a_copy_is_told_though_data_keeps_coming() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let mut raw = proxy.raw().await;
    raw.query("create table target (n int)").await;
    raw.send(&query("copy target from stdin")).await;
    assert_eq!(tags(&raw.until(b'G').await), "G");
    raw.send(&copy_data(b"not a number\n")).await;
    let good = copy_data(&b"1\n".repeat(10_000));
    for _ in 0..100 {
        raw.send(&good).await;
    }
    raw.send(&raw::copy_done()).await;
    let frames = raw.until_ready().await;
    assert_eq!(
        (tags(&frames).as_str(), error_code(&frames).as_deref()),
        ("EZ", Some("22P02"))
    );
    assert_eq!(
        first_columns_of(&mut raw, "select count(*) from target").await,
        ["0"]
    );
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_large_copy_passes_both_ways() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let client = proxy.connect().await;
    client
        .batch_execute("create table big (x text)")
        .await
        .unwrap();
    let sink = client.copy_in("copy big from stdin").await.unwrap();
    pin_mut!(sink);
    let line = Bytes::from([vec![b'l'; 1_999_999], b"\n".to_vec()].concat());
    for _ in 0..20 {
        sink.send(line.clone()).await.unwrap();
    }
    assert_eq!(sink.finish().await.unwrap(), 20);
    let out = client.copy_out("copy big to stdout").await.unwrap();
    let sizes: Vec<_> = out.map(|chunk| chunk.unwrap().len()).collect().await;
    assert_eq!(sizes.iter().sum::<usize>(), 40_000_000);
    proxy.shut_down().await;
}

// ---- statements ----

#[tokio::test]
async fn statements_follow_their_clients_from_server_to_server() {
    let db = fresh_database().await;
    for pool in [1, 2] {
        let proxy = Proxy::with_pool(&db, pool).await;
        let clients: Vec<Client> = {
            let clients = (0..6).map(async |_| proxy.connect().await);
            futures_util::future::join_all(clients).await
        };
        let work = clients.iter().enumerate().map(async |(me, client)| {
            let me = i32::try_from(me).unwrap();
            // Half of the texts are shared by all, half are each client's own.
            let shared = client.prepare("select $1::int4 + 1").await.unwrap();
            let own = client
                .prepare(&format!("select $1::int4 + {me}"))
                .await
                .unwrap();
            for n in 0..100 {
                let row = client.query_one(&shared, &[&n]).await.unwrap();
                assert_eq!(row.get::<_, i32>(0), n + 1);
                let row = client.query_one(&own, &[&n]).await.unwrap();
                assert_eq!(row.get::<_, i32>(0), n + me);
            }
        });
        timeout(PATIENCE, futures_util::future::join_all(work))
            .await
            .unwrap();
        proxy.shut_down().await;
    }
}

#[tokio::test]
async fn one_name_is_each_clients_own() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let (mut a, mut b) = (proxy.raw().await, proxy.raw().await);
    a.ask(&[parse("s", "select 'a'"), sync()].concat()).await;
    b.ask(&[parse("s", "select 'b'"), sync()].concat()).await;
    let run = [bind("", "s", &[]), execute("", 0), sync()].concat();
    for _ in 0..3 {
        assert_eq!(a.ask(&run).await, "2\nD a\nC SELECT 1\nZ I");
        assert_eq!(b.ask(&run).await, "2\nD b\nC SELECT 1\nZ I");
    }
    // A third one has no such statement, whatever the server knows.
    let mut c = proxy.raw().await;
    let unknown = "E ERROR|26000|prepared statement \"s\" does not exist\nZ I";
    assert_eq!(c.ask(&run).await, unknown);
    // Nor can it reach the server's own names, or another's unnamed statement.
    for number in 0..3 {
        let theirs = format!("flowgate_{number}");
        let answer = c
            .ask(&[bind("", &theirs, &[]), execute("", 0), sync()].concat())
            .await;
        assert!(answer.starts_with("E ERROR|26000|"), "{answer}");
        let answer = c.ask(&[describe_statement(&theirs), sync()].concat()).await;
        assert!(answer.starts_with("E ERROR|26000|"), "{answer}");
    }
    a.ask(&[parse("", "select 'unnamed a'"), sync()].concat())
        .await;
    let answer = c
        .ask(&[bind("", "", &[]), execute("", 0), sync()].concat())
        .await;
    assert_eq!(
        answer,
        "E ERROR|26000|unnamed prepared statement does not exist\nZ I"
    );
    let answer = a
        .ask(&[bind("", "", &[]), execute("", 0), sync()].concat())
        .await;
    assert_eq!(answer, "2\nD unnamed a\nC SELECT 1\nZ I");
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_new_parse_sees_the_table_as_it_is_now() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let (client, other) = (proxy.connect().await, proxy.connect().await);
    client
        .batch_execute("create table shape (a int); insert into shape values (1)")
        .await
        .unwrap();
    assert_eq!(
        client
            .query_one("select * from shape", &[])
            .await
            .unwrap()
            .len(),
        1
    );
    other
        .batch_execute("alter table shape add b text")
        .await
        .unwrap();
    assert_eq!(
        client
            .query_one("select * from shape", &[])
            .await
            .unwrap()
            .len(),
        2
    );
    assert_eq!(
        other
            .query_one("select * from shape", &[])
            .await
            .unwrap()
            .len(),
        2
    );
    proxy.shut_down().await;
}

#[tokio::test]
async fn many_statements_do_not_pile_up_unbounded_and_all_work() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let client = proxy.connect().await;
    let mut statements = Vec::new();
    for n in 0..1_500 {
        statements.push(client.prepare(&format!("select {n}")).await.unwrap());
    }
    for n in (0..1_500).step_by(97) {
        assert_eq!(
            client
                .query_one(&statements[n], &[])
                .await
                .unwrap()
                .get::<_, i32>(0),
            i32::try_from(n).unwrap()
        );
    }
    let console = proxy.console().await;
    let server = row(&console, "SHOW SERVERS", "database", &db.name).await;
    let known: i64 = server["prepared_statements"].parse().unwrap();
    assert!(known < 1_500, "the server keeps {known} statements");
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_bind_that_does_not_fit_is_refused_by_postgres() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let mut raw = proxy.raw().await;
    raw.ask(&[parse("p", "select $1::int, $2::int"), sync()].concat())
        .await;
    raw.send(&[bind_text("", "p", &["1"]), execute("", 0), sync()].concat())
        .await;
    let frames = raw.until_ready().await;
    assert_eq!(
        (tags(&frames).as_str(), error_code(&frames).as_deref()),
        ("EZ", Some("08P01"))
    );
    let words = format!("{frames:?}");
    assert!(
        !words.contains("flowgate_"),
        "the client's name, not the server's: {words}"
    );
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_flush_keeps_the_server_until_the_sync() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let mut raw = proxy.raw().await;
    raw.send(&[parse("", "select $1::int"), describe_statement(""), flush()].concat())
        .await;
    assert_eq!(tags(&raw.until(b'T').await), "1tT");
    let mut other = proxy.raw().await;
    let waiting = tokio::spawn(async move { first_columns_of(&mut other, "select 'other'").await });
    raw.send(&[bind_text("", "", &["5"]), execute("", 0), sync()].concat())
        .await;
    assert_eq!(
        transcript(&raw.until_ready().await),
        "2\nD 5\nC SELECT 1\nZ I"
    );
    assert_eq!(
        timeout(PATIENCE, waiting).await.unwrap().unwrap(),
        ["other"]
    );
    proxy.shut_down().await;
}

// ---- cancelling ----

#[tokio::test]
async fn a_running_query_is_cancelled() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 2).await;
    let mut raw = proxy.raw().await;
    raw.send(&query("select pg_sleep(60)")).await;
    let direct = db.connect().await;
    running(&direct, "select pg_sleep(60)", 1).await;
    raw.cancel().await;
    let frames = raw.until_ready().await;
    assert_eq!(
        error_code(&frames).as_deref(),
        Some("57014"),
        "{}",
        transcript(&frames)
    );
    assert_eq!(
        raw.query("select 1").await,
        "T ?column?:23/0\nD 1\nC SELECT 1\nZ I"
    );

    // And as a driver does it.
    let client = proxy.connect().await;
    let token = client.cancel_token();
    let asleep =
        tokio::spawn(async move { client.simple_query("select pg_sleep(61)").await.map(drop) });
    running(&direct, "select pg_sleep(61)", 1).await;
    token.cancel_query(tokio_postgres::NoTls).await.unwrap();
    assert_eq!(
        sqlstate(timeout(PATIENCE, asleep).await.unwrap().unwrap()),
        "57014"
    );
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_cancel_sent_right_behind_its_query_finds_it() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let (mut one, mut other) = (proxy.raw().await, proxy.raw().await);
    // Their settings differ, so that the server has to be made to fit before each query.
    other.query("set work_mem = '5MB'").await;
    for round in 0..100 {
        for raw in [&mut one, &mut other] {
            let in_transaction = round % 4 == 3;
            if in_transaction {
                raw.query("begin").await;
            }
            raw.send(&query("select pg_sleep(600)")).await;
            raw.cancel().await;
            let frames = raw.until_ready().await;
            let code = error_code(&frames);
            assert_eq!(code.as_deref(), Some("57014"), "in round {round}");
            if in_transaction {
                assert_eq!(raw.query("rollback").await, "C ROLLBACK\nZ I");
            }
        }
    }
    assert_eq!(first_columns_of(&mut other, "show work_mem").await, ["5MB"]);
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_request_queued_for_a_server_is_cancelled() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let (mut holder, mut queued) = (proxy.raw().await, proxy.raw().await);
    holder.query("begin").await;
    queued.send(&query("select 'never'")).await;
    wait_until("it queues", PATIENCE, async || {
        proxy.metric("flowgate_checkout_waits_total") > 0
    })
    .await;
    queued.cancel().await;
    let frames = queued.until_ready().await;
    assert_eq!(
        (tags(&frames).as_str(), error_code(&frames).as_deref()),
        ("EZ", Some("57014"))
    );
    assert_eq!(holder.query("commit").await, "C COMMIT\nZ I");
    assert_eq!(first_columns_of(&mut queued, "select 'now'").await, ["now"]);
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_cancel_with_a_wrong_key_does_nothing() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 2).await;
    let (mut raw, other) = (proxy.raw().await, proxy.raw().await);
    raw.send(&query("select pg_sleep(1.0), 'slept'")).await;
    let direct = db.connect().await;
    running(&direct, "select pg_sleep(1.0), 'slept'", 1).await;
    for at in 0..raw.key.len() {
        let mut key = raw.key.clone();
        key[at] ^= 1;
        raw::cancel(proxy.port, &key).await;
    }
    raw::cancel(proxy.port, &other.key).await;
    raw::cancel(proxy.port, &[0; 8]).await;
    raw::cancel(proxy.port, &[7; 260]).await;
    let frames = raw.until_ready().await;
    assert_eq!(tags(&frames), "TDCZ", "{}", transcript(&frames));
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_late_cancel_never_hits_the_next_client() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let mut first = proxy.raw().await;
    let second = proxy.connect().await;
    for round in 0..100 {
        // The cancel races with the end of the query; who has the server next must not feel it.
        first.send(&query("select 1")).await;
        let (port, key) = (proxy.port, first.key.clone());
        let cancel = tokio::spawn(async move { raw::cancel(port, &key).await });
        first.until_ready().await;
        let next = text(&second, &format!("select {round} from pg_sleep(0.005)")).await;
        assert_eq!(next, round.to_string());
        timeout(PATIENCE, cancel).await.unwrap().unwrap();
        assert_eq!(text(&second, "select 'fine'").await, "fine");
    }
    proxy.shut_down().await;
}

// ---- leaving ----

#[tokio::test]
async fn a_half_closed_client_gets_its_answer() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let mut raw = proxy.raw().await;
    raw.send(&query("select 'late' from pg_sleep(0.5)")).await;
    raw.half_close().await;
    let frames = raw.until_end().await;
    assert_eq!(first_columns(&frames), ["late"], "{}", transcript(&frames));
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_vanished_clients_query_is_cancelled() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let direct = db.connect().await;
    let mut raw = proxy.raw().await;
    raw.send(&query("select pg_sleep(600)")).await;
    running(&direct, "select pg_sleep(600)", 1).await;
    drop(raw);
    running(&direct, "select pg_sleep(600)", 0).await;
    assert_eq!(text(&proxy.connect().await, "select 'next'").await, "next");
    proxy.shut_down().await;
}

/// However soon: Postgres ignores a cancel that comes before it has read the query.
#[tokio::test]
async fn clients_that_vanish_at_once_leave_nothing_running() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 3).await;
    for _ in 0..30 {
        let mut raw = proxy.raw().await;
        raw.send(&query("select pg_sleep(600)")).await;
    }
    let direct = db.connect().await;
    let running = format!(
        "select count(*) from pg_stat_activity where datname = '{}' and state = 'active' and query like 'select pg_sleep%'",
        db.name
    );
    wait_until("all that was sent has been begun", PATIENCE, async || {
        proxy.metric("flowgate_servers_abandoned_total") >= 30
    })
    .await;
    wait_until("nothing is left running", PATIENCE, async || {
        text(&direct, &running).await == "0"
    })
    .await;
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_vanished_clients_transaction_is_rolled_back() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let direct = db.connect().await;
    direct
        .batch_execute("create table left_open (n int)")
        .await
        .unwrap();
    for polite in [true, false] {
        let mut raw = proxy.raw().await;
        raw.query("begin; insert into left_open values (1); select pg_advisory_xact_lock(77)")
            .await;
        if polite {
            raw.send(&raw::terminate()).await;
        }
        drop(raw);
        let next = proxy.connect().await;
        assert_eq!(text(&next, "select count(*) from left_open").await, "0");
        assert_eq!(
            text(&next, "select pg_try_advisory_xact_lock(77)").await,
            "t"
        );
        assert_eq!(text(&next, "select count(*) from left_open").await, "0");
    }
    let open = "select count(*)::text from pg_stat_activity where datname = current_database() and state like 'idle in%'";
    wait_until("no transaction stays open", PATIENCE, async || {
        text(&direct, open).await == "0"
    })
    .await;
    proxy.shut_down().await;
}

#[tokio::test]
async fn clients_that_vanish_anywhere_leave_the_pool_whole() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 2).await;
    proxy.raw().await.query("create table dump (n int)").await;
    let session = [
        query("begin"),
        extended("select generate_series(1, 100)", &[]),
        query("copy dump from stdin"),
        copy_data(b"1\n"),
        raw::copy_done(),
        query("set work_mem = '1MB'"),
        query("commit; select pg_sleep(0.01)"),
        extended("select $1::text", &["x"]),
    ]
    .concat();
    for cut in (0..session.len()).step_by(7) {
        let mut raw = proxy.raw().await;
        raw.send(&session[..cut]).await;
        drop(raw);
    }
    let client = proxy.connect().await;
    assert_eq!(
        text(&client, "show work_mem").await,
        text(&db.connect().await, "show work_mem").await
    );
    let both = [proxy.connect().await, proxy.connect().await];
    for client in &both {
        client.batch_execute("begin").await.unwrap();
    }
    for client in &both {
        client.batch_execute("commit").await.unwrap();
    }
    proxy.shut_down().await;
}

// ---- startup ----

#[tokio::test]
async fn a_newer_minor_version_is_negotiated_and_keys_are_as_long_as_it_says() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let parameters = [("user", proxy.user.as_str()), ("database", &proxy.database)];
    let mut old = Raw::connect(proxy.port).await;
    old.send(&raw::startup(raw::PROTOCOL_3_0, &parameters))
        .await;
    assert!(!tags(&old.until_ready().await).contains('v'));
    assert_eq!(old.key.len(), 8);

    let mut new = Raw::connect(proxy.port).await;
    new.send(&raw::startup(raw::PROTOCOL_3_2, &parameters))
        .await;
    assert!(!tags(&new.until_ready().await).contains('v'));
    assert_eq!(new.key.len(), 36);
    new.send(&query("select pg_sleep(62)")).await;
    running(&db.connect().await, "select pg_sleep(62)", 1).await;
    new.cancel().await;
    assert_eq!(
        error_code(&new.until_ready().await).as_deref(),
        Some("57014")
    );

    let mut newer = Raw::connect(proxy.port).await;
    let with_extension = [parameters[0], parameters[1], ("_pq_.wonder", "1")];
    newer
        .send(&raw::startup((3 << 16) | 99, &with_extension))
        .await;
    let frames = newer.until_ready().await;
    let negotiated = frames
        .iter()
        .find(|frame| frame.tag == b'v')
        .expect("NegotiateProtocolVersion");
    assert!(negotiated.body.ends_with(b"_pq_.wonder\0"));
    assert_eq!(frames.last().unwrap().tag, b'Z');
    proxy.shut_down().await;
}

#[tokio::test]
async fn encryption_not_offered_is_declined_and_the_login_goes_on() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let mut raw = Raw::connect(proxy.port).await;
    for request in [raw::GSSENC_REQUEST, raw::SSL_REQUEST] {
        raw.send(&raw::untagged(&request.to_be_bytes())).await;
        assert_eq!(raw.bytes(1).await, b"N");
    }
    let parameters = [("user", proxy.user.as_str()), ("database", &proxy.database)];
    raw.send(&raw::startup(raw::PROTOCOL_3_0, &parameters))
        .await;
    assert_eq!(raw.until_ready().await.last().unwrap().tag, b'Z');
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_database_that_is_not_there_is_refused_in_postgres_words() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let refusal = async |port: u16| {
        let mut raw = Raw::connect(port).await;
        raw.send(&raw::startup(
            raw::PROTOCOL_3_0,
            &[("user", "postgres"), ("database", "nowhere")],
        ))
        .await;
        transcript(
            &raw.until_end()
                .await
                .into_iter()
                .filter(|frame| frame.tag == b'E')
                .collect::<Vec<_>>(),
        )
    };
    let direct = refusal(db.url().port).await;
    assert!(direct.contains("3D000"), "{direct}");
    assert_eq!(refusal(proxy.port).await, direct);
    proxy.shut_down().await;
}

#[tokio::test]
async fn the_last_client_allowed_is_served_and_one_more_refused() {
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, |config| {
        config.pool.max_clients = 2.try_into().unwrap()
    })
    .await;
    let (first, second) = (proxy.connect().await, proxy.connect().await);
    let refused = crate::support::proxy::try_connect(&proxy.url()).await;
    assert_eq!(sqlstate(refused.map(drop)), "53300");
    assert_eq!(text(&first, "select 1").await, "1");
    drop(second);
    let deadline = Instant::now() + PATIENCE;
    while crate::support::proxy::try_connect(&proxy.url())
        .await
        .is_err()
    {
        assert!(
            Instant::now() < deadline,
            "the place of one who left is not given away"
        );
    }
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_shut_down_lets_transactions_end_and_says_why_to_the_rest() {
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, |config| {
        config.pool.size = 2.try_into().unwrap();
        config.listen.drain_timeout = Duration::from_secs(20);
    })
    .await;
    let (mut idle, mut busy) = (proxy.raw().await, proxy.raw().await);
    let direct_url = proxy.direct_url.clone();
    busy.query("create table drained (n int)").await;
    busy.query("begin; insert into drained values (1)").await;
    let going = tokio::spawn(proxy.shut_down());
    let frames = idle.until_end().await;
    assert_eq!(error_code(&frames).as_deref(), Some("57P01"));
    assert_eq!(
        busy.query("insert into drained values (2)").await,
        "C INSERT 0 1\nZ T"
    );
    assert!(busy.query("commit").await.starts_with("C COMMIT\nZ I"));
    assert_eq!(
        error_code(&busy.until_end().await).as_deref(),
        Some("57P01")
    );
    timeout(PATIENCE, going).await.unwrap().unwrap();
    assert_eq!(
        text(&connect(&direct_url).await, "select count(*) from drained").await,
        "2"
    );
}

async fn first_columns_of(raw: &mut Raw, sql: &str) -> Vec<String> {
    raw.send(&query(sql)).await;
    first_columns(&raw.until_ready().await)
}

/// Waits until that many backends of this database run exactly `sql`.
async fn running(direct: &Client, sql: &str, wanted: i64) {
    let count = "select count(*) from pg_stat_activity where datname = current_database() and state = 'active' and query = $1";
    wait_until(sql, PATIENCE, async || {
        direct
            .query_one(count, &[&sql])
            .await
            .unwrap()
            .get::<_, i64>(0)
            == wanted
    })
    .await;
}
