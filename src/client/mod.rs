//! One client's life: accept, startup, then the session loop where every mechanism meets. Nothing below knows of it.

pub(crate) mod accept;
mod auth;
mod console;
mod error;
pub(crate) mod live;
mod prepared;
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

pub(crate) use prepared::StatementRegistry;
pub(crate) use run_tokens::RunTokens;
pub(crate) use tls::acceptor;
pub(crate) use verifiers::Verifiers;
