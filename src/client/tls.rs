//! TLS towards clients: our certificate from files, client certificates if asked for, ALPN `postgresql` for direct TLS.
//! (protocol-flow.html#PROTOCOL-FLOW-SSL)

use std::io;
use std::path::Path;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use tokio::net::TcpStream;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::config::{ClientTls, Listen};
use crate::wire::certificate::end_point;

/// The protocol name of direct TLS.
const ALPN: &[u8] = b"postgresql";

/// What we show to clients.
pub(crate) struct Certificate {
    acceptor: TlsAcceptor,
    /// What a login is bound to over connections made with it; `None`: it cannot be.
    pub(super) end_point: Option<Arc<[u8]>>,
}

impl Certificate {
    pub(super) async fn accept(&self, tcp: TcpStream) -> io::Result<TlsStream<TcpStream>> {
        self.acceptor.accept(tcp).await
    }
}

/// The certificate `listen` asks for; `None` when TLS is off. `from_everybody`: where there are authorities for client
/// certificates, nobody gets in without one.
pub(crate) fn certificate(
    listen: &Listen,
    from_everybody: bool,
) -> io::Result<Option<Certificate>> {
    let (Some(cert), Some(key)) = (&listen.tls_cert, &listen.tls_key) else {
        return Ok(None);
    };
    if listen.tls == ClientTls::Off {
        return Ok(None);
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let chain = read_chain(cert)?;
    let bound_to = chain.first().and_then(|first| end_point(first));
    let key = PrivateKeyDer::from_pem_file(key).map_err(|error| unreadable(key, error))?;
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(io::Error::other)?;
    let builder = match &listen.tls_client_ca {
        None => builder.with_no_client_auth(),
        Some(path) => {
            let mut roots = RootCertStore::empty();
            for certificate in read_chain(path)? {
                roots.add(certificate).map_err(io::Error::other)?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            let verifier = if from_everybody {
                verifier
            } else {
                verifier.allow_unauthenticated()
            };
            builder.with_client_cert_verifier(verifier.build().map_err(io::Error::other)?)
        }
    };
    let mut config = builder
        .with_single_cert(chain, key)
        .map_err(io::Error::other)?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok(Some(Certificate {
        acceptor: TlsAcceptor::from(Arc::new(config)),
        end_point: bound_to.map(Arc::from),
    }))
}

fn read_chain(path: &Path) -> io::Result<Vec<CertificateDer<'static>>> {
    CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect)
        .map_err(|error| unreadable(path, error))
}

fn unreadable(path: &Path, error: rustls::pki_types::pem::Error) -> io::Error {
    io::Error::other(format!("{}: {error}", path.display()))
}
