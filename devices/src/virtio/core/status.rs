//! Virtio 1.2 §2.1 and §3.1: the device status field and its legal transitions, as a table.
//! Decides nothing but which transition a write is.

use std::fmt;

/// The device status field.
///
/// ```text
///        ACKNOWLEDGE     DRIVER      FEATURES_OK     DRIVER_OK
///   (0) ────────────▶ 1 ────────▶ 3 ────────────▶ b ──────────▶ f
///    ▲                │           │               │             │
///    └── a write of 0 from any state ─────────────┴─────────────┘
///   FAILED may be added in any state; NEEDS_RESET is the device's and goes with the reset.
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Status(u8);

/// What a write to the status field means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transition {
    /// The driver resets the device.
    Reset,
    /// The driver writes what is there.
    Same,
    /// One step forward.
    Step(Step),
    /// The driver gives up.
    GiveUp,
    /// Anything else: a step left out, a bit taken back, an unknown bit.
    Illegal,
}

/// A step of the initialisation sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The guest noticed the device.
    Acknowledge,
    /// The guest knows how to drive it.
    Driver,
    /// Feature negotiation is complete, if the device agrees.
    FeaturesOk,
    /// The driver is ready: queues may run.
    DriverOk,
}

impl Status {
    /// The guest has noticed the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The guest knows how to drive the device.
    pub const DRIVER: u8 = 2;
    /// The driver is set up.
    pub const DRIVER_OK: u8 = 4;
    /// Both sides agree on the features.
    pub const FEATURES_OK: u8 = 8;
    /// The device cannot go on without a reset.
    pub const NEEDS_RESET: u8 = 0x40;
    /// The driver has given up on the device.
    pub const FAILED: u8 = 0x80;

    /// The only steps there are: driver bits before, driver bits written, the step.
    const STEPS: [(u8, u8, Step); 4] = [
        (0x0, 0x1, Step::Acknowledge),
        (0x1, 0x3, Step::Driver),
        (0x3, 0xb, Step::FeaturesOk),
        (0xb, 0xf, Step::DriverOk),
    ];

    /// The field as a number.
    #[must_use]
    pub fn bits(self) -> u8 {
        self.0
    }

    /// Whether any of `bits` is set.
    #[must_use]
    pub fn has(self, bits: u8) -> bool {
        self.0 & bits != 0
    }

    /// The bits that belong to the driver.
    fn driver_bits(self) -> u8 {
        self.0 & !Self::NEEDS_RESET
    }

    /// What writing `written` means in this state. `NEEDS_RESET` is not the driver's to write: as
    /// drivers write back what they read, it is ignored.
    #[must_use]
    pub fn transition(self, written: u8) -> Transition {
        if written == 0 {
            return Transition::Reset;
        }
        let now = self.driver_bits();
        match written & !Self::NEEDS_RESET {
            same if same == now => Transition::Same,
            failed if failed == now | Self::FAILED => Transition::GiveUp,
            next => Self::STEPS
                .iter()
                .find(|(from, to, _)| (*from, *to) == (now, next))
                .map_or(Transition::Illegal, |(_, _, step)| Transition::Step(*step)),
        }
    }

    /// Sets the bit of `step`.
    pub fn take(&mut self, step: Step) {
        self.0 |= match step {
            Step::Acknowledge => Self::ACKNOWLEDGE,
            Step::Driver => Self::DRIVER,
            Step::FeaturesOk => Self::FEATURES_OK,
            Step::DriverOk => Self::DRIVER_OK,
        };
    }

    /// The driver gives up.
    pub fn give_up(&mut self) {
        self.0 |= Self::FAILED;
    }

    /// The device cannot go on.
    pub fn need_reset(&mut self) {
        self.0 |= Self::NEEDS_RESET;
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#04x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_pair_of_states_is_exactly_what_the_specification_says() {
        let path = [0x0, 0x1, 0x3, 0xb, 0xf];
        for from in path {
            for written in 0..=u8::MAX {
                let plain = written & !Status::NEEDS_RESET;
                let position = path.iter().position(|s| *s == from).unwrap();
                let expected = if written == 0 {
                    Transition::Reset
                } else if plain == from {
                    Transition::Same
                } else if plain == from | Status::FAILED {
                    Transition::GiveUp
                } else if path.get(position + 1) == Some(&plain) {
                    Transition::Step(Status::STEPS[position].2)
                } else {
                    Transition::Illegal
                };
                assert_eq!(Status(from).transition(written), expected, "{from:#x} -> {written:#x}");
            }
        }
    }

    #[test]
    fn after_giving_up_only_a_reset_leads_on() {
        let failed = Status(0x83);
        assert_eq!(failed.transition(0), Transition::Reset);
        assert_eq!(failed.transition(0x83), Transition::Same);
        for written in [0x8b, 0x03, 0x0b, 0x0f, 0x80] {
            assert_eq!(failed.transition(written), Transition::Illegal, "{written:#x}");
        }
    }

    #[test]
    fn needs_reset_written_back_by_the_driver_changes_nothing() {
        let broken = Status(0x4f);
        assert_eq!(broken.transition(0x4f), Transition::Same);
        assert_eq!(broken.transition(0x0f), Transition::Same);
        assert_eq!(broken.transition(0xcf), Transition::GiveUp);
        assert_eq!(Status(0x41).transition(0x43), Transition::Step(Step::Driver));
        assert_eq!(broken.transition(0), Transition::Reset);
    }
}
