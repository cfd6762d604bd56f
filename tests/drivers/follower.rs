//! Runs followed with tokio-postgres, by this test's own program started once more: a connection a share, and another one from
//! where it was when that is lost. The same words on standard input and output as those of `node/followers.cjs` and
//! `python/followers.py`. Called by `main`.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::io::stdin;
use std::rc::Rc;
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::sync::Barrier;
use tokio::time::{sleep, timeout};
use tokio_postgres::AsyncMessage;
use uuid::Uuid;

use super::crowd::STORY;
use super::support::proxy::{try_connect_hearing, try_text};

/// Set for whoever is to follow.
pub(crate) const FOLLOWER: &str = "FLOWGATE_FOLLOWER";
const BREATH: Duration = Duration::from_millis(100);

#[derive(Default)]
struct Met {
    events: usize,
    repeats: usize,
    reconnects: usize,
    gaps: usize,
    /// The last number heard of each run.
    last: HashMap<Uuid, usize>,
    /// Runs of which something was left out, to be asked for again.
    gone: HashSet<Uuid>,
}

impl Met {
    /// The run that must be followed anew from its last number, if this says that something was left out.
    fn hear(&mut self, payload: &str) -> Option<Uuid> {
        let event: Value = serde_json::from_str(payload).unwrap();
        let run = event["run_id"].as_str().unwrap().parse().unwrap();
        if event["event_type"] == "gap" {
            self.gaps += 1;
            self.gone.insert(run);
            return Some(run);
        }
        let last = self.last.get_mut(&run).expect("a run it follows");
        let seq = event["seq"].as_u64().expect("an event has a number");
        let seq = usize::try_from(seq).unwrap();
        self.events += 1;
        if seq <= *last {
            self.repeats += 1;
        } else if seq > *last + 1 {
            assert!(self.gone.contains(&run), "{payload:.300} after {last}");
        } else {
            assert_eq!(event["event_type"], STORY[seq - 1], "{payload:.300}");
            *last = seq;
        }
        None
    }

    fn is_over(&self, share: &[Uuid]) -> bool {
        share.iter().all(|run| self.last[run] == STORY.len())
    }
}

pub(crate) async fn follow() {
    let said = |name: &str| std::env::var(name).unwrap();
    let patience = Duration::from_secs(said("FLOWGATE_PATIENCE").parse().unwrap());
    let mut line = String::new();
    stdin().read_line(&mut line).unwrap();
    let runs: Vec<String> = serde_json::from_str(&line).unwrap();
    let runs: Vec<Uuid> = runs.iter().map(|run| run.parse().unwrap()).collect();
    let sessions: usize = said("FLOWGATE_SESSIONS").parse().unwrap();
    let met = Rc::new(RefCell::new(Met {
        last: runs.iter().map(|run| (*run, 0)).collect(),
        ..Met::default()
    }));
    let shares = runs.chunks(runs.len().div_ceil(sessions));
    let ready = Barrier::new(shares.len());
    let url = said("FLOWGATE_URL");
    let crowd = join_all(shares.map(|share| follow_share(&url, share, &met, &ready)));
    if timeout(patience, crowd).await.is_err() {
        let met = met.borrow();
        let missing: Vec<_> = met
            .last
            .iter()
            .filter(|(_, seq)| **seq < STORY.len())
            .collect();
        panic!("not heard in time, of {}: {missing:?}", missing.len());
    }
    let met = met.borrow();
    println!(
        "{}",
        json!({
            "runs": runs.len(), "events": met.events, "repeats": met.repeats,
            "reconnects": met.reconnects, "gaps": met.gaps,
        })
    );
}

async fn follow_share(url: &str, share: &[Uuid], met: &RefCell<Met>, ready: &Barrier) {
    let mut connected = false;
    loop {
        let heard = hear_all(url, share, met, ready, &mut connected).await;
        if heard.is_some() {
            return;
        }
        sleep(BREATH).await;
    }
}

/// `None`: the connection was lost.
async fn hear_all(
    url: &str,
    share: &[Uuid],
    met: &RefCell<Met>,
    ready: &Barrier,
    connected: &mut bool,
) -> Option<()> {
    let (client, mut hearing) = try_connect_hearing(url).await.ok()?;
    let from = |run: &Uuid| format!("listen \"pgflow:run:{run}@{}\"", met.borrow().last[run]);
    for run in share {
        let listen = if *connected {
            from(run)
        } else {
            format!("listen \"pgflow:run:{run}\"")
        };
        try_text(&client, &listen).await.ok()?;
    }
    if *connected {
        met.borrow_mut().reconnects += 1;
    } else {
        *connected = true;
        if ready.wait().await.is_leader() {
            println!("ready");
        }
    }
    while !met.borrow().is_over(share) {
        match hearing.next_however_late().await? {
            Ok(AsyncMessage::Notification(news)) => {
                let gone = met.borrow_mut().hear(news.payload());
                if let Some(run) = gone {
                    try_text(&client, &from(&run)).await.ok()?;
                }
            }
            Ok(_notice) => {}
            Err(_lost) => return None,
        }
    }
    Some(())
}
