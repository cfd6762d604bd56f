//! Integration tests: one binary, one lazily started primary and replica; one file a feature.

#![expect(
    clippy::unwrap_used,
    reason = "tests panic; clippy exempts only the test functions themselves"
)]

mod auth;
mod console;
#[cfg(feature = "demo")]
mod demo;
mod embedded;
mod events;
mod hostile;
mod pools;
mod protocol;
mod reads;
mod reload;
mod schema;
mod session;
mod support;
mod transcripts;
