//! The configuration as an operator meets it: what is accepted, what is refused and in which words, and that the
//! example file tells the truth.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::raw::key_paths;
use super::*;

const EXAMPLE: &str = include_str!("../../config/flowgate.toml");
const PRIMARY: &str = "postgres://flowgate@localhost:5432/app";
const REPLICA: &str = "postgres://flowgate@replica:5432/app";

fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

fn read(file: &str, env: &[(&str, &str)], flags: Flags) -> Result<Config, ConfigError> {
    let env = env
        .iter()
        .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    from_sources(Some((Path::new("f.toml"), file)), env, flags)
}

fn with_primary(text: &str) -> String {
    format!("{text}\n[primary]\nurl = \"{PRIMARY}\"\n")
}

fn accept(text: &str) -> Config {
    read(&with_primary(text), &[], Flags::default())
        .unwrap_or_else(|error| panic!("{text}\n{error}"))
}

/// All problems, as an operator reads them.
fn refuse(file: &str, env: &[(&str, &str)], flags: Flags) -> Vec<String> {
    let error = read(file, env, flags).expect_err("this configuration is wrong");
    error.problems.iter().map(ToString::to_string).collect()
}

#[track_caller]
fn check(text: &str, problem: &str) {
    assert_eq!(
        refuse(&with_primary(text), &[], Flags::default()),
        [problem]
    );
}

/// The example as it would be if the operator uncommented every key.
fn uncommented() -> String {
    let is_key = |line: &str| {
        let name = line.split(" = ").next().unwrap_or_default();
        line.starts_with("[[")
            || line.contains(" = ") && name.chars().all(|c| c.is_ascii_lowercase() || c == '_')
    };
    let lines = EXAMPLE.lines().map(|line| {
        line.strip_prefix("# ")
            .filter(|rest| is_key(rest))
            .unwrap_or(line)
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn the_example_file_says_what_the_code_does_when_nothing_is_said() {
    let flags = Flags {
        primary: Some(PRIMARY.into()),
        replicas: vec![REPLICA.into()],
        ..Flags::default()
    };
    let mut defaults = from_sources(None, std::iter::empty(), flags).unwrap();
    // There is no rule by default; the example's says nothing but what a rule is without a word.
    defaults.access = accept("[[access]]").access;
    assert_eq!(defaults.access.len(), 1);
    defaults.roles = accept("[[role]]\nname = \"dashboards\"").roles;
    assert_eq!(read(&uncommented(), &[], Flags::default()), Ok(defaults));
}

#[test]
fn the_example_file_has_every_key_with_a_reason() {
    let table: toml::Table = toml::from_str(&uncommented()).unwrap();
    let keys = table.iter().flat_map(|(section, body)| {
        let body = body.get(0).unwrap_or(body).as_table().unwrap();
        body.keys().map(move |key| format!("{section}.{key}"))
    });
    assert_eq!(keys.collect::<std::collections::BTreeSet<_>>(), key_paths());
    let unexplained = EXAMPLE
        .lines()
        .filter(|line| line.starts_with("# ") && line.contains(" = ") && !line[1..].contains('#'));
    let unexplained: Vec<_> = unexplained
        .filter(|line| !line.contains("url =") && !line.contains(','))
        .collect();
    assert_eq!(unexplained, [""; 0]);
}

#[test]
fn the_example_file_works_as_it_is() {
    let config = read(EXAMPLE, &[], Flags::default()).unwrap();
    assert_eq!(config.primary, PRIMARY.parse().unwrap());
    assert_eq!(config.replicas, []);
}

#[test]
fn every_value_said_arrives() {
    let here = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    let config = accept(&format!(
        r#"
        listen = {{ postgres = "0.0.0.0:1", http = "[::1]:2", tls = "require", tls_cert = "{here}", tls_key = "{here}", tls_client_ca = "{here}", proxy_protocol = "require", proxy_protocol_from = ["10.0.0.0/8"], threads = 3, reuse_port = true, login_timeout = "1s", drain_timeout = "0s" }}
        replica = [{{ url = "postgres://a" }}, {{ url = "postgres://b" }}]
        auth = {{ method = "trust", users_file = "{here}", query = "select $1", allow_trust_anywhere = true }}
        access = [{{ database = ["a", "sameuser"], user = "u", address = ["::1", "10.0.0.0/8"], method = "cert", tls = "require", cert_name = "c" }}, {{ method = "reject" }}]
        replication = {{ max_connections = 0 }}
        cluster = {{ address = "me:1", peers = ["you:2", "[::1]:3"], forwards_max = 4 }}
        console = {{ admin_users = ["ada"], stats_users = ["bob", "carl"] }}
        pool = {{ mode = "session", size = 4, min_size = 3, reserve_size = 21, reserve_timeout = "22s", max_server_connections = 23, connects_at_once = 24, max_clients = 5, checkout_timeout = "6ms0", notice_after = "25s", connect_timeout = "7s", server_idle = "8m", server_lifetime = "9h", server_check = "off", dns_ttl = "26s" }}
        role = [{{ name = "d", priority = "low", max_servers = 6, stale = false }}, {{ name = "e", priority = "high" }}]
        route = {{ reads = "all", consistency = "eventual", replica_wait_ms = 10, sample_ms = 9 }}
        cache = {{ max_age_ms = 11, max_bytes = 12 }}
        poll = {{ park = false, probe_ms = 13 }}
        shed = {{ max_stale_ms = 14, target_ms = 15, window_ms = 16, adaptive = true }}
        events = {{ wake = "notify", retention = "17d", direct_notify = true, queue = 18, probe = "19s" }}
        http = {{ max_connections = 21, pool_size = 22, header_timeout = "23s", write_timeout = "24s", recheck = "25s", jwt_secret = "0123456789abcdef0123456789abcdef", jwks = "{here}", api_keys = [{{ key = "k", role = "r" }}], anon_role = "anon", cors = ["*", "http://localhost:3000"] }}
        maintenance = {{ requeue = "off", prune_after = "20d" }}
        log = {{ filter = "warn,flowgate::pool=debug" }}
        "#
    ).replace("6ms0", "60ms"));
    let here = Some(PathBuf::from(here));
    let expected = Config {
        listen: Listen {
            postgres: "0.0.0.0:1".parse().unwrap(),
            http: Some("[::1]:2".parse().unwrap()),
            tls: ClientTls::Require,
            tls_cert: here.clone(),
            tls_key: here.clone(),
            tls_client_ca: here.clone(),
            proxy_protocol: ProxyProtocol::Require,
            proxy_protocol_from: vec!["10.0.0.0/8".parse().unwrap()],
            threads: NonZeroUsize::new(3).unwrap(),
            reuse_port: true,
            login_timeout: secs(1),
            drain_timeout: Duration::ZERO,
        },
        primary: PRIMARY.parse().unwrap(),
        replicas: vec![
            "postgres://a".parse().unwrap(),
            "postgres://b".parse().unwrap(),
        ],
        auth: Auth {
            method: AuthMethod::Trust,
            users_file: here.clone(),
            query: "select $1".into(),
            allow_trust_anywhere: true,
        },
        access: vec![
            AccessRule {
                database: vec![DatabaseName::Named("a".into()), DatabaseName::SameUser],
                user: Names::Only(vec!["u".into()]),
                address: Addresses::Only(vec![
                    "::1".parse().unwrap(),
                    "10.0.0.0/8".parse().unwrap(),
                ]),
                method: AccessMethod::Cert,
                tls: AccessTls::Require,
                cert_name: Some("c".into()),
            },
            AccessRule {
                database: vec![DatabaseName::All],
                user: Names::All,
                address: Addresses::All,
                method: AccessMethod::Reject,
                tls: AccessTls::Any,
                cert_name: None,
            },
        ],
        replication: Replication { max_connections: 0 },
        cluster: Cluster {
            address: Some("me:1".into()),
            peers: vec!["you:2".into(), "[::1]:3".into()],
            forwards_max: NonZeroUsize::new(4).unwrap(),
        },
        console: Console {
            admin_users: vec!["ada".into()],
            stats_users: vec!["bob".into(), "carl".into()],
        },
        pool: Pool {
            mode: PoolMode::Session,
            size: NonZeroUsize::new(4).unwrap(),
            min_size: 3,
            reserve_size: 21,
            reserve_timeout: secs(22),
            max_server_connections: NonZeroUsize::new(23),
            connects_at_once: NonZeroUsize::new(24).unwrap(),
            max_clients: NonZeroUsize::new(5).unwrap(),
            checkout_timeout: Duration::from_millis(60),
            notice_after: Some(secs(25)),
            connect_timeout: secs(7),
            server_idle: secs(8 * 60),
            server_lifetime: secs(9 * 3_600),
            server_check: None,
            dns_ttl: Some(secs(26)),
        },
        roles: vec![
            Role {
                name: "d".into(),
                terms: RoleTerms {
                    priority: Priority::Low,
                    max_servers: NonZeroUsize::new(6),
                    stale: false,
                },
            },
            Role {
                name: "e".into(),
                terms: RoleTerms {
                    priority: Priority::High,
                    ..RoleTerms::default()
                },
            },
        ],
        route: Route {
            reads: Reads::All,
            consistency: Consistency::Eventual,
            replica_wait: Duration::from_millis(10),
            sample: Duration::from_millis(9),
        },
        cache: Cache {
            max_age: Duration::from_millis(11),
            max_bytes: 12,
        },
        poll: Poll {
            park: false,
            probe: Duration::from_millis(13),
        },
        shed: Shed {
            max_stale: Duration::from_millis(14),
            target: Duration::from_millis(15),
            window: Duration::from_millis(16),
            adaptive: true,
        },
        events: Events {
            wake: Wake::Notify,
            direct_notify: true,
            retention: secs(17 * 86_400),
            queue: NonZeroUsize::new(18).unwrap(),
            probe: secs(19),
        },
        http: Http {
            max_connections: NonZeroUsize::new(21).unwrap(),
            pool_size: NonZeroUsize::new(22).unwrap(),
            header_timeout: Duration::from_secs(23),
            write_timeout: Duration::from_secs(24),
            recheck: Duration::from_secs(25),
            jwt_secret: Some(Secret::new("0123456789abcdef0123456789abcdef".into())),
            jwks: here.map(Jwks::File),
            api_keys: vec![ApiKey {
                key: Secret::new("k".into()),
                role: "r".into(),
            }],
            anon_role: Some("anon".into()),
            cors: vec!["*".into(), "http://localhost:3000".into()],
        },
        maintenance: Maintenance {
            requeue: None,
            prune_after: Some(secs(20 * 86_400)),
        },
        log: "warn,flowgate::pool=debug".into(),
    };
    assert_eq!(config, expected);
}

#[test]
fn the_environment_overrides_the_file_and_flags_override_both() {
    let file = with_primary(
        "[pool]\nsize = 1\nmax_clients = 1\nserver_idle = \"1s\"\n[listen]\nhttp = \"off\"",
    );
    let env = [
        ("FLOWGATE_POOL__MAX_CLIENTS", "2"),
        ("FLOWGATE_POOL__SERVER_IDLE", "2s"),
        ("FLOWGATE_POOL__SIZE", "2"),
    ];
    let flags = Flags {
        pool_size: Some("3".into()),
        http: Some("127.0.0.1:9".into()),
        ..Flags::default()
    };
    let config = read(&file, &env, flags).unwrap();
    assert_eq!(
        (config.pool.size.get(), config.pool.max_clients.get()),
        (3, 2)
    );
    assert_eq!(config.pool.server_idle, secs(2));
    assert_eq!(config.listen.http, Some("127.0.0.1:9".parse().unwrap()));
}

#[test]
fn replicas_said_higher_up_replace_those_below() {
    let file =
        with_primary("[[replica]]\nurl = \"postgres://a\"\n[[replica]]\nurl = \"postgres://b\"");
    let hosts = |config: Config| {
        config
            .replicas
            .into_iter()
            .map(|url| url.host)
            .collect::<Vec<_>>()
    };
    let env = [("FLOWGATE_REPLICA__URL", "postgres://c  postgres://d")];
    let flags = Flags {
        replicas: vec!["postgres://e".into()],
        ..Flags::default()
    };
    assert_eq!(
        hosts(read(&file, &[], Flags::default()).unwrap()),
        ["a", "b"]
    );
    assert_eq!(
        hosts(read(&file, &env, Flags::default()).unwrap()),
        ["c", "d"]
    );
    assert_eq!(hosts(read(&file, &env, flags).unwrap()), ["e"]);
}

#[test]
fn a_variable_takes_the_type_of_its_key() {
    let env = [
        ("FLOWGATE_POLL__PARK", "false"),
        (
            "FLOWGATE_HTTP__CORS",
            "https://a.example, https://b.example",
        ),
        ("FLOWGATE_HTTP__ANON_ROLE", "7"),
        ("FLOWGATE_HTTP__API_KEYS", r#"[{ key = "k", role = "r" }]"#),
        (
            "FLOWGATE_HTTP__JWT_SECRET",
            "00000000000000000000000000000000",
        ),
        ("FLOWGATE_ROUTE__READS", "\"off\""),
        ("FLOWGATE_AUTH__USERS_FILE", ""),
        ("FLOWGATE_PG_BIN", "/usr/bin"),
        ("FLOWGATE_HTTP__JWKS", "\"\""),
        ("PATH", "/bin"),
    ];
    let config = read(
        &with_primary("[http]\njwks = \"/nowhere\""),
        &env,
        Flags::default(),
    )
    .unwrap();
    assert!(!config.poll.park);
    assert_eq!(config.http.cors, ["https://a.example", "https://b.example"]);
    assert_eq!(config.http.anon_role.as_deref(), Some("7"));
    assert_eq!(config.http.api_keys[0].role, "r");
    assert_eq!(config.http.jwt_secret, Some(Secret::new("0".repeat(32))));
    assert_eq!((config.route.reads, config.http.jwks), (Reads::Off, None));
}

#[test]
fn keys_of_others_are_in_a_file_or_behind_a_url() {
    let said = |jwks: &str| {
        let text = with_primary(&format!("[http]\njwks = \"{jwks}\""));
        read(&text, &[], Flags::default()).map(|config| config.http.jwks)
    };
    let url = "https://id.example/keys?of=us";
    let known = said(url).unwrap();
    assert_eq!(known, Some(Jwks::Url(url.parse().unwrap())));
    for bad in [
        "ftp://id.example/",
        "https://me:secret@id.example/",
        "https://",
        "/nowhere",
    ] {
        let refused = said(bad).unwrap_err().to_string();
        assert!(refused.contains("http.jwks"), "{refused}");
        assert!(!refused.contains("secret"), "{refused}");
    }
}

#[test]
fn every_problem_is_listed_with_its_place() {
    let file = "[listen]\nport = 1\n\n[pool]\nsize = 0\nmode = \"statement\"\nmax_clients = \"many\"\n\n[[replica]]\nurl = 5\n\
                [[replica]]\nurl = \"mysql://u:topsecret@h/d\"\n[rout]\nreads = \"x\"\n";
    let env = [
        ("FLOWGATE_POOL__SERVER_IDLE", "soon"),
        ("FLOWGATE_POOL__SISE", "1"),
    ];
    let flags = Flags {
        auth: Some("md5".into()),
        ..Flags::default()
    };
    let problems = refuse(file, &env, flags);
    assert_eq!(
        problems,
        [
            "listen.port: unknown key (f.toml:2)",
            "pool.max_clients: must be an integer, not string \"many\" (f.toml:7)",
            "replica[0].url: has the wrong type (f.toml:10)",
            "rout: unknown; did you mean `[route]`? (f.toml:13)",
            "pool.sise: unknown key; did you mean `pool.size`? (FLOWGATE_POOL__SISE)",
            "primary.url: is missing; write postgres://user:password@host:port/database",
            "replica[1].url: starts with `mysql://`; write postgres://user:password@host:port/database (f.toml:12)",
            "auth.method: must be one of \"scram\", \"trust\", not \"md5\" (--auth)",
            "pool.mode: must be one of \"transaction\", \"session\", not \"statement\" (f.toml:6)",
            "pool.size: must be at least 1, not 0 (f.toml:5)",
            "pool.server_idle: `soon` is no duration; write \"20ms\", \"5s\", \"10m\", \"1h\" or \"7d\" (FLOWGATE_POOL__SERVER_IDLE)",
        ]
    );
}

#[test]
fn an_unknown_key_is_told_the_nearest_valid_one() {
    check(
        "[pool]\nsise = 1",
        "pool.sise: unknown key; did you mean `pool.size`? (f.toml:2)",
    );
    check(
        "[pool]\nreplica_wait_ms = 1",
        "pool.replica_wait_ms: unknown key; did you mean `route.replica_wait_ms`? (f.toml:2)",
    );
    check(
        "[route]\nreplica_wait = 1",
        "route.replica_wait: unknown key; did you mean `route.replica_wait_ms`? (f.toml:2)",
    );
    check(
        "size = 20",
        "size: unknown; did you mean `pool.size`? (f.toml:1)",
    );
    check(
        "[listeners]\nx = 1",
        "listeners: unknown; did you mean `[listen]`? (f.toml:1)",
    );
    check(
        "[pool]\nxyzzy_quux = 20",
        "pool.xyzzy_quux: unknown key (f.toml:2)",
    );
    check(
        "[replica]\nurl = \"postgres://h\"",
        "replica: is a list: write [[replica]], once for each (f.toml:1)",
    );
    check(
        "replica = [\"postgres://h\"]",
        "replica[0]: is a section, not a value (f.toml:1)",
    );
    check("pool = 20", "pool: is a section, not a value (f.toml:1)");
}

#[test]
fn what_is_not_toml_is_reported_with_its_line_and_nothing_else() {
    let problems = refuse("[pool]\nsize = = 5\n[auth\n", &[], Flags::default());
    assert!(problems.len() >= 2, "{problems:?}");
    assert!(
        problems[0].starts_with("not TOML: ") && problems[0].ends_with("(f.toml:2)"),
        "{problems:?}"
    );
    let problems = refuse(
        "[pool]\nsize = 99999999999999999999\n",
        &[],
        Flags::default(),
    );
    assert!(
        problems.len() == 1 && problems[0].ends_with("(f.toml:2)"),
        "{problems:?}"
    );
    let problems = refuse("[pool]\nsize = 5\nsize = 6\n", &[], Flags::default());
    assert!(
        problems.len() == 1 && problems[0].ends_with("(f.toml:3)"),
        "{problems:?}"
    );
}

#[test]
fn an_odd_value_of_any_key_is_accepted_or_refused_at_its_line() {
    let odd = [
        "5",
        "-5",
        "true",
        "\"\"",
        "\"\\u0000é\"",
        "[]",
        "[[1]]",
        "{}",
        "{ x = { y = 1 } }",
        "nan",
        "1979-05-27",
    ];
    let example = uncommented();
    let lines: Vec<&str> = example.lines().collect();
    let mut refused = 0;
    for (index, line) in lines
        .iter()
        .enumerate()
        .filter(|(_, line)| !line.starts_with(['#', '[']))
    {
        let Some((key, _)) = line.split_once(" = ") else {
            continue;
        };
        for odd in odd {
            let changed = format!("{key} = {odd}");
            let text = lines
                .iter()
                .enumerate()
                .map(|(here, line)| if here == index { &changed } else { *line });
            let text = text.collect::<Vec<_>>().join("\n");
            let Err(error) = read(&text, &[], Flags::default()) else {
                continue;
            };
            let here = Source::File {
                path: "f.toml".into(),
                line: Some(index + 1),
            };
            assert!(
                error.problems.iter().any(|problem| problem.source == here),
                "{changed}: {error}"
            );
            assert!(!error.to_string().contains('\0'), "{error:?}");
            refused += 1;
        }
    }
    assert!(refused > 400, "only {refused}");
}

#[test]
fn values_out_of_range_are_refused() {
    check(
        "[pool]\nsize = -1",
        "pool.size: must be at least 1, not -1 (f.toml:2)",
    );
    check(
        "[pool]\nsize = 10001",
        "pool.size: must be at most 10000, not 10001 (f.toml:2)",
    );
    check(
        "[route]\nreplica_wait_ms = -5",
        "route.replica_wait_ms: must be at least 0, not -5 (f.toml:2)",
    );
    check(
        "[route]\nsample_ms = 20",
        "route.sample_ms: must be less than route.replica_wait_ms (20): no read would wait for the next sample (f.toml:2)",
    );
    check(
        "[pool]\nserver_idle = \"0s\"",
        "pool.server_idle: must be at least 1s, not 0s (f.toml:2)",
    );
    check(
        "[events]\nretention = \"3651d\"",
        "events.retention: must be at most 3650d, not 3651d (f.toml:2)",
    );
    check(
        "[maintenance]\nprune_after = \"5s\"",
        "maintenance.prune_after: must be at least 1h, not 5s (f.toml:2)",
    );
    check(
        "[shed]\ntarget_ms = 500",
        "shed.window_ms: is shorter than shed.target_ms, 500ms",
    );
    check(
        "[[role]]\npriority = \"low\"",
        "role[0].name: is missing: whom is this about?",
    );
    check(
        "[[role]]\nname = \"a\"\n[[role]]\nname = \"a\"",
        "role[1].name: \"a\" was named before (f.toml:4)",
    );
    let words = "a duration in quotes, such as \"20ms\", \"5s\" or \"7d\"";
    check(
        "[pool]\nserver_idle = 5",
        &format!("pool.server_idle: must be {words}, not integer `5` (f.toml:2)"),
    );
}

#[test]
fn trust_needs_loopback_or_an_explicit_word() {
    let open = "[listen]\npostgres = \"0.0.0.0:6432\"\n[auth]\nmethod = \"trust\"\n";
    check(
        open,
        "auth.method: \"trust\" would let in whoever reaches 0.0.0.0:6432; listen on 127.0.0.1, use \"scram\", or set \
         auth.allow_trust_anywhere = true (f.toml:4)",
    );
    accept(&format!("{open}allow_trust_anywhere = true"));
    accept("[auth]\nmethod = \"trust\"");
    accept("[listen]\npostgres = \"[::1]:6432\"\n[auth]\nmethod = \"trust\"");
}

#[test]
fn addresses_are_checked() {
    assert_eq!(
        accept("[listen]\npostgres = \"localhost:7\"")
            .listen
            .postgres,
        "127.0.0.1:7".parse().unwrap()
    );
    let words = "must be an IP address and a port such as \"127.0.0.1:6432\"";
    check(
        "[listen]\npostgres = \"6432\"",
        &format!("listen.postgres: {words}, not \"6432\" (f.toml:2)"),
    );
    check(
        "[listen]\nhttp = \"db.example:80\"",
        &format!("listen.http: {words}, not \"db.example:80\" (f.toml:2)"),
    );
    check(
        "[listen]\nhttp = \"127.0.0.1:6432\"",
        "listen.http: is 127.0.0.1:6432, where listen.postgres already is; give it another port (f.toml:2)",
    );
    accept("[listen]\npostgres = \"127.0.0.1:0\"\nhttp = \"127.0.0.1:0\"");
}

#[test]
fn tls_needs_certificate_and_key() {
    let here = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
    let gone = "/nowhere/x.pem is not a file";
    check(
        &format!("[listen]\ntls_cert = \"{here}\""),
        "listen.tls_key: is missing; listen.tls_cert needs its private key",
    );
    check(
        &format!("[listen]\ntls_key = \"{here}\""),
        "listen.tls_cert: is missing; listen.tls_key is the key of a certificate",
    );
    check(
        "[listen]\ntls = \"require\"",
        "listen.tls: is \"require\", but there is no listen.tls_cert and listen.tls_key (f.toml:2)",
    );
    check(
        &format!("[listen]\ntls_client_ca = \"{here}\""),
        "listen.tls_client_ca: needs listen.tls_cert and listen.tls_key too (f.toml:2)",
    );
    check(
        &format!("[listen]\ntls_cert = \"/nowhere/x.pem\"\ntls_key = \"{here}\""),
        &format!("listen.tls_cert: {gone} (f.toml:2)"),
    );
    check(
        "[auth]\nusers_file = \"/nowhere/x.pem\"",
        &format!("auth.users_file: {gone} (f.toml:2)"),
    );
    assert_eq!(
        accept("[listen]\ntls = \"allow\"").listen.tls,
        ClientTls::Off,
        "nothing to offer"
    );
    let both = format!("[listen]\ntls_cert = \"{here}\"\ntls_key = \"{here}\"");
    assert_eq!(accept(&both).listen.tls, ClientTls::Allow);
}

#[test]
fn credentials_are_checked_and_never_printed() {
    check(
        "[http]\nmax_connections = 0",
        "http.max_connections: must be at least 1, not 0 (f.toml:2)",
    );
    check(
        "[http]\njwt_secret = \"hunter2\"",
        "http.jwt_secret: must have at least 32 bytes, not 7 (f.toml:2)",
    );
    check(
        "[http]\njwt_secret = 12345",
        "http.jwt_secret: has the wrong type (f.toml:2)",
    );
    check(
        "[http]\napi_keys = [\"hunter2\"]",
        "http.api_keys: has the wrong type (f.toml:2)",
    );
    let twice = "[http]\napi_keys = [{ key = \"k\", role = \"a\" }, { key = \"k\", role = \"b\" }]";
    check(
        twice,
        "http.api_keys[1]: has the key of an earlier one (f.toml:2)",
    );
    let empty = "[http]\napi_keys = [{ key = \"\", role = \"a\" }]";
    check(
        empty,
        "http.api_keys[0]: needs both a key and a role (f.toml:2)",
    );
    let config = accept(
        "[http]\njwt_secret = \"hunter2hunter2hunter2hunter2hunter2\"\napi_keys = [{ key = \"hunter2\", role = \"r\" }]\n\
         [[replica]]\nurl = \"postgres://u:hunter2@h\"",
    );
    assert!(!format!("{config:?}").contains("hunter2"), "{config:?}");
}

#[test]
fn words_for_browsers_queries_and_logs_are_checked() {
    for origin in [
        "app.example",
        "https://app.example/",
        "https://app.example/x",
        "https://",
        "null",
    ] {
        let problem = format!(
            "http.cors: `{origin}` is no origin; write \"*\" or \"https://app.example\", without a path (f.toml:2)"
        );
        check(&format!("[http]\ncors = [\"{origin}\"]"), &problem);
    }
    check(
        "[auth]\nquery = \"select 1\"",
        "auth.query: never mentions $1, the name of the user who logs in (f.toml:2)",
    );
    let levels = "it is one of off, error, warn, info, debug, trace";
    check(
        "[log]\nfilter = \"inof\"",
        &format!("log.filter: `inof` is no level; {levels} (f.toml:2)"),
    );
    check(
        "[log]\nfilter = \"info,a=loud\"",
        &format!("log.filter: `loud` is no level; {levels} (f.toml:2)"),
    );
    check(
        "[log]\nfilter = \"flowgate=debug\"",
        "log.filter: needs one general level, as in \"info\" or \"info,flowgate::pool=debug\" (f.toml:2)",
    );
}

#[test]
fn an_access_rule_is_held_to_what_can_be_kept() {
    check(
        "[access]\nuser = \"a\"",
        "access: is a list: write [[access]], once for each (f.toml:1)",
    );
    check(
        "[[access]]\nusr = \"a\"",
        "access[0].usr: unknown key; did you mean `access.user`? (f.toml:2)",
    );
    check(
        "[[access]]\nuser = 5",
        "access[0].user: must be a string in quotes, or an array of them, not integer `5` (f.toml:2)",
    );
    check(
        "[[access]]\n[[access]]\nuser = [\"a\", \"+staff\"]",
        "access[1].user: `+staff` is no name; groups, files and patterns are not understood (f.toml:3)",
    );
    check(
        "[[access]]\ndatabase = []",
        "access[0].database: is empty, so the rule matches nobody (f.toml:2)",
    );
    check(
        "[[access]]\naddress = \"10.0.0.0/99\"",
        "access[0].address: `10.0.0.0/99` is no address; write \"10.0.0.0/8\", \"192.0.2.7\" or \"::1\" (f.toml:2)",
    );
    check(
        "[[access]]\nmethod = \"md5\"",
        "access[0].method: must be one of \"scram\", \"trust\", \"cert\", \"reject\", not \"md5\" (f.toml:2)",
    );
    check(
        "[[access]]\nmethod = \"cert\"",
        "access[0].method: is \"cert\", but there is no listen.tls_client_ca (f.toml:2)",
    );
    check(
        "[[access]]\ntls = \"require\"",
        "access[0].tls: is \"require\", but there is no TLS towards clients (listen.tls, tls_cert, tls_key) (f.toml:2)",
    );
    check(
        "[[access]]\ncert_name = \"x\"",
        "access[0].cert_name: needs method = \"cert\" in the same rule (f.toml:2)",
    );
    check(
        "[[access]]\naddress = \"10.0.0.0/8\"\nmethod = \"trust\"",
        "access[0].method: \"trust\" would let in whoever comes from there; name addresses of this machine, use \"scram\" or \"cert\", or set auth.allow_trust_anywhere = true (f.toml:3)",
    );
    accept("[[access]]\nmethod = \"trust\"");
    accept(
        "[[access]]\naddress = [\"127.0.0.0/8\", \"::1\"]\nmethod = \"trust\"\n[listen]\npostgres = \"0.0.0.0:1\"",
    );
    assert_eq!(
        refuse(
            &with_primary(""),
            &[("FLOWGATE_ACCESS__USER", "a")],
            Flags::default()
        ),
        [
            "access: is a list in order, which variables cannot say: write it in the file (FLOWGATE_ACCESS__USER)"
        ]
    );
}

#[test]
fn the_control_role_is_admin_unless_others_are_named() {
    let console = |text: &str| accept(text).console;
    assert_eq!(console("").admin_users, ["flowgate"]);
    assert_eq!(console("").stats_users, [""; 0]);
    assert_eq!(
        console("[console]\nadmin_users = []\nstats_users = [\"flowgate\"]"),
        Console {
            admin_users: vec![],
            stats_users: vec!["flowgate".into()]
        }
    );
    check(
        "[console]\nstats_users = [\"flowgate\"]",
        "console.stats_users: has `flowgate`, who is one of console.admin_users already (f.toml:2)",
    );
    check(
        "[console]\nadmin_users = [\"\"]",
        "console.admin_users: has an empty name (f.toml:2)",
    );
}

#[test]
fn a_pool_keeps_no_more_than_it_may_have() {
    check(
        "[pool]\nsize = 3\nmin_size = 4",
        "pool.min_size: is more than pool.size, 3 (f.toml:3)",
    );
    assert_eq!(
        accept("[pool]\nnotice_after = \"off\"").pool.notice_after,
        None
    );
}

#[test]
fn proxies_before_and_beside_us_are_named_in_full() {
    check(
        "[listen]\nproxy_protocol = \"require\"",
        "listen.proxy_protocol_from: is empty; name the balancers whose PROXY headers are believed, as in [\"10.0.0.0/8\"]",
    );
    check(
        "[cluster]\npeers = [\"here\"]",
        "cluster.peers: `here` must be a host and a port, as in \"flowgate-2:6432\" (f.toml:2)",
    );
    check(
        "[cluster]\npeers = [\"a:1\", \"a:1\"]",
        "cluster.peers: names `a:1` twice (f.toml:2)",
    );
    check(
        "[cluster]\naddress = \"a:1\"\npeers = [\"a:1\"]",
        "cluster.peers: names `a:1`, which is cluster.address, ourselves (f.toml:3)",
    );
    let env = [("FLOWGATE_CLUSTER__PEERS", "a:1, b:2")];
    let config = read(&with_primary(""), &env, Flags::default()).unwrap();
    assert_eq!(config.cluster.peers, ["a:1", "b:2"]);
}

#[test]
fn every_key_can_be_shown() {
    let config = accept("");
    let names: Vec<_> = shown(&config)
        .iter()
        .map(|key| key.name.to_owned())
        .collect();
    let known: std::collections::BTreeSet<_> = names.iter().cloned().collect();
    assert_eq!(known, key_paths(), "config/keys.rs and config/raw.rs");
    assert_eq!(known.len(), names.len());
}

#[test]
fn what_is_shown_is_what_an_operator_writes_without_secrets() {
    let config = accept(
        "[pool]\nsize = 7\ncheckout_timeout = \"90s\"\nnotice_after = \"off\"\n[route]\nreads = \"all\"\n\
         [[replica]]\nurl = \"postgres://u:geheim@r/d\"\n[http]\njwt_secret = \"0123456789abcdef0123456789abcdef\"",
    );
    let keys = shown(&config);
    let value = |name: &str| {
        let key = keys.iter().find(|key| key.name == name).unwrap();
        key.value.clone()
    };
    assert_eq!(value("pool.size"), "7");
    assert_eq!(value("pool.checkout_timeout"), "90s");
    assert_eq!(value("pool.notice_after"), "off");
    assert_eq!(value("pool.max_server_connections"), "0");
    assert_eq!(value("route.reads"), "all");
    assert_eq!(value("http.jwt_secret"), "(set)");
    let all = keys
        .iter()
        .map(|key| key.value.as_str())
        .collect::<String>();
    assert!(
        !all.contains("geheim") && !all.contains("0123456789abcdef"),
        "{all}"
    );
}

#[test]
fn a_change_that_needs_a_restart_is_named() {
    let before = accept("");
    assert_eq!(need_restart(&before, &accept("[pool]\nsize = 7")), [""; 0]);
    let after = accept("[listen]\npostgres = \"127.0.0.1:7\"\nthreads = 2\n[pool]\nsize = 7");
    assert_eq!(
        need_restart(&before, &after),
        ["listen.postgres", "listen.threads"]
    );
    let in_force = live_part(&before, after);
    assert_eq!(need_restart(&before, &in_force), [""; 0]);
    assert_eq!(in_force.pool.size.get(), 7);
}

#[test]
fn what_a_reload_does_not_change_stays_as_it_was() {
    // Every key said otherwise than the default.
    let other: Config = {
        let here = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml");
        let text = format!(
            r#"
            listen = {{ postgres = "0.0.0.0:1", http = "[::1]:2", threads = 3, reuse_port = true, login_timeout = "1s" }}
            primary = {{ url = "postgres://other" }}
            pool = {{ size = 4 }}
            replication = {{ max_connections = 27 }}
            cluster = {{ address = "me:1", peers = ["you:2"], forwards_max = 4 }}
            route = {{ sample_ms = 9 }}
            cache = {{ max_age_ms = 11, max_bytes = 12 }}
            poll = {{ park = false, probe_ms = 13 }}
            shed = {{ max_stale_ms = 14, target_ms = 15, window_ms = 16, adaptive = true }}
            events = {{ wake = "notify", retention = "17d", direct_notify = true, queue = 18, probe = "19s" }}
            http = {{ max_connections = 9, pool_size = 2, header_timeout = "3s", write_timeout = "4s", recheck = "5s", jwt_secret = "0123456789abcdef0123456789abcdef", jwks = "{here}", api_keys = [{{ key = "k", role = "r" }}], anon_role = "anon", cors = ["*"] }}
            maintenance = {{ requeue = "off", prune_after = "20d" }}
            "#
        );
        read(&text, &[], Flags::default()).unwrap()
    };
    let before = accept("");
    let in_force = live_part(&before, other.clone());
    assert_eq!(need_restart(&before, &in_force), [""; 0]);
    assert_eq!(in_force.pool, other.pool);
    assert_eq!(in_force.listen.login_timeout, other.listen.login_timeout);
    let restart: Vec<_> = shown(&before)
        .into_iter()
        .filter(|key| !key.live)
        .map(|key| key.name)
        .collect();
    assert_eq!(need_restart(&before, &other), restart);
}
