//! Other people's drivers doing a day's work through the proxy: psql, pgbench, tokio-postgres, and by child processes the
//! Python and Node drivers in `python/` and `node/`; and all of them at once, following runs through faults (`crowd`). Their packages are fetched once, into `target/drivers/`.
//!
//! Why a harness of its own: libtest cannot say at run time that a test was not run. Where Python, Node or the registry is
//! missing the test counts as *ignored*, with the reason, never as passed. `FLOWGATE_DRIVERS=require` makes that a failure.
//! Understands what cargo passes on of libtest's arguments: filters, `--exact`, `--skip`, `--list`.

#![expect(
    clippy::unwrap_used,
    reason = "tests panic; clippy exempts only the test functions themselves"
)]

mod crowd;
mod days;
mod fetch;
mod follower;
#[path = "../it/support/mod.rs"]
mod support;

use std::collections::HashMap;
use std::process::ExitCode;

use tokio::task::{JoinSet, LocalSet};
use tokio::time::Instant;

/// How a day went.
pub(crate) enum Outcome {
    Passed,
    Failed(String),
    /// Not run, and why.
    Skipped(String),
}

#[derive(Default)]
struct Arguments {
    filters: Vec<String>,
    skip: Vec<String>,
    exact: bool,
    list: bool,
}

impl Arguments {
    /// Of libtest's arguments the ones that choose tests; the others change nothing here.
    fn parse(args: impl Iterator<Item = String>) -> Self {
        const WITH_VALUE: [&str; 5] = [
            "--test-threads",
            "--color",
            "--format",
            "--logfile",
            "--shuffle-seed",
        ];
        let mut arguments = Self::default();
        let mut args = args;
        while let Some(arg) = args.next() {
            match arg.as_str() {
                "--exact" => arguments.exact = true,
                "--list" => arguments.list = true,
                "--skip" => arguments.skip.extend(args.next()),
                flag if WITH_VALUE.contains(&flag) => drop(args.next()),
                flag if flag.starts_with('-') => {}
                _ => arguments.filters.push(arg),
            }
        }
        arguments
    }

    fn chooses(&self, name: &str) -> bool {
        let matches = |filter: &String| {
            if self.exact {
                name == filter
            } else {
                name.contains(filter.as_str())
            }
        };
        (self.filters.is_empty() || self.filters.iter().any(matches))
            && !self.skip.iter().any(matches)
    }
}

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    if std::env::var_os(follower::FOLLOWER).is_some() {
        runtime.block_on(follower::follow());
        return ExitCode::SUCCESS;
    }
    let arguments = Arguments::parse(std::env::args().skip(1));
    let chosen: Vec<_> = days::DAYS
        .iter()
        .filter(|(name, _)| arguments.chooses(name))
        .collect();
    if arguments.list {
        for (name, _) in chosen {
            println!("{name}: test");
        }
        return ExitCode::SUCCESS;
    }
    LocalSet::new().block_on(&runtime, run(&chosen, days::DAYS.len()))
}

async fn run(chosen: &[&(&'static str, days::Day)], known: usize) -> ExitCode {
    let required = std::env::var("FLOWGATE_DRIVERS").is_ok_and(|value| value == "require");
    let started = Instant::now();
    println!("\nrunning {} tests", chosen.len());
    let mut running = JoinSet::new();
    let mut names = HashMap::new();
    for (name, day) in chosen {
        let task = running.spawn_local(day());
        names.insert(task.id(), *name);
    }
    let (mut passed, mut skipped, mut failures) = (0, 0, Vec::new());
    while let Some(ended) = running.join_next_with_id().await {
        let (name, outcome) = match ended {
            Ok((id, outcome)) => (names[&id], outcome),
            Err(panic) => (names[&panic.id()], Outcome::Failed(panic.to_string())),
        };
        match outcome {
            Outcome::Passed => {
                passed += 1;
                println!("test {name} ... ok");
            }
            Outcome::Skipped(reason) if required => {
                println!("test {name} ... FAILED");
                failures.push((name, format!("not run: {reason}")));
            }
            Outcome::Skipped(reason) => {
                skipped += 1;
                println!("test {name} ... ignored, {reason}");
                eprintln!("skipped: {name}: {reason}");
            }
            Outcome::Failed(why) => {
                println!("test {name} ... FAILED");
                failures.push((name, why));
            }
        }
    }
    for (name, why) in &failures {
        println!("\n---- {name} ----\n{why}");
    }
    let verdict = if failures.is_empty() { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {verdict}. {passed} passed; {} failed; {skipped} ignored; 0 measured; {} filtered out; finished in {:.2}s\n",
        failures.len(),
        known - chosen.len(),
        started.elapsed().as_secs_f64()
    );
    ExitCode::from(if failures.is_empty() { 0 } else { 101 })
}
