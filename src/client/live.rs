//! What a reload changes: the configuration in force and what was made of it. Sessions hold one `Live` at a time and adopt
//! the next between requests. Built by `app.rs`, which owns the `watch`; read by everybody here.

use std::sync::Arc;
use std::time::Duration;

use super::entrance::Entrance;
use super::verifiers::Verifiers;
use crate::classify::Classifier;
use crate::config::Config;
use crate::pool::probe::Freshness;
use crate::route::RouteSettings;
use crate::upstream::Upstream;

/// How far a shutdown has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Running {
    Serving,
    /// No new clients; those there are stay as long as they like.
    Leaving,
    /// No new clients, no new transactions.
    Draining,
    /// Time is up for what is still open.
    Stopping,
}

/// What all clients are told: whether we go on, and by what configuration.
#[derive(Clone)]
pub(crate) struct Standing {
    pub(crate) running: Running,
    pub(crate) live: Arc<Live>,
}

pub(crate) struct Live {
    pub(crate) config: Arc<Config>,
    /// Each connection takes it once.
    pub(crate) entrance: Arc<Entrance>,
    pub(crate) verifiers: Arc<Verifiers>,
    pub(crate) classifier: Arc<Classifier>,
    /// The primary, then the replicas.
    pub(crate) upstreams: Arc<[Arc<Upstream>]>,
    /// `None`: no replicas.
    pub(crate) freshness: Option<Freshness>,
    pub(crate) route: RouteSettings,
}

impl Live {
    pub(crate) fn replica_wait(&self) -> Duration {
        self.config.route.replica_wait
    }
}

/// What a user may do in the admin console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ConsoleRole {
    Admin,
    /// SHOW alone.
    Stats,
}

impl ConsoleRole {
    /// `None`: nothing, not even log in.
    pub(crate) fn of(user: &str, config: &Config) -> Option<Self> {
        let named = |users: &[String]| users.iter().any(|name| name == user);
        if named(&config.console.admin_users) {
            Some(Self::Admin)
        } else if named(&config.console.stats_users) {
            Some(Self::Stats)
        } else {
            None
        }
    }
}
