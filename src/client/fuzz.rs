//! What of a client's session is pure, for the fuzzer: grouping frames, surveying and translating batches, following settings and
//! pins. Not part of the proxy; called by `fuzz.rs`, which says how to run it.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::time::Instant;

use super::prepared::{Asking, Prepared, StatementRegistry, Translated};
use super::request::{BatchEnd, Grouping, Unit, frames};
use super::state::{Ending, PinReason, State};
use super::survey::Survey;
use crate::classify::{Classifier, Effect};
use crate::config::Reads;
use crate::relay::Expected;
use crate::server::conn::{ServerConn, ServerKey, ServerRecord, Statements};
use crate::server::parameters::{Opening, Reported};
use crate::server::settings::Settings;
use crate::wire::frame::FrameError;
use crate::wire::messages::TxStatus;
use crate::wire::stream::{Stream, Transport};

thread_local! {
    // Costly to make; keeps nothing that one input could leave to the next but what it remembers of equal texts.
    static CLASSIFIERS: [Classifier; 2] =
        [Reads::Pgflow, Reads::All].map(|reads| Classifier::new(reads, 1 << 20, 7));
}

/// Any text is something, the same each time.
pub(crate) fn classify(data: &[u8]) {
    CLASSIFIERS.with(|classifiers| {
        for classifier in classifiers {
            assert_eq!(classifier.analyse(data), classifier.analyse(data));
        }
    });
}

/// Frames are grouped the same however they arrive; nothing is consumed that is not there.
pub(crate) fn group(data: &[u8]) {
    let (first, rest) = data.split_at(data.len().min(4));
    let mut whole = Feed::default();
    whole.arrives(rest);
    let mut parted = Feed::default();
    let mut left = rest;
    let mut turn = 0;
    while !left.is_empty() {
        let step = 1 + usize::from(first.get(turn % 4).copied().unwrap_or(0)) % left.len();
        let (now, later) = left.split_at(step);
        parted.arrives(now);
        left = later;
        turn += 1;
    }
    assert_eq!(whole.seen, parted.seen);
}

/// Bytes that arrive and what they are grouped into, up to the first message that is streamed.
#[derive(Default)]
struct Feed {
    grouping: Grouping,
    bytes: Vec<u8>,
    seen: Vec<Result<Unit, FrameError>>,
    ended: bool,
}

impl Feed {
    fn arrives(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        while !self.ended {
            let next = self.grouping.next(&self.bytes);
            let taken = match next {
                Ok(Unit::Incomplete { .. }) => return,
                Ok(Unit::Query(header) | Unit::FunctionCall(header) | Unit::Stray(header)) => {
                    self.ended = header.is_huge();
                    header.whole.min(self.bytes.len())
                }
                Ok(Unit::Batch {
                    end: BatchEnd::Huge { at, whole },
                    ..
                }) => {
                    // How much of it is there depends on what has come.
                    let len = at;
                    let end = BatchEnd::Huge { at, whole };
                    self.seen.push(Ok(Unit::Batch { len, end }));
                    self.ended = true;
                    return;
                }
                Ok(Unit::Batch { len, .. }) => len,
                Ok(Unit::Terminate) | Err(_) => {
                    self.ended = true;
                    0
                }
            };
            assert!(taken <= self.bytes.len() && (taken > 0 || self.ended));
            self.seen.push(next);
            self.bytes.drain(..taken);
        }
    }
}

/// Every batch a client may send becomes one a server may get: whole frames, and the client's own all among them.
pub(crate) fn translate(data: &[u8]) {
    let registry = StatementRegistry::new(1);
    let (mut prepared, mut survey) = (Prepared::new(1), Survey::default());
    let mut server = closed_server();
    let mut grouping = Grouping::default();
    let mut rest = data;
    while let Ok(Unit::Batch { len, end }) = grouping.next(rest) {
        let (batch, after) = rest.split_at(len);
        let huge = match end {
            BatchEnd::Sync | BatchEnd::Flush => None,
            BatchEnd::Huge { at, whole } => Some((at, whole)),
        };
        CLASSIFIERS.with(|[classifier, _]| {
            survey.take(batch, huge.map(|(at, _)| at), &prepared, classifier);
        });
        let turn = batch.iter().fold(0u8, |sum, &byte| sum.wrapping_add(byte));
        if huge.is_none() && turn & 1 == 1 && prepared.may_defer(batch, &registry) {
            prepared.note_batch(batch, &survey.parsed, &registry);
        } else {
            let mut expected = VecDeque::new();
            let whole = huge.map(|(_, whole)| whole);
            let translated = prepared.translate(
                batch,
                &survey.parsed,
                whole,
                Asking::No,
                &mut server,
                &mut expected,
                &registry,
            );
            let out = std::mem::take(&mut server.stream.output);
            if huge.is_none() {
                held_together(batch, &out, translated);
            }
            let own = expected.iter().filter(|answer| is_clients(answer)).count();
            prepared.settle(
                own.saturating_sub(usize::from(turn >> 6)),
                Some(&server.statements),
            );
            for answer in expected {
                if let Expected::OursParsed(id, stamp) | Expected::Parsed(id, stamp) = answer {
                    server.learn_statement(id, stamp);
                }
            }
        }
        prepared.in_clients_words(batch);
        if huge.is_some() {
            return;
        }
        rest = after;
    }
}

fn is_clients(answer: &Expected) -> bool {
    matches!(
        answer,
        Expected::Parsed(..) | Expected::ParsedUnnamed(_) | Expected::Closed(_)
    )
}

fn held_together(batch: &[u8], out: &[u8], translated: Translated) {
    let count = |bytes: &[u8], tag: u8| frames(bytes).filter(|(h, _)| h.tag == tag).count();
    let total: usize = frames(out).map(|(header, _)| header.whole).sum();
    assert_eq!(total, out.len(), "frames overlap or are cut");
    match translated {
        Translated::Asked { .. } => panic!("asked unbidden"),
        // What was put ahead has its own answers; the batch itself is passed by reference.
        Translated::AsItIs => {
            assert!(frames(out).all(|(header, _)| matches!(header.tag, b'C' | b'P')));
        }
        Translated::Rewritten => {
            for tag in *b"BEHS" {
                assert_eq!(count(batch, tag), count(out, tag), "{}", char::from(tag));
            }
            assert!(count(out, b'C') >= count(batch, b'C'));
            assert!(count(out, b'D') >= count(batch, b'D'));
            assert!(count(out, b'P') >= count(batch, b'P'));
        }
    }
}

fn closed_server() -> ServerConn {
    let now = Instant::now();
    let opening = Opening {
        user: String::new(),
        database: String::new(),
        options: Vec::new(),
    };
    let stream = Stream::new(Transport::Gone);
    ServerConn {
        record: Arc::new(ServerRecord::new(0, 0, &stream, now)),
        stream,
        key: Arc::new(ServerKey {
            host: "".into(),
            port: 0,
            pid: 0,
            secret: Arc::from([]),
        }),
        opening: Arc::new(opening),
        reported: Reported::default(),
        settings: Arc::new(Settings::named("")),
        tx: TxStatus::Idle,
        in_flight: false,
        unbooked: false,
        statements: Statements::default(),
        to_close: Vec::new(),
        lent: Vec::new(),
        unnamed: None,
        last_client: 0,
        mixed_draws: false,
        probes: false,
        hidden: false,
        unfit: false,
        opened_at: now,
        idle_since: now,
    }
}

/// Statements that leave something behind in a session.
const STATEMENTS: [&str; 24] = [
    "set work_mem to '1MB'",
    "set local work_mem to '2MB'",
    "reset work_mem",
    "reset all",
    "set application_name to 'x'",
    "reset application_name",
    "set role other",
    "discard all",
    "discard temp",
    "begin",
    "commit",
    "rollback",
    "savepoint s",
    "rollback to s",
    "listen a",
    "unlisten *",
    "select pg_advisory_lock(1)",
    "select pg_advisory_unlock_all()",
    "create temp table t ()",
    "declare c cursor with hold for select 1",
    "prepare p as select 1",
    "deallocate all",
    "select set_config('a.b', 'c', false)",
    "set a.b to 1; set a.c to 2; commit",
];

/// Whatever statements do and however they end: a failure outside a transaction changes no setting, DISCARD ALL leaves nothing,
/// session mode stays.
pub(crate) fn follow(data: &[u8]) {
    let mut state = State::new(Arc::new(Settings::named("app")), true);
    let start = Arc::clone(&state.settings);
    let mut before = TxStatus::Idle;
    for &[statement, how] in data.as_chunks::<2>().0 {
        let text = STATEMENTS[usize::from(statement) % STATEMENTS.len()];
        let analysis = CLASSIFIERS.with(|[classifier, _]| classifier.analyse(text.as_bytes()));
        let bit = |at: u8| how >> at & 1 == 1;
        let after = match how >> 4 & 3 {
            0 | 1 => TxStatus::Idle,
            2 => TxStatus::InTransaction,
            _ => TxStatus::Failed,
        };
        let ending = Ending {
            failed: bit(0),
            rolled_back: bit(1),
            chained: bit(2) && after == TxStatus::InTransaction,
            before,
            after,
        };
        let settings = Arc::clone(&state.settings);
        let consequences = state.request_ended(&analysis.effects, analysis.statements, ending);
        let alone = before == TxStatus::Idle && after == TxStatus::Idle;
        if alone && ending.failed {
            assert!(
                *state.settings == *settings,
                "{text}: a failure changed settings"
            );
        }
        if consequences.settings_changed && after == TxStatus::Failed {
            panic!("{text}: a failed transaction changed settings");
        }
        if alone
            && !ending.failed
            && !ending.rolled_back
            && analysis.effects == [Effect::DiscardAll]
        {
            assert!(consequences.discarded_all && *state.settings == *start);
            assert!(!state.pins.contains(PinReason::AdvisoryLock));
        }
        assert!(state.pins.contains(PinReason::SessionMode));
        if after == TxStatus::Idle {
            state.forget_transaction();
            assert!(!state.awaits_subscriptions());
        }
        before = after;
    }
}
