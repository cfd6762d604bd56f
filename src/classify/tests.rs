//! The corpus: spellings and what they are. `check` shows the class, `effects` what a session must follow.

use super::*;

const ID: &str = "67e55044-10b1-426f-9247-bb680e5fe0c8";

fn classify(text: &[u8], reads: Reads) -> String {
    let analysis = Classifier::new(reads, 1 << 20, 1).analyse(text);
    match &analysis.class {
        StatementClass::Poll(poll) => format!("Poll {:?} {:?}", poll.queue, poll.max_poll_seconds),
        StatementClass::Define => format!("Define {:?}", analysis.flow),
        class => format!("{class:?}").replace(ID, "ID"),
    }
}

#[track_caller]
fn check(text: &str, expected: &str) {
    assert_eq!(classify(text.as_bytes(), Reads::Pgflow), expected, "{text}");
}

/// Neither setting may call it a read.
#[track_caller]
fn never_a_read(text: &str) {
    for reads in [Reads::Pgflow, Reads::All] {
        let got = classify(text.as_bytes(), reads);
        assert!(
            !got.starts_with("Read"),
            "{got} with reads = {reads:?}: {text}"
        );
    }
}

#[test]
fn a_call_of_get_run_with_states_is_a_read_of_its_run() {
    for text in [
        "select pgflow.get_run_with_states($1)",
        "SELECT PGFLOW.GET_RUN_WITH_STATES($1)",
        "select \"pgflow\".\"get_run_with_states\"($1);",
        "select pgflow . get_run_with_states ( $1 )",
        "select pgflow/**/./* ; */get_run_with_states($1) -- ok",
        "/* hi */ select pgflow.get_run_with_states(run_id => $1::uuid)",
        "select pgflow.get_run_with_states(run_id := ($1)::text::uuid) as r",
        "select * from pgflow.get_run_with_states($1)",
        "select * from pgflow.get_run_with_states(cast($1 as uuid)) as t",
        "select r->'run'->>'status' from pgflow.get_run_with_states($1) r",
        "(select pgflow.get_run_with_states($1))",
        "select jsonb_pretty(pgflow.get_run_with_states($1))",
        "with r as (select pgflow.get_run_with_states($1) as doc) select r.doc from r",
    ] {
        check(text, "Read(Param(1))");
    }
    check(
        &format!("select pgflow.get_run_with_states('{ID}')"),
        "Read(Literal(ID))",
    );
    check(
        &format!("select pgflow.get_run_with_states('{ID}'::uuid)"),
        "Read(Literal(ID))",
    );
    check(
        &format!("select pgflow.get_run_with_states(uuid '{ID}')"),
        "Read(Literal(ID))",
    );
    check(
        &format!("select pgflow.get_run_with_states($q${ID}$q$)"),
        "Read(Literal(ID))",
    );
    check("select pgflow.get_run_with_states('x')", "Read(All)");
    check(
        "select pgflow.get_run_with_states($1), pgflow.get_run_with_states($2)",
        "Read(All)",
    );
    check(
        "select pgflow.get_run_with_states(run_id) from pgflow.runs",
        "Read(All)",
    );
}

#[test]
fn a_comment_may_ask_for_the_primary_or_for_a_replica() {
    let read = "select pgflow.get_run_with_states($1)";
    check(&format!("/* flowgate: primary */ {read}"), "Other");
    check(&format!("{read} /*flowgate:primary*/ ;"), "Other");
    check(&format!("{read} -- flowgate: primary"), "Read(Param(1))");
    check(
        &format!("/* flowgate: whatever */ {read}"),
        "Read(Param(1))",
    );
    check(&format!("/* flowgate: replica */ {read}"), "Read(Param(1))");
    check("/* flowgate: replica */ select * from notes", "Read(All)");
    check("select * from notes /* flowgate: replica */", "Read(All)");
    check("select * from notes", "Other");
    for write in [
        "delete from notes",
        "select * from notes for update",
        "select liar()",
        "select 1; select 2",
        "select pgflow.start_flow('a', '{}')",
    ] {
        never_a_read(&format!("/* flowgate: replica */ {write}"));
        never_a_read(&format!("{write} /* flowgate: replica */"));
    }
}

#[test]
fn what_is_to_be_explained_is_found() {
    let explains = |text: &str| {
        let analysis = Classifier::new(Reads::Pgflow, 1 << 20, 1).analyse(text.as_bytes());
        assert_eq!(analysis.class, StatementClass::Other);
        analysis.explains.map(|at| text[at..].to_owned())
    };
    let asked = explains("EXPLAIN ( Flowgate ) /* c */ select 1 from t");
    assert_eq!(asked.as_deref(), Some(" /* c */ select 1 from t"));
    for other in [
        "explain select 1",
        "explain (analyze) select 'flowgate'",
        "explain (flowgate)",
        "explain (flowgate) select 1; select 2",
        "explain (flowgate, analyze) select 1",
    ] {
        assert_eq!(explains(other), None, "{other}");
    }
}

#[test]
fn plain_selects_on_pgflow_tables_are_reads() {
    check(
        "SELECT input FROM pgflow.runs WHERE run_id = $1",
        "Read(Param(1))",
    );
    check(
        "select * from pgflow.runs r where r.run_id = $2::uuid and status = 'started'",
        "Read(Param(2))",
    );
    check(
        &format!("select * from pgflow.step_states where '{ID}' = run_id order by step_slug"),
        "Read(Literal(ID))",
    );
    check("select * from pgflow.runs", "Read(All)");
    check(
        "select * from pgflow.runs where run_id = $1 or status = 'failed'",
        "Read(All)",
    );
    check(
        "select * from pgflow.runs where not (run_id = $1)",
        "Read(All)",
    );
    check("select * from pgflow.runs where run_id <> $1", "Read(All)");
    check(
        "select * from pgflow.flows where flow_slug = $1",
        "Read(None)",
    );
    check("table pgflow.flows", "Read(None)");
    check("table pgflow.runs", "Read(All)");
    check(
        "select s.*, r.status from pgflow.runs r join pgflow.step_states s on s.run_id = r.run_id where r.run_id = $1",
        "Read(Param(1))",
    );
    check(
        "select * from pgflow.runs r join pgflow.step_states s using (run_id) where run_id = $1",
        "Read(Param(1))",
    );
    check(
        "select * from pgflow.runs r left join pgflow.step_states s on s.flow_slug = r.flow_slug where r.run_id = $1",
        "Read(All)",
    );
    check(
        "select * from pgflow.runs r left join pgflow.step_states s on s.run_id = $1",
        "Read(All)",
    );
    check(
        "select (select count(*) from pgflow.step_tasks) from pgflow.runs where run_id = $1",
        "Read(All)",
    );
    check(
        "select count(*) filter (where status = 'failed'), max(started_at) from pgflow.runs group by flow_slug having count(*) > 1 limit 5",
        "Read(All)",
    );
    check(
        "select date_trunc('hour', r.started_at)::timestamptz, extract(epoch from now() - r.started_at) from pgflow.runs as r",
        "Read(All)",
    );
    check(
        "select row_number() over (partition by flow_slug order by started_at desc) from pgflow.runs",
        "Read(All)",
    );
    check(
        "select d.n from (select count(*) as n from pgflow.steps) d",
        "Read(None)",
    );
    check(
        "with f as (select flow_slug from pgflow.flows) select f.flow_slug from f order by f.flow_slug",
        "Read(None)",
    );
    check(
        "select e.key, e.value from pgflow.runs r, lateral jsonb_each(r.output) as e where r.run_id = $1",
        "Read(Param(1))",
    );
    check(
        "select t.status from pgflow.runs t union all select s.status from pgflow.step_states s",
        "Read(All)",
    );
    check(
        "select case when status in ('failed','completed') then 1 else 0 end from pgflow.runs where run_id = any($1)",
        "Read(All)",
    );
    check(
        "select exists (select 1 from pgflow.runs where run_id = $1)",
        "Read(All)",
    );
    check("select * from pgmq.metrics('greet')", "Read(All)");
    check("select * from pgmq.metrics_all()", "Read(All)");
    check("select queue_name from pgmq.list_queues()", "Read(All)");
    check("select pgflow._get_flow_shape('a')", "Read(None)");
    check(
        "select * from pgflow.runs where error = 'select pgflow.start_flow(1)'",
        "Read(All)",
    );
}

#[test]
fn a_read_is_of_one_run_only_if_nothing_else_can_show_in_its_answer() {
    let joined = |on: &str| format!("select * from pgflow.runs a {on} where a.run_id = $1");
    for (joins, expected) in [
        (
            "join pgflow.step_states b on b.run_id = a.run_id",
            "Read(Param(1))",
        ),
        (
            "left join pgflow.step_states b on a.run_id = b.run_id and b.status = 'x'",
            "Read(Param(1))",
        ),
        (
            "full join pgflow.step_states b on a.run_id = b.run_id",
            "Read(Param(1))",
        ),
        (
            "join pgflow.step_states b on a.run_id = b.run_id or true",
            "Read(All)",
        ),
        (
            "join pgflow.step_states b on a.run_id >= b.run_id",
            "Read(All)",
        ),
        // c without a partner leaves rows of b that belong to any run.
        (
            "left join pgflow.step_states b on a.status = b.status \
             left join pgflow.step_tasks c on c.run_id = b.run_id and c.run_id = a.run_id",
            "Read(All)",
        ),
        (
            "left join pgflow.step_states b on a.run_id = b.run_id left join pgflow.step_tasks c on c.run_id = b.run_id",
            "Read(Param(1))",
        ),
        ("cross join pgflow.step_states b", "Read(All)"),
        ("cross join pgflow.flows b", "Read(Param(1))"),
    ] {
        check(&joined(joins), expected);
    }
    check(
        "select * from pgflow.runs a, pgflow.step_states b where a.run_id = b.run_id and b.run_id = $1",
        "Read(Param(1))",
    );
    check(
        "select * from pgflow.runs a, pgflow.step_states b where a.run_id = $1 and b.run_id = $2",
        "Read(All)",
    );
    check(
        "select * from pgflow.runs a, pgflow.step_states b where a.run_id = $1",
        "Read(All)",
    );
    check(
        "select pgflow.get_run_with_states($1) from pgflow.runs where run_id = $1",
        "Read(Param(1))",
    );
    check(
        "select pgflow.get_run_with_states($2) from pgflow.runs where run_id = $1",
        "Read(All)",
    );
}

#[test]
fn writes_in_disguise_are_never_reads() {
    for text in [
        "select pgflow.start_flow('a','{}')",
        "select (pgflow.start_flow('a','{}')).*",
        "select (pgflow.start_flow('a','{}')).run_id",
        "select r.* from pgflow.runs r, lateral pgflow.start_flow('a','{}') s",
        "select * from pgflow/**/.start_flow('a','{}')",
        "select * from \"pgflow\".\"start_flow\"('a','{}')",
        "select * from pgflow.runs where run_id = (select run_id from pgflow.start_flow('a','{}'))",
        "select * from pgflow.runs order by pgflow.start_flow('a','{}')",
        "select * from pgflow.runs limit (select count(*) from pgflow.start_flow('a','{}'))",
        "values (pgflow.start_flow('a','{}'))",
        "with x as (select pgflow.start_flow('a','{}')) select 1 from pgflow.runs",
        "with x as (insert into pgflow.workers values (1) returning *) select * from x",
        "with x as (update pgflow.runs set status='x' returning *) select * from x",
        "with x as (delete from pgflow.runs returning *) select * from x",
        "with x as (select * from pgflow.runs) delete from pgflow.runs",
        "with x as (select * from pgflow.runs) insert into t select * from x",
        "select * into t from pgflow.runs",
        "select * into temp t from pgflow.runs",
        "create table t as select * from pgflow.runs",
        "select * from pgflow.runs for update",
        "select * from pgflow.runs for no key update skip locked",
        "select * from pgflow.runs for share of runs",
        "select * from (select * from pgflow.runs for key share) x",
        "select nextval('s') from pgflow.runs",
        "select pg_catalog.nextval('s') from pgflow.runs",
        "select setval('s', 1) from pgflow.runs",
        "select set_config('a.b','c',true) from pgflow.runs",
        "select pg_notify('a','b') from pgflow.runs",
        "select pg_advisory_xact_lock(1) from pgflow.runs",
        "select pg_sleep(1) from pgflow.runs",
        "select txid_current() from pgflow.runs",
        "select lo_create(0) from pgflow.runs",
        "select dblink_exec('x','y') from pgflow.runs",
        "select public.lower(status) from pgflow.runs",
        "select my_function(status) from pgflow.runs",
        "select \"Lower\"(status) from pgflow.runs",
        "select * from pgflow.my_function()",
        "select r.my_function from pgflow.runs r",
        "select (r).my_function from pgflow.runs r",
        "select runs.my_function from pgflow.runs",
        "select pgflow.runs.my_function from pgflow.runs",
        "select r.my_function, 1 as my_function from pgflow.runs r",
        "select d.my_function from (select 1 as n from pgflow.runs) d",
        "select status::my_type from pgflow.runs",
        "select cast(status as my_schema.my_type) from pgflow.runs",
        "select my_type 'x' from pgflow.runs",
        "select my_schema.my_type 'x' from pgflow.runs",
        "select \"my_type\" 'x' from pgflow.runs",
        "select status operator(public.+) 1 from pgflow.runs",
        "select status ~@~ 1 from pgflow.runs",
        "select * from pgflow.runs tablesample my_method(1)",
        "select * from xmltable('/a' passing '<a/>' columns b int), pgflow.runs",
        "select * from rows from (pgflow.start_flow('a','{}')) x",
        "select concat(variadic array[pgflow.start_flow('a','{}')::text])",
        "select * from pgflow.my_view",
        "select * from my_view, pgflow.start_flow('a','{}')",
        "explain analyze select pgflow.start_flow('a','{}')",
        "explain select * from pgflow.runs",
        "do $$ begin perform pgflow.start_flow('a','{}'); end $$",
        "call pgflow.start_flow('a','{}')",
        "copy (select * from pgflow.runs) to stdout",
        "prepare p as select * from pgflow.runs",
        "execute pgflow_read",
        "declare c cursor for select * from pgflow.runs",
        "select * from pgflow.runs; delete from pgflow.runs",
        "begin; select * from pgflow.runs; commit",
        "insert into pgflow.workers select * from pgflow.workers",
        "update pgflow.workers set deprecated_at = now()",
        "merge into pgflow.runs using pgflow.flows on true when matched then delete",
        "truncate pgflow.runs",
        "lock table pgflow.runs",
        "refresh materialized view pgflow.runs",
        "show pgflow.x",
        "select U&\"\\0070gflow\".start_flow('a','{}')",
        "select * from U&\"\\0070gflow\".runs",
        "select * from pgflow.runs where status = E'a\\'; select 1'",
        // With standard_conforming_strings off, this calls start_flow.
        "select * from pgflow.runs where status = '\\' || pgflow.start_flow(1) --'",
        "select * from pgflow.runs where status = 'open",
        "select * from pgflow.runs where status = $q$open",
        "select * from pgflow.runs /* open",
        "select * from pgflow.runs)",
        "select * from (pgflow.runs",
        "select 0x1 from pgflow.runs",
        "select * from \"PGFLOW\".runs, my_schema.f()",
    ] {
        never_a_read(text);
    }
}

#[test]
fn what_a_users_own_schema_may_hold_is_no_read_by_default() {
    for text in [
        "select * from runs",
        "select * from my_view",
        "select * from public.runs, pgflow.runs",
        "select get_run_with_states($1)",
        "with x as (select 1 from pgflow.flows) select * from y",
        // A name is in sight only where Postgres sees it.
        "select * from (with x as (select 1) select 1 from pgflow.flows) d, x",
        "with x as (select * from x) select * from x, pgflow.flows",
        "select * from \"pgflow.runs\"",
        "select * from \"PgFlow\".runs",
        "select * from pgflow.\"Runs\"",
        "select * from db.pgflow.runs",
        "select * from pgmq.q_greet",
        "select 'pgflow'",
        "select now() as pgflow",
    ] {
        check(text, "Other");
    }
}

#[test]
fn every_provable_select_is_a_read_where_the_operator_asked_for_it() {
    for (text, expected) in [
        ("select 1", "Read(None)"),
        ("select * from users where id = $1", "Read(All)"),
        (
            "select u.name, count(*) from public.users u join orders o on o.user_id = u.id group by 1",
            "Read(All)",
        ),
        ("select * from pg_catalog.pg_class", "Read(None)"),
        ("select * from pg_stat_activity", "Other"),
        ("select * from pg_catalog.pg_locks", "Other"),
        ("select * from pg_temp.t", "Other"),
        ("select pg_backend_pid()", "Other"),
        ("select my_function()", "Other"),
        ("select current_setting('x')", "Other"),
        ("select now(), current_timestamp", "Read(None)"),
    ] {
        assert_eq!(classify(text.as_bytes(), Reads::All), expected, "{text}");
    }
}

#[test]
fn polls_are_recognised_in_any_spelling() {
    check(
        "SELECT * FROM pgmq.read_with_poll(queue_name => $1, vt => $2, qty => $3, max_poll_seconds => $4, poll_interval_ms => $5)",
        "Poll Param(1) Param(4)",
    );
    check(
        "select * from pgflow.read_with_poll('greet', 2, 10)",
        "Poll Literal(\"greet\") Absent",
    );
    check(
        "select msg_id, message from pgmq.read_with_poll('g'::text, 2, 10, 5, 100) as m;",
        "Poll Literal(\"g\") Literal(\"5\")",
    );
    check(
        "select * from pgmq.read_with_poll(qty := 1, vt := 2, queue_name := $9)",
        "Poll Param(9) Absent",
    );
    // What can't be probed for someone else runs as it is.
    check(
        "select * from pgmq.read_with_poll('g', 2, 10, 5, 100, '{\"a\":1}')",
        "Other",
    );
    check(
        "select * from pgmq.read_with_poll('g', 2, 10) where msg_id > 5",
        "Other",
    );
    check(
        "select * from pgmq.read_with_poll(my_queue(), 2, 10)",
        "Other",
    );
    check("select * from pgmq.read_with_poll(nonsense => 1)", "Other");
    check(
        "select count(*) from pgmq.read_with_poll('g', 2, 10)",
        "Other",
    );
    check(
        "select * from pgmq.read_with_poll('g', 2, 10), pgflow.runs",
        "Other",
    );
}

#[test]
fn progress_starts_and_definitions_name_what_they_touch() {
    let complete = "SELECT pgflow.complete_task(run_id => $1::uuid, step_slug => $2::text, task_index => $3::int, output => $4::jsonb)";
    check(complete, "Progress(Param(1))");
    check(
        &format!("select pgflow.fail_task('{ID}', 's', 0, 'it''s; over')"),
        "Progress(Literal(ID))",
    );
    check(
        "SELECT * FROM pgflow.start_tasks(flow_slug => $1, msg_ids => $2::bigint[], worker_id => $3::uuid)",
        "Progress(All)",
    );
    check("select pgmq.archive('g', 5)", "Progress(All)");
    check(
        "select * from pgflow.start_flow('a', '{}'::jsonb)",
        "Start(All)",
    );
    check(
        "select * from pgflow.start_flow(flow_slug => $1::text, input => $2::jsonb, run_id => $3::uuid)",
        "Start(Param(3))",
    );
    check(
        &format!("select pgflow.start_flow_with_states('a', '{{}}', '{ID}')"),
        "Start(Literal(ID))",
    );
    check("select pgflow.start_flow('a','{}',null)", "Start(All)");
    check("select pgflow.create_flow('a')", "Define Literal(\"a\")");
    check(
        "select pgflow.add_step($1, 'b', array['c'])",
        "Define Absent",
    );
    check(
        "select pgflow.ensure_flow_compiled($1, $2::jsonb)",
        "Define Param(1)",
    );
    // More than the call alone: any run may be written.
    check(
        "select pgflow.complete_task($1,'s',0,my_function())",
        "Progress(All)",
    );
    check(
        "select pgflow.complete_task($1,'s',0,'1'), pgflow.complete_task($2,'s',0,'1')",
        "Progress(All)",
    );
    check(
        "select my_function(t) from pgflow.complete_task($1,'s',0,'1') t",
        "Progress(All)",
    );
    check(
        "with x as (insert into t values (1)) select pgflow.complete_task($1,'s',0,'1')",
        "Other",
    );
    check("select pgmq.send('g', '{}')", "Other");
    check("select start_flow('a','{}')", "Other");
    let text = format!("{complete}; {complete}");
    check(&text, "Other");
}

#[track_caller]
fn effects(text: &str, expected: &str) {
    let analysis = Classifier::new(Reads::Pgflow, 1 << 20, 1).analyse(text.as_bytes());
    let shown: Vec<_> = analysis
        .effects
        .iter()
        .map(|effect| match effect {
            Effect::Set { name, sql } => format!("{name} by {sql}"),
            Effect::Opaque(_) => "Opaque".to_owned(),
            effect => format!("{effect:?}").replace('"', ""),
        })
        .collect();
    assert_eq!(
        format!("{} {}", analysis.statements, shown.join(" | ")).trim_end(),
        expected,
        "{text}"
    );
}

#[test]
fn settings_are_followed_in_all_their_spellings() {
    effects(
        "set Work_Mem = '1MB'",
        "1 work_mem by SET Work_Mem TO '1MB'",
    );
    effects(
        "SET SESSION search_path TO a , \"B\", public;",
        "1 search_path by SET search_path TO a , \"B\" , public",
    );
    effects("set local x = 1", "1 SetLocal");
    effects("set x to default", "1 Reset(x)");
    effects("set x = DEFAULT -- c", "1 Reset(x)");
    effects("set \"My.Var\" = 'x'", "1 my.var by SET \"My.Var\" TO 'x'");
    effects(
        "set app.User_id to - 5",
        "1 app.user_id by SET app.User_id TO - 5",
    );
    effects(
        "set app.a/*c*/ = 'it''s;'",
        "1 app.a by SET app.a TO 'it''s;'",
    );
    effects("set time zone 'UTC'", "1 timezone by SET time zone 'UTC'");
    effects(
        "set session time zone interval '-08:00' hour to minute",
        "1 timezone by SET time zone interval '-08:00' hour to minute",
    );
    effects("set time zone local", "1 Reset(timezone)");
    effects("set time zone default", "1 Reset(timezone)");
    effects(
        "set names 'latin1'",
        "1 client_encoding by SET names 'latin1'",
    );
    effects("set names", "1 Reset(client_encoding)");
    effects("set role none", "1 role by SET role none");
    effects("set role to 'x'", "1 role by SET role TO 'x'");
    effects("set session role \"A b\"", "1 role by SET role \"A b\"");
    effects(
        "set session authorization 'joe'",
        "1 session_authorization by SET SESSION AUTHORIZATION 'joe'",
    );
    effects(
        "set session session authorization joe",
        "1 session_authorization by SET SESSION AUTHORIZATION joe",
    );
    effects(
        "set session authorization default",
        "1 Reset(session_authorization)",
    );
    effects("set schema 'x'", "1 search_path by SET search_path TO 'x'");
    effects(
        "set xml option document",
        "1 xmloption by SET xml option document",
    );
    effects("set transaction isolation level serializable", "1 SetLocal");
    effects("set constraints all deferred", "1 SetLocal");
    effects(
        "set session characteristics as transaction isolation level repeatable read, read only, not deferrable",
        "1 default_transaction_isolation by SET default_transaction_isolation TO 'repeatable read' | \
         default_transaction_read_only by SET default_transaction_read_only TO on | \
         default_transaction_deferrable by SET default_transaction_deferrable TO off",
    );
    effects(
        "set session characteristics as transaction nonsense",
        "1 Unfollowed",
    );
    effects(
        "set standard_conforming_strings to off",
        "1 standard_conforming_strings by SET standard_conforming_strings TO off",
    );
    effects("set x from current", "1 Unfollowed");
    effects("set U&\"x\" = 1", "1 Unfollowed");
    effects(
        "set search_path = pg_temp, public",
        "1 search_path by SET search_path TO pg_temp , public | TempObject",
    );
    effects(
        "set search_path = public, pg_temp",
        "1 search_path by SET search_path TO public , pg_temp",
    );
    effects("reset all", "1 ResetAll");
    effects("reset Work_mem", "1 Reset(work_mem)");
    effects("reset time zone", "1 Reset(timezone)");
    effects(
        "reset session authorization",
        "1 Reset(session_authorization)",
    );
    effects("reset role", "1 Reset(role)");
    effects("reset app.x", "1 Reset(app.x)");
    effects("set", "1 Unfollowed");
    effects("reset", "1 Unfollowed");
}

#[test]
fn what_ties_a_session_to_its_server_is_seen() {
    effects("listen \"pgflow:run:x\"", "1 Listen(pgflow:run:x)");
    effects("unlisten *; listen A;;", "2 UnlistenAll | Listen(a)");
    effects("listen U&\"x\"", "1 Unfollowed");
    effects("listen U&\"x\" uescape '!'", "1 Unfollowed");
    for not_listened in [
        "listen select",
        "unlisten a.b",
        "listen a b",
        "listen",
        "listen Full",
    ] {
        effects(not_listened, "1");
    }
    effects("unlisten \"select\"", "1 Unlisten(select)");
    effects("notify a, 'b'", "1 Notify");
    effects("select pg_catalog.pg_notify($1, $2)", "1 Notify");
    effects("select 'pg_notify', pg_notify from t", "1");
    effects("discard all", "1 DiscardAll");
    effects("discard temp", "1 DiscardOther");
    effects("prepare Q (int) as select $1", "1 Prepare(q)");
    effects("prepare transaction 'x'", "1 Transaction");
    effects("execute \"Q\"(1)", "1 Execute(Q) | Opaque");
    effects("deallocate q", "1 Deallocate(q)");
    effects("deallocate prepare q", "1 Deallocate(q)");
    effects("deallocate prepare all", "1 DeallocateAll");
    effects("deallocate prepare", "1 Deallocate(prepare)");
    effects(
        "declare c no scroll cursor with hold for select 1",
        "1 DeclareHold",
    );
    effects("declare c cursor without hold for select 1", "1");
    effects("declare c cursor for with hold as (select 1) select 1", "1");
    effects("create temp table t (a int)", "1 TempObject");
    effects("CREATE LOCAL TEMPORARY TABLE t (a int)", "1 TempObject");
    effects("create or replace temp view v as select 1", "1 TempObject");
    effects("create temp table t on commit drop as select 1", "1");
    effects("create table pg_temp.t (a int)", "1 TempObject");
    effects("select 1 into temporary t", "1 TempObject");
    effects("select temp from weather", "1");
    effects("select attempts, 'create temp table' from template", "1");
    effects("select pg_advisory_lock(1)", "1 AdvisorySession");
    effects(
        "select pg_catalog.\"pg_try_advisory_lock_shared\" (1, 2)",
        "1 AdvisorySession",
    );
    effects(
        "select pg_advisory_xact_lock(1), pg_advisory_unlock(2)",
        "1",
    );
    effects("select pg_advisory_unlock_all()", "1 AdvisoryUnlockAll");
    effects("select set_config('a', 'b', true)", "1 SetLocal");
    effects(
        "select set_config('a', concat('x', 'y'), is_local => true)",
        "1 SetLocal",
    );
    effects("select set_config('a', 'b', false)", "1 SetConfig");
    effects("select set_config('a', 'b', $1)", "1 SetConfig");
    effects("select set_config('a', 'b', true and false)", "1 SetConfig");
    effects(
        "select set_config(is_local => true, setting_name => 'a', new_value => 'b')",
        "1 SetConfig",
    );
    effects("load 'x'", "1 Load");
    effects("create database x", "1 NeedsDatabaseAlone(template1)");
    effects(
        "create database x with template = y",
        "1 NeedsDatabaseAlone(y)",
    );
    effects("copy t from stdin", "1 Copy");
    effects(
        "begin; set x = 1; commit",
        "3 Transaction | x by SET x TO 1 | Transaction",
    );
    effects("start transaction", "1 Transaction");
    effects(
        "do $$ begin perform set_config('a','b',false); end $$",
        "1 Unfollowed",
    );
    effects("do $$ begin set x = 1; end $$", "1 Unfollowed");
    effects("do 'begin create temp table t(); end'", "1 Unfollowed");
    effects(
        "do $$ begin update t set x = 1; set local y = 2; end $$",
        "1 Opaque",
    );
}

#[test]
fn code_that_is_not_in_the_text_is_noticed() {
    for text in [
        "select mine()",
        "select mine (1)",
        "select a.b (1)",
        "select \"mine\"(), \"a b\" (2)",
        "select * from t join lateral a.b(t.x) on true",
        "insert into t (a, b) values (mine(1), 2)",
        "update t set a = mine(a) where b in (1)",
        "call mine()",
        "with x (a) as (select mine()) select a from x",
        "explain analyze select mine()",
        "copy (select mine()) to stdout",
        "select pg_catalog.lower(mine(x)) from t",
    ] {
        let expected = if text.starts_with("copy") {
            "1 Copy | Opaque"
        } else {
            "1 Opaque"
        };
        effects(text, expected);
    }
    for text in [
        "select lower(a), count(*), now() from t where a in (1) and exists (select 1)",
        "select pg_catalog.query_to_xml('x', true, true, '')",
        "insert into t (a, b) values (1, coalesce(2, 3)) on conflict (a) do update set b = 1",
        "insert into s.t (a) values (1)",
        "insert into \"s\".\"t\" (\"a\") values (1)",
        "insert into \"t\" (\"a\") values ($1) returning \"a\"",
        "with x (a) as (select 1) select a::varchar(10) from x as y (b)",
        "select * from generate_series(1, 2) g (n)",
        "select pgflow.start_flow('x', '{}'), pgmq.send('q', '{}')",
        "create table mine (a int check (mine(a)))",
    ] {
        effects(text, "1");
    }
}

#[test]
fn statements_are_counted_as_postgres_counts_them() {
    for (text, expected) in [
        ("", 0),
        (" ; ;\n", 0),
        ("-- only a comment", 0),
        ("/* c */ ;", 0),
        ("select 1", 1),
        ("select ';'", 1),
        ("select 1;select 2", 2),
        ("select $$;$$; select \";\"; -- ;", 2),
        (
            "create rule r as on insert to t do also (select 1; select 2); select 3",
            2,
        ),
        (
            "create function f() returns int begin atomic select case when true then 1 end; select 2; end; select 3",
            2,
        ),
        (
            "create or replace procedure p() begin atomic select 1; end",
            1,
        ),
        ("begin; end", 2),
    ] {
        let analysis = Classifier::new(Reads::Pgflow, 1 << 20, 1).analyse(text.as_bytes());
        assert_eq!(analysis.statements, expected, "{text}");
    }
}

#[test]
fn plain_texts_share_one_analysis_and_never_reach_the_memo() {
    let classifier = Classifier::new(Reads::Pgflow, 1 << 20, 1);
    let first = classifier.analyse(b"select 1");
    for text in [
        "SELECT abalance FROM pgbench_accounts WHERE aid = 7;",
        " update t set a = 1",
        "insert into t values (1)",
    ] {
        assert!(
            Arc::ptr_eq(&first, &classifier.analyse(text.as_bytes())),
            "{text}"
        );
    }
    assert!(Arc::ptr_eq(
        &classifier.analyse(b"begin"),
        &classifier.analyse(b"COMMIT;")
    ));
    assert_eq!(classifier.memo_stats().misses, 0);
    let read = classifier.analyse(b"select * from pgflow.flows");
    assert!(Arc::ptr_eq(
        &read,
        &classifier.analyse(b"select * from pgflow.flows")
    ));
    assert_eq!(
        (classifier.memo_stats().hits, classifier.memo_stats().misses),
        (1, 1)
    );
}

#[test]
fn first_sight_agrees_with_the_close_look() {
    let classifier = Classifier::new(Reads::Pgflow, 1 << 20, 1);
    for text in [
        "select 1",
        "begin",
        "commit;",
        "copy t to stdout",
        "end work",
        "values (1)",
        "update t set a = ';'",
        "",
        "abort",
        "fetch c",
        "savepoint a",
        "create table t(a int)",
        "vacuum",
        "explain select 1",
        "selectx",
        "select1",
    ] {
        let close = analyse(text.as_bytes(), Reads::Pgflow);
        assert_eq!(*classifier.analyse(text.as_bytes()), close, "{text}");
    }
}

#[test]
fn bytes_that_are_no_text_are_nothing_special() {
    for text in [
        &b"select '\xff' from pgflow.runs"[..],
        b"\xff\xfe pgflow",
        b"select * from pgflow.runs where status = '\xe9'",
        b"pgflow\0",
    ] {
        assert_eq!(classify(text, Reads::All), "Other");
    }
    let analysis = Classifier::new(Reads::Pgflow, 1 << 20, 1).analyse(b"listen \"caf\xe9\"");
    assert_eq!(analysis.effects, [Effect::Unfollowed]);
}

#[test]
fn texts_of_a_megabyte_or_of_any_depth_are_survived() {
    let deep = 200_000;
    for text in [
        format!(
            "select * from pgflow.runs where status = '{}'",
            "x".repeat(1 << 20)
        ),
        format!(
            "insert into pgflow.x values {}",
            "('a', 1),".repeat(100_000)
        ),
        format!("select {}1 from pgflow.runs", "1+".repeat(deep)),
        format!(
            "select {}1{} from pgflow.runs",
            "(".repeat(deep),
            ")".repeat(deep)
        ),
        format!("select {}pgflow", "/*".repeat(deep)),
        format!("select {} from pgflow.runs", "not ".repeat(1000)),
        format!("select {}1 from pgflow.runs", "- ".repeat(1000)),
        format!("select {} 1 from pgflow.runs", "case when ".repeat(500)),
        format!(
            "select 1 from pgflow.runs {}",
            "union select 1 ".repeat(350)
        ),
        format!("select a{} from pgflow.runs", "::text".repeat(500)),
        format!("select a{} from pgflow.runs", "[1]".repeat(390)),
        format!(
            "select 1 from {}pgflow.runs{}",
            "(".repeat(20),
            ")".repeat(20)
        ),
        format!(
            "select 1 from pgflow.runs {}",
            "join pgflow.flows on 1=1 ".repeat(150)
        ),
        format!(
            "{}select 1 from pgflow.runs{}",
            "(select (".repeat(12),
            "))".repeat(12)
        ),
        format!(
            "select {}1 from pgflow.runs where true {}",
            "",
            "and 1 = 1 ".repeat(290)
        ),
        "pgflow;".repeat(100_000),
        "set x = 1;".repeat(10_000),
    ] {
        let analysis = Classifier::new(Reads::All, 1 << 20, 1).analyse(text.as_bytes());
        assert!(analysis.statements > 0 || text.contains("/*"));
    }
    let hidden = format!(
        "insert into pgflow.x values {}(1); create temp table t()",
        "('a', 1),".repeat(100_000)
    );
    let analysis = Classifier::new(Reads::All, 1 << 20, 1).analyse(hidden.as_bytes());
    assert!(analysis.effects.contains(&Effect::Unfollowed));
}

/// xorshift: the same texts on every run.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n as u64) as usize
    }
}

#[test]
fn no_mutation_panics_or_smuggles_a_write_into_a_read() {
    const PIECES: &[&str] = &[
        "select ",
        "* ",
        "from ",
        "pgflow.",
        "runs ",
        "start_flow",
        "('a','{}')",
        "(",
        ")",
        "get_run_with_states",
        "($1)",
        "where ",
        "run_id = $1 ",
        "'",
        "''",
        "\"",
        "$$",
        "$a$",
        "--",
        "\n",
        "/*",
        "*/",
        ";",
        "with x as ",
        "x ",
        ",",
        "insert into t ",
        "for update ",
        "into t ",
        "E'\\'",
        "U&\"",
        "\\",
        "\u{0}",
        "é",
        "::",
        "my_type ",
        "my_function",
        "lower",
        "nextval",
        ".",
        "[",
        "]",
        "=>",
        "and ",
        "or ",
        "lateral ",
        "union ",
        "values ",
        "order by 1 ",
        "limit 1 ",
        "as y ",
        "cast(",
        "r ",
        "r.",
        "status ",
        "1 ",
        "+ ",
        "@ ",
        "operator(a.+)",
    ];
    let classifier = Classifier::new(Reads::Pgflow, 1 << 16, 1);
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let mut reads = 0;
    for _ in 0..30_000 {
        let mut text = Vec::new();
        if random.below(2) == 0 {
            text.extend_from_slice(b"select * from pgflow.runs ");
        }
        for _ in 0..random.below(12) {
            text.extend_from_slice(PIECES[random.below(PIECES.len())].as_bytes());
        }
        if !text.is_empty() && random.below(8) == 0 {
            let at = random.below(text.len());
            text[at] = random.below(256) as u8;
        }
        let analysis = classifier.analyse(&text);
        if !matches!(analysis.class, StatementClass::Read(_)) {
            continue;
        }
        reads += 1;
        // What is left once literals, comments and names in quotes are gone must hold none of the writing pieces.
        let bare: String = Lexer::new(&text)
            .filter(|token| matches!(token.kind, Kind::Word | Kind::Punct(_) | Kind::Operator))
            .map(|token| {
                format!(
                    "{} ",
                    String::from_utf8_lossy(token.bytes(&text)).to_lowercase()
                )
            })
            .collect();
        for writing in [
            "start_flow (",
            "my_function (",
            "nextval (",
            "insert ",
            "for update",
            "into ",
            ":: my_type",
            "operator (",
        ] {
            assert!(
                !bare.contains(writing),
                "{writing} in {}",
                String::from_utf8_lossy(&text)
            );
        }
    }
    assert!(reads > 300, "only {reads} reads: the texts test nothing");
}
