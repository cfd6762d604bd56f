//! Answers kept after their flight, by key: bounded by bytes, the least recently used go first, and none stays longer than the
//! longest age anybody may be told of. Never judges whether an answer is good enough for somebody: that is the asker's to say.
//! Synchronous, no clock. Called by `Flights`.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::Answer;
use crate::metrics::{Counter, Gauge, Registry};

/// What an entry costs beside its key and its answer.
const OVERHEAD: usize = 256;

pub(crate) struct Store {
    books: Mutex<Books>,
    bytes_max: usize,
    /// Zero: nothing is kept.
    age_max: Duration,
    counters: Counters,
}

struct Counters {
    bytes: Arc<Gauge>,
    answers: Arc<Gauge>,
    /// Thrown out for others' sake.
    evicted: Arc<Counter>,
}

#[derive(Default)]
struct Books {
    entries: HashMap<Arc<[u8]>, Entry>,
    /// By when they were last used.
    uses: BTreeMap<u64, Arc<[u8]>>,
    next_use: u64,
    bytes: usize,
}

struct Entry {
    answer: Arc<Answer>,
    used: u64,
    cost: usize,
}

impl Store {
    pub(super) fn new(bytes_max: usize, age_max: Duration, registry: &Registry) -> Self {
        Self {
            books: Mutex::default(),
            bytes_max,
            age_max,
            counters: Counters {
                bytes: registry.gauge(
                    "flowgate_kept_answers_bytes",
                    "memory that kept answers take",
                    &[],
                ),
                answers: registry.gauge("flowgate_kept_answers", "answers kept", &[]),
                evicted: registry.counter(
                    "flowgate_kept_answers_evicted_total",
                    "kept answers that made room for others under cache.max_bytes",
                    &[],
                ),
            },
        }
    }

    pub(crate) fn keeps(&self) -> bool {
        !self.age_max.is_zero()
    }

    /// The last answer to this, if `fits` says that it will do.
    pub(crate) fn find(
        &self,
        key: &[u8],
        fits: impl FnOnce(&Answer) -> bool,
    ) -> Option<Arc<Answer>> {
        if !self.keeps() {
            return None;
        }
        let mut books = self.lock();
        let answer = Arc::clone(&books.entries.get(key)?.answer);
        if !fits(&answer) {
            return None;
        }
        books.touch(key);
        Some(answer)
    }

    /// In the place of an older answer to the same.
    pub(super) fn keep(&self, key: &Arc<[u8]>, answer: &Arc<Answer>) {
        let cost = key.len() + answer.bytes.len() + OVERHEAD;
        if !self.keeps() || cost > self.bytes_max {
            return;
        }
        let mut books = self.lock();
        let newer = |entry: &Entry| entry.answer.asked > answer.asked;
        if books.entries.get(key).is_some_and(newer) {
            return;
        }
        books.remove(key);
        // What is too old for anybody goes as it comes up, two for each that is added.
        for _ in 0..2 {
            let oldest = books.least_used();
            let stale = |(_, entry): &(Arc<[u8]>, &Entry)| {
                answer.landed.saturating_duration_since(entry.answer.asked) > self.age_max
            };
            if let Some((key, _)) = oldest.filter(stale) {
                books.remove(&key);
            }
        }
        while books.bytes + cost > self.bytes_max {
            let Some((key, _)) = books.least_used() else {
                break;
            };
            books.remove(&key);
            self.counters.evicted.inc();
        }
        let used = books.next_use;
        books.next_use += 1;
        books.bytes += cost;
        books.uses.insert(used, Arc::clone(key));
        let answer = Arc::clone(answer);
        books
            .entries
            .insert(Arc::clone(key), Entry { answer, used, cost });
        self.counters.show(&books);
    }

    /// Forgets all.
    pub(crate) fn clear(&self) {
        let mut books = self.lock();
        *books = Books::default();
        self.counters.show(&books);
    }

    fn lock(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counters {
    fn show(&self, books: &Books) {
        let number = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.bytes.set(number(books.bytes));
        self.answers.set(number(books.entries.len()));
    }
}

impl Books {
    fn touch(&mut self, key: &[u8]) {
        let Some(entry) = self.entries.get_mut(key) else {
            return;
        };
        if let Some(key) = self.uses.remove(&entry.used) {
            entry.used = self.next_use;
            self.next_use += 1;
            self.uses.insert(entry.used, key);
        }
    }

    fn remove(&mut self, key: &[u8]) {
        if let Some(entry) = self.entries.remove(key) {
            self.uses.remove(&entry.used);
            self.bytes -= entry.cost;
        }
    }

    fn least_used(&self) -> Option<(Arc<[u8]>, &Entry)> {
        let (_, key) = self.uses.first_key_value()?;
        Some((Arc::clone(key), self.entries.get(key)?))
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn store(bytes: usize) -> Store {
        Store::new(bytes, SECOND, &Registry::new())
    }

    fn keep(store: &Store, key: &str, text: &str, asked: Instant) {
        let answer = Answer {
            bytes: text.as_bytes().into(),
            replica: None,
            asked,
            covers: asked,
            landed: asked,
            number: 0,
        };
        store.keep(&Arc::from(key.as_bytes()), &Arc::new(answer));
    }

    fn text(store: &Store, key: &str) -> Option<String> {
        let answer = store.find(key.as_bytes(), |_| true)?;
        Some(String::from_utf8(answer.bytes.to_vec()).unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn the_newest_answer_is_kept_until_others_need_its_room() {
        let (now, each) = (Instant::now(), OVERHEAD + 2);
        let store = store(3 * each + 1);
        for key in ["a", "b", "c"] {
            keep(&store, key, "1", now);
        }
        keep(&store, "a", "2", now + SECOND / 2);
        keep(&store, "a", "0", now);
        assert_eq!(
            text(&store, "a").as_deref(),
            Some("2"),
            "the later question's"
        );
        assert_eq!(text(&store, "b").as_deref(), Some("1"));
        // `c` has been used least recently.
        keep(&store, "d", "1", now);
        assert_eq!(text(&store, "c"), None);
        assert!(
            ["a", "b", "d"]
                .iter()
                .all(|key| text(&store, key).is_some())
        );
        assert_eq!(store.lock().bytes, 3 * each);
        assert_eq!(store.lock().uses.len(), 3);
        assert!(store.find(b"a", |_| false).is_none());
        // Larger than all there is.
        keep(&store, "e", &"x".repeat(4 * each), now);
        assert_eq!(text(&store, "e"), None);
        assert!(text(&store, "a").is_some());
        store.clear();
        assert_eq!(text(&store, "a"), None);
        assert_eq!(store.lock().bytes, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_nobody_may_be_told_any_more_makes_room() {
        let now = Instant::now();
        let store = store(1 << 20);
        for key in 0..10 {
            keep(&store, &key.to_string(), "1", now);
        }
        for key in 10..15 {
            keep(&store, &key.to_string(), "1", now + 2 * SECOND);
        }
        assert_eq!(store.lock().entries.len(), 5);
        assert_eq!(store.counters.evicted.get(), 0);
    }
}
