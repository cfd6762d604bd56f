//! A socket, plain or TLS, with the read buffer and the unsent bytes that belong to it. Knows bytes, not messages.
//! Both sides of a relay are polled from one task, so everything here is a `poll_…` with an async face.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;

use super::buffer::ReadBuffer;
use super::frame::Header;

/// What carries the bytes.
pub(crate) enum Transport {
    Plain(TcpStream),
    TlsServer(Box<tokio_rustls::server::TlsStream<TcpStream>>),
    TlsClient(Box<tokio_rustls::client::TlsStream<TcpStream>>),
    /// In the hands of a TLS handshake.
    Gone,
}

impl Transport {
    /// The socket under it all.
    pub(crate) fn tcp(&self) -> Option<&TcpStream> {
        match self {
            Self::Plain(tcp) => Some(tcp),
            Self::TlsServer(tls) => Some(tls.get_ref().0),
            Self::TlsClient(tls) => Some(tls.get_ref().0),
            Self::Gone => None,
        }
    }

    /// The certificate the other side showed, in DER; none without TLS, or where none was asked for.
    pub(crate) fn peer_certificate(&self) -> Option<&[u8]> {
        let shown = match self {
            Self::Plain(_) | Self::Gone => None,
            Self::TlsServer(tls) => tls.get_ref().1.peer_certificates(),
            Self::TlsClient(tls) => tls.get_ref().1.peer_certificates(),
        };
        shown?.first().map(AsRef::as_ref)
    }

    /// Version and cipher, `TLSv1.3/TLS_AES_256_GCM_SHA384`; empty without TLS.
    pub(crate) fn tls_words(&self) -> String {
        let (version, suite) = match self {
            Self::TlsServer(tls) => {
                let session = tls.get_ref().1;
                (
                    session.protocol_version(),
                    session.negotiated_cipher_suite(),
                )
            }
            Self::TlsClient(tls) => {
                let session = tls.get_ref().1;
                (
                    session.protocol_version(),
                    session.negotiated_cipher_suite(),
                )
            }
            Self::Plain(_) | Self::Gone => return String::new(),
        };
        let version = version.map(|version| format!("{version:?}").replace('_', "."));
        let suite = suite.map(|suite| format!("{:?}", suite.suite()).replace("TLS13_", "TLS_"));
        format!(
            "{}/{}",
            version.unwrap_or_default(),
            suite.unwrap_or_default()
        )
    }

    fn poll_read(&mut self, cx: &mut Context<'_>, room: &mut [u8]) -> Poll<io::Result<usize>> {
        let mut buffer = ReadBuf::new(room);
        ready!(match self {
            Self::Plain(tcp) => Pin::new(tcp).poll_read(cx, &mut buffer),
            Self::TlsServer(tls) => Pin::new(tls.as_mut()).poll_read(cx, &mut buffer),
            Self::TlsClient(tls) => Pin::new(tls.as_mut()).poll_read(cx, &mut buffer),
            Self::Gone => Poll::Ready(Ok(())),
        })?;
        Poll::Ready(Ok(buffer.filled().len()))
    }

    fn poll_write(&mut self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self {
            Self::Plain(tcp) => Pin::new(tcp).poll_write(cx, bytes),
            Self::TlsServer(tls) => Pin::new(tls.as_mut()).poll_write(cx, bytes),
            Self::TlsClient(tls) => Pin::new(tls.as_mut()).poll_write(cx, bytes),
            Self::Gone => Poll::Ready(Ok(0)),
        }
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self {
            Self::Plain(_) | Self::Gone => Poll::Ready(Ok(())),
            Self::TlsServer(tls) => Pin::new(tls.as_mut()).poll_flush(cx),
            Self::TlsClient(tls) => Pin::new(tls.as_mut()).poll_flush(cx),
        }
    }
}

/// A transport and its bytes in hand.
pub(crate) struct Stream {
    transport: Transport,
    pub(crate) input: ReadBuffer,
    /// Bytes to be sent before anything else. Bounded by who fills it: one synthesised answer, or one prefix.
    pub(crate) output: Vec<u8>,
    /// How much of `output` has been written.
    written: usize,
    /// Bytes read and written so far, as the protocol has them.
    pub(crate) received: u64,
    pub(crate) sent: u64,
    /// The other side has sent its last byte.
    pub(crate) at_eof: bool,
    /// TLS records may still be with us.
    unflushed: bool,
}

/// A kept `output` larger than this is given back once sent.
const OUTPUT_KEPT_MAX: usize = 16 * 1024;

impl Stream {
    pub(crate) fn new(transport: Transport) -> Self {
        Self {
            transport,
            input: ReadBuffer::default(),
            output: Vec::new(),
            written: 0,
            received: 0,
            sent: 0,
            at_eof: false,
            unflushed: false,
        }
    }

    /// What was needed to log in is not needed any more.
    pub(crate) fn rest(&mut self) {
        if self.output.is_empty() {
            self.output = Vec::new();
        }
    }

    pub(crate) fn into_transport(self) -> Transport {
        self.transport
    }

    pub(crate) fn transport(&self) -> &Transport {
        &self.transport
    }

    /// Reads once into `input`, making room for a frame of `whole` bytes. `Ok(0)` is the end of the stream.
    pub(crate) fn poll_fill(
        &mut self,
        cx: &mut Context<'_>,
        whole: usize,
    ) -> Poll<io::Result<usize>> {
        let was_resting = self.input.is_empty();
        let read = self.transport.poll_read(cx, self.input.room(whole));
        match &read {
            Poll::Ready(Ok(0)) => self.at_eof = true,
            Poll::Ready(Ok(count)) => {
                self.received += *count as u64;
                self.input.advance(*count);
            }
            Poll::Ready(Err(_)) => {}
            Poll::Pending if was_resting => self.input.rest(),
            Poll::Pending => {}
        }
        read
    }

    pub(crate) async fn fill(&mut self, whole: usize) -> io::Result<usize> {
        poll_fn(|cx| self.poll_fill(cx, whole)).await
    }

    /// Reads until a whole frame is at the front of `input` and returns its header; the end of the stream is
    /// `UnexpectedEof`. For logins and our own little questions, where frames are small: more than `longest` is refused.
    pub(crate) async fn next_frame(&mut self, longest: usize) -> io::Result<Header> {
        loop {
            let bytes = self.input.bytes();
            let header = Header::peek(bytes);
            if header.is_none() && bytes.len() >= super::frame::HEADER
                || header.is_some_and(|h| h.whole > longest)
            {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "invalid message length",
                ));
            }
            match header {
                Some(header) if bytes.len() >= header.whole => return Ok(header),
                _ => {}
            }
            if self.fill(header.map_or(1, |header| header.whole)).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    /// Writes what it can of `bytes`, after all of `output`. `Ready(n)`: n bytes of `bytes` are on their way.
    pub(crate) fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_drain(cx))?;
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        match ready!(self.transport.poll_write(cx, bytes))? {
            0 => Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
            count => {
                self.unflushed = !matches!(self.transport, Transport::Plain(_));
                self.sent += count as u64;
                Poll::Ready(Ok(count))
            }
        }
    }

    /// Writes all of `output`.
    pub(crate) fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(rest @ [_, ..]) = self.output.get(self.written..) {
            match ready!(self.transport.poll_write(cx, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                count => {
                    self.unflushed = !matches!(self.transport, Transport::Plain(_));
                    self.written += count;
                    self.sent += count as u64;
                }
            }
        }
        self.written = 0;
        self.output.clear();
        if self.output.capacity() > OUTPUT_KEPT_MAX {
            self.output = Vec::new();
        }
        Poll::Ready(Ok(()))
    }

    /// Pushes TLS records out; plain sockets have nothing to push. Pending, it must be called again: see `is_flushed`.
    pub(crate) fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.unflushed {
            ready!(self.transport.poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    /// All that was sent has left.
    pub(crate) fn is_flushed(&self) -> bool {
        self.output.is_empty() && !self.unflushed
    }

    /// Sends `output`, and makes sure it left. Cancel-safe: what was not written stays in `output`.
    pub(crate) async fn flush(&mut self) -> io::Result<()> {
        poll_fn(|cx| {
            ready!(self.poll_drain(cx))?;
            self.poll_flush(cx)
        })
        .await
    }

    /// Says that no more will come, so that what was sent is read before the connection is found closed.
    pub(crate) async fn close(&mut self) {
        // A peer that is gone already needs no goodbye.
        drop(poll_fn(|cx| self.poll_close(cx)).await);
    }

    /// The same; the other side may go on sending.
    pub(crate) fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.transport {
            Transport::Plain(tcp) => Pin::new(tcp).poll_shutdown(cx),
            Transport::TlsServer(tls) => Pin::new(tls.as_mut()).poll_shutdown(cx),
            Transport::TlsClient(tls) => Pin::new(tls.as_mut()).poll_shutdown(cx),
            Transport::Gone => Poll::Ready(Ok(())),
        }
    }
}
