//! A PCI device whose function a vfio-user server provides.
//!
//! The connection lives as long as the machine. A server that is lost leaves a broken device, which the guest is asked to
//! let go of; it is on no board that is built afterwards, while a device that the guest itself has switched off is on the
//! next one again.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arch::layout;
use devices::hang_up::HangUp;
use devices::pci::hotplug::{Hotplug, Occupant};
use devices::pci::vfio_user::{self, Device, Opened, Remote};
use devices::pci::{DeviceNumber, Function};
use devices::ports::Ports;
use transport::memory::MemoryMap;
use transport::peer::Limits;
use transport::vfio_user::{Client, Receiver};

use crate::config::{Socket, Transport, VfioUser};
use crate::devices::{DeviceId, MachineDevice, Notice, Site};
use crate::error::{Error, Fault};
use crate::stats::{DeviceStats, PciStats, PeerStats};

/// A device of a vfio-user server, for the machine's whole life.
pub(crate) struct VfioDevice {
    id: DeviceId,
    number: DeviceNumber,
    remote: Arc<Remote>,
    hang_up: HangUp,
    /// What [`VfioDevice::hang_up`] watches.
    _connection: OwnedFd,
    plugged: Mutex<Plugged>,
}

/// What the device has on a board.
#[derive(Default)]
struct Plugged {
    device: Option<Arc<Device>>,
    hotplug: Option<Arc<Hotplug>>,
}

impl VfioDevice {
    /// Connects to the server within these limits, asks what its function is, and gives it guest memory. The receiver wants to be served
    /// from now on. `number` is the device's on every board.
    pub(crate) fn connect(
        config: VfioUser,
        id: DeviceId,
        number: DeviceNumber,
        memory: &MemoryMap,
        limits: Limits,
    ) -> Result<(Self, Receiver), Error> {
        let cannot = || format!("cannot start device {id}");
        let client = match config.socket {
            Socket::Path(path) => Client::connect(&path, &limits),
            Socket::Inherited(stream, fd) => Client::from_stream(stream, &format!("fd {fd}"), &limits),
            Socket::Stream(stream) => Client::from_stream(stream, "on a connected socket", &limits),
        };
        let opened = client
            .map_err(vfio_user::OpenError::from)
            .and_then(|client| vfio_user::open(client, id.to_string(), config.wishes, memory));
        let Opened { remote, receiver, hang_up } = opened.map_err(|error| {
            let hint = error.hint();
            let failed = Error::new(Fault::Peer, cannot()).because(error);
            match hint {
                Some(hint) => failed.hint(hint),
                None => failed,
            }
        })?;
        log::info!("device {id}: {}", remote.contents.identity);
        let (connection, plugged) = (hang_up, Mutex::default());
        let hang_up = HangUp::new().map_err(|error| Error::host(cannot()).because(error))?;
        hang_up.watch(&connection).map_err(|error| Error::host(cannot()).because(error))?;
        Ok((VfioDevice { id, number, remote, hang_up, _connection: connection, plugged }, receiver))
    }

    /// What outlives its boards.
    pub(crate) fn remote(&self) -> &Arc<Remote> {
        &self.remote
    }

    fn plugged(&self) -> MutexGuard<'_, Plugged> {
        self.plugged.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MachineDevice for VfioDevice {
    fn id(&self) -> &DeviceId {
        &self.id
    }

    fn transport(&self) -> Transport {
        Transport::Pci
    }

    /// A broken device is on no board: what reads nothing but ones is not there.
    fn plug(&self, ports: &Ports, site: Site<'_>) -> Result<(), Error> {
        let cannot = || format!("cannot wire device {}", self.id);
        let Site::Pci(bridge, hotplug) = site else { return Err(Error::internal(cannot())) };
        if let Some(why) = self.remote.link.broken() {
            log::info!("device {} is not there any more: {why}", self.id);
            return Ok(());
        }
        let number = self.number;
        let pin = self.remote.contents.pin.and_then(|pin| layout::intx_gsi(number.get(), pin));
        let device = Device::new(Arc::clone(&self.remote), ports, bridge, pin.map(|gsi| gsi.0))
            .map_err(|error| Error::host(cannot()).because(error))?;
        let function: Arc<dyn Function> = device.clone();
        bridge.insert(Some(number), function).map_err(|error| Error::internal(cannot()).because(error))?;
        if let Some(hotplug) = hotplug {
            let occupant: Arc<dyn Occupant> = device.clone();
            hotplug.occupy(number, occupant);
        }
        log::info!("device {} is PCI device {number}", self.id);
        *self.plugged() = Plugged { device: Some(device), hotplug: hotplug.cloned() };
        Ok(())
    }

    fn unplug(&self) {
        let plugged = std::mem::take(&mut *self.plugged());
        plugged.device.iter().for_each(|device| device.retire());
    }

    fn watched(&self) -> Vec<(BorrowedFd<'_>, Notice)> {
        vec![(self.hang_up.as_fd(), Notice::HangUp)]
    }

    /// The connection is gone, of itself or as the device broke: the guest sees the device gone, and is asked to let
    /// go of it.
    fn notice(&self, _: Notice) {
        self.hang_up.take();
        let plugged = self.plugged();
        if let Some(device) = &plugged.device {
            device.give_up("the server closed the connection");
        }
        if let Some(hotplug) = &plugged.hotplug {
            hotplug.lost(self.number);
        }
    }

    fn stats(&self) -> DeviceStats {
        let report = self.remote.report();
        let bars: Vec<_> = report.accesses.iter().take(6).copied().collect();
        let (config_reads, config_writes) = report.accesses.last().copied().unwrap_or_default();
        DeviceStats {
            id: self.id.to_string(),
            kind: "vfio-user".to_owned(),
            state: match (&report.broken, report.ejected) {
                (Some(_), _) => "broken",
                (None, true) => "ejected",
                (None, false) => "idle",
            },
            broken: report.broken,
            requests_through_vmm: bars.iter().map(|(reads, writes)| reads + writes).sum(),
            recoveries: 0,
            register_writes: config_writes,
            peer: PeerStats {
                messages: report.server.messages,
                waits: report.server.waits,
                worst_wait_us: u64::try_from(report.server.worst_wait.as_micros()).unwrap_or(u64::MAX),
            },
            pci: Some(PciStats {
                identity: report.identity,
                bar_reads: bars.iter().map(|(reads, _)| *reads).collect(),
                bar_writes: bars.iter().map(|(_, writes)| *writes).collect(),
                config_reads,
                config_writes,
                refused: report.refused,
            }),
        }
    }

    /// The connection closes when the device is dropped.
    fn end(&self) {}
}
