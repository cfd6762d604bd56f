//! What the tables themselves refuse, by constraint, whoever writes; and what a row is by default.

use super::{Core, WORKER, lines, run};

#[tokio::test]
async fn rows_are_by_default_what_a_beginning_is() {
    let core = Core::new().await;
    core.run("insert into pgflow.flows (flow_slug) values ('f')")
        .await;
    let flow = "select opt_max_attempts, opt_base_delay, opt_timeout, created_at <= now() from pgflow.flows";
    assert_eq!(core.show(flow).await, "3 1 60 t");
    let step = "insert into pgflow.steps (flow_slug, step_slug) values ('f', 'a')
                returning step_type, step_index, deps_count, opt_max_attempts, opt_base_delay, opt_timeout,
                created_at = now(), opt_start_delay";
    assert_eq!(core.show(step).await, "single 0 0 ∅ ∅ ∅ t ∅");
    let run = "insert into pgflow.runs (flow_slug, input) values ('f', 'null')
               returning run_id is not null, status, input, output, remaining_steps, started_at = now(), completed_at, failed_at";
    assert_eq!(core.show(run).await, "t started null ∅ 0 t ∅ ∅");
    let state = "insert into pgflow.step_states (flow_slug, run_id, step_slug) select 'f', run_id, 'a' from pgflow.runs
                 returning status, remaining_tasks, remaining_deps, created_at = now(), started_at, completed_at, failed_at,
                 error_message, initial_tasks";
    assert_eq!(core.show(state).await, "created ∅ 0 t ∅ ∅ ∅ ∅ ∅");
    let task = "insert into pgflow.step_tasks (flow_slug, run_id, step_slug) select 'f', run_id, 'a' from pgflow.runs
                returning message_id, task_index, status, attempts_count, error_message, output, queued_at = now(),
                completed_at, failed_at, started_at, last_worker_id";
    assert_eq!(core.show(task).await, "∅ 0 queued 0 ∅ ∅ t ∅ ∅ ∅ ∅");
    let worker = "insert into pgflow.workers (worker_id, queue_name, function_name) values (gen_random_uuid(), 'q', 'f')
                  returning started_at = now(), deprecated_at, last_heartbeat_at = now()";
    assert_eq!(core.show(worker).await, "t ∅ t");
}

#[tokio::test]
async fn impossible_rows_are_refused_by_the_constraint_that_says_so() {
    let core = Core::new().await;
    core.define("flow f\n a\n b < a\n flow g\n a").await;
    core.start_flow("f", "{}", 1).await;
    let run = run(1);
    let later = "now() + interval '1 h'";
    let runs = |set: &str| format!("update pgflow.runs set {set}");
    let a = |set: &str| format!("update pgflow.step_states set {set} where step_slug = 'a'");
    let b = |set: &str| format!("update pgflow.step_states set {set} where step_slug = 'b'");
    let task = |set: &str| format!("update pgflow.step_tasks set {set}");
    let checks = [
        (
            "flows",
            "update pgflow.flows set flow_slug = '1' where flow_slug = 'g'".to_owned(),
            "slug_is_valid",
        ),
        (
            "flows",
            "update pgflow.flows set opt_max_attempts = -1".to_owned(),
            "opt_max_attempts_is_nonnegative",
        ),
        (
            "flows",
            "update pgflow.flows set opt_base_delay = -1".to_owned(),
            "opt_base_delay_is_nonnegative",
        ),
        (
            "flows",
            "update pgflow.flows set opt_timeout = 0".to_owned(),
            "opt_timeout_is_positive",
        ),
        (
            "steps",
            "update pgflow.steps set deps_count = -1".to_owned(),
            "steps_deps_count_check",
        ),
        (
            "steps",
            "update pgflow.steps set step_slug = 'run' where flow_slug = 'g'".to_owned(),
            "steps_step_slug_check",
        ),
        (
            "steps",
            "update pgflow.steps set step_type = 'loop'".to_owned(),
            "steps_step_type_check",
        ),
        (
            "steps",
            "update pgflow.steps set opt_max_attempts = -1".to_owned(),
            "opt_max_attempts_is_nonnegative",
        ),
        (
            "steps",
            "update pgflow.steps set opt_base_delay = -1".to_owned(),
            "opt_base_delay_is_nonnegative",
        ),
        (
            "steps",
            "update pgflow.steps set opt_timeout = 0".to_owned(),
            "opt_timeout_is_positive",
        ),
        (
            "steps",
            "update pgflow.steps set opt_start_delay = -1".to_owned(),
            "opt_start_delay_is_nonnegative",
        ),
        (
            "deps",
            "update pgflow.deps set dep_slug = 'b'".to_owned(),
            "deps_check",
        ),
        (
            "runs",
            runs("remaining_steps = -1"),
            "runs_remaining_steps_check",
        ),
        ("runs", runs("status = 'skipped'"), "status_is_valid"),
        (
            "runs",
            runs("completed_at = now(), failed_at = now()"),
            "completed_at_or_failed_at",
        ),
        (
            "runs",
            runs("completed_at = started_at - interval '1 us'"),
            "completed_at_is_after_started_at",
        ),
        (
            "runs",
            runs("failed_at = started_at - interval '1 us'"),
            "failed_at_is_after_started_at",
        ),
        ("step_states", a("status = 'skipped'"), "status_is_valid"),
        (
            "step_states",
            a("status = 'completed', remaining_tasks = 1"),
            "status_and_remaining_tasks_match",
        ),
        (
            "step_states",
            a("status = 'created'"),
            "remaining_tasks_state_consistency",
        ),
        (
            "step_states",
            a("initial_tasks = null"),
            "initial_tasks_known_when_started",
        ),
        (
            "step_states",
            b("initial_tasks = -1"),
            "step_states_initial_tasks_check",
        ),
        (
            "step_states",
            b("remaining_deps = -1"),
            "step_states_remaining_deps_check",
        ),
        (
            "step_states",
            a(&format!("completed_at = {later}, failed_at = {later}")),
            "completed_at_or_failed_at",
        ),
        (
            "step_states",
            a("started_at = created_at - interval '1 us'"),
            "started_at_is_after_created_at",
        ),
        (
            "step_states",
            a("completed_at = started_at - interval '1 us'"),
            "completed_at_is_after_started_at",
        ),
        (
            "step_states",
            a("failed_at = started_at - interval '1 us'"),
            "failed_at_is_after_started_at",
        ),
        ("step_tasks", task("status = 'created'"), "valid_status"),
        (
            "step_tasks",
            task("output = '1'"),
            "output_valid_only_for_completed",
        ),
        (
            "step_tasks",
            task("output = '1', status = 'started'"),
            "output_valid_only_for_completed",
        ),
        (
            "step_tasks",
            task("attempts_count = -1"),
            "attempts_count_nonnegative",
        ),
        (
            "step_tasks",
            task(&format!("completed_at = {later}, failed_at = {later}")),
            "completed_at_or_failed_at",
        ),
        (
            "step_tasks",
            task("completed_at = queued_at - interval '1 us'"),
            "completed_at_is_after_queued_at",
        ),
        (
            "step_tasks",
            task("failed_at = queued_at - interval '1 us'"),
            "failed_at_is_after_queued_at",
        ),
        (
            "step_tasks",
            task("started_at = queued_at - interval '1 us'"),
            "started_at_is_after_queued_at",
        ),
        (
            "step_tasks",
            task(&format!(
                "started_at = {later}, completed_at = {later} - interval '1 us'"
            )),
            "completed_at_is_after_started_at",
        ),
        (
            "step_tasks",
            task(&format!(
                "started_at = {later}, failed_at = {later} - interval '1 us'"
            )),
            "failed_at_is_after_started_at",
        ),
    ];
    for (table, statement, name) in checks {
        let expected =
            format!("23514 new row for relation \"{table}\" violates check constraint \"{name}\"");
        assert_eq!(core.refused(&statement).await, expected, "{statement}");
    }

    let keys = [
        (
            "insert into pgflow.flows values ('f')".to_owned(),
            "flows_pkey",
        ),
        (
            "insert into pgflow.steps (flow_slug, step_slug, step_index) values ('f', 'a', 9)"
                .to_owned(),
            "steps_pkey",
        ),
        (
            "insert into pgflow.steps (flow_slug, step_slug, step_index) values ('f', 'c', 1)"
                .to_owned(),
            "steps_flow_slug_step_index_key",
        ),
        (
            "insert into pgflow.deps values ('f', 'a', 'b')".to_owned(),
            "deps_pkey",
        ),
        (
            format!(
                "insert into pgflow.runs (flow_slug, run_id, input) values ('f', '{run}', '1')"
            ),
            "runs_pkey",
        ),
        (
            format!(
                "insert into pgflow.step_states (flow_slug, run_id, step_slug) values ('f', '{run}', 'a')"
            ),
            "step_states_pkey",
        ),
        (
            format!(
                "insert into pgflow.step_tasks (flow_slug, run_id, step_slug) values ('f', '{run}', 'a')"
            ),
            "step_tasks_pkey",
        ),
        (
            format!(
                "insert into pgflow.workers (worker_id, queue_name, function_name) values ('{WORKER}', '', '')"
            ),
            "workers_pkey",
        ),
    ];
    for (statement, name) in keys {
        let expected = format!("23505 duplicate key value violates unique constraint \"{name}\"");
        assert_eq!(core.refused(&statement).await, expected, "{statement}");
    }

    let nobody = "ffffffff-0000-4000-8000-000000000000";
    let references = [
        (
            "steps",
            "insert into pgflow.steps (flow_slug, step_slug) values ('no', 'a')".to_owned(),
            "steps_flow_slug_fkey",
        ),
        (
            "deps",
            "insert into pgflow.deps values ('f', 'no', 'b')".to_owned(),
            "deps_flow_slug_dep_slug_fkey",
        ),
        (
            "deps",
            "insert into pgflow.deps values ('f', 'a', 'no')".to_owned(),
            "deps_flow_slug_step_slug_fkey",
        ),
        (
            "runs",
            "insert into pgflow.runs (flow_slug, input) values ('no', '1')".to_owned(),
            "runs_flow_slug_fkey",
        ),
        (
            "step_states",
            format!(
                "insert into pgflow.step_states (flow_slug, run_id, step_slug) values ('f', '{nobody}', 'a')"
            ),
            "step_states_run_id_fkey",
        ),
        (
            "step_states",
            format!(
                "insert into pgflow.step_states (flow_slug, run_id, step_slug) values ('f', '{run}', 'no')"
            ),
            "step_states_flow_slug_step_slug_fkey",
        ),
        (
            "step_tasks",
            format!(
                "insert into pgflow.step_tasks (flow_slug, run_id, step_slug) values ('f', '{run}', 'no')"
            ),
            "step_tasks_run_id_step_slug_fkey",
        ),
        (
            "step_tasks",
            format!("update pgflow.step_tasks set last_worker_id = '{nobody}'"),
            "step_tasks_last_worker_id_fkey",
        ),
    ];
    for (table, statement, name) in references {
        let expected = format!(
            "23503 insert or update on table \"{table}\" violates foreign key constraint \"{name}\""
        );
        assert_eq!(core.refused(&statement).await, expected, "{statement}");
    }

    // At the same instant is not before.
    core.run(&runs("completed_at = started_at")).await;
    core.run(&a("completed_at = started_at")).await;
    core.run(&task(
        "started_at = queued_at, failed_at = queued_at, output = '1', status = 'failed'",
    ))
    .await;
}

#[tokio::test]
async fn a_worker_may_be_forgotten_and_its_tasks_stay() {
    let core = Core::new().await;
    core.define("flow f\n a").await;
    core.start_flow("f", "{}", 1).await;
    core.take("f").await;
    let worker = "select status, last_worker_id from pgflow.step_tasks";
    assert_eq!(core.show(worker).await, format!("started {WORKER}"));
    core.run("delete from pgflow.workers").await;
    assert_eq!(core.show(worker).await, "started ∅");
    assert_eq!(core.complete(1, "a", 0, "1").await, "completed");
}

#[tokio::test]
async fn a_row_comes_with_its_columns_in_the_order_clients_know() {
    let core = Core::new().await;
    let relations = [
        (
            "flows",
            "flow_slug opt_max_attempts opt_base_delay opt_timeout created_at",
        ),
        (
            "steps",
            "flow_slug step_slug step_type step_index deps_count opt_max_attempts opt_base_delay opt_timeout created_at \
             opt_start_delay",
        ),
        ("deps", "flow_slug dep_slug step_slug created_at"),
        (
            "runs",
            "run_id flow_slug status input output remaining_steps started_at completed_at failed_at",
        ),
        (
            "step_states",
            "flow_slug run_id step_slug status remaining_tasks remaining_deps created_at started_at completed_at failed_at \
             error_message initial_tasks",
        ),
        (
            "step_tasks",
            "flow_slug run_id step_slug message_id task_index status attempts_count error_message output queued_at \
             completed_at failed_at started_at last_worker_id",
        ),
        (
            "workers",
            "worker_id queue_name function_name started_at deprecated_at last_heartbeat_at",
        ),
        (
            "step_task_record",
            "flow_slug run_id step_slug input msg_id task_index",
        ),
    ];
    for (relation, columns) in relations {
        let asked = format!(
            "select string_agg(attname, ' ' order by attnum) from pg_attribute
             where attrelid = 'pgflow.{relation}'::regclass and attnum > 0 and not attisdropped"
        );
        assert_eq!(core.show(&asked).await, columns, "{relation}");
    }
    let relations = lines(
        "deps r
         flows r
         runs r
         step_states r
         step_task_record c
         step_tasks r
         steps r
         workers r",
    );
    let all = "select relname, relkind from pg_class where relnamespace = 'pgflow'::regnamespace and relkind <> 'i' order by 1";
    assert_eq!(core.show(all).await, relations);
}
