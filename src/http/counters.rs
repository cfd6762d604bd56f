//! What the HTTP plane counts of its streams and sockets. Called by `streams` and `realtime`.

use std::sync::Arc;

use crate::metrics::{Counter, Gauge, Registry};

pub(super) struct Counters {
    streams: Arc<Gauge>,
    sockets: Arc<Gauge>,
    /// Events given to streams and sockets.
    pub(super) events: Arc<Counter>,
    /// Joins of channels refused.
    pub(super) joins_refused: Arc<Counter>,
    /// Streams ended because their clients said too much behind the request.
    pub(super) talkative: Arc<Counter>,
}

impl Counters {
    pub(super) fn new(registry: &Registry) -> Self {
        let open = |kind| {
            registry.gauge(
                "flowgate_http_streams",
                "Event streams and sockets open",
                &[("kind", kind)],
            )
        };
        Self {
            streams: open("sse"),
            sockets: open("websocket"),
            events: registry.counter(
                "flowgate_http_events_total",
                "Events given to event streams and sockets",
                &[],
            ),
            joins_refused: registry.counter(
                "flowgate_http_joins_refused_total",
                "Channels of sockets that were not joined",
                &[],
            ),
            talkative: registry.counter(
                "flowgate_http_streams_talked_over_total",
                "Event streams ended because the client sent too much behind its request",
                &[],
            ),
        }
    }

    pub(super) fn stream(&self) -> OpenStream {
        OpenStream::new(&self.streams)
    }

    pub(super) fn socket(&self) -> OpenStream {
        OpenStream::new(&self.sockets)
    }
}

/// Counted while it is there.
pub(super) struct OpenStream(Arc<Gauge>);

impl OpenStream {
    fn new(gauge: &Arc<Gauge>) -> Self {
        gauge.add(1);
        Self(Arc::clone(gauge))
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        self.0.sub(1);
    }
}
