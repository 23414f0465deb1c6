//! Virtio 1.2 §2.7: a split queue that the VMM serves in place of the backend. It is not on the path of any
//! data request. Must never trust the contents of guest memory, nor run on a vCPU.

use std::io;
use std::sync::atomic::{Ordering, fence};

use transport::memory::GuestAddr;

use crate::virtio::ring::address::Space;
use crate::virtio::ring::queue::QueueState;
use crate::virtio::ring::split::{ENTRIES, Part};

/// The most bytes of a request.
const REQUEST_MAX: usize = 4096;
/// The most entries of an indirect table, and of a chain.
const CHAIN_MAX: usize = 256;
/// Bytes of a descriptor.
const DESCRIPTOR: u64 = 16;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// The progress of a served queue.
#[derive(Debug, Default)]
pub(crate) struct ControlQueue {
    /// Both the next available index and the used index, as one request at a time is taken and answered.
    next: u16,
}

/// A request of the driver.
#[derive(Debug)]
pub(crate) struct Chain {
    head: u16,
    /// The bytes that the driver wrote, in order, cut at the most bytes of a request.
    pub(crate) request: Vec<u8>,
    /// The buffers for the answer, in order.
    answer: Vec<(GuestAddr, u32)>,
}

impl Chain {
    /// The most bytes of the answer.
    pub(crate) fn room(&self) -> u64 {
        self.answer.iter().fold(0, |sum, (_, length)| sum.saturating_add(u64::from(*length)))
    }
}

/// A queue of a device whose queues run.
#[derive(Clone, Copy)]
pub(crate) struct Rings<'a> {
    pub(crate) state: &'a QueueState,
    pub(crate) space: Space<'a>,
    /// Whether the driver took EVENT_IDX.
    pub(crate) tells_events: bool,
}

#[derive(Clone, Copy)]
struct Descriptor {
    at: GuestAddr,
    length: u32,
    flags: u16,
    next: u16,
}

fn bad(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl<'a> Rings<'a> {
    fn part(&self, at: GuestAddr, length: u64) -> io::Result<Part<'a>> {
        let base = self.space.guest(at, length);
        let base = base.ok_or_else(|| bad("a part of a request lies outside guest memory"))?;
        Ok(Part { memory: self.space.memory, base })
    }

    fn size(&self) -> u64 {
        self.state.size.into()
    }

    fn available(&self) -> io::Result<Part<'a>> {
        self.part(self.state.driver, ENTRIES + 2 * self.size())
    }

    fn used(&self) -> io::Result<Part<'a>> {
        self.part(self.state.device, ENTRIES + 8 * self.size() + 2)
    }

    fn slot(&self, index: u16) -> u64 {
        u64::from(index.checked_rem(self.state.size).unwrap_or(0))
    }

    fn descriptor(&self, table: GuestAddr, index: u16) -> io::Result<Descriptor> {
        let offset = DESCRIPTOR * u64::from(index);
        let at = table.checked_add(offset).ok_or_else(|| bad("a descriptor table wraps"))?;
        let mut bytes = [0; 16];
        self.part(at, DESCRIPTOR)?.load(0, &mut bytes)?;
        let [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p] = bytes;
        Ok(Descriptor {
            at: GuestAddr(u64::from_le_bytes([a, b, c, d, e, f, g, h])),
            length: u32::from_le_bytes([i, j, k, l]),
            flags: u16::from_le_bytes([m, n]),
            next: u16::from_le_bytes([o, p]),
        })
    }

    /// The buffers of a chain. An indirect table is followed.
    fn chain(&self, head: u16) -> io::Result<Vec<Descriptor>> {
        let (mut table, mut entries) = (self.state.desc, self.state.size);
        let (mut index, mut chain) = (head, Vec::new());
        // The address does not tell an indirect table: an indirect table may lie at the address of the
        // descriptor table.
        let mut inside = false;
        loop {
            if index >= entries || chain.len() >= CHAIN_MAX {
                return Err(bad("a chain of descriptors leaves its table, or has no end"));
            }
            let descriptor = self.descriptor(table, index)?;
            if descriptor.flags & INDIRECT != 0 {
                let count = u64::from(descriptor.length).checked_div(DESCRIPTOR).unwrap_or(0);
                let whole = u64::from(descriptor.length).is_multiple_of(DESCRIPTOR);
                let alone = !inside && chain.is_empty() && descriptor.flags & NEXT == 0;
                let count = u16::try_from(count).ok().filter(|count| usize::from(*count) <= CHAIN_MAX);
                match count.filter(|count| *count > 0 && whole && alone) {
                    Some(count) => (table, entries, index, inside) = (descriptor.at, count, 0, true),
                    None => return Err(bad("an indirect table is not one")),
                }
                continue;
            }
            chain.push(descriptor);
            if descriptor.flags & NEXT == 0 {
                return Ok(chain);
            }
            index = descriptor.next;
        }
    }
}

impl ControlQueue {
    /// The driver set the queue up anew.
    pub(crate) fn reset(&mut self) {
        self.next = 0;
    }

    /// Whether there is a request. With EVENT_IDX, asks the driver for a kick at the next one.
    ///
    /// # Errors
    /// When the ring is not valid.
    pub(crate) fn has_more(&self, rings: Rings<'_>) -> io::Result<bool> {
        if rings.tells_events {
            // The driver will kick for the next request. A request that was made available before the driver
            // could see this is found below.
            rings.used()?.store(ENTRIES + 8 * rings.size(), &self.next.to_le_bytes())?;
        }
        fence(Ordering::SeqCst);
        Ok(self.pending(rings)? > 0)
    }

    fn pending(&self, rings: Rings<'_>) -> io::Result<u16> {
        let pending = rings.available()?.index()?.wrapping_sub(self.next);
        if pending > rings.state.size { Err(bad("more requests than the queue holds")) } else { Ok(pending) }
    }

    /// Takes the next request. It has to be answered before the next call.
    ///
    /// # Errors
    /// When the ring is not valid.
    pub(crate) fn take(&self, rings: Rings<'_>) -> io::Result<Option<Chain>> {
        if self.pending(rings)? == 0 {
            return Ok(None);
        }
        let mut head = [0; 2];
        rings.available()?.load(ENTRIES + 2 * rings.slot(self.next), &mut head)?;
        let head = u16::from_le_bytes(head);
        let (mut request, mut answer) = (Vec::new(), Vec::new());
        for Descriptor { at, length, flags, .. } in rings.chain(head)? {
            if flags & WRITE != 0 {
                answer.push((at, length));
                continue;
            }
            let have = request.len();
            let length = usize::try_from(length).unwrap_or(usize::MAX).min(REQUEST_MAX.saturating_sub(have));
            request.resize(have.saturating_add(length), 0);
            let place = request.get_mut(have..).unwrap_or_default();
            rings.part(at, u64::try_from(length).unwrap_or(u64::MAX))?.load(0, place)?;
        }
        Ok(Some(Chain { head, request, answer }))
    }

    /// Answers a request. The part of the answer for which there is no room is left out. The caller still has
    /// to interrupt the guest.
    ///
    /// # Errors
    /// When the answer cannot be written where the driver wants it.
    pub(crate) fn answer(&mut self, rings: Rings<'_>, chain: &Chain, answer: &[u8]) -> io::Result<()> {
        let (mut rest, mut written) = (answer, 0_u32);
        for (at, length) in &chain.answer {
            let length = usize::try_from(*length).unwrap_or(usize::MAX).min(rest.len());
            let (now, later) = rest.split_at_checked(length).unwrap_or((rest, &[]));
            rings.part(*at, u64::try_from(now.len()).unwrap_or(u64::MAX))?.store(0, now)?;
            written = written.saturating_add(u32::try_from(now.len()).unwrap_or(u32::MAX));
            rest = later;
        }
        let used = rings.used()?;
        let entry = [u32::from(chain.head).to_le_bytes(), written.to_le_bytes()].concat();
        used.store(ENTRIES + 8 * rings.slot(self.next), &entry)?;
        self.next = self.next.wrapping_add(1);
        // The entry must be visible before the index that covers it.
        fence(Ordering::SeqCst);
        used.store_index(self.next)
    }
}

#[cfg(test)]
#[path = "queue_tests.rs"]
mod tests;
