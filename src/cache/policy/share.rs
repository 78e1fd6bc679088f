//! What one of several caches of a space was promised.

/// Counts are in blocks. Who has how much says `curve::partition`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// Reserved.
    pub min: u64,
    pub max: u64,
    /// Part of what is not reserved, relative to other owners; at least 1.
    pub weight: u32,
}
