//! What a session is worth to the operator when not all can be served: what it says of itself (`flowgate.priority`), else what the
//! configuration says of its user. Called where it has to wait. How settings of ours are read, here and in `explaining.rs`.

use super::Session;
use crate::config::Priority;
use crate::pool::checkout::Rank;
use crate::server::parameters::Opening;

/// A custom setting like any other for Postgres, which takes any value; unknown ones count as `default`.
const SETTING: &str = "flowgate.priority";

impl Session {
    pub(super) fn priority(&self) -> Priority {
        let said = match self.state.settings.statement(SETTING) {
            Some(statement) => word_of(statement).and_then(Priority::of_word),
            None => self.opened_priority,
        };
        said.unwrap_or(self.role.priority)
    }

    /// Of the request under way.
    pub(super) fn rank(&self) -> Rank {
        Rank {
            priority: self.priority(),
            worth: self.request.worth,
        }
    }
}

pub(super) fn opened_with(opening: &Opening) -> Option<Priority> {
    opened_word(opening, SETTING).and_then(Priority::of_word)
}

/// What a setting was opened with: as a startup parameter, or among `options` as `-c flowgate.priority=low`.
pub(super) fn opened_word<'a>(opening: &'a Opening, setting: &str) -> Option<&'a str> {
    let mut found = None;
    for (name, value) in &opening.options {
        if name.eq_ignore_ascii_case(setting) {
            found = Some(value.as_str());
        } else if name == "options" {
            for word in value.split_ascii_whitespace() {
                let word = word.trim_start_matches("-c").trim_start_matches("--");
                if let Some((name, value)) = word.split_once('=')
                    && name.eq_ignore_ascii_case(setting)
                {
                    found = Some(value);
                }
            }
        }
    }
    found
}

/// The last word of a SET.
pub(super) fn word_of(statement: &str) -> Option<&str> {
    let end = |c: char| c.is_ascii_whitespace() || matches!(c, '=' | ';' | '\'' | '"');
    statement.trim_end_matches(end).rsplit(end).next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_priority_is_read_however_it_is_spelled() {
        for (statement, expected) in [
            ("SET flowgate.priority = 'low'", Some(Priority::Low)),
            (
                "set session flowgate.priority to HIGH;",
                Some(Priority::High),
            ),
            ("set flowgate.priority='normal' ;", Some(Priority::Normal)),
            (
                "SET \"flowgate\".\"priority\" TO \"low\"",
                Some(Priority::Low),
            ),
            ("set flowgate.priority to default", None),
            ("set flowgate.priority to 'urgent'", None),
        ] {
            let said = word_of(statement).and_then(Priority::of_word);
            assert_eq!(said, expected, "{statement}");
        }
        let opened = |name: &str, value: &str| {
            opened_with(&Opening {
                user: String::new(),
                database: String::new(),
                options: vec![(name.to_owned(), value.to_owned())],
            })
        };
        assert_eq!(opened("flowgate.priority", "low"), Some(Priority::Low));
        let options = "-c work_mem=1MB -c flowgate.priority=low --flowgate.priority=high";
        assert_eq!(opened("options", options), Some(Priority::High));
        assert_eq!(
            opened("options", "-cflowgate.priority=low"),
            Some(Priority::Low)
        );
        assert_eq!(opened("TimeZone", "UTC"), None);
    }
}
