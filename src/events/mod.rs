//! Live events: one listener connection a database upstream, fanned out to any number of subscribers.
//!
//! Two kinds of channels. An *ordinary* one is `LISTEN`ed upstream once and its notifications are copied. A *pgflow* one
//! (a run, a flow, all) is fed from the outbox table `flowgate.event`: a wake-up says that something was committed, and
//! one statement reads whatever the last read could not see yet, so that neither commit order nor a lost wake-up nor a
//! broken connection loses an event.
//!
//! Never waits for a reader and never decodes a payload. `client/session` subscribes; `app` builds the `Hubs`.

mod hub;
mod past;
mod rhythm;
mod sight;
mod subscription;
mod upstream;
mod watch;

use std::sync::Arc;
use std::time::Duration;

pub(crate) use hub::{Hub, Hubs, Subscriber, Told};
pub(crate) use past::{Missed, NOW, Start};
pub(crate) use sight::{Proof, Rights, Rows, Sight};
pub(crate) use subscription::{CutReason, Delivery, Event, Form};

use crate::metrics::{Counter, Registry};

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EventsError {
    /// The client's: as Postgres says it.
    #[error("channel name cannot be empty")]
    EmptyChannel,
    #[error("invalid cursor in channel name")]
    BadCursor,
    #[error("more than {limit} channels in one session")]
    TooManyChannels { limit: usize },
    /// The session was cut; it hears no more.
    #[error("the subscription was cut")]
    Cut,
    #[error("the upstream listener was not ready within {0:?}")]
    Timeout(Duration),
    #[error("role \"{role}\" may not follow {channel}")]
    Denied {
        role: String,
        channel: String,
        one_run: bool,
    },
    /// Policies count for this role, and the control role cannot ask them in its name.
    #[error("what role \"{role}\" may see cannot be asked: {why}")]
    Unproven { role: String, why: String },
    #[error("upstream refused: {0}")]
    Upstream(String),
    #[error("shutting down")]
    Stopping,
}

/// What the hubs count, all databases together.
pub(crate) struct EventMetrics {
    pub(crate) deliveries: Arc<Counter>,
    pub(crate) cuts_slow: Arc<Counter>,
    pub(crate) cuts_lost: Arc<Counter>,
    /// Streams of a run whose reader was too slow: what it missed waits in the outbox.
    pub(crate) behind: Arc<Counter>,
    pub(crate) gaps: Arc<Counter>,
    pub(crate) wakeups: Arc<Counter>,
    pub(crate) observed: Arc<Counter>,
    pub(crate) awake: Arc<Counter>,
    pub(crate) outbox_reads: Arc<Counter>,
    pub(crate) outbox_rows: Arc<Counter>,
    pub(crate) replay_reads: Arc<Counter>,
    pub(crate) reconnects: Arc<Counter>,
    /// Answers to requests that notified did not wait any longer for what they sent.
    pub(crate) own_late: Arc<Counter>,
    /// Channels refused or ended because a role may not see what they tell.
    pub(crate) denied: Arc<Counter>,
    pub(crate) sight_refused: Arc<Counter>,
    pub(crate) replay_waits: Arc<Counter>,
}

impl EventMetrics {
    pub(crate) fn register(registry: &Registry) -> Self {
        let counter = |name, help| registry.counter(name, help, &[]);
        let cut = |reason| {
            registry.counter(
                "flowgate_event_cuts_total",
                "Subscribers cut, by reason.",
                &[("reason", reason)],
            )
        };
        Self {
            deliveries: counter(
                "flowgate_event_deliveries_total",
                "Events queued for a subscriber.",
            ),
            cuts_slow: cut("too_slow"),
            cuts_lost: cut("listener_lost"),
            behind: counter(
                "flowgate_event_behind_total",
                "Streams whose reader fell behind and is told from the outbox.",
            ),
            gaps: counter(
                "flowgate_event_gaps_total",
                "Gap markers queued for a subscriber.",
            ),
            wakeups: counter("flowgate_event_wakeups_total", "Wake-ups from the outbox."),
            observed: counter(
                "flowgate_event_observed_total",
                "Reads of the outbox because a session of ours committed.",
            ),
            awake: counter(
                "flowgate_event_reader_awake_total",
                "Times a reader of the outbox stayed awake, so that writers need not notify.",
            ),
            outbox_reads: counter(
                "flowgate_event_outbox_reads_total",
                "Reads of what the outbox has new.",
            ),
            outbox_rows: counter(
                "flowgate_event_outbox_rows_total",
                "Events read from the outbox.",
            ),
            replay_reads: counter(
                "flowgate_event_replay_reads_total",
                "Pages read for somebody who resumes.",
            ),
            reconnects: counter(
                "flowgate_event_listener_lost_total",
                "Upstream listener connections lost.",
            ),
            own_late: counter(
                "flowgate_event_own_late_total",
                "Requests that notified their own session and were answered before the notification came.",
            ),
            denied: counter(
                "flowgate_event_denied_total",
                "Channels refused to a session, or ended, because its role may not see what they tell.",
            ),
            sight_refused: counter(
                "flowgate_event_sight_refused_total",
                "Questions of what a listener may see that got no database connection in time.",
            ),
            replay_waits: counter(
                "flowgate_event_replay_waits_total",
                "Pages for somebody who resumes that got no database connection in time, and were asked for again.",
            ),
        }
    }
}
