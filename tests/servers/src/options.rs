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
    /// What the extended wire offers.
    #[command(flatten)]
    pub extended: Extended,
    /// Say more on standard error; thrice for every message.
    #[arg(short, long, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

/// What `--wire extended` offers; the client's own limits hold as well.
#[derive(Args, Clone, Debug)]
pub struct Extended {
    /// Descriptors in a message, at most 16.
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=16))]
    pub max_msg_fds: u32,
    /// Bytes of data in a message.
    #[arg(long, value_name = "BYTES", default_value_t = 1 << 20, value_parser = clap::value_parser!(u64).range(8..=1 << 20))]
    pub max_data_xfer_size: u64,
    /// Send DMA messages over a socket of their own, when the client offers that.
    #[arg(long)]
    pub twin_socket: bool,
    /// How descriptors of doorbells are described: by the specification, or as libvfio-user does.
    #[arg(long, value_enum, default_value = "spec")]
    pub io_entries: IoEntries,
}

/// The two forms of what GET_REGION_IO_FDS answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum IoEntries {
    /// 40 bytes each.
    Spec,
    /// 48 bytes each.
    Libvfio,
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
