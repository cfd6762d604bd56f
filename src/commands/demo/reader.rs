//! The demo's reader: what a dashboard does, `get_run_with_states` again and again through the proxy. Its answers draw the
//! map's progress, and should come from the replica. Run by `mod`.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::mpsc;
use tokio::time::MissedTickBehavior;
use tokio_postgres::types::Type;
use tracing::warn;
use uuid::Uuid;

use super::link::{Link, words};

const EVERY: Duration = Duration::from_millis(50);
const READ: &str = "select pgflow.get_run_with_states($1)";

/// One answer.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Seen {
    pub(super) run: Uuid,
    pub(super) status: String,
    pub(super) steps: Vec<SeenStep>,
    /// Of the run, once it has completed.
    pub(super) output: Value,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SeenStep {
    pub(super) slug: String,
    pub(super) tasks: Option<i64>,
    pub(super) remaining: Option<i64>,
}

impl Seen {
    pub(super) fn is_over(&self) -> bool {
        matches!(self.status.as_str(), "completed" | "failed")
    }
}

/// Until each run has been seen over. The runs may not exist yet.
pub(super) async fn run(proxy: SocketAddr, mut runs: Vec<Uuid>, seen: mpsc::Sender<Seen>) {
    let mut link = Link::new(proxy, "flowgate demo reader");
    let mut tick = tokio::time::interval(EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !runs.is_empty() {
        tick.tick().await;
        let mut open = Vec::new();
        for run in runs {
            let row = match link.insist(READ, &[(&run, Type::UUID)]).await {
                Ok(rows) => rows.first().and_then(|row| row.try_get(0).ok()),
                Err(error) => {
                    warn!(error = words(&error), "the reader was refused");
                    return;
                }
            };
            let answer = row.as_ref().and_then(read);
            if answer.as_ref().is_none_or(|answer| !answer.is_over()) {
                open.push(run);
            }
            if let Some(answer) = answer
                && seen.send(answer).await.is_err()
            {
                return;
            }
        }
        runs = open;
    }
}

fn read(answer: &Value) -> Option<Seen> {
    let run = &answer["run"];
    let steps = answer["steps"].as_array()?.iter().filter_map(|step| {
        Some(SeenStep {
            slug: step["step_slug"].as_str()?.to_owned(),
            tasks: step["initial_tasks"].as_i64(),
            remaining: step["remaining_tasks"].as_i64(),
        })
    });
    Some(Seen {
        run: run["run_id"].as_str()?.parse().ok()?,
        status: run["status"].as_str()?.to_owned(),
        steps: steps.collect(),
        output: run["output"].clone(),
    })
}
