//! What one upstream bears over all its pools: how many servers at once, how many logging in, and with `shed.adaptive` how
//! many at work. Whoever finds no room waits in its own pool; the pools that starve so stand here in a line, and room that
//! comes free is offered along it. Called by `checkout.rs` and `pools.rs`.
//!
//! At work is a server from when it is lent until its client has the answer, or gives it back. What a client keeps beyond that
//! (transactions, pins, LISTEN) is at work no more, whatever it asks on: it could neither be refused nor made to wait.
//!
//! Locks: a pool's books first, the budget second, never the other way round. INVARIANT: a `Room` or `Turn` is never dropped under
//! either, since its drop offers the room to the next pool.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use tokio::time::Instant;

use super::checkout::{Pool, lock};
use super::limiter::{Found, Limiter};
use super::shelf::Rooms;
use crate::config;

/// An adaptive limit is never lower.
const FLOOR: usize = 4;

/// One upstream's.
pub(crate) struct Budget {
    state: Mutex<State>,
    /// Pools in line: a glance without the lock.
    starving: AtomicUsize,
    adaptive: Option<Adaptive>,
}

/// With `shed.adaptive`.
struct Adaptive {
    limiter: Mutex<Limiter>,
    /// The limiter's, and `extra`.
    limit: AtomicUsize,
    /// Whoever ends a turn looks for pools in line, and who gets in line looks for a turn that ended: sequentially consistent,
    /// with the limit and the line's length, or both might miss the other.
    at_work: AtomicUsize,
    /// Turns ever taken, for `tick`.
    turns: AtomicU64,
    overdue: Mutex<Overdue>,
}

/// Requests that take long may hold all of a low limit: where nobody has had a turn for a whole tick, one more is let in.
#[derive(Default)]
struct Overdue {
    turns: u64,
    extra: usize,
}

/// How an upstream's adaptive limit stands.
pub(crate) struct Adapted {
    pub(crate) found: Found,
    pub(crate) at_work: usize,
}

/// A server is at work, or being opened for somebody.
pub(super) struct Turn(Arc<Budget>);

/// Who has the next turn.
#[derive(Clone, Copy)]
pub(super) enum Next {
    /// There is no bound, or it is not reached.
    Anybody,
    /// Nobody: more are at work than should be.
    Nobody,
    /// Whoever waits for longest; in another pool somebody has since then.
    Since(Instant),
}

impl Next {
    /// `own`: since when the first here waits.
    pub(super) fn is_own(self, own: Option<Instant>) -> bool {
        match self {
            Self::Anybody => true,
            Self::Nobody => false,
            Self::Since(rival) => own.is_some_and(|own| own <= rival),
        }
    }
}

struct State {
    open: usize,
    connecting: usize,
    bounds: Bounds,
    /// Pools that starve, in no order: who has waited longest is looked up when there is room.
    line: Vec<Weak<Pool>>,
    pools: Vec<Weak<Pool>>,
}

#[derive(Clone, Copy)]
struct Bounds {
    open: usize,
    connecting: usize,
    /// Of one pool, its reserve included.
    size: usize,
}

/// How full an upstream is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Load {
    pub(crate) open: usize,
    pub(crate) connecting: usize,
    /// `None`: no bound.
    pub(crate) open_max: Option<usize>,
    pub(crate) connecting_max: usize,
    /// Pools that wait for room.
    pub(crate) starving: usize,
}

/// Room for one server, as long as it lives.
pub(super) struct Place(Arc<Budget>);

/// Room for one login.
pub(super) struct Connecting(Arc<Budget>);

/// Room to open a server in; without a place of its own it takes that of the server it replaces.
pub(super) struct Room {
    pub(super) place: Option<Place>,
    pub(super) connecting: Connecting,
}

impl Bounds {
    fn of(settings: &config::Pool) -> Self {
        Self {
            open: settings
                .max_server_connections
                .map_or(usize::MAX, std::num::NonZero::get),
            connecting: settings.connects_at_once.get(),
            size: settings.size.get().saturating_add(settings.reserve_size),
        }
    }

    /// More can't be at work.
    fn ceiling(self, pools: usize) -> usize {
        self.size.saturating_mul(pools.max(1)).min(self.open)
    }
}

impl Adaptive {
    fn new(bounds: Bounds) -> Self {
        let limiter = Limiter::new(FLOOR, bounds.ceiling(1));
        Self {
            limit: AtomicUsize::new(limiter.limit()),
            limiter: Mutex::new(limiter),
            at_work: AtomicUsize::new(0),
            turns: AtomicU64::new(0),
            overdue: Mutex::default(),
        }
    }

    fn at_work(&self) -> usize {
        self.at_work.load(Ordering::SeqCst)
    }

    /// How many more may be at work, or how many are too many.
    fn spare(&self) -> isize {
        self.limit
            .load(Ordering::SeqCst)
            .wrapping_sub(self.at_work())
            .cast_signed()
    }

    /// Has the limiter do something. `true`: more may be at work than before.
    fn adapt(&self, change: impl FnOnce(&mut Limiter)) -> bool {
        let mut limiter = lock(&self.limiter);
        change(&mut limiter);
        let limit = limiter.limit() + lock(&self.overdue).extra;
        self.limit.swap(limit, Ordering::SeqCst) < limit
    }
}

impl Budget {
    pub(super) fn new(settings: &config::Pool, adaptive: bool) -> Self {
        Self {
            adaptive: adaptive.then(|| Adaptive::new(Bounds::of(settings))),
            state: Mutex::new(State {
                open: 0,
                connecting: 0,
                bounds: Bounds::of(settings),
                line: Vec::new(),
                pools: Vec::new(),
            }),
            starving: AtomicUsize::new(0),
        }
    }

    /// This pool opens servers here.
    pub(super) fn join(&self, pool: &Arc<Pool>) {
        let mut state = self.lock();
        state.pools.retain(|pool| pool.strong_count() > 0);
        state.pools.push(Arc::downgrade(pool));
        self.resize_limit(&state);
    }

    /// From now on. What is open stays, until it comes back.
    pub(super) fn resize(&self, settings: &config::Pool) {
        {
            let mut state = self.lock();
            state.bounds = Bounds::of(settings);
            self.resize_limit(&state);
        }
        self.serve();
    }

    fn resize_limit(&self, state: &State) {
        if let Some(adaptive) = &self.adaptive {
            let ceiling = state.bounds.ceiling(state.pools.len());
            adaptive.adapt(|limiter| limiter.resize(FLOOR, ceiling));
        }
    }

    // ---- With an adaptive limit. ----

    /// A server goes to work. Looked at before, by `is_full`: two at a time may find the same room, and are one too many for once.
    pub(super) fn turn(self: &Arc<Self>) -> Option<Turn> {
        let adaptive = self.adaptive.as_ref()?;
        adaptive.at_work.fetch_add(1, Ordering::SeqCst);
        adaptive.turns.fetch_add(1, Ordering::Relaxed);
        Some(Turn(Arc::clone(self)))
    }

    /// As many are at work as may be.
    pub(super) fn is_full(&self) -> bool {
        self.adaptive
            .as_ref()
            .is_some_and(|adaptive| adaptive.spare() <= 0)
    }

    /// Who has the turn of a server of `pool`'s that comes back, and still counts. Locks other pools' books.
    pub(super) fn next_turn(&self, pool: &Arc<Pool>) -> Next {
        let Some(adaptive) = &self.adaptive else {
            return Next::Anybody;
        };
        match adaptive.spare() {
            1.. => Next::Anybody,
            0 => self.rival_in_line(pool).map_or(Next::Anybody, Next::Since),
            _ => Next::Nobody,
        }
    }

    /// `pool` has waiters and nobody has a turn left for them. It gets in line. `true`: there is one by now.
    pub(super) fn queue(&self, pool: &Arc<Pool>) -> bool {
        self.get_in_line(&mut self.lock(), pool);
        !self.is_full()
    }

    /// A request has taken so long.
    pub(super) fn note_took(&self, took: Duration, now: Instant) {
        let Some(adaptive) = &self.adaptive else {
            return;
        };
        let at_work = adaptive.at_work();
        if adaptive.adapt(|limiter| limiter.sample(took, at_work, now)) {
            self.serve();
        }
    }

    /// Each second.
    pub(super) fn tick(&self, now: Instant) {
        let Some(adaptive) = &self.adaptive else {
            return;
        };
        {
            let mut overdue = lock(&adaptive.overdue);
            let turns = adaptive.turns.load(Ordering::Relaxed);
            let moved = turns != std::mem::replace(&mut overdue.turns, turns);
            let waited_for = self.starving.load(Ordering::Relaxed) > 0;
            overdue.extra = match (waited_for, moved) {
                (true, false) => overdue.extra + 1,
                // No more than are at work beyond the limit.
                _ => {
                    let limit = adaptive.limit.load(Ordering::SeqCst) - overdue.extra;
                    overdue.extra.min(adaptive.at_work().saturating_sub(limit))
                }
            };
        }
        if adaptive.adapt(|limiter| limiter.tick(now)) {
            self.serve();
        }
    }

    /// `None`: it is not adaptive.
    pub(super) fn adapted(&self) -> Option<Adapted> {
        let adaptive = self.adaptive.as_ref()?;
        Some(Adapted {
            found: lock(&adaptive.limiter).found(),
            at_work: adaptive.at_work(),
        })
    }

    // ---- Who waits. ----

    /// Where it is, and has been, it stays.
    fn get_in_line(&self, state: &mut State, pool: &Arc<Pool>) {
        if !state.line.iter().any(|known| is(known, pool)) {
            state.line.push(Arc::downgrade(pool));
            self.starving.store(state.line.len(), Ordering::SeqCst);
        }
    }

    fn leave_line(&self, state: &mut State, leaves: impl Fn(&Weak<Pool>) -> bool) {
        state.line.retain(|pool| !leaves(pool));
        self.starving.store(state.line.len(), Ordering::SeqCst);
    }

    pub(super) fn load(&self) -> Load {
        let state = self.lock();
        Load {
            open: state.open,
            connecting: state.connecting,
            open_max: (state.bounds.open < usize::MAX).then_some(state.bounds.open),
            connecting_max: state.bounds.connecting,
            starving: state.line.len(),
        }
    }

    /// `pool` has waiters and found no room. It gets in line; if it is servers that are too many, an idle one of another
    /// pool's makes room. `true`: there is room by now.
    pub(super) fn starve(&self, pool: &Arc<Pool>) -> bool {
        let mut state = self.lock();
        self.get_in_line(&mut state, pool);
        if state.has_room() {
            return true;
        }
        if state.open < state.bounds.open {
            return false;
        }
        let others: Vec<_> = state
            .pools
            .iter()
            .filter_map(Weak::upgrade)
            .filter(|other| !Arc::ptr_eq(other, pool))
            .collect();
        drop(state);
        // Its place comes free as it is closed, and is offered along the line.
        let longest = others
            .into_iter()
            .filter_map(|other| Some((other.oldest_idle()?, other)))
            .min_by_key(|(since, _)| *since);
        if let Some((_, other)) = longest {
            other.close_oldest_idle();
        }
        false
    }

    /// Since when somebody waits in another pool than this one for a server to be closed. Locks other pools' books.
    pub(super) fn rival_since(&self, pool: &Arc<Pool>) -> Option<Instant> {
        if self.starving.load(Ordering::Relaxed) == 0 {
            return None;
        }
        if self.lock().open_spare() > 0 {
            return None;
        }
        self.rival_in_line(pool)
    }

    /// Since when somebody waits in another pool that is in line. Locks other pools' books.
    fn rival_in_line(&self, pool: &Arc<Pool>) -> Option<Instant> {
        if self.starving.load(Ordering::Relaxed) == 0 {
            return None;
        }
        let rivals: Vec<_> = {
            let state = self.lock();
            let others = state.line.iter().filter(|other| !is(other, pool));
            others.filter_map(Weak::upgrade).collect()
        };
        rivals
            .iter()
            .filter_map(|rival| rival.waiting_since())
            .min()
    }

    /// Offers what room there is to the pools in line, those first whose clients have waited longest.
    pub(super) fn serve(&self) {
        // Each pool at most once: one that goes on starving is back in line, and not to be asked for ever. The line is never
        // away while they are asked: whoever frees something meanwhile has to find it.
        let mut asked = Vec::new();
        while self.starving.load(Ordering::SeqCst) > 0 && !self.is_full() {
            let line = {
                let mut state = self.lock();
                // A login is enough for a pool that replaces a server, a turn for one whose servers are idle.
                if state.connecting >= state.bounds.connecting && self.adaptive.is_none() {
                    return;
                }
                self.leave_line(&mut state, |pool| pool.strong_count() == 0);
                state.line.clone()
            };
            let next = line
                .iter()
                .filter_map(Weak::upgrade)
                .filter(|pool| !asked.contains(&Arc::as_ptr(pool)))
                .min_by_key(|pool| {
                    let since = pool.waiting_since();
                    (since.is_none(), since)
                });
            let Some(next) = next else { return };
            self.leave_line(&mut self.lock(), |pool| is(pool, &next));
            asked.push(Arc::as_ptr(&next));
            next.offer_room();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

fn is(known: &Weak<Pool>, pool: &Arc<Pool>) -> bool {
    std::ptr::eq(known.as_ptr(), Arc::as_ptr(pool))
}

impl State {
    fn has_room(&self) -> bool {
        self.open_spare() > 0 && self.connecting < self.bounds.connecting
    }

    fn open_spare(&self) -> usize {
        self.bounds.open.saturating_sub(self.open)
    }
}

/// The budget as the books ask it.
pub(super) struct Ask<'a>(pub(super) &'a Arc<Budget>);

impl Rooms for Ask<'_> {
    type Room = Room;

    fn open(&mut self) -> Option<Room> {
        let mut state = self.0.lock();
        if !state.has_room() {
            return None;
        }
        state.open += 1;
        state.connecting += 1;
        Some(Room {
            place: Some(Place(Arc::clone(self.0))),
            connecting: Connecting(Arc::clone(self.0)),
        })
    }

    fn replace(&mut self) -> Option<Room> {
        let mut state = self.0.lock();
        if state.connecting >= state.bounds.connecting {
            return None;
        }
        state.connecting += 1;
        Some(Room {
            place: None,
            connecting: Connecting(Arc::clone(self.0)),
        })
    }

    fn is_full(&self) -> bool {
        self.0.is_full()
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(adaptive) = &self.0.adaptive {
            adaptive.at_work.fetch_sub(1, Ordering::SeqCst);
        }
        self.0.serve();
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.lock().open -= 1;
        self.0.serve();
    }
}

impl Drop for Connecting {
    fn drop(&mut self) {
        self.0.lock().connecting -= 1;
        self.0.serve();
    }
}
