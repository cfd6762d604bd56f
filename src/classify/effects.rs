//! What a statement does to the session that sends it: settings, subscriptions, prepared statements, and what only its
//! own server connection can hold. Goes by leading keywords and by calls of a few functions; what a body does that is not
//! in the text is out of sight, and it says so (`Opaque`). Sees one statement's tokens, keeps nothing. Called by
//! `classify/mod.rs`.

use memchr::memchr_iter;

use super::lexer::{Kind, Lexer, Token, is_ident_part};
use super::{Effect, catalog};

/// Effects of one statement, appended in the order in which they stand.
pub(super) fn effects(text: &[u8], tokens: &[Token], out: &mut Vec<Effect>) {
    let s = Words { text, tokens };
    leading(s, out);
    for at in 0..tokens.len() {
        if let Some(effect) = inner(s, at) {
            out.push(effect);
        }
    }
    let unknown = if s.any(0, &["do", "execute"]) {
        Some(number_of(s, 0..tokens.len()))
    } else if s.any(0, DEFINITION) {
        None
    } else {
        let called = (0..tokens.len()).filter(|&at| calls_unknown(s, at));
        called
            .map(|at| number_of(s, at.saturating_sub(2)..at + 1))
            .reduce(together)
    };
    if let Some(number) = unknown.filter(|_| !out.contains(&Effect::Unfollowed)) {
        out.push(Effect::Opaque(number));
    }
}

/// Of some tokens. (FNV-1a)
fn number_of(s: Words<'_>, at: std::ops::Range<usize>) -> u32 {
    let tokens = s.tokens.get(at).unwrap_or_default();
    let bytes = tokens.iter().flat_map(|token| token.bytes(s.text));
    bytes.fold(0x811c_9dc5, |hash, byte| {
        (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}

/// The number of what ran one after the other; the same again is no news.
pub(crate) fn together(first: u32, then: u32) -> u32 {
    if first == then {
        first
    } else {
        first.rotate_left(5) ^ then
    }
}

/// First words of statements that name things, and call none of them. (A CREATE TABLE AS may; it is not looked at.)
pub(super) const DEFINITION: &[&str] = &[
    "create", "alter", "drop", "comment", "grant", "revoke", "truncate", "vacuum", "analyze",
    "reindex", "cluster", "refresh", "lock", "security", "import", "reassign",
];
/// Schemas whose functions do nothing to a session that is not told elsewhere.
const OWN_SCHEMAS: &[&str] = &[
    "pg_catalog",
    "pgflow",
    "pgmq",
    "flowgate",
    "realtime",
    "information_schema",
];
/// After these a name before `(` is one of a table or an alias, and the parentheses hold columns.
const BEFORE_COLUMNS: &[&str] = &["into", "as", "with", "recursive", "table", "prepare"];

/// Is the token at `at` the name of a function that is called, and not a known one?
fn calls_unknown(s: Words<'_>, at: usize) -> bool {
    let token = s.tokens[at];
    if !s.punct(at + 1, b'(') || !matches!(token.kind, Kind::Word | Kind::Quoted | Kind::Exotic) {
        return false;
    }
    let qualified = at >= 2 && s.punct(at - 1, b'.');
    let known = if qualified {
        OWN_SCHEMAS
            .iter()
            .any(|schema| s.tokens[at - 2].names(s.text, schema))
    } else {
        s.name(at)
            .is_some_and(|name| catalog::is_known(name.as_bytes()))
    };
    let head = if qualified { at - 2 } else { at };
    // Behind a parenthesis stands an alias; but not behind that of DISTINCT ON (…) or OPERATOR(…).
    let may_follow = || {
        (0..head).any(|at| {
            s.is(at, "distinct") && s.is(at + 1, "on")
                || s.is(at, "operator") && s.punct(at + 1, b'(')
        })
    };
    !known
        && (head == 0
            || (!s.punct(head - 1, b')') || may_follow()) && !s.any(head - 1, BEFORE_COLUMNS))
}

/// The same at first sight: whether a text may hold such a call. Literals and comments count too.
pub(super) fn may_call(text: &[u8]) -> bool {
    memchr_iter(b'(', text).any(|open| {
        let before = text[..open].trim_ascii_end();
        let (before, name, quoted) = split_name(before);
        if name.is_empty() {
            // A comment may stand between a name and its parenthesis.
            return quoted
                || before.ends_with(b"*/")
                || memchr::memmem::find(before, b"--").is_some();
        }
        let lower = |word: &[u8]| word.to_ascii_lowercase();
        let (before, known) = match before.split_last() {
            Some((b'.', before)) => {
                let (before, schema, _) = split_name(before);
                let own = OWN_SCHEMAS
                    .iter()
                    .any(|own| schema.eq_ignore_ascii_case(own.as_bytes()));
                (before, own)
            }
            _ => (before, catalog::is_known(&lower(name))),
        };
        let before = before.trim_ascii_end();
        let (_, word, _) = split_name(before);
        let columns = BEFORE_COLUMNS
            .iter()
            .any(|columns| word.eq_ignore_ascii_case(columns.as_bytes()));
        !known && !columns && before.last() != Some(&b')')
    })
}

/// The name at the end of `text`, what stands before it, and whether it is quoted.
fn split_name(text: &[u8]) -> (&[u8], &[u8], bool) {
    if let Some(inner) = text.strip_suffix(b"\"") {
        let start = memchr::memrchr(b'"', inner).unwrap_or(0);
        return (
            &text[..start],
            inner.get(start + 1..).unwrap_or_default(),
            true,
        );
    }
    let length = text
        .iter()
        .rev()
        .take_while(|&&byte| is_ident_part(byte))
        .count();
    let (before, name) = text.split_at(text.len() - length);
    (before, name, false)
}

#[derive(Clone, Copy)]
struct Words<'a> {
    text: &'a [u8],
    tokens: &'a [Token],
}

impl<'a> Words<'a> {
    fn is(self, at: usize, word: &str) -> bool {
        self.tokens
            .get(at)
            .is_some_and(|token| token.is_word(self.text, word))
    }

    fn any(self, at: usize, words: &[&str]) -> bool {
        words.iter().any(|word| self.is(at, word))
    }

    fn punct(self, at: usize, byte: u8) -> bool {
        self.tokens.get(at).is_some_and(|token| token.is(byte))
    }

    fn operator(self, at: usize, operator: &[u8]) -> bool {
        self.tokens
            .get(at)
            .is_some_and(|token| token.kind == Kind::Operator && token.bytes(self.text) == operator)
    }

    fn name(self, at: usize) -> Option<String> {
        self.tokens.get(at)?.name(self.text)
    }

    fn from(self, at: usize) -> &'a [Token] {
        self.tokens.get(at..).unwrap_or_default()
    }

    /// The tokens from `at` on, one space between them. `None` where they are no UTF-8.
    fn sql(self, at: usize) -> Option<String> {
        let words: Option<Vec<_>> = self
            .from(at)
            .iter()
            .map(|token| std::str::from_utf8(token.bytes(self.text)).ok())
            .collect();
        words.map(|words| words.join(" "))
    }
}

/// What the first words say.
fn leading(s: Words<'_>, out: &mut Vec<Effect>) {
    let Some(first) = s.name(0).filter(|_| s.tokens[0].kind == Kind::Word) else {
        return;
    };
    let named =
        |at: usize, effect: fn(String) -> Effect| s.name(at).map_or(Effect::Unfollowed, effect);
    let effect = match first.as_str() {
        // A syntax error, whose words are Postgres's.
        "listen" | "unlisten" if !s.operator(1, b"*") && !is_listenable(s) => return,
        "set" => return set(s, out),
        "reset" => reset(s),
        "listen" => named(1, Effect::Listen),
        "unlisten" if s.operator(1, b"*") => Effect::UnlistenAll,
        "unlisten" => named(1, Effect::Unlisten),
        "notify" => Effect::Notify,
        "discard" if s.is(1, "all") => Effect::DiscardAll,
        "discard" => Effect::DiscardOther,
        "prepare" if s.is(1, "transaction") => Effect::Transaction,
        "prepare" => named(1, Effect::Prepare),
        "execute" => named(1, Effect::Execute),
        "deallocate" => {
            let at = if s.is(1, "prepare") && s.tokens.len() > 2 {
                2
            } else {
                1
            };
            if s.is(at, "all") {
                Effect::DeallocateAll
            } else {
                named(at, Effect::Deallocate)
            }
        }
        "declare" if declares_hold(s) => Effect::DeclareHold,
        "load" => Effect::Load,
        "drop" if s.is(1, "database") => {
            let at = if s.is(2, "if") { 4 } else { 2 };
            named(at, Effect::NeedsDatabaseAlone)
        }
        "alter" if s.is(1, "database") => named(2, Effect::NeedsDatabaseAlone),
        "create" if s.is(1, "database") => {
            let Some(at) = (2..s.tokens.len()).find(|&at| s.is(at, "template")) else {
                // The default. (sql-createdatabase.html)
                out.push(Effect::NeedsDatabaseAlone("template1".to_owned()));
                return;
            };
            let at = if s.operator(at + 1, b"=") {
                at + 2
            } else {
                at + 1
            };
            named(at, Effect::NeedsDatabaseAlone)
        }
        "copy" => Effect::Copy,
        // No transaction of the session's own: what was prepared, by whomever, is there from now on.
        "commit" | "rollback" if s.is(1, "prepared") => return,
        "do" if body_touches_session(s) => Effect::Unfollowed,
        word if TRANSACTION.contains(&word) => Effect::Transaction,
        _ => return,
    };
    out.push(effect);
}

/// First words of statements that begin, end or mark transactions.
pub(super) const TRANSACTION: &[&str] = &[
    "begin",
    "start",
    "commit",
    "end",
    "rollback",
    "abort",
    "savepoint",
    "release",
];

fn set(s: Words<'_>, out: &mut Vec<Effect>) {
    if s.is(1, "local") || s.any(1, &["transaction", "constraints"]) {
        return out.push(Effect::SetLocal);
    }
    // `SET SESSION x`; but a setting may itself be called that way only in `SET SESSION AUTHORIZATION/CHARACTERISTICS`.
    let at = if s.is(1, "session") { 2 } else { 1 };
    if at == 2 && s.is(2, "characteristics") {
        return characteristics(s, out);
    }
    out.push(assignment(s, at).unwrap_or(Effect::Unfollowed));
    if first_schema_is_temp(s, at) {
        out.push(Effect::TempObject);
    }
}

/// `None`: a SET we can't replay.
fn assignment(s: Words<'_>, at: usize) -> Option<Effect> {
    let special = |name: &str, value: usize| {
        if s.tokens.len() <= value || s.is(value, "default") {
            return Some(Effect::Reset(name.to_owned()));
        }
        Some(Effect::Set {
            name: name.to_owned(),
            sql: format!("SET {}", s.sql(at)?),
        })
    };
    let assigns = |at: usize| s.is(at, "to") || s.operator(at, b"=");
    if s.is(at, "time") && s.is(at + 1, "zone") {
        return if s.is(at + 2, "local") {
            Some(Effect::Reset("timezone".into()))
        } else {
            special("timezone", at + 2)
        };
    }
    if s.is(at, "session") && s.is(at + 1, "authorization") || at == 2 && s.is(2, "authorization") {
        let at = if s.is(at, "session") { at + 1 } else { at };
        if s.is(at + 1, "default") {
            return Some(Effect::Reset("session_authorization".into()));
        }
        let sql = format!("SET SESSION AUTHORIZATION {}", s.sql(at + 1)?);
        return Some(Effect::Set {
            name: "session_authorization".into(),
            sql,
        });
    }
    if !assigns(at + 1) {
        match s
            .name(at)
            .filter(|_| s.tokens[at].kind == Kind::Word)
            .as_deref()
        {
            Some("names") => return special("client_encoding", at + 1),
            Some("role") if s.tokens.len() > at + 1 => return special("role", at + 1),
            Some("xml") if s.is(at + 1, "option") => return special("xmloption", at + 2),
            Some("schema") => {
                let sql = format!("SET search_path TO {}", s.sql(at + 1)?);
                return Some(Effect::Set {
                    name: "search_path".into(),
                    sql,
                });
            }
            Some(_) | None => {}
        }
    }
    // The general form: name[.name…] {TO | =} value[, value…]. Setting names know no case, even quoted.
    let mut name = s.name(at)?.to_ascii_lowercase();
    let mut end = at + 1;
    while s.punct(end, b'.') {
        name = format!("{name}.{}", s.name(end + 1)?.to_ascii_lowercase());
        end += 2;
    }
    if !assigns(end) || s.tokens.len() <= end + 1 {
        return None;
    }
    if s.is(end + 1, "default") && s.tokens.len() == end + 2 {
        return Some(Effect::Reset(name));
    }
    let spelled = Words {
        tokens: &s.tokens[..end],
        ..s
    }
    .sql(at)?
    .replace(" . ", ".");
    Some(Effect::Set {
        name,
        sql: format!("SET {spelled} TO {}", s.sql(end + 1)?),
    })
}

/// `SET SESSION CHARACTERISTICS AS TRANSACTION …` is short for three settings.
fn characteristics(s: Words<'_>, out: &mut Vec<Effect>) {
    let before = out.len();
    let mut set = |name: &str, value: &str| {
        out.push(Effect::Set {
            name: name.to_owned(),
            sql: format!("SET {name} TO {value}"),
        });
    };
    let mut at = 5;
    while at < s.tokens.len() {
        if s.is(at, "isolation") && s.is(at + 1, "level") {
            let (level, words) = match s.name(at + 2).as_deref() {
                Some("serializable") => ("'serializable'", 3),
                Some("repeatable") => ("'repeatable read'", 4),
                Some("read") if s.is(at + 3, "committed") => ("'read committed'", 4),
                Some("read") => ("'read uncommitted'", 4),
                Some(_) | None => break,
            };
            set("default_transaction_isolation", level);
            at += words;
        } else if s.is(at, "read") {
            set(
                "default_transaction_read_only",
                if s.is(at + 1, "only") { "on" } else { "off" },
            );
            at += 2;
        } else if s.is(at, "deferrable") {
            set("default_transaction_deferrable", "on");
            at += 1;
        } else if s.is(at, "not") && s.is(at + 1, "deferrable") {
            set("default_transaction_deferrable", "off");
            at += 2;
        } else if s.punct(at, b',') {
            at += 1;
        } else {
            break;
        }
    }
    if at < s.tokens.len() || out.len() == before {
        out.push(Effect::Unfollowed);
    }
}

fn first_schema_is_temp(s: Words<'_>, at: usize) -> bool {
    let path = s.is(at, "search_path") || s.is(at, "schema");
    let value = s.from(at).iter().find(|token| {
        !(token.is_word(s.text, "search_path")
            || token.is_word(s.text, "schema")
            || token.is_word(s.text, "to"))
            && token.kind != Kind::Operator
    });
    path && value.is_some_and(|token| {
        token.names(s.text, "pg_temp")
            || token
                .literal(s.text)
                .is_some_and(|text| text.eq_ignore_ascii_case("pg_temp"))
    })
}

fn reset(s: Words<'_>) -> Effect {
    if s.is(1, "all") && s.tokens.len() == 2 {
        return Effect::ResetAll;
    }
    if s.is(1, "time") && s.is(2, "zone") {
        return Effect::Reset("timezone".into());
    }
    if s.is(1, "session") && s.is(2, "authorization") {
        return Effect::Reset("session_authorization".into());
    }
    if s.is(1, "transaction") {
        return Effect::SetLocal;
    }
    let parts: Option<Vec<_>> = (1..s.tokens.len())
        .step_by(2)
        .map(|at| s.name(at))
        .collect();
    match parts {
        Some(parts) if !parts.is_empty() => Effect::Reset(parts.join(".").to_ascii_lowercase()),
        Some(_) | None => Effect::Unfollowed,
    }
}

fn declares_hold(s: Words<'_>) -> bool {
    // Up to the query's own words, which may say `with` and `hold` as they like.
    let head = s
        .tokens
        .iter()
        .take(10)
        .position(|token| token.is_word(s.text, "cursor"))
        .unwrap_or(0);
    s.is(head + 1, "with") && s.is(head + 2, "hold")
}

/// Calls and words that matter wherever in a statement they stand.
fn inner(s: Words<'_>, at: usize) -> Option<Effect> {
    let token = s.tokens[at];
    if !matches!(token.kind, Kind::Word | Kind::Quoted) {
        return None;
    }
    let bytes = token.bytes(s.text);
    // Cheap first: few words begin like these.
    match bytes.trim_ascii_start().first()? {
        b't' | b'T' if token.is_word(s.text, "temp") || token.is_word(s.text, "temporary") => {
            let object = at > 0 && s.any(at - 1, &["create", "local", "global", "into", "replace"]);
            (object && !drops_at_commit(s)).then_some(Effect::TempObject)
        }
        b'p' | b'P' | b's' | b'S' | b'"' => {
            let name = token.name(s.text)?;
            if name == "pg_temp" && s.punct(at + 1, b'.') && !drops_at_commit(s) {
                return Some(Effect::TempObject);
            }
            if matches!(
                name.as_str(),
                "pg_prepared_statements" | "pg_prepared_statement"
            ) {
                return Some(Effect::PreparedStatements);
            }
            if !s.punct(at + 1, b'(') {
                return None;
            }
            match name.as_str() {
                "currval" | "lastval" => Some(Effect::SequenceValue),
                "pg_advisory_lock"
                | "pg_advisory_lock_shared"
                | "pg_try_advisory_lock"
                | "pg_try_advisory_lock_shared" => Some(Effect::AdvisorySession),
                "setseed"
                | "set_limit"
                | "pg_backup_start"
                | "pg_start_backup"
                | "pg_create_logical_replication_slot"
                | "pg_create_physical_replication_slot"
                | "pg_copy_logical_replication_slot"
                | "pg_copy_physical_replication_slot"
                | "pg_replication_origin_session_setup" => Some(Effect::Unfollowed),
                "pg_notify" => Some(Effect::Notify),
                "pg_listening_channels" => Some(Effect::ListeningChannels),
                "pg_advisory_unlock_all" => Some(Effect::AdvisoryUnlockAll),
                "set_config" if sets_locally(s, at + 2) => Some(Effect::SetLocal),
                "set_config" => Some(Effect::SetConfig),
                _ => None,
            }
        }
        b'c' | b'C' | b'l' | b'L' if s.punct(at + 1, b'(') => {
            let name = token.name(s.text)?;
            matches!(name.as_str(), "currval" | "lastval").then_some(Effect::SequenceValue)
        }
        b'd' | b'D' if s.punct(at + 1, b'(') => {
            let name = token.name(s.text)?;
            let connects = matches!(name.as_str(), "dblink_connect" | "dblink_connect_u");
            connects.then_some(Effect::Unfollowed)
        }
        _ => None,
    }
}

/// `CREATE TEMP TABLE … ON COMMIT DROP` leaves nothing behind.
fn drops_at_commit(s: Words<'_>) -> bool {
    s.any(0, &["create"])
        && s.tokens.windows(3).any(|w| {
            w[0].is_word(s.text, "on")
                && w[1].is_word(s.text, "commit")
                && w[2].is_word(s.text, "drop")
        })
}

/// From the first argument of `set_config(name, value, is_local)` on: is the third plainly true?
fn sets_locally(s: Words<'_>, first: usize) -> bool {
    let (mut depth, mut commas) = (0_usize, 0);
    for at in first..s.tokens.len() {
        let token = s.tokens[at];
        match token.kind {
            Kind::Punct(b'(' | b'[') => depth += 1,
            Kind::Punct(b')' | b']') if depth == 0 => return false,
            Kind::Punct(b')' | b']') => depth -= 1,
            Kind::Punct(b',') if depth == 0 => commas += 1,
            _ => {}
        }
        if commas == 2 {
            let named = s.is(at + 1, "is_local")
                && (s.operator(at + 2, b"=>") || s.operator(at + 2, b":="));
            let value = if named { at + 3 } else { at + 1 };
            return s.is(value, "true") && s.punct(value + 1, b')');
        }
        // Named arguments may stand in any order: not worth following.
        if s.operator(at, b"=>") || s.operator(at, b":=") {
            let known = s.any(at.saturating_sub(1), &["setting_name", "new_value"]);
            if !known {
                return false;
            }
        }
    }
    false
}

/// Whether after LISTEN or UNLISTEN there stands one word, and one that can be a name by itself.
fn is_listenable(s: Words<'_>) -> bool {
    match s.tokens.get(1).map(|token| token.kind) {
        // Perhaps with a UESCAPE.
        Some(Kind::Exotic) => true,
        Some(Kind::Word) => s.tokens.len() == 2 && !s.any(1, NO_NAMES),
        _ => s.tokens.len() == 2,
    }
}

/// Does the body of a DO block do what would stay with the session? Dynamic SQL in it is out of sight.
fn body_touches_session(s: Words<'_>) -> bool {
    s.tokens.iter().any(|token| {
        if token.kind == Kind::Exotic {
            return true;
        }
        let Some(body) = token.literal(s.text) else {
            return token.kind == Kind::Text;
        };
        touches_session(body.as_bytes())
    })
}

fn touches_session(body: &[u8]) -> bool {
    let tokens: Vec<_> = Lexer::new(body).collect();
    let s = Words {
        text: body,
        tokens: &tokens,
    };
    (0..tokens.len()).any(|at| {
        let begins = at == 0
            || s.punct(at - 1, b';')
            || s.any(at - 1, &["begin", "then", "else", "loop"])
            || s.operator(at - 1, b">>");
        let statement = begins
            && s.any(
                at,
                &[
                    "set",
                    "reset",
                    "listen",
                    "unlisten",
                    "discard",
                    "load",
                    "prepare",
                    "deallocate",
                ],
            )
            && !(s.is(at, "set") && s.any(at + 1, &["local", "transaction", "constraints"]));
        statement
            || matches!(
                inner(s, at),
                Some(Effect::TempObject | Effect::AdvisorySession | Effect::SetConfig)
            )
    })
}

/// Keywords that are no names unless quoted: reserved ones, and those that may name types and functions only.
/// (sql-keywords-appendix.html)
const NO_NAMES: &[&str] = &[
    "all",
    "analyse",
    "analyze",
    "and",
    "any",
    "array",
    "as",
    "asc",
    "asymmetric",
    "authorization",
    "binary",
    "both",
    "case",
    "cast",
    "check",
    "collate",
    "collation",
    "column",
    "concurrently",
    "constraint",
    "create",
    "cross",
    "current_catalog",
    "current_date",
    "current_role",
    "current_schema",
    "current_time",
    "current_timestamp",
    "current_user",
    "default",
    "deferrable",
    "desc",
    "distinct",
    "do",
    "else",
    "end",
    "except",
    "false",
    "fetch",
    "for",
    "foreign",
    "freeze",
    "from",
    "full",
    "grant",
    "group",
    "having",
    "ilike",
    "in",
    "initially",
    "inner",
    "intersect",
    "into",
    "is",
    "isnull",
    "join",
    "lateral",
    "leading",
    "left",
    "like",
    "limit",
    "localtime",
    "localtimestamp",
    "natural",
    "not",
    "notnull",
    "null",
    "offset",
    "on",
    "only",
    "or",
    "order",
    "outer",
    "overlaps",
    "placing",
    "primary",
    "references",
    "returning",
    "right",
    "select",
    "session_user",
    "similar",
    "some",
    "symmetric",
    "system_user",
    "table",
    "tablesample",
    "then",
    "to",
    "trailing",
    "true",
    "union",
    "unique",
    "user",
    "using",
    "variadic",
    "verbose",
    "when",
    "where",
    "window",
    "with",
];
