//! One primary and replica for the whole test binary, started by the first test that asks, and a database of its own for
//! each test. Nobody stops them: the guard of `flowgate::embedded` does when this process ends, however it ends.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use flowgate::config::ConnectUrl;
use flowgate::embedded::{Cluster, ClusterOptions, connect};
use flowgate::schema::{self, InstallOptions, PgflowApi};
use tokio::sync::OnceCell;
use tokio_postgres::Client;
use tokio_postgres::error::SqlState;

use super::wait::wait_until;

const PATIENCE: Duration = Duration::from_secs(30);

/// A database on the shared cluster; it lives as long as that does.
pub(crate) struct TestDb {
    pub(crate) name: String,
    pub(crate) primary_url: String,
    pub(crate) replica_url: String,
}

impl TestDb {
    /// As superuser, on the primary.
    pub(crate) async fn connect(&self) -> Client {
        connect(&self.primary_url).await.unwrap()
    }

    pub(crate) async fn connect_replica(&self) -> Client {
        connect(&self.replica_url).await.unwrap()
    }

    /// The primary's, as configuration and `schema` take it.
    pub(crate) fn url(&self) -> ConnectUrl {
        self.primary_url.parse().unwrap()
    }
}

/// The shared cluster. Tests that stop, stall or promote a server start their own.
pub(crate) async fn shared() -> &'static Cluster {
    static SHARED: OnceCell<Cluster> = OnceCell::const_new();
    SHARED
        .get_or_init(async || {
            let settings = [
                ("max_connections", "500"),
                ("max_prepared_transactions", "20"),
            ];
            let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned()));
            Cluster::start(ClusterOptions {
                settings: settings.into(),
                ..ClusterOptions::default()
            })
            .await
            .unwrap()
        })
        .await
}

/// pgmq, pgflow and flowgate are installed, no flow is defined; the replica has it too.
pub(crate) async fn fresh_database() -> TestDb {
    fresh_database_at(PgflowApi::default()).await
}

/// The same, with the pgflow of that level.
pub(crate) async fn fresh_database_at(api: PgflowApi) -> TestDb {
    static MADE_0_7: OnceCell<()> = OnceCell::const_new();
    static MADE_0_14: OnceCell<()> = OnceCell::const_new();
    let (made, name) = match api {
        PgflowApi::V0_7 => (&MADE_0_7, "flowgate_template"),
        PgflowApi::V0_14 => (&MADE_0_14, "flowgate_template_0_14"),
    };
    made.get_or_init(async || {
        let template = make_database(name, "template1").await;
        let options = InstallOptions {
            pgflow: Some(api),
            ..InstallOptions::default()
        };
        schema::install(&template.url(), options).await.unwrap();
    })
    .await;
    make_database(&next_name(), name).await
}

/// Nothing is installed.
pub(crate) async fn empty_database() -> TestDb {
    make_database(&next_name(), "template1").await
}

/// Returns when the replica has replayed all that the primary had written when this was called.
pub(crate) async fn replica_catches_up() {
    let cluster = shared().await;
    let primary = cluster.connect_primary().await.unwrap();
    let written: String = primary
        .query_one("select pg_current_wal_insert_lsn()::text", &[])
        .await
        .unwrap()
        .get(0);
    let replica = cluster.connect_replica(0).await.unwrap();
    let replayed = "select pg_last_wal_replay_lsn() >= $1::text::pg_lsn";
    wait_until("the replica catches up", PATIENCE, async || {
        replica
            .query_one(replayed, &[&written])
            .await
            .unwrap()
            .get(0)
    })
    .await;
}

fn next_name() -> String {
    static NEXT: AtomicUsize = AtomicUsize::new(1);
    format!("test{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

async fn make_database(name: &str, template: &str) -> TestDb {
    let cluster = shared().await;
    let admin = cluster.connect_primary().await.unwrap();
    let create = format!("create database {name} template {template} strategy wal_log");
    wait_until("nobody uses the template", PATIENCE, async || {
        match admin.batch_execute(&create).await {
            Ok(()) => true,
            // The installer's connection may take a moment to go, autovacuum comes and goes.
            Err(error) if error.code() == Some(&SqlState::OBJECT_IN_USE) => false,
            Err(error) => panic!("{create}: {error:?}"),
        }
    })
    .await;
    replica_catches_up().await;
    let in_database = |url: String| format!("{}/{name}", url.strip_suffix("/postgres").unwrap());
    let (primary_url, replica_url) = (
        in_database(cluster.primary_url()),
        in_database(cluster.replica_url(0)),
    );
    TestDb {
        name: name.to_owned(),
        primary_url,
        replica_url,
    }
}
