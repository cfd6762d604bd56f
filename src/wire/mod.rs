//! The Postgres wire protocol: frames, the few messages we read or write ourselves, byte streams and their buffers.
//! Imports nothing of ours, knows nothing of sessions or pools; every other band speaks through it.
//!
//! Why not `pgwire` here: its decoders trust inner lengths and re-encode what we forward as bytes; what we build
//! ourselves is a dozen fixed shapes, each a few lines, appended to a buffer that already exists.
#![warn(clippy::indexing_slicing, clippy::cast_possible_truncation)]

pub(crate) mod buffer;
pub(crate) mod certificate;
pub(crate) mod error_response;
pub(crate) mod frame;
pub(crate) mod messages;
pub(crate) mod proxy_header;
pub(crate) mod quote;
pub(crate) mod scram;
pub(crate) mod startup;
pub(crate) mod stream;
