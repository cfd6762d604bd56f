//! Password verifiers of clients: from a users file, or asked of Postgres by the control role (`auth.query`). Knows no
//! exchange, `auth.rs` does. (DESIGN §5; PgBouncer's `auth_file` and `auth_query` are the model)

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::Mutex;
use tokio::time::timeout;
use tracing::warn;

use crate::config::{self, ConnectUrl};
use crate::server::control;
use crate::wire::scram::Verifier;

#[derive(Debug, Error)]
pub enum VerifierError {
    #[error("auth.users_file: {0}")]
    File(#[source] std::io::Error),
    #[error("auth.users_file: line {0} is not `\"user\" \"secret\"`")]
    Line(usize),
    #[error("auth.query: {0}")]
    Query(String),
}

/// How long the control role may take to answer.
const QUERY_MAX: Duration = Duration::from_secs(5);
const APPLICATION: &str = "flowgate auth";
/// The salt of verifiers made from plain passwords has as many bytes as Postgres uses.
const SALT_LEN: usize = 16;

pub(crate) struct Verifiers {
    file: HashMap<String, Secret>,
    control: ConnectUrl,
    query: String,
    client: Mutex<Option<tokio_postgres::Client>>,
    /// Makes mock verifiers of unknown users.
    pub(super) mock_secret: [u8; 32],
}

/// What the users file says of a user.
struct Secret {
    verifier: Verifier,
    password: Option<Arc<str>>,
}

impl Verifiers {
    pub(crate) fn new(auth: &config::Auth, control: &ConnectUrl) -> Result<Self, VerifierError> {
        let mut mock_secret = [0; 32];
        getrandom::fill(&mut mock_secret)
            .map_err(|e| VerifierError::File(std::io::Error::other(e)))?;
        Self::with(auth, control, mock_secret)
    }

    /// Reads the file anew. The salts of users who do not exist stay what they were, as those of users who do.
    pub(crate) fn renewed(
        &self,
        auth: &config::Auth,
        control: &ConnectUrl,
    ) -> Result<Self, VerifierError> {
        let mut renewed = Self::with(auth, control, self.mock_secret)?;
        for (user, secret) in &mut renewed.file {
            if let Some(before) = self.file.get(user)
                && secret.password.is_some()
                && before.password == secret.password
            {
                secret.verifier = before.verifier.clone();
            }
        }
        Ok(renewed)
    }

    fn with(
        auth: &config::Auth,
        control: &ConnectUrl,
        mock_secret: [u8; 32],
    ) -> Result<Self, VerifierError> {
        let file = match &auth.users_file {
            Some(path) => read_users(path)?,
            None => HashMap::new(),
        };
        Ok(Self {
            file,
            control: control.clone(),
            query: auth.query.clone(),
            client: Mutex::default(),
            mock_secret,
        })
    }

    /// The plain password of `user`, where the users file has it: it logs in to Postgres as well, whose salt is another.
    pub(super) fn password(&self, user: &str) -> Option<Arc<str>> {
        self.file
            .get(user)
            .and_then(|secret| secret.password.clone())
    }

    /// The verifier of `user`; `None` for an unknown user, or one without a SCRAM password.
    pub(crate) async fn find(&self, user: &str) -> Result<Option<Verifier>, VerifierError> {
        if let Some(secret) = self.file.get(user) {
            return Ok(Some(secret.verifier.clone()));
        }
        if self.query.is_empty() {
            return Ok(None);
        }
        timeout(QUERY_MAX, self.ask(user))
            .await
            .unwrap_or_else(|_late| Err(VerifierError::Query("no answer in time".into())))
    }

    /// Whether Postgres has a database of that name.
    pub(super) async fn has_database(&self, name: &str) -> Result<bool, VerifierError> {
        const DATABASE: &str =
            "select from pg_catalog.pg_database where datname = $1 and not datistemplate";
        let asked = self.row(DATABASE, name);
        let row = timeout(QUERY_MAX, asked)
            .await
            .unwrap_or_else(|_late| Err(VerifierError::Query("no answer in time".into())))?;
        Ok(row.is_some())
    }

    async fn ask(&self, user: &str) -> Result<Option<Verifier>, VerifierError> {
        let row = self.row(&self.query, user).await?;
        let secret = row
            .map(|row| row.try_get::<_, Option<String>>(1))
            .transpose();
        let secret = secret
            .map_err(|error| VerifierError::Query(error.to_string()))?
            .flatten();
        Ok(secret.and_then(|secret| {
            let verifier = Verifier::parse(&secret);
            if verifier.is_none() {
                warn!(
                    user,
                    "the user's stored password is no SCRAM-SHA-256 verifier, so they cannot log in"
                );
            }
            verifier
        }))
    }

    async fn row(
        &self,
        query: &str,
        name: &str,
    ) -> Result<Option<tokio_postgres::Row>, VerifierError> {
        let mut held = self.client.lock().await;
        let client = match held.take().filter(|client| !client.is_closed()) {
            Some(client) => client,
            None => {
                let dialled = control::dial(&self.control, APPLICATION, QUERY_MAX).await;
                let (client, connection) =
                    dialled.map_err(|error| VerifierError::Query(error.to_string()))?;
                // Ends with the client; an error shows at the next query.
                tokio::spawn(async move { drop(connection.await) });
                client
            }
        };
        let answer = client.query_opt(query, &[&name]).await;
        let row = answer.map_err(|error| VerifierError::Query(error.to_string()))?;
        *held = Some(client);
        Ok(row)
    }
}

/// `"user" "secret"` a line, as PgBouncer's `userlist.txt`; the secret a SCRAM verifier or a plain password.
fn read_users(path: &Path) -> Result<HashMap<String, Secret>, VerifierError> {
    let text = std::fs::read_to_string(path).map_err(VerifierError::File)?;
    let mut users = HashMap::new();
    for (at, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with(';') || line.starts_with('#') {
            continue;
        }
        let (user, secret) = read_line(line).ok_or(VerifierError::Line(at + 1))?;
        let known = match Verifier::parse(&secret) {
            Some(verifier) => Secret {
                verifier,
                password: None,
            },
            None => {
                let mut salt = vec![0; SALT_LEN];
                getrandom::fill(&mut salt)
                    .map_err(|e| VerifierError::File(std::io::Error::other(e)))?;
                Secret {
                    verifier: Verifier::of_password(&secret, salt),
                    password: Some(secret.into()),
                }
            }
        };
        users.insert(user, known);
    }
    Ok(users)
}

pub(crate) fn read_line(line: &str) -> Option<(String, String)> {
    let mut rest = line;
    let mut next = || -> Option<String> {
        rest = rest.trim_start().strip_prefix('"')?;
        let mut text = String::new();
        loop {
            let (before, after) = rest.split_once('"')?;
            text.push_str(before);
            rest = after;
            match after.strip_prefix('"') {
                Some(doubled) => {
                    text.push('"');
                    rest = doubled;
                }
                None => return Some(text),
            }
        }
    };
    Some((next()?, next()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_pgbouncer_writes_them() {
        assert_eq!(
            read_line(r#""bob" "pa""ss""#),
            Some(("bob".into(), "pa\"ss".into()))
        );
        assert_eq!(read_line(r#""bob""#), None);
        assert_eq!(read_line("bob pass"), None);
    }
}
