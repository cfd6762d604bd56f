//! Installing the SQL: once, twice, ten at a time, over damage, beside a pgflow of somebody else's, and taking it out.

use flowgate::schema::{
    self, Check, Component, InstallOptions, Outcome, PgflowApi, PgmqOutcome, Removal, SchemaError,
    State, check, install, uninstall,
};

use crate::support::pg::{TestDb, empty_database, fresh_database, replica_catches_up};
use crate::support::proxy::connect_hearing;

const DEFAULT: InstallOptions = InstallOptions {
    pgflow: None,
    events_only: false,
    direct_notify: false,
};

#[tokio::test]
async fn the_first_install_brings_everything_and_the_second_does_nothing() {
    let db = empty_database().await;
    let version = |component: Component| component.version(PgflowApi::V0_7);
    let [flowgate, pgflow] = [Component::Flowgate, Component::Pgflow].map(version);

    let before = check(&db.url()).await.unwrap();
    assert!(!before.is_up_to_date());
    assert_eq!(
        state(&before, Component::Pgflow),
        &State::Absent {
            wanted: pgflow.clone()
        }
    );

    let first = install(&db.url(), DEFAULT).await.unwrap();
    assert_ne!(first.pgmq, PgmqOutcome::AlreadyThere);
    let installed = [
        (
            Component::Flowgate,
            Outcome::Installed {
                version: flowgate.clone(),
            },
        ),
        (
            Component::Pgflow,
            Outcome::Installed {
                version: pgflow.clone(),
            },
        ),
    ];
    assert_eq!(first.components, installed);
    assert!(check(&db.url()).await.unwrap().is_up_to_date());

    let stamp =
        "select string_agg(installed_at::text, ',' order by component) from flowgate.installed";
    let stamped = text(&db, stamp).await;
    let second = install(&db.url(), DEFAULT).await.unwrap();
    assert_eq!(second.pgmq, PgmqOutcome::AlreadyThere);
    let up_to_date = [
        (Component::Flowgate, Outcome::UpToDate { version: flowgate }),
        (Component::Pgflow, Outcome::UpToDate { version: pgflow }),
    ];
    assert_eq!(second.components, up_to_date);
    assert_eq!(text(&db, stamp).await, stamped);
}

#[tokio::test]
async fn every_file_can_be_applied_again() {
    let db = fresh_database().await;
    let client = db.connect().await;
    client
        .batch_execute("update flowgate.installed set version = '0.0.1+older'")
        .await
        .unwrap();
    let found = check(&db.url()).await.unwrap();
    let wanted = Component::Pgflow.version(PgflowApi::V0_7);
    assert_eq!(
        state(&found, Component::Pgflow),
        &State::Other {
            installed: "0.0.1+older".to_owned(),
            wanted
        }
    );

    let report = install(&db.url(), DEFAULT).await.unwrap();
    for (component, outcome) in report.components {
        let version = component.version(PgflowApi::V0_7);
        assert_eq!(
            outcome,
            Outcome::Upgraded {
                from: "0.0.1+older".to_owned(),
                version
            }
        );
    }
    assert!(check(&db.url()).await.unwrap().is_up_to_date());
}

#[tokio::test]
async fn ten_installs_at_once_take_turns() {
    let db = empty_database().await;
    let installs: Vec<_> = (0..10)
        .map(|_| {
            let url = db.url();
            tokio::spawn(async move { install(&url, DEFAULT).await })
        })
        .collect();
    let mut did_it = 0;
    for install in installs {
        let report = install.await.unwrap().unwrap();
        did_it += usize::from(
            report
                .components
                .iter()
                .all(|(_, o)| matches!(o, Outcome::Installed { .. })),
        );
    }
    assert_eq!(did_it, 1);
    assert!(check(&db.url()).await.unwrap().is_up_to_date());
}

#[tokio::test]
async fn damage_is_named_and_repaired() {
    let db = fresh_database().await;
    let client = db.connect().await;
    client
        .batch_execute("drop function pgflow.calculate_retry_delay")
        .await
        .unwrap();
    client
        .batch_execute("create or replace function pgflow.is_valid_slug(slug text) returns boolean language sql as 'select true'")
        .await
        .unwrap();
    let damaged = check(&db.url()).await.unwrap();
    assert!(!damaged.is_up_to_date());
    let State::Damaged {
        missing, changed, ..
    } = state(&damaged, Component::Pgflow)
    else {
        panic!("{damaged:?}")
    };
    assert!(
        matches!(missing.as_slice(), [name] if name.starts_with("function pgflow.calculate_retry_delay(")),
        "{missing:?}"
    );
    assert_eq!(changed, &["function pgflow.is_valid_slug(text)"]);

    let report = install(&db.url(), DEFAULT).await.unwrap();
    assert!(matches!(
        &report.components[0],
        (Component::Flowgate, Outcome::UpToDate { .. })
    ));
    assert!(
        matches!(&report.components[1], (Component::Pgflow, Outcome::Repaired { objects, .. }) if objects.len() == 2)
    );
    assert!(check(&db.url()).await.unwrap().is_up_to_date());
}

#[tokio::test]
async fn what_was_uninstalled_is_gone_and_can_come_back() {
    let db = fresh_database().await;
    assert_eq!(
        uninstall(&db.url()).await.unwrap(),
        Removal {
            foreign_pgflow: false
        }
    );
    let left = "select coalesce(string_agg(nspname, ' ' order by nspname), '') from pg_namespace
        where nspname in ('pgflow', 'flowgate', 'realtime', 'pgmq')";
    assert_eq!(text(&db, left).await, "pgmq");
    // Nothing there: nothing to do, and no error.
    uninstall(&db.url()).await.unwrap();
    let again = install(&db.url(), DEFAULT).await.unwrap();
    assert!(
        again
            .components
            .iter()
            .all(|(_, outcome)| matches!(outcome, Outcome::Installed { .. }))
    );
    assert!(check(&db.url()).await.unwrap().is_up_to_date());
}

#[tokio::test]
async fn a_pgflow_of_somebody_elses_is_left_alone() {
    let db = empty_database().await;
    let client = db.connect().await;
    let theirs = "create schema pgflow; create table pgflow.flows (theirs int); insert into pgflow.flows values (1)";
    client.batch_execute(theirs).await.unwrap();

    let report = install(&db.url(), DEFAULT).await.unwrap();
    assert_eq!(
        report.components[1],
        (Component::Pgflow, Outcome::LeftAlone)
    );
    let found = check(&db.url()).await.unwrap();
    assert_eq!(state(&found, Component::Pgflow), &State::Foreign);
    assert!(found.is_up_to_date());
    let objects = "select count(*)::text from pg_class where relnamespace = 'pgflow'::regnamespace";
    assert_eq!(text(&db, objects).await, "1");

    assert_eq!(
        uninstall(&db.url()).await.unwrap(),
        Removal {
            foreign_pgflow: true
        }
    );
    assert_eq!(
        text(&db, "select theirs::text from pgflow.flows").await,
        "1"
    );
    assert_eq!(
        text(&db, "select (to_regnamespace('flowgate') is null)::text").await,
        "true"
    );
}

const EVENTS_ONLY: InstallOptions = InstallOptions {
    pgflow: None,
    events_only: true,
    direct_notify: false,
};

/// A `realtime.send` as those who are not on Supabase write it, for one role.
const STUB: &str = "create schema pgflow; create table pgflow.flows (theirs int); create schema realtime; \
    create table realtime.sent (topic text, payload jsonb); \
    create function realtime.send(payload jsonb, event text, topic text, private boolean default true) returns void \
    language sql as $$ insert into realtime.sent values (topic, payload); select pg_notify(topic, payload::text) $$; \
    revoke all on function realtime.send(jsonb, text, text, boolean) from public";

#[tokio::test]
async fn a_send_of_somebody_elses_gives_way_where_that_is_asked_for_and_comes_back() {
    let db = empty_database().await;
    let client = db.connect().await;
    client.batch_execute(STUB).await.unwrap();
    let role = format!("sender_{}", db.name);
    client
        .batch_execute(&format!(
            "create role {role}; grant usage on schema realtime to {role}; \
             grant execute on function realtime.send(jsonb, text, text, boolean) to {role}; \
             grant insert on realtime.sent to {role}"
        ))
        .await
        .unwrap();
    let state = "select string_agg(concat_ws('|', pg_get_functiondef(oid), proowner::regrole, proacl), '') from pg_proc \
                 where pronamespace = 'realtime'::regnamespace";
    let before = text(&db, state).await;

    let refused = install(&db.url(), DEFAULT).await.unwrap_err().to_string();
    assert!(
        refused.contains("not flowgate's") && refused.contains("--events-only"),
        "{refused}"
    );
    assert_eq!(text(&db, state).await, before);
    for _ in 0..2 {
        let report = install(&db.url(), EVENTS_ONLY).await.unwrap();
        assert_eq!(report.pgmq, PgmqOutcome::NotAskedFor);
        assert_eq!(report.components.len(), 1);
    }
    assert!(
        schema::check_for(&db.url(), EVENTS_ONLY)
            .await
            .unwrap()
            .is_up_to_date()
    );
    // An upgrade goes on with it.
    install(&db.url(), DEFAULT).await.unwrap();
    let send = format!(
        "set role {role}; select realtime.send('{{\"n\": 1}}', 'e', 'pgflow:run:r', false); reset role"
    );
    client.batch_execute(&send).await.unwrap();
    assert_eq!(
        text(
            &db,
            "select string_agg(topic || seq, '') from flowgate.event"
        )
        .await,
        "pgflow:run:r1"
    );

    uninstall(&db.url()).await.unwrap();
    assert_eq!(text(&db, state).await, before);
    client.batch_execute(&send).await.unwrap();
    assert_eq!(
        text(&db, "select string_agg(topic, '') from realtime.sent").await,
        "pgflow:run:r"
    );
    client
        .batch_execute(&format!("drop owned by {role}; drop role {role}"))
        .await
        .unwrap();
}

#[tokio::test]
async fn supabases_own_send_is_left_alone() {
    let db = empty_database().await;
    let client = db.connect().await;
    client.batch_execute(STUB).await.unwrap();
    client
        .batch_execute("create table realtime.subscription (id int)")
        .await
        .unwrap();
    for options in [DEFAULT, EVENTS_ONLY] {
        let refused = install(&db.url(), options).await.unwrap_err().to_string();
        assert!(refused.contains("Supabase"), "{refused}");
    }
    assert_eq!(
        text(&db, "select (to_regnamespace('flowgate') is null)::text").await,
        "true"
    );
}

#[tokio::test]
async fn those_who_listen_to_postgres_itself_hear_events_where_that_is_asked_for() {
    let db = empty_database().await;
    let options = InstallOptions {
        direct_notify: true,
        ..EVENTS_ONLY
    };
    let (client, mut hearing) = connect_hearing(&db.primary_url).await;
    client.batch_execute(STUB).await.unwrap();
    install(&db.url(), options).await.unwrap();
    client
        .batch_execute("listen \"pgflow:run:r\"")
        .await
        .unwrap();
    let send = async |payload: &str, topic: &str| {
        let sql = format!("select realtime.send({payload}, 'e', '{topic}', false)");
        client.batch_execute(&sql).await.unwrap();
    };
    send("'{\"n\": 1}'", "pgflow:run:r").await;
    assert_eq!(hearing.notification().await.payload(), "{\"n\": 1}");
    // What NOTIFY refuses fails nobody.
    send("'{}'", &"t".repeat(64)).await;
    send("'{}'", "").await;
    let big = "jsonb_build_object('run_id', 'r', 'event_type', 'run:completed', 'output', repeat('x', 10000))";
    send(big, "pgflow:run:r").await;
    let told: serde_json::Value =
        serde_json::from_str(hearing.notification().await.payload()).unwrap();
    let wanted =
        serde_json::json!({"run_id": "r", "event_type": "run:completed", "truncated": true});
    assert_eq!(told, wanted);
    // In partitions made later as well, and only as long as it is on.
    client
        .batch_execute("select flowgate.ensure_partitions(30)")
        .await
        .unwrap();
    assert_eq!(
        text(&db, "select flowgate.set_direct_notify(false)::text").await,
        "false"
    );
    assert!(
        schema::check_for(&db.url(), EVENTS_ONLY)
            .await
            .unwrap()
            .is_up_to_date()
    );
    send("'{}'", "pgflow:run:r").await;
    assert_eq!(
        text(&db, "select flowgate.set_direct_notify(true)::text").await,
        "true"
    );
    send("'{\"n\": 2}'", "pgflow:run:r").await;
    assert_eq!(hearing.notification().await.payload(), "{\"n\": 2}");
    assert_eq!(
        text(&db, "select count(*)::text from flowgate.event").await,
        "6"
    );
}

#[tokio::test]
async fn the_printed_sql_installs_the_same() {
    let db = fresh_database().await;
    uninstall(&db.url()).await.unwrap();
    let mut printed = Vec::new();
    schema::print(&mut printed, DEFAULT).unwrap();
    db.connect()
        .await
        .batch_execute(std::str::from_utf8(&printed).unwrap())
        .await
        .unwrap();
    assert!(check(&db.url()).await.unwrap().is_up_to_date());
}

#[tokio::test]
async fn a_newer_install_is_not_overwritten() {
    let db = fresh_database().await;
    let newer = "update flowgate.installed set version = '999.0.0+new' where component = 'pgflow'";
    db.connect().await.batch_execute(newer).await.unwrap();
    assert!(matches!(
        install(&db.url(), DEFAULT).await,
        Err(SchemaError::Newer { .. })
    ));
}

#[tokio::test]
async fn half_a_pgmq_is_an_error_that_names_the_other_half() {
    let db = empty_database().await;
    let half =
        "create schema pgmq; create function pgmq.create(text) returns void language sql as ''";
    db.connect().await.batch_execute(half).await.unwrap();
    let error = install(&db.url(), DEFAULT).await.unwrap_err().to_string();
    assert!(
        error.contains("send_batch") && error.contains("not all of it"),
        "{error}"
    );
}

#[tokio::test]
async fn a_failing_file_is_named_with_line_and_sqlstate_and_nothing_stays() {
    let db = empty_database().await;
    // A view where a table is to be: `create table if not exists` passes over it, what follows cannot.
    db.connect()
        .await
        .batch_execute("create schema flowgate; create view flowgate.event as select 1 as one")
        .await
        .unwrap();
    let error = install(&db.url(), DEFAULT).await.unwrap_err();
    let error = error.to_string();
    assert!(
        error.starts_with("sql/0025_table_event.sql: ") && error.ends_with("(SQLSTATE 42703)"),
        "{error}"
    );
    assert_eq!(
        text(&db, "select (to_regnamespace('pgflow') is null)::text").await,
        "true"
    );
    assert_eq!(
        text(
            &db,
            "select (to_regclass('flowgate.installed') is null)::text"
        )
        .await,
        "true"
    );
}

#[tokio::test]
async fn a_replica_and_a_dead_port_are_refused_in_words() {
    let db = fresh_database().await;
    let replica = db.replica_url.parse().unwrap();
    assert!(matches!(
        install(&replica, DEFAULT).await,
        Err(SchemaError::Replica { .. })
    ));
    assert!(
        check(&replica).await.unwrap().is_up_to_date(),
        "looking is fine there"
    );
    let nobody = "postgres://postgres@127.0.0.1:1/postgres".parse().unwrap();
    let error = install(&nobody, DEFAULT).await.unwrap_err().to_string();
    assert!(
        error.contains("cannot connect to postgres://postgres@127.0.0.1:1/postgres: "),
        "{error}"
    );
}

#[tokio::test]
async fn a_run_of_one_step_completes_on_what_was_installed() {
    let db = fresh_database().await;
    let client = db.connect().await;
    let define = "select pgflow.create_flow('f'); select pgflow.add_step('f', 's'); select pgflow.start_flow('f', '{}')";
    client.batch_execute(define).await.unwrap();
    assert_eq!(text(&db, "select status from pgflow.runs").await, "started");
    assert_eq!(text(&db, "select count(*)::text from pgmq.q_f").await, "1");
    let events = "select string_agg(distinct payload ->> 'event_type', ' ') from flowgate.event";
    assert!(text(&db, events).await.contains("run:started"));
    replica_catches_up().await;
    let on_replica =
        "select current_database()::text, pg_is_in_recovery(), count(*) from pgflow.runs";
    let row = db
        .connect_replica()
        .await
        .query_one(on_replica, &[])
        .await
        .unwrap();
    assert_eq!(
        (row.get(0), row.get(1), row.get(2)),
        (db.name.as_str(), true, 1_i64)
    );
}

fn state(check: &Check, wanted: Component) -> &State {
    let found = check
        .components
        .iter()
        .find(|(component, _)| *component == wanted);
    found
        .map(|(_, state)| state)
        .expect("every component is reported")
}

async fn text(db: &TestDb, sql: &str) -> String {
    db.connect()
        .await
        .query_one(sql, &[])
        .await
        .expect(sql)
        .get(0)
}
