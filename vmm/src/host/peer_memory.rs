//! Pieces of peers' files that the guest sees as memory, and what happens when a page of a piece cannot be
//! provided: the peer made the file shorter or punched a hole, or there is no memory left for the page.
//!
//! The guest's access to such a page shows in one of three ways:
//! 1. `KVM_RUN` fails with EFAULT. The vCPU calls [`PeerMemory::remove`].
//! 2. KVM emulates the instruction, and the access comes out as MMIO. The vCPU calls [`PeerMemory::missed`].
//! 3. KVM reports nothing. With hardware paging and with guest interrupts on, KVM asks for the page
//!    asynchronously, ignores the failure and enters the guest again, for ever. So the control loop calls
//!    [`PeerMemory::look`] several times a second, which examines the pieces.
//!
//! In each case the piece is removed from the guest and its owner is told. The vCPU goes on: its access finds
//! no slot and comes to the bus. The VMM must never touch a piece.

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
    /// A memfd: it gets pages as long as the host has memory.
    Memory,
    /// A file on a tmpfs with a size limit.
    Limited,
    /// A file of huge pages, of which the host has a fixed number.
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
    /// Whether the piece can lose a page without a report from KVM.
    fn needs_looks(&self) -> bool {
        !self.is_sealed || self.store != Store::Memory
    }

    /// Why a page of the piece cannot be provided; `None` if there is no such page. If the file has room for
    /// new pages, none is fetched, and only the file's length is checked.
    fn fault(&self) -> Option<io::Error> {
        let whole = || self.mapping.populate(0, self.mapping.place().1);
        let found = match self.store {
            _ if !self.is_sealed && is_short(&self.file) => Err(io::Error::other(SHORT)),
            // All pages are there, unless a peer takes pages away.
            Store::Huge => whole(),
            // The file system is full, so fetching creates no new pages.
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

/// Which pieces to remove.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suspects {
    /// The pieces that [`PeerMemory::look`] would remove.
    Lost,
    /// The pieces of which a page cannot be fetched. If there are none, the pieces that are too large to be
    /// fetched. If there are none of these either, all pieces.
    Unreadable,
}

/// All pieces of one VM. The lock must never be held while the owner of a piece is called or a slot is
/// removed.
pub struct PeerMemory {
    slots: Arc<Slots>,
    shown: Mutex<AllShown>,
    /// The number of pieces, so that a vCPU can see without the lock that there are none.
    count: AtomicUsize,
    /// Ticks while a piece needs looks.
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
    /// As there. Also when the file is neither a memfd nor on tmpfs or hugetlbfs. The owner of another kind
    /// of file may answer a page fault late (FUSE) or never (`memfd_secret`), and no deadline ends the wait
    /// of a vCPU for that answer.
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

    /// Removes the pieces that their files no longer hold, and tells their owners. Called by the control
    /// loop; does not wait for a peer.
    pub fn look(&self) {
        let ticked = rustix::io::read(&self.timer, &mut [0; 8]);
        log::trace!("looking at peers' memory ({ticked:?})");
        self.remove(Suspects::Lost);
    }

    /// KVM could not reach memory of the guest: removes the suspects and tells their owners. Returns the
    /// number of removed pieces. Called on vCPU threads, without any lock held.
    pub fn remove(&self, suspects: Suspects) -> usize {
        let gone = match suspects {
            Suspects::Lost => self.take(|piece| piece.fault().is_some()),
            Suspects::Unreadable => self.take_unreadable(),
        };
        tell(&gone);
        gone.len()
    }

    /// The guest's access at `address` came out as MMIO: removes the piece at that address if its file no
    /// longer holds it. Called on vCPU threads, without any lock held.
    pub fn missed(&self, address: u64) {
        if self.count.load(Ordering::Acquire) == 0 {
            return;
        }
        let holds = |piece: &ShownPiece| address.wrapping_sub(piece.at.0) < piece.file.size;
        // Nearly all MMIO accesses are to registers.
        if !self.lock().pieces.iter().any(holds) {
            return;
        }
        let gone = self.take(|piece| holds(piece) && piece.fault().is_some());
        tell(&gone);
    }

    /// Removes the pieces of [`Suspects::Unreadable`]. Fetching pages of a file with holes creates pages, so
    /// the smallest pieces are fetched first, and no more than [`MOST_FETCHED`] bytes.
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
        // KVM failed although no piece is at fault, so every piece may be.
        if found.is_empty() { self.take(|_| true) } else { found }
    }

    fn take(&self, which: impl FnMut(&ShownPiece) -> bool) -> Vec<ShownPiece> {
        let mut shown = self.lock();
        let (gone, stay) = std::mem::take(&mut shown.pieces).into_iter().partition(which);
        shown.pieces = stay;
        self.changed(&shown);
        gone
    }

    /// Updates the number of pieces, and lets the timer tick while a piece needs looks.
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

/// Whether the file ends before the piece does. A page counts as present when the file has one byte of it.
fn is_short(piece: &FileRange) -> bool {
    let length = fstat(&piece.fd).map_or(0, |stat| u64::try_from(stat.st_size).unwrap_or(0));
    length.div_ceil(PAGE).saturating_mul(PAGE) < piece.offset.saturating_add(piece.size)
}

const SHORT: &str = "the file ends before the piece does";
/// The time between two looks.
const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };
/// The most bytes of peers' files that are fetched to find the file that lacks a page.
const MOST_FETCHED: u64 = 1 << 30;

fn tell(gone: &[ShownPiece]) {
    for ShownPiece { at, file, vanished, .. } in gone {
        log::error!("the peer took {:#x} bytes at guest address {:#x} away", file.size, at.0);
        vanished();
    }
}

/// How the file gets its pages, and whether it is sealed against getting shorter. The seals are asked for
/// first: only memfds and files on tmpfs and hugetlbfs have seals, and the kernel answers without asking a
/// file system in user space.
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
