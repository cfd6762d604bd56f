//! What may be a slug; defining flows and steps; the delay between tries.

use futures_util::future::join_all;

use super::{Core, lines, refused, show};

#[tokio::test]
async fn a_slug_is_an_identifier_of_at_most_128_characters_and_not_the_word_run() {
    let core = Core::new().await;
    let cases = [
        ("'a'", "t"),
        ("'_'", "t"),
        ("'A9_z'", "t"),
        ("'Run'", "t"),
        ("'runs'", "t"),
        ("'run'", "f"),
        ("''", "f"),
        ("null", "f"),
        ("'1a'", "f"),
        ("'a-b'", "f"),
        ("'a b'", "f"),
        ("'a.b'", "f"),
        ("' a'", "f"),
        ("E'a\\n'", "f"),
        ("E'a\\n1'", "f"),
        ("'ä'", "f"),
        ("repeat('a', 128)", "t"),
        ("repeat('a', 129)", "f"),
    ];
    for (slug, valid) in cases {
        let asked = format!("select pgflow.is_valid_slug({slug})");
        assert_eq!(core.show(&asked).await, valid, "{slug}");
    }
}

#[tokio::test]
async fn a_flow_is_made_once_and_its_queue_whenever_there_is_none() {
    let core = Core::new().await;
    let columns = "flow_slug, opt_max_attempts, opt_base_delay, opt_timeout, created_at = now()";
    let make = format!("select {columns} from pgflow.create_flow('f')");
    assert_eq!(core.show(&make).await, "f 3 5 60 t");
    let make = format!(
        "select {columns} from pgflow.create_flow(flow_slug => 'g', max_attempts => 0, base_delay => 0, timeout => 1)"
    );
    assert_eq!(core.show(&make).await, "g 0 0 1 t");

    // The second time nothing changes, and what is there comes back.
    let again = "select flow_slug, opt_max_attempts, opt_base_delay, opt_timeout,
                 created_at = (select created_at from pgflow.flows where flow_slug = 'g')
                 from pgflow.create_flow('g', 7, 8, 9)";
    assert_eq!(core.show(again).await, "g 0 0 1 t");
    let queues = "select string_agg(queue_name, ' ' order by queue_name) from pgmq.list_queues()";
    assert_eq!(core.show(queues).await, "f g");
    assert_eq!(
        core.show("select count(*) from pgflow.flows").await,
        "2",
        "one row each"
    );

    // The existing flow gets its queue back.
    core.run("select pgmq.drop_queue('f'::text)").await;
    assert_eq!(core.show(queues).await, "g");
    core.run("select pgflow.create_flow('f')").await;
    assert_eq!(core.show(queues).await, "f g");
    core.define("flow f\n a").await;
    core.start_flow("f", "{}", 1).await;
    assert_eq!(core.queue("f").await, "a 0");
}

#[tokio::test]
async fn a_flow_with_an_impossible_name_or_option_is_refused_and_leaves_nothing() {
    let core = Core::new().await;
    let check = |name: &str| {
        format!("23514 new row for relation \"flows\" violates check constraint \"{name}\"")
    };
    for slug in ["1a", "", "run", "a-b", "a b"] {
        let make = format!("select pgflow.create_flow('{slug}')");
        assert_eq!(core.refused(&make).await, check("slug_is_valid"));
    }
    let negative = "select pgflow.create_flow('f', max_attempts => -1)";
    assert_eq!(
        core.refused(negative).await,
        check("opt_max_attempts_is_nonnegative")
    );
    let negative = "select pgflow.create_flow('f', base_delay => -1)";
    assert_eq!(
        core.refused(negative).await,
        check("opt_base_delay_is_nonnegative")
    );
    for timeout in [0, -1] {
        let make = format!("select pgflow.create_flow('f', timeout => {timeout})");
        assert_eq!(core.refused(&make).await, check("opt_timeout_is_positive"));
    }
    let nothing = "select count(*) from pgflow.flows; select count(*) from pgmq.list_queues()";
    assert_eq!(core.show(nothing).await, "0\n0");

    // pgmq's own limit: a queue's name has at most 47 characters.
    core.run("select pgflow.create_flow(repeat('q', 47))").await;
    for long in [48, 128] {
        let make = format!("select pgflow.create_flow(repeat('q', {long}))");
        let refused = core.refused(&make).await;
        let message = refused.split_once(' ').unwrap().1;
        assert!(
            message.starts_with("queue name is too long, maximum length is 4"),
            "{message}"
        );
    }
    assert_eq!(core.show(nothing).await, "1\n1");
    core.define("flow qqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqqq\n a")
        .await;
    core.start_flow(&"q".repeat(47), "{}", 1).await;
    assert_eq!(core.take(&"q".repeat(47)).await, r#"a 0 {"run": {}}"#);
    assert_eq!(core.complete(1, "a", 0, "1").await, "completed");
}

#[tokio::test]
async fn flows_that_differ_in_case_share_a_queue_table_and_nothing_else() {
    let core = Core::new().await;
    core.define("flow Foo\n A\n flow foo\n A").await;
    let queues = "select string_agg(queue_name, ' ' order by queue_name collate \"C\") from pgmq.list_queues()";
    assert_eq!(core.show(queues).await, "Foo foo");
    core.start_flow("Foo", "1", 1).await;
    core.start_flow("foo", "2", 2).await;
    assert_eq!(core.queue("foo").await, "A 0, A 0", "one table");
    // Each is handed only its own tasks, whoever reads the other's messages.
    assert_eq!(core.take("foo").await, r#"A 0 {"run": 2}"#);
    core.run("select pgmq.set_vt('foo'::text, 1::bigint, 0)")
        .await;
    assert_eq!(core.take("Foo").await, r#"A 0 {"run": 1}"#);
    assert_eq!(core.complete(1, "A", 0, "1").await, "completed");
    assert_eq!(core.fail(2, "A", 0, "no").await, "queued");
    assert_eq!(core.archive("foo").await, "A 0");
    assert_eq!(core.queue("foo").await, "A 0");
    let ends = "select flow_slug, status from pgflow.runs order by run_id";
    assert_eq!(core.show(ends).await, "Foo completed\nfoo started");
}

#[tokio::test]
async fn steps_are_numbered_and_keep_what_they_were_given() {
    let core = Core::new().await;
    core.run("select pgflow.create_flow('f'); select pgflow.create_flow('other')")
        .await;
    let columns =
        "flow_slug, step_slug, step_type, step_index, deps_count, opt_max_attempts, opt_base_delay,
                   opt_timeout, opt_start_delay, created_at = now()";
    let cases = [
        ("'f', 'a'", "f a single 0 0 ∅ ∅ ∅ ∅ t"),
        ("'f', 'b', array['a']", "f b single 1 1 ∅ ∅ ∅ ∅ t"),
        (
            "'f', 'c', array['b', 'a'], 0, 0, 1, 0, 'single'",
            "f c single 2 2 0 0 1 0 t",
        ),
        (
            "'f', 'd', step_type => 'map', max_attempts => 9, base_delay => 8, timeout => 7, start_delay => 6",
            "f d map 3 0 9 8 7 6 t",
        ),
        (
            "'f', 'e', array['d'], step_type => 'map'",
            "f e map 4 1 ∅ ∅ ∅ ∅ t",
        ),
        // Null: the default kind, no dependencies.
        (
            "'f', 'g', null, step_type => null",
            "f g single 5 0 ∅ ∅ ∅ ∅ t",
        ),
        // Named twice is one dependency, also for a map.
        ("'f', 'h', array['a', 'b', 'a']", "f h single 6 2 ∅ ∅ ∅ ∅ t"),
        (
            "'f', 'i', array['a', 'a'], step_type => 'map'",
            "f i map 7 1 ∅ ∅ ∅ ∅ t",
        ),
        // Each flow numbers its own.
        ("'other', 'a'", "other a single 0 0 ∅ ∅ ∅ ∅ t"),
        // What exists comes back as it is.
        (
            "'f', 'c', array['d'], 5, 5, 5, 5, 'map'",
            "f c single 2 2 0 0 1 0 f",
        ),
        ("'f', 'a', array['b']", "f a single 0 0 ∅ ∅ ∅ ∅ f"),
    ];
    for (given, row) in cases {
        let add = format!("select {columns} from pgflow.add_step({given})");
        assert_eq!(core.show(&add).await, row, "{given}");
    }
    // The repeated calls brought no dependency: `c` and `a` would wait for more than they count.
    let deps = "select flow_slug, step_slug, string_agg(dep_slug, ',' order by dep_slug), bool_and(created_at is not null)
                from pgflow.deps group by 1, 2 order by 1, 2";
    let expected = lines(
        "f b a t
         f c a,b t
         f e d t
         f h a,b t
         f i a t",
    );
    assert_eq!(core.show(deps).await, expected);
    let kept = "select count(*) filter (where flow_slug = 'f'), count(*) from pgflow.steps";
    assert_eq!(core.show(kept).await, "8 9");

    // And a dependency named twice is met once.
    core.define("flow twice\n a\n b < a, a").await;
    core.start_flow("twice", "1", 1).await;
    core.take("twice").await;
    core.complete(1, "a", 0, "2").await;
    assert_eq!(core.take("twice").await, r#"b 0 {"a": 2, "run": 1}"#);
}

#[tokio::test]
async fn a_step_that_cannot_be_is_refused_in_the_words_clients_know() {
    let core = Core::new().await;
    core.run("select pgflow.create_flow('f'); select pgflow.add_step('f', 'a'); select pgflow.add_step('f', 'b')")
        .await;
    let check = |table: &str, name: &str| {
        format!("23514 new row for relation \"{table}\" violates check constraint \"{name}\"")
    };
    let key = |table: &str, name: &str| {
        format!(
            "23503 insert or update on table \"{table}\" violates foreign key constraint \"{name}\""
        )
    };
    let cases = [
        (
            "'f', 'm', array['a', 'b'], step_type => 'map'",
            "P0001 Map step \"m\" can have at most one dependency, but 2 were provided: a, b".to_owned(),
        ),
        (
            "'f', 'm', array['b', 'a', 'nowhere'], step_type => 'map'",
            "P0001 Map step \"m\" can have at most one dependency, but 3 were provided: b, a, nowhere"
                .to_owned(),
        ),
        ("'nowhere', 's'", key("steps", "steps_flow_slug_fkey")),
        (
            "'f', 's', array['nowhere']",
            key("deps", "deps_flow_slug_dep_slug_fkey"),
        ),
        (
            "'f', 's', array['a', 'nowhere']",
            key("deps", "deps_flow_slug_dep_slug_fkey"),
        ),
        ("'f', 's', array['s']", check("deps", "deps_check")),
        (
            "'f', 's', array['s'], step_type => 'map'",
            check("deps", "deps_check"),
        ),
        ("'f', '1s'", check("steps", "steps_step_slug_check")),
        ("'f', ''", check("steps", "steps_step_slug_check")),
        ("'f', 'run'", check("steps", "steps_step_slug_check")),
        (
            "'f', 's', step_type => 'loop'",
            check("steps", "steps_step_type_check"),
        ),
        (
            "'f', 's', start_delay => -1",
            check("steps", "opt_start_delay_is_nonnegative"),
        ),
        (
            "'f', 's', max_attempts => -1",
            check("steps", "opt_max_attempts_is_nonnegative"),
        ),
        (
            "'f', 's', base_delay => -1",
            check("steps", "opt_base_delay_is_nonnegative"),
        ),
        (
            "'f', 's', timeout => 0",
            check("steps", "opt_timeout_is_positive"),
        ),
    ];
    for (given, error) in cases {
        let add = format!("select pgflow.add_step({given})");
        assert_eq!(core.refused(&add).await, error, "{given}");
    }
    let left = "select string_agg(step_slug, ' ' order by step_index) from pgflow.steps; select count(*) from pgflow.deps";
    assert_eq!(core.show(left).await, "a b\n0");
    // The next one takes the next number.
    let next = "select step_index from pgflow.add_step('f', 'c')";
    assert_eq!(core.show(next).await, "2");
}

#[tokio::test]
async fn many_may_define_at_once() {
    let core = Core::new().await;
    core.run("select pgflow.create_flow('f')").await;
    let clients = join_all((0..8).map(async |_| core.db.connect().await)).await;
    join_all(clients.iter().enumerate().map(async |(me, client)| {
        show(client, "select pgflow.create_flow('same')").await;
        for step in 0..5 {
            show(
                client,
                &format!("select pgflow.add_step('f', 's{me}_{step}')"),
            )
            .await;
            show(
                client,
                &format!("select pgflow.add_step('same', 'same{step}')"),
            )
            .await;
        }
    }))
    .await;
    let numbers =
        "select flow_slug, count(*), min(step_index), max(step_index), count(distinct step_index)
                   from pgflow.steps group by 1 order by 1;
                   select count(*) from pgmq.list_queues() where queue_name = 'same'";
    assert_eq!(core.show(numbers).await, "f 40 0 39 40\nsame 5 0 4 5\n1");
}

#[tokio::test]
async fn the_delay_between_tries_doubles() {
    let core = Core::new().await;
    let cases = [
        ("5, 0", "5"),
        ("5, 1", "10"),
        ("5, 2", "20"),
        ("5, 3", "40"),
        ("1, 10", "1024"),
        ("0, 10", "0"),
        ("2.5, 1", "5"),
        ("1.3, 1", "2"),
        ("0.4, 1", "0"),
        ("5, 28", "1342177280"),
    ];
    for (given, delay) in cases {
        let asked = format!("select pgflow.calculate_retry_delay({given})");
        assert_eq!(core.show(&asked).await, delay, "{given}");
    }
    let named = "select pgflow.calculate_retry_delay(base_delay => 3, attempts_count => 2)";
    assert_eq!(core.show(named).await, "12");
    let beyond = "select pgflow.calculate_retry_delay(5, 29)";
    assert_eq!(
        refused(&core.client, beyond).await,
        "22003 integer out of range"
    );
}
