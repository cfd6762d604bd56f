//! Server-sent events: `/events/runs/{id}`, `/events/flows/{slug}`, `/events`. A stream is a subscriber of the hub and a look
//! at what the role may see, again and again. Never waits for a slow reader: its inbox is bounded, what overflows is told as a
//! gap, and a socket that takes nothing is cut (`seats.rs`).
//!
//! `id:` is where to resume: of a run its `seq`, of the others a `Cursor`.
//!
//! Streams are not compressed: an encoder would hold events back, or be flushed for each and gain nothing. Nor do they stay with
//! hyper (`taking.rs`), whose buffers would be most of what an idle one costs: a stream writes its socket itself, all that waits
//! in one write.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::future::poll_fn;
use std::io;
use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::Response;
use bytes::{BufMut, Bytes, BytesMut};
use serde::Deserialize;
use serde_json::json;
use serde_json::value::RawValue;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, sleep_until};
use uuid::Uuid;

use super::HttpState;
use super::api::{InUrl, a_run_id, a_slug, identify, last_seq, run_state};
use super::counters::OpenStream;
use super::identity::Identity;
use super::refusal::Refusal;
use super::seats::Seated;
use crate::events::{
    CutReason, Delivery, Event, EventsError, Form, Missed, NOW, Rights, Rows, Start, Subscriber,
};
use crate::pgflow::events::{ALL_CHANNEL, FLOW_PREFIX, envelope, run_of_topic, run_topic};
use crate::pgflow::ids::Slug;
use crate::pgflow::snapshot::{Cursor, Snapshot};
use crate::server::questions::DbError;

const HEARTBEAT: Duration = Duration::from_secs(15);
/// How soon a client comes back that has lost us.
const RETRY: &[u8] = b"retry: 1000\n\n";
/// Rows of one page of what a stream resumes with.
const PAGE: usize = 500;
/// And of it what Postgres stores, compressed; one row always.
const PAGE_BYTES: usize = 1 << 20;
/// Of one write, about.
const BATCH_BYTES: usize = 64 * 1024;

#[derive(Deserialize)]
pub(super) struct Wanted {
    cursor: Option<String>,
    snapshot: Option<String>,
}

impl Wanted {
    /// What the browser says by itself when it comes back counts more than the URL it began with.
    fn resume(&self, headers: &HeaderMap) -> Option<String> {
        let last = headers.get("last-event-id").and_then(|id| id.to_str().ok());
        let from = last.or(self.cursor.as_deref())?.trim();
        (!from.is_empty()).then(|| from.to_owned())
    }

    fn wants_snapshot(&self) -> bool {
        matches!(self.snapshot.as_deref(), Some("1" | "true" | ""))
    }
}

pub(super) async fn run(
    State(state): State<HttpState>,
    headers: HeaderMap,
    Query(url): Query<InUrl>,
    Query(wanted): Query<Wanted>,
    Path(id): Path<String>,
) -> Result<Response, Refusal> {
    let identity = identify(&state, &headers, &url).await?;
    let id = a_run_id(&id)?;
    let failed = |error| Refusal::of_database(error, Some(&identity));
    if !state
        .sight
        .may_follow(&identity.asker, id)
        .await
        .map_err(failed)?
    {
        return Err(Refusal::no_such_run());
    }
    let mut first = VecDeque::from([Bytes::from_static(RETRY)]);
    let after = match wanted.resume(&headers) {
        Some(from) => from
            .parse::<i64>()
            .ok()
            .filter(|seq| *seq >= 0)
            .ok_or_else(|| malformed("a run's is the seq of an event"))?,
        None if wanted.wants_snapshot() => {
            let shown = run_state(&state, &identity, id).await?;
            let shown = shown.ok_or_else(Refusal::no_such_run)?;
            let (json, seq) = (shown.json, shown.seq);
            first.push_back(format!("id: {seq}\nevent: snapshot\ndata: {json}\n\n").into());
            seq
        }
        None => {
            let question = async {
                let asked = state.database.ask_ourselves(&last_seq(id)).await;
                asked.map(|answer| answer.single().and_then(|seq| seq.parse().ok()))
            };
            let seq = state.last_seqs.ask(id, question).await;
            let seq: i64 = seq.map_err(failed)?.unwrap_or(0);
            // An id without data is remembered and told to nobody.
            first.push_back(format!("id: {seq}\n\n").into());
            seq
        }
    };
    let subscriber = state.hub.event_subscriber();
    let topic = run_topic(id);
    subscriber.follow(&topic, after).await.map_err(unheard)?;
    let stream = Stream::new(&state, identity, subscriber, Scope::Run(id), first, None);
    Ok(stream.respond())
}

pub(super) async fn flow(
    State(state): State<HttpState>,
    headers: HeaderMap,
    Query(url): Query<InUrl>,
    Query(wanted): Query<Wanted>,
    Path(slug): Path<String>,
) -> Result<Response, Refusal> {
    let slug = a_slug(&slug)?;
    many(&state, &headers, &url, &wanted, Scope::Flow(slug)).await
}

pub(super) async fn all(
    State(state): State<HttpState>,
    headers: HeaderMap,
    Query(url): Query<InUrl>,
    Query(wanted): Query<Wanted>,
) -> Result<Response, Refusal> {
    many(&state, &headers, &url, &wanted, Scope::All).await
}

async fn many(
    state: &HttpState,
    headers: &HeaderMap,
    url: &InUrl,
    wanted: &Wanted,
    scope: Scope,
) -> Result<Response, Refusal> {
    let identity = identify(state, headers, url).await?;
    if wanted.wants_snapshot() {
        return Err(Refusal::bad_request(
            "22023",
            "snapshot: only a run has one",
        ));
    }
    let failed = |error| Refusal::of_database(error, Some(&identity));
    let rights = state.sight.rights(&identity.asker).await.map_err(failed)?;
    if rights.runs == Rows::None {
        return Err(Refusal::of_database(
            may_not_list(&identity),
            Some(&identity),
        ));
    }
    let resumed = match wanted.resume(headers) {
        Some(from) => {
            let cursor = Cursor::parse(&from);
            Some(cursor.ok_or_else(|| malformed("it is the id of an event of such a stream"))?)
        }
        None => None,
    };
    // Live first, so that what is committed while the past is read is in one or the other.
    let subscriber = state.hub.event_subscriber();
    subscriber.listen(&scope.channel()).await.map_err(unheard)?;
    let start = state.database.ask_ourselves(NOW).await.map_err(failed)?;
    let start = Start::parse(start.rows.first()).ok_or_else(|| {
        Refusal::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "XX000",
            "unexpected answer of the database",
        )
    })?;
    let mut first = VecDeque::from([Bytes::from_static(RETRY)]);
    let backlog = match resumed {
        None => {
            let from = Cursor {
                id: start.last_id,
                before: start.now.clone(),
                now: start.now.clone(),
            };
            first.push_back(format!("id: {from}\n\n").into());
            Past {
                seen: start.now,
                rest: None,
            }
        }
        Some(cursor) => {
            let rewritten = start.is_before(&cursor);
            first.extend(
                start
                    .missed_since(&cursor)
                    .map(|missed| gap(missed, &scope)),
            );
            Past {
                seen: start.now,
                rest: (!rewritten).then_some(cursor),
            }
        }
    };
    let stream = Stream::new(state, identity, subscriber, scope, first, Some(backlog));
    Ok(stream.respond())
}

fn may_not_list(identity: &Identity) -> DbError {
    DbError::Postgres {
        code: "42501".to_owned(),
        message: "permission denied for table runs".to_owned(),
        detail: None,
        hint: Some(format!(
            "To follow runs whose ids it does not name, role \"{}\" needs SELECT on pgflow.runs.",
            identity.asker.role
        )),
    }
}

fn malformed(what: &str) -> Refusal {
    Refusal::bad_request("22023", format!("malformed cursor: {what}"))
}

fn unheard(error: EventsError) -> Refusal {
    Refusal::new(StatusCode::SERVICE_UNAVAILABLE, "57P03", error.to_string())
}

/// What a stream tells of.
#[derive(Clone)]
enum Scope {
    Run(Uuid),
    Flow(Slug),
    All,
}

impl Scope {
    fn channel(&self) -> String {
        match self {
            Self::Run(id) => run_topic(*id),
            Self::Flow(slug) => format!("{FLOW_PREFIX}{slug}"),
            Self::All => ALL_CHANNEL.to_owned(),
        }
    }
}

/// Told when something may be missing.
fn gap(missed: Missed, scope: &Scope) -> Bytes {
    let (key, name) = match scope {
        Scope::Run(id) => ("run_id", Some(id.to_string())),
        Scope::Flow(slug) => ("flow_slug", Some(slug.to_string())),
        Scope::All => ("run_id", None),
    };
    let gap = json!({
        "event_type": "gap",
        key: name,
        "from": missed.from.to_string(),
        "to": missed.to.map(|to| to.to_string()),
    });
    format!("data: {gap}\n\n").into()
}

/// Of a stream of many runs: what the past has.
struct Past {
    /// Live events that this could see are in what is resumed with, or before it.
    seen: Snapshot,
    /// Where in the past it is: first the rest of the look that brought the cursor's event, then all that came since.
    rest: Option<Cursor>,
}

pub(super) struct Stream {
    state: HttpState,
    identity: Arc<Identity>,
    subscriber: Subscriber,
    scope: Scope,
    /// Ready to go.
    next: VecDeque<Bytes>,
    past: Option<Past>,
    /// Of a stream of many.
    rights: Option<Arc<Rights>>,
    check_at: Instant,
    expires_at: Option<Instant>,
    heartbeat_at: Instant,
    ended: bool,
    _open: OpenStream,
}

/// A stream on its way from the handler to the socket, in the extensions of a response without a body.
#[derive(Clone)]
pub(super) struct Begun(Arc<Mutex<Option<Box<Stream>>>>);

impl Begun {
    /// Once.
    pub(super) fn take(&self) -> Option<Box<Stream>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

impl Stream {
    fn new(
        state: &HttpState,
        identity: Arc<Identity>,
        subscriber: Subscriber,
        scope: Scope,
        next: VecDeque<Bytes>,
        past: Option<Past>,
    ) -> Self {
        let now = Instant::now();
        Self {
            check_at: state.sight.next_check(),
            expires_at: identity.expires_in().map(|left| now + left),
            heartbeat_at: now + HEARTBEAT,
            _open: state.counters.stream(),
            state: state.clone(),
            identity,
            subscriber,
            scope,
            next,
            past,
            rights: None,
            ended: false,
        }
    }

    fn respond(self) -> Response {
        // Stands in for the stream where only its head is wanted. An empty body has a length, and would have it told.
        let unmeasured = Body::from_stream(futures_util::stream::empty::<io::Result<Bytes>>());
        let mut response = Response::new(unmeasured);
        let headers = response.headers_mut();
        for (name, value) in [
            (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
            (header::CACHE_CONTROL, "no-store"),
        ] {
            headers.insert(name, HeaderValue::from_static(value));
        }
        headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
        let begun = Begun(Arc::new(Mutex::new(Some(Box::new(self)))));
        response.extensions_mut().insert(begun);
        response
    }

    /// Writes it, after `head`, to its end or the client's. `chunked`: as the head says.
    pub(super) async fn pour(
        mut self: Box<Self>,
        mut socket: Seated,
        head: Vec<u8>,
        chunked: bool,
    ) -> io::Result<()> {
        socket.write_all(&head).await?;
        drop(head);
        let mut stopping = self.state.stopping.clone();
        let mut stopped = pin!(super::stopped(&mut stopping));
        // One for all that is due some time.
        let mut timer = pin!(sleep_until(self.due()));
        let mut heard = 0;
        loop {
            // Before anything is given out, also to one that has read nothing for long.
            if !self.ended && self.look_due() <= Instant::now() {
                Box::pin(self.look_again()).await;
            }
            // Also of one that is never idle.
            self.ended |= *self.state.stopping.borrow();
            self.gather().await;
            if !self.next.is_empty() {
                let batch = batch(&mut self.next, chunked);
                socket.write_all(&batch).await?;
                self.heartbeat_at = Instant::now() + HEARTBEAT;
                continue;
            }
            if self.ended {
                if chunked {
                    socket.write_all(b"0\r\n\r\n").await?;
                }
                return socket.shutdown().await;
            }
            if self.past.as_ref().is_some_and(|past| past.rest.is_some()) {
                Box::pin(self.page()).await;
                continue;
            }
            let mut said = [0; 64];
            tokio::select! {
                biased;
                () = &mut stopped => self.ended = true,
                delivery = poll_fn(|cx| self.subscriber.poll_next(cx)) => self.take(delivery).await,
                () = &mut timer => {
                    if self.heartbeat_at <= Instant::now() {
                        self.next.push_back(Bytes::from_static(b": \n\n"));
                        self.heartbeat_at = Instant::now() + HEARTBEAT;
                    }
                    if self.look_due() <= Instant::now() {
                        Box::pin(self.look_again()).await;
                    }
                    timer.as_mut().reset(self.due());
                }
                // Nothing it could still say matters but that it goes. Who goes on saying much does not know whom it talks to.
                read = socket.read(&mut said) => {
                    let count = read?;
                    heard += count;
                    if count == 0 {
                        return Ok(());
                    }
                    if heard > BATCH_BYTES {
                        self.state.counters.talkative.inc();
                        return Ok(());
                    }
                }
            }
        }
    }

    /// What waits, as far as one write takes it.
    async fn gather(&mut self) {
        let mut bytes: usize = self.next.iter().map(Bytes::len).sum();
        while !self.ended && bytes < BATCH_BYTES {
            // The past comes first.
            if self.past.as_ref().is_some_and(|past| past.rest.is_some()) {
                return;
            }
            let Some(delivery) = self.subscriber.try_next() else {
                return;
            };
            let before = self.next.len();
            self.take(delivery).await;
            bytes += self.next.iter().skip(before).map(Bytes::len).sum::<usize>();
        }
    }

    /// When to look whether the role may still see it.
    fn look_due(&self) -> Instant {
        self.expires_at
            .map_or(self.check_at, |at| at.min(self.check_at))
    }

    /// When there is something to do though nothing happens.
    fn due(&self) -> Instant {
        self.look_due().min(self.heartbeat_at)
    }

    async fn look_again(&mut self) {
        let now = Instant::now();
        if self.expires_at.is_some_and(|at| at <= now) {
            return self.refuse("PGRST303", "JWT expired");
        }
        if self.check_at > now {
            return;
        }
        self.check_at = self.state.sight.next_check();
        let allowed = match &self.scope {
            Scope::Run(id) => self.state.sight.may_follow(&self.identity.asker, *id).await,
            Scope::Flow(_) | Scope::All => {
                let rights = self.state.sight.rights(&self.identity.asker).await;
                rights.map(|rights| {
                    let allowed = rights.runs != Rows::None;
                    self.rights = Some(rights);
                    allowed
                })
            }
        };
        match allowed {
            Ok(true) => {}
            Ok(false) => self.refuse("42501", "the role may not see this any more"),
            // The role is gone, or taken from us.
            Err(DbError::Role(message)) => self.refuse("42501", &message),
            // Nobody can say: a database that is away tells no events either.
            Err(_unknown) => self.check_at = self.state.sight.soon(),
        }
    }

    /// The last thing this stream says, and what waited is not said any more.
    fn refuse(&mut self, code: &str, message: &str) {
        let told = json!({ "event_type": "error", "code": code, "message": message });
        self.next.clear();
        self.next
            .push_back(format!("event: error\ndata: {told}\n\n").into());
        self.ended = true;
    }

    async fn take(&mut self, delivery: Delivery) {
        match delivery {
            Delivery::Event(event) => {
                let known = self.past.as_ref();
                let known = known.is_some_and(|past| past.seen.sees(event.xid));
                if known || event.private {
                    return;
                }
                let one_run = matches!(self.scope, Scope::Run(_));
                if !one_run && !Box::pin(self.shows(&event.topic)).await {
                    return;
                }
                let bytes = match self.scope {
                    Scope::Run(_) => event.encoded(Form::StreamOfRun, of_run),
                    Scope::Flow(_) | Scope::All => self.of_all(&event),
                };
                self.state.counters.events.inc();
                self.next.push_back(bytes);
            }
            Delivery::Frame(frame) => {
                if let Some(payload) = super::payload_of(&frame) {
                    self.next.push_back(format!("data: {payload}\n\n").into());
                }
            }
            Delivery::Cut(CutReason::ShuttingDown) => self.ended = true,
            // It resumes where it was.
            Delivery::Cut(CutReason::ListenerLost | CutReason::TooSlow) => self.ended = true,
        }
    }

    /// Encoded for all streams; not so what a look brought that began before this stream did: the past told a part of it.
    fn of_all(&self, event: &Arc<Event>) -> Bytes {
        if let (Some(past), Some(reading)) = (&self.past, &event.reading)
            && !reading.before.sees_all_of(&past.seen)
        {
            return of_all(event, &past.seen, &reading.now);
        }
        event.encoded(Form::StreamOfAll, |event| match &event.reading {
            Some(reading) => of_all(event, &reading.before, &reading.now),
            None => format!("data: {}\n\n", event.payload).into(),
        })
    }

    /// Of a stream of many: whether the role may see that run.
    async fn shows(&mut self, topic: &str) -> bool {
        let Some(run) = run_of_topic(topic) else {
            return false;
        };
        let rights = match &self.rights {
            Some(rights) => Arc::clone(rights),
            None => match self.state.sight.rights(&self.identity.asker).await {
                Ok(rights) => Arc::clone(self.rights.insert(rights)),
                Err(_unknown) => return self.give_up(),
            },
        };
        match self
            .state
            .sight
            .may_list(&self.identity.asker, &rights, run)
            .await
        {
            Ok(shown) => shown,
            Err(_unknown) => self.give_up(),
        }
    }

    /// Nobody can say whether the role may see it, so it is neither told nor passed over: the client comes back to it.
    fn give_up(&mut self) -> bool {
        self.ended = true;
        false
    }

    async fn page(&mut self) {
        let Some(Past {
            seen,
            rest: Some(rest),
        }) = &self.past
        else {
            return;
        };
        let sql = page_sql(&self.scope, rest);
        let Ok(answer) = self.state.database.ask_ourselves(&sql).await else {
            self.ended = true;
            return;
        };
        let (seen, mut at) = (seen.clone(), rest.clone());
        let first = answer.rows.first().and_then(|row| row.get(4)?.as_deref());
        let found = first.and_then(|found| found.parse::<usize>().ok());
        let short = found.is_none_or(|found| found < PAGE && answer.rows.len() == found);
        for row in &answer.rows {
            let column = |at: usize| row.get(at).and_then(Option::as_deref);
            let (Some(id), Some(topic), Some(payload)) = (
                column(0).and_then(|id| id.parse::<i64>().ok()),
                column(1),
                column(3).and_then(|payload| serde_json::from_str::<&RawValue>(payload).ok()),
            ) else {
                continue;
            };
            at.id = id;
            if Box::pin(self.shows(topic)).await {
                let seq = column(2).and_then(|seq| seq.parse().ok());
                let told = envelope(payload, seq, id);
                self.next
                    .push_back(format!("id: {at}\ndata: {told}\n\n").into());
            }
            if self.ended {
                return;
            }
        }
        if let Some(past) = &mut self.past {
            past.rest = if !short {
                Some(at)
            } else if at.now == seen {
                None
            } else {
                Some(Cursor {
                    id: 0,
                    before: at.now,
                    now: seen,
                })
            };
        }
    }
}

/// What one write takes of what waits, one at least: before the next is written, rights are looked at again if that is due.
fn batch(next: &mut VecDeque<Bytes>, chunked: bool) -> Bytes {
    let (mut count, mut length) = (0, 0);
    for bytes in next.iter() {
        if count > 0 && length + bytes.len() > BATCH_BYTES {
            break;
        }
        count += 1;
        length += bytes.len();
    }
    let mut batch = BytesMut::with_capacity(length + 20);
    if chunked {
        batch.put_slice(format!("{length:x}\r\n").as_bytes());
    }
    for bytes in next.drain(..count) {
        batch.put_slice(&bytes);
    }
    if chunked {
        batch.put_slice(b"\r\n");
    }
    // The room for them goes, too: most streams are idle most of the time.
    if next.is_empty() {
        *next = VecDeque::new();
    }
    batch.freeze()
}

fn page_sql(scope: &Scope, at: &Cursor) -> String {
    let mut sql = format!(
        "select e.id, e.topic, e.seq, e.payload, pg_column_size(e.payload) as size from flowgate.event as e \
         where {} and e.topic like 'pgflow:%' and not e.private",
        at.rest()
    );
    if let Scope::Flow(slug) = scope {
        write!(
            sql,
            " and coalesce(e.payload ->> 'flow_slug', (select r.flow_slug from pgflow.runs as r where r.run_id = \
             case when e.topic ~ '^pgflow:run:[0-9a-f]{{8}}(-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}}$' \
             then substr(e.topic, 12)::uuid end)) = '{slug}'"
        )
        .expect("a String takes all");
    }
    format!(
        "select q.id, q.topic, q.seq, q.payload::text, q.found from (select p.*, count(*) over () as found, \
         sum(p.size) over (order by p.id) - p.size as so_far from ({sql} order by e.id limit {PAGE}) as p) as q \
         where q.so_far < {PAGE_BYTES} order by q.id"
    )
}

/// Payloads are what Postgres prints of `jsonb`: no line ends in them.
fn of_run(event: &Event) -> Bytes {
    match event.seq {
        Some(seq) => format!("id: {seq}\ndata: {}\n\n", event.payload).into(),
        None => format!("data: {}\n\n", event.payload).into(),
    }
}

fn of_all(event: &Event, before: &Snapshot, now: &Snapshot) -> Bytes {
    let from = Cursor {
        id: event.id,
        before: before.clone(),
        now: now.clone(),
    };
    format!("id: {from}\ndata: {}\n\n", event.payload).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_write_takes_so_much_and_loses_nothing() {
        let sizes = [10, BATCH_BYTES, 1, BATCH_BYTES - 1, 2, 3 * BATCH_BYTES, 7];
        let waiting = || -> VecDeque<Bytes> {
            let each = sizes.iter().zip(b'a'..);
            each.map(|(size, byte)| vec![byte; *size].into()).collect()
        };
        let mut next = waiting();
        let mut written = Vec::new();
        let mut lengths = Vec::new();
        while !next.is_empty() {
            let batch = batch(&mut next, false);
            lengths.push(batch.len());
            written.extend_from_slice(&batch);
        }
        assert_eq!(
            lengths,
            [10, BATCH_BYTES, BATCH_BYTES, 2, 3 * BATCH_BYTES, 7]
        );
        assert_eq!(written, waiting().into_iter().flatten().collect::<Vec<_>>());
        let mut next = VecDeque::from([Bytes::from_static(b"ab"), Bytes::from_static(b"c")]);
        assert_eq!(batch(&mut next, true), "3\r\nabc\r\n");
    }
}
