//! Who listens to what: `Hubs` (one a process), `Hub` (one a database), `Subscriber` (one a client session), and the
//! synchronous `State` between them. Never talks to Postgres (that is `upstream.rs`) and never waits for a reader.
//!
//! Locks: a hub's state first, an inbox second, never the other way round, neither over an await.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{Notify, oneshot};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::config::{Config, ConnectUrl, Events};
use crate::metrics::Registry;
use crate::pgflow::events::{
    ALL_CHANNEL, Channel, FLOW_PREFIX, has_bad_cursor, run_of_topic, run_topic, truncate_identifier,
};
use crate::server::questions::{Answer as Answered, Asker, Database, DbError};

use super::past::{NOW, Start};
use super::sight::{Proof, Sight};
use super::subscription::{
    Begin, Bounds, CutReason, Delivery, Event, Frames, Guard, Inbox, Offered, Resume, StreamId,
    Takes, Target, notification,
};
use super::{EventMetrics, EventsError, upstream, watch};

/// Bytes that may wait for one reader, besides the frames `events.queue` allows.
const QUEUE_BYTES: usize = 16 << 20;
/// Channels one session may listen to.
const CHANNELS: usize = 10_000;
/// How long shutdown waits for the listeners to say goodbye.
const GOODBYE: Duration = Duration::from_secs(2);

/// Connections of a database that ask what those who listen may see.
const SIGHT_CONNECTIONS: usize = 2;
/// And that read, for those who resume, what would hold up the listener's.
const REPLAY_CONNECTIONS: usize = 2;

/// All hubs of a process.
pub(crate) struct Hubs {
    common: Arc<Common>,
    hubs: Mutex<HashMap<String, Weak<Hub>>>,
}

/// Hears of every event's topic, before any subscriber does.
pub(crate) type Told = Box<dyn Fn(&str) + Send + Sync>;

/// What all hubs share.
pub(super) struct Common {
    told: Told,
    pub(super) control: ConnectUrl,
    pub(super) settings: Events,
    /// Our readers' name in `flowgate.reader`, one a database.
    pub(super) reader: Uuid,
    pub(super) connect_timeout: Duration,
    /// How long whoever subscribes waits for what that takes, in a crowd or while the primary restarts.
    checkout_timeout: Duration,
    recheck: Duration,
    pub(super) metrics: EventMetrics,
    handle: Handle,
    /// `None` once shut down: then no listener starts any more.
    tasks: Mutex<Option<JoinSet<()>>>,
}

impl Hubs {
    /// The listeners run on `handle`'s runtime, whatever thread subscribes. Within `http.recheck` they hear no more of what
    /// was revoked.
    pub(crate) fn new(
        told: Told,
        config: &Config,
        reader: Uuid,
        registry: &Registry,
        handle: Handle,
    ) -> Arc<Self> {
        let metrics = EventMetrics::register(registry);
        let tasks = Mutex::new(Some(JoinSet::new()));
        let common = Arc::new(Common {
            told,
            control: config.primary.clone(),
            settings: config.events.clone(),
            reader,
            connect_timeout: config.pool.connect_timeout,
            checkout_timeout: config.pool.checkout_timeout,
            recheck: config.http.recheck,
            metrics,
            handle,
            tasks,
        });
        Arc::new(Self {
            common,
            hubs: Mutex::new(HashMap::new()),
        })
    }

    /// Costs nothing until somebody listens, and the connection goes a while after the last one left.
    pub(crate) fn of_database(&self, database: &str) -> Arc<Hub> {
        let mut hubs = lock(&self.hubs);
        if let Some(hub) = hubs.get(database).and_then(Weak::upgrade) {
            return hub;
        }
        hubs.retain(|_, hub| hub.strong_count() > 0);
        let hub = Arc::new(Hub::new(database.to_owned(), Arc::clone(&self.common)));
        hubs.insert(database.to_owned(), Arc::downgrade(&hub));
        hub
    }

    /// Every channel that is listened to.
    pub(crate) fn report(&self) -> Vec<ChannelReport> {
        let hubs: Vec<_> = lock(&self.hubs)
            .values()
            .filter_map(Weak::upgrade)
            .collect();
        hubs.iter().flat_map(|hub| hub.report()).collect()
    }

    /// Cuts every subscriber and waits for the listeners to end.
    pub(crate) async fn shutdown(&self) {
        let tasks = lock(&self.common.tasks).take();
        let hubs: Vec<Arc<Hub>> = lock(&self.hubs)
            .values()
            .filter_map(Weak::upgrade)
            .collect();
        for hub in hubs {
            hub.stop();
        }
        if let Some(mut tasks) = tasks {
            let all = async { while tasks.join_next().await.is_some() {} };
            if tokio::time::timeout(GOODBYE, all).await.is_err() {
                tasks.shutdown().await;
            }
        }
    }
}

/// A channel somebody listens to, for the console.
pub(crate) struct ChannelReport {
    pub(crate) database: String,
    pub(crate) name: String,
    /// `run`, `flow`, `all` or `ordinary`
    pub(crate) kind: &'static str,
    /// Of a run's channel.
    pub(crate) run_id: Option<String>,
    pub(crate) subscribers: usize,
    /// Frames its subscribers have yet to read, of whatever channel.
    pub(crate) queued: usize,
}

/// The events of one database.
pub(crate) struct Hub {
    pub(super) database: String,
    pub(super) common: Arc<Common>,
    state: Mutex<State>,
    /// There is something to do upstream.
    pub(super) kick: Notify,
    /// A session of ours has committed what no look has begun to find.
    observed: AtomicBool,
    /// We were told by NOTIFY since the last look.
    notified: AtomicBool,
    pub(super) sight: Arc<Sight>,
    /// Somebody waits to be told what it may see.
    pub(super) look: Notify,
    replays: Database,
    next_stream: AtomicU64,
}

/// An inbox where several threads reach it.
pub(super) struct Mailbox {
    inbox: Mutex<Inbox>,
}

impl Mailbox {
    pub(super) fn lock(&self) -> MutexGuard<'_, Inbox> {
        lock(&self.inbox)
    }
}

/// INVARIANT: nothing that panics half-way runs inside these locks, so a poisoned one still holds a whole state.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

type Answer = oneshot::Sender<Result<(), EventsError>>;
type Members = HashMap<StreamId, Arc<Mailbox>>;

/// Who listens to what, and what is to be done about it upstream.
#[derive(Default)]
pub(super) struct State {
    ordinary: HashMap<String, Ordinary>,
    /// By topic.
    runs: HashMap<String, Members>,
    flows: HashMap<String, Members>,
    all: Members,
    /// Ordinary channels that upstream may have to hear about.
    dirty: HashSet<String>,
    /// pgflow channels wait for the first reading of the outbox.
    outbox_waiters: Vec<(StreamId, Answer)>,
    /// Replays wait until their first page is queued.
    page_waiters: HashMap<StreamId, (Answer, Listened)>,
    /// Readers with room for a page of what they are owed.
    hungry: VecDeque<Arc<Mailbox>>,
    outbox: Outbox,
    /// They wait until whatever had been committed before they came has been handed out.
    fences: Vec<Answer>,
    /// Nobody followed pgflow for a moment, so what happened then is nobody's.
    forget_cursor: bool,
    /// By asker: what is to be asked for it.
    wanted: HashMap<[u8; 32], Wanted>,
    /// Those for whom something is being asked.
    looking: HashSet<[u8; 32]>,
    watching: bool,
    wake: bool,
    stopping: bool,
    running: bool,
    pid: i32,
}

/// What a session listens to as somebody.
pub(super) struct Guarded {
    pub(super) stream: StreamId,
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) asker: Arc<Asker>,
    pub(super) target: Target,
}

/// Runs of which somebody has to be told whether they are for it, and whose queues wait.
pub(super) struct Wanted {
    pub(super) asker: Arc<Asker>,
    pub(super) runs: HashSet<Uuid>,
    pub(super) mailboxes: HashMap<usize, Arc<Mailbox>>,
}

#[derive(Default)]
struct Ordinary {
    members: Members,
    /// Upstream has acknowledged our LISTEN, and no UNLISTEN has been sent since.
    present: bool,
    /// They become members when a LISTEN sent after they came is acknowledged: what upstream says before that was committed
    /// before their own LISTEN, as far as anybody can tell, and is not theirs. (sql-listen.html)
    joining: Vec<Joiner>,
    /// Those whose LISTEN is under way.
    asked: Vec<Joiner>,
}

struct Joiner {
    stream: StreamId,
    mailbox: Arc<Mailbox>,
    answer: Answer,
}

impl Ordinary {
    fn is_wanted(&self) -> bool {
        !(self.members.is_empty() && self.joining.is_empty() && self.asked.is_empty())
    }

    fn waiting(&self) -> impl Iterator<Item = &Joiner> {
        self.joining.iter().chain(&self.asked)
    }

    fn drain_waiting(&mut self) -> impl Iterator<Item = Joiner> {
        self.joining.drain(..).chain(self.asked.drain(..))
    }
}

/// What a replay adds to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Listened {
    /// Nothing: it can be refused.
    Anew,
    /// A subscription in force, which must not end in silence.
    Again,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Outbox {
    #[default]
    Off,
    On,
}

/// What the listener has to do now; empty: nothing.
#[derive(Default)]
pub(super) struct Work {
    pub(super) listen: Vec<String>,
    pub(super) unlisten: Vec<String>,
    pub(super) outbox: OutboxWork,
    pub(super) hungry: Vec<Arc<Mailbox>>,
    pub(super) fences: Vec<Fence>,
}

/// To be answered once upstream has said all it had to say.
pub(super) struct Fence(Answer);

impl Fence {
    pub(super) fn passed(self) {
        answer(self.0, Ok(()));
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum OutboxWork {
    #[default]
    Nothing,
    Start,
    Read,
    Stop,
}

impl Work {
    pub(super) fn is_empty(&self) -> bool {
        self.listen.is_empty()
            && self.unlisten.is_empty()
            && self.outbox == OutboxWork::Nothing
            && self.hungry.is_empty()
            && self.fences.is_empty()
    }
}

/// Why the outbox is looked at.
#[derive(Clone, Copy)]
pub(super) struct Reasons {
    /// A session of ours has committed.
    pub(super) observed: bool,
    /// We were told.
    pub(super) notified: bool,
}

enum Subscribed {
    InForce,
    Wait {
        stream: StreamId,
        listened: Listened,
        answer: oneshot::Receiver<Result<(), EventsError>>,
    },
}

impl State {
    fn follows_pgflow(&self) -> bool {
        !(self.runs.is_empty() && self.flows.is_empty() && self.all.is_empty())
    }

    fn is_idle(&self) -> bool {
        !self.follows_pgflow() && !self.ordinary.values().any(Ordinary::is_wanted)
    }

    /// Of pgflow's channels. In force as soon as this returns, while the outbox is being read: whatever is committed later is
    /// in no snapshot taken so far.
    fn join(&mut self, stream: StreamId, mailbox: &Arc<Mailbox>, target: &Target) {
        let members = match target {
            Target::Ordinary(_) => return,
            Target::Run { topic, .. } => self.runs.entry(topic.clone()).or_default(),
            Target::Flow(slug) => self.flows.entry(slug.clone()).or_default(),
            Target::All => &mut self.all,
        };
        members.insert(stream, Arc::clone(mailbox));
    }

    fn leave(&mut self, stream: StreamId, target: &Target) {
        self.page_waiters.remove(&stream);
        self.outbox_waiters
            .retain(|(waiting, _)| *waiting != stream);
        match target {
            Target::Ordinary(channel) => {
                if let Some(ordinary) = self.ordinary.get_mut(channel) {
                    ordinary.members.remove(&stream);
                    let others = |joiner: &Joiner| joiner.stream != stream;
                    ordinary.joining.retain(others);
                    ordinary.asked.retain(others);
                    if !ordinary.is_wanted() {
                        self.dirty.insert(channel.clone());
                    }
                }
            }
            Target::Run { topic, .. } => leave_members(&mut self.runs, topic, stream),
            Target::Flow(slug) => leave_members(&mut self.flows, slug, stream),
            Target::All => {
                self.all.remove(&stream);
            }
        }
        // While it is read, a cursor is nobody's secret: whoever joins before `Stop` is taken out of it is served by it.
        self.forget_cursor |= self.outbox == Outbox::Off && !self.follows_pgflow();
    }

    fn evict(&mut self, mailbox: &Mailbox, reason: CutReason) {
        let mut inbox = mailbox.lock();
        inbox.cut(reason);
        // What is queued stays readable, so the streams stay known to the inbox.
        for stream in inbox.stream_ids() {
            if let Some(target) = inbox.target(stream) {
                self.leave(stream, &target);
            }
        }
    }

    fn evict_all(&mut self, mailboxes: &[Arc<Mailbox>], reason: CutReason) -> u64 {
        let mut evicted = 0;
        for mailbox in mailboxes {
            if !mailbox.lock().is_cut() {
                evicted += 1;
            }
            self.evict(mailbox, reason);
        }
        evicted
    }

    fn pgflow_members(&self) -> impl Iterator<Item = (&StreamId, &Arc<Mailbox>)> {
        self.runs
            .values()
            .flatten()
            .chain(self.flows.values().flatten())
            .chain(&self.all)
    }

    fn want(&mut self, asker: Arc<Asker>, topic: &str, mailbox: &Arc<Mailbox>) {
        let Some(run) = run_of_topic(topic) else {
            return;
        };
        let wanted = self.wanted.entry(asker.print).or_insert_with(|| Wanted {
            asker,
            runs: HashSet::new(),
            mailboxes: HashMap::new(),
        });
        wanted.runs.insert(run);
        let place = Arc::as_ptr(mailbox).addr();
        wanted
            .mailboxes
            .entry(place)
            .or_insert_with(|| Arc::clone(mailbox));
    }

    fn has_guarded(&self) -> bool {
        let mut members = self.pgflow_members();
        members.any(|(stream, mailbox)| mailbox.lock().guard(*stream).is_some())
    }

    fn guarded(&self) -> Vec<Guarded> {
        self.pgflow_members()
            .filter_map(|(stream, mailbox)| {
                let inbox = mailbox.lock();
                Some(Guarded {
                    stream: *stream,
                    asker: Arc::clone(&inbox.guard(*stream)?.asker),
                    target: inbox.target(*stream)?,
                    mailbox: Arc::clone(mailbox),
                })
            })
            .collect()
    }

    /// Its reader may not hear it. `false`: it has left.
    fn end(&mut self, stream: StreamId, mailbox: &Mailbox) -> bool {
        let mut inbox = mailbox.lock();
        let Some((guard, target)) = inbox.guard(stream).cloned().zip(inbox.target(stream)) else {
            return false;
        };
        let mut ended_before = false;
        if let Some((waiter, listened)) = self.page_waiters.remove(&stream) {
            ended_before = listened == Listened::Anew;
            let error = EventsError::Denied {
                role: guard.asker.role.clone(),
                channel: channel_of(&target),
                one_run: true,
            };
            answer(waiter, Err(error));
        }
        // What was never in force ends with that answer.
        if ended_before {
            inbox.remove(stream);
        } else {
            inbox.end(stream, self.pid);
        }
        drop(inbox);
        self.leave(stream, &target);
        true
    }

    fn take_work(&mut self) -> Work {
        let mut work = Work::default();
        for channel in std::mem::take(&mut self.dirty) {
            let Some(ordinary) = self.ordinary.get_mut(&channel) else {
                continue;
            };
            match (ordinary.is_wanted(), ordinary.present) {
                (true, true) if ordinary.joining.is_empty() => {}
                // To one that is listened to already, a LISTEN does nothing; its answer tells before from after.
                (true, true | false) => {
                    ordinary.asked.append(&mut ordinary.joining);
                    work.listen.push(channel);
                }
                // From here on it counts as gone: whoever joins now gets a LISTEN of its own, sent after the UNLISTEN.
                (false, true) => {
                    ordinary.present = false;
                    self.ordinary.remove(&channel);
                    work.unlisten.push(channel);
                }
                (false, false) => {
                    self.ordinary.remove(&channel);
                }
            }
        }
        work.outbox = match (self.outbox, self.follows_pgflow()) {
            (Outbox::Off, true) => OutboxWork::Start,
            // Off under this lock: whoever joins from here on waits for a cursor of its own.
            (Outbox::On, false) => {
                self.outbox = Outbox::Off;
                OutboxWork::Stop
            }
            (Outbox::On, true) if std::mem::take(&mut self.wake) => OutboxWork::Read,
            (Outbox::On, true) | (Outbox::Off, false) => OutboxWork::Nothing,
        };
        if self.outbox == Outbox::On {
            work.hungry = self.hungry.drain(..).collect();
        }
        work.fences = self.fences.drain(..).map(Fence).collect();
        work
    }

    /// Upstream has acknowledged these.
    fn listened(&mut self, channels: &[String]) {
        for channel in channels {
            let Some(ordinary) = self.ordinary.get_mut(channel) else {
                // All left while we asked: an entry again, so that the UNLISTEN is found to be due.
                self.ordinary.insert(
                    channel.clone(),
                    Ordinary {
                        present: true,
                        ..Ordinary::default()
                    },
                );
                self.dirty.insert(channel.clone());
                continue;
            };
            ordinary.present = true;
            for joiner in ordinary.asked.drain(..) {
                ordinary.members.insert(joiner.stream, joiner.mailbox);
                answer(joiner.answer, Ok(()));
            }
            if !ordinary.is_wanted() {
                self.dirty.insert(channel.clone());
            }
        }
    }

    /// The outbox is being read from here on.
    fn outbox_on(&mut self) {
        self.outbox = Outbox::On;
        self.wake = true;
        for (_, waiter) in self.outbox_waiters.drain(..) {
            answer(waiter, Ok(()));
        }
        // A connection may have been lost between a wish for pages and its fulfilment.
        let mut asked = HashSet::new();
        let mut hungry = VecDeque::new();
        for (_, mailbox) in self.pgflow_members() {
            if asked.insert(Arc::as_ptr(mailbox)) && mailbox.lock().ask_pages_anew() {
                hungry.push_back(Arc::clone(mailbox));
            }
        }
        self.hungry = hungry;
    }

    /// There is no outbox: pgflow's channels are ordinary ones that nobody notifies yet.
    fn make_ordinary(&mut self) {
        let members: Vec<(StreamId, Arc<Mailbox>)> = self
            .pgflow_members()
            .map(|(stream, mailbox)| (*stream, Arc::clone(mailbox)))
            .collect();
        self.runs.clear();
        self.flows.clear();
        self.all.clear();
        self.forget_cursor = true;
        let mut waiters: HashMap<StreamId, Answer> = self.outbox_waiters.drain(..).collect();
        waiters.extend(
            self.page_waiters
                .drain()
                .map(|(stream, (waiter, _))| (stream, waiter)),
        );
        for (stream, mailbox) in members {
            let mut inbox = mailbox.lock();
            if inbox.takes_events() {
                // For those there are no ordinary channels.
                let waiter = waiters.remove(&stream);
                if waiter.is_some() {
                    inbox.remove(stream);
                }
                drop(inbox);
                match waiter {
                    Some(waiter) => {
                        let why = "this database has no outbox; see flowgate install";
                        answer(waiter, Err(EventsError::Upstream(why.to_owned())));
                    }
                    None => self.evict(&mailbox, CutReason::ListenerLost),
                }
                continue;
            }
            let Some(spelling) = inbox.spelling(stream) else {
                continue;
            };
            let channel = truncate_identifier(&spelling).to_owned();
            inbox.make_ordinary(stream, &channel);
            drop(inbox);
            let ordinary = self.ordinary.entry(channel.clone()).or_default();
            match waiters.remove(&stream) {
                Some(answer) => ordinary.joining.push(Joiner {
                    stream,
                    mailbox,
                    answer,
                }),
                None => {
                    ordinary.members.insert(stream, mailbox);
                }
            }
            self.dirty.insert(channel);
        }
    }

    /// The connection is gone. Returns those whose ordinary channels were in force: they may have missed something.
    fn lost(&mut self) -> Vec<Arc<Mailbox>> {
        self.outbox = Outbox::Off;
        self.forget_cursor |= !self.follows_pgflow();
        let mut bereft: Vec<Arc<Mailbox>> = Vec::new();
        for (channel, ordinary) in &mut self.ordinary {
            if std::mem::take(&mut ordinary.present) {
                bereft.extend(ordinary.members.values().cloned());
            }
            ordinary.joining.append(&mut ordinary.asked);
            self.dirty.insert(channel.clone());
        }
        bereft
    }

    /// Those whose subscription was never in force lose it with this answer.
    fn refuse_outbox_waiters(&mut self, error: &EventsError) {
        let mut refused = std::mem::take(&mut self.outbox_waiters);
        for (stream, (waiter, listened)) in self.page_waiters.drain() {
            match listened {
                Listened::Anew => refused.push((stream, waiter)),
                Listened::Again => answer(waiter, Err(error.clone())),
            }
        }
        let members: HashMap<StreamId, Arc<Mailbox>> = self
            .pgflow_members()
            .map(|(stream, mailbox)| (*stream, Arc::clone(mailbox)))
            .collect();
        for (stream, waiter) in refused {
            let target = members
                .get(&stream)
                .and_then(|mailbox| mailbox.lock().remove(stream));
            if let Some(target) = target {
                self.leave(stream, &target);
            }
            answer(waiter, Err(error.clone()));
        }
    }

    fn fail_waiters(&mut self, error: &EventsError) {
        let ordinary = self
            .ordinary
            .values_mut()
            .flat_map(|channel| channel.drain_waiting())
            .map(|joiner| joiner.answer);
        let fences = self.fences.drain(..);
        let outbox = self.outbox_waiters.drain(..).map(|(_, waiter)| waiter);
        let pages = self.page_waiters.drain().map(|(_, (waiter, _))| waiter);
        for waiter in ordinary.chain(fences).chain(outbox).chain(pages) {
            answer(waiter, Err(error.clone()));
        }
    }
}

fn channel_of(target: &Target) -> String {
    match target {
        Target::Ordinary(channel) | Target::Run { topic: channel, .. } => channel.clone(),
        Target::Flow(slug) => format!("{FLOW_PREFIX}{slug}"),
        Target::All => ALL_CHANNEL.to_owned(),
    }
}

fn leave_members(by_name: &mut HashMap<String, Members>, name: &str, stream: StreamId) {
    if let Some(members) = by_name.get_mut(name) {
        members.remove(&stream);
        if members.is_empty() {
            by_name.remove(name);
        }
    }
}

/// Nobody waits any more: then nobody needs to know.
fn answer(waiter: Answer, result: Result<(), EventsError>) {
    drop(waiter.send(result));
}

/// As its notifications will name it: without what is behind its `@`, else as the client spells it, as far as Postgres reads.
fn spelling<'a>(name: &'a str, channel: &Channel) -> &'a str {
    match channel {
        Channel::Run { .. } | Channel::Flow { .. } | Channel::All { .. } => {
            name.split_once('@').map_or(name, |(channel, _)| channel)
        }
        Channel::Ordinary(_) => truncate_identifier(name),
    }
}

impl Hub {
    fn new(database: String, common: Arc<Common>) -> Self {
        let (state, kick) = (Mutex::default(), Notify::new());
        let questions = Database::new(
            common.control.with_database(&database),
            "flowgate sight",
            SIGHT_CONNECTIONS,
            common.checkout_timeout,
            common.connect_timeout,
            Arc::clone(&common.metrics.sight_refused),
        );
        let replays = Database::new(
            common.control.with_database(&database),
            "flowgate replay",
            REPLAY_CONNECTIONS,
            common.checkout_timeout,
            common.connect_timeout,
            Arc::clone(&common.metrics.replay_waits),
        );
        let sight = Sight::new(Arc::new(questions), Proof::LoggedIn, common.recheck);
        Self {
            database,
            common,
            state,
            kick,
            observed: AtomicBool::new(false),
            notified: AtomicBool::new(false),
            sight: Arc::new(sight),
            look: Notify::new(),
            replays,
            next_stream: AtomicU64::new(1),
        }
    }

    fn report(&self) -> Vec<ChannelReport> {
        let state = lock(&self.state);
        let channel = |kind, name: &str, members: &Members| {
            let inboxes = members.values();
            ChannelReport {
                database: self.database.clone(),
                name: name.to_owned(),
                kind,
                run_id: None,
                subscribers: members.len(),
                queued: inboxes.map(|mailbox| mailbox.lock().queued()).sum(),
            }
        };
        let runs = state.runs.iter().filter_map(|(topic, members)| {
            let (stream, mailbox) = members.iter().next()?;
            let target = mailbox.lock().target(*stream);
            let Some(Target::Run { run_id, .. }) = target else {
                return None;
            };
            let mut report = channel("run", topic, members);
            report.name = format!("pgflow:run:{run_id}");
            report.run_id = Some(run_id);
            Some(report)
        });
        let flows = state
            .flows
            .iter()
            .map(|(slug, members)| channel("flow", &format!("pgflow:flow:{slug}"), members));
        let ordinary = state
            .ordinary
            .iter()
            .map(|(name, of)| channel("ordinary", name, &of.members));
        let all = (!state.all.is_empty()).then(|| channel("all", "pgflow_events", &state.all));
        let mut channels: Vec<_> = runs.chain(flows).chain(ordinary).chain(all).collect();
        channels.retain(|channel| channel.subscribers > 0);
        channels.sort_by(|a, b| a.name.cmp(&b.name));
        channels
    }

    pub(crate) fn subscriber(self: &Arc<Self>) -> Subscriber {
        self.subscriber_that(Takes::Frames)
    }

    /// One that gets events rather than frames: for pgflow's channels and topics alone.
    pub(crate) fn event_subscriber(self: &Arc<Self>) -> Subscriber {
        self.subscriber_that(Takes::Events)
    }

    fn subscriber_that(self: &Arc<Self>, takes: Takes) -> Subscriber {
        let bounds = Bounds {
            frames: self.common.settings.queue.get(),
            bytes: QUEUE_BYTES,
        };
        let mailbox = Arc::new(Mailbox {
            inbox: Mutex::new(Inbox::new(bounds, takes)),
        });
        Subscriber {
            hub: Arc::clone(self),
            mailbox,
        }
    }

    /// A session of ours has committed, and may have sent events: of that nobody is notified. Costs a load where nobody reads.
    pub(crate) fn committed(&self) {
        // INVARIANT: taken back before a look begins, so whoever finds it set is seen by that look.
        if !self.observed.load(Ordering::SeqCst) && !self.observed.swap(true, Ordering::SeqCst) {
            self.kick.notify_one();
        }
    }

    /// Something was committed to the outbox: read it now rather than at the next probe.
    pub(super) fn wake(&self) {
        self.notified.store(true, Ordering::SeqCst);
        let mut state = lock(&self.state);
        state.wake = true;
        let reading = state.outbox == Outbox::On;
        drop(state);
        if reading {
            self.common.metrics.wakeups.inc();
            self.kick.notify_one();
        }
    }

    fn subscribe(
        self: &Arc<Self>,
        mailbox: &Arc<Mailbox>,
        name: &str,
        channel: Channel,
        resume: Option<Resume>,
        guard: Option<Guard>,
    ) -> Result<Subscribed, EventsError> {
        let spelling = spelling(name, &channel);
        let (target, after) = match channel {
            Channel::Run { id, after } => (
                Target::Run {
                    topic: run_topic(id),
                    run_id: id.to_string(),
                },
                after,
            ),
            Channel::Flow { slug, from: _ } => (Target::Flow(slug.as_str().to_owned()), None),
            Channel::All { from: _ } => (Target::All, None),
            Channel::Ordinary(channel) => (Target::Ordinary(channel), None),
        };
        let begin = match (after, resume) {
            (Some(seq), _) => Begin::After(seq),
            (None, Some(resume)) => Begin::Past(Box::new(resume)),
            (None, None) => Begin::Now,
        };
        self.enlist(mailbox, spelling, target, begin, guard)
    }

    /// What a cursor in the channel's name comes to; `None`: there is none, or no outbox.
    async fn resume(&self, channel: &Channel) -> Result<Option<Resume>, EventsError> {
        let (Channel::Flow { from, .. } | Channel::All { from }) = channel else {
            return Ok(None);
        };
        let Some(cursor) = from else {
            return Ok(None);
        };
        let answer = match self.replay(NOW).await {
            Ok(answer) => answer,
            Err(DbError::Postgres { code, .. }) if ["42P01", "3F000"].contains(&&*code) => {
                return Ok(None);
            }
            Err(error) => return Err(EventsError::Upstream(error.to_string())),
        };
        let start = Start::parse(answer.rows.first())
            .ok_or_else(|| EventsError::Upstream("unexpected answer".to_owned()))?;
        Ok(Some(Resume::new(cursor.clone(), &start)))
    }

    /// Asks the outbox something that is not for the listener's connection.
    pub(super) async fn replay(&self, sql: &str) -> Result<Answered, DbError> {
        self.replays.ask_ourselves(sql).await
    }

    fn enlist(
        self: &Arc<Self>,
        mailbox: &Arc<Mailbox>,
        spelling: &str,
        target: Target,
        begin: Begin,
        guard: Option<Guard>,
    ) -> Result<Subscribed, EventsError> {
        let owed = !matches!(begin, Begin::Now);
        let mut state = lock(&self.state);
        if state.stopping {
            return Err(EventsError::Stopping);
        }
        let mut inbox = mailbox.lock();
        if inbox.is_cut() {
            return Err(EventsError::Cut);
        }
        let (sender, answer) = oneshot::channel();
        let guarded = guard.is_some();
        let (stream, listened) = match inbox.find(spelling) {
            Some(stream) => {
                inbox.set_guard(stream, guard);
                if !inbox.replay(stream, begin) {
                    return Ok(Subscribed::InForce);
                }
                (stream, Listened::Again)
            }
            None if inbox.channel_count() >= CHANNELS => {
                return Err(EventsError::TooManyChannels { limit: CHANNELS });
            }
            None => {
                let stream = self.next_stream.fetch_add(1, Ordering::Relaxed);
                inbox.add(stream, spelling, target.clone(), begin, guard);
                state.join(stream, mailbox, &target);
                (stream, Listened::Anew)
            }
        };
        if inbox.ask_pages() || owed {
            state.hungry.push_back(Arc::clone(mailbox));
        }
        drop(inbox);
        let in_force = match &target {
            Target::Ordinary(channel) => {
                state.dirty.insert(channel.clone());
                let ordinary = state.ordinary.entry(channel.clone()).or_default();
                ordinary.joining.push(Joiner {
                    stream,
                    mailbox: Arc::clone(mailbox),
                    answer: sender,
                });
                false
            }
            Target::Run { .. } if owed => {
                state.page_waiters.insert(stream, (sender, listened));
                false
            }
            Target::Run { .. } | Target::Flow(_) | Target::All => {
                let in_force = state.outbox == Outbox::On || listened == Listened::Again;
                if !in_force {
                    state.outbox_waiters.push((stream, sender));
                }
                in_force
            }
        };
        let start = !std::mem::replace(&mut state.running, true);
        let watch = guarded && !std::mem::replace(&mut state.watching, true);
        drop(state);
        if start {
            self.start(upstream::run(Arc::clone(self)))?;
        }
        if watch {
            self.start(watch::run(Arc::clone(self)))?;
        }
        self.kick.notify_one();
        Ok(if in_force {
            Subscribed::InForce
        } else {
            Subscribed::Wait {
                stream,
                listened,
                answer,
            }
        })
    }

    pub(super) fn start(
        &self,
        task: impl Future<Output = ()> + Send + 'static,
    ) -> Result<(), EventsError> {
        let mut tasks = lock(&self.common.tasks);
        let Some(tasks) = tasks.as_mut() else {
            return Err(EventsError::Stopping);
        };
        while tasks.try_join_next().is_some() {}
        tasks.spawn_on(task, &self.common.handle);
        Ok(())
    }

    fn fence(&self, answer: Answer) {
        let mut state = lock(&self.state);
        // While there is no connection nobody takes them out; then no more are kept than sessions wait.
        state.fences.retain(|fence| !fence.is_closed());
        state.fences.push(answer);
        drop(state);
        self.kick.notify_one();
    }

    fn unsubscribe(&self, mailbox: &Mailbox, stream: StreamId) {
        let mut state = lock(&self.state);
        let target = mailbox.lock().remove(stream);
        if let Some(target) = target {
            state.leave(stream, &target);
        }
        drop(state);
        self.kick.notify_one();
    }

    fn stop(&self) {
        let mut state = lock(&self.state);
        state.stopping = true;
        let everybody: Vec<Arc<Mailbox>> = state
            .pgflow_members()
            .map(|(_, mailbox)| mailbox)
            .chain(state.ordinary.values().flat_map(|channel| {
                let waiting = channel.waiting().map(|joiner| &joiner.mailbox);
                channel.members.values().chain(waiting)
            }))
            .cloned()
            .collect();
        state.fail_waiters(&EventsError::Stopping);
        state.evict_all(&everybody, CutReason::ShuttingDown);
        drop(state);
        self.kick.notify_one();
        self.look.notify_one();
    }

    /// Whether the outbox is being read for somebody.
    pub(super) fn is_reading(&self) -> bool {
        lock(&self.state).outbox == Outbox::On
    }

    pub(super) fn is_observed(&self) -> bool {
        self.observed.load(Ordering::SeqCst)
    }

    /// A look at the outbox begins.
    pub(super) fn take_reasons(&self) -> Reasons {
        Reasons {
            observed: self.observed.swap(false, Ordering::SeqCst),
            notified: self.notified.swap(false, Ordering::SeqCst),
        }
    }

    /// The floor: whether or not a wake-up came.
    pub(super) fn probe(&self) {
        lock(&self.state).wake = true;
    }

    pub(super) fn hungry(&self, mailbox: &Arc<Mailbox>) {
        lock(&self.state).hungry.push_back(Arc::clone(mailbox));
        self.kick.notify_one();
    }
}

/// For the listener task alone.
impl Hub {
    pub(super) fn take_work(&self) -> Work {
        lock(&self.state).take_work()
    }

    pub(super) fn is_stopping(&self) -> bool {
        lock(&self.state).stopping
    }

    pub(super) fn is_idle(&self) -> bool {
        lock(&self.state).is_idle()
    }

    /// Nobody listens: the task may end, and the next LISTEN starts another.
    pub(super) fn retire(&self) -> bool {
        let mut state = lock(&self.state);
        let retire = state.stopping || state.is_idle();
        if retire {
            state.running = false;
            state.outbox = Outbox::Off;
            state.ordinary.clear();
            state.dirty.clear();
        }
        drop(state);
        if retire {
            self.look.notify_one();
            self.replays.rest();
        }
        retire
    }

    pub(super) fn connected(&self, pid: i32) {
        lock(&self.state).pid = pid;
    }

    pub(super) fn lost(&self) {
        let mut state = lock(&self.state);
        let bereft = state.lost();
        let cut = state.evict_all(&bereft, CutReason::ListenerLost);
        self.common.metrics.cuts_lost.add(cut);
    }

    /// The outbox cannot be read any more: nobody may be left waiting for it in silence.
    pub(super) fn outbox_lost(&self, error: &EventsError) {
        let mut state = lock(&self.state);
        state.outbox = Outbox::Off;
        state.refuse_outbox_waiters(error);
        let bereft: Vec<Arc<Mailbox>> = state
            .pgflow_members()
            .map(|(_, mailbox)| Arc::clone(mailbox))
            .collect();
        let cut = state.evict_all(&bereft, CutReason::ListenerLost);
        self.common.metrics.cuts_lost.add(cut);
    }

    /// What it resumes with cannot be read: it comes back, or goes without.
    pub(super) fn give_up(&self, mailbox: &Mailbox) {
        lock(&self.state).evict(mailbox, CutReason::ListenerLost);
        self.common.metrics.cuts_lost.inc();
    }

    pub(super) fn fail_waiters(&self, error: &EventsError) {
        lock(&self.state).fail_waiters(error);
    }

    pub(super) fn listened(&self, channels: &[String]) {
        lock(&self.state).listened(channels);
    }

    pub(super) fn take_forget_cursor(&self) -> bool {
        std::mem::take(&mut lock(&self.state).forget_cursor)
    }

    pub(super) fn outbox_on(&self) {
        lock(&self.state).outbox_on();
    }

    pub(super) fn outbox_missing(&self) {
        lock(&self.state).make_ordinary();
    }

    pub(super) fn distrust(&self, last_event_id: i64) {
        let state = lock(&self.state);
        for (stream, mailbox) in state.pgflow_members() {
            if mailbox.lock().distrust(*stream, last_event_id, state.pid) == Offered::Gap {
                self.common.metrics.gaps.inc();
            }
        }
    }

    pub(super) fn dispatch_ordinary(&self, pid: i32, channel: &str, payload: &str) {
        let mut state = lock(&self.state);
        let Some(ordinary) = state.ordinary.get(channel) else {
            return;
        };
        let frame = notification(pid, channel, payload);
        let mut queued = 0;
        let mut slow = Vec::new();
        for (stream, mailbox) in &ordinary.members {
            match mailbox.lock().offer_ordinary(*stream, &frame) {
                Offered::Queued => queued += 1,
                Offered::Cut => slow.push(Arc::clone(mailbox)),
                Offered::Skipped
                | Offered::Behind
                | Offered::Gap
                | Offered::Veiled
                | Offered::Denied => {}
            }
        }
        self.common.metrics.deliveries.add(queued);
        self.common.metrics.cuts_slow.add(slow.len() as u64);
        state.evict_all(&slow, CutReason::TooSlow);
    }

    pub(super) fn dispatch_event(&self, event: &Arc<Event>) {
        (self.common.told)(&event.topic);
        let mut state = lock(&self.state);
        let known = |asker: &Asker, run| self.sight.known(asker, run);
        let mut frames = Frames::new(event, state.pid, &known);
        let run = state.runs.get(&event.topic).into_iter().flatten();
        let flow = event
            .flow
            .as_ref()
            .and_then(|slug| state.flows.get(slug))
            .into_iter()
            .flatten();
        // Other topics are between their senders and those who know them.
        let all = event
            .topic
            .starts_with("pgflow:")
            .then_some(&state.all)
            .into_iter()
            .flatten();
        let (mut queued, mut behind, mut gaps) = (0, 0, 0);
        let (mut veiled, mut denied) = (Vec::new(), Vec::new());
        for (stream, mailbox) in run.chain(flow).chain(all) {
            let mut inbox = mailbox.lock();
            match inbox.offer_event(*stream, &mut frames) {
                Offered::Queued => queued += 1,
                Offered::Behind => behind += 1,
                Offered::Gap => gaps += 1,
                Offered::Skipped | Offered::Cut => {}
                Offered::Veiled => {
                    let asker = inbox.guard(*stream).map(|guard| Arc::clone(&guard.asker));
                    veiled.extend(asker.map(|asker| (asker, Arc::clone(mailbox))));
                }
                Offered::Denied => denied.push((*stream, Arc::clone(mailbox))),
            }
        }
        self.common
            .metrics
            .deliveries
            .add(queued + veiled.len() as u64);
        self.common.metrics.behind.add(behind);
        self.common.metrics.gaps.add(gaps);
        for (stream, mailbox) in denied {
            self.count_end(state.end(stream, &mailbox));
        }
        if !veiled.is_empty() {
            for (asker, mailbox) in veiled {
                state.want(asker, &event.topic, &mailbox);
            }
            drop(state);
            self.look.notify_one();
        }
    }

    /// A row of a page was queued veiled.
    pub(super) fn veiled(&self, stream: StreamId, event: &Event, mailbox: &Arc<Mailbox>) {
        let asker = mailbox
            .lock()
            .guard(stream)
            .map(|guard| Arc::clone(&guard.asker));
        if let Some(asker) = asker {
            lock(&self.state).want(asker, &event.topic, mailbox);
            self.look.notify_one();
        }
    }

    /// The reader may not hear it any more, and is told so.
    pub(super) fn deny(&self, stream: StreamId, mailbox: &Mailbox) {
        let ended = lock(&self.state).end(stream, mailbox);
        self.count_end(ended);
        self.kick.notify_one();
    }

    fn count_end(&self, ended: bool) {
        self.common.metrics.denied.add(u64::from(ended));
    }

    pub(super) fn pid(&self) -> i32 {
        lock(&self.state).pid
    }

    /// What there was to replay at once is queued.
    pub(super) fn paged(&self, stream: StreamId, mailbox: &Arc<Mailbox>) {
        let mut state = lock(&self.state);
        if let Some((waiter, _)) = state.page_waiters.remove(&stream) {
            answer(waiter, Ok(()));
        }
        if mailbox.lock().ask_pages() {
            state.hungry.push_back(Arc::clone(mailbox));
        }
    }
}

/// For `watch` alone.
impl Hub {
    /// What is to be asked now; `None`: nobody listens as somebody.
    pub(super) fn take_wanted(&self) -> Option<Vec<Wanted>> {
        let mut state = lock(&self.state);
        if state.stopping || (state.looking.is_empty() && !state.has_guarded()) {
            state.watching = false;
            state.wanted.clear();
            return None;
        }
        let State {
            wanted, looking, ..
        } = &mut *state;
        // One question at a time for an asker: what comes meanwhile is in the next.
        let ready = wanted.extract_if(|print, _| !looking.contains(print));
        let ready: Vec<Wanted> = ready.map(|(_, wanted)| wanted).collect();
        looking.extend(ready.iter().map(|wanted| wanted.asker.print));
        Some(ready)
    }

    pub(super) fn looked(&self, asker: &Asker) {
        lock(&self.state).looking.remove(&asker.print);
    }

    /// It is known which of the runs asked for this asker may see.
    pub(super) fn unveil<'a>(
        &self,
        asker: &Asker,
        asked: &HashSet<Uuid>,
        shown: &HashSet<Uuid>,
        mailboxes: impl Iterator<Item = &'a Arc<Mailbox>>,
    ) {
        let mut state = lock(&self.state);
        for mailbox in mailboxes {
            let denied = mailbox.lock().unveil(asker, asked, shown);
            for stream in denied {
                self.count_end(state.end(stream, mailbox));
            }
        }
        drop(state);
        self.kick.notify_one();
    }

    /// Whoever listens to runs as somebody.
    pub(super) fn guarded(&self) -> Vec<Guarded> {
        lock(&self.state).guarded()
    }

    /// As `deny`, unless it listens as somebody else by now.
    pub(super) fn end(&self, stream: StreamId, mailbox: &Mailbox, asker: &Asker) {
        let mut state = lock(&self.state);
        let same = mailbox
            .lock()
            .guard(stream)
            .is_some_and(|guard| guard.asker.print == asker.print);
        if same {
            self.count_end(state.end(stream, mailbox));
        }
        drop(state);
        self.kick.notify_one();
    }
}

fn named(name: &str) -> Result<Channel, EventsError> {
    if name.is_empty() {
        return Err(EventsError::EmptyChannel);
    }
    if has_bad_cursor(name) {
        return Err(EventsError::BadCursor);
    }
    Ok(Channel::parse(name))
}

/// One client's inbox: any number of channels, one bounded queue. Dropping it unlistens.
pub(crate) struct Subscriber {
    hub: Arc<Hub>,
    mailbox: Arc<Mailbox>,
}

impl Subscriber {
    /// Resolves once the subscription is in force: whatever is committed from then on will be delivered, or its absence
    /// announced. An error, and dropping the future, leave things as they were.
    pub(crate) async fn listen(&self, channel: &str) -> Result<(), EventsError> {
        self.listen_guarded(channel, named(channel)?, None).await
    }

    /// The same, for somebody who must be allowed to hear it, and hears no more of it than is allowed.
    pub(crate) async fn listen_as(
        &self,
        channel: &str,
        asker: &Arc<Asker>,
    ) -> Result<(), EventsError> {
        let named = named(channel)?;
        let wait = self.hub.common.checkout_timeout;
        let guard = tokio::time::timeout(wait, watch::admit(&self.hub.sight, &named, asker)).await;
        let guard = guard.unwrap_or(Err(EventsError::Timeout(wait)));
        let guard = guard.inspect_err(|error| {
            if matches!(
                error,
                EventsError::Denied { .. } | EventsError::Unproven { .. }
            ) {
                self.hub.common.metrics.denied.inc();
            }
        })?;
        self.listen_guarded(channel, named, Some(guard)).await
    }

    /// Whether the settings of who listens there count, which policies may read.
    pub(crate) async fn goes_by_rows(&self, channel: &str, asker: &Asker) -> bool {
        let wait = self.hub.common.checkout_timeout;
        let channel = Channel::parse(channel);
        let watched = watch::is_watched(&self.hub.sight, &channel, asker);
        tokio::time::timeout(wait, watched).await.unwrap_or(true)
    }

    async fn listen_guarded(
        &self,
        name: &str,
        channel: Channel,
        guard: Option<Guard>,
    ) -> Result<(), EventsError> {
        let resume = self.hub.resume(&channel).await?;
        let subscribed = self
            .hub
            .subscribe(&self.mailbox, name, channel, resume, guard)?;
        self.settle(subscribed).await
    }

    /// As `listen`, to a topic of the outbox by its own name, a run's or any other, from what follows `after` on. Again for one
    /// that is followed already: then all that comes again.
    pub(crate) async fn follow(&self, topic: &str, after: i64) -> Result<(), EventsError> {
        let target = Target::Run {
            topic: topic.to_owned(),
            run_id: run_of_topic(topic).map_or_else(String::new, |run| run.to_string()),
        };
        let subscribed =
            self.hub
                .enlist(&self.mailbox, topic, target, Begin::After(after), None)?;
        self.settle(subscribed).await
    }

    async fn settle(&self, subscribed: Subscribed) -> Result<(), EventsError> {
        match subscribed {
            Subscribed::InForce => Ok(()),
            Subscribed::Wait {
                stream,
                listened,
                answer,
            } => {
                let stream = (listened == Listened::Anew).then_some(stream);
                let mut undo = Undo {
                    subscriber: self,
                    stream,
                };
                let wait = self.hub.common.checkout_timeout;
                match tokio::time::timeout(wait, answer).await {
                    Ok(Ok(result)) => result?,
                    Ok(Err(_closed)) => return Err(EventsError::Cut),
                    Err(_elapsed) => return Err(EventsError::Timeout(wait)),
                }
                undo.stream = None;
                Ok(())
            }
        }
    }

    /// Returns when whatever had been committed before is in the inbox, for ordinary channels; `false`: not in time.
    pub(crate) async fn catch_up(&self, wait: Duration) -> bool {
        let (sender, passed) = oneshot::channel();
        self.hub.fence(sender);
        let passed = tokio::time::timeout(wait, passed).await;
        let in_time = matches!(passed, Ok(Ok(Ok(()))));
        if !in_time {
            self.hub.common.metrics.own_late.inc();
        }
        in_time
    }

    /// Whether it listens to a channel of Postgres' own kind.
    pub(crate) fn hears_ordinary(&self) -> bool {
        self.mailbox.lock().hears_ordinary()
    }

    /// Ends what `follow` began.
    pub(crate) fn unfollow(&self, topic: &str) {
        let stream = self.mailbox.lock().find(topic);
        if let Some(stream) = stream {
            self.hub.unsubscribe(&self.mailbox, stream);
        }
    }

    /// Those, as Postgres names them.
    pub(crate) fn ordinary_channels(&self) -> HashSet<String> {
        self.mailbox.lock().ordinary_channels()
    }

    pub(crate) fn unlisten(&self, channel: &str) {
        let spelling = spelling(channel, &Channel::parse(channel));
        let stream = self.mailbox.lock().find(spelling);
        if let Some(stream) = stream {
            self.hub.unsubscribe(&self.mailbox, stream);
        }
    }

    pub(crate) fn unlisten_all(&self) {
        let streams = self.mailbox.lock().stream_ids();
        for stream in streams {
            self.hub.unsubscribe(&self.mailbox, stream);
        }
    }

    /// Cancel-safe. After a `Cut` nothing but that `Cut` comes.
    pub(crate) fn channels(&self) -> Vec<String> {
        self.mailbox.lock().channels()
    }

    pub(crate) fn poll_next(&self, cx: &mut Context<'_>) -> Poll<Delivery> {
        let mut inbox = self.mailbox.lock();
        let popped = inbox.pop();
        if popped.delivery.is_none() {
            inbox.wait(cx.waker());
        }
        drop(inbox);
        if popped.ask_pages {
            self.hub.hungry(&self.mailbox);
        }
        popped.delivery.map_or(Poll::Pending, Poll::Ready)
    }

    pub(crate) fn try_next(&self) -> Option<Delivery> {
        let popped = self.mailbox.lock().pop();
        if popped.ask_pages {
            self.hub.hungry(&self.mailbox);
        }
        popped.delivery
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        self.unlisten_all();
    }
}

/// Takes a subscription back unless told that it is in force.
struct Undo<'a> {
    subscriber: &'a Subscriber,
    stream: Option<StreamId>,
}

impl Drop for Undo<'_> {
    fn drop(&mut self) {
        if let Some(stream) = self.stream {
            self.subscriber
                .hub
                .unsubscribe(&self.subscriber.mailbox, stream);
        }
    }
}
