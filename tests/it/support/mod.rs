//! What the integration tests share. Nothing here asserts a feature of its own.

// Each test binary uses its part of this.
#![allow(dead_code, reason = "shared by several test binaries")]

pub(crate) mod certs;
pub(crate) mod chance;
pub(crate) mod core;
pub(crate) mod follower;
pub(crate) mod http;
pub(crate) mod pg;
pub(crate) mod proxy;
pub(crate) mod raw;
pub(crate) mod script;
pub(crate) mod wait;
