//! A kernel that panics at each start reboots at each start, as the default command line has `panic=-1`.
//! Somebody should be told instead, after some turns.

use std::time::Duration;

/// A boot that ends by a reset before this time is a short one; a stock kernel takes less to panic.
const SHORT: Duration = Duration::from_secs(60);
/// So many short boots in a row are enough.
const LIMIT: u32 = 10;

/// Counts boots that end by a reset soon after their start.
#[derive(Debug)]
pub(crate) struct Reboots {
    /// Only the default command line is bounded: a user who writes another one may want what it says.
    bounded: bool,
    short: u32,
}

impl Reboots {
    pub(crate) fn new(bounded: bool) -> Self {
        Reboots { bounded, short: 0 }
    }

    /// A boot has lasted that long and has ended by a reset: whether the machine should start again.
    ///
    /// # Errors
    /// When it should not, with the reason.
    pub(crate) fn again(&mut self, lasted: Duration) -> Result<(), String> {
        self.short = if lasted < SHORT { self.short.saturating_add(1) } else { 0 };
        if self.bounded && self.short >= LIMIT {
            return Err(format!(
                "it has reset the machine {LIMIT} times in a row within {SHORT:?} of its start; its console may say why \
                 (the default command line has panic=-1: a kernel that panics resets at once)"
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_short_boots_in_a_row_are_the_end_with_the_default_command_line_alone() {
        let (short, long) = (Duration::from_secs(1), Duration::from_secs(61));
        let mut reboots = Reboots::new(true);
        for _ in 0..3 {
            assert!((0..9).all(|_| reboots.again(short).is_ok()));
            assert_eq!(reboots.again(long), Ok(()), "begins anew");
        }
        assert!((0..9).all(|_| reboots.again(short).is_ok()));
        assert!(reboots.again(short).unwrap_err().contains("10 times in a row"));
        let mut reboots = Reboots::new(false);
        assert!((0..1000).all(|_| reboots.again(short).is_ok()));
    }
}
