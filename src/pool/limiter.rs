//! How many of an upstream's servers should be at work at once, from how long requests take (`shed.adaptive`). Pure state
//! machines: samples in, a limit out; no clock, no lock, no I/O. Called by `budget.rs`, which keeps to it.
//!
//! As Gradient of github.com/Netflix/concurrency-limits: the limit is multiplied by how much longer than usual requests take,
//! and given a little more each time, so that it settles where a short queue forms. "Usual" is what they take where few are at
//! work. An average over a long time would follow an overload that lasts, until anything is usual; so, as Envoy's adaptive
//! concurrency does, it is measured anew now and then: for some hundred milliseconds only half as many are let in, and the first
//! time no more than the floor.
//!
//! What a window of samples took is their geometric mean: a few that take a thousand times as long as the others say nothing of
//! how the server fares. Nor do such hold anybody back: what is at work for long counts no more (`Ages`).

use std::time::Duration;

use tokio::time::Instant;

/// A window lasts so long, and has so many samples, at least.
const WINDOW: Duration = Duration::from_millis(100);
const SAMPLES_MIN: u32 = 16;
/// The same where it is measured what is usual: so many times what requests took lately, and so many.
const MEASURED_TIMES: f64 = 4.0;
const MEASURED_MIN: u32 = 8;
/// Requests may take so many times as long as usual.
const TOLERANCE: f64 = 1.6;
/// How much of what a window says counts at once.
const SMOOTHING: f64 = 0.2;
/// One window takes no more than this share of the limit, before smoothing.
const GRADIENT_MIN: f64 = 0.5;
/// Where no more than so many times the floor are at work, that is what is usual.
const FEW: f64 = 1.5;
/// A window that was quicker than usual counts so much: it may have had other requests.
const QUICKER: f64 = 0.05;
/// What is usual is so old at most where many are at work.
const USUAL_MAX: Duration = Duration::from_secs(30);
/// So long it may take to measure it; what is known by then counts on.
const MEASURING_MAX: Duration = Duration::from_secs(2);
/// How often `tick` is to be called.
pub(super) const TICK: Duration = Duration::from_millis(250);
/// What the limit grows by in a tick while nobody waits and it is far from reached.
const EASED: f64 = 1.025;

#[derive(Debug)]
pub(super) struct Limiter {
    limit: f64,
    floor: f64,
    ceiling: f64,
    usual: Option<Usual>,
    /// What it took in the last window, in seconds.
    lately: f64,
    window: Option<Window>,
    measuring: Option<Measuring>,
}

/// What a request takes where few are at work.
#[derive(Clone, Copy, Debug)]
struct Usual {
    /// In seconds.
    took: f64,
    /// When that was seen or looked for; `None`: it was many that were at work, for want of anything better.
    seen: Option<Instant>,
}

/// No more than so many are let in, to see what is usual.
#[derive(Clone, Copy, Debug)]
struct Measuring {
    limit: f64,
    began: Instant,
    /// Since when there are no more.
    drained: Option<Instant>,
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
        let limit = self.measuring.map_or(self.limit, |one| one.limit);
        // At most the ceiling, which was a `usize`.
        limit.clamp(self.floor, self.ceiling) as usize
    }

    pub(super) fn found(&self) -> Found {
        Found {
            limit: self.limit(),
            usual: self.usual.map(|usual| Duration::from_secs_f64(usual.took)),
            lately: Duration::from_secs_f64(self.lately),
        }
    }

    /// A request that took so long has ended while so many were at work, itself among them.
    pub(super) fn sample(&mut self, took: Duration, at_work: usize, now: Instant) {
        let at_work = at_work as f64;
        let mut longest = WINDOW;
        let mut least = SAMPLES_MIN;
        if let Some(measuring) = &mut self.measuring {
            if measuring.drained.is_none() && at_work <= measuring.limit + 1.0 {
                measuring.drained = Some(now);
                self.window = None;
            }
            // Of those that began while there were more, a part was spent among them.
            let in_peace = measuring
                .drained
                .is_some_and(|drained| now.saturating_duration_since(drained) >= took);
            if !in_peace {
                return self.give_up_measuring(now);
            }
            longest = longest.max(Duration::from_secs_f64(self.lately * MEASURED_TIMES));
            least = MEASURED_MIN;
        }
        let window = self.window.get_or_insert(Window {
            began: now,
            samples: 0,
            took: 0.0,
            at_work: 0.0,
        });
        window.samples += 1;
        window.took += took.as_secs_f64().max(1e-6).ln();
        window.at_work += at_work;
        let lasted = now.saturating_duration_since(window.began);
        if lasted >= longest && window.samples >= least {
            let samples = f64::from(window.samples);
            let (took, at_work) = ((window.took / samples).exp(), window.at_work / samples);
            self.window = None;
            self.window_ended(took, at_work, now);
        }
        self.give_up_measuring(now);
    }

    /// Time has passed. `waited_for`: somebody waits for others to end their work.
    pub(super) fn tick(&mut self, at_work: usize, waited_for: bool, now: Instant) {
        self.give_up_measuring(now);
        // Who comes after a quiet time finds nothing held back.
        if self.measuring.is_none() && !waited_for && at_work as f64 <= self.limit / 2.0 {
            self.limit = (self.limit * EASED + 0.25).min(self.ceiling);
        }
    }

    /// Whatever is at work may take too long to be measured.
    fn give_up_measuring(&mut self, now: Instant) {
        let over = |one: &Measuring| now.saturating_duration_since(one.began) >= MEASURING_MAX;
        if self.measuring.as_ref().is_some_and(over) {
            self.measuring = None;
            self.window = None;
            if let Some(usual) = &mut self.usual {
                usual.seen = Some(now);
            }
        }
    }

    fn window_ended(&mut self, took: f64, at_work: f64, now: Instant) {
        self.lately = took;
        if self.measuring.take().is_some() {
            let seen = Some(now);
            self.usual = Some(Usual { took, seen });
            return;
        }
        let few = at_work <= self.floor * FEW;
        let usual = match self.usual {
            None => Usual {
                took,
                seen: few.then_some(now),
            },
            Some(usual) if few => Usual {
                took: (usual.took + took) / 2.0,
                seen: Some(now),
            },
            Some(usual) => Usual {
                took: usual.took + (took - usual.took).min(0.0) * QUICKER,
                seen: usual.seen,
            },
        };
        self.usual = Some(usual);
        let age = |seen| now.saturating_duration_since(seen);
        if !few && usual.seen.is_none_or(|seen| age(seen) >= USUAL_MAX) {
            let limit = match usual.seen {
                None => self.floor,
                Some(_) => (self.limit.min(at_work) / 2.0).max(self.floor),
            };
            self.measuring = Some(Measuring {
                limit,
                began: now,
                drained: None,
            });
            return;
        }
        let gradient = (TOLERANCE * usual.took / took).clamp(GRADIENT_MIN, 1.0);
        // What it does not hold back may be too much all the same; that all goes well says nothing of it then.
        let reached = self.limit.min(at_work.max(self.floor));
        if gradient >= 1.0 && reached < self.limit / 2.0 {
            return;
        }
        let from = if gradient < 1.0 { reached } else { self.limit };
        let next = from * gradient + from.sqrt() / 2.0;
        let next = self.limit + (next - self.limit) * SMOOTHING;
        self.limit = next.clamp(self.floor, self.ceiling);
    }
}

/// The floor gives way to the ceiling.
fn bounds(floor: usize, ceiling: usize) -> (f64, f64) {
    let ceiling = ceiling.max(1);
    (floor.clamp(1, ceiling) as f64, ceiling as f64)
}

/// What is at work, by age: what was so already two ticks ago counts no more. It waits for a lock, a client or a disk, or is
/// large; and were it counted, a few of its kind would hold up all others.
#[derive(Debug, Default)]
pub(super) struct Ages {
    tick: u64,
    /// By the tick they began in, even or odd.
    young: [usize; 2],
    old: usize,
}

impl Ages {
    /// The tick it is begun in.
    pub(super) fn begin(&mut self) -> u64 {
        self.young[(self.tick % 2) as usize] += 1;
        self.tick
    }

    pub(super) fn end(&mut self, began: u64) {
        if self.counts(began) {
            self.young[(began % 2) as usize] -= 1;
        } else {
            self.old -= 1;
        }
    }

    /// Whether what began then is counted.
    pub(super) fn counts(&self, began: u64) -> bool {
        began + 1 >= self.tick
    }

    pub(super) fn tick(&mut self) {
        self.tick += 1;
        self.old += std::mem::take(&mut self.young[(self.tick % 2) as usize]);
    }

    /// How many count.
    pub(super) fn young(&self) -> usize {
        self.young.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FLOOR: usize = 4;
    const CEILING: usize = 100;
    const STEP: Duration = Duration::from_micros(200);

    struct Request {
        began: Instant,
        /// The tick it began in.
        tick: u64,
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
        ages: Ages,
        now: Instant,
        next_tick: Instant,
        seed: u64,
        at_work: Vec<Request>,
        /// Requests that want to be at work.
        demand: usize,
        servers: usize,
        /// What a request needs of a core, in the mean.
        work: Duration,
        /// This share of them waits so long for something else.
        long: (f64, Duration),
    }

    impl World {
        fn new(cores: usize, demand: usize) -> Self {
            let now = Instant::now();
            Self {
                cores: cores as f64,
                friction: 0.01,
                limiter: Limiter::new(FLOOR, CEILING),
                ages: Ages::default(),
                now,
                next_tick: now + TICK,
                seed: 0x5EED,
                at_work: Vec::new(),
                demand,
                servers: CEILING,
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
                tick: self.ages.begin(),
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
                while self.at_work.len() < self.demand.min(self.servers)
                    && self.ages.young() < self.limiter.limit()
                {
                    self.begin();
                }
                let busy = self.at_work.iter().filter(|one| one.needs > 0.0).count() as f64;
                let beyond = (busy - self.cores).max(0.0);
                let share = (self.cores / busy).min(1.0) / (1.0 + self.friction * beyond);
                self.now += STEP;
                let now = self.now;
                for one in &mut self.at_work {
                    one.needs -= STEP.as_secs_f64() * share;
                }
                let (limiter, ages) = (&mut self.limiter, &mut self.ages);
                self.at_work.retain(|one| {
                    let ended = one.needs <= 0.0 && one.until <= now;
                    if ended {
                        done += 1;
                        limiter.sample(now - one.began, ages.young(), now);
                        ages.end(one.tick);
                    }
                    !ended
                });
                if now >= self.next_tick {
                    self.next_tick = now + TICK;
                    ages.tick();
                    let waited_for = self.demand.min(self.servers) > self.at_work.len();
                    limiter.tick(ages.young(), waited_for, now);
                }
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
    fn a_load_that_the_server_bears_is_not_held_back() {
        for demand in [1, 3, 6, 8] {
            let mut world = World::new(8, demand);
            world.run(300);
            assert_eq!(world.limit(), CEILING, "{demand}");
        }
        let mut limiter = Limiter::new(FLOOR, 20);
        limiter.resize(FLOOR, 40);
        assert_eq!(limiter.limit(), 40);
        limiter.resize(FLOOR, 2);
        assert_eq!(limiter.limit(), 2, "what the pools have room for counts");
    }

    #[test]
    fn one_that_the_server_does_not_bear_is_though_the_ceiling_be_far() {
        let mut world = World::new(8, 30);
        world.run(90);
        let limit = world.limit();
        assert!((7..=16).contains(&limit), "{limit}");
    }

    #[test]
    fn it_is_forgotten_in_a_quiet_time() {
        for demand in [0, 1] {
            let mut world = World::new(8, 1_000);
            world.run(60);
            assert!(world.limit() <= 16);
            world.demand = demand;
            world.run(60);
            assert_eq!(world.limit(), CEILING);
        }
    }

    #[test]
    fn what_is_blocked_holds_nobody_back_for_long() {
        // All that is let in is blocked for a minute, as if by a lock; whoever comes then has not long to wait.
        let mut world = World::new(8, 1_000);
        world.run(60);
        let (limit, before) = (world.limit(), world.run(20));
        world.long = (1.0, Duration::from_secs(60));
        world.demand = 40;
        world.run(10);
        assert_eq!(world.at_work.len(), 40, "at a limit of {limit}");
        world.long = (0.0, Duration::ZERO);
        world.demand = 1_000;
        let rate = world.run(20);
        assert!(rate > before * 0.8, "{rate}, {before} before");
        // Nor has it left anything behind.
        world.run(60);
        let after = world.limit();
        assert!((7..=16).contains(&after), "{after}");
    }

    #[test]
    fn requests_that_are_long_for_another_reason_than_a_queue_are_not_held_back() {
        // From a thousandth of a second to so long, and none of it is work.
        for wait in [50, 150, 400, 3_000] {
            let mut world = World::new(8, CEILING);
            world.work = Duration::from_millis(1);
            world.run(60);
            world.work = Duration::from_micros(10);
            world.long = (1.0, Duration::from_millis(wait));
            world.run(120);
            let rate = world.run(60);
            let most = CEILING as f64 * 1_000.0 / wait as f64;
            assert!(
                rate > most * 0.7,
                "{wait}: {rate} of {most} at {}",
                world.limit()
            );
        }
    }

    #[test]
    fn what_takes_too_long_to_be_measured_is_not_waited_for() {
        let mut world = World::new(8, 1_000);
        let now = world.now;
        let (limit, drained) = (FLOOR as f64, None);
        world.limiter.measuring = Some(Measuring {
            limit,
            began: now,
            drained,
        });
        assert_eq!(world.limiter.limit(), FLOOR);
        world.limiter.tick(4, true, now + MEASURING_MAX / 2);
        assert_eq!(world.limiter.limit(), FLOOR);
        world.limiter.tick(4, true, now + MEASURING_MAX);
        assert_eq!(world.limiter.limit(), CEILING);
    }

    #[test]
    fn what_is_old_counts_no_more() {
        let mut ages = Ages::default();
        let first = ages.begin();
        ages.tick();
        let second = ages.begin();
        assert_eq!(ages.young(), 2);
        ages.tick();
        assert_eq!((ages.young(), ages.counts(first)), (1, false));
        ages.end(first);
        assert_eq!(ages.young(), 1);
        ages.end(second);
        ages.tick();
        assert_eq!((ages.young(), ages.old), (0, 0));
    }
}
