//! `flowgate serve`: Config → app → run until a signal → drain.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use crate::app;
use crate::config::{self, Config, Flags};

/// The flags that override file and environment.
#[derive(Args, Default)]
pub struct ServeArgs {
    /// TOML file; every key is in config/flowgate.toml
    #[arg(long)]
    pub config: Option<PathBuf>,
    /// Address clients connect to [default: 127.0.0.1:6432]
    #[arg(long)]
    pub listen: Option<String>,
    /// Address of HTTP, or "off" [default: 127.0.0.1:6480]
    #[arg(long)]
    pub http: Option<String>,
    /// postgres://user:password@host:port/database of the primary; its user is the control role
    #[arg(long)]
    pub primary: Option<String>,
    /// The same of a replica; may be given several times
    #[arg(long)]
    pub replica: Vec<String>,
    /// scram or trust
    #[arg(long)]
    pub auth: Option<String>,
    /// Server connections per database, user and upstream
    #[arg(long)]
    pub pool_size: Option<String>,
    /// A level, then levels of single modules: info,flowgate::pool=debug
    #[arg(long)]
    pub log: Option<String>,
}

impl ServeArgs {
    /// File, environment and flags, in rising order of authority.
    pub fn config(self) -> anyhow::Result<Config> {
        let text = self.config.as_deref().map(read).transpose()?;
        let file = self.config.as_deref().zip(text.as_deref());
        let flags = Flags {
            listen: self.listen,
            http: self.http,
            primary: self.primary,
            replicas: self.replica,
            auth: self.auth,
            pool_size: self.pool_size,
            log: self.log,
        };
        Ok(config::from_sources(file, config::environment(), flags)?)
    }
}

fn read(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Serves until SIGTERM or SIGINT.
pub async fn run(config: &Config) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot watch for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot watch for SIGINT")?;
    let app = app::start(config).await?;
    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM: draining"),
        _ = interrupt.recv() => tracing::info!("SIGINT: draining"),
    }
    app.shut_down().await;
    Ok(())
}
