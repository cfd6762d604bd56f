//! Groups a client's frames into requests. A request is what ends in one ReadyForQuery: a Query, a FunctionCall, or
//! Parse…Sync; one that is flushed, or too large to hold, comes in parts. Looks at headers only. Pure; called by
//! `session/` with whatever the client's input holds.

use crate::wire::frame::{FrameError, Header};

/// An extended request is gathered up to this size; beyond, it goes on in parts.
const GATHERED_MAX: usize = 256 * 1024;

/// What stands at the front of a client's input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unit {
    /// More must be read; room for so many bytes from the front.
    Incomplete {
        needed: usize,
    },
    Query(Header),
    FunctionCall(Header),
    /// Messages of the extended protocol, `len` bytes of them.
    Batch {
        len: usize,
        end: BatchEnd,
    },
    /// CopyData, CopyDone or CopyFail with no COPY under way: ignored, as Postgres does, since a client may not have
    /// noticed yet that its COPY failed. (protocol-flow.html#PROTOCOL-COPY)
    Stray(Header),
    Terminate,
}

/// How a batch ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BatchEnd {
    Sync,
    /// Flush, or as much as is held at once: to be sent now, and the request goes on.
    Flush,
    /// Its last message is so large that only its beginning is here; it is `whole` bytes long and starts at `at`.
    Huge {
        at: usize,
        whole: usize,
    },
}

/// Remembers how far an unfinished batch has been looked through.
#[derive(Default)]
pub(crate) struct Grouping {
    scanned: usize,
}

impl Grouping {
    /// What stands at the front of `bytes`. The same bytes, and more, are expected again after `Incomplete`.
    pub(crate) fn next(&mut self, bytes: &[u8]) -> Result<Unit, FrameError> {
        let mut at = std::mem::take(&mut self.scanned);
        loop {
            let rest = bytes.get(at..).unwrap_or_default();
            let Some(header) = Header::from_client(rest)? else {
                self.scanned = at;
                return Ok(Unit::Incomplete { needed: at + 1 });
            };
            if at == 0 {
                match header.tag {
                    b'Q' => return Ok(self.whole(bytes, header, Unit::Query(header))),
                    b'F' => return Ok(self.whole(bytes, header, Unit::FunctionCall(header))),
                    b'd' | b'c' | b'f' => {
                        return Ok(self.whole(bytes, header, Unit::Stray(header)));
                    }
                    b'X' => return Ok(Unit::Terminate),
                    // A password message outside a login: Postgres calls it an invalid type.
                    b'p' => return Err(FrameError::Tag(b'p')),
                    _ => {}
                }
            }
            match header.tag {
                b'P' | b'B' | b'D' | b'E' | b'C' | b'S' | b'H' => {}
                // Another kind of request in the middle of one without its Sync: what came before goes first.
                _ => {
                    return Ok(Unit::Batch {
                        len: at,
                        end: BatchEnd::Flush,
                    });
                }
            }
            if rest.len() < header.window() {
                self.scanned = at;
                return Ok(Unit::Incomplete {
                    needed: at + header.window(),
                });
            }
            if header.is_huge() {
                return Ok(Unit::Batch {
                    len: bytes.len().min(at + header.whole),
                    end: BatchEnd::Huge {
                        at,
                        whole: header.whole,
                    },
                });
            }
            at += header.whole;
            match header.tag {
                b'S' => {
                    return Ok(Unit::Batch {
                        len: at,
                        end: BatchEnd::Sync,
                    });
                }
                b'H' => {
                    return Ok(Unit::Batch {
                        len: at,
                        end: BatchEnd::Flush,
                    });
                }
                _ if at >= GATHERED_MAX => {
                    return Ok(Unit::Batch {
                        len: at,
                        end: BatchEnd::Flush,
                    });
                }
                _ => {}
            }
        }
    }

    /// The same inside an open request: messages are taken as they come, not only at a Sync or Flush.
    pub(crate) fn next_open(&mut self, bytes: &[u8]) -> Result<Unit, FrameError> {
        match self.next(bytes)? {
            Unit::Incomplete { needed } => match std::mem::take(&mut self.scanned) {
                0 => Ok(Unit::Incomplete { needed }),
                len => Ok(Unit::Batch {
                    len,
                    end: BatchEnd::Flush,
                }),
            },
            unit => Ok(unit),
        }
    }

    fn whole(&mut self, bytes: &[u8], header: Header, unit: Unit) -> Unit {
        if bytes.len() < header.window() {
            Unit::Incomplete {
                needed: header.window(),
            }
        } else {
            unit
        }
    }
}

/// The frames of a batch, each with its header; a huge last one only as far as it is there.
pub(crate) fn frames(batch: &[u8]) -> impl Iterator<Item = (Header, &[u8])> {
    let mut rest = batch;
    std::iter::from_fn(move || {
        let header = Header::peek(rest)?;
        let (frame, after) = rest.split_at(header.whole.min(rest.len()));
        rest = after;
        Some((header, frame))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(tag: u8, body: usize) -> Vec<u8> {
        let mut frame = vec![tag];
        frame.extend_from_slice(&u32::try_from(body + 4).unwrap().to_be_bytes());
        frame.resize(5 + body, 0);
        frame
    }

    fn next(frames: &[Vec<u8>]) -> Result<Unit, FrameError> {
        Grouping::default().next(&frames.concat())
    }

    #[test]
    fn a_request_ends_at_its_sync_or_flush() {
        let parse_bind = [frame(b'P', 10), frame(b'B', 10)];
        assert_eq!(next(&parse_bind), Ok(Unit::Incomplete { needed: 31 }));
        let whole = [parse_bind.to_vec(), vec![frame(b'S', 0), frame(b'Q', 1)]].concat();
        assert_eq!(
            next(&whole),
            Ok(Unit::Batch {
                len: 35,
                end: BatchEnd::Sync
            })
        );
        let flushed = [parse_bind.to_vec(), vec![frame(b'H', 0)]].concat();
        assert_eq!(
            next(&flushed),
            Ok(Unit::Batch {
                len: 35,
                end: BatchEnd::Flush
            })
        );
        let cut_short = [parse_bind.to_vec(), vec![frame(b'Q', 1)]].concat();
        assert_eq!(
            next(&cut_short),
            Ok(Unit::Batch {
                len: 30,
                end: BatchEnd::Flush
            })
        );
    }

    #[test]
    fn every_cut_of_a_request_is_incomplete_until_its_end() {
        let bytes = [
            frame(b'P', 10),
            frame(b'D', 2),
            frame(b'E', 5),
            frame(b'S', 0),
        ]
        .concat();
        let mut grouping = Grouping::default();
        for cut in 0..bytes.len() {
            assert!(
                matches!(grouping.next(&bytes[..cut]), Ok(Unit::Incomplete { .. })),
                "{cut}"
            );
        }
        assert_eq!(
            grouping.next(&bytes),
            Ok(Unit::Batch {
                len: bytes.len(),
                end: BatchEnd::Sync
            })
        );
    }

    #[test]
    fn huge_messages_come_by_their_beginning() {
        let mut bytes = frame(b'P', 10);
        bytes.push(b'B');
        bytes.extend_from_slice(&(100_000_000u32).to_be_bytes());
        assert!(matches!(
            Grouping::default().next(&bytes),
            Ok(Unit::Incomplete { .. })
        ));
        bytes.resize(15 + 64 * 1024, 0);
        let end = BatchEnd::Huge {
            at: 15,
            whole: 100_000_001,
        };
        assert_eq!(
            Grouping::default().next(&bytes),
            Ok(Unit::Batch {
                len: bytes.len(),
                end
            })
        );
    }

    #[test]
    fn strays_and_nonsense_are_told_apart() {
        assert!(matches!(next(&[frame(b'd', 3)]), Ok(Unit::Stray(_))));
        assert_eq!(next(&[frame(b'X', 0)]), Ok(Unit::Terminate));
        assert_eq!(next(&[frame(b'p', 3)]), Err(FrameError::Tag(b'p')));
        assert_eq!(next(&[frame(b'!', 3)]), Err(FrameError::Tag(b'!')));
    }
}
