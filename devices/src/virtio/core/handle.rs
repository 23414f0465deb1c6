//! A device shared between threads. Holds nothing but the lock.

use std::sync::{Arc, Mutex};

use crate::lock;
use crate::virtio::core::device::Device;
use crate::virtio::core::report::{DeviceStats, PhaseReport};
use crate::virtio::core::state::OnLoss;
use crate::virtio::core::status::Status;

/// A device shared by the bus (vCPU threads) and the control loop.
///
/// Each call takes the device's lock, and may hold it across one bounded exchange with the backend.
/// Must not be called on the thread that serves the backend's own requests: it could wait for itself.
#[derive(Debug, Clone)]
pub struct DeviceHandle(Arc<Mutex<Device>>);

impl DeviceHandle {
    /// Shares `device`.
    #[must_use]
    pub fn new(device: Device) -> Self {
        Self(Arc::new(Mutex::new(device)))
    }

    /// Does something with the device, under its lock.
    pub fn with<T>(&self, act: impl FnOnce(&mut Device) -> T) -> T {
        act(&mut lock(&self.0))
    }

    /// See [`Device::config_changed`].
    pub fn config_changed(&self) {
        self.with(Device::config_changed);
    }

    /// See [`Device::on_loss`].
    pub fn on_loss(&self, on_loss: OnLoss) {
        self.with(|device| device.on_loss(on_loss));
    }

    /// See [`Device::peer_lost`].
    pub fn peer_lost(&self, why: &str) {
        self.with(|device| device.peer_lost(why));
    }

    /// See [`Device::give_up`].
    pub fn give_up(&self, why: &str) {
        self.with(|device| device.give_up(why));
    }

    /// See [`Device::machine_reset`].
    pub fn machine_reset(&self) {
        self.with(Device::machine_reset);
    }

    /// See [`Device::shutdown`].
    pub fn shutdown(&self) {
        self.with(Device::shutdown);
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

    /// The status field.
    #[must_use]
    pub fn status(&self) -> Status {
        self.with(|device| device.registers().status())
    }
}
