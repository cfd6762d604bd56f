//! `flowgate`: argv to one of the commands, nothing else.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Parser, Subcommand};
use flowgate::app::SetLog;
#[cfg(feature = "demo")]
use flowgate::commands::demo;
use flowgate::commands::{check_config, follow, install, serve};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;

/// Pages that a crowd of clients has filled go back to the system some seconds after it has left: its own threads see to that. With
/// glibc's they never do: they stay the process's, each with something left on it.
#[cfg(target_os = "linux")]
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// A Postgres proxy that understands pgflow.
#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Serve clients
    Serve(serve::ServeArgs),
    #[cfg(feature = "demo")]
    Demo(demo::Args),
    /// Install or upgrade pgmq, pgflow's core and flowgate's outbox in a database
    Install(install::Args),
    Follow(follow::Args),
    /// Check a configuration file: every problem at once, with its key path
    CheckConfig {
        file: PathBuf,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match cli.command {
        Command::Serve(args) => report(serve(args)),
        #[cfg(feature = "demo")]
        Command::Demo(args) => match log_to_stderr(args.log()).and_then(|_| control_runtime()) {
            Ok(runtime) => runtime.block_on(demo::run(args)),
            Err(error) => report(Err(error)),
        },
        Command::Install(args) => match control_runtime() {
            Ok(runtime) => runtime.block_on(install::run(args)),
            Err(error) => report(Err(error)),
        },
        Command::Follow(args) => match control_runtime() {
            Ok(runtime) => runtime.block_on(follow::run(args)),
            Err(error) => report(Err(error)),
        },
        Command::CheckConfig { file } => check_config::run(&file),
    }
}

fn serve(args: serve::ServeArgs) -> anyhow::Result<()> {
    let reread = args.reread();
    let config = args.config()?;
    let set_log = log_to_stderr(&config.log)?;
    control_runtime()?.block_on(serve::run(&config, reread, set_log))
}

fn control_runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?)
}

/// Returns what changes the filter later.
fn log_to_stderr(filter: &str) -> anyhow::Result<SetLog> {
    let targets: Targets = filter.parse()?;
    let (targets, handle) = reload::Layer::new(targets);
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false);
    tracing_subscriber::registry()
        .with(lines)
        .with(targets)
        .try_init()?;
    Ok(Arc::new(move |filter: &str| {
        let changed = filter
            .parse()
            .map_err(anyhow::Error::from)
            .and_then(|targets: Targets| Ok(handle.reload(targets)?));
        if let Err(error) = changed {
            tracing::error!(%error, filter, "log.filter could not be changed");
        }
    }))
}

fn report(outcome: anyhow::Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("flowgate: {error:#}");
            ExitCode::FAILURE
        }
    }
}
