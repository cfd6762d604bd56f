//! We as the server of a SCRAM-SHA-256 login: no plaintext asked for, none kept; the keys a client proves are what logs in
//! to Postgres as that same user. (sasl-authentication.html) An unknown user costs the time and words of a wrong password.

use std::sync::Arc;

use tracing::error;

use super::error::SessionError;
use super::verifiers::Verifiers;
use crate::server::auth::Credentials;
use crate::wire::error_response::ErrorResponse;
use crate::wire::frame;
use crate::wire::messages::{put_authentication, put_cstr};
use crate::wire::scram::{self, ScramError, ServerExchange, Verifier};
use crate::wire::stream::Stream;

/// The longest SASL message a client may send; Postgres's own limit.
const MESSAGE_MAX: usize = 1024;

const SASL: u32 = 10;
const SASL_CONTINUE: u32 = 11;
const SASL_FINAL: u32 = 12;

/// Runs the exchange; afterwards the client is `user`, and may be logged in to Postgres as that.
pub(super) async fn scram(
    client: &mut Stream,
    verifiers: &Verifiers,
    user: &str,
) -> Result<Credentials, SessionError> {
    let found = verifiers.find(user).await.map_err(|failure| {
        error!(%failure, "cannot look up password verifiers");
        refused("08006", "password verifiers cannot be looked up now")
    })?;
    let verifier = found.unwrap_or_else(|| Verifier::mock(&verifiers.mock_secret, user));

    let mut offer = Vec::new();
    put_cstr(&mut offer, scram::MECHANISM.as_bytes());
    offer.push(0);
    put_authentication(&mut client.output, SASL, &offer);
    client.flush().await?;

    let initial = next_response(client).await?;
    let first =
        initial_response(&initial).ok_or(SessionError::Protocol("malformed SCRAM message"))?;
    let mut random = [0; 18];
    getrandom::fill(&mut random).map_err(std::io::Error::other)?;
    let exchange = ServerExchange::start(verifier, first, &scram::nonce(random))
        .map_err(|e| failed(e, user))?;
    put_authentication(&mut client.output, SASL_CONTINUE, exchange.first.as_bytes());
    client.flush().await?;

    let last = next_response(client).await?;
    let last = std::str::from_utf8(&last)
        .map_err(|_not_utf8| SessionError::Protocol("malformed SCRAM message"))?;
    let (proof, keys) = exchange.finish(last).map_err(|e| failed(e, user))?;
    put_authentication(&mut client.output, SASL_FINAL, proof.as_bytes());
    let password = verifiers.password(user).map(Credentials::Password);
    Ok(password.unwrap_or_else(|| Credentials::Keys(Arc::new(keys))))
}

fn failed(error: ScramError, user: &str) -> SessionError {
    match error {
        ScramError::Malformed => SessionError::Protocol("malformed SCRAM message"),
        ScramError::ChannelBinding => refused(
            "08P01",
            "the client selected SCRAM channel binding, which this server did not offer",
        ),
        ScramError::Proof => refused(
            "28P01",
            &format!("password authentication failed for user \"{user}\""),
        ),
    }
}

fn refused(code: &'static str, message: &str) -> SessionError {
    SessionError::Refused(Box::new(ErrorResponse::fatal(code, message)))
}

/// SASLInitialResponse: mechanism, length, client-first-message.
fn initial_response(body: &[u8]) -> Option<&str> {
    let end = memchr::memchr(0, body)?;
    if body.get(..end)? != scram::MECHANISM.as_bytes() {
        return None;
    }
    let (length, message) = body.get(end + 1..)?.split_first_chunk::<4>()?;
    (u32::from_be_bytes(*length) as usize == message.len())
        .then(|| std::str::from_utf8(message).ok())?
}

async fn next_response(client: &mut Stream) -> Result<Vec<u8>, SessionError> {
    let header = client
        .next_frame(MESSAGE_MAX)
        .await
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::InvalidData => SessionError::Protocol("invalid message length"),
            _ => SessionError::ClientGone(error),
        })?;
    if header.tag != b'p' {
        return Err(SessionError::Protocol("expected SASL response"));
    }
    let body = frame::body(client.input.bytes(), header)
        .unwrap_or_default()
        .to_vec();
    client.input.consume(header.whole);
    Ok(body)
}
