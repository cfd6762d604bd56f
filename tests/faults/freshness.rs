//! A checker over histories: a hundred sessions write and read runs through two proxies while replicas lag, pause, die and
//! come back, and one of them becomes the primary. No answer may be older than what its session wrote or was shown, nor, of
//! a run, than what anybody wrote or was shown through that proxy (DESIGN §6).

use std::collections::HashMap;
use std::net::TcpListener as StdListener;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use flowgate::embedded::{Cluster, ClusterOptions};
use flowgate::schema::{self, InstallOptions};
use futures_util::future::join_all;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{RwLock, watch};
use tokio::time::{Instant, timeout};
use tokio_postgres::{Client, SimpleQueryMessage, Statement};
use uuid::Uuid;

use crate::support::chance::{Chance, seed};
use crate::support::proxy::{Proxy, connect, text, try_connect};
use crate::support::wait::wait_until;

const PATIENCE: Duration = Duration::from_secs(120);
const SESSIONS: u64 = 100;
/// Runs under way at any time.
const RUNS: usize = 30;
const STEPS: usize = 6;
/// In a short run; the promotion is in the middle.
const FAULTS: u64 = 8;
const WORKER: &str = "aaaaaaaa-0000-4000-8000-000000000001";

/// The address the primary is reached at, whoever that is: what a name server or a virtual address is elsewhere.
struct Address {
    port: u16,
    target: Arc<AtomicU16>,
    cut: watch::Sender<()>,
}

impl Address {
    async fn of(target: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let target = Arc::new(AtomicU16::new(target));
        let (cut, cutting) = watch::channel(());
        let leads = Arc::clone(&target);
        tokio::spawn(async move {
            while let Ok((mut client, _)) = listener.accept().await {
                let (leads, mut cutting) = (Arc::clone(&leads), cutting.clone());
                cutting.mark_unchanged();
                tokio::spawn(async move {
                    let port = leads.load(Ordering::SeqCst);
                    let Ok(mut server) = TcpStream::connect(("127.0.0.1", port)).await else {
                        return;
                    };
                    let quick = client.set_nodelay(true).and(server.set_nodelay(true));
                    tokio::select! {
                        _ended = copy_bidirectional(&mut client, &mut server), if quick.is_ok() => {}
                        _moved = cutting.changed() => {}
                    }
                });
            }
        });
        Self { port, target, cut }
    }

    fn lead_to(&self, port: u16) {
        self.target.store(port, Ordering::SeqCst);
        self.cut.send_replace(());
    }

    fn url(&self) -> String {
        format!("postgres://postgres@127.0.0.1:{}/postgres", self.port)
    }
}

fn free_port() -> u16 {
    let socket = StdListener::bind("127.0.0.1:0").unwrap();
    socket.local_addr().unwrap().port()
}

/// `FLOWGATE_SEED` repeats what each session tries; `FLOWGATE_SOAK_SECONDS` goes on for that long.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_read_is_older_than_what_its_asker_knows() {
    let primary = free_port();
    let address = Address::of(primary).await;
    let settings = [
        // A replica follows whoever the primary is.
        (
            "primary_conninfo",
            format!("host=127.0.0.1 port={} user=postgres", address.port),
        ),
        ("primary_slot_name", String::new()),
        ("wal_keep_size", "1GB".to_owned()),
        ("max_connections", "400".to_owned()),
    ];
    let mut cluster = Cluster::start(ClusterOptions {
        replicas: 2,
        ports: vec![primary],
        settings: settings
            .map(|(name, value)| (name.to_owned(), value))
            .into(),
        ..ClusterOptions::default()
    })
    .await
    .unwrap();
    schema::install(&address.url().parse().unwrap(), InstallOptions::default())
        .await
        .unwrap();
    let admin = connect(&address.url()).await;
    admin.batch_execute(&flow()).await.unwrap();
    let replicas = [cluster.replica_url(0), cluster.replica_url(1)];
    let mut proxies = Vec::new();
    for _ in 0..2 {
        let replicas = replicas.each_ref().map(String::as_str);
        proxies.push(
            Proxy::before(&address.url(), &replicas, |config| {
                config.pool.checkout_timeout = PATIENCE;
                config.pool.connect_timeout = Duration::from_secs(5);
            })
            .await,
        );
    }
    let seed = seed();
    let world = World {
        slots: (0..RUNS).map(|_| tokio::sync::Mutex::new(None)).collect(),
        current: (0..RUNS).map(|_| Mutex::new(None)).collect(),
        writing: (0..RUNS).map(|_| AtomicBool::new(false)).collect(),
        writers: RwLock::new(()),
        closing: AtomicBool::new(false),
        asked: AtomicUsize::new(0),
        faults: AtomicUsize::new(0),
        ahead: AtomicUsize::new(0),
        wrong: Mutex::default(),
    };
    let shown = [Shown::default(), Shown::default()];
    // Some runs are written to without any proxy.
    let sessions = join_all((0..SESSIONS).map(async |me| {
        let at = me as usize % proxies.len();
        let mut session = Session {
            world: &world,
            shown: &shown[at],
            url: proxies[at].url(),
            aside: me % 10 == 9,
            direct: address.url(),
            chance: Chance::of(seed, me + 1),
            me,
            tasks: 0,
        };
        session.work().await;
    }));
    let mut chance = Chance::of(seed, 0);
    let faults = async {
        let soak = std::env::var("FLOWGATE_SOAK_SECONDS").ok();
        let soak = soak.map(|seconds| Duration::from_secs(seconds.parse().unwrap()));
        let started = Instant::now();
        let half_way = |faults| match soak {
            Some(soak) => started.elapsed() >= soak / 2,
            None => faults >= FAULTS / 2,
        };
        let done = |faults| match soak {
            Some(soak) => started.elapsed() >= soak,
            None => faults >= FAULTS,
        };
        let mut faults = 0;
        let mut standing = vec![0, 1];
        for proxy in &proxies {
            serves(&world, proxy).await;
        }
        while !done(faults) {
            world.goes_on(300).await;
            let which = *chance.pick(&standing);
            disturb(&world, &mut cluster, which, &mut chance).await;
            faults += 1;
            if standing.len() == 2 && half_way(faults) {
                let promoted = promote(&world, &mut cluster, &address).await;
                standing.retain(|replica| *replica != promoted);
                // The one that is left serves again once it follows.
                for proxy in &proxies {
                    serves(&world, proxy).await;
                }
            }
        }
        world.goes_on(300).await;
        world.closing.store(true, Ordering::Relaxed);
        (faults, standing.len())
    };
    let (_, (faults, standing)) = futures_util::future::join(sessions, faults).await;
    assert_eq!(standing, 1, "one was promoted");
    let to = |to: &str| proxies.iter().map(|proxy| proxy.requests(to)).sum::<u64>();
    println!(
        "{faults} faults, {} questions, {} told of a fault, {} had been ahead of an acknowledgement; {} by the primary, {} by replicas, {} by flowgate",
        world.asked.load(Ordering::Relaxed),
        world.faults.load(Ordering::Relaxed),
        world.ahead.load(Ordering::Relaxed),
        to("primary"),
        to("replica"),
        to("flowgate")
    );
    let wrong = std::mem::take(&mut *world.wrong.lock().unwrap());
    assert!(
        wrong.is_empty(),
        "{} stale answers: {:#?}",
        wrong.len(),
        &wrong[..wrong.len().min(10)]
    );
    for proxy in proxies {
        proxy.shut_down().await;
    }
    cluster.stop().await.unwrap();
}

/// Steps one after another.
fn flow() -> String {
    let steps = (0..STEPS).map(|step| {
        let after = match step {
            0 => String::new(),
            step => format!("s{}", step - 1),
        };
        format!("select pgflow.add_step('chain', 's{step}', '{{{after}}}');")
    });
    let worker = format!(
        "insert into pgflow.workers (worker_id, queue_name, function_name) values ('{WORKER}', 'any', 'any');"
    );
    ["select pgflow.create_flow('chain');".to_owned(), worker]
        .into_iter()
        .chain(steps)
        .collect()
}

/// Until a replica answers somebody again.
async fn serves(world: &World, proxy: &Proxy) {
    let before = proxy.requests("replica");
    wait_until("replicas serve", PATIENCE, async || {
        world.goes_on(10).await;
        proxy.requests("replica") > before + 20
    })
    .await;
}

/// A replica is late for a while, at random up to two seconds, or ends and comes back.
async fn disturb(world: &World, cluster: &mut Cluster, which: usize, chance: &mut Chance) {
    let a_while = Duration::from_millis(chance.below(2_000));
    match chance.below(5) {
        0 | 1 => {
            let replica = cluster.connect_replica(which).await.unwrap();
            let pause = "select pg_wal_replay_pause()";
            replica.batch_execute(pause).await.unwrap();
            drop(timeout(a_while, world.goes_on(2_000)).await);
            let resume = "select pg_wal_replay_resume()";
            replica.batch_execute(resume).await.unwrap();
        }
        2 | 3 => {
            cluster.set_replica_delay(which, a_while).await.unwrap();
            drop(timeout(a_while * 2, world.goes_on(2_000)).await);
            let none = Duration::ZERO;
            if chance.one_in(2) {
                cluster.set_replica_delay(which, none).await.unwrap();
            }
        }
        _ => {
            if chance.one_in(2) {
                cluster.kill_replica(which).await.unwrap();
            } else {
                cluster.stop_replica(which).await.unwrap();
            }
            cluster.start_replica(which).await.unwrap();
        }
    }
}

/// The primary dies; the replica that has most takes its place. What was acknowledged is there, so nobody writes while it
/// dies; reads go on. Returns which it was.
async fn promote(world: &World, cluster: &mut Cluster, address: &Address) -> usize {
    let quiet = world.writers.write().await;
    let written = {
        let primary = cluster.connect_primary().await.unwrap();
        text(&primary, "select pg_current_wal_insert_lsn()").await
    };
    for replica in 0..2 {
        let none = Duration::ZERO;
        cluster.set_replica_delay(replica, none).await.unwrap();
    }
    let (one, other) = (
        cluster.connect_replica(0).await.unwrap(),
        cluster.connect_replica(1).await.unwrap(),
    );
    let has_all = format!("select coalesce(pg_last_wal_receive_lsn() >= '{written}', false)");
    wait_until("a replica has it all", PATIENCE, async || {
        text(&one, &has_all).await == "t" || text(&other, &has_all).await == "t"
    })
    .await;
    cluster.kill_primary().await.unwrap();
    let streams = "select count(*) from pg_stat_wal_receiver where status = 'streaming'";
    wait_until("nothing more comes", PATIENCE, async || {
        text(&one, streams).await == "0" && text(&other, streams).await == "0"
    })
    .await;
    let received = "select pg_last_wal_receive_lsn()";
    let further = format!(
        "select pg_last_wal_receive_lsn() > '{}'",
        text(&one, received).await
    );
    let promoted = usize::from(text(&other, &further).await == "t");
    cluster.promote_replica(promoted).await.unwrap();
    address.lead_to(cluster.replica_port(promoted));
    drop(quiet);
    promoted
}

/// All sessions together.
struct World {
    /// Who holds one may write to its run.
    slots: Vec<tokio::sync::Mutex<Option<Uuid>>>,
    current: Vec<Mutex<Option<Uuid>>>,
    /// Its writer waits for an answer, or never got one.
    writing: Vec<AtomicBool>,
    writers: RwLock<()>,
    closing: AtomicBool,
    asked: AtomicUsize,
    faults: AtomicUsize,
    /// Answers behind what a replica had shown before its commit was acknowledged.
    ahead: AtomicUsize,
    wrong: Mutex<Vec<String>>,
}

impl World {
    /// So many answers later.
    async fn goes_on(&self, answers: usize) {
        let before = self.asked.load(Ordering::Relaxed);
        wait_until("sessions go on", PATIENCE, async || {
            self.asked.load(Ordering::Relaxed) >= before + answers
        })
        .await;
    }
}

/// What has been acknowledged or shown through one proxy: how far each run has come.
#[derive(Default)]
struct Shown(Mutex<HashMap<Uuid, Far>>);

#[derive(Clone, Copy, Default)]
struct Far {
    acknowledged: u64,
    shown: u64,
}

impl Shown {
    fn floor(&self, run: Uuid) -> Far {
        self.0
            .lock()
            .unwrap()
            .get(&run)
            .copied()
            .unwrap_or_default()
    }

    fn raise(&self, run: Uuid, to: u64) {
        let mut shown = self.0.lock().unwrap();
        let far = shown.entry(run).or_default();
        far.shown = far.shown.max(to);
    }

    fn acknowledge(&self, run: Uuid, to: u64) {
        self.raise(run, to);
        let mut shown = self.0.lock().unwrap();
        let far = shown.entry(run).or_default();
        far.acknowledged = far.acknowledged.max(to);
    }
}

struct Session<'a> {
    world: &'a World,
    shown: &'a Shown,
    url: String,
    /// It writes past the proxy.
    aside: bool,
    direct: String,
    chance: Chance,
    me: u64,
    /// The most tasks, of all runs, that this session's connection was shown.
    tasks: u64,
}

/// A connection and what was prepared on it.
struct Link {
    client: Client,
    state: Statement,
    direct: Option<Client>,
}

impl Session<'_> {
    async fn work(&mut self) {
        while !self.world.closing.load(Ordering::Relaxed) {
            // A primary that is not there, or is just going.
            if self.one_life().await.is_err() {
                self.world.faults.fetch_add(1, Ordering::Relaxed);
                tokio::task::yield_now().await;
            }
        }
    }

    /// On one connection, to its end or the first error.
    async fn one_life(&mut self) -> Result<(), tokio_postgres::Error> {
        let client = try_connect(&self.url).await?;
        self.tasks = 0;
        let state = client
            .prepare("select pgflow.get_run_with_states($1)->'run'->>'remaining_steps'")
            .await?;
        let direct = match self.aside {
            true => Some(try_connect(&self.direct).await?),
            false => None,
        };
        let link = Link {
            client,
            state,
            direct,
        };
        while !self.world.closing.load(Ordering::Relaxed) {
            let slot = self.chance.index(RUNS);
            match self.chance.below(10) {
                0 | 1 => self.write(&link, slot).await?,
                2 => self.count(&link).await?,
                _ => self.read(&link, slot).await?,
            }
            self.world.asked.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn wrong(&self, words: String) {
        let mut wrong = self.world.wrong.lock().unwrap();
        wrong.push(format!("session {}: {words}", self.me));
    }

    /// How many steps of the run are done, as the proxy says.
    async fn ask(&mut self, link: &Link, run: Uuid) -> Result<Option<u64>, tokio_postgres::Error> {
        let answer = match self.chance.below(3) {
            0 => {
                let row = timeout(PATIENCE, link.client.query_opt(&link.state, &[&run])).await;
                let row = row.expect("an answer in time")?;
                row.and_then(|row| row.get::<_, Option<String>>(0))
            }
            1 => Some(ask(&link.client, &format!("select pgflow.get_run_with_states('{run}')->'run'->>'remaining_steps'")).await?),
            _ => Some(ask(&link.client, &format!("select {STEPS} - count(*) from pgflow.step_states where run_id = '{run}' and status = 'completed'")).await?),
        };
        let left: Option<u64> = answer.and_then(|answer| answer.parse().ok());
        Ok(left.map(|left| STEPS as u64 - left))
    }

    async fn read(&mut self, link: &Link, slot: usize) -> Result<(), tokio_postgres::Error> {
        let Some(run) = *self.world.current[slot].lock().unwrap() else {
            return Ok(());
        };
        let floor = self.shown.floor(run);
        // Postgres' own: a replica may show a commit that its writer has not heard of, and the primary does not show yet.
        let unheard = self.world.writing[slot].load(Ordering::SeqCst);
        let least = floor
            .acknowledged
            .max(floor.shown - u64::from(unheard && floor.shown > 0));
        match self.ask(link, run).await? {
            Some(done) if done >= least => {
                if done < floor.shown {
                    self.world.ahead.fetch_add(1, Ordering::Relaxed);
                }
                self.shown.raise(run, done);
            }
            Some(done) => self.wrong(format!("{run} is at {done}, was at {least}")),
            // Another proxy's start, which this one has not shown yet, need not be there.
            None if least == 0 => {}
            None => self.wrong(format!("{run} is not there, was at {least}")),
        }
        Ok(())
    }

    /// Tasks only become more: every session sees so.
    async fn count(&mut self, link: &Link) -> Result<(), tokio_postgres::Error> {
        // A run's next task comes with a commit, and so may be shown before that is acknowledged.
        let writing = self.world.writing.iter();
        let unheard = writing.filter(|one| one.load(Ordering::SeqCst)).count() as u64;
        let count = ask(&link.client, "select count(*) from pgflow.step_tasks").await?;
        let count: u64 = count.parse().unwrap();
        if count + unheard < self.tasks {
            self.wrong(format!("{count} tasks, were {}", self.tasks));
        }
        self.world
            .ahead
            .fetch_add(usize::from(count < self.tasks), Ordering::Relaxed);
        self.tasks = self.tasks.max(count);
        Ok(())
    }

    /// The next step of a run, or a new run.
    async fn write(&mut self, link: &Link, slot: usize) -> Result<(), tokio_postgres::Error> {
        let world = self.world;
        let (Ok(mut holder), Ok(_quiet)) = (world.slots[slot].try_lock(), world.writers.try_read())
        else {
            return Ok(());
        };
        let writer = link.direct.as_ref().unwrap_or(&link.client);
        // Of what was written past the proxy it knows nothing yet.
        let told = link.direct.is_none();
        let writing = &world.writing[slot];
        let Some(run) = *holder else {
            writing.store(true, Ordering::SeqCst);
            let start = "select run_id from pgflow.start_flow('chain', '{}')";
            let run = ask(writer, start).await?;
            writing.store(false, Ordering::SeqCst);
            let run: Uuid = run.parse().unwrap();
            *holder = Some(run);
            *world.current[slot].lock().unwrap() = Some(run);
            self.tasks += u64::from(told);
            return Ok(());
        };
        let floor = self.shown.floor(run);
        let ready = format!(
            "select step_slug || ' ' || message_id || ' ' || status from pgflow.step_tasks where run_id = '{run}' and status in ('queued', 'started')"
        );
        // The proxy's own answer says what to do next: an old one would be done again.
        let task = ask(writer, &ready).await?;
        let mut task = task.split(' ');
        let (Some(step), Some(message), Some(status)) = (task.next(), task.next(), task.next())
        else {
            // Over, or this writer sees nothing of it.
            let state = format!("select status from pgflow.runs where run_id = '{run}'");
            let state = ask(writer, &state).await?;
            if state.is_empty() && floor.acknowledged > 0 && told {
                self.wrong(format!("{run} is not there, was at {}", floor.acknowledged));
            }
            if state == "completed" {
                *holder = None;
                *world.current[slot].lock().unwrap() = None;
            }
            return Ok(());
        };
        let at: u64 = step[1..].parse().unwrap();
        if at < floor.acknowledged && told {
            self.wrong(format!(
                "{run} waits for {step}, was at {}",
                floor.acknowledged
            ));
        }
        if status == "queued" {
            let start = format!(
                "select count(*) from pgflow.start_tasks('chain', array[{message}::bigint], '{WORKER}')"
            );
            ask(writer, &start).await?;
        }
        let complete =
            format!("select status from pgflow.complete_task('{run}', '{step}', 0, '{{}}')");
        writing.store(true, Ordering::SeqCst);
        let status = ask(writer, &complete).await?;
        writing.store(false, Ordering::SeqCst);
        if status == "completed" && told {
            self.shown.acknowledge(run, at + 1);
        }
        Ok(())
    }
}

/// The first column of the first row.
async fn ask(client: &Client, sql: &str) -> Result<String, tokio_postgres::Error> {
    let answer = timeout(PATIENCE, client.simple_query(sql)).await;
    let messages = answer.expect("an answer in time")?;
    let row = messages.iter().find_map(|message| match message {
        SimpleQueryMessage::Row(row) => row.get(0).map(ToOwned::to_owned),
        _ => None,
    });
    Ok(row.unwrap_or_default())
}
