//! ★ The loop: request → classify → route → checkout → relay → check in. Read this first: it is the life of a request, and
//! every mechanism meets here and knows nothing of the others. One task a client; while it holds a server, that task
//! drives both sockets. Called by `client/startup.rs`. The rest of a session is told apart:
//!
//! `waiting` what it waits for between requests · `batches` the messages of an extended request · `replica` reads away from
//! the primary · `parking` polls that wait for work · `explaining` where statements go, and why · `sharing` reads that others ask
//! for, too, or have asked for · `servers` the one in hand · `priority` what it is worth to the operator ·
//! `subscriptions` LISTEN and UNLISTEN · `outside` who may end it · `tally` what it all amounts to.

mod batches;
mod explaining;
mod outside;
mod parking;
mod priority;
mod replica;
mod servers;
mod sharing;
mod subscriptions;
mod tally;
mod waiting;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use batches::Remainder;
use tokio::sync::watch;
use tokio::time::Instant;

use self::explaining::{Answered, Unexplained};
use self::outside::Outside;
use self::sharing::Shown;
use self::subscriptions::{Named, Overheard};
use self::tally::Tally;
use super::error::SessionError;
use super::live::{Live, Running, Standing};
use super::prepared::{self, Prepared};
use super::request::{BatchEnd, Grouping, Unit};
use super::roster::{Entry, Kind, Listed, Newcomer};
use super::run_tokens::Writing;
use super::shared::Shared;
use super::state::{Consequences, Ending, State};
use super::survey::Survey;
use crate::cancel::CancelKey;
use crate::classify::{Analysis, Effect, Feeds, RunRef, StatementClass, Worth};
use crate::coalesce::Answer;
use crate::config::{Priority, Reads, RoleTerms};
use crate::events::{Hub, Subscriber};
use crate::pool::alarm::Alarm;
use crate::pool::checkout::{Checkout, Member};
use crate::pool::reset::{self, ResetError};
use crate::relay::{Exchange, Pause, Phase, RelayError};
use crate::route::{self, Plan, SessionView};
use crate::server::parameters::{Opening, Reported};
use crate::server::settings::Settings;
use crate::upstream;
use crate::wire::error_response::ErrorResponse;
use crate::wire::frame::{self, Header};
use crate::wire::messages::{TxStatus, put_ready, query_text};
use crate::wire::stream::Stream;

/// A server that a session leaves is given this long to end what is open; then it is closed.
const PARTING_MAX: Duration = Duration::from_secs(2);
/// A buffer that grew larger for one request is given back.
const KEPT_MAX: usize = 64 * 1024;
/// The primary's place among the configuration's upstreams; the replicas follow.
const PRIMARY: usize = 0;

/// A logged-in client.
pub(super) struct Session {
    id: u64,
    pub(super) client: Stream,
    shared: Arc<Shared>,
    standing: watch::Receiver<Standing>,
    running: Running,
    /// The configuration this session goes by; the next one is adopted between requests.
    live: Arc<Live>,
    listed: Listed,
    tally: Tally,
    opening: Arc<Opening>,
    application_name: String,
    key: CancelKey,
    /// What the client was told of the parameters Postgres reports.
    reported: Reported,

    state: State,
    prepared: Prepared,
    subscriber: Option<Subscriber>,
    /// Who is to know what this session commits, once it has.
    hub: Option<Arc<Hub>>,
    /// Before this instant a replica's answer would be older than what the client has seen.
    seen_until: Instant,
    /// When it logged in: what `seen_until` begins with.
    began: Instant,
    /// The end of its last transaction that may have written.
    wrote_until: Instant,
    /// What was shown to others as well, if that was the last thing.
    shown: Option<Shown>,
    /// What the operator says of its user.
    role: RoleTerms,
    /// The priority it was opened with.
    opened_priority: Option<Priority>,
    /// It is told where its requests go.
    explains: bool,
    /// The replica that answered last, and when.
    last_replica: Option<(usize, Instant)>,
    /// What those have seen who will have this session's answer.
    shared_floor: Option<Instant>,
    /// Its last poll found nothing.
    polled_in_vain: bool,

    grouping: Grouping,
    survey: Survey,
    exchange: Exchange,
    request: Request,
    transaction: Transaction,
    /// A request taken out of the client's input: should a replica refuse it, the primary gets it from here.
    kept: Vec<u8>,
    /// After an error of ours in an extended request: everything up to its Sync is ignored.
    /// (protocol-flow.html#PROTOCOL-FLOW-EXT-QUERY)
    skip_to_sync: bool,

    /// This client's pools, by upstream, as it came to need them.
    pools: Vec<Option<Member>>,
    lease: Option<Checkout>,
    /// When a wait for a server has lasted too long, and when the client is told of it.
    deadline: Alarm,
    notice: Alarm,
    /// The replica that the lease is, or last was, one of; `None`: the primary's.
    replica: Option<usize>,
}

/// What a finished login hands over.
pub(super) struct LoggedIn {
    pub(super) id: u64,
    pub(super) peer: SocketAddr,
    pub(super) client: Stream,
    pub(super) opening: Arc<Opening>,
    pub(super) application_name: String,
    pub(super) key: CancelKey,
    pub(super) reported: Reported,
    /// It begins with these.
    pub(super) settings: Arc<Settings>,
    pub(super) session_mode: bool,
}

/// The request under way, beside what passes on the wire (that is `Exchange`).
#[derive(Default)]
struct Request {
    /// What an extended request, as far as it has been sent, does to the session.
    effects: Vec<Effect>,
    /// Statements it has bound.
    bound: usize,
    /// By its first part.
    worth: Worth,
    coming: Coming,
    /// An answer from memory, should there be too much to do.
    older: Option<Arc<Answer>>,
    /// There was too much to do.
    refused: bool,
    /// The client is still to be told where it goes.
    unexplained: Option<Box<Unexplained>>,
    /// The answers to what it has sent so far are known: see `Phase::Settling`.
    settled: bool,
    /// What of its last batch waits for such answers. (Boxed, as all that is rare: each idle session has room for it.)
    remainder: Option<Box<Remainder>>,
    /// It was cancelled while it waited for a replica.
    cancelled: bool,
}

/// Since when a request waits, for whatever it is.
#[derive(Default)]
struct Coming {
    /// When it first had to ask for something; `None`: it has not.
    at: Option<Instant>,
    /// How many had been lent one of the primary's servers after waiting for it, if it waited for others before that.
    granted: Option<u64>,
}

/// The transaction under way; a request outside one is its own.
#[derive(Default)]
struct Transaction {
    /// It writes to runs.
    writing: Option<Writing>,
    /// What it has read or written, if that is known.
    touched: Option<Touched>,
    /// Its server has been made to listen to these, all that the client did before; `None`: it was not.
    lent: Option<Vec<String>>,
    /// It ran LISTEN or UNLISTEN.
    subscribes: bool,
    /// The names of channels that mean more to the hub than to the server.
    named: Vec<Named>,
    /// What its server was notified of, if it ran LISTEN or UNLISTEN.
    heard: Option<Box<Overheard>>,
    /// The queues it may put messages into.
    feeds: Feeds,
    /// It may have sent events.
    tells: bool,
}

/// What a transaction has had to do with.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Touched {
    /// `All` if several or not known.
    run: RunRef,
    /// It did more than read.
    wrote: bool,
}

impl Touched {
    const ANYTHING: Self = Self {
        run: RunRef::All,
        wrote: true,
    };
}

impl Transaction {
    /// A statement of it concerns `run`. Of one that nothing is known of (a function of the user's own), that is any run.
    fn touch(&mut self, class: &StatementClass, run: RunRef) {
        let (run, wrote) = match class {
            StatementClass::Read(_) => (run, false),
            // Whatever is shown of a flow may be different now.
            StatementClass::Define => (RunRef::All, true),
            StatementClass::Poll(_)
            | StatementClass::Progress(_)
            | StatementClass::Start(_)
            | StatementClass::Other => (run, true),
        };
        self.touched = match self.touched {
            None => Some(Touched { run, wrote }),
            Some(before) => Some(Touched {
                run: match (before.run, run) {
                    (same, other) if same == other || other == RunRef::None => same,
                    (RunRef::None, other) => other,
                    (_, _) => RunRef::All,
                },
                wrote: before.wrote || wrote,
            }),
        };
    }
}

/// Where the bytes of a request are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    /// At the front of the client's input.
    Input,
    /// In `kept`.
    Kept,
}

impl Source {
    fn bytes<'a>(self, client: &'a Stream, kept: &'a [u8]) -> &'a [u8] {
        match self {
            Self::Input => client.input.bytes(),
            Self::Kept => kept,
        }
    }
}

impl Session {
    pub(super) fn new(mut login: LoggedIn, shared: Arc<Shared>) -> Self {
        login.client.rest();
        let mut standing = shared.standing.clone();
        let Standing { running, live } = standing.borrow_and_update().clone();
        let home = shared.pools.pool(&login.opening, upstream::PRIMARY);
        let listed = shared.roster.enter(Newcomer {
            id: login.id,
            kind: Kind::Session,
            peer: login.peer,
            opening: &login.opening,
            application_name: &login.application_name,
            slot: &login.key.slot,
            client: &login.client,
        });
        let began = Instant::now();
        let role = live.config.role(&login.opening.user);
        Self {
            id: login.id,
            client: login.client,
            standing,
            running,
            live,
            listed,
            tally: Tally::new(&home.stats),
            pools: vec![Some(home.join(&login.opening))],
            key: login.key,
            reported: login.reported,
            state: State::new(login.settings, login.session_mode),
            application_name: login.application_name,
            prepared: Prepared::new(login.id),
            subscriber: None,
            hub: None,
            seen_until: began,
            began,
            wrote_until: shared.started,
            shown: None,
            role,
            opened_priority: priority::opened_with(&login.opening),
            explains: explaining::opened_with(&login.opening),
            opening: login.opening,
            last_replica: None,
            shared,
            shared_floor: None,
            polled_in_vain: false,
            grouping: Grouping::default(),
            survey: Survey::default(),
            exchange: Exchange::default(),
            request: Request::default(),
            transaction: Transaction::default(),
            kept: Vec::new(),
            skip_to_sync: false,
            lease: None,
            deadline: Alarm::default(),
            notice: Alarm::default(),
            replica: None,
        }
    }

    /// Serves requests until the client says goodbye, or is told to go.
    pub(super) async fn run(&mut self) -> Result<(), SessionError> {
        let outside = Outside::new(self.entry(), &self.standing);
        tokio::select! {
            biased;
            ended = self.serve() => ended,
            error = outside.ends() => Err(error),
        }
    }

    async fn serve(&mut self) -> Result<(), SessionError> {
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
        // It may have committed without our hearing of it.
        if let Some(touched) = self.transaction.touched.filter(|touched| touched.wrote) {
            self.shared.runs.changed(touched.run);
        }
        self.give_up_server().await;
        if self.transaction.tells
            && let Some(hub) = self.hub()
        {
            // What was under way may have been committed.
            hub.committed();
        }
        for member in self.pools.iter().flatten() {
            member.pool().disown(self.id);
        }
    }

    /// What others see of this client.
    pub(super) fn entry(&self) -> &Arc<Entry> {
        self.listed.entry()
    }

    /// Goes by what all clients have been told last.
    fn adopt_standing(&mut self) {
        let Standing { running, live } = self.standing.borrow_and_update().clone();
        self.running = running;
        let moved = !Arc::ptr_eq(&live.upstreams, &self.live.upstreams);
        self.role = live.config.role(&self.opening.user);
        self.live = live;
        if moved {
            // A replica's place is another's now; what the last one showed stays the floor.
            if let Some((_, answered)) = self.last_replica.take() {
                self.seen_until = self.seen_until.max(answered);
            }
            for member in self.pools.drain(1..).flatten() {
                member.pool().disown(self.id);
            }
        }
    }

    async fn query(&mut self, header: Header) -> Result<(), SessionError> {
        let body = body_so_far(self.client.input.bytes(), header);
        let analysis = match query_text(body) {
            Some(text) => self.live.classifier.analyse(text),
            // Judged by its beginning; what its end does is known by its tag alone.
            None if header.is_huge() => self.live.classifier.analyse(body),
            None => {
                self.skip(header.whole).await?;
                let invalid = ErrorResponse::error("08P01", "invalid string in message");
                return self.refuse(invalid, true).await;
            }
        };
        self.transaction
            .touch(&analysis.class, unresolved(analysis.class.run()));
        self.transaction.note_feeds(&analysis);
        self.request.older = None;
        self.request.coming = Coming::default();
        self.request.worth = self.worth(&analysis);
        let plan = self.plan(&analysis);
        if self.explains {
            self.tell_plan(&plan, Some(&analysis));
        }
        match plan {
            Plan::Subscribe(change) => self.subscribe_query(header, &change).await,
            Plan::Explain(at) => Box::pin(self.explain_query(header, at)).await,
            Plan::Read(run) => Box::pin(self.share_query(header, &analysis, run)).await,
            // Boxed, or every idle client would keep room for it.
            Plan::Park => Box::pin(self.park_query(header, &analysis)).await,
            Plan::Primary | Plan::Held => {
                self.run_query(Source::Input, header.whole, &analysis).await
            }
        }
    }

    /// A simple Query that reads: on a replica that is fresh enough, or on the primary.
    async fn read_query(
        &mut self,
        header: Header,
        analysis: &Arc<Analysis>,
        run: RunRef,
    ) -> Result<(), SessionError> {
        let Some(fresh) = self.fresh_replica(run).await else {
            return self.run_query(Source::Input, header.whole, analysis).await;
        };
        self.keep(header.whole);
        if self.query_replica(fresh, analysis).await? {
            return Ok(());
        }
        self.run_query(Source::Kept, self.kept.len(), analysis)
            .await
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
            return self.without_server(&error, source, whole, true).await;
        }
        self.tell_answered(&Answered::By(PRIMARY));
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

    async fn function_call(&mut self, header: Header) -> Result<(), SessionError> {
        self.request.older = None;
        self.request.coming = Coming::default();
        self.request.worth = Worth::default();
        self.request.unexplained = None;
        self.transaction.tells = true;
        self.run_query(Source::Input, header.whole, &Analysis::opaque())
            .await
    }

    /// Parse…Sync, or the part of it up to a Flush.
    async fn extended(&mut self, len: usize, end: BatchEnd) -> Result<(), SessionError> {
        self.take_survey(Source::Input, len, end);
        self.request.older = None;
        self.request.coming = Coming::default();
        self.request.worth = Worth::default();
        let plan = match self.survey.only() {
            Some((analysis, run)) => {
                let worth = self.worth(analysis);
                self.request.worth = worth;
                match self.plan(analysis) {
                    Plan::Read(_) => Plan::Read(run),
                    other => other,
                }
            }
            None => Plan::Primary,
        };
        if self.explains {
            self.tell_batch(&plan, end);
        }
        if !matches!(plan, Plan::Explain(_)) && self.answers_parse(len, end) {
            self.keep(len);
            return self.answer_kept_batch("").await;
        }
        match plan {
            Plan::Subscribe(change) if end == BatchEnd::Sync && self.survey.bound.len() == 1 => {
                return self.subscribe_extended(len, &change).await;
            }
            Plan::Read(run) if self.still_reads(end) => {
                return Box::pin(self.share_batch(len, end, run)).await;
            }
            Plan::Park => return Box::pin(self.park_batch(len, end)).await,
            Plan::Explain(_) if self.explains_whole(len, end) => {
                return Box::pin(self.explain_batch(len)).await;
            }
            Plan::Explain(_) | Plan::Read(_) | Plan::Subscribe(_) | Plan::Primary | Plan::Held => {}
        }
        self.run_extended(Source::Input, len, end).await
    }

    /// An extended request on the server in hand, or on the primary, to its end.
    async fn run_extended(
        &mut self,
        source: Source,
        len: usize,
        end: BatchEnd,
    ) -> Result<(), SessionError> {
        if let Err(error) = self.hold(PRIMARY).await {
            let (whole, ends) = (whole_length(len, end), end == BatchEnd::Sync);
            return self.without_server(&error, source, whole, ends).await;
        }
        self.tell_answered(&Answered::By(PRIMARY));
        self.shared.counters.to_primary.inc();
        let needs: Vec<_> = self.survey.needs().cloned().collect();
        self.make_ready_for(&needs).await?;
        self.begin_extended();
        let before = self.tx();
        self.put_batch(source, len, end);
        let status = loop {
            match self.relay().await? {
                Pause::Ready(status) => break status,
                Pause::ClientSpeaks => self.put_more().await?,
                Pause::Refused | Pause::Misnamed => {
                    return Err(SessionError::Relay(RelayError::ServerMalformed));
                }
            }
        };
        let effects = std::mem::take(&mut self.request.effects);
        self.finish(&effects, self.request.bound.max(1), before, status)
            .await
    }

    /// After ReadyForQuery: what the request did to the session, and whether the server goes back.
    async fn finish(
        &mut self,
        effects: &[Effect],
        statements: usize,
        before: TxStatus,
        after: TxStatus,
    ) -> Result<(), SessionError> {
        self.key.slot.note_turn();
        let there = self.lease.as_ref().map(|lease| &lease.statements);
        self.prepared.settle(self.exchange.confirmed, there);
        self.take_back_statements().await?;
        if self.exchange.parameters_changed
            && let Some(lease) = &self.lease
        {
            self.reported = lease.reported.clone();
            self.note_name();
        }
        let now = Instant::now();
        let tag = self.exchange.tag;
        // An error is soon said, a poll waits, a COPY takes as long as its client does, one of several in a transaction may be
        // nothing but a BEGIN: none says how its server fares.
        let whole = before == TxStatus::Idle && after == TxStatus::Idle;
        let telling = self.exchange.error.is_none() && self.request.worth != Worth::Poll;
        if telling
            && whole
            && tag.command() != b"COPY"
            && let Some(lease) = &self.lease
        {
            lease.note_took(self.tally.took(now), now);
        }
        self.tally.ended(now, after == TxStatus::Idle, &self.client);
        let ending = Ending {
            failed: self.exchange.error.is_some(),
            rolled_back: tag.is("ROLLBACK"),
            chained: after != TxStatus::Idle && before != TxStatus::Idle && tag.is("COMMIT"),
            before,
            after,
        };
        let pins_before = self.state.pins;
        let consequences = self.state.request_ended(effects, statements, ending);
        if self.state.pins != pins_before {
            self.shared
                .counters
                .count_pins(pins_before, self.state.pins);
            self.entry().note_pins(self.state.pins);
        }
        self.entry().note_statements(self.prepared.len());
        self.forget_deallocated(effects, ending, consequences);
        self.mark_server(effects);
        self.note_subscriptions(effects);
        if consequences.settings_changed {
            self.adopt_settings(consequences);
            self.note_explains();
        }
        if after == TxStatus::Idle || ending.chained {
            self.tell(statements, ending);
        } else {
            self.tell_of_another(effects, statements, before);
        }
        if after == TxStatus::Idle {
            self.end_transaction(now).await?;
        }
        self.close_books();
        if after == TxStatus::Idle {
            self.hear_own().await?;
        }
        if let Some(lease) = self.lease.as_mut() {
            lease.rest();
        }
        if self.exchange.keep_ready {
            put_ready(&mut self.client.output, after);
            self.client.flush().await?;
        }
        Ok(())
    }

    /// What was deallocated or discarded, nobody holds any more: neither client nor server.
    fn forget_deallocated(
        &mut self,
        effects: &[Effect],
        ending: Ending,
        consequences: Consequences,
    ) {
        if !ending.failed {
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
            lease.probes = false;
        }
        if consequences.discarded_all {
            self.prepared.forget_unnamed();
            if let Some(subscriber) = &self.subscriber {
                subscriber.unlisten_all();
            }
        }
    }

    /// What has been committed, also AND CHAIN, the server has from now on.
    fn adopt_settings(&mut self, consequences: Consequences) {
        if let Some(lease) = self.lease.as_mut() {
            self.state.adopt_reported(&lease.reported);
            lease.settings = Arc::clone(&self.state.settings);
            if consequences.reset {
                reset::forget_settings_but(lease, &self.state.settings);
            }
        }
    }

    /// Outside a transaction again: the session adopts what was committed, and keeps the server only if it is pinned to it.
    async fn end_transaction(&mut self, now: Instant) -> Result<(), SessionError> {
        if self.replica.is_none() {
            self.seen_until = now;
            let touched = self.transaction.touched.take();
            let touched = touched.unwrap_or(Touched::ANYTHING);
            self.transaction.writing = None;
            self.feed();
            if touched.wrote {
                self.wrote_until = now;
                self.shared.runs.written(touched.run);
            } else {
                self.shared.runs.seen(touched.run);
            }
        }
        self.state.forget_transaction();
        if self.transaction.subscribes {
            Box::pin(self.adopt_subscriptions()).await?;
        } else if let Some(lent) = self.transaction.lent.take() {
            self.take_back_subscriptions(&lent).await?;
        }
        if let Some(code) = self.state.take_opaque()
            && self.replica.is_none()
        {
            self.look_behind(code).await?;
        }
        self.close_books();
        if self.state.pins.is_empty() || self.replica.is_some() {
            self.check_in(now).await;
        }
        Ok(())
    }

    fn begin_extended(&mut self) {
        self.exchange.begin(true, Phase::Open);
        if let Some(lease) = self.lease.as_mut() {
            prepared::put_closes(lease, &mut self.exchange.expected);
        }
        self.request.effects.clear();
        self.request.bound = 0;
        self.request.settled = false;
        self.request.remainder = None;
    }

    /// The transaction under way writes to `run`, or to any.
    fn note_write(&mut self, run: RunRef) {
        self.transaction.writing = Some(match self.transaction.writing.take() {
            Some(writing) => writing.and(run),
            None => self.shared.runs.writing(run),
        });
    }

    /// Of reads, pgflow's own are worth least; the application's may be routed, but give way to nobody.
    fn worth(&self, analysis: &Analysis) -> Worth {
        match analysis.class.worth() {
            Worth::Read if self.live.route.reads == Reads::All => Worth::Other,
            worth => worth,
        }
    }

    fn plan(&self, analysis: &Analysis) -> Plan {
        let view = match (&self.lease, self.tx()) {
            (_, TxStatus::InTransaction | TxStatus::Failed) => SessionView::Transaction,
            (Some(_), TxStatus::Idle) => SessionView::Pinned,
            (None, TxStatus::Idle) => SessionView::Free,
        };
        route::plan(analysis, view, self.live.route)
    }

    /// Takes a request out of the client's input.
    fn keep(&mut self, len: usize) {
        self.kept.clear();
        self.kept.shrink_to(KEPT_MAX);
        self.kept
            .extend_from_slice(self.client.input.bytes().get(..len).unwrap_or_default());
        self.client.input.consume(len);
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
}

/// A simple Query's parameters cannot name a run.
fn unresolved(run: RunRef) -> RunRef {
    if let RunRef::Param(_) = run {
        RunRef::All
    } else {
        run
    }
}

/// The body of a message, as much of it as is here.
fn body_so_far(bytes: &[u8], header: Header) -> &[u8] {
    bytes
        .get(frame::HEADER..header.whole.min(bytes.len()))
        .unwrap_or_default()
}

/// How long a batch is, its huge last message to its end.
fn whole_length(len: usize, end: BatchEnd) -> usize {
    match end {
        BatchEnd::Huge { at, whole } => at + whole,
        BatchEnd::Sync | BatchEnd::Flush => len,
    }
}

/// A server that fails a command of ours in the middle of a session is lost to it.
fn server_lost(_why: ResetError) -> SessionError {
    SessionError::Relay(RelayError::ServerClosed)
}
