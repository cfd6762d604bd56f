//! pgflow's core, the SQL of `sql/`, rule by rule as its clients rely on it: what rows, messages and events each call
//! leaves, what it refuses and in which words. Only what a client can observe; which functions call which is not.
//!
//! `random_dags` and `many_workers` look at the same rules from the other side: whatever happened, `invariants` hold.

mod cascades;
pub(crate) mod catalog;
mod complete_task;
mod events;
mod fail_task;
mod grants;
pub(crate) mod invariants;
mod many_workers;
mod polling;
pub(crate) mod random_dags;
mod slugs_and_definitions;
mod start_tasks;
mod starting;
mod tables;
mod together;
mod vt_batch;

use crate::support::core::{Core, PATIENCE, WORKER, lines, refused, run, show, try_show};
