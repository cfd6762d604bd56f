//! From a commit to its event, on one clock: when the answer of the statement that caused an event came back, and when the
//! event arrived. Written by `worker` and `mod`, read by `summary`.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use super::flow::STEPS;
use super::tree::Arrival;

/// When the last call that ended a task of each step was answered; under no step, when `start_flow` was.
#[derive(Debug, Default)]
pub(super) struct Answers(Mutex<HashMap<(Uuid, Option<usize>), Instant>>);

/// Of how many events, and their quantiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Quantiles {
    pub(super) count: usize,
    pub(super) p50: Duration,
    pub(super) p99: Duration,
}

impl Answers {
    pub(super) fn note(&self, run: Uuid, step: &str) {
        if let Some(step) = STEPS.iter().position(|known| *known == step) {
            self.note_cause(run, Some(step), Instant::now());
        }
    }

    pub(super) fn note_start(&self, run: Uuid) {
        self.note_cause(run, None, Instant::now());
    }

    /// The answers of a map's tasks may overtake each other by a little; the latest is taken for that of the last.
    fn note_cause(&self, run: Uuid, cause: Option<usize>, at: Instant) {
        let mut answers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let latest = answers.entry((run, cause)).or_insert(at);
        *latest = at.max(*latest);
    }

    /// An event that was here before the answer counts as zero.
    pub(super) fn quantiles(&self, arrivals: &[Arrival]) -> Option<Quantiles> {
        let answers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut took: Vec<Duration> = arrivals
            .iter()
            .filter_map(|arrival| {
                let cause = cause(arrival)?;
                let answered = answers.get(&(arrival.run, cause))?;
                Some(arrival.at.saturating_duration_since(*answered))
            })
            .collect();
        took.sort_unstable();
        let rank = |percent: usize| took.get((took.len() * percent).div_ceil(100).max(1) - 1);
        Some(Quantiles {
            count: took.len(),
            p50: *rank(50)?,
            p99: *rank(99)?,
        })
    }
}

/// Whose transaction made it: a step starts in that which ends the step before, and the run ends with the last.
fn cause(arrival: &Arrival) -> Option<Option<usize>> {
    match (arrival.kind.as_str(), arrival.step) {
        ("run:started", _) => Some(None),
        ("run:completed", _) => Some(STEPS.len().checked_sub(1)),
        ("step:started", Some(step)) => Some(step.checked_sub(1)),
        ("step:completed", Some(step)) => Some(Some(step)),
        _other => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_measured_from_the_answer_of_what_caused_it() {
        let (run, start) = (Uuid::from_u128(1), Instant::now());
        let at = |ms| start + Duration::from_millis(ms);
        let answers = Answers::default();
        answers.note_cause(run, None, at(10));
        answers.note_cause(run, Some(0), at(30));
        answers.note_cause(run, Some(0), at(20));
        let arrival = |kind: &str, step, ms| Arrival {
            run,
            kind: kind.to_owned(),
            step,
            at: at(ms),
        };
        let arrivals = [
            arrival("run:started", None, 11),
            arrival("step:started", Some(0), 5),
            arrival("step:completed", Some(0), 35),
            arrival("step:started", Some(1), 33),
            arrival("step:started", Some(2), 99),
        ];
        assert_eq!(
            answers.quantiles(&arrivals),
            Some(Quantiles {
                count: 4,
                p50: Duration::from_millis(1),
                p99: Duration::from_millis(5)
            })
        );
        assert_eq!(answers.quantiles(&[]), None);
    }
}
