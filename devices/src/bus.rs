//! Address ranges (port I/O or MMIO) and the devices behind them, with an exit counter for each range. A bus
//! is built once and then shared, so the vCPUs take no lock. Must never call a device that does not claim the
//! whole access.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// A device on a bus. Called on vCPU threads, several at once: the device brings its own lock. The bus holds
/// no lock during the call.
pub trait BusDevice: Send + Sync {
    /// Fills all of `data`, little-endian, from `offset` in the device's range.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Takes `data`, little-endian, at `offset` in the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Whether a device answered an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// A device answered.
    Device,
    /// No range holds the whole access: a read gives all ones, a write is dropped.
    Nobody,
}

/// Why a range cannot be inserted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InsertError {
    /// The length is zero or the end wraps.
    #[error("the range {start:#x}+{length:#x} of {name} is empty or wraps")]
    Range {
        /// The new range's name.
        name: String,
        /// Its first address.
        start: u64,
        /// Its length in bytes.
        length: u64,
    },
    /// Another range overlaps the new one.
    #[error("the range {start:#x}+{length:#x} of {name} overlaps that of {other}")]
    Overlap {
        /// The new range's name.
        name: String,
        /// Its first address.
        start: u64,
        /// Its length in bytes.
        length: u64,
        /// The name of the existing range.
        other: String,
    },
}

/// How many accesses of one range came to userspace.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RangeCounters {
    /// The range's name.
    pub name: String,
    /// Its first address.
    pub start: u64,
    /// Its length in bytes.
    pub length: u64,
    /// Reads that came to userspace.
    pub reads: u64,
    /// Writes that came to userspace.
    pub writes: u64,
}

/// The counters of a bus.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BusCounters {
    /// One entry for each range, in address order.
    pub ranges: Vec<RangeCounters>,
    /// Reads that no device claimed.
    pub unclaimed_reads: u64,
    /// Writes that no device claimed.
    pub unclaimed_writes: u64,
}

#[derive(Default)]
struct Count {
    reads: AtomicU64,
    writes: AtomicU64,
}

struct Entry {
    start: u64,
    /// The last address, inclusive, so that a range may end at the top of the address space.
    last: u64,
    name: String,
    device: Arc<dyn BusDevice>,
    count: Count,
}

/// The ranges of one address space. Filled through `&mut`, then shared behind an `Arc`.
#[derive(Default)]
pub struct Bus {
    /// In address order, without overlaps.
    entries: Vec<Entry>,
    unclaimed: Count,
    read_logged: AtomicBool,
    write_logged: AtomicBool,
}

impl std::fmt::Debug for Bus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.entries.iter().map(|e| (e.start, &e.name))).finish()
    }
}

impl Bus {
    /// An empty bus.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at the `length` bytes from `start`.
    ///
    /// # Errors
    /// When the range is empty, wraps, or overlaps one that is there.
    pub fn insert(
        &mut self,
        start: u64,
        length: u64,
        name: impl Into<String>,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), InsertError> {
        let name = name.into();
        let Some(last) = length.checked_sub(1).and_then(|more| start.checked_add(more)) else {
            return Err(InsertError::Range { name, start, length });
        };
        if let Some(other) = self.entries.iter().find(|e| start <= e.last && e.start <= last) {
            return Err(InsertError::Overlap { name, start, length, other: other.name.clone() });
        }
        let at = self.entries.partition_point(|e| e.start < start);
        self.entries.insert(at, Entry { start, last, name, device, count: Count::default() });
        Ok(())
    }

    /// The entry that holds all of `length` bytes from `address`, and the offset in it.
    fn find(&self, address: u64, length: usize) -> Option<(&Entry, u64)> {
        let after = self.entries.partition_point(|e| e.start <= address);
        let entry = self.entries.get(after.checked_sub(1)?)?;
        let more = u64::try_from(length).ok()?.saturating_sub(1);
        let last = address.checked_add(more)?;
        (last <= entry.last).then_some((entry, address.checked_sub(entry.start)?))
    }

    /// A read by the guest. An address that no device claims reads all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) -> Claim {
        if let Some((entry, offset)) = self.find(address, data.len()) {
            entry.count.reads.fetch_add(1, Ordering::Relaxed);
            entry.device.read(offset, data);
            return Claim::Device;
        }
        data.fill(0xff);
        self.unclaimed.reads.fetch_add(1, Ordering::Relaxed);
        if !self.read_logged.swap(true, Ordering::Relaxed) {
            log::info!("no device at {address:#x}: this and later such reads give all ones");
        }
        Claim::Nobody
    }

    /// A write by the guest. A write that no device claims is dropped.
    pub fn write(&self, address: u64, data: &[u8]) -> Claim {
        if let Some((entry, offset)) = self.find(address, data.len()) {
            entry.count.writes.fetch_add(1, Ordering::Relaxed);
            entry.device.write(offset, data);
            return Claim::Device;
        }
        self.unclaimed.writes.fetch_add(1, Ordering::Relaxed);
        if !self.write_logged.swap(true, Ordering::Relaxed) {
            log::info!("no device at {address:#x}: this and later such writes are dropped");
        }
        Claim::Nobody
    }

    /// The counters so far.
    #[must_use]
    pub fn counters(&self) -> BusCounters {
        let ranges = self.entries.iter().map(|e| RangeCounters {
            name: e.name.clone(),
            start: e.start,
            length: (e.last - e.start).saturating_add(1),
            reads: e.count.reads.load(Ordering::Relaxed),
            writes: e.count.writes.load(Ordering::Relaxed),
        });
        BusCounters {
            ranges: ranges.collect(),
            unclaimed_reads: self.unclaimed.reads.load(Ordering::Relaxed),
            unclaimed_writes: self.unclaimed.writes.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lock;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Echo(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Echo {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }
        fn write(&self, offset: u64, data: &[u8]) {
            lock(&self.0).push((offset, data.to_vec()));
        }
    }

    fn bus_with(ranges: &[(u64, u64)]) -> Bus {
        let mut bus = Bus::new();
        for (start, length) in ranges {
            bus.insert(*start, *length, format!("dev{start:x}"), Arc::new(Echo::default())).unwrap();
        }
        bus
    }

    #[test]
    fn access_inside_a_range_reaches_its_device_with_the_offset() {
        let bus = bus_with(&[(0x200, 0x10), (0x100, 0x10)]);
        let mut data = [0; 4];
        assert_eq!(bus.read(0x10c, &mut data), Claim::Device);
        assert_eq!(data, [0xc; 4]);
        assert_eq!(bus.write(0x200, &[1]), Claim::Device);
        let counters = bus.counters();
        assert_eq!((counters.ranges[0].start, counters.ranges[0].reads), (0x100, 1));
        assert_eq!((counters.ranges[1].start, counters.ranges[1].writes), (0x200, 1));
    }

    #[test]
    fn access_outside_or_across_a_border_reads_all_ones_and_is_counted() {
        let bus = bus_with(&[(0x100, 0x10), (0x110, 0x10)]);
        for address in [0xff, 0x10d, 0x120, u64::MAX] {
            let mut data = [0; 4];
            assert_eq!(bus.read(address, &mut data), Claim::Nobody, "{address:#x}");
            assert_eq!(data, [0xff; 4]);
        }
        assert_eq!(bus.write(0x11f, &[0, 0]), Claim::Nobody);
        assert_eq!((bus.counters().unclaimed_reads, bus.counters().unclaimed_writes), (4, 1));
    }

    #[test]
    fn overlapping_empty_and_wrapping_ranges_are_refused() {
        let mut bus = bus_with(&[(0x100, 0x10)]);
        let echo = || Arc::new(Echo::default());
        for (start, length) in [(0x100, 1), (0xf0, 0x11), (0x10f, 1), (0, u64::MAX)] {
            assert!(matches!(bus.insert(start, length, "new", echo()), Err(InsertError::Overlap { .. })));
        }
        for (start, length) in [(0x500, 0), (u64::MAX, 2)] {
            assert!(matches!(bus.insert(start, length, "new", echo()), Err(InsertError::Range { .. })));
        }
        bus.insert(u64::MAX, 1, "top", echo()).unwrap();
        assert_eq!(bus.write(u64::MAX, &[0]), Claim::Device);
    }
}
