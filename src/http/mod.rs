//! The HTTP plane: health, readiness, numbers and the dashboard's files for everybody; and for whom `identity` knows, what a
//! run is and its events: as JSON (`api`), as server-sent events (`streams`), and as pgflow's own client expects it (`rest`,
//! `realtime`). It serves the database of `primary.url`. Never touches a client's or server's socket of the data plane. Started
//! by `app.rs` with the socket it bound.

mod api;
mod cors;
mod counters;
mod dashboard;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod fuzz;
mod identity;
mod jwks;
mod jwt;
mod phoenix;
mod realtime;
mod refusal;
mod rest;
mod seats;
mod starting;
mod streams;
mod taking;

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::serve::Listener;
use bytes::Bytes;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tower_http::compression::CompressionLayer;
use tracing::debug;
use uuid::Uuid;

use crate::config::Config;
use crate::events::{Hub, Hubs, Proof, Sight};
use crate::metrics::Registry;
use crate::server::chorus::Chorus;
use crate::server::questions::{Database, DbError};
pub use jwt::JwksError;

use cors::Origins;
use counters::Counters;
pub(crate) use dashboard::Place;
use identity::Guard;
use seats::{Seated, Seats};
use starting::Starting;

/// Of a request.
const BODY_MAX: usize = 8 << 20;
/// From a request's head to its answer's, where there is no stream.
const REQUEST_MAX: Duration = Duration::from_secs(60);

/// What the routes read; handles, cheap to clone.
#[derive(Clone)]
pub(crate) struct HttpState(Arc<Parts>);

pub(crate) struct Parts {
    registry: Arc<Registry>,
    ready: watch::Receiver<Readiness>,
    guard: Guard,
    database: Arc<Database>,
    sight: Sight,
    hub: Arc<Hub>,
    origins: Origins,
    starting: Starting,
    /// Of runs that streams begin with.
    last_seqs: Chorus<Uuid, Result<Option<i64>, DbError>>,
    counters: Counters,
    limits: Limits,
    /// Where the page says that Postgres' protocol is spoken.
    place: Place,
    stop: watch::Sender<bool>,
    /// True once we go: streams end.
    stopping: watch::Receiver<bool>,
}

struct Limits {
    connections: usize,
    header_timeout: Duration,
    write_timeout: Duration,
}

impl std::ops::Deref for HttpState {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0
    }
}

impl HttpState {
    pub(crate) fn new(
        config: &Config,
        hubs: &Hubs,
        registry: &Arc<Registry>,
        ready: watch::Receiver<Readiness>,
        place: Place,
    ) -> Result<Self, JwksError> {
        let http = &config.http;
        let database = Arc::new(Database::new(
            config.primary.clone(),
            "flowgate http",
            http.pool_size.get(),
            // Who comes with a crowd (all of a page's streams, after a restart) waits as long as for a server.
            config.pool.checkout_timeout,
            config.pool.connect_timeout,
            registry.counter(
                "flowgate_http_database_refused_total",
                "HTTP requests that got no database connection in time",
                &[],
            ),
        ));
        let (stop, stopping) = watch::channel(false);
        Ok(Self(Arc::new(Parts {
            registry: Arc::clone(registry),
            ready,
            guard: Guard::new(http, registry)?,
            sight: Sight::new(Arc::clone(&database), Proof::ToBeTaken, http.recheck),
            database,
            hub: hubs.of_database(&config.primary.database),
            origins: Origins::new(&http.cors),
            starting: Starting::default(),
            last_seqs: Chorus::default(),
            counters: Counters::new(registry),
            limits: Limits {
                connections: http.max_connections.get(),
                header_timeout: http.header_timeout,
                write_timeout: http.write_timeout,
            },
            place,
            stop,
            stopping,
        })))
    }
}

/// Whether traffic should be sent here: what `/readyz` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    Ready,
    /// With the reason, for whoever asks.
    NotReady(String),
}

/// Serves until `shutdown` resolves, then ends streams and lets requests under way end. How long that may take is the caller's
/// to bound. No more than `http.max_connections` connections are served at once.
pub(crate) async fn serve(
    listener: TcpListener,
    state: HttpState,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let limits = &state.limits;
    let mut seats = Seats::new(
        listener,
        limits.connections,
        limits.write_timeout,
        &state.registry,
    );
    let router = router(state.clone());
    let mut connections = JoinSet::new();
    connections.spawn(keep_keys(state.clone()));
    let mut shutdown = pin!(shutdown);
    loop {
        tokio::select! {
            biased;
            () = &mut shutdown => break,
            (seated, _address) = seats.accept() => {
                connections.spawn(converse(seated, router.clone(), state.clone()));
            }
            Some(_ended) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
    let vacated = seats.vacated();
    drop(seats);
    state.stop.send_replace(true);
    while connections.join_next().await.is_some() {}
    // Sockets live in tasks of their own.
    vacated.await;
    Ok(())
}

/// Until we go.
async fn keep_keys(state: HttpState) {
    let mut stopping = state.stopping.clone();
    tokio::select! {
        () = state.guard.keep_keys() => {}
        () = stopped(&mut stopping) => {}
    }
}

/// One connection, to its end, or until a stream takes it.
async fn converse(seated: Seated, router: Router, state: HttpState) {
    let mut stopping = state.stopping.clone();
    let (lent, ours) = taking::lend(seated);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(state.limits.header_timeout)
        .serve_connection(TokioIo::new(lent), taking::service(router, ours.clone()))
        .with_upgrades();
    let mut connection = pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stopped(&mut stopping) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended
        && !ours.is_taken()
    {
        debug!(%error, "HTTP connection");
    }
}

/// Resolves when we go.
async fn stopped(stopping: &mut watch::Receiver<bool>) {
    drop(stopping.wait_for(|stopping| *stopping).await);
}

fn router(state: HttpState) -> Router {
    let rest = Router::new()
        .route("/rpc/{name}", post(rest::call))
        .route("/{table}", get(rest::read))
        .fallback(rest::unknown);
    let answers = Router::new()
        .route("/runs", get(api::runs))
        .route("/runs/{id}", get(api::run))
        .route("/flows", get(api::flows))
        .route("/flows/{slug}", get(api::flow))
        .nest("/rest/v1", rest)
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .layer(from_fn(in_time))
        .layer(CompressionLayer::new());
    let streams = Router::new()
        .route("/events", get(streams::all))
        .route("/events/flows/{slug}", get(streams::flow))
        .route("/events/runs/{id}", get(streams::run))
        .route("/realtime/v1/websocket", get(realtime::websocket));
    Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .merge(dashboard::routes(&state.place).layer(CompressionLayer::new()))
        .merge(answers)
        .merge(streams)
        .layer(from_fn_with_state(state.origins.clone(), cors::apply))
        .with_state(state)
}

/// A body that never ends must not hold a place for ever.
async fn in_time(request: Request, next: Next) -> Response {
    match timeout(REQUEST_MAX, next.run(request)).await {
        Ok(response) => response,
        Err(_elapsed) => StatusCode::REQUEST_TIMEOUT.into_response(),
    }
}

/// Of a NotificationResponse: its channel and payload. (protocol-message-formats.html)
fn parts_of(frame: &Bytes) -> Option<(&str, &str)> {
    let text = std::str::from_utf8(frame.get(9..)?).ok()?;
    text.strip_suffix('\0')?.split_once('\0')
}

fn channel_of(frame: &Bytes) -> Option<&str> {
    parts_of(frame).map(|(channel, _)| channel)
}

fn payload_of(frame: &Bytes) -> Option<&str> {
    parts_of(frame).map(|(_, payload)| payload)
}

/// Answers while the process does: a failing Postgres is no reason to restart us.
async fn healthz() -> &'static str {
    "ok\n"
}

async fn readyz(State(state): State<HttpState>) -> (StatusCode, String) {
    // Whoever told us is gone, so what it last said is no longer true.
    if state.ready.has_changed().is_err() {
        return (
            StatusCode::SERVICE_UNAVAILABLE,
            "shutting down\n".to_owned(),
        );
    }
    match &*state.ready.borrow() {
        Readiness::Ready => (StatusCode::OK, "ok\n".to_owned()),
        Readiness::NotReady(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
    }
}

async fn metrics(State(state): State<HttpState>) -> impl IntoResponse {
    (
        [(
            header::CONTENT_TYPE,
            "text/plain; version=0.0.4; charset=utf-8",
        )],
        state.registry.render(),
    )
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::num::NonZeroUsize;
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio::runtime::Handle;
    use tokio::sync::oneshot;
    use tokio::task::JoinHandle;
    use tokio::time::timeout;

    use crate::config::{self, Flags};

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(10);

    struct Server {
        addr: SocketAddr,
        registry: Arc<Registry>,
        ready: watch::Sender<Readiness>,
        stop: oneshot::Sender<()>,
        task: JoinHandle<io::Result<()>>,
    }

    async fn start(readiness: Readiness) -> Server {
        start_with(readiness, |_| {}).await
    }

    async fn start_with(readiness: Readiness, tweak: impl FnOnce(&mut config::Http)) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let registry = Arc::new(Registry::new());
        let (ready, receiver) = watch::channel(readiness);
        let (stop, stopped) = oneshot::channel();
        let flags = Flags {
            // Nobody is asked anything here.
            primary: Some("postgres://nobody@127.0.0.1:1/none".to_owned()),
            ..Flags::default()
        };
        let mut config = config::from_sources(None, std::iter::empty(), flags).unwrap();
        tweak(&mut config.http);
        let hubs = Hubs::new(
            Box::new(|_| {}),
            &config,
            Uuid::nil(),
            &registry,
            Handle::current(),
        );
        let place = Place {
            postgres: addr,
            database: "app".to_owned(),
        };
        let state = HttpState::new(&config, &hubs, &registry, receiver, place).unwrap();
        let shutdown = async { drop(stopped.await) };
        Server {
            addr,
            registry,
            ready,
            stop,
            task: tokio::spawn(serve(listener, state, shutdown)),
        }
    }

    /// The whole answer, as bytes on the wire.
    async fn ask(addr: SocketAddr, request: &str) -> String {
        let exchange = async {
            let mut socket = TcpStream::connect(addr).await.unwrap();
            let request = format!("{request} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
            socket.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            socket.read_to_string(&mut answer).await.unwrap();
            answer
        };
        timeout(DEADLINE, exchange).await.expect("an answer")
    }

    #[tokio::test]
    async fn we_are_healthy_while_we_live_and_ready_when_told() {
        let server = start(Readiness::NotReady("primary: connection refused".into())).await;
        let health = ask(server.addr, "GET /healthz").await;
        assert!(
            health.starts_with("HTTP/1.1 200 ") && health.ends_with("\r\n\r\nok\n"),
            "{health}"
        );
        let ready = ask(server.addr, "GET /readyz").await;
        assert!(ready.starts_with("HTTP/1.1 503 "), "{ready}");
        assert!(
            ready.ends_with("\r\n\r\nprimary: connection refused\n"),
            "{ready}"
        );

        server.ready.send(Readiness::Ready).unwrap();
        let ready = ask(server.addr, "GET /readyz").await;
        assert!(
            ready.starts_with("HTTP/1.1 200 ") && ready.ends_with("\r\n\r\nok\n"),
            "{ready}"
        );

        drop(server.ready);
        let ready = ask(server.addr, "GET /readyz").await;
        assert!(
            ready.starts_with("HTTP/1.1 503 ") && ready.ends_with("shutting down\n"),
            "{ready}"
        );
    }

    #[tokio::test]
    async fn the_metrics_are_those_of_the_registry_now() {
        let server = start(Readiness::Ready).await;
        let counter = server.registry.counter("flowgate_x_total", "x", &[]);
        counter.add(41);
        ask(server.addr, "GET /metrics").await;
        counter.inc();
        let answer = ask(server.addr, "GET /metrics").await;
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert!(
            answer.contains("content-type: text/plain; version=0.0.4; charset=utf-8\r\n"),
            "{answer}"
        );
        assert!(answer.ends_with("\nflowgate_x_total 42\n"), "{answer}");
    }

    #[tokio::test]
    async fn the_page_and_its_files_are_served_with_what_they_need() {
        let server = start(Readiness::Ready).await;
        let page = ask(server.addr, "GET /").await;
        assert!(page.starts_with("HTTP/1.1 200 "), "{page}");
        for header in [
            "content-type: text/html; charset=utf-8\r\n",
            "content-security-policy: default-src 'none';",
            "cache-control: no-cache\r\n",
        ] {
            assert!(page.contains(header), "{header}: {page}");
        }
        let address = format!("data-postgres=\"{}\" data-database=\"app\"", server.addr);
        assert!(page.contains(&address), "{page}");
        for (name, kind) in [("app.js", "text/javascript"), ("style.css", "text/css")] {
            let file = ask(server.addr, &format!("GET /dashboard/{name}")).await;
            assert!(file.starts_with("HTTP/1.1 200 "), "{file}");
            let kind = format!("content-type: {kind}; charset=utf-8\r\n");
            assert!(file.contains(&kind), "{file}");
        }
    }

    #[tokio::test]
    async fn what_is_not_there_is_refused() {
        let server = start(Readiness::Ready).await;
        let answer = ask(server.addr, "GET /nothing").await;
        assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
        let answer = ask(server.addr, "POST /metrics").await;
        assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
    }

    #[tokio::test]
    async fn beyond_the_limit_a_connection_is_refused_in_words_until_one_ends() {
        let server = start_with(Readiness::Ready, |http| {
            http.max_connections = NonZeroUsize::MIN
        })
        .await;
        let mut first = TcpStream::connect(server.addr).await.unwrap();
        first
            .write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"ok\n") {
            let read = timeout(DEADLINE, first.read_buf(&mut answer)).await;
            assert_ne!(read.unwrap().unwrap(), 0);
        }
        let refused = ask(server.addr, "GET /healthz").await;
        assert!(refused.starts_with("HTTP/1.1 503 "), "{refused}");
        assert!(
            refused.ends_with("\r\n\r\ntoo many connections: http.max_connections is 1\n"),
            "{refused}"
        );
        let rendered = server.registry.render();
        for line in [
            "flowgate_http_connections 1",
            "flowgate_http_connections_refused_total 1",
        ] {
            assert!(rendered.lines().any(|shown| shown == line), "{rendered}");
        }
        drop(first);
        let freed = async {
            while !ask(server.addr, "GET /healthz").await.ends_with("ok\n") {
                tokio::task::yield_now().await;
            }
        };
        timeout(DEADLINE, freed).await.expect("a free seat");
    }

    #[tokio::test]
    async fn shutdown_ends_the_server_even_with_an_idle_connection() {
        let server = start(Readiness::Ready).await;
        let mut idle = TcpStream::connect(server.addr).await.unwrap();
        idle.write_all(b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n")
            .await
            .unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"ok\n") {
            assert_ne!(
                timeout(DEADLINE, idle.read_buf(&mut answer))
                    .await
                    .unwrap()
                    .unwrap(),
                0
            );
        }
        server.stop.send(()).unwrap();
        timeout(DEADLINE, server.task)
            .await
            .expect("an end")
            .unwrap()
            .unwrap();
        assert_eq!(
            timeout(DEADLINE, idle.read_buf(&mut answer))
                .await
                .unwrap()
                .unwrap(),
            0
        );
    }

    #[tokio::test]
    async fn a_head_that_never_ends_and_a_client_that_reads_nothing_are_cut() {
        let server = start_with(Readiness::Ready, |http| {
            http.header_timeout = Duration::from_millis(100);
            http.write_timeout = Duration::from_millis(100);
        })
        .await;
        let mut slow = TcpStream::connect(server.addr).await.unwrap();
        slow.write_all(b"GET /healthz HTTP/1.1\r\nhost: ")
            .await
            .unwrap();
        let mut answer = Vec::new();
        let cut = timeout(DEADLINE, slow.read_to_end(&mut answer)).await;
        assert!(cut.is_ok(), "the connection ends");

        // Asks for more than sockets hold, and reads none of it.
        server
            .registry
            .counter("flowgate_long_total", &"x".repeat(1 << 20), &[]);
        let mut deaf = TcpStream::connect(server.addr).await.unwrap();
        let pipelined = "GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n".repeat(50);
        deaf.write_all(pipelined.as_bytes()).await.unwrap();
        let told = "flowgate_http_connections_cut_total 1";
        let cut = async {
            while !server.registry.render().lines().any(|line| line == told) {
                tokio::task::yield_now().await;
            }
        };
        timeout(DEADLINE, cut).await.expect("a cut");
    }
}
