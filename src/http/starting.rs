//! Runs that are being started over this port: their events wait until the answer that says so is written, because
//! an event that overtakes it is undone by it in pgflow's client. Bounded by what is asked at once, and each by time.
//! `rest` holds, `realtime` asks.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use uuid::Uuid;

/// From the answer's last byte handed to the socket until its reader, who has two sockets to look at, has it for sure.
const AFTER: Duration = Duration::from_millis(50);

#[derive(Default)]
pub(super) struct Starting(Arc<Mutex<HashMap<Uuid, usize>>>);

/// Events of this run wait while it is there, and a moment longer.
pub(super) struct Hold {
    run: Uuid,
    runs: Arc<Mutex<HashMap<Uuid, usize>>>,
}

impl Starting {
    pub(super) fn hold(&self, run: Uuid) -> Hold {
        let runs = Arc::clone(&self.0);
        let mut held = runs.lock().unwrap_or_else(PoisonError::into_inner);
        *held.entry(run).or_default() += 1;
        drop(held);
        Hold { run, runs }
    }

    pub(super) fn holds(&self, run: Uuid) -> bool {
        let held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.contains_key(&run)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let (run, runs) = (self.run, Arc::clone(&self.runs));
        let release = move || {
            let mut held = runs.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(count) = held.get_mut(&run) {
                *count -= 1;
                if *count == 0 {
                    held.remove(&run);
                }
            }
        };
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => {
                // Its end is near and known, so nobody waits for it.
                runtime.spawn(async move {
                    tokio::time::sleep(AFTER).await;
                    release();
                });
            }
            Err(_) => release(),
        }
    }
}
