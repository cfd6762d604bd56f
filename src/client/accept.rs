//! The TCP accept loop of one data-plane thread: a task a client. Never blocks on a client, never lets a failing accept
//! spin. Called by `app.rs`, once a thread, each with its own SO_REUSEPORT socket.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{debug, warn};

use super::live::{Running, Standing};
use super::shared::Shared;
use super::startup;

/// Out of descriptors, most likely: others must end before the next accept can succeed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
const BACKLOG: i32 = 1024;

/// A listening socket; a `shared` one shares its address with those of the other threads. Another process that listens
/// there is found out by the first, unshared one.
pub(crate) fn bind(address: SocketAddr, shared: bool) -> io::Result<std::net::TcpListener> {
    let domain = socket2::Domain::for_address(address);
    let socket = socket2::Socket::new(domain, socket2::Type::STREAM, Some(socket2::Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(shared)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Serves clients until a shutdown begins, then until the last one has left.
pub(crate) async fn serve(listener: std::net::TcpListener, shared: Arc<Shared>) -> io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    let mut clients = JoinSet::new();
    let mut standing = shared.standing.clone();
    loop {
        tokio::select! {
            biased;
            () = closing(&mut standing) => break,
            accepted = listener.accept() => match accepted {
                Ok((tcp, peer)) => {
                    drop(clients.spawn(welcome(tcp, peer, Arc::clone(&shared))));
                }
                Err(error) => {
                    warn!(%error, "accept failed");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            },
            Some(ended) = clients.join_next(), if !clients.is_empty() => note_panic(ended),
        }
    }
    drop(listener);
    while let Some(ended) = clients.join_next().await {
        note_panic(ended);
    }
    Ok(())
}

async fn closing(standing: &mut watch::Receiver<Standing>) {
    let told = standing.wait_for(|standing| standing.running > Running::Serving);
    // An error means that the sender is gone, and the process with it.
    drop(told.await);
}

async fn welcome(tcp: TcpStream, peer: SocketAddr, shared: Arc<Shared>) {
    if let Err(error) = prepare(&tcp) {
        debug!(%peer, %error, "client left before it was heard");
        return;
    }
    Box::pin(startup::run(tcp, peer, shared)).await;
}

fn prepare(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    let keep_alive = socket2::TcpKeepalive::new().with_time(Duration::from_secs(60));
    socket2::SockRef::from(tcp).set_tcp_keepalive(&keep_alive)
}

fn note_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "bug: a client's task panicked; its connections are closed");
    }
}
