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

/// Follows the frames of a stream that is passed on as it comes: where it stands, and of what kind each was.
#[derive(Default)]
pub(crate) struct Follower {
    header: [u8; HEADER],
    /// How much of `header` has come.
    have: usize,
    /// Bytes of the body still to come.
    left: usize,
}

impl Follower {
    /// `bytes` passed by; `began` is told the tag of every frame that began among them. False: they are no frames.
    pub(crate) fn pass(&mut self, mut bytes: &[u8], mut began: impl FnMut(u8)) -> bool {
        while !bytes.is_empty() {
            let body = self.left.min(bytes.len());
            self.left -= body;
            bytes = bytes.get(body..).unwrap_or_default();
            let missing = self.header.get_mut(self.have..).unwrap_or_default();
            let count = missing.len().min(bytes.len());
            let (now, later) = bytes.split_at(count);
            missing
                .iter_mut()
                .zip(now)
                .for_each(|(slot, byte)| *slot = *byte);
            self.have += count;
            bytes = later;
            if self.have == HEADER {
                let Some(header) = Header::peek(&self.header) else {
                    return false;
                };
                self.have = 0;
                self.left = header.whole - HEADER;
                began(header.tag);
            }
        }
        true
    }

    /// Between two frames.
    pub(crate) fn is_between(&self) -> bool {
        self.have == 0 && self.left == 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_followed_however_they_are_cut() {
        let stream = b"Z\0\0\0\x05IW\0\0\0\x07\0\0\0d\0\0\0\x0babcdefgc\0\0\0\x04";
        for step in 1..=stream.len() {
            let (mut follower, mut tags, mut passed) = (Follower::default(), Vec::new(), 0);
            for part in stream.chunks(step) {
                assert!(follower.pass(part, |tag| tags.push(tag)));
                passed += part.len();
                let between = [6, 14, 26, 31].contains(&passed);
                assert_eq!(follower.is_between(), between, "{step} {passed}");
            }
            assert_eq!(tags, b"ZWdc");
        }
        assert!(!Follower::default().pass(b"Z\0\0\0\x03", |_| ()));
    }

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
