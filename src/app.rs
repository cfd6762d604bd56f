//! Builds each part once, passes handles, owns the order of shutting down, and what a reload changes. The only place that
//! sees all parts.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::{Mutex, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, interval, sleep_until, timeout};
use tracing::{error, info, warn};

use crate::cancel::CancelRegistry;
use crate::classify::{Classifier, RunRef};
use crate::client::accept;
use crate::client::live::{Live, Running, Standing};
use crate::client::shared::{Counters, Order, Seats, Shared};
pub use crate::client::shared::{Manner, NotReloaded, Reloaded};
use crate::client::verifiers::VerifierError;
use crate::client::{
    Entrance, Habits, Peers, Replications, RunTokens, StatementRegistry, Verifiers,
};
use crate::coalesce::Flights;
use crate::config::{self, Config, ConfigError, ConnectUrl, Listen, Reads, Wake};
use crate::events::{Hubs, Told};
use crate::http::{self, HttpState, JwksError, Place, Readiness};
use crate::maintenance::Maintenance;
use crate::metrics::Registry;
use crate::park::Park;
use crate::pgflow::events::run_of_topic;
use crate::pool::checkout::ClientIds;
use crate::pool::pools::Pools;
use crate::pool::probe::Freshness;
use crate::route::RouteSettings;
use crate::upstream::{PRIMARY, Upstream};

/// Bytes of statement texts remembered with what they are.
const MEMO_BYTES: usize = 8 * 1024 * 1024;
/// How often readiness is looked at, once the primary is known to answer.
const READINESS_EVERY: Duration = Duration::from_secs(1);
/// How long clients may take to be told that time is up.
const FAREWELL_MAX: Duration = Duration::from_secs(3);
/// How long clients still come in when another process takes over.
const HANDOVER: Duration = Duration::from_secs(1);
const STANDING_TIMER: Duration = Duration::from_secs(1);
/// How long HTTP requests may take to end.
const HTTP_GOODBYE: Duration = Duration::from_secs(2);
/// Orders of admins that wait for their turn.
const ORDERS: usize = 16;

#[derive(Debug, Error)]
pub enum AppError {
    #[error("listen.postgres: cannot listen on {address}: {source}")]
    Listen {
        address: SocketAddr,
        source: io::Error,
    },
    #[error("listen.http: cannot listen on {address}: {source}")]
    ListenHttp {
        address: SocketAddr,
        source: io::Error,
    },
    #[error("http.jwks: {0}")]
    Jwks(#[from] JwksError),
    #[error("listen.tls: {0}")]
    Tls(#[source] io::Error),
    #[error("{0}")]
    Auth(#[from] VerifierError),
    #[error("certificates of an upstream's URL: {0}")]
    Upstream(#[source] io::Error),
    #[error("cannot start a thread: {0}")]
    Thread(#[source] io::Error),
    #[error("no randomness: {0}")]
    Randomness(#[source] io::Error),
}

/// What the process can do that we cannot; each is optional.
#[derive(Clone, Default)]
pub struct Hooks {
    /// Reads the configuration again, file, environment and flags. Without it a reload reads users and certificates alone.
    pub reread: Option<Reread>,
    /// Puts a new `log.filter` in force.
    pub set_log: Option<SetLog>,
}

pub type Reread = Arc<dyn Fn() -> Result<Config, RereadError> + Send + Sync>;
pub type SetLog = Arc<dyn Fn(&str) + Send + Sync>;

#[derive(Debug, Error)]
pub enum RereadError {
    #[error("{0}")]
    File(String),
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// A running proxy. Dropping it without `shut_down` leaves its threads to the end of the process.
pub struct App {
    /// Where clients are served; the port is known even if 0 was asked for.
    pub postgres: SocketAddr,
    pub http: Option<SocketAddr>,
    pub registry: Arc<Registry>,
    governor: Arc<Governor>,
    govern: JoinHandle<()>,
    hubs: Arc<Hubs>,
    pools: Arc<Pools>,
    planes: Vec<Plane>,
    http_task: Option<JoinHandle<io::Result<()>>>,
    readiness: JoinHandle<()>,
    maintenance: Maintenance,
}

/// One data-plane thread: a whole runtime with its own acceptor.
struct Plane {
    stop: oneshot::Sender<()>,
    ended: oneshot::Receiver<()>,
    thread: std::thread::JoinHandle<()>,
}

/// As `start_with`, without hooks.
pub async fn start(config: &Config) -> Result<App, AppError> {
    start_with(config, Hooks::default()).await
}

/// Starts everything; returns once clients can connect. The control plane runs on the caller's runtime.
pub async fn start_with(config: &Config, hooks: Hooks) -> Result<App, AppError> {
    let control = Handle::current();
    let registry = Arc::new(Registry::new());
    let config = Arc::new(config.clone());

    let urls = std::iter::once(&config.primary).chain(&config.replicas);
    let upstreams: Arc<[_]> = urls
        .enumerate()
        .map(|(id, url)| Arc::new(Upstream::new(id, url.clone())))
        .collect();
    let reader = uuid::Uuid::new_v4();
    let pools = Pools::new(
        &upstreams,
        &config.pool,
        &config.roles,
        &config.shed,
        (config.events.wake == Wake::Observe).then_some(reader),
        &registry,
        control.clone(),
    )
    .map_err(AppError::Upstream)?;
    let connect_timeout = config.pool.connect_timeout;
    let runs = Arc::new(RunTokens::new(Instant::now()));
    // Of whatever the outbox tells, also of what was written past this proxy.
    let told: Told = {
        let runs = Arc::clone(&runs);
        Box::new(move |topic| {
            if let Some(run) = run_of_topic(topic) {
                runs.changed(RunRef::Literal(run));
            }
        })
    };
    let hubs = Hubs::new(told, &config, reader, &registry, control.clone());
    let live = Live {
        entrance: Arc::new(Entrance::new(&config).map_err(AppError::Tls)?),
        verifiers: Arc::new(Verifiers::new(&config.auth, &config.primary)?),
        classifier: classifier(config.route.reads)?,
        freshness: freshness(&upstreams, &config, &control),
        upstreams: Arc::clone(&upstreams),
        route: route_settings(&config),
        config: Arc::clone(&config),
    };
    let (standing, watching) = watch::channel(Standing {
        running: Running::Serving,
        live: Arc::new(live),
    });
    let (orders, ordered) = mpsc::channel(ORDERS);

    let replications = Replications::new(
        &config.primary,
        &config.replication,
        connect_timeout,
        &registry,
    );
    let shared = Arc::new(Shared {
        standing: watching,
        orders,
        pools: Arc::clone(&pools),
        cancels: Arc::new(CancelRegistry::new(config.cluster.address.as_deref())),
        peers: Peers::new(&config, &registry),
        replications: replications.map_err(AppError::Upstream)?,
        clients: ClientIds::default(),
        roster: Arc::default(),
        seats: Seats::new(config.pool.max_clients.get()),
        statements: StatementRegistry::new(u32::from_ne_bytes(random()?)),
        hubs: Arc::clone(&hubs),
        runs,
        flights: Arc::new(Flights::new(
            config.cache.max_bytes,
            config.cache.max_age.max(config.shed.max_stale),
            &registry,
        )),
        park: Arc::new(Park::new(config.poll.probe, &registry)),
        started: Instant::now(),
        asks_for_draws: false.into(),
        habits: Habits::new(),
        counters: Counters::new(&registry),
    });

    let (postgres, listeners) = listen(&config.listen)?;
    let planes = listeners.into_iter().enumerate();
    let planes = planes
        .map(|(at, listener)| spawn_plane(at, listener, &shared))
        .collect::<Result<_, _>>()?;

    let (ready, readiness) = watch::channel(Readiness::NotReady("starting".to_owned()));
    let readiness_task = tokio::spawn(watch_readiness(
        config.primary.clone(),
        connect_timeout,
        ready,
    ));
    let (http, http_task) = match config.listen.http {
        None => (None, None),
        Some(address) => {
            let failed = |source| AppError::ListenHttp { address, source };
            let socket = accept::bind(address, config.listen.reuse_port).map_err(failed)?;
            let listener = TcpListener::from_std(socket).map_err(failed)?;
            let bound = listener.local_addr().map_err(failed)?;
            let place = Place {
                postgres,
                database: config.primary.database.clone(),
            };
            let state = HttpState::new(&config, &hubs, &registry, readiness, place)?;
            let mut stop = standing.subscribe();
            let stopped = async move {
                let told = stop.wait_for(|standing| standing.running > Running::Serving);
                drop(told.await);
            };
            (
                Some(bound),
                Some(tokio::spawn(http::serve(listener, state, stopped))),
            )
        }
    };
    let maintenance = Maintenance::start(&config, &registry, &control);
    info!(%postgres, http = ?http, primary = %config.primary, replicas = config.replicas.len(), "serving");
    let (ending, _) = watch::channel(None);
    let governor = Arc::new(Governor {
        known: Mutex::new(upstreams.to_vec()),
        standing,
        ending: Ending(Arc::new(ending)),
        hooks,
        shared,
        control,
    });
    Ok(App {
        postgres,
        http,
        registry,
        govern: tokio::spawn(govern(Arc::clone(&governor), ordered)),
        governor,
        hubs,
        pools,
        planes,
        http_task,
        readiness: readiness_task,
        maintenance,
    })
}

fn route_settings(config: &Config) -> RouteSettings {
    RouteSettings {
        reads: config.route.reads,
        consistency: config.route.consistency,
        park: config.poll.park,
    }
}

fn classifier(reads: Reads) -> Result<Arc<Classifier>, AppError> {
    let seed = u64::from_ne_bytes(random()?);
    Ok(Arc::new(Classifier::new(reads, MEMO_BYTES, seed)))
}

/// `None`: no replicas.
fn freshness(upstreams: &[Arc<Upstream>], config: &Config, control: &Handle) -> Option<Freshness> {
    let (primary, replicas) = upstreams.split_first()?;
    let (primary, replicas) = (Arc::clone(primary), replicas.to_vec());
    let (timeout, spacing) = (config.pool.connect_timeout, config.route.sample);
    (!replicas.is_empty()).then(|| Freshness::start(primary, replicas, timeout, spacing, control))
}

/// How and when the end comes, for whoever may ask for it.
#[derive(Clone)]
pub struct Ending(Arc<watch::Sender<Option<Manner>>>);

impl Ending {
    /// The end comes in this manner, unless it comes sooner anyway.
    pub fn ask(&self, manner: Manner) {
        self.0
            .send_modify(|asked| *asked = (*asked).max(Some(manner)));
    }

    /// Resolves when somebody has asked for the end.
    pub async fn asked(&self) -> Manner {
        let mut asked = self.0.subscribe();
        let manner = asked.wait_for(Option::is_some).await;
        manner
            .ok()
            .and_then(|manner| *manner)
            .unwrap_or(Manner::Now)
    }
}

/// Whoever may tell all clients something, and does what a reload takes.
struct Governor {
    standing: watch::Sender<Standing>,
    ending: Ending,
    /// Every upstream there has been. Locked for the whole of a reload.
    known: Mutex<Vec<Arc<Upstream>>>,
    hooks: Hooks,
    shared: Arc<Shared>,
    control: Handle,
}

/// Carries out the orders of admins, one after another.
async fn govern(governor: Arc<Governor>, mut orders: mpsc::Receiver<Order>) {
    while let Some(order) = orders.recv().await {
        match order {
            // Whoever asked may be gone by now.
            Order::Reload(reply) => drop(reply.send(governor.reload().await)),
            Order::Shutdown(manner) => {
                info!(?manner, "an admin asks for shutdown");
                governor.ending.ask(manner);
            }
        }
    }
}

impl Governor {
    fn live(&self) -> Arc<Live> {
        Arc::clone(&self.standing.borrow().live)
    }

    fn stand(&self, running: Running) {
        self.standing.send_modify(|standing| {
            standing.running = standing.running.max(running);
        });
    }

    /// Everything that can fail first, so that a configuration with a problem changes nothing.
    async fn reload(&self) -> Result<Reloaded, NotReloaded> {
        let mut known = self.known.lock().await;
        let outcome = self.reload_locked(&mut known);
        match &outcome {
            Ok(Reloaded { need_restart }) => {
                info!("configuration reloaded");
                for key in need_restart {
                    warn!(key, "changed in the configuration; takes a restart");
                }
            }
            Err(NotReloaded { problems }) => {
                for problem in problems {
                    error!(problem, "configuration not reloaded, nothing changed");
                }
            }
        }
        outcome
    }

    fn reload_locked(&self, known: &mut Vec<Arc<Upstream>>) -> Result<Reloaded, NotReloaded> {
        let before = self.live();
        let wanted = match &self.hooks.reread {
            Some(reread) => reread().map_err(not_reread)?,
            None => before.config.as_ref().clone(),
        };
        let need_restart = config::need_restart(&before.config, &wanted);
        let config = Arc::new(config::live_part(&before.config, wanted));
        let mut problems = Vec::new();
        if config.trusts_strangers() {
            // The address it was written for is not the one we listen on yet.
            let open = config.listen.postgres;
            let problem = "auth.method, access: \"trust\" would let in whoever reaches";
            problems.push(format!(
                "{problem} {open}, where this process listens until a restart"
            ));
        }
        let entrance = Entrance::new(&config)
            .map_err(|error| problems.push(format!("listen.tls: {error}")))
            .ok();
        let verifiers = before
            .verifiers
            .renewed(&config.auth, &config.primary)
            .map_err(|error| problems.push(error.to_string()))
            .ok();
        let classifier = if config.route.reads == before.config.route.reads {
            Some(Arc::clone(&before.classifier))
        } else {
            classifier(config.route.reads)
                .map_err(|error| problems.push(error.to_string()))
                .ok()
        };
        let pools = &self.shared.pools;
        let (mut upstreams, mut new) = (vec![Arc::clone(&known[PRIMARY])], Vec::new());
        for (at, url) in config.replicas.iter().enumerate() {
            let seen = known
                .iter()
                .skip(1)
                .chain(new.iter().map(|(upstream, _)| upstream));
            let unused = |upstream: &&Arc<Upstream>| {
                upstream.url == *url && !upstreams.iter().any(|used| used.id == upstream.id)
            };
            if let Some(upstream) = seen.into_iter().find(unused) {
                upstreams.push(Arc::clone(upstream));
                continue;
            }
            let upstream = Arc::new(Upstream::new(known.len() + new.len(), url.clone()));
            match pools.prepare(&upstream) {
                Ok(prepared) => {
                    upstreams.push(Arc::clone(&upstream));
                    new.push((upstream, prepared));
                }
                Err(error) => problems.push(format!("replica[{at}].url: sslrootcert: {error}")),
            }
        }
        let (Some(entrance), Some(verifiers), Some(classifier), []) =
            (entrance, verifiers, classifier, problems.as_slice())
        else {
            return Err(NotReloaded { problems });
        };

        for (upstream, prepared) in new {
            pools.add(prepared);
            known.push(upstream);
        }
        let same = upstreams.len() == before.upstreams.len()
            && std::iter::zip(&upstreams, before.upstreams.iter()).all(|(a, b)| a.id == b.id);
        let (upstreams, freshness) = if same {
            (Arc::clone(&before.upstreams), before.freshness.clone())
        } else {
            let freshness = freshness(&upstreams, &config, &self.control);
            (Arc::from(upstreams), freshness)
        };
        if config.log != before.config.log
            && let Some(set_log) = &self.hooks.set_log
        {
            set_log(&config.log);
        }
        self.shared.seats.resize(config.pool.max_clients.get());
        let live = Arc::new(Live {
            entrance: Arc::new(entrance),
            verifiers: Arc::new(verifiers),
            classifier,
            upstreams: Arc::clone(&upstreams),
            freshness,
            route: route_settings(&config),
            config: Arc::clone(&config),
        });
        self.standing.send_modify(|standing| standing.live = live);
        pools.adopt(&config.pool, &config.roles, &upstreams);
        // Replicas may have other places from now on.
        self.shared.flights.kept.clear();
        Ok(Reloaded { need_restart })
    }
}

fn not_reread(error: RereadError) -> NotReloaded {
    let problems = match error {
        RereadError::File(problem) => vec![problem],
        RereadError::Config(ConfigError { problems }) => {
            problems.iter().map(ToString::to_string).collect()
        }
    };
    NotReloaded { problems }
}

impl App {
    /// Reads the configuration again, and puts what a reload may change in force. No client notices.
    pub async fn reload(&self) -> Result<Reloaded, NotReloaded> {
        self.governor.reload().await
    }

    /// Who asks for the end, and who waits for it to be asked for.
    pub fn ending(&self) -> Ending {
        self.governor.ending.clone()
    }

    /// Stops accepting, lets transactions end within `listen.drain_timeout`, says 57P01 to the rest.
    pub async fn shut_down(self) {
        self.shut_down_as(Manner::Drain).await;
    }

    /// Ends in that manner, or sooner if somebody asks for that meanwhile.
    pub async fn shut_down_as(self, manner: Manner) {
        // Another flowgate may go on with it while we drain.
        self.maintenance.shut_down().await;
        let mut manner = manner;
        let mut asked = self.governor.ending.0.subscribe();
        let (mut threads, mut ends) = (Vec::new(), Vec::new());
        for Plane {
            stop,
            ended,
            thread,
        } in self.planes
        {
            ends.push(ended);
            threads.push((stop, thread));
        }
        let mut all_ended = std::pin::pin!(async move {
            for ended in ends {
                drop(ended.await);
            }
        });
        // Another process takes over: who is at the door of this one is let in yet, not sent away.
        let mut handing_over = self.governor.live().config.listen.reuse_port;
        loop {
            let (running, patience) = match manner {
                Manner::WhenClientsLeft => (Running::Leaving, None),
                Manner::WhenServersFree | Manner::Drain if handing_over => {
                    (Running::Leaving, Some(HANDOVER))
                }
                Manner::WhenServersFree => (Running::Draining, None),
                Manner::Drain => {
                    let patience = self.governor.live().config.listen.drain_timeout;
                    (Running::Draining, Some(patience))
                }
                Manner::Now => (Running::Stopping, Some(FAREWELL_MAX)),
            };
            self.governor.stand(running);
            let now = Instant::now();
            tokio::select! {
                biased;
                () = &mut all_ended => break,
                () = sleep_until(now + patience.unwrap_or_default()), if patience.is_some() => {
                    if std::mem::take(&mut handing_over) && manner < Manner::Now {
                        continue;
                    }
                    if manner == Manner::Now {
                        warn!("clients that did not take their farewell are cut off");
                        break;
                    }
                    warn!("drain timeout: clients with open transactions are told to go");
                    manner = Manner::Now;
                }
                sooner = asked.wait_for(|asked| *asked > Some(manner)) => match sooner {
                    Ok(sooner) => manner = sooner.unwrap_or(Manner::Now),
                    Err(_nobody_left_to_ask) => manner = Manner::Now,
                },
            }
        }
        for (stop, thread) in threads {
            drop(stop);
            let joined = tokio::task::spawn_blocking(move || thread.join()).await;
            if !matches!(joined, Ok(Ok(()))) {
                warn!("bug: a data-plane thread panicked");
            }
        }
        self.govern.abort();
        self.hubs.shutdown().await;
        self.pools.close_idle();
        self.readiness.abort();
        if let Some(task) = self.http_task
            && timeout(HTTP_GOODBYE, task).await.is_err()
        {
            warn!("an HTTP request was still under way");
        }
        info!("stopped");
    }
}

/// The sockets of the data-plane threads, and their address.
fn listen(listen: &Listen) -> Result<(SocketAddr, Vec<std::net::TcpListener>), AppError> {
    let threads = listen.threads.get();
    let failed = |source| AppError::Listen {
        address: listen.postgres,
        source,
    };
    // Alone there, unless it was said that others may be: another process would take half of our clients unnoticed.
    let first = accept::bind(listen.postgres, listen.reuse_port).map_err(failed)?;
    let address = first.local_addr().map_err(failed)?;
    if threads == 1 {
        return Ok((address, vec![first]));
    }
    let others = if listen.reuse_port {
        threads - 1
    } else {
        threads
    };
    let first = listen.reuse_port.then_some(first);
    let others = (0..others).map(|_| accept::bind(address, true));
    let listeners = first.into_iter().map(Ok).chain(others);
    let listeners = listeners.collect::<io::Result<_>>().map_err(failed)?;
    Ok((address, listeners))
}

fn random<const N: usize>() -> Result<[u8; N], AppError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| AppError::Randomness(io::Error::other(error)))?;
    Ok(bytes)
}

fn spawn_plane(
    at: usize,
    listener: std::net::TcpListener,
    shared: &Arc<Shared>,
) -> Result<Plane, AppError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(AppError::Thread)?;
    let (stop, mut stopped) = oneshot::channel::<()>();
    let (end, ended) = oneshot::channel();
    let shared = Arc::clone(shared);
    let body = move || {
        runtime.block_on(async {
            // Registering a timer that is the runtime's next one wakes its driver by a system call; with this one standing,
            // a request's deadline never is.
            let standing = tokio::spawn(async {
                let mut tick = interval(STANDING_TIMER);
                loop {
                    tick.tick().await;
                }
            });
            tokio::select! {
                served = accept::serve(listener, shared) => {
                    if let Err(error) = served {
                        warn!(%error, "a data-plane thread cannot accept");
                    }
                    // Nobody is waiting if the proxy is being dropped.
                    let _waited_for = end.send(());
                    // Other threads may still use servers whose sockets this runtime drives.
                    drop((&mut stopped).await);
                }
                // The sender's drop: time is up.
                _dropped = &mut stopped => {}
            }
            standing.abort();
        });
    };
    let thread = std::thread::Builder::new()
        .name(format!("data-{at}"))
        .spawn(body)
        .map_err(AppError::Thread)?;
    Ok(Plane {
        stop,
        ended,
        thread,
    })
}

/// Ready is: the primary takes a login of the control role.
async fn watch_readiness(primary: ConnectUrl, within: Duration, ready: watch::Sender<Readiness>) {
    loop {
        match crate::server::control::dial(&primary, "flowgate readiness", within).await {
            Ok((_client, connection)) => {
                ready.send_replace(Readiness::Ready);
                info!(%primary, "primary answers");
                // Held open while it lives: its end is the news.
                let gone = connection
                    .await
                    .err()
                    .map_or_else(|| "closed".to_owned(), |error| error.to_string());
                warn!(%primary, reason = gone, "primary is gone");
                ready.send_replace(Readiness::NotReady(format!("primary: {gone}")));
            }
            Err(error) => {
                let reason = format!("primary: {error}");
                let news = ready.send_if_modified(|state| {
                    let changed = *state != Readiness::NotReady(reason.clone());
                    *state = Readiness::NotReady(reason.clone());
                    changed
                });
                if news {
                    warn!(%primary, %error, "primary does not answer");
                }
            }
        }
        tokio::time::sleep(READINESS_EVERY).await;
    }
}
