//! What a role may see: asked of the database's own grants and policies, remembered for a moment. Decides nothing by itself:
//! what Postgres would refuse or hide in SQL is refused and hidden here. Called by the streams, the socket and the API.
//!
//! Who may execute `pgflow.get_run_with_states` may read any run whose id it knows, in SQL as here. Lists and streams of many
//! runs go by the rows of `pgflow.runs` that the role may SELECT, policies and all.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use super::db::{Access, Database, DbError, Question};
use super::identity::Identity;

/// Answers kept; more, and all are forgotten.
const KEPT_MAX: usize = 20_000;
/// No answer is older than that when somebody comes.
const YOUNG: Duration = Duration::from_secs(1);

/// Which rows of `pgflow.runs` a role may SELECT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rows {
    None,
    /// Those its policies let it.
    Some,
    All,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rights {
    /// Any run whose id it knows.
    pub(super) by_id: bool,
    pub(super) runs: Rows,
    /// Tables of pgflow that it may SELECT from.
    tables: String,
}

impl Rights {
    pub(super) fn may_select(&self, table: &str) -> bool {
        self.tables.split(' ').any(|name| name == table)
    }
}

#[derive(PartialEq, Eq, Hash)]
struct Key {
    identity: [u8; 32],
    run: Option<Uuid>,
}

#[derive(Clone)]
enum Seen {
    Rights(Arc<Rights>),
    Run(bool),
}

pub(super) struct Sight {
    database: Arc<Database>,
    /// How often a stream looks again.
    pub(super) recheck: Duration,
    kept: Mutex<HashMap<Key, (Instant, Seen)>>,
}

const RIGHTS: &str = "\
    with c as (select c.oid, c.relname from pg_catalog.pg_class c \
        join pg_catalog.pg_namespace n on n.oid = c.relnamespace where n.nspname = 'pgflow' and c.relkind in ('r', 'p', 'v')), \
    u as (select coalesce((select pg_catalog.has_schema_privilege(n.oid, 'usage') \
        from pg_catalog.pg_namespace n where n.nspname = 'pgflow'), false) as usage) \
    select u.usage and exists (select from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace \
            where n.nspname = 'pgflow' and p.proname = 'get_run_with_states' and pg_catalog.has_function_privilege(p.oid, 'execute')), \
        case when u.usage then (select string_agg(c.relname, ' ') from c where pg_catalog.has_table_privilege(c.oid, 'select')) end, \
        coalesce((select pg_catalog.row_security_active(c.oid) from c where c.relname = 'runs'), true) \
    from u";

impl Sight {
    pub(super) fn new(database: Arc<Database>, recheck: Duration) -> Self {
        Self {
            database,
            recheck,
            kept: Mutex::default(),
        }
    }

    /// When a stream that was let in now has to look again: so that, with an answer a little old, what is revoked ends within
    /// the interval.
    pub(super) fn next_check(&self) -> Instant {
        Instant::now() + self.recheck.saturating_sub(self.age_max())
    }

    /// When to look again where nobody could say.
    pub(super) fn soon(&self) -> Instant {
        Instant::now() + self.age_max()
    }

    fn age_max(&self) -> Duration {
        (self.recheck / 10).min(YOUNG)
    }

    pub(super) async fn rights(&self, identity: &Identity) -> Result<Arc<Rights>, DbError> {
        let key = key(identity, None);
        if let Some(Seen::Rights(rights)) = self.remembered(&key, self.age_max()) {
            return Ok(rights);
        }
        let answer = self.ask(identity, RIGHTS).await?;
        let row = answer.first();
        let column = |at: usize| row.and_then(|row| row.get(at)?.as_deref());
        let tables = column(1).unwrap_or_default().to_owned();
        let mut rights = Rights {
            by_id: column(0) == Some("t"),
            runs: Rows::None,
            tables,
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
    pub(super) async fn may_follow(&self, identity: &Identity, run: Uuid) -> Result<bool, DbError> {
        let rights = self.rights(identity).await?;
        if rights.by_id {
            return Ok(true);
        }
        self.shows(identity, &rights, run, self.age_max()).await
    }

    /// Whether this run is among the rows it may SELECT. For the events of many runs, so an answer may be as old as the
    /// interval.
    pub(super) async fn may_list(
        &self,
        identity: &Identity,
        rights: &Rights,
        run: Uuid,
    ) -> Result<bool, DbError> {
        self.shows(identity, rights, run, self.recheck).await
    }

    async fn shows(
        &self,
        identity: &Identity,
        rights: &Rights,
        run: Uuid,
        age_max: Duration,
    ) -> Result<bool, DbError> {
        match rights.runs {
            Rows::None => return Ok(false),
            Rows::All => return Ok(true),
            Rows::Some => {}
        }
        let key = key(identity, Some(run));
        if let Some(Seen::Run(shown)) = self.remembered(&key, age_max) {
            return Ok(shown);
        }
        let sql = format!("select 1 from pgflow.runs as r where r.run_id = '{run}'");
        let shown = !self.ask(identity, &sql).await?.is_empty();
        // A run asked for by its id may not have begun; one that an event tells of has.
        if shown || age_max == self.recheck {
            self.remember(key, Seen::Run(shown));
        }
        Ok(shown)
    }

    async fn ask(
        &self,
        identity: &Identity,
        sql: &str,
    ) -> Result<Vec<Vec<Option<String>>>, DbError> {
        let question = Question {
            identity: Some(identity),
            before: "",
            settings: &[],
            access: Access::Read,
            sql,
        };
        Ok(self.database.ask(&question).await?.rows)
    }

    fn remembered(&self, key: &Key, age_max: Duration) -> Option<Seen> {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let (at, seen) = kept.get(key)?;
        (at.elapsed() < age_max).then(|| seen.clone())
    }

    fn remember(&self, key: Key, seen: Seen) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= KEPT_MAX {
            kept.clear();
        }
        kept.insert(key, (Instant::now(), seen));
    }
}

fn key(identity: &Identity, run: Option<Uuid>) -> Key {
    Key {
        identity: identity.print,
        run,
    }
}
