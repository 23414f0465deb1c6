//! The registers by which a guest ends or restarts the machine: the ACPI reset and sleep registers (ACPI 6.5
//! §4.8.3.6, §4.8.3.7) and the i8042's reset command. They must never reset anything themselves: they report
//! the guest's request, and the machine decides what follows.

use crate::bus::BusDevice;

/// What the guest asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ResetKind {
    /// A restart.
    Reset,
    /// A power-off.
    PowerOff,
}

/// Called on the vCPU thread that made the access; must not wait.
type OnReset = Box<dyn Fn(ResetKind) + Send + Sync>;

/// The ACPI reset, sleep control and sleep status registers in one range of I/O ports.
///
/// | offset | FADT field | a write does |
/// |--|--|--|
/// | 0 | `SLEEP_CONTROL_REG` | sleep type 5 with `SLP_EN`: power-off |
/// | 1 | `SLEEP_STATUS_REG` | nothing (it reads 0: never woken) |
/// | 2 | `RESET_REG` | [`ResetPort::RESET_VALUE`]: reset |
pub struct ResetPort {
    on_reset: OnReset,
}

impl ResetPort {
    /// Length of the range.
    pub const LENGTH: u64 = 3;
    /// Offset of `SLEEP_CONTROL_REG`.
    pub const SLEEP_CONTROL: u64 = 0;
    /// Offset of `SLEEP_STATUS_REG`.
    pub const SLEEP_STATUS: u64 = 1;
    /// Offset of `RESET_REG`.
    pub const RESET: u64 = 2;
    /// The FADT's `RESET_VALUE`.
    pub const RESET_VALUE: u8 = 1;
    /// The sleep type that `_S5` names.
    pub const SLEEP_TYPE_S5: u8 = 5;

    const SLP_TYP_SHIFT: u32 = 2;
    const SLP_TYP_MASK: u8 = 7;
    const SLP_EN: u8 = 1 << 5;

    /// Calls `on_reset`, on a vCPU thread, when the guest writes one of the values above.
    pub fn new(on_reset: impl Fn(ResetKind) + Send + Sync + 'static) -> Self {
        Self { on_reset: Box::new(on_reset) }
    }
}

impl BusDevice for ResetPort {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        match offset {
            Self::SLEEP_CONTROL if value & Self::SLP_EN != 0 => {
                let sleep_type = (value >> Self::SLP_TYP_SHIFT) & Self::SLP_TYP_MASK;
                if sleep_type == Self::SLEEP_TYPE_S5 {
                    (self.on_reset)(ResetKind::PowerOff);
                } else {
                    log::info!("the guest asked for sleep type {sleep_type}, which this machine has not");
                }
            }
            Self::RESET if value == Self::RESET_VALUE => (self.on_reset)(ResetKind::Reset),
            _ => {}
        }
    }
}

/// The command port (0x64) of a keyboard controller whose only function is to reset the machine.
pub struct I8042 {
    on_reset: OnReset,
}

impl I8042 {
    /// Length of the range.
    pub const LENGTH: u64 = 1;
    const PULSE_RESET_LINE: u8 = 0xfe;

    /// Calls `on_reset`, on a vCPU thread, when the guest pulses the reset line.
    pub fn new(on_reset: impl Fn(ResetKind) + Send + Sync + 'static) -> Self {
        Self { on_reset: Box::new(on_reset) }
    }
}

impl BusDevice for I8042 {
    /// Reads 0, "ready for a command": a guest waits for that status before it writes a command.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        if data == [Self::PULSE_RESET_LINE] {
            (self.on_reset)(ResetKind::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lock;
    use std::sync::{Arc, Mutex};

    type Seen = Arc<Mutex<Vec<ResetKind>>>;

    fn recorder() -> (Seen, impl Fn(ResetKind) + Send + Sync + 'static) {
        let seen = Seen::default();
        let inner = Arc::clone(&seen);
        (seen, move |kind| lock(&inner).push(kind))
    }

    #[test]
    fn only_sleep_type_five_with_enable_powers_off() {
        let (seen, record) = recorder();
        let port = ResetPort::new(record);
        for value in [0x20, 5 << 2, 0x20 | 4 << 2, 0x80] {
            port.write(ResetPort::SLEEP_CONTROL, &[value]);
            port.write(ResetPort::SLEEP_STATUS, &[value]);
        }
        assert!(lock(&seen).is_empty());
        port.write(ResetPort::SLEEP_CONTROL, &[0x20 | 5 << 2]);
        assert_eq!(*lock(&seen), [ResetKind::PowerOff]);
    }

    #[test]
    fn only_the_reset_value_and_the_pulse_command_reset() {
        let (seen, record) = recorder();
        let port = ResetPort::new(record);
        port.write(ResetPort::RESET, &[0]);
        port.write(ResetPort::RESET, &[1, 0]);
        assert!(lock(&seen).is_empty());
        port.write(ResetPort::RESET, &[ResetPort::RESET_VALUE]);
        assert_eq!(*lock(&seen), [ResetKind::Reset]);

        let (seen, record) = recorder();
        let keyboard = I8042::new(record);
        keyboard.write(0, &[0xd1]);
        keyboard.write(0, &[0xfe]);
        assert_eq!(*lock(&seen), [ResetKind::Reset]);
    }

    #[test]
    fn registers_read_zero_so_that_guests_neither_wait_nor_think_they_woke() {
        let mut data = [0xff; 1];
        ResetPort::new(|_| ()).read(ResetPort::SLEEP_STATUS, &mut data);
        assert_eq!(data, [0]);
        data = [0xff];
        I8042::new(|_| ()).read(0, &mut data);
        assert_eq!(data, [0]);
    }
}
