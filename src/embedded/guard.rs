//! The guard: a small shell process beside us that stops our servers and removes their folder when we are gone, however
//! we went (return, panic, SIGINT, SIGKILL). Also starts processes so that it can find them. Knows nothing of Postgres
//! but which signals it takes. Called by `embedded` only.
//!
//! Why not `PR_SET_PDEATHSIG`: it fires when the spawning *thread* ends, exists only on Linux, and removes no folder.
//! A pipe whose other end only we hold reports our end in every case, so the guard just reads it.

use std::ffi::OsStr;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

const PREFIX: &str = "flowgate-pg-";
const MADE: &str = "made";

/// `$1` is the run folder; with `$2` it makes it first and prints that word: one made by us would stay if we died before
/// the guard was there. (Nobody may be left to read the word, hence PIPE.) Waits for end of file, then stops every process
/// that registered in `pids/`, first asking (SIGQUIT: Postgres' immediate shutdown), after 8 s by force, then removes
/// the folder.
///
/// INVARIANT: `closing` is made before `pids/` is read, and a process looks for `closing` after it wrote its pid and
/// before it execs (`LAUNCH`): whichever comes second sees the first, so no server slips through.
/// A pid counts only while its command line bears our folder's name; a zombie's or a recycled pid's does not. (It is
/// empty also in the middle of an exec, and that one counts: `initdb` would make the folder anew.)
const GUARD: &str = r#"
trap '' INT TERM HUP QUIT PIPE
root=$1
if [ -n "$2" ]; then mkdir -m 700 "$root" "$root/pids" || exit 1; echo "$2"; fi
exec > /dev/null
while read -r _; do :; done
cd / || exit 1
: > "$root/closing"
ours() {
  [ -d /proc/self ] || return 0
  grep -q -- "${root##*/}" "/proc/$1/cmdline" && return 0
  ! grep -q . "/proc/$1/cmdline" && ! grep -q ') Z' "/proc/$1/stat"
}
each() {
  some=1
  for file in "$root"/pids/*; do
    pid=$(cat "$file" 2>/dev/null) || continue
    [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null && ours "$pid" || continue
    some=0
    for signal in $1; do kill -"$signal" "$pid" 2>/dev/null; done
  done
  return $some
}
n=0
while each 'QUIT CONT' && [ $n -lt 160 ]; do sleep 0.05; n=$((n + 1)); done
each KILL
n=0
while rm -rf "$root" 2>/dev/null; [ -e "$root" ] && [ $n -lt 100 ]; do sleep 0.05; n=$((n + 1)); done
"#;

/// `$1` pid file, `$2` the closing mark, then the program and its arguments.
const LAUNCH: &str = r#"echo $$ > "$1" && [ ! -e "$2" ] || exit 1; shift 2; exec "$@""#;

/// Whom servers run as: Postgres refuses root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum RunAs {
    Ourselves,
    User { name: String, uid: u32, gid: u32 },
}

impl RunAs {
    /// `None`: we are root, and the machine has neither a user `postgres` nor `nobody`.
    pub(super) fn for_this_process() -> io::Result<Option<Self>> {
        if !rustix::process::geteuid().is_root() {
            return Ok(Some(Self::Ourselves));
        }
        let users = fs::read_to_string("/etc/passwd")?;
        Ok(["postgres", "_postgres", "nobody"]
            .iter()
            .find_map(|name| Self::from_passwd(&users, name)))
    }

    fn from_passwd(users: &str, wanted: &str) -> Option<Self> {
        users.lines().find_map(|line| {
            let mut fields = line.split(':');
            let name = fields.next().filter(|name| *name == wanted)?;
            let uid = fields.nth(1)?.parse().ok().filter(|uid| *uid != 0)?;
            let gid = fields.next()?.parse().ok()?;
            Some(Self::User {
                name: name.to_owned(),
                uid,
                gid,
            })
        })
    }

    /// Gives one file or folder to the server's user.
    pub(super) fn own(&self, path: &Path) -> io::Result<()> {
        match self {
            Self::Ourselves => Ok(()),
            Self::User { uid, gid, .. } => chown(path, Some(*uid), Some(*gid)),
        }
    }

    /// May that user enter this folder? Parents matter, so only trying it tells.
    pub(super) fn can_enter(&self, folder: &Path) -> io::Result<bool> {
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", r#"cd "$1" && [ -x . ]"#, "sh"])
            .arg(folder);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        self.apply(&mut command);
        Ok(command.status()?.success())
    }

    fn apply(&self, command: &mut Command) {
        match self {
            Self::Ourselves => {}
            Self::User { uid, gid, .. } => {
                command.uid(*uid).gid(*gid);
            }
        }
    }

    fn is_owner_of(&self, uid: u32) -> bool {
        let server_user = match self {
            Self::Ourselves => None,
            Self::User { uid, .. } => Some(*uid),
        };
        uid == rustix::process::geteuid().as_raw() || Some(uid) == server_user
    }
}

/// The run folder (always temporary) and the process that watches it.
#[derive(Debug)]
pub(super) struct Guard {
    root: PathBuf,
    run_as: RunAs,
    /// Closing it is the signal. `None` only while dropping.
    pipe: Option<ChildStdin>,
    process: Child,
    /// Held locked while we live: what tells a stale folder from one in use.
    _owner: File,
}

impl Guard {
    pub(super) fn start(run_as: RunAs) -> io::Result<Self> {
        let parent = std::env::temp_dir();
        sweep(&parent, &run_as);
        let mut name = [0; 8];
        getrandom::fill(&mut name).map_err(io::Error::other)?;
        let root = parent.join(format!("{PREFIX}{:016x}", u64::from_ne_bytes(name)));
        let mut command = guard_command(&root);
        let mut process = command
            .arg(MADE)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let pipe = process.stdin.take();
        let mut made = String::new();
        if let Some(mut answer) = process.stdout.take() {
            answer.read_to_string(&mut made)?;
        }
        if made.trim_end() != MADE {
            drop(pipe);
            process.wait()?;
            return Err(io::Error::other(format!("cannot make {}", root.display())));
        }
        run_as.own(&root)?;
        run_as.own(&root.join("pids"))?;
        let owner = File::create(root.join("owner"))?;
        owner.lock()?;
        Ok(Self {
            root,
            run_as,
            pipe,
            process,
            _owner: owner,
        })
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// What marks our processes: it must appear in the command line of each.
    pub(super) fn key(&self) -> &str {
        self.root
            .file_name()
            .and_then(OsStr::to_str)
            .expect("`start` made the name of our prefix and digits")
    }

    /// Starts `program` under the server's user, in its own process group (a terminal's Ctrl-C reaches only us).
    pub(super) fn spawn(
        &self,
        name: &str,
        program: &Path,
        args: &[String],
        log: File,
    ) -> io::Result<Ward> {
        let pid_file = self.root.join("pids").join(name);
        let mut command = Command::new("/bin/sh");
        command
            .args(["-c", LAUNCH, "sh"])
            .arg(&pid_file)
            .arg(self.root.join("closing"))
            .arg(program)
            .args(args);
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        command
            .current_dir(&self.root)
            .process_group(0)
            .env("LC_ALL", "C");
        for (variable, _) in std::env::vars_os() {
            if variable.as_encoded_bytes().starts_with(b"PG") {
                command.env_remove(variable);
            }
        }
        self.run_as.apply(&mut command);
        Ok(Ward {
            child: command.spawn()?,
            pid_file,
        })
    }
}

impl Guard {
    /// Tells the guard to begin. It is not waited for: that is `drop`'s part.
    pub(super) fn close(&mut self) {
        drop(self.pipe.take());
    }
}

impl Drop for Guard {
    /// Blocks until the folder is gone: under a second, or about ten when a process resists.
    fn drop(&mut self) {
        self.close();
        if let Err(error) = self.process.wait() {
            tracing::warn!(%error, "lost the guard of an embedded Postgres");
        }
        if self.root.exists()
            && let Err(error) = fs::remove_dir_all(&self.root)
        {
            tracing::warn!(%error, folder = %self.root.display(), "an embedded Postgres left its folder behind");
        }
    }
}

/// A process the guard knows of.
#[derive(Debug)]
pub(super) struct Ward {
    child: Child,
    pid_file: PathBuf,
}

impl Ward {
    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// `true` once it has ended. Its pid is then free for others, so the guard is told to forget it.
    pub(super) fn has_ended(&mut self) -> io::Result<bool> {
        let ended = self.child.try_wait()?.is_some();
        if ended {
            self.forget();
        }
        Ok(ended)
    }

    pub(super) fn succeeded(&mut self) -> io::Result<bool> {
        let status = self.child.wait()?;
        self.forget();
        Ok(status.success())
    }

    /// INVARIANT: called only while `child` is not reaped, so the pid is still this process.
    pub(super) fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        if let Some(pid) = pid
            && let Err(error) = kill_process(pid, signal)
        {
            tracing::debug!(%error, ?signal, "a signal to an embedded Postgres went nowhere");
        }
    }

    /// Blocks. Someone must have signalled it.
    pub(super) fn reap(&mut self) {
        if let Err(error) = self.child.wait() {
            tracing::warn!(%error, "lost an embedded Postgres");
        }
        self.forget();
    }

    fn forget(&self) {
        if let Err(error) = fs::remove_file(&self.pid_file)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::debug!(%error, file = %self.pid_file.display(), "pid file stays");
        }
    }
}

fn guard_command(root: &Path) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", GUARD, "sh"]).arg(root);
    command
        .current_dir("/")
        .process_group(0)
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command
}

/// Removes what owners left whose guard was killed too (a container stopped, a machine reset). Best effort.
fn sweep(folder: &Path, run_as: &RunAs) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        if entry
            .file_name()
            .as_encoded_bytes()
            .starts_with(PREFIX.as_bytes())
            && is_stale(&entry.path(), run_as)
        {
            // Its stdin is at its end from the start, so it begins to clear at once.
            match guard_command(&entry.path()).stdin(Stdio::null()).status() {
                Ok(_) => {
                    tracing::info!(folder = %entry.path().display(), "removed a stale embedded Postgres")
                }
                Err(error) => tracing::debug!(%error, "cannot clear a stale embedded Postgres"),
            }
        }
    }
}

/// A real folder of ours, older than the moment between its making and its lock, and nobody holds the lock.
fn is_stale(root: &Path, run_as: &RunAs) -> bool {
    let Ok(folder) = fs::symlink_metadata(root) else {
        return false;
    };
    if !folder.is_dir() || !run_as.is_owner_of(folder.uid()) {
        return false;
    }
    let (made, free) = match File::open(root.join("owner")) {
        Ok(owner) => (
            owner.metadata().and_then(|file| file.modified()),
            is_unlocked(&owner),
        ),
        // Its maker ended before it came to that.
        Err(error) => (folder.modified(), error.kind() == io::ErrorKind::NotFound),
    };
    free && made.is_ok_and(|made| {
        made.elapsed()
            .is_ok_and(|age| age > Duration::from_secs(10))
    })
}

fn is_unlocked(owner: &File) -> bool {
    match owner.try_lock() {
        Ok(()) => true,
        Err(TryLockError::WouldBlock | TryLockError::Error(_)) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_server_user_comes_from_passwd_and_is_never_root() {
        let users = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65533:n:/:/bin/false\npostgres:x:0:0::/:/bin/sh\n";
        let nobody = RunAs::User {
            name: "nobody".to_owned(),
            uid: 65534,
            gid: 65533,
        };
        assert_eq!(RunAs::from_passwd(users, "nobody"), Some(nobody));
        assert_eq!(RunAs::from_passwd(users, "postgres"), None);
        assert_eq!(RunAs::from_passwd(users, "absent"), None);
    }

    #[test]
    fn a_dropped_guard_takes_its_folder_and_its_processes_along() {
        let guard = Guard::start(RunAs::Ourselves).unwrap();
        let root = guard.root().to_owned();
        let log = File::create(root.join("log")).unwrap();
        // It ignores SIGQUIT's politeness test by being a plain sleep; the key in its command line makes it ours.
        let script = vec![
            "-c".to_owned(),
            "sleep 600 & wait".to_owned(),
            guard.key().to_owned(),
        ];
        let mut ward = guard
            .spawn("sleeper", Path::new("/bin/sh"), &script, log)
            .unwrap();
        assert!(!ward.has_ended().unwrap());
        let reaper = std::thread::spawn(move || ward.reap());
        drop(guard);
        reaper.join().unwrap();
        assert!(!root.exists());
    }

    #[test]
    fn only_a_folder_whose_owner_is_gone_is_stale() {
        let guard = Guard::start(RunAs::Ourselves).unwrap();
        let long_ago = std::time::SystemTime::now() - Duration::from_secs(60);
        guard._owner.set_modified(long_ago).unwrap();
        assert!(!is_stale(guard.root(), &RunAs::Ourselves));

        let abandoned = tempfile::Builder::new().prefix(PREFIX).tempdir().unwrap();
        assert!(
            !is_stale(abandoned.path(), &RunAs::Ourselves),
            "no lock file yet: being made"
        );
        File::open(abandoned.path())
            .unwrap()
            .set_modified(long_ago)
            .unwrap();
        assert!(
            is_stale(abandoned.path(), &RunAs::Ourselves),
            "nobody is making it any more"
        );
        File::create(abandoned.path().join("owner"))
            .unwrap()
            .set_modified(long_ago)
            .unwrap();
        assert!(is_stale(abandoned.path(), &RunAs::Ourselves));
    }
}
