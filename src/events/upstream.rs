//! The listener task of one hub: one connection, its LISTENs, the reading of the outbox, and reconnecting. Decides nothing
//! about subscribers (`hub.rs`) and is started by it, on the control runtime.
//!
//! **The cursor is a snapshot.** A row of `flowgate.event` carries the id of the transaction that wrote it. One statement
//! returns `pg_current_snapshot()` and every row whose transaction was not visible in the snapshot of the statement
//! before; both come from the statement's own MVCC snapshot, so a row is in exactly one such read, in whatever order
//! transactions commit. "Not visible in S" is spelled `xid >= xmax(S) or xid = any(xip(S))`, which is the same thing as
//! `not pg_visible_in_snapshot(xid, S)` and an index can answer it however old the oldest open transaction is.
//!
//! Why not `id > last`: ids are given out before commit, so a slow transaction's row would be passed over. It is added
//! when a lost connection is resumed: a crash may hand out again transaction ids that had been used and never reached
//! the disk, and rows under those would look old. Such ids are recent, so `REUSED` bounds the look back (there is an index
//! on `xid`, none on `id`).
//!
//! Rows are read one at a time off the socket (Postgres waits while we are slow), so a page needs no limit and no second
//! snapshot.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Poll, ready};
use std::time::Duration;

use futures_core::Stream;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, sleep_until, timeout};
use tokio_postgres::error::SqlState;
use tokio_postgres::{AsyncMessage, Client, SimpleQueryMessage, SimpleQueryRow};
use tracing::{debug, info, warn};

use crate::pgflow::events::{WAKE_CHANNEL, envelope};
use crate::pgflow::snapshot::Snapshot;
use crate::server::control::{ControlConnection, DialError, dial, words};
use crate::server::questions::{Asker, DbError};

use super::EventsError;
use super::hub::{Fence, Hub, Mailbox, OutboxWork, Work};
use super::past::{RUNS, flow_of, is_last, page_sql};
use super::rhythm::{Rhythm, Turn};
use super::subscription::{
    Event, Fed, Frames, Kept, Offered, PAGE_ROWS, Page, PastPage, Reading, Step as Resumed,
    StreamId,
};

const APPLICATION: &str = "flowgate events";
/// After the last subscriber left.
const LINGER: Duration = Duration::from_secs(30);
/// A listener that hears nothing must find out that it is cut off.
const HEARTBEAT: Duration = Duration::from_secs(5);
/// For one answer (or one more row) of an upstream that is thought alive.
const ANSWER_WAIT: Duration = Duration::from_secs(10);
const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// More transaction ids than are given out between two flushes of the WAL.
const REUSED: u64 = 20_000;
/// Channels in one LISTEN statement list.
const LISTEN_BATCH: usize = 500;

/// Index scans whatever the statistics say: the outbox's tail is tiny, and a plan made while it was empty is not.
const SETTINGS: &str = "set search_path = ''; set enable_seqscan = off; set jit = off; set statement_timeout = 0; \
                        set default_transaction_isolation = 'read committed'; set standard_conforming_strings = on; \
                        set synchronous_commit = off";

/// Rows of readers that are gone make senders notify nobody.
const BURY: &str = "delete from flowgate.reader r where not exists \
                        (select from pg_stat_activity a where a.pid = r.pid and a.datname = current_database())";

/// Runs until nobody has listened for a while, or shutdown.
pub(super) async fn run(hub: Arc<Hub>) {
    let mut cursor = None;
    let mut backoff = BACKOFF_MIN;
    let mut failing = false;
    loop {
        let url = hub.common.control.with_database(&hub.database);
        let error = match dial(&url, APPLICATION, hub.common.connect_timeout).await {
            Ok((client, connection)) => {
                let dialled = Instant::now();
                let ended =
                    Session::serve(&hub, client, connection, &mut cursor, &mut failing).await;
                hub.lost();
                if dialled.elapsed() > BACKOFF_MAX {
                    backoff = BACKOFF_MIN;
                }
                ended.err()
            }
            Err(error) => {
                if error.is_final() {
                    hub.fail_waiters(&EventsError::Upstream(words(&error)));
                }
                Some(SessionError::Dial(error))
            }
        };
        if hub.retire() {
            return;
        }
        if let Some(error) = error {
            hub.common.metrics.reconnects.inc();
            // Once a failure, not once a try.
            if !std::mem::replace(&mut failing, true) {
                warn!(
                    database = hub.database,
                    error = words(&error),
                    "event listener lost"
                );
            } else {
                debug!(
                    database = hub.database,
                    error = words(&error),
                    "event listener still lost"
                );
            }
            sleep(backoff).await;
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }
}

#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error(transparent)]
    Dial(DialError),
    #[error(transparent)]
    Postgres(#[from] tokio_postgres::Error),
    #[error("no answer within {0:?}")]
    Silent(Duration),
    #[error("connection closed")]
    Closed,
    #[error("unexpected answer to {0}")]
    Answer(&'static str),
}

/// What has been read of the outbox.
#[derive(Debug)]
struct Cursor {
    seen: Snapshot,
    /// The highest id read, or there before we began (of the last `REUSED` transactions).
    last_id: i64,
    timeline: String,
    /// Of a read that broke off: already handed out.
    partial: HashSet<i64>,
}

struct Session<'a> {
    hub: &'a Arc<Hub>,
    client: Client,
    cursor: &'a mut Option<Cursor>,
    /// Runs can be told to their flow only where pgflow is.
    has_runs: bool,
    /// Our row is in `flowgate.reader`. If not, senders always notify (older SQL), or never do (no right to write it).
    registered: bool,
    rhythm: Rhythm,
}

/// Aborts the connection when the session ends, whatever way.
struct Driver(tokio::task::JoinHandle<Result<(), tokio_postgres::Error>>);

impl Drop for Driver {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl<'a> Session<'a> {
    /// `Ok`: nobody listens any more.
    async fn serve(
        hub: &'a Arc<Hub>,
        client: Client,
        connection: ControlConnection,
        cursor: &'a mut Option<Cursor>,
        failing: &mut bool,
    ) -> Result<(), SessionError> {
        let mut driver = Driver(tokio::spawn(drive(connection, Arc::clone(hub))));
        let mut session = Self {
            hub,
            client,
            cursor,
            has_runs: false,
            registered: false,
            rhythm: Rhythm::new(Instant::now()),
        };
        session.execute(SETTINGS).await?;
        let pid = session.one_row("select pg_backend_pid()").await?;
        hub.connected(number(&pid, 0).ok_or(SessionError::Answer("pg_backend_pid"))?);
        if std::mem::take(failing) {
            info!(database = hub.database, "event listener back");
        }
        let now = Instant::now();
        let mut probe = interval_at(now + hub.common.settings.probe, hub.common.settings.probe);
        probe.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut heartbeat = interval_at(now + HEARTBEAT, HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut idle_since = None;
        loop {
            session.work().await?;
            if hub.is_stopping() {
                return session.unregister().await;
            }
            match (hub.is_idle(), idle_since) {
                (true, None) => idle_since = Some(Instant::now()),
                (false, _) => idle_since = None,
                (true, Some(_)) => {}
            }
            let linger = idle_since.map_or(now, |since| since + LINGER);
            let look = session.next_look();
            tokio::select! {
                ended = &mut driver.0 => {
                    return Err(ended.ok().and_then(Result::err).map_or(SessionError::Closed, SessionError::Postgres));
                }
                () = hub.kick.notified() => {}
                _ = probe.tick(), if session.cursor.is_some() => hub.probe(),
                () = sleep_until(look.unwrap_or(now)), if look.is_some() => {}
                _ = heartbeat.tick() => session.execute("").await?,
                () = sleep_until(linger), if idle_since.is_some() => return session.unregister().await,
            }
        }
    }

    /// When to look at the outbox without being told.
    fn next_look(&self) -> Option<Instant> {
        // A cursor may outlive those it is kept for: they leave while there is no connection.
        self.cursor.as_ref().filter(|_| self.hub.is_reading())?;
        let observed = self.hub.is_observed().then(|| self.rhythm.rested());
        observed.into_iter().chain(self.rhythm.next()).min()
    }

    fn is_due(&self) -> bool {
        self.next_look().is_some_and(|look| look <= Instant::now())
    }

    async fn work(&mut self) -> Result<(), SessionError> {
        loop {
            // Also while there are pages to read, as long as it takes.
            if self.is_due() {
                self.hub.probe();
            }
            let work = self.hub.take_work();
            if work.is_empty() {
                return Ok(());
            }
            self.listen(&work).await?;
            match work.outbox {
                OutboxWork::Nothing => {}
                OutboxWork::Start => self.or_without_outbox(Step::Start).await?,
                OutboxWork::Read => self.or_without_outbox(Step::Read).await?,
                OutboxWork::Stop => {
                    *self.cursor = None;
                    self.unregister().await?;
                }
            }
            if !work.fences.is_empty() {
                // Postgres tells an idle session what was committed before it takes its next command, and what came meanwhile
                // before it says that it is ready: the answer is behind all of it.
                self.execute("").await?;
                work.fences.into_iter().for_each(Fence::passed);
            }
            // All of them are here already, and nothing is told meanwhile: what the outbox has of a run is asked once for all.
            let mut kept = HashMap::new();
            for mailbox in &work.hungry {
                self.feed(mailbox, &mut kept).await?;
            }
        }
    }

    async fn listen(&self, work: &Work) -> Result<(), SessionError> {
        for channels in work.unlisten.chunks(LISTEN_BATCH) {
            // Ours as well, and the outbox may be read from.
            let sql = statements(
                "unlisten",
                channels.iter().filter(|channel| *channel != WAKE_CHANNEL),
            );
            self.execute(&sql).await?;
        }
        for channels in work.listen.chunks(LISTEN_BATCH) {
            match self.execute(&statements("listen", channels.iter())).await {
                Ok(()) => self.hub.listened(channels),
                Err(error) => {
                    self.hub.fail_waiters(&EventsError::Upstream(words(&error)));
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    /// An outbox that was dropped or forbidden is final for those who follow it, and no reason to cut the others.
    async fn or_without_outbox(&mut self, step: Step) -> Result<(), SessionError> {
        let done = match step {
            Step::Start => self.start_outbox().await,
            Step::Read => self.look().await,
        };
        match done {
            Err(SessionError::Postgres(error)) if is_outbox_gone(&error) => {
                warn!(
                    database = self.hub.database,
                    error = words(&error),
                    "outbox cannot be read"
                );
                *self.cursor = None;
                self.hub.outbox_lost(&EventsError::Upstream(words(&error)));
                Ok(())
            }
            other => other,
        }
    }

    async fn start_outbox(&mut self) -> Result<(), SessionError> {
        if self.hub.take_forget_cursor() {
            *self.cursor = None;
        }
        // Before the snapshot: what is committed after the snapshot must wake us.
        self.execute(&statements("listen", [WAKE_CHANNEL.to_owned()].iter()))
            .await?;
        let found = self
            .one_row(
                "select to_regclass('flowgate.event') is not null, to_regclass('pgflow.runs') is not null, \
                 coalesce(has_table_privilege(to_regclass('pgflow.runs'), 'select'), false), \
                 substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8)",
            )
            .await?;
        if found.get(0) != Some("t") {
            *self.cursor = None;
            self.hub.outbox_missing();
            return Ok(());
        }
        self.register().await?;
        self.has_runs = found.get(2) == Some("t");
        if found.get(1) == Some("t") && !self.has_runs {
            warn!(
                database = self.hub.database,
                "no right to read pgflow.runs: flow channels will lack step events"
            );
        }
        let timeline = found.get(3).unwrap_or_default().to_owned();
        let new = self.new_cursor(timeline).await?;
        match self.cursor.as_ref() {
            None => *self.cursor = Some(new),
            Some(old) if new.timeline == old.timeline && new.seen.xmax >= old.seen.xmax => {
                self.read_outbox(Since::Lost).await?;
            }
            Some(old) => {
                let (from, to) = (&old.timeline, &new.timeline);
                warn!(
                    database = self.hub.database,
                    from, to, "history was rewritten, replaying by seq"
                );
                self.hub.distrust(old.last_id);
                *self.cursor = Some(new);
            }
        }
        self.hub.outbox_on();
        Ok(())
    }

    /// Tells senders that somebody sleeps who must be notified. One who had not seen it yet may be in progress.
    async fn register(&mut self) -> Result<(), SessionError> {
        self.unregister().await?;
        let there = "select coalesce(has_table_privilege(to_regclass('flowgate.reader'), 'insert, update, delete'), false), \
                     to_regclass('flowgate.reader') is not null";
        let there = self.one_row(there).await?;
        if there.get(0) != Some("t") {
            if there.get(1) == Some("t") {
                warn!(
                    database = self.hub.database,
                    "no right to write flowgate.reader: events come at the next probe only"
                );
            }
            return Ok(());
        }
        self.execute(BURY).await?;
        self.tell(true).await?;
        self.registered = true;
        self.drowse().await
    }

    async fn unregister(&mut self) -> Result<(), SessionError> {
        self.rhythm = Rhythm::new(Instant::now());
        if !std::mem::take(&mut self.registered) {
            return Ok(());
        }
        let gone = format!(
            "delete from flowgate.reader where reader_id = '{}'",
            self.hub.common.reader
        );
        match self.execute(&gone).await {
            // Taken out meanwhile, with all the rest.
            Err(SessionError::Postgres(error)) if is_outbox_gone(&error) => Ok(()),
            other => other,
        }
    }

    async fn drowse(&mut self) -> Result<(), SessionError> {
        // A snapshot names those in progress only below the last transaction id that has ended: so one is ended that was
        // drawn after `asleep` could be seen.
        self.execute("select pg_current_xact_id()").await?;
        let row = self.one_row("select pg_current_snapshot()::text").await?;
        let seen = row
            .get(0)
            .and_then(Snapshot::parse)
            .ok_or(SessionError::Answer("pg_current_snapshot"))?;
        self.rhythm.drowsy(Instant::now(), seen.in_progress());
        Ok(())
    }

    /// Reads what is new, and tells senders when that changes whether they must notify.
    async fn look(&mut self) -> Result<(), SessionError> {
        let reasons = self.hub.take_reasons();
        if reasons.observed {
            self.hub.common.metrics.observed.inc();
        }
        let rows = self.read_outbox(Since::LastRead).await?;
        let now = Instant::now();
        self.rhythm.rest(now, rows);
        let Some(cursor) = self.cursor.as_ref().filter(|_| self.registered) else {
            return Ok(());
        };
        let running = cursor.seen.in_progress();
        match self.rhythm.looked(now, rows, reasons.notified, &running) {
            Turn::Stay => {}
            Turn::Wake => {
                self.tell(false).await?;
                self.rhythm.awake(Instant::now());
                self.hub.common.metrics.awake.inc();
            }
            Turn::Sleep => {
                self.tell(true).await?;
                self.drowse().await?;
            }
        }
        Ok(())
    }

    async fn tell(&self, asleep: bool) -> Result<(), SessionError> {
        let id = self.hub.common.reader;
        // Again, if somebody took the row for one of a reader that is gone.
        self.execute(&format!(
            "insert into flowgate.reader as r (reader_id, pid, asleep) values ('{id}', pg_backend_pid(), {asleep}) \
             on conflict (reader_id) do update set pid = excluded.pid, asleep = excluded.asleep"
        ))
        .await
    }

    async fn new_cursor(&self, timeline: String) -> Result<Cursor, SessionError> {
        let row = self.one_row("select pg_current_snapshot()::text").await?;
        let seen = row
            .get(0)
            .and_then(Snapshot::parse)
            .ok_or(SessionError::Answer("pg_current_snapshot"))?;
        // Later than the snapshot: an id above those it could see only makes the look back smaller, and no row of a
        // transaction that was not in `seen` depends on it.
        let recent = seen.xmax.saturating_sub(REUSED);
        let sql = format!(
            "select coalesce(max(e.id), 0) from flowgate.event e where e.xid >= '{recent}'::xid8"
        );
        let last_id =
            number(&self.one_row(&sql).await?, 0).ok_or(SessionError::Answer("max(id)"))?;
        Ok(Cursor {
            seen,
            last_id,
            timeline,
            partial: HashSet::new(),
        })
    }

    /// How many rows there were.
    async fn read_outbox(&mut self, since: Since) -> Result<usize, SessionError> {
        let Some(cursor) = self.cursor.as_mut() else {
            return Ok(0);
        };
        let mut unseen = cursor.seen.unseen();
        match since {
            Since::LastRead => {}
            Since::Lost => write!(
                unseen,
                " or e.xid >= '{}'::xid8 and e.id > {}",
                cursor.seen.xmax.saturating_sub(REUSED),
                cursor.last_id
            )
            .expect("a String takes all"),
        }
        // Whether or not anybody follows a flow now: somebody may by the time this statement takes its snapshot.
        let flow = flow_of(self.has_runs);
        let runs = if self.has_runs { RUNS } else { "" };
        let sql = format!(
            "select s.now, e.id, e.topic, e.seq, e.flow, e.payload, e.event, e.message_id, e.xid, e.private \
             from (select pg_current_snapshot()::text as now) s left join \
             (select e.id, e.topic, e.seq, {flow} as flow, e.payload::text, e.event, e.message_id, e.xid, e.private \
             from flowgate.event e {runs} where {unseen}) e on true order by e.id"
        );
        let metrics = &self.hub.common.metrics;
        metrics.outbox_reads.inc();
        let mut rows = pin!(answered(self.client.simple_query_raw(&sql)).await?);
        let mut now: Option<Snapshot> = None;
        let mut reading: Option<Arc<Reading>> = None;
        let mut count = 0;
        while let Some(message) = answered(poll_fn(|cx| {
            Poll::Ready(ready!(rows.as_mut().poll_next(cx)).transpose())
        }))
        .await?
        {
            let SimpleQueryMessage::Row(row) = message else {
                continue;
            };
            if now.is_none() {
                now = row.get(0).and_then(Snapshot::parse);
            }
            let (Some(mut event), Some(now)) = (event(|at| row.get(at + 1)), &now) else {
                continue;
            };
            let reading = reading.get_or_insert_with(|| {
                Arc::new(Reading {
                    before: cursor.seen.clone(),
                    now: now.clone(),
                })
            });
            event.reading = Some(Arc::clone(reading));
            count += 1;
            if cursor.partial.insert(event.id) {
                metrics.outbox_rows.inc();
                cursor.last_id = cursor.last_id.max(event.id);
                self.hub.dispatch_event(&Arc::new(event));
            }
        }
        cursor.seen = now.ok_or(SessionError::Answer("the outbox read"))?;
        cursor.partial = HashSet::new();
        Ok(count)
    }

    /// One page for each stream of this reader that is owed one.
    async fn feed(
        &mut self,
        mailbox: &Arc<Mailbox>,
        kept: &mut HashMap<String, Kept>,
    ) -> Result<(), SessionError> {
        let pages = mailbox.lock().pages();
        for mut page in pages {
            let stream = page.stream;
            if page.first {
                // A reader that came since may know more than was found then.
                let found = kept.get(&page.topic).copied();
                let kept = match found.filter(|found| found.last >= Some(page.after)) {
                    Some(found) => found,
                    None => {
                        let found = self.kept(&page.topic).await?;
                        kept.insert(page.topic.clone(), found);
                        found
                    }
                };
                let offered = mailbox.lock().first_page(stream, kept, self.hub.pid());
                if offered == Offered::Gap {
                    self.hub.common.metrics.gaps.inc();
                }
                let Some(next) = mailbox.lock().page(stream) else {
                    self.hub.paged(stream, mailbox);
                    continue;
                };
                page = next;
            }
            self.feed_page(mailbox, &page).await?;
            self.hub.paged(stream, mailbox);
        }
        let pasts = mailbox.lock().pasts();
        for stream in pasts {
            self.resume(mailbox, stream).await?;
        }
        // Also when none had room after all: whoever reads asks again.
        if mailbox.lock().ask_pages() {
            self.hub.hungry(mailbox);
        }
        Ok(())
    }

    /// What one that resumes is owed, as far as it has room; all of it, and it is live before the next look.
    async fn resume(
        &mut self,
        mailbox: &Arc<Mailbox>,
        stream: StreamId,
    ) -> Result<(), SessionError> {
        let mut fresh = false;
        loop {
            let Some(cursor) = &self.cursor else {
                return Ok(());
            };
            let step = mailbox
                .lock()
                .past(stream, &cursor.seen, fresh, self.hub.pid());
            match step {
                Resumed::Nothing | Resumed::Live => return Ok(()),
                Resumed::Gap => self.hub.common.metrics.gaps.inc(),
                Resumed::Behind => {
                    self.or_without_outbox(Step::Read).await?;
                    fresh = true;
                }
                Resumed::Page(page) => {
                    let sql = page_sql(&page.at, page.slug.as_deref(), self.has_runs);
                    let messages = match answered(self.client.simple_query(&sql)).await {
                        // Its cursor's fault, and nobody else's.
                        Err(SessionError::Postgres(error)) if is_bad_value(&error) => {
                            self.hub.give_up(mailbox);
                            return Ok(());
                        }
                        answer => answer?,
                    };
                    let rows = messages.iter().filter_map(|message| match message {
                        SimpleQueryMessage::Row(row) => Some(past_row(|at| row.get(at))),
                        _ => None,
                    });
                    let rows: Option<Vec<_>> = rows.collect();
                    let rows = rows.ok_or(SessionError::Answer("a replay"))?;
                    self.hub.common.metrics.replay_reads.inc();
                    if !take_page(self.hub, mailbox, &page, rows) {
                        return Ok(());
                    }
                }
                Resumed::FarPage(page) => {
                    let sql = page_sql(&page.at, page.slug.as_deref(), self.has_runs);
                    let (hub, mailbox) = (Arc::clone(self.hub), Arc::clone(mailbox));
                    // Refused only in a shutdown.
                    drop(self.hub.start(read_far(hub, mailbox, page, sql)));
                    return Ok(());
                }
            }
        }
    }

    /// What the outbox has of a run.
    async fn kept(&self, topic: &str) -> Result<Kept, SessionError> {
        let topic = literal(topic);
        // The counter outlives the events. `seq is not null` would hide the index's order from min().
        let sql = format!(
            "select (select e.seq from flowgate.event e where e.topic = {topic} and e.seq > 0 order by e.seq limit 1), \
             (select t.seq from flowgate.topic t where t.topic = {topic})"
        );
        let row = self.one_row(&sql).await?;
        Ok(Kept {
            first: number(&row, 0),
            last: number(&row, 1),
        })
    }

    async fn feed_page(&self, mailbox: &Arc<Mailbox>, page: &Page) -> Result<(), SessionError> {
        let (topic, after) = (literal(&page.topic), page.after);
        let rows = match page.latest {
            None => format!(
                "select e.* from flowgate.event e where e.topic = {topic} and e.seq > {after}"
            ),
            // Steps and the run have a latest state; what tasks did on the way is the gap.
            Some((from, to)) => format!(
                "select l.* from (select distinct on (split_part(e.event, ':', 1), e.payload->>'step_slug') e.* \
                 from flowgate.event e where e.topic = {topic} and e.seq between {from} and {to} \
                 and (e.event like 'run:%' or e.event like 'step:%') \
                 order by split_part(e.event, ':', 1), e.payload->>'step_slug', e.seq desc) l where l.seq > {after}"
            ),
        };
        let sql = format!(
            "select p.id, p.topic, p.seq, null, p.payload::text, p.event, p.message_id, p.xid, p.private from ({rows}) p \
             order by p.seq limit {PAGE_ROWS}"
        );
        let metrics = &self.hub.common.metrics;
        metrics.replay_reads.inc();
        let mut rows = pin!(answered(self.client.simple_query_raw(&sql)).await?);
        let mut count = 0;
        let mut fed = Fed::Queued;
        while let Some(message) = answered(poll_fn(|cx| {
            Poll::Ready(ready!(rows.as_mut().poll_next(cx)).transpose())
        }))
        .await?
        {
            let SimpleQueryMessage::Row(row) = message else {
                continue;
            };
            let event = Arc::new(event(|at| row.get(at)).ok_or(SessionError::Answer("a replay"))?);
            count += 1;
            let known = |asker: &Asker, run| self.hub.sight.known(asker, run);
            let mut frames = Frames::new(&event, self.hub.pid(), &known);
            fed = mailbox.lock().page_row(page.stream, &mut frames);
            match fed {
                Fed::Queued => metrics.deliveries.inc(),
                Fed::Veiled => {
                    metrics.deliveries.inc();
                    self.hub.veiled(page.stream, &event, mailbox);
                    fed = Fed::Queued;
                }
                Fed::Denied => {
                    self.hub.deny(page.stream, mailbox);
                    break;
                }
                // The rest is read off the socket and dropped by the connection.
                Fed::Full | Fed::Gone | Fed::Passed => break,
            }
        }
        if fed == Fed::Queued && count < PAGE_ROWS {
            mailbox.lock().page_end(page.stream);
        }
        Ok(())
    }

    async fn execute(&self, sql: &str) -> Result<(), SessionError> {
        answered(self.client.batch_execute(sql)).await
    }

    async fn one_row(&self, sql: &str) -> Result<SimpleQueryRow, SessionError> {
        let messages = answered(self.client.simple_query(sql)).await?;
        let row = messages.into_iter().find_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(row),
            _ => None,
        });
        row.ok_or(SessionError::Answer("a one-row query"))
    }
}

/// Until it is read: what has been committed stays in the outbox.
async fn read_far(hub: Arc<Hub>, mailbox: Arc<Mailbox>, page: PastPage, sql: String) {
    hub.common.metrics.replay_reads.inc();
    match hub.replay(&sql).await {
        Ok(answer) => {
            let rows = answer.rows.iter();
            let rows = rows.map(|row| past_row(|at| row.get(at)?.as_deref()));
            match rows.collect::<Option<Vec<_>>>() {
                Some(rows) => drop(take_page(&hub, &mailbox, &page, rows)),
                None => hub.give_up(&mailbox),
            }
        }
        Err(error) => {
            debug!(database = hub.database, %error, "cannot read what a listener resumes with");
            // What took too long would do so again.
            let slow = matches!(&error, DbError::Postgres { code, .. } if code == SqlState::QUERY_CANCELED.code());
            if error.is_passing() && !slow {
                sleep(BACKOFF_MAX).await;
            } else {
                hub.give_up(&mailbox);
            }
            mailbox.lock().past_end(page.stream, &page.reading, false);
        }
    }
    hub.hungry(&mailbox);
}

/// Rows of a page, each with how many there were. `false`: it was not taken whole.
fn take_page(
    hub: &Hub,
    mailbox: &Arc<Mailbox>,
    page: &PastPage,
    rows: Vec<(Event, usize)>,
) -> bool {
    let mut whole = true;
    let metrics = &hub.common.metrics;
    let mut last = is_last(rows.len(), rows.first().map_or(0, |(_, found)| *found));
    for (mut event, _) in rows {
        event.reading = Some(Arc::clone(&page.reading));
        let event = Arc::new(event);
        let known = |asker: &Asker, run| hub.sight.known(asker, run);
        let mut frames = Frames::new(&event, hub.pid(), &known);
        let fed = mailbox
            .lock()
            .past_row(page.stream, &page.reading, &mut frames);
        match fed {
            Fed::Queued => metrics.deliveries.inc(),
            Fed::Veiled => {
                metrics.deliveries.inc();
                hub.veiled(page.stream, &event, mailbox);
            }
            Fed::Passed => {}
            Fed::Full | Fed::Gone | Fed::Denied => {
                (last, whole) = (false, false);
                break;
            }
        }
    }
    mailbox.lock().past_end(page.stream, &page.reading, last);
    whole
}

#[derive(Clone, Copy)]
enum Step {
    Start,
    Read,
}

#[derive(Clone, Copy)]
enum Since {
    LastRead,
    /// Another connection: a crash may lie between.
    Lost,
}

/// Reads the socket for as long as it lives; notifications go straight to who listens.
async fn drive(
    mut connection: ControlConnection,
    hub: Arc<Hub>,
) -> Result<(), tokio_postgres::Error> {
    while let Some(message) = poll_fn(|cx| connection.poll_message(cx)).await {
        match message? {
            AsyncMessage::Notification(notification) => {
                if notification.channel() == WAKE_CHANNEL {
                    hub.wake();
                }
                hub.dispatch_ordinary(
                    notification.process_id(),
                    notification.channel(),
                    notification.payload(),
                );
            }
            AsyncMessage::Notice(notice) => {
                debug!(database = hub.database, %notice, "listener notice")
            }
            _ => {}
        }
    }
    Ok(())
}

async fn answered<T>(
    answer: impl Future<Output = Result<T, tokio_postgres::Error>>,
) -> Result<T, SessionError> {
    match timeout(ANSWER_WAIT, answer).await {
        Ok(answer) => Ok(answer?),
        Err(_elapsed) => Err(SessionError::Silent(ANSWER_WAIT)),
    }
}

/// Class 22. (errcodes-appendix.html)
fn is_bad_value(error: &tokio_postgres::Error) -> bool {
    error
        .code()
        .is_some_and(|code| code.code().starts_with("22"))
}

fn is_outbox_gone(error: &tokio_postgres::Error) -> bool {
    error.code().is_some_and(|code| {
        *code == SqlState::UNDEFINED_TABLE
            || *code == SqlState::UNDEFINED_COLUMN
            || *code == SqlState::INVALID_SCHEMA_NAME
            || *code == SqlState::INSUFFICIENT_PRIVILEGE
    })
}

fn number<T: std::str::FromStr>(row: &SimpleQueryRow, column: usize) -> Option<T> {
    row.get(column)?.parse().ok()
}

/// `id, topic, seq, flow, payload, event, message_id, xid, private`; `None` where there is no event.
fn event<'a>(column: impl Fn(usize) -> Option<&'a str>) -> Option<Event> {
    let id = column(0)?.parse().ok()?;
    let seq = column(2).and_then(|seq| seq.parse().ok());
    // `jsonb` prints nothing that is not JSON.
    let payload = envelope(serde_json::from_str(column(4)?).ok()?, seq, id);
    let (topic, flow) = (column(1)?.to_owned(), column(3).map(str::to_owned));
    Some(Event {
        id,
        topic,
        seq,
        flow,
        payload,
        name: column(5)?.to_owned(),
        message_id: column(6)?.to_owned(),
        xid: column(7)?.parse().ok()?,
        private: column(8) == Some("t"),
        reading: None,
        encoded: Default::default(),
    })
}

/// And then how many there were.
fn past_row<'a>(column: impl Fn(usize) -> Option<&'a str>) -> Option<(Event, usize)> {
    let found = column(9)?.parse().ok()?;
    Some((event(column)?, found))
}

fn statements<'a>(verb: &str, channels: impl Iterator<Item = &'a String>) -> String {
    channels.fold(String::new(), |sql, channel| {
        sql + verb + " \"" + &channel.replace('"', "\"\"") + "\"; "
    })
}

fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn channel_names_are_quoted() {
        let names = ["a".to_owned(), "b\"; drop".to_owned()];
        assert_eq!(
            statements("listen", names.iter()),
            "listen \"a\"; listen \"b\"\"; drop\"; "
        );
        assert_eq!(literal("it's"), "'it''s'");
    }
}
