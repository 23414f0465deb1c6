//! Messages on standard error: `outboard: LEVEL: text`, from the `log` crate; and the trace of `--trace -`.
//!
//! Guests and peers cause messages; they must not fill a disk with them, whatever they do. Nobody may be reading
//! standard error: a message never waits.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::console::outlet::Outlet;

/// Lines that one place of the program may write at once: enough for every device of a machine, again and again.
/// Afterwards it is one a second.
const BURST: u32 = 1000;

/// What one place may still write.
struct Allowance {
    left: u32,
    since: Instant,
    omitted: u64,
}

impl Allowance {
    fn new(now: Instant) -> Self {
        Self { left: BURST, since: now, omitted: 0 }
    }

    /// Whether there may be a line now; then how many there might not be before it.
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

/// File and line of the place: there are only so many.
type Place = (Option<&'static str>, Option<u32>);

struct Stderr {
    /// Locked for a moment.
    places: Mutex<BTreeMap<Place, Allowance>>,
    out: Mutex<Out>,
}

/// Lines that standard error has not taken yet, and how many it will never see.
struct Out {
    outlet: Option<Outlet>,
    omitted: u64,
}

/// How many bytes may wait for a reader of standard error.
const WAITING: usize = 256 << 10;

static STDERR: Stderr =
    Stderr { places: Mutex::new(BTreeMap::new()), out: Mutex::new(Out { outlet: None, omitted: 0 }) };

impl Out {
    /// Opened when first needed. `None` when that cannot be.
    fn outlet(&mut self) -> Option<&mut Outlet> {
        if self.outlet.is_none() {
            self.outlet = Outlet::stream(io::stderr().as_fd()).ok();
        }
        self.outlet.as_mut()
    }
}

/// Writes text to standard error, or keeps it until somebody reads. False when nobody will.
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

/// Gives a reader of standard error the time to read the last messages, as long as it goes on reading.
pub(crate) fn finish() {
    let mut out = STDERR.out.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(outlet) = &mut out.outlet
        && outlet.drain(Duration::from_millis(100), Duration::from_secs(5)).is_err()
    {
        outlet.forget(0);
    }
}

impl Stderr {
    /// See [`Allowance::take`]. Who asks for debugging gets all of it.
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
        // A closed standard error leaves nowhere to complain.
        if !write(&line) {
            log::set_max_level(LevelFilter::Off);
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
