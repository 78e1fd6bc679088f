//! Byte tables: FORMAT.md, the layouts in the code and the bytes that are written are the same.

/// One field of a byte table: offset, bytes, name.
pub type Field = (usize, usize, &'static str);

/// Panics unless `format` (a FORMAT.md) shows `layout` below `heading`, and its last field ends at
/// `length`.
pub fn assert_documented(format: &str, heading: &str, layout: &[Field], length: usize) {
    let code: Vec<_> = layout.iter().map(|(o, b, n)| (*o, *b, (*n).to_owned())).collect();
    assert_eq!(documented(format, heading), code, "{heading}");
    let (offset, bytes, _) = layout[layout.len() - 1];
    assert_eq!(offset + bytes, length, "{heading} ends where its last field does");
}

/// The rows `| offset | bytes | name | …` below a heading.
fn documented(format: &str, heading: &str) -> Vec<(usize, usize, String)> {
    let section = format.split("\n### ").find(|section| section.starts_with(heading));
    section
        .unwrap_or_else(|| panic!("FORMAT.md has a table `{heading}`"))
        .lines()
        .filter_map(|line| {
            let mut cells = line.split('|').map(str::trim).skip(1);
            let offset = cells.next()?.parse().ok()?;
            Some((offset, cells.next()?.parse().ok()?, cells.next()?.to_owned()))
        })
        .collect()
}

/// The number in a field of `bytes`, by name; of a longer field the first eight bytes.
pub fn number(layout: &[Field], name: &str, bytes: &[u8]) -> u64 {
    let (offset, length, _) = layout.iter().find(|field| field.2 == name).expect("a field");
    let field = &bytes[*offset..offset + (*length).min(8)];
    field.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}
