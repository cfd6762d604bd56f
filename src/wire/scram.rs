//! SCRAM-SHA-256 arithmetic and messages, for both roles; no I/O, no clock. (RFC 5802, RFC 7677; sasl-authentication.html)
//! Called by `client/auth.rs`, where we are the server, and by `server/auth.rs`, where we are the client.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

pub(crate) const MECHANISM: &str = "SCRAM-SHA-256";
/// Iterations Postgres uses for a new verifier, and we for a mock one.
pub(crate) const ITERATIONS_DEFAULT: u32 = 4096;

type Key = [u8; 32];

/// A stored verifier: `SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>`, as in `pg_authid.rolpassword`.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Verifier {
    pub(crate) iterations: u32,
    pub(crate) salt: Vec<u8>,
    stored_key: Key,
    server_key: Key,
}

/// What logs in to Postgres as a user whose password we never saw: recovered from that user's own proof.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct ScramKeys {
    client_key: Key,
    server_key: Key,
}

impl Verifier {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let rest = text.strip_prefix("SCRAM-SHA-256$")?;
        let (parameters, keys) = rest.split_once('$')?;
        let (iterations, salt) = parameters.split_once(':')?;
        let (stored_key, server_key) = keys.split_once(':')?;
        Some(Self {
            iterations: iterations.parse().ok().filter(|&count| count > 0)?,
            salt: STANDARD.decode(salt).ok()?,
            stored_key: STANDARD.decode(stored_key).ok()?.try_into().ok()?,
            server_key: STANDARD.decode(server_key).ok()?.try_into().ok()?,
        })
    }

    /// The verifier of a password we know (a users file may hold plain ones).
    pub(crate) fn of_password(password: &str, salt: Vec<u8>) -> Self {
        let salted = salted_password(password, &salt, ITERATIONS_DEFAULT);
        let client_key = hmac(&salted, &[b"Client Key"]);
        let stored_key = Sha256::digest(client_key).into();
        Self {
            iterations: ITERATIONS_DEFAULT,
            salt,
            stored_key,
            server_key: hmac(&salted, &[b"Server Key"]),
        }
    }

    /// A verifier nobody can satisfy, the same for the same name, so that an unknown user looks like a known one.
    pub(crate) fn mock(secret: &[u8], user: &str) -> Self {
        let salt = hmac(secret, &[b"salt", user.as_bytes()]);
        let [salt, ..] = salt.as_chunks::<16>().0 else {
            unreachable!("32 bytes hold a chunk of 16")
        };
        let stored_key = hmac(secret, &[b"stored", user.as_bytes()]);
        Self {
            iterations: ITERATIONS_DEFAULT,
            salt: salt.to_vec(),
            stored_key,
            server_key: stored_key,
        }
    }
}

/// The server's half of an exchange.
pub(crate) struct ServerExchange {
    verifier: Verifier,
    auth_message_start: String,
    nonce: String,
    gs2_header: String,
    /// server-first-message, to be sent as SASLContinue.
    pub(crate) first: String,
}

/// Why the exchange ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ScramError {
    /// The message does not follow RFC 5802.
    Malformed,
    /// The client insists on channel binding it could not have been offered.
    ChannelBinding,
    /// The proof does not fit the verifier.
    Proof,
}

impl ServerExchange {
    /// Starts from the client-first-message; `nonce` is our half.
    pub(crate) fn start(
        verifier: Verifier,
        client_first: &str,
        nonce: &str,
    ) -> Result<Self, ScramError> {
        let mut parts = client_first.splitn(3, ',');
        let (Some(binding), Some(authzid), Some(bare)) = (parts.next(), parts.next(), parts.next())
        else {
            return Err(ScramError::Malformed);
        };
        match binding {
            "n" | "y" => {}
            _ if binding.starts_with("p=") => return Err(ScramError::ChannelBinding),
            _ => return Err(ScramError::Malformed),
        }
        if !authzid.is_empty() {
            return Err(ScramError::Malformed);
        }
        let mut attributes = bare.split(',');
        let _user = attributes
            .next()
            .and_then(|user| user.strip_prefix("n="))
            .ok_or(ScramError::Malformed)?;
        let theirs = attributes
            .next()
            .and_then(|nonce| nonce.strip_prefix("r="))
            .ok_or(ScramError::Malformed)?;
        if theirs.is_empty() || attributes.next().is_some() {
            return Err(ScramError::Malformed);
        }
        let nonce = format!("{theirs}{nonce}");
        let first = format!(
            "r={nonce},s={},i={}",
            STANDARD.encode(&verifier.salt),
            verifier.iterations
        );
        let auth_message_start = format!("{bare},{first}");
        Ok(Self {
            verifier,
            auth_message_start,
            nonce,
            gs2_header: format!("{binding},{authzid},"),
            first,
        })
    }

    /// Checks the client-final-message. On success: the server-final-message and the keys to log in with.
    pub(crate) fn finish(self, client_final: &str) -> Result<(String, ScramKeys), ScramError> {
        let (without_proof, proof) = client_final
            .rsplit_once(",p=")
            .ok_or(ScramError::Malformed)?;
        let expected = format!("c={},r={}", STANDARD.encode(&self.gs2_header), self.nonce);
        let proof: Key = STANDARD
            .decode(proof)
            .ok()
            .and_then(|p| p.try_into().ok())
            .ok_or(ScramError::Malformed)?;
        if without_proof != expected {
            return Err(ScramError::Malformed);
        }
        let auth_message = format!("{},{without_proof}", self.auth_message_start);
        let signature = hmac(&self.verifier.stored_key, &[auth_message.as_bytes()]);
        let client_key = xor(proof, signature);
        let stored_key: Key = Sha256::digest(client_key).into();
        if !bool::from(stored_key.ct_eq(&self.verifier.stored_key)) {
            return Err(ScramError::Proof);
        }
        let server_key = self.verifier.server_key;
        let server_signature = hmac(&server_key, &[auth_message.as_bytes()]);
        Ok((
            format!("v={}", STANDARD.encode(server_signature)),
            ScramKeys {
                client_key,
                server_key,
            },
        ))
    }
}

/// What the client's half proves itself with.
pub(crate) enum Secret<'a> {
    Password(&'a str),
    Keys(&'a ScramKeys),
}

/// The client's half of an exchange, without channel binding.
pub(crate) struct ClientExchange {
    bare: String,
    nonce: String,
}

impl ClientExchange {
    pub(crate) fn start(nonce: String) -> Self {
        // Postgres takes the user from the StartupMessage and wants this one empty.
        Self {
            bare: format!("n=,r={nonce}"),
            nonce,
        }
    }

    pub(crate) fn first(&self) -> String {
        format!("n,,{}", self.bare)
    }

    /// Answers the server-first-message: the client-final-message, and the server-final-message to expect.
    pub(crate) fn answer(
        &self,
        server_first: &str,
        secret: &Secret<'_>,
    ) -> Result<(String, String), ScramError> {
        let mut attributes = server_first.split(',');
        let mut next = |prefix: &str| {
            attributes
                .next()
                .and_then(|a| a.strip_prefix(prefix))
                .ok_or(ScramError::Malformed)
        };
        let (nonce, salt, iterations) = (next("r=")?, next("s=")?, next("i=")?);
        let salt = STANDARD
            .decode(salt)
            .map_err(|_not_base64| ScramError::Malformed)?;
        let iterations: u32 = iterations
            .parse()
            .map_err(|_not_a_number| ScramError::Malformed)?;
        if !nonce.starts_with(&self.nonce) || nonce.len() <= self.nonce.len() || iterations == 0 {
            return Err(ScramError::Malformed);
        }
        let (client_key, server_key) = match secret {
            Secret::Password(password) => {
                let salted = salted_password(password, &salt, iterations);
                (
                    hmac(&salted, &[b"Client Key"]),
                    hmac(&salted, &[b"Server Key"]),
                )
            }
            Secret::Keys(keys) => (keys.client_key, keys.server_key),
        };
        let stored_key: Key = Sha256::digest(client_key).into();
        let without_proof = format!("c=biws,r={nonce}");
        let auth_message = format!("{},{server_first},{without_proof}", self.bare);
        let proof = xor(client_key, hmac(&stored_key, &[auth_message.as_bytes()]));
        let expected = format!(
            "v={}",
            STANDARD.encode(hmac(&server_key, &[auth_message.as_bytes()]))
        );
        Ok((
            format!("{without_proof},p={}", STANDARD.encode(proof)),
            expected,
        ))
    }
}

/// A printable nonce from random bytes.
pub(crate) fn nonce(random: [u8; 18]) -> String {
    STANDARD.encode(random)
}

/// `Hi(Normalize(password), salt, iterations)`: PBKDF2 with one block.
fn salted_password(password: &str, salt: &[u8], iterations: u32) -> Key {
    // Postgres takes a password that SASLprep refuses as its raw bytes.
    let prepared = stringprep::saslprep(password).unwrap_or(password.into());
    let mac =
        Hmac::<Sha256>::new_from_slice(prepared.as_bytes()).expect("HMAC takes keys of any length");
    let one = |parts: &[&[u8]]| -> Key {
        let mut mac = mac.clone();
        parts.iter().for_each(|part| mac.update(part));
        mac.finalize().into_bytes().into()
    };
    let mut block = one(&[salt, &1u32.to_be_bytes()]);
    let mut salted = block;
    for _ in 1..iterations {
        block = one(&[&block]);
        salted = xor(salted, block);
    }
    salted
}

fn hmac(key: &[u8], parts: &[&[u8]]) -> Key {
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    parts.iter().for_each(|part| mac.update(part));
    mac.finalize().into_bytes().into()
}

fn xor(left: Key, right: Key) -> Key {
    std::array::from_fn(|at| left.get(at).unwrap_or(&0) ^ right.get(at).unwrap_or(&0))
}

#[cfg(test)]
mod tests {
    use super::*;

    // The verifier Postgres stores for the password "pencil" with this salt and 4096 iterations (RFC 7677's example).
    fn pencil() -> Verifier {
        Verifier::of_password(
            "pencil",
            STANDARD.decode("W22ZaJ0SNY7soEsUEjb6gQ==").unwrap(),
        )
    }

    #[test]
    fn follows_the_example_of_rfc_7677() {
        let client = ClientExchange {
            bare: "n=user,r=rOprNGfwEbeRWgbNEkqO".into(),
            nonce: "rOprNGfwEbeRWgbNEkqO".into(),
        };
        let server =
            ServerExchange::start(pencil(), &client.first(), "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0")
                .unwrap();
        assert_eq!(
            server.first,
            "r=rOprNGfwEbeRWgbNEkqO%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0,s=W22ZaJ0SNY7soEsUEjb6gQ==,i=4096"
        );
        let (last, expected) = client
            .answer(&server.first, &Secret::Password("pencil"))
            .unwrap();
        assert!(
            last.ends_with(",p=dHzbZapWIk4jUhN+Ute9ytag9zjfMHgsqmmiz7AndVQ="),
            "{last}"
        );
        assert_eq!(expected, "v=6rriTRBi23WpRR/wtup+mMhUZUn/dB5nLTJRsjl95G4=");
        let (final_message, keys) = server.finish(&last).unwrap();
        assert_eq!(final_message, expected);

        // The keys recovered from the proof log in where the password would.
        let again = ClientExchange::start("abc".into());
        let server = ServerExchange::start(pencil(), &again.first(), "def").unwrap();
        let (last, expected) = again.answer(&server.first, &Secret::Keys(&keys)).unwrap();
        assert_eq!(
            server.finish(&last).map(|(message, _)| message),
            Ok(expected)
        );
    }

    #[test]
    fn a_wrong_password_and_an_unknown_user_fail_alike() {
        for verifier in [pencil(), Verifier::mock(b"secret", "nobody")] {
            let client = ClientExchange::start("abc".into());
            let server = ServerExchange::start(verifier, &client.first(), "def").unwrap();
            let (last, _) = client
                .answer(&server.first, &Secret::Password("pen"))
                .unwrap();
            assert!(matches!(server.finish(&last), Err(ScramError::Proof)));
        }
    }

    #[test]
    fn malformed_messages_are_refused() {
        for first in [
            "",
            "n",
            "n,,",
            "n,,n=,r=",
            "x,,n=,r=a",
            "n,a=b,n=,r=a",
            "n,,n=,r=a,m=x",
        ] {
            assert!(
                matches!(
                    ServerExchange::start(pencil(), first, "x"),
                    Err(ScramError::Malformed)
                ),
                "{first}"
            );
        }
        let bound = ServerExchange::start(pencil(), "p=tls-server-end-point,,n=,r=a", "x");
        assert!(matches!(bound, Err(ScramError::ChannelBinding)));
        for last in ["", "c=biws,r=wrong,p=AAAA", "c=biws", ",p=,p="] {
            let server = ServerExchange::start(pencil(), "n,,n=,r=a", "x").unwrap();
            assert!(
                matches!(server.finish(last), Err(ScramError::Malformed)),
                "{last}"
            );
        }
    }

    #[test]
    fn a_verifier_is_read_as_postgres_stores_it() {
        let text = "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU=";
        assert!(Verifier::parse(text) == Some(pencil()));
        for bad in [
            "",
            "md5abc",
            "SCRAM-SHA-256$0:AA==$AA==:AA==",
            "SCRAM-SHA-256$4096:W22Z$x:y",
        ] {
            assert!(Verifier::parse(bad).is_none(), "{bad}");
        }
    }
}
