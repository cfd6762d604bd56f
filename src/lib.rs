//! Flowgate: a Postgres wire-protocol proxy that understands pgflow. This file is the map.
//!
//! **A client connection.** `client/accept` (a task a client) → `client/startup` (TLS, login, ends in a session) →
//! `client/session`, the loop: `client/request` groups frames into one request → `classify` says what its text is →
//! `route` says where it goes → `pool` lends a server → `relay` carries bytes both ways until ReadyForQuery → the server
//! goes back clean, or is closed.
//!
//! **An event.** `realtime.send` writes the outbox and wakes `events/upstream` (one connection a database) →
//! `events/hub` → each subscriber's bounded queue → `client/session` writes the frame between requests.
//!
//! **Upkeep.** `maintenance` requeues stalled tasks, turns over the outbox's partitions and prunes old runs, over a connection
//! that holds a lock, so that one flowgate a database does it.
//!
//! Imports point down, band by band (`tests/architecture.rs` holds it).

// Band 0: vocabulary. Imports nothing of ours.
pub mod config;
pub mod metrics;
pub mod pgflow;
pub mod wire;

// Band 1: facts.
pub mod classify;
pub mod server;
pub mod upstream;

// Band 2: mechanisms, strangers to each other.
pub mod cancel;
pub mod coalesce;
pub mod events;
pub mod park;
pub mod pool;
pub mod relay;
pub mod route;

// Band 3: flows, where mechanisms meet.
pub mod client;
pub mod embedded;
pub mod http;
mod maintenance;
pub mod schema;

// Band 4: assembly.
pub mod app;

// Band 5: what one types.
pub mod commands;

// Not part of the proxy: what reads bytes from outside, for the fuzzer.
#[cfg(any(test, feature = "fuzz"))]
pub mod fuzz;
