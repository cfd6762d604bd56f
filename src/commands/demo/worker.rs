//! The demo's worker: what one of pgflow's own says over the wire (read_with_poll, start_tasks, complete_task, fail_task,
//! heartbeat), with `SLOTS` tasks at once over four connections through the proxy. Never loses a task it was given: a
//! completion is repeated until answered, and what was started for it but never reached it is given back. Run by `mod`.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_postgres::types::Type;
use tokio_postgres::{Error, Row};
use tracing::warn;
use uuid::Uuid;

use super::flow::{self, FLOW};
use super::latency::Answers;
use super::link::{Link, is_passing, words};

pub(super) const SLOTS: usize = 8;
/// Connections that complete; one more polls.
pub(super) const LANES: usize = 3;

/// As pgflow's workers have them.
const VISIBILITY_S: i32 = 5;
const POLL_MAX_S: i32 = 2;
const POLL_INTERVAL_MS: i32 = 100;
const HEARTBEAT: Duration = Duration::from_secs(5);

const REGISTER: &str =
    "insert into pgflow.workers (queue_name, worker_id, function_name) values ($1, $2, $3)
     on conflict do nothing";
const BEAT: &str =
    "update pgflow.workers as w set last_heartbeat_at = clock_timestamp() where w.worker_id = $1
     returning (w.deprecated_at is not null) as is_deprecated";
const POLL: &str = "select * from pgmq.read_with_poll(queue_name => $1, vt => $2, qty => $3, max_poll_seconds => $4, poll_interval_ms => $5)";
const START: &str = "select * from pgflow.start_tasks(flow_slug => $1, msg_ids => $2::bigint[], worker_id => $3::uuid)";
const COMPLETE: &str = "select status from pgflow.complete_task(run_id => $1, step_slug => $2, task_index => $3, output => $4)";
const FAIL: &str = "select status from pgflow.fail_task(run_id => $1, step_slug => $2, task_index => $3, error_message => $4)";
const STARTED: &str = "select run_id, step_slug, task_index from pgflow.step_tasks where last_worker_id = $1 and status = 'started'";

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct TaskKey {
    run: Uuid,
    step: String,
    index: i32,
}

struct Task {
    key: TaskKey,
    input: Value,
    /// Its place among `SLOTS`.
    slot: OwnedSemaphorePermit,
}

/// The tasks that are here: started for us, and not yet ended by us.
#[derive(Default)]
struct InHand(Mutex<HashSet<TaskKey>>);

impl InHand {
    fn lock(&self) -> MutexGuard<'_, HashSet<TaskKey>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Poller {
    link: Link,
    id: Uuid,
    in_hand: Arc<InHand>,
    slots: Arc<Semaphore>,
    lanes: Vec<mpsc::Sender<Task>>,
    next_lane: usize,
    beaten: Instant,
}

/// Until aborted.
pub(super) async fn run(proxy: SocketAddr, answers: Arc<Answers>) {
    let in_hand = Arc::new(InHand::default());
    let mut tasks = JoinSet::new();
    let mut lanes = Vec::new();
    for _ in 0..LANES {
        // Room for all there may be: the poller never waits here.
        let (sender, inbox) = mpsc::channel(SLOTS);
        lanes.push(sender);
        let lane = Lane {
            link: Link::new(proxy, "flowgate demo worker"),
            in_hand: Arc::clone(&in_hand),
            answers: Arc::clone(&answers),
        };
        tasks.spawn(lane.run(inbox));
    }
    let poller = Poller {
        link: Link::new(proxy, "flowgate demo worker"),
        id: Uuid::new_v4(),
        in_hand,
        slots: Arc::new(Semaphore::new(SLOTS)),
        lanes,
        next_lane: 0,
        beaten: Instant::now(),
    };
    poller.run().await;
}

impl Poller {
    async fn run(mut self) {
        loop {
            // Refused outright (a kept folder of another make, perhaps): said once a pause, until somebody helps.
            match self.work().await {
                Ok(never) => match never {},
                Err(error) => {
                    if !is_passing(&error) {
                        warn!(error = words(&error), "the worker's poll was refused");
                    }
                    self.link.pause(&error).await;
                }
            }
        }
    }

    /// Begins with what a worker does after any loss, which is also what it does first.
    async fn work(&mut self) -> Result<std::convert::Infallible, Error> {
        let function = "flowgate demo";
        let params = [
            (&FLOW as _, Type::TEXT),
            (&self.id as _, Type::UUID),
            (&function as _, Type::TEXT),
        ];
        self.link.insist(REGISTER, &params).await?;
        self.give_back_strays().await?;
        loop {
            if self.beaten.elapsed() >= HEARTBEAT {
                self.link.query(BEAT, &[(&self.id, Type::UUID)]).await?;
                self.beaten = Instant::now();
                self.give_back_strays().await?;
            }
            let slot = self.slot().await;
            let free = i32::try_from(1 + self.slots.available_permits()).unwrap_or(1);
            drop(slot);
            let messages = self.poll(free).await?;
            if messages.is_empty() {
                continue;
            }
            let params = [
                (&FLOW as _, Type::TEXT),
                (&messages as _, Type::INT8_ARRAY),
                (&self.id as _, Type::UUID),
            ];
            for row in self.link.query(START, &params).await? {
                self.hand_out(&row).await?;
            }
        }
    }

    async fn poll(&mut self, qty: i32) -> Result<Vec<i64>, Error> {
        let params = [
            (&FLOW as _, Type::TEXT),
            (&VISIBILITY_S as _, Type::INT4),
            (&qty as _, Type::INT4),
            (&POLL_MAX_S as _, Type::INT4),
            (&POLL_INTERVAL_MS as _, Type::INT4),
        ];
        let messages = self.link.query(POLL, &params).await?;
        messages.iter().map(|row| row.try_get("msg_id")).collect()
    }

    async fn hand_out(&mut self, row: &Row) -> Result<(), Error> {
        let key = TaskKey {
            run: row.try_get("run_id")?,
            step: row.try_get("step_slug")?,
            index: row.try_get("task_index")?,
        };
        let input = row.try_get("input")?;
        self.in_hand.lock().insert(key.clone());
        let slot = self.slot().await;
        self.next_lane = (self.next_lane + 1) % self.lanes.len();
        let task = Task { key, input, slot };
        if self.lanes[self.next_lane].send(task).await.is_err() {
            warn!("bug: a lane of the demo's worker has ended");
        }
        Ok(())
    }

    async fn slot(&self) -> OwnedSemaphorePermit {
        let slot = Arc::clone(&self.slots).acquire_owned().await;
        slot.expect("nobody closes the semaphore")
    }

    /// If the answer of `start_tasks` was lost, its tasks are started for us and nobody works on them; 0.7 has nothing
    /// that puts them back by itself. Failing them does: they are queued again, at the price of a try.
    /// INVARIANT: never while a `start_tasks` of ours is under way, or its tasks would look like strays.
    async fn give_back_strays(&mut self) -> Result<(), Error> {
        for row in self.link.query(STARTED, &[(&self.id, Type::UUID)]).await? {
            let key = TaskKey {
                run: row.try_get(0)?,
                step: row.try_get(1)?,
                index: row.try_get(2)?,
            };
            if self.in_hand.lock().contains(&key) {
                continue;
            }
            // One that ended between the look and here is not changed by this.
            let why = "the connection was lost before the task reached its worker";
            fail(&mut self.link, &key, why).await?;
        }
        Ok(())
    }
}

/// Executes tasks, several at once, and ends them one after the other on its one connection.
struct Lane {
    link: Link,
    in_hand: Arc<InHand>,
    answers: Arc<Answers>,
}

impl Lane {
    async fn run(mut self, mut inbox: mpsc::Receiver<Task>) {
        let mut running = JoinSet::new();
        loop {
            tokio::select! {
                Some(task) = inbox.recv() => {
                    drop(running.spawn(execute(task)));
                }
                Some(ended) = running.join_next() => match ended {
                    Ok((task, outcome)) => self.end(task, outcome).await,
                    Err(error) => warn!(%error, "bug: a task of the demo's worker was lost"),
                },
                else => return,
            }
        }
    }

    async fn end(&mut self, task: Task, outcome: Result<Value, String>) {
        let Task { key, slot, .. } = task;
        let ended = match &outcome {
            Ok(output) => {
                let params = [
                    (&key.run as _, Type::UUID),
                    (&key.step as _, Type::TEXT),
                    (&key.index as _, Type::INT4),
                    (output as _, Type::JSONB),
                ];
                match self.link.insist(COMPLETE, &params).await {
                    Ok(_row) => Ok(()),
                    // As pgflow's workers do.
                    Err(error) => fail(&mut self.link, &key, &words(&error)).await,
                }
            }
            Err(why) => fail(&mut self.link, &key, why).await,
        };
        match ended {
            Ok(()) => self.answers.note(key.run, &key.step),
            Err(error) => warn!(
                error = words(&error),
                step = key.step,
                index = key.index,
                "a task could not be ended"
            ),
        }
        self.in_hand.lock().remove(&key);
        drop(slot);
    }
}

async fn execute(task: Task) -> (Task, Result<Value, String>) {
    let (run, step) = (task.key.run.to_string(), task.key.step.clone());
    let worked = tokio::task::spawn_blocking(move || {
        let outcome = flow::work(&run, &step, &task.input);
        (task, outcome)
    });
    match worked.await {
        Ok(done) => done,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

async fn fail(link: &mut Link, key: &TaskKey, why: &str) -> Result<(), Error> {
    let params = [
        (&key.run as _, Type::UUID),
        (&key.step as _, Type::TEXT),
        (&key.index as _, Type::INT4),
        (&why as _, Type::TEXT),
    ];
    link.insist(FAIL, &params).await.map(drop)
}
