//! One subscriber's inbox: its channels, one bounded queue of encoded frames, and what is owed to a reader that fell
//! behind. Synchronous and pure: no I/O, no clock. `hub.rs` keeps it inside a lock and fills it.
//!
//! Why not hold live events while a run is replayed: a run's events carry a gap-free `seq`, so a stream that is catching
//! up drops live ones and goes on paging the outbox until a page comes back short. That read happened after the last live
//! read, so every event the next live read brings is either new or recognised by its `seq`. The same road takes a reader
//! back that was too slow, so what it missed waits in Postgres and not in our memory.
//!
//! A stream of many runs that resumes does likewise, by snapshots: it pages what its cursor has not seen and the listener's last look
//! has, and when it has got there while that is still the last one, the next look brings just what it lacks.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, OnceLock};
use std::task::Waker;

use bytes::{BufMut, Bytes, BytesMut};
use uuid::Uuid;

use crate::pgflow::events::{run_of_topic, with_cursor};
use crate::pgflow::snapshot::{Cursor, Snapshot};
use crate::server::questions::Asker;

use super::past::{self, Missed, Start};

/// Rows of one replay page; the inbox may take fewer.
pub(super) const PAGE_ROWS: usize = 256;

/// The last payload of a channel whose listener may not hear it any more; the streams of `http` say the same.
const END: &str = "{\"event_type\": \"error\", \"code\": \"42501\", \"message\": \"the role may not see this any more\"}";

/// What a subscriber gets.
#[derive(Clone, Debug)]
pub(crate) enum Delivery {
    /// A whole NotificationResponse. Of those who take events, gap markers only.
    Frame(Bytes),
    /// For those who take events.
    Event(Arc<Event>),
    /// The last delivery. The session must end (57P01): it can no longer be told what it asked to hear.
    Cut(CutReason),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CutReason {
    /// The upstream listener broke, and ordinary notifications may have been lost.
    ListenerLost,
    /// The reader's queue overflowed with ordinary notifications.
    TooSlow,
    ShuttingDown,
}

/// One LISTEN of one subscriber; never used twice.
pub(super) type StreamId = u64;

/// How an inbox wants what it is offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Takes {
    Frames,
    Events,
}

/// An event of the outbox, its payload already as subscribers see it.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) id: i64,
    pub(crate) topic: String,
    pub(crate) seq: Option<i64>,
    pub(super) flow: Option<String>,
    pub(crate) payload: String,
    /// As it was sent: `run:started`, `step:<slug>:completed`.
    pub(crate) name: String,
    pub(crate) message_id: String,
    /// Not for everybody who knows the topic's name.
    pub(crate) private: bool,
    /// Of the transaction that sent it.
    pub(crate) xid: u64,
    /// `None`: it came again, from a replay of its run.
    pub(crate) reading: Option<Arc<Reading>>,
    pub(super) encoded: [OnceLock<Bytes>; FORMS],
}

/// One look at the outbox: what had been seen before, and what by it.
#[derive(Debug)]
pub(crate) struct Reading {
    pub(crate) before: Snapshot,
    pub(crate) now: Snapshot,
}

impl Reading {
    fn cursor(&self, id: i64) -> Cursor {
        Cursor {
            id,
            before: self.before.clone(),
            now: self.now.clone(),
        }
    }
}

/// What an event is encoded as, once for all that want it so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Form {
    StreamOfRun,
    StreamOfAll,
    SocketV1,
    SocketV2,
}

const FORMS: usize = 4;

impl Event {
    /// Its bytes in that form, made at the first call.
    pub(crate) fn encoded(&self, form: Form, make: impl FnOnce(&Self) -> Bytes) -> Bytes {
        self.encoded[form as usize]
            .get_or_init(|| make(self))
            .clone()
    }
}

/// The frames of one event: encoded once per channel spelling, shared by all that spell it so.
pub(super) struct Frames<'a> {
    pub(super) event: &'a Arc<Event>,
    pid: i32,
    made: Vec<(Arc<str>, Bytes)>,
    /// What is known of who may see a run.
    known: &'a dyn Fn(&Asker, Uuid) -> Option<bool>,
    judged: Vec<([u8; 32], Look)>,
}

/// Whether a reader may see an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Look {
    Shown,
    /// Of this run; it is veiled until somebody has asked.
    Unknown(Uuid),
    Hidden,
}

/// As whom a session listens.
#[derive(Clone, Debug)]
pub(super) struct Guard {
    pub(super) asker: Arc<Asker>,
    /// What it may see goes by the run.
    pub(super) watched: bool,
}

/// Nobody may read it until it is known whether this asker may see that run.
#[derive(Debug)]
struct Veil {
    asker: Arc<Asker>,
    run: Uuid,
}

impl<'a> Frames<'a> {
    pub(super) fn new(
        event: &'a Arc<Event>,
        pid: i32,
        known: &'a dyn Fn(&Asker, Uuid) -> Option<bool>,
    ) -> Self {
        Self {
            event,
            pid,
            made: Vec::new(),
            known,
            judged: Vec::new(),
        }
    }

    fn look(&mut self, guard: Option<&Guard>) -> Look {
        let Some(Guard { asker, .. }) = guard.filter(|guard| guard.watched) else {
            return Look::Shown;
        };
        let mut judged = self.judged.iter();
        if let Some((_, look)) = judged.find(|(print, _)| *print == asker.print) {
            return *look;
        }
        let look = match run_of_topic(&self.event.topic) {
            None => Look::Hidden,
            Some(run) => match (self.known)(asker, run) {
                None => Look::Unknown(run),
                Some(true) => Look::Shown,
                Some(false) => Look::Hidden,
            },
        };
        self.judged.push((asker.print, look));
        look
    }

    fn made_for(&mut self, takes: Takes, stream: &Stream) -> What {
        match takes {
            Takes::Frames => What::Frame(self.spelled(stream)),
            Takes::Events => What::Event(Arc::clone(self.event)),
        }
    }

    fn spelled(&mut self, stream: &Stream) -> Bytes {
        let channel = &stream.spelling;
        if let Some((_, frame)) = self.made.iter().find(|(spelling, _)| spelling == channel) {
            return frame.clone();
        }
        let Event { id, payload, .. } = &**self.event;
        let frame = match (&stream.target, &self.event.reading) {
            (Target::Flow(_) | Target::All, Some(reading)) => {
                let payload = with_cursor(payload, *id, &reading.cursor(*id));
                notification(self.pid, channel, &payload)
            }
            _ => notification(self.pid, channel, payload),
        };
        self.made.push((Arc::clone(channel), frame.clone()));
        frame
    }
}

/// NotificationResponse (protocol-message-formats.html).
pub(super) fn notification(pid: i32, channel: &str, payload: &str) -> Bytes {
    let length = 4 + 4 + channel.len() + 1 + payload.len() + 1;
    let mut frame = BytesMut::with_capacity(1 + length);
    frame.put_u8(b'A');
    frame.put_u32(u32::try_from(length).expect("Postgres carries no value above 1 GB"));
    frame.put_i32(pid);
    frame.put_slice(channel.as_bytes());
    frame.put_u8(0);
    frame.put_slice(payload.as_bytes());
    frame.put_u8(0);
    frame.freeze()
}

/// What a stream hears.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// The channel as Postgres knows it.
    Ordinary(String),
    /// The run's topic in the outbox and, for the gap marker, its id.
    Run {
        topic: String,
        run_id: String,
    },
    Flow(String),
    All,
}

#[derive(Debug)]
struct Stream {
    spelling: Arc<str>,
    target: Target,
    /// Of a run: the last `seq` queued. Of a flow or all: unused.
    last_seq: Option<i64>,
    phase: Phase,
    /// `None`: whoever reads it sees to that.
    guard: Option<Guard>,
}

#[derive(Debug)]
enum Phase {
    Live,
    /// Of a run: `seq > last_seq` comes from the outbox, page by page.
    Paging(Paging),
    /// Of a flow or all: what a cursor has not seen comes from the outbox, page by page.
    Resuming(Box<Past>),
    /// Of a flow or all: a marker for these ids stands at the end of what is queued; until it is read, all else adds to it.
    Gap {
        from: i64,
        to: Option<i64>,
        pid: i32,
    },
}

impl Phase {
    /// A page is owed that nobody reads yet.
    fn owes(&self) -> bool {
        match self {
            Self::Paging(_) => true,
            Self::Resuming(past) => !past.asked,
            Self::Live | Self::Gap { .. } => false,
        }
    }
}

/// Where it begins.
#[derive(Debug)]
pub(super) enum Begin {
    Now,
    /// Of a run: behind this `seq`.
    After(i64),
    /// Of a flow or all.
    Past(Box<Resume>),
}

/// What somebody resumes from.
#[derive(Debug)]
pub(super) struct Resume {
    cursor: Cursor,
    missed: Option<Missed>,
    /// Its history is no more: nothing can be read by it.
    lost: bool,
}

impl Resume {
    pub(super) fn new(cursor: Cursor, start: &Start) -> Self {
        Self {
            missed: start.missed_since(&cursor),
            lost: start.is_before(&cursor),
            cursor,
        }
    }
}

/// Where one that resumes is: behind this event of what one look saw and another did not.
#[derive(Debug)]
struct Past {
    id: i64,
    reading: Arc<Reading>,
    /// Nothing is behind it there.
    done: bool,
    /// One page was not all of that part: the rest is read where it holds nobody up.
    long: bool,
    /// Somebody reads a page for it.
    asked: bool,
    missed: Option<Missed>,
    lost: bool,
}

impl Past {
    fn new(resume: Resume) -> Self {
        let Resume {
            cursor,
            missed,
            lost,
        } = resume;
        let Cursor { id, before, now } = cursor;
        Self {
            id,
            reading: Arc::new(Reading { before, now }),
            done: false,
            long: false,
            asked: false,
            missed,
            lost,
        }
    }
}

/// What is to be done for one that resumes.
#[derive(Debug)]
pub(super) enum Step {
    /// It is gone, has no room, or somebody reads for it.
    Nothing,
    /// It is live: it has had all that had been seen.
    Live,
    /// A gap marker was queued.
    Gap,
    /// Its cursor is of a later look than the last one: look again.
    Behind,
    /// Read this here.
    Page(PastPage),
    /// Read this where it holds nobody up.
    FarPage(PastPage),
}

#[derive(Debug)]
pub(super) struct PastPage {
    pub(super) stream: StreamId,
    pub(super) at: Cursor,
    /// Of one flow.
    pub(super) slug: Option<String>,
    /// What its rows are behind, as events know it.
    pub(super) reading: Arc<Reading>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Paging {
    /// Nothing read yet: the first page looks for a gap.
    First(Why),
    All,
    /// Between these, only the latest event of each step and of the run.
    Latest {
        from: i64,
        to: i64,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    Asked,
    FellBehind,
}

/// What to read next for a stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Page {
    pub(super) stream: StreamId,
    pub(super) topic: String,
    pub(super) after: i64,
    /// `Some`: compacted, within these.
    pub(super) latest: Option<(i64, i64)>,
    /// The caller must say what the outbox has (`first_page`) and ask again before it reads rows.
    pub(super) first: bool,
}

/// What the outbox has of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Kept {
    /// The first event that has not been dropped for its age.
    pub(super) first: Option<i64>,
    /// The last ever sent.
    pub(super) last: Option<i64>,
}

/// What came of one offered frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Offered {
    Queued,
    /// Already had, or to be read from the outbox later.
    Skipped,
    /// There is no room: it and what follows will be read from the outbox.
    Behind,
    /// A gap marker was queued in its place.
    Gap,
    /// The reader is too slow and has been cut.
    Cut,
    /// Queued; somebody has to ask whether it may be read.
    Veiled,
    /// Of a run that is followed: not for this reader, so its stream has to end.
    Denied,
}

/// What came of one row of a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fed {
    Queued,
    /// Queued; somebody has to ask whether it may be read.
    Veiled,
    /// Not for this reader: its stream has to end.
    Denied,
    /// Not for this reader, whose stream goes on.
    Passed,
    /// Stop the page here; the rest comes once there is room.
    Full,
    /// Unlistened meanwhile.
    Gone,
}

/// How many frames and bytes may wait. A single frame always may.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) frames: usize,
    pub(super) bytes: usize,
}

#[derive(Debug)]
struct Item {
    stream: StreamId,
    what: What,
    veil: Option<Box<Veil>>,
    /// A notification of Postgres' own.
    ordinary: bool,
}

#[derive(Debug)]
enum What {
    Frame(Bytes),
    Event(Arc<Event>),
    /// This stream's gap marker, made when it is read.
    Marker,
}

impl What {
    /// An event's bytes are shared by all who wait for it; each is charged as if they were its own.
    fn len(&self) -> usize {
        match self {
            Self::Frame(frame) => frame.len(),
            Self::Event(event) => event.payload.len(),
            Self::Marker => 0,
        }
    }
}

#[derive(Debug)]
pub(super) struct Inbox {
    takes: Takes,
    bounds: Bounds,
    queue: VecDeque<Item>,
    bytes: usize,
    streams: HashMap<StreamId, Stream>,
    spellings: HashMap<Arc<str>, StreamId>,
    /// Streams whose phase owes a page.
    paging: usize,
    /// The hub knows that this inbox wants pages.
    asked: bool,
    cut: Option<CutReason>,
    waker: Option<Waker>,
}

/// What `pop` found.
#[derive(Debug)]
pub(super) struct Popped {
    pub(super) delivery: Option<Delivery>,
    /// Tell the hub: there is room for a page again.
    pub(super) ask_pages: bool,
}

impl Inbox {
    pub(super) fn channels(&self) -> Vec<String> {
        let mut channels: Vec<String> = self
            .spellings
            .keys()
            .map(|spelling| spelling.to_string())
            .collect();
        channels.sort_unstable();
        channels
    }

    pub(super) fn hears_ordinary(&self) -> bool {
        let mut streams = self.streams.values();
        streams.any(|stream| matches!(stream.target, Target::Ordinary(_)))
    }

    pub(super) fn ordinary_channels(&self) -> HashSet<String> {
        let targets = self.streams.values().map(|stream| &stream.target);
        targets
            .filter_map(|target| match target {
                Target::Ordinary(channel) => Some(channel.clone()),
                Target::Run { .. } | Target::Flow(_) | Target::All => None,
            })
            .collect()
    }

    pub(super) fn takes_events(&self) -> bool {
        self.takes == Takes::Events
    }

    pub(super) fn new(bounds: Bounds, takes: Takes) -> Self {
        Self {
            takes,
            bounds,
            queue: VecDeque::new(),
            bytes: 0,
            streams: HashMap::new(),
            spellings: HashMap::new(),
            paging: 0,
            asked: false,
            cut: None,
            waker: None,
        }
    }

    /// Frames waiting to be read.
    pub(super) fn queued(&self) -> usize {
        self.queue.len()
    }

    pub(super) fn is_cut(&self) -> bool {
        self.cut.is_some()
    }

    pub(super) fn find(&self, spelling: &str) -> Option<StreamId> {
        self.spellings.get(spelling).copied()
    }

    pub(super) fn spelling(&self, stream: StreamId) -> Option<Arc<str>> {
        self.streams
            .get(&stream)
            .map(|stream| Arc::clone(&stream.spelling))
    }

    pub(super) fn channel_count(&self) -> usize {
        self.streams.len()
    }

    pub(super) fn add(
        &mut self,
        id: StreamId,
        spelling: &str,
        target: Target,
        begin: Begin,
        guard: Option<Guard>,
    ) {
        let spelling: Arc<str> = spelling.into();
        let (last_seq, phase) = match begin {
            Begin::Now => (None, Phase::Live),
            Begin::After(seq) => (Some(seq), Phase::Paging(Paging::First(Why::Asked))),
            Begin::Past(resume) => (None, Phase::Resuming(Box::new(Past::new(*resume)))),
        };
        self.paging += usize::from(phase.owes());
        self.spellings.insert(Arc::clone(&spelling), id);
        self.streams.insert(
            id,
            Stream {
                spelling,
                target,
                last_seq,
                phase,
                guard,
            },
        );
    }

    pub(super) fn guard(&self, id: StreamId) -> Option<&Guard> {
        self.streams.get(&id)?.guard.as_ref()
    }

    /// It is listened to once more, as this one.
    pub(super) fn set_guard(&mut self, id: StreamId, guard: Option<Guard>) {
        if let (Some(stream), Some(guard)) = (self.streams.get_mut(&id), guard) {
            stream.guard = Some(guard);
        }
    }

    /// The rights of that asker have been looked at again.
    pub(super) fn rejudge(&mut self, id: StreamId, asker: &Asker, watched: bool) {
        if let Some(Stream {
            guard: Some(guard), ..
        }) = self.streams.get_mut(&id)
            && guard.asker.print == asker.print
        {
            guard.watched = watched;
        }
    }

    /// It is known what this asker may see. Returns the streams of a run that it may not.
    pub(super) fn unveil(
        &mut self,
        asker: &Asker,
        asked: &HashSet<Uuid>,
        shown: &HashSet<Uuid>,
    ) -> Vec<StreamId> {
        let (bytes, streams) = (&mut self.bytes, &self.streams);
        let mut denied = Vec::new();
        self.queue.retain_mut(|item| {
            let veil = item.veil.as_ref();
            let Some(veil) = veil.filter(|veil| veil.asker.print == asker.print) else {
                return true;
            };
            if shown.contains(&veil.run) {
                item.veil = None;
            } else if asked.contains(&veil.run) {
                let target = streams.get(&item.stream).map(|stream| &stream.target);
                if matches!(target, Some(Target::Run { .. })) && !denied.contains(&item.stream) {
                    denied.push(item.stream);
                }
                *bytes -= item.what.len();
                return false;
            }
            true
        });
        self.wake();
        denied
    }

    /// What it listened to is not for it any more: that is the last it hears of it.
    pub(super) fn end(&mut self, id: StreamId, pid: i32) {
        if let Some(spelling) = self.spelling(id) {
            self.remove(id);
            self.push(id, What::Frame(notification(pid, &spelling, END)));
        }
    }

    /// Also forgets what is queued for it: after UNLISTEN nothing of the channel may arrive.
    pub(super) fn remove(&mut self, id: StreamId) -> Option<Target> {
        let stream = self.streams.remove(&id)?;
        self.spellings.remove(&stream.spelling);
        self.paging -= usize::from(stream.phase.owes());
        let bytes = &mut self.bytes;
        self.queue.retain(|item| {
            let keep = item.stream != id;
            if !keep {
                *bytes -= item.what.len();
            }
            keep
        });
        Some(stream.target)
    }

    pub(super) fn target(&self, id: StreamId) -> Option<Target> {
        self.streams.get(&id).map(|stream| stream.target.clone())
    }

    /// Listened to already, and once more from somewhere: what follows comes again. `false`: from now on, which it does.
    pub(super) fn replay(&mut self, id: StreamId, begin: Begin) -> bool {
        let Some(stream) = self.streams.get_mut(&id) else {
            return false;
        };
        let phase = match begin {
            Begin::Now => return false,
            Begin::After(seq) => {
                stream.last_seq = Some(seq);
                Phase::Paging(Paging::First(Why::Asked))
            }
            Begin::Past(resume) => Phase::Resuming(Box::new(Past::new(*resume))),
        };
        turn(&mut self.paging, stream, phase);
        // A gap there was is being told whole.
        self.queue
            .retain(|item| item.stream != id || !matches!(item.what, What::Marker));
        true
    }

    pub(super) fn stream_ids(&self) -> Vec<StreamId> {
        self.streams.keys().copied().collect()
    }

    /// The outbox does not exist: what was a pgflow channel is an ordinary one.
    pub(super) fn make_ordinary(&mut self, id: StreamId, channel: &str) {
        if let Some(stream) = self.streams.get_mut(&id) {
            stream.target = Target::Ordinary(channel.to_owned());
            turn(&mut self.paging, stream, Phase::Live);
        }
    }

    pub(super) fn offer_ordinary(&mut self, id: StreamId, frame: &Bytes) -> Offered {
        if self.cut.is_some() || !self.streams.contains_key(&id) {
            return Offered::Skipped;
        }
        if !self.has_room(frame.len()) {
            // It won't read what waits either: let the memory go now.
            self.queue.clear();
            self.bytes = 0;
            self.cut(CutReason::TooSlow);
            return Offered::Cut;
        }
        self.push(id, What::Frame(frame.clone()));
        if let Some(item) = self.queue.back_mut() {
            item.ordinary = true;
        }
        Offered::Queued
    }

    pub(super) fn offer_event(&mut self, id: StreamId, frames: &mut Frames<'_>) -> Offered {
        let Some(stream) = self.streams.get_mut(&id) else {
            return Offered::Skipped;
        };
        if self.cut.is_some() {
            return Offered::Skipped;
        }
        let seq = match &stream.target {
            Target::Run { .. } => frames.event.seq,
            Target::Flow(_) | Target::All | Target::Ordinary(_) => None,
        };
        match &mut stream.phase {
            Phase::Live => {
                if seq.is_some() && seq <= stream.last_seq {
                    return Offered::Skipped;
                }
            }
            // An event without a `seq` is a signal of the moment (a task's), in no page: it would overtake the replay.
            Phase::Paging(_) | Phase::Resuming(_) => return Offered::Skipped,
            Phase::Gap { to, .. } => {
                *to = Some(frames.event.id);
                return Offered::Skipped;
            }
        }
        let look = frames.look(stream.guard.as_ref());
        if look == Look::Hidden {
            return match stream.target {
                Target::Run { .. } => Offered::Denied,
                Target::Flow(_) | Target::All | Target::Ordinary(_) => Offered::Skipped,
            };
        }
        let what = frames.made_for(self.takes, stream);
        if !has_room(&self.bounds, self.queue.len(), self.bytes, what.len()) {
            return self.fall_behind(id, frames);
        }
        if seq.is_some() {
            stream.last_seq = seq;
        }
        if self.push_looked(id, what, look) {
            Offered::Veiled
        } else {
            Offered::Queued
        }
    }

    fn fall_behind(&mut self, id: StreamId, frames: &Frames<'_>) -> Offered {
        let Some(stream) = self.streams.get_mut(&id) else {
            return Offered::Skipped;
        };
        let event = frames.event;
        let last_seq = stream.last_seq.or(event.seq.map(|seq| seq - 1));
        match (&stream.target, last_seq) {
            (Target::Run { .. }, Some(_)) => {
                stream.last_seq = last_seq;
                let phase = Phase::Paging(Paging::First(Why::FellBehind));
                turn(&mut self.paging, stream, phase);
                Offered::Behind
            }
            // Of a run: a signal before the first event that counts, so that nobody knows where to page from.
            (Target::Run { .. } | Target::Flow(_) | Target::All | Target::Ordinary(_), _) => {
                stream.phase = Phase::Gap {
                    from: event.id,
                    to: Some(event.id),
                    pid: frames.pid,
                };
                self.push_marker(id);
                Offered::Gap
            }
        }
    }

    /// History was rewritten upstream (failover): a run goes back to the outbox, the others are told.
    pub(super) fn distrust(&mut self, id: StreamId, last_event_id: i64, pid: i32) -> Offered {
        let Some(stream) = self.streams.get_mut(&id) else {
            return Offered::Skipped;
        };
        match (&stream.target, &stream.phase) {
            (Target::Ordinary(_), _) | (_, Phase::Paging(_) | Phase::Gap { .. }) => {
                Offered::Skipped
            }
            (Target::Run { .. }, Phase::Live) if stream.last_seq.is_some() => {
                let phase = Phase::Paging(Paging::First(Why::Asked));
                turn(&mut self.paging, stream, phase);
                Offered::Skipped
            }
            (
                Target::Run { .. } | Target::Flow(_) | Target::All,
                Phase::Live | Phase::Resuming(_),
            ) => {
                let phase = Phase::Gap {
                    from: last_event_id.saturating_add(1),
                    to: None,
                    pid,
                };
                turn(&mut self.paging, stream, phase);
                self.push_marker(id);
                Offered::Gap
            }
        }
    }

    /// The hub has taken note of the wish for pages: these are it. Empty while there is no room.
    pub(super) fn pages(&mut self) -> Vec<Page> {
        self.asked = false;
        if self.cut.is_some() {
            return Vec::new();
        }
        // Whoever asked may read on only when told that it is in force: that needs no room, rows do (`page`).
        let low = self.is_low();
        let asked =
            |stream: &Stream| matches!(stream.phase, Phase::Paging(Paging::First(Why::Asked)));
        self.streams
            .iter()
            .filter(|(_, stream)| low || asked(stream))
            .filter_map(|(&id, stream)| page(id, stream))
            .collect()
    }

    /// The same stream's next page, if it has one and there is room.
    pub(super) fn page(&self, id: StreamId) -> Option<Page> {
        if self.cut.is_some() || !self.is_low() {
            return None;
        }
        page(id, self.streams.get(&id)?)
    }

    /// Before the first row of a replay: queues the gap marker, if there is a gap.
    pub(super) fn first_page(&mut self, id: StreamId, kept: Kept, pid: i32) -> Offered {
        let room = self.bounds.frames.saturating_sub(self.queue.len() + 1);
        let Some(stream) = self.streams.get_mut(&id) else {
            return Offered::Skipped;
        };
        let (Phase::Paging(Paging::First(why)), Target::Run { run_id, .. }) =
            (&stream.phase, &stream.target)
        else {
            return Offered::Skipped;
        };
        let after = stream.last_seq.unwrap_or(0);
        let room = i64::try_from(room).unwrap_or(i64::MAX);
        // The gap, the `seq` the stream has got to by it, and how it goes on.
        let (gap, last_seq, phase) = match (kept.first, kept.last.or(kept.first)) {
            // Nothing yet; or all of it forgotten, counter and all, which only a reader that has seen some can tell.
            (_, None) => ((after > 0).then_some((after + 1, None)), None, Phase::Live),
            // A cursor from a history that is no more: its numbers will be given to other events.
            (_, Some(last)) if after > last => {
                (Some((last + 1, Some(after))), Some(last), Phase::Live)
            }
            (_, Some(last)) if after == last => (None, Some(after), Phase::Live),
            (None, Some(last)) => (Some((after + 1, Some(last))), Some(last), Phase::Live),
            (Some(first), Some(_)) if first > after + 1 => (
                Some((after + 1, Some(first - 1))),
                Some(first - 1),
                Phase::Paging(Paging::All),
            ),
            (Some(_), Some(to)) if *why == Why::FellBehind && to - after > room => {
                let from = after + 1;
                (
                    Some((from, Some(to))),
                    Some(after),
                    Phase::Paging(Paging::Latest { from, to }),
                )
            }
            (Some(_), Some(_)) => (None, Some(after), Phase::Paging(Paging::All)),
        };
        let marker = gap.map(|(from, to)| {
            let payload = gap_payload(
                "run_id",
                Some(run_id),
                &Bound::Seq(from),
                to.map(Bound::Seq).as_ref(),
            );
            notification(pid, &stream.spelling, &payload)
        });
        stream.last_seq = last_seq;
        turn(&mut self.paging, stream, phase);
        match marker {
            // Beyond the bound if need be: one a stream and replay.
            Some(frame) => {
                self.push(id, What::Frame(frame));
                Offered::Gap
            }
            None => Offered::Skipped,
        }
    }

    pub(super) fn page_row(&mut self, id: StreamId, frames: &mut Frames<'_>) -> Fed {
        let Some(stream) = self.streams.get_mut(&id) else {
            return Fed::Gone;
        };
        if self.cut.is_some() || !matches!(stream.phase, Phase::Paging(_)) {
            return Fed::Gone;
        }
        let look = frames.look(stream.guard.as_ref());
        if look == Look::Hidden {
            return Fed::Denied;
        }
        let what = frames.made_for(self.takes, stream);
        if !has_room(&self.bounds, self.queue.len(), self.bytes, what.len()) {
            return Fed::Full;
        }
        stream.last_seq = frames.event.seq;
        if self.push_looked(id, what, look) {
            Fed::Veiled
        } else {
            Fed::Queued
        }
    }

    /// The page came back short: nothing follows that a live read will not bring.
    pub(super) fn page_end(&mut self, id: StreamId) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        match stream.phase {
            Phase::Paging(Paging::All) => turn(&mut self.paging, stream, Phase::Live),
            // What was committed since the marker was made is not compacted.
            Phase::Paging(Paging::Latest { to, .. }) => {
                stream.last_seq = Some(to);
                stream.phase = Phase::Paging(Paging::All);
            }
            Phase::Paging(Paging::First(_))
            | Phase::Resuming(_)
            | Phase::Live
            | Phase::Gap { .. } => {}
        }
    }

    /// Those that resume and are owed a page.
    pub(super) fn pasts(&self) -> Vec<StreamId> {
        let resuming =
            |stream: &Stream| matches!(&stream.phase, Phase::Resuming(past) if !past.asked);
        let streams = self.streams.iter();
        streams
            .filter(|(_, stream)| resuming(stream))
            .map(|(&id, _)| id)
            .collect()
    }

    /// How one that resumes goes on, when `seen` is what the listener has read. `fresh`: there was a look since it was `Behind`.
    pub(super) fn past(&mut self, id: StreamId, seen: &Snapshot, fresh: bool, pid: i32) -> Step {
        let low = self.is_low();
        let (None, Some(stream)) = (self.cut, self.streams.get_mut(&id)) else {
            return Step::Nothing;
        };
        let Phase::Resuming(past) = &mut stream.phase else {
            return Step::Nothing;
        };
        if past.asked {
            return Step::Nothing;
        }
        if let Some(Missed { from, to }) = past.missed.take() {
            let gap = gap_of(stream, from, to, pid);
            self.push(id, What::Frame(gap));
            return Step::Gap;
        }
        if past.lost {
            turn(&mut self.paging, stream, Phase::Live);
            return Step::Live;
        }
        if past.done {
            let now = &past.reading.now;
            if !fresh && !seen.sees_all_of(now) {
                return Step::Behind;
            }
            if now == seen {
                turn(&mut self.paging, stream, Phase::Live);
                return Step::Live;
            }
            past.reading = Arc::new(Reading {
                before: now.clone(),
                now: seen.clone(),
            });
            (past.id, past.done, past.long) = (0, false, false);
        }
        if !low {
            return Step::Nothing;
        }
        let page = PastPage {
            stream: id,
            at: past.reading.cursor(past.id),
            slug: match &stream.target {
                Target::Flow(slug) => Some(slug.clone()),
                Target::All | Target::Run { .. } | Target::Ordinary(_) => None,
            },
            reading: Arc::clone(&past.reading),
        };
        if past::is_near(&past.reading) && !past.long {
            return Step::Page(page);
        }
        past.asked = true;
        self.paging -= 1;
        Step::FarPage(page)
    }

    /// A row of such a page.
    pub(super) fn past_row(
        &mut self,
        id: StreamId,
        reading: &Arc<Reading>,
        frames: &mut Frames<'_>,
    ) -> Fed {
        let (None, Some(stream)) = (self.cut, self.streams.get_mut(&id)) else {
            return Fed::Gone;
        };
        let look = frames.look(stream.guard.as_ref());
        let what = frames.made_for(self.takes, stream);
        let Some(past) = resuming(stream, reading) else {
            return Fed::Gone;
        };
        if look == Look::Hidden {
            past.id = frames.event.id;
            return Fed::Passed;
        }
        if !has_room(&self.bounds, self.queue.len(), self.bytes, what.len()) {
            return Fed::Full;
        }
        past.id = frames.event.id;
        if self.push_looked(id, what, look) {
            Fed::Veiled
        } else {
            Fed::Queued
        }
    }

    /// Nobody reads for it any more. `last`: it has all there is between the two looks.
    pub(super) fn past_end(&mut self, id: StreamId, reading: &Arc<Reading>, last: bool) {
        let stream = self.streams.get_mut(&id);
        if let Some(past) = stream.and_then(|stream| resuming(stream, reading)) {
            self.paging += usize::from(past.asked);
            past.asked = false;
            past.done |= last;
            past.long |= !last;
        }
    }

    pub(super) fn pop(&mut self) -> Popped {
        let delivery = loop {
            let veiled = self.queue.front().is_some_and(|item| item.veil.is_some());
            let item = if veiled {
                // No event must overtake it. To Postgres' own notifications events are in no order, as they are looked for.
                let ordinary = self.queue.iter().position(|item| item.ordinary);
                let Some(item) = ordinary.and_then(|at| self.queue.remove(at)) else {
                    break None;
                };
                item
            } else {
                let Some(item) = self.queue.pop_front() else {
                    break self.cut.map(Delivery::Cut);
                };
                item
            };
            self.bytes -= item.what.len();
            match item.what {
                What::Frame(frame) => break Some(Delivery::Frame(frame)),
                What::Event(event) => break Some(Delivery::Event(event)),
                What::Marker => {
                    if let Some(frame) = self.streams.get_mut(&item.stream).and_then(read_marker) {
                        break Some(Delivery::Frame(frame));
                    }
                }
            }
        };
        let ask_pages = self.wants_pages();
        self.asked |= ask_pages;
        Popped {
            delivery,
            ask_pages,
        }
    }

    /// Something is owed from the outbox, there is room, and the hub does not know yet.
    fn wants_pages(&self) -> bool {
        self.paging > 0 && !self.asked && self.cut.is_none() && self.is_low()
    }

    /// Like `pop`'s `ask_pages`, for those who made it so by other means.
    pub(super) fn ask_pages(&mut self) -> bool {
        let ask = self.wants_pages();
        self.asked |= ask;
        ask
    }

    /// A new connection: what was asked of the last one was not answered.
    pub(super) fn ask_pages_anew(&mut self) -> bool {
        self.asked = false;
        self.ask_pages() || self.paging > 0
    }

    pub(super) fn cut(&mut self, reason: CutReason) {
        self.cut.get_or_insert(reason);
        // Nobody asks for one that has been cut.
        let bytes = &mut self.bytes;
        self.queue.retain(|item| {
            *bytes -= item.veil.as_ref().map_or(0, |_| item.what.len());
            item.veil.is_none()
        });
        self.wake();
    }

    pub(super) fn wait(&mut self, waker: &Waker) {
        match &mut self.waker {
            Some(known) => known.clone_from(waker),
            None => self.waker = Some(waker.clone()),
        }
    }

    fn wake(&mut self) {
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    fn push(&mut self, stream: StreamId, what: What) {
        self.push_item(stream, what, None);
    }

    /// Whether it is veiled.
    fn push_looked(&mut self, stream: StreamId, what: What, look: Look) -> bool {
        let guard = self.guard(stream);
        let veil = match (look, guard) {
            (Look::Unknown(run), Some(Guard { asker, .. })) => {
                let asker = Arc::clone(asker);
                Some(Box::new(Veil { asker, run }))
            }
            _ => None,
        };
        let veiled = veil.is_some();
        self.push_item(stream, what, veil);
        veiled
    }

    fn push_item(&mut self, stream: StreamId, what: What, veil: Option<Box<Veil>>) {
        self.bytes += what.len();
        self.queue.push_back(Item {
            stream,
            what,
            veil,
            ordinary: false,
        });
        self.wake();
    }

    fn push_marker(&mut self, stream: StreamId) {
        self.queue.push_back(Item {
            stream,
            what: What::Marker,
            veil: None,
            ordinary: false,
        });
        self.wake();
    }

    fn has_room(&self, frame: usize) -> bool {
        has_room(&self.bounds, self.queue.len(), self.bytes, frame)
    }

    /// Half empty: worth a page.
    fn is_low(&self) -> bool {
        self.queue.len() <= self.bounds.frames / 2 && self.bytes <= self.bounds.bytes / 2
    }
}

fn has_room(bounds: &Bounds, frames: usize, bytes: usize, frame: usize) -> bool {
    frames == 0 || (frames < bounds.frames && bytes + frame <= bounds.bytes)
}

fn turn(paging: &mut usize, stream: &mut Stream, phase: Phase) {
    *paging += usize::from(phase.owes());
    *paging -= usize::from(stream.phase.owes());
    stream.phase = phase;
}

/// Unless it has been told to resume from elsewhere meanwhile.
fn resuming<'a>(stream: &'a mut Stream, reading: &Arc<Reading>) -> Option<&'a mut Past> {
    match &mut stream.phase {
        Phase::Resuming(past) if Arc::ptr_eq(&past.reading, reading) => Some(past),
        _ => None,
    }
}

fn page(id: StreamId, stream: &Stream) -> Option<Page> {
    let (Phase::Paging(paging), Target::Run { topic, .. }) = (&stream.phase, &stream.target) else {
        return None;
    };
    let (latest, first) = match *paging {
        Paging::First(_) => (None, true),
        Paging::All => (None, false),
        Paging::Latest { from, to } => (Some((from, to)), false),
    };
    Some(Page {
        stream: id,
        topic: topic.clone(),
        after: stream.last_seq.unwrap_or(0),
        latest,
        first,
    })
}

/// The marker is being read: from here on the stream is live again.
fn read_marker(stream: &mut Stream) -> Option<Bytes> {
    let Phase::Gap { from, to, pid } = stream.phase else {
        return None;
    };
    stream.phase = Phase::Live;
    Some(gap_of(stream, from, to, pid))
}

/// In ids of events.
fn gap_of(stream: &Stream, from: i64, to: Option<i64>, pid: i32) -> Bytes {
    let (key, name) = match &stream.target {
        Target::Run { run_id, .. } => ("run_id", Some(run_id.as_str())),
        Target::Flow(slug) => ("flow_slug", Some(slug.as_str())),
        Target::All | Target::Ordinary(_) => ("run_id", None),
    };
    let payload = gap_payload(
        key,
        name,
        &Bound::Cursor(from),
        to.map(Bound::Cursor).as_ref(),
    );
    notification(pid, &stream.spelling, &payload)
}

enum Bound {
    Seq(i64),
    Cursor(i64),
}

/// A run's gap is in its `seq`s (numbers), any other in cursors (strings). `to` null: nobody can say. Ids and slugs hold
/// nothing that JSON would escape.
fn gap_payload(key: &str, name: Option<&str>, from: &Bound, to: Option<&Bound>) -> String {
    let bound = |bound: &Bound| match bound {
        Bound::Seq(seq) => seq.to_string(),
        Bound::Cursor(id) => format!("\"{id}\""),
    };
    let null = || "null".to_owned();
    let name = name.map_or_else(null, |name| format!("\"{name}\""));
    let (from, to) = (bound(from), to.map_or_else(null, bound));
    format!("{{\"event_type\": \"gap\", \"{key}\": {name}, \"from\": {from}, \"to\": {to}}}")
}

#[cfg(test)]
mod tests {
    use super::*;

    const PID: i32 = 7;

    fn unguarded(_: &Asker, _: Uuid) -> Option<bool> {
        None
    }

    fn inbox(frames: usize) -> Inbox {
        let bytes = 1 << 20;
        Inbox::new(Bounds { frames, bytes }, Takes::Frames)
    }

    fn run() -> Target {
        Target::Run {
            topic: "pgflow:run:r".into(),
            run_id: "r".into(),
        }
    }

    fn event(id: i64, seq: Option<i64>) -> Arc<Event> {
        let payload = format!("{{\"n\": {}}}", seq.unwrap_or(-id));
        Arc::new(Event {
            id,
            topic: "pgflow:run:r".into(),
            seq,
            flow: None,
            payload,
            name: "run:started".into(),
            message_id: String::new(),
            private: false,
            xid: 1,
            reading: None,
            encoded: Default::default(),
        })
    }

    fn offer(inbox: &mut Inbox, stream: StreamId, id: i64, seq: Option<i64>) -> Offered {
        inbox.offer_event(stream, &mut Frames::new(&event(id, seq), PID, &unguarded))
    }

    /// A page as the hub serves it, from an outbox that holds these.
    fn serve(inbox: &mut Inbox, stream: StreamId, kept: Kept, limit: usize) {
        let first = inbox.page(stream).expect("a page is owed");
        if first.first {
            inbox.first_page(stream, kept, PID);
        }
        let Some(page) = inbox.page(stream) else {
            return;
        };
        let to = page
            .latest
            .map_or(kept.last, |(_, to)| Some(to))
            .unwrap_or(0);
        let first = kept.first.unwrap_or(i64::MAX).max(page.after + 1);
        // Compacted to every tenth.
        let rows: Vec<i64> = (first..=to)
            .filter(|seq| page.latest.is_none() || seq % 10 == 0)
            .collect();
        for &seq in rows.iter().take(limit) {
            if inbox.page_row(
                stream,
                &mut Frames::new(&event(seq, Some(seq)), PID, &unguarded),
            ) != Fed::Queued
            {
                return;
            }
        }
        if rows.len() <= limit {
            inbox.page_end(stream);
        }
    }

    fn text(delivery: Option<Delivery>) -> String {
        match delivery {
            None => "-".into(),
            Some(Delivery::Cut(reason)) => format!("{reason:?}"),
            Some(Delivery::Event(event)) => format!("event {}", event.id),
            Some(Delivery::Frame(frame)) => {
                let payload = frame[9..]
                    .split(|&byte| byte == 0)
                    .nth(1)
                    .expect("channel, then payload");
                let payload: serde_json::Value = serde_json::from_slice(payload).expect("JSON");
                match payload.get("event_type") {
                    Some(_) => format!("gap {}..{}", payload["from"], payload["to"]),
                    None => payload["n"].to_string(),
                }
            }
        }
    }

    fn drain(inbox: &mut Inbox) -> String {
        let mut all = Vec::new();
        loop {
            match text(inbox.pop().delivery) {
                end if end == "-" => break,
                delivery => all.push(delivery),
            }
        }
        all.join(" ")
    }

    fn kept(first: i64, last: i64) -> Kept {
        Kept {
            first: Some(first),
            last: Some(last),
        }
    }

    #[test]
    fn a_notification_is_framed_as_postgres_does() {
        let frame = notification(258, "ch", "pay");
        assert_eq!(&frame[..], b"A\0\0\0\x0f\0\0\x01\x02ch\0pay\0");
    }

    #[test]
    fn one_event_is_encoded_once_for_all_who_spell_the_channel_alike() {
        let event = event(1, Some(1));
        let mut frames = Frames::new(&event, PID, &unguarded);
        let mut inbox = inbox(10);
        for (id, spelling) in [(1, "x"), (2, "X")] {
            inbox.add(id, spelling, run(), Begin::Now, None);
        }
        let [a, b, c] = [1, 1, 2].map(|id| frames.spelled(&inbox.streams[&id]));
        assert_eq!(a.as_ptr(), b.as_ptr());
        assert_ne!(c, a);
    }

    #[test]
    fn live_events_come_in_order_and_a_repeated_one_is_dropped() {
        let mut inbox = inbox(10);
        inbox.add(1, "c", run(), Begin::Now, None);
        assert_eq!(offer(&mut inbox, 1, 1, Some(5)), Offered::Queued);
        assert_eq!(offer(&mut inbox, 1, 1, Some(5)), Offered::Skipped);
        assert_eq!(offer(&mut inbox, 1, 2, None), Offered::Queued);
        assert_eq!(offer(&mut inbox, 1, 3, Some(6)), Offered::Queued);
        assert_eq!(drain(&mut inbox), "5 -2 6");
    }

    #[test]
    fn a_replay_takes_live_events_from_the_outbox_until_it_has_caught_up() {
        let mut inbox = inbox(100);
        inbox.add(1, "c", run(), Begin::After(2), None);
        assert!(inbox.ask_pages());
        assert_eq!(offer(&mut inbox, 1, 4, Some(4)), Offered::Skipped);
        serve(&mut inbox, 1, kept(1, 4), 1);
        assert_eq!(offer(&mut inbox, 1, 5, Some(5)), Offered::Skipped);
        serve(&mut inbox, 1, kept(1, 5), 10);
        assert_eq!(inbox.page(1), None);
        assert_eq!(offer(&mut inbox, 1, 5, Some(5)), Offered::Skipped);
        assert_eq!(offer(&mut inbox, 1, 6, Some(6)), Offered::Queued);
        assert_eq!(drain(&mut inbox), "3 4 5 6");
    }

    /// `after`, what the outbox has, what is delivered, then live.
    #[track_caller]
    fn check_gap(after: i64, kept: Kept, delivered: &str) {
        let mut inbox = inbox(100);
        inbox.add(1, "c", run(), Begin::After(after), None);
        serve(&mut inbox, 1, kept, 100);
        assert_eq!(inbox.page(1), None, "live again");
        assert_eq!(drain(&mut inbox), delivered);
        let next = kept.last.unwrap_or(0) + 1;
        assert_eq!(offer(&mut inbox, 1, next, Some(next)), Offered::Queued);
    }

    #[test]
    fn what_the_outbox_no_longer_has_is_announced() {
        check_gap(0, Kept::default(), "");
        check_gap(0, kept(1, 2), "1 2");
        check_gap(2, kept(1, 2), "");
        check_gap(1, kept(4, 5), "gap 2..3 4 5");
        check_gap(
            1,
            Kept {
                first: None,
                last: Some(9),
            },
            "gap 2..9",
        );
        check_gap(
            9,
            Kept {
                first: None,
                last: Some(9),
            },
            "",
        );
        check_gap(3, Kept::default(), "gap 4..null");
        check_gap(7, kept(1, 5), "gap 6..7");
    }

    #[test]
    fn a_slow_reader_of_a_run_gets_the_latest_states_after_a_gap_and_then_goes_on() {
        let mut inbox = inbox(4);
        inbox.add(1, "c", run(), Begin::Now, None);
        for seq in 1..=40 {
            offer(&mut inbox, 1, seq, Some(seq));
        }
        assert_eq!(inbox.page(1), None, "no room, no page");
        let first_four: Vec<Popped> = (0..4).map(|_| inbox.pop()).collect();
        assert_eq!(
            first_four.iter().filter(|popped| popped.ask_pages).count(),
            1,
            "asked once"
        );
        serve(&mut inbox, 1, kept(1, 40), 100);
        assert_eq!(drain(&mut inbox), "gap 5..40 10 20 30");
        serve(&mut inbox, 1, kept(1, 41), 100);
        assert_eq!(drain(&mut inbox), "40");
        serve(&mut inbox, 1, kept(1, 41), 100);
        assert_eq!(drain(&mut inbox), "41");
        assert_eq!(offer(&mut inbox, 1, 42, Some(42)), Offered::Queued);
    }

    #[test]
    fn what_a_slow_reader_missed_comes_whole_if_it_fits() {
        let mut inbox = inbox(8);
        inbox.add(1, "c", run(), Begin::Now, None);
        for seq in 1..=12 {
            let offered = offer(&mut inbox, 1, seq, Some(seq));
            assert_eq!(offered == Offered::Behind, seq == 9, "once");
        }
        assert_eq!(drain(&mut inbox), "1 2 3 4 5 6 7 8");
        serve(&mut inbox, 1, kept(1, 12), 100);
        assert_eq!(drain(&mut inbox), "9 10 11 12");
    }

    #[test]
    fn a_slow_reader_of_all_gets_one_gap_in_its_place() {
        let mut inbox = inbox(2);
        inbox.add(1, "all", Target::All, Begin::Now, None);
        for id in 1..=5 {
            offer(&mut inbox, 1, id, Some(id));
        }
        assert_eq!(text(inbox.pop().delivery), "1");
        assert_eq!(offer(&mut inbox, 1, 6, Some(6)), Offered::Skipped);
        assert_eq!(drain(&mut inbox), "2 gap \"3\"..\"6\"");
        assert_eq!(offer(&mut inbox, 1, 7, Some(7)), Offered::Queued);
    }

    #[test]
    fn a_slow_reader_of_an_ordinary_channel_is_cut() {
        let mut inbox = inbox(2);
        inbox.add(1, "o", Target::Ordinary("o".into()), Begin::Now, None);
        let frame = notification(PID, "o", "{}");
        assert_eq!(inbox.offer_ordinary(1, &frame), Offered::Queued);
        assert_eq!(inbox.offer_ordinary(1, &frame), Offered::Queued);
        assert_eq!(inbox.offer_ordinary(1, &frame), Offered::Cut);
        assert_eq!(inbox.offer_ordinary(1, &frame), Offered::Skipped);
        assert_eq!(text(inbox.pop().delivery), "TooSlow");
        assert_eq!(text(inbox.pop().delivery), "TooSlow");
    }

    #[test]
    fn a_frame_larger_than_the_bound_passes_when_nothing_waits() {
        let bounds = Bounds {
            frames: 4,
            bytes: 10,
        };
        let mut inbox = Inbox::new(bounds, Takes::Frames);
        inbox.add(1, "o", Target::Ordinary("o".into()), Begin::Now, None);
        let frame = notification(PID, "o", "a payload of more than ten bytes");
        assert_eq!(inbox.offer_ordinary(1, &frame), Offered::Queued);
        assert_eq!(inbox.offer_ordinary(1, &frame), Offered::Cut);
    }

    #[test]
    fn after_unlisten_nothing_of_the_channel_comes() {
        let mut inbox = inbox(10);
        inbox.add(1, "c", run(), Begin::Now, None);
        inbox.add(2, "all", Target::All, Begin::Now, None);
        offer(&mut inbox, 1, 1, Some(1));
        offer(&mut inbox, 2, 1, Some(1));
        assert_eq!(inbox.remove(1), Some(run()));
        assert_eq!(offer(&mut inbox, 1, 2, Some(2)), Offered::Skipped);
        assert_eq!(drain(&mut inbox), "1");
        assert_eq!(inbox.bytes, 0);
    }

    #[test]
    fn a_rewritten_history_sends_runs_back_to_the_outbox_and_tells_the_others() {
        let mut inbox = inbox(10);
        inbox.add(1, "c", run(), Begin::Now, None);
        inbox.add(2, "all", Target::All, Begin::Now, None);
        offer(&mut inbox, 1, 9, Some(9));
        assert_eq!(drain(&mut inbox), "9");
        assert_eq!(inbox.distrust(1, 9, PID), Offered::Skipped);
        assert_eq!(inbox.distrust(2, 9, PID), Offered::Gap);
        serve(&mut inbox, 1, kept(1, 8), 100);
        assert_eq!(drain(&mut inbox), "gap \"10\"..null gap 9..9");
        assert_eq!(offer(&mut inbox, 1, 10, Some(9)), Offered::Queued);
        assert_eq!(offer(&mut inbox, 2, 10, Some(9)), Offered::Queued);
    }
}
