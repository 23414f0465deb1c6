//! Pieces of peers' files that the guest sees as memory, and what happens when such a file gets shorter.
//!
//! A guest's access beyond the end of a file makes `KVM_RUN` fail (EFAULT), or, where KVM emulates the instruction,
//! comes out as MMIO. Then the pieces whose files no longer hold them are taken out of the guest, their owners are
//! told, and the vCPU goes on: its access finds no slot and comes to the bus. Nothing here, or elsewhere in the
//! VMM, touches a piece.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use devices::ports::{Access, FileRange, Guard, OnVanished};
use rustix::fs::{FileType, fstat, fstatfs};
use transport::memory::GuestAddr;

use crate::host::kvm::PAGE;
use crate::host::memory::{MemoryError, PeerMapping, Slot, Slots};

/// Why a piece of a file cannot be shown.
#[derive(Debug, thiserror::Error)]
pub enum ShowError {
    /// Not in whole pages, empty, or beyond the end of the numbers.
    #[error(
        "{size:#x} bytes from {offset:#x} of a file at guest address {at:#x} are not whole pages, or none, or wrap"
    )]
    Pages {
        /// Guest address.
        at: u64,
        /// Offset in the file.
        offset: u64,
        /// Bytes.
        size: u64,
    },
    /// The file ends before the piece does.
    #[error("the file has {length:#x} bytes, fewer than {end:#x}")]
    Shorter {
        /// Bytes in the file.
        length: u64,
        /// Where the piece ends.
        end: u64,
    },
    /// Neither a file nor a device, or a file whose every page its owner hands out as slowly as it likes.
    #[error("the descriptor is of a kind that is not mapped into guests")]
    Kind,
    /// The kernel would not say what the descriptor is.
    #[error("cannot look at the descriptor")]
    Stat(#[source] std::io::Error),
    /// The mapping or the slot failed.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

struct Piece {
    id: u64,
    file: FileRange,
    at: GuestAddr,
    vanished: OnVanished,
    _slot: Slot,
}

#[derive(Default)]
struct Shown {
    next: u64,
    pieces: Vec<Piece>,
}

/// Which pieces are to go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suspects {
    /// Those whose files no longer hold them.
    Shorter,
    /// All: one of them cannot be read, and nobody can say which.
    All,
}

/// All pieces of one VM. Its lock is never held while KVM, the owner of a piece or anybody else is called.
pub struct PeerMemory {
    slots: Arc<Slots>,
    shown: Mutex<Shown>,
    /// How many there are, for those who only want to know that there are none.
    count: AtomicUsize,
}

impl std::fmt::Debug for PeerMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PeerMemory")
    }
}

impl PeerMemory {
    /// No pieces yet.
    pub fn new(slots: Arc<Slots>) -> Arc<Self> {
        Arc::new(PeerMemory { slots, shown: Mutex::default(), count: AtomicUsize::new(0) })
    }

    /// See [`devices::ports::DeviceMemory::map`].
    ///
    /// # Errors
    /// See there.
    pub fn show(
        self: &Arc<Self>,
        piece: &FileRange,
        at: GuestAddr,
        access: Access,
        vanished: OnVanished,
    ) -> Result<Guard, ShowError> {
        let FileRange { offset, size, .. } = *piece;
        let whole = [at.0, offset, size].iter().all(|value| value.is_multiple_of(PAGE)) && size != 0;
        if !whole || at.0.checked_add(size).is_none() || offset.checked_add(size).is_none() {
            return Err(ShowError::Pages { at: at.0, offset, size });
        }
        check_kind(piece)?;
        if let Some(error) = shortage(piece)? {
            return Err(error);
        }
        let slot = self.slots.add(at.0, PeerMapping::new(piece, access)?, access)?;
        let mut shown = self.lock();
        let id = shown.next;
        shown.next += 1;
        shown.pieces.push(Piece { id, file: piece.clone(), at, vanished, _slot: slot });
        self.count.store(shown.pieces.len(), Ordering::Release);
        drop(shown);
        let owner = Arc::clone(self);
        Ok(Guard::on_drop(move || drop(owner.take(|piece| piece.id == id))))
    }

    /// KVM could not reach memory of the guest: removes the suspects and tells their owners. Says how many there
    /// were. Called on vCPU threads, without any lock held.
    pub fn remove(&self, suspects: Suspects) -> usize {
        let gone = self.take(|piece| suspects == Suspects::All || is_short(piece));
        tell(&gone);
        gone.len()
    }

    /// An access at `address` came out of the guest as MMIO. Called on vCPU threads, without any lock held.
    pub fn missed(&self, address: u64) {
        if self.count.load(Ordering::Acquire) == 0 {
            return;
        }
        let holds = |piece: &Piece| address.wrapping_sub(piece.at.0) < piece.file.size;
        // Nearly all that comes out of the guest is a register.
        if !self.lock().pieces.iter().any(holds) {
            return;
        }
        let gone = self.take(|piece| holds(piece) && is_short(piece));
        tell(&gone);
    }

    fn take(&self, which: impl Fn(&Piece) -> bool) -> Vec<Piece> {
        let mut shown = self.lock();
        let (gone, stay) = std::mem::take(&mut shown.pieces).into_iter().partition(which);
        shown.pieces = stay;
        self.count.store(shown.pieces.len(), Ordering::Release);
        gone
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Shown> {
        self.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_short(piece: &Piece) -> bool {
    !matches!(shortage(&piece.file), Ok(None))
}

fn tell(gone: &[Piece]) {
    for Piece { at, file, vanished, .. } in gone {
        log::error!("the peer took {:#x} bytes at guest address {:#x} away", file.size, at.0);
        vanished();
    }
}

/// A file in user space (FUSE) may answer a page fault whenever its owner likes, and the vCPU would wait in the
/// kernel where no deadline reaches it.
fn check_kind(piece: &FileRange) -> Result<(), ShowError> {
    let stat = fstat(&piece.fd).map_err(|error| ShowError::Stat(error.into()))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {}
        FileType::CharacterDevice => return Ok(()),
        _ => return Err(ShowError::Kind),
    }
    let system = fstatfs(&piece.fd).map_err(|error| ShowError::Stat(error.into()))?;
    if system.f_type == FUSE_SUPER_MAGIC { Err(ShowError::Kind) } else { Ok(()) }
}

/// What a file lacks of a piece: a page that it holds a byte of is there. A device has no length.
fn shortage(piece: &FileRange) -> Result<Option<ShowError>, ShowError> {
    let stat = fstat(&piece.fd).map_err(|error| ShowError::Stat(error.into()))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Ok(None);
    }
    let length = u64::try_from(stat.st_size).unwrap_or(0);
    let end = piece.offset.saturating_add(piece.size);
    Ok((length.div_ceil(PAGE).saturating_mul(PAGE) < end).then_some(ShowError::Shorter { length, end }))
}

const FUSE_SUPER_MAGIC: rustix::fs::FsWord = 0x6573_5546;

#[cfg(test)]
#[path = "peer_memory_tests.rs"]
mod tests;
