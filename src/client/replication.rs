//! Replication connections (`pg_basebackup`, `pg_receivewal`, logical decoding): each client has a server of its own, outside the
//! pools, and bytes pass both ways as they come until either side closes. Never looks into a message; follows where frames
//! begin, so that a shutdown can be told between two of them. Called by `startup.rs`. (protocol-replication.html)
//!
//! Memory stays flat: a side is read again only when what was read has been sent on, so a slow receiver holds its sender back
//! through Postgres' own socket, as it would directly.

use std::future::poll_fn;
use std::io;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::error::{SessionError, login_refused};
use super::live::{Running, Standing};
use crate::cancel::CancelKey;
use crate::config::{self, ConnectUrl};
use crate::metrics::{Counter, Gauge, Registry};
use crate::pool::checkout::CheckoutError;
use crate::relay::RelayError;
use crate::server::auth::Credentials;
use crate::server::conn::ServerConn;
use crate::server::connect::Connector;
use crate::server::parameters::Opening;
use crate::wire::error_response::ErrorResponse;
use crate::wire::frame::Follower;
use crate::wire::stream::Stream;

/// Opens servers for replication, `replication.max_connections` at once.
pub(crate) struct Replications {
    connector: Connector,
    /// Who is trusted here as the control role logs in as it there.
    control_role: (String, Credentials),
    connect_timeout: Duration,
    places: Arc<Semaphore>,
    most: usize,
    counters: Counters,
}

#[derive(Clone)]
struct Counters {
    open: Arc<Gauge>,
    opened: Arc<Counter>,
    refused: Arc<Counter>,
    from_clients: Arc<Counter>,
    from_servers: Arc<Counter>,
}

impl Replications {
    pub(crate) fn new(
        primary: &ConnectUrl,
        settings: &config::Replication,
        connect_timeout: Duration,
        registry: &Registry,
    ) -> io::Result<Self> {
        let bytes = |from| {
            let help = "bytes passed on over replication connections, by whose they were";
            registry.counter("flowgate_replication_bytes_total", help, &[("from", from)])
        };
        Ok(Self {
            connector: Connector::new(primary, Arc::default())?,
            control_role: (primary.user.clone(), Credentials::of_control_role(primary)),
            connect_timeout,
            places: Arc::new(Semaphore::new(settings.max_connections)),
            most: settings.max_connections,
            counters: Counters {
                open: registry.gauge(
                    "flowgate_replication_connections",
                    "replication connections open",
                    &[],
                ),
                opened: registry.counter(
                    "flowgate_replication_opened_total",
                    "replication connections opened",
                    &[],
                ),
                refused: registry.counter(
                    "flowgate_replication_refused_total",
                    "replication connections refused because replication.max_connections were open",
                    &[],
                ),
                from_clients: bytes("client"),
                from_servers: bytes("server"),
            },
        })
    }

    /// A server in replication mode for one client: `opening` carries the `replication` parameter.
    pub(super) async fn open(
        &self,
        opening: &Arc<Opening>,
        application_name: &str,
        credentials: &Credentials,
    ) -> Result<(Box<ServerConn>, Place), SessionError> {
        let Ok(permit) = Arc::clone(&self.places).try_acquire_owned() else {
            self.counters.refused.inc();
            let message = format!(
                "number of replication connections exceeds replication.max_connections (currently {})",
                self.most
            );
            return Err(SessionError::Refused(Box::new(ErrorResponse::fatal(
                "53300", message,
            ))));
        };
        let (control_role, password) = &self.control_role;
        let credentials = match credentials {
            Credentials::None if *control_role == opening.user => password,
            _ => credentials,
        };
        let connect =
            self.connector
                .connect(opening, application_name, credentials, self.connect_timeout);
        let server = Box::pin(connect)
            .await
            .map_err(|error| login_refused(CheckoutError::Connect(error)))?;
        self.counters.opened.inc();
        self.counters.open.add(1);
        let place = Place {
            _permit: permit,
            counters: self.counters.clone(),
        };
        Ok((Box::new(server), place))
    }
}

/// One of the places; dropping it frees it.
pub(super) struct Place {
    _permit: OwnedSemaphorePermit,
    counters: Counters,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.counters.open.sub(1);
    }
}

/// A client and its server, logged in and told so.
pub(super) struct ReplicationSession {
    pub(super) client: Stream,
    server: Stream,
    key: CancelKey,
    place: Place,
    /// What the client gets, and where it stands.
    follower: Follower,
    phase: Phase,
    upward: Upward,
    leave: Leave,
}

/// What the server is about.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// It has said ReadyForQuery.
    Idle,
    /// A command is under way.
    Busy,
    /// CopyBoth: WAL without end.
    Streaming,
}

/// The way from the client to the server.
enum Upward {
    Open,
    /// The client has said its last byte; the server is to know.
    Closing,
    Closed,
}

/// Whether the client is to be told to go.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Leave {
    No,
    /// A shutdown has begun: not in the middle of a command, such as a base backup. A stream of WAL has no end to wait for.
    AtRest,
    /// Time is up: between any two frames.
    Now,
}

impl ReplicationSession {
    pub(super) fn new(client: Stream, server: ServerConn, key: CancelKey, place: Place) -> Self {
        key.slot.hold(&server.key);
        Self {
            client,
            server: server.stream,
            key,
            place,
            follower: Follower::default(),
            phase: Phase::Idle,
            upward: Upward::Open,
            leave: Leave::No,
        }
    }

    /// Passes bytes until either side closes, or a shutdown ends it.
    pub(super) async fn run(
        &mut self,
        mut standing: watch::Receiver<Standing>,
    ) -> Result<(), SessionError> {
        loop {
            self.leave = match standing.borrow_and_update().running {
                Running::Serving | Running::Leaving => Leave::No,
                Running::Draining => Leave::AtRest,
                Running::Stopping => Leave::Now,
            };
            tokio::select! {
                biased;
                ended = poll_fn(|cx| self.poll_pass(cx)) => return ended,
                changed = standing.changed() => if changed.is_err() {
                    return Err(SessionError::Shutdown);
                },
            }
        }
    }

    /// A farewell would be part of a message.
    pub(super) fn is_mid_message(&self) -> bool {
        !self.follower.is_between()
    }

    /// Closes both; no cancel can reach whatever gets this server's pid next.
    pub(super) async fn part(mut self) {
        self.key.slot.release().await;
        self.client.close().await;
    }

    fn poll_pass(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        // Whatever is wrong with this way shows on the other one: a server that is gone may have left its reason there.
        let _waits = self.poll_upward(cx);
        self.poll_downward(cx)
    }

    fn poll_upward(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            match self.upward {
                Upward::Open if self.client.input.is_empty() => {
                    if ready!(self.server.poll_flush(cx)).is_err() {
                        self.upward = Upward::Closed;
                    } else if !matches!(ready!(self.client.poll_fill(cx, 1)), Ok(1..)) {
                        self.upward = Upward::Closing;
                    }
                }
                Upward::Open => {
                    let bytes = self.client.input.bytes();
                    match ready!(self.server.poll_send(cx, bytes)) {
                        Ok(count) => {
                            self.client.input.consume(count);
                            // A command; streamed data and status messages begin none.
                            if self.phase == Phase::Idle {
                                self.phase = Phase::Busy;
                            }
                            self.place.counters.from_clients.add(count as u64);
                        }
                        Err(_gone) => self.upward = Upward::Closed,
                    }
                }
                Upward::Closing => {
                    // The server answers what it has been asked, and then closes.
                    let _closed = ready!(self.server.poll_close(cx));
                    self.upward = Upward::Closed;
                }
                Upward::Closed => return Poll::Ready(()),
            }
        }
    }

    fn poll_downward(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), SessionError>> {
        loop {
            let rests = match self.leave {
                Leave::No => false,
                Leave::AtRest => self.phase != Phase::Busy,
                Leave::Now => true,
            };
            if rests && self.follower.is_between() {
                return Poll::Ready(Err(SessionError::Shutdown));
            }
            if self.server.input.is_empty() {
                ready!(self.client.poll_flush(cx)).map_err(SessionError::ClientGone)?;
                match ready!(self.server.poll_fill(cx, 1)) {
                    Ok(1..) => {}
                    // Postgres has said what it had to say.
                    Ok(0) | Err(_) => return Poll::Ready(Ok(())),
                }
            }
            let bytes = self.server.input.bytes();
            let count =
                ready!(self.client.poll_send(cx, bytes)).map_err(SessionError::ClientGone)?;
            let phase = &mut self.phase;
            let passed = bytes.get(..count).unwrap_or_default();
            if !self.follower.pass(passed, |tag| *phase = phase.after(tag)) {
                return Poll::Ready(Err(RelayError::ServerMalformed.into()));
            }
            self.server.input.consume(count);
            self.place.counters.from_servers.add(count as u64);
        }
    }
}

impl Phase {
    /// A message of this kind came from the server.
    fn after(self, tag: u8) -> Self {
        match tag {
            b'Z' => Self::Idle,
            b'W' => Self::Streaming,
            // These may come at any time.
            b'N' | b'S' | b'A' => self,
            b'd' if self == Self::Streaming => self,
            _ => Self::Busy,
        }
    }
}
