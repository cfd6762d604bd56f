//! The HTTP plane: whether we live, whether we can serve, and our numbers. Never touches a client's or server's socket of
//! the data plane. Started by `app.rs` with the socket it bound.

mod seats;

use std::io;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::watch;

use crate::metrics::Registry;
use seats::Seats;

/// What the routes read; handles, cheap to clone.
#[derive(Clone)]
pub struct HttpState {
    pub registry: Arc<Registry>,
    pub ready: watch::Receiver<Readiness>,
}

/// Whether traffic should be sent here: what `/readyz` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    Ready,
    /// With the reason, for whoever asks.
    NotReady(String),
}

/// Serves until `shutdown` resolves, then lets requests under way end. How long that may take is the caller's to bound.
/// No more than `connections_max` connections are served at once.
pub async fn serve(
    listener: TcpListener,
    connections_max: usize,
    state: HttpState,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let seats = Seats::new(listener, connections_max, &state.registry);
    axum::serve(seats, router(state))
        .with_graceful_shutdown(shutdown)
        .await
}

fn router(state: HttpState) -> Router {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(state)
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
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;
    use tokio::sync::oneshot;
    use tokio::task::JoinHandle;
    use tokio::time::timeout;

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
        start_with(readiness, 100).await
    }

    async fn start_with(readiness: Readiness, connections_max: usize) -> Server {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let registry = Arc::new(Registry::new());
        let (ready, receiver) = watch::channel(readiness);
        let (stop, stopped) = oneshot::channel();
        let state = HttpState {
            registry: registry.clone(),
            ready: receiver,
        };
        let shutdown = async { drop(stopped.await) };
        Server {
            addr,
            registry,
            ready,
            stop,
            task: tokio::spawn(serve(listener, connections_max, state, shutdown)),
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
    async fn what_is_not_there_is_refused() {
        let server = start(Readiness::Ready).await;
        let answer = ask(server.addr, "GET /nothing").await;
        assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
        let answer = ask(server.addr, "POST /metrics").await;
        assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
    }

    #[tokio::test]
    async fn beyond_the_limit_a_connection_is_refused_in_words_until_one_ends() {
        let server = start_with(Readiness::Ready, 1).await;
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
}
