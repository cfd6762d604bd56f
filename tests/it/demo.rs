//! `flowgate demo` as a visitor runs it: it tells the truth about a small folder, and leaves nothing behind, whenever it is
//! told to stop.

use std::cell::{Cell, RefCell};
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::support::http;
use crate::support::wait::wait_until;

/// The whole demo takes about two seconds, on a busy machine some more.
const PATIENCE: Duration = Duration::from_secs(60);
/// The last words of a demo that stays up.
const STAYS: &str = "Ctrl-C";

/// A demo with a temporary folder of its own, so that what it leaves there is its own too.
struct Demo {
    child: Child,
    /// Read by a thread of its own, so that waiting for a line has a deadline.
    lines: mpsc::Receiver<String>,
    temp: TempDir,
}

impl Demo {
    fn start(folder: &Path, args: &[&str]) -> Self {
        let temp = open_to_all();
        let mut command = Command::new(env!("CARGO_BIN_EXE_flowgate"));
        command
            .args(["demo", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"])
            .arg("--dir")
            .arg(folder)
            .args(args);
        let mut child = command
            .env("TMPDIR", temp.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = lines_of(child.stdout.take().unwrap());
        Self { child, lines, temp }
    }

    /// Up to and with the first line that holds `word`; or up to the end, without.
    fn read_to(&mut self, word: Option<&str>) -> String {
        let mut text = String::new();
        loop {
            let line = match self.lines.recv_timeout(PATIENCE) {
                Ok(line) => line,
                Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => panic!("silent for {PATIENCE:?} after:\n{text}"),
            };
            text.push_str(&line);
            text.push('\n');
            if word.is_some_and(|word| line.contains(word)) {
                return text;
            }
        }
        assert_eq!(word, None, "not said:\n{text}");
        text
    }

    fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id()).unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
    }

    /// It ends, and with it all it started and made.
    async fn ended(mut self) -> ExitStatus {
        let child = RefCell::new(&mut self.child);
        let status = Cell::new(None);
        wait_until("the demo ends", PATIENCE, async || {
            status.set(child.borrow_mut().try_wait().unwrap());
            status.get().is_some()
        })
        .await;
        let root = self.temp.path();
        assert_eq!(processes_of(root), Vec::<String>::new());
        let left: Vec<_> = fs::read_dir(root).unwrap().flatten().collect();
        assert!(left.is_empty(), "left behind: {left:?}");
        status.get().unwrap()
    }
}

impl Drop for Demo {
    /// Only a failing test gets here with the demo still running; the guard of its servers does the rest.
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            self.child.kill().unwrap();
        }
    }
}

fn lines_of(stdout: ChildStdout) -> mpsc::Receiver<String> {
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        let mut read = BufReader::new(stdout).lines().map_while(Result::ok);
        read.try_for_each(|line| sender.send(line))
    });
    lines
}

/// Postgres' user must get in, and root's own temporary folders are closed to him.
fn open_to_all() -> TempDir {
    let temp = tempfile::tempdir().unwrap();
    fs::set_permissions(temp.path(), fs::Permissions::from_mode(0o755)).unwrap();
    temp
}

/// Three text files and one that is none.
fn fixture() -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, bytes: &[u8]| {
        let path: PathBuf = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    };
    write("one.txt", b"pelican pelican heron\n");
    write("sub/two.md", b"Pelican, heron & stork: pelican!\n");
    write("sub/three.rs", b"fn pelican() {}\n");
    write("sub/picture.png", b"\x89PNG\r\n\0pelican\n");
    write("target/built.txt", b"pelican\n");
    folder
}

/// Command lines that name the folder: servers say where their data is, the guard what it guards.
fn processes_of(folder: &Path) -> Vec<String> {
    let listed = Command::new("/bin/sh")
        .args([
            "-c",
            r#"if [ -d /proc/self ]; then for p in /proc/[0-9]*; do tr '\0' ' ' < "$p/cmdline" 2>/dev/null && echo; done
               else ps -axww -o command; fi"#,
        ])
        .output()
        .unwrap();
    let folder = folder.display().to_string();
    String::from_utf8_lossy(&listed.stdout)
        .lines()
        .filter(|line| line.contains(&folder))
        .map(str::to_owned)
        .collect()
}

/// The number in the line that begins with `name`, in the section of the routes.
fn sent_to(output: &str, name: &str) -> u64 {
    let line = output
        .lines()
        .find_map(|line| line.trim_start().strip_prefix(name))
        .unwrap_or_else(|| panic!("no {name} in\n{output}"));
    let number = line.split_whitespace().next().unwrap().replace(',', "");
    number.parse().unwrap()
}

#[tokio::test]
async fn a_demo_counts_the_words_of_a_folder_and_follows_every_event() {
    let folder = fixture();
    let mut demo = Demo::start(folder.path(), &["--once", "--runs", "2"]);
    let output = demo.read_to(None);
    let status = demo.ended().await;
    assert!(status.success(), "{status}\n{output}");
    let folder = folder.path().canonicalize().unwrap();
    let result = format!(
        "9 words (4 different) in 3 text files under {}",
        folder.display()
    );
    assert!(output.contains(&result), "{output}");
    let top = output
        .lines()
        .skip_while(|line| !line.contains(&result))
        .nth(1);
    let top: Vec<&str> = top.unwrap().split_whitespace().collect();
    assert_eq!(top, ["5", "pelican", "2", "heron", "1", "fn", "1", "stork"]);
    assert!(
        output.contains("all 20 of 20 events came, in order, none missing"),
        "{output}"
    );
    assert!(output.contains("(3 tasks)"), "{output}");
    assert!(sent_to(&output, "replica ") > 0, "{output}");
    assert!(sent_to(&output, "primary ") > 0, "{output}");
    assert!(output.contains("commit → event: p50"), "{output}");
}

#[tokio::test]
async fn a_demo_told_to_stop_leaves_nothing_at_whatever_moment() {
    let folder = fixture();
    // What it said last before the signal; a signal at once may come before it listens for one, and has nothing to clear.
    let moments = [
        ("Flowgate demo", Signal::INT),
        ("Postgres", Signal::TERM),
        ("SQL installed", Signal::INT),
        ("proxy on", Signal::INT),
        ("flow count_words", Signal::HUP),
        ("step:started", Signal::TERM),
        ("step:completed", Signal::INT),
        ("Result", Signal::INT),
    ];
    for (word, signal) in moments {
        let mut demo = Demo::start(folder.path(), &[]);
        demo.read_to(Some(word));
        demo.signal(signal);
        let rest = demo.read_to(None);
        let status = demo.ended().await;
        let number = u8::try_from(signal.as_raw()).unwrap();
        // Who only waits to be told so has nothing left to do.
        let done = rest.contains(STAYS) && status.success();
        assert!(
            done || status.code() == Some(i32::from(128 + number)),
            "after {word}: {status}\n{rest}"
        );
    }
}

#[tokio::test]
async fn a_demo_stays_up_until_told_and_what_it_keeps_is_there_again() {
    let folder = fixture();
    let kept = open_to_all();
    let data = kept.path().join("data");
    let data = data.to_str().unwrap();
    for attempt in 1..=2 {
        let mut demo = Demo::start(folder.path(), &["--data", data]);
        let output = demo.read_to(Some(STAYS));
        assert!(output.contains("psql postgres://"), "{output}");
        let proxy = output
            .lines()
            .find_map(|line| line.trim_start().strip_prefix("proxy    "))
            .unwrap();
        let client = flowgate::embedded::connect(proxy).await.unwrap();
        let runs = client
            .query_one(
                "select count(*) from pgflow.runs where status = 'completed'",
                &[],
            )
            .await
            .unwrap();
        assert_eq!(runs.get::<_, i64>(0), attempt);
        shows_a_stranger_the_runs_and_no_more(&output, attempt).await;
        demo.signal(Signal::INT);
        assert!(demo.ended().await.success());
        let results = fs::read_dir(Path::new(data).join("results")).unwrap();
        let json = results
            .flatten()
            .filter(|file| file.path().extension().is_some_and(|is| is == "json"));
        let read = |file: fs::DirEntry| -> Value {
            serde_json::from_str(&fs::read_to_string(file.path()).unwrap()).unwrap()
        };
        let results: Vec<Value> = json.map(read).collect();
        assert_eq!(i64::try_from(results.len()), Ok(attempt));
        assert!(results.iter().all(|result| result["words"] == 9));
    }
}

/// The dashboard works without a key; nothing can be started by one who has none.
async fn shows_a_stranger_the_runs_and_no_more(output: &str, runs: i64) {
    let http = output
        .lines()
        .find_map(|line| line.trim().strip_prefix("http     http://"))
        .unwrap_or_else(|| panic!("no address in\n{output}"));
    let address = http.trim_end_matches('/').parse().unwrap();
    let page = http::get(address, "/", &[]).await;
    assert!(page.status == 200 && page.body.contains("<title>Flowgate</title>"));
    let listed = http::get(address, "/runs", &[]).await.json();
    let listed = listed["runs"].as_array().unwrap().len();
    assert_eq!(i64::try_from(listed), Ok(runs));
    let start = r#"{"flow_slug": "count_words_of_a_folder", "input": {}}"#;
    let path = "/rest/v1/rpc/start_flow_with_states";
    let headers = ["content-type: application/json", "content-profile: pgflow"];
    let refused = http::ask(address, "POST", path, &headers, start).await;
    assert_eq!(refused.status, 401, "{}", refused.body);
}

#[tokio::test]
async fn a_server_killed_during_a_demo_comes_back_and_the_run_goes_on() {
    // Enough files that the map takes a while.
    let folder = tempfile::tempdir().unwrap();
    for n in 0..400 {
        fs::write(folder.path().join(format!("{n}.txt")), "pelican\n").unwrap();
    }
    for server in ["primary", "replica1"] {
        let data = format!("/{server} ");
        // A demo may be over before we have looked.
        let mut tries = 0..10;
        let (mut demo, server) = loop {
            assert!(tries.next().is_some(), "no demo was still at work");
            let mut demo = Demo::start(folder.path(), &["--once", "--log", "off"]);
            demo.read_to(Some("(400 tasks)"));
            let servers = processes_of(demo.temp.path());
            if let Some(server) = servers.into_iter().find(|line| line.contains(&data)) {
                break (demo, server);
            }
        };
        kill_server(&server);
        let output = demo.read_to(None);
        let status = demo.ended().await;
        assert!(status.success(), "{status}\n{output}");
        assert!(output.contains("400 words"), "{output}");
        assert!(
            output.contains("all 10 of 10 events came, in order"),
            "{output}"
        );
    }
}

/// SIGKILL to the postmaster of that data folder, whose first line of `postmaster.pid` is its pid.
fn kill_server(command_line: &str) {
    let data = command_line
        .split_whitespace()
        .skip_while(|word| *word != "-D")
        .nth(1)
        .unwrap();
    let file = fs::read_to_string(Path::new(data).join("postmaster.pid")).unwrap();
    let pid: i32 = file.lines().next().unwrap().parse().unwrap();
    kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
}

#[tokio::test]
async fn a_demo_that_cannot_start_says_why_and_leaves_nothing() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let nowhere = Path::new("/nonexistent/folder");
    let folder = fixture();
    for (folder, args, told) in [
        (nowhere, vec![], "--dir /nonexistent/folder"),
        (folder.path(), vec!["--data", "/dev/null/x"], "/dev/null/x"),
    ] {
        refused(folder, &args, told).await;
    }
    // Not by `Demo`, which names an address itself.
    let temp = open_to_all();
    let output = Command::new(env!("CARGO_BIN_EXE_flowgate"))
        .args(["demo", "--once", "--listen", &address, "--dir"])
        .arg(folder.path())
        .env("TMPDIR", temp.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(told.contains(&format!("{address} is taken")), "{told}");
    assert!(fs::read_dir(temp.path()).unwrap().next().is_none());
}

async fn refused(folder: &Path, args: &[&str], told: &str) {
    let temp = open_to_all();
    let output = Command::new(env!("CARGO_BIN_EXE_flowgate"))
        .args(["demo", "--once", "--dir"])
        .arg(folder)
        .args(args)
        .env("TMPDIR", temp.path())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        said.starts_with("flowgate demo: ") && said.contains(told),
        "{said}"
    );
    assert!(fs::read_dir(temp.path()).unwrap().next().is_none());
}
