//! The BARs of a server's function: kind by the low bits of its BAR registers, size by its regions. Region
//! size, not what BAR probing would give, is the truth. Pure.

use super::chain::u32_at;
use crate::pci::{BarIndex, BarKind, BarSpec, Space};

/// The largest BAR that a guest is offered: a TiB.
pub const LARGEST: u64 = 1 << 40;

/// The largest in the first 4 GiB.
const LARGEST_32: u64 = 1 << 31;

/// The largest of I/O ports. PCI has none above 256; libvfio-user takes every region for one that is not said to be
/// memory, and its samples are larger.
const LARGEST_IO: u64 = 1 << 14;

/// The smallest of memory: a page, so that no two BARs share one.
const LEAST: u64 = 1 << 12;

/// One BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarShape {
    /// Its first register, and its region.
    pub index: BarIndex,
    /// What it decodes.
    pub kind: BarKind,
    /// Bytes that it decodes: a power of two.
    pub size: u64,
    /// Bytes of the region behind it; the rest reads all ones.
    pub region: u64,
}

impl BarShape {
    /// The register that the guest sees.
    #[must_use]
    pub fn spec(&self) -> BarSpec {
        BarSpec { index: self.index, kind: self.kind, size: self.size }
    }
}

/// Why a function's BARs cannot be shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BarError {
    /// Its upper half has no register.
    #[error("BAR 5 is a 64-bit one, which takes two registers")]
    NoUpperHalf,
    /// It is larger than it may be.
    #[error("{index} has {size:#x} bytes, more than the {most:#x} that it may have")]
    TooLarge {
        /// Which one.
        index: BarIndex,
        /// Its region's size.
        size: u64,
        /// The limit for its kind.
        most: u64,
    },
}

/// Looks at the BARs of a function with these configuration bytes and region sizes.
///
/// # Errors
/// When one cannot be shown to a guest.
pub fn judge(config: &[u8], regions: &[u64; 6]) -> Result<[Option<BarShape>; 6], BarError> {
    let mut bars = [None; 6];
    let mut upper_half = false;
    for ((index, bar), region) in BarIndex::ALL.into_iter().zip(&mut bars).zip(regions) {
        // What a server says of the upper half of a BAR means nothing.
        if std::mem::take(&mut upper_half) || *region == 0 {
            continue;
        }
        let register = u32_at(config, 0x10 + u16::from(index.get()) * 4).unwrap_or(0);
        // Of the reserved types, the one below 1 MiB was for memory that 32 bits reach.
        let kind = BarKind::from_register(register).unwrap_or(BarKind::Memory32);
        upper_half = kind.is_wide();
        if upper_half && index.get() == 5 {
            return Err(BarError::NoUpperHalf);
        }
        let (least, most) = match kind.space() {
            Space::Io => (4, LARGEST_IO),
            Space::Memory if kind.is_wide() => (LEAST, LARGEST),
            Space::Memory => (LEAST, LARGEST_32),
        };
        if *region > most {
            return Err(BarError::TooLarge { index, size: *region, most });
        }
        let size = region.next_power_of_two().max(least);
        *bar = Some(BarShape { index, kind, size, region: *region });
    }
    Ok(bars)
}
