//! How fresh a read of a run must be, whoever asks: no older than the last write to it, or answer about it, that passed
//! through this proxy. Bounded; a forgotten run falls back to a floor that is never too low. (docs/design.md §6)

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

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
}

#[derive(Clone, Copy)]
struct Token {
    since: Instant,
    /// Writes under way: their commit may be visible before we hear of it.
    writing: u32,
}

/// A write under way; its end counts as the moment from which reads must see it.
pub(crate) struct Writing<'a> {
    tokens: &'a RunTokens,
    run: RunRef,
}

impl RunTokens {
    pub(crate) fn new(now: Instant) -> Self {
        let state = Tokens {
            runs: HashMap::new(),
            everything: Token {
                since: now,
                writing: 0,
            },
            forgotten: now,
        };
        Self {
            state: Mutex::new(state),
        }
    }

    /// A write to `run` (a parameter already resolved; `All` where it is not known) is about to be sent.
    pub(crate) fn writing(&self, run: RunRef) -> Writing<'_> {
        let mut state = self.lock();
        match run {
            RunRef::Literal(id) => state.token(id).writing += 1,
            RunRef::Param(_) | RunRef::All => state.everything.writing += 1,
            RunRef::None => {}
        }
        drop(state);
        Writing { tokens: self, run }
    }

    /// From when on a read of `run` must be fresh; `None` while a write to it is under way.
    pub(crate) fn since(&self, run: RunRef) -> Option<Instant> {
        let state = self.lock();
        let everything = state.everything;
        let fit = |writing: u32, since: Instant| (writing == 0).then_some(since);
        match run {
            RunRef::Literal(id) => {
                let token = state.runs.get(&id).copied().unwrap_or(Token {
                    since: state.forgotten,
                    writing: 0,
                });
                fit(
                    everything.writing + token.writing,
                    everything.since.max(token.since),
                )
            }
            RunRef::Param(_) | RunRef::All => {
                let latest = state
                    .runs
                    .values()
                    .map(|token| token.since)
                    .max()
                    .unwrap_or(state.forgotten);
                let writing = state.runs.values().map(|token| token.writing).sum::<u32>();
                fit(
                    everything.writing + writing,
                    everything.since.max(latest).max(state.forgotten),
                )
            }
            RunRef::None => fit(everything.writing, everything.since),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Tokens> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Tokens {
    fn token(&mut self, id: Uuid) -> &mut Token {
        if self.runs.len() >= RUNS_MAX && !self.runs.contains_key(&id) {
            // Half of them at once, so that it happens seldom. Those being written to stay.
            let mut ages: Vec<_> = self.runs.values().map(|token| token.since).collect();
            let middle = ages.len() / 2;
            let cut = *ages.select_nth_unstable(middle).1;
            self.forgotten = self.forgotten.max(cut);
            self.runs
                .retain(|_, token| token.since > cut || token.writing > 0);
        }
        let fresh = Token {
            since: self.forgotten,
            writing: 0,
        };
        self.runs.entry(id).or_insert(fresh)
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        let now = Instant::now();
        let mut state = self.tokens.lock();
        let token = match self.run {
            RunRef::Literal(id) => state.token(id),
            RunRef::Param(_) | RunRef::All => &mut state.everything,
            RunRef::None => return,
        };
        token.writing -= 1;
        token.since = now;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test(start_paused = true)]
    async fn a_write_is_a_floor_for_its_run_only() {
        let start = Instant::now();
        let tokens = RunTokens::new(start);
        let (one, two) = (Uuid::from_u128(1), Uuid::from_u128(2));
        tokio::time::advance(Duration::from_secs(1)).await;
        let writing = tokens.writing(RunRef::Literal(one));
        assert_eq!(tokens.since(RunRef::Literal(one)), None);
        assert_eq!(tokens.since(RunRef::All), None);
        assert_eq!(tokens.since(RunRef::Literal(two)), Some(start));
        drop(writing);
        assert_eq!(tokens.since(RunRef::Literal(one)), Some(Instant::now()));
        assert_eq!(tokens.since(RunRef::Literal(two)), Some(start));
        drop(tokens.writing(RunRef::All));
        assert_eq!(tokens.since(RunRef::Literal(two)), Some(Instant::now()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_forgotten_run_is_never_taken_for_an_untouched_one() {
        let tokens = RunTokens::new(Instant::now());
        for number in 0..RUNS_MAX as u128 * 2 {
            tokio::time::advance(Duration::from_millis(1)).await;
            drop(tokens.writing(RunRef::Literal(Uuid::from_u128(number))));
            let written = Instant::now();
            assert!(tokens.since(RunRef::Literal(Uuid::from_u128(number))) >= Some(written));
        }
        let first_write = Instant::now() - Duration::from_millis(RUNS_MAX as u64 * 2 - 1);
        assert!(tokens.since(RunRef::Literal(Uuid::from_u128(0))) >= Some(first_write));
        assert!(tokens.lock().runs.len() <= RUNS_MAX);
    }
}
