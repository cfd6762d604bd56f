//! Why a session or a request ended early, and what the client is told: one match to an ErrorResponse with the SQLSTATE
//! Postgres uses. Operator's words are `Display`; the client's stand here. (errcodes-appendix.html)

use std::io;
use std::time::Duration;

use thiserror::Error;

use super::proxy::ProxyError;
use crate::pool::checkout::{CheckoutError, Counts};
use crate::relay::RelayError;
use crate::server::auth::AuthError;
use crate::server::connect::ConnectError;
use crate::wire::error_response::{ErrorResponse, field};
use crate::wire::frame::FrameError;
use crate::wire::startup::StartupError;

/// Who was refused under load should not be back before that.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// What ends a connection.
#[derive(Debug, Error)]
pub(crate) enum SessionError {
    #[error("client broke the protocol: {0}")]
    Frame(#[from] FrameError),
    #[error("client broke the protocol: {0}")]
    Startup(#[from] StartupError),
    #[error("client broke the protocol: {0}")]
    Protocol(&'static str),
    #[error("TLS handshake failed: {0}")]
    Tls(#[source] io::Error),
    #[error("PROXY header: {0}")]
    Proxy(#[from] ProxyError),
    #[error("refused: {}", .0.message)]
    Refused(Box<ErrorResponse>),
    /// Postgres refused the login; its own ErrorResponse is passed on.
    #[error("Postgres refused the login")]
    RefusedByServer(Vec<u8>),
    #[error(transparent)]
    Relay(#[from] RelayError),
    #[error("client is gone: {0}")]
    ClientGone(#[from] io::Error),
    #[error("shutting down")]
    Shutdown,
    #[error("ended by an admin")]
    Killed,
    #[error("subscription ended: {0}")]
    Cut(String),
    /// Postgres has said its last word, and it was passed on.
    #[error("server ended the session")]
    ServerFarewell,
}

impl SessionError {
    /// What to tell the client before its connection closes; `None` when there is nobody to tell, or it was told.
    pub(crate) fn farewell(&self) -> Option<ErrorResponse> {
        let fatal = |code, message: String| Some(ErrorResponse::fatal(code, message));
        match self {
            Self::Frame(error) => fatal("08P01", error.to_string()),
            Self::Startup(error @ StartupError::Version { .. }) => {
                fatal("0A000", error.to_string())
            }
            Self::Startup(error @ StartupError::NoUser) => fatal("28000", error.to_string()),
            Self::Startup(error @ StartupError::Replication(_)) => Some(
                ErrorResponse::fatal("22023", error.to_string())
                    .with_hint("Valid values are: \"false\", 0, \"true\", 1, \"database\"."),
            ),
            Self::Startup(error) => fatal("08P01", error.to_string()),
            Self::Protocol(message) => fatal("08P01", (*message).to_owned()),
            Self::Refused(error) => Some(error.as_ref().clone()),
            Self::Relay(RelayError::Server(_) | RelayError::ServerClosed) => fatal(
                "08006",
                "the connection to the database server was lost".to_owned(),
            ),
            Self::Relay(RelayError::ServerMalformed) => fatal(
                "08P01",
                "the database server sent a malformed message".to_owned(),
            ),
            Self::Shutdown | Self::Killed => fatal(
                "57P01",
                "terminating connection due to administrator command".to_owned(),
            ),
            Self::Cut(reason) => Some(
                ErrorResponse::fatal(
                    "57P01",
                    "terminating connection: notifications would be lost",
                )
                .with_detail(reason.clone()),
            ),
            Self::RefusedByServer(_)
            | Self::Tls(_)
            | Self::Proxy(_)
            | Self::Relay(RelayError::ClientGone(_))
            | Self::ClientGone(_)
            | Self::ServerFarewell => None,
        }
    }

    /// A client's own doing is no news for the operator.
    pub(crate) fn is_routine(&self) -> bool {
        !matches!(
            self,
            Self::Relay(
                RelayError::Server(_) | RelayError::ServerClosed | RelayError::ServerMalformed
            )
        )
    }
}

/// Why a request got no server; the connection stays usable.
pub(crate) fn no_server(error: &CheckoutError) -> ErrorResponse {
    match error {
        CheckoutError::Connect(error) => no_connection(error),
        CheckoutError::TimedOut(after) => {
            ErrorResponse::error("53300", "no server connection became free in time")
                .with_detail(format!(
                    "The request waited {} ms for one of the pool's connections.",
                    after.as_millis()
                ))
                .with_hint(
                    "Retry, raise pool.size or pool.checkout_timeout, or shorten transactions.",
                )
        }
        CheckoutError::Shed {
            worth,
            waited,
            waiting,
        } => ErrorResponse::error("53300", "overloaded: the request was not run")
            .with_detail(format!(
                "It is of class {}, and waited {} ms for one of the pool's connections; {waiting} requests wait for one.",
                worth.name(),
                waited.as_millis()
            ))
            .with_hint(format!("Retry after {} ms.", RETRY_AFTER.as_millis())),
        CheckoutError::Cancelled => {
            ErrorResponse::error("57014", "canceling statement due to user request")
        }
        CheckoutError::Gone => {
            ErrorResponse::error("57P03", "the database server is not there any more")
        }
        CheckoutError::Settings(error) => ErrorResponse::error(
            "57P03",
            "the session could not be continued on another server",
        )
        .with_detail(format!(
            "One of its settings is not possible any more: {error}."
        ))
        .with_hint("Reset the setting, or reconnect."),
    }
}

/// What goes before an answer from memory where there was too much to do.
pub(crate) fn old_answer(age: Duration) -> ErrorResponse {
    ErrorResponse::notice(format!("the answer is {} ms old", age.as_millis())).with_detail(
        "There is more to do than can be done, so the request was answered from memory.",
    )
}

/// What a client is told while its request waits.
pub(crate) fn still_waiting(waited: Duration, pool: Counts) -> ErrorResponse {
    ErrorResponse::notice("the request is waiting for a server connection").with_detail(format!(
        "It has waited {} s; the pool has {} connections, {} requests wait for one.",
        waited.as_secs_f64().round(),
        pool.open,
        pool.waiting
    ))
}

fn no_connection(error: &ConnectError) -> ErrorResponse {
    match error {
        ConnectError::Refused(body) => {
            let text =
                |name| String::from_utf8_lossy(field(body, name).unwrap_or_default()).into_owned();
            let code = match field(body, b'C') {
                Some(b"53300") => "53300",
                Some(b"3D000") => "3D000",
                Some(b"28000") => "28000",
                Some(b"28P01") => "28P01",
                Some(b"42501") => "42501",
                Some(_) | None => "57P03",
            };
            ErrorResponse::error(code, text(b'M'))
        }
        ConnectError::Unreachable(_) | ConnectError::TimedOut(_) | ConnectError::Closed(_) => {
            ErrorResponse::error("57P03", "the database server cannot be reached")
                .with_detail("The proxy could not open a connection to it.")
                .with_hint("It may be starting up or shutting down; retry.")
        }
        ConnectError::Tls(_) => {
            ErrorResponse::error("08006", "the connection to the database server failed")
                .with_detail("TLS could not be negotiated with it.")
        }
        ConnectError::Login(error) => login_failed(error),
        ConnectError::Protocol(_) => {
            ErrorResponse::error("08P01", "the database server broke the protocol")
        }
    }
}

fn login_failed(error: &AuthError) -> ErrorResponse {
    match error {
        AuthError::NoCredentials(_) => {
            ErrorResponse::error("28000", "the database server asks for a password")
                .with_detail("The proxy has no password or SCRAM key for this user.")
                .with_hint("Use auth.method = \"scram\", or let the server trust the proxy.")
        }
        AuthError::Unsupported(_)
        | AuthError::Scram
        | AuthError::ServerSignature
        | AuthError::NotBound(_) => {
            ErrorResponse::error("28000", "the proxy could not log in to the database server")
        }
        AuthError::Io(_) => {
            ErrorResponse::error("08006", "the connection to the database server was lost")
        }
    }
}

/// The same, said to a client that is logging in: it ends the connection.
pub(crate) fn login_refused(error: CheckoutError) -> SessionError {
    match error {
        CheckoutError::Connect(ConnectError::Refused(body)) => SessionError::RefusedByServer(body),
        other => {
            let refusal = no_server(&other);
            SessionError::Refused(Box::new(ErrorResponse {
                severity: crate::wire::error_response::Severity::Fatal,
                ..refusal
            }))
        }
    }
}
