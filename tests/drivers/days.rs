//! The days: each starts a proxy of its own before a database of its own, with ten servers, and lets one client work.
//! Called by `main`.

use std::env;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::Stdio;
use std::time::Duration;

use flowgate::config::{self, ApiKey, Secret};
use tokio::process::Command;
use tokio::time::timeout;

use super::crowd::{Core, Fault, crowd};
use super::follower::FOLLOWER;
use super::support::pg::{self, TestDb};
use super::support::proxy::{Proxy, text};
use super::{Outcome, fetch};

/// Well beyond what any of them takes; a hang is a failure.
const DAY_MAX: Duration = Duration::from_secs(90);
const SERVERS: usize = 10;

pub(crate) type Day = fn() -> Pin<Box<dyn Future<Output = Outcome>>>;

pub(crate) const DAYS: &[(&str, Day)] = &[
    ("psycopg", || Box::pin(python("psycopg_day.py"))),
    ("asyncpg", || Box::pin(python("asyncpg_day.py"))),
    ("node_pg", || Box::pin(node("pg_day.cjs"))),
    ("postgres_js", || Box::pin(node("postgres_day.cjs"))),
    ("pgflow_sql_client_directly_and_through", || {
        Box::pin(pgflow_client())
    }),
    ("dashboard_in_a_browser", || Box::pin(dashboard())),
    ("pgflow_client_over_supabase_js", || {
        Box::pin(pgflow_realtime_client())
    }),
    ("console_python", || Box::pin(python("console_day.py"))),
    ("console_node", || Box::pin(node("console_day.cjs"))),
    ("crowd", || Box::pin(crowd(Fault::Nothing, Core::Ours))),
    ("crowd_while_the_upstream_listener_is_killed", || {
        Box::pin(crowd(Fault::ListenerKilled, Core::Ours))
    }),
    ("crowd_while_the_proxy_is_killed", || {
        Box::pin(crowd(Fault::ProxyKilled, Core::Ours))
    }),
    ("crowd_while_the_primary_restarts", || {
        Box::pin(crowd(Fault::PrimaryRestarted, Core::Ours))
    }),
    ("crowd_with_slow_readers", || {
        Box::pin(crowd(Fault::SlowReaders, Core::Ours))
    }),
    ("crowd_of_upstreams_pgflow", || {
        Box::pin(crowd(Fault::Nothing, Core::Upstreams))
    }),
    (
        "crowd_while_the_upstream_listener_is_killed_of_upstreams_pgflow",
        || Box::pin(crowd(Fault::ListenerKilled, Core::Upstreams)),
    ),
    (
        "crowd_while_the_proxy_is_killed_of_upstreams_pgflow",
        || Box::pin(crowd(Fault::ProxyKilled, Core::Upstreams)),
    ),
    (
        "crowd_while_the_primary_restarts_of_upstreams_pgflow",
        || Box::pin(crowd(Fault::PrimaryRestarted, Core::Upstreams)),
    ),
    ("crowd_with_slow_readers_of_upstreams_pgflow", || {
        Box::pin(crowd(Fault::SlowReaders, Core::Upstreams))
    }),
    ("psql_says_the_same_as_directly", || Box::pin(psql())),
    ("pgbench_loses_no_transaction", || Box::pin(pgbench())),
];

#[derive(Clone, Copy)]
pub(crate) enum Driver {
    Python(&'static str),
    Node(&'static str),
    /// tokio-postgres, by `follower`.
    Tokio,
}

impl Driver {
    /// Its script, ready to run.
    pub(crate) async fn command(self) -> fetch::Found<Command> {
        Ok(match self {
            Self::Python(script) => {
                let mut command = Command::new("python3");
                command
                    .arg("-B")
                    .arg(fetch::source("python").join(script))
                    .env("PYTHONPATH", fetch::python().await?);
                command
            }
            Self::Node(script) => {
                let mut command = Command::new("node");
                command
                    .arg(fetch::source("node").join(script))
                    .env("NODE_PATH", fetch::node("node").await?);
                command
            }
            Self::Tokio => {
                let mut command = Command::new(env::current_exe().unwrap());
                command.env(FOLLOWER, "1");
                command
            }
        })
    }
}

async fn python(script: &'static str) -> Outcome {
    scripted(Driver::Python(script)).await
}

async fn node(script: &'static str) -> Outcome {
    scripted(Driver::Node(script)).await
}

async fn pgflow_client() -> Outcome {
    let packages = match fetch::node("node").await {
        Ok(packages) => packages,
        Err(reason) => return Outcome::Skipped(reason),
    };
    let db = pg::fresh_database().await;
    let proxy = proxy(&db).await;
    let mut command = Command::new("node");
    command
        .arg(fetch::source("node").join("pgflow_day.cjs"))
        .env("NODE_PATH", packages)
        .env(
            "FLOWGATE_URLS",
            format!("{} {}", db.primary_url, proxy.url()),
        );
    let outcome = said_done(command).await;
    proxy.shut_down().await;
    outcome
}

/// Starts and kills Flowgates of its own.
async fn pgflow_realtime_client() -> Outcome {
    let packages = match fetch::node("node").await {
        Ok(packages) => packages,
        Err(reason) => return Outcome::Skipped(reason),
    };
    let db = pg::fresh_database().await;
    let mut command = Command::new("node");
    command
        .arg(fetch::source("node").join("realtime_day.cjs"))
        .env("NODE_PATH", packages)
        .env("FLOWGATE_BIN", env!("CARGO_BIN_EXE_flowgate"))
        .env("FLOWGATE_PRIMARY", &db.primary_url);
    said_done(command).await
}

/// Two proxies before one database: one that shows strangers everything, one that asks for a key.
async fn dashboard() -> Outcome {
    let found = async {
        let browser = fetch::browser().await?;
        Ok((browser, fetch::node("browser").await?))
    };
    let (browser, packages) = match found.await {
        Ok(found) => found,
        Err(reason) => return Outcome::Skipped(reason),
    };
    let db = pg::fresh_database().await;
    let viewer = "do $$ begin create role dashboard_viewer; exception when duplicate_object then null; end $$;
         grant usage on schema pgflow to dashboard_viewer; grant select on all tables in schema pgflow to dashboard_viewer;
         grant execute on function pgflow.get_run_with_states(uuid) to dashboard_viewer";
    db.connect().await.batch_execute(viewer).await.unwrap();
    let role = "dashboard_viewer".to_owned();
    let serve = async |http: &dyn Fn(&mut config::Http)| {
        Proxy::start(&db, |config| {
            config.pool.size = SERVERS.try_into().unwrap();
            config.listen.http = Some(([127, 0, 0, 1], 0).into());
            http(&mut config.http);
        })
        .await
    };
    let open = serve(&|http| http.anon_role = Some(role.clone())).await;
    let locked = serve(&|http| {
        http.api_keys = vec![ApiKey {
            key: Secret::new("open sesame".to_owned()),
            role: role.clone(),
        }];
    })
    .await;
    // Those in docs/ are made anew when asked for, as other snapshots are.
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    let pictures = match env::var_os("UPDATE_SNAPSHOTS") {
        Some(_asked) => manifest.join("docs"),
        None => PathBuf::from(env!("CARGO_TARGET_TMPDIR")),
    };
    let http = |proxy: &Proxy| format!("http://{}", proxy.app().http.unwrap());
    let mut command = Command::new("node");
    command
        .arg(fetch::source("browser/dashboard_day.cjs"))
        .env("NODE_PATH", packages)
        .env("FLOWGATE_BROWSER", browser)
        .env("FLOWGATE_SCREENSHOTS", pictures)
        .env("FLOWGATE_URL", open.url())
        .env("FLOWGATE_HTTP", http(&open))
        .env("FLOWGATE_LOCKED_HTTP", http(&locked));
    let outcome = said_done(command).await;
    open.shut_down().await;
    locked.shut_down().await;
    outcome
}

/// A script that ends with "the day is done".
async fn scripted(driver: Driver) -> Outcome {
    let mut command = match driver.command().await {
        Ok(command) => command,
        Err(reason) => return Outcome::Skipped(reason),
    };
    let proxy = proxy(&pg::empty_database().await).await;
    command.env("FLOWGATE_URL", proxy.url());
    let outcome = said_done(command).await;
    proxy.shut_down().await;
    outcome
}

async fn said_done(command: Command) -> Outcome {
    match run(command).await {
        Ok(said) if said.trim_end().ends_with("the day is done") => Outcome::Passed,
        Ok(said) => Outcome::Failed(format!("ended early:\n{said}")),
        Err(why) => Outcome::Failed(why),
    }
}

async fn psql() -> Outcome {
    let psql = match fetch::postgres("psql").await {
        Ok(psql) => psql,
        Err(reason) => return Outcome::Skipped(reason),
    };
    let (here, there) = (pg::empty_database().await, pg::empty_database().await);
    let proxy = proxy(&here).await;
    let day = async |url: &str| {
        let script = fetch::source("psql_day.sql");
        // One stream, so that errors and notices keep their places among the results.
        let mut command = Command::new("sh");
        command
            .args(["-c", r#"exec "$0" -X -d "$1" -f "$2" 2>&1"#])
            .arg(&psql)
            .arg(url)
            .arg(script);
        run(command).await
    };
    let outcome = match (day(&there.primary_url).await, day(&proxy.url()).await) {
        (Ok(direct), Ok(proxied)) => same(&direct, &proxied),
        (Err(why), _) => Outcome::Failed(format!("directly: {why}")),
        (_, Err(why)) => Outcome::Failed(why),
    };
    proxy.shut_down().await;
    outcome
}

fn same(direct: &str, proxied: &str) -> Outcome {
    // A script that psql could not read says the same both times.
    if direct.lines().count() < 100 {
        return Outcome::Failed(format!("psql said too little:\n{direct}"));
    }
    let (mut left, mut right) = (direct.lines(), proxied.lines());
    for at in 1.. {
        match (left.next(), right.next()) {
            (None, None) => break,
            (left, right) if left == right => {}
            (left, right) => {
                let why = format!("line {at}\n  directly: {left:?}\n  through:  {right:?}");
                return Outcome::Failed(why);
            }
        }
    }
    Outcome::Passed
}

async fn pgbench() -> Outcome {
    // Clients, threads, transactions each.
    const LOADS: [(u64, &str, u64); 2] = [(1, "1", 200), (50, "2", 20)];
    let pgbench = match fetch::postgres("pgbench").await {
        Ok(pgbench) => pgbench,
        Err(reason) => return Outcome::Skipped(reason),
    };
    let db = pg::empty_database().await;
    let proxy = proxy(&db).await;
    let bench = async |args: &[&str]| {
        let mut command = Command::new(&pgbench);
        command.args(args).arg(proxy.url());
        let said = run(command).await?;
        if args[0] == "-n" && !said.contains("failed transactions: 0 ") {
            return Err(said);
        }
        Ok(())
    };
    let work = async || {
        bench(&["-i", "-q", "-s", "5"]).await?;
        let mut written = 0;
        for protocol in ["simple", "extended", "prepared"] {
            for (clients, threads, each) in LOADS {
                for script in ["select-only", "tpcb-like"] {
                    let (clients_text, each_text) = (clients.to_string(), each.to_string());
                    let load = ["-c", &clients_text, "-j", threads, "-t", &each_text];
                    let args = [&["-n", "-M", protocol, "-b", script], &load[..]].concat();
                    let done = bench(&args).await;
                    done.map_err(|why| format!("pgbench {}: {why}", args.join(" ")))?;
                    if script == "tpcb-like" {
                        written += clients * each;
                    }
                }
            }
        }
        Ok::<_, String>(written)
    };
    let outcome = match work().await {
        Ok(written) => books_balance(&db, written).await,
        Err(why) => Outcome::Failed(why),
    };
    proxy.shut_down().await;
    outcome
}

/// Every transaction is there, whole, once.
async fn books_balance(db: &TestDb, written: u64) -> Outcome {
    let client = db.connect().await;
    let sums = "select concat_ws(' ', (select count(*) from pgbench_history), \
                (select sum(delta) from pgbench_history) = all (array[\
                (select sum(abalance) from pgbench_accounts), (select sum(tbalance) from pgbench_tellers), \
                (select sum(bbalance) from pgbench_branches)]))";
    let found = text(&client, sums).await;
    if found == format!("{written} t") {
        Outcome::Passed
    } else {
        Outcome::Failed(format!("{written} transactions written, found: {found}"))
    }
}

async fn proxy(db: &TestDb) -> Proxy {
    Proxy::start(db, |config| config.pool.size = SERVERS.try_into().unwrap()).await
}

/// Standard output of what must succeed; else everything it said.
async fn run(mut command: Command) -> Result<String, String> {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = match timeout(DAY_MAX, command.output()).await {
        Ok(output) => output.map_err(|error| error.to_string())?,
        Err(_elapsed) => return Err(format!("not done after {DAY_MAX:?}")),
    };
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout).into_owned(),
        String::from_utf8_lossy(&output.stderr),
    );
    if output.status.success() {
        Ok(out)
    } else {
        Err(format!("{}\n{out}{err}", output.status))
    }
}
