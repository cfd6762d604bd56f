//! `flowgate install`: argv → `schema`, and what it did in words. Called by `main`.

use std::io::{self, Write};
use std::process::ExitCode;

use crate::config::ConnectUrl;
use crate::schema::{
    self, Check, Component, InstallOptions, Outcome, PgflowApi, PgmqOutcome, Report, State,
};

/// Install or upgrade pgmq, pgflow's core and flowgate's outbox in a database
#[derive(Debug, clap::Args)]
#[command(group(clap::ArgGroup::new("instead").multiple(false)))]
pub struct Args {
    /// The database: postgres://user:password@host:port/database
    #[arg(
        long,
        value_name = "URL",
        env = "FLOWGATE_PRIMARY__URL",
        hide_env_values = true
    )]
    #[arg(required_unless_present = "print")]
    primary: Option<ConnectUrl>,
    /// Change nothing; say what is there (exit status 0: up to date, 1: not)
    #[arg(long, group = "instead")]
    check: bool,
    /// Connect to nothing; print the SQL
    #[arg(long, group = "instead")]
    print: bool,
    /// Drop it all, runs and events included (pgmq and a pgflow of somebody else's stay)
    #[arg(long, group = "instead")]
    uninstall: bool,
    /// Whose functions clients expect; left out: those installed, or 0.7
    #[arg(long, value_name = "VERSION", value_enum)]
    pgflow: Option<PgflowApi>,
    /// The outbox alone, beside a pgflow of somebody else's, and in the place of its realtime.send (--uninstall brings that
    /// back)
    #[arg(long, conflicts_with = "pgflow")]
    events_only: bool,
    /// NOTIFY every event from SQL too, for listeners that bypass flowgate; costs commits
    #[arg(long)]
    direct_notify: bool,
}

/// 0, or 1 with the reason on standard error (or, for `--check`, what is not up to date on standard output).
pub async fn run(args: Args) -> ExitCode {
    match act(args, &mut io::stdout()).await {
        Ok(Verdict::Good) => ExitCode::SUCCESS,
        Ok(Verdict::Bad) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("flowgate install: {error}");
            ExitCode::FAILURE
        }
    }
}

enum Verdict {
    Good,
    Bad,
}

#[derive(Debug, thiserror::Error)]
enum InstallError {
    #[error(transparent)]
    Schema(#[from] schema::SchemaError),
    #[error("writing the answer: {0}")]
    Output(#[from] io::Error),
}

async fn act(args: Args, out: &mut impl Write) -> Result<Verdict, InstallError> {
    let options = InstallOptions {
        pgflow: args.pgflow,
        events_only: args.events_only,
        direct_notify: args.direct_notify,
    };
    let Some(primary) = args.primary.filter(|_| !args.print) else {
        schema::print(out, options)?;
        return Ok(Verdict::Good);
    };
    if args.check {
        let check = schema::check_for(&primary, options).await?;
        tell_check(&check, out)?;
        return Ok(if check.is_up_to_date() {
            Verdict::Good
        } else {
            Verdict::Bad
        });
    }
    if args.uninstall {
        let removal = schema::uninstall(&primary).await?;
        writeln!(out, "removed from {primary}; pgmq and its queues stay")?;
        if removal.foreign_pgflow {
            writeln!(
                out,
                "schema pgflow was not installed by flowgate, so it stays too"
            )?;
        }
        return Ok(Verdict::Good);
    }
    let report = schema::install(&primary, options).await?;
    tell_report(&report, out)?;
    Ok(Verdict::Good)
}

fn tell_report(report: &Report, out: &mut impl Write) -> io::Result<()> {
    let pgmq = match report.pgmq {
        PgmqOutcome::AlreadyThere => "already there",
        PgmqOutcome::Extension => "installed as an extension",
        PgmqOutcome::Embedded => {
            "installed from the SQL flowgate carries (the server does not offer the extension)"
        }
        PgmqOutcome::NotAskedFor => "not asked for",
    };
    if report.pgmq != PgmqOutcome::NotAskedFor {
        writeln!(out, "{:<9} {pgmq}", "pgmq")?;
    }
    for (component, outcome) in &report.components {
        let told = match outcome {
            Outcome::Installed { version } => format!("{version} installed"),
            Outcome::Upgraded { from, version } => format!("{version} installed over {from}"),
            Outcome::Repaired { version, objects } => {
                format!("{version} repaired: {}", objects.join(", "))
            }
            Outcome::UpToDate { version } => format!("{version} up to date"),
            Outcome::LeftAlone => {
                "not installed by flowgate; left alone and used as it is".to_owned()
            }
        };
        let level = level(*component, report.api, *outcome != Outcome::LeftAlone);
        writeln!(out, "{component:<9} {told}{level}")?;
    }
    Ok(())
}

fn tell_check(check: &Check, out: &mut impl Write) -> io::Result<()> {
    match check.pgmq_missing.as_slice() {
        [] => writeln!(out, "{:<9} ok", "pgmq")?,
        missing => writeln!(out, "{:<9} missing: {}", "pgmq", missing.join(", "))?,
    }
    for (component, state) in &check.components {
        let told = match state {
            State::Absent { wanted } => format!("not installed; {wanted} would be"),
            State::Other { installed, wanted } => {
                format!("{installed} installed; {wanted} would be")
            }
            State::UpToDate { version } => format!("{version} ok"),
            State::Foreign => "not installed by flowgate; used as it is".to_owned(),
            State::Damaged {
                version,
                missing,
                changed,
            } => {
                let mut told = format!("{version} damaged");
                for (what, objects) in [("missing", missing), ("changed", changed)] {
                    if !objects.is_empty() {
                        told.push_str(&format!("; {what}: {}", objects.join(", ")));
                    }
                }
                told
            }
        };
        let level = level(*component, check.api, *state != State::Foreign);
        writeln!(out, "{component:<9} {told}{level}")?;
    }
    Ok(())
}

/// Only our own pgflow has a level we know.
fn level(component: Component, api: PgflowApi, ours: bool) -> String {
    match component {
        Component::Pgflow if ours => format!(" (API {api})"),
        Component::Pgflow | Component::Flowgate => String::new(),
    }
}
