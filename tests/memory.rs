//! Results of any size stream: what passes is not held.
//!
//! A binary of its own, because the memory of whatever runs beside would be counted too.

#![expect(
    clippy::unwrap_used,
    reason = "tests panic; clippy exempts only the test functions themselves"
)]

#[path = "it/support/mod.rs"]
mod support;

use support::pg::fresh_database;
use support::proxy::{PATIENCE, Proxy, text};
use support::raw::{Raw, query};
use support::wait::wait_until;

const ROWS: u64 = 12_800;
const ROW: u64 = 8_192;

/// One after the other: memory is the process's.
#[tokio::test]
async fn what_is_big_streams_and_memory_stays_flat() {
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    read_all(proxy.raw().await).await;

    // Over a replication connection, and while nobody reads, Postgres is held back.
    let mut client = proxy.raw_with(&[("replication", "database")]).await;
    let pid = client.pid();
    ask(&mut client).await;
    let direct = db.connect().await;
    let held_back = format!("select wait_event from pg_stat_activity where pid = {pid}");
    wait_until("Postgres is held back", PATIENCE, async || {
        text(&direct, &held_back).await == "ClientWrite"
    })
    .await;
    let sent = proxy.metric("flowgate_replication_bytes_total{from=\"server\"}");
    assert!(sent < ROWS * ROW / 2, "{sent} bytes are somewhere");
    read(client).await;
    proxy.shut_down().await;
}

async fn ask(client: &mut Raw) {
    let text = format!("select repeat('x', {ROW}) from generate_series(1, {ROWS})");
    client.send(&query(&text)).await;
}

async fn read_all(mut client: Raw) {
    ask(&mut client).await;
    read(client).await;
}

async fn read(mut client: Raw) {
    let (mut rows, mut bytes, before, mut most) = (0, 0, resident_mb(), 0);
    loop {
        let frame = client.read().await;
        match frame.tag {
            b'D' => {
                rows += 1;
                bytes += frame.body.len() as u64;
                if rows % 500 == 0 {
                    most = most.max(resident_mb());
                }
            }
            b'Z' => break,
            b'T' | b'C' => {}
            _ => panic!("{frame:?}"),
        }
    }
    assert_eq!((rows, bytes), (ROWS, ROWS * (ROW + 6)));
    assert!(
        most < before + 30,
        "resident memory went from {before} MB to {most} MB"
    );
}

/// Of this process, which the proxy is part of.
fn resident_mb() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .unwrap_or("0");
    line.split_whitespace()
        .next()
        .unwrap()
        .parse::<u64>()
        .unwrap()
        / 1024
}
