//! Waiting on conditions, with a deadline; nothing in the tests sleeps for luck.

use std::time::Duration;

use tokio::time::Instant;

/// Asks `condition` until it says yes; fails the test, naming `what`, after `deadline`.
pub(crate) async fn wait_until(
    what: &str,
    deadline: Duration,
    mut condition: impl AsyncFnMut() -> bool,
) {
    let started = Instant::now();
    while !condition().await {
        assert!(
            started.elapsed() < deadline,
            "waited {deadline:?} in vain: {what}"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
