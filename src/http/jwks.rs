//! The public keys that tokens are verified with, from a file for good or from a URL: fetched when we start, again and again, and
//! when a token names a key we don't know. What was fetched last counts until something better is; where nothing was yet, nobody
//! can be told from anybody, and tokens wait (503). Knows nothing of tokens (`jwt.rs`). Called by `identity` and `mod.rs`.
//!
//! Why not an HTTP client of somebody else's: hyper is here anyway, and one GET without redirects, cookies or proxies is little.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::body::{Body, to_bytes};
use axum::http::{StatusCode, header};
use hyper::Request;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_rustls::TlsConnector;
use tracing::{info, warn};
use url::{Host, Url};

use super::jwt::{JwksError, PublicKey, public_keys, usable_keys};
use crate::config::Jwks as Source;
use crate::metrics::{Counter, Gauge, Registry};

/// From the first packet to the last byte.
const FETCH_MAX: Duration = Duration::from_secs(5);
const SIZE_MAX: usize = 256 * 1024;
/// How often the keys are looked at, though nobody asks for others.
const REFRESH: Duration = Duration::from_secs(600);
/// After a failure.
const RETRY: Duration = Duration::from_secs(15);
/// Whatever tokens name, no two fetches begin within it.
const REST: Duration = Duration::from_secs(2);

pub(super) type PublicKeys = Arc<[PublicKey]>;

#[derive(Debug, thiserror::Error)]
enum FetchError {
    #[error("no answer within {0:?}")]
    Timeout(Duration),
    #[error("cannot be reached: {0}")]
    Connect(#[from] io::Error),
    #[error("no HTTP: {0}")]
    Http(#[from] hyper::Error),
    #[error("its URL: {0}")]
    Url(#[from] axum::http::Error),
    #[error("answered {0}")]
    Status(StatusCode),
    #[error("its answer breaks off or has more than {SIZE_MAX} bytes: {0}")]
    Body(axum::Error),
    #[error("{0}")]
    Set(#[from] JwksError),
}

/// How fetching stands.
#[derive(Clone, Copy)]
struct Attempts {
    ended: u64,
    under_way: bool,
    next_from: Instant,
}

struct Fetched {
    url: Url,
    tls: Arc<ClientConfig>,
    known: Mutex<Option<PublicKeys>>,
    wanted: Notify,
    attempts: watch::Sender<Attempts>,
    succeeded: Arc<Counter>,
    failed: Arc<Counter>,
    count: Arc<Gauge>,
}

enum Held {
    File(PublicKeys),
    Url(Box<Fetched>),
}

pub(super) struct Jwks(Held);

impl Jwks {
    pub(super) fn new(source: Option<&Source>, registry: &Registry) -> Result<Self, JwksError> {
        let url = match source {
            None => return Ok(Self(Held::File(Arc::default()))),
            Some(Source::File(path)) => {
                let keys = public_keys(&std::fs::read_to_string(path)?)?;
                return Ok(Self(Held::File(keys.into())));
            }
            Some(Source::Url(url)) => url.clone(),
        };
        let mut roots = RootCertStore::empty();
        roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let fetches = |result| {
            registry.counter(
                "flowgate_http_jwks_fetches_total",
                "Times that the URL of http.jwks was asked for its keys",
                &[("result", result)],
            )
        };
        let fetched = Fetched {
            url,
            tls: Arc::new(tls),
            known: Mutex::default(),
            wanted: Notify::new(),
            attempts: watch::Sender::new(Attempts {
                ended: 0,
                under_way: true,
                next_from: Instant::now(),
            }),
            succeeded: fetches("ok"),
            failed: fetches("failed"),
            count: registry.gauge(
                "flowgate_http_jwks_keys",
                "Keys that the URL of http.jwks had when it answered last",
                &[],
            ),
        };
        Ok(Self(Held::Url(Box::new(fetched))))
    }

    /// `None`: nobody has told us yet.
    pub(super) fn known(&self) -> Option<PublicKeys> {
        match &self.0 {
            Held::File(keys) => Some(Arc::clone(keys)),
            Held::Url(fetched) => fetched.known(),
        }
    }

    /// A token names a key that is not there. Returns once it is known better, or that there is no more to know for now.
    pub(super) async fn look_again(&self) {
        let Held::Url(fetched) = &self.0 else {
            return;
        };
        let mut attempts = fetched.attempts.subscribe();
        let now = *attempts.borrow_and_update();
        if !now.under_way {
            fetched.wanted.notify_one();
            if Instant::now() < now.next_from {
                return;
            }
        }
        let ended = attempts.wait_for(|later| later.ended > now.ended);
        // Who fetches is bounded by it, too, and may be gone.
        drop(timeout(FETCH_MAX, ended).await);
    }

    /// Fetches, until dropped.
    pub(super) async fn keep(&self) {
        let Held::Url(fetched) = &self.0 else {
            return;
        };
        fetched.keep().await;
    }
}

impl Fetched {
    fn known(&self) -> Option<PublicKeys> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.clone()
    }

    async fn keep(&self) {
        // `None`: not tried yet.
        let mut well = None;
        let mut told = Vec::new();
        loop {
            let began = Instant::now();
            self.attempts
                .send_modify(|attempts| attempts.under_way = true);
            let fetched = timeout(FETCH_MAX, self.fetch()).await;
            let fetched = fetched.unwrap_or(Err(FetchError::Timeout(FETCH_MAX)));
            let was_well = well.replace(fetched.is_ok());
            match fetched {
                Ok((keys, bad)) => {
                    self.succeeded.inc();
                    let bad: Vec<_> = bad.iter().map(ToString::to_string).collect();
                    // Once, until they are others.
                    if !bad.is_empty() && bad != told {
                        let keys = keys.len();
                        warn!(url = %self.url, ?bad, keys, "http.jwks has keys that are passed over");
                    }
                    told = bad;
                    self.count
                        .set(i64::try_from(keys.len()).unwrap_or(i64::MAX));
                    if was_well == Some(false) {
                        info!(url = %self.url, keys = keys.len(), "http.jwks is known again");
                    }
                    let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
                    *known = Some(keys.into());
                }
                Err(error) => {
                    self.failed.inc();
                    // Once, until it is well again.
                    if was_well != Some(false) {
                        let known = self.known().map_or(0, |keys| keys.len());
                        warn!(url = %self.url, %error, known, "http.jwks cannot be fetched");
                    }
                }
            }
            let next_from = began + REST;
            self.attempts.send_modify(|attempts| {
                *attempts = Attempts {
                    ended: attempts.ended + 1,
                    under_way: false,
                    next_from,
                };
            });
            sleep_until(next_from).await;
            let pause = if well == Some(true) { REFRESH } else { RETRY };
            tokio::select! {
                () = sleep_until(began + pause) => {}
                () = self.wanted.notified() => {}
            }
        }
    }

    async fn fetch(&self) -> Result<(Vec<PublicKey>, Vec<JwksError>), FetchError> {
        let nameless = || io::Error::new(io::ErrorKind::InvalidInput, "no host");
        let port = self.url.port_or_known_default().ok_or_else(nameless)?;
        let (socket, name) = match self.url.host().ok_or_else(nameless)? {
            Host::Domain(name) => {
                let server = ServerName::try_from(name.to_owned()).map_err(io::Error::other)?;
                (TcpStream::connect((name, port)).await?, server)
            }
            Host::Ipv4(ip) => {
                let ip = std::net::IpAddr::from(ip);
                (TcpStream::connect((ip, port)).await?, ip.into())
            }
            Host::Ipv6(ip) => {
                let ip = std::net::IpAddr::from(ip);
                (TcpStream::connect((ip, port)).await?, ip.into())
            }
        };
        let text = if self.url.scheme() == "https" {
            let connector = TlsConnector::from(Arc::clone(&self.tls));
            self.get(connector.connect(name, socket).await?).await?
        } else {
            self.get(socket).await?
        };
        Ok(usable_keys(&text)?)
    }

    async fn get(
        &self,
        socket: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static,
    ) -> Result<String, FetchError> {
        let (mut sender, connection) = http1::Builder::new()
            .max_buf_size(64 * 1024)
            .handshake(TokioIo::new(socket))
            .await?;
        // Ends with us.
        let mut driver = JoinSet::new();
        driver.spawn(connection);
        let path = &self.url[url::Position::BeforePath..url::Position::AfterQuery];
        let host = &self.url[url::Position::BeforeHost..url::Position::AfterPort];
        let request = Request::get(path)
            .header(header::HOST, host)
            .header(header::ACCEPT, "application/json")
            .header(header::USER_AGENT, "flowgate")
            .header(header::CONNECTION, "close")
            .body(Body::empty())?;
        let response = sender.send_request(request).await?;
        if response.status() != StatusCode::OK {
            return Err(FetchError::Status(response.status()));
        }
        let body = to_bytes(Body::new(response.into_body()), SIZE_MAX).await;
        let body = body.map_err(FetchError::Body)?;
        Ok(String::from_utf8_lossy(&body).into_owned())
    }
}
