//! Units of the data path: bytes, sectors, extents, and how people write sizes.

use std::fmt;

/// The unit of virtio-blk requests and of every guest-visible address, in bytes.
/// Virtio 1.2, 5.2.4: "capacity … in 512-byte sectors", whatever the block size.
pub const SECTOR_BYTES: u64 = 512;

/// What the pool is divided into, in bytes.
pub const EXTENT_BYTES: u64 = 1 << 20;

pub const KIB: u64 = 1 << 10;
pub const MIB: u64 = 1 << 20;
pub const GIB: u64 = 1 << 30;
pub const TIB: u64 = 1 << 40;
pub const PIB: u64 = 1 << 50;

const SUFFIXES: [(&str, u64); 5] =
    [("PiB", PIB), ("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)];

/// A size in bytes, written by people with binary suffixes: `64GiB`, `512MiB`, `1.5TiB`, `4096`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bytes(pub u64);

impl Bytes {
    /// Parses a size; `Err` says what to write instead.
    pub fn parse(text: &str) -> Result<Self, String> {
        let text = text.trim();
        let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
        let (number, suffix) = text.split_at(digits);
        let unit = match suffix.trim_start() {
            "" | "B" => 1,
            suffix => match SUFFIXES.iter().find(|(name, _)| *name == suffix) {
                Some((_, unit)) => *unit,
                None => return Err(unknown_suffix(text, number, suffix)),
            },
        };
        let invalid = || format!("`{text}` is not a size: write a number and KiB, MiB, GiB or TiB");
        let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
        let whole: u64 = whole.parse().map_err(|_| invalid())?;
        let bytes = whole.checked_mul(unit).ok_or_else(|| format!("`{text}` is too large"))?;
        if !number.contains('.') {
            return Ok(Self(bytes));
        }
        if unit == 1 || fraction.is_empty() || fraction.len() > 6 {
            return Err(invalid());
        }
        let scale = 10u64.pow(fraction.len() as u32);
        let fraction: u64 = fraction.parse().map_err(|_| invalid())?;
        let part = u128::from(fraction) * u128::from(unit) / u128::from(scale);
        Ok(Self(bytes.checked_add(part as u64).ok_or_else(invalid)?))
    }
}

fn unknown_suffix(text: &str, number: &str, suffix: &str) -> String {
    let binary = match suffix.chars().next().map(|c| c.to_ascii_uppercase()) {
        Some('K') => "KiB",
        Some('M') => "MiB",
        Some('G') => "GiB",
        Some('T') => "TiB",
        Some('P') => "PiB",
        _ => {
            return format!("`{text}` is not a size: write a number and KiB, MiB, GiB or TiB");
        }
    };
    format!("`{text}`: sizes take binary units; write `{number}{binary}`")
}

/// The largest unit that keeps the number exact, as it can be parsed again.
impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match SUFFIXES.iter().find(|(_, unit)| self.0 >= *unit && self.0.is_multiple_of(*unit)) {
            Some((name, unit)) => write!(f, "{}{name}", self.0 / unit),
            None => write!(f, "{}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_and_print_back() {
        for (text, bytes) in
            [("0", 0), ("4096", 4096), ("4KiB", 4096), ("1.5GiB", 3 << 29), ("64 GiB", 64 << 30)]
                .into_iter()
                .chain([("1PiB", 1 << 50), ("1024TiB", 1 << 50)])
        {
            assert_eq!(Bytes::parse(text), Ok(Bytes(bytes)), "{text}");
        }
        for bytes in [1, 512, 4096, 3 << 29, 64 << 30, u64::MAX] {
            assert_eq!(Bytes::parse(&Bytes(bytes).to_string()), Ok(Bytes(bytes)));
        }
    }

    #[test]
    fn a_wrong_size_is_told_what_to_write() {
        assert_eq!(
            Bytes::parse("64GB").unwrap_err(),
            "`64GB`: sizes take binary units; write `64GiB`"
        );
        assert!(Bytes::parse("1PB").unwrap_err().ends_with("write `1PiB`"));
        for text in ["", "GiB", "1.GiB", "1.5", "-1", "1e3", "99999999999TiB", "1..5GiB"] {
            assert!(Bytes::parse(text).is_err(), "{text}");
        }
    }
}
