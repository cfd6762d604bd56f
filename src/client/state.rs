//! What a client's session has come to hold: settings, and reasons to stay on one server. Follows transactions: a SET
//! counts when it commits. Pure; fed by `session/` with what each request did and how it ended.

use std::sync::Arc;

use crate::classify::{Effect, together};
use crate::server::parameters::Reported;
use crate::server::settings::Settings;
use crate::wire::messages::TxStatus;
use crate::wire::quote;

/// Why only one server will do for a client from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum PinReason {
    SessionMode,
    TempObject,
    AdvisoryLock,
    HoldCursor,
    SqlPrepare,
    Load,
    SetConfig,
    Sequence,
    Unfollowed,
    FunctionBody,
}

pub(crate) const PIN_REASONS: [(PinReason, &str); 10] = [
    (PinReason::SessionMode, "session_mode"),
    (PinReason::TempObject, "temp_object"),
    (PinReason::AdvisoryLock, "advisory_lock"),
    (PinReason::HoldCursor, "hold_cursor"),
    (PinReason::SqlPrepare, "sql_prepare"),
    (PinReason::Load, "load"),
    (PinReason::SetConfig, "set_config"),
    (PinReason::Sequence, "sequence"),
    (PinReason::Unfollowed, "unfollowed"),
    (PinReason::FunctionBody, "function_body"),
];

/// A set of reasons.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pins(u16);

impl Pins {
    fn bit(reason: PinReason) -> u16 {
        1 << reason as u8
    }

    /// For where only a number can be kept.
    pub(crate) fn bits(self) -> u16 {
        self.0
    }

    pub(crate) fn of_bits(bits: u16) -> Self {
        Self(bits)
    }

    pub(crate) fn contains(self, reason: PinReason) -> bool {
        self.0 & Self::bit(reason) != 0
    }

    pub(crate) fn insert(&mut self, reason: PinReason) {
        self.0 |= Self::bit(reason);
    }

    fn only(self, reason: PinReason) -> Self {
        Self(self.0 & Self::bit(reason))
    }

    fn remove(&mut self, reason: PinReason) {
        self.0 &= !Self::bit(reason);
    }

    pub(crate) fn is_empty(self) -> bool {
        self.0 == 0
    }

    pub(crate) fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

/// How a request ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ending {
    pub(crate) failed: bool,
    /// The last command was a rollback, asked for or forced.
    pub(crate) rolled_back: bool,
    /// The last command was COMMIT AND CHAIN: committed, and in a transaction again.
    pub(crate) chained: bool,
    pub(crate) before: TxStatus,
    pub(crate) after: TxStatus,
}

/// What the session must do about its server, the hub and its prepared statements.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Consequences {
    /// Settings were reset to the session's start values: the server's own name for the application is back.
    pub(crate) reset: bool,
    pub(crate) settings_changed: bool,
    pub(crate) deallocated_all: bool,
    pub(crate) discarded_all: bool,
}

/// The session's own state.
pub(crate) struct State {
    pub(crate) settings: Arc<Settings>,
    start: Arc<Settings>,
    pub(crate) pins: Pins,
    /// Effects of the open transaction that count when it commits.
    uncommitted: Vec<Effect>,
    /// The transaction under way has run code that is not in its text.
    opaque: Option<u32>,
    /// Some has been run since the session began or was discarded: its server may have settings that are not in `settings`.
    pub(crate) hides: bool,
}

impl State {
    pub(crate) fn new(start: Arc<Settings>, session_mode: bool) -> Self {
        let mut pins = Pins::default();
        if session_mode {
            pins.insert(PinReason::SessionMode);
        }
        Self {
            settings: Arc::clone(&start),
            start,
            pins,
            uncommitted: Vec::new(),
            opaque: None,
            hides: false,
        }
    }

    /// Whether what ran so far may have left something on the server that its text does not tell; of a client that is tied to
    /// its server nobody need know before it is let go.
    pub(crate) fn take_opaque(&mut self) -> Option<u32> {
        if self.pins.is_empty() {
            self.opaque.take()
        } else {
            None
        }
    }

    /// Code has run that is not in its text, and nobody has asked what it left.
    pub(crate) fn ran_opaque(&self) -> bool {
        self.opaque.is_some()
    }

    /// Takes in what a request did. Call `forget_transaction` once the consequences have been seen to.
    pub(crate) fn request_ended(
        &mut self,
        effects: &[Effect],
        statements: usize,
        ending: Ending,
    ) -> Consequences {
        let mut consequences = Consequences::default();
        // Several statements, one of which failed, or which begin and end transactions among themselves: what of them holds
        // cannot be told from how the request ended.
        let several = statements > 1 || effects.len() > 1;
        let mixed = several && effects.contains(&Effect::Transaction);
        let traces = effects.iter().chain(&self.uncommitted).any(leaves_a_trace);
        if (ending.failed && several || mixed) && traces {
            self.pins.insert(PinReason::Unfollowed);
        }
        if ending.failed
            && effects
                .iter()
                .any(|e| matches!(e, Effect::DeallocateAll | Effect::DiscardAll))
        {
            consequences.deallocated_all = true;
        }
        for effect in effects {
            // These outlive a rollback, and a failure in the same statement.
            match effect {
                Effect::AdvisorySession => self.pins.insert(PinReason::AdvisoryLock),
                Effect::Load => self.pins.insert(PinReason::Load),
                Effect::SequenceValue => self.pins.insert(PinReason::Sequence),
                Effect::Unfollowed => self.pins.insert(PinReason::Unfollowed),
                Effect::Opaque(code) => {
                    let before = self.opaque.unwrap_or(*code);
                    self.opaque = Some(together(before, *code));
                }
                _ if ending.failed => {}
                Effect::AdvisoryUnlockAll => self.pins.remove(PinReason::AdvisoryLock),
                Effect::TempObject => self.pins.insert(PinReason::TempObject),
                Effect::DeclareHold => self.pins.insert(PinReason::HoldCursor),
                Effect::Prepare(_) => self.pins.insert(PinReason::SqlPrepare),
                Effect::SetConfig => self.pins.insert(PinReason::SetConfig),
                Effect::DeallocateAll => {
                    self.pins.remove(PinReason::SqlPrepare);
                    consequences.deallocated_all = true;
                }
                Effect::DiscardAll => {
                    self.pins = self.pins.only(PinReason::SessionMode);
                    self.hides = false;
                    consequences.discarded_all = true;
                    self.uncommitted.push(effect.clone());
                }
                Effect::Set { .. } | Effect::Reset(_) | Effect::ResetAll => {
                    self.uncommitted.push(effect.clone())
                }
                Effect::Transaction if ending.rolled_back && ending.after != TxStatus::Idle => {
                    // ROLLBACK TO a savepoint: which SETs it undid is the server's knowledge alone.
                    if self.uncommitted.iter().any(leaves_a_trace) {
                        self.pins.insert(PinReason::Unfollowed);
                    }
                }
                Effect::Listen(_)
                | Effect::Unlisten(_)
                | Effect::UnlistenAll
                | Effect::Notify
                | Effect::SetLocal
                | Effect::DiscardOther
                | Effect::Execute(_)
                | Effect::Deallocate(_)
                | Effect::Copy
                | Effect::ListeningChannels
                | Effect::PreparedStatements
                | Effect::NeedsDatabaseAlone(_)
                | Effect::Transaction => {}
            }
        }
        if ending.after == TxStatus::Idle {
            // A transaction that ends in an error is rolled back; so is one whose last word is ROLLBACK.
            let lost = ending.failed || ending.rolled_back && ending.before != TxStatus::Idle;
            if !lost {
                self.commit(&mut consequences);
            }
        } else if ending.chained {
            self.commit(&mut consequences);
            self.uncommitted.clear();
        }
        consequences
    }

    /// Settings that Postgres reports are kept as it reports them: what a client says may only be half of the value (a
    /// DateStyle is set by halves), or mean something else where it is said again.
    pub(crate) fn adopt_reported(&mut self, reported: &Reported) {
        for (setting, name) in [
            ("datestyle", "DateStyle"),
            ("timezone", "TimeZone"),
            ("intervalstyle", "IntervalStyle"),
        ] {
            if let Some(value) = reported.find(name).filter(|_| self.settings.has(setting)) {
                let sql = format!("SET {setting} TO {}", quote::literal(value));
                Arc::make_mut(&mut self.settings).set(setting, &sql);
            }
        }
    }

    /// The transaction is over and its consequences are seen to.
    pub(crate) fn forget_transaction(&mut self) {
        self.uncommitted.clear();
    }

    fn commit(&mut self, consequences: &mut Consequences) {
        for effect in &self.uncommitted {
            match effect {
                Effect::Set { name, sql } => Arc::make_mut(&mut self.settings).set(name, sql),
                Effect::Reset(name) if name == "application_name" => {
                    self.settings = Arc::new(self.settings.renamed_as(&self.start));
                    consequences.reset = true;
                }
                Effect::Reset(name) => Arc::make_mut(&mut self.settings).unset(name),
                Effect::ResetAll => {
                    Arc::make_mut(&mut self.settings).unset_all();
                    self.settings = Arc::new(self.settings.renamed_as(&self.start));
                    consequences.reset = true;
                }
                Effect::DiscardAll => {
                    self.settings = Arc::clone(&self.start);
                    consequences.reset = true;
                }
                _ => continue,
            }
            consequences.settings_changed = true;
        }
    }
}

fn leaves_a_trace(effect: &Effect) -> bool {
    matches!(
        effect,
        Effect::Set { .. }
            | Effect::Reset(_)
            | Effect::ResetAll
            | Effect::DiscardAll
            | Effect::DiscardOther
            | Effect::SetConfig
            | Effect::TempObject
            | Effect::DeclareHold
            | Effect::Prepare(_)
            | Effect::Deallocate(_)
            | Effect::DeallocateAll
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(name: &str, value: &str) -> Effect {
        Effect::Set {
            name: name.into(),
            sql: format!("SET {name} TO {value}"),
        }
    }

    fn ending(failed: bool, rolled_back: bool, before: TxStatus, after: TxStatus) -> Ending {
        Ending {
            failed,
            rolled_back,
            chained: false,
            before,
            after,
        }
    }

    fn script(state: &State) -> String {
        Settings::named("app").script_to(&state.settings)
    }

    #[test]
    fn a_set_counts_at_once_outside_a_transaction_and_at_commit_inside() {
        use TxStatus::{Idle, InTransaction};
        let mut state = State::new(Arc::new(Settings::named("app")), false);
        let consequences =
            state.request_ended(&[set("a", "1")], 1, ending(false, false, Idle, Idle));
        assert!(consequences.settings_changed);
        assert_eq!(script(&state), "SET a TO 1;");
        state.forget_transaction();
        state.request_ended(
            &[set("a", "2")],
            1,
            ending(false, false, InTransaction, InTransaction),
        );
        assert_eq!(script(&state), "SET a TO 1;");
        state.request_ended(
            &[Effect::Transaction],
            1,
            ending(false, false, InTransaction, Idle),
        );
        assert_eq!(script(&state), "SET a TO 2;");
    }

    #[test]
    fn a_rolled_back_set_never_was() {
        use TxStatus::{Failed, Idle, InTransaction};
        let mut state = State::new(Arc::new(Settings::named("app")), false);
        state.request_ended(
            &[set("a", "2")],
            1,
            ending(false, false, InTransaction, InTransaction),
        );
        state.request_ended(&[Effect::Transaction], 1, ending(false, true, Failed, Idle));
        state.forget_transaction();
        assert_eq!(script(&state), "");
        state.request_ended(&[set("a", "nonsense")], 1, ending(true, false, Idle, Idle));
        state.forget_transaction();
        assert_eq!(script(&state), "");
        assert!(state.pins.is_empty());
    }

    #[test]
    fn what_cannot_be_followed_pins() {
        use TxStatus::{Idle, InTransaction};
        let mut state = State::new(Arc::new(Settings::named("app")), false);
        state.request_ended(
            &[set("a", "1"), set("b", "1")],
            3,
            ending(true, false, Idle, Idle),
        );
        assert!(state.pins.contains(PinReason::Unfollowed));
        let mut state = State::new(Arc::new(Settings::named("app")), false);
        state.request_ended(
            &[set("a", "1")],
            1,
            ending(false, false, InTransaction, InTransaction),
        );
        state.request_ended(
            &[Effect::Transaction],
            1,
            ending(false, true, InTransaction, InTransaction),
        );
        assert!(state.pins.contains(PinReason::Unfollowed));
    }

    #[test]
    fn discard_all_releases_and_session_mode_does_not_end() {
        use TxStatus::Idle;
        let mut state = State::new(Arc::new(Settings::named("app")), true);
        state.request_ended(
            &[Effect::AdvisorySession, set("a", "1")],
            1,
            ending(false, false, Idle, Idle),
        );
        state.forget_transaction();
        let consequences =
            state.request_ended(&[Effect::DiscardAll], 1, ending(false, false, Idle, Idle));
        assert!(consequences.discarded_all && consequences.reset);
        assert_eq!(script(&state), "");
        assert!(
            state.pins.contains(PinReason::SessionMode)
                && !state.pins.contains(PinReason::AdvisoryLock)
        );
    }

    #[test]
    fn an_advisory_lock_outlives_the_error_that_followed_it() {
        let mut state = State::new(Arc::new(Settings::named("app")), false);
        state.request_ended(
            &[Effect::AdvisorySession],
            1,
            ending(true, false, TxStatus::Idle, TxStatus::Idle),
        );
        assert!(state.pins.contains(PinReason::AdvisoryLock));
    }
}
