//! The machine's devices: made once, plugged into the board of each boot.

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

/// A device's name, which the user chose or which follows from its type and number. Stable for the machine's life.
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

/// Where on a board a device is plugged in.
pub(crate) enum Site<'b> {
    /// A register page, and the bus for the accesses that the page does not answer.
    Mmio(&'b VirtioMmio, &'b mut Bus),
    /// The PCI bus, and the registers that tell the guest that a function is gone.
    Pci(&'b HostBridge, Option<&'b Arc<Hotplug>>),
}

/// What a descriptor that the control loop watches is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Notice {
    /// The connection to the peer is gone.
    HangUp,
    /// The guest kicked a queue whose kicks do not reach a backend by themselves.
    Kick(u16),
}

/// A device of the machine. Called on the control thread, but for what its transport calls on vCPU threads.
pub(crate) trait MachineDevice: Send + Sync {
    /// Its name.
    #[allow(dead_code, reason = "for events, to come")]
    fn id(&self) -> &DeviceId;

    /// How the guest sees it.
    fn transport(&self) -> Transport;

    /// Puts the device on a board.
    ///
    /// # Errors
    /// When the machine refuses, or the board has no room.
    fn plug(&self, ports: &Ports, site: Site<'_>) -> Result<(), Error>;

    /// Asks that nothing be waited for that [`MachineDevice::unplug`] would wait for. Never waits.
    fn hurry(&self) {}

    /// The machine ends now: ends the connection to the peer, and every one that follows, so that whoever waits for the peer
    /// comes back. Never waits.
    fn cut(&self);

    /// Takes the device off its board: queues stopped, registers as at power-on. The board's buses must be gone, or they
    /// keep the register page alive. Waits for the peer, for its deadline at most.
    fn unplug(&self);

    /// The descriptors that the control loop watches, the same ones for the machine's whole life.
    fn watched(&self) -> Vec<(BorrowedFd<'_>, Notice)>;

    /// One of the watched descriptors is readable. Never waits.
    fn notice(&self, notice: Notice);

    /// What was counted over the device's whole life.
    fn stats(&self) -> DeviceStats;

    /// The machine ends: the device is about to be unplugged for the last time. Never waits.
    fn ending(&self) {}

    /// The machine ends: the peer sees us go. Called once the device is unplugged.
    fn end(&self);
}

/// All devices of a machine, in the order of the configuration: the virtio devices first.
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

    /// Does something with all devices at the same time, each on a thread of its own: of several hung peers the deadline is
    /// waited for once. Does not wait.
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

/// What devices do apart.
#[derive(Default)]
pub(crate) struct Pending(Arc<()>);

impl Pending {
    /// Whether all are through.
    pub(crate) fn is_done(&self) -> bool {
        Arc::strong_count(&self.0) == 1
    }
}
