//! What a backend reaches of the guest by requests of its own: shared memory regions into which it has pieces of its
//! files mapped (virtio 1.2 §2.10, vhost-user SHMEM_MAP and SHMEM_UNMAP), pages of its own over a queue's notifications
//! (HOST_NOTIFIER), and calls by message (VRING_CALL). Only the present connection reaches anything, and only while its
//! queues run; what it showed ends with it. Called on the thread that serves the backends' channels; must never take a
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

/// What a board has for a device's backend to reach. Called on the thread that serves the backends' channels.
pub trait Outlet: Send + Sync {
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

    /// Shows `page` over the notifications of a running queue, in the place of an earlier one, until
    /// [`Outlet::take_notifier_back`], the stop of the queue, or the backend makes its file shorter: then the kick
    /// eventfd is there again.
    ///
    /// # Errors
    /// When the transport has no place for it, the queue does not run, it is not one page, or the machine refuses.
    fn show_notifier(&self, queue: u16, page: FileRange) -> Result<(), PortError>;

    /// Takes the page away: the kick eventfd is there again.
    fn take_notifier_back(&self, queue: u16);
}

/// Shared memory regions at guest addresses that never change, and no place for notifiers.
pub struct FixedOutlet {
    memory: Arc<dyn DeviceMemory>,
    places: Vec<Option<SharedMemory>>,
}

impl FixedOutlet {
    /// Regions at `places`, by id, of a machine with `memory`.
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

/// What the backends of one device may reach, for its whole life. Clones are the same.
///
/// Its lock is held for a moment, after the device's or without it, and before that of a transport.
#[derive(Clone, Default)]
pub struct Outlets(Arc<Mutex<State>>);

/// One connection's part of it: nothing, once another connection has taken its place.
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
    /// Queues that have a page of the backend's over their notifications, or had.
    notifiers: BTreeSet<u16>,
    /// The connection that may act, by number, and whether its queues run.
    tenant: u64,
    running: bool,
}

/// What was shown, to be taken away once the lock is released.
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
    /// Those of a device with shared memory regions of these sizes, by id; 0 where there is none.
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

    /// The calls of the device's queues.
    pub(crate) fn set_calls(&self, calls: Vec<Call>) {
        lock(&self.0).calls = calls;
    }

    /// The device is on a board with this outlet.
    pub fn put(&self, outlet: Arc<dyn Outlet>) {
        let before = lock(&self.0).outlet.replace(outlet);
        drop(before);
    }

    /// Takes everything off that board.
    pub fn remove(&self) {
        let mut state = lock(&self.0);
        let (shown, outlet) = (state.take_down(), state.outlet.take());
        drop(state);
        drop((shown, outlet));
    }

    /// Another connection takes the place of the last one, whose part ends.
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

    /// The queues have stopped, or the connection has ended: everything goes.
    pub fn end(&self) {
        let mut state = lock(&self.state.0);
        if state.tenant == self.number {
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

    /// Interrupts the guest for a queue.
    ///
    /// # Errors
    /// When there is no such queue, or nobody may say so.
    pub fn call(&self, queue: u32) -> Result<(), Refused> {
        let state = lock(&self.state.0);
        self.admitted(&state).map_err(|_| Refused)?;
        let call = usize::try_from(queue).ok().and_then(|queue| state.calls.get(queue)).ok_or(Refused)?;
        call.ring().map_err(|_| Refused)
    }

    /// Places a page of the backend's over a queue's notifications, or takes it back. The backend rings by itself what
    /// is written there; the kick eventfd stays its own for all else.
    ///
    /// # Errors
    /// When there is no place for it: the backend goes on with kicks.
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
            // The guard is dropped without the lock.
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
