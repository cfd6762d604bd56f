//! Installs, checks and removes the SQL of `sql/`, and sees to it that pgmq is there. Never touches a pgflow somebody
//! else installed. Called by `commands/install`, `commands/demo` and the tests.
//!
//! One session advisory lock makes concurrent installs take turns; one transaction makes each all or nothing. What was
//! installed stands in `flowgate.installed`, one row a component: its version (ours plus a hash of the files) and a
//! fingerprint of every object, by which `check` sees what was changed or dropped since; for pgflow also its API level,
//! which is kept unless a higher one is asked for, and never lowered.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::io;
use std::time::Duration;

use sha2::{Digest, Sha256};
use tokio_postgres::Client;
use tokio_postgres::error::ErrorPosition;

use crate::config::ConnectUrl;
use crate::server::control::{self, DialError};

/// Every `NNNN_*.sql` in apply order: name and text.
const FILES: &[(&str, &str)] = include!(concat!(env!("OUT_DIR"), "/sql_files.rs"));
const LOCK: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/sql/lock.sql"));
const UNINSTALL: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/sql/uninstall.sql"));

/// `0039_check_send.sql` asks for it.
const REPLACE_SEND: &str = "set local flowgate.replace_send = 'on'";
const DIRECT_NOTIFY: &str = "select flowgate.set_direct_notify(true)";

/// Any fixed number: "flowgate" in ASCII.
const INSTALL_LOCK: i64 = 0x666c_6f77_6761_7465;
const CONNECT_WAIT_MAX: Duration = Duration::from_secs(10);
const SERVER_VERSION_MIN: i32 = 150_000;

/// What pgflow calls. Without these a schema `pgmq` is not pgmq.
const PGMQ_FUNCTIONS: &[&str] = &[
    "archive",
    "create",
    "format_table_name",
    "list_queues",
    "read",
    "send",
    "send_batch",
    "set_vt",
];

/// The objects of the schemas in `$1` with a hash of what makes each. Partitions come and go, so they don't count; nor
/// does anything in `realtime` that is not ours. `search_path` must be empty, or names come unqualified.
const OBJECTS: &str = "\
select coalesce(jsonb_object_agg(object, hash), '{}') from (
    select 'function ' || p.oid::regprocedure::text as object,
        md5(concat_ws('|', p.prosrc, p.provolatile, p.prosecdef, p.proconfig::text, p.prorettype::regtype::text,
            p.proretset, pg_get_function_arguments(p.oid))) as hash
    from pg_proc as p
    where p.pronamespace::regnamespace::text = any ($1::text[])
        and (p.pronamespace::regnamespace::text <> 'realtime' or p.proname = 'send')
    union all
    select case c.relkind when 'v' then 'view ' when 'c' then 'type ' else 'table ' end || c.oid::regclass::text,
        md5(concat_ws('|', c.relkind, case when c.relkind = 'v' then pg_get_viewdef(c.oid) end,
            (select string_agg(concat_ws(' ', a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull,
                    pg_get_expr(d.adbin, d.adrelid)), ',' order by a.attnum)
                from pg_attribute as a
                left join pg_attrdef as d on d.adrelid = a.attrelid and d.adnum = a.attnum
                where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped)))
    from pg_class as c
    where c.relnamespace::regnamespace::text = any ($1::text[]) and c.relkind in ('r', 'p', 'v', 'c')
        and not c.relispartition
        and (c.relnamespace::regnamespace::text <> 'realtime' or c.relname = 'messages')
    union all
    select 'index ' || i.indexrelid::regclass::text, md5(pg_get_indexdef(i.indexrelid))
    from pg_index as i join pg_class as c on c.oid = i.indrelid
    where c.relnamespace::regnamespace::text = any ($1::text[] ) and not c.relispartition
        and c.relnamespace::regnamespace::text <> 'realtime' and c.relkind in ('r', 'p')
    union all
    select 'trigger ' || t.tgname || ' on ' || c.oid::regclass::text, md5(pg_get_triggerdef(t.oid) || t.tgenabled::text)
    from pg_trigger as t join pg_class as c on c.oid = t.tgrelid
    where c.relnamespace::regnamespace::text = any ($1::text[]) and not t.tgisinternal and not c.relispartition
        and c.relnamespace::regnamespace::text <> 'realtime'
        and t.tgname <> 'notify_directly'
) as objects";

/// A part of `sql/` with its own row in `flowgate.installed`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Component {
    /// Files below 0100: the outbox and what writes it.
    Flowgate,
    /// Files from 0100 on: pgflow's core.
    Pgflow,
}

impl Component {
    const ALL: [Self; 2] = [Self::Flowgate, Self::Pgflow];

    pub fn name(self) -> &'static str {
        match self {
            Self::Flowgate => "flowgate",
            Self::Pgflow => "pgflow",
        }
    }

    fn schemas(self) -> &'static [&'static str] {
        match self {
            Self::Flowgate => &["flowgate", "realtime"],
            Self::Pgflow => &["pgflow"],
        }
    }

    fn files(self, api: PgflowApi) -> impl Iterator<Item = &'static (&'static str, &'static str)> {
        FILES.iter().filter(move |(name, _)| {
            let below_100 = *name < "0100";
            match self {
                Self::Flowgate => below_100,
                Self::Pgflow => !below_100 && api.has(name),
            }
        })
    }

    /// Ours and a hash of the files: `0.1.0+3f2a9c1d04be`.
    pub fn version(self, api: PgflowApi) -> String {
        let mut hash = Sha256::new();
        for (name, text) in self.files(api) {
            for part in [name, text] {
                hash.update(part.len().to_be_bytes());
                hash.update(part);
            }
        }
        let mut version = format!("{}+", env!("CARGO_PKG_VERSION"));
        for byte in &hash.finalize()[..6] {
            write!(version, "{byte:02x}").expect("a String takes all");
        }
        version
    }

    /// Records what this transaction installed, fingerprint included. Plain SQL, as `print` shows it too.
    fn record(self, api: PgflowApi) -> String {
        let schemas = self.schemas().join(",");
        let objects = OBJECTS.replace("$1", &format!("'{{{schemas}}}'"));
        let level = match self {
            Self::Flowgate => String::new(),
            Self::Pgflow => format!("'api', '{api}', "),
        };
        format!(
            "insert into flowgate.installed as i (component, version, installed_at, details)\n\
             select '{}', '{}', now(), jsonb_build_object({level}'by', current_user, 'objects', ({objects}))\n\
             on conflict (component) do update\n\
             set version = excluded.version, installed_at = excluded.installed_at, details = excluded.details",
            self.name(),
            self.version(api),
        )
    }
}

impl fmt::Display for Component {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Whose functions pgflow's clients expect, in ascending order: a higher level is installed over a lower one in place.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum PgflowApi {
    #[default]
    #[value(name = "0.7")]
    V0_7,
    #[value(name = "0.14")]
    V0_14,
}

impl PgflowApi {
    const ALL: [Self; 2] = [Self::V0_7, Self::V0_14];

    pub fn name(self) -> &'static str {
        match self {
            Self::V0_7 => "0.7",
            Self::V0_14 => "0.14",
        }
    }

    fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|api| api.name() == name)
    }

    /// Files 0600 to 0899 are what 0.14 changes.
    fn has(self, file: &str) -> bool {
        match self {
            Self::V0_7 => !("0600".."0900").contains(&file),
            Self::V0_14 => true,
        }
    }

    /// What of pgmq it needs beyond `PGMQ_FUNCTIONS`.
    fn needs_headers(self) -> bool {
        match self {
            Self::V0_7 => false,
            Self::V0_14 => true,
        }
    }
}

impl fmt::Display for PgflowApi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[derive(Clone, Copy, Debug, Default)]
pub struct InstallOptions {
    /// `None`: the level that is installed, or 0.7 where there is none.
    pub pgflow: Option<PgflowApi>,
    /// Neither pgmq nor pgflow, and in the place of a `realtime.send` of somebody else's.
    pub events_only: bool,
    /// Events are also notified by SQL itself.
    pub direct_notify: bool,
}

impl InstallOptions {
    fn components(self) -> &'static [Component] {
        if self.events_only {
            &[Component::Flowgate]
        } else {
            &Component::ALL
        }
    }
}

/// What an install found and did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    pub pgmq: PgmqOutcome,
    /// Of our own pgflow; beside somebody else's it means nothing.
    pub api: PgflowApi,
    pub components: Vec<(Component, Outcome)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PgmqOutcome {
    AlreadyThere,
    Extension,
    /// The SQL embedded in the `pgmq` crate.
    Embedded,
    /// Events need none.
    NotAskedFor,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Installed {
        version: String,
    },
    Upgraded {
        from: String,
        version: String,
    },
    /// The right version, but objects had been changed or dropped.
    Repaired {
        version: String,
        objects: Vec<String>,
    },
    UpToDate {
        version: String,
    },
    /// Somebody else's.
    LeftAlone,
}

/// How a database compares with what we would install.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    pub pgmq_missing: Vec<String>,
    /// The level compared with: that asked for, else that installed, else the default.
    pub api: PgflowApi,
    pub components: Vec<(Component, State)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    Absent {
        wanted: String,
    },
    Other {
        installed: String,
        wanted: String,
    },
    Damaged {
        version: String,
        missing: Vec<String>,
        changed: Vec<String>,
    },
    UpToDate {
        version: String,
    },
    /// Somebody else's; it is used as it is.
    Foreign,
}

impl Check {
    pub fn is_up_to_date(&self) -> bool {
        self.pgmq_missing.is_empty()
            && self.components.iter().all(|(_, state)| match state {
                State::UpToDate { .. } | State::Foreign => true,
                State::Absent { .. } | State::Other { .. } | State::Damaged { .. } => false,
            })
    }
}

/// What an uninstall left in place because it is not ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removal {
    pub foreign_pgflow: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    #[error("cannot connect to {url}: {reason}")]
    Connect { url: String, reason: String },
    #[error("{url} runs Postgres {version}; flowgate needs 15 or later")]
    TooOld { url: String, version: String },
    #[error("{url} is a replica; name its primary")]
    Replica { url: String },
    #[error("{component} was installed by a newer flowgate ({installed}; this one has {ours})")]
    Newer {
        component: Component,
        installed: String,
        ours: String,
    },
    #[error(
        "this database has pgflow {installed}, and {asked} is lower: leave --pgflow out to keep {installed}; \
         to go back, uninstall first, which drops all runs"
    )]
    Downgrade {
        installed: PgflowApi,
        asked: PgflowApi,
    },
    #[error(
        "pgflow {api} needs pgmq 1.5.0 or later (the type pgmq.message_record here has no headers): \
         upgrade the extension pgmq, or install pgflow 0.7"
    )]
    PgmqTooOld { api: PgflowApi },
    #[error(
        "this server does not offer the extension pgmq, and this build of flowgate lacks its SQL (feature `pgmq-sql`); \
         install the package of pgmq on the server"
    )]
    NoPgmq,
    #[error("schema pgmq is there, but not all of it: {} missing; repair or drop it", missing.join(", "))]
    PgmqIncomplete { missing: Vec<String> },
    #[error("installing pgmq: {0}")]
    Pgmq(String),
    /// `line` where Postgres says one; of many errors in a definition it does not.
    #[error("sql/{name}{}: {message}", line.map(|line| format!(", line {line}")).unwrap_or_default())]
    File {
        name: String,
        line: Option<usize>,
        message: String,
    },
    #[error("{doing}: {}", describe(source))]
    Sql {
        doing: &'static str,
        source: tokio_postgres::Error,
    },
}

/// Brings pgmq, the outbox and pgflow's core to our version. Waits for an install in progress (at most a minute).
pub async fn install(url: &ConnectUrl, options: InstallOptions) -> Result<Report, SchemaError> {
    let mut client = open(url).await?;
    let doing = |doing| move |source| SchemaError::Sql { doing, source };
    if client
        .query_one("select pg_is_in_recovery()", &[])
        .await
        .map_err(doing("asking for its role"))?
        .get(0)
    {
        return Err(SchemaError::Replica {
            url: url.to_string(),
        });
    }
    lock(&client).await?;
    let before = look(&client, options).await?;
    let ours = |(component, state): &(Component, State)| {
        *component == Component::Pgflow && !matches!(state, State::Foreign)
    };
    let api = before.api;
    let pgmq = if options.events_only {
        PgmqOutcome::NotAskedFor
    } else {
        install_pgmq(&client, url).await?
    };
    if before.components.iter().any(ours)
        && api.needs_headers()
        && !pgmq_has_headers(&client).await?
    {
        return Err(SchemaError::PgmqTooOld { api });
    }
    let mut components = Vec::new();
    for (component, state) in before.components {
        let outcome = match state {
            State::Foreign => Outcome::LeftAlone,
            State::UpToDate { version } => Outcome::UpToDate { version },
            State::Absent { wanted } => Outcome::Installed { version: wanted },
            State::Other { installed, wanted } if is_newer(&installed, &wanted) => {
                return Err(SchemaError::Newer {
                    component,
                    installed,
                    ours: wanted,
                });
            }
            State::Other { installed, wanted } => Outcome::Upgraded {
                from: installed,
                version: wanted,
            },
            State::Damaged {
                version,
                mut missing,
                changed,
            } => {
                missing.extend(changed);
                Outcome::Repaired {
                    version,
                    objects: missing,
                }
            }
        };
        components.push((component, outcome));
    }
    let due = |outcome: &Outcome| match outcome {
        Outcome::Installed { .. } | Outcome::Upgraded { .. } | Outcome::Repaired { .. } => true,
        Outcome::UpToDate { .. } | Outcome::LeftAlone => false,
    };
    if components.iter().any(|(_, outcome)| due(outcome)) {
        let transaction = client.transaction().await.map_err(doing("beginning"))?;
        let locked = transaction.batch_execute(LOCK).await;
        locked.map_err(|error| in_file("lock.sql", LOCK, &error))?;
        if options.events_only {
            let asked = transaction.batch_execute(REPLACE_SEND).await;
            asked.map_err(doing("beginning"))?;
        }
        for (component, _) in components.iter().filter(|(_, outcome)| due(outcome)) {
            for (name, text) in component.files(api) {
                let applied = transaction.batch_execute(text).await;
                applied.map_err(|error| in_file(name, text, &error))?;
            }
        }
        // A file may have set something for itself.
        let empty_path = transaction
            .batch_execute("set local search_path = ''")
            .await;
        empty_path.map_err(doing("recording"))?;
        // Only now, and of both: pgflow's files have objects in schema flowgate too.
        for (component, outcome) in &components {
            if *outcome != Outcome::LeftAlone {
                let recorded = transaction.batch_execute(&component.record(api)).await;
                recorded.map_err(doing("recording"))?;
            }
        }
        transaction.commit().await.map_err(doing("committing"))?;
    }
    if options.direct_notify {
        let switched = client.batch_execute(DIRECT_NOTIFY).await;
        switched.map_err(doing("switching direct_notify on"))?;
    }
    Ok(Report {
        pgmq,
        api,
        components,
    })
}

/// Whether the level that is installed is as it should be. Changes nothing, takes no lock.
pub async fn check(url: &ConnectUrl) -> Result<Check, SchemaError> {
    check_for(url, InstallOptions::default()).await
}

/// Whether `install` with these options would find nothing to do. Changes nothing, takes no lock.
pub async fn check_for(url: &ConnectUrl, options: InstallOptions) -> Result<Check, SchemaError> {
    look(&open(url).await?, options).await
}

/// Drops what `install` made, data included. pgmq stays, and so does a pgflow that is not ours.
pub async fn uninstall(url: &ConnectUrl) -> Result<Removal, SchemaError> {
    let mut client = open(url).await?;
    lock(&client).await?;
    let found = look(&client, InstallOptions::default()).await?;
    let doing = |source| SchemaError::Sql {
        doing: "uninstalling",
        source,
    };
    let transaction = client.transaction().await.map_err(doing)?;
    let locked = transaction.batch_execute(LOCK).await;
    locked.map_err(|error| in_file("lock.sql", LOCK, &error))?;
    let dropped = transaction.batch_execute(UNINSTALL).await;
    dropped.map_err(|error| in_file("uninstall.sql", UNINSTALL, &error))?;
    transaction.commit().await.map_err(doing)?;
    Ok(Removal {
        foreign_pgflow: found
            .components
            .contains(&(Component::Pgflow, State::Foreign)),
    })
}

/// The whole SQL, as `psql` takes it. pgmq must be there first, and no pgflow of somebody else's.
pub fn print(out: &mut impl io::Write, options: InstallOptions) -> io::Result<()> {
    let api = options.pgflow.unwrap_or_default();
    writeln!(
        out,
        "-- flowgate {}, pgflow {api}. First: create extension pgmq;",
        env!("CARGO_PKG_VERSION")
    )?;
    writeln!(
        out,
        "begin;\nselect pg_advisory_xact_lock({INSTALL_LOCK});\nset local search_path = '';"
    )?;
    if options.events_only {
        writeln!(out, "{REPLACE_SEND};")?;
    } else {
        writeln!(out, "\n{}", no_downgrade(api))?;
    }
    writeln!(out, "\n-- sql/lock.sql\n{}", LOCK.trim_end())?;
    for &component in options.components() {
        for (name, text) in component.files(api) {
            writeln!(out, "\n-- sql/{name}\n{}", text.trim_end())?;
        }
    }
    for component in options.components() {
        writeln!(out, "\n{};", component.record(api))?;
    }
    if options.direct_notify {
        writeln!(out, "\n{DIRECT_NOTIFY};")?;
    }
    writeln!(out, "commit;")
}

/// What `install` itself asks before it begins.
fn no_downgrade(api: PgflowApi) -> String {
    let known = PgflowApi::ALL.into_iter().filter(|known| *known <= api);
    let known: Vec<_> = known.map(|known| format!("'{known}'")).collect();
    format!(
        "-- A higher level is never replaced by a lower one.\n\
         do $$\n\
         begin\n    \
             if to_regclass('flowgate.installed') is not null then\n        \
                 if exists (\n            \
                     select from flowgate.installed as i\n            \
                     where i.component = 'pgflow' and i.details ->> 'api' not in ({})\n        \
                 ) then\n            \
                     raise exception 'this database has a pgflow later than {api}';\n        \
                 end if;\n    \
             end if;\n\
         end;\n\
         $$;",
        known.join(", ")
    )
}

async fn open(url: &ConnectUrl) -> Result<Client, SchemaError> {
    let failed = |error: DialError| {
        let reason = match &error {
            DialError::Postgres(source) => describe(source),
            DialError::Timeout(_) | DialError::Roots(_) => error.to_string(),
        };
        SchemaError::Connect {
            url: url.to_string(),
            reason,
        }
    };
    let (client, connection) = control::dial(url, "flowgate install", CONNECT_WAIT_MAX)
        .await
        .map_err(failed)?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "the installer's connection broke");
        }
    });
    let doing = |source| SchemaError::Sql {
        doing: "asking for its version",
        source,
    };
    let version =
        "select current_setting('server_version_num')::int, current_setting('server_version')";
    let row = client.query_one(version, &[]).await.map_err(doing)?;
    if row.get::<_, i32>(0) < SERVER_VERSION_MIN {
        return Err(SchemaError::TooOld {
            url: url.to_string(),
            version: row.get(1),
        });
    }
    // An empty path: names come out qualified, and nobody's objects come in between. The timeout: a lock we wait for
    // blocks all who come after us.
    let settings =
        "set search_path = ''; set client_min_messages = warning; set lock_timeout = '10s'";
    client.batch_execute(settings).await.map_err(doing)?;
    Ok(client)
}

async fn lock(client: &Client) -> Result<(), SchemaError> {
    let doing = |source| SchemaError::Sql {
        doing: "waiting for another install to end",
        source,
    };
    let lock = format!(
        "set lock_timeout = '60s'; select pg_advisory_lock({INSTALL_LOCK}); set lock_timeout = '10s'"
    );
    client.batch_execute(&lock).await.map_err(doing)
}

async fn look(client: &Client, options: InstallOptions) -> Result<Check, SchemaError> {
    let doing = |source| SchemaError::Sql {
        doing: "looking at what is installed",
        source,
    };
    let exists = "select to_regclass('flowgate.installed') is not null, to_regnamespace('pgflow') is not null";
    let row = client.query_one(exists, &[]).await.map_err(doing)?;
    let (has_record, has_pgflow): (bool, bool) = (row.get(0), row.get(1));
    let mut recorded: Vec<Recorded> = Vec::new();
    if has_record {
        let all = "select component, version, details -> 'objects', details ->> 'api' from flowgate.installed";
        let rows = client.query(all, &[]).await.map_err(doing)?;
        recorded.extend(rows.iter().map(|row| Recorded {
            component: row.get(0),
            version: row.get(1),
            objects: row.get(2),
            api: row.get(3),
        }));
    }
    let of = |component: Component| recorded.iter().find(|it| it.component == component.name());
    let api = level(of(Component::Pgflow), options)?;
    let mut components = Vec::new();
    for &component in options.components() {
        let wanted = component.version(api);
        let state = match of(component) {
            None if component == Component::Pgflow && has_pgflow => State::Foreign,
            None => State::Absent { wanted },
            Some(recorded) if recorded.version != wanted => State::Other {
                installed: recorded.version.clone(),
                wanted,
            },
            Some(recorded) => {
                let now = client
                    .query_one(OBJECTS, &[&component.schemas()])
                    .await
                    .map_err(doing)?
                    .get(0);
                compare(wanted, recorded.objects.clone(), now)
            }
        };
        components.push((component, state));
    }
    let mut pgmq_missing = if options.events_only {
        Vec::new()
    } else {
        missing_pgmq(client).await?
    };
    if !options.events_only
        && pgmq_missing.is_empty()
        && api.needs_headers()
        && !pgmq_has_headers(client).await?
    {
        pgmq_missing.push("headers in message_record (1.5.0)".to_owned());
    }
    Ok(Check {
        pgmq_missing,
        api,
        components,
    })
}

/// A row of `flowgate.installed`.
struct Recorded {
    component: String,
    version: String,
    objects: Option<serde_json::Value>,
    /// Not there in what was installed before there was more than one.
    api: Option<String>,
}

/// The level that counts, where `recorded` is what is installed.
fn level(recorded: Option<&Recorded>, options: InstallOptions) -> Result<PgflowApi, SchemaError> {
    let Some(recorded) = recorded else {
        return Ok(options.pgflow.unwrap_or_default());
    };
    let installed = match recorded.api.as_deref() {
        None => PgflowApi::V0_7,
        Some(name) => PgflowApi::from_name(name).ok_or_else(|| SchemaError::Newer {
            component: Component::Pgflow,
            installed: format!("{}, pgflow {name}", recorded.version),
            ours: Component::Pgflow.version(PgflowApi::V0_14),
        })?,
    };
    match options.pgflow {
        Some(asked) if asked < installed => Err(SchemaError::Downgrade { installed, asked }),
        Some(asked) => Ok(asked),
        None => Ok(installed),
    }
}

fn compare(version: String, recorded: Option<serde_json::Value>, now: serde_json::Value) -> State {
    let objects =
        |value| serde_json::from_value::<BTreeMap<String, String>>(value).unwrap_or_default();
    let (recorded, now) = (objects(recorded.unwrap_or_default()), objects(now));
    let missing: Vec<String> = recorded
        .keys()
        .filter(|name| !now.contains_key(*name))
        .cloned()
        .collect();
    let changed = recorded
        .iter()
        .filter(|(name, hash)| now.get(*name).is_some_and(|now| now != *hash));
    let changed: Vec<String> = changed.map(|(name, _)| name.clone()).collect();
    if missing.is_empty() && changed.is_empty() {
        State::UpToDate { version }
    } else {
        State::Damaged {
            version,
            missing,
            changed,
        }
    }
}

async fn missing_pgmq(client: &Client) -> Result<Vec<String>, SchemaError> {
    let missing = "select wanted from unnest($1::text[]) as wanted where not exists (
        select from pg_proc where pronamespace = to_regnamespace('pgmq') and proname = wanted)";
    let rows = client.query(missing, &[&PGMQ_FUNCTIONS]).await;
    let rows = rows.map_err(|source| SchemaError::Sql {
        doing: "looking for pgmq",
        source,
    })?;
    Ok(rows.iter().map(|row| row.get(0)).collect())
}

async fn pgmq_has_headers(client: &Client) -> Result<bool, SchemaError> {
    let has = "select exists (select from pg_attribute where attrelid = to_regclass('pgmq.message_record') \
        and attname = 'headers' and not attisdropped)";
    let row = client.query_one(has, &[]).await;
    let row = row.map_err(|source| SchemaError::Sql {
        doing: "looking at pgmq",
        source,
    })?;
    Ok(row.get(0))
}

async fn install_pgmq(client: &Client, url: &ConnectUrl) -> Result<PgmqOutcome, SchemaError> {
    let missing = missing_pgmq(client).await?;
    if missing.is_empty() {
        return Ok(PgmqOutcome::AlreadyThere);
    }
    if missing.len() < PGMQ_FUNCTIONS.len() {
        return Err(SchemaError::PgmqIncomplete { missing });
    }
    let doing = |source| SchemaError::Sql {
        doing: "installing the extension pgmq",
        source,
    };
    let offered = "select exists (select from pg_available_extensions where name = 'pgmq')";
    if client.query_one(offered, &[]).await.map_err(doing)?.get(0) {
        client
            .batch_execute("create extension if not exists pgmq")
            .await
            .map_err(doing)?;
        return Ok(PgmqOutcome::Extension);
    }
    install_embedded_pgmq(url).await
}

/// Over a second connection, as the crate speaks sqlx; ours holds the lock meanwhile.
#[cfg(feature = "pgmq-sql")]
async fn install_embedded_pgmq(url: &ConnectUrl) -> Result<PgmqOutcome, SchemaError> {
    use sqlx::postgres::{PgConnectOptions, PgPoolOptions, PgSslMode};

    use crate::config::SslMode;

    let mut options = PgConnectOptions::new_without_pgpass()
        .host(&url.host)
        .port(url.port)
        .username(&url.user)
        .database(&url.database)
        .application_name("flowgate install")
        .options([("client_min_messages", "warning")])
        .ssl_mode(match url.sslmode {
            SslMode::Disable => PgSslMode::Disable,
            SslMode::Allow => PgSslMode::Allow,
            SslMode::Prefer => PgSslMode::Prefer,
            SslMode::Require => PgSslMode::Require,
            SslMode::VerifyCa => PgSslMode::VerifyCa,
            SslMode::VerifyFull => PgSslMode::VerifyFull,
        });
    if let Some(password) = &url.password {
        options = options.password(password.expose());
    }
    if let Some(file) = &url.ssl_root_cert {
        options = options.ssl_root_cert(file);
    }
    if let (Some(cert), Some(key)) = (&url.ssl_cert, &url.ssl_key) {
        options = options.ssl_client_cert(cert).ssl_client_key(key);
    }
    let pool = PgPoolOptions::new()
        .max_connections(1)
        .acquire_timeout(CONNECT_WAIT_MAX)
        .connect_with(options)
        .await;
    let pool = pool.map_err(|error| SchemaError::Pgmq(error.to_string()))?;
    let installed = pgmq::install::install_sql_from_embedded(&pool).await;
    pool.close().await;
    installed.map_err(|error| SchemaError::Pgmq(error.to_string()))?;
    Ok(PgmqOutcome::Embedded)
}

#[cfg(not(feature = "pgmq-sql"))]
async fn install_embedded_pgmq(_url: &ConnectUrl) -> Result<PgmqOutcome, SchemaError> {
    Err(SchemaError::NoPgmq)
}

/// `0.2.0+…` is newer than `0.1.0+…`; of two builds of one version neither is.
fn is_newer(installed: &str, ours: &str) -> bool {
    let numbers = |version: &str| -> Option<Vec<u64>> {
        version
            .split(['+', '-'])
            .next()?
            .split('.')
            .map(|number| number.parse().ok())
            .collect()
    };
    numbers(installed) > numbers(ours)
}

fn in_file(name: &str, text: &str, error: &tokio_postgres::Error) -> SchemaError {
    let line = match error.as_db_error().and_then(|db| db.position()) {
        Some(ErrorPosition::Original(position)) => Some(line_of(text, *position as usize)),
        // Inside a function body: `where` names it.
        Some(ErrorPosition::Internal { .. }) | None => None,
    };
    SchemaError::File {
        name: name.to_owned(),
        line,
        message: describe(error),
    }
}

/// `position` counts characters from 1.
fn line_of(text: &str, position: usize) -> usize {
    1 + text
        .chars()
        .take(position.saturating_sub(1))
        .filter(|c| *c == '\n')
        .count()
}

/// tokio-postgres' own text of a server's error is "db error".
fn describe(error: &tokio_postgres::Error) -> String {
    let Some(db) = error.as_db_error() else {
        let cause = std::error::Error::source(error)
            .map(|cause| format!(": {cause}"))
            .unwrap_or_default();
        return format!("{error}{cause}");
    };
    let mut text = format!("{} (SQLSTATE {})", db.message(), db.code().code());
    for (label, more) in [
        ("detail", db.detail()),
        ("hint", db.hint()),
        ("where", db.where_()),
    ] {
        if let Some(more) = more {
            write!(text, "; {label}: {}", more.replace('\n', ", ")).expect("a String takes all");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_are_in_order_and_each_component_has_some() {
        assert!(FILES.is_sorted_by_key(|(name, _)| *name));
        let [low, high] =
            PgflowApi::ALL.map(|api| Component::ALL.map(|component| component.files(api).count()));
        assert!(low[0] > 0 && low[0] == high[0]);
        assert!(low[1] > 0 && low[1] < high[1]);
        assert_eq!(high[0] + high[1], FILES.len());
    }

    #[test]
    fn a_version_is_ours_and_a_hash_of_the_files() {
        let [flowgate, pgflow] = Component::ALL.map(|component| component.version(PgflowApi::V0_7));
        assert_ne!(flowgate, pgflow);
        assert_ne!(pgflow, Component::Pgflow.version(PgflowApi::V0_14));
        assert_eq!(flowgate, Component::Flowgate.version(PgflowApi::V0_14));
        let (ours, hash) = pgflow.split_once('+').unwrap();
        assert_eq!((ours, hash.len()), (env!("CARGO_PKG_VERSION"), 12));
    }

    #[test]
    fn the_installed_level_is_kept_raised_when_asked_and_never_lowered() {
        let settled = |installed: Option<&str>, asked: Option<PgflowApi>| {
            let recorded = installed.map(|api| Recorded {
                component: "pgflow".into(),
                version: "0.1.0+aa".into(),
                objects: None,
                api: (!api.is_empty()).then(|| api.to_owned()),
            });
            level(
                recorded.as_ref(),
                InstallOptions {
                    pgflow: asked,
                    ..InstallOptions::default()
                },
            )
        };
        let [low, high] = PgflowApi::ALL;
        assert_eq!(settled(None, None).unwrap(), low);
        assert_eq!(settled(None, Some(high)).unwrap(), high);
        assert_eq!(
            settled(Some(""), None).unwrap(),
            low,
            "installed before there was a choice"
        );
        assert_eq!(settled(Some("0.7"), Some(high)).unwrap(), high);
        assert_eq!(settled(Some("0.14"), None).unwrap(), high);
        let lower = settled(Some("0.14"), Some(low)).unwrap_err().to_string();
        assert!(
            lower.contains("has pgflow 0.14, and 0.7 is lower"),
            "{lower}"
        );
        let unknown = settled(Some("0.99"), None).unwrap_err().to_string();
        assert!(
            unknown.contains("newer flowgate (0.1.0+aa, pgflow 0.99;"),
            "{unknown}"
        );
    }

    #[test]
    fn only_a_higher_version_is_newer() {
        assert!(is_newer("0.2.0+aa", "0.1.9+bb"));
        assert!(is_newer("0.10.0+aa", "0.9.0+bb"));
        assert!(!is_newer("0.1.0+ff", "0.1.0+aa"));
        assert!(!is_newer("by hand", "0.1.0+aa"));
    }

    #[test]
    fn a_position_is_in_characters_and_stands_on_a_line() {
        let text = "-- ä…\nselect\n  nonsense";
        let position = text.chars().position(|c| c == 'n').unwrap() + 1;
        assert_eq!(
            [1, 6, 7, position].map(|position| line_of(text, position)),
            [1, 1, 2, 3]
        );
    }

    #[test]
    fn what_changed_and_what_is_missing_is_told_apart() {
        let recorded = serde_json::json!({"a": "1", "b": "2", "c": "3"});
        let now = serde_json::json!({"a": "1", "b": "x", "new": "4"});
        let damaged = State::Damaged {
            version: "v".into(),
            missing: vec!["c".into()],
            changed: vec!["b".into()],
        };
        assert_eq!(compare("v".into(), Some(recorded), now.clone()), damaged);
        assert_eq!(
            compare("v".into(), Some(now.clone()), now),
            State::UpToDate {
                version: "v".into()
            }
        );
    }
}
