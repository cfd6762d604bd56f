//! What is installed at 0.14, to the letter: `snapshots/schema_0_14.txt`, made and compared as that of 0.7.

use super::{Core, at_0_14, lines};
use crate::core::catalog::is_the_snapshot;

#[tokio::test]
async fn what_is_installed_at_0_14_is_the_snapshot() {
    is_the_snapshot(&at_0_14().await, "schema_0_14.txt").await;
}

#[tokio::test]
async fn an_upgrade_from_0_7_ends_at_the_same_snapshot() {
    let core = Core::at(flowgate::schema::PgflowApi::V0_7).await;
    core.upgrade().await;
    if std::env::var_os("UPDATE_SNAPSHOTS").is_none() {
        is_the_snapshot(&core, "schema_0_14.txt").await;
    }
}

#[tokio::test]
async fn no_index_of_0_14_mentions_what_changes_while_a_run_goes_on() {
    let core = at_0_14().await;
    let indexed = "select c.relname || ': ' || string_agg(distinct a.attname, ' ' order by a.attname)
        from pg_index as i join pg_class as c on c.oid = i.indrelid
        join pg_attribute as a on a.attrelid = c.oid
         and (a.attnum = any (i.indkey) or pg_get_indexdef(i.indexrelid) ~ ('WHERE.*\\m' || a.attname || '\\M'))
        where c.relnamespace = 'pgflow'::regnamespace and c.relname in ('runs', 'step_states', 'step_tasks', 'workers', 'worker_functions')
        group by c.relname order by c.relname";
    assert_eq!(
        core.show(indexed).await,
        lines(
            "runs: flow_slug run_id started_at
             step_states: run_id step_slug
             step_tasks: flow_slug message_id run_id step_slug task_index
             worker_functions: function_name
             workers: worker_id"
        )
    );
}

#[tokio::test]
async fn only_what_must_run_as_its_owner_does_and_nothing_looks_up_names_on_its_callers_path() {
    let core = at_0_14().await;
    let definers =
        "select string_agg(p.oid::regprocedure::text, ' ' order by p.proname) from pg_proc as p
        where p.pronamespace = 'pgflow'::regnamespace and p.prosecdef";
    assert_eq!(
        core.show(definers).await,
        "pgflow.get_run_with_states(uuid) pgflow.requeue_stalled_tasks() pgflow.start_flow_with_states(text,jsonb,uuid)"
    );
    let open =
        "select p.oid::regprocedure from pg_proc as p where p.pronamespace = 'pgflow'::regnamespace
        and not coalesce('search_path=\"\"' = any (p.proconfig), false)";
    assert_eq!(core.show(open).await, "");
}
