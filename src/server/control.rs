//! The control role's own connections, as an ordinary client of Postgres (events, probes, verifiers): the one place where
//! `sslmode` becomes a tokio-postgres connector. Whoever dials drives the connection.

use std::time::Duration;

use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::{Client, Connection, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::tls;
use crate::config::{ChannelBinding, ConnectUrl, SslMode, SslNegotiation};

/// The socket half of a control connection; whoever dials drives it.
pub(crate) type ControlConnection =
    Connection<Socket, <MakeRustlsConnect as MakeTlsConnect<Socket>>::Stream>;

#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    #[error("no connection within {0:?}")]
    Timeout(Duration),
    #[error(transparent)]
    Postgres(#[from] tokio_postgres::Error),
    #[error("root certificates: {0}")]
    Roots(String),
}

impl DialError {
    /// Postgres answered and will answer the same next time (wrong password, no such database): waiting won't help.
    pub(crate) fn is_final(&self) -> bool {
        match self {
            Self::Postgres(error) => error
                .code()
                .is_some_and(|code| !matches!(&code.code()[..2], "57" | "53" | "08")),
            Self::Roots(_) => true,
            Self::Timeout(_) => false,
        }
    }
}

/// tokio-postgres says "db error" and keeps Postgres' own words as its source.
pub(crate) fn words(error: &dyn std::error::Error) -> String {
    std::iter::successors(error.source(), |cause| cause.source())
        .fold(error.to_string(), |words, cause| {
            words + ": " + &cause.to_string()
        })
}

/// Opens a connection as the control role.
pub(crate) async fn dial(
    url: &ConnectUrl,
    application: &str,
    wait: Duration,
) -> Result<(Client, ControlConnection), DialError> {
    let tls = MakeRustlsConnect::new(
        tls::client_config(url).map_err(|error| DialError::Roots(error.to_string()))?,
    );
    let mut config = tokio_postgres::Config::new();
    config
        .host(&url.host)
        .port(url.port)
        .user(&url.user)
        .dbname(&url.database)
        .application_name(application)
        .connect_timeout(wait)
        .keepalives_idle(Duration::from_secs(10))
        .tcp_user_timeout(Duration::from_secs(15))
        .ssl_mode(match url.sslmode {
            SslMode::Disable => tokio_postgres::config::SslMode::Disable,
            // No way back to plain there; where the server has TLS it is as good.
            SslMode::Allow | SslMode::Prefer => tokio_postgres::config::SslMode::Prefer,
            SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => {
                tokio_postgres::config::SslMode::Require
            }
        })
        .ssl_negotiation(match url.ssl_negotiation {
            SslNegotiation::Postgres => tokio_postgres::config::SslNegotiation::Postgres,
            SslNegotiation::Direct => tokio_postgres::config::SslNegotiation::Direct,
        })
        .channel_binding(match url.channel_binding {
            ChannelBinding::Disable => tokio_postgres::config::ChannelBinding::Disable,
            ChannelBinding::Prefer => tokio_postgres::config::ChannelBinding::Prefer,
            ChannelBinding::Require => tokio_postgres::config::ChannelBinding::Require,
        });
    if let Some(password) = &url.password {
        config.password(password.expose());
    }
    match tokio::time::timeout(wait, config.connect(tls)).await {
        Ok(connected) => Ok(connected?),
        Err(_elapsed) => Err(DialError::Timeout(wait)),
    }
}
