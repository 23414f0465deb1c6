//! PCI Local Bus 3.0 §6: configuration space of one function, with the capabilities that the devices here
//! have.
//!
//! BARs and the enable bits of MSI-X are kept by the client as well; what it writes through arrives here all
//! the same.

use vfio_bindings::bindings::vfio::{
    VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_NUM_REGIONS, VFIO_REGION_INFO_FLAG_MMAP,
    VFIO_REGION_INFO_FLAG_READ, VFIO_REGION_INFO_FLAG_WRITE, vfio_region_info, vfio_region_sparse_mmap_area,
};
use vfio_user::{ServerRegion, SparseArea};

use crate::area::Area;

const SIZE: usize = 4096;
const COMMAND: usize = 4;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const STATUS_INTERRUPT: u8 = 1 << 3;
const BARS: usize = 0x10;
const CAPABILITIES: usize = 0x34;
const FIRST_CAPABILITY: usize = 0x40;

/// What tells drivers which device this is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Vendor and device.
    pub id: (u16, u16),
    /// The same of the subsystem.
    pub subsystem: (u16, u16),
    /// Base class, subclass, programming interface.
    pub class: [u8; 3],
    /// INTA to INTD as 1 to 4, 0 for none.
    pub pin: u8,
}

/// Where a BAR is, and how wide.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decode {
    /// Below 4 GiB.
    Memory32,
    /// Anywhere, prefetchable; takes the next BAR, too.
    Memory64,
    /// Ports.
    Io,
}

/// One BAR.
#[derive(Clone, Copy, Debug)]
pub struct Bar<'a> {
    /// 0 to 5.
    pub index: u8,
    /// Bytes, a power of two.
    pub size: u64,
    /// Where.
    pub decode: Decode,
    /// Memory that the client may map, and which pieces of it (offset, size).
    pub mapped: Option<(&'a Area, &'a [(u64, u64)])>,
}

/// What a write to configuration space asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing more.
    None,
    /// A function level reset.
    Reset,
}

/// The bytes, and which of their bits the guest may change.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: Vec<u8>,
    writable: Vec<u8>,
    at_reset: Vec<u8>,
    last: usize,
    free: usize,
    device_control: Option<usize>,
}

impl ConfigSpace {
    /// A function with these identifiers and no BARs.
    #[must_use]
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            bytes: vec![0; SIZE],
            writable: vec![0; SIZE],
            at_reset: Vec::new(),
            last: CAPABILITIES,
            free: FIRST_CAPABILITY,
            device_control: None,
        };
        space.put(0, &identity.id.0.to_le_bytes());
        space.put(2, &identity.id.1.to_le_bytes());
        // I/O, memory, bus master, INTx disable.
        space.allow(COMMAND, &[0x07, 0x04]);
        let [base, sub, interface] = identity.class;
        space.put(8, &[1, interface, sub, base]);
        // Cache line size and latency timer are the guest's.
        space.allow(0x0c, &[0xff, 0xff]);
        space.put(0x2c, &identity.subsystem.0.to_le_bytes());
        space.put(0x2e, &identity.subsystem.1.to_le_bytes());
        space.allow(0x3c, &[0xff]);
        space.put(0x3d, &[identity.pin]);
        space
    }

    /// Adds a BAR.
    pub fn bar(&mut self, bar: &Bar<'_>) {
        let at = BARS + 4 * usize::from(bar.index);
        let mask = (!(bar.size - 1)).to_le_bytes();
        let (low, high) = mask.split_at(4);
        match bar.decode {
            Decode::Memory32 => self.allow(at, low),
            Decode::Io => {
                self.put(at, &[1]);
                self.allow(at, low);
            }
            Decode::Memory64 => {
                self.put(at, &[0x0c]);
                self.allow(at, low);
                self.allow(at + 4, high);
            }
        }
    }

    /// Adds a capability: what follows its identifier and next pointer, and which bits of that the guest may
    /// change.
    pub fn capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.free;
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        // The first pointer is at 0x34, the others are the second byte of a capability.
        let pointer = if self.last == CAPABILITIES { CAPABILITIES } else { self.last + 1 };
        self.put(pointer, &[u8::try_from(at).unwrap_or(0)]);
        self.put(COMMAND + 2, &[STATUS_CAPABILITIES]);
        self.last = at;
        self.free = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// MSI-X: table and pending bits in BAR `bar` (PCI 3.0 §6.8.2).
    pub fn msix(&mut self, vectors: u16, bar: u8, table: u32, pending: u32) {
        let mut body = [0; 10];
        let fields = [(vectors - 1).to_le_bytes().to_vec()]
            .into_iter()
            .chain([table, pending].map(|offset| (offset | u32::from(bar)).to_le_bytes().to_vec()));
        for (to, from) in body.iter_mut().zip(fields.flatten()) {
            *to = from;
        }
        self.capability(0x11, &body, &[0x00, 0xc0]);
    }

    /// MSI with 64-bit addresses and 2^`log2` vectors (PCI 3.0 §6.8.1).
    pub fn msi(&mut self, log2: u8) {
        let mut body = [0; 12];
        body[0] = 0x80 | log2 << 1;
        self.capability(0x05, &body, &[0x71, 0, 0xfc, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    }

    /// PCI Express, an endpoint integrated into the root complex, with function level reset (PCIe 4.0
    /// §7.5.3).
    pub fn express(&mut self) {
        let mut body = [0; 58];
        // Version 2, root complex integrated endpoint; role-based errors, function level reset.
        (body[0], body[3], body[5]) = (0x92, 0x80, 0x10);
        let mut writable = [0; 58];
        (writable[6], writable[7]) = (0xff, 0x7f);
        let at = self.capability(0x10, &body, &writable);
        self.device_control = Some(at + 8);
    }

    /// Everything is described: what is there now is what a reset brings back.
    #[must_use]
    pub fn finish(mut self) -> Self {
        self.at_reset = self.bytes.clone();
        self
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (to, from) in self.bytes.iter_mut().skip(at).zip(bytes) {
            *to |= from;
        }
    }

    fn allow(&mut self, at: usize, bits: &[u8]) {
        for (to, from) in self.writable.iter_mut().skip(at).zip(bits) {
            *to |= from;
        }
    }

    /// Reads; all ones past the end.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let start = usize::try_from(offset).unwrap_or(SIZE).min(SIZE);
        for (to, from) in data.iter_mut().zip(self.bytes.iter().skip(start)) {
            *to = *from;
        }
    }

    /// Writes what may be written.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let start = usize::try_from(offset).unwrap_or(SIZE).min(SIZE);
        let places = self.bytes.iter_mut().zip(&self.writable).skip(start);
        for ((byte, mask), new) in places.zip(data) {
            *byte = *byte & !mask | new & mask;
        }
        // Bit 15 of Device Control starts a reset and reads as 0.
        let high = self.device_control.map(|at| at + 1).and_then(|at| at.checked_sub(start));
        match high.and_then(|index| data.get(index)) {
            Some(byte) if byte & 0x80 != 0 => Effect::Reset,
            _ => Effect::None,
        }
    }

    /// True when the guest does not want the pin (Interrupt Disable of the command register).
    #[must_use]
    pub fn pin_disabled(&self) -> bool {
        self.bytes.get(COMMAND + 1).is_some_and(|command| command & 4 != 0)
    }

    /// Interrupt Status of the status register: the pin is asserted.
    pub fn assert_pin(&mut self) {
        self.put(COMMAND + 2, &[STATUS_INTERRUPT]);
    }

    /// The pin is released.
    pub fn release_pin(&mut self) {
        if let Some(status) = self.bytes.get_mut(COMMAND + 2) {
            *status &= !STATUS_INTERRUPT;
        }
    }

    /// As after power-on.
    pub fn reset(&mut self) {
        self.bytes.clone_from(&self.at_reset);
    }

    /// True when the guest lets the device reach memory.
    #[must_use]
    pub fn bus_master(&self) -> bool {
        self.bytes.get(COMMAND).is_some_and(|command| command & 4 != 0)
    }
}

/// What GET_REGION_INFO answers: the BARs and configuration space.
#[must_use]
pub fn regions(bars: &[Bar<'_>]) -> Vec<ServerRegion> {
    (0..VFIO_PCI_NUM_REGIONS)
        .map(|index| {
            let mut region_info = vfio_region_info {
                argsz: u32::try_from(size_of::<vfio_region_info>()).unwrap_or(0),
                index,
                ..Default::default()
            };
            let mut sparse_areas = Vec::new();
            let mut mmap_fd = None;
            let both = VFIO_REGION_INFO_FLAG_READ | VFIO_REGION_INFO_FLAG_WRITE;
            if index == VFIO_PCI_CONFIG_REGION_INDEX {
                (region_info.size, region_info.flags) = (SIZE as u64, both);
            } else if let Some(bar) = bars.iter().find(|bar| u32::from(bar.index) == index) {
                (region_info.size, region_info.flags) = (bar.size, both);
                if let Some((area, pieces)) = bar.mapped {
                    region_info.flags |= VFIO_REGION_INFO_FLAG_MMAP;
                    mmap_fd = Some(area.fd());
                    // The crate sends the descriptor only along with at least one area.
                    sparse_areas = pieces
                        .iter()
                        .map(|(offset, size)| SparseArea {
                            area: vfio_region_sparse_mmap_area { offset: *offset, size: *size },
                        })
                        .collect();
                }
            }
            ServerRegion { region_info, sparse_areas, mmap_fd }
        })
        .collect()
}
