//! JSON Web Tokens: whose signature is whose, and what a token claims. Knows neither HTTP nor roles; `identity.rs` calls.
//!
//! HS256 with the shared secret; RS256, ES256 and EdDSA with the keys of a JWKS (`jwks.rs`), chosen by `kid`. A key says which
//! algorithm it is for, and the token's own word is only compared with that: a token can't choose how it is verified. (RFC 8725)

use std::time::{SystemTime, UNIX_EPOCH};

use base64::Engine;
use base64::engine::general_purpose::{URL_SAFE, URL_SAFE_NO_PAD};
use ring::{hmac as mac, signature};
use serde_json::{Map, Value};

/// Clocks of others may differ that much.
const GRACE: i64 = 30;
const TOKEN_MAX: usize = 16 * 1024;
const RSA_BITS_MIN: usize = 2048;

#[derive(Debug, thiserror::Error)]
pub enum JwksError {
    #[error("cannot be read: {0}")]
    Read(#[from] std::io::Error),
    #[error("is no JSON Web Key Set: {0}")]
    Json(#[from] serde_json::Error),
    #[error("has no array `keys`")]
    NoKeys,
    #[error("key {place}: {reason}")]
    Key { place: usize, reason: &'static str },
}

/// Why a token is refused; the words are for whoever sent it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("{0}")]
    Invalid(&'static str),
    /// Perhaps there is another key by now.
    #[error("no key verifies the JWT's signature")]
    UnknownKey,
    #[error("the keys that could verify the JWT are not known yet")]
    NoKeysYet,
    #[error("JWT expired")]
    Expired { seconds_ago: i64 },
    #[error("JWT not yet valid")]
    NotYet,
}

/// A token that was verified.
#[derive(Clone, Debug)]
pub(super) struct Claims {
    /// As JSON, as they came.
    pub(super) json: String,
    pub(super) role: Option<String>,
    pub(super) expires: Option<i64>,
}

#[derive(Debug, Default)]
pub(super) struct Keys {
    secret: Option<mac::Key>,
}

#[derive(Debug)]
pub(super) struct PublicKey {
    kid: Option<String>,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Rsa { n: Vec<u8>, e: Vec<u8> },
    P256(Vec<u8>),
    Ed25519(Vec<u8>),
}

impl Keys {
    pub(super) fn new(secret: Option<&str>) -> Self {
        let key = |secret: &str| mac::Key::new(mac::HMAC_SHA256, secret.as_bytes());
        Self {
            secret: secret.map(key),
        }
    }

    /// `public`: `None` while nobody has told us which they are.
    pub(super) fn verify(
        &self,
        public: Option<&[PublicKey]>,
        token: &str,
        now: i64,
    ) -> Result<Claims, Refusal> {
        if token.len() > TOKEN_MAX {
            return Err(Refusal::Invalid("the JWT is too long"));
        }
        let mut parts = token.split('.');
        let (Some(header), Some(claims), Some(mark), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(Refusal::Invalid("expected 3 parts in JWT"));
        };
        let signed = &token[..header.len() + 1 + claims.len()];
        let header = object(header).ok_or(Refusal::Invalid("the JWT's header is malformed"))?;
        let mark = decode(mark).ok_or(Refusal::Invalid("the JWT's signature is malformed"))?;
        if header.contains_key("crit") {
            return Err(Refusal::Invalid("the JWT has critical extensions"));
        }
        let kid = header.get("kid").and_then(Value::as_str);
        let genuine = match header.get("alg").and_then(Value::as_str) {
            Some("HS256") => {
                let key = self
                    .secret
                    .as_ref()
                    .ok_or(Refusal::Invalid("no secret to verify the JWT with"))?;
                mac::verify(key, signed.as_bytes(), &mark).is_ok()
            }
            Some(alg @ ("RS256" | "ES256" | "EdDSA")) => {
                let public = public.ok_or(Refusal::NoKeysYet)?;
                let mut fitting = public.iter().filter(|key| {
                    key.kind.alg() == alg
                        && (kid.is_none() || key.kid.is_none() || key.kid.as_deref() == kid)
                });
                let genuine = fitting.any(|key| key.kind.verifies(signed.as_bytes(), &mark));
                let named = |key: &PublicKey| kid.is_some() && key.kid.as_deref() == kid;
                if !genuine && !public.iter().any(named) {
                    return Err(Refusal::UnknownKey);
                }
                genuine
            }
            _ => return Err(Refusal::Invalid("the JWT's algorithm is not accepted")),
        };
        if !genuine {
            return Err(Refusal::Invalid("no key verifies the JWT's signature"));
        }
        let json = decode(claims)
            .and_then(|bytes| String::from_utf8(bytes).ok())
            .ok_or(Refusal::Invalid("the JWT's claims are malformed"))?;
        let Ok(Value::Object(claims)) = serde_json::from_str(&json) else {
            return Err(Refusal::Invalid("the JWT's claims are malformed"));
        };
        checked(json, &claims, now)
    }
}

fn checked(json: String, claims: &Map<String, Value>, now: i64) -> Result<Claims, Refusal> {
    let time = |name| match claims.get(name) {
        None | Some(Value::Null) => Ok(None),
        // Whole seconds; others are written with a fraction.
        Some(value) => value
            .as_i64()
            .or_else(|| value.as_f64().map(|seconds| seconds as i64))
            .map(Some)
            .ok_or(Refusal::Invalid("a time in the JWT is no number")),
    };
    let (expires, begins) = (time("exp")?, time("nbf")?);
    if let Some(expires) = expires.filter(|expires| now > expires.saturating_add(GRACE)) {
        return Err(Refusal::Expired {
            seconds_ago: now.saturating_sub(expires),
        });
    }
    if begins.is_some_and(|begins| begins > now.saturating_add(GRACE)) {
        return Err(Refusal::NotYet);
    }
    let role = claims
        .get("role")
        .and_then(Value::as_str)
        .map(str::to_owned);
    Ok(Claims {
        json,
        role,
        expires,
    })
}

/// Seconds since 1970, as tokens count.
pub(super) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
    })
}

impl Kind {
    fn alg(&self) -> &'static str {
        match self {
            Self::Rsa { .. } => "RS256",
            Self::P256(_) => "ES256",
            Self::Ed25519(_) => "EdDSA",
        }
    }

    fn verifies(&self, signed: &[u8], mark: &[u8]) -> bool {
        let verified = match self {
            Self::Rsa { n, e } => {
                let key = signature::RsaPublicKeyComponents { n, e };
                key.verify(&signature::RSA_PKCS1_2048_8192_SHA256, signed, mark)
            }
            Self::P256(point) => {
                signature::UnparsedPublicKey::new(&signature::ECDSA_P256_SHA256_FIXED, point)
                    .verify(signed, mark)
            }
            Self::Ed25519(point) => {
                signature::UnparsedPublicKey::new(&signature::ED25519, point).verify(signed, mark)
            }
        };
        verified.is_ok()
    }
}

/// Of a set that is ours to mend: one bad key and it is refused.
pub(super) fn public_keys(text: &str) -> Result<Vec<PublicKey>, JwksError> {
    all_keys(text)?.into_iter().collect()
}

/// Of a set that is somebody else's: bad keys are passed over, unless there is no other.
pub(super) fn usable_keys(text: &str) -> Result<(Vec<PublicKey>, Vec<JwksError>), JwksError> {
    let (mut usable, mut bad) = (Vec::new(), Vec::new());
    for key in all_keys(text)? {
        match key {
            Ok(key) => usable.push(key),
            Err(error) => bad.push(error),
        }
    }
    if usable.is_empty() && !bad.is_empty() {
        return Err(bad.swap_remove(0));
    }
    Ok((usable, bad))
}

/// Keys for something else (encryption, other curves) are passed over, as sets carry keys for many.
fn all_keys(text: &str) -> Result<Vec<Result<PublicKey, JwksError>>, JwksError> {
    let set: Value = serde_json::from_str(text)?;
    let keys = set
        .get("keys")
        .and_then(Value::as_array)
        .ok_or(JwksError::NoKeys)?;
    let keys = keys.iter().enumerate();
    Ok(keys
        .filter_map(|(place, key)| public_key(place, key).transpose())
        .collect())
}

fn public_key(place: usize, key: &Value) -> Result<Option<PublicKey>, JwksError> {
    let word = |name| key.get(name).and_then(Value::as_str);
    let refused = |reason| JwksError::Key { place, reason };
    let part = |name, reason| word(name).and_then(decode).ok_or(refused(reason));
    if word("use").is_some_and(|purpose| purpose != "sig") {
        return Ok(None);
    }
    let kind = match (word("kty"), word("crv")) {
        (Some("RSA"), _) => {
            let n = part("n", "`n` is no base64url number")?;
            if n.len() * 8 < RSA_BITS_MIN {
                return Err(refused("an RSA key needs 2048 bits"));
            }
            let e = part("e", "`e` is no base64url number")?;
            Kind::Rsa { n, e }
        }
        (Some("EC"), Some("P-256")) => {
            let (x, y) = (
                part("x", "`x` is no base64url number")?,
                part("y", "`y` is no base64url number")?,
            );
            if x.len() != 32 || y.len() != 32 {
                return Err(refused("`x` and `y` must have 32 bytes"));
            }
            // Uncompressed. (SEC 1, 2.3.3)
            Kind::P256([&[4][..], &x, &y].concat())
        }
        (Some("OKP"), Some("Ed25519")) => {
            let x = part("x", "`x` is no base64url number")?;
            if x.len() != 32 {
                return Err(refused("`x` must have 32 bytes"));
            }
            Kind::Ed25519(x)
        }
        _ => return Ok(None),
    };
    if word("alg").is_some_and(|alg| alg != kind.alg()) {
        return Ok(None);
    }
    Ok(Some(PublicKey {
        kid: word("kid").map(str::to_owned),
        kind,
    }))
}

fn decode(text: &str) -> Option<Vec<u8>> {
    URL_SAFE_NO_PAD
        .decode(text)
        .or_else(|_| URL_SAFE.decode(text))
        .ok()
}

fn object(part: &str) -> Option<Map<String, Value>> {
    serde_json::from_slice(&decode(part)?).ok()
}

#[cfg(test)]
mod tests {
    use ring::rand::SystemRandom;
    use ring::signature::{EcdsaKeyPair, Ed25519KeyPair, KeyPair};

    use super::*;

    const SECRET: &str = "0123456789abcdef0123456789abcdef";
    const NOW: i64 = 1_700_000_000;

    fn encode(bytes: impl AsRef<[u8]>) -> String {
        URL_SAFE_NO_PAD.encode(bytes)
    }

    fn token(header: &str, claims: &str, sign: impl Fn(&[u8]) -> Vec<u8>) -> String {
        let signed = format!("{}.{}", encode(header), encode(claims));
        let mark = sign(signed.as_bytes());
        format!("{signed}.{}", encode(mark))
    }

    fn shared(secret: &str) -> impl Fn(&[u8]) -> Vec<u8> {
        let key = mac::Key::new(mac::HMAC_SHA256, secret.as_bytes());
        move |signed| mac::sign(&key, signed).as_ref().to_vec()
    }

    fn keys() -> Keys {
        Keys::new(Some(SECRET))
    }

    #[track_caller]
    fn refused(keys: &Keys, token: &str) -> String {
        refused_by(keys, &[], token)
    }

    #[track_caller]
    fn refused_by(keys: &Keys, public: &[PublicKey], token: &str) -> String {
        let refused = keys.verify(Some(public), token, NOW);
        refused.unwrap_err().to_string()
    }

    #[test]
    fn a_token_of_the_shared_secret_is_believed_until_it_expires() {
        let claims = format!("{{\"role\":\"anon\",\"sub\":\"é\",\"exp\":{NOW}}}");
        let signed = token(
            r#"{"alg":"HS256","kid":"unknown"}"#,
            &claims,
            shared(SECRET),
        );
        let verified = keys().verify(None, &signed, NOW + 30).unwrap();
        assert_eq!(
            (verified.role.as_deref(), verified.expires, verified.json),
            (Some("anon"), Some(NOW), claims)
        );
        assert_eq!(
            keys().verify(None, &signed, NOW + 31).unwrap_err(),
            Refusal::Expired { seconds_ago: 31 }
        );
        let early = format!("{{\"nbf\":{}}}", NOW + 31);
        let early = token(r#"{"alg":"HS256"}"#, &early, shared(SECRET));
        assert_eq!(
            keys().verify(None, &early, NOW).unwrap_err(),
            Refusal::NotYet
        );
        assert!(keys().verify(None, &early, NOW + 1).is_ok());
    }

    #[test]
    fn what_is_forged_or_malformed_is_refused() {
        let hs = r#"{"alg":"HS256"}"#;
        let good = token(hs, r#"{"role":"anon"}"#, shared(SECRET));
        assert!(keys().verify(None, &good, NOW).is_ok());
        let forged = token(
            hs,
            r#"{"role":"postgres"}"#,
            shared("another secret of 32 bytes or so"),
        );
        assert_eq!(
            refused(&keys(), &forged),
            "no key verifies the JWT's signature"
        );
        let mut parts: Vec<&str> = good.split('.').collect();
        let swapped = encode(r#"{"role":"postgres"}"#);
        parts[1] = &swapped;
        assert_eq!(
            refused(&keys(), &parts.join(".")),
            "no key verifies the JWT's signature"
        );
        for header in [r#"{"alg":"none"}"#, r#"{"alg":"HS512"}"#, "{}"] {
            let unsigned = token(header, "{}", |_| Vec::new());
            assert_eq!(
                refused(&keys(), &unsigned),
                "the JWT's algorithm is not accepted",
                "{header}"
            );
        }
        let critical = token(r#"{"alg":"HS256","crit":["b64"]}"#, "{}", shared(SECRET));
        assert_eq!(
            refused(&keys(), &critical),
            "the JWT has critical extensions"
        );
        for (text, why) in [
            ("", "expected 3 parts in JWT"),
            ("a.b", "expected 3 parts in JWT"),
            ("a.b.c.d", "expected 3 parts in JWT"),
            ("é.b.c", "the JWT's header is malformed"),
            ("e30.e30.%", "the JWT's signature is malformed"),
            (&"x".repeat(20_000), "the JWT is too long"),
        ] {
            assert_eq!(refused(&keys(), text), why, "{text}");
        }
        for claims in ["[]", "{", "\u{1}"] {
            let malformed = token(hs, claims, shared(SECRET));
            assert_eq!(
                refused(&keys(), &malformed),
                "the JWT's claims are malformed"
            );
        }
        let time = token(hs, r#"{"exp":"soon"}"#, shared(SECRET));
        assert_eq!(refused(&keys(), &time), "a time in the JWT is no number");
        assert_eq!(
            refused(&Keys::default(), &good),
            "no secret to verify the JWT with"
        );
    }

    #[test]
    fn public_keys_verify_by_kid_and_never_as_a_shared_secret() {
        let random = SystemRandom::new();
        let edwards = Ed25519KeyPair::generate_pkcs8(&random).unwrap();
        let edwards = Ed25519KeyPair::from_pkcs8(edwards.as_ref()).unwrap();
        let fixed = &signature::ECDSA_P256_SHA256_FIXED_SIGNING;
        let curve = EcdsaKeyPair::generate_pkcs8(fixed, &random).unwrap();
        let curve = EcdsaKeyPair::from_pkcs8(fixed, curve.as_ref(), &random).unwrap();
        let point = curve.public_key().as_ref();
        let x = encode(edwards.public_key());
        let set = serde_json::json!({"keys": [
            {"kty": "OKP", "crv": "Ed25519", "kid": "ed", "x": x},
            {"kty": "EC", "crv": "P-256", "kid": "ec", "x": encode(&point[1..33]), "y": encode(&point[33..])},
            {"kty": "oct", "k": "AAAA"},
            {"kty": "EC", "crv": "P-521", "x": "AA", "y": "AA"},
        ]});
        let keys = keys();
        let public = public_keys(&set.to_string()).unwrap();
        assert_eq!(public.len(), 2);
        let by_edwards = |signed: &[u8]| edwards.sign(signed).as_ref().to_vec();
        let by_curve = |signed: &[u8]| curve.sign(&random, signed).unwrap().as_ref().to_vec();
        let claims = r#"{"role":"r"}"#;
        let good = token(r#"{"alg":"EdDSA","kid":"ed"}"#, claims, by_edwards);
        assert_eq!(
            keys.verify(Some(&public), &good, NOW)
                .unwrap()
                .role
                .as_deref(),
            Some("r")
        );
        let good = token(r#"{"alg":"ES256"}"#, claims, by_curve);
        assert!(keys.verify(Some(&public), &good, NOW).is_ok());
        let of_another = token(r#"{"alg":"ES256","kid":"else"}"#, claims, by_curve);
        assert_eq!(
            refused_by(&keys, &public, &of_another),
            "no key verifies the JWT's signature"
        );
        // The public key's bytes, which all may know, as if they were a secret.
        let confused = token(r#"{"alg":"HS256","kid":"ed"}"#, claims, shared(&x));
        assert_eq!(
            refused_by(&keys, &public, &confused),
            "no key verifies the JWT's signature"
        );
        let problems = [
            ("{}", "has no array `keys`"),
            (
                r#"{"keys":[{"kty":"RSA","n":"AQAB","e":"AQAB"}]}"#,
                "key 0: an RSA key needs 2048 bits",
            ),
            (
                r#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"AA"}]}"#,
                "key 0: `x` must have 32 bytes",
            ),
        ];
        for (text, problem) in problems {
            assert_eq!(public_keys(text).unwrap_err().to_string(), problem);
            assert_eq!(usable_keys(text).unwrap_err().to_string(), problem);
        }
        let mixed = serde_json::json!({"keys": [
            {"kty": "RSA", "n": "AQAB", "e": "AQAB"},
            {"kty": "OKP", "crv": "Ed25519", "kid": "ed", "x": x},
        ]})
        .to_string();
        assert!(public_keys(&mixed).is_err());
        let (usable, bad) = usable_keys(&mixed).unwrap();
        assert_eq!(usable.len(), 1);
        assert_eq!(bad[0].to_string(), "key 0: an RSA key needs 2048 bits");
    }
}
