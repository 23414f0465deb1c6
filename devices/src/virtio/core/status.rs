//! Virtio 1.2 §2.1 and §3.1: the device status field and its legal transitions, as a table. Decides only
//! which transition a write is.

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

/// The meaning of a write to the status field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transition {
    /// The driver resets the device.
    Reset,
    /// The driver writes the present value.
    Same,
    /// One or more steps forward, in the order in which they are taken.
    Steps(&'static [Step]),
    /// The driver gives up.
    GiveUp,
    /// Any other value: a step is left out, a bit is taken back, or a bit is unknown.
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

    /// The driver's bits before the first step, and after each step.
    const PATH: [u8; 5] = [0x0, 0x1, 0x3, 0xb, 0xf];
    /// The steps, in the order that §3.1.1 asks for.
    const STEPS: [Step; 4] = [Step::Acknowledge, Step::Driver, Step::FeaturesOk, Step::DriverOk];

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

    /// The meaning of writing `written` in this state. The specification asks for an order of steps, but not
    /// for one write for each step: several drivers (the crate `virtio-drivers`, `SeaBIOS`) take two steps in
    /// one write. `NEEDS_RESET` belongs to the device. The bit is ignored in writes, because drivers write
    /// back the value that they have read.
    #[must_use]
    pub fn transition(self, written: u8) -> Transition {
        if written == 0 {
            return Transition::Reset;
        }
        let now = self.driver_bits();
        match written & !Self::NEEDS_RESET {
            same if same == now => Transition::Same,
            failed if failed == now | Self::FAILED => Transition::GiveUp,
            next => {
                let place = |bits: u8| Self::PATH.iter().position(|reached| *reached == bits);
                let steps = place(now).zip(place(next)).and_then(|(from, to)| Self::STEPS.get(from..to));
                steps.map_or(Transition::Illegal, Transition::Steps)
            }
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
        for (place, from) in Status::PATH.into_iter().enumerate() {
            for written in 0..=u8::MAX {
                let plain = written & !Status::NEEDS_RESET;
                let expected = if written == 0 {
                    Transition::Reset
                } else if plain == from {
                    Transition::Same
                } else if plain == from | Status::FAILED {
                    Transition::GiveUp
                } else {
                    match Status::PATH.iter().position(|bits| *bits == plain) {
                        Some(to) if to > place => Transition::Steps(&Status::STEPS[place..to]),
                        _ => Transition::Illegal,
                    }
                };
                assert_eq!(Status(from).transition(written), expected, "{from:#x} -> {written:#x}");
            }
        }
    }

    #[test]
    fn several_steps_may_be_taken_in_one_write_if_none_is_left_out() {
        use Step::{Acknowledge, Driver, DriverOk, FeaturesOk};
        assert_eq!(Status(0).transition(0x3), Transition::Steps(&[Acknowledge, Driver]));
        assert_eq!(Status(0x1).transition(0xb), Transition::Steps(&[Driver, FeaturesOk]));
        assert_eq!(Status(0x3).transition(0xf), Transition::Steps(&[FeaturesOk, DriverOk]));
        for written in [0x2, 0x8, 0x9, 0xa, 0x4, 0x7, 0xc] {
            assert_eq!(Status(0).transition(written), Transition::Illegal, "{written:#x}");
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
        assert_eq!(Status(0x41).transition(0x43), Transition::Steps(&[Step::Driver]));
        assert_eq!(broken.transition(0), Transition::Reset);
    }
}
