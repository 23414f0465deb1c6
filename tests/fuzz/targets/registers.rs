//! The virtio register file: any sequence of reads and writes of a driver, and of changes by the device,
//! keeps what the specification promises.
#![no_main]

use devices::virtio::core::registers::{Effect, Half, Identity, Refusal, Reg, Registers};
use devices::virtio::core::status::Status;
use devices::virtio::types::model::SharedMemory;
use fuzz::input::Input;
use libfuzzer_sys::fuzz_target;
use transport::memory::GuestAddr;
use transport::vhost_user::DeviceFeatures;

/// All of them.
const REGISTERS: [Reg; 27] = [
    Reg::DeviceId,
    Reg::VendorId,
    Reg::DeviceFeatures,
    Reg::DeviceFeaturesSel,
    Reg::DriverFeatures,
    Reg::DriverFeaturesSel,
    Reg::QueueSel,
    Reg::QueueSizeMax,
    Reg::QueueSize,
    Reg::QueueReady,
    Reg::QueueNotify,
    Reg::InterruptStatus,
    Reg::InterruptAck,
    Reg::Status,
    Reg::QueueDesc(Half::Low),
    Reg::QueueDesc(Half::High),
    Reg::QueueDriver(Half::Low),
    Reg::QueueDriver(Half::High),
    Reg::QueueDevice(Half::Low),
    Reg::QueueDevice(Half::High),
    Reg::ShmSel,
    Reg::ShmLen(Half::Low),
    Reg::ShmLen(Half::High),
    Reg::ShmBase(Half::Low),
    Reg::ShmBase(Half::High),
    Reg::ConfigGeneration,
    Reg::Status,
];

/// What a driver may read, as far as it does not change by itself.
fn all(registers: &Registers) -> Vec<u32> {
    REGISTERS.iter().map(|reg| registers.read(*reg)).collect()
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let config = input.bytes(64);
    let mut registers = Registers::new(Identity {
        device_id: 2,
        vendor_id: 3,
        features: DeviceFeatures::from_bits(if input.rarely(4) { input.u64() } else { 7 << 32 | 1 << 29 }),
        queues: u16::from(input.byte()) + 1,
        queue_size: 256,
        config: config.clone(),
        shared_memory: vec![None, Some(SharedMemory { base: GuestAddr(1 << 40), length: 1 << 33 })],
    });
    // Broken for good, and what the present driver is told.
    let (mut broken, mut needs_reset) = (false, false);
    while !input.is_empty() {
        let before = registers.clone();
        let (old, old_status) = (all(&before), before.status());
        match input.byte() {
            op @ 0..192 => {
                let reg = REGISTERS[usize::from(op) % REGISTERS.len()];
                // The driver's path is a few values; the rest is anything.
                let value = match input.byte() {
                    n @ 0..16 => {
                        [0, 1, 3, 0xb, 0xf, 0x8f, 0x4f, 2, 0x43, 4, 256, 5, 7, 8, 0x80, 0x40][usize::from(n)]
                    }
                    16 => u32::from(input.byte()),
                    _ => input.number() as u32,
                };
                let effect = registers.write(reg, value);
                judge(&before, &registers, reg, effect);
                match effect {
                    // The write goes as far as DRIVER, and no further.
                    Effect::Refused(Refusal::UnacceptableFeatures | Refusal::DeviceBroken) => {
                        let driver = u32::from(Status::ACKNOWLEDGE | Status::DRIVER);
                        let with_driver =
                            |(reg, was): (&Reg, u32)| if *reg == Reg::Status { was | driver } else { was };
                        let expected: Vec<u32> = REGISTERS.iter().zip(old).map(with_driver).collect();
                        assert_eq!(all(&registers), expected, "FEATURES_OK was refused");
                    }
                    Effect::Refused(_) => assert_eq!(all(&registers), old, "{reg:?} was refused"),
                    Effect::Notify(queue) => assert!(usize::from(queue) < registers.queues().len()),
                    Effect::Activate => assert_eq!(registers.status().bits() & !Status::NEEDS_RESET, 0xf),
                    Effect::Reset => assert_eq!(registers.status().bits() & !Status::NEEDS_RESET, 0),
                    _ => {}
                }
                assert!(!broken || before.accepted().is_some() || registers.accepted().is_none());
                needs_reset &= effect != Effect::Reset;
            }
            192..216 => {
                let (at, data) = (input.number() as usize, input.bytes(12));
                let effect = registers.write_config(at, &data);
                assert_eq!(effect == Effect::WriteConfig, inside(at, data.len(), config.len()));
                assert_eq!(all(&registers), old);
            }
            216..232 => {
                let (at, mut data) = (input.number() as usize, vec![0xaa; input.below(16)]);
                registers.read_config(at, &mut data);
                for (n, byte) in data.iter().enumerate() {
                    let expected = at.checked_add(n).and_then(|at| registers.config().get(at)).copied();
                    assert_eq!(*byte, expected.unwrap_or(0));
                }
            }
            232..240 => {
                let generation = registers.read(Reg::ConfigGeneration);
                registers.begin_config_change();
                assert_ne!(registers.read(Reg::ConfigGeneration), generation);
                registers.end_config_change(&input.bytes(80));
                assert_ne!(registers.read(Reg::ConfigGeneration), generation);
                assert_eq!(registers.config().len(), config.len());
            }
            240..248 => {
                let may = registers.note_config_interrupt();
                assert_eq!(may, old_status.has(Status::DRIVER_OK));
                assert!(!may || registers.read(Reg::InterruptStatus) == 3);
            }
            248..252 => {
                // No driver is at work on a device whose status is 0.
                needs_reset |= old_status != Status::default();
                if input.rarely(2) {
                    registers.mark_broken();
                    broken = true;
                } else {
                    registers.need_reset();
                }
            }
            _ => {
                registers.reset();
                needs_reset = false;
                assert_eq!(registers.read(Reg::InterruptStatus), 1);
            }
        }
        assert_eq!(registers.status().has(Status::NEEDS_RESET), needs_reset, "whatever the driver writes");
    }
});

fn inside(at: usize, length: usize, size: usize) -> bool {
    matches!(length, 1 | 2 | 4 | 8) && at.checked_add(length).is_some_and(|end| end <= size)
}

/// What holds after each write.
fn judge(before: &Registers, after: &Registers, reg: Reg, effect: Effect) {
    let (was, is) = (before.status(), after.status());
    assert_eq!(after.accepted().is_some(), is.has(Status::FEATURES_OK));
    if let Some(features) = after.accepted() {
        assert_eq!(features.bits() & !after.offered().bits(), 0, "only what was offered");
        assert!(features.has(32));
    }
    assert!(!is.has(Status::DRIVER_OK) || is.has(Status::FEATURES_OK));
    assert_eq!(after.read(Reg::InterruptStatus) & 1, 1, "a used buffer is always possible");
    if reg != Reg::Status {
        assert_eq!(was, is, "{reg:?} changed the status");
    }
    if was.has(Status::DRIVER_OK) && effect != Effect::Reset {
        assert_eq!(before.queues(), after.queues(), "a queue changed while it ran");
        assert_eq!(before.accepted(), after.accepted());
    }
    assert_eq!(effect == Effect::Activate, !was.has(Status::DRIVER_OK) && is.has(Status::DRIVER_OK));
}
