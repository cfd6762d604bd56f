//! Raw scripts (`tests/scripts/*.txt`): what a client sends, message by message, and when it waits. Run against anything
//! that speaks the protocol; the outcome is a transcript.
//!
//! A line is a message; `-` is the empty name, `|` separates parameters, `\0` in one is null, `@@` becomes the runner's own
//! letter (and back in the transcript). `await Z Z` sends what was collected and reads until those tags were seen.

use std::time::Duration;

use tokio::time::timeout;

use super::raw::{
    Frame, Raw, bind, close_portal, close_statement, copy_data, copy_done, copy_fail,
    describe_portal, describe_statement, execute, flush, function_call, parse, query, sync,
    transcript,
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

/// Sends one step and reads until all awaited tags have come, in whatever order (a notification may come before or after
/// ReadyForQuery). What never comes is reported by its line.
pub(crate) async fn run(raw: &mut Raw, step: &Step) -> Vec<Frame> {
    raw.send(&step.bytes).await;
    let mut awaited = step.awaited.clone();
    let mut frames = Vec::new();
    while !awaited.is_empty() {
        let Ok(next) = timeout(PATIENCE, raw.try_read()).await else {
            let (line, so_far) = (step.line, transcript(&frames));
            panic!(
                "line {line}: {:?} never came, only:\n{so_far}",
                String::from_utf8_lossy(&awaited)
            );
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

/// The transcript of frames, as any runner's: its letter is taken out again.
pub(crate) fn rendered(frames: &[Frame], letter: char) -> String {
    // Only names of our own making, `x_a`, are letters.
    transcript(frames).replace(&format!("_{letter}_"), "_@@_")
}
