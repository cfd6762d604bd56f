//! One queue's line, synchronous: who waits, who looks, who reads, and what is thought to be there. Takes the time as an
//! argument. Called by `mod.rs` under its lock.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::{GAP, Sight};

/// What was seen to be left over is believed for so long.
const LEFT_OVER_MAX: Duration = Duration::from_millis(50);
/// After a look that came to nothing.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

pub(super) struct Queue {
    /// In the order they came.
    waiters: BTreeMap<u64, Waiter>,
    next_id: u64,
    /// Somebody is looking.
    looking: bool,
    /// Something came in while somebody was looking.
    fed_meanwhile: bool,
    looked_at: Option<Instant>,
    next_look: Instant,
    /// Messages seen that nobody has been let in for.
    left: usize,
    /// Messages those may take who have been let in.
    claimed: usize,
    /// Fewer were let in than messages seen, since some may be those that readers under way take.
    unsure: bool,
}

struct Waiter {
    quantity: usize,
    /// Equal for equal polls.
    kind: u64,
    since: Instant,
    state: State,
    bell: Arc<Notify>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Waiting,
    Looking,
    /// Let in, and does not know yet.
    LetIn,
    Reading,
    /// Has got messages, and leaves.
    Served,
}

/// What a waiter does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    Look,
    Read,
    /// Wait for the bell, and until then if the next look is its.
    Wait(Option<Instant>),
}

impl Queue {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            waiters: BTreeMap::new(),
            next_id: 0,
            looking: false,
            fed_meanwhile: false,
            looked_at: None,
            next_look: now,
            left: 0,
            claimed: 0,
            unsure: false,
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.waiters.is_empty()
    }

    pub(super) fn waiting(&self) -> usize {
        self.waiters.len() - self.reading()
    }

    pub(super) fn reading(&self) -> usize {
        let reads = |waiter: &&Waiter| matches!(waiter.state, State::LetIn | State::Reading);
        self.waiters.values().filter(reads).count()
    }

    pub(super) fn longest(&self, now: Instant) -> Duration {
        let first = self.waiters.values().next();
        first.map_or(Duration::ZERO, |first| {
            now.saturating_duration_since(first.since)
        })
    }

    pub(super) fn enter(
        &mut self,
        quantity: usize,
        kind: u64,
        eager: bool,
        bell: Arc<Notify>,
        now: Instant,
    ) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        let waiter = Waiter {
            quantity: quantity.max(1),
            kind,
            since: now,
            state: State::Waiting,
            bell,
        };
        self.waiters.insert(id, waiter);
        let fresh = |at: Instant| now.saturating_duration_since(at) < LEFT_OVER_MAX;
        if self.left > 0 && !self.looked_at.is_some_and(fresh) {
            self.left = 0;
            self.next_look = now;
        }
        if eager {
            self.fed(now, GAP);
        }
        self.let_in();
        self.ring_first();
        id
    }

    pub(super) fn next(&mut self, id: u64, now: Instant) -> Next {
        let due = !self.looking && now >= self.next_look;
        let (looking, next_look) = (self.looking, self.next_look);
        let is_first = self.first() == Some(id);
        let Some(waiter) = self.waiters.get_mut(&id) else {
            return Next::Wait(None);
        };
        match waiter.state {
            State::LetIn => {
                waiter.state = State::Reading;
                Next::Read
            }
            State::Waiting if is_first && due => {
                waiter.state = State::Looking;
                self.looking = true;
                self.fed_meanwhile = false;
                Next::Look
            }
            State::Waiting if is_first && !looking => Next::Wait(Some(next_look)),
            State::Waiting | State::Looking | State::Reading | State::Served => Next::Wait(None),
        }
    }

    /// Something may have come in.
    pub(super) fn fed(&mut self, now: Instant, gap: Duration) {
        if self.looking {
            self.fed_meanwhile = true;
            return;
        }
        let soonest = self.looked_at.map_or(now, |at| now.max(at + gap));
        if soonest < self.next_look {
            self.next_look = soonest;
            self.ring_first();
        }
    }

    pub(super) fn looked(&mut self, id: u64, sight: Option<Sight>, now: Instant, floor: Duration) {
        let looked = self
            .waiters
            .get_mut(&id)
            .filter(|waiter| waiter.state == State::Looking);
        if let Some(waiter) = looked {
            waiter.state = State::Waiting;
            self.looking = false;
        }
        let Some(Sight { visible, next_in }) = sight else {
            self.next_look = now + LOOK_AGAIN;
            self.ring_first();
            return;
        };
        self.looked_at = Some(now);
        self.next_look = now + next_in.map_or(floor, |next| next.min(floor));
        if std::mem::take(&mut self.fed_meanwhile) {
            self.next_look = self.next_look.min(now + GAP);
        }
        self.left = visible.saturating_sub(self.claimed);
        self.let_in();
        self.unsure = visible > 0 && self.claimed > 0 && self.left == 0;
        self.ring_first();
    }

    pub(super) fn has_read(&mut self, id: u64, count: usize, now: Instant) {
        let Some(waiter) = self.waiters.get_mut(&id) else {
            return;
        };
        if !matches!(waiter.state, State::LetIn | State::Reading) {
            // It read on its own account.
            return;
        }
        let quantity = waiter.quantity;
        waiter.state = if count == 0 {
            State::Waiting
        } else {
            State::Served
        };
        self.claimed = self.claimed.saturating_sub(quantity);
        if count == 0 {
            // Somebody else was there first: what is left is not known any more.
            self.left = 0;
        }
        let more = count >= quantity && self.left == 0 || std::mem::take(&mut self.unsure);
        if more && !self.looking {
            self.next_look = self.next_look.min(now);
        } else if more {
            self.fed_meanwhile = true;
        }
        self.ring_first();
    }

    pub(super) fn let_all_in(&mut self, kind: u64) {
        for waiter in self.waiters.values_mut() {
            if waiter.state == State::Waiting && waiter.kind == kind {
                waiter.state = State::LetIn;
                self.claimed += waiter.quantity;
                waiter.bell.notify_one();
            }
        }
    }

    pub(super) fn leave(&mut self, id: u64, now: Instant) {
        let Some(waiter) = self.waiters.remove(&id) else {
            return;
        };
        match waiter.state {
            State::Waiting | State::Served => {}
            State::Looking => {
                self.looking = false;
                self.next_look = now;
            }
            // Whatever it was to get is still there, or is again in a moment.
            State::LetIn | State::Reading => {
                self.claimed = self.claimed.saturating_sub(waiter.quantity);
                if self.looking {
                    self.fed_meanwhile = true;
                } else {
                    self.next_look = self.next_look.min(now + GAP);
                }
            }
        }
        self.ring_first();
    }

    fn first(&self) -> Option<u64> {
        let waits = |waiter: &Waiter| waiter.state == State::Waiting;
        let mut waiters = self.waiters.iter();
        waiters.find(|(_, waiter)| waits(waiter)).map(|(id, _)| *id)
    }

    /// Whoever is first sees to the next look.
    fn ring_first(&self) {
        if let Some(waiter) = self.first().and_then(|id| self.waiters.get(&id)) {
            waiter.bell.notify_one();
        }
    }

    fn let_in(&mut self) {
        for waiter in self.waiters.values_mut() {
            if self.left == 0 {
                return;
            }
            if waiter.state == State::Waiting {
                waiter.state = State::LetIn;
                self.left -= waiter.quantity.min(self.left);
                self.claimed += waiter.quantity;
                waiter.bell.notify_one();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLOOR: Duration = Duration::from_secs(1);

    fn seen(visible: usize) -> Option<Sight> {
        Some(Sight {
            visible,
            next_in: None,
        })
    }

    fn line(queue: &mut Queue, quantities: &[usize], now: Instant) -> Vec<u64> {
        let enter = |&quantity| queue.enter(quantity, 0, false, Arc::default(), now);
        quantities.iter().map(enter).collect()
    }

    #[tokio::test]
    async fn the_first_looks_for_all_and_the_first_get_what_there_is() {
        let now = Instant::now();
        let mut queue = Queue::new(now);
        let ids = line(&mut queue, &[2, 2, 2], now);
        assert_eq!(queue.next(ids[1], now), Next::Wait(None));
        assert_eq!(queue.next(ids[0], now), Next::Look);
        assert_eq!(queue.next(ids[1], now), Next::Wait(None), "one looks");
        queue.looked(ids[0], seen(3), now, FLOOR);
        assert_eq!(queue.next(ids[0], now), Next::Read);
        assert_eq!(queue.next(ids[1], now), Next::Read);
        let floor = Next::Wait(Some(now + FLOOR));
        assert_eq!(queue.next(ids[2], now), floor, "three are no six");
    }

    #[tokio::test]
    async fn what_readers_under_way_may_take_is_nobody_elses() {
        let now = Instant::now();
        let mut queue = Queue::new(now);
        let ids = line(&mut queue, &[1, 1], now);
        assert_eq!(queue.next(ids[0], now), Next::Look);
        queue.looked(ids[0], seen(1), now, FLOOR);
        assert_eq!(queue.next(ids[0], now), Next::Read);
        queue.fed(now + GAP, GAP);
        assert_eq!(queue.next(ids[1], now + GAP), Next::Look);
        // The same message, still being read.
        queue.looked(ids[1], seen(1), now + GAP, FLOOR);
        assert_eq!(
            queue.next(ids[1], now + GAP),
            Next::Wait(Some(now + GAP + FLOOR))
        );
        // Then it is known who has it, and it is time to look again.
        queue.has_read(ids[0], 1, now + GAP);
        assert_eq!(queue.next(ids[1], now + GAP), Next::Look);
    }

    #[tokio::test]
    async fn who_read_nothing_is_first_again_and_who_leaves_hands_over() {
        let now = Instant::now();
        let mut queue = Queue::new(now);
        let ids = line(&mut queue, &[1, 1], now);
        assert_eq!(queue.next(ids[0], now), Next::Look);
        queue.looked(ids[0], seen(1), now, FLOOR);
        assert_eq!(queue.next(ids[0], now), Next::Read);
        queue.has_read(ids[0], 0, now);
        assert_eq!(queue.first(), Some(ids[0]));
        let later = now + FLOOR;
        assert_eq!(queue.next(ids[0], later), Next::Look);
        queue.leave(ids[0], later);
        assert_eq!(queue.next(ids[1], later), Next::Look);
        queue.looked(ids[1], None, later, FLOOR);
        assert_eq!(
            queue.next(ids[1], later),
            Next::Wait(Some(later + LOOK_AGAIN))
        );
    }

    #[tokio::test]
    async fn a_commit_during_a_look_is_not_missed() {
        let now = Instant::now();
        let mut queue = Queue::new(now);
        let ids = line(&mut queue, &[1], now);
        assert_eq!(queue.next(ids[0], now), Next::Look);
        queue.fed(now, GAP);
        queue.looked(ids[0], seen(0), now, FLOOR);
        assert_eq!(queue.next(ids[0], now), Next::Wait(Some(now + GAP)));
        assert_eq!(queue.next(ids[0], now + GAP), Next::Look);
        let soon = Duration::from_millis(70);
        let next = Sight {
            visible: 0,
            next_in: Some(soon),
        };
        queue.looked(ids[0], Some(next), now + GAP, FLOOR);
        assert_eq!(
            queue.next(ids[0], now + GAP),
            Next::Wait(Some(now + GAP + soon))
        );
    }
}
