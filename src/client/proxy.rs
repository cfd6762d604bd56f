//! Reads the PROXY header a balancer sends ahead of a client's bytes, and not one byte more: a TLS handshake may follow. Believes
//! only those it is told to. Called by `startup.rs` where `listen.proxy_protocol` requires a header; how long it may take is
//! that one's to say. (`wire/proxy_header.rs` reads what is read here)

use std::io;
use std::net::SocketAddr;

use thiserror::Error;
use tokio::io::AsyncReadExt;
use tokio::net::TcpStream;

use crate::config::Cidr;
use crate::wire::proxy_header::{
    self, ADDRESSES_MAX, BEGINNING, HEAD, LINE_MAX, Malformed, Source, Version,
};

#[derive(Debug, Error)]
pub(crate) enum ProxyError {
    #[error("it is none of listen.proxy_protocol_from")]
    Untrusted,
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("no whole PROXY header: {0}")]
    Io(#[from] io::Error),
}

/// Who the client behind `peer` is.
pub(super) async fn client_behind(
    tcp: &mut TcpStream,
    peer: SocketAddr,
    trusted: &[Cidr],
) -> Result<SocketAddr, ProxyError> {
    if !trusted.iter().any(|range| range.contains(peer.ip())) {
        return Err(ProxyError::Untrusted);
    }
    match read(tcp).await? {
        Source::Itself => Ok(peer),
        Source::Client(address) => Ok(address),
    }
}

async fn read(tcp: &mut TcpStream) -> Result<Source, ProxyError> {
    let mut line = [0; LINE_MAX];
    let mut have = 0;
    let version = loop {
        let count = tcp.read(&mut line[have..BEGINNING]).await?;
        if count == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        have += count;
        // Nobody who will not send a header is waited for.
        let version = proxy_header::version(&line[..have])?;
        if have == BEGINNING {
            break version.ok_or(Malformed)?;
        }
    };
    match version {
        Version::Line => read_line(tcp, line, have).await,
        Version::Binary => {
            let mut head = [0; HEAD];
            head[..have].copy_from_slice(&line[..have]);
            tcp.read_exact(&mut head[have..]).await?;
            read_binary(tcp, &head).await
        }
    }
}

async fn read_line(
    tcp: &mut TcpStream,
    mut line: [u8; LINE_MAX],
    mut have: usize,
) -> Result<Source, ProxyError> {
    while have < LINE_MAX {
        // Looked at first: what follows the line is not ours to take.
        let seen = tcp.peek(&mut line[have..]).await?;
        if seen == 0 {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        let end = memchr::memchr(b'\n', &line[have..have + seen]);
        let take = end.map_or(seen, |at| at + 1);
        tcp.read_exact(&mut line[have..have + take]).await?;
        have += take;
        if end.is_some() {
            return Ok(proxy_header::read_line(&line[..have])?);
        }
    }
    Err(Malformed.into())
}

async fn read_binary(tcp: &mut TcpStream, head: &[u8; HEAD]) -> Result<Source, ProxyError> {
    let rest = proxy_header::rest_len(head)?;
    let mut addresses = [0; ADDRESSES_MAX];
    let kept = rest.min(ADDRESSES_MAX);
    tcp.read_exact(&mut addresses[..kept]).await?;
    // Type-length-values say things we have no use for.
    let mut left = rest - kept;
    let mut skipped = [0; 256];
    while left > 0 {
        let part = left.min(skipped.len());
        tcp.read_exact(&mut skipped[..part]).await?;
        left -= part;
    }
    Ok(proxy_header::read_binary(head, &addresses[..kept])?)
}
