//! A driver that writes anything anywhere, and what must hold of its device after each step.

use devices::bus::BusDevice;
use devices::virtio::PhaseReport;
use devices::virtio::transport::mmio::{MmioDevice, Place};
use transport::memory::GuestAddr;

use crate::input::Input;
use crate::ports::Recorder;

/// Where the device is on every board.
pub const PLACE: Place = Place { base: GuestAddr(0xd000_0000), gsi: 5 };

/// One step: something that a driver does, or something that happens to the device.
pub fn step(input: &mut Input, device: &mut MmioDevice, machine: &Recorder) {
    let act = input.byte();
    match act {
        // The machine restarts: the next board has the same device.
        172 => {
            device.handle().unplug();
            plug_again(device, machine);
        }
        // The machine ends: nothing is asked of the device after that.
        173 => {
            device.handle().end();
            plug_again(device, machine);
            input.rest();
        }
        act => step_on_board(act, input, device, machine),
    }
}

/// Puts a device that has left its board on the next one, at power-on.
fn plug_again(device: &mut MmioDevice, machine: &Recorder) {
    assert_eq!(machine.counts(), (0, 0), "what was registered for the last board is there still");
    let handle = device.handle();
    assert!(
        !matches!(handle.phase(), PhaseReport::Running | PhaseReport::Suspended),
        "queues without a board"
    );
    let plug = || MmioDevice::new(&handle, PLACE, &machine.ports());
    // A machine refuses once at most.
    *device = plug().or_else(|_| plug()).expect("a machine that refuses nothing");
    assert_eq!(machine.page_u32(0x70), 0, "the status at power-on");
}

fn step_on_board(act: u8, input: &mut Input, device: &MmioDevice, machine: &Recorder) {
    let write = |offset: u64, value: u32| device.write(offset, &value.to_le_bytes());
    match act {
        // What a driver does; alone and in order it leads to DRIVER_OK.
        op @ 0..64 => match op % 8 {
            0 => write(0x70, machine.page_u32(0x70)),
            1 => [1, 3].iter().for_each(|status| write(0x70, *status)),
            2 => {
                // Packed rings now and then: with split ones more can happen.
                let taken = if input.rarely(4) { [u32::MAX; 2] } else { [u32::MAX, !(1 << 2)] };
                for (half, taken) in (0..).zip(taken) {
                    write(0x14, half);
                    write(0x24, half);
                    write(0x20, machine.page_u32(0x10) & taken);
                }
                write(0x70, 0xb);
            }
            3 => {
                let queue = u32::from(input.byte() % 5);
                write(0x30, queue);
                write(0x38, u32::from(input.pick(&[256u16, 1, 3, 257, 128])));
                for (offset, at) in [(0x80, 0x1000), (0x90, 0x3000), (0xa0, 0x4000)] {
                    write(offset, if input.rarely(16) { input.number() as u32 } else { queue << 16 | at });
                    write(offset + 4, if input.rarely(16) { input.byte().into() } else { 0 });
                }
                write(0x44, 1);
            }
            4 => write(0x70, 0xf),
            5 => write(0x50, input.byte().into()),
            6 => write(0x64, input.byte().into()),
            _ => write(0x70, 0),
        },
        64..96 => write(u64::from(input.byte()) & !3, input.number() as u32),
        // The bus hands on only what is inside the page: a target of its own sees to that.
        96..112 => device.write(input.number() % 0xff0, &input.bytes(16)),
        112..128 => device.write(0x100 + u64::from(input.byte()), &input.bytes(8)),
        128..144 => {
            device.read(input.number() % 0xff0, &mut [0; 16]);
        }
        144..160 => device.handle().config_changed(),
        160..168 => device.handle().machine_reset(),
        168..170 => device.handle().peer_lost("it went"),
        170 => device.handle().suspend(),
        171 => device.handle().resume(),
        174..176 => device.handle().serve_kick(u16::from(input.byte() % 5)),
        _ => drop(device.handle().stats()),
    }
}

/// Registers that can be read, and the beginning of the configuration.
const SHOWN: [u64; 20] = [
    0x000, 0x004, 0x008, 0x00c, 0x010, 0x034, 0x044, 0x060, 0x070, 0x0b0, 0x0b4, 0x0b8, 0x0bc, 0x0fc, 0x100,
    0x104, 0x108, 0x11c, 0x120, 0x138,
];

/// What a guest reads without an exit is what a trapped read gives, everywhere.
pub fn all_of_its_page(device: &MmioDevice, machine: &Recorder) {
    let mut trapped = [0xaa; 0x200];
    device.read(0, &mut trapped);
    for (at, (shown, is)) in machine.page(0, 0x200).iter().zip(trapped).enumerate() {
        assert_eq!(*shown, is, "the page differs from the registers at {at:#x}");
    }
}

/// The same where it matters, cheap enough for each step; what does not run is not connected; a driver that
/// has to reset the device is told so.
pub fn true_to_its_page(device: &MmioDevice, machine: &Recorder) {
    for at in SHOWN {
        let mut trapped = [0xaa; 4];
        device.read(at, &mut trapped);
        let (shown, is) = (machine.page_u32(at as usize), u32::from_le_bytes(trapped));
        assert_eq!(shown, is, "the page differs from the registers at {at:#x}");
    }
    let phase = device.handle().phase();
    if !matches!(phase, PhaseReport::Running | PhaseReport::Suspended | PhaseReport::Recovering(_)) {
        // The sink of the acknowledgements, and the interrupt of the configuration.
        assert_eq!(machine.counts(), (1, 1), "{phase:?}");
    }
    let status = machine.page_u32(0x70);
    match phase {
        PhaseReport::Running | PhaseReport::Suspended => {
            assert_eq!(status & 0xf, 0xf, "queues run without a driver");
        }
        PhaseReport::NeedsReset(why) => assert_eq!(status & 0x40, 0x40, "{why}"),
        _ => {}
    }
}
