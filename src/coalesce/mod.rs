//! Identical reads share one query. A read may join a flight only if its query has not been sent yet; who comes later waits for
//! the next one. So every answer was computed after it was asked for, and of each read one query at most is under way, however
//! many ask. `store` keeps answers for those who may be told an older one. Knows keys and bytes; what makes two reads the same, and
//! who may see what, is said by whoever makes the key. Called by `client/session/sharing.rs`.

mod store;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use self::store::Store;
use crate::metrics::{Counter, Registry};

/// A flight that takes longer is waited for no more: its leader may be slow to read.
const WAIT_MAX: Duration = Duration::from_secs(1);

pub(crate) struct Flights {
    routes: Mutex<HashMap<Arc<[u8]>, Route>>,
    pub(crate) kept: Store,
    next_number: AtomicU64,
    pub(crate) counters: Counters,
}

pub(crate) struct Counters {
    /// Reads that were sent while others could have waited for them.
    pub(crate) led: Arc<Counter>,
    /// Reads answered by somebody else's query.
    pub(crate) followed: Arc<Counter>,
    /// Reads that waited for somebody else's query in vain.
    pub(crate) alone: Arc<Counter>,
    /// Reads answered from memory, within `cache.max_age_ms`.
    pub(crate) kept: Arc<Counter>,
    /// The same, because there was too much to do, within `shed.max_stale_ms`.
    pub(crate) stale: Arc<Counter>,
}

/// The flights of one key.
#[derive(Default)]
struct Route {
    /// Sent, and not answered yet.
    under_way: Option<Arc<Flight>>,
    /// Still to be sent: may be joined.
    boarding: Option<Arc<Flight>>,
}

struct Flight {
    state: watch::Sender<State>,
    /// What all on board have seen already.
    floor: Mutex<Instant>,
}

#[derive(Clone)]
enum State {
    Pending,
    Landed(Arc<Answer>),
    Refused,
    Failed,
}

/// Word for word what a leader was told, and where it came from: a replica, or the primary.
pub(crate) struct Answer {
    pub(crate) bytes: Box<[u8]>,
    pub(crate) replica: Option<usize>,
    /// When its query was sent.
    pub(crate) asked: Instant,
    /// It shows all that had been committed by then.
    pub(crate) covers: Instant,
    /// It shows nothing that came later than this.
    pub(crate) landed: Instant,
    /// Its own.
    pub(crate) number: u64,
}

/// What somebody else's query came back with.
pub(crate) enum Outcome {
    Answered(Arc<Answer>),
    /// There was too much to do for it to be asked.
    Refused,
    /// Nothing for others, or not in time.
    Nothing,
}

pub(crate) enum Seat {
    Leader(Leader),
    Follower(Follower),
}

/// Whoever sends the query. Dropped before it has landed, its flight has failed.
pub(crate) struct Leader {
    flights: Arc<Flights>,
    key: Arc<[u8]>,
    flight: Arc<Flight>,
    before: Option<Follower>,
}

pub(crate) struct Follower(watch::Receiver<State>);

impl Flights {
    /// Answers are kept for `age_max`, in `bytes_max` bytes.
    pub(crate) fn new(bytes_max: usize, age_max: Duration, registry: &Registry) -> Self {
        let reads = |by| {
            let help = "identical reads, by whose query answered them";
            registry.counter("flowgate_shared_reads_total", help, &[("answered_by", by)])
        };
        let counters = Counters {
            led: reads("own"),
            followed: reads("other"),
            alone: reads("own_after_waiting"),
            kept: reads("memory"),
            stale: reads("memory_under_load"),
        };
        Self {
            routes: Mutex::default(),
            kept: Store::new(bytes_max, age_max, registry),
            next_number: AtomicU64::new(1),
            counters,
        }
    }

    pub(crate) fn next_number(&self) -> u64 {
        self.next_number.fetch_add(1, Ordering::Relaxed)
    }

    /// A seat for somebody who has seen everything up to `floor`.
    pub(crate) fn join(self: &Arc<Self>, key: &[u8], floor: Instant) -> Seat {
        let mut routes = lock(&self.routes);
        let key = match routes.get_key_value(key) {
            Some((key, _)) => Arc::clone(key),
            None => Arc::from(key),
        };
        let route = routes.entry(Arc::clone(&key)).or_default();
        if let Some(boarding) = &route.boarding {
            let mut highest = lock(&boarding.floor);
            *highest = floor.max(*highest);
            return Seat::Follower(Follower(boarding.state.subscribe()));
        }
        let flight = Arc::new(Flight {
            state: watch::Sender::new(State::Pending),
            floor: Mutex::new(floor),
        });
        route.boarding = Some(Arc::clone(&flight));
        let under_way = route.under_way.as_ref();
        Seat::Leader(Leader {
            before: under_way.map(|flight| Follower(flight.state.subscribe())),
            flights: Arc::clone(self),
            key,
            flight,
        })
    }
}

impl Leader {
    /// Waits until the flight before has ended.
    pub(crate) async fn ready(&mut self) {
        if let Some(mut before) = self.before.take() {
            // Whatever it came back with.
            drop(before.outcome().await);
        }
    }

    /// From here on nobody may join; returns what all on board have seen. The query is to be sent after this.
    pub(crate) fn depart(&self) -> Instant {
        let mut routes = lock(&self.flights.routes);
        if let Some(route) = routes.get_mut(&self.key) {
            if is(&route.boarding, &self.flight) {
                route.boarding = None;
            }
            route.under_way = Some(Arc::clone(&self.flight));
        }
        drop(routes);
        self.flights.counters.led.inc();
        *lock(&self.flight.floor)
    }

    pub(crate) fn land(self, answer: Arc<Answer>) {
        self.flights.kept.keep(&self.key, &answer);
        self.flight.state.send_replace(State::Landed(answer));
    }

    /// There is too much to do: for those on board as well.
    pub(crate) fn refuse(self) {
        self.flight.state.send_replace(State::Refused);
    }
}

impl Drop for Leader {
    fn drop(&mut self) {
        let mut routes = lock(&self.flights.routes);
        if let Some(route) = routes.get_mut(&self.key) {
            for place in [&mut route.boarding, &mut route.under_way] {
                if is(place, &self.flight) {
                    *place = None;
                }
            }
            if route.boarding.is_none() && route.under_way.is_none() {
                routes.remove(&self.key);
            }
        }
        drop(routes);
        self.flight.state.send_if_modified(|state| {
            let pending = matches!(state, State::Pending);
            if pending {
                *state = State::Failed;
            }
            pending
        });
    }
}

impl Follower {
    /// Cancel-safe.
    pub(crate) async fn outcome(&mut self) -> Outcome {
        let landed = self.0.wait_for(|state| !matches!(state, State::Pending));
        let state = match timeout(WAIT_MAX, landed).await {
            Ok(Ok(state)) => state.clone(),
            Ok(Err(_)) | Err(_) => return Outcome::Nothing,
        };
        match state {
            State::Landed(answer) => Outcome::Answered(answer),
            State::Refused => Outcome::Refused,
            State::Pending | State::Failed => Outcome::Nothing,
        }
    }
}

fn is(place: &Option<Arc<Flight>>, flight: &Arc<Flight>) -> bool {
    place
        .as_ref()
        .is_some_and(|there| Arc::ptr_eq(there, flight))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flights() -> Arc<Flights> {
        Arc::new(Flights::new(1 << 20, Duration::ZERO, &Registry::new()))
    }

    fn leader(flights: &Arc<Flights>, key: &[u8], floor: Instant) -> Leader {
        match flights.join(key, floor) {
            Seat::Leader(leader) => leader,
            Seat::Follower(_) => panic!("a leader was expected"),
        }
    }

    fn follower(flights: &Arc<Flights>, key: &[u8], floor: Instant) -> Follower {
        match flights.join(key, floor) {
            Seat::Follower(follower) => follower,
            Seat::Leader(_) => panic!("a follower was expected"),
        }
    }

    fn answer(text: &str) -> Arc<Answer> {
        let now = Instant::now();
        Arc::new(Answer {
            bytes: text.as_bytes().into(),
            replica: None,
            asked: now,
            covers: now,
            landed: now,
            number: 0,
        })
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_joins_what_has_been_sent() {
        let flights = flights();
        let now = Instant::now();
        let first = leader(&flights, b"k", now);
        assert_eq!(first.depart(), now);
        let mut second = leader(&flights, b"k", now);
        let later = now + Duration::from_secs(1);
        let mut third = follower(&flights, b"k", later);
        // Another key is another flight.
        drop(leader(&flights, b"other", now));
        first.land(answer("one"));
        second.ready().await;
        assert_eq!(second.depart(), later, "as fresh as the most demanding");
        second.land(answer("two"));
        match third.outcome().await {
            Outcome::Answered(answer) => assert_eq!(answer.bytes[..], *b"two"),
            Outcome::Refused | Outcome::Nothing => panic!("an answer was expected"),
        }
        assert!(lock(&flights.routes).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_that_leaves_is_not_waited_for() {
        let flights = flights();
        let now = Instant::now();
        let first = leader(&flights, b"k", now);
        let mut second = follower(&flights, b"k", now);
        drop(first);
        assert!(matches!(second.outcome().await, Outcome::Nothing));
        let first = leader(&flights, b"k", now);
        let mut second = follower(&flights, b"k", now);
        first.depart();
        first.refuse();
        assert!(matches!(second.outcome().await, Outcome::Refused));
        let first = leader(&flights, b"k", now);
        first.depart();
        let mut second = leader(&flights, b"k", now);
        let began = Instant::now();
        // It never lands; after a while the next one goes anyway.
        second.ready().await;
        assert!(began.elapsed() >= WAIT_MAX);
        second.depart();
        drop((first, second));
        assert!(lock(&flights.routes).is_empty());
    }
}
