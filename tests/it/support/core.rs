//! A database with pgflow in it and short words for what tests do there: define, start, take, complete, fail, look.

use std::time::Duration;

use flowgate::schema::PgflowApi;
use tokio::time::timeout;
use tokio_postgres::{Client, Error, SimpleQueryMessage};

use super::pg::{TestDb, fresh_database_at};

/// How long anything may take that is expected to happen at all.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
/// Registered in every database of these tests.
pub(crate) const WORKER: &str = "aaaaaaaa-0000-4000-8000-000000000001";

/// A database with pgflow installed and one worker registered, and a superuser's connection to it.
pub(crate) struct Core {
    pub(crate) db: TestDb,
    pub(crate) client: Client,
}

impl Core {
    /// At the default level.
    pub(crate) async fn new() -> Self {
        Self::at(PgflowApi::default()).await
    }

    pub(crate) async fn at(api: PgflowApi) -> Self {
        let db = fresh_database_at(api).await;
        let client = db.connect().await;
        let core = Self { db, client };
        core.run(&format!(
            "insert into pgflow.workers (worker_id, queue_name, function_name) values ('{WORKER}', 'any', 'any')"
        ))
        .await;
        core
    }

    /// Defines flows and steps: `flow f`, `flow f(max_attempts => 1)`, and below it its steps: `a`, `b < a`,
    /// `map c < b`, `d < a, b (start_delay => 3)`.
    pub(crate) async fn define(&self, text: &str) {
        let mut sql = String::new();
        let mut flow = "";
        for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let (line, options) = line.split_once('(').unwrap_or((line, ""));
            let options = options.trim_end_matches(')');
            let options = if options.is_empty() {
                String::new()
            } else {
                format!(", {options}")
            };
            if let Some(slug) = line.strip_prefix("flow ") {
                flow = slug.trim();
                sql += &format!("select pgflow.create_flow('{flow}'{options});");
                continue;
            }
            let (kind, line) = line
                .strip_prefix("map ")
                .map_or(("single", line), |rest| ("map", rest));
            let (slug, deps) = line.split_once('<').unwrap_or((line, ""));
            let (slug, deps) = (slug.trim(), deps.replace(' ', ""));
            sql += &format!(
                "select pgflow.add_step('{flow}', '{slug}', '{{{deps}}}', step_type => '{kind}'{options});"
            );
        }
        self.run(&sql).await;
    }

    /// Starts run `n` of a flow (see `run`).
    pub(crate) async fn start_flow(&self, flow: &str, input: &str, n: u32) {
        let run = run(n);
        self.run(&format!(
            "select pgflow.start_flow('{flow}', '{input}', '{run}')"
        ))
        .await;
    }

    /// Reads what is visible in the flow's queue and starts it; what start_tasks gave, as `step index input`.
    pub(crate) async fn take(&self, flow: &str) -> String {
        self.show(&format!(
            "select step_slug || ' ' || task_index || ' ' || coalesce(input::text, '∅')
             from pgflow.start_tasks('{flow}', array(select msg_id from pgmq.read('{flow}', 600, 1000)), '{WORKER}')
             order by run_id, step_slug collate \"C\", task_index"
        ))
        .await
    }

    /// Completes a task of run `n`: `output` is JSON; the row's status as it then is, nothing if no row came.
    pub(crate) async fn complete(&self, n: u32, step: &str, index: u32, output: &str) -> String {
        let run = run(n);
        self.show(&format!(
            "select status from pgflow.complete_task('{run}', '{step}', {index}, '{output}')"
        ))
        .await
    }

    /// Fails a task of run `n`; the row's status as it then is, nothing if no row came.
    pub(crate) async fn fail(&self, n: u32, step: &str, index: u32, error: &str) -> String {
        let run = run(n);
        self.show(&format!(
            "select status from pgflow.fail_task('{run}', '{step}', {index}, '{error}')"
        ))
        .await
    }

    /// The names of what was sent on the topic of run `n`, in order.
    pub(crate) async fn events(&self, n: u32) -> String {
        let run = run(n);
        self.show(&format!(
            "select string_agg(event, ' ' order by seq) from flowgate.event
             where topic = 'pgflow:run:{run}' and seq is not null"
        ))
        .await
    }

    /// `status remaining_steps` of run `n`, then `step status remaining_tasks remaining_deps initial_tasks` of each step.
    pub(crate) async fn states(&self, n: u32) -> String {
        let run = run(n);
        self.show(&format!(
            "select status, remaining_steps from pgflow.runs where run_id = '{run}';
             select step_slug, status, remaining_tasks, remaining_deps, initial_tasks from pgflow.step_states
             where run_id = '{run}' order by step_slug collate \"C\""
        ))
        .await
    }

    /// `step index status attempts_count` of each task of run `n`.
    pub(crate) async fn tasks(&self, n: u32) -> String {
        let run = run(n);
        self.show(&format!(
            "select step_slug, task_index, status, attempts_count from pgflow.step_tasks where run_id = '{run}'
             order by step_slug collate \"C\", task_index"
        ))
        .await
    }

    /// What is in a queue and in its archive, as `step index`, in the order of the messages' ids.
    pub(crate) async fn queue(&self, flow: &str) -> String {
        self.messages(&format!("q_{flow}")).await
    }

    pub(crate) async fn archive(&self, flow: &str) -> String {
        self.messages(&format!("a_{flow}")).await
    }

    pub(crate) async fn messages(&self, table: &str) -> String {
        self.show(&format!(
            "select coalesce(string_agg(message ->> 'step_slug' || ' ' || (message ->> 'task_index'), ', ' order by msg_id), '')
             from pgmq.{table}"
        ))
        .await
    }

    /// Runs `sql`, and sees that the messages of `flow` that fit `which` become visible `seconds` after it.
    pub(crate) async fn visible_in(&self, sql: &str, flow: &str, which: &str, seconds: i64) {
        let before = self.show("select clock_timestamp()").await;
        self.run(sql).await;
        let after = self.show("select clock_timestamp()").await;
        let wrong = self
            .show(&format!(
                "select msg_id, vt - '{before}' from pgmq.q_{flow} where ({which}) and vt not between
                 timestamptz '{before}' + interval '{seconds} s' and timestamptz '{after}' + interval '{seconds} s'"
            ))
            .await;
        assert_eq!(wrong, "", "not visible in {seconds} s after {sql}");
        let any = format!("select count(*) > 0 from pgmq.q_{flow} where {which}");
        assert_eq!(self.show(&any).await, "t", "no message where {which}");
    }

    pub(crate) async fn run(&self, sql: &str) {
        show(&self.client, sql).await;
    }

    pub(crate) async fn show(&self, sql: &str) -> String {
        show(&self.client, sql).await
    }

    pub(crate) async fn refused(&self, sql: &str) -> String {
        refused(&self.client, sql).await
    }
}

/// The id of a test's `n`th run.
pub(crate) fn run(n: u32) -> String {
    format!("00000000-0000-4000-8000-{n:012}")
}

/// What a script returned, a line a row, columns apart by a space, `∅` for null.
pub(crate) async fn show(client: &Client, sql: &str) -> String {
    try_show(client, sql)
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error:?}"))
}

pub(crate) async fn try_show(client: &Client, sql: &str) -> Result<String, Error> {
    let messages = timeout(PATIENCE, client.simple_query(sql))
        .await
        .unwrap_or_else(|_| panic!("no answer to {sql}"))?;
    let mut lines = Vec::new();
    for message in &messages {
        if let SimpleQueryMessage::Row(row) = message {
            let columns = (0..row.len()).map(|at| row.get(at).unwrap_or("∅"));
            lines.push(columns.collect::<Vec<_>>().join(" "));
        }
    }
    Ok(lines.join("\n"))
}

/// `SQLSTATE message` of what must fail.
pub(crate) async fn refused(client: &Client, sql: &str) -> String {
    match try_show(client, sql).await {
        Ok(rows) => panic!("not refused: {sql}\n{rows}"),
        Err(error) => {
            let error = error
                .as_db_error()
                .unwrap_or_else(|| panic!("{sql}: {error:?}"));
            format!("{} {}", error.code().code(), error.message())
        }
    }
}

/// Lines without the indentation they have in a test.
pub(crate) fn lines(text: &str) -> String {
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    lines.collect::<Vec<_>>().join("\n")
}
