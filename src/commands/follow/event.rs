//! One notification, read as an event of a run, and the moments JSON tells of. Pure; never judges order. Called by `mod`,
//! `reader` and `view`.

use serde_json::Value;
use uuid::Uuid;

use super::super::picture::Status;

/// Seconds since 1970, on the server's clock.
pub(super) type Moment = f64;

#[derive(Clone, Debug, PartialEq)]
pub(super) struct Event {
    /// Of a run's event always; of a gap if it is a run's.
    pub(super) run: Option<Uuid>,
    /// `run:started`, `step:completed`, `gap` …
    pub(super) kind: String,
    pub(super) step: Option<String>,
    /// A signal of the moment (a task's) has none.
    pub(super) seq: Option<i64>,
    pub(super) tasks: Option<i64>,
    /// Why it failed, or was skipped.
    pub(super) reason: Option<String>,
    /// When it happened.
    pub(super) at: Option<Moment>,
}

impl Event {
    pub(super) fn read(payload: &str) -> Option<Self> {
        let event: Value = serde_json::from_str(payload).ok()?;
        let text = |key: &str| event[key].as_str().map(str::to_owned);
        let kind = text("event_type")?;
        let run = text("run_id").and_then(|id| id.parse().ok());
        if run.is_none() && kind != "gap" {
            return None;
        }
        let moments = ["completed_at", "failed_at", "skipped_at", "started_at"];
        Some(Self {
            run,
            step: text("step_slug").map(|slug| slug.replace(char::is_control, "")),
            seq: event["seq"].as_i64(),
            tasks: event["remaining_tasks"].as_i64(),
            reason: text("error_message").or_else(|| text("skip_reason")),
            at: moments.iter().find_map(|key| moment(&event[*key])),
            kind: kind.replace(char::is_control, ""),
        })
    }

    /// What its run or step is since.
    pub(super) fn status(&self) -> Option<Status> {
        status(self.kind.rsplit(':').next()?)
    }

    /// It ends the run.
    pub(super) fn ends(&self) -> Option<Status> {
        self.status()
            .filter(|status| self.kind.starts_with("run:") && *status != Status::Running)
    }
}

/// pgflow's words for states, of runs, steps and events.
pub(super) fn status(word: &str) -> Option<Status> {
    match word {
        "created" => Some(Status::Waiting),
        "started" => Some(Status::Running),
        "completed" => Some(Status::Completed),
        "failed" => Some(Status::Failed),
        "skipped" => Some(Status::Skipped),
        _ => None,
    }
}

/// A timestamp as `to_jsonb` prints it: `2026-11-23T08:46:59.950647+00:00`.
pub(super) fn moment(value: &Value) -> Option<Moment> {
    let (date, time) = value.as_str()?.split_once('T')?;
    let mut parts = date.splitn(3, '-').map(|part| part.parse::<i64>().ok());
    let (year, month, day) = (parts.next()??, parts.next()??, parts.next()??);
    let (clock, offset) = match time.rfind(['+', '-', 'Z']) {
        Some(at) => time.split_at(at),
        None => (time, ""),
    };
    let mut parts = clock.splitn(3, ':').map(|part| part.parse::<f64>().ok());
    let (hour, minute, second) = (parts.next()??, parts.next()??, parts.next()??);
    let sign = if offset.starts_with('-') { -1.0 } else { 1.0 };
    let mut parts = offset
        .trim_start_matches(['+', '-', 'Z'])
        .split(':')
        .map(|part| part.parse::<f64>().unwrap_or_default());
    let mut next = || parts.next().unwrap_or_default();
    let east = sign * (next() * 3_600.0 + next() * 60.0 + next());
    if !(1..=12).contains(&month) || !(1..=31).contains(&day) || !(0..=300_000).contains(&year) {
        return None;
    }
    // Days since 1970-01-01 in the Gregorian calendar, years beginning in March so that leap days come last.
    let (year, month) = if month > 2 {
        (year, month - 3)
    } else {
        (year - 1, month + 9)
    };
    let days = 365 * year + year.div_euclid(4) - year.div_euclid(100)
        + year.div_euclid(400)
        + (153 * month + 2) / 5
        + day
        - 719_469;
    #[expect(clippy::cast_precision_loss, reason = "days, far below 2^52")]
    let days = days as f64;
    Some(days * 86_400.0 + hour * 3_600.0 + minute * 60.0 + second - east)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn timestamps_are_read_whatever_the_time_zone() {
        for (text, seconds) in [
            ("1970-01-01T00:00:00+00:00", 0.0),
            ("2000-02-29T12:00:00.5+00:00", 951_825_600.5),
            ("2000-03-01T01:00:00+13:00", 951_825_600.0),
            ("2026-11-23T08:46:59.950647+00:00", 1_795_423_619.950_647),
            ("2026-11-23T03:16:59-05:30", 1_795_423_619.0),
            ("2026-12-31T23:59:59Z", 1_798_761_599.0),
        ] {
            let read = moment(&json!(text)).unwrap();
            assert!((read - seconds).abs() < 1e-3, "{text}: {read}");
        }
        for nonsense in [
            json!(null),
            json!("infinity"),
            json!("2026-13-01T00:00:00Z"),
            json!("T"),
        ] {
            assert_eq!(moment(&nonsense), None, "{nonsense}");
        }
    }

    #[test]
    fn an_event_is_read_and_anything_else_is_not() {
        let run = Uuid::from_u128(7);
        let payload = format!(
            r#"{{"run_id": "{run}", "event_type": "step:started", "step_slug": "a", "remaining_tasks": 3,
                "started_at": "1970-01-01T00:00:09+00:00", "seq": 2, "cursor": "9"}}"#
        );
        let event = Event::read(&payload).unwrap();
        assert_eq!(
            (event.run, event.seq, event.tasks),
            (Some(run), Some(2), Some(3))
        );
        assert_eq!(
            (event.status(), event.ends()),
            (Some(Status::Running), None)
        );
        assert_eq!(event.at, Some(9.0));
        for nonsense in ["", "{}", "[]", r#"{"run_id": 1, "event_type": "x"}"#] {
            assert_eq!(Event::read(nonsense), None, "{nonsense}");
        }
        assert!(
            Event::read(r#"{"event_type": "gap", "flow_slug": "f", "from": "1", "to": null}"#)
                .is_some()
        );
    }
}
