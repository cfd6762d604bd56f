//! A proxy started where few files may be open at first takes as many clients as the hard limit allows.

use std::process::Stdio;

use futures_util::future::join_all;
use tokio::process::Command;

use crate::cluster;
use crate::support::proxy::{PATIENCE, connect, text, try_connect};
use crate::support::wait::wait_until;

#[tokio::test]
async fn the_soft_limit_of_open_files_is_no_limit_of_clients() {
    let cluster = cluster(0).await;
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let at = listener.local_addr().unwrap().to_string();
    drop(listener);
    let proxy = Command::new("sh")
        .args(["-c", "ulimit -Sn 60 && exec \"$@\"", "sh"])
        .args([env!("CARGO_BIN_EXE_flowgate"), "serve", "--auth", "trust"])
        .args(["--http", "off", "--listen", &at])
        .args(["--primary", &cluster.primary_url()])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let url = format!("postgres://postgres@{at}/postgres");
    wait_until("the proxy", PATIENCE, async || {
        try_connect(&url).await.is_ok()
    })
    .await;
    let clients = join_all((0..100).map(|_| connect(&url))).await;
    for client in &clients {
        assert_eq!(text(client, "select 'served'").await, "served");
    }
    drop((clients, proxy));
    cluster.stop().await.unwrap();
}
