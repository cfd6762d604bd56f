//! What a Postgres session reports of itself (ParameterStatus) and what it was opened with (startup parameters).
//! Pure. A client's view and a server's are both `Reported`; shared by reference, so equal ones compare by pointer.

use std::cmp::Ordering;
use std::sync::Arc;

/// Values of the settings Postgres reports, in the order it first reported them.
/// (protocol-flow.html#PROTOCOL-ASYNC)
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reported {
    values: Arc<Vec<(String, String)>>,
}

impl Reported {
    pub(crate) fn set(&mut self, name: &str, value: &str) {
        if self.find(name) == Some(value) {
            return;
        }
        let values = Arc::make_mut(&mut self.values);
        match values.iter_mut().find(|(known, _)| known == name) {
            Some((_, old)) => value.clone_into(old),
            None => values.push((name.to_owned(), value.to_owned())),
        }
    }

    pub(crate) fn find(&self, name: &str) -> Option<&str> {
        self.values
            .iter()
            .find(|(known, _)| known == name)
            .map(|(_, value)| value.as_str())
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.values
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// What a session that believes `self` must be told so that it believes `now`.
    pub(crate) fn changes_to<'a>(
        &'a self,
        now: &'a Self,
    ) -> impl Iterator<Item = (&'a str, &'a str)> {
        let same = Arc::ptr_eq(&self.values, &now.values);
        now.iter()
            .filter(move |(name, value)| !same && self.find(name) != Some(value))
    }

    /// Whether both hold the same; from then on they are the same.
    pub(crate) fn merge(&mut self, other: &mut Self) -> bool {
        let equal = self == other;
        if equal {
            share(&mut self.values, &mut other.values);
        }
        equal
    }
}

/// Of two equal values one goes. It is always the one at the higher address: wherever equals meet, in pairs and in whatever
/// order, they end as one, and after that are told equal by their address.
pub(crate) fn share<T>(one: &mut Arc<T>, other: &mut Arc<T>) {
    match Arc::as_ptr(one).cmp(&Arc::as_ptr(other)) {
        Ordering::Less => other.clone_from(one),
        Ordering::Equal => {}
        Ordering::Greater => one.clone_from(other),
    }
}

/// Who a session belongs to and how it was opened. Servers are shared only among clients with equal `options`: then
/// `RESET`, `DISCARD ALL` and `pg_settings` find this client's own start values, with nothing rewritten.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Opening {
    pub(crate) user: String,
    pub(crate) database: String,
    /// Startup parameters other than the above and `application_name`, sorted by name.
    pub(crate) options: Vec<(String, String)>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_changed_is_told() {
        let mut server = Reported::default();
        server.set("TimeZone", "UTC");
        server.set("DateStyle", "ISO");
        let client = server.clone();
        assert_eq!(client.changes_to(&server).count(), 0);
        server.set("TimeZone", "Asia/Tokyo");
        assert_eq!(
            client.changes_to(&server).collect::<Vec<_>>(),
            [("TimeZone", "Asia/Tokyo")]
        );
        assert_eq!(client.find("TimeZone"), Some("UTC"));
    }

    #[test]
    fn equals_end_as_one_however_they_meet() {
        let zone = |value: &str| {
            let mut reported = Reported::default();
            reported.set("TimeZone", value);
            reported
        };
        let (mut a, mut b, mut c) = (zone("UTC"), zone("UTC"), zone("UTC"));
        assert!(a.merge(&mut b) && b.merge(&mut c) && c.merge(&mut a) && a.merge(&mut b));
        assert!(Arc::ptr_eq(&a.values, &b.values) && Arc::ptr_eq(&b.values, &c.values));
        let mut other = zone("Asia/Tokyo");
        assert!(!a.merge(&mut other));
        assert_eq!(other.find("TimeZone"), Some("Asia/Tokyo"));
    }
}
