//! Workflow reads go to the replica when it is fresh enough for their session; writes never do, however they are spelled.

use std::time::Duration;

use crate::events::{define_flow, finish_run};
use crate::support::pg::{TestDb, fresh_database, replica_catches_up};
use crate::support::proxy::{PATIENCE, Proxy, text};
use crate::support::raw::{
    bind_text, close_statement, describe_portal, execute, extended, first_columns, parse, sync,
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
