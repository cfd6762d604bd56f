//! Workflow reads go to the replica when it is fresh enough for their session; writes never do, however they are spelled.

use std::time::Duration;

use crate::events::{define_flow, finish_run};
use crate::support::pg::{TestDb, fresh_database, replica_catches_up};
use crate::support::proxy::{PATIENCE, Proxy, text};
use crate::support::raw::{
    Frame, bind, bind_text, close_statement, describe_portal, describe_statement, execute,
    extended, first_columns, flush, parse, query, sync, tags, transcript,
};
use crate::support::wait::wait_until;

#[tokio::test]
async fn a_runs_state_is_read_from_the_replica_when_it_is_fresh() {
    let db = fresh_database().await;
    let proxy = ready(&db).await;
    let client = proxy.connect().await;
    let run = start(&client).await;
    finish_run(&db.connect().await, "greet", run).await;
    let reads = [
        format!("select pgflow.get_run_with_states('{run}')->'run'->>'flow_slug'"),
        format!("select pgflow.get_run_with_states('{run}'::uuid)"),
        format!("select * from pgflow.get_run_with_states('{run}') as state"),
        format!("select status from pgflow.runs where run_id = '{run}'"),
        format!(
            "select s.status from pgflow.step_states s join pgflow.runs r using (run_id) where r.run_id = '{run}' order by 1 limit 1"
        ),
        "select count(*) from pgflow.step_tasks".to_owned(),
    ];
    for read in &reads {
        replica_catches_up().await;
        // Fresh enough is what a sample says; the sampler may need a moment.
        wait_until(read, PATIENCE, async || {
            let before = proxy.requests("replica");
            let answer = text(&client, read).await;
            let direct = text(&db.connect().await, read).await;
            assert_eq!(answer, direct, "{read}");
            proxy.requests("replica") > before
        })
        .await;
    }
    // Prepared and by message, too.
    let statement = client
        .prepare("select pgflow.get_run_with_states($1)")
        .await
        .unwrap();
    wait_until("a prepared read", PATIENCE, async || {
        let before = proxy.requests("replica");
        client.query_one(&statement, &[&run]).await.unwrap();
        proxy.requests("replica") > before
    })
    .await;
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_prepared_read_of_a_table_that_has_changed_is_refused_on_the_replica_too() {
    let db = fresh_database().await;
    let proxy = ready(&db).await;
    let mut client = proxy.raw().await;
    let prepare = [parse("r", "select * from pgflow.runs"), sync()].concat();
    let read = [
        bind_text("", "r", &[]),
        describe_portal(""),
        execute("", 0),
        sync(),
    ]
    .concat();
    client.query("begin").await;
    client.ask(&prepare).await;
    client.query("commit").await;
    let answer = client.ask(&read).await;
    // It was prepared on the primary, and is brought to the replica.
    wait_until("the replica answers", PATIENCE, async || {
        let before = proxy.requests("replica");
        assert_eq!(client.ask(&read).await, answer);
        proxy.requests("replica") > before
    })
    .await;
    assert_eq!(
        proxy.metric("flowgate_reads_kept_total{why=\"refused\"}"),
        0
    );
    db.connect()
        .await
        .batch_execute("alter table pgflow.runs add column extra int")
        .await
        .unwrap();
    replica_catches_up().await;
    let refused = "E ERROR|0A000|cached plan must not change result type\nZ I";
    wait_until("the replica was asked", PATIENCE, async || {
        assert_eq!(client.ask(&read).await, refused);
        proxy.metric("flowgate_reads_kept_total{why=\"refused\"}") > 0
    })
    .await;
    client.ask(&[close_statement("r"), prepare].concat()).await;
    let answer = client.ask(&read).await;
    assert!(answer.contains("extra"), "{answer}");
    wait_until("the new one is read on the replica", PATIENCE, async || {
        let before = proxy.requests("replica");
        assert_eq!(client.ask(&read).await, answer);
        proxy.requests("replica") > before
    })
    .await;
    proxy.shut_down().await;
}

#[tokio::test]
async fn in_a_transaction_everything_stays_where_it_is() {
    let db = fresh_database().await;
    let proxy = ready(&db).await;
    let client = proxy.connect().await;
    let run = start(&client).await;
    replica_catches_up().await;
    client.batch_execute("begin").await.unwrap();
    let before = proxy.requests("replica");
    for _ in 0..50 {
        text(
            &client,
            &format!("select pgflow.get_run_with_states('{run}')"),
        )
        .await;
    }
    assert_eq!(proxy.requests("replica"), before);
    client.batch_execute("commit").await.unwrap();
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_write_however_spelled_lands_on_the_primary() {
    let db = fresh_database().await;
    let proxy = ready(&db).await;
    let client = proxy.connect().await;
    client
        .batch_execute(
            "create table public.log (n int);
             create function public.mine(slug text) returns uuid language sql as $$ select run_id from pgflow.start_flow(slug, '{}') $$;
             create function public.harmless(slug text) returns uuid language sql stable as $$ select run_id from pgflow.runs limit 1 $$;
             create function pgflow.sneaky(slug text) returns uuid language sql as $$ select run_id from pgflow.start_flow(slug, '{}') $$;
             create view public.innocent as select (pgflow.start_flow('greet', '{}')).run_id",
        )
        .await
        .unwrap();
    let mut runs: i64 = 0;
    let writes = [
        "select pgflow.start_flow('greet', '{}')",
        "SELECT run_id FROM pgflow.start_flow('greet', '{}'::jsonb)",
        "select * from \"pgflow\".\"start_flow\"('greet', '{}')",
        "select (pgflow.start_flow('greet', '{}')).*",
        "select (pgflow.start_flow('greet', '{}')).run_id, count(*) over () from pgflow.runs limit 1",
        "with started as (select * from pgflow.start_flow('greet', '{}')) select * from started",
        "with n as (insert into public.log values (1) returning n) select r.* from n, pgflow.start_flow('greet', '{}') r",
        "do $$ begin perform pgflow.start_flow('greet', '{}'); end $$",
        "select public.mine('greet')",
        "select pgflow.sneaky('greet')",
        "set search_path = pgflow, public; select start_flow('greet', '{}')",
        "reset search_path; select * from public.innocent",
        "select 1; select pgflow.start_flow('greet', '{}')",
        "/* pgflow.get_run_with_states */ select pgflow.start_flow('greet', '{}')",
        "select pgflow.get_run_with_states(run_id) from pgflow.start_flow('greet', '{}')",
        "select status from pgflow.runs where run_id = (select run_id from pgflow.start_flow('greet', '{}')) union all select 'x'",
        "explain analyze select pgflow.start_flow('greet', '{}')",
        "create temp table t on commit drop as select pgflow.start_flow('greet', '{}')",
        "values ((select run_id from pgflow.start_flow('greet', '{}')))",
        "table public.innocent",
        "select exists (select 1 from lateral (select pgflow.start_flow('greet', '{}')) x)",
    ];
    let direct = db.connect().await;
    for write in writes {
        client
            .batch_execute(write)
            .await
            .unwrap_or_else(|error| panic!("{write}: {error:?}"));
        runs += 1;
        assert_eq!(
            text(&direct, "select count(*) from pgflow.runs").await,
            runs.to_string(),
            "{write}"
        );
        assert_eq!(
            text(&client, "select count(*) from pgflow.runs").await,
            runs.to_string(),
            "{write}: read after"
        );
    }
    client.batch_execute("reset all").await.unwrap();
    // By message and prepared.
    let mut raw = proxy.raw().await;
    for write in writes
        .iter()
        .filter(|write| !write.contains("; ") || write.starts_with("do"))
    {
        raw.send(&extended(write, &[])).await;
        let frames = raw.until_ready().await;
        assert!(
            frames.iter().all(|frame| frame.tag != b'E'),
            "{write}: {frames:?}"
        );
        runs += 1;
        assert_eq!(
            text(&direct, "select count(*) from pgflow.runs").await,
            runs.to_string(),
            "{write}: by message"
        );
    }
    let prepared = client
        .prepare("select run_id from pgflow.start_flow($1, $2)")
        .await
        .unwrap();
    client
        .query_one(&prepared, &[&"greet", &serde_json::json!({})])
        .await
        .unwrap();
    runs += 1;
    assert_eq!(
        text(&client, "select count(*) from pgflow.runs").await,
        runs.to_string()
    );
    // A lock is no read.
    for lock in [
        "select * from pgflow.runs for update",
        "select * from pgflow.runs for no key update skip locked",
        "select * from pgflow.runs for share",
    ] {
        client.batch_execute(lock).await.unwrap();
    }
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_refusal_of_the_replica_never_reaches_the_client() {
    let db = fresh_database().await;
    let proxy = Proxy::start(&db, |config| {
        config.route.reads = flowgate::config::Reads::All
    })
    .await;
    let client = proxy.connect().await;
    // A function that says it reads, and writes: no classifier can know.
    client
        .batch_execute(
            "create table public.log (n int);
             create function public.liar() returns int language plpgsql volatile as $$ begin insert into public.log values (1); return 7; end $$;
             create view public.innocent as select public.liar() as n",
        )
        .await
        .unwrap();
    let direct = db.connect().await;
    let mut written = 0;
    let mut raw = proxy.raw().await;
    let refused = || proxy.metric("flowgate_reads_kept_total{why=\"refused\"}");
    wait_until("the replica was asked", PATIENCE, async || {
        assert_eq!(text(&client, "select n from public.innocent").await, "7");
        written += 1;
        refused() > 0
    })
    .await;
    // From then on it is known for what it is.
    let refusals = refused();
    for _ in 0..5 {
        replica_catches_up().await;
        assert_eq!(text(&client, "select n from public.innocent").await, "7");
        raw.send(&extended("select n from public.innocent", &[]))
            .await;
        let frames = raw.until_ready().await;
        assert_eq!(first_columns(&frames), ["7"], "{frames:?}");
        assert!(frames.iter().all(|frame| frame.tag != b'E'), "{frames:?}");
        written += 2;
        assert_eq!(
            text(&direct, "select count(*) from public.log").await,
            written.to_string()
        );
    }
    assert_eq!(refused(), refusals);
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_comment_sends_a_read_to_the_primary_or_to_a_replica() {
    let db = fresh_database().await;
    let proxy = ready(&db).await;
    let client = proxy.connect().await;
    let notes = "create table public.notes (n int); insert into public.notes values (7)";
    client.batch_execute(notes).await.unwrap();
    let sent = async |sql: &str| {
        let before = proxy.requests("replica");
        let answer = text(&client, sql).await;
        (answer, proxy.requests("replica") > before)
    };
    let hinted = "/* flowgate: replica */ select n from public.notes";
    wait_until("a table of one's own", PATIENCE, async || {
        let (answer, replica) = sent(hinted).await;
        assert_eq!(answer, "7");
        replica
    })
    .await;
    for _ in 0..20 {
        let own = sent("select n from public.notes").await;
        assert_eq!(own, ("7".to_owned(), false));
        let kept = sent("select count(*) from pgflow.flows /* flowgate: primary */").await;
        assert_eq!(kept, ("1".to_owned(), false));
        let write = sent("/* flowgate: replica */ insert into public.notes values (8) returning n");
        assert_eq!(write.await, ("8".to_owned(), false));
    }
    proxy.shut_down().await;
}

#[tokio::test]
async fn where_a_statement_would_go_is_explained_and_nothing_is_done() {
    let db = fresh_database().await;
    let proxy = ready(&db).await;
    let client = proxy.connect().await;
    let explain = async |sql: &str| {
        let rows = client
            .simple_query(&format!("explain (flowgate) {sql}"))
            .await;
        let rows = rows.unwrap();
        let lines = rows.iter().filter_map(|message| match message {
            tokio_postgres::SimpleQueryMessage::Row(row) => {
                assert_eq!(row.columns()[0].name(), "QUERY PLAN");
                Some(row.get(0).unwrap().to_owned())
            }
            _ => None,
        });
        lines.collect::<Vec<String>>().join("; ")
    };
    let run = "67e55044-10b1-426f-9247-bb680e5fe0c8";
    let read = format!("select pgflow.get_run_with_states('{run}')");
    wait_until("the replica is fresh", PATIENCE, async || {
        let said = explain(&read).await;
        assert!(
            said.starts_with(&format!("Statement: a read of run {run}; Goes to: ")),
            "{said}"
        );
        assert!(
            said.ends_with("Shared: with those who ask the same at the same time"),
            "{said}"
        );
        said.contains("Goes to: replica-1, which is fresh enough; Fresh enough: has all")
    })
    .await;
    for (sql, expected) in [
        (
            "select pgflow.start_flow('greet', '{}')",
            "Statement: a start of a run; Goes to: primary, as it is not known to be a read",
        ),
        (
            "select * from mine",
            "Statement: not pgflow's, or not understood; Goes to: primary, as it is not known to be a read",
        ),
        (
            "select * from pgflow.read_with_poll('greet', 1, 1)",
            "Statement: a poll for work; Goes to: flowgate, until its queue may have something; then the primary",
        ),
        (
            "listen a",
            "Statement: not pgflow's, or not understood; Goes to: flowgate, which listens for its clients",
        ),
        (
            "/* flowgate: primary */ table pgflow.flows",
            "Statement: not pgflow's, or not understood; Goes to: primary, as it is not known to be a read",
        ),
    ] {
        assert_eq!(explain(sql).await, expected, "{sql}");
    }
    assert_eq!(
        text(&db.connect().await, "select count(*) from pgflow.runs").await,
        "0"
    );
    // Prepared, and inside a transaction.
    client.batch_execute("begin").await.unwrap();
    let statement = client
        .prepare("EXPLAIN (flowgate) table pgflow.flows")
        .await
        .unwrap();
    for _ in 0..2 {
        let rows = client.query(&statement, &[]).await.unwrap();
        let second: String = rows[1].get("QUERY PLAN");
        assert_eq!(second, "Goes to: the server of the transaction under way");
    }
    client.batch_execute("commit").await.unwrap();
    let rows = client.query(&statement, &[]).await.unwrap();
    assert_eq!(rows[0].get::<_, String>(0), "Statement: a read of no run");
    // As postgres.js asks: the statement is described before it is bound.
    let mut raw = proxy.raw().await;
    let statement = "explain (flowgate) table pgflow.flows";
    for name in ["", "named"] {
        let part = [parse(name, statement), describe_statement(name), flush()];
        raw.send(&part.concat()).await;
        assert_eq!(tags(&raw.until(b'T').await), "1tT", "{name}");
        let rest = [bind("", name, &[]), execute("", 0), sync()];
        let answer = raw.ask_frames(&rest.concat()).await;
        assert_eq!(tags(&answer), "2DDDDCZ", "{}", transcript(&answer));
        assert_eq!(first_columns(&answer)[0], "Statement: a read of no run");
    }
    // What Postgres is asked to explain, it explains; what it does not know, it refuses.
    let plan = text(&client, "explain select 'flowgate'").await;
    assert!(plan.starts_with("Result"), "{plan}");
    let both = client
        .simple_query("explain (flowgate) select 1; select 2")
        .await;
    assert_eq!(crate::support::proxy::sqlstate(both), "42601");
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_session_always_sees_its_own_writes_and_never_goes_back() {
    let db = fresh_database().await;
    let proxy = ready(&db).await;
    let clients = (0..4).map(async |_| {
        let client = proxy.connect().await;
        let reader = proxy.connect().await;
        let mut highest = 0;
        for _ in 0..50 {
            let run = start(&client).await;
            let state = format!("select pgflow.get_run_with_states('{run}')->'run'->>'status'");
            assert_eq!(text(&client, &state).await, "started");
            // Per run it holds across clients of one proxy.
            assert_eq!(text(&reader, &state).await, "started");
            let count: i64 = text(&client, "select count(*) from pgflow.runs")
                .await
                .parse()
                .unwrap();
            assert!(count > highest, "{count} runs, and {highest} before");
            highest = count;
        }
    });
    futures_util::future::join_all(clients).await;
    proxy.shut_down().await;
}

#[tokio::test]
async fn reads_off_sends_nothing_to_the_replica() {
    let db = fresh_database().await;
    let proxy = Proxy::start(&db, |config| {
        config.route.reads = flowgate::config::Reads::Off
    })
    .await;
    define_flow(&db, "greet").await;
    let client = proxy.connect().await;
    let run = start(&client).await;
    replica_catches_up().await;
    for _ in 0..20 {
        text(
            &client,
            &format!("select pgflow.get_run_with_states('{run}')"),
        )
        .await;
    }
    assert_eq!(proxy.requests("replica"), 0);
    proxy.shut_down().await;
}

async fn ready(db: &TestDb) -> Proxy {
    define_flow(db, "greet").await;
    replica_catches_up().await;
    Proxy::start(db, |config| {
        config.route.replica_wait = Duration::from_millis(20)
    })
    .await
}

#[tokio::test]
async fn an_unknown_flow_is_refused_in_words_and_nothing_is_left_of_it() {
    let db = fresh_database().await;
    let proxy = Proxy::start(&db, |_| {}).await;
    let client = proxy.connect().await;
    let refused = client
        .query_one("select pgflow.start_flow('no_such_flow', '{}')", &[])
        .await
        .unwrap_err();
    let refused = refused.as_db_error().unwrap();
    assert_eq!(
        (refused.code().code(), refused.constraint()),
        ("23503", Some("runs_flow_slug_fkey")),
        "{refused}"
    );
    assert_eq!(text(&client, "select count(*) from pgflow.runs").await, "0");
    proxy.shut_down().await;
}

async fn start(client: &tokio_postgres::Client) -> uuid::Uuid {
    text(
        client,
        "select run_id from pgflow.start_flow('greet', '{}')",
    )
    .await
    .parse()
    .unwrap()
}

#[tokio::test]
async fn a_session_that_asks_is_told_where_each_request_goes_and_gets_the_same_answers() {
    let db = fresh_database().await;
    let proxy = ready(&db).await;
    let explained = [("flowgate.explain", "on")];
    let mut client = proxy.raw_with(&explained).await;
    let told = |frames: &[Frame]| -> Vec<String> {
        let notices = frames.iter().filter(|frame| frame.tag == b'N');
        notices.map(|frame| frame.field(b'M').unwrap()).collect()
    };
    let primary = "Goes to: primary, as it is not known to be a read";
    let held = "Goes to: the server of the transaction under way";
    for (sql, expected, is) in [
        ("select 1", "NTDCZ", primary),
        ("begin", "NCZ", primary),
        ("table pgflow.flows", "NTDCZ", held),
        ("copy (select 1) to stdout", "NHdcCZ", held),
        ("commit", "NCZ", held),
        (
            "listen a",
            "NCZ",
            "Goes to: flowgate, which listens for its clients",
        ),
    ] {
        let answer = client.ask_frames(&query(sql)).await;
        assert_eq!(tags(&answer), expected, "{sql}: {}", transcript(&answer));
        let told = told(&answer);
        assert!(told[0].ends_with(is), "{sql}: {told:?}");
    }
    assert_eq!(tags(&client.ask_frames(&query("unlisten *")).await), "NCZ");
    // The first of its kind finds out what there is; the other waits here.
    for _ in 0..2 {
        let poll = "select * from pgflow.read_with_poll('greet', 1, 1, 1, 50)";
        let answer = client.ask_frames(&query(poll)).await;
        assert_eq!(tags(&answer), "NTCZ", "{}", transcript(&answer));
        assert_eq!(
            told(&answer),
            [
                "Statement: a poll for work; Goes to: flowgate, until its queue may have something; then the primary"
            ]
        );
    }
    wait_until("the replica is fresh", PATIENCE, async || {
        let answer = client.ask_frames(&query("table pgflow.flows")).await;
        assert!(tags(&answer).ends_with("TDCZ"), "{}", transcript(&answer));
        told(&answer) == ["Statement: a read of no run; Goes to: replica-1, which is fresh enough"]
    })
    .await;
    // A pipeline: a notice each, before its own answer.
    let write = "select pgflow.start_flow('greet', '{}')";
    let pipeline = [
        extended(write, &[]),
        extended("select 1 / 0", &[]),
        query("select 2"),
    ];
    client.send(&pipeline.concat()).await;
    for expected in ["N12TDCZ", "N1EZ", "NTDCZ"] {
        let answer = client.until_ready().await;
        let answer: Vec<_> = answer
            .into_iter()
            .filter(|frame| frame.tag != b'n')
            .collect();
        assert_eq!(tags(&answer), expected, "{}", transcript(&answer));
    }
    // Parse, Describe, Flush; and what follows is of the same request.
    let part = [parse("", "select 3"), describe_statement(""), flush()];
    client.send(&part.concat()).await;
    assert_eq!(tags(&client.until(b'T').await), "N1tT");
    let rest = [bind("", "", &[]), execute("", 0), sync()];
    let answer = client.ask_frames(&rest.concat()).await;
    assert_eq!(tags(&answer), "2DCZ", "{}", transcript(&answer));
    // Off, and on again by SQL.
    let off = client
        .ask_frames(&query("set flowgate.explain = off"))
        .await;
    assert_eq!(tags(&off), "NCZ");
    let answer = client.ask_frames(&query("select 1")).await;
    assert_eq!(tags(&answer), "TDCZ");
    client
        .ask_frames(&query("set flowgate.explain to 'on'"))
        .await;
    let answer = client.ask_frames(&query("select 1")).await;
    assert_eq!(tags(&answer), "NTDCZ");
    // It asks for nothing of others' answers.
    let mut plain = proxy.raw().await;
    let answer = plain.ask_frames(&query("table pgflow.flows")).await;
    assert_eq!(tags(&answer), "TDCZ", "{}", transcript(&answer));
    proxy.shut_down().await;
}
