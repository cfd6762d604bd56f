//! A small pool of the control role's connections, and the one way to ask something there as somebody else: one transaction, one
//! round trip, the role and its settings set for that transaction alone. Knows neither HTTP nor events; called by `events/sight`
//! and the surfaces of `http`.
//!
//! INVARIANT: a connection goes back only after its transaction has ended in a way we have seen. Dropping a question half-way
//! closes it, so that nobody is ever answered under another's role.

use std::pin::pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::TryStreamExt;
use ring::digest;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_postgres::{Client, SimpleQueryMessage};

use super::control::{dial, words};
use crate::config::ConnectUrl;
use crate::metrics::Counter;
use crate::wire::quote::{ident, literal};

/// What a question may take in Postgres.
const STATEMENT_MAX: &str = "15s";
/// And before we stop waiting for an upstream that says nothing at all.
const SILENCE_MAX: Duration = Duration::from_secs(20);
/// Columns by which rows are told apart.
const BEFORE: &str = "flowgate_before";
const SET: &str = "flowgate_set";

/// As whom something is asked: a role, and the settings that its policies may read.
#[derive(Debug)]
pub(crate) struct Asker {
    pub(crate) role: String,
    pub(crate) settings: Vec<(String, String)>,
    /// The same for the same role and settings, and for nobody else.
    pub(crate) print: [u8; 32],
}

impl Asker {
    pub(crate) fn new(role: String, settings: Vec<(String, String)>) -> Self {
        let mut all = digest::Context::new(&digest::SHA256);
        let both = settings
            .iter()
            .flat_map(|(name, value)| [name.as_str(), value.as_str()]);
        for word in std::iter::once(role.as_str()).chain(both) {
            all.update(&word.len().to_be_bytes());
            all.update(word.as_bytes());
        }
        let mut print = [0; 32];
        print.copy_from_slice(all.finish().as_ref());
        Self {
            role,
            settings,
            print,
        }
    }
}

pub(crate) struct Database {
    url: ConnectUrl,
    application: &'static str,
    wait: Duration,
    dial: Duration,
    permits: Arc<Semaphore>,
    idle: Mutex<Vec<Kept>>,
    refused: Arc<Counter>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// One snapshot for all of it.
    Read,
    Write,
}

/// What is asked. `sql` gives the answer's rows; all values in it are quoted by whoever wrote it.
pub(crate) struct Question<'a> {
    /// `None`: the control role itself.
    pub(crate) asker: Option<&'a Asker>,
    /// A query of one row and column named `flowgate_before`, as the control role.
    pub(crate) before: &'a str,
    /// `request.method` and the like.
    pub(crate) settings: &'a [(&'a str, &'a str)],
    pub(crate) access: Access,
    pub(crate) sql: &'a str,
}

#[derive(Debug, Default)]
pub(crate) struct Answer {
    pub(crate) before: Option<String>,
    pub(crate) rows: Vec<Vec<Option<String>>>,
}

impl Answer {
    /// The first column of the first row.
    pub(crate) fn single(self) -> Option<String> {
        self.rows.into_iter().next()?.into_iter().next()?
    }
}

#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum DbError {
    #[error("no database connection within {0:?}")]
    Busy(Duration),
    #[error("the database cannot be reached: {0}")]
    Unreachable(String),
    /// The role cannot be taken.
    #[error("{0}")]
    Role(String),
    #[error("{message}")]
    Postgres {
        code: String,
        message: String,
        detail: Option<String>,
        hint: Option<String>,
    },
}

impl DbError {
    /// Something was in the way; nobody has said no.
    pub(crate) fn is_passing(&self) -> bool {
        match self {
            Self::Busy(_) | Self::Unreachable(_) => true,
            Self::Role(_) => false,
            Self::Postgres { code, .. } => ["40", "53", "55P03", "57", "58"]
                .iter()
                .any(|class| code.starts_with(class)),
        }
    }
}

struct Kept {
    client: Client,
    connection: JoinHandle<()>,
}

struct Lease {
    kept: Option<Kept>,
    fresh: bool,
    permit: Option<OwnedSemaphorePermit>,
}

/// Dropped half-way, its statement goes on in Postgres: the place is free when that has ended.
impl Drop for Lease {
    fn drop(&mut self) {
        let (Some(kept), permit) = (self.kept.take(), self.permit.take()) else {
            return;
        };
        let Kept { client, connection } = kept;
        drop(client);
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move {
                drop(timeout(SILENCE_MAX, connection).await);
                drop(permit);
            });
        }
    }
}

impl Database {
    /// No more than `size` connections; who finds none free within `wait` is told so, and counted. `dial`: what connecting may
    /// take.
    pub(crate) fn new(
        url: ConnectUrl,
        application: &'static str,
        size: usize,
        wait: Duration,
        dial: Duration,
        refused: Arc<Counter>,
    ) -> Self {
        Self {
            url,
            application,
            wait,
            dial,
            permits: Arc::new(Semaphore::new(size)),
            idle: Mutex::default(),
            refused,
        }
    }

    /// Keeps no connection open that nobody uses.
    pub(crate) fn rest(&self) {
        self.idle().clear();
    }

    /// As the control role.
    pub(crate) async fn ask_ourselves(&self, sql: &str) -> Result<Answer, DbError> {
        self.ask(&Question {
            asker: None,
            before: "",
            settings: &[],
            access: Access::Read,
            sql,
        })
        .await
    }

    /// What only reads is asked once more if a kept connection turns out to be dead.
    pub(crate) async fn ask(&self, question: &Question<'_>) -> Result<Answer, DbError> {
        // On the heap: streams wait by the thousand, and each would have room in it for all that dialling takes.
        Box::pin(self.asked(question)).await
    }

    async fn asked(&self, question: &Question<'_>) -> Result<Answer, DbError> {
        // Quoted or not, SET ROLE takes that word for the login role itself. (sql-set-role.html)
        if let Some(asker) = question.asker.filter(|asker| asker.role == "none") {
            let role = &asker.role;
            return Err(DbError::Role(format!("role \"{role}\" cannot be taken")));
        }
        let script = script(question);
        loop {
            let lease = self.lease().await?;
            let again = !lease.fresh && question.access == Access::Read;
            match self.run(lease, &script, question.asker.is_some()).await {
                Err(DbError::Unreachable(_)) if again => {}
                other => return other,
            }
        }
    }

    async fn lease(&self) -> Result<Lease, DbError> {
        let permit = timeout(self.wait, Arc::clone(&self.permits).acquire_owned()).await;
        let Ok(Ok(permit)) = permit else {
            self.refused.inc();
            return Err(DbError::Busy(self.wait));
        };
        loop {
            let idle = self.idle().pop();
            match idle {
                Some(kept) if kept.client.is_closed() => {}
                Some(kept) => {
                    return Ok(Lease {
                        kept: Some(kept),
                        fresh: false,
                        permit: Some(permit),
                    });
                }
                None => break,
            }
        }
        let (client, connection) = dial(&self.url, self.application, self.dial)
            .await
            .map_err(|error| DbError::Unreachable(words(&error)))?;
        // Ends with its client.
        let connection = tokio::spawn(async move { drop(connection.await) });
        Ok(Lease {
            kept: Some(Kept { client, connection }),
            fresh: true,
            permit: Some(permit),
        })
    }

    async fn run(&self, mut lease: Lease, script: &str, as_other: bool) -> Result<Answer, DbError> {
        let Some(Kept { client, .. }) = &lease.kept else {
            return Err(DbError::Unreachable("no connection".to_owned()));
        };
        let mut answer = Answer::default();
        let mut role_set = !as_other;
        let asked = timeout(
            SILENCE_MAX,
            gather(client, script, &mut answer, &mut role_set),
        )
        .await
        .map_err(|_elapsed| DbError::Unreachable(format!("no answer within {SILENCE_MAX:?}")))?;
        let outcome = match asked {
            Ok(()) => Ok(answer),
            Err(error) => {
                let failed = failure(&error, role_set);
                if matches!(failed, DbError::Unreachable(_)) {
                    return Err(failed);
                }
                let undone = timeout(SILENCE_MAX, client.batch_execute("rollback")).await;
                if !matches!(undone, Ok(Ok(()))) {
                    return Err(failed);
                }
                Err(failed)
            }
        };
        if let Some(kept) = lease.kept.take() {
            self.idle().push(kept);
        }
        outcome
    }

    /// Pushing and popping leave nothing half-done.
    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<Kept>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn script(question: &Question<'_>) -> String {
    let mode = match question.access {
        Access::Read => "isolation level repeatable read read only",
        Access::Write => "isolation level read committed read write",
    };
    // As ourselves, nobody else's functions are found.
    let mut script = format!(
        "begin transaction {mode}; set local statement_timeout = '{STATEMENT_MAX}'; set local search_path = ''; "
    );
    if !question.before.is_empty() {
        script += question.before;
        script += "; ";
    }
    if let Some(asker) = question.asker {
        script += &format!(
            "set local role {}; select true as {SET}",
            ident(&asker.role)
        );
        let own = asker.settings.iter();
        let own = own.map(|(name, value)| (name.as_str(), value.as_str()));
        for (name, value) in own.chain(question.settings.iter().copied()) {
            script += &format!(", set_config({}, {}, true)", literal(name), literal(value));
        }
        script += "; set local search_path = 'pgflow', 'public'; ";
    }
    script + question.sql + "; commit"
}

async fn gather(
    client: &Client,
    script: &str,
    answer: &mut Answer,
    role_set: &mut bool,
) -> Result<(), tokio_postgres::Error> {
    let mut messages = pin!(client.simple_query_raw(script).await?);
    while let Some(message) = messages.try_next().await? {
        let SimpleQueryMessage::Row(row) = message else {
            continue;
        };
        match row.columns().first().map(|column| column.name()) {
            Some(BEFORE) => answer.before = row.get(0).map(str::to_owned),
            Some(SET) => *role_set = true,
            _ => {
                let columns = (0..row.len()).map(|at| row.get(at).map(str::to_owned));
                answer.rows.push(columns.collect());
            }
        }
    }
    Ok(())
}

fn failure(error: &tokio_postgres::Error, role_set: bool) -> DbError {
    let Some(said) = error.as_db_error() else {
        return DbError::Unreachable(words(error));
    };
    // What ends the session leaves nothing to roll back.
    if said.code().code().starts_with("57P0") {
        return DbError::Unreachable(said.message().to_owned());
    }
    let refusals = ["42501", "22023", "42704", "0P000"];
    if !role_set && refusals.contains(&said.code().code()) {
        return DbError::Role(said.message().to_owned());
    }
    DbError::Postgres {
        code: said.code().code().to_owned(),
        message: said.message().to_owned(),
        detail: said.detail().map(str::to_owned),
        hint: said.hint().map(str::to_owned),
    }
}
