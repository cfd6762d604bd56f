//! `flowgate demo`: from nothing to a followed run. A Postgres of its own with a replica, the SQL, the proxy, a flow with a
//! worker, a listener and a reader, all through the proxy; then what came of it. Everything is ended and removed when it
//! ends, however it ends. Called by `main`.
//!
//! `Stage` holds what must be ended, apart from the story (`play`): a signal drops the story wherever it is, and the stage
//! is cleared in order. What was not yet on the stage ends by its own drop; should we be killed, by the guard of
//! `embedded`.

mod flow;
mod keeper;
mod latency;
mod link;
mod listener;
mod reader;
mod summary;
mod tree;
mod words;
mod worker;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};
use tokio_postgres::types::Type;
use uuid::Uuid;

use self::flow::{FLOW, STEPS};
use self::keeper::Keeper;
use self::latency::Answers;
use self::link::Link;
use self::summary::Verdict;
use self::tree::Tree;
use super::screen::{Paint, Screen};
use crate::app::{self, App, AppError};
use crate::config::{self, Config, ConfigError, ConnectUrlError, Flags};
use crate::embedded::{Cluster, ClusterOptions, EmbeddedError, SUPERUSER};
use crate::schema::{self, InstallOptions, PgmqOutcome, SchemaError};

const LISTEN: &str = "127.0.0.1:6432";
const HTTP: &str = "127.0.0.1:6480";
/// Whoever looks over HTTP without a key, the dashboard first of all; may read, and nothing else.
const VIEWER: &str = "flowgate_demo_viewer";
/// At the end nothing of value is under way.
const DRAIN_MAX: Duration = Duration::from_millis(500);
const REDRAW: Duration = Duration::from_millis(100);
/// Without any news for this long something is broken, and waiting would hide it.
const STALLED: Duration = Duration::from_secs(60);
/// Of a channel whose reader is this very task.
const ROOM: usize = 256;

/// Start a Postgres with a replica, the proxy and a workflow, and watch it run; nothing is left behind
#[derive(Debug, clap::Args)]
pub struct Args {
    /// End after the run; exit status 0 if it completed and every event came, in order
    #[arg(long)]
    once: bool,
    /// Count the words of the text files under this folder [default: the current one]
    #[arg(long, value_name = "FOLDER")]
    dir: Option<PathBuf>,
    /// As many runs of the flow, all at the same time
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=100))]
    runs: u16,
    /// Keep Postgres' data and the results in this folder, and use them again [default: nothing is kept]
    #[arg(long, value_name = "FOLDER")]
    data: Option<PathBuf>,
    /// Address of the proxy [default: 127.0.0.1:6432, or a free port if that is taken]
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<String>,
    /// Address of HTTP, or "off" [default: 127.0.0.1:6480, or a free port if that is taken]
    #[arg(long, value_name = "ADDRESS")]
    http: Option<String>,
    /// What is logged to standard error: a level, then levels of single modules
    #[arg(long, value_name = "FILTER", default_value = "warn")]
    log: String,
}

impl Args {
    pub fn log(&self) -> &str {
        &self.log
    }
}

#[derive(Debug, thiserror::Error)]
enum DemoError {
    #[error("--dir {}: {source}", folder.display())]
    Folder { folder: PathBuf, source: io::Error },
    #[error("--dir {}: not a folder", .0.display())]
    NoFolder(PathBuf),
    #[error("{address} is taken; name another with {flag}")]
    Taken { flag: &'static str, address: String },
    #[error(transparent)]
    Embedded(#[from] EmbeddedError),
    #[error(transparent)]
    Schema(#[from] SchemaError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("bug: the embedded Postgres' URL {0}")]
    Url(#[from] ConnectUrlError),
    #[error(transparent)]
    App(#[from] AppError),
    #[error("{doing}: {why}")]
    Sql { doing: &'static str, why: String },
    #[error("a part of the demo ended too early")]
    PartEnded,
    #[error("no news of the run for {STALLED:?}")]
    Stalled,
    #[error("{0}")]
    Io(#[from] io::Error),
}

impl DemoError {
    fn sql(doing: &'static str) -> impl FnOnce(tokio_postgres::Error) -> Self {
        move |error| Self::Sql {
            doing,
            why: link::words(&error),
        }
    }
}

/// Where everything is.
struct Places {
    proxy: SocketAddr,
    http: Option<SocketAddr>,
    primary: String,
    replica: String,
}

impl Places {
    fn database(&self, name: &str) -> String {
        format!("postgres://{SUPERUSER}@{}/{name}", self.proxy)
    }
}

/// What runs, and must be ended in this order.
#[derive(Default)]
struct Stage {
    parts: JoinSet<()>,
    app: Option<App>,
    keeper: Option<Keeper>,
}

impl Stage {
    async fn clear(mut self) {
        self.parts.shutdown().await;
        if let Some(app) = self.app {
            app.shut_down().await;
        }
        if let Some(keeper) = self.keeper {
            keeper.stop().await;
        }
    }
}

/// 0: the run completed and every event came in order. 1: not. 128 and the signal's number: it was not let to end.
pub async fn run(args: Args) -> ExitCode {
    // Before anything is there to be left behind.
    let mut signals = match Signals::watch() {
        Ok(signals) => signals,
        Err(error) => return complain(&DemoError::from(error)),
    };
    let mut screen = Screen::new();
    let mut stage = Stage::default();
    let outcome = tokio::select! {
        outcome = Box::pin(play(&args, &mut stage, &mut screen)) => outcome,
        number = signals.next() => {
            stage.clear().await;
            return ExitCode::from(128 + number);
        }
    };
    let code = match outcome {
        Ok(verdict) => {
            if !args.once
                && screen
                    .line("\nCtrl-C ends it all and removes what is not kept.")
                    .is_ok()
            {
                signals.next().await;
            }
            if verdict.completed && verdict.in_order {
                ExitCode::SUCCESS
            } else {
                ExitCode::FAILURE
            }
        }
        Err(error) => complain(&error),
    };
    stage.clear().await;
    code
}

fn complain(error: &DemoError) -> ExitCode {
    eprintln!("flowgate demo: {error}");
    ExitCode::FAILURE
}

/// What ends us. Watched from the first to the last moment, so that none kills us before we are done.
struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
}

impl Signals {
    fn watch() -> io::Result<Self> {
        Ok(Self {
            interrupt: signal(SignalKind::interrupt())?,
            terminate: signal(SignalKind::terminate())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// Its number.
    async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.hang_up.recv() => 1,
            _ = self.interrupt.recv() => 2,
            _ = self.terminate.recv() => 15,
        }
    }
}

async fn play(args: &Args, stage: &mut Stage, screen: &mut Screen) -> Result<Verdict, DemoError> {
    let began = Instant::now();
    let folder = folder(args.dir.as_deref().unwrap_or(Path::new(".")))?;
    let done = |screen: &mut Screen, what: &str| {
        let at = format!("{:>6.2} s", began.elapsed().as_secs_f64());
        let at = screen.paint(Paint::Dim, &at);
        screen.line(&format!("{at}  {what}"))
    };
    screen.line("Flowgate demo: a Postgres with a replica, the workflow SQL, the proxy, and a run through it all")?;

    let cluster = Cluster::start(ClusterOptions {
        data: args.data.clone(),
        ..ClusterOptions::default()
    })
    .await?;
    let (primary, replica) = (cluster.primary_url(), cluster.replica_url(0));
    let results = results(args, &cluster)?;
    let servers = format!(
        "Postgres {}: primary on port {}, streaming replica on port {}",
        cluster.major(),
        cluster.primary_port(),
        cluster.replica_port(0)
    );
    stage.keeper = Some(Keeper::start(cluster));
    done(screen, &servers)?;

    let installed = schema::install(&primary.parse()?, InstallOptions::default()).await?;
    let pgmq = match installed.pgmq {
        PgmqOutcome::AlreadyThere => "was there",
        PgmqOutcome::Extension => "as extension",
        PgmqOutcome::Embedded => "from its crate",
    };
    done(
        screen,
        &format!("SQL installed: pgmq ({pgmq}), pgflow's core, the event outbox"),
    )?;

    let admit = admit_viewer(&primary).await;
    admit.map_err(DemoError::sql("making the dashboard's role"))?;

    let config = configure(args, &primary, &replica)?;
    let app = stage.app.insert(app::start(&config).await?);
    let places = Places {
        proxy: app.postgres,
        http: app.http,
        primary,
        replica,
    };
    let http = match places.http {
        Some(http) => format!(", dashboard on http://{http}/"),
        None => String::new(),
    };
    let wanted: Result<SocketAddr, _> = LISTEN.parse();
    let elsewhere = args.listen.is_none() && wanted.is_ok_and(|wanted| wanted != places.proxy);
    let taken = if elsewhere {
        format!(" ({LISTEN} is taken)")
    } else {
        String::new()
    };
    done(screen, &format!("proxy on {}{taken}{http}", places.proxy))?;

    let mut starter = Link::new(places.proxy, "flowgate demo");
    let defined = flow::define(&mut starter).await;
    defined.map_err(DemoError::sql("defining the flow"))?;
    done(
        screen,
        &format!("flow {FLOW}: {} (a task a file: map)", STEPS.join(" → ")),
    )?;

    let tree = Story {
        places: &places,
        runs: (0..args.runs).map(|_| Uuid::new_v4()).collect(),
        input: flow::input(&folder, &results),
        answers: Arc::new(Answers::default()),
    };
    let told = match tree.runs.as_slice() {
        [run] => format!("run {run} over {}", folder.display()),
        runs => format!("{} runs at once over {}", runs.len(), folder.display()),
    };
    let (workers, slots) = (worker::LANES + 1, worker::SLOTS);
    done(
        screen,
        &format!("{told}; a worker: {slots} tasks at once on {workers} connections"),
    )?;
    screen.line("")?;
    let answers = Arc::clone(&tree.answers);
    let tree = tree.tell(starter, &mut stage.parts, screen).await?;
    let verdict = summary::tell(screen, &tree, &answers, &places).await?;
    if !args.once {
        summary::tell_places(screen, &tree, &places)?;
    }
    screen.line("")?;
    done(
        screen,
        if verdict.completed {
            "from nothing to the result"
        } else {
            "the run did not complete"
        },
    )?;
    Ok(verdict)
}

/// The runs, from before their start to their end.
struct Story<'a> {
    places: &'a Places,
    runs: Vec<Uuid>,
    input: serde_json::Value,
    answers: Arc<Answers>,
}

impl Story<'_> {
    async fn tell(
        self,
        mut starter: Link,
        parts: &mut JoinSet<()>,
        screen: &mut Screen,
    ) -> Result<Tree, DemoError> {
        let proxy = self.places.proxy;
        let (events, mut heard) = mpsc::channel(ROOM);
        let (subscribed, in_force) = oneshot::channel();
        parts.spawn(listener::run(proxy, self.runs.clone(), events, subscribed));
        // Nothing happens before somebody listens: that is what the listener is here to show.
        in_force.await.map_err(|_ended| DemoError::PartEnded)?;
        parts.spawn(worker::run(proxy, Arc::clone(&self.answers)));
        let (snapshots, mut seen) = mpsc::channel(ROOM);
        parts.spawn(reader::run(proxy, self.runs.clone(), snapshots));

        let mut tree = Tree::new(&self.runs, Instant::now());
        let mut starting = Box::pin(self.start(&mut starter));
        let mut started = false;
        let mut tick = tokio::time::interval(REDRAW);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut news = Instant::now();
        while !tree.is_over() || !started {
            let line = tokio::select! {
                outcome = &mut starting, if !started => {
                    outcome.map_err(DemoError::sql("starting a run"))?;
                    started = true;
                    None
                }
                Some(event) = heard.recv() => {
                    news = Instant::now();
                    tree.note(&event)
                }
                Some(answer) = seen.recv() => {
                    let line = tree.see(answer, Instant::now());
                    if line.is_some() {
                        news = Instant::now();
                    }
                    line
                }
                _ = tick.tick() => {
                    if news.elapsed() > STALLED {
                        return Err(DemoError::Stalled);
                    }
                    None
                }
            };
            if screen.live {
                screen.draw(&tree.picture(screen, Instant::now()))?;
            } else if let Some(line) = line {
                screen.line(&line)?;
            }
        }
        screen.settle();
        Ok(tree)
    }

    async fn start(&self, link: &mut Link) -> Result<(), tokio_postgres::Error> {
        let start =
            "select run_id from pgflow.start_flow(flow_slug => $1, input => $2, run_id => $3)";
        for run in &self.runs {
            let params = [
                (&FLOW as _, Type::TEXT),
                (&self.input as _, Type::JSONB),
                (run as _, Type::UUID),
            ];
            match link.insist(start, &params).await {
                Ok(_row) => {}
                // Started by a call whose answer was lost.
                Err(error)
                    if error.code() == Some(&tokio_postgres::error::SqlState::UNIQUE_VIOLATION) => {
                }
                Err(error) => return Err(error),
            }
            self.answers.note_start(*run);
        }
        Ok(())
    }
}

fn folder(dir: &Path) -> Result<PathBuf, DemoError> {
    let folder = dir.canonicalize().map_err(|source| DemoError::Folder {
        folder: dir.to_owned(),
        source,
    })?;
    if folder.is_dir() {
        Ok(folder)
    } else {
        Err(DemoError::NoFolder(dir.to_owned()))
    }
}

/// Beside the data if that is kept; else it goes with the servers.
fn results(args: &Args, cluster: &Cluster) -> io::Result<PathBuf> {
    let home = match &args.data {
        Some(data) => data.canonicalize()?,
        None => cluster.folder().to_owned(),
    };
    let results = home.join("results");
    std::fs::create_dir_all(&results)?;
    Ok(results)
}

/// Functions are revoked from PUBLIC, or whoever can use the schema could start runs.
async fn admit_viewer(primary: &str) -> Result<(), tokio_postgres::Error> {
    let admin = crate::embedded::connect(primary).await?;
    let script = format!(
        "do $$ begin create role {VIEWER}; exception when duplicate_object then null; end $$;
         revoke execute on all functions in schema pgflow from public;
         grant usage on schema pgflow to {VIEWER}; grant select on all tables in schema pgflow to {VIEWER};
         grant execute on function pgflow.get_run_with_states(uuid) to {VIEWER}"
    );
    admin.batch_execute(&script).await
}

/// As `serve --auth trust` would have it, without file and environment: those speak of another Postgres.
fn configure(args: &Args, primary: &str, replica: &str) -> Result<Config, DemoError> {
    let mut config = config::from_sources(
        None,
        std::iter::empty(),
        Flags {
            listen: Some(address("--listen", args.listen.as_deref(), LISTEN)?),
            http: Some(address("--http", args.http.as_deref(), HTTP)?),
            primary: Some(primary.to_owned()),
            replicas: vec![replica.to_owned()],
            auth: Some("trust".to_owned()),
            pool_size: None,
            log: None,
        },
    )?;
    config.listen.drain_timeout = DRAIN_MAX;
    config.http.anon_role = Some(VIEWER.to_owned());
    Ok(config)
}

/// Looked at with a plain bind, because the proxy's own (SO_REUSEPORT) would share a port with another flowgate, which would
/// then get some of our clients.
fn address(flag: &'static str, given: Option<&str>, default: &str) -> Result<String, DemoError> {
    let wanted = given.unwrap_or(default);
    match TcpListener::bind(wanted) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => match given {
            Some(_) => Err(DemoError::Taken {
                flag,
                address: wanted.to_owned(),
            }),
            None => Ok("127.0.0.1:0".to_owned()),
        },
        // Free; or no address at all, which the configuration's own check puts in words.
        Ok(_) | Err(_) => Ok(wanted.to_owned()),
    }
}

/// For people: 1.3 ms.
fn ms(took: Duration) -> String {
    format!("{:.1} ms", took.as_secs_f64() * 1_000.0)
}
