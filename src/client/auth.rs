//! We as the server of a SCRAM-SHA-256 login, bound to the TLS connection if the client wants that, or of one by certificate: no plaintext asked for, none kept; the keys a client proves are what logs in
//! to Postgres as that same user. (sasl-authentication.html) An unknown user costs the time and words of a wrong password.

use std::sync::Arc;

use tracing::error;

use super::error::SessionError;
use super::verifiers::Verifiers;
use crate::server::auth::Credentials;
use crate::wire::certificate::common_name;
use crate::wire::error_response::ErrorResponse;
use crate::wire::frame;
use crate::wire::messages::{put_authentication, put_cstr};
use crate::wire::scram::{self, ScramError, ServerBinding, ServerExchange, Verifier};
use crate::wire::stream::Stream;

/// The longest SASL message a client may send; Postgres's own limit.
const MESSAGE_MAX: usize = 1024;

const SASL: u32 = 10;
const SASL_CONTINUE: u32 = 11;
const SASL_FINAL: u32 = 12;

/// Runs the exchange; afterwards the client is `user`, and may be logged in to Postgres as that. `end_point`: the hash of the
/// certificate the client was shown, which it may bind its login to; `None` without TLS.
pub(super) async fn scram(
    client: &mut Stream,
    verifiers: &Verifiers,
    user: &str,
    end_point: Option<&[u8]>,
) -> Result<Credentials, SessionError> {
    let found = verifiers.find(user).await.map_err(|failure| {
        error!(%failure, "cannot look up password verifiers");
        refused("08006", "password verifiers cannot be looked up now")
    })?;
    let verifier = found.unwrap_or_else(|| Verifier::mock(&verifiers.mock_secret, user));

    let mut offer = Vec::new();
    if end_point.is_some() {
        put_cstr(&mut offer, scram::MECHANISM_PLUS.as_bytes());
    }
    put_cstr(&mut offer, scram::MECHANISM.as_bytes());
    offer.push(0);
    put_authentication(&mut client.output, SASL, &offer);
    client.flush().await?;

    let initial = next_response(client).await?;
    let (mechanism, first) =
        initial_response(&initial).ok_or(SessionError::Protocol("malformed SCRAM message"))?;
    let channel = match (mechanism, end_point) {
        (scram::MECHANISM, None) => ServerBinding::NotOffered,
        (scram::MECHANISM, Some(_)) => ServerBinding::Declined,
        (scram::MECHANISM_PLUS, Some(hash)) => ServerBinding::Chosen(hash),
        _ => {
            return Err(SessionError::Protocol(
                "client selected an invalid SASL authentication mechanism",
            ));
        }
    };
    let mut random = [0; 18];
    getrandom::fill(&mut random).map_err(std::io::Error::other)?;
    let exchange = ServerExchange::start(verifier, first, &scram::nonce(random), channel)
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

/// Whether the certificate a client showed, checked by the handshake already, is for `name`. What Postgres may ask of us
/// then is a password from the users file, or nothing.
pub(super) fn certificate(
    client: &Stream,
    verifiers: &Verifiers,
    name: &str,
    user: &str,
) -> Result<Credentials, SessionError> {
    let shown = client
        .transport()
        .peer_certificate()
        .ok_or_else(|| refused("28000", "connection requires a valid client certificate"))?;
    if common_name(shown) != Some(name) {
        let message = format!("certificate authentication failed for user \"{user}\"");
        return Err(refused("28000", &message));
    }
    let password = verifiers.password(user).map(Credentials::Password);
    Ok(password.unwrap_or_default())
}

/// As Postgres says it. (`auth-scram.c`)
fn failed(error: ScramError, user: &str) -> SessionError {
    let malformed = |detail: &str| {
        let error = ErrorResponse::fatal("08P01", "malformed SCRAM message").with_detail(detail);
        SessionError::Refused(Box::new(error))
    };
    match error {
        ScramError::Malformed => SessionError::Protocol("malformed SCRAM message"),
        ScramError::BindingMissing => malformed(
            "The client selected SCRAM-SHA-256-PLUS, but the SCRAM message does not include channel binding data.",
        ),
        ScramError::BindingUnasked => malformed(
            "The client selected SCRAM-SHA-256 without channel binding, but the SCRAM message includes channel binding data.",
        ),
        ScramError::BindingType(other) => {
            // A client's own text, shown back to it: no more of it than is printable.
            let other: String = other.chars().filter(|c| c.is_ascii_graphic()).collect();
            let message = format!("unsupported SCRAM channel-binding type \"{other}\"");
            refused("08P01", &message)
        }
        ScramError::Downgrade => SessionError::Refused(Box::new(
            ErrorResponse::fatal("28000", "SCRAM channel binding negotiation error").with_detail(
                "The client supports SCRAM channel binding but thinks the server does not.  \
                 However, this server does support channel binding.",
            ),
        )),
        ScramError::BindingCheck => refused("28000", "SCRAM channel binding check failed"),
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
fn initial_response(body: &[u8]) -> Option<(&str, &str)> {
    let end = memchr::memchr(0, body)?;
    let mechanism = std::str::from_utf8(body.get(..end)?).ok()?;
    let (length, message) = body.get(end + 1..)?.split_first_chunk::<4>()?;
    let message = (u32::from_be_bytes(*length) as usize == message.len())
        .then(|| std::str::from_utf8(message).ok())?;
    Some((mechanism, message?))
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
