//! Integration tests: one binary, one lazily started primary and replica; one file a feature.

mod embedded;
mod support;
