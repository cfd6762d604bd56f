//! The table of pgflow's and pgmq's functions, 0.7.2 to 0.14.1 and pgmq 1.4.4 to 1.13: what a call of each one is, and
//! which of its arguments names the run, the flow or the queue. Adding a function is adding a row. Never trusts
//! volatility (upstream marks even `get_run_with_states` volatile). Looked up by `classify`; `schema` and `doctor`
//! hold it against `pg_proc`.

/// One function, or one overload where an overload has other argument names.
#[derive(Debug)]
pub struct Function {
    pub schema: &'static str,
    pub name: &'static str,
    /// Every argument's name, in order; the newest version's, older ones have a prefix of it.
    pub args: &'static [&'static str],
    pub class: Class,
}

/// What a call does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Reads only, so a replica may answer.
    Read,
    /// Waits inside Postgres for work, for seconds.
    Poll,
    /// Finishes or takes up work already paid for: last to be shed.
    Progress,
    /// Begins a run.
    Start,
    /// Changes a flow's definition.
    Define,
    /// Any other write.
    Write,
}

impl Function {
    /// Position of the argument that names the run.
    pub fn run_arg(&self) -> Option<usize> {
        self.arg(&["run_id", "p_run_id"])
    }

    /// Position of the argument that names the flow.
    pub fn flow_arg(&self) -> Option<usize> {
        self.arg(&["flow_slug", "p_flow_slug"])
    }

    /// Position of the argument that names the queue. A flow's queue is named after the flow.
    pub fn queue_arg(&self) -> Option<usize> {
        self.arg(&["queue_name"]).or_else(|| self.flow_arg())
    }

    fn arg(&self, names: &[&str]) -> Option<usize> {
        self.args.iter().position(|arg| names.contains(arg))
    }
}

/// The first row of `schema.name` (exact, already folded). Overloads agree in class and in where run, flow and queue stand.
pub fn function(schema: &str, name: &str) -> Option<&'static Function> {
    FUNCTIONS
        .iter()
        .find(|function| function.name == name && function.schema == schema)
}

const fn flow(name: &'static str, class: Class, args: &'static [&'static str]) -> Function {
    Function {
        schema: "pgflow",
        name,
        args,
        class,
    }
}

const fn mq(name: &'static str, class: Class, args: &'static [&'static str]) -> Function {
    Function {
        schema: "pgmq",
        name,
        args,
        class,
    }
}

use Class::{Define, Poll, Progress, Read, Start, Write};

pub const FUNCTIONS: &[Function] = &[
    // What dashboards and workers call all the time stands first: lookups go down the table.
    flow("get_run_with_states", Read, &["run_id"]),
    flow(
        "complete_task",
        Progress,
        &["run_id", "step_slug", "task_index", "output"],
    ),
    flow(
        "fail_task",
        Progress,
        &["run_id", "step_slug", "task_index", "error_message"],
    ),
    flow(
        "start_tasks",
        Progress,
        &["flow_slug", "msg_ids", "worker_id"],
    ),
    flow("read_with_poll", Poll, POLL_ARGS),
    mq("read_with_poll", Poll, POLL_ARGS),
    flow("start_flow", Start, &["flow_slug", "input", "run_id"]),
    flow(
        "start_flow_with_states",
        Start,
        &["flow_slug", "input", "run_id"],
    ),
    // Reads.
    flow("get_flow_shape", Read, &["p_flow_slug"]),
    flow("_get_flow_shape", Read, &["p_flow_slug"]),
    flow("_compare_flow_shapes", Read, &["p_local", "p_db"]),
    flow("is_valid_slug", Read, &["slug"]),
    flow(
        "calculate_retry_delay",
        Read,
        &["base_delay", "attempts_count"],
    ),
    flow("is_local", Read, &[]),
    // Deprecated: returns nothing.
    flow(
        "poll_for_tasks",
        Poll,
        &[
            "queue_name",
            "vt",
            "qty",
            "max_poll_seconds",
            "poll_interval_ms",
        ],
    ),
    // Definitions and maintenance.
    flow(
        "create_flow",
        Define,
        &["flow_slug", "max_attempts", "base_delay", "timeout"],
    ),
    flow(
        "add_step",
        Define,
        &[
            "flow_slug",
            "step_slug",
            "deps_slugs",
            "max_attempts",
            "base_delay",
            "timeout",
            "start_delay",
            "step_type",
            "required_input_pattern",
            "forbidden_input_pattern",
            "when_unmet",
            "when_exhausted",
        ],
    ),
    flow(
        "ensure_flow_compiled",
        Define,
        &["flow_slug", "shape", "allow_data_loss"],
    ),
    flow(
        "_create_flow_from_shape",
        Define,
        &["p_flow_slug", "p_shape"],
    ),
    flow("delete_flow_and_data", Define, &["p_flow_slug"]),
    flow("prune_data_older_than", Define, &["retention_interval"]),
    flow("requeue_stalled_tasks", Define, &[]),
    flow(
        "setup_requeue_stalled_tasks_cron",
        Define,
        &["cron_interval"],
    ),
    flow("setup_ensure_workers_cron", Define, &["cron_interval"]),
    flow(
        "_schedule_cron_job",
        Define,
        &["p_name", "p_schedule", "p_command"],
    ),
    flow("cleanup_ensure_workers_logs", Define, &["retention_hours"]),
    flow("ensure_workers", Define, &[]),
    // Other writes. The inner ones are public by name, and tests call them.
    flow(
        "set_vt_batch",
        Progress,
        &["queue_name", "msg_ids", "vt_offsets"],
    ),
    flow("track_worker_function", Write, &["function_name"]),
    flow("mark_worker_stopped", Write, &["worker_id"]),
    flow("cascade_complete_taskless_steps", Write, &["run_id"]),
    flow("cascade_resolve_conditions", Write, &["run_id"]),
    flow(
        "_cascade_force_skip_steps",
        Write,
        &["run_id", "step_slug", "skip_reason"],
    ),
    flow(
        "_archive_task_message",
        Write,
        &["p_run_id", "p_step_slug", "p_task_index"],
    ),
    flow("_archive_message", Write, &["flow_slug", "message_id"]),
    flow(
        "_archive_run_messages",
        Write,
        &["flow_slug", "run_id", "message_id"],
    ),
    flow(
        "_spawn_tasks",
        Write,
        &[
            "flow_slug",
            "run_id",
            "step_slugs",
            "sizes",
            "delays",
            "events",
            "payloads",
            "started_at",
        ],
    ),
    flow("start_ready_steps", Write, &["run_id"]),
    flow("maybe_complete_run", Write, &["run_id"]),
    flow("_complete_run", Write, &["run_id", "events", "payloads"]),
    // pgmq.
    mq("metrics", Read, &["queue_name"]),
    mq("metrics_all", Read, &[]),
    mq("list_queues", Read, &[]),
    mq("archive", Progress, &["queue_name", "msg_id"]),
    mq("archive", Progress, &["queue_name", "msg_ids"]),
    mq("delete", Progress, &["queue_name", "msg_id"]),
    mq("delete", Progress, &["queue_name", "msg_ids"]),
    mq("set_vt", Progress, &["queue_name", "msg_id", "vt"]),
    mq("set_vt", Progress, &["queue_name", "msg_ids", "vt"]),
    mq("read", Write, &["queue_name", "vt", "qty", "conditional"]),
    mq("pop", Write, &["queue_name", "qty"]),
    mq("send", Write, &["queue_name", "msg"]),
    mq("send", Write, &["queue_name", "msg", "delay"]),
    mq("send", Write, &["queue_name", "msg", "headers", "delay"]),
    mq("send_batch", Write, &["queue_name", "msgs"]),
    mq("send_batch", Write, &["queue_name", "msgs", "delay"]),
    mq(
        "send_batch",
        Write,
        &["queue_name", "msgs", "headers", "delay"],
    ),
    mq("create", Write, &["queue_name"]),
    mq("create_unlogged", Write, &["queue_name"]),
    mq("create_non_partitioned", Write, &["queue_name"]),
    mq(
        "create_partitioned",
        Write,
        &["queue_name", "partition_interval", "retention_interval"],
    ),
    mq("drop_queue", Write, &["queue_name", "partitioned"]),
    mq("purge_queue", Write, &["queue_name"]),
    mq("detach_archive", Write, &["queue_name"]),
];

const POLL_ARGS: &[&str] = &[
    "queue_name",
    "vt",
    "qty",
    "max_poll_seconds",
    "poll_interval_ms",
    "conditional",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn overloads_agree_in_class_and_in_what_they_name() {
        for row in FUNCTIONS {
            let first = function(row.schema, row.name).unwrap();
            assert_eq!(row.class, first.class, "{}.{}", row.schema, row.name);
            assert_eq!(
                row.run_arg(),
                first.run_arg(),
                "{}.{}",
                row.schema,
                row.name
            );
            assert_eq!(
                row.queue_arg(),
                first.queue_arg(),
                "{}.{}",
                row.schema,
                row.name
            );
        }
    }

    #[test]
    fn names_are_folded_and_rows_are_distinct() {
        for (n, row) in FUNCTIONS.iter().enumerate() {
            assert_eq!(row.name, row.name.to_ascii_lowercase());
            assert!(
                FUNCTIONS[..n]
                    .iter()
                    .all(|other| (other.schema, other.name, other.args)
                        != (row.schema, row.name, row.args)),
                "{} twice",
                row.name
            );
        }
    }

    #[test]
    fn what_names_the_run_is_found() {
        assert_eq!(function("pgflow", "start_flow").unwrap().run_arg(), Some(2));
        assert_eq!(
            function("pgflow", "complete_task").unwrap().run_arg(),
            Some(0)
        );
        assert_eq!(
            function("pgflow", "_archive_task_message")
                .unwrap()
                .run_arg(),
            Some(0)
        );
        assert_eq!(function("pgflow", "start_tasks").unwrap().run_arg(), None);
        assert_eq!(
            function("pgflow", "start_tasks").unwrap().queue_arg(),
            Some(0)
        );
        assert!(function("public", "start_flow").is_none());
        assert!(function("pgflow", "Start_Flow").is_none());
    }
}
