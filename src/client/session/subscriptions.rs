//! LISTEN and UNLISTEN: a session's subscription at the hub, and what of it servers are told. Never delivers: that is
//! `waiting.rs`'s. Called by `mod.rs`, `servers.rs` and `batches.rs`.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::Instant;

use super::{PRIMARY, Session, server_lost};
use crate::classify::Effect;
use crate::client::error::{SessionError, no_server};
use crate::client::reply;
use crate::client::state::Ending;
use crate::config::Wake;
use crate::events::{Delivery, EventsError, Hub, Subscriber};
use crate::pgflow::events::{names_cursor, tells_of_runs, truncate_identifier, without_cursor};
use crate::pool::reset::{self, ResetError};
use crate::route::Subscription;
use crate::server::conn::{Heard, ServerConn};
use crate::server::questions::Asker;
use crate::wire::error_response::ErrorResponse;
use crate::wire::frame::{self, Header};
use crate::wire::messages::TxStatus;
use crate::wire::quote;

/// How long an answer waits for the notifications its request sent to its own session.
const OWN_WAIT: Duration = Duration::from_secs(1);
/// query_canceled
const CANCELLED: &str = "57014";
/// More than that in a row mean something else.
const LATE_CANCELS: usize = 4;

impl Session {
    /// A Query of one LISTEN or UNLISTEN.
    pub(super) async fn subscribe_query(
        &mut self,
        header: Header,
        change: &Subscription,
    ) -> Result<(), SessionError> {
        self.skip(header.whole).await?;
        match self.subscribe(change).await? {
            Ok(tag) => reply::put_command(&mut self.client.output, tag),
            Err(refused) => return self.refuse(refused, true).await,
        }
        self.shared.counters.answered_here.inc();
        Ok(self.client.flush().await?)
    }

    /// Parse…Sync of one LISTEN or UNLISTEN.
    pub(super) async fn subscribe_extended(
        &mut self,
        len: usize,
        change: &Subscription,
    ) -> Result<(), SessionError> {
        self.keep(len);
        match self.subscribe(change).await? {
            Ok(tag) => self.answer_kept_batch(tag).await,
            Err(refused) => self.refuse(refused, true).await,
        }
    }

    /// LISTEN or UNLISTEN outside a transaction: in force when this returns.
    async fn subscribe(
        &mut self,
        change: &Subscription,
    ) -> Result<Result<&'static str, ErrorResponse>, SessionError> {
        Ok(match change {
            Subscription::Listen(channel) => {
                let listening = if tells_of_runs(channel) {
                    let asker = if Box::pin(self.asks_its_server(channel)).await {
                        if let Err(error) = self.hold(PRIMARY).await {
                            return Ok(Err(no_server(&error)));
                        }
                        let asker = Box::pin(self.asker()).await;
                        // What follows may wait, and needs no server.
                        self.let_go().await;
                        match asker? {
                            Ok(asker) => asker,
                            Err(refused) => return Ok(Err(refused)),
                        }
                    } else {
                        Asker::new(self.opening.user.clone(), Vec::new())
                    };
                    let asker = Arc::new(asker);
                    Box::pin(self.subscriber().listen_as(channel, &asker)).await
                } else {
                    self.subscriber().listen(channel).await
                };
                match listening {
                    Ok(()) => Ok("LISTEN"),
                    Err(error) => Err(not_listening(&error)),
                }
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
        })
    }

    /// Whether who it is, as far as policies care, is for a server to say: the role may have been set, or there are policies, and
    /// something they read was set by whomever.
    async fn asks_its_server(&mut self, channel: &str) -> bool {
        let settings = &self.state.settings;
        let plain = settings.keeps_roles()
            && !settings.names().any(|name| name.contains('.'))
            && self.state.pins.is_empty()
            && !self.state.hides
            && self.opening.options.iter().all(|(name, _)| {
                !name.eq_ignore_ascii_case("options")
                    && !name.eq_ignore_ascii_case("role")
                    && !name.contains('.')
            });
        if !plain {
            return true;
        }
        let asker = Asker::new(self.opening.user.clone(), Vec::new());
        self.subscriber().goes_by_rows(channel, &asker).await
    }

    /// A channel that tells of runs, as whoever the session is now; the server in hand is asked for that.
    async fn listen_to_runs(
        &mut self,
        channel: &str,
    ) -> Result<Result<(), EventsError>, SessionError> {
        let mut asker = self.asker().await?;
        for _ in 1..LATE_CANCELS {
            match &asker {
                Err(error) if error.code == CANCELLED => asker = self.asker().await?,
                Ok(_) | Err(_) => break,
            }
        }
        let asker = match asker {
            Ok(asker) => Arc::new(asker),
            Err(error) => {
                return Ok(Err(EventsError::Unproven {
                    role: self.opening.user.clone(),
                    why: error.message,
                }));
            }
        };
        Ok(self.subscriber().listen_as(channel, &asker).await)
    }

    /// `Err`: its server does not say.
    async fn asker(&mut self) -> Result<Result<Asker, ErrorResponse>, SessionError> {
        let user = self.opening.user.clone();
        let Some(lease) = self.lease.as_mut() else {
            return Ok(Ok(Asker::new(user, Vec::new())));
        };
        let set = self.state.settings.names().map(str::to_owned);
        let opened = self.opening.options.iter();
        // `-c my.own=value`, `--my.own=value`
        let words = opened
            .clone()
            .filter(|(name, _)| name.eq_ignore_ascii_case("options"));
        let words = words.flat_map(|(_, value)| value.split_ascii_whitespace());
        let words = words.filter_map(|word| {
            let word = word
                .strip_prefix("-c")
                .or_else(|| word.strip_prefix("--"))
                .unwrap_or(word);
            let (name, _) = word.split_once('=')?;
            let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_' || b == b'.';
            name.bytes().all(plain).then(|| name.to_owned())
        });
        let names = set.chain(opened.map(|(name, _)| name.clone())).chain(words);
        let names = names.filter(|name| name.contains('.'));
        let answer = match reset::command(lease, &who_asks(&user, names)).await {
            Ok(answer) => answer,
            Err(ResetError::Refused { code, message }) => {
                return Ok(Err(ErrorResponse::error(code, message)));
            }
            Err(error) => return Err(server_lost(error)),
        };
        let mut answer = answer.into_iter();
        let role = answer.next().unwrap_or(user);
        let settings = answer.filter_map(|said| {
            let (name, value) = said.split_once('=')?;
            Some((name.to_owned(), value.to_owned()))
        });
        Ok(Ok(Asker::new(role, settings.collect())))
    }

    /// A server that was only to be asked something goes back.
    async fn let_go(&mut self) {
        if self.lease.is_none() {
            return;
        }
        let now = Instant::now();
        self.tally.ended(now, true, &self.client);
        self.close_books();
        if self.state.pins.is_empty() {
            self.check_in(now).await;
        } else if let Some(lease) = self.lease.as_mut() {
            lease.rest();
        }
    }

    /// What a committed transaction listens to.
    async fn listen_committed(
        &mut self,
        channel: &str,
    ) -> Result<Result<(), EventsError>, SessionError> {
        if tells_of_runs(channel) {
            return Box::pin(self.listen_to_runs(channel)).await;
        }
        Ok(self.subscriber().listen(channel).await)
    }

    /// A server on which a transaction may begin that listens to something, or asks what is listened to, has to listen to what
    /// the client does, until that transaction ends. Inside one it would be too late: a LISTEN counts from its commit.
    pub(super) async fn lend_subscriptions(&mut self) -> Result<(), SessionError> {
        let Some(lease) = self.lease.as_mut() else {
            return Ok(());
        };
        if lease.tx != TxStatus::Idle || self.transaction.lent.is_some() {
            return Ok(());
        }
        let channels = self.subscriber.as_ref().map(Subscriber::channels);
        let channels = channels.unwrap_or_default();
        lease.heard = Some(Heard::default());
        if !channels.is_empty() {
            let script: String = channels
                .iter()
                .map(|channel| format!("LISTEN {};", quote::ident(truncate_identifier(channel))))
                .collect();
            let listening = reset::command(lease, &script).await;
            listening.map_err(server_lost)?;
        }
        self.transaction.lent = Some(channels);
        Ok(())
    }

    /// The request has run; what its LISTENs and UNLISTENs come to is known when the transaction ends.
    pub(super) fn note_subscriptions(&mut self, effects: &[Effect]) {
        for effect in effects {
            match (effect, &self.subscriber) {
                (Effect::Listen(channel), _) => {
                    self.transaction.named.retain(|named| match named {
                        Named::Unlisten(left) => without_cursor(left) != without_cursor(channel),
                        Named::Listen(_) => true,
                    });
                    if truncate_identifier(channel) != channel {
                        let named = Named::Listen(channel.clone());
                        self.transaction.named.push(named);
                    }
                }
                // Only a statement that was prepared before and is bound in the middle of a request comes to a server that
                // does not listen.
                (Effect::Unlisten(channel), Some(subscriber)) if self.exchange.error.is_none() => {
                    if self.transaction.lent.is_none() {
                        subscriber.unlisten(channel);
                    } else if names_cursor(channel) {
                        let named = Named::Unlisten(channel.clone());
                        self.transaction.named.push(named);
                    }
                }
                (Effect::UnlistenAll, Some(subscriber)) => {
                    if self.transaction.lent.is_none() && self.exchange.error.is_none() {
                        subscriber.unlisten_all();
                    }
                }
                (Effect::Unlisten(_), Some(_)) => {}
                (Effect::Unlisten(_) | Effect::UnlistenAll, None) => {}
                _ => continue,
            }
            self.transaction.subscribes = true;
        }
        // Perhaps to before it; then what was left goes on, as far as we know.
        if self.exchange.error.is_some() || self.exchange.tag.is("ROLLBACK") {
            let listens = |named: &Named| matches!(named, Named::Listen(_));
            self.transaction.named.retain(listens);
        }
    }

    /// A transaction that could have listened to something has ended and did not.
    pub(super) async fn take_back_subscriptions(
        &mut self,
        lent: &[String],
    ) -> Result<(), SessionError> {
        if let Some(lease) = self.lease.as_mut() {
            lease.heard = None;
        }
        if lent.is_empty() {
            return Ok(());
        }
        self.hush_server().await
    }

    /// A transaction that listened has ended. What the session listens to now, after savepoints and all, the server knows; that moves to
    /// the hub before the client hears of the commit, and the server listens no more. What it is told in between is kept: a
    /// channel just joined is the hub's only from a moment after the commit.
    pub(super) async fn adopt_subscriptions(&mut self) -> Result<(), SessionError> {
        let lent = self.transaction.lent.take();
        let named = std::mem::take(&mut self.transaction.named);
        self.transaction.subscribes = false;
        let Some(lease) = self.lease.as_mut() else {
            return Ok(());
        };
        let listed = insist(lease, "SELECT pg_catalog.pg_listening_channels()").await?;
        let lent = lent.unwrap_or_default();
        for channel in &lent {
            let cut = truncate_identifier(channel);
            if !listed.iter().any(|name| name == cut)
                && let Some(subscriber) = &self.subscriber
            {
                subscriber.unlisten(channel);
            }
        }
        let before: HashSet<&str> = lent.iter().map(|name| truncate_identifier(name)).collect();
        // In the order in which they were listened to.
        let joined = listed.iter().filter(|name| !before.contains(name.as_str()));
        let joined: Vec<&String> = joined.collect();
        for channel in joined.iter().copied() {
            let mut long = named.iter().rev().filter_map(|named| match named {
                Named::Listen(name) => Some(name),
                Named::Unlisten(_) => None,
            });
            let long = long.find(|name| truncate_identifier(name) == channel);
            let listening = self.listen_committed(long.unwrap_or(channel)).await?;
            self.note_unheard(channel, listening)?;
        }
        // The server listens to the plain name of what is left by the name it was asked for with.
        for named in &named {
            if let (Named::Unlisten(channel), Some(subscriber)) = (named, &self.subscriber) {
                subscriber.unlisten(channel);
            }
        }
        if let (false, Some(lease)) = (joined.is_empty(), self.lease.as_mut()) {
            // What the hub was told before it had joined, the server may not have been told yet: whoever commits a notification
            // wakes the listeners one by one. One that notifies reads all there is.
            match reset::command(lease, "NOTIFY flowgate_joined").await {
                // Refused (a timeout of the client's, its cancel): then what comes late comes by the hub alone.
                Ok(_) | Err(ResetError::Refused { .. }) => {}
                Err(error) => return Err(server_lost(error)),
            }
        }
        if !listed.is_empty() {
            self.hush_server().await?;
        }
        let heard = self.lease.as_mut().and_then(|lease| lease.heard.take());
        if let Some(heard) = heard {
            let Some(frames) = heard.into_frames() else {
                return Err(SessionError::Cut("TooSlow".into()));
            };
            let frames = split(frames.into());
            let joined = joined.into_iter().cloned().collect();
            self.transaction.heard = Some(Box::new(Overheard { frames, joined }));
        }
        Ok(())
    }

    /// What the server listens to by code that nobody saw, the hub does from now on.
    pub(super) async fn adopt_channels(&mut self, channels: &[String]) -> Result<(), SessionError> {
        for channel in channels {
            let listening = self.listen_committed(channel).await?;
            self.note_unheard(channel, listening)?;
        }
        if !channels.is_empty() {
            self.hush_server().await?;
        }
        Ok(())
    }

    /// Too late for an error: the transaction is committed.
    fn note_unheard(
        &mut self,
        channel: &str,
        listening: Result<(), EventsError>,
    ) -> Result<(), SessionError> {
        let why = match &listening {
            Ok(()) => return Ok(()),
            Err(EventsError::BadCursor) => "invalid cursor",
            Err(EventsError::Denied { .. }) => "permission denied",
            Err(EventsError::Unproven { why, .. }) => why,
            Err(error) => return Err(SessionError::Cut(error.to_string())),
        };
        ErrorResponse::notice(format!("not listening to \"{channel}\": {why}"))
            .put(&mut self.client.output);
        Ok(())
    }

    async fn hush_server(&mut self) -> Result<(), SessionError> {
        let Some(lease) = self.lease.as_mut() else {
            return Ok(());
        };
        insist(lease, "UNLISTEN *").await.map(drop)
    }

    /// Whether ReadyForQuery must wait for the session: it listens, or the request may end a transaction that ran LISTEN.
    pub(super) fn keeps_ready(&self, effects: &[Effect]) -> bool {
        self.transaction.subscribes
            || effects.iter().any(Effect::subscribes)
            || self
                .subscriber
                .as_ref()
                .is_some_and(Subscriber::hears_ordinary)
    }

    /// Before it is told that its request is done, a session hears what was committed before: what others told it, and what it
    /// sent to itself, by whatever function or trigger. (sql-notify.html)
    pub(super) async fn hear_own(&mut self) -> Result<(), SessionError> {
        let heard = self.transaction.heard.take();
        let Some(subscriber) = self.subscriber.as_ref().filter(|s| s.hears_ordinary()) else {
            return Ok(());
        };
        if !self.exchange.keep_ready {
            return Ok(());
        }
        // Late is better than never: it comes when it comes.
        subscriber.catch_up(OWN_WAIT).await;
        let channels = subscriber.ordinary_channels();
        let Overheard { mut frames, joined } = heard.map(|heard| *heard).unwrap_or_default();
        frames.retain(|frame| channels.contains(notified_channel(frame)));
        let mut queued = Vec::new();
        let mut rest = subscriber.try_next();
        while !frames.is_empty()
            && let Some(Delivery::Frame(frame)) = rest
        {
            queued.push(frame);
            rest = subscriber.try_next();
        }
        let is_joined = |frame: &Bytes| joined.contains(notified_channel(frame));
        let mut all = in_order(queued, frames, is_joined);
        // Whoever puts a delivery puts what has come meanwhile behind it: so that is for the last one.
        let last = rest.or_else(|| all.pop().map(Delivery::Frame));
        for frame in all {
            self.client.output.extend_from_slice(&frame);
            self.shared.counters.notifications.inc();
        }
        self.put_deliveries(last).await
    }

    /// A transaction has ended: those who read the outbox shall know, unless it was plainly rolled back.
    pub(super) fn tell(&mut self, statements: usize, ending: Ending) {
        let told = std::mem::take(&mut self.transaction.tells);
        // One of several statements may have committed before another failed, and so may a procedure.
        let undone =
            statements == 1 && (ending.rolled_back || ending.failed && !self.state.ran_opaque());
        if told
            && !undone
            && self.replica.is_none()
            && let Some(hub) = self.hub()
        {
            hub.committed();
        }
    }

    /// A request has ended inside a transaction: perhaps not the one it began in (`COMMIT; BEGIN`).
    pub(super) fn tell_of_another(
        &mut self,
        effects: &[Effect],
        statements: usize,
        before: TxStatus,
    ) {
        // Something, COMMIT, BEGIN; or COMMIT, BEGIN.
        let at_least = if before == TxStatus::Idle { 3 } else { 2 };
        if self.transaction.tells
            && statements >= at_least
            && effects.contains(&Effect::Transaction)
            && self.replica.is_none()
            && let Some(hub) = self.hub()
        {
            hub.committed();
        }
    }

    /// `None`: it is told of commits by Postgres alone.
    pub(super) fn hub(&mut self) -> Option<&Arc<Hub>> {
        if self.live.config.events.wake == Wake::Notify {
            return None;
        }
        let (shared, opening) = (&self.shared, &self.opening);
        Some(
            self.hub
                .get_or_insert_with(|| shared.hubs.of_database(&opening.database)),
        )
    }

    fn subscriber(&mut self) -> &Subscriber {
        let (shared, opening) = (&self.shared, &self.opening);
        self.subscriber
            .get_or_insert_with(|| shared.hubs.of_database(&opening.database).subscriber())
    }
}

/// When a transaction is over: a cancel that was meant for it comes too late.
async fn insist(server: &mut ServerConn, sql: &str) -> Result<Vec<String>, SessionError> {
    for _ in 1..LATE_CANCELS {
        match reset::command(server, sql).await {
            Err(ResetError::Refused { code, .. }) if code == CANCELLED => {}
            other => return other.map_err(server_lost),
        }
    }
    reset::command(server, sql).await.map_err(server_lost)
}

/// The role that a session has, and `name=value` of the settings of nobody's own (`my.own`) that policies may read: those that are
/// known to be set, that were set for whoever logs in, and that pgflow's policies, or functions they call, name. Postgres lists no others.
fn who_asks(user: &str, names: impl Iterator<Item = String>) -> String {
    let names: Vec<String> = names.map(|name| quote::literal(&name)).collect();
    // Nobody's functions and operators are found, in whatever order the session would look for them.
    format!(
        "set local search_path = ''; \
         with words (w) as (select pg_catalog.pg_get_expr(p.polqual, p.polrelid) from pg_catalog.pg_policy p \
                join pg_catalog.pg_class c on c.oid = p.polrelid join pg_catalog.pg_namespace s on s.oid = c.relnamespace \
                where s.nspname = 'pgflow' \
            union all select coalesce(pg_catalog.pg_get_function_sqlbody(f.oid), f.prosrc) from pg_catalog.pg_proc f where exists (select from pg_catalog.pg_depend d \
                where d.classid = 'pg_catalog.pg_policy'::pg_catalog.regclass \
                and d.refclassid = 'pg_catalog.pg_proc'::pg_catalog.regclass and d.refobjid = f.oid)), \
         names (n) as (select pg_catalog.unnest(array[{}]::pg_catalog.text[]) \
            union select pg_catalog.split_part(set, '=', 1) from pg_catalog.pg_db_role_setting r, \
                pg_catalog.unnest(r.setconfig) as set where r.setrole in (0, (select u.oid from pg_catalog.pg_roles u \
                where u.rolname = {})) and r.setdatabase in (0, (select d.oid from pg_catalog.pg_database d \
                where d.datname = pg_catalog.current_database())) \
            union select found[1] from words, pg_catalog.regexp_matches(w, \
                '''([A-Za-z_][A-Za-z0-9_$]*([.][A-Za-z_][A-Za-z0-9_$]*)+)''', 'g') as found), \
         given (n, v) as (select distinct pg_catalog.lower(n), pg_catalog.current_setting(pg_catalog.lower(n), true) \
            from names where n like '%.%' and not exists (select from pg_catalog.pg_settings g \
                where pg_catalog.lower(g.name) = pg_catalog.lower(n) and g.context <> 'user')) \
         select said.s from (select 0, current_user::pg_catalog.text \
            union all select 1, n || '=' || v from given where v is not null) as said (o, s) order by o, s",
        names.join(", "),
        quote::literal(user)
    )
}

fn not_listening(error: &EventsError) -> ErrorResponse {
    match error {
        EventsError::EmptyChannel => ErrorResponse::error("22023", "channel name cannot be empty"),
        EventsError::BadCursor => ErrorResponse::error("22023", "invalid cursor in channel name")
            .with_detail("What follows the @ is, of a run, the seq of an event; of others, the cursor of one."),
        EventsError::TooManyChannels { limit } => {
            ErrorResponse::error("53400", "too many channels")
                .with_detail(format!("One session may listen on {limit}."))
        }
        EventsError::Denied {
            role,
            channel,
            one_run,
        } => {
            let message = if *one_run { "permission denied for run" } else { "permission denied for runs" };
            let needed = if *one_run {
                "It needs EXECUTE on function pgflow.get_run_with_states, or the right to SELECT the run's row of pgflow.runs."
            } else {
                "It needs SELECT on pgflow.runs."
            };
            ErrorResponse::error("42501", message)
                .with_detail(format!("Role \"{role}\" may not see what \"{channel}\" tells of."))
                .with_hint(needed)
        }
        EventsError::Unproven { role, why } => {
            ErrorResponse::error("42501", "permission denied for runs")
                .with_detail(format!("What role \"{role}\" may see cannot be asked: {why}."))
                .with_hint("Policies of pgflow.runs are asked in its name: grant it to the control role, and SELECT on pgflow.runs.")
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

/// A channel as a transaction named it.
pub(super) enum Named {
    /// The server cuts it.
    Listen(String),
    /// With a cursor: the server may listen to it without.
    Unlisten(String),
}

/// What the server itself was told.
#[derive(Default)]
pub(super) struct Overheard {
    frames: Vec<Bytes>,
    /// The channels that the hub listens to since then.
    joined: HashSet<String>,
}

/// (protocol-message-formats.html, NotificationResponse)
fn notified_channel(frame: &[u8]) -> &str {
    let names = frame.get(frame::HEADER + 4..).unwrap_or_default();
    let channel = names.split(|&byte| byte == 0).next().unwrap_or_default();
    std::str::from_utf8(channel).unwrap_or_default()
}

fn split(mut bytes: Bytes) -> Vec<Bytes> {
    let mut frames = Vec::new();
    while let Some(header) = Header::peek(&bytes).filter(|header| header.whole <= bytes.len()) {
        frames.push(bytes.split_to(header.whole));
    }
    frames
}

/// What the hub queued and what the server was told, as one: the hub has all the server was told but for the beginning of what
/// came on channels it had yet to join.
fn in_order(
    mut queued: Vec<Bytes>,
    heard: Vec<Bytes>,
    is_joined: impl Fn(&Bytes) -> bool,
) -> Vec<Bytes> {
    let joined = heard.iter().filter(|frame| is_joined(frame)).count();
    for missing in 0..=joined {
        let mut missed = 0;
        let both: Vec<&Bytes> = heard
            .iter()
            .filter(|frame| {
                let misses = missed < missing && is_joined(frame);
                missed += usize::from(misses);
                !misses
            })
            .collect();
        if both.is_empty() {
            break;
        }
        let at = queued
            .windows(both.len())
            .position(|window| window.iter().eq(both.iter().copied()));
        if let Some(at) = at {
            queued.splice(at..at + both.len(), heard);
            return queued;
        }
    }
    // What the hub has of channels just joined is younger than all of it.
    let at = queued.iter().position(is_joined).unwrap_or(queued.len());
    queued.splice(at..at, heard);
    queued
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(queued: &str, heard: &str, expected: &str) {
        let frames = |letters: &str| -> Vec<Bytes> {
            let letters = letters.chars();
            letters
                .map(|letter| Bytes::from(letter.to_string()))
                .collect()
        };
        // Capitals: of a channel just joined.
        let all = in_order(frames(queued), frames(heard), |frame| {
            frame[0].is_ascii_uppercase()
        });
        let all: String = all.iter().map(|frame| char::from(frame[0])).collect();
        assert_eq!(all, expected, "{queued}");
    }

    #[test]
    fn what_hub_and_server_were_told_comes_once_and_in_order() {
        check("", "", "");
        check("", "A", "A");
        check("ab", "", "ab");
        check("xaCbDy", "EaCbD", "xEaCbDy");
        check("ab", "aAb", "aAb");
        check("xabBy", "aAbB", "xaAbBy");
        check("By", "AB", "ABy");
        check("x", "A", "xA");
        check("xay", "aA", "xaAy");
        check("xBCy", "A", "xABCy");
    }
}
