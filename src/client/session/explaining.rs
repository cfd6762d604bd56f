//! EXPLAIN (FLOWGATE): what a statement is taken for, where it would go from here and now, and why. Asks no server and
//! changes nothing. Called by `query` and `extended` in `mod.rs`.

use tokio::time::Instant;

use super::{PRIMARY, Session};
use crate::classify::{Analysis, RunRef, StatementClass};
use crate::client::error::SessionError;
use crate::client::reply;
use crate::client::request::frames;
use crate::config::{Consistency, Reads};
use crate::route::Plan;
use crate::wire::frame::{HEADER, Header};
use crate::wire::messages::{Bind, Parse, put_ready, query_text};

impl Session {
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

    /// Parse…Sync of such a statement alone.
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
            other => lines.push(format!("Goes to: {}", self.elsewhere(other, &analysis))),
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

    fn elsewhere(&self, plan: &Plan, analysis: &Analysis) -> String {
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
                let read = matches!(analysis.class, StatementClass::Read(_));
                let why = if !read {
                    "as it is not known to be a read"
                } else if analysis.refused.is_known() {
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
