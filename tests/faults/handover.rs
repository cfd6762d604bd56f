//! One proxy takes over from another on the same port: the next one is started, then the old one is told to go, and no connect
//! fails meanwhile. Whole processes, with signals and sockets of their own.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::process::Child;
use tokio::time::timeout;

use crate::cluster;
use crate::support::proxy::{PATIENCE, connect, text, try_connect, try_text};
use crate::support::wait::wait_until;

fn serve(config: &Path) -> Child {
    tokio::process::Command::new(env!("CARGO_BIN_EXE_flowgate"))
        .args(["serve", "--config"])
        .arg(config)
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap()
}

/// The processes that listen on a port of this machine, as the kernel knows them: its listening sockets.
fn listening(port: u16) -> usize {
    let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
    let port = format!(":{port:04X}");
    let listens = |line: &&str| {
        let mut words = line.split_whitespace().skip(1);
        words.next().is_some_and(|local| local.ends_with(&port)) && words.nth(1) == Some("0A")
    };
    table.lines().filter(listens).count()
}

/// Clients that connect, ask and leave, over and over.
struct Crowd {
    stop: Arc<AtomicBool>,
    connects: Arc<AtomicUsize>,
    tasks: Vec<tokio::task::JoinHandle<Vec<String>>>,
}

impl Crowd {
    /// `asks`: whether an answer counts, too.
    fn start(url: &str, asks: bool) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let connects = Arc::new(AtomicUsize::new(0));
        let one = |_| {
            let (url, stop, connects) = (url.to_owned(), Arc::clone(&stop), Arc::clone(&connects));
            tokio::spawn(async move {
                let mut failures = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    match try_connect(&url).await {
                        Ok(client) => {
                            connects.fetch_add(1, Ordering::Relaxed);
                            match try_text(&client, "select 'served'").await {
                                Ok(answer) => assert_eq!(answer, "served"),
                                Err(error) if asks => failures.push(format!("query: {error:?}")),
                                Err(_told_to_go) => {}
                            }
                        }
                        Err(error) => failures.push(format!("connect: {error:?}")),
                    }
                }
                failures
            })
        };
        let tasks = (0..16).map(one).collect();
        Self {
            stop,
            connects,
            tasks,
        }
    }

    async fn go_on(&self, count: usize) {
        let aim = self.connects.load(Ordering::Relaxed) + count;
        wait_until("the crowd goes on", PATIENCE, async || {
            self.connects.load(Ordering::Relaxed) >= aim
        })
        .await;
    }

    async fn failures(self) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        let mut failures = Vec::new();
        for task in self.tasks {
            failures.extend(timeout(PATIENCE, task).await.unwrap().unwrap());
        }
        failures
    }
}

fn free_port() -> u16 {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    socket.local_addr().unwrap().port()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_process_takes_over_and_no_connect_fails() {
    let cluster = cluster(0).await;
    let primary = cluster.primary_url();
    for threads in [1, 2] {
        let (port, http) = (free_port(), free_port());
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("flowgate.toml");
        let text_of_config = format!(
            "[listen]\npostgres = \"127.0.0.1:{port}\"\nhttp = \"127.0.0.1:{http}\"\nreuse_port = true\nthreads = {threads}\n\
             [primary]\nurl = \"{primary}\"\n[auth]\nmethod = \"trust\"\n"
        );
        std::fs::write(&config, text_of_config).unwrap();
        let url = format!("postgres://postgres@127.0.0.1:{port}/postgres");
        let console = format!("postgres://postgres@127.0.0.1:{port}/flowgate");

        let mut first = serve(&config);
        wait_until("it serves", PATIENCE, async || {
            try_connect(&url).await.is_ok()
        })
        .await;
        let admin = connect(&console).await;
        let stays = connect(&url).await;
        stays.batch_execute("begin").await.unwrap();
        let crowd = Crowd::start(&url, true);
        crowd.go_on(200).await;
        let mut second = serve(&config);
        wait_until("both listen", PATIENCE, async || {
            listening(port) == 2 * threads
        })
        .await;
        crowd.go_on(200).await;
        admin
            .batch_execute("shutdown wait_for_clients")
            .await
            .unwrap();
        wait_until("one listens", PATIENCE, async || listening(port) == threads).await;
        crowd.go_on(200).await;
        assert_eq!(crowd.failures().await, [""; 0], "{threads} threads");
        // Who was there stays, and the end comes when they leave.
        assert_eq!(
            text(&stays, "select 'mid-transaction'").await,
            "mid-transaction"
        );
        assert!(first.try_wait().unwrap().is_none());
        drop(stays);
        assert!(
            timeout(PATIENCE, first.wait())
                .await
                .unwrap()
                .unwrap()
                .success()
        );

        // Once more by signal: idle clients are told to go, but whoever knocks is let in by one or the other.
        let crowd = Crowd::start(&url, false);
        crowd.go_on(100).await;
        let mut third = serve(&config);
        wait_until("both listen", PATIENCE, async || {
            listening(port) == 2 * threads
        })
        .await;
        let pid = second.id().unwrap().to_string();
        assert!(
            Command::new("kill")
                .args(["-TERM", &pid])
                .status()
                .unwrap()
                .success()
        );
        assert!(
            timeout(PATIENCE, second.wait())
                .await
                .unwrap()
                .unwrap()
                .success()
        );
        crowd.go_on(200).await;
        assert_eq!(crowd.failures().await, [""; 0], "{threads} threads");
        third.kill().await.unwrap();
    }
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn a_port_is_shared_only_if_that_was_said() {
    let cluster = cluster(0).await;
    let port = free_port();
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("flowgate.toml");
    let text_of_config = format!(
        "[listen]\npostgres = \"127.0.0.1:{port}\"\nhttp = \"off\"\n[primary]\nurl = \"{}\"\n[auth]\nmethod = \"trust\"\n",
        cluster.primary_url()
    );
    std::fs::write(&config, text_of_config).unwrap();
    let url = format!("postgres://postgres@127.0.0.1:{port}/postgres");
    let mut first = serve(&config);
    wait_until("it serves", PATIENCE, async || {
        try_connect(&url).await.is_ok()
    })
    .await;
    let second = timeout(PATIENCE, serve(&config).wait())
        .await
        .unwrap()
        .unwrap();
    assert!(!second.success(), "the port is taken");
    assert_eq!(text(&connect(&url).await, "select 1").await, "1");
    first.kill().await.unwrap();
    cluster.stop().await.unwrap();
}
