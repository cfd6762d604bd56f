//! The runs as their events and the reader's answers tell of them: what has happened, whether every event came and in
//! order, and how that looks on a screen. Pure: times are passed in. Fed and drawn by `mod`, judged by `summary`.

use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;
use uuid::Uuid;

use super::super::picture::{Status, bar, branch, mark, short};
use super::super::screen::{Paint, Screen};
use super::flow::{MAP, STEPS};
use super::listener::Heard;
use super::reader::Seen;

/// More runs than this are drawn as a line each.
const TREES_MAX: usize = 3;
const LINES_MAX: usize = 16;

/// One event, when it came.
#[derive(Clone, Debug)]
pub(super) struct Arrival {
    pub(super) run: Uuid,
    pub(super) kind: String,
    pub(super) step: Option<usize>,
    pub(super) at: Instant,
}

pub(super) struct Tree {
    pub(super) runs: Vec<RunView>,
    pub(super) arrivals: Vec<Arrival>,
}

pub(super) struct RunView {
    pub(super) id: Uuid,
    pub(super) status: Status,
    pub(super) last_seq: i64,
    pub(super) repeated: usize,
    /// What was wrong with the events first.
    pub(super) disorder: Option<String>,
    pub(super) error: Option<String>,
    /// As the reader saw it at the end.
    pub(super) output: Option<Value>,
    began: Instant,
    ended: Option<Instant>,
    read_over: bool,
    steps: [StepView; STEPS.len()],
    /// Quarters of the map told of.
    quarters: i64,
}

#[derive(Clone, Copy)]
struct StepView {
    status: Status,
    began: Option<Instant>,
    ended: Option<Instant>,
    tasks: Option<i64>,
    done: i64,
}

impl Tree {
    pub(super) fn new(runs: &[Uuid], now: Instant) -> Self {
        let step = StepView {
            status: Status::Waiting,
            began: None,
            ended: None,
            tasks: None,
            done: 0,
        };
        let view = |id: &Uuid| RunView {
            id: *id,
            status: Status::Waiting,
            last_seq: 0,
            repeated: 0,
            disorder: None,
            error: None,
            output: None,
            began: now,
            ended: None,
            read_over: false,
            steps: [step; STEPS.len()],
            quarters: 0,
        };
        Self {
            runs: runs.iter().map(view).collect(),
            arrivals: Vec::new(),
        }
    }

    /// An event; the line that tells of it, unless it was here before.
    pub(super) fn note(&mut self, heard: &Heard) -> Option<String> {
        let several = self.runs.len() > 1;
        let run = self.runs.iter_mut().find(|run| run.id == heard.run)?;
        if heard.kind == "gap" {
            run.disorder
                .get_or_insert_with(|| "a gap was announced".to_owned());
            return None;
        }
        // Signals of single tasks are not numbered: they are no part of the order.
        let seq = heard.seq?;
        if seq <= run.last_seq {
            run.repeated += 1;
            return None;
        }
        if seq > run.last_seq + 1 {
            let wrong = format!("event {seq} came after event {}", run.last_seq);
            run.disorder.get_or_insert(wrong);
        }
        run.last_seq = seq;
        let step = heard.step.as_deref();
        let step = step.and_then(|slug| STEPS.iter().position(|known| *known == slug));
        run.apply(heard, step);
        self.arrivals.push(Arrival {
            run: heard.run,
            kind: heard.kind.clone(),
            step,
            at: heard.at,
        });
        let mut line = run.stamp(heard.at, several) + &format!(" #{seq:<3} {:<15}", heard.kind);
        if let Some(slug) = &heard.step {
            line += &format!(" {slug}");
        }
        if let (Some(MAP), Some(tasks), "step:started") = (step, heard.tasks, heard.kind.as_str()) {
            line += &format!(" ({tasks} tasks)");
        }
        if let Some(error) = &heard.error {
            line += &format!(": {error}");
        }
        Some(line.trim_end().to_owned())
    }

    /// An answer of the reader; a line once another quarter of the map is done.
    pub(super) fn see(&mut self, seen: Seen, now: Instant) -> Option<String> {
        let several = self.runs.len() > 1;
        let run = self.runs.iter_mut().find(|run| run.id == seen.run)?;
        if seen.is_over() {
            run.read_over = true;
            run.output = Some(seen.output);
        }
        let map = seen.steps.iter().find(|step| step.slug == STEPS[MAP])?;
        let (tasks, remaining) = (map.tasks?, map.remaining?);
        let step = &mut run.steps[MAP];
        step.tasks = Some(tasks);
        step.done = step.done.max(tasks - remaining);
        let quarter = 4 * step.done / tasks.max(1);
        if quarter <= run.quarters || quarter >= 4 {
            return None;
        }
        run.quarters = quarter;
        let done = run.steps[MAP].done;
        Some(run.stamp(now, several) + &format!("      {done} of {tasks} tasks of {}", STEPS[MAP]))
    }

    /// Every run has ended, and the reader knows.
    pub(super) fn is_over(&self) -> bool {
        self.runs
            .iter()
            .all(|run| run.ended.is_some() && run.read_over)
    }

    pub(super) fn has_completed(&self) -> bool {
        self.runs.iter().all(|run| run.status == Status::Completed)
    }

    pub(super) fn picture(&self, screen: &Screen, now: Instant) -> Vec<String> {
        if self.runs.len() <= TREES_MAX {
            return self
                .runs
                .iter()
                .flat_map(|run| run.tree(screen, now))
                .collect();
        }
        let mut lines: Vec<String> = self
            .runs
            .iter()
            .take(LINES_MAX)
            .map(|run| run.summary(screen, now))
            .collect();
        if let Some(more @ 1..) = self.runs.len().checked_sub(LINES_MAX) {
            let over = self.runs[LINES_MAX..]
                .iter()
                .filter(|run| run.ended.is_some())
                .count();
            lines.push(format!("… and {more} more, {over} of them over"));
        }
        lines
    }
}

impl RunView {
    fn apply(&mut self, heard: &Heard, step: Option<usize>) {
        let status = match heard.kind.rsplit(':').next() {
            Some("started") => Status::Running,
            Some("completed") => Status::Completed,
            Some("failed") => Status::Failed,
            Some(_) | None => return,
        };
        let over = matches!(status, Status::Completed | Status::Failed);
        if heard.error.is_some() {
            self.error.clone_from(&heard.error);
        }
        match step {
            Some(step) => {
                let view = &mut self.steps[step];
                view.status = status;
                if over {
                    view.ended = Some(heard.at);
                    view.done = view.tasks.unwrap_or(view.done);
                } else {
                    view.began = Some(heard.at);
                    view.tasks = heard.tasks;
                }
            }
            None => {
                self.status = status;
                self.ended = over.then_some(heard.at);
            }
        }
    }

    fn stamp(&self, at: Instant, several: bool) -> String {
        let since = at.saturating_duration_since(self.began).as_secs_f64();
        if several {
            format!("  {} +{since:.3} s", short(self.id))
        } else {
            format!("  +{since:.3} s")
        }
    }

    fn tree(&self, screen: &Screen, now: Instant) -> Vec<String> {
        let mut lines = vec![self.summary(screen, now)];
        for (at, (slug, step)) in STEPS.iter().zip(&self.steps).enumerate() {
            let took = step.began.map(|began| took(began, step.ended, now));
            let bar = match step.tasks {
                Some(tasks) if at == MAP => bar(step.done, tasks),
                Some(_) | None => String::new(),
            };
            let line = format!(
                "{} {} {slug:<13}{:>8}  {bar}",
                branch(at, STEPS.len()),
                mark(step.status, screen),
                took.unwrap_or_default(),
            );
            lines.push(line.trim_end().to_owned());
        }
        lines
    }

    fn summary(&self, screen: &Screen, now: Instant) -> String {
        let order = match &self.disorder {
            None => "in order",
            Some(_) => "NOT in order",
        };
        let map = &self.steps[MAP];
        let tasks = map.tasks.map_or(String::new(), |tasks| {
            format!(", {}/{tasks} tasks", map.done)
        });
        format!(
            "{} run {}  {:>8}  {} events {order}{tasks}",
            mark(self.status, screen),
            screen.paint(Paint::Bold, &short(self.id)),
            took(self.began, self.ended, now),
            self.last_seq,
        )
    }
}

fn took(began: Instant, ended: Option<Instant>, now: Instant) -> String {
    let took: Duration = ended.unwrap_or(now).saturating_duration_since(began);
    format!("{:.2} s", took.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::super::reader::SeenStep;
    use super::*;

    const RUN: Uuid = Uuid::from_u128(0xabc0_0000_0000_0000_0000_0000_0000_0000);

    fn heard(seq: i64, kind: &str, step: Option<&str>, at: Instant) -> Heard {
        Heard {
            run: RUN,
            kind: kind.to_owned(),
            step: step.map(str::to_owned),
            seq: Some(seq),
            tasks: step.map(|_| 8),
            error: None,
            at,
        }
    }

    #[test]
    fn events_make_a_tree_and_lines() {
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let mut tree = Tree::new(&[RUN], start);
        let mut lines = Vec::new();
        lines.extend(tree.note(&heard(1, "run:started", None, at(5))));
        lines.extend(tree.note(&heard(2, "step:started", Some("count_words"), at(1_500))));
        let seen = Seen {
            run: RUN,
            status: "started".to_owned(),
            steps: vec![SeenStep {
                slug: "count_words".to_owned(),
                tasks: Some(8),
                remaining: Some(3),
            }],
            output: Value::Null,
        };
        lines.extend(tree.see(seen.clone(), at(1_600)));
        lines.extend(tree.see(seen, at(1_700)));
        assert_eq!(
            lines,
            [
                "  +0.005 s #1   run:started",
                "  +1.500 s #2   step:started    count_words (8 tasks)",
                "  +1.600 s      5 of 8 tasks of count_words"
            ]
        );
        let screen = Screen::plain();
        assert_eq!(
            tree.picture(&screen, at(2_000)),
            [
                "▶ run abc00000    2.00 s  2 events in order, 5/8 tasks",
                "├─ · list_files",
                "├─ ▶ count_words    0.50 s  ███████████████░░░░░░░░░ 5/8",
                "├─ · top_words",
                "└─ · write_result",
            ]
        );
        assert!(!tree.is_over());
    }

    #[test]
    fn an_event_twice_is_counted_and_one_too_early_is_disorder() {
        let start = Instant::now();
        let mut tree = Tree::new(&[RUN], start);
        assert!(tree.note(&heard(1, "run:started", None, start)).is_some());
        assert!(tree.note(&heard(1, "run:started", None, start)).is_none());
        assert_eq!((tree.runs[0].repeated, &tree.runs[0].disorder), (1, &None));
        assert!(tree.note(&heard(3, "run:completed", None, start)).is_some());
        assert_eq!(
            tree.runs[0].disorder.as_deref(),
            Some("event 3 came after event 1")
        );
        assert!(tree.has_completed() && !tree.is_over(), "not read yet");
        tree.see(
            Seen {
                run: RUN,
                status: "completed".to_owned(),
                steps: Vec::new(),
                output: Value::Null,
            },
            start,
        );
        assert!(tree.is_over());
    }

    #[test]
    fn many_runs_are_a_line_each_and_not_more_than_fit() {
        let start = Instant::now();
        let ids: Vec<Uuid> = (0..40).map(Uuid::from_u128).collect();
        let picture = Tree::new(&ids, start).picture(&Screen::plain(), start);
        assert_eq!(picture.len(), LINES_MAX + 1);
        assert_eq!(picture[LINES_MAX], "… and 24 more, 0 of them over");
    }
}
