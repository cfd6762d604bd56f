//! What every client's task is given: handles to the mechanisms, and the counters of what went where. Built once by
//! `app.rs`; holds no state of its own beyond counters.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::sync::{mpsc, oneshot, watch};

use super::habits::Habits;
use super::live::{Live, Standing};
use super::peers::Peers;
use super::prepared::StatementRegistry;
use super::replication::Replications;
use super::roster::Roster;
use super::run_tokens::RunTokens;
use super::state::{PIN_REASONS, PinReason, Pins};
use crate::cancel::CancelRegistry;
use crate::coalesce::Flights;
use crate::events::Hubs;
use crate::metrics::{Counter, Gauge, Registry};
use crate::park::Park;
use crate::pool::checkout::ClientIds;
use crate::pool::pools::Pools;

/// What the console asks of whoever runs the process.
pub(crate) enum Order {
    /// Reads the configuration again.
    Reload(oneshot::Sender<Result<Reloaded, NotReloaded>>),
    Shutdown(Manner),
}

/// How to end, the most patient first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Manner {
    /// No new clients; the end comes when the last one leaves.
    WhenClientsLeft,
    /// No new clients, no new transactions; the end comes with the last transaction's.
    WhenServersFree,
    /// As before, but for no longer than `listen.drain_timeout`.
    Drain,
    Now,
}

/// A reload took place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reloaded {
    /// Keys that differ and keep their old values until a restart.
    pub need_restart: Vec<&'static str>,
}

/// Nothing was changed: every reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotReloaded {
    pub problems: Vec<String>,
}

pub(crate) struct Shared {
    /// Whether we go on, and by what configuration.
    pub(crate) standing: watch::Receiver<Standing>,
    pub(crate) orders: mpsc::Sender<Order>,
    pub(crate) pools: Arc<Pools>,
    pub(crate) cancels: Arc<CancelRegistry>,
    pub(crate) peers: Peers,
    pub(crate) replications: Replications,
    pub(crate) clients: ClientIds,
    pub(crate) roster: Arc<Roster>,
    pub(crate) seats: Seats,
    pub(crate) statements: StatementRegistry,
    pub(crate) hubs: Arc<Hubs>,
    pub(crate) runs: Arc<RunTokens>,
    pub(crate) park: Arc<Park>,
    pub(crate) flights: Arc<Flights>,
    /// When the proxy was started.
    pub(crate) started: tokio::time::Instant,
    /// Some client has asked for the value it drew from a sequence.
    pub(crate) asks_for_draws: AtomicBool,
    /// What code out of sight is known to leave.
    pub(crate) habits: Habits,
    pub(crate) counters: Counters,
}

impl Shared {
    /// The configuration in force. Sessions keep one; this is for what happens once a connection.
    pub(crate) fn live(&self) -> Arc<Live> {
        Arc::clone(&self.standing.borrow().live)
    }
}

/// Places for clients, `pool.max_clients` of them.
pub(crate) struct Seats {
    taken: AtomicUsize,
    places: AtomicUsize,
}

impl Seats {
    pub(crate) fn new(places: usize) -> Self {
        Self {
            taken: AtomicUsize::new(0),
            places: AtomicUsize::new(places),
        }
    }

    /// From now on; who has a seat keeps it.
    pub(crate) fn resize(&self, places: usize) {
        self.places.store(places, Ordering::Relaxed);
    }

    pub(crate) fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }

    /// A seat, unless all are taken.
    pub(crate) fn take(shared: &Arc<Shared>) -> Option<Seat> {
        let seats = &shared.seats;
        let taken = seats.taken.fetch_add(1, Ordering::Relaxed);
        shared.counters.clients.add(1);
        let seat = Seat(Arc::clone(shared));
        (taken < seats.places.load(Ordering::Relaxed)).then_some(seat)
    }
}

/// One client's place; dropping it frees it.
pub(crate) struct Seat(Arc<Shared>);

impl Drop for Seat {
    fn drop(&mut self) {
        self.0.seats.taken.fetch_sub(1, Ordering::Relaxed);
        self.0.counters.clients.sub(1);
    }
}

/// What went where.
pub(crate) struct Counters {
    pub(crate) clients: Arc<Gauge>,
    pub(crate) logins: Arc<Counter>,
    pub(crate) logins_failed: Arc<Counter>,
    pub(crate) refused_full: Arc<Counter>,
    /// Requests by where they went.
    pub(crate) to_primary: Arc<Counter>,
    pub(crate) to_replica: Arc<Counter>,
    pub(crate) answered_here: Arc<Counter>,
    /// Servers asked what a body left on them.
    pub(crate) probes: Arc<Counter>,
    /// Reads that might have gone to a replica, and why they did not.
    pub(crate) replica_not_fresh: Arc<Counter>,
    pub(crate) replica_refused: Arc<Counter>,
    pub(crate) cancels: Arc<Counter>,
    pub(crate) notifications: Arc<Counter>,
    pub(crate) protocol_errors: Arc<Counter>,
    /// Connections closed for their PROXY header.
    pub(crate) proxy_untrusted: Arc<Counter>,
    pub(crate) proxy_malformed: Arc<Counter>,
    /// Logins no access rule lets in.
    pub(crate) access_refused: Arc<Counter>,
    pins: Vec<(PinReason, Arc<Counter>)>,
}

impl Counters {
    pub(crate) fn new(registry: &Registry) -> Self {
        let counter = |name, help| registry.counter(name, help, &[]);
        let requests = |to| {
            registry.counter(
                "flowgate_requests_total",
                "requests by where they were answered",
                &[("to", to)],
            )
        };
        let proxied = |why| {
            let help = "connections closed because of their PROXY header";
            registry.counter(
                "flowgate_proxy_headers_refused_total",
                help,
                &[("why", why)],
            )
        };
        let kept = |why| {
            let help = "workflow reads that went to the primary although replicas exist";
            registry.counter("flowgate_reads_kept_total", help, &[("why", why)])
        };
        let pin = |&(reason, name): &(PinReason, &str)| {
            let help = "clients tied to one server, by reason";
            (
                reason,
                registry.counter("flowgate_pins_total", help, &[("reason", name)]),
            )
        };
        Self {
            clients: registry.gauge("flowgate_clients", "clients connected", &[]),
            logins: counter("flowgate_logins_total", "clients logged in"),
            logins_failed: counter("flowgate_logins_failed_total", "logins refused"),
            refused_full: counter(
                "flowgate_clients_refused_total",
                "clients refused because pool.max_clients were connected",
            ),
            to_primary: requests("primary"),
            to_replica: requests("replica"),
            answered_here: requests("flowgate"),
            probes: counter(
                "flowgate_probes_total",
                "servers asked what code that is not in a statement's text left on them",
            ),
            replica_not_fresh: kept("not_fresh"),
            replica_refused: kept("refused"),
            cancels: counter("flowgate_cancels_total", "cancel requests received"),
            notifications: counter(
                "flowgate_notifications_total",
                "notifications written to clients",
            ),
            protocol_errors: counter(
                "flowgate_protocol_errors_total",
                "connections closed because the client broke the protocol",
            ),
            proxy_untrusted: proxied("untrusted"),
            proxy_malformed: proxied("malformed"),
            access_refused: counter(
                "flowgate_access_refused_total",
                "logins that no access rule lets in",
            ),
            pins: PIN_REASONS.iter().map(pin).collect(),
        }
    }

    /// Counts the reasons that are new.
    pub(crate) fn count_pins(&self, before: Pins, now: Pins) {
        let new = now.without(before);
        if new.is_empty() {
            return;
        }
        for (_, counter) in self.pins.iter().filter(|(reason, _)| new.contains(*reason)) {
            counter.inc();
        }
    }

    pub(crate) fn pins(&self) -> impl Iterator<Item = (&'static str, u64)> {
        let name = |reason| {
            PIN_REASONS
                .iter()
                .find(|(known, _)| *known == reason)
                .map_or("", |(_, name)| name)
        };
        self.pins
            .iter()
            .map(move |(reason, counter)| (name(*reason), counter.get()))
    }
}
