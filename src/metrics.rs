//! Numbers about ourselves: counters, gauges and histograms, and their text for Prometheus. Each module registers its own
//! once and keeps the handle; counting is one relaxed atomic add, no lock. Never global: the `Registry` is passed.
//!
//! INVARIANT: label values come from the configuration or from our own enums, never from what a client sent, or whoever
//! connects could make the registry grow without end.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Every metric of one process, by name and labels.
#[derive(Default)]
pub struct Registry {
    families: Mutex<BTreeMap<String, Family>>,
}

/// All metrics of one name.
struct Family {
    help: String,
    series: BTreeMap<Labels, Metric>,
}

/// `{upstream="primary"}`, as rendered; empty without labels.
type Labels = String;

#[derive(Clone)]
enum Metric {
    Counter(Arc<Counter>),
    Gauge(Arc<Gauge>),
    Histogram(Arc<Histogram>),
}

/// What only grows. Its name ends in `_total`.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

/// What goes up and down.
#[derive(Debug, Default)]
pub struct Gauge(AtomicI64);

/// How long something took. Its name ends in `_seconds`.
///
/// Buckets are four to each power of two, in µs, so an estimate is at most a quarter above the truth. Prometheus is
/// told only the powers of two.
#[derive(Debug)]
pub struct Histogram {
    buckets: [AtomicU64; BUCKETS],
    sum_us: AtomicU64,
}

/// Up to 2^27 µs, a bit over two minutes; what is longer shares the last bucket.
const OCTAVE_MAX: usize = 26;
const BUCKETS: usize = 4 * OCTAVE_MAX + 1;

impl Registry {
    pub fn new() -> Self {
        Self::default()
    }

    /// The counter of that name and labels: a new one, or the one there is.
    pub fn counter(&self, name: &str, help: &str, labels: &[(&str, &str)]) -> Arc<Counter> {
        match self.metric(name, help, labels, || Metric::Counter(Arc::default())) {
            Metric::Counter(counter) => counter,
            Metric::Gauge(_) | Metric::Histogram(_) => panic!("bug: metric {name} is no counter"),
        }
    }

    /// As `counter`.
    pub fn gauge(&self, name: &str, help: &str, labels: &[(&str, &str)]) -> Arc<Gauge> {
        match self.metric(name, help, labels, || Metric::Gauge(Arc::default())) {
            Metric::Gauge(gauge) => gauge,
            Metric::Counter(_) | Metric::Histogram(_) => panic!("bug: metric {name} is no gauge"),
        }
    }

    /// As `counter`.
    pub fn histogram(&self, name: &str, help: &str, labels: &[(&str, &str)]) -> Arc<Histogram> {
        match self.metric(name, help, labels, || Metric::Histogram(Arc::default())) {
            Metric::Histogram(histogram) => histogram,
            Metric::Counter(_) | Metric::Gauge(_) => panic!("bug: metric {name} is no histogram"),
        }
    }

    /// All of it in Prometheus's text format, version 0.0.4.
    pub fn render(&self) -> String {
        let mut text = String::new();
        for (name, family) in self.families().iter() {
            family
                .render(name, &mut text)
                .expect("writing to a String cannot fail");
        }
        text
    }

    fn metric(
        &self,
        name: &str,
        help: &str,
        labels: &[(&str, &str)],
        new: impl Fn() -> Metric,
    ) -> Metric {
        debug_assert!(
            is_name(name) && labels.iter().all(|(label, _)| is_name(label)),
            "{name} {labels:?}"
        );
        let mut families = self.families();
        let family = families.entry(name.to_owned()).or_insert_with(|| Family {
            help: help.to_owned(),
            series: BTreeMap::new(),
        });
        let wanted = new();
        // A name has one kind, whatever its labels.
        let kind = family.series.values().next().unwrap_or(&wanted).kind();
        assert!(
            kind == wanted.kind(),
            "bug: metric {name} is a {kind}, not a {}",
            wanted.kind()
        );
        family.series.entry(spell(labels)).or_insert(wanted).clone()
    }

    /// Nothing between lock and unlock leaves a map half-changed, so a panic there poisons nothing.
    fn families(&self) -> MutexGuard<'_, BTreeMap<String, Family>> {
        self.families.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counter {
    pub fn inc(&self) {
        self.add(1);
    }

    pub fn add(&self, by: u64) {
        self.0.fetch_add(by, Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

impl Gauge {
    pub fn set(&self, to: i64) {
        self.0.store(to, Relaxed);
    }

    pub fn add(&self, by: i64) {
        self.0.fetch_add(by, Relaxed);
    }

    pub fn sub(&self, by: i64) {
        self.0.fetch_sub(by, Relaxed);
    }

    pub fn get(&self) -> i64 {
        self.0.load(Relaxed)
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: [const { AtomicU64::new(0) }; BUCKETS],
            sum_us: AtomicU64::new(0),
        }
    }
}

impl Histogram {
    pub fn observe(&self, took: Duration) {
        // Rounded up, so that a bucket's bound holds for all in it.
        let us = u64::try_from(took.as_nanos().div_ceil(1_000)).unwrap_or(u64::MAX);
        self.buckets[bucket_of(us)].fetch_add(1, Relaxed);
        self.sum_us.fetch_add(us, Relaxed);
    }

    pub fn count(&self) -> u64 {
        self.snapshot().iter().sum()
    }

    pub fn sum(&self) -> Duration {
        Duration::from_micros(self.sum_us.load(Relaxed))
    }

    /// An upper bound of the `q` quantile (0.5 the median), at most a quarter above it; `None` before any observation.
    /// What was longer than the last bucket counts as that.
    pub fn quantile(&self, q: f64) -> Option<Duration> {
        let counts = self.snapshot();
        let total: u64 = counts.iter().sum();
        // A rank among the counts, 1 to total; what a float loses of it is far less than a bucket.
        let rank = ((q.clamp(0.0, 1.0) * total as f64).ceil() as u64).clamp(1, total.max(1));
        let mut seen = 0;
        let bucket = counts.iter().position(|count| {
            seen += count;
            seen >= rank
        })?;
        Some(Duration::from_micros(bound_of(bucket.min(BUCKETS - 2))))
    }

    fn snapshot(&self) -> [u64; BUCKETS] {
        std::array::from_fn(|bucket| self.buckets[bucket].load(Relaxed))
    }
}

/// Which bucket holds `us`: bucket `b` is `(bound_of(b - 1), bound_of(b)]`.
fn bucket_of(us: u64) -> usize {
    let below = us.saturating_sub(1);
    if below < 4 {
        return usize::try_from(below).unwrap_or(BUCKETS - 1);
    }
    let octave = below.ilog2();
    let quarter = (below >> (octave - 2)) & 3;
    usize::try_from(4 * u64::from(octave - 1) + quarter)
        .unwrap_or(usize::MAX)
        .min(BUCKETS - 1)
}

/// The longest time in that bucket, in µs; of all but the last, which has none.
fn bound_of(bucket: usize) -> u64 {
    let next = bucket as u64 + 1;
    if next < 4 {
        next
    } else {
        (4 + next % 4) << (next / 4 - 1)
    }
}

impl Metric {
    fn kind(&self) -> &'static str {
        match self {
            Self::Counter(_) => "counter",
            Self::Gauge(_) => "gauge",
            Self::Histogram(_) => "histogram",
        }
    }
}

impl Family {
    fn render(&self, name: &str, text: &mut String) -> std::fmt::Result {
        let kind = self.series.values().next().map_or("untyped", Metric::kind);
        writeln!(
            text,
            "# HELP {name} {}",
            self.help.replace('\\', "\\\\").replace('\n', "\\n")
        )?;
        writeln!(text, "# TYPE {name} {kind}")?;
        for (labels, metric) in &self.series {
            match metric {
                Metric::Counter(counter) => {
                    writeln!(text, "{name}{} {}", braced(labels), counter.get())?
                }
                Metric::Gauge(gauge) => writeln!(text, "{name}{} {}", braced(labels), gauge.get())?,
                Metric::Histogram(histogram) => histogram.render(name, labels, text)?,
            }
        }
        Ok(())
    }
}

impl Histogram {
    fn render(&self, name: &str, labels: &str, text: &mut String) -> std::fmt::Result {
        let counts = self.snapshot();
        let comma = if labels.is_empty() { "" } else { "," };
        let mut total = 0;
        for (bucket, count) in counts.iter().enumerate() {
            total += count;
            let bound = bound_of(bucket);
            if bucket < BUCKETS - 1 && bound.is_power_of_two() {
                writeln!(
                    text,
                    "{name}_bucket{{{labels}{comma}le=\"{}\"}} {total}",
                    seconds(bound)
                )?;
            }
        }
        writeln!(text, "{name}_bucket{{{labels}{comma}le=\"+Inf\"}} {total}")?;
        writeln!(
            text,
            "{name}_sum{} {}",
            braced(labels),
            seconds(self.sum_us.load(Relaxed))
        )?;
        writeln!(text, "{name}_count{} {total}", braced(labels))
    }
}

/// Exact, where a float's spelling would not be.
fn seconds(us: u64) -> String {
    let text = format!("{}.{:06}", us / 1_000_000, us % 1_000_000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

fn spell(labels: &[(&str, &str)]) -> Labels {
    let escape = |value: &str| {
        value
            .replace('\\', "\\\\")
            .replace('"', "\\\"")
            .replace('\n', "\\n")
    };
    let mut labels: Vec<String> = labels
        .iter()
        .map(|(name, value)| format!("{name}=\"{}\"", escape(value)))
        .collect();
    labels.sort();
    labels.join(",")
}

fn braced(labels: &str) -> String {
    if labels.is_empty() {
        String::new()
    } else {
        format!("{{{labels}}}")
    }
}

fn is_name(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_name_and_labels_are_the_same_counter_in_any_order() {
        let registry = Registry::new();
        registry
            .counter("flowgate_x_total", "x", &[("a", "1"), ("b", "2")])
            .add(2);
        registry
            .counter("flowgate_x_total", "x", &[("b", "2"), ("a", "1")])
            .inc();
        registry
            .counter("flowgate_x_total", "x", &[("a", "2"), ("b", "2")])
            .inc();
        assert_eq!(
            registry
                .counter("flowgate_x_total", "x", &[("a", "1"), ("b", "2")])
                .get(),
            3
        );
        assert_eq!(registry.counter("flowgate_x_total", "x", &[]).get(), 0);
    }

    #[test]
    #[should_panic(expected = "bug: metric flowgate_x is a gauge, not a counter")]
    fn a_name_has_one_kind() {
        let registry = Registry::new();
        registry.gauge("flowgate_x", "x", &[("a", "1")]).set(1);
        registry.counter("flowgate_x", "x", &[("a", "2")]);
    }

    #[test]
    fn the_text_is_what_prometheus_reads() {
        let registry = Registry::new();
        registry
            .counter(
                "flowgate_requests_total",
                "Requests,\nby class",
                &[("class", "re\"ad\\")],
            )
            .add(7);
        registry.counter("flowgate_requests_total", "ignored", &[("class", "other")]);
        let clients = registry.gauge("flowgate_clients", "Clients now", &[]);
        clients.add(3);
        clients.sub(5);
        assert_eq!(
            registry.render(),
            "# HELP flowgate_clients Clients now\n\
             # TYPE flowgate_clients gauge\n\
             flowgate_clients -2\n\
             # HELP flowgate_requests_total Requests,\\nby class\n\
             # TYPE flowgate_requests_total counter\n\
             flowgate_requests_total{class=\"other\"} 0\n\
             flowgate_requests_total{class=\"re\\\"ad\\\\\"} 7\n"
        );
    }

    #[test]
    fn a_histogram_is_cumulative_and_ends_in_its_count() {
        let registry = Registry::new();
        let waits = registry.histogram("flowgate_wait_seconds", "Waits", &[("pool", "p")]);
        for us in [1, 2, 1000, 1_500_000] {
            waits.observe(Duration::from_micros(us));
        }
        waits.observe(Duration::from_secs(1_000_000));
        let text = registry.render();
        for line in [
            "# TYPE flowgate_wait_seconds histogram",
            "flowgate_wait_seconds_bucket{pool=\"p\",le=\"0.000001\"} 1",
            "flowgate_wait_seconds_bucket{pool=\"p\",le=\"0.000002\"} 2",
            "flowgate_wait_seconds_bucket{pool=\"p\",le=\"0.000512\"} 2",
            "flowgate_wait_seconds_bucket{pool=\"p\",le=\"0.001024\"} 3",
            "flowgate_wait_seconds_bucket{pool=\"p\",le=\"2.097152\"} 4",
            "flowgate_wait_seconds_bucket{pool=\"p\",le=\"134.217728\"} 4",
            "flowgate_wait_seconds_bucket{pool=\"p\",le=\"+Inf\"} 5",
            "flowgate_wait_seconds_sum{pool=\"p\"} 1000001.501003",
            "flowgate_wait_seconds_count{pool=\"p\"} 5",
        ] {
            assert!(
                text.lines().any(|there| there == line),
                "{line}\nnot in\n{text}"
            );
        }
        assert_eq!(text.matches("_bucket").count(), 29, "2^0 to 2^27 and +Inf");
    }

    #[test]
    fn every_time_lies_within_the_bounds_of_its_bucket() {
        let mut times: Vec<u64> = (0..5_000).collect();
        times.extend((12..27).flat_map(|octave| {
            let power = 1_u64 << octave;
            [
                power - 1,
                power,
                power + 1,
                power + power / 4,
                power + power / 4 + 1,
                2 * power,
            ]
        }));
        for us in times {
            let bucket = bucket_of(us);
            assert!(us <= bound_of(bucket), "{us} above bucket {bucket}");
            assert!(
                bucket == 0 || us > bound_of(bucket - 1),
                "{us} below bucket {bucket}"
            );
        }
        assert_eq!(bound_of(BUCKETS - 2), 1 << 27);
        assert_eq!(bucket_of((1 << 27) + 1), BUCKETS - 1);
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    #[test]
    fn a_quantile_is_at_most_a_quarter_above_the_truth() {
        let histogram = Histogram::default();
        assert_eq!(histogram.quantile(0.5), None);
        for us in 1..=10_000 {
            histogram.observe(Duration::from_micros(us));
        }
        assert_eq!(
            (histogram.count(), histogram.sum()),
            (10_000, Duration::from_micros(50_005_000))
        );
        for (q, truth) in [
            (0.0, 1),
            (0.01, 100),
            (0.5, 5_000),
            (0.99, 9_900),
            (1.0, 10_000),
        ] {
            let truth = Duration::from_micros(truth);
            let estimate = histogram.quantile(q).unwrap();
            assert!(
                estimate >= truth && estimate <= truth * 5 / 4,
                "{q}: {estimate:?} for {truth:?}"
            );
        }
    }

    #[test]
    fn counts_of_many_threads_add_up() {
        let registry = Registry::new();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let counter = registry.counter("flowgate_x_total", "x", &[]);
                    let histogram = registry.histogram("flowgate_x_seconds", "x", &[]);
                    for _ in 0..10_000 {
                        counter.inc();
                        histogram.observe(Duration::from_micros(3));
                    }
                });
            }
        });
        assert_eq!(registry.counter("flowgate_x_total", "x", &[]).get(), 40_000);
        assert_eq!(
            registry.histogram("flowgate_x_seconds", "x", &[]).count(),
            40_000
        );
    }
}
