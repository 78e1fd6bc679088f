//! `vflash events`

use crate::arguments::{EventsArguments, Format};
use crate::client::Client;
use crate::output::{time, write};
use std::time::Duration;
use vflash::control::api::{ErrorCode, Event, Events, Failure};

/// How long one question to the daemon waits for the next event.
const WAIT_SECONDS: u64 = 30;

/// How long after a daemon went away the next is looked for.
const RETRY: Duration = Duration::from_millis(500);

/// Prints what happened; with `--follow` until interrupted, over restarts of the daemon.
pub(crate) fn events(
    client: &Client,
    format: Format,
    arguments: &EventsArguments,
) -> Result<(), Failure> {
    let mut after = arguments.after;
    let mut instance: Option<String> = None;
    let mut wait = 0;
    loop {
        let path = format!("/v1/events?after={after}&waitSeconds={wait}");
        let answer: Events = match client.get_later(&path, Duration::from_secs(wait)) {
            Err(failure) if instance.is_some() && failure.code == ErrorCode::Io => {
                // The daemon is being started again.
                std::thread::sleep(RETRY);
                continue;
            }
            answer => answer?,
        };
        if instance.as_ref().is_some_and(|known| *known != answer.instance) {
            // Another daemon counts from the beginning.
            (instance, after) = (Some(answer.instance), 0);
            continue;
        }
        instance = Some(answer.instance);
        if answer.lost > 0 {
            eprintln!("vflash: {} older events were forgotten", answer.lost);
        }
        for event in &answer.events {
            write(&line(format, event)?)?;
        }
        after = answer.last;
        if answer.events.is_empty() {
            if !arguments.follow {
                return Ok(());
            }
            wait = WAIT_SECONDS;
        }
    }
}

/// One line, or one document, for each event.
fn line(format: Format, event: &Event) -> Result<String, Failure> {
    let wrong = |text: String| Failure::new(ErrorCode::Internal, text);
    match format {
        Format::Table => Ok(format!(
            "{}  {:<6} {:<14} {}: {}\n",
            time(event.time_ms),
            event.sequence,
            event.kind,
            event.object,
            event.message
        )),
        Format::Json => serde_json::to_string(event)
            .map(|text| text + "\n")
            .map_err(|error| wrong(error.to_string())),
        Format::Yaml => serde_yaml::to_string(event)
            .map(|text| format!("---\n{text}"))
            .map_err(|error| wrong(error.to_string())),
    }
}
