//! The Postgres of our own: it replicates, survives what it should, and leaves nothing behind.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use flowgate::embedded::{Cluster, ClusterOptions, EmbeddedError};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use crate::support::wait::wait_until;

const PATIENCE: Duration = Duration::from_secs(20);

#[tokio::test]
async fn a_cluster_replicates_and_leaves_no_process_and_no_folder() {
    let cluster = Cluster::start(ClusterOptions::default()).await.unwrap();
    let folder = cluster.folder().to_owned();
    let pids = [
        cluster.primary_pid().unwrap(),
        cluster.replica_pid(0).unwrap(),
    ];
    let primary = cluster.connect_primary().await.unwrap();
    primary
        .batch_execute("create table t (n int); insert into t values (1), (2)")
        .await
        .unwrap();
    let replica = cluster.connect_replica(0).await.unwrap();
    wait_until("the rows reach the replica", PATIENCE, async || {
        replica
            .query_one("select count(*) from t", &[])
            .await
            .is_ok_and(|row| row.get::<_, i64>(0) == 2)
    })
    .await;
    let refused = replica
        .batch_execute("insert into t values (3)")
        .await
        .unwrap_err();
    assert_eq!(refused.code().unwrap().code(), "25006");
    cluster.stop().await.unwrap();
    assert!(!folder.exists());
    assert!(pids.into_iter().all(is_gone));
}

#[tokio::test]
async fn a_panic_leaves_nothing_either() {
    let task = tokio::spawn(async {
        let cluster = Cluster::start(ClusterOptions {
            replicas: 0,
            ..ClusterOptions::default()
        })
        .await
        .unwrap();
        std::panic::panic_any((cluster.folder().to_owned(), cluster.primary_pid().unwrap()));
    });
    let panic = task.await.unwrap_err().into_panic();
    let (folder, pid) = panic.downcast_ref::<(PathBuf, u32)>().unwrap();
    assert!(!folder.exists());
    assert!(is_gone(*pid));
}

#[tokio::test]
async fn servers_come_back_on_their_ports_and_the_replica_catches_up() {
    let mut cluster = Cluster::start(ClusterOptions::default()).await.unwrap();
    let ports = (cluster.primary_port(), cluster.replica_port(0));
    cluster
        .connect_primary()
        .await
        .unwrap()
        .batch_execute("create table t (n int)")
        .await
        .unwrap();
    cluster.kill_primary().await.unwrap();
    assert_eq!(cluster.primary_pid(), None);
    assert!(matches!(
        cluster.kill_primary().await,
        Err(EmbeddedError::NotRunning { .. })
    ));
    cluster.start_primary().await.unwrap();
    cluster.stop_replica(0).await.unwrap();
    cluster
        .connect_primary()
        .await
        .unwrap()
        .batch_execute("insert into t values (7)")
        .await
        .unwrap();
    cluster.restart_primary().await.unwrap();
    cluster.start_replica(0).await.unwrap();
    assert_eq!(ports, (cluster.primary_port(), cluster.replica_port(0)));
    let replica = cluster.connect_replica(0).await.unwrap();
    wait_until(
        "the replica has what happened without it",
        PATIENCE,
        async || {
            replica
                .query_one("select sum(n) from t", &[])
                .await
                .is_ok_and(|row| row.get::<_, Option<i64>>(0) == Some(7))
        },
    )
    .await;
}

#[tokio::test]
async fn a_delayed_replica_is_behind_until_the_delay_is_lifted() {
    let cluster = Cluster::start(ClusterOptions::default()).await.unwrap();
    cluster
        .connect_primary()
        .await
        .unwrap()
        .batch_execute("create table t (n int)")
        .await
        .unwrap();
    let replica = cluster.connect_replica(0).await.unwrap();
    let has_rows = async || {
        replica
            .query_one("select count(*) from t", &[])
            .await
            .is_ok_and(|row| row.get::<_, i64>(0) > 0)
    };
    wait_until("the table is there", PATIENCE, async || {
        replica.query("select from t", &[]).await.is_ok()
    })
    .await;
    cluster
        .set_replica_delay(0, Duration::from_secs(600))
        .await
        .unwrap();
    let primary = cluster.connect_primary().await.unwrap();
    primary
        .batch_execute("insert into t values (1)")
        .await
        .unwrap();
    let written: String = primary
        .query_one("select pg_current_wal_lsn()::text", &[])
        .await
        .unwrap()
        .get(0);
    wait_until("the WAL is there", PATIENCE, async || {
        let received = "select pg_last_wal_receive_lsn() >= $1::text::pg_lsn";
        replica
            .query_one(received, &[&written])
            .await
            .is_ok_and(|row| row.get(0))
    })
    .await;
    assert!(!has_rows().await);
    cluster.set_replica_delay(0, Duration::ZERO).await.unwrap();
    wait_until("the rows show", PATIENCE, has_rows).await;
}

#[tokio::test]
async fn kept_data_is_there_again_and_nobody_else_may_use_it_meanwhile() {
    let kept = tempfile::tempdir().unwrap();
    std::fs::set_permissions(
        kept.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let data = Some(kept.path().join("data"));
    let options = ClusterOptions {
        data,
        password: Some("it's a \\ pass word".to_owned()),
        ..ClusterOptions::default()
    };
    let first = Cluster::start(options.clone()).await.unwrap();
    first
        .connect_primary()
        .await
        .unwrap()
        .batch_execute("create table t as select 42 as n")
        .await
        .unwrap();
    let passwordless = format!(
        "postgres://postgres:wrong@127.0.0.1:{}/postgres",
        first.primary_port()
    );
    assert!(flowgate::embedded::connect(&passwordless).await.is_err());
    assert!(matches!(
        Cluster::start(options.clone()).await,
        Err(EmbeddedError::InUse { .. })
    ));
    first.stop().await.unwrap();

    // A second replica joins data that had one, and one that is no longer wanted leaves no slot.
    for replicas in [2, 1] {
        let again = Cluster::start(ClusterOptions {
            replicas,
            ..options.clone()
        })
        .await
        .unwrap();
        for n in 0..replicas {
            let replica = again.connect_replica(n).await.unwrap();
            wait_until("the row is on the replica", PATIENCE, async || {
                replica
                    .query_one("select n from t", &[])
                    .await
                    .is_ok_and(|row| row.get::<_, i32>(0) == 42)
            })
            .await;
        }
        let primary = again.connect_primary().await.unwrap();
        let slots: i64 = primary
            .query_one("select count(*) from pg_replication_slots", &[])
            .await
            .unwrap()
            .get(0);
        assert_eq!(usize::try_from(slots).unwrap(), replicas);
        // No stop: even kept data may end by a drop.
    }
}

#[tokio::test]
async fn a_server_that_cannot_start_says_why() {
    let settings = vec![("shared_buffers".to_owned(), "many".to_owned())];
    let error = Cluster::start(ClusterOptions {
        settings,
        ..ClusterOptions::default()
    })
    .await
    .unwrap_err();
    assert!(
        error
            .to_string()
            .contains("invalid value for parameter \"shared_buffers\""),
        "{error}"
    );
}

#[tokio::test]
async fn a_given_port_that_is_taken_is_an_error() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let ports = vec![taken.local_addr().unwrap().port()];
    let error = Cluster::start(ClusterOptions {
        ports,
        replicas: 0,
        ..ClusterOptions::default()
    })
    .await
    .unwrap_err();
    assert!(
        error.to_string().contains("Address already in use"),
        "{error}"
    );
}

#[tokio::test]
async fn killing_the_owner_leaves_nothing() {
    for signal in [Signal::KILL, Signal::INT, Signal::TERM] {
        let mut owner = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "embedded::owner_of_a_cluster",
                "--ignored",
                "--nocapture",
            ])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(owner.stdout.take().unwrap())
            .lines()
            .map_while(Result::ok);
        let owned = lines
            .filter_map(|line| line.strip_prefix("OWNS ").map(str::to_owned))
            .next()
            .unwrap();
        let (folder, pids) = owned.split_once(' ').unwrap();
        let pids: Vec<u32> = pids.split(' ').map(|pid| pid.parse().unwrap()).collect();
        assert!(Path::new(folder).exists() && !pids.iter().copied().any(is_gone));
        kill_process(pid(owner.id()), signal).unwrap();
        owner.wait().unwrap();
        wait_until("processes and folder are gone", PATIENCE, async || {
            !Path::new(folder).exists() && pids.iter().copied().all(is_gone)
        })
        .await;
    }
}

#[tokio::test]
#[ignore = "started by killing_the_owner_leaves_nothing, as a process of its own"]
async fn owner_of_a_cluster() {
    let cluster = Cluster::start(ClusterOptions::default()).await.unwrap();
    let pids = (
        cluster.primary_pid().unwrap(),
        cluster.replica_pid(0).unwrap(),
    );
    println!(
        "\nOWNS {} {} {}",
        cluster.folder().display(),
        pids.0,
        pids.1
    );
    std::future::pending::<()>().await;
}

fn pid(raw: u32) -> Pid {
    i32::try_from(raw)
        .ok()
        .and_then(Pid::from_raw)
        .expect("the kernel's pids fit")
}

fn is_gone(raw: u32) -> bool {
    test_kill_process(pid(raw)).is_err()
}
