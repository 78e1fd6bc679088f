//! QMP: QEMU's machine protocol, one command at a time. See docs/interop/qmp-spec of QEMU.

use super::Result;
use serde_json::{Value, json};
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};
use vflash::control::api::{ErrorCode, Failure};

/// For an answer. Commands here return when QEMU's main loop has done them.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);

/// Bytes of one line; the largest answer here names every object of a machine.
const LINE_BYTES_MAX: u64 = 16 << 20;

pub(super) struct Qmp {
    stream: BufReader<UnixStream>,
    socket: String,
    /// Told meanwhile, not looked at yet.
    events: VecDeque<Value>,
}

/// QEMU's own refusal of a command.
#[derive(Debug)]
pub(super) struct Refused {
    pub command: String,
    pub description: String,
}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Self {
        Self::new(
            ErrorCode::Io,
            format!("QEMU refused {}: {}", refused.command, refused.description),
        )
    }
}

impl Qmp {
    /// Connects and negotiates.
    pub(super) fn connect(path: &Path) -> Result<Self> {
        let socket = path.display().to_string();
        let stream = UnixStream::connect(path).map_err(|error| {
            let text = format!(
                "cannot reach QEMU on {socket}: {error}: name the socket that QEMU was given as \
                 -qmp unix:SOCKET,server=on,wait=off"
            );
            Failure::new(ErrorCode::Io, text)
        })?;
        let mut qmp = Self { stream: BufReader::new(stream), socket, events: VecDeque::new() };
        let greeting = qmp.line(Instant::now() + ANSWER_TIMEOUT)?;
        if !greeting["QMP"].is_object() {
            return Err(qmp.broken("it does not greet as QEMU does; is another client connected?"));
        }
        qmp.execute("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command; QEMU's refusal is a failure.
    pub(super) fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        Ok(self.attempt(command, arguments)??)
    }

    /// Runs a command that QEMU may refuse.
    pub(super) fn attempt(
        &mut self,
        command: &str,
        arguments: Value,
    ) -> Result<std::result::Result<Value, Refused>> {
        let request = match arguments.as_object() {
            Some(none) if none.is_empty() => json!({"execute": command}),
            _ => json!({"execute": command, "arguments": arguments}),
        };
        let sent = self.stream.get_mut().write_all(format!("{request}\n").as_bytes());
        sent.map_err(|error| self.broken(&error.to_string()))?;
        let deadline = Instant::now() + ANSWER_TIMEOUT;
        loop {
            let mut answer = self.line(deadline)?;
            if let Some(value) = answer.get_mut("return") {
                return Ok(Ok(value.take()));
            }
            if let Some(error) = answer.get("error") {
                let description = error["desc"].as_str().unwrap_or("no reason given").to_owned();
                return Ok(Err(Refused { command: command.to_owned(), description }));
            }
            self.events.push_back(answer);
        }
    }

    /// The next event that was told or is told before the deadline.
    pub(super) fn event(&mut self, deadline: Instant) -> Result<Option<Value>> {
        if let Some(event) = self.events.pop_front() {
            return Ok(Some(event));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        match self.line(deadline) {
            Err(failure) if failure.code == ErrorCode::Timeout => Ok(None),
            result => result.map(Some),
        }
    }

    fn line(&mut self, deadline: Instant) -> Result<Value> {
        let mut line = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            // A timeout of zero would mean none.
            let left = left.max(Duration::from_millis(1));
            let timeout = self.stream.get_ref().set_read_timeout(Some(left));
            timeout.map_err(|error| self.broken(&error.to_string()))?;
            let room = LINE_BYTES_MAX - line.len() as u64;
            let read = self.stream.by_ref().take(room).read_until(b'\n', &mut line);
            match read {
                Ok(_) if line.ends_with(b"\n") => break,
                Ok(0) => return Err(self.broken("QEMU closed the connection")),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    let text = format!("QEMU on {} does not answer", self.socket);
                    return Err(Failure::new(ErrorCode::Timeout, text));
                }
                Err(error) => return Err(self.broken(&error.to_string())),
            }
        }
        serde_json::from_slice(&line)
            .map_err(|error| self.broken(&format!("what it says is no JSON: {error}")))
    }

    fn broken(&self, what: &str) -> Failure {
        Failure::new(ErrorCode::Io, format!("QMP on {}: {what}", self.socket))
    }
}
