//! Who asks: a JWT's role, an API key's, or the one for strangers. Decides nothing about what that role may see
//! (`sight.rs`) and never asks the database. Called by every surface of `http` but health and metrics.

use std::sync::Arc;

use axum::http::header::AUTHORIZATION;
use axum::http::{HeaderMap, StatusCode};
use serde_json::{Map, Value, json};
use subtle::ConstantTimeEq;

use super::jwks::Jwks;
use super::jwt::{self, Claims, JwksError, Keys, Refusal};
use crate::config;
use crate::metrics::Registry;
use crate::server::questions::Asker;

/// What a role and its claims are, for one request or one stream.
#[derive(Debug)]
pub(super) struct Identity {
    /// With `request.jwt.claims`, the role in them.
    pub(super) asker: Asker,
    /// Seconds since 1970.
    pub(super) expires: Option<i64>,
    /// Brought nothing of its own: "log in" rather than "you may not".
    pub(super) anonymous: bool,
}

/// Why somebody is nobody: 401, or 503 while nobody can say.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub(super) struct Unauthorized {
    pub(super) status: StatusCode,
    pub(super) code: &'static str,
    pub(super) message: String,
}

/// What somebody brought.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Credentials<'a> {
    /// Of `Authorization: Bearer`.
    pub(super) token: Option<&'a str>,
    pub(super) key: Option<&'a str>,
}

pub(super) struct Guard {
    keys: Keys,
    jwks: Jwks,
    api_keys: Vec<(String, Arc<Identity>)>,
    stranger: Option<Arc<Identity>>,
}

impl Guard {
    pub(super) fn new(config: &config::Http, registry: &Registry) -> Result<Self, JwksError> {
        let stranger_role = config.anon_role.as_deref();
        let of_role = |role: &str| {
            let claims = json!({ "role": role }).to_string();
            let anonymous = role == "anon" || stranger_role == Some(role);
            Arc::new(Identity::new(role.to_owned(), claims, None, anonymous))
        };
        let secret = config.jwt_secret.as_ref().map(config::Secret::expose);
        Ok(Self {
            keys: Keys::new(secret),
            jwks: Jwks::new(config.jwks.as_ref(), registry)?,
            api_keys: config
                .api_keys
                .iter()
                .map(|key| (key.key.expose().to_owned(), of_role(&key.role)))
                .collect(),
            stranger: stranger_role.map(of_role),
        })
    }

    /// The token counts; a token that is really a key is that key; without a token the key counts; without either they are a
    /// stranger.
    pub(super) async fn identify(
        &self,
        credentials: Credentials<'_>,
    ) -> Result<Arc<Identity>, Unauthorized> {
        match (credentials.token, credentials.key) {
            (Some(word), _) | (None, Some(word)) => self.known(word).await,
            (None, None) => self.stranger.clone().ok_or_else(|| {
                invalid(
                    "no API key or JWT was sent, and http.anon_role lets in nobody without"
                        .to_owned(),
                )
            }),
        }
    }

    /// Of a key or a token, whatever it was sent as.
    pub(super) async fn known(&self, word: &str) -> Result<Arc<Identity>, Unauthorized> {
        let same = |key: &str| bool::from(key.as_bytes().ct_eq(word.as_bytes()));
        if let Some((_, identity)) = self.api_keys.iter().find(|(key, _)| same(key)) {
            return Ok(Arc::clone(identity));
        }
        if word.starts_with("sb_") || !word.contains('.') {
            return Err(invalid("unknown API key".to_owned()));
        }
        let verified = match self.verify(word) {
            Err(Refusal::UnknownKey | Refusal::NoKeysYet) => {
                Box::pin(self.jwks.look_again()).await;
                self.verify(word)
            }
            other => other,
        };
        let claims = verified.map_err(|refusal| {
            let (status, code) = match refusal {
                Refusal::Invalid(_) | Refusal::UnknownKey => (StatusCode::UNAUTHORIZED, "PGRST301"),
                Refusal::Expired { .. } | Refusal::NotYet => (StatusCode::UNAUTHORIZED, "PGRST303"),
                Refusal::NoKeysYet => (StatusCode::SERVICE_UNAVAILABLE, "57P03"),
            };
            let message = refusal.to_string();
            Unauthorized {
                status,
                code,
                message,
            }
        })?;
        self.of_claims(claims)
    }

    fn verify(&self, token: &str) -> Result<Claims, Refusal> {
        let public = self.jwks.known();
        self.keys.verify(public.as_deref(), token, jwt::now())
    }

    /// Fetches keys where they have to be fetched, until dropped.
    pub(super) async fn keep_keys(&self) {
        self.jwks.keep().await;
    }

    fn of_claims(&self, claims: Claims) -> Result<Arc<Identity>, Unauthorized> {
        let Claims {
            json,
            role,
            expires,
        } = claims;
        let Some(role) = role.filter(|role| !role.is_empty()) else {
            let stranger = self
                .stranger
                .as_ref()
                .ok_or_else(|| invalid("the JWT has no role claim".to_owned()))?;
            let mut claims: Map<String, Value> = serde_json::from_str(&json).unwrap_or_default();
            claims.insert("role".to_owned(), stranger.asker.role.as_str().into());
            let claims = Value::Object(claims).to_string();
            let role = stranger.asker.role.clone();
            return Ok(Arc::new(Identity::new(role, claims, expires, true)));
        };
        // Postgres' text has no NUL.
        if role.contains('\0') || json.contains('\0') {
            return Err(invalid("the JWT's role is no role".to_owned()));
        }
        let strangers = self.stranger.as_ref().map(|stranger| &stranger.asker.role);
        let anonymous = role == "anon" || strangers == Some(&role);
        Ok(Arc::new(Identity::new(role, json, expires, anonymous)))
    }
}

fn invalid(message: String) -> Unauthorized {
    Unauthorized {
        status: StatusCode::UNAUTHORIZED,
        code: "PGRST301",
        message,
    }
}

impl Identity {
    fn new(role: String, claims: String, expires: Option<i64>, anonymous: bool) -> Self {
        let settings = vec![("request.jwt.claims".to_owned(), claims)];
        Self {
            asker: Asker::new(role, settings),
            expires,
            anonymous,
        }
    }

    /// How long from now; `None`: for good.
    pub(super) fn expires_in(&self) -> Option<std::time::Duration> {
        let left = self.expires?.saturating_sub(jwt::now());
        Some(std::time::Duration::from_secs(
            u64::try_from(left).unwrap_or(0),
        ))
    }
}

/// What the headers bring. A header that is no text brings nothing that could be verified, so it is as good as a wrong one.
pub(super) fn of_headers(headers: &HeaderMap) -> Credentials<'_> {
    let text = |name: &str| {
        headers
            .get(name)
            .map(|value| value.to_str().unwrap_or("?").trim())
    };
    let token = text(AUTHORIZATION.as_str()).map(|value| {
        let (scheme, token) = value.split_once(' ').unwrap_or(("", value));
        if scheme.eq_ignore_ascii_case("bearer") {
            token.trim()
        } else {
            "?"
        }
    });
    Credentials {
        token,
        key: text("apikey").or_else(|| text("x-api-key")),
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroUsize;
    use std::time::Duration;

    use crate::config::{ApiKey, Http, Secret};

    use super::*;

    fn guard(anon_role: Option<&str>) -> Guard {
        let http = Http {
            max_connections: NonZeroUsize::MIN,
            pool_size: NonZeroUsize::MIN,
            header_timeout: Duration::ZERO,
            write_timeout: Duration::ZERO,
            recheck: Duration::ZERO,
            jwt_secret: None,
            jwks: None,
            api_keys: vec![ApiKey {
                key: Secret::new("sb_publishable_x".into()),
                role: "web".into(),
            }],
            anon_role: anon_role.map(str::to_owned),
            cors: Vec::new(),
        };
        Guard::new(&http, &Registry::new()).unwrap()
    }

    async fn check(guard: &Guard, headers: &[(&str, &str)], expected: &str) {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            let name: axum::http::HeaderName = name.parse().unwrap();
            map.insert(name, value.parse().unwrap());
        }
        let got = match guard.identify(of_headers(&map)).await {
            Ok(identity) => format!("{} {}", identity.asker.role, identity.asker.settings[0].1),
            Err(refused) => format!("{} {}", refused.code, refused.message),
        };
        assert_eq!(got, expected);
    }

    #[tokio::test]
    async fn a_key_has_a_role_and_a_stranger_only_where_there_is_one_for_strangers() {
        let (open, closed) = (guard(Some("guest")), guard(None));
        let web = r#"web {"role":"web"}"#;
        check(&open, &[], r#"guest {"role":"guest"}"#).await;
        check(
            &closed,
            &[],
            "PGRST301 no API key or JWT was sent, and http.anon_role lets in nobody without",
        )
        .await;
        check(&closed, &[("apikey", "sb_publishable_x")], web).await;
        check(&closed, &[("x-api-key", "sb_publishable_x")], web).await;
        check(
            &closed,
            &[("authorization", "bearer sb_publishable_x")],
            web,
        )
        .await;
        // What was brought counts, if it is wrong too.
        check(
            &open,
            &[("apikey", "sb_publishable_y")],
            "PGRST301 unknown API key",
        )
        .await;
        check(
            &open,
            &[("authorization", "Basic eDp5")],
            "PGRST301 unknown API key",
        )
        .await;
        check(
            &open,
            &[
                ("authorization", "Bearer a.b.c"),
                ("apikey", "sb_publishable_x"),
            ],
            "PGRST301 the JWT's header is malformed",
        )
        .await;
    }
}
