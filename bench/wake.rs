//! What telling of events costs those who work: `cargo bench --bench wake [-- --help]`. Starts its own Postgres (fsync on), and
//! drives the same flow with the calls pgflow's worker makes, through Flowgate, in turns of: no events at all; rows in the outbox
//! that nobody follows; `events.wake` = observe and notify with a follower of all runs; and a NOTIFY in every transaction, as it
//! were if readers never said that they look anyway.

use std::cell::Cell;
use std::process::Stdio;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::Parser;
use flowgate::embedded::{Cluster, ClusterOptions, connect};
use flowgate::schema::{self, InstallOptions};
use futures_util::future::try_join_all;
use futures_util::{StreamExt, stream};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::task::LocalSet;
use tokio::time::{Instant, timeout};
use tokio_postgres::types::Type;
use tokio_postgres::{AsyncMessage, Client, NoTls};
use uuid::Uuid;

const PATIENCE: Duration = Duration::from_secs(300);
const BATCH: i32 = 10;

#[derive(Parser)]
struct Args {
    #[arg(long, default_value_t = 32)]
    workers: usize,
    /// Runs of a diamond of five steps a round
    #[arg(long, default_value_t = 300)]
    runs: usize,
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    None,
    Unread,
    Observe,
    Notify,
    Always,
}

const MODES: [(Mode, &str); 5] = [
    (Mode::None, "no events"),
    (Mode::Unread, "events that nobody follows"),
    (Mode::Observe, "`observe`"),
    (Mode::Notify, "`notify`"),
    (Mode::Always, "NOTIFY in every transaction"),
];

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    LocalSet::new().block_on(&runtime, measure(&args))
}

async fn measure(args: &Args) -> anyhow::Result<()> {
    let cluster = Cluster::start(ClusterOptions {
        durable: true,
        replicas: 0,
        settings: vec![
            ("max_connections".to_owned(), "200".to_owned()),
            ("max_wal_size".to_owned(), "8GB".to_owned()),
        ],
        ..ClusterOptions::default()
    })
    .await?;
    let admin = cluster.connect_primary().await?;
    let server = cluster.primary_url();
    let url = |database: &str| {
        let (head, _) = server.rsplit_once('/').expect("a URL with a database");
        format!("{head}/{database}")
    };
    admin.batch_execute("create database template").await?;
    schema::install(&url("template").parse()?, InstallOptions::default()).await?;
    let mut rounds: [Vec<f64>; 5] = Default::default();
    for round in 0..args.rounds {
        for place in 0..MODES.len() {
            let place = (place + round) % MODES.len();
            let (mode, name) = MODES[place];
            let database = format!("bench{round}_{place}");
            admin
                .batch_execute(&format!("create database {database} template template"))
                .await?;
            admin.batch_execute("checkpoint").await?;
            let done = drive(args, mode, &url(&database)).await;
            rounds[place].push(done.with_context(|| name.to_owned())?);
            admin
                .batch_execute(&format!("drop database {database} with (force)"))
                .await?;
        }
    }
    println!(
        "{} workers, diamonds of 5, fsync on, medians of {} interleaved rounds of {} runs\n",
        args.workers, args.rounds, args.runs
    );
    println!("| wake-up | tasks/s | × |");
    println!("|---|---:|---:|");
    for ((_, name), of_mode) in MODES.iter().zip(&rounds) {
        let rate = median(of_mode.iter().copied());
        // Of each round's own, so that a busy moment hits both.
        let ratio = median(
            of_mode
                .iter()
                .zip(&rounds[0])
                .map(|(rate, base)| rate / base),
        );
        println!("| {name} | {rate:.0} | {ratio:.2} |");
    }
    drop(admin);
    cluster.stop().await?;
    Ok(())
}

async fn drive(args: &Args, mode: Mode, url: &str) -> anyhow::Result<f64> {
    let direct = connect(url).await?;
    if mode == Mode::None {
        direct
            .batch_execute(
                "create or replace function flowgate.publish(topic text, events text[], payloads jsonb[]) returns void
                 language plpgsql as $$ begin end $$",
            )
            .await?;
    }
    direct
        .batch_execute(
            "select pgflow.create_flow('bench');
             select pgflow.add_step('bench', 'a');
             select pgflow.add_step('bench', 'b', array['a']);
             select pgflow.add_step('bench', 'c', array['a']);
             select pgflow.add_step('bench', 'd', array['a']);
             select pgflow.add_step('bench', 'e', array['b', 'c', 'd'])",
        )
        .await?;
    let (_proxy, through) = serve(url, mode).await?;
    let heard = Rc::new(Cell::new(0_usize));
    let mut follower = None;
    if matches!(mode, Mode::Observe | Mode::Notify | Mode::Always) {
        let (client, mut connection) = tokio_postgres::connect(&through, NoTls).await?;
        let count = Rc::clone(&heard);
        tokio::task::spawn_local(async move {
            let mut messages = stream::poll_fn(move |cx| connection.poll_message(cx));
            while let Some(Ok(message)) = messages.next().await {
                if let AsyncMessage::Notification(_) = message {
                    count.set(count.get() + 1);
                }
            }
        });
        client.batch_execute("listen pgflow_events").await?;
        follower = Some(client);
    }
    if mode == Mode::Always {
        direct
            .batch_execute(
                "insert into flowgate.reader (reader_id, pid, asleep) values (gen_random_uuid(), pg_backend_pid(), true)",
            )
            .await?;
    }
    let mut clients = Vec::new();
    for _ in 0..args.workers {
        clients.push(connect(&through).await?);
    }
    direct
        .execute(
            "select pgflow.start_flow('bench', '{}') from generate_series(1, $1::int)",
            &[&i32::try_from(args.runs)?],
        )
        .await?;
    let left = Cell::new(args.runs * 5);
    let began = Instant::now();
    let workers = clients.iter().map(|client| worker(client, &left));
    timeout(PATIENCE, try_join_all(workers))
        .await
        .context("the work was not done in time")??;
    let seconds = began.elapsed().as_secs_f64();
    if follower.is_some() {
        let sent: i64 = direct
            .query_one("select count(*) from flowgate.event", &[])
            .await?
            .get(0);
        let deadline = Instant::now() + PATIENCE;
        while heard.get() < usize::try_from(sent)? {
            ensure!(Instant::now() < deadline, "heard {} of {sent}", heard.get());
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    #[expect(clippy::cast_precision_loss, reason = "thousands")]
    let tasks = (args.runs * 5) as f64;
    Ok(tasks / seconds)
}

async fn worker(client: &Client, left: &Cell<usize>) -> anyhow::Result<()> {
    let id = Uuid::new_v4();
    let register = "insert into pgflow.workers (queue_name, worker_id, function_name) values ('bench', $1, 'bench')";
    client.query_typed(register, &[(&id, Type::UUID)]).await?;
    let poll = "select msg_id from pgflow.read_with_poll('bench', 30, $1, 1, 20)";
    let start = "select run_id, step_slug, task_index from pgflow.start_tasks('bench', $1, $2)";
    let complete = "select pgflow.complete_task($1, $2, $3, '{\"done\": true}')";
    while left.get() > 0 {
        let read = client.query_typed(poll, &[(&BATCH, Type::INT4)]).await?;
        let messages: Vec<i64> = read.iter().map(|row| row.get(0)).collect();
        if messages.is_empty() {
            continue;
        }
        let arguments: [(&(dyn tokio_postgres::types::ToSql + Sync), Type); 2] =
            [(&messages, Type::INT8_ARRAY), (&id, Type::UUID)];
        for task in client.query_typed(start, &arguments).await? {
            let (run, step, index): (Uuid, String, i32) = (task.get(0), task.get(1), task.get(2));
            client
                .query_typed(
                    complete,
                    &[
                        (&run, Type::UUID),
                        (&step, Type::TEXT),
                        (&index, Type::INT4),
                    ],
                )
                .await?;
            left.set(left.get().saturating_sub(1));
        }
    }
    Ok(())
}

/// The proxy in front of `primary`, and its URL.
async fn serve(primary: &str, mode: Mode) -> anyhow::Result<(Child, String)> {
    let free = TcpListener::bind("127.0.0.1:0").await?.local_addr()?;
    let wake = if mode == Mode::Notify {
        "notify"
    } else {
        "observe"
    };
    let proxy = Command::new(env!("CARGO_BIN_EXE_flowgate"))
        .args(["serve", "--auth", "trust", "--http", "off"])
        .args(["--log", "warn", "--primary", primary])
        .args(["--listen", &free.to_string()])
        .env("FLOWGATE_EVENTS__WAKE", wake)
        .env("FLOWGATE_POOL__SIZE", "40")
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let (_, behind) = primary.rsplit_once('@').context("a URL with a user")?;
    let (server, _) = behind.split_once('/').context("a URL with a database")?;
    let through = primary.replace(server, &free.to_string());
    let deadline = Instant::now() + PATIENCE;
    while tokio_postgres::connect(&through, NoTls).await.is_err() {
        ensure!(
            Instant::now() < deadline,
            "the proxy does not answer at {free}"
        );
        tokio::task::yield_now().await;
    }
    Ok((proxy, through))
}

fn median(numbers: impl Iterator<Item = f64>) -> f64 {
    let mut all: Vec<f64> = numbers.collect();
    all.sort_by(f64::total_cmp);
    all.get(all.len() / 2).copied().unwrap_or(f64::NAN)
}
