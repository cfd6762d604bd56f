//! Reading a queue: `read_with_poll`, and the deprecated `poll_for_tasks`.

use tokio_postgres::AsyncMessage;

use super::{Core, PATIENCE, lines, show};
use crate::support::proxy::connect_hearing;
use crate::support::wait::wait_until;

/// A queue with messages 1 to 5, `{"n": 1}` to `{"n": 5}`.
async fn queue(core: &Core) {
    core.run("select pgflow.create_flow('q'); select pgmq.send('q', jsonb_build_object('n', n)) from generate_series(1, 5) as n")
        .await;
}

fn read(vt: i32, qty: i32, more: &str) -> String {
    format!("select msg_id from pgflow.read_with_poll('q', {vt}, {qty}{more}) order by 1")
}

#[tokio::test]
async fn the_oldest_visible_messages_are_taken_and_hidden() {
    let core = Core::new().await;
    queue(&core).await;
    let before = core.show("select clock_timestamp()").await;
    let columns = "select msg_id, read_ct, enqueued_at <= clock_timestamp(), vt > enqueued_at, message
                   from pgflow.read_with_poll(queue_name => 'q', vt => 100, qty => 2, max_poll_seconds => 5, poll_interval_ms => 100)
                   order by 1";
    assert_eq!(
        core.show(columns).await,
        "1 1 t t {\"n\": 1}\n2 1 t t {\"n\": 2}"
    );
    let after = core.show("select clock_timestamp()").await;
    // As the row says: counted, and hidden from the moment of reading, not of the transaction's beginning.
    let hidden = format!(
        "select msg_id, read_ct, vt between timestamptz '{before}' + interval '100 s' and timestamptz '{after}' + interval '100 s'
         from pgmq.q_q order by 1"
    );
    assert_eq!(
        core.show(&hidden).await,
        "1 1 t\n2 1 t\n3 0 f\n4 0 f\n5 0 f"
    );
    let clock = "begin; select pg_sleep(0.05);
                 select vt >= now() + interval '100.05 s' from pgflow.read_with_poll('q', 100, 1); commit";
    assert!(core.show(clock).await.ends_with("\nt"));

    // What is hidden is passed over; what becomes visible again is the oldest again, and was read before.
    core.run("select pgmq.set_vt('q'::text, 2::bigint, -1)")
        .await;
    let read = "select msg_id, read_ct from pgflow.read_with_poll('q', 0, 10) order by 1";
    assert_eq!(core.show(read).await, "2 2\n4 1\n5 1");
    // Hidden for no time at all.
    assert_eq!(core.show(read).await, "2 3\n4 2\n5 2");
    let row = "select m.enqueued_at = q.enqueued_at, m.vt = q.vt, m.message = q.message
               from pgflow.read_with_poll('q', 50, 1) as m join pgmq.q_q as q using (msg_id)";
    // The table is read as it was when the statement began.
    assert_eq!(core.show(row).await, "t f t");
}

#[tokio::test]
async fn a_condition_takes_only_messages_that_contain_it() {
    let core = Core::new().await;
    queue(&core).await;
    let some = read(9, 10, r#", conditional => '{"n": 4}'"#);
    assert_eq!(core.show(&some).await, "4");
    let none = read(
        9,
        10,
        r#", max_poll_seconds => 1, conditional => '{"n": 9}'"#,
    );
    assert_eq!(core.show(&none).await, "");
    let all = read(9, 10, ", 5, 100, '{}'");
    assert_eq!(core.show(&all).await, "1\n2\n3\n5");
}

#[tokio::test]
async fn a_poll_without_time_reads_nothing_and_one_in_vain_comes_back_empty() {
    let core = Core::new().await;
    queue(&core).await;
    for seconds in [0, -1] {
        let read = read(9, 10, &format!(", max_poll_seconds => {seconds}"));
        assert_eq!(core.show(&read).await, "");
    }
    let counts = "select sum(read_ct), bool_and(vt <= clock_timestamp()) from pgmq.q_q";
    assert_eq!(core.show(counts).await, "0 t");
    assert_eq!(core.show(&read(9, 10, ", 1, 5")).await, "1\n2\n3\n4\n5");
    assert_eq!(core.show(&read(9, 10, ", 1, 5")).await, "");
    assert_eq!(
        core.refused("select pgflow.read_with_poll('nowhere', 1, 1)")
            .await,
        "42P01 relation \"pgmq.q_nowhere\" does not exist"
    );
}

#[tokio::test]
async fn a_poll_sees_what_others_commit_while_it_waits() {
    let core = Core::new().await;
    core.define("flow q\n a").await;
    let poller = core.db.connect().await;
    let pid = show(&poller, "select pg_backend_pid()").await;
    let poll = tokio::spawn(async move {
        let sql = "select message ->> 'step_slug' from pgflow.read_with_poll('q', 9, 10, 50, 10)";
        show(&poller, sql).await
    });
    // Asleep within the call: it has looked at least once.
    let asleep = format!("select wait_event = 'PgSleep' from pg_stat_activity where pid = {pid}");
    wait_until("the poll waits", PATIENCE, async || {
        core.show(&asleep).await == "t"
    })
    .await;
    // Rolled back is not sent.
    core.run("begin; select pgflow.start_flow('q', '{}'); rollback")
        .await;
    assert!(!poll.is_finished());
    core.start_flow("q", "{}", 1).await;
    assert_eq!(poll.await.unwrap(), "a");

    // A message that becomes visible meanwhile, too.
    core.run("select pgmq.set_vt('q'::text, msg_id, 1) from pgmq.q_q")
        .await;
    let read = "select read_ct from pgflow.read_with_poll('q', 9, 10, 50, 10)";
    assert_eq!(core.show(read).await, "2");
}

#[tokio::test]
async fn a_message_somebody_holds_is_passed_over_not_waited_for() {
    let core = Core::new().await;
    queue(&core).await;
    let holder = core.db.connect().await;
    let held = show(&holder, &format!("begin; {}", read(9, 2, ""))).await;
    assert_eq!(held, "1\n2");
    assert_eq!(core.show(&read(9, 2, "")).await, "3\n4");
    show(&holder, "rollback").await;
    assert_eq!(core.show(&read(9, 10, "")).await, "1\n2\n5");

    // Many readers at once: each message goes to one.
    core.run("select pgmq.send('q', '{}') from generate_series(1, 60)")
        .await;
    let mut readers = Vec::new();
    for _ in 0..6 {
        let client = core.db.connect().await;
        readers.push(tokio::spawn(async move {
            let mut got = Vec::new();
            for _ in 0..4 {
                let ids = show(&client, &read(600, 3, ", 1, 5")).await;
                got.extend(ids.lines().map(str::to_owned));
            }
            got
        }));
    }
    let mut got = Vec::new();
    for reader in readers {
        got.extend(reader.await.unwrap());
    }
    let taken = got.len();
    got.sort();
    got.dedup();
    assert_eq!(got.len(), taken);
    let counted = "select sum(read_ct), max(read_ct) from pgmq.q_q where msg_id > 5";
    assert_eq!(core.show(counted).await, format!("{taken} 1"));
}

#[tokio::test]
async fn the_answer_has_pgmqs_columns_by_name_whatever_pgmq() {
    let core = Core::new().await;
    queue(&core).await;
    core.run("do $$ begin
                if exists (select from pg_attribute where attrelid = 'pgmq.q_q'::regclass and attname = 'headers') then
                  update pgmq.q_q set headers = '{\"h\": 1}';
                end if;
              end $$")
        .await;
    for (call, id) in [
        ("pgflow.read_with_poll('q', 30, 1)", "1"),
        ("pgflow.set_vt_batch('q', '{3}', '{30}')", "3"),
    ] {
        // Just what the queue's row holds, in every column that pgmq's type has.
        let shown = format!(
            "drop table if exists told;
             create temp table told as select pg_typeof(m) as type, to_jsonb(m) as message from {call} as m;
             select q.msg_id, type, to_jsonb(q) @> told.message,
                    (select count(*) from jsonb_object_keys(told.message))
                      = (select count(*) from pg_attribute
                         where attrelid = 'pgmq.message_record'::regclass and attnum > 0 and not attisdropped)
             from told join pgmq.q_q as q on q.msg_id = (told.message ->> 'msg_id')::bigint"
        );
        assert_eq!(
            core.show(&shown).await,
            format!("{id} pgmq.message_record t t")
        );
    }
}

#[tokio::test]
async fn polling_for_tasks_is_deprecated_and_says_so() {
    let core = Core::new().await;
    core.define("flow q\n a").await;
    core.start_flow("q", "{}", 1).await;
    let (client, mut hearing) = connect_hearing(&core.db.primary_url).await;
    let poll = "select * from pgflow.poll_for_tasks(queue_name => 'q', vt => 9, qty => 10, max_poll_seconds => 5, poll_interval_ms => 100);
                select * from pgflow.poll_for_tasks('q', 9, 10)";
    assert_eq!(show(&client, poll).await, "");
    let notices: Vec<_> = hearing
        .now()
        .into_iter()
        .filter_map(|message| match message.unwrap() {
            AsyncMessage::Notice(notice) => Some(notice.severity().to_owned()),
            _ => None,
        })
        .collect();
    assert_eq!(notices, ["NOTICE", "NOTICE"]);
    assert_eq!(core.tasks(1).await, "a 0 queued 0");
    let unread = "select read_ct from pgmq.q_q";
    assert_eq!(core.show(unread).await, "0");
    let columns = lines(
        "flow_slug text
         run_id uuid
         step_slug text
         input jsonb
         msg_id bigint
         task_index integer",
    );
    let record = "select attname, format_type(atttypid, atttypmod) from pg_attribute
                  where attrelid = 'pgflow.step_task_record'::regclass and attnum > 0 order by attnum";
    assert_eq!(core.show(record).await, columns);
}
