//! From an accepted socket to a session: PROXY header → SSLRequest, GSSENCRequest, CancelRequest or StartupMessage → TLS → access
//! rules → authentication → the first ReadyForQuery. Each step happens once and hands over to the next; errors are told to the client here.
//! (protocol-flow.html#PROTOCOL-FLOW-START-UP)

use std::future::ready;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;

use tokio::net::TcpStream;
use tokio::time::{Duration, Instant, timeout};
use tracing::{debug, info};

use super::access::{self, Verdict, Visitor};
use super::auth;
use super::console;
use super::console::Admitted;
use super::entrance::Entrance;
use super::error::{SessionError, login_refused};
use super::live::{ConsoleRole, Running};
use super::proxy::{self, ProxyError};
use super::replication::{Place, ReplicationSession};
use super::roster::{Kind, Listed, Newcomer};
use super::session::{LoggedIn, Session};
use super::shared::{Seats, Shared};
use crate::cancel::CancelKey;
use crate::config::{ClientTls, PoolMode};
use crate::pool::checkout::{Rank, Welcome, Wish};
use crate::server::auth::Credentials;
use crate::server::conn::ServerConn;
use crate::server::parameters::{Opening, Reported};
use crate::wire::error_response::ErrorResponse;
use crate::wire::messages::{
    TxStatus, put_authentication, put_backend_key, put_frame, put_negotiate, put_parameter_status,
    put_ready,
};
use crate::wire::startup::{
    self, PROTOCOL_MINOR_MAX, Packet, ReplicationMode, Startup, StartupError,
};
use crate::wire::stream::{Stream, Transport};

/// The database that is the admin console.
const CONSOLE: &str = "flowgate";
/// A TLS ClientHello's first byte: direct TLS, without an SSLRequest.
const TLS_HANDSHAKE: u8 = 0x16;
/// How long a login under way may go on once a shutdown has begun.
const DOORSTEP_MAX: Duration = Duration::from_secs(1);
/// A client that gets its farewell has this long to take it.
const FAREWELL_MAX: Duration = Duration::from_secs(2);
const SECRET_LEN: usize = 4;
/// From protocol 3.2 on cancel keys may be longer. (protocol-message-formats.html, BackendKeyData)
const SECRET_LEN_3_2: usize = 32;

/// A client's whole life. Each part of it is a future in a box of its own, so that a client between requests holds nothing of
/// what its login needed, nor of what others come for.
pub(super) async fn run(tcp: TcpStream, peer: SocketAddr, shared: Arc<Shared>) {
    let seat = Seats::take(&shared);
    let Some((peer, arrival)) = Box::pin(come_in(tcp, peer, &shared, seat.is_some())).await else {
        return;
    };
    stay(arrival, peer, &shared).await;
}

/// To the end of the login. `None`: nobody is there any more.
async fn come_in(
    tcp: TcpStream,
    peer: SocketAddr,
    shared: &Arc<Shared>,
    seated: bool,
) -> Option<(SocketAddr, Result<Arrival, Refusal>)> {
    let live = shared.live();
    let within = live.config.listen.login_timeout;
    let mut caller = Caller {
        address: peer,
        entrance: Arc::clone(&live.entrance),
        end_point: None,
    };
    drop(live);
    let arrive = Box::pin(arrive(tcp, &mut caller, shared, seated));
    let arrival = tokio::select! {
        biased;
        arrival = timeout(within, arrive) => arrival,
        // Nobody who is still on the doorstep is worth waiting for.
        () = turned_away(shared) => return None,
    };
    // Whom the balancer before us has named, if there is one.
    let peer = caller.address;
    let Ok(arrival) = arrival else {
        shared.counters.logins_failed.inc();
        debug!(%peer, "client did not log in in time");
        return None;
    };
    Some((peer, arrival))
}

type Stay<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

fn stay(arrival: Result<Arrival, Refusal>, peer: SocketAddr, shared: &Shared) -> Stay<'_> {
    match arrival {
        // Most of what there is of an idle client: a block, since a function would keep its arguments twice.
        Ok(Arrival::Session(mut session)) => Box::pin(async move {
            if let Err(error) = session.run().await {
                note(peer, &error, shared);
                if !session.is_mid_message() {
                    farewell(&mut session.client, &error).await;
                }
            }
            session.part().await;
        }),
        Ok(Arrival::Replication(session, listed)) => {
            Box::pin(replicate(session, listed, peer, shared))
        }
        Ok(Arrival::Console(client, admitted)) => Box::pin(console(client, admitted, peer, shared)),
        Ok(Arrival::Nothing) => Box::pin(ready(())),
        Err(refusal) => Box::pin(refuse(refusal, peer, shared)),
    }
}

async fn replicate(
    mut session: Box<ReplicationSession>,
    listed: Listed,
    peer: SocketAddr,
    shared: &Shared,
) {
    let ended = tokio::select! {
        biased;
        ended = Box::pin(session.run(shared.standing.clone())) => ended,
        () = listed.entry().killed() => Err(SessionError::Killed),
    };
    if let Err(error) = ended {
        note(peer, &error, shared);
        if !session.is_mid_message() {
            farewell(&mut session.client, &error).await;
        }
    }
    if timeout(FAREWELL_MAX, session.part()).await.is_err() {
        debug!(%peer, "client of a replication connection did not take all there was");
    }
}

async fn console(mut client: Stream, admitted: Box<Admitted>, peer: SocketAddr, shared: &Shared) {
    let ended = tokio::select! {
        biased;
        ended = Box::pin(console::serve(&mut client, shared, &admitted)) => ended,
        () = alone(shared) => Err(SessionError::Shutdown),
    };
    if let Err(error) = ended {
        debug!(%peer, %error, "console client left");
        farewell(&mut client, &error).await;
    }
}

async fn refuse(refusal: Refusal, peer: SocketAddr, shared: &Shared) {
    let Refusal { client, error } = refusal;
    shared.counters.logins_failed.inc();
    note(peer, &error, shared);
    if let Some(mut client) = client {
        farewell(&mut client, &error).await;
    }
}

async fn until(shared: &Shared, reached: Running) {
    let mut standing = shared.standing.clone();
    // An error means that the sender is gone, and the process with it.
    drop(
        standing
            .wait_for(|standing| standing.running >= reached)
            .await,
    );
}

/// A shutdown waits no longer for somebody on the doorstep.
async fn turned_away(shared: &Shared) {
    until(shared, Running::Draining).await;
    tokio::time::sleep(DOORSTEP_MAX).await;
}

/// A shutdown waits for nobody but the console.
async fn alone(shared: &Shared) {
    until(shared, Running::Leaving).await;
    tokio::select! {
        () = until(shared, Running::Draining) => {}
        () = shared.roster.only_console() => {}
    }
}

/// Who is on the doorstep, as far as is known.
struct Caller {
    address: SocketAddr,
    entrance: Arc<Entrance>,
    /// Encrypted: what a login may be bound to.
    end_point: Option<Arc<[u8]>>,
}

enum Arrival {
    Session(Box<Session>),
    Replication(Box<ReplicationSession>, Listed),
    Console(Stream, Box<Admitted>),
    /// A cancel request, or somebody who just looked in.
    Nothing,
}

/// Why there will be no session, and the stream to say it on.
struct Refusal {
    client: Option<Stream>,
    error: SessionError,
}

async fn arrive(
    tcp: TcpStream,
    caller: &mut Caller,
    shared: &Arc<Shared>,
    seated: bool,
) -> Result<Arrival, Refusal> {
    let mut client = match greet(tcp, caller).await {
        Ok(client) => client,
        Err(error) => {
            return Err(Refusal {
                client: None,
                error,
            });
        }
    };
    match introduce(&mut client, caller, shared, seated).await {
        Ok(Introduced::Nothing) => Ok(Arrival::Nothing),
        Ok(Introduced::Console(admitted)) => Ok(Arrival::Console(client, admitted)),
        Ok(Introduced::Replication(server)) => {
            let Replicating {
                server,
                key,
                place,
                mode,
                opening,
                application_name,
            } = *server;
            let listed = shared.roster.enter(Newcomer {
                id: shared.clients.next(),
                kind: Kind::Replication(mode),
                peer: caller.address,
                opening: &opening,
                application_name: &application_name,
                slot: &key.slot,
                client: &client,
            });
            let session = ReplicationSession::new(client, server, key, place);
            Ok(Arrival::Replication(Box::new(session), listed))
        }
        Ok(Introduced::User(login)) => {
            let login = LoggedIn {
                id: login.id,
                peer: caller.address,
                client,
                opening: login.welcome.opening,
                application_name: login.application_name,
                key: login.key,
                reported: login.welcome.reported,
                settings: login.welcome.settings,
                session_mode: shared.live().config.pool.mode == PoolMode::Session,
            };
            Ok(Arrival::Session(Box::new(Session::new(
                login,
                Arc::clone(shared),
            ))))
        }
        Err(error) => Err(Refusal {
            client: Some(client),
            error,
        }),
    }
}

/// Past a PROXY header: direct TLS, or a stream on which the first packet is still to come.
async fn greet(mut tcp: TcpStream, caller: &mut Caller) -> Result<Stream, SessionError> {
    if let Some(trusted) = &caller.entrance.balancers {
        caller.address = proxy::client_behind(&mut tcp, caller.address, trusted).await?;
    }
    let mut first = [0];
    if tcp.peek(&mut first).await? == 1 && first[0] == TLS_HANDSHAKE {
        let stream = encrypt(tcp, caller).await?;
        let Transport::TlsServer(tls) = stream.transport() else {
            return Ok(stream);
        };
        // Without ALPN a confused protocol could get this far. (protocol-flow.html#PROTOCOL-FLOW-SSL)
        if tls.get_ref().1.alpn_protocol() != Some(b"postgresql") {
            return Err(SessionError::Tls(io::Error::other(
                "direct TLS without ALPN protocol \"postgresql\"",
            )));
        }
        return Ok(stream);
    }
    Ok(Stream::new(Transport::Plain(tcp)))
}

async fn encrypt(tcp: TcpStream, caller: &mut Caller) -> Result<Stream, SessionError> {
    let Some(certificate) = &caller.entrance.certificate else {
        return Err(SessionError::Tls(io::Error::other("TLS is not configured")));
    };
    let tls = certificate.accept(tcp).await.map_err(SessionError::Tls)?;
    caller.end_point.clone_from(&certificate.end_point);
    Ok(Stream::new(Transport::TlsServer(Box::new(tls))))
}

enum Introduced {
    Nothing,
    Console(Box<Admitted>),
    Replication(Box<Replicating>),
    User(Box<User>),
}

struct Replicating {
    server: ServerConn,
    key: CancelKey,
    place: Place,
    mode: ReplicationMode,
    opening: Arc<Opening>,
    application_name: String,
}

struct User {
    id: u64,
    welcome: Welcome,
    application_name: String,
    key: CancelKey,
}

async fn introduce(
    client: &mut Stream,
    caller: &mut Caller,
    shared: &Arc<Shared>,
    seated: bool,
) -> Result<Introduced, SessionError> {
    let startup = loop {
        let Some(packet) = next_packet(client).await? else {
            return Ok(Introduced::Nothing);
        };
        match packet {
            Packet::SslRequest => answer_ssl(client, caller).await?,
            Packet::GssEncRequest => answer(client, b"N").await?,
            Packet::Cancel {
                pid,
                secret,
                forwarded,
            } => {
                shared.counters.cancels.inc();
                // An unknown key is ignored, as Postgres does, unless others may know it.
                if !shared.cancels.cancel(pid, &secret).await && !forwarded {
                    shared.peers.forward(pid, &secret).await;
                }
                return Ok(Introduced::Nothing);
            }
            Packet::Startup(startup) => break startup,
        }
    };
    if !seated {
        shared.counters.refused_full.inc();
        return Err(refused("53300", "sorry, too many clients already"));
    }
    if shared.standing.borrow().running >= Running::Draining {
        return Err(refused("57P03", "the database system is shutting down"));
    }
    let live = shared.live();
    let encrypted = !matches!(client.transport(), Transport::Plain(_));
    if caller.entrance.tls == ClientTls::Require && !encrypted {
        return Err(refused("28000", "connection requires TLS"));
    }
    negotiate(client, &startup);
    let login = Login::read(&startup)?;
    let credentials = authenticate(client, caller, shared, &login).await?;
    let secret_len = if startup.minor >= 2 {
        SECRET_LEN_3_2
    } else {
        SECRET_LEN
    };
    if login.opening.database != CONSOLE {
        admit(shared, &login)?;
    }
    if let Some(mode) = login.replication {
        let opened =
            shared
                .replications
                .open(&login.opening, &login.application_name, &credentials);
        let (server, place) = opened.await?;
        let key = shared.cancels.issue(server.key.pid, secret_len)?;
        put_welcome(client, &server.reported, &key);
        client.flush().await?;
        shared.counters.logins.inc();
        return Ok(Introduced::Replication(Box::new(Replicating {
            server: *server,
            key,
            place,
            mode,
            opening: login.opening,
            application_name: login.application_name,
        })));
    }
    if login.opening.database == CONSOLE {
        let Some(role) = ConsoleRole::of(&login.opening.user, &live.config) else {
            return Err(SessionError::Refused(Box::new(console::refusal())));
        };
        let id = shared.clients.next();
        let key = shared.cancels.issue(console::pid(id), SECRET_LEN)?;
        put_authentication(&mut client.output, 0, &[]);
        console::put_greeting(&mut client.output, &key);
        client.flush().await?;
        let name = &login.application_name;
        let admitted = Admitted::new(role, id, caller.address, key, &login.opening, name);
        return Ok(Introduced::Console(Box::new(admitted)));
    }
    drop(live);
    shared.pools.share_credentials(&login.opening, &credentials);
    let pool = shared.pools.pool(&login.opening, 0);
    let id = shared.clients.next();
    let wish = Wish {
        client: id,
        opening: &login.opening,
        application_name: &login.application_name,
        rank: Rank::default(),
        came: Instant::now(),
        granted: None,
        has_other: false,
    };
    let welcome = pool.log_in(wish).await;
    drop(pool);
    let welcome = match welcome {
        Ok(welcome) => welcome,
        Err(error) => {
            shared.pools.forget_unused(&login.opening);
            return Err(login_refused(error));
        }
    };
    let key = shared.cancels.issue(welcome.pid, secret_len)?;
    put_welcome(client, &welcome.reported, &key);
    client.flush().await?;
    shared.counters.logins.inc();
    Ok(Introduced::User(Box::new(User {
        id,
        welcome,
        application_name: login.application_name,
        key,
    })))
}

/// Appends the end of a login, from AuthenticationOk to the first ReadyForQuery.
fn put_welcome(client: &mut Stream, reported: &Reported, key: &CancelKey) {
    put_authentication(&mut client.output, 0, &[]);
    for (name, value) in reported.iter() {
        put_parameter_status(&mut client.output, name, value);
    }
    put_backend_key(&mut client.output, key.pid, &key.secret);
    put_ready(&mut client.output, TxStatus::Idle);
}

/// Whether this caller may come in as that user, proven as the access rules demand; and what logs in to Postgres then.
async fn authenticate(
    client: &mut Stream,
    caller: &Caller,
    shared: &Shared,
    login: &Login,
) -> Result<Credentials, SessionError> {
    let live = shared.live();
    let user = &login.opening.user;
    let visitor = Visitor {
        address: caller.address.ip(),
        user,
        database: &login.opening.database,
        replication: login.replication,
        encrypted: !matches!(client.transport(), Transport::Plain(_)),
    };
    let refusal = match caller.entrance.judge(&visitor) {
        Verdict::Trust => return Ok(Credentials::None),
        Verdict::Scram => {
            let end_point = caller.end_point.as_deref();
            return auth::scram(client, &live.verifiers, user, end_point).await;
        }
        Verdict::Cert(name) => return auth::certificate(client, &live.verifiers, name, user),
        Verdict::Rejected => access::rejected(&visitor),
        Verdict::NoRule => access::no_rule(&visitor),
    };
    shared.counters.access_refused.inc();
    Err(SessionError::Refused(Box::new(refusal)))
}

/// A database that an admin has disabled takes no new clients.
fn admit(shared: &Shared, login: &Login) -> Result<(), SessionError> {
    let database = &login.opening.database;
    if login.replication == Some(ReplicationMode::Physical) || !shared.pools.is_disabled(database) {
        return Ok(());
    }
    let message = format!("database \"{database}\" is not currently accepting connections");
    Err(refused("55000", &message))
}

/// What a StartupMessage asks for.
struct Login {
    opening: Arc<Opening>,
    application_name: String,
    replication: Option<ReplicationMode>,
}

impl Login {
    fn read(startup: &Startup) -> Result<Self, SessionError> {
        let user = startup
            .parameter("user")
            .filter(|user| !user.is_empty())
            .ok_or(StartupError::NoUser)?;
        let database = startup
            .parameter("database")
            .filter(|database| !database.is_empty())
            .unwrap_or(user);
        let application_name = startup.parameter("application_name").unwrap_or_default();
        let replication = startup
            .parameter("replication")
            .map_or(Ok(None), startup::replication)?;
        let ours = |name: &str| {
            matches!(
                name,
                "user" | "database" | "application_name" | "replication"
            ) || name.starts_with("_pq_.")
        };
        let mut options: Vec<_> = startup
            .parameters
            .iter()
            .filter(|(name, _)| !ours(name))
            .cloned()
            .collect();
        if let Some(mode) = replication {
            let word = match mode {
                ReplicationMode::Physical => "true",
                ReplicationMode::Logical => "database",
            };
            options.push(("replication".to_owned(), word.to_owned()));
        }
        options.sort();
        let opening = Opening {
            user: user.to_owned(),
            database: database.to_owned(),
            options,
        };
        Ok(Self {
            opening: Arc::new(opening),
            application_name: application_name.to_owned(),
            replication,
        })
    }
}

/// Tells a client that asks for more than we speak what we do speak.
fn negotiate(client: &mut Stream, startup: &Startup) {
    let unknown: Vec<_> = startup
        .parameters
        .iter()
        .map(|(name, _)| name.as_str())
        .filter(|n| n.starts_with("_pq_."))
        .collect();
    if startup.minor > PROTOCOL_MINOR_MAX || !unknown.is_empty() {
        put_negotiate(
            &mut client.output,
            startup.minor.min(PROTOCOL_MINOR_MAX),
            &unknown,
        );
    }
}

/// `None`: whoever knocked has left again.
async fn next_packet(client: &mut Stream) -> Result<Option<Packet>, SessionError> {
    // A driver that is told to leave before it has begun says so (node-postgres does), and Postgres answers nothing.
    const TERMINATE: &[u8] = b"X\0\0\0\x04";
    loop {
        let bytes = client.input.bytes();
        if bytes.starts_with(TERMINATE) {
            return Ok(None);
        }
        let length = match startup::packet_len(bytes) {
            Err(_) if TERMINATE.starts_with(bytes) => None,
            length => length?,
        };
        if let Some(packet) = length.and_then(|length| bytes.get(..length)) {
            let packet = startup::read(packet);
            client.input.consume(length.unwrap_or_default());
            return Ok(Some(packet?));
        }
        if client.fill(length.unwrap_or(TERMINATE.len())).await? == 0 {
            // A port scan or a health check; nobody to answer.
            return Ok(None);
        }
    }
}

async fn answer_ssl(client: &mut Stream, caller: &mut Caller) -> Result<(), SessionError> {
    let plain = matches!(client.transport(), Transport::Plain(_));
    if caller.entrance.certificate.is_none() || !plain {
        return answer(client, b"N").await;
    }
    // What came before the handshake came unencrypted, from whomever. (CVE-2021-23214)
    if !client.input.is_empty() {
        return Err(SessionError::Protocol(
            "received unencrypted data after SSL request",
        ));
    }
    answer(client, b"S").await?;
    let placeholder = Stream::new(Transport::Gone);
    if let Transport::Plain(tcp) = std::mem::replace(client, placeholder).into_transport() {
        *client = encrypt(tcp, caller).await?;
    }
    Ok(())
}

async fn answer(client: &mut Stream, byte: &[u8]) -> Result<(), SessionError> {
    client.output.extend_from_slice(byte);
    Ok(client.flush().await?)
}

fn refused(code: &'static str, message: &str) -> SessionError {
    SessionError::Refused(Box::new(ErrorResponse::fatal(code, message)))
}

fn note(peer: SocketAddr, error: &SessionError, shared: &Shared) {
    if matches!(
        error,
        SessionError::Frame(_) | SessionError::Startup(_) | SessionError::Protocol(_)
    ) {
        shared.counters.protocol_errors.inc();
    }
    match error {
        SessionError::Proxy(ProxyError::Untrusted) => shared.counters.proxy_untrusted.inc(),
        SessionError::Proxy(ProxyError::Malformed(_)) => shared.counters.proxy_malformed.inc(),
        _ => {}
    }
    match error {
        SessionError::RefusedByServer(_) => debug!(%peer, %error, "login refused"),
        _ if error.is_routine() => debug!(%peer, %error, "client's connection ended"),
        _ => info!(%peer, %error, "client's connection ended"),
    }
}

async fn farewell(client: &mut Stream, error: &SessionError) {
    match (error, error.farewell()) {
        (SessionError::RefusedByServer(body), _) => {
            put_frame(&mut client.output, b'E', |out| out.extend_from_slice(body))
        }
        (_, Some(response)) => response.put(&mut client.output),
        (_, None) => return,
    }
    if !matches!(timeout(FAREWELL_MAX, client.flush()).await, Ok(Ok(()))) {
        debug!("client did not take its farewell");
        return;
    }
    client.close().await;
}
