//! Frames pass as bytes: once warm, a request costs no allocation, neither here nor anywhere in the process. And what an idle
//! client holds.
//!
//! A binary of its own, for the counting allocator and because whatever runs beside would be counted too.

#![expect(
    clippy::unwrap_used,
    reason = "tests panic; clippy exempts only the test functions themselves"
)]

#[path = "it/support/mod.rs"]
mod support;

use std::alloc::System;
use std::io::{Read, Write};
use std::net::TcpStream;

use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

use support::pg::fresh_database;
use support::proxy::{PATIENCE, Proxy};
use support::raw::{
    PROTOCOL_3_0, bind_text, describe_portal, execute, extended, parse, query, startup, sync,
};
use support::wait::wait_until;

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const REQUESTS: usize = 1_000;
/// Chores of the control plane between the first and the last of them (a sweep a second, the clock): more where others keep the
/// cores busy. One allocation a request would be a thousand.
const CHORES_MAX: usize = 300;
const IDLE: usize = 300;
/// Of the heap, in a debug build, whose futures are larger; and the process has chores meanwhile. What it comes to in a
/// release build, and with what the allocator adds, is in docs/benchmarks.md.
const IDLE_BYTES_MAX: usize = 4_400;
/// What is counted is the process's: one after the other.
static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

/// A client that allocates nothing: the blocking socket, one buffer on the stack.
struct Quiet(TcpStream);

impl Quiet {
    fn login(port: u16, database: &str) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_nodelay(true).unwrap();
        let mut quiet = Self(stream);
        quiet.ask(&startup(
            PROTOCOL_3_0,
            &[("user", "postgres"), ("database", database)],
        ));
        quiet
    }

    /// Sends and reads up to ReadyForQuery, which no row of these tests can be mistaken for. The bytes read.
    fn ask(&mut self, bytes: &[u8]) -> usize {
        self.0.write_all(bytes).unwrap();
        let (mut buffer, mut len) = ([0; 4096], 0);
        loop {
            let read = self.0.read(&mut buffer[len..]).unwrap();
            assert!(
                read > 0,
                "closed: {}",
                String::from_utf8_lossy(&buffer[..len])
            );
            len += read;
            if buffer[..len].ends_with(b"Z\0\0\0\x05I") || buffer[..len].ends_with(b"Z\0\0\0\x05T")
            {
                return len;
            }
        }
    }
}

fn allocations(mut request: impl FnMut()) -> usize {
    // Buffers reach their size, maps their capacity, texts the memo.
    for _ in 0..REQUESTS {
        request();
    }
    let region = Region::new(ALLOCATOR);
    for _ in 0..REQUESTS {
        request();
    }
    let change = region.change();
    change.allocations + change.reallocations
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_warm_proxy_allocates_nothing_per_request() {
    let _turn = TURN.lock().await;
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let (port, database) = (proxy.port, db.name.clone());
    let measured = tokio::task::spawn_blocking(move || {
        let mut client = Quiet::login(port, &database);
        // A second one, so that the server changes hands at every request.
        let mut other = Quiet::login(port, &database);
        let simple = query("select 1");
        let long = query(&format!("select 1 /* {} */", "long ".repeat(200)));
        let unnamed = extended("select $1::int", &["7"]);
        let prepared = [
            bind_text("", "s", &["7"]),
            describe_portal(""),
            execute("", 0),
            sync(),
        ]
        .concat();
        let prepare = [parse("s", "select $1::int"), sync()].concat();
        let (begin, commit) = (query("begin"), query("commit"));
        client.ask(&prepare);
        other.ask(&prepare);
        let mut both = |name: &'static str, request: &[u8]| {
            let alone = allocations(|| {
                let _answer = client.ask(request);
            });
            let in_turn = allocations(|| {
                client.ask(request);
                other.ask(request);
            });
            (name, alone, in_turn)
        };
        let mut measured = vec![
            both("simple", &simple),
            both("long", &long),
            both("prepared", &prepared),
            both("unnamed", &unnamed),
        ];
        let transaction = allocations(|| {
            client.ask(&begin);
            client.ask(&simple);
            client.ask(&commit);
        });
        measured.push(("transaction", transaction, 0));
        measured
    })
    .await
    .unwrap();
    println!(
        "allocations in {REQUESTS} requests, alone and in turn with another client: {measured:?}"
    );
    for (name, alone, in_turn) in measured {
        assert!(
            alone < CHORES_MAX && in_turn < CHORES_MAX,
            "{name}: {alone} alone, {in_turn} in turn, in {REQUESTS} requests"
        );
    }
    proxy.shut_down().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn an_idle_client_holds_little_and_leaves_nothing() {
    let _turn = TURN.lock().await;
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 2).await;
    let (port, database) = (proxy.port, db.name.clone());
    let log_in = move || {
        let mut client = Quiet::login(port, &database);
        client.ask(&query("select 1"));
        client
    };
    // Tables reach their size, and what the first clients of all need is there.
    let first = log_in.clone();
    let warm: Vec<_> = tokio::task::spawn_blocking(move || (0..IDLE).map(|_| first()).collect())
        .await
        .unwrap();
    let proxy_clients = "flowgate_clients";
    wait_until("all are in", PATIENCE, async || {
        proxy.metric(proxy_clients) == IDLE as u64
    })
    .await;
    drop(warm);
    wait_until("all have left", PATIENCE, async || {
        proxy.metric(proxy_clients) == 0
    })
    .await;
    let region = Region::new(ALLOCATOR);
    let held = || {
        let change = region.change();
        change
            .bytes_allocated
            .saturating_sub(change.bytes_deallocated)
            / IDLE
    };
    let clients: Vec<_> =
        tokio::task::spawn_blocking(move || (0..IDLE).map(|_| log_in()).collect())
            .await
            .unwrap();
    let settled = async || proxy.metric(proxy_clients) == IDLE as u64;
    wait_until("all are in again", PATIENCE, settled).await;
    let idle = held();
    println!("an idle client holds {idle} bytes");
    assert!(idle <= IDLE_BYTES_MAX, "{idle} bytes an idle client");
    drop(clients);
    wait_until("those who left hold nothing", PATIENCE, async || {
        held() < 64
    })
    .await;
    proxy.shut_down().await;
}
