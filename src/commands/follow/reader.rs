//! Reads rows for what no event tells: whether there is such a run, map progress, tries. A connection of its own, so that an
//! answer never waits behind notifications nobody has taken yet; comes back by itself. Asked by `mod`, one question at a time.
//!
//! What the role may not read (tasks, queues, definitions) is left out; the picture is poorer, nothing fails.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::Value;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Error, Row};
use tracing::debug;
use uuid::Uuid;

use super::super::picture::Status;
use super::event::{Moment, moment, status};
use super::link::{self, CONNECT_MAX};
use crate::config::ConnectUrl;
use crate::server::control::{dial, words};
use crate::wire::quote;

const PAUSE: Duration = Duration::from_millis(250);

const CLOCK: &str = "select extract(epoch from clock_timestamp())::float8";
const LOOK: &str = "select pgflow.get_run_with_states($1)";
const PLAN: &str =
    "select s.step_slug, s.step_type = 'map', coalesce(s.opt_max_attempts, f.opt_max_attempts),
        array(select d.dep_slug from pgflow.deps d
              where d.flow_slug = s.flow_slug and d.step_slug = s.step_slug order by d.dep_slug)
     from pgflow.steps s join pgflow.flows f on f.flow_slug = s.flow_slug
     where s.flow_slug = $1 order by s.step_index";
const TASKS: &str = "select step_slug, count(*) filter (where status = 'started'),
        count(*) filter (where status = 'queued' and attempts_count = 0),
        count(*) filter (where status = 'queued' and attempts_count > 0),
        coalesce(max(attempts_count) filter (where status = 'queued'), 0),
        (array_agg(message_id) filter (where status = 'queued' and attempts_count > 0 and message_id is not null))[1:100],
        max(error_message) filter (where status = 'queued')
     from pgflow.step_tasks where run_id = $1 group by step_slug";
const FLOW: &str = "select exists (select from pgflow.flows where flow_slug = $1)";
/// The newest of them, so that nobody's answer is endless.
const RUNS: &str = "select run_id from pgflow.runs
     where flow_slug = $1 and (status = 'started' or started_at >= to_timestamp($2))
     order by started_at desc limit 1000";

pub(super) enum Ask {
    Look(Uuid),
    /// Runs of the flow that are under way or began at or after that moment.
    Runs {
        flow: String,
        since: Option<Moment>,
    },
}

pub(super) enum Answer {
    Run(Box<Snapshot>),
    NoRun(Uuid),
    NoFlow,
    Runs {
        runs: Vec<Uuid>,
        now: Moment,
    },
    /// Asking again won't help.
    Refused(String),
}

/// A run's rows at one moment.
#[derive(Clone, Debug)]
pub(super) struct Snapshot {
    pub(super) run: Uuid,
    pub(super) flow: Option<String>,
    pub(super) status: Status,
    pub(super) began: Option<Moment>,
    pub(super) ended: Option<Moment>,
    pub(super) steps: Vec<SeenStep>,
    pub(super) plan: Option<Arc<[Planned]>>,
    pub(super) tasks: Option<HashMap<String, Tasks>>,
    /// By the server's clock.
    pub(super) now: Moment,
}

#[derive(Clone, Debug)]
pub(super) struct SeenStep {
    pub(super) slug: String,
    pub(super) status: Status,
    pub(super) began: Option<Moment>,
    pub(super) ended: Option<Moment>,
    pub(super) tasks: Option<i64>,
    pub(super) remaining: Option<i64>,
    pub(super) reason: Option<String>,
}

#[derive(Clone, Debug)]
pub(super) struct Planned {
    pub(super) slug: String,
    pub(super) is_map: bool,
    pub(super) attempts_max: Option<i32>,
    pub(super) after: Vec<String>,
}

/// Of one step: how many tasks are where.
#[derive(Clone, Debug, Default)]
pub(super) struct Tasks {
    pub(super) running: i64,
    /// For the first time.
    pub(super) queued: i64,
    pub(super) retrying: i64,
    /// Tries the worst of the queued ones has behind it.
    pub(super) attempts: i32,
    /// When the next of them is due.
    pub(super) retry_at: Option<Moment>,
    pub(super) reason: Option<String>,
}

/// How much of a run is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Depth {
    States,
    Tasks,
}

struct Reader {
    url: ConnectUrl,
    depth: Depth,
    open: Option<(Client, JoinSet<()>)>,
    /// The server's clock, less ours.
    ahead: f64,
    plans: HashMap<String, Arc<[Planned]>>,
    may_plan: bool,
    may_tasks: bool,
    may_queue: bool,
}

/// Until nobody asks any more.
pub(super) async fn run(
    url: ConnectUrl,
    depth: Depth,
    mut asks: mpsc::Receiver<Ask>,
    answers: mpsc::Sender<Answer>,
) {
    let mut reader = Reader {
        url,
        depth,
        open: None,
        ahead: 0.0,
        plans: HashMap::new(),
        may_plan: true,
        may_tasks: true,
        may_queue: true,
    };
    while let Some(ask) = asks.recv().await {
        let answer = loop {
            match reader.answer(&ask).await {
                Ok(answer) => break answer,
                Err(Failure::Final(why)) => break Answer::Refused(why),
                Err(Failure::Passing(why)) => {
                    debug!(why, "rows could not be read");
                    reader.open = None;
                    tokio::time::sleep(PAUSE).await;
                }
            }
        };
        if answers.send(answer).await.is_err() {
            return;
        }
    }
}

enum Failure {
    Passing(String),
    Final(String),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        if link::is_final(&error) {
            Self::Final(words(&error))
        } else {
            Self::Passing(words(&error))
        }
    }
}

type Params<'a> = [(&'a (dyn ToSql + Sync), Type)];

impl Reader {
    async fn answer(&mut self, ask: &Ask) -> Result<Answer, Failure> {
        self.connect().await?;
        match ask {
            Ask::Look(run) => self.look(*run).await,
            Ask::Runs { flow, since } => self.runs(flow, *since).await,
        }
    }

    async fn connect(&mut self) -> Result<(), Failure> {
        if self
            .open
            .as_ref()
            .is_some_and(|(client, _)| !client.is_closed())
        {
            return Ok(());
        }
        let dialled = dial(&self.url, "flowgate follow", CONNECT_MAX).await;
        let (client, connection) = dialled.map_err(|error| match error.is_final() {
            true => Failure::Final(words(&error)),
            false => Failure::Passing(words(&error)),
        })?;
        let mut driver = JoinSet::new();
        // Its error is the next statement's.
        driver.spawn(async move { drop(connection.await) });
        let rows = client.query_typed(CLOCK, &[]).await?;
        if let Some(server) = rows.first().and_then(|row| row.try_get::<_, f64>(0).ok()) {
            self.ahead = server - here();
        }
        self.open = Some((client, driver));
        Ok(())
    }

    async fn query(&self, sql: &str, params: &Params<'_>) -> Result<Vec<Row>, Error> {
        let Some((client, _driver)) = &self.open else {
            return Ok(Vec::new());
        };
        client.query_typed(sql, params).await
    }

    /// On the primary: what is asked inside a transaction goes to no replica.
    async fn query_primary(&self, sql: &str, params: &Params<'_>) -> Result<Vec<Row>, Error> {
        let Some((client, _driver)) = &self.open else {
            return Ok(Vec::new());
        };
        client.batch_execute("begin").await?;
        let rows = client.query_typed(sql, params).await;
        client.batch_execute("rollback").await?;
        rows
    }

    /// `None`: the role may not.
    async fn try_query(&self, sql: &str, params: &Params<'_>) -> Result<Option<Vec<Row>>, Error> {
        match self.query(sql, params).await {
            Ok(rows) => Ok(Some(rows)),
            Err(error) if link::is_final(&error) => {
                debug!(why = words(&error), "left out");
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    async fn look(&mut self, run: Uuid) -> Result<Answer, Failure> {
        let found = |rows: Vec<Row>| {
            rows.first()
                .and_then(|row| row.try_get::<_, Option<Value>>(0).ok().flatten())
        };
        let params = [(&run as _, Type::UUID)];
        let mut answer = found(self.query(LOOK, &params).await?);
        if answer.is_none() {
            // A replica may not have heard of it yet.
            answer = found(self.query_primary(LOOK, &params).await?);
        }
        let Some(mut seen) = answer
            .as_ref()
            .and_then(|answer| read(run, answer, self.now()))
        else {
            return Ok(Answer::NoRun(run));
        };
        if self.depth == Depth::Tasks
            && let Some(flow) = seen.flow.clone()
        {
            seen.plan = self.plan(&flow).await?;
            seen.tasks = self.tasks(run, &flow).await?;
        }
        Ok(Answer::Run(Box::new(seen)))
    }

    async fn plan(&mut self, flow: &str) -> Result<Option<Arc<[Planned]>>, Failure> {
        if let Some(plan) = self.plans.get(flow) {
            return Ok(Some(Arc::clone(plan)));
        }
        if !self.may_plan {
            return Ok(None);
        }
        let Some(rows) = self.try_query(PLAN, &[(&flow, Type::TEXT)]).await? else {
            self.may_plan = false;
            return Ok(None);
        };
        let plan: Result<Vec<_>, Error> = rows
            .iter()
            .map(|row| {
                Ok(Planned {
                    slug: row.try_get(0)?,
                    is_map: row.try_get(1)?,
                    attempts_max: row.try_get(2)?,
                    after: row.try_get(3)?,
                })
            })
            .collect();
        let plan: Arc<[Planned]> = Arc::from(plan?);
        self.plans.insert(flow.to_owned(), Arc::clone(&plan));
        Ok(Some(plan))
    }

    async fn tasks(
        &mut self,
        run: Uuid,
        flow: &str,
    ) -> Result<Option<HashMap<String, Tasks>>, Failure> {
        if !self.may_tasks {
            return Ok(None);
        }
        let Some(rows) = self.try_query(TASKS, &[(&run, Type::UUID)]).await? else {
            self.may_tasks = false;
            return Ok(None);
        };
        let mut tasks = HashMap::new();
        for row in rows {
            let messages: Option<Vec<i64>> = row.try_get(5)?;
            let retry_at = match messages {
                Some(messages) if self.may_queue => self.due(flow, &messages).await?,
                Some(_) | None => None,
            };
            let counted = Tasks {
                running: row.try_get(1)?,
                queued: row.try_get(2)?,
                retrying: row.try_get(3)?,
                attempts: row.try_get(4)?,
                retry_at,
                reason: row.try_get(6)?,
            };
            tasks.insert(row.try_get(0)?, counted);
        }
        Ok(Some(tasks))
    }

    /// When the first of these messages may be read again.
    async fn due(&mut self, flow: &str, messages: &[i64]) -> Result<Option<Moment>, Failure> {
        // pgmq folds names of queues.
        let table = quote::ident(&format!("q_{}", flow.to_lowercase()));
        let sql = format!(
            "select extract(epoch from min(vt))::float8 from pgmq.{table} where msg_id = any($1)"
        );
        match self
            .try_query(&sql, &[(&messages, Type::INT8_ARRAY)])
            .await?
        {
            Some(rows) => Ok(match rows.first() {
                Some(row) => row.try_get(0)?,
                None => None,
            }),
            None => {
                self.may_queue = false;
                Ok(None)
            }
        }
    }

    async fn runs(&mut self, flow: &str, since: Option<Moment>) -> Result<Answer, Failure> {
        let now = self.now();
        let known = self.query_primary(FLOW, &[(&flow, Type::TEXT)]).await;
        match known {
            Ok(rows) => {
                let known = rows.first().map(|row| row.try_get(0)).transpose()?;
                if known == Some(false) {
                    return Ok(Answer::NoFlow);
                }
            }
            // Then its runs will tell.
            Err(error) if link::is_final(&error) => {}
            Err(error) => return Err(error.into()),
        }
        let since = since.unwrap_or(now + 3_600.0);
        let params = [(&flow as _, Type::TEXT), (&since as _, Type::FLOAT8)];
        let rows = self.query_primary(RUNS, &params).await?;
        let runs: Result<Vec<Uuid>, Error> = rows.iter().map(|row| row.try_get(0)).collect();
        let mut runs = runs?;
        runs.reverse();
        Ok(Answer::Runs { runs, now })
    }

    fn now(&self) -> Moment {
        here() + self.ahead
    }
}

/// Our own clock.
pub(super) fn here() -> Moment {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0.0, |since| since.as_secs_f64())
}

fn read(id: Uuid, answer: &Value, now: Moment) -> Option<Snapshot> {
    let run = &answer["run"];
    let ended = |row: &Value| {
        ["completed_at", "failed_at", "skipped_at"]
            .iter()
            .find_map(|key| moment(&row[*key]))
    };
    let text = |value: &Value| value.as_str().map(str::to_owned);
    let steps = answer["steps"].as_array()?.iter().filter_map(|step| {
        Some(SeenStep {
            slug: text(&step["step_slug"])?,
            status: status(step["status"].as_str()?)?,
            began: moment(&step["started_at"]),
            ended: ended(step),
            tasks: step["initial_tasks"].as_i64(),
            remaining: step["remaining_tasks"].as_i64(),
            reason: text(&step["error_message"]).or_else(|| text(&step["skip_reason"])),
        })
    });
    Some(Snapshot {
        run: id,
        flow: text(&run["flow_slug"]),
        status: status(run["status"].as_str()?)?,
        began: moment(&run["started_at"]),
        ended: ended(run),
        steps: steps.collect(),
        plan: None,
        tasks: None,
        now,
    })
}
