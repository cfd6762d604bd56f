//! Flows made from, compared with and made anew after the shape their code has.

use tokio::task::JoinSet;

use super::{Core, at_0_14, lines, run, try_show};

const SHAPE: &str = r#"{"steps": [
    {"slug": "a", "stepType": "single", "dependencies": [], "whenUnmet": "skip", "whenExhausted": "fail",
     "requiredInputPattern": {"defined": true, "value": {"x": 1}}, "forbiddenInputPattern": {"defined": false},
     "options": {"maxAttempts": 7, "baseDelay": 0, "timeout": 9, "startDelay": 4}},
    {"slug": "m", "stepType": "map", "dependencies": ["a"], "whenUnmet": "fail", "whenExhausted": "skip",
     "requiredInputPattern": {"defined": false}, "forbiddenInputPattern": {"defined": true, "value": {"a": []}}},
    {"slug": "z", "stepType": "single", "dependencies": ["a", "m"], "whenUnmet": "skip-cascade", "whenExhausted": "skip-cascade",
     "requiredInputPattern": {"defined": false}, "forbiddenInputPattern": {"defined": false}}],
    "options": {"maxAttempts": 2, "baseDelay": 1, "timeout": 30}}"#;

async fn compile(core: &Core, flow: &str, shape: &str, more: &str) -> String {
    core.show(&format!(
        "select c ->> 'status', c -> 'differences' from pgflow.ensure_flow_compiled('{flow}', $${shape}$${more}) as c"
    ))
    .await
}

#[tokio::test]
async fn a_missing_flow_is_made_with_all_its_options_and_then_found_as_it_should_be() {
    let core = at_0_14().await;
    assert_eq!(compile(&core, "f", SHAPE, "").await, "compiled []");
    let flow = "select flow_slug, opt_max_attempts, opt_base_delay, opt_timeout from pgflow.flows";
    assert_eq!(core.show(flow).await, "f 2 1 30");
    let steps = "select step_slug, step_type, step_index, deps_count, opt_max_attempts, opt_base_delay, opt_timeout, opt_start_delay,
                 required_input_pattern, forbidden_input_pattern, when_unmet, when_exhausted from pgflow.steps order by step_index";
    assert_eq!(
        core.show(steps).await,
        lines(
            "a single 0 0 7 0 9 4 {\"x\": 1} ∅ skip fail
             m map 1 1 ∅ ∅ ∅ ∅ ∅ {\"a\": []} fail skip
             z single 2 2 ∅ ∅ ∅ ∅ ∅ ∅ skip-cascade skip-cascade"
        )
    );
    assert_eq!(
        core.show("select queue_name from pgmq.list_queues()").await,
        "f"
    );
    let before = core.show("select created_at from pgflow.flows").await;
    assert_eq!(compile(&core, "f", SHAPE, "").await, "verified []");
    assert_eq!(compile(&core, "f", SHAPE, ", true").await, "verified []");
    // Options are nobody's business once the flow is there.
    let other_options = SHAPE.replace("\"timeout\": 30", "\"timeout\": 31");
    assert_eq!(compile(&core, "f", &other_options, "").await, "verified []");
    assert_eq!(
        core.show("select created_at from pgflow.flows").await,
        before
    );
    assert_eq!(core.show(flow).await, "f 2 1 30");

    // Without options: the defaults.
    assert_eq!(
        compile(
            &core,
            "g",
            "{\"steps\": [{\"slug\": \"a\", \"stepType\": \"single\", \"dependencies\": []}]}",
            ""
        )
        .await,
        "compiled []"
    );
    let defaults = "select f.opt_max_attempts, f.opt_base_delay, f.opt_timeout, s.opt_timeout, s.when_unmet, s.when_exhausted
                    from pgflow.flows as f join pgflow.steps as s using (flow_slug) where f.flow_slug = 'g'";
    assert_eq!(core.show(defaults).await, "3 5 60 ∅ skip fail");
}

#[tokio::test]
async fn a_flows_shape_is_what_it_was_made_of_but_for_options() {
    let core = at_0_14().await;
    compile(&core, "f", SHAPE, "").await;
    let same = format!(
        "select pgflow._get_flow_shape(p_flow_slug => 'f') = jsonb_build_object('steps',
            (select jsonb_agg(step - 'options' order by place) from jsonb_array_elements(($${SHAPE}$$)::jsonb -> 'steps') with ordinality as s(step, place)))"
    );
    assert_eq!(core.show(&same).await, "t");
    assert_eq!(
        core.show("select pgflow._get_flow_shape('gone')").await,
        "{\"steps\": []}"
    );
    // Dependencies are sorted, whatever order they were given in.
    core.define("flow g\n b\n B\n a\n z < b, a, B").await;
    let sorted = "select pgflow._get_flow_shape('g') -> 'steps' -> 3 -> 'dependencies'";
    assert_eq!(core.show(sorted).await, "[\"B\", \"a\", \"b\"]");
    let volatility = "select string_agg(distinct provolatile::text, '') from pg_proc
                      where oid in ('pgflow._get_flow_shape'::regproc, 'pgflow._compare_flow_shapes'::regproc, 'pgflow.is_local'::regproc)";
    assert_eq!(core.show(volatility).await, "s");
}

#[tokio::test]
async fn what_differs_is_said_step_by_step() {
    let core = at_0_14().await;
    compile(&core, "f", SHAPE, "").await;
    let none = "\"requiredInputPattern\": {\"defined\": false}, \"forbiddenInputPattern\": {\"defined\": false}";
    let differ = async |steps: &str| {
        core.show(&format!(
            "select difference from unnest(pgflow._compare_flow_shapes(p_local => $${{\"steps\": [{steps}]}}$$, p_db => pgflow._get_flow_shape('f')))
             as difference"
        ))
        .await
    };
    assert_eq!(
        differ("").await,
        lines(
            "Step count differs: 0 vs 3
             Step at index 0: missing in first shape (second has 'a')
             Step at index 1: missing in first shape (second has 'm')
             Step at index 2: missing in first shape (second has 'z')"
        )
    );
    let changed = format!(
        "{{\"slug\": \"a\", \"stepType\": \"map\", \"dependencies\": [], \"whenUnmet\": \"fail\", \"whenExhausted\": \"skip\", {none}}},
         {{\"slug\": \"n\", \"stepType\": \"map\", \"dependencies\": [\"a\"], \"whenUnmet\": \"fail\", \"whenExhausted\": \"skip\", {none}}},
         {{\"slug\": \"z\", \"stepType\": \"single\", \"dependencies\": [\"m\", \"b\"], \"whenUnmet\": \"skip-cascade\", \"whenExhausted\": \"skip-cascade\", {none}}},
         {{\"slug\": \"more\", \"stepType\": \"single\", \"dependencies\": [], \"whenUnmet\": \"skip\", \"whenExhausted\": \"fail\", {none}}}"
    );
    let told = lines(
        "Step count differs: 4 vs 3
         Step at index 0: type differs 'map' vs 'single'
         Step at index 0: whenUnmet differs 'fail' vs 'skip'
         Step at index 0: whenExhausted differs 'skip' vs 'fail'
         Step at index 0: requiredInputPattern differs '{\"defined\": false}' vs '{\"value\": {\"x\": 1}, \"defined\": true}'
         Step at index 1: slug differs 'n' vs 'm'
         Step at index 1: forbiddenInputPattern differs '{\"defined\": false}' vs '{\"value\": {\"a\": []}, \"defined\": true}'
         Step at index 2: dependencies differ [b, m] vs [a, m]
         Step at index 3: missing in second shape (first has 'more')",
    );
    assert_eq!(differ(&changed).await, told);

    let before = core.show("select count(*) from pgflow.steps").await;
    let mismatch = compile(&core, "f", &format!("{{\"steps\": [{changed}]}}"), "").await;
    let listed: Vec<String> =
        serde_json::from_str(mismatch.strip_prefix("mismatch ").unwrap()).unwrap();
    assert_eq!(listed.join("\n"), told);
    assert_eq!(core.show("select count(*) from pgflow.steps").await, before);
}

#[tokio::test]
async fn a_flow_is_made_anew_only_where_data_may_be_lost() {
    let core = at_0_14().await;
    core.define("flow f\n old\nflow F\n a\nflow other\n a")
        .await;
    for (n, flow) in [(1, "f"), (2, "other"), (3, "F")] {
        core.start_flow(flow, "{}", n).await;
    }
    assert!(
        compile(&core, "f", SHAPE, "")
            .await
            .starts_with("mismatch ")
    );
    assert!(
        compile(&core, "f", SHAPE, ", false")
            .await
            .starts_with("mismatch ")
    );
    assert!(
        compile(&core, "f", SHAPE, ", null")
            .await
            .starts_with("mismatch ")
    );
    assert_eq!(core.show("select count(*) from pgflow.runs").await, "3");

    let anew = compile(&core, "f", SHAPE, ", allow_data_loss => true").await;
    assert!(
        anew.starts_with("recompiled [\"Step count differs: 3 vs 1\""),
        "{anew}"
    );
    assert_eq!(compile(&core, "f", SHAPE, "").await, "verified []");
    let left = "select string_agg(run_id::text, ' ' order by run_id) from pgflow.runs";
    assert_eq!(core.show(left).await, format!("{} {}", run(2), run(3)));
    // The queue of F is that of f.
    assert_eq!(core.queue("f").await, "a 0");
    assert_eq!(core.queue("other").await, "a 0");

    // On somebody's own machine data may always be lost.
    core.run(
        "set app.settings.jwt_secret = 'super-secret-jwt-token-with-at-least-32-characters-long'",
    )
    .await;
    assert!(
        compile(&core, "f", "{\"steps\": []}", "")
            .await
            .starts_with("recompiled ")
    );
}

#[tokio::test]
async fn only_supabases_own_secret_makes_a_database_local() {
    let core = at_0_14().await;
    assert_eq!(core.show("select pgflow.is_local()").await, "f");
    for (secret, local) in [
        ("", "f"),
        (
            "super-secret-jwt-token-with-at-least-32-characters-long",
            "t",
        ),
        (
            "Super-secret-jwt-token-with-at-least-32-characters-long",
            "f",
        ),
    ] {
        core.run(&format!("set app.settings.jwt_secret = '{secret}'"))
            .await;
        assert_eq!(
            core.show("select pgflow.is_local()").await,
            local,
            "{secret}"
        );
    }
}

#[tokio::test]
async fn deleting_a_flow_leaves_nothing_of_it_and_everything_of_others() {
    let core = at_0_14().await;
    core.define("flow f\n a\n b < a\n map m < b\nflow keep\n a")
        .await;
    for (n, flow) in [(1, "f"), (2, "f"), (3, "keep")] {
        core.start_flow(flow, "{}", n).await;
    }
    core.take("f").await;
    core.complete(1, "a", 0, "1").await;
    core.run("select pgflow.delete_flow_and_data(p_flow_slug => 'f')")
        .await;
    for table in ["flows", "steps", "step_states", "step_tasks", "runs"] {
        let flows = format!("select string_agg(distinct flow_slug, ' ') from pgflow.{table}");
        assert_eq!(core.show(&flows).await, "keep", "{table}");
    }
    assert_eq!(core.show("select count(*) from pgflow.deps").await, "0");
    let tables = "select string_agg(relname, ' ' order by relname) from pg_class where relnamespace = 'pgmq'::regnamespace and relname ~ '^[aq]_' and relkind = 'r'";
    assert_eq!(core.show(tables).await, "a_keep q_keep");
    core.run("select pgflow.delete_flow_and_data('f'); select pgflow.delete_flow_and_data('gone')")
        .await;
    // What was sent stays until its time is over, and the flow can come again.
    core.define("flow f\n a").await;
    core.start_flow("f", "{}", 4).await;
    assert_eq!(core.take("f").await, "a 0 {}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn workers_that_start_together_compile_a_flow_once() {
    let core = at_0_14().await;
    let mut workers = JoinSet::new();
    for _ in 0..12 {
        let client = core.db.connect().await;
        let sql = format!("select pgflow.ensure_flow_compiled('f', $${SHAPE}$$) ->> 'status'");
        workers.spawn(async move { try_show(&client, &sql).await });
    }
    let mut said: Vec<_> = workers
        .join_all()
        .await
        .into_iter()
        .map(|answer| answer.unwrap())
        .collect();
    said.sort();
    assert_eq!(said[0], "compiled");
    assert!(
        said[1..].iter().all(|status| status == "verified"),
        "{said:?}"
    );
    assert_eq!(core.show("select count(*) from pgflow.steps").await, "3");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flow_is_made_anew_under_workers_hands_without_a_deadlock() {
    let core = at_0_14().await;
    let shape = |slug: &str| {
        format!(
            "{{\"steps\": [{{\"slug\": \"{slug}\"}}, {{\"slug\": \"b\", \"dependencies\": [\"{slug}\"]}}]}}"
        )
    };
    compile(&core, "f", &shape("s0"), "").await;
    let mut workers = JoinSet::new();
    for _ in 0..6 {
        let client = core.db.connect().await;
        workers.spawn(async move {
            let mut unexpected = Vec::new();
            for _ in 0..60 {
                let work = format!(
                    "select pgflow.start_flow('f', '{{}}');
                     select pgflow.complete_task(run_id, step_slug, task_index, '1')
                     from pgflow.start_tasks('f', array(select msg_id from pgmq.read('f', 5, 5)), '{}')",
                    super::WORKER
                );
                if let Err(error) = try_show(&client, &work).await {
                    // Gone in between: the flow (foreign key), its queue.
                    let code = error.code().map(|code| code.code().to_owned()).unwrap_or_default();
                    if !["23503", "42P01", "XX000"].contains(&code.as_str()) {
                        unexpected.push(format!("{error:?}"));
                    }
                }
            }
            unexpected
        });
    }
    for n in 1..=8 {
        let answer = compile(&core, "f", &shape(&format!("s{n}")), ", true").await;
        assert!(answer.starts_with("recompiled "), "{answer}");
    }
    let unexpected = workers.join_all().await.concat();
    assert_eq!(unexpected, Vec::<String>::new());
    let strays = "select count(*) from pgflow.step_states as s where not exists (select from pgflow.steps as d
                  where d.flow_slug = s.flow_slug and d.step_slug = s.step_slug)";
    assert_eq!(core.show(strays).await, "0");
}
