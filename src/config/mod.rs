//! The checked configuration: what every other module may rely on. Spelling lives in `raw.rs`, the checks in
//! `check.rs`; after them nobody validates. Knows nothing of sockets. Built by `commands/`, read by all.

mod check;
mod raw;
mod url;

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

pub use check::{ConfigError, Problem, from_sources};
pub use url::{ConnectUrl, SslMode};

/// Everything an operator can say, checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub listen: Listen,
    pub primary: ConnectUrl,
    pub replicas: Vec<ConnectUrl>,
    pub auth: Auth,
    pub pool: Pool,
    pub route: Route,
    pub events: Events,
    pub log: String,
}

/// `[listen]`: where clients come in.
#[derive(Clone, Debug, PartialEq)]
pub struct Listen {
    pub postgres: SocketAddr,
    /// `None`: no HTTP at all (`http = "off"`).
    pub http: Option<SocketAddr>,
    pub tls: ClientTls,
    pub tls_cert: Option<PathBuf>,
    pub tls_key: Option<PathBuf>,
    pub tls_client_ca: Option<PathBuf>,
    /// Data-plane threads, each a whole runtime with its own acceptor.
    pub threads: NonZeroUsize,
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

/// `[pool]`
#[derive(Clone, Debug, PartialEq)]
pub struct Pool {
    pub mode: PoolMode,
    /// Server connections per (database, user, upstream).
    pub size: NonZeroUsize,
    pub max_clients: NonZeroUsize,
    pub checkout_timeout: Duration,
    pub connect_timeout: Duration,
    pub server_idle: Duration,
    pub server_lifetime: Duration,
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

/// `[events]`
#[derive(Clone, Debug, PartialEq)]
pub struct Events {
    pub retention: Duration,
    /// Events a subscriber may lag behind before it is cut or compacted.
    pub queue: NonZeroUsize,
    /// The floor probe of the outbox, should every wake-up be lost.
    pub probe: Duration,
}
