//! What the operator may write: the TOML exactly as spelled, section by section, every key optional. A key is added
//! here, given a meaning in `mod.rs`, checked in `check.rs` and explained in `config/flowgate.toml`. Judges nothing but
//! the type of a value. Read by `check.rs` alone.

use std::collections::BTreeSet;
use std::fmt;

use serde::de;
use serde::{Deserialize, Deserializer, Serialize};

/// Sections written in double brackets, once for each.
pub(super) const LISTS: [&str; 3] = ["replica", "access", "role"];

/// The whole file. `Serialize` is there for `key_paths`: the structs themselves are the list of valid keys.
#[derive(Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct File {
    pub(super) listen: Listen,
    pub(super) primary: Upstream,
    pub(super) replica: Vec<Upstream>,
    pub(super) auth: Auth,
    pub(super) access: Vec<Access>,
    pub(super) console: Console,
    pub(super) pool: Pool,
    pub(super) role: Vec<Role>,
    pub(super) replication: Replication,
    pub(super) cluster: Cluster,
    pub(super) route: Route,
    pub(super) cache: Cache,
    pub(super) poll: Poll,
    pub(super) shed: Shed,
    pub(super) events: Events,
    pub(super) http: Http,
    pub(super) maintenance: Maintenance,
    pub(super) log: Log,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Listen {
    pub(super) postgres: Option<String>,
    pub(super) http: Option<String>,
    pub(super) tls: Option<String>,
    pub(super) tls_cert: Option<String>,
    pub(super) tls_key: Option<String>,
    pub(super) tls_client_ca: Option<String>,
    pub(super) proxy_protocol: Option<String>,
    pub(super) proxy_protocol_from: Option<Vec<String>>,
    pub(super) threads: Option<i64>,
    pub(super) reuse_port: Option<bool>,
    pub(super) login_timeout: Option<Span>,
    pub(super) drain_timeout: Option<Span>,
}

/// `[primary]` and each `[[replica]]`.
#[derive(Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Upstream {
    pub(super) url: Option<String>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Auth {
    pub(super) method: Option<String>,
    pub(super) users_file: Option<String>,
    pub(super) query: Option<String>,
    pub(super) allow_trust_anywhere: Option<bool>,
}

/// Each `[[access]]`.
#[derive(Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Access {
    pub(super) database: Option<OneOrMore>,
    pub(super) user: Option<OneOrMore>,
    pub(super) address: Option<OneOrMore>,
    pub(super) method: Option<String>,
    pub(super) tls: Option<String>,
    pub(super) cert_name: Option<String>,
}

/// Each `[[role]]`.
#[derive(Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Role {
    pub(super) name: Option<String>,
    pub(super) priority: Option<String>,
    pub(super) max_servers: Option<i64>,
    pub(super) stale: Option<bool>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Replication {
    pub(super) max_connections: Option<i64>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Cluster {
    pub(super) address: Option<String>,
    pub(super) peers: Option<Vec<String>>,
    pub(super) forwards_max: Option<i64>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Console {
    pub(super) admin_users: Option<Vec<String>>,
    pub(super) stats_users: Option<Vec<String>>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Pool {
    pub(super) mode: Option<String>,
    pub(super) size: Option<i64>,
    pub(super) min_size: Option<i64>,
    pub(super) reserve_size: Option<i64>,
    pub(super) reserve_timeout: Option<Span>,
    pub(super) max_server_connections: Option<i64>,
    pub(super) connects_at_once: Option<i64>,
    pub(super) max_clients: Option<i64>,
    pub(super) checkout_timeout: Option<Span>,
    pub(super) notice_after: Option<Span>,
    pub(super) connect_timeout: Option<Span>,
    pub(super) server_idle: Option<Span>,
    pub(super) server_lifetime: Option<Span>,
    pub(super) server_check: Option<Span>,
    pub(super) dns_ttl: Option<Span>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Route {
    pub(super) reads: Option<String>,
    pub(super) consistency: Option<String>,
    pub(super) replica_wait_ms: Option<i64>,
    pub(super) sample_ms: Option<i64>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Cache {
    pub(super) max_age_ms: Option<i64>,
    pub(super) max_bytes: Option<i64>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Poll {
    pub(super) park: Option<bool>,
    pub(super) probe_ms: Option<i64>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Shed {
    pub(super) max_stale_ms: Option<i64>,
    pub(super) target_ms: Option<i64>,
    pub(super) window_ms: Option<i64>,
    pub(super) adaptive: Option<bool>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Events {
    pub(super) wake: Option<String>,
    pub(super) retention: Option<Span>,
    pub(super) direct_notify: Option<bool>,
    pub(super) queue: Option<i64>,
    pub(super) probe: Option<Span>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Http {
    pub(super) max_connections: Option<i64>,
    pub(super) pool_size: Option<i64>,
    pub(super) header_timeout: Option<Span>,
    pub(super) write_timeout: Option<Span>,
    pub(super) recheck: Option<Span>,
    pub(super) jwt_secret: Option<String>,
    pub(super) jwks: Option<String>,
    pub(super) api_keys: Option<Vec<ApiKey>>,
    pub(super) anon_role: Option<String>,
    pub(super) cors: Option<Vec<String>>,
}

/// One of `http.api_keys`.
#[derive(Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ApiKey {
    pub(super) key: String,
    pub(super) role: String,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Maintenance {
    pub(super) requeue: Option<Span>,
    pub(super) prune_after: Option<Span>,
}

#[derive(Default, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Log {
    pub(super) filter: Option<String>,
}

/// A duration as written, `"20ms"` or `"7d"`: a string, read by `check.rs`. A type of its own so that `5` is refused with
/// the words that help.
#[derive(Serialize)]
pub(super) struct Span(pub(super) String);

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl de::Visitor<'_> for Text {
            type Value = Span;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a duration in quotes, such as \"20ms\", \"5s\" or \"7d\"")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Span, E> {
                Ok(Span(text.to_owned()))
            }
        }
        deserializer.deserialize_str(Text)
    }
}

/// `"all"` or `["one", "two"]`.
#[derive(Serialize)]
#[serde(untagged)]
pub(super) enum OneOrMore {
    One(String),
    More(Vec<String>),
}

impl<'de> Deserialize<'de> for OneOrMore {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Texts;
        impl<'de> de::Visitor<'de> for Texts {
            type Value = OneOrMore;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string in quotes, or an array of them")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<OneOrMore, E> {
                Ok(OneOrMore::One(text.to_owned()))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut list: A) -> Result<OneOrMore, A::Error> {
                let mut texts = Vec::new();
                while let Some(text) = list.next_element()? {
                    texts.push(text);
                }
                Ok(OneOrMore::More(texts))
            }
        }
        deserializer.deserialize_any(Texts)
    }
}

/// Every valid key, as `section.key`; `replica.url` stands for each replica's, `access.…` for each rule's, and so on.
pub(super) fn key_paths() -> BTreeSet<String> {
    let file = File {
        replica: vec![Upstream::default()],
        access: vec![Access::default()],
        role: vec![Role::default()],
        ..File::default()
    };
    let file = serde_json::to_value(file).expect("options and strings serialize");
    let sections = file.as_object().into_iter().flatten();
    let keys = sections.flat_map(|(section, body)| {
        let body = body.get(0).unwrap_or(body).as_object();
        body.into_iter()
            .flatten()
            .map(move |(key, _value)| format!("{section}.{key}"))
    });
    keys.collect()
}
