//! Coming back to a back-end that went away: when to try, and whether what came back fits.
//!
//! Decides; does not connect. A back-end fits when the driver, which cannot be asked again, notices nothing: all
//! features that it took, all queues that it uses, and a configuration of the same size.

use std::time::{Duration, Instant};

use super::error::{Cause, Error, Step};
use super::features::{DriverFeatures, ProtocolFeatures, bit};
use super::request::Request;
use super::session::Session;

/// The first pause between two attempts.
const PAUSE_FIRST: Duration = Duration::from_millis(10);

/// The longest pause between two attempts.
const PAUSE_MOST: Duration = Duration::from_secs(1);

/// When to try to reach a back-end again: at once, then less and less often, until the user's time is over.
#[derive(Clone, Copy, Debug)]
pub struct Attempts {
    until: Option<Instant>,
    pause: Duration,
}

impl Attempts {
    /// Tries for `limit` from now; `None` for ever.
    pub fn lasting(limit: Option<Duration>) -> Self {
        // A limit beyond the end of time is none.
        let until = limit.and_then(|limit| Instant::now().checked_add(limit));
        Self { until, pause: PAUSE_FIRST }
    }

    /// How long to wait before the next attempt; `None` when the time is over.
    pub fn next_pause(&mut self) -> Option<Duration> {
        let left = match self.until {
            None => PAUSE_MOST,
            Some(until) => until.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?,
        };
        let pause = self.pause.min(left);
        self.pause = self.pause.saturating_mul(2).min(PAUSE_MOST);
        Some(pause)
    }

    /// Begins anew with short pauses, as after a success.
    pub fn reset_pause(&mut self) {
        self.pause = PAUSE_FIRST;
    }
}

/// What the driver relies on.
#[derive(Clone, Copy, Debug)]
pub struct Reliance {
    /// Features that it took.
    pub features: DriverFeatures,
    /// Queues that it uses, counted as the back-end counts them.
    pub queues: u16,
    /// Bytes of configuration space that it may read; 0 when there is none.
    pub config_size: usize,
    /// Protocol features without which the device cannot go on: DEVICE_STATE, SHMEM, INFLIGHT_SHMFD …
    pub protocol: ProtocolFeatures,
}

impl Reliance {
    /// Judges whether `session` can take the place of the back-end that was lost; `config` is what it says now.
    pub fn check(&self, session: &Session, config: &[u8]) -> Result<(), Error> {
        let unfit = |request, what: String| {
            Err(Error::new(session.channel.peer(), Step::Request(request), Cause::Incompatible(what)))
        };
        let missing = self.features.bits() & !session.offered().bits();
        if missing != 0 {
            let names = super::features::DeviceFeatures::from_bits(missing);
            return unfit(
                Request::GET_FEATURES,
                format!("the guest uses {names}, which it no longer offers"),
            );
        }
        let missing = self.protocol.without(session.protocol());
        if missing != ProtocolFeatures::NONE {
            return unfit(Request::GET_PROTOCOL_FEATURES, format!("it no longer offers {missing}"));
        }
        if session.queue_num() < self.queues {
            let what = format!("the guest uses {} queues, it serves {}", self.queues, session.queue_num());
            return unfit(Request::GET_QUEUE_NUM, what);
        }
        if config.len() != self.config_size {
            let what = format!("its configuration has {} bytes, it had {}", config.len(), self.config_size);
            return unfit(Request::GET_CONFIG, what);
        }
        Ok(())
    }

    /// True when a ring can be taken over without an inflight area from its used index alone: a packed ring keeps
    /// its wrap counters in the back-end.
    pub fn rings_tell_their_place(&self) -> bool {
        !self.features.has(bit::RING_PACKED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_second_and_end_with_the_users_time() {
        let mut attempts = Attempts::lasting(None);
        let pauses: Vec<u128> = (0..9).map(|_| attempts.next_pause().unwrap().as_millis()).collect();
        assert_eq!(pauses, [10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
        attempts.reset_pause();
        assert_eq!(attempts.next_pause(), Some(PAUSE_FIRST));
        let mut short = Attempts::lasting(Some(Duration::from_millis(5)));
        assert!(short.next_pause().unwrap() <= Duration::from_millis(5));
        std::thread::sleep(Duration::from_millis(6));
        assert_eq!(short.next_pause(), None);
        assert!(Attempts::lasting(Some(Duration::MAX)).next_pause().is_some());
    }
}
