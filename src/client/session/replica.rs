//! Reads on a replica: which one is fresh enough, and the way back to the primary when it refuses, as long as the client has
//! seen nothing of it. Never writes, never holds a replica between requests. Called by `query` and `extended` in `mod.rs`.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, timeout};
use tracing::debug;

use super::explaining::Answered;
use super::{PARTING_MAX, PRIMARY, Session, Source, Touched};
use crate::classify::{Analysis, Effect, RunRef};
use crate::client::error::SessionError;
use crate::client::request::{BatchEnd, Unit};
use crate::config::Consistency;
use crate::pool::checkout::CheckoutError;
use crate::pool::reset;
use crate::relay::{Pause, Phase, RelayError};
use crate::route::{self, Plan, SessionView};
use crate::upstream::Reading;
use crate::wire::frame::FrameError;
use crate::wire::messages::TxStatus;

/// A replica that has all that was acknowledged before `since`.
#[derive(Clone, Copy)]
pub(super) struct Fresh {
    upstream: usize,
    since: Instant,
}

impl Fresh {
    pub(super) fn upstream(self) -> usize {
        self.upstream
    }
}

impl Session {
    /// A replica that has all that this session, and whoever wrote to these runs, must find there.
    pub(super) async fn fresh_replica(&mut self, run: RunRef) -> Option<Fresh> {
        let live = Arc::clone(&self.live);
        let freshness = live.freshness.as_ref()?;
        let strict = live.route.consistency != Consistency::Eventual;
        if strict && self.shared.runs.is_being_written(run) {
            self.shared.counters.replica_not_fresh.inc();
            return None;
        }
        let last = self.last_replica.map(|(replica, _)| replica);
        let mut since = self.floor(run);
        let mut fresh = freshness
            .fresh_replica(since, last, self.replica_wait())
            .await;
        // Another replica than the last one may be behind it, and time must not go back.
        if let (Some(replica), Some((before, answered))) = (fresh, self.last_replica)
            && replica != before
        {
            since = since.max(answered);
            fresh = freshness
                .fresh_replica(since, Some(replica), self.replica_wait())
                .await;
        }
        if fresh.is_none() {
            self.shared.counters.replica_not_fresh.inc();
        }
        fresh.map(|replica| Fresh {
            upstream: replica + 1,
            since,
        })
    }

    /// How long a read waits for a replica. Where the primary has more to do than it can, and may refuse the read, that is part of
    /// the time in which it must say so.
    pub(super) fn replica_wait(&mut self) -> Duration {
        let wait = self.live.replica_wait();
        let Some(came) = self.request.coming.at.filter(|_| !wait.is_zero()) else {
            return wait;
        };
        let overloaded = self.pool(PRIMARY).is_some_and(|pool| pool.is_overloaded());
        if !overloaded || !self.rank().gives_way() {
            return wait;
        }
        let until = came + self.live.config.shed.look();
        wait.min(until.saturating_duration_since(Instant::now()))
    }

    /// What a replica must have replayed for this session's read of `run`.
    pub(super) fn floor(&self, run: RunRef) -> Instant {
        let own = match self.live.route.consistency {
            Consistency::Eventual => self.shared.started,
            Consistency::Session | Consistency::Primary => {
                self.shared.runs.since(run).max(self.seen_until)
            }
        };
        // Those who are to have the same answer have seen more, perhaps.
        self.shared_floor.map_or(own, |others| own.max(others))
    }

    /// Runs the kept Query on a replica. `false`: it did not answer, and nothing has reached the client.
    pub(super) async fn query_replica(
        &mut self,
        fresh: Fresh,
        analysis: &Arc<Analysis>,
    ) -> Result<bool, SessionError> {
        let Some(_reading) = self.hold_replica(fresh).await else {
            return Ok(false);
        };
        self.tell_answered(&Answered::By(fresh.upstream));
        self.exchange.begin(false, Phase::Closed);
        self.exchange.hold = true;
        self.prepared.forget_unnamed();
        if let Some(lease) = self.lease.as_mut() {
            lease.unnamed = None;
            lease.stream.output.extend_from_slice(&self.kept);
            lease.in_flight = true;
        }
        match self.relay().await? {
            Pause::Ready(status) => {
                self.shared.counters.to_replica.inc();
                self.finish_on_replica(analysis.effects.as_slice(), status)
                    .await?;
                Ok(true)
            }
            Pause::Refused => {
                if self.was_a_write() {
                    analysis.refused.note();
                }
                self.leave_refusing_replica().await;
                Ok(false)
            }
            Pause::ClientSpeaks | Pause::Misnamed => Err(SessionError::Frame(FrameError::Length)),
        }
    }

    /// Runs Parse…Sync on a replica, or the part of it up to a Flush and what follows; goes on to the primary when the replica
    /// refuses it, or when a later part is more than a read.
    pub(super) async fn extended_replica(
        &mut self,
        fresh: Fresh,
        len: usize,
        mut end: BatchEnd,
    ) -> Result<(), SessionError> {
        self.keep(len);
        let Some(reading) = self.hold_replica(fresh).await else {
            let len = self.kept.len();
            return Box::pin(self.run_extended(Source::Kept, len, end)).await;
        };
        self.tell_answered(&Answered::By(fresh.upstream));
        let mut next_part = true;
        self.begin_extended();
        loop {
            let confirmed = self.exchange.confirmed;
            if std::mem::take(&mut next_part) {
                // A request that pauses for the client's next messages must show what it has said so far.
                self.exchange.hold = end == BatchEnd::Sync;
                self.put_batch(Source::Kept, self.kept.len(), end);
            }
            match self.relay().await? {
                Pause::Ready(status) => {
                    self.shared.counters.to_replica.inc();
                    let effects = std::mem::take(&mut self.request.effects);
                    return self.finish_on_replica(&effects, status).await;
                }
                Pause::Refused => {
                    // What was held back has been thrown away, its confirmations too.
                    self.prepared.settle(confirmed, None);
                    if self.was_a_write() {
                        for (analysis, _) in &self.survey.bound {
                            analysis.refused.note();
                        }
                    }
                    self.leave_refusing_replica().await;
                    drop(reading);
                    let len = self.kept.len();
                    self.take_survey(Source::Kept, len, end);
                    return Box::pin(self.run_extended(Source::Kept, len, end)).await;
                }
                Pause::Misnamed => return Err(SessionError::Relay(RelayError::ServerMalformed)),
                Pause::ClientSpeaks if self.request.remainder.is_some() => self.put_more().await?,
                // After an error the server ignores all up to the Sync; what has been bound can go nowhere else.
                Pause::ClientSpeaks if self.exchange.error.is_some() || self.request.bound > 0 => {
                    self.put_more().await?;
                }
                Pause::ClientSpeaks => {
                    let Unit::Batch { len, end: next } =
                        self.grouping.next_open(self.client.input.bytes())?
                    else {
                        drop(reading);
                        return Box::pin(self.move_to_primary(0, BatchEnd::Flush)).await;
                    };
                    self.take_survey(Source::Input, len, next);
                    if !self.still_reads(next) {
                        drop(reading);
                        return Box::pin(self.move_to_primary(len, next)).await;
                    }
                    self.keep(len);
                    end = next;
                    next_part = true;
                }
            }
        }
    }

    /// Whether a request, or the next part of one that began as a read, is one that a replica may take: nothing is bound
    /// there but to be run to the request's end.
    pub(super) fn still_reads(&self, end: BatchEnd) -> bool {
        let reads = |analysis: &Arc<Analysis>| matches!(self.read_plan(analysis), Plan::Read(_));
        let whole = end == BatchEnd::Sync || end == BatchEnd::Flush && self.survey.bound.is_empty();
        whole
            && self.survey.parsed.iter().all(reads)
            && self
                .survey
                .bound
                .iter()
                .all(|(analysis, _)| reads(analysis))
    }

    fn read_plan(&self, analysis: &Analysis) -> Plan {
        route::plan(analysis, SessionView::Free, self.live.route)
    }

    /// A request that began on a replica with nothing but Parse and Describe goes on elsewhere: nothing has run yet.
    async fn move_to_primary(&mut self, len: usize, end: BatchEnd) -> Result<(), SessionError> {
        let there = self.lease.as_ref().map(|lease| &lease.statements);
        self.prepared.settle(self.exchange.confirmed, there);
        self.close_books();
        if let Some(mut lease) = self.lease.take() {
            let settled = timeout(PARTING_MAX, reset::sync(&mut lease)).await;
            self.key.slot.release().await;
            if matches!(settled, Ok(Ok(())))
                && let Some(clean) = reset::prove(&lease)
            {
                lease.check_in(clean, Some(self.id), Instant::now());
            }
        }
        self.run_extended(Source::Input, len, end).await
    }

    /// `None`: it is not to be had, or not known to be fresh any more, so the primary answers.
    async fn hold_replica(&mut self, fresh: Fresh) -> Option<Reading> {
        let Fresh { upstream, since } = fresh;
        let live = Arc::clone(&self.live);
        let reading = live.upstreams.get(upstream)?.read_begins();
        if let Err(error) = self.hold(upstream).await {
            debug!(upstream, %error, "replica gave no connection, so the primary answers");
            self.shared.counters.replica_refused.inc();
            self.request.cancelled = matches!(error, CheckoutError::Cancelled);
            return None;
        }
        let (opened, replica) = (self.lease.as_ref()?.opened_at, upstream.checked_sub(1)?);
        let freshness = live.freshness.as_ref()?;
        // The connection may be to a later life of the replica, which begins behind what was seen of the last one.
        if freshness
            .still_fresh(replica, since, opened, self.replica_wait())
            .await
        {
            return Some(reading);
        }
        self.shared.counters.replica_not_fresh.inc();
        self.close_books();
        self.check_in(Instant::now()).await;
        None
    }

    /// The replica refused because it would have had to write: it always will.
    fn was_a_write(&self) -> bool {
        self.exchange.error == Some(*b"25006")
    }

    async fn leave_refusing_replica(&mut self) {
        self.shared.counters.replica_refused.inc();
        self.exchange.error = None;
        self.close_books();
        self.check_in(Instant::now()).await;
    }

    async fn finish_on_replica(
        &mut self,
        effects: &[Effect],
        status: TxStatus,
    ) -> Result<(), SessionError> {
        // What a replica reports of itself is not the client's session.
        self.exchange.parameters_changed = false;
        self.finish(effects, 1, TxStatus::Idle, status).await?;
        self.last_replica = self.replica.map(|replica| (replica, Instant::now()));
        // Another replica may be behind this one, so what it showed is a floor for whoever asks another.
        let touched = self.transaction.touched.take();
        let touched = touched.unwrap_or(Touched::ANYTHING);
        if self.live.upstreams.len() > 2 {
            self.shared.runs.seen(touched.run);
        }
        Ok(())
    }
}
