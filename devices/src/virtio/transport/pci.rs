//! Virtio 1.2 §4.1: the virtio-pci transport, without the legacy interface. Translates offsets; decides
//! nothing.
//!
//! ```text
//! BAR 0, offset    what                                       who answers
//! 0_0000           common configuration                       the device's registers
//! 0_1000           ISR status
//! 0_2000           device configuration
//! 0_4000, 0_8000   MSI-X pending bits, MSI-X table            pci::msix
//! 1_0000 + n·1000  notifications of queue n, a page each      KVM: an eventfd; or the backend's own page
//!
//! BAR 2            shared memory regions, if it has any       KVM: what the backend maps there
//! ```
//! A running queue causes no exit: its page is bound to the kick eventfd, and KVM injects the message of its
//! vector.
//!
//! A driver without MSI-X gets its interrupts by the function's pin, with one or two exits for each
//! interrupt.
//!
//! Lock order: the device's, then the state's. The state's lock is never held while the device is called.

use std::os::fd::AsFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use transport::vhost_user::vring::{Call, Kick};

use crate::lock;
use crate::pci::{
    BarIndex, BarKind, BarSpec, Bars, ConfigSpace, Decoded, DeviceNumber, Fixture, FixtureId, Fixtures,
    Function, HostBridge, Identity, Msix, msix,
};
use crate::ports::{Guard, PortError, Ports, WriteWidth};
use crate::virtio::core::device::{Device, PlugError};
use crate::virtio::core::face::Face;
use crate::virtio::core::handle::DeviceHandle;
use crate::virtio::core::registers::{Half, Reg, Registers};
use crate::virtio::transport::pci_state::{NO_VECTOR, NOTIFY, PAGE, Source, State, notify_offset};
use crate::virtio::transport::pci_windows::{BarOutlet, Layout};

const VENDOR: u16 = 0x1af4;
/// The first device id of non-transitional devices.
const FIRST_DEVICE: u16 = 0x1040;

const COMMON: u64 = 0;
const ISR: u64 = PAGE;
const DEVICE: u64 = 2 * PAGE;
const PBA: u64 = 0x4000;
const TABLE: u64 = 0x8000;

/// The capability id of all structures, and the structures' types (§4.1.4).
const VENDOR_SPECIFIC: u8 = 9;
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;

/// A field of the common configuration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Field {
    Reg(Reg),
    /// A register that can only be read.
    Constant(Reg),
    ConfigVector,
    QueueVector,
    QueueEnable,
    QueueCount,
    NotifyOffset,
}

/// Offset, width in bytes and field (§4.1.4.3). Fields that are not listed read 0; the features that would
/// use them are not offered.
const COMMON_FIELDS: [(u64, usize, Field); 20] = [
    (0x00, 4, Field::Reg(Reg::DeviceFeaturesSel)),
    (0x04, 4, Field::Constant(Reg::DeviceFeatures)),
    (0x08, 4, Field::Reg(Reg::DriverFeaturesSel)),
    (0x0c, 4, Field::Reg(Reg::DriverFeatures)),
    (0x10, 2, Field::ConfigVector),
    (0x12, 2, Field::QueueCount),
    (0x14, 1, Field::Reg(Reg::Status)),
    (0x15, 1, Field::Constant(Reg::ConfigGeneration)),
    (0x16, 2, Field::Reg(Reg::QueueSel)),
    (0x18, 2, Field::Reg(Reg::QueueSize)),
    (0x1a, 2, Field::QueueVector),
    (0x1c, 2, Field::QueueEnable),
    (0x1e, 2, Field::NotifyOffset),
    (0x20, 4, Field::Reg(Reg::QueueDesc(Half::Low))),
    (0x24, 4, Field::Reg(Reg::QueueDesc(Half::High))),
    (0x28, 4, Field::Reg(Reg::QueueDriver(Half::Low))),
    (0x2c, 4, Field::Reg(Reg::QueueDriver(Half::High))),
    (0x30, 4, Field::Reg(Reg::QueueDevice(Half::Low))),
    (0x34, 4, Field::Reg(Reg::QueueDevice(Half::High))),
    (0x38, 4, Field::Constant(Reg::QueueNotify)),
];

struct PciFace {
    state: Arc<Mutex<State>>,
    config_source: usize,
}

impl Face for PciFace {
    fn connect(&self, queue: u16, kick: &Kick, call: &Call) -> Result<Guard, PortError> {
        let source = usize::from(queue);
        let fd = kick.as_fd().try_clone_to_owned();
        let fd = fd.map_err(|error| PortError::new("duplicate an eventfd", error))?;
        let mut state = lock(&self.state);
        state.connect(source, call)?;
        let doorbell = Fixture::Doorbell { fd, width: WriteWidth::Any, value: None };
        match state.fixtures.add(notify_offset(queue), doorbell) {
            Ok(id) => Ok(self.guard(source, Some(id))),
            Err(error) => {
                state.disconnect(source);
                Err(error)
            }
        }
    }

    fn connect_config(&self, call: &Call) -> Result<Guard, PortError> {
        lock(&self.state).connect(self.config_source, call)?;
        Ok(self.guard(self.config_source, None))
    }

    /// Nothing to show, as every register is read through the device. The status decides whether a driver may
    /// be interrupted.
    fn show_registers(&self, registers: &Registers) {
        lock(&self.state).follow(registers.status());
    }

    fn show_config(&self, _: &[u8]) {}
}

impl PciFace {
    fn guard(&self, source: usize, doorbell: Option<FixtureId>) -> Guard {
        let state = Arc::clone(&self.state);
        Guard::on_drop(move || {
            let mut state = lock(&state);
            // Drop order: kicks end first, then interrupts.
            if let Some(id) = doorbell {
                state.fixtures.remove(id);
            }
            state.disconnect(source);
        })
    }
}

/// The base class and sub-class with which a virtio device type appears to guests.
fn class(device_type: u32) -> u32 {
    match device_type {
        1 => 0x02_0000,
        2 => 0x01_8000,
        3 => 0x07_8000,
        8 => 0x01_0000,
        16 => 0x03_8000,
        18 => 0x09_8000,
        25 => 0x04_0100,
        26 => 0x01_8000,
        _ => 0xff_0000,
    }
}

/// A virtio device on the PCI bus.
pub struct PciDevice {
    handle: DeviceHandle,
    state: Arc<Mutex<State>>,
    queues: u16,
}

impl PciDevice {
    /// Plugs `device` into a function whose BARs `bridge` places. The caller inserts the function on the bus,
    /// at this number.
    ///
    /// # Errors
    /// When the device has more queues or shared memory regions (three) than a function can describe, the bus
    /// has no room, no eventfd can be made, or the machine refuses an interrupt.
    pub fn new(
        device: &DeviceHandle,
        number: DeviceNumber,
        bridge: &HostBridge,
        ports: &Ports,
    ) -> Result<Self, PlugError> {
        let describe = |error: Box<dyn std::error::Error + Send + Sync>| PlugError::Describe(error);
        let (name, registers) = device.with(|device| (device.name().to_owned(), device.registers().clone()));
        let (queues, device_type) = (registers.queue_count(), registers.read(Reg::DeviceId));
        let index = BarIndex::FIRST;
        let mut specs = vec![BarSpec { index, kind: BarKind::Memory64, size: notify_offset(queues) }];
        let shared = Layout::of(registers.shared_memory()).zip(Layout::bar());
        specs.extend(shared.iter().map(|(layout, bar)| layout.spec(*bar)));
        let mut bars = Bars::new(&specs, bridge.windows()).map_err(|error| describe(error.into()))?;
        bridge.assign(&mut bars);
        if let Some((_, bar)) = &shared
            && !bars.is_placed(*bar)
        {
            return Err(describe(
                "there is no room for its shared memory: features=-shmem does without".into(),
            ));
        }
        let number_of_type = u16::try_from(device_type).ok().and_then(|id| FIRST_DEVICE.checked_add(id));
        let identity = Identity {
            vendor: VENDOR,
            device: number_of_type.unwrap_or(u16::MAX),
            revision: 1,
            class: class(device_type),
            subsystem_vendor: VENDOR,
            subsystem: 0x1100,
        };
        let pin = bridge.pin(number);
        let mut config = ConfigSpace::new(identity, bars, u8::from(pin.is_some()));
        let msix = Msix::new(queues.saturating_add(1), Arc::clone(&ports.interrupts));
        let capabilities = capabilities(&mut config, &msix, queues);
        let (msix_at, window_at) = capabilities.map_err(|error| describe(error.into()))?;
        if let Some((layout, bar)) = &shared {
            for body in layout.capabilities(*bar) {
                config.add_capability(VENDOR_SPECIFIC, &body, &[]).map_err(|error| describe(error.into()))?;
            }
        }
        let state = Arc::new(Mutex::new(State {
            name,
            config,
            msix,
            live: false,
            pin,
            fixtures: Fixtures::new(index, ports.clone()),
            windows: shared.as_ref().map(|(_, bar)| Fixtures::new(*bar, ports.clone())),
            sources: (0..=queues).map(|_| Source::unused()).collect(),
            msix_at,
            window_at,
            refusal_logged: AtomicBool::new(false),
        }));
        let face = PciFace { state: Arc::clone(&state), config_source: usize::from(queues) };
        let layout = shared.map(|(layout, _)| layout);
        let outlet = Arc::new(BarOutlet { state: Arc::clone(&state), layout, queues });
        device.with(|device| device.plug(Box::new(face), outlet))?;
        Ok(Self { handle: device.clone(), state, queues })
    }

    /// The device, for the control loop.
    #[must_use]
    pub fn handle(&self) -> DeviceHandle {
        self.handle.clone()
    }

    fn common_value(&self, field: Field) -> u32 {
        let selected = |device: &mut Device| device.registers().read(Reg::QueueSel);
        let source = |device: &mut Device| usize::try_from(selected(device)).unwrap_or(usize::MAX);
        match field {
            Field::Reg(reg) | Field::Constant(reg) => self.handle.with(|device| device.registers().read(reg)),
            Field::QueueEnable => self.handle.with(|device| device.registers().read(Reg::QueueReady)),
            Field::QueueCount => u32::from(self.queues),
            Field::ConfigVector => lock(&self.state).vector(usize::from(self.queues)).into(),
            Field::QueueVector => match self.handle.with(source) {
                queue if queue < usize::from(self.queues) => lock(&self.state).vector(queue).into(),
                _ => NO_VECTOR.into(),
            },
            Field::NotifyOffset => match self.handle.with(selected) {
                queue if queue < u32::from(self.queues) => queue,
                _ => 0,
            },
        }
    }

    fn read_common(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let end = offset.saturating_add(u64::try_from(data.len()).unwrap_or(u64::MAX));
        for (start, width, field) in COMMON_FIELDS {
            let behind = start.saturating_add(u64::try_from(width).unwrap_or(0));
            if start >= end || behind <= offset {
                continue;
            }
            let bytes = self.common_value(field).to_le_bytes();
            for (at, byte) in (start..).zip(bytes.iter().take(width)) {
                let within = at.checked_sub(offset).and_then(|at| usize::try_from(at).ok());
                if let Some(slot) = within.and_then(|within| data.get_mut(within)) {
                    *slot = *byte;
                }
            }
        }
    }

    fn write_common(&self, offset: u64, data: &[u8]) {
        // A driver may write a 64-bit field at once.
        if let (0x20..0x38, [low @ .., _, _, _, _], 8) = (offset, data, data.len()) {
            let high = data.get(4..).unwrap_or_default();
            self.write_common(offset, low);
            return self.write_common(offset + 4, high);
        }
        let known = COMMON_FIELDS.iter().find(|(start, width, _)| (*start, *width) == (offset, data.len()));
        let value = data.iter().rev().fold(0_u32, |value, byte| value << 8 | u32::from(*byte));
        match known.map(|(_, _, field)| *field) {
            Some(Field::Reg(Reg::Status)) => {
                self.handle.write(Reg::Status, value);
                if value == 0 {
                    self.forget_vectors();
                }
            }
            Some(Field::Reg(reg)) => self.handle.write(reg, value),
            // A queue can be disabled only by a reset of the queue or of the device.
            Some(Field::QueueEnable) if value == 1 => {
                self.handle.write(Reg::QueueReady, 1);
            }
            Some(field @ (Field::ConfigVector | Field::QueueVector)) => {
                let selected = |device: &mut Device| device.registers().read(Reg::QueueSel);
                let source = match field {
                    Field::ConfigVector => usize::from(self.queues),
                    _ => match usize::try_from(self.handle.with(selected)) {
                        Ok(queue) if queue < usize::from(self.queues) => queue,
                        _ => return,
                    },
                };
                lock(&self.state).set_vector(source, u16::try_from(value).unwrap_or(NO_VECTOR));
            }
            _ => self.handle.with(|device| {
                device
                    .note("the driver wrote where there is no register that takes it, or with an odd width");
            }),
        }
    }

    /// A reset removes all sources from their vectors.
    fn forget_vectors(&self) {
        let mut state = lock(&self.state);
        for source in 0..state.sources.len() {
            state.set_vector(source, NO_VECTOR);
        }
    }

    /// Reading the ISR status acknowledges it (§4.1.4.5).
    fn take_isr(&self) -> u8 {
        self.handle.with(|device| {
            let status = device.registers().read(Reg::InterruptStatus);
            device.write(Reg::InterruptAck, status);
            u8::try_from(status).unwrap_or(0)
        })
    }

    /// The access that the driver described in the capability of the configuration access window: offset in
    /// the BAR, and width.
    fn window(&self) -> Option<(u64, usize)> {
        let state = lock(&self.state);
        let at = state.window_at;
        let dword = |at: u16| {
            u32::from(state.config.word(at)) | u32::from(state.config.word(at.saturating_add(2))) << 16
        };
        let bar = state.config.word(at + 4) & 0xff;
        let (offset, length) = (u64::from(dword(at + 8)), dword(at + 12));
        let width = usize::try_from(length).ok().filter(|width| matches!(width, 1 | 2 | 4))?;
        let aligned = offset.is_multiple_of(u64::from(length));
        let inside = offset.saturating_add(u64::from(length)) <= notify_offset(self.queues);
        (bar == 0 && aligned && inside).then_some((offset, width))
    }

    /// Whether an access to configuration space concerns the window's data.
    fn is_window(&self, offset: u16) -> bool {
        let data = lock(&self.state).window_at + 16;
        offset & !3 == data
    }
}

/// Adds the capabilities. Returns the places of the MSI-X capability and of the window's capability.
fn capabilities(
    config: &mut ConfigSpace,
    msix: &Msix,
    queues: u16,
) -> Result<(u16, u16), crate::pci::config_space::NoRoom> {
    let short = |at: u64| u32::try_from(at).unwrap_or(u32::MAX);
    let structure = |kind: u8, at: u64, length: u64| {
        let mut body = vec![16, kind, 0, 0, 0, 0];
        body.extend(short(at).to_le_bytes());
        body.extend(short(length).to_le_bytes());
        body
    };
    let (body, writable) = msix.capability((BarIndex::FIRST, short(TABLE)), (BarIndex::FIRST, short(PBA)));
    let msix_at = config.add_capability(msix::CAPABILITY, &body, &writable)?;
    let plain = [(COMMON_CFG, COMMON, 0x40), (ISR_CFG, ISR, 1), (DEVICE_CFG, DEVICE, PAGE)];
    for (kind, at, length) in plain {
        config.add_capability(VENDOR_SPECIFIC, &structure(kind, at, length), &[])?;
    }
    let with_more = |mut body: Vec<u8>, more: u32| {
        if let Some(length) = body.first_mut() {
            *length = 20;
        }
        body.extend(more.to_le_bytes());
        body
    };
    let pages = u64::from(queues.max(1)) * PAGE;
    let notify = with_more(structure(NOTIFY_CFG, NOTIFY, pages), short(PAGE));
    config.add_capability(VENDOR_SPECIFIC, &notify, &[])?;
    // The driver writes BAR, offset and length, and accesses the BAR through the last four bytes (§4.1.4.9).
    let window = with_more(structure(PCI_CFG, 0, 0), 0);
    let mut writable = [0; 18];
    for (at, mask) in writable.iter_mut().enumerate() {
        *mask = if at == 2 || (6..14).contains(&at) { 0xff } else { 0 };
    }
    let window_at = config.add_capability(VENDOR_SPECIFIC, &window, &writable)?;
    Ok((msix_at, window_at))
}

impl Function for PciDevice {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        if self.is_window(offset) {
            data.fill(0);
            if let Some((at, width)) = self.window() {
                let mut value = [0; 4];
                if let Some(value) = value.get_mut(..width) {
                    self.bar_read(BarIndex::FIRST, at, value);
                }
                let from = value.iter().skip(usize::from(offset & 3));
                data.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
            }
            return;
        }
        lock(&self.state).config.read(offset, data);
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        if self.is_window(offset) {
            if let Some((at, width)) = self.window().filter(|_| offset & 3 == 0)
                && let Some(data) = data.get(..width)
            {
                self.bar_write(BarIndex::FIRST, at, data);
            }
            return;
        }
        let mut guard = lock(&self.state);
        let state = &mut *guard;
        state.config.write(offset, data);
        state.place();
        let routed = state.switch_interrupts();
        state.check(routed);
    }

    fn decoded(&self) -> Vec<Decoded> {
        lock(&self.state).config.decoded()
    }

    fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        match offset {
            // An address in a region where nothing is mapped.
            _ if bar != BarIndex::FIRST => data.fill(0xff),
            COMMON..ISR => self.read_common(offset, data),
            ISR => {
                // The read is recorded first: anything that happens from here on interrupts anew.
                lock(&self.state).isr_read();
                data.fill(0);
                if let Some(first) = data.first_mut() {
                    *first = self.take_isr();
                }
            }
            DEVICE..0x3000 => {
                let at = usize::try_from(offset - DEVICE).unwrap_or(usize::MAX);
                self.handle.with(|device| device.registers().read_config(at, data));
            }
            PBA..TABLE => lock(&self.state).msix.read_pba(offset - PBA, data),
            TABLE..NOTIFY => lock(&self.state).msix.read_table(offset - TABLE, data),
            _ => data.fill(0),
        }
    }

    fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]) {
        match offset {
            _ if bar != BarIndex::FIRST => self.handle.with(|device| {
                device.note(
                    "the driver wrote to shared memory where nothing is mapped, or that it may only read",
                );
            }),
            COMMON..ISR => self.write_common(offset, data),
            DEVICE..0x3000 => {
                let at = usize::try_from(offset - DEVICE).unwrap_or(usize::MAX);
                self.handle.with(|device| device.write_config(at, data));
            }
            TABLE..NOTIFY => {
                let mut state = lock(&self.state);
                let done = state.msix.write_table(offset - TABLE, data);
                state.check(done);
            }
            NOTIFY.. => {
                let queue = u32::try_from((offset - NOTIFY) / PAGE).unwrap_or(u32::MAX);
                self.handle.write(Reg::QueueNotify, queue);
            }
            _ => self
                .handle
                .with(|device| device.note("the driver wrote where there is no register that takes it")),
        }
    }
}

#[cfg(test)]
#[path = "pci_tests.rs"]
mod tests;
