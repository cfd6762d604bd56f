//! The checked configuration: what every other module may rely on. Spelling lives in `raw.rs`, the checks in
//! `check.rs`; after them nobody validates. Knows nothing of sockets. Built by `commands/`, read by all.

mod check;
mod cidr;
mod keys;
mod layers;
mod raw;
#[cfg(test)]
mod tests;
mod url;

use std::fmt;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

pub use self::check::{defaults, from_sources, parse_duration};
pub use self::cidr::Cidr;
pub use self::keys::{Key, live_part, need_restart, shown};
pub use self::layers::{ConfigError, Flags, Problem, Source, environment};
// `self::`: the crate of that name is in scope too.
pub use self::url::{ChannelBinding, ConnectUrl, ConnectUrlError, SslMode, SslNegotiation};

/// Everything an operator can say, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub listen: Listen,
    pub primary: ConnectUrl,
    pub replicas: Vec<ConnectUrl>,
    pub auth: Auth,
    /// First match wins, no match is refused. Empty: `auth.method` for everybody.
    pub access: Vec<AccessRule>,
    pub console: Console,
    pub pool: Pool,
    /// Each name once.
    pub roles: Vec<Role>,
    pub replication: Replication,
    pub cluster: Cluster,
    pub route: Route,
    pub cache: Cache,
    pub poll: Poll,
    pub shed: Shed,
    pub events: Events,
    pub http: Http,
    pub maintenance: Maintenance,
    /// `log.filter`: a level, then levels of single modules, as `tracing_subscriber::filter::Targets` reads them.
    pub log: String,
}

impl Config {
    /// What was said of this user, or holds for those of whom nothing was said.
    pub fn role(&self, user: &str) -> RoleTerms {
        let role = self.roles.iter().find(|role| role.name == user);
        role.map_or_else(RoleTerms::default, |role| role.terms)
    }

    /// Whoever reaches us from elsewhere would be let in unasked, and nobody said that this is wanted.
    pub fn trusts_strangers(&self) -> bool {
        let open = |rule: &AccessRule| {
            rule.method == AccessMethod::Trust && rule.address.reaches_strangers(&self.listen)
        };
        let by_rule = !self.auth.allow_trust_anywhere && self.access.iter().any(open);
        by_rule || self.auth.trusts_strangers(&self.listen)
    }
}

impl Addresses {
    /// Whether somebody may come from there who is not on this machine.
    fn reaches_strangers(&self, listen: &Listen) -> bool {
        match self {
            Self::All => !listen.postgres.ip().is_loopback(),
            Self::Only(list) => !list.iter().all(|range| range.is_loopback()),
        }
    }
}

impl Auth {
    fn trusts_strangers(&self, listen: &Listen) -> bool {
        self.method == AuthMethod::Trust
            && !self.allow_trust_anywhere
            && !listen.postgres.ip().is_loopback()
    }
}

/// `[listen]`: where clients come in.
#[derive(Clone, Debug, PartialEq)]
pub struct Listen {
    pub postgres: SocketAddr,
    /// `None`: no HTTP at all (`http = "off"`).
    pub http: Option<SocketAddr>,
    /// `Off` whenever there is no certificate; else `tls_cert` and `tls_key` are both there.
    pub tls: ClientTls,
    pub tls_cert: Option<PathBuf>,
    pub tls_key: Option<PathBuf>,
    pub tls_client_ca: Option<PathBuf>,
    pub proxy_protocol: ProxyProtocol,
    /// Who may say, by PROXY header, whom it speaks for.
    pub proxy_protocol_from: Vec<Cidr>,
    /// Data-plane threads, each a whole runtime with its own acceptor.
    pub threads: NonZeroUsize,
    /// Other processes may listen on the same addresses, to take over without a gap.
    pub reuse_port: bool,
    /// From accept to ReadyForQuery of the login.
    pub login_timeout: Duration,
    /// SIGTERM: how long transactions may go on.
    pub drain_timeout: Duration,
}

/// `listen.tls`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClientTls {
    Off,
    Allow,
    Require,
}

/// `listen.proxy_protocol`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyProtocol {
    Off,
    /// Every connection begins with a header, version 1 or 2.
    Require,
}

/// `[auth]`
#[derive(Clone, Debug, PartialEq)]
pub struct Auth {
    pub method: AuthMethod,
    pub users_file: Option<PathBuf>,
    /// Run by the control role with the user's name as `$1`; returns one row (name, verifier).
    pub query: String,
    pub allow_trust_anywhere: bool,
}

/// `auth.method`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuthMethod {
    Scram,
    Trust,
}

/// One `[[access]]`, a line of pg_hba.conf in other words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AccessRule {
    pub database: Vec<DatabaseName>,
    pub user: Names,
    pub address: Addresses,
    pub method: AccessMethod,
    pub tls: AccessTls,
    /// `cert`: the common name the client's certificate must have. `None`: the user's name.
    pub cert_name: Option<String>,
}

/// What `access.database` may name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DatabaseName {
    /// Every database; physical replication is none.
    All,
    /// The one named like the user.
    SameUser,
    /// Physical replication, whatever database it names.
    Replication,
    Named(String),
}

/// `access.user`
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Names {
    All,
    Only(Vec<String>),
}

/// `access.address`
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Addresses {
    All,
    Only(Vec<Cidr>),
}

/// `access.method`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessMethod {
    Scram,
    Trust,
    /// A client certificate by one of `listen.tls_client_ca`.
    Cert,
    Reject,
}

/// `access.tls`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AccessTls {
    Any,
    /// The rule is for encrypted connections only.
    Require,
}

/// `[replication]`
#[derive(Clone, Debug, PartialEq)]
pub struct Replication {
    /// Replication connections at once, each with a server of its own outside the pools. 0: none at all.
    pub max_connections: usize,
}

/// `[cluster]`: other Flowgates behind the same balancer.
#[derive(Clone, Debug, PartialEq)]
pub struct Cluster {
    /// Ours, as the others' `peers` spell it.
    pub address: Option<String>,
    /// `host:port` of each.
    pub peers: Vec<String>,
    /// Cancel requests on their way to peers at once.
    pub forwards_max: NonZeroUsize,
}

/// `[console]`: who may log in to database `flowgate`.
#[derive(Clone, Debug, PartialEq)]
pub struct Console {
    /// May run every command. The control role's user, unless said otherwise.
    pub admin_users: Vec<String>,
    /// May SHOW.
    pub stats_users: Vec<String>,
}

/// `[pool]`
#[derive(Clone, Debug, PartialEq)]
pub struct Pool {
    pub mode: PoolMode,
    /// Server connections per (database, user, upstream).
    pub size: NonZeroUsize,
    /// Kept open while the pool has clients; at most `size`.
    pub min_size: usize,
    /// So many more for those who have waited `reserve_timeout`.
    pub reserve_size: usize,
    pub reserve_timeout: Duration,
    /// Over all pools of an upstream. `None`: no bound.
    pub max_server_connections: Option<NonZeroUsize>,
    /// Logins to an upstream under way at once.
    pub connects_at_once: NonZeroUsize,
    pub max_clients: NonZeroUsize,
    pub checkout_timeout: Duration,
    /// A client that has waited so long for a server is told. `None`: never.
    pub notice_after: Option<Duration>,
    pub connect_timeout: Duration,
    pub server_idle: Duration,
    pub server_lifetime: Duration,
    /// A server idle for longer is asked whether it still answers before it is lent. `None`: its socket alone is looked at.
    pub server_check: Option<Duration>,
    /// How often host names are looked up anew. `None`: only when a connection is made.
    pub dns_ttl: Option<Duration>,
}

/// `pool.mode`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PoolMode {
    Transaction,
    Session,
}

/// `[route]`
#[derive(Clone, Debug, PartialEq)]
pub struct Route {
    pub reads: Reads,
    pub consistency: Consistency,
    pub replica_wait: Duration,
    pub sample: Duration,
}

/// `route.reads`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reads {
    Pgflow,
    All,
    Off,
}

/// `route.consistency`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Consistency {
    Session,
    Eventual,
    Primary,
}

/// One `[[role]]`: a user, by the name it logs in with.
#[derive(Clone, Debug, PartialEq)]
pub struct Role {
    pub name: String,
    pub terms: RoleTerms,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RoleTerms {
    pub priority: Priority,
    /// In each of its pools; `None`: `pool.size`.
    pub max_servers: Option<NonZeroUsize>,
    /// It may be given older answers under load (`shed.max_stale_ms`).
    pub stale: bool,
}

impl Default for RoleTerms {
    fn default() -> Self {
        Self {
            priority: Priority::Normal,
            max_servers: None,
            stale: true,
        }
    }
}

/// `role.priority`, and what a session may say of itself: who is served first when not all can be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    Low,
    #[default]
    Normal,
    High,
}

impl Priority {
    pub(crate) const ALL: [Self; 3] = [Self::Low, Self::Normal, Self::High];

    /// `None`: another word, or `default`.
    pub(crate) fn of_word(word: &str) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|priority| word.eq_ignore_ascii_case(priority.name()))
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Normal => "normal",
            Self::High => "high",
        }
    }
}

/// `[cache]`: shared reads kept for a while.
#[derive(Clone, Debug, PartialEq)]
pub struct Cache {
    /// Zero: an answer is shared only by those who asked before its query was sent.
    pub max_age: Duration,
    pub max_bytes: usize,
}

/// `[poll]`: idle workers held here instead of in Postgres.
#[derive(Clone, Debug, PartialEq)]
pub struct Poll {
    pub park: bool,
    /// The floor probe of a queue with waiters.
    pub probe: Duration,
}

/// `[shed]`: what gives way under load.
#[derive(Clone, Debug, PartialEq)]
pub struct Shed {
    /// How old an answer may be that is served rather than refused. Zero: none.
    pub max_stale: Duration,
    /// CoDel: the queueing time aimed at, and the window over which it may be missed.
    pub target: Duration,
    pub window: Duration,
    /// No more of an upstream's servers are used at once than its latency says it bears.
    pub adaptive: bool,
}

impl Shed {
    /// When a request that came so long ago is looked at again: what is said of it then is to be heard within the window.
    pub(crate) fn look(&self) -> Duration {
        self.window - self.window / 5
    }
}

/// `[events]`
#[derive(Clone, Debug, PartialEq)]
pub struct Events {
    pub wake: Wake,
    /// Whether the SQL also notifies each channel itself, for listeners that bypass the proxy.
    pub direct_notify: bool,
    pub retention: Duration,
    /// Events a subscriber may lag behind before it is cut or compacted.
    pub queue: NonZeroUsize,
    /// The floor probe of the outbox, should every wake-up be lost.
    pub probe: Duration,
}

/// `events.wake`: how a flowgate learns that the outbox grew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    Observe,
    Notify,
}

/// `[http]`: who may do what over HTTP.
#[derive(Clone, Debug, PartialEq)]
pub struct Http {
    /// Connections served at once; more are refused with 503.
    pub max_connections: NonZeroUsize,
    /// Of the control role, for what is asked over HTTP.
    pub pool_size: NonZeroUsize,
    /// How long a request's head may take, and a connection may be idle.
    pub header_timeout: Duration,
    /// How long a client may read nothing of what waits for it.
    pub write_timeout: Duration,
    /// How often a stream asks again whether it is still allowed.
    pub recheck: Duration,
    pub jwt_secret: Option<Secret>,
    /// Where the public keys are that verify JWTs.
    pub jwks: Option<Jwks>,
    pub api_keys: Vec<ApiKey>,
    /// The role of whoever brings no credentials. `None`: they are refused.
    pub anon_role: Option<String>,
    /// Origins a browser may call from: `*`, or scheme://host[:port].
    pub cors: Vec<String>,
}

/// `http.jwks`: a JSON Web Key Set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Jwks {
    File(PathBuf),
    /// `https` or `http`.
    Url(::url::Url),
}

/// One of `http.api_keys`
#[derive(Clone, Debug, PartialEq)]
pub struct ApiKey {
    pub key: Secret,
    pub role: String,
}

/// `[maintenance]`: chores run by the control role. `None`: not by us.
#[derive(Clone, Debug, PartialEq)]
pub struct Maintenance {
    /// How often stalled tasks are put back into their queue.
    pub requeue: Option<Duration>,
    /// The age at which finished runs are deleted.
    pub prune_after: Option<Duration>,
}

/// A password or key. Only `expose` gives it away; `Debug` shows that it is there.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    pub fn new(text: String) -> Self {
        Self(text)
    }

    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}
