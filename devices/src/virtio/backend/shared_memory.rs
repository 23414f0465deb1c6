//! Virtio 1.2 §2.10, vhost-user SHMEM_MAP and SHMEM_UNMAP: ranges of guest addresses into which a backend
//! has pieces of its files mapped. Where the ranges are is the transport's: fixed on virtio-mmio, in a BAR on
//! virtio-pci. Called on the thread that serves the backends' channels; must never take
//! a device's lock, nor show the guest anything outside the ranges.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, Weak};

use transport::peer::fds::{Protection, file_size};
use transport::vhost_user::Refused;
use transport::vhost_user::message::ShmemArea;
use transport::vhost_user::shmem::{Placement, ShmemFault, ShmemRegions};

use crate::lock;
use crate::ports::{Access, DeviceMemory, FileRange, Guard, OnVanished, PortError};
use crate::virtio::core::registers::SharedMemory;

/// Why a backend's piece is not shown.
#[derive(Debug, thiserror::Error)]
enum MapError {
    #[error("the queues do not run")]
    Stopped,
    #[error("the connection is an old one")]
    Old,
    #[error(transparent)]
    Fault(#[from] ShmemFault),
    #[error("the machine did not map it")]
    Port(#[from] PortError),
}

/// The regions of a device, on one board. Called on the thread that serves the backends' channels.
pub trait RegionWindows: Send + Sync {
    /// Shows the guest `piece` at `at` in the region with this id, until the guard is dropped. See
    /// [`DeviceMemory::map`].
    ///
    /// # Errors
    /// When there is no such place, or the machine refuses.
    fn show(
        &self,
        region: u8,
        at: u64,
        piece: &FileRange,
        access: Access,
        vanished: OnVanished,
    ) -> Result<Guard, PortError>;
}

/// Regions at guest addresses that never change.
pub struct FixedWindows {
    memory: Arc<dyn DeviceMemory>,
    places: Vec<Option<SharedMemory>>,
}

impl FixedWindows {
    /// Regions at `places`, by id, of a machine with `memory`.
    #[must_use]
    pub fn new(memory: Arc<dyn DeviceMemory>, places: Vec<Option<SharedMemory>>) -> Self {
        Self { memory, places }
    }
}

impl RegionWindows for FixedWindows {
    fn show(
        &self,
        region: u8,
        at: u64,
        piece: &FileRange,
        access: Access,
        vanished: OnVanished,
    ) -> Result<Guard, PortError> {
        let place = self.places.get(usize::from(region)).copied().flatten();
        let guest = place.and_then(|place| place.base.checked_add(at)).ok_or_else(|| {
            PortError::new("show shared memory there", std::io::ErrorKind::InvalidInput.into())
        })?;
        self.memory.map(piece, guest, access, vanished)
    }
}

/// The shared memory regions of one device, for its whole life. Clones are the same.
///
/// Its lock is held for a moment, after the device's or without it, and before that of a transport.
#[derive(Clone, Default)]
pub struct SharedRegions(Arc<Mutex<State>>);

/// Some of the maps belong to this connection; it may have others made while the queues run.
#[derive(Clone)]
pub struct Tenancy {
    state: SharedRegions,
    number: u64,
}

#[derive(Default)]
struct State {
    sizes: Vec<u64>,
    windows: Option<Arc<dyn RegionWindows>>,
    judge: ShmemRegions,
    shown: BTreeMap<(u8, u64), Guard>,
    /// The connection that may map, by number, and whether its queues run.
    tenant: u64,
    running: bool,
}

impl State {
    /// What was shown, for the caller to drop once the lock is released.
    fn take_down(&mut self) -> BTreeMap<(u8, u64), Guard> {
        self.judge = ShmemRegions::new(self.sizes.clone());
        std::mem::take(&mut self.shown)
    }
}

impl SharedRegions {
    /// Regions of these sizes, by id; 0 where there is none.
    #[must_use]
    pub fn new(sizes: Vec<u64>) -> Self {
        let judge = ShmemRegions::new(sizes.clone());
        Self(Arc::new(Mutex::new(State { sizes, judge, ..State::default() })))
    }

    /// The sizes, by id.
    #[must_use]
    pub fn sizes(&self) -> Vec<u64> {
        lock(&self.0).sizes.clone()
    }

    /// Shows what is mapped from now on in these windows.
    pub fn put(&self, windows: Arc<dyn RegionWindows>) {
        let before = lock(&self.0).windows.replace(windows);
        drop(before);
    }

    /// Takes everything off that machine.
    pub fn remove(&self) {
        let mut state = lock(&self.0);
        let (shown, windows) = (state.take_down(), state.windows.take());
        drop(state);
        drop((shown, windows));
    }

    /// Another connection takes the place of the last one, whose maps go.
    pub(crate) fn tenancy(&self) -> Tenancy {
        let mut state = lock(&self.0);
        let shown = state.take_down();
        state.tenant = state.tenant.wrapping_add(1);
        state.running = false;
        let number = state.tenant;
        drop(state);
        drop(shown);
        Tenancy { state: self.clone(), number }
    }

    fn downgrade(&self) -> Weak<Mutex<State>> {
        Arc::downgrade(&self.0)
    }
}

impl Tenancy {
    /// The queues are about to run: the backend may ask for maps.
    pub(crate) fn begin(&self) {
        let mut state = lock(&self.state.0);
        state.running |= state.tenant == self.number;
    }

    /// The queues have stopped: every map goes.
    pub(crate) fn end(&self) {
        let mut state = lock(&self.state.0);
        if state.tenant == self.number {
            state.running = false;
            let shown = state.take_down();
            drop(state);
            drop(shown);
        }
    }

    /// Maps a file where the backend asks.
    ///
    /// # Errors
    /// When that may not be: outside its region, over another map, beyond the file, or at the wrong time.
    pub fn map(&self, area: &ShmemArea, fd: OwnedFd) -> Result<(), Refused> {
        self.try_map(area, fd).map_err(|error| self.refuse("map", area, &error))
    }

    /// Takes maps away again.
    ///
    /// # Errors
    /// When nothing is mapped there, or only a part of a map would go.
    pub fn unmap(&self, area: &ShmemArea) -> Result<(), Refused> {
        self.try_unmap(area).map_err(|error| self.refuse("unmap", area, &error))
    }

    fn refuse(&self, what: &str, area: &ShmemArea, error: &MapError) -> Refused {
        let ShmemArea { shmid, shm_offset, len, .. } = area;
        let why = crate::virtio::core::device::chain(error);
        log::debug!("not done: {what} {len:#x} bytes at {shm_offset:#x} of shared memory {shmid}: {why}");
        Refused
    }

    fn admitted(&self, state: &State) -> Result<(), MapError> {
        match (state.tenant == self.number, state.running) {
            (true, true) => Ok(()),
            (true, false) => Err(MapError::Stopped),
            (false, _) => Err(MapError::Old),
        }
    }

    fn try_map(&self, area: &ShmemArea, fd: OwnedFd) -> Result<(), MapError> {
        let mut state = lock(&self.state.0);
        self.admitted(&state)?;
        let Placement { region, at, size, file_offset, protection } =
            state.judge.map(area, file_size(&fd))?;
        if !protection.is_open_for(&fd) {
            let _forgotten = state.judge.unmap(area);
            return Err(ShmemFault::NotOpened.into());
        }
        let Some(windows) = state.windows.clone() else {
            let _forgotten = state.judge.unmap(area);
            return Err(MapError::Stopped);
        };
        let piece = FileRange { fd: Arc::new(fd), offset: file_offset, size };
        let access = match protection {
            Protection::ReadOnly => Access::ReadOnly,
            Protection::ReadWrite => Access::ReadWrite,
        };
        let regions = self.state.downgrade();
        let vanished = Arc::new(move || {
            log::warn!("a backend made a file shorter that the guest sees: it is gone from there");
            // The guard is dropped without the lock.
            let gone = regions.upgrade().and_then(|state| lock(&state).shown.remove(&(region, at)));
            drop(gone);
        });
        match windows.show(region, at, &piece, access, vanished) {
            Ok(guard) => {
                state.shown.insert((region, at), guard);
                Ok(())
            }
            Err(error) => {
                let _forgotten = state.judge.unmap(area);
                Err(error.into())
            }
        }
    }

    fn try_unmap(&self, area: &ShmemArea) -> Result<(), MapError> {
        let mut state = lock(&self.state.0);
        self.admitted(&state)?;
        let gone = state.judge.unmap(area)?;
        let gone: Vec<_> = gone.into_iter().map(|at| state.shown.remove(&(area.shmid, at))).collect();
        drop(state);
        drop(gone);
        Ok(())
    }
}

#[cfg(test)]
#[path = "shared_memory_tests.rs"]
mod tests;
