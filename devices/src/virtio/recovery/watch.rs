//! Whether a backend that took over a live ring really goes on where the lost one stopped: some begin
//! their used index at 0 and write over what the driver has yet to read. Reads indexes in guest memory;
//! must never judge by anything that a backend in order could cause as well.

use crate::virtio::core::device::Device;
use crate::virtio::core::handle::DeviceHandle;
use crate::virtio::core::start::space;
use crate::virtio::core::state::Phase;
use crate::virtio::ring::resume::Indexes;

/// What is known of a successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Not every ring that it took over has moved yet.
    Unproven,
    /// Nothing speaks against it, or there is nothing (more) to judge.
    Settled,
}

/// What one ring says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Unmoved,
    GoesOn,
    BeganAnew,
}

/// Judges a ring that was handed over at `base` and stands at `now`.
///
/// Since then `now.used - base` buffers were used of at most `now.available - base`, counted around. A
/// backend that began at 0 has a used index that is itself such a count.
pub(crate) fn judge(base: u16, now: Indexes) -> Verdict {
    let most = now.available.wrapping_sub(base);
    if now.used == base {
        Verdict::Unmoved
    } else if now.used.wrapping_sub(base) > most && now.used <= most {
        Verdict::BeganAnew
    } else {
        Verdict::GoesOn
    }
}

impl DeviceHandle {
    /// Looks at the rings of a device whose backend took over. When it wrote its used index anew, the
    /// driver is told that the device needs a reset: its ring cannot be saved. May wait for the backend,
    /// to stop it, within its deadline.
    pub fn judge_successor(&self) -> Standing {
        self.with(Device::judge_successor)
    }
}

impl Device {
    fn judge_successor(&mut self) -> Standing {
        if !matches!(self.phase, Phase::Running(_)) {
            return Standing::Settled;
        }
        let Self { wiring, registers, memory, backend, .. } = self;
        let verdicts = wiring.judge(registers, space(registers, memory, backend.as_ref()));
        let Some((queue, base, now)) = verdicts.anew else {
            return if verdicts.unmoved { Standing::Unproven } else { Standing::Settled };
        };
        self.stop_and_need_reset(format!(
            "the backend that took over began queue {queue} anew, at {now} where {base} was due: \
             it cannot take over a ring in use"
        ));
        Standing::Settled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(base: u16, available: u16, used: u16) -> Verdict {
        judge(base, Indexes { available, used })
    }

    #[test]
    fn ring_that_goes_on_is_told_from_one_that_began_anew() {
        assert_eq!(at(100, 103, 100), Verdict::Unmoved);
        assert_eq!(at(100, 103, 101), Verdict::GoesOn);
        assert_eq!(at(100, 103, 103), Verdict::GoesOn);
        assert_eq!(at(100, 103, 1), Verdict::BeganAnew);
        assert_eq!(at(5000, 5256, 256), Verdict::BeganAnew);
        assert_eq!(at(65534, 3, 65535), Verdict::GoesOn);
        assert_eq!(at(65534, 3, 2), Verdict::GoesOn);
        assert_eq!(at(40000, 40009, 2), Verdict::BeganAnew);
    }

    #[test]
    fn ring_that_begins_at_0_anyhow_cannot_begin_anew() {
        for used in 0..=9 {
            assert_ne!(at(0, 9, used), Verdict::BeganAnew);
        }
    }
}
