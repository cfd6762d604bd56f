//! Between requests: what a session waits for, and what it does meanwhile. Owns the client's input up to a request's first
//! message: reads it, groups it, skips what counts for nothing. Never decides where a request goes. Called by the loop in
//! `mod.rs`.

use std::future::poll_fn;
use std::io;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::{Session, whole_length};
use crate::classify::RunRef;
use crate::client::error::SessionError;
use crate::client::live::{Running, Standing};
use crate::client::request::{BatchEnd, Grouping, Unit};
use crate::events::{Delivery, Subscriber};
use crate::pool::checkout::Checkout;
use crate::pool::reset;
use crate::relay::RelayError;
use crate::wire::error_response::field;
use crate::wire::frame;
use crate::wire::messages::{TxStatus, put_ready};
use crate::wire::stream::Stream;

/// How long messages of the extended protocol wait for more of their request before they go on without it.
const UNSYNCED_WAIT: Duration = Duration::from_millis(10);
/// Between requests: notifications leave in pieces of this size, and no frame of the server's own may be longer.
const ASIDE_MAX: usize = 1024 * 1024;

impl Session {
    /// The next unit at the front of the client's input. While waiting: notifications go out, a held server's words are
    /// passed on, a shutdown ends the session between transactions.
    pub(super) async fn next_unit(&mut self) -> Result<Unit, SessionError> {
        loop {
            // Asked before each look at what the client said: what came with it may have been told first.
            if self.standing.has_changed().unwrap_or(false) {
                self.adopt_standing();
            }
            let needed = match self.grouping.next(self.client.input.bytes())? {
                Unit::Incomplete { needed } => needed,
                unit => return Ok(unit),
            };
            if self.tx() == TxStatus::Idle && self.running >= Running::Draining {
                return Err(SessionError::Shutdown);
            }
            // Whole messages without a Sync or Flush: an error in them is due at once, so they do not wait for ever.
            let gathered = self.grouping.gathered();
            let wait = Waiting {
                client: &mut self.client,
                lease: self.lease.as_mut(),
                subscriber: self.subscriber.as_ref(),
                standing: &self.standing,
                needed,
            };
            let woken = if gathered == 0 {
                wait.woken().await?
            } else if let Ok(woken) = timeout(UNSYNCED_WAIT, wait.woken()).await {
                woken?
            } else {
                self.grouping = Grouping::default();
                return Ok(Unit::Batch {
                    len: gathered,
                    end: BatchEnd::Flush,
                });
            };
            match woken {
                Woken::Client(0) => return Err(client_gone()),
                Woken::Client(_) => {}
                Woken::Told => {}
                Woken::Delivery(delivery) => self.deliver(delivery).await?,
                Woken::Server(count) => self.hear_server(count).await?,
            }
        }
    }

    /// Writes notifications, all that are there, in one go.
    async fn deliver(&mut self, first: Delivery) -> Result<(), SessionError> {
        self.put_deliveries(Some(first)).await?;
        Ok(self.client.flush().await?)
    }

    /// The same, for whoever has more to say.
    pub(super) async fn put_deliveries(
        &mut self,
        first: Option<Delivery>,
    ) -> Result<(), SessionError> {
        if first.is_none() {
            return Ok(());
        }
        let mut next = first;
        while let Some(delivery) = next {
            match delivery {
                Delivery::Frame(frame) => {
                    self.client.output.extend_from_slice(&frame);
                    self.shared.counters.notifications.inc();
                }
                // A session takes frames.
                Delivery::Event(_) => {}
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
        Ok(())
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
            let body = frame::body(bytes, header).unwrap_or_default();
            if header.tag == b'S' {
                reset::note_parameter(&mut server.reported, body);
            }
            // Notifications come from the hub.
            if header.tag != b'A' {
                self.client.output.extend_from_slice(bytes);
            }
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
    pub(super) async fn skip(&mut self, mut count: usize) -> Result<(), SessionError> {
        loop {
            let here = self.client.input.len().min(count);
            self.client.input.consume(here);
            count -= here;
            if count == 0 {
                return Ok(());
            }
            if self.client.fill(1).await? == 0 {
                return Err(client_gone());
            }
        }
    }

    /// After an error nothing counts but the Sync.
    pub(super) async fn skip_unit(&mut self, unit: Unit) -> Result<(), SessionError> {
        match unit {
            Unit::Query(header) | Unit::FunctionCall(header) | Unit::Stray(header) => {
                self.skip(header.whole).await
            }
            Unit::Batch { len, end } => {
                self.skip(whole_length(len, end)).await?;
                if end != BatchEnd::Sync {
                    return Ok(());
                }
                self.skip_to_sync = false;
                let tx = self.tx();
                put_ready(&mut self.client.output, tx);
                Ok(self.client.flush().await?)
            }
            Unit::Terminate | Unit::Incomplete { .. } => Ok(()),
        }
    }
}

fn client_gone() -> SessionError {
    SessionError::ClientGone(io::ErrorKind::UnexpectedEof.into())
}

/// What a waiting session is waiting for.
struct Waiting<'a> {
    client: &'a mut Stream,
    lease: Option<&'a mut Checkout>,
    subscriber: Option<&'a Subscriber>,
    /// `Outside` wakes the session when it changes.
    standing: &'a watch::Receiver<Standing>,
    needed: usize,
}

enum Woken {
    /// Bytes came from the client; 0: it is gone.
    Client(usize),
    Server(usize),
    Delivery(Delivery),
    /// All clients were told something: a shutdown, another configuration.
    Told,
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
        match self.standing.has_changed() {
            Ok(false) => Poll::Pending,
            Ok(true) => Poll::Ready(Ok(Woken::Told)),
            Err(_gone) => Poll::Ready(Err(SessionError::Shutdown)),
        }
    }
}
