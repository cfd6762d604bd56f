//! Keys from a URL: a server that has them, has others, is away, or says something else.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use flowgate::config::Jwks;
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair, RSA_PKCS1_SHA256,
    RsaKeyPair,
};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::support::core::Core;
use crate::support::http::{Roles, bearer, get, now, serving};
use crate::support::proxy::Proxy;
use crate::support::wait::wait_until;

const MINUTE: Duration = Duration::from_secs(120);

enum Signer {
    Curve(EcdsaKeyPair),
    Edwards(Ed25519KeyPair),
    Rsa(RsaKeyPair),
}

/// A key of somebody who makes tokens.
struct Issuer {
    kid: &'static str,
    signer: Signer,
}

fn encode(bytes: impl AsRef<[u8]>) -> String {
    URL_SAFE_NO_PAD.encode(bytes)
}

impl Issuer {
    fn curve(kid: &'static str) -> Self {
        let random = SystemRandom::new();
        let kind = &ECDSA_P256_SHA256_FIXED_SIGNING;
        let made = EcdsaKeyPair::generate_pkcs8(kind, &random).unwrap();
        let pair = EcdsaKeyPair::from_pkcs8(kind, made.as_ref(), &random).unwrap();
        let signer = Signer::Curve(pair);
        Self { kid, signer }
    }

    fn edwards(kid: &'static str) -> Self {
        let made = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        let signer = Signer::Edwards(Ed25519KeyPair::from_pkcs8(made.as_ref()).unwrap());
        Self { kid, signer }
    }

    /// Of a file: ring makes none.
    fn rsa(kid: &'static str) -> Self {
        let pem = include_str!("support/rsa_test_key.pem");
        let lines = pem.lines().filter(|line| !line.starts_with("-----"));
        let der = base64::engine::general_purpose::STANDARD
            .decode(lines.collect::<String>())
            .unwrap();
        let signer = Signer::Rsa(RsaKeyPair::from_pkcs8(&der).unwrap());
        Self { kid, signer }
    }

    fn public(&self) -> Value {
        match &self.signer {
            Signer::Curve(pair) => {
                let point = pair.public_key().as_ref();
                json!({"kty": "EC", "crv": "P-256", "kid": self.kid, "x": encode(&point[1..33]), "y": encode(&point[33..])})
            }
            Signer::Edwards(pair) => {
                json!({"kty": "OKP", "crv": "Ed25519", "kid": self.kid, "x": encode(pair.public_key())})
            }
            Signer::Rsa(pair) => {
                let public = ring::rsa::PublicKeyComponents::<Vec<u8>>::from(pair.public());
                json!({"kty": "RSA", "kid": self.kid, "n": encode(&public.n), "e": encode(&public.e)})
            }
        }
    }

    /// As a header.
    fn bearer(&self, role: &str) -> String {
        let random = SystemRandom::new();
        let alg = match &self.signer {
            Signer::Curve(_) => "ES256",
            Signer::Edwards(_) => "EdDSA",
            Signer::Rsa(_) => "RS256",
        };
        let header = json!({"alg": alg, "kid": self.kid}).to_string();
        let claims = json!({"role": role, "exp": now() + 3600}).to_string();
        let signed = format!("{}.{}", encode(header), encode(claims));
        let mark = match &self.signer {
            Signer::Curve(pair) => {
                let mark = pair.sign(&random, signed.as_bytes()).unwrap();
                encode(mark)
            }
            Signer::Edwards(pair) => encode(pair.sign(signed.as_bytes())),
            Signer::Rsa(pair) => {
                let mut mark = vec![0; pair.public().modulus_len()];
                pair.sign(&RSA_PKCS1_SHA256, &random, signed.as_bytes(), &mut mark)
                    .unwrap();
                encode(mark)
            }
        };
        format!("authorization: Bearer {signed}.{mark}")
    }
}

/// What the server of keys answers.
#[derive(Clone)]
enum Says {
    Set(String),
    Raw(String),
    /// Closes.
    Nothing,
    /// Never.
    Silence,
}

struct Keys {
    at: SocketAddr,
    says: Arc<Mutex<(Says, u64)>>,
}

impl Keys {
    async fn start(says: Says) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let at = listener.local_addr().unwrap();
        let says = Arc::new(Mutex::new((says, 0)));
        let shared = Arc::clone(&says);
        tokio::spawn(async move {
            loop {
                let (mut socket, _) = listener.accept().await.unwrap();
                let answer = {
                    let mut says = shared.lock().unwrap();
                    says.1 += 1;
                    says.0.clone()
                };
                tokio::spawn(async move {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        if socket.read_buf(&mut head).await.unwrap_or(0) == 0 {
                            return;
                        }
                    }
                    let head = String::from_utf8(head).unwrap();
                    assert!(head.starts_with("GET /keys?of=us HTTP/1.1\r\n"), "{head}");
                    assert!(head.contains(&format!("host: {at}\r\n")), "{head}");
                    let answer = match answer {
                        Says::Set(set) => format!(
                            "HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{set}",
                            set.len()
                        ),
                        Says::Raw(raw) => raw,
                        Says::Nothing => return,
                        Says::Silence => return std::future::pending().await,
                    };
                    drop(socket.write_all(answer.as_bytes()).await);
                    // Whatever of it is wanted.
                    drop(socket.shutdown().await);
                    drop(socket.read_to_end(&mut Vec::new()).await);
                });
            }
        });
        Self { at, says }
    }

    fn say(&self, says: Says) {
        self.says.lock().unwrap().0 = says;
    }

    fn asked(&self) -> u64 {
        self.says.lock().unwrap().1
    }

    fn source(&self) -> Option<Jwks> {
        let url = format!("http://{}/keys?of=us", self.at);
        Some(Jwks::Url(url.parse().unwrap()))
    }
}

fn set(issuers: &[&Issuer]) -> Says {
    let keys: Vec<Value> = issuers.iter().map(|issuer| issuer.public()).collect();
    Says::Set(json!({ "keys": keys }).to_string())
}

async fn until_let_in(at: SocketAddr, token: &str) {
    wait_until("the key is known", MINUTE, async || {
        get(at, "/runs", &[token]).await.status == 200
    })
    .await;
}

async fn until_failed(proxy: &Proxy, more_than: u64) {
    wait_until("another failure", MINUTE, async || {
        failures(proxy) > more_than
    })
    .await;
}

fn failures(proxy: &Proxy) -> u64 {
    proxy.metric("flowgate_http_jwks_fetches_total{result=\"failed\"}")
}

#[tokio::test]
async fn keys_of_a_url_are_fetched_and_fetched_again_when_they_rotate() {
    let core = Core::new().await;
    let roles = Roles::make(&core.db, &core.client).await;
    let (first, second) = (Issuer::curve("first"), Issuer::edwards("second"));
    let third = Issuer::rsa("third");
    let keys = Keys::start(set(&[&first])).await;
    let (proxy, at) = serving(&core.db, &roles, |config| {
        config.http.jwks = keys.source();
    })
    .await;
    until_let_in(at, &first.bearer(&roles.reader)).await;
    let unknown = second.bearer(&roles.reader);
    let refused = get(at, "/runs", &[&unknown]).await;
    assert_eq!(refused.refusal(), "401 PGRST301");
    // One key of the set is of no use; the others are.
    let Says::Set(mixed) = set(&[&first]) else {
        unreachable!()
    };
    let odd = "{\"keys\":[{\"kty\":\"RSA\",\"kid\":\"odd\",\"n\":\"AQAB\",\"e\":\"AQAB\"},";
    keys.say(Says::Set(mixed.replacen("{\"keys\":[", odd, 1)));
    let before = proxy.metric("flowgate_http_jwks_fetches_total{result=\"ok\"}");
    wait_until("they are fetched", MINUTE, async || {
        get(at, "/runs", &[&unknown]).await;
        proxy.metric("flowgate_http_jwks_fetches_total{result=\"ok\"}") > before
    })
    .await;
    assert_eq!(
        get(at, "/runs", &[&first.bearer(&roles.reader)])
            .await
            .status,
        200
    );
    assert_eq!(proxy.metric("flowgate_http_jwks_keys"), 1);
    // It rotates: both for a while, then the new one alone.
    keys.say(set(&[&first, &second, &third]));
    until_let_in(at, &unknown).await;
    until_let_in(at, &third.bearer(&roles.reader)).await;
    until_let_in(at, &first.bearer(&roles.reader)).await;
    assert_eq!(proxy.metric("flowgate_http_jwks_keys"), 3);
    keys.say(set(&[&second]));
    let lost = Issuer::curve("lost").bearer(&roles.reader);
    wait_until("the first key goes", MINUTE, async || {
        get(at, "/runs", &[&lost]).await;
        let old = get(at, "/runs", &[&first.bearer(&roles.reader)]).await;
        old.status == 401
    })
    .await;
    until_let_in(at, &unknown).await;
    // The same name and another's signature.
    let forged = Issuer::edwards("second").bearer(&roles.reader);
    let refused = get(at, "/runs", &[&forged]).await;
    assert_eq!(refused.refusal(), "401 PGRST301");
    proxy.shut_down().await;
}

#[tokio::test]
async fn whatever_tokens_name_their_keys_are_asked_for_now_and_then() {
    let core = Core::new().await;
    let roles = Roles::make(&core.db, &core.client).await;
    let known = Issuer::curve("known");
    let keys = Keys::start(set(&[&known])).await;
    let (proxy, at) = serving(&core.db, &roles, |config| {
        config.http.jwks = keys.source();
    })
    .await;
    until_let_in(at, &known.bearer(&roles.reader)).await;
    let began = std::time::SystemTime::now();
    let before = keys.asked();
    for _ in 0..200 {
        let unknown = Issuer::curve("unknown").bearer(&roles.reader);
        assert_eq!(get(at, "/runs", &[&unknown]).await.status, 401);
    }
    // One in two seconds at most.
    let seconds = began.elapsed().unwrap().as_secs();
    let asked = keys.asked() - before;
    assert!(asked <= seconds / 2 + 2, "{asked} in {seconds} s");
    proxy.shut_down().await;
}

#[tokio::test]
async fn where_keys_cannot_be_had_tokens_wait_and_what_was_known_stays_known() {
    let core = Core::new().await;
    let roles = Roles::make(&core.db, &core.client).await;
    let issuer = Issuer::curve("only");
    let keys = Keys::start(Says::Nothing).await;
    let (proxy, at) = serving(&core.db, &roles, |config| {
        config.http.jwks = keys.source();
    })
    .await;
    // It serves; of these tokens nobody can say.
    let token = issuer.bearer(&roles.reader);
    let waiting = get(at, "/runs", &[&token]).await;
    assert_eq!(waiting.refusal(), "503 57P03");
    assert_eq!(get(at, "/healthz", &[]).await.body, "ok\n");
    let others = get(at, "/runs", &[&bearer(&roles.reader)]).await;
    assert_eq!(others.status, 200, "the shared secret needs no URL");
    keys.say(set(&[&issuer]));
    until_let_in(at, &token).await;
    let big = format!("{{\"keys\":[],\"x\":\"{}\"}}", "x".repeat(300_000));
    let endless = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{\"key";
    let answers = [
        Says::Nothing,
        Says::Silence,
        Says::Set(big),
        Says::Set("no JSON".to_owned()),
        Says::Set("{\"keys\":[{\"kty\":\"RSA\",\"n\":\"AQAB\",\"e\":\"AQAB\"}]}".to_owned()),
        Says::Raw("HTTP/1.1 500 Oops\r\ncontent-length: 0\r\n\r\n".to_owned()),
        Says::Raw(format!(
            "HTTP/1.1 302 Found\r\nlocation: http://{}/keys?of=us\r\ncontent-length: 0\r\n\r\n",
            keys.at
        )),
        Says::Raw("\0\u{1}garbage".to_owned()),
        Says::Raw(endless.to_owned()),
    ];
    let lost = Issuer::curve("lost").bearer(&roles.reader);
    for answer in answers {
        keys.say(answer);
        let before = failures(&proxy);
        // Makes it look again.
        get(at, "/runs", &[&lost]).await;
        until_failed(&proxy, before).await;
        assert_eq!(get(at, "/runs", &[&token]).await.status, 200);
    }
    keys.say(set(&[&Issuer::edwards("new")]));
    wait_until("it is well again", MINUTE, async || {
        get(at, "/runs", &[&lost]).await;
        get(at, "/runs", &[&token]).await.status == 401
    })
    .await;
    proxy.shut_down().await;
}
