//! Steps whose handler has failed for good, and are skipped, alone or with all that depends on them; late callbacks.

use super::{WORKER, at_0_14, lines, run};

#[tokio::test]
async fn a_failure_that_is_final_skips_the_step_and_the_run_goes_on() {
    let core = at_0_14().await;
    core.define(
        "flow f
         a(max_attempts => 2, base_delay => 0, when_exhausted => 'skip')
         b
         only < a
         both < a, b
         map m < a
         after < m",
    )
    .await;
    let id = run(1);
    core.start_flow("f", "{}", 1).await;
    core.take("f").await;
    // The first try: as ever.
    assert_eq!(core.fail(1, "a", 0, "once").await, "queued");
    assert_eq!(core.take("f").await, "a 0 {}");
    let row = format!(
        "select status, attempts_count, error_message, failed_at is not null, started_at is not null from pgflow.fail_task('{id}', 'a', 0, 'twice')"
    );
    assert_eq!(core.show(&row).await, "failed 2 twice t t");
    assert_eq!(
        core.states(1).await,
        lines(
            "started 4
             a skipped ∅ 0 1
             after started 1 0 1
             b started 1 0 1
             both created ∅ 1 1
             m completed 0 0 0
             only started 1 0 1"
        )
    );
    let step = "select status, skip_reason, error_message, skipped_at = (select failed_at from pgflow.step_tasks where step_slug = 'a'),
                failed_at, completed_at, started_at is not null, output from pgflow.step_states where step_slug = 'a'";
    assert_eq!(
        core.show(step).await,
        "skipped handler_failed twice t ∅ ∅ t ∅"
    );
    assert_eq!(
        core.events(1).await,
        "run:started step:a:started step:b:started step:a:skipped step:m:completed step:after:started step:only:started"
    );
    let at = core
        .show("select to_jsonb(skipped_at) from pgflow.step_states where step_slug = 'a'")
        .await;
    assert_eq!(
        core.show("select payload from flowgate.event where event = 'step:a:skipped'")
            .await,
        format!(
            "{{\"run_id\": \"{id}\", \"status\": \"skipped\", \"step_slug\": \"a\", \"event_type\": \"step:skipped\", \"skipped_at\": {at}, \
             \"skip_reason\": \"handler_failed\", \"error_message\": \"twice\"}}"
        )
    );
    assert_eq!(core.archive("f").await, "a 0");
    core.complete(1, "b", 0, "2").await;
    assert_eq!(
        core.take("f").await,
        "after 0 {\"m\": []}\nboth 0 {\"b\": 2}\nonly 0 {}"
    );
    for step in ["only", "both", "after"] {
        core.complete(1, step, 0, "3").await;
    }
    assert_eq!(
        core.show("select status, output from pgflow.runs").await,
        "completed {\"both\": 3, \"only\": 3, \"after\": 3}"
    );
}

#[tokio::test]
async fn a_failure_that_is_final_may_take_along_all_that_depends_on_its_step() {
    let core = at_0_14().await;
    core.define(
        "flow f(max_attempts => 1)
         b
         a(when_exhausted => 'skip-cascade')
         z < a, b
         map c < z
         free < b",
    )
    .await;
    core.start_flow("f", "{}", 1).await;
    core.take("f").await;
    assert_eq!(core.fail(1, "a", 0, "no").await, "failed");
    let steps = "select s.step_slug, s.status, s.skip_reason, s.error_message, s.remaining_tasks from pgflow.step_states as s
                 join pgflow.steps as d using (flow_slug, step_slug) order by d.step_index";
    assert_eq!(
        core.show(steps).await,
        lines(
            "b started ∅ ∅ 1
             a skipped handler_failed no ∅
             z skipped dependency_skipped ∅ ∅
             c skipped dependency_skipped ∅ ∅
             free created ∅ ∅ ∅"
        )
    );
    assert_eq!(
        core.events(1).await,
        "run:started step:a:started step:b:started step:a:skipped step:z:skipped step:c:skipped"
    );
    let said = "select event, payload -> 'skip_reason', payload ? 'flow_slug', payload ? 'error_message' from flowgate.event
                where event like '%:skipped' order by seq";
    assert_eq!(
        core.show(said).await,
        "step:a:skipped \"handler_failed\" f t\nstep:z:skipped \"dependency_skipped\" t f\nstep:c:skipped \"dependency_skipped\" t f"
    );
    core.complete(1, "b", 0, "1").await;
    assert_eq!(core.take("f").await, "free 0 {\"b\": 1}");
    core.complete(1, "free", 0, "2").await;
    assert_eq!(
        core.show("select status, remaining_steps, output from pgflow.runs")
            .await,
        "completed 0 {\"free\": 2}"
    );
}

#[tokio::test]
async fn a_run_is_complete_when_its_last_step_is_skipped() {
    let core = at_0_14().await;
    core.define("flow f(max_attempts => 0)\n a\n b < a(when_exhausted => 'skip')")
        .await;
    core.define("flow g(max_attempts => 1)\n a(when_exhausted => 'skip-cascade')\n b < a")
        .await;
    core.start_flow("f", "{}", 1).await;
    core.start_flow("g", "{}", 2).await;
    core.take("f").await;
    core.complete(1, "a", 0, "1").await;
    core.take("f").await;
    core.fail(1, "b", 0, "no").await;
    core.take("g").await;
    core.fail(2, "a", 0, "no").await;
    assert_eq!(
        core.show("select flow_slug, status, remaining_steps, output from pgflow.runs order by 1")
            .await,
        "f completed 0 ∅\ng completed 0 ∅"
    );
    assert_eq!(
        core.events(2).await,
        "run:started step:a:started step:a:skipped step:b:skipped run:completed"
    );
}

#[tokio::test]
async fn a_failure_that_is_final_fails_the_run_where_nothing_else_is_said() {
    let core = at_0_14().await;
    core.define("flow f(max_attempts => 1)\n a\n b\n c < a")
        .await;
    core.start_flow("f", "{}", 1).await;
    core.take("f").await;
    assert_eq!(core.fail(1, "a", 0, "no").await, "failed");
    assert_eq!(
        core.states(1).await,
        "failed 3\na failed 1 0 1\nb started 1 0 1\nc created ∅ 1 1"
    );
    assert_eq!(core.archive("f").await, "a 0, b 0");
    assert_eq!(
        core.events(1).await,
        "run:started step:a:started step:b:started step:a:failed run:failed"
    );
    // The other task is closed when its worker fails too, and that is all.
    assert_eq!(core.fail(1, "b", 0, "me too").await, "failed");
    assert_eq!(core.states(1).await.lines().nth(2), Some("b started 1 0 1"));
}

#[tokio::test]
async fn a_skipped_map_leaves_no_message_and_its_other_tasks_come_late() {
    let core = at_0_14().await;
    core.define("flow f(max_attempts => 1)\n map m(when_exhausted => 'skip')\n after < m")
        .await;
    core.start_flow("f", "[1, 2, 3, 4]", 1).await;
    let three = format!("select count(*) from pgflow.start_tasks('f', '{{1, 2, 3}}', '{WORKER}')");
    assert_eq!(core.show(&three).await, "3");
    core.complete(1, "m", 0, "10").await;
    assert_eq!(core.fail(1, "m", 1, "no").await, "failed");
    assert_eq!(
        core.tasks(1).await,
        "after 0 queued 0\nm 0 completed 1\nm 1 failed 1\nm 2 started 1\nm 3 queued 0"
    );
    assert_eq!(core.queue("f").await, "after 0");
    assert_eq!(core.archive("f").await, "m 0, m 1, m 2, m 3");
    let events = core.events(1).await;
    // Late, all of them, and each returns its row.
    assert_eq!(core.complete(1, "m", 2, "30").await, "started");
    assert_eq!(core.fail(1, "m", 2, "late").await, "started");
    assert_eq!(core.fail(1, "m", 3, "never began").await, "queued");
    assert_eq!(core.complete(1, "m", 0, "11").await, "completed");
    let none = format!("select count(*) from pgflow.start_tasks('f', '{{4}}', '{WORKER}')");
    assert_eq!(core.show(&none).await, "0");
    assert_eq!(core.events(1).await, events);
    let untouched = "select output, error_message from pgflow.step_tasks where step_slug = 'm' order by task_index";
    assert_eq!(core.show(untouched).await, "10 ∅\n∅ no\n∅ ∅\n∅ ∅");
    assert_eq!(core.take("f").await, "after 0 {}");
    core.complete(1, "after", 0, "1").await;
    assert_eq!(
        core.show("select status, output from pgflow.runs").await,
        "completed {\"after\": 1}"
    );
}

#[tokio::test]
async fn what_a_skipped_step_lets_go_of_may_have_a_condition() {
    let core = at_0_14().await;
    core.define(
        "flow f(max_attempts => 1)
         a(when_exhausted => 'skip')
         must < a(required_input_pattern => '{\"a\": {}}', when_unmet => 'fail')",
    )
    .await;
    core.start_flow("f", "{}", 1).await;
    core.take("f").await;
    assert_eq!(core.fail(1, "a", 0, "no").await, "failed");
    assert_eq!(
        core.events(1).await,
        "run:started step:a:started step:a:skipped step:must:failed run:failed"
    );
    assert_eq!(
        core.states(1).await,
        "failed 1\na skipped ∅ 0 1\nmust failed ∅ 0 1"
    );
    assert_eq!(core.queue("f").await, "");
}

#[tokio::test]
async fn forcing_a_skip_takes_along_what_has_not_ended_parents_first() {
    let core = at_0_14().await;
    core.define("flow f\n z\n y < z\n map x < y\n w < x, z\n other\n apart < other")
        .await;
    let id = run(1);
    core.start_flow("f", "{}", 1).await;
    core.take("f").await;
    let skip = format!("select pgflow._cascade_force_skip_steps('{id}', 'z', 'by_hand')");
    assert_eq!(core.show(&skip).await, "4");
    let steps = "select s.step_slug, s.status, s.skip_reason, s.remaining_tasks, s.skipped_at is not null from pgflow.step_states as s
                 join pgflow.steps as d using (flow_slug, step_slug) order by d.step_index";
    assert_eq!(
        core.show(steps).await,
        lines(
            "z skipped by_hand ∅ t
             y skipped dependency_skipped ∅ t
             x skipped dependency_skipped ∅ t
             w skipped dependency_skipped ∅ t
             other started ∅ 1 f
             apart created ∅ ∅ f"
        )
    );
    assert_eq!(
        core.show("select status, remaining_steps from pgflow.runs")
            .await,
        "started 2"
    );
    assert_eq!(core.queue("f").await, "other 0");
    assert_eq!(core.archive("f").await, "z 0");
    let said = "select string_agg(payload ->> 'step_slug', ' ' order by seq) from flowgate.event where event like '%:skipped'";
    assert_eq!(core.show(said).await, "z y x w");

    // Nothing is left to skip.
    assert_eq!(core.show(&skip).await, "0");
    assert_eq!(core.show(said).await, "z y x w");
    let unknown = run(99);
    let refused = core
        .refused(&format!(
            "select pgflow._cascade_force_skip_steps('{unknown}', 'z', 'x')"
        ))
        .await;
    assert_eq!(refused, format!("P0001 Run not found: {unknown}"));
}

#[tokio::test]
async fn forcing_a_skip_of_a_completed_step_reaches_those_that_started_after_it() {
    let core = at_0_14().await;
    core.define("flow f\n a\n b < a\n c < b").await;
    let id = run(1);
    core.start_flow("f", "{}", 1).await;
    core.take("f").await;
    core.complete(1, "a", 0, "1").await;
    core.take("f").await;
    let skip = format!(
        "select pgflow._cascade_force_skip_steps('{id}', 'a', 'by_hand'); select pgflow.maybe_complete_run('{id}')"
    );
    assert_eq!(core.show(&skip).await, "2\n");
    assert_eq!(
        core.show("select status, output from pgflow.runs").await,
        "completed ∅"
    );
    assert_eq!(core.queue("f").await, "");
}

#[tokio::test]
async fn archiving_a_tasks_message_takes_that_one_and_takes_it_once() {
    let core = at_0_14().await;
    core.define("flow f\n map m").await;
    core.start_flow("f", "[1, 2]", 1).await;
    let archive = format!(
        "select pgflow._archive_task_message(p_run_id => '{}', p_step_slug => 'm', p_task_index => 1)",
        run(1)
    );
    core.run(&archive).await;
    core.run(&archive).await;
    core.run(&archive.replace("=> 1)", "=> 9)")).await;
    assert_eq!(core.queue("f").await, "m 0");
    assert_eq!(core.archive("f").await, "m 1");
}
