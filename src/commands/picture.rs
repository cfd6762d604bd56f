//! How a run looks on a terminal, piece by piece: marks, bars, branches, durations. Pure. Called by `demo` and `follow`.

use uuid::Uuid;

use super::screen::{Paint, Screen};

const BAR: usize = 24;

/// Of a run or a step, as far as a picture tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Waiting,
    Running,
    Completed,
    Failed,
    Skipped,
}

pub(super) fn mark(status: Status, screen: &Screen) -> String {
    match status {
        Status::Waiting => screen.paint(Paint::Dim, "·"),
        Status::Running => screen.paint(Paint::Cyan, "▶"),
        Status::Completed => screen.paint(Paint::Green, "✔"),
        Status::Failed => screen.paint(Paint::Red, "✘"),
        Status::Skipped => screen.paint(Paint::Dim, "↷"),
    }
}

/// Before the `at`th of `of` lines.
pub(super) fn branch(at: usize, of: usize) -> &'static str {
    if at + 1 == of { "└─" } else { "├─" }
}

pub(super) fn bar(done: i64, tasks: i64) -> String {
    let full = usize::try_from(done.max(0)).unwrap_or(0) * BAR
        / usize::try_from(tasks.max(1)).unwrap_or(1);
    let full = full.min(BAR);
    format!(
        "{}{} {done}/{tasks}",
        "█".repeat(full),
        "░".repeat(BAR - full)
    )
}

/// The beginning of an id, enough to tell a few runs apart.
pub(super) fn short(id: Uuid) -> String {
    id.to_string().chars().take(8).collect()
}
