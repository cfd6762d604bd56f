//! Integration tests: one binary, one lazily started primary and replica; one file a feature.

#![expect(
    clippy::unwrap_used,
    reason = "tests panic; clippy exempts only the test functions themselves"
)]

mod access;
mod auth;
mod console;
mod core;
mod core14;
#[cfg(feature = "demo")]
mod demo;
mod dirt;
mod embedded;
mod events;
mod follow;
mod hostile;
mod http;
mod http_jwks;
mod http_realtime;
mod http_rest;
mod listening;
mod maintenance;
mod parking;
mod parking_faults;
mod pools;
mod protocol;
mod reads;
mod reload;
mod replication;
mod resuming;
mod schema;
mod session;
mod sharing;
mod sharing_fuzz;
mod shedding;
mod spellings;
mod support;
mod tls;
mod transcripts;
mod wake;
