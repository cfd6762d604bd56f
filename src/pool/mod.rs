//! Server connections and who may use them: one pool per (database, user, upstream). Knows nothing of SQL or pgflow.
//! `pools.rs` has them all and what the operator says of them, `checkout.rs` lends, `shelf.rs` keeps the books of one pool,
//! `budget.rs` those of an upstream, `limiter.rs` finds out how many at once do it good, `alarm.rs` times a wait, `reset.rs` makes a server fit for the next client, `stats.rs` counts, `probe.rs`
//! watches upstreams. Called by `client/`.

pub(crate) mod alarm;
mod budget;
pub(crate) mod checkout;
mod limiter;
pub(crate) mod pools;
pub(crate) mod probe;
pub(crate) mod reset;
mod shelf;
pub(crate) mod stats;
