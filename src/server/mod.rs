//! Connections to Postgres: dialling, TLS, login, and what is known of one that is open. Never decides who uses it;
//! `pool` does. Says nothing to clients.

pub(crate) mod auth;
pub(crate) mod chorus;
pub(crate) mod conn;
pub(crate) mod connect;
pub(crate) mod control;
pub(crate) mod parameters;
pub(crate) mod questions;
pub(crate) mod settings;
pub(crate) mod tls;
