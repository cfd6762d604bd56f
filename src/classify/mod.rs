//! What a statement is: a read that a replica may answer, a poll, progress, a start, a definition, or anything else;
//! and what it does to its session. Never fails and never guesses: what is not understood is `Other`, a write. Has no
//! clock, no I/O. Called by `client/session` for every Query and Parse text, and by `route.rs` for the types.
//!
//! Three stages, each seeing only what the one before could not settle: a scan for words that matter (most texts end
//! here, without an allocation); the memo; the lexer, and behind it `sql.rs` for what may be a read.
//!
//! Why a session effect is a list and not a parse tree: the session has to follow what *it* must replay or pin, and
//! Postgres itself judges the rest. An effect counts only if the statement succeeds, in its transaction.

mod calls;
mod catalog;
mod effects;
mod lexer;
mod memo;
mod sql;
#[cfg(test)]
mod tests;

pub(crate) use memo::MemoStats;

use crate::config::Reads;
use crate::pgflow::functions;
use aho_corasick::{AhoCorasick, AhoCorasickKind};
use lexer::{Kind, Lexer, Token};
use memchr::{memchr, memmem};
use memo::Memo;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use uuid::Uuid;

pub(crate) use self::effects::together;

/// What a text is. One text may hold several statements (simple protocol).
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Analysis {
    pub(crate) class: StatementClass,
    /// In statement order, all statements together.
    pub(crate) effects: Vec<Effect>,
    /// Top-level statements that are not empty; 0 is an empty query.
    pub(crate) statements: usize,
    /// The flow a Progress, Start or Define call names.
    pub(crate) flow: Arg,
    /// The queues it may put messages into, or make messages of visible.
    pub(crate) feeds: Feeds,
    /// `EXPLAIN (FLOWGATE)`: where in the text the statement begins that it asks about.
    pub(crate) explains: Option<usize>,
    pub(crate) refused: Refused,
}

/// A replica has refused this text as a write, which no text can tell of what it calls: no replica is asked again, as long as
/// the text is remembered.
#[derive(Debug, Default)]
pub(crate) struct Refused(AtomicBool);

impl Refused {
    pub(crate) fn note(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    pub(crate) fn is_known(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

impl Clone for Refused {
    fn clone(&self) -> Self {
        Self(self.is_known().into())
    }
}

impl PartialEq for Refused {
    fn eq(&self, other: &Self) -> bool {
        self.is_known() == other.is_known()
    }
}

/// Queues in which there may be something to read once a statement has committed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Feeds {
    #[default]
    Nothing,
    Queue(String),
    Any,
}

impl Feeds {
    pub(crate) fn and(self, other: &Self) -> Self {
        match (self, other) {
            (Self::Nothing, other) => other.clone(),
            (known, Self::Nothing) => known,
            (Self::Queue(one), Self::Queue(other)) if one == *other => Self::Queue(one),
            (Self::Queue(_) | Self::Any, Self::Queue(_) | Self::Any) => Self::Any,
        }
    }
}

impl Analysis {
    /// A text about which nothing is known.
    pub(crate) fn other() -> Arc<Self> {
        Arc::new(Self {
            class: StatementClass::Other,
            effects: Vec::new(),
            statements: 1,
            flow: Arg::Absent,
            feeds: Feeds::Nothing,
            explains: None,
            refused: Refused::default(),
        })
    }

    /// A call of a function of which only the server knows which it is.
    pub(crate) fn opaque() -> Arc<Self> {
        Arc::new(Self {
            class: StatementClass::Other,
            effects: vec![Effect::Opaque(0)],
            statements: 1,
            flow: Arg::Absent,
            feeds: Feeds::Nothing,
            explains: None,
            refused: Refused::default(),
        })
    }

    /// Whether it may send events: anything that may write does, by a trigger, a function or a rule, unless it is plainly about the
    /// session.
    pub(crate) fn may_tell(&self) -> bool {
        match self.class {
            StatementClass::Progress(_) | StatementClass::Start(_) | StatementClass::Define => true,
            StatementClass::Read(_) | StatementClass::Poll(_) => false,
            StatementClass::Other => {
                let plain = |effect: &Effect| {
                    matches!(
                        effect,
                        Effect::Transaction
                            | Effect::Set { .. }
                            | Effect::Reset(_)
                            | Effect::ResetAll
                            | Effect::Deallocate(_)
                            | Effect::DeallocateAll
                            | Effect::DiscardAll
                            | Effect::Listen(_)
                            | Effect::Unlisten(_)
                            | Effect::UnlistenAll
                    )
                };
                let session_only = !self.effects.is_empty() && self.effects.iter().all(plain);
                self.statements > 1 || self.statements == 1 && !session_only
            }
        }
    }

    /// Whether runs may look different once this has committed. Of statements that call nothing of pgflow's we know
    /// only what they say: a function of the user's own may write to runs, too.
    pub(crate) fn writes_runs(&self) -> bool {
        match self.class {
            StatementClass::Progress(_) | StatementClass::Start(_) | StatementClass::Define => true,
            StatementClass::Read(_) | StatementClass::Poll(_) | StatementClass::Other => false,
        }
    }
}

/// What a statement is worth when not all can be served: who waits for a server, and who is refused. The later the more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Worth {
    /// Asked again soon, and answered elsewhere or a little older as well.
    Read,
    /// Nothing is lost but time.
    Poll,
    /// More work, where there is too much.
    Start,
    #[default]
    Other,
    /// Work already paid for; what it completes makes room.
    Progress,
}

impl Worth {
    pub(crate) const ALL: [Self; 5] = [
        Self::Read,
        Self::Poll,
        Self::Start,
        Self::Other,
        Self::Progress,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Poll => "poll",
            Self::Start => "start",
            Self::Other => "other",
            Self::Progress => "progress",
        }
    }
}

impl StatementClass {
    pub(crate) fn worth(&self) -> Worth {
        match self {
            Self::Read(_) => Worth::Read,
            Self::Poll(_) => Worth::Poll,
            Self::Start(_) => Worth::Start,
            Self::Define | Self::Other => Worth::Other,
            Self::Progress(_) => Worth::Progress,
        }
    }

    /// The runs it concerns.
    pub(crate) fn run(&self) -> RunRef {
        match self {
            Self::Read(run) | Self::Progress(run) | Self::Start(run) => *run,
            Self::Poll(_) | Self::Define => RunRef::None,
            Self::Other => RunRef::All,
        }
    }
}

/// Anything but `Other` is said of a single statement only.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum StatementClass {
    /// Provably reads only, and concerns these runs: a fresh enough replica may answer.
    Read(RunRef),
    /// One call that waits for work, and nothing else.
    Poll(PollRef),
    /// Writes to these runs; work already paid for.
    Progress(RunRef),
    /// Begins a run: the one named, or `All` where Postgres will choose its id.
    Start(RunRef),
    /// Changes the definition of `Analysis::flow`.
    Define,
    /// Everything else: to the primary, untouched. Takes it that anything may be written.
    Other,
}

/// Which runs a statement concerns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum RunRef {
    Literal(Uuid),
    /// `$n`, from 1; its value is to be read as a uuid when bound.
    Param(u16),
    /// Any run may be concerned.
    All,
    /// No run is, e.g. flow definitions.
    None,
}

/// An argument of a recognised call.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum Arg {
    /// Not given, so its default holds.
    #[default]
    Absent,
    Null,
    /// A string or number, without quotes.
    Literal(String),
    Param(u16),
    /// Something to be computed.
    Expression,
}

/// The arguments of a `read_with_poll`. INVARIANT: none is `Expression`, and there is no `conditional`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PollRef {
    pub(crate) queue: Arg,
    pub(crate) vt: Arg,
    pub(crate) qty: Arg,
    pub(crate) max_poll_seconds: Arg,
    pub(crate) poll_interval_ms: Arg,
    /// Where its text or its parameters say how long it waits; `None`: it cannot be made to wait less.
    pub(crate) patience: Option<Patience>,
}

/// How a poll is made to look for a shorter time than it asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Patience {
    /// `max_poll_seconds` is written in the text here.
    Written { start: usize, end: usize },
    /// It is not given; an argument more may be written here.
    Missing { at: usize },
    /// It is this parameter, which stands for nothing else.
    Bound(u16),
}

impl Patience {
    /// The text of a poll that looks for so many seconds; `None`: it is for the parameter to say.
    pub(crate) fn text(self, text: &[u8], seconds: u32) -> Option<Vec<u8>> {
        let (start, end, words) = match self {
            Self::Written { start, end } => (start, end, seconds.to_string()),
            Self::Missing { at } => (at, at, format!(", max_poll_seconds => {seconds}")),
            Self::Bound(_) => return None,
        };
        Some([text.get(..start)?, words.as_bytes(), text.get(end..)?].concat())
    }
}

/// What a statement does to its session if it succeeds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Any SET that outlives the transaction, also `SET TIME ZONE`, `SET NAMES`, `SET SCHEMA`, `SET ROLE`, `SET SESSION
    /// AUTHORIZATION` (which sets the role back to none, too), `SET SESSION CHARACTERISTICS` (one effect a setting).
    Set {
        /// The setting as `pg_settings` has it, in lower case: `timezone`, `role`, `session_authorization`, …
        name: String,
        /// A whole SET statement that does it again; equal spellings are equal here.
        sql: String,
    },
    /// Ends with the transaction: nothing to keep.
    SetLocal,
    /// `RESET x`, `SET x TO DEFAULT`.
    Reset(String),
    ResetAll,
    Listen(String),
    Unlisten(String),
    UnlistenAll,
    Notify,
    DiscardAll,
    /// Plans, sequences or temp tables.
    DiscardOther,
    /// SQL's PREPARE, EXECUTE and DEALLOCATE.
    Prepare(String),
    Execute(String),
    Deallocate(String),
    DeallocateAll,
    DeclareHold,
    TempObject,
    /// A lock that outlives the transaction.
    AdvisorySession,
    AdvisoryUnlockAll,
    Load,
    /// `set_config` that is not plainly local.
    SetConfig,
    Copy,
    /// BEGIN, COMMIT, SAVEPOINT and their kin, PREPARE TRANSACTION.
    Transaction,
    /// Asks which channels the session listens to.
    ListeningChannels,
    /// Asks which statements the session has prepared.
    PreparedStatements,
    /// Asks for a value the session drew from a sequence before: `currval`, `lastval`.
    SequenceValue,
    /// DROP or ALTER DATABASE, or CREATE DATABASE from a template: nobody else may be connected to this one.
    NeedsDatabaseAlone(String),
    /// Does something to the session that can't be followed (a name in another encoding, a DO block that sets):
    /// only this very server connection has that state now.
    Unfollowed,
    /// Runs code that is not in its text: a DO block, a procedure, a function that is not known. What that does to the session
    /// only the server can tell. Equal code has equal numbers.
    Opaque(u32),
}

impl Effect {
    pub(crate) fn subscribes(&self) -> bool {
        matches!(
            self,
            Self::Listen(_) | Self::Unlisten(_) | Self::UnlistenAll
        )
    }

    /// Which channels the session listens to matters to the server that runs it, or to what may follow in its transaction.
    pub(crate) fn concerns_listening(&self) -> bool {
        self.subscribes() || matches!(self, Self::Transaction | Self::ListeningChannels)
    }
}

/// Texts longer than this are cut into statements, but are no reads and no calls.
const SQL_BYTES_MAX: usize = 32 * 1024;
/// Tokens of one statement that are looked at.
const TOKENS_MAX: usize = 16 * 1024;

pub(crate) struct Classifier {
    words: AhoCorasick,
    memo: Memo<Analysis>,
    reads: Reads,
    plain: Arc<Analysis>,
    empty: Arc<Analysis>,
    transaction: Arc<Analysis>,
    copy: Arc<Analysis>,
}

impl Classifier {
    /// `seed` makes the memo's hash unforeseeable.
    pub(crate) fn new(reads: Reads, memo_bytes_max: usize, seed: u64) -> Self {
        // Words that make a text worth a closer look wherever they stand; `u&"` may spell any of them.
        let words = AhoCorasick::builder()
            .ascii_case_insensitive(true)
            .kind(Some(AhoCorasickKind::DFA))
            .build([
                "pgflow",
                "pgmq",
                "set_config",
                "advisory",
                "temp",
                "database",
                "listening_channels",
                "pg_prepared_statement",
                "distinct on",
                "operator(",
                "pg_notify",
                "currval",
                "lastval",
                "setseed",
                "pg_backup_start",
                "replication_",
                "set_limit",
                "dblink",
                "flowgate",
                "u&\"",
            ])
            .expect("a few short patterns");
        let shared = |statements, effects: &[Effect]| {
            Arc::new(Analysis {
                class: StatementClass::Other,
                effects: effects.to_vec(),
                statements,
                flow: Arg::Absent,
                feeds: Feeds::Nothing,
                explains: None,
                refused: Refused::default(),
            })
        };
        Self {
            words,
            memo: Memo::new(memo_bytes_max, seed),
            reads,
            plain: shared(1, &[]),
            empty: shared(0, &[]),
            transaction: shared(1, &[Effect::Transaction]),
            copy: shared(1, &[Effect::Copy]),
        }
    }

    /// Never fails: what can't be understood is `Other`, with the effects the lexer saw before it stopped.
    pub(crate) fn analyse(&self, text: &[u8]) -> Arc<Analysis> {
        match self.at_first_sight(text) {
            Sight::Plain => Arc::clone(&self.plain),
            Sight::Empty => Arc::clone(&self.empty),
            Sight::Transaction => Arc::clone(&self.transaction),
            Sight::Copy => Arc::clone(&self.copy),
            Sight::Candidate => self.memo.get_or_make(text, || analyse(text, self.reads)),
        }
    }

    pub(crate) fn memo_stats(&self) -> MemoStats {
        self.memo.stats()
    }

    fn at_first_sight(&self, text: &[u8]) -> Sight {
        let Some(start) = text
            .iter()
            .position(|byte| !byte.is_ascii_whitespace() && *byte != b';')
        else {
            return Sight::Empty;
        };
        let text = text[start..].trim_ascii_end();
        let one_statement = memchr(b';', text).is_none_or(|at| at + 1 == text.len());
        let length = text
            .iter()
            .position(|byte| !byte.is_ascii_alphabetic())
            .unwrap_or(text.len());
        // A comment, a parenthesis, an odd byte; or a letter that goes on in another script.
        let next = text.get(length).copied().unwrap_or(b' ');
        if !one_statement || length == 0 || lexer::is_ident_start(next) {
            return Sight::Candidate;
        }
        match First::of(&text[..length]) {
            First::Session => Sight::Candidate,
            First::Query if self.reads == Reads::All => Sight::Candidate,
            First::Transaction if self.words.is_match(text) => Sight::Candidate,
            First::Transaction => Sight::Transaction,
            First::Copy if self.words.is_match(text) || effects::may_call(text) => Sight::Candidate,
            First::Copy => Sight::Copy,
            First::Query | First::Other | First::Definition if self.words.is_match(text) => {
                Sight::Candidate
            }
            First::Query | First::Other if effects::may_call(text) => Sight::Candidate,
            First::Query | First::Other | First::Definition => Sight::Plain,
        }
    }
}

/// What is said of a text by itself, without a session: for those who hold it against a Postgres.
pub struct Judge(Classifier);

impl Judge {
    pub fn new(reads: Reads) -> Self {
        Self(Classifier::new(reads, 1 << 20, 0))
    }

    /// A replica may be asked.
    pub fn is_read(&self, text: &str) -> bool {
        let analysis = self.0.analyse(text.as_bytes());
        matches!(analysis.class, StatementClass::Read(_))
    }

    /// Every function that a read may call, as `(schema, name)`; of those in `pg_catalog` some are the grammar's alone.
    pub fn functions() -> impl Iterator<Item = (&'static str, &'static str)> {
        let own = functions::FUNCTIONS.iter();
        let own = own.filter(|function| function.class == functions::Class::Read);
        let built_in = sql::FUNCTIONS.iter().map(|name| ("pg_catalog", *name));
        built_in.chain(own.map(|function| (function.schema, function.name)))
    }
}

enum Sight {
    Plain,
    Empty,
    Transaction,
    Copy,
    Candidate,
}

/// What the first word alone says.
enum First {
    /// May change the session: look closer.
    Session,
    Query,
    Transaction,
    Copy,
    /// Names things, whatever their bodies call.
    Definition,
    Other,
}

impl First {
    fn of(word: &[u8]) -> Self {
        let is = |words: &[&str]| {
            words
                .iter()
                .any(|w| word.eq_ignore_ascii_case(w.as_bytes()))
        };
        if is(&["select", "with", "values", "table"]) {
            Self::Query
        } else if is(&["insert", "update", "delete"]) {
            Self::Other
        } else if is(effects::TRANSACTION) {
            Self::Transaction
        } else if is(&["copy"]) {
            Self::Copy
        } else if is(effects::DEFINITION) {
            Self::Definition
        } else if is(&[
            "set",
            "reset",
            "listen",
            "unlisten",
            "notify",
            "discard",
            "prepare",
            "execute",
            "deallocate",
            "declare",
            "load",
            "do",
        ]) {
            Self::Session
        } else {
            Self::Other
        }
    }
}

fn analyse(text: &[u8], reads: Reads) -> Analysis {
    let split = split(text);
    let mut found = Vec::new();
    for statement in &split.statements {
        effects::effects(text, statement, &mut found);
    }
    if split.cut_short {
        // More than we look at: it may hide anything.
        found.push(Effect::Unfollowed);
    }
    let hint = Hint::of(text);
    let (class, flow) = match split.statements.as_slice() {
        [only]
            if text.len() <= SQL_BYTES_MAX && !split.odd && std::str::from_utf8(text).is_ok() =>
        {
            class(text, only, Hint::widens(hint, reads))
        }
        _ => (StatementClass::Other, Arg::Absent),
    };
    // A read that also did something to its session would have to do it on the primary.
    let class = match class {
        StatementClass::Read(_) if hint == Some(Hint::Primary) => {
            found.clear();
            StatementClass::Other
        }
        StatementClass::Read(_)
            if found
                .iter()
                .any(|effect| !matches!(effect, Effect::Opaque(_))) =>
        {
            StatementClass::Other
        }
        StatementClass::Read(_) => {
            // All that it calls is known.
            found.clear();
            class
        }
        StatementClass::Poll(_)
        | StatementClass::Progress(_)
        | StatementClass::Start(_)
        | StatementClass::Define
        | StatementClass::Other => class,
    };
    let feeds = calls::feeds(text, &split.statements, &class);
    Analysis {
        class,
        effects: found,
        statements: split.statements.len(),
        flow,
        feeds,
        explains: explains(text, &split.statements),
        refused: Refused::default(),
    }
}

/// What a comment before or behind the statement asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hint {
    /// `/* flowgate: primary */`: never a replica.
    Primary,
    /// `/* flowgate: replica */`: a replica, if this is provably a read, whatever it reads.
    Replica,
}

impl Hint {
    fn of(text: &[u8]) -> Option<Self> {
        let text = text.trim_ascii();
        let leading = text.strip_prefix(b"/*").and_then(|rest| {
            let end = memmem::find(rest, b"*/")?;
            Self::says(&rest[..end])
        });
        leading.or_else(|| {
            let text = text.strip_suffix(b";").unwrap_or(text).trim_ascii_end();
            let rest = text.strip_suffix(b"*/")?;
            let start = memmem::rfind(rest, b"/*")?;
            Self::says(&rest[start + 2..])
        })
    }

    fn says(comment: &[u8]) -> Option<Self> {
        let word = comment.trim_ascii().strip_prefix(b"flowgate:")?;
        match word.trim_ascii() {
            b"primary" => Some(Self::Primary),
            b"replica" => Some(Self::Replica),
            _ => None,
        }
    }

    /// What counts as a read of that statement.
    fn widens(hint: Option<Self>, reads: Reads) -> Reads {
        match (hint, reads) {
            (Some(Self::Replica), Reads::Pgflow) => Reads::All,
            (_, reads) => reads,
        }
    }
}

/// `EXPLAIN (FLOWGATE) <one statement>`.
fn explains(text: &[u8], statements: &[Vec<Token>]) -> Option<usize> {
    let [tokens] = statements else { return None };
    let [explain, open, flowgate, close, _asked, ..] = tokens.as_slice() else {
        return None;
    };
    let ours = explain.is_word(text, "explain")
        && open.is(b'(')
        && flowgate.is_word(text, "flowgate")
        && close.is(b')');
    ours.then_some(close.end)
}

fn class(text: &[u8], tokens: &[Token], reads: Reads) -> (StatementClass, Arg) {
    match calls::class(text, tokens) {
        Some((class, flow)) => (class, flow),
        None => match sql::read(text, tokens, reads) {
            Some(run) => (StatementClass::Read(run), Arg::Absent),
            None => (StatementClass::Other, Arg::Absent),
        },
    }
}

struct Split {
    /// Empty statements left out.
    statements: Vec<Vec<Token>>,
    odd: bool,
    cut_short: bool,
}

/// Cuts a text into its top-level statements, as psql does: not inside parentheses (CREATE RULE), not between BEGIN
/// ATOMIC and its END (CREATE FUNCTION).
fn split(text: &[u8]) -> Split {
    let mut lexer = Lexer::new(text);
    let mut split = Split {
        statements: Vec::new(),
        odd: false,
        cut_short: false,
    };
    let mut current: Vec<Token> = Vec::new();
    let (mut parens, mut begins) = (0_usize, 0_usize);
    let mut kept = 0;
    for token in lexer.by_ref() {
        match token.kind {
            Kind::Punct(b'(') => parens += 1,
            Kind::Punct(b')') => parens = parens.saturating_sub(1),
            Kind::Punct(b';') if parens == 0 && begins == 0 => {
                if !current.is_empty() {
                    split.statements.push(std::mem::take(&mut current));
                }
                continue;
            }
            Kind::Word if parens == 0 && creates_routine(text, &current) => {
                if token.is_word(text, "begin") || (begins > 0 && token.is_word(text, "case")) {
                    begins += 1;
                } else if token.is_word(text, "end") {
                    begins = begins.saturating_sub(1);
                }
            }
            _ => {}
        }
        kept += 1;
        if kept > TOKENS_MAX {
            split.cut_short = mentions_session(text);
            break;
        }
        current.push(token);
    }
    split.odd = lexer.odd() || kept > TOKENS_MAX;
    if !current.is_empty() {
        split.statements.push(current);
    }
    split
}

fn creates_routine(text: &[u8], tokens: &[Token]) -> bool {
    let is = |at: usize, word: &str| {
        tokens
            .get(at)
            .is_some_and(|token| token.is_word(text, word))
    };
    let kind = |at: usize| is(at, "function") || is(at, "procedure");
    is(0, "create") && (kind(1) || is(1, "or") && is(2, "replace") && kind(3))
}

/// For a text too long to follow: could its rest do anything to the session? A huge INSERT could not.
fn mentions_session(text: &[u8]) -> bool {
    let mut lexer = Lexer::new(text);
    let mut begins = true;
    let mut found = false;
    for token in lexer.by_ref() {
        if token.is(b';') {
            begins = true;
            continue;
        }
        let word = token.kind == Kind::Word;
        found |= begins
            && word
            && matches!(
                First::of(token.bytes(text)),
                First::Session | First::Transaction
            );
        found |= matches!(token.kind, Kind::Word | Kind::Quoted)
            && token.name(text).is_none_or(|name| {
                name == "set_config"
                    || name.contains("advisory_")
                    || name == "temp"
                    || name == "temporary"
                    || name == "pg_temp"
            });
        begins = false;
    }
    found
}
