//! `flowgate serve`: Config → app → run until a signal → drain.

use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::descriptors;
use crate::app::{self, Hooks, Manner, Reread, RereadError, SetLog};
use crate::config::{self, Config, Flags};

/// The flags that override file and environment.
#[derive(Args, Clone, Default)]
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

    /// The same again, whenever it is asked for.
    pub fn reread(&self) -> Reread {
        let args = self.clone();
        Arc::new(move || {
            args.clone()
                .config()
                .map_err(|error| match error.downcast() {
                    Ok(problems) => RereadError::Config(problems),
                    Err(error) => RereadError::File(format!("{error:#}")),
                })
        })
    }
}

fn read(path: &Path) -> anyhow::Result<String> {
    std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Serves until SIGTERM, SIGINT or an admin's SHUTDOWN; SIGHUP reloads. A second signal ends a drain at once.
pub async fn run(config: &Config, reread: Reread, set_log: SetLog) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot watch for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot watch for SIGINT")?;
    let mut hang_up = signal(SignalKind::hangup()).context("cannot watch for SIGHUP")?;
    descriptors::make_room(config);
    let hooks = Hooks {
        reread: Some(reread),
        set_log: Some(set_log),
    };
    let app = app::start_with(config, hooks).await?;
    let ending = app.ending();
    let mut manner = loop {
        tokio::select! {
            _ = terminate.recv() => {
                tracing::info!("SIGTERM: draining");
                break Manner::Drain;
            }
            _ = interrupt.recv() => {
                tracing::info!("SIGINT: draining");
                break Manner::Drain;
            }
            manner = ending.asked() => break manner,
            // What came of it is in the log.
            _ = hang_up.recv() => drop(app.reload().await),
        }
    };
    let mut end = pin!(app.shut_down_as(manner));
    loop {
        tokio::select! {
            () = &mut end => return Ok(()),
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        manner = if manner < Manner::Drain {
            Manner::Drain
        } else {
            Manner::Now
        };
        tracing::info!(?manner, "another signal");
        ending.ask(manner);
    }
}
