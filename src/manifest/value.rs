//! Scalars: from the text that stands in a manifest to a value, or to what to write instead.

use super::schema::{Backing, Device, NAME_LENGTH_MAX, POOL_BYTES_MIN, is_name};
use super::settings::Principal;
use super::tree::shown;
use crate::base::units::{Bytes, EXTENT_BYTES, KIB, TIB};
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

/// No drive is larger; it keeps every sum of sizes far from overflow.
const SIZE_BYTES_MAX: u64 = 1024 * TIB;

/// Slower than one block a second, a guest stands still.
const BANDWIDTH_MIN: u64 = 4 * KIB;

/// Bytes of a path, as Linux takes them.
const PATH_LENGTH_MAX: usize = 4095;

/// Characters of a user's or group's name, as Linux takes them.
const PRINCIPAL_LENGTH_MAX: usize = 32;

/// A reading of a text, or what to write instead.
pub(super) type Read<T> = Result<T, String>;

/// What YAML readers take an unquoted text for, if not for text. Readers of YAML 1.1 also take
/// `yes`, `no`, `on`, `off` for truth values and `1:30` for a number.
pub(super) fn yaml_type(text: &str) -> Option<&'static str> {
    let lower = text.to_ascii_lowercase();
    if ["", "~", "null"].contains(&lower.as_str()) {
        return Some("nothing");
    }
    if ["true", "false", "yes", "no", "on", "off", "y", "n"].contains(&lower.as_str()) {
        return Some("a truth value");
    }
    let number = lower.trim_start_matches(['+', '-']);
    let based = ["0x", "0o", "0b"].iter().any(|prefix| number.starts_with(prefix));
    let digit_first = number.trim_start_matches('.').starts_with(|c: char| c.is_ascii_digit());
    let numeric = |c: char| c.is_ascii_digit() || "._:e+-".contains(c);
    let special = [".inf", ".nan"].contains(&number);
    (based || special || digit_first && number.chars().all(numeric)).then_some("a number")
}

pub(super) fn truth(text: &str, plain: bool) -> Read<bool> {
    let shown = if plain { shown(text) } else { format!("\"{}\"", shown(text)) };
    match (text, text.to_ascii_lowercase().as_str()) {
        ("true", _) if plain => Ok(true),
        ("false", _) if plain => Ok(false),
        (_, "true" | "yes" | "on" | "y" | "1") => Err(format!("`{shown}`: write `true`")),
        (_, "false" | "no" | "off" | "n" | "0") => Err(format!("`{shown}`: write `false`")),
        _ => Err(format!("`{shown}` is neither `true` nor `false`: write one of them")),
    }
}

/// A whole number between `min` and `max`, in plain decimal digits.
pub(super) fn whole(text: &str, plain: bool, min: u64, max: u64) -> Read<u64> {
    let range = format!("a whole number from {min} to {max}");
    let shown = shown(text);
    if let Some(meant) = meant_number(text) {
        return Err(format!("`{shown}`: write `{meant}`"));
    }
    if text.is_empty() || !text.chars().all(|c| c.is_ascii_digit()) {
        return Err(format!("`{shown}` is not a whole number: write {range}"));
    }
    if !plain {
        return Err(format!("`\"{shown}\"` is text: write `{shown}`, without quotes"));
    }
    let value = text.parse().ok().filter(|value| (min..=max).contains(value));
    value.ok_or_else(|| format!("`{shown}` is out of range: write {range}"))
}

/// What `1e3`, `20k`, `1_000`, `1,000`, `1000.0`, `+5` and `010` most likely mean.
fn meant_number(text: &str) -> Option<String> {
    let digits = |text: &str| !text.is_empty() && text.chars().all(|c| c.is_ascii_digit());
    let trimmed = text.trim_start_matches('0');
    if digits(text) {
        return (text.len() > 1 && trimmed.len() < text.len())
            .then(|| if trimmed.is_empty() { "0".to_owned() } else { trimmed.to_owned() });
    }
    let joined = text.trim_start_matches('+').replace(['_', ','], "");
    if digits(&joined) {
        return Some(joined);
    }
    if let Some(whole) = text.strip_suffix(".0").filter(|whole| digits(whole)) {
        return Some(whole.to_owned());
    }
    let lower = text.to_ascii_lowercase();
    let zeros = match lower.split_once('e') {
        Some((_, exponent)) => exponent.trim_start_matches('+').parse().ok()?,
        None if lower.ends_with('k') => 3,
        None if lower.ends_with('m') => 6,
        None => return None,
    };
    let mantissa = lower.split(['e', 'k', 'm']).next().filter(|mantissa| digits(mantissa))?;
    (zeros <= 9_usize).then(|| format!("{mantissa}{}", "0".repeat(zeros)))
}

/// Bytes: a multiple of an extent, so that no volume shares one.
pub(super) fn size(text: &str) -> Read<u64> {
    // Its messages quote the text, so it gets the text as it can be quoted.
    let shown = shown(text);
    let Bytes(bytes) = Bytes::parse(&shown)?;
    if bytes == 0 {
        return Err(format!("`{shown}` is no size: write at least `1MiB`"));
    }
    if bytes > SIZE_BYTES_MAX {
        return Err(format!("`{shown}` is too large: write at most `{}`", Bytes(SIZE_BYTES_MAX)));
    }
    if bytes < EXTENT_BYTES && text.bytes().all(|c| c.is_ascii_digit()) {
        return Err(format!("`{shown}` has no unit: write for example `{shown}GiB`"));
    }
    if !bytes.is_multiple_of(EXTENT_BYTES) {
        let up = Bytes(bytes.next_multiple_of(EXTENT_BYTES));
        return Err(format!("`{shown}`: sizes are multiples of 1MiB; write `{up}`"));
    }
    Ok(bytes)
}

/// Bytes of a pool.
pub(super) fn pool_size(text: &str) -> Read<u64> {
    let bytes = size(text)?;
    if bytes < POOL_BYTES_MIN {
        let (shown, least) = (shown(text), Bytes(POOL_BYTES_MIN));
        return Err(format!("`{shown}`: a pool takes at least {least}; write `{least}` or more"));
    }
    Ok(bytes)
}

/// Bytes per second.
pub(super) fn bandwidth(text: &str) -> Read<u64> {
    let shown = shown(text);
    let (size, per_second) = match text.trim().strip_suffix("/s") {
        Some(size) => (size, true),
        None => (text.trim(), false),
    };
    let unit_at = size.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(size.len());
    let (number, unit) = size.split_at_checked(unit_at).unwrap_or((size, ""));
    let unit = unit.trim_start();
    if unit.ends_with('b') || unit.to_ascii_lowercase().ends_with("bit") {
        return Err(format!("`{shown}` counts bits: write bytes, for example `400MiB/s`"));
    }
    let Ok(Bytes(bytes)) = Bytes::parse(size) else {
        let prefix = unit.chars().next().map(|c| c.to_ascii_uppercase());
        return Err(match prefix.filter(|prefix| !number.is_empty() && "KMGT".contains(*prefix)) {
            Some(prefix) => {
                format!("`{shown}` is no binary bandwidth: write `{number}{prefix}iB/s`")
            }
            None => format!("`{shown}` is not a bandwidth: write for example `400MiB/s`"),
        });
    };
    if unit.is_empty() {
        return Err(format!("`{shown}` has no unit: write for example `{number}MiB/s`"));
    }
    if !per_second {
        return Err(format!("`{shown}` is a size, not a bandwidth: write `{shown}/s`"));
    }
    if !(BANDWIDTH_MIN..=SIZE_BYTES_MAX).contains(&bytes) {
        let (least, most) = (Bytes(BANDWIDTH_MIN), Bytes(SIZE_BYTES_MAX));
        return Err(format!("`{shown}` is out of range: write from `{least}/s` to `{most}/s`"));
    }
    Ok(bytes)
}

/// `500ms`, `10s`, `2m` or `1h`, up to `max`.
pub(super) fn duration(text: &str, max: Duration) -> Read<Duration> {
    let shown = shown(text);
    let unit_at = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at_checked(unit_at).unwrap_or((text, ""));
    let scale_ms: u64 = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60 * 1000,
        "h" => 60 * 60 * 1000,
        "" => return Err(format!("`{shown}` has no unit: write for example `{shown}s`")),
        _ => return Err(format!("`{shown}` is not a time: write for example `500ms` or `10s`")),
    };
    let invalid = || format!("`{shown}` is not a time: write for example `500ms` or `10s`");
    let number: u64 = number.parse().map_err(|_| invalid())?;
    let time = number.checked_mul(scale_ms).map(Duration::from_millis);
    time.filter(|time| *time <= max)
        .ok_or_else(|| format!("`{shown}` is too long: write at most `{}`", in_hours(max)))
}

/// Whole hours, minutes or seconds.
fn in_hours(time: Duration) -> String {
    match time.as_secs() {
        seconds if seconds.is_multiple_of(3600) => format!("{}h", seconds / 3600),
        seconds if seconds.is_multiple_of(60) => format!("{}m", seconds / 60),
        seconds => format!("{seconds}s"),
    }
}

/// The name of a pool, a machine or a volume.
pub(super) fn name(text: &str, plain: bool) -> Read<String> {
    text_of(text, plain)?;
    if is_name(text) {
        return Ok(text.to_owned());
    }
    if text.len() > NAME_LENGTH_MAX {
        let shown = shown(text);
        return Err(format!("`{shown}` is longer than {NAME_LENGTH_MAX} characters: shorten it"));
    }
    let rules = "names are small letters, digits and inner hyphens";
    let allowed = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    let better: String = text.chars().map(allowed).collect();
    let shown = shown(text);
    match better.trim_matches('-') {
        _ if text.is_empty() => Err(format!("the name is empty: {rules}")),
        _ if text.contains('/') => Err(format!("`{shown}` is not a name: {rules}")),
        "" => Err(format!("`{shown}` is not a name: {rules}")),
        better => Err(format!("`{shown}` is not a name: {rules}; write `{better}`")),
    }
}

/// A text that every YAML reader takes for text.
pub(super) fn text_of(text: &str, plain: bool) -> Read<&str> {
    match yaml_type(text).filter(|_| plain) {
        Some(kind) => {
            let shown = shown(text);
            Err(format!("`{shown}` without quotes is {kind} to YAML: write `\"{shown}\"`"))
        }
        None if text.contains(char::is_control) => {
            Err(format!("`{}` holds a character that cannot be printed: remove it", shown(text)))
        }
        None => Ok(text),
    }
}

/// A path; a relative one starts at the directory of the manifest.
pub(super) fn path(text: &str, plain: bool, directory: Option<&Path>) -> Read<PathBuf> {
    let shown = shown(text_of(text, plain)?);
    if text.is_empty() {
        return Err("the path is empty: write for example `/dev/nvme0n1`".to_owned());
    }
    if text.len() > PATH_LENGTH_MAX {
        return Err(format!("`{shown}` is longer than {PATH_LENGTH_MAX} bytes: shorten it"));
    }
    if text.starts_with('~') || text.contains('$') {
        return Err(format!("`{shown}`: no shell reads this path; write it in full"));
    }
    if Path::new(text).is_absolute() {
        return Ok(clean(Path::new(text)));
    }
    match directory {
        Some(directory) => Ok(clean(&directory.join(text))),
        None => Err(format!(
            "`{shown}` is relative, and this manifest comes from no directory: write the whole \
             path"
        )),
    }
}

/// Without `.` and doubled slashes. `..` stays: behind a symbolic link it means something else.
fn clean(path: &Path) -> PathBuf {
    path.components().filter(|part| *part != Component::CurDir).collect()
}

/// What a pool lies on.
pub(super) fn device(text: &str, plain: bool, directory: Option<&Path>) -> Read<Device> {
    match text.strip_prefix("null:") {
        Some(bytes) => Ok(Device::Null { size_bytes: pool_size(bytes.trim())? }),
        None if text == "null" => Err("a null pool needs a size: write `null:8GiB`".to_owned()),
        None => Ok(Device::Path(path(text, plain, directory)?)),
    }
}

/// What a cached disk lies on.
pub(super) fn backing(text: &str, plain: bool, directory: Option<&Path>) -> Read<Backing> {
    let Some((scheme, rest)) = text.split_once("://") else {
        return Ok(Backing::Path(path(text, plain, directory)?));
    };
    let shown = shown(text);
    match scheme {
        "nbd" if !rest.is_empty() => Ok(Backing::Nbd(text.to_owned())),
        "nbd+unix" if rest.contains("?socket=/") => Ok(Backing::Nbd(text.to_owned())),
        "nbd" => Err(format!("`{shown}` names no host: write `nbd://HOST:PORT/EXPORT`")),
        "nbd+unix" => {
            Err(format!("`{shown}` names no socket: write `nbd+unix:///EXPORT?socket=/PATH`"))
        }
        "file" => Err(format!("`{shown}`: write the path alone")),
        _ => Err(format!("`{shown}`: a backing is a path, `nbd://…` or `nbd+unix:///…`")),
    }
}

/// A user or a group, by name or by number.
pub(super) fn principal(text: &str, plain: bool) -> Read<Principal> {
    if plain && yaml_type(text) == Some("a number") {
        let id = whole(text, plain, 0, u64::from(u32::MAX - 1))?;
        return u32::try_from(id).map(Principal::Id).map_err(|error| error.to_string());
    }
    text_of(text, plain)?;
    let first = |c: char| c.is_ascii_alphabetic() || c == '_';
    let inner = |c: char| first(c) || c.is_ascii_digit() || "-.$".contains(c);
    let fits = text.len() <= PRINCIPAL_LENGTH_MAX;
    if fits && text.starts_with(first) && text.chars().all(inner) {
        return Ok(Principal::Name(text.to_owned()));
    }
    let shown = shown(text);
    Err(format!("`{shown}` is no user or group: write a name, or a number without quotes"))
}

/// Permission bits of a socket.
pub(super) fn mode(text: &str, plain: bool) -> Read<u32> {
    let shown = shown(text);
    let digits = text.trim_start_matches("0o").trim_start_matches('0');
    let octal = digits.len() <= 3 && digits.chars().all(|c| ('0'..='7').contains(&c));
    let Some(mode) = u32::from_str_radix(digits, 8).ok().filter(|_| octal) else {
        return Err(format!("`{shown}` is no file mode: write for example `\"0660\"`"));
    };
    if plain || text.len() != 4 || text.contains('o') {
        let why = "YAML readers differ about such numbers";
        return Err(format!("`{shown}`: {why}; write `\"{mode:04o}\"`, with the quotes"));
    }
    if mode & 0o600 != 0o600 || mode & 0o111 != 0 {
        return Err(format!(
            "`{shown}`: to connect takes read and write, never execute; write for example \
             `\"0660\"`"
        ));
    }
    Ok(mode)
}
