//! One client's life: accept, startup, then the session loop where every mechanism meets. Nothing below knows of it.

pub(crate) mod accept;
mod access;
mod auth;
mod console;
mod entrance;
mod error;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod fuzz;
mod habits;
pub(crate) mod live;
mod peers;
mod prepared;
mod proxy;
mod replication;
mod reply;
mod request;
pub(crate) mod roster;
mod run_tokens;
mod session;
pub(crate) mod shared;
mod startup;
mod state;
mod survey;
mod tls;
pub mod verifiers;

pub(crate) use entrance::Entrance;
pub(crate) use habits::Habits;
pub(crate) use peers::Peers;
pub(crate) use prepared::StatementRegistry;
pub(crate) use replication::Replications;
pub(crate) use run_tokens::RunTokens;
pub(crate) use verifiers::Verifiers;
