//! The lease: how a client gets a server and how it comes back. Owns the pools; the books are `shelf.rs`'s.
//! Never looks at SQL. Called by `client/session` and `client/startup.rs`.

use std::collections::HashMap;
use std::io;
use std::mem::MaybeUninit;
use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use thiserror::Error;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout};
use tracing::{debug, warn};

use super::reset::{self, Clean, ResetError};
use super::shelf::{ClientId, Counts, Give, Shelf, Shelved, Take};
use crate::config;
use crate::metrics::{Counter, Registry};
use crate::server::auth::Credentials;
use crate::server::conn::{ServerConn, ServerKey};
use crate::server::connect::{ConnectError, Connector, send_cancel};
use crate::server::parameters::{Opening, Reported};

/// A server idle for less than this is not asked whether it still lives.
const TRUSTED_IDLE: Duration = Duration::from_millis(1);
/// How long a CancelRequest for an abandoned query may take.
const ABANDON_MAX: Duration = Duration::from_secs(5);
/// How often idle servers are looked at.
const SWEEP_EVERY: Duration = Duration::from_secs(1);

impl Shelved for Box<ServerConn> {
    type Kind = Arc<Opening>;
    fn kind(&self) -> &Arc<Opening> {
        &self.opening
    }
}

type Books = Shelf<Box<ServerConn>, oneshot::Sender<Grant>>;

/// What a waiter is handed. Dropped unread, it goes back by itself.
enum Grant {
    Server(Checkout),
    Slot(Slot),
}

/// Every pool, by (database, user, upstream).
pub(crate) struct Pools {
    pools: Mutex<HashMap<(String, String, usize), Arc<Pool>>>,
    /// The primary first, then the replicas in the order of the configuration.
    connectors: Vec<Arc<Connector>>,
    names: Vec<Arc<str>>,
    /// The control roles and their passwords, by upstream: who is trusted here as such a role logs in as it there.
    control_roles: Vec<(String, Credentials)>,
    settings: config::Pool,
    counters: Arc<Counters>,
    control: Handle,
}

struct Counters {
    opened: Arc<Counter>,
    closed: Arc<Counter>,
    failed: Arc<Counter>,
    waited: Arc<Counter>,
    timed_out: Arc<Counter>,
    abandoned: Arc<Counter>,
}

/// The servers of one database, user and upstream.
pub(crate) struct Pool {
    books: Mutex<Books>,
    connector: Arc<Connector>,
    /// What the last client that logged in as this user proved itself with.
    credentials: Mutex<Credentials>,
    /// What sessions opened alike were last told at login, for clients that log in while every server is busy.
    seen: Mutex<HashMap<Arc<Opening>, Seen>>,
    settings: config::Pool,
    counters: Arc<Counters>,
    control: Handle,
}

/// What a login needs to answer without a server in hand.
#[derive(Clone)]
pub(crate) struct Seen {
    pub(crate) reported: Reported,
    pub(crate) pid: u32,
}

/// Openings remembered a pool.
const SEEN_MAX: usize = 64;

/// Who asks, and for what.
#[derive(Clone, Copy)]
pub(crate) struct Wish<'a> {
    pub(crate) client: ClientId,
    pub(crate) opening: &'a Arc<Opening>,
    pub(crate) application_name: &'a str,
}

#[derive(Debug, Error)]
pub(crate) enum CheckoutError {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("no server came free within {0:?}")]
    TimedOut(Duration),
    #[error("cancelled while waiting for a server")]
    Cancelled,
    #[error("the session's settings could not be brought to a server: {0}")]
    Settings(#[source] ResetError),
}

impl Pools {
    pub(crate) fn new(
        upstreams: &[&config::ConnectUrl],
        settings: &config::Pool,
        registry: &Registry,
        control: Handle,
    ) -> io::Result<Arc<Self>> {
        let connect =
            |url: &&config::ConnectUrl| Connector::new(url, settings.connect_timeout).map(Arc::new);
        let counter = |name, help| registry.counter(name, help, &[]);
        let counters = Arc::new(Counters {
            opened: counter("flowgate_servers_opened_total", "server connections opened"),
            closed: counter("flowgate_servers_closed_total", "server connections closed"),
            failed: counter(
                "flowgate_servers_failed_total",
                "server connections that could not be opened",
            ),
            waited: counter(
                "flowgate_checkout_waits_total",
                "requests that had to wait for a server",
            ),
            timed_out: counter(
                "flowgate_checkout_timeouts_total",
                "requests that got no server in time",
            ),
            abandoned: counter(
                "flowgate_servers_abandoned_total",
                "servers closed in the middle of a request",
            ),
        });
        let pools = Arc::new(Self {
            pools: Mutex::default(),
            connectors: upstreams.iter().map(connect).collect::<io::Result<_>>()?,
            control_roles: upstreams
                .iter()
                .map(|url| (url.user.clone(), Credentials::of_control_role(url)))
                .collect(),
            names: upstreams
                .iter()
                .map(|url| Arc::from(format!("{}:{}", url.host, url.port)))
                .collect(),
            settings: settings.clone(),
            counters,
            control,
        });
        pools.control.spawn(sweep(Arc::downgrade(&pools)));
        Ok(pools)
    }

    /// The pool for this opening on upstream `upstream` (0 is the primary).
    pub(crate) fn pool(&self, opening: &Opening, upstream: usize) -> Arc<Pool> {
        let connector = &self.connectors[upstream];
        let (control_role, credentials) = &self.control_roles[upstream];
        let credentials = if *control_role == opening.user {
            credentials.clone()
        } else {
            Credentials::None
        };
        let key = (opening.database.clone(), opening.user.clone(), upstream);
        let mut pools = lock(&self.pools);
        let pool = pools.entry(key).or_insert_with(|| {
            Arc::new(Pool {
                books: Mutex::new(Shelf::new(self.settings.size.get())),
                connector: Arc::clone(connector),
                credentials: Mutex::new(credentials),
                seen: Mutex::default(),
                settings: self.settings.clone(),
                counters: Arc::clone(&self.counters),
                control: self.control.clone(),
            })
        });
        Arc::clone(pool)
    }

    /// A login failed: a pool that nobody ever used (a wrong name, most likely) is not kept.
    pub(crate) fn forget_unused(&self, opening: &Opening) {
        let unused = |pool: &Arc<Pool>| Arc::strong_count(pool) == 1 && pool.counts().open == 0;
        lock(&self.pools).retain(|(database, user, _), pool| {
            *database != opening.database || *user != opening.user || !unused(pool)
        });
    }

    /// What a client proved itself with logs in to every upstream.
    pub(crate) fn share_credentials(&self, opening: &Opening, credentials: &Credentials) {
        for upstream in 0..self.connectors.len() {
            self.pool(opening, upstream).learn_credentials(credentials);
        }
    }

    /// Every pool with its database, user, upstream's name and counts; for the console.
    pub(crate) fn report(&self) -> Vec<(String, String, Arc<str>, Counts)> {
        let pools = lock(&self.pools);
        let row = |((database, user, upstream), pool): (&(String, String, usize), &Arc<Pool>)| {
            let name = self
                .names
                .get(*upstream)
                .cloned()
                .unwrap_or_else(|| "?".into());
            (database.clone(), user.clone(), name, pool.counts())
        };
        pools.iter().map(row).collect()
    }

    /// Closes the idle servers of a database: somebody wants it to themselves.
    pub(crate) fn leave_database(&self, database: &str) {
        let inside = |((of, _, _), _): &(&(String, String, usize), &Arc<Pool>)| of == database;
        let pools: Vec<_> = lock(&self.pools)
            .iter()
            .filter(inside)
            .map(|(_, pool)| Arc::clone(pool))
            .collect();
        for pool in pools {
            pool.close_idle_where(|_| true);
        }
    }

    /// Closes every idle server; those on loan close when they come back, as their clients leave.
    pub(crate) fn close_idle(&self) {
        let pools: Vec<_> = lock(&self.pools).values().cloned().collect();
        for pool in pools {
            pool.close_idle_where(|_| true);
        }
    }
}

impl Pool {
    pub(crate) fn counts(&self) -> Counts {
        lock(&self.books).counts()
    }

    /// Whether a checkout would have to wait now.
    pub(crate) fn is_busy(&self) -> bool {
        let counts = self.counts();
        counts.idle == 0 && counts.open >= self.settings.size.get()
    }

    pub(crate) fn learn_credentials(&self, credentials: &Credentials) {
        match credentials {
            Credentials::None => {}
            Credentials::Password(_) | Credentials::Keys(_) => {
                *lock(&self.credentials) = credentials.clone()
            }
        }
    }

    /// A server for this client without any waiting, if one is idle and surely alive.
    pub(crate) fn take_now(self: &Arc<Self>, wish: Wish<'_>) -> Option<Checkout> {
        let server = lock(&self.books).take_idle(wish.client, wish.opening)?;
        let checkout = Checkout {
            server: Some(server),
            pool: Arc::clone(self),
        };
        let now = Instant::now();
        let young = now.duration_since(checkout.opened_at) <= self.settings.server_lifetime;
        let trusted = now.duration_since(checkout.idle_since) < TRUSTED_IDLE;
        if young && (trusted || matches!(peek(&checkout), Peek::Silent)) {
            return Some(checkout);
        }
        checkout.put_back();
        None
    }

    /// A server for this client. Waits its turn, `within` at most (and never longer than `checkout_timeout`).
    pub(crate) async fn checkout(
        self: &Arc<Self>,
        wish: Wish<'_>,
        within: Option<Duration>,
    ) -> Result<Checkout, CheckoutError> {
        loop {
            let (taken, receiver) = self.take(wish);
            match taken {
                Take::Ready(server) => match self.fit(server).await {
                    Some(checkout) => return Ok(checkout),
                    None => continue,
                },
                Take::Open => return self.open(Slot::new(self), wish).await,
                Take::Replace(old) => {
                    self.counters.closed.inc();
                    drop(old);
                    return self.open(Slot::new(self), wish).await;
                }
                Take::Wait(ticket) => {
                    let receiver = receiver.expect("a wait comes with its receiver");
                    return self.wait(ticket, receiver, wish, within).await;
                }
            }
        }
    }

    /// What a client that logs in is told: from a server of its own if one is to be had at once, else from what an equal
    /// session was told, else after waiting its turn like any request.
    pub(crate) async fn log_in(self: &Arc<Self>, wish: Wish<'_>) -> Result<Seen, CheckoutError> {
        if self.is_busy()
            && let Some(seen) = lock(&self.seen).get(wish.opening)
        {
            return Ok(seen.clone());
        }
        let server = self.checkout(wish, None).await?;
        let seen = Seen {
            reported: server.reported.clone(),
            pid: server.key.pid,
        };
        if let Some(clean) = reset::prove(&server) {
            server.check_in(clean, Some(wish.client));
        }
        let mut known = lock(&self.seen);
        if known.len() >= SEEN_MAX {
            known.clear();
        }
        known.insert(Arc::clone(wish.opening), seen.clone());
        Ok(seen)
    }

    /// This client is gone.
    pub(crate) fn disown(&self, client: ClientId) {
        lock(&self.books).disown(client);
    }

    fn take(&self, wish: Wish<'_>) -> (Take<Box<ServerConn>>, Option<oneshot::Receiver<Grant>>) {
        let mut receiver = None;
        let taken = lock(&self.books).take(wish.client, wish.opening, || {
            let (sender, awaited) = oneshot::channel();
            receiver = Some(awaited);
            sender
        });
        (taken, receiver)
    }

    async fn wait(
        self: &Arc<Self>,
        ticket: u64,
        receiver: oneshot::Receiver<Grant>,
        wish: Wish<'_>,
        within: Option<Duration>,
    ) -> Result<Checkout, CheckoutError> {
        self.counters.waited.inc();
        // However the wait ends, also by this future being dropped, the wish is taken back.
        let _wish = Wished { pool: self, ticket };
        let longest = self.settings.checkout_timeout;
        let within = within.map_or(longest, |within| within.min(longest));
        let granted = timeout(within, receiver).await;
        match granted {
            Ok(Ok(Grant::Server(checkout))) => Ok(checkout),
            Ok(Ok(Grant::Slot(slot))) => self.open(slot, wish).await,
            Ok(Err(_)) | Err(_) => {
                self.counters.timed_out.inc();
                Err(CheckoutError::TimedOut(within))
            }
        }
    }

    async fn open(self: &Arc<Self>, slot: Slot, wish: Wish<'_>) -> Result<Checkout, CheckoutError> {
        let credentials = lock(&self.credentials).clone();
        match self
            .connector
            .connect(wish.opening, wish.application_name, &credentials)
            .await
        {
            Ok(server) => {
                self.counters.opened.inc();
                Ok(slot.fill(Box::new(server)))
            }
            Err(error) => {
                self.counters.failed.inc();
                Err(error.into())
            }
        }
    }

    /// A server that was idle is lent only if it still lives; otherwise it is closed and its slot is free again.
    async fn fit(self: &Arc<Self>, server: Box<ServerConn>) -> Option<Checkout> {
        let mut checkout = Checkout {
            server: Some(server),
            pool: Arc::clone(self),
        };
        let now = Instant::now();
        if now.duration_since(checkout.idle_since) < TRUSTED_IDLE {
            return Some(checkout);
        }
        if now.duration_since(checkout.opened_at) > self.settings.server_lifetime {
            return None;
        }
        match peek(&checkout) {
            Peek::Silent => Some(checkout),
            Peek::Closed => None,
            // Something arrived while nobody listened: a changed parameter, a notice, or a farewell.
            Peek::Speaks => {
                match timeout(Duration::from_secs(1), reset::absorb(&mut checkout)).await {
                    Ok(Ok(())) => Some(checkout),
                    Ok(Err(error)) => {
                        debug!(pid = checkout.key.pid, %error, "idle server is gone");
                        None
                    }
                    Err(_late) => None,
                }
            }
        }
    }

    fn pass_on(self: &Arc<Self>, give: Give<Box<ServerConn>, oneshot::Sender<Grant>>) {
        // A grant that nobody takes is dropped here, and its drop comes back through `closed`: hence the clear order of
        // "books first, sending after", with no lock held.
        match give {
            Give::Kept => {}
            Give::Server(server, waiter, _client) => {
                let grant = Grant::Server(Checkout {
                    server: Some(server),
                    pool: Arc::clone(self),
                });
                if let Err(Grant::Server(unwanted)) = waiter.send(grant) {
                    unwanted.put_back();
                }
            }
            Give::Slot(waiter, closed) => {
                if closed.is_some() {
                    self.counters.closed.inc();
                }
                drop(closed);
                drop(waiter.send(Grant::Slot(Slot::new(self))));
            }
        }
    }

    fn close_idle_where(self: &Arc<Self>, wanted: impl FnMut(&mut Box<ServerConn>) -> bool) {
        let removed = lock(&self.books).remove_idle(wanted);
        for server in removed {
            self.counters.closed.inc();
            drop(server);
            let give = lock(&self.books).closed();
            self.pass_on(give);
        }
    }
}

/// A wish for a server, taken back when dropped.
struct Wished<'a> {
    pool: &'a Arc<Pool>,
    ticket: u64,
}

impl Drop for Wished<'_> {
    fn drop(&mut self) {
        lock(&self.pool.books).forget(self.ticket);
    }
}

/// The right to open one server. Dropping it gives the right back.
struct Slot {
    pool: Option<Arc<Pool>>,
}

impl Slot {
    fn new(pool: &Arc<Pool>) -> Self {
        Self {
            pool: Some(Arc::clone(pool)),
        }
    }

    fn fill(mut self, server: Box<ServerConn>) -> Checkout {
        let pool = self.pool.take().expect("a slot is filled once");
        Checkout {
            server: Some(server),
            pool,
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if let Some(pool) = self.pool.take() {
            let give = lock(&pool.books).closed();
            pool.pass_on(give);
        }
    }
}

/// A server connection on loan. INVARIANT: only `check_in` shares it again; dropping the lease closes the socket, so a
/// request that was given up can never hand its half-read response to the next client.
pub(crate) struct Checkout {
    server: Option<Box<ServerConn>>,
    pool: Arc<Pool>,
}

impl Checkout {
    /// The server is fit for anybody; it stays warm for `owner`.
    pub(crate) fn check_in(mut self, _clean: Clean, owner: Option<ClientId>) {
        let Some(mut server) = self.server.take() else {
            return;
        };
        server.idle_since = Instant::now();
        server.stream.input.rest();
        let give = lock(&self.pool.books).put(server, owner);
        self.pool.pass_on(give);
    }

    /// A server nobody has touched since it was last proven clean goes back as it came.
    fn put_back(mut self) {
        let Some(server) = self.server.take() else {
            return;
        };
        let give = lock(&self.pool.books).put(server, None);
        self.pool.pass_on(give);
    }
}

impl Deref for Checkout {
    type Target = ServerConn;
    fn deref(&self) -> &ServerConn {
        self.server
            .as_ref()
            .expect("a lease holds its server until it is consumed")
    }
}

impl DerefMut for Checkout {
    fn deref_mut(&mut self) -> &mut ServerConn {
        self.server
            .as_mut()
            .expect("a lease holds its server until it is consumed")
    }
}

impl Drop for Checkout {
    fn drop(&mut self) {
        let Some(server) = self.server.take() else {
            return;
        };
        self.pool.counters.closed.inc();
        if server.in_flight {
            self.pool.counters.abandoned.inc();
            let key = Arc::clone(&server.key);
            // Closing the socket alone would leave the query running until it tries to write.
            self.pool.control.spawn(async move { abandon(&key).await });
        }
        drop(server);
        let give = lock(&self.pool.books).closed();
        self.pool.pass_on(give);
    }
}

async fn abandon(key: &ServerKey) {
    match send_cancel(key, ABANDON_MAX).await {
        Ok(()) => {}
        // The server is going or gone, and the query with it.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::ConnectionRefused | io::ErrorKind::ConnectionReset
            ) =>
        {
            debug!(host = %key.host, port = key.port, %error, "nobody left to cancel at");
        }
        Err(error) => {
            warn!(host = %key.host, port = key.port, %error, "could not cancel an abandoned query");
        }
    }
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

/// Closes idle servers that have died, grown old or been idle too long. Ends with the pools.
async fn sweep(pools: std::sync::Weak<Pools>) {
    let mut every = tokio::time::interval(SWEEP_EVERY);
    loop {
        every.tick().await;
        let Some(pools) = pools.upgrade() else { return };
        let all: Vec<_> = lock(&pools.pools).values().cloned().collect();
        let now = Instant::now();
        for pool in all {
            let settings = &pools.settings;
            pool.close_idle_where(|server| {
                now.duration_since(server.idle_since) > settings.server_idle
                    || now.duration_since(server.opened_at) > settings.server_lifetime
                    || matches!(peek(server), Peek::Closed)
            });
        }
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

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
