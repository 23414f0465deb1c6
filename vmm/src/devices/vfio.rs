//! A PCI device of a vfio-user server between boots and on a board.
//!
//! `Spare → Placed` puts it on a board, `Placed → Spare` takes it off again, reset. Its connection lives as long as
//! the machine. A server that is lost leaves a broken device, which the guest is asked to let go of; it is on no board
//! that is built afterwards, while a device that the guest itself has switched off is on the next one again.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use arch::layout;
use devices::pci::hotplug::{Hotplug, Occupant};
use devices::pci::vfio_user::{self, Device, Opened, Remote};
use devices::pci::{DeviceNumber, Function, HostBridge};
use devices::ports::Ports;
use transport::memory::MemoryMap;
use transport::peer::Limits;
use transport::vfio_user::{Client, Receiver};

use crate::config::{Socket, VfioUser};
use crate::error::{Error, Fault};
use crate::stats::{DeviceStats, PciStats, PeerStats};

/// A device that is on no board.
pub(crate) struct Spare {
    id: String,
    number: DeviceNumber,
    remote: Arc<Remote>,
    hang_up: Arc<OwnedFd>,
}

/// A device on a board, or a broken one beside it.
pub(crate) struct Placed {
    spare: Spare,
    device: Option<Arc<Device>>,
    hotplug: Option<Arc<Hotplug>>,
}

impl Spare {
    /// Connects to the server within these limits, asks what its function is, and gives it guest memory. The receiver wants to be served
    /// from now on. `number` is the device's on every board.
    pub(crate) fn connect(
        config: VfioUser,
        id: String,
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
            .and_then(|client| vfio_user::open(client, id.clone(), config.wishes, memory));
        let Opened { remote, receiver, hang_up } = opened.map_err(|error| {
            let hint = error.hint();
            let failed = Error::new(Fault::Peer, cannot()).because(error);
            match hint {
                Some(hint) => failed.hint(hint),
                None => failed,
            }
        })?;
        log::info!("device {id}: {}", remote.contents.identity);
        Ok((Spare { id, number, remote, hang_up: Arc::new(hang_up) }, receiver))
    }

    /// Its name.
    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// What outlives its boards.
    pub(crate) fn remote(&self) -> &Arc<Remote> {
        &self.remote
    }

    /// Puts the device on a board, unless it is broken: who reads nothing but ones is not there.
    pub(crate) fn place(
        self,
        ports: &Ports,
        bridge: &HostBridge,
        hotplug: Option<&Arc<Hotplug>>,
    ) -> Result<Placed, Error> {
        let cannot = || format!("cannot wire device {}", self.id);
        if let Some(why) = self.remote.link.broken() {
            log::info!("device {} is not there any more: {why}", self.id);
            return Ok(Placed { spare: self, device: None, hotplug: None });
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
        Ok(Placed { spare: self, device: Some(device), hotplug: hotplug.cloned() })
    }

    /// The end: the server sees us go. What was counted over the device's whole life.
    pub(crate) fn finish(self) -> DeviceStats {
        let report = self.remote.report();
        let bars: Vec<_> = report.accesses.iter().take(6).copied().collect();
        let (config_reads, config_writes) = report.accesses.last().copied().unwrap_or_default();
        DeviceStats {
            id: self.id,
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
}

impl Placed {
    /// Hung up when the connection is gone.
    pub(crate) fn hang_up(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.spare.hang_up)
    }

    /// The connection is gone, of itself or as the device broke: the guest sees the device gone, and is asked to let
    /// go of it. Called by the control loop.
    pub(crate) fn hung_up(&self) {
        if let Some(device) = &self.device {
            device.give_up("the server closed the connection");
        }
        if let Some(hotplug) = &self.hotplug {
            hotplug.lost(self.spare.number);
        }
    }

    /// Takes all devices off their board at the same time: of several hung servers the deadline is waited for once.
    pub(crate) fn remove_all(placed: Vec<Placed>) -> Vec<Spare> {
        std::thread::scope(|scope| {
            let mut devices = placed.iter().filter_map(|placed| placed.device.as_deref());
            // One is as well retired here.
            let first = devices.next();
            for other in devices {
                let thread = std::thread::Builder::new().name("retire".to_owned());
                if let Err(error) = thread.spawn_scoped(scope, || other.retire()) {
                    log::debug!("a device is retired after the others: {error}");
                    other.retire();
                }
            }
            if let Some(first) = first {
                first.retire();
            }
        });
        placed.into_iter().map(|placed| placed.spare).collect()
    }
}
