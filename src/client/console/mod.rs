//! The admin console: database `flowgate` of the proxy's own port, in PgBouncer's words. Speaks the simple and the extended
//! protocol, each command by itself; `command.rs` reads, `tables.rs` shows, and what is done stands here. Admins may do
//! everything, stats users SHOW; nobody else gets in. Called by `startup.rs`.
//!
//! Why transactions are accepted and mean nothing: drivers open them unasked, and what the console does cannot be undone.

mod command;
mod tables;

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::oneshot;

use self::command::{Command, PARAMETERS};
use self::tables::{Column, Row};
use super::error::SessionError;
use super::live::ConsoleRole;
use super::roster::{Kind, Newcomer};
use super::shared::{Manner, NotReloaded, Order, Reloaded, Shared};
use crate::cancel::CancelKey;
use crate::server::parameters::Opening;
use crate::wire::error_response::ErrorResponse;
use crate::wire::frame::{self, Header};
use crate::wire::messages::{
    Bind, Parse, Target, TxStatus, put_backend_key, put_columns, put_command_complete, put_empty,
    put_frame, put_parameter_status, put_ready, put_row,
};
use crate::wire::stream::Stream;

/// The longest message.
const FRAME_MAX: usize = 64 * 1024;
/// Statements and portals one client may hold.
const HELD_MAX: usize = 1_000;
/// An answer leaves in pieces of this size.
const PIECE: usize = 64 * 1024;

/// A user who was let in.
pub(super) struct Admitted {
    role: ConsoleRole,
    id: u64,
    peer: SocketAddr,
    key: CancelKey,
    opening: Arc<Opening>,
    application_name: String,
}

impl Admitted {
    pub(super) fn new(
        role: ConsoleRole,
        id: u64,
        peer: SocketAddr,
        key: CancelKey,
        opening: &Arc<Opening>,
        application_name: &str,
    ) -> Self {
        Self {
            role,
            id,
            peer,
            key,
            opening: Arc::clone(opening),
            application_name: application_name.to_owned(),
        }
    }
}

/// Why others are not.
pub(super) fn refusal() -> ErrorResponse {
    ErrorResponse::fatal("42501", "permission denied for database \"flowgate\"")
        .with_detail("The admin console is for console.admin_users and console.stats_users alone.")
}

/// The pid a console client is told: there is no process behind it.
pub(super) fn pid(client: u64) -> u32 {
    u32::try_from(client & 0x7fff_ffff).unwrap_or(0)
}

/// What follows AuthenticationOk.
pub(super) fn put_greeting(out: &mut Vec<u8>, key: &CancelKey) {
    for (name, value) in PARAMETERS {
        put_parameter_status(out, name, value);
    }
    put_backend_key(out, key.pid, &key.secret);
    put_ready(out, TxStatus::Idle);
}

/// Answers commands until the client leaves.
pub(super) async fn serve(
    client: &mut Stream,
    shared: &Shared,
    admitted: &Admitted,
) -> Result<(), SessionError> {
    let (opening, slot) = (&admitted.opening, &admitted.key.slot);
    let listed = shared.roster.enter(Newcomer {
        id: admitted.id,
        kind: Kind::Console,
        peer: admitted.peer,
        opening,
        application_name: &admitted.application_name,
        slot,
        client,
    });
    let mut talk = Talk {
        shared,
        admitted,
        tx: TxStatus::Idle,
        skip_to_sync: false,
        statements: HashMap::new(),
        portals: HashMap::new(),
        shutdown: None,
    };
    let entry = listed.entry();
    loop {
        let next = tokio::select! {
            biased;
            () = entry.killed() => return Err(SessionError::Killed),
            next = client.next_frame(FRAME_MAX) => next,
        };
        let header: Header = match next {
            Ok(header) => header,
            Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::InvalidData => {
                return Err(SessionError::Protocol("invalid message length"));
            }
            Err(error) => return Err(error.into()),
        };
        entry.note_request(tokio::time::Instant::now());
        let body = frame::body(client.input.bytes(), header)
            .unwrap_or_default()
            .to_vec();
        client.input.consume(header.whole);
        if header.tag == b'X' {
            return Ok(());
        }
        talk.message(client, header.tag, &body).await?;
        if matches!(header.tag, b'Q' | b'S' | b'H') {
            client.flush().await?;
        }
        if let Some(manner) = talk.shutdown.take() {
            client.flush().await?;
            // Nobody takes orders any more only while the process ends anyway.
            drop(shared.orders.send(Order::Shutdown(manner)).await);
        }
    }
}

/// One client's conversation.
struct Talk<'a> {
    shared: &'a Shared,
    admitted: &'a Admitted,
    tx: TxStatus,
    /// After an error in an extended request: everything up to its Sync is ignored.
    skip_to_sync: bool,
    statements: HashMap<Vec<u8>, Statement>,
    portals: HashMap<Vec<u8>, Portal>,
    /// To be asked for once the answer has left.
    shutdown: Option<Manner>,
}

/// `None`: an empty one.
#[derive(Clone)]
struct Statement(Option<Command>);

struct Portal {
    statement: Statement,
    /// Format codes as Bind has them: none, one for all, or one each.
    formats: Vec<u16>,
    /// What is left of the rows, and the command tag, once executed.
    rows: Option<(VecDeque<Row>, &'static str)>,
}

/// What a command comes to.
struct Answer {
    columns: Option<&'static [Column]>,
    rows: Vec<Row>,
    tag: &'static str,
    notices: Vec<ErrorResponse>,
}

impl Answer {
    fn done(tag: &'static str) -> Self {
        Self {
            columns: None,
            rows: Vec::new(),
            tag,
            notices: Vec::new(),
        }
    }
}

impl Talk<'_> {
    async fn message(
        &mut self,
        client: &mut Stream,
        tag: u8,
        body: &[u8],
    ) -> Result<(), SessionError> {
        if self.skip_to_sync && tag != b'S' {
            return Ok(());
        }
        let outcome = match tag {
            b'Q' => {
                let outcome = self.query(client, body).await;
                if let Err(Wrong::Command(error)) = outcome {
                    self.fail(client, &error);
                } else {
                    outcome?;
                }
                put_ready(&mut client.output, self.tx);
                return Ok(());
            }
            b'P' => self.parse(client, body),
            b'B' => self.bind(client, body),
            b'D' => self.describe(client, body),
            b'E' => self.execute(client, body).await,
            b'C' => self.close(client, body),
            b'H' => Ok(()),
            b'S' => {
                self.skip_to_sync = false;
                if self.tx == TxStatus::Idle {
                    self.portals.clear();
                }
                put_ready(&mut client.output, self.tx);
                return Ok(());
            }
            // Late pieces of a COPY there never was.
            b'd' | b'c' | b'f' => Ok(()),
            b'F' => Err(refused("0A000", "the admin console has no functions")),
            _ => Err(Wrong::Session(SessionError::Protocol(
                "invalid frontend message type",
            ))),
        };
        match outcome {
            Ok(()) => Ok(()),
            Err(Wrong::Session(error)) => Err(error),
            Err(Wrong::Command(error)) => {
                self.skip_to_sync = true;
                self.fail(client, &error);
                Ok(client.flush().await?)
            }
        }
    }

    fn fail(&mut self, client: &mut Stream, error: &ErrorResponse) {
        if self.tx == TxStatus::InTransaction {
            self.tx = TxStatus::Failed;
        }
        error.put(&mut client.output);
    }

    async fn query(&mut self, client: &mut Stream, body: &[u8]) -> Result<(), Wrong> {
        self.portals.remove(&b""[..]);
        self.statements.remove(&b""[..]);
        let text = crate::wire::messages::query_text(body)
            .ok_or_else(|| refused("08P01", "invalid string in message"))?;
        let text = String::from_utf8_lossy(text).into_owned();
        let (commands, mistake) = command::read(&text);
        if commands.is_empty() && mistake.is_none() {
            put_empty(&mut client.output, b'I');
        }
        for command in commands {
            let answer = self.run(&command).await?;
            if let Some(columns) = answer.columns {
                put_columns(&mut client.output, columns.iter().map(|c| c.described(0)));
            }
            for notice in &answer.notices {
                notice.put(&mut client.output);
            }
            for row in &answer.rows {
                put_row(&mut client.output, row.values(&[]));
                if client.output.len() > PIECE {
                    client.flush().await.map_err(SessionError::from)?;
                }
            }
            put_command_complete(&mut client.output, answer.tag);
        }
        mistake.map_or(Ok(()), |error| Err(Wrong::Command(error)))
    }

    fn parse(&mut self, client: &mut Stream, body: &[u8]) -> Result<(), Wrong> {
        let parse = Parse::read(body).ok_or_else(malformed)?;
        let text = String::from_utf8_lossy(parse.text);
        let (mut commands, mistake) = command::read(&text);
        if let Some(error) = mistake {
            return Err(Wrong::Command(error));
        }
        if commands.len() > 1 {
            return Err(refused(
                "42601",
                "cannot insert multiple commands into a prepared statement",
            ));
        }
        if !parse.name.is_empty() && self.statements.contains_key(parse.name) {
            let name = String::from_utf8_lossy(parse.name).into_owned();
            let exists = format!("prepared statement \"{name}\" already exists");
            return Err(refused("42P05", exists));
        }
        if self.statements.len() >= HELD_MAX {
            return Err(refused("54000", "too many prepared statements"));
        }
        self.statements
            .insert(parse.name.to_vec(), Statement(commands.pop()));
        put_empty(&mut client.output, b'1');
        Ok(())
    }

    fn bind(&mut self, client: &mut Stream, body: &[u8]) -> Result<(), Wrong> {
        let bind = Bind::read(body).ok_or_else(malformed)?;
        let statement = self.statement(bind.statement)?.clone();
        if bind.parameter_count().ok_or_else(malformed)? > 0 {
            return Err(refused(
                "08P01",
                "bind message supplies parameters, but commands of the console have none",
            ));
        }
        let formats = bind.result_formats().ok_or_else(malformed)?;
        if formats.iter().any(|format| *format > 1) {
            return Err(refused("22023", "unsupported format code"));
        }
        if self.portals.len() >= HELD_MAX {
            return Err(refused("54000", "too many portals"));
        }
        if !bind.portal.is_empty() && self.portals.contains_key(bind.portal) {
            let name = String::from_utf8_lossy(bind.portal).into_owned();
            return Err(refused(
                "42P03",
                format!("cursor \"{name}\" already exists"),
            ));
        }
        let portal = Portal {
            statement,
            formats,
            rows: None,
        };
        self.portals.insert(bind.portal.to_vec(), portal);
        put_empty(&mut client.output, b'2');
        Ok(())
    }

    fn describe(&mut self, client: &mut Stream, body: &[u8]) -> Result<(), Wrong> {
        let target = Target::read(body).ok_or_else(malformed)?;
        let (columns, formats) = if target.kind == b'S' {
            let columns = columns(self.statement(target.name)?);
            put_frame(&mut client.output, b't', |out| {
                out.extend_from_slice(&[0, 0])
            });
            (columns, Vec::new())
        } else {
            let portal = self
                .portals
                .get(target.name)
                .ok_or_else(|| no_portal(target.name))?;
            (columns(&portal.statement), portal.formats.clone())
        };
        match columns {
            Some(columns) => {
                let format = |at| tables::format_of(&formats, at);
                let described = columns.iter().enumerate();
                put_columns(
                    &mut client.output,
                    described.map(|(at, column)| column.described(format(at))),
                );
            }
            None => put_empty(&mut client.output, b'n'),
        }
        Ok(())
    }

    async fn execute(&mut self, client: &mut Stream, body: &[u8]) -> Result<(), Wrong> {
        let (name, limit) = split_execute(body).ok_or_else(malformed)?;
        let Some(portal) = self.portals.get_mut(name) else {
            return Err(no_portal(name));
        };
        let Statement(Some(command)) = portal.statement.clone() else {
            put_empty(&mut client.output, b'I');
            return Ok(());
        };
        let formats = portal.formats.clone();
        let (mut rows, tag) = match portal.rows.take() {
            Some(left) => left,
            None => {
                let answer = self.run(&command).await?;
                for notice in &answer.notices {
                    notice.put(&mut client.output);
                }
                (VecDeque::from(answer.rows), answer.tag)
            }
        };
        let mut sent = 0;
        while let Some(row) = rows.pop_front() {
            put_row(&mut client.output, row.values(&formats));
            if client.output.len() > PIECE {
                client.flush().await.map_err(SessionError::from)?;
            }
            sent += 1;
            if sent == limit {
                break;
            }
        }
        // As Postgres: a limit reached exactly suspends, though nothing may be left.
        let suspended = limit > 0 && sent == limit;
        if let Some(portal) = self.portals.get_mut(name) {
            portal.rows = Some((rows, tag));
        }
        if suspended {
            put_empty(&mut client.output, b's');
        } else {
            put_command_complete(&mut client.output, tag);
        }
        Ok(())
    }

    fn close(&mut self, client: &mut Stream, body: &[u8]) -> Result<(), Wrong> {
        let target = Target::read(body).ok_or_else(malformed)?;
        match target.kind {
            b'S' => drop(self.statements.remove(target.name)),
            _ => drop(self.portals.remove(target.name)),
        }
        put_empty(&mut client.output, b'3');
        Ok(())
    }

    fn statement(&self, name: &[u8]) -> Result<&Statement, Wrong> {
        self.statements.get(name).ok_or_else(|| {
            let message = if name.is_empty() {
                "unnamed prepared statement does not exist".to_owned()
            } else {
                let name = String::from_utf8_lossy(name);
                format!("prepared statement \"{name}\" does not exist")
            };
            refused("26000", message)
        })
    }

    /// Does it. A command that waits may be cancelled.
    async fn run(&mut self, command: &Command) -> Result<Answer, Wrong> {
        let ends = matches!(command, Command::Commit | Command::Rollback);
        if self.tx == TxStatus::Failed && !ends {
            return Err(refused(
                "25P02",
                "current transaction is aborted, commands ignored until end of transaction block",
            ));
        }
        if self.admitted.role != ConsoleRole::Admin && !command.only_looks() {
            let error = ErrorResponse::error("42501", "permission denied: admin access needed")
                .with_detail("Users of console.stats_users may SHOW only.");
            return Err(Wrong::Command(error));
        }
        let wait = self.admitted.key.slot.wait();
        tokio::select! {
            biased;
            answer = obey(self.shared, command, &mut self.tx, &mut self.shutdown) => answer,
            () = wait.cancelled() => {
                Err(refused("57014", "canceling statement due to user request"))
            }
        }
    }
}

async fn obey(
    shared: &Shared,
    command: &Command,
    tx: &mut TxStatus,
    shutdown: &mut Option<Manner>,
) -> Result<Answer, Wrong> {
    let pools = &shared.pools;
    let database = |name: &Option<String>| name.clone();
    match command {
        Command::Show(show, wanted) => {
            let mut answer = Answer::done("SHOW");
            answer.columns = Some(show.columns());
            answer.rows = show.rows(shared, wanted.as_deref());
            Ok(answer)
        }
        Command::ShowParameter(value) => {
            let mut answer = Answer::done("SHOW");
            answer.columns = Some(tables::PARAMETER);
            answer.rows = vec![Row::text(value)];
            Ok(answer)
        }
        Command::Pause(name) => {
            check_known(shared, name).await?;
            let name = database(name);
            if !pools.pause(name.as_deref()) {
                return Err(refused("55000", already(name.as_deref(), "paused")));
            }
            if !pools.drained(name.as_deref()).await {
                return Err(refused("57014", "PAUSE was ended by RESUME"));
            }
            Ok(Answer::done("PAUSE"))
        }
        Command::Resume(name) => {
            check_known(shared, name).await?;
            if !pools.resume(name.as_deref()) {
                return Err(refused("55000", not(name.as_deref(), "paused")));
            }
            Ok(Answer::done("RESUME"))
        }
        Command::Reconnect(name) => {
            check_known(shared, name).await?;
            pools.reconnect(name.as_deref());
            Ok(Answer::done("RECONNECT"))
        }
        Command::WaitClose(name) => {
            check_known(shared, name).await?;
            pools.closed(name.as_deref()).await;
            Ok(Answer::done("WAIT_CLOSE"))
        }
        Command::Disable(name) => {
            check_known(shared, &Some(name.clone())).await?;
            pools.disable(name, true);
            Ok(Answer::done("DISABLE"))
        }
        Command::Enable(name) => {
            check_known(shared, &Some(name.clone())).await?;
            pools.disable(name, false);
            Ok(Answer::done("ENABLE"))
        }
        Command::Kill(name) => {
            check_known(shared, name).await?;
            // Paused first, so that nobody is served between; servers close as their clients go.
            pools.pause(name.as_deref());
            shared.roster.kill_all(name.as_deref());
            Ok(Answer::done("KILL"))
        }
        Command::KillClient(id) => {
            if !shared.roster.kill(*id) {
                return Err(refused("42704", format!("client with id {id} not found")));
            }
            Ok(Answer::done("KILL_CLIENT"))
        }
        Command::Reload => reload(shared).await,
        Command::Shutdown(manner) => {
            *shutdown = Some(*manner);
            Ok(Answer::done("SHUTDOWN"))
        }
        Command::Begin => {
            *tx = TxStatus::InTransaction;
            Ok(Answer::done("BEGIN"))
        }
        Command::Commit => {
            let failed = std::mem::replace(tx, TxStatus::Idle) == TxStatus::Failed;
            Ok(Answer::done(if failed { "ROLLBACK" } else { "COMMIT" }))
        }
        Command::Rollback => {
            *tx = TxStatus::Idle;
            Ok(Answer::done("ROLLBACK"))
        }
        Command::Nothing(tag) => Ok(Answer::done(tag)),
    }
}

async fn reload(shared: &Shared) -> Result<Answer, Wrong> {
    let (reply, replied) = oneshot::channel();
    let asked = shared.orders.send(Order::Reload(reply)).await;
    let outcome = match asked {
        Ok(()) => replied.await.ok(),
        Err(_nobody) => None,
    };
    match outcome {
        Some(Ok(Reloaded { need_restart })) => {
            let mut answer = Answer::done("RELOAD");
            if !need_restart.is_empty() {
                answer.notices.push(
                    ErrorResponse::notice(format!(
                        "not changed before a restart: {}",
                        need_restart.join(", ")
                    ))
                    .with_detail("Everything else is in force."),
                );
            }
            Ok(answer)
        }
        Some(Err(NotReloaded { problems })) => {
            let message = match problems.len() {
                1 => "the configuration has a problem, and nothing was changed".to_owned(),
                many => format!("the configuration has {many} problems, and nothing was changed"),
            };
            let error = ErrorResponse::error("F0000", message).with_detail(problems.join("\n"));
            Err(Wrong::Command(error))
        }
        None => Err(refused("57P01", "the proxy is shutting down")),
    }
}

/// A database is known once somebody has logged in to it; otherwise Postgres is asked.
async fn check_known(shared: &Shared, database: &Option<String>) -> Result<(), Wrong> {
    let Some(name) = database else { return Ok(()) };
    let live = shared.live();
    if shared.pools.knows(name) || live.config.primary.database == *name {
        return Ok(());
    }
    let error = ErrorResponse::error("3D000", format!("no such database: {name}"));
    match live.verifiers.has_database(name).await {
        Ok(true) => Ok(()),
        Ok(false) => Err(Wrong::Command(error)),
        Err(unknown) => {
            tracing::debug!(%unknown, "cannot ask the primary for its databases");
            let detail = "Nobody has logged in to it, and the primary cannot be asked now.";
            Err(Wrong::Command(error.with_detail(detail)))
        }
    }
}

fn already(database: Option<&str>, what: &str) -> String {
    match database {
        Some(database) => format!("database {database} is already {what}"),
        None => format!("all databases are already {what}"),
    }
}

fn not(database: Option<&str>, what: &str) -> String {
    match database {
        Some(database) => format!("database {database} is not {what}"),
        None => format!("no database is {what}"),
    }
}

fn columns(statement: &Statement) -> Option<&'static [Column]> {
    match &statement.0 {
        Some(Command::Show(show, _)) => Some(show.columns()),
        Some(Command::ShowParameter(_)) => Some(tables::PARAMETER),
        Some(_) | None => None,
    }
}

/// Why a message came to nothing.
enum Wrong {
    /// The client is told and goes on.
    Command(ErrorResponse),
    Session(SessionError),
}

impl From<SessionError> for Wrong {
    fn from(error: SessionError) -> Self {
        Self::Session(error)
    }
}

impl From<Wrong> for SessionError {
    fn from(wrong: Wrong) -> Self {
        match wrong {
            Wrong::Command(error) => Self::Refused(Box::new(error)),
            Wrong::Session(error) => error,
        }
    }
}

fn refused(code: &'static str, message: impl Into<String>) -> Wrong {
    Wrong::Command(ErrorResponse::error(code, message))
}

fn malformed() -> Wrong {
    refused("08P01", "invalid message format")
}

fn no_portal(name: &[u8]) -> Wrong {
    let name = String::from_utf8_lossy(name);
    refused("34000", format!("portal \"{name}\" does not exist"))
}

/// The portal's name and the most rows wanted; 0: all.
fn split_execute(body: &[u8]) -> Option<(&[u8], usize)> {
    let end = memchr::memchr(0, body)?;
    let limit = body.get(end + 1..)?.try_into().ok()?;
    let limit = usize::try_from(i32::from_be_bytes(limit)).unwrap_or(0);
    Some((body.get(..end)?, limit))
}
