//! The server in a session's hand: how it comes, is made to fit the session and the request, carries it, and goes back.
//! Never reads what the client says, nor decides which upstream it is to be. Called by its siblings.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::time::{Instant, timeout};
use tracing::debug;

use super::{PARTING_MAX, PRIMARY, Session, server_lost};
use crate::classify::Effect;
use crate::client::error::{SessionError, still_waiting};
use crate::client::state::PinReason;
use crate::pool::checkout::{Checkout, CheckoutError, Pool, Rank, Wish};
use crate::pool::reset::{self, ResetError};
use crate::relay::{self, Pause, RelayError};
use crate::server::parameters::share;
use crate::wire::frame::FrameError;
use crate::wire::messages::{TxStatus, put_frame, put_parameter_status};

impl Session {
    /// Makes sure that the session holds a server: the one it has, or one of the upstream's pool with this session's
    /// settings.
    pub(super) async fn hold(&mut self, upstream: usize) -> Result<(), CheckoutError> {
        let began = Instant::now();
        if let Some(lease) = &self.lease {
            let (now, opens) = (began, lease.tx == TxStatus::Idle);
            lease.record.note_request(now);
            self.entry().note_request(now);
            self.tally.begin(now, opens);
            self.key.slot.note_turn();
            return Ok(());
        }
        if std::mem::take(&mut self.request.cancelled) {
            return Err(CheckoutError::Cancelled);
        }
        let Some(pool) = self.pool(upstream) else {
            return Err(CheckoutError::Gone);
        };
        let wish = Wish {
            client: self.id,
            opening: &self.opening,
            application_name: &self.application_name,
            rank: Rank::default(),
            came: began,
            granted: None,
            has_other: false,
        };
        let (mut lease, now) = match pool.take_now(wish, began) {
            Some(lease) => (lease, began),
            None => {
                self.entry().note_request(began);
                self.entry().note_waiting(Some(began));
                // Boxed, or every idle client would keep room for a wait; who waits has an allocation to pay anyway.
                let lease = Box::pin(self.wait_for_server(&pool, upstream, began)).await;
                self.entry().note_waiting(None);
                (lease?, Instant::now())
            }
        };
        lease.record.note_request(now);
        self.entry().note_request(now);
        self.entry().note_server(lease.record.id);
        self.tally.lent(now - began);
        self.tally.begin(now, true);
        // From here on a cancel goes to this server.
        self.key.slot.hold(&lease.key);
        if let Err(error) = self.fit(&mut lease).await {
            self.key.slot.release().await;
            self.entry().note_server(0);
            return Err(CheckoutError::Settings(error));
        }
        // A replica reports that it is one; the client talks to the primary, as far as it knows.
        if upstream == PRIMARY && !self.reported.merge(&mut lease.reported) {
            for (name, value) in self.reported.changes_to(&lease.reported) {
                put_parameter_status(&mut self.client.output, name, value);
            }
            self.reported = lease.reported.clone();
            self.note_name();
        }
        self.replica = upstream.checked_sub(1);
        self.lease = Some(lease);
        Ok(())
    }

    /// Waits for a server; the client may cancel that, and is told when it takes long.
    async fn wait_for_server(
        &mut self,
        pool: &Arc<Pool>,
        upstream: usize,
        began: Instant,
    ) -> Result<Checkout, CheckoutError> {
        let within = (upstream != PRIMARY).then(|| self.replica_wait());
        let wish = Wish {
            client: self.id,
            opening: &self.opening,
            application_name: &self.application_name,
            rank: self.rank(),
            came: *self.request.coming.at.get_or_insert(began),
            granted: self.request.coming.granted,
            has_other: self.request.older.is_some(),
        };
        // A notice may come at any time, but not inside a message. (protocol-flow.html#PROTOCOL-ASYNC)
        let patience = self.live.config.pool.notice_after;
        let mut notice = patience
            .filter(|_| !self.exchange.is_mid_message())
            .map(|patience| began + patience);
        // A client that does not read its notice is not waited for.
        let mut telling = false;
        let wait = self.key.slot.wait();
        let mut checkout = pin!(pool.checkout(wish, within, began, &mut self.deadline));
        loop {
            tokio::select! {
                biased;
                lease = &mut checkout => {
                    let lease = lease?;
                    if wait.hold(&lease.key) {
                        return Ok(lease);
                    }
                    if let Some(clean) = reset::prove(&lease) {
                        lease.check_in(clean, Some(self.id), Instant::now());
                    }
                    return Err(CheckoutError::Cancelled);
                }
                () = wait.cancelled() => return Err(CheckoutError::Cancelled),
                () = poll_fn(|cx| self.notice.poll_until(cx, notice.unwrap_or(began))), if notice.is_some() => {
                    still_waiting(began.elapsed(), pool.counts()).put(&mut self.client.output);
                    notice = None;
                    telling = true;
                }
                told = self.client.flush(), if telling => {
                    telling = false;
                    if let Err(error) = told {
                        debug!(%error, "client could not be told that it waits");
                    }
                }
            }
        }
    }

    /// The client may have renamed itself.
    pub(super) fn note_name(&self) {
        if let Some(name) = self.reported.find("application_name") {
            self.entry().rename(name);
        }
    }

    /// Gives a server this session's settings; what others drew from its sequences is forgotten where anybody asks.
    async fn fit(&mut self, lease: &mut Checkout) -> Result<(), ResetError> {
        if lease.hidden && lease.last_client != self.id {
            reset::forget_hidden(lease).await?;
        }
        if !Arc::ptr_eq(&lease.settings, &self.state.settings) {
            if lease.settings == self.state.settings {
                share(&mut lease.settings, &mut self.state.settings);
            } else {
                let script = lease.settings.script_to(&self.state.settings);
                // Before the request and not with it: were one of these to fail, the request must not run.
                Box::pin(reset::command(lease, &script)).await?;
                lease.settings = Arc::clone(&self.state.settings);
            }
        }
        if lease.last_client != 0 && lease.last_client != self.id {
            lease.mixed_draws = true;
            if self.shared.asks_for_draws.load(Ordering::Relaxed) {
                reset::forget_draws(lease).await?;
            }
        }
        Ok(())
    }

    /// What some statements need before they run: a database without our idle servers in it; statements prepared by
    /// message under the names that SQL calls them by.
    pub(super) async fn make_ready_for(&mut self, effects: &[Effect]) -> Result<(), SessionError> {
        if effects.iter().any(Effect::concerns_listening) {
            self.lend_subscriptions().await?;
        }
        for effect in effects {
            match effect {
                Effect::NeedsDatabaseAlone(database) => self.shared.pools.leave_database(database),
                Effect::SequenceValue => self.forget_others_draws().await?,
                Effect::PreparedStatements => self.show_statements().await?,
                Effect::Execute(name) => self.lend_statement(name.as_bytes()).await?,
                Effect::Deallocate(name) => self.lend_name(name.as_bytes()).await?,
                _ => {}
            }
        }
        Ok(())
    }

    async fn lend_statement(&mut self, name: &[u8]) -> Result<(), SessionError> {
        let (Some((text, types)), Some(lease)) = (self.prepared.text(name), self.lease.as_mut())
        else {
            return Ok(());
        };
        let lent = reset::lend_statement(lease, name, text, types).await;
        lent.map_err(server_lost)
    }

    /// To be deallocated, a name is enough: the text may be one that Postgres refuses by now.
    async fn lend_name(&mut self, name: &[u8]) -> Result<(), SessionError> {
        let (Some(_), Some(lease)) = (self.prepared.text(name), self.lease.as_mut()) else {
            return Ok(());
        };
        let lent = reset::lend_statement(lease, name, b"", &[0, 0]).await;
        lent.map_err(server_lost)
    }

    /// Who asks what is prepared is shown what this client has, under its own names, in the order it prepared them; and nothing
    /// of others'. (view-pg-prepared-statements.html)
    async fn show_statements(&mut self) -> Result<(), SessionError> {
        let Some(lease) = self
            .lease
            .as_mut()
            .filter(|lease| lease.tx != TxStatus::Failed)
        else {
            return Ok(());
        };
        reset::forget_statements(lease).await.map_err(server_lost)?;
        for name in self.prepared.names() {
            self.lend_statement(&name).await?;
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
        reset::forget_draws(lease).await.map_err(server_lost)
    }

    /// After the request: the server holds no statement under a client's own name.
    pub(super) async fn take_back_statements(&mut self) -> Result<(), SessionError> {
        let Some(lease) = self.lease.as_mut() else {
            return Ok(());
        };
        let closed = reset::take_back_statements(lease).await;
        closed.map_err(server_lost)
    }

    /// What the next client must know of the server, or must not find on it.
    pub(super) fn mark_server(&mut self, effects: &[Effect]) {
        let Some(lease) = self.lease.as_mut() else {
            return;
        };
        if effects
            .iter()
            .any(|effect| matches!(effect, Effect::TempObject | Effect::Load))
        {
            // DISCARD ALL keeps the temporary namespace and what was loaded: no other client shall find them.
            lease.unfit = true;
        }
        lease.last_client = self.id;
    }

    /// A transaction has run code that is not in its text. The client has its answer; before anybody else may have the server,
    /// it is asked what it was left with. What it alone can hold ties the client to it.
    pub(super) async fn look_behind(&mut self, code: u32) -> Result<(), SessionError> {
        let Some(lease) = self.lease.as_mut() else {
            return Ok(());
        };
        self.shared.counters.probes.inc();
        lease.hidden = true;
        self.state.hides = true;
        let settings = self.shared.habits.asks(code);
        let found = match reset::probe(lease, settings).await {
            Ok(found) => found,
            // The client has lost nothing that it knows of; nobody else shall find out.
            Err(error) => {
                debug!(pid = lease.key.pid, %error, "server would not say what it was left with");
                lease.unfit = true;
                return Ok(());
            }
        };
        // DISCARD ALL keeps the temporary namespace.
        lease.unfit |= found.temp;
        if found.setting {
            self.shared.habits.sets(code);
        }
        if found.state {
            let before = self.state.pins;
            self.state.pins.insert(PinReason::FunctionBody);
            self.shared.counters.count_pins(before, self.state.pins);
            self.entry().note_pins(self.state.pins);
        }
        self.adopt_channels(&found.channels).await
    }

    /// Carries the request on until something is for the session to decide; errors speak of the client's own statements.
    pub(super) async fn relay(&mut self) -> Result<Pause, SessionError> {
        loop {
            let Some(lease) = self.lease.as_mut() else {
                return Err(SessionError::Relay(RelayError::ServerClosed));
            };
            lease.unbooked = true;
            match relay::run(&mut self.client, lease, &mut self.exchange).await {
                Ok(Pause::Misnamed) => {
                    let body = std::mem::take(&mut self.exchange.misnamed);
                    let body = self.prepared.in_clients_words(&body);
                    put_frame(&mut self.client.output, b'E', |out| {
                        out.extend_from_slice(&body)
                    });
                }
                Ok(pause) => return Ok(pause),
                // Its last words, if any, have been passed on; a half-sent frame can only be cut off.
                Err(RelayError::Server(_) | RelayError::ServerClosed)
                    if self.exchange.said_farewell() =>
                {
                    return Err(SessionError::ServerFarewell);
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    pub(super) async fn relay_to_ready(&mut self) -> Result<TxStatus, SessionError> {
        match self.relay().await? {
            Pause::Ready(status) => Ok(status),
            Pause::ClientSpeaks => Err(SessionError::Frame(FrameError::Length)),
            Pause::Refused | Pause::Misnamed => {
                Err(SessionError::Relay(RelayError::ServerMalformed))
            }
        }
    }

    /// Gives the server back, if it is fit for others; otherwise it is closed.
    pub(super) async fn check_in(&mut self, now: Instant) {
        let Some(lease) = self.lease.take() else {
            return;
        };
        self.key.slot.release().await;
        self.entry().note_server(0);
        match reset::prove(&lease) {
            Some(clean) => lease.check_in(clean, Some(self.id), now),
            None => debug!(
                pid = lease.key.pid,
                "server closed: it has more to say than its answer"
            ),
        }
    }

    /// What the request did to the session is known, or it did nothing.
    pub(super) fn close_books(&mut self) {
        if let Some(lease) = self.lease.as_mut() {
            lease.unbooked = false;
        }
    }

    /// The client has left: what it left open is rolled back, what a pin left behind is discarded.
    pub(super) async fn give_up_server(&mut self) {
        let Some(mut lease) = self.lease.take() else {
            return;
        };
        // Mid-request there is nothing to roll back politely: dropping the lease cancels and closes.
        if lease.in_flight || lease.unbooked || !lease.stream.input.is_empty() {
            return;
        }
        let lent = self.transaction.lent.as_ref();
        let listens = self.transaction.subscribes || lent.is_some_and(|lent| !lent.is_empty());
        // A rollback does not undo all that code out of sight may have done.
        let marked = !self.state.pins.is_empty() || listens || self.state.ran_opaque();
        lease.heard = None;
        let clean = async {
            if marked {
                reset::discard(&mut lease).await
            } else {
                reset::roll_back(&mut lease).await
            }
        };
        if matches!(timeout(PARTING_MAX, clean).await, Ok(Ok(()))) {
            self.key.slot.release().await;
            if let Some(proof) = reset::prove(&lease) {
                lease.check_in(proof, None, Instant::now());
            }
        }
    }

    /// `None`: there is no such upstream any more.
    pub(super) fn pool(&mut self, upstream: usize) -> Option<Arc<Pool>> {
        let id = self.live.upstreams.get(upstream)?.id;
        if self.pools.len() <= upstream {
            self.pools.resize_with(upstream + 1, || None);
        }
        let (shared, opening) = (&self.shared, &self.opening);
        let slot = self.pools.get_mut(upstream)?;
        let member = slot.get_or_insert_with(|| shared.pools.pool(opening, id).join(opening));
        Some(Arc::clone(member.pool()))
    }

    pub(super) fn tx(&self) -> TxStatus {
        self.lease.as_ref().map_or(TxStatus::Idle, |lease| lease.tx)
    }
}
