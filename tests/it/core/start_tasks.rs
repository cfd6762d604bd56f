//! `start_tasks`: which tasks it hands out, to whom, with what input, and for how long their messages stay hidden.

use tokio::task::JoinHandle;
use tokio_postgres::Client;

use super::{Core, PATIENCE, WORKER, lines, run, show};
use crate::support::wait::wait_until;

fn start(flow: &str, ids: &str) -> String {
    format!(
        "select flow_slug, run_id, step_slug, input, msg_id, task_index from pgflow.start_tasks('{flow}', {ids}, '{WORKER}')
         order by msg_id"
    )
}

#[tokio::test]
async fn a_task_is_started_once_and_handed_to_who_started_it() {
    let core = Core::new().await;
    core.define("flow f\n a\n b\n flow other\n a").await;
    let (one, two) = (run(1), run(2));
    core.start_flow("f", "{\"n\": 1}", 1).await;
    core.start_flow("f", "{\"n\": 2}", 2).await;
    core.start_flow("other", "3", 3).await;

    // Not: none, unknown, of another flow, of no flow, null.
    for ids in ["null", "'{}'", "'{77, -1}'", "array[null]::bigint[]"] {
        assert_eq!(core.show(&start("f", ids)).await, "", "{ids}");
    }
    assert_eq!(core.show(&start("nowhere", "'{1, 2, 3}'")).await, "");
    assert_eq!(core.show(&start("other", "'{2, 3, 4}'")).await, "");
    assert_eq!(
        core.show("select count(*) from pgflow.step_tasks where status <> 'queued'")
            .await,
        "0"
    );

    // Of several runs at once, a row a task however often it is named.
    let expected =
        format!("f {one} a {{\"run\": {{\"n\": 1}}}} 1 0\nf {two} a {{\"run\": {{\"n\": 2}}}} 3 0");
    assert_eq!(core.show(&start("f", "'{3, 1, 77, 3, 1}'")).await, expected);
    let task = "select step_slug, message_id, status, attempts_count, started_at >= queued_at, last_worker_id, error_message,
                output, completed_at, failed_at from pgflow.step_tasks where flow_slug = 'f' order by message_id";
    let expected = lines(&format!(
        "a 1 started 1 t {WORKER} ∅ ∅ ∅ ∅
         b 2 queued 0 ∅ ∅ ∅ ∅ ∅ ∅
         a 3 started 1 t {WORKER} ∅ ∅ ∅ ∅
         b 4 queued 0 ∅ ∅ ∅ ∅ ∅ ∅"
    ));
    assert_eq!(core.show(task).await, expected);

    // Already started, done, failed for good, or of a run that failed: left out without a word.
    assert_eq!(core.show(&start("f", "'{1, 3}'")).await, "");
    core.complete(1, "a", 0, "1").await;
    core.run("update pgflow.runs set status = 'failed', failed_at = now() where run_id = '00000000-0000-4000-8000-000000000002'")
        .await;
    assert_eq!(
        core.show(&start("f", "'{1, 2, 3, 4}'")).await,
        format!("f {one} b {{\"run\": {{\"n\": 1}}}} 2 0")
    );
    assert_eq!(
        core.show("select count(*) from pgflow.step_tasks where attempts_count > 1")
            .await,
        "0"
    );

    // In the caller's transaction: rolled back, it was not started.
    core.run(&format!("begin; {}; rollback", start("other", "'{1}'")))
        .await;
    assert_eq!(core.tasks(3).await, "a 0 queued 0");
    // started_at is when the transaction began.
    let when = format!(
        "begin; {}; select started_at = now() from pgflow.step_tasks where flow_slug = 'other'; commit",
        start("other", "'{1}'")
    );
    assert!(core.show(&when).await.ends_with("\nt"));
}

#[tokio::test]
async fn a_worker_nobody_registered_starts_nothing() {
    let core = Core::new().await;
    core.define("flow f\n a").await;
    core.start_flow("f", "{}", 1).await;
    let start = "select pgflow.start_tasks('f', '{1}', 'ffffffff-0000-4000-8000-000000000000')";
    assert_eq!(
        core.refused(start).await,
        "23503 insert or update on table \"step_tasks\" violates foreign key constraint \"step_tasks_last_worker_id_fkey\""
    );
    assert_eq!(core.tasks(1).await, "a 0 queued 0");
    // Nothing to start, nothing to refuse.
    assert_eq!(core.show(&start.replace("{1}", "{2}")).await, "");
    let named = format!(
        "select step_slug from pgflow.start_tasks(flow_slug => 'f', msg_ids => '{{1}}'::bigint[], worker_id => '{WORKER}'::uuid)"
    );
    assert_eq!(core.show(&named).await, "a");
}

#[tokio::test]
async fn of_two_callers_with_the_same_message_one_gets_the_task() {
    let core = Core::new().await;
    core.define("flow f\n a\n b").await;
    core.start_flow("f", "{}", 1).await;
    let second = core.db.connect().await;
    let pid = show(&second, "select pg_backend_pid()").await;

    let sql = start("f", "'{1}'");
    core.run("begin").await;
    assert_ne!(core.show(&sql).await, "");
    let also = ask(second, start("f", "'{1, 2}'"));
    let asked = format!("select wait_event_type = 'Lock' from pg_stat_activity where pid = {pid}");
    let watching = core.db.connect().await;
    wait_until(
        "the second caller waits or has its answer",
        PATIENCE,
        async || also.is_finished() || show(&watching, &asked).await == "t",
    )
    .await;
    core.run("commit").await;
    let got = also.await.unwrap();
    assert!(
        got.starts_with("f ") && got.contains(" b ") && got.lines().count() == 1,
        "only what the first did not take: {got}"
    );
    assert_eq!(core.tasks(1).await, "a 0 started 1\nb 0 started 1");

    // Many at once, message by message: each task has one taker.
    core.define("flow wide\n map m").await;
    core.run(
        "select pgflow.start_flow('wide', (select jsonb_agg(i) from generate_series(1, 40) as i))",
    )
    .await;
    let mut takers = Vec::new();
    for _ in 0..8 {
        let client = core.db.connect().await;
        takers.push(tokio::spawn(async move {
            let mut got = Vec::new();
            for from in (1..=40).step_by(4) {
                let ids = format!("array(select generate_series({from}::bigint, {from} + 7))");
                got.push(show(&client, &start("wide", &ids)).await);
            }
            got
        }));
    }
    let mut rows = Vec::new();
    for taker in takers {
        for got in taker.await.unwrap() {
            rows.extend(got.lines().map(str::to_owned));
        }
    }
    let handed = rows.len();
    rows.sort();
    rows.dedup();
    assert_eq!((handed, rows.len()), (40, 40));
    let attempts = "select sum(attempts_count) from pgflow.step_tasks where flow_slug = 'wide'";
    assert_eq!(core.show(attempts).await, "40");
}

fn ask(client: Client, sql: String) -> JoinHandle<String> {
    tokio::spawn(async move { show(&client, &sql).await })
}

#[tokio::test]
async fn a_single_gets_the_runs_input_and_what_its_dependencies_produced() {
    let core = Core::new().await;
    core.define(
        "flow f
         object
         array
         nothing
         jsonnull
         text
         map none < array
         map some
         map more < some
         all < object, array, nothing, jsonnull, text, some, more
         last < all",
    )
    .await;
    let id = run(1);
    core.start_flow("f", "[\"x\", null]", 1).await;
    let expected = lines(
        r#"array 0 {"run": ["x", null]}
           jsonnull 0 {"run": ["x", null]}
           nothing 0 {"run": ["x", null]}
           object 0 {"run": ["x", null]}
           some 0 "x"
           some 1 null
           text 0 {"run": ["x", null]}"#,
    );
    assert_eq!(core.take("f").await, expected);
    core.complete(1, "object", 0, r#"{"run": 1}"#).await;
    core.complete(1, "array", 0, "[[]]").await;
    core.run(&format!(
        "select pgflow.complete_task('{id}', 'nothing', 0, null)"
    ))
    .await;
    core.complete(1, "jsonnull", 0, "null").await;
    core.complete(1, "text", 0, r#""t""#).await;
    core.complete(1, "some", 1, r#"{"second": true}"#).await;
    core.run(&format!(
        "select pgflow.complete_task('{id}', 'some', 0, null)"
    ))
    .await;
    // The element as it is: [] of an array of arrays, null of a task without output.
    let expected = lines(
        r#"more 0 null
           more 1 {"second": true}
           none 0 []"#,
    );
    assert_eq!(core.take("f").await, expected);
    core.complete(1, "more", 1, "2").await;
    core.complete(1, "more", 0, "1").await;
    core.complete(1, "none", 0, "0").await;
    assert_eq!(
        core.take("f").await,
        "all 0 {\"run\": [\"x\", null], \"more\": [1, 2], \"some\": [null, {\"second\": true}], \"text\": \"t\", \
         \"array\": [[]], \"object\": {\"run\": 1}, \"nothing\": null, \"jsonnull\": null}"
    );
    core.complete(1, "all", 0, "{}").await;
    assert_eq!(
        core.take("f").await,
        r#"last 0 {"all": {}, "run": ["x", null]}"#,
        "only of those it names"
    );
}

#[tokio::test]
async fn a_maps_task_gets_its_bare_element() {
    let core = Core::new().await;
    core.define("flow f\n a\n map m < a\n map n < m\n map r")
        .await;
    let elements = r#"[{"run": 1}, null, [1, [2]], "s", 0, false, []]"#;
    core.start_flow("f", elements, 1).await;
    let expected = lines(
        r#"r 0 {"run": 1}
           r 1 null
           r 2 [1, [2]]
           r 3 "s"
           r 4 0
           r 5 false
           r 6 []"#,
    );
    let got = core.take("f").await;
    assert_eq!(
        got,
        format!(
            "a 0 {{\"run\": [{{\"run\": 1}}, null, [1, [2]], \"s\", 0, false, []]}}\n{expected}"
        )
    );
    core.complete(1, "a", 0, elements).await;
    assert_eq!(core.take("f").await, expected.replace("r ", "m "));
    for index in (0..7).rev() {
        core.complete(1, "m", index, &format!("[{index}]")).await;
    }
    let expected: Vec<_> = (0..7).map(|index| format!("n {index} [{index}]")).collect();
    assert_eq!(core.take("f").await, expected.join("\n"));

    // A few of a large map, in one call with those of another run.
    core.start_flow("f", "[]", 2).await;
    core.start_flow("f", "[]", 3).await;
    core.take("f").await;
    let many = "[\"e0\", \"e1\", \"e2\", \"e3\", \"e4\", \"e5\", \"e6\", \"e7\", \"e8\", \"e9\"]";
    core.complete(2, "a", 0, many).await;
    core.complete(3, "a", 0, &many.replace('e', "f")).await;
    let some = format!(
        "select run_id, input from pgflow.start_tasks('f', array(select message_id from pgflow.step_tasks
         where step_slug = 'm' and task_index in (2, 9) and status = 'queued'), '{WORKER}') order by input"
    );
    let [two, three] = [run(2), run(3)];
    let expected = format!("{two} \"e2\"\n{two} \"e9\"\n{three} \"f2\"\n{three} \"f9\"");
    assert_eq!(core.show(&some).await, expected);
}

#[tokio::test]
async fn the_message_of_a_started_task_stays_hidden_for_its_timeout_and_two_seconds() {
    let core = Core::new().await;
    core.define("flow f(timeout => 40)\n a\n b (timeout => 7)\n c")
        .await;
    core.start_flow("f", "{}", 1).await;
    core.run("select pgmq.read('f', 2, 10)").await;
    let mut messages = Vec::new();
    for step in ["a", "b"] {
        let id = format!("select message_id from pgflow.step_tasks where step_slug = '{step}'");
        messages.push(core.show(&id).await);
    }
    let both = start("f", &format!("'{{{}}}'", messages.join(",")));
    let before = core.show("select clock_timestamp()").await;
    core.run(&both).await;
    let after = core.show("select clock_timestamp()").await;
    for (id, seconds) in messages.iter().zip([42, 9]) {
        let hidden = format!(
            "select vt >= timestamptz '{before}' + interval '{seconds} s' and vt <= timestamptz '{after}' + interval '{seconds} s'
             from pgmq.q_f where msg_id = {id}"
        );
        assert_eq!(core.show(&hidden).await, "t", "message {id}");
    }
    // What it did not start keeps its time: c, and a the second time round.
    let c = format!(
        "select count(*) from pgmq.q_f where vt <= timestamptz '{before}' + interval '2 s'"
    );
    assert_eq!(core.show(&c).await, "1");
    core.run("select pgmq.set_vt('f'::text, msg_id, 0) from pgmq.q_f")
        .await;
    core.run(&both).await;
    let visible = "select count(*) from pgmq.q_f where vt <= clock_timestamp()";
    assert_eq!(core.show(visible).await, "3");
}
