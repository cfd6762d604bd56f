//! What one upstream bears over all its pools: how many servers at once, and how many logging in; with `shed.adaptive` also how many
//! at once seem to do it good (`limiter.rs`), beside those that idle in their clients' transactions. Whoever finds no room
//! waits in its own pool; the pools that starve so stand here in a line, and room that comes free is offered along it.
//! Called by `checkout.rs` and `pools.rs`.
//!
//! Locks: a pool's books first, the budget second, never the other way round. INVARIANT: a `Room` is never dropped under
//! either, since its drop offers the room to the next pool.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::time::Instant;

use super::checkout::Pool;
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
    /// The limiter's limit.
    limit: AtomicUsize,
    /// Servers on loan.
    lent: AtomicUsize,
    /// Those of them that no request keeps busy.
    resting: AtomicUsize,
}

/// How an upstream's adaptive limit stands.
pub(crate) struct Adapted {
    pub(crate) found: Found,
    /// Servers that requests keep busy.
    pub(crate) busy: usize,
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
    /// Of one pool.
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
            size: settings.size.get(),
        }
    }

    /// No limit need be higher.
    fn ceiling(self, pools: usize) -> usize {
        self.size.saturating_mul(pools.max(1)).min(self.open)
    }
}

impl Adaptive {
    fn new(bounds: Bounds) -> Self {
        let limiter = Limiter::new(FLOOR.min(bounds.size), bounds.ceiling(1));
        Self {
            limit: AtomicUsize::new(limiter.limit()),
            limiter: Mutex::new(limiter),
            lent: AtomicUsize::new(0),
            resting: AtomicUsize::new(0),
        }
    }

    fn busy(&self) -> usize {
        let lent = self.lent.load(Ordering::Relaxed);
        lent.saturating_sub(self.resting.load(Ordering::Relaxed))
    }

    /// So many servers may be open.
    fn open_max(&self) -> usize {
        let limit = self.limit.load(Ordering::Relaxed);
        limit.saturating_add(self.resting.load(Ordering::Relaxed))
    }

    fn lock(&self) -> MutexGuard<'_, Limiter> {
        self.limiter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn resize(&self, bounds: Bounds, pools: usize) {
        let mut limiter = self.lock();
        limiter.resize(FLOOR.min(bounds.size), bounds.ceiling(pools));
        self.limit.store(limiter.limit(), Ordering::Relaxed);
    }
}

impl Budget {
    pub(super) fn new(settings: &config::Pool, adaptive: bool) -> Self {
        let adaptive = adaptive.then(|| Adaptive::new(Bounds::of(settings)));
        Self {
            adaptive,
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
        self.adapt(&state);
    }

    fn adapt(&self, state: &State) {
        if let Some(adaptive) = &self.adaptive {
            adaptive.resize(state.bounds, state.pools.len());
        }
    }

    /// From now on. What is open stays, until it comes back.
    pub(super) fn resize(&self, settings: &config::Pool) {
        {
            let mut state = self.lock();
            state.bounds = Bounds::of(settings);
            self.adapt(&state);
        }
        self.serve();
    }

    // ---- With an adaptive limit. ----

    pub(super) fn note_lent(&self) {
        if let Some(adaptive) = &self.adaptive {
            adaptive.lent.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// `rested`: it was between two requests of its client's.
    pub(super) fn note_returned(&self, rested: bool) {
        if let Some(adaptive) = &self.adaptive {
            adaptive.lent.fetch_sub(1, Ordering::Relaxed);
            if rested {
                adaptive.resting.fetch_sub(1, Ordering::Relaxed);
            }
        }
    }

    /// A server on loan is, or is not any more, between two requests of its client's. `false`: it makes no difference.
    pub(super) fn note_rest(&self, rests: bool) -> bool {
        let Some(adaptive) = &self.adaptive else {
            return false;
        };
        if rests {
            adaptive.resting.fetch_add(1, Ordering::Relaxed);
            // What it does not use, others may.
            self.serve();
        } else {
            adaptive.resting.fetch_sub(1, Ordering::Relaxed);
        }
        true
    }

    /// A request has taken so long.
    pub(super) fn note_took(&self, took: Duration, now: Instant) {
        let Some(adaptive) = &self.adaptive else {
            return;
        };
        let mut limiter = adaptive.lock();
        let before = limiter.limit();
        if limiter.sample(took, adaptive.busy(), now) {
            adaptive.limit.store(limiter.limit(), Ordering::Relaxed);
        }
        let more = limiter.limit() > before;
        drop(limiter);
        if more {
            self.serve();
        }
    }

    pub(super) fn adapted(&self) -> Option<Adapted> {
        let adaptive = self.adaptive.as_ref()?;
        let found = adaptive.lock().found();
        Some(Adapted {
            found,
            busy: adaptive.busy(),
        })
    }

    /// More servers are open than may be: one that comes back is one too many.
    pub(super) fn is_exceeded(&self) -> bool {
        self.adaptive
            .as_ref()
            .is_some_and(|adaptive| self.lock().open > adaptive.open_max())
    }

    /// So many servers may be open.
    fn open_max(&self, state: &State) -> usize {
        let adapted = self.adaptive.as_ref().map(Adaptive::open_max);
        state.bounds.open.min(adapted.unwrap_or(usize::MAX))
    }

    fn has_room(&self, state: &State) -> bool {
        state.open < self.open_max(state) && state.connecting < state.bounds.connecting
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
        if !state.line.iter().any(|known| is(known, pool)) {
            state.line.push(Arc::downgrade(pool));
            self.starving.store(state.line.len(), Ordering::Relaxed);
        }
        if self.has_room(&state) {
            return true;
        }
        if state.open < self.open_max(&state) {
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
        let rivals: Vec<_> = {
            let state = self.lock();
            if state.open < self.open_max(&state) {
                return None;
            }
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
        // Each pool at most once: one that goes on starving is back in line, and not to be asked for ever.
        let turns = self.starving.load(Ordering::Relaxed);
        for _ in 0..turns {
            let line = {
                let mut state = self.lock();
                // A login is enough for a pool that replaces a server.
                if state.connecting >= state.bounds.connecting {
                    return;
                }
                self.starving.store(0, Ordering::Relaxed);
                std::mem::take(&mut state.line)
            };
            let line = line.iter().filter_map(Weak::upgrade);
            let mut line: Vec<_> = line
                .filter_map(|pool| Some((pool.waiting_since()?, pool)))
                .collect();
            line.sort_by_key(|(since, _)| *since);
            let mut line = line.into_iter().map(|(_, pool)| pool);
            let Some(first) = line.next() else { return };
            {
                let mut state = self.lock();
                for pool in line {
                    if !state.line.iter().any(|known| is(known, &pool)) {
                        state.line.push(Arc::downgrade(&pool));
                    }
                }
                self.starving.store(state.line.len(), Ordering::Relaxed);
            }
            first.offer_room();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is(known: &Weak<Pool>, pool: &Arc<Pool>) -> bool {
    std::ptr::eq(known.as_ptr(), Arc::as_ptr(pool))
}

/// The budget as the books ask it.
pub(super) struct Ask<'a>(pub(super) &'a Arc<Budget>);

impl Rooms for Ask<'_> {
    type Room = Room;

    fn open(&mut self) -> Option<Room> {
        let mut state = self.0.lock();
        if !self.0.has_room(&state) {
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
