//! Tasks whose worker has fallen silent: given back to their queue, three times, and then given up.

use super::{Core, WORKER, at_0_14, lines, run};

/// Makes it look as if a task had been started that long ago.
async fn age(core: &Core, which: &str, seconds: u32) {
    core.run(&format!(
        "update pgflow.step_tasks set queued_at = now() - interval '1 day', started_at = now() - interval '{seconds} s'
         where status = 'started' and {which}"
    ))
    .await;
}

async fn requeue(core: &Core) -> String {
    core.show("select pgflow.requeue_stalled_tasks()").await
}

#[tokio::test]
async fn a_task_is_given_back_half_a_minute_after_its_steps_own_timeout() {
    let core = at_0_14().await;
    core.define("flow f(timeout => 60)\n flows\n long(timeout => 600)\n short(timeout => 5)")
        .await;
    core.start_flow("f", "{}", 1).await;
    core.take("f").await;
    assert_eq!(requeue(&core).await, "0");
    for (seconds, given_back) in [
        (34, ""),
        (36, "short"),
        (89, ""),
        (91, "flows"),
        (629, ""),
        (631, "long"),
    ] {
        age(&core, "true", seconds).await;
        let count = if given_back.is_empty() { "0" } else { "1" };
        assert_eq!(requeue(&core).await, count, "{seconds}");
        let now = "select coalesce(string_agg(step_slug, ' '), '') from pgflow.step_tasks where last_requeued_at = (select max(last_requeued_at) from pgflow.step_tasks)";
        if !given_back.is_empty() {
            assert_eq!(core.show(now).await, given_back, "{seconds}");
        }
    }
}

#[tokio::test]
async fn a_task_given_back_is_visible_at_once_and_can_be_started_again() {
    let core = at_0_14().await;
    core.define("flow f\n a\n b < a").await;
    core.start_flow("f", "{}", 1).await;
    core.take("f").await;
    age(&core, "true", 91).await;
    let events = core.events(1).await;
    core.visible_in("select pgflow.requeue_stalled_tasks()", "f", "true", 0)
        .await;
    let row = "select status, attempts_count, started_at, last_worker_id, requeued_count, last_requeued_at is not null,
               permanently_stalled_at, error_message from pgflow.step_tasks";
    assert_eq!(core.show(row).await, "queued 1 ∅ ∅ 1 t ∅ ∅");
    assert_eq!(core.events(1).await, events);
    // The first worker is not dead after all: what it says comes too late.
    assert_eq!(core.complete(1, "a", 0, "\"slow\"").await, "queued");
    assert_eq!(core.take("f").await, "a 0 {}");
    assert_eq!(core.show(row).await, "started 2 LATER".replace("LATER", &core.show("select started_at, last_worker_id, requeued_count, last_requeued_at is not null, permanently_stalled_at, error_message from pgflow.step_tasks").await));
    core.complete(1, "a", 0, "\"second\"").await;
    assert_eq!(core.take("f").await, "b 0 {\"a\": \"second\"}");
}

#[tokio::test]
async fn the_fourth_time_a_task_is_given_up_and_the_run_hangs_for_all_to_see() {
    let core = at_0_14().await;
    core.define("flow f\n a\n b").await;
    core.start_flow("f", "{}", 1).await;
    for time in 1..=3 {
        core.take("f").await;
        age(&core, "step_slug = 'a'", 91).await;
        assert_eq!(requeue(&core).await, "1", "{time}");
    }
    core.take("f").await;
    age(&core, "step_slug = 'a'", 91).await;
    assert_eq!(requeue(&core).await, "0");
    let row = "select status, attempts_count, requeued_count, permanently_stalled_at is not null, started_at is not null, last_worker_id
               from pgflow.step_tasks where step_slug = 'a'";
    assert_eq!(core.show(row).await, format!("started 4 3 t t {WORKER}"));
    assert_eq!(core.queue("f").await, "b 0");
    assert_eq!(core.archive("f").await, "a 0");
    assert_eq!(
        core.states(1).await,
        "started 2\na started 1 0 1\nb started 1 0 1"
    );
    assert_eq!(requeue(&core).await, "0");
    // Whoever has a look may still end it.
    assert_eq!(core.complete(1, "a", 0, "1").await, "completed");
}

#[tokio::test]
async fn only_what_is_started_and_can_go_on_is_given_back() {
    let core = at_0_14().await;
    core.define("flow f(max_attempts => 1)\n a\n b(when_exhausted => 'skip')\n map m(when_exhausted => 'skip')").await;
    core.define("flow empty").await;
    for n in 1..=3 {
        core.start_flow("f", "[1, 2]", n).await;
    }
    core.take("f").await;
    // Of a failed run, of a skipped step, and what has ended.
    core.fail(1, "a", 0, "no").await;
    core.fail(2, "m", 0, "no").await;
    core.complete(2, "a", 0, "1").await;
    age(&core, "true", 9000).await;
    assert_eq!(requeue(&core).await, "5");
    let given_back = "select run_id, step_slug, task_index from pgflow.step_tasks where requeued_count = 1 order by 1, 2, 3";
    let (two, three) = (run(2), run(3));
    assert_eq!(
        core.show(given_back).await,
        lines(&format!(
            "{two} b 0\n{three} a 0\n{three} b 0\n{three} m 0\n{three} m 1"
        ))
    );
    assert_eq!(requeue(&core).await, "0");
}

#[tokio::test]
async fn what_somebody_is_just_ending_is_left_alone() {
    let core = at_0_14().await;
    core.define("flow f\n map m").await;
    core.start_flow("f", "[1, 2]", 1).await;
    core.take("f").await;
    age(&core, "true", 91).await;
    let ending = core.db.connect().await;
    let complete = format!(
        "begin; select pgflow.complete_task('{}', 'm', 0, '1')",
        run(1)
    );
    super::show(&ending, &complete).await;
    assert_eq!(requeue(&core).await, "1");
    super::show(&ending, "commit").await;
    assert_eq!(core.tasks(1).await, "m 0 completed 1\nm 1 queued 1");
    assert_eq!(core.states(1).await, "started 1\nm started 1 0 2");
}

#[tokio::test]
async fn a_queue_that_is_gone_holds_up_nobody() {
    let core = at_0_14().await;
    core.define("flow dropped\n a\nflow f\n a\nflow F\n a")
        .await;
    for (n, flow) in [(1, "dropped"), (2, "f"), (3, "F")] {
        core.start_flow(flow, "{}", n).await;
        core.take(flow).await;
    }
    core.run("select pgmq.drop_queue('dropped')").await;
    age(&core, "true", 91).await;
    // F and f have a queue in common; each finds its own.
    assert_eq!(requeue(&core).await, "2");
}

#[tokio::test]
async fn a_task_started_without_its_message_being_read_is_found_too() {
    let core = at_0_14().await;
    core.define("flow f\n a").await;
    core.start_flow("f", "{}", 1).await;
    core.run("update pgflow.step_tasks set status = 'started', queued_at = now() - interval '1 h', started_at = now() - interval '1 h'")
        .await;
    assert_eq!(core.show("select read_ct from pgmq.q_f").await, "0");
    assert_eq!(requeue(&core).await, "1");
    assert_eq!(core.take("f").await, "a 0 {}");
}

#[tokio::test]
async fn a_task_whose_message_is_lost_gets_a_new_one() {
    let core = at_0_14().await;
    core.define("flow f\n a\n other").await;
    core.start_flow("f", "{}", 1).await;
    core.take("f").await;
    // Made again, the queue counts from 1 again: what is there now belongs to somebody else.
    core.run("select pgmq.drop_queue('f'); select pgmq.create('f')")
        .await;
    core.run("select pgmq.send('f', '{\"not\": \"a task\"}'); select pgmq.send('f', '{\"nor\": \"this\"}')").await;
    age(&core, "step_slug = 'a'", 91).await;
    assert_eq!(requeue(&core).await, "1");
    assert_eq!(core.take("f").await, "a 0 {}");
    assert_eq!(core.tasks(1).await, "a 0 started 2\nother 0 started 1");
    core.complete(1, "a", 0, "1").await;
    let left = "select string_agg(message::text, ' ' order by msg_id) from pgmq.q_f";
    assert_eq!(
        core.show(left).await,
        "{\"not\": \"a task\"} {\"nor\": \"this\"}"
    );
}

#[tokio::test]
async fn a_message_that_somebody_is_reading_leaves_its_task_for_the_next_call() {
    let core = at_0_14().await;
    core.define("flow f\n map m").await;
    core.start_flow("f", "[1, 2]", 1).await;
    core.take("f").await;
    age(&core, "true", 91).await;
    let reader = core.db.connect().await;
    super::show(
        &reader,
        "begin; select from pgmq.q_f where msg_id = 1 for update",
    )
    .await;
    assert_eq!(requeue(&core).await, "1");
    super::show(&reader, "rollback").await;
    assert_eq!(core.tasks(1).await, "m 0 started 1\nm 1 queued 1");
    assert_eq!(requeue(&core).await, "1");
}
