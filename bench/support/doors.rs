//! The doors to one Postgres: itself, PgBouncer where this machine has one, Flowgate. Called by the benchmarks that compare them.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, bail};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::time::{Instant, sleep};
use tokio_postgres::{Client, NoTls};

const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) async fn connect(url: &str) -> anyhow::Result<Client> {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

/// `url` with another host and port.
fn elsewhere(url: &str, address: &str) -> anyhow::Result<String> {
    let (_, behind) = url.rsplit_once('@').context("a URL with a user")?;
    let (server, _) = behind.split_once('/').context("a URL with a database")?;
    Ok(url.replace(server, address))
}

async fn answers(url: &str, who: &str) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while tokio_postgres::connect(url, NoTls).await.is_err() {
        if Instant::now() > deadline {
            bail!("{who} does not answer");
        }
        sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

/// A Flowgate with these options and this environment, and its URL.
pub(crate) async fn serve(
    primary: &str,
    options: &[&str],
    environment: &[(&str, &str)],
) -> anyhow::Result<(Child, String)> {
    let free = TcpListener::bind("127.0.0.1:0").await?.local_addr()?;
    let proxy = Command::new(env!("CARGO_BIN_EXE_flowgate"))
        .args(["serve", "--auth", "trust", "--http", "off", "--log", "warn"])
        .args(["--primary", primary, "--listen", &free.to_string()])
        .args(options)
        .envs(environment.iter().copied())
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let through = elsewhere(primary, &free.to_string())?;
    answers(&through, "flowgate").await?;
    Ok((proxy, through))
}

/// `None`: this machine has none.
pub(crate) async fn pgbouncer(
    primary: &str,
    pool: usize,
) -> anyhow::Result<Option<(Child, String)>> {
    let places = ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer"];
    let Some(binary) = places
        .into_iter()
        .find(|place| fs::exists(place).is_ok_and(|is| is))
    else {
        eprintln!("no pgbouncer: it is left out");
        return Ok(None);
    };
    let free = TcpListener::bind("127.0.0.1:0").await?.local_addr()?;
    let (_, behind) = primary.rsplit_once('@').context("a URL with a user")?;
    let (server, database) = behind.split_once('/').context("a URL with a database")?;
    let (host, port) = server.split_once(':').context("a port")?;
    let user = primary
        .trim_start_matches("postgres://")
        .split(['@', ':'])
        .next()
        .context("a user")?;
    let file = PathBuf::from(format!("/tmp/flowgate-bench-{}.ini", free.port()));
    fs::write(
        &file,
        format!(
            "[databases]\n{database} = host={host} port={port} user={user}\n[pgbouncer]\nlisten_addr = 127.0.0.1\n\
             listen_port = {}\nunix_socket_dir =\nauth_type = any\npool_mode = transaction\ndefault_pool_size = {pool}\nserver_idle_timeout = 5\n\
             max_client_conn = 15000\nquery_wait_timeout = 0\n",
            free.port()
        ),
    )?;
    let child = Command::new(binary)
        .args(["-q", "-u", "postgres"])
        .arg(&file)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let url = elsewhere(primary, &free.to_string())?;
    answers(&url, "pgbouncer").await?;
    fs::remove_file(&file)?;
    Ok(Some((child, url)))
}
