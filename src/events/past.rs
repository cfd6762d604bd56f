//! What the outbox still has of what a cursor has not seen: the questions asked for whoever resumes a stream of many runs, and what
//! their answers mean. Never asks by itself: that is `upstream.rs`'s, `hub.rs`'s, and the streams' of `http`.

use super::subscription::Reading;
use crate::pgflow::snapshot::{Cursor, Snapshot};
use crate::wire::quote::literal;

/// Rows of one page.
const PAGE: usize = 500;
/// And of it what Postgres stores, compressed; one row always.
const PAGE_BYTES: usize = 1 << 20;
/// No more transaction ids between its snapshots than that, and a page costs the listener's connection next to nothing. Others,
/// for which Postgres may have to look through all of the outbox, are read elsewhere.
const NEAR: u64 = 1_000;
/// Nor more of them that were in progress, each of which may have written long ago.
const IN_PROGRESS_MAX: usize = 1_000;

/// What the outbox has at the moment somebody resumes. The oldest transaction need not have drawn the lowest id: among the first few
/// is one that has.
pub(crate) const NOW: &str = "select pg_current_snapshot()::text, (select s.last_value from flowgate.event_id_seq as s), \
    (select min(o.id) || ' ' || (array_agg(o.xid order by o.xid))[1] \
        from (select e.id, e.xid from flowgate.event as e order by e.xid limit 200) as o)";

pub(crate) struct Start {
    pub(crate) now: Snapshot,
    pub(crate) last_id: i64,
    /// The lowest id that is kept, and the oldest transaction.
    oldest: Option<(i64, u64)>,
}

/// Ids that may be missing. `to` not known: history is not the one the cursor comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Missed {
    pub(crate) from: i64,
    pub(crate) to: Option<i64>,
}

impl Start {
    pub(crate) fn parse(row: Option<&Vec<Option<String>>>) -> Option<Self> {
        let column = |at: usize| row?.get(at)?.as_deref();
        let oldest = column(2).and_then(|oldest| {
            let (id, xid) = oldest.split_once(' ')?;
            Some((id.parse().ok()?, xid.parse().ok()?))
        });
        Some(Self {
            now: Snapshot::parse(column(0)?)?,
            last_id: column(1)?.parse().ok()?,
            oldest,
        })
    }

    /// History is not the one the cursor comes from, so that nothing can be read by it.
    pub(crate) fn is_before(&self, cursor: &Cursor) -> bool {
        cursor.now.xmax() > self.now.xmax()
    }

    /// Something may be missing: older days were dropped, or history was rewritten.
    pub(crate) fn missed_since(&self, cursor: &Cursor) -> Option<Missed> {
        let from = cursor.id.saturating_add(1);
        let to = match self.oldest {
            _ if self.is_before(cursor) => None,
            Some((_, xid)) if cursor.before.sees(xid) => return None,
            Some((id, _)) if id <= from => return None,
            Some((id, _)) => Some(id - 1),
            None if self.last_id <= cursor.id => return None,
            None => Some(self.last_id),
        };
        Some(Missed { from, to })
    }
}

/// Whether it is cheap to read what the one look saw and the other did not.
pub(super) fn is_near(reading: &Reading) -> bool {
    let apart = reading.now.xmax().saturating_sub(reading.before.xmax());
    apart <= NEAR && reading.before.in_progress().len() <= IN_PROGRESS_MAX
}

/// The next rows behind the cursor, as `upstream.rs` reads events, and in the last column how many there were before the bound of
/// bytes. `slug`: of one flow; whose runs tell it only where they may be read.
pub(super) fn page_sql(at: &Cursor, slug: Option<&str>, has_runs: bool) -> String {
    let of = match slug {
        None => "e.topic like 'pgflow:%'".to_owned(),
        Some(slug) => format!("{} = {}", flow_of(has_runs), literal(slug)),
    };
    let runs = if has_runs && slug.is_some() { RUNS } else { "" };
    format!(
        "select q.id, q.topic, q.seq, null, q.payload::text, q.event, q.message_id, q.xid, q.private, q.found from \
         (select p.*, count(*) over () as found, sum(p.size) over (order by p.id) - p.size as so_far from \
         (select e.*, pg_column_size(e.payload) as size from flowgate.event e {runs} where {} and {of} order by e.id limit {PAGE}) as p) as q \
         where q.so_far < {PAGE_BYTES} order by q.id",
        at.rest()
    )
}

/// Nothing is behind those rows in that part.
pub(super) fn is_last(rows: usize, found: usize) -> bool {
    found < PAGE && rows == found
}

/// The flow that an event (`e`) tells of, with `RUNS` joined.
pub(super) fn flow_of(has_runs: bool) -> &'static str {
    if has_runs {
        "coalesce(e.payload->>'flow_slug', r.flow_slug)"
    } else {
        "e.payload->>'flow_slug'"
    }
}

/// A topic that only looks like a run's must not fail the cast: anybody may send one.
pub(super) const RUNS: &str = "left join pgflow.runs r on r.run_id = case when e.topic ~ \
    '^pgflow:run:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$' then substr(e.topic, 12)::uuid end";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_told_when_what_follows_the_cursor_may_have_been_dropped() {
        let start = |oldest, last_id, now| Start {
            now: Snapshot::parse(now).expect("a snapshot"),
            last_id,
            oldest,
        };
        let cursor = Cursor::parse("50-100:100:-101:101:").expect("a cursor");
        let (later, earlier) = ("200:200:", "90:90:");
        let missed = |start: Start| {
            let missed = start.missed_since(&cursor)?;
            assert_eq!(missed.from, 51);
            Some(missed.to)
        };
        assert_eq!(missed(start(Some((7, 30)), 90, later)), None);
        assert_eq!(missed(start(Some((51, 101)), 90, later)), None);
        assert_eq!(missed(start(None, 50, later)), None);
        assert_eq!(missed(start(Some((61, 110)), 90, later)), Some(Some(60)));
        assert_eq!(missed(start(None, 90, later)), Some(Some(90)));
        assert_eq!(missed(start(Some((7, 30)), 90, earlier)), Some(None));
    }
}
