//! The guest's side of one split ring (virtio 1.2 §2.7), for tests with backends that do real work.

use std::time::Duration;

use transport::memory::GuestAddr;
use transport::vhost_user::{Call, Kick, Ring, RingBase, RingError};

use super::{GuestMemory, eventually};

/// A part of a request.
#[derive(Clone, Copy)]
pub enum Part {
    /// The backend reads these bytes of guest memory.
    Read(u64, u32),
    /// It writes them.
    Write(u64, u32),
}

/// One ring of [`Queue::SIZE`] entries, from a place in guest memory on.
pub struct Queue {
    index: u16,
    at: u64,
    /// Added to every address that the driver tells.
    iova: u64,
    pub kick: Kick,
    pub call: Call,
    error: RingError,
    /// `avail.idx`
    pub offered: u16,
}

impl Queue {
    pub const SIZE: u16 = 64;
    const AVAILABLE: u64 = 0x400;
    const USED: u64 = 0x1000;

    /// The ring with this number, of which all is within two pages from `at` on.
    pub fn new(index: u16, at: u64) -> Self {
        let (kick, call, error) = (Kick::new().unwrap(), Call::new().unwrap(), RingError::new().unwrap());
        Self { index, at, iova: 0, kick, call, error, offered: 0 }
    }

    /// The same for a driver whose addresses are all so much higher.
    pub fn behind(self, iova: u64) -> Self {
        Self { iova, ..self }
    }

    /// Where the used ring is.
    pub fn used_ring(&self) -> u64 {
        self.at + Self::USED
    }

    pub fn ring(&self, base: RingBase) -> Ring<'_> {
        let at = self.iova + self.at;
        Ring {
            index: self.index,
            size: Self::SIZE,
            descriptor: GuestAddr(at),
            available: GuestAddr(at + Self::AVAILABLE),
            used: GuestAddr(at + Self::USED),
            base,
            kick: &self.kick,
            call: &self.call,
            error: Some(&self.error),
        }
    }

    /// A table of descriptors, the first of which has this number, one after the other.
    fn table(&self, first: u16, parts: &[Part]) -> Vec<u8> {
        let descriptor = |(number, part): (u16, &Part)| {
            let (at, length, write) = match *part {
                Part::Read(at, length) => (at, length, 0),
                Part::Write(at, length) => (at, length, 2),
            };
            let more = u16::from(usize::from(number - first) + 1 < parts.len());
            let mut bytes = (self.iova + at).to_le_bytes().to_vec();
            bytes.extend(length.to_le_bytes());
            bytes.extend((write | more).to_le_bytes());
            bytes.extend((number + 1).to_le_bytes());
            bytes
        };
        (first..).zip(parts).flat_map(descriptor).collect()
    }

    /// Makes a request available, with descriptors from `first` on. Nobody is told.
    pub fn offer(&mut self, memory: &GuestMemory, first: u16, parts: &[Part]) {
        memory.write(self.at + 16 * u64::from(first), &self.table(first, parts));
        self.make_available(memory, first);
    }

    /// The same with an indirect table at `table`.
    pub fn offer_indirect(&mut self, memory: &GuestMemory, table: u64, parts: &[Part]) {
        let bytes = self.table(0, parts);
        memory.write(table, &bytes);
        let mut descriptor = (self.iova + table).to_le_bytes().to_vec();
        descriptor.extend(u32::try_from(bytes.len()).unwrap().to_le_bytes());
        descriptor.extend([4, 0, 0, 0]);
        memory.write(self.at, &descriptor);
        self.make_available(memory, 0);
    }

    fn make_available(&mut self, memory: &GuestMemory, head: u16) {
        let ring = self.at + Self::AVAILABLE;
        memory.write(ring + 4 + 2 * u64::from(self.offered % Self::SIZE), &head.to_le_bytes());
        self.offered = self.offered.wrapping_add(1);
        memory.write(ring + 2, &self.offered.to_le_bytes());
    }

    /// `used.idx`
    pub fn used(&self, memory: &GuestMemory) -> u16 {
        memory.read_u16(self.used_ring() + 2)
    }

    /// Tells the backend, and waits until it has used all.
    pub fn kick_and_wait(&self, memory: &GuestMemory) {
        self.kick.ring().unwrap();
        eventually("all is used", Duration::from_secs(20), || self.used(memory) == self.offered);
    }

    /// As after a reset by the driver.
    pub fn reset(&mut self, memory: &GuestMemory) {
        memory.write(self.at + Self::AVAILABLE, &[0; 4]);
        memory.write(self.used_ring(), &[0; 4]);
        self.offered = 0;
    }
}
