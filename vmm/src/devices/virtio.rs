//! A virtio device whose queues a vhost-user backend serves.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use devices::hang_up::HangUp;
use devices::pci::host_bridge::InsertError;
use devices::ports::Ports;
use devices::virtio::attendant::{Attendant, Job};
use devices::virtio::backend::vhost_user::OpenError;
use devices::virtio::recovery::candidate::{self, Opened};
use devices::virtio::recovery::search::{Meeting, Search};
use devices::virtio::ring::address::Iommu;
use devices::virtio::transport::mmio::{self, MmioDevice, Place};
use devices::virtio::types::model::SharedMemory;
use devices::virtio::{self, DeviceHandle, OnLoss, Parts, PciDevice, PhaseReport, Trapped};
use transport::memory::{GuestAddr, MemoryMap};
use transport::peer::socket::Listener;
use transport::peer::{Limits, Trace};
use transport::vhost_user::Connection;
use transport::vhost_user::vring::Kick;

use crate::config::{Role, Socket, Transport, VhostUser};
use crate::devices::peers::Peers;
use crate::devices::windows::Windows;
use crate::devices::{DeviceId, MachineDevice, Notice, Site};
use crate::error::{Error, Fault};
use crate::handle::Listeners;
use crate::stats::{DeviceStats, PeerStats};

/// The parts of the machine that a virtio device needs when it is made.
pub(crate) struct Surroundings<'m> {
    /// Guest memory.
    pub(crate) memory: &'m MemoryMap,
    /// The thread that serves backends' own requests.
    pub(crate) peers: &'m Arc<Peers>,
    /// Receiver of every message exchanged with the backend.
    pub(crate) trace: Option<&'m Arc<dyn Trace>>,
    /// Addresses for the shared memory of virtio-mmio devices.
    pub(crate) windows: &'m mut Windows,
    /// Receivers of the events of the device.
    pub(crate) listeners: &'m Arc<Listeners>,
}

/// A virtio device, for the machine's whole life.
pub(crate) struct VirtioDevice {
    id: DeviceId,
    transport: Transport,
    handle: DeviceHandle,
    attendant: Arc<Attendant>,
    hang_up: Arc<HangUp>,
    /// The eventfds of the queues whose kicks come to this process. The VMM serves these queues itself or
    /// passes their kicks on.
    kicks: Vec<(u16, Kick)>,
    /// The newest statistics that could be read without waiting for a lock.
    published: Mutex<virtio::DeviceStats>,
}

impl VirtioDevice {
    /// Connects to the backend, asks what it offers, and makes the device from the answers. `index` is the
    /// device's place in the configuration.
    ///
    /// # Errors
    /// When the backend fails or does not fit.
    pub(crate) fn connect(
        index: usize,
        config: VhostUser,
        machine: &mut Surroundings<'_>,
    ) -> Result<Self, Error> {
        let Surroundings { memory, peers, trace, windows, listeners } = machine;
        let mut order = config.order()?;
        let kind = order.device_type.name();
        let id = DeviceId::from(config.id.unwrap_or_default());
        let cannot = || format!("cannot start device {id}");
        let mut limits = Limits::new(config.deadline).admitting(config.admission);
        if let Some(trace) = trace {
            limits = limits.traced(Arc::clone(trace));
        }
        let met = match (config.socket, config.role) {
            (Socket::Path(path), Role::Client) => Ok(Meeting::Client(path)),
            (Socket::Path(path), Role::Server) => {
                let listener = Listener::bind_for(&path, config.admission);
                let whom = || format!("the backend of {id}");
                Ok(Meeting::Server(listener.map_err(|error| Error::listening(&whom(), &path, error))?))
            }
            (Socket::Inherited(stream, fd), _) => Err((stream, format!("fd {fd}"))),
            (Socket::Stream(stream), _) => Err((stream, "on a connected socket".to_owned())),
        };
        let (meeting, connection) = match met {
            Ok(meeting) => {
                let connection = meeting.first(&limits, config.reconnect);
                (Some(meeting), connection)
            }
            Err((stream, name)) => (None, Connection::from_stream(stream, name, &limits)),
        };
        let opened = connection.map_err(OpenError::from);
        if config.reconnect.is_some() {
            order = order.recoverable();
        }
        if config.transport == Transport::Pci {
            order = order.with_notifiers();
        }
        // A user who asks for the feature by its name gets the translations that the feature needs.
        if let Some(iommu) = config.iommu.or(order.wants_iommu().then_some(Iommu::Identity)) {
            order = order.behind(Arc::new(iommu.map(memory)));
        }
        let opened = opened.and_then(|connection| candidate::open(connection, &order));
        let Opened { mut model, backend, channel, hang_up, reconnect, outlets } =
            opened.map_err(|error| {
                let hint = error.hint();
                Error::new(Fault::Peer, cannot()).because(error).hints(hint)
            })?;
        log::info!("device {id}: {kind}, {} queue(s), features {:#x}", model.queues, model.features.bits());
        if config.transport == Transport::Mmio {
            place_shared_memory(&id, &mut model.shared_memory, windows)?;
        }
        let no_fd = |error| Error::host(cannot()).because(error);
        let service = devices::virtio::served::service_of(&model);
        let parts = Parts {
            name: id.to_string(),
            model,
            backend: Box::new(backend),
            outlets,
            memory: memory.clone(),
            service,
        };
        let handle = DeviceHandle::new(parts).map_err(no_fd)?;
        if meeting.is_some() && config.reconnect.is_some() {
            handle.on_loss(OnLoss::Recover);
        }
        let (name, hear) = (id.clone(), Arc::clone(listeners));
        handle.listen(Box::new(move |state| hear.tell_of(&name.to_string(), state)));
        let kicks = handle.kicks_to_serve().map_err(no_fd)?;
        let serves = Arc::clone(peers);
        let serve = move |channel| {
            if let Err(error) = serves.add(index, channel) {
                log::error!("the backend's own requests are not answered: {error}");
            }
        };
        let patience = config.reconnect.unwrap_or(Duration::ZERO);
        let search =
            meeting.map(|meeting| Search { meeting, patience, limits, reconnect, serve: Box::new(serve) });
        let attendant = Attendant::new(id.to_string(), handle.clone(), search);
        let weak = Arc::downgrade(&attendant);
        peers.attend(index, move |job| weak.upgrade().is_some_and(|attendant| attendant.post(job)));
        if let Some(channel) = channel {
            peers.add(index, channel).map_err(no_fd)?;
        }
        let transport = config.transport;
        let published = Mutex::new(handle.stats());
        Ok(VirtioDevice { id, transport, handle, attendant, hang_up, kicks, published })
    }
}

/// Finds places for the shared memory regions of a virtio-mmio device.
fn place_shared_memory(
    id: &DeviceId,
    regions: &mut [Option<SharedMemory>],
    windows: &mut Windows,
) -> Result<(), Error> {
    for region in regions.iter_mut().flatten() {
        let place = windows.take(region.length).ok_or_else(|| {
            Error::host(format!("cannot start device {id}"))
                .because(format!("there is no room for {:#x} bytes of its shared memory", region.length))
                .hint("features=-shmem does without")
        })?;
        region.base = GuestAddr(place);
        log::info!("device {id}: {:#x} bytes of shared memory at {place:#x}", region.length);
    }
    Ok(())
}

impl MachineDevice for VirtioDevice {
    fn id(&self) -> &DeviceId {
        &self.id
    }

    fn transport(&self) -> Transport {
        self.transport
    }

    fn plug(&self, ports: &Ports, site: Site<'_>) -> Result<(), Error> {
        let id = &self.id;
        let cannot = || format!("cannot wire device {id}");
        let failed = |error| Error::host(cannot()).because(error);
        match site {
            Site::Mmio(place, bus) => {
                let place = Place { base: GuestAddr(place.base.0), gsi: place.gsi.0 };
                let device = MmioDevice::new(&self.handle, place, ports).map_err(failed)?;
                bus.insert(place.base.0, mmio::LENGTH, id.to_string(), Arc::new(device))
                    .map_err(|error| Error::internal(cannot()).because(error))?;
            }
            Site::Pci(bridge, _) => {
                let number = bridge.free().ok_or_else(|| {
                    Error::usage(cannot()).because(InsertError::Full).hint("use transport=mmio for some")
                })?;
                let device = PciDevice::new(&self.handle, number, bridge, ports).map_err(failed)?;
                bridge
                    .insert(Some(number), Arc::new(device))
                    .map_err(|error| Error::internal(cannot()).because(error))?;
                log::info!("device {id} is PCI device {number}");
            }
        }
        Ok(())
    }

    /// Ends a running attempt to reach a backend, which may hang. The search for a backend goes on
    /// afterwards.
    fn hurry(&self) {
        self.attendant.interrupt();
    }

    fn cut(&self) {
        self.handle.note_cut();
        self.attendant.stop();
        self.hang_up.cut();
    }

    fn unplug(&self) {
        self.handle.unplug();
    }

    fn watched(&self) -> Vec<(BorrowedFd<'_>, Notice)> {
        let kicks = self.kicks.iter().map(|(queue, kick)| (kick.as_fd(), Notice::Kick(*queue)));
        std::iter::once((self.hang_up.as_fd(), Notice::HangUp)).chain(kicks).collect()
    }

    fn notice(&self, notice: Notice) {
        match notice {
            Notice::HangUp => {
                self.hang_up.take();
                self.attendant.post(Job::HungUp);
            }
            Notice::Kick(queue) => {
                let kick = self.kicks.iter().find(|(kicked, _)| *kicked == queue);
                if let Some(Err(error)) = kick.map(|(_, kick)| kick.take()) {
                    log::warn!("device {}: cannot read the eventfd of queue {queue}: {error}", self.id);
                }
                self.attendant.post(Job::Kick(queue));
            }
        }
    }

    fn stats(&self) -> DeviceStats {
        let mut published = self.published.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stats) = self.handle.stats_now() {
            *published = stats;
        }
        let stats = published.clone();
        drop(published);
        let Trapped { queue_notify, interrupt_ack, config_ack, config, other } = stats.trapped;
        let (state, broken) = match stats.phase {
            PhaseReport::Idle
            | PhaseReport::Running
            | PhaseReport::Suspended
            | PhaseReport::NeedsReset(_) => ("idle", None),
            PhaseReport::Recovering(_) => ("recovering", None),
            PhaseReport::Broken(why) => ("broken", Some(why)),
        };
        DeviceStats {
            state,
            kind: stats.kind.to_owned(),
            id: self.id.to_string(),
            broken,
            recoveries: stats.recoveries,
            requests_through_vmm: queue_notify + interrupt_ack,
            register_writes: config_ack + config + other,
            peer: PeerStats {
                messages: stats.backend.messages,
                waits: stats.backend.waits,
                worst_wait_us: u64::try_from(stats.backend.worst_wait.as_micros()).unwrap_or(u64::MAX),
            },
            pci: None,
        }
    }

    fn end(&self) {
        self.attendant.end();
        self.handle.end();
    }
}

impl Drop for VirtioDevice {
    fn drop(&mut self) {
        self.attendant.end();
    }
}
