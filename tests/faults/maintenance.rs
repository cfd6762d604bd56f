//! Whoever does the maintenance is killed, or the primary goes away under it: somebody goes on with it.

use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio_postgres::Client;

use crate::cluster;
use crate::support::proxy::{PATIENCE, Proxy, text};
use crate::support::wait::wait_until;

/// The backend whose flowgate does the maintenance; `null` while nobody does.
const LEADER: &str = "select max(a.pid) from pg_locks as l join pg_stat_activity as a using (pid)
    where l.locktype = 'advisory' and l.granted and a.application_name = 'flowgate maintenance'";

fn serve(primary: &str) -> Child {
    Command::new(env!("CARGO_BIN_EXE_flowgate"))
        .args([
            "serve",
            "--primary",
            primary,
            "--auth",
            "trust",
            "--http",
            "off",
        ])
        .args([
            "--listen",
            "127.0.0.1:0",
            "--log",
            "warn,flowgate::maintenance=debug",
        ])
        .env("FLOWGATE_MAINTENANCE__REQUEUE", "1s")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

/// A task of flow `greet` whose worker went away long ago.
async fn stalled_task(client: &Client) {
    let stall = "insert into pgflow.workers values ('00000000-0000-4000-8000-000000000001', 'greet', 'w')
            on conflict do nothing;
        select pgflow.start_flow('greet', '{}');
        select pgflow.start_tasks('greet', array(select msg_id from pgmq.read('greet', 5, 1)),
            '00000000-0000-4000-8000-000000000001');
        update pgflow.step_tasks set queued_at = now() - interval '1 day', started_at = now() - interval '1 hour'
            where status = 'started'";
    client.batch_execute(stall).await.unwrap();
}

async fn is_requeued(client: &Client) -> bool {
    text(
        client,
        "select count(*) from pgflow.step_tasks where status = 'started'",
    )
    .await
        == "0"
}

#[tokio::test]
async fn another_flowgate_takes_over_from_one_that_was_killed() {
    let cluster = cluster(0).await;
    let direct = cluster.connect_primary().await.unwrap();
    let mut first = serve(&cluster.primary_url());
    wait_until("the first one leads", PATIENCE, async || {
        text(&direct, LEADER).await != "null"
    })
    .await;
    let leader = text(&direct, LEADER).await;
    let _second = serve(&cluster.primary_url());
    let both =
        "select count(*) from pg_stat_activity where application_name = 'flowgate maintenance'";
    wait_until("both are there", PATIENCE, async || {
        text(&direct, both).await == "2"
    })
    .await;
    stalled_task(&direct).await;
    wait_until("the task is requeued", PATIENCE, async || {
        is_requeued(&direct).await
    })
    .await;
    assert_eq!(text(&direct, LEADER).await, leader);

    let pid = Pid::from_raw(i32::try_from(first.id().unwrap()).unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    first.wait().await.unwrap();
    wait_until("the second one leads", PATIENCE, async || {
        let now = text(&direct, LEADER).await;
        now != leader && now != "null"
    })
    .await;
    direct
        .batch_execute("update pgmq.q_greet set vt = now()")
        .await
        .unwrap();
    stalled_task(&direct).await;
    wait_until("it works", PATIENCE, async || is_requeued(&direct).await).await;
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn an_outage_of_the_primary_is_said_once_and_maintenance_goes_on_after_it() {
    let mut cluster = cluster(0).await;
    let mut proxy = serve(&cluster.primary_url());
    let mut lines = BufReader::new(proxy.stderr.take().unwrap()).lines();
    let mut out = BufReader::new(proxy.stdout.take().unwrap()).lines();
    let mut said = Vec::new();
    let mut until = async |word: &str, times: usize| {
        let mut seen = 0;
        while seen < times {
            let line = tokio::select! {
                Ok(Some(line)) = lines.next_line() => line,
                Ok(Some(line)) = out.next_line() => line,
                () = tokio::time::sleep(PATIENCE) => panic!("no `{word}` in {said:#?}"),
            };
            seen += usize::from(line.contains(word));
            said.push(line);
        }
        said.clone()
    };
    until("done by this flowgate", 1).await;
    for crash in [false, true] {
        if crash {
            cluster.kill_primary().await.unwrap();
        } else {
            cluster.stop_primary().await.unwrap();
        }
        until("still interrupted", 2).await;
        cluster.start_primary().await.unwrap();
        until("done by this flowgate", 1).await;
        let direct = cluster.connect_primary().await.unwrap();
        direct
            .batch_execute("update pgmq.q_greet set vt = now()")
            .await
            .unwrap();
        stalled_task(&direct).await;
        wait_until("it works", PATIENCE, async || is_requeued(&direct).await).await;
    }
    let said = until("stalled tasks are back", 0).await;
    let interrupted = said
        .iter()
        .filter(|line| line.contains("maintenance is interrupted"));
    assert_eq!(interrupted.count(), 2, "{said:#?}");
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn a_primary_that_is_a_replica_is_maintained_once_it_is_promoted() {
    let mut cluster = cluster(1).await;
    let proxy = Proxy::before(&cluster.replica_url(0), &[], |config| {
        config.maintenance.requeue = Some(Duration::from_millis(100));
    })
    .await;
    let replica = cluster.connect_replica(0).await.unwrap();
    let asks =
        "select count(*) from pg_stat_activity where application_name = 'flowgate maintenance'";
    wait_until("it has looked", PATIENCE, async || {
        text(&replica, asks).await == "1"
    })
    .await;
    assert_eq!(proxy.metric("flowgate_maintenance_leader"), 0);
    cluster.kill_primary().await.unwrap();
    cluster.promote_replica(0).await.unwrap();
    wait_until("it leads", PATIENCE, async || {
        proxy.metric("flowgate_maintenance_leader") == 1
    })
    .await;
    stalled_task(&replica).await;
    wait_until("it works", PATIENCE, async || is_requeued(&replica).await).await;
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}
