//! Raw scripts (`tests/scripts/*.txt`): what a client sends, message by message, and when it waits. Run against anything
//! that speaks the protocol; the outcome is a transcript.
//!
//! A line is a message; `-` is the empty name, `|` separates parameters, `\0` in one is null, `@@` becomes the runner's own
//! letter (and back in the transcript). `await Z Z` sends what was collected and reads until those tags were seen.
//! Beside the messages' own names: `typed` is a Parse with parameter types, `bindary` a Bind that wants its results in binary,
//! `repeat` a Bind whose parameter is a text so many times over.

use std::time::Duration;

use tokio::time::timeout;

use super::raw::{
    Frame, Raw, bind, close_portal, close_statement, copy_data, copy_done, copy_fail,
    describe_portal, describe_statement, execute, flush, function_call, parse, parse_typed, query,
    sync, transcript,
};

const PATIENCE: Duration = Duration::from_secs(15);

/// The messages up to one `await`, and the tags awaited.
pub(crate) struct Step {
    pub(crate) line: usize,
    pub(crate) bytes: Vec<u8>,
    pub(crate) awaited: Vec<u8>,
}

pub(crate) fn read(text: &str, letter: char) -> Vec<Step> {
    let text = text.replace("@@", &letter.to_string());
    let mut steps = Vec::new();
    let mut bytes = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let (word, rest) = line.trim().split_once(' ').unwrap_or((line.trim(), ""));
        match word {
            "" | "#" => {}
            "await" => {
                let awaited = rest.split(' ').map(|tag| tag.as_bytes()[0]).collect();
                steps.push(Step {
                    line: at + 1,
                    bytes: std::mem::take(&mut bytes),
                    awaited,
                });
            }
            _ => bytes.extend_from_slice(&message(word, rest)),
        }
    }
    assert!(bytes.is_empty(), "the script ends without an await");
    steps
}

fn message(word: &str, rest: &str) -> Vec<u8> {
    let name = |name: &str| {
        if name == "-" {
            String::new()
        } else {
            name.to_owned()
        }
    };
    let (first, more) = rest.split_once(' ').unwrap_or((rest, ""));
    let unescaped = rest.replace("\\n", "\n").replace("\\t", "\t");
    match word {
        "query" => query(&unescaped),
        "parse" => parse(&name(first), more),
        "bind" => {
            let (statement, parameters) = more.split_once(' ').unwrap_or((more, ""));
            let parameters = parameters.split('|').filter(|_| !parameters.is_empty());
            let parameters: Vec<_> = parameters
                .map(|text| (text != "\\0").then_some(text.as_bytes()))
                .collect();
            bind(&name(first), &name(statement), &parameters)
        }
        "typed" => {
            let (types, text) = more.split_once(' ').unwrap();
            let types: Vec<_> = types.split(',').map(|oid| oid.parse().unwrap()).collect();
            parse_typed(&name(first), text, &types)
        }
        "bindary" => {
            let mut bytes = message("bind", rest);
            let formats = bytes.len() - 2;
            bytes.splice(formats.., [0, 1, 0, 1]);
            let len = u32::try_from(bytes.len() - 1).unwrap();
            bytes[1..5].copy_from_slice(&len.to_be_bytes());
            bytes
        }
        "repeat" => {
            let [statement, text, times] = more.split(' ').collect::<Vec<_>>()[..] else {
                panic!("{rest}")
            };
            let parameter = text.repeat(times.parse().unwrap());
            bind(
                &name(first),
                &name(statement),
                &[Some(parameter.as_bytes())],
            )
        }
        "describe" if first == "statement" => describe_statement(&name(more)),
        "describe" => describe_portal(&name(more)),
        "close" if first == "statement" => close_statement(&name(more)),
        "close" => close_portal(&name(more)),
        "execute" => execute(&name(first), more.parse().unwrap_or(0)),
        "sync" => sync(),
        "flush" => flush(),
        "copydata" => copy_data(unescaped.as_bytes()),
        "copydone" => copy_done(),
        "copyfail" => copy_fail(rest),
        "call" => {
            let arguments: Vec<_> = more.split('|').filter(|text| !text.is_empty()).collect();
            function_call(first.parse().unwrap(), &arguments)
        }
        other => panic!("what is `{other}`?"),
    }
}

/// What stands in a transcript for messages that never came.
const SILENCE: u8 = b'?';

/// Sends one step and reads until all awaited tags have come, in whatever order (a notification may come before or after
/// ReadyForQuery). The last frame tells of those that never came, and is none of the server's.
pub(crate) async fn run(raw: &mut Raw, step: &Step) -> Vec<Frame> {
    raw.try_send(&step.bytes).await;
    let mut awaited = step.awaited.clone();
    let mut frames = Vec::new();
    while !awaited.is_empty() {
        let Ok(next) = timeout(PATIENCE, raw.try_read()).await else {
            let body = awaited;
            frames.push(Frame { tag: SILENCE, body });
            break;
        };
        let Some(frame) = next else { break };
        if let Some(at) = awaited.iter().position(|tag| *tag == frame.tag) {
            awaited.swap_remove(at);
        }
        frames.push(frame);
    }
    // Notifications are asynchronous: their order among themselves counts, not the place.
    frames.sort_by_key(|frame| frame.tag == b'A');
    frames
}

/// `run` where it must not hang: against Postgres itself a script that does is wrong.
pub(crate) async fn run_direct(raw: &mut Raw, step: &Step) -> Vec<Frame> {
    let frames = run(raw, step).await;
    assert!(
        frames.iter().all(|frame| frame.tag != SILENCE),
        "line {}: not all came, only:\n{}",
        step.line,
        transcript(&frames)
    );
    frames
}

/// The transcript of frames, as any runner's: its letter is taken out again. All that a client is told, but what no two
/// sessions of one Postgres agree on: pids, oids of a database's own types and tables, where in its source Postgres was.
pub(crate) fn rendered(frames: &[Frame], letter: char) -> String {
    let lines: Vec<_> = frames.iter().map(line).collect();
    // Only names of our own making, `x_a_`, are letters.
    lines.join("\n").replace(&format!("_{letter}_"), "_@@_")
}

fn line(frame: &Frame) -> String {
    let tag = char::from(frame.tag);
    match frame.tag {
        b'E' | b'N' => {
            let fields = b"SVCMDHPpqWstcdn".iter().filter_map(|&name| {
                let value = frame.field(name)?;
                Some(format!("{}={value}", char::from(name)))
            });
            format!("{tag} {}", fields.collect::<Vec<_>>().join("|"))
        }
        b'T' => {
            let mut rest = &frame.body[2..];
            let mut line = tag.to_string();
            while let Some(end) = rest.iter().position(|&byte| byte == 0) {
                let (column, fixed) = (&rest[..end], &rest[end + 1..end + 19]);
                let table = if fixed[..4] == [0; 4] { "" } else { "table's " };
                let column = String::from_utf8_lossy(column);
                let kind = oid(&fixed[6..10]);
                // Number in its table; type; size, modifier and format.
                line += &format!(
                    " {table}{column}:{:?}/{kind}/{:?}",
                    &fixed[4..6],
                    &fixed[10..]
                );
                rest = &rest[end + 19..];
            }
            line
        }
        b't' => {
            let types: Vec<_> = frame.body[2..].chunks(4).map(oid).collect();
            format!("t {}", types.join(" "))
        }
        b'D' => {
            let mut rest = &frame.body[2..];
            let mut columns = Vec::new();
            while let Some((len, more)) = rest.split_first_chunk() {
                let len = usize::try_from(i32::from_be_bytes(*len)).ok();
                let (column, more) = more.split_at(len.unwrap_or(0));
                columns.push(len.map_or_else(|| "∅".to_owned(), |_| bytes(column)));
                rest = more;
            }
            format!("D {}", columns.join("|"))
        }
        b'd' | b'V' => format!("{tag} {}", bytes(&frame.body)),
        _ => transcript(std::slice::from_ref(frame)),
    }
}

/// What Postgres itself numbers is the same everywhere.
fn oid(bytes: &[u8]) -> String {
    match u32::from_be_bytes(bytes.try_into().unwrap()) {
        own if own >= 16384 => "own".to_owned(),
        oid => oid.to_string(),
    }
}

/// As text where it is one; of what is long, a hash.
fn bytes(bytes: &[u8]) -> String {
    if bytes.len() > 2000 {
        let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325u64, |hash, &byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        return format!("{} bytes, {hash:x}", bytes.len());
    }
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_binary) => bytes.escape_ascii().to_string(),
    }
}
