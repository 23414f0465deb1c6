//! Messages on standard error: `outboard: LEVEL: text`, from the `log` crate, and the trace of `--trace -`.
//!
//! Guests and peers can cause messages. They must not be able to fill a disk, so the number of messages is
//! bounded. A message must never wait, because standard error may have no reader.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::console::outlet::Outlet;

/// The number of lines that one place in the program may write at once. It suffices for every device of a
/// machine, many times over. After that the place may write one line a second.
const BURST: u32 = 1000;

/// The number of lines that one place may still write.
struct Allowance {
    left: u32,
    since: Instant,
    omitted: u64,
}

impl Allowance {
    fn new(now: Instant) -> Self {
        Self { left: BURST, since: now, omitted: 0 }
    }

    /// Takes one line from the allowance, if there is one. Gives the number of lines that were refused since
    /// the last one.
    fn take(&mut self, now: Instant) -> Option<u64> {
        let earned = now.saturating_duration_since(self.since).as_secs();
        if earned > 0 {
            self.left = u32::try_from(earned).unwrap_or(BURST).saturating_add(self.left).min(BURST);
            self.since = now;
        }
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                Some(std::mem::take(&mut self.omitted))
            }
            None => {
                self.omitted = self.omitted.saturating_add(1);
                None
            }
        }
    }
}

/// The file and line of a log call. Their number is bounded by the program's text.
type Place = (Option<&'static str>, Option<u32>);

struct Stderr {
    /// This lock is held for a moment only.
    places: Mutex<BTreeMap<Place, Allowance>>,
    out: Mutex<Out>,
}

/// The lines that standard error has not taken yet, and the number of lines that are lost.
struct Out {
    outlet: Option<Outlet>,
    omitted: u64,
}

/// The number of bytes that may wait for a reader of standard error.
const WAITING: usize = 256 << 10;

static STDERR: Stderr =
    Stderr { places: Mutex::new(BTreeMap::new()), out: Mutex::new(Out { outlet: None, omitted: 0 }) };

impl Out {
    /// The outlet, opened when it is first needed. `None` when it cannot be opened.
    fn outlet(&mut self) -> Option<&mut Outlet> {
        if self.outlet.is_none() {
            self.outlet = Outlet::stream(io::stderr().as_fd()).ok();
        }
        self.outlet.as_mut()
    }
}

/// Writes text to standard error, or keeps it until there is a reader. False when there will never be one.
pub(crate) fn write(text: &str) -> bool {
    let mut out = STDERR.out.lock().unwrap_or_else(PoisonError::into_inner);
    let omitted = out.omitted;
    let Some(outlet) = out.outlet() else { return false };
    if outlet.waiting() + text.len() > WAITING && outlet.pass_on().is_ok() && outlet.waiting() > 0 {
        out.omitted += 1;
        return true;
    }
    let note = if omitted > 0 {
        format!("outboard: warn: {omitted} messages before this one were not read and are lost\n")
    } else {
        String::new()
    };
    let written = outlet.push(note.as_bytes()).and_then(|()| outlet.push(text.as_bytes()));
    out.omitted = 0;
    written.is_ok()
}

/// Waits until a reader of standard error has read the last messages, as long as the reader goes on reading.
pub(crate) fn finish() {
    let mut out = STDERR.out.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(outlet) = &mut out.outlet
        && outlet.drain(Duration::from_millis(100), Duration::from_secs(5)).is_err()
    {
        outlet.forget(0);
    }
}

impl Stderr {
    /// See [`Allowance::take`]. Debug and trace messages are not bounded: a user has asked for them.
    fn allows(&self, record: &Record<'_>) -> Option<u64> {
        if record.level() > Level::Info {
            return Some(0);
        }
        let now = Instant::now();
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let place = places.entry((record.file_static(), record.line()));
        place.or_insert_with(|| Allowance::new(now)).take(now)
    }
}

impl Log for Stderr {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let Some(omitted) = self.allows(record) else { return };
        let more = if omitted > 0 { format!(" (and {omitted} such lines before)") } else { String::new() };
        let level = record.level().as_str().to_lowercase();
        let line = format!("outboard: {level}: {}{more}\n", record.args());
        // Standard error is closed, so there is no place left for messages.
        if !write(&line) {
            log::set_max_level(LevelFilter::Off);
        }
    }

    fn flush(&self) {}
}

/// Sets the level of messages by `verbosity`: 0 shows warnings, 1 information, 2 debugging, 3 everything.
pub(crate) fn start(verbosity: u8) {
    let level = match verbosity {
        0 => LevelFilter::Warn,
        1 => LevelFilter::Info,
        2 => LevelFilter::Debug,
        _ => LevelFilter::Trace,
    };
    if log::set_logger(&STDERR).is_ok() {
        log::set_max_level(level);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_place_that_writes_without_end_is_cut_to_a_line_a_second() {
        let begun = Instant::now();
        let mut place = Allowance::new(begun);
        let written = (0..5000).filter(|_| place.take(begun).is_some()).count();
        assert_eq!(written, 1000);
        let later = begun + Duration::from_secs(2);
        assert_eq!([0; 3].map(|_| place.take(later)), [Some(4000), Some(0), None]);
        let next_day = later + Duration::from_secs(86_400);
        assert_eq!((0..5000).filter(|_| place.take(next_day).is_some()).count(), 1000);
    }

    #[test]
    fn places_are_told_apart_and_debugging_is_whole() {
        let out = Mutex::new(Out { outlet: None, omitted: 0 });
        let stderr = Stderr { places: Mutex::default(), out };
        let allowed = |level, line| {
            let record = Record::builder().level(level).file_static(Some("a.rs")).line(Some(line)).build();
            (0..1500).filter(|_| stderr.allows(&record).is_some()).count()
        };
        assert!(allowed(Level::Warn, 1) < 1100);
        assert!(allowed(Level::Error, 2) >= 1000);
        assert_eq!(allowed(Level::Debug, 3), 1500);
    }
}
