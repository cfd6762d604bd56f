//! One open connection to Postgres and what is known of its session. Moves no messages; `relay` and `pool/reset.rs` do.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hasher};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use memchr::memchr;
use tokio::time::Instant;

use super::parameters::{Opening, Reported};
use super::settings::Settings;
use crate::wire::messages::TxStatus;
use crate::wire::stream::Stream;

/// Names a prepared statement on servers: `flowgate_<process>_<number>`, one number per distinct text and parameter types,
/// a random process number per proxy, so that no client and no other proxy meets it by chance.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct StatementId {
    pub(crate) process: u32,
    pub(crate) number: u64,
}

/// What names of prepared statements on servers begin with.
pub(crate) const STATEMENT_PREFIX: &str = "flowgate_";
/// A statement that no server has: a message that names it fails there, in its turn, and ends what an error ends. The client
/// is told what the rest of the name says, which is all that Postgres' log has of it.
pub(crate) const STATEMENT_CHANGED: &str = "flowgate_: cached plan must not change result type";

impl StatementId {
    pub(crate) fn server_name(self) -> Vec<u8> {
        format!("{STATEMENT_PREFIX}{:08x}_{:x}", self.process, self.number).into_bytes()
    }
}

/// Where a CancelRequest for a server goes, and what it says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ServerKey {
    pub(crate) host: Arc<str>,
    pub(crate) port: u16,
    pub(crate) pid: u32,
    pub(crate) secret: Arc<[u8]>,
}

/// What others may know, and say, of a server while somebody uses it. For the console, and for whoever wants it closed.
#[derive(Debug)]
pub(crate) struct ServerRecord {
    /// Servers are numbered from 1, over all upstreams.
    pub(crate) id: u64,
    pub(crate) pid: u32,
    pub(crate) peer: Option<SocketAddr>,
    pub(crate) local: Option<SocketAddr>,
    /// Version and cipher; empty without TLS.
    pub(crate) tls: String,
    pub(crate) opened_at: Instant,
    /// Not to be lent again.
    close_needed: AtomicBool,
    closed: AtomicBool,
    /// The last request, in µs since `opened_at`.
    request_us: AtomicU64,
    statements: AtomicUsize,
}

impl ServerRecord {
    pub(crate) fn new(id: u64, pid: u32, stream: &Stream, opened_at: Instant) -> Self {
        let tcp = stream.transport().tcp();
        Self {
            id,
            pid,
            peer: tcp.and_then(|tcp| tcp.peer_addr().ok()),
            local: tcp.and_then(|tcp| tcp.local_addr().ok()),
            tls: stream.transport().tls_words(),
            opened_at,
            close_needed: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            request_us: AtomicU64::new(0),
            statements: AtomicUsize::new(0),
        }
    }

    pub(crate) fn close_needed(&self) -> bool {
        self.close_needed.load(Ordering::Relaxed)
    }

    pub(crate) fn ask_to_close(&self) {
        self.close_needed.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_open(&self) -> bool {
        !self.closed.load(Ordering::Relaxed)
    }

    pub(crate) fn note_closed(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    pub(crate) fn note_request(&self, now: Instant) {
        let us = micros(now.saturating_duration_since(self.opened_at));
        self.request_us.store(us, Ordering::Relaxed);
    }

    pub(crate) fn last_request(&self) -> Instant {
        self.opened_at + Duration::from_micros(self.request_us.load(Ordering::Relaxed))
    }

    pub(crate) fn note_statements(&self, count: usize) {
        self.statements.store(count, Ordering::Relaxed);
    }

    pub(crate) fn statements(&self) -> usize {
        self.statements.load(Ordering::Relaxed)
    }
}

/// Whole microseconds, without a wide division.
pub(crate) fn micros(span: Duration) -> u64 {
    span.as_secs() * 1_000_000 + u64::from(span.subsec_micros())
}

/// Which client's unnamed statement a server holds: the client and the count of its unnamed Parses.
pub(crate) type UnnamedOwner = (u64, u64);
/// No client's: clients are numbered from 1.
pub(crate) const UNNAMED_UNKNOWN: UnnamedOwner = (0, 0);

/// Bytes of notifications that are kept for a client whose transaction runs on.
const HEARD_MAX: usize = 16 << 20;

/// Notifications as they came, one after the other.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    frames: Vec<u8>,
    too_many: bool,
}

impl Heard {
    pub(crate) fn push(&mut self, frame: &[u8]) {
        self.too_many |= self.frames.len() + frame.len() > HEARD_MAX;
        if !self.too_many {
            self.frames.extend_from_slice(frame);
        }
    }

    /// `None`: there were more than could be kept.
    pub(crate) fn into_frames(self) -> Option<Vec<u8>> {
        (!self.too_many).then_some(self.frames)
    }
}

/// An open, logged-in server connection.
pub(crate) struct ServerConn {
    pub(crate) stream: Stream,
    pub(crate) key: Arc<ServerKey>,
    pub(crate) record: Arc<ServerRecord>,
    pub(crate) opening: Arc<Opening>,
    pub(crate) reported: Reported,
    /// What SETs have made of it since it was opened.
    pub(crate) settings: Arc<Settings>,
    pub(crate) tx: TxStatus,
    /// A request was sent and its ReadyForQuery has not come.
    pub(crate) in_flight: bool,
    /// A request has been answered, and what it did to the session is not in anybody's books yet.
    pub(crate) unbooked: bool,
    pub(crate) statements: Statements,
    /// Names of statements to be closed with the next extended request.
    pub(crate) to_close: Vec<Vec<u8>>,
    /// Statements under a client's own names, to be closed before anybody else may meet them.
    pub(crate) lent: Vec<Vec<u8>>,
    pub(crate) unnamed: Option<UnnamedOwner>,
    /// The client that used it last; clients are numbered from 1.
    pub(crate) last_client: u64,
    /// More than one client may have drawn from sequences here.
    pub(crate) mixed_draws: bool,
    /// It has our question about what is left behind, prepared.
    pub(crate) probes: bool,
    /// Code that nobody has seen may have changed its settings.
    pub(crate) hidden: bool,
    /// Our books and the server's differ: not to be used again.
    pub(crate) unfit: bool,
    /// What it is notified of while it listens for a client; `None`: nobody wants to know.
    pub(crate) heard: Option<Heard>,
    pub(crate) opened_at: Instant,
    pub(crate) idle_since: Instant,
}

impl ServerConn {
    /// The server holds this statement now.
    pub(crate) fn learn_statement(&mut self, id: StatementId, parsed: u64) {
        // It was to go, and is here again.
        if !self.to_close.is_empty() {
            let name = id.server_name();
            self.to_close.retain(|other| *other != name);
        }
        if let Some(evicted) = self.statements.insert(id, parsed) {
            self.to_close.push(evicted.server_name());
        }
    }
}

/// The named statements a server holds, least recently used first out.
#[derive(Default)]
pub(crate) struct Statements {
    known: HashMap<StatementId, Known>,
    wants: u64,
}

#[derive(Clone, Copy)]
struct Known {
    /// When it was last wanted, counted in wants.
    wanted: u64,
    /// The stamp of its Parse: later Parses have larger ones, on whatever server.
    parsed: u64,
    /// What its rows looked like when it was parsed.
    shape: Option<Shape>,
}

/// What a statement's rows look like: their columns' names and types, as a number that is the same on every server of a
/// database. Equal numbers for different rows would only make a check pass that need not have been made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape(u64);

impl Shape {
    /// No rows at all.
    pub(crate) const NONE: Self = Self(0);

    /// Of a RowDescription's body. Which table a column is from may change, as in Postgres.
    /// (protocol-message-formats.html, "RowDescription")
    pub(crate) fn of_row_description(body: &[u8]) -> Self {
        let mut hasher = DefaultHasher::new();
        let (count, mut rest) = body.split_at(body.len().min(2));
        hasher.write(count);
        while let Some(end) = memchr(0, rest) {
            let (name, after) = rest.split_at(end + 1);
            // Behind the name: table and column, 6 bytes; type, length and modifier, 10; format, 2.
            let Some((origin_type_format, after)) = after.split_at_checked(18) else {
                break;
            };
            hasher.write(name);
            hasher.write(origin_type_format.get(6..16).unwrap_or_default());
            rest = after;
        }
        Self(hasher.finish() | 1)
    }
}

/// Statements kept a server; Postgres pays some 10–100 kB of memory for each.
const STATEMENTS_MAX: usize = 500;

impl Statements {
    /// Whether the server has `id`, parsed at `since` or later; and, if it was asked, what its rows looked like then.
    pub(crate) fn wanted(&mut self, id: StatementId, since: u64) -> Option<Option<Shape>> {
        self.wants += 1;
        let known = self
            .known
            .get_mut(&id)
            .filter(|known| known.parsed >= since)?;
        known.wanted = self.wants;
        Some(known.shape)
    }

    /// What the rows of `id` look like as the server parsed it at `since` or later; `None` if it has not, the inner one if
    /// it was not asked.
    pub(crate) fn shape(&self, id: StatementId, since: u64) -> Option<Option<Shape>> {
        let known = self.known.get(&id).filter(|known| known.parsed >= since);
        known.map(|known| known.shape)
    }

    /// The server has described `id` as it parsed it at `parsed`.
    pub(crate) fn learn_shape(&mut self, id: StatementId, parsed: u64, shape: Shape) {
        if let Some(known) = self.known.get_mut(&id)
            && known.parsed == parsed
        {
            known.shape = Some(shape);
        }
    }

    /// Notes that the server has `id`; returns a statement to be closed if that is one too many.
    pub(crate) fn insert(&mut self, id: StatementId, parsed: u64) -> Option<StatementId> {
        self.wants += 1;
        self.known.insert(
            id,
            Known {
                wanted: self.wants,
                parsed,
                shape: None,
            },
        );
        if self.known.len() <= STATEMENTS_MAX {
            return None;
        }
        let oldest = self
            .known
            .iter()
            .filter(|(known, _)| **known != id)
            .min_by_key(|(_, known)| known.wanted);
        let oldest = oldest.map(|(known, _)| *known)?;
        self.known.remove(&oldest);
        Some(oldest)
    }

    pub(crate) fn remove(&mut self, id: StatementId) {
        self.known.remove(&id);
    }

    pub(crate) fn len(&self) -> usize {
        self.known.len()
    }

    pub(crate) fn clear(&mut self) {
        self.known.clear();
    }

    /// The server is to have none of them any more.
    pub(crate) fn take_all(&mut self) -> impl Iterator<Item = StatementId> {
        self.known.drain().map(|(id, _)| id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(number: u64) -> StatementId {
        StatementId { process: 1, number }
    }

    #[test]
    fn the_least_recently_wanted_statement_goes_first() {
        let mut statements = Statements::default();
        for number in 0..STATEMENTS_MAX as u64 {
            assert_eq!(statements.insert(id(number), 1), None);
        }
        assert_eq!(statements.wanted(id(0), 1), Some(None));
        assert_eq!(statements.insert(id(9_999), 1), Some(id(1)));
        assert_eq!(statements.wanted(id(1), 1), None);
        assert_eq!(statements.wanted(id(0), 2), None, "parsed before that");
    }

    #[test]
    fn a_shape_is_of_the_parse_that_was_described() {
        let mut statements = Statements::default();
        statements.insert(id(1), 5);
        statements.learn_shape(id(1), 4, Shape::NONE);
        assert_eq!(statements.shape(id(1), 5), Some(None));
        statements.learn_shape(id(1), 5, Shape::NONE);
        assert_eq!(statements.shape(id(1), 5), Some(Some(Shape::NONE)));
        assert_eq!(statements.shape(id(1), 6), None);
        statements.insert(id(1), 6);
        assert_eq!(statements.shape(id(1), 6), Some(None), "parsed anew");
    }

    #[test]
    fn rows_differ_by_names_and_types_and_not_by_where_they_come_from() {
        let column = |name: &str, table: u32, kind: u32| {
            let mut bytes = [name.as_bytes(), b"\0", &table.to_be_bytes(), &[0, 1]].concat();
            bytes.extend_from_slice(&kind.to_be_bytes());
            bytes.extend_from_slice(&[0, 4, 255, 255, 255, 255, 0, 0]);
            bytes
        };
        let rows = |columns: &[Vec<u8>]| {
            let count = u16::try_from(columns.len()).unwrap().to_be_bytes();
            Shape::of_row_description(&[count.to_vec(), columns.concat()].concat())
        };
        let one = rows(&[column("a", 7, 23)]);
        assert_eq!(one, rows(&[column("a", 8, 23)]));
        for other in [
            rows(&[column("b", 7, 23)]),
            rows(&[column("a", 7, 25)]),
            rows(&[column("a", 7, 23), column("a", 7, 23)]),
            rows(&[]),
            Shape::NONE,
        ] {
            assert_ne!(one, other);
        }
    }
}
