//! `/realtime/v1/websocket`: Phoenix channels as supabase-js speaks them, over the hub. One socket is one task with one
//! subscriber; a channel of it is one topic followed from its beginning, so whoever joins is told what it missed.
//!
//! Pgflow's client lives by broadcasts alone, moves its state only upwards and drops repeats: so events may come again, but none may
//! be lost and none may overtake the answer to the call that started the run (`starting.rs`). What was replayed at the join
//! is repeated once, because the client overwrites its steps with a snapshot that is older than the join.

use std::collections::{HashMap, VecDeque};
use std::future::poll_fn;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::ws::{CloseFrame, Message, WebSocket, WebSocketUpgrade};
use axum::extract::{Query, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use futures_util::future::{FutureExt, join_all};
use futures_util::{SinkExt, StreamExt};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, warn};
use uuid::Uuid;

use super::HttpState;
use super::counters::OpenStream;
use super::identity::{Credentials, Identity, of_headers};
use super::phoenix::{Said, Version, made_up_events, read_push};
use super::refusal::JSON;
use crate::events::{CutReason, Delivery, Event, Subscriber};
use crate::pgflow::events::run_of_topic;
use crate::server::questions::DbError;

/// What a client may send in one message.
const MESSAGE_MAX: usize = 1 << 20;
/// Messages that are heard together, and how long each but the last may be.
const HEARD_AT_ONCE: usize = 64;
const SMALL: usize = 16 << 10;
/// A client says something every 30 s at the latest.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// How long events of a run wait for the answer that it was started.
const HOLD_MAX: Duration = Duration::from_secs(1);
/// How often that answer is looked for.
const HOLD_LOOK: Duration = Duration::from_millis(5);
/// Events of one run that wait; more, and they do not.
const HELD_MAX: usize = 1_000;
/// From the join until what it replayed is repeated.
const REPEAT_AFTER: Duration = Duration::from_millis(1_500);

const GOING_AWAY: u16 = 1012;
const TOO_LARGE: u16 = 1009;
const TRY_LATER: u16 = 1013;

#[derive(Deserialize)]
pub(super) struct InUrl {
    apikey: Option<String>,
    vsn: Option<String>,
}

pub(super) async fn websocket(
    State(state): State<HttpState>,
    headers: HeaderMap,
    Query(url): Query<InUrl>,
    upgrade: WebSocketUpgrade,
) -> Response {
    let Some(version) = Version::parse(url.vsn.as_deref()) else {
        return refuse(StatusCode::BAD_REQUEST, "vsn: 1.0.0 or 2.0.0");
    };
    if !state.origins.admits(&headers) {
        return refuse(
            StatusCode::FORBIDDEN,
            "http.cors does not list this page's origin",
        );
    }
    let sent = of_headers(&headers);
    let own_header = headers
        .get("x-api-key")
        .map(|key| key.to_str().unwrap_or("?"));
    let credentials = Credentials {
        token: None,
        key: own_header
            .or(url.apikey.as_deref())
            .or(sent.key)
            .or(sent.token),
    };
    let identity = match state.guard.identify(credentials).await {
        Ok(identity) => identity,
        Err(refused) => return refuse(refused.status, &refused.message),
    };
    upgrade
        .max_message_size(MESSAGE_MAX)
        .max_frame_size(MESSAGE_MAX)
        .on_upgrade(move |socket| async move {
            let connection = Connection::new(&state, identity, version);
            connection.run(socket).await;
        })
}

fn refuse(status: StatusCode, why: &str) -> Response {
    let kind = [(axum::http::header::CONTENT_TYPE, JSON)];
    (status, kind, json!({ "error": why }).to_string()).into_response()
}

struct Connection {
    state: HttpState,
    version: Version,
    /// Of the key in the URL; of channels that bring no token of their own.
    identity: Arc<Identity>,
    subscriber: Subscriber,
    /// By topic, without `realtime:`.
    channels: HashMap<String, Channel>,
    /// To be written, in this order.
    out: VecDeque<Message>,
    /// The last thing to be said.
    close: Option<(u16, &'static str)>,
    heard_at: Instant,
    stopping: watch::Receiver<bool>,
    _open: OpenStream,
}

struct Channel {
    join_ref: Option<String>,
    identity: Arc<Identity>,
    run: Option<Uuid>,
    /// Its broadcasts are to be acknowledged.
    acks: bool,
    check_at: Instant,
    expires_at: Option<Instant>,
    repeat_at: Option<Instant>,
    joined_at: Instant,
    repeated: bool,
    held: Held,
}

#[derive(Default)]
struct Held {
    events: VecDeque<Arc<Event>>,
    /// Until then at the latest.
    until: Option<Instant>,
}

impl Channel {
    fn due(&self, now: Instant) -> Instant {
        let hold = self.held.until.map(|until| until.min(now + HOLD_LOOK));
        [self.expires_at, self.repeat_at, hold]
            .into_iter()
            .flatten()
            .fold(self.check_at, Instant::min)
    }
}

/// `None`: the socket has ended.
type Heard = Option<Result<Message, axum::Error>>;

enum Woken {
    Stopping,
    Due,
    Said(Heard),
    Delivery(Delivery),
}

impl Connection {
    fn new(state: &HttpState, identity: Arc<Identity>, version: Version) -> Self {
        Self {
            version,
            identity,
            subscriber: state.hub.event_subscriber(),
            channels: HashMap::new(),
            out: VecDeque::new(),
            close: None,
            heard_at: Instant::now(),
            stopping: state.stopping.clone(),
            _open: state.counters.socket(),
            state: state.clone(),
        }
    }

    async fn run(mut self, socket: WebSocket) {
        let (mut sink, mut stream) = socket.split();
        loop {
            // A client that takes nothing is cut by the socket itself, so this ends.
            while let Some(message) = self.out.pop_front() {
                if sink.feed(message).await.is_err() {
                    return;
                }
            }
            if sink.flush().await.is_err() {
                return;
            }
            if let Some((code, reason)) = self.close.take() {
                let farewell = CloseFrame {
                    code,
                    reason: reason.into(),
                };
                // It may be gone already.
                drop(sink.send(Message::Close(Some(farewell))).await);
                return;
            }
            let due = self.due();
            let woken = tokio::select! {
                biased;
                () = super::stopped(&mut self.stopping) => Woken::Stopping,
                () = sleep_until(due) => Woken::Due,
                said = stream.next() => Woken::Said(said),
                delivery = poll_fn(|cx| self.subscriber.poll_next(cx)) => Woken::Delivery(delivery),
            };
            match woken {
                Woken::Stopping => self.close = Some((GOING_AWAY, "shutting down")),
                Woken::Due => self.look().await,
                Woken::Said(said) => {
                    self.heard_at = Instant::now();
                    // With what else there is already: who comes back joins all of its channels at once.
                    let mut heard = vec![said];
                    while heard.len() < HEARD_AT_ONCE && heard.last().is_some_and(is_small) {
                        match stream.next().now_or_never() {
                            Some(more) => heard.push(more),
                            None => break,
                        }
                    }
                    if !self.hear(heard).await {
                        return;
                    }
                }
                Woken::Delivery(delivery) => self.take(delivery).await,
            }
        }
    }

    fn due(&self) -> Instant {
        let now = Instant::now();
        self.channels
            .values()
            .map(|channel| channel.due(now))
            .fold(self.heard_at + SILENCE_MAX, Instant::min)
    }

    /// `false`: the client has said goodbye, or is gone.
    async fn hear(&mut self, messages: Vec<Heard>) -> bool {
        let mut joins: Vec<Said> = Vec::new();
        for message in messages {
            match message {
                Some(Ok(Message::Text(text))) => {
                    let Some(said) = self.version.read(&text) else {
                        continue;
                    };
                    let joins_another = said.event == "phx_join"
                        && said.topic != "phoenix"
                        && joins.iter().all(|join| join.topic != said.topic);
                    if joins_another {
                        joins.push(said);
                        continue;
                    }
                    self.join(std::mem::take(&mut joins)).await;
                    self.answer(said).await;
                }
                Some(Ok(Message::Binary(bytes))) => {
                    self.join(std::mem::take(&mut joins)).await;
                    if let Some((join_ref, reference, topic)) = read_push(&bytes) {
                        self.acknowledge(join_ref.as_deref(), reference.as_deref(), &topic);
                    }
                }
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Err(error)) if is_too_large(&error) => {
                    debug!(%error, "socket");
                    self.close = Some((TOO_LARGE, "message too large"));
                    break;
                }
                Some(Err(error)) => {
                    debug!(%error, "socket");
                    return false;
                }
                Some(Ok(Message::Close(_))) | None => return false,
            }
        }
        self.join(joins).await;
        true
    }

    async fn answer(&mut self, said: Said) {
        let reference = said.reference.as_deref();
        if said.topic == "phoenix" {
            if said.event == "heartbeat" {
                self.reply(None, reference, "phoenix", "ok", &json!({}));
            }
            return;
        }
        let topic = topic_of(&said);
        match said.event.as_str() {
            "phx_join" => self.join(vec![said]).await,
            "phx_leave" => {
                let left = self.leave(topic);
                self.reply(
                    said.join_ref.as_deref(),
                    reference,
                    &said.topic,
                    "ok",
                    &json!({}),
                );
                if let Some(channel) = left {
                    self.end(&channel, topic);
                }
            }
            "access_token" => self.renew(topic, &said.payload).await,
            "broadcast" => self.acknowledge(said.join_ref.as_deref(), reference, &said.topic),
            _ => {}
        }
    }

    /// Several together: each may have to wait until the outbox has been read. Of no topic twice.
    async fn join(&mut self, joins: Vec<Said>) {
        for said in &joins {
            let topic = topic_of(said);
            if let Some(old) = self.leave(topic) {
                self.end(&old, topic);
            }
        }
        let joined = joins
            .iter()
            .map(|said| self.joined(topic_of(said), join_ref(said), &said.payload));
        let joined = join_all(joined).await;
        for (said, joined) in joins.iter().zip(joined) {
            self.answer_join(said, joined);
        }
    }

    fn answer_join(&mut self, said: &Said, joined: Result<Channel, String>) {
        let response = match joined {
            Ok(channel) => {
                self.channels.insert(topic_of(said).to_owned(), channel);
                ("ok", json!({ "postgres_changes": [] }))
            }
            Err(reason) => {
                self.state.counters.joins_refused.inc();
                ("error", json!({ "reason": reason }))
            }
        };
        let (join_ref, reference) = (join_ref(said), said.reference.as_deref());
        self.reply(
            join_ref.as_deref(),
            reference,
            &said.topic,
            response.0,
            &response.1,
        );
        // realtime-js up to 2.11 sends a join that was under way when its socket broke, and all later ones of that channel, without
        // a ref (`Push.resend`). It can't tell the answer, and at its next try takes itself for a second channel of the topic and
        // leaves. An error it can tell: a channel that has failed hears what is broadcast, and only joins again, now and then.
        if reference == Some("") {
            let answer = self.version.write(
                join_ref.as_deref(),
                None,
                &said.topic,
                "phx_error",
                &json!({}),
            );
            self.out.push_back(answer);
        }
    }

    /// In force when this returns: what is committed from then on is told.
    async fn joined(
        &self,
        topic: &str,
        join_ref: Option<String>,
        payload: &Value,
    ) -> Result<Channel, String> {
        if topic.is_empty() {
            return Err("Topic name required: realtime:<topic>".to_owned());
        }
        if topic.contains('\0') || topic.len() > 1_000 {
            return Err("Malformed topic".to_owned());
        }
        let config = &payload["config"];
        if config["private"] == true {
            return Err("Private channels are not supported".to_owned());
        }
        let identity = self.of_token(&payload["access_token"]).await?;
        let run = run_of_topic(topic);
        self.permitted(&identity, run).await?;
        self.subscriber
            .follow(topic, 0)
            .await
            .map_err(|error| error.to_string())?;
        let now = Instant::now();
        Ok(Channel {
            join_ref,
            expires_at: identity.expires_in().map(|left| now + left),
            identity,
            run,
            acks: config["broadcast"]["ack"] == true,
            check_at: self.state.sight.next_check(),
            repeat_at: None,
            joined_at: now,
            repeated: false,
            held: Held::default(),
        })
    }

    /// Who somebody is on a channel: by a token of its own, or by the socket's key.
    async fn of_token(&self, token: &Value) -> Result<Arc<Identity>, String> {
        match token.as_str() {
            None | Some("") => Ok(Arc::clone(&self.identity)),
            Some(token) if token.starts_with("sb_") => Ok(Arc::clone(&self.identity)),
            Some(token) => {
                let identity = self.state.guard.known(token).await;
                let identity = identity.map_err(|refused| refused.message)?;
                if token.contains('.') && identity.expires.is_none() {
                    return Err("The JWT lacks the claim exp".to_owned());
                }
                Ok(identity)
            }
        }
    }

    async fn permitted(&self, identity: &Identity, run: Option<Uuid>) -> Result<(), String> {
        let sight = &self.state.sight;
        let allowed = match run {
            Some(run) => sight.may_follow(&identity.asker, run).await,
            // Whoever may read any run that it can name may hear any topic that it can.
            None => sight
                .rights(&identity.asker)
                .await
                .map(|rights| rights.by_id),
        };
        match allowed {
            Ok(true) => Ok(()),
            Ok(false) => Err(format!(
                "Unauthorized: role \"{}\" may not see this",
                identity.asker.role
            )),
            Err(DbError::Role(message)) => Err(format!("Unauthorized: {message}")),
            Err(error) => Err(error.to_string()),
        }
    }

    fn leave(&mut self, topic: &str) -> Option<Channel> {
        let channel = self.channels.remove(topic)?;
        self.subscriber.unfollow(topic);
        Some(channel)
    }

    async fn renew(&mut self, topic: &str, payload: &Value) {
        let Some(run) = self.channels.get(topic).map(|channel| channel.run) else {
            return;
        };
        let renewed = match self.of_token(&payload["access_token"]).await {
            Ok(identity) => self.permitted(&identity, run).await.map(|()| identity),
            Err(reason) => Err(reason),
        };
        match renewed {
            Ok(identity) => {
                let check_at = self.state.sight.next_check();
                if let Some(channel) = self.channels.get_mut(topic) {
                    channel.expires_at = identity.expires_in().map(|left| Instant::now() + left);
                    channel.identity = identity;
                    channel.check_at = check_at;
                }
            }
            Err(reason) => self.expel(topic, &reason),
        }
    }

    /// Says why, and that it is for good.
    fn expel(&mut self, topic: &str, reason: &str) {
        if let Some(channel) = self.leave(topic) {
            self.say(&channel, topic, "system", &system_error(topic, reason));
            self.end(&channel, topic);
        }
    }

    /// What time has brought: tokens that expired, rights to be asked about again, repeats, answers that were written.
    async fn look(&mut self) {
        let now = Instant::now();
        if self.heard_at + SILENCE_MAX <= now {
            self.close = Some((1000, "nothing heard for a minute"));
            return;
        }
        let due = |(topic, channel): (&String, &Channel)| {
            (channel.due(now) <= now || channel.held.until.is_some()).then(|| topic.clone())
        };
        let topics: Vec<String> = self.channels.iter().filter_map(due).collect();
        let mut repeated = Vec::new();
        for topic in topics {
            if self.look_at(&topic, now).await {
                repeated.push(topic);
            }
        }
        let again = repeated
            .iter()
            .map(|topic| self.subscriber.follow(topic, 0));
        for (topic, again) in repeated.iter().zip(join_all(again).await) {
            if again.is_err() {
                self.rejoin(topic);
            }
        }
    }

    /// `true`: what it was told is to be told again.
    async fn look_at(&mut self, topic: &str, now: Instant) -> bool {
        let Some(channel) = self.channels.get_mut(topic) else {
            return false;
        };
        if channel.expires_at.is_some_and(|at| at <= now) {
            self.expel(topic, "Token has expired 0 seconds ago");
            return false;
        }
        if channel.check_at <= now {
            channel.check_at = self.state.sight.next_check();
            let (identity, run) = (Arc::clone(&channel.identity), channel.run);
            let sight = &self.state.sight;
            let allowed = match run {
                Some(run) => sight.may_follow(&identity.asker, run).await,
                None => sight
                    .rights(&identity.asker)
                    .await
                    .map(|rights| rights.by_id),
            };
            match allowed {
                Ok(true) => {}
                Ok(false) => {
                    self.expel(topic, "Unauthorized: the role may not see this any more");
                    return false;
                }
                Err(DbError::Role(message)) => {
                    self.expel(topic, &format!("Unauthorized: {message}"));
                    return false;
                }
                // Nobody can say: a database that is away tells no events either.
                Err(_unknown) => {
                    let soon = sight.soon();
                    if let Some(channel) = self.channels.get_mut(topic) {
                        channel.check_at = soon;
                    }
                }
            }
        }
        let Some(channel) = self.channels.get_mut(topic) else {
            return false;
        };
        let answered = channel
            .run
            .is_none_or(|run| !self.state.starting.holds(run));
        if channel
            .held
            .until
            .is_some_and(|until| until <= now || answered)
        {
            self.release(topic);
        }
        let Some(channel) = self.channels.get_mut(topic) else {
            return false;
        };
        let repeats = channel.repeat_at.is_some_and(|at| at <= now);
        if repeats {
            channel.repeat_at = None;
            channel.repeated = true;
        }
        repeats
    }

    /// What waited goes out, and once more a little later: the answer may be slower on its own socket than these on theirs.
    fn release(&mut self, topic: &str) {
        let Some(channel) = self.channels.get_mut(topic) else {
            return;
        };
        channel.held.until = None;
        let events = std::mem::take(&mut channel.held.events);
        if !channel.repeated {
            channel.repeat_at = Some(Instant::now() + REPEAT_AFTER);
        }
        for event in events {
            self.state.counters.events.inc();
            self.out.push_back(self.version.broadcast(&event));
        }
    }

    async fn take(&mut self, delivery: Delivery) {
        match delivery {
            Delivery::Event(event) => {
                // A task's signal is none of pgflow's events; a private one is not for public channels.
                if event.seq.is_some() && !event.private {
                    self.tell(event);
                }
            }
            Delivery::Frame(frame) => {
                if let Some(topic) = super::channel_of(&frame) {
                    self.bridge(topic).await;
                }
            }
            Delivery::Cut(CutReason::ShuttingDown) => {
                self.close = Some((GOING_AWAY, "shutting down"));
            }
            Delivery::Cut(CutReason::ListenerLost | CutReason::TooSlow) => {
                self.close = Some((TRY_LATER, "events were lost; join again"));
            }
        }
    }

    fn tell(&mut self, event: Arc<Event>) {
        let topic = event.topic.clone();
        let Some(channel) = self.channels.get_mut(&topic) else {
            return;
        };
        let now = Instant::now();
        if !channel.repeated && channel.repeat_at.is_none() {
            // Of a run that has just begun the client may still be reading the answer to its start, which undoes what it is told
            // meanwhile: written here is not read there.
            let since = match (&event.reading, channel.run) {
                (None, _) => Some(channel.joined_at.max(now - REPEAT_AFTER)),
                (Some(_), run) => run.map(|_| now),
            };
            channel.repeat_at = since.map(|since| since + REPEAT_AFTER);
        }
        let starting = channel
            .run
            .is_some_and(|run| self.state.starting.holds(run));
        if channel.held.until.is_none() && starting && !channel.repeated {
            channel.held.until = Some(now + HOLD_MAX);
        }
        if channel.held.until.is_some() {
            channel.held.events.push_back(event);
            if channel.held.events.len() > HELD_MAX {
                self.release(&topic);
            }
            return;
        }
        self.state.counters.events.inc();
        self.out.push_back(self.version.broadcast(&event));
    }

    /// Some of a run's events are gone for their age, or were passed over: what they led to is told in their place.
    async fn bridge(&mut self, topic: &str) {
        let Some(run) = self.channels.get(topic).and_then(|channel| channel.run) else {
            return;
        };
        let made = self.state.database.ask_ourselves(&made_up_sql(run)).await;
        let made = match made {
            Ok(made) => made,
            // What the control role may not read will not be told by joining again either.
            Err(error @ DbError::Postgres { .. }) => {
                warn!(%error, "a run's state cannot be told in place of events that are gone");
                return;
            }
            Err(_) => {
                self.rejoin(topic);
                return;
            }
        };
        let json = made.single().unwrap_or_else(|| "[]".to_owned());
        for (name, payload) in made_up_events(&json) {
            let message = self.version.made_up(topic, &name, payload.get());
            self.out.push_back(message);
        }
    }

    /// The client joins again, a second later, and is told everything.
    fn rejoin(&mut self, topic: &str) {
        if let Some(channel) = self.leave(topic) {
            self.say(&channel, topic, "phx_error", &json!({}));
        }
    }

    fn acknowledge(&mut self, join_ref: Option<&str>, reference: Option<&str>, topic: &str) {
        let bare = topic.strip_prefix("realtime:").unwrap_or_default();
        if self.channels.get(bare).is_some_and(|channel| channel.acks) {
            self.reply(join_ref, reference, topic, "ok", &json!({}));
        }
    }

    fn reply(
        &mut self,
        join_ref: Option<&str>,
        reference: Option<&str>,
        topic: &str,
        status: &str,
        response: &Value,
    ) {
        let payload = json!({ "status": status, "response": response });
        let message = self
            .version
            .write(join_ref, reference, topic, "phx_reply", &payload);
        self.out.push_back(message);
    }

    fn say(&mut self, channel: &Channel, topic: &str, event: &str, payload: &Value) {
        let topic = format!("realtime:{topic}");
        let join_ref = channel.join_ref.as_deref();
        let message = self.version.write(join_ref, None, &topic, event, payload);
        self.out.push_back(message);
    }

    /// By its ref supabase-js knows whether that is the end of the channel it has now, or of the one before. Where it has none it
    /// would drop whatever else it joined without a ref.
    fn end(&mut self, channel: &Channel, topic: &str) {
        let join_ref = channel.join_ref.as_deref();
        if join_ref == Some("") {
            return;
        }
        let topic = format!("realtime:{topic}");
        let message = self
            .version
            .write(join_ref, join_ref, &topic, "phx_close", &json!({}));
        self.out.push_back(message);
    }
}

fn is_small(heard: &Heard) -> bool {
    matches!(heard, Some(Ok(Message::Text(text))) if text.len() <= SMALL)
}

/// Without `realtime:`.
fn topic_of(said: &Said) -> &str {
    said.topic.strip_prefix("realtime:").unwrap_or_default()
}

fn join_ref(said: &Said) -> Option<String> {
    said.join_ref.clone().or_else(|| said.reference.clone())
}

fn system_error(topic: &str, reason: &str) -> Value {
    json!({ "extension": "system", "status": "error", "message": reason, "channel": topic })
}

fn is_too_large(error: &axum::Error) -> bool {
    // The kind is behind a crate that is not ours to name.
    let words = error.to_string();
    words.contains("too long") || words.contains("too large") || words.contains("too big")
}

/// Steps as far as they have got, then the run: what their last events said, as `[[name, payload], …]`.
fn made_up_sql(run: Uuid) -> String {
    format!(
        "select coalesce(jsonb_agg(jsonb_build_array(made.name, made.payload) order by made.last, made.at), '[]')::text from (\
         select 'step:' || s.step_slug || ':' || s.status as name, false as last, s.created_at as at, \
         to_jsonb(s) || jsonb_build_object('event_type', 'step:' || s.status) \
         || case when s.status = 'completed' then jsonb_build_object('output', coalesce(to_jsonb(s) -> 'output', \
         (select case when d.step_type = 'map' then jsonb_agg(t.output order by t.task_index) else (array_agg(t.output))[1] end \
         from pgflow.step_tasks as t join pgflow.steps as d on d.flow_slug = t.flow_slug and d.step_slug = t.step_slug \
         where t.run_id = s.run_id and t.step_slug = s.step_slug group by d.step_type))) else '{{}}' end as payload \
         from pgflow.step_states as s where s.run_id = '{run}' and s.status <> 'created' \
         union all select 'run:' || r.status, true, r.started_at, \
         to_jsonb(r) || jsonb_build_object('event_type', 'run:' || r.status) \
         from pgflow.runs as r where r.run_id = '{run}') as made"
    )
}
