//! Pieces of peers' files that the guest sees as memory, and what happens when a page of one cannot be had: the peer made
//! the file shorter, punched a hole, or there is no memory left for the page.
//!
//! The guest's access to such a page shows itself in one of three ways:
//! 1. `KVM_RUN` fails with EFAULT: [`PeerMemory::remove`].
//! 2. KVM emulates the instruction, and the access comes out as MMIO: [`PeerMemory::missed`].
//! 3. KVM says nothing. With hardware paging and guest interrupts on, KVM asks for the page asynchronously, ignores the
//!    failure and enters the guest again, for ever. So [`PeerMemory::look`] examines the pieces several times a second.
//!
//! In each case the piece is taken out of the guest and its owner is told. The vCPU goes on: its access finds no slot and
//! comes to the bus. Nothing in the VMM touches a piece.

use std::io;
use std::os::fd::AsFd;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::ports::{Access, FileRange, Guard, OnVanished, PortError};
use rustix::fs::{SealFlags, fcntl_get_seals, fstat, fstatfs};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use transport::memory::GuestAddr;

use crate::host::mapping::PAGE;
use crate::host::mapping::PeerMapping;
use crate::host::slots::{Slot, Slots};

/// How a file gets its pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Store {
    /// A memfd: as long as the host has memory.
    Memory,
    /// A tmpfs that has room for so many.
    Limited,
    /// Huge pages, of which the host has a fixed number.
    Huge,
}

/// One piece that the guest sees.
struct ShownPiece {
    id: u64,
    file: FileRange,
    store: Store,
    /// The file cannot get shorter.
    is_sealed: bool,
    mapping: Arc<PeerMapping>,
    at: GuestAddr,
    vanished: OnVanished,
    slot: Option<Slot>,
}

impl ShownPiece {
    /// Whether the file can lose the piece without a word from the kernel.
    fn needs_looks(&self) -> bool {
        !self.is_sealed || self.store != Store::Memory
    }

    /// Why a page of the piece cannot be had, as far as that can be said without fetching pages of a file that has room.
    fn fault(&self) -> Option<io::Error> {
        let whole = || self.mapping.populate(0, self.mapping.place().1);
        let found = match self.store {
            _ if !self.is_sealed && is_short(&self.file) => Err(io::Error::other(SHORT)),
            // All pages are there, unless somebody takes them away.
            Store::Huge => whole(),
            // There is no room for another page, so that nothing is fetched that is not there.
            Store::Limited if fstatfs(&self.file.fd).is_ok_and(|system| system.f_bavail == 0) => whole(),
            Store::Limited | Store::Memory => Ok(()),
        };
        found.err()
    }
}

#[derive(Default)]
struct AllShown {
    next: u64,
    pieces: Vec<ShownPiece>,
}

/// Which pieces are to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suspects {
    /// Those that [`PeerMemory::look`] would take.
    Lost,
    /// Those of which a page cannot be fetched. When no such piece is found, those that are too large to be asked; when
    /// there are none of these either, all.
    Unreadable,
}

/// All pieces of one VM. Its lock is never held while the owner of a piece is called or a slot is removed.
pub struct PeerMemory {
    slots: Arc<Slots>,
    shown: Mutex<AllShown>,
    /// How many there are, for those who only want to know that there are none.
    count: AtomicUsize,
    /// Ticks while there are pieces that need looks.
    timer: OwnedFd,
}

impl std::fmt::Debug for PeerMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PeerMemory")
    }
}

impl PeerMemory {
    /// No pieces yet.
    ///
    /// # Errors
    /// When no timer can be had.
    pub fn new(slots: Arc<Slots>) -> Result<Arc<Self>, PortError> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)
            .map_err(|error| PortError::new("make a timer", error.into()))?;
        Ok(Arc::new(PeerMemory { slots, shown: Mutex::default(), count: AtomicUsize::new(0), timer }))
    }

    /// See [`devices::ports::DeviceMemory::map`].
    ///
    /// # Errors
    /// See there; also when the file is neither a memfd nor on tmpfs or hugetlbfs. The owner of another file may answer a
    /// page fault as late as it likes (FUSE), or never (`memfd_secret`), and no deadline reaches a vCPU that waits for it.
    pub fn show(
        self: &Arc<Self>,
        piece: &FileRange,
        at: GuestAddr,
        access: Access,
        vanished: OnVanished,
    ) -> Result<Guard, PortError> {
        let FileRange { offset, size, .. } = *piece;
        let cannot = |error| {
            PortError::new(
                format!("show {size:#x} bytes of a peer's file at guest address {:#x}", at.0),
                error,
            )
        };
        let whole = [at.0, offset, size].iter().all(|value| value.is_multiple_of(PAGE)) && size != 0;
        if !whole || at.0.checked_add(size).is_none() || offset.checked_add(size).is_none() {
            return Err(cannot(io::Error::other("they are not whole pages, or none, or wrap")));
        }
        let (store, is_sealed) = kind(piece).map_err(cannot)?;
        if is_short(piece) {
            return Err(cannot(io::Error::other(SHORT)));
        }
        let mapping = Arc::new(PeerMapping::new(piece, access)?);
        let (file, slot) = (piece.clone(), None);
        let mut piece = ShownPiece { id: 0, file, store, is_sealed, mapping, at, vanished, slot };
        if let Some(error) = piece.fault() {
            return Err(cannot(error));
        }
        piece.slot = Some(self.slots.add(at.0, Arc::clone(&piece.mapping), access)?);
        let mut shown = self.lock();
        let id = shown.next;
        shown.next += 1;
        piece.id = id;
        shown.pieces.push(piece);
        self.changed(&shown);
        drop(shown);
        let owner = Arc::clone(self);
        Ok(Guard::on_drop(move || drop(owner.take(|piece| piece.id == id))))
    }

    /// Readable when [`PeerMemory::look`] is to be called.
    pub fn timer(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }

    /// Takes away the pieces that their files no longer hold. Called by the control loop; does not wait for a peer.
    pub fn look(&self) {
        let ticked = rustix::io::read(&self.timer, &mut [0; 8]);
        log::trace!("looking at peers' memory ({ticked:?})");
        self.remove(Suspects::Lost);
    }

    /// KVM could not reach memory of the guest: removes the suspects and tells their owners. Says how many there
    /// were. Called on vCPU threads, without any lock held.
    pub fn remove(&self, suspects: Suspects) -> usize {
        let gone = match suspects {
            Suspects::Lost => self.take(|piece| piece.fault().is_some()),
            Suspects::Unreadable => self.take_unreadable(),
        };
        tell(&gone);
        gone.len()
    }

    /// An access at `address` came out of the guest as MMIO. Called on vCPU threads, without any lock held.
    pub fn missed(&self, address: u64) {
        if self.count.load(Ordering::Acquire) == 0 {
            return;
        }
        let holds = |piece: &ShownPiece| address.wrapping_sub(piece.at.0) < piece.file.size;
        // Nearly all that comes out of the guest is a register.
        if !self.lock().pieces.iter().any(holds) {
            return;
        }
        let gone = self.take(|piece| holds(piece) && piece.fault().is_some());
        tell(&gone);
    }

    /// The smallest pieces are asked first: fetching pages of a file with holes makes new pages.
    fn take_unreadable(&self) -> Vec<ShownPiece> {
        self.lock().pieces.sort_by_key(|piece| piece.file.size);
        let asked = || {
            let mut left = MOST_FETCHED;
            move |piece: &ShownPiece| {
                let rest = left.checked_sub(piece.file.size);
                left = rest.unwrap_or(0);
                rest.is_some()
            }
        };
        let mut is_asked = asked();
        let found =
            self.take(|piece| is_asked(piece) && piece.mapping.populate(0, piece.mapping.place().1).is_err());
        if !found.is_empty() {
            return found;
        }
        let mut is_asked = asked();
        let found = self.take(|piece| !is_asked(piece));
        // KVM fails all the same: no piece is above suspicion.
        if found.is_empty() { self.take(|_| true) } else { found }
    }

    fn take(&self, which: impl FnMut(&ShownPiece) -> bool) -> Vec<ShownPiece> {
        let mut shown = self.lock();
        let (gone, stay) = std::mem::take(&mut shown.pieces).into_iter().partition(which);
        shown.pieces = stay;
        self.changed(&shown);
        gone
    }

    /// Counts the pieces, and lets the timer tick while one needs looks.
    fn changed(&self, shown: &AllShown) {
        let before = self.count.swap(shown.pieces.len(), Ordering::AcqRel);
        if before == shown.pieces.len() {
            return;
        }
        let tick = if shown.pieces.iter().any(ShownPiece::needs_looks) { TICK } else { Timespec::default() };
        let spec = Itimerspec { it_interval: tick, it_value: tick };
        if let Err(error) = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec) {
            log::error!("peers' memory cannot be looked at: {error}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, AllShown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the file ends before the piece does. A page of which the file has one byte is there.
fn is_short(piece: &FileRange) -> bool {
    let length = fstat(&piece.fd).map_or(0, |stat| u64::try_from(stat.st_size).unwrap_or(0));
    length.div_ceil(PAGE).saturating_mul(PAGE) < piece.offset.saturating_add(piece.size)
}

const SHORT: &str = "the file ends before the piece does";
/// Between two looks.
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
/// Bytes of peers' files that are fetched to find out which file lacks a page.
const MOST_FETCHED: u64 = 1 << 30;

fn tell(gone: &[ShownPiece]) {
    for ShownPiece { at, file, vanished, .. } in gone {
        log::error!("the peer took {:#x} bytes at guest address {:#x} away", file.size, at.0);
        vanished();
    }
}

/// How the file gets its pages, and whether it cannot get shorter. Seals are asked for first: only memfds and files on
/// tmpfs and hugetlbfs have them, and the answer never comes from a file system in user space.
fn kind(piece: &FileRange) -> io::Result<(Store, bool)> {
    let seals = fcntl_get_seals(&piece.fd).map_err(|_| {
        io::Error::other(
            "the file is neither a memfd nor on tmpfs or hugetlbfs; others are not mapped into guests",
        )
    })?;
    let system = fstatfs(&piece.fd)?;
    let store = match (system.f_type == HUGETLBFS_MAGIC, system.f_blocks) {
        (true, _) => Store::Huge,
        (false, 0) => Store::Memory,
        (false, _) => Store::Limited,
    };
    Ok((store, seals.contains(SealFlags::SHRINK)))
}

const HUGETLBFS_MAGIC: rustix::fs::FsWord = 0x9584_58f6;

#[cfg(test)]
#[path = "peer_memory_tests.rs"]
mod tests;
