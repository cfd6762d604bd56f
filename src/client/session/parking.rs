//! A poll that waits for work, kept here without a server until there is some: `park` says when it is this session's turn to
//! look at the queue for all who wait, or to read. What is read with is the client's own statement, in its own role and
//! settings, told to look for one second instead of many. Called by `query` and `extended` in `mod.rs`.
//!
//! **The first one finds out.** What such a statement says when it finds nothing, an error included, is heard from Postgres, and
//! kept word for word for those who ask the same afterwards: an idle worker then costs its queue nothing but a share of the
//! common looks.
//!
//! **Nothing is lost.** A read is sent without its Sync: it commits only once its rows have left for a client that is still
//! there. If that has gone, the server is closed, and Postgres rolls back what it took.

use std::future::poll_fn;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io;
use std::sync::Arc;
use std::task::Poll as Polled;
use std::time::Duration;

use tokio::time::{Instant, timeout, timeout_at};
use tracing::debug;

use super::{PRIMARY, Session, Source, Touched, Transaction};
use crate::classify::{Analysis, Arg, Feeds, Patience, PollRef, RunRef, StatementClass};
use crate::client::error::{SessionError, no_server};
use crate::client::live::Running;
use crate::client::request::{BatchEnd, frames};
use crate::park::{Look, QueueName, Sight, Turn};
use crate::pool::checkout::CheckoutError;
use crate::pool::reset::{self, ResetError};
use crate::relay::{Expected, Pause, Phase, RelayError};
use crate::server::conn::UNNAMED_UNKNOWN;
use crate::wire::error_response::ErrorResponse;
use crate::wire::frame::{HEADER, Header};
use crate::wire::messages::{
    Bind, Parse, Target, TxStatus, put_cstr, put_empty, put_frame, put_parse, put_ready,
    put_statement_target, query_text,
};
use crate::wire::quote;

/// What `read_with_poll` does if it is not told.
const SECONDS: i64 = 5;
const INTERVAL_MS: i64 = 100;
/// A poll that looks more seldom would keep its server for as long, once let in.
const INTERVAL_MS_MAX: i64 = 1000;
/// Of pgmq's names.
const NAME_MAX: usize = 48;
/// For how long a poll that was let in looks: Postgres reads nothing at all in less.
const LET_IN_SECONDS: u8 = 1;
/// More than this many messages are many.
const SEEN_MAX: usize = 1000;
/// What a look at a queue may take.
const LOOK_MAX: Duration = Duration::from_secs(5);
/// Bytes a client may send ahead while it waits.
const READ_AHEAD_MAX: usize = 64 * 1024;
/// Frames of a description.
const FRAME_MAX: usize = 64 * 1024;

/// A poll, as it will be run.
struct Poll {
    name: QueueName,
    quantity: usize,
    deadline: Instant,
    /// What a server is told: all but the Sync.
    script: Vec<u8>,
    /// What makes two polls the same, to Postgres.
    key: Vec<u8>,
    /// A simple Query, of whose messages by protocol only the rows are the client's to see.
    simple: bool,
    /// The client's batch begins with its Parse of the unnamed statement.
    own_parse: bool,
}

/// What came of an attempt to park.
enum Parked {
    Answered,
    /// It runs as it came.
    AsItIs,
}

enum Woken {
    Turn(Turn),
    Cancelled,
}

enum Looked {
    Seen(Sight),
    /// It did not come to that; the next may have more luck.
    InVain,
    Cancelled,
    /// There is no server to be had.
    Refused(ErrorResponse),
    /// This role can't look there.
    NotPossible,
}

enum Read {
    /// The client has its rows.
    Rows(usize),
    /// The client has its error.
    Failed,
    /// The client has nothing yet: this would be its answer.
    Nothing(Vec<u8>),
}

impl Transaction {
    /// A statement of it may put something into queues, and send events.
    pub(super) fn note_feeds(&mut self, analysis: &Analysis) {
        self.tells |= analysis.may_tell();
        if analysis.feeds != Feeds::Nothing {
            let so_far = std::mem::take(&mut self.feeds);
            self.feeds = so_far.and(&analysis.feeds);
        }
    }
}

impl Session {
    /// A transaction has ended: those who wait for what it may have put into queues shall know.
    pub(super) fn feed(&mut self) {
        let database = &self.opening.database;
        match std::mem::take(&mut self.transaction.feeds) {
            Feeds::Nothing => {}
            Feeds::Queue(queue) => self.shared.park.fed(database, Some(&queue)),
            Feeds::Any => self.shared.park.fed(database, None),
        }
    }

    /// A simple Query that is a poll.
    pub(super) async fn park_query(
        &mut self,
        header: Header,
        analysis: &Arc<Analysis>,
    ) -> Result<(), SessionError> {
        self.keep(header.whole);
        if let Some(poll) = self.poll_of_query(analysis) {
            self.prepared.forget_unnamed();
            if let Parked::Answered = self.park(&poll).await? {
                return Ok(());
            }
        }
        self.shared.park.counters.passed_on.inc();
        self.run_query(Source::Kept, self.kept.len(), analysis)
            .await
    }

    /// A batch that is about a poll alone.
    pub(super) async fn park_batch(
        &mut self,
        len: usize,
        end: BatchEnd,
    ) -> Result<(), SessionError> {
        let batch = self.client.input.bytes().get(..len).unwrap_or_default();
        let kind = Batch::read(batch).map(|batch| batch.bind.is_some());
        let Some(binds) = kind.filter(|_| self.state.pins.is_empty()) else {
            self.shared.park.counters.passed_on.inc();
            return self.run_extended(Source::Input, len, end).await;
        };
        self.keep(len);
        // It concerns no run.
        self.transaction.touched = Some(Touched {
            run: RunRef::None,
            wrote: true,
        });
        let done = if binds {
            match self.poll_of_batch() {
                Some(poll) => matches!(self.park(&poll).await?, Parked::Answered),
                None => false,
            }
        } else {
            end == BatchEnd::Flush && self.describe_kept().await?
        };
        if done {
            return Ok(());
        }
        self.shared.park.counters.passed_on.inc();
        self.run_extended(Source::Kept, self.kept.len(), end).await
    }

    fn poll_of_query(&self, analysis: &Analysis) -> Option<Poll> {
        let StatementClass::Poll(call) = &analysis.class else {
            return None;
        };
        let text = query_text(self.kept.get(HEADER..)?)?;
        let no_parameters = Bind::read(&[0; 8])?;
        let wants = Wants::of(call, &no_parameters)?;
        let text = call.patience?.text(text, u32::from(LET_IN_SECONDS))?;
        let mut script = Vec::with_capacity(text.len() + 128);
        put_parse(&mut script, b"", &text, &[0, 0]);
        put_bind(&mut script, no_parameters.rest);
        put_portal(&mut script, b'D');
        self.finish_poll(wants, script, true, false)
    }

    fn poll_of_batch(&self) -> Option<Poll> {
        let (analysis, _) = self.survey.only()?;
        let StatementClass::Poll(call) = &analysis.class else {
            return None;
        };
        let batch = Batch::read(&self.kept)?;
        let bind = batch.bind.as_ref()?;
        let (text, types) = match &batch.parse {
            Some(parse) => (parse.text, parse.types),
            None => self.prepared.source(bind.statement)?,
        };
        let wants = Wants::of(call, bind)?;
        let patience = call.patience?;
        let mut script = Vec::with_capacity(text.len() + bind.rest.len() + 128);
        let cut = patience.text(text, u32::from(LET_IN_SECONDS));
        put_parse(&mut script, b"", cut.as_deref().unwrap_or(text), types);
        if batch.describes_statement {
            put_statement_target(&mut script, b'D', b"");
        }
        match patience {
            Patience::Bound(number) => {
                put_bind(&mut script, &bind.with_integer(number, LET_IN_SECONDS)?)
            }
            Patience::Written { .. } | Patience::Missing { .. } => put_bind(&mut script, bind.rest),
        }
        if batch.describes_portal {
            put_portal(&mut script, b'D');
        }
        self.finish_poll(wants, script, false, batch.parse.is_some())
    }

    fn finish_poll(
        &self,
        wants: Wants,
        mut script: Vec<u8>,
        simple: bool,
        own_parse: bool,
    ) -> Option<Poll> {
        if !self.state.pins.is_empty() {
            return None;
        }
        put_frame(&mut script, b'E', |out| out.extend_from_slice(&[0; 5]));
        let kind = match (simple, own_parse) {
            (true, _) => b'Q',
            (false, true) => b'P',
            (false, false) => b'B',
        };
        let key = self.key_of(kind, &script);
        // An answer that comes after all others: closing a portal that is not there.
        put_frame(&mut script, b'C', |out| {
            out.extend_from_slice(b"Pflowgate_none\0")
        });
        put_empty(&mut script, b'H');
        let name = QueueName {
            database: self.opening.database.clone(),
            queue: wants.queue,
            seen_as: number(&self.key_of(b'L', &[])),
        };
        Some(Poll {
            name,
            quantity: wants.quantity,
            deadline: Instant::now() + wants.patience,
            script,
            key,
            simple,
            own_parse,
        })
    }

    /// Equal keys: the same messages, of the same role in the same settings.
    fn key_of(&self, kind: u8, messages: &[u8]) -> Vec<u8> {
        let mut key = vec![kind];
        let Self { opening, state, .. } = self;
        let options = opening.options.iter();
        let options = options.flat_map(|(name, value)| [name.as_str(), value.as_str()]);
        for word in [opening.user.as_str(), opening.database.as_str()]
            .into_iter()
            .chain(options)
            .chain(["\0"])
            .chain(state.settings.words())
        {
            key.extend_from_slice(&u32::try_from(word.len()).unwrap_or(u32::MAX).to_be_bytes());
            key.extend_from_slice(word.as_bytes());
        }
        key.push(0);
        key.extend_from_slice(messages);
        key
    }

    async fn park(&mut self, poll: &Poll) -> Result<Parked, SessionError> {
        let park = Arc::clone(&self.shared.park);
        self.tally.begin(Instant::now(), true);
        match park.look_up(&poll.key) {
            Look::Never => return Ok(Parked::AsItIs),
            Look::Asked | Look::Kept(_) => {}
            Look::Unknown => {
                if let Err(error) = self.hold(PRIMARY).await {
                    park.forget(&poll.key);
                    self.refuse(no_server(&error), true).await?;
                    return Ok(Parked::Answered);
                }
                match self.read(poll).await {
                    Ok(Read::Nothing(answer)) if is_plain(&answer) => park.keep(&poll.key, &answer),
                    Ok(Read::Nothing(_)) => {
                        park.never(&poll.key);
                        return Ok(Parked::AsItIs);
                    }
                    Ok(Read::Rows(_)) => {
                        park.forget(&poll.key);
                        self.polled_in_vain = false;
                        return Ok(Parked::Answered);
                    }
                    Ok(Read::Failed) => {
                        park.forget(&poll.key);
                        if !self.was_interrupted() {
                            // Who waits for this one to find out shall hear what is wrong for themselves.
                            park.let_all_in(&poll.name, number(&poll.key));
                        }
                        return Ok(Parked::Answered);
                    }
                    Err(error) => {
                        park.forget(&poll.key);
                        return Err(error);
                    }
                }
            }
        }
        let eager = !std::mem::take(&mut self.polled_in_vain);
        let kind = number(&poll.key);
        let Some(ticket) = park.enter(poll.name.clone(), poll.quantity, kind, eager) else {
            return Ok(Parked::AsItIs);
        };
        loop {
            match self.wait_parked(&ticket, poll.deadline).await? {
                Woken::Turn(Turn::Deadline) => break,
                Woken::Turn(Turn::Look) => match self.look(poll).await? {
                    Looked::Seen(sight) => ticket.looked(Some(sight)),
                    Looked::InVain => ticket.looked(None),
                    Looked::Cancelled => return self.answer_cancelled(poll).await,
                    Looked::Refused(error) => {
                        self.refuse(error, true).await?;
                        return Ok(Parked::Answered);
                    }
                    Looked::NotPossible => {
                        park.never(&poll.key);
                        return Ok(Parked::AsItIs);
                    }
                },
                Woken::Turn(Turn::Read) => {
                    match self.hold_until(poll.deadline).await {
                        None => {
                            ticket.has_read(0);
                            break;
                        }
                        Some(Ok(())) => {}
                        // Refused, it would ask again at once.
                        Some(Err(CheckoutError::TimedOut(_))) => {
                            ticket.has_read(0);
                            continue;
                        }
                        Some(Err(CheckoutError::Cancelled)) => {
                            return self.answer_cancelled(poll).await;
                        }
                        Some(Err(error)) => {
                            self.refuse(no_server(&error), true).await?;
                            return Ok(Parked::Answered);
                        }
                    }
                    match self.read(poll).await? {
                        Read::Rows(count) => {
                            ticket.has_read(count);
                            return Ok(Parked::Answered);
                        }
                        Read::Failed => {
                            if !self.was_interrupted() {
                                park.forget(&poll.key);
                            }
                            return Ok(Parked::Answered);
                        }
                        Read::Nothing(answer) => {
                            if is_plain(&answer) {
                                park.keep(&poll.key, &answer);
                            }
                            ticket.has_read(0);
                        }
                    }
                }
                Woken::Cancelled => return self.answer_cancelled(poll).await,
            }
        }
        drop(ticket);
        self.polled_in_vain = true;
        self.answer_at_deadline(poll).await
    }

    /// The error just told says nothing of the poll: it was cancelled, or its server ended. (errcodes-appendix.html, class 57)
    fn was_interrupted(&self) -> bool {
        self.exchange
            .error
            .is_some_and(|code| code.starts_with(b"57"))
    }

    /// The empty answer. Where none is kept, Postgres is asked for it, in the last second.
    async fn answer_at_deadline(&mut self, poll: &Poll) -> Result<Parked, SessionError> {
        let park = Arc::clone(&self.shared.park);
        let slot = Arc::clone(&self.key.slot);
        let wait = slot.wait();
        // Polls that came together end together: were each to ask, all servers would be taken for as long as that takes.
        let look = tokio::select! {
            biased;
            () = wait.cancelled() => return self.answer_cancelled(poll).await,
            look = park.look_up_settled(&poll.key) => look,
        };
        drop(wait);
        if let Look::Kept(answer) = look {
            park.counters.answered_empty.inc();
            return self.answer_empty(poll, &answer).await;
        }
        if let Err(error) = self.hold(PRIMARY).await {
            park.forget(&poll.key);
            self.refuse(no_server(&error), true).await?;
            return Ok(Parked::Answered);
        }
        match self.read(poll).await {
            Ok(Read::Nothing(answer)) => {
                if is_plain(&answer) {
                    park.keep(&poll.key, &answer);
                }
                self.answer_empty(poll, &answer).await
            }
            Ok(Read::Rows(_) | Read::Failed) => {
                park.forget(&poll.key);
                Ok(Parked::Answered)
            }
            Err(error) => {
                park.forget(&poll.key);
                Err(error)
            }
        }
    }

    async fn answer_empty(&mut self, poll: &Poll, answer: &[u8]) -> Result<Parked, SessionError> {
        self.note_own_parse(poll);
        self.client.output.extend_from_slice(answer);
        self.exchange.keep_ready = true;
        self.hear_own().await?;
        put_ready(&mut self.client.output, TxStatus::Idle);
        self.shared.counters.answered_here.inc();
        self.tally.ended(Instant::now(), true, &self.client);
        self.client.flush().await?;
        Ok(Parked::Answered)
    }

    /// As Postgres does: what was said of the statement before it waited, then the error.
    async fn answer_cancelled(&mut self, poll: &Poll) -> Result<Parked, SessionError> {
        let look = self.shared.park.look_up(&poll.key);
        if matches!(look, Look::Unknown) {
            // Nobody is finding out.
            self.shared.park.forget(&poll.key);
        }
        if let Look::Kept(answer) = look {
            self.note_own_parse(poll);
            let before = frames(&answer).filter(|(header, _)| header.tag != b'C');
            for (_, frame) in before {
                self.client.output.extend_from_slice(frame);
            }
        }
        self.refuse(no_server(&CheckoutError::Cancelled), true)
            .await?;
        Ok(Parked::Answered)
    }

    /// The client's unnamed statement is the one it has sent, not the one that was run.
    fn note_own_parse(&mut self, poll: &Poll) {
        if poll.own_parse {
            self.prepared
                .note_batch(&self.kept, &self.survey.parsed, &self.shared.statements);
        }
    }

    /// Waits for this client's turn. It may cancel, or leave, and may send what comes next.
    async fn wait_parked(
        &mut self,
        ticket: &crate::park::Ticket,
        deadline: Instant,
    ) -> Result<Woken, SessionError> {
        let slot = Arc::clone(&self.key.slot);
        let wait = slot.wait();
        loop {
            if self.running >= Running::Draining {
                return Err(SessionError::Shutdown);
            }
            if self.client.at_eof || self.client.input.bytes().first() == Some(&b'X') {
                return Err(left());
            }
            let may_speak = self.client.input.len() < READ_AHEAD_MAX;
            tokio::select! {
                biased;
                () = wait.cancelled() => return Ok(Woken::Cancelled),
                turn = ticket.turn(deadline) => return Ok(Woken::Turn(turn)),
                read = self.client.fill(1), if may_speak => {
                    if read? == 0 {
                        return Err(left());
                    }
                }
                changed = self.standing.changed() => {
                    if changed.is_err() {
                        return Err(SessionError::Shutdown);
                    }
                    self.adopt_standing();
                    if self.running >= Running::Draining {
                        return Err(SessionError::Shutdown);
                    }
                }
            }
        }
    }

    /// A server, unless the time is up before one comes free.
    async fn hold_until(&mut self, deadline: Instant) -> Option<Result<(), CheckoutError>> {
        match timeout_at(deadline, self.hold(PRIMARY)).await {
            Ok(held) => Some(held),
            Err(_elapsed) => {
                self.entry().note_waiting(None);
                self.lose_server().await;
                None
            }
        }
    }

    async fn lose_server(&mut self) {
        self.lease = None;
        self.key.slot.release().await;
        self.entry().note_server(0);
    }

    /// Looks at the queue for all who wait there.
    async fn look(&mut self, poll: &Poll) -> Result<Looked, SessionError> {
        match self.hold_until(poll.deadline).await {
            None | Some(Err(CheckoutError::TimedOut(_))) => return Ok(Looked::InVain),
            Some(Ok(())) => {}
            Some(Err(CheckoutError::Cancelled)) => return Ok(Looked::Cancelled),
            Some(Err(error)) => return Ok(Looked::Refused(no_server(&error))),
        }
        // A cancel is meant for the poll, not for our own question.
        self.key.slot.release().await;
        let slot = Arc::clone(&self.key.slot);
        let wait = slot.wait();
        let counters = &self.shared.park.counters;
        counters.probes.inc();
        let Some(lease) = self.lease.as_mut() else {
            return Ok(Looked::InVain);
        };
        let question = question(&poll.name.queue);
        let answer = timeout(LOOK_MAX, reset::command(lease, &question)).await;
        let cancelled = wait.is_cancelled();
        drop(wait);
        let looked = match answer {
            Ok(Ok(rows)) => rows.first().and_then(|row| sight(row)),
            Ok(Err(ResetError::Refused { message: why, .. })) => {
                debug!(queue = poll.name.queue, why, "cannot look at a queue");
                counters.probes_failed.inc();
                self.mark_server(&[]);
                self.check_in(Instant::now()).await;
                return Ok(if cancelled {
                    Looked::Cancelled
                } else {
                    Looked::NotPossible
                });
            }
            Ok(Err(ResetError::Io(_))) | Err(_) => {
                counters.probes_failed.inc();
                self.lose_server().await;
                return Ok(if cancelled {
                    Looked::Cancelled
                } else {
                    Looked::InVain
                });
            }
        };
        self.mark_server(&[]);
        self.check_in(Instant::now()).await;
        Ok(match looked {
            _ if cancelled => Looked::Cancelled,
            Some(sight) => Looked::Seen(sight),
            None => Looked::NotPossible,
        })
    }

    /// Runs the poll on the server in hand, which goes back.
    async fn read(&mut self, poll: &Poll) -> Result<Read, SessionError> {
        let malformed = || SessionError::Relay(RelayError::ServerMalformed);
        self.exchange.begin(true, Phase::Settling);
        self.exchange.hold = true;
        self.exchange.hold_empty = true;
        self.exchange.our_binds = poll.simple;
        let parsed = if poll.own_parse {
            Expected::ParsedUnnamed(UNNAMED_UNKNOWN)
        } else {
            Expected::OursParsedUnnamed(UNNAMED_UNKNOWN)
        };
        self.exchange.expected.push_back(parsed);
        self.exchange.expected.push_back(Expected::OursClosed(None));
        if let Some(lease) = self.lease.as_mut() {
            lease.unnamed = Some(UNNAMED_UNKNOWN);
            lease.stream.output.extend_from_slice(&poll.script);
            lease.in_flight = true;
        }
        self.shared.counters.to_primary.inc();
        match self.relay().await? {
            Pause::ClientSpeaks => {}
            Pause::Ready(_) | Pause::Refused | Pause::Misnamed => return Err(malformed()),
        }
        let nothing = match self.lease.as_mut() {
            Some(lease) if self.exchange.error.is_none() => self.exchange.take_held(lease),
            Some(_) | None => None,
        };
        if nothing.is_none() && self.exchange.error.is_none() && self.has_left().await {
            // Unsynced, so the server rolls it back as it is closed.
            return Err(left());
        }
        self.exchange.phase = Phase::Closed;
        self.exchange.hold = false;
        self.exchange.keep_ready = true;
        if let Some(lease) = self.lease.as_mut() {
            put_empty(&mut lease.stream.output, b'S');
        }
        let rows = self.exchange.tag.rows();
        let status = self.relay_to_ready().await?;
        let failed = self.exchange.error.is_some();
        if let Some(answer) = nothing.filter(|_| !failed) {
            self.mark_server(&[]);
            self.close_books();
            self.check_in(Instant::now()).await;
            return Ok(Read::Nothing(answer));
        }
        if self.exchange.confirmed > 0 {
            self.note_own_parse(poll);
        }
        self.finish(&[], 1, TxStatus::Idle, status).await?;
        Ok(if failed {
            Read::Failed
        } else {
            Read::Rows(rows)
        })
    }

    /// Whether the client has closed its end, as far as is known at this moment.
    async fn has_left(&mut self) -> bool {
        let client = &mut self.client;
        if client.at_eof || client.input.len() >= READ_AHEAD_MAX {
            return client.at_eof;
        }
        poll_fn(|cx| {
            Polled::Ready(matches!(
                client.poll_fill(cx, 1),
                Polled::Ready(Ok(0) | Err(_))
            ))
        })
        .await
    }

    /// Answers Parse, Describe and Flush of a poll with what Postgres said to the same before. `false`: it can't be done, and
    /// nothing was.
    async fn describe_kept(&mut self) -> Result<bool, SessionError> {
        let Some(Batch {
            parse: Some(parse), ..
        }) = Batch::read(&self.kept)
        else {
            return Ok(false);
        };
        if !parse.name.is_empty() && self.prepared.source(parse.name).is_some() {
            return Ok(false);
        }
        let mut script = Vec::with_capacity(parse.text.len() + 32);
        put_parse(&mut script, b"", parse.text, parse.types);
        put_statement_target(&mut script, b'D', b"");
        let key = self.key_of(b'D', &script);
        let park = Arc::clone(&self.shared.park);
        let answer = match park.look_up_settled(&key).await {
            Look::Kept(answer) => {
                park.counters.described.inc();
                answer
            }
            Look::Never => return Ok(false),
            Look::Unknown | Look::Asked => {
                let asked = self.ask(&script).await;
                match asked.filter(|answer| is_plain(answer)) {
                    Some(answer) => {
                        park.keep(&key, &answer);
                        answer.into()
                    }
                    None => {
                        park.never(&key);
                        return Ok(false);
                    }
                }
            }
        };
        self.prepared
            .note_batch(&self.kept, &self.survey.parsed, &self.shared.statements);
        self.client.output.extend_from_slice(&answer);
        self.client.flush().await?;
        Ok(true)
    }

    /// Everything a server says to these messages, which run nothing; `None` if it is an error, or there is no server.
    async fn ask(&mut self, script: &[u8]) -> Option<Vec<u8>> {
        self.hold(PRIMARY).await.ok()?;
        let lease = self.lease.as_mut()?;
        lease.unnamed = Some(UNNAMED_UNKNOWN);
        lease.stream.output.extend_from_slice(script);
        put_empty(&mut lease.stream.output, b'S');
        lease.in_flight = true;
        let mut said = Vec::new();
        let heard: io::Result<()> = async {
            lease.stream.flush().await?;
            loop {
                let header = lease.stream.next_frame(FRAME_MAX).await?;
                let bytes = lease.stream.input.bytes();
                let frame = bytes.get(..header.whole).unwrap_or_default();
                if header.tag == b'Z' {
                    let status = frame.last().copied().and_then(TxStatus::from_byte);
                    lease.tx = status.ok_or(io::ErrorKind::InvalidData)?;
                    lease.in_flight = false;
                    lease.stream.input.consume(header.whole);
                    return Ok(());
                }
                said.extend_from_slice(frame);
                lease.stream.input.consume(header.whole);
            }
        }
        .await;
        if heard.is_err() {
            self.lose_server().await;
            return None;
        }
        self.mark_server(&[]);
        self.check_in(Instant::now()).await;
        Some(said)
    }
}

/// What a poll asks for.
struct Wants {
    queue: String,
    quantity: usize,
    patience: Duration,
}

impl Wants {
    /// `None`: something Postgres is to judge itself.
    fn of(call: &PollRef, bind: &Bind<'_>) -> Option<Self> {
        let queue = match &call.queue {
            Arg::Literal(name) => name.clone(),
            Arg::Param(number) => {
                let name = bind.any_parameter(*number)?;
                std::str::from_utf8(name).ok()?.to_owned()
            }
            Arg::Absent | Arg::Null | Arg::Expression => return None,
        };
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
        if queue.is_empty() || queue.len() > NAME_MAX || !queue.bytes().all(plain) {
            return None;
        }
        let integer = |arg: &Arg, default: Option<i64>| match arg {
            Arg::Absent => default,
            Arg::Literal(number) => number.trim().parse().ok(),
            Arg::Param(number) => bind.integer_parameter(*number),
            Arg::Null | Arg::Expression => None,
        };
        let small = |number: i64| i32::try_from(number).ok();
        small(integer(&call.vt, None)?)?;
        let quantity = usize::try_from(small(integer(&call.qty, None)?)?).ok()?;
        let seconds = small(integer(&call.max_poll_seconds, Some(SECONDS))?)?;
        let interval = integer(&call.poll_interval_ms, Some(INTERVAL_MS))?;
        let worth_it = quantity > 0 && seconds > 0 && (1..=INTERVAL_MS_MAX).contains(&interval);
        worth_it.then_some(Self {
            queue: queue.to_ascii_lowercase(),
            quantity,
            patience: Duration::from_secs(u64::try_from(seconds).ok()?),
        })
    }
}

/// The messages of a batch that may be answered here: of one statement, in the order drivers send them.
pub(super) struct Batch<'a> {
    pub(super) parse: Option<Parse<'a>>,
    pub(super) describes_statement: bool,
    pub(super) bind: Option<Bind<'a>>,
    pub(super) describes_portal: bool,
}

impl<'a> Batch<'a> {
    /// Parse, Describe of the statement, Bind to the unnamed portal, Describe of that, Execute for all rows, Sync, with a Parse
    /// of the unnamed statement or none; or just Parse, Describe, Flush.
    pub(super) fn read(batch: &'a [u8]) -> Option<Self> {
        let mut frames = frames(batch).map(|(header, frame)| (header.tag, frame.get(HEADER..)));
        let mut next = || frames.next().and_then(|(tag, body)| Some((tag, body?)));
        let mut message = next()?;
        let mut read = Self {
            parse: None,
            describes_statement: false,
            bind: None,
            describes_portal: false,
        };
        if message.0 == b'P' {
            read.parse = Some(Parse::read(message.1)?);
            message = next()?;
        }
        let mut described = None;
        if message.0 == b'D' {
            let target = Target::read(message.1).filter(|target| target.kind == b'S')?;
            described = Some(target.name);
            read.describes_statement = true;
            message = next()?;
        }
        let parsed = read.parse.as_ref().map(|parse| parse.name);
        if message.0 == b'H' {
            let ends = parsed.is_some() && described == parsed && next().is_none();
            return ends.then_some(read);
        }
        let bind = Bind::read(message.1).filter(|_| message.0 == b'B')?;
        let same = |name: Option<&[u8]>| name.is_none_or(|name| name == bind.statement);
        if !bind.portal.is_empty()
            || parsed.is_some_and(|name| !name.is_empty())
            || !same(parsed)
            || !same(described)
        {
            return None;
        }
        read.bind = Some(bind);
        message = next()?;
        if message.0 == b'D' {
            Target::read(message.1)
                .filter(|target| target.kind == b'P' && target.name.is_empty())?;
            read.describes_portal = true;
            message = next()?;
        }
        let runs_all = message == (b'E', &[0; 5][..]) && next()?.0 == b'S' && next().is_none();
        runs_all.then_some(read)
    }
}

fn put_bind(out: &mut Vec<u8>, rest: &[u8]) {
    put_frame(out, b'B', |out| {
        put_cstr(out, b"");
        put_cstr(out, b"");
        out.extend_from_slice(rest);
    });
}

fn put_portal(out: &mut Vec<u8>, tag: u8) {
    put_frame(out, tag, |out| out.extend_from_slice(b"P\0"));
}

/// How many messages can be read now, and in how many ms the next one can.
fn question(queue: &str) -> String {
    let table = quote::ident(&format!("q_{queue}"));
    format!(
        "select (select count(*) from (select from pgmq.{table} where vt <= now() limit {SEEN_MAX}) as seen) || ' ' || \
         coalesce((select ceil(extract(epoch from min(vt) - now()) * 1000)::int8 from pgmq.{table} where vt > now())::text, '')"
    )
}

fn sight(row: &str) -> Option<Sight> {
    let (visible, next) = row.split_once(' ')?;
    Some(Sight {
        visible: visible.parse().ok()?,
        next_in: next.parse().ok().map(Duration::from_millis),
    })
}

/// Nothing but what another client may be told as well.
fn is_plain(answer: &[u8]) -> bool {
    frames(answer).all(|(header, frame)| {
        matches!(header.tag, b'1' | b'2' | b't' | b'T' | b'n' | b'C') && frame.len() == header.whole
    })
}

fn number(key: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    hasher.finish()
}

fn left() -> SessionError {
    SessionError::ClientGone(io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "left while its poll waited",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::classify::Classifier;
    use crate::config::Reads;

    fn wants(text: &str) -> Option<String> {
        let analysis = Classifier::new(Reads::Pgflow, 1 << 20, 1).analyse(text.as_bytes());
        let StatementClass::Poll(call) = &analysis.class else {
            return None;
        };
        let none = Bind::read(&[0; 8]).unwrap();
        let wants = Wants::of(call, &none)?;
        let cut = call.patience?.text(text.as_bytes(), 1)?;
        let cut = String::from_utf8(cut).unwrap();
        let Wants {
            queue,
            quantity,
            patience,
        } = wants;
        Some(format!("{queue} {quantity} {patience:?} | {cut}"))
    }

    #[track_caller]
    fn check(text: &str, expected: &str) {
        assert_eq!(wants(text).as_deref(), Some(expected), "{text}");
    }

    #[test]
    fn a_poll_is_told_to_look_for_a_second_however_it_is_spelled() {
        check(
            "select * from pgflow.read_with_poll('Q', 2, 10)",
            "q 10 5s | select * from pgflow.read_with_poll('Q', 2, 10, max_poll_seconds => 1)",
        );
        check(
            "select * from pgmq.read_with_poll('q', 2, 10, 30, 50)",
            "q 10 30s | select * from pgmq.read_with_poll('q', 2, 10, 1, 50)",
        );
        check(
            "SELECT msg_id FROM pgmq.read_with_poll(queue_name => 'q', vt => 2, qty => '3', max_poll_seconds => '7'::int -- s\n ) as m;",
            "q 3 7s | SELECT msg_id FROM pgmq.read_with_poll(queue_name => 'q', vt => 2, qty => '3', max_poll_seconds => 1 -- s\n ) as m;",
        );
        check(
            "select pgmq.read_with_poll(poll_interval_ms => 9, qty => 1, vt => 1, queue_name => 'q')",
            "q 1 5s | select pgmq.read_with_poll(poll_interval_ms => 9, qty => 1, vt => 1, queue_name => 'q', max_poll_seconds => 1)",
        );
    }

    #[test]
    fn what_postgres_must_judge_itself_is_left_alone() {
        for text in [
            "select * from pgmq.read_with_poll('q', 2, 10, 0)",
            "select * from pgmq.read_with_poll('q', 2, 10, -1)",
            "select * from pgmq.read_with_poll('q', 2, 0)",
            "select * from pgmq.read_with_poll('q', 'x', 1)",
            "select * from pgmq.read_with_poll('q', 2, 99999999999)",
            "select * from pgmq.read_with_poll(null, 2, 1)",
            "select * from pgmq.read_with_poll('q;', 2, 1)",
            "select * from pgmq.read_with_poll('', 2, 1)",
            "select * from pgmq.read_with_poll('q', 2, 1, 5, 60000)",
            "select * from pgmq.read_with_poll('q', 2, 1, 5, 0)",
            "select * from pgmq.read_with_poll('q', 2, 1, 5::bigint)",
            "select * from pgmq.read_with_poll('q', 2, 1, 5, 100, '{}')",
            "select * from pgmq.read_with_poll('q', 2, 1, 2 + 3)",
            "select * from pgflow.poll_for_tasks('q', 2, 1)",
        ] {
            assert_eq!(wants(text), None, "{text}");
        }
    }

    #[test]
    fn only_the_batches_drivers_send_are_answered_here() {
        let mut parse = Vec::new();
        put_parse(&mut parse, b"", b"select", &[0, 0]);
        let mut named = Vec::new();
        put_parse(&mut named, b"s", b"select", &[0, 0]);
        let mut bind = Vec::new();
        put_bind(&mut bind, &[0; 6]);
        let mut statement = Vec::new();
        put_statement_target(&mut statement, b'D', b"");
        let mut portal = Vec::new();
        put_portal(&mut portal, b'D');
        let mut execute = Vec::new();
        put_frame(&mut execute, b'E', |out| out.extend_from_slice(&[0; 5]));
        let mut some_rows = Vec::new();
        put_frame(&mut some_rows, b'E', |out| {
            out.extend_from_slice(&[0, 0, 0, 0, 1])
        });
        let (mut sync, mut flush) = (Vec::new(), Vec::new());
        put_empty(&mut sync, b'S');
        put_empty(&mut flush, b'H');
        let fits = |parts: &[&Vec<u8>]| {
            let bytes: Vec<u8> = parts.iter().flat_map(|part| part.iter().copied()).collect();
            Batch::read(&bytes).map(|batch| batch.bind.is_some())
        };
        assert_eq!(fits(&[&bind, &execute, &sync]), Some(true));
        assert_eq!(fits(&[&parse, &bind, &portal, &execute, &sync]), Some(true));
        assert_eq!(
            fits(&[&parse, &statement, &bind, &execute, &sync]),
            Some(true)
        );
        assert_eq!(fits(&[&parse, &statement, &flush]), Some(false));
        assert_eq!(fits(&[&named, &bind, &execute, &sync]), None);
        assert_eq!(fits(&[&bind, &some_rows, &sync]), None);
        assert_eq!(fits(&[&bind, &execute, &flush]), None);
        assert_eq!(fits(&[&bind, &execute, &bind, &execute, &sync]), None);
        assert_eq!(fits(&[&parse, &statement, &sync]), None);
        assert_eq!(fits(&[&sync]), None);
        assert_eq!(fits(&[]), None);
    }
}
