//! One question for all who want to know the same. Whoever comes joins the question that has not been asked yet, never one under
//! way: its answer may be older than they are. Keeps no answer. Called by `events/sight` and the streams of `http`.
//!
//! INVARIANT: an entry is there while somebody asks or waits, so there are never more than those.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::OnceCell;

type Turn = Arc<tokio::sync::Mutex<()>>;

/// Of one thing: the question that is asked next, and the turn to ask it.
struct Voices<V> {
    turn: Turn,
    next: Arc<OnceCell<V>>,
    /// Those who ask or wait.
    present: usize,
}

pub(crate) struct Chorus<K: Eq + Hash + Clone, V>(Mutex<HashMap<K, Voices<V>>>);

impl<K: Eq + Hash + Clone, V> Default for Chorus<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash + Clone, V: Clone> Chorus<K, V> {
    /// The answer of a question that is asked after this was called. Dropping it half-way leaves the question to the others.
    pub(crate) async fn ask(&self, key: K, question: impl Future<Output = V>) -> V {
        let (turn, cell) = {
            let mut all = self.all();
            let voices = all.entry(key.clone()).or_insert_with(|| Voices {
                turn: Turn::default(),
                next: Arc::default(),
                present: 0,
            });
            voices.present += 1;
            (Arc::clone(&voices.turn), Arc::clone(&voices.next))
        };
        let _present = Present {
            all: self,
            key: &key,
        };
        let answer = cell.get_or_init(|| async {
            let _turn = turn.lock().await;
            // From here on it is being asked: who comes now joins the next.
            if let Some(voices) = self.all().get_mut(&key)
                && Arc::ptr_eq(&voices.next, &cell)
            {
                voices.next = Arc::default();
            }
            question.await
        });
        answer.await.clone()
    }

    /// Nothing in there panics half-way.
    fn all(&self) -> MutexGuard<'_, HashMap<K, Voices<V>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

struct Present<'a, K: Eq + Hash + Clone, V: Clone> {
    all: &'a Chorus<K, V>,
    key: &'a K,
}

impl<K: Eq + Hash + Clone, V: Clone> Drop for Present<'_, K, V> {
    fn drop(&mut self) {
        let mut all = self.all.all();
        let Some(voices) = all.get_mut(self.key) else {
            return;
        };
        voices.present -= 1;
        if voices.present == 0 {
            all.remove(self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tokio::sync::Semaphore;

    use super::*;

    /// As far as it gets now.
    async fn so_far<T>(future: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            answer = future => Some(answer),
            () = std::future::ready(()) => None,
        }
    }

    #[tokio::test]
    async fn all_who_come_before_it_is_asked_have_the_same_answer_and_the_next_another() {
        let chorus = Chorus::default();
        let (asked, gate) = (Cell::new(0), Semaphore::new(0));
        let question = || async {
            asked.set(asked.get() + 1);
            let number = asked.get();
            drop(gate.acquire().await);
            number
        };
        let mut first = Box::pin(chorus.ask("run", question()));
        assert_eq!(so_far(first.as_mut()).await, None);
        let mut late: Vec<_> = (0..3)
            .map(|_| Box::pin(chorus.ask("run", question())))
            .collect();
        for voice in &mut late {
            assert_eq!(so_far(voice.as_mut()).await, None);
        }
        let mut other = Box::pin(chorus.ask("another", question()));
        assert_eq!(so_far(other.as_mut()).await, None);
        assert_eq!(asked.get(), 2, "one a key at a time");
        // Who would have asked leaves: another does.
        drop(late.remove(0));
        gate.add_permits(1);
        assert_eq!((first.await, other.await), (1, 2));
        for voice in late {
            assert_eq!(voice.await, 3);
        }
        assert!(chorus.all().is_empty());
    }
}
