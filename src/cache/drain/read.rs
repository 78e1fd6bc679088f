//! Reading the log for draining: in order, with read-ahead, a batch at a time.

use super::{DrainHost, LogCursor, LogStretch};
use crate::cache::record::{Bad, Batch};
use crate::io::buffer::PinnedBuffer;
use crate::io::disk::{Errno, Operation, OperationKind};
use crate::io::volume::DiskIndex;
use std::collections::VecDeque;

/// Bytes of one read at most.
const READ_BYTES: usize = 1 << 20;

/// Reads under way at most: one is worked on while the other comes.
pub(super) const READS_MAX: usize = 2;

const FLASH: DiskIndex = DiskIndex(0);

/// A read under way, or done and not yet taken.
struct Read {
    token: u32,
    length: usize,
    result: Option<Result<(), Errno>>,
    buffer: PinnedBuffer,
}

/// What there is at the cursor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// A whole batch, of so many bytes.
    Batch(usize),
    /// Reads are under way.
    Wait,
    /// Nothing more is committed.
    End,
    /// What lies there is no batch of this log.
    Bad,
    /// The flash failed to read.
    Failed(Errno),
}

/// See the module.
#[derive(Default)]
pub(super) struct LogReader {
    /// Where `window` begins.
    cursor: LogCursor,
    salt: u64,
    window: Vec<u8>,
    /// Bytes of the window that lie behind.
    behind: usize,
    /// Where the next read begins.
    ahead: LogCursor,
    reads: VecDeque<Read>,
    spare: Vec<PinnedBuffer>,
}

impl LogReader {
    /// Goes to `cursor`. No read is under way.
    pub(super) fn seek(&mut self, cursor: LogCursor) {
        assert!(!self.is_busy(), "reads have ended");
        self.recycle();
        self.window.clear();
        (self.cursor, self.ahead, self.behind) = (cursor, cursor, 0);
    }

    /// Gives memory back while there is nothing to do.
    pub(super) fn release(&mut self) {
        if !self.is_busy() {
            let cursor = self.cursor;
            self.seek(cursor);
            self.window = Vec::new();
            self.spare.truncate(1);
        }
    }

    /// Where the batch at the front begins.
    pub(super) fn cursor(&self) -> LogCursor {
        self.cursor
    }

    /// Reads are under way.
    pub(super) fn is_busy(&self) -> bool {
        self.reads.iter().any(|read| read.result.is_none())
    }

    fn recycle(&mut self) {
        let buffers = self.reads.drain(..).map(|read| read.buffer);
        self.spare.extend(buffers);
        self.spare.truncate(READS_MAX);
    }

    /// What lies at the cursor; keeps reading ahead.
    pub(super) fn next(&mut self, host: &mut dyn DrainHost) -> Next {
        loop {
            if let Some(errno) = self.take() {
                return Next::Failed(errno);
            }
            let reading = self.read_ahead(host);
            let rest = &self.window[self.behind..];
            let missing = match Batch::decode(rest, self.salt) {
                _ if rest.is_empty() => true,
                Ok(batch) if batch.header.batch_bytes as usize <= rest.len() => {
                    return Next::Batch(batch.header.batch_bytes as usize);
                }
                Ok(_) | Err(Bad::Short(_)) => true,
                Err(_) => false,
            };
            match (missing, reading) {
                (false, _) => return Next::Bad,
                (true, true) => return Next::Wait,
                (true, false) if !rest.is_empty() => return Next::Bad,
                (true, false) => {}
            }
            match host.log(self.ahead) {
                LogStretch::Next(cursor) => self.seek(cursor),
                _ => return Next::End,
            }
        }
    }

    /// The batch at the cursor, `length` bytes, as [`Next::Batch`] said, and its salt.
    pub(super) fn batch(&self, length: usize) -> (&[u8], u64) {
        (&self.window[self.behind..self.behind + length], self.salt)
    }

    /// Goes on behind the batch at the cursor.
    pub(super) fn advance(&mut self, length: usize) {
        self.behind += length;
        self.cursor.offset += length as u64;
        if self.behind > READ_BYTES || self.behind == self.window.len() {
            self.window.drain(..self.behind);
            self.behind = 0;
        }
    }

    /// Takes over what has been read, in order; the error of a read that failed.
    fn take(&mut self) -> Option<Errno> {
        while let Some(result) = self.reads.front().and_then(|read| read.result) {
            let read = self.reads.pop_front().expect("it was just seen");
            if let Err(errno) = result {
                self.spare.push(read.buffer);
                return Some(errno);
            }
            let filled = self.window.len();
            self.window.resize(filled + read.length, 0);
            read.buffer.segment().copy_to(&mut self.window[filled..]);
            self.spare.push(read.buffer);
        }
        None
    }

    /// Submits reads of the segment; whether any is under way or waits to be taken.
    fn read_ahead(&mut self, host: &mut dyn DrainHost) -> bool {
        while self.reads.len() < READS_MAX && self.window.len() - self.behind < READ_BYTES {
            let LogStretch::Batches { offset, length, salt } = host.log(self.ahead) else { break };
            self.salt = salt;
            let (place, together) = host.place(offset, length.min(READ_BYTES as u64));
            let buffer = self.spare.pop().unwrap_or_else(|| PinnedBuffer::new(READ_BYTES));
            let segments = [buffer.segment().part(0, together as usize)];
            let token = (0..).find(|token| self.reads.iter().all(|read| read.token != *token));
            let token = token.expect("there are more numbers than reads");
            let length = together as usize;
            self.reads.push_back(Read { token, length, result: None, buffer });
            self.ahead.offset += together;
            let kind = OperationKind::Read;
            let read = Operation { kind, offset: place, length: together, segments: &segments };
            host.submit(FLASH, read, token);
        }
        !self.reads.is_empty()
    }

    /// A read has ended.
    pub(super) fn completed(&mut self, token: u32, result: Result<(), Errno>) {
        let read = self.reads.iter_mut().find(|read| read.token == token);
        let read = read.expect("a completion belongs to a read under way");
        assert_eq!(read.result, None, "a read ends once");
        read.result = Some(result);
    }
}
