//! The proxy itself is killed: clients see a closed socket, Postgres cleans up, a new proxy on the same port serves.

use std::process::Stdio;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use crate::cluster;
use crate::support::proxy::{PATIENCE, text, try_connect};
use crate::support::raw::{Raw, query, transcript};
use crate::support::wait::wait_until;

fn serve(primary: &str, port: u16) -> Child {
    let listen = format!("127.0.0.1:{port}");
    Command::new(env!("CARGO_BIN_EXE_flowgate"))
        .args([
            "serve",
            "--primary",
            primary,
            "--auth",
            "trust",
            "--http",
            "off",
            "--listen",
            &listen,
        ])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

#[tokio::test]
async fn a_proxy_killed_leaves_closed_sockets_and_a_clean_postgres() {
    let cluster = cluster(0).await;
    let port = free_port();
    let mut proxy = serve(&cluster.primary_url(), port);
    let url = format!("postgres://postgres@127.0.0.1:{port}/postgres");
    wait_until("it serves", PATIENCE, async || {
        try_connect(&url).await.is_ok()
    })
    .await;
    let direct = cluster.connect_primary().await.unwrap();
    let mut open = Raw::login(port, "postgres", "postgres", &[]).await;
    open.query("begin; create table half (n int)").await;
    let mut asleep = Raw::login(port, "postgres", "postgres", &[]).await;
    asleep.send(&query("select pg_sleep(80)")).await;

    let pid = Pid::from_raw(i32::try_from(proxy.id().unwrap()).unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    proxy.wait().await.unwrap();
    for raw in [&mut open, &mut asleep] {
        let frames = raw.until_end().await;
        assert!(frames.is_empty(), "{}", transcript(&frames));
    }
    wait_until("the transaction is rolled back", PATIENCE, async || {
        text(
            &direct,
            "select count(*) from pg_stat_activity where state like 'idle in%'",
        )
        .await
            == "0"
    })
    .await;
    assert_eq!(text(&direct, "select to_regclass('half')").await, "null");

    let _again = serve(&cluster.primary_url(), port);
    wait_until("a new one serves on the same port", PATIENCE, async || {
        try_connect(&url).await.is_ok()
    })
    .await;
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn a_proxy_told_to_end_says_so_and_exits_cleanly() {
    let cluster = cluster(0).await;
    let port = free_port();
    let mut proxy = serve(&cluster.primary_url(), port);
    let url = format!("postgres://postgres@127.0.0.1:{port}/postgres");
    wait_until("it serves", PATIENCE, async || {
        try_connect(&url).await.is_ok()
    })
    .await;
    let mut idle = Raw::login(port, "postgres", "postgres", &[]).await;
    idle.query("select 1").await;
    let pid = Pid::from_raw(i32::try_from(proxy.id().unwrap()).unwrap()).unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    let frames = idle.until_end().await;
    assert_eq!(
        crate::support::raw::error_code(&frames).as_deref(),
        Some("57P01"),
        "{}",
        transcript(&frames)
    );
    assert!(proxy.wait().await.unwrap().success());
    cluster.stop().await.unwrap();
}

/// A proxy of our own, so that its stderr can be read.
#[tokio::test]
async fn an_unreachable_primary_is_named_in_the_log() {
    let port = free_port();
    let nowhere = format!("postgres://postgres@127.0.0.1:{}/postgres", free_port());
    let listen = format!("127.0.0.1:{port}");
    let mut proxy = Command::new(env!("CARGO_BIN_EXE_flowgate"))
        .args([
            "serve",
            "--primary",
            &nowhere,
            "--auth",
            "trust",
            "--http",
            "off",
            "--listen",
            &listen,
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut out = BufReader::new(proxy.stdout.take().unwrap()).lines();
    let mut err = BufReader::new(proxy.stderr.take().unwrap()).lines();
    let said = async {
        loop {
            let line = tokio::select! {
                line = out.next_line() => line,
                line = err.next_line() => line,
            };
            match line.unwrap() {
                Some(line) if line.contains("primary") && line.contains("does not answer") => {
                    return line;
                }
                Some(_) => {}
                None => panic!("it ended without a word"),
            }
        }
    };
    tokio::time::timeout(PATIENCE, said).await.unwrap();
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}
