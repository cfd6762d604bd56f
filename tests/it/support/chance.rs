//! Chances from a seed, and how long to take them.

use std::time::Duration;

use tokio::time::Instant;

/// xorshift64*: enough, and the same for the same seed.
pub(crate) struct Chance(pub(crate) u64);

impl Chance {
    /// For one of many that share a seed.
    pub(crate) fn of(seed: u64, me: u64) -> Self {
        Self(seed ^ me.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(crate) fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    pub(crate) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.index(from.len())]
    }

    /// Below `len`.
    pub(crate) fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).unwrap()
    }
}

/// Of the clock, printed; `FLOWGATE_SEED` repeats a run.
pub(crate) fn seed() -> u64 {
    let given = std::env::var("FLOWGATE_SEED").ok();
    let seed = given
        .and_then(|seed| seed.parse().ok())
        .unwrap_or_else(|| std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64);
    println!("FLOWGATE_SEED={seed}");
    seed
}

/// A test that goes on for a number of rounds or, with `FLOWGATE_SOAK_SECONDS`, for that time.
#[derive(Clone, Copy)]
pub(crate) struct Stretch {
    rounds: u64,
    until: Option<Instant>,
}

impl Stretch {
    pub(crate) fn of(rounds: u64) -> Self {
        let seconds = std::env::var("FLOWGATE_SOAK_SECONDS").ok();
        let seconds = seconds.map(|seconds| seconds.parse().unwrap());
        Self {
            rounds,
            until: seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds)),
        }
    }

    /// Whether there is a round number `round`, counted from 0.
    pub(crate) fn has(self, round: u64) -> bool {
        match self.until {
            Some(until) => Instant::now() < until,
            None => round < self.rounds,
        }
    }
}
