//! SCRAM-SHA-256 arithmetic and messages, for both roles; no I/O, no clock. (RFC 5802, RFC 7677; sasl-authentication.html)
//! Called by `client/auth.rs`, where we are the server, and by `server/auth.rs`, where we are the client.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

pub(crate) const MECHANISM: &str = "SCRAM-SHA-256";
/// The same, bound to the TLS connection it runs over.
pub(crate) const MECHANISM_PLUS: &str = "SCRAM-SHA-256-PLUS";
/// The one kind of channel binding Postgres knows. (RFC 5929, 4)
const BINDING_TYPE: &str = "tls-server-end-point";
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

impl ScramKeys {
    /// Nobody's.
    #[cfg(any(test, feature = "fuzz"))]
    pub(crate) fn unproven() -> Self {
        Self {
            client_key: [1; 32],
            server_key: [2; 32],
        }
    }
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

/// Channel binding as the server sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ServerBinding<'a> {
    /// PLUS was not offered.
    NotOffered,
    /// PLUS was offered, and the client chose to do without.
    Declined,
    /// The client chose PLUS: what both must see is the hash of our certificate.
    Chosen(&'a [u8]),
}

/// The server's half of an exchange.
pub(crate) struct ServerExchange {
    verifier: Verifier,
    auth_message_start: String,
    nonce: String,
    /// What the client-final-message must carry as `c=`, before base64.
    binding: Vec<u8>,
    is_bound: bool,
    /// server-first-message, to be sent as SASLContinue.
    pub(crate) first: String,
}

/// Why the exchange ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ScramError {
    /// The message does not follow RFC 5802.
    Malformed,
    /// The client chose PLUS, and its message is not bound.
    BindingMissing,
    /// The client's message is bound, and it did not choose PLUS.
    BindingUnasked,
    /// A binding of a type we don't have.
    BindingType(String),
    /// The client could bind and believes that we can't: somebody between has taken PLUS from what we offered.
    Downgrade,
    /// The client is bound to another TLS connection than ours: somebody is between.
    BindingCheck,
    /// The proof does not fit the verifier.
    Proof,
}

impl ServerExchange {
    /// Starts from the client-first-message; `nonce` is our half.
    pub(crate) fn start(
        verifier: Verifier,
        client_first: &str,
        nonce: &str,
        channel: ServerBinding<'_>,
    ) -> Result<Self, ScramError> {
        let mut parts = client_first.splitn(3, ',');
        let (Some(binding), Some(authzid), Some(bare)) = (parts.next(), parts.next(), parts.next())
        else {
            return Err(ScramError::Malformed);
        };
        match (channel, binding, binding.strip_prefix("p=")) {
            (ServerBinding::Chosen(_), "n" | "y", _) => return Err(ScramError::BindingMissing),
            (ServerBinding::Chosen(_), _, Some(BINDING_TYPE)) => {}
            (ServerBinding::Chosen(_), _, Some(other)) => {
                return Err(ScramError::BindingType(other.to_owned()));
            }
            (ServerBinding::Declined, "y", _) => return Err(ScramError::Downgrade),
            (ServerBinding::NotOffered | ServerBinding::Declined, "n" | "y", _) => {}
            (ServerBinding::NotOffered | ServerBinding::Declined, _, Some(_)) => {
                return Err(ScramError::BindingUnasked);
            }
            (_, _, None) => return Err(ScramError::Malformed),
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
        let mut expected = format!("{binding},{authzid},").into_bytes();
        let is_bound = match channel {
            ServerBinding::Chosen(hash) => {
                expected.extend_from_slice(hash);
                true
            }
            ServerBinding::NotOffered | ServerBinding::Declined => false,
        };
        Ok(Self {
            verifier,
            auth_message_start,
            nonce,
            binding: expected,
            is_bound,
            first,
        })
    }

    /// Checks the client-final-message. On success: the server-final-message and the keys to log in with.
    pub(crate) fn finish(self, client_final: &str) -> Result<(String, ScramKeys), ScramError> {
        let (without_proof, proof) = client_final
            .rsplit_once(",p=")
            .ok_or(ScramError::Malformed)?;
        let (binding, rest) = without_proof
            .strip_prefix("c=")
            .and_then(|text| text.split_once(','))
            .ok_or(ScramError::Malformed)?;
        let proof: Key = STANDARD
            .decode(proof)
            .ok()
            .and_then(|p| p.try_into().ok())
            .ok_or(ScramError::Malformed)?;
        if binding != STANDARD.encode(&self.binding) {
            return Err(if self.is_bound {
                ScramError::BindingCheck
            } else {
                ScramError::Malformed
            });
        }
        if rest.strip_prefix("r=") != Some(&self.nonce) {
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

/// Channel binding as the client sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum ClientBinding<'a> {
    /// We cannot, or are not to.
    Unable,
    /// We could, and the server did not offer PLUS. Had it, and somebody took that out, it will know by this.
    NotOffered,
    /// To the hash of the server's certificate.
    Bound(&'a [u8]),
}

/// The client's half of an exchange.
pub(crate) struct ClientExchange {
    bare: String,
    nonce: String,
    gs2_header: String,
    /// `c=`, before base64.
    binding: Vec<u8>,
}

impl ClientExchange {
    pub(crate) fn start(nonce: String, channel: ClientBinding<'_>) -> Self {
        let (gs2_header, hash) = match channel {
            ClientBinding::Unable => ("n,,".to_owned(), &[][..]),
            ClientBinding::NotOffered => ("y,,".to_owned(), &[][..]),
            ClientBinding::Bound(hash) => (format!("p={BINDING_TYPE},,"), hash),
        };
        Self {
            // Postgres takes the user from the StartupMessage and wants this one empty.
            bare: format!("n=,r={nonce}"),
            nonce,
            binding: [gs2_header.as_bytes(), hash].concat(),
            gs2_header,
        }
    }

    pub(crate) fn first(&self) -> String {
        format!("{}{}", self.gs2_header, self.bare)
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
        let without_proof = format!("c={},r={nonce}", STANDARD.encode(&self.binding));
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
        #[cfg(test)]
        HASHED.set(HASHED.get() + 1);
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

#[cfg(test)]
thread_local! {
    /// What a test of equal cost counts.
    static HASHED: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

fn hmac(key: &[u8], parts: &[&[u8]]) -> Key {
    #[cfg(test)]
    HASHED.set(HASHED.get() + 1);
    let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("HMAC takes keys of any length");
    parts.iter().for_each(|part| mac.update(part));
    mac.finalize().into_bytes().into()
}

fn xor(left: Key, right: Key) -> Key {
    std::array::from_fn(|at| left.get(at).unwrap_or(&0) ^ right.get(at).unwrap_or(&0))
}

#[cfg(test)]
#[expect(clippy::indexing_slicing, reason = "a test may panic")]
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
            ..ClientExchange::start("rOprNGfwEbeRWgbNEkqO".into(), ClientBinding::Unable)
        };
        let server = start(&client.first(), "%hvYDpWUa2RaTCAfuxFIlj)hNlF$k0").unwrap();
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
        let again = ClientExchange::start("abc".into(), ClientBinding::Unable);
        let server = start(&again.first(), "def").unwrap();
        let (last, expected) = again.answer(&server.first, &Secret::Keys(&keys)).unwrap();
        assert_eq!(
            server.finish(&last).map(|(message, _)| message),
            Ok(expected)
        );
    }

    fn start(first: &str, nonce: &str) -> Result<ServerExchange, ScramError> {
        ServerExchange::start(pencil(), first, nonce, ServerBinding::NotOffered)
    }

    /// Not a clock's word, which a busy machine may break: the same hashing, step by step.
    #[test]
    fn a_wrong_password_and_an_unknown_user_fail_alike_and_cost_the_same() {
        let mut costs = Vec::new();
        for verifier in [pencil(), Verifier::mock(b"secret", "nobody")] {
            let client = ClientExchange::start("abc".into(), ClientBinding::Unable);
            let (first, wrong) = (client.first(), Secret::Password("pen"));
            let before = HASHED.get();
            let server =
                ServerExchange::start(verifier, &first, "def", ServerBinding::NotOffered).unwrap();
            let halfway = HASHED.get();
            let (last, _) = client.answer(&server.first, &wrong).unwrap();
            let resumed = HASHED.get();
            assert!(matches!(server.finish(&last), Err(ScramError::Proof)));
            costs.push((halfway - before, HASHED.get() - resumed));
        }
        assert_eq!(costs[0], costs[1]);
        assert!(costs[0].1 > 0, "nothing was counted");
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
                matches!(start(first, "x"), Err(ScramError::Malformed)),
                "{first}"
            );
        }
        for last in ["", "c=biws,r=wrong,p=AAAA", "c=biws", ",p=,p="] {
            let server = start("n,,n=,r=a", "x").unwrap();
            assert!(
                matches!(server.finish(last), Err(ScramError::Malformed)),
                "{last}"
            );
        }
    }

    /// As `src/backend/libpq/auth-scram.c` decides, case by case.
    #[test]
    fn a_client_binds_when_it_chose_to_and_only_then() {
        use ServerBinding as On;
        let cases = [
            ("n", On::NotOffered, None),
            ("y", On::NotOffered, None),
            ("n", On::Declined, None),
            ("y", On::Declined, Some(ScramError::Downgrade)),
            ("p=tls-server-end-point", On::Chosen(b"hash"), None),
            ("n", On::Chosen(b"hash"), Some(ScramError::BindingMissing)),
            ("y", On::Chosen(b"hash"), Some(ScramError::BindingMissing)),
            (
                "p=tls-unique",
                On::Chosen(b"hash"),
                Some(ScramError::BindingType("tls-unique".into())),
            ),
            (
                "p=tls-server-end-point",
                On::Declined,
                Some(ScramError::BindingUnasked),
            ),
            (
                "p=tls-server-end-point",
                On::NotOffered,
                Some(ScramError::BindingUnasked),
            ),
        ];
        for (flag, channel, wanted) in cases {
            let first = format!("{flag},,n=,r=a");
            let refused = ServerExchange::start(pencil(), &first, "x", channel).err();
            assert_eq!(refused, wanted, "{flag} {channel:?}");
        }
    }

    #[test]
    fn a_bound_exchange_fails_for_whoever_sees_another_certificate() {
        for (theirs, ours, wanted) in [
            (&b"hash"[..], &b"hash"[..], None),
            (b"hash of another", b"hash", Some(ScramError::BindingCheck)),
            (b"", b"hash", Some(ScramError::BindingCheck)),
        ] {
            let client = ClientExchange::start("abc".into(), ClientBinding::Bound(theirs));
            let channel = ServerBinding::Chosen(ours);
            let server = ServerExchange::start(pencil(), &client.first(), "def", channel).unwrap();
            let (last, expected) = client
                .answer(&server.first, &Secret::Password("pencil"))
                .unwrap();
            match (server.finish(&last), wanted) {
                (Ok((proof, _)), None) => assert_eq!(proof, expected),
                (Err(error), Some(wanted)) => assert_eq!(error, wanted),
                (outcome, wanted) => panic!("{:?}, not {wanted:?}", outcome.err()),
            }
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
