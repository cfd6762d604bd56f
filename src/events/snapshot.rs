//! What a `pg_snapshot` could see. Pure; `upstream.rs` reads by it, and whoever resumes from it names it.

use std::fmt;
use std::fmt::Write as _;

/// The text of a `pg_snapshot`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Snapshot {
    pub(super) xmax: u64,
    /// In progress, below `xmax`; as written, it goes back into SQL.
    xip: String,
}

impl Snapshot {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let (_xmin, xmax, xip) = (parts.next()?, parts.next()?.parse().ok()?, parts.next()?);
        let numbers = xip.is_empty() || xip.split(',').all(|xid| xid.parse::<u64>().is_ok());
        (numbers && parts.next().is_none()).then(|| Self {
            xmax,
            xip: xip.to_owned(),
        })
    }

    pub(crate) fn xmax(&self) -> u64 {
        self.xmax
    }

    pub(super) fn in_progress(&self) -> Vec<u64> {
        self.running().collect()
    }

    fn running(&self) -> impl Iterator<Item = u64> {
        self.xip.split(',').filter_map(|xid| xid.parse().ok())
    }

    /// Whether it could see what that transaction wrote, if it ever committed.
    pub(crate) fn sees(&self, xid: u64) -> bool {
        xid < self.xmax && self.running().all(|running| running != xid)
    }

    /// Whether it could see whatever the other could: it is the same, or a later one of the same server.
    pub(crate) fn sees_all_of(&self, other: &Self) -> bool {
        other.xmax <= self.xmax && self.running().all(|running| !other.sees(running))
    }

    /// The rows (`e`) a transaction wrote that was not visible.
    pub(crate) fn unseen(&self) -> String {
        let mut sql = format!("e.xid >= '{}'::xid8", self.xmax);
        if !self.xip.is_empty() {
            write!(sql, " or e.xid = any('{{{}}}'::xid8[])", self.xip).expect("a String takes all");
        }
        sql
    }
}

/// As Postgres writes it, but for `xmin`, which says nothing that `xip` does not.
impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let xmin = self.running().min().unwrap_or(self.xmax);
        write!(f, "{xmin}:{}:{}", self.xmax, self.xip)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_snapshot_could_not_see_is_spelled_for_an_index() {
        let check =
            |text: &str, sql: &str| assert_eq!(Snapshot::parse(text).expect(text).unseen(), sql);
        check("10:10:", "e.xid >= '10'::xid8");
        check(
            "10:20:10,14",
            "e.xid >= '20'::xid8 or e.xid = any('{10,14}'::xid8[])",
        );
        for bad in ["", "10", "10:20", "10:x:", "10:20:a", "10:20:1:2"] {
            assert_eq!(Snapshot::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_snapshot_sees_what_had_ended_and_is_written_as_it_was_read() {
        let snapshot = Snapshot::parse("10:20:10,14").expect("a snapshot");
        let seen: Vec<u64> = (8..22).filter(|xid| snapshot.sees(*xid)).collect();
        assert_eq!(seen, [8, 9, 11, 12, 13, 15, 16, 17, 18, 19]);
        assert_eq!(snapshot.to_string(), "10:20:10,14");
        let later = Snapshot::parse("14:22:14,21").expect("a snapshot");
        assert!(later.sees_all_of(&snapshot) && snapshot.sees_all_of(&snapshot));
        assert!(!snapshot.sees_all_of(&later));
        let quiet = Snapshot::parse("7:9:").expect("a snapshot");
        assert_eq!(quiet.to_string(), "9:9:");
    }
}
