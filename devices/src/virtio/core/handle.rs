//! A device shared between threads: its lock, and the two waits of a driver for work of the attendant. Must
//! never be called on the thread that serves the backends' own requests.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, TryLockError};
use std::time::Duration;

use transport::memory::MemoryMap;
use transport::vhost_user::Refused;

use crate::lock;
use crate::virtio::core::device::{Device, Listener, Parts};
use crate::virtio::core::registers::Reg;
use crate::virtio::core::report::{DeviceStats, PhaseReport};
use crate::virtio::core::state::Ask;
use crate::virtio::core::state::OnLoss;
use crate::virtio::core::status::Status;

/// A device shared by the bus (vCPU threads), its attendant and the control loop.
///
/// Each call takes the device's lock, and may hold the lock during one bounded exchange with the backend.
/// Must not be called on the thread that serves the backend's own requests: that thread could wait for
/// itself.
#[derive(Debug, Clone)]
pub struct DeviceHandle(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    device: Mutex<Device>,
    /// A search or a start is over.
    changed: Condvar,
    /// Shared with the device: we have cut its connection.
    cut: Arc<AtomicBool>,
}

impl DeviceHandle {
    /// A device at power-on that is on no board.
    ///
    /// # Errors
    /// See [`Device::new`].
    pub fn new(parts: Parts) -> io::Result<Self> {
        let device = Device::new(parts)?;
        let cut = Arc::clone(&device.cut);
        Ok(Self(Arc::new(Shared { device: Mutex::new(device), changed: Condvar::new(), cut })))
    }

    /// Calls `act` with the device, under its lock.
    pub fn with<T>(&self, act: impl FnOnce(&mut Device) -> T) -> T {
        act(&mut lock(&self.0.device))
    }

    /// The machine ends and cuts the connection to the backend, so the loss is not an error. Takes no lock.
    pub fn note_cut(&self) {
        self.0.cut.store(true, Ordering::Release);
    }

    /// See [`Device::write`]. A write to the status field may first wait, without the lock, for work of the
    /// attendant:
    /// - A reset waits while a backend starts the queues: one deadline at most.
    /// - `FEATURES_OK` on a broken device waits for the search, at most for the limit of
    ///   [`DeviceHandle::search_with`]. It does not wait when the lost backend was silent.
    pub fn write(&self, reg: Reg, value: u32) {
        let mut device = lock(&self.0.device);
        if reg == Reg::Status && value == 0 {
            device = self.after_start(device);
        } else if reg == Reg::Status && value & u32::from(Status::FEATURES_OK) != 0 {
            let limit = device.awaits_search().unwrap_or_default();
            let waits = |device: &mut Device| device.awaits_search().is_some();
            let waited = self.0.changed.wait_timeout_while(device, limit, waits);
            let (again, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
            device = again;
            if timeout.timed_out() {
                device.stop_waiting();
            }
        }
        device.write(reg, value);
    }

    /// Waits until no backend is starting the queues, and returns the locked device.
    fn after_start<'d>(
        &self,
        device: std::sync::MutexGuard<'d, Device>,
    ) -> std::sync::MutexGuard<'d, Device> {
        let waited = self.0.changed.wait_while(device, |device| device.is_starting());
        waited.unwrap_or_else(PoisonError::into_inner)
    }

    /// A search or a start is over.
    pub(crate) fn wake(&self) {
        self.0.changed.notify_all();
    }

    /// Gives the device a way to ask for another backend: after a loss, and at each reset of a broken device.
    /// After such a reset, the driver's FEATURES_OK waits for the outcome, for `limit` at most.
    pub fn search_with(&self, limit: Duration, ask: Ask) {
        self.with(|device| device.search_with(limit, ask));
    }

    /// See [`Device::config_changed`].
    pub fn config_changed(&self) {
        self.with(Device::config_changed);
    }

    /// See [`Device::on_loss`].
    pub fn on_loss(&self, on_loss: OnLoss) {
        self.with(|device| device.on_loss(on_loss));
    }

    /// Tells `listener` when the device loses its backend, breaks, or finds a backend again.
    pub fn listen(&self, listener: Listener) {
        self.with(|device| device.listener = Some(listener));
    }

    /// See [`Device::connection_ended`].
    pub fn connection_ended(&self) {
        self.with(Device::connection_ended);
    }

    /// See [`Device::peer_lost`].
    pub fn peer_lost(&self, why: &str) {
        self.with(|device| device.peer_lost(why));
    }

    /// See [`Device::give_up`].
    pub fn give_up(&self, why: &str) {
        self.with(|device| device.give_up(why));
    }

    /// See [`Device::machine_reset`]. Waits for a start that is under way.
    pub fn machine_reset(&self) {
        self.after_start(lock(&self.0.device)).machine_reset();
    }

    /// See [`Device::unplug`]. Waits for a start that is under way.
    pub fn unplug(&self) {
        self.after_start(lock(&self.0.device)).unplug();
    }

    /// See [`Device::end`]. Waits for a start that is under way.
    pub fn end(&self) {
        self.after_start(lock(&self.0.device)).end();
    }

    /// See [`Device::change_memory`].
    ///
    /// # Errors
    /// See there.
    pub fn change_memory(&self, memory: &MemoryMap) -> Result<(), Refused> {
        self.with(|device| device.change_memory(memory))
    }

    /// The machine pauses: running queues stop. Where the backend can, requests in flight stay in the
    /// inflight area for later. A device without a backend stays as it is. Waits for a start that is under
    /// way, and for the backend within its deadline.
    pub fn suspend(&self) {
        self.after_start(lock(&self.0.device)).suspend();
    }

    /// The machine goes on: suspended queues start where they stopped. Waits for the backend within its
    /// deadline.
    pub fn resume(&self) {
        self.with(Device::resume);
    }

    /// See [`Device::phase`].
    #[must_use]
    pub fn phase(&self) -> PhaseReport {
        self.with(|device| device.phase())
    }

    /// See [`Device::stats`].
    #[must_use]
    pub fn stats(&self) -> DeviceStats {
        self.with(|device| device.stats())
    }

    /// See [`Device::stats`]. Returns `None` while another thread holds the device's lock, perhaps during an
    /// exchange with the backend. Never waits.
    #[must_use]
    pub fn stats_now(&self) -> Option<DeviceStats> {
        match self.0.device.try_lock() {
            Ok(device) => Some(device.stats()),
            Err(TryLockError::Poisoned(device)) => Some(device.into_inner().stats()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// The status field.
    #[must_use]
    pub fn status(&self) -> Status {
        self.with(|device| device.registers().status())
    }
}
