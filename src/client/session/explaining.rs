//! Where statements go, and why. EXPLAIN (FLOWGATE): what one is taken for and where it would go from here and now; asks no server and
//! changes nothing. `SET flowgate.explain = on`: a NOTICE before the answer to each request says where it went. Called by `query` and
//! `extended` in `mod.rs`, and by those who carry a request out where only they know.

use tokio::time::Instant;

use super::priority::{opened_word, word_of};
use super::{PRIMARY, Session};
use crate::classify::{Analysis, RunRef, StatementClass};
use crate::client::error::SessionError;
use crate::client::reply;
use crate::client::request::{BatchEnd, frames};
use crate::config::{Consistency, Reads};
use crate::route::Plan;
use crate::server::parameters::Opening;
use crate::wire::error_response::ErrorResponse;
use crate::wire::frame::{HEADER, Header};
use crate::wire::messages::{Bind, Parse, put_ready, query_text};

/// A custom setting like any other for Postgres, which takes any value.
const SETTING: &str = "flowgate.explain";

/// A read for whose NOTICE it is not known yet where it goes.
pub(super) struct Unexplained(String);

/// Who answered a read.
pub(super) enum Answered {
    /// An upstream.
    By(usize),
    /// Another session's query.
    ByAnother,
    FromMemory,
}

pub(super) fn opened_with(opening: &Opening) -> bool {
    opened_word(opening, SETTING).is_some_and(is_on)
}

fn is_on(word: &str) -> bool {
    let on = ["on", "true", "yes", "1"];
    on.iter().any(|on| word.eq_ignore_ascii_case(on))
}

impl Session {
    /// The session's settings are others.
    pub(super) fn note_explains(&mut self) {
        self.explains = match self.state.settings.statement(SETTING) {
            Some(statement) => word_of(statement).is_some_and(is_on),
            None => opened_with(&self.opening),
        };
    }

    /// Says where a request goes; of a read that is known later. `None`: several statements.
    pub(super) fn tell_plan(&mut self, plan: &Plan, analysis: Option<&Analysis>) {
        self.request.unexplained = None;
        let statement = match analysis {
            Some(analysis) => what(analysis),
            None => format!("{} statements in one", self.survey.bound.len()),
        };
        match plan {
            Plan::Explain(_) => {}
            Plan::Read(_) => self.request.unexplained = Some(Box::new(Unexplained(statement))),
            Plan::Primary if self.lease.is_some() => {
                let goes = self.elsewhere(&Plan::Held, analysis);
                self.put_explanation(&statement, &goes);
            }
            Plan::Primary | Plan::Held | Plan::Park | Plan::Subscribe(_) => {
                let goes = self.elsewhere(plan, analysis);
                self.put_explanation(&statement, &goes);
            }
        }
    }

    /// The same of an extended request, or its first part.
    pub(super) fn tell_batch(&mut self, plan: &Plan, end: BatchEnd) {
        self.request.unexplained = None;
        let known = self.survey.only();
        let known = known.map(|(analysis, _)| std::sync::Arc::clone(analysis));
        if known.is_none() && self.survey.bound.is_empty() {
            return;
        }
        let plan = match plan {
            Plan::Read(_) if !self.still_reads(end) => &Plan::Primary,
            Plan::Subscribe(_) if end != BatchEnd::Sync || self.survey.bound.len() != 1 => {
                &Plan::Primary
            }
            other => other,
        };
        self.tell_plan(plan, known.as_deref());
    }

    /// Says where a read went, if that is still to be said. A replica may refuse what the primary answers then.
    pub(super) fn tell_answered(&mut self, by: &Answered) {
        let Some(read) = self.request.unexplained.take() else {
            return;
        };
        let goes = match by {
            Answered::By(PRIMARY) if self.live.upstreams.len() == 1 => {
                "primary, as there is no replica".to_owned()
            }
            Answered::By(PRIMARY) => {
                "primary, as no replica that was fresh enough answered".to_owned()
            }
            Answered::By(upstream) => {
                let upstream = self.live.upstreams.get(*upstream);
                let name = upstream.map_or("a replica", |upstream| upstream.name.as_str());
                format!("{name}, which is fresh enough")
            }
            Answered::ByAnother => "flowgate, as another session asked the same".to_owned(),
            Answered::FromMemory => "flowgate, which has the answer in memory".to_owned(),
        };
        self.put_explanation(&read.0, &goes);
        if matches!(by, Answered::By(upstream) if *upstream != PRIMARY) {
            self.request.unexplained = Some(read);
        }
    }

    /// Before the answer: a notice may come at any time, but not inside a message. (protocol-flow.html#PROTOCOL-ASYNC)
    fn put_explanation(&mut self, statement: &str, goes: &str) {
        let text = format!("Statement: {statement}; Goes to: {goes}");
        ErrorResponse::notice(text).put(&mut self.client.output);
    }

    /// A Query that asks about what begins at `at` of its text.
    pub(super) async fn explain_query(
        &mut self,
        header: Header,
        at: usize,
    ) -> Result<(), SessionError> {
        let body = self.client.input.bytes().get(HEADER..header.whole);
        let text = body.and_then(query_text).and_then(|text| text.get(at..));
        let text = text.unwrap_or_default().to_vec();
        self.skip(header.whole).await?;
        let lines = self.explain(&text).await;
        reply::put_explanation(&mut self.client.output, &lines);
        let tx = self.tx();
        put_ready(&mut self.client.output, tx);
        self.shared.counters.answered_here.inc();
        Ok(self.client.flush().await?)
    }

    /// Whether all of a batch is here that can be answered: a part of a request may end with a Flush.
    /// (postgres.js sends Parse Describe Flush, and the rest once it is answered)
    pub(super) fn explains_whole(&self, len: usize, end: BatchEnd) -> bool {
        let batch = self.client.input.bytes().get(..len).unwrap_or_default();
        let runs = || frames(batch).any(|(header, _)| header.tag == b'E');
        match end {
            BatchEnd::Sync => true,
            BatchEnd::Flush => self.survey.bound.is_empty() || runs(),
            BatchEnd::Huge { .. } => false,
        }
    }

    /// Parse…Sync of such a statement alone, or the part of it up to a Flush.
    pub(super) async fn explain_batch(&mut self, len: usize) -> Result<(), SessionError> {
        self.keep(len);
        let text = self.explained_text().unwrap_or_default();
        let lines = self.explain(&text).await;
        self.prepared
            .note_batch(&self.kept, &self.survey.parsed, &self.shared.statements);
        let tx = self.tx();
        reply::put_explained_batch(&mut self.client.output, &self.kept, &lines, tx);
        self.shared.counters.answered_here.inc();
        Ok(self.client.flush().await?)
    }

    /// The text that the batch in `kept` asks about: its own, or that of the statement it binds.
    fn explained_text(&self) -> Option<Vec<u8>> {
        let (analysis, _) = self.survey.only()?;
        let at = analysis.explains?;
        let mut texts = frames(&self.kept).filter_map(|(header, frame)| {
            let body = frame.get(HEADER..)?;
            match header.tag {
                b'P' => Parse::read(body).map(|parse| parse.text.to_vec()),
                b'B' => {
                    let (text, _) = self.prepared.source(Bind::read(body)?.statement)?;
                    Some(text.to_vec())
                }
                _ => None,
            }
        });
        texts.next()?.get(at..).map(<[u8]>::to_vec)
    }

    async fn explain(&mut self, text: &[u8]) -> Vec<String> {
        let analysis = self.live.classifier.analyse(text);
        let plan = self.plan(&analysis);
        let mut lines = vec![format!("Statement: {}", what(&analysis))];
        match &plan {
            Plan::Read(run) => self.explain_read(*run, text, &mut lines).await,
            other => lines.push(format!(
                "Goes to: {}",
                self.elsewhere(other, Some(&analysis))
            )),
        }
        lines
    }

    async fn explain_read(&mut self, run: RunRef, text: &[u8], lines: &mut Vec<String>) {
        // A Query names no parameter; of a Bind's, the value is not known here.
        let since = self.floor(run);
        let replicas = self.live.upstreams.len().saturating_sub(1);
        let now = Instant::now();
        let fresh = self.fresh_replica(run).await;
        let upstream = fresh.and_then(|fresh| self.live.upstreams.get(fresh.upstream()));
        lines.push(match upstream {
            Some(upstream) => format!("Goes to: {}, which is fresh enough", upstream.name),
            None if replicas == 0 => "Goes to: primary, as there is no replica".to_owned(),
            None => format!(
                "Goes to: primary, as no replica was fresh enough within {:?}",
                self.live.replica_wait()
            ),
        });
        let age = now.saturating_duration_since(since);
        lines.push(format!(
            "Fresh enough: has all that was committed {:.3} s ago",
            age.as_secs_f64()
        ));
        let shared = match self.shared_key(&[b"Q", text]) {
            Some(_) => "with those who ask the same at the same time",
            None => "with nobody",
        };
        lines.push(format!("Shared: {shared}"));
    }

    /// Of anything but a read for a replica. `analysis`: of the one statement it is.
    fn elsewhere(&self, plan: &Plan, analysis: Option<&Analysis>) -> String {
        let route = self.live.route;
        match plan {
            Plan::Held if self.replica.is_none() && self.state.pins.is_empty() => {
                "the server of the transaction under way".to_owned()
            }
            Plan::Held => "the server this session is tied to (SHOW PINS says why)".to_owned(),
            Plan::Subscribe(_) => "flowgate, which listens for its clients".to_owned(),
            Plan::Park => {
                "flowgate, until its queue may have something; then the primary".to_owned()
            }
            Plan::Explain(_) => "flowgate".to_owned(),
            Plan::Read(_) => "a replica".to_owned(),
            Plan::Primary => {
                let read = analysis.filter(|known| matches!(known.class, StatementClass::Read(_)));
                let why = if read.is_none() {
                    "as it is not known to be a read"
                } else if read.is_some_and(|read| read.refused.is_known()) {
                    "as a replica refused it: something it calls writes"
                } else if route.reads == Reads::Off {
                    "as route.reads is \"off\""
                } else if route.consistency == Consistency::Primary {
                    "as route.consistency is \"primary\""
                } else {
                    "as it is"
                };
                let name = self.live.upstreams.get(PRIMARY);
                let name = name.map_or("primary", |upstream| upstream.name.as_str());
                format!("{name}, {why}")
            }
        }
    }
}

/// In words, what a statement is taken for.
fn what(analysis: &Analysis) -> String {
    let of = |run: RunRef| match run {
        RunRef::Literal(id) => format!("run {id}"),
        RunRef::Param(number) => format!("the run ${number}"),
        RunRef::All => "any run".to_owned(),
        RunRef::None => "no run".to_owned(),
    };
    match &analysis.class {
        StatementClass::Read(run) => format!("a read of {}", of(*run)),
        StatementClass::Poll(_) => "a poll for work".to_owned(),
        StatementClass::Progress(run) => format!("progress of {}", of(*run)),
        StatementClass::Start(_) => "a start of a run".to_owned(),
        StatementClass::Define => "a definition".to_owned(),
        StatementClass::Other if analysis.statements == 0 => "empty".to_owned(),
        StatementClass::Other if analysis.statements > 1 => {
            format!("{} statements in one", analysis.statements)
        }
        StatementClass::Other => "not pgflow's, or not understood".to_owned(),
    }
}
