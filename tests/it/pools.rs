//! Pools: how many servers there are and when, who gets one next, and who is told what while he waits. Against Postgres's own
//! list of connections.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use flowgate::app::Hooks;
use flowgate::config::Config;
use tokio::time::timeout;
use tokio_postgres::{AsyncMessage, Client};

use crate::support::pg::{TestDb, fresh_database};
use crate::support::proxy::{PATIENCE, Proxy, connect, row, sqlstate, table, text, try_text};
use crate::support::raw::{error_code, first_columns, query, tags, transcript};
use crate::support::wait::wait_until;

/// Connections from the proxy that Postgres has to these databases.
async fn open(direct: &Client, databases: &[&str]) -> usize {
    let names = databases.join("', '");
    let count = format!(
        "select count(*) from pg_stat_activity where datname in ('{names}') and pid <> pg_backend_pid() \
         and application_name not like 'flowgate%' and application_name <> 'direct'"
    );
    text(direct, &count).await.parse().unwrap()
}

async fn direct(db: &TestDb) -> Client {
    connect(&format!("{}?application_name=direct", db.primary_url)).await
}

async fn waiting(console: &Client, db: &TestDb) -> usize {
    let pool = row(console, "SHOW POOLS", "database", &db.name).await;
    pool["cl_waiting"].parse().unwrap()
}

async fn start(db: &TestDb, tweak: impl FnOnce(&mut Config)) -> Proxy {
    Proxy::without_replica(db, tweak).await
}

#[tokio::test]
async fn a_pool_with_clients_keeps_its_minimum_and_one_without_gives_all_back() {
    let db = fresh_database().await;
    let proxy = start(&db, |config| {
        config.pool.size = 5.try_into().unwrap();
        config.pool.min_size = 3;
        config.pool.server_idle = Duration::from_secs(1);
    })
    .await;
    let direct = direct(&db).await;
    assert_eq!(open(&direct, &[&db.name]).await, 0, "nobody to keep it for");
    let client = proxy.connect().await;
    wait_until("the minimum is open", PATIENCE, async || {
        open(&direct, &[&db.name]).await == 3
    })
    .await;
    // Beyond it they go when idle; one that dies is replaced.
    let more: Vec<_> = futures_util::future::join_all((0..4).map(|_| proxy.connect())).await;
    for client in &more {
        client.batch_execute("begin").await.unwrap();
    }
    client.batch_execute("begin").await.unwrap();
    assert_eq!(open(&direct, &[&db.name]).await, 5);
    for client in more.iter().chain([&client]) {
        client.batch_execute("commit").await.unwrap();
    }
    wait_until("the minimum is left", PATIENCE, async || {
        open(&direct, &[&db.name]).await == 3
    })
    .await;
    let kill = format!(
        "select count(pg_terminate_backend(pid, 5000)) from pg_stat_activity where datname = '{}' and application_name <> 'direct' and application_name not like 'flowgate%'",
        db.name
    );
    assert_eq!(text(&direct, &kill).await, "3");
    wait_until("the minimum is open again", PATIENCE, async || {
        open(&direct, &[&db.name]).await == 3
    })
    .await;
    drop((client, more));
    wait_until("nothing is left", PATIENCE, async || {
        open(&direct, &[&db.name]).await == 0
    })
    .await;
    proxy.shut_down().await;
}

#[tokio::test]
async fn the_reserve_is_opened_for_who_has_waited_and_closed_when_nobody_does() {
    let db = fresh_database().await;
    let proxy = start(&db, |config| {
        config.pool.size = 1.try_into().unwrap();
        config.pool.reserve_size = 1;
        config.pool.reserve_timeout = Duration::from_millis(200);
    })
    .await;
    let direct = direct(&db).await;
    let console = proxy.console().await;
    let (holder, mut patient, mut late) =
        (proxy.connect().await, proxy.raw().await, proxy.raw().await);
    holder.batch_execute("begin").await.unwrap();
    patient.send(&query("begin; select 'reserve'")).await;
    assert_eq!(first_columns(&patient.until_ready().await), ["reserve"]);
    assert_eq!(proxy.metric("flowgate_servers_reserve_total"), 1);
    // It is used up: who comes then waits for one of the two.
    late.send(&query("select 'in turn'")).await;
    wait_until("one waits", PATIENCE, async || {
        waiting(&console, &db).await == 1
    })
    .await;
    assert_eq!(open(&direct, &[&db.name]).await, 2);
    patient.query("commit").await;
    assert_eq!(first_columns(&late.until_ready().await), ["in turn"]);
    wait_until("the reserve is closed", PATIENCE, async || {
        open(&direct, &[&db.name]).await == 1
    })
    .await;
    holder.batch_execute("commit").await.unwrap();
    proxy.shut_down().await;
}

#[tokio::test]
async fn servers_are_served_in_the_order_they_were_asked_for() {
    let db = fresh_database().await;
    let proxy = start(&db, |config| config.pool.size = 1.try_into().unwrap()).await;
    let console = proxy.console().await;
    let holder = proxy.connect().await;
    let mut queue = Vec::new();
    for _ in 0..5 {
        queue.push(proxy.raw().await);
    }
    holder
        .batch_execute("create table served (at bigserial, who int)")
        .await
        .unwrap();
    holder.batch_execute("begin").await.unwrap();
    for (at, client) in queue.iter_mut().enumerate() {
        client
            .send(&query(&format!("insert into served (who) values ({at})")))
            .await;
        wait_until("it waits", PATIENCE, async || {
            waiting(&console, &db).await == at + 1
        })
        .await;
    }
    // One gives up; those behind move up.
    queue[2].cancel().await;
    assert_eq!(
        error_code(&queue[2].until_ready().await).as_deref(),
        Some("57014")
    );
    holder.batch_execute("commit").await.unwrap();
    for at in [0, 1, 3, 4] {
        let frames = queue[at].until_ready().await;
        assert_eq!(tags(&frames), "CZ", "{}", transcript(&frames));
    }
    let order = "select string_agg(who::text, ',' order by at) from served";
    assert_eq!(text(&holder, order).await, "0,1,3,4");
    proxy.shut_down().await;
}

#[tokio::test]
async fn who_waits_for_long_is_told_once_and_nobody_when_it_is_off() {
    let db = fresh_database().await;
    for (after, told) in [(Some(Duration::from_millis(100)), true), (None, false)] {
        let proxy = start(&db, |config| {
            config.pool.size = 1.try_into().unwrap();
            config.pool.notice_after = after;
            config.pool.checkout_timeout = Duration::from_millis(700);
        })
        .await;
        let holder = proxy.connect().await;
        let (client, mut heard) = proxy.connect_hearing().await;
        let mut raw = proxy.raw().await;
        holder.batch_execute("begin").await.unwrap();
        assert_eq!(sqlstate(try_text(&client, "select 1").await), "53300");
        let notices: Vec<_> = heard
            .now()
            .into_iter()
            .filter_map(|message| match message {
                Ok(AsyncMessage::Notice(notice)) => Some(notice),
                _ => None,
            })
            .collect();
        assert_eq!(notices.len(), usize::from(told), "{notices:?}");
        if let [notice] = notices.as_slice() {
            assert_eq!(notice.severity(), "NOTICE");
            assert_eq!(
                notice.message(),
                "the request is waiting for a server connection"
            );
        }
        // By messages of the extended protocol: before the first answer.
        let console = proxy.console().await;
        raw.send(&crate::support::raw::extended("select 'served'", &[]))
            .await;
        if told {
            assert_eq!(raw.read().await.tag, b'N');
        } else {
            wait_until("it waits", PATIENCE, async || {
                waiting(&console, &db).await == 1
            })
            .await;
        }
        holder.batch_execute("commit").await.unwrap();
        let frames = raw.until_ready().await;
        assert_eq!(tags(&frames), "12TDCZ", "{}", transcript(&frames));
        proxy.shut_down().await;
    }
}

#[tokio::test]
async fn servers_are_closed_at_their_age_idle_or_busy_and_not_all_at_once() {
    let db = fresh_database().await;
    let proxy = start(&db, |config| {
        config.pool.size = 2.try_into().unwrap();
        config.pool.server_lifetime = Duration::from_secs(1);
    })
    .await;
    let direct = direct(&db).await;
    // Idle: without anybody's doing.
    let idle = proxy.connect().await;
    let pid = "select pg_backend_pid()";
    let first = text(&idle, pid).await;
    wait_until("it is closed", PATIENCE, async || {
        open(&direct, &[&db.name]).await == 0
    })
    .await;
    // In use without a pause: between transactions, and never inside one.
    let second = text(&idle, pid).await;
    assert_ne!(first, second);
    let proxy_busy = async { while text(&idle, pid).await == second {} };
    timeout(PATIENCE, proxy_busy).await.unwrap();
    idle.batch_execute("begin").await.unwrap();
    let held = text(&idle, pid).await;
    text(&idle, "select pg_sleep(1.5)").await;
    assert_eq!(text(&idle, pid).await, held);
    idle.batch_execute("commit").await.unwrap();
    assert_ne!(text(&idle, pid).await, held);
    proxy.shut_down().await;
}

#[tokio::test]
async fn an_upstream_has_no_more_servers_than_it_bears_over_all_pools() {
    let dbs = [
        fresh_database().await,
        fresh_database().await,
        fresh_database().await,
    ];
    let names = dbs.each_ref().map(|db| db.name.as_str());
    let proxy = start(&dbs[0], |config| {
        config.pool.size = 10.try_into().unwrap();
        config.pool.max_server_connections = Some(3.try_into().unwrap());
    })
    .await;
    let direct = direct(&dbs[0]).await;
    let console = proxy.console().await;
    let to = async |db: &TestDb| {
        connect(&format!(
            "postgres://postgres@127.0.0.1:{}/{}",
            proxy.port, db.name
        ))
        .await
    };
    // The first database takes all there is; idle, it gives way to the second, the one idle longest first.
    let mut first = Vec::new();
    for _ in 0..3 {
        let client = to(&dbs[0]).await;
        client.batch_execute("begin").await.unwrap();
        first.push(client);
    }
    for client in &first {
        client.batch_execute("commit").await.unwrap();
    }
    assert_eq!(open(&direct, &names).await, 3);
    let second = to(&dbs[1]).await;
    second.batch_execute("begin").await.unwrap();
    // Postgres takes a moment to see that a connection was closed.
    wait_until("one has given way", PATIENCE, async || {
        (
            open(&direct, &names).await,
            open(&direct, &[names[0]]).await,
        ) == (3, 2)
    })
    .await;
    assert_eq!(proxy.metric("flowgate_servers_evicted_total"), 1);
    // All busy: the third waits, and is served by whoever comes back first, of whatever pool.
    for client in &first[..2] {
        client.batch_execute("begin").await.unwrap();
    }
    let third = {
        let url = format!(
            "postgres://postgres@127.0.0.1:{}/{}",
            proxy.port, dbs[2].name
        );
        tokio::spawn(async move {
            let client = connect(&url).await;
            text(&client, "select current_database()").await
        })
    };
    wait_until("it starves", PATIENCE, async || {
        row(&console, "SHOW UPSTREAMS", "upstream", "primary").await["starving_pools"] == "1"
    })
    .await;
    assert!(!third.is_finished());
    first[0].batch_execute("commit").await.unwrap();
    assert_eq!(
        timeout(PATIENCE, third).await.unwrap().unwrap(),
        dbs[2].name
    );
    let servers = async || {
        let upstream = row(&console, "SHOW UPSTREAMS", "upstream", "primary").await;
        upstream["servers"].parse::<usize>().unwrap()
    };
    assert!(servers().await <= 3);
    // A pool that is never idle gives way to one that has waited longer than its own clients.
    let url = format!(
        "postgres://postgres@127.0.0.1:{}/{}",
        proxy.port, dbs[0].name
    );
    first[1].batch_execute("commit").await.unwrap();
    second.batch_execute("commit").await.unwrap();
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let crowd: Vec<_> = (0..8)
        .map(|_| {
            let (url, stopped) = (url.clone(), stopped.clone());
            tokio::spawn(async move {
                let client = connect(&url).await;
                let mut served = 0;
                while !*stopped.borrow() {
                    text(&client, "select pg_sleep(0.01)").await;
                    served += 1;
                }
                served
            })
        })
        .collect();
    wait_until("the crowd has all there is", PATIENCE, async || {
        open(&direct, &[names[0]]).await == 3
    })
    .await;
    let mut most = 0;
    let answer = tokio::spawn(async move { text(&second, "select 'served'").await });
    wait_until("the other is served", PATIENCE, async || {
        most = most.max(servers().await);
        answer.is_finished()
    })
    .await;
    assert_eq!(answer.await.unwrap(), "served");
    assert!(most <= 3, "{most} at once");
    stop.send_replace(true);
    for client in crowd {
        assert!(timeout(PATIENCE, client).await.unwrap().unwrap() > 0);
    }
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_burst_of_clients_does_not_become_a_storm_of_logins() {
    let db = fresh_database().await;
    let proxy = start(&db, |config| {
        config.pool.size = 30.try_into().unwrap();
        config.pool.connects_at_once = 2.try_into().unwrap();
    })
    .await;
    let console = proxy.console().await;
    let url = proxy.url();
    let burst: Vec<_> = (0..30)
        .map(|_| {
            let url = url.clone();
            tokio::spawn(async move {
                let client = connect(&url).await;
                client.batch_execute("begin").await.unwrap();
                client
            })
        })
        .collect();
    let mut most = 0;
    wait_until("all are in", PATIENCE, async || {
        let upstream = row(&console, "SHOW UPSTREAMS", "upstream", "primary").await;
        most = most.max(upstream["connecting"].parse::<usize>().unwrap());
        burst.iter().all(tokio::task::JoinHandle::is_finished)
    })
    .await;
    assert!((1..=2).contains(&most), "{most} logins at once");
    assert_eq!(table(&console, "SHOW SERVERS").await.len(), 30);
    for client in burst {
        client.await.unwrap().batch_execute("commit").await.unwrap();
    }
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_smaller_pool_after_a_reload_is_smaller() {
    let db = fresh_database().await;
    let direct = direct(&db).await;
    let config = {
        let mut config = crate::support::proxy::config(&db.primary_url, &[]);
        config.pool.size = 4.try_into().unwrap();
        config
    };
    let next = Arc::new(Mutex::new(config.clone()));
    let reread = Arc::clone(&next);
    let hooks = Hooks {
        reread: Some(Arc::new(move || Ok(reread.lock().unwrap().clone()))),
        set_log: None,
    };
    let proxy = Proxy::of_config(&config, &db.primary_url, hooks).await;
    let mut clients = Vec::new();
    for _ in 0..4 {
        let client = proxy.connect().await;
        client.batch_execute("begin").await.unwrap();
        clients.push(client);
    }
    for idle in &clients[2..] {
        idle.batch_execute("commit").await.unwrap();
    }
    next.lock().unwrap().pool.size = 1.try_into().unwrap();
    proxy.reload().await.unwrap();
    wait_until("the idle ones go", PATIENCE, async || {
        open(&direct, &[&db.name]).await == 2
    })
    .await;
    for busy in &clients[..2] {
        assert_eq!(text(busy, "select 'goes on'").await, "goes on");
        busy.batch_execute("commit").await.unwrap();
    }
    wait_until("one is left", PATIENCE, async || {
        open(&direct, &[&db.name]).await == 1
    })
    .await;
    for client in &clients {
        assert_eq!(text(client, "select 1").await, "1");
    }
    assert_eq!(open(&direct, &[&db.name]).await, 1);
    proxy.shut_down().await;
}

#[tokio::test]
async fn host_names_are_followed() {
    let db = fresh_database().await;
    let cluster: flowgate::config::ConnectUrl = db.primary_url.parse().unwrap();
    let named = db.primary_url.replacen(&cluster.host, "localhost", 1);
    let proxy = Proxy::before(&named, &[], |config| {
        config.pool.dns_ttl = Some(Duration::from_secs(1));
    })
    .await;
    let console = proxy.console().await;
    let client = proxy.connect().await;
    let pid = text(&client, "select pg_backend_pid()").await;
    wait_until("it is looked up", PATIENCE, async || {
        let hosts = table(&console, "SHOW DNS_HOSTS").await;
        hosts
            .iter()
            .any(|host| host["hostname"] == "localhost" && host["addrs"].contains("127.0.0.1"))
    })
    .await;
    // Looked up again and again, it leads to the same place, and no server is closed for it.
    wait_until("a look-up later", PATIENCE, async || {
        row(&console, "SHOW SERVERS", "remote_pid", &pid).await["close_needed"] == "0"
    })
    .await;
    assert_eq!(text(&client, "select pg_backend_pid()").await, pid);
    proxy.shut_down().await;
}

/// Whatever an admin does meanwhile: nobody waits for ever, no bound is passed, and in the end the books are right.
#[tokio::test]
async fn clients_are_served_whatever_the_admin_does() {
    let dbs = [
        fresh_database().await,
        fresh_database().await,
        fresh_database().await,
    ];
    let names = dbs.each_ref().map(|db| db.name.as_str());
    let direct = direct(&dbs[0]).await;
    let config = {
        let mut config = crate::support::proxy::config(&dbs[0].primary_url, &[]);
        config.pool.size = 3.try_into().unwrap();
        config.pool.reserve_size = 1;
        config.pool.reserve_timeout = Duration::from_millis(50);
        config.pool.max_server_connections = Some(4.try_into().unwrap());
        config.pool.connects_at_once = 2.try_into().unwrap();
        config.pool.server_lifetime = Duration::from_secs(1);
        config
    };
    let next = Arc::new(Mutex::new(config.clone()));
    let reread = Arc::clone(&next);
    let hooks = Hooks {
        reread: Some(Arc::new(move || Ok(reread.lock().unwrap().clone()))),
        set_log: None,
    };
    let proxy = Proxy::of_config(&config, &dbs[0].primary_url, hooks).await;
    let console = proxy.console().await;
    let url = |db: &TestDb| format!("postgres://postgres@127.0.0.1:{}/{}", proxy.port, db.name);
    let clients: Vec<_> = (0..15)
        .map(|at| {
            let url = url(&dbs[at % 3]);
            tokio::spawn(async move {
                for round in 0..40 {
                    // Some come and go, some give up while they wait, some leave without a word.
                    let client = connect(&url).await;
                    for request in 0..4 {
                        let asked = text(&client, "select 'served'");
                        match (at + round + request) % 7 {
                            0 => drop(timeout(Duration::from_millis(1), asked).await),
                            1 => {
                                let begun = client.batch_execute("begin; select pg_sleep(0.002)");
                                begun.await.unwrap();
                                client.batch_execute("commit").await.unwrap();
                            }
                            _ => assert_eq!(asked.await, "served"),
                        }
                    }
                }
            })
        })
        .collect();
    let (mut turn, mut most) = (0, 0);
    while !clients.iter().all(tokio::task::JoinHandle::is_finished) {
        turn += 1;
        match turn % 6 {
            0 => {
                console.batch_execute("pause").await.unwrap();
                // Closed when PAUSE returns; Postgres takes a moment to see it.
                let gone = async || open(&direct, &names).await == 0;
                wait_until("no server is left", PATIENCE, gone).await;
                console.batch_execute("resume").await.unwrap();
            }
            1 => console.batch_execute("reconnect").await.unwrap(),
            2 => {
                let bound = 2 + turn % 3;
                next.lock().unwrap().pool.max_server_connections = Some(bound.try_into().unwrap());
                next.lock().unwrap().pool.size = (1 + turn % 4).try_into().unwrap();
                console.batch_execute("reload").await.unwrap();
            }
            3 => {
                let one = format!("pause {}; resume {}", names[1], names[1]);
                console.batch_execute(&one).await.unwrap();
            }
            _ => {
                let upstream = row(&console, "SHOW UPSTREAMS", "upstream", "primary").await;
                most = most.max(upstream["servers"].parse::<usize>().unwrap());
                assert!(
                    upstream["connecting"].parse::<usize>().unwrap() <= 2,
                    "{upstream:?}"
                );
            }
        }
    }
    for client in clients {
        client.await.unwrap();
    }
    assert!((1..=4).contains(&most), "{most} at once");
    assert!(turn > 6, "the admin did something");
    // All have left: what is counted is what is there, and a reconnect leaves nothing.
    wait_until("the books agree with Postgres", PATIENCE, async || {
        let upstream = row(&console, "SHOW UPSTREAMS", "upstream", "primary").await;
        let there = open(&direct, &names).await.to_string();
        upstream["servers"] == there && upstream["starving_pools"] == "0"
    })
    .await;
    console
        .batch_execute("reconnect; wait_close")
        .await
        .unwrap();
    let upstream = row(&console, "SHOW UPSTREAMS", "upstream", "primary").await;
    assert_eq!(
        (
            upstream["servers"].as_str(),
            upstream["connecting"].as_str()
        ),
        ("0", "0")
    );
    for pool in table(&console, "SHOW POOLS").await {
        for column in [
            "cl_active",
            "cl_waiting",
            "sv_active",
            "sv_idle",
            "sv_login",
        ] {
            assert_eq!(pool[column], "0", "{column}: {pool:?}");
        }
    }
    proxy.shut_down().await;
}
