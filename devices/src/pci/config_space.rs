//! A type-0 configuration space (PCI 3.0 §6.1, §6.2, §6.7): header, base address registers, a list of
//! capabilities. Pure; must never call anyone. Whether a write beyond the header has an effect is the
//! function's decision.

use std::fmt;

use super::bar::{BarIndex, Bars, Command, Decoded};

/// The ids and the class of a function.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class code: base class, sub-class, programming interface, from bit 23 down.
    pub class: u32,
    /// Subsystem vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:04x} class {:06x}", self.vendor, self.device, self.class)
    }
}

/// The part of the space that a configuration write touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// The command register or a base address register: ask [`ConfigSpace::decoded`] again.
    Decoding,
    /// Something else.
    Other,
}

/// No room is left for a capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no room is left for a PCI capability of {0} bytes")]
pub struct NoRoom(pub usize);

/// Offsets in the header.
pub mod offset {
    /// Vendor and device.
    pub const ID: u16 = 0x00;
    /// The command register.
    pub const COMMAND: u16 = 0x04;
    /// The status register.
    pub const STATUS: u16 = 0x06;
    /// Revision and class code.
    pub const REVISION: u16 = 0x08;
    /// The type of header.
    pub const HEADER_TYPE: u16 = 0x0e;
    /// The first base address register.
    pub const BARS: u16 = 0x10;
    /// Subsystem vendor and subsystem.
    pub const SUBSYSTEM: u16 = 0x2c;
    /// The expansion ROM's base address register.
    pub const ROM: u16 = 0x30;
    /// The first capability.
    pub const CAPABILITIES: u16 = 0x34;
    /// The interrupt line register, where the guest keeps a number of its own.
    pub const INTERRUPT_LINE: u16 = 0x3c;
    /// The function's interrupt pin: 1 is INTA, 0 none.
    pub const INTERRUPT_PIN: u16 = 0x3d;
    /// The first offset behind the header.
    pub const HEADER_END: u16 = 0x40;
}

/// The length in bytes. Beyond it, a conventional function reads zero.
const LENGTH: usize = 256;
/// The writable bits of the command register: I/O, memory, master, parity, SERR, INTx disable.
const COMMAND_WRITABLE: u16 = 0x0547;
/// Bit of the status register: the function has a list of capabilities.
pub(super) const STATUS_CAPABILITIES: u16 = 1 << 4;

/// The number of the base address register at `offset`, a multiple of 4; `None` if there is none.
#[must_use]
pub fn bar_register(offset: u16) -> Option<u8> {
    match offset {
        offset::ROM => Some(BarIndex::ROM.get()),
        offset::BARS..0x28 => u8::try_from((offset - offset::BARS) / 4).ok(),
        _ => None,
    }
}

/// The configuration space of one function.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; LENGTH],
    /// A set bit can be written by the guest.
    writable: [u8; LENGTH],
    bars: Bars,
    /// The offset of the byte that will hold the pointer to the next capability.
    link: u16,
    /// The offset at which the next capability may begin.
    free: u16,
}

impl ConfigSpace {
    /// A header without capabilities. `pin` is 1 for INTA, 0 for none.
    #[must_use]
    pub fn new(identity: Identity, bars: Bars, pin: u8) -> Self {
        let mut space = Self {
            bytes: [0; LENGTH],
            writable: [0; LENGTH],
            bars,
            link: offset::CAPABILITIES,
            free: offset::HEADER_END,
        };
        let Identity { vendor, device, revision, class, subsystem_vendor, subsystem } = identity;
        space.set(0, &vendor.to_le_bytes());
        space.set(2, &device.to_le_bytes());
        space.set(offset::REVISION, &(class << 8 | u32::from(revision)).to_le_bytes());
        space.set(offset::SUBSYSTEM, &subsystem_vendor.to_le_bytes());
        space.set(offset::SUBSYSTEM + 2, &subsystem.to_le_bytes());
        space.set(offset::INTERRUPT_PIN, &[pin]);
        space.let_write(offset::COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        space.let_write(offset::INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Appends a capability: its id, and `body` from offset 2 on. The guest can write the bits that are set
    /// in `writable`, which begins at offset 2, too. Returns the capability's offset.
    ///
    /// # Errors
    /// When 256 bytes are not enough.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> Result<u16, NoRoom> {
        let length = body.len().saturating_add(2);
        let (at, end) = (self.free, usize::from(self.free).saturating_add(length));
        let start = u8::try_from(at).ok().filter(|_| end <= LENGTH).ok_or(NoRoom(length))?;
        self.set(self.link, &[start]);
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.let_write(at + 2, writable);
        self.link = at + 1;
        self.free = u16::try_from(end.next_multiple_of(4)).map_err(|_| NoRoom(length))?;
        let status = self.word(offset::STATUS) | STATUS_CAPABILITIES;
        self.set(offset::STATUS, &status.to_le_bytes());
        Ok(at)
    }

    /// Sets bytes that the guest reads, whether the guest can write them or not. Bytes outside the space are
    /// ignored.
    pub fn set(&mut self, offset: u16, bytes: &[u8]) {
        copy(&mut self.bytes, offset, bytes);
    }

    fn let_write(&mut self, offset: u16, mask: &[u8]) {
        copy(&mut self.writable, offset, mask);
    }

    /// The 16 bits at `offset`.
    #[must_use]
    pub fn word(&self, offset: u16) -> u16 {
        let byte = |at: u16| self.bytes.get(usize::from(at)).copied().unwrap_or(0);
        u16::from_le_bytes([byte(offset), byte(offset.saturating_add(1))])
    }

    /// The command register.
    #[must_use]
    pub fn command(&self) -> Command {
        Command(self.word(offset::COMMAND))
    }

    /// The BARs that are decoded now.
    #[must_use]
    pub fn decoded(&self) -> Vec<Decoded> {
        self.bars.decoded(self.command())
    }

    fn dword(&self, at: u16) -> [u8; 4] {
        if let Some(number) = bar_register(at) {
            return self.bars.read(number).to_le_bytes();
        }
        let byte = |n: u16| self.bytes.get(usize::from(at.saturating_add(n))).copied().unwrap_or(0);
        [byte(0), byte(1), byte(2), byte(3)]
    }

    /// Fills `data`, 1 to 4 bytes inside one dword.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let dword = self.dword(offset & !3);
        let from = usize::from(offset & 3);
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = dword.get(from.saturating_add(index)).copied().unwrap_or(0);
        }
    }

    /// Takes `data`, 1 to 4 bytes inside one dword.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> Change {
        let start = offset & !3;
        if let Some(number) = bar_register(start) {
            let mut dword = self.dword(start);
            copy(&mut dword, offset & 3, data);
            self.bars.write(number, u32::from_le_bytes(dword));
            return Change::Decoding;
        }
        let from = usize::from(offset);
        for ((byte, mask), new) in self.bytes.iter_mut().zip(&self.writable).skip(from).zip(data) {
            *byte = *byte & !mask | new & mask;
        }
        if start == offset::COMMAND { Change::Decoding } else { Change::Other }
    }
}

/// Overwrites `to` from `offset` on. Bytes outside `to` are ignored.
fn copy(to: &mut [u8], offset: u16, from: &[u8]) {
    for (to, from) in to.iter_mut().skip(usize::from(offset)).zip(from) {
        *to = *from;
    }
}

#[cfg(test)]
#[path = "config_space_tests.rs"]
mod tests;
