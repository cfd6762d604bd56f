//! Takes HTTP connections, `http.max_connections` of them at once, tells those beyond that it is full, and cuts who reads
//! nothing of what waits for it. Reads nothing of a request. Called by `mod.rs`.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::serve::Listener;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Sleep, sleep, timeout};

use crate::metrics::{Counter, Gauge, Registry};

/// Clients that are being told that there is no room; more are closed without a word.
const REFUSALS: usize = 64;
/// How long telling one may take.
const REFUSAL_MAX: Duration = Duration::from_secs(2);
/// Of a refused client's request, what is read so that the refusal arrives: a socket closed with bytes unread takes back what
/// was written to it.
const DRAINED_MAX: u64 = 64 * 1024;

pub(super) struct Seats {
    listener: TcpListener,
    places: usize,
    free: Arc<Semaphore>,
    refusals: Arc<Semaphore>,
    write_timeout: Duration,
    taken: Arc<Gauge>,
    refused: Arc<Counter>,
    cut: Arc<Counter>,
}

impl Seats {
    pub(super) fn new(
        listener: TcpListener,
        places: usize,
        write_timeout: Duration,
        registry: &Registry,
    ) -> Self {
        let (taken, refused, cut) = (
            registry.gauge("flowgate_http_connections", "HTTP connections open", &[]),
            registry.counter(
                "flowgate_http_connections_refused_total",
                "HTTP connections refused because http.max_connections were open",
                &[],
            ),
            registry.counter(
                "flowgate_http_connections_cut_total",
                "HTTP connections cut because the client read nothing for http.write_timeout",
                &[],
            ),
        );
        Self {
            listener,
            places,
            free: Arc::new(Semaphore::new(places)),
            refusals: Arc::new(Semaphore::new(REFUSALS)),
            write_timeout,
            taken,
            refused,
            cut,
        }
    }

    /// Resolves when every connection is gone, those that became sockets too; for once no more are taken.
    pub(super) fn vacated(&self) -> impl Future<Output = ()> + use<> {
        let (free, places) = (Arc::clone(&self.free), self.places);
        async move {
            let places = u32::try_from(places).unwrap_or(u32::MAX);
            drop(free.acquire_many_owned(places).await);
        }
    }

    fn refuse(&self, stream: TcpStream) {
        self.refused.inc();
        let Ok(permit) = Arc::clone(&self.refusals).try_acquire_owned() else {
            return;
        };
        let words = format!(
            "too many connections: http.max_connections is {}\n",
            self.places
        );
        // Its own end is near and known, so nobody waits for it.
        tokio::spawn(async move {
            drop(timeout(REFUSAL_MAX, tell(stream, &words)).await);
            drop(permit);
        });
    }
}

async fn tell(mut stream: TcpStream, words: &str) -> io::Result<()> {
    let answer = format!(
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: text/plain; charset=utf-8\r\nretry-after: 1\r\n\
         connection: close\r\ncontent-length: {}\r\n\r\n{words}",
        words.len()
    );
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await?;
    let mut rest = stream.take(DRAINED_MAX);
    tokio::io::copy(&mut rest, &mut tokio::io::sink()).await?;
    Ok(())
}

impl Listener for Seats {
    type Io = Seated;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Seated, SocketAddr) {
        loop {
            let (stream, address) = Listener::accept(&mut self.listener).await;
            match Arc::clone(&self.free).try_acquire_owned() {
                Ok(permit) => {
                    self.taken.add(1);
                    let taken = Arc::clone(&self.taken);
                    let seat = Seat {
                        taken,
                        _permit: permit,
                    };
                    // Events are small and must not wait for one another.
                    drop(stream.set_nodelay(true));
                    let seated = Seated {
                        stream,
                        patience: self.write_timeout,
                        stalled: None,
                        cut: Arc::clone(&self.cut),
                        _seat: seat,
                    };
                    return (seated, address);
                }
                Err(_full) => self.refuse(stream),
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// One connection's place; dropping it frees it.
struct Seat {
    taken: Arc<Gauge>,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.taken.sub(1);
    }
}

/// A connection in its seat.
pub(super) struct Seated {
    stream: TcpStream,
    patience: Duration,
    /// While bytes wait that the client does not take.
    stalled: Option<Pin<Box<Sleep>>>,
    cut: Arc<Counter>,
    _seat: Seat,
}

impl Seated {
    fn judge<T>(
        &mut self,
        written: Poll<io::Result<T>>,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let patience = self.patience;
        let stalled = self
            .stalled
            .get_or_insert_with(|| Box::pin(sleep(patience)));
        if stalled.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        self.stalled = None;
        self.cut.inc();
        Poll::Ready(Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Seated {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Seated {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.judge(written, cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, slices);
        self.judge(written, cx)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
