//! Logging in to Postgres as a client: SCRAM-SHA-256 by password or by recovered keys, bound to the TLS connection where both can, MD5 and cleartext by password.
//! (sasl-authentication.html, protocol-flow.html#PROTOCOL-FLOW-START-UP) Called by `connect.rs` once a login.

use std::sync::Arc;

use thiserror::Error;

use crate::config::{ChannelBinding, ConnectUrl};
use crate::wire::certificate::end_point;
use crate::wire::frame;
use crate::wire::messages::{put_cstr, put_frame};
use crate::wire::scram::{self, ClientBinding, ClientExchange, ScramKeys, Secret};
use crate::wire::stream::Stream;

/// What a pool may log in with.
#[derive(Clone, Default)]
pub(crate) enum Credentials {
    /// Postgres must trust us.
    #[default]
    None,
    Password(Arc<str>),
    Keys(Arc<ScramKeys>),
}

#[derive(Debug, Error)]
pub(crate) enum AuthError {
    #[error("the server asks for {0}, and there is no password or SCRAM key for this user")]
    NoCredentials(&'static str),
    #[error("the server asks for authentication method {0}, which is not supported")]
    Unsupported(u32),
    #[error("the server's SCRAM messages are malformed")]
    Scram,
    #[error("the server could not prove that it knows the password")]
    ServerSignature,
    #[error("channel binding is required, and the server did not bind the login: {0}")]
    NotBound(&'static str),
    #[error(transparent)]
    Io(#[from] std::io::Error),
}

/// Authentication messages are short; SASL ones the longest.
const MESSAGE_MAX: usize = 64 * 1024;

/// What an Authentication frame asks for next.
pub(crate) enum Step {
    Done,
    More,
}

/// One login's state between Authentication frames.
pub(crate) struct Login {
    exchange: Option<(ClientExchange, String)>,
    policy: ChannelBinding,
    /// Encrypted, with a certificate that can be bound to: its hash.
    end_point: Option<Vec<u8>>,
    encrypted: bool,
    /// The server has proven itself in a bound exchange.
    bound: bool,
    binds: bool,
}

impl Login {
    /// A login over this stream.
    pub(crate) fn new(stream: &Stream, policy: ChannelBinding) -> Self {
        let shown = stream.transport().peer_certificate();
        Self {
            exchange: None,
            policy,
            end_point: shown.and_then(end_point),
            encrypted: shown.is_some(),
            bound: false,
            binds: false,
        }
    }

    /// Answers one Authentication frame's body.
    pub(crate) async fn answer(
        &mut self,
        stream: &mut Stream,
        user: &str,
        credentials: &Credentials,
        body: &[u8],
    ) -> Result<Step, AuthError> {
        let (code, rest) = body.split_first_chunk::<4>().ok_or(AuthError::Scram)?;
        match u32::from_be_bytes(*code) {
            // An exchange once begun must end with the server's own proof.
            0 if self.exchange.is_some() => return Err(AuthError::ServerSignature),
            0 if self.must_bind() && !self.bound => {
                return Err(AuthError::NotBound("it asked for no proof"));
            }
            0 => return Ok(Step::Done),
            3 | 5 if self.must_bind() => {
                return Err(AuthError::NotBound(
                    "it asked for a plain or an MD5 password",
                ));
            }
            3 => {
                let password = credentials.password("a cleartext password")?;
                put_password(&mut stream.output, password.as_bytes());
            }
            5 => {
                let password = credentials.password("an MD5 password")?;
                let salt: [u8; 4] = rest.try_into().map_err(|_not_four| AuthError::Scram)?;
                let hashed = postgres_protocol::authentication::md5_hash(
                    user.as_bytes(),
                    password.as_bytes(),
                    salt,
                );
                put_password(&mut stream.output, hashed.as_bytes());
            }
            10 => self.start_scram(stream, credentials, rest)?,
            11 => {
                let server_first =
                    std::str::from_utf8(rest).map_err(|_not_utf8| AuthError::Scram)?;
                let (exchange, expected) = self.exchange.as_mut().ok_or(AuthError::Scram)?;
                let secret = credentials.secret()?;
                let (last, signature) = exchange
                    .answer(server_first, &secret)
                    .map_err(|_refused| AuthError::Scram)?;
                *expected = signature;
                put_frame(&mut stream.output, b'p', |out| {
                    out.extend_from_slice(last.as_bytes())
                });
            }
            12 => {
                let (_, expected) = self.exchange.take().ok_or(AuthError::Scram)?;
                if expected.is_empty() || rest != expected.as_bytes() {
                    return Err(AuthError::ServerSignature);
                }
                self.bound = self.binds;
            }
            unknown => return Err(AuthError::Unsupported(unknown)),
        }
        stream.flush().await?;
        Ok(Step::More)
    }

    fn start_scram(
        &mut self,
        stream: &mut Stream,
        credentials: &Credentials,
        offered: &[u8],
    ) -> Result<(), AuthError> {
        let offers = |mechanism: &str| {
            let mut names = offered.split(|&byte| byte == 0);
            names.any(|name| name == mechanism.as_bytes())
        };
        let wanted = self.policy != ChannelBinding::Disable;
        let (mechanism, channel) = match &self.end_point {
            Some(hash) if wanted && offers(scram::MECHANISM_PLUS) => {
                (scram::MECHANISM_PLUS, ClientBinding::Bound(hash))
            }
            _ if self.must_bind() => {
                let why = if !self.encrypted {
                    "the connection is not encrypted"
                } else if self.end_point.is_none() {
                    "its certificate's signature has no hash to bind to"
                } else {
                    "it does not offer SCRAM-SHA-256-PLUS"
                };
                return Err(AuthError::NotBound(why));
            }
            _ if !offers(scram::MECHANISM) => return Err(AuthError::Unsupported(10)),
            Some(_) if wanted => (scram::MECHANISM, ClientBinding::NotOffered),
            Some(_) | None => (scram::MECHANISM, ClientBinding::Unable),
        };
        credentials.secret()?;
        let mut random = [0; 18];
        getrandom::fill(&mut random).map_err(std::io::Error::other)?;
        let exchange = ClientExchange::start(scram::nonce(random), channel);
        let first = exchange.first();
        put_frame(&mut stream.output, b'p', |out| {
            put_cstr(out, mechanism.as_bytes());
            out.extend_from_slice(&u32::try_from(first.len()).unwrap_or(u32::MAX).to_be_bytes());
            out.extend_from_slice(first.as_bytes());
        });
        self.binds = mechanism == scram::MECHANISM_PLUS;
        self.exchange = Some((exchange, String::new()));
        Ok(())
    }

    fn must_bind(&self) -> bool {
        self.policy == ChannelBinding::Require
    }
}

impl Credentials {
    /// The password of a control role, if its URL has one.
    pub(crate) fn of_control_role(url: &ConnectUrl) -> Self {
        url.password.as_ref().map_or(Self::None, |password| {
            Self::Password(password.expose().into())
        })
    }

    fn password(&self, asked: &'static str) -> Result<&str, AuthError> {
        match self {
            Self::Password(password) => Ok(password),
            Self::None | Self::Keys(_) => Err(AuthError::NoCredentials(asked)),
        }
    }

    fn secret(&self) -> Result<Secret<'_>, AuthError> {
        match self {
            Self::Password(password) => Ok(Secret::Password(password)),
            Self::Keys(keys) => Ok(Secret::Keys(keys)),
            Self::None => Err(AuthError::NoCredentials("SCRAM-SHA-256")),
        }
    }
}

fn put_password(out: &mut Vec<u8>, password: &[u8]) {
    put_frame(out, b'p', |out| put_cstr(out, password));
}

/// The next frame of a login: its tag and body.
pub(crate) async fn next(stream: &mut Stream) -> std::io::Result<(u8, Vec<u8>)> {
    let header = stream.next_frame(MESSAGE_MAX).await?;
    let body = frame::body(stream.input.bytes(), header)
        .unwrap_or_default()
        .to_vec();
    stream.input.consume(header.whole);
    Ok((header.tag, body))
}
