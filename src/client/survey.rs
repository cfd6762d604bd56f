//! What the messages of an extended batch amount to: the texts they prepare, the statements they run. Looks at Parse and
//! Bind only. Called by `session/` before it decides where a batch goes.

use std::sync::Arc;

use uuid::Uuid;

use super::prepared::Prepared;
use super::request::frames;
use crate::classify::{Analysis, Classifier, Effect, RunRef, StatementClass};
use crate::wire::frame::HEADER;
use crate::wire::messages::{Bind, Parse};

/// Kept from batch to batch for its allocations.
#[derive(Default)]
pub(super) struct Survey {
    /// Of the batch's Parse messages, in order.
    pub(super) parsed: Vec<Arc<Analysis>>,
    /// Of the statements its Binds run, in order; a run that a parameter names is resolved.
    pub(super) bound: Vec<(Arc<Analysis>, RunRef)>,
    /// A named statement too large to keep: only the server that gets it has it.
    ties: bool,
}

impl Survey {
    pub(super) fn take(
        &mut self,
        batch: &[u8],
        huge_at: Option<usize>,
        prepared: &Prepared,
        classifier: &Classifier,
    ) {
        self.parsed.clear();
        self.bound.clear();
        self.ties = false;
        let mut at = 0;
        for (header, frame) in frames(batch) {
            let body = frame.get(HEADER..).unwrap_or_default();
            match header.tag {
                b'P' => self.parsed.push(match Parse::read(body) {
                    Some(parse) => classifier.analyse(parse.text),
                    // A huge one is judged by its beginning, and ties a named statement to its server.
                    None if huge_at == Some(at) => {
                        self.ties = body.first() != Some(&0);
                        huge(body, classifier)
                    }
                    None => Analysis::other(),
                }),
                b'B' => {
                    if let Some(bind) = Bind::read(body)
                        && let Some(analysis) =
                            self.statement(&batch[..at], bind.statement, prepared)
                    {
                        let run = resolve(analysis.class.run(), &bind);
                        self.bound.push((analysis, run));
                    }
                }
                _ => {}
            }
            at += frame.len();
        }
    }

    /// The statement a Bind names: one this batch has just prepared, or one the client has.
    fn statement(&self, before: &[u8], name: &[u8], prepared: &Prepared) -> Option<Arc<Analysis>> {
        let parses = frames(before).filter(|(header, _)| header.tag == b'P');
        let names = parses.map(|(_, frame)| {
            Parse::read(frame.get(HEADER..).unwrap_or_default()).map(|parse| parse.name)
        });
        let here = names
            .zip(&self.parsed)
            .filter(|(known, _)| *known == Some(name))
            .last();
        here.map(|(_, analysis)| analysis)
            .or_else(|| prepared.analysis(name))
            .cloned()
    }

    /// The statement all of the batch is about, if it is about one only: for a batch that may be answered elsewhere than
    /// on the primary, every statement it prepares or runs must be of one kind.
    pub(super) fn only(&self) -> Option<(&Arc<Analysis>, RunRef)> {
        match (self.parsed.as_slice(), self.bound.as_slice()) {
            ([], [(analysis, run)]) => Some((analysis, *run)),
            ([parsed], [(analysis, run)]) if Arc::ptr_eq(parsed, analysis) => {
                Some((analysis, *run))
            }
            ([parsed], []) => Some((parsed, parsed.class.run())),
            _ => None,
        }
    }

    /// What must be seen to before a server gets the batch: also of what it only prepares, since describing an EXECUTE looks
    /// for its statement.
    pub(super) fn needs(&self) -> impl Iterator<Item = &Effect> {
        let bound = self.bound.iter().map(|(analysis, _)| analysis);
        let all = self
            .parsed
            .iter()
            .chain(bound)
            .flat_map(|analysis| &analysis.effects);
        all.filter(|effect| {
            matches!(
                effect,
                Effect::NeedsDatabaseAlone(_)
                    | Effect::Execute(_)
                    | Effect::Deallocate(_)
                    | Effect::ListeningChannels
                    | Effect::PreparedStatements
                    | Effect::SequenceValue
            )
        })
    }

    /// What running the batch does to the session.
    pub(super) fn effects(&self) -> impl Iterator<Item = &Effect> {
        let bound = self
            .bound
            .iter()
            .flat_map(|(analysis, _)| &analysis.effects);
        bound.chain(self.ties.then_some(&Effect::Unfollowed))
    }

    /// The run a write of this batch concerns; `None`: no pgflow write in it.
    pub(super) fn written_run(&self) -> Option<RunRef> {
        let mut written = self
            .bound
            .iter()
            .filter(|(analysis, _)| analysis.writes_runs())
            .map(|(_, run)| *run);
        let first = written.next()?;
        Some(if written.all(|other| other == first) {
            first
        } else {
            RunRef::All
        })
    }
}

fn huge(body: &[u8], classifier: &Classifier) -> Arc<Analysis> {
    let text = body
        .iter()
        .position(|&byte| byte == 0)
        .and_then(|end| body.get(end + 1..))
        .unwrap_or_default();
    let mut analysis = Analysis::clone(&classifier.analyse(text));
    analysis.class = StatementClass::Other;
    Arc::new(analysis)
}

fn resolve(run: RunRef, bind: &Bind<'_>) -> RunRef {
    match run {
        RunRef::Param(number) => {
            let text = bind
                .text_parameter(number)
                .and_then(|text| std::str::from_utf8(text).ok());
            let id = text
                .and_then(|text| Uuid::parse_str(text.trim()).ok())
                .or_else(|| bind.uuid_parameter(number));
            id.map_or(RunRef::All, RunRef::Literal)
        }
        known => known,
    }
}
