//! Waits that end: each has a limit and says what it waited for.

use std::sync::OnceLock;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// `limit` on a quiet machine, stretched where time runs slower. `OUTBOARD_PATIENCE` is the factor; it is 3
/// on a host, and 4 inside the lab (`OUTBOARD_IN_LAB`), by default. Only for limits that a correct run never
/// reaches.
///
/// # Panics
/// When the factor is no number.
#[must_use]
pub fn patience(limit: Duration) -> Duration {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    let factor = FACTOR.get_or_init(|| match std::env::var("OUTBOARD_PATIENCE") {
        Ok(text) => text.parse().expect("OUTBOARD_PATIENCE is a whole number"),
        Err(_) if std::env::var_os("OUTBOARD_IN_LAB").is_some() => 4,
        Err(_) => 3,
    });
    limit * *factor
}

/// How long a wait sleeps before it looks again.
pub const ROUND: Duration = Duration::from_millis(2);

/// What is left of a limit. A sleep that took much longer than was asked for does not count in full: this
/// process was not run meanwhile, and most likely the process that it waits for was not run either. On a
/// machine that has an eighth of a processor, a limit lasts about eight times as long; it still ends.
#[derive(Debug)]
pub struct Allowance(Duration);

impl Allowance {
    /// `patience(limit)`.
    #[must_use]
    pub fn new(limit: Duration) -> Self {
        Self(patience(limit))
    }

    /// Takes off one [`ROUND`] of sleep that took so long.
    pub fn slept(&mut self, took: Duration) {
        self.0 = self.0.saturating_sub(took.min(2 * ROUND));
    }

    /// Takes off work that took so long.
    pub fn worked(&mut self, took: Duration) {
        self.0 = self.0.saturating_sub(took);
    }

    /// True when nothing is left.
    #[must_use]
    pub fn is_spent(&self) -> bool {
        self.0.is_zero()
    }
}

/// Calls `probe` until it gives something, for at most `patience(limit)` of an [`Allowance`]; `None` when the
/// time is up.
pub fn poll<T>(limit: Duration, mut probe: impl FnMut() -> Option<T>) -> Option<T> {
    let mut left = Allowance::new(limit);
    loop {
        let begun = Instant::now();
        if let Some(found) = probe() {
            return Some(found);
        }
        let looked = Instant::now();
        left.worked(looked.duration_since(begun));
        if left.is_spent() {
            return None;
        }
        sleep(ROUND);
        left.slept(looked.elapsed());
    }
}

/// As [`poll`], and a failed test when the time is up.
///
/// # Panics
/// When `what` did not come in time.
pub fn until<T>(what: &str, limit: Duration, probe: impl FnMut() -> Option<T>) -> T {
    poll(limit, probe).unwrap_or_else(|| panic!("{what}: not within {:?}", patience(limit)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_in_which_the_machine_did_something_else_is_not_held_against_what_is_waited_for() {
        let mut left = Allowance::new(Duration::from_secs(1));
        left.slept(Duration::from_secs(3600));
        assert!(!left.is_spent());
        let rounds = patience(Duration::from_secs(1)).as_nanos() / ROUND.as_nanos();
        (0..rounds).for_each(|_| left.slept(ROUND));
        assert!(left.is_spent(), "it ends all the same");
        assert_eq!(poll(Duration::from_millis(20), || None::<()>), None);
    }
}
