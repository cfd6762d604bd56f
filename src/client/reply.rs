//! Answers we give ourselves, message for message as Postgres would. Writes into the client's output; sends nothing.

use crate::client::request::frames;
use crate::wire::frame::HEADER;
use crate::wire::messages::{
    Described, Target, TxStatus, put_columns, put_command_complete, put_empty, put_frame,
    put_ready, put_row,
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

/// Of type `text`, the same in text and binary.
const EXPLAINED: Described<'static> = Described {
    name: "QUERY PLAN",
    oid: 25,
    size: -1,
    format: 0,
};

/// Rows as EXPLAIN gives them, to CommandComplete.
pub(super) fn put_explanation(out: &mut Vec<u8>, lines: &[String]) {
    put_columns(out, [EXPLAINED].into_iter());
    put_explained_rows(out, lines);
}

fn put_explained_rows(out: &mut Vec<u8>, lines: &[String]) {
    for line in lines {
        put_row(out, [Some(line.clone().into_bytes())].into_iter());
    }
    put_command_complete(out, "EXPLAIN");
}

/// The answers to Parse…Sync of an EXPLAIN.
pub(super) fn put_explained_batch(out: &mut Vec<u8>, batch: &[u8], lines: &[String], tx: TxStatus) {
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
                put_columns(out, [EXPLAINED].into_iter());
            }
            b'E' => put_explained_rows(out, lines),
            b'S' => put_ready(out, tx),
            _ => {}
        }
    }
}
