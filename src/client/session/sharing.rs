//! Reads that others ask for in the same moment: one of them asks Postgres, the others get its answer word for word; and reads
//! that are answered from memory, where the operator allows it. Says what makes two reads the same: the messages and everything of
//! the session that Postgres' answer could depend on. Called by `query` and `extended` in `mod.rs` for what `route` calls a read.
//!
//! When a kept answer will do (`cache.max_age_ms`): it is no older than that; nothing that this proxy has seen has changed its runs since it
//! was asked for; it shows all that the session has done and been shown, or is the very answer it was shown last. So nobody's
//! time goes back. Under load (`shed.max_stale_ms`) it need only show what the session itself has written, and says how old it is.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use memchr::memmem;
use tokio::time::Instant;

use super::explaining::Answered;
use super::parking::Batch;
use super::{PRIMARY, Session, Source};
use crate::classify::{Analysis, RunRef};
use crate::client::error::{SessionError, no_server, old_answer};
use crate::client::request::{BatchEnd, frames};
use crate::coalesce::{Answer, Leader, Outcome, Seat};
use crate::config::{Consistency, Priority, Reads};
use crate::pool::checkout::CheckoutError;
use crate::wire::frame::{HEADER, Header};

/// Who waits for others looks no more often than that whether there is too much to do.
const LOOK_MIN: Duration = Duration::from_millis(10);
/// Longer requests are nobody else's.
const REQUEST_MAX: usize = 16 * 1024;

/// A kept answer that a session was shown, and all that it had been shown by then.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) struct Shown {
    number: u64,
    seen_until: Instant,
    last_replica: Option<(usize, Instant)>,
}

/// A query that is under way for others, too.
struct Leading {
    leader: Leader,
    asked: Instant,
    /// What a replica must have to answer it.
    covers: Instant,
}

/// What came of an attempt to share.
enum Shared {
    /// The client has its answer: somebody else's.
    Answered,
    /// It is for this session to ask: for others as well, or for itself alone.
    Asks(Option<Leader>),
}

/// How a wait for others ended.
enum Waited<T> {
    Over(T),
    Cancelled,
    /// There is too much to do for waiting any longer.
    TooMuch,
}

impl Session {
    /// A simple Query that is a read.
    pub(super) async fn share_query(
        &mut self,
        header: Header,
        analysis: &Arc<Analysis>,
        run: RunRef,
    ) -> Result<(), SessionError> {
        let request = self.client.input.bytes().get(HEADER..header.whole);
        let key = request.and_then(|text| self.shared_key(&[b"Q", text]));
        match self.join(key, run, header.whole).await? {
            Shared::Answered => Ok(()),
            Shared::Asks(leader) => {
                let leading = self.begin_leading(leader, run);
                let done = self.read_query(header, analysis, run).await;
                self.end_leading(leading, done.is_ok());
                done
            }
        }
    }

    /// An extended request that is a read.
    pub(super) async fn share_batch(
        &mut self,
        len: usize,
        end: BatchEnd,
        run: RunRef,
    ) -> Result<(), SessionError> {
        let key = self.key_of_batch(len, end);
        match self.join(key, run, len).await? {
            Shared::Answered => Ok(()),
            Shared::Asks(leader) => {
                let leading = self.begin_leading(leader, run);
                let done = match self.fresh_replica(run).await {
                    Some(fresh) => self.extended_replica(fresh, len, end).await,
                    None => self.run_extended(Source::Input, len, end).await,
                };
                self.end_leading(leading, done.is_ok());
                done
            }
        }
    }

    fn key_of_batch(&self, len: usize, end: BatchEnd) -> Option<Vec<u8>> {
        if end != BatchEnd::Sync {
            return None;
        }
        let batch = Batch::read(self.client.input.bytes().get(..len)?)?;
        let bind = batch.bind.as_ref()?;
        let kind = [
            u8::from(batch.parse.is_some()),
            u8::from(batch.describes_statement),
            u8::from(batch.describes_portal),
        ];
        let ((text, types), shape) = match &batch.parse {
            Some(parse) => ((parse.text, parse.types), String::new()),
            None => (
                self.prepared.source(bind.statement)?,
                // What the client was promised: another's rows may look different.
                self.prepared.promise(bind.statement),
            ),
        };
        self.shared_key(&[&kind, text, types, shape.as_bytes(), bind.rest])
    }

    /// `None`: not to be shared. Everything a policy, a view or an output function could read is in it.
    pub(super) fn shared_key(&self, request: &[&[u8]]) -> Option<Vec<u8>> {
        let length: usize = request.iter().map(|part| part.len()).sum();
        // Code out of sight may have made settings that only the server knows.
        let tied = !self.state.pins.is_empty() || self.state.hides;
        // Who listens hears what was committed before each answer; and views of the user's own may do anything.
        let tied = tied || self.keeps_ready(&[]) || self.live.route.reads == Reads::All;
        // A hint may have made a read of what is not pgflow's.
        let tied = tied
            || request
                .iter()
                .any(|part| memmem::find(part, b"flowgate:").is_some());
        if length > REQUEST_MAX || tied || self.lease.is_some() {
            return None;
        }
        let mut key = Vec::with_capacity(length + 256);
        let mut put = |part: &[u8]| {
            key.extend_from_slice(&u32::try_from(part.len()).unwrap_or(u32::MAX).to_be_bytes());
            key.extend_from_slice(part);
        };
        // Sessions that know other upstreams count replicas otherwise.
        let upstreams = Arc::as_ptr(&self.live.upstreams).cast::<u8>() as usize;
        put(&upstreams.to_be_bytes());
        put(self.opening.user.as_bytes());
        put(self.opening.database.as_bytes());
        for (name, value) in &self.opening.options {
            put(name.as_bytes());
            put(value.as_bytes());
        }
        put(b"\0");
        for word in self.state.settings.all_words() {
            put(word.as_bytes());
        }
        put(b"\0");
        for part in request {
            put(part);
        }
        Some(key)
    }

    /// Finds an answer or waits for one, or until it is this session's turn to ask. An answered request has been taken out of the
    /// input.
    async fn join(
        &mut self,
        key: Option<Vec<u8>>,
        run: RunRef,
        len: usize,
    ) -> Result<Shared, SessionError> {
        let began = Instant::now();
        self.request.coming.at = Some(began);
        let Some(key) = key else {
            return Ok(Shared::Asks(None));
        };
        let flights = Arc::clone(&self.shared.flights);
        if let Some(answer) = self.kept_answer(&key, run, began) {
            flights.counters.kept.inc();
            self.tell_answered(&Answered::FromMemory);
            return self.pass_on(&answer, len).await;
        }
        self.request.older = self.older_answer(&key, began);
        // Where another replica answers than the one this session knows, it must not be behind that.
        let last = self.last_replica.map(|(_, answered)| answered);
        let floor = self.floor(run).max(last.unwrap_or(self.shared.started));
        match flights.join(&key, floor) {
            Seat::Leader(mut leader) => match self.wait_for_others(leader.ready(), began).await {
                Waited::Over(()) => Ok(Shared::Asks(Some(leader))),
                Waited::Cancelled => self.answer_shared_cancel(len).await,
                Waited::TooMuch => {
                    match self.request.older {
                        // Others may have nothing to fall back on: they ask for themselves.
                        Some(_) => drop(leader),
                        None => leader.refuse(),
                    }
                    self.too_much(began, len).await
                }
            },
            Seat::Follower(mut follower) => {
                let outcome = match self.wait_for_others(follower.outcome(), began).await {
                    Waited::Over(outcome) => outcome,
                    Waited::Cancelled => return self.answer_shared_cancel(len).await,
                    Waited::TooMuch => return self.too_much(began, len).await,
                };
                match outcome {
                    Outcome::Answered(answer) => {
                        flights.counters.followed.inc();
                        self.tell_answered(&Answered::ByAnother);
                        self.pass_on(&answer, len).await
                    }
                    // Others are worth less than this one.
                    Outcome::Refused if self.priority() != Priority::High => {
                        self.too_much(began, len).await
                    }
                    Outcome::Nothing if self.has_no_prospect(began) => {
                        self.too_much(began, len).await
                    }
                    Outcome::Refused | Outcome::Nothing => {
                        flights.counters.alone.inc();
                        Ok(Shared::Asks(None))
                    }
                }
            }
        }
    }

    /// Waits for what another session's query comes back with. Who has something to fall back on does not wait for long; nor does
    /// who would have to be refused a server.
    async fn wait_for_others<T>(
        &mut self,
        others: impl Future<Output = T>,
        began: Instant,
    ) -> Waited<T> {
        self.request.coming.granted = self.pool(PRIMARY).map(|pool| pool.granted());
        let slot = Arc::clone(&self.key.slot);
        let wait = slot.wait();
        let mut others = pin!(others);
        let window = self.live.config.shed.window;
        let mut look = began + self.live.config.shed.look();
        loop {
            tokio::select! {
                biased;
                outcome = &mut others => return Waited::Over(outcome),
                () = wait.cancelled() => return Waited::Cancelled,
                () = poll_fn(|cx| self.deadline.poll_until(cx, look)) => {}
            }
            if self.has_no_prospect(began) {
                return Waited::TooMuch;
            }
            look = Instant::now() + window.max(LOOK_MIN);
        }
    }

    /// A read that came then would only wait for a server in vain, or has something to fall back on. Where there is a replica in rotation, that may
    /// be about to answer, however much waits for the primary.
    fn has_no_prospect(&mut self, began: Instant) -> bool {
        if began.elapsed() < self.live.config.shed.look() {
            return false;
        }
        self.request.older.is_some()
            || !self
                .live
                .upstreams
                .iter()
                .any(|one| one.id != PRIMARY && one.is_healthy())
                && self.rank().gives_way()
                && self.pool(PRIMARY).is_some_and(|pool| pool.is_overloaded())
    }

    /// An answer in memory that is as good as one that Postgres would give now, as far as the operator wants to know.
    fn kept_answer(&self, key: &[u8], run: RunRef, now: Instant) -> Option<Arc<Answer>> {
        let max_age = self.live.config.cache.max_age;
        if max_age.is_zero() {
            return None;
        }
        let changed = self.shared.runs.changed_at(run);
        self.shared.flights.kept.find(key, |answer| {
            let fresh = now.saturating_duration_since(answer.asked) <= max_age;
            fresh && changed <= answer.asked && self.reaches(answer)
        })
    }

    /// Whether it shows all that this session has been shown.
    fn reaches(&self, answer: &Answer) -> bool {
        let shown = self.shown == Some(self.now_shown(answer.number));
        if shown || self.live.route.consistency == Consistency::Eventual {
            return true;
        }
        // At login it had seen nothing; what it knew from elsewhere is not ours to know.
        let seen = self.seen_until <= answer.covers || self.seen_until == self.began;
        let replica = self.last_replica.is_none_or(|(last, at)| {
            // The same one only goes on.
            let same = answer.replica == Some(last);
            at <= if same { answer.asked } else { answer.covers }
        });
        seen && replica
    }

    fn now_shown(&self, number: u64) -> Shown {
        Shown {
            number,
            seen_until: self.seen_until,
            last_replica: self.last_replica,
        }
    }

    /// One that will do where there is too much to do.
    fn older_answer(&self, key: &[u8], now: Instant) -> Option<Arc<Answer>> {
        let max_age = self.live.config.shed.max_stale;
        if max_age.is_zero() || !self.role.stale {
            return None;
        }
        let strict = self.live.route.consistency != Consistency::Eventual;
        self.shared.flights.kept.find(key, |answer| {
            let fresh = now.saturating_duration_since(answer.asked) <= max_age;
            fresh && (!strict || self.wrote_until <= answer.covers)
        })
    }

    /// Answers with what somebody else was told.
    async fn pass_on(&mut self, answer: &Answer, len: usize) -> Result<Shared, SessionError> {
        self.request.older = None;
        let at = answer.landed;
        match (answer.replica, self.last_replica) {
            (Some(replica), Some((last, before))) if replica == last => {
                self.last_replica = Some((replica, at.max(before)));
            }
            (Some(replica), _) => self.last_replica = Some((replica, at)),
            (None, _) => self.seen_until = self.seen_until.max(at),
        }
        self.shown = Some(self.now_shown(answer.number));
        self.keep(len);
        self.put_answer(answer).await?;
        Ok(Shared::Answered)
    }

    /// In the server's place: to the request in `kept`.
    async fn put_answer(&mut self, answer: &Answer) -> Result<(), SessionError> {
        if self.kept.first() == Some(&b'Q') {
            self.prepared.forget_unnamed();
        } else {
            self.prepared
                .note_batch(&self.kept, &self.survey.parsed, &self.shared.statements);
        }
        self.transaction.touched = None;
        self.client.output.extend_from_slice(&answer.bytes);
        self.shared.counters.answered_here.inc();
        self.tally.begin(Instant::now(), true);
        self.client.flush().await?;
        self.tally.ended(Instant::now(), true, &self.client);
        Ok(())
    }

    /// A request at the front of the input is not to be run now.
    async fn too_much(&mut self, began: Instant, len: usize) -> Result<Shared, SessionError> {
        self.keep(len);
        let pool = self.pool(PRIMARY);
        let waited = began.elapsed();
        let error = match pool {
            Some(_) if self.request.older.is_some() => CheckoutError::TimedOut(waited),
            Some(pool) => pool.refuse(self.request.worth, waited),
            None => CheckoutError::Gone,
        };
        self.without_server(&error, Source::Kept, len, true).await?;
        Ok(Shared::Answered)
    }

    /// No server for a request: an answer from memory where one is at hand, and an error otherwise.
    pub(super) async fn without_server(
        &mut self,
        error: &CheckoutError,
        source: Source,
        len: usize,
        ends_request: bool,
    ) -> Result<(), SessionError> {
        let overload = matches!(
            error,
            CheckoutError::Shed { .. } | CheckoutError::TimedOut(_)
        );
        let older = self.request.older.take();
        // Who falls back on an older answer has not waited as long as others would.
        self.request.refused |= overload && older.is_none();
        if let Some(answer) = older.filter(|_| overload) {
            if source == Source::Input {
                self.keep(len);
            }
            self.tell_answered(&Answered::FromMemory);
            old_answer(answer.asked.elapsed()).put(&mut self.client.output);
            self.shared.flights.counters.stale.inc();
            return self.put_answer(&answer).await;
        }
        if source == Source::Input {
            self.skip(len).await?;
        }
        self.refuse(no_server(error), ends_request).await
    }

    async fn answer_shared_cancel(&mut self, len: usize) -> Result<Shared, SessionError> {
        self.request.older = None;
        self.keep(len);
        self.refuse(no_server(&CheckoutError::Cancelled), true)
            .await?;
        Ok(Shared::Answered)
    }

    fn begin_leading(&mut self, leader: Option<Leader>, run: RunRef) -> Option<Leading> {
        self.request.refused = false;
        self.shared_floor = leader.as_ref().map(Leader::depart);
        self.exchange.capture = leader.as_ref().map(|_| Vec::new());
        leader.map(|leader| Leading {
            leader,
            asked: Instant::now(),
            covers: self.floor(run),
        })
    }

    fn end_leading(&mut self, leading: Option<Leading>, sound: bool) {
        // An idle client holds no answer.
        self.request.older = None;
        self.shared_floor = None;
        let captured = self.exchange.capture.take();
        let Some(Leading {
            leader,
            asked,
            covers,
        }) = leading
        else {
            return;
        };
        if self.request.refused {
            return leader.refuse();
        }
        // An error in our words is not among what was captured.
        let sound = sound && self.exchange.error.is_none();
        let Some(bytes) = captured.filter(|bytes| sound && is_whole_answer(bytes)) else {
            return;
        };
        let replica = self.last_replica.filter(|(_, at)| *at >= asked);
        let replica = replica.map(|(replica, _)| replica);
        let number = self.shared.flights.next_number();
        self.shown = Some(self.now_shown(number));
        leader.land(Arc::new(Answer {
            bytes: bytes.into(),
            replica,
            asked,
            // The primary had all of it.
            covers: replica.map_or(asked, |_| covers),
            landed: Instant::now(),
            number,
        }));
    }
}

/// Rows and what belongs to them, to the end outside a transaction, and nothing that is the leader's alone.
fn is_whole_answer(bytes: &[u8]) -> bool {
    let (mut last, mut done) = (0, 0);
    let fits = frames(bytes).all(|(header, frame)| {
        last = header.tag;
        done += usize::from(header.tag == b'C');
        let known = matches!(header.tag, b'1' | b'2' | b't' | b'T' | b'n' | b'D' | b'C');
        frame.len() == header.whole && (known || header.tag == b'Z' && frame.ends_with(b"I"))
    });
    let whole: usize = frames(bytes).map(|(header, _)| header.whole).sum();
    fits && done == 1 && last == b'Z' && whole == bytes.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::messages::{TxStatus, put_command_complete, put_empty, put_ready};

    #[test]
    fn only_rows_to_the_end_are_an_answer_for_others() {
        let answer = |tags: &[u8], status: Option<TxStatus>| {
            let mut bytes = Vec::new();
            tags.iter().for_each(|tag| put_empty(&mut bytes, *tag));
            put_command_complete(&mut bytes, "SELECT 0");
            status
                .into_iter()
                .for_each(|status| put_ready(&mut bytes, status));
            bytes
        };
        let good = answer(b"12TD", Some(TxStatus::Idle));
        assert!(is_whole_answer(&good));
        assert!(!is_whole_answer(&good[..good.len() - 1]));
        assert!(!is_whole_answer(&answer(b"12TD", None)));
        assert!(!is_whole_answer(&answer(
            b"T",
            Some(TxStatus::InTransaction)
        )));
        for own in [b'E', b'N', b'S', b'A'] {
            assert!(!is_whole_answer(&answer(&[own], Some(TxStatus::Idle))));
        }
        assert!(!is_whole_answer(&good[good.len() - 6..]));
        assert!(!is_whole_answer(b""));
    }
}
