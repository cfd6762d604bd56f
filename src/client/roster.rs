//! Who is logged in, and what each of them is at: for the console, which shows it and may end them. A session writes its
//! own entry, by a few relaxed stores a request; nobody is locked for being shown. Decides nothing.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::state::Pins;
use crate::cancel::CancelSlot;
use crate::server::conn::micros;
use crate::server::parameters::Opening;
use crate::wire::startup::ReplicationMode;
use crate::wire::stream::Stream;

/// Everybody who is logged in.
#[derive(Default)]
pub(crate) struct Roster {
    entries: Mutex<BTreeMap<u64, Arc<Entry>>>,
    /// Somebody left.
    left: Notify,
}

/// One client.
pub(crate) struct Entry {
    pub(crate) id: u64,
    pub(crate) opening: Arc<Opening>,
    pub(crate) kind: Kind,
    /// Whom a balancer names, if one stands before us.
    pub(crate) peer: SocketAddr,
    pub(crate) local: Option<SocketAddr>,
    /// Version and cipher; empty without TLS.
    pub(crate) tls: String,
    pub(crate) connected_at: Instant,
    pub(crate) slot: Arc<CancelSlot>,
    application_name: Mutex<String>,
    /// In µs since `connected_at`: the last request, and the begin of the wait for a server (0: none).
    request_us: AtomicU64,
    waiting_us: AtomicU64,
    /// The number of the server in hand; 0: none.
    server: AtomicU64,
    statements: AtomicUsize,
    pins: AtomicU16,
    killed: AtomicBool,
    kill: Notify,
}

/// What a client is here for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Session,
    /// On a server of its own, outside the pools.
    Replication(ReplicationMode),
    /// An admin, or who may look.
    Console,
}

/// Who comes in.
pub(crate) struct Newcomer<'a> {
    pub(crate) id: u64,
    pub(crate) kind: Kind,
    pub(crate) peer: SocketAddr,
    pub(crate) opening: &'a Arc<Opening>,
    pub(crate) application_name: &'a str,
    pub(crate) slot: &'a Arc<CancelSlot>,
    pub(crate) client: &'a Stream,
}

/// A client's place on the roster, until dropped.
pub(crate) struct Listed {
    roster: Arc<Roster>,
    entry: Arc<Entry>,
}

impl Roster {
    pub(crate) fn enter(self: &Arc<Self>, new: Newcomer<'_>) -> Listed {
        let transport = new.client.transport();
        let id = new.id;
        let entry = Arc::new(Entry {
            id,
            opening: Arc::clone(new.opening),
            kind: new.kind,
            peer: new.peer,
            local: transport.tcp().and_then(|tcp| tcp.local_addr().ok()),
            tls: transport.tls_words(),
            connected_at: Instant::now(),
            slot: Arc::clone(new.slot),
            application_name: Mutex::new(new.application_name.to_owned()),
            request_us: AtomicU64::new(0),
            waiting_us: AtomicU64::new(0),
            server: AtomicU64::new(0),
            statements: AtomicUsize::new(0),
            pins: AtomicU16::new(0),
            killed: AtomicBool::new(false),
            kill: Notify::new(),
        });
        lock(&self.entries).insert(id, Arc::clone(&entry));
        Listed {
            roster: Arc::clone(self),
            entry,
        }
    }

    /// In the order they came.
    pub(crate) fn all(&self) -> Vec<Arc<Entry>> {
        lock(&self.entries).values().cloned().collect()
    }

    /// `false`: there is no such client.
    pub(crate) fn kill(&self, id: u64) -> bool {
        let entry = lock(&self.entries).get(&id).cloned();
        entry.is_some_and(|entry| {
            entry.kill();
            true
        })
    }

    /// Ends every client of a database (`None`: of any), but for the console's.
    pub(crate) fn kill_all(&self, database: Option<&str>) {
        let inside = |entry: &&Arc<Entry>| match (entry.kind, database) {
            (Kind::Console, _) => false,
            (_, None) => true,
            // That of the whole server is no database's.
            (Kind::Replication(ReplicationMode::Physical), Some(_)) => false,
            (_, Some(database)) => entry.opening.database == database,
        };
        self.all()
            .iter()
            .filter(inside)
            .for_each(|entry| entry.kill());
    }

    /// Returns once nobody is left but in the console.
    pub(crate) async fn only_console(&self) {
        loop {
            let mut left = std::pin::pin!(self.left.notified());
            left.as_mut().enable();
            let console = |entry: &Arc<Entry>| entry.kind == Kind::Console;
            if lock(&self.entries).values().all(console) {
                return;
            }
            left.await;
        }
    }
}

impl Entry {
    fn since(&self, at: Instant) -> u64 {
        micros(at.saturating_duration_since(self.connected_at))
    }

    pub(crate) fn note_request(&self, now: Instant) {
        self.request_us.store(self.since(now), Relaxed);
    }

    pub(crate) fn last_request(&self) -> Instant {
        self.connected_at + Duration::from_micros(self.request_us.load(Relaxed))
    }

    pub(crate) fn note_waiting(&self, since: Option<Instant>) {
        let us = since.map_or(0, |since| self.since(since).max(1));
        self.waiting_us.store(us, Relaxed);
    }

    pub(crate) fn waiting_since(&self) -> Option<Instant> {
        match self.waiting_us.load(Relaxed) {
            0 => None,
            us => Some(self.connected_at + Duration::from_micros(us)),
        }
    }

    /// 0: none.
    pub(crate) fn note_server(&self, id: u64) {
        self.server.store(id, Relaxed);
    }

    pub(crate) fn server(&self) -> Option<u64> {
        Some(self.server.load(Relaxed)).filter(|id| *id != 0)
    }

    pub(crate) fn note_statements(&self, count: usize) {
        self.statements.store(count, Relaxed);
    }

    pub(crate) fn statements(&self) -> usize {
        self.statements.load(Relaxed)
    }

    pub(crate) fn note_pins(&self, pins: Pins) {
        self.pins.store(pins.bits(), Relaxed);
    }

    pub(crate) fn pins(&self) -> Pins {
        Pins::of_bits(self.pins.load(Relaxed))
    }

    pub(crate) fn rename(&self, application_name: &str) {
        let mut name = lock(&self.application_name);
        if *name != application_name {
            application_name.clone_into(&mut name);
        }
    }

    pub(crate) fn application_name(&self) -> String {
        lock(&self.application_name).clone()
    }

    fn kill(&self) {
        self.killed.store(true, Relaxed);
        self.kill.notify_one();
    }

    pub(crate) fn is_killed(&self) -> bool {
        self.killed.load(Relaxed)
    }

    /// Resolves when an admin ends this client.
    pub(crate) async fn killed(&self) {
        while !self.is_killed() {
            self.kill.notified().await;
        }
    }
}

impl Listed {
    pub(crate) fn entry(&self) -> &Arc<Entry> {
        &self.entry
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        lock(&self.roster.entries).remove(&self.entry.id);
        self.roster.left.notify_waiters();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
