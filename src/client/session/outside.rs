//! What reaches a session from outside whatever it is at: an admin who ends it, a shutdown whose time is up; and the waking of
//! one that is to look at what all clients were told. Called by `run` in `mod.rs`.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use tokio::sync::watch;

use crate::client::error::SessionError;
use crate::client::live::{Running, Standing};
use crate::client::roster::Entry;

/// Asked at every turn of a session's task, so that it asks two flags and no more: whoever raises one has the task's waker
/// from the first turn on. INVARIANT: it is polled by one task, after the session.
pub(super) struct Outside {
    entry: Arc<Entry>,
    standing: watch::Receiver<Standing>,
}

impl Outside {
    pub(super) fn new(entry: &Arc<Entry>, standing: &watch::Receiver<Standing>) -> Self {
        Self {
            entry: Arc::clone(entry),
            standing: standing.clone(),
        }
    }

    /// Resolves when the session is to end at once.
    pub(super) async fn ends(mut self) -> SessionError {
        let (entry, mut seen) = (Arc::clone(&self.entry), self.standing.clone());
        let mut word = pin!(self.word());
        let mut asked = false;
        poll_fn(|cx| {
            let changed = seen.has_changed().unwrap_or(true);
            if asked && !changed && !entry.is_killed() {
                return Poll::Pending;
            }
            // Before the other looks: what changes in between is either seen by it, or seen here next time.
            seen.mark_unchanged();
            asked = true;
            word.as_mut().poll(cx)
        })
        .await
    }

    async fn word(&mut self) -> SessionError {
        loop {
            if self.standing.borrow().running >= Running::Stopping {
                return SessionError::Shutdown;
            }
            tokio::select! {
                biased;
                () = self.entry.killed() => return SessionError::Killed,
                changed = self.standing.changed() => {
                    if changed.is_err() {
                        return SessionError::Shutdown;
                    }
                }
            }
            // The session had its turn before this was known.
            poll_fn(|cx| {
                cx.waker().wake_by_ref();
                Poll::Ready(())
            })
            .await;
        }
    }
}
