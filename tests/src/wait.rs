//! Waits that end: every one has a limit and says what it waited for.

use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// `limit` on a quiet machine, stretched where time runs slower: `OUTBOARD_PATIENCE` is the factor, by default 3 on a
/// host and 4 inside the lab. Only for limits that a correct run never reaches.
///
/// # Panics
/// When the factor is no number.
#[must_use]
pub fn patience(limit: Duration) -> Duration {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    let factor = FACTOR.get_or_init(|| match std::env::var("OUTBOARD_PATIENCE") {
        Ok(text) => text.parse().expect("OUTBOARD_PATIENCE is a whole number"),
        Err(_) if crate::place::in_lab() => 4,
        Err(_) => 3,
    });
    limit * *factor
}

/// Calls `probe` until it gives something, for at most `patience(limit)`; `None` when the time is up.
pub fn poll<T>(limit: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let end = Instant::now() + patience(limit);
    loop {
        if let Some(found) = probe() {
            return Some(found);
        }
        if Instant::now() >= end {
            return None;
        }
        sleep(Duration::from_millis(2));
    }
}

/// As [`poll`], and a failed test when the time is up.
///
/// # Panics
/// When `what` did not come in time.
pub fn until<T>(what: &str, limit: Duration, probe: impl FnMut() -> Option<T>) -> T {
    poll(limit, probe).unwrap_or_else(|| panic!("{what}: not within {:?}", patience(limit)))
}
