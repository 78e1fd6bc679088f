//! A place in a list of segments, to copy from and to piece by piece.

use crate::io::buffer::Segment;

/// Walks segments in order. What it copies is a private copy: guest memory may change meanwhile.
pub(super) struct Cursor<'a> {
    segments: &'a [Segment],
    /// Bytes of the first segment that lie behind.
    inside: usize,
}

impl<'a> Cursor<'a> {
    /// Begins `skip` bytes into `segments`.
    pub(super) fn new(segments: &'a [Segment], skip: usize) -> Self {
        let mut cursor = Self { segments, inside: 0 };
        cursor.advance(skip, |_| {});
        cursor
    }

    /// Visits the next `length` bytes, or as many as are left.
    fn advance(&mut self, length: usize, mut visit: impl FnMut(Segment)) {
        let mut left = length;
        while let Some(first) = self.segments.first() {
            let part = first.part(self.inside, left);
            if part.length() > 0 {
                visit(part);
            }
            left -= part.length();
            self.inside += part.length();
            if self.inside < first.length() {
                return;
            }
            self.segments = &self.segments[1..];
            self.inside = 0;
        }
    }

    /// Copies the next bytes into all of `target`; fewer if the segments end.
    pub(super) fn copy_to(&mut self, target: &mut [u8]) {
        let mut done = 0;
        self.advance(target.len(), |part| done += part.copy_to(&mut target[done..]));
    }

    /// Copies all of `source` into the next bytes.
    pub(super) fn copy_from(&mut self, source: &[u8]) {
        let mut done = 0;
        self.advance(source.len(), |part| done += part.copy_from(&source[done..]));
    }

    /// Zeroes the next `length` bytes.
    pub(super) fn zero(&mut self, length: usize) {
        self.advance(length, |part| part.zero());
    }

    /// Appends the next `length` bytes as segments.
    pub(super) fn take(&mut self, length: usize, parts: &mut Vec<Segment>) {
        self.advance(length, |part| parts.push(part));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::io::buffer::PinnedBuffer;

    #[test]
    fn a_cursor_walks_over_the_edges_of_segments() {
        let buffer = PinnedBuffer::new(4096);
        buffer.segment().copy_from(b"abcdefgh");
        let whole = buffer.segment();
        let segments = [whole.part(0, 3), whole.part(3, 0), whole.part(3, 5)];
        let mut cursor = Cursor::new(&segments, 2);
        let mut target = [0; 3];
        cursor.copy_to(&mut target);
        assert_eq!(&target, b"cde");
        let mut parts = Vec::new();
        Cursor::new(&segments, 1).take(4, &mut parts);
        assert_eq!(parts.iter().map(Segment::length).collect::<Vec<_>>(), [2, 2]);
        cursor.copy_from(b"XY");
        Cursor::new(&segments, 0).zero(1);
        let mut bytes = [0; 8];
        whole.copy_to(&mut bytes);
        assert_eq!(&bytes, b"\0bcdeXYh");
    }
}
