//! When a reader of the outbox looks by itself and when it sleeps until it is notified. Pure: `upstream.rs` reads, tells the
//! senders (`flowgate.reader.asleep`) and passes the time in.
//!
//! **Why.** NOTIFY holds one lock of the whole cluster until its transaction has reached the disk, so notifying transactions
//! commit one by one. Under load the reader is busy anyway: it says that it is awake, looks every `LOOK`, and nobody
//! notifies. **Falling asleep loses nothing**: whoever found it awake had its transaction id before it said otherwise, so it
//! looks on until all that were in progress at that moment have ended.
//!
//! What sessions of ours commit is looked for at once, but no more often than while awake: looks at any pace that 32 workers
//! set cost them a third of theirs. Where a look finds a single event, or none, the next may come sooner. Whether to stay
//! awake is for the others' sake and counts their notifications alone.

use std::time::Duration;

use tokio::time::Instant;

/// Between two looks while awake, or while sessions of ours commit: half of it is the latency that sparing the NOTIFY costs.
const LOOK: Duration = Duration::from_millis(5);
/// The same after a look that found no more than one row: who commits that rarely isn't slowed by being looked after.
const LOOK_SOON: Duration = Duration::from_millis(2);
/// While what was in progress has not ended, looks become rarer up to this.
const LOOK_MAX: Duration = Duration::from_millis(200);
/// Notified of so many looks, in so short a time, and it stays awake.
const BUSY_LOOKS: u32 = 5;
const BUSY: Duration = Duration::from_millis(100);
/// Nothing found for so long, and it falls asleep.
const QUIET: Duration = Duration::from_millis(200);

#[derive(Debug)]
pub(super) struct Rhythm {
    mode: Mode,
    /// Looks that it was notified of since then.
    notified: u32,
    since: Instant,
    /// Until then nothing is looked for on account of what our own sessions commit.
    rested: Instant,
}

#[derive(Debug, PartialEq, Eq)]
enum Mode {
    /// Senders notify.
    Asleep,
    /// Senders don't. Something was found last at that time.
    Awake { found: Instant, next: Instant },
    /// Senders notify, but those that were in progress may not have known.
    Drowsy {
        in_progress: Vec<u64>,
        pause: Duration,
        next: Instant,
    },
}

/// What the senders must be told after a look.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Turn {
    Stay,
    /// `asleep = false`, then `Rhythm::awake`.
    Wake,
    /// `asleep = true`, then `Rhythm::drowsy` with what is in progress after that has been committed.
    Sleep,
}

impl Rhythm {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            mode: Mode::Asleep,
            notified: 0,
            since: now,
            rested: now,
        }
    }

    /// When to look for what a session of ours has committed.
    pub(super) fn rested(&self) -> Instant {
        self.rested
    }

    /// When to look without having been notified.
    pub(super) fn next(&self) -> Option<Instant> {
        match &self.mode {
            Mode::Asleep => None,
            Mode::Awake { next, .. } | Mode::Drowsy { next, .. } => Some(*next),
        }
    }

    fn pause(rows: usize) -> Duration {
        if rows > 1 { LOOK } else { LOOK_SOON }
    }

    pub(super) fn awake(&mut self, now: Instant) {
        self.mode = Mode::Awake {
            found: now,
            next: now + LOOK,
        };
    }

    pub(super) fn drowsy(&mut self, now: Instant, in_progress: Vec<u64>) {
        self.notified = 0;
        self.mode = Mode::Drowsy {
            in_progress,
            pause: LOOK,
            next: now + LOOK,
        };
    }

    /// After each look, whoever reads along: how many rows it found.
    pub(super) fn rest(&mut self, now: Instant, rows: usize) {
        self.rested = now + Self::pause(rows);
    }

    /// After each look of a reader that senders know of: how many rows it found, whether it was notified of, and the transactions that its snapshot saw in
    /// progress.
    pub(super) fn looked(
        &mut self,
        now: Instant,
        rows: usize,
        notified: bool,
        running: &[u64],
    ) -> Turn {
        match &mut self.mode {
            Mode::Awake { found, next } => {
                *next = now + Self::pause(rows);
                if rows > 0 {
                    *found = now;
                } else if now.duration_since(*found) >= QUIET {
                    return Turn::Sleep;
                }
                return Turn::Stay;
            }
            Mode::Drowsy {
                in_progress,
                pause,
                next,
            } => {
                in_progress.retain(|xid| running.contains(xid));
                if in_progress.is_empty() {
                    self.mode = Mode::Asleep;
                } else {
                    *pause = (*pause * 2).min(LOOK_MAX);
                    *next = now + *pause;
                }
            }
            Mode::Asleep => {}
        }
        if !notified {
            return Turn::Stay;
        }
        if now.duration_since(self.since) > BUSY {
            (self.since, self.notified) = (now, 0);
        }
        self.notified += 1;
        if self.notified < BUSY_LOOKS {
            Turn::Stay
        } else {
            Turn::Wake
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn a_single_event_now_and_then_leaves_it_asleep() {
        let start = Instant::now();
        let mut rhythm = Rhythm::new(start);
        for event in 0..100 {
            assert_eq!(
                rhythm.looked(start + event * 50 * MS, 1, true, &[]),
                Turn::Stay
            );
            assert_eq!(rhythm.next(), None);
        }
    }

    #[test]
    fn many_at_once_keep_it_awake_until_nothing_comes_any_more() {
        let start = Instant::now();
        let mut rhythm = Rhythm::new(start);
        for look in 0..4 {
            assert_eq!(rhythm.looked(start + look * MS, 3, true, &[]), Turn::Stay);
        }
        assert_eq!(rhythm.looked(start + 4 * MS, 3, true, &[]), Turn::Wake);
        rhythm.awake(start + 4 * MS);
        assert_eq!(rhythm.next(), Some(start + 9 * MS));
        assert_eq!(rhythm.looked(start + 150 * MS, 1, true, &[]), Turn::Stay);
        assert_eq!(rhythm.looked(start + 349 * MS, 0, false, &[]), Turn::Stay);
        assert_eq!(rhythm.looked(start + 350 * MS, 0, false, &[]), Turn::Sleep);
    }

    #[test]
    fn it_looks_on_until_all_that_may_have_thought_it_awake_have_ended() {
        let start = Instant::now();
        let mut rhythm = Rhythm::new(start);
        rhythm.drowsy(start, vec![10, 14]);
        assert_eq!(rhythm.next(), Some(start + LOOK));
        assert_eq!(
            rhythm.looked(start + 5 * MS, 0, false, &[10, 14, 20]),
            Turn::Stay
        );
        assert_eq!(rhythm.next(), Some(start + 15 * MS));
        assert_eq!(
            rhythm.looked(start + 15 * MS, 1, true, &[14, 21]),
            Turn::Stay
        );
        for look in 0..10 {
            assert_eq!(
                rhythm.looked(start + look * MS, 0, false, &[14]),
                Turn::Stay
            );
        }
        assert_eq!(rhythm.next(), Some(start + 9 * MS + LOOK_MAX));
        assert_eq!(rhythm.looked(start + 20 * MS, 0, false, &[22]), Turn::Stay);
        assert_eq!(rhythm.next(), None);
    }

    #[test]
    fn what_our_own_sessions_commit_is_looked_for_at_once_and_keeps_nobody_awake() {
        let start = Instant::now();
        let mut rhythm = Rhythm::new(start);
        assert_eq!(rhythm.rested(), start);
        for look in 0..100 {
            let now = start + look * MS;
            assert_eq!(rhythm.looked(now, 3, false, &[]), Turn::Stay);
            rhythm.rest(now, 3);
            assert_eq!((rhythm.rested(), rhythm.next()), (now + LOOK, None));
        }
    }

    #[test]
    fn where_little_is_found_the_next_look_comes_sooner() {
        let start = Instant::now();
        let mut rhythm = Rhythm::new(start);
        rhythm.awake(start);
        for (rows, pause) in [(0, LOOK_SOON), (1, LOOK_SOON), (2, LOOK), (500, LOOK)] {
            rhythm.rest(start, rows);
            assert_eq!(rhythm.rested(), start + pause);
            assert_eq!(rhythm.looked(start, rows, false, &[]), Turn::Stay);
            assert_eq!(rhythm.next(), Some(start + pause));
        }
    }
}
