//! Keeping edge functions at work: with pg_cron, pg_net and the vault as Supabase has them (stand-ins that record what they are
//! asked), and without.

use tokio_postgres::AsyncMessage;

use super::{Core, WORKER, at_0_14};

/// What of the three extensions is used, as their documentation has it.
const SUPABASE: &str = "
    create schema cron;
    create table cron.job (jobid bigserial, jobname text unique, schedule text, command text);
    create table cron.job_run_details (runid bigserial, jobid bigint, end_time timestamptz);
    create function cron.schedule(job_name text, schedule text, command text) returns bigint language sql as
        'insert into cron.job (jobname, schedule, command) values (job_name, schedule, command) returning jobid';
    create function cron.unschedule(job_name text) returns boolean language sql as
        'with gone as (delete from cron.job where jobname = job_name returning 1) select exists (select from gone)';
    create schema net;
    create table net.request (id bigserial, url text, body jsonb, headers jsonb);
    create function net.http_post(url text, body jsonb default '{}', params jsonb default '{}',
        headers jsonb default '{\"Content-Type\": \"application/json\"}', timeout_milliseconds int default 5000) returns bigint
        language sql as 'insert into net.request (url, body, headers) values (url, body, headers) returning id';
    create schema vault;
    create table vault.decrypted_secrets (name text, decrypted_secret text)";

const LOCAL: &str =
    "set app.settings.jwt_secret = 'super-secret-jwt-token-with-at-least-32-characters-long'";

async fn called(core: &Core) -> String {
    core.show("select function_name, invoked, request_id from pgflow.ensure_workers()")
        .await
}

#[tokio::test]
async fn a_worker_function_is_tracked_once_and_remembered_anew() {
    let core = at_0_14().await;
    core.run("select pgflow.track_worker_function(function_name => 'w')")
        .await;
    let row = "select function_name, enabled, debounce, last_invoked_at, created_at from pgflow.worker_functions";
    let first = core.show(row).await;
    assert!(first.starts_with("w t 00:00:06 ∅ "), "{first}");
    core.run("update pgflow.worker_functions set updated_at = 'epoch', enabled = false")
        .await;
    core.run("begin; select pgflow.track_worker_function('w')")
        .await;
    // The clock, not the transaction's start; what else was set stays.
    assert_eq!(
        core.show("select updated_at > now(), enabled from pgflow.worker_functions; commit")
            .await,
        "t f"
    );
    assert_eq!(
        core.show("select count(*) from pgflow.worker_functions")
            .await,
        "1"
    );
}

#[tokio::test]
async fn a_worker_that_stops_says_so() {
    let core = at_0_14().await;
    let stopped = "select stopped_at is not null, deprecated_at is not null from pgflow.workers";
    assert_eq!(core.show(stopped).await, "f f");
    core.run(&format!(
        "select pgflow.mark_worker_stopped(worker_id => '{WORKER}')"
    ))
    .await;
    assert_eq!(core.show(stopped).await, "t f");
    core.run("select pgflow.mark_worker_stopped(gen_random_uuid())")
        .await;
}

#[tokio::test]
async fn locally_every_enabled_function_is_called_without_a_key() {
    let core = at_0_14().await;
    core.run(SUPABASE).await;
    core.run(LOCAL).await;
    core.run(
        "insert into pgflow.worker_functions (function_name, enabled, last_invoked_at)
         values ('two', true, now()), ('one', true, null), ('off', false, null)",
    )
    .await;
    core.run("insert into pgflow.workers (worker_id, queue_name, function_name) values (gen_random_uuid(), 'q', 'one')").await;
    assert_eq!(called(&core).await, "one t 1\ntwo t 2");
    assert_eq!(
        core.show("select url, body, headers from net.request order by id")
            .await,
        "http://kong:8000/functions/v1/one {} {\"Content-Type\": \"application/json\"}\n\
         http://kong:8000/functions/v1/two {} {\"Content-Type\": \"application/json\"}"
    );
    assert_eq!(called(&core).await, "one t 3\ntwo t 4");
    let marked = "select string_agg(function_name, ' ' order by function_name) from pgflow.worker_functions where last_invoked_at is not null";
    assert_eq!(core.show(marked).await, "one two");
}

#[tokio::test]
async fn elsewhere_a_function_is_called_when_nobody_is_at_work_and_its_debounce_is_over() {
    let core = at_0_14().await;
    core.run(SUPABASE).await;
    core.run(
        "insert into vault.decrypted_secrets values ('supabase_project_id', 'abc'), ('supabase_service_role_key', 'role');
         insert into pgflow.worker_functions (function_name, enabled, last_invoked_at) values
            ('fresh', true, null), ('off', false, null), ('just_called', true, now() - interval '4 s'), ('called', true, now() - interval '7 s'),
            ('alive', true, null), ('silent', true, null), ('stopped', true, null), ('deprecated', true, null);
         insert into pgflow.workers (worker_id, queue_name, function_name, last_heartbeat_at, stopped_at, deprecated_at) values
            (gen_random_uuid(), 'q', 'alive', now() - interval '4 s', null, null),
            (gen_random_uuid(), 'q', 'alive', now() - interval '1 h', now(), null),
            (gen_random_uuid(), 'q', 'silent', now() - interval '7 s', null, null),
            (gen_random_uuid(), 'q', 'stopped', now(), now(), null),
            (gen_random_uuid(), 'q', 'deprecated', now(), null, now())",
    )
    .await;
    let names = "select string_agg(function_name, ' ' order by request_id) from pgflow.ensure_workers() where invoked";
    assert_eq!(
        core.show(names).await,
        "called deprecated fresh silent stopped"
    );
    assert_eq!(
        core.show("select distinct regexp_replace(url, '[a-z]+$', ''), headers from net.request")
            .await,
        "https://abc.supabase.co/functions/v1/ {\"Content-Type\": \"application/json\", \"Authorization\": \"Bearer role\"}"
    );
    // Debounced from now on.
    assert_eq!(called(&core).await, "");
    // Each function has a debounce of its own.
    core.run("update pgflow.worker_functions set debounce = '2 s' where function_name in ('alive', 'just_called')").await;
    assert_eq!(core.show(names).await, "alive just_called");
    // pgflow's own key goes before Supabase's.
    core.run("insert into vault.decrypted_secrets values ('pgflow_auth_secret', 'own'); update pgflow.worker_functions set last_invoked_at = null")
        .await;
    core.run("truncate net.request; select pgflow.ensure_workers()")
        .await;
    assert_eq!(
        core.show("select distinct headers ->> 'Authorization' from net.request")
            .await,
        "Bearer own"
    );
}

#[tokio::test]
async fn with_a_secret_missing_nothing_is_called_and_nothing_marked() {
    let core = at_0_14().await;
    core.run(SUPABASE).await;
    core.run("select pgflow.track_worker_function('w')").await;
    for (secrets, missing) in [
        ("", "the secret supabase_project_id"),
        (
            "('supabase_project_id', ''), ('supabase_service_role_key', 'k')",
            "the secret supabase_project_id",
        ),
        (
            "('supabase_project_id', 'p'), ('supabase_service_role_key', ''), ('pgflow_auth_secret', '')",
            "both of the secrets pgflow_auth_secret and supabase_service_role_key",
        ),
    ] {
        core.run("truncate vault.decrypted_secrets").await;
        if !secrets.is_empty() {
            core.run(&format!(
                "insert into vault.decrypted_secrets values {secrets}"
            ))
            .await;
        }
        assert_eq!(called(&core).await, "");
        assert_eq!(
            notices(&core, "select * from pgflow.ensure_workers()").await,
            [format!(
                "pgflow.ensure_workers calls nothing: the vault lacks {missing}"
            )]
        );
        let marks = "select (select count(*) from net.request), (select count(last_invoked_at) from pgflow.worker_functions)";
        assert_eq!(core.show(marks).await, "0 0");
    }
    // An empty key of its own is none: the other one serves.
    core.run("truncate vault.decrypted_secrets; insert into vault.decrypted_secrets values ('supabase_project_id', 'p'), ('supabase_service_role_key', 'k'), ('pgflow_auth_secret', '')")
        .await;
    assert_eq!(called(&core).await, "w t 1");
}

#[tokio::test]
async fn two_that_ensure_workers_at_once_call_each_function_once() {
    let core = at_0_14().await;
    core.run(SUPABASE).await;
    core.run("insert into vault.decrypted_secrets values ('supabase_project_id', 'p'), ('pgflow_auth_secret', 'k'); select pgflow.track_worker_function('w')")
        .await;
    core.run("begin; select pgflow.ensure_workers()").await;
    let other = core.db.connect().await;
    assert_eq!(
        super::show(&other, "select count(*) from pgflow.ensure_workers()").await,
        "0"
    );
    core.run("commit").await;
    assert_eq!(core.show("select count(*) from net.request").await, "1");
}

#[tokio::test]
async fn jobs_are_scheduled_once_under_their_names() {
    let core = at_0_14().await;
    core.run(SUPABASE).await;
    let jobs = "select jobname, schedule, command from cron.job order by jobname";
    let said = core.show("select pgflow.setup_ensure_workers_cron()").await;
    assert!(
        said.contains("pgflow_ensure_workers") && said.contains("1 second"),
        "{said}"
    );
    core.run("select pgflow.setup_requeue_stalled_tasks_cron()")
        .await;
    assert_eq!(
        core.show(jobs).await,
        "pgflow_cleanup_logs 0 * * * * select * from pgflow.cleanup_ensure_workers_logs()\n\
         pgflow_ensure_workers 1 second select * from pgflow.ensure_workers()\n\
         pgflow_requeue_stalled_tasks 15 seconds select pgflow.requeue_stalled_tasks()"
    );
    core.run("select pgflow.setup_ensure_workers_cron(cron_interval => '5 seconds'); select pgflow.setup_requeue_stalled_tasks_cron('1 minute')")
        .await;
    assert_eq!(
        core.show("select string_agg(schedule, ', ' order by jobname) from cron.job")
            .await,
        "0 * * * *, 5 seconds, 1 minute"
    );
    // And what they say can be run.
    core.run(LOCAL).await;
    for command in core.show("select command from cron.job").await.lines() {
        core.run(command).await;
    }
}

#[tokio::test]
async fn old_entries_of_pgflows_own_jobs_are_cleaned_up() {
    let core = at_0_14().await;
    core.run(SUPABASE).await;
    core.run(
        "select pgflow.setup_ensure_workers_cron(); select cron.schedule('somebody_elses', '* * * * *', 'select 1');
         insert into cron.job_run_details (jobid, end_time)
         select j.jobid, now() - make_interval(hours => h) from cron.job as j, unnest(array[1, 23, 25, 100]) as h",
    )
    .await;
    assert_eq!(
        core.show("select cron_deleted from pgflow.cleanup_ensure_workers_logs()")
            .await,
        "4"
    );
    assert_eq!(
        core.show(
            "select cron_deleted from pgflow.cleanup_ensure_workers_logs(retention_hours => 2)"
        )
        .await,
        "2"
    );
    let left = "select j.jobname, count(*) from cron.job_run_details join cron.job as j using (jobid) group by 1 order by 1";
    assert_eq!(
        core.show(left).await,
        "pgflow_cleanup_logs 1\npgflow_ensure_workers 1\nsomebody_elses 4"
    );
}

#[tokio::test]
async fn without_the_extensions_each_function_says_so_and_does_nothing() {
    let core = at_0_14().await;
    core.run("select pgflow.track_worker_function('w')").await;
    for (sql, answer, notice) in [
        (
            "select * from pgflow.ensure_workers()",
            "",
            "pgflow.ensure_workers calls nothing: it needs the extension pg_net",
        ),
        (
            "select pgflow.setup_ensure_workers_cron()",
            "Nothing scheduled: the extension pg_cron is not installed",
            "pgflow.setup_ensure_workers_cron schedules nothing: it needs the extension pg_cron",
        ),
        (
            "select pgflow.setup_requeue_stalled_tasks_cron()",
            "Nothing scheduled: the extension pg_cron is not installed",
            "pgflow.setup_requeue_stalled_tasks_cron schedules nothing: it needs the extension pg_cron (flowgate serve does without)",
        ),
        (
            "select * from pgflow.cleanup_ensure_workers_logs()",
            "0",
            "pgflow.cleanup_ensure_workers_logs has nothing to delete: pg_cron is not installed",
        ),
    ] {
        assert_eq!(core.show(sql).await, answer, "{sql}");
        assert_eq!(notices(&core, sql).await, [notice], "{sql}");
    }
    assert_eq!(
        core.show("select last_invoked_at from pgflow.worker_functions")
            .await,
        "∅"
    );

    // Some of them: nothing half done.
    core.run(SUPABASE).await;
    core.run("drop schema vault cascade").await;
    assert_eq!(
        notices(&core, "select * from pgflow.ensure_workers()").await,
        ["pgflow.ensure_workers calls nothing: it needs the extension supabase_vault"]
    );
    core.run("drop schema net cascade").await;
    assert_eq!(
        core.show("select pgflow.setup_ensure_workers_cron()").await,
        "Nothing scheduled: the extension pg_net is not installed"
    );
    assert_eq!(core.show("select count(*) from cron.job").await, "0");
}

/// What the server told besides the answer.
async fn notices(core: &Core, sql: &str) -> Vec<String> {
    let (client, mut connection) =
        tokio_postgres::connect(&core.db.primary_url, tokio_postgres::NoTls)
            .await
            .unwrap();
    let asking = tokio::spawn({
        let sql = sql.to_owned();
        async move { client.simple_query(&sql).await.map(|_| ()) }
    });
    let mut told = Vec::new();
    while let Some(message) = std::future::poll_fn(|cx| connection.poll_message(cx)).await {
        if let AsyncMessage::Notice(notice) = message.unwrap() {
            told.push(notice.message().to_owned());
        }
    }
    asking.await.unwrap().unwrap();
    told
}
