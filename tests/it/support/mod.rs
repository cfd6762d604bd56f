//! What the integration tests share. Nothing here asserts a feature of its own.

pub(crate) mod pg;
pub(crate) mod wait;
