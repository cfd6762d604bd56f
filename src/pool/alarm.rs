//! A timer that is set anew for each wait and never taken down. A timer of each wait's own is put into the runtime's wheel and
//! taken out again under its lock, and may cost a system call; to set one for later is a store. What it was last set for may
//! wake its task once when nobody waits any more. Called by `checkout.rs` and `client/session`.

use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::time::{Instant, Sleep, sleep_until};

#[derive(Default)]
pub(crate) struct Alarm(Option<Pin<Box<Sleep>>>);

impl Alarm {
    /// Ready once it is `at`.
    pub(crate) fn poll_until(&mut self, cx: &mut Context<'_>, at: Instant) -> Poll<()> {
        let sleep = self.0.get_or_insert_with(|| Box::pin(sleep_until(at)));
        if sleep.deadline() != at {
            sleep.as_mut().reset(at);
        }
        sleep.as_mut().poll(cx)
    }
}
