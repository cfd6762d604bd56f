//! What a definition may say at 0.14 and in which words it is refused; columns, defaults and constraints, by their names.

use super::{at_0_14, lines, run};

#[tokio::test]
async fn an_option_that_is_null_is_the_default() {
    let core = at_0_14().await;
    let made = "select f.flow_slug, f.opt_max_attempts, f.opt_base_delay, f.opt_timeout from";
    for (call, expected) in [
        ("pgflow.create_flow('plain')", "plain 3 5 60"),
        (
            "pgflow.create_flow('nulls', null, null, null)",
            "nulls 3 5 60",
        ),
        (
            "pgflow.create_flow('some', null, base_delay => 0, timeout => 7)",
            "some 3 0 7",
        ),
        (
            "pgflow.create_flow('all', max_attempts => 1, base_delay => 2, timeout => 3)",
            "all 1 2 3",
        ),
        ("pgflow.create_flow('some', 9, 9, 9)", "some 3 0 7"),
    ] {
        assert_eq!(core.show(&format!("{made} {call} as f")).await, expected);
    }
    let nulls = "select pgflow.add_step('plain', 'a', null, null, null, null, null, null, null, null, null, null)";
    core.run(nulls).await;
    let row = "select step_type, deps_count, when_unmet, when_exhausted, required_input_pattern, forbidden_input_pattern
               from pgflow.steps";
    assert_eq!(core.show(row).await, "single 0 skip fail ∅ ∅");
}

#[tokio::test]
async fn a_step_says_its_conditions_and_what_follows_by_place_or_by_name() {
    let core = at_0_14().await;
    core.define("flow f\n root").await;
    let made = "select s.step_slug, s.step_type, s.step_index, s.deps_count, s.opt_max_attempts, s.opt_base_delay, s.opt_timeout,
                s.opt_start_delay, s.required_input_pattern, s.forbidden_input_pattern, s.when_unmet, s.when_exhausted from";
    let by_place = format!(
        "{made} pgflow.add_step('f', 'a', '{{root}}', 1, 2, 3, 4, 'map', '{{\"x\": 1}}', '{{\"y\": []}}', 'fail', 'skip-cascade') as s"
    );
    assert_eq!(
        core.show(&by_place).await,
        "a map 1 1 1 2 3 4 {\"x\": 1} {\"y\": []} fail skip-cascade"
    );
    let by_name = format!(
        "{made} pgflow.add_step(flow_slug => 'f', step_slug => 'b', forbidden_input_pattern => '{{}}', when_unmet => 'skip-cascade',
         when_exhausted => 'skip', required_input_pattern => '{{}}') as s"
    );
    assert_eq!(
        core.show(&by_name).await,
        "b single 2 0 ∅ ∅ ∅ ∅ {} {} skip-cascade skip"
    );
    // A call of 0.7, and again with other words: an existing step stays as it is.
    let like_before = format!("{made} pgflow.add_step('f', 'c', array['root'], timeout => 9) as s");
    assert_eq!(
        core.show(&like_before).await,
        "c single 3 1 ∅ ∅ 9 ∅ ∅ ∅ skip fail"
    );
    let again = format!("{made} pgflow.add_step('f', 'c', when_unmet => 'fail') as s");
    assert_eq!(
        core.show(&again).await,
        "c single 3 1 ∅ ∅ 9 ∅ ∅ ∅ skip fail"
    );
}

#[tokio::test]
async fn a_step_that_cannot_be_is_refused_by_name() {
    let core = at_0_14().await;
    core.define("flow f\n a\n b").await;
    let check = |name: &str| {
        format!("23514 new row for relation \"steps\" violates check constraint \"{name}\"")
    };
    for (arguments, expected) in [
        ("required_input_pattern => '[1]'", check("required_input_pattern_is_object")),
        ("required_input_pattern => 'null'", check("required_input_pattern_is_object")),
        ("forbidden_input_pattern => '\"x\"'", check("forbidden_input_pattern_is_object")),
        ("when_unmet => 'ignore'", check("when_unmet_is_valid")),
        ("when_unmet => ''", check("when_unmet_is_valid")),
        ("when_exhausted => 'retry'", check("when_exhausted_is_valid")),
        ("step_type => 'loop'", check("steps_step_type_check")),
        ("start_delay => -1", check("opt_start_delay_is_nonnegative")),
        (
            "deps_slugs => '{a, b}', step_type => 'map'",
            "P0001 Map step \"new\" can have at most one dependency, but 2 were provided: a, b".to_owned(),
        ),
        (
            "deps_slugs => '{gone}'",
            "23503 insert or update on table \"deps\" violates foreign key constraint \"deps_flow_slug_dep_slug_fkey\""
                .to_owned(),
        ),
        (
            "deps_slugs => '{new}'",
            "23514 new row for relation \"deps\" violates check constraint \"deps_check\"".to_owned(),
        ),
    ] {
        let sql = format!("select pgflow.add_step('f', 'new', {arguments})");
        assert_eq!(core.refused(&sql).await, expected, "{sql}");
    }
    let unknown = core.refused("select pgflow.add_step('gone', 'new')").await;
    assert!(
        unknown.ends_with("violates foreign key constraint \"steps_flow_slug_fkey\""),
        "{unknown}"
    );
    assert_eq!(core.show("select count(*) from pgflow.steps").await, "2");
}

#[tokio::test]
async fn a_dependency_named_twice_counts_once() {
    let core = at_0_14().await;
    core.define("flow f\n a\n b < a, a\n map c < a, a").await;
    assert_eq!(
        core.show("select step_slug, deps_count from pgflow.steps order by step_index")
            .await,
        "a 0\nb 1\nc 1"
    );
}

#[tokio::test]
async fn columns_come_after_those_of_0_7_in_the_contracts_order() {
    let core = at_0_14().await;
    let columns = "select c.relname || ':' || string_agg(' ' || a.attname, '' order by a.attnum)
        from pg_class as c join pg_attribute as a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
        where c.relnamespace = 'pgflow'::regnamespace
          and c.relname in ('steps', 'step_states', 'step_tasks', 'workers', 'worker_functions', 'step_task_record')
        group by c.relname order by c.relname";
    assert_eq!(
        core.show(columns).await,
        lines(
            "step_states: flow_slug run_id step_slug status remaining_tasks remaining_deps created_at started_at completed_at failed_at error_message initial_tasks output skip_reason skipped_at
             step_task_record: flow_slug run_id step_slug input msg_id task_index flow_input
             step_tasks: flow_slug run_id step_slug message_id task_index status attempts_count error_message output queued_at completed_at failed_at started_at last_worker_id requeued_count last_requeued_at permanently_stalled_at
             steps: flow_slug step_slug step_type step_index deps_count opt_max_attempts opt_base_delay opt_timeout created_at opt_start_delay required_input_pattern forbidden_input_pattern when_unmet when_exhausted
             worker_functions: function_name enabled debounce last_invoked_at created_at updated_at
             workers: worker_id queue_name function_name started_at deprecated_at last_heartbeat_at stopped_at"
        )
    );
}

#[tokio::test]
async fn a_state_that_cannot_be_is_refused_by_name() {
    let core = at_0_14().await;
    core.define("flow f\n a").await;
    core.start_flow("f", "{}", 1).await;
    for (set, name) in [
        ("status = 'lost'", "status_is_valid"),
        ("output = '1'", "output_only_for_completed_or_null"),
        ("skip_reason = 'why'", "skip_reason_matches_status"),
        (
            "status = 'skipped', remaining_tasks = null",
            "skip_reason_matches_status",
        ),
        (
            "status = 'skipped', skip_reason = 'why'",
            "remaining_tasks_state_consistency",
        ),
        ("status = 'created'", "remaining_tasks_state_consistency"),
        (
            "completed_at = now(), skipped_at = now()",
            "completed_at_or_failed_at_or_skipped_at",
        ),
        (
            "failed_at = now(), skipped_at = now()",
            "completed_at_or_failed_at_or_skipped_at",
        ),
        (
            "completed_at = now(), failed_at = now()",
            "completed_at_or_failed_at_or_skipped_at",
        ),
        (
            "skipped_at = created_at - interval '1 s'",
            "skipped_at_is_after_created_at",
        ),
    ] {
        let refused = core
            .refused(&format!("update pgflow.step_states set {set}"))
            .await;
        assert_eq!(
            refused,
            format!(
                "23514 new row for relation \"step_states\" violates check constraint \"{name}\""
            ),
            "{set}"
        );
    }
    let skip = "update pgflow.step_states set status = 'skipped', skip_reason = 'why', skipped_at = created_at, remaining_tasks = null";
    core.run(skip).await;
}

#[tokio::test]
async fn a_worker_function_has_defaults_and_a_debounce_of_a_second_at_least() {
    let core = at_0_14().await;
    core.run("insert into pgflow.worker_functions (function_name) values ('w')")
        .await;
    let row = "select enabled, debounce, last_invoked_at, created_at <= now(), updated_at <= now() from pgflow.worker_functions";
    assert_eq!(core.show(row).await, "t 00:00:06 ∅ t t");
    core.run("update pgflow.worker_functions set debounce = '1 s'")
        .await;
    let refused = core
        .refused("update pgflow.worker_functions set debounce = '999 ms'")
        .await;
    assert!(refused.starts_with("23514 "), "{refused}");
    let twice = core
        .refused("insert into pgflow.worker_functions (function_name) values ('w')")
        .await;
    assert!(twice.ends_with("\"worker_functions_pkey\""), "{twice}");
}

#[tokio::test]
async fn the_poll_of_0_7_is_gone_and_that_of_0_14_is_pgmqs() {
    let core = at_0_14().await;
    core.define("flow f\n a").await;
    core.start_flow("f", "{}", 1).await;
    let refused = core
        .refused("select * from pgflow.read_with_poll('f', 2, 10, 1, 100)")
        .await;
    assert!(refused.starts_with("42883 "), "{refused}");
    let polled = "select msg_id, read_ct, message ->> 'step_slug' from pgmq.read_with_poll(queue_name => 'f', vt => 2, qty => 10,
                  max_poll_seconds => 1, poll_interval_ms => 100)";
    assert_eq!(core.show(polled).await, "1 1 a");
}

#[tokio::test]
async fn set_vt_batch_returns_a_table_with_headers() {
    let core = at_0_14().await;
    core.run("select pgmq.create('q'); select pgmq.send('q', '{\"n\": 1}', '{\"h\": 1}'::jsonb); select pgmq.send('q', '{\"n\": 2}')")
        .await;
    let set = "select msg_id, read_ct, message, headers, vt > clock_timestamp() + interval '50 s', enqueued_at <= now()
               from pgflow.set_vt_batch('q', array[2, 1, 77], array[100, 60, 5]) order by msg_id";
    assert_eq!(
        core.show(set).await,
        "1 0 {\"n\": 1} {\"h\": 1} t t\n2 0 {\"n\": 2} ∅ t t"
    );
    let back = "select vt < clock_timestamp() from pgflow.set_vt_batch('q', array[1], array[-1])";
    assert_eq!(core.show(back).await, "t");
    for nothing in [
        "null, null",
        "'{}', '{}'",
        "null, array[1]",
        "array[1], null",
    ] {
        let sql = format!("select * from pgflow.set_vt_batch('q', {nothing})");
        assert_eq!(core.show(&sql).await, "", "{nothing}");
    }
    assert_eq!(
        core.refused("select * from pgflow.set_vt_batch('q', array[1, 2], array[1])")
            .await,
        "P0001 msg_ids length (2) must equal vt_offsets length (1)"
    );
    assert_eq!(
        core.refused("select * from pgflow.set_vt_batch('none', array[1], array[1])")
            .await,
        "42P01 relation \"pgmq.q_none\" does not exist"
    );
    let columns = "select pg_get_function_result('pgflow.set_vt_batch'::regproc)";
    assert_eq!(
        core.show(columns).await,
        "TABLE(msg_id bigint, read_ct integer, enqueued_at timestamp with time zone, vt timestamp with time zone, message jsonb, headers jsonb)"
    );
}

#[tokio::test]
async fn what_clients_are_granted_is_what_they_need_for_0_14() {
    let core = at_0_14().await;
    core.define("flow f\n a(max_attempts => 1, when_exhausted => 'skip')\n b < a")
        .await;
    let [viewer, worker] = ["viewer", "worker"].map(|role| format!("{role}_{}", core.db.name));
    core.run(&format!(
        "create role {viewer}; create role {worker};
         select flowgate.grant_viewer('{viewer}'); select flowgate.grant_worker('{worker}')"
    ))
    .await;
    let id = run(1);
    core.run(&format!(
        "set role {viewer}; select pgflow.start_flow_with_states('f', '{{}}', '{id}'); select pgflow.get_run_with_states('{id}')"
    ))
    .await;
    for forbidden in [
        "select pgflow.requeue_stalled_tasks()",
        "select pgflow.start_flow('f', '{}')",
        "select pgflow.delete_flow_and_data('f')",
        "select * from pgflow.worker_functions",
    ] {
        let refused = core.refused(forbidden).await;
        assert!(
            refused.starts_with("42501 permission denied for"),
            "{refused}"
        );
    }
    core.run(&format!(
        "set role {worker}; select pgflow.track_worker_function('w')"
    ))
    .await;
    let shape = "select pgflow.ensure_flow_compiled('f', pgflow._get_flow_shape('f')) ->> 'status'";
    assert_eq!(core.show(shape).await, "verified");
    let taken = core.take("f").await;
    assert_eq!(taken, "a 0 {}");
    assert_eq!(core.fail(1, "a", 0, "no").await, "failed");
    assert_eq!(core.take("f").await, "b 0 {}");
    assert_eq!(core.complete(1, "b", 0, "1").await, "completed");
    core.run("select pgflow.requeue_stalled_tasks(); reset role")
        .await;
    assert_eq!(
        core.states(1).await,
        "completed 0\na skipped ∅ 0 1\nb completed 0 0 1"
    );
}
