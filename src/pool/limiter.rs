//! How many requests an upstream should have under way at once, from how long they take (`shed.adaptive`). A pure state machine: samples in,
//! a limit out; no clock, no lock, no I/O. Called by `budget.rs`, which sees to it that no more servers are open.
//!
//! As Gradient of github.com/Netflix/concurrency-limits: the limit is multiplied by how much longer than usual requests take, and
//! given a little more each time, so that it settles where a short queue forms. What differs is "usual". An average over a long
//! time follows an overload that lasts, until anything is usual. So it only falls while many are under way, and rises only when as
//! few are as there may ever be: a load of another kind, which makes all requests slow, takes the limit down to that floor, where
//! what is usual is learned anew.

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

#[derive(Debug)]
pub(super) struct Limiter {
    limit: f64,
    floor: f64,
    ceiling: f64,
    /// What a request takes where no queue is, in seconds.
    usual: Option<f64>,
    /// What it took in the last window.
    lately: f64,
    window: Option<Window>,
}

#[derive(Debug)]
struct Window {
    began: Instant,
    samples: u32,
    took: f64,
    in_flight: f64,
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
        // At most the ceiling, which was a `usize`.
        self.limit as usize
    }

    pub(super) fn found(&self) -> Found {
        Found {
            limit: self.limit(),
            usual: self.usual.map(Duration::from_secs_f64),
            lately: Duration::from_secs_f64(self.lately),
        }
    }

    /// A request that took so long has ended while so many were under way, itself among them. `true`: the limit is another.
    pub(super) fn sample(&mut self, took: Duration, in_flight: usize, now: Instant) -> bool {
        let window = self.window.get_or_insert(Window {
            began: now,
            samples: 0,
            took: 0.0,
            in_flight: 0.0,
        });
        window.samples += 1;
        window.took += took.as_secs_f64();
        window.in_flight += in_flight as f64;
        let lasted = now.saturating_duration_since(window.began);
        if lasted < WINDOW || window.samples < SAMPLES_MIN {
            return false;
        }
        let samples = f64::from(window.samples);
        let (took, in_flight) = (window.took / samples, window.in_flight / samples);
        self.window = None;
        let before = self.limit();
        self.window_ended(took.max(1e-6), in_flight);
        self.limit() != before
    }

    fn window_ended(&mut self, took: f64, in_flight: f64) {
        self.lately = took;
        let usual = match self.usual {
            None => took,
            // No fewer will ever be under way: what it takes now is usual.
            Some(usual) if in_flight <= self.floor + 0.5 => (usual + took) / 2.0,
            Some(usual) => usual + (took - usual).min(0.0) * 0.3,
        };
        self.usual = Some(usual);
        // It is not the limit that holds so few back, so how they fare says nothing of it.
        if in_flight < self.limit / 2.0 && in_flight > self.floor {
            if self.limit >= self.ceiling {
                return;
            }
            // Nor is it to stay low for ever.
            self.limit = (self.limit + 0.1).min(self.ceiling);
            return;
        }
        let gradient = (TOLERANCE * usual / took).clamp(GRADIENT_MIN, 1.0);
        let next = self.limit * gradient + self.limit.sqrt() / 2.0;
        let next = self.limit + (next - self.limit) * SMOOTHING;
        self.limit = next.clamp(self.floor, self.ceiling);
    }
}

fn bounds(floor: usize, ceiling: usize) -> (f64, f64) {
    let floor = floor.max(1);
    (floor as f64, ceiling.max(floor) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLOOR: usize = 4;
    const CEILING: usize = 100;
    const STEP: Duration = Duration::from_micros(200);

    /// A Postgres: so many cores shared by all that is under way, which wait for each other besides.
    struct Server {
        cores: f64,
        /// How much of its time a request wastes for each other beyond the cores.
        friction: f64,
    }

    /// Virtual time, chance from a seed.
    struct World {
        server: Server,
        limiter: Limiter,
        now: Instant,
        seed: u64,
        /// What each request still needs of a core, in seconds, and when it began.
        under_way: Vec<(f64, Instant)>,
        /// Requests that want to be under way.
        demand: usize,
        /// What a request needs of a core.
        work: Duration,
        done: usize,
    }

    impl World {
        fn new(cores: f64, demand: usize) -> Self {
            Self {
                server: Server {
                    cores,
                    friction: 0.01,
                },
                limiter: Limiter::new(FLOOR, CEILING),
                now: Instant::now(),
                seed: 0x5EED,
                under_way: Vec::new(),
                demand,
                work: Duration::from_millis(2),
                done: 0,
            }
        }

        fn chance(&mut self) -> f64 {
            // xorshift64
            self.seed ^= self.seed << 13;
            self.seed ^= self.seed >> 7;
            self.seed ^= self.seed << 17;
            (self.seed >> 11) as f64 / (1_u64 << 53) as f64
        }

        /// Runs so long; the requests that were done in a second.
        fn run(&mut self, length: Duration) -> f64 {
            let until = self.now + length;
            self.done = 0;
            while self.now < until {
                while self.under_way.len() < self.demand.min(self.limiter.limit()) {
                    // Most are short, some four times as long as the mean.
                    let chance = self.chance();
                    let times = if chance < 0.1 { 4.0 } else { chance * 1.21 };
                    let work = self.work.as_secs_f64() * times;
                    self.under_way.push((work, self.now));
                }
                self.now += STEP;
                let many = self.under_way.len() as f64;
                let beyond = (many - self.server.cores).max(0.0);
                let share = (self.server.cores / many).min(1.0);
                let speed = share / (1.0 + self.server.friction * beyond);
                let mut ended = Vec::new();
                for (left, began) in &mut self.under_way {
                    *left -= STEP.as_secs_f64() * speed;
                    if *left <= 0.0 {
                        ended.push(*began);
                    }
                }
                let in_flight = self.under_way.len();
                self.under_way.retain(|(left, _)| *left > 0.0);
                self.done += ended.len();
                for began in ended {
                    self.limiter.sample(self.now - began, in_flight, self.now);
                }
                let limit = self.limiter.limit();
                assert!((FLOOR..=CEILING).contains(&limit), "{limit}");
            }
            self.done as f64 / length.as_secs_f64()
        }

        /// What it does in a second with so many under way.
        fn rate_at(cores: f64, many: usize) -> f64 {
            let mut world = Self::new(cores, many);
            world.run(Duration::from_secs(20))
        }
    }

    fn secs(count: u64) -> Duration {
        Duration::from_secs(count)
    }

    #[test]
    fn it_settles_near_the_knee_and_stays_there() {
        for cores in [4, 8, 16] {
            let mut world = World::new(f64::from(cores), 3);
            // Something is known of it before the load comes.
            world.run(secs(5));
            world.demand = 1_000;
            world.run(secs(20));
            let knee = cores as usize;
            let best = World::rate_at(f64::from(cores), knee);
            // Minutes on end, and no drift.
            for _ in 0..10 {
                let rate = world.run(secs(30));
                let limit = world.limiter.limit();
                assert!((knee..=knee * 2).contains(&limit), "{cores}: {limit}");
                assert!(rate > best * 0.9, "{cores}: {rate} of {best} at {limit}");
            }
        }
    }

    #[test]
    fn it_needs_no_quiet_to_begin_with() {
        let mut world = World::new(8.0, 1_000);
        // Nothing but overload has ever been seen: it must not be taken for usual for ever.
        world.run(secs(60));
        let limit = world.limiter.limit();
        assert!(limit <= CEILING, "{limit}");
        world.demand = 4;
        world.run(secs(5));
        world.demand = 1_000;
        world.run(secs(20));
        let limit = world.limiter.limit();
        assert!((8..=16).contains(&limit), "{limit}");
    }

    #[test]
    fn it_follows_a_server_that_grows_slow_and_recovers() {
        let mut world = World::new(16.0, 8);
        world.run(secs(5));
        world.demand = 1_000;
        let before = world.run(secs(30));
        let high = world.limiter.limit();
        world.server.cores = 4.0;
        world.run(secs(10));
        let rate = world.run(secs(20));
        let low = world.limiter.limit();
        assert!(low < high / 2 + 2, "{low}, {high} before");
        let best = World::rate_at(4.0, 4);
        assert!(rate > best * 0.85, "{rate} of {best} at {low}");
        world.server.cores = 16.0;
        world.run(secs(20));
        let after = world.run(secs(30));
        assert!(after > before * 0.95, "{after}, {before} before");
    }

    #[test]
    fn requests_of_another_kind_are_learned() {
        let mut world = World::new(8.0, 4);
        world.run(secs(5));
        world.demand = 1_000;
        world.run(secs(20));
        // Ten times as much to do each: not ten times the queue.
        world.work = Duration::from_millis(20);
        world.run(secs(60));
        let best = {
            let mut fresh = World::new(8.0, 8);
            fresh.work = world.work;
            fresh.run(secs(60))
        };
        let rate = world.run(secs(60));
        let limit = world.limiter.limit();
        assert!(rate > best * 0.85, "{rate} of {best} at {limit}");
    }

    #[test]
    fn a_load_that_does_not_reach_it_is_not_held_back() {
        let mut world = World::new(8.0, 6);
        world.run(secs(60));
        assert_eq!(world.limiter.limit(), CEILING);
        let mut limiter = Limiter::new(FLOOR, 20);
        limiter.resize(FLOOR, 40);
        assert_eq!(limiter.limit(), 40);
        limiter.resize(30, 10);
        assert_eq!(limiter.limit(), 30, "the floor counts");
    }

    /// Slow requests without end, never more than one under way: it starves nobody.
    #[test]
    fn it_never_falls_below_its_floor() {
        let mut limiter = Limiter::new(FLOOR, CEILING);
        let mut now = Instant::now();
        for round in 0..20_000_u32 {
            now += Duration::from_millis(7);
            let took = Duration::from_micros(u64::from(round % 997) * u64::from(round) + 1);
            limiter.sample(took, round as usize % 200, now);
            assert!((FLOOR..=CEILING).contains(&limiter.limit()));
        }
    }
}
