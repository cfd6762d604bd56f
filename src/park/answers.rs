//! What Postgres said to a poll that found nothing, and how it described one, word for word, for the next who asks the same in
//! the same role and settings. Bounded by bytes; kept for a short while, so that what changes is noticed. Synchronous.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

/// An answer older than this is asked for again.
const KEPT_FOR: Duration = Duration::from_secs(120);
/// Whoever was the first to ask should have the answer by now.
const ASKED_FOR: Duration = Duration::from_secs(5);
/// What can't be parked is tried again then.
const NEVER_FOR: Duration = Duration::from_secs(10);
/// All keys and answers together.
const BYTES_MAX: usize = 8 * 1024 * 1024;
const ANSWER_MAX: usize = 16 * 1024;
/// An entry's own cost.
const OVERHEAD: usize = 128;

#[derive(Default)]
pub(super) struct Answers {
    known: HashMap<Box<[u8]>, Known>,
    bytes: usize,
}

enum Known {
    Asked(Instant),
    Kept {
        since: Instant,
        answer: Arc<[u8]>,
        /// It is old, and somebody is finding out whether it still holds.
        asked: Option<Instant>,
    },
    Never(Instant),
}

impl Known {
    fn cost(&self) -> usize {
        match self {
            Self::Asked(_) | Self::Never(_) => OVERHEAD,
            Self::Kept { answer, .. } => OVERHEAD + answer.len(),
        }
    }
}

/// What is known of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Look {
    /// Whoever asks now is the first, and is to find out.
    Unknown,
    /// Somebody is finding out.
    Asked,
    Kept(Arc<[u8]>),
    /// Not to be parked.
    Never,
}

impl Answers {
    pub(super) fn look_up(&mut self, key: &[u8], now: Instant) -> Look {
        let within = |at: &Instant, limit| now.saturating_duration_since(*at) < limit;
        match self.known.get_mut(key) {
            Some(Known::Asked(at)) if within(at, ASKED_FOR) => return Look::Asked,
            Some(Known::Never(at)) if within(at, NEVER_FOR) => return Look::Never,
            Some(Known::Kept {
                since,
                answer,
                asked,
            }) => {
                let being_asked = asked.is_some_and(|at| within(&at, ASKED_FOR));
                if within(since, KEPT_FOR) || being_asked {
                    return Look::Kept(Arc::clone(answer));
                }
                *asked = Some(now);
                return Look::Unknown;
            }
            Some(Known::Asked(_) | Known::Never(_)) | None => {}
        }
        self.put(key, Known::Asked(now));
        Look::Unknown
    }

    pub(super) fn keep(&mut self, key: &[u8], answer: &[u8], now: Instant) {
        if answer.len() > ANSWER_MAX {
            self.put(key, Known::Never(now));
        } else {
            let kept = Known::Kept {
                since: now,
                answer: answer.into(),
                asked: None,
            };
            self.put(key, kept);
        }
    }

    pub(super) fn never(&mut self, key: &[u8], now: Instant) {
        self.put(key, Known::Never(now));
    }

    pub(super) fn forget(&mut self, key: &[u8]) {
        if let Some((key, known)) = self.known.remove_entry(key) {
            self.bytes -= key.len() + known.cost();
        }
    }

    fn put(&mut self, key: &[u8], known: Known) {
        self.forget(key);
        let cost = key.len() + known.cost();
        if self.bytes + cost > BYTES_MAX {
            // Seldom, and all of them are cheap to ask for again.
            self.known.clear();
            self.bytes = 0;
        }
        self.bytes += cost;
        self.known.insert(key.into(), known);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_asks_and_the_others_have_its_answer_for_a_while() {
        let mut answers = Answers::default();
        let now = Instant::now();
        assert_eq!(answers.look_up(b"k", now), Look::Unknown);
        assert_eq!(answers.look_up(b"k", now), Look::Asked);
        assert_eq!(answers.look_up(b"k", now + ASKED_FOR), Look::Unknown);
        answers.keep(b"k", b"empty", now);
        let kept = Look::Kept(b"empty"[..].into());
        assert_eq!(answers.look_up(b"k", now), kept);
        let old = now + KEPT_FOR;
        assert_eq!(answers.look_up(b"k", old), Look::Unknown);
        assert_eq!(answers.look_up(b"k", old), kept, "till the other has asked");
        assert_eq!(answers.look_up(b"k", old + ASKED_FOR), Look::Unknown);
        answers.never(b"k", now);
        assert_eq!(answers.look_up(b"k", now), Look::Never);
        assert_eq!(answers.look_up(b"k", now + NEVER_FOR), Look::Unknown);
        answers.forget(b"k");
        assert_eq!((answers.bytes, answers.known.len()), (0, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn it_never_holds_more_than_it_may() {
        let mut answers = Answers::default();
        let now = Instant::now();
        for n in 0..2_000_u32 {
            answers.keep(&n.to_be_bytes(), &[0; ANSWER_MAX], now);
            assert!(answers.bytes <= BYTES_MAX);
        }
        answers.keep(b"large", &[0; ANSWER_MAX + 1], now);
        assert_eq!(answers.look_up(b"large", now), Look::Never);
    }
}
