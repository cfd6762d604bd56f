//! A connection through the proxy that comes back by itself: what the demo's worker, reader and starter speak through.
//! Waits for a server that is away as long as it takes; whoever uses it is ended from outside. Never repeats a statement
//! unless told that it may (`insist`).

use std::net::SocketAddr;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio_postgres::types::{ToSql, Type};
use tokio_postgres::{Client, Config, Error, NoTls, Row};
use tracing::debug;

use crate::embedded::SUPERUSER;

const BACKOFF_MIN: Duration = Duration::from_millis(50);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
const CONNECT_MAX: Duration = Duration::from_secs(5);

pub(super) type Params<'a> = [(&'a (dyn ToSql + Sync), Type)];

pub(super) struct Link {
    config: Config,
    client: Option<Open>,
    backoff: Duration,
}

/// A client, and the task that drives it. Dropping both closes the socket at once; the task alone would first wait for the
/// answer to what was sent, and so hold up everybody's end by a poll.
pub(super) struct Open {
    pub(super) client: Client,
    _driver: JoinSet<()>,
}

/// How the demo's clients reach the proxy.
pub(super) fn config(proxy: SocketAddr, database: &str, application: &str) -> Config {
    let mut config = Config::new();
    config
        .host(proxy.ip().to_string())
        .port(proxy.port())
        .user(SUPERUSER)
        .dbname(database)
        .application_name(application)
        .connect_timeout(CONNECT_MAX);
    config
}

impl Link {
    pub(super) fn new(proxy: SocketAddr, application: &str) -> Self {
        Self {
            config: config(proxy, "postgres", application),
            client: None,
            backoff: BACKOFF_MIN,
        }
    }

    /// One try. By unnamed statement and in one round trip, as pgflow's workers do with `prepare: false`.
    pub(super) async fn query(
        &mut self,
        sql: &str,
        params: &Params<'_>,
    ) -> Result<Vec<Row>, Error> {
        let open = match self.client.take().filter(|open| !open.client.is_closed()) {
            Some(open) => open,
            None => connect(&self.config).await?,
        };
        let client = &self.client.insert(open).client;
        let answer = client.query_typed(sql, params).await;
        if answer.is_ok() {
            self.backoff = BACKOFF_MIN;
        }
        answer
    }

    /// Until there is an answer. Only for what may run twice: an answer may be lost after the commit.
    pub(super) async fn insist(
        &mut self,
        sql: &str,
        params: &Params<'_>,
    ) -> Result<Vec<Row>, Error> {
        loop {
            match self.query(sql, params).await {
                Err(error) if is_passing(&error) => self.pause(&error).await,
                answer => return answer,
            }
        }
    }

    /// Longer each time, until something succeeds.
    pub(super) async fn pause(&mut self, why: &Error) {
        debug!(error = %words(why), again_in = ?self.backoff, "waiting for the server");
        tokio::time::sleep(self.backoff).await;
        self.backoff = (self.backoff * 2).min(BACKOFF_MAX);
    }
}

pub(super) async fn connect(config: &Config) -> Result<Open, Error> {
    let (client, connection) = config.connect(NoTls).await?;
    let mut driver = JoinSet::new();
    // Its error is the next statement's.
    driver.spawn(async move { drop(connection.await) });
    Ok(Open {
        client,
        _driver: driver,
    })
}

/// A connection lost, a server going, coming or full, a transaction to be repeated: waiting helps.
pub(super) fn is_passing(error: &Error) -> bool {
    match error.code() {
        Some(code) => {
            matches!(&code.code()[..2], "08" | "53" | "40") || code.code().starts_with("57P")
        }
        // Not from Postgres: the socket, or one of our own making, which no server will cure.
        None => error.is_closed() || is_io(error),
    }
}

fn is_io(error: &Error) -> bool {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if error.is::<std::io::Error>() {
            return true;
        }
        cause = error.source();
    }
    false
}

/// tokio-postgres says "db error" and keeps Postgres' words apart.
pub(super) fn words(error: &Error) -> String {
    crate::server::control::words(error)
}
