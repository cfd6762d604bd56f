//! Conditions: what a step's input must and must not hold, and what becomes of the step and its run where it doesn't.

use super::{Core, at_0_14, lines, run};

/// `step status skip_reason` of each step of run `n`, by their order in the flow.
async fn fates(core: &Core, n: u32) -> String {
    core.show(&format!(
        "select s.step_slug || ' ' || s.status || coalesce(' ' || s.skip_reason, '') from pgflow.step_states as s
         join pgflow.steps as d using (flow_slug, step_slug) where s.run_id = '{}' order by d.step_index",
        run(n)
    ))
    .await
}

#[tokio::test]
async fn a_condition_of_a_first_step_is_held_against_the_runs_input() {
    let core = at_0_14().await;
    core.define(
        "flow f
         required(required_input_pattern => '{\"plan\": \"pro\"}')
         forbidden(forbidden_input_pattern => '{\"test\": true}')
         both(required_input_pattern => '{\"plan\": \"pro\"}', forbidden_input_pattern => '{\"test\": true}')
         any(required_input_pattern => '{}')
         never(forbidden_input_pattern => '{}')
         free",
    )
    .await;
    for (n, input, started) in [
        (
            1,
            "{\"plan\": \"pro\", \"more\": {}}",
            "any both forbidden free required",
        ),
        (
            2,
            "{\"plan\": \"pro\", \"test\": true}",
            "any free required",
        ),
        (
            3,
            "{\"plan\": \"pro\", \"test\": false}",
            "any both forbidden free required",
        ),
        (4, "{}", "any forbidden free"),
        (5, "{\"test\": true}", "any free"),
        // Not an object: contains no object, and so none that is forbidden.
        (6, "[]", "forbidden free never"),
        (7, "\"text\"", "forbidden free never"),
        (8, "null", "forbidden free never"),
    ] {
        core.start_flow("f", input, n).await;
        let id = run(n);
        let got = core
            .show(&format!(
                "select string_agg(step_slug, ' ' order by step_slug) from pgflow.step_states where run_id = '{id}' and status = 'started';
                 select distinct status, skip_reason, skipped_at = created_at, remaining_tasks, started_at, completed_at, error_message, output
                 from pgflow.step_states where run_id = '{id}' and status <> 'started'"
            ))
            .await;
        assert_eq!(
            got,
            format!("{started}\nskipped condition_unmet t ∅ ∅ ∅ ∅ ∅"),
            "{input}"
        );
        let left = format!("select remaining_steps from pgflow.runs where run_id = '{id}'");
        assert_eq!(
            core.show(&left).await,
            started.split(' ').count().to_string(),
            "{input}"
        );
    }
}

#[tokio::test]
async fn a_condition_of_a_later_step_is_held_against_what_it_depends_on() {
    let core = at_0_14().await;
    core.define(
        "flow f
         a
         map b(required_input_pattern => '{}')
         ok < a, b(required_input_pattern => '{\"a\": {\"go\": 1}, \"b\": [2]}')
         un < a, b(forbidden_input_pattern => '{\"b\": [2]}')
         no < a, b(required_input_pattern => '{\"go\": 1}')",
    )
    .await;
    // A map's condition is held against the whole array: an array contains no object.
    core.start_flow("f", "[1, 2]", 1).await;
    assert_eq!(
        fates(&core, 1).await,
        "a started\nb skipped condition_unmet\nok created\nun created\nno created"
    );
    core.take("f").await;
    core.complete(1, "a", 0, "{\"go\": 1}").await;
    // Without b, which was skipped.
    assert_eq!(
        fates(&core, 1).await,
        "a completed\nb skipped condition_unmet\nok skipped condition_unmet\nun started\nno skipped condition_unmet"
    );
    assert_eq!(core.take("f").await, "un 0 {\"a\": {\"go\": 1}}");

    core.define(
        "flow g
         a
         map b
         ok < a, b(required_input_pattern => '{\"a\": {\"go\": 1}, \"b\": [2]}')
         un < a, b(forbidden_input_pattern => '{\"b\": [2]}')
         no < a, b(required_input_pattern => '{\"go\": 1}')
         null < a(required_input_pattern => '{\"a\": null}')",
    )
    .await;
    core.start_flow("g", "[1, 2]", 2).await;
    core.take("g").await;
    core.complete(2, "a", 0, "{\"go\": 1, \"x\": 0}").await;
    core.complete(2, "b", 0, "1").await;
    core.complete(2, "b", 1, "2").await;
    assert_eq!(
        fates(&core, 2).await,
        "a completed\nb completed\nok started\nun skipped condition_unmet\nno skipped condition_unmet\nnull skipped condition_unmet"
    );
    // An output that is SQL null is JSON null to a condition.
    core.start_flow("g", "[]", 3).await;
    core.take("g").await;
    core.run(&format!(
        "select pgflow.complete_task('{}', 'a', 0, null)",
        run(3)
    ))
    .await;
    assert!(fates(&core, 3).await.ends_with("null started"));
}

#[tokio::test]
async fn a_condition_that_must_be_met_fails_the_run_at_its_start() {
    let core = at_0_14().await;
    core.define(
        "flow f
         a
         b(required_input_pattern => '{\"x\": 1}', when_unmet => 'skip')
         z(required_input_pattern => '{\"x\": 2}', when_unmet => 'fail')
         c(required_input_pattern => '{\"x\": 1}', when_unmet => 'fail')
         d < a",
    )
    .await;
    let id = run(1);
    let started = format!(
        "select status, remaining_steps, failed_at = started_at, completed_at, output from pgflow.start_flow('f', '{{}}', '{id}')"
    );
    assert_eq!(core.show(&started).await, "failed 5 t ∅ ∅");
    // The first that fails, by its place in the flow; the others stay as they were.
    assert_eq!(
        fates(&core, 1).await,
        "a created\nb created\nz failed\nc created\nd created"
    );
    let failed =
        "select error_message, failed_at = created_at, started_at, remaining_tasks, skip_reason
                  from pgflow.step_states where step_slug = 'z'";
    assert_eq!(core.show(failed).await, "Condition not met t ∅ ∅ ∅");
    assert_eq!(core.queue("f").await, "");
    assert_eq!(core.archive("f").await, "");
    let said = "select event, payload - array['run_id', 'input', 'started_at'] from flowgate.event order by seq";
    let at = core
        .show("select to_jsonb(failed_at) from pgflow.runs")
        .await;
    assert_eq!(
        core.show(said).await,
        lines(&format!(
            "run:started {{\"status\": \"started\", \"flow_slug\": \"f\", \"event_type\": \"run:started\", \"remaining_steps\": 5}}
             step:z:failed {{\"status\": \"failed\", \"failed_at\": {at}, \"step_slug\": \"z\", \"event_type\": \"step:failed\", \"error_message\": \"Condition not met\"}}
             run:failed {{\"status\": \"failed\", \"failed_at\": {at}, \"flow_slug\": \"f\", \"event_type\": \"run:failed\", \"error_message\": \"Condition not met\"}}"
        ))
    );
}

#[tokio::test]
async fn a_condition_that_must_be_met_later_fails_the_run_and_clears_its_messages() {
    let core = at_0_14().await;
    core.define(
        "flow f
         a
         other
         c < a(required_input_pattern => '{\"a\": {\"ok\": true}}', when_unmet => 'fail')
         d < a",
    )
    .await;
    core.start_flow("f", "{}", 1).await;
    core.take("f").await;
    assert_eq!(
        core.complete(1, "a", 0, "{\"ok\": false}").await,
        "completed"
    );
    assert_eq!(
        fates(&core, 1).await,
        "a completed\nother started\nc failed\nd created"
    );
    assert_eq!(core.queue("f").await, "");
    assert_eq!(core.archive("f").await, "a 0, other 0");
    assert_eq!(
        core.events(1).await,
        "run:started step:a:started step:other:started step:a:completed step:c:failed run:failed"
    );
    // What comes late changes nothing.
    assert_eq!(core.complete(1, "other", 0, "1").await, "started");
    assert_eq!(core.take("f").await, "");
    assert_eq!(
        core.show("select status, remaining_steps from pgflow.runs")
            .await,
        "failed 3"
    );
}

#[tokio::test]
async fn a_skipped_step_lets_go_of_what_depends_on_it() {
    let core = at_0_14().await;
    core.define(
        "flow f
         a(required_input_pattern => '{\"x\": 1}')
         b
         only < a
         both < a, b
         map m < a
         after < m",
    )
    .await;
    core.start_flow("f", "{}", 1).await;
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
    // A skipped dependency is no key of the input; the map over it mapped nothing.
    assert_eq!(
        core.take("f").await,
        "after 0 {\"m\": []}\nb 0 {}\nonly 0 {}"
    );
    assert_eq!(
        core.events(1).await,
        "run:started step:a:skipped step:m:completed step:after:started step:b:started step:only:started"
    );
    let payload = "select payload from flowgate.event where event = 'step:a:skipped'";
    let at = core
        .show("select to_jsonb(skipped_at) from pgflow.step_states where step_slug = 'a'")
        .await;
    assert_eq!(
        core.show(payload).await,
        format!(
            "{{\"run_id\": \"{}\", \"status\": \"skipped\", \"flow_slug\": \"f\", \"step_slug\": \"a\", \"event_type\": \"step:skipped\", \
             \"skipped_at\": {at}, \"skip_reason\": \"condition_unmet\"}}",
            run(1)
        )
    );
    core.complete(1, "b", 0, "2").await;
    assert_eq!(core.take("f").await, "both 0 {\"b\": 2}");
    for step in ["both", "only", "after"] {
        core.complete(1, step, 0, &format!("\"{step}\"")).await;
    }
    let output = "select status, output from pgflow.runs";
    assert_eq!(
        core.show(output).await,
        "completed {\"both\": \"both\", \"only\": \"only\", \"after\": \"after\"}"
    );
}

#[tokio::test]
async fn a_condition_may_take_along_all_that_depends_on_its_step() {
    let core = at_0_14().await;
    core.define(
        "flow f
         b
         a(required_input_pattern => '{\"x\": 1}', when_unmet => 'skip-cascade')
         z < a, b
         map c < z
         free < b",
    )
    .await;
    core.start_flow("f", "{}", 1).await;
    assert_eq!(
        fates(&core, 1).await,
        lines(
            "b started
             a skipped condition_unmet
             z skipped dependency_skipped
             c skipped dependency_skipped
             free created"
        )
    );
    assert_eq!(
        core.events(1).await,
        "run:started step:a:skipped step:z:skipped step:c:skipped step:b:started"
    );
    let keys = "select distinct (select string_agg(k, ' ' order by k) from jsonb_object_keys(payload) as k)
                from flowgate.event where event like '%:skipped'";
    assert_eq!(
        core.show(keys).await,
        "event_type flow_slug run_id skip_reason skipped_at status step_slug"
    );
    core.take("f").await;
    core.complete(1, "b", 0, "1").await;
    core.take("f").await;
    core.complete(1, "free", 0, "2").await;
    assert_eq!(
        core.show("select status, remaining_steps, output from pgflow.runs")
            .await,
        "completed 0 {\"free\": 2}"
    );
}

#[tokio::test]
async fn a_run_whose_steps_are_all_skipped_is_complete_without_output() {
    let core = at_0_14().await;
    core.define("flow f\n a(required_input_pattern => '{\"x\": 1}', when_unmet => 'skip-cascade')\n b < a\n c < b")
        .await;
    let started = format!(
        "select status, remaining_steps, output, completed_at = started_at from pgflow.start_flow('f', '{{}}', '{}')",
        run(1)
    );
    assert_eq!(core.show(&started).await, "completed 0 ∅ t");
    assert_eq!(
        core.events(1).await,
        "run:started step:a:skipped step:b:skipped step:c:skipped run:completed"
    );
    let said = "select payload -> 'output' from flowgate.event where event = 'run:completed'";
    assert_eq!(core.show(said).await, "null");
}

#[tokio::test]
async fn conditions_go_on_as_far_as_steps_become_ready() {
    let core = at_0_14().await;
    let asks = "(required_input_pattern => '{\"x\": 1}')";
    core.define(&format!(
        "flow f\n a{asks}\n b < a{asks}\n c < b{asks}\n d < c"
    ))
    .await;
    core.start_flow("f", "{}", 1).await;
    assert_eq!(
        core.events(1).await,
        "run:started step:a:skipped step:b:skipped step:c:skipped step:d:started"
    );
    assert_eq!(core.take("f").await, "d 0 {}");
    core.complete(1, "d", 0, "1").await;
    assert_eq!(
        core.show("select status, output from pgflow.runs").await,
        "completed {\"d\": 1}"
    );
}

#[tokio::test]
async fn conditions_stop_after_fifty_rounds() {
    let core = at_0_14().await;
    for (flow, steps) in [("fits", 49), ("long", 51)] {
        core.run(&format!("select pgflow.create_flow('{flow}')"))
            .await;
        core.run(&format!(
            "select pgflow.add_step('{flow}', 's' || i, case when i > 1 then array['s' || (i - 1)] else '{{}}' end,
                required_input_pattern => '{{\"x\": 1}}') from generate_series(1, {steps}) as i"
        ))
        .await;
    }
    core.start_flow("fits", "{}", 1).await;
    assert_eq!(
        core.show("select status from pgflow.runs").await,
        "completed"
    );
    assert_eq!(
        core.refused("select pgflow.start_flow('long', '{}')").await,
        "P0001 cascade_resolve_conditions exceeded safety limit of 50 iterations"
    );
    assert_eq!(core.show("select count(*) from pgflow.runs").await, "1");
}

#[tokio::test]
async fn a_condition_counts_as_well_after_a_map_over_nothing() {
    let core = at_0_14().await;
    core.define(
        "flow f
         map m
         skipped < m(required_input_pattern => '{\"m\": [1]}')
         map over < m(required_input_pattern => '{\"m\": [1]}', when_unmet => 'skip-cascade')
         beyond < over
         met < m(forbidden_input_pattern => '{\"m\": [1]}')",
    )
    .await;
    core.start_flow("f", "[]", 1).await;
    assert_eq!(
        fates(&core, 1).await,
        lines(
            "m completed
             skipped skipped condition_unmet
             over skipped condition_unmet
             beyond skipped dependency_skipped
             met started"
        )
    );
    core.define("flow g\n map m\n must < m(required_input_pattern => '{\"m\": [1]}', when_unmet => 'fail')\n map n < m")
        .await;
    let started = format!(
        "select status from pgflow.start_flow('g', '[]', '{}')",
        run(2)
    );
    assert_eq!(core.show(&started).await, "failed");
    assert_eq!(fates(&core, 2).await, "m completed\nmust failed\nn created");
    assert_eq!(
        core.events(2).await,
        "run:started step:m:completed step:must:failed run:failed"
    );
}

#[tokio::test]
async fn a_map_whose_condition_is_not_met_needs_no_array() {
    let core = at_0_14().await;
    core.define("flow f\n a\n b < a(required_input_pattern => '{\"a\": 7}', when_unmet => 'skip-cascade')\n map m < b\n c < a")
        .await;
    core.start_flow("f", "{}", 1).await;
    core.take("f").await;
    core.complete(1, "a", 0, "8").await;
    core.take("f").await;
    core.complete(1, "c", 0, "9").await;
    assert_eq!(
        core.show("select status, output from pgflow.runs").await,
        "completed {\"c\": 9}"
    );
}

#[tokio::test]
async fn resolving_by_hand_says_whether_the_run_has_not_failed() {
    let core = at_0_14().await;
    core.define("flow f\n a\n b < a").await;
    core.define("flow g\n a(required_input_pattern => '{\"x\": 1}', when_unmet => 'fail')")
        .await;
    core.start_flow("f", "{}", 1).await;
    core.start_flow("g", "{}", 2).await;
    core.start_flow("f", "{}", 3).await;
    core.take("f").await;
    core.complete(1, "a", 0, "1").await;
    core.take("f").await;
    core.complete(1, "b", 0, "1").await;
    let before = core.show("select count(*) from flowgate.event").await;
    for (n, expected) in [(1, "t"), (2, "f"), (3, "t")] {
        let resolve = format!("select pgflow.cascade_resolve_conditions('{}')", run(n));
        assert_eq!(core.show(&resolve).await, expected, "run {n}");
    }
    assert_eq!(
        core.show("select count(*) from flowgate.event").await,
        before
    );
}

#[tokio::test]
async fn a_step_starts_though_one_with_a_condition_beside_it_was_skipped_before() {
    let core = at_0_14().await;
    core.define(
        "flow f(max_attempts => 1)
         a
         b(when_exhausted => 'skip-cascade')
         asks < a, b(required_input_pattern => '{\"a\": 1}')
         plain < a",
    )
    .await;
    core.start_flow("f", "{}", 1).await;
    core.take("f").await;
    core.fail(1, "b", 0, "no").await;
    core.complete(1, "a", 0, "1").await;
    assert_eq!(core.take("f").await, "plain 0 {\"a\": 1}");
}
