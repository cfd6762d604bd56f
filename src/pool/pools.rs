//! Every pool, and what the operator says of them: pause and resume, reconnect, kill, disable, new settings, replicas that
//! come and go. Also the chores: closing what has been idle or alive too long, warming up, following host names. Lends
//! nothing itself, `checkout.rs` does. Called by `client/` and `app.rs`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tracing::{debug, info};

pub(crate) use super::budget::Adapted;
use super::budget::{Budget, Load};
use super::checkout::{Common, Counters, Pool, Standing, lock};
use super::limiter;
use super::stats::DatabaseStats;
use crate::classify::Worth;
use crate::config;
use crate::metrics::Registry;
use crate::pgflow::events::WAKE_SETTING;
use crate::server::auth::Credentials;
use crate::server::connect::Connector;
use crate::server::parameters::Opening;
use crate::upstream::{PRIMARY, Upstream, UpstreamId};

/// How often servers are looked after.
const SWEEP_EVERY: Duration = Duration::from_secs(1);
/// How long a host name may take to be looked up.
const LOOKUP_MAX: Duration = Duration::from_secs(5);

/// Database, user, upstream.
type Key = (String, String, UpstreamId);

/// Every pool.
pub(crate) struct Pools {
    pools: Mutex<HashMap<Key, Arc<Pool>>>,
    /// Every upstream there has been: one that a reload took away may come back.
    endpoints: Mutex<BTreeMap<UpstreamId, Arc<Endpoint>>>,
    orders: Mutex<Orders>,
    stats: Mutex<HashMap<String, Arc<DatabaseStats>>>,
    settings: Mutex<config::Pool>,
    roles: Mutex<Vec<config::Role>>,
    /// Numbers servers.
    servers: Arc<AtomicU64>,
    common: Arc<Common>,
    /// The reader of events that sees what these servers commit.
    observer: Option<uuid::Uuid>,
}

/// An upstream as pools see it.
struct Endpoint {
    upstream: Arc<Upstream>,
    connector: Arc<Connector>,
    /// Who is trusted here as the control role logs in as it there.
    control_role: Credentials,
    budget: Arc<Budget>,
    /// Where its host name led when last looked up.
    addresses: Mutex<Vec<IpAddr>>,
    /// Still one of the configuration's.
    in_use: AtomicBool,
}

/// What the operator has said of databases.
#[derive(Default)]
struct Orders {
    all_paused: bool,
    paused: HashSet<String>,
    disabled: HashSet<String>,
}

/// An endpoint that can be added: what may fail has been done.
pub(crate) struct NewUpstream(Arc<Endpoint>);

/// One pool as the console shows it.
pub(crate) struct PoolReport {
    pub(crate) database: String,
    pub(crate) user: String,
    pub(crate) upstream: UpstreamId,
    pub(crate) standing: Standing,
}

/// A host name and what it stood for when last looked up.
pub(crate) struct HostReport {
    pub(crate) host: String,
    pub(crate) addresses: Vec<IpAddr>,
}

impl Pools {
    pub(crate) fn new(
        upstreams: &[Arc<Upstream>],
        settings: &config::Pool,
        roles: &[config::Role],
        shed: &config::Shed,
        observer: Option<uuid::Uuid>,
        registry: &Registry,
        control: Handle,
    ) -> io::Result<Arc<Self>> {
        let counter = |name, help| registry.counter(name, help, &[]);
        let counters = Counters {
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
            shed: Worth::ALL.map(|worth| {
                registry.counter(
                    "flowgate_shed_total",
                    "requests refused under load, by what they are",
                    &[("class", worth.name())],
                )
            }),
            abandoned: counter(
                "flowgate_servers_abandoned_total",
                "servers closed in the middle of a request",
            ),
            reserve: counter(
                "flowgate_servers_reserve_total",
                "servers opened beyond pool.size for requests that had waited pool.reserve_timeout",
            ),
            evicted: counter(
                "flowgate_servers_evicted_total",
                "idle servers closed to make room for another pool's under pool.max_server_connections",
            ),
        };
        let pools = Arc::new(Self {
            pools: Mutex::default(),
            endpoints: Mutex::default(),
            orders: Mutex::default(),
            stats: Mutex::default(),
            settings: Mutex::new(settings.clone()),
            roles: Mutex::new(roles.to_vec()),
            servers: Arc::default(),
            observer,
            common: Arc::new(Common {
                counters,
                shed: shed.clone(),
                control,
                changed: Notify::new(),
            }),
        });
        for upstream in upstreams {
            let prepared = pools.prepare(upstream)?;
            pools.add(prepared);
        }
        let control = &pools.common.control;
        control.spawn(sweep(Arc::downgrade(&pools)));
        if pools.common.shed.adaptive {
            control.spawn(adapt(Arc::downgrade(&pools)));
        }
        control.spawn(follow_names(Arc::downgrade(&pools)));
        Ok(pools)
    }

    /// What of a new upstream may fail, such as reading its root certificates.
    pub(crate) fn prepare(&self, upstream: &Arc<Upstream>) -> io::Result<NewUpstream> {
        let mut connector = Connector::new(&upstream.url, Arc::clone(&self.servers))?;
        if let Some(observer) = self.observer {
            connector = connector.with_setting(WAKE_SETTING, observer.to_string());
        }
        Ok(NewUpstream(Arc::new(Endpoint {
            connector: Arc::new(connector),
            control_role: Credentials::of_control_role(&upstream.url),
            budget: Arc::new(Budget::new(
                &lock(&self.settings),
                self.common.shed.adaptive,
            )),
            addresses: Mutex::default(),
            in_use: AtomicBool::new(true),
            upstream: Arc::clone(upstream),
        })))
    }

    pub(crate) fn add(&self, NewUpstream(endpoint): NewUpstream) {
        lock(&self.endpoints).insert(endpoint.upstream.id, endpoint);
    }

    /// The pool for this opening on an upstream.
    pub(crate) fn pool(&self, opening: &Opening, upstream: UpstreamId) -> Arc<Pool> {
        let key = (opening.database.clone(), opening.user.clone(), upstream);
        let mut pools = lock(&self.pools);
        if let Some(pool) = pools.get(&key) {
            return Arc::clone(pool);
        }
        let endpoint = {
            let endpoints = lock(&self.endpoints);
            let endpoint = endpoints.get(&upstream).or_else(|| endpoints.get(&PRIMARY));
            Arc::clone(endpoint.expect("sessions are told of upstreams that were added"))
        };
        let credentials = if endpoint.upstream.url.user == opening.user {
            endpoint.control_role.clone()
        } else {
            Credentials::None
        };
        let pool = Pool::new(
            Arc::clone(&endpoint.connector),
            Arc::clone(&endpoint.budget),
            credentials,
            &self.settings_of(&opening.user),
            lock(&self.orders).is_paused(&opening.database),
            self.stats_of(&opening.database),
            Arc::clone(&self.common),
        );
        pools.insert(key, Arc::clone(&pool));
        pool
    }

    /// `[pool]`, within what the user may have.
    fn settings_of(&self, user: &str) -> config::Pool {
        let mut settings = lock(&self.settings).clone();
        let roles = lock(&self.roles);
        let role = roles.iter().find(|role| role.name == user);
        if let Some(most) = role.and_then(|role| role.terms.max_servers) {
            settings.size = settings.size.min(most);
            settings.reserve_size = settings.reserve_size.min(most.get() - settings.size.get());
            settings.min_size = settings.min_size.min(most.get());
        }
        settings
    }

    fn stats_of(&self, database: &str) -> Arc<DatabaseStats> {
        let mut stats = lock(&self.stats);
        let fresh = || Arc::new(DatabaseStats::new(Instant::now()));
        Arc::clone(stats.entry(database.to_owned()).or_insert_with(fresh))
    }

    /// A login failed: a pool that nobody ever used (a wrong name, most likely) is not kept.
    pub(crate) fn forget_unused(&self, opening: &Opening) {
        let unused = |pool: &Arc<Pool>| Arc::strong_count(pool) == 1 && pool.counts().open == 0;
        let mut pools = lock(&self.pools);
        pools.retain(|(database, user, _), pool| {
            *database != opening.database || *user != opening.user || !unused(pool)
        });
        if !pools
            .keys()
            .any(|(database, _, _)| *database == opening.database)
        {
            let mut stats = lock(&self.stats);
            if stats
                .get(&opening.database)
                .is_some_and(|stats| stats.totals().assignments == 0)
            {
                stats.remove(&opening.database);
            }
        }
    }

    /// What a client proved itself with logs in to every upstream.
    pub(crate) fn share_credentials(&self, opening: &Opening, credentials: &Credentials) {
        let upstreams: Vec<_> = lock(&self.endpoints)
            .values()
            .filter(|endpoint| endpoint.in_use.load(Ordering::Relaxed))
            .map(|endpoint| endpoint.upstream.id)
            .collect();
        for upstream in upstreams {
            self.pool(opening, upstream).learn_credentials(credentials);
        }
    }

    /// Closes the idle servers of a database: somebody wants it to themselves.
    pub(crate) fn leave_database(&self, database: &str) {
        for pool in self.of(Some(database)) {
            pool.close_idle_where(|_| true);
        }
    }

    /// Closes every idle server; those on loan close when they come back, as their clients leave.
    pub(crate) fn close_idle(&self) {
        for pool in self.of(None) {
            pool.close_idle_where(|_| true);
        }
    }

    // ---- What the operator says. `None`: every database. ----

    /// Nothing is lent until `resume`. `false`: it was so already.
    pub(crate) fn pause(&self, database: Option<&str>) -> bool {
        let news = {
            let mut orders = lock(&self.orders);
            match database {
                None => !std::mem::replace(&mut orders.all_paused, true),
                Some(_) if orders.all_paused => false,
                Some(database) => orders.paused.insert(database.to_owned()),
            }
        };
        for pool in self.of(database) {
            pool.pause();
        }
        news
    }

    /// `false`: it was not paused.
    pub(crate) fn resume(&self, database: Option<&str>) -> bool {
        let news = {
            let mut orders = lock(&self.orders);
            match database {
                None => {
                    let some = orders.all_paused || !orders.paused.is_empty();
                    orders.all_paused = false;
                    orders.paused.clear();
                    some
                }
                Some(database) => orders.paused.remove(database),
            }
        };
        let still = lock(&self.orders).all_paused;
        if !still {
            for pool in self.of(database) {
                pool.resume();
            }
        }
        self.common.changed.notify_waiters();
        news
    }

    pub(crate) fn is_paused(&self, database: &str) -> bool {
        lock(&self.orders).is_paused(database)
    }

    pub(crate) fn is_all_paused(&self) -> bool {
        lock(&self.orders).all_paused
    }

    /// Every server opened so far is closed: the idle ones now, the others when they come back.
    pub(crate) fn reconnect(&self, database: Option<&str>) {
        for pool in self.of(database) {
            pool.reconnect();
        }
    }

    /// New clients of the database are refused, or not any more. `false`: it was so already.
    pub(crate) fn disable(&self, database: &str, disabled: bool) -> bool {
        let mut orders = lock(&self.orders);
        if disabled {
            orders.disabled.insert(database.to_owned())
        } else {
            orders.disabled.remove(database)
        }
    }

    pub(crate) fn is_disabled(&self, database: &str) -> bool {
        lock(&self.orders).disabled.contains(database)
    }

    /// Returns once no server is open. `false`: `resume` came first.
    pub(crate) async fn drained(&self, database: Option<&str>) -> bool {
        self.until(|| {
            let paused = match database {
                Some(database) => self.is_paused(database),
                None => self.is_all_paused(),
            };
            let open = || self.of(database).iter().any(|pool| pool.counts().open > 0);
            match (paused, open()) {
                (false, _) => Some(false),
                (true, false) => Some(true),
                (true, true) => None,
            }
        })
        .await
    }

    /// Returns once no server is left that was asked to close.
    pub(crate) async fn closed(&self, database: Option<&str>) {
        let left = || {
            let servers = self.of(database).into_iter();
            servers
                .flat_map(|pool| pool.servers())
                .any(|server| server.close_needed())
        };
        self.until(|| (!left()).then_some(())).await;
    }

    async fn until<T>(&self, reached: impl Fn() -> Option<T>) -> T {
        loop {
            // Enabled before looking, so that a change in between is not missed.
            let mut changed = std::pin::pin!(self.common.changed.notified());
            changed.as_mut().enable();
            if let Some(reached) = reached() {
                return reached;
            }
            changed.await;
        }
    }

    /// New settings, and the upstreams in use from now on: pools of others give their servers up.
    pub(crate) fn adopt(
        &self,
        settings: &config::Pool,
        roles: &[config::Role],
        upstreams: &[Arc<Upstream>],
    ) {
        *lock(&self.settings) = settings.clone();
        *lock(&self.roles) = roles.to_vec();
        let endpoints: Vec<_> = lock(&self.endpoints).values().cloned().collect();
        for endpoint in endpoints {
            let in_use = upstreams.iter().any(|used| used.id == endpoint.upstream.id);
            endpoint.in_use.store(in_use, Ordering::Relaxed);
            endpoint.budget.resize(settings);
        }
        let pools: Vec<_> = {
            let pools = lock(&self.pools);
            let named = pools.iter();
            named
                .map(|((_, user, _), pool)| (user.clone(), Arc::clone(pool)))
                .collect()
        };
        for (user, pool) in pools {
            pool.adopt(&self.settings_of(&user));
        }
        self.leave_unused();
    }

    /// Closes the servers of upstreams that are no longer the configuration's.
    fn leave_unused(&self) {
        let unused: Vec<_> = lock(&self.endpoints)
            .values()
            .filter(|endpoint| !endpoint.in_use.load(Ordering::Relaxed))
            .map(|endpoint| endpoint.upstream.id)
            .collect();
        for upstream in unused {
            for pool in self.of_upstream(upstream) {
                pool.reconnect();
            }
        }
    }

    // ---- For the console. ----

    /// Whether somebody has logged in to it, or something was said of it.
    pub(crate) fn knows(&self, database: &str) -> bool {
        let orders = lock(&self.orders);
        let said = orders.paused.contains(database) || orders.disabled.contains(database);
        drop(orders);
        said || lock(&self.pools).keys().any(|(of, _, _)| of == database)
    }

    pub(crate) fn report(&self) -> Vec<PoolReport> {
        let pools = lock(&self.pools);
        let row = |((database, user, upstream), pool): (&Key, &Arc<Pool>)| PoolReport {
            database: database.clone(),
            user: user.clone(),
            upstream: *upstream,
            standing: pool.standing(),
        };
        let mut rows: Vec<_> = pools.iter().map(row).collect();
        rows.sort_by(|a, b| {
            (&a.database, &a.user, a.upstream).cmp(&(&b.database, &b.user, b.upstream))
        });
        rows
    }

    /// What has passed through the pools of each database.
    pub(crate) fn statistics(&self) -> Vec<(String, Arc<DatabaseStats>)> {
        let stats = lock(&self.stats);
        let mut rows: Vec<_> = stats
            .iter()
            .map(|(database, stats)| (database.clone(), Arc::clone(stats)))
            .collect();
        rows.sort_by(|a, b| a.0.cmp(&b.0));
        rows
    }

    /// Databases of which something was said.
    pub(crate) fn ordered(&self) -> Vec<String> {
        let orders = lock(&self.orders);
        orders.paused.union(&orders.disabled).cloned().collect()
    }

    pub(crate) fn load(&self, upstream: UpstreamId) -> Option<Load> {
        let endpoint = lock(&self.endpoints).get(&upstream).cloned()?;
        Some(endpoint.budget.load())
    }

    /// `None`: without `shed.adaptive`.
    pub(crate) fn adapted(&self, upstream: UpstreamId) -> Option<Adapted> {
        let endpoint = lock(&self.endpoints).get(&upstream).cloned()?;
        endpoint.budget.adapted()
    }

    /// Host names, not addresses, of the upstreams.
    pub(crate) fn hosts(&self) -> Vec<HostReport> {
        let endpoints: Vec<_> = lock(&self.endpoints).values().cloned().collect();
        let named = endpoints
            .iter()
            .filter(|endpoint| endpoint.upstream.url.host.parse::<IpAddr>().is_err());
        named
            .map(|endpoint| HostReport {
                host: endpoint.upstream.url.host.clone(),
                addresses: lock(&endpoint.addresses).clone(),
            })
            .collect()
    }

    fn of(&self, database: Option<&str>) -> Vec<Arc<Pool>> {
        let inside = |of: &str| database.is_none_or(|database| database == of);
        lock(&self.pools)
            .iter()
            .filter(|((of, _, _), _)| inside(of))
            .map(|(_, pool)| Arc::clone(pool))
            .collect()
    }

    fn of_upstream(&self, upstream: UpstreamId) -> Vec<Arc<Pool>> {
        lock(&self.pools)
            .iter()
            .filter(|((_, _, of), _)| *of == upstream)
            .map(|(_, pool)| Arc::clone(pool))
            .collect()
    }
}

impl Orders {
    fn is_paused(&self, database: &str) -> bool {
        self.all_paused || self.paused.contains(database)
    }
}

/// Closes servers that have died, grown old or been idle too long; opens what a pool is to keep. Ends with the pools.
async fn sweep(pools: Weak<Pools>) {
    let mut every = interval(SWEEP_EVERY);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        every.tick().await;
        let Some(pools) = pools.upgrade() else { return };
        let now = Instant::now();
        for pool in pools.of(None) {
            pool.reap(now);
            pool.warm_up();
        }
        // A session may have asked before it heard of the change.
        pools.leave_unused();
        for (_, stats) in pools.statistics() {
            stats.tick(now);
        }
    }
}

/// With `shed.adaptive`. Ends with the pools.
async fn adapt(pools: Weak<Pools>) {
    let mut every = interval(limiter::TICK);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        every.tick().await;
        let Some(pools) = pools.upgrade() else { return };
        let endpoints: Vec<_> = lock(&pools.endpoints).values().cloned().collect();
        for endpoint in endpoints {
            endpoint.budget.tick(Instant::now());
        }
    }
}

/// Looks host names up anew, and closes servers at addresses that a name no longer stands for. Ends with the pools.
async fn follow_names(pools: Weak<Pools>) {
    loop {
        let Some(ttl) = pools.upgrade().map(|pools| lock(&pools.settings).dns_ttl) else {
            return;
        };
        if ttl.is_some() {
            let endpoints: Vec<_> = match pools.upgrade() {
                Some(pools) => lock(&pools.endpoints).values().cloned().collect(),
                None => return,
            };
            for endpoint in endpoints {
                let Some(found) = look_up(&endpoint).await else {
                    continue;
                };
                let Some(pools) = pools.upgrade() else { return };
                pools.moved(&endpoint, found);
            }
        }
        tokio::time::sleep(ttl.unwrap_or(LOOKUP_MAX)).await;
    }
}

/// `None`: an address and no name, or a name that cannot be looked up now, which says nothing of its servers.
async fn look_up(endpoint: &Endpoint) -> Option<Vec<IpAddr>> {
    let url = &endpoint.upstream.url;
    if url.host.parse::<IpAddr>().is_ok() {
        return None;
    }
    let found = timeout(
        LOOKUP_MAX,
        tokio::net::lookup_host((url.host.as_str(), url.port)),
    )
    .await;
    match found {
        Ok(Ok(addresses)) => Some(addresses.map(|address| address.ip()).collect()),
        Ok(Err(error)) => {
            debug!(host = url.host, %error, "host name cannot be looked up");
            None
        }
        Err(_late) => None,
    }
}

impl Pools {
    fn moved(&self, endpoint: &Endpoint, found: Vec<IpAddr>) {
        if found.is_empty() {
            return;
        }
        let before = std::mem::replace(&mut *lock(&endpoint.addresses), found.clone());
        if !before.is_empty() && before.iter().any(|address| !found.contains(address)) {
            let host = &endpoint.upstream.url.host;
            info!(host, ?before, now = ?found, "host name leads elsewhere");
        }
        for pool in self.of_upstream(endpoint.upstream.id) {
            pool.ask_to_close(|server| left_behind(server.peer, &found));
        }
    }
}

/// Whether a server is at none of the addresses its host name stands for.
fn left_behind(peer: Option<SocketAddr>, found: &[IpAddr]) -> bool {
    peer.is_some_and(|peer| !found.contains(&peer.ip().to_canonical()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_left_behind_when_its_name_leads_elsewhere() {
        let peer = |text: &str| Some(text.parse().unwrap());
        let found: Vec<IpAddr> = vec!["10.0.0.1".parse().unwrap(), "::1".parse().unwrap()];
        assert!(!left_behind(peer("10.0.0.1:5432"), &found));
        assert!(!left_behind(peer("[::ffff:10.0.0.1]:5432"), &found));
        assert!(!left_behind(peer("[::1]:5432"), &found));
        assert!(left_behind(peer("10.0.0.2:5432"), &found));
        assert!(!left_behind(None, &found));
    }
}
