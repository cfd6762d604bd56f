//! Raw to checked: every value in range, every file there, every pair of keys in agreement, or the list of all that is
//! not. The defaults live here, and in `config/flowgate.toml` for people. Looks at the file system (is the file there?)
//! but opens nothing. Called by `commands/`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::layers::{Layers, Source};
use super::raw::{self, Span};
use super::{
    AccessMethod, AccessRule, AccessTls, Addresses, ApiKey, Auth, AuthMethod, Cache, Cidr,
    ClientTls, Cluster, Config, ConfigError, ConnectUrl, Consistency, Console, DatabaseName,
    Events, Flags, Http, Jwks, Listen, Maintenance, Names, Poll, Pool, PoolMode, Priority, Problem,
    ProxyProtocol, Reads, Replication, Role, RoleTerms, Route, Secret, Shed, Wake,
};

const AUTH_QUERY: &str = "select rolname, rolpassword from pg_catalog.pg_authid where rolname = $1 and rolcanlogin \
                          and (rolvaliduntil is null or rolvaliduntil > pg_catalog.now())";
const MS: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3_600);
const DAY: Duration = Duration::from_secs(86_400);
/// Every unknown cancel key may be asked of each.
const PEERS_MAX: usize = 64;
/// RFC 7518, 3.2: an HS256 key has at least as many bits as the hash.
const JWT_SECRET_BYTES_MIN: usize = 32;

/// The file, overridden by the environment, overridden by the flags.
pub fn from_sources(
    file: Option<(&Path, &str)>,
    env: impl Iterator<Item = (String, String)>,
    flags: Flags,
) -> Result<Config, ConfigError> {
    let mut layers = Layers::new();
    if let Some((path, text)) = file {
        layers.file(path, text);
        // Without the file all that follows would be complaints about what it may well say.
        if layers
            .problems
            .iter()
            .any(|problem| problem.key_path.is_empty())
        {
            return Err(ConfigError {
                problems: layers.problems,
            });
        }
    }
    layers.env(env);
    layers.flags(flags);
    let (raw, sources, problems) = layers.finish();
    let mut check = Check { sources, problems };
    let config = check.config(raw);
    match config {
        Some(config) if check.problems.is_empty() => Ok(config),
        Some(_) | None => Err(ConfigError {
            problems: check.problems,
        }),
    }
}

/// What holds when nothing is said but where the primary is.
pub fn defaults(primary: &ConnectUrl) -> Config {
    let mut check = Check {
        sources: BTreeMap::new(),
        problems: Vec::new(),
    };
    let url = Some(primary.to_string());
    let raw = raw::File {
        primary: raw::Upstream { url },
        ..raw::File::default()
    };
    let config = check.config(raw);
    config.expect("a URL is read as it was written, and every default is in range")
}

/// Goes through the sections; a value refused is noted and stands at its default, so that the rest is checked too.
struct Check {
    sources: BTreeMap<String, Source>,
    problems: Vec<Problem>,
}

impl Check {
    /// `None` only after a problem was noted.
    fn config(&mut self, raw: raw::File) -> Option<Config> {
        let listen = self.listen(raw.listen);
        let primary = self.upstream("primary.url", raw.primary);
        let replicas = raw.replica.into_iter().enumerate();
        let replicas = replicas
            .filter_map(|(index, one)| self.upstream(&format!("replica[{index}].url"), one))
            .collect();
        let auth = self.auth(raw.auth, &listen);
        let access = raw.access.into_iter().enumerate();
        let access = access
            .map(|(index, rule)| self.access(index, rule, &listen, &auth))
            .collect();
        let console = self.console(raw.console, primary.as_ref());
        let pool = self.pool(raw.pool);
        let roles = self.roles(raw.role);
        let most = self.number(
            "replication.max_connections",
            raw.replication.max_connections,
            10,
            0..=10_000,
        );
        let replication = Replication {
            max_connections: usize::try_from(most).unwrap_or(usize::MAX),
        };
        let cluster = self.cluster(raw.cluster);
        let route = self.route(raw.route);
        let cache = self.cache(raw.cache);
        let poll = Poll {
            park: raw.poll.park.unwrap_or(true),
            probe: self.millis("poll.probe_ms", raw.poll.probe_ms, 1000, 10..=60_000),
        };
        let shed = self.shed(raw.shed);
        let events = self.events(raw.events);
        let http = self.http(raw.http);
        let maintenance = Maintenance {
            requeue: self.span_or_off(
                "maintenance.requeue",
                raw.maintenance.requeue,
                Some(15 * SECOND),
                SECOND..=DAY,
            ),
            prune_after: self.span_or_off(
                "maintenance.prune_after",
                raw.maintenance.prune_after,
                None,
                HOUR..=3650 * DAY,
            ),
        };
        let log = self.log(raw.log);
        let primary = primary?;
        Some(Config {
            listen,
            primary,
            replicas,
            auth,
            access,
            console,
            pool,
            roles,
            replication,
            cluster,
            route,
            cache,
            poll,
            shed,
            events,
            http,
            maintenance,
            log,
        })
    }

    fn listen(&mut self, raw: raw::Listen) -> Listen {
        let postgres = self.address(
            "listen.postgres",
            raw.postgres,
            SocketAddr::from(([127, 0, 0, 1], 6432)),
        );
        let http = match raw.http.as_deref() {
            Some("off") => None,
            Some(_) | None => Some(self.address(
                "listen.http",
                raw.http,
                SocketAddr::from(([127, 0, 0, 1], 6480)),
            )),
        };
        if http == Some(postgres) && postgres.port() != 0 {
            self.problem(
                "listen.http",
                format!("is {postgres}, where listen.postgres already is; give it another port"),
            );
        }

        let tls_cert = self.file("listen.tls_cert", raw.tls_cert);
        let tls_key = self.file("listen.tls_key", raw.tls_key);
        let tls_client_ca = self.file("listen.tls_client_ca", raw.tls_client_ca);
        let words = [
            ("allow", ClientTls::Allow),
            ("require", ClientTls::Require),
            ("off", ClientTls::Off),
        ];
        let mut tls = self.word("listen.tls", raw.tls, &words);
        match (&tls_cert, &tls_key) {
            (Some(_), Some(_)) => {}
            (Some(_), None) => self.problem(
                "listen.tls_key",
                "is missing; listen.tls_cert needs its private key",
            ),
            (None, Some(_)) => self.problem(
                "listen.tls_cert",
                "is missing; listen.tls_key is the key of a certificate",
            ),
            (None, None) => {
                if tls == ClientTls::Require {
                    self.problem(
                        "listen.tls",
                        "is \"require\", but there is no listen.tls_cert and listen.tls_key",
                    );
                }
                if tls_client_ca.is_some() {
                    self.problem(
                        "listen.tls_client_ca",
                        "needs listen.tls_cert and listen.tls_key too",
                    );
                }
                tls = ClientTls::Off;
            }
        }
        let words = [
            ("off", ProxyProtocol::Off),
            ("require", ProxyProtocol::Require),
        ];
        let proxy_protocol = self.word("listen.proxy_protocol", raw.proxy_protocol, &words);
        let proxy_protocol_from = self.ranges(
            "listen.proxy_protocol_from",
            raw.proxy_protocol_from.unwrap_or_default(),
        );
        if proxy_protocol == ProxyProtocol::Require && proxy_protocol_from.is_empty() {
            self.problem(
                "listen.proxy_protocol_from",
                "is empty; name the balancers whose PROXY headers are believed, as in [\"10.0.0.0/8\"]",
            );
        }
        Listen {
            postgres,
            http,
            tls,
            tls_cert,
            tls_key,
            tls_client_ca,
            proxy_protocol,
            proxy_protocol_from,
            threads: self.count("listen.threads", raw.threads, 1, 1..=256),
            reuse_port: raw.reuse_port.unwrap_or(false),
            login_timeout: self.span(
                "listen.login_timeout",
                raw.login_timeout,
                MINUTE,
                10 * MS..=HOUR,
            ),
            drain_timeout: self.span(
                "listen.drain_timeout",
                raw.drain_timeout,
                30 * SECOND,
                Duration::ZERO..=DAY,
            ),
        }
    }

    fn upstream(&mut self, key_path: &str, raw: raw::Upstream) -> Option<ConnectUrl> {
        let Some(text) = said(raw.url) else {
            // Unless it was said, and refused for its type.
            if !self
                .problems
                .iter()
                .any(|problem| problem.key_path == key_path)
            {
                self.problem(
                    key_path,
                    "is missing; write postgres://user:password@host:port/database",
                );
            }
            return None;
        };
        let url: ConnectUrl = match text.parse() {
            Ok(url) => url,
            Err(error) => {
                self.problem(key_path, error.to_string());
                return None;
            }
        };
        for (name, path) in [
            ("sslrootcert", &url.ssl_root_cert),
            ("sslcert", &url.ssl_cert),
            ("sslkey", &url.ssl_key),
        ] {
            if let Some(path) = path.as_deref().filter(|path| !path.is_file()) {
                self.problem(
                    key_path,
                    format!("has {name} {}, which is not a file", path.display()),
                );
            }
        }
        Some(url)
    }

    fn auth(&mut self, raw: raw::Auth, listen: &Listen) -> Auth {
        let words = [("scram", AuthMethod::Scram), ("trust", AuthMethod::Trust)];
        let method = self.word("auth.method", raw.method, &words);
        let allow_trust_anywhere = raw.allow_trust_anywhere.unwrap_or(false);
        let query = said(raw.query).unwrap_or_else(|| AUTH_QUERY.to_owned());
        if !query.contains("$1") {
            self.problem(
                "auth.query",
                "never mentions $1, the name of the user who logs in",
            );
        }
        let auth = Auth {
            method,
            users_file: self.file("auth.users_file", raw.users_file),
            query,
            allow_trust_anywhere,
        };
        if auth.trusts_strangers(listen) {
            let open = listen.postgres;
            self.problem(
                "auth.method",
                format!(
                    "\"trust\" would let in whoever reaches {open}; listen on 127.0.0.1, use \"scram\", \
                     or set auth.allow_trust_anywhere = true"
                ),
            );
        }
        auth
    }

    fn access(
        &mut self,
        index: usize,
        raw: raw::Access,
        listen: &Listen,
        auth: &Auth,
    ) -> AccessRule {
        let path = |key: &str| format!("access[{index}].{key}");
        let database = self.names(&path("database"), raw.database);
        let database = database
            .into_iter()
            .map(|name| match name.as_str() {
                "all" => DatabaseName::All,
                "sameuser" => DatabaseName::SameUser,
                "replication" => DatabaseName::Replication,
                _ => DatabaseName::Named(name),
            })
            .collect();
        let user = self.names(&path("user"), raw.user);
        let user = if user.iter().any(|name| name == "all") {
            Names::All
        } else {
            Names::Only(user)
        };
        let address = match listed(raw.address) {
            None => Addresses::All,
            Some(list) if list.iter().any(|text| text == "all") => Addresses::All,
            Some(list) if list.is_empty() => {
                self.problem(&path("address"), "is empty, so the rule matches nobody");
                Addresses::All
            }
            Some(list) => Addresses::Only(self.ranges(&path("address"), list)),
        };
        let methods = [
            ("scram", AccessMethod::Scram),
            ("trust", AccessMethod::Trust),
            ("cert", AccessMethod::Cert),
            ("reject", AccessMethod::Reject),
        ];
        let method = self.word(&path("method"), raw.method, &methods);
        let words = [("any", AccessTls::Any), ("require", AccessTls::Require)];
        let tls = self.word(&path("tls"), raw.tls, &words);
        let cert_name = said(raw.cert_name);

        let trusts_others = method == AccessMethod::Trust && address.reaches_strangers(listen);
        if trusts_others && !auth.allow_trust_anywhere {
            self.problem(
                &path("method"),
                "\"trust\" would let in whoever comes from there; name addresses of this machine, use \"scram\" \
                 or \"cert\", or set auth.allow_trust_anywhere = true",
            );
        }
        if method == AccessMethod::Cert && listen.tls_client_ca.is_none() {
            self.problem(
                &path("method"),
                "is \"cert\", but there is no listen.tls_client_ca",
            );
        }
        if method != AccessMethod::Cert && cert_name.is_some() {
            self.problem(
                &path("cert_name"),
                "needs method = \"cert\" in the same rule",
            );
        }
        if tls == AccessTls::Require && listen.tls == ClientTls::Off {
            self.problem(
                &path("tls"),
                "is \"require\", but there is no TLS towards clients (listen.tls, tls_cert, tls_key)",
            );
        }
        AccessRule {
            database,
            user,
            address,
            method,
            tls,
            cert_name,
        }
    }

    /// Names of a rule; nothing said is everybody.
    fn names(&mut self, key_path: &str, raw: Option<raw::OneOrMore>) -> Vec<String> {
        let Some(list) = listed(raw) else {
            return vec!["all".to_owned()];
        };
        if list.is_empty() {
            self.problem(key_path, "is empty, so the rule matches nobody");
        }
        // What pg_hba.conf reads as a group, a file or a pattern would here be a name nobody has.
        let special = |name: &&String| name.starts_with(['+', '@', '/']) || name.is_empty();
        for name in list.iter().filter(special) {
            self.problem(
                key_path,
                format!("`{name}` is no name; groups, files and patterns are not understood"),
            );
        }
        list
    }

    fn ranges(&mut self, key_path: &str, list: Vec<String>) -> Vec<Cidr> {
        let mut ranges = Vec::new();
        for text in list {
            match text.parse() {
                Ok(range) => ranges.push(range),
                Err(error) => self.problem(key_path, format!("`{text}` {error}")),
            }
        }
        ranges
    }

    fn cluster(&mut self, raw: raw::Cluster) -> Cluster {
        let peers = raw.peers.unwrap_or_default();
        let address = said(raw.address);
        for (key_path, place) in peers
            .iter()
            .map(|peer| ("cluster.peers", peer))
            .chain(address.iter().map(|address| ("cluster.address", address)))
        {
            if !is_host_and_port(place) {
                self.problem(
                    key_path,
                    format!("`{place}` must be a host and a port, as in \"flowgate-2:6432\""),
                );
            }
        }
        if let Some(twice) = peers
            .iter()
            .enumerate()
            .find_map(|(index, peer)| peers[..index].contains(peer).then_some(peer))
        {
            self.problem("cluster.peers", format!("names `{twice}` twice"));
        }
        if let Some(address) = address.as_ref().filter(|address| peers.contains(address)) {
            self.problem(
                "cluster.peers",
                format!("names `{address}`, which is cluster.address, ourselves"),
            );
        }
        if peers.len() > PEERS_MAX {
            self.problem(
                "cluster.peers",
                format!("names {}, {PEERS_MAX} at most", peers.len()),
            );
        }
        Cluster {
            address,
            peers,
            forwards_max: self.count("cluster.forwards_max", raw.forwards_max, 64, 1..=10_000),
        }
    }

    fn console(&mut self, raw: raw::Console, primary: Option<&ConnectUrl>) -> Console {
        let control_role = || primary.map(|url| url.user.clone()).into_iter().collect();
        let console = Console {
            admin_users: raw.admin_users.unwrap_or_else(control_role),
            stats_users: raw.stats_users.unwrap_or_default(),
        };
        for (key_path, users) in [
            ("console.admin_users", &console.admin_users),
            ("console.stats_users", &console.stats_users),
        ] {
            if users.iter().any(String::is_empty) {
                self.problem(key_path, "has an empty name");
            }
        }
        if let Some(both) = console
            .stats_users
            .iter()
            .find(|user| console.admin_users.contains(user))
        {
            self.problem(
                "console.stats_users",
                format!("has `{both}`, who is one of console.admin_users already"),
            );
        }
        console
    }

    fn pool(&mut self, raw: raw::Pool) -> Pool {
        let modes = [
            ("transaction", PoolMode::Transaction),
            ("session", PoolMode::Session),
        ];
        let mode = self.word("pool.mode", raw.mode, &modes);
        let size = self.count("pool.size", raw.size, 20, 1..=10_000);
        let min_size = self.amount("pool.min_size", raw.min_size, 0, 0..=10_000);
        if min_size > size.get() {
            self.problem("pool.min_size", format!("is more than pool.size, {size}"));
        }
        let max_server_connections = self.amount(
            "pool.max_server_connections",
            raw.max_server_connections,
            0,
            0..=1_000_000,
        );
        let checkout_timeout = self.span(
            "pool.checkout_timeout",
            raw.checkout_timeout,
            30 * SECOND,
            10 * MS..=HOUR,
        );
        Pool {
            mode,
            size,
            min_size,
            reserve_size: self.amount("pool.reserve_size", raw.reserve_size, 0, 0..=10_000),
            reserve_timeout: self.span(
                "pool.reserve_timeout",
                raw.reserve_timeout,
                5 * SECOND,
                10 * MS..=HOUR,
            ),
            max_server_connections: NonZeroUsize::new(max_server_connections),
            connects_at_once: self.count(
                "pool.connects_at_once",
                raw.connects_at_once,
                10,
                1..=10_000,
            ),
            max_clients: self.count("pool.max_clients", raw.max_clients, 1000, 1..=1_000_000),
            checkout_timeout,
            notice_after: self.span_or_off(
                "pool.notice_after",
                raw.notice_after,
                Some(5 * SECOND),
                10 * MS..=HOUR,
            ),
            connect_timeout: self.span(
                "pool.connect_timeout",
                raw.connect_timeout,
                5 * SECOND,
                10 * MS..=HOUR,
            ),
            server_idle: self.span(
                "pool.server_idle",
                raw.server_idle,
                10 * MINUTE,
                SECOND..=7 * DAY,
            ),
            server_lifetime: self.span(
                "pool.server_lifetime",
                raw.server_lifetime,
                HOUR,
                SECOND..=30 * DAY,
            ),
            server_check: self.span_or_off(
                "pool.server_check",
                raw.server_check,
                Some(30 * SECOND),
                10 * MS..=DAY,
            ),
            dns_ttl: self.span_or_off("pool.dns_ttl", raw.dns_ttl, Some(15 * SECOND), SECOND..=DAY),
        }
    }

    fn route(&mut self, raw: raw::Route) -> Route {
        let reads = [
            ("pgflow", Reads::Pgflow),
            ("all", Reads::All),
            ("off", Reads::Off),
        ];
        let consistency = [
            ("session", Consistency::Session),
            ("eventual", Consistency::Eventual),
            ("primary", Consistency::Primary),
        ];
        let replica_wait =
            self.millis("route.replica_wait_ms", raw.replica_wait_ms, 20, 0..=60_000);
        let sample = self.millis("route.sample_ms", raw.sample_ms, 2, 1..=1000);
        if raw.sample_ms.is_some() && sample >= replica_wait {
            let waits = replica_wait.as_millis();
            self.problem(
                "route.sample_ms",
                format!("must be less than route.replica_wait_ms ({waits}): no read would wait for the next sample"),
            );
        }
        Route {
            reads: self.word("route.reads", raw.reads, &reads),
            consistency: self.word("route.consistency", raw.consistency, &consistency),
            replica_wait,
            sample,
        }
    }

    fn roles(&mut self, raw: Vec<raw::Role>) -> Vec<Role> {
        let mut roles: Vec<Role> = Vec::with_capacity(raw.len());
        for (index, raw) in raw.into_iter().enumerate() {
            let path = |key: &str| format!("role[{index}].{key}");
            let name = said(raw.name).unwrap_or_default();
            if name.is_empty() {
                self.problem(&path("name"), "is missing: whom is this about?");
            } else if roles.iter().any(|role| role.name == name) {
                self.problem(&path("name"), format!("\"{name}\" was named before"));
            }
            let priorities = [
                ("normal", Priority::Normal),
                ("low", Priority::Low),
                ("high", Priority::High),
            ];
            let most = self.number(&path("max_servers"), raw.max_servers, 0, 0..=10_000);
            let terms = RoleTerms {
                priority: self.word(&path("priority"), raw.priority, &priorities),
                max_servers: usize::try_from(most).ok().and_then(NonZeroUsize::new),
                stale: raw.stale.unwrap_or(true),
            };
            roles.push(Role { name, terms });
        }
        roles
    }

    fn cache(&mut self, raw: raw::Cache) -> Cache {
        let bytes = self.number("cache.max_bytes", raw.max_bytes, 64 << 20, 0..=1 << 40);
        Cache {
            max_age: self.millis("cache.max_age_ms", raw.max_age_ms, 0, 0..=3_600_000),
            max_bytes: usize::try_from(bytes).unwrap_or(usize::MAX),
        }
    }

    fn shed(&mut self, raw: raw::Shed) -> Shed {
        let target = self.millis("shed.target_ms", raw.target_ms, 5, 1..=10_000);
        let window = self.millis("shed.window_ms", raw.window_ms, 100, 1..=60_000);
        if window < target {
            self.problem(
                "shed.window_ms",
                format!("is shorter than shed.target_ms, {}", spell(target)),
            );
        }
        Shed {
            max_stale: self.millis("shed.max_stale_ms", raw.max_stale_ms, 0, 0..=3_600_000),
            target,
            window,
            adaptive: raw.adaptive.unwrap_or(false),
        }
    }

    fn events(&mut self, raw: raw::Events) -> Events {
        Events {
            wake: self.word(
                "events.wake",
                raw.wake,
                &[("observe", Wake::Observe), ("notify", Wake::Notify)],
            ),
            direct_notify: raw.direct_notify.unwrap_or(false),
            retention: self.span(
                "events.retention",
                raw.retention,
                7 * DAY,
                MINUTE..=3650 * DAY,
            ),
            queue: self.count("events.queue", raw.queue, 16_384, 16..=1_048_576),
            probe: self.span("events.probe", raw.probe, SECOND, 10 * MS..=HOUR),
        }
    }

    fn http(&mut self, raw: raw::Http) -> Http {
        let jwt_secret = said(raw.jwt_secret);
        if let Some(length) = jwt_secret
            .as_ref()
            .map(String::len)
            .filter(|length| *length < JWT_SECRET_BYTES_MIN)
        {
            self.problem(
                "http.jwt_secret",
                format!("must have at least {JWT_SECRET_BYTES_MIN} bytes, not {length}"),
            );
        }
        let api_keys: Vec<ApiKey> = raw
            .api_keys
            .unwrap_or_default()
            .into_iter()
            .map(|raw| ApiKey {
                key: Secret::new(raw.key),
                role: raw.role,
            })
            .collect();
        for (index, ApiKey { key, role }) in api_keys.iter().enumerate() {
            let place = format!("http.api_keys[{index}]");
            if key.expose().is_empty() || role.is_empty() {
                self.problem(&place, "needs both a key and a role");
            } else if api_keys[..index].iter().any(|earlier| earlier.key == *key) {
                self.problem(&place, "has the key of an earlier one");
            }
        }
        let cors = raw.cors.unwrap_or_default();
        for origin in cors.iter().filter(|origin| !is_origin(origin)) {
            self.problem("http.cors", format!("`{origin}` is no origin; write \"*\" or \"https://app.example\", without a path"));
        }
        Http {
            max_connections: self.count(
                "http.max_connections",
                raw.max_connections,
                10_000,
                1..=100_000,
            ),
            pool_size: self.count("http.pool_size", raw.pool_size, 8, 1..=1_000),
            header_timeout: self.span(
                "http.header_timeout",
                raw.header_timeout,
                30 * SECOND,
                10 * MS..=HOUR,
            ),
            write_timeout: self.span(
                "http.write_timeout",
                raw.write_timeout,
                30 * SECOND,
                10 * MS..=HOUR,
            ),
            recheck: self.span("http.recheck", raw.recheck, MINUTE, 10 * MS..=HOUR),
            jwt_secret: jwt_secret.map(Secret::new),
            jwks: self.jwks(raw.jwks),
            api_keys,
            anon_role: said(raw.anon_role),
            cors,
        }
    }

    fn jwks(&mut self, raw: Option<String>) -> Option<Jwks> {
        let text = said(raw)?;
        if !text.contains("://") {
            return self.file("http.jwks", Some(text)).map(Jwks::File);
        }
        let good = |url: &::url::Url| {
            matches!(url.scheme(), "https" | "http")
                && url.has_host()
                && url.username().is_empty()
                && url.password().is_none()
        };
        let url = text.parse().ok().filter(good);
        if url.is_none() {
            self.problem(
                "http.jwks",
                "is a file, or a URL: https:// or http://, a host, and no user",
            );
        }
        url.map(Jwks::Url)
    }

    fn log(&mut self, raw: raw::Log) -> String {
        let filter = said(raw.filter).unwrap_or_else(|| "info".to_owned());
        let (modules, general): (Vec<&str>, Vec<&str>) = filter
            .split(',')
            .map(str::trim)
            .partition(|part| part.contains('='));
        let levels = modules
            .iter()
            .filter_map(|part| part.rsplit('=').next())
            .chain(general.iter().copied());
        for level in levels.filter(|level| !is_level(level)) {
            self.problem(
                "log.filter",
                format!("`{level}` is no level; it is one of off, error, warn, info, debug, trace"),
            );
        }
        if general.len() != 1 {
            self.problem(
                "log.filter",
                "needs one general level, as in \"info\" or \"info,flowgate::pool=debug\"",
            );
        }
        filter
    }

    // The kinds of value.

    fn number(
        &mut self,
        key_path: &str,
        raw: Option<i64>,
        default: u64,
        range: RangeInclusive<u64>,
    ) -> u64 {
        let Some(raw) = raw else { return default };
        match u64::try_from(raw) {
            Ok(number) if range.contains(&number) => number,
            Ok(number) if number > *range.end() => {
                self.problem(
                    key_path,
                    format!("must be at most {}, not {raw}", range.end()),
                );
                default
            }
            Ok(_) | Err(_) => {
                self.problem(
                    key_path,
                    format!("must be at least {}, not {raw}", range.start()),
                );
                default
            }
        }
    }

    fn count(
        &mut self,
        key_path: &str,
        raw: Option<i64>,
        default: u64,
        range: RangeInclusive<u64>,
    ) -> NonZeroUsize {
        let count = self.amount(key_path, raw, default, range);
        NonZeroUsize::new(count).expect("every range of a count starts above zero")
    }

    fn amount(
        &mut self,
        key_path: &str,
        raw: Option<i64>,
        default: u64,
        range: RangeInclusive<u64>,
    ) -> usize {
        usize::try_from(self.number(key_path, raw, default, range)).unwrap_or(usize::MAX)
    }

    fn millis(
        &mut self,
        key_path: &str,
        raw: Option<i64>,
        default: u64,
        range: RangeInclusive<u64>,
    ) -> Duration {
        Duration::from_millis(self.number(key_path, raw, default, range))
    }

    fn span(
        &mut self,
        key_path: &str,
        raw: Option<Span>,
        default: Duration,
        range: RangeInclusive<Duration>,
    ) -> Duration {
        let Some(Span(text)) = raw else {
            return default;
        };
        let problem = match parse_duration(&text) {
            Some(span) if range.contains(&span) => return span,
            Some(span) if span > *range.end() => {
                format!("must be at most {}, not {text}", spell(*range.end()))
            }
            Some(_) => format!("must be at least {}, not {text}", spell(*range.start())),
            None => format!(
                "`{text}` is no duration; write \"20ms\", \"5s\", \"10m\", \"1h\" or \"7d\""
            ),
        };
        self.problem(key_path, problem);
        default
    }

    fn span_or_off(
        &mut self,
        key_path: &str,
        raw: Option<Span>,
        default: Option<Duration>,
        range: RangeInclusive<Duration>,
    ) -> Option<Duration> {
        match raw {
            None => default,
            Some(Span(text)) if text == "off" => None,
            Some(span) => Some(self.span(key_path, Some(span), *range.start(), range)),
        }
    }

    /// The first word is the default.
    fn word<T: Copy>(&mut self, key_path: &str, raw: Option<String>, words: &[(&str, T)]) -> T {
        let Some(text) = raw else { return words[0].1 };
        if let Some((_, meaning)) = words.iter().find(|(word, _)| *word == text) {
            return *meaning;
        }
        let choices: Vec<String> = words
            .iter()
            .map(|(word, _)| format!("\"{word}\""))
            .collect();
        self.problem(
            key_path,
            format!("must be one of {}, not \"{text}\"", choices.join(", ")),
        );
        words[0].1
    }

    fn address(&mut self, key_path: &str, raw: Option<String>, default: SocketAddr) -> SocketAddr {
        let Some(text) = raw else { return default };
        let numeric = text
            .strip_prefix("localhost:")
            .map_or_else(|| text.clone(), |port| format!("127.0.0.1:{port}"));
        numeric.parse().unwrap_or_else(|_unreadable| {
            self.problem(
                key_path,
                format!(
                    "must be an IP address and a port such as \"127.0.0.1:6432\", not \"{text}\""
                ),
            );
            default
        })
    }

    fn file(&mut self, key_path: &str, raw: Option<String>) -> Option<PathBuf> {
        let path = PathBuf::from(said(raw)?);
        if !path.is_file() {
            self.problem(key_path, format!("{} is not a file", path.display()));
        }
        Some(path)
    }

    fn problem(&mut self, key_path: &str, message: impl Into<String>) {
        let whole = key_path
            .split_once('[')
            .map_or(key_path, |(array, _index)| array);
        let source = self
            .sources
            .get(key_path)
            .or_else(|| self.sources.get(whole))
            .cloned()
            .unwrap_or_default();
        self.problems.push(Problem {
            key_path: key_path.to_owned(),
            message: message.into(),
            source,
        });
    }
}

/// Both spellings of a list.
fn listed(raw: Option<raw::OneOrMore>) -> Option<Vec<String>> {
    raw.map(|raw| match raw {
        raw::OneOrMore::One(text) => vec![text],
        raw::OneOrMore::More(list) => list,
    })
}

fn is_host_and_port(text: &str) -> bool {
    text.rsplit_once(':').is_some_and(|(host, port)| {
        let bracketed = host.starts_with('[') && host.ends_with(']');
        !host.is_empty()
            && (bracketed || !host.contains(':'))
            && !host.contains(char::is_whitespace)
            && port.parse::<u16>().is_ok_and(|port| port != 0)
    })
}

/// For a key without a default, an empty string says nothing.
fn said(text: Option<String>) -> Option<String> {
    text.filter(|text| !text.is_empty())
}

fn is_level(text: &str) -> bool {
    matches!(
        text.to_ascii_lowercase().as_str(),
        "off" | "error" | "warn" | "info" | "debug" | "trace"
    )
}

/// What a browser sends as `Origin`: scheme, host and port, nothing after.
fn is_origin(text: &str) -> bool {
    let whole =
        |url: ::url::Url| url.origin().is_tuple() && url.origin().ascii_serialization() == text;
    text == "*" || text.parse().is_ok_and(whole)
}

/// An integer and a unit, nothing between.
pub fn parse_duration(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit())?);
    let millis: u64 = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _unknown => return None,
    };
    number
        .parse::<u64>()
        .ok()?
        .checked_mul(millis)
        .map(Duration::from_millis)
}

/// The other way: in the largest unit that leaves no rest.
pub(super) fn spell(span: Duration) -> String {
    let millis = span.as_millis();
    let units = [
        (86_400_000, "d"),
        (3_600_000, "h"),
        (60_000, "m"),
        (1_000, "s"),
    ];
    match units
        .iter()
        .find(|(unit, _)| millis > 0 && millis.is_multiple_of(*unit))
    {
        Some((unit, name)) => format!("{}{name}", millis / unit),
        None => format!("{millis}ms"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_an_integer_and_a_unit() {
        for (text, millis) in [
            ("20ms", 20),
            ("5s", 5_000),
            ("10m", 600_000),
            ("1h", 3_600_000),
            ("7d", 604_800_000),
            ("0s", 0),
        ] {
            assert_eq!(
                parse_duration(text),
                Some(Duration::from_millis(millis)),
                "{text}"
            );
        }
        for text in [
            "",
            "5",
            "s",
            "-5s",
            "1.5s",
            "5 s",
            "5S",
            "5sec",
            "99999999999999999d",
            "18446744073709551616ms",
            "５s",
        ] {
            assert_eq!(parse_duration(text), None, "{text}");
        }
    }
}
