//! Stops a machine whose guest reboots again and again.
//!
//! The default command line has `panic=-1`. With it, a kernel that panics at each start also reboots at each
//! start, without end. After `LIMIT` such boots in a row the machine ends with a message for the user.

use std::time::Duration;

/// A boot that ends by a reset before this time is a short boot. A stock kernel that panics at its start
/// panics before it.
const SHORT: Duration = Duration::from_secs(60);
/// After this many short boots in a row the machine ends.
const LIMIT: u32 = 10;

/// Counts boots that end by a reset soon after their start.
#[derive(Debug)]
pub(crate) struct Reboots {
    /// True with the default command line only. A user who gives another command line may want endless
    /// reboots.
    bounded: bool,
    short: u32,
}

impl Reboots {
    pub(crate) fn new(bounded: bool) -> Self {
        Reboots { bounded, short: 0 }
    }

    /// Called when a boot has ended by a reset after `lasted`. `Ok` means that the machine should start
    /// again.
    ///
    /// # Errors
    /// When the machine should not start again. The text gives the reason.
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
