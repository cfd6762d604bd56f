//! A Postgres of our own: one primary and its streaming replicas, in a temporary folder or a kept one. Never touches a
//! server it did not start. Called by `commands/demo` and the tests.
//!
//! Replicas are copies of the stopped primary's folder, made before its first start with them, so that nothing but
//! `initdb` and `postgres` is needed (some builds bring no `pg_basebackup`). Every setting goes in by command line: ports
//! change from start to start, and a kept folder holds none of them.
//!
//! Nothing outlives us: see `guard`.

mod binaries;
mod guard;

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom};
use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::Signal;
use tokio::time::Instant;
use tokio_postgres::NoTls;

use self::binaries::Binaries;
use self::guard::{Guard, RunAs, Ward};

/// Crash recovery of a kept folder may take its time; a fresh one needs about a second.
const START_WAIT_MAX: Duration = Duration::from_secs(60);
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(2);
const STOP_WAIT_MAX: Duration = Duration::from_secs(10);
const POLL: Duration = Duration::from_millis(10);
/// Between picking a free port and binding it, someone else may take it.
const PORT_TRIES: usize = 5;
const LOG_TAIL_BYTES: u64 = 4096;

pub const SUPERUSER: &str = "postgres";

/// What to start. `Default`: temporary, one replica, free ports, no password, not crash-safe.
#[derive(Clone, Debug)]
pub struct ClusterOptions {
    /// Kept there and reused by the next start; `None` throws everything away at the end.
    pub data: Option<PathBuf>,
    /// The primary's, then each replica's; what is missing is picked among the free ones.
    pub ports: Vec<u16>,
    /// `fsync`: survive a crash of the machine.
    pub durable: bool,
    pub replicas: usize,
    /// With one, `scram-sha-256` for everybody, and this is the superuser's; without, `trust`. Fixed at first start.
    pub password: Option<String>,
    /// Settings for every server, above ours.
    pub settings: Vec<(String, String)>,
}

impl Default for ClusterOptions {
    fn default() -> Self {
        let (data, ports, password, settings) = (None, Vec::new(), None, Vec::new());
        Self {
            data,
            ports,
            durable: false,
            replicas: 1,
            password,
            settings,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    #[error(
        "no Postgres server programs (version {wanted} or later) on this machine, and {fetching}. Install the package \
         `postgresql` (Debian, Ubuntu), `postgresql-server` (Fedora, RHEL, SUSE), `postgresql17` (Alpine) or \
         `brew install postgresql@17` (macOS), or name their folder in FLOWGATE_PG_BIN"
    )]
    NoBinaries { wanted: u32, fetching: String },
    #[error("FLOWGATE_PG_BIN={}: no working `postgres` and `initdb` there", folder.display())]
    ChosenEmpty { folder: PathBuf },
    #[error("FLOWGATE_PG_BIN={}: Postgres {major} is too old, {wanted} is the oldest we use", folder.display())]
    ChosenTooOld {
        folder: PathBuf,
        major: u32,
        wanted: u32,
    },
    #[error(
        "Postgres refuses to run as root, and this machine has neither a user `postgres` nor `nobody`"
    )]
    NoUnprivilegedUser,
    #[error("user `{user}`, who runs Postgres because root may not, cannot enter {}; choose another place", folder.display())]
    Unreachable { folder: PathBuf, user: String },
    #[error("{} is in use by another flowgate", folder.display())]
    InUse { folder: PathBuf },
    #[error("{} holds data of Postgres {found}, but the programs here are version {ours}", folder.display())]
    OtherMajor {
        folder: PathBuf,
        found: String,
        ours: u32,
    },
    #[error("initdb failed:\n{log}")]
    Initdb { log: String },
    #[error("embedded {server} did not start ({why}); the end of its log:\n{log}")]
    Start {
        server: String,
        why: String,
        log: String,
    },
    #[error("embedded {server} is not running")]
    NotRunning { server: String },
    #[error("embedded {server}: {doing}")]
    Sql {
        server: String,
        doing: &'static str,
        source: tokio_postgres::Error,
    },
    #[error("embedded Postgres: {doing} {}", path.display())]
    File {
        doing: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

/// A running primary and its replicas. INVARIANT: dropping it, or our own end however it comes, ends every server and
/// removes what was temporary. Dropping blocks for that (some 100 ms); `stop` does not, and lets kept data end cleanly.
#[derive(Debug)]
pub struct Cluster {
    /// The primary, then the replicas.
    servers: Vec<Server>,
    setup: Setup,
    guard: Guard,
    /// Locks a kept folder.
    _kept: Option<File>,
}

/// What every (re)start of a server needs.
#[derive(Debug)]
struct Setup {
    binaries: Binaries,
    run_as: RunAs,
    options: ClusterOptions,
}

#[derive(Debug)]
struct Server {
    name: String,
    data: PathBuf,
    port: u16,
    process: Option<Ward>,
}

impl Cluster {
    /// Finds the programs, makes or reuses the data, starts all servers and waits until the replicas stream. Blocks its
    /// thread for short file work.
    pub async fn start(options: ClusterOptions) -> Result<Self, EmbeddedError> {
        let run_as = RunAs::for_this_process().map_err(file("read", Path::new("/etc/passwd")))?;
        let run_as = run_as.ok_or(EmbeddedError::NoUnprivilegedUser)?;
        let binaries = Binaries::find(&cache_folder(&run_as)).await?;
        enterable(&run_as, &binaries.folder)?;
        let guard = Guard::start(run_as.clone())
            .map_err(file("make a folder in", &std::env::temp_dir()))?;
        enterable(&run_as, guard.root())?;
        let (home, kept) = match &options.data {
            Some(folder) => open_kept(folder, &run_as).map(|(home, lock)| (home, Some(lock)))?,
            None => (guard.root().to_owned(), None),
        };
        let replica_names = (1..=options.replicas).map(|n| format!("replica{n}"));
        let names = std::iter::once("primary".to_owned()).chain(replica_names);
        let server = |name: String| Server {
            data: home.join(&name),
            name,
            port: 0,
            process: None,
        };
        let setup = Setup {
            binaries,
            run_as,
            options,
        };
        let mut cluster = Self {
            servers: names.map(server).collect(),
            setup,
            guard,
            _kept: kept,
        };
        cluster.make_data(&home).await?;
        cluster.start_servers().await?;
        Ok(cluster)
    }

    pub fn primary_url(&self) -> String {
        self.url(0)
    }

    /// `n` counts from 0.
    pub fn replica_url(&self, n: usize) -> String {
        self.url(n + 1)
    }

    pub fn primary_port(&self) -> u16 {
        self.servers[0].port
    }

    pub fn replica_port(&self, n: usize) -> u16 {
        self.servers[n + 1].port
    }

    pub fn replica_count(&self) -> usize {
        self.servers.len() - 1
    }

    /// The server's pid, for tests that stall it; `None` while it is stopped.
    pub fn primary_pid(&self) -> Option<u32> {
        self.servers[0].process.as_ref().map(Ward::pid)
    }

    pub fn replica_pid(&self, n: usize) -> Option<u32> {
        self.servers[n + 1].process.as_ref().map(Ward::pid)
    }

    /// Where servers, logs and (unless kept) data live while we run. Gone afterwards.
    pub fn folder(&self) -> &Path {
        self.guard.root()
    }

    /// The major version of the servers.
    pub fn major(&self) -> u32 {
        self.setup.binaries.major
    }

    /// A connection as superuser to database `postgres`; a task of its own drives it.
    pub async fn connect_primary(&self) -> Result<tokio_postgres::Client, EmbeddedError> {
        self.connect(0).await
    }

    pub async fn connect_replica(&self, n: usize) -> Result<tokio_postgres::Client, EmbeddedError> {
        self.connect(n + 1).await
    }

    /// SIGKILL, as a crash would. Returns when the process is gone; its backends follow by themselves.
    pub async fn kill_primary(&mut self) -> Result<(), EmbeddedError> {
        self.end(0, Signal::KILL).await
    }

    /// A fast shutdown: clients get 57P01.
    pub async fn stop_primary(&mut self) -> Result<(), EmbeddedError> {
        self.end(0, Signal::INT).await
    }

    pub async fn start_primary(&mut self) -> Result<(), EmbeddedError> {
        self.launch(0).await
    }

    /// On the same port.
    pub async fn restart_primary(&mut self) -> Result<(), EmbeddedError> {
        self.end(0, Signal::INT).await?;
        self.launch(0).await
    }

    pub async fn kill_replica(&mut self, n: usize) -> Result<(), EmbeddedError> {
        self.end(n + 1, Signal::KILL).await
    }

    pub async fn stop_replica(&mut self, n: usize) -> Result<(), EmbeddedError> {
        self.end(n + 1, Signal::INT).await
    }

    pub async fn start_replica(&mut self, n: usize) -> Result<(), EmbeddedError> {
        self.launch(n + 1).await
    }

    /// `recovery_min_apply_delay`: commits become visible there only that much later. Returns when it is in force.
    pub async fn set_replica_delay(&self, n: usize, delay: Duration) -> Result<(), EmbeddedError> {
        let sql_error = |source| EmbeddedError::Sql {
            server: self.servers[n + 1].name.clone(),
            doing: "setting its apply delay",
            source,
        };
        let client = self.connect(n + 1).await?;
        let wanted = delay.as_millis();
        let alter = format!("alter system set recovery_min_apply_delay = '{wanted}ms'");
        client.batch_execute(&alter).await.map_err(sql_error)?;
        client
            .batch_execute("select pg_reload_conf()")
            .await
            .map_err(sql_error)?;
        let deadline = Instant::now() + START_WAIT_MAX;
        let in_force =
            "select setting::bigint from pg_settings where name = 'recovery_min_apply_delay'";
        loop {
            let now: i64 = client
                .query_one(in_force, &[])
                .await
                .map_err(sql_error)?
                .get(0);
            if u128::try_from(now).is_ok_and(|now| now == wanted) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(self.failed_start(n + 1, "its apply delay never took force"));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Makes the replica a primary of its own (a new timeline). The old primary goes on unless killed.
    pub async fn promote_replica(&self, n: usize) -> Result<(), EmbeddedError> {
        let client = self.connect(n + 1).await?;
        let doing = "promoting it";
        let promoted = client.query_one("select pg_promote()", &[]).await;
        let promoted: bool = promoted
            .map_err(|source| EmbeddedError::Sql {
                server: self.servers[n + 1].name.clone(),
                doing,
                source,
            })?
            .get(0);
        if promoted {
            Ok(())
        } else {
            Err(self.failed_start(n + 1, "pg_promote gave up"))
        }
    }

    /// Ends everything. Kept data ends with a fast shutdown, the primary first so that replicas receive its last WAL.
    pub async fn stop(mut self) -> Result<(), EmbeddedError> {
        if self.setup.options.data.is_some() {
            for n in 0..self.servers.len() {
                self.end(n, Signal::INT).await?;
            }
        }
        let dropped = tokio::task::spawn_blocking(move || drop(self)).await;
        dropped.map_err(|error| EmbeddedError::File {
            doing: "clear",
            path: PathBuf::new(),
            source: io::Error::other(error),
        })
    }

    fn url(&self, n: usize) -> String {
        let port = self.servers[n].port;
        match &self.setup.options.password {
            Some(password) => {
                let password = percent_encoding::utf8_percent_encode(
                    password,
                    percent_encoding::NON_ALPHANUMERIC,
                );
                format!("postgres://{SUPERUSER}:{password}@127.0.0.1:{port}/postgres")
            }
            None => format!("postgres://{SUPERUSER}@127.0.0.1:{port}/postgres"),
        }
    }

    async fn connect(&self, n: usize) -> Result<tokio_postgres::Client, EmbeddedError> {
        let sql_error = |source| EmbeddedError::Sql {
            server: self.servers[n].name.clone(),
            doing: "connecting",
            source,
        };
        connect(&self.url(n)).await.map_err(sql_error)
    }

    /// Every server has a data folder of our major version afterwards.
    async fn make_data(&mut self, home: &Path) -> Result<(), EmbeddedError> {
        let key = self.guard.key().to_owned();
        clear_partials(home)?;
        for n in 0..self.servers.len() {
            let data = self.servers[n].data.clone();
            if data.exists() {
                self.check_major(&data)?;
                continue;
            }
            // Made under another name: an interrupted attempt must not pass for the whole.
            let partial = home.join(format!("{}.{key}", self.servers[n].name));
            if n == 0 {
                self.initdb(&partial).await?;
            } else {
                let copied = copy_data(&self.servers[0].data, &partial, &self.setup.run_as);
                copied.map_err(file("copy the primary to", &partial))?;
                let signal = partial.join("standby.signal");
                File::create(&signal)
                    .and_then(|_| self.setup.run_as.own(&signal))
                    .map_err(file("write", &signal))?;
            }
            fs::rename(&partial, &data).map_err(file("rename", &partial))?;
        }
        Ok(())
    }

    fn check_major(&self, data: &Path) -> Result<(), EmbeddedError> {
        let path = data.join("PG_VERSION");
        let found = fs::read_to_string(&path).map_err(file("read", &path))?;
        let ours = self.setup.binaries.major;
        if found.trim() == ours.to_string() {
            return Ok(());
        }
        Err(EmbeddedError::OtherMajor {
            folder: data.to_owned(),
            found: found.trim().to_owned(),
            ours,
        })
    }

    async fn initdb(&self, data: &Path) -> Result<(), EmbeddedError> {
        let log = self.guard.root().join("initdb.log");
        let auth = if self.setup.options.password.is_some() {
            "scram-sha-256"
        } else {
            "trust"
        };
        let mut args = vec![
            format!("--pgdata={}", data.display()),
            format!("--username={SUPERUSER}"),
        ];
        args.push(format!("--auth={auth}"));
        args.extend(["--encoding=UTF8", "--locale=C", "--no-instructions"].map(str::to_owned));
        if !self.setup.options.durable {
            args.push("--no-sync".to_owned());
        }
        let password_file = self.guard.root().join("password");
        if let Some(password) = &self.setup.options.password {
            let written = write_private(&password_file, password, &self.setup.run_as);
            written.map_err(file("write", &password_file))?;
            args.push(format!("--pwfile={}", password_file.display()));
        }
        let out = File::create(&log).map_err(file("write", &log))?;
        let program = self.setup.binaries.program("initdb");
        let mut ward = self
            .guard
            .spawn("initdb", &program, &args, out)
            .map_err(file("run", &program))?;
        while !ward.has_ended().map_err(file("run", &program))? {
            tokio::time::sleep(POLL).await;
        }
        if self.setup.options.password.is_some() {
            fs::remove_file(&password_file).map_err(file("remove", &password_file))?;
        }
        if ward.succeeded().map_err(file("run", &program))? {
            return Ok(());
        }
        Err(EmbeddedError::Initdb { log: tail(&log) })
    }

    async fn start_servers(&mut self) -> Result<(), EmbeddedError> {
        for n in 0..self.servers.len() {
            let given = self
                .setup
                .options
                .ports
                .get(n)
                .copied()
                .filter(|port| *port != 0);
            let mut tries = if given.is_some() { 1 } else { PORT_TRIES };
            loop {
                self.servers[n].port = given
                    .map_or_else(free_port, Ok)
                    .map_err(file("bind", Path::new("127.0.0.1")))?;
                tries -= 1;
                match self.launch(n).await {
                    Err(EmbeddedError::Start { log, .. })
                        if tries > 0 && log.contains("Address already in use") => {}
                    Err(error) => return Err(error),
                    Ok(()) => break,
                }
            }
            if n == 0 {
                self.match_slots().await?;
            }
        }
        self.wait_streaming().await
    }

    /// One slot a replica, so that WAL waits for one that is down; none for replicas of an earlier start, whose WAL
    /// would pile up.
    async fn match_slots(&self) -> Result<(), EmbeddedError> {
        let slots = "with wanted as (select 'replica' || n as slot from generate_series(1, $1::int) as n),
                dropped as (select pg_drop_replication_slot(slot_name) from pg_replication_slots
                    where slot_type = 'physical' and not active and slot_name not in (select slot from wanted))
            select (select count(*) from dropped), count(pg_create_physical_replication_slot(slot, true)) from wanted
                where slot not in (select slot_name from pg_replication_slots)";
        let client = self.connect(0).await?;
        let wanted = i32::try_from(self.replica_count()).unwrap_or(i32::MAX);
        let doing = "making replication slots";
        let made = client.query(slots, &[&wanted]).await;
        made.map_err(|source| EmbeddedError::Sql {
            server: self.servers[0].name.clone(),
            doing,
            source,
        })?;
        Ok(())
    }

    async fn wait_streaming(&self) -> Result<(), EmbeddedError> {
        let client = self.connect(0).await?;
        let deadline = Instant::now() + START_WAIT_MAX;
        let streaming = "select count(*) from pg_stat_replication where state = 'streaming'";
        loop {
            let row = client.query_one(streaming, &[]).await;
            let doing = "counting replicas";
            let count: i64 = row
                .map_err(|source| EmbeddedError::Sql {
                    server: self.servers[0].name.clone(),
                    doing,
                    source,
                })?
                .get(0);
            if usize::try_from(count).is_ok_and(|count| count >= self.replica_count()) {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(self.failed_start(
                    self.servers.len() - 1,
                    "it does not stream from the primary",
                ));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// Starts a stopped server on its port and waits until it answers. After a kill its backends may outlive the postmaster
    /// for a moment, and no server starts on their shared memory.
    async fn launch(&mut self, n: usize) -> Result<(), EmbeddedError> {
        let deadline = Instant::now() + START_WAIT_MAX;
        loop {
            match self.launch_once(n).await {
                Err(EmbeddedError::Start { log, .. })
                    if log.contains("pre-existing shared memory block")
                        && Instant::now() < deadline => {}
                launched => return launched,
            }
            tokio::time::sleep(POLL).await;
        }
    }

    async fn launch_once(&mut self, n: usize) -> Result<(), EmbeddedError> {
        let args = self.arguments(n);
        let server = &mut self.servers[n];
        let path = self.guard.root().join(format!("{}.log", server.name));
        let log = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(file("write", &path))?;
        let program = self.setup.binaries.program("postgres");
        let spawned = self.guard.spawn(&server.name, &program, &args, log);
        server.process = Some(spawned.map_err(file("run", &program))?);
        let deadline = Instant::now() + START_WAIT_MAX;
        loop {
            if self.is_ready(n).await {
                return Ok(());
            }
            let why = if self.servers[n].has_ended() {
                "it ended at once".to_owned()
            } else if Instant::now() >= deadline {
                self.end(n, Signal::QUIT).await?;
                format!("no answer after {START_WAIT_MAX:?}")
            } else {
                tokio::time::sleep(POLL).await;
                continue;
            };
            return Err(self.failed_start(n, &why));
        }
    }

    /// It answers, and it is ours rather than somebody else's on that port.
    async fn is_ready(&self, n: usize) -> bool {
        // A stranger on the port may accept and then say nothing.
        tokio::time::timeout(ANSWER_WAIT_MAX, self.answers(n))
            .await
            .unwrap_or(false)
    }

    async fn answers(&self, n: usize) -> bool {
        let Ok(client) = connect(&self.url(n)).await else {
            return false;
        };
        let folder = client
            .query_one("select current_setting('data_directory')", &[])
            .await;
        let Ok(folder) = folder.map(|row| row.get::<_, String>(0)) else {
            return false;
        };
        let ours = fs::canonicalize(&self.servers[n].data);
        ours.is_ok_and(|ours| fs::canonicalize(folder).is_ok_and(|theirs| theirs == ours))
    }

    fn arguments(&self, n: usize) -> Vec<String> {
        let server = &self.servers[n];
        let on_off = |on: bool| if on { "on" } else { "off" }.to_owned();
        let durable = self.setup.options.durable;
        let mut settings: Vec<(String, String)> = [
            // The guard knows our processes by this name.
            (
                "cluster_name",
                format!("{}.{}", self.guard.key(), server.name),
            ),
            ("port", server.port.to_string()),
            ("listen_addresses", "127.0.0.1".to_owned()),
            ("unix_socket_directories", String::new()),
            ("max_connections", "200".to_owned()),
            ("shared_buffers", "64MB".to_owned()),
            ("fsync", on_off(durable)),
            ("full_page_writes", on_off(durable)),
            ("wal_level", "replica".to_owned()),
            ("max_wal_senders", "10".to_owned()),
            ("max_replication_slots", "10".to_owned()),
            ("max_slot_wal_keep_size", "4GB".to_owned()),
            ("hot_standby", "on".to_owned()),
            ("hot_standby_feedback", "on".to_owned()),
            ("wal_receiver_status_interval", "1s".to_owned()),
            ("wal_retrieve_retry_interval", "100ms".to_owned()),
            ("log_timezone", "UTC".to_owned()),
            ("timezone", "UTC".to_owned()),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into();
        if n > 0 {
            let password = match &self.setup.options.password {
                Some(password) => format!(
                    " password='{}'",
                    password.replace('\\', r"\\").replace('\'', r"\'")
                ),
                None => String::new(),
            };
            let port = self.servers[0].port;
            let primary = format!("host=127.0.0.1 port={port} user={SUPERUSER}{password}");
            settings.push(("primary_conninfo".to_owned(), primary));
            settings.push(("primary_slot_name".to_owned(), server.name.clone()));
        }
        settings.extend(self.setup.options.settings.iter().cloned());
        let mut args = vec!["-D".to_owned(), server.data.display().to_string()];
        args.extend(
            settings
                .iter()
                .flat_map(|(name, value)| ["-c".to_owned(), format!("{name}={value}")]),
        );
        args
    }

    /// Returns when the process is gone; by force after `STOP_WAIT_MAX`.
    async fn end(&mut self, n: usize, signal: Signal) -> Result<(), EmbeddedError> {
        let server = &mut self.servers[n];
        let Some(process) = &server.process else {
            return Err(EmbeddedError::NotRunning {
                server: server.name.clone(),
            });
        };
        process.signal(signal);
        let deadline = Instant::now() + STOP_WAIT_MAX;
        let mut forced = false;
        while !server.has_ended() {
            if !forced && Instant::now() >= deadline {
                forced = true;
                server
                    .process
                    .iter()
                    .for_each(|process| process.signal(Signal::KILL));
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    fn failed_start(&self, n: usize, why: &str) -> EmbeddedError {
        let server = self.servers[n].name.clone();
        let log = tail(&self.guard.root().join(format!("{server}.log")));
        EmbeddedError::Start {
            server,
            why: why.to_owned(),
            log,
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for process in self
            .servers
            .iter()
            .filter_map(|server| server.process.as_ref())
        {
            process.signal(Signal::QUIT);
            // A stalled one (tests do that) must wake to hear it.
            process.signal(Signal::CONT);
        }
        // Whoever does not listen is killed by the guard, so waiting for them ends.
        self.guard.close();
        for process in self
            .servers
            .iter_mut()
            .filter_map(|server| server.process.as_mut())
        {
            process.reap();
        }
    }
}

impl Server {
    fn has_ended(&mut self) -> bool {
        let Some(process) = &mut self.process else {
            return true;
        };
        let ended = process.has_ended().unwrap_or_else(|error| {
            tracing::warn!(%error, server = self.name, "cannot tell whether an embedded Postgres runs");
            true
        });
        if ended {
            self.process = None;
        }
        ended
    }
}

/// A client and the task that drives it; the task ends with the client.
pub async fn connect(url: &str) -> Result<tokio_postgres::Client, tokio_postgres::Error> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            tracing::debug!(%error, "connection to an embedded Postgres broke");
        }
    });
    Ok(client)
}

fn file(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> EmbeddedError {
    move |source| EmbeddedError::File {
        doing,
        path: path.to_owned(),
        source,
    }
}

/// Root's own cache is closed to the user who runs the server.
fn cache_folder(run_as: &RunAs) -> PathBuf {
    let home = |variable: &str| {
        std::env::var_os(variable)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    match run_as {
        RunAs::User { .. } => PathBuf::from("/var/cache/flowgate"),
        RunAs::Ourselves => {
            let macos = || {
                home("HOME")
                    .filter(|_| cfg!(target_os = "macos"))
                    .map(|home| home.join("Library/Caches"))
            };
            let linux = || home("HOME").map(|home| home.join(".cache"));
            let base = home("XDG_CACHE_HOME").or_else(macos).or_else(linux);
            base.unwrap_or_else(std::env::temp_dir).join("flowgate")
        }
    }
}

fn enterable(run_as: &RunAs, folder: &Path) -> Result<(), EmbeddedError> {
    let user = match run_as {
        RunAs::Ourselves => return Ok(()),
        RunAs::User { name, .. } => name.clone(),
    };
    if run_as.can_enter(folder).map_err(file("enter", folder))? {
        return Ok(());
    }
    Err(EmbeddedError::Unreachable {
        folder: folder.to_owned(),
        user,
    })
}

/// Makes and locks a folder that stays, and gives it to the server's user.
fn open_kept(folder: &Path, run_as: &RunAs) -> Result<(PathBuf, File), EmbeddedError> {
    fs::create_dir_all(folder).map_err(file("make", folder))?;
    let home = fs::canonicalize(folder).map_err(file("make", folder))?;
    let lock_path = home.join("flowgate.lock");
    let lock = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&lock_path)
        .map_err(file("open", &lock_path))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(EmbeddedError::InUse { folder: home }),
        Err(TryLockError::Error(error)) => return Err(file("lock", &lock_path)(error)),
    }
    run_as.own(&home).map_err(file("give away", &home))?;
    enterable(run_as, &home)?;
    Ok((home, lock))
}

/// What an interrupted first start left in a kept folder. The caller holds its lock.
fn clear_partials(home: &Path) -> Result<(), EmbeddedError> {
    for entry in fs::read_dir(home).map_err(file("read", home))?.flatten() {
        let name = entry.file_name();
        let partial = name.to_str().is_some_and(|name| {
            name.split_once('.').is_some_and(|(server, rest)| {
                (server == "primary" || server.starts_with("replica"))
                    && rest.starts_with("flowgate-pg-")
            })
        });
        if partial {
            fs::remove_dir_all(entry.path()).map_err(file("remove", &entry.path()))?;
        }
    }
    Ok(())
}

/// Copies a stopped server's data. What belongs to that one server stays behind, as `pg_basebackup` has it.
fn copy_data(from: &Path, to: &Path, run_as: &RunAs) -> io::Result<()> {
    fs::create_dir(to)?;
    fs::set_permissions(to, fs::metadata(from)?.permissions())?;
    run_as.own(to)?;
    for entry in fs::read_dir(from)? {
        let (entry, target) = entry.map(|entry| (entry.path(), to.join(entry.file_name())))?;
        let name = entry
            .file_name()
            .and_then(OsStr::to_str)
            .unwrap_or_default();
        if matches!(name, "postmaster.pid" | "postmaster.opts") {
            continue;
        }
        if fs::symlink_metadata(&entry)?.is_dir() {
            copy_data(&entry, &target, run_as)?;
            if name == "pg_replslot" {
                fs::remove_dir_all(&target)?;
                fs::create_dir(&target)?;
                fs::set_permissions(&target, fs::metadata(&entry)?.permissions())?;
                run_as.own(&target)?;
            }
        } else {
            fs::copy(&entry, &target)?;
            run_as.own(&target)?;
        }
    }
    Ok(())
}

fn write_private(path: &Path, text: &str, run_as: &RunAs) -> io::Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    run_as.own(path)?;
    file.write_all(text.as_bytes())
}

fn free_port() -> io::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?
        .local_addr()?
        .port())
}

/// The end of a log, for an error message; what cannot be read is said in its place.
fn tail(path: &Path) -> String {
    let read = || -> io::Result<String> {
        let mut file = File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(LOG_TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).trim_end().to_owned())
    };
    read().unwrap_or_else(|error| format!("(cannot read {}: {error})", path.display()))
}
