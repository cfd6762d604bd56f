//! Fault tests: what clients see when a Postgres, or the proxy, is killed, restarted or late (DESIGN §11). Each has a cluster
//! of its own.

#![expect(
    clippy::unwrap_used,
    reason = "tests panic; clippy exempts only the test functions themselves"
)]

mod bank;
mod crowds;
mod descriptors;
mod followers;
mod freshness;
mod handover;
mod maintenance;
mod pools;
mod primary;
mod proxy_killed;
mod replica;
mod servers;
#[path = "../it/support/mod.rs"]
mod support;

use flowgate::embedded::{Cluster, ClusterOptions};
use flowgate::schema::{self, InstallOptions};

/// A primary and as many replicas, all with the SQL and a flow `greet` of one step.
async fn cluster(replicas: usize) -> Cluster {
    let options = ClusterOptions {
        replicas,
        ..ClusterOptions::default()
    };
    let cluster = Cluster::start(options).await.unwrap();
    let url = cluster.primary_url().parse().unwrap();
    schema::install(&url, InstallOptions::default())
        .await
        .unwrap();
    let admin = cluster.connect_primary().await.unwrap();
    admin
        .batch_execute(
            "select pgflow.create_flow('greet'); select pgflow.add_step('greet', 'hello')",
        )
        .await
        .unwrap();
    cluster
}
