//! What passed through the pools of one database and how long it took: counters that sessions add to at the end of each
//! request, and their averages over the last period. Decides nothing; the console reads it.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Averages are those of the last period that is over; of the time so far until there is one.
pub(crate) const PERIOD: Duration = Duration::from_secs(60);

/// Of one database, since the proxy was started.
pub(crate) struct DatabaseStats {
    /// Servers lent to clients.
    pub(crate) assignments: AtomicU64,
    pub(crate) transactions: AtomicU64,
    pub(crate) requests: AtomicU64,
    /// Bytes from clients, and to them.
    pub(crate) received: AtomicU64,
    pub(crate) sent: AtomicU64,
    pub(crate) transaction_us: AtomicU64,
    pub(crate) request_us: AtomicU64,
    pub(crate) wait_us: AtomicU64,
    /// Statements prepared by clients, and those prepared on servers for them.
    pub(crate) client_parses: AtomicU64,
    pub(crate) server_parses: AtomicU64,
    pub(crate) binds: AtomicU64,
    period: Mutex<Period>,
}

struct Period {
    begin: (Instant, Totals),
    end: Option<(Instant, Totals)>,
}

/// A reading of the counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Totals {
    pub(crate) assignments: u64,
    pub(crate) transactions: u64,
    pub(crate) requests: u64,
    pub(crate) received: u64,
    pub(crate) sent: u64,
    pub(crate) transaction_us: u64,
    pub(crate) request_us: u64,
    pub(crate) wait_us: u64,
    pub(crate) client_parses: u64,
    pub(crate) server_parses: u64,
    pub(crate) binds: u64,
}

impl Totals {
    fn zip(self, other: Self, with: impl Fn(u64, u64) -> u64) -> Self {
        Self {
            assignments: with(self.assignments, other.assignments),
            transactions: with(self.transactions, other.transactions),
            requests: with(self.requests, other.requests),
            received: with(self.received, other.received),
            sent: with(self.sent, other.sent),
            transaction_us: with(self.transaction_us, other.transaction_us),
            request_us: with(self.request_us, other.request_us),
            wait_us: with(self.wait_us, other.wait_us),
            client_parses: with(self.client_parses, other.client_parses),
            server_parses: with(self.server_parses, other.server_parses),
            binds: with(self.binds, other.binds),
        }
    }

    pub(crate) fn plus(self, other: Self) -> Self {
        self.zip(other, u64::wrapping_add)
    }

    /// Counts and bytes a second; times, each of what it is the time of.
    fn over(self, span: Duration) -> Self {
        let ms = u64::try_from(span.as_millis()).unwrap_or(u64::MAX).max(1);
        let a_second = |count: u64| count.saturating_mul(1_000) / ms;
        let each = |us: u64, count: u64| us / count.max(1);
        Self {
            assignments: a_second(self.assignments),
            transactions: a_second(self.transactions),
            requests: a_second(self.requests),
            received: a_second(self.received),
            sent: a_second(self.sent),
            transaction_us: each(self.transaction_us, self.transactions),
            request_us: each(self.request_us, self.requests),
            wait_us: each(self.wait_us, self.assignments),
            client_parses: a_second(self.client_parses),
            server_parses: a_second(self.server_parses),
            binds: a_second(self.binds),
        }
    }
}

impl DatabaseStats {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            assignments: AtomicU64::new(0),
            transactions: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            received: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            transaction_us: AtomicU64::new(0),
            request_us: AtomicU64::new(0),
            wait_us: AtomicU64::new(0),
            client_parses: AtomicU64::new(0),
            server_parses: AtomicU64::new(0),
            binds: AtomicU64::new(0),
            period: Mutex::new(Period {
                begin: (now, Totals::default()),
                end: None,
            }),
        }
    }

    pub(crate) fn totals(&self) -> Totals {
        Totals {
            assignments: self.assignments.load(Relaxed),
            transactions: self.transactions.load(Relaxed),
            requests: self.requests.load(Relaxed),
            received: self.received.load(Relaxed),
            sent: self.sent.load(Relaxed),
            transaction_us: self.transaction_us.load(Relaxed),
            request_us: self.request_us.load(Relaxed),
            wait_us: self.wait_us.load(Relaxed),
            client_parses: self.client_parses.load(Relaxed),
            server_parses: self.server_parses.load(Relaxed),
            binds: self.binds.load(Relaxed),
        }
    }

    pub(crate) fn averages(&self, now: Instant) -> Totals {
        let period = self.period.lock().unwrap_or_else(PoisonError::into_inner);
        let (began, before) = period.begin;
        let (ended, after) = period.end.unwrap_or_else(|| (now, self.totals()));
        drop(period);
        let change = after.zip(before, u64::wrapping_sub);
        change.over(ended.saturating_duration_since(began))
    }

    /// Called now and then; ends the period once it is over.
    pub(crate) fn tick(&self, now: Instant) {
        let mut period = self.period.lock().unwrap_or_else(PoisonError::into_inner);
        let (latest, _) = period.end.unwrap_or(period.begin);
        if now.saturating_duration_since(latest) >= PERIOD {
            if let Some(end) = period.end {
                period.begin = end;
            }
            period.end = Some((now, self.totals()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn averages_are_those_of_the_last_whole_period() {
        let start = Instant::now();
        let stats = DatabaseStats::new(start);
        stats.requests.store(100, Relaxed);
        stats.request_us.store(5_000, Relaxed);
        let so_far = stats.averages(start + Duration::from_secs(10));
        assert_eq!((so_far.requests, so_far.request_us), (10, 50));
        stats.requests.store(600, Relaxed);
        stats.tick(start + PERIOD / 2);
        stats.tick(start + PERIOD);
        stats.requests.store(900, Relaxed);
        let now = start + PERIOD + PERIOD / 2;
        assert_eq!(stats.averages(now).requests, 10, "not what came later");
        stats.tick(now);
        stats.tick(start + PERIOD * 2);
        assert_eq!(stats.averages(now).requests, 5);
        assert_eq!(stats.totals().requests, 900);
    }
}
