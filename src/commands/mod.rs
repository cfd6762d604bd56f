//! What one types: each file is one command. Nothing below knows of them.

pub mod check_config;
#[cfg(feature = "demo")]
pub mod demo;
mod descriptors;
pub mod follow;
pub mod install;
mod picture;
mod screen;
pub mod serve;
