//! Who said what: the file, then `FLOWGATE_<SECTION>__<KEY>`, then the flags of `serve`, laid over each other key by key.
//! Knows the type of each key (from `raw.rs`) but not what a value means. Called by `check.rs`.
//!
//! Why not one `toml::from_str::<raw::File>`: serde stops at the first problem and an operator wants all of them. So each
//! key is tried alone, and what serde accepts is collected.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use super::raw;

const ENV_PREFIX: &str = "FLOWGATE_";
/// What a wrong value of these says must not end up in a log.
const SECRETS: [&str; 4] = [
    "primary.url",
    "replica.url",
    "http.jwt_secret",
    "http.api_keys",
];

/// The flags of `serve`, as typed.
#[derive(Clone, Default)]
pub struct Flags {
    pub listen: Option<String>,
    pub http: Option<String>,
    pub primary: Option<String>,
    /// Any number; together they replace the file's.
    pub replicas: Vec<String>,
    pub auth: Option<String>,
    pub pool_size: Option<String>,
    pub log: Option<String>,
}

/// Every problem at once.
#[derive(Debug, PartialEq, Eq)]
pub struct ConfigError {
    pub problems: Vec<Problem>,
}

/// One thing to put right.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// `pool.size`, `replica[1].url`; empty if the file is not TOML at all.
    pub key_path: String,
    pub message: String,
    pub source: Source,
}

/// Who gave a value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Source {
    /// Nobody: the default, or nothing at all.
    #[default]
    Unsaid,
    File {
        path: PathBuf,
        line: Option<usize>,
    },
    Env(String),
    Flag(&'static str),
}

impl std::error::Error for ConfigError {}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.problems.len() {
            1 => write!(f, "1 problem in the configuration:")?,
            many => write!(f, "{many} problems in the configuration:")?,
        }
        self.problems
            .iter()
            .try_for_each(|problem| write!(f, "\n  {problem}"))
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.key_path.is_empty() {
            write!(f, "{}: ", printable(&self.key_path))?;
        }
        f.write_str(&printable(&self.message))?;
        match &self.source {
            Source::Unsaid => Ok(()),
            Source::File {
                path,
                line: Some(line),
            } => write!(f, " ({}:{line})", path.display()),
            Source::File { path, line: None } => write!(f, " ({})", path.display()),
            Source::Env(name) => write!(f, " ({name})"),
            Source::Flag(name) => write!(f, " ({name})"),
        }
    }
}

/// The process's environment, as `from_sources` takes it.
pub fn environment() -> impl Iterator<Item = (String, String)> {
    // Lossy: a value that is not UTF-8 is then refused by its key's own check, where `vars()` would panic.
    let text = |text: std::ffi::OsString| text.to_string_lossy().into_owned();
    std::env::vars_os().map(move |(name, value)| (text(name), text(value)))
}

/// The layers collapsed: each key's last value, who gave it, and what was wrong on the way.
pub(super) struct Layers {
    known: BTreeSet<String>,
    table: Table,
    sources: BTreeMap<String, Source>,
    pub(super) problems: Vec<Problem>,
}

impl Layers {
    pub(super) fn new() -> Self {
        Self {
            known: raw::key_paths(),
            table: Table::new(),
            sources: BTreeMap::new(),
            problems: Vec::new(),
        }
    }

    pub(super) fn file(&mut self, path: &Path, text: &str) {
        let (spans, errors) = DeTable::parse_recoverable(text);
        if !errors.is_empty() {
            return self.not_toml(path, text, &errors);
        }
        let source = |offset| Source::File {
            path: path.into(),
            line: Some(line_of(text, offset)),
        };
        // The second reading finds what the first leaves as text, such as an integer too large.
        let mut values: Table = match toml::from_str(text) {
            Ok(values) => values,
            Err(error) => return self.not_toml(path, text, &[error]),
        };
        for (section, spanned) in spans.get_ref() {
            let name = section.get_ref().as_ref();
            let value = values
                .remove(name)
                .unwrap_or_else(|| Value::Table(Table::new()));
            let here = source(section.span().start);
            let (tables, lines) = match (name, value, spanned.get_ref()) {
                (list, Value::Array(bodies), DeValue::Array(lines)) if is_list(list) => {
                    (bodies, lines.iter().collect())
                }
                (list, Value::Table(_), _) if is_list(list) => {
                    let words = format!("is a list: write [[{list}]], once for each");
                    self.problem(list, &words, here);
                    continue;
                }
                (_, body, _) => (vec![body], vec![spanned]),
            };
            if !self.known.iter().any(|key| {
                key.split_once('.')
                    .is_some_and(|(section, _)| section == name)
            }) {
                let hint = self.nearest(name);
                self.problem(name, &format!("unknown{hint}"), here);
                continue;
            }
            for (index, (body, lines)) in tables.into_iter().zip(lines).enumerate() {
                let place = if is_list(name) {
                    format!("{name}[{index}]")
                } else {
                    name.to_owned()
                };
                let (Value::Table(body), DeValue::Table(lines)) = (body, lines.get_ref()) else {
                    self.problem(&place, "is a section, not a value", here.clone());
                    continue;
                };
                if is_list(name) {
                    self.append(name);
                }
                for (key, value) in body {
                    let line = lines
                        .get(key.as_str())
                        .map_or(here.clone(), |value| source(value.span().start));
                    self.set(name, &key, [value], line, &place);
                }
            }
        }
    }

    fn not_toml(&mut self, path: &Path, text: &str, errors: &[toml::de::Error]) {
        self.problems.extend(errors.iter().map(|error| Problem {
            key_path: String::new(),
            message: format!(
                "not TOML: {}",
                error.message().trim_end().replace('\n', ", ")
            ),
            source: Source::File {
                path: path.into(),
                line: error.span().map(|span| line_of(text, span.start)),
            },
        }));
    }

    pub(super) fn env(&mut self, variables: impl Iterator<Item = (String, String)>) {
        // Sorted, so that the same mistakes read the same each time. What has no `__` (FLOWGATE_PG_BIN) is not a key.
        let ours: BTreeMap<String, String> = variables
            .filter(|(name, _)| name.starts_with(ENV_PREFIX))
            .collect();
        for (name, text) in ours {
            let lower = name[ENV_PREFIX.len()..].to_ascii_lowercase();
            let Some((section, key)) = lower.split_once("__") else {
                continue;
            };
            // Empty is unsaid, as compose files leave it; `""` in quotes is an empty string.
            if text.is_empty() {
                continue;
            }
            let source = Source::Env(name.clone());
            if (section, key) == ("replica", "url") {
                self.replicas(text.split_whitespace(), &source);
            } else if section == "access" || section == "role" {
                let words = "is a list in order, which variables cannot say: write it in the file";
                self.problem(section, words, source);
            } else {
                self.set(section, key, readings(&text), source, section);
            }
        }
    }

    pub(super) fn flags(&mut self, flags: Flags) {
        let Flags {
            listen,
            http,
            primary,
            replicas,
            auth,
            pool_size,
            log,
        } = flags;
        for (section, key, flag, text) in [
            ("listen", "postgres", "--listen", listen),
            ("listen", "http", "--http", http),
            ("primary", "url", "--primary", primary),
            ("auth", "method", "--auth", auth),
            ("pool", "size", "--pool-size", pool_size),
            ("log", "filter", "--log", log),
        ] {
            if let Some(text) = text {
                self.set(section, key, readings(&text), Source::Flag(flag), section);
            }
        }
        if !replicas.is_empty() {
            self.replicas(
                replicas.iter().map(String::as_str),
                &Source::Flag("--replica"),
            );
        }
    }

    /// The result, with every value of the right type, and who gave each.
    pub(super) fn finish(self) -> (raw::File, BTreeMap<String, Source>, Vec<Problem>) {
        let file = Value::Table(self.table)
            .try_into()
            .expect("each key was accepted alone");
        (file, self.sources, self.problems)
    }

    /// Takes the first reading that `raw.rs` accepts; the last one's refusal is reported.
    fn set(
        &mut self,
        section: &str,
        key: &str,
        readings: impl IntoIterator<Item = Value>,
        source: Source,
        place: &str,
    ) {
        let path = format!("{section}.{key}");
        let shown = format!("{place}.{key}");
        if !self.known.contains(&path) {
            let hint = self.nearest(&path);
            return self.problem(&shown, &format!("unknown key{hint}"), source);
        }
        let mut refusal = String::new();
        for value in readings {
            let body = Table::from_iter([(key.to_owned(), value)]);
            match accepted(section, &body) {
                Ok(()) => {
                    self.sources.insert(shown, source);
                    let section = self
                        .table
                        .entry(section)
                        .or_insert_with(|| Value::Table(Table::new()));
                    // Of a list, the one appended last.
                    let last = if let Value::Array(list) = section {
                        list.last_mut()
                    } else {
                        Some(section)
                    };
                    last.and_then(Value::as_table_mut)
                        .expect("only tables are put here")
                        .extend(body);
                    return;
                }
                Err(message) => refusal = message,
            }
        }
        if SECRETS.contains(&path.as_str()) {
            refusal = "has the wrong type".to_owned();
        }
        self.problem(&shown, &refusal, source);
    }

    /// A layer's replicas take the place of all below.
    fn replicas<'a>(&mut self, urls: impl Iterator<Item = &'a str>, source: &Source) {
        self.table.remove("replica");
        self.sources.retain(|path, _| !path.starts_with("replica["));
        for (index, url) in urls.enumerate() {
            self.append("replica");
            self.set(
                "replica",
                "url",
                [Value::from(url)],
                source.clone(),
                &format!("replica[{index}]"),
            );
        }
    }

    fn append(&mut self, list: &str) {
        let list = self
            .table
            .entry(list)
            .or_insert_with(|| Value::Array(Vec::new()));
        list.as_array_mut()
            .expect("only a list is put here")
            .push(Value::Table(Table::new()));
    }

    fn problem(&mut self, key_path: &str, message: &str, source: Source) {
        self.problems.push(Problem {
            key_path: key_path.to_owned(),
            message: message.to_owned(),
            source,
        });
    }

    /// `; did you mean …?`, if anything is near: for a bare name a section, else the key most alike, rather in the same
    /// section than in another.
    fn nearest(&self, wrong: &str) -> String {
        let (wrong_section, wrong_key) = wrong.split_once('.').unwrap_or(("", wrong));
        let near = |distance: usize| distance <= (wrong_key.len() / 3).max(1);
        let known = || self.known.iter().filter_map(|path| path.split_once('.'));
        let sections = known().map(|(section, _)| (edit_distance(wrong, section), section));
        let keys = known().map(|(section, key)| {
            let elsewhere = usize::from(section != wrong_section);
            (edit_distance(wrong_key, key) + elsewhere, section, key)
        });
        match (sections.min(), keys.min()) {
            (Some((distance, section)), _) if wrong_section.is_empty() && near(distance) => {
                format!("; did you mean `[{section}]`?")
            }
            (_, Some((distance, section, key))) if near(distance) => {
                format!("; did you mean `{section}.{key}`?")
            }
            (_, _) => String::new(),
        }
    }
}

/// What a text outside TOML may stand for: a TOML value, the text itself, a comma-separated list.
fn readings(text: &str) -> Vec<Value> {
    let literal = toml::from_str::<Table>(&format!("value = {text}")).ok();
    // One value: a text with line breaks could bring keys of its own.
    let literal = literal
        .filter(|table| table.len() == 1)
        .and_then(|mut table| table.remove("value"));
    // The last one is what a refusal speaks of.
    match literal {
        Some(Value::String(quoted)) => vec![
            Value::Array(vec![Value::from(quoted.as_str())]),
            Value::String(quoted),
        ],
        Some(literal) => vec![Value::from(text), literal],
        None => {
            let list = text
                .split(',')
                .map(|item| Value::from(item.trim()))
                .collect();
            vec![Value::Array(list), Value::from(text)]
        }
    }
}

fn accepted(section: &str, body: &Table) -> Result<(), String> {
    let body = Value::Table(body.clone());
    let body = if is_list(section) {
        Value::Array(vec![body])
    } else {
        body
    };
    let trial = Table::from_iter([(section.to_owned(), body)]);
    match Value::Table(trial).try_into::<raw::File>() {
        Ok(_file) => Ok(()),
        Err(error) => Err(in_our_words(error.message())),
    }
}

fn is_list(section: &str) -> bool {
    raw::LISTS.contains(&section)
}

/// `invalid type: string "x", expected i64` → `must be an integer, not string "x"`.
fn in_our_words(message: &str) -> String {
    let parts = message
        .strip_prefix("invalid type: ")
        .and_then(|rest| rest.split_once(", expected "));
    let Some((got, expected)) = parts else {
        return message.trim_end().to_owned();
    };
    let expected = match expected.trim_end() {
        "i64" => "an integer",
        "a boolean" => "true or false",
        "a sequence" => "an array",
        "a string" => "a string in quotes",
        other => other,
    };
    format!("must be {expected}, not {got}")
}

fn line_of(text: &str, offset: usize) -> usize {
    1 + text
        .bytes()
        .take(offset)
        .filter(|byte| *byte == b'\n')
        .count()
}

/// What was written, without what a terminal would obey.
fn printable(text: &str) -> String {
    let escape = |c: char| {
        if c.is_control() {
            c.escape_default().to_string()
        } else {
            c.to_string()
        }
    };
    text.chars().map(escape).collect()
}

/// Levenshtein's.
fn edit_distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.bytes().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
