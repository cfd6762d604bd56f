//! Everything that reads bytes from outside, as functions of bytes that must neither panic nor break what is said of each. Not part
//! of the proxy: built for tests and with feature `fuzz`.
//!
//! Driven in two ways: `cargo +nightly fuzz run --fuzz-dir tests/fuzz <target>` looks for new paths as long as one likes; the
//! test at the end of this file mutates the same corpus a fixed number of times from a fixed seed, on any toolchain.

use std::fmt::Write;

use crate::client::fuzz as session;
use crate::http::fuzz as plane;
use crate::wire::certificate;
use crate::wire::error_response;
use crate::wire::frame::{Follower, FrameError, HEADER, Header};
use crate::wire::messages::{self, Bind, Parse, Target};
use crate::wire::proxy_header::{self, HEAD, Version};
use crate::wire::scram::{
    ClientBinding, ClientExchange, ScramKeys, Secret, ServerBinding, ServerExchange, Verifier,
};
use crate::wire::startup::{self, Packet};

/// A function of bytes, and its name: of its file in `tests/fuzz/targets`, and of its corpus.
pub type FuzzTarget = (&'static str, fn(&[u8]));

pub const TARGETS: [FuzzTarget; 12] = [
    ("frames", frames),
    ("bodies", bodies),
    ("startup", startup_packets),
    ("scram", scram),
    ("certificate", certificates),
    ("proxy_header", proxy_headers),
    ("users_file", users_file),
    ("classify", classify),
    ("group", group),
    ("translate", translate),
    ("follow", follow),
    ("http", http),
];

/// Headers, and a stream of frames followed in parts.
pub fn frames(data: &[u8]) {
    if let Some(header) = Header::peek(data) {
        assert!(header.whole >= HEADER);
    }
    match Header::from_client(data) {
        Ok(Some(header)) => {
            assert!(header.window() <= header.whole && Header::peek(data).is_some())
        }
        Ok(None) => assert!(data.len() < HEADER),
        Err(FrameError::Tag(tag)) => assert_eq!(data.first(), Some(&tag)),
        Err(FrameError::Length) => assert!(data.len() >= HEADER),
    }
    let step = 1 + data.iter().map(|&byte| usize::from(byte)).sum::<usize>() % 64;
    let follow = |step: usize| {
        let (mut follower, mut tags) = (Follower::default(), Vec::new());
        let good = data
            .chunks(step)
            .all(|part| follower.pass(part, |tag| tags.push(tag)));
        (good, tags, good && follower.is_between())
    };
    assert_eq!(follow(data.len().max(1)), follow(step));
}

/// Messages, once they are isolated.
pub fn bodies(data: &[u8]) {
    if let Some(parse) = Parse::read(data) {
        let mut out = Vec::new();
        messages::put_parse(&mut out, parse.name, parse.text, parse.types);
        assert_eq!(
            out.get(HEADER..),
            Some(data),
            "what is read is written the same"
        );
    }
    if let Some(bind) = Bind::read(data) {
        for number in [0, 1, 2, 3, 7, 255, u16::MAX] {
            let text = bind.text_parameter(number);
            assert!(text.is_none() || bind.uuid_parameter(number).is_none());
            assert!(text.is_none_or(|text| text.len() < data.len()));
        }
    }
    if let Some(target) = Target::read(data) {
        assert_eq!(target.name.len() + 2, data.len());
    }
    if let Some(text) = messages::query_text(data) {
        assert_eq!(text.len() + 1, data.len());
    }
    messages::parameter_status(data);
    messages::first_column(data);
    for name in *b"SVCMDHPpqWstcdnFLR\0" {
        error_response::field(data, name);
    }
}

/// What comes before a login.
pub fn startup_packets(data: &[u8]) {
    let Ok(Some(length)) = startup::packet_len(data) else {
        return;
    };
    let Some(packet) = data.get(..length) else {
        return;
    };
    match startup::read(packet) {
        Ok(Packet::Startup(startup)) => {
            for (name, value) in &startup.parameters {
                assert!(!name.is_empty() && startup.parameter(name).is_some());
                if name == "replication" {
                    drop(startup::replication(value));
                }
            }
        }
        Ok(Packet::Cancel {
            pid,
            secret,
            forwarded: true,
        }) => assert_eq!(startup::forwarded_cancel(pid, &secret), packet),
        Ok(Packet::Cancel { .. } | Packet::SslRequest | Packet::GssEncRequest) | Err(_) => {}
    }
}

/// Both sides of a SCRAM exchange, and stored verifiers; lines of the input are the messages.
pub fn scram(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    let mut lines = text.lines();
    let (first, last) = (
        lines.next().unwrap_or_default(),
        lines.next().unwrap_or_default(),
    );
    drop(Verifier::parse(first));
    let verifier = Verifier::mock(b"secret", "user");
    let channels = [
        ServerBinding::NotOffered,
        ServerBinding::Declined,
        ServerBinding::Chosen(b"hash"),
    ];
    for channel in channels {
        let Ok(exchange) = ServerExchange::start(verifier.clone(), first, "nonce", channel) else {
            continue;
        };
        assert!(exchange.first.starts_with("r="));
        assert!(exchange.finish(last).is_err(), "nobody satisfies a mock");
    }
    // By keys, as a password is hashed as often as the server says.
    let password = ScramKeys::unproven();
    for channel in [ClientBinding::Unable, ClientBinding::Bound(b"hash")] {
        let exchange = ClientExchange::start("abc".to_owned(), channel);
        if let Ok((last, _)) = exchange.answer(first, &Secret::Keys(&password)) {
            assert!(last.starts_with("c=") && last.contains(",r=abc"));
        }
    }
}

pub fn certificates(data: &[u8]) {
    let hash = certificate::end_point(data);
    assert!(hash.is_none_or(|hash| [28, 32, 48, 64].contains(&hash.len())));
    let name = certificate::common_name(data);
    assert!(name.is_none_or(|name| name.len() < data.len() && !name.contains('\0')));
}

pub fn proxy_headers(data: &[u8]) {
    let version = proxy_header::version(data);
    // What begins well began well with fewer bytes, too.
    for cut in 0..data.len().min(proxy_header::BEGINNING) {
        let part = data.get(..cut).unwrap_or_default();
        if let (Ok(Some(version)), Ok(Some(earlier))) = (version, proxy_header::version(part)) {
            assert_eq!(version, earlier);
        }
        assert!(version.is_err() || proxy_header::version(part).is_ok());
    }
    match version {
        Ok(Some(Version::Line)) => {
            let end = memchr::memchr(b'\n', data).map_or(data.len(), |at| at + 1);
            let _outcome = proxy_header::read_line(data.get(..end).unwrap_or_default());
        }
        Ok(Some(Version::Binary)) => {
            if let Some((head, rest)) = data.split_first_chunk::<HEAD>()
                && let Ok(length) = proxy_header::rest_len(head)
            {
                let rest = rest.get(..length.min(rest.len())).unwrap_or_default();
                let _outcome = proxy_header::read_binary(head, rest);
            }
        }
        Ok(None) | Err(_) => {}
    }
}

pub fn users_file(data: &[u8]) {
    if let Ok(text) = std::str::from_utf8(data) {
        text.lines()
            .for_each(|line| drop(crate::client::verifiers::read_line(line)));
    }
}

pub fn classify(data: &[u8]) {
    session::classify(data);
}

pub fn group(data: &[u8]) {
    session::group(data);
}

pub fn translate(data: &[u8]) {
    session::translate(data);
}

pub fn follow(data: &[u8]) {
    session::follow(data);
}

/// Messages of sockets, tokens, cursors, filters.
pub fn http(data: &[u8]) {
    plane::http(data);
}

/// Bytes changed a little, in ways that formats with lengths and texts break by. The same seed, the same changes.
pub struct Mutator {
    state: u64,
}

const LENGTHS: [u32; 10] = [
    0,
    1,
    3,
    4,
    5,
    0xff,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
];

impl Mutator {
    pub fn new(seed: u64) -> Self {
        Self { state: seed | 1 }
    }

    /// xorshift64*
    fn next(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    pub fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound.max(1) as u64).unwrap_or(0)
    }

    /// One to five changes; `other` is another input, to be spliced in.
    pub fn mutate(&mut self, data: &mut Vec<u8>, other: &[u8]) {
        for _ in 0..=self.below(4) {
            let at = self.below(data.len());
            match self.below(8) {
                0 => {
                    let bit = self.below(8);
                    data.iter_mut()
                        .skip(at)
                        .take(1)
                        .for_each(|b| *b ^= 1 << bit);
                }
                1 => {
                    let byte = self.next().to_le_bytes()[0];
                    data.iter_mut().skip(at).take(1).for_each(|b| *b = byte);
                }
                2 => data.insert(at, self.next().to_le_bytes()[0]),
                3 => drop(data.drain(at..(at + 1 + self.below(8)).min(data.len()))),
                4 => data.truncate(at),
                5 => {
                    let length = LENGTHS[self.below(LENGTHS.len())].to_be_bytes();
                    let end = (at + 4).min(data.len());
                    drop(data.splice(at..end, length));
                }
                6 => {
                    let end = (at + self.below(64)).min(data.len());
                    let copied = data[at..end].to_vec();
                    drop(data.splice(at..at, copied));
                }
                _ => {
                    let from = self.below(other.len());
                    let end = (from + self.below(256)).min(other.len());
                    drop(data.splice(at..at, other[from..end].iter().copied()));
                }
            }
            data.truncate(LONGEST);
        }
    }
}

/// Inputs are kept short: what is wrong with a long one mostly is with a short one.
const LONGEST: usize = 8 * 1024;

/// As a Rust byte string, to be put into a test.
pub fn show(data: &[u8]) -> String {
    let mut text = String::from("b\"");
    for byte in data {
        write!(text, "{}", byte.escape_ascii()).expect("a String takes all");
    }
    text + "\""
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    const SEED: u64 = 0x0f10_463a_7e00;
    /// Some seconds, on a slow machine without optimisation.
    const ROUNDS: usize = 20_000;

    fn folder() -> &'static Path {
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fuzz"))
    }

    fn corpus(target: &str) -> Vec<Vec<u8>> {
        let mut files: Vec<_> = fs::read_dir(folder().join("corpus").join(target))
            .unwrap_or_else(|error| panic!("{target} has no corpus: {error}"))
            .map(|file| file.unwrap().path())
            .collect();
        files.sort();
        assert!(!files.is_empty(), "{target} has an empty corpus");
        files.iter().map(|file| fs::read(file).unwrap()).collect()
    }

    /// Says what was tried last if a target panics.
    struct Trying<'a>(&'a str, &'a [u8]);

    impl Drop for Trying<'_> {
        fn drop(&mut self) {
            if std::thread::panicking() {
                println!("target {} fails for {}", self.0, show(self.1));
            }
        }
    }

    fn try_it((name, target): FuzzTarget, data: &[u8]) {
        let _trying = Trying(name, data);
        target(data);
    }

    #[test]
    fn no_target_fails_for_what_the_corpus_becomes() {
        for target in TARGETS {
            let corpus = corpus(target.0);
            try_it(target, &[]);
            corpus.iter().for_each(|data| try_it(target, data));
            let mut mutator = Mutator::new(SEED);
            for _ in 0..ROUNDS {
                let mut data = corpus[mutator.below(corpus.len())].clone();
                let other = &corpus[mutator.below(corpus.len())];
                mutator.mutate(&mut data, other);
                try_it(target, &data);
            }
        }
    }

    /// A mutation that only ever breaks the first length would test nothing behind it.
    #[test]
    fn mutations_leave_enough_to_be_read() {
        let corpus = corpus("startup");
        let mut mutator = Mutator::new(SEED);
        let mut read = 0;
        for _ in 0..1_000 {
            let mut data = corpus[mutator.below(corpus.len())].clone();
            mutator.mutate(&mut data, &corpus[0]);
            let packet = startup::packet_len(&data)
                .ok()
                .flatten()
                .and_then(|length| data.get(..length));
            read += usize::from(packet.is_some_and(|packet| startup::read(packet).is_ok()));
        }
        assert!((100..900).contains(&read), "{read} of 1000 could be read");
    }

    #[test]
    fn the_fuzzer_has_every_target() {
        let manifest = fs::read_to_string(folder().join("Cargo.toml")).unwrap();
        for (name, _) in TARGETS {
            let file = fs::read_to_string(folder().join(format!("targets/{name}.rs"))).unwrap();
            assert!(file.contains("flowgate::fuzz::"), "{name}");
            let bin = format!("name = \"{name}\"\npath = \"targets/{name}.rs\"");
            assert!(manifest.contains(&bin), "{name}");
        }
    }
}
