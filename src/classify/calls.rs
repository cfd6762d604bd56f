//! Calls of pgflow's and pgmq's functions in a statement that is not a plain read: which class the statement is of, and
//! which run, flow or queue its arguments name. Goes by tokens, so any spelling of names, notation and casts is one.
//! Never says Read: that is `sql.rs`'s, with a stricter proof. Called by `classify/mod.rs`.

use super::lexer::{Kind, Token};
use super::{Arg, Feeds, Patience, PollRef, RunRef, StatementClass};
use crate::pgflow::functions::{Class, Function, function};
use crate::pgflow::ids;

/// `None`: no call here that would make the statement anything but a read or `Other`.
pub(super) fn class(text: &[u8], tokens: &[Token]) -> Option<(StatementClass, Arg)> {
    let first = tokens.first()?;
    let query = first.is_word(text, "select") || first.is_word(text, "with") || first.is(b'(');
    if !query
        || tokens
            .iter()
            .any(|token| CHANGES.iter().any(|word| token.is_word(text, word)))
    {
        return None;
    }
    let calls = find(text, tokens);
    let of = |class| calls.iter().find(|call| call.function.class == class);
    let poll = || of(Class::Poll);
    if of(Class::Write).is_some() {
        return Some((StatementClass::Other, Arg::Absent));
    }
    let chief = of(Class::Progress)
        .or_else(|| of(Class::Start))
        .or_else(|| of(Class::Define))
        .or_else(poll)?;
    // Where the call is all there is, its arguments tell what is written; otherwise anything may be.
    let alone = calls.len() == 1 && stands_alone(text, tokens, chief);
    let run = if alone { chief.run() } else { RunRef::All };
    let flow = if alone {
        chief.arg(chief.function.flow_arg())
    } else {
        Arg::Absent
    };
    let class = match chief.function.class {
        Class::Progress => StatementClass::Progress(run),
        Class::Start => StatementClass::Start(run),
        Class::Define => StatementClass::Define,
        Class::Poll if alone => chief
            .poll(text, tokens)
            .map_or(StatementClass::Other, StatementClass::Poll),
        Class::Poll | Class::Read | Class::Write => StatementClass::Other,
    };
    Some((class, flow))
}

/// Which queues a text may fill, as far as it says so.
pub(super) fn feeds(text: &[u8], statements: &[Vec<Token>], class: &StatementClass) -> Feeds {
    if matches!(class, StatementClass::Read(_) | StatementClass::Poll(_)) {
        return Feeds::Nothing;
    }
    let fed = statements
        .iter()
        .map(|tokens| feeds_of_statement(text, tokens));
    fed.fold(Feeds::Nothing, |all, fed| all.and(&fed))
}

fn feeds_of_statement(text: &[u8], tokens: &[Token]) -> Feeds {
    let ours = |token: &Token| token.names(text, "pgmq") || token.names(text, "pgflow");
    if !tokens.iter().any(ours) {
        return Feeds::Nothing;
    }
    let first = tokens.first();
    let query = first.is_some_and(|first| {
        first.is_word(text, "select") || first.is_word(text, "with") || first.is(b'(')
    });
    let changes = |token: &Token| CHANGES.iter().any(|word| token.is_word(text, word));
    if !query || tokens.iter().any(changes) {
        return Feeds::Any;
    }
    let fed = find(text, tokens);
    fed.iter()
        .fold(Feeds::Nothing, |all, call| all.and(&call.feeds()))
}

/// Statements of these kinds inside make a SELECT more than its calls.
const CHANGES: &[&str] = &["insert", "update", "delete", "merge", "into"];

struct Call {
    function: &'static Function,
    /// Each argument with its place in the function's list.
    args: Vec<(usize, Arg)>,
    /// For each argument, the tokens it is written in.
    spans: Vec<(usize, usize)>,
    /// The first token of the name, and the one after the closing parenthesis.
    tokens: (usize, usize),
    /// All arguments found their place.
    understood: bool,
}

impl Call {
    fn arg(&self, place: Option<usize>) -> Arg {
        let found = place.and_then(|place| self.args.iter().find(|(at, _)| *at == place));
        found.map_or(Arg::Absent, |(_, arg)| arg.clone())
    }

    fn run(&self) -> RunRef {
        let Some(place) = self.function.run_arg() else {
            // Tasks and messages of a queue, of whichever runs.
            return RunRef::All;
        };
        match self.arg(Some(place)) {
            Arg::Literal(text) => ids::run_id(&text).map_or(RunRef::All, RunRef::Literal),
            Arg::Param(n) => RunRef::Param(n),
            Arg::Absent | Arg::Null | Arg::Expression => RunRef::All,
        }
    }

    fn poll(&self, text: &[u8], tokens: &[Token]) -> Option<PollRef> {
        let place = |name: &str| self.function.args.iter().position(|arg| *arg == name);
        let named = |name: &str| self.arg(place(name));
        let simple = self.understood && self.args.iter().all(|(_, arg)| *arg != Arg::Expression);
        if !simple || named("conditional") != Arg::Absent {
            return None;
        }
        Some(PollRef {
            queue: named("queue_name"),
            vt: named("vt"),
            qty: named("qty"),
            max_poll_seconds: named("max_poll_seconds"),
            poll_interval_ms: named("poll_interval_ms"),
            patience: self.patience(text, tokens, place("max_poll_seconds")),
        })
    }

    /// Only of a call that does what it is known to do: the deprecated `poll_for_tasks` does not wait.
    fn patience(&self, text: &[u8], tokens: &[Token], place: Option<usize>) -> Option<Patience> {
        if self.function.name != "read_with_poll" {
            return None;
        }
        let given = self.args.iter().position(|(at, _)| Some(*at) == place);
        let Some(given) = given else {
            let close = tokens.get(self.tokens.1.checked_sub(1)?)?;
            return Some(Patience::Missing { at: close.start });
        };
        let (start, end) = *self.spans.get(given)?;
        let written = tokens.get(start..end)?;
        match &self.args.get(given)?.1 {
            // The value leaves with its cast, so that must be one that could not have failed.
            Arg::Literal(_) if is_plain_integer(text, written) => Some(Patience::Written {
                start: written.first()?.start,
                end: written.last()?.end,
            }),
            Arg::Param(number) => {
                let same = |token: &&Token| token.kind == Kind::Param(*number);
                let alone = tokens.iter().filter(same).count() == 1;
                alone.then_some(Patience::Bound(*number))
            }
            Arg::Literal(_) | Arg::Absent | Arg::Null | Arg::Expression => None,
        }
    }

    fn feeds(&self) -> Feeds {
        let one = |place: Option<usize>| match self.arg(place) {
            Arg::Literal(queue) => Feeds::Queue(queue.to_ascii_lowercase()),
            Arg::Absent | Arg::Null | Arg::Param(_) | Arg::Expression => Feeds::Any,
        };
        match (self.function.class, self.function.name) {
            (Class::Read | Class::Poll, _)
            | (Class::Progress, "start_tasks" | "archive" | "delete")
            | (Class::Write, "read" | "pop" | "create" | "create_unlogged")
            | (Class::Define, "create_flow" | "add_step") => Feeds::Nothing,
            (Class::Start, _)
            | (Class::Progress, "set_vt" | "set_vt_batch")
            | (Class::Write, "send" | "send_batch") => one(self.function.queue_arg()),
            (Class::Progress | Class::Define | Class::Write, _) => Feeds::Any,
        }
    }
}

/// `2`, or `2::int`.
fn is_plain_integer(text: &[u8], tokens: &[Token]) -> bool {
    let integer = |token: &Token| {
        ["int", "integer", "int4"]
            .iter()
            .any(|name| token.is_word(text, name))
    };
    match tokens {
        [_] => true,
        [_, cast, kind] => is_cast(text, *cast) && integer(kind),
        _ => false,
    }
}

fn find(text: &[u8], tokens: &[Token]) -> Vec<Call> {
    let mut calls = Vec::new();
    for at in 0..tokens.len().saturating_sub(3) {
        if !tokens[at + 1].is(b'.')
            || !tokens[at + 3].is(b'(')
            || (at > 0 && tokens[at - 1].is(b'.'))
        {
            continue;
        }
        let schema = ["pgflow", "pgmq"]
            .into_iter()
            .find(|schema| tokens[at].names(text, schema));
        let (Some(schema), Some(name)) = (schema, tokens[at + 2].name(text)) else {
            continue;
        };
        let Some(function) = function(schema, &name) else {
            continue;
        };
        calls.push(read_call(text, tokens, at, function));
    }
    calls
}

fn read_call(text: &[u8], tokens: &[Token], at: usize, function: &'static Function) -> Call {
    let mut call = Call {
        function,
        args: Vec::new(),
        spans: Vec::new(),
        tokens: (at, tokens.len()),
        understood: true,
    };
    let open = at + 4;
    let (mut depth, mut start) = (0_usize, open);
    for (n, token) in tokens.iter().enumerate().skip(open) {
        match token.kind {
            Kind::Punct(b'(' | b'[') => depth += 1,
            Kind::Punct(b')') if depth == 0 => {
                if n > open {
                    call.take(text, tokens, start, n);
                }
                call.tokens.1 = n + 1;
                return call;
            }
            Kind::Punct(b')' | b']') => depth = depth.saturating_sub(1),
            Kind::Punct(b',') if depth == 0 => {
                call.take(text, tokens, start, n);
                start = n + 1;
            }
            _ => {}
        }
    }
    call.understood = false;
    call
}

impl Call {
    /// The argument written in the tokens from `start` to `end`.
    fn take(&mut self, text: &[u8], all: &[Token], start: usize, end: usize) {
        let tokens = &all[start..end];
        let named = tokens.get(1).is_some_and(|token| {
            token.kind == Kind::Operator && matches!(token.bytes(text), b"=>" | b":=")
        });
        if !named {
            self.args.push((self.args.len(), value(text, tokens)));
            self.spans.push((start, end));
            return;
        }
        let place = tokens[0]
            .name(text)
            .and_then(|name| self.function.args.iter().position(|arg| *arg == name));
        match place {
            Some(place) => {
                self.args.push((place, value(text, &tokens[2..])));
                self.spans.push((start + 2, end));
            }
            None => self.understood = false,
        }
    }
}

/// `$1`, `'x'`, `2`, `null`, in parentheses or cast as often as one likes.
fn value(text: &[u8], tokens: &[Token]) -> Arg {
    match tokens {
        [open, inner @ .., close] if open.is(b'(') && close.is(b')') => value(text, inner),
        [token] => match token.kind {
            Kind::Param(n) => Arg::Param(n),
            Kind::Text | Kind::Dollar => token.literal(text).map_or(Arg::Expression, Arg::Literal),
            Kind::Number => std::str::from_utf8(token.bytes(text))
                .map_or(Arg::Expression, |n| Arg::Literal(n.into())),
            Kind::Word if token.is_word(text, "null") => Arg::Null,
            Kind::Word
            | Kind::Quoted
            | Kind::Exotic
            | Kind::Operator
            | Kind::Punct(_)
            | Kind::Junk => Arg::Expression,
        },
        [kind, literal] if is_type(text, *kind) => match literal.kind {
            Kind::Text | Kind::Dollar => {
                literal.literal(text).map_or(Arg::Expression, Arg::Literal)
            }
            Kind::Word
            | Kind::Quoted
            | Kind::Exotic
            | Kind::Param(_)
            | Kind::Number
            | Kind::Operator
            | Kind::Punct(_)
            | Kind::Junk => Arg::Expression,
        },
        [cast, open, inner @ .., kw, kind, close]
            if cast.is_word(text, "cast")
                && open.is(b'(')
                && close.is(b')')
                && kw.is_word(text, "as")
                && is_type(text, *kind) =>
        {
            value(text, inner)
        }
        [inner @ .., operator, kind] if is_cast(text, *operator) && is_type(text, *kind) => {
            value(text, inner)
        }
        [inner @ .., operator, kind, open, close]
            if is_cast(text, *operator)
                && is_type(text, *kind)
                && open.is(b'[')
                && close.is(b']') =>
        {
            value(text, inner)
        }
        _ => Arg::Expression,
    }
}

fn is_cast(text: &[u8], token: Token) -> bool {
    token.kind == Kind::Operator && token.bytes(text) == b"::"
}

/// Types whose casts leave a value what it was.
fn is_type(text: &[u8], token: Token) -> bool {
    [
        "uuid", "text", "varchar", "int", "integer", "int4", "int8", "bigint", "jsonb",
    ]
    .iter()
    .any(|name| token.is_word(text, name))
}

/// `SELECT [columns FROM] call [[AS] alias]` and nothing more, all arguments plain.
fn stands_alone(text: &[u8], tokens: &[Token], call: &Call) -> bool {
    let (start, end) = call.tokens;
    let head = &tokens[..start];
    let simple = |token: &Token| match token.kind {
        Kind::Word | Kind::Quoted => true,
        Kind::Operator => token.bytes(text) == b"*",
        Kind::Punct(byte) => matches!(byte, b',' | b'.'),
        Kind::Text | Kind::Dollar | Kind::Exotic | Kind::Param(_) | Kind::Number | Kind::Junk => {
            false
        }
    };
    let head_fits = match head {
        [select] => select.is_word(text, "select"),
        [select, columns @ .., from] => {
            select.is_word(text, "select")
                && from.is_word(text, "from")
                && columns.iter().all(simple)
        }
        [] => false,
    };
    let name = |token: &Token| matches!(token.kind, Kind::Word | Kind::Quoted);
    let tail_fits = match &tokens[end..] {
        [] => true,
        [alias] => name(alias),
        [kw, alias] => kw.is_word(text, "as") && name(alias),
        _ => false,
    };
    // One `(` of its own; others are casts and groupings, which `value` has seen through.
    head_fits
        && tail_fits
        && call.understood
        && call.args.iter().all(|(_, arg)| *arg != Arg::Expression)
}
