//! `complete_task`: what one completion moves, what a late or wrong one leaves alone, and outputs no map can be made of.

use super::{Core, WORKER, lines, run, show};

/// The task's row as `complete_task` and `fail_task` return it, but for what differs from run to run.
const ROW: &str = "flow_slug, run_id, step_slug, message_id, task_index, status, attempts_count, error_message, output,
    queued_at is not null, completed_at = now(), failed_at = now(), started_at is not null, last_worker_id";

#[tokio::test]
async fn a_completion_moves_task_step_and_run_and_tells_the_dependents() {
    let core = Core::new().await;
    core.define(
        "flow f
         a
         b
         c < a
         d < a, b
         map m < a",
    )
    .await;
    let id = run(1);
    core.start_flow("f", "{}", 1).await;
    core.take("f").await;
    let complete = format!(
        "select {ROW} from pgflow.complete_task(run_id => '{id}', step_slug => 'a', task_index => 0, output => '[7, 8]')"
    );
    assert_eq!(
        core.show(&complete).await,
        format!("f {id} a 1 0 completed 1 ∅ [7, 8] t t ∅ t {WORKER}")
    );
    let expected = lines(
        "started 4
         a completed 0 0 1
         b started 1 0 1
         c started 1 0 1
         d created ∅ 1 1
         m started 2 0 2",
    );
    assert_eq!(core.states(1).await, expected);
    let times = "select completed_at = (select completed_at from pgflow.step_tasks where step_slug = 'a'),
                 (select c.started_at from pgflow.step_states as c where c.step_slug = 'c') = completed_at, failed_at,
                 error_message from pgflow.step_states where step_slug = 'a'";
    assert_eq!(core.show(times).await, "t t ∅ ∅");
    assert_eq!(core.archive("f").await, "a 0");
    assert_eq!(core.queue("f").await, "b 0, c 0, m 0, m 1");
    let archived = "select msg_id, message from pgmq.a_f where archived_at is not null";
    assert_eq!(
        core.show(archived).await,
        format!(r#"1 {{"run_id": "{id}", "flow_slug": "f", "step_slug": "a", "task_index": 0}}"#)
    );
    assert_eq!(
        core.events(1).await,
        "run:started step:a:started step:b:started step:a:completed step:c:started step:m:started"
    );

    core.complete(1, "b", 0, "1").await;
    assert!(
        core.states(1).await.contains("d started 1 0 1"),
        "both parents are done"
    );
    core.take("f").await;
    for (step, index) in [("m", 1), ("c", 0), ("m", 0)] {
        core.complete(1, step, index, "1").await;
    }
    assert!(core.states(1).await.starts_with("started 1"));
    assert_eq!(core.complete(1, "d", 0, "2").await, "completed");
    let expected = lines(
        "completed 0
         a completed 0 0 1
         b completed 0 0 1
         c completed 0 0 1
         d completed 0 0 1
         m completed 0 0 2",
    );
    assert_eq!(core.states(1).await, expected);
    let ended = "select output, completed_at = (select max(completed_at) from pgflow.step_tasks), failed_at from pgflow.runs";
    assert_eq!(
        core.show(ended).await,
        r#"{"c": 1, "d": 2, "m": [1, 1]} t ∅"#
    );
    assert_eq!(core.queue("f").await, "");
    let archived = "select count(*), count(distinct msg_id) from pgmq.a_f";
    assert_eq!(core.show(archived).await, "6 6");
}

#[tokio::test]
async fn a_map_completes_with_its_last_task_and_gives_its_outputs_in_order() {
    let core = Core::new().await;
    core.define("flow f\n map m\n map n < m\n last < m").await;
    core.start_flow("f", "[0, 1, 2, 3]", 1).await;
    core.take("f").await;
    for (done, index) in [2, 0, 3].into_iter().enumerate() {
        assert_eq!(
            core.complete(1, "m", index, &format!("\"o{index}\"")).await,
            "completed"
        );
        let remaining = 3 - done;
        let expected =
            format!("started 3\nlast created ∅ 1 1\nm started {remaining} 0 4\nn created ∅ 1 ∅");
        assert_eq!(core.states(1).await, expected);
        // Each message goes with its task.
        let archived = "select count(*) from pgmq.a_f";
        assert_eq!(core.show(archived).await, (done + 1).to_string());
    }
    assert_eq!(core.events(1).await, "run:started step:m:started");
    // One of them again, then one that is not there: nothing more is counted.
    core.complete(1, "m", 0, "1").await;
    assert_eq!(core.complete(1, "m", 4, "1").await, "");
    assert!(core.states(1).await.contains("m started 1 0 4"));

    core.complete(1, "m", 1, "null").await;
    let expected = lines(
        "started 2
         last started 1 0 1
         m completed 0 0 4
         n started 4 0 4",
    );
    assert_eq!(core.states(1).await, expected);
    let output = "select payload -> 'output' from flowgate.event where event = 'step:m:completed'";
    assert_eq!(core.show(output).await, r#"["o0", null, "o2", "o3"]"#);
    assert_eq!(
        core.events(1).await,
        "run:started step:m:started step:m:completed step:last:started step:n:started"
    );
    // A map over a map is as large as that, whatever came out of it.
    assert_eq!(
        core.take("f").await,
        "last 0 {\"m\": [\"o0\", null, \"o2\", \"o3\"], \"run\": [0, 1, 2, 3]}\nn 0 \"o0\"\nn 1 null\nn 2 \"o2\"\nn 3 \"o3\""
    );
}

#[tokio::test]
async fn a_completion_that_comes_late_or_for_nothing_changes_nothing() {
    let core = Core::new().await;
    core.define("flow f(base_delay => 0)\n a\n b < a\n map m")
        .await;
    let id = run(1);
    core.start_flow("f", "[1, 2]", 1).await;
    let row = |step: &str, output: &str| {
        format!(
            "select status, attempts_count, output, error_message, completed_at is null from pgflow.complete_task('{id}', '{step}', 0, {output})"
        )
    };
    let everything = "select jsonb_build_object(
        'runs', (select jsonb_agg(r order by run_id) from pgflow.runs as r),
        'states', (select jsonb_agg(s order by run_id, step_slug) from pgflow.step_states as s),
        'tasks', (select jsonb_agg(t order by run_id, step_slug, task_index) from pgflow.step_tasks as t),
        'queue', (select jsonb_agg(q order by msg_id) from pgmq.q_f as q),
        'archive', (select jsonb_agg(a order by msg_id) from pgmq.a_f as a),
        'events', (select jsonb_agg(e order by id) from flowgate.event as e))";

    // Never started: not completed, and its message waits for a worker.
    let before = core.show(everything).await;
    assert_eq!(core.show(&row("a", "'1'")).await, "queued 0 ∅ ∅ t");
    assert_eq!(core.show(&row("m", "'1'")).await, "queued 0 ∅ ∅ t");
    // Nothing there: of the run, of the step, of the run's id.
    for call in [
        format!("select pgflow.complete_task('{id}', 'a', 1, '1')"),
        format!("select pgflow.complete_task('{id}', 'b', 0, '1')"),
        format!("select pgflow.complete_task('{id}', 'nowhere', 0, '1')"),
        format!("select pgflow.complete_task('{}', 'a', 0, '1')", run(9)),
    ] {
        assert_eq!(core.show(&call).await, "", "{call}");
    }
    assert_eq!(core.show(everything).await, before);

    // Queued again after a failure.
    core.take("f").await;
    core.fail(1, "a", 0, "once").await;
    let before = core.show(everything).await;
    assert_eq!(core.show(&row("a", "'1'")).await, "queued 1 ∅ once t");
    assert_eq!(core.show(everything).await, before);

    // Completed: the first output stays, nothing is said again.
    core.take("f").await;
    core.complete(1, "a", 0, "\"first\"").await;
    let before = core.show(everything).await;
    let again = core.show(&row("a", "'\"second\"'")).await;
    assert!(again.starts_with("completed 2 \"first\""), "{again}");
    assert_eq!(core.show(everything).await, before);
    assert_eq!(core.events(1).await.matches("step:a:completed").count(), 1);

    // A run that failed: what is started stays started.
    core.take("f").await;
    core.run("update pgflow.steps set opt_max_attempts = 1")
        .await;
    core.complete(1, "m", 1, "1").await;
    assert_eq!(core.fail(1, "b", 0, "for good").await, "failed");
    let before = core.show(everything).await;
    assert_eq!(core.show(&row("m", "'1'")).await, "started 1 ∅ ∅ t");
    assert_eq!(core.show(&row("b", "'1'")).await, "failed 1 ∅ for good t");
    assert_eq!(core.show(&row("m", "'{}'")).await, "started 1 ∅ ∅ t");
    assert_eq!(core.show(everything).await, before);

    // And a run that is complete.
    core.start_flow("f", "[]", 2).await;
    core.take("f").await;
    core.complete(2, "a", 0, "1").await;
    core.take("f").await;
    core.complete(2, "b", 0, "1").await;
    assert!(core.states(2).await.starts_with("completed 0"));
    let before = core.show(everything).await;
    assert_eq!(core.complete(2, "b", 0, "2").await, "completed");
    assert_eq!(core.complete(2, "m", 0, "2").await, "");
    assert_eq!(core.show(everything).await, before);
}

#[tokio::test]
async fn an_output_no_map_can_be_made_of_fails_the_run() {
    let core = Core::new().await;
    core.define(
        "flow f
         a
         also
         map m < a
         map n < m
         waits < also
         flow other
         a",
    )
    .await;
    core.start_flow("other", "1", 50).await;
    let cases = [
        ("'{\"x\": [1]}'", "object"),
        ("'\"text\"'", "string"),
        ("'7'", "number"),
        ("'true'", "boolean"),
        ("'null'", "null"),
        ("null", "null"),
    ];
    for (n, (output, kind)) in cases.into_iter().enumerate() {
        let n = n as u32;
        let id = run(n);
        core.start_flow("f", "{}", n).await;
        // `also` is started in half of the cases, queued in the others: neither's message stays.
        let only = if n.is_multiple_of(2) {
            "true"
        } else {
            "message ->> 'step_slug' = 'a'"
        };
        core.run(&format!(
            "select pgflow.start_tasks('f', array(select msg_id from pgmq.q_f where {only}), '{WORKER}')"
        ))
        .await;
        let also = if n.is_multiple_of(2) {
            "started 1"
        } else {
            "queued 0"
        };
        let complete = format!("select status from pgflow.complete_task('{id}', 'a', 0, {output})");
        assert_eq!(core.show(&complete).await, "", "no row");

        let step_error = format!(
            "[TYPE_VIOLATION] Map step m expects array input but dependency a produced {kind}"
        );
        let task_error = format!("[TYPE_VIOLATION] Produced {kind} instead of array");
        let expected = lines(
            "failed 5
             a failed 1 0 1
             also started 1 0 1
             m created ∅ 1 ∅
             n created ∅ 1 ∅
             waits created ∅ 1 1",
        );
        assert_eq!(core.states(n).await, expected, "{kind}");
        assert_eq!(core.tasks(n).await, format!("a 0 failed 1\nalso 0 {also}"));
        let errors = format!(
            "select error_message, failed_at is not null, completed_at from pgflow.step_states where run_id = '{id}' and step_slug = 'a';
             select error_message, failed_at is not null, completed_at, output is not distinct from {output}::jsonb
             from pgflow.step_tasks where run_id = '{id}' and step_slug = 'a';
             select failed_at is not null, completed_at, output from pgflow.runs where run_id = '{id}';
             select count(*) from pgflow.step_states where run_id = '{id}' and step_slug <> 'a' and (error_message is not null or failed_at is not null)"
        );
        assert_eq!(
            core.show(&errors).await,
            format!("{step_error} t ∅\n{task_error} t ∅ t\nt ∅ ∅\n0")
        );
        assert_eq!(core.queue("f").await, "");
        let archived = format!(
            "select string_agg(message ->> 'step_slug', ' ' order by msg_id) from pgmq.a_f where message ->> 'run_id' = '{id}'"
        );
        assert_eq!(core.show(&archived).await, "a also");
        assert_eq!(
            core.events(n).await,
            "run:started step:a:started step:also:started run:failed step:a:failed"
        );
        // Nothing of it is started any more, and its last task is told so.
        let start = format!(
            "select count(*) from pgflow.start_tasks('f', array(select msg_id from pgmq.a_f), '{WORKER}')"
        );
        assert_eq!(core.show(&start).await, "0");
        let late = core.complete(n, "also", 0, "1").await;
        assert_eq!(late, also.split(' ').next().unwrap());
    }
    assert_eq!(core.queue("other").await, "a 0", "nobody else's");
    assert_eq!(core.tasks(50).await, "a 0 queued 0");
}

#[tokio::test]
async fn only_a_single_above_a_map_must_give_an_array() {
    let core = Core::new().await;
    core.define("flow f(base_delay => 0)\n map m\n map n < m\n a\n b < a, n")
        .await;
    core.start_flow("f", "[1]", 1).await;
    for (step, output) in [("m", "7"), ("n", "null"), ("a", "{}"), ("b", "\"x\"")] {
        core.take("f").await;
        assert_eq!(core.complete(1, step, 0, output).await, "completed");
    }
    assert!(core.states(1).await.starts_with("completed 0"));

    // A second try may mend it: a violation needs a task that is started.
    core.define("flow g(base_delay => 0)\n a\n map m < a").await;
    core.start_flow("g", "1", 2).await;
    core.take("g").await;
    core.fail(2, "a", 0, "once").await;
    core.take("g").await;
    assert_eq!(core.complete(2, "a", 0, "[1, 2]").await, "completed");
    assert_eq!(core.queue("g").await, "m 0, m 1");
    // Once the map knows its size the array has been given.
    assert_eq!(core.complete(2, "a", 0, "1").await, "completed");
    assert!(core.states(2).await.starts_with("started 1"));
}

#[tokio::test]
async fn two_maps_below_one_single_both_get_the_array_or_fail_as_one() {
    let core = Core::new().await;
    core.define("flow f\n a\n map m < a\n map n < a\n b < a")
        .await;
    core.start_flow("f", "1", 1).await;
    core.take("f").await;
    core.complete(1, "a", 0, "[5, 6]").await;
    assert_eq!(core.queue("f").await, "b 0, m 0, m 1, n 0, n 1");
    assert_eq!(
        core.take("f").await,
        "b 0 {\"a\": [5, 6], \"run\": 1}\nm 0 5\nm 1 6\nn 0 5\nn 1 6"
    );
    core.start_flow("f", "1", 2).await;
    core.take("f").await;
    core.complete(2, "a", 0, "5").await;
    let failed = core.events(2).await;
    assert_eq!(
        failed,
        "run:started step:a:started run:failed step:a:failed"
    );
    let error = "select error_message ~ 'Map step (m|n) expects array input but dependency a produced number$'
                 from pgflow.step_states where status = 'failed'";
    assert_eq!(core.show(error).await, "t");
}

#[tokio::test]
async fn a_null_output_is_null_in_the_row_and_json_null_wherever_it_is_shown() {
    let core = Core::new().await;
    core.define("flow f\n map m\n leaf").await;
    let id = run(1);
    core.start_flow("f", "[1, 2]", 1).await;
    core.take("f").await;
    core.run(&format!(
        "select pgflow.complete_task('{id}', 'm', 0, null); select pgflow.complete_task('{id}', 'm', 1, 'null');
         select pgflow.complete_task('{id}', 'leaf', 0, null)"
    ))
    .await;
    let stored = "select step_slug, task_index, output from pgflow.step_tasks order by 1, 2";
    assert_eq!(core.show(stored).await, "leaf 0 ∅\nm 0 ∅\nm 1 null");
    let shown = "select event, payload -> 'output' from flowgate.event where event like '%:completed' order by seq";
    let expected = lines(
        r#"step:m:completed [null, null]
           step:leaf:completed null
           run:completed {"m": [null, null], "leaf": null}"#,
    );
    assert_eq!(core.show(shown).await, expected);
    let output = "select output from pgflow.runs";
    assert_eq!(
        core.show(output).await,
        r#"{"m": [null, null], "leaf": null}"#
    );
    // Values that clients drop stay what they are.
    core.define("flow g\n a\n b\n c").await;
    core.start_flow("g", "{}", 2).await;
    core.take("g").await;
    for (step, output) in [("a", "0"), ("b", "false"), ("c", "\"\"")] {
        core.complete(2, step, 0, output).await;
    }
    let output = "select output from pgflow.runs where flow_slug = 'g'";
    assert_eq!(core.show(output).await, r#"{"a": 0, "b": false, "c": ""}"#);
}

#[tokio::test]
async fn a_transaction_older_than_the_start_completes_the_task_as_it_started() {
    let core = Core::new().await;
    core.define("flow f\n a").await;
    core.start_flow("f", "{}", 1).await;
    let early = core.db.connect().await;
    show(&early, "begin; select now()").await;
    core.take("f").await;
    let complete = format!("select pgflow.complete_task('{}', 'a', 0, '1')", run(1));
    show(&early, &complete).await;
    show(&early, "commit").await;
    let at = "select t.status, t.completed_at = t.started_at, s.completed_at = t.completed_at, r.status
              from pgflow.step_tasks as t join pgflow.step_states as s using (run_id, step_slug) join pgflow.runs as r using (run_id)";
    assert_eq!(core.show(at).await, "completed t t completed");

    // A transaction of its own may do everything, at one instant.
    let id = run(2);
    core.run(&format!(
        "begin; select pgflow.start_flow('f', '{{}}', '{id}');
         select pgflow.start_tasks('f', array(select msg_id from pgmq.read('f', 1, 9)), '{WORKER}');
         select pgflow.complete_task('{id}', 'a', 0, '1'); commit"
    ))
    .await;
    let instant = format!(
        "select r.started_at = r.completed_at, t.queued_at = t.completed_at, t.started_at = t.completed_at
         from pgflow.runs as r join pgflow.step_tasks as t using (run_id) where run_id = '{id}'"
    );
    assert_eq!(core.show(&instant).await, "t t t");
}
