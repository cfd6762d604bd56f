//! Builds each part once, passes handles, owns the order of shutting down. The only place that sees all parts.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, interval, timeout, timeout_at};
use tracing::{info, warn};

use crate::cancel::CancelRegistry;
use crate::classify::Classifier;
use crate::client::accept;
use crate::client::shared::{Counters, Running, Seats, Shared};
use crate::client::verifiers::VerifierError;
use crate::client::{Entrance, Peers, Replications, RunTokens, StatementRegistry, Verifiers};
use crate::config::{Config, ConnectUrl, Listen};
use crate::events::Hubs;
use crate::http::{self, HttpState, Readiness};
use crate::maintenance::Maintenance;
use crate::metrics::Registry;
use crate::pool::checkout::{ClientIds, Pools};
use crate::pool::probe::Freshness;
use crate::route::RouteSettings;
use crate::upstream::{Role, Upstream};

/// Bytes of statement texts remembered with what they are.
const MEMO_BYTES: usize = 8 * 1024 * 1024;
/// How often readiness is looked at, once the primary is known to answer.
const READINESS_EVERY: Duration = Duration::from_secs(1);
/// How long clients may take to be told that time is up.
const FAREWELL_MAX: Duration = Duration::from_secs(3);
const STANDING_TIMER: Duration = Duration::from_secs(1);
/// How long HTTP requests may take to end.
const HTTP_GOODBYE: Duration = Duration::from_secs(2);

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

/// A running proxy. Dropping it without `shut_down` leaves its threads to the end of the process.
pub struct App {
    /// Where clients are served; the port is known even if 0 was asked for.
    pub postgres: SocketAddr,
    pub http: Option<SocketAddr>,
    pub registry: Arc<Registry>,
    running: watch::Sender<Running>,
    entrance: watch::Sender<Arc<Entrance>>,
    drain_timeout: Duration,
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

/// Starts everything; returns once clients can connect. The control plane runs on the caller's runtime.
pub async fn start(config: &Config) -> Result<App, AppError> {
    let control = Handle::current();
    let registry = Arc::new(Registry::new());
    let (running, watching) = watch::channel(Running::Serving);

    let primary = Arc::new(Upstream::new(
        "primary",
        Role::Primary,
        config.primary.clone(),
    ));
    let replica = |(at, url): (usize, &ConnectUrl)| {
        Arc::new(Upstream::new(
            format!("replica-{}", at + 1),
            Role::Replica,
            url.clone(),
        ))
    };
    let replicas: Vec<_> = config.replicas.iter().enumerate().map(replica).collect();
    let upstreams: Vec<_> = std::iter::once(&primary)
        .chain(&replicas)
        .cloned()
        .collect();
    let urls: Vec<_> = upstreams.iter().map(|upstream| &upstream.url).collect();
    let pools =
        Pools::new(&urls, &config.pool, &registry, control.clone()).map_err(AppError::Upstream)?;
    let connect_timeout = config.pool.connect_timeout;
    let hubs = Hubs::new(
        config.primary.clone(),
        config.events.clone(),
        connect_timeout,
        &registry,
        control.clone(),
    );
    let freshness = (!replicas.is_empty())
        .then(|| Freshness::start(Arc::clone(&primary), replicas, connect_timeout, &control));

    let entrance = Entrance::new(config).map_err(AppError::Tls)?;
    let (entrance, watched_entrance) = watch::channel(Arc::new(entrance));
    let replications = Replications::new(
        &config.primary,
        &config.replication,
        connect_timeout,
        &registry,
    );
    let shared = Arc::new(Shared {
        listen: config.listen.clone(),
        pool_mode: config.pool.mode,
        entrance: watched_entrance,
        verifiers: Verifiers::new(&config.auth, &config.primary)?,
        pools: Arc::clone(&pools),
        cancels: Arc::new(CancelRegistry::new(config.cluster.address.as_deref())),
        peers: Peers::new(config, &registry),
        replications: replications.map_err(AppError::Upstream)?,
        clients: ClientIds::default(),
        seats: Seats::new(config.pool.max_clients.get()),
        classifier: Classifier::new(
            config.route.reads,
            MEMO_BYTES,
            u64::from_ne_bytes(random()?),
        ),
        statements: StatementRegistry::new(u32::from_ne_bytes(random()?)),
        hubs: Arc::clone(&hubs),
        freshness,
        upstreams,
        runs: Arc::new(RunTokens::new(Instant::now())),
        started: Instant::now(),
        route: RouteSettings {
            reads: config.route.reads,
            consistency: config.route.consistency,
        },
        replica_wait: config.route.replica_wait,
        asks_for_draws: false.into(),
        counters: Counters::new(&registry),
        running: watching,
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
            let listener = TcpListener::bind(address).await.map_err(failed)?;
            let bound = listener.local_addr().map_err(failed)?;
            let state = HttpState {
                registry: Arc::clone(&registry),
                ready: readiness,
            };
            let mut stop = running.subscribe();
            let stopped =
                async move { drop(stop.wait_for(|state| *state != Running::Serving).await) };
            (
                Some(bound),
                Some(tokio::spawn(http::serve(
                    listener,
                    config.http.max_connections.get(),
                    state,
                    stopped,
                ))),
            )
        }
    };
    let maintenance = Maintenance::start(config, &registry, &control);
    info!(%postgres, http = ?http, primary = %config.primary, replicas = config.replicas.len(), "serving");
    Ok(App {
        postgres,
        http,
        registry,
        running,
        entrance,
        drain_timeout: config.listen.drain_timeout,
        hubs,
        pools,
        planes,
        http_task,
        readiness: readiness_task,
        maintenance,
    })
}

impl App {
    /// Certificates (read anew), PROXY headers and access rules as `config` has them, for whoever connects from now on. On
    /// an error all stays as it is.
    pub fn replace_entrance(&self, config: &Config) -> Result<(), AppError> {
        let entrance = Entrance::new(config).map_err(AppError::Tls)?;
        self.entrance.send_replace(Arc::new(entrance));
        Ok(())
    }

    /// Stops accepting, lets transactions end within `listen.drain_timeout`, says 57P01 to the rest.
    pub async fn shut_down(self) {
        // Nobody may be watching any more.
        self.running.send_replace(Running::Draining);
        // Another flowgate may go on with it while we drain.
        self.maintenance.shut_down().await;
        let deadline = Instant::now() + self.drain_timeout;
        let mut threads = Vec::new();
        for mut plane in self.planes {
            if timeout_at(deadline, &mut plane.ended).await.is_err() {
                warn!("drain timeout: clients with open transactions are told to go");
                self.running.send_replace(Running::Stopping);
                if timeout(FAREWELL_MAX, &mut plane.ended).await.is_err() {
                    warn!("clients that did not take their farewell are cut off");
                }
            }
            threads.push((plane.stop, plane.thread));
        }
        for (stop, thread) in threads {
            drop(stop);
            let joined = tokio::task::spawn_blocking(move || thread.join()).await;
            if !matches!(joined, Ok(Ok(()))) {
                warn!("bug: a data-plane thread panicked");
            }
        }
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
    let alone = accept::bind(listen.postgres, false).map_err(failed)?;
    let address = alone.local_addr().map_err(failed)?;
    if threads == 1 {
        return Ok((address, vec![alone]));
    }
    drop(alone);
    let listeners = (0..threads)
        .map(|_| accept::bind(address, true))
        .collect::<io::Result<_>>()
        .map_err(failed)?;
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
