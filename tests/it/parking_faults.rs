//! Two hundred workers at one queue that die and cancel at random, and in the end the servers they are lent die as well: every
//! message is one live worker's at a time, no read is anybody's loss but his who caused it, and none is forgotten.
//!
//! `FLOWGATE_SEED` repeats what each worker does, `FLOWGATE_SOAK_SECONDS` goes on sending for that long.

use std::collections::HashSet;
use std::fmt::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{sleep, timeout};
use tokio_postgres::Client;
use uuid::Uuid;

use crate::support::chance::{Chance, Stretch, seed};
use crate::support::pg::{TestDb, fresh_database};
use crate::support::proxy::{PATIENCE, Proxy, connect, text, try_text};
use crate::support::raw::{
    Frame, PROTOCOL_3_0, Raw, bind_text, error_code, execute, extended, parse, query, startup,
    sync, transcript,
};
use crate::support::wait::wait_until;

const WORKERS: u64 = 200;
/// Most that one poll takes.
const QUANTITY_MAX: u64 = 5;
/// Sent and not done: more would be a test of how fast this machine is.
const AHEAD_MAX: usize = 150;
/// From the last message sent to the last one done.
const CATCH_UP: Duration = Duration::from_secs(240);
/// As the worker's named statement and its unnamed one have it.
const BOUND: &str = "($1, $2, $3, 1, 50)";

/// What goes wrong, and where.
struct Scene {
    servers: usize,
    /// Servers are killed as well.
    kills: bool,
    work: Work,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    /// Messages of pgmq, by a superuser.
    Messages,
    /// Tasks of a flow, by a role that has a worker's rights.
    Tasks,
}

#[tokio::test]
async fn workers_killed_and_cancelled_at_random_lose_nothing_and_share_nothing() {
    run(Scene {
        servers: 10,
        kills: false,
        work: Work::Messages,
    })
    .await;
}

#[tokio::test]
async fn nor_do_they_when_servers_are_killed_as_well() {
    run(Scene {
        servers: 5,
        kills: true,
        work: Work::Messages,
    })
    .await;
}

#[tokio::test]
async fn tasks_are_done_once_whoever_is_killed() {
    run(Scene {
        servers: 5,
        kills: true,
        work: Work::Tasks,
    })
    .await;
}

/// What all of them know together.
struct Books<'a> {
    scene: &'a Scene,
    proxy: &'a Proxy,
    user: String,
    sent: AtomicUsize,
    all_sent: AtomicBool,
    /// Each delivery: the message, and how often it had been read then.
    delivered: Mutex<HashSet<(String, String)>>,
    /// Messages, or runs.
    done: Mutex<HashSet<String>>,
    /// Polls whose answer did not come whole, by death, cancellation or a dead server.
    broken: AtomicUsize,
    /// For what a worker could not finish because its server was killed.
    direct: Client,
}

impl Books<'_> {
    fn all_done(&self) -> bool {
        self.all_sent.load(Ordering::SeqCst)
            && self.done.lock().unwrap().len() == self.sent.load(Ordering::SeqCst)
    }

    fn broken(&self) {
        self.broken.fetch_add(1, Ordering::SeqCst);
    }
}

async fn run(scene: Scene) {
    let seed = seed();
    let db = fresh_database().await;
    let direct = direct(&db).await;
    let user = set_up(&db, &direct, scene.work).await;
    let proxy = Proxy::without_replica(&db, |config| {
        config.pool.size = scene.servers.try_into().unwrap();
        config.pool.checkout_timeout = Duration::from_secs(120);
    })
    .await;
    let books = Books {
        scene: &scene,
        proxy: &proxy,
        user,
        sent: AtomicUsize::new(0),
        all_sent: AtomicBool::new(false),
        delivered: Mutex::default(),
        done: Mutex::default(),
        broken: AtomicUsize::new(0),
        direct,
    };
    let workers = join_all((1..=WORKERS).map(|me| worker(&books, Chance::of(seed, me))));
    let (longest, killed, ..) = tokio::join!(
        watch(&db, &books),
        kill(&db, &books, Chance::of(seed, 1000)),
        send(&db, &books, Chance::of(seed, 0)),
        workers,
    );

    let (sent, broken) = (books.sent.into_inner(), books.broken.into_inner());
    let delivered = books.delivered.into_inner().unwrap().len();
    let (queued, read) = (
        text(&books.direct, "select count(*) from pgmq.q_work").await,
        text(&books.direct, "select sum(read_ct) from pgmq.a_work").await,
    );
    println!(
        "{sent} sent, {read} reads, {delivered} deliveries; {broken} polls broken off, {killed} servers killed; {longest} s the longest wait"
    );
    assert_eq!(queued, "0");
    // A read that nobody got is one whose worker did not stay to hear of it.
    let lost = read.parse::<usize>().unwrap() - delivered;
    let may_be_lost = broken * usize::try_from(QUANTITY_MAX).unwrap();
    assert!(lost <= may_be_lost, "{lost} reads were nobody's");
    wait_until("nobody waits any more", PATIENCE, async || {
        proxy.metric("flowgate_parked") == 0
    })
    .await;
    proxy.shut_down().await;
}

/// Returns the workers' role.
async fn set_up(db: &TestDb, direct: &Client, work: Work) -> String {
    match work {
        Work::Messages => {
            text(direct, "select pgmq.create('work')").await;
            "postgres".to_owned()
        }
        Work::Tasks => {
            let role = format!("{}_worker", db.name);
            direct
                .batch_execute(&format!(
                    "select pgflow.create_flow('work'); select pgflow.add_step('work', 'a');
                     create role {role} login; select flowgate.grant_worker('{role}')"
                ))
                .await
                .unwrap();
            role
        }
    }
}

/// Past the proxy. Named before anybody could kill it for want of a name.
async fn direct(db: &TestDb) -> Client {
    connect(&format!("{}?application_name=direct", db.primary_url)).await
}

/// Sends through the proxy, and one in four behind its back.
async fn send(db: &TestDb, books: &Books<'_>, mut chance: Chance) {
    let through = books.proxy.connect().await;
    let direct = direct(db).await;
    let stretch = Stretch::of(40);
    let mut round = 0;
    while stretch.has(round) {
        round += 1;
        let count = 1 + chance.index(20);
        let sql = match books.scene.work {
            Work::Messages => "select pgmq.send('work', '{}')",
            Work::Tasks => "select pgflow.start_flow('work', '{}')",
        };
        let sql = format!("{sql} from generate_series(1, {count})");
        // Where the server may be killed under it, nobody would know what was sent.
        if books.scene.kills || chance.one_in(4) {
            text(&direct, &sql).await;
            // The others wait for a look, or for this.
            drop(try_text(&through, "select pgmq.send('work', '{}') where false").await);
        } else {
            text(&through, &sql).await;
        }
        let sent = count + books.sent.fetch_add(count, Ordering::SeqCst);
        sleep(Duration::from_millis(chance.below(30))).await;
        wait_until("the workers keep up", CATCH_UP, async || {
            sent - books.done.lock().unwrap().len() <= AHEAD_MAX
        })
        .await;
    }
    books.all_sent.store(true, Ordering::SeqCst);
    wait_until("every message is done", CATCH_UP, async || books.all_done()).await;
}

/// The longest that a message could have been read and was not, in seconds.
async fn watch(db: &TestDb, books: &Books<'_>) -> f64 {
    let direct = direct(db).await;
    let overdue = "select coalesce(max(extract(epoch from clock_timestamp() - vt)), 0) from pgmq.q_work where vt < clock_timestamp()";
    let mut longest = 0_f64;
    while !books.all_done() {
        longest = longest.max(text(&direct, overdue).await.parse().unwrap());
        assert!(
            longest < CATCH_UP.as_secs_f64(),
            "a message is stuck for {longest} s"
        );
        sleep(Duration::from_millis(50)).await;
    }
    longest
}

/// Ends a server that is lent or idle, every now and then. Returns how many.
async fn kill(db: &TestDb, books: &Books<'_>, mut chance: Chance) -> usize {
    let direct = direct(db).await;
    let which = [
        "and state = 'active'",
        "and state like 'idle in%'",
        "and query like '%read_with_poll%'",
        "",
    ];
    let mut killed = 0;
    while books.scene.kills && !books.all_done() {
        let sql = format!(
            "select count(pg_terminate_backend(pid)) from (select pid from pg_stat_activity
             where datname = current_database() and backend_type = 'client backend' and pid <> pg_backend_pid()
             and application_name <> 'direct' and application_name not like 'flowgate%' {} order by random() limit 1) s",
            chance.pick(&which)
        );
        killed += text(&direct, &sql).await.parse::<usize>().unwrap();
        sleep(Duration::from_millis(chance.below(200))).await;
    }
    killed
}

async fn log_in(books: &Books<'_>) -> Raw {
    let Books { proxy, user, .. } = books;
    let parameters = [("user", user.as_str()), ("database", &proxy.database)];
    loop {
        let mut worker = Raw::connect(proxy.port).await;
        worker.send(&startup(PROTOCOL_3_0, &parameters)).await;
        let greeting = worker.until_ready().await;
        if is_ready(&greeting) {
            let named = [parse("w", &bound(books)), sync()].concat();
            if worker.try_send(&named).await && is_ready(&worker.until_ready().await) {
                return worker;
            }
        }
        assert!(books.scene.kills, "{}", transcript(&greeting));
    }
}

fn bound(books: &Books<'_>) -> String {
    format!("select msg_id, read_ct from {}{BOUND}", function(books))
}

fn function(books: &Books<'_>) -> &'static str {
    match books.scene.work {
        Work::Messages => "pgmq.read_with_poll",
        Work::Tasks => "pgflow.read_with_poll",
    }
}

fn is_ready(frames: &[Frame]) -> bool {
    frames.last().is_some_and(|frame| frame.tag == b'Z')
}

async fn worker(books: &Books<'_>, mut chance: Chance) {
    let id = Uuid::new_v4();
    if books.scene.work == Work::Tasks {
        text(&books.direct, &format!(
            "insert into pgflow.workers (worker_id, queue_name, function_name) values ('{id}', 'work', 'test')"
        ))
        .await;
    }
    let mut me = log_in(books).await;
    while !books.all_done() {
        if !me.try_send(&poll(books, &mut chance)).await {
            me = log_in(books).await;
            continue;
        }
        let fate = chance.below(12);
        if fate == 0 {
            // It dies, at some moment.
            sleep(Duration::from_millis(chance.below(40))).await;
            books.broken();
            drop(me);
            me = log_in(books).await;
            continue;
        }
        if fate == 1 {
            sleep(Duration::from_millis(chance.below(40))).await;
            me.cancel().await;
        }
        let frames = me.until_ready().await;
        if !is_ready(&frames) || error_code(&frames).is_some() {
            let code = error_code(&frames);
            let expected: &[_] = if books.scene.kills {
                &["57014", "57P01", "08006"]
            } else {
                &["57014"]
            };
            let known = code.as_deref().is_some_and(|code| expected.contains(&code));
            assert!(known, "{}", transcript(&frames));
            books.broken();
            if !is_ready(&frames) {
                assert!(books.scene.kills, "{}", transcript(&frames));
                me = log_in(books).await;
            }
            continue;
        }
        let mut ids = Vec::new();
        for row in frames.iter().filter(|frame| frame.tag == b'D') {
            let delivery: [String; 2] = row.texts().try_into().unwrap();
            ids.push(delivery[0].clone());
            let delivery = delivery.into();
            let new = books.delivered.lock().unwrap().insert(delivery);
            assert!(new, "came to two: {}", transcript(&frames));
        }
        if !ids.is_empty()
            && !timeout(CATCH_UP, work(books, &mut me, &ids, id))
                .await
                .unwrap()
        {
            me = log_in(books).await;
        }
    }
}

/// A poll, one second long; what is not done is visible again after three.
fn poll(books: &Books<'_>, chance: &mut Chance) -> Vec<u8> {
    let quantity = (1 + chance.below(QUANTITY_MAX)).to_string();
    let values = ["work", "3", &quantity];
    match chance.below(3) {
        0 => query(&format!(
            "select msg_id, read_ct from {}('work', 3, {quantity}, 1, 50)",
            function(books)
        )),
        1 => extended(&bound(books), &values),
        _ => [bind_text("", "w", &values), execute("", 0), sync()].concat(),
    }
}

/// Does what the messages are about. `false`: the connection is gone.
async fn work(books: &Books<'_>, me: &mut Raw, ids: &[String], worker: Uuid) -> bool {
    let list = ids.join(",");
    match books.scene.work {
        Work::Messages => {
            let mut sql = String::new();
            for id in ids {
                write!(sql, "select pgmq.archive('work', {id}::bigint);").unwrap();
            }
            let done = ask(books, me, &sql).await;
            if done.is_none() {
                text(&books.direct, &sql).await;
            }
            books.done.lock().unwrap().extend(ids.iter().cloned());
            done.is_some()
        }
        Work::Tasks => {
            let start = format!(
                "select run_id from pgflow.start_tasks('work', array[{list}]::bigint[], '{worker}')"
            );
            let mut runs = Vec::new();
            let mut alive = false;
            if let Some(frames) = ask(books, me, &start).await {
                alive = true;
                runs = crate::support::raw::first_columns(&frames);
            } else {
                // It may have been done, or not: done again it says nothing new.
                text(&books.direct, &start).await;
                let mine = format!(
                    "select run_id from pgflow.step_tasks where message_id = any (array[{list}]::bigint[]) and last_worker_id = '{worker}' and status = 'started'"
                );
                for row in books.direct.query(&mine, &[]).await.unwrap() {
                    runs.push(row.get::<_, Uuid>(0).to_string());
                }
            }
            for run in runs {
                let complete = format!("select pgflow.complete_task('{run}', 'a', 0, '1')");
                if !alive || ask(books, me, &complete).await.is_none() {
                    alive = false;
                    text(&books.direct, &complete).await;
                }
                let new = books.done.lock().unwrap().insert(run.clone());
                assert!(new, "{run} was done twice");
            }
            alive
        }
    }
}

/// `None`: the server was killed under it.
async fn ask(books: &Books<'_>, me: &mut Raw, sql: &str) -> Option<Vec<Frame>> {
    let sent = me.try_send(&query(sql)).await;
    let frames = if sent {
        me.until_ready().await
    } else {
        Vec::new()
    };
    let fine = is_ready(&frames) && error_code(&frames).is_none();
    assert!(fine || books.scene.kills, "{sql}: {}", transcript(&frames));
    fine.then_some(frames)
}
