//! Finds programs and fetches the drivers' packages into `target/drivers/`, once for all runs. Knows no driver; called by
//! `days`.
//!
//! INVARIANT: a folder under its final name is complete: it is filled under another name and renamed, under a lock that
//! other test processes wait for.

use std::env;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use tokio::process::Command;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

/// A registry is asked once; it may be slow.
const FETCH_MAX: Duration = Duration::from_secs(240);
const ASK_MAX: Duration = Duration::from_secs(20);

/// A program and its packages; or why there is none of them here.
pub(crate) type Found<T> = Result<T, String>;

/// Next to these tests.
pub(crate) fn source(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/drivers")
        .join(path)
}

/// The folder with the Python drivers, for PYTHONPATH.
pub(crate) async fn python() -> Found<PathBuf> {
    let version = "import sys; print(sys.implementation.cache_tag)";
    let tag = answer("python3", &["-c", version]).await?;
    let requirements = source("python/requirements.txt");
    let name = format!("{tag}-{:016x}", digest(&[&requirements]));
    once(&name, async |folder| {
        let pip = ["-m", "pip", "--disable-pip-version-check"];
        answer("python3", &[&pip[..], &["--version"]].concat()).await?;
        let mut command = Command::new("python3");
        command
            .args(pip)
            .args(["install", "--quiet", "--no-deps", "--only-binary", ":all:"])
            .arg("--target")
            .arg(folder)
            .arg("-r")
            .arg(&requirements);
        fetched(command).await
    })
    .await
}

/// The folder with the Node packages listed in `tests/drivers/<kind>/`, for NODE_PATH.
pub(crate) async fn node(kind: &str) -> Found<PathBuf> {
    let version = answer("node", &["--version"]).await?;
    let major = version
        .trim_start_matches('v')
        .split('.')
        .next()
        .unwrap_or_default();
    let lists = ["package.json", "package-lock.json"].map(|list| source(kind).join(list));
    let name = format!("{kind}-{major}-{:016x}", digest(&[&lists[0], &lists[1]]));
    let folder = once(&name, async |folder| {
        answer("npm", &["--version"]).await?;
        for list in &lists {
            fs::copy(list, folder.join(list.file_name().unwrap())).unwrap();
        }
        let mut command = Command::new("npm");
        command
            .args(["ci", "--no-audit", "--no-fund", "--ignore-scripts"])
            .arg("--prefix")
            .arg(folder);
        fetched(command).await
    })
    .await?;
    Ok(folder.join("node_modules"))
}

/// A browser that can be driven without a screen.
pub(crate) async fn browser() -> Found<PathBuf> {
    let said = env::var_os("FLOWGATE_BROWSER").map(PathBuf::from);
    let folders: Vec<_> = env::split_paths(&env::var_os("PATH").unwrap_or_default()).collect();
    let known = [
        "chromium",
        "chromium-browser",
        "google-chrome",
        "google-chrome-stable",
    ];
    let found = known
        .iter()
        .flat_map(|name| folders.iter().map(move |folder| folder.join(name)));
    for candidate in said.into_iter().chain(found) {
        if candidate.is_file() && answer(&candidate, &["--version"]).await.is_ok() {
            return Ok(candidate);
        }
    }
    Err("there is no Chromium on this machine".to_owned())
}

/// One of Postgres's own clients: on PATH, or where the server's programs are, newest first.
pub(crate) async fn postgres(program: &str) -> Found<PathBuf> {
    let mut folders: Vec<_> = env::var_os("FLOWGATE_PG_BIN")
        .map(PathBuf::from)
        .into_iter()
        .collect();
    folders.extend(env::split_paths(&env::var_os("PATH").unwrap_or_default()));
    let mut packaged: Vec<_> = fs::read_dir("/usr/lib/postgresql")
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path().join("bin"))
        .collect();
    packaged.sort();
    folders.extend(packaged.into_iter().rev());
    for folder in folders {
        let candidate = folder.join(program);
        if candidate.is_file() && answer(&candidate, &["--version"]).await.is_ok() {
            return Ok(candidate);
        }
    }
    Err(format!("there is no {program} on this machine"))
}

/// What a program says, without the end of line.
async fn answer(program: impl AsRef<OsStr>, args: &[&str]) -> Found<String> {
    let mut command = Command::new(&program);
    command.args(args);
    let output = output(command, ASK_MAX).await?;
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
    } else {
        let program = program.as_ref().to_string_lossy();
        Err(format!("{program} {}: {}", args.join(" "), reason(&output)))
    }
}

async fn fetched(command: Command) -> Found<()> {
    let program = command
        .as_std()
        .get_program()
        .to_string_lossy()
        .into_owned();
    let output = output(command, FETCH_MAX).await?;
    if output.status.success() {
        Ok(())
    } else {
        let reason = reason(&output);
        Err(format!("{program} could not fetch the drivers: {reason}"))
    }
}

async fn output(mut command: Command, within: Duration) -> Found<Output> {
    let program = command
        .as_std()
        .get_program()
        .to_string_lossy()
        .into_owned();
    command.stdin(Stdio::null()).kill_on_drop(true);
    match timeout(within, command.output()).await {
        Ok(Ok(output)) => Ok(output),
        Ok(Err(error)) if error.kind() == ErrorKind::NotFound => {
            Err(format!("there is no {program} on this machine"))
        }
        Ok(Err(error)) => Err(format!("{program}: {error}")),
        Err(_elapsed) => Err(format!("{program}: no answer within {within:?}")),
    }
}

/// What a failure says of its cause: the first line that begins so, or the last one.
fn reason(output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr);
    let mut lines = said.lines().map(str::trim);
    let line = lines
        .clone()
        .find(|line| line.starts_with("ERROR") || line.starts_with("npm error"))
        .or_else(|| lines.rfind(|line| !line.is_empty()));
    line.map_or_else(|| output.status.to_string(), str::to_owned)
}

/// `target/drivers/<name>`, made by `fill` if it is not there yet.
async fn once(name: &str, fill: impl AsyncFnOnce(&Path) -> Found<()>) -> Found<PathBuf> {
    let drivers = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .parent()
        .unwrap()
        .join("drivers");
    let (ready, partial) = (drivers.join(name), drivers.join(format!("{name}.partial")));
    fs::create_dir_all(&drivers).unwrap();
    let lock = File::create(drivers.join(format!("{name}.lock"))).unwrap();
    // Held until it is closed, that is until the end of this function.
    let _held = spawn_blocking(move || lock.lock().map(|()| lock))
        .await
        .unwrap()
        .unwrap();
    if !ready.is_dir() {
        if partial.exists() {
            fs::remove_dir_all(&partial).unwrap();
        }
        fs::create_dir(&partial).unwrap();
        fill(&partial).await?;
        fs::rename(&partial, &ready).unwrap();
    }
    Ok(ready)
}

fn digest(files: &[&Path]) -> u64 {
    let mut hasher = DefaultHasher::new();
    for file in files {
        fs::read(file).unwrap().hash(&mut hasher);
    }
    hasher.finish()
}
