//! A frame: one tag byte, four bytes of length (counting themselves), a body. Reads headers, never bodies.
//! (protocol-message-formats.html; the length limits are those of `src/backend/tcop/postgres.c`, `SocketBackend`.)

use thiserror::Error;

/// Tag and length, five bytes.
pub(crate) const HEADER: usize = 5;

/// `PQ_LARGE_MESSAGE_LIMIT`: one byte less than Postgres's largest allocation.
const LARGE_MAX: usize = 0x3fff_fffe;
/// `PQ_SMALL_MESSAGE_LIMIT`.
const SMALL_MAX: usize = 10_000;

/// A frame's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) tag: u8,
    /// Bytes of the whole frame, tag included; at least `HEADER`.
    pub(crate) whole: usize,
}

/// What a header can have wrong.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum FrameError {
    #[error("invalid frontend message type {0}")]
    Tag(u8),
    #[error("invalid message length")]
    Length,
}

impl Header {
    /// The header at the front of `bytes`; `None` while fewer than five are there or the length is below four.
    pub(crate) fn peek(bytes: &[u8]) -> Option<Self> {
        let (head, _) = bytes.split_first_chunk::<HEADER>()?;
        let [tag, length @ ..] = *head;
        let length = u32::from_be_bytes(length);
        (length >= 4).then_some(Self {
            tag,
            whole: length as usize + 1,
        })
    }

    /// The header of a message from a client, held to the tags and lengths Postgres accepts.
    pub(crate) fn from_client(bytes: &[u8]) -> Result<Option<Self>, FrameError> {
        let Some(&tag) = bytes.first() else {
            return Ok(None);
        };
        let longest = match tag {
            b'Q' | b'F' | b'B' | b'P' | b'd' | b'p' => LARGE_MAX,
            b'X' | b'C' | b'D' | b'E' | b'H' | b'S' | b'c' | b'f' => SMALL_MAX,
            unknown => return Err(FrameError::Tag(unknown)),
        };
        let Some((head, _)) = bytes.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let [_, length @ ..] = *head;
        let length = u32::from_be_bytes(length) as usize;
        if (4..=longest).contains(&length) {
            Ok(Some(Self {
                tag,
                whole: length + 1,
            }))
        } else {
            Err(FrameError::Length)
        }
    }

    /// Bytes that must be there before a client's message can be acted on: all of it, or the part of a huge one that
    /// holds its names; the rest is streamed.
    pub(crate) fn window(self) -> usize {
        if self.whole <= HELD_MAX {
            self.whole
        } else {
            PREFIX
        }
    }

    pub(crate) fn is_huge(self) -> bool {
        self.whole > HELD_MAX
    }
}

/// Messages up to this size are held whole before anything is done with them.
pub(crate) const HELD_MAX: usize = 1024 * 1024;
/// What is read of a larger one before it is streamed.
const PREFIX: usize = 64 * 1024;

/// The body of the frame at the front of `bytes`, once all of it is there.
pub(crate) fn body(bytes: &[u8], header: Header) -> Option<&[u8]> {
    bytes.get(HEADER..header.whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_header_is_checked_as_postgres_checks_it() {
        assert_eq!(Header::from_client(b""), Ok(None));
        assert_eq!(Header::from_client(b"Q\0\0"), Ok(None));
        assert_eq!(
            Header::from_client(b"Q\0\0\0\x05"),
            Ok(Some(Header {
                tag: b'Q',
                whole: 6
            }))
        );
        assert_eq!(Header::from_client(b"Q\0\0\0\x03"), Err(FrameError::Length));
        assert_eq!(
            Header::from_client(b"S\0\0\xff\xff"),
            Err(FrameError::Length)
        );
        assert_eq!(
            Header::from_client(b"Q\x7f\xff\xff\xff"),
            Err(FrameError::Length)
        );
        assert_eq!(Header::from_client(b"z"), Err(FrameError::Tag(b'z')));
    }
}
