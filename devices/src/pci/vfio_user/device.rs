//! A vfio-user server's function as the guest sees it, for the machine's whole life. The client and the server
//! each answer a part of the configuration space. Parts of the BARs are mapped; the server answers the rest.
//!
//! [`VfioUserDevice::plug`] puts the function on a board. [`VfioUserDevice::unplug`] takes it off again:
//! afterwards nothing of the function is registered with the machine, and the server's device is as after
//! power-on. The connection stays.
//!
//! Locks: `plugged` protects the registers and everything that is registered with the machine. It must never
//! be held while the server is asked. An access of a BAR that the server answers does not take it, so vCPUs
//! that read different registers wait for the server side by side.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use transport::vhost_user::vring::Call;

use super::bars::bar_number;
use super::function::{COMMAND_OURS, FunctionShape};
use super::interrupts::{self, Calls, Delivery, Place};
use super::server::{
    AccessCounter, AccessCounts, CONFIG_REGION, Done, Gone, Irq, Server, ServerAccess, ServerLink, Writes,
};
use super::survey::{Region, Reset};
use crate::lock;
use crate::pci::bar::{BarError, Command};
use crate::pci::config_space::offset;
use crate::pci::hotplug::Occupant;
use crate::pci::{BarIndex, Bars, Decoded, Fixture, Fixtures, Function, HostBridge};
use crate::ports::{Access, FileRange, PortError, Ports};

/// Why a function cannot be put on a board.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// The BARs fit no bus.
    #[error(transparent)]
    Bars(#[from] BarError),
    /// The machine refuses a registration.
    #[error(transparent)]
    Port(#[from] PortError),
    /// The process has no descriptor left.
    #[error("a doorbell's descriptor cannot be duplicated")]
    Duplicate(#[source] io::Error),
}

/// The function's state on the present board.
struct PluggedFunction {
    /// The command register as the guest wrote it, including the bits that the server answers. Only the
    /// client's bits ([`COMMAND_OURS`]) are read from here.
    command: u16,
    line: u8,
    bars: Bars,
    fixtures: Vec<Fixtures>,
    delivery: Delivery,
}

/// A server's function.
pub struct VfioUserDevice {
    /// The connection to the server.
    pub link: ServerLink,
    /// What the function is.
    pub shape: FunctionShape,
    /// The eventfds that the server signals.
    pub calls: Arc<Calls>,
    regions: [Region; 6],
    reset: Reset,
    /// The kind of interrupts for which the server holds eventfds.
    armed: Mutex<Option<Irq>>,
    /// The server refused the pin's eventfd. It is not asked for the pin again.
    pinless: AtomicBool,
    plugged: Mutex<Option<PluggedFunction>>,
    /// The guest of the present board has ejected the function.
    ejected: AtomicBool,
    /// The driver last wrote 0 to the device status of the virtio function: it reset the device.
    virtio_reset: AtomicBool,
    /// A refusal by the machine has been logged.
    refusal_logged: AtomicBool,
    counters: [AccessCounter; 7],
    requests: AtomicU64,
}

impl VfioUserDevice {
    /// The device called `name`, whose function `server` serves.
    ///
    /// # Errors
    /// When no eventfd can be had.
    pub fn new(
        name: String,
        server: Arc<dyn Server>,
        shape: FunctionShape,
        regions: [Region; 6],
        reset: Reset,
    ) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            link: ServerLink::new(name, server),
            shape,
            calls: Arc::new(Calls::new()?),
            regions,
            reset,
            armed: Mutex::default(),
            pinless: AtomicBool::default(),
            plugged: Mutex::default(),
            ejected: AtomicBool::default(),
            virtio_reset: AtomicBool::default(),
            refusal_logged: AtomicBool::default(),
            counters: Default::default(),
            requests: AtomicU64::default(),
        }))
    }

    /// Puts the function on a board, where the bridge assigns addresses to its BARs. `pin` is the GSI of the
    /// function's pin. Waits for the server.
    ///
    /// # Errors
    /// When the machine refuses something of it.
    pub fn plug(
        self: &Arc<Self>,
        ports: &Ports,
        bridge: &HostBridge,
        pin: Option<u32>,
    ) -> Result<(), PlugError> {
        let specs: Vec<_> = self.shape.bars.iter().flatten().map(|bar| bar.spec()).collect();
        let mut bars = Bars::new(&specs, bridge.windows())?;
        bridge.assign(&mut bars);
        let calls = Arc::clone(&self.calls);
        let delivery = Delivery::new(&self.shape, calls, Arc::clone(&ports.interrupts), pin);
        let behind = self.shape.bars.iter().zip(&self.regions);
        let fixtures = behind.filter_map(|(bar, region)| Some(self.fix((*bar)?.index, region, ports)));
        let fixtures = fixtures.collect::<Result<_, _>>()?;
        let places = bars.clone();
        *lock(&self.plugged) = Some(PluggedFunction { command: 0, line: 0, bars, fixtures, delivery });
        self.ejected.store(false, Ordering::Relaxed);
        self.tell_places(&places);
        Ok(())
    }

    fn fix(self: &Arc<Self>, bar: BarIndex, region: &Region, ports: &Ports) -> Result<Fixtures, PlugError> {
        let mut fixtures = Fixtures::new(bar, ports.clone());
        let weak: Weak<Self> = Arc::downgrade(self);
        let vanished = Arc::new(move || {
            if let Some(device) = weak.upgrade() {
                device.link.give_up("the server made the file behind its memory shorter, or took pages away");
                device.tidy();
            }
        });
        for piece in &region.pieces {
            let Some(file) = &region.file else { break };
            let access = if region.writable { Access::ReadWrite } else { Access::ReadOnly };
            let file = FileRange { fd: Arc::clone(file), offset: piece.file_offset, size: piece.size };
            fixtures
                .add(piece.offset, Fixture::Memory { piece: file, access, vanished: vanished.clone() })?;
        }
        for bell in &region.doorbells {
            let fd = bell.fd.try_clone().map_err(PlugError::Duplicate)?;
            fixtures.add(bell.offset, Fixture::Doorbell { fd, width: bell.width, value: bell.value })?;
        }
        Ok(fixtures)
    }

    /// Writes the addresses of the BARs to the server, and waits for it. A guest that keeps the addresses never
    /// writes them, and QEMU's server answers for a BAR only at the address in its own register.
    fn tell_places(&self, bars: &Bars) {
        let access = self.link.access();
        for bar in self.shape.bars.iter().flatten().filter(|bar| bar.region > 0) {
            let first = bar.index.get();
            for number in first..=first.saturating_add(u8::from(bar.kind.is_wide())) {
                let at = offset::BARS + 4 * u16::from(number);
                self.forward(&access, at, &bars.read(number).to_le_bytes());
            }
        }
    }

    /// Takes the function off its board. Waits for the server.
    pub fn unplug(&self) {
        drop(lock(&self.plugged).take());
        if self.link.is_gone() {
            return;
        }
        let access = self.link.access();
        self.switch_off(&access);
        let is_reset = self.reset == Reset::Unused || access.reset() == Done::Yes;
        if !is_reset && self.link.gone() != Some(&Gone::Ended) {
            log::warn!("device {} was not reset (reset=off never asks for it)", self.link.name());
        }
    }

    /// Whether the guest of the present board has ejected the function.
    #[must_use]
    pub fn is_ejected(&self) -> bool {
        self.ejected.load(Ordering::Relaxed)
    }

    /// The counts so far.
    #[must_use]
    pub fn counts(&self) -> AccessCounts {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let regions = self.counters.each_ref().map(|both| (count(&both.reads), count(&both.writes)));
        AccessCounts { regions, requests: count(&self.requests) }
    }

    /// If the server is gone, removes everything of the device that is registered with the machine. Called on
    /// any thread without the device's lock; does not wait.
    pub fn tidy(&self) {
        if self.link.is_gone()
            && let Some(plugged) = lock(&self.plugged).as_mut()
        {
            plugged.fixtures.clear();
            plugged.delivery.cut();
        }
    }

    /// Logs a registration that the machine refused. The access goes on without the registration. Only the
    /// first refusal is logged, because a guest can cause refusals as often as it likes.
    fn refused(&self, error: &PortError) {
        if !self.refusal_logged.swap(true, Ordering::Relaxed) {
            log::warn!("device {}: {error} (logged once)", self.link.name());
        }
    }

    /// Gives the server eventfds for `wanted` (kind and number of interrupts) and takes back those of any
    /// other kind. The old kind is taken back first, because some servers have one list for all kinds.
    /// Returns the eventfds that were given now. Waits for the server.
    fn arm(&self, access: &ServerAccess<'_>, wanted: Option<(Irq, u16)>) -> Vec<Arc<Call>> {
        // Only configuration accesses call this, and the bridge makes them one at a time.
        let armed = *lock(&self.armed);
        if armed == wanted.map(|(kind, _)| kind) {
            return Vec::new();
        }
        if let Some(kind) = armed {
            *lock(&self.armed) = None;
            if access.disarm(kind) == Done::No {
                log::debug!("device {}: {kind:?} was not taken back", self.link.name());
            }
            self.calls.drain(kind);
        }
        let pinless = self.pinless.load(Ordering::Relaxed);
        let wanted = wanted.filter(|(kind, _)| *kind != Irq::Intx || !pinless);
        let Some((kind, count)) = wanted else { return Vec::new() };
        let calls = match self.calls.of(kind, count) {
            Ok(calls) => calls,
            Err(error) => {
                self.link.give_up(&format!("no eventfds can be had for its {count} interrupts: {error}"));
                return Vec::new();
            }
        };
        let fds: Vec<_> = calls.iter().map(|call| call.as_fd()).collect();
        if access.arm(kind, &fds) == Done::Yes {
            *lock(&self.armed) = Some(kind);
            return calls;
        }
        if kind == Irq::Intx {
            self.pinless.store(true, Ordering::Relaxed);
        } else {
            self.link.give_up("the server refused the eventfds of its interrupts");
        }
        Vec::new()
    }

    /// Takes the guest's end of the pin's interrupt and lets the server raise the pin again. Called when
    /// [`Calls::served`] is readable, on any thread; does not wait.
    pub fn pin_served(&self) {
        if self.calls.served().take() && *lock(&self.armed) == Some(Irq::Intx) {
            self.unmask_pin();
        }
    }

    /// Tells the server that it may raise the pin's interrupt, if the device has a reason. Does not wait.
    fn unmask_pin(&self) {
        let call = self.calls.of(Irq::Intx, 1).ok().and_then(|calls| calls.into_iter().next());
        let look = call.and_then(|call| self.calls.served().look(call));
        if look.is_some_and(|look| self.link.unmask_pin(look) == Done::No) {
            log::debug!("device {}: the pin was not unmasked", self.link.name());
        }
    }

    /// Stops the server's device: it accesses no memory and raises no interrupt afterwards. The registers are
    /// cleared as well: a server that keeps its configuration over a reset would otherwise have switches on
    /// that the guest reads as off.
    fn switch_off(&self, access: &ServerAccess<'_>) {
        let clear = |at: u16, what: &str| {
            if access.write(CONFIG_REGION, at.into(), &[0, 0], Writes::Answered) == Done::No {
                log::debug!("device {}: {what} could not be cleared", self.link.name());
            }
        };
        clear(offset::COMMAND, "the command register");
        let armed = *lock(&self.armed);
        self.arm(access, None);
        let capability = match armed {
            Some(Irq::MsiX) => self.shape.msix.map(|msix| msix.at),
            Some(Irq::Msi) => self.shape.msi.map(|msi| msi.at),
            Some(Irq::Intx) | None => None,
        };
        if let Some(at) = capability {
            clear(u16::from(at) + 2, "the enable bit of message interrupts");
        }
    }

    /// Returns what the guest reads of the dword at `at`.
    fn config_dword(&self, at: u16) -> [u8; 4] {
        let overlay = &self.shape.overlay;
        let mut dword = [0; 4];
        // Some functions have no extended space.
        if at >= overlay.size() {
            return [0xff; 4];
        }
        if overlay.needs_server(at, 4) && !self.link.is_gone() {
            self.link.access().read(CONFIG_REGION, at.into(), &mut dword);
        }
        overlay.cover(at, &mut dword);
        let plugged = lock(&self.plugged);
        let Some(plugged) = plugged.as_ref() else { return [0xff; 4] };
        if self.link.is_gone() {
            let bar = bar_number(at).filter(|_| self.shape.virtio_status.is_some());
            return bar.map_or([0xff; 4], |number| plugged.bars.read(number).to_le_bytes());
        }
        match at {
            offset::COMMAND => {
                let [low, high, ..] = &mut dword;
                let servers = u16::from_le_bytes([*low, *high]) & !COMMAND_OURS;
                [*low, *high] = (servers | plugged.command & COMMAND_OURS).to_le_bytes();
            }
            offset::INTERRUPT_LINE => {
                let [line, ..] = &mut dword;
                *line = plugged.line;
            }
            _ => {
                if let Some(number) = bar_number(at) {
                    dword = plugged.bars.read(number).to_le_bytes();
                }
                plugged.delivery.cover(at, &mut dword);
            }
        }
        dword
    }

    /// Notes what the guest writes to a part of one dword. Returns the write that the server must get, if any.
    fn note(&self, plugged: &mut PluggedFunction, at_byte: u16, data: &[u8]) -> Option<(u16, Vec<u8>)> {
        let at = at_byte & !3;
        let merged = |mut dword: [u8; 4]| {
            dword.iter_mut().skip(usize::from(at_byte & 3)).zip(data).for_each(|(to, from)| *to = *from);
            dword
        };
        if let Some(number) = bar_number(at) {
            let dword = merged(plugged.bars.read(number).to_le_bytes());
            plugged.bars.write(number, u32::from_le_bytes(dword));
            return Some((at, plugged.bars.read(number).to_le_bytes().to_vec()));
        }
        let whole = (at_byte, data.to_vec());
        if plugged.delivery.has(at) {
            let mut dword = [0; 4];
            plugged.delivery.cover(at, &mut dword);
            if let Err(error) = plugged.delivery.write(at, u32::from_le_bytes(merged(dword))) {
                self.refused(&error);
            }
            return Some(whole);
        }
        match at {
            offset::COMMAND => {
                let [low, high] = plugged.command.to_le_bytes();
                let [low, high, ..] = merged([low, high, 0, 0]);
                plugged.command = u16::from_le_bytes([low, high]);
                // libvfio-user refuses a write of a single byte of the command register.
                if data.len() == 1 && at_byte < offset::STATUS {
                    return Some((offset::COMMAND, vec![low, high]));
                }
            }
            offset::INTERRUPT_LINE => [plugged.line, ..] = merged([plugged.line, 0, 0, 0]),
            _ => {}
        }
        self.shape.overlay.needs_server(at_byte, data.len()).then_some(whole)
    }

    /// Has the server signal the kind of interrupts that the guest has switched on, and leads these to the
    /// guest. Returns the kind for which the server got eventfds now.
    fn rearm(&self, access: &ServerAccess<'_>, wanted: Option<(Irq, u16)>) -> Option<Irq> {
        let calls = self.arm(access, wanted);
        let mut plugged = lock(&self.plugged);
        let delivery = &mut plugged.as_mut()?.delivery;
        if wanted.is_none_or(|(kind, _)| kind != Irq::Intx) {
            delivery.disconnect(Irq::Intx);
        }
        let (kind, _) = wanted?;
        if let Err(error) = delivery.connect(kind, &calls) {
            self.refused(&error);
        }
        (!calls.is_empty()).then_some(kind)
    }

    /// Whether a write resets the function (PCI Express 4.0 §6.6.2).
    fn is_reset(&self, offset: u16, data: &[u8]) -> bool {
        self.shape.resets.iter().any(|(at, bits)| {
            let index = at.checked_sub(offset).map(usize::from);
            index.and_then(|index| data.get(index)).is_some_and(|byte| byte & bits != 0)
        })
    }

    /// Resets the client's part of the function to the power-on state and switches the server's device off.
    /// The server does its part of the reset when it gets the write.
    fn function_reset(&self, access: &ServerAccess<'_>) {
        if let Some(plugged) = lock(&self.plugged).as_mut() {
            self.place(plugged, &[]);
            (plugged.command, plugged.line) = (0, 0);
            for number in 0..6 {
                plugged.bars.write(number, 0);
            }
            plugged.delivery.reset(&self.shape);
        }
        self.switch_off(access);
    }

    /// Reduces a dword to the server's half where the other half is the client's alone: libvfio-user refuses a
    /// write that reaches a capability's header, and the enable bit of MSI-X would be lost with it.
    fn servers_half<'a>(&self, offset: u16, data: &'a [u8]) -> (u16, &'a [u8]) {
        let half = |at: u16| self.shape.overlay.needs_server(at, 2);
        match data.split_at_checked(2) {
            Some((low, high)) if high.len() == 2 && bar_number(offset & !3).is_none() => {
                match (half(offset), half(offset.saturating_add(2))) {
                    (false, true) => (offset.saturating_add(2), high),
                    (true, false) => (offset, low),
                    _ => (offset, data),
                }
            }
            _ => (offset, data),
        }
    }

    /// Forwards a configuration write in naturally aligned pieces.
    fn forward(&self, access: &ServerAccess<'_>, offset: u16, data: &[u8]) {
        let (offset, data) = self.servers_half(offset, data);
        let natural = matches!(data.len(), 1 | 2 | 4) && usize::from(offset).is_multiple_of(data.len());
        let size = if natural { data.len() } else { 1 };
        for (piece, at) in data.chunks(size.max(1)).zip((u64::from(offset)..).step_by(size.max(1))) {
            if access.write(CONFIG_REGION, at, piece, Writes::Answered) == Done::No {
                return;
            }
        }
    }

    /// Moves the fixtures to where the BARs are decoded. The server answers for fixtures that the machine refuses.
    fn place(&self, plugged: &mut PluggedFunction, decoded: &[Decoded]) {
        for fixtures in &mut plugged.fixtures {
            if let Err(error) = fixtures.place(decoded) {
                self.refused(&error);
            }
        }
    }

    /// The region behind a BAR, if the whole access is inside the region.
    fn region(&self, bar: BarIndex, offset: u64, length: usize) -> Option<&Region> {
        let index = usize::from(bar.get());
        let shape = self.shape.bars.get(index)?.as_ref()?;
        let end = offset.checked_add(u64::try_from(length).ok()?)?;
        self.regions.get(index).filter(|_| end <= shape.region)
    }

    fn count(&self, region: u8, which: impl Fn(&AccessCounter) -> &AtomicU64) {
        let counter = self.counters.get(usize::from(if region == CONFIG_REGION { 6 } else { region }));
        if let Some(counter) = counter {
            which(counter).fetch_add(1, Ordering::Relaxed);
        }
    }

    /// What a guest reads of a BAR whose server is gone: all ones, which drivers take for a device that was
    /// pulled out. Linux's virtio driver resets a lost device all the same and waits without an end for a
    /// device status of 0. So the status reads 0 once the driver has reset the device.
    fn read_lost(&self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        let status = self.shape.virtio_status.filter(|status| status.is_touched(bar, offset, data.len()));
        let is_reset = status.is_some() && self.virtio_reset.load(Ordering::Relaxed);
        data.fill(if is_reset { 0 } else { 0xff });
    }

    /// Notes whether the driver of a virtio function has reset it: the server may be lost before it gets the
    /// reset. Once the server is lost, a device status of 0 stays 0, whatever the driver writes.
    fn note_virtio_status(&self, bar: BarIndex, offset: u64, data: &[u8]) {
        let Some(status) = self.shape.virtio_status.filter(|status| status.bar == bar) else { return };
        let index = status.offset.checked_sub(offset).and_then(|index| usize::try_from(index).ok());
        match index.and_then(|index| data.get(index)) {
            Some(0) => self.virtio_reset.store(true, Ordering::Relaxed),
            Some(_) if !self.link.is_gone() => self.virtio_reset.store(false, Ordering::Relaxed),
            _ => {}
        }
    }
}

impl Function for VfioUserDevice {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        self.count(CONFIG_REGION, |counter| &counter.reads);
        let dword = self.config_dword(offset & !3);
        let bytes = dword.iter().skip(usize::from(offset & 3)).chain(std::iter::repeat(&0xff));
        data.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        self.tidy();
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        self.count(CONFIG_REGION, |counter| &counter.writes);
        if self.link.is_gone() || offset >= self.shape.overlay.size() {
            return;
        }
        let access = self.link.access();
        if self.is_reset(offset, data) {
            self.function_reset(&access);
        }
        let mut locked = lock(&self.plugged);
        let Some(plugged) = locked.as_mut() else { return };
        let before = plugged.bars.decoded(Command(plugged.command));
        let told = self.note(plugged, offset, data);
        let after = plugged.bars.decoded(Command(plugged.command));
        // BARs that the function no longer decodes are removed before the server gets the write. BARs that it
        // now decodes are added afterwards.
        let stays: Vec<_> = before.iter().filter(|decoded| after.contains(decoded)).copied().collect();
        self.place(plugged, &stays);
        let wanted = plugged.delivery.on(plugged.command);
        drop(locked);
        // The order: the old kind of interrupts is taken back, the new kind is given, and then the server
        // gets the write that switches the new kind on.
        let armed = self.rearm(&access, wanted);
        if let Some((offset, data)) = told {
            self.forward(&access, offset, &data);
        }
        // The device may have asserted its pin while the pin was off. Unmasking delivers that level.
        if armed == Some(Irq::Intx) {
            self.unmask_pin();
        }
        if after != stays
            && let Some(plugged) = lock(&self.plugged).as_mut()
        {
            self.place(plugged, &after);
        }
        self.tidy();
    }

    /// A lost virtio function still decodes its BARs, so that the driver can read the device status.
    fn decoded(&self) -> Vec<Decoded> {
        let is_there = !self.link.is_gone() || self.shape.virtio_status.is_some();
        let plugged = lock(&self.plugged);
        let plugged = plugged.as_ref().filter(|_| is_there);
        plugged.map_or_else(Vec::new, |plugged| plugged.bars.decoded(Command(plugged.command)))
    }

    fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        self.count(bar.get(), |counter| &counter.reads);
        data.fill(0xff);
        match interrupts::place(&self.shape, bar, offset, data.len()) {
            _ if self.link.is_gone() => self.read_lost(bar, offset, data),
            Place::Server => {
                if self.region(bar, offset, data.len()).is_some_and(|region| region.readable) {
                    self.requests.fetch_add(1, Ordering::Relaxed);
                    self.link.access().read(bar.get(), offset, data);
                }
            }
            place => {
                let mut plugged = lock(&self.plugged);
                let msix = plugged.as_mut().and_then(|plugged| plugged.delivery.msix());
                match (place, msix) {
                    (Place::Table(at), Some(msix)) => msix.read_table(at, data),
                    (Place::Pending(at), Some(msix)) => msix.read_pba(at, data),
                    _ => {}
                }
            }
        }
        self.tidy();
    }

    fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]) {
        self.count(bar.get(), |counter| &counter.writes);
        self.note_virtio_status(bar, offset, data);
        match interrupts::place(&self.shape, bar, offset, data.len()) {
            _ if self.link.is_gone() => {}
            Place::Server => {
                if let Some(region) = self.region(bar, offset, data.len()).filter(|region| region.writable) {
                    self.requests.fetch_add(1, Ordering::Relaxed);
                    if self.link.access().write(bar.get(), offset, data, region.writes) == Done::No {
                        log::debug!("device {}: a write to {bar}+{offset:#x} was dropped", self.link.name());
                    }
                }
            }
            Place::Table(at) => {
                let mut plugged = lock(&self.plugged);
                let msix = plugged.as_mut().and_then(|plugged| plugged.delivery.msix());
                if let Some(Err(error)) = msix.map(|msix| msix.write_table(at, data)) {
                    self.refused(&error);
                }
            }
            Place::Pending(_) | Place::Across => {}
        }
        self.tidy();
    }
}

impl Occupant for VfioUserDevice {
    fn unplug(&self) {
        self.ejected.store(true, Ordering::Relaxed);
        VfioUserDevice::unplug(self);
    }
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
