//! The lease: how a client gets a server of one pool and how it comes back. The books are `shelf.rs`'s, the bounds of the
//! upstream `budget.rs`'s. Never looks at SQL. Called by `client/session`, `client/startup.rs` and `pools.rs`.

use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Poll;
use std::time::Duration;

use thiserror::Error;
use tokio::runtime::Handle;
use tokio::sync::{Notify, oneshot};
use tokio::time::{Instant, timeout};
use tracing::{debug, warn};

use super::alarm::Alarm;
use super::budget::{Ask, Budget, Place, Room, Turn};
use super::reset::{self, Clean, ResetError};
pub(crate) use super::shelf::Counts;
pub(crate) use super::shelf::Rank;
use super::shelf::{Asker, Bounds, Claim, ClientId, Lack, Offer, Put, Shelf, Shelved, Take};
use super::stats::DatabaseStats;
use crate::classify::Worth;
use crate::config;
use crate::metrics::Counter;
use crate::server::auth::Credentials;
use crate::server::conn::{ServerConn, ServerKey, ServerRecord};
use crate::server::connect::{ConnectError, Connector, send_cancel};
use crate::server::parameters::{Opening, Reported};
use crate::server::settings::Settings;
use crate::wire::stream::Stream;

/// A server idle for less than this is not asked whether it still lives.
const TRUSTED_IDLE: Duration = Duration::from_millis(1);
/// How long an idle server may take to say that it still lives.
const CHECK_MAX: Duration = Duration::from_secs(2);
/// How long a CancelRequest for an abandoned query may take.
const ABANDON_MAX: Duration = Duration::from_secs(5);
/// Milliseconds after each request to cancel an abandoned query in which it should have ended.
const ABANDON_WAITS: [u64; 10] = [50, 100, 250, 500, 1_000, 2_000, 4_000, 8_000, 8_000, 8_000];
/// A waiter that found the reserve used up asks again.
const RESERVE_RETRY: Duration = Duration::from_millis(500);
/// Who waits looks no more often than that whether there is any prospect.
const LOOK_MIN: Duration = Duration::from_millis(10);
/// A pool whose own clients wait gives a server up to one that has starved for longer than they, and so long at least.
const YIELD_AFTER: Duration = Duration::from_secs(1);
/// Servers opened together are not to be closed together: each lives up to a tenth less than it may.
const JITTER: u32 = 10;

/// An open server and its place at the upstream.
struct Pooled {
    conn: ServerConn,
    place: Place,
}

impl Pooled {
    /// Closes the socket; the place is free for another.
    fn hang_up(self) -> Place {
        self.conn.record.note_closed();
        self.place
    }
}

impl Shelved for Box<Pooled> {
    type Kind = Arc<Opening>;
    fn kind(&self) -> &Arc<Opening> {
        &self.conn.opening
    }
}

type Waker = oneshot::Sender<Grant>;

struct Books {
    shelf: Shelf<Box<Pooled>, Waker>,
    terms: Terms,
}

impl Books {
    /// When a request has waited long enough to be looked at again, whose worth is so little that it may be refused for others'
    /// sake; `None`: never. Where more wait than a burst explains, and have for a while, waiting has no prospect.
    /// (controlled delay: queue.acm.org/detail.cfm?id=2839461)
    fn patience(&self, wish: Wish<'_>, now: Instant, shed: &config::Shed) -> Option<Instant> {
        let early = now + shed.target;
        if self.shelf.is_paused() {
            return None;
        }
        if wish.has_other {
            return Some(early);
        }
        if !wish.rank.gives_way() {
            return None;
        }
        let oldest = self.shelf.waiting_since().unwrap_or(now);
        let stands = now.saturating_duration_since(oldest) > shed.window;
        if stands && self.shelf.is_overloaded() {
            return Some(early);
        }
        // What it has waited elsewhere counts.
        Some(early.max(wish.came + shed.look()))
    }
}

/// What a pool heeds of `[pool]` beside its bounds.
#[derive(Clone, Copy)]
struct Terms {
    checkout_timeout: Duration,
    reserve_timeout: Option<Duration>,
    connect_timeout: Duration,
    server_idle: Duration,
    server_lifetime: Duration,
    /// No server is old before that.
    youth: Duration,
    server_check: Option<Duration>,
    min_size: usize,
}

impl Terms {
    fn of(settings: &config::Pool) -> Self {
        Self {
            checkout_timeout: settings.checkout_timeout,
            reserve_timeout: (settings.reserve_size > 0).then_some(settings.reserve_timeout),
            connect_timeout: settings.connect_timeout,
            server_idle: settings.server_idle,
            server_lifetime: settings.server_lifetime,
            youth: settings.server_lifetime - settings.server_lifetime / JITTER,
            server_check: settings.server_check,
            min_size: settings.min_size,
        }
    }

    /// Whether a server has lived its life: a time of its own, the same at every look.
    fn is_old(&self, server: &ServerConn, now: Instant) -> bool {
        let age = now.saturating_duration_since(server.opened_at);
        if age <= self.youth {
            return false;
        }
        // Numbers in a row spread over 0..1024.
        let share = server.record.id.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 54;
        let late = self.server_lifetime - self.youth;
        age > self.youth + late / 1024 * u32::try_from(share).unwrap_or(0)
    }
}

fn bounds(settings: &config::Pool) -> Bounds {
    Bounds {
        size: settings.size.get(),
        reserve: settings.reserve_size,
    }
}

/// An idle server at a glance.
enum Judged {
    Fit(Checkout),
    /// It is closed.
    Unfit,
    Doubtful(Checkout, Peek),
}

/// What a waiter is handed. Dropped unread, it goes back by itself.
enum Grant {
    Server(Checkout),
    /// The same, but it has been idle.
    Idle(Checkout),
    Slot(Slot),
}

pub(super) struct Counters {
    pub(super) opened: Arc<Counter>,
    pub(super) closed: Arc<Counter>,
    pub(super) failed: Arc<Counter>,
    pub(super) waited: Arc<Counter>,
    pub(super) timed_out: Arc<Counter>,
    /// By worth.
    pub(super) shed: [Arc<Counter>; Worth::ALL.len()],
    pub(super) abandoned: Arc<Counter>,
    pub(super) reserve: Arc<Counter>,
    pub(super) evicted: Arc<Counter>,
}

/// What all pools share.
pub(super) struct Common {
    pub(super) counters: Counters,
    pub(super) shed: config::Shed,
    pub(super) control: Handle,
    /// A server was closed, or a pool stands otherwise than before.
    pub(super) changed: Notify,
}

/// The servers of one database, user and upstream.
pub(crate) struct Pool {
    books: Mutex<Books>,
    connector: Arc<Connector>,
    budget: Arc<Budget>,
    /// What the last client that logged in as this user proved itself with.
    credentials: Mutex<Credentials>,
    seen: Mutex<LastSeen>,
    /// Every open server, on loan or not.
    servers: Mutex<Vec<Weak<ServerRecord>>>,
    /// Rises when every server opened so far is to be closed: also the ones that are just being opened.
    generation: AtomicU64,
    opening: AtomicUsize,
    /// Requests refused under load, by worth.
    shed: [AtomicU64; Worth::ALL.len()],
    /// Clients that belong here, and how one of them opened its session last.
    members: AtomicUsize,
    last_opening: Mutex<Option<Arc<Opening>>>,
    warming: AtomicBool,
    pub(crate) stats: Arc<DatabaseStats>,
    common: Arc<Common>,
}

/// What a client is told at login, and begins with. Clients that begin alike share all of it.
pub(crate) struct Welcome {
    pub(crate) opening: Arc<Opening>,
    pub(crate) reported: Reported,
    pub(crate) settings: Arc<Settings>,
    pub(crate) pid: u32,
}

#[derive(Default)]
struct LastSeen {
    /// What sessions opened alike were last told at login, for clients that log in while every server is busy.
    told: HashMap<Arc<Opening>, (Reported, u32)>,
    /// What clients of a name began with.
    begun: Vec<(String, Reported, Arc<Settings>)>,
}

/// Openings remembered a pool.
const TOLD_MAX: usize = 64;
/// Beginnings remembered a pool.
const BEGUN_MAX: usize = 64;

impl LastSeen {
    fn note(&mut self, opening: &Arc<Opening>, reported: &Reported, pid: u32) {
        if self.told.len() >= TOLD_MAX {
            self.told.clear();
        }
        // The first of equal keys stays.
        self.told
            .insert(Arc::clone(opening), (reported.clone(), pid));
    }

    fn welcome(&mut self, wish: Wish<'_>, mut reported: Reported, pid: u32) -> Welcome {
        let name = wish.application_name;
        if reported.find("application_name").is_some() {
            reported.set("application_name", name);
        }
        let opening = self.told.get_key_value(wish.opening);
        let opening = Arc::clone(opening.map_or(wish.opening, |(opening, _)| opening));
        let known = self
            .begun
            .iter()
            .find(|(known, begun, _)| known == name && *begun == reported);
        let (reported, settings) = match known {
            Some((_, reported, settings)) => (reported.clone(), Arc::clone(settings)),
            None => {
                if self.begun.len() >= BEGUN_MAX {
                    self.begun.clear();
                }
                let settings = Arc::new(Settings::named(name));
                let begun = (name.to_owned(), reported.clone(), Arc::clone(&settings));
                self.begun.push(begun);
                (reported, settings)
            }
        };
        Welcome {
            opening,
            reported,
            settings,
            pid,
        }
    }
}

/// Who asks, and for what.
#[derive(Clone, Copy)]
pub(crate) struct Wish<'a> {
    pub(crate) client: ClientId,
    pub(crate) opening: &'a Arc<Opening>,
    pub(crate) application_name: &'a str,
    pub(crate) rank: Rank,
    /// When what it is for was asked.
    pub(crate) came: Instant,
    /// How many waiters had been served then; `None`: it comes here first.
    pub(crate) granted: Option<u64>,
    /// There is something else for it than to wait.
    pub(crate) has_other: bool,
}

#[derive(Debug, Error)]
pub(crate) enum CheckoutError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("no server came free within {0:?}")]
    TimedOut(Duration),
    /// There is more to do than can be done, and this is worth least.
    #[error("shed after waiting {waited:?}")]
    Shed {
        worth: Worth,
        waited: Duration,
        waiting: usize,
    },
    #[error("cancelled while waiting for a server")]
    Cancelled,
    #[error("the upstream is not there any more")]
    Gone,
    #[error("the session's settings could not be brought to a server: {0}")]
    Settings(#[source] ResetError),
}

/// How a pool stands, for the console.
pub(crate) struct Standing {
    pub(crate) counts: Counts,
    pub(crate) size: usize,
    /// By worth.
    pub(crate) waiting: [usize; Worth::ALL.len()],
    pub(crate) shed: [u64; Worth::ALL.len()],
    pub(crate) opening: usize,
    /// Numbers of the idle servers.
    pub(crate) idle: Vec<u64>,
    pub(crate) servers: Vec<Arc<ServerRecord>>,
}

impl Pool {
    pub(super) fn new(
        connector: Arc<Connector>,
        budget: Arc<Budget>,
        credentials: Credentials,
        settings: &config::Pool,
        paused: bool,
        stats: Arc<DatabaseStats>,
        common: Arc<Common>,
    ) -> Arc<Self> {
        let pool = Arc::new(Self {
            books: Mutex::new(Books {
                shelf: Shelf::new(bounds(settings), paused),
                terms: Terms::of(settings),
            }),
            connector,
            budget,
            credentials: Mutex::new(credentials),
            seen: Mutex::default(),
            servers: Mutex::default(),
            generation: AtomicU64::new(0),
            opening: AtomicUsize::new(0),
            shed: Default::default(),
            members: AtomicUsize::new(0),
            last_opening: Mutex::default(),
            warming: AtomicBool::new(false),
            stats,
            common,
        });
        pool.budget.join(&pool);
        pool
    }

    pub(crate) fn counts(&self) -> Counts {
        lock(&self.books).shelf.counts()
    }

    pub(crate) fn standing(&self) -> Standing {
        let books = lock(&self.books);
        let counts = books.shelf.counts();
        let idle = books.shelf.idle().map(|idle| idle.conn.record.id).collect();
        let size = books.shelf.bounds().size;
        let waiting = books.shelf.waiting_by_worth();
        drop(books);
        Standing {
            counts,
            size,
            waiting,
            shed: self
                .shed
                .each_ref()
                .map(|shed| shed.load(Ordering::Relaxed)),
            idle,
            opening: self.opening.load(Ordering::Relaxed),
            servers: self.servers(),
        }
    }

    /// Whether a checkout would have to wait now.
    pub(crate) fn is_busy(&self) -> bool {
        let books = lock(&self.books);
        let counts = books.shelf.counts();
        counts.idle == 0 && counts.open >= books.shelf.bounds().size || self.budget.is_full()
    }

    pub(crate) fn learn_credentials(&self, credentials: &Credentials) {
        match credentials {
            Credentials::None => {}
            Credentials::Password(_) | Credentials::Keys(_) => {
                *lock(&self.credentials) = credentials.clone()
            }
        }
    }

    /// More wait than a burst or some long transactions would explain.
    pub(crate) fn is_overloaded(&self) -> bool {
        lock(&self.books).shelf.is_overloaded()
    }

    /// Waiters that have been served, ever.
    pub(crate) fn granted(&self) -> u64 {
        lock(&self.books).shelf.granted()
    }

    /// A client belongs to this pool until what this returns is dropped.
    pub(crate) fn join(self: &Arc<Self>, opening: &Arc<Opening>) -> Member {
        *lock(&self.last_opening) = Some(Arc::clone(opening));
        self.members.fetch_add(1, Ordering::Relaxed);
        Member(Arc::clone(self))
    }

    /// A server for this client without any waiting, if one is idle and surely alive.
    pub(crate) fn take_now(self: &Arc<Self>, wish: Wish<'_>, now: Instant) -> Option<Checkout> {
        if self.budget.is_full() {
            return None;
        }
        let (server, terms) = {
            let mut books = lock(&self.books);
            let server = books.shelf.take_ready(wish.client, wish.opening)?;
            (server, books.terms)
        };
        let checkout = Checkout::new(server, self, self.budget.turn());
        let idle = now.saturating_duration_since(checkout.idle_since);
        let trusted = idle < TRUSTED_IDLE;
        let checked = terms.server_check.is_none_or(|longest| idle <= longest);
        if !terms.is_old(&checkout, now)
            && (trusted || checked && matches!(peek(&checkout), Peek::Silent))
        {
            return Some(checkout);
        }
        checkout.put_back();
        None
    }

    /// A server for this client. Waits its turn, `within` at most (and never longer than `checkout_timeout`): what is bounded
    /// like that has somewhere else to go, and is not refused but late.
    pub(crate) async fn checkout(
        self: &Arc<Self>,
        wish: Wish<'_>,
        within: Option<Duration>,
        now: Instant,
        alarm: &mut Alarm,
    ) -> Result<Checkout, CheckoutError> {
        let asked = now;
        let mut now = now;
        // What it waited with, where what it got was no good.
        let mut ticket = None;
        loop {
            let mut receiver = None;
            let (taken, terms, patience, granted) = {
                let mut ask = Ask(&self.budget);
                let wake = || {
                    let (sender, awaited) = oneshot::channel();
                    receiver = Some(awaited);
                    sender
                };
                let mut books = lock(&self.books);
                let asker = Asker {
                    client: wish.client,
                    kind: wish.opening,
                    rank: wish.rank,
                    since: asked,
                    ticket,
                };
                let taken = books.shelf.take(&asker, &mut ask, wake);
                let patience = books.patience(wish, asked, &self.common.shed);
                (taken, books.terms, patience, books.shelf.granted())
            };
            match taken {
                Take::Ready(server) => {
                    let checkout = Checkout::new(server, self, self.budget.turn());
                    if let Some(checkout) = self.check(checkout, terms, now).await {
                        return Ok(checkout);
                    }
                    now = Instant::now();
                }
                Take::Open(room) => {
                    let slot = Slot::new(self, room, None, self.budget.turn());
                    return Box::pin(self.open(slot, wish)).await;
                }
                Take::Replace(old, room) => {
                    let slot = Slot::new(self, room, Some(old), self.budget.turn());
                    return Box::pin(self.open(slot, wish)).await;
                }
                Take::Wait {
                    ticket: given,
                    lack,
                } => {
                    let receiver = receiver.expect("a wait comes with its receiver");
                    // However the wait ends, also by this future being dropped, the wish is taken back.
                    let wished = Wished {
                        pool: self,
                        ticket: Some(given),
                    };
                    self.stand_in_line(lack);
                    let elsewhere = wish.has_other || within.is_some();
                    let longest = within.unwrap_or(terms.checkout_timeout);
                    let mut deadline = asked + longest.min(terms.checkout_timeout);
                    if elsewhere {
                        deadline = deadline.min(patience.unwrap_or(deadline));
                    }
                    let until = Until {
                        deadline,
                        reserve: terms.reserve_timeout.map(|patience| asked + patience),
                        look: patience.filter(|_| !elsewhere),
                        window: self.common.shed.window,
                        granted: Some(wish.granted.unwrap_or(granted)),
                    };
                    if ticket.is_none() {
                        self.common.counters.waited.inc();
                    }
                    return match wait(wished, receiver, until, alarm).await {
                        Ended::Granted(Grant::Server(checkout)) => Ok(checkout),
                        Ended::Granted(Grant::Idle(checkout)) => {
                            match self.check(checkout, terms, Instant::now()).await {
                                Some(checkout) => Ok(checkout),
                                None => {
                                    ticket = Some(given);
                                    now = Instant::now();
                                    continue;
                                }
                            }
                        }
                        Ended::Granted(Grant::Slot(slot)) => Box::pin(self.open(slot, wish)).await,
                        Ended::Refused => Err(self.refuse(wish.rank.worth, wish.came.elapsed())),
                        Ended::Late => {
                            if !elsewhere {
                                self.common.counters.timed_out.inc();
                            }
                            Err(CheckoutError::TimedOut(deadline - asked))
                        }
                    };
                }
            }
        }
    }

    /// What a client that logs in is told: from a server of its own if one is to be had at once, else from what an equal
    /// session was told, else after waiting its turn like any request.
    pub(crate) async fn log_in(self: &Arc<Self>, wish: Wish<'_>) -> Result<Welcome, CheckoutError> {
        if self.is_busy() {
            let mut seen = lock(&self.seen);
            if let Some((reported, pid)) = seen.told.get(wish.opening).cloned() {
                return Ok(seen.welcome(wish, reported, pid));
            }
        }
        let now = Instant::now();
        let mut server = self
            .checkout(wish, None, now, &mut Alarm::default())
            .await?;
        // It may be as another client's session has made it.
        Box::pin(reset::unset_all(&mut server))
            .await
            .map_err(CheckoutError::Settings)?;
        let (reported, pid) = (server.reported.clone(), server.key.pid);
        if let Some(clean) = reset::prove(&server) {
            server.check_in(clean, Some(wish.client), Instant::now());
        }
        let mut seen = lock(&self.seen);
        seen.note(wish.opening, &reported, pid);
        Ok(seen.welcome(wish, reported, pid))
    }

    /// This client is gone.
    pub(crate) fn disown(&self, client: ClientId) {
        lock(&self.books).shelf.disown(client);
    }

    /// A request that is worth too little to wait any longer.
    pub(crate) fn refuse(&self, worth: Worth, waited: Duration) -> CheckoutError {
        self.common.counters.shed[worth as usize].inc();
        self.shed[worth as usize].fetch_add(1, Ordering::Relaxed);
        CheckoutError::Shed {
            worth,
            waited,
            waiting: self.counts().waiting,
        }
    }

    fn claim_reserve(self: &Arc<Self>, wished: &Wished<'_>) {
        let Some(ticket) = wished.ticket else {
            return;
        };
        let offer = {
            let mut ask = Ask(&self.budget);
            lock(&self.books).shelf.claim_reserve(ticket, &mut ask)
        };
        match offer {
            Offer::Slot(waiter, room, _) => {
                self.common.counters.reserve.inc();
                let slot = Slot::new(self, room, None, self.budget.turn());
                drop(waiter.send(Grant::Slot(slot)));
            }
            Offer::Nothing | Offer::Starved | Offer::Full | Offer::Idle(..) => {}
        }
    }

    async fn open(self: &Arc<Self>, slot: Slot, wish: Wish<'_>) -> Result<Checkout, CheckoutError> {
        let counters = &self.common.counters;
        let credentials = lock(&self.credentials).clone();
        let within = lock(&self.books).terms.connect_timeout;
        let generation = self.generation.load(Ordering::Acquire);
        let _opening = Opens::count(&self.opening);
        match self
            .connector
            .connect(wish.opening, wish.application_name, &credentials, within)
            .await
        {
            Ok(server) => {
                counters.opened.inc();
                let mut servers = lock(&self.servers);
                servers.retain(|server| server.strong_count() > 0);
                servers.push(Arc::downgrade(&server.record));
                if self.generation.load(Ordering::Acquire) != generation {
                    server.record.ask_to_close();
                }
                drop(servers);
                Ok(slot.fill(server))
            }
            Err(error) => {
                counters.failed.inc();
                Err(error.into())
            }
        }
    }

    /// A server that was idle is lent only if it still lives.
    async fn check(
        self: &Arc<Self>,
        checkout: Checkout,
        terms: Terms,
        now: Instant,
    ) -> Option<Checkout> {
        match Self::judge(checkout, terms, now) {
            Judged::Fit(checkout) => Some(checkout),
            Judged::Unfit => None,
            Judged::Doubtful(checkout, peek) => Box::pin(self.ask(checkout, peek)).await,
        }
    }

    fn judge(checkout: Checkout, terms: Terms, now: Instant) -> Judged {
        if terms.is_old(&checkout, now) {
            return Judged::Unfit;
        }
        let idle = now.saturating_duration_since(checkout.idle_since);
        if idle < TRUSTED_IDLE {
            return Judged::Fit(checkout);
        }
        match peek(&checkout) {
            Peek::Closed => Judged::Unfit,
            Peek::Silent if terms.server_check.is_none_or(|longest| idle <= longest) => {
                Judged::Fit(checkout)
            }
            peek @ (Peek::Silent | Peek::Speaks) => Judged::Doubtful(checkout, peek),
        }
    }

    /// Whether a server still lives is for itself to say; otherwise it is closed and its slot is free again.
    async fn ask(self: &Arc<Self>, mut checkout: Checkout, peek: Peek) -> Option<Checkout> {
        let lives = match peek {
            Peek::Closed => return None,
            Peek::Silent => timeout(CHECK_MAX, reset::sync(&mut checkout)).await,
            // Something arrived while nobody listened: a changed parameter, a notice, or a farewell.
            Peek::Speaks => timeout(CHECK_MAX, reset::absorb(&mut checkout)).await,
        };
        match lives {
            Ok(Ok(())) => Some(checkout),
            Ok(Err(error)) => {
                debug!(pid = checkout.key.pid, %error, "idle server is gone");
                None
            }
            Err(_late) => {
                warn!(
                    pid = checkout.key.pid,
                    "an idle server no longer answers: closed, with all idle as long"
                );
                let since = checkout.idle_since;
                self.close_idle_where(|server| server.idle_since <= since);
                None
            }
        }
    }

    /// The pool's clients wait; it may be for what its upstream has no room for.
    fn stand_in_line(self: &Arc<Self>, lack: Lack) {
        let found = match lack {
            Lack::Server => false,
            Lack::Room => self.budget.starve(self),
            Lack::Turn => self.budget.queue(self),
        };
        if found {
            self.offer_room();
        }
    }

    /// Since when its first waiter waits.
    pub(super) fn waiting_since(&self) -> Option<Instant> {
        lock(&self.books).shelf.waiting_since()
    }

    /// What it has to say for itself where turns are given out.
    pub(super) fn claim(&self) -> Option<Claim> {
        lock(&self.books).shelf.claim()
    }

    /// Whoever waits gets what there is now.
    pub(super) fn offer_room(self: &Arc<Self>) {
        while self.offer_next() {}
    }

    /// The next of those who wait gets what there is now. `false`: nobody got anything.
    pub(super) fn offer_next(self: &Arc<Self>) -> bool {
        loop {
            let offer = {
                let mut ask = Ask(&self.budget);
                lock(&self.books).shelf.offer(&mut ask)
            };
            let again = match offer {
                Offer::Nothing => false,
                Offer::Starved => self.budget.starve(self),
                Offer::Full => self.budget.queue(self),
                Offer::Idle(server, waiter) => {
                    let grant = Grant::Idle(Checkout::new(server, self, self.budget.turn()));
                    if let Err(Grant::Idle(unwanted)) = waiter.send(grant) {
                        unwanted.put_back();
                    }
                    return true;
                }
                // A grant that nobody takes is dropped here, and its drop gives the slot back.
                Offer::Slot(waiter, room, old) => {
                    let slot = Slot::new(self, room, old, self.budget.turn());
                    drop(waiter.send(Grant::Slot(slot)));
                    return true;
                }
            };
            if !again {
                return false;
            }
        }
    }

    /// Puts a server that is fit for anybody where it belongs.
    fn put(self: &Arc<Self>, server: Box<Pooled>, owner: Option<ClientId>, turn: Option<&Turn>) {
        let now = server.conn.idle_since;
        let rival = self.budget.rival_since(self);
        let hands_on = self.budget.hands_on(self, turn);
        let mut waits = false;
        let put = {
            let mut books = lock(&self.books);
            // To nobody here, or to somebody who has come much later.
            let yields = |since: Instant| match books.shelf.waiting_since() {
                None => true,
                Some(own) => since < own && now.saturating_duration_since(since) > YIELD_AFTER,
            };
            let unwanted = server.conn.record.close_needed()
                || books.terms.is_old(&server.conn, now)
                || rival.is_some_and(yields);
            if unwanted {
                Put::Close(server)
            } else {
                waits = !hands_on && books.shelf.counts().waiting > 0;
                books.shelf.put(server, owner, hands_on)
            }
        };
        match put {
            // Its turn, if it has one, ends after this, and is offered along the line.
            Put::Kept if waits => self.stand_in_line(Lack::Turn),
            Put::Kept => {}
            Put::Hand(server, waiter) => {
                let grant = Grant::Server(Checkout::new(server, self, self.budget.turn()));
                if let Err(Grant::Server(unwanted)) = waiter.send(grant) {
                    unwanted.put_back();
                }
            }
            Put::Close(server) => self.close(server),
        }
    }

    /// Closes a server that the books have let go, and tells whoever waits for that.
    fn close(self: &Arc<Self>, server: Box<Pooled>) {
        self.common.counters.closed.inc();
        let place = server.hang_up();
        self.closed(place);
    }

    fn closed(self: &Arc<Self>, place: Place) {
        lock(&self.books).shelf.closed();
        self.common.changed.notify_waiters();
        // Others who starve come first, then who waits here.
        drop(place);
        self.offer_room();
    }

    pub(super) fn close_idle_where(self: &Arc<Self>, mut wanted: impl FnMut(&ServerConn) -> bool) {
        let removed = lock(&self.books)
            .shelf
            .remove_idle(|server| wanted(&server.conn));
        for server in removed {
            self.close(server);
        }
    }

    /// Closes idle servers that have died, grown old, been idle too long, or were asked to close.
    pub(super) fn reap(self: &Arc<Self>, now: Instant) {
        let (terms, counts) = {
            let books = lock(&self.books);
            (books.terms, books.shelf.counts())
        };
        let mut spare = counts.open.saturating_sub(self.kept(terms.min_size));
        self.close_idle_where(|server| {
            let dead = server.record.close_needed()
                || terms.is_old(server, now)
                || matches!(peek(server), Peek::Closed);
            let idle = now.duration_since(server.idle_since) > terms.server_idle && spare > 0;
            if dead || idle {
                spare = spare.saturating_sub(1);
            }
            dead || idle
        });
        // A farewell, most likely: who has been terminated says so before the socket closes.
        let speaking = lock(&self.books)
            .shelf
            .remove_idle(|server| matches!(peek(&server.conn), Peek::Speaks));
        for server in speaking {
            let mut checkout = Checkout::new(server, self, None);
            self.common.control.spawn(async move {
                if let Ok(Ok(())) = timeout(CHECK_MAX, reset::absorb(&mut checkout)).await {
                    checkout.put_back();
                }
            });
        }
    }

    /// So many servers are kept open while the pool has clients.
    fn kept(&self, min_size: usize) -> usize {
        match self.members.load(Ordering::Relaxed) {
            0 => 0,
            _ => min_size,
        }
    }

    /// Opens what is missing to `min_size`, one after another, on the control plane.
    pub(super) fn warm_up(self: &Arc<Self>) {
        let keep = self.kept(lock(&self.books).terms.min_size);
        if keep == 0 || self.counts().open >= keep || self.warming.swap(true, Ordering::AcqRel) {
            return;
        }
        let Some(opening) = lock(&self.last_opening).clone() else {
            self.warming.store(false, Ordering::Release);
            return;
        };
        let pool = Arc::clone(self);
        self.common.control.spawn(async move {
            while let Some(room) = {
                let mut ask = Ask(&pool.budget);
                lock(&pool.books).shelf.reserve_slot(keep, &mut ask)
            } {
                let slot = Slot::new(&pool, room, None, None);
                let wish = Wish {
                    client: 0,
                    opening: &opening,
                    application_name: "",
                    rank: Rank::default(),
                    came: Instant::now(),
                    granted: None,
                    has_other: false,
                };
                match pool.open(slot, wish).await {
                    Ok(server) => match reset::prove(&server) {
                        Some(clean) => server.check_in(clean, None, Instant::now()),
                        None => break,
                    },
                    Err(error) => {
                        debug!(database = opening.database, user = opening.user, %error, "could not warm a pool up");
                        break;
                    }
                }
            }
            pool.warming.store(false, Ordering::Release);
        });
    }

    /// Every server opened so far is closed: the idle ones now, the others when they come back.
    pub(super) fn reconnect(self: &Arc<Self>) {
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.ask_to_close(|_| true);
    }

    /// Asks for the closing of some servers.
    pub(super) fn ask_to_close(self: &Arc<Self>, wanted: impl Fn(&ServerRecord) -> bool) {
        for server in self.servers() {
            if wanted(&server) {
                server.ask_to_close();
            }
        }
        self.close_idle_where(|server| server.record.close_needed());
    }

    pub(super) fn servers(&self) -> Vec<Arc<ServerRecord>> {
        lock(&self.servers)
            .iter()
            .filter_map(Weak::upgrade)
            .filter(|server| server.is_open())
            .collect()
    }

    /// Nothing is lent until `resume`; servers are closed as they come back.
    pub(super) fn pause(self: &Arc<Self>) {
        lock(&self.books).shelf.pause(true);
        self.close_idle_where(|_| true);
    }

    pub(super) fn resume(self: &Arc<Self>) {
        lock(&self.books).shelf.pause(false);
        self.offer_room();
    }

    /// From now on.
    pub(super) fn adopt(self: &Arc<Self>, settings: &config::Pool) {
        let surplus = {
            let mut books = lock(&self.books);
            books.terms = Terms::of(settings);
            books.shelf.resize(bounds(settings))
        };
        for server in surplus {
            self.close(server);
        }
        self.offer_room();
    }

    /// Since when its oldest idle server has been idle.
    pub(super) fn oldest_idle(&self) -> Option<Instant> {
        let books = lock(&self.books);
        books.shelf.oldest().map(|oldest| oldest.conn.idle_since)
    }

    /// Makes room for another pool's server.
    pub(super) fn close_oldest_idle(self: &Arc<Self>) {
        let removed = lock(&self.books).shelf.remove_oldest();
        if let Some(server) = removed {
            self.common.counters.evicted.inc();
            self.close(server);
        }
    }
}

/// A client's belonging to a pool.
pub(crate) struct Member(Arc<Pool>);

impl Member {
    pub(crate) fn pool(&self) -> &Arc<Pool> {
        &self.0
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.0.members.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Counts while it lives.
struct Opens<'a>(&'a AtomicUsize);

impl<'a> Opens<'a> {
    fn count(counter: &'a AtomicUsize) -> Self {
        counter.fetch_add(1, Ordering::Relaxed);
        Self(counter)
    }
}

impl Drop for Opens<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A wish for a server, taken back when dropped unfulfilled.
struct Wished<'a> {
    pool: &'a Arc<Pool>,
    ticket: Option<u64>,
}

impl Drop for Wished<'_> {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket {
            lock(&self.pool.books).shelf.forget(ticket);
        }
    }
}

/// How long a wish waits, when it asks for one of the reserve, and when it asks whether there is any prospect.
struct Until {
    deadline: Instant,
    reserve: Option<Instant>,
    look: Option<Instant>,
    /// How long until it looks again.
    window: Duration,
    /// How many had been served when it came; only who has just come is refused for what has passed by: whoever stayed then is
    /// an old one now, and soon has its turn.
    granted: Option<u64>,
}

/// How a wait came to its end.
enum Ended {
    Granted(Grant),
    /// Nothing came in time.
    Late,
    /// There is too much to do.
    Refused,
}

async fn wait(
    mut wished: Wished<'_>,
    mut receiver: oneshot::Receiver<Grant>,
    mut until: Until,
    alarm: &mut Alarm,
) -> Ended {
    loop {
        let sooner = until.reserve.into_iter().chain(until.look);
        let next = sooner.fold(until.deadline, Instant::min);
        tokio::select! {
            biased;
            granted = &mut receiver => {
                return match granted {
                    Ok(grant) => {
                        wished.ticket = None;
                        Ended::Granted(grant)
                    }
                    Err(_gone) => Ended::Late,
                };
            }
            () = poll_fn(|cx| alarm.poll_until(cx, next)) => {
                if next == until.deadline {
                    return Ended::Late;
                }
                if until.look == Some(next) {
                    if wished.is_hopeless(until.granted.take()) {
                        return Ended::Refused;
                    }
                    until.look = Some(Instant::now() + until.window.max(LOOK_MIN));
                } else {
                    wished.pool.claim_reserve(&wished);
                    until.reserve = Some(Instant::now() + RESERVE_RETRY);
                }
            }
        }
    }
}

impl Wished<'_> {
    /// `granted`: how many had been served when it came, if that counts.
    fn is_hopeless(&self, granted: Option<u64>) -> bool {
        let books = lock(&self.pool.books);
        let passed = granted.is_some_and(|granted| books.shelf.is_passing_by(granted));
        passed || books.shelf.is_overloaded()
    }
}

/// The right to open one server. Dropping it gives the right back.
struct Slot {
    pool: Arc<Pool>,
    /// `None` once filled.
    place: Option<Place>,
    _connecting: super::budget::Connecting,
    turn: Option<Turn>,
}

impl Slot {
    /// `old`: the server to be closed for it, whose place it takes.
    fn new(pool: &Arc<Pool>, room: Room, old: Option<Box<Pooled>>, turn: Option<Turn>) -> Self {
        let replaced = old.map(|server| {
            pool.common.counters.closed.inc();
            server.hang_up()
        });
        let place = room.place.or(replaced);
        Self {
            pool: Arc::clone(pool),
            place: Some(place.expect("room for a server, or the place of one")),
            _connecting: room.connecting,
            turn,
        }
    }

    fn fill(mut self, conn: ServerConn) -> Checkout {
        let place = self.place.take().expect("a slot is filled once");
        Checkout {
            server: Some(Box::new(Pooled { conn, place })),
            pool: Arc::clone(&self.pool),
            turn: self.turn.take(),
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(place) = self.place.take() {
            self.pool.closed(place);
        }
    }
}

/// A server connection on loan. INVARIANT: only `check_in` shares it again; dropping the lease closes the socket, so a
/// request that was given up can never hand its half-read response to the next client.
pub(crate) struct Checkout {
    server: Option<Box<Pooled>>,
    pool: Arc<Pool>,
    /// While it is at work, where that is bounded.
    turn: Option<Turn>,
}

impl Checkout {
    fn new(server: Box<Pooled>, pool: &Arc<Pool>, turn: Option<Turn>) -> Self {
        Self {
            server: Some(server),
            pool: Arc::clone(pool),
            turn,
        }
    }

    /// Its client keeps it, and has its answer: its turn is over. What it asks from now on takes none, and waits for none.
    pub(crate) fn rest(&mut self) {
        self.turn = None;
    }

    /// A request, which was all its transaction, has taken so long.
    pub(crate) fn note_took(&self, took: Duration, now: Instant) {
        if self.turn.is_some() {
            self.pool.budget.note_took(took, now);
        }
    }

    /// The server is fit for anybody; it stays warm for `owner`.
    pub(crate) fn check_in(mut self, _clean: Clean, owner: Option<ClientId>, now: Instant) {
        let Some(mut server) = self.server.take() else {
            return;
        };
        server.conn.idle_since = now;
        server.conn.stream.input.rest();
        server
            .conn
            .record
            .note_statements(server.conn.statements.len());
        self.pool.put(server, owner, self.turn.as_ref());
    }

    /// A server nobody has touched since it was last proven clean goes back as it came.
    fn put_back(mut self) {
        if let Some(server) = self.server.take() {
            self.pool.put(server, None, self.turn.as_ref());
        }
    }
}

impl Deref for Checkout {
    type Target = ServerConn;
    fn deref(&self) -> &ServerConn {
        let server = self.server.as_ref();
        &server
            .expect("a lease holds its server until it is consumed")
            .conn
    }
}

impl DerefMut for Checkout {
    fn deref_mut(&mut self) -> &mut ServerConn {
        let server = self.server.as_mut();
        &mut server
            .expect("a lease holds its server until it is consumed")
            .conn
    }
}

impl Drop for Checkout {
    fn drop(&mut self) {
        let Some(server) = self.server.take() else {
            return;
        };
        if !server.conn.in_flight {
            return self.pool.close(server);
        }
        let common = &self.pool.common;
        common.counters.abandoned.inc();
        common.counters.closed.inc();
        let Pooled { conn, place } = *server;
        conn.record.note_closed();
        common.control.spawn(abandon(conn.key, conn.stream));
        self.pool.closed(place);
    }
}

/// Ends what a server does for a client that is gone. Closing the socket alone would leave the query running until it
/// tries to write. Postgres ignores a request to cancel that comes before it has read the query, and says nothing either way;
/// so it is asked again until it has closed its end.
async fn abandon(key: Arc<ServerKey>, mut stream: Stream) {
    let mut failed = None;
    for wait in ABANDON_WAITS {
        match send_cancel(&key, ABANDON_MAX).await {
            Ok(()) => {}
            // The server is going or gone, and the query with it.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset
                ) =>
            {
                return debug!(host = %key.host, port = key.port, %error, "nobody left to cancel at");
            }
            Err(error) => failed = Some(error),
        }
        if timeout(Duration::from_millis(wait), end_of(&mut stream))
            .await
            .is_ok()
        {
            return;
        }
    }
    warn!(host = %key.host, port = key.port, pid = key.pid, error = ?failed, "an abandoned query does not end");
}

/// Says that no more will come and reads past whatever does, until the other side has closed. A server that waits for
/// its words to be read can't be cancelled.
async fn end_of(stream: &mut Stream) {
    poll_fn(|cx| {
        // A server that is gone needs no goodbye.
        drop(stream.poll_close(cx));
        while let Poll::Ready(read) = stream.poll_fill(cx, 1) {
            match read {
                Ok(0) | Err(_) => return Poll::Ready(()),
                Ok(count) => stream.input.consume(count),
            }
        }
        Poll::Pending
    })
    .await;
}

enum Peek {
    Silent,
    Speaks,
    Closed,
}

fn peek(server: &ServerConn) -> Peek {
    let mut byte = [MaybeUninit::<u8>::uninit(); 1];
    let Some(tcp) = server.stream.transport().tcp() else {
        return Peek::Closed;
    };
    match socket2::SockRef::from(tcp).peek(&mut byte) {
        Ok(0) => Peek::Closed,
        Ok(_) => Peek::Speaks,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Peek::Silent,
        Err(_) => Peek::Closed,
    }
}

/// Numbers clients.
#[derive(Default)]
pub(crate) struct ClientIds(AtomicU64);

impl ClientIds {
    pub(crate) fn next(&self) -> ClientId {
        self.0.fetch_add(1, Ordering::Relaxed) + 1
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
