//! `flowgate follow` as a process of its own: what it says, line by line with a deadline, and how it ends.

use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::timeout;

/// How long anything may take that is expected to happen at all.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Follower {
    child: Child,
    lines: Lines<BufReader<ChildStdout>>,
}

/// How it ended: exit status, and what was not read yet.
pub(crate) struct End {
    pub(crate) code: Option<i32>,
    pub(crate) out: Vec<String>,
    pub(crate) err: String,
}

impl Follower {
    pub(crate) fn start(url: &str, args: &[&str]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_flowgate"));
        command.args(["follow", "--url", url]).args(args);
        Self::of(command)
    }

    pub(crate) fn of(mut command: Command) -> Self {
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        Self { child, lines }
    }

    pub(crate) async fn line(&mut self) -> String {
        let line = timeout(PATIENCE, self.lines.next_line()).await;
        line.expect("silent").unwrap().expect("it has ended")
    }

    /// Up to and with the first line that holds `word`.
    pub(crate) async fn read_to(&mut self, word: &str) -> Vec<String> {
        let mut lines = Vec::new();
        loop {
            let line = self.line().await;
            let found = line.contains(word);
            lines.push(line);
            if found {
                return lines;
            }
        }
    }

    pub(crate) async fn event(&mut self) -> Value {
        let line = self.line().await;
        serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"))
    }

    pub(crate) fn signal(&self, signal: Signal) {
        let pid = i32::try_from(self.child.id().unwrap()).unwrap();
        kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
    }

    pub(crate) async fn ended(mut self) -> End {
        let mut out = Vec::new();
        while let Some(line) = timeout(PATIENCE, self.lines.next_line())
            .await
            .expect("it does not end")
            .unwrap()
        {
            out.push(line);
        }
        let status: ExitStatus = timeout(PATIENCE, self.child.wait())
            .await
            .expect("it does not end")
            .unwrap();
        let mut err = String::new();
        let mut stderr = self.child.stderr.take().unwrap();
        stderr.read_to_string(&mut err).await.unwrap();
        End {
            code: status.code(),
            out,
            err,
        }
    }
}

/// The numbers of a run's events, which must be all of them.
pub(crate) fn seqs(events: &[Value]) -> Vec<i64> {
    events
        .iter()
        .map(|event| event["seq"].as_i64().unwrap_or_else(|| panic!("{event}")))
        .collect()
}
