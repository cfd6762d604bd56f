//! What workers are handed and what their answers leave: inputs, outputs kept by steps, runs' outputs, late callbacks.

use super::{Core, WORKER, at_0_14, lines, run};

/// `step index input flow_input` of what can be taken from a flow's queue.
async fn take(core: &Core, flow: &str) -> String {
    core.show(&format!(
        "select step_slug, task_index, input, flow_input
         from pgflow.start_tasks('{flow}', array(select msg_id from pgmq.read('{flow}', 600, 1000)), '{WORKER}')
         order by step_slug collate \"C\", task_index"
    ))
    .await
}

async fn outputs(core: &Core, n: u32) -> String {
    core.show(&format!(
        "select step_slug, output from pgflow.step_states where run_id = '{}' order by step_slug collate \"C\"",
        run(n)
    ))
    .await
}

#[tokio::test]
async fn a_task_is_handed_what_its_dependencies_gave_and_the_runs_input_where_it_begins() {
    let core = at_0_14().await;
    core.define(
        "flow f
         map each
         first
         map again < each
         map over < first
         last < again, each, first, over",
    )
    .await;
    core.start_flow("f", "[{\"n\": 1}, null]", 1).await;
    assert_eq!(
        take(&core, "f").await,
        "each 0 {\"n\": 1} ∅\neach 1 null ∅\nfirst 0 {} [{\"n\": 1}, null]"
    );
    core.complete(1, "each", 1, "\"second\"").await;
    core.run(&format!(
        "select pgflow.complete_task('{}', 'each', 0, null)",
        run(1)
    ))
    .await;
    core.complete(1, "first", 0, "[true, [0], null]").await;
    assert_eq!(
        take(&core, "f").await,
        lines(
            "again 0 null ∅
             again 1 \"second\" ∅
             over 0 true ∅
             over 1 [0] ∅
             over 2 null ∅"
        )
    );
    for (step, index) in [
        ("again", 1),
        ("again", 0),
        ("over", 2),
        ("over", 0),
        ("over", 1),
    ] {
        core.complete(1, step, index, &index.to_string()).await;
    }
    assert_eq!(
        take(&core, "f").await,
        "last 0 {\"each\": [null, \"second\"], \"over\": [0, 1, 2], \"again\": [0, 1], \"first\": [true, [0], null]} ∅"
    );
}

#[tokio::test]
async fn a_step_keeps_its_output_and_others_read_it_there() {
    let core = at_0_14().await;
    core.define("flow f\n map m\n map none < m\n a\n b < a, none, m")
        .await;
    core.start_flow("f", "[1, 2]", 1).await;
    core.take("f").await;
    assert_eq!(outputs(&core, 1).await, "a ∅\nb ∅\nm ∅\nnone ∅");
    core.complete(1, "m", 1, "20").await;
    assert_eq!(outputs(&core, 1).await, "a ∅\nb ∅\nm ∅\nnone ∅");
    core.complete(1, "m", 0, "10").await;
    core.run(&format!(
        "select pgflow.complete_task('{}', 'a', 0, null)",
        run(1)
    ))
    .await;
    assert_eq!(outputs(&core, 1).await, "a ∅\nb ∅\nm [10, 20]\nnone ∅");
    core.take("f").await;
    core.complete(1, "none", 0, "1").await;
    core.complete(1, "none", 1, "2").await;
    // Only there: tasks' outputs are not looked at again.
    core.run("update pgflow.step_tasks set output = '\"elsewhere\"' where step_slug in ('m', 'none', 'a')")
        .await;
    assert_eq!(
        take(&core, "f").await,
        "b 0 {\"a\": null, \"m\": [10, 20], \"none\": [1, 2]} ∅"
    );
    core.complete(1, "b", 0, "{\"x\": 1}").await;
    assert_eq!(
        outputs(&core, 1).await,
        "a ∅\nb {\"x\": 1}\nm [10, 20]\nnone [1, 2]"
    );
    let seen = format!(
        "select jsonb_object_agg(s ->> 'step_slug', s -> 'output'), (s -> 'skip_reason') is not null and (s -> 'skipped_at') is not null
         from pgflow.get_run_with_states('{}') as r, jsonb_array_elements(r -> 'steps') as s group by 2",
        run(1)
    );
    assert_eq!(
        core.show(&seen).await,
        "{\"a\": null, \"b\": {\"x\": 1}, \"m\": [10, 20], \"none\": [1, 2]} t"
    );
    let said = "select string_agg((payload ->> 'step_slug') || ' ' || (payload -> 'output')::text, '; ' order by seq)
                from flowgate.event where event like 'step:%:completed'";
    assert_eq!(
        core.show(said).await,
        "m [10, 20]; a null; none [1, 2]; b {\"x\": 1}"
    );
}

#[tokio::test]
async fn a_map_over_nothing_has_an_empty_output() {
    let core = at_0_14().await;
    core.define("flow f\n map m\n map n < m\n a < n").await;
    core.start_flow("f", "[]", 1).await;
    assert_eq!(outputs(&core, 1).await, "a ∅\nm []\nn []");
    assert_eq!(take(&core, "f").await, "a 0 {\"n\": []} ∅");
}

#[tokio::test]
async fn a_runs_output_is_that_of_its_last_steps() {
    let core = at_0_14().await;
    core.define("flow f\n a\n map m < a\n nothing\n gone(required_input_pattern => '{\"x\": 1}')\n map none < gone").await;
    core.start_flow("f", "{}", 1).await;
    core.take("f").await;
    core.complete(1, "a", 0, "[1, 2]").await;
    core.run(&format!(
        "select pgflow.complete_task('{}', 'nothing', 0, null)",
        run(1)
    ))
    .await;
    core.take("f").await;
    core.complete(1, "m", 0, "\"x\"").await;
    core.complete(1, "m", 1, "\"y\"").await;
    assert_eq!(
        core.show("select status, output from pgflow.runs").await,
        "completed {\"m\": [\"x\", \"y\"], \"none\": [], \"nothing\": null}"
    );
    assert_eq!(
        core.show("select payload -> 'output' from flowgate.event where event = 'run:completed'")
            .await,
        "{\"m\": [\"x\", \"y\"], \"none\": [], \"nothing\": null}"
    );
}

#[tokio::test]
async fn only_tasks_of_running_steps_of_running_runs_are_started() {
    let core = at_0_14().await;
    core.define("flow f(max_attempts => 1)\n a\n b").await;
    for n in 1..=4 {
        core.start_flow("f", "{}", n).await;
    }
    let set = |table, status, n| {
        let more = if status == "skipped" {
            ", skip_reason = 'x', remaining_tasks = null"
        } else {
            ""
        };
        format!(
            "update pgflow.{table} set status = '{status}'{more} where run_id = '{}'",
            run(n)
        )
    };
    core.run(&set("runs", "failed", 1)).await;
    core.run(&set("runs", "completed", 2)).await;
    core.run(&format!(
        "{} and step_slug = 'a'",
        set("step_states", "skipped", 3)
    ))
    .await;
    let taken = format!(
        "select run_id, step_slug from pgflow.start_tasks('f', array(select msg_id from pgmq.q_f), '{WORKER}') order by 1, 2"
    );
    let (third, fourth) = (run(3), run(4));
    assert_eq!(
        core.show(&taken).await,
        format!("{third} b\n{fourth} a\n{fourth} b")
    );
    assert_eq!(core.show(&taken).await, "", "once");
}

#[tokio::test]
async fn a_started_message_stays_away_for_the_steps_timeout_and_counts_as_read() {
    let core = at_0_14().await;
    core.define("flow f(timeout => 50)\n a(timeout => 100)\n b")
        .await;
    core.start_flow("f", "{}", 1).await;
    for (step, seconds) in [("a", 102), ("b", 52)] {
        let start = format!(
            "select pgflow.start_tasks('f', array(select msg_id from pgmq.q_f where message ->> 'step_slug' = '{step}'), '{WORKER}')"
        );
        core.visible_in(
            &start,
            "f",
            &format!("message ->> 'step_slug' = '{step}'"),
            seconds,
        )
        .await;
    }
    assert_eq!(
        core.show("select distinct read_ct from pgmq.q_f").await,
        "1"
    );
}

#[tokio::test]
async fn a_repeated_completion_is_silent() {
    let core = at_0_14().await;
    core.define("flow f\n a\n map m\n b < a").await;
    core.start_flow("f", "[1, 2]", 1).await;
    core.take("f").await;
    core.complete(1, "a", 0, "1").await;
    core.complete(1, "m", 0, "1").await;
    let (events, states) = (core.events(1).await, core.states(1).await);
    assert_eq!(core.complete(1, "a", 0, "2").await, "completed");
    assert_eq!(core.complete(1, "m", 0, "2").await, "completed");
    assert_eq!(core.fail(1, "a", 0, "no").await, "completed");
    assert_eq!(core.fail(1, "m", 0, "no").await, "completed");
    assert_eq!(core.complete(1, "b", 0, "1").await, "queued");
    assert_eq!(core.complete(1, "gone", 0, "1").await, "");
    assert_eq!(core.complete(1, "m", 7, "1").await, "");
    assert_eq!(core.fail(9, "a", 0, "no").await, "");
    assert_eq!(
        (core.events(1).await, core.states(1).await),
        (events, states)
    );
    assert_eq!(
        core.show("select output from pgflow.step_tasks where status = 'completed'")
            .await,
        "1\n1"
    );
}

#[tokio::test]
async fn a_late_call_clears_a_message_that_is_still_there() {
    let core = at_0_14().await;
    core.define("flow f\n a\n b < a").await;
    core.start_flow("f", "{}", 1).await;
    core.take("f").await;
    core.complete(1, "a", 0, "1").await;
    for call in [
        "complete_task('RUN', 'a', 0, '2')",
        "fail_task('RUN', 'a', 0, 'no')",
    ] {
        core.run("with back as (delete from pgmq.a_f returning *) insert into pgmq.q_f (msg_id, vt, message) overriding system value select msg_id, vt, message from back")
            .await;
        let call = call.replace("RUN", &run(1));
        assert_eq!(
            core.show(&format!("select status, output from pgflow.{call}"))
                .await,
            "completed 1"
        );
        assert_eq!(core.archive("f").await, "a 0", "{call}");
        assert_eq!(core.queue("f").await, "b 0", "{call}");
    }
}

#[tokio::test]
async fn an_output_that_a_map_cannot_use_fails_the_run_and_the_task_is_returned() {
    let core = at_0_14().await;
    for (n, output, kind) in [
        (1, "{\"x\": 1}", "object"),
        (2, "null", "null"),
        (3, "\"[]\"", "string"),
    ] {
        let flow = format!("f{n}");
        core.define(&format!("flow {flow}\n a\n other\n map m < a\n map n < a"))
            .await;
        core.start_flow(&flow, "{}", n).await;
        core.take(&flow).await;
        let id = run(n);
        let row = format!(
            "select status, error_message, output, failed_at is not null from pgflow.complete_task('{id}', 'a', 0, '{output}')"
        );
        assert_eq!(
            core.show(&row).await,
            format!("failed [TYPE_VIOLATION] Produced {kind} instead of array {output} t")
        );
        let step = format!(
            "select status, error_message, output from pgflow.step_states where run_id = '{id}' and step_slug = 'a'"
        );
        assert_eq!(
            core.show(&step).await,
            format!(
                "failed [TYPE_VIOLATION] Map step m expects array input but dependency a produced {kind} ∅"
            )
        );
        assert_eq!(
            core.events(n).await.split(' ').skip(3).collect::<Vec<_>>(),
            ["run:failed", "step:a:failed"]
        );
        assert_eq!(core.queue(&flow).await, "");
        assert_eq!(core.archive(&flow).await, "a 0, other 0");
    }
}

#[tokio::test]
async fn nothing_starts_in_a_run_that_has_ended() {
    let core = at_0_14().await;
    core.define("flow f\n a\n b < a").await;
    for (n, status) in [(1, "failed"), (2, "completed")] {
        core.start_flow("f", "{}", n).await;
        let id = run(n);
        core.run(&format!(
            "update pgflow.runs set status = '{status}', remaining_steps = 0 where run_id = '{id}';
             update pgflow.step_states set remaining_deps = 0 where run_id = '{id}' and step_slug = 'b';
             select pgflow.start_ready_steps('{id}'); select pgflow.maybe_complete_run('{id}')"
        ))
        .await;
        assert_eq!(
            core.states(n).await,
            format!("{status} 0\na started 1 0 1\nb created ∅ 0 1")
        );
        assert_eq!(core.events(n).await, "run:started step:a:started");
    }
}

#[tokio::test]
async fn a_start_delay_holds_back_the_first_try_of_every_task() {
    let core = at_0_14().await;
    core.define("flow f\n map m(start_delay => 40)\n now").await;
    let start = format!("select pgflow.start_flow('f', '[1, 2]', '{}')", run(1));
    core.visible_in(&start, "f", "message ->> 'step_slug' = 'm'", 40)
        .await;
    assert_eq!(core.take("f").await, "now 0 {}");
}

#[tokio::test]
async fn a_transaction_that_began_before_the_run_may_still_work_on_it() {
    let core = at_0_14().await;
    core.define("flow f(max_attempts => 1)\n a\n b < a\n map m < a\n fails < b(when_exhausted => 'skip')\n asks < fails(required_input_pattern => '{\"x\": 1}')")
        .await;
    let early = core.db.connect().await;
    let begun = super::show(&early, "begin; select now()").await;
    core.start_flow("f", "{}", 1).await;
    let id = run(1);
    let take = format!(
        "select count(*) from pgflow.start_tasks('f', array(select msg_id from pgmq.read('f', 60, 9)), '{WORKER}')"
    );
    for end in [
        "complete_task('RUN', 'a', 0, '[]')",
        "complete_task('RUN', 'b', 0, '1')",
        "fail_task('RUN', 'fails', 0, 'no')",
    ] {
        assert_eq!(super::show(&early, &take).await, "1");
        super::show(
            &early,
            &format!("select pgflow.{}", end.replace("RUN", &id)),
        )
        .await;
    }
    super::show(&early, "commit").await;
    assert_eq!(
        core.states(1).await,
        "completed 0\na completed 0 0 1\nasks skipped ∅ 0 1\nb completed 0 0 1\nfails skipped ∅ 0 1\nm completed 0 0 0"
    );
    // As if it had all happened at the run's start: no row is earlier than what it follows from.
    let times = format!(
        "select distinct coalesce(s.completed_at, s.skipped_at) = r.started_at, r.completed_at = r.started_at, r.started_at > '{begun}'
         from pgflow.step_states as s join pgflow.runs as r using (run_id)"
    );
    assert_eq!(core.show(&times).await, "t t t");
}
