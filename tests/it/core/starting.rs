//! Starting a run, and reading one: rows, messages, what is refused.

use serde_json::Value;

use super::{Core, lines, run, show};

const DIAMOND: &str = "flow diamond
    root
    left < root
    map right < root
    end < left, right";

#[tokio::test]
async fn a_started_run_has_a_state_per_step_and_a_task_and_a_message_per_ready_task() {
    let core = Core::new().await;
    core.define(DIAMOND).await;
    let id = run(1);
    let started = format!(
        "select run_id = '{id}', flow_slug, status, input, output, remaining_steps, started_at = now(), completed_at, failed_at
         from pgflow.start_flow('diamond', '{{\"k\": [1, null]}}', '{id}')"
    );
    assert_eq!(
        core.show(&started).await,
        r#"t diamond started {"k": [1, null]} ∅ 4 t ∅ ∅"#
    );
    let expected = lines(
        "started 4
         end created ∅ 2 1
         left created ∅ 1 1
         right created ∅ 1 ∅
         root started 1 0 1",
    );
    assert_eq!(core.states(1).await, expected);
    let times = "select step_slug, created_at = (select started_at from pgflow.runs), started_at = created_at,
                 completed_at, failed_at, error_message from pgflow.step_states order by 1";
    let expected = lines(
        "end t ∅ ∅ ∅ ∅
         left t ∅ ∅ ∅ ∅
         right t ∅ ∅ ∅ ∅
         root t t ∅ ∅ ∅",
    );
    assert_eq!(core.show(times).await, expected);
    let task = "select flow_slug, run_id, step_slug, message_id, task_index, status, attempts_count, error_message, output,
                queued_at = (select started_at from pgflow.runs), completed_at, failed_at, started_at, last_worker_id
                from pgflow.step_tasks";
    assert_eq!(
        core.show(task).await,
        format!("diamond {id} root 1 0 queued 0 ∅ ∅ t ∅ ∅ ∅ ∅")
    );
    let message = "select msg_id, read_ct, message from pgmq.q_diamond";
    assert_eq!(
        core.show(message).await,
        format!(
            r#"1 0 {{"run_id": "{id}", "flow_slug": "diamond", "step_slug": "root", "task_index": 0}}"#
        )
    );
}

#[tokio::test]
async fn a_run_has_the_id_it_is_given_or_one_of_its_own_and_an_id_serves_once() {
    let core = Core::new().await;
    core.define("flow f\n a").await;
    let two = "select count(distinct run_id) from (
                 select (pgflow.start_flow('f', '{}')).run_id union all select (pgflow.start_flow('f', '{}', null)).run_id) as r";
    assert_eq!(core.show(two).await, "2");
    let id = run(7);
    let start = format!(
        "select run_id, status from pgflow.start_flow(flow_slug => 'f', input => '{{}}', run_id => '{id}')"
    );
    assert_eq!(core.show(&start).await, format!("{id} started"));
    let left = "select count(*) from pgflow.runs; select count(*) from pgflow.step_states;
                select count(*) from pgflow.step_tasks; select count(*) from pgmq.q_f; select count(*) from flowgate.event";
    let before = core.show(left).await;
    assert_eq!(before, "3\n3\n3\n3\n6");
    for start in [
        start,
        format!("select pgflow.start_flow_with_states('f', '[]', '{id}')"),
    ] {
        assert_eq!(
            core.refused(&start).await,
            "23505 duplicate key value violates unique constraint \"runs_pkey\""
        );
    }
    assert_eq!(core.show(left).await, before);

    // What was rolled back never was: no row, no message, no event.
    core.run("begin; select pgflow.start_flow('f', '{}'); rollback")
        .await;
    assert_eq!(core.show(left).await, before);
}

#[tokio::test]
async fn a_run_that_cannot_be_is_refused_and_leaves_nothing() {
    let core = Core::new().await;
    core.define("flow single\n a\n flow maps\n a\n map m\n b < m\n map n < m")
        .await;
    let unknown = "select pgflow.start_flow('nowhere', '{}')";
    assert_eq!(
        core.refused(unknown).await,
        "23503 insert or update on table \"runs\" violates foreign key constraint \"runs_flow_slug_fkey\""
    );
    assert_eq!(
        core.refused("select pgflow.start_flow('single', null)")
            .await,
        "23502 null value in column \"input\" of relation \"runs\" violates not-null constraint"
    );
    let cases = [
        ("null", "input is NULL"),
        ("'{}'", "input is not an array (got object)"),
        ("'\"text\"'", "input is not an array (got string)"),
        ("'7'", "input is not an array (got number)"),
        ("'true'", "input is not an array (got boolean)"),
        ("'null'", "input is not an array (got null)"),
    ];
    for (input, problem) in cases {
        for function in ["start_flow", "start_flow_with_states"] {
            let start = format!("select pgflow.{function}('maps', {input})");
            assert_eq!(
                core.refused(&start).await,
                format!("P0001 Flow maps has root map steps but {problem}")
            );
        }
    }
    let left = "select count(*) from pgflow.runs; select count(*) from pgflow.step_states; select count(*) from pgflow.step_tasks;
                select count(*) from pgmq.q_maps; select count(*) from pgmq.q_single; select count(*) from flowgate.event";
    assert_eq!(core.show(left).await, "0\n0\n0\n0\n0\n0");

    // A dependent map asks nothing of the run's input; JSON null is an input.
    core.define("flow later\n a\n map m < a").await;
    for (n, input) in ["{}", "null", "7"].into_iter().enumerate() {
        core.start_flow("later", input, n as u32).await;
        assert_eq!(
            core.states(n as u32).await,
            "started 2\na started 1 0 1\nm created ∅ 1 ∅"
        );
    }
}

#[tokio::test]
async fn a_root_map_has_a_task_for_each_element_of_the_input() {
    let core = Core::new().await;
    core.define("flow f\n map m\n map n\n a\n map later < m\n b < m")
        .await;
    core.start_flow("f", r#"[10, null, {"x": 1}]"#, 1).await;
    let expected = lines(
        "started 5
         a started 1 0 1
         b created ∅ 1 1
         later created ∅ 1 ∅
         m started 3 0 3
         n started 3 0 3",
    );
    assert_eq!(core.states(1).await, expected);
    // Step by step in the order of slugs, task by task in the order of indexes.
    assert_eq!(core.queue("f").await, "a 0, m 0, m 1, m 2, n 0, n 1, n 2");
    let matched = "select count(*) from pgflow.step_tasks as t join pgmq.q_f as q on q.msg_id = t.message_id
                   where q.message = jsonb_build_object('flow_slug', t.flow_slug, 'run_id', t.run_id,
                                                        'step_slug', t.step_slug, 'task_index', t.task_index)";
    assert_eq!(core.show(matched).await, "7");
    assert_eq!(
        core.events(1).await,
        "run:started step:a:started step:m:started step:n:started"
    );
}

#[tokio::test]
async fn a_flow_without_steps_is_complete_at_once() {
    let core = Core::new().await;
    core.define("flow empty").await;
    let id = run(1);
    let start = format!(
        "select status, output, remaining_steps, completed_at = started_at, failed_at from pgflow.start_flow('empty', '1', '{id}')"
    );
    assert_eq!(core.show(&start).await, "completed ∅ 0 t ∅");
    assert_eq!(core.events(1).await, "run:started run:completed");
    assert_eq!(core.states(1).await, "completed 0");
    let steps = format!("select pgflow.get_run_with_states('{id}') -> 'steps'");
    assert_eq!(core.show(&steps).await, "[]");
}

#[tokio::test]
async fn the_returned_run_is_as_it_is_after_everything_that_follows_at_once() {
    let core = Core::new().await;
    core.define("flow f\n map m\n map n < m\n flow g\n map m\n a < m")
        .await;
    let start = "select status, output, remaining_steps, completed_at = started_at from pgflow.start_flow('f', '[]')";
    assert_eq!(core.show(start).await, r#"completed {"n": []} 0 t"#);
    let start =
        "select status, output, remaining_steps, completed_at from pgflow.start_flow('g', '[]')";
    assert_eq!(core.show(start).await, "started ∅ 1 ∅");
    let start = "select status, remaining_steps from pgflow.start_flow('g', '[1]')";
    assert_eq!(core.show(start).await, "started 2", "and one row of it");
}

#[tokio::test]
async fn a_start_delay_hides_the_messages_of_a_step_that_has_started() {
    let core = Core::new().await;
    core.define("flow f\n a\n map m (start_delay => 7)\n b < a (start_delay => 300)")
        .await;
    let id = run(1);
    let start = format!("select pgflow.start_flow('f', '[1, 2]', '{id}')");
    core.visible_in(&start, "f", "message ->> 'step_slug' = 'm'", 7)
        .await;
    let now = "select string_agg(message ->> 'step_slug', ' ') from pgmq.q_f where vt <= clock_timestamp()";
    assert_eq!(core.show(now).await, "a");
    let expected = lines(
        "started 3
         a started 1 0 1
         b created ∅ 1 1
         m started 2 0 2",
    );
    assert_eq!(core.states(1).await, expected);
    assert_eq!(
        core.tasks(1).await,
        "a 0 queued 0\nm 0 queued 0\nm 1 queued 0"
    );
    assert_eq!(core.take("f").await, r#"a 0 {"run": [1, 2]}"#);

    // Also of a step that becomes ready later.
    let complete = format!("select pgflow.complete_task('{id}', 'a', 0, '1')");
    core.visible_in(&complete, "f", "message ->> 'step_slug' = 'b'", 300)
        .await;
    // Not of a second try: that waits for its own delay.
    core.run("select pgflow.start_tasks('f', array(select msg_id from pgmq.q_f where message ->> 'step_slug' = 'b'), 'aaaaaaaa-0000-4000-8000-000000000001')")
        .await;
    let fail = format!("select pgflow.fail_task('{id}', 'b', 0, 'no')");
    core.visible_in(&fail, "f", "message ->> 'step_slug' = 'b'", 10)
        .await;
}

#[tokio::test]
async fn a_run_is_shown_with_all_its_columns_and_those_of_its_steps() {
    let core = Core::new().await;
    core.define(DIAMOND).await;
    let id = run(1);
    let shown = core
        .show(&format!(
            "select pgflow.start_flow_with_states(flow_slug => 'diamond', input => '{{\"a\": 1}}', run_id => '{id}')"
        ))
        .await;
    let again = core
        .show(&format!(
            "select pgflow.get_run_with_states(run_id => '{id}')"
        ))
        .await;
    let [shown, again] = [shown, again].map(|text| serde_json::from_str::<Value>(&text).unwrap());
    assert_eq!(shown, again);
    let rows = "select jsonb_build_object('run', (select to_jsonb(r) from pgflow.runs as r),
                'steps', (select jsonb_agg(to_jsonb(s) order by s.step_slug) from pgflow.step_states as s))";
    let mut expected: Value = serde_json::from_str(&core.show(rows).await).unwrap();
    for seen in [&mut expected, &mut shown.clone()] {
        seen["steps"]
            .as_array_mut()
            .unwrap()
            .sort_by_key(|step| step["step_slug"].to_string());
    }
    let mut sorted = shown;
    sorted["steps"]
        .as_array_mut()
        .unwrap()
        .sort_by_key(|step| step["step_slug"].to_string());
    assert_eq!(sorted, expected);
    assert_eq!(sorted["run"].as_object().unwrap().len(), 9);
    assert_eq!(sorted["steps"].as_array().unwrap().len(), 4);
    assert_eq!(sorted["steps"][0].as_object().unwrap().len(), 12);
    assert_eq!(sorted.as_object().unwrap().len(), 2);

    // Without an id it is a run of its own; with an unknown one there is none.
    let own = "select pgflow.start_flow_with_states('diamond', '1') #>> '{run,status}'";
    assert_eq!(core.show(own).await, "started");
    assert_eq!(core.show("select count(*) from pgflow.runs").await, "2");
    let unknown = format!("select pgflow.get_run_with_states('{}')", run(99));
    assert_eq!(core.show(&unknown).await, "∅");
    assert_eq!(
        core.show("select pgflow.get_run_with_states(null)").await,
        "∅"
    );
    assert_eq!(
        core.refused("select pgflow.start_flow_with_states('nowhere', '1')")
            .await,
        "23503 insert or update on table \"runs\" violates foreign key constraint \"runs_flow_slug_fkey\""
    );
}

#[tokio::test]
async fn a_run_is_read_where_nothing_can_be_written() {
    let core = Core::new().await;
    core.define("flow f\n a").await;
    core.start_flow("f", "{}", 1).await;
    crate::support::pg::replica_catches_up().await;
    let replica = core.db.connect_replica().await;
    let read = format!(
        "select pgflow.get_run_with_states('{}') #>> '{{steps,0,status}}'",
        run(1)
    );
    assert_eq!(show(&replica, &read).await, "started");
}
