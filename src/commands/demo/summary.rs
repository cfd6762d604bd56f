//! What the demo says at the end: the result, where each statement went, whether the events came, how fast, and where to go
//! on. Asks the proxy's console and the outbox, through the proxy. Called by `mod`.

use std::io;
use std::net::SocketAddr;

use serde_json::Value;
use tokio_postgres::types::Type;
use tokio_postgres::{Error, SimpleQueryMessage};

use super::super::screen::{Paint, Screen};
use super::DemoError;
use super::latency::Answers;
use super::link::{self, Link};
use super::tree::Tree;
use super::words::{grouped, spell};
use super::{Places, ms};
use crate::pgflow::events::run_topic;

/// What decides the exit status.
pub(super) struct Verdict {
    pub(super) completed: bool,
    pub(super) in_order: bool,
}

pub(super) async fn tell(
    screen: &mut Screen,
    tree: &Tree,
    answers: &Answers,
    places: &Places,
) -> Result<Verdict, DemoError> {
    let mut link = Link::new(places.proxy, "flowgate demo");
    let completed = tree.has_completed();
    tell_result(screen, tree)?;

    let routes = routes(places.proxy)
        .await
        .map_err(DemoError::sql("asking the console for its routes"))?;
    tell_routes(screen, &routes)?;
    let in_order = tell_events(screen, tree, answers, &mut link).await?;
    Ok(Verdict {
        completed,
        in_order,
    })
}

fn tell_result(screen: &mut Screen, tree: &Tree) -> Result<(), DemoError> {
    for (at, run) in tree.runs.iter().enumerate() {
        if let Some(error) = &run.error {
            screen.section(
                &format!("Run {} failed", run.id),
                std::slice::from_ref(error),
            )?;
            continue;
        }
        let written = run.output.as_ref().map(|output| &output["write_result"]);
        let path = |kind: &str| written.and_then(|written| written[kind].as_str());
        let (Some(json), Some(text)) = (path("json"), path("text")) else {
            continue;
        };
        // All runs do the same: one result is enough to look at.
        if at > 0 {
            continue;
        }
        let result = std::fs::read_to_string(json)?;
        let result: Value = serde_json::from_str(&result).map_err(io::Error::from)?;
        let mut lines = spell(&result);
        lines.push(format!("written to {text} (and .json)"));
        screen.section("Result", &lines)?;
    }
    Ok(())
}

fn tell_routes(screen: &mut Screen, routes: &[(String, u64)]) -> Result<(), DemoError> {
    let mut lines = Vec::new();
    for (to, count) in routes {
        let what = match to.as_str() {
            "primary" => "the worker's polls, starts and completions; define, start",
            "replica" => "get_run_with_states, when fresh enough for what was written before",
            "flowgate" => "answered by the proxy itself: LISTEN",
            _kept if *count == 0 => continue,
            kept => {
                let why = kept.strip_prefix("read kept on primary: ").unwrap_or(kept);
                let count = grouped(*count);
                let part = format!("{count:>17}  of the primary's were reads of a run: {why}");
                lines.push(screen.paint(Paint::Dim, &part));
                continue;
            }
        };
        let what = screen.paint(Paint::Dim, what);
        lines.push(format!("{to:<9} {:>7}  {what}", grouped(*count)));
    }
    let read = routes
        .iter()
        .any(|(to, count)| to == "replica" && *count > 0);
    if !read {
        lines.push(screen.paint(Paint::Red, "warning: no read went to the replica"));
    }
    screen.section("Where each statement went", &lines)?;
    Ok(())
}

async fn tell_events(
    screen: &mut Screen,
    tree: &Tree,
    answers: &Answers,
    link: &mut Link,
) -> Result<bool, DemoError> {
    let (mut sent, mut came, mut repeated) = (0, 0, 0);
    let mut wrong = Vec::new();
    for run in &tree.runs {
        let topic = run_topic(run.id);
        let counted = "select seq from flowgate.topic where topic = $1";
        let rows = link.insist(counted, &[(&topic, Type::TEXT)]).await;
        let rows = rows.map_err(DemoError::sql("counting the outbox"))?;
        let seq: i64 = rows
            .first()
            .and_then(|row| row.try_get(0).ok())
            .unwrap_or_default();
        let mine = tree
            .arrivals
            .iter()
            .filter(|arrival| arrival.run == run.id)
            .count();
        sent += seq;
        came += mine;
        repeated += run.repeated;
        if let Some(disorder) = &run.disorder {
            wrong.push(format!("run {}: {disorder}", run.id));
        }
        if i64::try_from(mine) != Ok(seq) {
            wrong.push(format!(
                "run {}: {mine} events came of the {seq} in the outbox",
                run.id
            ));
        }
    }
    let mut lines = vec![if wrong.is_empty() {
        let twice = if repeated == 0 {
            "none twice".to_owned()
        } else {
            format!("{repeated} twice")
        };
        let all = format!("all {came} of {sent} events came, in order, none missing, {twice}");
        screen.paint(Paint::Green, &all)
    } else {
        let bad = format!("{came} of {sent} events came, NOT as they should:");
        screen.paint(Paint::Red, &bad)
    }];
    lines.extend(wrong.iter().cloned());
    if let Some(took) = answers.quantiles(&tree.arrivals) {
        let (p50, p99, count) = (ms(took.p50), ms(took.p99), took.count);
        lines.push(format!(
            "commit → event: p50 {p50}, p99 {p99} over {count} events"
        ));
        let how = "from the commit's answer at its client to the event at the listener, one clock;";
        lines.push(screen.paint(Paint::Dim, how));
        lines.push(screen.paint(
            Paint::Dim,
            "an event that was there before that answer counts as 0",
        ));
    }
    screen.section("Events", &lines)?;
    Ok(wrong.is_empty())
}

/// Connection strings, and what to try.
pub(super) fn tell_places(
    screen: &mut Screen,
    tree: &Tree,
    places: &Places,
) -> Result<(), DemoError> {
    let proxy = places.database("postgres");
    let mut lines = vec![
        format!("proxy    {proxy}"),
        format!("primary  {}", places.primary),
        format!("replica  {}", places.replica),
    ];
    lines.extend(places.http.map(|http| format!("http     http://{http}/")));
    screen.section("Connect", &lines)?;
    let Some(run) = tree.runs.first().map(|run| run.id) else {
        return Ok(());
    };
    let topic = run_topic(run);
    let mut tries = vec![
        format!("flowgate follow {run} --url {proxy}"),
        format!("psql {proxy} -c 'listen \"{topic}@0\"' -c 'select 1' | cut -c 1-150"),
        format!("psql {} -c 'show routes'", places.database("flowgate")),
    ];
    if let Some(http) = places.http {
        tries.push(format!(
            "curl -N 'http://{http}/events/runs/{run}?cursor=0'"
        ));
        tries.push(format!("a browser at http://{http}/#/runs/{run}"));
    }
    screen.section("Try", &tries)?;
    Ok(())
}

/// `SHOW ROUTES` of the console, through the proxy's own port.
async fn routes(proxy: SocketAddr) -> Result<Vec<(String, u64)>, Error> {
    let config = link::config(proxy, "flowgate", "flowgate demo");
    let open = link::connect(&config).await?;
    let rows = open.client.simple_query("show routes").await?;
    let row = |message: &SimpleQueryMessage| match message {
        SimpleQueryMessage::Row(row) => {
            let count = row.get(1)?.parse().ok()?;
            Some((row.get(0)?.to_owned(), count))
        }
        _other => None,
    };
    Ok(rows.iter().filter_map(row).collect())
}
