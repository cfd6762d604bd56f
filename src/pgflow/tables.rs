//! The table of pgflow's tables, 0.7.2 to 0.14.1: what a plain SELECT may touch and still be a read. Holds facts only.
//! Looked up by `classify/sql.rs`.

/// A table (or view of ours) in schema `pgflow`.
#[derive(Debug)]
pub struct Table {
    pub name: &'static str,
    pub scope: Scope,
    /// All columns of all versions. INVARIANT: a name missing here makes `alias.name` no read, since Postgres takes
    /// `alias.f` for the call `f(alias)` where there is no such column ("Functional notation" in its manual).
    pub columns: &'static [&'static str],
}

/// What a row of the table belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// Has a `run_id`: changes as its run goes on.
    Run,
    /// A flow's definition: changes only when that is compiled anew.
    Flow,
    Worker,
}

pub const TABLES: &[Table] = &[
    Table {
        name: "flows",
        scope: Scope::Flow,
        columns: &[
            "flow_slug",
            "opt_max_attempts",
            "opt_base_delay",
            "opt_timeout",
            "created_at",
        ],
    },
    Table {
        name: "steps",
        scope: Scope::Flow,
        columns: &[
            "flow_slug",
            "step_slug",
            "step_type",
            "step_index",
            "deps_count",
            "opt_max_attempts",
            "opt_base_delay",
            "opt_timeout",
            "created_at",
            "opt_start_delay",
            "required_input_pattern",
            "forbidden_input_pattern",
            "when_unmet",
            "when_exhausted",
        ],
    },
    Table {
        name: "deps",
        scope: Scope::Flow,
        columns: &["flow_slug", "dep_slug", "step_slug", "created_at"],
    },
    Table {
        name: "runs",
        scope: Scope::Run,
        columns: &[
            "run_id",
            "flow_slug",
            "status",
            "input",
            "output",
            "remaining_steps",
            "started_at",
            "completed_at",
            "failed_at",
        ],
    },
    Table {
        name: "step_states",
        scope: Scope::Run,
        columns: &[
            "flow_slug",
            "run_id",
            "step_slug",
            "status",
            "remaining_tasks",
            "remaining_deps",
            "created_at",
            "started_at",
            "completed_at",
            "failed_at",
            "error_message",
            "initial_tasks",
            "output",
            "skip_reason",
            "skipped_at",
        ],
    },
    Table {
        name: "step_tasks",
        scope: Scope::Run,
        columns: &[
            "flow_slug",
            "run_id",
            "step_slug",
            "message_id",
            "task_index",
            "status",
            "attempts_count",
            "error_message",
            "output",
            "queued_at",
            "completed_at",
            "failed_at",
            "started_at",
            "last_worker_id",
            "requeued_count",
            "last_requeued_at",
            "permanently_stalled_at",
        ],
    },
    Table {
        name: "workers",
        scope: Scope::Worker,
        columns: &[
            "worker_id",
            "queue_name",
            "function_name",
            "started_at",
            "deprecated_at",
            "last_heartbeat_at",
            "stopped_at",
        ],
    },
    Table {
        name: "worker_functions",
        scope: Scope::Worker,
        columns: &[
            "function_name",
            "enabled",
            "debounce",
            "last_invoked_at",
            "created_at",
            "updated_at",
        ],
    },
];

/// The table `pgflow.<name>`, by its exact (already folded) name.
pub fn table(name: &str) -> Option<&'static Table> {
    TABLES.iter().find(|table| table.name == name)
}
