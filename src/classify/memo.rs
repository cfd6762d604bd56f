//! Analyses already made, by text: bounded by bytes, least lately used go first (second chance). Synchronous and
//! shared by all data-plane threads; a lock is held for a look-up or an insertion only, never over an analysis. Knows
//! nothing of SQL. Used by `classify/mod.rs`.

use foldhash::quality::FixedState;
use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasher;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

const SHARDS: usize = 8;
/// What an entry costs besides its text: map slot, queue slot, the analysis.
const OVERHEAD_BYTES: usize = 256;

pub(super) struct Memo<V> {
    shards: [Mutex<Shard<V>>; SHARDS],
    hasher: FixedState,
    bytes_max: usize,
    counters: Counters,
}

#[derive(Default)]
struct Counters {
    hits: AtomicU64,
    misses: AtomicU64,
    evictions: AtomicU64,
    too_large: AtomicU64,
}

/// What the memo has done so far, and holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemoStats {
    pub(crate) hits: u64,
    pub(crate) misses: u64,
    pub(crate) evictions: u64,
    /// Texts not kept because one alone would fill a good part of the memo.
    pub(crate) too_large: u64,
    pub(crate) entries: usize,
    pub(crate) bytes: usize,
}

struct Shard<V> {
    entries: HashMap<u64, Entry<V>, foldhash::fast::FixedState>,
    /// Keys in order of insertion; one that was used since goes to the back instead of out.
    clock: VecDeque<u64>,
    bytes: usize,
}

struct Entry<V> {
    text: Box<[u8]>,
    value: Arc<V>,
    used: bool,
}

impl<V> Memo<V> {
    /// `seed` should be random in production, so that nobody can choose texts that collide.
    pub(super) fn new(bytes_max: usize, seed: u64) -> Self {
        Self {
            shards: std::array::from_fn(|_| {
                Mutex::new(Shard {
                    entries: HashMap::default(),
                    clock: VecDeque::new(),
                    bytes: 0,
                })
            }),
            hasher: FixedState::with_seed(seed),
            bytes_max,
            counters: Counters::default(),
        }
    }

    pub(super) fn get_or_make(&self, text: &[u8], make: impl FnOnce() -> V) -> Arc<V> {
        let key = self.hasher.hash_one(text);
        if let Some(found) = self.shard(key).find(key, text) {
            self.counters.hits.fetch_add(1, Ordering::Relaxed);
            return found;
        }
        self.counters.misses.fetch_add(1, Ordering::Relaxed);
        let value = Arc::new(make());
        let bytes_max = self.bytes_max / SHARDS;
        if charge(text) > bytes_max / 4 {
            self.counters.too_large.fetch_add(1, Ordering::Relaxed);
            return value;
        }
        let evicted = self
            .shard(key)
            .insert(key, text, Arc::clone(&value), bytes_max);
        self.counters
            .evictions
            .fetch_add(evicted, Ordering::Relaxed);
        value
    }

    fn shard(&self, key: u64) -> MutexGuard<'_, Shard<V>> {
        // A panic inside the lock leaves at worst one entry too few or a key without an entry: both are tolerated.
        self.shards[key as usize % SHARDS]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn stats(&self) -> MemoStats {
        let (mut entries, mut bytes) = (0, 0);
        for shard in &self.shards {
            let shard = shard.lock().unwrap_or_else(PoisonError::into_inner);
            entries += shard.entries.len();
            bytes += shard.bytes;
        }
        MemoStats {
            hits: self.counters.hits.load(Ordering::Relaxed),
            misses: self.counters.misses.load(Ordering::Relaxed),
            evictions: self.counters.evictions.load(Ordering::Relaxed),
            too_large: self.counters.too_large.load(Ordering::Relaxed),
            entries,
            bytes,
        }
    }
}

fn charge(text: &[u8]) -> usize {
    text.len() + OVERHEAD_BYTES
}

impl<V> Shard<V> {
    fn find(&mut self, key: u64, text: &[u8]) -> Option<Arc<V>> {
        let entry = self
            .entries
            .get_mut(&key)
            .filter(|entry| *entry.text == *text)?;
        entry.used = true;
        Some(Arc::clone(&entry.value))
    }

    /// Returns how many had to go.
    fn insert(&mut self, key: u64, text: &[u8], value: Arc<V>, bytes_max: usize) -> u64 {
        let entry = Entry {
            text: text.into(),
            value,
            used: false,
        };
        self.bytes += charge(text);
        match self.entries.insert(key, entry) {
            // Another thread was quicker, or two texts share a hash: the later one stays.
            Some(old) => self.bytes -= charge(&old.text),
            None => self.clock.push_back(key),
        }
        let mut evicted = 0;
        while self.bytes > bytes_max {
            let Some(oldest) = self.clock.pop_front() else {
                break;
            };
            match self.entries.get_mut(&oldest) {
                Some(entry) if entry.used => {
                    entry.used = false;
                    self.clock.push_back(oldest);
                }
                Some(entry) => {
                    self.bytes -= charge(&entry.text);
                    self.entries.remove(&oldest);
                    evicted += 1;
                }
                None => {}
            }
        }
        evicted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEED: u64 = 7;

    #[test]
    fn a_text_is_made_once() {
        let memo = Memo::new(1 << 20, SEED);
        assert_eq!(*memo.get_or_make(b"a", || 1), 1);
        assert_eq!(*memo.get_or_make(b"a", || 2), 1);
        assert_eq!(*memo.get_or_make(b"b", || 3), 3);
        let stats = memo.stats();
        assert_eq!((stats.hits, stats.misses, stats.entries), (1, 2, 2));
    }

    #[test]
    fn bytes_stay_under_the_limit_whatever_comes() {
        let limit = 64 * 1024;
        let memo = Memo::new(limit, SEED);
        for n in 0..20_000_usize {
            let text = format!("{n}{}", "x".repeat(n % 900));
            memo.get_or_make(text.as_bytes(), || n);
            if n % 64 == 0 {
                assert!(memo.stats().bytes <= limit);
            }
        }
        let stats = memo.stats();
        assert!(stats.evictions > 10_000 && stats.entries > 10, "{stats:?}");
        for shard in &memo.shards {
            let shard = shard.lock().unwrap();
            assert_eq!(shard.clock.len(), shard.entries.len());
            assert_eq!(
                shard.bytes,
                shard
                    .entries
                    .values()
                    .map(|e| charge(&e.text))
                    .sum::<usize>()
            );
        }
    }

    #[test]
    fn what_is_used_outlives_what_is_not() {
        let memo = Memo::new(64 * 1024, SEED);
        memo.get_or_make(b"often", || 0);
        for n in 0..5_000_u32 {
            memo.get_or_make(n.to_string().as_bytes(), || n);
            assert_eq!(*memo.get_or_make(b"often", || 1), 0, "forgotten after {n}");
        }
    }

    #[test]
    fn a_text_too_large_is_not_kept() {
        let memo = Memo::new(64 * 1024, SEED);
        memo.get_or_make(&[b'x'; 60_000], || 1);
        assert_eq!((memo.stats().entries, memo.stats().too_large), (0, 1));
    }

    #[test]
    fn texts_of_one_hash_are_not_mixed_up() {
        let mut shard = Shard {
            entries: HashMap::default(),
            clock: VecDeque::new(),
            bytes: 0,
        };
        shard.insert(1, b"a", Arc::new('a'), 10_000);
        assert_eq!(shard.find(1, b"b"), None);
        shard.insert(1, b"b", Arc::new('b'), 10_000);
        assert_eq!(shard.find(1, b"b").as_deref(), Some(&'b'));
        assert_eq!(
            (shard.find(1, b"a"), shard.clock.len(), shard.bytes),
            (None, 1, charge(b"b"))
        );
    }
}
