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
    TxStatus, parameter_status, put_cstr, put_empty, put_frame, put_parse, put_query,
    put_statement_target,
};

/// Proof that a server may be shared: no transaction, nothing in flight, nothing unread, nothing done that is not known.
pub(crate) struct Clean(());

#[derive(Debug, Error)]
pub(crate) enum ResetError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("the server said {message}")]
    Refused { code: String, message: String },
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
    server.probes = false;
    server.hidden = false;
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
    // A text that Postgres refuses by now must not end the client's transaction.
    let nested = server.tx == TxStatus::InTransaction && !text.is_empty();
    if nested {
        command(server, "SAVEPOINT flowgate_lent").await?;
    }
    put_statement_target(&mut server.stream.output, b'C', name);
    put_parse(&mut server.stream.output, name, text, types);
    server.lent.push(name.to_vec());
    match sync(server).await {
        Ok(()) | Err(ResetError::Refused { .. }) => {}
        Err(error) => return Err(error),
    }
    if nested {
        let back = match server.tx {
            TxStatus::Failed => "ROLLBACK TO flowgate_lent; ",
            TxStatus::Idle | TxStatus::InTransaction => "",
        };
        command(server, &format!("{back}RELEASE flowgate_lent")).await?;
    }
    Ok(())
}

/// Takes away what was prepared for clients under our own names.
pub(crate) async fn forget_statements(server: &mut ServerConn) -> Result<(), ResetError> {
    for id in server.statements.take_all() {
        put_statement_target(&mut server.stream.output, b'C', &id.server_name());
    }
    for name in server.to_close.drain(..) {
        put_statement_target(&mut server.stream.output, b'C', &name);
    }
    if std::mem::take(&mut server.probes) {
        put_statement_target(&mut server.stream.output, b'C', PROBE_NAME);
    }
    sync(server).await
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
    if server.hidden {
        forget_hidden(server).await?;
    }
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

/// What a session may hold that statements do not tell. `$1`: the settings that are known to be set; `$2`: the user, if nobody
/// has set a role; `$3`: settings are asked for, which takes ten times as long as all else. Settings that no library has defined (`my.own`) are in no view.
const PROBE: &str = "\
    select 'role' where current_user <> session_user and $2 <> '' or session_user <> $2 and $2 <> '' \
    union all select 'temp' where pg_catalog.pg_my_temp_schema() <> 0 and exists (select from pg_catalog.pg_depend \
        where refclassid = 'pg_catalog.pg_namespace'::pg_catalog.regclass and refobjid = pg_catalog.pg_my_temp_schema()) \
    union all select 'cursor' from pg_catalog.pg_cursor() c where c.name <> '' \
    union all select 'statement' from pg_catalog.pg_prepared_statement() p where p.from_sql \
    union all select 'lock' from pg_catalog.pg_lock_status() l where l.locktype = 'advisory' and l.pid = pg_catalog.pg_backend_pid() \
    union all select 'setting' from pg_catalog.pg_show_all_settings() s \
        where $3 and s.source = 'session' and pg_catalog.lower(s.name) <> all ($1) \
    union all select 'channel ' || c from pg_catalog.pg_listening_channels() c";
const PROBE_NAME: &[u8] = b"flowgate_probe";
/// text[], text, bool.
const PROBE_TYPES: &[u8] = &[0, 3, 0, 0, 3, 241, 0, 0, 0, 25, 0, 0, 0, 16];

/// What code that nobody has seen left on the server.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Found {
    /// Only this server has it.
    pub(crate) state: bool,
    pub(crate) temp: bool,
    pub(crate) setting: bool,
    pub(crate) channels: Vec<String>,
}

/// Asks a server, outside a transaction, what it holds beyond `server.settings`.
pub(crate) async fn probe(server: &mut ServerConn, settings: bool) -> Result<Found, ResetError> {
    let mut names = String::from("{");
    for name in server.settings.names() {
        let separator = if names.len() == 1 { "" } else { "," };
        let name = name.replace('\\', "\\\\").replace('"', "\\\"");
        names.push_str(&format!("{separator}\"{name}\""));
    }
    names.push('}');
    let user = if server.settings.keeps_roles() {
        server.opening.user.as_str()
    } else {
        ""
    };
    let out = &mut server.stream.output;
    if !server.probes {
        put_statement_target(out, b'C', PROBE_NAME);
        put_parse(out, PROBE_NAME, PROBE.as_bytes(), PROBE_TYPES);
    }
    put_frame(out, b'B', |out| {
        put_cstr(out, b"");
        put_cstr(out, PROBE_NAME);
        out.extend_from_slice(&[0, 0, 0, 3]);
        for value in [names.as_str(), user, if settings { "t" } else { "f" }] {
            let length = u32::try_from(value.len()).unwrap_or(0);
            out.extend_from_slice(&length.to_be_bytes());
            out.extend_from_slice(value.as_bytes());
        }
        out.extend_from_slice(&[0, 0]);
    });
    put_frame(out, b'E', |out| out.extend_from_slice(&[0; 5]));
    put_empty(out, b'S');
    server.probes = false;
    server.in_flight = true;
    server.stream.flush().await?;
    let rows = to_ready(server).await?;
    server.probes = true;
    let mut found = Found::default();
    for row in rows {
        match row.strip_prefix("channel ") {
            Some(channel) => found.channels.push(channel.to_owned()),
            None => {
                found.state = true;
                found.temp |= row == "temp";
                found.setting |= row == "setting";
            }
        }
    }
    Ok(found)
}

/// Undoes what settings code that nobody has seen may have made, and all others.
pub(crate) async fn forget_hidden(server: &mut ServerConn) -> Result<(), ResetError> {
    command(server, "RESET SESSION AUTHORIZATION;RESET ROLE;RESET ALL").await?;
    server.hidden = false;
    forget_settings_but(server, &Settings::default());
    Ok(())
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
            b'E' => refused = Some(refusal(body)),
            b'Z' => {
                let status = body.first().copied().and_then(TxStatus::from_byte);
                server.stream.input.consume(header.whole);
                server.tx = status.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
                server.in_flight = false;
                return refused.map_or(Ok(rows), Err);
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
            b'E' => return Err(refusal(body)),
            other => {
                return Err(ResetError::Refused {
                    code: "08P01".to_owned(),
                    message: format!("an unexpected message {:?}", char::from(other)),
                });
            }
        }
        server.stream.input.consume(header.whole);
        if server.stream.input.is_empty() {
            return Ok(());
        }
    }
}

/// What an ErrorResponse says.
fn refusal(body: &[u8]) -> ResetError {
    let said = |name| String::from_utf8_lossy(field(body, name).unwrap_or_default()).into_owned();
    ResetError::Refused {
        code: said(b'C'),
        message: said(b'M'),
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
