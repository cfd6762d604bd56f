//! Where a request goes. Pure: what the statement is, how the session stands and what the operator allows, in; a `Plan`,
//! out. Never looks at upstreams' health, lag or load: a `Plan::Read` says a replica *may* answer, and who carries it out
//! picks a fresh enough one or the primary. Called by `client/session`.

use crate::classify::{Analysis, Effect, RunRef, StatementClass};
use crate::config::{Consistency, Reads};
use crate::pgflow::events::{Channel, has_bad_cursor, truncate_identifier};

/// How the session stands when the request arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum SessionView {
    /// Between transactions, on no server of its own.
    Free,
    /// Inside a transaction, sound or failed, or in the middle of an extended request.
    Transaction,
    /// Between transactions, but tied to one server for what only that holds.
    Pinned,
}

/// The operator's part of the decision (`[route]`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RouteSettings {
    pub(crate) reads: Reads,
    pub(crate) consistency: Consistency,
    /// `poll.park`
    pub(crate) park: bool,
}

/// Where a request goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Plan {
    /// To the server this session holds.
    Held,
    /// Nowhere: the hub takes it. The text is exactly one LISTEN or UNLISTEN, outside a transaction.
    Subscribe(Subscription),
    /// To a replica that has what this session, and these runs, must see; else to the primary.
    Read(RunRef),
    /// Nowhere yet: a poll that waits here until there is something for it to read.
    Park,
    /// To the primary, on a server of the pool.
    Primary,
    /// Nowhere: an EXPLAIN (FLOWGATE) of what begins there in its text.
    Explain(usize),
}

/// One change of what a session listens to. Names as in SQL, unquoted and folded; `pgflow::events` reads them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Subscription {
    Listen(String),
    Unlisten(String),
    UnlistenAll,
}

pub(crate) fn plan(analysis: &Analysis, session: SessionView, settings: RouteSettings) -> Plan {
    if let Some(at) = analysis.explains {
        return Plan::Explain(at);
    }
    match session {
        SessionView::Transaction => Plan::Held,
        SessionView::Pinned => subscription(analysis).map_or(Plan::Held, Plan::Subscribe),
        SessionView::Free => match subscription(analysis) {
            Some(subscription) => Plan::Subscribe(subscription),
            None if settings.park && is_poll(analysis) => Plan::Park,
            None => read(analysis, settings).map_or(Plan::Primary, Plan::Read),
        },
    }
}

fn subscription(analysis: &Analysis) -> Option<Subscription> {
    let ([effect], 1) = (analysis.effects.as_slice(), analysis.statements) else {
        return None;
    };
    match effect {
        // What Postgres has to say of an empty or an overlong name, it says itself.
        Effect::Listen(channel) if fits(channel) => Some(Subscription::Listen(channel.clone())),
        Effect::Unlisten(channel) if fits(channel) => Some(Subscription::Unlisten(channel.clone())),
        Effect::UnlistenAll => Some(Subscription::UnlistenAll),
        _ => None,
    }
}

fn fits(channel: &str) -> bool {
    let plain = !channel.is_empty() && truncate_identifier(channel) == channel;
    plain || has_bad_cursor(channel) || !matches!(Channel::parse(channel), Channel::Ordinary(_))
}

fn is_poll(analysis: &Analysis) -> bool {
    matches!(&analysis.class, StatementClass::Poll(poll) if poll.patience.is_some())
}

fn read(analysis: &Analysis, settings: RouteSettings) -> Option<RunRef> {
    let kept = settings.reads == Reads::Off || settings.consistency == Consistency::Primary;
    if kept || analysis.refused.is_known() {
        return None;
    }
    match analysis.class {
        StatementClass::Read(run) => Some(run),
        StatementClass::Poll(_)
        | StatementClass::Progress(_)
        | StatementClass::Start(_)
        | StatementClass::Define
        | StatementClass::Other => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::classify::Classifier;

    const SETTINGS: RouteSettings = RouteSettings {
        reads: Reads::Pgflow,
        consistency: Consistency::Session,
        park: true,
    };
    const READ: &str = "select pgflow.get_run_with_states($1)";

    #[track_caller]
    fn check_with(text: &str, session: SessionView, settings: RouteSettings, expected: &str) {
        let analysis = Classifier::new(settings.reads, 1 << 20, 1).analyse(text.as_bytes());
        assert_eq!(
            format!("{:?}", plan(&analysis, session, settings)),
            expected,
            "{text}"
        );
    }

    #[track_caller]
    fn check(text: &str, expected: &str) {
        check_with(text, SessionView::Free, SETTINGS, expected);
    }

    #[test]
    fn reads_may_leave_the_primary_and_nothing_else_does() {
        check(READ, "Read(Param(1))");
        check("select * from pgflow.flows", "Read(None)");
        check("select 1", "Primary");
        check("begin; select 1", "Primary");
        check("", "Primary");
        check("begin", "Primary");
        check("select pgflow.start_flow('a', '{}')", "Primary");
        check("select * from pgflow.poll_for_tasks($1, 2, 3)", "Primary");
        check(&format!("{READ}; {READ}"), "Primary");
        check(&format!("set work_mem = '1MB'; {READ}"), "Primary");
        check(&format!("explain (flowgate) {READ}"), "Explain(18)");
    }

    #[test]
    fn what_a_replica_refused_is_not_sent_to_one_again() {
        let analysis = Classifier::new(Reads::Pgflow, 1 << 20, 1).analyse(READ.as_bytes());
        let ask = || plan(&analysis, SessionView::Free, SETTINGS);
        assert_eq!(ask(), Plan::Read(RunRef::Param(1)));
        analysis.refused.note();
        assert_eq!(ask(), Plan::Primary);
    }

    #[test]
    fn a_poll_outside_a_transaction_waits_here() {
        let poll = "select * from pgflow.read_with_poll($1, 2, 3)";
        check(poll, "Park");
        check_with(poll, SessionView::Transaction, SETTINGS, "Held");
        check_with(poll, SessionView::Pinned, SETTINGS, "Held");
        let settings = RouteSettings {
            park: false,
            ..SETTINGS
        };
        check_with(poll, SessionView::Free, settings, "Primary");
        check(
            "select * from pgflow.read_with_poll($1, 2, 3, conditional => '{}')",
            "Primary",
        );
    }

    #[test]
    fn one_listen_outside_a_transaction_is_ours() {
        check("listen jobs", "Subscribe(Listen(\"jobs\"))");
        check(
            " LISTEN \"pgflow:run:X\" ;",
            "Subscribe(Listen(\"pgflow:run:X\"))",
        );
        check("/* c */ unlisten JOBS", "Subscribe(Unlisten(\"jobs\"))");
        check("unlisten *", "Subscribe(UnlistenAll)");
        check("listen a; listen b", "Primary");
        check("listen a; select 1", "Primary");
        check("begin; listen a; commit", "Primary");
        check_with("listen a", SessionView::Transaction, SETTINGS, "Held");
        check_with(
            "listen a",
            SessionView::Pinned,
            SETTINGS,
            "Subscribe(Listen(\"a\"))",
        );
    }

    #[test]
    fn a_session_that_holds_a_server_stays_there() {
        for session in [SessionView::Transaction, SessionView::Pinned] {
            check_with(READ, session, SETTINGS, "Held");
            check_with("select 1", session, SETTINGS, "Held");
        }
    }

    #[test]
    fn the_operator_may_keep_all_reads_on_the_primary() {
        check_with(
            READ,
            SessionView::Free,
            RouteSettings {
                reads: Reads::Off,
                ..SETTINGS
            },
            "Primary",
        );
        let primary = RouteSettings {
            consistency: Consistency::Primary,
            ..SETTINGS
        };
        check_with(READ, SessionView::Free, primary, "Primary");
        let all = RouteSettings {
            reads: Reads::All,
            ..SETTINGS
        };
        check_with(
            "select name from users",
            SessionView::Free,
            all,
            "Read(All)",
        );
    }
}
