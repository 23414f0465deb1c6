//! A PCI device whose function a vfio-user server provides.
//!
//! The connection to the server lives as long as the machine.
//!
//! * When the server is lost, the guest is asked to eject the function. Boards that are built afterwards do
//!   not have the function.
//! * When the guest itself has ejected the function, the next board has the function again.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};

use arch::layout;
use devices::hang_up::HangUp;
use devices::pci::hotplug::{Hotplug, Occupant};
use devices::pci::vfio_user::server::Gone;
use devices::pci::vfio_user::{self, Surveyed, VfioUserDevice};
use devices::pci::{DeviceNumber, Function};
use devices::ports::Ports;
use devices::virtio::PhaseReport;
use transport::memory::MemoryMap;
use transport::peer::Limits;
use transport::vfio_user::{Client, Receiver};

use crate::config::{Socket, Transport, VfioUser};
use crate::devices::{DeviceId, MachineDevice, Notice, Site};
use crate::error::{Error, Fault};
use crate::handle::Listeners;
use crate::stats::{DeviceStats, PciStats, PeerStats};

/// A server that is connected and has described its function.
pub(crate) struct Candidate {
    id: DeviceId,
    number: DeviceNumber,
    surveyed: Surveyed,
}

impl Candidate {
    /// Connects to the server within these limits, asks for the description of its function, and gives the
    /// server guest memory. `number` is the function's device number on every board.
    pub(crate) fn connect(
        config: VfioUser,
        id: DeviceId,
        number: DeviceNumber,
        memory: &MemoryMap,
        limits: Limits,
    ) -> Result<Self, Error> {
        let client = match config.socket {
            Socket::Path(path) => Client::connect(&path, &limits),
            Socket::Inherited(stream, fd) => Client::from_stream(stream, &format!("fd {fd}"), &limits),
            Socket::Stream(stream) => Client::from_stream(stream, "on a connected socket", &limits),
        };
        let surveyed = client
            .map_err(vfio_user::OpenError::from)
            .and_then(|client| vfio_user::survey(client, config.wishes, memory));
        let surveyed = surveyed.map_err(|error| {
            let hint = error.hint();
            Error::new(Fault::Peer, format!("cannot start device {id}")).because(error).hints(hint)
        })?;
        log::info!("device {id}: {}", surveyed.shape.identity);
        Ok(Candidate { id, number, surveyed })
    }

    /// The number of message vectors that the function's driver may use at once.
    pub(crate) fn vectors(&self) -> u16 {
        self.surveyed.shape.vectors()
    }

    /// Makes the device, with at most `vectors` message vectors. The caller must have the receiver served
    /// from now on.
    pub(crate) fn admit(
        self,
        vectors: u16,
        listeners: &Arc<Listeners>,
    ) -> Result<(VfioDevice, Receiver), Error> {
        let Candidate { id, number, surveyed } = self;
        let Surveyed { server, mut shape, regions, reset, receiver, hang_up: connection } = surveyed;
        shape.limit_vectors(vectors);
        shape.report(&id.to_string());
        let cannot = || Error::host(format!("cannot start device {id}"));
        let device = VfioUserDevice::new(id.to_string(), server, shape, regions, reset)
            .map_err(|error| cannot().because(error))?;
        let hang_up = HangUp::new().map_err(|error| cannot().because(error))?;
        hang_up.watch(&connection).map_err(|error| cannot().because(error))?;
        let hotplug = Mutex::default();
        Ok((VfioDevice { id, number, device, hang_up, hotplug, listeners: Arc::clone(listeners) }, receiver))
    }
}

/// A device of a vfio-user server, for the machine's whole life.
pub(crate) struct VfioDevice {
    id: DeviceId,
    number: DeviceNumber,
    device: Arc<VfioUserDevice>,
    hang_up: HangUp,
    /// Receivers of the event that the server is lost.
    listeners: Arc<Listeners>,
    /// The hot-plug registers of the present board.
    hotplug: Mutex<Option<Arc<Hotplug>>>,
}

impl VfioDevice {
    /// The function of the server, for the thread `peers`.
    pub(crate) fn function(&self) -> &Arc<VfioUserDevice> {
        &self.device
    }
}

impl MachineDevice for VfioDevice {
    fn id(&self) -> &DeviceId {
        &self.id
    }

    fn transport(&self) -> Transport {
        Transport::Pci
    }

    /// Puts the function on the board, unless its server is gone: such a function reads as all ones, so the
    /// guest would not find it.
    fn plug(&self, ports: &Ports, site: Site<'_>) -> Result<(), Error> {
        let (device, number, id) = (&self.device, self.number, &self.id);
        let cannot = || format!("cannot wire device {id}");
        let Site::Pci(bridge, hotplug) = site else { return Err(Error::internal(cannot())) };
        if device.link.is_gone() {
            log::info!("device {id} is not there any more");
            return Ok(());
        }
        let pin = device.shape.pin.and_then(|pin| layout::intx_gsi(number.get(), pin));
        device
            .plug(ports, bridge, pin.map(|gsi| gsi.0))
            .map_err(|error| Error::host(cannot()).because(error))?;
        let function: Arc<dyn Function> = device.clone();
        bridge.insert(Some(number), function).map_err(|error| Error::internal(cannot()).because(error))?;
        if let Some(hotplug) = hotplug {
            let occupant: Arc<dyn Occupant> = device.clone();
            hotplug.occupy(number, occupant);
        }
        log::info!("device {id} is PCI device {number}");
        *self.hotplug.lock().unwrap_or_else(PoisonError::into_inner) = hotplug.cloned();
        Ok(())
    }

    fn cut(&self) {
        self.device.link.ending();
        self.hang_up.cut();
    }

    fn unplug(&self) {
        self.hotplug.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.device.unplug();
    }

    fn watched(&self) -> Vec<(BorrowedFd<'_>, Notice)> {
        vec![(self.hang_up.as_fd(), Notice::HangUp)]
    }

    /// The connection is gone: the server closed it, or the device became broken. The guest sees a function
    /// that is gone and is asked to eject it.
    fn notice(&self, _: Notice) {
        self.hang_up.take();
        self.device.link.hung_up();
        self.device.tidy();
        if let Some(Gone::Broken(why)) = self.device.link.gone() {
            self.listeners.tell_of(self.device.link.name(), PhaseReport::Broken(why.clone()));
        }
        if let Some(hotplug) = &*self.hotplug.lock().unwrap_or_else(PoisonError::into_inner) {
            hotplug.lost(self.number);
        }
    }

    fn stats(&self) -> DeviceStats {
        let (link, counts, server) = (&self.device.link, self.device.counts(), self.device.link.stats());
        let [bars @ .., (config_reads, config_writes)] = counts.regions;
        let (state, broken) = match link.gone() {
            Some(Gone::Broken(why)) => ("broken", Some(why.clone())),
            Some(Gone::Removed) => ("removed", None),
            _ if self.device.is_ejected() => ("ejected", None),
            _ => ("idle", None),
        };
        DeviceStats {
            id: link.name().to_owned(),
            kind: "vfio-user".to_owned(),
            state,
            broken,
            requests_through_vmm: counts.requests,
            recoveries: 0,
            register_writes: config_writes,
            peer: PeerStats {
                messages: server.messages,
                waits: server.waits,
                worst_wait_us: u64::try_from(server.worst_wait.as_micros()).unwrap_or(u64::MAX),
            },
            pci: Some(PciStats {
                identity: self.device.shape.identity.to_string(),
                bar_reads: bars.iter().map(|(reads, _)| *reads).collect(),
                bar_writes: bars.iter().map(|(_, writes)| *writes).collect(),
                config_reads,
                config_writes,
                refused: link.refused(),
            }),
        }
    }

    fn ending(&self) {
        self.device.link.ending();
    }

    /// The connection closes when the device is dropped.
    fn end(&self) {}
}

/// Divides `routes` message interrupts among functions. `wanted` is the number that each function asks for. A
/// function that asks for few leaves more for the others.
pub(crate) fn shares(wanted: &[u16], routes: usize) -> Vec<u16> {
    let mut shares = wanted.to_vec();
    let mut smallest_first: Vec<_> = shares.iter_mut().collect();
    smallest_first.sort();
    let (mut routes, mut unserved) = (routes, wanted.len());
    for share in smallest_first {
        *share = (*share).min(u16::try_from(routes / unserved).unwrap_or(u16::MAX));
        (routes, unserved) = (routes - usize::from(*share), unserved - 1);
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::shares;

    #[test]
    fn functions_share_what_there_is_and_those_that_want_few_have_it_all() {
        assert!(shares(&[], 100).is_empty());
        assert_eq!(shares(&[2048, 3, 2048], 4056), [2026, 3, 2027]);
        assert_eq!(shares(&[2048, 4], 4056), [2048, 4]);
        assert_eq!(shares(&[2048; 31], 4056).iter().map(|share| usize::from(*share)).sum::<usize>(), 4056);
        assert_eq!(shares(&[0, 1, 5], 0), [0, 0, 0]);
    }
}
