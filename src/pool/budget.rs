//! What one upstream bears over all its pools: how many servers at once, how many logging in, and with `shed.adaptive` how
//! many at work. Whoever finds no room, or no turn, waits in its own pool; the pools that lack one stand here in a line for it, and
//! what comes free is offered along it: room to those first whose clients have waited longest, a turn to whose next is worth most,
//! then to who has fewest servers. Called by `checkout.rs` and `pools.rs`.
//!
//! At work is a server from when it is lent until its client has the answer, or gives it back. What a client keeps beyond that
//! (transactions, pins, LISTEN) is at work no more, whatever it asks on: it could neither be refused nor made to wait. Nor is what has
//! been at work for long (`limiter::Ages`).
//!
//! Locks: a pool's books first, the budget second, never the other way round. INVARIANT: a `Room` or `Turn` is never dropped under
//! either, since its drop offers the room to the next pool.

use std::cmp::Reverse;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use tokio::time::Instant;

use super::checkout::{Pool, lock};
use super::limiter::{Ages, Found, Limiter};
use super::shelf::{IN_TURN, Rooms};
use crate::config;

/// An adaptive limit is never lower.
const FLOOR: usize = 4;

/// One upstream's.
pub(crate) struct Budget {
    state: Mutex<State>,
    /// Pools in each line: a glance without the lock. Whoever frees something looks for pools in line, and who gets in line looks for
    /// what was freed: sequentially consistent, or both might miss the other.
    waiting: [AtomicUsize; 2],
    adaptive: Option<Adaptive>,
}

/// What a pool stands in line for.
#[derive(Clone, Copy)]
enum Line {
    Room,
    Turn,
}

/// With `shed.adaptive`.
struct Adaptive {
    limiter: Mutex<Limiter>,
    ages: Mutex<Ages>,
    limit: AtomicUsize,
    /// As `ages` has it.
    at_work: AtomicUsize,
    /// Turns that were offered along the line.
    granted: AtomicUsize,
}

/// How an upstream's adaptive limit stands.
pub(crate) struct Adapted {
    pub(crate) found: Found,
    pub(crate) at_work: usize,
}

/// A server is at work, or being opened for somebody.
pub(super) struct Turn {
    budget: Arc<Budget>,
    began: u64,
}

struct State {
    open: usize,
    connecting: usize,
    bounds: Bounds,
    /// Pools that lack room, and a turn, in no order: who is next is looked up when there is one.
    lines: [Vec<Weak<Pool>>; 2],
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
            ages: Mutex::default(),
            at_work: AtomicUsize::new(0),
            granted: AtomicUsize::new(0),
        }
    }

    fn at_work(&self) -> usize {
        self.at_work.load(Ordering::SeqCst)
    }

    fn is_full(&self) -> bool {
        self.at_work() >= self.limit.load(Ordering::SeqCst)
    }

    /// Has the limiter do something. `true`: more may be at work than before.
    fn adapt(&self, change: impl FnOnce(&mut Limiter)) -> bool {
        let mut limiter = lock(&self.limiter);
        change(&mut limiter);
        let limit = limiter.limit();
        self.limit.swap(limit, Ordering::SeqCst) < limit
    }

    fn age<T>(&self, change: impl FnOnce(&mut Ages) -> T) -> T {
        let mut ages = lock(&self.ages);
        let changed = change(&mut ages);
        self.at_work.store(ages.young(), Ordering::SeqCst);
        changed
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
                lines: Default::default(),
                pools: Vec::new(),
            }),
            waiting: Default::default(),
        }
    }

    /// This pool opens servers here.
    pub(super) fn join(&self, pool: &Arc<Pool>) {
        let raised = {
            let mut state = self.lock();
            state.pools.retain(|pool| pool.strong_count() > 0);
            state.pools.push(Arc::downgrade(pool));
            self.resize_limit(&state)
        };
        if raised {
            self.serve();
        }
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

    /// `true`: more may be at work than before.
    fn resize_limit(&self, state: &State) -> bool {
        self.adaptive.as_ref().is_some_and(|adaptive| {
            let ceiling = state.bounds.ceiling(state.pools.len());
            adaptive.adapt(|limiter| limiter.resize(FLOOR, ceiling))
        })
    }

    // ---- With an adaptive limit. ----

    /// A server goes to work. Looked at before, by `is_full`: as many as look at once may find the same room, and are too many for once.
    pub(super) fn turn(self: &Arc<Self>) -> Option<Turn> {
        let adaptive = self.adaptive.as_ref()?;
        Some(Turn {
            budget: Arc::clone(self),
            began: adaptive.age(Ages::begin),
        })
    }

    /// As many are at work as may be.
    pub(super) fn is_full(&self) -> bool {
        self.adaptive.as_ref().is_some_and(Adaptive::is_full)
    }

    /// Whether a server of `pool`'s that comes back may go to the next there, at once. `turn`: it has one.
    pub(super) fn hands_on(&self, pool: &Arc<Pool>, turn: Option<&Turn>) -> bool {
        let Some(adaptive) = &self.adaptive else {
            return true;
        };
        let own = turn.is_some_and(Turn::counts);
        let limit = adaptive.limit.load(Ordering::SeqCst) + usize::from(own);
        if adaptive.at_work() >= limit {
            return false;
        }
        if self.waiting[Line::Turn as usize].load(Ordering::SeqCst) == 0 {
            return true;
        }
        self.lock().lines[Line::Turn as usize]
            .iter()
            .all(|other| is(other, pool))
    }

    /// `pool` has waiters and nobody has a turn left for them. It gets in line. `true`: there is one by now.
    pub(super) fn queue(&self, pool: &Arc<Pool>) -> bool {
        self.get_in_line(&mut self.lock(), Line::Turn, pool);
        !self.is_full()
    }

    /// A request has taken so long.
    pub(super) fn note_took(&self, took: Duration, now: Instant) {
        let Some(adaptive) = &self.adaptive else {
            return;
        };
        let at_work = adaptive.at_work();
        if adaptive.adapt(|limiter| limiter.sample(took, at_work, now)) {
            self.serve_turns();
        }
    }

    /// Each `limiter::TICK`.
    pub(super) fn tick(&self, now: Instant) {
        let Some(adaptive) = &self.adaptive else {
            return;
        };
        adaptive.age(Ages::tick);
        let waited_for = self.waiting[Line::Turn as usize].load(Ordering::SeqCst) > 0;
        let at_work = adaptive.at_work();
        adaptive.adapt(|limiter| limiter.tick(at_work, waited_for, now));
        self.serve_turns();
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

    /// Where it is, it stays.
    fn get_in_line(&self, state: &mut State, line: Line, pool: &Arc<Pool>) {
        let pools = &mut state.lines[line as usize];
        if !pools.iter().any(|known| is(known, pool)) {
            pools.push(Arc::downgrade(pool));
            self.waiting[line as usize].store(pools.len(), Ordering::SeqCst);
        }
    }

    fn leave_line(&self, state: &mut State, line: Line, leaves: impl Fn(&Weak<Pool>) -> bool) {
        let pools = &mut state.lines[line as usize];
        pools.retain(|pool| !leaves(pool));
        self.waiting[line as usize].store(pools.len(), Ordering::SeqCst);
    }

    pub(super) fn load(&self) -> Load {
        let state = self.lock();
        Load {
            open: state.open,
            connecting: state.connecting,
            open_max: (state.bounds.open < usize::MAX).then_some(state.bounds.open),
            connecting_max: state.bounds.connecting,
            starving: state.lines[Line::Room as usize].len(),
        }
    }

    /// `pool` has waiters and found no room. It gets in line; if it is servers that are too many, an idle one of another
    /// pool's makes room. `true`: there is room by now.
    pub(super) fn starve(&self, pool: &Arc<Pool>) -> bool {
        let mut state = self.lock();
        self.get_in_line(&mut state, Line::Room, pool);
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
        if self.waiting[Line::Room as usize].load(Ordering::Relaxed) == 0 {
            return None;
        }
        let rivals: Vec<_> = {
            let state = self.lock();
            if state.open_spare() > 0 {
                return None;
            }
            let line = &state.lines[Line::Room as usize];
            let others = line.iter().filter(|other| !is(other, pool));
            others.filter_map(Weak::upgrade).collect()
        };
        rivals
            .iter()
            .filter_map(|rival| rival.waiting_since())
            .min()
    }

    /// Offers what there is to the pools in line.
    pub(super) fn serve(&self) {
        self.serve_room();
        self.serve_turns();
    }

    /// Room for more servers, to those first whose clients have waited longest. Where as many are at work as may be they are in line for
    /// a turn from now on.
    fn serve_room(&self) {
        // Each pool at most once: one that goes on starving is back in line, and not to be asked for ever.
        let mut asked = Vec::new();
        // A login is enough for a pool that replaces a server.
        let can_open = |state: &State| state.connecting < state.bounds.connecting;
        let by_age = |pool: &Arc<Pool>| {
            let since = pool.waiting_since();
            (since.is_none(), since)
        };
        while let Some(next) = self.next_in_line(Line::Room, can_open, &asked, by_age) {
            asked.push(Arc::as_ptr(&next));
            next.offer_room();
        }
    }

    /// Turns, one by one: each to whose next is worth most, then to who has fewest servers, then to who has waited longest; one in so
    /// many to whoever has waited longest, that nobody waits for ever.
    fn serve_turns(&self) {
        let Some(adaptive) = &self.adaptive else {
            return;
        };
        let mut asked = Vec::new();
        while !self.is_full() {
            let nth = adaptive.granted.load(Ordering::Relaxed) as u64 + 1;
            let by_age = nth.is_multiple_of(IN_TURN);
            let Some(next) = self.next_in_line(
                Line::Turn,
                |_| true,
                &asked,
                |pool| {
                    let claim = pool.claim();
                    let worth = claim.filter(|_| !by_age).map(|claim| claim.worth());
                    let since = match by_age {
                        true => pool.waiting_since(),
                        false => claim.map(|claim| claim.since),
                    };
                    (since.is_none(), worth.map(Reverse), since)
                },
            ) else {
                return;
            };
            if next.offer_next() {
                adaptive.granted.fetch_add(1, Ordering::Relaxed);
                if next.waiting_since().is_some() {
                    self.get_in_line(&mut self.lock(), Line::Turn, &next);
                }
            } else {
                asked.push(Arc::as_ptr(&next));
            }
        }
    }

    /// Takes the first pool that was not `asked` from its line. The others stay: whoever frees something meanwhile has to find them.
    fn next_in_line<K: Ord>(
        &self,
        line: Line,
        is_any_use: impl Fn(&State) -> bool,
        asked: &[*const Pool],
        key: impl Fn(&Arc<Pool>) -> K,
    ) -> Option<Arc<Pool>> {
        if self.waiting[line as usize].load(Ordering::SeqCst) == 0 {
            return None;
        }
        let pools = {
            let mut state = self.lock();
            if !is_any_use(&state) {
                return None;
            }
            self.leave_line(&mut state, line, |pool| pool.strong_count() == 0);
            state.lines[line as usize].clone()
        };
        let next = pools
            .iter()
            .filter_map(Weak::upgrade)
            .filter(|pool| !asked.contains(&Arc::as_ptr(pool)))
            .min_by_key(key)?;
        self.leave_line(&mut self.lock(), line, |pool| is(pool, &next));
        Some(next)
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

impl Turn {
    /// It is not so old that it counts no more.
    fn counts(&self) -> bool {
        let adaptive = self.budget.adaptive.as_ref();
        adaptive.is_some_and(|adaptive| lock(&adaptive.ages).counts(self.began))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let Some(adaptive) = &self.budget.adaptive {
            adaptive.age(|ages| ages.end(self.began));
        }
        self.budget.serve_turns();
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
