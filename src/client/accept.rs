//! The TCP accept loop of one data-plane thread: a task a client. Never blocks on a client, never lets a failing accept
//! spin. Called by `app.rs`, once a thread, each with its own SO_REUSEPORT socket.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use socket2::{SockFilter, SockRef};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tracing::{debug, warn};

use super::live::{Running, Standing};
use super::shared::Shared;
use super::startup;

/// Out of descriptors, most likely: others must end before the next accept can succeed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
const BACKLOG: i32 = 1024;
/// How long the last step of a handshake may take when a socket is closed that others share the port of.
const HANDSHAKE: Duration = Duration::from_millis(200);

/// A listening socket; a `shared` one shares its address with those of other threads, or processes. Another process that
/// listens there is found out by an unshared one.
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

/// Serves clients until a shutdown begins, then those that are there until the last one has left.
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
    let shared_port = shared.live().config.listen.reuse_port;
    if let Err(error) = hand_over(listener, shared_port, &mut clients, &shared).await {
        warn!(%error, "connections that were waiting to be accepted may be lost");
    }
    while let Some(ended) = clients.join_next().await {
        note_panic(ended);
    }
    Ok(())
}

/// Closes a listening socket without losing who has knocked already: closing it resets whoever is in its queue. Where another
/// process listens on the same port, the kernel must first stop sending new clients here. It has no word for that, but a
/// filter that drops connection requests (SYN) comes to the same: who is dropped asks again after a second, and is sent to a
/// socket that is still there. (tcp(7); net.ipv4.tcp_migrate_req, where it is on, does it without the second)
async fn hand_over(
    listener: TcpListener,
    shared_port: bool,
    clients: &mut JoinSet<()>,
    shared: &Arc<Shared>,
) -> io::Result<()> {
    let filtered = if shared_port {
        refuse_requests(&listener)
    } else {
        Ok(())
    };
    let quiet = if shared_port {
        HANDSHAKE
    } else {
        Duration::ZERO
    };
    // Whose handshake was under way comes yet; the last one that came is waited for no longer than the first.
    let deadline = Instant::now() + 10 * HANDSHAKE;
    while Instant::now() < deadline {
        match timeout(quiet, listener.accept()).await {
            Ok(Ok((tcp, peer))) => {
                drop(clients.spawn(welcome(tcp, peer, Arc::clone(shared))));
            }
            Ok(Err(error)) => debug!(%error, "accept failed"),
            Err(_nobody) => break,
        }
    }
    filtered
}

/// Drops every segment with SYN and without ACK that comes for this socket; handshakes under way go on.
fn refuse_requests(listener: &TcpListener) -> io::Result<()> {
    // Classic BPF over the TCP header: load the flags, keep SYN and ACK, drop if SYN alone is left.
    const LOAD_BYTE: u16 = 0x30;
    const AND: u16 = 0x54;
    const JUMP_IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const FLAGS_AT: u32 = 13;
    let program = [
        SockFilter::new(LOAD_BYTE, 0, 0, FLAGS_AT),
        SockFilter::new(AND, 0, 0, 0x12),
        SockFilter::new(JUMP_IF_EQUAL, 0, 1, 0x02),
        SockFilter::new(RETURN, 0, 0, 0),
        SockFilter::new(RETURN, 0, 0, u32::MAX),
    ];
    SockRef::from(listener).attach_filter(&program)
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
    startup::run(tcp, peer, shared).await;
}

fn prepare(tcp: &TcpStream) -> io::Result<()> {
    tcp.set_nodelay(true)?;
    let keep_alive = socket2::TcpKeepalive::new().with_time(Duration::from_secs(60));
    SockRef::from(tcp).set_tcp_keepalive(&keep_alive)
}

fn note_panic(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "bug: a client's task panicked; its connections are closed");
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    #[tokio::test]
    async fn who_knocks_at_a_closing_socket_is_let_in_by_the_other() {
        const CLIENTS: usize = 24;
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        let closing = bind(loopback, true).unwrap();
        let address = closing.local_addr().unwrap();
        let staying = TcpListener::from_std(bind(address, true).unwrap()).unwrap();
        let closing = TcpListener::from_std(closing).unwrap();
        refuse_requests(&closing).unwrap();
        // The kernel deals them to either, so about half of them knock at the wrong door first.
        let mut clients = JoinSet::new();
        for _ in 0..CLIENTS {
            clients.spawn(async move {
                let mut tcp = TcpStream::connect(address).await?;
                tcp.read_u8().await
            });
        }
        let mut served = Vec::new();
        let serve = async |served: &mut Vec<TcpStream>| {
            let (mut tcp, _) = staying.accept().await.unwrap();
            tcp.write_u8(7).await.unwrap();
            served.push(tcp);
        };
        serve(&mut served).await;
        tokio::task::yield_now().await;
        assert!(
            timeout(Duration::ZERO, closing.accept()).await.is_err(),
            "nobody got in here"
        );
        drop(closing);
        while served.len() < CLIENTS {
            serve(&mut served).await;
        }
        while let Some(client) = clients.join_next().await {
            assert_eq!(client.unwrap().unwrap(), 7);
        }
    }
}
