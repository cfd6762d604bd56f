//! The names pgflow gives to things: flow and step slugs, run ids. Says what is valid, never looks anything up.
//! Called by `pgflow/events.rs`, `classify`, and whoever takes a slug or a run id from outside.

use uuid::Uuid;

/// Longest slug `pgflow.is_valid_slug` admits.
pub const SLUG_LENGTH_MAX: usize = 128;

/// Longest slug a flow can really have: pgmq refuses longer queue names.
pub const QUEUE_NAME_LENGTH_MAX: usize = 47;

/// A valid flow or step slug, as `pgflow.is_valid_slug` has it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Slug(String);

impl Slug {
    /// `None`: not a slug (empty, too long, a character outside `[a-zA-Z0-9_]`, a leading digit, or `run`).
    pub fn parse(text: &str) -> Option<Self> {
        let mut bytes = text.bytes();
        let first = bytes.next()?;
        let valid = text.len() <= SLUG_LENGTH_MAX
            && (first.is_ascii_alphabetic() || first == b'_')
            && bytes.all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
            && text != "run";
        valid.then(|| Self(text.to_owned()))
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Display for Slug {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// A run id in a spelling Postgres' `uuid` type takes. Stricter than `Uuid::parse_str`, which also takes `urn:uuid:`.
pub fn run_id(text: &str) -> Option<Uuid> {
    let text = text.trim_matches([' ', '\t', '\n', '\r', '\x0b', '\x0c']);
    if text.starts_with(['u', 'U']) {
        return None;
    }
    Uuid::try_parse(text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slugs_are_what_pgflow_admits() {
        for good in ["a", "_", "Foo_1", "count_words", &"x".repeat(128)] {
            assert_eq!(
                Slug::parse(good).map(|s| s.to_string()).as_deref(),
                Some(good)
            );
        }
        for bad in [
            "",
            "1a",
            "a-b",
            "a b",
            "run",
            "é",
            "a:b",
            "a.b",
            &"x".repeat(129),
        ] {
            assert_eq!(Slug::parse(bad), None, "{bad}");
        }
        assert!(
            Slug::parse("Run").is_some(),
            "only the lower-case word is reserved"
        );
    }

    #[test]
    fn run_ids_are_read_as_postgres_reads_uuids() {
        let id = Uuid::from_u128(0x67e55044_10b1_426f_9247_bb680e5fe0c8);
        for good in [
            "67e55044-10b1-426f-9247-bb680e5fe0c8",
            "67E55044-10B1-426F-9247-BB680E5FE0C8",
            "{67e55044-10b1-426f-9247-bb680e5fe0c8}",
            "67e5504410b1426f9247bb680e5fe0c8",
        ] {
            assert_eq!(run_id(good), Some(id), "{good}");
        }
        for bad in [
            "",
            "67e55044",
            "urn:uuid:67e55044-10b1-426f-9247-bb680e5fe0c8",
        ] {
            assert_eq!(run_id(bad), None, "{bad}");
        }
    }
}
