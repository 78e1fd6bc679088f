//! A socket on which both sides speak in lines.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::process::until;

/// One connection; a line that comes in parts is kept until its end arrives.
pub(crate) struct Lines {
    peer: &'static str,
    stream: UnixStream,
    reader: BufReader<UnixStream>,
    partial: String,
}

impl Lines {
    /// Takes the first connection to `listener`; `running` says whether one can still come.
    pub(crate) fn accept(
        peer: &'static str,
        listener: &UnixListener,
        limit: Duration,
        mut running: impl FnMut() -> Result<()>,
    ) -> Result<Self> {
        listener.set_nonblocking(true).context("make a listener non-blocking")?;
        let stream = until(limit, || match listener.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => running().map(|()| None),
            Err(error) => Err(error).context("accept a connection"),
        });
        let stream = stream.with_context(|| format!("{peer} does not connect"))?;
        stream.set_nonblocking(false).context("make a socket blocking")?;
        let reader = BufReader::new(stream.try_clone().context("duplicate a socket")?);
        Ok(Self { peer, stream, reader, partial: String::new() })
    }

    pub(crate) fn send(&mut self, line: &str) -> Result<()> {
        let sent = self.stream.write_all(format!("{line}\n").as_bytes());
        sent.with_context(|| format!("send {line:?} to {}", self.peer))
    }

    /// The next line without its end, or `None` at `deadline`.
    pub(crate) fn next(&mut self, deadline: Instant) -> Result<Option<String>> {
        let left = deadline.saturating_duration_since(Instant::now());
        // A timeout of zero would mean none.
        let limit = left.max(Duration::from_millis(1));
        self.stream.set_read_timeout(Some(limit)).context("set a timeout on a socket")?;
        match self.reader.read_line(&mut self.partial) {
            Ok(0) => bail!("{} closed its connection", self.peer),
            Ok(_) => Ok(Some(std::mem::take(&mut self.partial).trim_end().to_owned())),
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                Ok(None)
            }
            Err(error) => Err(error).with_context(|| format!("read from {}", self.peer)),
        }
    }
}
