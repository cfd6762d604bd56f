//! A configured Postgres: its name, its role, its health and lag as last seen; and how we call on it as an ordinary
//! client. Decides nothing: `pool/probe.rs` writes what it sees here, routing, metrics and the console read it.
//! `dial` is the one place where a control-plane connection (events, probes, SQL) is opened.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use rustls::ClientConfig;
use rustls::RootCertStore;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, SignatureScheme};
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres::{Client, Connection, Socket};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::config::{ConnectUrl, SslMode};

/// What a configured Postgres is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Role {
    Primary,
    Replica,
}

/// A configured Postgres and what was last seen of it.
#[derive(Debug)]
pub(crate) struct Upstream {
    pub(crate) name: String,
    pub(crate) role: Role,
    pub(crate) url: ConnectUrl,
    healthy: AtomicBool,
    /// Primary: insert position. Replica: replayed position. 0: never seen.
    lsn: AtomicU64,
    lag_bytes: AtomicU64,
}

impl Upstream {
    pub(crate) fn new(name: impl Into<String>, role: Role, url: ConnectUrl) -> Self {
        let name = name.into();
        Self {
            name,
            role,
            url,
            healthy: AtomicBool::new(false),
            lsn: AtomicU64::new(0),
            lag_bytes: AtomicU64::new(0),
        }
    }

    /// In rotation: reachable, in the role it is configured for, and of the primary's history.
    pub(crate) fn is_healthy(&self) -> bool {
        self.healthy.load(Ordering::Acquire)
    }

    /// Returns what it was before, so that a transition is logged once.
    pub(crate) fn set_healthy(&self, healthy: bool) -> bool {
        self.healthy.swap(healthy, Ordering::AcqRel)
    }

    pub(crate) fn lsn(&self) -> u64 {
        self.lsn.load(Ordering::Relaxed)
    }

    pub(crate) fn set_lsn(&self, lsn: u64) {
        self.lsn.store(lsn, Ordering::Relaxed);
    }

    /// WAL bytes a replica has yet to replay, as last seen.
    pub(crate) fn lag_bytes(&self) -> u64 {
        self.lag_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn set_lag_bytes(&self, bytes: u64) {
        self.lag_bytes.store(bytes, Ordering::Relaxed);
    }
}

/// The socket half of a control connection; whoever dials drives it.
pub(crate) type ControlConnection =
    Connection<Socket, <MakeRustlsConnect as MakeTlsConnect<Socket>>::Stream>;

#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    #[error("no connection within {0:?}")]
    Timeout(Duration),
    #[error(transparent)]
    Postgres(#[from] tokio_postgres::Error),
    #[error("root certificates: {0}")]
    Roots(String),
}

impl DialError {
    /// Postgres answered and will answer the same next time (wrong password, no such database): waiting won't help.
    pub(crate) fn is_final(&self) -> bool {
        match self {
            Self::Postgres(error) => error
                .code()
                .is_some_and(|code| !matches!(&code.code()[..2], "57" | "53" | "08")),
            Self::Roots(_) => true,
            Self::Timeout(_) => false,
        }
    }
}

/// tokio-postgres says "db error" and keeps Postgres' own words as its source.
pub(crate) fn words(error: &dyn std::error::Error) -> String {
    std::iter::successors(error.source(), |cause| cause.source())
        .fold(error.to_string(), |words, cause| {
            words + ": " + &cause.to_string()
        })
}

/// Opens a connection as the control role.
pub(crate) async fn dial(
    url: &ConnectUrl,
    application: &str,
    wait: Duration,
) -> Result<(Client, ControlConnection), DialError> {
    let tls = MakeRustlsConnect::new(tls_config(url)?);
    let mut config = tokio_postgres::Config::new();
    config
        .host(&url.host)
        .port(url.port)
        .user(&url.user)
        .dbname(&url.database)
        .application_name(application)
        .connect_timeout(wait)
        .keepalives_idle(Duration::from_secs(10))
        .tcp_user_timeout(Duration::from_secs(15))
        .ssl_mode(match url.sslmode {
            SslMode::Disable => tokio_postgres::config::SslMode::Disable,
            SslMode::Prefer => tokio_postgres::config::SslMode::Prefer,
            SslMode::Require | SslMode::VerifyCa | SslMode::VerifyFull => {
                tokio_postgres::config::SslMode::Require
            }
        });
    if let Some(password) = &url.password {
        config.password(password.expose());
    }
    match tokio::time::timeout(wait, config.connect(tls)).await {
        Ok(connected) => Ok(connected?),
        Err(_elapsed) => Err(DialError::Timeout(wait)),
    }
}

/// libpq's words: `require` and below encrypt without asking who it is, `verify-ca` wants a known issuer,
/// `verify-full` also the name.
fn tls_config(url: &ConnectUrl) -> Result<ClientConfig, DialError> {
    let provider = Arc::new(ring::default_provider());
    let check = match url.sslmode {
        SslMode::Disable | SslMode::Prefer | SslMode::Require => Check::Nothing,
        SslMode::VerifyCa => Check::Issuer(issuer_verifier(url, &provider)?),
        SslMode::VerifyFull => Check::Name(issuer_verifier(url, &provider)?),
    };
    let config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()
        .map_err(|error| DialError::Roots(error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Verifier { provider, check }))
        .with_no_client_auth();
    Ok(config)
}

fn issuer_verifier(
    url: &ConnectUrl,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>, DialError> {
    let mut roots = RootCertStore::empty();
    match &url.ssl_root_cert {
        Some(file) => {
            let certificates =
                CertificateDer::pem_file_iter(file).map_err(|e| DialError::Roots(e.to_string()))?;
            for certificate in certificates {
                let certificate = certificate.map_err(|e| DialError::Roots(e.to_string()))?;
                roots
                    .add(certificate)
                    .map_err(|e| DialError::Roots(e.to_string()))?;
            }
        }
        None => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
    }
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
        .build()
        .map_err(|error| DialError::Roots(error.to_string()))
}

#[derive(Debug)]
enum Check {
    Nothing,
    Issuer(Arc<WebPkiServerVerifier>),
    Name(Arc<WebPkiServerVerifier>),
}

#[derive(Debug)]
struct Verifier {
    provider: Arc<CryptoProvider>,
    check: Check,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        server_name: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match &self.check {
            Check::Nothing => Ok(ServerCertVerified::assertion()),
            Check::Name(verifier) => verifier.verify_server_cert(
                end_entity,
                intermediates,
                server_name,
                ocsp_response,
                now,
            ),
            Check::Issuer(verifier) => {
                match verifier.verify_server_cert(
                    end_entity,
                    intermediates,
                    server_name,
                    ocsp_response,
                    now,
                ) {
                    // The name is looked at last, so a wrong name means the chain was good.
                    Err(rustls::Error::InvalidCertificate(
                        CertificateError::NotValidForName
                        | CertificateError::NotValidForNameContext { .. },
                    )) => Ok(ServerCertVerified::assertion()),
                    other => other,
                }
            }
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
