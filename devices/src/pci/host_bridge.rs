//! The root of PCI (PCI 3.0 §3.2.2.3.2, PCIe 5.0 §7.2.2): bus 0 with its functions, configuration accesses by
//! ECAM and by the ports 0xCF8 and 0xCFC, and the windows through which the processor reaches BARs. The
//! bridge decides which function gets an access, and the function decides what the access does. No lock of
//! the bridge may be held while a BAR is accessed.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::bar::{BarIndex, Bars, Decoded, Room, Space, Window, Windows};
use super::config_space::{ConfigSpace, Identity};
use super::lines::IntxLines;
use super::{DeviceNumber, Function};
use crate::bus::BusDevice;
use crate::lock;

/// Length of the ECAM of one bus.
pub const ECAM_LENGTH: u64 = 1 << 20;
/// The first of the configuration ports.
pub const CONFIG_PORTS: u64 = 0xcf8;
/// How many configuration ports there are.
pub const CONFIG_PORTS_LENGTH: u64 = 8;

/// Red Hat's generic PCIe host bridge, which guests know and for which they have no quirks.
const IDENTITY: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: 0x06_0000,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

/// Why a function cannot be put on the bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InsertError {
    /// All 31 numbers are taken.
    #[error("all 31 PCI devices are in use")]
    Full,
    /// This number is taken.
    #[error("PCI device {0} is in use")]
    Taken(DeviceNumber),
}

/// Whether configuration writes still reach a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    OnTheBus,
    TakenOff,
}

/// A function on the bus.
struct Entry {
    function: Arc<dyn Function>,
    /// Held across a configuration write, so that `decoded` always reflects the guest's last write.
    order: Mutex<Place>,
    /// Must never be held while the function is called.
    decoded: Mutex<Vec<Decoded>>,
}

/// A BAR at its present addresses.
struct Routed {
    start: u64,
    last: u64,
    bar: BarIndex,
    function: Arc<dyn Function>,
}

/// The BARs of all functions, each list in address order and without overlaps.
#[derive(Default)]
struct Routes {
    memory: Vec<Routed>,
    io: Vec<Routed>,
}

/// The lines that interrupt pins lead to.
#[derive(Clone)]
pub struct Intx {
    /// The lines.
    pub lines: Arc<IntxLines>,
    /// The lines' GSIs. Pin INTA of device n leads to the GSI at index n modulo 4, INTB to the next one, and
    /// so on.
    pub gsis: [u32; 4],
}

/// The root of PCI; see the module's page.
pub struct HostBridge {
    windows: Windows,
    intx: Option<Intx>,
    room: Mutex<Room>,
    bridge: Mutex<ConfigSpace>,
    entries: RwLock<[Option<Arc<Entry>>; 32]>,
    routes: RwLock<Routes>,
    /// The register behind port 0xCF8.
    address: Mutex<u32>,
}

impl HostBridge {
    /// An empty bus without interrupt lines: its functions have message interrupts only.
    #[must_use]
    pub fn new(windows: Windows) -> Arc<Self> {
        Self::make(windows, None)
    }

    /// An empty bus with interrupt lines.
    #[must_use]
    pub fn with_lines(windows: Windows, intx: Intx) -> Arc<Self> {
        Self::make(windows, Some(intx))
    }

    fn make(windows: Windows, intx: Option<Intx>) -> Arc<Self> {
        let none = Bars::none(windows);
        Arc::new(Self {
            windows,
            intx,
            room: Mutex::new(Room::new(windows)),
            bridge: Mutex::new(ConfigSpace::new(IDENTITY, none, 0)),
            entries: RwLock::default(),
            routes: RwLock::default(),
            address: Mutex::new(0),
        })
    }

    /// The windows that lead to the bus.
    #[must_use]
    pub fn windows(&self) -> Windows {
        self.windows
    }

    /// The interrupt lines.
    #[must_use]
    pub fn lines(&self) -> Option<&Arc<IntxLines>> {
        self.intx.as_ref().map(|intx| &intx.lines)
    }

    /// The lines, and the GSI that pin INTA of this device leads to.
    #[must_use]
    pub fn pin(&self, number: DeviceNumber) -> Option<(Arc<IntxLines>, u32)> {
        let Intx { lines, gsis } = self.intx.as_ref()?;
        let gsi = gsis.get(usize::from(number.get()) % gsis.len())?;
        Some((Arc::clone(lines), *gsi))
    }

    /// The lowest device number that is free.
    #[must_use]
    pub fn free(&self) -> Option<DeviceNumber> {
        DeviceNumber::ALL.filter_map(DeviceNumber::new).find(|number| self.entry(number.get()).is_none())
    }

    /// Assigns addresses to the BARs of a new function, as firmware would.
    pub fn assign(&self, bars: &mut Bars) {
        bars.assign(&mut lock(&self.room));
    }

    /// Puts `function` on the bus, at `number` or at the lowest number that is free.
    ///
    /// # Errors
    /// When the number is taken, or all numbers are.
    pub fn insert(
        &self,
        number: Option<DeviceNumber>,
        function: Arc<dyn Function>,
    ) -> Result<DeviceNumber, InsertError> {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        let free =
            |number: &DeviceNumber| entries.get(usize::from(number.get())).is_some_and(Option::is_none);
        let number = match number {
            Some(number) if free(&number) => number,
            Some(number) => return Err(InsertError::Taken(number)),
            None => {
                let all = DeviceNumber::ALL.filter_map(DeviceNumber::new);
                all.into_iter().find(free).ok_or(InsertError::Full)?
            }
        };
        let decoded = Mutex::new(function.decoded());
        let entry = Arc::new(Entry { decoded, order: Mutex::new(Place::OnTheBus), function });
        if let Some(place) = entries.get_mut(usize::from(number.get())) {
            *place = Some(entry);
        }
        drop(entries);
        self.reroute();
        Ok(number)
    }

    /// Takes a function off the bus. Waits for a configuration write to the function that is under way on
    /// another vCPU. No configuration write reaches the function afterwards; any other call that another vCPU
    /// has begun may still be under way.
    pub fn remove(&self, number: DeviceNumber) -> Option<Arc<dyn Function>> {
        let mut entries = self.entries.write().unwrap_or_else(PoisonError::into_inner);
        let entry = entries.get_mut(usize::from(number.get())).and_then(Option::take);
        drop(entries);
        self.reroute();
        entry.map(|entry| {
            *lock(&entry.order) = Place::TakenOff;
            Arc::clone(&entry.function)
        })
    }

    /// Takes all functions off the bus.
    pub fn clear(&self) {
        *self.entries.write().unwrap_or_else(PoisonError::into_inner) = Default::default();
        self.reroute();
    }

    fn entry(&self, device: u8) -> Option<Arc<Entry>> {
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        entries.get(usize::from(device)).cloned().flatten()
    }

    /// Rebuilds `routes` from the BARs that the functions decode.
    fn reroute(&self) {
        // The lock order is `order`, `entries`, `routes`, `decoded`. No thread takes them in another order.
        let entries = self.entries.read().unwrap_or_else(PoisonError::into_inner);
        let mut routes = self.routes.write().unwrap_or_else(PoisonError::into_inner);
        let Routes { memory, io } = &mut *routes;
        memory.clear();
        io.clear();
        for entry in entries.iter().flatten() {
            for Decoded { bar, space, base, size } in lock(&entry.decoded).iter().copied() {
                let list = if space == Space::Memory { &mut *memory } else { &mut *io };
                let Some(last) = size.checked_sub(1).and_then(|more| base.checked_add(more)) else {
                    continue;
                };
                let at = list.partition_point(|other| other.start < base);
                let clear = |other: Option<&Routed>| other.is_none_or(|o| last < o.start || o.last < base);
                // The guest has put two BARs at the same addresses, which is a mistake. The first BAR gets
                // the accesses.
                if clear(list.get(at)) && clear(at.checked_sub(1).and_then(|before| list.get(before))) {
                    let function = Arc::clone(&entry.function);
                    list.insert(at, Routed { start: base, last, bar, function });
                }
            }
        }
    }

    fn find(&self, space: Space, address: u64, length: usize) -> Option<(Arc<dyn Function>, BarIndex, u64)> {
        let routes = self.routes.read().unwrap_or_else(PoisonError::into_inner);
        let list = if space == Space::Memory { &routes.memory } else { &routes.io };
        let after = list.partition_point(|route| route.start <= address);
        let route = list.get(after.checked_sub(1)?)?;
        let last = address.checked_add(u64::try_from(length).ok()?.saturating_sub(1))?;
        let offset = address.checked_sub(route.start)?;
        (last <= route.last).then(|| (Arc::clone(&route.function), route.bar, offset))
    }

    /// Reads inside one dword of the configuration space of `device`.
    fn config_read(&self, device: u8, offset: u16, data: &mut [u8]) {
        if device == 0 {
            return lock(&self.bridge).read(offset, data);
        }
        match self.entry(device) {
            Some(entry) => entry.function.config_read(offset, data),
            None => data.fill(0xff),
        }
    }

    fn config_write(&self, device: u8, offset: u16, data: &[u8]) {
        if device == 0 {
            lock(&self.bridge).write(offset, data);
            return;
        }
        let Some(entry) = self.entry(device) else { return };
        let place = lock(&entry.order);
        if *place == Place::TakenOff {
            return;
        }
        entry.function.config_write(offset, data);
        let now = entry.function.decoded();
        let before = std::mem::replace(&mut *lock(&entry.decoded), now.clone());
        if before != now {
            log::debug!("PCI device 00:{device:02x}.0 decodes {now:x?}");
            self.reroute();
        }
    }

    /// The device for the memory bus that gives access to the configuration space by ECAM: [`ECAM_LENGTH`]
    /// bytes.
    #[must_use]
    pub fn ecam(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(Ecam(Arc::clone(self)))
    }

    /// The device for the I/O bus at [`CONFIG_PORTS`] that gives access to the configuration space.
    #[must_use]
    pub fn config_ports(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(ConfigPorts(Arc::clone(self)))
    }

    /// The device for the memory bus at a window of memory: it passes accesses on to BARs.
    #[must_use]
    pub fn memory(self: &Arc<Self>, window: Window) -> Arc<dyn BusDevice> {
        Arc::new(Through { bridge: Arc::clone(self), space: Space::Memory, base: window.base })
    }

    /// The device for the I/O bus at the window of I/O ports: it passes accesses on to BARs.
    #[must_use]
    pub fn io(self: &Arc<Self>) -> Arc<dyn BusDevice> {
        Arc::new(Through { bridge: Arc::clone(self), space: Space::Io, base: self.windows.io.base })
    }
}

/// Splits an access into pieces of one dword each: the range of each piece in the data, and its offset.
fn pieces(offset: u64, length: usize) -> impl Iterator<Item = (std::ops::Range<usize>, u64)> {
    let mut done = 0_usize;
    std::iter::from_fn(move || {
        let at = offset.checked_add(u64::try_from(done).ok()?)?;
        let room = 4_usize.saturating_sub(usize::try_from(at & 3).ok()?);
        let end = done.saturating_add(room).min(length);
        let piece = (done < end).then_some((done..end, at));
        done = end;
        piece
    })
}

/// The device and register at an offset of the ECAM; `None` for functions other than 0, which do not exist.
fn ecam_place(at: u64) -> Option<(u8, u16)> {
    let device = u8::try_from(at >> 15).ok().filter(|device| *device < 32)?;
    let register = u16::try_from(at & 0xfff).ok()?;
    (at >> 12 & 7 == 0).then_some((device, register))
}

struct Ecam(Arc<HostBridge>);

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (range, at) in pieces(offset, data.len()) {
            let Some(piece) = data.get_mut(range) else { continue };
            match ecam_place(at) {
                Some((device, register)) => self.0.config_read(device, register, piece),
                None => piece.fill(0xff),
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        for (range, at) in pieces(offset, data.len()) {
            if let (Some((device, register)), Some(piece)) = (ecam_place(at), data.get(range)) {
                self.0.config_write(device, register, piece);
            }
        }
    }
}

struct ConfigPorts(Arc<HostBridge>);

impl ConfigPorts {
    const ENABLE: u32 = 1 << 31;
    const DATA: u64 = 4;

    /// The device and register that the data port leads to; `None` when the address register selects nothing
    /// on this bus.
    fn place(&self, port: u64) -> Option<(u8, u16)> {
        let address = *lock(&self.0.address);
        let [register, function, bus, _] = address.to_le_bytes();
        let here = address & Self::ENABLE != 0 && bus == 0 && function & 7 == 0;
        let byte = u16::try_from(port.checked_sub(Self::DATA)?).ok()?;
        here.then_some((function >> 3, u16::from(register & 0xfc) + byte))
    }
}

impl BusDevice for ConfigPorts {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match (offset, self.place(offset)) {
            (0, _) if data.len() == 4 => data.copy_from_slice(&lock(&self.0.address).to_le_bytes()),
            (Self::DATA.., Some((device, register))) => self.0.config_read(device, register, data),
            _ => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, self.place(offset), <[u8; 4]>::try_from(data)) {
            // Reserved bits stay clear.
            (0, _, Ok(bytes)) => *lock(&self.0.address) = u32::from_le_bytes(bytes) & 0x80ff_fffc,
            (Self::DATA.., Some((device, register)), _) => self.0.config_write(device, register, data),
            _ => {}
        }
    }
}

/// A window to the BARs.
struct Through {
    bridge: Arc<HostBridge>,
    space: Space,
    base: u64,
}

impl BusDevice for Through {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match self.bridge.find(self.space, self.base.saturating_add(offset), data.len()) {
            Some((function, bar, offset)) => function.bar_read(bar, offset, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let found = self.bridge.find(self.space, self.base.saturating_add(offset), data.len());
        if let Some((function, bar, offset)) = found {
            function.bar_write(bar, offset, data);
        }
    }
}

#[cfg(test)]
#[path = "host_bridge_tests.rs"]
mod tests;
