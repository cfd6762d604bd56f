//! Identical reads share one query. A read may join a flight only if its query has not been sent yet; who comes later waits for
//! the next one. So every answer was computed after it was asked for, and of each read one query at most is under way, however
//! many ask. Knows keys and bytes; what makes two reads the same, and who may see what, is said by whoever makes the key. Called
//! by `client/session/sharing.rs`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use crate::metrics::{Counter, Registry};

/// A flight that takes longer is waited for no more: its leader may be slow to read.
const WAIT_MAX: Duration = Duration::from_secs(1);

pub(crate) struct Flights {
    routes: Mutex<HashMap<Arc<[u8]>, Route>>,
    pub(crate) counters: Counters,
}

pub(crate) struct Counters {
    /// Reads that were sent while others could have waited for them.
    pub(crate) led: Arc<Counter>,
    /// Reads answered by somebody else's query.
    pub(crate) followed: Arc<Counter>,
    /// Reads that waited for somebody else's query in vain.
    pub(crate) alone: Arc<Counter>,
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
    Landed(Answer),
    Failed,
}

/// Word for word what a leader was told, and where it came from: a replica, or the primary.
#[derive(Clone)]
pub(crate) struct Answer {
    pub(crate) bytes: Arc<[u8]>,
    pub(crate) replica: Option<usize>,
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
    pub(crate) fn new(registry: &Registry) -> Self {
        let reads = |by| {
            let help = "identical reads, by whose query answered them";
            registry.counter("flowgate_shared_reads_total", help, &[("answered_by", by)])
        };
        let counters = Counters {
            led: reads("own"),
            followed: reads("other"),
            alone: reads("own_after_waiting"),
        };
        Self {
            routes: Mutex::default(),
            counters,
        }
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
            drop(before.answer().await);
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

    pub(crate) fn land(self, answer: Answer) {
        self.flight.state.send_replace(State::Landed(answer));
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
    /// `None`: there is none, or not in time. Cancel-safe.
    pub(crate) async fn answer(&mut self) -> Option<Answer> {
        let landed = self.0.wait_for(|state| !matches!(state, State::Pending));
        match timeout(WAIT_MAX, landed).await.ok()?.ok()?.clone() {
            State::Landed(answer) => Some(answer),
            State::Pending | State::Failed => None,
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
        Arc::new(Flights::new(&Registry::new()))
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

    fn answer(text: &str) -> Answer {
        Answer {
            bytes: text.as_bytes().into(),
            replica: None,
        }
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
        assert_eq!(third.answer().await.unwrap().bytes[..], *b"two");
        assert!(lock(&flights.routes).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_leader_that_leaves_is_not_waited_for() {
        let flights = flights();
        let now = Instant::now();
        let first = leader(&flights, b"k", now);
        let mut second = follower(&flights, b"k", now);
        drop(first);
        assert!(second.answer().await.is_none());
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
