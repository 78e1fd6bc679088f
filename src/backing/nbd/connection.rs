//! A socket to an NBD server, and the handshake that makes it a connection to an export.

use super::protocol::{
    Export, Fault, GREETING_BYTES, Negotiation, OPTION_REPLY_BYTES, answer_greeting, go,
    option_reply,
};
use crate::backing::spec::{NbdServer, NbdUrl};
use crate::base::{Error, ErrorKind, Result};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Option replies before the last one: more than any server sends.
const REPLIES_MAX: usize = 64;

/// Either kind of socket.
pub(super) enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn open(server: &NbdServer, timeout: Duration) -> std::io::Result<Self> {
        match server {
            // A local socket is accepted or refused at once, unless its server stands still.
            NbdServer::Unix(path) => UnixStream::connect(path).map(Self::Unix),
            NbdServer::Tcp { host, port } => {
                let mut failed = std::io::Error::from(std::io::ErrorKind::NotFound);
                for address in (host.as_str(), *port).to_socket_addrs()? {
                    match TcpStream::connect_timeout(&address, timeout) {
                        Ok(stream) => {
                            stream.set_nodelay(true)?;
                            return Ok(Self::Tcp(stream));
                        }
                        Err(error) => failed = error,
                    }
                }
                Err(failed)
            }
        }
    }

    pub(super) fn try_clone(&self) -> std::io::Result<Self> {
        match self {
            Self::Tcp(stream) => stream.try_clone().map(Self::Tcp),
            Self::Unix(stream) => stream.try_clone().map(Self::Unix),
        }
    }

    /// Ends both directions: whoever reads or writes is woken.
    pub(super) fn shut_down(&self) {
        // A socket that the other side has ended already is as good.
        let _ = match self {
            Self::Tcp(stream) => stream.shutdown(Shutdown::Both),
            Self::Unix(stream) => stream.shutdown(Shutdown::Both),
        };
    }

    fn set_timeouts(&self, read: Option<Duration>, write: Option<Duration>) -> std::io::Result<()> {
        match self {
            Self::Tcp(stream) => {
                stream.set_read_timeout(read)?;
                stream.set_write_timeout(write)
            }
            Self::Unix(stream) => {
                stream.set_read_timeout(read)?;
                stream.set_write_timeout(write)
            }
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buffer),
            Self::Unix(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, buffer: &[u8]) -> std::io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(buffer),
            Self::Unix(stream) => stream.write(buffer),
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// Connects and agrees with the server. Every step takes `timeout` at most; so does every later
/// write, while reads wait for ever.
pub(super) fn connect(url: &NbdUrl, timeout: Duration) -> Result<(Stream, Export)> {
    let failed = |error| Error::io(format!("connecting to {url}"), error);
    let mut stream = Stream::open(&url.server, timeout).map_err(failed)?;
    stream.set_timeouts(Some(timeout), Some(timeout)).map_err(failed)?;
    let export = negotiate(&mut stream, &url.export).map_err(|error| error.context(url))?;
    stream.set_timeouts(None, Some(timeout)).map_err(failed)?;
    Ok((stream, export))
}

/// Agrees with a server on an export.
pub(super) fn negotiate(stream: &mut (impl Read + Write), export: &str) -> Result<Export> {
    let failed = |error| Error::io("the server ended the negotiation", error);
    let refused = |Fault(text)| Error::new(ErrorKind::Unsupported, text);
    let mut greeting = [0; GREETING_BYTES];
    stream.read_exact(&mut greeting).map_err(failed)?;
    let answer = answer_greeting(&greeting).map_err(refused)?;
    stream.write_all(&answer).map_err(failed)?;
    stream.write_all(&go(export)).map_err(failed)?;
    let mut negotiation = Negotiation::default();
    for _ in 0..REPLIES_MAX {
        let mut head = [0; OPTION_REPLY_BYTES];
        stream.read_exact(&mut head).map_err(failed)?;
        let head = option_reply(&head).map_err(refused)?;
        let mut data = vec![0; head.length as usize];
        stream.read_exact(&mut data).map_err(failed)?;
        if let Some(export) = negotiation.reply(head, &data).map_err(refused)? {
            return Ok(export);
        }
    }
    Err(Error::new(ErrorKind::Unsupported, "the server never ends the negotiation"))
}
