//! Maps over nothing, and the three functions that move a run on, each called by itself.

use super::{Core, lines, run};

/// `flow name`, a root map and `length - 1` maps in a row below it.
fn chain(name: &str, length: usize) -> String {
    let mut text = format!("flow {name}\n map m0\n");
    for at in 1..length {
        text += &format!(" map m{at} < m{}\n", at - 1);
    }
    text
}

#[tokio::test]
async fn maps_over_nothing_complete_one_below_the_other_up_to_49() {
    let core = Core::new().await;
    core.define(&chain("chain49", 49)).await;
    core.define(&chain("chain50", 50)).await;
    core.define(&chain("chain51", 51)).await;
    let start = "select status, output, remaining_steps from pgflow.start_flow('chain49', '[]')";
    assert_eq!(core.show(start).await, r#"completed {"m48": []} 0"#);
    let shown = "select count(*), count(distinct started_at), bool_and(started_at = completed_at and remaining_tasks = 0 and
                 initial_tasks = 0 and remaining_deps = 0 and status = 'completed') from pgflow.step_states";
    assert_eq!(core.show(shown).await, "49 1 t");
    for flow in ["chain50", "chain51"] {
        let start = format!("select pgflow.start_flow('{flow}', '[]')");
        assert_eq!(
            core.refused(&start).await,
            "P0001 Cascade loop exceeded safety limit of 50 iterations"
        );
    }
    let left = "select count(*) from pgflow.runs; select count(*) from pgflow.step_states";
    assert_eq!(core.show(left).await, "1\n49");

    // With something to do nothing is too long.
    core.start_flow("chain51", "[1]", 1).await;
    assert_eq!(core.queue("chain51").await, "m0 0");
    for at in 0..51 {
        core.take("chain51").await;
        core.complete(1, &format!("m{at}"), 0, "1").await;
    }
    assert_eq!(core.states(1).await.lines().next(), Some("completed 0"));
}

#[tokio::test]
async fn a_single_below_a_map_over_nothing_runs_on_an_empty_array() {
    let core = Core::new().await;
    core.define(
        "flow f
         map a
         map b < a
         map z
         both < b, z
         other
         mixed < a, other",
    )
    .await;
    core.start_flow("f", "[]", 1).await;
    let expected = lines(
        "started 3
         a completed 0 0 0
         b completed 0 0 0
         both started 1 0 1
         mixed created ∅ 1 1
         other started 1 0 1
         z completed 0 0 0",
    );
    assert_eq!(core.states(1).await, expected);
    // Parents before children, and starts after all completions.
    let events = core.events(1).await;
    assert!(
        [
            "run:started step:a:completed step:z:completed step:b:completed step:both:started step:other:started",
            "run:started step:z:completed step:a:completed step:b:completed step:both:started step:other:started",
            "run:started step:a:completed step:b:completed step:z:completed step:both:started step:other:started",
        ]
        .contains(&events.as_str()),
        "{events}"
    );
    assert_eq!(
        core.take("f").await,
        "both 0 {\"b\": [], \"z\": [], \"run\": []}\nother 0 {\"run\": []}"
    );
    core.complete(1, "both", 0, "1").await;
    core.complete(1, "other", 0, "2").await;
    assert_eq!(
        core.take("f").await,
        r#"mixed 0 {"a": [], "run": [], "other": 2}"#
    );
    core.complete(1, "mixed", 0, "3").await;
    let output = "select status, output from pgflow.runs";
    assert_eq!(
        core.show(output).await,
        r#"completed {"both": 1, "mixed": 3}"#
    );
}

#[tokio::test]
async fn an_empty_array_makes_everything_below_it_complete_with_it() {
    let core = Core::new().await;
    core.define("flow f\n a\n map m < a\n map n < m\n map o < n\n last < n")
        .await;
    core.start_flow("f", "{}", 1).await;
    core.take("f").await;
    assert_eq!(core.complete(1, "a", 0, "[]").await, "completed");
    let expected = lines(
        "started 1
         a completed 0 0 1
         last started 1 0 1
         m completed 0 0 0
         n completed 0 0 0
         o completed 0 0 0",
    );
    assert_eq!(core.states(1).await, expected);
    assert_eq!(
        core.events(1).await,
        "run:started step:a:started step:a:completed step:m:completed step:n:completed step:o:completed step:last:started"
    );
    core.take("f").await;
    core.complete(1, "last", 0, "null").await;
    let output = "select status, output from pgflow.runs";
    assert_eq!(
        core.show(output).await,
        r#"completed {"o": [], "last": null}"#
    );
    // And where nothing but maps is below, the run ends in the same call.
    core.define("flow g\n a\n map m < a").await;
    core.start_flow("g", "{}", 2).await;
    core.take("g").await;
    core.complete(2, "a", 0, "[]").await;
    assert_eq!(
        core.events(2).await,
        "run:started step:a:started step:a:completed step:m:completed run:completed"
    );
}

/// A run whose rows are written by hand, so that each function finds what only it would see: `empty` and `more` are
/// ready maps over nothing, `below` and `under` depend on them, `ready` is a single that could start.
async fn by_hand(core: &Core) -> String {
    core.define(
        "flow f
         map empty
         map more
         map below < empty
         waits
         under < empty, more, waits
         ready (start_delay => 9)",
    )
    .await;
    let id = run(1);
    core.run(&format!(
        "insert into pgflow.runs (flow_slug, run_id, input, remaining_steps) values ('f', '{id}', '[]', 6);
         insert into pgflow.step_states (flow_slug, run_id, step_slug, remaining_deps, initial_tasks) values
         ('f', '{id}', 'empty', 0, 0), ('f', '{id}', 'more', 0, 0), ('f', '{id}', 'below', 1, null),
         ('f', '{id}', 'under', 3, 1), ('f', '{id}', 'waits', 1, 1), ('f', '{id}', 'ready', 0, 1)"
    ))
    .await;
    id
}

#[tokio::test]
async fn a_cascade_completes_what_has_no_tasks_and_counts_it() {
    let core = Core::new().await;
    let id = by_hand(&core).await;
    let cascade = format!("select pgflow.cascade_complete_taskless_steps(run_id => '{id}')");
    assert_eq!(core.show(&cascade).await, "3");
    let expected = lines(
        "started 3
         below completed 0 0 0
         empty completed 0 0 0
         more completed 0 0 0
         ready created ∅ 0 1
         under created ∅ 1 1
         waits created ∅ 1 1",
    );
    assert_eq!(core.states(1).await, expected);
    let times = "select bool_and(started_at = completed_at) from pgflow.step_states where status = 'completed'";
    assert_eq!(core.show(times).await, "t");
    let events = "select count(*), max(seq) filter (where event = 'step:empty:completed') <
                  max(seq) filter (where event = 'step:below:completed') from flowgate.event";
    assert_eq!(core.show(events).await, "3 t");
    // What is done is done.
    assert_eq!(core.show(&cascade).await, "0");
    assert_eq!(core.states(1).await, expected);
    assert_eq!(core.queue("f").await, "");

    // It does not end the run; `maybe_complete_run` does, once.
    core.run("update pgflow.runs set remaining_steps = 0").await;
    assert_eq!(core.show(&cascade).await, "0");
    assert!(core.states(1).await.starts_with("started 0"));
    let end = format!("select pgflow.maybe_complete_run(run_id => '{id}')");
    core.run(&end).await;
    let ended = "select status, output, completed_at = (select inserted_at from flowgate.event where event = 'run:completed')
                 from pgflow.runs";
    assert_eq!(
        core.show(ended).await,
        r#"completed {"below": []} t"#,
        "leaves that did not complete have no part in the output"
    );
    core.run(&end).await;
    let ends = "select count(*) from flowgate.event where event = 'run:completed'";
    assert_eq!(core.show(ends).await, "1");
}

#[tokio::test]
async fn starting_what_is_ready_completes_empty_maps_without_telling_anybody() {
    let core = Core::new().await;
    let id = by_hand(&core).await;
    let start = format!("select pgflow.start_ready_steps(run_id => '{id}')");

    // Nothing of a failed run starts.
    core.run("update pgflow.runs set status = 'failed', failed_at = now()")
        .await;
    core.run(&start).await;
    assert!(!core.states(1).await.contains("completed"));
    assert_eq!(core.queue("f").await, "");
    assert_eq!(core.show("select count(*) from flowgate.event").await, "0");

    core.run("update pgflow.runs set status = 'started', failed_at = null")
        .await;
    core.visible_in(&start, "f", "true", 9).await;
    let expected = lines(
        "started 6
         below created ∅ 1 ∅
         empty completed 0 0 0
         more completed 0 0 0
         ready started 1 0 1
         under created ∅ 3 1
         waits created ∅ 1 1",
    );
    assert_eq!(core.states(1).await, expected);
    assert_eq!(core.queue("f").await, "ready 0");
    assert_eq!(core.tasks(1).await, "ready 0 queued 0");
    let events = core.events(1).await;
    assert!(
        events == "step:empty:completed step:more:completed step:ready:started"
            || events == "step:more:completed step:empty:completed step:ready:started",
        "{events}"
    );
    let payload = "select payload - 'started_at' - 'completed_at' from flowgate.event where event = 'step:empty:completed'";
    assert_eq!(
        core.show(payload).await,
        format!(
            r#"{{"output": [], "run_id": "{id}", "status": "completed", "step_slug": "empty", "event_type": "step:completed", "remaining_deps": 0, "remaining_tasks": 0}}"#
        )
    );
    core.run(&start).await;
    assert_eq!(core.states(1).await, expected, "once");
    assert_eq!(core.queue("f").await, "ready 0");
}

#[tokio::test]
async fn a_run_ends_when_no_step_remains_with_the_outputs_of_its_leaves() {
    let core = Core::new().await;
    core.define(
        "flow f
         inner
         leaf < inner
         nothing < inner
         map items < inner
         map none < items",
    )
    .await;
    let id = run(1);
    core.start_flow("f", "{}", 1).await;
    let end = format!("select pgflow.maybe_complete_run('{id}')");
    core.run(&end).await;
    assert!(core.states(1).await.starts_with("started 5"), "too early");
    core.take("f").await;
    core.complete(1, "inner", 0, "[3, 2, 1]").await;
    core.take("f").await;
    // The last index first: outputs stand in the order of indexes all the same.
    for (index, output) in [(2, "{\"i\": 2}"), (0, "null"), (1, "[1]")] {
        core.complete(1, "items", index, output).await;
    }
    core.run(&format!(
        "select pgflow.complete_task('{id}', 'nothing', 0, null)"
    ))
    .await;
    core.complete(1, "leaf", 0, "{\"done\": true}").await;
    core.take("f").await;
    for index in [1, 2, 0] {
        core.complete(1, "none", index, &format!("\"{index}\""))
            .await;
    }
    let ended = "select status, output, remaining_steps, completed_at is not null, failed_at from pgflow.runs";
    assert_eq!(
        core.show(ended).await,
        r#"completed {"leaf": {"done": true}, "none": ["0", "1", "2"], "nothing": null} 0 t ∅"#
    );
    core.run(&end).await;
    assert_eq!(core.events(1).await.matches("run:completed").count(), 1);
}

#[tokio::test]
async fn of_a_run_that_is_not_there_nothing_moves() {
    let core = Core::new().await;
    let id = run(1);
    for call in [
        "cascade_complete_taskless_steps",
        "start_ready_steps",
        "maybe_complete_run",
    ] {
        for argument in [format!("'{id}'"), "null".to_owned()] {
            let shown = core
                .show(&format!("select pgflow.{call}({argument})"))
                .await;
            let nothing = if call.starts_with("cascade") { "0" } else { "" };
            assert_eq!(shown, nothing, "{call}({argument})");
        }
    }
    let left = "select count(*) from flowgate.event; select count(*) from pgflow.runs";
    assert_eq!(core.show(left).await, "0\n0");
}
