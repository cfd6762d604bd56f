//! What one types: each file is one command. Nothing below knows of them.

pub mod check_config;
#[cfg(feature = "demo")]
pub mod demo;
pub mod install;
pub mod serve;
