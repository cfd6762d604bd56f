//! One run as its events and its rows tell of it, and how that looks. Pure: times are passed in. A state only moves upwards, so
//! a row read from a replica that is behind undoes nothing. Fed and drawn by `mod`.

use std::collections::HashMap;

use uuid::Uuid;

use super::super::picture::{Status, bar, branch, mark, short};
use super::super::screen::{Paint, Screen};
use super::event::{Event, Moment};
use super::reader::{Snapshot, Tasks};

/// Of an error message, on one line.
const REASON_LETTERS: usize = 100;

pub(super) struct RunView {
    pub(super) id: Uuid,
    pub(super) flow: Option<String>,
    pub(super) status: Status,
    began: Option<Moment>,
    ended: Option<Moment>,
    reason: Option<String>,
    last_seq: i64,
    steps: Vec<StepView>,
    /// What has been said of tasks, so that it is said once.
    told: HashMap<String, Told>,
}

#[derive(Clone, Debug)]
pub(super) struct StepView {
    pub(super) slug: String,
    pub(super) status: Status,
    after: Vec<String>,
    began: Option<Moment>,
    ended: Option<Moment>,
    tasks: Option<i64>,
    done: i64,
    is_map: bool,
    reason: Option<String>,
    attempts: Option<Tasks>,
    attempts_max: Option<i32>,
}

#[derive(Default)]
struct Told {
    quarters: i64,
    attempts: i32,
}

fn rank(status: Status) -> u8 {
    match status {
        Status::Waiting => 0,
        Status::Running => 1,
        Status::Completed | Status::Failed | Status::Skipped => 2,
    }
}

impl StepView {
    fn new(slug: &str) -> Self {
        Self {
            slug: slug.to_owned(),
            status: Status::Waiting,
            after: Vec::new(),
            began: None,
            ended: None,
            tasks: None,
            done: 0,
            is_map: false,
            reason: None,
            attempts: None,
            attempts_max: None,
        }
    }

    fn rise(&mut self, status: Status) {
        if rank(status) > rank(self.status) {
            self.status = status;
        }
        if status == Status::Completed {
            self.done = self.tasks.unwrap_or(self.done);
        }
    }
}

impl RunView {
    pub(super) fn new(id: Uuid) -> Self {
        Self {
            id,
            flow: None,
            status: Status::Running,
            began: None,
            ended: None,
            reason: None,
            last_seq: 0,
            steps: Vec::new(),
            told: HashMap::new(),
        }
    }

    fn step(&mut self, slug: &str) -> &mut StepView {
        let at = match self.steps.iter().position(|step| step.slug == slug) {
            Some(at) => at,
            None => {
                self.steps.push(StepView::new(slug));
                self.steps.len() - 1
            }
        };
        &mut self.steps[at]
    }

    /// An event that is new; the line that tells of it.
    pub(super) fn note(&mut self, event: &Event, several: bool) -> String {
        self.last_seq = event.seq.unwrap_or(self.last_seq);
        let status = event.status();
        match (&event.step, status) {
            (Some(slug), Some(status)) => {
                let step = self.step(slug);
                if status == Status::Running {
                    step.began = event.at;
                    step.tasks = event.tasks.or(step.tasks);
                } else {
                    step.ended = event.at;
                    step.reason.clone_from(&event.reason);
                }
                step.rise(status);
            }
            (None, Some(status)) => {
                if status == Status::Running {
                    self.began = event.at;
                } else {
                    self.ended = event.at;
                }
                self.rise(status);
                if event.reason.is_some() {
                    self.reason.clone_from(&event.reason);
                }
            }
            (_, None) => {}
        }
        let number = event.seq.map_or_else(String::new, |seq| format!("#{seq}"));
        let mut line = self.stamp(event.at, several) + &format!(" {number:<4} {:<15}", event.kind);
        if let Some(slug) = &event.step {
            line += &format!(" {slug}");
        }
        if let (Some(tasks @ 2..), "step:started") = (event.tasks, event.kind.as_str()) {
            line += &format!(" ({tasks} tasks)");
        }
        if let Some(reason) = &event.reason {
            line += &format!(": {}", one_line(reason));
        }
        line.trim_end().to_owned()
    }

    fn rise(&mut self, status: Status) {
        if rank(status) > rank(self.status) {
            self.status = status;
        }
    }

    /// The run's rows; lines of what no event tells: progress of maps, and tries.
    pub(super) fn see(&mut self, seen: &Snapshot, several: bool) -> Vec<String> {
        self.flow.clone_from(&seen.flow);
        self.began = seen.began.or(self.began);
        self.ended = seen.ended.or(self.ended);
        self.rise(seen.status);
        for row in &seen.steps {
            let attempts = seen.tasks.as_ref();
            let attempts = attempts.and_then(|tasks| tasks.get(&row.slug)).cloned();
            let step = self.step(&row.slug);
            step.began = row.began.or(step.began);
            step.ended = row.ended.or(step.ended);
            step.tasks = row.tasks.or(step.tasks);
            if let (Some(tasks), Some(remaining)) = (row.tasks, row.remaining) {
                step.done = step.done.max(tasks - remaining);
            }
            if row.reason.is_some() {
                step.reason.clone_from(&row.reason);
            }
            step.attempts = attempts;
            step.rise(row.status);
        }
        if let Some(plan) = &seen.plan {
            for planned in plan.iter() {
                let step = self.step(&planned.slug);
                step.after.clone_from(&planned.after);
                step.is_map = planned.is_map;
                step.attempts_max = planned.attempts_max;
            }
            let place = |slug: &str| plan.iter().position(|planned| planned.slug == slug);
            self.steps.sort_by_key(|step| place(&step.slug));
        }
        self.news(seen.now, several)
    }

    fn news(&mut self, now: Moment, several: bool) -> Vec<String> {
        let mut lines = Vec::new();
        let stamp = self.stamp(Some(now), several);
        for step in &self.steps {
            let told = self.told.entry(step.slug.clone()).or_default();
            if let (Some(tasks @ 2..), Status::Running) = (step.tasks, step.status) {
                let quarters = 4 * step.done / tasks;
                if quarters > told.quarters && quarters < 4 {
                    told.quarters = quarters;
                    lines.push(format!(
                        "{stamp}      {} of {tasks} tasks of {}",
                        step.done, step.slug
                    ));
                }
            }
            if let Some(retry) = step.retry(now)
                && let Some(tasks) = &step.attempts
                && tasks.attempts > told.attempts
            {
                told.attempts = tasks.attempts;
                lines.push(format!("{stamp}      {}: {retry}", step.slug));
            }
        }
        lines
    }

    fn stamp(&self, at: Option<Moment>, several: bool) -> String {
        let since = match (at, self.began) {
            (Some(at), Some(began)) => format!("+{:.3} s", (at - began).max(0.0)),
            _ => "        ".to_owned(),
        };
        if several {
            format!("{} {since}", short(self.id))
        } else {
            since
        }
    }

    pub(super) fn picture(&self, screen: &Screen, now: Moment) -> Vec<String> {
        let mut lines = vec![self.summary(screen, now)];
        let width = self
            .steps
            .iter()
            .map(|step| step.slug.chars().count())
            .max();
        let width = width.unwrap_or_default().min(32);
        for (at, step) in self.steps.iter().enumerate() {
            let took = took(step.began, step.ended, now);
            let line = format!(
                "{} {} {:<width$}{took:>9}  {}",
                branch(at, self.steps.len()),
                mark(step.status, screen),
                step.slug,
                self.particulars(step, screen, now)
            );
            lines.push(line.trim_end().to_owned());
        }
        lines
    }

    fn particulars(&self, step: &StepView, screen: &Screen, now: Moment) -> String {
        let mut words = Vec::new();
        if step.is_map || step.tasks.is_some_and(|tasks| tasks > 1) {
            words.extend(step.tasks.map(|tasks| bar(step.done, tasks)));
        }
        match step.status {
            Status::Waiting if self.status == Status::Running => {
                let open = step.after.iter().filter(|slug| {
                    let before = self.steps.iter().find(|step| step.slug == **slug);
                    before.is_none_or(|before| rank(before.status) < 2)
                });
                let open: Vec<_> = open.map(String::as_str).collect();
                if !open.is_empty() {
                    words.push(screen.paint(Paint::Dim, &format!("after {}", open.join(", "))));
                }
            }
            Status::Running => {
                if let Some(tasks) = &step.attempts {
                    if tasks.running > 0 {
                        words.push(format!("{} running", tasks.running));
                    }
                    if tasks.queued > 0 {
                        words.push(format!("{} queued", tasks.queued));
                    }
                }
                words.extend(
                    step.retry(now)
                        .map(|retry| screen.paint(Paint::Yellow, &retry)),
                );
            }
            Status::Failed | Status::Skipped => {
                let reason = step.reason.as_deref().map(one_line);
                words.extend(reason.map(|reason| screen.paint(Paint::Red, &reason)));
            }
            Status::Waiting | Status::Completed => {}
        }
        words.join("  ")
    }

    pub(super) fn summary(&self, screen: &Screen, now: Moment) -> String {
        let over = self.steps.iter().filter(|step| rank(step.status) == 2);
        let reason = match (&self.reason, self.status) {
            (Some(reason), Status::Failed) => {
                format!("  {}", screen.paint(Paint::Red, &one_line(reason)))
            }
            _ => String::new(),
        };
        let flow = self.flow.as_deref().unwrap_or("run");
        format!(
            "{} {} {}{:>9}  {} of {} steps, {} events{reason}",
            mark(self.status, screen),
            screen.paint(Paint::Bold, flow),
            short(self.id),
            took(self.began, self.ended, now),
            over.count(),
            self.steps.len(),
            self.last_seq,
        )
    }
}

impl StepView {
    /// Tasks that wait for another try.
    fn retry(&self, now: Moment) -> Option<String> {
        let tasks = self.attempts.as_ref().filter(|tasks| tasks.retrying > 0)?;
        let which = match tasks.retrying {
            1 => "retry".to_owned(),
            many => format!("{many} retries"),
        };
        let due = match tasks.retry_at {
            Some(at) if at > now => format!(" in {:.0} s", (at - now).ceil()),
            Some(_) => " due".to_owned(),
            None => String::new(),
        };
        let of = self
            .attempts_max
            .map_or_else(String::new, |max| format!(" of {max}"));
        let reason = tasks.reason.as_deref().map(one_line);
        let reason = reason.map_or_else(String::new, |reason| format!(": {reason}"));
        Some(format!(
            "{which}{due} (attempt {}{of} failed{reason})",
            tasks.attempts
        ))
    }
}

fn took(began: Option<Moment>, ended: Option<Moment>, now: Moment) -> String {
    let Some(began) = began else {
        return String::new();
    };
    let seconds = (ended.unwrap_or(now) - began).max(0.0);
    if seconds < 100.0 {
        format!("{seconds:.2} s")
    } else {
        let minutes = (seconds / 60.0).floor();
        format!(
            "{minutes:.0} m {:02.0} s",
            (seconds - minutes * 60.0).floor()
        )
    }
}

/// For a place in a line: no controls, so that no message can move our cursor.
fn one_line(text: &str) -> String {
    let mut letters = text.chars();
    let mut line: String = letters
        .by_ref()
        .take(REASON_LETTERS)
        .map(|letter| if letter.is_control() { ' ' } else { letter })
        .collect();
    if letters.next().is_some() {
        line.push('…');
    }
    line
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::reader::{Planned, SeenStep};
    use super::*;

    fn event(seq: i64, kind: &str, step: Option<&str>, at: Moment) -> Event {
        Event {
            run: Some(Uuid::from_u128(1)),
            kind: kind.to_owned(),
            step: step.map(str::to_owned),
            seq: Some(seq),
            tasks: step.map(|_| 8),
            reason: None,
            at: Some(at),
        }
    }

    fn snapshot(done: i64, tasks: Option<Tasks>) -> Snapshot {
        let plan = ["first", "second"].map(|slug| Planned {
            slug: slug.to_owned(),
            is_map: slug == "first",
            attempts_max: Some(3),
            after: if slug == "second" {
                vec!["first".to_owned()]
            } else {
                Vec::new()
            },
        });
        let first = SeenStep {
            slug: "first".to_owned(),
            status: Status::Running,
            began: Some(101.0),
            ended: None,
            tasks: Some(8),
            remaining: Some(8 - done),
            reason: None,
        };
        Snapshot {
            run: Uuid::from_u128(1),
            flow: Some("f".to_owned()),
            status: Status::Running,
            began: Some(100.0),
            ended: None,
            steps: vec![first],
            plan: Some(Arc::from(plan)),
            tasks: tasks.map(|tasks| HashMap::from([("first".to_owned(), tasks)])),
            now: 105.0,
        }
    }

    #[test]
    fn events_and_rows_make_a_picture_and_lines() {
        let mut run = RunView::new(Uuid::from_u128(1));
        let mut lines = vec![
            run.note(&event(1, "run:started", None, 100.0), false),
            run.note(&event(2, "step:started", Some("first"), 101.0), false),
        ];
        lines.extend(run.see(&snapshot(3, None), false));
        lines.extend(run.see(&snapshot(3, None), false));
        let retrying = Tasks {
            running: 2,
            queued: 0,
            retrying: 1,
            attempts: 1,
            retry_at: Some(108.2),
            reason: Some("no\u{1b}[2J luck".to_owned()),
        };
        lines.extend(run.see(&snapshot(2, Some(retrying)), false));
        assert_eq!(
            lines,
            [
                "+0.000 s #1   run:started",
                "+1.000 s #2   step:started    first (8 tasks)",
                "+5.000 s      3 of 8 tasks of first",
                "+5.000 s      first: retry in 4 s (attempt 1 of 3 failed: no [2J luck)",
            ]
        );
        assert_eq!(
            run.picture(&Screen::plain(), 106.0),
            [
                "▶ f 00000000   6.00 s  0 of 2 steps, 2 events",
                "├─ ▶ first    5.00 s  █████████░░░░░░░░░░░░░░░ 3/8  2 running  retry in 3 s (attempt 1 of 3 failed: no [2J luck)",
                "└─ · second           after first",
            ]
        );
    }

    #[test]
    fn a_row_that_is_behind_undoes_nothing() {
        let mut run = RunView::new(Uuid::from_u128(1));
        run.note(&event(3, "step:completed", Some("first"), 104.0), false);
        run.note(&event(4, "run:completed", None, 104.0), false);
        run.see(&snapshot(1, None), false);
        assert_eq!(
            (run.status, run.steps[0].status),
            (Status::Completed, Status::Completed)
        );
        assert!(
            run.picture(&Screen::plain(), 200.0)[0].contains("4.00 s"),
            "time has stopped"
        );
    }
}
