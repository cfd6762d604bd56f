//! Server connections and who may use them: one pool per (database, user, upstream). Knows nothing of SQL or pgflow.
//! `checkout.rs` lends, `shelf.rs` keeps the books, `reset.rs` makes a server fit for the next client, `probe.rs` watches
//! upstreams. Called by `client/`.

pub(crate) mod checkout;
pub(crate) mod probe;
pub(crate) mod reset;
mod shelf;
