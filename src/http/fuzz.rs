//! What the HTTP plane reads of strangers, as a function of bytes: messages of sockets, tokens, cursors, filters. Called by `fuzz.rs`.

use std::collections::HashSet;

use super::jwt::{Keys, public_keys};
use super::phoenix::{Version, read_push};
use super::rest::read_sql;
use crate::pgflow::snapshot::Cursor;

pub(crate) fn http(data: &[u8]) {
    if let Some((_, _, topic)) = read_push(data) {
        assert!(topic.len() < data.len());
    }
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    for version in [Version::V1, Version::V2] {
        if let Some(said) = version.read(text) {
            let again = version.write(
                said.join_ref.as_deref(),
                said.reference.as_deref(),
                &said.topic,
                &said.event,
                &said.payload,
            );
            let again = again.into_text().expect("text");
            let again = version.read(&again).expect("what is written is read");
            assert_eq!((again.topic, again.event), (said.topic, said.event));
        }
    }
    let secret = "0123456789abcdef0123456789abcdef";
    let verified = Keys::new(Some(secret)).verify(None, text, 0);
    assert!(verified.is_err(), "nobody signed it");
    // What a URL says that we were told to ask.
    if let Ok(public) = public_keys(text) {
        assert!(Keys::default().verify(Some(&public), text, 0).is_err());
    }
    if let Some(cursor) = Cursor::parse(text) {
        assert_eq!(Cursor::parse(&cursor.to_string()), Some(cursor));
    }
    if let Ok(sql) = read_sql("steps", text) {
        let outside = outside_of_literals(&sql);
        let plain: HashSet<char> = "\"._(),=<>: ".chars().collect();
        let good = |c: char| c.is_ascii_alphanumeric() || plain.contains(&c);
        assert!(outside.chars().all(good), "{sql}");
    }
}

/// What Postgres reads as SQL; literals are gone.
fn outside_of_literals(sql: &str) -> String {
    let (mut outside, mut rest) = (String::new(), sql);
    while let Some(start) = rest.find('\'') {
        let escapes = rest[..start].ends_with(" E");
        outside += &rest[..start];
        let mut characters = rest[start + 1..].char_indices().peekable();
        let mut end = None;
        while let Some((at, c)) = characters.next() {
            match c {
                '\\' if escapes => {
                    characters.next();
                }
                '\'' if characters.peek().is_some_and(|(_, next)| *next == '\'') => {
                    characters.next();
                }
                '\'' => {
                    end = Some(start + 1 + at + 1);
                    break;
                }
                _ => {}
            }
        }
        rest = &rest[end.expect("a literal ends")..];
    }
    outside + rest
}
