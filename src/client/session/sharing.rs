//! Reads that others ask for in the same moment: one of them asks Postgres, the others get its answer word for word. Says what
//! makes two reads the same: the messages and everything of the session that Postgres' answer could depend on. Called by `query`
//! and `extended` in `mod.rs` for what `route` calls a read.

use std::sync::Arc;

use memchr::memmem;
use tokio::time::Instant;

use super::parking::Batch;
use super::{Session, Source};
use crate::classify::{Analysis, RunRef};
use crate::client::error::{SessionError, no_server};
use crate::client::request::{BatchEnd, frames};
use crate::coalesce::{Answer, Leader, Seat};
use crate::config::Reads;
use crate::pool::checkout::CheckoutError;
use crate::wire::frame::{HEADER, Header};

/// Longer requests are nobody else's.
const REQUEST_MAX: usize = 16 * 1024;

/// What came of an attempt to share.
enum Shared {
    /// The client has its answer: somebody else's.
    Answered,
    /// It is for this session to ask: for others as well, or for itself alone.
    Asks(Option<Leader>),
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
            Shared::Answered => {
                self.prepared.forget_unnamed();
                Ok(())
            }
            Shared::Asks(leader) => {
                let began = self.begin_leading(leader.as_ref());
                let done = self.read_query(header, analysis, run).await;
                self.end_leading(leader, began, done.is_ok());
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
            Shared::Answered => {
                self.prepared
                    .note_batch(&self.kept, &self.survey.parsed, &self.shared.statements);
                Ok(())
            }
            Shared::Asks(leader) => {
                let began = self.begin_leading(leader.as_ref());
                let done = match self.fresh_replica(run).await {
                    Some(fresh) => self.extended_replica(fresh, len, end).await,
                    None => self.run_extended(Source::Input, len, end).await,
                };
                self.end_leading(leader, began, done.is_ok());
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

    /// Waits for an answer, or until it is this session's turn to ask. An answered request has been taken out of the input, and
    /// is in `kept`.
    async fn join(
        &mut self,
        key: Option<Vec<u8>>,
        run: RunRef,
        len: usize,
    ) -> Result<Shared, SessionError> {
        let Some(key) = key else {
            return Ok(Shared::Asks(None));
        };
        let flights = Arc::clone(&self.shared.flights);
        // Where another replica answers than the one this session knows, it must not be behind that.
        let last = self.last_replica.map(|(_, answered)| answered);
        let floor = self.floor(run).max(last.unwrap_or(self.shared.started));
        let slot = Arc::clone(&self.key.slot);
        match flights.join(&key, floor) {
            Seat::Leader(mut leader) => {
                let wait = slot.wait();
                tokio::select! {
                    biased;
                    () = leader.ready() => {}
                    () = wait.cancelled() => return self.answer_shared_cancel(len).await,
                }
                Ok(Shared::Asks(Some(leader)))
            }
            Seat::Follower(mut follower) => {
                let wait = slot.wait();
                let answer = tokio::select! {
                    biased;
                    answer = follower.answer() => answer,
                    () = wait.cancelled() => return self.answer_shared_cancel(len).await,
                };
                drop(wait);
                let Some(Answer { bytes, replica }) = answer else {
                    flights.counters.alone.inc();
                    return Ok(Shared::Asks(None));
                };
                let now = Instant::now();
                match replica {
                    Some(replica) => self.last_replica = Some((replica, now)),
                    None => self.seen_until = now,
                }
                self.transaction.touched = None;
                self.keep(len);
                self.client.output.extend_from_slice(&bytes);
                self.shared.counters.answered_here.inc();
                flights.counters.followed.inc();
                self.tally.begin(now, true);
                self.client.flush().await?;
                self.tally.ended(Instant::now(), true, &self.client);
                Ok(Shared::Answered)
            }
        }
    }

    async fn answer_shared_cancel(&mut self, len: usize) -> Result<Shared, SessionError> {
        self.keep(len);
        self.refuse(no_server(&CheckoutError::Cancelled), true)
            .await?;
        Ok(Shared::Answered)
    }

    fn begin_leading(&mut self, leader: Option<&Leader>) -> Instant {
        self.shared_floor = leader.map(Leader::depart);
        self.exchange.capture = leader.map(|_| Vec::new());
        Instant::now()
    }

    fn end_leading(&mut self, leader: Option<Leader>, began: Instant, sound: bool) {
        self.shared_floor = None;
        let captured = self.exchange.capture.take();
        // An error in our words is not among what was captured.
        let sound = sound && self.exchange.error.is_none();
        let (Some(leader), Some(bytes), true) = (leader, captured, sound) else {
            return;
        };
        let replica = self.last_replica.filter(|(_, at)| *at >= began);
        if is_whole_answer(&bytes) {
            leader.land(Answer {
                bytes: bytes.into(),
                replica: replica.map(|(replica, _)| replica),
            });
        }
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
