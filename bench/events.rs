//! Commit → subscriber: `cargo bench --bench events [-- SUBSCRIBERS…]`, 1, 100, 1,000 and 10,000 if none are named. Starts its own
//! Postgres and the proxy. Of each way and number: what a subscriber costs while nothing happens, how long an event takes
//! when nothing queues, and how many deliveries a second there are when the next batch is committed as soon as the one before
//! the last has been heard. Everybody must get every event that is theirs, in order, or it fails. The subscribers are bare sockets on one thread
//! of this process, which takes its part of the machine.

use std::cell::{Cell, RefCell};
use std::env;
use std::fs;
use std::net::SocketAddr;
use std::process::Stdio;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use flowgate::embedded::{Cluster, ClusterOptions, connect};
use flowgate::schema::{self, InstallOptions};
use futures_util::{StreamExt, stream};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, Command};
use tokio::runtime::Builder;
use tokio::sync::{mpsc, oneshot};
use tokio::task::LocalSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tokio_postgres::{Client, NoTls};

const PATIENCE: Duration = Duration::from_secs(300);
/// More sessions of Postgres itself than this are not tried.
const DIRECT_MAX: usize = 400;
/// Deliveries of one measurement at saturation, about.
const DELIVERIES: usize = 1_000_000;
/// Of one commit there.
const BATCH: usize = 20_000;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// LISTEN on Postgres, `events.direct_notify`.
    Direct,
    /// LISTEN through Flowgate on one run.
    Listen,
    /// The same, and the writer passes through, too.
    Carried,
    /// LISTEN through Flowgate, each on a run of its own.
    Each,
    /// Server-sent events of one run.
    Sse,
}

const WAYS: [(Way, &str); 5] = [
    (Way::Direct, "LISTEN on Postgres, `direct_notify`"),
    (Way::Listen, "LISTEN, one run"),
    (
        Way::Carried,
        "LISTEN, one run, the writer passes through too",
    ),
    (Way::Each, "LISTEN, each its own run"),
    (Way::Sse, "SSE, one run"),
];

/// Of run `n`.
fn topic(n: usize) -> String {
    format!("pgflow:run:67e55044-10b1-426f-9247-{n:012x}")
}

fn main() -> anyhow::Result<()> {
    // `cargo bench` adds `--bench`.
    let counts = env::args().skip(1).filter(|word| word != "--bench");
    let mut counts = counts
        .map(|word| {
            word.parse()
                .with_context(|| format!("`{word}` is no number of subscribers"))
        })
        .collect::<anyhow::Result<Vec<usize>>>()?;
    if counts.is_empty() {
        counts = vec![1, 100, 1_000, 10_000];
    }
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: maximum,
            maximum,
        },
    )?;
    Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(measure(&counts))
}

async fn measure(counts: &[usize]) -> anyhow::Result<()> {
    let most = *counts.iter().max().context("nobody listens")?;
    let cluster = Cluster::start(ClusterOptions {
        settings: vec![("max_connections".to_owned(), (DIRECT_MAX + 100).to_string())],
        ..ClusterOptions::default()
    })
    .await?;
    let primary = cluster.primary_url();
    schema::install(&primary.parse()?, InstallOptions::default()).await?;
    let admin = connect(&primary).await?;
    admin
        .batch_execute(&format!(
            "select pgflow.create_flow('bench'); select pgflow.add_step('bench', 'only');
             insert into pgflow.runs (run_id, flow_slug, input)
             select ('67e55044-10b1-426f-9247-' || lpad(to_hex(n), 12, '0'))::uuid, 'bench', '{{}}'
             from generate_series(0, {most}) n"
        ))
        .await?;
    println!(
        "| subscribers | way | KB each, idle | committed → heard p50 ms | p99 ms | deliveries/s |"
    );
    println!("|---:|---|---:|---:|---:|---:|");
    for &count in counts {
        for (way, name) in WAYS {
            if way == Way::Direct && count > DIRECT_MAX {
                continue;
            }
            admin
                .query(
                    "select flowgate.set_direct_notify($1)",
                    &[&(way == Way::Direct)],
                )
                .await?;
            let measured = round(way, count, &primary)
                .await
                .with_context(|| format!("{name}, {count}"))?;
            println!("| {count} | {name} | {measured} |");
        }
    }
    drop(admin);
    cluster.stop().await?;
    Ok(())
}

/// Where everything is.
struct Doors {
    postgres: SocketAddr,
    proxy: SocketAddr,
    http: SocketAddr,
    user: String,
    database: String,
}

async fn round(way: Way, count: usize, primary: &str) -> anyhow::Result<String> {
    let (proxy, doors, through) = serve(primary).await?;
    let pid = proxy.id().context("the proxy is gone")?;
    // What the process has anyway once somebody follows.
    let heard = Arc::new(AtomicU64::new(0));
    let first = Ears::open(way, 1, &doors, &heard).await?;
    drop(first);
    let before = rss_kb(pid)?;
    let began = Instant::now();
    let ears = Ears::open(way, count, &doors, &heard).await?;
    let opened = began.elapsed();
    let each = rss_kb(pid)?.saturating_sub(before);
    eprintln!("{count} subscribers in {opened:.1?}");
    let writer = connect(match way {
        Way::Carried => &through,
        Way::Direct | Way::Listen | Way::Each | Way::Sse => primary,
    })
    .await?;
    let mut sent = 0;
    latency(way, count, &writer, &ears, &mut sent).await?;
    let (p50, p99) = ears.latencies(&writer_times(&ears)?).await?;
    let rate = saturation(way, count, &writer, &ears, &mut sent).await?;
    ears.close().await?;
    drop(proxy);
    let memory = match (way, count) {
        (Way::Direct, _) | (_, 0..100) => "".to_owned(),
        _ => format!("{:.1}", as_f64(each) / as_f64(count as u64)),
    };
    Ok(format!("{memory} | {p50:.2} | {p99:.2} | {rate:.0}"))
}

/// When the writer knew of each commit, in ns, by event.
fn writer_times(ears: &Ears) -> anyhow::Result<Vec<u64>> {
    let times = ears.committed.take();
    ensure!(!times.is_empty(), "nothing was sent");
    Ok(times)
}

/// One event at a time, none before all have heard the last but a few.
async fn latency(
    way: Way,
    count: usize,
    writer: &Client,
    ears: &Ears,
    sent: &mut u64,
) -> anyhow::Result<()> {
    let (events, every) = match (way, count) {
        (Way::Each, _) | (_, 0..=100) => (300, 5),
        (_, 101..=1_000) => (150, 25),
        _ => (40, 250),
    };
    let send = writer
        .prepare("select realtime.send(jsonb_build_object('n', $1::int8), 'bench', $2, false)")
        .await?;
    let mut ticks = interval(Duration::from_millis(every));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut times = Vec::new();
    let before = ears.heard.load(Ordering::Relaxed);
    for number in 0..events {
        ticks.tick().await;
        let to = match way {
            Way::Each => (number * 7919) % count,
            _ => 0,
        };
        writer
            .execute(&send, &[&i64::try_from(*sent)?, &topic(to)])
            .await?;
        times.push(nanos(ears.epoch));
        *sent += 1;
    }
    let each = if way == Way::Each { 1 } else { count };
    ears.wait_for(before + (events * each) as u64).await?;
    ears.committed.set(times);
    Ok(())
}

/// Two batches under way.
async fn saturation(
    way: Way,
    count: usize,
    writer: &Client,
    ears: &Ears,
    sent: &mut u64,
) -> anyhow::Result<f64> {
    let (events, deliveries) = match way {
        Way::Each => (count.min(BATCH), count.min(BATCH)),
        _ => {
            let events = (BATCH / count).clamp(2, 1_000);
            (events, events * count)
        }
    };
    let send = match way {
        Way::Each => {
            "select flowgate.publish('pgflow:run:67e55044-10b1-426f-9247-' || lpad(to_hex(n), 12, '0'), array['bench'], \
             array[jsonb_build_object('n', $1::int8 + n)]) from generate_series(0, $2::int8 - 1) n where $3 <> ''"
        }
        _ => {
            "select flowgate.publish($3, array_agg('bench'::text), array_agg(jsonb_build_object('n', $1::int8 + n) order by n)) \
             from generate_series(0, $2::int8 - 1) n"
        }
    };
    let send = writer.prepare(send).await?;
    let most = if way == Way::Each {
        DELIVERIES / 10
    } else {
        DELIVERIES
    };
    let batches = (most / deliveries).clamp(10, 50);
    let before = ears.heard.load(Ordering::Relaxed);
    let began = Instant::now();
    for batch in 0..batches {
        if batch >= 2 {
            ears.wait_for(before + ((batch - 1) * deliveries) as u64)
                .await?;
        }
        let arguments: (i64, i64) = (i64::try_from(*sent)?, i64::try_from(events)?);
        writer
            .execute(&send, &[&arguments.0, &arguments.1, &topic(0)])
            .await?;
        *sent += events as u64;
    }
    let all = (batches * deliveries) as u64;
    ears.wait_for(before + all).await?;
    Ok(as_f64(all) / began.elapsed().as_secs_f64())
}

/// The subscribers: a thread with all their sockets.
struct Ears {
    epoch: Instant,
    /// Events, all subscribers together.
    heard: Arc<AtomicU64>,
    orders: mpsc::Sender<Order>,
    thread: thread::JoinHandle<anyhow::Result<()>>,
    committed: Cell<Vec<u64>>,
}

enum Order {
    /// What was heard so far: event, and when in ns.
    Tell(oneshot::Sender<Vec<(u32, u64)>>),
}

impl Ears {
    async fn open(
        way: Way,
        count: usize,
        doors: &Doors,
        heard: &Arc<AtomicU64>,
    ) -> anyhow::Result<Self> {
        let (orders, mut ordered) = mpsc::channel(1);
        let (ready, opened) = oneshot::channel();
        let epoch = Instant::now();
        let (heard, counted) = (Arc::clone(heard), Arc::clone(heard));
        let greetings: Vec<(SocketAddr, Vec<Vec<u8>>)> =
            (0..count).map(|n| greeting(way, n, doors)).collect();
        let thread = thread::Builder::new()
            .name("ears".to_owned())
            .spawn(move || {
                let runtime = Builder::new_current_thread().enable_all().build()?;
                LocalSet::new().block_on(&runtime, async move {
                    let log = Rc::new(RefCell::new(Some(Vec::new())));
                    let room = Rc::new(RefCell::new(vec![0; 256 * 1024]));
                    let mut tasks = tokio::task::JoinSet::new();
                    let sockets: Vec<_> = stream::iter(greetings)
                        .map(|(address, packets)| knock(address, packets))
                        .buffered(64)
                        .collect()
                        .await;
                    for socket in sockets {
                        let ear = Ear {
                            socket: socket?,
                            log: Rc::clone(&log),
                            room: Rc::clone(&room),
                            heard: Arc::clone(&counted),
                            epoch,
                            in_order: way != Way::Each,
                        };
                        tasks.spawn_local(ear.hear());
                    }
                    if ready.send(()).is_err() {
                        return Ok(());
                    }
                    loop {
                        tokio::select! {
                            Some(ended) = tasks.join_next() => ended??,
                            order = ordered.recv() => match order {
                                Some(Order::Tell(to)) => {
                                    drop(to.send(log.borrow_mut().take().unwrap_or_default()));
                                }
                                None => return Ok(()),
                            }
                        }
                    }
                })
            })?;
        let ears = Self {
            epoch,
            heard,
            orders,
            thread,
            committed: Cell::default(),
        };
        if opened.await.is_err() {
            return Err(ears.ended());
        }
        Ok(ears)
    }

    fn ended(self) -> anyhow::Error {
        match self.thread.join() {
            Ok(Err(error)) => error,
            _ => anyhow::anyhow!("the subscribers are gone"),
        }
    }

    async fn wait_for(&self, heard: u64) -> anyhow::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let so_far = self.heard.load(Ordering::Relaxed);
            if so_far >= heard {
                return Ok(());
            }
            ensure!(!self.thread.is_finished(), "a subscriber has ended");
            ensure!(Instant::now() < deadline, "heard {so_far} of {heard}");
            sleep(Duration::from_millis(1)).await;
        }
    }

    /// p50 and p99 of what was heard so far, in ms.
    async fn latencies(&self, committed: &[u64]) -> anyhow::Result<(f64, f64)> {
        let (to, told) = oneshot::channel();
        self.orders
            .send(Order::Tell(to))
            .await
            .ok()
            .context("gone")?;
        let mut all: Vec<u64> = told
            .await?
            .into_iter()
            .map(|(event, at)| at.saturating_sub(committed[event as usize]))
            .collect();
        ensure!(!all.is_empty(), "nothing was heard");
        all.sort_unstable();
        let at = |share: usize| as_f64(all[all.len() * share / 100]) / 1e6;
        Ok((at(50), at(99)))
    }

    async fn close(self) -> anyhow::Result<()> {
        let Self { orders, thread, .. } = self;
        drop(orders);
        match tokio::task::spawn_blocking(move || thread.join()).await? {
            Ok(ended) => ended,
            Err(_panic) => bail!("the subscribers panicked"),
        }
    }
}

/// What subscriber `n` says, packet by packet, each after the answer to the one before.
fn greeting(way: Way, n: usize, doors: &Doors) -> (SocketAddr, Vec<Vec<u8>>) {
    let run = if way == Way::Each { n } else { 0 };
    if way == Way::Sse {
        let id = topic(run).replace("pgflow:run:", "");
        let get = format!("GET /events/runs/{id} HTTP/1.1\r\nhost: bench\r\n\r\n");
        return (doors.http, vec![get.into_bytes()]);
    }
    let mut startup = 0x0003_0000_u32.to_be_bytes().to_vec();
    for word in ["user", &doors.user, "database", &doors.database] {
        startup.extend(word.as_bytes());
        startup.push(0);
    }
    startup.push(0);
    let listen = format!("listen \"{}\"\0", topic(run));
    let packet = |tag: &[u8], body: &[u8]| {
        let length = u32::try_from(body.len() + 4).expect("short");
        [tag, &length.to_be_bytes(), body].concat()
    };
    let door = match way {
        Way::Direct => doors.postgres,
        _ => doors.proxy,
    };
    let packets = vec![packet(b"", &startup), packet(b"Q", listen.as_bytes())];
    (door, packets)
}

async fn knock(address: SocketAddr, packets: Vec<Vec<u8>>) -> anyhow::Result<TcpStream> {
    let mut socket = TcpStream::connect(address).await?;
    socket.set_nodelay(true)?;
    for packet in packets {
        socket.write_all(&packet).await?;
        let mut answer = Vec::new();
        // ReadyForQuery, outside a transaction; the end of an HTTP head.
        while !answer.ends_with(b"Z\0\0\0\x05I") && !answer.windows(4).any(|w| w == b"\r\n\r\n") {
            let read = timeout(PATIENCE, socket.read_buf(&mut answer)).await??;
            ensure!(read > 0, "{}", String::from_utf8_lossy(&answer));
        }
        let refused = answer.starts_with(b"HTTP") && !answer.starts_with(b"HTTP/1.1 200");
        ensure!(!refused, "{}", String::from_utf8_lossy(&answer));
    }
    Ok(socket)
}

/// What was heard and when, while somebody wants to know.
type Log = Rc<RefCell<Option<Vec<(u32, u64)>>>>;

struct Ear {
    socket: TcpStream,
    log: Log,
    /// Of all.
    room: Rc<RefCell<Vec<u8>>>,
    heard: Arc<AtomicU64>,
    epoch: Instant,
    in_order: bool,
}

impl Ear {
    async fn hear(self) -> anyhow::Result<()> {
        let mut scan = Scan::default();
        let mut next = 0;
        loop {
            self.socket.readable().await?;
            let mut room = self.room.borrow_mut();
            let read = match self.socket.try_read(&mut room) {
                Ok(0) => bail!("cut"),
                Ok(read) => read,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error.into()),
            };
            let at = nanos(self.epoch);
            let mut log = self.log.borrow_mut();
            let mut count = 0;
            for &byte in &room[..read] {
                let Some(event) = scan.take(byte) else {
                    continue;
                };
                let expected = if self.in_order {
                    event == next
                } else {
                    event >= next
                };
                ensure!(expected, "heard {event} where {next} is due");
                next = event + 1;
                count += 1;
                if let Some(log) = log.as_mut() {
                    log.push((u32::try_from(event)?, at));
                }
            }
            self.heard.fetch_add(count, Ordering::Relaxed);
        }
    }
}

/// Finds `"n":`, blanks and a number, in however many pieces.
#[derive(Default)]
struct Scan {
    /// Bytes of the key so far.
    key: usize,
    number: Option<u64>,
}

impl Scan {
    fn take(&mut self, byte: u8) -> Option<u64> {
        const KEY: &[u8] = br#""n":"#;
        if self.key == KEY.len() {
            if byte.is_ascii_digit() {
                let so_far = self.number.unwrap_or(0);
                self.number = Some(so_far * 10 + u64::from(byte - b'0'));
                return None;
            }
            if self.number.is_none() && byte == b' ' {
                return None;
            }
            self.key = 0;
            return self.number.take();
        }
        self.key = match byte {
            _ if byte == KEY[self.key] => self.key + 1,
            b'"' => 1,
            _ => 0,
        };
        None
    }
}

fn nanos(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_nanos()).expect("no run takes centuries")
}

#[expect(clippy::cast_precision_loss, reason = "for people")]
fn as_f64(number: u64) -> f64 {
    number as f64
}

fn rss_kb(pid: u32) -> anyhow::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .context("no VmRSS")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse()?)
}

/// The proxy in front of `primary`, and its URL.
async fn serve(primary: &str) -> anyhow::Result<(Child, Doors, String)> {
    let free = TcpListener::bind("127.0.0.1:0").await?.local_addr()?;
    let http = TcpListener::bind("127.0.0.1:0").await?.local_addr()?;
    let (head, behind) = primary.rsplit_once('@').context("a URL with a user")?;
    let (server, database) = behind.split_once('/').context("a URL with a database")?;
    let (_, user) = head.rsplit_once("://").context("a URL")?;
    let user = user.split(':').next().unwrap_or(user).to_owned();
    let proxy = Command::new(env!("CARGO_BIN_EXE_flowgate"))
        .args(["serve", "--auth", "trust", "--http", &http.to_string()])
        .args(["--log", "warn", "--primary", primary])
        .args(["--listen", &free.to_string()])
        .env("FLOWGATE_HTTP__ANON_ROLE", &user)
        .env("FLOWGATE_HTTP__MAX_CONNECTIONS", "20000")
        .env("FLOWGATE_POOL__MAX_CLIENTS", "20000")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let through = primary.replace(server, &free.to_string());
    let deadline = Instant::now() + PATIENCE;
    while tokio_postgres::connect(&through, NoTls).await.is_err() {
        ensure!(
            Instant::now() < deadline,
            "the proxy does not answer at {free}"
        );
        tokio::task::yield_now().await;
    }
    let doors = Doors {
        postgres: server.parse()?,
        proxy: free,
        http,
        user,
        database: database.to_owned(),
    };
    Ok((proxy, doors, through))
}
