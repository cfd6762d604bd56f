//! The books of one pool: which servers are idle, how many are open, who waits. Synchronous, no I/O, no clock.
//! Who ranks higher is served first, equals in the order they came.
//! INVARIANT: `open` counts every server that exists or is being opened; waiters exist only while no server they could
//! use is idle, unless the pool is paused or as many of the upstream's are at work as may be. `checkout.rs` keeps it behind a lock that is never held over an await.

#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::VecDeque;

use tokio::time::Instant;

use crate::classify::Worth;
use crate::config::Priority;

/// Who is served first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Rank {
    pub(crate) priority: Priority,
    pub(crate) worth: Worth,
}

impl Rank {
    /// Gives way, by being refused, to whatever there is too much of. Work already paid for never does; nor do polls, whose
    /// workers would only ask again.
    pub(crate) fn gives_way(self) -> bool {
        match self.priority {
            Priority::High => false,
            Priority::Normal => self.worth <= Worth::Read,
            Priority::Low => !matches!(self.worth, Worth::Progress | Worth::Poll),
        }
    }
}

/// A queue up to that long is a burst, or long transactions: so many a server, and in all.
const QUEUE_A_SERVER: usize = 4;
const QUEUE_MIN: usize = 32;

/// So many a server are served before anybody could say that they wait in vain.
const ROUNDS: usize = 2;

/// One grant in so many goes to whoever has waited longest, whatever it is worth: nobody waits for ever.
pub(crate) const IN_TURN: u64 = 8;

/// What the shelf needs to know of a server.
pub(crate) trait Shelved {
    /// Servers are interchangeable among clients of an equal kind.
    type Kind: PartialEq + Clone;
    fn kind(&self) -> &Self::Kind;
}

/// Who says whether the upstream has room for one more server.
pub(crate) trait Rooms {
    type Room;
    /// For a server more.
    fn open(&mut self) -> Option<Self::Room>;
    /// For a server in the place of one that is closed.
    fn replace(&mut self) -> Option<Self::Room>;
    /// As many servers are at work as may be at once: idle ones stay idle.
    fn is_full(&self) -> bool;
}

/// A client, for affinity.
pub(crate) type ClientId = u64;

pub(crate) struct Shelf<S: Shelved, W> {
    idle: Vec<Idle<S>>,
    open: usize,
    bounds: Bounds,
    paused: bool,
    /// By rank, the highest first, and in the order they came.
    waiters: VecDeque<Waiter<S::Kind, W>>,
    next_ticket: u64,
    granted: u64,
}

/// How many servers a pool may have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bounds {
    pub(crate) size: usize,
    /// So many more for waiters whose patience is at its end.
    pub(crate) reserve: usize,
}

struct Idle<S> {
    server: S,
    owner: Option<ClientId>,
}

struct Waiter<K, W> {
    ticket: u64,
    since: Instant,
    rank: Rank,
    kind: K,
    wake: W,
}

/// What a client that wants a server gets.
pub(crate) enum Take<S, R> {
    Ready(S),
    /// A slot is reserved: open a server, or give the slot back.
    Open(R),
    /// The same, after closing this one.
    Replace(S, R),
    /// Nothing free; the ticket takes the wish back.
    Wait {
        ticket: u64,
        lack: Lack,
    },
}

/// Who asks for a server.
pub(crate) struct Asker<'a, K> {
    pub(crate) client: ClientId,
    pub(crate) kind: &'a K,
    pub(crate) rank: Rank,
    pub(crate) since: Instant,
    /// What it waited with before, if what it was given was no good.
    pub(crate) ticket: Option<u64>,
}

/// What a pool has to say for itself where turns are given out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    rank: Rank,
    /// Servers that are not idle.
    lent: usize,
    /// Since when who is next waits.
    pub(crate) since: Instant,
}

impl Claim {
    /// The more the better: what is asked is worth more, or there are fewer who have a server.
    pub(crate) fn worth(self) -> (Rank, Reverse<usize>) {
        (self.rank, Reverse(self.lent))
    }
}

/// What a waiter waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lack {
    /// A server of its pool.
    Server,
    /// The pool might have one more, the upstream has no room for it.
    Room,
    /// There may be an idle one: as many are at work as may be.
    Turn,
}

/// What becomes of a server that came back.
pub(crate) enum Put<S, W> {
    /// It is idle now.
    Kept,
    /// Hand it to this waiter.
    Hand(S, W),
    /// It is one too many, or not what the next waiter needs: to be closed, and reported `closed`.
    Close(S),
}

/// What a waiter may be offered after something was closed or room was made.
pub(crate) enum Offer<S, W, R> {
    /// Nobody waits, or none may be opened.
    Nothing,
    /// Somebody waits, and the upstream has no room.
    Starved,
    /// Somebody waits for a turn.
    Full,
    /// Hand it to this waiter; it has been idle.
    Idle(S, W),
    /// This waiter may open a server, after closing the other one.
    Slot(W, R, Option<S>),
}

impl<S: Shelved, W> Shelf<S, W> {
    pub(crate) fn new(bounds: Bounds, paused: bool) -> Self {
        Self {
            idle: Vec::new(),
            open: 0,
            bounds,
            paused,
            waiters: VecDeque::new(),
            next_ticket: 0,
            granted: 0,
        }
    }

    /// A server that may be had at once and at nobody's cost: the client's own, or one that nobody owns.
    pub(crate) fn take_idle(&mut self, client: ClientId, kind: &S::Kind) -> Option<S> {
        if self.paused {
            return None;
        }
        let fits = |idle: &Idle<S>| idle.server.kind() == kind;
        let own = self
            .idle
            .iter()
            .position(|idle| idle.owner == Some(client) && fits(idle));
        let free = || {
            self.idle
                .iter()
                .rposition(|idle| idle.owner.is_none() && fits(idle))
        };
        own.or_else(free).map(|at| self.idle.remove(at).server)
    }

    /// The same; or, where no more may be opened, the one idle longest.
    pub(crate) fn take_ready(&mut self, client: ClientId, kind: &S::Kind) -> Option<S> {
        if let Some(server) = self.take_idle(client, kind) {
            return Some(server);
        }
        if self.paused || self.open < self.bounds.size {
            return None;
        }
        let at = self
            .idle
            .iter()
            .position(|idle| idle.server.kind() == kind)?;
        Some(self.idle.remove(at).server)
    }

    /// Affinity first: the client's own server; then one nobody owns; then a new one; then the one idle longest.
    pub(crate) fn take<R: Rooms>(
        &mut self,
        asker: &Asker<'_, S::Kind>,
        rooms: &mut R,
        wake: impl FnOnce() -> W,
    ) -> Take<S, R::Room> {
        let kind = asker.kind;
        let mut lack = Lack::Server;
        if rooms.is_full() {
            lack = Lack::Turn;
        } else if let Some(server) = self.take_ready(asker.client, kind) {
            return Take::Ready(server);
        } else if !self.paused {
            // Room that comes free is for those who wait for it already.
            let in_turn = self.waiters.is_empty();
            if self.open < self.bounds.size {
                if let Some(room) = in_turn.then(|| rooms.open()).flatten() {
                    self.open += 1;
                    return Take::Open(room);
                }
                lack = Lack::Room;
            }
            // Idle servers stand in the order they came back, so the first that fits has been idle longest.
            if let Some(at) = self.idle.iter().position(|idle| idle.server.kind() == kind) {
                return Take::Ready(self.idle.remove(at).server);
            }
            if !self.idle.is_empty() {
                if let Some(room) = in_turn.then(|| rooms.replace()).flatten() {
                    return Take::Replace(self.idle.remove(0).server, room);
                }
                lack = Lack::Room;
            }
        }
        let ticket = asker.ticket.unwrap_or(self.next_ticket);
        self.next_ticket = self.next_ticket.max(ticket + 1);
        let place = (Reverse(asker.rank), ticket);
        let behind = self
            .waiters
            .partition_point(|waiter| (Reverse(waiter.rank), waiter.ticket) < place);
        let waiter = Waiter {
            ticket,
            since: asker.since,
            rank: asker.rank,
            kind: kind.clone(),
            wake: wake(),
        };
        self.waiters.insert(behind, waiter);
        Take::Wait { ticket, lack }
    }

    /// A server comes back clean; `owner` is the client it stays warm for. `hands_on`: not before the next turn, else.
    pub(crate) fn put(&mut self, server: S, owner: Option<ClientId>, hands_on: bool) -> Put<S, W> {
        let Bounds { size, reserve } = self.bounds;
        if self.paused || self.open > size + reserve {
            return Put::Close(server);
        }
        let next = self.next_waiter().filter(|_| hands_on);
        match next.and_then(|at| self.waiters.get(at)) {
            None if self.open > size => Put::Close(server),
            None => {
                self.idle.push(Idle { server, owner });
                Put::Kept
            }
            Some(next) if next.kind != *server.kind() => Put::Close(server),
            Some(_) => match next.and_then(|at| self.grant(at)) {
                Some(waiter) => Put::Hand(server, waiter.wake),
                None => Put::Close(server),
            },
        }
    }

    /// A server was closed, or could not be opened. `offer` whoever waits what that leaves.
    pub(crate) fn closed(&mut self) {
        self.open -= 1;
    }

    /// A slot for a server nobody has asked for yet, to keep some ready.
    pub(crate) fn reserve_slot<R: Rooms>(&mut self, keep: usize, rooms: &mut R) -> Option<R::Room> {
        if self.paused || self.open >= keep.min(self.bounds.size) {
            return None;
        }
        let room = rooms.open()?;
        self.open += 1;
        Some(room)
    }

    /// What the first waiter may have now.
    pub(crate) fn offer<R: Rooms>(&mut self, rooms: &mut R) -> Offer<S, W, R::Room> {
        let Some(next) = self.next_waiter().filter(|_| !self.paused) else {
            return Offer::Nothing;
        };
        if rooms.is_full() {
            return Offer::Full;
        }
        let waiter = self.waiters.get(next);
        let fits = |idle: &Idle<S>| waiter.is_some_and(|waiter| waiter.kind == *idle.server.kind());
        // The one that came back last, as `take_idle` has it.
        if let Some(at) = self.idle.iter().rposition(fits) {
            let server = self.idle.remove(at).server;
            return match self.grant(next) {
                Some(waiter) => Offer::Idle(server, waiter.wake),
                None => Offer::Nothing,
            };
        }
        let (room, old) = if self.open < self.bounds.size {
            let Some(room) = rooms.open() else {
                return Offer::Starved;
            };
            self.open += 1;
            (room, None)
        } else if self.idle.is_empty() {
            return Offer::Nothing;
        } else {
            // Of another kind.
            let Some(room) = rooms.replace() else {
                return Offer::Starved;
            };
            (room, Some(self.idle.remove(0).server))
        };
        match self.grant(next) {
            Some(waiter) => Offer::Slot(waiter.wake, room, old),
            None => Offer::Nothing,
        }
    }

    /// The waiter with this ticket has waited long enough to be given of the reserve.
    pub(crate) fn claim_reserve<R: Rooms>(
        &mut self,
        ticket: u64,
        rooms: &mut R,
    ) -> Offer<S, W, R::Room> {
        let at = self
            .waiters
            .iter()
            .position(|waiter| waiter.ticket == ticket);
        let Some(at) = at.filter(|_| !self.paused) else {
            return Offer::Nothing;
        };
        if self.open >= self.bounds.size + self.bounds.reserve {
            return Offer::Nothing;
        }
        if rooms.is_full() {
            return Offer::Full;
        }
        let Some(room) = rooms.open() else {
            return Offer::Starved;
        };
        self.open += 1;
        match self.waiters.remove(at) {
            Some(waiter) => Offer::Slot(waiter.wake, room, None),
            None => Offer::Nothing,
        }
    }

    pub(crate) fn claim(&self) -> Option<Claim> {
        let next = self.waiters.get(self.next_waiter()?)?;
        Some(Claim {
            rank: next.rank,
            lent: self.open - self.idle.len(),
            since: next.since,
        })
    }

    /// Who is served next, as a place in line.
    fn next_waiter(&self) -> Option<usize> {
        if (self.granted + 1).is_multiple_of(IN_TURN) {
            let oldest = self
                .waiters
                .iter()
                .enumerate()
                .min_by_key(|(_, waiter)| waiter.ticket);
            return oldest.map(|(at, _)| at);
        }
        (!self.waiters.is_empty()).then_some(0)
    }

    fn grant(&mut self, at: usize) -> Option<Waiter<S::Kind, W>> {
        self.granted += 1;
        self.waiters.remove(at)
    }

    /// The waiter with this ticket has given up.
    pub(crate) fn forget(&mut self, ticket: u64) {
        self.waiters.retain(|waiter| waiter.ticket != ticket);
    }

    /// This client is gone: its idle server is anybody's.
    pub(crate) fn disown(&mut self, client: ClientId) {
        self.idle
            .iter_mut()
            .filter(|idle| idle.owner == Some(client))
            .for_each(|idle| idle.owner = None);
    }

    /// Takes out every idle server `wanted` picks; each must be reported `closed`.
    pub(crate) fn remove_idle(&mut self, mut wanted: impl FnMut(&mut S) -> bool) -> Vec<S> {
        let mut removed = Vec::new();
        let mut at = 0;
        while let Some(idle) = self.idle.get_mut(at) {
            if wanted(&mut idle.server) {
                removed.push(self.idle.remove(at).server);
            } else {
                at += 1;
            }
        }
        removed
    }

    /// Takes out the server idle longest; it must be reported `closed`.
    pub(crate) fn remove_oldest(&mut self) -> Option<S> {
        (!self.idle.is_empty()).then(|| self.idle.remove(0).server)
    }

    pub(crate) fn oldest(&self) -> Option<&S> {
        self.idle.first().map(|idle| &idle.server)
    }

    pub(crate) fn idle(&self) -> impl Iterator<Item = &S> {
        self.idle.iter().map(|idle| &idle.server)
    }

    /// From now on. Returns idle servers that are too many; each must be reported `closed`.
    pub(crate) fn resize(&mut self, bounds: Bounds) -> Vec<S> {
        self.bounds = bounds;
        let surplus = self.open.saturating_sub(bounds.size).min(self.idle.len());
        self.idle.drain(..surplus).map(|idle| idle.server).collect()
    }

    pub(crate) fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// Nothing is lent while paused; what comes back is to be closed.
    pub(crate) fn pause(&mut self, paused: bool) {
        self.paused = paused;
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.paused
    }

    /// More wait than a burst or some long transactions would explain.
    pub(crate) fn is_overloaded(&self) -> bool {
        !self.paused && self.waiters.len() > self.ordinary()
    }

    /// Others keep going before whoever has been waiting since so many were served: with those who wait, more than a burst explains.
    /// Where hardly any wait, all are about to be served.
    pub(crate) fn is_passing_by(&self, granted: u64) -> bool {
        let passed = self.granted.saturating_sub(granted);
        let passed = usize::try_from(passed).unwrap_or(usize::MAX);
        let waiting = self.waiters.len();
        !self.paused
            && waiting > self.bounds.size * ROUNDS
            && passed.saturating_add(waiting) > self.ordinary()
    }

    fn ordinary(&self) -> usize {
        (self.bounds.size * QUEUE_A_SERVER).max(QUEUE_MIN)
    }

    /// Waiters that have been served, ever.
    pub(crate) fn granted(&self) -> u64 {
        self.granted
    }

    /// Since when whoever has waited longest waits.
    pub(crate) fn waiting_since(&self) -> Option<Instant> {
        self.waiters.iter().map(|waiter| waiter.since).min()
    }

    /// How many wait for what they are worth.
    pub(crate) fn waiting_by_worth(&self) -> [usize; Worth::ALL.len()] {
        let mut waiting = [0; Worth::ALL.len()];
        for waiter in &self.waiters {
            waiting[waiter.rank.worth as usize] += 1;
        }
        waiting
    }

    pub(crate) fn counts(&self) -> Counts {
        Counts {
            open: self.open,
            idle: self.idle.len(),
            waiting: self.waiters.len(),
        }
    }
}

/// How full a pool is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) open: usize,
    pub(crate) idle: usize,
    pub(crate) waiting: usize,
}
