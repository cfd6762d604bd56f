//! Keeps pgflow and the outbox in order, by schedule: puts stalled tasks back into their queue, makes outbox partitions ahead
//! and drops old ones, deletes old finished runs. What upstream leaves to pg_cron. Started by `app`; knows nothing of clients.
//!
//! **Exactly one Flowgate per database**, however many run: the work is done over the connection that holds a session
//! advisory lock, so whoever works has it. The others ask for it every few seconds, and get it when the holder's
//! connection is gone. Nothing is kept between two holders: every chore is a function in SQL that may be called at any
//! time, and does a bounded piece of work in a transaction of its own.
//!
//! A database without the SQL, with a pgflow that is not ours, or a primary that is away is a condition, not an error: it is said
//! once, when it begins, and looked at again.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Client, Row};
use tracing::{debug, info, warn};

use crate::config::{self, Config, ConnectUrl};
use crate::metrics::{Counter, Gauge, Registry};
use crate::server::control::{ControlConnection, DialError, dial, words};

const APPLICATION: &str = "flowgate maintenance";
/// Any fixed number: "fg maint" in ASCII. Per database, as session advisory locks are.
const LOCK: i64 = 0x6667_206d_6169_6e74;
/// Between two tries to become the one who works.
const LEAD_RETRY: Duration = Duration::from_secs(5);
const HOURLY: Duration = Duration::from_secs(3600);
/// After an error, or where something is missing.
const RETRY: Duration = Duration::from_secs(60);
/// Between two batches of one chore, so that pruning never fills a disk's queue.
const PAUSE: Duration = Duration::from_millis(200);
/// The server gives up first.
const STATEMENT_MAX: Duration = Duration::from_secs(240);
const ANSWER_WAIT: Duration = Duration::from_secs(270);
const BACKOFF_MIN: Duration = Duration::from_millis(200);
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// For the connection to say goodbye.
const GOODBYE: Duration = Duration::from_secs(1);

/// Rows a call, as the functions of `sql/` have it by default.
const REQUEUE_BATCH: i32 = 1000;
const PRUNE_BATCH: i32 = 1000;
const TOPICS_BATCH: i32 = 10_000;

/// A running schedule.
pub(crate) struct Maintenance {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Maintenance {
    pub(crate) fn start(config: &Config, registry: &Registry, handle: &Handle) -> Self {
        let keeper = Keeper {
            primary: config.primary.clone(),
            connect_timeout: config.pool.connect_timeout,
            settings: config.maintenance.clone(),
            retention: config.events.retention,
            direct_notify: config.events.direct_notify,
            metrics: Metrics::new(registry),
            condition: Condition::New,
            told: Chore::ALL.map(|_chore| Told::Fine),
        };
        let (stop, stopped) = oneshot::channel();
        let task = handle.spawn(async move {
            let metrics = keeper.metrics.clone();
            tokio::select! {
                // The sender's drop as well: nobody is left who wants this.
                _stop = stopped => {}
                () = keeper.run() => {}
            }
            metrics.leader.set(0);
        });
        Self { stop, task }
    }

    /// Stops where it stands: what a batch under way has done is rolled back or committed by Postgres alone.
    pub(crate) async fn shut_down(self) {
        drop(self.stop);
        if let Err(error) = self.task.await {
            warn!(%error, "bug: the maintenance task panicked");
        }
    }
}

/// What there is to do. The order is that of `ALL`, by which each has its place in the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Chore {
    Requeue,
    Outbox,
    Prune,
}

impl Chore {
    const ALL: [Self; 3] = [Self::Requeue, Self::Outbox, Self::Prune];

    fn name(self) -> &'static str {
        match self {
            Self::Requeue => "requeue",
            Self::Outbox => "outbox",
            Self::Prune => "prune",
        }
    }

    /// `None`: switched off.
    fn every(self, settings: &config::Maintenance) -> Option<Duration> {
        match self {
            Self::Requeue => settings.requeue,
            Self::Outbox => Some(HOURLY),
            Self::Prune => settings.prune_after.map(|_age| HOURLY),
        }
    }
}

/// What came of a chore that could be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Done {
    All,
    /// A full batch: there may be more.
    Batch,
}

/// Why a chore is not done here; not an error, and said once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Obstacle {
    NoOutbox,
    NoPgflow,
    /// A pgflow that is not ours, and has no function for it.
    NoRequeue,
    /// pg_cron does it already.
    Scheduled,
    /// The SQL is of an older Flowgate.
    NoPrune,
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoOutbox => "no outbox in this database; `flowgate install` brings it",
            Self::NoPgflow => "no pgflow in this database",
            Self::NoRequeue => "this pgflow has no requeue_stalled_tasks, so tasks of workers that died stay started",
            Self::Scheduled => "pg_cron calls pgflow.requeue_stalled_tasks here already",
            Self::NoPrune => "flowgate.prune is not there; `flowgate install` brings it",
        })
    }
}

#[derive(Debug, thiserror::Error)]
enum ChoreError {
    /// The connection, and with it the lock, may be gone.
    #[error("{0}")]
    Lost(LostReason),
    #[error("{}{}", words(.0), hint(.0))]
    Refused(tokio_postgres::Error),
}

#[derive(Debug, thiserror::Error)]
enum LostReason {
    #[error(transparent)]
    Postgres(tokio_postgres::Error),
    #[error("no answer within {ANSWER_WAIT:?}")]
    Silent,
    #[error("connection closed")]
    Closed,
    #[error("it is a replica")]
    Replica,
    #[error(transparent)]
    Dial(#[from] DialError),
}

impl From<tokio_postgres::Error> for ChoreError {
    fn from(error: tokio_postgres::Error) -> Self {
        // 57: shutting down; 25006: demoted. An error without a code is the connection's.
        match error.code() {
            Some(code) if *code == SqlState::QUERY_CANCELED => Self::Refused(error),
            Some(code) if !code.code().starts_with("57") && !code.code().starts_with("08") => {
                Self::Refused(error)
            }
            Some(_) | None => Self::Lost(LostReason::Postgres(error)),
        }
    }
}

fn hint(error: &tokio_postgres::Error) -> &'static str {
    if error.code() == Some(&SqlState::INSUFFICIENT_PRIVILEGE) {
        "; the control role needs `select flowgate.grant_maintenance('<role>')`"
    } else {
        ""
    }
}

/// What was last said of the whole.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Condition {
    New,
    Leading,
    StandingBy,
    Nothing,
    Away,
}

/// What was last said of one chore.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Told {
    Fine,
    Obstacle(Obstacle),
    Failing(String),
}

struct Keeper {
    primary: ConnectUrl,
    connect_timeout: Duration,
    settings: config::Maintenance,
    retention: Duration,
    direct_notify: bool,
    metrics: Metrics,
    condition: Condition,
    told: [Told; Chore::ALL.len()],
}

/// Aborts the connection when the session ends, whatever way.
struct Driver(JoinHandle<Result<(), tokio_postgres::Error>>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Keeper {
    /// Until dropped.
    async fn run(mut self) {
        let mut backoff = BACKOFF_MIN;
        loop {
            let dialled = dial(&self.primary, APPLICATION, self.connect_timeout).await;
            let lost = match dialled {
                Ok((client, connection)) => {
                    let began = Instant::now();
                    let lost = self.serve(client, connection).await;
                    if began.elapsed() > BACKOFF_MAX {
                        backoff = BACKOFF_MIN;
                    }
                    lost
                }
                Err(error) => LostReason::Dial(error),
            };
            self.metrics.leader.set(0);
            if self.becomes(Condition::Away) {
                warn!(primary = %self.primary, reason = words(&lost), "maintenance is interrupted");
            } else {
                debug!(primary = %self.primary, reason = words(&lost), "maintenance is still interrupted");
            }
            sleep(jittered(backoff)).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    /// One connection's life: waits for the lead, then works.
    async fn serve(&mut self, client: Client, connection: ControlConnection) -> LostReason {
        let mut driver = Driver(tokio::spawn(connection));
        let lost = tokio::select! {
            ended = &mut driver.0 => {
                return ended.ok().and_then(Result::err).map_or(LostReason::Closed, LostReason::Postgres);
            }
            lost = self.lead(&client) => lost,
        };
        drop(client);
        // So that the lock is free when this is said to have ended. It is aborted if it takes too long.
        drop(timeout(GOODBYE, &mut driver.0).await);
        lost
    }

    async fn lead(&mut self, client: &Client) -> LostReason {
        match self.try_lead(client).await {
            Ok(never) => match never {},
            Err(ChoreError::Lost(reason)) => reason,
            Err(ChoreError::Refused(error)) => LostReason::Postgres(error),
        }
    }

    async fn try_lead(&mut self, client: &Client) -> Result<std::convert::Infallible, ChoreError> {
        answered(client.batch_execute(&settings())).await?;
        // A database that has nothing for us sees no lock of ours: whoever lists its own there would wonder.
        let ask = format!(
            "select recovering, anything, case when anything and not recovering then pg_try_advisory_lock({LOCK}) else false end \
             from (select pg_is_in_recovery() as recovering, \
                   exists (select from pg_namespace where nspname in ('flowgate', 'pgflow')) as anything offset 0) as here"
        );
        let retry = self.settings.requeue.unwrap_or(LEAD_RETRY).min(LEAD_RETRY);
        loop {
            let row = answered(client.query_one(&ask, &[])).await?;
            if row.get(0) {
                return Err(ChoreError::Lost(LostReason::Replica));
            }
            if row.get(2) {
                break;
            }
            if !row.get::<_, bool>(1) {
                if self.becomes(Condition::Nothing) {
                    info!(primary = %self.primary, "nothing to maintain: neither pgflow nor an outbox in this database");
                }
            } else if self.becomes(Condition::StandingBy) {
                info!(primary = %self.primary, "maintenance is done by another flowgate");
            }
            sleep(jittered(retry)).await;
        }
        self.metrics.leader.set(1);
        if self.becomes(Condition::Leading) {
            info!(primary = %self.primary, "maintenance is done by this flowgate");
        }
        self.work(client).await
    }

    async fn work(&mut self, client: &Client) -> Result<std::convert::Infallible, ChoreError> {
        let now = Instant::now();
        let mut due = Chore::ALL.map(|chore| chore.every(&self.settings).map(|_every| now));
        loop {
            // The outbox is always kept up, so there is a next one.
            let next = Chore::ALL
                .into_iter()
                .zip(due)
                .filter_map(|(chore, due)| Some((chore, due?)));
            let (chore, at) = next
                .min_by_key(|(_chore, due)| *due)
                .expect("the outbox has no switch");
            sleep_until(at).await;
            let every = chore.every(&self.settings).unwrap_or(HOURLY);
            let wait = match self.chore(client, chore).await? {
                Some(Done::All) => jittered(every),
                Some(Done::Batch) => PAUSE,
                None => jittered(every.min(RETRY)),
            };
            due[chore as usize] = Some(Instant::now() + wait);
        }
    }

    /// `None`: it could not be done; why was said.
    async fn chore(&mut self, client: &Client, chore: Chore) -> Result<Option<Done>, ChoreError> {
        let outcome = match chore {
            Chore::Requeue => self.requeue(client).await,
            Chore::Outbox => self.outbox(client).await,
            Chore::Prune => self.prune(client).await,
        };
        let (told, done) = match outcome {
            Ok(Ok(done)) => {
                self.metrics.succeeded(chore);
                (Told::Fine, Some(done))
            }
            Ok(Err(obstacle)) => (Told::Obstacle(obstacle), None),
            Err(lost @ ChoreError::Lost(_)) => {
                self.metrics.errors[chore as usize].inc();
                return Err(lost);
            }
            Err(error) => {
                self.metrics.errors[chore as usize].inc();
                (Told::Failing(error.to_string()), None)
            }
        };
        let before = &mut self.told[chore as usize];
        if *before != told {
            let chore = chore.name();
            match &told {
                Told::Fine => info!(chore, "maintenance works again"),
                Told::Obstacle(why) => info!(chore, %why, "nothing to maintain"),
                Told::Failing(error) => warn!(chore, error, "maintenance fails"),
            }
            *before = told;
        }
        Ok(done)
    }

    async fn requeue(&self, client: &Client) -> Result<Result<Done, Obstacle>, ChoreError> {
        let found = survey(client).await?;
        let requeued: i32;
        let done;
        if found.has("pgflow.requeue_stalled_tasks") {
            if is_scheduled(client).await? {
                return Ok(Err(Obstacle::Scheduled));
            }
            requeued = one(client, "select pgflow.requeue_stalled_tasks()")
                .await?
                .get(0);
            done = Done::All;
        } else if found.has("flowgate.requeue_stalled_tasks") {
            let call = format!("select flowgate.requeue_stalled_tasks({REQUEUE_BATCH})");
            requeued = one(client, &call).await?.get(0);
            done = if requeued < REQUEUE_BATCH {
                Done::All
            } else {
                Done::Batch
            };
            // Cheap at this level only.
            self.count_stalled(client).await?;
        } else if found.pgflow {
            return Ok(Err(Obstacle::NoRequeue));
        } else {
            return Ok(Err(Obstacle::NoPgflow));
        }
        if requeued > 0 {
            info!(tasks = requeued, "stalled tasks are back in their queues");
            self.metrics
                .requeued
                .add(u64::from(requeued.unsigned_abs()));
        }
        Ok(Ok(done))
    }

    async fn count_stalled(&self, client: &Client) -> Result<(), ChoreError> {
        let stalled: i64 = one(client, "select flowgate.stalled_tasks()").await?.get(0);
        let before = self.metrics.stalled.get();
        self.metrics.stalled.set(stalled);
        if stalled > before {
            warn!(
                tasks = stalled,
                "tasks were given up after three workers: their runs wait for somebody to look"
            );
        }
        Ok(())
    }

    async fn outbox(&self, client: &Client) -> Result<Result<Done, Obstacle>, ChoreError> {
        let found = survey(client).await?;
        if found.pgflow && found.has("flowgate.stalled_tasks") {
            self.count_stalled(client).await?;
        }
        if !found.has("flowgate.ensure_partitions") || !found.has("flowgate.drop_partitions") {
            return Ok(Err(Obstacle::NoOutbox));
        }
        let retention = interval(self.retention);
        let made: i32 = one(client, "select flowgate.ensure_partitions()")
            .await?
            .get(0);
        self.metrics
            .partitions_made
            .add(u64::from(made.unsigned_abs()));
        let drop = format!("select flowgate.drop_partitions({retention})");
        let dropped: i32 = one(client, &drop).await?.get(0);
        self.metrics
            .partitions_dropped
            .add(u64::from(dropped.unsigned_abs()));
        if made > 0 || dropped > 0 {
            info!(made, dropped, "outbox partitions");
        }
        if self.direct_notify && found.has("flowgate.set_direct_notify") {
            one(client, "select flowgate.set_direct_notify(true)").await?;
        }
        if !found.has("flowgate.forget_topics") {
            return Ok(Ok(Done::All));
        }
        let forget = format!("select flowgate.forget_topics({retention}, {TOPICS_BATCH})");
        let forgotten: i32 = one(client, &forget).await?.get(0);
        Ok(Ok(if forgotten < TOPICS_BATCH {
            Done::All
        } else {
            Done::Batch
        }))
    }

    async fn prune(&self, client: &Client) -> Result<Result<Done, Obstacle>, ChoreError> {
        let found = survey(client).await?;
        if !found.pgflow {
            return Ok(Err(Obstacle::NoPgflow));
        } else if !found.has("flowgate.prune") {
            return Ok(Err(Obstacle::NoPrune));
        }
        let Some(age) = self.settings.prune_after.map(interval) else {
            return Ok(Ok(Done::All));
        };
        let prune =
            format!("select runs, archived, workers from flowgate.prune({age}, {PRUNE_BATCH})");
        let row = one(client, &prune).await?;
        let [runs, archived, workers]: [i32; 3] = [row.get(0), row.get(1), row.get(2)];
        self.metrics.runs_pruned.add(u64::from(runs.unsigned_abs()));
        if runs + archived + workers == 0 {
            return Ok(Ok(Done::All));
        }
        debug!(runs, archived, workers, "pruned");
        Ok(Ok(Done::Batch))
    }

    /// Whether that is news.
    fn becomes(&mut self, now: Condition) -> bool {
        std::mem::replace(&mut self.condition, now.clone()) != now
    }
}

/// Which of the functions we call are there. Read from the catalog, which needs no right on their schemas.
struct Found {
    functions: HashSet<String>,
    pgflow: bool,
}

impl Found {
    fn has(&self, function: &str) -> bool {
        self.functions.contains(function)
    }
}

async fn survey(client: &Client) -> Result<Found, ChoreError> {
    let survey = "select coalesce(array_agg(n.nspname || '.' || p.proname), '{}'), \
                  exists (select from pg_namespace where nspname = 'pgflow') \
                  from pg_proc as p join pg_namespace as n on n.oid = p.pronamespace \
                  where n.nspname in ('flowgate', 'pgflow') and p.proname in ('requeue_stalled_tasks', 'stalled_tasks', \
                  'ensure_partitions', 'drop_partitions', 'forget_topics', 'prune', 'set_direct_notify')";
    let row = one(client, survey).await?;
    let functions: Vec<String> = row.get(0);
    Ok(Found {
        functions: functions.into_iter().collect(),
        pgflow: row.get(1),
    })
}

/// Whether pg_cron requeues in this database. Where we may not look, we do it too: it does no harm twice.
async fn is_scheduled(client: &Client) -> Result<bool, ChoreError> {
    let may_look = "select exists (select from pg_class as c join pg_namespace as n on n.oid = c.relnamespace \
                    where n.nspname = 'cron' and c.relname = 'job' and has_schema_privilege(n.oid, 'usage') \
                    and has_table_privilege(c.oid, 'select'))";
    if !one(client, may_look).await?.get::<_, bool>(0) {
        return Ok(false);
    }
    let looks = "select exists (select from cron.job where active and database = current_database() \
                 and command ilike '%requeue_stalled_tasks%')";
    match one(client, looks).await {
        Ok(row) => Ok(row.get(0)),
        Err(ChoreError::Refused(error)) => {
            debug!(error = words(&error), "cron.job cannot be read");
            Ok(false)
        }
        Err(lost @ ChoreError::Lost(_)) => Err(lost),
    }
}

async fn one(client: &Client, sql: &str) -> Result<Row, ChoreError> {
    answered(client.query_one(sql, &[])).await
}

async fn answered<T>(
    answer: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<T, ChoreError> {
    match timeout(ANSWER_WAIT, answer).await {
        Ok(answer) => Ok(answer?),
        Err(_elapsed) => Err(ChoreError::Lost(LostReason::Silent)),
    }
}

/// A server that hears nothing of us must find out soon, or the lock of a flowgate cut off stays taken for hours.
fn settings() -> String {
    let statement_ms = STATEMENT_MAX.as_millis();
    format!(
        "set search_path = ''; set statement_timeout = {statement_ms}; set lock_timeout = '5s'; set jit = off; \
         set idle_session_timeout = 0; set max_parallel_workers_per_gather = 0; set client_min_messages = 'warning'; \
         set default_transaction_isolation = 'read committed'; set standard_conforming_strings = on; \
         set tcp_keepalives_idle = 10; set tcp_keepalives_interval = 5; set tcp_keepalives_count = 3"
    )
}

fn interval(span: Duration) -> String {
    format!("interval '{} seconds'", span.as_secs())
}

/// A tenth more or less, so that flowgates started together don't stay in step.
fn jittered(span: Duration) -> Duration {
    let mut bytes = [0; 4];
    match getrandom::fill(&mut bytes) {
        Ok(()) => {
            span.mul_f64(0.9 + 0.2 * f64::from(u32::from_ne_bytes(bytes)) / f64::from(u32::MAX))
        }
        // Without randomness in step, then.
        Err(_none) => span,
    }
}

#[derive(Clone)]
struct Metrics {
    leader: Arc<Gauge>,
    requeued: Arc<Counter>,
    stalled: Arc<Gauge>,
    runs_pruned: Arc<Counter>,
    partitions_made: Arc<Counter>,
    partitions_dropped: Arc<Counter>,
    succeeded: [Arc<Gauge>; Chore::ALL.len()],
    errors: [Arc<Counter>; Chore::ALL.len()],
}

impl Metrics {
    fn new(registry: &Registry) -> Self {
        let counter = |name, help| registry.counter(name, help, &[]);
        let of_chore = |chore: Chore| [("chore", chore.name())];
        Self {
            leader: registry.gauge(
                "flowgate_maintenance_leader",
                "Whether this process does the maintenance of its database",
                &[],
            ),
            requeued: counter(
                "flowgate_maintenance_tasks_requeued_total",
                "Tasks put back into their queue because their worker went away",
            ),
            stalled: registry.gauge(
                "flowgate_maintenance_tasks_stalled",
                "Tasks given up because their workers went away again and again, as last counted",
                &[],
            ),
            runs_pruned: counter(
                "flowgate_maintenance_runs_pruned_total",
                "Finished runs deleted at maintenance.prune_after",
            ),
            partitions_made: counter(
                "flowgate_maintenance_partitions_made_total",
                "Outbox partitions made ahead",
            ),
            partitions_dropped: counter(
                "flowgate_maintenance_partitions_dropped_total",
                "Outbox partitions dropped at events.retention",
            ),
            succeeded: Chore::ALL.map(|chore| {
                registry.gauge(
                    "flowgate_maintenance_success_timestamp_seconds",
                    "When a chore was last done here, in Unix time",
                    &of_chore(chore),
                )
            }),
            errors: Chore::ALL.map(|chore| {
                registry.counter(
                    "flowgate_maintenance_errors_total",
                    "Chores that failed",
                    &of_chore(chore),
                )
            }),
        }
    }

    fn succeeded(&self, chore: Chore) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |since| {
            i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
        });
        self.succeeded[chore as usize].set(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chore_has_its_place_in_the_tables() {
        for (place, chore) in Chore::ALL.into_iter().enumerate() {
            assert_eq!(chore as usize, place);
        }
    }

    #[test]
    fn what_is_switched_off_is_never_due_but_the_outbox_always_is() {
        let off = config::Maintenance {
            requeue: None,
            prune_after: None,
        };
        assert_eq!(
            Chore::ALL.map(|chore| chore.every(&off)),
            [None, Some(HOURLY), None]
        );
    }

    #[test]
    fn jitter_is_a_tenth_at_most() {
        for _ in 0..1000 {
            let span = jittered(Duration::from_secs(10));
            assert!(
                span >= Duration::from_millis(8_999) && span <= Duration::from_millis(11_001),
                "{span:?}"
            );
        }
    }
}
