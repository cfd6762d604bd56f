//! `flowgate follow` while what it follows through goes away: the proxy is killed, the primary restarts.

use std::process::Stdio;

use flowgate::embedded::Cluster;
use serde_json::Value;
use tokio::process::{Child, Command};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::cluster;
use crate::support::follower::{Follower, seqs};
use crate::support::proxy::{PATIENCE, text, try_connect};
use crate::support::wait::wait_until;

const STEPS: usize = 6;

async fn serve(primary: &str, port: u16) -> Child {
    let listen = format!("127.0.0.1:{port}");
    let child = Command::new(env!("CARGO_BIN_EXE_flowgate"))
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
        .unwrap();
    let url = url(port);
    wait_until("it serves", PATIENCE, async || {
        try_connect(&url).await.is_ok()
    })
    .await;
    child
}

fn url(port: u16) -> String {
    format!("postgres://postgres@127.0.0.1:{port}/postgres")
}

/// A flow of steps one after another.
async fn define(admin: &Client) {
    let mut sql = "select pgflow.create_flow('long');".to_owned();
    for step in 0..STEPS {
        let after = step
            .checked_sub(1)
            .map_or_else(String::new, |before| format!("s{before}"));
        sql += &format!("select pgflow.add_step('long', 's{step}', '{{{after}}}');");
    }
    sql += "insert into pgflow.workers (worker_id, queue_name, function_name)
            values ('aaaaaaaa-0000-4000-8000-000000000001', 'long', 'test')";
    admin.batch_execute(&sql).await.unwrap();
}

/// As a worker would, past the proxy.
async fn work(cluster: &Cluster, run: Uuid, step: usize) {
    let worker = cluster.connect_primary().await.unwrap();
    let take = "select count(*) from pgflow.start_tasks('long', array(select msg_id from pgmq.read('long', 600, 10)),
                'aaaaaaaa-0000-4000-8000-000000000001')";
    assert_ne!(text(&worker, take).await, "0");
    let complete = format!("select pgflow.complete_task('{run}', 's{step}', 0, '1')");
    worker.batch_execute(&complete).await.unwrap();
}

#[tokio::test]
async fn a_follower_goes_on_where_it_was_after_the_proxy_was_killed_and_the_primary_restarted() {
    let mut cluster = cluster(0).await;
    define(&cluster.connect_primary().await.unwrap()).await;
    let port = free_port();
    let mut proxy = serve(&cluster.primary_url(), port).await;
    let run = Uuid::new_v4();
    let start = format!("select pgflow.start_flow('long', '{{}}', '{run}')");
    let admin = cluster.connect_primary().await.unwrap();
    let mut of_flow = Follower::start(&url(port), &["--flow", "long", "--json"]);
    admin.batch_execute(&start).await.unwrap();
    drop(admin);
    let mut of_run = Follower::start(&url(port), &[&run.to_string(), "--json"]);
    let mut told = [vec![of_flow.event().await], vec![of_run.event().await]];
    for step in 0..STEPS {
        match step % 3 {
            0 => {
                // Killed, and the step ends while there is none.
                proxy.kill().await.unwrap();
                work(&cluster, run, step).await;
                proxy = serve(&cluster.primary_url(), port).await;
            }
            1 => {
                cluster.restart_primary().await.unwrap();
                work(&cluster, run, step).await;
            }
            _ => work(&cluster, run, step).await,
        }
        for (follower, events) in [&mut of_flow, &mut of_run].into_iter().zip(&mut told) {
            let step = format!("s{step}");
            while events.last().is_none_or(|event| {
                event["step_slug"] != step || event["event_type"] != "step:completed"
            }) {
                events.push(follower.event().await);
            }
        }
    }
    let end = of_run.ended().await;
    assert_eq!(end.code, Some(0), "{}", end.err);
    assert!(
        end.err.contains("connection lost") && end.err.contains("connected again"),
        "{}",
        end.err
    );
    told[1].extend(
        end.out
            .iter()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()),
    );
    while told[0]
        .last()
        .is_none_or(|event| event["event_type"] != "run:completed")
    {
        told[0].push(of_flow.event().await);
    }
    let all: Vec<i64> = (1..=2 + 2 * STEPS as i64).collect();
    assert_eq!(seqs(&told[1]), all, "of the run");
    assert_eq!(seqs(&told[0]), all, "of the flow");
    drop(proxy);
    cluster.stop().await.unwrap();
}

fn free_port() -> u16 {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    socket.local_addr().unwrap().port()
}
