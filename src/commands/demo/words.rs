//! The demo's real work: which text files lie under a folder, what words are in one, which are the most frequent of all.
//! Plain functions over the file system and JSON, every one bounded and repeatable. Called by `flow`.
//!
//! A word is a run of two or more letters, in lower case; longer than 40 it goes by its first 40. Whatever a bound leaves out is
//! counted and said in the result.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

const FILES_MAX: usize = 2_000;
/// Entries looked at, so that `--dir /` ends too.
const ENTRIES_MAX: usize = 50_000;
const FILE_BYTES_MAX: u64 = 1024 * 1024;
/// Of one file; the rest is only counted.
const DISTINCT_MAX: usize = 4_000;
const LETTERS_MAX: usize = 40;
const TOP: usize = 20;
/// What is built or fetched, not written.
const SKIPPED: [&str; 4] = ["target", "node_modules", "__pycache__", "venv"];
/// Enough to tell text from something else.
const SNIFF_BYTES: u64 = 8 * 1024;

/// One element a file, `{"file": path}`; a last `{"left_out": n}` if a bound kept files out.
pub(super) fn list_files(folder: &Path) -> Result<Value, String> {
    let (mut folders, mut files) = (vec![folder.to_owned()], Vec::new());
    let (mut entries, mut left_out) = (0, 0);
    while let Some(folder_now) = folders.pop() {
        let listed = match fs::read_dir(&folder_now) {
            Ok(listed) => listed,
            // Gone or closed to us meanwhile; only the root must be readable.
            Err(error) if folder_now == folder => {
                return Err(format!("cannot list {}: {error}", folder.display()));
            }
            Err(_closed) => continue,
        };
        let mut names: Vec<_> = listed.flatten().collect();
        names.sort_by_key(fs::DirEntry::file_name);
        for entry in names {
            entries += 1;
            // Not followed if it is a link, so no file comes twice and no walk is endless.
            let Ok(kind) = entry.file_type() else {
                continue;
            };
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with('.') || SKIPPED.contains(&name.as_ref()) {
                continue;
            }
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() {
                match entry.path().to_str() {
                    Some(path) if files.len() < FILES_MAX && is_text(&entry.path()) => {
                        if entry.metadata().is_ok_and(|is| is.len() <= FILE_BYTES_MAX) {
                            files.push(path.to_owned());
                        } else {
                            left_out += 1;
                        }
                    }
                    Some(_) if files.len() < FILES_MAX => {}
                    Some(_) | None => left_out += 1,
                }
            }
        }
        if entries > ENTRIES_MAX && !folders.is_empty() {
            // How many there are nobody knows: at least one a folder not looked at.
            left_out += folders.len();
            break;
        }
    }
    files.sort();
    let mut elements: Vec<Value> = files.iter().map(|file| json!({ "file": file })).collect();
    if left_out > 0 {
        elements.push(json!({ "left_out": left_out }));
    }
    Ok(Value::Array(elements))
}

/// `{"file", "total", "words": {word: count}, "unlisted": words beyond the bound}`; `{"left_out"}` goes through.
pub(super) fn count_words(element: &Value) -> Result<Value, String> {
    let Some(path) = element["file"].as_str() else {
        return Ok(element.clone());
    };
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(FILE_BYTES_MAX).read_to_end(&mut bytes))
        .map_err(|error| format!("cannot read {path}: {error}"))?;
    let text = String::from_utf8_lossy(&bytes);
    let mut counts: HashMap<String, u64> = HashMap::new();
    let mut total: u64 = 0;
    for word in text.split(|c: char| !c.is_alphabetic()) {
        if word.chars().nth(1).is_none() {
            continue;
        }
        total += 1;
        let word: String = word
            .chars()
            .flat_map(char::to_lowercase)
            .take(LETTERS_MAX)
            .collect();
        *counts.entry(word).or_default() += 1;
    }
    let ranked = ranked(counts);
    let unlisted: u64 = ranked
        .iter()
        .skip(DISTINCT_MAX)
        .map(|(_, count)| count)
        .sum();
    let words: serde_json::Map<String, Value> = ranked
        .into_iter()
        .take(DISTINCT_MAX)
        .map(|(word, count)| (word, json!(count)))
        .collect();
    Ok(json!({ "file": path, "total": total, "words": words, "unlisted": unlisted }))
}

/// All files' counts as one.
pub(super) fn top_words(folder: &str, counted: &[Value]) -> Value {
    let mut counts: HashMap<String, u64> = HashMap::new();
    let (mut files, mut total, mut unlisted, mut left_out) = (0, 0, 0, 0);
    let number = |value: &Value| value.as_u64().unwrap_or_default();
    for file in counted {
        left_out += number(&file["left_out"]);
        let Some(words) = file["words"].as_object() else {
            continue;
        };
        files += 1;
        total += number(&file["total"]);
        unlisted += number(&file["unlisted"]);
        for (word, count) in words {
            *counts.entry(word.clone()).or_default() += number(count);
        }
    }
    let distinct = counts.len();
    let top: Vec<Value> = ranked(counts)
        .into_iter()
        .take(TOP)
        .map(|(word, count)| json!({ "word": word, "count": count }))
        .collect();
    json!({
        "folder": folder, "files": files, "words": total, "distinct": distinct, "top": top,
        // Beyond a bound: files not counted at all, and words of counted files that are in `words` but in no word's count.
        "left_out_files": left_out, "unlisted_words": unlisted,
    })
}

/// As JSON, and as text for people. Returns where.
pub(super) fn write_result(folder: &Path, run: &str, result: &Value) -> Result<Value, String> {
    let write = |ending: &str, text: String| -> io::Result<PathBuf> {
        let path = folder.join(format!("words-{run}.{ending}"));
        fs::write(&path, text)?;
        Ok(path)
    };
    let told = |error: io::Error| format!("cannot write to {}: {error}", folder.display());
    let json = write("json", format!("{result:#}\n")).map_err(told)?;
    let text = write("txt", spell(result).join("\n") + "\n").map_err(told)?;
    Ok(json!({ "json": json.display().to_string(), "text": text.display().to_string() }))
}

/// A result as lines of text.
pub(super) fn spell(result: &Value) -> Vec<String> {
    let number = |key: &str| grouped(result[key].as_u64().unwrap_or_default());
    let folder = result["folder"].as_str().unwrap_or_default();
    let mut lines = vec![format!(
        "{} words ({} different) in {} text files under {folder}",
        number("words"),
        number("distinct"),
        number("files"),
    )];
    for (key, what) in [
        (
            "left_out_files",
            "files too large or beyond the limit, not counted",
        ),
        (
            "unlisted_words",
            "of the words in no word's count: counts are lower bounds",
        ),
    ] {
        if result[key].as_u64().unwrap_or_default() > 0 {
            lines.push(format!("({} {what})", number(key)));
        }
    }
    let top: Vec<(&str, String)> = result["top"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|one| {
            let count = grouped(one["count"].as_u64().unwrap_or_default());
            (one["word"].as_str().unwrap_or_default(), count)
        })
        .collect();
    // Down the columns, four of them.
    let rows = top.len().div_ceil(4);
    for row in 0..rows {
        let cells = top.iter().skip(row).step_by(rows);
        let line: String = cells
            .map(|(word, count)| format!("{count:>8} {word:<10}"))
            .collect();
        lines.push(line.trim_end().to_owned());
    }
    lines
}

/// 1234567 → 1,234,567
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// The most frequent first; among equals by the alphabet.
fn ranked(counts: HashMap<String, u64>) -> Vec<(String, u64)> {
    let mut ranked: Vec<_> = counts.into_iter().collect();
    ranked.sort_unstable_by(|(one, a), (other, b)| b.cmp(a).then_with(|| one.cmp(other)));
    ranked
}

/// Its beginning is UTF-8 without a zero byte.
fn is_text(path: &Path) -> bool {
    let mut start = Vec::new();
    let read = File::open(path).and_then(|file| file.take(SNIFF_BYTES).read_to_end(&mut start));
    let utf8 = match std::str::from_utf8(&start) {
        Ok(_) => true,
        // The end may be half a character.
        Err(error) => error.error_len().is_none(),
    };
    read.is_ok() && utf8 && !start.contains(&0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_files_are_listed_in_order_and_what_is_built_or_binary_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["target", ".git", "b"] {
            fs::create_dir(at(name)).unwrap();
        }
        for (name, bytes) in [
            ("b/two.txt", b"b" as &[u8]),
            ("a.txt", b"a"),
            ("target/x.txt", b"x"),
            (".git/config", b"x"),
            ("picture", b"\x89PNG\0"),
            ("latin1", b"caf\xe9 au lait"),
        ] {
            fs::write(at(name), bytes).unwrap();
        }
        fs::write(at("huge.txt"), "x ".repeat(600_000)).unwrap();
        std::os::unix::fs::symlink(folder.path(), at("again")).unwrap();
        assert_eq!(
            list_files(folder.path()).unwrap(),
            json!([{ "file": at("a.txt") }, { "file": at("b/two.txt") }, { "left_out": 1 }])
        );
        assert!(list_files(&at("nowhere")).is_err());
    }

    #[test]
    fn words_are_counted_and_merged() {
        let folder = tempfile::tempdir().unwrap();
        let element = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            count_words(&json!({ "file": path })).unwrap()
        };
        let one = element("one", "The cat, the_dog: a the Ünïcode2cat!");
        assert_eq!(one["total"], 7);
        assert_eq!(
            one["words"],
            json!({ "the": 3, "cat": 2, "dog": 1, "ünïcode": 1 })
        );
        let two = element("two", "dog dog dog");
        let result = top_words("/f", &[one, two, json!({ "left_out": 3 })]);
        assert_eq!(
            (&result["words"], &result["files"], &result["distinct"]),
            (&json!(10), &json!(2), &json!(4))
        );
        assert_eq!(result["top"][0], json!({ "word": "dog", "count": 4 }));
        assert_eq!(
            spell(&result),
            [
                "10 words (4 different) in 2 text files under /f",
                "(3 files too large or beyond the limit, not counted)",
                "       4 dog              3 the              2 cat              1 ünïcode"
            ]
        );
    }

    #[test]
    fn what_is_beyond_the_bound_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("many");
        let letters = |n: usize| -> String {
            [n / 676, n / 26 % 26, n % 26]
                .map(|digit| char::from(b'a' + u8::try_from(digit).unwrap()))
                .iter()
                .collect()
        };
        let text: String = (0..DISTINCT_MAX + 5).map(|n| letters(n) + " ").collect();
        fs::write(&path, text).unwrap();
        let counted = count_words(&json!({ "file": path })).unwrap();
        assert_eq!(counted["unlisted"], 5);
        let result = top_words("/f", &[counted]);
        assert_eq!(result["words"], DISTINCT_MAX + 5);
        assert!(spell(&result)[1].contains("lower bounds"));
    }

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(
            [0, 999, 1_000, 1_234_567].map(grouped),
            ["0", "999", "1,000", "1,234,567"]
        );
    }
}
