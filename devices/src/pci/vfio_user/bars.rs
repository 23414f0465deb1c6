//! The BARs of a server's function: kind by the low bits of its BAR registers, size by its regions. Region
//! size, not what BAR probing would give, is the truth. Pure.

use super::chain::u32_at;

/// A function's BARs, regions 0 to 5.
pub const COUNT: u8 = 6;

/// The largest BAR that a guest is offered: a TiB.
pub const LARGEST: u64 = 1 << 40;

/// The largest in the first 4 GiB.
const LARGEST_32: u64 = 1 << 31;

/// The largest of I/O ports.
const LARGEST_IO: u64 = 1 << 8;

/// What a BAR decodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BarKind {
    /// I/O ports.
    Io,
    /// Memory below 4 GiB.
    Memory32,
    /// Memory anywhere; takes two registers.
    Memory64,
}

/// One BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarShape {
    /// Its first register, and its region.
    pub index: u8,
    /// What it decodes.
    pub kind: BarKind,
    /// Whether reads have no side effects.
    pub prefetchable: bool,
    /// Bytes that it decodes: a power of two.
    pub size: u64,
    /// Bytes of the region behind it; the rest reads all ones.
    pub region: u64,
}

/// Why a function's BARs cannot be shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BarError {
    /// Its upper half has no register.
    #[error("BAR 5 is a 64-bit one, which takes two registers")]
    NoUpperHalf,
    /// It is larger than it may be.
    #[error("BAR {index} has {size:#x} bytes, more than the {most:#x} that it may have")]
    TooLarge {
        /// Which one.
        index: u8,
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
    for ((index, bar), region) in (0..COUNT).zip(&mut bars).zip(regions) {
        // What a server says of the upper half of a BAR means nothing.
        if std::mem::take(&mut upper_half) || *region == 0 {
            continue;
        }
        let register = u32_at(config, 0x10 + u16::from(index) * 4).unwrap_or(0);
        let kind = match (register & 1, register & 6) {
            (1, _) => BarKind::Io,
            (_, 4) => BarKind::Memory64,
            _ => BarKind::Memory32,
        };
        upper_half = kind == BarKind::Memory64;
        if upper_half && index + 1 == COUNT {
            return Err(BarError::NoUpperHalf);
        }
        let (least, most) = match kind {
            BarKind::Io => (4, LARGEST_IO),
            BarKind::Memory32 => (16, LARGEST_32),
            BarKind::Memory64 => (16, LARGEST),
        };
        if *region > most {
            return Err(BarError::TooLarge { index, size: *region, most });
        }
        let size = region.next_power_of_two().max(least);
        let prefetchable = kind != BarKind::Io && register & 8 != 0;
        *bar = Some(BarShape { index, kind, prefetchable, size, region: *region });
    }
    Ok(bars)
}
