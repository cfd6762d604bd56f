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
use support::proxy::Proxy;
use support::raw::query;

#[tokio::test]
async fn a_big_result_streams_and_memory_stays_flat() {
    const ROWS: u64 = 12_800;
    const ROW: u64 = 8_192;
    let db = fresh_database().await;
    let proxy = Proxy::with_pool(&db, 1).await;
    let mut client = proxy.raw().await;
    client
        .send(&query(&format!(
            "select repeat('x', {ROW}) from generate_series(1, {ROWS})"
        )))
        .await;
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
    proxy.shut_down().await;
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
