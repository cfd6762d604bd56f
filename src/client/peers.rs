//! Other Flowgates behind the same balancer: a CancelRequest comes over a connection of its own, which the balancer may send to
//! any of us. One whose key we did not make goes on to its maker, once: what was forwarded is never forwarded again. Bounded in
//! number and time. Called by `startup.rs` for keys that `cancel.rs` does not know.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::warn;

use crate::cancel::{self, Mark};
use crate::config::{Config, ProxyProtocol};
use crate::metrics::{Counter, Registry};
use crate::wire::proxy_header;
use crate::wire::startup::forwarded_cancel;

pub(crate) struct Peers {
    peers: Vec<Peer>,
    /// On keys of our own.
    mark: Option<Mark>,
    places: Semaphore,
    /// How long one may take to be reached and to act.
    within: Duration,
    /// Where clients come through a balancer that sends PROXY headers, so must we.
    with_header: bool,
    forwarded: Arc<Counter>,
    dropped: Arc<Counter>,
    failed: Arc<Counter>,
}

struct Peer {
    address: Arc<str>,
    mark: Mark,
}

impl Peers {
    pub(crate) fn new(config: &Config, registry: &Registry) -> Self {
        let peer = |address: &String| Peer {
            address: address.as_str().into(),
            mark: cancel::mark(address),
        };
        let counter = |name, help| registry.counter(name, help, &[]);
        Self {
            peers: config.cluster.peers.iter().map(peer).collect(),
            mark: config.cluster.address.as_deref().map(cancel::mark),
            places: Semaphore::new(config.cluster.forwards_max.get()),
            within: config.pool.connect_timeout,
            with_header: config.listen.proxy_protocol == ProxyProtocol::Require,
            forwarded: counter(
                "flowgate_cancels_forwarded_total",
                "cancel requests of unknown keys, by peers they were passed on to",
            ),
            dropped: counter(
                "flowgate_cancels_dropped_total",
                "cancel requests not passed on because cluster.forwards_max were under way",
            ),
            failed: counter(
                "flowgate_cancels_forward_failures_total",
                "cancel requests that a peer could not be given",
            ),
        }
    }

    /// Passes a cancel request on to whoever may have made its key, and returns when they have acted on it.
    pub(super) async fn forward(&self, pid: u32, secret: &[u8]) {
        // One of ours, whose client has left: nobody else knows it either.
        if self
            .mark
            .is_some_and(|ours| cancel::is_marked(secret, &ours))
        {
            return;
        }
        let maker = self
            .peers
            .iter()
            .position(|peer| cancel::is_marked(secret, &peer.mark));
        let asked = match maker {
            Some(at) => &self.peers[at..=at],
            // Of a key without a mark, anybody may be the maker.
            None => &self.peers[..],
        };
        if asked.is_empty() {
            return;
        }
        let Ok(_place) = self.places.try_acquire() else {
            self.dropped.inc();
            return;
        };
        let mut packet = Vec::new();
        if self.with_header {
            packet.extend_from_slice(&proxy_header::local());
        }
        packet.extend_from_slice(&forwarded_cancel(pid, secret));
        let packet: Arc<[u8]> = packet.into();
        let mut asking = JoinSet::new();
        for peer in asked {
            self.forwarded.inc();
            let (address, packet) = (Arc::clone(&peer.address), Arc::clone(&packet));
            let within = self.within;
            asking.spawn(async move {
                let told = timeout(within, tell(&address, &packet)).await;
                told.unwrap_or_else(|late| Err(late.into()))
                    .map_err(|error| (address, error))
            });
        }
        while let Some(told) = asking.join_next().await {
            if let Ok(Err((peer, error))) = told {
                self.failed.inc();
                warn!(%peer, %error, "could not pass a cancel request on");
            }
        }
    }
}

/// Returns when the peer has closed the connection, as it does once it has acted.
async fn tell(address: &str, packet: &[u8]) -> io::Result<()> {
    let mut tcp = TcpStream::connect(address).await?;
    tcp.write_all(packet).await?;
    let mut rest = [0; 16];
    while tcp.read(&mut rest).await? > 0 {}
    Ok(())
}
