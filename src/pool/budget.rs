//! What one upstream bears over all its pools: how many servers at once, and how many logging in. Whoever finds no room
//! waits in its own pool; the pools that starve so stand here in a line, and room that comes free is offered along it.
//! Called by `checkout.rs` and `pools.rs`.
//!
//! Locks: a pool's books first, the budget second, never the other way round. INVARIANT: a `Room` is never dropped under
//! either, since its drop offers the room to the next pool.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::time::Instant;

use super::checkout::Pool;
use super::shelf::Rooms;
use crate::config;

/// One upstream's.
pub(crate) struct Budget {
    state: Mutex<State>,
    /// Pools in line: a glance without the lock.
    starving: AtomicUsize,
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
        }
    }
}

impl Budget {
    pub(super) fn new(settings: &config::Pool) -> Self {
        Self {
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
    }

    /// From now on. What is open stays, until it comes back.
    pub(super) fn resize(&self, settings: &config::Pool) {
        self.lock().bounds = Bounds::of(settings);
        self.serve();
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
        let rivals: Vec<_> = {
            let state = self.lock();
            if state.open < state.bounds.open {
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

impl State {
    fn has_room(&self) -> bool {
        self.open < self.bounds.open && self.connecting < self.bounds.connecting
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
