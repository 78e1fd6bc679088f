//! One error type for the whole daemon: what kind, where, and why.
//!
//! Callers match on [`ErrorKind`]; people read the message. Guest mistakes are never an `Error`:
//! they are status bytes and counters.

use std::fmt;

pub type Result<T> = std::result::Result<T, Error>;

/// What a caller may want to act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The device or the operating system failed the operation.
    Io,
    /// No space, no slot, no descriptor left.
    Full,
    /// Bytes that were read do not mean what they must.
    Corrupt,
    /// Refused because an earlier fault made the object unsafe to use.
    Fenced,
    /// A version, feature or operation that this build or this device lacks.
    Unsupported,
    /// The request itself is wrong.
    Invalid,
    /// No such object.
    Gone,
    /// Somebody else holds it.
    Busy,
}

/// An error: its kind, a sentence that names the object and what to do, and its cause.
pub struct Error {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// `message` says what failed, on which object, at which offset, and what the operator can do.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), source: None }
    }

    /// As [`Error::new`], keeping the cause.
    pub fn with(
        kind: ErrorKind,
        message: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self { kind, message: message.into(), source: Some(source.into()) }
    }

    /// An operating system failure, [`ErrorKind::Io`] unless the code says more.
    pub fn io(message: impl Into<String>, source: std::io::Error) -> Self {
        let kind = match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EMFILE | libc::ENFILE) => ErrorKind::Full,
            Some(libc::ENOENT | libc::ENXIO | libc::ENODEV) => ErrorKind::Gone,
            Some(libc::EOPNOTSUPP | libc::ENOSYS) => ErrorKind::Unsupported,
            Some(libc::EBUSY) => ErrorKind::Busy,
            _ => ErrorKind::Io,
        };
        Self::with(kind, message, source)
    }

    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// Puts `context` before the message, keeping kind and cause.
    #[must_use]
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        self.message = format!("{context}: {}", self.message);
        self
    }
}

/// The message and its chain of causes, on one line.
impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            write!(f, ": {error}")?;
            cause = error.source();
        }
        Ok(())
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

/// What a panic said.
pub fn panic_text(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("a panic without words")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn message_carries_context_and_cause() {
        let cause = std::io::Error::from_raw_os_error(libc::ENOSPC);
        let error = Error::io("writing the table at 4096", cause).context("pool nvme0");
        assert_eq!(error.kind(), ErrorKind::Full);
        let text = error.to_string();
        assert!(text.starts_with("pool nvme0: writing the table at 4096: No space left"), "{text}");
    }
}
