//! How a stream gets the socket that hyper reads requests from: hyper has it on loan, and loses it when a response is a stream
//! (`streams.rs`). Then its connection ends without a word, and the stream goes on in a task of its own. Called by `mod.rs`.
//!
//! Why: hyper keeps 8 KB to write and as much to read for each connection, and writes what a body gives it piece by piece.
//! Nothing that was asked before on the same connection is lost: a stream waits until its answer is written. What was sent
//! behind the request for a stream would have waited for its end, which is the connection's.

use std::convert::Infallible;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::SystemTime;

use axum::Router;
use axum::body::Body;
use axum::http::{Method, Version, header};
use axum::response::Response;
use hyper::Request;
use hyper::body::Incoming;
use hyper::service::{Service, service_fn};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tracing::debug;

use super::seats::Seated;
use super::streams::{Begun, Stream};

#[derive(Debug, thiserror::Error)]
#[error("a stream has the connection")]
struct Taken;

impl From<Infallible> for Taken {
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

struct Lending {
    /// `None`: a stream has it.
    seated: Option<Seated>,
    /// Hyper has begun to write and has not said that it is done.
    unflushed: bool,
    waiting: Option<Waker>,
}

/// Hyper's.
pub(super) struct Lent(Arc<Mutex<Lending>>);

/// Ours.
#[derive(Clone)]
pub(super) struct Lender(Arc<Mutex<Lending>>);

pub(super) fn lend(seated: Seated) -> (Lent, Lender) {
    let lending = Arc::new(Mutex::new(Lending {
        seated: Some(seated),
        unflushed: false,
        waiting: None,
    }));
    (Lent(Arc::clone(&lending)), Lender(lending))
}

/// The router's answers, but for streams.
pub(super) fn service(
    router: Router,
    lender: Lender,
) -> impl Service<
    Request<Incoming>,
    Response = Response,
    Error = impl std::error::Error + Send + Sync,
    Future = impl Future + Send,
> {
    let router = TowerToHyperService::new(router);
    service_fn(move |request: Request<Incoming>| {
        let lender = lender.clone();
        let only_head = request.method() == Method::HEAD;
        let chunked = request.version() >= Version::HTTP_11;
        let answer = router.call(request);
        async move {
            let response: Response<Body> = answer.await?;
            let begun = response.extensions().get::<Begun>();
            match begun.and_then(Begun::take).filter(|_| !only_head) {
                None => Ok(response),
                Some(stream) => {
                    let head = head(&response, chunked);
                    drop(response);
                    lender.give_to(stream, head, chunked).await;
                    Err(Taken)
                }
            }
        }
    })
}

impl Lender {
    pub(super) fn is_taken(&self) -> bool {
        lock(&self.0).seated.is_none()
    }

    async fn give_to(&self, stream: Box<Stream>, head: Vec<u8>, chunked: bool) {
        let Some(seated) = poll_fn(|cx| self.poll_take(cx)).await else {
            return;
        };
        // It ends when we go, and its seat is waited for (`Seats::vacated`).
        tokio::spawn(async move {
            if let Err(error) = stream.pour(seated, head, chunked).await {
                debug!(%error, "event stream");
            }
        });
    }

    fn poll_take(&self, cx: &mut Context<'_>) -> Poll<Option<Seated>> {
        let mut lending = lock(&self.0);
        if lending.unflushed {
            lending.waiting = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(lending.seated.take())
    }
}

fn head(response: &Response, chunked: bool) -> Vec<u8> {
    let status = response.status();
    let reason = status.canonical_reason().unwrap_or_default();
    let mut head = format!("HTTP/1.1 {} {reason}\r\n", status.as_str()).into_bytes();
    // How long it is and what comes after is ours to say: a length beside chunks is two answers in one.
    let ours = [
        header::CONNECTION,
        header::CONTENT_LENGTH,
        header::TRANSFER_ENCODING,
    ];
    let headers = response.headers().iter();
    for (name, value) in headers.filter(|(name, _)| !ours.contains(name)) {
        for word in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
            head.extend_from_slice(word);
        }
    }
    let date = httpdate::fmt_http_date(SystemTime::now());
    let framing = if chunked {
        "transfer-encoding: chunked\r\n"
    } else {
        ""
    };
    head.extend_from_slice(
        format!("connection: close\r\n{framing}date: {date}\r\n\r\n").as_bytes(),
    );
    head
}

impl Lent {
    fn with<T>(
        &self,
        act: impl FnOnce(Pin<&mut Seated>) -> Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        match &mut lock(&self.0).seated {
            Some(seated) => act(Pin::new(seated)),
            None => Poll::Ready(Err(io::ErrorKind::NotConnected.into())),
        }
    }
}

/// Nothing in there panics half-way.
fn lock(lending: &Mutex<Lending>) -> MutexGuard<'_, Lending> {
    lending.lock().unwrap_or_else(PoisonError::into_inner)
}

impl AsyncRead for Lent {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.with(|seated| seated.poll_read(cx, buffer))
    }
}

impl AsyncWrite for Lent {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        lock(&self.0).unflushed = true;
        self.with(|seated| seated.poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        lock(&self.0).unflushed = true;
        self.with(|seated| seated.poll_write_vectored(cx, slices))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// Hyper does so when it has written all it had.
    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut lending = lock(&self.0);
        lending.unflushed = false;
        if let Some(waker) = lending.waiting.take() {
            waker.wake();
        }
        drop(lending);
        self.with(|seated| seated.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.with(|seated| seated.poll_shutdown(cx))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_head_frames_its_stream_once() {
        let response = Response::builder()
            .header("content-length", "0")
            .header("connection", "keep-alive")
            .header("transfer-encoding", "gzip")
            .header("x-own", "kept")
            .body(Body::empty())
            .unwrap();
        for (chunked, framing) in [(true, "transfer-encoding: chunked\r\n"), (false, "")] {
            let head = String::from_utf8(head(&response, chunked)).unwrap();
            let start =
                format!("HTTP/1.1 200 OK\r\nx-own: kept\r\nconnection: close\r\n{framing}date: ");
            assert!(head.starts_with(&start), "{head}");
            assert!(head.ends_with(" GMT\r\n\r\n"), "{head}");
        }
    }
}
