//! The demo's listener: `LISTEN "pgflow:run:<id>@<seq>"` through the proxy, and each event as it comes, with the time of its
//! arrival. After a loss it goes on behind the last event it had. Judges nothing: that is `tree`'s part. Run by `mod`.

use std::collections::HashMap;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_postgres::{AsyncMessage, Error, NoTls};
use tracing::debug;
use uuid::Uuid;

use super::link;
use crate::pgflow::events::run_topic;

/// More than all events of all runs of one demo, so that replays fit while the LISTENs are still being answered.
const ROOM: usize = 4096;
const BACKOFF: Duration = Duration::from_millis(100);

/// One notification, read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Heard {
    pub(super) run: Uuid,
    /// `run:started`, `step:completed`, `gap` …
    pub(super) kind: String,
    pub(super) step: Option<String>,
    /// Where the word is the client's own business, e.g. task signals, there is none.
    pub(super) seq: Option<i64>,
    pub(super) tasks: Option<i64>,
    pub(super) error: Option<String>,
    pub(super) at: Instant,
}

/// Until aborted, or nobody reads `heard`. `in_force` is told once all subscriptions are.
pub(super) async fn run(
    proxy: SocketAddr,
    runs: Vec<Uuid>,
    heard: mpsc::Sender<Heard>,
    in_force: oneshot::Sender<()>,
) {
    let mut in_force = Some(in_force);
    let mut positions: HashMap<Uuid, i64> = runs.into_iter().map(|run| (run, 0)).collect();
    while !heard.is_closed() {
        let ended = follow(proxy, &mut positions, &heard, &mut in_force).await;
        debug!(
            reason = ended.err().map(|error| link::words(&error)),
            "the listener lost its connection"
        );
        tokio::time::sleep(BACKOFF).await;
    }
}

/// One connection's life.
async fn follow(
    proxy: SocketAddr,
    positions: &mut HashMap<Uuid, i64>,
    heard: &mpsc::Sender<Heard>,
    in_force: &mut Option<oneshot::Sender<()>>,
) -> Result<(), Error> {
    let config = link::config(proxy, "postgres", "flowgate demo listener");
    let (client, mut connection) = config.connect(NoTls).await?;
    let (notes, mut noted) = mpsc::channel(ROOM);
    let mut driver = JoinSet::new();
    driver.spawn(async move {
        while let Some(Ok(message)) = poll_fn(|cx| connection.poll_message(cx)).await {
            if let AsyncMessage::Notification(note) = message
                && notes.send((Instant::now(), note)).await.is_err()
            {
                return;
            }
        }
    });
    for (run, seq) in positions.iter() {
        let listen = format!("listen \"{}@{seq}\"", run_topic(*run));
        client.batch_execute(&listen).await?;
    }
    if let Some(in_force) = in_force.take() {
        // Nobody waiting is nobody to tell.
        in_force.send(()).ok();
    }
    while let Some((at, note)) = noted.recv().await {
        let Some(event) = read(note.payload(), at) else {
            debug!(payload = note.payload(), "a notification that is no event");
            continue;
        };
        if let (Some(position), Some(seq)) = (positions.get_mut(&event.run), event.seq) {
            *position = seq.max(*position);
        }
        if heard.send(event).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

fn read(payload: &str, at: Instant) -> Option<Heard> {
    let event: Value = serde_json::from_str(payload).ok()?;
    let text = |key: &str| event[key].as_str().map(str::to_owned);
    Some(Heard {
        run: text("run_id")?.parse().ok()?,
        kind: text("event_type")?,
        step: text("step_slug"),
        seq: event["seq"].as_i64(),
        tasks: event["remaining_tasks"].as_i64(),
        error: text("error_message"),
        at,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_read_and_anything_else_is_not() {
        let now = Instant::now();
        let run = Uuid::from_u128(7);
        let payload = format!(
            r#"{{"run_id": "{run}", "event_type": "step:started", "step_slug": "a", "remaining_tasks": 3, "seq": 2, "cursor": "9"}}"#
        );
        let expected = Heard {
            run,
            kind: "step:started".to_owned(),
            step: Some("a".to_owned()),
            seq: Some(2),
            tasks: Some(3),
            error: None,
            at: now,
        };
        assert_eq!(read(&payload, now), Some(expected));
        for nonsense in ["", "{}", "[]", r#"{"run_id": 1, "event_type": "x"}"#] {
            assert_eq!(read(nonsense, now), None, "{nonsense}");
        }
    }
}
