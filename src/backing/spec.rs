//! What a manifest's `backing:` names: a path, or the URL of an NBD export. Pure.

#![deny(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]

use crate::base::{Error, ErrorKind, Result};
use std::fmt;
use std::path::{Path, PathBuf};

/// The port of NBD.
pub const NBD_PORT: u16 = 10809;

/// A backing, as it is written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Spec {
    /// A file or a block device: only opening it tells.
    Path(PathBuf),
    Nbd(NbdUrl),
}

/// `nbd://HOST[:PORT]/EXPORT` or `nbd+unix:///EXPORT?socket=PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NbdUrl {
    pub server: NbdServer,
    /// May be empty: the server's default.
    pub export: String,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NbdServer {
    Tcp { host: String, port: u16 },
    Unix(PathBuf),
}

impl Spec {
    /// # Errors
    /// Says what to write instead.
    pub fn parse(text: &str) -> Result<Self> {
        if text.is_empty() {
            return Err(invalid(text, "it is empty: name a file, a block device or an NBD URL"));
        }
        match text.split_once("://") {
            None => Ok(Self::Path(PathBuf::from(text))),
            Some((scheme, rest)) => NbdUrl::parse(text, scheme, rest).map(Self::Nbd),
        }
    }

    /// Where the sidecar of a backing file lies unless told otherwise; an NBD export has no such
    /// place, nor has a block device.
    pub fn default_sidecar(&self) -> Option<PathBuf> {
        let Self::Path(path) = self else { return None };
        if path.starts_with("/dev") {
            return None;
        }
        let mut name = path.clone().into_os_string();
        name.push(".vflash");
        Some(PathBuf::from(name))
    }
}

impl fmt::Display for Spec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Nbd(url) => url.fmt(f),
        }
    }
}

impl NbdUrl {
    fn parse(text: &str, scheme: &str, rest: &str) -> Result<Self> {
        match scheme {
            "nbd" => Self::parse_tcp(text, rest),
            "nbd+unix" => Self::parse_unix(text, rest),
            "nbds" | "nbds+unix" => Err(invalid(
                text,
                "NBD over TLS is not supported: use nbd:// within a tunnel or nbd+unix://",
            )),
            _ => Err(invalid(text, "only nbd:// and nbd+unix:// URLs and paths are supported")),
        }
    }

    fn parse_tcp(text: &str, rest: &str) -> Result<Self> {
        let (authority, export) = rest.split_once('/').unwrap_or((rest, ""));
        if export.contains('?') || authority.contains('@') {
            return Err(invalid(text, "write nbd://HOST[:PORT]/EXPORT"));
        }
        let (host, port) = match authority.strip_prefix('[') {
            Some(rest) => {
                let ended = rest.split_once(']');
                let (host, rest) = ended.ok_or_else(|| invalid(text, "`[` without `]`"))?;
                (host, rest.strip_prefix(':').or(rest.is_empty().then_some("")))
            }
            None => match authority.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (authority, Some("")),
            },
        };
        let port = match port {
            Some("") => Some(NBD_PORT),
            Some(port) => port.parse().ok().filter(|port| *port != 0),
            None => None,
        };
        let port = port.ok_or_else(|| invalid(text, "the port must be a number up to 65535"))?;
        if host.is_empty() {
            return Err(invalid(text, "the host is missing: write nbd://HOST[:PORT]/EXPORT"));
        }
        let server = NbdServer::Tcp { host: host.to_owned(), port };
        Ok(Self { server, export: decode(text, export)? })
    }

    fn parse_unix(text: &str, rest: &str) -> Result<Self> {
        let shape = "write nbd+unix:///EXPORT?socket=PATH";
        let rest = rest.strip_prefix('/').ok_or_else(|| invalid(text, shape))?;
        let (export, query) = rest.split_once('?').ok_or_else(|| invalid(text, shape))?;
        let socket = query.strip_prefix("socket=").filter(|socket| !socket.contains('&'));
        let socket = decode(text, socket.ok_or_else(|| invalid(text, shape))?)?;
        if socket.is_empty() {
            return Err(invalid(text, shape));
        }
        let server = NbdServer::Unix(PathBuf::from(socket));
        Ok(Self { server, export: decode(text, export)? })
    }

    /// The socket, if the server is on this host.
    pub fn socket(&self) -> Option<&Path> {
        match &self.server {
            NbdServer::Unix(path) => Some(path),
            NbdServer::Tcp { .. } => None,
        }
    }
}

impl fmt::Display for NbdUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let export = encode(&self.export);
        match &self.server {
            NbdServer::Tcp { host, port } if host.contains(':') => {
                write!(f, "nbd://[{host}]:{port}/{export}")
            }
            NbdServer::Tcp { host, port } => write!(f, "nbd://{host}:{port}/{export}"),
            NbdServer::Unix(path) => {
                let socket = encode(&path.to_string_lossy());
                write!(f, "nbd+unix:///{export}?socket={socket}")
            }
        }
    }
}

fn invalid(text: &str, what: &str) -> Error {
    Error::new(ErrorKind::Invalid, format!("backing `{text}`: {what}"))
}

/// Undoes percent-encoding.
fn decode(whole: &str, text: &str) -> Result<String> {
    let wrong = || invalid(whole, "`%` must be followed by two hexadecimal digits of UTF-8");
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let digit = |byte: Option<u8>| char::from(byte?).to_digit(16);
        let (high, low) = (digit(rest.next()), digit(rest.next()));
        let value = high.zip(low).map(|(high, low)| (high << 4 | low) as u8);
        bytes.push(value.ok_or_else(wrong)?);
    }
    String::from_utf8(bytes).map_err(|_| wrong())
}

fn encode(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                encoded.push(char::from(byte));
            }
            _ => encoded.push_str(&format!("%{byte:02X}")),
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_and_paths_are_parsed_and_printed_back() {
        for (text, printed) in [
            ("/srv/a.raw", "/srv/a.raw"),
            ("nbd://storage/vm%20one", "nbd://storage:10809/vm%20one"),
            ("nbd://[fe80::1]:99/", "nbd://[fe80::1]:99/"),
            ("nbd://10.0.0.1:7", "nbd://10.0.0.1:7/"),
            ("nbd+unix:///a/b?socket=/run/x.sock", "nbd+unix:///a/b?socket=/run/x.sock"),
            ("nbd+unix:///?socket=%2Frun%2Fx", "nbd+unix:///?socket=/run/x"),
        ] {
            let spec = Spec::parse(text).expect(text);
            assert_eq!(spec.to_string(), printed);
            assert_eq!(Spec::parse(printed).expect(printed), spec, "{printed}");
        }
        let default = |text| Spec::parse(text).expect("parses").default_sidecar();
        assert_eq!(default("/srv/a.raw"), Some(PathBuf::from("/srv/a.raw.vflash")));
        assert_eq!(default("/dev/sdb"), None);
        assert_eq!(default("nbd://h/e"), None);
    }

    #[test]
    fn a_wrong_url_is_told_what_to_write() {
        for (text, words) in [
            ("", "name a file"),
            ("nbds://h/e", "TLS is not supported"),
            ("http://h/e", "only nbd://"),
            ("nbd:///e", "host is missing"),
            ("nbd://h:0/e", "port"),
            ("nbd://h:70000/e", "port"),
            ("nbd://[::1/e", "without `]`"),
            ("nbd://[::1]x/e", "port"),
            ("nbd://h/e?x=y", "write nbd://HOST"),
            ("nbd://h/%zz", "hexadecimal"),
            ("nbd://h/%ff", "UTF-8"),
            ("nbd+unix://e?socket=/x", "write nbd+unix:///"),
            ("nbd+unix:///e", "write nbd+unix:///"),
            ("nbd+unix:///e?socket=", "write nbd+unix:///"),
        ] {
            let error = Spec::parse(text).expect_err(text).to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
