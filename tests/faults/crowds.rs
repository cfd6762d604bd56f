//! Many runs at once and a subscriber for each: whatever is killed meanwhile, every one of them is told of every event of its
//! run, in order, once or more. `FLOWGATE_FOLLOWERS` says how many, for more than a continuous integration has time for.

use std::collections::HashMap;
use std::env;
use std::ops::Range;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use flowgate::embedded::Cluster;
use futures_util::future::{join_all, try_join_all};
use serde_json::Value;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_postgres::{AsyncMessage, Client};
use uuid::Uuid;

use crate::cluster;
use crate::support::proxy::{
    Hearing, PATIENCE, Proxy, text, try_connect, try_connect_hearing, try_text,
};
use crate::support::raw::{Frame, Raw};
use crate::support::wait::wait_until;
use crate::support::work::finish;

/// What a run of one step tells.
const STORY: [&str; 4] = [
    "run:started",
    "step:started",
    "step:completed",
    "run:completed",
];
const EVENTS: &str = "flowgate events";
/// For everything together.
const PATIENCE_WITH_ALL: Duration = Duration::from_secs(120);

fn followers() -> usize {
    let asked = env::var("FLOWGATE_FOLLOWERS").ok();
    asked.map_or(1000, |count| count.parse().expect("a number of followers"))
}

#[tokio::test]
async fn a_thousand_followers_hear_all_of_their_runs() {
    let cluster = cluster(0).await;
    let proxy = proxy_for(&cluster).await;
    let runs = runs(followers());
    let crowd = Crowd::of(&runs, 1, &proxy.url()).await;
    let direct = cluster.connect_primary().await.unwrap();
    start(&direct, &runs).await;
    let work = finish_all(&cluster, &runs);
    futures_util::future::join(work, crowd.hear_all()).await;
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn followers_miss_nothing_while_the_upstream_listener_is_terminated_every_second() {
    let cluster = cluster(0).await;
    let proxy = proxy_for(&cluster).await;
    let runs = runs(followers() / 2);
    let crowd = Crowd::of(&runs, 5, &proxy.url()).await;
    let direct = cluster.connect_primary().await.unwrap();
    let killed = AtomicUsize::new(0);
    let kill = async {
        let mut every = interval(Duration::from_secs(1));
        every.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while killed.load(Ordering::Relaxed) < 4 {
            every.tick().await;
            let sql = format!(
                "select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name = '{EVENTS}'"
            );
            let count: usize = text(&direct, &sql).await.parse().unwrap();
            killed.fetch_add(count, Ordering::Relaxed);
        }
    };
    let work = in_portions(&cluster, &runs, async |portion| {
        wait_until("the next one is killed", PATIENCE, async || {
            killed.load(Ordering::Relaxed) > portion
        })
        .await;
    });
    futures_util::future::join3(kill, work, crowd.hear_all()).await;
    // The last one may have gone when nobody was left to follow.
    assert!(proxy.metric("flowgate_event_listener_lost_total") >= 3);
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn followers_resume_where_they_were_when_the_proxy_is_killed() {
    let cluster = cluster(0).await;
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let url = format!("postgres://postgres@127.0.0.1:{port}/postgres");
    let mut serving = serve(&cluster, port);
    wait_until("it serves", PATIENCE, async || {
        try_connect(&url).await.is_ok()
    })
    .await;
    let runs = runs(followers() / 2);
    let crowd = Crowd::of(&runs, 5, &url).await;
    let work = in_portions(&cluster, &runs, async |_portion| {
        // In the middle of it: what this portion tells is on its way.
        serving.kill().unwrap();
        serving.wait().unwrap();
        serving = serve(&cluster, port);
    });
    let (_, reconnects) = futures_util::future::join(work, crowd.hear_all()).await;
    assert!(reconnects > 0, "nobody noticed");
    serving.kill().unwrap();
    serving.wait().unwrap();
    cluster.stop().await.unwrap();
}

#[tokio::test]
async fn followers_miss_nothing_while_the_primary_restarts() {
    let mut cluster = cluster(0).await;
    let proxy = proxy_for(&cluster).await;
    let runs = runs(followers() / 2);
    let crowd = Crowd::of(&runs, 5, &proxy.url()).await;
    let work = async {
        for runs in runs.chunks(runs.len().div_ceil(3)) {
            let direct = cluster.connect_primary().await.unwrap();
            start(&direct, runs).await;
            let (before, after) = runs.split_at(runs.len() / 2);
            finish(&direct, before.len()).await;
            drop(direct);
            cluster.restart_primary().await.unwrap();
            let direct = cluster.connect_primary().await.unwrap();
            finish(&direct, after.len()).await;
        }
    };
    let ((), reconnects) = futures_util::future::join(work, crowd.hear_all()).await;
    // Their sessions survive it.
    assert_eq!(reconnects, 0);
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}

/// One in ten does not read at all until the others have heard everything.
#[tokio::test]
async fn slow_readers_are_told_what_they_missed_and_hold_up_nobody() {
    let cluster = cluster(0).await;
    let proxy = Proxy::before(&cluster.primary_url(), &[], |config| {
        config.pool.max_clients = 20_000.try_into().unwrap();
        config.events.queue = 16.try_into().unwrap();
    })
    .await;
    let runs = runs(followers() / 5);
    let crowd = Crowd::of(&runs, 2, &proxy.url()).await;
    let mut slow = Vec::new();
    for _ in 0..runs.len() / 20 {
        let mut reader = Raw::login(proxy.port, "postgres", "postgres", &[]).await;
        reader.query("listen \"pgflow:flow:greet\"").await;
        slow.push(reader);
    }
    let direct = cluster.connect_primary().await.unwrap();
    // More than sockets hold.
    let filler = "f".repeat(60_000);
    start_with(&direct, &runs, &filler).await;
    futures_util::future::join(finish_all(&cluster, &runs), crowd.hear_all()).await;
    assert!(proxy.metric("flowgate_event_gaps_total") > 0);

    let awake = AtomicUsize::new(0);
    let all = slow.len();
    let reading = join_all(slow.into_iter().map(async |mut reader| {
        let mut last: HashMap<String, (i64, usize)> = HashMap::new();
        let mut gaps = 0;
        loop {
            let Some(event) = notified(&reader.until(b'A').await) else {
                continue;
            };
            if event["event_type"] == "gap" {
                gaps += 1;
                continue;
            }
            if event["input"] == "the last" {
                break;
            }
            let (seq, gaps_then) = last
                .entry(event["run_id"].as_str().unwrap().to_owned())
                .or_insert((0, 0));
            let next = event["seq"].as_i64().unwrap();
            assert!(
                next <= *seq + 1 || gaps > *gaps_then,
                "{next} after {seq} without a word"
            );
            (*seq, *gaps_then) = (next.max(*seq), gaps);
        }
        let whole = last.values().filter(|(seq, _)| *seq == 4).count();
        assert!(gaps > 0 || whole == runs.len(), "{whole} of {}", runs.len());
        awake.fetch_add(1, Ordering::Relaxed);
    }));
    let closing = async {
        let mut every = interval(Duration::from_millis(100));
        while awake.load(Ordering::Relaxed) < all {
            every.tick().await;
            text(&direct, "select pgflow.start_flow('greet', '\"the last\"')").await;
        }
    };
    timeout(
        PATIENCE_WITH_ALL,
        futures_util::future::join(reading, closing),
    )
    .await
    .unwrap();
    proxy.shut_down().await;
    cluster.stop().await.unwrap();
}

fn notified(frames: &[Frame]) -> Option<Value> {
    let frame = frames.last().filter(|frame| frame.tag == b'A')?;
    let payload = frame.body[4..].split(|&byte| byte == 0).nth(1)?;
    serde_json::from_slice(payload).ok()
}

// ---- the proxy ----

async fn proxy_for(cluster: &Cluster) -> Proxy {
    Proxy::before(&cluster.primary_url(), &[], |config| {
        config.pool.max_clients = 20_000.try_into().unwrap();
    })
    .await
}

fn serve(cluster: &Cluster, port: u16) -> Child {
    Command::new(env!("CARGO_BIN_EXE_flowgate"))
        .args(["serve", "--auth", "trust", "--http", "off"])
        .args(["--primary", &cluster.primary_url()])
        .args(["--listen", &format!("127.0.0.1:{port}")])
        .env("FLOWGATE_POOL__MAX_CLIENTS", "20000")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

// ---- the work ----

fn runs(count: usize) -> Vec<Uuid> {
    (0..count).map(|_| Uuid::new_v4()).collect()
}

async fn start(direct: &Client, runs: &[Uuid]) {
    start_with(direct, runs, "").await;
}

/// All at once.
async fn start_with(direct: &Client, runs: &[Uuid], input: &str) {
    let starts = runs.iter().map(|run| {
        let sql = format!("select pgflow.start_flow('greet', to_jsonb('{input}'::text), '{run}')");
        async move { direct.batch_execute(&sql).await }
    });
    try_join_all(starts).await.unwrap();
}

/// By four workers at a time.
async fn finish_all(cluster: &Cluster, runs: &[Uuid]) {
    let shares = runs.chunks(runs.len().div_ceil(4)).map(<[_]>::len);
    join_all(shares.map(async |share| {
        let worker = cluster.connect_primary().await.unwrap();
        finish(&worker, share).await;
    }))
    .await;
}

/// Started and finished in four portions; in the middle of each of them something happens.
async fn in_portions(cluster: &Cluster, runs: &[Uuid], mut meanwhile: impl AsyncFnMut(usize)) {
    let direct = cluster.connect_primary().await.unwrap();
    for (portion, runs) in runs.chunks(runs.len().div_ceil(4)).enumerate() {
        start(&direct, runs).await;
        let (before, after) = runs.split_at(runs.len() / 2);
        finish(&direct, before.len()).await;
        futures_util::future::join(finish(&direct, after.len()), meanwhile(portion)).await;
    }
}

// ---- those who follow ----

struct Follower {
    url: String,
    /// The last `seq` heard of each run.
    runs: HashMap<Uuid, i64>,
    session: Option<(Client, Hearing)>,
    reconnects: usize,
}

struct Crowd(Vec<Follower>);

impl Crowd {
    /// Each follows so many runs, over a session of its own; all of them do when this returns.
    async fn of(runs: &[Uuid], each: usize, url: &str) -> Self {
        let mut crowd = Vec::new();
        for some in runs.chunks(each * 50) {
            crowd.extend(
                join_all(some.chunks(each).map(async |runs| {
                    let mut follower = Follower {
                        url: url.to_owned(),
                        runs: runs.iter().map(|run| (*run, 0)).collect(),
                        session: None,
                        reconnects: 0,
                    };
                    assert!(follower.connect().await, "no connection");
                    follower
                }))
                .await,
            );
        }
        Self(crowd)
    }

    /// How often they had to connect again, all together.
    async fn hear_all(self) -> usize {
        let all = join_all(self.0.into_iter().map(Follower::hear_all));
        let reconnects = timeout(PATIENCE_WITH_ALL, all).await;
        reconnects.expect("all events in time").into_iter().sum()
    }
}

impl Follower {
    async fn connect(&mut self) -> bool {
        let Ok((client, hearing)) = try_connect_hearing(&self.url).await else {
            return false;
        };
        for (run, seq) in &self.runs {
            let at = if self.reconnects == 0 {
                String::new()
            } else {
                format!("@{seq}")
            };
            let listen = format!("listen \"pgflow:run:{run}{at}\"");
            if try_text(&client, &listen).await.is_err() {
                return false;
            }
        }
        self.session = Some((client, hearing));
        true
    }

    async fn hear_all(mut self) -> usize {
        let mut ended = 0;
        while ended < self.runs.len() {
            let Some((_client, hearing)) = &mut self.session else {
                self.reconnects += 1;
                wait_until("somebody serves", PATIENCE, async || self.connect().await).await;
                continue;
            };
            match hearing.next().await {
                Some(Ok(AsyncMessage::Notification(news))) => {
                    let event: Value = serde_json::from_str(news.payload()).unwrap();
                    ended += usize::from(self.hear(&event));
                }
                Some(Ok(_)) => {}
                Some(Err(_)) | None => self.session = None,
            }
        }
        self.reconnects
    }

    /// Whether its run has ended by it.
    fn hear(&mut self, event: &Value) -> bool {
        let run: Uuid = event["run_id"].as_str().unwrap().parse().unwrap();
        let last = self.runs.get_mut(&run).expect("a run it follows");
        let Some(seq) = event["seq"].as_i64() else {
            panic!("not an event: {event}");
        };
        assert!(seq <= *last + 1, "{event} after {last}");
        let told: Range<i64> = 1..*last + 1;
        if told.contains(&seq) {
            return false;
        }
        *last = seq;
        let at = usize::try_from(seq).unwrap() - 1;
        assert_eq!(event["event_type"], STORY[at], "{event}");
        at + 1 == STORY.len()
    }
}
