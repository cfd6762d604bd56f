//! Pools while Postgres is restarted on purpose, and while the network between swallows what is sent.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use crate::cluster;
use crate::support::proxy::{PATIENCE, Proxy, connect, row, table, text};
use crate::support::raw::{first_columns, query};
use crate::support::wait::wait_until;

/// What `PAUSE` is for: nobody sees the restart.
#[tokio::test]
async fn postgres_is_restarted_behind_a_pause_and_no_client_notices() {
    let mut cluster = cluster(0).await;
    let proxy = Proxy::before(&cluster.primary_url(), &[], |_| ()).await;
    let console = proxy.console().await;
    let idle = proxy.connect().await;
    idle.batch_execute("set work_mem = '3MB'").await.unwrap();
    let statement = idle.prepare("select $1::int4 + 1").await.unwrap();
    let mut busy = proxy.raw().await;
    busy.query("begin").await;
    let pausing = {
        let admin = proxy.console().await;
        tokio::spawn(async move { admin.batch_execute("pause").await })
    };
    wait_until("it is paused", PATIENCE, async || {
        row(&console, "SHOW STATE", "key", "paused").await["value"] == "yes"
    })
    .await;
    busy.query("commit").await;
    timeout(PATIENCE, pausing).await.unwrap().unwrap().unwrap();
    busy.send(&query("select 'after the restart'")).await;
    cluster.restart_primary().await.unwrap();
    assert!(busy.is_quiet(), "it waits");
    console.batch_execute("resume").await.unwrap();
    assert_eq!(
        first_columns(&busy.until_ready().await),
        ["after the restart"]
    );
    assert_eq!(text(&idle, "show work_mem").await, "3MB");
    let answer = idle.query_one(&statement, &[&41]).await.unwrap();
    assert_eq!(answer.get::<_, i32>(0), 42);
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}

/// Stands between the proxy and Postgres. Frozen connections stay open and carry nothing any more, as behind a firewall that
/// has forgotten them; later ones work.
struct Relay {
    port: u16,
    freeze: watch::Sender<usize>,
    accepted: Arc<AtomicUsize>,
}

impl Relay {
    async fn start(to: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (freeze, frozen) = watch::channel(0);
        let accepted = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&accepted);
        tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let number = count.fetch_add(1, Ordering::Relaxed) + 1;
                tokio::spawn(carry(client, to, number, frozen.clone()));
            }
        });
        Self {
            port,
            freeze,
            accepted,
        }
    }

    fn freeze_all_so_far(&self) {
        self.freeze
            .send_replace(self.accepted.load(Ordering::Relaxed));
    }
}

async fn carry(mut client: TcpStream, to: u16, number: usize, mut frozen: watch::Receiver<usize>) {
    let mut server = TcpStream::connect(("127.0.0.1", to)).await.unwrap();
    tokio::select! {
        _ended = tokio::io::copy_bidirectional(&mut client, &mut server) => return,
        _frozen = frozen.wait_for(|upto| *upto >= number) => {}
    }
    // Held open to the end of the test.
    std::future::pending::<()>().await;
    drop((client, server));
}

#[tokio::test]
async fn servers_that_have_gone_silent_are_found_out_before_they_are_lent() {
    let cluster = cluster(0).await;
    let relay = Relay::start(cluster.primary_port()).await;
    let primary = cluster.primary_url().replacen(
        &format!(":{}", cluster.primary_port()),
        &format!(":{}", relay.port),
        1,
    );
    let longest = Duration::from_millis(200);
    let proxy = Proxy::before(&primary, &[], |config| {
        config.pool.server_check = Some(longest);
        config.pool.size = 5.try_into().unwrap();
    })
    .await;
    let console = proxy.console().await;
    // A few idle servers.
    let mut clients = Vec::new();
    for _ in 0..4 {
        let client = connect(&proxy.url()).await;
        client.batch_execute("begin").await.unwrap();
        clients.push(client);
    }
    for client in &clients {
        client.batch_execute("commit").await.unwrap();
    }
    let idle_since = Instant::now();
    assert_eq!(table(&console, "SHOW SERVERS").await.len(), 4);
    let pid = "select pg_backend_pid()";
    let before = text(&clients[0], pid).await;
    wait_until("they have been idle for long", PATIENCE, async || {
        idle_since.elapsed() > 2 * longest
    })
    .await;
    // One that answers is lent.
    assert_eq!(text(&clients[0], pid).await, before);
    let idle_since = Instant::now();
    wait_until("they have been idle for long", PATIENCE, async || {
        idle_since.elapsed() > 2 * longest
    })
    .await;
    relay.freeze_all_so_far();
    // The first one is asked in vain; the others are not asked one by one.
    let answers = futures_util::future::join_all(clients.iter().map(|client| text(client, pid)));
    let answers = timeout(PATIENCE, answers).await.unwrap();
    assert!(!answers.contains(&before), "{answers:?}");
    let servers = table(&console, "SHOW SERVERS").await;
    assert!(
        servers.len() <= 4,
        "the silent ones are closed: {servers:?}"
    );
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}
