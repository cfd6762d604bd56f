//! Whether those who listen may hear what they are about to: asks for the hub, which waits for nobody. One task a hub, started by
//! it with the first session that listens as somebody. An event whose run nobody knows about yet stands veiled in its reader's queue
//! until a question, one for all runs and readers of a role that wait, has been answered. Every `http.recheck` all are asked about again.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tracing::debug;
use uuid::Uuid;

use crate::pgflow::events::{Channel, run_of_topic};
use crate::server::questions::{Asker, DbError};

use super::EventsError;
use super::hub::{Guarded, Hub, Wanted};
use super::sight::{Rights, Rows, Shown, Sight};
use super::subscription::{Guard, Target};

/// Runs in one question.
const RUNS_AT_ONCE: usize = 1_000;

/// As who comes to listen: `Err` where nothing of it may be heard. Whether each event's run has to be looked at is in the guard.
pub(super) async fn admit(
    sight: &Sight,
    channel: &Channel,
    asker: &Arc<Asker>,
) -> Result<Guard, EventsError> {
    let failed = |error: DbError| match error {
        DbError::Role(why) => EventsError::Unproven {
            role: asker.role.clone(),
            why,
        },
        // What Postgres refuses it in SQL, it does not see.
        ref refused @ DbError::Postgres { .. } if !refused.is_passing() => EventsError::Unproven {
            role: asker.role.clone(),
            why: refused.to_string(),
        },
        other => EventsError::Upstream(other.to_string()),
    };
    let rights = sight.rights(asker).await.map_err(failed)?;
    let run = match channel {
        Channel::Run { id, .. } => Some(*id),
        Channel::Flow { .. } | Channel::All { .. } | Channel::Ordinary(_) => None,
    };
    let watched = match judged(&rights, run.is_some()) {
        Judged::Open => false,
        Judged::Watched => {
            // Of none in particular: whether its policies can be asked at all.
            let of_it = HashSet::from([run.unwrap_or_default()]);
            let shown = sight.rows(asker, &of_it).await.map_err(failed)?;
            if run.is_some_and(|run| shown.of(run) == Shown::No) {
                return Err(denied(asker, channel));
            }
            true
        }
        Judged::Denied => return Err(denied(asker, channel)),
    };
    Ok(Guard {
        asker: Arc::clone(asker),
        watched,
    })
}

/// Whether what it hears there is for its policies to say, as far as anybody can tell.
pub(super) async fn is_watched(sight: &Sight, channel: &Channel, asker: &Asker) -> bool {
    let one_run = matches!(channel, Channel::Run { .. });
    let rights = sight.rights(asker).await;
    // Where nobody can say now, somebody may in a moment.
    rights.map_or(true, |rights| judged(&rights, one_run) == Judged::Watched)
}

fn denied(asker: &Asker, channel: &Channel) -> EventsError {
    EventsError::Denied {
        role: asker.role.clone(),
        channel: channel.name(),
        one_run: matches!(channel, Channel::Run { .. }),
    }
}

/// What a role's rights come to for a channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Judged {
    /// It sees whatever is told there.
    Open,
    /// It sees what its policies show it.
    Watched,
    Denied,
}

fn judged(rights: &Rights, one_run: bool) -> Judged {
    // Without pgflow nobody says who may see what: then a channel is for all, as Postgres' own are.
    if !rights.has_runs || (one_run && rights.by_id) {
        return Judged::Open;
    }
    match rights.runs {
        Rows::All => Judged::Open,
        Rows::Some => Judged::Watched,
        Rows::None => Judged::Denied,
    }
}

/// Until nobody listens as somebody, or shutdown.
pub(super) async fn run(hub: Arc<Hub>) {
    // `None`: it is being done, while what events wait for goes on.
    let mut due = Some(hub.sight.next_check());
    let mut asking: JoinSet<Option<Instant>> = JoinSet::new();
    while let Some(wanted) = hub.take_wanted() {
        for wanted in wanted {
            let hub = Arc::clone(&hub);
            asking.spawn(async move {
                look(&hub, wanted).await;
                None
            });
        }
        tokio::select! {
            () = hub.look.notified() => {}
            Some(ended) = asking.join_next(), if !asking.is_empty() => {
                // A question that panicked was perhaps the one.
                let next = ended.unwrap_or_else(|_panicked| Some(hub.sight.soon()));
                due = next.or(due);
            }
            () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                due = None;
                let hub = Arc::clone(&hub);
                asking.spawn(async move { Some(recheck_all(&hub).await) });
            }
        }
    }
    hub.sight.rest();
}

/// Returns when to do so again.
async fn recheck_all(hub: &Hub) -> Instant {
    let next = hub.sight.next_check();
    match recheck(hub, &hub.sight).await {
        Ok(()) => next,
        // Nobody can say: a database that is away tells no events either.
        Err(error) => {
            debug!(database = hub.database, %error, "cannot ask what listeners may see");
            hub.sight.soon()
        }
    }
}

/// As long as it takes to know: what waits for it is bounded by its readers' queues.
async fn look(hub: &Hub, wanted: Wanted) {
    let Wanted {
        asker,
        runs,
        mailboxes,
    } = wanted;
    let mut left: Vec<Uuid> = runs.into_iter().collect();
    while !left.is_empty() && !hub.is_stopping() {
        let some: HashSet<Uuid> = left[left.len().saturating_sub(RUNS_AT_ONCE)..]
            .iter()
            .copied()
            .collect();
        match hub.sight.look(&asker, &some).await {
            Ok(shown) => {
                left.truncate(left.len() - some.len());
                hub.unveil(&asker, &some, &shown, mailboxes.values());
            }
            Err(error) => {
                debug!(database = hub.database, %error, "cannot ask what a listener may see");
                sleep_until(hub.sight.soon()).await;
            }
        }
    }
    hub.looked(&asker);
}

/// One question a role, and one more for the runs that those whom policies restrict listen to.
async fn recheck(hub: &Hub, sight: &Sight) -> Result<(), DbError> {
    let mut by_asker: HashMap<[u8; 32], Vec<Guarded>> = HashMap::new();
    for guarded in hub.guarded() {
        let print = guarded.asker.print;
        by_asker.entry(print).or_default().push(guarded);
    }
    // Of one that nobody can answer for now, the others are not to wait.
    let mut unsaid = None;
    'askers: for streams in by_asker.into_values() {
        let Some(asker) = streams.first().map(|stream| Arc::clone(&stream.asker)) else {
            continue;
        };
        let rights = sight.rights(&asker).await;
        let rights = match rights {
            Ok(rights) => Some(rights),
            // There is no such role any more.
            Err(error) if !error.is_passing() => None,
            Err(error) => {
                unsaid = Some(error);
                continue;
            }
        };
        let run_of = |target: &Target| match target {
            Target::Run { topic, .. } => run_of_topic(topic),
            Target::Flow(_) | Target::All | Target::Ordinary(_) => None,
        };
        let judged_of = |target: &Target| match &rights {
            Some(rights) => judged(rights, run_of(target).is_some()),
            None => Judged::Denied,
        };
        let watched: Vec<Uuid> = streams
            .iter()
            .filter(|guarded| judged_of(&guarded.target) == Judged::Watched)
            .filter_map(|guarded| run_of(&guarded.target))
            .collect();
        let mut hidden = HashSet::new();
        for runs in watched.chunks(RUNS_AT_ONCE) {
            let runs: HashSet<Uuid> = runs.iter().copied().collect();
            match sight.rows(&asker, &runs).await {
                Ok(rows) => hidden.extend(rows.hidden()),
                Err(error) if !error.is_passing() => hidden.extend(runs),
                Err(error) => {
                    unsaid = Some(error);
                    continue 'askers;
                }
            }
        }
        for guarded in streams {
            let Guarded {
                stream,
                mailbox,
                target,
                ..
            } = guarded;
            let judged = match run_of(&target) {
                Some(run) if hidden.contains(&run) => Judged::Denied,
                _ => judged_of(&target),
            };
            match judged {
                Judged::Denied => hub.end(stream, &mailbox, &asker),
                Judged::Open | Judged::Watched => {
                    mailbox
                        .lock()
                        .rejudge(stream, &asker, judged == Judged::Watched);
                }
            }
        }
    }
    unsaid.map_or(Ok(()), Err)
}
