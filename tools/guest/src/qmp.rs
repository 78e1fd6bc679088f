//! A client of QEMU's monitor (QMP): commands, and the events that arrive between their answers.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::lines::Lines;

/// How long QEMU may take to answer a command.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// One monitor connection.
pub struct Monitor {
    lines: Lines,
    events: VecDeque<Value>,
}

impl Monitor {
    /// Takes a fresh connection through its greeting.
    pub(crate) fn new(lines: Lines) -> Result<Self> {
        let mut monitor = Self { lines, events: VecDeque::new() };
        let greeting = monitor.message(Instant::now() + ANSWER_LIMIT)?;
        if greeting.as_ref().is_none_or(|greeting| greeting.get("QMP").is_none()) {
            bail!("QEMU's monitor greets with {greeting:?}");
        }
        monitor.execute("qmp_capabilities", json!({}))?;
        Ok(monitor)
    }

    /// Runs a command and gives what it returned.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        self.lines.send(&request.to_string())?;
        let deadline = Instant::now() + ANSWER_LIMIT;
        loop {
            let message = self.message(deadline)?;
            let message = message.with_context(|| format!("QEMU does not answer {command}"))?;
            if let Some(result) = message.get("return") {
                return Ok(result.clone());
            }
            if let Some(error) = message.get("error") {
                bail!("QEMU refuses {request}: {error}");
            }
            self.events.push_back(message);
        }
    }

    /// Waits for an event `name` whose data `matches`; events before it are dropped.
    pub fn wait_event(
        &mut self,
        name: &str,
        limit: Duration,
        matches: impl Fn(&Value) -> bool,
    ) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let event = match self.events.pop_front() {
                Some(event) => Some(event),
                None => self.message(deadline)?,
            };
            let event = event.with_context(|| format!("no event {name} from QEMU"))?;
            if event["event"] == name && matches(&event["data"]) {
                return Ok(());
            }
        }
    }

    fn message(&mut self, deadline: Instant) -> Result<Option<Value>> {
        let Some(line) = self.lines.next(deadline)? else { return Ok(None) };
        let message = serde_json::from_str(&line);
        message.with_context(|| format!("QEMU's monitor says {line:?}")).map(Some)
    }
}
