//! A proxy of a test's own: `flowgate::app` in this process, on a free port of the loopback, trust unless the test says
//! otherwise. Its control plane runs on the test's runtime, its data plane on threads of its own.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use flowgate::app::{self, App, Hooks, NotReloaded, Reloaded};
use flowgate::config::{self, Config, Flags};
use futures_util::StreamExt;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_postgres::{AsyncMessage, Client, NoTls, Notification, SimpleQueryMessage};

use super::pg::TestDb;
use super::raw::Raw;

/// How long anything may take that is expected to happen at all.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Proxy {
    pub(crate) port: u16,
    pub(crate) database: String,
    pub(crate) user: String,
    /// Where the same database is without us.
    pub(crate) direct_url: String,
    /// What the next reload reads.
    next: Arc<Mutex<Config>>,
    app: App,
}

/// The configuration `Proxy::start` gives to `tweak`: no environment, no file.
pub(crate) fn config(primary: &str, replicas: &[&str]) -> Config {
    let flags = Flags {
        listen: Some("127.0.0.1:0".to_owned()),
        http: Some("off".to_owned()),
        primary: Some(primary.to_owned()),
        replicas: replicas.iter().map(|&url| url.to_owned()).collect(),
        auth: Some("trust".to_owned()),
        ..Flags::default()
    };
    let mut config = config::from_sources(None, std::iter::empty(), flags).unwrap();
    // A test that ends with a transaction open is not about draining.
    config.listen.drain_timeout = Duration::from_secs(1);
    config
}

impl Proxy {
    /// Before this database's primary and replica.
    pub(crate) async fn start(db: &TestDb, tweak: impl FnOnce(&mut Config)) -> Self {
        Self::before(&db.primary_url, &[&db.replica_url], tweak).await
    }

    /// Before the primary alone: nothing can go anywhere else.
    pub(crate) async fn without_replica(db: &TestDb, tweak: impl FnOnce(&mut Config)) -> Self {
        Self::before(&db.primary_url, &[], tweak).await
    }

    /// With one server connection per user: all clients meet on it.
    pub(crate) async fn with_pool(db: &TestDb, size: usize) -> Self {
        Self::without_replica(db, |config| config.pool.size = size.try_into().unwrap()).await
    }

    pub(crate) async fn before(
        primary: &str,
        replicas: &[&str],
        tweak: impl FnOnce(&mut Config),
    ) -> Self {
        let mut config = config(primary, replicas);
        tweak(&mut config);
        let next = Arc::new(Mutex::new(config.clone()));
        let read = Arc::clone(&next);
        let hooks = Hooks {
            reread: Some(Arc::new(move || Ok(read.lock().unwrap().clone()))),
            set_log: None,
        };
        let mut proxy = Self::of_config(&config, primary, hooks).await;
        proxy.next = next;
        proxy
    }

    pub(crate) async fn of_config(config: &Config, primary: &str, hooks: Hooks) -> Self {
        let (database, user) = (config.primary.database.clone(), config.primary.user.clone());
        let app = app::start_with(config, hooks).await.unwrap();
        Self {
            port: app.postgres.port(),
            database,
            user,
            direct_url: primary.to_owned(),
            next: Arc::new(Mutex::new(config.clone())),
            app,
        }
    }

    pub(crate) fn url(&self) -> String {
        let Self {
            port,
            database,
            user,
            ..
        } = self;
        format!("postgres://{user}@127.0.0.1:{port}/{database}")
    }

    /// The admin console's.
    pub(crate) fn console_url(&self) -> String {
        format!("postgres://{}@127.0.0.1:{}/flowgate", self.user, self.port)
    }

    /// An admin in the console.
    pub(crate) async fn console(&self) -> Client {
        connect(&self.console_url()).await
    }

    pub(crate) async fn reload(&self) -> Result<Reloaded, NotReloaded> {
        self.app.reload().await
    }

    pub(crate) fn app(&self) -> &App {
        &self.app
    }

    pub(crate) fn into_app(self) -> App {
        self.app
    }

    /// A client through the proxy; a task of its own drives it.
    pub(crate) async fn connect(&self) -> Client {
        connect(&self.url()).await
    }

    /// As `connect`, with what the server says unasked.
    pub(crate) async fn connect_hearing(&self) -> (Client, Hearing) {
        connect_hearing(&self.url()).await
    }

    /// Logged in, byte by byte ours.
    pub(crate) async fn raw(&self) -> Raw {
        Raw::login(self.port, &self.user, &self.database, &[]).await
    }

    pub(crate) async fn raw_with(&self, startup: &[(&str, &str)]) -> Raw {
        Raw::login(self.port, &self.user, &self.database, startup).await
    }

    /// The same without the proxy between.
    pub(crate) async fn raw_direct(&self) -> Raw {
        Raw::login_url(&self.direct_url, &[]).await
    }

    /// A number of the registry as `/metrics` shows it: `name` with its labels, exactly as rendered. 0 if there is none.
    pub(crate) fn metric(&self, name: &str) -> u64 {
        let text = self.app.registry.render();
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.map_or(0, |value| value.trim().parse::<f64>().unwrap() as u64)
    }

    /// Requests answered by `primary`, `replica` or `flowgate` so far.
    pub(crate) fn requests(&self, to: &str) -> u64 {
        self.metric(&format!("flowgate_requests_total{{to=\"{to}\"}}"))
    }

    /// As if the operator had written that.
    pub(crate) async fn reload_as(&self, config: &Config) -> Result<Reloaded, NotReloaded> {
        self.next.lock().unwrap().clone_from(config);
        self.reload().await
    }

    pub(crate) async fn shut_down(self) {
        timeout(PATIENCE, self.app.shut_down()).await.unwrap();
    }
}

pub(crate) async fn connect(url: &str) -> Client {
    connect_hearing(url).await.0
}

pub(crate) async fn connect_hearing(url: &str) -> (Client, Hearing) {
    try_connect_hearing(url).await.unwrap()
}

pub(crate) async fn try_connect(url: &str) -> Result<Client, tokio_postgres::Error> {
    Ok(try_connect_hearing(url).await?.0)
}

pub(crate) async fn try_connect_hearing(
    url: &str,
) -> Result<(Client, Hearing), tokio_postgres::Error> {
    let (client, mut connection) = timeout(PATIENCE, tokio_postgres::connect(url, NoTls))
        .await
        .unwrap()?;
    // More than any test sends without reading.
    let (told, messages) = mpsc::channel(100_000);
    tokio::spawn(async move {
        let mut news = futures_util::stream::poll_fn(move |cx| connection.poll_message(cx));
        while let Some(message) = news.next().await {
            let broken = message.is_err();
            // Most clients do not look at what was said unasked; theirs is dropped.
            drop(told.try_send(message));
            if broken {
                break;
            }
        }
    });
    Ok((client, Hearing(messages)))
}

/// What a server said unasked: notices, notifications, and how the connection ended.
pub(crate) struct Hearing(mpsc::Receiver<Result<AsyncMessage, tokio_postgres::Error>>);

impl Hearing {
    /// The next message; `None` once the connection has ended without an error.
    pub(crate) async fn next(&mut self) -> Option<Result<AsyncMessage, tokio_postgres::Error>> {
        timeout(PATIENCE, self.0.recv())
            .await
            .expect("the server said nothing")
    }

    /// The same for those who have a deadline of their own.
    pub(crate) async fn next_however_late(
        &mut self,
    ) -> Option<Result<AsyncMessage, tokio_postgres::Error>> {
        self.0.recv().await
    }

    /// The next notification; notices are passed over.
    pub(crate) async fn notification(&mut self) -> Notification {
        loop {
            match self.next().await {
                Some(Ok(AsyncMessage::Notification(notification))) => return notification,
                Some(Ok(_notice)) => {}
                other => panic!("expected a notification, not {other:?}"),
            }
        }
    }

    /// What has come until now and was not asked for yet.
    pub(crate) fn now(&mut self) -> Vec<Result<AsyncMessage, tokio_postgres::Error>> {
        std::iter::from_fn(|| self.0.try_recv().ok()).collect()
    }
}

/// The first column of the only row, as text, by the simple protocol.
pub(crate) async fn text(client: &Client, sql: &str) -> String {
    try_text(client, sql)
        .await
        .unwrap_or_else(|error| panic!("{sql}: {error:?}"))
}

pub(crate) async fn try_text(client: &Client, sql: &str) -> Result<String, tokio_postgres::Error> {
    let messages = timeout(PATIENCE, client.simple_query(sql))
        .await
        .expect("an answer in time")?;
    let row = messages.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => Some(row.get(0).unwrap_or("null").to_owned()),
        _ => None,
    });
    Ok(row.unwrap_or_default())
}

/// Rows by column name, nulls left out.
pub(crate) type Table = Vec<std::collections::BTreeMap<String, String>>;

/// What a SHOW of the console shows.
pub(crate) async fn table(console: &Client, show: &str) -> Table {
    let messages = timeout(PATIENCE, console.simple_query(show))
        .await
        .expect("an answer in time")
        .unwrap_or_else(|error| panic!("{show}: {error:?}"));
    let row = |message: SimpleQueryMessage| match message {
        SimpleQueryMessage::Row(row) => {
            let columns = row.columns().iter().enumerate();
            let named = columns.filter_map(|(at, column)| {
                Some((column.name().to_owned(), row.get(at)?.to_owned()))
            });
            Some(named.collect())
        }
        _ => None,
    };
    messages.into_iter().filter_map(row).collect()
}

/// The row of a SHOW whose column reads so.
pub(crate) async fn row(
    console: &Client,
    show: &str,
    column: &str,
    value: &str,
) -> std::collections::BTreeMap<String, String> {
    let rows = table(console, show).await;
    let found = rows
        .iter()
        .find(|row| row.get(column).map(String::as_str) == Some(value));
    found
        .unwrap_or_else(|| panic!("{show}: no {column} = {value} in {rows:?}"))
        .clone()
}

/// The SQLSTATE of what must be an error of the server's.
pub(crate) fn sqlstate<T>(outcome: Result<T, tokio_postgres::Error>) -> String {
    let error = outcome.err().expect("an error");
    error
        .code()
        .unwrap_or_else(|| panic!("no SQLSTATE: {error:?}"))
        .code()
        .to_owned()
}
