//! Tools beside the machine: `check` examines a host, `probe` examines a peer, `trace` records messages.

pub mod check;
mod guest_mode;
pub mod probe;
pub mod trace;

use std::io::Write;

use serde::Serialize;

use crate::error::Error;

/// Prints `words`. When there are none, prints `report` as JSON.
fn print(report: &impl Serialize, words: Option<String>) -> Result<(), Error> {
    let text = match words {
        Some(words) => words,
        None => {
            let text = serde_json::to_string_pretty(report);
            text.map_err(|error| Error::internal("cannot write the report as JSON").because(error))? + "\n"
        }
    };
    std::io::stdout()
        .write_all(text.as_bytes())
        .map_err(|error| Error::internal("cannot print the report").because(error))
}
