//! What the console shows: each table's columns, in PgBouncer's words where it has one, and its rows, made from the books,
//! the roster and the counters at the moment of asking. Shows only what is measured; a table of what is not built yet is
//! empty. Changes nothing.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;

use crate::classify::Worth;
use crate::client::live::{Live, Running};
use crate::client::roster::{self, Entry};
use crate::client::session::Session;
use crate::client::shared::Shared;
use crate::client::state::PIN_REASONS;
use crate::config;
use crate::pool::pools::{Adapted, PoolReport};
use crate::pool::stats::Totals;
use crate::server::conn::{ServerConn, ServerRecord};
use crate::upstream::{Role, Upstream};
use crate::wire::messages::Described;
use crate::wire::startup::ReplicationMode;

/// A column: its name and type.
#[derive(Clone, Copy)]
pub(super) struct Column {
    name: &'static str,
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    Text,
    Int4,
    Int8,
}

const fn text(name: &'static str) -> Column {
    let kind = Kind::Text;
    Column { name, kind }
}

const fn int4(name: &'static str) -> Column {
    let kind = Kind::Int4;
    Column { name, kind }
}

const fn int8(name: &'static str) -> Column {
    let kind = Kind::Int8;
    Column { name, kind }
}

impl Column {
    pub(super) fn described(&self, format: u16) -> Described<'static> {
        let (oid, size) = match self.kind {
            Kind::Text => (25, -1),
            Kind::Int4 => (23, 4),
            Kind::Int8 => (20, 8),
        };
        Described {
            name: self.name,
            oid,
            size,
            format,
        }
    }
}

/// What Bind's format codes say of a column.
pub(super) fn format_of(formats: &[u16], column: usize) -> u16 {
    match formats {
        [] => 0,
        [all] => *all,
        each => each.get(column).copied().unwrap_or(0),
    }
}

/// A value, of the type its column has.
enum Value {
    Null,
    Text(String),
    Int4(i32),
    Int8(i64),
}

impl Value {
    /// As the wire has it in that format.
    fn bytes(&self, format: u16) -> Option<Vec<u8>> {
        Some(match (self, format) {
            (Self::Null, _) => return None,
            (Self::Text(text), _) => text.as_bytes().to_vec(),
            (Self::Int4(number), 0) => number.to_string().into_bytes(),
            (Self::Int8(number), 0) => number.to_string().into_bytes(),
            (Self::Int4(number), _) => number.to_be_bytes().to_vec(),
            (Self::Int8(number), _) => number.to_be_bytes().to_vec(),
        })
    }
}

pub(super) struct Row(Vec<Value>);

impl Row {
    pub(super) fn text(value: &str) -> Self {
        Self(vec![Value::Text(value.to_owned())])
    }

    pub(super) fn values(&self, formats: &[u16]) -> impl ExactSizeIterator<Item = Option<Vec<u8>>> {
        let format = |at| format_of(formats, at);
        self.0
            .iter()
            .enumerate()
            .map(move |(at, value)| value.bytes(format(at)))
    }

    /// Whether it is the one asked for: its first column, or the number it ends with, reads so.
    fn is(&self, wanted: &str) -> bool {
        let reads = |value: Option<&Value>| match value {
            Some(Value::Text(text)) => text == wanted,
            Some(Value::Int4(number)) => number.to_string() == wanted,
            Some(Value::Int8(number)) => number.to_string() == wanted,
            Some(Value::Null) | None => false,
        };
        reads(self.0.first())
    }
}

/// The last columns of `LIMITS`.
fn adaptive(row: Writer, adapted: Option<&Adapted>) -> Writer {
    let Some(Adapted { found, at_work }) = adapted else {
        return row.null().null().null().null();
    };
    let row = row.int4(found.limit).int4(*at_work);
    let row = row.int8(found.lately.as_micros());
    match found.usual {
        Some(usual) => row.int8(usual.as_micros()),
        None => row.null(),
    }
}

/// Puts values of the types their columns have into a row.
struct Writer(Vec<Value>);

impl Writer {
    fn new() -> Self {
        Self(Vec::new())
    }

    fn text(mut self, value: impl Into<String>) -> Self {
        self.0.push(Value::Text(value.into()));
        self
    }

    fn text_or_null(mut self, value: Option<impl Into<String>>) -> Self {
        self.0
            .push(value.map_or(Value::Null, |value| Value::Text(value.into())));
        self
    }

    fn int4(mut self, value: impl TryInto<i32>) -> Self {
        self.0
            .push(Value::Int4(value.try_into().unwrap_or(i32::MAX)));
        self
    }

    fn int8(mut self, value: impl TryInto<i64>) -> Self {
        self.0
            .push(Value::Int8(value.try_into().unwrap_or(i64::MAX)));
        self
    }

    fn null(mut self) -> Self {
        self.0.push(Value::Null);
        self
    }

    fn row(self) -> Row {
        Row(self.0)
    }
}

pub(super) const PARAMETER: &[Column] = &[text("setting")];

/// The tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Show {
    Help,
    Version,
    Pools,
    Clients,
    Servers,
    Sockets,
    ActiveSockets,
    Stats,
    StatsTotals,
    StatsAverages,
    Totals,
    Databases,
    Users,
    Config,
    Lists,
    Mem,
    State,
    DnsHosts,
    Upstreams,
    Replicas,
    Routes,
    Pins,
    Subscribers,
    Parked,
    Limits,
    Runs,
    Memo,
}

struct Table {
    name: &'static str,
    show: Show,
    columns: &'static [Column],
    /// May be asked for one row: of a database, a user, a key, an id.
    argument: bool,
}

const fn table(name: &'static str, show: Show, columns: &'static [Column]) -> Table {
    Table {
        name,
        show,
        columns,
        argument: false,
    }
}

const fn table_of(name: &'static str, show: Show, columns: &'static [Column]) -> Table {
    Table {
        name,
        show,
        columns,
        argument: true,
    }
}

const TABLES: &[Table] = &[
    table("HELP", Show::Help, &[text("command"), text("does")]),
    table("VERSION", Show::Version, &[text("version")]),
    table("POOLS", Show::Pools, POOLS),
    table_of("CLIENTS", Show::Clients, SOCKETS),
    table_of("SERVERS", Show::Servers, SOCKETS),
    table("SOCKETS", Show::Sockets, SOCKETS),
    table("ACTIVE_SOCKETS", Show::ActiveSockets, SOCKETS),
    table_of("STATS", Show::Stats, STATS),
    table_of("STATS_TOTALS", Show::StatsTotals, STATS_HALF),
    table_of("STATS_AVERAGES", Show::StatsAverages, STATS_HALF),
    table("TOTALS", Show::Totals, &[text("name"), int8("value")]),
    table_of("DATABASES", Show::Databases, DATABASES),
    table_of("USERS", Show::Users, USERS),
    table_of("CONFIG", Show::Config, CONFIG),
    table("LISTS", Show::Lists, &[text("list"), int4("items")]),
    table_of("MEM", Show::Mem, MEM),
    table("STATE", Show::State, &[text("key"), text("value")]),
    table("DNS_HOSTS", Show::DnsHosts, DNS_HOSTS),
    table("UPSTREAMS", Show::Upstreams, UPSTREAMS),
    table("REPLICAS", Show::Replicas, REPLICAS),
    table(
        "ROUTES",
        Show::Routes,
        &[text("destination"), int8("requests")],
    ),
    table(
        "PINS",
        Show::Pins,
        &[text("reason"), int8("pins"), int4("clients")],
    ),
    table("SUBSCRIBERS", Show::Subscribers, SUBSCRIBERS),
    table("PARKED", Show::Parked, PARKED),
    table("LIMITS", Show::Limits, LIMITS),
    table("RUNS", Show::Runs, RUNS),
    table(
        "MEMO",
        Show::Memo,
        &[text("statement_texts"), int8("count")],
    ),
];

const POOLS: &[Column] = &[
    text("database"),
    text("user"),
    int4("cl_active"),
    int4("cl_waiting"),
    int4("cl_active_cancel_req"),
    int4("cl_waiting_cancel_req"),
    int4("sv_active"),
    int4("sv_active_cancel"),
    int4("sv_being_canceled"),
    int4("sv_idle"),
    int4("sv_used"),
    int4("sv_tested"),
    int4("sv_login"),
    int4("maxwait"),
    int4("maxwait_us"),
    text("pool_mode"),
    text("load_balance_hosts"),
];

/// Of clients and of servers.
const SOCKETS: &[Column] = &[
    text("type"),
    text("user"),
    text("database"),
    text("replication"),
    text("state"),
    text("addr"),
    int4("port"),
    text("local_addr"),
    int4("local_port"),
    text("connect_time"),
    text("request_time"),
    int4("wait"),
    int4("wait_us"),
    int4("close_needed"),
    text("ptr"),
    text("link"),
    int4("remote_pid"),
    text("tls"),
    text("application_name"),
    int4("prepared_statements"),
    int8("id"),
    // Ours: the reasons a client is tied to its server; the upstream a server is one of.
    text("pins"),
    text("upstream"),
];

const STATS: &[Column] = &[
    text("database"),
    int8("total_server_assignment_count"),
    int8("total_xact_count"),
    int8("total_query_count"),
    int8("total_received"),
    int8("total_sent"),
    int8("total_xact_time"),
    int8("total_query_time"),
    int8("total_wait_time"),
    int8("total_client_parse_count"),
    int8("total_server_parse_count"),
    int8("total_bind_count"),
    int8("avg_server_assignment_count"),
    int8("avg_xact_count"),
    int8("avg_query_count"),
    int8("avg_recv"),
    int8("avg_sent"),
    int8("avg_xact_time"),
    int8("avg_query_time"),
    int8("avg_wait_time"),
    int8("avg_client_parse_count"),
    int8("avg_server_parse_count"),
    int8("avg_bind_count"),
];

const STATS_HALF: &[Column] = &[
    text("database"),
    int8("server_assignment_count"),
    int8("xact_count"),
    int8("query_count"),
    int8("bytes_received"),
    int8("bytes_sent"),
    int8("xact_time"),
    int8("query_time"),
    int8("wait_time"),
    int8("client_parse_count"),
    int8("server_parse_count"),
    int8("bind_count"),
];

/// As `SHOW TOTALS` names them, after `total_` and `avg_`.
const STATS_NAMES: [&str; 11] = [
    "server_assignment_count",
    "xact_count",
    "query_count",
    "client_bytes",
    "server_bytes",
    "xact_time",
    "query_time",
    "wait_time",
    "client_parse_count",
    "server_parse_count",
    "bind_count",
];

const DATABASES: &[Column] = &[
    text("name"),
    text("host"),
    int4("port"),
    text("database"),
    text("force_user"),
    int4("pool_size"),
    int4("min_pool_size"),
    int4("reserve_pool_size"),
    int4("server_lifetime"),
    text("pool_mode"),
    text("load_balance_hosts"),
    int4("max_connections"),
    int4("current_connections"),
    int4("max_client_connections"),
    int4("current_client_connections"),
    int4("paused"),
    int4("disabled"),
];

const USERS: &[Column] = &[
    text("name"),
    int4("pool_size"),
    int4("reserve_pool_size"),
    text("pool_mode"),
    int4("max_user_connections"),
    int4("current_connections"),
    int4("max_user_client_connections"),
    int4("current_client_connections"),
];

const CONFIG: &[Column] = &[
    text("key"),
    text("value"),
    text("default"),
    text("changeable"),
];

const MEM: &[Column] = &[
    text("name"),
    int4("size"),
    int4("used"),
    int4("free"),
    int8("memtotal"),
];

const DNS_HOSTS: &[Column] = &[text("hostname"), int8("ttl"), text("addrs")];

const UPSTREAMS: &[Column] = &[
    text("upstream"),
    text("role"),
    text("host"),
    int4("port"),
    int4("servers"),
    int4("max_servers"),
    int4("connecting"),
    int4("max_connecting"),
    int4("starving_pools"),
];

const REPLICAS: &[Column] = &[
    text("replica"),
    text("in_rotation"),
    text("replayed"),
    int8("lag_bytes"),
    text("host"),
    int4("port"),
    int4("servers"),
];

const SUBSCRIBERS: &[Column] = &[
    text("database"),
    text("channel"),
    text("kind"),
    int4("subscribers"),
    int8("queued"),
];

const PARKED: &[Column] = &[
    text("database"),
    text("queue"),
    int4("waiting"),
    int4("reading"),
    int8("longest_ms"),
];

const LIMITS: &[Column] = &[
    text("upstream"),
    text("class"),
    text("role"),
    text("priority"),
    int4("limit"),
    int4("in_use"),
    int4("queued"),
    int8("refused"),
    int4("adaptive_limit"),
    int4("at_work"),
    int8("latency_us"),
    int8("usual_us"),
];

const RUNS: &[Column] = &[
    text("run_id"),
    int4("writing"),
    int8("seen_ms_ago"),
    int4("subscribers"),
];

const HELP: &[(&str, &str)] = &[
    (
        "SHOW POOLS",
        "clients and servers of each database and user",
    ),
    (
        "SHOW CLIENTS [id] | SERVERS [id] | SOCKETS | ACTIVE_SOCKETS",
        "connections, one a row",
    ),
    (
        "SHOW STATS [db] | STATS_TOTALS [db] | STATS_AVERAGES [db] | TOTALS",
        "what passed, and how long it took",
    ),
    (
        "SHOW DATABASES [db] | USERS [user]",
        "what has been used or spoken of",
    ),
    (
        "SHOW CONFIG [key] | VERSION | STATE | LISTS | MEM | DNS_HOSTS",
        "the proxy itself",
    ),
    (
        "SHOW UPSTREAMS | REPLICAS | ROUTES",
        "Postgres servers, and where requests went",
    ),
    (
        "SHOW PINS | SUBSCRIBERS | PARKED | LIMITS | RUNS | MEMO",
        "sessions tied to servers, listeners, polls, limits, runs",
    ),
    (
        "PAUSE [db]",
        "let transactions end, close every server, lend none until RESUME",
    ),
    ("RESUME [db]", "end of PAUSE and KILL"),
    (
        "RECONNECT [db]",
        "close every server once it is free; new ones may be opened at once",
    ),
    (
        "WAIT_CLOSE [db]",
        "wait until RECONNECT or RELOAD has closed what it wanted closed",
    ),
    (
        "KILL [db]",
        "end every client and server now; new ones wait until RESUME",
    ),
    ("KILL_CLIENT id", "end one client; SHOW CLIENTS has the id"),
    (
        "DISABLE db | ENABLE db",
        "refuse new clients of a database, or not any more",
    ),
    (
        "RELOAD",
        "read the configuration, users and certificates again",
    ),
    (
        "SHUTDOWN [WAIT_FOR_SERVERS | WAIT_FOR_CLIENTS]",
        "end now, with the last transaction, or with the last client",
    ),
];

/// Asking for what is shown takes this; made per answer.
struct View<'a> {
    shared: &'a Shared,
    live: Arc<Live>,
    now: Instant,
    wall: SystemTime,
}

impl Show {
    /// By its name in upper case.
    pub(super) fn named(name: &str) -> Option<Self> {
        TABLES
            .iter()
            .find(|table| table.name == name)
            .map(|table| table.show)
    }

    fn table(self) -> &'static Table {
        let found = TABLES.iter().find(|table| table.show == self);
        found.expect("every table is listed, see the test")
    }

    pub(super) fn takes_argument(self) -> bool {
        self.table().argument
    }

    pub(super) fn columns(self) -> &'static [Column] {
        self.table().columns
    }

    /// `wanted`: the one row asked for.
    pub(super) fn rows(self, shared: &Shared, wanted: Option<&str>) -> Vec<Row> {
        let view = View {
            shared,
            live: shared.live(),
            now: Instant::now(),
            wall: SystemTime::now(),
        };
        let mut rows = match self {
            Self::Help => help(),
            Self::Version => {
                let version = concat!("Flowgate ", env!("CARGO_PKG_VERSION"));
                vec![Row::text(version)]
            }
            Self::Pools => view.pools(),
            Self::Clients => return view.clients(wanted, false),
            Self::Servers => return view.servers(wanted, false),
            Self::Sockets => [view.clients(None, false), view.servers(None, false)]
                .into_iter()
                .flatten()
                .collect(),
            Self::ActiveSockets => [view.clients(None, true), view.servers(None, true)]
                .into_iter()
                .flatten()
                .collect(),
            Self::Stats => view.stats(&[Half::Totals, Half::Averages]),
            Self::StatsTotals => view.stats(&[Half::Totals]),
            Self::StatsAverages => view.stats(&[Half::Averages]),
            Self::Totals => view.totals(),
            Self::Databases => view.databases(),
            Self::Users => view.users(),
            Self::Config => view.config(),
            Self::Lists => view.lists(),
            Self::Mem => view.mem(),
            Self::State => view.state(),
            Self::DnsHosts => view.dns_hosts(),
            Self::Upstreams => view.upstreams(),
            Self::Replicas => view.replicas(),
            Self::Routes => view.routes(),
            Self::Pins => view.pins(),
            Self::Subscribers => view.subscribers(),
            Self::Parked => view.parked(),
            Self::Limits => view.limits(),
            Self::Runs => view.runs(),
            Self::Memo => view.memo(),
        };
        if let Some(wanted) = wanted {
            rows.retain(|row| row.is(wanted));
        }
        rows
    }
}

fn help() -> Vec<Row> {
    HELP.iter()
        .map(|(command, does)| Writer::new().text(*command).text(*does).row())
        .collect()
}

#[derive(Clone, Copy)]
enum Half {
    Totals,
    Averages,
}

/// In the order of the columns.
fn in_order(totals: Totals) -> [u64; 11] {
    [
        totals.assignments,
        totals.transactions,
        totals.requests,
        totals.received,
        totals.sent,
        totals.transaction_us,
        totals.request_us,
        totals.wait_us,
        totals.client_parses,
        totals.server_parses,
        totals.binds,
    ]
}

impl View<'_> {
    fn pool_mode(&self) -> String {
        format!("{:?}", self.live.config.pool.mode).to_ascii_lowercase()
    }

    /// One row a database and user, its pools on all upstreams together.
    fn pools(&self) -> Vec<Row> {
        let clients = self.clients_by_pool();
        let mut pools: BTreeMap<(String, String), Vec<PoolReport>> = BTreeMap::new();
        for report in self.shared.pools.report() {
            let key = (report.database.clone(), report.user.clone());
            pools.entry(key).or_default().push(report);
        }
        let row = |((database, user), reports): ((String, String), Vec<PoolReport>)| {
            let sum = |of: fn(&PoolReport) -> usize| reports.iter().map(of).sum::<usize>();
            let none = Vec::new();
            let clients = clients.get(&(database.clone(), user.clone()));
            let clients = clients.unwrap_or(&none);
            let waiting = clients.iter().filter_map(|entry| entry.waiting_since());
            let (count, longest) = waiting.fold((0, Duration::ZERO), |(count, longest), since| {
                let waited = self.now.saturating_duration_since(since);
                (count + 1, longest.max(waited))
            });
            let cancels: Vec<_> = clients.iter().map(|entry| entry.slot.in_flight()).collect();
            let cancelling: u32 = cancels.iter().map(|(in_flight, _)| in_flight).sum();
            let held_back = cancels.iter().filter(|(_, held_back)| *held_back).count();
            let (open, idle) = (
                sum(|pool| pool.standing.counts.open),
                sum(|pool| pool.standing.counts.idle),
            );
            let opening = sum(|pool| pool.standing.opening);
            Writer::new()
                .text(database)
                .text(user)
                .int4(clients.len() - count)
                .int4(count)
                .int4(cancelling)
                .int4(0)
                .int4(open.saturating_sub(idle + opening + held_back))
                .int4(cancelling)
                .int4(held_back)
                .int4(idle)
                .int4(0)
                .int4(0)
                .int4(opening)
                .int4(longest.as_secs())
                .int4(longest.subsec_micros())
                .text(self.pool_mode())
                .null()
                .row()
        };
        pools.into_iter().map(row).collect()
    }

    fn clients_by_pool(&self) -> HashMap<(String, String), Vec<Arc<Entry>>> {
        let mut pools: HashMap<_, Vec<_>> = HashMap::new();
        let entries = self.shared.roster.all().into_iter();
        for entry in entries.filter(|entry| entry.kind == roster::Kind::Session) {
            let key = (entry.opening.database.clone(), entry.opening.user.clone());
            pools.entry(key).or_default().push(entry);
        }
        pools
    }

    fn clients(&self, wanted: Option<&str>, active: bool) -> Vec<Row> {
        let entries = self.shared.roster.all();
        let mut rows = Vec::new();
        for entry in entries {
            if wanted.is_some_and(|wanted| entry.id.to_string() != wanted) {
                continue;
            }
            let (server, waiting) = (entry.server(), entry.waiting_since());
            let state = match (server, waiting, entry.slot.in_flight()) {
                (_, Some(_), _) => "waiting",
                (_, _, (1.., _)) => "active_cancel_req",
                (Some(_), ..) => "active",
                (None, ..) if entry.kind == roster::Kind::Session => "idle",
                (None, ..) => "active",
            };
            if active && state != "active" {
                continue;
            }
            let waited = waiting.map_or(Duration::ZERO, |since| {
                self.now.saturating_duration_since(since)
            });
            let pins = PIN_REASONS
                .iter()
                .filter(|(reason, _)| entry.pins().contains(*reason))
                .map(|(_, name)| *name);
            let row = Writer::new()
                .text("C")
                .text(&entry.opening.user)
                .text(&entry.opening.database)
                .text(match entry.kind {
                    roster::Kind::Session | roster::Kind::Console => "none",
                    roster::Kind::Replication(ReplicationMode::Physical) => "physical",
                    roster::Kind::Replication(ReplicationMode::Logical) => "logical",
                })
                .text(state);
            let row = addresses(row, Some(entry.peer), entry.local)
                .text(self.time(entry.connected_at))
                .text(self.time(entry.last_request()))
                .int4(waited.as_secs())
                .int4(waited.subsec_micros())
                .int4(0)
                .text(format!("C{}", entry.id))
                .text(server.map_or_else(String::new, |id| format!("S{id}")))
                .int4(0)
                .text(&entry.tls)
                .text(entry.application_name())
                .int4(entry.statements())
                .int8(entry.id)
                .text(pins.collect::<Vec<_>>().join(", "))
                .null();
            rows.push(row.row());
        }
        rows
    }

    fn servers(&self, wanted: Option<&str>, active: bool) -> Vec<Row> {
        let clients: HashMap<u64, Arc<Entry>> = self
            .shared
            .roster
            .all()
            .into_iter()
            .filter_map(|entry| Some((entry.server()?, entry)))
            .collect();
        let mut rows = Vec::new();
        for pool in self.shared.pools.report() {
            let idle: HashSet<u64> = pool.standing.idle.iter().copied().collect();
            for server in &pool.standing.servers {
                if wanted.is_some_and(|wanted| server.id.to_string() != wanted) {
                    continue;
                }
                let state = match idle.contains(&server.id) {
                    true => "idle",
                    false => "active",
                };
                if active && state != "active" {
                    continue;
                }
                let client = clients.get(&server.id).filter(|_| state == "active");
                rows.push(self.server(&pool, server, state, client));
            }
        }
        rows
    }

    fn server(
        &self,
        pool: &PoolReport,
        server: &ServerRecord,
        state: &str,
        client: Option<&Arc<Entry>>,
    ) -> Row {
        let row = Writer::new()
            .text("S")
            .text(&pool.user)
            .text(&pool.database)
            .text("none")
            .text(state);
        addresses(row, server.peer, server.local)
            .text(self.time(server.opened_at))
            .text(self.time(server.last_request()))
            .int4(0)
            .int4(0)
            .int4(i32::from(server.close_needed()))
            .text(format!("S{}", server.id))
            .text(client.map_or_else(String::new, |entry| format!("C{}", entry.id)))
            .int4(server.pid)
            .text(&server.tls)
            .text(client.map_or_else(String::new, |entry| entry.application_name()))
            .int4(server.statements())
            .int8(server.id)
            .null()
            .text(self.upstream_name(pool.upstream))
            .row()
    }

    fn upstream_name(&self, id: usize) -> String {
        let known = self.live.upstreams.iter().find(|known| known.id == id);
        known.map_or_else(|| format!("replica-{id}"), |known| known.name.clone())
    }

    fn stats(&self, halves: &[Half]) -> Vec<Row> {
        let row = |(database, stats): (String, Arc<crate::pool::stats::DatabaseStats>)| {
            let values = halves.iter().flat_map(|half| {
                in_order(match half {
                    Half::Totals => stats.totals(),
                    Half::Averages => stats.averages(self.now),
                })
            });
            values
                .fold(Writer::new().text(database), Writer::int8)
                .row()
        };
        self.shared
            .pools
            .statistics()
            .into_iter()
            .map(row)
            .collect()
    }

    fn totals(&self) -> Vec<Row> {
        let all = self.shared.pools.statistics();
        let sum = |of: &dyn Fn(&crate::pool::stats::DatabaseStats) -> Totals| {
            all.iter()
                .map(|(_, stats)| of(stats))
                .fold(Totals::default(), Totals::plus)
        };
        let (totals, mut averages) = (
            sum(&|stats| stats.totals()),
            sum(&|stats| stats.averages(self.now)),
        );
        // An average time over several databases weighs each by how much of it there was.
        let weigh = |time: fn(&Totals) -> u64, count: fn(&Totals) -> u64| {
            let (times, counts) = all
                .iter()
                .fold((0u128, 0u128), |(times, counts), (_, stats)| {
                    let average = stats.averages(self.now);
                    let count = u128::from(count(&average));
                    (times + u128::from(time(&average)) * count, counts + count)
                });
            u64::try_from(times / counts.max(1)).unwrap_or(u64::MAX)
        };
        averages.transaction_us = weigh(|t| t.transaction_us, |t| t.transactions);
        averages.request_us = weigh(|t| t.request_us, |t| t.requests);
        averages.wait_us = weigh(|t| t.wait_us, |t| t.assignments);
        let named = |prefix: &'static str, totals: Totals| {
            STATS_NAMES
                .into_iter()
                .zip(in_order(totals))
                .map(move |(name, value)| {
                    Writer::new()
                        .text(format!("{prefix}_{name}"))
                        .int8(value)
                        .row()
                })
        };
        named("total", totals)
            .chain(named("avg", averages))
            .collect()
    }

    fn databases(&self) -> Vec<Row> {
        let pools = self.shared.pools.report();
        let clients = self.clients_by_pool();
        let primary = &self.live.config.primary;
        let mut names: BTreeSet<String> = pools.iter().map(|pool| pool.database.clone()).collect();
        names.extend(self.shared.pools.ordered());
        names.insert(primary.database.clone());
        let settings = &self.live.config.pool;
        let flag = |yes: bool| i32::from(yes);
        let row = |name: String| {
            let open: usize = pools
                .iter()
                .filter(|pool| pool.database == name)
                .map(|pool| pool.standing.counts.open)
                .sum();
            let connected: usize = clients
                .iter()
                .filter(|((database, _), _)| *database == name)
                .map(|(_, clients)| clients.len())
                .sum();
            Writer::new()
                .text(&name)
                .text(&primary.host)
                .int4(primary.port)
                .text(&name)
                .null()
                .int4(settings.size.get())
                .int4(settings.min_size)
                .int4(settings.reserve_size)
                .int4(settings.server_lifetime.as_secs())
                .text(self.pool_mode())
                .null()
                // Bounds are on upstreams and on the proxy as a whole, none is on a database.
                .int4(0)
                .int4(open)
                .int4(0)
                .int4(connected)
                .int4(flag(self.shared.pools.is_paused(&name)))
                .int4(flag(self.shared.pools.is_disabled(&name)))
                .row()
        };
        names.into_iter().map(row).collect()
    }

    fn users(&self) -> Vec<Row> {
        let pools = self.shared.pools.report();
        let clients = self.clients_by_pool();
        let names: BTreeSet<&String> = pools.iter().map(|pool| &pool.user).collect();
        let row = |name: &String| {
            let open: usize = pools
                .iter()
                .filter(|pool| pool.user == *name)
                .map(|pool| pool.standing.counts.open)
                .sum();
            let connected: usize = clients
                .iter()
                .filter(|((_, user), _)| user == name)
                .map(|(_, clients)| clients.len())
                .sum();
            // Nothing can be set for one user alone.
            Writer::new()
                .text(name)
                .null()
                .null()
                .null()
                .int4(0)
                .int4(open)
                .int4(0)
                .int4(connected)
                .row()
        };
        names.into_iter().map(row).collect()
    }

    fn config(&self) -> Vec<Row> {
        let defaults = config::defaults(&self.live.config.primary);
        let defaults = config::shown(&defaults);
        let default = |name: &str| {
            let known = defaults.iter().find(|key| key.name == name);
            known
                .filter(|key| key.name != "primary.url")
                .map(|key| key.value.clone())
        };
        let row = |key: config::Key| {
            let changeable = if key.live { "yes" } else { "no" };
            Writer::new()
                .text(key.name)
                .text(key.value)
                .text_or_null(default(key.name))
                .text(changeable)
                .row()
        };
        config::shown(&self.live.config)
            .into_iter()
            .map(row)
            .collect()
    }

    fn lists(&self) -> Vec<Row> {
        let shared = self.shared;
        let pools = shared.pools.report();
        let users: HashSet<&String> = pools.iter().map(|pool| &pool.user).collect();
        let pairs: HashSet<_> = pools
            .iter()
            .map(|pool| (&pool.database, &pool.user))
            .collect();
        let clients = shared.roster.all().len();
        let servers: usize = pools.iter().map(|pool| pool.standing.counts.open).sum();
        let hosts = shared.pools.hosts().len();
        let rows = [
            ("databases", self.databases().len()),
            ("users", users.len()),
            ("pools", pairs.len()),
            // No memory is kept for clients and servers that are gone.
            ("free_clients", 0),
            ("used_clients", clients),
            (
                "login_clients",
                shared.seats.taken().saturating_sub(clients),
            ),
            ("free_servers", 0),
            ("used_servers", servers),
            ("dns_names", hosts),
            ("dns_zones", 0),
            ("dns_queries", 0),
            ("dns_pending", 0),
        ];
        rows.into_iter()
            .map(|(list, items)| Writer::new().text(list).int4(items).row())
            .collect()
    }

    fn mem(&self) -> Vec<Row> {
        let memo = self.live.classifier.memo_stats();
        let clients = self.shared.roster.all().len();
        let pools = self.shared.pools.report();
        let servers: usize = pools.iter().map(|pool| pool.standing.counts.open).sum();
        let row = |name: &str, size: usize, used: usize, total: usize| {
            Writer::new()
                .text(name)
                .int4(size)
                .int4(used)
                .int4(0)
                .int8(total)
                .row()
        };
        let (client, server) = (size_of::<Session>(), size_of::<ServerConn>());
        let mut rows = vec![
            row("client_cache", client, clients, client * clients),
            row("server_cache", server, servers, server * servers),
            row("pool_cache", 0, pools.len(), 0),
            row("statement_texts", 0, memo.entries, memo.bytes),
        ];
        if let Some(resident) = resident() {
            rows.push(row("resident_process", 0, 1, resident));
        }
        rows
    }

    fn state(&self) -> Vec<Row> {
        let paused = self.shared.pools.is_all_paused();
        let running = self.shared.standing.borrow().running == Running::Serving;
        let word = |yes: bool| if yes { "yes" } else { "no" };
        [
            ("active", running && !paused),
            ("paused", paused),
            ("suspended", false),
            ("shutting_down", !running),
        ]
        .into_iter()
        .map(|(key, is)| Writer::new().text(key).text(word(is)).row())
        .collect()
    }

    fn dns_hosts(&self) -> Vec<Row> {
        let ttl = self.live.config.pool.dns_ttl;
        let row = |host: crate::pool::pools::HostReport| {
            let addresses: Vec<_> = host.addresses.iter().map(ToString::to_string).collect();
            Writer::new()
                .text(host.host)
                .int8(ttl.map_or(0, |ttl| ttl.as_secs()))
                .text(addresses.join(","))
                .row()
        };
        self.shared.pools.hosts().into_iter().map(row).collect()
    }

    fn upstreams(&self) -> Vec<Row> {
        let row = |upstream: &Arc<Upstream>| {
            let load = self.shared.pools.load(upstream.id)?;
            let role = match upstream.role {
                Role::Primary => "primary",
                Role::Replica => "replica",
            };
            let row = Writer::new()
                .text(&upstream.name)
                .text(role)
                .text(&upstream.url.host)
                .int4(upstream.url.port)
                .int4(load.open)
                .int4(load.open_max.unwrap_or(0))
                .int4(load.connecting)
                .int4(load.connecting_max)
                .int4(load.starving);
            Some(row.row())
        };
        self.live.upstreams.iter().filter_map(row).collect()
    }

    fn replicas(&self) -> Vec<Row> {
        let replicas = self
            .live
            .upstreams
            .iter()
            .filter(|upstream| upstream.role == Role::Replica);
        let row = |replica: &Arc<Upstream>| {
            let lsn = replica.lsn();
            let open = self
                .shared
                .pools
                .load(replica.id)
                .map_or(0, |load| load.open);
            Writer::new()
                .text(&replica.name)
                .text(if replica.is_healthy() { "yes" } else { "no" })
                .text(format!("{:X}/{:X}", lsn >> 32, lsn & 0xffff_ffff))
                .int8(replica.lag_bytes())
                .text(&replica.url.host)
                .int4(replica.url.port)
                .int4(open)
                .row()
        };
        replicas.map(row).collect()
    }

    fn routes(&self) -> Vec<Row> {
        let counters = &self.shared.counters;
        [
            ("primary", &counters.to_primary),
            ("replica", &counters.to_replica),
            ("flowgate", &counters.answered_here),
            (
                "read kept on primary: no replica was fresh enough",
                &counters.replica_not_fresh,
            ),
            (
                "read kept on primary: the replica refused it",
                &counters.replica_refused,
            ),
        ]
        .into_iter()
        .map(|(to, counter)| Writer::new().text(to).int8(counter.get()).row())
        .collect()
    }

    fn pins(&self) -> Vec<Row> {
        let clients = self.shared.roster.all();
        let now = |name: &str| {
            let reason = PIN_REASONS.iter().find(|(_, known)| *known == name);
            reason.map_or(0, |(reason, _)| {
                let pinned = clients
                    .iter()
                    .filter(|entry| entry.pins().contains(*reason));
                pinned.count()
            })
        };
        self.shared
            .counters
            .pins()
            .map(|(reason, count)| {
                Writer::new()
                    .text(reason)
                    .int8(count)
                    .int4(now(reason))
                    .row()
            })
            .collect()
    }

    fn subscribers(&self) -> Vec<Row> {
        let channels = self.shared.hubs.report().into_iter();
        channels
            .map(|channel| {
                Writer::new()
                    .text(channel.database)
                    .text(channel.name)
                    .text(channel.kind)
                    .int4(channel.subscribers)
                    .int8(channel.queued)
                    .row()
            })
            .collect()
    }

    fn parked(&self) -> Vec<Row> {
        let queues = self.shared.park.report().into_iter();
        queues
            .map(|queue| {
                Writer::new()
                    .text(queue.name.database.as_str())
                    .text(queue.name.queue.as_str())
                    .int4(queue.waiting)
                    .int4(queue.reading)
                    .int8(u64::try_from(queue.longest.as_millis()).unwrap_or(u64::MAX))
                    .row()
            })
            .collect()
    }

    /// Of all pools of an upstream: the servers there may be and that are in use, and by class who waits and was refused; then of
    /// those of each user the configuration names.
    fn limits(&self) -> Vec<Row> {
        let pools = self.shared.pools.report();
        let mut rows = Vec::new();
        for upstream in self.live.upstreams.iter() {
            let here = || pools.iter().filter(|pool| pool.upstream == upstream.id);
            let limit: usize = here().map(|pool| pool.standing.size).sum();
            let adapted = self.shared.pools.adapted(upstream.id);
            let in_use: usize = here()
                .map(|pool| pool.standing.counts.open - pool.standing.counts.idle)
                .sum();
            for worth in Worth::ALL {
                let at = worth as usize;
                let row = Writer::new()
                    .text(&upstream.name)
                    .text(worth.name())
                    .null()
                    .null()
                    .int4(limit)
                    .int4(in_use)
                    .int4(here().map(|pool| pool.standing.waiting[at]).sum::<usize>())
                    .int8(here().map(|pool| pool.standing.shed[at]).sum::<u64>());
                rows.push(adaptive(row, adapted.as_ref()).row());
            }
            for role in &self.live.config.roles {
                let own = || here().filter(|pool| pool.user == role.name);
                let counts = || own().map(|pool| pool.standing.counts);
                let row = Writer::new()
                    .text(&upstream.name)
                    .null()
                    .text(role.name.as_str())
                    .text(role.terms.priority.name())
                    .int4(own().map(|pool| pool.standing.size).sum::<usize>())
                    .int4(
                        counts()
                            .map(|counts| counts.open - counts.idle)
                            .sum::<usize>(),
                    )
                    .int4(counts().map(|counts| counts.waiting).sum::<usize>())
                    .int8(
                        own()
                            .map(|pool| pool.standing.shed.iter().sum::<u64>())
                            .sum::<u64>(),
                    );
                rows.push(adaptive(row, None).row());
            }
        }
        rows
    }

    /// Those remembered for their freshness, and those somebody listens to.
    fn runs(&self) -> Vec<Row> {
        let mut listened: BTreeMap<String, usize> = BTreeMap::new();
        for channel in self.shared.hubs.report() {
            if let Some(run) = channel.run_id {
                *listened.entry(run).or_default() += channel.subscribers;
            }
        }
        let mut rows = Vec::new();
        for (run, since, writing) in self.shared.runs.report() {
            let run = run.to_string();
            let ago = self.now.saturating_duration_since(since).as_millis();
            let subscribers = listened.remove(&run).unwrap_or(0);
            rows.push(
                Writer::new()
                    .text(run)
                    .int4(writing)
                    .int8(u64::try_from(ago).unwrap_or(u64::MAX))
                    .int4(subscribers)
                    .row(),
            );
        }
        rows.extend(listened.into_iter().map(|(run, subscribers)| {
            let row = Writer::new().text(run).int4(0).null();
            row.int4(subscribers).row()
        }));
        rows
    }

    fn memo(&self) -> Vec<Row> {
        let stats = self.live.classifier.memo_stats();
        [
            ("hits", stats.hits),
            ("misses", stats.misses),
            ("evictions", stats.evictions),
            ("too_large", stats.too_large),
            ("entries", stats.entries as u64),
            ("bytes", stats.bytes as u64),
        ]
        .into_iter()
        .map(|(name, count)| Writer::new().text(name).int8(count).row())
        .collect()
    }

    fn time(&self, at: Instant) -> String {
        let ago = self.now.saturating_duration_since(at);
        utc(self.wall.checked_sub(ago).unwrap_or(UNIX_EPOCH))
    }
}

fn addresses(row: Writer, far: Option<SocketAddr>, near: Option<SocketAddr>) -> Writer {
    [far, near]
        .into_iter()
        .fold(row, |row, address| match address {
            Some(address) => row
                .text(address.ip().to_canonical().to_string())
                .int4(address.port()),
            None => row.null().null(),
        })
}

/// `2026-11-23 13:41:29 UTC`
fn utc(at: SystemTime) -> String {
    let seconds = at
        .duration_since(UNIX_EPOCH)
        .map_or(0, |past| past.as_secs());
    let (days, of_day) = (seconds / 86_400, seconds % 86_400);
    // Years begin in March here, so that the odd day comes last; eras are the 400 years after which all repeats.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (of_day / 3_600, of_day / 60 % 60, of_day % 60);
    format!("{year:04}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

/// Of this process, in bytes; where `/proc` says so.
fn resident() -> Option<usize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kb: usize = line.split_whitespace().next()?.parse().ok()?;
    Some(kb * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_table_is_found_by_its_name() {
        for table in TABLES {
            assert_eq!(Show::named(table.name), Some(table.show));
            assert_eq!(table.show.columns().len(), table.columns.len());
        }
        assert_eq!(Show::named("FDS"), None);
    }

    #[test]
    fn times_read_as_a_calendar_has_them() {
        for (seconds, expected) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_827_696, "2000-02-29 12:34:56 UTC"),
            (1_709_251_200, "2024-03-01 00:00:00 UTC"),
            (1_795_441_289, "2026-11-23 13:41:29 UTC"),
            (4_102_444_799, "2099-12-31 23:59:59 UTC"),
        ] {
            assert_eq!(utc(UNIX_EPOCH + Duration::from_secs(seconds)), expected);
        }
    }

    #[test]
    fn a_value_is_the_same_in_both_formats() {
        assert_eq!(Value::Int4(7).bytes(0), Some(b"7".to_vec()));
        assert_eq!(Value::Int4(7).bytes(1), Some(vec![0, 0, 0, 7]));
        assert_eq!(Value::Int8(-1).bytes(1), Some(vec![0xff; 8]));
        assert_eq!(Value::Text("x".into()).bytes(1), Some(b"x".to_vec()));
        assert_eq!(Value::Null.bytes(0), None);
        assert_eq!(
            [format_of(&[], 3), format_of(&[1], 3), format_of(&[0, 1], 1)],
            [0, 1, 1]
        );
    }
}
