//! The function on one board: its configuration space half ours and half the server's, its BARs partly memory of
//! the guest and partly answered by the server.
//!
//! Locks: `state` is held for registers and for what is registered with the machine, never while the server is
//! asked; accesses of BARs do not take it. So vCPUs that read different registers wait for the server side by side.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use super::contents::{COMMAND_OURS, register};
use super::delivery::{self, Delivery, Place};
use super::link::{Done, Link, Writes};
use super::remote::{Region, Remote};
use super::server::{CONFIG_REGION, Irq};
use crate::lock;
use crate::pci::bar::{BarError, Command};
use crate::pci::hotplug::Occupant;
use crate::pci::{BarIndex, Bars, Decoded, Fixture, Fixtures, Function, HostBridge};
use crate::ports::{Access, FileRange, PortError, Ports};

/// Why a function cannot be put on a board.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Its BARs fit no bus.
    #[error(transparent)]
    Bars(#[from] BarError),
    /// The machine refuses something of it.
    #[error(transparent)]
    Port(#[from] PortError),
    /// A descriptor cannot be had.
    #[error("a doorbell's descriptor cannot be duplicated")]
    Duplicate(#[source] std::io::Error),
}

struct State {
    /// As the guest wrote it, the server's bits included; only some are read from here.
    command: u16,
    line: u8,
    bars: Bars,
    fixtures: Vec<Fixtures>,
    delivery: Delivery,
}

/// A server's function on a board.
pub struct Device {
    remote: Arc<Remote>,
    state: Mutex<State>,
    /// What was registered with the machine is gone, for good.
    dismantled: AtomicBool,
    /// The log knows that the machine refused something of a BAR.
    place_refused: AtomicBool,
    /// It knows that the machine refused a route.
    route_refused: AtomicBool,
}

impl Device {
    /// Puts what `remote` serves on a board; the bridge gives its BARs their places. `pin` is the GSI that its pin
    /// leads to.
    ///
    /// # Errors
    /// When the machine refuses something of it.
    pub fn new(
        remote: Arc<Remote>,
        ports: &Ports,
        bridge: &HostBridge,
        pin: Option<u32>,
    ) -> Result<Arc<Self>, AttachError> {
        let specs: Vec<_> = remote.contents.bars.iter().flatten().map(|bar| bar.spec()).collect();
        let mut bars = Bars::new(&specs, bridge.windows())?;
        bridge.assign(&mut bars);
        let calls = Arc::clone(&remote.calls);
        let delivery = Delivery::new(&remote.contents, calls, Arc::clone(&ports.interrupts), pin);
        let state = State { command: 0, line: 0, bars, fixtures: Vec::new(), delivery };
        let device = Arc::new(Self {
            remote: Arc::clone(&remote),
            state: Mutex::new(state),
            dismantled: AtomicBool::new(false),
            place_refused: AtomicBool::new(false),
            route_refused: AtomicBool::new(false),
        });
        let mut fixtures = Vec::new();
        for (bar, region) in remote.contents.bars.iter().zip(&remote.regions) {
            if let Some(bar) = bar {
                fixtures.push(fix(&device, bar.index, region, ports)?);
            }
        }
        lock(&device.state).fixtures = fixtures;
        device.tell_places();
        remote.placed();
        Ok(device)
    }

    /// The server's BARs are where the guest finds them: a guest that takes them as they are never writes them, and
    /// QEMU's server answers for a BAR only where its own register says that it is. Waits for the server.
    fn tell_places(&self) {
        for bar in self.remote.contents.bars.iter().flatten() {
            let first = bar.index.get();
            for number in first..=first.saturating_add(u8::from(bar.kind.is_wide())) {
                let register = lock(&self.state).bars.read(number);
                self.forward(register::BARS + 4 * u16::from(number), &register.to_le_bytes());
            }
        }
    }

    fn link(&self) -> &Link {
        &self.remote.link
    }

    /// The machine refused a route: the vector's signals stay pending. A guest can bring that about as often as it likes.
    fn route_refused(&self, error: &PortError) {
        if !self.route_refused.swap(true, Ordering::Relaxed) {
            log::warn!("device {}: {error} (logged once)", self.link().name());
        }
    }

    /// The server is gone, or is to be. Called on any thread without the device's lock; does not wait.
    pub fn give_up(&self, why: &str) {
        self.link().give_up(why);
        self.tidy();
    }

    /// A broken device has nothing registered with the machine.
    fn tidy(&self) {
        if self.link().is_broken() && !self.dismantled.swap(true, Ordering::AcqRel) {
            self.dismantle();
        }
    }

    fn dismantle(&self) {
        let mut state = lock(&self.state);
        state.fixtures.clear();
        state.delivery.cut();
    }

    /// Takes the function off its board: nothing of it is registered with the machine afterwards, and the device is
    /// as after power-on. Waits for the server.
    pub fn retire(&self) {
        self.dismantled.store(true, Ordering::Release);
        self.dismantle();
        self.remote.power_on();
    }

    /// What the guest reads of one dword.
    fn config_dword(&self, at: u16) -> [u8; 4] {
        let overlay = &self.remote.contents.overlay;
        let mut dword = [0; 4];
        // Not all functions have an extended space.
        if at >= overlay.size() {
            return [0xff; 4];
        }
        if overlay.needs_server(at, 4) {
            self.link().read(CONFIG_REGION, at.into(), &mut dword);
        }
        if self.link().is_broken() {
            return [0xff; 4];
        }
        overlay.cover(at, &mut dword);
        let state = lock(&self.state);
        match at {
            register::COMMAND => {
                let [low, high, ..] = &mut dword;
                let servers = u16::from_le_bytes([*low, *high]) & !COMMAND_OURS;
                [*low, *high] = (servers | state.command & COMMAND_OURS).to_le_bytes();
            }
            register::LINE => {
                let [line, ..] = &mut dword;
                *line = state.line;
            }
            _ => {
                if let Some(number) = bar_number(at) {
                    dword = state.bars.read(number).to_le_bytes();
                }
                state.delivery.cover(at, &mut dword);
            }
        }
        dword
    }

    /// Notes what the guest writes of one dword; what the server is to be told, if anything.
    fn note(&self, state: &mut State, offset: u16, data: &[u8]) -> Option<(u16, Vec<u8>)> {
        let at = offset & !3;
        let merged = |mut dword: [u8; 4]| {
            dword.iter_mut().skip(usize::from(offset & 3)).zip(data).for_each(|(to, from)| *to = *from);
            dword
        };
        if let Some(number) = bar_number(at) {
            let dword = merged(state.bars.read(number).to_le_bytes());
            state.bars.write(number, u32::from_le_bytes(dword));
            return Some((at, state.bars.read(number).to_le_bytes().to_vec()));
        }
        let whole = (offset, data.to_vec());
        if state.delivery.has(at) {
            let mut dword = [0; 4];
            state.delivery.cover(at, &mut dword);
            if let Err(error) = state.delivery.write(at, u32::from_le_bytes(merged(dword))) {
                self.route_refused(&error);
            }
            return Some(whole);
        }
        match at {
            register::COMMAND => {
                let [low, high] = state.command.to_le_bytes();
                let [low, high, ..] = merged([low, high, 0, 0]);
                state.command = u16::from_le_bytes([low, high]);
                // One of its bytes alone is refused by libvfio-user.
                if data.len() == 1 && offset < register::STATUS {
                    return Some((register::COMMAND, vec![low, high]));
                }
            }
            register::LINE => [state.line, ..] = merged([state.line, 0, 0, 0]),
            _ => {}
        }
        self.remote.contents.overlay.needs_server(offset, data.len()).then_some(whole)
    }

    /// The server signals what the guest has switched on; what it was given eventfds for just now. Waits for the server.
    fn rearm(&self, wanted: Option<(Irq, u16)>) -> Option<Irq> {
        let calls = self.remote.arm(wanted);
        let mut state = lock(&self.state);
        if wanted.is_none_or(|(kind, _)| kind != Irq::Intx) {
            state.delivery.disconnect(Irq::Intx);
        }
        if let Some((kind, _)) = wanted
            && let Err(error) = state.delivery.connect(kind, &calls)
        {
            self.route_refused(&error);
        }
        wanted.map(|(kind, _)| kind).filter(|_| !calls.is_empty())
    }

    /// Whether a write resets the function (PCI Express 4.0 §6.6.2).
    fn is_reset(&self, offset: u16, data: &[u8]) -> bool {
        self.remote.contents.resets.iter().any(|(at, bits)| {
            let index = at.checked_sub(offset).map(usize::from);
            index.and_then(|index| data.get(index)).is_some_and(|byte| byte & bits != 0)
        })
    }

    /// What is ours is as after power-on; the server does its part when it hears of it. Waits for the server.
    fn function_reset(&self) {
        let mut state = lock(&self.state);
        self.place(&mut state, &[]);
        (state.command, state.line) = (0, 0);
        for number in 0..6 {
            state.bars.write(number, 0);
        }
        state.delivery.reset(&self.remote.contents);
        drop(state);
        self.remote.switch_off();
    }

    /// Of a dword, the half that is the server's, where the other one is ours alone: libvfio-user refuses writes that
    /// reach the header of a capability, and loses the enable bit of MSI-X with it.
    fn servers_half<'a>(&self, offset: u16, data: &'a [u8]) -> (u16, &'a [u8]) {
        let overlay = &self.remote.contents.overlay;
        let half = |at: u16| overlay.needs_server(at, 2);
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
    fn forward(&self, offset: u16, data: &[u8]) {
        let (offset, data) = self.servers_half(offset, data);
        let natural = matches!(data.len(), 1 | 2 | 4) && usize::from(offset).is_multiple_of(data.len());
        let size = if natural { data.len() } else { 1 };
        for (piece, at) in data.chunks(size.max(1)).zip((u64::from(offset)..).step_by(size.max(1))) {
            if self.link().write(CONFIG_REGION, at, piece, Writes::Answered) == Done::No {
                return;
            }
        }
    }

    fn place(&self, state: &mut State, decoded: &[Decoded]) {
        for fixtures in &mut state.fixtures {
            if let Err(error) = fixtures.place(decoded)
                && !self.place_refused.swap(true, Ordering::Relaxed)
            {
                log::warn!(
                    "device {}: {error}; the server is asked for each access there (logged once)",
                    self.link().name()
                );
            }
        }
    }

    fn read_msix(&self, place: Place, data: &mut [u8]) {
        data.fill(0xff);
        let mut state = lock(&self.state);
        match (place, state.delivery.msix()) {
            (Place::Table(at), Some(msix)) => msix.read_table(at, data),
            (Place::Pending(at), Some(msix)) => msix.read_pba(at, data),
            _ => {}
        }
    }

    fn write_msix(&self, at: u64, data: &[u8]) {
        let mut state = lock(&self.state);
        if let Some(Err(error)) = state.delivery.msix().map(|msix| msix.write_table(at, data)) {
            self.route_refused(&error);
        }
    }

    /// The part of a BAR that the server answers for: its region, if all of the access is inside.
    fn region(&self, bar: BarIndex, offset: u64, length: usize) -> Option<&Region> {
        let index = usize::from(bar.get());
        let shape = self.remote.contents.bars.get(index)?.as_ref()?;
        let end = offset.checked_add(u64::try_from(length).ok()?)?;
        if end > shape.region {
            return None;
        }
        self.remote.regions.get(index)
    }
}

/// The number of the BAR register at a dword.
fn bar_number(at: u16) -> Option<u8> {
    let number = u8::try_from(at.checked_sub(register::BARS)? / 4).ok()?;
    (number < 6).then_some(number)
}

fn fix(device: &Arc<Device>, bar: BarIndex, region: &Region, ports: &Ports) -> Result<Fixtures, AttachError> {
    let mut fixtures = Fixtures::new(bar, ports.clone());
    let weak: Weak<Device> = Arc::downgrade(device);
    let vanished = Arc::new(move || {
        if let Some(device) = weak.upgrade() {
            device.give_up("the server made the file behind its memory shorter");
        }
    });
    for piece in &region.pieces {
        let Some(file) = &region.file else { break };
        let access = if region.writable { Access::ReadWrite } else { Access::ReadOnly };
        let file = FileRange { fd: Arc::clone(file), offset: piece.file_offset, size: piece.size };
        fixtures.add(piece.offset, Fixture::Memory { piece: file, access, vanished: vanished.clone() })?;
    }
    for bell in &region.doorbells {
        let fd = bell.fd.try_clone().map_err(AttachError::Duplicate)?;
        fixtures.add(bell.offset, Fixture::Doorbell { fd, width: bell.width, value: bell.value })?;
    }
    Ok(fixtures)
}

impl Function for Device {
    fn config_read(&self, offset: u16, data: &mut [u8]) {
        if let Some(counter) = self.link().counter(CONFIG_REGION) {
            counter.reads.fetch_add(1, Ordering::Relaxed);
        }
        let dword = self.config_dword(offset & !3);
        let bytes = dword.iter().skip(usize::from(offset & 3)).chain(std::iter::repeat(&0xff));
        data.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        self.tidy();
    }

    fn config_write(&self, offset: u16, data: &[u8]) {
        if let Some(counter) = self.link().counter(CONFIG_REGION) {
            counter.writes.fetch_add(1, Ordering::Relaxed);
        }
        if self.link().is_broken() || offset >= self.remote.contents.overlay.size() {
            return;
        }
        if self.is_reset(offset, data) {
            self.function_reset();
        }
        let mut state = lock(&self.state);
        let before = state.bars.decoded(Command(state.command));
        let told = self.note(&mut state, offset, data);
        let after = state.bars.decoded(Command(state.command));
        // What goes is gone before the server hears of it, what comes is there afterwards.
        let stays: Vec<_> = before.iter().filter(|decoded| after.contains(decoded)).copied().collect();
        self.place(&mut state, &stays);
        let wanted = state.delivery.on(state.command);
        drop(state);
        // The old kind goes first, then the new one comes, then the server hears that it is on.
        let armed = self.rearm(wanted);
        if let Some((offset, data)) = told {
            self.forward(offset, &data);
        }
        // A pin that was asserted while it was off is heard now.
        if armed == Some(Irq::Intx) {
            self.remote.unmask_pin();
        }
        if after != stays {
            self.place(&mut lock(&self.state), &after);
        }
        self.tidy();
    }

    fn decoded(&self) -> Vec<Decoded> {
        if self.link().is_broken() {
            return Vec::new();
        }
        let state = lock(&self.state);
        state.bars.decoded(Command(state.command))
    }

    fn bar_read(&self, bar: BarIndex, offset: u64, data: &mut [u8]) {
        if let Some(counter) = self.link().counter(bar.get()) {
            counter.reads.fetch_add(1, Ordering::Relaxed);
        }
        match delivery::place(&self.remote.contents, bar, offset, data.len()) {
            Place::Server => match self.region(bar, offset, data.len()) {
                Some(region) if region.readable => self.link().read(bar.get(), offset, data),
                _ => data.fill(0xff),
            },
            _ if self.link().is_broken() => data.fill(0xff),
            place => self.read_msix(place, data),
        }
        self.tidy();
    }

    fn bar_write(&self, bar: BarIndex, offset: u64, data: &[u8]) {
        if let Some(counter) = self.link().counter(bar.get()) {
            counter.writes.fetch_add(1, Ordering::Relaxed);
        }
        let place = delivery::place(&self.remote.contents, bar, offset, data.len());
        if let Place::Table(at) = place {
            self.write_msix(at, data);
        } else if place == Place::Server
            && let Some(region) = self.region(bar, offset, data.len())
            && region.writable
            && self.link().write(bar.get(), offset, data, region.writes) == Done::No
        {
            log::debug!("device {}: a write to {bar}+{offset:#x} was dropped", self.link().name());
        }
        self.tidy();
    }
}

impl Occupant for Device {
    fn unplug(&self) {
        self.remote.ejected();
        self.retire();
    }
}

#[cfg(test)]
#[path = "device_tests.rs"]
mod tests;
