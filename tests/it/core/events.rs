//! What is said on a run's topic: payloads to the key, in the order of the contract, once, and never of what was undone.

use super::{Core, WORKER, lines, refused, run};

/// Each event's payload must be what the rows say: built here, in SQL, from them.
async fn payloads_are(core: &Core, n: u32, expected: &[(&str, &str)]) {
    let id = run(n);
    let names: Vec<_> = expected.iter().map(|(event, _)| *event).collect();
    assert_eq!(core.events(n).await, names.join(" "));
    for (at, (event, payload)) in expected.iter().enumerate() {
        let seq = at + 1;
        let compared = format!(
            "select e.payload, w.wanted, e.payload = w.wanted, e.event, e.topic = 'pgflow:run:{id}', e.private
             from flowgate.event as e,
             lateral (select jsonb_build_object('run_id', '{id}') || {payload} as wanted
                      from pgflow.runs as r where r.run_id = '{id}') as w
             where e.topic = 'pgflow:run:{id}' and e.seq = {seq}"
        );
        let got = core.show(&compared).await;
        assert!(got.ends_with(&format!(" t {event} t f")), "{got}");
    }
}

/// A step's row in the payloads above.
fn of_step(step: &str, keys: &str) -> String {
    format!(
        "(select jsonb_build_object('step_slug', s.step_slug, {keys}) from pgflow.step_states as s
          where s.run_id = r.run_id and s.step_slug = '{step}')"
    )
}

#[tokio::test]
async fn a_successful_run_says_two_things_and_two_of_each_step() {
    let core = Core::new().await;
    core.define("flow f\n zero\n one < zero\n map two < one\n map none\n three < none, two")
        .await;
    core.start_flow("f", "[]", 1).await;
    for (step, output) in [
        ("zero", "{\"o\": 0}"),
        ("one", "[\"x\", \"y\"]"),
        ("two", "1"),
        ("three", "null"),
    ] {
        core.take("f").await;
        if step == "two" {
            core.complete(1, "two", 1, "{\"second\": 1}").await;
        }
        core.complete(1, step, 0, output).await;
    }
    let started = |step| {
        of_step(
            step,
            "'event_type', 'step:started', 'status', 'started', 'started_at', s.started_at,
             'remaining_tasks', s.initial_tasks, 'remaining_deps', 0",
        )
    };
    let completed = |step, output: &str| {
        of_step(
            step,
            &format!(
                "'event_type', 'step:completed', 'status', 'completed', 'completed_at', s.completed_at, 'output', '{output}'::jsonb"
            ),
        )
    };
    let run_started = "jsonb_build_object('event_type', 'run:started', 'status', 'started', 'flow_slug', 'f', 'input', '[]'::jsonb,
                       'remaining_steps', 5, 'started_at', r.started_at)";
    let run_completed =
        "jsonb_build_object('event_type', 'run:completed', 'status', 'completed', 'flow_slug', 'f',
                         'output', '{\"three\": null}'::jsonb, 'completed_at', r.completed_at)";
    let taskless = of_step(
        "none",
        "'event_type', 'step:completed', 'status', 'completed', 'output', '[]'::jsonb, 'started_at', s.started_at,
         'completed_at', s.completed_at, 'remaining_tasks', 0, 'remaining_deps', 0",
    );
    payloads_are(
        &core,
        1,
        &[
            ("run:started", run_started),
            ("step:none:completed", &taskless),
            ("step:zero:started", &started("zero")),
            ("step:zero:completed", &completed("zero", "{\"o\": 0}")),
            ("step:one:started", &started("one")),
            ("step:one:completed", &completed("one", "[\"x\", \"y\"]")),
            ("step:two:started", &started("two")),
            (
                "step:two:completed",
                &completed("two", "[1, {\"second\": 1}]"),
            ),
            ("step:three:started", &started("three")),
            ("step:three:completed", &completed("three", "null")),
            ("run:completed", run_completed),
        ],
    )
    .await;

    // 2 and 2 a step; nothing of tasks.
    core.define("flow g\n map m\n b < m\n c").await;
    core.start_flow("g", "[1, 2, 3]", 2).await;
    core.take("g").await;
    for index in 0..3 {
        core.complete(2, "m", index, "1").await;
    }
    core.complete(2, "c", 0, "1").await;
    core.take("g").await;
    core.complete(2, "b", 0, "1").await;
    assert_eq!(core.events(2).await.split(' ').count(), 2 + 2 * 3);
}

#[tokio::test]
async fn a_failure_is_said_of_the_step_and_of_the_run_with_its_words() {
    let core = Core::new().await;
    core.define("flow f(max_attempts => 2, base_delay => 0)\n map a")
        .await;
    core.start_flow("f", "[1, 2]", 1).await;
    core.take("f").await;
    // Not of a retry.
    core.fail(1, "a", 1, "once").await;
    assert_eq!(core.events(1).await, "run:started step:a:started");
    core.take("f").await;
    core.fail(1, "a", 1, "twice").await;
    core.fail(1, "a", 0, "late").await;
    core.complete(1, "a", 0, "1").await;
    let run_started =
        "jsonb_build_object('event_type', 'run:started', 'status', 'started', 'flow_slug', 'f',
                       'input', '[1, 2]'::jsonb, 'remaining_steps', 1, 'started_at', r.started_at)";
    let step_started = of_step(
        "a",
        "'event_type', 'step:started', 'status', 'started', 'started_at', s.started_at, 'remaining_tasks', 2, 'remaining_deps', 0",
    );
    let step_failed = of_step(
        "a",
        "'event_type', 'step:failed', 'status', 'failed', 'error_message', 'twice', 'failed_at', s.failed_at",
    );
    let run_failed =
        "jsonb_build_object('event_type', 'run:failed', 'status', 'failed', 'flow_slug', 'f',
                      'error_message', 'twice', 'failed_at', r.failed_at)";
    payloads_are(
        &core,
        1,
        &[
            ("run:started", run_started),
            ("step:a:started", &step_started),
            ("step:a:failed", &step_failed),
            ("run:failed", run_failed),
        ],
    )
    .await;
}

#[tokio::test]
async fn a_type_violation_is_said_of_the_run_without_words_and_then_of_the_step() {
    let core = Core::new().await;
    core.define("flow f\n a\n map m < a").await;
    core.start_flow("f", "{}", 1).await;
    core.take("f").await;
    core.complete(1, "a", 0, "{}").await;
    let run_started =
        "jsonb_build_object('event_type', 'run:started', 'status', 'started', 'flow_slug', 'f',
                       'input', '{}'::jsonb, 'remaining_steps', 2, 'started_at', r.started_at)";
    let step_started = of_step(
        "a",
        "'event_type', 'step:started', 'status', 'started', 'started_at', s.started_at, 'remaining_tasks', 1, 'remaining_deps', 0",
    );
    let step_failed = of_step(
        "a",
        "'event_type', 'step:failed', 'status', 'failed', 'failed_at', s.failed_at,
         'error_message', '[TYPE_VIOLATION] Map step m expects array input but dependency a produced object'",
    );
    let run_failed = "jsonb_build_object('event_type', 'run:failed', 'status', 'failed', 'flow_slug', 'f', 'failed_at', r.failed_at)";
    payloads_are(
        &core,
        1,
        &[
            ("run:started", run_started),
            ("step:a:started", &step_started),
            ("run:failed", run_failed),
            ("step:a:failed", &step_failed),
        ],
    )
    .await;
}

#[tokio::test]
async fn one_call_says_what_it_did_from_the_cause_to_the_end() {
    let core = Core::new().await;
    // `a` completes; `map m` below it has nothing to do, nor has `map n` below that; `d` and `b` can start.
    core.define("flow f\n a\n map m < a\n map n < m\n d < n\n b < a\n map r\n map s < r")
        .await;
    core.start_flow("f", "[]", 1).await;
    core.take("f").await;
    core.complete(1, "a", 0, "[]").await;
    let by_call = "select string_agg(event, ' ' order by seq) from flowgate.event group by xid order by min(seq)";
    let expected = lines(
        "run:started step:r:completed step:s:completed step:a:started
         step:a:completed step:m:completed step:n:completed step:b:started step:d:started",
    );
    assert_eq!(core.show(by_call).await, expected);
    // The last step's end is the run's.
    core.take("f").await;
    core.complete(1, "b", 0, "1").await;
    core.complete(1, "d", 0, "1").await;
    let last = "select string_agg(event, ' ' order by seq) from flowgate.event group by xid order by min(seq) desc limit 1";
    assert_eq!(core.show(last).await, "step:d:completed run:completed");

    // Steps start in the order of their slugs, whatever order they were added in.
    core.define("flow g\n z\n m\n a\n map k").await;
    core.start_flow("g", "[1]", 2).await;
    assert_eq!(
        core.events(2).await,
        "run:started step:a:started step:k:started step:m:started step:z:started"
    );
}

#[tokio::test]
async fn what_is_rolled_back_is_not_said_and_leaves_no_gap() {
    let core = Core::new().await;
    core.define("flow f\n a\n b < a").await;
    let id = run(1);
    core.run(&format!(
        "begin; select pgflow.start_flow('f', '{{}}', '{id}'); rollback"
    ))
    .await;
    assert_eq!(core.show("select count(*) from flowgate.event").await, "0");
    core.start_flow("f", "{}", 1).await;
    core.take("f").await;
    core.run(&format!(
        "begin; select pgflow.complete_task('{id}', 'a', 0, '1'); rollback;
         begin; savepoint s; select pgflow.complete_task('{id}', 'a', 0, '1'); rollback to s;
         select pgflow.complete_task('{id}', 'a', 0, '2'); commit"
    ))
    .await;
    let said = "select seq, event, payload -> 'output' from flowgate.event order by id";
    let expected = lines(
        "1 run:started ∅
         2 step:a:started ∅
         3 step:a:completed 2
         4 step:b:started ∅",
    );
    assert_eq!(core.show(said).await, expected);
}

#[tokio::test]
async fn every_topic_counts_its_own_from_one_also_when_many_end_at_once() {
    let core = Core::new().await;
    core.define("flow f\n map m\n a\n b\n c < m, a, b").await;
    for n in 1..=6 {
        core.start_flow("f", "[1, 2, 3]", n).await;
    }
    core.take("f").await;
    let mut workers = Vec::new();
    for part in 0..5_u32 {
        let client = core.db.connect().await;
        workers.push(tokio::spawn(async move {
            for n in 1..=6 {
                let (step, index) =
                    [("m", 0), ("m", 1), ("m", 2), ("a", 0), ("b", 0)][part as usize];
                let id = run(n);
                let complete =
                    format!("select pgflow.complete_task('{id}', '{step}', {index}, '1')");
                super::show(&client, &complete).await;
            }
        }));
    }
    for worker in workers {
        worker.await.unwrap();
    }
    let counted = "select topic, count(*), min(seq), max(seq), count(distinct seq),
                   bool_and(id > (select coalesce(max(o.id), 0) from flowgate.event as o where o.topic = e.topic and o.seq < e.seq))
                   from flowgate.event as e group by topic order by topic";
    let expected: Vec<_> = (1..=6)
        .map(|n| format!("pgflow:run:{} 8 1 8 8 t", run(n)))
        .collect();
    assert_eq!(core.show(counted).await, expected.join("\n"));
    let last = "select count(*) from flowgate.event where event = 'step:c:started' and seq = 8";
    assert_eq!(core.show(last).await, "6");
}

#[tokio::test]
async fn an_event_is_a_message_of_supabases_table_too() {
    let core = Core::new().await;
    core.define("flow f\n a").await;
    core.start_flow("f", "{\"in\": 1}", 1).await;
    let id = run(1);
    let shown = "select topic, extension, event, private, payload ->> 'event_type', id is not null,
                 updated_at = inserted_at, inserted_at = now() at time zone 'UTC' or inserted_at is not null,
                 pg_typeof(id), pg_typeof(payload), pg_typeof(inserted_at), pg_typeof(updated_at)
                 from realtime.messages where event = 'run:started'";
    assert_eq!(
        core.show(shown).await,
        format!(
            "pgflow:run:{id} broadcast run:started f run:started t t t uuid jsonb timestamp without time zone timestamp without time zone"
        )
    );
    assert_eq!(
        core.show("select count(*), count(distinct id) from realtime.messages")
            .await,
        "2 2"
    );

    // And anybody who may sends his own: private only if he says so.
    core.run("select realtime.send('{\"x\": 1}'::jsonb, 'mine', 'room'); select realtime.send(payload => '2'::jsonb, event => 'mine', topic => 'room', private => true)")
        .await;
    let sent =
        "select seq, event, payload, private from flowgate.event where topic = 'room' order by seq";
    assert_eq!(core.show(sent).await, "1 mine {\"x\": 1} f\n2 mine 2 t");

    // Others empty it, give it partitions of their own and hang triggers on it, as on Supabase's.
    let today = core
        .show("select to_char(now() at time zone 'UTC', 'YYYY_MM_DD')")
        .await;
    core.run(&format!(
        "delete from realtime.messages; drop table realtime.messages_{today};
         create table realtime.messages_{today} partition of realtime.messages
         for values from (date_trunc('day', now() at time zone 'UTC')) to (date_trunc('day', now() at time zone 'UTC') + interval '1 day');
         create table heard (event text);
         create function hear() returns trigger language plpgsql as
           $$ begin insert into public.heard values (new.event); return null; end $$;
         create trigger hear after insert on realtime.messages for each row execute function hear();
         select realtime.send('3'::jsonb, 'heard', 'room')"
    ))
    .await;
    let heard =
        format!("select event from heard union all select event from realtime.messages_{today}");
    assert_eq!(core.show(&heard).await, "heard\nheard");
    let outbox = "select count(*) from flowgate.event where topic = 'room'";
    assert_eq!(
        core.show(outbox).await,
        "3",
        "what is deleted there stays in the outbox"
    );
    // Three days of it are kept.
    core.run("create table realtime.messages_2020_01_01 partition of realtime.messages for values from ('2020-01-01') to ('2020-01-02');
              select flowgate.drop_partitions('30 days')")
        .await;
    let days = "select count(*) filter (where relname = 'messages_2020_01_01'), count(*) >= 8 from pg_class
                where relnamespace = 'realtime'::regnamespace and relispartition";
    assert_eq!(core.show(days).await, "0 t");
}

#[tokio::test]
async fn what_is_done_and_what_is_told_go_together_or_not_at_all() {
    let core = Core::new().await;
    core.define("flow f\n a").await;
    core.run("alter table flowgate.event add constraint none check (event not in ('step:a:completed', 'forbidden')) not valid")
        .await;
    core.start_flow("f", "{}", 1).await;
    core.run(&format!(
        "select pgflow.start_tasks('f', '{{1}}', '{WORKER}')"
    ))
    .await;
    let complete = format!("select pgflow.complete_task('{}', 'a', 0, '1')", run(1));
    let said = refused(&core.client, &complete).await;
    assert!(said.starts_with("23514 "), "{said}");
    assert_eq!(core.queue("f").await.lines().count(), 1);
    core.run("alter table flowgate.event drop constraint none")
        .await;
    assert_eq!(core.complete(1, "a", 0, "1").await, "completed");
    assert!(core.states(1).await.starts_with("completed 0"));
    let told = "select seq, event from flowgate.event order by id";
    assert_eq!(
        core.show(told).await,
        "1 run:started\n2 step:a:started\n3 step:a:completed\n4 run:completed"
    );

    // What others send must not fail them: a warning, and no gap.
    core.run(
        "alter table flowgate.event add constraint none check (event <> 'forbidden') not valid",
    )
    .await;
    core.run("select realtime.send('{}'::jsonb, event, 'room') from unnest(array['x', 'forbidden', 'y']) as event")
        .await;
    let told = "select seq, event from flowgate.event where topic = 'room' order by id";
    assert_eq!(core.show(told).await, "1 x\n2 y");
}

#[tokio::test]
async fn tasks_tell_of_themselves_only_where_that_was_asked_for() {
    let core = Core::new().await;
    core.define("flow f(max_attempts => 2, base_delay => 0)\n map m\n a")
        .await;
    let told = "select event, seq, payload - 'run_id' from flowgate.event where event like 'task:%' order by id";
    core.start_flow("f", "[1]", 1).await;
    core.take("f").await;
    core.complete(1, "a", 0, "1").await;
    assert_eq!(core.show(told).await, "", "not at first");

    assert_eq!(
        core.show("select flowgate.set_task_events(true)").await,
        "t"
    );
    core.complete(1, "m", 0, "1").await;
    core.start_flow("f", "[1]", 2).await;
    core.take("f").await;
    core.fail(2, "a", 0, "once").await;
    core.take("f").await;
    core.fail(2, "a", 0, "twice").await;
    let told_of: Vec<_> = core.show(told).await.lines().map(str::to_owned).collect();
    let mut expected = [
        ("m", "completed", 1, "completed", None),
        ("a", "started", 1, "started", None),
        ("m", "started", 1, "started", None),
        ("a", "retrying", 1, "queued", Some("once")),
        ("a", "started", 2, "started", None),
        ("a", "failed", 2, "failed", Some("twice")),
    ]
    .map(|(step, event, attempts, status, error)| {
        let error = error.map_or(String::new(), |error| {
            format!("\"error_message\": \"{error}\", ")
        });
        // jsonb sorts keys by length first.
        format!(
            "task:{step}:0:{event} ∅ {{\"status\": \"{status}\", \"step_slug\": \"{step}\", \"event_type\": \"task:{event}\", \
             \"task_index\": 0, {error}\"attempts_count\": {attempts}}}"
        )
    });
    // The two starts are one statement's.
    if told_of[1] != expected[1] {
        expected.swap(1, 2);
    }
    assert_eq!(told_of, expected);
    // What is counted is counted as ever.
    let counted = "select max(seq) - count(seq) from flowgate.event group by topic";
    assert_eq!(core.show(counted).await, "0\n0");

    assert_eq!(
        core.show("select flowgate.set_task_events(false)").await,
        "f"
    );
    let before = core.show(told).await;
    core.start_flow("f", "[1]", 3).await;
    core.take("f").await;
    assert_eq!(core.show(told).await, before);
}
