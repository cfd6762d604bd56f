//! The cancel keys we hand out and the servers they stand for at this moment. A key works only while its client holds a
//! server (or waits for one), and a server is let go only after every cancel in flight towards it has landed: a late
//! cancel can never hit the next client's query. Called by `client/startup.rs` (requests) and `client/session`.

use std::collections::HashMap;
use std::future::poll_fn;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};
use std::time::Duration;

use subtle::ConstantTimeEq;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout, timeout_at};
use tracing::warn;

use crate::server::conn::ServerKey;
use crate::server::connect::send_cancel;

/// How long a CancelRequest may take to reach Postgres; a server whose cancel is under way is held that long at most.
const LANDING_MAX: Duration = Duration::from_secs(5);
/// A cancel may overtake the request it is meant for, which comes on another connection: it waits this long for one.
const OVERTAKES_MAX: Duration = Duration::from_millis(10);
/// Postgres ignores a cancel that comes before it has read the query. If the request still runs after these, it is asked anew.
const AGAIN: [Duration; 2] = [Duration::from_millis(15), Duration::from_millis(100)];

/// Every key in use.
#[derive(Default)]
pub(crate) struct CancelRegistry {
    slots: Mutex<HashMap<u32, Vec<Registered>>>,
    /// What long keys begin with, so that other Flowgates know whose they are.
    mark: Option<Mark>,
}

/// Says which Flowgate made a key.
pub(crate) type Mark = [u8; 8];
/// Keys of protocol 3.2 have room for a mark and 24 bytes of chance; those of 3.0 are four bytes of chance.
const MARKED_MIN: usize = 32;

/// The mark of the Flowgate at `address`, the same wherever it is reckoned. (FNV-1a)
pub(crate) fn mark(address: &str) -> Mark {
    let hash = address
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
    hash.to_be_bytes()
}

pub(crate) fn is_marked(secret: &[u8], mark: &Mark) -> bool {
    secret.len() >= MARKED_MIN && secret.starts_with(mark)
}

struct Registered {
    secret: Box<[u8]>,
    slot: Arc<CancelSlot>,
}

/// What one client's key stands for now.
#[derive(Default)]
pub(crate) struct CancelSlot {
    held: Mutex<Held>,
    /// Counts beginnings and ends of requests: while it stays, what runs is the same.
    turn: AtomicU32,
    /// Cancels that want to know of changes.
    watchers: AtomicU32,
    /// The turn, or what is in flight.
    changed: Notify,
}

/// What a cancel is for.
enum Aim {
    /// The wait under way, which knows by now.
    Wait,
    Server(Arc<ServerKey>),
    Nothing,
}

#[derive(Default)]
struct Held {
    server: Option<Arc<ServerKey>>,
    waiting: bool,
    /// The wait under way has been cancelled.
    cancelled: bool,
    /// Who waits.
    waiter: Option<Waker>,
    in_flight: u32,
}

/// A client's key; dropping it makes the key void.
pub(crate) struct CancelKey {
    registry: Arc<CancelRegistry>,
    pub(crate) pid: u32,
    pub(crate) secret: Box<[u8]>,
    pub(crate) slot: Arc<CancelSlot>,
}

impl CancelRegistry {
    /// `address`: ours, as other Flowgates know it.
    pub(crate) fn new(address: Option<&str>) -> Self {
        Self {
            mark: address.map(mark),
            ..Self::default()
        }
    }

    /// A fresh key for a client that is told it runs as backend `pid`. `length`: 4 bytes for protocol 3.0, 32 for 3.2.
    pub(crate) fn issue(self: &Arc<Self>, pid: u32, length: usize) -> io::Result<CancelKey> {
        let mut secret = vec![0; length].into_boxed_slice();
        getrandom::fill(&mut secret).map_err(io::Error::other)?;
        if let Some(mark) = self.mark
            && length >= MARKED_MIN
        {
            secret[..mark.len()].copy_from_slice(&mark);
        }
        let slot = Arc::new(CancelSlot::default());
        let registered = Registered {
            secret: secret.clone(),
            slot: Arc::clone(&slot),
        };
        lock(&self.slots).entry(pid).or_default().push(registered);
        Ok(CancelKey {
            registry: Arc::clone(self),
            pid,
            secret,
            slot,
        })
    }

    /// Acts on a CancelRequest; returns whether the key is one of ours.
    pub(crate) async fn cancel(&self, pid: u32, secret: &[u8]) -> bool {
        let slot = lock(&self.slots).get(&pid).and_then(|keys| {
            // Every key of the pid is compared, in constant time each.
            let fits = |key: &&Registered| bool::from(key.secret.as_ref().ct_eq(secret));
            keys.iter()
                .filter(fits)
                .map(|key| Arc::clone(&key.slot))
                .reduce(|_, later| later)
        });
        let Some(slot) = slot else { return false };
        slot.cancel().await;
        true
    }
}

impl CancelSlot {
    /// The client holds this server from now on.
    pub(crate) fn hold(&self, server: &Arc<ServerKey>) {
        lock(&self.held).server = Some(Arc::clone(server));
        self.note_turn();
    }

    /// A request of the client begins or ends.
    pub(crate) fn note_turn(&self) {
        self.turn.fetch_add(1, Ordering::SeqCst);
        if self.watchers.load(Ordering::SeqCst) > 0 {
            self.changed.notify_waiters();
        }
    }

    /// The client is about to let its server go; returns once no cancel is under way towards it.
    pub(crate) async fn release(&self) {
        loop {
            let landed = self.changed.notified();
            {
                let mut held = lock(&self.held);
                held.server = None;
                if held.in_flight == 0 {
                    break;
                }
            }
            landed.await;
        }
        self.note_turn();
    }

    /// Cancels on their way to a server, and whether the client has let that server go and waits for them to land.
    pub(crate) fn in_flight(&self) -> (u32, bool) {
        let held = lock(&self.held);
        (held.in_flight, held.in_flight > 0 && held.server.is_none())
    }

    /// Begins a wait for a server; cancels that arrive until it is dropped are this wait's.
    pub(crate) fn wait(&self) -> Wait<'_> {
        {
            let mut held = lock(&self.held);
            held.waiting = true;
            held.cancelled = false;
        }
        self.note_turn();
        Wait(self)
    }

    /// Returns once what the client has sent before is cancelled, as far as that can be known.
    async fn cancel(&self) {
        let _watching = Watching::begin(self);
        let patience = Instant::now() + OVERTAKES_MAX;
        let (server, turn) = loop {
            let changed = self.changed.notified();
            let turn = self.turn.load(Ordering::SeqCst);
            match self.aim(None) {
                Aim::Wait => return,
                Aim::Server(server) => break (server, turn),
                Aim::Nothing if timeout_at(patience, changed).await.is_err() => return,
                Aim::Nothing => {}
            }
        };
        self.send(&server).await;
        for patience in AGAIN {
            if self.has_moved_on(turn, patience).await {
                return;
            }
            let Aim::Server(server) = self.aim(Some(turn)) else {
                return;
            };
            self.send(&server).await;
        }
    }

    /// What a cancel is for now; a server is not let go until `send` is over. `only_in`: in no other turn.
    fn aim(&self, only_in: Option<u32>) -> Aim {
        let mut held = lock(&self.held);
        if only_in.is_some_and(|turn| self.turn.load(Ordering::SeqCst) != turn) {
            return Aim::Nothing;
        }
        if held.waiting {
            held.cancelled = true;
            if let Some(waiter) = held.waiter.take() {
                waiter.wake();
            }
            return Aim::Wait;
        }
        let Some(server) = held.server.clone() else {
            return Aim::Nothing;
        };
        held.in_flight += 1;
        Aim::Server(server)
    }

    async fn send(&self, server: &ServerKey) {
        let _landing = Landing(self);
        if let Err(error) = send_cancel(server, LANDING_MAX).await {
            warn!(host = %server.host, port = server.port, %error, "could not pass a cancel request on");
        }
    }

    /// Whether the request of that turn has ended within `patience`.
    async fn has_moved_on(&self, turn: u32, patience: Duration) -> bool {
        let moved = async {
            loop {
                let changed = self.changed.notified();
                if self.turn.load(Ordering::SeqCst) != turn {
                    return;
                }
                changed.await;
            }
        };
        timeout(patience, moved).await.is_ok()
    }
}

struct Watching<'a>(&'a CancelSlot);

impl<'a> Watching<'a> {
    fn begin(slot: &'a CancelSlot) -> Self {
        slot.watchers.fetch_add(1, Ordering::SeqCst);
        Self(slot)
    }
}

impl Drop for Watching<'_> {
    fn drop(&mut self) {
        self.0.watchers.fetch_sub(1, Ordering::SeqCst);
    }
}

struct Landing<'a>(&'a CancelSlot);

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        lock(&self.0.held).in_flight -= 1;
        self.0.changed.notify_waiters();
    }
}

/// A client's wait for a server.
pub(crate) struct Wait<'a>(&'a CancelSlot);

impl Wait<'_> {
    pub(crate) fn is_cancelled(&self) -> bool {
        lock(&self.0.held).cancelled
    }

    /// The wait has ended well, if it was not cancelled: then the server is the client's from now on.
    pub(crate) fn hold(&self, server: &Arc<ServerKey>) -> bool {
        {
            let mut held = lock(&self.0.held);
            if held.cancelled {
                return false;
            }
            held.waiting = false;
            held.server = Some(Arc::clone(server));
        }
        self.0.note_turn();
        true
    }

    /// Resolves when this wait is cancelled.
    pub(crate) async fn cancelled(&self) {
        poll_fn(|cx| {
            let mut held = lock(&self.0.held);
            if held.cancelled {
                return Poll::Ready(());
            }
            match &mut held.waiter {
                Some(waiter) => waiter.clone_from(cx.waker()),
                none => *none = Some(cx.waker().clone()),
            }
            Poll::Pending
        })
        .await;
    }
}

impl Drop for Wait<'_> {
    fn drop(&mut self) {
        let mut held = lock(&self.0.held);
        held.waiting = false;
        held.waiter = None;
    }
}

impl Drop for CancelKey {
    fn drop(&mut self) {
        let mut slots = lock(&self.registry.slots);
        if let Some(keys) = slots.get_mut(&self.pid) {
            keys.retain(|key| !Arc::ptr_eq(&key.slot, &self.slot));
            if keys.is_empty() {
                slots.remove(&self.pid);
            }
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::*;

    #[tokio::test]
    async fn a_key_dies_with_its_client_and_others_stay() {
        let registry = Arc::new(CancelRegistry::default());
        let one = registry.issue(7, 4).unwrap();
        let two = registry.issue(7, 32).unwrap();
        assert_eq!((one.secret.len(), two.secret.len()), (4, 32));
        assert_eq!(lock(&registry.slots)[&7].len(), 2);
        drop(one);
        assert_eq!(lock(&registry.slots)[&7].len(), 1);
        drop(two);
        assert!(lock(&registry.slots).is_empty());
    }

    #[test]
    fn long_keys_say_who_made_them() {
        let registry = Arc::new(CancelRegistry::new(Some("flowgate-1:6432")));
        let (ours, other) = (mark("flowgate-1:6432"), mark("flowgate-2:6432"));
        let (long, short) = (
            registry.issue(7, 32).unwrap(),
            registry.issue(7, 4).unwrap(),
        );
        assert!(is_marked(&long.secret, &ours) && !is_marked(&long.secret, &other));
        assert!(!is_marked(&short.secret, &ours));
        assert_ne!(long.secret[8..], registry.issue(7, 32).unwrap().secret[8..]);
        let unnamed = Arc::new(CancelRegistry::new(None)).issue(7, 32).unwrap();
        assert!(!is_marked(&unnamed.secret, &ours));
    }

    #[tokio::test]
    async fn a_waiting_client_is_cancelled_by_the_right_key_only() {
        let registry = Arc::new(CancelRegistry::default());
        let key = registry.issue(7, 4).unwrap();
        let wait = key.slot.wait();
        let waiting = wait.cancelled();
        tokio::pin!(waiting);
        assert!(futures_util::poll!(&mut waiting).is_pending());
        assert!(!registry.cancel(7, &[0; 5]).await);
        assert!(!registry.cancel(8, &key.secret).await);
        assert!(futures_util::poll!(&mut waiting).is_pending());
        assert!(registry.cancel(7, &key.secret).await);
        assert!(registry.cancel(7, &key.secret).await);
        assert!(futures_util::poll!(&mut waiting).is_ready());
        let next = key.slot.wait();
        assert!(
            futures_util::poll!(pin!(next.cancelled())).is_pending(),
            "both cancels were the first wait's"
        );
    }

    #[tokio::test]
    async fn a_cancel_that_overtakes_its_request_finds_it() {
        let slot = CancelSlot::default();
        let mut early = pin!(slot.cancel());
        assert!(futures_util::poll!(&mut early).is_pending());
        let wait = slot.wait();
        early.await;
        assert!(wait.is_cancelled());
        // A server that came all the same is not taken for it.
        assert!(!wait.hold(&nobody(1)));
        drop(wait);
        // Nothing comes: the cancel was too late rather than too early.
        slot.cancel().await;
        let next = slot.wait();
        assert!(!next.is_cancelled() && next.hold(&nobody(1)));
    }

    #[tokio::test]
    async fn a_cancel_is_sent_anew_while_the_same_request_runs() {
        let postgres = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let slot = Arc::new(CancelSlot::default());
        slot.hold(&nobody(postgres.local_addr().unwrap().port()));
        let cancelling = tokio::spawn({
            let slot = Arc::clone(&slot);
            async move { slot.cancel().await }
        });
        for _again in 0..1 + AGAIN.len() {
            // Each is held until its connection is closed.
            let (connection, _) = postgres.accept().await.unwrap();
            assert_eq!(slot.in_flight().0, 1);
            drop(connection);
        }
        cancelling.await.unwrap();

        let turns_on = tokio::spawn({
            let slot = Arc::clone(&slot);
            async move { slot.cancel().await }
        });
        let (connection, _) = postgres.accept().await.unwrap();
        slot.note_turn();
        drop(connection);
        turns_on.await.unwrap();
        let more = pin!(postgres.accept());
        assert!(
            futures_util::poll!(more).is_pending(),
            "what runs now is none of that cancel's business"
        );
        slot.release().await;
    }

    fn nobody(port: u16) -> Arc<ServerKey> {
        Arc::new(ServerKey {
            host: "127.0.0.1".into(),
            port,
            pid: 7,
            secret: Arc::from([0; 4]),
        })
    }
}
