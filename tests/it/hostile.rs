//! Bytes no driver sends. Whatever comes, that one connection ends, in words where there is somebody to read them, and
//! nobody else notices.

use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::timeout;

use crate::support::chance::{Chance, seed};
use crate::support::pg::fresh_database;
use crate::support::proxy::{PATIENCE, Proxy, text};
use crate::support::raw::{
    self, PROTOCOL_3_0, Raw, bind_text, copy_data, error_code, execute, extended, message, parse,
    query, startup, sync, tags, transcript, untagged,
};
use crate::support::wait::wait_until;

/// In the middle of what it does, a neighbour is asked after every attack.
struct Neighbour(Raw);

impl Neighbour {
    async fn new(proxy: &Proxy) -> Self {
        let mut raw = proxy.raw().await;
        raw.ask(&[parse("mine", "select $1::text"), sync()].concat())
            .await;
        raw.query("begin; set local work_mem = '1MB'").await;
        Self(raw)
    }

    async fn is_well(&mut self, after: &str) {
        let run = [bind_text("", "mine", &["well"]), execute("", 0), sync()].concat();
        assert_eq!(
            self.0.ask(&run).await,
            "2\nD well\nC SELECT 1\nZ T",
            "after {after}"
        );
        assert!(
            self.0.query("show work_mem").await.contains("1MB"),
            "after {after}"
        );
    }
}

#[tokio::test]
async fn malformed_startups_are_refused_in_words() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 3).await;
    let mut neighbour = Neighbour::new(&proxy).await;
    let user = [("user", "postgres")];
    let cases: Vec<(&str, Vec<u8>, Option<&str>)> = vec![
        ("a length of 0", vec![0, 0, 0, 0], Some("08P01")),
        ("a length of 7", vec![0, 0, 0, 7, 0, 3, 0], Some("08P01")),
        (
            "a length of 2 GB",
            vec![0x7f, 0xff, 0xff, 0xff, 0, 3, 0, 0],
            Some("08P01"),
        ),
        ("a negative length", vec![0xff; 8], Some("08P01")),
        (
            "too long a startup",
            untagged(&vec![b'x'; 20_000]),
            Some("08P01"),
        ),
        (
            "protocol 2",
            untagged(&[&(2u32 << 16).to_be_bytes()[..], b"user\0a\0\0"].concat()),
            Some("0A000"),
        ),
        (
            "protocol 4",
            untagged(&[&(4u32 << 16).to_be_bytes()[..], b"user\0a\0\0"].concat()),
            Some("0A000"),
        ),
        (
            "no user",
            startup(PROTOCOL_3_0, &[("database", "postgres")]),
            Some("28000"),
        ),
        (
            "an empty user",
            startup(PROTOCOL_3_0, &[("user", "")]),
            Some("28000"),
        ),
        (
            "no end",
            untagged(&[&PROTOCOL_3_0.to_be_bytes()[..], b"user\0postgres"].concat()),
            Some("08P01"),
        ),
        (
            "a name without a value",
            untagged(
                &[
                    &PROTOCOL_3_0.to_be_bytes()[..],
                    b"user\0postgres\0database\0\0",
                ]
                .concat(),
            ),
            None,
        ),
        (
            "not UTF-8",
            untagged(&[&PROTOCOL_3_0.to_be_bytes()[..], b"user\0\xff\xfe\0\0"].concat()),
            None,
        ),
        (
            "bytes after the end",
            untagged(&[&startup(PROTOCOL_3_0, &user)[4..], b"more"].concat()),
            None,
        ),
        (
            "replication by a word that is none",
            startup(
                PROTOCOL_3_0,
                &[("user", "postgres"), ("replication", "maybe")],
            ),
            Some("22023"),
        ),
        ("HTTP", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(), None),
        (
            "TLS without asking",
            vec![0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3],
            None,
        ),
    ];
    for (what, bytes, wanted) in cases {
        let mut raw = Raw::connect(proxy.port).await;
        raw.try_send(&bytes).await;
        drop(tokio::io::AsyncWriteExt::shutdown(&mut raw.stream).await);
        let frames = raw.until_end().await;
        if let Some(wanted) = wanted {
            assert_eq!(
                error_code(&frames).as_deref(),
                Some(wanted),
                "{what}: {}",
                transcript(&frames)
            );
            assert_eq!(frames[0].field(b'S').as_deref(), Some("FATAL"), "{what}");
        }
        neighbour.is_well(what).await;
    }
    // As from a driver told to leave before it has begun; Postgres says nothing either.
    let mut raw = Raw::connect(proxy.port).await;
    raw.send(&raw::terminate()).await;
    let frames = raw.until_end().await;
    assert!(frames.is_empty(), "{}", transcript(&frames));
    proxy.raw().await;
    no_panic(proxy).await;
}

#[tokio::test]
async fn malformed_messages_end_their_connection_alone() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 3).await;
    let mut neighbour = Neighbour::new(&proxy).await;
    let header = |tag: u8, len: u32| [&[tag][..], &len.to_be_bytes()].concat();
    // What ends the connection.
    let fatal: Vec<(&str, Vec<u8>)> = vec![
        ("length 0", header(b'Q', 0)),
        ("length 3", header(b'Q', 3)),
        ("a length of 2 GB", header(b'Q', 0x7fff_ffff)),
        ("a negative length", header(b'Q', 0xffff_ffff)),
        ("a Sync of 2 GB", header(b'S', 0x7fff_fff0)),
        ("a Describe of 1 GB", header(b'D', 0x4000_0000)),
        ("an unknown tag", message(b'!', b"x")),
        ("tag 0", message(0, b"")),
        ("a backend's tag", message(b'Z', b"I")),
        ("a password nobody asked for", message(b'p', b"secret\0")),
    ];
    for (what, bytes) in &fatal {
        for before in [Vec::new(), query("begin"), parse("open", "select 1")] {
            let mut raw = proxy.raw().await;
            raw.send(&[before, bytes.clone()].concat()).await;
            drop(tokio::io::AsyncWriteExt::shutdown(&mut raw.stream).await);
            let frames = raw.until_end().await;
            if *what != "a password nobody asked for" {
                let said = frames.iter().any(|frame| frame.tag == b'E');
                assert!(said, "{what}: nothing was said: {}", transcript(&frames));
            }
            neighbour.is_well(what).await;
        }
    }
    // What Postgres calls an error, and goes on.
    let errors: Vec<(&str, Vec<u8>)> = vec![
        ("a Query without end", message(b'Q', b"select 1")),
        (
            "a Query with two ends",
            message(b'Q', b"select 1\0select 2\0"),
        ),
        ("an empty Query message", message(b'Q', b"")),
        (
            "a Parse without end",
            [message(b'P', b"name"), sync()].concat(),
        ),
        (
            "a Parse of a negative count",
            [message(b'P', b"\0select 1\0\xff\xff"), sync()].concat(),
        ),
        (
            "a Parse of too few types",
            [message(b'P', b"\0select 1\0\0\x05\0\0"), sync()].concat(),
        ),
        (
            "a Parse with more after it",
            [message(b'P', b"\0select 1\0\0\0more"), sync()].concat(),
        ),
        ("an empty Bind", [message(b'B', b""), sync()].concat()),
        (
            "a Bind whose parameter is longer than it",
            [
                parse("", "select $1::text"),
                message(b'B', b"\0\0\0\0\0\x01\x7f\xff\xff\xff\0\0"),
                sync(),
            ]
            .concat(),
        ),
        (
            "a Bind of 65535 parameters and none there",
            [
                parse("", "select 1"),
                message(b'B', b"\0\0\0\0\xff\xff"),
                sync(),
            ]
            .concat(),
        ),
        (
            "a Describe of nothing",
            [message(b'D', b"Xname\0"), sync()].concat(),
        ),
        ("an empty Describe", [message(b'D', b""), sync()].concat()),
        ("an empty Execute", [message(b'E', b""), sync()].concat()),
        ("a Close of nothing", [message(b'C', b"?"), sync()].concat()),
        ("an empty FunctionCall", message(b'F', b"")),
        (
            "an invalid UTF-8 text",
            query("select 1")
                .into_iter()
                .map(|byte| if byte == b'1' { 0xff } else { byte })
                .collect(),
        ),
    ];
    let mut direct = proxy.raw_direct().await;
    for (what, bytes) in &errors {
        let mut raw = proxy.raw().await;
        raw.send(bytes).await;
        let heard = raw.until_ready().await;
        direct.send(bytes).await;
        let wanted = direct.until_ready().await;
        if wanted.last().is_none_or(|last| last.tag != b'Z') {
            direct = proxy.raw_direct().await;
        } else {
            assert_eq!(
                heard.last().map(|last| last.tag),
                Some(b'Z'),
                "{what}: {}",
                transcript(&heard)
            );
            assert_eq!(
                raw.query("select 5").await,
                "T ?column?:23/0\nD 5\nC SELECT 1\nZ I",
                "{what}"
            );
        }
        assert_eq!(
            error_code(&heard),
            error_code(&wanted),
            "{what}: {} / {}",
            transcript(&heard),
            transcript(&wanted)
        );
        neighbour.is_well(what).await;
    }
    no_panic(proxy).await;
}

#[tokio::test]
async fn a_session_cut_at_every_byte_hurts_nobody() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 3).await;
    let mut neighbour = Neighbour::new(&proxy).await;
    let parameters = [("user", "postgres"), ("database", db.name.as_str())];
    let session = [
        startup(PROTOCOL_3_0, &parameters),
        query("select 1"),
        extended("select $1::int", &["7"]),
        parse("s", "select 2"),
        query("begin"),
        copy_data(b"stray"),
        raw::function_call(1396, &["-5"]),
        raw::terminate(),
    ]
    .concat();
    for cut in 0..session.len() {
        let mut raw = Raw::connect(proxy.port).await;
        raw.send(&session[..cut]).await;
        if cut % 2 == 0 {
            raw.half_close().await;
            raw.until_end().await;
        }
    }
    neighbour.is_well("all the cuts").await;
    // Only the neighbour is left.
    wait_until("they are gone", PATIENCE, async || {
        proxy.metric("flowgate_clients") == 1
    })
    .await;
    no_panic(proxy).await;
}

#[tokio::test]
async fn a_session_that_arrives_byte_by_byte_is_served_the_same() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let mut raw = Raw::connect(proxy.port).await;
    let parameters = [("user", "postgres"), ("database", db.name.as_str())];
    let session = [
        startup(PROTOCOL_3_0, &parameters),
        query("select 'by bytes'"),
        extended("select $1::int", &["7"]),
        raw::terminate(),
    ]
    .concat();
    for byte in session {
        raw.send(&[byte]).await;
    }
    raw.until_ready().await;
    assert_eq!(
        transcript(&raw.until_ready().await),
        "T ?column?:25/0\nD by bytes\nC SELECT 1\nZ I"
    );
    assert_eq!(
        transcript(&raw.until_ready().await),
        "1\n2\nT int4:23/0\nD 7\nC SELECT 1\nZ I"
    );
    assert!(raw.try_read().await.is_none());
    no_panic(proxy).await;
}

/// `FLOWGATE_SEED` repeats a run.
#[tokio::test]
async fn random_bytes_hurt_nobody() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 3).await;
    let mut neighbour = Neighbour::new(&proxy).await;
    let seed = seed();
    let mut chance = Chance(seed | 1);
    for round in 0..300 {
        let mut bytes: Vec<u8> = (0..chance.below(300))
            .map(|_| chance.next() as u8)
            .collect();
        let logged_in = round % 3 != 0;
        if logged_in && round % 2 == 0 {
            // Right lengths, wrong bodies, mostly known tags.
            let tags: &[u8] = b"QPBDECSHFdcfp!";
            let many = (0..chance.below(6)).flat_map(|_| {
                let body: Vec<u8> = (0..chance.below(40))
                    .map(|_| (chance.next() % 7 * 37) as u8)
                    .collect();
                message(
                    tags[usize::try_from(chance.below(tags.len() as u64)).unwrap()],
                    &body,
                )
            });
            bytes = many.collect();
        }
        let mut raw = if logged_in {
            proxy.raw().await
        } else {
            Raw::connect(proxy.port).await
        };
        raw.try_send(&bytes).await;
        drop(tokio::io::AsyncWriteExt::shutdown(&mut raw.stream).await);
        timeout(PATIENCE, raw.until_end())
            .await
            .unwrap_or_else(|_| {
                panic!(
                    "seed {seed}, round {round}: never ends, logged in: {logged_in}, sent {bytes:?}"
                )
            });
        neighbour
            .is_well(&format!("seed {seed}, round {round}"))
            .await;
    }
    wait_until("they are gone", PATIENCE, async || {
        proxy.metric("flowgate_clients") == 1
    })
    .await;
    no_panic(proxy).await;
}

#[tokio::test]
async fn a_login_that_takes_too_long_is_ended() {
    let db = fresh_database().await;
    let proxy = Proxy::without_replica(&db, |config| {
        config.listen.login_timeout = Duration::from_millis(300)
    })
    .await;
    let whole = startup(PROTOCOL_3_0, &[("user", "postgres")]);
    let slow = [&b""[..], &whole[..3], &whole[..whole.len() - 1]];
    let ends = join_all(slow.map(async |sent| {
        let mut raw = Raw::connect(proxy.port).await;
        raw.send(sent).await;
        raw.until_end().await
    }))
    .await;
    for frames in ends {
        assert!(
            tags(&frames).is_empty() || error_code(&frames).as_deref() == Some("57014"),
            "{}",
            transcript(&frames)
        );
    }
    // Once logged in, a client may be as slow as it likes.
    let client = proxy.connect().await;
    assert_eq!(text(&client, "select pg_sleep(0.6)").await, "");
    assert_eq!(text(&client, "select 'awake'").await, "awake");
    no_panic(proxy).await;
}

#[tokio::test]
async fn a_client_that_does_not_read_holds_up_nobody() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 2).await;
    let mut deaf = proxy.raw().await;
    deaf.send(&query(
        "select repeat('x', 1000) from generate_series(1, 300000)",
    ))
    .await;
    let other = proxy.connect().await;
    for n in 0..50 {
        assert_eq!(text(&other, &format!("select {n}")).await, n.to_string());
    }
    drop(deaf);
    let direct = db.connect().await;
    let busy = "select count(*)::text from pg_stat_activity where datname = current_database() and state = 'active' and query like 'select repeat%'";
    wait_until("its query ends with it", PATIENCE, async || {
        text(&direct, busy).await == "0"
    })
    .await;
    no_panic(proxy).await;
}

/// A data-plane thread that panicked serves nobody; a task that did has hung up without the counters knowing.
async fn no_panic(proxy: Proxy) {
    let client = proxy.connect().await;
    assert_eq!(text(&client, "select 'alive'").await, "alive");
    drop(client);
    wait_until("every client is seen off", PATIENCE, async || {
        proxy.metric("flowgate_clients") <= 1
    })
    .await;
    proxy.shut_down().await;
}
