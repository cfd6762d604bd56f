//! Keeps the demo's Postgres alive: a server that ends although nobody stopped it is started again on its port, so that one
//! can kill it and watch what the proxy makes of that. Owns the cluster, and ends it. Started and stopped by `mod`.

use std::time::Duration;

use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tracing::warn;

use crate::embedded::{Cluster, EmbeddedError};

const LOOK_EVERY: Duration = Duration::from_millis(200);
/// After a start that failed.
const PAUSE: Duration = Duration::from_secs(2);

pub(super) struct Keeper {
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Keeper {
    pub(super) fn start(cluster: Cluster) -> Self {
        let (stop, stopped) = oneshot::channel();
        let task = tokio::spawn(keep(cluster, stopped));
        Self { stop, task }
    }

    /// Returns when processes and folder are gone.
    pub(super) async fn stop(self) {
        // Already ended is stopped.
        self.stop.send(()).ok();
        if let Err(error) = self.task.await {
            warn!(%error, "bug: the keeper of the embedded Postgres panicked");
        }
    }
}

async fn keep(mut cluster: Cluster, stopped: oneshot::Receiver<()>) {
    tokio::select! {
        () = look_after(&mut cluster) => {}
        _sent_or_dropped = stopped => {}
    }
    if let Err(error) = cluster.stop().await {
        warn!(%error, "the embedded Postgres did not end as it should");
    }
}

async fn look_after(cluster: &mut Cluster) {
    loop {
        tokio::time::sleep(LOOK_EVERY).await;
        if has_ended(cluster.primary_pid()) {
            let restarted = match cluster.primary_pid() {
                Some(_ended) => cluster.restart_primary().await,
                None => cluster.start_primary().await,
            };
            tell("primary", restarted).await;
        }
        for n in 0..cluster.replica_count() {
            if has_ended(cluster.replica_pid(n)) {
                let restarted = restart_replica(cluster, n).await;
                tell("replica", restarted).await;
            }
        }
    }
}

async fn restart_replica(cluster: &mut Cluster, n: usize) -> Result<(), EmbeddedError> {
    if cluster.replica_pid(n).is_some() {
        cluster.stop_replica(n).await?;
    }
    cluster.start_replica(n).await
}

async fn tell(server: &str, restarted: Result<(), EmbeddedError>) {
    match restarted {
        Ok(()) => warn!(
            server,
            "the embedded Postgres had ended and was started again"
        ),
        Err(error) => {
            warn!(server, %error, "the embedded Postgres has ended and does not start again");
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// Looks without taking the exit status, which is the cluster's.
fn has_ended(pid: Option<u32>) -> bool {
    let pid = pid
        .and_then(|pid| i32::try_from(pid).ok())
        .and_then(Pid::from_raw);
    let Some(pid) = pid else {
        return true;
    };
    let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    match waitid(WaitId::Pid(pid), look) {
        Ok(status) => status.is_some(),
        // Not ours to wait for any more.
        Err(_no_such_child) => true,
    }
}
