//! The console's commands as text: split at semicolons, comments and quotes respected, words in any case, and read into a
//! `Command`. Pure. Knows PgBouncer's words, never what they do.

use super::tables::Show;
use crate::client::shared::Manner;
use crate::wire::error_response::ErrorResponse;

/// What any server would say of itself.
pub(super) const PARAMETERS: [(&str, &str); 9] = [
    (
        "server_version",
        concat!(env!("CARGO_PKG_VERSION"), "/flowgate"),
    ),
    ("client_encoding", "UTF8"),
    ("server_encoding", "UTF8"),
    ("DateStyle", "ISO, MDY"),
    ("TimeZone", "UTC"),
    ("standard_conforming_strings", "on"),
    ("integer_datetimes", "on"),
    ("is_superuser", "off"),
    ("transaction_isolation", "read committed"),
];

/// What an admin asks for. `None` of a database: all of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Command {
    Show(Show, Option<String>),
    /// `SHOW server_version` and the like, as drivers ask any server: what it is.
    ShowParameter(&'static str),
    Pause(Option<String>),
    Resume(Option<String>),
    Reconnect(Option<String>),
    Disable(String),
    Enable(String),
    Kill(Option<String>),
    KillClient(u64),
    WaitClose(Option<String>),
    Reload,
    Shutdown(Manner),
    Begin,
    Commit,
    Rollback,
    /// What drivers say to any server on connecting and resetting: accepted, nothing changes. The command tag.
    Nothing(&'static str),
}

impl Command {
    /// Whether it changes nothing, and so is for those who may only look.
    pub(super) fn only_looks(&self) -> bool {
        match self {
            Self::Show(..)
            | Self::ShowParameter(_)
            | Self::Begin
            | Self::Commit
            | Self::Rollback
            | Self::Nothing(_) => true,
            Self::Pause(_)
            | Self::Resume(_)
            | Self::Reconnect(_)
            | Self::Disable(_)
            | Self::Enable(_)
            | Self::Kill(_)
            | Self::KillClient(_)
            | Self::WaitClose(_)
            | Self::Reload
            | Self::Shutdown(_) => false,
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Word {
    /// As written.
    Bare(String),
    /// `"…"` or `'…'`
    Quoted(String),
    Sign(char),
}

/// Every command of a text, up to the first that cannot be read.
pub(super) fn read(text: &str) -> (Vec<Command>, Option<ErrorResponse>) {
    let mut commands = Vec::new();
    let statements = match split(text) {
        Ok(statements) => statements,
        Err(error) => return (commands, Some(error)),
    };
    for (words, source) in statements {
        match command(&words, source) {
            Ok(command) => commands.push(command),
            Err(error) => return (commands, Some(error)),
        }
    }
    (commands, None)
}

fn unknown(source: &str) -> ErrorResponse {
    let shown: String = source.chars().take(80).collect();
    ErrorResponse::error("42601", format!("invalid command '{shown}'"))
        .with_hint("SHOW HELP lists the console's commands.")
}

fn command(words: &[Word], source: &str) -> Result<Command, ErrorResponse> {
    let bare = |at: usize| match words.get(at) {
        Some(Word::Bare(word)) => word.to_ascii_uppercase(),
        Some(Word::Quoted(_) | Word::Sign(_)) | None => String::new(),
    };
    let name = |at: usize| match words.get(at) {
        Some(Word::Bare(name) | Word::Quoted(name)) => Some(name.clone()),
        Some(Word::Sign(_)) | None => None,
    };
    let unknown = || unknown(source);
    let with_database = |make: fn(Option<String>) -> Command| match words.len() {
        1 => Ok(make(None)),
        2 => name(1)
            .map(|database| make(Some(database)))
            .ok_or_else(unknown),
        _ => Err(unknown()),
    };
    let of_database = |make: fn(String) -> Command| match (words.len(), name(1)) {
        (2, Some(database)) => Ok(make(database)),
        (1, _) => Err(ErrorResponse::error("42601", "a database name is required")),
        _ => Err(unknown()),
    };
    match (bare(0).as_str(), bare(1).as_str(), words.len()) {
        ("SHOW", _, 2 | 3) => match (Show::named(&bare(1)), words.len()) {
            (Some(show), 2) => Ok(Command::Show(show, None)),
            (Some(show), 3) => match name(2) {
                Some(wanted) if show.takes_argument() => Ok(Command::Show(show, Some(wanted))),
                Some(_) | None => Err(unknown()),
            },
            (None, 2) => parameter(&bare(1)).ok_or_else(unknown),
            _ => Err(unknown()),
        },
        ("SHOW", "TRANSACTION", 4) => parameter("transaction_isolation").ok_or_else(unknown),
        ("PAUSE", ..) => with_database(Command::Pause),
        ("RESUME", ..) => with_database(Command::Resume),
        ("RECONNECT", ..) => with_database(Command::Reconnect),
        ("KILL", ..) => with_database(Command::Kill),
        ("WAIT_CLOSE", ..) => with_database(Command::WaitClose),
        ("DISABLE", ..) => of_database(Command::Disable),
        ("ENABLE", ..) => of_database(Command::Enable),
        ("KILL_CLIENT", _, 2) => {
            // As SHOW CLIENTS has it under `id`, or under `ptr`.
            let wanted = name(1).unwrap_or_default();
            let number = wanted.strip_prefix(['C', 'c']).unwrap_or(&wanted).parse();
            number.map(Command::KillClient).map_err(|_not_a_number| {
                ErrorResponse::error("42601", format!("invalid client id '{wanted}'"))
                    .with_hint("SHOW CLIENTS has it in column id.")
            })
        }
        ("RELOAD", _, 1) => Ok(Command::Reload),
        ("SHUTDOWN", _, 1) => Ok(Command::Shutdown(Manner::Now)),
        ("SHUTDOWN", "WAIT_FOR_SERVERS", 2) => Ok(Command::Shutdown(Manner::WhenServersFree)),
        ("SHUTDOWN", "WAIT_FOR_CLIENTS", 2) => Ok(Command::Shutdown(Manner::WhenClientsLeft)),
        ("BEGIN" | "START", ..) => Ok(Command::Begin),
        ("COMMIT" | "END", ..) => Ok(Command::Commit),
        ("ROLLBACK" | "ABORT", ..) => Ok(Command::Rollback),
        ("SET", ..) => Ok(Command::Nothing("SET")),
        ("RESET", ..) => Ok(Command::Nothing("RESET")),
        ("DISCARD", "ALL", 2) => Ok(Command::Nothing("DISCARD ALL")),
        ("DEALLOCATE", "ALL", 2) => Ok(Command::Nothing("DEALLOCATE ALL")),
        ("UNLISTEN", ..) => Ok(Command::Nothing("UNLISTEN")),
        ("CLOSE", "ALL", 2) => Ok(Command::Nothing("CLOSE CURSOR ALL")),
        _ => Err(unknown()),
    }
}

fn parameter(name: &str) -> Option<Command> {
    let mut known = PARAMETERS.iter();
    let found = known.find(|(known, _)| known.eq_ignore_ascii_case(name));
    found.map(|(_, value)| Command::ShowParameter(value))
}

type Statement<'a> = (Vec<Word>, &'a str);

/// The words of each statement that has any, and its text.
fn split<'a>(text: &'a str) -> Result<Vec<Statement<'a>>, ErrorResponse> {
    let mut statements = Vec::new();
    let mut words = Vec::new();
    let (mut begin, mut at) = (0, 0);
    let mut end_statement = |words: &mut Vec<Word>, source: &'a str| {
        if !words.is_empty() {
            statements.push((std::mem::take(words), source.trim()));
        }
    };
    while let Some(next) = rest(text, at).chars().next() {
        let here = rest(text, at);
        let length = match next {
            ';' => {
                end_statement(
                    &mut words,
                    rest(text, begin).get(..at - begin).unwrap_or_default(),
                );
                begin = at + 1;
                1
            }
            _ if next.is_whitespace() => next.len_utf8(),
            '-' if here.starts_with("--") => here.find('\n').unwrap_or(here.len()),
            '/' if here.starts_with("/*") => comment(here)
                .ok_or_else(|| ErrorResponse::error("42601", "unterminated /* comment"))?,
            '"' | '\'' => {
                let (word, length) = quoted(here, next)
                    .ok_or_else(|| ErrorResponse::error("42601", "unterminated quoted string"))?;
                words.push(Word::Quoted(word));
                length
            }
            _ if is_word(next) => {
                let length = here.find(|c| !is_word(c)).unwrap_or(here.len());
                words.push(Word::Bare(
                    here.get(..length).unwrap_or_default().to_owned(),
                ));
                length
            }
            sign => {
                words.push(Word::Sign(sign));
                sign.len_utf8()
            }
        };
        at += length;
    }
    end_statement(&mut words, rest(text, begin));
    Ok(statements)
}

fn rest(text: &str, at: usize) -> &str {
    text.get(at..).unwrap_or_default()
}

/// Names of databases have dashes and dots more often than the console has operators.
fn is_word(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '-' | '.' | '$' | '@' | '%')
}

/// The length of the comment `text` begins with, those inside it counted. (sql-syntax-lexical.html#SQL-SYNTAX-COMMENTS)
fn comment(text: &str) -> Option<usize> {
    let (mut depth, mut at) = (0, 0);
    while let Some(next) = text.get(at..).filter(|rest| !rest.is_empty()) {
        if next.starts_with("/*") {
            depth += 1;
            at += 2;
        } else if next.starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return Some(at);
            }
        } else {
            at += next.chars().next().map_or(1, char::len_utf8);
        }
    }
    None
}

/// What stands between quotes, a doubled one for itself, and how long it is with them.
fn quoted(text: &str, quote: char) -> Option<(String, usize)> {
    let mut word = String::new();
    let mut chars = text.char_indices().skip(1).peekable();
    while let Some((at, c)) = chars.next() {
        if c != quote {
            word.push(c);
        } else if chars.next_if(|(_, next)| *next == quote).is_some() {
            word.push(quote);
        } else {
            return Some((word, at + 1));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, expected: &[Command]) {
        let (commands, error) = read(text);
        assert_eq!((commands.as_slice(), error), (expected, None), "{text}");
    }

    #[track_caller]
    fn refuse(text: &str, message: &str) {
        let (_, error) = read(text);
        let error = error.unwrap_or_else(|| panic!("{text} was understood"));
        assert_eq!((&*error.code, error.message.as_str()), ("42601", message));
    }

    #[test]
    fn commands_are_read_in_any_case_with_comments_and_semicolons() {
        let version = Command::Show(Show::Version, None);
        for text in [
            "SHOW VERSION",
            "  show Version ;",
            "-- hi\n sHow /* x /* y */ */ version;;",
        ] {
            check(text, std::slice::from_ref(&version));
        }
        check("", &[]);
        check(" ; -- nothing", &[]);
        check(
            "PAUSE app; show version; RESUME \"my;db\"",
            &[
                Command::Pause(Some("app".into())),
                version,
                Command::Resume(Some("my;db".into())),
            ],
        );
    }

    #[test]
    fn databases_are_named_as_they_are_spelled() {
        check("pause My-App.2", &[Command::Pause(Some("My-App.2".into()))]);
        check(
            "kill \"a \"\"b\"\"\"",
            &[Command::Kill(Some("a \"b\"".into()))],
        );
        check("kill", &[Command::Kill(None)]);
        refuse("disable", "a database name is required");
        refuse("pause a b", "invalid command 'pause a b'");
    }

    #[test]
    fn clients_are_named_by_number() {
        check("kill_client 17", &[Command::KillClient(17)]);
        check("KILL_CLIENT C17;", &[Command::KillClient(17)]);
        refuse("kill_client x", "invalid client id 'x'");
    }

    #[test]
    fn shutdown_comes_in_three_manners() {
        check("shutdown", &[Command::Shutdown(Manner::Now)]);
        check(
            "shutdown wait_for_servers",
            &[Command::Shutdown(Manner::WhenServersFree)],
        );
        check(
            "SHUTDOWN WAIT_FOR_CLIENTS",
            &[Command::Shutdown(Manner::WhenClientsLeft)],
        );
        refuse("shutdown later", "invalid command 'shutdown later'");
    }

    #[test]
    fn what_drivers_say_to_any_server_is_accepted() {
        check(
            "SET extra_float_digits = 3; begin; show server_version; commit",
            &[
                Command::Nothing("SET"),
                Command::Begin,
                Command::ShowParameter(PARAMETERS[0].1),
                Command::Commit,
            ],
        );
        check("DISCARD ALL", &[Command::Nothing("DISCARD ALL")]);
    }

    #[test]
    fn what_stands_before_a_mistake_is_read() {
        let (commands, error) = read("show pools; select 1; show pools");
        assert_eq!(commands, [Command::Show(Show::Pools, None)]);
        assert_eq!(
            error.map(|error| error.message),
            Some("invalid command 'select 1'".into())
        );
        refuse("show stats 'x", "unterminated quoted string");
        refuse("show /* version", "unterminated /* comment");
        refuse("show nothing", "invalid command 'show nothing'");
        refuse("show pools x", "invalid command 'show pools x'");
    }
}
