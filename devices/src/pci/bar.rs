//! Base address registers (PCI 3.0 §6.2.5): which addresses a function decodes. Pure data; must never
//! register anything with the machine, nor decode an address outside the bridge's windows.

use std::fmt;

/// The number of a base address register: 0 to 5, or the expansion ROM's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BarIndex(u8);

impl BarIndex {
    /// The first register.
    pub const FIRST: Self = Self(0);
    /// The expansion ROM's register.
    pub const ROM: Self = Self(6);
    /// All registers.
    pub const ALL: [Self; 7] = [Self(0), Self(1), Self(2), Self(3), Self(4), Self(5), Self(6)];

    /// The register with this number; `None` above 6.
    #[must_use]
    pub fn new(index: u8) -> Option<Self> {
        (index <= 6).then_some(Self(index))
    }

    /// The number; 6 is the ROM.
    #[must_use]
    pub fn get(self) -> u8 {
        self.0
    }

    fn at(self) -> usize {
        usize::from(self.0)
    }
}

impl fmt::Display for BarIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::ROM { f.write_str("the expansion ROM") } else { write!(f, "BAR {}", self.0) }
    }
}

/// An address space of the processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Space {
    /// Memory.
    Memory,
    /// I/O ports.
    Io,
}

/// The kind of a base address register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory below 4 GiB whose reads have no side effects.
    Prefetchable32,
    /// Memory at any address. Takes the next register, too.
    Memory64,
    /// Memory at any address whose reads have no side effects. Takes the next register, too.
    Prefetchable64,
    /// The expansion ROM.
    Rom,
}

impl BarKind {
    const IO: u32 = 1;
    const WIDE: u32 = 4;
    const PREFETCHABLE: u32 = 8;

    /// The kind that the low bits of a device's register say; `None` for the reserved types.
    #[must_use]
    pub fn from_register(value: u32) -> Option<Self> {
        match value & 0xf {
            bits if bits & Self::IO != 0 => Some(Self::Io),
            0 => Some(Self::Memory32),
            Self::PREFETCHABLE => Some(Self::Prefetchable32),
            Self::WIDE => Some(Self::Memory64),
            bits if bits == Self::WIDE | Self::PREFETCHABLE => Some(Self::Prefetchable64),
            _ => None,
        }
    }

    fn flags(self) -> u64 {
        u64::from(match self {
            Self::Io => Self::IO,
            Self::Memory32 | Self::Rom => 0,
            Self::Prefetchable32 => Self::PREFETCHABLE,
            Self::Memory64 => Self::WIDE,
            Self::Prefetchable64 => Self::WIDE | Self::PREFETCHABLE,
        })
    }

    /// Whether it takes two registers.
    #[must_use]
    pub fn is_wide(self) -> bool {
        matches!(self, Self::Memory64 | Self::Prefetchable64)
    }

    /// The address space that it decodes.
    #[must_use]
    pub fn space(self) -> Space {
        if self == Self::Io { Space::Io } else { Space::Memory }
    }

    /// The sizes that are accepted. Memory takes at least a page, so that a memory slot never holds parts of
    /// two functions. Ports may be more than the 256 that PCI allows, for servers that forget to say that a
    /// BAR is memory.
    fn limits(self) -> std::ops::RangeInclusive<u64> {
        match self {
            Self::Io => 4..=0x4000,
            Self::Memory32 | Self::Prefetchable32 | Self::Rom => 0x1000..=1 << 31,
            Self::Memory64 | Self::Prefetchable64 => 0x1000..=1 << 51,
        }
    }
}

/// A base address register as its device asks for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarSpec {
    /// Which register.
    pub index: BarIndex,
    /// The kind.
    pub kind: BarKind,
    /// The size in bytes. It is rounded up to a power of two, and memory to at least a page.
    pub size: u64,
}

/// Why a device cannot have the registers that it asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BarError {
    /// The size is 0, or larger than any window could be.
    #[error("{index} of {size:#x} bytes is not possible")]
    Size {
        /// Which register.
        index: BarIndex,
        /// Its size.
        size: u64,
    },
    /// The register is taken already, or a 64-bit BAR has no second register.
    #[error("{0} needs a register that is not there, or is taken")]
    Overlap(BarIndex),
    /// The ROM's register must be of kind ROM, and no other register may be.
    #[error("{0} cannot be of that kind")]
    Kind(BarIndex),
}

/// A range of addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Window {
    /// Its first address.
    pub base: u64,
    /// Its length in bytes; 0 for no window.
    pub size: u64,
}

impl Window {
    fn holds(self, base: u64, size: u64) -> bool {
        let Some(offset) = base.checked_sub(self.base) else { return false };
        offset <= self.size && size <= self.size - offset
    }
}

/// The addresses that the bridge passes on to its bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Windows {
    /// Memory below 4 GiB.
    pub memory32: Window,
    /// Memory above 4 GiB.
    pub memory64: Window,
    /// I/O ports.
    pub io: Window,
}

impl Windows {
    fn hold(&self, space: Space, base: u64, size: u64) -> bool {
        match space {
            Space::Memory => self.memory32.holds(base, size) || self.memory64.holds(base, size),
            Space::Io => self.io.holds(base, size),
        }
    }
}

/// 64-bit BARs up to this size are placed below 4 GiB at power-on, where every guest can reach them.
const SMALL: u64 = 1 << 20;

/// The part of the windows that is not assigned yet.
#[derive(Debug, Clone, Copy)]
pub struct Room(Windows);

impl Room {
    /// The whole of `windows`.
    #[must_use]
    pub fn new(windows: Windows) -> Self {
        Self(windows)
    }

    /// Takes an address for `size` bytes, a power of two, aligned to `size`.
    fn take(&mut self, kind: BarKind, size: u64) -> Option<u64> {
        let Windows { memory32, memory64, io } = &mut self.0;
        match kind {
            BarKind::Io => take(io, size),
            kind if !kind.is_wide() => take(memory32, size),
            _ if size <= SMALL => take(memory32, size).or_else(|| take(memory64, size)),
            _ => take(memory64, size).or_else(|| take(memory32, size)),
        }
    }
}

fn take(window: &mut Window, size: u64) -> Option<u64> {
    let end = window.base.checked_add(window.size)?;
    let base = window.base.checked_next_multiple_of(size)?;
    let next = base.checked_add(size).filter(|next| *next <= end)?;
    *window = Window { base: next, size: end - next };
    Some(base)
}

/// A BAR that is decoded, and its addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Decoded {
    /// The register.
    pub bar: BarIndex,
    /// The address space.
    pub space: Space,
    /// Its first address.
    pub base: u64,
    /// Its length in bytes.
    pub size: u64,
}

/// The command register: what a function may decode and do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Command(pub u16);

impl Command {
    /// Decode I/O BARs.
    pub const IO: u16 = 1;
    /// Decode memory BARs.
    pub const MEMORY: u16 = 2;
    /// The function may access memory and send message interrupts.
    pub const MASTER: u16 = 4;
    /// The function must not raise INTx.
    pub const INTX_DISABLE: u16 = 1 << 10;

    /// Whether any of `bits` is set.
    #[must_use]
    pub fn has(self, bits: u16) -> bool {
        self.0 & bits != 0
    }
}

#[derive(Debug, Clone, Copy)]
struct Bar {
    kind: BarKind,
    /// A power of two.
    size: u64,
    /// The address bits as the guest wrote them.
    base: u64,
    /// Bit 0 of the ROM's register.
    enabled: bool,
}

/// The registers of one function, with their present values.
#[derive(Debug, Clone)]
pub struct Bars {
    windows: Windows,
    bars: [Option<Bar>; 7],
}

impl Bars {
    /// No registers at all.
    #[must_use]
    pub fn none(windows: Windows) -> Self {
        Self { windows, bars: [None; 7] }
    }

    /// Registers at address 0, where nothing is decoded.
    ///
    /// # Errors
    /// When two of them want the same register, or one is of a size or kind that cannot be.
    pub fn new(specs: &[BarSpec], windows: Windows) -> Result<Self, BarError> {
        let mut bars = Self::none(windows);
        for &BarSpec { index, kind, size } in specs {
            if (index == BarIndex::ROM) != (kind == BarKind::Rom) {
                return Err(BarError::Kind(index));
            }
            let limits = kind.limits();
            let rounded = size.max(*limits.start()).checked_next_power_of_two();
            let rounded = rounded.filter(|rounded| size > 0 && limits.contains(rounded));
            let size = rounded.ok_or(BarError::Size { index, size })?;
            let taken = bars.of_register(index.get()).is_some();
            let second = kind.is_wide()
                && (index.get() >= 5 || bars.bars.get(index.at() + 1).is_some_and(Option::is_some));
            let place = bars.bars.get_mut(index.at()).filter(|_| !taken && !second);
            *place.ok_or(BarError::Overlap(index))? = Some(Bar { kind, size, base: 0, enabled: false });
        }
        Ok(bars)
    }

    /// Assigns an address to each register, the largest BAR first. A BAR that finds no room stays at 0, for
    /// the guest to place.
    pub fn assign(&mut self, room: &mut Room) {
        let mut bars: Vec<&mut Bar> = self.bars.iter_mut().flatten().collect();
        bars.sort_by_key(|bar| std::cmp::Reverse(bar.size));
        for bar in bars {
            bar.base = room.take(bar.kind, bar.size).unwrap_or(0);
        }
    }

    /// Whether the function has this BAR and the BAR has an address.
    #[must_use]
    pub fn is_placed(&self, index: BarIndex) -> bool {
        self.bars.get(index.at()).copied().flatten().is_some_and(|bar| bar.base != 0)
    }

    /// The size of a BAR, a power of two; `None` if the function does not have the BAR.
    #[must_use]
    pub fn size(&self, index: BarIndex) -> Option<u64> {
        self.bars.get(index.at())?.map(|bar| bar.size)
    }

    /// The BAR that register `number` is a part of, and the bit of the BAR's value at which the register
    /// begins.
    fn of_register(&self, number: u8) -> Option<(usize, u32)> {
        let number = usize::from(number);
        let has = |number: usize| self.bars.get(number).copied().flatten();
        if has(number).is_some() {
            return Some((number, 0));
        }
        let before = number.checked_sub(1)?;
        has(before).filter(|bar| bar.kind.is_wide()).map(|_| (before, 32))
    }

    /// The value that register `number` reads (0 to 5; 6 is the ROM's).
    #[must_use]
    pub fn read(&self, number: u8) -> u32 {
        let Some((index, shift)) = self.of_register(number) else { return 0 };
        let Some(bar) = self.bars.get(index).copied().flatten() else { return 0 };
        let value = bar.base | bar.kind.flags() | u64::from(bar.enabled);
        u32::try_from(value >> shift & 0xffff_ffff).unwrap_or(0)
    }

    /// The guest writes all of register `number`.
    pub fn write(&mut self, number: u8, value: u32) {
        let Some((index, shift)) = self.of_register(number) else { return };
        let Some(bar) = self.bars.get_mut(index).and_then(Option::as_mut) else { return };
        let kept = bar.base & !(0xffff_ffff << shift);
        bar.base = (kept | u64::from(value) << shift) & !(bar.size - 1);
        if bar.kind == BarKind::Rom {
            // Bits 1 to 10 are reserved, and a size is no smaller than a page.
            bar.enabled = value & 1 != 0;
        }
    }

    /// The BARs that are decoded with this command register, in the order of the registers.
    #[must_use]
    pub fn decoded(&self, command: Command) -> Vec<Decoded> {
        let place = |(index, bar): (&BarIndex, &Option<Bar>)| {
            let bar = bar.as_ref()?;
            let space = bar.kind.space();
            let on = command.has(if space == Space::Io { Command::IO } else { Command::MEMORY });
            let on = on && (bar.kind != BarKind::Rom || bar.enabled);
            let decoded = Decoded { bar: *index, space, base: bar.base, size: bar.size };
            (on && self.windows.hold(space, bar.base, bar.size)).then_some(decoded)
        };
        BarIndex::ALL.iter().zip(&self.bars).filter_map(place).collect()
    }
}

#[cfg(test)]
#[path = "bar_tests.rs"]
mod tests;
