//! `fail_task`: tries and delays, the failure that is final, and what it ends with it.

use super::{Core, WORKER, lines, run};

#[tokio::test]
async fn a_failed_try_waits_longer_each_time_until_the_tries_are_used_up() {
    let core = Core::new().await;
    core.define("flow f(max_attempts => 4, base_delay => 5)\n a\n b < a")
        .await;
    let id = run(1);
    core.start_flow("f", "{}", 1).await;
    let start = format!("select pgflow.start_tasks('f', '{{1}}', '{WORKER}')");
    for (attempt, delay) in [(1, 10), (2, 20), (3, 40)] {
        core.run(&start).await;
        assert_eq!(core.tasks(1).await, format!("a 0 started {attempt}"));
        let fail = format!(
            "select pgflow.fail_task(run_id => '{id}', step_slug => 'a', task_index => 0, error_message => 'try {attempt}')"
        );
        core.visible_in(&fail, "f", "true", delay).await;
        let row = "select status, attempts_count, error_message, started_at, failed_at, completed_at, output, message_id,
                   last_worker_id is not null from pgflow.step_tasks";
        assert_eq!(
            core.show(row).await,
            format!("queued {attempt} try {attempt} ∅ ∅ ∅ ∅ 1 t")
        );
        // Nobody else hears of it.
        assert_eq!(
            core.states(1).await,
            "started 2\na started 1 0 1\nb created ∅ 1 1"
        );
        let error = "select error_message, failed_at from pgflow.step_states where step_slug = 'a'";
        assert_eq!(core.show(error).await, "∅ ∅");
        assert_eq!(core.events(1).await, "run:started step:a:started");
    }
    core.run(&start).await;
    let row = format!(
        "select flow_slug, run_id, step_slug, message_id, task_index, status, attempts_count, error_message, output,
         completed_at, failed_at = now(), started_at is not null, last_worker_id
         from pgflow.fail_task('{id}', 'a', 0, 'the last')"
    );
    assert_eq!(
        core.show(&row).await,
        format!("f {id} a 1 0 failed 4 the last ∅ ∅ t t {WORKER}")
    );
    assert_eq!(
        core.states(1).await,
        "failed 2\na failed 1 0 1\nb created ∅ 1 1"
    );
    let ends = "select s.error_message, s.failed_at = t.failed_at, r.failed_at = t.failed_at, r.completed_at, r.output
                from pgflow.runs as r join pgflow.step_states as s using (run_id) join pgflow.step_tasks as t using (run_id, step_slug)";
    assert_eq!(core.show(ends).await, "the last t t ∅ ∅");
    assert_eq!(core.queue("f").await, "");
    assert_eq!(core.archive("f").await, "a 0");
    assert_eq!(
        core.events(1).await,
        "run:started step:a:started step:a:failed run:failed"
    );
}

#[tokio::test]
async fn a_steps_own_options_go_before_the_flows() {
    let core = Core::new().await;
    core.define(
        "flow f(max_attempts => 2, base_delay => 7)
         own (max_attempts => 3, base_delay => 1)
         flows
         zero (max_attempts => 5, base_delay => 0)",
    )
    .await;
    let id = run(1);
    core.start_flow("f", "{}", 1).await;
    core.take("f").await;
    for (step, delay) in [("own", 2), ("flows", 14), ("zero", 0)] {
        let fail = format!("select pgflow.fail_task('{id}', '{step}', 0, 'no')");
        let of_step = format!("message ->> 'step_slug' = '{step}'");
        core.visible_in(&fail, "f", &of_step, delay).await;
    }
    let again =
        format!("select pgflow.start_tasks('f', array(select msg_id from pgmq.q_f), '{WORKER}')");
    core.run(&again).await;
    assert_eq!(core.fail(1, "zero", 0, "no").await, "queued");
    assert_eq!(core.fail(1, "own", 0, "no").await, "queued");
    assert_eq!(core.fail(1, "flows", 0, "no").await, "failed");

    // 0 and 1: the first failure is the last.
    for (n, tries) in [(2, 0), (3, 1)] {
        core.define(&format!("flow g{tries}\n a (max_attempts => {tries})\n flow h{tries}(max_attempts => {tries})\n a"))
            .await;
        for (n, flow) in [(n, format!("g{tries}")), (n + 10, format!("h{tries}"))] {
            core.start_flow(&flow, "{}", n).await;
            core.take(&flow).await;
            assert_eq!(core.fail(n, "a", 0, "no").await, "failed");
            assert_eq!(core.states(n).await, "failed 1\na failed 1 0 1");
        }
    }
}

#[tokio::test]
async fn a_delay_beyond_counting_is_the_longest_there_is() {
    let longest = i64::from(i32::MAX);
    let delay = |base: i64, attempts: u32| (base << attempts.min(31)).min(longest);
    for_many_attempts("a (base_delay => 5)", |attempts| delay(5, attempts)).await;
    for_many_attempts("a (base_delay => 2147483647)", |_| longest).await;
}

#[tokio::test]
async fn no_delay_stays_no_delay_however_many_attempts() {
    for_many_attempts("a (base_delay => 0)", |_| 0).await;
}

/// Fails the task of `step` at attempts few and many, and sees that it waits for as many seconds as `delay` says.
async fn for_many_attempts(step: &str, delay: impl Fn(u32) -> i64) {
    let core = Core::new().await;
    core.define(&format!("flow f(max_attempts => 1000000)\n {step}"))
        .await;
    let id = run(1);
    core.start_flow("f", "{}", 1).await;
    for attempts in [27, 28, 29, 30, 31, 32, 62, 63, 64, 500, 999_998] {
        core.run(&format!(
            "update pgflow.step_tasks set attempts_count = {attempts} - 1;
             select pgflow.start_tasks('f', '{{1}}', '{WORKER}')"
        ))
        .await;
        let fail = format!("select pgflow.fail_task('{id}', 'a', 0, 'no')");
        core.visible_in(&fail, "f", "true", delay(attempts)).await;
        assert_eq!(core.tasks(1).await, format!("a 0 queued {attempts}"));
    }
}

#[tokio::test]
async fn a_task_that_was_never_started_stays_queued_and_is_put_off() {
    let core = Core::new().await;
    core.define("flow f(max_attempts => 1, base_delay => 5)\n a")
        .await;
    let id = run(1);
    core.start_flow("f", "{}", 1).await;
    let fail = format!("select pgflow.fail_task('{id}', 'a', 0, 'no')");
    core.visible_in(&fail, "f", "true", 5).await;
    assert_eq!(core.tasks(1).await, "a 0 queued 0");
    assert_eq!(
        core.fail(1, "a", 0, "no").await,
        "queued",
        "and its row comes back"
    );
    assert_eq!(core.states(1).await, "started 1\na started 1 0 1");
    assert_eq!(core.events(1).await, "run:started step:a:started");
    for call in [
        format!("select pgflow.fail_task('{id}', 'a', 1, 'no')"),
        format!("select pgflow.fail_task('{id}', 'nowhere', 0, 'no')"),
        format!("select pgflow.fail_task('{}', 'a', 0, 'no')", run(9)),
    ] {
        assert_eq!(core.show(&call).await, "", "{call}");
    }
    assert_eq!(core.queue("f").await, "a 0");
}

#[tokio::test]
async fn a_final_failure_takes_every_message_of_its_run_and_no_other() {
    let core = Core::new().await;
    core.define(
        "flow f(max_attempts => 1)
         map m
         other
         queued
         done
         later < other",
    )
    .await;
    core.start_flow("f", "[1, 2, 3]", 1).await;
    core.start_flow("f", "[]", 2).await;
    let id = run(1);
    let start = format!(
        "select pgflow.start_tasks('f', array(select msg_id from pgmq.q_f where message ->> 'run_id' = '{id}' and
         message ->> 'step_slug' <> 'queued' and message ->> 'task_index' <> '2'), '{WORKER}')"
    );
    core.run(&start).await;
    core.complete(1, "done", 0, "1").await;
    assert_eq!(core.fail(1, "m", 0, "broken").await, "failed");

    // Their rows stay what they were; so do the other steps.
    let expected = lines(
        "done 0 completed 1
         m 0 failed 1
         m 1 started 1
         m 2 queued 0
         other 0 started 1
         queued 0 queued 0",
    );
    assert_eq!(core.tasks(1).await, expected);
    let expected = lines(
        "failed 4
         done completed 0 0 1
         later created ∅ 1 1
         m failed 3 0 3
         other started 1 0 1
         queued started 1 0 1",
    );
    assert_eq!(core.states(1).await, expected);
    assert_eq!(
        core.queue("f").await,
        "done 0, other 0, queued 0",
        "the other run's"
    );
    assert_eq!(
        core.archive("f").await,
        "done 0, m 0, m 1, m 2, other 0, queued 0"
    );
    let said = "run:started step:done:started step:m:started step:other:started step:queued:started \
                step:done:completed step:m:failed run:failed";
    assert_eq!(core.events(1).await, said);

    // Late ones close their own task and nothing else; what never started has nothing to close.
    assert_eq!(core.fail(1, "m", 1, "late").await, "failed");
    assert_eq!(core.fail(1, "other", 0, "late too").await, "failed");
    assert_eq!(core.fail(1, "m", 2, "never").await, "queued");
    assert_eq!(
        core.states(1).await,
        lines(
            "failed 4
         done completed 0 0 1
         later created ∅ 1 1
         m failed 3 0 3
         other started 1 0 1
         queued started 1 0 1",
        )
    );
    let tasks = "select step_slug, task_index, status, error_message, failed_at is not null from pgflow.step_tasks
                 where run_id = '00000000-0000-4000-8000-000000000001' order by 1, 2";
    let expected = lines(
        "done 0 completed ∅ f
         m 0 failed broken t
         m 1 failed late t
         m 2 queued ∅ f
         other 0 failed late too t
         queued 0 queued ∅ f",
    );
    assert_eq!(core.show(tasks).await, expected);
    let errors = format!(
        "select step_slug, error_message from pgflow.step_states where run_id = '{id}' and error_message is not null"
    );
    assert_eq!(core.show(&errors).await, "m broken");
    assert_eq!(core.events(1).await, said);
    let once = "select count(*), count(distinct msg_id) from pgmq.a_f";
    assert_eq!(core.show(once).await, "6 6");
}

#[tokio::test]
async fn a_failure_in_a_run_that_has_failed_ends_its_own_task_only() {
    let core = Core::new().await;
    core.define("flow f(max_attempts => 5)\n a\n b").await;
    core.start_flow("f", "{}", 1).await;
    let id = run(1);
    core.run(&format!(
        "select pgflow.start_tasks('f', array(select message_id from pgflow.step_tasks where step_slug = 'a'), '{WORKER}');
         update pgflow.runs set status = 'failed', failed_at = now()"
    ))
    .await;
    // However many tries it has left.
    let row = format!(
        "select status, error_message, failed_at = now(), attempts_count from pgflow.fail_task('{id}', 'a', 0, 'late')"
    );
    assert_eq!(core.show(&row).await, "failed late t 1");
    assert_eq!(core.archive("f").await, "a 0");
    assert_eq!(
        core.states(1).await,
        "failed 2\na started 1 0 1\nb started 1 0 1"
    );
    let step = "select count(*) from pgflow.step_states where error_message is not null or failed_at is not null";
    assert_eq!(core.show(step).await, "0");
    assert_eq!(
        core.events(1).await,
        "run:started step:a:started step:b:started"
    );
    // A task that was never started is not closed.
    assert_eq!(core.fail(1, "b", 0, "late").await, "queued");
    assert_eq!(core.tasks(1).await, "a 0 failed 1\nb 0 queued 0");
}

#[tokio::test]
async fn what_has_ended_does_not_fail() {
    let core = Core::new().await;
    core.define("flow f(max_attempts => 1)\n a\n b").await;
    core.start_flow("f", "{}", 1).await;
    core.take("f").await;
    core.complete(1, "a", 0, "1").await;
    let everything = "select jsonb_agg(t order by step_slug) from pgflow.step_tasks as t;
                      select jsonb_agg(s order by step_slug) from pgflow.step_states as s;
                      select jsonb_agg(r) from pgflow.runs as r; select jsonb_agg(e order by id) from flowgate.event as e;
                      select jsonb_agg(q) from pgmq.q_f as q; select jsonb_agg(q order by msg_id) from pgmq.a_f as q";
    let before = core.show(everything).await;
    assert_eq!(core.fail(1, "a", 0, "too late").await, "completed");
    assert_eq!(core.show(everything).await, before);

    core.fail(1, "b", 0, "in time").await;
    let before = core.show(everything).await;
    assert_eq!(core.fail(1, "b", 0, "again").await, "failed");
    assert_eq!(core.fail(1, "a", 0, "again").await, "completed");
    assert_eq!(core.show(everything).await, before);
}

#[tokio::test]
async fn a_failure_without_words_is_one_too() {
    let core = Core::new().await;
    core.define("flow f(max_attempts => 2, base_delay => 0)\n a")
        .await;
    let id = run(1);
    core.start_flow("f", "{}", 1).await;
    core.take("f").await;
    let fail = format!("select status, error_message from pgflow.fail_task('{id}', 'a', 0, null)");
    assert_eq!(core.show(&fail).await, "queued ∅");
    core.take("f").await;
    assert_eq!(core.show(&fail).await, "failed ∅");
    let said =
        "select event, payload ? 'error_message', payload -> 'error_message' from flowgate.event
                where event like '%failed' order by seq";
    assert_eq!(
        core.show(said).await,
        "step:a:failed t null\nrun:failed t null"
    );
}
