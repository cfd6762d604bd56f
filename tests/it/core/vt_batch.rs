//! `set_vt_batch`: when several messages become visible, each after its own number of seconds.

use super::{Core, lines};

async fn queue(core: &Core) {
    core.run("select pgflow.create_flow('q'); select pgmq.send('q', jsonb_build_object('n', n)) from generate_series(1, 4) as n;
              select pgmq.read('q', 600, 4)")
        .await;
}

#[tokio::test]
async fn each_message_gets_its_own_offset_and_comes_back() {
    let core = Core::new().await;
    queue(&core).await;
    let set = "select pgflow.set_vt_batch(queue_name => 'q', msg_ids => '{3, 1, 77}', vt_offsets => '{30, 10, 99}')";
    core.visible_in(set, "q", "msg_id = 1", 10).await;
    core.visible_in(set, "q", "msg_id = 3", 30).await;
    let set = "select msg_id, read_ct, vt > clock_timestamp(), enqueued_at < vt, message
               from pgflow.set_vt_batch('q', '{3, 1, 77}', '{30, 10, 99}') order by 1";
    assert_eq!(
        core.show(set).await,
        "1 1 t t {\"n\": 1}\n3 1 t t {\"n\": 3}",
        "unknown ids are passed over, nothing was read"
    );
    let row = "with set as (select * from pgflow.set_vt_batch('q', '{1}', '{5}')) select vt > now() from set;
               select vt = (select vt from pgmq.q_q where msg_id = 1) from pgflow.set_vt_batch('q', '{}', '{}')";
    assert_eq!(core.show(row).await, "t");

    // The others stay where they were.
    let others = "select count(*) from pgmq.q_q where msg_id in (2, 4) and vt > clock_timestamp() + interval '500 s'";
    assert_eq!(core.show(others).await, "2");
    // Into the past: visible now.
    core.visible_in(
        "select pgflow.set_vt_batch('q', '{2}', '{-60}')",
        "q",
        "msg_id = 2",
        -60,
    )
    .await;
    let visible = "select msg_id, read_ct from pgmq.q_q where vt <= clock_timestamp()";
    assert_eq!(core.show(visible).await, "2 1");
    // By the wall clock, not by the transaction's beginning.
    let clock = "begin; select pg_sleep(0.05); select vt >= now() + interval '7.05 s' from pgflow.set_vt_batch('q', '{2}', '{7}'); commit";
    assert!(core.show(clock).await.ends_with("\nt"));
}

#[tokio::test]
async fn nothing_asked_nothing_done_and_what_cannot_be_is_refused() {
    let core = Core::new().await;
    queue(&core).await;
    let before = core.show("select msg_id, vt from pgmq.q_q").await;
    for given in [
        "null, null",
        "'{}', '{}'",
        "null, '{1}'",
        "'{1}', null",
        "'{77}', '{1}'",
    ] {
        let set = format!("select * from pgflow.set_vt_batch('q', {given})");
        assert_eq!(core.show(&set).await, "", "{given}");
    }
    let cases = lines(
        "P0001 msg_ids length (2) must equal vt_offsets length (1)
         P0001 msg_ids length (1) must equal vt_offsets length (3)",
    );
    for (given, error) in ["'{1, 2}', '{1}'", "'{1}', '{1, 2, 3}'"]
        .iter()
        .zip(cases.lines())
    {
        let set = format!("select pgflow.set_vt_batch('q', {given})");
        assert_eq!(core.refused(&set).await, error);
    }
    let unknown = "select pgflow.set_vt_batch('nowhere', '{1}', '{1}')";
    assert_eq!(
        core.refused(unknown).await,
        "42P01 relation \"pgmq.q_nowhere\" does not exist"
    );
    // Names go through pgmq's own check.
    for name in ["q; drop table pgmq.q_q", "q--", "a$b", "a''b"] {
        let set = format!("select pgflow.set_vt_batch('{name}', '{{1}}', '{{1}}')");
        let refused = core.refused(&set).await;
        assert!(
            refused.starts_with("P0001 queue name contains invalid characters"),
            "{refused}"
        );
        let read = format!("select pgflow.read_with_poll('{name}', 1, 1)");
        let refused = core.refused(&read).await;
        assert!(
            refused.starts_with("P0001 queue name contains invalid characters"),
            "{refused}"
        );
    }
    assert_eq!(core.show("select msg_id, vt from pgmq.q_q").await, before);

    // Names are pgmq's names: without case.
    let upper = "select msg_id from pgflow.set_vt_batch('Q', '{1}', '{1}')";
    assert_eq!(core.show(upper).await, "1");
}
