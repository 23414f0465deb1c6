//! The machine's devices. Each device is made once, for the machine's whole life, and plugged into the board
//! of each boot.

pub(crate) mod peers;
mod shared_objects;
pub(crate) mod vfio;
pub(crate) mod virtio;
pub(crate) mod windows;

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use arch::platform::VirtioMmio;
use devices::bus::Bus;
use devices::pci::{HostBridge, Hotplug};
use devices::ports::Ports;

use crate::config::Transport;
use crate::error::Error;
use crate::stats::DeviceStats;

/// A device's name. The user chose it, or it follows from the device's type and number. It stays the same for
/// the machine's life.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct DeviceId(Arc<str>);

impl From<String> for DeviceId {
    fn from(name: String) -> Self {
        DeviceId(name.into())
    }
}

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The place on a board where a device is plugged in.
pub(crate) enum Site<'b> {
    /// A page of virtio-mmio registers, and the bus for the accesses that need the device model.
    Mmio(&'b VirtioMmio, &'b mut Bus),
    /// The PCI bus, and the hot-plug registers that tell the guest that a function is gone.
    Pci(&'b HostBridge, Option<&'b Arc<Hotplug>>),
}

/// The event that a watched descriptor reports.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Notice {
    /// The connection to the peer is gone.
    HangUp,
    /// The guest kicked a queue whose kicks do not go to a backend directly.
    Kick(u16),
}

/// A device of the machine. The control thread calls these methods. The device's transport is called on vCPU
/// threads.
pub(crate) trait MachineDevice: Send + Sync {
    /// Its name.
    #[allow(dead_code, reason = "for events, to come")]
    fn id(&self) -> &DeviceId;

    /// The transport by which the guest sees the device.
    fn transport(&self) -> Transport;

    /// Puts the device on a board.
    ///
    /// # Errors
    /// When the machine refuses, or the board has no room.
    fn plug(&self, ports: &Ports, site: Site<'_>) -> Result<(), Error>;

    /// Shortens the waits of a following [`MachineDevice::unplug`]. Never waits.
    fn hurry(&self) {}

    /// The machine ends now. Closes the connection to the peer, and every later connection, so that a thread
    /// that waits for the peer returns. Never waits.
    fn cut(&self);

    /// Takes the device off its board: stops its queues and puts its registers into their state at power-on.
    /// The board's buses must be gone before, because they keep the register page alive. Waits for the peer,
    /// at most for the peer's deadline.
    fn unplug(&self);

    /// The descriptors that the control loop watches. They stay the same for the machine's whole life.
    fn watched(&self) -> Vec<(BorrowedFd<'_>, Notice)>;

    /// One of the watched descriptors is readable. Never waits.
    fn notice(&self, notice: Notice);

    /// The statistics over the device's whole life.
    fn stats(&self) -> DeviceStats;

    /// The machine is ending. Called before the device is unplugged for the last time. Never waits.
    fn ending(&self) {}

    /// Ends the connection to the peer in order. Called when the machine ends, after the device is unplugged.
    fn end(&self);
}

/// All devices of a machine. The virtio devices come first, then the vfio-user servers' devices, each in the
/// order of the configuration.
#[derive(Clone, Default)]
pub(crate) struct DeviceList(Vec<Arc<dyn MachineDevice>>);

impl DeviceList {
    /// Adds a device.
    pub(crate) fn push(&mut self, device: impl MachineDevice + 'static) {
        self.0.push(Arc::new(device));
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<dyn MachineDevice>> {
        self.0.iter()
    }

    /// Calls `act` for all devices at the same time, each on a thread of its own, so that several hung peers
    /// cost one deadline and not the sum. Does not wait for the threads.
    pub(crate) fn apart(&self, act: fn(&dyn MachineDevice)) -> Pending {
        self.iter().for_each(|device| device.hurry());
        let pending = Pending::default();
        for device in self.iter() {
            let (device, left) = (Arc::clone(device), Arc::clone(&pending.0));
            let work = move || {
                act(&*device);
                drop(left);
            };
            let thread = std::thread::Builder::new().name(format!("attend {}", self.0.len()));
            if let Err(error) = thread.stack_size(256 << 10).spawn(work) {
                log::error!("no thread can be had for a device: {error}");
            }
        }
        pending
    }
}

/// Work that the threads of [`DeviceList::apart`] have not finished.
#[derive(Default)]
pub(crate) struct Pending(Arc<()>);

impl Pending {
    /// Whether every thread has finished.
    pub(crate) fn is_done(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }
}
