//! How many sockets the process may open: raises the soft limit to the hard one, and says so when even that is too little for what
//! the configuration allows. Called by `serve.rs`.

use rustix::process::{Resource, getrlimit, setrlimit};
use tracing::{debug, warn};

use crate::config::Config;

/// Listeners, the control role's connections, the runtime's own.
const OURS: u64 = 100;

pub(super) fn make_room(config: &Config) {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            debug!(%error, "the soft limit of open files stays");
            limit = getrlimit(Resource::Nofile);
        }
    }
    let needed = needed(config);
    if let Some(allowed) = limit.current.filter(|allowed| *allowed < needed) {
        warn!(
            allowed,
            needed,
            "fewer files may be open than pool.max_clients, http.max_connections and the pools can take: raise `ulimit -n`"
        );
    }
}

/// One pool a upstream; more (databases, users) are not known yet.
fn needed(config: &Config) -> u64 {
    let upstreams = 1 + config.replicas.len();
    let http = config
        .listen
        .http
        .map_or(0, |_| config.http.max_connections.get());
    let all = config.pool.max_clients.get() + http + upstreams * config.pool.size.get();
    u64::try_from(all).map_or(u64::MAX, |all| all.saturating_add(OURS))
}
