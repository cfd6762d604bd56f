//! Polls waiting for work: who waits at which queue, who looks for all of them when it is time to, and who is let in when
//! there is something to read. First come, first served; no more are let in than there are messages. Knows waiters,
//! deadlines and wakes; never Postgres: the sessions that wait do the looking, one of them for all. Called by
//! `client/session/parking.rs`, and fed by what sessions commit.
//!
//! Why a waiter looks and not a task of our own: it has a server's settings, role and rights, so a queue is seen as those see
//! it who read it, and no connection is kept for it.

mod answers;
mod queue;

use std::collections::HashMap;
use std::pin::pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until, timeout};

use self::answers::Answers;
pub(crate) use self::answers::Look;
use self::queue::{Next, Queue};
use crate::metrics::{Counter, Gauge, Registry};

/// Queues of which something is remembered.
const QUEUES_MAX: usize = 10_000;
/// Whoever was finding out may have vanished.
const NEWS_MAX: Duration = Duration::from_secs(1);
/// Two looks at a queue are at least so far apart when others commit all the time.
const GAP: Duration = Duration::from_millis(3);

/// A queue, as pgmq spells it, in a database.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct QueueName {
    pub(crate) database: String,
    pub(crate) queue: String,
    /// Equal for those who see the same of it: role and settings.
    pub(crate) seen_as: u64,
}

pub(crate) struct Park {
    queues: Mutex<HashMap<Arc<QueueName>, Queue>>,
    answers: Mutex<Answers>,
    /// Something has become known of an answer.
    news: Notify,
    /// `poll.probe_ms`: while somebody waits a queue is looked at that often, whatever happens.
    floor: Duration,
    pub(crate) counters: Counters,
}

pub(crate) struct Counters {
    waiting: Arc<Gauge>,
    polls: Arc<Counter>,
    refused_full: Arc<Counter>,
    pub(crate) probes: Arc<Counter>,
    pub(crate) probes_failed: Arc<Counter>,
    /// Reads by what they came back with.
    pub(crate) reads_filled: Arc<Counter>,
    pub(crate) reads_empty: Arc<Counter>,
    /// Polls answered empty without asking Postgres.
    pub(crate) answered_empty: Arc<Counter>,
    /// Descriptions of polls given without asking Postgres.
    pub(crate) described: Arc<Counter>,
    /// Polls that ran as they came.
    pub(crate) passed_on: Arc<Counter>,
}

impl Counters {
    fn new(registry: &Registry) -> Self {
        let counter = |name, help| registry.counter(name, help, &[]);
        let reads = |found| {
            let help = "reads of queues by polls that were let in, by what they found";
            registry.counter("flowgate_park_reads_total", help, &[("found", found)])
        };
        Self {
            waiting: registry.gauge("flowgate_parked", "polls waiting for work", &[]),
            polls: counter("flowgate_parked_total", "polls that were parked"),
            refused_full: counter(
                "flowgate_park_full_total",
                "polls not parked because too many queues are remembered",
            ),
            probes: counter(
                "flowgate_park_probes_total",
                "looks at queues for parked polls",
            ),
            probes_failed: counter(
                "flowgate_park_probes_failed_total",
                "looks at queues that failed",
            ),
            reads_filled: reads("messages"),
            reads_empty: reads("nothing"),
            answered_empty: counter(
                "flowgate_park_answered_empty_total",
                "polls answered empty at their deadline",
            ),
            described: counter(
                "flowgate_park_described_total",
                "polls described without a server",
            ),
            passed_on: counter(
                "flowgate_park_passed_on_total",
                "polls that could not be parked and ran as they came",
            ),
        }
    }
}

/// What a waiter is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// Look at the queue for all who wait there, and say so with `looked`.
    Look,
    /// Read: there is something for it. To be ended with `has_read`.
    Read,
    /// Its time is up.
    Deadline,
}

/// What a look at a queue has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sight {
    pub(crate) visible: usize,
    /// When the next message becomes visible.
    pub(crate) next_in: Option<Duration>,
}

/// What the console shows of a queue.
pub(crate) struct Report {
    pub(crate) name: Arc<QueueName>,
    pub(crate) waiting: usize,
    pub(crate) reading: usize,
    pub(crate) longest: Duration,
}

impl Park {
    pub(crate) fn new(floor: Duration, registry: &Registry) -> Self {
        Self {
            queues: Mutex::default(),
            answers: Mutex::default(),
            news: Notify::new(),
            floor,
            counters: Counters::new(registry),
        }
    }

    /// A place at the end of the queue's line. `eager`: a look is due now, as this client has just been working. `None`: too
    /// many queues.
    pub(crate) fn enter(
        self: &Arc<Self>,
        name: QueueName,
        quantity: usize,
        kind: u64,
        eager: bool,
    ) -> Option<Ticket> {
        let now = Instant::now();
        let bell = Arc::new(Notify::new());
        let mut queues = lock(&self.queues);
        if queues.len() >= QUEUES_MAX && !queues.contains_key(&name) {
            queues.retain(|_, queue| !queue.is_empty());
            if queues.len() >= QUEUES_MAX {
                self.counters.refused_full.inc();
                return None;
            }
        }
        let name = Arc::new(name);
        let queue = queues
            .entry(Arc::clone(&name))
            .or_insert_with(|| Queue::new(now));
        let id = queue.enter(quantity, kind, eager, Arc::clone(&bell), now);
        drop(queues);
        self.counters.waiting.add(1);
        self.counters.polls.inc();
        Some(Ticket {
            park: Arc::clone(self),
            name,
            id,
            bell,
        })
    }

    /// Something may have come into a queue of this database, or into any.
    pub(crate) fn fed(&self, database: &str, queue: Option<&str>) {
        let now = Instant::now();
        let mut queues = lock(&self.queues);
        let concerned = |name: &QueueName| {
            name.database == database && queue.is_none_or(|queue| name.queue == queue)
        };
        // Where it is not known which one, all are looked at, together no more often than one would be.
        let waited_for = queues
            .iter()
            .filter(|(name, queue)| concerned(name) && !queue.is_empty());
        let gap = GAP * u32::try_from(waited_for.count().max(1)).unwrap_or(u32::MAX);
        for (name, queue) in queues.iter_mut() {
            if concerned(name) {
                queue.fed(now, gap.min(self.floor));
            }
        }
    }

    /// All who wait at this queue with a poll of this kind are to read, to hear for themselves what is wrong.
    pub(crate) fn let_all_in(&self, name: &QueueName, kind: u64) {
        if let Some(queue) = lock(&self.queues).get_mut(name) {
            queue.let_all_in(kind);
        }
    }

    /// The kept answer to something asked before.
    pub(crate) fn look_up(&self, key: &[u8]) -> Look {
        lock(&self.answers).look_up(key, Instant::now())
    }

    /// The same, once whoever is finding out has done so.
    pub(crate) async fn look_up_settled(&self, key: &[u8]) -> Look {
        loop {
            let mut news = pin!(self.news.notified());
            // Enabled before looking, so that news in between are not missed.
            news.as_mut().enable();
            match self.look_up(key) {
                Look::Asked => drop(timeout(NEWS_MAX, news).await),
                look => return look,
            }
        }
    }

    pub(crate) fn keep(&self, key: &[u8], answer: &[u8]) {
        lock(&self.answers).keep(key, answer, Instant::now());
        self.news.notify_waiters();
    }

    pub(crate) fn forget(&self, key: &[u8]) {
        lock(&self.answers).forget(key);
        self.news.notify_waiters();
    }

    /// For a while nothing of the kind is to be parked.
    pub(crate) fn never(&self, key: &[u8]) {
        lock(&self.answers).never(key, Instant::now());
        self.news.notify_waiters();
    }

    pub(crate) fn report(&self) -> Vec<Report> {
        let now = Instant::now();
        let queues = lock(&self.queues);
        let waited_for = queues.iter().filter(|(_, queue)| !queue.is_empty());
        waited_for
            .map(|(name, queue)| Report {
                name: Arc::clone(name),
                waiting: queue.waiting(),
                reading: queue.reading(),
                longest: queue.longest(now),
            })
            .collect()
    }
}

/// A place in a queue's line; dropping it leaves the line.
pub(crate) struct Ticket {
    park: Arc<Park>,
    name: Arc<QueueName>,
    id: u64,
    bell: Arc<Notify>,
}

impl Ticket {
    /// Waits for this one's turn. Cancel-safe only before its turn has come.
    pub(crate) async fn turn(&self, deadline: Instant) -> Turn {
        loop {
            let now = Instant::now();
            let until = match self.with(|queue| queue.next(self.id, now)) {
                Next::Look => return Turn::Look,
                Next::Read => return Turn::Read,
                Next::Wait(_) if now >= deadline => return Turn::Deadline,
                Next::Wait(until) => until.map_or(deadline, |until| until.min(deadline)),
            };
            tokio::select! {
                biased;
                () = self.bell.notified() => {}
                () = sleep_until(until) => {}
            }
        }
    }

    /// Ends `Turn::Look`. `None`: it did not come to that.
    pub(crate) fn looked(&self, sight: Option<Sight>) {
        let (now, floor) = (Instant::now(), self.park.floor);
        self.with(|queue| queue.looked(self.id, sight, now, floor));
    }

    /// Ends `Turn::Read`: so many came. With none it is the first in line again.
    pub(crate) fn has_read(&self, count: usize) {
        let counters = &self.park.counters;
        if count == 0 {
            counters.reads_empty.inc();
        } else {
            counters.reads_filled.inc();
        }
        let now = Instant::now();
        self.with(|queue| queue.has_read(self.id, count, now));
    }

    fn with<T>(&self, act: impl FnOnce(&mut Queue) -> T) -> T {
        let mut queues = lock(&self.park.queues);
        // A queue somebody waits at is never forgotten; were it, it would be as good as new.
        let queue = queues
            .entry(Arc::clone(&self.name))
            .or_insert_with(|| Queue::new(Instant::now()));
        act(queue)
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let now = Instant::now();
        self.with(|queue| queue.leave(self.id, now));
        self.park.counters.waiting.sub(1);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
