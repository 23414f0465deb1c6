//! Where in guest-physical space devices' shared memory lies: above RAM, from the top down, so that whatever
//! else grows from the end of RAM has room.

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
    /// where some processors have holes.
    pub(crate) fn above(ram_end: u64, address_bits: u8) -> Self {
        let space = 1_u64.checked_shl(address_bits.into()).unwrap_or(TOP).min(TOP);
        Windows { floor: ram_end, end: space / 4 * 3 }
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
        let mut windows = Windows::above(5 << 30, 36);
        let (a, b) = (windows.take(4096).unwrap(), windows.take(3 << 30).unwrap());
        assert_eq!((a, b), ((48 << 30) - SMALL, (44 << 30)));
        assert_eq!(windows.take(40 << 30), None);
        assert_eq!(windows.take(39 << 30), Some(5 << 30));
        assert_eq!(windows.take(4096), None);
    }

    #[test]
    fn windows_of_large_processors_stay_where_linux_maps_them() {
        assert!(Windows::above(1 << 30, 57).take(4096).unwrap() < TOP);
        assert_eq!(Windows::above(1 << 30, 255).end, 3 << 40);
        assert_eq!(Windows::above(100, 0).take(4096), None);
    }
}
