//! A virtio device between boots: its backend's connection and what the guest will see of it.
//!
//! `Detached → Attached` puts it on a board, `Attached → Detached` takes it off again with its queues stopped.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use arch::platform::VirtioMmio;
use devices::bus::Bus;
use devices::ports::Ports;
use devices::virtio::backend::Backend;
use devices::virtio::device::{DeviceHandle, Parts, PhaseReport, Trapped};
use devices::virtio::device_type::Model;
use devices::virtio::mmio::{self, MmioDevice, Place};
use devices::virtio::vhost_user::{self, Opened};
use transport::memory_map::{GuestAddr, MemoryMap};
use transport::vhost_user::{BackendChannel, Connection, Limits, Trace};

use crate::config::{Socket, VhostUser};
use crate::error::{Error, Fault};
use crate::stats::{DeviceStats, PeerStats};

/// Accesses that came to userspace while the queues ran, on all boards so far.
#[derive(Clone, Copy, Debug, Default)]
struct Counted {
    /// Kicks and acknowledgements of used buffers.
    requests: u64,
    /// Everything else.
    register_writes: u64,
}

/// A device that is on no board.
pub(crate) struct Detached {
    id: String,
    model: Model,
    backend: Box<dyn Backend>,
    memory: MemoryMap,
    hang_up: OwnedFd,
    /// Why it is broken, if it is.
    broken: Option<String>,
    /// What was counted on earlier boards.
    counted: Counted,
}

/// A device on a board.
pub(crate) struct Attached {
    id: String,
    model: Model,
    memory: MemoryMap,
    hang_up: OwnedFd,
    counted: Counted,
    handle: DeviceHandle,
}

impl Detached {
    /// Connects to the backend and asks what it offers. `index` is the device's place in the configuration.
    /// The channel, if there is one, wants to be served from now on.
    pub(crate) fn connect(
        index: usize,
        config: VhostUser,
        others: &[Detached],
        memory: &MemoryMap,
        trace: Option<&Arc<dyn Trace>>,
    ) -> Result<(Self, Option<BackendChannel>), Error> {
        let kind = config.order.device_type.name();
        let id = config.id.unwrap_or_else(|| format!("{kind}{index}"));
        if others.iter().any(|other| other.id == id) {
            return Err(
                Error::usage(format!("two devices are called {id}")).hint("give one of them another id=")
            );
        }
        let cannot = || format!("cannot start device {id}");
        let mut limits = Limits::new(config.deadline);
        if let Some(trace) = trace {
            limits = limits.traced(Arc::clone(trace));
        }
        let connection = match config.socket {
            Socket::Path(path) => Connection::connect(&path, &limits),
            Socket::Inherited(stream, fd) => Connection::from_stream(stream, format!("fd {fd}"), &limits),
            Socket::Stream(stream) => Connection::from_stream(stream, "on a connected socket", &limits),
        };
        let opened = connection.map_err(vhost_user::OpenError::from);
        let opened = opened.and_then(|connection| vhost_user::open(connection, &config.order));
        let Opened { model, backend, channel, hang_up, .. } = opened.map_err(|error| {
            let hint = error.hint();
            let failed = Error::new(Fault::Peer, cannot()).because(error);
            match hint {
                Some(hint) => failed.hint(hint),
                None => failed,
            }
        })?;
        log::info!("device {id}: {kind}, {} queue(s), features {:#x}", model.queues, model.features.bits());
        let device = Detached {
            id,
            model,
            backend: Box::new(backend),
            memory: memory.clone(),
            hang_up,
            broken: None,
            counted: Counted::default(),
        };
        Ok((device, channel))
    }

    /// Puts the device on a board: its register page into memory, its other accesses on the bus.
    pub(crate) fn attach(self, ports: &Ports, place: &VirtioMmio, bus: &mut Bus) -> Result<Attached, Error> {
        let Detached { id, model, backend, memory, hang_up, broken, counted } = self;
        let cannot = || format!("cannot wire device {id}");
        let place = Place { base: GuestAddr(place.base.0), gsi: place.gsi.0 };
        let parts = Parts { name: id.clone(), model: model.clone(), backend, memory: memory.clone() };
        let device =
            MmioDevice::new(parts, place, ports).map_err(|error| Error::host(cannot()).because(error))?;
        let handle = device.handle();
        if let Some(why) = broken {
            handle.peer_lost(&why);
        }
        bus.insert(place.base.0, mmio::LENGTH, id.clone(), Arc::new(device))
            .map_err(|error| Error::internal(cannot()).because(error))?;
        Ok(Attached { id, model, memory, hang_up, counted, handle })
    }

    /// The end: the backend sees us go. What was counted over the device's whole life.
    pub(crate) fn finish(mut self) -> DeviceStats {
        let peer = self.backend.stats();
        self.backend.disconnect();
        DeviceStats {
            state: if self.broken.is_some() { "broken" } else { "idle" },
            kind: self.model.device_type.name().to_owned(),
            id: self.id,
            broken: self.broken,
            requests_through_vmm: self.counted.requests,
            register_writes: self.counted.register_writes,
            peer: PeerStats {
                messages: peer.messages,
                waits: peer.waits,
                worst_wait_us: u64::try_from(peer.worst_wait.as_micros()).unwrap_or(u64::MAX),
            },
        }
    }
}

impl Attached {
    /// Readable or hung up when the connection is gone.
    pub(crate) fn hang_up(&self) -> BorrowedFd<'_> {
        self.hang_up.as_fd()
    }

    /// For the control loop.
    pub(crate) fn handle(&self) -> &DeviceHandle {
        &self.handle
    }

    /// Takes the device off its board: queues stopped, backend kept. The board's bus must be gone, or it
    /// keeps the register page alive.
    pub(crate) fn detach(self) -> Detached {
        let Attached { id, mut model, memory, hang_up, mut counted, handle } = self;
        handle.with(|device| {
            let Trapped { queue_notify, interrupt_ack, config_ack, config, other } = device.stats().trapped;
            counted.requests += queue_notify + interrupt_ack;
            counted.register_writes += config_ack + config + other;
            model.config = device.registers().config().to_vec();
            let backend = device.take_backend();
            let broken = match device.phase() {
                PhaseReport::Broken(why) | PhaseReport::Recovering(why) => Some(why),
                PhaseReport::Idle | PhaseReport::Running | PhaseReport::NeedsReset(_) => None,
            };
            Detached { id, model, backend, memory, hang_up, broken, counted }
        })
    }
}
