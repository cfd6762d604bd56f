//! How many of an upstream's servers should be at work at once, from how long requests take (`shed.adaptive`). A pure state
//! machine: samples in, a limit out; no clock, no lock, no I/O. Called by `budget.rs`, which keeps to it.
//!
//! As Gradient of github.com/Netflix/concurrency-limits: the limit is multiplied by how much longer than usual requests take,
//! and given a little more each time, so that it settles where a short queue forms. "Usual" is what they take where few are at
//! work. An average over a long time would follow an overload that lasts, until anything is usual; so, as Envoy's adaptive
//! concurrency does, it is measured anew now and then: for some hundred milliseconds no more are let in than the floor.
//!
//! What a window of samples took is their geometric mean: a few that take a thousand times as long as the others say nothing of
//! how the server fares.

use std::time::Duration;

use tokio::time::Instant;

/// A window lasts so long, and has so many samples, at least.
const WINDOW: Duration = Duration::from_millis(100);
const SAMPLES_MIN: u32 = 16;
/// Requests may take so many times as long as usual.
const TOLERANCE: f64 = 1.3;
/// How much of what a window says counts at once.
const SMOOTHING: f64 = 0.2;
/// One window takes no more than this share of the limit, before smoothing.
const GRADIENT_MIN: f64 = 0.5;
/// What is usual is so old at most where many are at work.
const USUAL_MAX: Duration = Duration::from_secs(30);
/// So long it may take to measure it; what is known by then counts on.
const MEASURING_MAX: Duration = Duration::from_secs(2);

#[derive(Debug)]
pub(super) struct Limiter {
    limit: f64,
    floor: f64,
    ceiling: f64,
    /// What a request takes where few are at work, in seconds, and when that was seen or looked for.
    usual: Option<(f64, Instant)>,
    /// What it took in the last window.
    lately: f64,
    window: Option<Window>,
    /// Since when no more than the floor are let in, to see what is usual.
    measuring: Option<Instant>,
}

#[derive(Debug)]
struct Window {
    began: Instant,
    samples: u32,
    /// Logarithms of seconds.
    took: f64,
    at_work: f64,
}

/// What it has found out.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Found {
    pub(crate) limit: usize,
    pub(crate) usual: Option<Duration>,
    pub(crate) lately: Duration,
}

impl Limiter {
    /// Begins at the ceiling: nothing is held back before anything is known.
    pub(super) fn new(floor: usize, ceiling: usize) -> Self {
        let (floor, ceiling) = bounds(floor, ceiling);
        Self {
            limit: ceiling,
            floor,
            ceiling,
            usual: None,
            lately: 0.0,
            window: None,
            measuring: None,
        }
    }

    /// From now on.
    pub(super) fn resize(&mut self, floor: usize, ceiling: usize) {
        // Where nothing was held back, nothing is.
        let free = self.limit >= self.ceiling;
        (self.floor, self.ceiling) = bounds(floor, ceiling);
        let limit = if free { self.ceiling } else { self.limit };
        self.limit = limit.clamp(self.floor, self.ceiling);
    }

    pub(super) fn limit(&self) -> usize {
        let limit = match self.measuring {
            Some(_) => self.floor,
            None => self.limit,
        };
        // At most the ceiling, which was a `usize`.
        limit as usize
    }

    pub(super) fn found(&self) -> Found {
        Found {
            limit: self.limit(),
            usual: self.usual.map(|(usual, _)| Duration::from_secs_f64(usual)),
            lately: Duration::from_secs_f64(self.lately),
        }
    }

    /// A request that took so long has ended while so many were at work, itself among them.
    pub(super) fn sample(&mut self, took: Duration, at_work: usize, now: Instant) {
        let window = self.window.get_or_insert(Window {
            began: now,
            samples: 0,
            took: 0.0,
            at_work: 0.0,
        });
        window.samples += 1;
        window.took += took.as_secs_f64().max(1e-6).ln();
        window.at_work += at_work as f64;
        let lasted = now.saturating_duration_since(window.began);
        if lasted >= WINDOW && window.samples >= SAMPLES_MIN {
            let samples = f64::from(window.samples);
            let (took, at_work) = ((window.took / samples).exp(), window.at_work / samples);
            self.window = None;
            self.window_ended(took, at_work, now);
        }
        self.tick(now);
    }

    /// Time has passed: whatever is at work may take too long to be measured.
    pub(super) fn tick(&mut self, now: Instant) {
        let began = self.measuring;
        if began.is_some_and(|began| now.saturating_duration_since(began) >= MEASURING_MAX) {
            self.measuring = None;
            self.window = None;
            self.usual = self.usual.map(|(usual, _)| (usual, now));
        }
    }

    fn window_ended(&mut self, took: f64, at_work: f64, now: Instant) {
        self.lately = took;
        let few = at_work <= self.floor + 0.5;
        if self.measuring.is_some() {
            // The first windows have what was let in before.
            if few {
                self.usual = Some((took, now));
                self.measuring = None;
            }
            return;
        }
        let (usual, seen) = match self.usual {
            None => (took, None),
            Some((usual, _)) if few => ((usual + took) / 2.0, Some(now)),
            Some((usual, seen)) => (usual + (took - usual).min(0.0) * 0.3, Some(seen)),
        };
        self.usual = Some((usual, seen.unwrap_or(now)));
        // It is not the limit that holds so few back, so how they fare says nothing of it; nor is it to stay low for ever.
        if at_work < self.limit / 2.0 {
            self.limit = (self.limit + 0.1).min(self.ceiling);
            return;
        }
        let old = seen.is_none_or(|seen| now.saturating_duration_since(seen) >= USUAL_MAX);
        if old && !few {
            self.measuring = Some(now);
            return;
        }
        let gradient = (TOLERANCE * usual / took).clamp(GRADIENT_MIN, 1.0);
        let next = self.limit * gradient + self.limit.sqrt() / 2.0;
        let next = self.limit + (next - self.limit) * SMOOTHING;
        self.limit = next.clamp(self.floor, self.ceiling);
    }
}

/// The floor gives way to the ceiling.
fn bounds(floor: usize, ceiling: usize) -> (f64, f64) {
    let ceiling = ceiling.max(1);
    (floor.clamp(1, ceiling) as f64, ceiling as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLOOR: usize = 4;
    const CEILING: usize = 100;
    const STEP: Duration = Duration::from_micros(200);

    struct Request {
        began: Instant,
        /// Of a core, in seconds.
        needs: f64,
        /// Waits for something else until then.
        until: Instant,
    }

    /// A Postgres, so many cores shared by all that is at work, and its clients. Virtual time, chance from a seed.
    struct World {
        cores: f64,
        /// What each beyond the cores wastes of everybody's time.
        friction: f64,
        limiter: Limiter,
        now: Instant,
        seed: u64,
        at_work: Vec<Request>,
        /// Requests that want to be at work.
        demand: usize,
        /// What a request needs of a core, in the mean.
        work: Duration,
        /// This share of them waits so long for something else.
        long: (f64, Duration),
    }

    impl World {
        fn new(cores: usize, demand: usize) -> Self {
            Self {
                cores: cores as f64,
                friction: 0.01,
                limiter: Limiter::new(FLOOR, CEILING),
                now: Instant::now(),
                seed: 0x5EED,
                at_work: Vec::new(),
                demand,
                work: Duration::from_millis(2),
                long: (0.0, Duration::ZERO),
            }
        }

        fn chance(&mut self) -> f64 {
            // xorshift64
            self.seed ^= self.seed << 13;
            self.seed ^= self.seed >> 7;
            self.seed ^= self.seed << 17;
            (self.seed >> 11) as f64 / (1_u64 << 53) as f64
        }

        fn begin(&mut self) {
            // Most are short, a tenth takes four times the mean.
            let chance = self.chance();
            let times = if chance < 0.1 { 4.0 } else { chance * 1.21 };
            let waits = self.chance() < self.long.0;
            self.at_work.push(Request {
                began: self.now,
                needs: self.work.as_secs_f64() * times,
                until: if waits {
                    self.now + self.long.1
                } else {
                    self.now
                },
            });
        }

        /// So many seconds pass; the requests that were done in each.
        fn run(&mut self, seconds: u64) -> f64 {
            let until = self.now + Duration::from_secs(seconds);
            let mut done = 0;
            while self.now < until {
                while self.at_work.len() < self.demand.min(self.limiter.limit()) {
                    self.begin();
                }
                let busy = self.at_work.iter().filter(|one| one.needs > 0.0).count() as f64;
                let beyond = (busy - self.cores).max(0.0);
                let share = (self.cores / busy).min(1.0) / (1.0 + self.friction * beyond);
                self.now += STEP;
                let (now, at_work) = (self.now, self.at_work.len());
                for one in &mut self.at_work {
                    one.needs -= STEP.as_secs_f64() * share;
                }
                let limiter = &mut self.limiter;
                self.at_work.retain(|one| {
                    let ended = one.needs <= 0.0 && one.until <= now;
                    if ended {
                        done += 1;
                        limiter.sample(now - one.began, at_work, now);
                    }
                    !ended
                });
                limiter.tick(now);
                assert!((FLOOR..=CEILING).contains(&limiter.limit()));
            }
            f64::from(done) / seconds as f64
        }

        /// What it is when nothing is being measured.
        fn limit(&self) -> usize {
            self.limiter.limit as usize
        }
    }

    #[test]
    fn it_settles_near_the_knee_from_either_side_and_stays_there() {
        for knee in [6, 8, 16, 40] {
            let best = World::new(knee, knee).run(30);
            for begin in [FLOOR, knee, CEILING] {
                let mut world = World::new(knee, 1_000);
                world.limiter.limit = begin as f64;
                world.run(60);
                for _ in 0..20 {
                    let rate = world.run(30);
                    let limit = world.limit();
                    let close = knee - knee / 5..=knee * 2;
                    assert!(close.contains(&limit), "{knee} from {begin}: {limit}");
                    assert!(rate > best * 0.85, "{knee} from {begin}: {rate} of {best}");
                }
            }
        }
    }

    #[test]
    fn it_follows_a_server_that_grows_slow_and_recovers() {
        let mut world = World::new(24, 1_000);
        world.run(60);
        let (before, high) = (world.run(30), world.limit());
        world.cores = 6.0;
        world.run(60);
        let (rate, low) = (world.run(30), world.limit());
        let best = World::new(6, 6).run(30);
        assert!(low <= 12 && low < high, "{low}, {high} before");
        assert!(rate > best * 0.9, "{rate} of {best} at {low}");
        world.cores = 24.0;
        world.run(60);
        let after = world.run(30);
        assert!(after > before * 0.95, "{after}, {before} before");
    }

    #[test]
    fn requests_that_become_ten_times_as_long_are_no_queue() {
        let mut world = World::new(8, 1_000);
        world.run(60);
        world.work *= 10;
        world.run(60);
        let mut best = World::new(8, 8);
        best.work = world.work;
        let (best, rate) = (best.run(60), world.run(60));
        assert!(rate > best * 0.9, "{rate} of {best} at {}", world.limit());
    }

    #[test]
    fn a_few_that_wait_for_something_else_do_not_take_it_down() {
        // One in a hundred waits for a second: they are most of what is at work.
        let mut world = World::new(16, 1_000);
        world.long = (0.01, Duration::from_secs(1));
        world.limiter = Limiter::new(FLOOR, 20);
        world.run(60);
        let unlimited = {
            let mut free = World::new(16, 20);
            free.long = world.long;
            free.limiter = Limiter::new(20, 20);
            free.run(60)
        };
        let rate = world.run(60);
        assert!(rate > unlimited * 0.8, "{rate} of {unlimited}");
    }

    #[test]
    fn an_overload_that_lasts_becomes_usual_for_nobody() {
        let mut world = World::new(8, 1_000);
        // Twenty minutes.
        for _ in 0..20 {
            world.run(60);
        }
        let limit = world.limit();
        assert!((7..=16).contains(&limit), "{limit}");
        let usual = world.limiter.found().usual.unwrap();
        assert!(usual < world.work * 2, "{usual:?}");
    }

    #[test]
    fn a_load_that_does_not_reach_it_is_not_held_back() {
        for demand in [1, 3, 6, 30] {
            let mut world = World::new(8, demand);
            world.run(300);
            assert_eq!(world.limiter.limit(), CEILING, "{demand}");
        }
        let mut limiter = Limiter::new(FLOOR, 20);
        limiter.resize(FLOOR, 40);
        assert_eq!(limiter.limit(), 40);
        limiter.resize(FLOOR, 2);
        assert_eq!(limiter.limit(), 2, "what the pools have room for counts");
    }

    #[test]
    fn what_takes_too_long_to_be_measured_is_not_waited_for() {
        let mut world = World::new(8, 1_000);
        world.long = (1.0, Duration::from_secs(60));
        let now = world.now;
        world.limiter.measuring = Some(now);
        assert_eq!(world.limiter.limit(), FLOOR);
        world.limiter.tick(now + MEASURING_MAX / 2);
        assert_eq!(world.limiter.limit(), FLOOR);
        world.limiter.tick(now + MEASURING_MAX);
        assert_eq!(world.limiter.limit(), CEILING);
    }
}
