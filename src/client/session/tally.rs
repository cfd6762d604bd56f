//! What a session's requests and transactions amount to, told to its database's counters at the end of each request and to
//! the roster as it happens: a few relaxed stores, no lock, no allocation. Called by `mod.rs` and `servers.rs`.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::time::Instant;

use crate::pool::stats::DatabaseStats;
use crate::server::conn::micros;
use crate::wire::stream::Stream;

pub(super) struct Tally {
    stats: Arc<DatabaseStats>,
    request_began: Instant,
    transaction_began: Instant,
    /// Of the client's bytes, what has been told.
    received: u64,
    sent: u64,
}

impl Tally {
    pub(super) fn new(stats: &Arc<DatabaseStats>) -> Self {
        let now = Instant::now();
        Self {
            stats: Arc::clone(stats),
            request_began: now,
            transaction_began: now,
            received: 0,
            sent: 0,
        }
    }

    /// A request is about to be sent to its server.
    pub(super) fn begin(&mut self, now: Instant, opens_transaction: bool) {
        self.request_began = now;
        if opens_transaction {
            self.transaction_began = now;
        }
    }

    /// A server was lent after this wait.
    pub(super) fn lent(&self, waited: Duration) {
        self.stats.assignments.fetch_add(1, Relaxed);
        if !waited.is_zero() {
            self.stats.wait_us.fetch_add(micros(waited), Relaxed);
        }
    }

    /// How long the request has been under way.
    pub(super) fn took(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.request_began)
    }

    pub(super) fn ended(&mut self, now: Instant, ends_transaction: bool, client: &Stream) {
        let stats = &self.stats;
        stats.requests.fetch_add(1, Relaxed);
        let took = micros(self.took(now));
        stats.request_us.fetch_add(took, Relaxed);
        if ends_transaction {
            stats.transactions.fetch_add(1, Relaxed);
            let took = micros(now.saturating_duration_since(self.transaction_began));
            stats.transaction_us.fetch_add(took, Relaxed);
        }
        stats
            .received
            .fetch_add(client.received - self.received, Relaxed);
        stats.sent.fetch_add(client.sent - self.sent, Relaxed);
        (self.received, self.sent) = (client.received, client.sent);
    }

    /// Parse messages of the client's, those its server got, and Binds.
    pub(super) fn prepared(&self, by_client: usize, on_server: usize, binds: usize) {
        for (counter, count) in [
            (&self.stats.client_parses, by_client),
            (&self.stats.server_parses, on_server),
            (&self.stats.binds, binds),
        ] {
            if count > 0 {
                counter.fetch_add(count as u64, Relaxed);
            }
        }
    }
}
