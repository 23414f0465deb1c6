//! The parts of the guest that a backend reaches by requests of its own:
//! - shared memory regions, into which it maps pieces of its files (virtio 1.2 §2.10, vhost-user SHMEM_MAP
//!   and SHMEM_UNMAP);
//! - the notifications of a queue, over which it puts a page of its own (HOST_NOTIFIER);
//! - interrupts, by message (VRING_CALL).
//!
//! Only the present connection reaches anything, and only while its queues run. Everything that a connection
//! has shown ends with it. Called on the thread that serves the backends' channels; must never take a
//! device's lock.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, Weak};

use transport::peer::fds::{Protection, file_size};
use transport::vhost_user::message::ShmemArea;
use transport::vhost_user::shmem::{Placement, ShmemFault, ShmemRegions};
use transport::vhost_user::vring::Call;
use transport::vhost_user::{NotifierArea, Refused};

use crate::lock;
use crate::ports::{Access, DeviceMemory, FileRange, Guard, OnVanished, PortError};
use crate::virtio::types::model::SharedMemory;

/// Why a piece of a backend's file is not mapped.
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

/// The board's side: shows a backend's memory to the guest. Called on the thread that serves the backends'
/// channels.
pub trait Outlet: Send + Sync {
    /// Maps `piece` at `at` in the region with this id, until the guard is dropped. See
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

    /// Puts `page` over the notifications of a running queue, in place of an earlier page. The page stays
    /// until [`Outlet::take_notifier_back`], until the queue stops, or until the backend shortens its file.
    /// After that, the kick eventfd gets the notifications again.
    ///
    /// # Errors
    /// When the transport has no place for the page, the queue does not run, the range is not one page, or
    /// the machine refuses.
    fn show_notifier(&self, queue: u16, page: FileRange) -> Result<(), PortError>;

    /// Takes the page away: the kick eventfd gets the notifications again.
    fn take_notifier_back(&self, queue: u16);
}

/// An outlet with shared memory regions at guest addresses that never change, and no place for notifiers.
pub struct FixedOutlet {
    memory: Arc<dyn DeviceMemory>,
    places: Vec<Option<SharedMemory>>,
}

impl FixedOutlet {
    /// Makes the outlet of regions at `places`, by id, on a machine with `memory`.
    #[must_use]
    pub fn new(memory: Arc<dyn DeviceMemory>, places: Vec<Option<SharedMemory>>) -> Self {
        Self { memory, places }
    }
}

impl Outlet for FixedOutlet {
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

    fn show_notifier(&self, _: u16, _: FileRange) -> Result<(), PortError> {
        Err(PortError::new("show a notifier on this transport", std::io::ErrorKind::Unsupported.into()))
    }

    fn take_notifier_back(&self, _: u16) {}
}

/// The parts of the guest that the backends of one device may reach, for the device's whole life. All clones
/// share the same state.
///
/// Lock order: the device's lock, this lock, the transport's lock. This lock is held only briefly, with or
/// without the device's lock.
#[derive(Clone, Default)]
pub struct Outlets(Arc<Mutex<State>>);

/// The access of one connection. It reaches nothing once another connection has taken its place.
#[derive(Clone)]
pub struct Tenancy {
    state: Outlets,
    number: u64,
}

#[derive(Default)]
struct State {
    sizes: Vec<u64>,
    outlet: Option<Arc<dyn Outlet>>,
    /// The calls of the queues.
    calls: Vec<Call>,
    judge: ShmemRegions,
    shown: BTreeMap<(u8, u64), Guard>,
    /// Queues whose notifications a page of the backend covers or covered.
    notifiers: BTreeSet<u16>,
    /// The number of the connection that may act, and whether its queues run.
    tenant: u64,
    running: bool,
}

/// Maps and pages that were shown. They are taken away when this is dropped, after the lock is released.
#[must_use]
struct Shown {
    outlet: Option<Arc<dyn Outlet>>,
    notifiers: BTreeSet<u16>,
    _maps: BTreeMap<(u8, u64), Guard>,
}

impl Drop for Shown {
    fn drop(&mut self) {
        if let Some(outlet) = &self.outlet {
            self.notifiers.iter().for_each(|queue| outlet.take_notifier_back(*queue));
        }
    }
}

impl State {
    fn take_down(&mut self) -> Shown {
        self.judge = ShmemRegions::new(self.sizes.clone());
        self.running = false;
        let (notifiers, maps) = (std::mem::take(&mut self.notifiers), std::mem::take(&mut self.shown));
        Shown { outlet: self.outlet.clone(), notifiers, _maps: maps }
    }
}

impl Outlets {
    /// Makes the outlets of a device with shared memory regions of these sizes, by id; 0 where there is no
    /// region.
    #[must_use]
    pub fn new(sizes: Vec<u64>) -> Self {
        let judge = ShmemRegions::new(sizes.clone());
        Self(Arc::new(Mutex::new(State { sizes, judge, ..State::default() })))
    }

    /// The sizes of the regions, by id.
    #[must_use]
    pub fn sizes(&self) -> Vec<u64> {
        lock(&self.0).sizes.clone()
    }

    /// Sets the calls of the device's queues.
    pub(crate) fn set_calls(&self, calls: Vec<Call>) {
        lock(&self.0).calls = calls;
    }

    /// The device was put on a board with this outlet.
    pub fn put(&self, outlet: Arc<dyn Outlet>) {
        let before = lock(&self.0).outlet.replace(outlet);
        drop(before);
    }

    /// The device leaves its board: takes everything away.
    pub fn remove(&self) {
        let mut state = lock(&self.0);
        let (shown, outlet) = (state.take_down(), state.outlet.take());
        drop(state);
        drop((shown, outlet));
    }

    /// Gives access to a new connection. The access of the last connection ends.
    #[must_use]
    pub fn tenancy(&self) -> Tenancy {
        let mut state = lock(&self.0);
        let shown = state.take_down();
        state.tenant = state.tenant.wrapping_add(1);
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
    /// The queues are about to run: the backend may act.
    pub fn begin(&self) {
        let mut state = lock(&self.state.0);
        state.running |= state.tenant == self.number;
    }

    /// The queues have stopped, or the connection has ended: takes everything away.
    pub fn end(&self) {
        let mut state = lock(&self.state.0);
        if state.tenant == self.number {
            let shown = state.take_down();
            drop(state);
            drop(shown);
        }
    }

    /// Maps a piece of a file into a region, as the backend asks.
    ///
    /// # Errors
    /// When the area is outside its region, over another map or beyond the file; or when the connection may
    /// not act: its queues do not run, or another connection has taken its place.
    pub fn map(&self, area: &ShmemArea, fd: OwnedFd) -> Result<(), Refused> {
        self.try_map(area, fd).map_err(|error| self.refuse("map", area, &error))
    }

    /// Removes maps, as the backend asks.
    ///
    /// # Errors
    /// When nothing is mapped there, or only a part of a map would go.
    pub fn unmap(&self, area: &ShmemArea) -> Result<(), Refused> {
        self.try_unmap(area).map_err(|error| self.refuse("unmap", area, &error))
    }

    /// Interrupts the guest for a queue.
    ///
    /// # Errors
    /// When there is no such queue, or the connection may not act.
    pub fn call(&self, queue: u32) -> Result<(), Refused> {
        let state = lock(&self.state.0);
        self.admitted(&state).map_err(|_| Refused)?;
        let call = usize::try_from(queue).ok().and_then(|queue| state.calls.get(queue)).ok_or(Refused)?;
        call.ring().map_err(|_| Refused)
    }

    /// Puts a page of the backend over a queue's notifications, or takes the page back. The backend handles
    /// the guest's writes to that page by itself. The kick eventfd still takes all other kicks.
    ///
    /// # Errors
    /// When there is no place for the page: the backend goes on with kicks.
    pub fn notifier(&self, queue: u8, area: Option<NotifierArea>) -> Result<(), Refused> {
        let queue = u16::from(queue);
        let mut state = lock(&self.state.0);
        self.admitted(&state).map_err(|_| Refused)?;
        let outlet = state.outlet.clone().ok_or(Refused)?;
        let Some(NotifierArea { fd, size, offset }) = area else {
            outlet.take_notifier_back(queue);
            return Ok(());
        };
        let shown = outlet.show_notifier(queue, FileRange { fd: Arc::new(fd), offset, size });
        shown.map_err(|error| {
            log::debug!("a backend's notifier of queue {queue} is refused: {error}");
            Refused
        })?;
        state.notifiers.insert(queue);
        Ok(())
    }

    fn refuse(&self, what: &str, area: &ShmemArea, error: &MapError) -> Refused {
        let ShmemArea { shmid, shm_offset, len, .. } = area;
        let why = crate::chain(error);
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
        let Some(outlet) = state.outlet.clone() else {
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
            // The guard is dropped after the lock is released.
            let gone = regions.upgrade().and_then(|state| lock(&state).shown.remove(&(region, at)));
            drop(gone);
        });
        match outlet.show(region, at, &piece, access, vanished) {
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
#[path = "outlets_tests.rs"]
mod tests;
