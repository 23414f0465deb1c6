//! Guest-physical addresses for the shared memory of devices. The windows lie above RAM and are taken from
//! the top down, so that anything that grows upwards from the end of RAM has room.

use std::ops::Range;

/// No window lies above this address. Linux maps a device's shared memory into its direct map, which by
/// default ends 10 TiB above RAM.
const TOP: u64 = 4 << 40;
/// The alignment of large windows, which is the size of a large page.
const LARGE: u64 = 1 << 30;
/// The alignment of other windows. Linux requires it of memory that it adds.
const SMALL: u64 = 2 << 20;

/// The addresses that no window has taken yet.
#[derive(Debug)]
pub(crate) struct Windows {
    floor: u64,
    end: u64,
}

impl Windows {
    /// The addresses above `ram_end` that a processor with `address_bits` can reach, with two exceptions. The
    /// uppermost quarter is left out, because some processors have holes there. If `pci`, the addresses of
    /// the PCI bus, starts below that quarter, everything below the end of `pci` is left out.
    pub(crate) fn above(ram_end: u64, address_bits: u8, pci: Option<Range<u64>>) -> Self {
        let space = 1_u64.checked_shl(address_bits.into()).unwrap_or(TOP).min(TOP);
        let end = space / 4 * 3;
        let floor = pci.filter(|pci| pci.start < end).map_or(ram_end, |pci| pci.end.max(ram_end));
        Windows { floor, end }
    }

    /// Takes `size` bytes. `None` when no such range is free.
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
