//! What is installed, to the letter: `snapshots/schema_0_7.txt` (and, by `core14`, `schema_0_14.txt`). `UPDATE_SNAPSHOTS=1` writes
//! it anew; read the difference before committing it, as each line is something clients, grants or upgrades rely on.
//!
//! The same on every Postgres from 15 on: no text that a major version words anew (a view's query, NOT NULL constraints,
//! an owner's own privileges).

use std::fs;
use std::path::Path;

use super::{Core, show};

const SNAPSHOTS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/it/snapshots");

/// Lines of the catalog: `$schemas`, and of roles only `$viewer` and `$worker`.
const CATALOG: &str = r#"
set search_path = '';
with
space as (
    select n.oid, n.nspname, n.nspowner, n.nspacl from pg_catalog.pg_namespace as n where n.nspname in ('flowgate', 'pgflow', 'realtime')
),
relation as (
    select c.*, s.nspname, s.nspname || '.' || c.relname as name
    from pg_catalog.pg_class as c join space as s on s.oid = c.relnamespace
    where c.relkind in ('r', 'p', 'v', 'c', 'S') and (not c.relispartition or c.relname = 'event_default')
),
-- To whom beside the owner.
granted (on_name, place, acl, owner, object_kind) as (
    select nspname, 'schema ' || nspname, nspacl, nspowner, 'n'::"char" from space
    union all
    select nspname, case relkind when 'S' then 'sequence ' when 'v' then 'view ' else 'table ' end || name, relacl, relowner,
        case relkind when 'S' then 's'::"char" else 'r'::"char" end
    from relation where relkind <> 'c'
    union all
    select s.nspname, 'function ' || p.oid::pg_catalog.regprocedure, p.proacl, p.proowner, 'f'::"char"
    from pg_catalog.pg_proc as p join space as s on s.oid = p.pronamespace
    union all
    select s.nspname, 'new ' || case d.defaclobjtype when 'r' then 'tables' when 'S' then 'sequences' else d.defaclobjtype::text end
        || ' in ' || s.nspname, d.defaclacl, d.defaclrole, d.defaclobjtype
    from pg_catalog.pg_default_acl as d join space as s on s.oid = d.defaclnamespace
)
select line from (
    select 1 as part, nspname || ' 0' as place, 'schema ' || nspname as line from space
    union all
    select 2, name || ' 0', case relkind when 'r' then 'table ' when 'p' then 'table ' when 'v' then 'view '
        when 'c' then 'type ' when 'S' then 'sequence ' end || name
        || case relkind when 'p' then ' partition by ' || pg_catalog.pg_get_partkeydef(oid) else '' end
        || coalesce(' with (' || pg_catalog.array_to_string(reloptions, ', ') || ')', '')
    from relation
    union all
    select 2, r.name || ' 1 ' || lpad(a.attnum::text, 3, '0'),
        '    ' || a.attname || ' ' || pg_catalog.format_type(a.atttypid, a.atttypmod)
        || case when a.attnotnull then ' not null' else '' end
        || coalesce(' default ' || pg_catalog.pg_get_expr(d.adbin, d.adrelid), '')
    from relation as r
    join pg_catalog.pg_attribute as a on a.attrelid = r.oid and a.attnum > 0 and not a.attisdropped
    left join pg_catalog.pg_attrdef as d on d.adrelid = a.attrelid and d.adnum = a.attnum
    where r.relkind <> 'S'
    union all
    select 2, r.name || ' 2 ' || c.conname, '    constraint ' || c.conname || ' ' || pg_catalog.pg_get_constraintdef(c.oid)
    from relation as r join pg_catalog.pg_constraint as c on c.conrelid = r.oid and c.contype in ('p', 'u', 'f', 'c', 'x')
    union all
    select 2, r.name || ' 3 ' || i.relname, '    ' || replace(pg_catalog.pg_get_indexdef(i.oid), ' ON ONLY ', ' ON ')
    from relation as r
    join pg_catalog.pg_index as x on x.indrelid = r.oid
    join pg_catalog.pg_class as i on i.oid = x.indexrelid
    where r.relname <> 'event_default'
        and not exists (select from pg_catalog.pg_constraint as c where c.conindid = i.oid and c.contype in ('p', 'u'))
    union all
    select 2, r.name || ' 4 ' || t.tgname, '    ' || pg_catalog.pg_get_triggerdef(t.oid)
        || case t.tgenabled when 'D' then ' [disabled]' else '' end
    from relation as r join pg_catalog.pg_trigger as t on t.tgrelid = r.oid and not t.tgisinternal
    union all
    select 3, s.nspname || '.' || p.proname || ' ' || p.oid::pg_catalog.regprocedure,
        'function ' || s.nspname || '.' || p.proname || '(' || pg_catalog.pg_get_function_arguments(p.oid) || ') returns '
        || pg_catalog.pg_get_function_result(p.oid)
        || case p.provolatile when 'i' then ' immutable' when 's' then ' stable' else ' volatile' end
        || case p.proparallel when 's' then ' parallel safe' else '' end
        || case when p.proisstrict then ' strict' else '' end
        || case when p.prosecdef then ' security definer' else '' end
        || coalesce((select ' set ' || setting from unnest(p.proconfig) as setting where setting like 'search_path=%'), ' without search_path')
    from pg_catalog.pg_proc as p join space as s on s.oid = p.pronamespace
    union all
    select 4, who || ' ' || g.on_name || ' ' || g.place, 'grant ' || string_agg(lower(a.privilege_type), ', ' order by a.privilege_type)
        || ' on ' || g.place || ' to ' || who
    from granted as g
    cross join lateral pg_catalog.aclexplode(coalesce(g.acl, case when g.object_kind in ('n', 'r', 's', 'f')
        then pg_catalog.acldefault(g.object_kind, g.owner) end)) as a
    cross join lateral (select case when a.grantee = 0 then 'public'
        when a.grantee = '$viewer'::pg_catalog.regrole then 'a viewer' when a.grantee = '$worker'::pg_catalog.regrole then 'a worker' else 'somebody' end) as w(who)
    where a.grantee <> g.owner
    group by who, g.on_name, g.place
) as lines
order by part, place collate "C", line collate "C";
"#;

#[tokio::test]
async fn what_is_installed_is_the_snapshot() {
    is_the_snapshot(&Core::new().await, "schema_0_7.txt").await;
}

/// What is in the database of `core` is what the file says.
pub(crate) async fn is_the_snapshot(core: &Core, file: &str) {
    let [viewer, worker] =
        ["snapshot_viewer", "snapshot_worker"].map(|role| format!("{role}_{}", core.db.name));
    core.run(&format!(
        "create role {viewer}; create role {worker};
         select flowgate.grant_viewer('{viewer}'); select flowgate.grant_worker('{worker}')"
    ))
    .await;
    let catalog = CATALOG
        .replace("$viewer", &viewer)
        .replace("$worker", &worker);
    let mut found = show(&core.db.connect().await, &catalog).await;
    found.push('\n');

    let path = Path::new(SNAPSHOTS).join(file);
    if std::env::var_os("UPDATE_SNAPSHOTS").is_some() {
        fs::create_dir_all(SNAPSHOTS).unwrap();
        fs::write(&path, &found).unwrap();
        return;
    }
    let kept = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        kept == found,
        "the catalog is not that of {file} (- kept, + installed):\n{}\n\
         If that is meant, write it anew: UPDATE_SNAPSHOTS=1 cargo test --test it catalog",
        difference(&kept, &found)
    );
}

#[tokio::test]
async fn no_index_mentions_what_changes_while_a_run_goes_on() {
    let core = Core::new().await;
    let indexed = "select c.relname || ': ' || string_agg(distinct a.attname, ' ' order by a.attname)
        from pg_index as i join pg_class as c on c.oid = i.indrelid
        join pg_attribute as a on a.attrelid = c.oid
         and (a.attnum = any (i.indkey) or pg_get_indexdef(i.indexrelid) ~ ('WHERE.*\\m' || a.attname || '\\M'))
        where c.oid in ('pgflow.runs'::regclass, 'pgflow.step_states'::regclass, 'pgflow.step_tasks'::regclass, 'pgflow.workers'::regclass)
        group by c.relname order by c.relname";
    // So every change of a status is a HOT update.
    assert_eq!(
        core.show(indexed).await,
        "runs: flow_slug run_id started_at\n\
         step_states: run_id step_slug\n\
         step_tasks: flow_slug message_id run_id step_slug task_index\n\
         workers: worker_id"
    );
}

/// Lines that are in one text only, with the line both have before them.
fn difference(kept: &str, found: &str) -> String {
    let (kept, found): (Vec<_>, Vec<_>) = (kept.lines().collect(), found.lines().collect());
    // Longest common subsequence, by its lengths from each pair of places on.
    let mut common = vec![vec![0_usize; found.len() + 1]; kept.len() + 1];
    for k in (0..kept.len()).rev() {
        for f in (0..found.len()).rev() {
            common[k][f] = if kept[k] == found[f] {
                common[k + 1][f + 1] + 1
            } else {
                common[k + 1][f].max(common[k][f + 1])
            };
        }
    }
    let (mut k, mut f) = (0, 0);
    let mut text = String::new();
    let mut before = None;
    while k < kept.len() || f < found.len() {
        if k < kept.len() && f < found.len() && kept[k] == found[f] {
            before = Some(kept[k]);
            (k, f) = (k + 1, f + 1);
            continue;
        }
        if let Some(line) = before.take() {
            text += &format!("  {line}\n");
        }
        if f >= found.len() || (k < kept.len() && common[k + 1][f] >= common[k][f + 1]) {
            text += &format!("- {}\n", kept[k]);
            k += 1;
        } else {
            text += &format!("+ {}\n", found[f]);
            f += 1;
        }
    }
    text
}

#[test]
fn a_difference_shows_what_was_lost_and_what_came() {
    let kept = "table a\n    x int\n    y int\ntable b";
    let found = "table a\n    x bigint\n    y int\ntable b\ntable c";
    assert_eq!(
        difference(kept, found),
        "  table a\n-     x int\n+     x bigint\n  table b\n+ table c\n"
    );
    assert_eq!(difference(kept, kept), "");
}
