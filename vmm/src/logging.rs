//! Messages on standard error: `outboard: LEVEL: text`, from the `log` crate.

use std::io::Write;

use log::{LevelFilter, Log, Metadata, Record};

struct Stderr;

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if self.enabled(record.metadata()) {
            let line = format!("outboard: {}: {}\n", record.level().as_str().to_lowercase(), record.args());
            // A closed standard error leaves nowhere to complain.
            if std::io::stderr().write_all(line.as_bytes()).is_err() {
                log::set_max_level(LevelFilter::Off);
            }
        }
    }

    fn flush(&self) {}
}

/// Shows warnings; with `verbosity` 1 also what happens, 2 for debugging, 3 everything.
pub(crate) fn start(verbosity: u8) {
    let level = match verbosity {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        2 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    if log::set_logger(&Stderr).is_ok() {
        log::set_max_level(level);
    }
}
