//! Channels and payloads of run events: what a client may LISTEN to, and the text it gets. Never decides who may see
//! what, never touches a socket. Used by `events`, `http` and `route`'s callers.

use super::ids::{Slug, run_id};
use super::snapshot::Cursor;
use serde_json::value::RawValue;
use std::borrow::Cow;
use uuid::Uuid;

/// The one Postgres channel that says "the outbox has something new"; its payload is constant, events never ride in it.
pub const WAKE_CHANNEL: &str = "flowgate_wake";
/// The setting of a session whose commits a Flowgate sees itself: the id of its reader, which need not be notified of them.
pub const WAKE_SETTING: &str = "flowgate.wake";
/// Every event of every run.
pub const ALL_CHANNEL: &str = "pgflow_events";
/// Events of one run; pgflow's own topic, so the same word names the outbox topic.
pub const RUN_PREFIX: &str = "pgflow:run:";
/// Events of all runs of one flow.
pub const FLOW_PREFIX: &str = "pgflow:flow:";

/// Postgres cuts identifiers, and so LISTEN's channel, to NAMEDATALEN - 1 bytes.
const IDENTIFIER_BYTES_MAX: usize = 63;

/// What a channel name after LISTEN means here.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Channel {
    /// One run, from the event after `after` on where the name ends in `@<seq>`.
    Run { id: Uuid, after: Option<i64> },
    /// All runs of one flow, from where the cursor behind its `@` has got to.
    Flow { slug: Slug, from: Option<Cursor> },
    /// All runs, likewise.
    All { from: Option<Cursor> },
    /// A channel of Postgres itself. Also what looks like ours but names no run or flow.
    Ordinary(String),
}

impl Channel {
    /// `name` as LISTEN sees it: unquoted, and folded if it came without quotes.
    pub fn parse(name: &str) -> Self {
        let ours = if let Some(rest) = name.strip_prefix(RUN_PREFIX) {
            parse_run(rest)
        } else if let Some(rest) = name.strip_prefix(FLOW_PREFIX) {
            parse_from(rest).and_then(|(slug, from)| {
                let slug = Slug::parse(slug)?;
                Some(Self::Flow { slug, from })
            })
        } else if name.starts_with(ALL_CHANNEL) {
            let all = parse_from(name).filter(|(name, _)| *name == ALL_CHANNEL);
            all.map(|(_, from)| Self::All { from })
        } else {
            None
        };
        ours.unwrap_or_else(|| Self::Ordinary(truncate_identifier(name).to_owned()))
    }

    /// The channel as a notification names it: without the `@…` it may have been asked for with.
    pub fn name(&self) -> String {
        match self {
            Self::Run { id, after: _ } => run_topic(*id),
            Self::Flow { slug, from: _ } => format!("{FLOW_PREFIX}{slug}"),
            Self::All { from: _ } => ALL_CHANNEL.to_owned(),
            Self::Ordinary(name) => name.clone(),
        }
    }
}

/// Whether `name` would be a channel of ours but for what follows its `@`. As an ordinary channel it would never say anything.
pub fn has_bad_cursor(name: &str) -> bool {
    let of_ours = |name| !matches!(Channel::parse(name), Channel::Ordinary(_));
    !of_ours(name)
        && name
            .split_once('@')
            .is_some_and(|(channel, _)| of_ours(channel))
}

/// Whether it is one that tells of runs.
pub fn tells_of_runs(name: &str) -> bool {
    !matches!(Channel::parse(name), Channel::Ordinary(_))
}

/// Whether it is one of those, and where to begin.
pub fn names_cursor(name: &str) -> bool {
    tells_of_runs(name) && name.contains('@')
}

/// What is before it.
pub fn without_cursor(name: &str) -> &str {
    name.split_once('@').map_or(name, |(channel, _)| channel)
}

fn parse_run(rest: &str) -> Option<Channel> {
    let (id, after) = match rest.split_once('@') {
        Some((id, seq)) => {
            let plain = !seq.is_empty() && seq.bytes().all(|byte| byte.is_ascii_digit());
            (id, Some(seq.parse().ok().filter(|_| plain)?))
        }
        None => (rest, None),
    };
    let id = run_id(id).filter(|_| id.len() == 36)?;
    Some(Channel::Run { id, after })
}

/// What is before the `@`, and the cursor behind it.
fn parse_from(text: &str) -> Option<(&str, Option<Cursor>)> {
    match text.split_once('@') {
        Some((name, cursor)) => Some((name, Some(Cursor::parse(cursor)?))),
        None => Some((text, None)),
    }
}

/// The outbox topic of a run, as pgflow gives it to `realtime.send`.
pub fn run_topic(id: Uuid) -> String {
    format!("{RUN_PREFIX}{id}")
}

/// The run a topic belongs to.
pub fn run_of_topic(topic: &str) -> Option<Uuid> {
    topic.strip_prefix(RUN_PREFIX).and_then(run_id)
}

/// What LISTEN makes of a long name: the first 63 bytes, never half a character.
pub fn truncate_identifier(name: &str) -> &str {
    let mut end = name.len().min(IDENTIFIER_BYTES_MAX);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    &name[..end]
}

/// The text a listener gets: pgflow's own object with `seq` (if the topic counts) and `cursor` added at its end. The
/// payload is not re-encoded: key order, spacing and number spellings stay what Postgres printed.
///
/// A payload that is no object is left as it is under `payload`.
pub fn envelope(payload: &RawValue, seq: Option<i64>, cursor: i64) -> String {
    let text = payload.get().trim_matches([' ', '\t', '\n', '\r']);
    let body: Cow<'_, str> = match text
        .strip_prefix('{')
        .and_then(|rest| rest.strip_suffix('}'))
    {
        Some(body) => Cow::Borrowed(body.trim_end()),
        None => Cow::Owned(format!("\"payload\": {text}")),
    };
    let comma = if body.trim().is_empty() { "" } else { ", " };
    match seq {
        Some(seq) => format!("{{{body}{comma}\"seq\": {seq}, \"cursor\": \"{cursor}\"}}"),
        None => format!("{{{body}{comma}\"cursor\": \"{cursor}\"}}"),
    }
}

/// An envelope as listeners to many runs get it: they resume by a `cursor` that says more than the event's id.
pub fn with_cursor(envelope: &str, id: i64, cursor: &Cursor) -> String {
    let rest = envelope.strip_suffix(&format!("{id}\"}}"));
    format!("{}{cursor}\"}}", rest.unwrap_or(envelope))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "67e55044-10b1-426f-9247-bb680e5fe0c8";

    #[track_caller]
    fn check(name: &str, expected: &str) {
        let got = match Channel::parse(name) {
            Channel::Run { id, after } => format!("run {id} {after:?}"),
            Channel::Flow { slug, from: None } => format!("flow {slug}"),
            Channel::Flow {
                slug,
                from: Some(from),
            } => format!("flow {slug} from {from}"),
            Channel::All { from: None } => "all".into(),
            Channel::All { from: Some(from) } => format!("all from {from}"),
            Channel::Ordinary(name) => format!("ordinary {name}"),
        };
        assert_eq!(got, expected, "{name}");
    }

    #[test]
    fn channels_of_runs_and_flows_are_told_from_ordinary_ones() {
        check(&format!("pgflow:run:{ID}"), &format!("run {ID} None"));
        check(
            &format!("pgflow:run:{}", ID.to_uppercase()),
            &format!("run {ID} None"),
        );
        check(&format!("pgflow:run:{ID}@0"), &format!("run {ID} Some(0)"));
        check(
            &format!("pgflow:run:{ID}@17"),
            &format!("run {ID} Some(17)"),
        );
        check("pgflow:flow:greet", "flow greet");
        check("pgflow_events", "all");
        check(
            "pgflow_events@7-10:20:10,14-22:22:",
            "all from 7-10:20:10,14-22:22:",
        );
        check(
            "pgflow:flow:greet@7-9:9:-9:9:",
            "flow greet from 7-9:9:-9:9:",
        );
        check("pgflow_events_too", "ordinary pgflow_events_too");
        check("jobs", "ordinary jobs");
        check("pgflow:run:", "ordinary pgflow:run:");
        check("pgflow:run:nonsense", "ordinary pgflow:run:nonsense");
        check(
            &format!("pgflow:run:{ID}@"),
            &format!("ordinary pgflow:run:{ID}@"),
        );
        check(
            &format!("pgflow:run:{ID}@-1"),
            &format!("ordinary pgflow:run:{ID}@-1"),
        );
        check(
            &format!("pgflow:run:{ID}@+1"),
            &format!("ordinary pgflow:run:{ID}@+1"),
        );
        check("pgflow:flow:not-a-slug", "ordinary pgflow:flow:not-a-slug");
        check("PGFLOW_EVENTS", "ordinary PGFLOW_EVENTS");
    }

    #[test]
    fn a_cursor_that_is_none_is_found_out() {
        for bad in ["@", "@-1", "@x", "@1@2", "@99999999999999999999"] {
            assert!(has_bad_cursor(&format!("pgflow:run:{ID}{bad}")), "{bad}");
        }
        for bad in [
            "@",
            "@1",
            "@1-2",
            "@1-9:9:-9:9:@",
            "@1-9:9:-9:9:x",
            "@-1-9:9:-9:9:",
        ] {
            assert!(has_bad_cursor(&format!("pgflow_events{bad}")), "{bad}");
            assert!(has_bad_cursor(&format!("pgflow:flow:f{bad}")), "{bad}");
        }
        for good in [
            "a@b",
            "pgflow:run:x@1",
            "@",
            "pgflow_events",
            "pgflow_events@1-9:9:-9:9:",
        ] {
            assert!(!has_bad_cursor(good), "{good}");
        }
        assert!(!has_bad_cursor(&format!("pgflow:run:{ID}@17")));
    }

    #[test]
    fn a_long_ordinary_name_is_cut_as_postgres_cuts_it() {
        check(&"x".repeat(70), &format!("ordinary {}", "x".repeat(63)));
        check(
            &format!("{}é", "x".repeat(62)),
            &format!("ordinary {}", "x".repeat(62)),
        );
        let long = "f".repeat(100);
        check(&format!("pgflow:flow:{long}"), &format!("flow {long}"));
    }

    #[test]
    fn a_channel_is_named_without_its_position() {
        assert_eq!(
            Channel::parse(&format!("pgflow:run:{ID}@3")).name(),
            format!("pgflow:run:{ID}")
        );
        assert_eq!(
            run_of_topic(&format!("pgflow:run:{ID}")).map(run_topic),
            Some(format!("pgflow:run:{ID}"))
        );
        assert_eq!(run_of_topic("other"), None);
    }

    #[test]
    fn a_listener_to_many_runs_gets_the_whole_cursor() {
        let cursor = Cursor::parse("7-9:9:-9:12:").expect("a cursor");
        assert_eq!(
            with_cursor(r#"{"n": "7\"}", "seq": 3, "cursor": "7"}"#, 7, &cursor),
            r#"{"n": "7\"}", "seq": 3, "cursor": "7-9:9:-12:12:"}"#
        );
    }

    #[track_caller]
    fn spliced(payload: &str, seq: Option<i64>) -> String {
        let raw: Box<RawValue> = serde_json::from_str(payload).unwrap();
        let text = envelope(&raw, seq, 9_007_199_254_740_993);
        serde_json::from_str::<serde_json::Value>(&text).unwrap();
        text
    }

    #[test]
    fn an_envelope_keeps_the_payload_byte_for_byte() {
        assert_eq!(
            spliced(r#"{"n": 1.00, "a":"}",  "run_id": "x"}"#, Some(3)),
            r#"{"n": 1.00, "a":"}",  "run_id": "x", "seq": 3, "cursor": "9007199254740993"}"#
        );
        assert_eq!(spliced("{}", None), r#"{"cursor": "9007199254740993"}"#);
        assert_eq!(
            spliced(" { } ", Some(1)),
            r#"{"seq": 1, "cursor": "9007199254740993"}"#
        );
        assert_eq!(
            spliced("[1]", None),
            r#"{"payload": [1], "cursor": "9007199254740993"}"#
        );
        assert_eq!(
            spliced("\"}\"", Some(1)),
            r#"{"payload": "}", "seq": 1, "cursor": "9007199254740993"}"#
        );
    }
}
