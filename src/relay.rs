//! One request and its response between a client and the server it holds, both sockets driven by one task, until
//! ReadyForQuery. Frames pass as bytes: headers are always scanned, bodies read only where the server's state or the
//! end of the request depends on them. Never decides where a request goes, never touches SQL. Called by
//! `client/session`.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use thiserror::Error;
use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::server::conn::{
    STATEMENT_CHANGED, STATEMENT_PREFIX, ServerConn, Shape, StatementId, UNNAMED_UNKNOWN,
    UnnamedOwner,
};
use crate::wire::error_response::field;
use crate::wire::frame::{HEADER, Header};
use crate::wire::messages::{TxStatus, parameter_status, put_parameter_status};
use crate::wire::stream::Stream;

/// Frames that are looked into are held whole up to this size; larger ones (a huge error text) pass unread.
const LOOKED_INTO_MAX: usize = 1024 * 1024;
/// So much of what waits for the client is moved up when something behind it is swallowed; more is sent first.
const MOVED_MAX: usize = 4 * 1024;
/// Of what a client is told, so much is kept for others.
const CAPTURED_MAX: usize = 256 * 1024;
/// Bytes a client may send ahead while its request runs; beyond, it waits, as it would for Postgres itself.
const READ_AHEAD_MAX: usize = 64 * 1024;
/// After a client closed its sending side: how often to look whether it has closed the other one too.
const GONE_CHECK_EVERY: Duration = Duration::from_millis(250);

/// What is going on between a client and a server, kept over the pauses of one request.
#[derive(Default)]
pub(crate) struct Exchange {
    pub(crate) phase: Phase,
    /// Parse…Sync rather than Query.
    extended: bool,
    /// Bytes at the front of the client's input (and what follows it from the socket) that go to the server as they are.
    pub(crate) upload: usize,
    /// Answers to Parse and Close, and to a Describe that follows its Parse, in the order they were sent.
    pub(crate) expected: VecDeque<Expected>,
    /// The response is held back until it is known not to be a refusal that another server would not make.
    pub(crate) hold: bool,
    /// With `hold`: the response is held back until its first row or error; one without either is for the session, see
    /// `take_held`.
    pub(crate) hold_empty: bool,
    /// What the client is told is kept here as well, unless it is too much. Outlives `begin`.
    pub(crate) capture: Option<Vec<u8>>,
    /// BindComplete is an answer to a message of ours.
    pub(crate) our_binds: bool,
    /// ReadyForQuery is kept from the client: the session has something to do first.
    pub(crate) keep_ready: bool,
    /// ParseComplete and CloseComplete answers to the client's own messages.
    pub(crate) confirmed: usize,
    /// SQLSTATE of the first ErrorResponse.
    pub(crate) error: Option<[u8; 5]>,
    /// The last CommandComplete tag's first bytes.
    pub(crate) tag: CommandTag,
    /// CommandCompletes.
    pub(crate) commands: usize,
    /// The body of an ErrorResponse that names a statement as the server knows it; for the session to put right.
    pub(crate) misnamed: Vec<u8>,
    /// The server reported a parameter.
    pub(crate) parameters_changed: bool,
    /// The error was FATAL: the server's last words.
    farewell: bool,
    /// Rows and other bytes sent to the client.
    pub(crate) bytes_out: u64,
    /// Of the server's input: bytes that may go to the client.
    forward: usize,
    /// Of the server's input: bytes scanned and held back.
    held: usize,
    /// Bytes of the frame now passing that are still to come.
    passing: usize,
    /// The refusal being discarded up to its ReadyForQuery.
    refusing: bool,
    ready: Option<TxStatus>,
    gone_check: Option<Pin<Box<Interval>>>,
}

/// Who may speak.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Phase {
    /// The request is sent; only the server has something to say.
    #[default]
    Closed,
    /// An extended request without its Sync yet: what the client sends belongs to it.
    Open,
    /// An open request that waits for the answers to what it has sent: whether an error was among them decides what the
    /// server makes of the client's next message.
    Settling,
    /// COPY FROM STDIN: the client's data flows as it comes.
    CopyIn { extended: bool },
}

/// The answer a message will have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Expected {
    /// The client's own Parse of a named statement, as the server knows it, and the stamp of that Parse.
    Parsed(StatementId, u64),
    ParsedUnnamed(UnnamedOwner),
    Closed(Option<StatementId>),
    /// A Parse or Close of ours; its answer is swallowed.
    OursParsed(StatementId, u64),
    OursParsedUnnamed(UnnamedOwner),
    OursOther,
    OursClosed(Option<StatementId>),
    /// The client's own Describe of the statement parsed just before, at that stamp: worth a look.
    Described(StatementId, u64),
    /// A Describe of ours.
    OursDescribed(StatementId, u64),
    /// The client's own Describe of a statement whose rows it must not see. INVARIANT: no Describe that is not in the list is
    /// under way before it.
    ParametersOnly,
}

impl Expected {
    /// Not the client's to count.
    fn is_ours(self) -> bool {
        match self {
            Self::Parsed(..) | Self::ParsedUnnamed(_) | Self::Closed(_) | Self::Described(..) => {
                false
            }
            Self::OursParsed(..)
            | Self::OursParsedUnnamed(_)
            | Self::OursOther
            | Self::OursClosed(_)
            | Self::OursDescribed(..)
            | Self::ParametersOnly => true,
        }
    }

    /// Not the client's to see.
    fn is_swallowed(self, tag: u8) -> bool {
        self.is_ours() && !(self == Self::ParametersOnly && tag == b't')
    }

    /// Whether a message of the server's with this tag is this answer, or the first half of it.
    fn is_answered_by(self, tag: u8) -> bool {
        match self {
            Self::Described(..) | Self::OursDescribed(..) | Self::ParametersOnly => {
                matches!(tag, b't' | b'T' | b'n')
            }
            Self::Parsed(..)
            | Self::ParsedUnnamed(_)
            | Self::Closed(_)
            | Self::OursParsed(..)
            | Self::OursParsedUnnamed(_)
            | Self::OursOther
            | Self::OursClosed(_) => matches!(tag, b'1' | b'3'),
        }
    }
}

/// The beginning of a command tag: enough to tell commands apart.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CommandTag([u8; 16]);

impl CommandTag {
    fn of(body: &[u8]) -> Self {
        let mut tag = [0; 16];
        tag.iter_mut()
            .zip(body.iter().take_while(|&&byte| byte != 0))
            .for_each(|(to, from)| *to = *from);
        Self(tag)
    }

    /// The command alone: a tag may go on with counts.
    pub(crate) fn command(&self) -> &[u8] {
        let end = self
            .0
            .iter()
            .position(|&byte| byte == 0 || byte == b' ')
            .unwrap_or(self.0.len());
        self.0.get(..end).unwrap_or_default()
    }

    /// The rows that a SELECT says it has sent.
    pub(crate) fn rows(&self) -> usize {
        let text = std::str::from_utf8(&self.0).unwrap_or_default();
        let count = text.trim_end_matches('\0').rsplit(' ').next();
        count.and_then(|count| count.parse().ok()).unwrap_or(0)
    }

    pub(crate) fn is(self, command: &str) -> bool {
        self == Self::of(command.as_bytes())
    }
}

/// How far the server's frames have been walked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Scanned {
    /// To the end of what is there.
    All,
    /// Up to a frame to be swallowed: what stands before it must leave first.
    WaitsForForward,
}

/// Why the relay returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pause {
    /// ReadyForQuery came; all before it has been sent on, and it too unless `keep_ready`.
    Ready(TxStatus),
    /// The request is open and the client's input holds a frame (or the beginning of a large one).
    ClientSpeaks,
    /// An ErrorResponse waits in `misnamed`; it goes to the client next.
    Misnamed,
    /// A held response was a refusal, read to its end and discarded; nothing reached the client.
    Refused,
}

#[derive(Debug, Error)]
pub(crate) enum RelayError {
    #[error("client is gone: {0}")]
    ClientGone(#[source] io::Error),
    #[error("server failed: {0}")]
    Server(#[source] io::Error),
    #[error("server closed the connection")]
    ServerClosed,
    #[error("server sent a malformed frame")]
    ServerMalformed,
}

impl Exchange {
    /// All that ran was one INSERT, UPDATE, DELETE or COPY.
    pub(crate) fn ran_one_plain_command(&self) -> bool {
        self.error.is_none()
            && self.commands == 1
            && matches!(
                self.tag.command(),
                b"INSERT" | b"UPDATE" | b"DELETE" | b"COPY"
            )
    }

    /// The client needs no word of ours on why the server is gone: it had the server's, or is in the middle of a message
    /// that will never end.
    pub(crate) fn said_farewell(&self) -> bool {
        self.farewell || self.is_mid_message()
    }

    pub(crate) fn is_mid_message(&self) -> bool {
        self.passing > 0
    }

    /// The response so far, if nothing of it was let through: neither a row nor an error.
    pub(crate) fn take_held(&mut self, server: &mut ServerConn) -> Option<Vec<u8>> {
        if !std::mem::take(&mut self.hold) {
            return None;
        }
        let held = std::mem::take(&mut self.held);
        let bytes = server.stream.input.bytes().get(..held)?.to_vec();
        server.stream.input.consume(held);
        Some(bytes)
    }

    /// Ready for the next request; keeps its allocations.
    pub(crate) fn begin(&mut self, extended: bool, phase: Phase) {
        let mut expected = std::mem::take(&mut self.expected);
        expected.clear();
        *self = Self {
            phase,
            extended,
            expected,
            capture: self.capture.take(),
            ..Self::default()
        };
    }
}

/// Runs until something is for the session to decide. Cancel-safe: all state is in `exchange` and the streams.
pub(crate) async fn run(
    client: &mut Stream,
    server: &mut ServerConn,
    exchange: &mut Exchange,
) -> Result<Pause, RelayError> {
    poll_fn(|cx| exchange.poll(cx, client, server)).await
}

impl Exchange {
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut Stream,
        server: &mut ServerConn,
    ) -> Poll<Result<Pause, RelayError>> {
        loop {
            self.poll_upload(cx, client, server)?;
            let scanned = self.scan(server)?;
            if self.refusing && self.ready.is_some() {
                return Poll::Ready(Ok(Pause::Refused));
            }
            let sent = self.poll_forward(cx, client, server)?;
            if sent.is_ready() {
                if scanned == Scanned::WaitsForForward {
                    continue;
                }
                // A server that answered before it had read all (an error in a COPY) still reads the frame to its end.
                if self.phase == Phase::Settling
                    && (self.expected.is_empty() || self.error.is_some())
                {
                    self.phase = Phase::Open;
                    return Poll::Ready(Ok(Pause::ClientSpeaks));
                }
                if !self.misnamed.is_empty() {
                    return Poll::Ready(Ok(Pause::Misnamed));
                }
                if let Some(status) = self.ready
                    && self.upload == 0
                {
                    return Poll::Ready(Ok(Pause::Ready(status)));
                }
                if self.ready.is_none() {
                    match server.stream.poll_fill(cx, self.needed(server)) {
                        Poll::Ready(Ok(count)) if count > 0 => continue,
                        Poll::Pending => {}
                        // Nothing of it reached the client, so another server may answer.
                        Poll::Ready(_) if self.hold && !self.hold_empty || self.refusing => {
                            return Poll::Ready(Ok(Pause::Refused));
                        }
                        Poll::Ready(Ok(_)) => return Poll::Ready(Err(RelayError::ServerClosed)),
                        Poll::Ready(Err(error)) => {
                            return Poll::Ready(Err(RelayError::Server(error)));
                        }
                    }
                }
            }
            match self.poll_client(cx, client, server) {
                Poll::Ready(Ok(Some(pause))) => return Poll::Ready(Ok(pause)),
                Poll::Ready(Ok(None)) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    /// Sends the server what is its: our prefix, then the client's bytes.
    fn poll_upload(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut Stream,
        server: &mut ServerConn,
    ) -> Result<(), RelayError> {
        loop {
            let available = client.input.len().min(self.upload);
            let bytes = client.input.bytes().get(..available).unwrap_or_default();
            match server.stream.poll_send(cx, bytes) {
                Poll::Ready(Ok(0)) => break,
                Poll::Ready(Ok(count)) => {
                    client.input.consume(count);
                    self.upload -= count;
                }
                // The server may have said why it no longer reads; its words come first.
                Poll::Ready(Err(error)) if server.stream.at_eof => {
                    return Err(RelayError::Server(error));
                }
                Poll::Ready(Err(_)) => {
                    self.upload = 0;
                    server.stream.output.clear();
                    break;
                }
                Poll::Pending => return Ok(()),
            }
        }
        if let Poll::Ready(Err(error)) = server.stream.poll_flush(cx) {
            return Err(RelayError::Server(error));
        }
        Ok(())
    }

    /// Sends the client what has been cleared for it.
    fn poll_forward(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut Stream,
        server: &mut ServerConn,
    ) -> Result<Poll<()>, RelayError> {
        if self.forward == 0 && client.is_flushed() {
            return Ok(Poll::Ready(()));
        }
        loop {
            let bytes = server
                .stream
                .input
                .bytes()
                .get(..self.forward)
                .unwrap_or_default();
            match client.poll_send(cx, bytes) {
                Poll::Ready(Ok(count)) => {
                    if let Some(capture) = &mut self.capture {
                        capture.extend_from_slice(bytes.get(..count).unwrap_or_default());
                        if capture.len() > CAPTURED_MAX {
                            self.capture = None;
                        }
                    }
                    server.stream.input.consume(count);
                    self.forward -= count;
                    self.bytes_out += count as u64;
                    if self.forward == 0 {
                        break;
                    }
                }
                Poll::Ready(Err(error)) => return Err(RelayError::ClientGone(error)),
                Poll::Pending => return Ok(Poll::Pending),
            }
        }
        match client.poll_flush(cx) {
            Poll::Ready(Ok(())) => Ok(Poll::Ready(())),
            Poll::Ready(Err(error)) => Err(RelayError::ClientGone(error)),
            Poll::Pending => Ok(Poll::Pending),
        }
    }

    /// How much room the frame at the scan position needs, if it must be seen whole. All before it is sent or held.
    fn needed(&self, server: &ServerConn) -> usize {
        let rest = server
            .stream
            .input
            .bytes()
            .get(self.held..)
            .unwrap_or_default();
        match Header::peek(rest) {
            Some(header)
                if header.whole <= LOOKED_INTO_MAX && !matches!(header.tag, b'D' | b'd') =>
            {
                self.held + header.whole
            }
            _ => 1,
        }
    }

    /// Walks the frames the server has sent, clearing them for the client or swallowing them.
    fn scan(&mut self, server: &mut ServerConn) -> Result<Scanned, RelayError> {
        while self.ready.is_none() && self.misnamed.is_empty() {
            let scanned = self.forward + self.held;
            let rest = server
                .stream
                .input
                .bytes()
                .get(scanned..)
                .unwrap_or_default();
            if self.passing > 0 {
                let count = self.passing.min(rest.len());
                if count == 0 {
                    return Ok(Scanned::All);
                }
                self.passing -= count;
                self.forward += count;
                continue;
            }
            let Some(header) = Header::peek(rest) else {
                return if rest.len() < HEADER {
                    Ok(Scanned::All)
                } else {
                    Err(RelayError::ServerMalformed)
                };
            };
            if matches!(header.tag, b'D' | b'd') && !self.refusing {
                self.release_held();
                self.clear(header, rest.len());
                continue;
            }
            if rest.len() < header.whole {
                if header.whole <= LOOKED_INTO_MAX {
                    return Ok(Scanned::All);
                }
                self.release_held();
                self.clear(header, rest.len());
                continue;
            }
            if !self.look_into(server, header, scanned)? {
                return Ok(Scanned::WaitsForForward);
            }
        }
        Ok(Scanned::All)
    }

    /// Acts on one whole frame at `scanned`. `false`: bytes before it must leave first.
    fn look_into(
        &mut self,
        server: &mut ServerConn,
        header: Header,
        scanned: usize,
    ) -> Result<bool, RelayError> {
        let next = self.expected.front().copied();
        let answer = next.filter(|answer| answer.is_answered_by(header.tag));
        let misnamed = header.tag == b'E' && names_a_statement(bytes_of(server, header, scanned));
        // What is the server's or ours alone may go from among the client's.
        let ours = answer.is_some_and(|answer| answer.is_swallowed(header.tag));
        let aside = header.tag == b'A' || ours || header.tag == b'2' && self.our_binds;
        let swallow = self.refusing || misnamed || aside || header.tag == b'Z' && self.keep_ready;
        let cut_out =
            aside && scanned > 0 && (scanned <= MOVED_MAX || self.hold_empty) && !self.refusing;
        if swallow && scanned > 0 && !cut_out {
            self.release_held();
            return Ok(false);
        }
        let bytes = server.stream.input.bytes();
        let body = bytes
            .get(scanned + HEADER..scanned + header.whole)
            .unwrap_or_default();
        let mut decisive = true;
        match header.tag {
            b'Z' => {
                let status = body.first().copied().and_then(TxStatus::from_byte);
                let status = status.ok_or(RelayError::ServerMalformed)?;
                server.tx = status;
                server.in_flight = false;
                self.ready = Some(status);
            }
            b'1' | b'3' => {
                decisive = false;
                self.expected.pop_front();
                if let Some(answer) = answer {
                    self.confirmed += usize::from(!answer.is_ours());
                    confirm(server, answer);
                }
            }
            b'E' => {
                let code = field(body, b'C')
                    .and_then(|code| <[u8; 5]>::try_from(code).ok())
                    .unwrap_or(*b"XX000");
                let unnamed = |answer: &Expected| {
                    matches!(
                        answer,
                        Expected::ParsedUnnamed(_) | Expected::OursParsedUnnamed(_)
                    )
                };
                if self.expected.iter().any(unnamed) {
                    // Dropped, or still somebody's: nobody may take it for theirs.
                    server.unnamed = Some(UNNAMED_UNKNOWN);
                }
                let changed = misnamed && names_a_changed_statement(body);
                let code = if changed { *b"0A000" } else { code };
                if changed {
                    self.misnamed = body.to_vec();
                } else if misnamed {
                    // Duplicate, or unknown: the books are wrong. Other errors only speak of it.
                    server.unfit |= matches!(&code, b"42P05" | b"26000");
                    self.misnamed = body.to_vec();
                }
                self.farewell |= matches!(field(body, b'V'), Some(b"FATAL" | b"PANIC"));
                self.expected.clear();
                self.error.get_or_insert(code);
                if self.hold && !self.hold_empty && is_refusal(&code) {
                    self.misnamed.clear();
                    self.refusing = true;
                    self.hold = false;
                    let discarded = std::mem::take(&mut self.held) + header.whole;
                    server.stream.input.consume(discarded);
                    return Ok(true);
                }
                if let Phase::CopyIn { extended } = self.phase {
                    // COPY is over; an extended request goes on to its Sync.
                    self.phase = if extended { Phase::Open } else { Phase::Closed };
                }
            }
            b'S' => {
                decisive = false;
                if let Some((name, value)) = parameter_status(body) {
                    let (name, value) = (
                        String::from_utf8_lossy(name),
                        String::from_utf8_lossy(value),
                    );
                    server.reported.set(&name, &value);
                    self.parameters_changed = true;
                }
            }
            b'C' => {
                decisive = !self.hold_empty;
                self.tag = CommandTag::of(body);
                self.commands += 1;
            }
            b'G' => {
                // A Sync that came before the data is ignored by a server in COPY; the one after it counts.
                self.phase = Phase::CopyIn {
                    extended: self.extended,
                };
            }
            b'A' => {
                let frame = bytes.get(scanned..scanned + header.whole);
                if let (Some(heard), Some(frame)) = (&mut server.heard, frame) {
                    heard.push(frame);
                }
            }
            b't' => decisive = false,
            b'T' | b'n' => {
                decisive = false;
                if answer.is_some() {
                    self.expected.pop_front();
                }
                if let Some(Expected::Described(id, stamp) | Expected::OursDescribed(id, stamp)) =
                    answer
                {
                    let shape = if header.tag == b'T' {
                        Shape::of_row_description(body)
                    } else {
                        Shape::NONE
                    };
                    server.statements.learn_shape(id, stamp, shape);
                }
            }
            b'2' | b'N' => decisive = false,
            _ => {}
        }
        if cut_out {
            server.stream.input.cut_out(scanned, header.whole);
        } else if swallow {
            server.stream.input.consume(header.whole);
        } else if self.hold && !decisive {
            self.held += header.whole;
        } else {
            self.release_held();
            self.clear(header, header.whole);
        }
        Ok(true)
    }

    /// The frame at the scan position may go to the client, as far as it has come.
    fn clear(&mut self, header: Header, available: usize) {
        let here = header.whole.min(available);
        self.forward += here;
        self.passing = header.whole - here;
    }

    /// The response is no refusal: what was held back may go.
    fn release_held(&mut self) {
        self.hold = false;
        self.forward += std::mem::take(&mut self.held);
    }

    /// What the client has to say meanwhile. `Ready(None)`: something moved, go round again.
    fn poll_client(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut Stream,
        server: &ServerConn,
    ) -> Poll<Result<Option<Pause>, RelayError>> {
        if self.upload > 0 {
            if !client.input.is_empty() {
                return Poll::Pending; // the server's socket is full; its writability wakes us
            }
        } else if self.ready.is_none() && !client.input.is_empty() {
            match self.phase {
                Phase::Closed | Phase::Settling => {}
                Phase::Open if holds_a_message(client.input.bytes()) => {
                    return Poll::Ready(Ok(Some(Pause::ClientSpeaks)));
                }
                Phase::Open => {}
                Phase::CopyIn { extended } => match Header::from_client(client.input.bytes()) {
                    Ok(None) => {}
                    Ok(Some(header)) => {
                        match header.tag {
                            b'X' => return Poll::Ready(Err(gone("terminated during COPY"))),
                            b'c' | b'f' => {
                                self.phase = if extended { Phase::Open } else { Phase::Closed }
                            }
                            // CopyData, and whatever else: Postgres has the words for what does not belong here.
                            _ => {}
                        }
                        self.upload = header.whole;
                        return Poll::Ready(Ok(None));
                    }
                    Err(_) => return Poll::Ready(Ok(Some(Pause::ClientSpeaks))),
                },
            }
        }
        if client.at_eof {
            return self.poll_gone(cx, client, server);
        }
        if matches!(self.phase, Phase::Closed | Phase::Settling)
            && self.upload == 0
            && client.input.len() >= READ_AHEAD_MAX
        {
            return Poll::Pending;
        }
        let whole = match self.phase {
            Phase::Open => Header::peek(client.input.bytes()).map_or(1, Header::window),
            Phase::Closed | Phase::Settling | Phase::CopyIn { .. } => 1,
        };
        match client.poll_fill(cx, whole) {
            Poll::Ready(Ok(_)) => Poll::Ready(Ok(None)),
            Poll::Ready(Err(error)) => Poll::Ready(Err(RelayError::ClientGone(error))),
            Poll::Pending => Poll::Pending,
        }
    }

    /// The client sends no more. It may still read (a half-closed socket) or be gone: a message it must ignore, a repeated
    /// ParameterStatus, makes the kernel of one that is gone say so. (protocol-flow.html#PROTOCOL-ASYNC)
    fn poll_gone(
        &mut self,
        cx: &mut Context<'_>,
        client: &mut Stream,
        server: &ServerConn,
    ) -> Poll<Result<Option<Pause>, RelayError>> {
        if self.phase == Phase::Settling && !client.input.is_empty() {
            return Poll::Pending; // what is left of its request is here; the server's answer wakes us
        }
        if self.upload > 0 || self.phase != Phase::Closed {
            return Poll::Ready(Err(gone("closed the connection inside a request")));
        }
        let between_frames = self.forward == 0 && self.held == 0 && self.passing == 0;
        let check = self.gone_check.get_or_insert_with(|| {
            if between_frames && let Some((name, value)) = server.reported.iter().next() {
                put_parameter_status(&mut client.output, name, value);
            }
            let mut check = interval(GONE_CHECK_EVERY);
            check.set_missed_tick_behavior(MissedTickBehavior::Delay);
            Box::pin(check)
        });
        if between_frames && let Poll::Ready(Err(error)) = client.poll_drain(cx) {
            return Poll::Ready(Err(RelayError::ClientGone(error)));
        }
        loop {
            match client
                .transport()
                .tcp()
                .map_or(Ok(None), tokio::net::TcpStream::take_error)
            {
                Ok(None) => {}
                Ok(Some(error)) | Err(error) => {
                    return Poll::Ready(Err(RelayError::ClientGone(error)));
                }
            }
            if check.poll_tick(cx).is_pending() {
                return Poll::Pending;
            }
        }
    }
}

/// A whole message, or so much of a large one that the names in it can be read.
pub(crate) fn holds_a_message(bytes: &[u8]) -> bool {
    match Header::from_client(bytes) {
        Ok(Some(header)) => bytes.len() >= header.window(),
        Ok(None) => false,
        Err(_) => true,
    }
}

fn bytes_of(server: &ServerConn, header: Header, at: usize) -> &[u8] {
    server
        .stream
        .input
        .bytes()
        .get(at + HEADER..at + header.whole)
        .unwrap_or_default()
}

fn names_a_statement(body: &[u8]) -> bool {
    memchr::memmem::find(body, STATEMENT_PREFIX.as_bytes()).is_some()
}

pub(crate) fn names_a_changed_statement(body: &[u8]) -> bool {
    memchr::memmem::find(body, STATEMENT_CHANGED.as_bytes()).is_some()
}

fn gone(why: &'static str) -> RelayError {
    RelayError::ClientGone(io::Error::new(io::ErrorKind::UnexpectedEof, why))
}

fn confirm(server: &mut ServerConn, answer: Expected) {
    match answer {
        Expected::Parsed(id, stamp) | Expected::OursParsed(id, stamp) => {
            server.learn_statement(id, stamp)
        }
        Expected::ParsedUnnamed(owner) | Expected::OursParsedUnnamed(owner) => {
            server.unnamed = Some(owner)
        }
        Expected::Closed(Some(id)) | Expected::OursClosed(Some(id)) => server.statements.remove(id),
        Expected::Closed(None)
        | Expected::OursOther
        | Expected::OursClosed(None)
        | Expected::Described(..)
        | Expected::OursDescribed(..)
        | Expected::ParametersOnly => {}
    }
}

/// What a replica refuses and the primary would not, or would not now: read-only transaction, conflict with recovery,
/// not possible during recovery, shutting down. (errcodes-appendix.html, hot-standby.html)
fn is_refusal(code: &[u8; 5]) -> bool {
    matches!(
        code,
        b"25006" | b"40001" | b"40P01" | b"55000" | b"0A000" | b"57P01" | b"57P02" | b"57P03"
    )
}
