//! Who may do what: nobody anything, a viewer start and read runs, a worker work flows; and definers' functions that no
//! search path misleads.

use tokio_postgres::Client;

use super::{Core, WORKER, lines, refused, run, show, try_show};
use crate::support::proxy::connect;

/// A role that can log in, with no right of its own, and a connection as that role. Roles are the cluster's: named by
/// the database.
async fn role(core: &Core, name: &str) -> (String, Client) {
    let role = format!("{name}_{}", core.db.name);
    core.run(&format!("create role {role} login")).await;
    let url = core
        .db
        .primary_url
        .replace("postgres://postgres@", &format!("postgres://{role}@"));
    let client = connect(&url).await;
    assert_eq!(show(&client, "select current_user").await, role);
    (role, client)
}

#[tokio::test]
async fn nobody_may_do_anything_at_first() {
    let core = Core::new().await;
    core.define("flow f\n a").await;
    let (_, nobody) = role(&core, "nobody").await;
    for sql in [
        "select pgflow.start_flow('f', '{}')",
        "select pgflow.start_flow_with_states('f', '{}')",
        "select pgflow.get_run_with_states(null)",
        "select pgflow.is_valid_slug('a')",
        "select * from pgflow.flows",
    ] {
        assert_eq!(
            refused(&nobody, sql).await,
            "42501 permission denied for schema pgflow"
        );
    }
    assert_eq!(
        refused(&nobody, "select * from flowgate.event").await,
        "42501 permission denied for schema flowgate"
    );
    assert_eq!(
        refused(
            &nobody,
            "select realtime.send('{}'::jsonb, 'e', 't', false)"
        )
        .await
        .split_once(' ')
        .unwrap()
        .0,
        "42501"
    );
    // Functions of pgflow keep EXECUTE for everybody, as in pgflow itself; ours that change things do not.
    let open = "select count(*) filter (where not has_function_privilege('public', p.oid, 'execute')) from pg_proc as p
                where p.pronamespace = 'pgflow'::regnamespace;
                select string_agg(p.proname, ' ') from pg_proc as p
                where p.pronamespace in ('flowgate'::regnamespace, 'realtime'::regnamespace)
                and has_function_privilege('public', p.oid, 'execute')";
    assert_eq!(core.show(open).await, "0\n∅");
}

const VIEWER_MAY: [&str; 4] = [
    "grant usage on schema pgflow to $",
    "grant execute on function pgflow.start_flow_with_states(text, jsonb, uuid) to $",
    "grant execute on function pgflow.get_run_with_states(uuid) to $",
    "grant select on pgflow.flows, pgflow.steps to $",
];

#[tokio::test]
async fn the_documented_minimum_starts_and_reads_runs_and_nothing_more() {
    let core = Core::new().await;
    core.define("flow f\n map m\n a").await;
    for by_hand in [true, false] {
        let (role, viewer) = role(&core, if by_hand { "viewer" } else { "granted" }).await;
        if by_hand {
            core.run(&VIEWER_MAY.join(";").replace('$', &role)).await;
        } else {
            core.run(&format!("select flowgate.grant_viewer('{role}')"))
                .await;
        }
        let id = run(u32::from(by_hand));
        let start = format!(
            "select pgflow.start_flow_with_states('f', '[1]', '{id}') #>> '{{run,status}}'"
        );
        assert_eq!(show(&viewer, &start).await, "started");
        let read =
            format!("select jsonb_array_length(pgflow.get_run_with_states('{id}') -> 'steps')");
        assert_eq!(show(&viewer, &read).await, "2");
        let flows = "select flow_slug from pgflow.flows; select step_slug from pgflow.steps order by step_index";
        assert_eq!(show(&viewer, flows).await, "f\nm\na");
        assert_eq!(
            refused(&viewer, "select pgflow.start_flow_with_states('f', '{}')").await,
            "P0001 Flow f has root map steps but input is not an array (got object)"
        );
        for (sql, denied) in [
            ("select * from pgflow.runs", "table runs"),
            ("select * from pgflow.step_states", "table step_states"),
            ("select * from pgflow.step_tasks", "table step_tasks"),
            ("select * from pgflow.workers", "table workers"),
            ("select * from pgflow.deps", "table deps"),
            (
                "insert into pgflow.flows (flow_slug) values ('mine')",
                "table flows",
            ),
            ("update pgflow.steps set step_index = 9", "table steps"),
            ("select * from pgmq.q_f", "schema pgmq"),
            ("select * from flowgate.event", "schema flowgate"),
        ] {
            assert_eq!(
                refused(&viewer, sql).await,
                format!("42501 permission denied for {denied}"),
                "{sql}"
            );
        }
        for call in [
            "create_flow('mine')".to_owned(),
            "add_step('f', 'mine')".to_owned(),
            "start_flow('f', '[1]')".to_owned(),
            format!("complete_task('{id}', 'a', 0, '1')"),
            format!("fail_task('{id}', 'a', 0, '1')"),
            format!("start_tasks('f', '{{1}}', '{WORKER}')"),
            "read_with_poll('f', 1, 1)".to_owned(),
        ] {
            let refused = refused(&viewer, &format!("select pgflow.{call}")).await;
            assert!(refused.starts_with("42501 "), "{call}: {refused}");
        }
    }
    assert_eq!(core.tasks(0).await, "a 0 queued 0\nm 0 queued 0");
}

#[tokio::test]
async fn a_granted_worker_works_flows_of_before_and_after() {
    let core = Core::new().await;
    let flow = "(base_delay => 0, max_attempts => 2)\n a\n map m < a\n map n\n last < m, n";
    core.define(&format!("flow before{flow}")).await;
    let (role, worker) = role(&core, "worker").await;
    core.run(&format!("select flowgate.grant_worker('{role}')"))
        .await;
    core.define(&format!("flow after{flow}")).await;
    let id = "bbbbbbbb-0000-4000-8000-000000000002";
    show(&worker, &format!(
        "insert into pgflow.workers (queue_name, worker_id, function_name) values ('before', '{id}', 'f') returning *;
         update pgflow.workers as w set last_heartbeat_at = clock_timestamp() where w.worker_id = '{id}'
         returning (w.deprecated_at is not null)"
    ))
    .await;
    for (n, flow) in [(1, "before"), (2, "after")] {
        let run_id = run(n);
        let poll = format!(
            "select string_agg(step_slug || task_index, ' ' order by step_slug, task_index) from pgflow.start_tasks('{flow}',
             array(select msg_id from pgflow.read_with_poll('{flow}', 9, 50, 1, 5)), '{id}')"
        );
        let start = format!("select status from pgflow.start_flow('{flow}', '[1]', '{run_id}')");
        assert_eq!(show(&worker, &start).await, "started");
        assert_eq!(show(&worker, &poll).await, "a0 n0");
        let done = |step: &str, index: u32, output: &str| {
            format!(
                "select status from pgflow.complete_task('{run_id}', '{step}', {index}, '{output}')"
            )
        };
        let failed = format!("select status from pgflow.fail_task('{run_id}', 'n', 0, 'once')");
        assert_eq!(show(&worker, &failed).await, "queued");
        assert_eq!(show(&worker, &done("a", 0, "[5, 6]")).await, "completed");
        assert_eq!(show(&worker, &poll).await, "m0 m1 n0");
        for (step, index) in [("m", 0), ("m", 1), ("n", 0)] {
            assert_eq!(show(&worker, &done(step, index, "1")).await, "completed");
        }
        assert_eq!(show(&worker, &poll).await, "last0");
        assert_eq!(show(&worker, &done("last", 0, "1")).await, "completed");
        let end = format!("select pgflow.get_run_with_states('{run_id}') #>> '{{run,status}}'");
        assert_eq!(show(&worker, &end).await, "completed");
        assert_eq!(core.events(n).await.split(' ').count(), 2 + 2 * 4);

        // Failures of both kinds, an empty map, visibility, definitions.
        let violated = run(n + 10);
        show(&worker, &format!(
            "select pgflow.start_flow('{flow}', '[]', '{violated}'); {poll};
             select pgflow.set_vt_batch('{flow}', array(select msg_id from pgmq.q_{flow}), array(select 1 from pgmq.q_{flow}));
             select pgflow.complete_task('{violated}', 'a', 0, '7')"
        ))
        .await;
        let said = "run:started step:n:completed step:a:started run:failed step:a:failed";
        assert_eq!(core.events(n + 10).await, said);
        let broken = run(n + 20);
        show(&worker, &format!(
            "select pgflow.start_flow_with_states('{flow}', '[]', '{broken}'); {poll}; select pgflow.fail_task('{broken}', 'a', 0, 'x');
             {poll}; select pgflow.fail_task('{broken}', 'a', 0, 'y')"
        ))
        .await;
        assert_eq!(core.tasks(n + 20).await, "a 0 failed 2");
        let step = format!("select step_index from pgflow.add_step('{flow}', 'more', '{{last}}')");
        assert_eq!(show(&worker, &step).await, "4");
    }
    // Not: making queues, and looking into the outbox.
    assert!(
        refused(&worker, "select pgflow.create_flow('mine')")
            .await
            .starts_with("42501 ")
    );
    assert_eq!(
        show(
            &core.client,
            "select count(*) from pgflow.flows where flow_slug = 'mine'"
        )
        .await,
        "0"
    );
    assert_eq!(
        refused(&worker, "select * from flowgate.event").await,
        "42501 permission denied for table event"
    );
}

#[tokio::test]
async fn no_function_looks_up_a_name_on_its_callers_search_path() {
    let core = Core::new().await;
    let settings = "select p.oid::regprocedure from pg_proc as p
                    where p.pronamespace in ('pgflow'::regnamespace, 'flowgate'::regnamespace)
                    and (p.proconfig is null or not 'search_path=\"\"' = any (p.proconfig))";
    assert_eq!(core.show(settings).await, "");
    let definers = "select p.oid::regprocedure::text from pg_proc as p where p.prosecdef and
                    p.pronamespace in ('pgflow'::regnamespace, 'flowgate'::regnamespace, 'realtime'::regnamespace) order by 1";
    let expected = lines(
        "flowgate.copy_message()
         flowgate.drop_partitions(interval)
         flowgate.ensure_partitions(integer)
         flowgate.forget_topics(interval,integer)
         flowgate.notify_directly()
         flowgate.prune(interval,integer)
         flowgate.publish(text,text[],jsonb[])
         flowgate.publish_task_events()
         flowgate.requeue_stalled_tasks(integer)
         flowgate.set_direct_notify(boolean)
         flowgate.stalled_tasks()
         pgflow.get_run_with_states(uuid)
         pgflow.start_flow_with_states(text,jsonb,uuid)
         realtime.send(jsonb,text,text,boolean)",
    );
    assert_eq!(core.show(definers).await, expected);

    // Seen from outside: what a caller puts before Postgres' own is never met.
    core.define("flow f\n a").await;
    let (role, viewer) = role(&core, "misleader").await;
    core.run(&VIEWER_MAY.join(";").replace('$', &role)).await;
    core.run(&format!("create schema evil authorization {role}"))
        .await;
    let trap = "language plpgsql as $$ begin raise exception 'caught'; end $$";
    for function in [
        "now() returns timestamptz",
        "clock_timestamp() returns timestamptz",
        "gen_random_uuid() returns uuid",
        "to_jsonb(anyelement) returns jsonb",
        "lower(text) returns text",
        "equal(uuid, uuid) returns boolean",
        "same(text, text) returns boolean",
        "joined(text, text) returns text",
    ] {
        show(&viewer, &format!("create function evil.{function} {trap}")).await;
    }
    show(
        &viewer,
        "create operator evil.= (leftarg = uuid, rightarg = uuid, function = evil.equal);
         create operator evil.= (leftarg = text, rightarg = text, function = evil.same);
         create operator evil.|| (leftarg = text, rightarg = text, function = evil.joined);
         create table evil.runs (run_id uuid); create table evil.step_states (run_id uuid);
         set search_path = evil, pg_catalog",
    )
    .await;
    assert_eq!(
        try_show(&viewer, "select now()")
            .await
            .unwrap_err()
            .as_db_error()
            .unwrap()
            .message(),
        "caught",
        "the trap works"
    );
    let id = run(1);
    let start =
        format!("select pgflow.start_flow_with_states('f', '{{}}', '{id}') #>> '{{run,status}}'");
    assert_eq!(show(&viewer, &start).await, "started");
    let read = format!("select pgflow.get_run_with_states('{id}') #>> '{{run,status}}'");
    assert_eq!(show(&viewer, &read).await, "started");
}
