//! Where in guest-physical space devices' shared memory lies: above RAM, from the top down, so that whatever
//! else grows from the end of RAM has room.

use std::ops::Range;

/// The highest address that is given away. Linux maps what a device shares into its direct map, which by default
/// ends 10 TiB above RAM.
const TOP: u64 = 4 << 40;
/// Large windows lie on multiples of a large page's size.
const LARGE: u64 = 1 << 30;
/// Others on multiples of this one, as Linux wants of memory that it adds.
const SMALL: u64 = 2 << 20;

/// Addresses that no window has yet.
#[derive(Debug)]
pub(crate) struct Windows {
    floor: u64,
    end: u64,
}

impl Windows {
    /// All that a processor with `address_bits` can address above `ram_end`, but for the uppermost quarter,
    /// where some processors have holes, and what lies below `pci`, the addresses of the PCI bus, if they are
    /// among these.
    pub(crate) fn above(ram_end: u64, address_bits: u8, pci: Option<Range<u64>>) -> Self {
        let space = 1_u64.checked_shl(address_bits.into()).unwrap_or(TOP).min(TOP);
        let end = space / 4 * 3;
        let floor = pci.filter(|pci| pci.start < end).map_or(ram_end, |pci| pci.end.max(ram_end));
        Windows { floor, end }
    }

    /// Takes `size` bytes; `None` when there is no such room.
    pub(crate) fn take(&mut self, size: u64) -> Option<u64> {
        let align = if size >= LARGE { LARGE } else { SMALL };
        let base = self.end.checked_sub(size)? / align * align;
        if base < self.floor {
            return None;
        }
        self.end = base;
        Some(base)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn windows_do_not_overlap_and_stay_above_ram() {
        let mut windows = Windows::above(5 << 30, 36, None);
        let (a, b) = (windows.take(4096).unwrap(), windows.take(3 << 30).unwrap());
        assert_eq!((a, b), ((48 << 30) - SMALL, (44 << 30)));
        assert_eq!(windows.take(40 << 30), None);
        assert_eq!(windows.take(39 << 30), Some(5 << 30));
        assert_eq!(windows.take(4096), None);
    }

    #[test]
    fn windows_keep_clear_of_the_pci_bus() {
        for bits in 33..=57 {
            let ram_end = 5 << 30;
            let Some((base, size)) = arch::layout::pci_memory64(bits, arch::layout::Gpa(ram_end)) else {
                continue;
            };
            let pci = base.0..base.0 + size;
            let mut windows = Windows::above(ram_end, bits, Some(pci.clone()));
            let mut taken = 0;
            while let Some(at) = windows.take(1 << 30) {
                assert!(at >= pci.end || at + (1 << 30) <= pci.start, "{bits} bits, {at:#x}");
                taken += 1;
            }
            assert!(taken > 0, "{bits} bits");
        }
    }

    #[test]
    fn windows_of_large_processors_stay_where_linux_maps_them() {
        assert!(Windows::above(1 << 30, 57, None).take(4096).unwrap() < TOP);
        assert_eq!(Windows::above(1 << 30, 255, None).end, 3 << 40);
        assert_eq!(Windows::above(100, 0, None).take(4096), None);
    }
}
