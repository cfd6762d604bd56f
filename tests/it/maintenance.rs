//! Upkeep: stalled tasks go back into their queue, old finished runs go for good; the SQL by itself, then `serve` doing it by its
//! schedule. Ages are made by moving timestamps back, never by waiting.

use std::time::Duration;

use flowgate::config::Config;
use flowgate::schema::{InstallOptions, install};
use futures_util::future::join_all;
use tokio_postgres::Client;

use crate::support::pg::{TestDb, empty_database, fresh_database};
use crate::support::proxy::{PATIENCE, Proxy, connect, sqlstate, text, try_text};
use crate::support::wait::wait_until;

const WORKER: &str = "00000000-0000-4000-8000-000000000001";
const OTHER: &str = "00000000-0000-4000-8000-000000000002";
const REQUEUE: &str = "select flowgate.requeue_stalled_tasks()";
/// Tasks as `step:index status`, in order.
const TASKS: &str =
    "select coalesce(string_agg(step_slug || ':' || task_index || ' ' || status, ', '
    order by step_slug, task_index), '') from pgflow.step_tasks";

/// A partition to make, one to drop, a counter to forget and two to keep.
const AGED_OUTBOX: &str = "
    create table flowgate.event_20200101 partition of flowgate.event for values from ('2020-01-01') to ('2020-01-02');
    do $$ begin
        execute 'drop table flowgate.event_' || to_char(now() at time zone 'UTC' + interval '3 days', 'YYYYMMDD');
    end $$;
    insert into flowgate.topic values ('pgflow:run:ended', 3, true, now() - interval '8 days'),
        ('pgflow:run:open', 3, false, now() - interval '800 days'), ('else', 3, false, now() - interval '8 days')";

/// A database with flow `f` of these steps, two workers, and a connection to it.
async fn with_flow(steps: &str) -> (TestDb, Client) {
    let db = fresh_database().await;
    let client = db.connect().await;
    define(&client, steps).await;
    (db, client)
}

async fn define(client: &Client, steps: &str) {
    let define = format!(
        "select pgflow.create_flow('f'); {steps};
         insert into pgflow.workers (worker_id, queue_name, function_name)
         values ('{WORKER}', 'f', 'a'), ('{OTHER}', 'f', 'b')"
    );
    client.batch_execute(&define).await.unwrap();
}

async fn start_run(client: &Client) -> String {
    text(
        client,
        "select run_id from pgflow.start_flow('f', '[1, 2]')",
    )
    .await
}

/// Reads what is visible in the flow's queue and starts it; how many tasks that were.
async fn start_tasks(client: &Client, worker: &str) -> String {
    let start = format!(
        "select count(*) from pgflow.start_tasks('f', array(select msg_id from pgmq.read('f', 5, 100)), '{worker}')"
    );
    text(client, &start).await
}

/// As if whatever was started had been started that many seconds earlier.
async fn started_ago(client: &Client, seconds: u32) {
    let back = format!(
        "update pgflow.step_tasks set queued_at = now() - interval '1 day',
             started_at = now() - interval '{seconds} seconds' where status = 'started'"
    );
    client.batch_execute(&back).await.unwrap();
}

/// As if a run, and all that belongs to it, had happened that much earlier.
async fn ran_ago(client: &Client, run: &str, ago: &str) {
    let back = format!(
        "update pgflow.step_tasks set queued_at = queued_at - interval '{ago}', started_at = started_at - interval '{ago}',
             completed_at = completed_at - interval '{ago}', failed_at = failed_at - interval '{ago}' where run_id = '{run}';
         update pgflow.step_states set created_at = created_at - interval '{ago}', started_at = started_at - interval '{ago}',
             completed_at = completed_at - interval '{ago}', failed_at = failed_at - interval '{ago}' where run_id = '{run}';
         update pgflow.runs set started_at = started_at - interval '{ago}',
             completed_at = completed_at - interval '{ago}', failed_at = failed_at - interval '{ago}' where run_id = '{run}'"
    );
    client.batch_execute(&back).await.unwrap();
}

/// Does all there is to do, as a worker.
async fn work_off(client: &Client) {
    while start_tasks(client, WORKER).await != "0" {
        let complete = "select count(*) from pgflow.step_tasks as t,
            lateral pgflow.complete_task(t.run_id, t.step_slug, t.task_index, '[1]') where t.status = 'started'";
        text(client, complete).await;
    }
}

async fn pruned(client: &Client, call: &str) -> String {
    text(
        client,
        &format!("select runs || ' ' || archived || ' ' || workers from flowgate.prune({call})"),
    )
    .await
}

#[tokio::test]
async fn a_task_has_stalled_30_s_after_its_steps_timeout_else_its_flows() {
    let steps = "select pgflow.add_step('f', 'long', timeout => 300); select pgflow.add_step('f', 'short', timeout => 5);
                 select pgflow.add_step('f', 'usual')";
    let (_db, client) = with_flow(steps).await;
    start_run(&client).await;
    assert_eq!(start_tasks(&client, WORKER).await, "3");
    // (seconds, what goes back): short at 35, usual at the flow's 60 + 30, long at 330.
    for (ago, back) in [
        (34, "0"),
        (36, "1"),
        (89, "0"),
        (92, "1"),
        (329, "0"),
        (332, "1"),
    ] {
        started_ago(&client, ago).await;
        assert_eq!(text(&client, REQUEUE).await, back, "after {ago} s");
    }
    assert_eq!(
        text(&client, TASKS).await,
        "long:0 queued, short:0 queued, usual:0 queued"
    );
}

#[tokio::test]
async fn a_requeued_task_is_visible_at_once_and_another_worker_completes_it() {
    let (_db, client) = with_flow("select pgflow.add_step('f', 's')").await;
    let run = start_run(&client).await;
    start_tasks(&client, WORKER).await;
    assert_eq!(
        start_tasks(&client, OTHER).await,
        "0",
        "its message waits for the timeout"
    );
    started_ago(&client, 100).await;
    assert_eq!(text(&client, REQUEUE).await, "1");
    let task = "select concat_ws(' ', status, attempts_count, started_at is null, last_worker_id is null) from pgflow.step_tasks";
    assert_eq!(text(&client, task).await, "queued 1 t t");
    let count = "select requeued_count || ' ' || (last_requeued_at is not null) from flowgate.requeued_task";
    assert_eq!(text(&client, count).await, "1 true");

    assert_eq!(start_tasks(&client, OTHER).await, "1");
    let owner = "select attempts_count || ' ' || last_worker_id from pgflow.step_tasks";
    assert_eq!(text(&client, owner).await, format!("2 {OTHER}"));
    // The first one was only slow: whoever is first completes it, the other changes nothing.
    for output in [1, 2] {
        let complete =
            format!("select count(*) from pgflow.complete_task('{run}', 's', 0, '{output}')");
        assert_eq!(text(&client, &complete).await, "1");
    }
    assert_eq!(
        text(&client, "select status || ' ' || output from pgflow.runs").await,
        "completed {\"s\": 1}"
    );
    // What ended is not counted any more.
    assert_eq!(text(&client, REQUEUE).await, "0");
    assert_eq!(
        text(&client, "select count(*) from flowgate.requeued_task").await,
        "0"
    );
    assert_eq!(text(&client, "select count(*) from pgmq.q_f").await, "0");
}

#[tokio::test]
async fn a_task_is_requeued_three_times_then_given_up_for_somebody_to_look() {
    let (_db, client) = with_flow("select pgflow.add_step('f', 's')").await;
    start_run(&client).await;
    for _ in 0..3 {
        assert_eq!(start_tasks(&client, WORKER).await, "1");
        started_ago(&client, 100).await;
        assert_eq!(text(&client, REQUEUE).await, "1");
    }
    assert_eq!(text(&client, "select flowgate.stalled_tasks()").await, "0");
    assert_eq!(start_tasks(&client, WORKER).await, "1");
    started_ago(&client, 100).await;
    for _ in 0..3 {
        assert_eq!(text(&client, REQUEUE).await, "0");
        let seen = "select concat_ws(' ', t.status, t.attempts_count, q.requeued_count, q.permanently_stalled_at is not null,
                (select count(*) from pgmq.q_f), (select count(*) from pgmq.a_f), (select status from pgflow.runs))
            from pgflow.step_tasks as t join flowgate.requeued_task as q using (run_id, step_slug, task_index)";
        assert_eq!(text(&client, seen).await, "started 4 3 t 0 1 started");
        assert_eq!(text(&client, "select flowgate.stalled_tasks()").await, "1");
    }
    // Somebody looked, and gives it another chance.
    client
        .batch_execute("delete from flowgate.requeued_task")
        .await
        .unwrap();
    assert_eq!(text(&client, REQUEUE).await, "1");
    work_off(&client).await;
    assert_eq!(
        text(&client, "select status from pgflow.runs").await,
        "completed"
    );
}

#[tokio::test]
async fn a_task_whose_message_is_gone_gets_a_new_one() {
    let (_db, client) = with_flow("select pgflow.add_step('f', 's')").await;
    start_run(&client).await;
    start_tasks(&client, WORKER).await;
    started_ago(&client, 100).await;
    client.batch_execute("delete from pgmq.q_f").await.unwrap();
    assert_eq!(text(&client, REQUEUE).await, "1");
    let fits = "select m.message = jsonb_build_object('flow_slug', 'f', 'run_id', t.run_id, 'step_slug', 's', 'task_index', 0)
        from pgflow.step_tasks as t join pgmq.q_f as m on m.msg_id = t.message_id";
    assert_eq!(text(&client, fits).await, "t");

    // The queue was dropped, and the new one gave the number to somebody else's message.
    assert_eq!(start_tasks(&client, WORKER).await, "1");
    started_ago(&client, 100).await;
    let reused = "select pgmq.drop_queue('f'); select pgmq.create('f');
        insert into pgmq.q_f (msg_id, vt, message) overriding system value
            select message_id, now() + interval '1 hour', '{\"theirs\": 1}' from pgflow.step_tasks;
        select setval(pg_get_serial_sequence('pgmq.q_f', 'msg_id'), 100)";
    client.batch_execute(reused).await.unwrap();
    assert_eq!(text(&client, REQUEUE).await, "1");
    assert_eq!(text(&client, fits).await, "t");
    assert_eq!(
        text(
            &client,
            "select count(*) from pgmq.q_f where vt > now() and message ? 'theirs'"
        )
        .await,
        "1"
    );
    // No queue at all: nothing to be done, and no error.
    start_tasks(&client, WORKER).await;
    started_ago(&client, 100).await;
    client
        .batch_execute("select pgmq.drop_queue('f')")
        .await
        .unwrap();
    assert_eq!(text(&client, REQUEUE).await, "0");
}

#[tokio::test]
async fn tasks_of_a_failed_run_stay_as_they_are() {
    let steps = "select pgflow.add_step('f', 'bad', max_attempts => 1); select pgflow.add_step('f', 'good')";
    let (_db, client) = with_flow(steps).await;
    let run = start_run(&client).await;
    start_tasks(&client, WORKER).await;
    text(
        &client,
        &format!("select pgflow.fail_task('{run}', 'bad', 0, 'no')"),
    )
    .await;
    started_ago(&client, 1000).await;
    assert_eq!(text(&client, REQUEUE).await, "0");
    assert_eq!(text(&client, TASKS).await, "bad:0 failed, good:0 started");
    assert_eq!(text(&client, "select count(*) from pgmq.q_f").await, "0");
}

#[tokio::test]
async fn a_call_puts_back_no_more_than_it_was_asked_to() {
    let (_db, client) = with_flow("select pgflow.add_step('f', 'm', step_type => 'map')").await;
    let start = "select 1 from pgflow.start_flow('f', (select jsonb_agg(i) from generate_series(1, 25) as i))";
    text(&client, start).await;
    assert_eq!(start_tasks(&client, WORKER).await, "25");
    started_ago(&client, 100).await;
    // Half of them to be found by their messages, half without.
    client
        .batch_execute("delete from pgmq.q_f where msg_id % 2 = 0")
        .await
        .unwrap();
    for back in ["10", "10", "5", "0"] {
        assert_eq!(
            text(&client, "select flowgate.requeue_stalled_tasks(10)").await,
            back
        );
    }
    work_off(&client).await;
    assert_eq!(
        text(&client, "select status from pgflow.runs").await,
        "completed"
    );
    assert_eq!(text(&client, "select count(*) from pgmq.q_f").await, "0");
}

#[tokio::test]
async fn requeuing_waits_for_nobody() {
    let (db, client) = with_flow("select pgflow.add_step('f', 's')").await;
    let run = start_run(&client).await;
    start_tasks(&client, WORKER).await;
    started_ago(&client, 100).await;
    client
        .batch_execute("set lock_timeout = '100ms'")
        .await
        .unwrap();
    let other = db.connect().await;
    // Completed by somebody right now; its message read by somebody right now.
    for holding in [
        format!("select pgflow.complete_task('{run}', 's', 0, '1')"),
        "select from pgmq.q_f for update".to_owned(),
    ] {
        other
            .batch_execute(&format!("begin; {holding}"))
            .await
            .unwrap();
        assert_eq!(text(&client, REQUEUE).await, "0", "{holding}");
        other.batch_execute("rollback").await.unwrap();
    }
    // A new message only where the run is not about to fail: whoever fails it would not archive that one.
    client.batch_execute("delete from pgmq.q_f").await.unwrap();
    other
        .batch_execute("begin; select from pgflow.runs for no key update")
        .await
        .unwrap();
    assert_eq!(text(&client, REQUEUE).await, "0");
    other.batch_execute("rollback").await.unwrap();
    assert_eq!(text(&client, REQUEUE).await, "1");
}

#[tokio::test]
async fn task_level_signals_tell_a_requeue_from_a_retry() {
    let (_db, client) = with_flow("select pgflow.add_step('f', 's', base_delay => 0)").await;
    text(&client, "select flowgate.set_task_events(true)").await;
    let run = start_run(&client).await;
    start_tasks(&client, WORKER).await;
    text(
        &client,
        &format!("select pgflow.fail_task('{run}', 's', 0, 'no')"),
    )
    .await;
    start_tasks(&client, WORKER).await;
    started_ago(&client, 100).await;
    text(&client, REQUEUE).await;
    let told = "select string_agg(payload ->> 'event_type' || ' ' || (payload ->> 'attempts_count'), ', ' order by id)
        from flowgate.event where event like 'task:%'";
    assert_eq!(
        text(&client, told).await,
        "task:started 1, task:retrying 1, task:started 2, task:requeued 2"
    );
}

#[tokio::test]
async fn where_pgflow_requeues_itself_ours_keeps_out_of_it() {
    let (_db, client) = with_flow("select pgflow.add_step('f', 's')").await;
    start_run(&client).await;
    start_tasks(&client, WORKER).await;
    started_ago(&client, 100).await;
    let theirs =
        "create function pgflow.requeue_stalled_tasks() returns integer language sql as 'select 7'";
    client.batch_execute(theirs).await.unwrap();
    assert_eq!(text(&client, REQUEUE).await, "0");
    assert_eq!(text(&client, TASKS).await, "s:0 started");
}

/// Workers that start, complete and fail tasks, while others declare what is started stalled and put it back.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_or_done_twice_while_tasks_are_requeued_under_their_workers() {
    const RUNS: usize = 30;
    let steps = "select pgflow.add_step('f', 'm', step_type => 'map', max_attempts => 1000, base_delay => 0);
                 select pgflow.add_step('f', 'end', '{m}', max_attempts => 1000, base_delay => 0)";
    let (db, client) = with_flow(steps).await;
    for _ in 0..RUNS {
        text(
            &client,
            "select run_id from pgflow.start_flow('f', '[1, 2, 3, 4, 5]')",
        )
        .await;
    }
    let open = "select count(*) from pgflow.runs where status = 'started'";
    let workers = (0..4).map(async |worker: usize| {
        let client = db.connect().await;
        let mut round = 0;
        while text(&client, open).await != "0" {
            let start = format!(
                "select run_id, step_slug, task_index from pgflow.start_tasks('f',
                    array(select msg_id from pgmq.read('f', 0, 3)), '{WORKER}')"
            );
            for row in client.query(&start, &[]).await.unwrap() {
                let (step, index): (String, i32) = (row.get(1), row.get(2));
                let run: uuid::Uuid = row.get(0);
                round += 1;
                let end = match (round + worker) % 5 {
                    // Died.
                    0 => continue,
                    1 => format!("select pgflow.fail_task('{run}', '{step}', {index}, 'no')"),
                    _ => format!(
                        "select pgflow.complete_task('{run}', '{step}', {index}, '{index}')"
                    ),
                };
                client.batch_execute(&end).await.unwrap();
            }
        }
    });
    let keepers = (0..2).map(async |_keeper: usize| {
        let client = db.connect().await;
        let age = "update pgflow.step_tasks set queued_at = now() - interval '1 day', started_at = now() - interval '100 s'
            where (run_id, step_slug, task_index) in (select t.run_id, t.step_slug, t.task_index
                from pgflow.step_tasks as t where t.status = 'started' for no key update skip locked) and status = 'started'";
        let mut requeued = 0;
        while text(&client, open).await != "0" {
            client.batch_execute(age).await.unwrap();
            requeued += text(&client, REQUEUE).await.parse::<usize>().unwrap();
            // Or the unlucky ones are given up.
            let forgive = "update flowgate.requeued_task set requeued_count = 0 where ctid = any (array(
                select ctid from flowgate.requeued_task for update skip locked))";
            client.batch_execute(forgive).await.unwrap();
        }
        requeued
    });
    let (_ended, requeued) = tokio::time::timeout(PATIENCE * 2, async {
        tokio::join!(join_all(workers), join_all(keepers))
    })
    .await
    .expect("all runs end");
    assert!(requeued.iter().sum::<usize>() > 0);
    assert_eq!(
        text(
            &client,
            "select string_agg(distinct status, ' ') from pgflow.runs"
        )
        .await,
        "completed"
    );
    assert_eq!(text(&client, "select count(*) from pgmq.q_f").await, "0");
    let outputs = "select count(*) from pgflow.step_tasks where step_slug = 'm' and output <> to_jsonb(task_index)";
    assert_eq!(text(&client, outputs).await, "0");
    let once = "select string_agg(distinct n::text, ' ') from (
        select count(*) as n from flowgate.event group by topic, event) as told";
    assert_eq!(text(&client, once).await, "1");
}

#[tokio::test]
async fn pruning_takes_what_has_ended_long_ago_and_nothing_else() {
    let steps =
        "select pgflow.add_step('f', 's', max_attempts => 1); select pgflow.add_step('f', 't')";
    let (_db, client) = with_flow(steps).await;
    let done = start_run(&client).await;
    work_off(&client).await;
    let failed = start_run(&client).await;
    start_tasks(&client, WORKER).await;
    text(
        &client,
        &format!("select pgflow.fail_task('{failed}', 's', 0, 'no')"),
    )
    .await;
    // Nothing should have left this; if something did, it goes too.
    let left = "insert into pgmq.q_f (msg_id, vt, message) overriding system value
        select message_id, now(), jsonb_build_object('run_id', run_id) from pgflow.step_tasks where status = 'failed'";
    client.batch_execute(left).await.unwrap();
    let lately = start_run(&client).await;
    text(&client, &format!("update pgflow.runs set started_at = now() - interval '40 days' where run_id = '{lately}'")).await;
    work_off(&client).await;
    let waiting = start_run(&client).await;
    for run in [&done, &failed, &waiting] {
        ran_ago(&client, run, "31 days").await;
    }
    assert_eq!(pruned(&client, "'32 days'").await, "0 0 0");
    assert_eq!(pruned(&client, "'30 days'").await, "2 0 0");
    assert_eq!(pruned(&client, "'30 days'").await, "0 0 0");
    for table in ["runs", "step_states", "step_tasks"] {
        let left = format!(
            "select string_agg(distinct run_id::text, ' ' order by run_id::text) from pgflow.{table}"
        );
        let mut expected = [lately.as_str(), &waiting];
        expected.sort_unstable();
        assert_eq!(text(&client, &left).await, expected.join(" "), "{table}");
    }
    let messages = "select count(*), string_agg(distinct message ->> 'run_id', ' ') from pgmq.q_f";
    let row = client.query_one(messages, &[]).await.unwrap();
    assert_eq!(
        (row.get::<_, i64>(0), row.get::<_, String>(1)),
        (2, waiting)
    );
    // It goes on.
    work_off(&client).await;
    assert_eq!(
        text(
            &client,
            "select string_agg(distinct status, ' ') from pgflow.runs"
        )
        .await,
        "completed"
    );
}

#[tokio::test]
async fn a_batch_is_small_in_runs_and_in_tasks() {
    let (_db, client) = with_flow("select pgflow.add_step('f', 'm', step_type => 'map')").await;
    for tasks in [0, 1, 2, 3, 4, 12, 25, 13] {
        let start = format!(
            "select run_id from pgflow.start_flow('f', (select coalesce(jsonb_agg(i), '[]') from generate_series(1, {tasks}) as i))"
        );
        let run = text(&client, &start).await;
        work_off(&client).await;
        ran_ago(&client, &run, &format!("{} days", 100 - tasks)).await;
    }
    // Of two at most, with 20 tasks at most; the oldest whatever it has. In order of age: 0, 1, 2, 3, 4, 12, 13 and 25 tasks.
    for runs in [2, 2, 2, 1, 1, 0] {
        let now = pruned(&client, "'7 days', 2").await;
        assert_eq!(
            now.split(' ').next(),
            Some(runs.to_string().as_str()),
            "{now}"
        );
        if runs == 0 {
            assert_eq!(now, "0 0 0", "archived today, as far as pgmq knows");
        }
    }
}

#[tokio::test]
async fn archived_messages_and_silent_workers_are_pruned_by_their_own_age() {
    let (_db, client) = with_flow("select pgflow.add_step('f', 'm', step_type => 'map')").await;
    let start = "select 1 from pgflow.start_flow('f', (select jsonb_agg(i) from generate_series(1, 25) as i))";
    text(&client, start).await;
    work_off(&client).await;
    start_run(&client).await;
    assert_eq!(start_tasks(&client, WORKER).await, "2");
    let age = format!(
        "update pgmq.a_f set archived_at = now() - interval '8 days' where msg_id <= 23;
         update pgflow.workers set started_at = now() - interval '9 days',
             last_heartbeat_at = now() - interval '8 days' where worker_id = '{WORKER}'"
    );
    client.batch_execute(&age).await.unwrap();
    for expected in ["0 20 0", "0 3 0", "0 0 1", "0 0 0"] {
        assert_eq!(pruned(&client, "'7 days', 2").await, expected);
    }
    assert_eq!(text(&client, "select count(*) from pgmq.a_f").await, "2");
    assert_eq!(
        text(&client, "select worker_id from pgflow.workers").await,
        OTHER
    );
    // Its tasks outlive it.
    assert_eq!(
        text(&client, "select count(*) from pgflow.step_tasks where status = 'started' and last_worker_id is null").await,
        "2"
    );
}

#[tokio::test]
async fn pruning_waits_for_nobody() {
    let (db, client) = with_flow("select pgflow.add_step('f', 's', max_attempts => 1)").await;
    let mut runs = Vec::new();
    for _ in 0..3 {
        runs.push(start_run(&client).await);
        work_off(&client).await;
    }
    for run in &runs {
        ran_ago(&client, run, "10 days").await;
    }
    let other = db.connect().await;
    let late = format!(
        "begin; select pgflow.complete_task('{}', 's', 0, '2'); select from pgflow.runs where run_id = '{}' for update",
        runs[0], runs[1]
    );
    other.batch_execute(&late).await.unwrap();
    client
        .batch_execute("set lock_timeout = '100ms'")
        .await
        .unwrap();
    // A late callback holds nothing.
    assert_eq!(pruned(&client, "'7 days'").await, "2 0 0");
    other.batch_execute("commit").await.unwrap();
    assert_eq!(pruned(&client, "'7 days'").await, "1 0 0");
    // And later still: there is nothing to complete.
    let gone = format!(
        "select count(*) from pgflow.complete_task('{}', 's', 0, '2')",
        runs[0]
    );
    assert_eq!(text(&client, &gone).await, "0");
}

#[tokio::test]
async fn pgflows_own_pruning_does_it_all_at_once() {
    let (_db, client) = with_flow("select pgflow.add_step('f', 's')").await;
    for _ in 0..5 {
        let run = start_run(&client).await;
        work_off(&client).await;
        ran_ago(&client, &run, "8 days").await;
    }
    let alive = start_run(&client).await;
    let age = "update pgmq.a_f set archived_at = now() - interval '8 days';
               update pgflow.workers set last_heartbeat_at = now() - interval '8 days'";
    client.batch_execute(age).await.unwrap();
    let prune = "select pgflow.prune_data_older_than(make_interval(days => 7))";
    client.batch_execute(prune).await.unwrap();
    let left = "select concat_ws(' ', (select count(*) from pgflow.workers), (select count(*) from pgmq.a_f),
        (select count(*) from pgflow.step_tasks), (select string_agg(run_id::text, ' ') from pgflow.runs))";
    assert_eq!(text(&client, left).await, format!("0 0 1 {alive}"));
    for wrong in ["interval '-1 day'", "null"] {
        let wrong = format!("select pgflow.prune_data_older_than({wrong})");
        assert_eq!(
            sqlstate(try_text(&client, &wrong).await),
            "22023",
            "{wrong}"
        );
    }
}

#[tokio::test]
async fn a_role_with_no_other_right_may_be_let_to_maintain() {
    let (db, client) = with_flow("select pgflow.add_step('f', 's')").await;
    let old = start_run(&client).await;
    work_off(&client).await;
    ran_ago(&client, &old, "2 days").await;
    let run = start_run(&client).await;
    start_tasks(&client, WORKER).await;
    started_ago(&client, 100).await;
    let role = format!("keeper_{}", db.name);
    client
        .batch_execute(&format!("create role {role} login"))
        .await
        .unwrap();
    let url = db.primary_url.replace("postgres@", &format!("{role}@"));
    let keeper = connect(&url).await;
    let calls = [
        "select flowgate.ensure_partitions()",
        "select flowgate.drop_partitions('1 day')",
        "select flowgate.forget_topics('1 day')",
        "select flowgate.stalled_tasks()",
        "select flowgate.prune('1 day')",
        REQUEUE,
    ];
    for call in calls {
        assert_eq!(sqlstate(try_text(&keeper, call).await), "42501", "{call}");
    }
    text(
        &client,
        &format!("select flowgate.grant_maintenance('{role}')"),
    )
    .await;
    // Something to do for each.
    client.batch_execute(AGED_OUTBOX).await.unwrap();
    for call in calls {
        text(&keeper, call).await;
    }
    assert_eq!(text(&client, TASKS).await, "s:0 queued");
    let partitions = "select to_regclass('flowgate.event_20200101') is null and count(*) >= 8
        from pg_inherits where inhparent = 'flowgate.event'::regclass";
    assert_eq!(text(&client, partitions).await, "t");
    for call in [
        &format!("select pgflow.complete_task('{run}', 's', 0, '1')"),
        "select from flowgate.event",
    ] {
        assert_eq!(sqlstate(try_text(&keeper, call).await), "42501", "{call}");
    }
}

// `serve`.

fn requeue_often(config: &mut Config) {
    config.maintenance.requeue = Some(Duration::from_millis(100));
}

#[tokio::test]
async fn a_dead_workers_task_is_completed_by_another_without_anybody_doing_anything() {
    let (db, client) = with_flow("select pgflow.add_step('f', 's')").await;
    let proxy = Proxy::without_replica(&db, requeue_often).await;
    let run = start_run(&client).await;
    let doomed = proxy.connect().await;
    assert_eq!(start_tasks(&doomed, WORKER).await, "1");
    drop(doomed);
    started_ago(&client, 91).await;
    let worker = proxy.connect().await;
    let poll = format!(
        "select count(*) from pgflow.start_tasks('f',
            array(select msg_id from pgflow.read_with_poll('f', 2, 10, 2, 50)), '{OTHER}')"
    );
    wait_until("the task comes back", PATIENCE, async || {
        text(&worker, &poll).await == "1"
    })
    .await;
    text(
        &worker,
        &format!("select pgflow.complete_task('{run}', 's', 0, '1')"),
    )
    .await;
    assert_eq!(
        text(&client, "select status from pgflow.runs").await,
        "completed"
    );
    assert_eq!(proxy.metric("flowgate_maintenance_tasks_requeued_total"), 1);
    assert_eq!(proxy.metric("flowgate_maintenance_leader"), 1);
    assert!(proxy.metric("flowgate_maintenance_success_timestamp_seconds{chore=\"requeue\"}") > 0);
    proxy.shut_down().await;
}

#[tokio::test]
async fn tasks_given_up_show_in_the_metrics() {
    let (db, client) = with_flow("select pgflow.add_step('f', 's')").await;
    start_run(&client).await;
    start_tasks(&client, WORKER).await;
    started_ago(&client, 100).await;
    client
        .batch_execute("insert into flowgate.requeued_task select run_id, 's', 0, 'f', 3, now() from pgflow.runs")
        .await
        .unwrap();
    let proxy = Proxy::without_replica(&db, requeue_often).await;
    wait_until("it is given up", PATIENCE, async || {
        proxy.metric("flowgate_maintenance_tasks_stalled") == 1
    })
    .await;
    assert_eq!(proxy.metric("flowgate_maintenance_tasks_requeued_total"), 0);
    proxy.shut_down().await;
}

#[tokio::test]
async fn requeuing_can_be_switched_off() {
    let (db, client) = with_flow("select pgflow.add_step('f', 's')").await;
    start_run(&client).await;
    start_tasks(&client, WORKER).await;
    started_ago(&client, 1000).await;
    let proxy = Proxy::without_replica(&db, |config| config.maintenance.requeue = None).await;
    wait_until("the outbox was looked after", PATIENCE, async || {
        proxy.metric("flowgate_maintenance_success_timestamp_seconds{chore=\"outbox\"}") > 0
    })
    .await;
    assert_eq!(text(&client, TASKS).await, "s:0 started");
    assert_eq!(
        proxy.metric("flowgate_maintenance_success_timestamp_seconds{chore=\"requeue\"}"),
        0
    );
    proxy.shut_down().await;
}

#[tokio::test]
async fn one_of_two_proxies_maintains_and_the_other_takes_over_when_it_stops() {
    let db = fresh_database().await;
    let first = Proxy::without_replica(&db, requeue_often).await;
    wait_until("the first one leads", PATIENCE, async || {
        first.metric("flowgate_maintenance_leader") == 1
    })
    .await;
    let second = Proxy::without_replica(&db, requeue_often).await;
    let direct = db.connect().await;
    let asked = "select count(*) from pg_stat_activity where datname = current_database()
        and application_name = 'flowgate maintenance' and query like '%pg_try_advisory_lock%'";
    wait_until("the second one asks", PATIENCE, async || {
        text(&direct, asked).await == "1"
    })
    .await;
    assert_eq!(second.metric("flowgate_maintenance_leader"), 0);
    assert_eq!(
        second.metric("flowgate_maintenance_success_timestamp_seconds{chore=\"outbox\"}"),
        0
    );
    first.shut_down().await;
    wait_until("the second one leads", PATIENCE, async || {
        second.metric("flowgate_maintenance_leader") == 1
    })
    .await;
    wait_until("it works", PATIENCE, async || {
        second.metric("flowgate_maintenance_success_timestamp_seconds{chore=\"outbox\"}") > 0
    })
    .await;
    second.shut_down().await;
    wait_until("nobody holds the lock", PATIENCE, async || {
        text(
            &direct,
            "select count(*) from pg_locks where locktype = 'advisory'
            and database = (select oid from pg_database where datname = current_database())",
        )
        .await
            == "0"
    })
    .await;
}

#[tokio::test]
async fn the_outbox_is_turned_over() {
    let db = fresh_database().await;
    let client = db.connect().await;
    client.batch_execute(AGED_OUTBOX).await.unwrap();
    let proxy = Proxy::without_replica(&db, |_| {}).await;
    wait_until("it is done", PATIENCE, async || {
        proxy.metric("flowgate_maintenance_success_timestamp_seconds{chore=\"outbox\"}") > 0
    })
    .await;
    assert_eq!(
        proxy.metric("flowgate_maintenance_partitions_made_total"),
        1
    );
    assert_eq!(
        proxy.metric("flowgate_maintenance_partitions_dropped_total"),
        1
    );
    assert_eq!(
        text(&client, "select to_regclass('flowgate.event_20200101')").await,
        "null"
    );
    assert_eq!(
        text(
            &client,
            "select string_agg(topic, ' ' order by topic) from flowgate.topic"
        )
        .await,
        "else pgflow:run:open"
    );
    proxy.shut_down().await;
}

#[tokio::test]
async fn old_runs_are_pruned_only_where_the_configuration_says_so() {
    let (db, client) = with_flow("select pgflow.add_step('f', 's')").await;
    let run = start_run(&client).await;
    work_off(&client).await;
    ran_ago(&client, &run, "800 days").await;
    let proxy = Proxy::without_replica(&db, requeue_often).await;
    wait_until("all else is done", PATIENCE, async || {
        ["requeue", "outbox"].iter().all(|chore| {
            proxy.metric(&format!(
                "flowgate_maintenance_success_timestamp_seconds{{chore=\"{chore}\"}}"
            )) > 0
        })
    })
    .await;
    assert_eq!(text(&client, "select count(*) from pgflow.runs").await, "1");
    proxy.shut_down().await;

    let proxy = Proxy::without_replica(&db, |config| {
        config.maintenance.prune_after = Some(Duration::from_secs(90 * 86_400));
    })
    .await;
    wait_until("it is pruned", PATIENCE, async || {
        proxy.metric("flowgate_maintenance_runs_pruned_total") == 1
    })
    .await;
    assert_eq!(text(&client, "select count(*) from pgflow.runs").await, "0");
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_database_without_the_sql_is_served_and_maintained_once_it_has_it() {
    let db = empty_database().await;
    let proxy = Proxy::without_replica(&db, requeue_often).await;
    let direct = db.connect().await;
    let has_asked = "select count(*) from pg_stat_activity where datname = current_database() \
                     and application_name = 'flowgate maintenance' and query like '%pg_try_advisory_lock%' and state = 'idle'";
    wait_until("it has asked", PATIENCE, async || {
        text(&direct, has_asked).await == "1"
    })
    .await;
    assert_eq!(text(&proxy.connect().await, "select 1").await, "1");
    let locks = "select count(*) from pg_locks where locktype = 'advisory' \
                 and database = (select oid from pg_database where datname = current_database())";
    assert_eq!(text(&direct, locks).await, "0");
    assert_eq!(proxy.metric("flowgate_maintenance_leader"), 0);
    install(&db.url(), InstallOptions::default()).await.unwrap();
    wait_until("it works", PATIENCE, async || {
        proxy.metric("flowgate_maintenance_success_timestamp_seconds{chore=\"requeue\"}") > 0
    })
    .await;
    for chore in ["requeue", "outbox", "prune"] {
        assert_eq!(
            proxy.metric(&format!(
                "flowgate_maintenance_errors_total{{chore=\"{chore}\"}}"
            )),
            0
        );
    }
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_pgflow_of_somebody_elses_requeues_by_its_own_function_unless_pg_cron_does() {
    let db = empty_database().await;
    let client = db.connect().await;
    let theirs = "create schema pgflow; create table pgflow.called (at timestamptz default clock_timestamp());
        create function pgflow.requeue_stalled_tasks() returns integer language sql
            as 'insert into pgflow.called default values; select 2'";
    client.batch_execute(theirs).await.unwrap();
    install(&db.url(), InstallOptions::default()).await.unwrap();
    let proxy = Proxy::without_replica(&db, |config| {
        requeue_often(config);
        config.maintenance.prune_after = Some(Duration::from_secs(3600));
    })
    .await;
    wait_until("it is called", PATIENCE, async || {
        proxy.metric("flowgate_maintenance_tasks_requeued_total") >= 4
    })
    .await;
    // As pg_cron has it; of another database, another job and a stopped one first.
    let cron = "create schema cron; create table cron.job (jobid bigint, command text, database text, active boolean);
        insert into cron.job values (1, 'select pgflow.requeue_stalled_tasks()', 'other', true),
            (2, 'select pgflow.requeue_stalled_tasks()', current_database(), false), (3, 'vacuum', current_database(), true)";
    client.batch_execute(cron).await.unwrap();
    let before = proxy.metric("flowgate_maintenance_tasks_requeued_total");
    wait_until("it goes on being called", PATIENCE, async || {
        proxy.metric("flowgate_maintenance_tasks_requeued_total") > before + 4
    })
    .await;
    client
        .batch_execute("update cron.job set active = true")
        .await
        .unwrap();
    // A call may have been under way; after it there is none, while the schedule goes on looking.
    let looks = "select xact_commit from pg_stat_database where datname = current_database()";
    let count = "select count(*) from pgflow.called";
    let mut calls = text(&client, count).await;
    let mut seen: i64 = text(&client, looks).await.parse().unwrap();
    wait_until("it looks again and does not call", PATIENCE, async || {
        let (now, look) = (
            text(&client, count).await,
            text(&client, looks).await.parse::<i64>().unwrap(),
        );
        if now != calls {
            (calls, seen) = (now, look);
        }
        look > seen + 30
    })
    .await;
    assert_eq!(
        proxy.metric("flowgate_maintenance_errors_total{chore=\"requeue\"}"),
        0
    );
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_control_role_without_the_right_is_an_error_that_is_counted_and_ends_with_the_grant() {
    let (db, client) = with_flow("select pgflow.add_step('f', 's')").await;
    let role = format!("control_{}", db.name);
    client
        .batch_execute(&format!("create role {role} login"))
        .await
        .unwrap();
    let url = db.primary_url.replace("postgres@", &format!("{role}@"));
    let proxy = Proxy::before(&url, &[], requeue_often).await;
    wait_until("it is refused", PATIENCE, async || {
        proxy.metric("flowgate_maintenance_errors_total{chore=\"requeue\"}") > 1
    })
    .await;
    text(
        &client,
        &format!("select flowgate.grant_maintenance('{role}')"),
    )
    .await;
    wait_until("it works", PATIENCE, async || {
        proxy.metric("flowgate_maintenance_success_timestamp_seconds{chore=\"requeue\"}") > 0
    })
    .await;
    proxy.shut_down().await;
}
