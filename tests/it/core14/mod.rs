//! pgflow's core of 0.14: what differs from 0.7, rule by rule as its clients rely on it, and the way from 0.7 to it.

mod catalog;
mod compiling;
mod conditions;
mod definitions;
mod levels;
mod many_workers;
mod random_dags;
mod requeueing;
mod skipping;
mod worker_functions;
mod working;

use flowgate::schema::PgflowApi;

use crate::support::core::{Core, PATIENCE, WORKER, lines, refused, run, show, try_show};

async fn at_0_14() -> Core {
    Core::at(PgflowApi::V0_14).await
}
