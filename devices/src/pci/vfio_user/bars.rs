//! The BARs of a server's function, and which parts of them are mapped into the guest. The low bits of a BAR
//! register tell the kind of the BAR. The size is the region's, and not what probing the BAR would give. Pure
//! functions. Must never trust a value: the server may have said anything.

use std::ops::Range;

use super::capabilities::u32_at;
use super::function::{InBar, MsixShape};
use crate::pci::bar::BarError;
use crate::pci::config_space::offset;
use crate::pci::{BarIndex, BarKind, BarSpec, Bars, Space, Windows};

/// The largest BAR that a guest is offered: 1 TiB.
pub const LARGEST: u64 = 1 << 40;

/// The granularity of mappings in bytes.
pub const PAGE: u64 = 4096;

/// The most pieces of one BAR that are mapped, because memory slots are few.
pub const MOST: usize = 64;

/// The largest size in bytes to which a BAR is grown so that it holds the MSI-X table or pending bits.
const MOST_GROWN: u64 = 1 << 20;

/// One BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarShape {
    /// Its first register, and its region.
    pub index: BarIndex,
    /// What it decodes.
    pub kind: BarKind,
    /// Its size in bytes: a power of two.
    pub size: u64,
    /// The size in bytes of the region behind it. Offsets beyond the region read all ones.
    pub region: u64,
}

impl BarShape {
    /// The BAR as the guest sees it.
    #[must_use]
    pub fn spec(&self) -> BarSpec {
        BarSpec { index: self.index, kind: self.kind, size: self.size }
    }
}

/// Judges the BARs of a function with these configuration bytes and region sizes.
///
/// # Errors
/// When one cannot be shown to a guest.
pub fn judge(config: &[u8], regions: &[u64; 6]) -> Result<[Option<BarShape>; 6], BarError> {
    let mut bars = [None; 6];
    let mut upper_half = false;
    for ((index, bar), region) in BarIndex::ALL.into_iter().zip(&mut bars).zip(regions) {
        // The upper half of a 64-bit BAR has no region of its own, whatever the server says.
        if std::mem::take(&mut upper_half) || *region == 0 {
            continue;
        }
        let register = u32_at(config, 0x10 + u16::from(index.get()) * 4).unwrap_or(0);
        // Among the reserved types is "below 1 MiB", which older versions of PCI had; 32-bit memory serves
        // all of them.
        let kind = BarKind::from_register(register).unwrap_or(BarKind::Memory32);
        upper_half = kind.is_wide();
        let spec = BarSpec { index, kind, size: *region };
        let size = Bars::new(&[spec], Windows::default())?.size(index);
        let size = size.filter(|size| *size <= LARGEST).ok_or(BarError::Size { index, size: *region })?;
        *bar = Some(BarShape { index, kind, size, region: *region });
    }
    Ok(bars)
}

/// Makes sure that `place` is inside a memory BAR, as PCI requires for MSI-X. A BAR that is of I/O ports, too
/// small or absent becomes a memory BAR that holds `place`. Returns false when that is not possible.
pub(super) fn make_memory(bars: &mut [Option<BarShape>; 6], place: &InBar) -> bool {
    let index = usize::from(place.bar.get());
    let before = index.checked_sub(1).and_then(|before| bars.get(before).copied().flatten());
    let is_upper_half = before.is_some_and(|bar| bar.kind.is_wide());
    let Some(bar) = bars.get_mut(index).filter(|_| !is_upper_half) else { return false };
    let none = BarShape { index: place.bar, kind: BarKind::Memory32, size: PAGE, region: 0 };
    let mut new = bar.unwrap_or(none);
    if new.kind.space() == Space::Io {
        new = BarShape { kind: BarKind::Memory32, size: new.size.max(PAGE), ..new };
    }
    if place.end() > new.size {
        if place.end() > MOST_GROWN {
            return false;
        }
        new.size = place.end().next_power_of_two();
    }
    *bar = Some(new);
    true
}

/// The whole pages of `bar` that lie inside `areas` (offset and size in the region), in order and without
/// overlaps. Pages of the MSI-X table and of the pending bits are left out.
#[must_use]
pub fn mappable(bar: &BarShape, areas: &[(u64, u64)], msix: Option<&MsixShape>) -> Vec<Range<u64>> {
    if bar.kind.space() == Space::Io {
        return Vec::new();
    }
    let mut pieces: Vec<Range<u64>> = Vec::new();
    for (offset, size) in areas {
        let end = offset.saturating_add(*size).min(bar.region);
        let Some(start) = offset.checked_next_multiple_of(PAGE) else { continue };
        let end = end - end % PAGE;
        if start < end {
            pieces.push(start..end);
        }
    }
    pieces.sort_unstable_by_key(|piece| piece.start);
    let mut merged: Vec<Range<u64>> = Vec::new();
    for piece in pieces {
        match merged.last_mut() {
            Some(last) if piece.start <= last.end => last.end = last.end.max(piece.end),
            _ => merged.push(piece),
        }
    }
    let ours = msix.into_iter().flat_map(|msix| [msix.table, msix.pba]);
    for InBar { bar: _, offset, size } in ours.filter(|place| place.bar == bar.index) {
        let start = offset - offset % PAGE;
        let end = offset.saturating_add(size).checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
        let cut = |piece: Range<u64>| {
            let before = piece.start..piece.end.min(start);
            let after = piece.start.max(end)..piece.end;
            [before, after].into_iter().filter(|piece| !piece.is_empty())
        };
        merged = merged.into_iter().flat_map(cut).collect();
    }
    merged.truncate(MOST);
    merged
}

/// The number of the BAR whose register is the dword at `at`; `None` for other dwords.
pub(super) fn bar_number(at: u16) -> Option<u8> {
    let number = u8::try_from(at.checked_sub(offset::BARS)? / 4).ok()?;
    (number < 6).then_some(number)
}

#[cfg(test)]
// The lists hold ranges on purpose, and not the numbers in the ranges.
#[allow(clippy::single_range_in_vec_init, clippy::type_complexity)]
mod tests {
    use super::*;
    use crate::pci::{BarIndex, BarKind};

    fn bar(kind: BarKind, region: u64) -> BarShape {
        let size = region.next_power_of_two();
        BarShape { index: BarIndex::ALL[2], kind, size, region }
    }

    #[test]
    fn areas_are_clipped_to_pages_and_to_the_region() {
        let memory = bar(BarKind::Memory64, 0x5800);
        let table: [(&[(u64, u64)], &[Range<u64>]); 9] = [
            (&[(0, 0x5800)], &[0..0x5000]),
            (&[(0x1000, 0x1000)], &[0x1000..0x2000]),
            (&[(0x1001, 0x1fff)], &[0x2000..0x3000]),
            (&[(0x1001, 0x1000), (0x3000, 0)], &[]),
            (&[(0x4000, u64::MAX)], &[0x4000..0x5000]),
            (&[(u64::MAX, 1), (u64::MAX - 4095, 4096), (1 << 63, 1 << 63)], &[]),
            (&[(0x3000, 0x1000), (0x1000, 0x1000)], &[0x1000..0x2000, 0x3000..0x4000]),
            (&[(0x1000, 0x3000), (0x2000, 0x1000), (0x3000, 0x2000)], &[0x1000..0x5000]),
            (&[(0x800, 0x800)], &[]),
        ];
        for (areas, expected) in table {
            assert_eq!(mappable(&memory, areas, None), expected, "{areas:x?}");
        }
    }

    #[test]
    fn ports_and_pieces_of_pages_are_never_mapped() {
        assert!(mappable(&bar(BarKind::Io, 0x100), &[(0, 0x1000)], None).is_empty());
        assert!(mappable(&bar(BarKind::Memory32, 8), &[(0, 0x1000)], None).is_empty());
        assert_eq!(mappable(&bar(BarKind::Memory32, 0x3000), &[(0, 0x3000)], None), [0..0x3000]);
    }

    #[test]
    fn the_msix_pages_are_left_out_and_ten_thousand_areas_bounded() {
        let memory = bar(BarKind::Memory32, 0x10_0000);
        let table = InBar { bar: BarIndex::ALL[2], offset: 0x2ff0, size: 32 };
        let pba = InBar { bar: BarIndex::ALL[2], offset: 0x8000, size: 8 };
        let msix = MsixShape { at: 0x40, vectors: 2, table, pba };
        let all = [(0, 0x10_0000)];
        let expected = [0..0x2000, 0x4000..0x8000, 0x9000..0x10_0000];
        assert_eq!(mappable(&memory, &all, Some(&msix)), expected);
        let elsewhere = MsixShape {
            table: InBar { bar: BarIndex::ALL[0], ..table },
            pba: InBar { bar: BarIndex::ALL[4], ..pba },
            ..msix
        };
        assert_eq!(mappable(&memory, &all, Some(&elsewhere)), [0..0x10_0000]);
        let many: Vec<_> = (0..10_000).map(|n| (n * 0x2000, 0x1000)).collect();
        assert_eq!(mappable(&memory, &many, None).len(), MOST);
    }
}
