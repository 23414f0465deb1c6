//! The command lines of the servers, and where their log goes.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use log::{LevelFilter, Log, Metadata, Record};

/// How the guest's doorbell writes reach the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Doorbells {
    /// A page that the guest writes and the device looks at: no exits.
    Mapped,
    /// Each write is a message.
    Trapped,
}

/// Who speaks to the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Wire {
    /// The third-party crate, as it is.
    Plain,
    /// The crate behind `front`, which adds what it does not speak.
    Extended,
}

/// What all servers have.
#[derive(Args, Clone, Debug)]
pub struct Common {
    /// Where to listen.
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// End after the first client.
    #[arg(long)]
    pub once: bool,
    /// The crate alone, or with what it does not speak added.
    #[arg(long, value_enum, default_value = "plain")]
    pub wire: Wire,
    /// Say more on standard error; thrice for every message.
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        eprintln!("{}: {}", record.level().as_str().to_lowercase(), record.args());
    }

    fn flush(&self) {}
}

/// Sends the log of this process to standard error.
pub fn log_to_stderr(verbose: u8) {
    let level = match verbose {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        2 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    log::set_max_level(level);
    if log::set_logger(&Stderr).is_err() {
        eprintln!("a log has been set up before");
    }
}
