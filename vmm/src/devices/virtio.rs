//! A virtio device between boots: its backend's connection and what the guest will see of it.
//!
//! `Detached → Attached` puts it on a board, `Attached → Detached` takes it off again with its queues stopped.

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use arch::platform::VirtioMmio;
use devices::bus::Bus;
use devices::pci::HostBridge;
use devices::pci::host_bridge::InsertError;
use devices::ports::Ports;
use devices::virtio::backend::Backend;
use devices::virtio::backend::requests::{Calls, NotifierPlace, OwnChannel};
use devices::virtio::backend::shared_memory::{FixedWindows, SharedRegions};
use devices::virtio::backend::vhost_user::{self, Opened};
use devices::virtio::recovery::revival::{Seeker, Trial};
use devices::virtio::ring::address::Iommu;
use devices::virtio::transport::mmio::{self, MmioDevice, Place};
use devices::virtio::types::table::Model;
use devices::virtio::{DeviceHandle, OnLoss, Parts, PciDevice, PhaseReport, Trapped};
use transport::memory::{GuestAddr, MemoryMap};
use transport::peer::socket::Listener;
use transport::peer::{Limits, Trace};
use transport::vhost_user::Connection;
use transport::vhost_user::vring::Kick;

use crate::config::{Role, Socket, Transport, VhostUser};
use crate::control::peers::Peers;
use crate::devices::recovery::{Meeting, Plan, Recovery};
use crate::devices::windows::Windows;
use crate::error::{Error, Fault};
use crate::stats::{DeviceStats, PeerStats};

/// Accesses that came to userspace while the queues ran, on all boards so far.
#[derive(Clone, Copy, Debug, Default)]
struct Counted {
    /// Kicks and acknowledgements of used buffers.
    requests: u64,
    /// Everything else.
    register_writes: u64,
    /// Backends that took over from a lost one.
    recoveries: u64,
}

/// What a device finds when it is made.
#[derive(Clone, Copy)]
pub(crate) struct Surroundings<'m> {
    /// Guest memory.
    pub(crate) memory: &'m MemoryMap,
    /// Who serves backends' own requests.
    pub(crate) peers: &'m Arc<Peers>,
    /// Who sees every message.
    pub(crate) trace: Option<&'m Arc<dyn Trace>>,
}

/// What a device takes from board to board.
struct Lasting {
    id: String,
    transport: Transport,
    model: Model,
    memory: MemoryMap,
    shared: SharedRegions,
    calls: Calls,
    notifiers: NotifierPlace,
    /// How its backend is found again, if it is to be.
    plan: Option<Arc<Plan>>,
    /// What was counted on earlier boards.
    counted: Counted,
}

/// A device that is on no board.
pub(crate) struct Detached {
    lasting: Lasting,
    backend: Box<dyn Backend>,
    hang_up: Arc<OwnedFd>,
    /// Whether it has a backend.
    state: Result<(), Lost>,
}

/// Why a device has no backend.
enum Lost {
    /// Another one is waited for.
    Recovering(String),
    /// It will not have one again.
    Broken(String),
}

/// Where on a board a device goes.
pub(crate) enum Site<'b> {
    /// A register page, and the bus for what misses it.
    Mmio(&'b VirtioMmio, &'b mut Bus),
    /// The PCI bus.
    Pci(&'b HostBridge),
}

/// A device on a board.
pub(crate) struct Attached {
    lasting: Lasting,
    /// Becomes ready when the connection is gone; another one with another backend.
    hang_up: RefCell<Arc<OwnedFd>>,
    recovery: RefCell<Option<Recovery>>,
    handle: DeviceHandle,
    /// Ring for the queues whose kicks we serve or pass on.
    kicks: Vec<(u16, Kick)>,
}

impl Detached {
    /// Connects to the backend and asks what it offers. `index` is the device's place in the configuration.
    /// The channel, if there is one, wants to be served from now on.
    pub(crate) fn connect(
        index: usize,
        config: VhostUser,
        others: &[Detached],
        machine: &Surroundings<'_>,
    ) -> Result<(Self, Option<OwnChannel>), Error> {
        let Surroundings { memory, peers, trace } = *machine;
        let mut order = config.order()?;
        let kind = order.device_type.name();
        let id = config.id.unwrap_or_else(|| format!("{kind}{index}"));
        if others.iter().any(|other| other.lasting.id == id) {
            return Err(
                Error::usage(format!("two devices are called {id}")).hint("give one of them another id=")
            );
        }
        let cannot = || format!("cannot start device {id}");
        let mut limits = Limits::new(config.deadline);
        if let Some(trace) = trace {
            limits = limits.traced(Arc::clone(trace));
        }
        let met = match (config.socket, config.role) {
            (Socket::Path(path), Role::Client) => Ok(Meeting::Client(path)),
            (Socket::Path(path), Role::Server) => {
                Ok(Meeting::Server(Listener::bind(&path).map_err(|error| {
                    Error::usage(format!("cannot listen for the backend of {id} on {}", path.display()))
                        .because(error)
                        .hint("is another machine listening there? else give a path that may be created")
                })?))
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
        let opened = connection.map_err(vhost_user::OpenError::from);
        if config.reconnect.is_some() {
            order = order.recoverable();
        }
        if config.transport == Transport::Pci {
            order = order.with_notifiers();
        }
        // Whoever asks for the feature by its name gets the translations that it takes.
        if let Some(iommu) = config.iommu.or(order.wants_iommu().then_some(Iommu::Identity)) {
            order = order.behind(Arc::new(iommu.map(memory)));
        }
        let opened = opened.and_then(|connection| vhost_user::open(connection, &order));
        let Opened { model, backend, channel, hang_up, reconnect, shared, calls, notifiers } = opened
            .map_err(|error| {
                let hint = error.hint();
                let failed = Error::new(Fault::Peer, cannot()).because(error);
                match hint {
                    Some(hint) => failed.hint(hint),
                    None => failed,
                }
            })?;
        log::info!("device {id}: {kind}, {} queue(s), features {:#x}", model.queues, model.features.bits());
        let (patience, peers) = (config.reconnect, Arc::clone(peers));
        let plan =
            meeting.map(|meeting| Arc::new(Plan { meeting, patience, limits, reconnect, index, peers }));
        let (transport, memory, counted) = (config.transport, memory.clone(), Counted::default());
        let lasting = Lasting { id, transport, model, memory, shared, calls, notifiers, plan, counted };
        let (backend, hang_up) = (Box::new(backend), Arc::new(hang_up));
        Ok((Detached { lasting, backend, hang_up, state: Ok(()) }, channel))
    }

    /// Finds places for the device's shared memory.
    pub(crate) fn place_shared_memory(&mut self, windows: &mut Windows) -> Result<(), Error> {
        if self.lasting.transport != Transport::Mmio {
            return Ok(());
        }
        for region in self.lasting.model.shared_memory.iter_mut().flatten() {
            let place = windows.take(region.length).ok_or_else(|| {
                Error::host(format!("cannot start device {}", self.lasting.id))
                    .because(format!("there is no room for {:#x} bytes of its shared memory", region.length))
                    .hint("features=-shmem does without")
            })?;
            region.base = GuestAddr(place);
            log::info!(
                "device {}: {:#x} bytes of shared memory at {place:#x}",
                self.lasting.id,
                region.length
            );
        }
        Ok(())
    }

    /// Its name.
    pub(crate) fn id(&self) -> &str {
        &self.lasting.id
    }

    /// How the guest sees it.
    pub(crate) fn transport(&self) -> Transport {
        self.lasting.transport
    }

    /// Puts the device on a board: its register page into memory and its other accesses on the bus, or its
    /// function on the PCI bus.
    pub(crate) fn attach(self, ports: &Ports, site: Site<'_>) -> Result<Attached, Error> {
        let Detached { lasting, backend, hang_up, state } = self;
        let Lasting { id, transport: _, model, memory, shared, calls, notifiers, plan, counted: _ } =
            &lasting;
        let cannot = || format!("cannot wire device {id}");
        let parts = Parts { name: id.clone(), model: model.clone(), backend, memory: memory.clone() };
        let failed = |error| Error::host(cannot()).because(error);
        let handle = match site {
            Site::Mmio(place, bus) => {
                let place = Place { base: GuestAddr(place.base.0), gsi: place.gsi.0 };
                let device = MmioDevice::new(parts, place, ports).map_err(failed)?;
                let handle = device.handle();
                let places = model.shared_memory.clone();
                shared.put(Arc::new(FixedWindows::new(Arc::clone(&ports.memory), places)));
                bus.insert(place.base.0, mmio::LENGTH, id.clone(), Arc::new(device))
                    .map_err(|error| Error::internal(cannot()).because(error))?;
                handle
            }
            Site::Pci(bridge) => {
                let number = bridge.free().ok_or_else(|| {
                    Error::usage(cannot()).because(InsertError::Full).hint("use transport=mmio for some")
                })?;
                let device = PciDevice::new(parts, number, bridge, ports).map_err(failed)?;
                let handle = device.handle();
                notifiers.put(Some(device.notifiers()));
                if let Some(windows) = device.windows() {
                    shared.put(windows);
                }
                bridge
                    .insert(Some(number), Arc::new(device))
                    .map_err(|error| Error::internal(cannot()).because(error))?;
                log::info!("device {id} is PCI device {number}");
                handle
            }
        };
        if let Some(plan) = plan {
            handle.on_loss(if plan.patience.is_some() { OnLoss::Recover } else { OnLoss::Break });
            let (peers, index) = (Arc::clone(&plan.peers), plan.index);
            handle.seek_with(Seeker {
                limit: plan.limits.deadline(),
                ask: Box::new(move |trial| peers.want(index, trial)),
            });
        }
        match state {
            Ok(()) => {}
            Err(Lost::Recovering(why)) => handle.peer_lost(&why),
            Err(Lost::Broken(why)) => handle.give_up(&why),
        }
        let (hang_up, recovery) = (RefCell::new(hang_up), RefCell::new(None));
        let kicks = handle.kicks_to_serve().map_err(|error| Error::host(cannot()).because(error))?;
        calls.put(handle.calls().map_err(|error| Error::host(cannot()).because(error))?);
        Ok(Attached { lasting, hang_up, recovery, handle, kicks })
    }

    /// The end: the backend sees us go. What was counted over the device's whole life.
    pub(crate) fn finish(mut self) -> DeviceStats {
        let peer = self.backend.stats();
        self.backend.disconnect();
        let (state, broken) = match self.state {
            Ok(()) => ("idle", None),
            Err(Lost::Recovering(_)) => ("recovering", None),
            Err(Lost::Broken(why)) => ("broken", Some(why)),
        };
        DeviceStats {
            state,
            kind: self.lasting.model.device_type.name().to_owned(),
            id: self.lasting.id,
            broken,
            recoveries: self.lasting.counted.recoveries,
            requests_through_vmm: self.lasting.counted.requests,
            register_writes: self.lasting.counted.register_writes,
            peer: PeerStats {
                messages: peer.messages,
                waits: peer.waits,
                worst_wait_us: u64::try_from(peer.worst_wait.as_micros()).unwrap_or(u64::MAX),
            },
            pci: None,
        }
    }
}

impl Attached {
    /// Readable or hung up when the connection is gone.
    pub(crate) fn hang_up(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.hang_up.borrow())
    }

    /// The connection is gone: the device breaks, or a thread looks for its backend. Called by the control loop.
    pub(crate) fn hung_up(&self) {
        self.handle.peer_lost("the backend closed the connection");
        let Some(plan) = &self.lasting.plan else { return };
        if !matches!(self.handle.phase(), PhaseReport::Recovering(_)) {
            return;
        }
        log::warn!("device {} lost its backend and looks for it", self.lasting.id);
        match Recovery::start(self.handle.clone(), Arc::clone(plan)) {
            // An earlier recovery has ended, or this one would not have been lost.
            Ok(recovery) => drop(self.recovery.replace(Some(recovery))),
            Err(error) => {
                self.handle.give_up(&format!("no thread can be had to look for the backend: {error}"));
            }
        }
    }

    /// The broken device was reset: a thread looks for its backend, once. Called by the control loop.
    ///
    /// Must not take the device's lock: a vCPU may hold it, and wait for what is started here.
    pub(crate) fn wanted(&self, trial: Trial) {
        let Some(plan) = &self.lasting.plan else { return };
        match Recovery::revive(self.handle.clone(), trial, Arc::clone(plan)) {
            // An earlier one has ended.
            Ok(recovery) => drop(self.recovery.replace(Some(recovery))),
            Err(error) => {
                log::error!("no thread can be had to look for the backend of {}: {error}", self.lasting.id);
            }
        }
    }

    /// What it takes to look for the backend of a broken device before its guest runs.
    pub(crate) fn second_chance(&self) -> Option<(Arc<Plan>, DeviceHandle, Trial)> {
        let plan = Arc::clone(self.lasting.plan.as_ref()?);
        Some((plan, self.handle.clone(), self.handle.begin_revival()?))
    }

    /// Another backend has taken over; `hang_up` is that of its connection. Called by the control loop.
    pub(crate) fn recovered(&self, hang_up: OwnedFd) {
        log::warn!("device {} has its backend again", self.lasting.id);
        drop(self.hang_up.replace(Arc::new(hang_up)));
    }

    /// Readable when a queue whose kicks we serve or pass on has something: for the control loop.
    pub(crate) fn kicks(&self) -> &[(u16, Kick)] {
        &self.kicks
    }

    /// For the control loop.
    pub(crate) fn handle(&self) -> &DeviceHandle {
        &self.handle
    }

    /// Ends the search for a backend, without waiting for that.
    pub(crate) fn stop_looking(&self) {
        self.recovery.borrow().iter().for_each(Recovery::stop);
    }

    /// Takes the device off its board: queues stopped, backend kept. The board's bus must be gone, or it
    /// keeps the register page alive.
    pub(crate) fn detach(self) -> Detached {
        let Attached { mut lasting, hang_up, recovery, handle, kicks: _ } = self;
        // Waits for the thread, whose exchange with a backend ends here.
        drop(recovery);
        let hang_up = hang_up.into_inner();
        handle.with(|device| {
            let stats = device.stats();
            let Trapped { queue_notify, interrupt_ack, config_ack, config, other } = stats.trapped;
            let Lasting { model, shared, calls, notifiers, counted, .. } = &mut lasting;
            counted.recoveries += stats.recoveries;
            counted.requests += queue_notify + interrupt_ack;
            counted.register_writes += config_ack + config + other;
            (model.features, model.config) = device.features_and_config();
            let backend = device.take_backend();
            let state = match device.phase() {
                PhaseReport::Broken(why) => Err(Lost::Broken(why)),
                PhaseReport::Recovering(why) => Err(Lost::Recovering(why)),
                PhaseReport::Idle | PhaseReport::Running | PhaseReport::NeedsReset(_) => Ok(()),
            };
            shared.remove();
            calls.put(Vec::new());
            notifiers.put(None);
            Detached { lasting, backend, hang_up, state }
        })
    }
}
