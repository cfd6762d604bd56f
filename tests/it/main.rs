//! Integration tests: one binary, one lazily started primary and replica; one file a feature.

#![expect(
    clippy::unwrap_used,
    reason = "tests panic; clippy exempts only the test functions themselves"
)]

mod embedded;
mod protocol;
mod schema;
mod support;
mod transcripts;
