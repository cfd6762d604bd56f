//! Answers we give ourselves, message for message as Postgres would. Writes into the client's output; sends nothing.

use crate::client::request::frames;
use crate::wire::frame::HEADER;
use crate::wire::messages::{
    Target, TxStatus, put_command_complete, put_empty, put_frame, put_ready,
};

/// CommandComplete and ReadyForQuery: a simple Query without rows, outside a transaction.
pub(super) fn put_command(out: &mut Vec<u8>, tag: &str) {
    put_command_complete(out, tag);
    put_ready(out, TxStatus::Idle);
}

/// The answers to Parse…Sync of a command that takes no parameters and returns no rows.
pub(super) fn put_batch(out: &mut Vec<u8>, batch: &[u8], tag: &str) {
    for (header, frame) in frames(batch) {
        match header.tag {
            b'P' => put_empty(out, b'1'),
            b'B' => put_empty(out, b'2'),
            b'C' => put_empty(out, b'3'),
            b'D' => {
                let target = Target::read(frame.get(HEADER..).unwrap_or_default());
                if target.is_some_and(|target| target.kind == b'S') {
                    put_frame(out, b't', |out| out.extend_from_slice(&[0, 0]));
                }
                put_empty(out, b'n');
            }
            b'E' => put_command_complete(out, tag),
            b'S' => put_ready(out, TxStatus::Idle),
            _ => {}
        }
    }
}
