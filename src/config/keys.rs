//! Every key with its value in force, for people: what `SHOW CONFIG` says, and which changes a reload cannot bring. A test holds
//! the table to `raw.rs`. Never shows a password or key. Called by the console and by whoever reloads.

use std::fmt::Debug;
use std::path::PathBuf;
use std::time::Duration;

use super::check::spell;
use super::{
    AccessRule, Addresses, Cidr, Config, ConnectUrl, DatabaseName, Jwks, Listen, Names, Role, Route,
};

/// One key as it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key {
    /// `pool.size`
    pub name: &'static str,
    pub value: String,
    /// A reload changes it; otherwise a restart does.
    pub live: bool,
}

/// When a changed value counts.
#[derive(Clone, Copy, PartialEq, Eq)]
enum When {
    Reload,
    Restart,
}
use When::{Reload, Restart};

struct Row {
    name: &'static str,
    when: When,
    show: fn(&Config) -> String,
    same: fn(&Config, &Config) -> bool,
}

/// `row!("section.key", when, how to show it, field)`
macro_rules! row {
    ($name:literal, $when:expr, $show:ident, $($field:ident).+) => {
        Row {
            name: $name,
            when: $when,
            show: |config| $show(&config.$($field).+),
            same: |one, other| one.$($field).+ == other.$($field).+,
        }
    };
}

const ROWS: &[Row] = &[
    row!("listen.postgres", Restart, plain, listen.postgres),
    row!("listen.http", Restart, or_off, listen.http),
    row!("listen.tls", Reload, word, listen.tls),
    row!("listen.tls_cert", Reload, path, listen.tls_cert),
    row!("listen.tls_key", Reload, path, listen.tls_key),
    row!("listen.tls_client_ca", Reload, path, listen.tls_client_ca),
    row!("listen.proxy_protocol", Reload, word, listen.proxy_protocol),
    row!(
        "listen.proxy_protocol_from",
        Reload,
        ranges,
        listen.proxy_protocol_from
    ),
    row!("listen.threads", Restart, plain, listen.threads),
    row!("listen.reuse_port", Restart, plain, listen.reuse_port),
    row!("listen.login_timeout", Reload, span, listen.login_timeout),
    row!("listen.drain_timeout", Reload, span, listen.drain_timeout),
    row!("primary.url", Restart, plain, primary),
    row!("replica.url", Reload, urls, replicas),
    row!("auth.method", Reload, word, auth.method),
    row!("auth.users_file", Reload, path, auth.users_file),
    row!("auth.query", Reload, plain, auth.query),
    row!(
        "auth.allow_trust_anywhere",
        Reload,
        plain,
        auth.allow_trust_anywhere
    ),
    row!("access.database", Reload, rule_databases, access),
    row!("access.user", Reload, rule_users, access),
    row!("access.address", Reload, rule_addresses, access),
    row!("access.method", Reload, rule_methods, access),
    row!("access.tls", Reload, rule_tls, access),
    row!("access.cert_name", Reload, rule_cert_names, access),
    row!("console.admin_users", Reload, list, console.admin_users),
    row!("console.stats_users", Reload, list, console.stats_users),
    row!("pool.mode", Reload, word, pool.mode),
    row!("pool.size", Reload, plain, pool.size),
    row!("pool.min_size", Reload, plain, pool.min_size),
    row!("pool.reserve_size", Reload, plain, pool.reserve_size),
    row!("pool.reserve_timeout", Reload, span, pool.reserve_timeout),
    row!(
        "pool.max_server_connections",
        Reload,
        or_zero,
        pool.max_server_connections
    ),
    row!(
        "pool.connects_at_once",
        Reload,
        plain,
        pool.connects_at_once
    ),
    row!("pool.max_clients", Reload, plain, pool.max_clients),
    row!("pool.checkout_timeout", Reload, span, pool.checkout_timeout),
    row!("pool.notice_after", Reload, span_or_off, pool.notice_after),
    row!("pool.connect_timeout", Reload, span, pool.connect_timeout),
    row!("pool.server_idle", Reload, span, pool.server_idle),
    row!("pool.server_lifetime", Reload, span, pool.server_lifetime),
    row!("pool.server_check", Reload, span_or_off, pool.server_check),
    row!("pool.dns_ttl", Reload, span_or_off, pool.dns_ttl),
    row!("role.name", Reload, role_names, roles),
    row!("role.priority", Reload, role_priorities, roles),
    row!("role.max_servers", Reload, role_servers, roles),
    row!("role.stale", Reload, role_stale, roles),
    row!(
        "replication.max_connections",
        Restart,
        plain,
        replication.max_connections
    ),
    row!("cluster.address", Restart, or_nothing, cluster.address),
    row!("cluster.peers", Restart, list, cluster.peers),
    row!("cluster.forwards_max", Restart, plain, cluster.forwards_max),
    row!("route.reads", Reload, word, route.reads),
    row!("route.consistency", Reload, word, route.consistency),
    row!("route.replica_wait_ms", Reload, millis, route.replica_wait),
    row!("route.sample_ms", Restart, millis, route.sample),
    row!("cache.max_age_ms", Restart, millis, cache.max_age),
    row!("cache.max_bytes", Restart, plain, cache.max_bytes),
    row!("poll.park", Restart, plain, poll.park),
    row!("poll.probe_ms", Restart, millis, poll.probe),
    row!("shed.max_stale_ms", Restart, millis, shed.max_stale),
    row!("shed.target_ms", Restart, millis, shed.target),
    row!("shed.window_ms", Restart, millis, shed.window),
    row!("shed.adaptive", Restart, plain, shed.adaptive),
    row!("events.wake", Restart, word, events.wake),
    row!("events.retention", Restart, span, events.retention),
    row!("events.direct_notify", Restart, plain, events.direct_notify),
    row!("events.queue", Restart, plain, events.queue),
    row!("events.probe", Restart, span, events.probe),
    row!("http.max_connections", Restart, plain, http.max_connections),
    row!("http.pool_size", Restart, plain, http.pool_size),
    row!("http.header_timeout", Restart, span, http.header_timeout),
    row!("http.write_timeout", Restart, span, http.write_timeout),
    row!("http.recheck", Restart, span, http.recheck),
    row!("http.jwt_secret", Restart, hidden, http.jwt_secret),
    row!("http.jwks", Restart, jwks, http.jwks),
    row!("http.api_keys", Restart, counted, http.api_keys),
    row!("http.anon_role", Restart, or_nothing, http.anon_role),
    row!("http.cors", Restart, list, http.cors),
    row!(
        "maintenance.requeue",
        Restart,
        span_or_off,
        maintenance.requeue
    ),
    row!(
        "maintenance.prune_after",
        Restart,
        span_or_off,
        maintenance.prune_after
    ),
    row!("log.filter", Reload, plain, log),
];

/// Every key, in the order of the example file.
pub fn shown(config: &Config) -> Vec<Key> {
    let key = |row: &Row| Key {
        name: row.name,
        value: (row.show)(config),
        live: row.when == Reload,
    };
    ROWS.iter().map(key).collect()
}

/// The keys that differ and that no reload changes.
pub fn need_restart(running: &Config, wanted: &Config) -> Vec<&'static str> {
    ROWS.iter()
        .filter(|row| row.when == Restart && !(row.same)(running, wanted))
        .map(|row| row.name)
        .collect()
}

/// What is in force once `wanted` has been read while `running` runs: what a reload changes, of `wanted`; the rest stays.
pub fn live_part(running: &Config, wanted: Config) -> Config {
    let kept = running.clone();
    Config {
        listen: Listen {
            postgres: kept.listen.postgres,
            http: kept.listen.http,
            threads: kept.listen.threads,
            reuse_port: kept.listen.reuse_port,
            ..wanted.listen
        },
        primary: kept.primary,
        replication: kept.replication,
        cluster: kept.cluster,
        route: Route {
            sample: kept.route.sample,
            ..wanted.route
        },
        cache: kept.cache,
        poll: kept.poll,
        shed: kept.shed,
        events: kept.events,
        http: kept.http,
        maintenance: kept.maintenance,
        ..wanted
    }
}

fn plain(value: &impl ToString) -> String {
    value.to_string()
}

/// The variants are called what the operator writes.
fn word(value: &impl Debug) -> String {
    format!("{value:?}").to_ascii_lowercase()
}

fn span(value: &Duration) -> String {
    spell(*value)
}

fn span_or_off(value: &Option<Duration>) -> String {
    value.map_or_else(|| "off".to_owned(), spell)
}

fn millis(value: &Duration) -> String {
    value.as_millis().to_string()
}

fn or_off(value: &Option<impl ToString>) -> String {
    value
        .as_ref()
        .map_or_else(|| "off".to_owned(), ToString::to_string)
}

fn or_zero(value: &Option<impl ToString>) -> String {
    value
        .as_ref()
        .map_or_else(|| "0".to_owned(), ToString::to_string)
}

fn or_nothing(value: &Option<String>) -> String {
    value.clone().unwrap_or_default()
}

fn path(value: &Option<PathBuf>) -> String {
    value
        .as_ref()
        .map_or_else(String::new, |path| path.display().to_string())
}

fn jwks(value: &Option<Jwks>) -> String {
    match value {
        None => String::new(),
        Some(Jwks::File(path)) => path.display().to_string(),
        Some(Jwks::Url(url)) => url.to_string(),
    }
}

fn list(value: &[String]) -> String {
    value.join(", ")
}

/// One place a rule, in their order.
fn each_rule(rules: &[AccessRule], show: impl Fn(&AccessRule) -> String) -> String {
    rules.iter().map(show).collect::<Vec<_>>().join("; ")
}

fn rule_databases(rules: &[AccessRule]) -> String {
    let name = |database: &DatabaseName| match database {
        DatabaseName::All => "all".to_owned(),
        DatabaseName::SameUser => "sameuser".to_owned(),
        DatabaseName::Replication => "replication".to_owned(),
        DatabaseName::Named(name) => name.clone(),
    };
    each_rule(rules, |rule| {
        let names: Vec<_> = rule.database.iter().map(name).collect();
        names.join(", ")
    })
}

fn rule_users(rules: &[AccessRule]) -> String {
    each_rule(rules, |rule| match &rule.user {
        Names::All => "all".to_owned(),
        Names::Only(names) => list(names),
    })
}

fn rule_addresses(rules: &[AccessRule]) -> String {
    each_rule(rules, |rule| match &rule.address {
        Addresses::All => "all".to_owned(),
        Addresses::Only(list) => ranges(list),
    })
}

fn rule_methods(rules: &[AccessRule]) -> String {
    each_rule(rules, |rule| word(&rule.method))
}

fn rule_tls(rules: &[AccessRule]) -> String {
    each_rule(rules, |rule| word(&rule.tls))
}

fn rule_cert_names(rules: &[AccessRule]) -> String {
    each_rule(rules, |rule| or_nothing(&rule.cert_name))
}

/// One place a role, in their order.
fn each_role(roles: &[Role], show: impl Fn(&Role) -> String) -> String {
    roles.iter().map(show).collect::<Vec<_>>().join("; ")
}

fn role_names(roles: &[Role]) -> String {
    each_role(roles, |role| role.name.clone())
}

fn role_priorities(roles: &[Role]) -> String {
    each_role(roles, |role| word(&role.terms.priority))
}

fn role_servers(roles: &[Role]) -> String {
    each_role(roles, |role| or_zero(&role.terms.max_servers))
}

fn role_stale(roles: &[Role]) -> String {
    each_role(roles, |role| plain(&role.terms.stale))
}

fn ranges(value: &[Cidr]) -> String {
    let all: Vec<_> = value.iter().map(ToString::to_string).collect();
    all.join(", ")
}

fn urls(value: &[ConnectUrl]) -> String {
    value
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(" ")
}

fn hidden<T>(value: &Option<T>) -> String {
    value
        .as_ref()
        .map_or_else(String::new, |_| "(set)".to_owned())
}

fn counted<T>(value: &[T]) -> String {
    if value.is_empty() {
        String::new()
    } else {
        format!("({} set)", value.len())
    }
}
