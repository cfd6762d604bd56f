//! How fresh a read of a run must be, whoever asks: no older than the last write to it, or answer about it, that passed
//! through this proxy; and since when a kept answer about it will not do, whatever its age: since the last write. Bounded; a forgotten run falls back to a floor that is never too low. (docs/design.md §6)

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::time::Instant;
use uuid::Uuid;

use crate::classify::RunRef;

/// Runs remembered; older ones raise the floor for all.
const RUNS_MAX: usize = 10_000;

/// Instants before which a replica's answer would be stale.
pub(crate) struct RunTokens {
    state: Mutex<Tokens>,
}

struct Tokens {
    runs: HashMap<Uuid, Token>,
    /// For runs not in the map, and for reads of any run.
    everything: Token,
    /// For runs not in the map only.
    forgotten: Instant,
    /// The latest of all runs' tokens, and the writes under way to any of them.
    latest: Instant,
    writing: u32,
    /// The last write to any run in particular.
    latest_written: Instant,
    /// The last write to something that is no run's: a queue, say.
    elsewhere: Instant,
}

#[derive(Clone, Copy)]
struct Token {
    since: Instant,
    /// The last write that has ended.
    written: Instant,
    /// Writes under way: their commit may be visible before we hear of it.
    writing: u32,
}

/// A write under way; its end counts as the moment from which reads must see it.
pub(crate) struct Writing {
    tokens: Arc<RunTokens>,
    run: RunRef,
}

impl RunTokens {
    pub(crate) fn new(now: Instant) -> Self {
        let state = Tokens {
            runs: HashMap::new(),
            everything: Token {
                since: now,
                written: now,
                writing: 0,
            },
            forgotten: now,
            latest: now,
            writing: 0,
            latest_written: now,
            elsewhere: now,
        };
        Self {
            state: Mutex::new(state),
        }
    }

    /// A write to `run` (a parameter already resolved; `All` where it is not known) is about to be sent.
    pub(crate) fn writing(self: &Arc<Self>, run: RunRef) -> Writing {
        let mut state = self.lock();
        match run {
            RunRef::Literal(id) => {
                state.token(id).writing += 1;
                state.writing += 1;
            }
            RunRef::Param(_) | RunRef::All => state.everything.writing += 1,
            RunRef::None => {}
        }
        drop(state);
        Writing {
            tokens: Arc::clone(self),
            run,
        }
    }

    /// A transaction that may have written to `run` (`All`: any run) has ended.
    pub(crate) fn written(&self, run: RunRef) {
        self.seen(run);
        self.changed(run);
    }

    /// `run` is not as it was: answers about it that are older will not do.
    pub(crate) fn changed(&self, run: RunRef) {
        self.lock().changed(run, Instant::now());
    }

    /// Answers about `run` to what was asked before are out of date, as far as this proxy has seen. While a write is under way
    /// that is now: its maker may know of the commit before we do.
    pub(crate) fn changed_at(&self, run: RunRef) -> Instant {
        let state = self.lock();
        let (own, writing) = match run {
            RunRef::Literal(id) => match state.runs.get(&id) {
                Some(token) => (token.written, token.writing),
                None => (state.forgotten, 0),
            },
            RunRef::Param(_) | RunRef::All | RunRef::None => {
                (state.latest_written.max(state.elsewhere), state.writing)
            }
        };
        if writing + state.everything.writing > 0 {
            Instant::now()
        } else {
            own.max(state.everything.written)
        }
    }

    /// Somebody has been shown `run` as it is now (`All`: any run).
    pub(crate) fn seen(&self, run: RunRef) {
        let now = Instant::now();
        let mut state = self.lock();
        match run {
            RunRef::Literal(id) => {
                state.token(id).since = now;
                state.latest = now;
            }
            RunRef::Param(_) | RunRef::All => state.everything.since = now,
            RunRef::None => {}
        }
    }

    /// From when on a read of `run` must be fresh. While a write is under way that is now: what anybody can have seen of
    /// it was committed by now.
    pub(crate) fn since(&self, run: RunRef) -> Instant {
        let state = self.lock();
        let (since, writing) = match run {
            RunRef::Literal(id) => match state.runs.get(&id) {
                Some(token) => (token.since, token.writing),
                None => (state.forgotten, 0),
            },
            RunRef::Param(_) | RunRef::All => (state.latest, state.writing),
            RunRef::None => (state.forgotten, 0),
        };
        if writing + state.everything.writing > 0 {
            Instant::now()
        } else {
            since.max(state.everything.since)
        }
    }

    /// Whether this one run is being written to. A replica may show a commit a moment before the primary does, to whoever
    /// asks it then; so until the commit is acknowledged it is not asked.
    pub(crate) fn is_being_written(&self, run: RunRef) -> bool {
        let RunRef::Literal(id) = run else {
            return false;
        };
        let state = self.lock();
        state.runs.get(&id).is_some_and(|token| token.writing > 0)
    }

    /// The runs remembered: from when on reads of them must be fresh, and how many writes are under way.
    pub(crate) fn report(&self) -> Vec<(Uuid, Instant, u32)> {
        let state = self.lock();
        let runs = state.runs.iter();
        runs.map(|(id, token)| (*id, token.since, token.writing))
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, Tokens> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Writing {
    /// The same transaction writes to `run`, too.
    pub(crate) fn and(self, run: RunRef) -> Self {
        if self.run == run {
            self
        } else {
            self.tokens.writing(RunRef::All)
        }
    }
}

impl Tokens {
    fn changed(&mut self, run: RunRef, now: Instant) {
        match run {
            RunRef::Literal(id) => {
                self.token(id).written = now;
                self.latest_written = now;
            }
            RunRef::Param(_) | RunRef::All => self.everything.written = now,
            RunRef::None => self.elsewhere = now,
        }
    }

    fn token(&mut self, id: Uuid) -> &mut Token {
        if self.runs.len() >= RUNS_MAX && !self.runs.contains_key(&id) {
            // Half of them at once, so that it happens seldom. Those being written to stay.
            let age = |token: &Token| token.since.max(token.written);
            let mut ages: Vec<_> = self.runs.values().map(age).collect();
            let middle = ages.len() / 2;
            let cut = *ages.select_nth_unstable(middle).1;
            self.forgotten = self.forgotten.max(cut);
            self.runs
                .retain(|_, token| age(token) > cut || token.writing > 0);
        }
        let fresh = Token {
            since: self.forgotten,
            written: self.forgotten,
            writing: 0,
        };
        self.runs.entry(id).or_insert(fresh)
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        let now = Instant::now();
        let mut state = self.tokens.lock();
        state.changed(self.run, now);
        match self.run {
            RunRef::Literal(id) => {
                let token = state.token(id);
                token.writing -= 1;
                token.since = now;
                state.writing -= 1;
                state.latest = now;
            }
            RunRef::Param(_) | RunRef::All => {
                state.everything.writing -= 1;
                state.everything.since = now;
            }
            RunRef::None => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn a_write_is_a_floor_for_its_run_only() {
        let start = Instant::now();
        let tokens = Arc::new(RunTokens::new(start));
        let (one, two) = (Uuid::from_u128(1), Uuid::from_u128(2));
        tokio::time::advance(Duration::from_secs(1)).await;
        let writing = tokens.writing(RunRef::Literal(one));
        let now = Instant::now();
        assert_eq!(tokens.since(RunRef::Literal(one)), now);
        assert_eq!(tokens.since(RunRef::All), now);
        assert_eq!(tokens.since(RunRef::Literal(two)), start);
        let written = [RunRef::Literal(one), RunRef::Literal(two), RunRef::All];
        let written = written.map(|run| tokens.is_being_written(run));
        assert_eq!(written, [true, false, false]);
        drop(writing);
        assert_eq!(tokens.since(RunRef::Literal(one)), Instant::now());
        assert_eq!(tokens.since(RunRef::Literal(two)), start);
        drop(tokens.writing(RunRef::All));
        assert_eq!(tokens.since(RunRef::Literal(two)), Instant::now());
    }

    #[tokio::test(start_paused = true)]
    async fn answers_go_out_of_date_by_writes_and_not_by_reads() {
        let start = Instant::now();
        let tokens = Arc::new(RunTokens::new(start));
        let (one, two) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let changed = |id| tokens.changed_at(RunRef::Literal(id));
        let later = async || {
            tokio::time::advance(Duration::from_secs(1)).await;
            Instant::now()
        };
        later().await;
        tokens.seen(RunRef::Literal(one));
        tokens.seen(RunRef::All);
        assert_eq!((changed(one), changed(two)), (start, start));
        let writing = tokens.writing(RunRef::Literal(one));
        let ended = later().await;
        assert_eq!((changed(one), changed(two)), (ended, start));
        drop(writing);
        assert_eq!((changed(one), changed(two)), (ended, start));
        assert_eq!(tokens.changed_at(RunRef::All), ended);
        let polled = later().await;
        tokens.written(RunRef::None);
        assert_eq!((changed(one), changed(two)), (ended, start));
        assert_eq!(tokens.changed_at(RunRef::None), polled);
        let any = later().await;
        tokens.written(RunRef::All);
        assert_eq!((changed(one), changed(two)), (any, any));
        assert_eq!(tokens.since(RunRef::Literal(two)), any);
    }

    #[tokio::test(start_paused = true)]
    async fn a_forgotten_run_is_never_taken_for_an_untouched_one() {
        let tokens = Arc::new(RunTokens::new(Instant::now()));
        for number in 0..RUNS_MAX as u128 * 2 {
            tokio::time::advance(Duration::from_millis(1)).await;
            drop(tokens.writing(RunRef::Literal(Uuid::from_u128(number))));
            let written = Instant::now();
            assert!(tokens.since(RunRef::Literal(Uuid::from_u128(number))) >= written);
        }
        let first_write = Instant::now() - Duration::from_millis(RUNS_MAX as u64 * 2 - 1);
        assert!(tokens.since(RunRef::Literal(Uuid::from_u128(0))) >= first_write);
        assert!(tokens.lock().runs.len() <= RUNS_MAX);
    }
}
