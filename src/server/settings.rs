//! Session settings as SQL sees them: what a client has SET, and what a server has been told. Pure; compares the two
//! and writes the statements that close the gap. Called by `pool/reset.rs` and `client/session`.

use std::collections::BTreeMap;
use std::fmt::Write;

use crate::wire::quote;

/// Settings by lower-case name, each with the whole SET statement that makes it so.
///
/// Two names are not settings for `RESET ALL`, and order matters for them: `session_authorization`, then `role`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Settings {
    values: BTreeMap<String, String>,
}

const AUTHORIZATION: &str = "session_authorization";
const ROLE: &str = "role";
const APPLICATION_NAME: &str = "application_name";

impl Settings {
    pub(crate) fn set(&mut self, name: &str, sql: &str) {
        self.values.insert(name.to_owned(), sql.to_owned());
        if name == AUTHORIZATION {
            // SET SESSION AUTHORIZATION also resets the role. (sql-set-session-authorization.html)
            self.values.remove(ROLE);
        }
    }

    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.values.keys().map(String::as_str)
    }

    /// The roles are those of the login.
    pub(crate) fn keeps_roles(&self) -> bool {
        !self.has(AUTHORIZATION) && !self.has(ROLE)
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.values.contains_key(name)
    }

    /// The whole SET statement.
    pub(crate) fn statement(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }

    pub(crate) fn unset(&mut self, name: &str) {
        self.values.remove(name);
        if name == AUTHORIZATION {
            self.values.remove(ROLE);
        }
    }

    /// `RESET ALL`: everything but the role and the session authorization.
    pub(crate) fn unset_all(&mut self) {
        self.values
            .retain(|name, _| name == AUTHORIZATION || name == ROLE);
    }

    /// A session that has SET nothing but its name, as it is after login and after `DISCARD ALL`.
    pub(crate) fn named(application_name: &str) -> Self {
        let mut settings = Self::default();
        settings.set(
            APPLICATION_NAME,
            &format!(
                "SET application_name TO {}",
                quote::literal(application_name)
            ),
        );
        settings
    }

    /// All of them but the application's name, in an order and spelling of its own: equal words, equal settings.
    pub(crate) fn words(&self) -> impl Iterator<Item = &str> {
        let others = self
            .values
            .iter()
            .filter(|(name, _)| *name != APPLICATION_NAME);
        others.flat_map(|(name, sql)| [name.as_str(), sql.as_str()])
    }

    /// The application's name, too.
    pub(crate) fn all_words(&self) -> impl Iterator<Item = &str> {
        let all = self.values.iter();
        all.flat_map(|(name, sql)| [name.as_str(), sql.as_str()])
    }

    /// The same, with the application's name as in `other`.
    pub(crate) fn renamed_as(&self, other: &Self) -> Self {
        let mut renamed = self.clone();
        match other.values.get(APPLICATION_NAME) {
            Some(sql) => renamed.set(APPLICATION_NAME, sql),
            None => renamed.unset(APPLICATION_NAME),
        }
        renamed
    }

    /// The statements that turn a server with these settings into one with `wanted`; empty when they are equal.
    pub(crate) fn script_to(&self, wanted: &Self) -> String {
        let mut script = String::new();
        if self == wanted {
            return script;
        }
        let authorization_differs =
            self.values.get(AUTHORIZATION) != wanted.values.get(AUTHORIZATION);
        let role_differs =
            authorization_differs || self.values.get(ROLE) != wanted.values.get(ROLE);
        // Back to the login role first: it alone may be allowed to set the rest.
        if role_differs && self.values.contains_key(ROLE) {
            script.push_str("RESET ROLE;");
        }
        if authorization_differs && self.values.contains_key(AUTHORIZATION) {
            script.push_str("RESET SESSION AUTHORIZATION;");
        }
        let ordinary = |name: &&String| *name != AUTHORIZATION && *name != ROLE;
        for name in self
            .values
            .keys()
            .filter(ordinary)
            .filter(|name| !wanted.values.contains_key(*name))
        {
            put(&mut script, format_args!("RESET {};", quoted(name)));
        }
        for (name, sql) in wanted.values.iter().filter(|(name, _)| ordinary(name)) {
            if self.values.get(name) != Some(sql) {
                put(&mut script, format_args!("{sql};"));
            }
        }
        let authorization = wanted
            .values
            .get(AUTHORIZATION)
            .filter(|_| authorization_differs);
        let role = wanted.values.get(ROLE).filter(|_| role_differs);
        for sql in authorization.into_iter().chain(role) {
            put(&mut script, format_args!("{sql};"));
        }
        script
    }
}

fn put(script: &mut String, text: std::fmt::Arguments<'_>) {
    script
        .write_fmt(text)
        .expect("writing to a String cannot fail");
}

/// A custom setting's name is two identifiers joined by a dot; each is quoted by itself.
fn quoted(name: &str) -> String {
    name.split('.')
        .map(|part| format!("\"{}\"", part.replace('"', "\"\"")))
        .collect::<Vec<_>>()
        .join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(pairs: &[(&str, &str)]) -> Settings {
        let mut settings = Settings::default();
        pairs
            .iter()
            .for_each(|(name, value)| settings.set(name, value));
        settings
    }

    #[test]
    fn equal_settings_need_nothing() {
        let one = settings(&[("timezone", "'UTC'")]);
        assert_eq!(one.script_to(&one.clone()), "");
    }

    #[test]
    fn differences_are_set_and_leftovers_reset() {
        let server = settings(&[
            ("timezone", "SET timezone TO 'UTC'"),
            ("my.setting", "SET my.setting TO 1"),
        ]);
        let client = settings(&[("search_path", "SET search_path TO a, b")]);
        assert_eq!(
            server.script_to(&client),
            "RESET \"my\".\"setting\";RESET \"timezone\";SET search_path TO a, b;"
        );
    }

    #[test]
    fn roles_go_first_when_leaving_and_last_when_entering() {
        let server = settings(&[("role", "SET ROLE bob"), ("x", "SET x TO 1")]);
        let client = settings(&[
            ("session_authorization", "SET SESSION AUTHORIZATION alice"),
            ("role", "SET ROLE carol"),
        ]);
        assert_eq!(
            server.script_to(&client),
            "RESET ROLE;RESET \"x\";SET SESSION AUTHORIZATION alice;SET ROLE carol;"
        );
    }

    #[test]
    fn reset_all_keeps_roles() {
        let mut client = settings(&[("role", "SET ROLE bob"), ("x", "SET x TO 1")]);
        client.unset_all();
        assert_eq!(client, settings(&[("role", "SET ROLE bob")]));
    }
}
