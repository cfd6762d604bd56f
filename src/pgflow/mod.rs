//! What pgflow is, as tables and spellings: its functions, tables, channels and ids. Every name that SQL and Rust share
//! is spelled here once. Never talks to anybody, never reads a clock. Used by `classify`, `events` and `schema`.

pub mod events;
pub mod functions;
pub mod ids;
pub mod snapshot;
pub mod tables;
