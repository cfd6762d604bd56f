//! What a `pg_snapshot` could see, and the cursor of a stream of many runs, which is made of two. Pure, never asks anybody: `events`
//! reads by them; who resumes, over LISTEN or HTTP, names them.

use std::fmt;
use std::fmt::Write as _;

/// The longest cursor: a snapshot names every transaction in progress.
const CURSOR_MAX: usize = 64 * 1024;

/// The text of a `pg_snapshot`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Snapshot {
    pub xmax: u64,
    /// In progress, below `xmax`; as written, it goes back into SQL.
    xip: String,
}

impl Snapshot {
    /// `None`: Postgres would not read it either.
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split(':');
        let (_xmin, xmax, xip) = (parts.next()?, number(parts.next()?)?, parts.next()?);
        let mut last = 0;
        for running in xip.split(',').filter(|_| !xip.is_empty()) {
            last = number(running).filter(|xid| (last + 1..xmax).contains(xid))?;
        }
        (xmax > 0 && parts.next().is_none()).then(|| Self {
            xmax,
            xip: xip.to_owned(),
        })
    }

    pub fn xmax(&self) -> u64 {
        self.xmax
    }

    pub fn in_progress(&self) -> Vec<u64> {
        self.running().collect()
    }

    fn running(&self) -> impl Iterator<Item = u64> {
        self.xip.split(',').filter_map(|xid| xid.parse().ok())
    }

    /// Whether it could see what that transaction wrote, if it ever committed.
    pub fn sees(&self, xid: u64) -> bool {
        xid < self.xmax && self.running().all(|running| running != xid)
    }

    /// Whether it could see whatever the other could: it is the same, or a later one of the same server.
    pub fn sees_all_of(&self, other: &Self) -> bool {
        other.xmax <= self.xmax && self.running().all(|running| !other.sees(running))
    }

    /// The rows (`e`) a transaction wrote that was not visible.
    pub fn unseen(&self) -> String {
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

/// Where a stream of many runs has got to, `<id>-<snapshot>-<snapshot>`: an event, what had been read before the look at the outbox
/// that brought it, and what by it. What follows are rows that the first could not see and that are either later than the event or
/// not seen by the second: exact in whatever order transactions commit. They are told in two parts, the rest of that look and then
/// what it did not see, so that each has a cursor as exact as this one.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Cursor {
    pub id: i64,
    pub before: Snapshot,
    pub now: Snapshot,
}

impl Cursor {
    pub fn parse(text: &str) -> Option<Self> {
        let mut parts = text.split('-');
        let (id, before, now) = (parts.next()?, parts.next()?, parts.next()?);
        if text.len() > CURSOR_MAX || parts.next().is_some() {
            return None;
        }
        Some(Self {
            id: number(id)?.try_into().ok()?,
            before: Snapshot::parse(before)?,
            now: Snapshot::parse(now)?,
        })
    }

    /// The first part of what follows: the rest (`e`) of its look, told in the order of `e.id`.
    pub fn rest(&self) -> String {
        format!(
            "({}) and e.xid < '{}'::xid8 and pg_visible_in_snapshot(e.xid, '{}'::pg_snapshot) and e.id > {}",
            self.before.unseen(),
            self.now.xmax(),
            self.now,
            self.id
        )
    }
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}-{}", self.id, self.before, self.now)
    }
}

/// As Postgres writes it: no sign, and no zero in front, with which `xid8` is octal from 16 on.
fn number(text: &str) -> Option<u64> {
    let short = text == "0" || !text.is_empty() && !text.starts_with('0');
    let plain = short && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| plain)
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
        for bad in [
            "",
            "10",
            "10:20",
            "10:x:",
            "10:20:a",
            "10:20:1:2",
            "1:+2:",
            "0:0:",
            "10:20:10,",
            "10:20:010",
            "10:020:",
            "10:20:14,10",
            "10:20:10,10",
            "10:20:20",
            "0:20:0",
        ] {
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

    #[test]
    fn a_cursor_is_read_as_it_was_written() {
        let text = "17-10:20:10,14-22:22:";
        let cursor = Cursor::parse(text).expect("a cursor");
        assert_eq!(cursor.to_string(), text);
        assert_eq!(
            cursor.rest(),
            "(e.xid >= '20'::xid8 or e.xid = any('{10,14}'::xid8[])) and e.xid < '22'::xid8 \
             and pg_visible_in_snapshot(e.xid, '22:22:'::pg_snapshot) and e.id > 17"
        );
        for bad in [
            "",
            "17",
            "x-1:1:-1:1:",
            "1-1:1:-1:1:-1",
            "-1-1:1:-1:1:",
            "9223372036854775808-1:1:-1:1:",
            "1-1-1",
        ] {
            assert_eq!(Cursor::parse(bad), None, "{bad}");
        }
    }
}
