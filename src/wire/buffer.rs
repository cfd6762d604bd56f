//! Read buffers that cost nothing while idle: a connection borrows a chunk from its thread when bytes arrive and gives
//! it back when all are consumed. Never looks at the bytes. Used by every connection, ours to clients and to servers.

use std::cell::RefCell;

/// One chunk: what a connection reads at once. 16 KiB holds a typical request or result; larger frames grow the buffer.
const CHUNK: usize = 16 * 1024;
/// A result that fills whole chunks is read in larger ones: fewer system calls per gigabyte.
const LARGE_CHUNK: usize = 128 * 1024;
/// Spare chunks kept a thread: enough for every connection with bytes in flight, 1 MiB at most.
const SPARES_MAX: usize = 64;
const LARGE_SPARES_MAX: usize = 8;

#[derive(Default)]
struct Spares {
    small: Vec<Box<[u8]>>,
    large: Vec<Box<[u8]>>,
}

thread_local! {
    // An allocator's free list, not state: no behaviour depends on it. Thread-local, since buffers stay with their thread.
    static SPARES: RefCell<Spares> = RefCell::new(Spares::default());
}

/// Bytes read and not consumed yet: `data[start..end]`.
#[derive(Default)]
pub(crate) struct ReadBuffer {
    data: Box<[u8]>,
    start: usize,
    end: usize,
    /// The last read filled all the room it was given: more is waiting.
    filled: bool,
}

impl ReadBuffer {
    pub(crate) fn bytes(&self) -> &[u8] {
        self.data.get(self.start..self.end).unwrap_or_default()
    }

    pub(crate) fn len(&self) -> usize {
        self.end - self.start
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.start == self.end
    }

    /// Drops `count` bytes from the front; the chunk goes back to the thread when nothing is left.
    pub(crate) fn consume(&mut self, count: usize) {
        self.start = (self.start + count).min(self.end);
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
            if !self.filled {
                self.give_back();
            }
        }
    }

    /// Drops `count` bytes that stand after the first `at`, which move up to what follows.
    pub(crate) fn cut_out(&mut self, at: usize, count: usize) {
        if at + count <= self.len() {
            self.data
                .copy_within(self.start..self.start + at, self.start + count);
            self.consume(count);
        }
    }

    /// Room to read into, at least one byte, and enough that a frame of `whole` bytes fits from the current start.
    pub(crate) fn room(&mut self, whole: usize) -> &mut [u8] {
        let wanted = whole.max(self.len() + 1);
        if self.data.is_empty() {
            self.data = borrow_chunk(if self.filled {
                LARGE_CHUNK.max(wanted)
            } else {
                wanted
            });
        } else if self.filled && self.is_empty() && self.data.len() < LARGE_CHUNK {
            self.give_back();
            self.data = borrow_chunk(LARGE_CHUNK);
        } else if self.start + wanted > self.data.len() || self.end == self.data.len() {
            if wanted > self.data.len() {
                let mut larger = borrow_chunk(wanted.next_power_of_two());
                let length = self.len();
                if let Some(front) = larger.get_mut(..length) {
                    front.copy_from_slice(self.bytes());
                }
                self.give_back();
                self.data = larger;
                self.end = length;
            } else {
                self.data.copy_within(self.start..self.end, 0);
                self.end -= self.start;
            }
            self.start = 0;
        }
        self.data.get_mut(self.end..).unwrap_or_default()
    }

    /// `count` bytes of the room were filled by a read.
    pub(crate) fn advance(&mut self, count: usize) {
        self.end = (self.end + count).min(self.data.len());
        self.filled = self.end == self.data.len();
    }

    /// Gives the chunk back if nothing is in it; called before a connection goes idle.
    pub(crate) fn rest(&mut self) {
        self.filled = false;
        if self.is_empty() {
            self.give_back();
        }
    }

    fn give_back(&mut self) {
        self.start = 0;
        self.end = 0;
        let chunk = std::mem::take(&mut self.data);
        // A thread that is ending has no list left; then the chunk is simply freed.
        let _kept = SPARES.try_with(|spares| {
            let mut spares = spares.borrow_mut();
            if chunk.len() == CHUNK && spares.small.len() < SPARES_MAX {
                spares.small.push(chunk);
            } else if chunk.len() == LARGE_CHUNK && spares.large.len() < LARGE_SPARES_MAX {
                spares.large.push(chunk);
            }
        });
    }
}

impl Drop for ReadBuffer {
    fn drop(&mut self) {
        if !self.data.is_empty() {
            self.give_back();
        }
    }
}

fn borrow_chunk(wanted: usize) -> Box<[u8]> {
    let spare = SPARES.try_with(|spares| {
        let mut spares = spares.borrow_mut();
        if wanted <= CHUNK {
            spares.small.pop()
        } else if wanted <= LARGE_CHUNK {
            spares.large.pop()
        } else {
            None
        }
    });
    let size = if wanted <= CHUNK {
        CHUNK
    } else {
        wanted.max(LARGE_CHUNK)
    };
    spare
        .ok()
        .flatten()
        .unwrap_or_else(|| vec![0; size].into_boxed_slice())
}

#[cfg(test)]
#[expect(clippy::indexing_slicing, reason = "a test may panic")]
mod tests {
    use super::*;

    #[test]
    fn what_is_cut_out_is_gone_and_the_rest_stays_in_order() {
        let mut buffer = ReadBuffer::default();
        let bytes = b"gone-kept-cut-rest";
        buffer.room(bytes.len())[..bytes.len()].copy_from_slice(bytes);
        buffer.advance(bytes.len());
        buffer.consume(5);
        buffer.cut_out(5, 4);
        assert_eq!(buffer.bytes(), b"kept-rest");
        buffer.cut_out(5, 5);
        assert_eq!(buffer.bytes(), b"kept-rest", "more than there is");
        buffer.cut_out(5, 4);
        buffer.cut_out(0, 5);
        assert!(buffer.is_empty());
    }

    #[test]
    fn bytes_survive_growth_and_compaction() {
        let mut buffer = ReadBuffer::default();
        let mut expected = Vec::new();
        let mut next = 0u8;
        for round in 0..2_000usize {
            let room = buffer.room(if round % 97 == 0 { 40_000 } else { 1 });
            let count = room.len().min(1 + round % 333);
            for byte in &mut room[..count] {
                *byte = next;
                expected.push(next);
                next = next.wrapping_add(1);
            }
            buffer.advance(count);
            let eaten = (round * 7) % (buffer.len() + 1);
            assert_eq!(buffer.bytes(), &expected[..], "round {round}");
            buffer.consume(eaten);
            expected.drain(..eaten);
        }
    }

    #[test]
    fn an_empty_buffer_holds_no_chunk() {
        let mut buffer = ReadBuffer::default();
        buffer.room(1);
        buffer.advance(10);
        buffer.consume(10);
        assert!(buffer.data.is_empty());
    }
}
