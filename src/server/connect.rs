//! Opening a server connection: dial, TLS as `sslmode` says, StartupMessage, login, up to the first ReadyForQuery.
//! Retries nothing; `pool` decides. An ErrorResponse from Postgres is data, handed on as it came.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use thiserror::Error;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout};

use super::auth::{self, AuthError, Credentials, Login, Step};
use super::conn::{ServerConn, ServerKey, ServerRecord, Statements};
use super::parameters::{Opening, Reported};
use super::settings::Settings;
use super::tls;
use crate::config::{ChannelBinding, ConnectUrl, SslMode, SslNegotiation};
use crate::wire::messages::{TxStatus, parameter_status, put_cstr};
use crate::wire::stream::{Stream, Transport};

#[derive(Debug, Error)]
pub(crate) enum ConnectError {
    #[error("cannot reach it: {0}")]
    Unreachable(#[source] io::Error),
    #[error("no answer within {0:?}")]
    TimedOut(Duration),
    #[error("TLS: {0}")]
    Tls(#[source] io::Error),
    /// Postgres said no; the body of its ErrorResponse.
    #[error("refused: {}", message_of(.0))]
    Refused(Vec<u8>),
    #[error("login: {0}")]
    Login(#[from] AuthError),
    #[error("closed the connection during login: {0}")]
    Closed(#[source] io::Error),
    #[error("unexpected message {0:?} during login")]
    Protocol(char),
}

fn message_of(body: &[u8]) -> String {
    let field = crate::wire::error_response::field(body, b'M').unwrap_or_default();
    String::from_utf8_lossy(field).into_owned()
}

/// A server that acknowledges nothing for so long is gone, whatever its socket says.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// Dials one upstream.
pub(crate) struct Connector {
    host: Arc<str>,
    port: u16,
    sslmode: SslMode,
    negotiation: SslNegotiation,
    channel_binding: ChannelBinding,
    tls: Option<Arc<ClientConfig>>,
    /// Numbers servers.
    ids: Arc<AtomicU64>,
    /// Settings that servers are opened with and their clients know nothing of: what RESET goes back to.
    ours: Vec<(&'static str, String)>,
}

impl Connector {
    pub(crate) fn new(url: &ConnectUrl, ids: Arc<AtomicU64>) -> io::Result<Self> {
        let tls = (url.sslmode != SslMode::Disable)
            .then(|| tls::client_config(url).map(Arc::new))
            .transpose()?;
        Ok(Self {
            host: url.host.as_str().into(),
            port: url.port,
            sslmode: url.sslmode,
            negotiation: url.ssl_negotiation,
            channel_binding: url.channel_binding,
            tls,
            ids,
            ours: Vec::new(),
        })
    }

    /// Servers are opened with this setting, too, where what is there takes it.
    pub(crate) fn with_setting(mut self, name: &'static str, value: String) -> Self {
        self.ours.push((name, value));
        self
    }

    /// Opens a connection for `opening`; `application_name` is set, but not part of what makes servers alike.
    pub(crate) async fn connect(
        &self,
        opening: &Arc<Opening>,
        application_name: &str,
        credentials: &Credentials,
        within: Duration,
    ) -> Result<ServerConn, ConnectError> {
        let login = async {
            let log_in = |ours| self.log_in(opening, application_name, credentials, ours);
            match Box::pin(log_in(&self.ours)).await {
                // Another pooler stands there and takes none but those it knows.
                Err(ConnectError::Refused(body))
                    if !self.ours.is_empty()
                        && crate::wire::error_response::field(&body, b'C') == Some(b"08P01") =>
                {
                    Box::pin(log_in(&[])).await
                }
                other => other,
            }
        };
        timeout(within, Box::pin(login))
            .await
            .unwrap_or(Err(ConnectError::TimedOut(within)))
    }

    /// As libpq does, `allow` and `prefer` try the other way when the first is refused.
    async fn log_in(
        &self,
        opening: &Arc<Opening>,
        application_name: &str,
        credentials: &Credentials,
        ours: &[(&'static str, String)],
    ) -> Result<ServerConn, ConnectError> {
        let (first, second) = match self.sslmode {
            SslMode::Disable => (Way::Plain, None),
            SslMode::Allow => (Way::Plain, Some(Way::Tls)),
            SslMode::Prefer => (Way::TlsIfOffered, Some(Way::Plain)),
            SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => (Way::Tls, None),
        };
        let log_in_by =
            |way| Box::pin(self.log_in_by(way, opening, application_name, credentials, ours));
        let tried = log_in_by(first).await;
        match (tried, second) {
            (Err(refused), Some(way)) if way.may_help(&refused) => {
                let again = log_in_by(way).await;
                // No TLS there at all: then what the server said first is the news.
                again.map_err(|error| match error {
                    ConnectError::Tls(_) => refused,
                    other => other,
                })
            }
            (tried, _) => tried,
        }
    }

    async fn log_in_by(
        &self,
        way: Way,
        opening: &Arc<Opening>,
        application_name: &str,
        credentials: &Credentials,
        ours: &[(&'static str, String)],
    ) -> Result<ServerConn, ConnectError> {
        let mut stream = Stream::new(self.dial(way).await?);
        put_startup(&mut stream.output, opening, application_name, ours);
        stream.flush().await.map_err(ConnectError::Closed)?;
        let mut login = Login::new(&stream, self.channel_binding);
        loop {
            let (tag, body) = auth::next(&mut stream)
                .await
                .map_err(ConnectError::Closed)?;
            match tag {
                b'R' => match login
                    .answer(&mut stream, &opening.user, credentials, &body)
                    .await?
                {
                    Step::Done => break,
                    Step::More => {}
                },
                b'E' => return Err(ConnectError::Refused(body)),
                b'N' | b'v' => {}
                other => return Err(ConnectError::Protocol(char::from(other))),
            }
        }
        let mut reported = Reported::default();
        let mut key = None;
        loop {
            let (tag, body) = auth::next(&mut stream)
                .await
                .map_err(ConnectError::Closed)?;
            match tag {
                b'S' => {
                    if let Some((name, value)) = parameter_status(&body) {
                        reported.set(
                            &String::from_utf8_lossy(name),
                            &String::from_utf8_lossy(value),
                        );
                    }
                }
                b'K' => {
                    let (pid, secret) = body
                        .split_first_chunk::<4>()
                        .ok_or(ConnectError::Protocol('K'))?;
                    key = Some((u32::from_be_bytes(*pid), Arc::from(secret)));
                }
                b'Z' => break,
                b'E' => return Err(ConnectError::Refused(body)),
                b'N' => {}
                other => return Err(ConnectError::Protocol(char::from(other))),
            }
        }
        let (pid, secret) = key.unwrap_or((0, Arc::from([])));
        let now = Instant::now();
        let id = self.ids.fetch_add(1, Ordering::Relaxed) + 1;
        Ok(ServerConn {
            record: Arc::new(ServerRecord::new(id, pid, &stream, now)),
            stream,
            key: Arc::new(ServerKey {
                host: Arc::clone(&self.host),
                port: self.port,
                pid,
                secret,
            }),
            opening: Arc::clone(opening),
            reported,
            settings: Arc::new(Settings::named(application_name)),
            tx: TxStatus::Idle,
            in_flight: false,
            unbooked: false,
            statements: Statements::default(),
            to_close: Vec::new(),
            lent: Vec::new(),
            unnamed: None,
            last_client: 0,
            mixed_draws: false,
            probes: false,
            hidden: false,
            unfit: false,
            heard: None,
            opened_at: now,
            idle_since: now,
        })
    }

    async fn dial(&self, way: Way) -> Result<Transport, ConnectError> {
        let address = (self.host.as_ref(), self.port);
        let mut tcp = TcpStream::connect(address)
            .await
            .map_err(ConnectError::Unreachable)?;
        tcp.set_nodelay(true).map_err(ConnectError::Unreachable)?;
        let socket = socket2::SockRef::from(&tcp);
        socket
            .set_keepalive(true)
            .map_err(ConnectError::Unreachable)?;
        socket
            .set_tcp_user_timeout(Some(SILENCE_MAX))
            .map_err(ConnectError::Unreachable)?;
        let config = match (&self.tls, way) {
            (None, _) | (_, Way::Plain) => return Ok(Transport::Plain(tcp)),
            (Some(config), Way::Tls | Way::TlsIfOffered) => Arc::clone(config),
        };
        match self.negotiation {
            SslNegotiation::Postgres => {
                tcp.write_all(&[0, 0, 0, 8, 4, 210, 22, 47])
                    .await
                    .map_err(ConnectError::Closed)?;
                // One byte and no more: what follows it before the handshake would be an attacker's. (CVE-2021-23222)
                match tcp.read_u8().await.map_err(ConnectError::Closed)? {
                    b'S' => {}
                    b'N' if way == Way::TlsIfOffered => return Ok(Transport::Plain(tcp)),
                    b'N' => {
                        return Err(ConnectError::Tls(io::Error::other(
                            "the server does not support SSL, but SSL was required",
                        )));
                    }
                    other => return Err(ConnectError::Protocol(char::from(other))),
                }
            }
            SslNegotiation::Direct => {}
        }
        let name = ServerName::try_from(self.host.to_string())
            .map_err(|e| ConnectError::Tls(io::Error::other(e)))?;
        let connector = tokio_rustls::TlsConnector::from(config);
        let tls = connector
            .connect(name, tcp)
            .await
            .map_err(ConnectError::Tls)?;
        let agreed = tls.get_ref().1.alpn_protocol();
        if self.negotiation == SslNegotiation::Direct && agreed != Some(tls::ALPN) {
            return Err(ConnectError::Tls(io::Error::other(
                "the server did not agree on ALPN protocol \"postgresql\", which direct TLS needs",
            )));
        }
        Ok(Transport::TlsClient(Box::new(tls)))
    }
}

/// One attempt's encryption.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Plain,
    TlsIfOffered,
    Tls,
}

impl Way {
    /// Whether this way may be let in where another was refused so: by pg_hba.conf, or in the handshake.
    fn may_help(self, refused: &ConnectError) -> bool {
        match refused {
            ConnectError::Refused(body) => {
                crate::wire::error_response::field(body, b'C') == Some(b"28000")
            }
            ConnectError::Tls(_) => self == Self::Plain,
            _ => false,
        }
    }
}

fn put_startup(
    out: &mut Vec<u8>,
    opening: &Opening,
    application_name: &str,
    ours: &[(&'static str, String)],
) {
    let mut body = 0x0003_0000u32.to_be_bytes().to_vec();
    let fixed = [
        ("user", opening.user.as_str()),
        ("database", &opening.database),
        ("application_name", application_name),
    ];
    let ours = ours.iter().map(|(name, value)| (*name, value.as_str()));
    let options = opening
        .options
        .iter()
        .map(|(name, value)| (name.as_str(), value.as_str()));
    for (name, value) in fixed
        .into_iter()
        .filter(|(name, value)| *name != "application_name" || !value.is_empty())
        .chain(ours)
        .chain(options)
    {
        put_cstr(&mut body, name.as_bytes());
        put_cstr(&mut body, value.as_bytes());
    }
    body.push(0);
    let length = u32::try_from(body.len() + 4).unwrap_or(u32::MAX);
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(&body);
}

/// Sends a CancelRequest to the server `key` names, and waits until Postgres has acted on it (it then closes the
/// connection). Errors are the operator's business only: a cancel has no answer. (protocol-flow.html, "Canceling Requests")
pub(crate) async fn send_cancel(key: &ServerKey, within: Duration) -> io::Result<()> {
    let mut packet = Vec::with_capacity(16 + key.secret.len());
    let length = u32::try_from(12 + key.secret.len()).map_err(io::Error::other)?;
    packet.extend_from_slice(&length.to_be_bytes());
    packet.extend_from_slice(&80_877_102u32.to_be_bytes());
    packet.extend_from_slice(&key.pid.to_be_bytes());
    packet.extend_from_slice(&key.secret);
    let exchange = async {
        let mut tcp = TcpStream::connect((key.host.as_ref(), key.port)).await?;
        tcp.write_all(&packet).await?;
        let mut rest = [0; 16];
        while tcp.read(&mut rest).await? > 0 {}
        Ok(())
    };
    timeout(within, exchange)
        .await
        .unwrap_or_else(|late| Err(late.into()))
}
