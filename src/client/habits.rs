//! Which code that is not in a statement's text is known to leave no settings behind. To ask a server for its settings takes
//! ten times as long as all else it is asked after such code; code that left none again and again is asked now and then
//! only. What it then sets is lost to its maker when the server changes hands, and never found by anybody else.
//! Called by `session/`.

use std::sync::atomic::{AtomicU16, Ordering};

const SLOTS: usize = 4096;
/// So often code is asked before it is believed, and then every so many times.
const ALWAYS: u16 = 16;
const EVERY: u16 = 64;

/// Times that code was asked in vain, by its number; what shares a slot is asked less.
pub(crate) struct Habits(Box<[AtomicU16]>);

impl Habits {
    pub(crate) fn new() -> Self {
        Self((0..SLOTS).map(|_| AtomicU16::new(0)).collect())
    }

    /// Whether to ask for settings this time.
    pub(crate) fn asks(&self, code: u32) -> bool {
        let times = self
            .slot(code)
            .map_or(0, |slot| slot.fetch_add(1, Ordering::Relaxed));
        times < ALWAYS || times.is_multiple_of(EVERY)
    }

    /// The code did set something.
    pub(crate) fn sets(&self, code: u32) {
        if let Some(slot) = self.slot(code) {
            slot.store(0, Ordering::Relaxed);
        }
    }

    fn slot(&self, code: u32) -> Option<&AtomicU16> {
        self.0.get(code as usize % SLOTS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_that_sets_nothing_is_asked_now_and_then() {
        let habits = Habits::new();
        let asked = |times: usize| (0..times).filter(|_| habits.asks(7)).count();
        assert_eq!(asked(16), 16);
        assert_eq!(asked(6_400 - 16), 99);
        habits.sets(7);
        assert_eq!(asked(16), 16);
        assert!(habits.asks(8));
    }
}
