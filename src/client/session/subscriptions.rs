//! LISTEN and UNLISTEN: a session's subscription at the hub, and what of it servers are told. Never delivers: that is
//! `waiting.rs`'s. Called by `mod.rs`, `servers.rs` and `batches.rs`.

use std::time::Duration;

use super::{Session, server_lost};
use crate::classify::Effect;
use crate::client::error::SessionError;
use crate::client::reply;
use crate::events::{EventsError, Subscriber};
use crate::pool::reset;
use crate::route::Subscription;
use crate::wire::error_response::ErrorResponse;
use crate::wire::frame::Header;
use crate::wire::messages::TxStatus;
use crate::wire::quote;

/// How long an answer waits for the notifications its request sent to its own session.
const OWN_WAIT: Duration = Duration::from_secs(1);

impl Session {
    /// A Query of one LISTEN or UNLISTEN.
    pub(super) async fn subscribe_query(
        &mut self,
        header: Header,
        change: &Subscription,
    ) -> Result<(), SessionError> {
        self.skip(header.whole).await?;
        match self.subscribe(change).await {
            Ok(tag) => reply::put_command(&mut self.client.output, tag),
            Err(error) => return self.refuse(not_listening(&error), true).await,
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
        match self.subscribe(change).await {
            Ok(tag) => self.answer_kept_batch(tag).await,
            Err(error) => self.refuse(not_listening(&error), true).await,
        }
    }

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

    /// A transaction that ran LISTEN or UNLISTEN has ended. Which LISTENs are in force, after savepoints and all, the server
    /// knows; they move to the hub before the client hears of the commit.
    pub(super) async fn adopt_subscriptions(
        &mut self,
        rolled_back: bool,
    ) -> Result<(), SessionError> {
        let Some(lease) = self.lease.as_mut() else {
            return Ok(());
        };
        let listed = reset::command(lease, "SELECT pg_catalog.pg_listening_channels()").await;
        let channels = listed.map_err(server_lost)?;
        if !rolled_back {
            for effect in self.state.subscriptions() {
                match (effect, &self.subscriber) {
                    (Effect::Unlisten(channel), Some(subscriber)) => subscriber.unlisten(channel),
                    (Effect::UnlistenAll, Some(subscriber)) => subscriber.unlisten_all(),
                    _ => {}
                }
            }
        }
        self.adopt_channels(&channels).await
    }

    /// What the server listens to, the hub does from now on.
    pub(super) async fn adopt_channels(&mut self, channels: &[String]) -> Result<(), SessionError> {
        for channel in channels {
            let listening = self.subscriber().listen(channel).await;
            listening.map_err(|error| SessionError::Cut(error.to_string()))?;
        }
        if !channels.is_empty() {
            self.hush_server().await?;
        }
        Ok(())
    }

    /// A server that is asked what this session listens to has to listen to it; until the transaction ends. Inside a
    /// transaction that is not possible: a LISTEN counts from its commit.
    pub(super) async fn lend_subscriptions(&mut self) -> Result<(), SessionError> {
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
            listening.map_err(server_lost)?;
            self.transaction.listens = true;
        }
        Ok(())
    }

    /// A server that was to list the channels listens no more.
    pub(super) async fn take_back_subscriptions(&mut self) -> Result<(), SessionError> {
        if std::mem::take(&mut self.transaction.listens) {
            self.hush_server().await?;
        }
        Ok(())
    }

    async fn hush_server(&mut self) -> Result<(), SessionError> {
        let Some(lease) = self.lease.as_mut() else {
            return Ok(());
        };
        let quiet = reset::command(lease, "UNLISTEN *").await;
        quiet.map(drop).map_err(server_lost)
    }

    /// Whether ReadyForQuery must wait for the session: the request may end a transaction that ran LISTEN, or one that
    /// notified a session that listens, itself perhaps.
    pub(super) fn keeps_ready(&self, effects: &[Effect]) -> bool {
        if self.notifies(effects) {
            return true;
        }
        let subscribes = |effect: &Effect| {
            matches!(
                effect,
                Effect::Listen(_) | Effect::Unlisten(_) | Effect::UnlistenAll
            )
        };
        self.state.awaits_subscriptions() || effects.iter().any(subscribes)
    }

    fn notifies(&self, effects: &[Effect]) -> bool {
        let listens = self
            .subscriber
            .as_ref()
            .is_some_and(Subscriber::hears_ordinary);
        listens && (self.state.awaits_notifications() || effects.contains(&Effect::Notify))
    }

    /// The request has notified: what a session sends to itself it hears before it may send the next one. (sql-notify.html)
    pub(super) async fn hear_own(&mut self) -> Result<(), SessionError> {
        let Some(subscriber) = self.subscriber.as_ref().filter(|s| s.hears_ordinary()) else {
            return Ok(());
        };
        if !self.exchange.keep_ready {
            return Ok(());
        }
        // Late is better than never: it comes when it comes.
        subscriber.catch_up(OWN_WAIT).await;
        let first = subscriber.try_next();
        self.put_deliveries(first).await
    }

    fn subscriber(&mut self) -> &Subscriber {
        let (shared, opening) = (&self.shared, &self.opening);
        self.subscriber
            .get_or_insert_with(|| shared.hubs.of_database(&opening.database).subscriber())
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
