//! The two API levels in one database: which is installed, kept, raised and never lowered; and what an upgrade does to runs
//! that are in flight.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use flowgate::pgflow::functions::{Class, FUNCTIONS};
use flowgate::schema::{
    self, Component, InstallOptions, Outcome, PgflowApi, SchemaError, State, check, check_for,
    install, uninstall,
};
use tokio::task::JoinSet;

use super::{Core, WORKER, at_0_14, lines, refused, run, show, try_show};
use crate::support::pg::{TestDb, empty_database, fresh_database_at};
use crate::support::wait::wait_until;

const KEEP: InstallOptions = InstallOptions {
    pgflow: None,
    events_only: false,
    direct_notify: false,
};
const LOW: InstallOptions = InstallOptions {
    pgflow: Some(PgflowApi::V0_7),
    events_only: false,
    direct_notify: false,
};
const HIGH: InstallOptions = InstallOptions {
    pgflow: Some(PgflowApi::V0_14),
    events_only: false,
    direct_notify: false,
};

impl Core {
    /// At 0.7, from where an upgrade begins.
    async fn at_0_7() -> Self {
        let core = Self::at(PgflowApi::V0_7).await;
        assert_eq!(core.level().await, "0.7");
        core
    }

    async fn level(&self) -> String {
        self.show("select details ->> 'api' from flowgate.installed where component = 'pgflow'")
            .await
    }

    pub(super) async fn upgrade(&self) {
        let report = install(&self.db.url(), HIGH).await.unwrap();
        assert_eq!(report.api, PgflowApi::V0_14);
        assert_eq!(self.level().await, "0.14");
    }
}

#[tokio::test]
async fn a_level_is_installed_kept_raised_and_never_lowered() {
    let db = empty_database().await;
    let low = Component::Pgflow.version(PgflowApi::V0_7);
    let high = Component::Pgflow.version(PgflowApi::V0_14);

    // The default, and what the other would be.
    install(&db.url(), KEEP).await.unwrap();
    let as_low = check(&db.url()).await.unwrap();
    assert!(as_low.is_up_to_date() && as_low.api == PgflowApi::V0_7);
    assert!(check_for(&db.url(), LOW).await.unwrap().is_up_to_date());
    let as_high = check_for(&db.url(), HIGH).await.unwrap();
    assert!(!as_high.is_up_to_date());
    let other = State::Other {
        installed: low.clone(),
        wanted: high.clone(),
    };
    assert!(as_high.components.contains(&(Component::Pgflow, other)));

    let raised = install(&db.url(), HIGH).await.unwrap();
    assert_eq!(raised.api, PgflowApi::V0_14);
    let flowgate = Component::Flowgate.version(PgflowApi::V0_14);
    let outcomes = [
        (Component::Flowgate, Outcome::UpToDate { version: flowgate }),
        (
            Component::Pgflow,
            Outcome::Upgraded {
                from: low,
                version: high.clone(),
            },
        ),
    ];
    assert_eq!(raised.components, outcomes);

    for options in [KEEP, HIGH] {
        let found = check_for(&db.url(), options).await.unwrap();
        assert!(found.is_up_to_date() && found.api == PgflowApi::V0_14);
        let again = install(&db.url(), options).await.unwrap();
        let up_to_date =
            |(_, outcome): &(Component, Outcome)| matches!(outcome, Outcome::UpToDate { .. });
        assert!(again.components.iter().all(up_to_date), "{again:?}");
    }
    for refused in [
        install(&db.url(), LOW).await.unwrap_err(),
        check_for(&db.url(), LOW).await.unwrap_err(),
    ] {
        assert!(matches!(
            refused,
            SchemaError::Downgrade {
                installed: PgflowApi::V0_14,
                asked: PgflowApi::V0_7
            }
        ));
        assert!(
            refused
                .to_string()
                .contains("leave --pgflow out to keep 0.14")
        );
    }
    assert!(check(&db.url()).await.unwrap().is_up_to_date());
}

#[tokio::test]
async fn an_install_that_names_no_level_repairs_the_one_that_is_there() {
    let core = at_0_14().await;
    core.run("drop function pgflow.is_local; update flowgate.installed set version = '0.0.1+older' where component = 'flowgate'")
        .await;
    let report = install(&core.db.url(), KEEP).await.unwrap();
    assert!(
        matches!(&report.components[1], (Component::Pgflow, Outcome::Repaired { objects, .. }) if objects == &["function pgflow.is_local()"])
    );
    assert!(check(&core.db.url()).await.unwrap().is_up_to_date());
    assert_eq!(core.level().await, "0.14");

    core.run("update flowgate.installed set version = '0.0.1+older'")
        .await;
    install(&core.db.url(), KEEP).await.unwrap();
    assert!(check(&core.db.url()).await.unwrap().is_up_to_date());
    assert_eq!(core.level().await, "0.14");
    assert_eq!(core.show("select pgflow.is_local()").await, "f");
}

#[tokio::test]
async fn every_way_to_0_14_ends_at_the_same_objects() {
    let objects = async |db: &TestDb| {
        let recorded = "select component, jsonb_pretty(details -> 'objects') from flowgate.installed order by component";
        let constraints =
            "select conrelid::regclass, conname, pg_get_constraintdef(oid) from pg_constraint
                           where connamespace = 'pgflow'::regnamespace order by 1, 2";
        let client = db.connect().await;
        show(&client, recorded).await + &show(&client, constraints).await
    };
    let fresh = fresh_database_at(PgflowApi::V0_14).await;
    let expected = objects(&fresh).await;

    let again = fresh_database_at(PgflowApi::V0_14).await;
    show(
        &again.connect().await,
        "update flowgate.installed set version = '0.0.1+older'",
    )
    .await;
    install(&again.url(), KEEP).await.unwrap();
    assert_eq!(objects(&again).await, expected, "installed twice");

    let raised = fresh_database_at(PgflowApi::V0_7).await;
    install(&raised.url(), HIGH).await.unwrap();
    assert_eq!(objects(&raised).await, expected, "raised from 0.7");

    let printed = fresh_database_at(PgflowApi::V0_7).await;
    apply_printed(&printed, HIGH).await.unwrap();
    assert_eq!(objects(&printed).await, expected, "printed, over 0.7");
    uninstall(&printed.url()).await.unwrap();
    apply_printed(&printed, HIGH).await.unwrap();
    assert_eq!(objects(&printed).await, expected, "printed");
    assert!(check(&printed.url()).await.unwrap().is_up_to_date());
}

#[tokio::test]
async fn printed_sql_of_0_7_does_not_go_over_0_14() {
    let core = at_0_14().await;
    for options in [KEEP, LOW] {
        let refused = apply_printed(&core.db, options).await.unwrap_err();
        let refused = refused.as_db_error().unwrap().message().to_owned();
        assert_eq!(refused, "this database has a pgflow later than 0.7");
    }
    assert!(check(&core.db.url()).await.unwrap().is_up_to_date());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn twenty_installs_of_both_levels_at_once_leave_the_higher_one_whole() {
    let db = empty_database().await;
    let mut installs = JoinSet::new();
    for n in 0..20 {
        let url = db.url();
        let options = [LOW, HIGH, KEEP, LOW, HIGH][n % 5];
        installs.spawn(async move { (options.pgflow, install(&url, options).await) });
    }
    while let Some(ended) = installs.join_next().await {
        match ended.unwrap() {
            (_, Ok(_)) => {}
            (Some(PgflowApi::V0_7), Err(SchemaError::Downgrade { .. })) => {}
            (asked, Err(error)) => panic!("{asked:?}: {error}"),
        }
    }
    let found = check(&db.url()).await.unwrap();
    assert!(found.is_up_to_date(), "{found:?}");
    assert_eq!(found.api, PgflowApi::V0_14);
    let client = db.connect().await;
    let flow = "select pgflow.create_flow('f'); select pgflow.add_step('f', 'a', when_exhausted => 'skip'); select status from pgflow.start_flow('f', '{}')";
    assert!(show(&client, flow).await.ends_with("started"));
}

#[tokio::test]
async fn a_pgmq_without_headers_is_refused_before_anything_is_changed() {
    let core = Core::at_0_7().await;
    core.run("alter type pgmq.message_record drop attribute headers cascade")
        .await;
    let error = install(&core.db.url(), HIGH).await.unwrap_err();
    assert!(
        matches!(
            error,
            SchemaError::PgmqTooOld {
                api: PgflowApi::V0_14
            }
        ),
        "{error}"
    );
    assert!(error.to_string().contains("pgmq 1.5.0 or later"), "{error}");
    let as_high = check_for(&core.db.url(), HIGH).await.unwrap();
    assert_eq!(as_high.pgmq_missing, ["headers in message_record (1.5.0)"]);
    let printed = apply_printed(&core.db, HIGH).await.unwrap_err();
    let printed = printed.as_db_error().unwrap().clone();
    assert_eq!(
        (printed.code().code(), printed.message()),
        ("0A000", "pgflow 0.14 needs pgmq 1.5.0 or later")
    );
    // 0.7 doesn't mind, and nothing happened to it.
    assert!(check(&core.db.url()).await.unwrap().is_up_to_date());
    core.run("update flowgate.installed set version = '0.0.1+older'")
        .await;
    install(&core.db.url(), KEEP).await.unwrap();
    assert_eq!(core.level().await, "0.7");
}

#[tokio::test]
async fn a_pgflow_of_somebody_elses_has_no_level_of_ours() {
    let db = empty_database().await;
    let client = db.connect().await;
    show(
        &client,
        "create schema pgflow; create table pgflow.flows (theirs int)",
    )
    .await;
    for options in [HIGH, LOW, KEEP] {
        let report = install(&db.url(), options).await.unwrap();
        assert_eq!(
            report.components[1],
            (Component::Pgflow, Outcome::LeftAlone)
        );
        assert!(check_for(&db.url(), options).await.unwrap().is_up_to_date());
    }
    assert_eq!(
        show(
            &client,
            "select count(*) from pg_class where relnamespace = 'pgflow'::regnamespace"
        )
        .await,
        "1"
    );
}

#[tokio::test]
async fn what_was_uninstalled_is_gone_with_its_jobs_and_may_come_back_at_any_level() {
    let core = at_0_14().await;
    core.define("flow f\n a").await;
    core.start_flow("f", "{}", 1).await;
    core.run(
        "create schema cron; create table cron.job (jobid bigserial, jobname text, schedule text, command text);
         create function cron.schedule(a text, b text, c text) returns bigint language sql as
            'insert into cron.job (jobname, schedule, command) values (a, b, c) returning jobid';
         create function cron.unschedule(a text) returns boolean language sql as
            'with gone as (delete from cron.job where jobname = a returning 1) select exists (select from gone)';
         select cron.schedule('mine', '* * * * *', 'select 1'); select pgflow.setup_requeue_stalled_tasks_cron()",
    )
    .await;
    uninstall(&core.db.url()).await.unwrap();
    let left = "select string_agg(nspname, ' ' order by nspname) from pg_namespace
        where nspname in ('pgflow', 'flowgate', 'realtime', 'pgmq')";
    assert_eq!(core.show(left).await, "pgmq");
    assert_eq!(core.show("select jobname from cron.job").await, "mine");

    install(&core.db.url(), KEEP).await.unwrap();
    assert_eq!(core.level().await, "0.7");
    assert_eq!(core.show("select jobname from cron.job").await, "mine");
}

#[tokio::test]
async fn the_installer_schedules_the_requeueing_where_pg_cron_is_there() {
    let core = Core::at_0_7().await;
    core.run(
        "create schema cron; create table cron.job (jobid bigserial, jobname text, schedule text, command text);
         create function cron.schedule(a text, b text, c text) returns bigint language sql as
            'insert into cron.job (jobname, schedule, command) values (a, b, c) returning jobid'",
    )
    .await;
    core.upgrade().await;
    let jobs = "select jobname, schedule, command from cron.job";
    assert_eq!(
        core.show(jobs).await,
        "pgflow_requeue_stalled_tasks 15 seconds select pgflow.requeue_stalled_tasks()"
    );
    // Changed by somebody since: left as it is.
    core.run("update cron.job set schedule = '1 minute'; update flowgate.installed set version = '0.0.1+older'").await;
    install(&core.db.url(), KEEP).await.unwrap();
    assert_eq!(core.show("select schedule from cron.job").await, "1 minute");
    // A pg_cron that refuses is no reason not to install.
    core.run(
        "truncate cron.job; update flowgate.installed set version = '0.0.1+older';
         create or replace function cron.schedule(a text, b text, c text) returns bigint language plpgsql as
            $$ begin raise 'not in this database'; end $$",
    )
    .await;
    install(&core.db.url(), KEEP).await.unwrap();
    assert_eq!(core.show(jobs).await, "");
    assert!(check(&core.db.url()).await.unwrap().is_up_to_date());
}

#[tokio::test]
async fn every_function_of_both_levels_stands_in_the_table_of_functions() {
    for api in [PgflowApi::V0_7, PgflowApi::V0_14] {
        let db = fresh_database_at(api).await;
        let installed = show(
            &db.connect().await,
            "select p.proname, p.provolatile, coalesce(array_to_string(p.proargnames[1:p.pronargs], ','), '')
             from pg_proc as p where p.pronamespace = 'pgflow'::regnamespace and p.prorettype <> 'trigger'::regtype order by 1, 3",
        )
        .await;
        for line in installed.lines() {
            let mut words = line.split(' ');
            let (name, volatility) = (words.next().unwrap(), words.next().unwrap());
            let args: Vec<_> = words
                .next()
                .unwrap()
                .split(',')
                .filter(|arg| !arg.is_empty())
                .collect();
            let row = FUNCTIONS.iter().find(|row| {
                row.schema == "pgflow" && row.name == name && row.args.starts_with(&args)
            });
            let row = row.unwrap_or_else(|| panic!("{api}: {line} is not in the table"));
            assert_eq!(row.class == Class::Read, volatility != "v", "{api}: {line}");
            if api == PgflowApi::V0_14 && !["create_flow", "poll_for_tasks"].contains(&name) {
                assert_eq!(row.args, args, "{line}");
            }
        }
    }
}

#[tokio::test]
async fn runs_in_flight_go_on_after_an_upgrade() {
    let core = Core::at_0_7().await;
    core.define(
        "flow f(max_attempts => 2, base_delay => 0)
         a
         map each
         map none
         list < a
         map over < list
         map again < each
         end < over, again, none, a",
    )
    .await;
    core.define("flow fails(max_attempts => 1)\n a\n b").await;
    core.define("flow done\n a\n map m\n b < a, m").await;
    let take = async || {
        core.show(&format!(
            "select step_slug || ' ' || task_index || ' ' || coalesce(input::text, '∅') from pgflow.start_tasks('f',
             array(select msg_id from pgmq.read('f', 600, 1000)), '{WORKER}') order by run_id, step_slug collate \"C\", task_index"
        ))
        .await
    };
    // 1: half of it done, two tasks in somebody's hands, one to be tried again; 2: just begun; 3: failed; 4: complete.
    core.start_flow("f", "[1, 2]", 1).await;
    take().await;
    core.complete(1, "a", 0, "{\"a\": 1}").await;
    core.complete(1, "each", 0, "[10]").await;
    core.run(&format!(
        "select pgflow.complete_task('{}', 'each', 1, null)",
        run(1)
    ))
    .await;
    core.complete(1, "none", 0, "0").await;
    core.complete(1, "none", 1, "1").await;
    assert_eq!(take().await.lines().count(), 3);
    assert_eq!(core.fail(1, "again", 0, "once").await, "queued");
    core.start_flow("f", "[]", 2).await;
    core.start_flow("fails", "{}", 3).await;
    core.take("fails").await;
    core.fail(3, "a", 0, "no").await;
    core.start_flow("done", "[5]", 4).await;
    core.take("done").await;
    core.complete(4, "a", 0, "\"a\"").await;
    core.complete(4, "m", 0, "50").await;
    core.take("done").await;
    core.complete(4, "b", 0, "true").await;
    let before = async || {
        core.show("select * from pgflow.runs order by run_id; select flow_slug, run_id, step_slug, status, remaining_tasks, remaining_deps,
                   started_at, completed_at, failed_at, error_message, initial_tasks from pgflow.step_states order by run_id, step_slug")
            .await
    };
    let as_it_was = before().await;

    core.upgrade().await;
    assert_eq!(before().await, as_it_was);
    let outputs = "select run_id, step_slug, output from pgflow.step_states where output is not null order by run_id, step_slug";
    let [one, two, four] = [1, 2, 4].map(run);
    assert_eq!(
        core.show(outputs).await,
        lines(&format!(
            "{one} a {{\"a\": 1}}
             {one} each [[10], null]
             {one} none [0, 1]
             {two} again []
             {two} each []
             {two} none []
             {four} a \"a\"
             {four} b true
             {four} m [50]"
        ))
    );
    assert_eq!(
        core.show("select distinct requeued_count, last_requeued_at, permanently_stalled_at from pgflow.step_tasks").await,
        "0 ∅ ∅"
    );
    // Only once: what is null from now on is meant to be.
    core.run("update pgflow.step_states set output = null where step_slug = 'a'; update flowgate.installed set version = '0.0.1+older'")
        .await;
    install(&core.db.url(), KEEP).await.unwrap();
    assert_eq!(
        core.show(
            "select count(*) from pgflow.step_states where step_slug = 'a' and output is not null"
        )
        .await,
        "0"
    );
    core.run(&format!("update pgflow.step_states set output = '{{\"a\": 1}}' where step_slug = 'a' and run_id = '{one}'"))
        .await;

    // The tasks that were in somebody's hands are completed by them, the rest by whoever reads.
    core.complete(1, "again", 1, "\"again\"").await;
    core.complete(1, "list", 0, "[\"x\", \"y\"]").await;
    assert_eq!(
        take().await,
        "again 0 [10]\nover 0 \"x\"\nover 1 \"y\"\na 0 {}"
    );
    core.complete(1, "again", 0, "\"at last\"").await;
    core.complete(1, "over", 0, "1").await;
    core.complete(1, "over", 1, "2").await;
    core.complete(2, "a", 0, "2").await;
    assert_eq!(
        take().await,
        "end 0 {\"a\": {\"a\": 1}, \"none\": [0, 1], \"over\": [1, 2], \"again\": [\"at last\", \"again\"]}\nlist 0 {\"a\": 2}"
    );
    core.complete(1, "end", 0, "\"end\"").await;
    core.complete(2, "list", 0, "[]").await;
    assert_eq!(
        take().await,
        "end 0 {\"a\": 2, \"none\": [], \"over\": [], \"again\": []}"
    );
    core.complete(2, "end", 0, "\"too\"").await;
    assert_eq!(
        core.show("select status, output from pgflow.runs order by run_id")
            .await,
        "completed {\"end\": \"end\"}\ncompleted {\"end\": \"too\"}\nfailed ∅\ncompleted {\"b\": true}"
    );
    let counts =
        "select count(*), count(distinct event) from flowgate.event where topic = 'pgflow:run:";
    for n in [1, 2, 4] {
        let counted = core.show(&format!("{counts}{}'", run(n))).await;
        let (all, distinct) = counted.split_once(' ').unwrap();
        assert_eq!(all, distinct, "run {n}: an event twice");
    }
    assert_eq!(core.queue("f").await, "");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_upgrade_under_full_load_neither_deadlocks_nor_fails_a_call() {
    let core = Core::at_0_7().await;
    core.define("flow f\n a\n map m < a\n b < m\n c < a\n d < b, c")
        .await;
    let upgraded = Arc::new(AtomicBool::new(false));
    let mut workers = JoinSet::new();
    for n in 0..8 {
        let client = core.db.connect().await;
        let upgraded = Arc::clone(&upgraded);
        workers.spawn(async move {
            let mut started = 0;
            let mut after = 0;
            // Goes on for a while after the upgrade, in the same session.
            while after < 20 {
                if upgraded.load(Ordering::Acquire) {
                    after += 1;
                }
                if n < 2 && started < 400 {
                    started += 1;
                    try_show(&client, "select pgflow.start_flow('f', '{}')").await?;
                }
                let read = "select msg_id from pgmq.read('f', 60, 5)";
                let ids = try_show(&client, read).await?.replace('\n', ",");
                let taken = format!(
                    "select run_id, step_slug, task_index from pgflow.start_tasks('f', '{{{ids}}}', '{WORKER}')"
                );
                for task in try_show(&client, &taken).await?.lines() {
                    let mut parts = task.split(' ');
                    let [id, step, index] = [(); 3].map(|()| parts.next().unwrap());
                    let output = if step == "a" { "[1, 2, 3]" } else { "1" };
                    let complete = format!("select pgflow.complete_task('{id}', '{step}', {index}, '{output}')");
                    try_show(&client, &complete).await?;
                }
            }
            Ok::<_, tokio_postgres::Error>(())
        });
    }
    let busy = "select count(*) > 50 from pgflow.runs where status = 'completed'";
    wait_until("workers are at work", super::PATIENCE, async || {
        core.show(busy).await == "t"
    })
    .await;
    core.upgrade().await;
    upgraded.store(true, Ordering::Release);
    while let Some(ended) = workers.join_next().await {
        ended.unwrap().unwrap();
    }
    // What the others left.
    wait_until("everything is done", super::PATIENCE, async || {
        let taken = core.take("f").await;
        for task in taken.lines() {
            let mut parts = task.split(' ');
            let (step, index) = (parts.next().unwrap(), parts.next().unwrap());
            let output = if step == "a" { "[1, 2, 3]" } else { "1" };
            core.run(&format!(
                "select pgflow.complete_task(run_id, step_slug, task_index, '{output}') from pgflow.step_tasks
                 where status = 'started' and step_slug = '{step}' and task_index = {index}"
            ))
            .await;
        }
        core.show("select count(*) from pgflow.runs where status <> 'completed'").await == "0"
    })
    .await;
    assert_eq!(
        core.show("select distinct status, output from pgflow.runs")
            .await,
        "completed {\"d\": 1}"
    );
    let wrong = "select count(*) from pgflow.step_states where output is distinct from
                 case step_slug when 'a' then '[1, 2, 3]' when 'm' then '[1, 1, 1]' else '1' end::jsonb";
    assert_eq!(core.show(wrong).await, "0");
    assert_eq!(core.queue("f").await, "");
    let deadlocks = "select pg_stat_force_next_flush(); select pg_stat_clear_snapshot();
                     select deadlocks from pg_stat_database where datname = current_database()";
    assert!(core.show(deadlocks).await.ends_with("\n0"));
}

#[tokio::test]
async fn a_call_of_0_7_that_0_14_no_longer_has_is_refused_by_name() {
    let core = Core::at_0_7().await;
    core.run("select pgflow.read_with_poll('f', 1, 1, 0)").await;
    core.upgrade().await;
    let refused = refused(&core.client, "select pgflow.read_with_poll('f', 1, 1, 0)").await;
    assert!(
        refused.starts_with("42883 function pgflow.read_with_poll("),
        "{refused}"
    );
}

async fn apply_printed(db: &TestDb, options: InstallOptions) -> Result<(), tokio_postgres::Error> {
    let mut printed = Vec::new();
    schema::print(&mut printed, options).unwrap();
    let client = db.connect().await;
    client
        .batch_execute(std::str::from_utf8(&printed).unwrap())
        .await
}
