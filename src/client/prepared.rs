//! A client's prepared statements, and what a server must be told so that they exist there too. Names on servers stand
//! for texts, so clients with equal statements share a server's plan; a client's own names never reach a server, except
//! where an error must carry them. Writes messages, sends none. Called by `session/`.
//! (protocol-flow.html#PROTOCOL-FLOW-EXT-QUERY)

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::classify::Analysis;
use crate::client::request::frames;
use crate::relay::{Expected, names_a_changed_statement};
use crate::server::conn::{
    STATEMENT_CHANGED, STATEMENT_PREFIX, ServerConn, Shape, StatementId, Statements, UnnamedOwner,
};
use crate::wire::error_response::ErrorResponse;
use crate::wire::frame::{HEADER, Header};
use crate::wire::messages::{
    Bind, Parse, Target, put_cstr, put_empty, put_parse, put_statement_target,
};

/// A text some client has prepared.
pub(super) struct Statement {
    id: StatementId,
    server_name: Box<[u8]>,
    text: Box<[u8]>,
    /// Parameter types as sent in the Parse.
    types: Box<[u8]>,
    analysis: Arc<Analysis>,
    /// Postgres plans it, and so refuses to run it once its rows would look different.
    planned: bool,
    /// Some server has parsed it.
    proven: AtomicBool,
}

/// A client's name for a statement.
struct Named {
    statement: Arc<Statement>,
    /// The stamp of its Parse. A server that parsed the text before that may have planned it for a table that has changed.
    parsed: u64,
    /// What its rows looked like then; `None` until a server has said so.
    shape: Option<Shape>,
}

/// Statements by text, across clients; forgets those no client has any more.
pub(crate) struct StatementRegistry {
    process: u32,
    texts: Mutex<HashMap<u64, Vec<Weak<Statement>>>>,
    hasher: RandomState,
    next: AtomicU64,
    stamps: AtomicU64,
}

impl StatementRegistry {
    /// `process` is random: it keeps this proxy's names apart from everybody's.
    pub(crate) fn new(process: u32) -> Self {
        Self {
            process,
            texts: Mutex::default(),
            hasher: RandomState::new(),
            next: AtomicU64::new(0),
            stamps: AtomicU64::new(0),
        }
    }

    /// Numbers Parses in the order in which they are sent.
    fn stamp(&self) -> u64 {
        self.stamps.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn has_proven(&self, parse: &Parse<'_>) -> bool {
        let hash = self.hasher.hash_one((parse.text, parse.types));
        let texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        let mut alike = texts
            .get(&hash)
            .into_iter()
            .flatten()
            .filter_map(Weak::upgrade);
        alike.any(|s| {
            *s.text == *parse.text && *s.types == *parse.types && s.proven.load(Ordering::Relaxed)
        })
    }

    fn intern(&self, parse: &Parse<'_>, analysis: &Arc<Analysis>) -> Arc<Statement> {
        let hash = self.hasher.hash_one((parse.text, parse.types));
        let mut texts = self.texts.lock().unwrap_or_else(PoisonError::into_inner);
        let alike = texts.entry(hash).or_default();
        let found = alike.iter().filter_map(Weak::upgrade);
        if let Some(known) = found
            .into_iter()
            .find(|s| *s.text == *parse.text && *s.types == *parse.types)
        {
            return known;
        }
        alike.retain(|statement| statement.strong_count() > 0);
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let id = StatementId {
            process: self.process,
            number,
        };
        let statement = Arc::new(Statement {
            id,
            server_name: id.server_name().into(),
            text: parse.text.into(),
            types: parse.types.into(),
            analysis: Arc::clone(analysis),
            planned: is_planned(parse.text),
            proven: AtomicBool::new(false),
        });
        alike.push(Arc::downgrade(&statement));
        if texts.len().is_power_of_two() {
            texts.retain(|_, alike| alike.iter().any(|statement| statement.strong_count() > 0));
        }
        statement
    }
}

/// The statements of one client.
pub(super) struct Prepared {
    client: u64,
    named: HashMap<Box<[u8]>, Named>,
    unnamed: Option<Unnamed>,
    unnamed_count: u64,
    /// Changes made by messages whose answers have not come, in order.
    undo: Vec<Undo>,
    /// A kept buffer for the unnamed statement's Parse.
    spare: Vec<u8>,
}

struct Unnamed {
    serial: u64,
    /// The whole Parse; empty if it was too large to keep.
    parse: Vec<u8>,
    analysis: Arc<Analysis>,
}

enum Undo {
    Named(Box<[u8]>, Option<Named>),
    /// The unnamed statement is gone if its Parse fails, as in Postgres.
    Unnamed,
    Nothing,
}

/// Parses of the unnamed statement larger than this are not kept for another server.
const UNNAMED_KEPT_MAX: usize = 1024 * 1024;

/// Whether a batch went to the server's output in a new form or may pass as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Translated {
    AsItIs,
    /// The whole batch is in the server's output; of a huge last message, the part that was there.
    Rewritten,
    /// What comes before the message at `at`, `parses` Parse messages among it, is in the server's output, and a question on
    /// the statement which that message names: whether the client may still use it. All else waits for the answers.
    Asked {
        at: usize,
        parses: usize,
    },
}

/// Which messages of a batch may make it wait for an answer of the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asking {
    Any,
    /// The first one has been asked for.
    AfterFirst,
    /// The server answers no more: an error came first.
    No,
}

/// What is to be made of a message that names a statement.
enum Brought {
    /// The server has it, or will have.
    Here,
    /// The server was asked what its rows look like there.
    Asked,
    /// They look different from what the client was promised.
    Changed,
}

impl Prepared {
    pub(super) fn new(client: u64) -> Self {
        let (named, undo, spare) = (HashMap::new(), Vec::new(), Vec::new());
        Self {
            client,
            named,
            unnamed: None,
            unnamed_count: 0,
            undo,
            spare,
        }
    }

    /// What the statement `name` is; `None` if there is no such statement.
    pub(super) fn analysis(&self, name: &[u8]) -> Option<&Arc<Analysis>> {
        if name.is_empty() {
            self.unnamed.as_ref().map(|unnamed| &unnamed.analysis)
        } else {
            self.named.get(name).map(|named| &named.statement.analysis)
        }
    }

    /// Named ones.
    pub(super) fn len(&self) -> usize {
        self.named.len()
    }

    pub(super) fn forget(&mut self, name: &[u8]) {
        self.named.remove(name);
    }

    pub(super) fn forget_all(&mut self) {
        self.named.clear();
    }

    /// A simple Query drops the unnamed statement.
    pub(super) fn forget_unnamed(&mut self) {
        if let Some(unnamed) = self.unnamed.take() {
            self.spare = unnamed.parse;
        }
    }

    /// How many of the last request's own Parse and Close messages succeeded: the rest did nothing. `there`: what the server
    /// has that it went to.
    pub(super) fn settle(&mut self, confirmed: usize, there: Option<&Statements>) {
        for undo in self.undo.iter().take(confirmed) {
            if let Undo::Named(name, _) = undo
                && let Some(named) = self.named.get_mut(name)
            {
                named.statement.proven.store(true, Ordering::Relaxed);
                let shape = there.and_then(|there| there.shape(named.statement.id, named.parsed));
                named.shape = named.shape.or(shape.flatten());
            }
        }
        while self.undo.len() > confirmed {
            match self.undo.pop() {
                Some(Undo::Named(name, Some(statement))) => {
                    drop(self.named.insert(name, statement))
                }
                Some(Undo::Named(name, None)) => drop(self.named.remove(&name)),
                Some(Undo::Unnamed) => self.forget_unnamed(),
                Some(Undo::Nothing) | None => {}
            }
        }
        self.undo.clear();
    }

    /// Whether a batch does nothing but prepare, under new names, what some server has parsed before: then it may be answered
    /// while every server is busy, and parsed when it is first run. A client that waits for its ParseComplete may be the
    /// very one that keeps the servers busy (pgbench drives many sessions from a thread that blocks in each).
    pub(super) fn may_defer(&self, batch: &[u8], registry: &StatementRegistry) -> bool {
        frames(batch).all(|(header, frame)| match header.tag {
            b'P' => Parse::read(frame.get(HEADER..).unwrap_or_default()).is_some_and(|parse| {
                !parse.name.is_empty()
                    && !self.named.contains_key(parse.name)
                    && registry.has_proven(&parse)
            }),
            b'S' => true,
            _ => false,
        })
    }

    /// Notes what a batch that was answered here prepared and closed.
    pub(super) fn note_batch(
        &mut self,
        batch: &[u8],
        analyses: &[Arc<Analysis>],
        registry: &StatementRegistry,
    ) {
        let mut analyses = analyses.iter();
        for (header, frame) in frames(batch) {
            let body = frame.get(HEADER..).unwrap_or_default();
            match header.tag {
                b'P' => {
                    let (Some(parse), Some(analysis)) = (Parse::read(body), analyses.next()) else {
                        continue;
                    };
                    if parse.name.is_empty() {
                        self.replace_unnamed(frame, analysis);
                    } else {
                        let statement = registry.intern(&parse, analysis);
                        self.named.insert(
                            parse.name.into(),
                            Named {
                                statement,
                                parsed: registry.stamp(),
                                shape: None,
                            },
                        );
                    }
                }
                b'C' => match Target::read(body) {
                    Some(target) if target.kind == b'S' => self.forget(target.name),
                    Some(_) | None => {}
                },
                _ => {}
            }
        }
    }

    fn replace_unnamed(&mut self, frame: &[u8], analysis: &Arc<Analysis>) -> u64 {
        self.forget_unnamed();
        self.unnamed_count += 1;
        let mut parse = std::mem::take(&mut self.spare);
        parse.clear();
        if frame.len() <= UNNAMED_KEPT_MAX {
            parse.extend_from_slice(frame);
        }
        self.unnamed = Some(Unnamed {
            serial: self.unnamed_count,
            parse,
            analysis: Arc::clone(analysis),
        });
        self.unnamed_count
    }

    /// Makes `batch` fit for `server`: statements it lacks are sent ahead (their answers to be swallowed), names become
    /// the server's. `analyses` are those of the batch's Parse messages, in order. `huge` is the full length of the last
    /// message if only its beginning is in `batch`.
    #[expect(clippy::too_many_arguments, reason = "all that a batch meets, once")]
    pub(super) fn translate(
        &mut self,
        batch: &[u8],
        analyses: &[Arc<Analysis>],
        huge: Option<usize>,
        asking: Asking,
        server: &mut ServerConn,
        expected: &mut std::collections::VecDeque<Expected>,
        registry: &StatementRegistry,
    ) -> Translated {
        let plain = huge.is_none() && self.passes_as_it_is(batch, server);
        let of = analyses.len();
        let mut analyses = analyses.iter();
        let from = batch.len();
        let mut last_at = 0;
        for (header, frame) in frames(batch) {
            let at = last_at;
            last_at += frame.len();
            let body = frame.get(HEADER..).unwrap_or_default();
            let whole = if last_at == from {
                huge.unwrap_or(header.whole)
            } else {
                header.whole
            };
            let mut step = Step {
                header: Header { whole, ..header },
                frame,
                after: batch.get(last_at..).unwrap_or_default(),
                asks: match asking {
                    Asking::Any => true,
                    Asking::AfterFirst => at > 0,
                    Asking::No => false,
                },
                plain,
                server,
                expected,
                registry,
            };
            match header.tag {
                b'P' => match Parse::read(body) {
                    Some(parse) => self.parse(&mut step, &parse, analyses.next(), registry),
                    None => {
                        // A huge one, of which only the beginning is here (a malformed one fails in any case).
                        if body.first() == Some(&0) {
                            let serial = self.replace_unnamed(
                                &[],
                                &analyses.next().cloned().unwrap_or_else(Analysis::other),
                            );
                            step.server.unnamed = Some((self.client, serial));
                            step.expected
                                .push_back(Expected::ParsedUnnamed((self.client, serial)));
                        } else {
                            step.expected.push_back(Expected::Closed(None));
                        }
                        self.undo.push(Undo::Nothing);
                        step.pass();
                    }
                },
                b'B' => match Bind::read(body) {
                    Some(bind) => {
                        if let Brought::Asked = self.bind(&mut step, &bind) {
                            let parses = of - analyses.len();
                            return Translated::Asked { at, parses };
                        }
                    }
                    None => step.pass(),
                },
                b'D' | b'C' => match Target::read(body) {
                    Some(target) if target.kind == b'S' => {
                        if let Brought::Asked = self.statement_target(&mut step, &target) {
                            let parses = of - analyses.len();
                            return Translated::Asked { at, parses };
                        }
                    }
                    Some(target) if header.tag == b'C' && target.kind == b'P' => {
                        self.undo.push(Undo::Nothing);
                        step.expected.push_back(Expected::Closed(None));
                        step.pass();
                    }
                    _ => step.pass(),
                },
                _ => step.pass(),
            }
        }
        if plain {
            Translated::AsItIs
        } else {
            Translated::Rewritten
        }
    }

    /// Whether a batch means the same to this server as it stands: it names no named statement, and the unnamed one only
    /// after a Parse of it, or where the server holds it already.
    fn passes_as_it_is(&self, batch: &[u8], server: &ServerConn) -> bool {
        let mut unnamed_fits = self.holds_unnamed(server);
        frames(batch).all(|(header, frame)| {
            let body = frame.get(HEADER..).unwrap_or_default();
            let name = match header.tag {
                b'P' => Parse::read(body).map(|parse| parse.name),
                b'B' => Bind::read(body).map(|bind| bind.statement),
                b'D' | b'C' => Target::read(body)
                    .filter(|target| target.kind == b'S')
                    .map(|target| target.name),
                _ => None,
            };
            unnamed_fits |= header.tag == b'P';
            // No name: nothing to translate. A malformed message passes too, for Postgres to say so.
            name.is_none_or(|name| name.is_empty() && unnamed_fits)
        })
    }

    /// The server's unnamed statement is this client's, or neither has one.
    fn holds_unnamed(&self, server: &ServerConn) -> bool {
        match &self.unnamed {
            Some(unnamed) => server.unnamed == Some((self.client, unnamed.serial)),
            None => server.unnamed.is_none(),
        }
    }

    fn parse(
        &mut self,
        step: &mut Step<'_>,
        parse: &Parse<'_>,
        analysis: Option<&Arc<Analysis>>,
        registry: &StatementRegistry,
    ) {
        let Some(analysis) = analysis else {
            return step.pass();
        };
        if parse.name.is_empty() {
            let serial = self.replace_unnamed(step.frame, analysis);
            // Postgres drops the old one before it looks at the new one. Messages after this one in the batch find it.
            step.server.unnamed = Some((self.client, serial));
            step.expected
                .push_back(Expected::ParsedUnnamed((self.client, serial)));
            self.undo.push(Undo::Unnamed);
            return step.pass();
        }
        if self.named.contains_key(parse.name) {
            // Postgres refuses the second Parse of a name with 42P05, after looking at the text. It shall say so itself,
            // in the client's words: a statement of that very name is made first.
            put_parse(&mut step.server.stream.output, parse.name, b"", &[0, 0]);
            step.expected.push_back(Expected::OursOther);
            step.server.lent.push(parse.name.to_vec());
            step.expected.push_back(Expected::Closed(None));
            self.undo.push(Undo::Nothing);
            return step.pass();
        }
        let statement = registry.intern(parse, analysis);
        // A client that prepares anew wants the text planned anew: a table may have changed.
        step.put_parse(&statement);
        let parsed = registry.stamp();
        step.expected
            .push_back(Expected::Parsed(statement.id, parsed));
        if statement.planned {
            if describes(step.after, parse.name) {
                step.expected
                    .push_back(Expected::Described(statement.id, parsed));
            } else {
                step.put_describe(&statement, parsed);
            }
        }
        let shape = None;
        let named = Named {
            statement,
            parsed,
            shape,
        };
        let before = self.named.insert(parse.name.into(), named);
        self.undo.push(Undo::Named(parse.name.into(), before));
    }

    fn bind(&mut self, step: &mut Step<'_>, bind: &Bind<'_>) -> Brought {
        if bind.statement.is_empty() {
            self.bring_unnamed(step);
            step.pass();
            return Brought::Here;
        }
        let Some(named) = self.named.get_mut(bind.statement) else {
            step.pass();
            return Brought::Here;
        };
        let brought = step.bring(named);
        let name = match brought {
            Brought::Here => &named.statement.server_name,
            Brought::Changed => STATEMENT_CHANGED.as_bytes(),
            Brought::Asked => return brought,
        };
        // The new name is longer or shorter than the old one; a huge message's length changes by the same.
        let whole = (step.header.whole + name.len()).saturating_sub(bind.statement.len());
        let here = HEADER + bind.portal.len() + name.len() + 2 + bind.rest.len();
        let out = &mut step.server.stream.output;
        out.reserve(here);
        out.push(b'B');
        out.extend_from_slice(&u32::try_from(whole - 1).unwrap_or(u32::MAX).to_be_bytes());
        put_cstr(out, bind.portal);
        put_cstr(out, name);
        out.extend_from_slice(bind.rest);
        brought
    }

    fn statement_target(&mut self, step: &mut Step<'_>, target: &Target<'_>) -> Brought {
        if step.header.tag == b'C' {
            let before = if target.name.is_empty() {
                self.forget_unnamed();
                step.server.unnamed = None;
                None
            } else {
                self.named.remove(target.name)
            };
            self.undo.push(before.map_or(Undo::Nothing, |before| {
                Undo::Named(target.name.into(), Some(before))
            }));
            // Others may still use the server's statement, so the server closes a name it does not have: no error, and
            // the answer comes in its turn.
            step.expected.push_back(Expected::Closed(None));
            step.pass();
            return Brought::Here;
        }
        if target.name.is_empty() {
            self.bring_unnamed(step);
            step.pass();
            return Brought::Here;
        }
        let Some(named) = self.named.get_mut(target.name) else {
            step.pass();
            return Brought::Here;
        };
        let brought = step.bring(named);
        let out = &mut step.server.stream.output;
        match brought {
            Brought::Here => put_statement_target(out, b'D', &named.statement.server_name),
            Brought::Changed => {
                // Postgres describes the parameters before it looks at the rows.
                put_statement_target(out, b'D', &named.statement.server_name);
                step.expected.push_back(Expected::ParametersOnly);
                put_statement_target(out, b'D', STATEMENT_CHANGED.as_bytes());
            }
            Brought::Asked => {}
        }
        brought
    }

    /// The client's name for the statement that servers call `server_name`.
    fn client_name(&self, server_name: &[u8]) -> Option<&[u8]> {
        let mut names = self.named.iter();
        names
            .find(|(_, named)| *named.statement.server_name == *server_name)
            .map(|(name, _)| name.as_ref())
    }

    /// An error's body with the client's names in place of the servers'.
    pub(super) fn in_clients_words(&self, body: &[u8]) -> Vec<u8> {
        if names_a_changed_statement(body) {
            let words = "cached plan must not change result type";
            let mut frame = Vec::new();
            ErrorResponse::error("0A000", words).put(&mut frame);
            return frame.split_off(HEADER);
        }
        let mut out = Vec::with_capacity(body.len());
        let mut rest = body;
        while let Some(at) = memchr::memmem::find(rest, STATEMENT_PREFIX.as_bytes()) {
            let (before, from) = rest.split_at(at);
            let end = from
                .iter()
                .position(|byte| !byte.is_ascii_alphanumeric() && *byte != b'_')
                .unwrap_or(from.len());
            let (name, after) = from.split_at(end);
            out.extend_from_slice(before);
            out.extend_from_slice(self.client_name(name).unwrap_or(name));
            rest = after;
        }
        out.extend_from_slice(rest);
        out
    }

    /// The client's names, in the order of their Parses.
    pub(super) fn names(&self) -> Vec<Vec<u8>> {
        let mut named: Vec<_> = self.named.iter().collect();
        named.sort_by_key(|(_, named)| named.parsed);
        named.into_iter().map(|(name, _)| name.to_vec()).collect()
    }

    /// The text and parameter types of the statement `name`.
    pub(super) fn text(&self, name: &[u8]) -> Option<(&[u8], &[u8])> {
        self.named.get(name).map(|named| {
            (
                named.statement.text.as_ref(),
                named.statement.types.as_ref(),
            )
        })
    }

    /// What the client was promised of a statement's rows, in words of its own.
    pub(super) fn promise(&self, name: &[u8]) -> String {
        let named = self.named.get(name);
        named.map_or_else(String::new, |named| format!("{:?}", named.shape))
    }

    /// The same of any statement of this client's, the unnamed one too, if it was kept.
    pub(super) fn source(&self, name: &[u8]) -> Option<(&[u8], &[u8])> {
        if !name.is_empty() {
            return self.text(name);
        }
        let parse = Parse::read(self.unnamed.as_ref()?.parse.get(HEADER..)?)?;
        Some((parse.text, parse.types))
    }

    /// Makes sure that the server's unnamed statement is this client's, or is none if it has none.
    fn bring_unnamed(&mut self, step: &mut Step<'_>) {
        if self.holds_unnamed(step.server) {
            return;
        }
        match &self.unnamed {
            Some(unnamed) if !unnamed.parse.is_empty() => {
                step.server.stream.output.extend_from_slice(&unnamed.parse);
                let owner: UnnamedOwner = (self.client, unnamed.serial);
                step.server.unnamed = Some(owner);
                step.expected.push_back(Expected::OursParsedUnnamed(owner));
            }
            Some(_) | None => {
                put_statement_target(&mut step.server.stream.output, b'C', b"");
                step.server.unnamed = None;
                step.expected.push_back(Expected::OursClosed(None));
            }
        }
    }
}

/// Closes what a server holds too much of. INVARIANT: first in a request, since after an error the server closes nothing.
pub(super) fn put_closes(
    server: &mut ServerConn,
    expected: &mut std::collections::VecDeque<Expected>,
) {
    for name in server.to_close.drain(..) {
        put_statement_target(&mut server.stream.output, b'C', &name);
        expected.push_back(Expected::OursClosed(None));
    }
}

/// One message of a batch on its way.
struct Step<'a> {
    header: Header,
    frame: &'a [u8],
    /// The messages behind it.
    after: &'a [u8],
    /// The batch may wait for an answer before it.
    asks: bool,
    /// The batch passes as it is; only the books are kept.
    plain: bool,
    server: &'a mut ServerConn,
    expected: &'a mut std::collections::VecDeque<Expected>,
    registry: &'a StatementRegistry,
}

impl Step<'_> {
    fn pass(&mut self) {
        if !self.plain {
            self.server.stream.output.extend_from_slice(self.frame);
        }
    }

    /// Sends a statement ahead if the server lacks it, or has it from before the client's own Parse. One whose rows may look
    /// different there than the client was promised, because a table has changed since or another session's `search_path` found
    /// another one, is asked about: Postgres would refuse it, and it must not run before that is known.
    fn bring(&mut self, named: &mut Named) -> Brought {
        let statement = &named.statement;
        match (
            self.server.statements.wanted(statement.id, named.parsed),
            named.shape,
        ) {
            (Some(there), None) => {
                named.shape = there;
                return Brought::Here;
            }
            (Some(None), Some(_)) => return Brought::Here,
            (Some(Some(there)), Some(promised)) if there == promised => return Brought::Here,
            (Some(Some(_)), Some(_)) if !self.asks => return Brought::Changed,
            (Some(Some(_)) | None, _) => {}
        }
        let underway = |answer: &Expected| matches!(answer, Expected::Parsed(id, _) | Expected::OursParsed(id, _) if *id == statement.id);
        if self.expected.iter().any(underway) {
            return Brought::Here;
        }
        self.put_parse(statement);
        let parsed = self.registry.stamp();
        self.expected
            .push_back(Expected::OursParsed(statement.id, parsed));
        if statement.planned {
            self.put_describe(statement, parsed);
        }
        if named.shape.is_some() && self.asks {
            put_empty(&mut self.server.stream.output, b'H');
            return Brought::Asked;
        }
        Brought::Here
    }

    fn put_describe(&mut self, statement: &Statement, parsed: u64) {
        let out = &mut self.server.stream.output;
        put_statement_target(out, b'D', &statement.server_name);
        self.expected
            .push_back(Expected::OursDescribed(statement.id, parsed));
    }

    /// A Parse under the server's name, whatever the server holds under it: closing what is not there is no error.
    fn put_parse(&mut self, statement: &Statement) {
        let out = &mut self.server.stream.output;
        put_statement_target(out, b'C', &statement.server_name);
        self.expected
            .push_back(Expected::OursClosed(Some(statement.id)));
        put_parse(
            out,
            &statement.server_name,
            &statement.text,
            &statement.types,
        );
    }
}

/// Whether the client describes the statement `name` next.
fn describes(after: &[u8], name: &[u8]) -> bool {
    let next = frames(after)
        .next()
        .filter(|(header, _)| header.tag == b'D');
    next.and_then(|(_, frame)| Target::read(frame.get(HEADER..)?))
        .is_some_and(|target| target.kind == b'S' && target.name == name)
}

/// Whether a text is one whose rows Postgres compares with those it promised. Others, a FETCH or a SHOW, look as they do when
/// they run. A text that hides its first word is run unchecked.
fn is_planned(text: &[u8]) -> bool {
    let mut rest = text;
    loop {
        rest = rest.trim_ascii_start();
        rest = if let Some(after) = rest.strip_prefix(b"(") {
            after
        } else if rest.starts_with(b"--") {
            let end = memchr::memchr2(b'\n', b'\r', rest).unwrap_or(rest.len());
            rest.get(end..).unwrap_or_default()
        } else if let Some(after) = rest.strip_prefix(b"/*") {
            let end = memchr::memmem::find(after, b"*/").map_or(after.len(), |at| at + 2);
            after.get(end..).unwrap_or_default()
        } else {
            break;
        };
    }
    let end = rest
        .iter()
        .position(|byte| !byte.is_ascii_alphabetic())
        .unwrap_or(rest.len());
    let word = rest.get(..end).unwrap_or_default();
    [
        "select", "with", "values", "table", "insert", "update", "delete", "merge",
    ]
    .iter()
    .any(|planned| word.eq_ignore_ascii_case(planned.as_bytes()))
}
