//! ★ The loop: request → classify → route → share/park → gate → relay. Every mechanism meets here and knows nothing of the
//! others. One task a client; while it holds a server, that task drives both sockets.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tracing::debug;

use super::error::{SessionError, no_server};
use super::prepared::{Prepared, Translated};
use super::reply;
use super::request::{BatchEnd, Grouping, Unit};
use super::run_tokens::Writing;
use super::shared::{Running, Shared};
use super::state::{Ending, State};
use super::survey::Survey;
use crate::cancel::CancelKey;
use crate::classify::{Analysis, Effect, RunRef, StatementClass};
use crate::config::Consistency;
use crate::events::{Delivery, EventsError, Subscriber};
use crate::pool::checkout::{Checkout, CheckoutError, Pool, Wish};
use crate::pool::reset;
use crate::relay::{self, Exchange, Expected, Pause, Phase, RelayError};
use crate::route::{self, Plan, SessionView, Subscription};
use crate::server::parameters::{Opening, Reported};
use crate::wire::error_response::{ErrorResponse, field};
use crate::wire::frame::{self, FrameError, Header};
use crate::wire::messages::{
    TxStatus, put_empty, put_frame, put_parameter_status, put_ready, query_text,
};
use crate::wire::quote;
use crate::wire::stream::Stream;

/// A server whose client has left is given this long to roll back before it is closed.
const PARTING_MAX: Duration = Duration::from_secs(2);
/// The server's own frames between requests (a farewell, a changed parameter).
const ASIDE_MAX: usize = 1024 * 1024;
/// A buffer that grew larger for one request is given back.
const KEPT_MAX: usize = 64 * 1024;
/// The primary's place among the upstreams; replica n is n + 1.
const PRIMARY: usize = 0;

/// A logged-in client.
pub(super) struct Session {
    id: u64,
    pub(super) client: Stream,
    shared: Arc<Shared>,
    opening: Arc<Opening>,
    application_name: String,
    key: CancelKey,
    /// What the client was told of the parameters Postgres reports.
    reported: Reported,
    state: State,
    prepared: Prepared,
    survey: Survey,
    grouping: Grouping,
    exchange: Exchange,
    lease: Option<Checkout>,
    /// Statements the server holds under this client's own names, for the SQL of this request.
    lent: Vec<Vec<u8>>,
    /// A kept buffer for the effects of extended requests.
    effects: Vec<Effect>,
    /// Binds of the request under way.
    bound: usize,
    /// A write to runs by the transaction under way.
    writing: Option<Writing>,
    /// The run that the request under way reads on the primary.
    shown: Option<RunRef>,
    /// The open request's answers so far are known: see `Phase::Settling`.
    settled: bool,
    /// The request was cancelled while it waited for a replica.
    cancelled: bool,
    /// The lease is a replica's.
    on_replica: bool,
    /// Which one's.
    lease_replica: Option<usize>,
    /// The server itself listens for the length of this request, to list the channels.
    listens: bool,
    /// This client's pools, by upstream, as it came to need them.
    pools: Vec<Option<Arc<Pool>>>,
    subscriber: Option<Subscriber>,
    /// After an error of ours in an extended request: everything up to its Sync is ignored.
    /// (protocol-flow.html#PROTOCOL-FLOW-EXT-QUERY)
    skip_to_sync: bool,
    /// Before this instant a replica's answer would be older than what the client has seen.
    seen_until: Instant,
    /// The replica that answered last, and when.
    last_replica: Option<(usize, Instant)>,
    /// A request for a replica, kept for the primary should the replica refuse.
    kept: Vec<u8>,
    running: watch::Receiver<Running>,
}

/// What a finished login hands over.
pub(super) struct LoggedIn {
    pub(super) id: u64,
    pub(super) client: Stream,
    pub(super) opening: Arc<Opening>,
    pub(super) application_name: String,
    pub(super) key: CancelKey,
    pub(super) reported: Reported,
    pub(super) session_mode: bool,
}

/// Where the bytes of a request are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    /// At the front of the client's input.
    Input,
    /// In `kept`.
    Kept,
}

impl Session {
    pub(super) fn new(login: LoggedIn, shared: Arc<Shared>) -> Self {
        let running = shared.running.clone();
        Self {
            id: login.id,
            client: login.client,
            shared,
            opening: login.opening,
            key: login.key,
            reported: login.reported,
            state: State::new(&login.application_name, login.session_mode),
            application_name: login.application_name,
            prepared: Prepared::new(login.id),
            survey: Survey::default(),
            grouping: Grouping::default(),
            exchange: Exchange::default(),
            lease: None,
            lent: Vec::new(),
            effects: Vec::new(),
            bound: 0,
            writing: None,
            shown: None,
            settled: false,
            cancelled: false,
            on_replica: false,
            lease_replica: None,
            listens: false,
            pools: Vec::new(),
            subscriber: None,
            skip_to_sync: false,
            seen_until: Instant::now(),
            last_replica: None,
            kept: Vec::new(),
            running,
        }
    }

    /// Serves requests until the client says goodbye.
    pub(super) async fn run(&mut self) -> Result<(), SessionError> {
        loop {
            match self.next_unit().await? {
                Unit::Terminate => return Ok(()),
                Unit::Stray(header) => self.skip(header.whole).await?,
                unit if self.skip_to_sync => self.skip_unit(unit).await?,
                Unit::Query(header) => self.query(header).await?,
                Unit::FunctionCall(header) => self.function_call(header).await?,
                Unit::Batch { len, end } => self.extended(len, end).await?,
                Unit::Incomplete { .. } => {}
            }
        }
    }

    /// The client is in the middle of a message from its server, so nothing of ours may follow.
    pub(super) fn is_mid_message(&self) -> bool {
        self.exchange.is_mid_message()
    }

    /// Gives back what the session holds. A transaction left open is rolled back; a query left running is cancelled.
    pub(super) async fn part(&mut self) {
        self.give_up_server().await;
        for pool in self.pools.iter().flatten() {
            pool.disown(self.id);
        }
    }

    async fn give_up_server(&mut self) {
        if let Some(mut lease) = self.lease.take() {
            let pinned = !self.state.pins.is_empty();
            // Mid-request there is nothing to roll back politely: dropping the lease cancels and closes.
            if lease.in_flight || !lease.stream.input.is_empty() {
                return;
            }
            let clean = async {
                if pinned {
                    reset::discard(&mut lease).await
                } else {
                    reset::roll_back(&mut lease).await
                }
            };
            if matches!(timeout(PARTING_MAX, clean).await, Ok(Ok(()))) {
                self.key.slot.release().await;
                if let Some(proof) = reset::prove(&lease) {
                    lease.check_in(proof, None);
                }
            }
        }
    }

    // ---- waiting ----

    /// The next unit at the front of the client's input. While waiting: notifications go out, a held server's words are
    /// passed on, a shutdown ends the session between transactions.
    async fn next_unit(&mut self) -> Result<Unit, SessionError> {
        loop {
            let needed = match self.grouping.next(self.client.input.bytes())? {
                Unit::Incomplete { needed } => needed,
                unit => return Ok(unit),
            };
            if self.tx() == TxStatus::Idle && *self.running.borrow() != Running::Serving {
                return Err(SessionError::Shutdown);
            }
            let wait = Waiting {
                client: &mut self.client,
                lease: self.lease.as_mut(),
                subscriber: self.subscriber.as_ref(),
                needed,
            };
            let woken = tokio::select! {
                biased;
                woken = wait.woken() => woken?,
                changed = self.running.changed() => {
                    if changed.is_err() {
                        return Err(SessionError::Shutdown);
                    }
                    Woken::Shutdown
                }
            };
            match woken {
                Woken::Client(0) => {
                    return Err(SessionError::ClientGone(
                        io::ErrorKind::UnexpectedEof.into(),
                    ));
                }
                Woken::Client(_) | Woken::Shutdown => {}
                Woken::Delivery(delivery) => self.deliver(delivery).await?,
                Woken::Server(count) => self.hear_server(count).await?,
            }
        }
    }

    /// Writes notifications, all that are there, in one go.
    async fn deliver(&mut self, first: Delivery) -> Result<(), SessionError> {
        let mut next = Some(first);
        while let Some(delivery) = next {
            match delivery {
                Delivery::Frame(frame) => {
                    self.client.output.extend_from_slice(&frame);
                    self.shared.counters.notifications.inc();
                }
                Delivery::Cut(reason) => return Err(SessionError::Cut(format!("{reason:?}"))),
            }
            if self.client.output.len() > ASIDE_MAX {
                self.client.flush().await?;
            }
            next = self.subscriber.as_ref().and_then(Subscriber::try_next);
        }
        // Who has been told of an event must find its traces, and so must whom they tell.
        self.seen_until = Instant::now();
        self.shared.runs.seen(RunRef::All);
        Ok(self.client.flush().await?)
    }

    /// A server held between requests has said something, or has gone.
    async fn hear_server(&mut self, count: usize) -> Result<(), SessionError> {
        let Some(server) = self.lease.as_deref_mut() else {
            return Ok(());
        };
        if count == 0 {
            return Err(SessionError::Relay(RelayError::ServerClosed));
        }
        while !server.stream.input.is_empty() {
            let header = server
                .stream
                .next_frame(ASIDE_MAX)
                .await
                .map_err(RelayError::Server)?;
            let bytes = server
                .stream
                .input
                .bytes()
                .get(..header.whole)
                .unwrap_or_default();
            if header.tag == b'S' {
                reset::note_parameter(
                    &mut server.reported,
                    frame::body(bytes, header).unwrap_or_default(),
                );
            }
            // Notifications come from the hub.
            if header.tag != b'A' {
                self.client.output.extend_from_slice(bytes);
            }
            let body = frame::body(bytes, header).unwrap_or_default();
            let farewell =
                header.tag == b'E' && matches!(field(body, b'V'), Some(b"FATAL" | b"PANIC"));
            server.stream.input.consume(header.whole);
            if farewell {
                self.client.flush().await?;
                return Err(SessionError::ServerFarewell);
            }
        }
        Ok(self.client.flush().await?)
    }

    /// Reads past `count` bytes of the client's.
    async fn skip(&mut self, mut count: usize) -> Result<(), SessionError> {
        loop {
            let here = self.client.input.len().min(count);
            self.client.input.consume(here);
            count -= here;
            if count == 0 {
                return Ok(());
            }
            if self.client.fill(1).await? == 0 {
                return Err(SessionError::ClientGone(
                    io::ErrorKind::UnexpectedEof.into(),
                ));
            }
        }
    }

    /// After an error nothing counts but the Sync.
    async fn skip_unit(&mut self, unit: Unit) -> Result<(), SessionError> {
        match unit {
            Unit::Query(header) | Unit::FunctionCall(header) | Unit::Stray(header) => {
                self.skip(header.whole).await
            }
            Unit::Batch {
                end: BatchEnd::Huge { at, whole },
                ..
            } => self.skip(at + whole).await,
            Unit::Batch {
                len,
                end: BatchEnd::Flush,
            } => self.skip(len).await,
            Unit::Batch {
                len,
                end: BatchEnd::Sync,
            } => {
                self.skip(len).await?;
                self.skip_to_sync = false;
                let tx = self.tx();
                put_ready(&mut self.client.output, tx);
                Ok(self.client.flush().await?)
            }
            Unit::Terminate | Unit::Incomplete { .. } => Ok(()),
        }
    }

    // ---- requests ----

    async fn query(&mut self, header: Header) -> Result<(), SessionError> {
        let bytes = self.client.input.bytes();
        let body = bytes
            .get(frame::HEADER..header.whole.min(bytes.len()))
            .unwrap_or_default();
        let analysis = match query_text(body) {
            Some(text) => self.shared.classifier.analyse(text),
            // Judged by its beginning; what its end does is known by its tag alone.
            None if header.is_huge() => self.shared.classifier.analyse(body),
            None => {
                self.skip(header.whole).await?;
                return self
                    .refuse(
                        ErrorResponse::error("08P01", "invalid string in message"),
                        true,
                    )
                    .await;
            }
        };
        if let StatementClass::Read(run) = analysis.class {
            self.shown = Some(unresolved(run));
        }
        match self.plan(&analysis) {
            Plan::Subscribe(change) => {
                self.skip(header.whole).await?;
                match self.subscribe(&change).await {
                    Ok(tag) => reply::put_command(&mut self.client.output, tag),
                    Err(error) => return self.refuse(not_listening(&error), true).await,
                }
                self.shared.counters.answered_here.inc();
                Ok(self.client.flush().await?)
            }
            Plan::Read(run) => {
                if let Some(upstream) = self.fresh_replica(run).await {
                    self.keep(header.whole);
                    if self.query_replica(upstream, &analysis).await? {
                        return Ok(());
                    }
                    return self
                        .run_query(Source::Kept, self.kept.len(), &analysis)
                        .await;
                }
                self.run_query(Source::Input, header.whole, &analysis).await
            }
            Plan::Primary | Plan::Held => {
                self.run_query(Source::Input, header.whole, &analysis).await
            }
        }
    }

    /// A simple Query on the server in hand, or on the primary.
    async fn run_query(
        &mut self,
        source: Source,
        whole: usize,
        analysis: &Arc<Analysis>,
    ) -> Result<(), SessionError> {
        if analysis.writes_runs() {
            self.note_write(unresolved(analysis.class.run()));
        }
        if let Err(error) = self.hold(PRIMARY).await {
            if source == Source::Input {
                self.skip(whole).await?;
            }
            return self.refuse(no_server(&error), true).await;
        }
        self.exchange.begin(false, Phase::Closed);
        self.prepared.forget_unnamed();
        self.make_ready_for(&analysis.effects).await?;
        let Some(lease) = self.lease.as_mut() else {
            return Ok(());
        };
        lease.unnamed = None;
        match source {
            Source::Input => self.exchange.upload = whole,
            Source::Kept => lease.stream.output.extend_from_slice(&self.kept),
        }
        let before = lease.tx;
        lease.in_flight = true;
        self.exchange.keep_ready = self.keeps_ready(&analysis.effects);
        self.shared.counters.to_primary.inc();
        let status = self.relay_to_ready().await?;
        if whole > frame::HELD_MAX && !self.exchange.ran_one_plain_command() {
            // Only its beginning was looked at.
            let effects = [analysis.effects.as_slice(), &[Effect::Unfollowed]].concat();
            return self
                .finish(&effects, analysis.statements, before, status)
                .await;
        }
        self.finish(&analysis.effects, analysis.statements, before, status)
            .await
    }

    /// What some statements need before they run: a database without our idle servers in it; statements prepared by
    /// message under the names that SQL calls them by.
    async fn make_ready_for(&mut self, effects: &[Effect]) -> Result<(), SessionError> {
        for effect in effects {
            match effect {
                Effect::NeedsDatabaseAlone(database) => self.shared.pools.leave_database(database),
                Effect::ListeningChannels => self.lend_subscriptions().await?,
                Effect::SequenceValue => self.forget_others_draws().await?,
                Effect::Execute(name) | Effect::Deallocate(name) => {
                    let (Some((text, types)), Some(lease)) =
                        (self.prepared.text(name.as_bytes()), self.lease.as_mut())
                    else {
                        continue;
                    };
                    let lent = reset::lend_statement(lease, name.as_bytes(), text, types).await;
                    if lent.map_err(|_gone| SessionError::Relay(RelayError::ServerClosed))? {
                        self.lent.push(name.as_bytes().to_vec());
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// A sequence's last value belongs to the session that drew it. Where others have drawn as well, better none than a wrong
    /// one; and from now on every server that changes hands forgets what was drawn. (functions-sequence.html)
    async fn forget_others_draws(&mut self) -> Result<(), SessionError> {
        self.shared.asks_for_draws.store(true, Ordering::Relaxed);
        let Some(lease) = self
            .lease
            .as_mut()
            .filter(|lease| lease.mixed_draws && lease.tx != TxStatus::Failed)
        else {
            return Ok(());
        };
        let forgotten = reset::forget_draws(lease).await;
        forgotten.map_err(|_gone| SessionError::Relay(RelayError::ServerClosed))
    }

    /// A server that is asked what this session listens to has to listen to it; for the length of the request. Inside a
    /// transaction that is not possible: a LISTEN counts from its commit.
    async fn lend_subscriptions(&mut self) -> Result<(), SessionError> {
        let channels = self
            .subscriber
            .as_ref()
            .map(Subscriber::channels)
            .unwrap_or_default();
        let (Some(lease), false) = (self.lease.as_mut(), channels.is_empty()) else {
            return Ok(());
        };
        if lease.tx == TxStatus::Idle {
            let script: String = channels
                .iter()
                .map(|channel| format!("LISTEN {};", quote::ident(channel)))
                .collect();
            let listening = reset::command(lease, &script).await;
            listening.map_err(|_gone| SessionError::Relay(RelayError::ServerClosed))?;
            self.listens = true;
        }
        Ok(())
    }

    async fn function_call(&mut self, header: Header) -> Result<(), SessionError> {
        self.run_query(Source::Input, header.whole, &Analysis::other())
            .await
    }

    /// Parse…Sync, or the part of it up to a Flush.
    async fn extended(&mut self, len: usize, end: BatchEnd) -> Result<(), SessionError> {
        self.take_survey(Source::Input, len, end);
        let plan = match self.survey.only() {
            Some((analysis, run)) => match self.plan(analysis) {
                Plan::Read(_) => Plan::Read(run),
                other => other,
            },
            None => Plan::Primary,
        };
        if self.answers_parse(len, end) {
            self.keep(len);
            self.prepared
                .note_batch(&self.kept, &self.survey.parsed, &self.shared.statements);
            reply::put_batch(&mut self.client.output, &self.kept, "");
            self.shared.counters.answered_here.inc();
            return Ok(self.client.flush().await?);
        }
        match plan {
            Plan::Subscribe(change) if end == BatchEnd::Sync && self.survey.bound.len() == 1 => {
                return self.subscribe_extended(len, &change).await;
            }
            Plan::Read(run) if self.still_reads(end) => {
                if let Some(upstream) = self.fresh_replica(run).await {
                    return self.extended_replica(upstream, len, end).await;
                }
            }
            Plan::Read(_) | Plan::Subscribe(_) | Plan::Primary | Plan::Held => {}
        }
        self.run_extended(Source::Input, len, end).await
    }

    /// Whether a request that only prepares is answered here: every server is busy, and some server knows the texts.
    fn answers_parse(&mut self, len: usize, end: BatchEnd) -> bool {
        if self.lease.is_some()
            || end != BatchEnd::Sync
            || self.survey.parsed.is_empty()
            || !self.survey.bound.is_empty()
        {
            return false;
        }
        let batch = self.client.input.bytes().get(..len).unwrap_or_default();
        self.prepared.may_defer(batch, &self.shared.statements) && self.pool(PRIMARY).is_busy()
    }

    /// An extended request on the server in hand, or on the primary, to its end.
    async fn run_extended(
        &mut self,
        source: Source,
        len: usize,
        end: BatchEnd,
    ) -> Result<(), SessionError> {
        if let Err(error) = self.hold(PRIMARY).await {
            if source == Source::Input {
                let whole = if let BatchEnd::Huge { at, whole } = end {
                    at + whole
                } else {
                    len
                };
                self.skip(whole).await?;
            }
            return self.refuse(no_server(&error), end == BatchEnd::Sync).await;
        }
        self.shared.counters.to_primary.inc();
        let mut effects = std::mem::take(&mut self.effects);
        effects.clear();
        effects.extend(self.survey.effects().cloned());
        self.make_ready_for(&effects).await?;
        effects.clear();
        self.bound = 0;
        self.exchange.begin(true, Phase::Open);
        let before = self.tx();
        self.put_batch(source, len, end, &mut effects);
        let status = loop {
            match self.relay().await? {
                Pause::Ready(status) => break status,
                Pause::ClientSpeaks => self.put_more(&mut effects).await?,
                Pause::Refused | Pause::Misnamed => {
                    return Err(SessionError::Relay(RelayError::ServerMalformed));
                }
            }
        };
        self.finish(&effects, self.bound.max(1), before, status)
            .await
    }

    /// The next messages of an open request.
    async fn put_more(&mut self, effects: &mut Vec<Effect>) -> Result<(), SessionError> {
        match self.grouping.next_open(self.client.input.bytes())? {
            Unit::Batch { len, end } => {
                self.take_survey(Source::Input, len, end);
                self.put_batch(Source::Input, len, end, effects);
            }
            // A Query before the Sync. After an error the server ignores it; otherwise it runs it and says ReadyForQuery, which
            // ends the request here as well.
            Unit::Query(header) | Unit::FunctionCall(header) if self.exchange.error.is_some() => {
                self.skip(header.whole).await?
            }
            Unit::Query(_) | Unit::FunctionCall(_) if !std::mem::take(&mut self.settled) => {
                self.settled = true;
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
                let bytes = self.client.input.bytes();
                let text = bytes
                    .get(frame::HEADER..header.whole.min(bytes.len()))
                    .and_then(query_text);
                let analysis =
                    text.map_or_else(Analysis::other, |text| self.shared.classifier.analyse(text));
                effects.extend(analysis.effects.iter().cloned());
                self.prepared.forget_unnamed();
                if let Some(lease) = self.lease.as_mut() {
                    lease.unnamed = None;
                }
                self.exchange.upload = header.whole;
                self.exchange.phase = Phase::Closed;
            }
            Unit::FunctionCall(header) => {
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
        self.exchange.keep_ready |= self.keeps_ready(effects);
        Ok(())
    }

    /// Hands a batch to the server: its own messages, or what they become there.
    fn put_batch(&mut self, source: Source, len: usize, end: BatchEnd, effects: &mut Vec<Effect>) {
        effects.extend(self.survey.effects().cloned());
        self.bound += self.survey.bound.len();
        if let Some(run) = self.survey.written_run() {
            self.note_write(run);
        }
        if let Some(run) = self.survey.read_run() {
            self.shown = Some(run);
        }
        self.exchange.keep_ready |= self.keeps_ready(effects);
        let Some(lease) = self.lease.as_mut() else {
            return;
        };
        let bytes = match source {
            Source::Input => self.client.input.bytes(),
            Source::Kept => &self.kept,
        };
        let batch = bytes.get(..len).unwrap_or_default();
        let huge = if let BatchEnd::Huge { whole, .. } = end {
            Some(whole)
        } else {
            None
        };
        let translated = self.prepared.translate(
            batch,
            &self.survey.parsed,
            huge,
            lease,
            &mut self.exchange.expected,
            &self.shared.statements,
        );
        match (translated, source) {
            (Translated::AsItIs, Source::Input) => self.exchange.upload = len,
            (Translated::AsItIs, Source::Kept) => lease.stream.output.extend_from_slice(batch),
            (Translated::Rewritten, Source::Input) => {
                self.client.input.consume(len);
                // Of a huge message the rest follows as it comes.
                self.exchange.upload = if let BatchEnd::Huge { at, whole } = end {
                    (at + whole).saturating_sub(len)
                } else {
                    0
                };
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

    fn take_survey(&mut self, source: Source, len: usize, end: BatchEnd) {
        let bytes = match source {
            Source::Input => self.client.input.bytes(),
            Source::Kept => &self.kept,
        };
        let huge_at = if let BatchEnd::Huge { at, .. } = end {
            Some(at)
        } else {
            None
        };
        let batch = bytes.get(..len).unwrap_or_default();
        self.survey
            .take(batch, huge_at, &self.prepared, &self.shared.classifier);
    }

    /// After ReadyForQuery: what the request did to the session, and whether the server goes back.
    async fn finish(
        &mut self,
        effects: &[Effect],
        statements: usize,
        before: TxStatus,
        after: TxStatus,
    ) -> Result<(), SessionError> {
        self.prepared.settle(self.exchange.confirmed);
        if !self.lent.is_empty()
            && let Some(lease) = self.lease.as_mut()
        {
            let closed = reset::close_statements(lease, &self.lent).await;
            closed.map_err(|_gone| SessionError::Relay(RelayError::ServerClosed))?;
            self.lent.clear();
        }
        let failed = self.exchange.error.is_some();
        if self.exchange.parameters_changed
            && let Some(lease) = &self.lease
        {
            self.reported = lease.reported.clone();
        }
        let rolled_back = self.exchange.tag.is("ROLLBACK");
        let chained =
            after != TxStatus::Idle && before != TxStatus::Idle && self.exchange.tag.is("COMMIT");
        let pins_before = self.state.pins;
        let consequences = self.state.request_ended(
            effects,
            statements,
            Ending {
                failed,
                rolled_back,
                chained,
                before,
                after,
            },
        );
        self.shared
            .counters
            .count_pins(pins_before, self.state.pins);
        if !failed {
            for effect in effects {
                if let Effect::Deallocate(name) = effect {
                    self.prepared.forget(name.as_bytes());
                }
            }
        }
        if (consequences.deallocated_all || consequences.discarded_all)
            && let Some(lease) = self.lease.as_mut()
        {
            self.prepared.forget_all();
            lease.statements.clear();
            lease.to_close.clear();
        }
        if consequences.discarded_all {
            self.prepared.forget_unnamed();
            if let Some(subscriber) = &self.subscriber {
                subscriber.unlisten_all();
            }
        }
        if effects
            .iter()
            .any(|effect| matches!(effect, Effect::TempObject | Effect::Load))
            && let Some(lease) = self.lease.as_mut()
        {
            // DISCARD ALL keeps the temporary namespace and what was loaded: no other client shall find them.
            lease.unfit = true;
        }
        if let Some(lease) = self.lease.as_mut() {
            lease.last_client = self.id;
        }
        if after == TxStatus::Idle && !self.on_replica {
            self.seen_until = Instant::now();
            // What ran may have written to any run (a function of the user's own); what was read was shown.
            let seen = self.shown.take().unwrap_or(RunRef::All);
            if self.writing.take().is_none() {
                self.shared.runs.seen(seen);
            }
        }
        if after == TxStatus::Idle {
            if consequences.settings_changed
                && let Some(lease) = self.lease.as_mut()
            {
                self.state.adopt_reported(&lease.reported);
                lease.settings = Arc::clone(&self.state.settings);
                if consequences.reset {
                    reset::forget_settings_but(lease, &self.state.settings);
                }
            }
            if consequences.subscriptions {
                self.adopt_subscriptions(failed || rolled_back).await?;
            }
            self.state.forget_transaction();
            if std::mem::take(&mut self.listens)
                && let Some(lease) = self.lease.as_mut()
            {
                let quiet = reset::command(lease, "UNLISTEN *").await;
                quiet.map_err(|_gone| SessionError::Relay(RelayError::ServerClosed))?;
            }
            if self.state.pins.is_empty() || self.on_replica {
                self.check_in().await;
            }
        }
        if self.exchange.keep_ready {
            put_ready(&mut self.client.output, after);
            self.client.flush().await?;
        }
        Ok(())
    }

    /// The transaction under way writes to `run`, or to any.
    fn note_write(&mut self, run: RunRef) {
        self.writing = Some(match self.writing.take() {
            Some(writing) => writing.and(run),
            None => self.shared.runs.writing(run),
        });
    }

    // ---- servers ----

    /// Makes sure that the session holds a server: the one it has, or one of the upstream's pool with this session's
    /// settings.
    async fn hold(&mut self, upstream: usize) -> Result<(), CheckoutError> {
        if self.lease.is_some() {
            return Ok(());
        }
        if std::mem::take(&mut self.cancelled) {
            return Err(CheckoutError::Cancelled);
        }
        let pool = self.pool(upstream);
        let wish = Wish {
            client: self.id,
            opening: &self.opening,
            application_name: &self.application_name,
        };
        let within = (upstream != PRIMARY).then_some(self.shared.replica_wait);
        let mut lease = match pool.take_now(wish) {
            Some(lease) => lease,
            None => {
                let wait = self.key.slot.wait();
                tokio::select! {
                    biased;
                    lease = pool.checkout(wish, within) => lease?,
                    () = wait.cancelled() => return Err(CheckoutError::Cancelled),
                }
            }
        };
        // From here on a cancel goes to this server.
        self.key.slot.hold(&lease.key);
        if !Arc::ptr_eq(&lease.settings, &self.state.settings) {
            let script = lease.settings.script_to(&self.state.settings);
            // Before the request and not with it: were one of these to fail, the request must not run.
            if !script.is_empty() {
                if let Err(error) = reset::command(&mut lease, &script).await {
                    self.key.slot.release().await;
                    return Err(CheckoutError::Settings(error));
                }
            }
            lease.settings = Arc::clone(&self.state.settings);
        }
        if lease.last_client != 0 && lease.last_client != self.id {
            lease.mixed_draws = true;
            if self.shared.asks_for_draws.load(Ordering::Relaxed) {
                if let Err(error) = reset::forget_draws(&mut lease).await {
                    self.key.slot.release().await;
                    return Err(CheckoutError::Settings(error));
                }
            }
        }
        // A replica reports that it is one; the client talks to the primary, as far as it knows.
        if upstream == PRIMARY && !self.reported.same_as(&lease.reported) {
            for (name, value) in self.reported.changes_to(&lease.reported) {
                put_parameter_status(&mut self.client.output, name, value);
            }
            self.reported = lease.reported.clone();
        }
        self.on_replica = upstream != PRIMARY;
        self.lease_replica = upstream.checked_sub(1);
        self.lease = Some(lease);
        Ok(())
    }

    /// Gives the server back, if it is fit for others; otherwise it is closed.
    async fn check_in(&mut self) {
        let Some(lease) = self.lease.take() else {
            return;
        };
        self.key.slot.release().await;
        match reset::prove(&lease) {
            Some(clean) => lease.check_in(clean, Some(self.id)),
            None => debug!(
                pid = lease.key.pid,
                "server closed: it has more to say than its answer"
            ),
        }
    }

    fn pool(&mut self, upstream: usize) -> Arc<Pool> {
        if self.pools.len() <= upstream {
            self.pools.resize(upstream + 1, None);
        }
        let shared = &self.shared;
        let opening = &self.opening;
        let slot = &mut self.pools[upstream];
        Arc::clone(slot.get_or_insert_with(|| shared.pools.pool(opening, upstream)))
    }

    fn tx(&self) -> TxStatus {
        self.lease.as_ref().map_or(TxStatus::Idle, |lease| lease.tx)
    }

    fn plan(&self, analysis: &Analysis) -> Plan {
        let view = match (&self.lease, self.tx()) {
            (_, TxStatus::InTransaction | TxStatus::Failed) => SessionView::Transaction,
            (Some(_), TxStatus::Idle) => SessionView::Pinned,
            (None, TxStatus::Idle) => SessionView::Free,
        };
        route::plan(analysis, view, self.shared.route)
    }

    async fn relay(&mut self) -> Result<Pause, SessionError> {
        let Some(lease) = self.lease.as_mut() else {
            return Err(SessionError::Relay(RelayError::ServerClosed));
        };
        match relay::run(&mut self.client, lease, &mut self.exchange).await {
            Ok(Pause::Misnamed) => {
                let body = std::mem::take(&mut self.exchange.misnamed);
                let body = self.prepared.in_clients_words(&body);
                put_frame(&mut self.client.output, b'E', |out| {
                    out.extend_from_slice(&body)
                });
                Box::pin(self.relay()).await
            }
            Ok(pause) => Ok(pause),
            // Its last words, if any, have been passed on; a half-sent frame can only be cut off.
            Err(RelayError::Server(_) | RelayError::ServerClosed)
                if self.exchange.said_farewell() =>
            {
                Err(SessionError::ServerFarewell)
            }
            Err(error) => Err(error.into()),
        }
    }

    async fn relay_to_ready(&mut self) -> Result<TxStatus, SessionError> {
        match self.relay().await? {
            Pause::Ready(status) => Ok(status),
            Pause::ClientSpeaks => Err(SessionError::Frame(FrameError::Length)),
            Pause::Refused | Pause::Misnamed => {
                Err(SessionError::Relay(RelayError::ServerMalformed))
            }
        }
    }

    /// An error of ours in answer to a request; the connection stays usable.
    async fn refuse(
        &mut self,
        error: ErrorResponse,
        ends_request: bool,
    ) -> Result<(), SessionError> {
        error.put(&mut self.client.output);
        if ends_request {
            let tx = self.tx();
            put_ready(&mut self.client.output, tx);
        } else {
            self.skip_to_sync = true;
        }
        Ok(self.client.flush().await?)
    }

    // ---- replicas ----

    /// What a replica must have replayed for this session's read of `run`.
    fn floor(&self, run: RunRef) -> Instant {
        match self.shared.route.consistency {
            Consistency::Eventual => self.shared.started,
            Consistency::Session | Consistency::Primary => {
                self.shared.runs.since(run).max(self.seen_until)
            }
        }
    }

    /// A replica that has all that this session, and whoever wrote to these runs, must find there.
    async fn fresh_replica(&mut self, run: RunRef) -> Option<usize> {
        let freshness = self.shared.freshness.as_ref()?;
        let last = self.last_replica.map(|(replica, _)| replica);
        let since = self.floor(run);
        let mut fresh = freshness
            .fresh_replica(since, last, self.shared.replica_wait)
            .await;
        // Another replica than the last one may be behind it, and time must not go back.
        if let (Some(replica), Some((before, answered))) = (fresh, self.last_replica)
            && replica != before
        {
            let since = since.max(answered);
            fresh = freshness
                .fresh_replica(since, Some(replica), self.shared.replica_wait)
                .await;
        }
        if fresh.is_none() {
            self.shared.counters.replica_not_fresh.inc();
        }
        fresh.map(|replica| replica + 1)
    }

    fn keep(&mut self, len: usize) {
        self.kept.clear();
        self.kept.shrink_to(KEPT_MAX);
        self.kept
            .extend_from_slice(self.client.input.bytes().get(..len).unwrap_or_default());
        self.client.input.consume(len);
    }

    /// Runs the kept Query on a replica. `false`: it did not answer, and nothing has reached the client.
    async fn query_replica(
        &mut self,
        upstream: usize,
        analysis: &Arc<Analysis>,
    ) -> Result<bool, SessionError> {
        if !self.hold_replica(upstream).await {
            return Ok(false);
        }
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
                self.leave_refusing_replica().await;
                Ok(false)
            }
            Pause::ClientSpeaks | Pause::Misnamed => Err(SessionError::Frame(FrameError::Length)),
        }
    }

    async fn extended_replica(
        &mut self,
        upstream: usize,
        len: usize,
        end: BatchEnd,
    ) -> Result<(), SessionError> {
        self.keep(len);
        if !self.hold_replica(upstream).await {
            return self.run_extended(Source::Kept, self.kept.len(), end).await;
        }
        let mut effects = Vec::new();
        let mut end = end;
        let mut next_part = true;
        self.exchange.begin(true, Phase::Open);
        self.bound = 0;
        loop {
            let confirmed = self.exchange.confirmed;
            if std::mem::take(&mut next_part) {
                // A request that pauses for the client's next messages must show what it has said so far.
                self.exchange.hold = end == BatchEnd::Sync;
                self.put_batch(Source::Kept, self.kept.len(), end, &mut effects);
            }
            match self.relay().await? {
                Pause::Ready(status) => {
                    self.shared.counters.to_replica.inc();
                    return self.finish_on_replica(&effects, status).await;
                }
                Pause::Refused => {
                    // What was held back has been thrown away, its confirmations too.
                    self.prepared.settle(confirmed);
                    self.leave_refusing_replica().await;
                    self.take_survey(Source::Kept, self.kept.len(), end);
                    return self.run_extended(Source::Kept, self.kept.len(), end).await;
                }
                Pause::Misnamed => return Err(SessionError::Relay(RelayError::ServerMalformed)),
                // After an error the server ignores all up to the Sync; what has been bound can go nowhere else.
                Pause::ClientSpeaks if self.exchange.error.is_some() || self.bound > 0 => {
                    self.put_more(&mut effects).await?;
                }
                Pause::ClientSpeaks => {
                    let Unit::Batch { len, end: next } =
                        self.grouping.next_open(self.client.input.bytes())?
                    else {
                        return self.move_to_primary(0, BatchEnd::Flush).await;
                    };
                    self.take_survey(Source::Input, len, next);
                    if !self.still_reads(next) {
                        return self.move_to_primary(len, next).await;
                    }
                    self.keep(len);
                    end = next;
                    next_part = true;
                }
            }
        }
    }

    /// Whether the next part of a request that began as a read is still one that a replica may take: nothing is bound there
    /// but to be run to the request's end.
    fn still_reads(&self, end: BatchEnd) -> bool {
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
        route::plan(analysis, SessionView::Free, self.shared.route)
    }

    /// A request that began on a replica with nothing but Parse and Describe goes on elsewhere: nothing has run yet.
    async fn move_to_primary(&mut self, len: usize, end: BatchEnd) -> Result<(), SessionError> {
        self.prepared.settle(self.exchange.confirmed);
        if let Some(mut lease) = self.lease.take() {
            let settled = timeout(PARTING_MAX, reset::sync(&mut lease)).await;
            self.key.slot.release().await;
            if matches!(settled, Ok(Ok(())))
                && let Some(clean) = reset::prove(&lease)
            {
                lease.check_in(clean, Some(self.id));
            }
        }
        self.run_extended(Source::Input, len, end).await
    }

    /// `false`: none is to be had, so the primary answers.
    async fn hold_replica(&mut self, upstream: usize) -> bool {
        match self.hold(upstream).await {
            Ok(()) => true,
            Err(error) => {
                debug!(upstream, %error, "replica gave no connection, so the primary answers");
                self.shared.counters.replica_refused.inc();
                self.cancelled = matches!(error, CheckoutError::Cancelled);
                false
            }
        }
    }

    async fn leave_refusing_replica(&mut self) {
        self.shared.counters.replica_refused.inc();
        self.exchange.error = None;
        self.check_in().await;
    }

    async fn finish_on_replica(
        &mut self,
        effects: &[Effect],
        status: TxStatus,
    ) -> Result<(), SessionError> {
        // What a replica reports of itself is not the client's session.
        self.exchange.parameters_changed = false;
        let replica = self.lease_replica;
        self.finish(effects, 1, TxStatus::Idle, status).await?;
        let now = Instant::now();
        if let Some(replica) = replica {
            self.last_replica = Some((replica, now));
        }
        // Another replica may be behind this one, so what it showed is a floor for whoever asks another.
        if self.shared.upstreams.len() > 2 {
            self.shared
                .runs
                .seen(self.shown.take().unwrap_or(RunRef::All));
        }
        Ok(())
    }

    // ---- subscriptions ----

    /// LISTEN or UNLISTEN outside a transaction: in force when this returns.
    async fn subscribe(&mut self, change: &Subscription) -> Result<&'static str, EventsError> {
        match change {
            Subscription::Listen(channel) => {
                let subscriber = self.subscriber();
                subscriber.listen(channel).await?;
                Ok("LISTEN")
            }
            Subscription::Unlisten(channel) => {
                if let Some(subscriber) = &self.subscriber {
                    subscriber.unlisten(channel);
                }
                Ok("UNLISTEN")
            }
            Subscription::UnlistenAll => {
                if let Some(subscriber) = &self.subscriber {
                    subscriber.unlisten_all();
                }
                Ok("UNLISTEN")
            }
        }
    }

    /// Parse…Sync of one LISTEN or UNLISTEN.
    async fn subscribe_extended(
        &mut self,
        len: usize,
        change: &Subscription,
    ) -> Result<(), SessionError> {
        self.keep(len);
        match self.subscribe(change).await {
            Ok(tag) => {
                self.prepared
                    .note_batch(&self.kept, &self.survey.parsed, &self.shared.statements);
                reply::put_batch(&mut self.client.output, &self.kept, tag);
            }
            Err(error) => return self.refuse(not_listening(&error), true).await,
        }
        self.shared.counters.answered_here.inc();
        Ok(self.client.flush().await?)
    }

    /// A transaction that ran LISTEN or UNLISTEN has ended. Which LISTENs are in force, after savepoints and all, the server
    /// knows; they move to the hub before the client hears of the commit.
    async fn adopt_subscriptions(&mut self, rolled_back: bool) -> Result<(), SessionError> {
        let Some(lease) = self.lease.as_mut() else {
            return Ok(());
        };
        let listed = reset::command(lease, "SELECT pg_catalog.pg_listening_channels()").await;
        let channels = listed.map_err(|_gone| SessionError::Relay(RelayError::ServerClosed))?;
        if !rolled_back {
            for effect in self.state.subscriptions() {
                match (effect, &self.subscriber) {
                    (Effect::Unlisten(channel), Some(subscriber)) => subscriber.unlisten(channel),
                    (Effect::UnlistenAll, Some(subscriber)) => subscriber.unlisten_all(),
                    _ => {}
                }
            }
        }
        for channel in &channels {
            let listening = self.subscriber().listen(channel).await;
            listening.map_err(|error| SessionError::Cut(error.to_string()))?;
        }
        if !channels.is_empty()
            && let Some(lease) = self.lease.as_mut()
        {
            let quiet = reset::command(lease, "UNLISTEN *").await;
            quiet.map_err(|_gone| SessionError::Relay(RelayError::ServerClosed))?;
        }
        Ok(())
    }

    fn subscriber(&mut self) -> &Subscriber {
        let (shared, opening) = (&self.shared, &self.opening);
        self.subscriber
            .get_or_insert_with(|| shared.hubs.of_database(&opening.database).subscriber())
    }

    /// Whether ReadyForQuery must wait for the session: the request may end a transaction that ran LISTEN.
    fn keeps_ready(&self, effects: &[Effect]) -> bool {
        let subscribes = |effect: &Effect| {
            matches!(
                effect,
                Effect::Listen(_) | Effect::Unlisten(_) | Effect::UnlistenAll
            )
        };
        self.state.awaits_subscriptions() || effects.iter().any(subscribes)
    }
}

/// A simple Query's parameters cannot name a run.
fn unresolved(run: RunRef) -> RunRef {
    if let RunRef::Param(_) = run {
        RunRef::All
    } else {
        run
    }
}

fn not_listening(error: &EventsError) -> ErrorResponse {
    match error {
        EventsError::EmptyChannel => ErrorResponse::error("22023", "channel name cannot be empty"),
        EventsError::TooManyChannels { limit } => {
            ErrorResponse::error("53400", "too many channels")
                .with_detail(format!("One session may listen on {limit}."))
        }
        EventsError::Cut | EventsError::Stopping => {
            ErrorResponse::error("57P01", "the subscription has ended")
        }
        EventsError::Timeout(_) | EventsError::Upstream(_) => {
            ErrorResponse::error("57P03", "cannot listen now")
                .with_detail("The proxy's own connection for notifications is not available.")
                .with_hint("Retry; see the proxy's log.")
        }
    }
}

/// What a waiting session is waiting for.
struct Waiting<'a> {
    client: &'a mut Stream,
    lease: Option<&'a mut Checkout>,
    subscriber: Option<&'a Subscriber>,
    needed: usize,
}

enum Woken {
    /// Bytes came from the client; 0: it is gone.
    Client(usize),
    Server(usize),
    Delivery(Delivery),
    Shutdown,
}

impl Waiting<'_> {
    async fn woken(mut self) -> Result<Woken, SessionError> {
        poll_fn(|cx| self.poll(cx)).await
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Woken, SessionError>> {
        if let Poll::Ready(read) = self.client.poll_fill(cx, self.needed) {
            return Poll::Ready(read.map(Woken::Client).map_err(SessionError::ClientGone));
        }
        if let Some(lease) = &mut self.lease
            && let Poll::Ready(read) = lease.stream.poll_fill(cx, 1)
        {
            let count = read.map_err(|error| SessionError::Relay(RelayError::Server(error)))?;
            return Poll::Ready(Ok(Woken::Server(count)));
        }
        // Postgres delivers between transactions only. (sql-notify.html)
        let between = self
            .lease
            .as_ref()
            .is_none_or(|lease| lease.tx == TxStatus::Idle);
        if between
            && self.client.input.is_empty()
            && let Some(subscriber) = self.subscriber
            && let Poll::Ready(delivery) = subscriber.poll_next(cx)
        {
            return Poll::Ready(Ok(Woken::Delivery(delivery)));
        }
        Poll::Pending
    }
}
