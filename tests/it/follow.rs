//! `flowgate follow` as one types it: the outcome is its exit status, JSON is complete and in order, bad input is told.

use rustix::process::Signal;
use serde_json::Value;
use tokio::process::Command;

use crate::support::core::{Core, run};
use crate::support::follower::{Follower, seqs};
use crate::support::proxy::{PATIENCE, Proxy};
use crate::support::wait::wait_until;

const GREET: &str = "flow greet(max_attempts => 1)
                     first
                     second < first";

/// A proxy before it, with servers to spare.
async fn proxy(core: &Core) -> Proxy {
    Proxy::with_pool(&core.db, 5).await
}

#[tokio::test]
async fn the_exit_status_is_the_outcome_and_lines_tell_of_it() {
    let core = Core::new().await;
    let proxy = proxy(&core).await;
    core.define(GREET).await;
    core.start_flow("greet", "{}", 1).await;
    core.start_flow("greet", "{}", 2).await;
    core.take("greet").await;
    let mut good = Follower::start(&proxy.url(), &[&run(1)]);
    let mut bad = Follower::start(&proxy.url(), &[&run(2)]);
    for follower in [&mut good, &mut bad] {
        let lines = follower.read_to("step:started").await;
        assert_eq!(lines[0], "+0.000 s #1   run:started");
        assert_eq!(lines[1], "+0.000 s #2   step:started    first");
    }
    core.fail(2, "first", 0, "no luck").await;
    core.complete(1, "first", 0, "1").await;
    core.take("greet").await;
    core.complete(1, "second", 0, "2").await;

    let good = good.ended().await;
    assert_eq!(
        (good.code, good.err.as_str()),
        (Some(0), ""),
        "{:?}",
        good.out
    );
    assert!(
        good.out.last().unwrap().ends_with("#6   run:completed"),
        "{:?}",
        good.out
    );
    let bad = bad.ended().await;
    assert_eq!((bad.code, bad.err.as_str()), (Some(1), ""), "{:?}", bad.out);
    let told: Vec<&str> = bad
        .out
        .iter()
        .filter_map(|line| line.split_once("s #"))
        .map(|(_, rest)| rest)
        .collect();
    assert_eq!(
        told,
        [
            "3   step:failed     first: no luck",
            "4   run:failed     : no luck"
        ]
    );
    // Long over, the same is told.
    for (n, code, last) in [(1, 0, "run:completed"), (2, 1, "run:failed")] {
        let late = Follower::start(&proxy.url(), &[&run(n)]).ended().await;
        assert_eq!(late.code, Some(code), "{:?} {}", late.out, late.err);
        assert!(late.out.last().unwrap().contains(last), "{:?}", late.out);
    }
    proxy.shut_down().await;
}

#[tokio::test]
async fn json_is_every_event_once_and_goes_on_from_where_it_is_told() {
    let core = Core::new().await;
    let proxy = proxy(&core).await;
    core.define(GREET).await;
    core.start_flow("greet", "{\"a\": \"line\\nbreak\"}", 1)
        .await;
    let mut follower = Follower::start(&proxy.url(), &[&run(1), "--json"]);
    let mut events = vec![follower.event().await];
    for step in ["first", "second"] {
        core.take("greet").await;
        core.complete(1, step, 0, "1").await;
    }
    let end = follower.ended().await;
    assert_eq!(end.code, Some(0), "{}", end.err);
    events.extend(
        end.out
            .iter()
            .map(|line| serde_json::from_str::<Value>(line).unwrap()),
    );
    assert_eq!(seqs(&events), [1, 2, 3, 4, 5, 6]);
    assert_eq!(events[0]["event_type"], "run:started");
    assert_eq!(events[5]["event_type"], "run:completed");
    assert!(events.iter().all(|event| event["run_id"] == run(1)));

    let rest = Follower::start(&proxy.url(), &[&run(1), "--json", "--after", "4"])
        .ended()
        .await;
    let rest: Vec<Value> = rest
        .out
        .iter()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(rest, events[4..]);
    proxy.shut_down().await;
}

#[tokio::test]
async fn what_cannot_be_followed_is_told() {
    let core = Core::new().await;
    let proxy = proxy(&core).await;
    let url = proxy.url();
    let nowhere = format!("postgres://x@127.0.0.1:{}/x", free_port());
    let id = run(1);
    for (url, args, code, told) in [
        (
            &url,
            vec![id.as_str()],
            2,
            format!("flowgate follow: run {id} is unknown in this database\n"),
        ),
        (&url, vec!["--json", &id], 2, format!("run {id} is unknown")),
        (
            &url,
            vec!["67e55044"],
            2,
            "not a run's id, which is a UUID".to_owned(),
        ),
        (
            &url,
            vec!["--flow", "nope"],
            2,
            "flow nope is unknown in this database".to_owned(),
        ),
        (
            &url,
            vec!["--flow", "no-pe"],
            2,
            "not a flow's slug".to_owned(),
        ),
        (&url, vec![], 2, "required".to_owned()),
        (
            &url,
            vec![&id, "--flow", "f"],
            2,
            "cannot be used with".to_owned(),
        ),
        (
            &url,
            vec![&id, "--timeout", "soon"],
            2,
            "an integer and a unit".to_owned(),
        ),
        (
            &"mysql://x".to_owned(),
            vec![&id],
            2,
            "--url: starts with `mysql://`".to_owned(),
        ),
        (
            &nowhere,
            vec![&id],
            3,
            "cannot connect to postgres://x@127.0.0.1".to_owned(),
        ),
    ] {
        let end = Follower::start(url, &args).ended().await;
        assert_eq!(
            (end.code, end.out.len()),
            (Some(code), 0),
            "{args:?}: {}",
            end.err
        );
        assert!(end.err.contains(&told), "{args:?}: {}", end.err);
    }
    proxy.shut_down().await;
}

#[tokio::test]
async fn it_ends_when_told_or_when_time_is_up() {
    let core = Core::new().await;
    let proxy = proxy(&core).await;
    core.define(GREET).await;
    core.start_flow("greet", "{}", 1).await;
    let end = Follower::start(&proxy.url(), &[&run(1), "--timeout", "1s"])
        .ended()
        .await;
    assert_eq!((end.code, end.out.len()), (Some(124), 2), "{}", end.err);
    assert_eq!(end.err, "flowgate follow: not over after 1s\n");
    for (signal, code) in [(Signal::INT, 130), (Signal::TERM, 143)] {
        let mut follower = Follower::start(&proxy.url(), &["--json", &run(1)]);
        follower.event().await;
        follower.signal(signal);
        assert_eq!(follower.ended().await.code, Some(code));
    }
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_flow_is_every_run_of_it_each_event_once() {
    let core = Core::new().await;
    let proxy = proxy(&core).await;
    core.define(GREET).await;
    core.define("flow other\nfirst").await;
    let work = async |n: u32| {
        for step in ["first", "second"] {
            core.take("greet").await;
            core.complete(n, step, 0, "1").await;
        }
    };
    core.start_flow("greet", "{}", 1).await;
    work(1).await;
    core.start_flow("greet", "{}", 2).await;
    let mut follower = Follower::start(&proxy.url(), &["--flow", "greet", "--json"]);
    // Under way when it came: from the first event on.
    let mut events = vec![follower.event().await];
    core.start_flow("other", "{}", 9).await;
    for n in 3..8 {
        core.start_flow("greet", "{}", n).await;
    }
    for n in 2..8 {
        work(n).await;
    }
    while events.len() < 6 * 6 {
        events.push(follower.event().await);
    }
    for n in 2..8 {
        let own: Vec<Value> = events
            .iter()
            .filter(|event| event["run_id"] == run(n))
            .cloned()
            .collect();
        assert_eq!(seqs(&own), [1, 2, 3, 4, 5, 6], "{own:?}");
    }
    follower.signal(Signal::INT);
    let end = follower.ended().await;
    assert_eq!((end.code, end.out.len()), (Some(130), 0), "{:?}", end.out);
    proxy.shut_down().await;
}

#[tokio::test]
async fn lines_tell_of_maps_and_tries_too() {
    let core = Core::new().await;
    let proxy = proxy(&core).await;
    core.define("flow work(max_attempts => 3, base_delay => 20)\nmap each\nlast < each")
        .await;
    core.start_flow("work", "[1, 2, 3, 4]", 1).await;
    core.take("work").await;
    let mut follower = Follower::start(&proxy.url(), &[&run(1)]);
    follower.read_to("step:started    each (4 tasks)").await;
    core.complete(1, "each", 0, "1").await;
    core.complete(1, "each", 1, "1").await;
    follower.read_to("2 of 4 tasks of each").await;
    core.fail(1, "each", 2, "not yet").await;
    let line = follower.read_to("retry in").await.pop().unwrap();
    assert!(line.contains("each: retry in "), "{line}");
    assert!(
        line.ends_with("s (attempt 1 of 3 failed: not yet)"),
        "{line}"
    );
    follower.signal(Signal::INT);
    assert_eq!(follower.ended().await.code, Some(130));
    proxy.shut_down().await;
}

#[tokio::test]
async fn on_a_terminal_a_tree_is_drawn_in_place() {
    let core = Core::new().await;
    let proxy = proxy(&core).await;
    core.define("flow work(max_attempts => 1)\nmap each\nlast < each")
        .await;
    core.start_flow("work", "[1, 2, 3, 4]", 1).await;
    core.take("work").await;
    // util-linux' own terminal; its file is not wanted.
    let follow = format!(
        "{} follow --url {} {}",
        env!("CARGO_BIN_EXE_flowgate"),
        proxy.url(),
        run(1)
    );
    let mut command = Command::new("script");
    command.args(["-q", "-e", "-c", &follow, "/dev/null"]);
    command.env("TERM", "xterm").env_remove("NO_COLOR");
    let mut follower = Follower::of(command);
    let running = follower.read_to("after each").await.join("\n");
    assert!(running.contains("\x1b[36m▶\x1b[0m each"), "{running}");
    core.complete(1, "each", 0, "1").await;
    follower.read_to("1/4").await;
    core.fail(1, "each", 1, "no luck").await;
    let end = follower.ended().await;
    let said = end.out.join("\n");
    assert_eq!(end.code, Some(1), "{said}");
    // Over the last one, and what stays is the end.
    let (_, last) = said.rsplit_once("\x1b[3A").unwrap();
    assert!(
        last.contains("\x1b[31m✘\x1b[0m each") && last.contains("no luck"),
        "{last}"
    );
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_run_whose_events_are_no_longer_kept_ends_by_its_rows() {
    let core = Core::new().await;
    let proxy = proxy(&core).await;
    core.define(GREET).await;
    core.start_flow("greet", "{}", 1).await;
    core.take("greet").await;
    core.fail(1, "first", 0, "no luck").await;
    core.run("truncate flowgate.event").await;
    let end = Follower::start(&proxy.url(), &[&run(1), "--json"])
        .ended()
        .await;
    assert_eq!(end.code, Some(1), "{:?} {}", end.out, end.err);
    let gap: Value = serde_json::from_str(&end.out[0]).unwrap();
    assert_eq!(
        (end.out.len(), &gap["event_type"]),
        (1, &Value::from("gap")),
        "{:?}",
        end.out
    );
    assert!(end.err.contains("no longer kept"), "{}", end.err);
    proxy.shut_down().await;
}

#[tokio::test]
async fn a_reader_that_leaves_ends_it() {
    let core = Core::new().await;
    let proxy = proxy(&core).await;
    core.define(GREET).await;
    core.start_flow("greet", "{}", 1).await;
    let mut command = Command::new("sh");
    command.args([
        "-c",
        r#""$0" follow --url "$1" "$2" --json | head -n 1; echo done"#,
    ]);
    command.args([env!("CARGO_BIN_EXE_flowgate"), &proxy.url(), &run(1)]);
    let mut follower = Follower::of(command);
    follower.event().await;
    core.take("greet").await;
    core.complete(1, "first", 0, "1").await;
    let end = follower.ended().await;
    assert_eq!((end.out, end.err.as_str()), (vec!["done".to_owned()], ""));
    wait_until("nobody is connected", PATIENCE, async || {
        proxy.metric("flowgate_clients") == 0
    })
    .await;
    proxy.shut_down().await;
}

fn free_port() -> u16 {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    socket.local_addr().unwrap().port()
}
