//! Making a server fit for whoever comes next, and proving it. The only maker of `Clean`. Speaks to servers nobody is
//! using at that moment; never to clients. Called by `checkout.rs` and `client/session`.

use std::io;
use std::sync::Arc;

use thiserror::Error;

use crate::server::conn::ServerConn;
use crate::server::settings::Settings;
use crate::wire::error_response::field;
use crate::wire::frame;
use crate::wire::messages::{
    TxStatus, parameter_status, put_empty, put_parse, put_query, put_statement_target,
};

/// Proof that a server may be shared: no transaction, nothing in flight, nothing unread, nothing done that is not known.
pub(crate) struct Clean(());

#[derive(Debug, Error)]
pub(crate) enum ResetError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the server said {0}")]
    Refused(String),
}

/// Frames of our own questions and of asynchronous messages: errors, notices, parameters.
const FRAME_MAX: usize = 1024 * 1024;

pub(crate) fn prove(server: &ServerConn) -> Option<Clean> {
    let quiet =
        server.tx == TxStatus::Idle && !server.in_flight && !server.stream.at_eof && !server.unfit;
    let empty = server.stream.input.is_empty() && server.stream.output.is_empty();
    let known = !server.unbooked && server.lent.is_empty();
    (quiet && empty && known).then_some(Clean(()))
}

/// Rolls back what is open and forgets all of the session's state (`DISCARD ALL`), keeping the connection.
/// (sql-discard.html)
pub(crate) async fn discard(server: &mut ServerConn) -> Result<(), ResetError> {
    if server.tx != TxStatus::Idle {
        command(server, "ROLLBACK").await?;
    }
    command(server, "DISCARD ALL").await?;
    server.statements.clear();
    server.to_close.clear();
    server.lent.clear();
    server.unnamed = None;
    forget_settings_but(server, &Settings::default());
    Ok(())
}

/// Forgets what was drawn from sequences, by whomever. (sql-discard.html)
pub(crate) async fn forget_draws(server: &mut ServerConn) -> Result<(), ResetError> {
    command(server, "DISCARD SEQUENCES").await?;
    server.mixed_draws = false;
    Ok(())
}

/// Rolls back what is open, keeping the session's state.
pub(crate) async fn roll_back(server: &mut ServerConn) -> Result<(), ResetError> {
    if server.tx != TxStatus::Idle {
        command(server, "ROLLBACK").await?;
    }
    Ok(())
}

/// After `DISCARD ALL` or `RESET ALL` a session has the values it was opened with: all else is as in `settings`, but the
/// application's name is that of the client it was opened for.
pub(crate) fn forget_settings_but(server: &mut ServerConn, settings: &Settings) {
    let start = Settings::named(server.reported.find("application_name").unwrap_or_default());
    server.settings = Arc::new(settings.renamed_as(&start));
}

/// Ends an extended request that ran nothing: a Sync, and all up to its ReadyForQuery is dropped.
pub(crate) async fn sync(server: &mut ServerConn) -> Result<(), ResetError> {
    put_empty(&mut server.stream.output, b'S');
    server.in_flight = true;
    server.stream.flush().await?;
    to_ready(server).await.map(drop)
}

/// Prepares a text under a client's own name, for SQL that names it; should Postgres refuse it, nothing has changed.
pub(crate) async fn lend_statement(
    server: &mut ServerConn,
    name: &[u8],
    text: &[u8],
    types: &[u8],
) -> Result<(), ResetError> {
    put_statement_target(&mut server.stream.output, b'C', name);
    put_parse(&mut server.stream.output, name, text, types);
    server.lent.push(name.to_vec());
    match sync(server).await {
        Ok(()) | Err(ResetError::Refused(_)) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Takes away what was prepared under a client's own names.
pub(crate) async fn take_back_statements(server: &mut ServerConn) -> Result<(), ResetError> {
    if server.lent.is_empty() {
        return Ok(());
    }
    for name in &server.lent {
        put_statement_target(&mut server.stream.output, b'C', name);
    }
    sync(server).await?;
    server.lent.clear();
    Ok(())
}

/// Makes a server's settings those of a session that has set nothing.
pub(crate) async fn unset_all(server: &mut ServerConn) -> Result<(), ResetError> {
    // But its name, which no login is told by a server.
    let unset = Settings::default().renamed_as(&server.settings);
    let script = server.settings.script_to(&unset);
    if !script.is_empty() {
        command(server, &script).await?;
        server.settings = Arc::new(unset);
    }
    Ok(())
}

/// Runs one statement of ours and returns the first column of its rows.
pub(crate) async fn command(
    server: &mut ServerConn,
    text: &str,
) -> Result<Vec<String>, ResetError> {
    put_query(&mut server.stream.output, text);
    server.in_flight = true;
    server.unnamed = None;
    server.stream.flush().await?;
    to_ready(server).await
}

async fn to_ready(server: &mut ServerConn) -> Result<Vec<String>, ResetError> {
    let mut rows = Vec::new();
    let mut refused = None;
    loop {
        let header = server.stream.next_frame(FRAME_MAX).await?;
        let body = frame::body(server.stream.input.bytes(), header).unwrap_or_default();
        match header.tag {
            b'D' => {
                let value = crate::wire::messages::first_column(body).unwrap_or_default();
                rows.push(String::from_utf8_lossy(value).into_owned());
            }
            b'S' => note_parameter(&mut server.reported, body),
            b'A' => {
                let frame = server.stream.input.bytes().get(..header.whole);
                if let (Some(heard), Some(frame)) = (&mut server.heard, frame) {
                    heard.push(frame);
                }
            }
            b'E' => {
                refused = Some(
                    String::from_utf8_lossy(field(body, b'M').unwrap_or_default()).into_owned(),
                )
            }
            b'Z' => {
                let status = body.first().copied().and_then(TxStatus::from_byte);
                server.stream.input.consume(header.whole);
                server.tx = status.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
                server.in_flight = false;
                return refused.map_or(Ok(rows), |message| Err(ResetError::Refused(message)));
            }
            _ => {}
        }
        server.stream.input.consume(header.whole);
    }
}

/// Takes in what an idle server said unasked. An ErrorResponse is a farewell.
pub(crate) async fn absorb(server: &mut ServerConn) -> Result<(), ResetError> {
    loop {
        let header = server.stream.next_frame(FRAME_MAX).await?;
        let body = frame::body(server.stream.input.bytes(), header).unwrap_or_default();
        match header.tag {
            b'S' => note_parameter(&mut server.reported, body),
            b'N' | b'A' => {}
            b'E' => {
                let message =
                    String::from_utf8_lossy(field(body, b'M').unwrap_or_default()).into_owned();
                return Err(ResetError::Refused(message));
            }
            other => {
                return Err(ResetError::Refused(format!(
                    "an unexpected message {:?}",
                    char::from(other)
                )));
            }
        }
        server.stream.input.consume(header.whole);
        if server.stream.input.is_empty() {
            return Ok(());
        }
    }
}

pub(crate) fn note_parameter(reported: &mut crate::server::parameters::Reported, body: &[u8]) {
    if let Some((name, value)) = parameter_status(body) {
        reported.set(
            &String::from_utf8_lossy(name),
            &String::from_utf8_lossy(value),
        );
    }
}
