//! Virtio 1.2 §4.2: the virtio-mmio transport, version 2. Translates offsets; decides nothing.
//!
//! Every readable register is kept in a page of memory that the guest reads without an exit. Only writes come
//! here. `InterruptStatus` always shows "used buffer". The acknowledgement of exactly that reason, as well as
//! every kick, ends in the kernel at an eventfd.

use std::os::fd::AsFd;
use std::sync::Arc;

use transport::memory::GuestAddr;
use transport::vhost_user::vring::{Call, Kick};

use crate::bus::BusDevice;
use crate::ports::{Doorbells, Guard, Interrupts, PortError, Ports, RegisterPage, Route, WriteMatch};
use crate::virtio::backend::outlets::FixedOutlet;
use crate::virtio::core::device::PlugError;
use crate::virtio::core::face::Face;
use crate::virtio::core::handle::DeviceHandle;
use crate::virtio::core::registers::{Half, Reg, Registers};

/// The length of a device's address range: one page.
pub const LENGTH: u64 = 0x1000;

const QUEUE_NOTIFY: u16 = 0x050;
const INTERRUPT_ACK: u16 = 0x064;
/// The configuration space, up to the end of the page.
const CONFIG: u16 = 0x100;

/// The value with which a driver acknowledges used buffers and nothing else.
const USED_BUFFER: u32 = 1;

/// Registers that never change.
const CONSTANT: [(u16, u32); 2] = [(0x000, u32::from_le_bytes(*b"virt")), (0x004, 2)];

/// Registers that can be read, in the order in which they are shown.
const READABLE: [(u16, Reg); 12] = [
    (0x008, Reg::DeviceId),
    (0x00c, Reg::VendorId),
    (0x010, Reg::DeviceFeatures),
    (0x034, Reg::QueueSizeMax),
    (0x044, Reg::QueueReady),
    (0x060, Reg::InterruptStatus),
    (0x070, Reg::Status),
    (0x0b0, Reg::ShmLen(Half::Low)),
    (0x0b4, Reg::ShmLen(Half::High)),
    (0x0b8, Reg::ShmBase(Half::Low)),
    (0x0bc, Reg::ShmBase(Half::High)),
    (0x0fc, Reg::ConfigGeneration),
];

/// Registers that can be written.
const WRITABLE: [(u16, Reg); 16] = [
    (0x014, Reg::DeviceFeaturesSel),
    (0x020, Reg::DriverFeatures),
    (0x024, Reg::DriverFeaturesSel),
    (0x030, Reg::QueueSel),
    (0x038, Reg::QueueSize),
    (0x044, Reg::QueueReady),
    (QUEUE_NOTIFY, Reg::QueueNotify),
    (INTERRUPT_ACK, Reg::InterruptAck),
    (0x070, Reg::Status),
    (0x080, Reg::QueueDesc(Half::Low)),
    (0x084, Reg::QueueDesc(Half::High)),
    (0x090, Reg::QueueDriver(Half::Low)),
    (0x094, Reg::QueueDriver(Half::High)),
    (0x0a0, Reg::QueueDevice(Half::Low)),
    (0x0a4, Reg::QueueDevice(Half::High)),
    (0x0ac, Reg::ShmSel),
];

fn lookup<T: Copy>(table: &[(u16, T)], offset: u16) -> Option<T> {
    table.iter().find(|(at, _)| *at == offset).map(|(_, entry)| *entry)
}

/// The place of a device on the bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The guest address of its page.
    pub base: GuestAddr,
    /// The device's interrupt: all queues and the configuration share one edge-triggered line.
    pub gsi: u32,
}

struct MmioFace {
    place: Place,
    doorbells: Arc<dyn Doorbells>,
    interrupts: Arc<dyn Interrupts>,
    page: Arc<dyn RegisterPage>,
    _ack: Guard,
}

impl Place {
    fn write_of(self, offset: u16, value: u32) -> WriteMatch {
        // The page exists, so addresses in the page do not wrap.
        WriteMatch::register(GuestAddr(self.base.0.saturating_add(offset.into())), value)
    }
}

impl Face for MmioFace {
    fn connect(&self, queue: u16, kick: &Kick, call: &Call) -> Result<Guard, PortError> {
        let route = self.connect_config(call)?;
        let doorbell = self.doorbells.bind(kick.as_fd(), self.place.write_of(QUEUE_NOTIFY, queue.into()))?;
        // Drop order: kicks end first, then interrupts.
        Ok(Guard::new((doorbell, route)))
    }

    fn connect_config(&self, call: &Call) -> Result<Guard, PortError> {
        self.interrupts.attach(call.as_fd(), Route::Pin(self.place.gsi))
    }

    fn show_registers(&self, registers: &Registers) {
        for (offset, reg) in READABLE {
            self.page.store(offset, registers.read(reg));
        }
    }

    fn show_config(&self, config: &[u8]) {
        self.page.store_bytes(CONFIG, config);
    }
}

/// A virtio device on the MMIO bus.
pub struct MmioDevice {
    handle: DeviceHandle,
}

impl MmioDevice {
    /// Plugs `device` in at `place`. From then on the guest can read the device's registers without an exit.
    /// The caller puts the result on the bus to receive the writes.
    ///
    /// # Errors
    /// When no eventfd can be made, or the machine refuses the page, the doorbell or the interrupt.
    pub fn new(device: &DeviceHandle, place: Place, ports: &Ports) -> Result<Self, PlugError> {
        let Ports { doorbells, interrupts, memory } = ports.clone();
        let page = memory.register_page(place.base)?;
        for (offset, value) in CONSTANT {
            page.store(offset, value);
        }
        // The sink is never read. It takes the acknowledgement that follows each interrupt.
        let sink = Kick::new().map_err(PlugError::Eventfd)?;
        let ack = doorbells.bind(sink.as_fd(), place.write_of(INTERRUPT_ACK, USED_BUFFER))?;
        let face = MmioFace { place, doorbells, interrupts, page, _ack: Guard::new((ack, sink)) };
        device.with(|device| {
            let outlet = FixedOutlet::new(memory, device.registers().shared_memory().to_vec());
            device.plug(Box::new(face), Arc::new(outlet))
        })?;
        Ok(Self { handle: device.clone() })
    }

    /// The device, for the control loop.
    #[must_use]
    pub fn handle(&self) -> DeviceHandle {
        self.handle.clone()
    }
}

/// The register at a 4-aligned offset, as the page shows it.
fn word_at(registers: &Registers, offset: u16) -> u32 {
    if let Some(value) = lookup(&CONSTANT, offset) {
        return value;
    }
    lookup(&READABLE, offset).map_or(0, |reg| registers.read(reg))
}

impl BusDevice for MmioDevice {
    /// Reads the same contents as the page, for machines without the page and for accesses that miss it.
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.handle.with(|device| {
            let registers = device.registers();
            for (at, byte) in (offset..).zip(data) {
                *byte = u16::try_from(at).map_or(0, |at| match at.checked_sub(CONFIG) {
                    Some(at) => {
                        let mut one = [0];
                        registers.read_config(at.into(), &mut one);
                        let [value] = one;
                        value
                    }
                    None => {
                        let word = word_at(registers, at & !3).to_le_bytes();
                        word.get(usize::from(at & 3)).copied().unwrap_or(0)
                    }
                });
            }
        });
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(offset) = u16::try_from(offset) else { return };
        let note = |what| self.handle.with(|device| device.note(what));
        match (offset.checked_sub(CONFIG), <[u8; 4]>::try_from(data)) {
            (Some(offset), _) => self.handle.with(|device| device.write_config(offset.into(), data)),
            (None, Ok(bytes)) => match lookup(&WRITABLE, offset) {
                Some(reg) => self.handle.write(reg, u32::from_le_bytes(bytes)),
                None => note("the driver wrote where there is no register that takes it"),
            },
            (None, Err(_)) => note("the driver wrote a register with a width other than 32 bits"),
        }
    }
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
