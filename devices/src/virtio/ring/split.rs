//! Virtio 1.2 §2.7: the index at which the next backend begins a split ring after the last backend was lost.
//! Reads guest memory. Writes only heads of unfinished requests into entries of the available ring. Must
//! never do so while a backend serves the ring, and must never trust the contents of guest memory.

use std::io;

use transport::memory::{GuestAddr, MemoryMap};
use transport::vhost_user::vring::RingBase;

use crate::virtio::ring::address::Space;
use crate::virtio::ring::in_flight::{Contents, History, Indexes};
use crate::virtio::ring::queue::{QueueState, RingLayout};

/// The source of the requests that the lost backend had in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Notes {
    /// The next backend: it receives the inflight area of the lost one.
    Backend,
    /// The rings alone, as there is no usable inflight area.
    Rings,
}

/// What the front end remembers of a ring that a backend serves or served.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Past {
    /// The index at which the backend began.
    pub(crate) origin: u16,
    /// The ring when the backend was lost.
    pub(crate) cut: Option<Contents>,
    /// The index at which the present backend took over, until that backend has shown whether it continues
    /// there.
    pub(crate) handed_over: Option<u16>,
}

/// What one ring shows about the backend that took over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Unmoved,
    GoesOn,
    BeganAnew,
}

/// Judges a ring that was handed over to a backend at index `base` and is at `now`.
///
/// Since the handover, `now.used - base` buffers were used; `now.available - base` is the most possible
/// (modulo 65536). When a backend wrongly began at 0, its used index itself is at most that number.
pub(crate) fn judge(base: u16, now: Indexes) -> Verdict {
    let most = now.available.wrapping_sub(base);
    if now.used == base {
        Verdict::Unmoved
    } else if now.used.wrapping_sub(base) > most && now.used <= most {
        Verdict::BeganAnew
    } else {
        Verdict::GoesOn
    }
}

/// Why no backend can continue a ring.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ResumeError {
    /// A packed ring does not record how far the device got.
    #[error("queue {0} is a packed ring, which only a reset can start again")]
    Packed(u16),
    /// The indexes contradict each other.
    #[error("the indexes of queue {queue} contradict each other: {available} available, {used} used")]
    Indexes {
        /// The queue.
        queue: u16,
        /// `avail.idx`
        available: u16,
        /// `used.idx`
        used: u16,
    },
    /// The requests in flight are ambiguous. A guess could lose one request and do another twice.
    #[error("the rings of queue {queue} do not tell which {count} requests were in flight")]
    Doubt {
        /// The queue.
        queue: u16,
        /// The number of requests in flight.
        count: u16,
    },
    /// The driver changed the ring during every attempt to read it.
    #[error("queue {0} does not stand still")]
    Restless(u16),
    /// The ring is no longer in guest memory.
    #[error("cannot access queue {queue} in guest memory")]
    Memory {
        /// The queue.
        queue: u16,
        /// Why not.
        source: io::Error,
    },
}

/// The most attempts to read a ring without a change by the driver meanwhile. The driver cannot change it for
/// ever, as its descriptors run out.
const ATTEMPTS: usize = 1000;

/// One part of a ring.
pub(crate) struct Part<'a> {
    pub(crate) memory: &'a MemoryMap,
    pub(crate) base: GuestAddr,
}

/// Offsets of `idx` (`INDEX`) and `ring` (`ENTRIES`), the same in the available and the used ring.
const INDEX: u64 = 2;
pub(crate) const ENTRIES: u64 = 4;

impl Part<'_> {
    fn at(&self, offset: u64) -> io::Result<GuestAddr> {
        self.base.checked_add(offset).ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }

    pub(crate) fn load(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.memory.read(self.at(offset)?, bytes)
    }

    pub(crate) fn index(&self) -> io::Result<u16> {
        let mut bytes = [0; 2];
        self.load(INDEX, &mut bytes)?;
        Ok(u16::from_le_bytes(bytes))
    }

    /// All entries; each is `N` bytes long.
    fn entries<const N: usize>(&self, size: u16) -> io::Result<Vec<[u8; N]>> {
        let mut bytes = vec![0; usize::from(size) * N];
        self.load(ENTRIES, &mut bytes)?;
        Ok(bytes.as_chunks().0.to_vec())
    }

    pub(crate) fn store(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.memory.write(self.at(offset)?, bytes)
    }

    /// Advances `idx`.
    pub(crate) fn store_index(&self, index: u16) -> io::Result<()> {
        self.memory.store_index(self.at(INDEX)?, index)
    }
}

/// A split ring that no backend serves.
pub(crate) struct Orphan<'a> {
    queue: u16,
    state: &'a QueueState,
    available: Part<'a>,
    used: Part<'a>,
}

impl<'a> Orphan<'a> {
    /// Takes the ring of a queue that was running.
    pub(crate) fn new(
        queue: u16,
        state: &'a QueueState,
        layout: RingLayout,
        space: Space<'a>,
    ) -> Result<Self, ResumeError> {
        match layout {
            RingLayout::Packed => Err(ResumeError::Packed(queue)),
            RingLayout::Split => {
                let outside = || io::Error::from(io::ErrorKind::InvalidInput);
                let part = |base, entry: u64| {
                    let length = entry.saturating_mul(state.size.into()).saturating_add(ENTRIES);
                    let base = space.guest(base, length).ok_or_else(outside);
                    let base = base.map_err(|source| ResumeError::Memory { queue, source })?;
                    Ok(Part { memory: space.memory, base })
                };
                Ok(Self { queue, state, available: part(state.driver, 2)?, used: part(state.device, 8)? })
            }
        }
    }

    /// Both indexes as they are in guest memory.
    pub(crate) fn indexes(&self) -> io::Result<Indexes> {
        let used = self.used.index()?;
        Ok(Indexes { available: self.available.index()?, used })
    }

    /// The index at which the next backend begins: the used index. The available index would leave out the
    /// requests in flight.
    ///
    /// A backend without an inflight area takes its first requests from the entries of the available ring
    /// behind the used index. Some of these requests may have overtaken others and be finished. So the heads
    /// of the unfinished requests are written into these entries. The driver does not read the entries, and
    /// overwrites none before it is used.
    pub(crate) fn resume(&self, notes: Notes, past: &Past) -> Result<RingBase, ResumeError> {
        let Self { queue, state, .. } = *self;
        let memory = |source| ResumeError::Memory { queue, source };
        let now = self.contents()?;
        let Indexes { available, used } = now.indexes;
        let count = available.wrapping_sub(used);
        if count > state.size {
            return Err(ResumeError::Indexes { queue, available, used });
        }
        if notes == Notes::Rings && count > 0 {
            let history = History { now: &now, origin: past.origin, cut: past.cut.as_ref() };
            let unfinished = history.unfinished().ok_or(ResumeError::Doubt { queue, count })?;
            self.put_first(used, &now.available, &unfinished).map_err(memory)?;
        }
        Ok(RingBase(used.into()))
    }

    /// The contents of the ring, read while the driver changed nothing.
    pub(crate) fn contents(&self) -> Result<Contents, ResumeError> {
        let Self { queue, state, .. } = *self;
        let read = || -> io::Result<Option<Contents>> {
            let indexes = self.indexes()?;
            let heads = self.available.entries::<2>(state.size)?;
            let ids = self.used.entries::<8>(state.size)?;
            let available = heads.into_iter().map(u16::from_le_bytes).collect();
            let id = |[a, b, c, d, ..]: [u8; 8]| u32::from_le_bytes([a, b, c, d]);
            let contents = Contents { indexes, available, used: ids.into_iter().map(id).collect() };
            Ok((self.indexes()? == indexes).then_some(contents))
        };
        for _ in 0..ATTEMPTS {
            if let Some(contents) = read().map_err(|source| ResumeError::Memory { queue, source })? {
                return Ok(contents);
            }
        }
        Err(ResumeError::Restless(queue))
    }

    /// Writes `unfinished` into the available ring from `first` on.
    fn put_first(&self, first: u16, heads: &[u16], unfinished: &[u16]) -> io::Result<()> {
        for (step, head) in (0_u16..).zip(unfinished) {
            let slot = first.wrapping_add(step).checked_rem(self.state.size).unwrap_or(0);
            if heads.get(usize::from(slot)) != Some(head) {
                self.available.store(ENTRIES + 2 * u64::from(slot), &head.to_le_bytes())?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{RAM, memory_without_a_file};

    const SIZE: u16 = 16;

    fn queue() -> QueueState {
        QueueState {
            size: SIZE,
            ready: true,
            driver: GuestAddr(0x2000),
            device: GuestAddr(0x3000),
            ..QueueState::new(SIZE)
        }
    }

    fn with_indexes(available: u16, used: u16) -> MemoryMap {
        let memory = memory_without_a_file();
        memory.write(GuestAddr(0x2002), &available.to_le_bytes()).unwrap();
        memory.write(GuestAddr(0x3002), &used.to_le_bytes()).unwrap();
        memory
    }

    fn resume(queue: &QueueState, memory: &MemoryMap, notes: Notes) -> Result<RingBase, ResumeError> {
        Orphan::new(3, queue, RingLayout::Split, memory.into())?.resume(notes, &Past::default())
    }

    /// Fills the rings with these heads, from index 0 on.
    fn with_rings(available: &[u16], used: &[u16]) -> MemoryMap {
        let memory = with_indexes(available.len().try_into().unwrap(), used.len().try_into().unwrap());
        for (at, head) in (0x2004..).step_by(2).zip(available) {
            memory.write(GuestAddr(at), &head.to_le_bytes()).unwrap();
        }
        for (at, head) in (0x3004..).step_by(8).zip(used) {
            memory.write(GuestAddr(at), &u32::from(*head).to_le_bytes()).unwrap();
        }
        memory
    }

    fn available(memory: &MemoryMap, count: usize) -> Vec<u16> {
        let part = Part { memory, base: GuestAddr(0x2000) };
        let entries = part.entries::<2>(SIZE).unwrap();
        entries.into_iter().take(count).map(u16::from_le_bytes).collect()
    }

    #[test]
    fn ring_goes_on_behind_what_is_used_also_across_the_wrap() {
        for (available, used) in [(0, 0), (16, 0), (7, 5), (5, 65530), (65535, 65535)] {
            let base = resume(&queue(), &with_indexes(available, used), Notes::Backend).unwrap();
            assert_eq!(base, RingBase(used.into()), "{available} {used}");
        }
    }

    #[test]
    fn requests_that_were_overtaken_come_first_when_nobody_has_notes_of_them() {
        let memory = with_rings(&[5, 6, 7, 8], &[7, 5]);
        assert_eq!(resume(&queue(), &memory, Notes::Backend).unwrap(), RingBase(2));
        assert_eq!(available(&memory, 4), [5, 6, 7, 8], "the backend knows");
        assert_eq!(resume(&queue(), &memory, Notes::Rings).unwrap(), RingBase(2));
        assert_eq!(available(&memory, 4), [5, 6, 6, 8]);
    }

    #[test]
    fn requests_that_nobody_overtook_stay_where_they_are() {
        let memory = with_rings(&[5, 6, 7, 8], &[5, 6]);
        assert_eq!(resume(&queue(), &memory, Notes::Rings).unwrap(), RingBase(2));
        assert_eq!(available(&memory, 4), [5, 6, 7, 8]);
    }

    #[test]
    fn ring_that_tells_nothing_is_refused_unless_the_backend_knows() {
        let memory = with_rings(&[5, 5, 5, 5], &[7, 5]);
        let result = resume(&queue(), &memory, Notes::Rings);
        assert!(matches!(result, Err(ResumeError::Doubt { queue: 3, count: 2 })), "{result:?}");
        assert!(resume(&queue(), &memory, Notes::Backend).is_ok());
        assert_eq!(available(&memory, 4), [5, 5, 5, 5]);
    }

    #[test]
    fn indexes_that_cannot_be_are_refused() {
        for (available, used) in [(17, 0), (0, 1), (0, 17), (5, 65500)] {
            for notes in [Notes::Backend, Notes::Rings] {
                let result = resume(&queue(), &with_indexes(available, used), notes);
                assert!(matches!(result, Err(ResumeError::Indexes { queue: 3, .. })), "{available} {used}");
            }
        }
    }

    #[test]
    fn packed_rings_and_rings_outside_memory_are_refused() {
        let packed =
            Orphan::new(1, &queue(), RingLayout::Packed, Space::from(&memory_without_a_file())).err();
        assert!(matches!(packed, Some(ResumeError::Packed(1))));
        for device in [RAM - 2, RAM - 3, RAM, u64::MAX - 1, u64::MAX - 2] {
            let queue = QueueState { device: GuestAddr(device), ..queue() };
            let result = resume(&queue, &memory_without_a_file(), Notes::Rings);
            assert!(matches!(result, Err(ResumeError::Memory { .. })), "{device:#x}");
        }
    }

    fn at(base: u16, available: u16, used: u16) -> Verdict {
        judge(base, Indexes { available, used })
    }

    #[test]
    fn ring_that_goes_on_is_told_from_one_that_began_anew() {
        assert_eq!(at(100, 103, 100), Verdict::Unmoved);
        assert_eq!(at(100, 103, 101), Verdict::GoesOn);
        assert_eq!(at(100, 103, 103), Verdict::GoesOn);
        assert_eq!(at(100, 103, 1), Verdict::BeganAnew);
        assert_eq!(at(5000, 5256, 256), Verdict::BeganAnew);
        assert_eq!(at(65534, 3, 65535), Verdict::GoesOn);
        assert_eq!(at(65534, 3, 2), Verdict::GoesOn);
        assert_eq!(at(40000, 40009, 2), Verdict::BeganAnew);
    }

    #[test]
    fn ring_that_begins_at_0_anyhow_cannot_begin_anew() {
        for used in 0..=9 {
            assert_ne!(at(0, 9, used), Verdict::BeganAnew);
        }
    }
}
