//! The messages of an extended request: what a batch amounts to, what the server is handed in its place, and what is
//! answered here. Never waits for a server. Called by `extended` and `run_extended` in `mod.rs`, and by `replica.rs`.

use std::io;

use super::{PRIMARY, Session, Source, body_so_far, unresolved, whole_length};
use crate::classify::{Analysis, Effect, RunRef, StatementClass};
use crate::client::error::SessionError;
use crate::client::prepared::{Asking, Translated};
use crate::client::reply;
use crate::client::request::{BatchEnd, Unit};
use crate::relay::{Expected, Phase};
use crate::wire::messages::{put_empty, put_frame, put_parse, put_statement_target, query_text};

/// What of a batch has not been handed to the server yet: the bytes from `at` to `len` of its source.
#[derive(Clone, Copy)]
pub(super) struct Remainder {
    source: Source,
    at: usize,
    len: usize,
    end: BatchEnd,
    /// Of the survey's Parses: those before it.
    parses: usize,
}

impl Session {
    /// What a batch amounts to; until the next one is looked at.
    pub(super) fn take_survey(&mut self, source: Source, len: usize, end: BatchEnd) {
        let bytes = source.bytes(&self.client, &self.kept);
        let huge_at = if let BatchEnd::Huge { at, .. } = end {
            Some(at)
        } else {
            None
        };
        let batch = bytes.get(..len).unwrap_or_default();
        self.survey
            .take(batch, huge_at, &self.prepared, &self.live.classifier);
    }

    /// Whether a request that only prepares is answered here: every server is busy, and some server knows the texts.
    pub(super) fn answers_parse(&mut self, len: usize, end: BatchEnd) -> bool {
        if self.lease.is_some()
            || end != BatchEnd::Sync
            || self.survey.parsed.is_empty()
            || !self.survey.bound.is_empty()
        {
            return false;
        }
        let batch = self.client.input.bytes().get(..len).unwrap_or_default();
        self.prepared.may_defer(batch, &self.shared.statements)
            && self.pool(PRIMARY).is_some_and(|pool| pool.is_busy())
    }

    /// Answers a batch in the server's place: the one in `kept`.
    pub(super) async fn answer_kept_batch(&mut self, tag: &str) -> Result<(), SessionError> {
        self.prepared
            .note_batch(&self.kept, &self.survey.parsed, &self.shared.statements);
        self.tally.prepared(self.survey.parsed.len(), 0, 0);
        reply::put_batch(&mut self.client.output, &self.kept, tag);
        self.shared.counters.answered_here.inc();
        Ok(self.client.flush().await?)
    }

    /// Hands a batch to the server: its own messages, or what they become there.
    pub(super) fn put_batch(&mut self, source: Source, len: usize, end: BatchEnd) {
        self.request.effects.extend(self.survey.effects().cloned());
        self.request.bound += self.survey.bound.len();
        if let Some(run) = self.survey.written_run() {
            self.note_write(run);
        }
        for (analysis, run) in &self.survey.bound {
            self.transaction.touch(&analysis.class, *run);
            self.transaction.note_feeds(analysis);
        }
        self.exchange.keep_ready |= self.keeps_ready(&self.request.effects);
        let whole = Remainder {
            source,
            at: 0,
            len,
            end,
            parses: 0,
        };
        self.hand_over(whole, Asking::Any);
    }

    /// The rest of a batch, now that the server has said what it was asked about the first message of it.
    fn put_remainder(&mut self, remainder: Remainder) {
        let asking = if self.exchange.error.is_some() {
            Asking::No
        } else {
            Asking::AfterFirst
        };
        self.hand_over(remainder, asking);
    }

    fn hand_over(&mut self, what: Remainder, asking: Asking) {
        let Remainder {
            source,
            at,
            len,
            end,
            parses,
        } = what;
        let Some(lease) = self.lease.as_mut() else {
            return;
        };
        let bytes = source.bytes(&self.client, &self.kept);
        let batch = bytes.get(at..len).unwrap_or_default();
        let huge = if let BatchEnd::Huge { whole, .. } = end {
            Some(whole)
        } else {
            None
        };
        let answers = self.exchange.expected.len();
        let translated = self.prepared.translate(
            batch,
            self.survey.parsed.get(parses..).unwrap_or_default(),
            huge,
            asking,
            lease,
            &mut self.exchange.expected,
            &self.shared.statements,
        );
        let (mut by_client, mut on_server) = (0, 0);
        for answer in self.exchange.expected.iter().skip(answers) {
            match answer {
                Expected::Parsed(..) | Expected::ParsedUnnamed(_) => {
                    by_client += 1;
                    on_server += 1;
                }
                Expected::OursParsed(..) | Expected::OursParsedUnnamed(_) => on_server += 1,
                Expected::Closed(_)
                | Expected::OursOther
                | Expected::OursClosed(_)
                | Expected::Described(..)
                | Expected::OursDescribed(..)
                | Expected::ParametersOnly => {}
            }
        }
        self.tally
            .prepared(by_client, on_server, self.survey.bound.len());
        match (translated, source) {
            (
                Translated::Asked {
                    at: done,
                    parses: more,
                },
                _,
            ) => {
                let mut remainder = Remainder {
                    at: at + done,
                    parses: parses + more,
                    ..what
                };
                if source == Source::Input {
                    self.client.input.consume(done);
                    remainder.at = at;
                    remainder.len = len - done;
                    if let BatchEnd::Huge { at, .. } = &mut remainder.end {
                        *at -= done;
                    }
                }
                self.request.remainder = Some(Box::new(remainder));
                self.exchange.phase = Phase::Settling;
                lease.in_flight = true;
                return;
            }
            (Translated::AsItIs, Source::Input) => self.exchange.upload = len,
            (Translated::AsItIs, Source::Kept) => lease.stream.output.extend_from_slice(batch),
            (Translated::Rewritten, Source::Input) => {
                self.client.input.consume(len);
                // Of a huge message the rest follows as it comes.
                self.exchange.upload = whole_length(len, end).saturating_sub(len);
            }
            (Translated::Rewritten, Source::Kept) => {}
        }
        self.exchange.phase = if end == BatchEnd::Sync {
            Phase::Closed
        } else {
            Phase::Open
        };
        lease.in_flight = true;
    }

    /// Statements that SQL calls by the client's names, inside a request: a Sync of ours would end it.
    fn lend_on_the_way(&mut self, needs: &[Effect]) {
        let Some(lease) = self
            .lease
            .as_mut()
            .filter(|_| self.exchange.error.is_none())
        else {
            return;
        };
        for need in needs {
            if let Effect::Execute(name) | Effect::Deallocate(name) = need
                && let Some((text, types)) = self.prepared.text(name.as_bytes())
            {
                // To be deallocated, a name is enough.
                let (text, types): (&[u8], &[u8]) = match need {
                    Effect::Deallocate(_) => (b"", &[0, 0]),
                    _ => (text, types),
                };
                put_statement_target(&mut lease.stream.output, b'C', name.as_bytes());
                put_parse(&mut lease.stream.output, name.as_bytes(), text, types);
                lease.lent.push(name.as_bytes().to_vec());
                let answers = [Expected::OursClosed(None), Expected::OursOther];
                self.exchange.expected.extend(answers);
            }
        }
    }

    /// The next messages of an open request.
    pub(super) async fn put_more(&mut self) -> Result<(), SessionError> {
        if let Some(remainder) = self.request.remainder.take() {
            self.put_remainder(*remainder);
            return Ok(());
        }
        match self.grouping.next_open(self.client.input.bytes())? {
            Unit::Batch { len, end } => {
                self.take_survey(Source::Input, len, end);
                let needs: Vec<_> = self.survey.needs().cloned().collect();
                self.lend_on_the_way(&needs);
                self.put_batch(Source::Input, len, end);
            }
            // A Query before the Sync. After an error the server ignores it; otherwise it runs it and says ReadyForQuery, which
            // ends the request here as well.
            Unit::Query(header) | Unit::FunctionCall(header) if self.exchange.error.is_some() => {
                self.skip(header.whole).await?
            }
            Unit::Query(header) | Unit::FunctionCall(header)
                if !std::mem::take(&mut self.request.settled) =>
            {
                self.request.settled = true;
                if header.tag == b'Q' {
                    let text = query_text(body_so_far(self.client.input.bytes(), header));
                    let analysis = text.map(|text| self.live.classifier.analyse(text));
                    self.lend_on_the_way(analysis.as_ref().map_or(&[], |known| &known.effects));
                }
                if let Some(lease) = self.lease.as_mut() {
                    // An answer that comes after all others: closing a portal that is not there.
                    put_frame(&mut lease.stream.output, b'C', |out| {
                        out.extend_from_slice(b"Pflowgate_none\0")
                    });
                    put_empty(&mut lease.stream.output, b'H');
                }
                self.exchange.expected.push_back(Expected::OursClosed(None));
                self.exchange.phase = Phase::Settling;
            }
            Unit::Query(header) => {
                let text = query_text(body_so_far(self.client.input.bytes(), header));
                let analysis =
                    text.map_or_else(Analysis::other, |text| self.live.classifier.analyse(text));
                let run = unresolved(analysis.class.run());
                if analysis.writes_runs() {
                    self.note_write(run);
                }
                self.transaction.touch(&analysis.class, run);
                self.transaction.note_feeds(&analysis);
                self.request
                    .effects
                    .extend(analysis.effects.iter().cloned());
                self.prepared.forget_unnamed();
                if let Some(lease) = self.lease.as_mut() {
                    lease.unnamed = None;
                }
                self.exchange.upload = header.whole;
                self.exchange.phase = Phase::Closed;
            }
            Unit::FunctionCall(header) => {
                self.note_write(RunRef::All);
                self.transaction.touch(&StatementClass::Other, RunRef::All);
                self.transaction.tells = true;
                self.request.effects.push(Effect::Opaque(0));
                self.exchange.upload = header.whole;
                self.exchange.phase = Phase::Closed;
            }
            // Data for a COPY may come before the server has asked for it; the server ignores what it does not want.
            Unit::Stray(header) => self.exchange.upload = header.whole,
            Unit::Terminate => {
                return Err(SessionError::ClientGone(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "terminated inside a request",
                )));
            }
            Unit::Incomplete { .. } => {}
        }
        self.exchange.keep_ready |= self.keeps_ready(&self.request.effects);
        Ok(())
    }
}
