//! A configured Postgres: its name, its role, its health and lag as last seen. Decides nothing: `pool/probe.rs` writes
//! what it sees here, routing, metrics and the console read it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crate::config::ConnectUrl;

/// What a configured Postgres is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Role {
    Primary,
    Replica,
}

/// Numbers upstreams, the primary 0; a number never comes to stand for another Postgres.
pub(crate) type UpstreamId = usize;
pub(crate) const PRIMARY: UpstreamId = 0;

/// A configured Postgres and what was last seen of it.
#[derive(Debug)]
pub(crate) struct Upstream {
    pub(crate) id: UpstreamId,
    pub(crate) name: String,
    pub(crate) role: Role,
    pub(crate) url: ConnectUrl,
    healthy: AtomicBool,
    /// Primary: insert position. Replica: replayed position. 0: never seen.
    lsn: AtomicU64,
    lag_bytes: AtomicU64,
    /// Reads under way there.
    reading: AtomicU32,
}

impl Upstream {
    pub(crate) fn new(id: UpstreamId, url: ConnectUrl) -> Self {
        let (role, name) = match id {
            PRIMARY => (Role::Primary, "primary".to_owned()),
            replica => (Role::Replica, format!("replica-{replica}")),
        };
        Self {
            id,
            name,
            role,
            url,
            healthy: AtomicBool::new(false),
            lsn: AtomicU64::new(0),
            lag_bytes: AtomicU64::new(0),
            reading: AtomicU32::new(0),
        }
    }

    /// One read more is under way there, until what this returns is dropped.
    pub(crate) fn read_begins(self: &Arc<Self>) -> Reading {
        self.reading.fetch_add(1, Ordering::Relaxed);
        Reading(Arc::clone(self))
    }

    pub(crate) fn reading(&self) -> u32 {
        self.reading.load(Ordering::Relaxed)
    }

    /// In rotation: reachable, in the role it is configured for, and of the primary's history.
    pub(crate) fn is_healthy(&self) -> bool {
        self.healthy.load(Ordering::Acquire)
    }

    /// Returns what it was before, so that a transition is logged once.
    pub(crate) fn set_healthy(&self, healthy: bool) -> bool {
        self.healthy.swap(healthy, Ordering::AcqRel)
    }

    pub(crate) fn lsn(&self) -> u64 {
        self.lsn.load(Ordering::Relaxed)
    }

    pub(crate) fn set_lsn(&self, lsn: u64) {
        self.lsn.store(lsn, Ordering::Relaxed);
    }

    /// WAL bytes a replica has yet to replay, as last seen.
    pub(crate) fn lag_bytes(&self) -> u64 {
        self.lag_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn set_lag_bytes(&self, bytes: u64) {
        self.lag_bytes.store(bytes, Ordering::Relaxed);
    }
}

/// A read under way at a replica.
#[derive(Debug)]
pub(crate) struct Reading(Arc<Upstream>);

impl Drop for Reading {
    fn drop(&mut self) {
        self.0.reading.fetch_sub(1, Ordering::Relaxed);
    }
}
