//! A small lexer that cuts a text where Postgres' own (`scan.l`) cuts it: quotes, dollar quotes, nested comments,
//! operators, parameters. It says what the tokens are, never what they mean, and takes any bytes. Called by
//! `classify/mod.rs` for every text that is not plain at first sight, and by `classify/sql.rs`.
//!
//! Plain literals are read with `standard_conforming_strings` on. With it off a backslash means something else, so
//! `Lexer::odd` tells of one, and nothing that has one is ever taken for a read.

use memchr::{memchr, memchr2};

/// A token and where it stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Token {
    pub(super) kind: Kind,
    pub(super) start: usize,
    pub(super) end: usize,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// An unquoted identifier or keyword.
    Word,
    /// `"…"`
    Quoted,
    /// `'…'`, with its continuations on later lines.
    Text,
    /// `$tag$…$tag$`
    Dollar,
    /// `E'…'`, `U&'…'`, `N'…'`, `B'…'`, `X'…'`, `U&"…"`: nothing we have to look into.
    Exotic,
    /// `$1`
    Param(u16),
    Number,
    Operator,
    /// One of `( ) [ ] , ; : .`
    Punct(u8),
    /// A byte or a spelling that Postgres refuses, or that its versions read differently.
    Junk,
}

impl Token {
    pub(super) fn bytes(self, text: &[u8]) -> &[u8] {
        &text[self.start..self.end]
    }

    pub(super) fn is(self, byte: u8) -> bool {
        self.kind == Kind::Punct(byte)
    }

    /// Is it this unquoted word? `word` in lower case.
    pub(super) fn is_word(self, text: &[u8], word: &str) -> bool {
        self.kind == Kind::Word && self.bytes(text).eq_ignore_ascii_case(word.as_bytes())
    }

    /// The name this identifier stands for: folded if unquoted, unescaped if quoted. Only ASCII is folded, as Postgres
    /// does in every multi-byte encoding. `None`: no identifier, or one we can't read.
    pub(super) fn name(self, text: &[u8]) -> Option<String> {
        let bytes = self.bytes(text);
        match self.kind {
            Kind::Word => Some(std::str::from_utf8(bytes).ok()?.to_ascii_lowercase()),
            Kind::Quoted => {
                let inner = std::str::from_utf8(bytes.get(1..bytes.len() - 1)?).ok()?;
                Some(inner.replace("\"\"", "\""))
            }
            Kind::Text
            | Kind::Dollar
            | Kind::Exotic
            | Kind::Param(_)
            | Kind::Number
            | Kind::Operator
            | Kind::Punct(_)
            | Kind::Junk => None,
        }
    }

    /// Does this identifier stand for `name` (lower case)?
    pub(super) fn names(self, text: &[u8], name: &str) -> bool {
        let bytes = self.bytes(text);
        match self.kind {
            Kind::Word => bytes.eq_ignore_ascii_case(name.as_bytes()),
            Kind::Quoted => bytes.get(1..bytes.len() - 1) == Some(name.as_bytes()),
            Kind::Text
            | Kind::Dollar
            | Kind::Exotic
            | Kind::Param(_)
            | Kind::Number
            | Kind::Operator
            | Kind::Punct(_)
            | Kind::Junk => false,
        }
    }

    /// The value of a plain or dollar-quoted literal on one line.
    pub(super) fn literal(self, text: &[u8]) -> Option<String> {
        let bytes = self.bytes(text);
        match self.kind {
            Kind::Text => {
                let inner = std::str::from_utf8(bytes.get(1..bytes.len() - 1)?).ok()?;
                let continued = has_lone_quote(inner);
                (!continued).then(|| inner.replace("''", "'"))
            }
            Kind::Dollar => {
                let tag = memchr(b'$', &bytes[1..])? + 2;
                let inner = bytes.get(tag..bytes.len() - tag)?;
                std::str::from_utf8(inner).ok().map(str::to_owned)
            }
            Kind::Word
            | Kind::Quoted
            | Kind::Exotic
            | Kind::Param(_)
            | Kind::Number
            | Kind::Operator
            | Kind::Punct(_)
            | Kind::Junk => None,
        }
    }
}

fn has_lone_quote(inner: &str) -> bool {
    let mut rest = inner.as_bytes();
    while let Some(at) = memchr(b'\'', rest) {
        if rest.get(at + 1) != Some(&b'\'') {
            return true;
        }
        rest = &rest[at + 2..];
    }
    false
}

/// Walks a text token by token; ends at its end or where a quote or comment never closes.
pub(super) struct Lexer<'a> {
    text: &'a [u8],
    at: usize,
    odd: bool,
}

impl<'a> Lexer<'a> {
    pub(super) fn new(text: &'a [u8]) -> Self {
        Self {
            text,
            at: 0,
            odd: false,
        }
    }

    /// So far, has anything been seen that other versions, settings or encodings of Postgres might cut elsewhere?
    /// (Junk, what never closes, a backslash in a plain literal.)
    pub(super) fn odd(&self) -> bool {
        self.odd
    }

    fn peek(&self, ahead: usize) -> Option<u8> {
        self.text.get(self.at + ahead).copied()
    }

    /// Past white space and comments. `false`: a comment never closes.
    fn skip_blank(&mut self) -> bool {
        loop {
            match self.peek(0) {
                Some(b' ' | b'\t' | b'\n' | b'\r' | 0x0c) => self.at += 1,
                // White space from version 16 on, a syntax error before.
                Some(0x0b) => {
                    self.odd = true;
                    self.at += 1;
                }
                Some(b'-') if self.peek(1) == Some(b'-') => self.skip_line(),
                Some(b'/') if self.peek(1) == Some(b'*') => {
                    if !self.skip_block() {
                        return false;
                    }
                }
                _ => return true,
            }
        }
    }

    fn skip_line(&mut self) {
        let rest = &self.text[self.at..];
        self.at += memchr2(b'\n', b'\r', rest).unwrap_or(rest.len());
    }

    fn skip_block(&mut self) -> bool {
        let mut depth = 0_usize;
        while let Some(byte) = self.peek(0) {
            match (byte, self.peek(1)) {
                (b'/', Some(b'*')) => {
                    depth += 1;
                    self.at += 2;
                }
                (b'*', Some(b'/')) => {
                    depth -= 1;
                    self.at += 2;
                    if depth == 0 {
                        return true;
                    }
                }
                (b'/' | b'*', _) => self.at += 1,
                _ => {
                    let rest = &self.text[self.at..];
                    self.at += memchr2(b'/', b'*', rest).unwrap_or(rest.len());
                }
            }
        }
        false
    }

    /// From an opening quote to past its end; `""`/`''` doubled inside, and `\` escapes where `escapes`.
    fn quoted(&mut self, quote: u8, escapes: bool) -> bool {
        self.at += 1;
        loop {
            let rest = &self.text[self.at..];
            let Some(found) = memchr2(quote, b'\\', rest) else {
                self.at = self.text.len();
                return false;
            };
            self.at += found;
            if self.text[self.at] == b'\\' {
                if quote == b'\'' && !escapes {
                    self.odd = true;
                }
                self.at += if escapes { 2 } else { 1 };
                if self.at > self.text.len() {
                    self.at = self.text.len();
                    return false;
                }
            } else if self.peek(1) == Some(quote) {
                self.at += 2;
            } else {
                self.at += 1;
                return true;
            }
        }
    }

    /// A string literal and its continuations: quotes parted by white space with a line break are one literal, and the
    /// later parts escape as the first does.
    fn string(&mut self, escapes: bool) -> bool {
        loop {
            if !self.quoted(b'\'', escapes) {
                return false;
            }
            let Some(next) = self.continuation() else {
                return true;
            };
            self.at = next;
        }
    }

    fn continuation(&self) -> Option<usize> {
        let mut at = self.at;
        let mut line = false;
        loop {
            match self.text.get(at)? {
                b' ' | b'\t' | 0x0b | 0x0c => at += 1,
                b'\n' | b'\r' => {
                    line = true;
                    at += 1;
                }
                b'-' if line && self.text.get(at + 1) == Some(&b'-') => {
                    let rest = &self.text[at..];
                    at += memchr2(b'\n', b'\r', rest)?;
                }
                b'\'' if line => return Some(at),
                _ => return None,
            }
        }
    }

    /// After `$`: a dollar quote up to past its closing tag. `None`: no dollar quote begins here.
    fn dollar(&mut self) -> Option<bool> {
        let mut end = self.at + 1;
        if self.text.get(end).copied().is_some_and(is_ident_start) {
            end += 1;
            while self
                .text
                .get(end)
                .copied()
                .is_some_and(|b| is_ident_start(b) || b.is_ascii_digit())
            {
                end += 1;
            }
        }
        if self.text.get(end) != Some(&b'$') {
            return None;
        }
        let tag = &self.text[self.at..=end];
        let body = end + 1;
        match memchr::memmem::find(&self.text[body..], tag) {
            Some(found) => {
                self.at = body + found + tag.len();
                Some(true)
            }
            None => {
                self.at = self.text.len();
                Some(false)
            }
        }
    }

    fn word(&mut self) {
        while self.peek(0).is_some_and(is_ident_part) {
            self.at += 1;
        }
    }

    /// A decimal number. Other spellings (`0x1f`, `1_000`) differ between versions and are junk.
    fn number(&mut self) -> Kind {
        self.digits();
        if self.peek(0) == Some(b'.') && self.peek(1) != Some(b'.') {
            self.at += 1;
            self.digits();
        }
        if matches!(self.peek(0), Some(b'e' | b'E')) {
            let sign = usize::from(matches!(self.peek(1), Some(b'+' | b'-')));
            if self.peek(1 + sign).is_some_and(|b| b.is_ascii_digit()) {
                self.at += 1 + sign;
                self.digits();
            }
        }
        self.unless_trailing(Kind::Number)
    }

    fn digits(&mut self) {
        while self.peek(0).is_some_and(|b| b.is_ascii_digit()) {
            self.at += 1;
        }
    }

    /// `1a`, `$1a`: an error from version 15 on, two tokens before.
    fn unless_trailing(&mut self, kind: Kind) -> Kind {
        if self.peek(0).is_some_and(is_ident_part) {
            self.word();
            return Kind::Junk;
        }
        kind
    }

    /// Postgres' rules for operators: the longest run of operator characters that starts no comment; a run of several
    /// ends in `+` or `-` only if it has a character that SQL's own operators lack.
    fn operator(&mut self) {
        let start = self.at;
        while let Some(byte) = self.peek(0) {
            let comment = matches!(
                (byte, self.peek(1)),
                (b'-', Some(b'-')) | (b'/', Some(b'*'))
            );
            if !is_operator(byte) || (comment && self.at > start) {
                break;
            }
            self.at += 1;
        }
        let run = &self.text[start..self.at];
        let special = run.iter().any(|b| b"~!@#^&|`?%".contains(b));
        if !special {
            while self.at - start > 1 && matches!(self.text[self.at - 1], b'+' | b'-') {
                self.at -= 1;
            }
        }
    }
}

impl Iterator for Lexer<'_> {
    type Item = Token;

    fn next(&mut self) -> Option<Token> {
        if !self.skip_blank() {
            self.odd = true;
            return None;
        }
        let start = self.at;
        let byte = self.peek(0)?;
        let quote = self.peek(1);
        let (kind, closed) = match byte {
            b'\'' => (Kind::Text, self.string(false)),
            b'"' => (Kind::Quoted, self.quoted(b'"', false)),
            b'e' | b'E' if quote == Some(b'\'') => {
                self.at += 1;
                (Kind::Exotic, self.string(true))
            }
            b'b' | b'B' | b'x' | b'X' | b'n' | b'N' if quote == Some(b'\'') => {
                self.at += 1;
                (Kind::Exotic, self.string(false))
            }
            b'u' | b'U' if quote == Some(b'&') && matches!(self.peek(2), Some(b'\'' | b'"')) => {
                let identifier = self.peek(2) == Some(b'"');
                self.at += 2;
                let closed = if identifier {
                    self.quoted(b'"', false)
                } else {
                    self.string(false)
                };
                (Kind::Exotic, closed)
            }
            b'$' if quote.is_some_and(|b| b.is_ascii_digit()) => {
                self.at += 1;
                self.digits();
                let number = std::str::from_utf8(&self.text[start + 1..self.at]).ok();
                let kind = match number.and_then(|n| n.parse().ok()) {
                    Some(0) | None => Kind::Junk,
                    Some(n) => Kind::Param(n),
                };
                (self.unless_trailing(kind), true)
            }
            b'$' => match self.dollar() {
                Some(closed) => (Kind::Dollar, closed),
                None => {
                    self.at += 1;
                    (Kind::Junk, true)
                }
            },
            b'.' if quote.is_some_and(|b| b.is_ascii_digit()) => (self.number(), true),
            b'0'..=b'9' => (self.number(), true),
            b':' if matches!(quote, Some(b':' | b'=')) => {
                self.at += 2;
                (Kind::Operator, true)
            }
            b'(' | b')' | b'[' | b']' | b',' | b';' | b':' | b'.' => {
                self.at += 1;
                (Kind::Punct(byte), true)
            }
            _ if is_ident_start(byte) => {
                self.word();
                (Kind::Word, true)
            }
            _ if is_operator(byte) => {
                self.operator();
                (Kind::Operator, true)
            }
            _ => {
                self.at += 1;
                (Kind::Junk, true)
            }
        };
        if !closed {
            self.odd = true;
            return None;
        }
        if kind == Kind::Junk || (kind == Kind::Quoted && self.at - start == 2) {
            self.odd = true;
        }
        Some(Token {
            kind,
            start,
            end: self.at,
        })
    }
}

pub(super) fn is_ident_start(byte: u8) -> bool {
    byte.is_ascii_alphabetic() || byte == b'_' || byte >= 0x80
}

pub(super) fn is_ident_part(byte: u8) -> bool {
    is_ident_start(byte) || byte.is_ascii_digit() || byte == b'$'
}

fn is_operator(byte: u8) -> bool {
    b"~!@#^&|`?+-*/%<>=".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Tokens joined by `¦`, kinds by their first letters; a trailing `!` says odd.
    #[track_caller]
    fn check(text: &str, expected: &str) {
        let mut lexer = Lexer::new(text.as_bytes());
        let tokens: Vec<_> = lexer
            .by_ref()
            .map(|token| {
                let kind = format!("{:?}", token.kind);
                format!(
                    "{}{}",
                    &kind[..1],
                    String::from_utf8_lossy(token.bytes(text.as_bytes()))
                )
            })
            .collect();
        let odd = if lexer.odd() { "!" } else { "" };
        assert_eq!(format!("{}{odd}", tokens.join("¦")), expected, "{text}");
    }

    #[test]
    fn literals_end_where_postgres_ends_them() {
        check("'a''b' x", "T'a''b'¦Wx");
        check("'a\\' x", "T'a\\'¦Wx!");
        check("E'a\\'b' x", "EE'a\\'b'¦Wx");
        check("e'\\\\' x", "Ee'\\\\'¦Wx");
        check("E'a'\n'b\\'c' x", "EE'a'\n'b\\'c'¦Wx");
        check("'a' 'b'", "T'a'¦T'b'");
        check("'a' -- c\n 'b'", "T'a'¦T'b'");
        check("'a'\n -- c\n 'b' x", "T'a'\n -- c\n 'b'¦Wx");
        check(
            "U&'\\0041' b'1' X'f' n'x'",
            "EU&'\\0041'¦Eb'1'¦EX'f'¦En'x'!",
        );
        check("'open", "!");
        check("E'open\\", "!");
        check("E'open\\'", "!");
        check("note'x'", "Wnote¦T'x'");
    }

    #[test]
    fn dollar_quotes_need_their_own_tag() {
        check("$$a;b$$ x", "D$$a;b$$¦Wx");
        check("$a$ $b$ $$ $a$ x", "D$a$ $b$ $$ $a$¦Wx");
        check("$a$ $A$ x", "!");
        check("$1 $23", "P$1¦P$23");
        check("a$b$ c", "Wa$b$¦Wc");
        check("$1a$ x", "J$1a$¦Wx!");
        check("$0 $70000 $", "J$0¦J$70000¦J$!");
        check("$é$;$é$", "D$é$;$é$");
    }

    #[test]
    fn comments_nest_and_hide() {
        check("a/* ; /* ' */ \" */b", "Wa¦Wb");
        check("a--;'\nb--", "Wa¦Wb");
        check("a--x\rb", "Wa¦Wb");
        check("a /* open /* */", "Wa!");
        check("a/**/.b", "Wa¦P.¦Wb");
        check("/", "O/");
        check("1 */* c */ 2", "N1¦O*¦N2");
        check("1 +-- c\n2", "N1¦O+¦N2");
    }

    #[test]
    fn identifiers_numbers_and_operators() {
        check("\"a\"\"b\".\"C\"", "Q\"a\"\"b\"¦P.¦Q\"C\"");
        check("\"\\\" x", "Q\"\\\"¦Wx");
        check("U&\"\\0070gflow\" x", "EU&\"\\0070gflow\"¦Wx");
        check("naïve", "Wnaïve");
        check("1.5e-3+.5", "N1.5e-3¦O+¦N.5");
        check("1..2", "N1¦P.¦N.2");
        check("1e 0x1f 1_0", "J1e¦J0x1f¦J1_0!");
        check("a<-1", "Wa¦O<¦O-¦N1");
        check("a@-1 a->>'x'", "Wa¦O@-¦N1¦Wa¦O->>¦T'x'");
        check(
            "a::b a:=b a=>b a:b",
            "Wa¦O::¦Wb¦Wa¦O:=¦Wb¦Wa¦O=>¦Wb¦Wa¦P:¦Wb",
        );
        check("\u{1}", "J\u{1}!");
        check("\"\"", "Q\"\"!");
        check("a\u{b}b", "Wa¦Wb!");
    }

    #[test]
    fn names_fold_and_literals_unquote() {
        let text = b"\"A\"\"b\" AbC 'it''s' $q$o'k$q$ 'a'\n'b'";
        let tokens: Vec<_> = Lexer::new(text).collect();
        assert_eq!(tokens[0].name(text).as_deref(), Some("A\"b"));
        assert_eq!(tokens[1].name(text).as_deref(), Some("abc"));
        assert_eq!(tokens[2].literal(text).as_deref(), Some("it's"));
        assert_eq!(tokens[3].literal(text).as_deref(), Some("o'k"));
        assert_eq!(tokens[4].literal(text), None, "continued on another line");
        assert!(tokens[1].names(text, "abc") && !tokens[0].names(text, "a"));
    }
}
