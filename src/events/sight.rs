//! What a role may see: asked of the database's own grants and policies, remembered for a moment. Decides nothing by itself:
//! what Postgres would refuse or hide in SQL is refused and hidden here. Called by `hub` for sessions that listen (`watch.rs`),
//! and by the streams, the socket and the API of `http`.
//!
//! Who may execute `pgflow.get_run_with_states` may read any run whose id it knows, in SQL as here. Lists and streams of many
//! runs go by the rows of `pgflow.runs` that the role may SELECT, policies and all.

use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use crate::server::chorus::Chorus;
use crate::server::questions::{Access, Answer, Asker, Database, DbError, Question};
use crate::wire::quote::literal;

/// Answers kept; more, and all are forgotten.
const KEPT_MAX: usize = 20_000;
/// No answer is older than that when somebody comes.
const YOUNG: Duration = Duration::from_secs(1);
/// Moments that looking again is spread over.
const CHECKS: u32 = 64;
/// Roles that are asked about at once.
const ROLES_AT_ONCE: usize = 8;

/// Which rows of `pgflow.runs` a role may SELECT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rows {
    None,
    /// Those its policies let it.
    Some,
    All,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Rights {
    /// There are runs whose rights count at all.
    pub(crate) has_runs: bool,
    /// Any run whose id it knows.
    pub(crate) by_id: bool,
    pub(crate) runs: Rows,
    /// Tables of pgflow that it may SELECT from.
    tables: String,
}

impl Rights {
    pub(crate) fn may_select(&self, table: &str) -> bool {
        self.tables.split(' ').any(|name| name == table)
    }
}

/// Whose word counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Proof {
    /// Somebody said so by HTTP: it must be a role that the control role may take.
    ToBeTaken,
    /// It has logged in to Postgres: the control role need not be a member of it, unless policies are to be asked.
    LoggedIn,
}

#[derive(Clone, PartialEq, Eq, Hash)]
enum Key {
    Rights([u8; 32]),
    Run([u8; 32], Uuid),
}

#[derive(Clone)]
enum Seen {
    Rights(Arc<Rights>),
    Run(bool),
}

/// A run, known by its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shown {
    Yes,
    /// There is none, as far as the control role can tell.
    NotYet,
    No,
}

/// Of some runs.
pub(super) struct Found {
    shown: HashSet<Uuid>,
    /// They are there, and not for this role.
    hidden: HashSet<Uuid>,
}

impl Found {
    pub(super) fn of(&self, run: Uuid) -> Shown {
        if self.shown.contains(&run) {
            Shown::Yes
        } else if self.hidden.contains(&run) {
            Shown::No
        } else {
            Shown::NotYet
        }
    }

    pub(super) fn hidden(&self) -> impl Iterator<Item = Uuid> {
        self.hidden.iter().copied()
    }
}

pub(crate) struct Sight {
    database: Arc<Database>,
    proof: Proof,
    /// How often a stream looks again.
    recheck: Duration,
    kept: Mutex<HashMap<Key, (Instant, Seen)>>,
    /// One question for all who wait for the same answer.
    asking: [tokio::sync::Mutex<()>; ROLES_AT_ONCE],
    /// The same for a run.
    showing: Chorus<Key, Result<bool, DbError>>,
    /// So that those who were let in together do not look again together.
    checks: AtomicU32,
}

/// Of a role by its name, as `row_security_active` says it of one's own.
fn rights_sql(role: &str) -> String {
    let role = literal(role);
    format!(
        "with c as (select c.oid, c.relname, c.relowner, c.relrowsecurity, c.relforcerowsecurity from pg_catalog.pg_class c \
            join pg_catalog.pg_namespace n on n.oid = c.relnamespace where n.nspname = 'pgflow' and c.relkind in ('r', 'p', 'v')), \
        u as (select coalesce((select pg_catalog.has_schema_privilege({role}, n.oid, 'usage') \
            from pg_catalog.pg_namespace n where n.nspname = 'pgflow'), false) as usage) \
        select u.usage and exists (select from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace \
                where n.nspname = 'pgflow' and p.proname = 'get_run_with_states' \
                and pg_catalog.has_function_privilege({role}, p.oid, 'execute')), \
            case when u.usage then (select string_agg(c.relname, ' ') from c \
                where pg_catalog.has_table_privilege({role}, c.oid, 'select')) end, \
            coalesce((select c.relrowsecurity and not r.rolsuper and not r.rolbypassrls \
                and (c.relforcerowsecurity or not pg_catalog.pg_has_role(r.oid, c.relowner, 'usage')) \
                from c, pg_catalog.pg_roles r where c.relname = 'runs' and r.rolname = {role}), true), \
            exists (select from c where c.relname = 'runs') \
        from u"
    )
}

impl Sight {
    pub(crate) fn new(database: Arc<Database>, proof: Proof, recheck: Duration) -> Self {
        Self {
            database,
            proof,
            recheck,
            kept: Mutex::default(),
            asking: Default::default(),
            showing: Chorus::default(),
            checks: AtomicU32::new(0),
        }
    }

    /// When a stream that was let in now has to look again: so that, with an answer a little old, what is revoked ends within
    /// the interval. Some look up to an eighth of it earlier than others.
    pub(crate) fn next_check(&self) -> Instant {
        let turn = self.checks.fetch_add(1, Ordering::Relaxed) % CHECKS;
        let earlier = self.recheck / 8 * turn / CHECKS;
        Instant::now() + self.recheck.saturating_sub(self.age_max() + earlier)
    }

    /// When to look again where nobody could say.
    pub(crate) fn soon(&self) -> Instant {
        Instant::now() + self.age_max()
    }

    fn age_max(&self) -> Duration {
        (self.recheck / 10).min(YOUNG)
    }

    /// Nobody asks any more: no connection is kept for it.
    pub(crate) fn rest(&self) {
        self.database.rest();
    }

    pub(crate) async fn rights(&self, asker: &Asker) -> Result<Arc<Rights>, DbError> {
        let key = Key::Rights(asker.print);
        let known = || match self.remembered(&key, self.age_max()) {
            Some(Seen::Rights(rights)) => Some(rights),
            Some(Seen::Run(_)) | None => None,
        };
        if let Some(rights) = known() {
            return Ok(rights);
        }
        let lane = usize::from(asker.print[0]) % ROLES_AT_ONCE;
        let _asking = self.asking[lane].lock().await;
        if let Some(rights) = known() {
            return Ok(rights);
        }
        let taken = match self.proof {
            Proof::ToBeTaken => Some(asker),
            Proof::LoggedIn => None,
        };
        let rows = self.ask(taken, "", &rights_sql(&asker.role)).await?.rows;
        let row = rows.first();
        let column = |at: usize| row.and_then(|row| row.get(at)?.as_deref());
        let mut rights = Rights {
            has_runs: column(3) != Some("f"),
            by_id: column(0) == Some("t"),
            runs: Rows::None,
            tables: column(1).unwrap_or_default().to_owned(),
        };
        if rights.may_select("runs") {
            rights.runs = if column(2) == Some("f") {
                Rows::All
            } else {
                Rows::Some
            };
        }
        let rights = Arc::new(rights);
        self.remember(key, Seen::Rights(Arc::clone(&rights)));
        Ok(rights)
    }

    /// Whether this run, known by its id, is one it may follow.
    pub(crate) async fn may_follow(&self, asker: &Asker, run: Uuid) -> Result<bool, DbError> {
        let rights = self.rights(asker).await?;
        if rights.by_id {
            return Ok(true);
        }
        self.shows(asker, &rights, run, self.age_max()).await
    }

    /// Whether this run is among the rows it may SELECT. For the events of many runs, so an answer may be as old as the
    /// interval.
    pub(crate) async fn may_list(
        &self,
        asker: &Asker,
        rights: &Rights,
        run: Uuid,
    ) -> Result<bool, DbError> {
        self.shows(asker, rights, run, self.recheck).await
    }

    async fn shows(
        &self,
        asker: &Asker,
        rights: &Rights,
        run: Uuid,
        age_max: Duration,
    ) -> Result<bool, DbError> {
        match rights.runs {
            Rows::None => return Ok(false),
            Rows::All => return Ok(true),
            Rows::Some => {}
        }
        let key = Key::Run(asker.print, run);
        if let Some(Seen::Run(shown)) = self.remembered(&key, age_max) {
            return Ok(shown);
        }
        let sql = row_sql(run);
        let question = async {
            let answer = self.ask(Some(asker), "", &sql).await?;
            Ok(!answer.rows.is_empty())
        };
        let shown = self.showing.ask(key.clone(), question).await?;
        // A run asked for by its id may not have begun; one that an event tells of has.
        if shown || age_max == self.recheck {
            self.remember(key, Seen::Run(shown));
        }
        Ok(shown)
    }

    /// Which of these runs' rows it may SELECT, and which are there: a run need not have begun.
    pub(super) async fn rows(&self, asker: &Asker, runs: &HashSet<Uuid>) -> Result<Found, DbError> {
        let of_these = of_these(runs);
        let before = format!(
            "select string_agg(r.run_id::text, ' ') as flowgate_before from pgflow.runs as r where {of_these}"
        );
        let sql = format!("select r.run_id from pgflow.runs as r where {of_these}");
        let answer = self.ask(Some(asker), &before, &sql).await?;
        let there = answer.before.unwrap_or_default();
        let there = there.split(' ').filter_map(|id| id.parse().ok());
        let shown: HashSet<Uuid> = ids(&answer.rows).collect();
        let hidden: HashSet<Uuid> = there.filter(|run| !shown.contains(run)).collect();
        for (runs, seen) in [(&shown, true), (&hidden, false)] {
            for run in runs {
                self.remember(Key::Run(asker.print, *run), Seen::Run(seen));
            }
        }
        Ok(Found { shown, hidden })
    }

    /// What is known of it within the interval. Asks nobody.
    pub(super) fn known(&self, asker: &Asker, run: Uuid) -> Option<bool> {
        match self.remembered(&Key::Run(asker.print, run), self.recheck)? {
            Seen::Run(shown) => Some(shown),
            Seen::Rights(_) => None,
        }
    }

    /// Which of these runs, that events tell of, are among the rows it may SELECT: one question, remembered.
    pub(super) async fn look(
        &self,
        asker: &Asker,
        runs: &HashSet<Uuid>,
    ) -> Result<HashSet<Uuid>, DbError> {
        let sql = format!(
            "select r.run_id from pgflow.runs as r where {}",
            of_these(runs)
        );
        let shown: HashSet<Uuid> = match self.ask(Some(asker), "", &sql).await {
            Ok(answer) => ids(&answer.rows).collect(),
            // What Postgres refuses it in SQL, it does not see.
            Err(error) if !error.is_passing() => HashSet::new(),
            Err(error) => return Err(error),
        };
        for run in runs {
            let seen = Seen::Run(shown.contains(run));
            self.remember(Key::Run(asker.print, *run), seen);
        }
        Ok(shown)
    }

    async fn ask(&self, asker: Option<&Asker>, before: &str, sql: &str) -> Result<Answer, DbError> {
        let question = Question {
            asker,
            before,
            settings: &[],
            access: Access::Read,
            sql,
        };
        self.database.ask(&question).await
    }

    fn remembered(&self, key: &Key, age_max: Duration) -> Option<Seen> {
        let kept = self.kept();
        let (at, seen) = kept.get(key)?;
        (at.elapsed() < age_max).then(|| seen.clone())
    }

    fn remember(&self, key: Key, seen: Seen) {
        let mut kept = self.kept();
        if kept.len() >= KEPT_MAX {
            kept.clear();
        }
        kept.insert(key, (Instant::now(), seen));
    }

    fn kept(&self) -> MutexGuard<'_, HashMap<Key, (Instant, Seen)>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn of_these(runs: &HashSet<Uuid>) -> String {
    let mut sql = String::from("r.run_id = any('{");
    for (at, run) in runs.iter().enumerate() {
        let comma = if at == 0 { "" } else { "," };
        write!(sql, "{comma}{run}").expect("a String takes all");
    }
    sql + "}'::uuid[])"
}

fn ids(rows: &[Vec<Option<String>>]) -> impl Iterator<Item = Uuid> {
    rows.iter()
        .filter_map(|row| row.first()?.as_deref()?.parse().ok())
}

fn row_sql(run: Uuid) -> String {
    format!("select 1 from pgflow.runs as r where r.run_id = '{run}'")
}
