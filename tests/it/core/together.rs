//! Two calls at once, the first not committed when the second comes: whatever they are, what is left is what one after the
//! other would leave.

use super::{Core, PATIENCE, WORKER, invariants, lines, run, show, try_show};
use crate::support::wait::wait_until;

/// `first` in a transaction that stays open until `second`, on another connection, waits for it or is done; then `end`.
/// What both returned, the second's errors in words.
async fn race(core: &Core, first: &str, second: &str, end: &str) -> (String, String) {
    let (one, two) = (core.db.connect().await, core.db.connect().await);
    let pid = show(&two, "select pg_backend_pid()").await;
    show(&one, "begin").await;
    let first = show(&one, first).await;
    let sql = second.to_owned();
    let second = tokio::spawn(async move {
        try_show(&two, &sql).await.unwrap_or_else(|error| {
            let error = error.as_db_error().expect("an error of the server's");
            format!("{} {}", error.code().code(), error.message())
        })
    });
    let waits = format!("select wait_event_type = 'Lock' from pg_stat_activity where pid = {pid}");
    wait_until("the second call waits or is done", PATIENCE, async || {
        second.is_finished() || core.show(&waits).await == "t"
    })
    .await;
    show(&one, end).await;
    (first, second.await.unwrap())
}

fn complete(n: u32, step: &str, index: u32) -> String {
    let id = run(n);
    format!("select status from pgflow.complete_task('{id}', '{step}', {index}, '\"{index}\"')")
}

fn fail(n: u32, step: &str, index: u32) -> String {
    let id = run(n);
    format!("select status from pgflow.fail_task('{id}', '{step}', {index}, 'no {index}')")
}

fn both(first: &str, second: &str) -> (String, String) {
    (first.to_owned(), second.to_owned())
}

#[tokio::test]
async fn of_two_ends_of_one_task_the_first_counts() {
    let core = Core::new().await;
    core.define("flow f(max_attempts => 2, base_delay => 0)\n a\n b < a\n flow m(max_attempts => 1)\n map x\n y < x")
        .await;
    let (done, failed) = (complete(1, "a", 0), fail(1, "a", 0));
    let steps = |a: &str, b: &str| format!("started {a}\n{b}");
    let fresh = "a started 1 0 1\nb created ∅ 1 1";
    let gone_on = "a completed 0 0 1\nb started 1 0 1";
    let cases = [
        // first, second, how the first ends, what they return, what is left
        (
            &done,
            &done,
            "commit",
            both("completed", "completed"),
            steps("1", gone_on),
        ),
        (
            &done,
            &done,
            "rollback",
            both("completed", "completed"),
            steps("1", gone_on),
        ),
        (
            &done,
            &failed,
            "commit",
            both("completed", "completed"),
            steps("1", gone_on),
        ),
        (
            &done,
            &failed,
            "rollback",
            both("completed", "queued"),
            steps("2", fresh),
        ),
        (
            &failed,
            &done,
            "commit",
            both("queued", "queued"),
            steps("2", fresh),
        ),
        (
            &failed,
            &done,
            "rollback",
            both("queued", "completed"),
            steps("1", gone_on),
        ),
        (
            &failed,
            &failed,
            "commit",
            both("queued", "queued"),
            steps("2", fresh),
        ),
    ];
    for (n, (first, second, end, returned, left)) in (1..).zip(cases) {
        core.start_flow("f", "{}", n).await;
        core.take("f").await;
        let [first, second] = [first, second].map(|sql| sql.replace(&run(1), &run(n)));
        assert_eq!(
            race(&core, &first, &second, end).await,
            returned,
            "{first}; {second}; {end}"
        );
        assert_eq!(core.states(n).await, left, "{first}; {second}; {end}");
    }

    // The same of one task of several, where the last failure is the run's.
    for (n, first_fails) in [(21, true), (22, false)] {
        core.start_flow("m", "[1, 2, 3]", n).await;
        core.take("m").await;
        let (one, other) = (fail(n, "x", 1), complete(n, "x", 1));
        let (first, second) = if first_fails {
            (one, other)
        } else {
            (other, one)
        };
        let status = if first_fails { "failed" } else { "completed" };
        assert_eq!(
            race(&core, &first, &second, "commit").await,
            both(status, status)
        );
        let left = if first_fails {
            "x failed 3 0 3"
        } else {
            "x started 2 0 3"
        };
        assert!(core.states(n).await.contains(left));
    }
    // Nobody works on: what is queued or started is left so on purpose.
    core.run("update pgflow.step_tasks set status = 'started', started_at = now() where status = 'queued';
              create temp table abandoned as select run_id, step_slug, task_index from pgflow.step_tasks where status = 'started'")
        .await;
    invariants::hold(&core, "ends of one task").await;
}

#[tokio::test]
async fn the_last_two_of_a_map_and_the_last_two_parents_complete_what_waits_for_them_once() {
    let core = Core::new().await;
    core.define("flow f\n map m\n a\n b\n last < m, a, b\n map more < m")
        .await;
    let pairs = [
        (("m", 0), ("m", 1), "commit"),
        (("m", 1), ("m", 0), "rollback"),
        (("a", 0), ("b", 0), "commit"),
        (("a", 0), ("b", 0), "rollback"),
        (("m", 0), ("a", 0), "commit"),
        (("a", 0), ("m", 1), "rollback"),
    ];
    for (n, ((step, index), (other, other_index), end)) in (1..).zip(pairs) {
        core.start_flow("f", "[1, 2]", n).await;
        core.take("f").await;
        for (also, at) in [("m", 0), ("m", 1), ("a", 0), ("b", 0)] {
            if (also, at) != (step, index) && (also, at) != (other, other_index) {
                core.complete(n, also, at, "1").await;
            }
        }
        let (first, second) = (complete(n, step, index), complete(n, other, other_index));
        assert_eq!(
            race(&core, &first, &second, end).await,
            both("completed", "completed")
        );
        if end == "rollback" {
            assert!(!core.states(n).await.contains("last started"), "{n}");
            assert_eq!(core.complete(n, step, index, "1").await, "completed");
        }
        assert_eq!(
            core.take("f").await.lines().count(),
            3,
            "last and two of more"
        );
        for (step, index) in [("last", 0), ("more", 1), ("more", 0)] {
            core.complete(n, step, index, "1").await;
        }
        assert!(core.states(n).await.starts_with("completed 0"), "{n}");
    }
    invariants::hold(&core, "the last two").await;
}

#[tokio::test]
async fn a_failure_and_whatever_else_happens_to_the_run_agree() {
    let core = Core::new().await;
    core.define("flow f(max_attempts => 1)\n map m\n a\n list\n map n < list\n last < m, a")
        .await;
    let failed = |n| (fail(n, "m", 0), "m failed");
    let others = |n: u32| {
        let id = run(n);
        [
            // It had seen the run alive, and waits for the step's row only to be counted off: as if it had come before.
            (complete(n, "m", 1), "completed", "completed"),
            (fail(n, "m", 1), "failed", "failed"),
            (complete(n, "a", 0), "completed", "started"),
            (fail(n, "a", 0), "failed", "failed"),
            // A type violation: no row when it counts.
            (
                format!("select status from pgflow.complete_task('{id}', 'list', 0, '7')"),
                "",
                "started",
            ),
        ]
    };
    for (n, at) in (1..).zip((0..5).flat_map(|at| [(at, true), (at, false)])) {
        let (at, failure_first) = at;
        core.start_flow("f", "[1, 2]", n).await;
        core.take("f").await;
        let (failure, left) = failed(n);
        let (other, alone, after) = others(n)[at].clone();
        let returned = if failure_first {
            race(&core, &failure, &other, "commit").await
        } else {
            race(&core, &other, &failure, "commit").await
        };
        let expected = if failure_first {
            both("failed", after)
        } else {
            // m's other task failing, or anything failing before, leaves the failure nothing but its own task to end.
            both(alone, "failed")
        };
        assert_eq!(
            returned, expected,
            "{other}, failure first: {failure_first}"
        );
        let states = core.states(n).await;
        assert!(states.starts_with("failed "), "{other}:\n{states}");
        if failure_first {
            assert!(states.contains(left), "{other}:\n{states}");
        }
        assert_eq!(core.events(n).await.matches("run:failed").count(), 1);
        assert_eq!(core.queue("f").await, "");
    }
    invariants::hold(&core, "failures").await;
}

#[tokio::test]
async fn a_task_started_while_its_run_fails_is_in_nobodys_way() {
    let core = Core::new().await;
    core.define("flow f(max_attempts => 1)\n a\n b").await;
    for (n, failure_first) in [(1, true), (2, false)] {
        core.start_flow("f", "{}", n).await;
        let of = |step: &str| {
            format!(
                "select step_slug from pgflow.start_tasks('f', array(select message_id from pgflow.step_tasks
                 where run_id = '{}' and step_slug = '{step}'), '{WORKER}')",
                run(n)
            )
        };
        assert_eq!(core.show(&of("a")).await, "a");
        let returned = if failure_first {
            race(&core, &fail(n, "a", 0), &of("b"), "commit").await
        } else {
            race(&core, &of("b"), &fail(n, "a", 0), "commit").await
        };
        assert!(
            [both("failed", ""), both("failed", "b"), both("b", "failed")].contains(&returned),
            "{returned:?}"
        );
        let b = core.complete(n, "b", 0, "1").await;
        assert!(["queued", "started"].contains(&b.as_str()));
        assert_eq!(
            core.states(n).await,
            lines("failed 2\na failed 1 0 1\nb started 1 0 1")
        );
        assert_eq!(core.queue("f").await, "");
    }
    invariants::hold(&core, "started while failing").await;
}

#[tokio::test]
async fn of_two_starts_under_one_id_one_is_refused() {
    let core = Core::new().await;
    core.define("flow f\n a").await;
    for (n, end) in [(1, "commit"), (2, "rollback")] {
        let start = format!(
            "select status from pgflow.start_flow('f', '{{}}', '{}')",
            run(n)
        );
        let second = if end == "commit" {
            "23505 duplicate key value violates unique constraint \"runs_pkey\""
        } else {
            "started"
        };
        assert_eq!(
            race(&core, &start, &start, end).await,
            both("started", second)
        );
        assert_eq!(core.tasks(n).await, "a 0 queued 0");
        assert_eq!(core.events(n).await, "run:started step:a:started");
    }
    core.take("f").await;
    for n in [1, 2] {
        core.complete(n, "a", 0, "1").await;
    }
    invariants::hold(&core, "two starts").await;
}
