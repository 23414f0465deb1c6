//! A virtio device, the same for every type and every transport: its registers, backend and phase. It carries
//! out the effects of register writes. `start` has the start and stop of queues; `vacancy` has the loss of
//! the backend. Must never touch a ring, wait without a bound, or know an offset of a transport.

use std::collections::BTreeSet;
use std::error::Error;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use transport::memory::MemoryMap;
use transport::vhost_user::features::{DriverFeatures, ProtocolFeatures};
use transport::vhost_user::message::Uuid;
use transport::vhost_user::vring::Call;
use transport::vhost_user::{InflightArea, Refused};

use crate::ports::{Guard, PortError};
use crate::virtio::backend::outlets::{Outlet, Outlets};
use crate::virtio::backend::{Backend, BackendError, failed};
use crate::virtio::core::face::Face;
use crate::virtio::core::queues::Wiring;
use crate::virtio::core::registers::{Effect, Identity, Refusal, Reg, Registers};
use crate::virtio::core::state::{OnLoss, Phase, Seeker};
use crate::virtio::types::model::{ConfigSource, Model};
use crate::virtio::types::table::DeviceType;

pub use crate::virtio::core::report::{DeviceStats, PhaseReport, Trapped};

/// "OUTB": the vendor id that drivers can read.
const VENDOR_ID: u32 = u32::from_le_bytes(*b"OUTB");

/// VIRTIO_NET_F_GUEST_ANNOUNCE.
const NET_F_GUEST_ANNOUNCE: u32 = 21;

/// Why a device cannot be plugged into a board.
#[derive(Debug, thiserror::Error)]
pub enum PlugError {
    /// No eventfd can be made.
    #[error("cannot make an eventfd")]
    Eventfd(#[source] io::Error),
    /// The machine refused an interrupt, a page or a doorbell.
    #[error("cannot connect the device to the machine")]
    Port(#[from] PortError),
    /// The transport has no room for the device.
    #[error("cannot describe the device to the guest")]
    Describe(#[source] Box<dyn Error + Send + Sync>),
}

/// The state of a device that exists only on a board.
pub(crate) struct Plugged {
    pub(crate) transport: Box<dyn Face>,
    _config_route: Guard,
}

/// Called when a device's phase changes, with the device's lock held; must not wait.
pub type Listener = Box<dyn Fn(PhaseReport) + Send>;

/// The VMM's own server for one queue, in place of the backend. Called on the attendant's thread. The
/// device's lock is held for one request, so for at most one deadline of the backend.
pub trait Service: Send {
    /// The number of the served queue, for a driver that took `features`.
    fn queue(&self, features: DriverFeatures) -> u16;

    /// The driver has set the queues up anew.
    fn reset(&mut self);

    /// A backend has started the queues: the first backend, or another one.
    fn started(&mut self);

    /// The driver resets a running device.
    fn end(&mut self, backend: &mut dyn Backend);

    /// Another backend took over. Returns the reason if the driver cannot go on.
    fn replaced(&mut self) -> Option<&'static str>;

    /// Whether requests are answered without a backend. A driver may busy-wait for the answer, and then
    /// blocks every other change of the guest's network.
    fn answers_alone(&self) -> bool;

    /// Serves one request of `device`. Returns whether there are more requests.
    ///
    /// # Errors
    /// When the contents of the ring are not valid.
    fn serve(&mut self, device: &mut Device, queue: u16) -> io::Result<bool>;
}

/// A virtio device. It lives as long as the machine. A board plugs it into a transport and unplugs it again.
pub struct Device {
    pub(crate) name: String,
    device_type: DeviceType,
    pub(crate) config_source: ConfigSource,
    pub(crate) registers: Registers,
    pub(crate) backend: Box<dyn Backend>,
    /// The inflight area of the backend that runs or was cut off.
    pub(crate) inflight: Option<Arc<InflightArea>>,
    outlets: Outlets,
    pub(crate) plugged: Option<Plugged>,
    pub(crate) memory: MemoryMap,
    pub(crate) wiring: Wiring,
    config_call: Call,
    pub(crate) phase: Phase,
    pub(crate) on_loss: OnLoss,
    pub(crate) listener: Option<Listener>,
    pub(crate) seeker: Option<Seeker>,
    /// The VMM's server of a queue, in place of the backend.
    pub(crate) service: Option<Box<dyn Service>>,
    /// The machine has ended: no other backend may be taken.
    pub(crate) retired: bool,
    /// The machine is ending and has cut the connection to the backend itself.
    pub(crate) cut: Arc<AtomicBool>,
    trapped: Trapped,
    pub(crate) activations: u64,
    pub(crate) resets: u64,
    pub(crate) recoveries: u64,
    config_interrupts: u64,
    pub(crate) noted: BTreeSet<&'static str>,
}

/// The parts of a device, except for its transport.
pub struct Parts {
    /// The user's name for the device.
    pub name: String,
    /// What the guest sees.
    pub model: Model,
    /// The backend that serves its queues.
    pub backend: Box<dyn Backend>,
    /// What the backend may reach in the guest by requests of its own.
    pub outlets: Outlets,
    /// Guest memory.
    pub memory: MemoryMap,
    /// The server of the last queue, when the VMM serves it in place of the backend.
    pub service: Option<Box<dyn Service>>,
}

impl Device {
    /// A device at power-on that is on no board.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn new(parts: Parts) -> io::Result<Self> {
        let Parts { name, model, backend, outlets, memory, service } = parts;
        let Model { device_type, features, queues, queue_size, config, config_source, shared_memory } = model;
        let wiring = Wiring::new(queues)?;
        outlets.set_calls(wiring.clone_calls()?);
        let config_call = Call::new()?;
        let registers = Registers::new(Identity {
            device_id: device_type.id(),
            vendor_id: VENDOR_ID,
            features,
            queues,
            queue_size,
            config,
            shared_memory,
        });
        Ok(Self {
            name,
            device_type,
            config_source,
            registers,
            backend,
            inflight: None,
            outlets,
            plugged: None,
            memory,
            wiring,
            config_call,
            phase: Phase::Idle,
            on_loss: OnLoss::default(),
            listener: None,
            seeker: None,
            service,
            retired: false,
            cut: Arc::default(),
            trapped: Trapped::default(),
            activations: 0,
            resets: 0,
            recoveries: 0,
            config_interrupts: 0,
            noted: BTreeSet::new(),
        })
    }

    /// Puts the device on a board, where the guest sees it through `transport`.
    ///
    /// # Errors
    /// When the machine refuses the interrupt for configuration changes.
    pub(crate) fn plug(
        &mut self,
        transport: Box<dyn Face>,
        outlet: Arc<dyn Outlet>,
    ) -> Result<(), PortError> {
        let config_route = transport.connect_config(&self.config_call)?;
        self.plugged = Some(Plugged { transport, _config_route: config_route });
        self.outlets.put(outlet);
        self.show_all();
        self.seek_anew();
        Ok(())
    }

    /// Takes the device off its board. The queues stop as in a reset by the guest; the registers are as at
    /// power-on. Waits for the backend, within its deadline.
    pub(crate) fn unplug(&mut self) {
        self.machine_reset();
        self.outlets.remove();
        self.plugged = None;
        // The next board begins with no interrupt pending.
        self.drain();
        if let Err(error) = self.config_call.take() {
            log::warn!("{}: cannot drain an eventfd: {error}", self.name);
        }
    }

    /// Shows the registers as they are now.
    pub(crate) fn show_registers(&self) {
        if let Some(Plugged { transport, .. }) = &self.plugged {
            transport.show_registers(&self.registers);
        }
    }

    fn show_all(&self) {
        if let Some(Plugged { transport, .. }) = &self.plugged {
            transport.show_config(self.registers.config());
            transport.show_registers(&self.registers);
        }
    }

    /// The device type.
    #[must_use]
    pub fn device_type(&self) -> DeviceType {
        self.device_type
    }

    /// The user's name for the device.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The registers.
    #[must_use]
    pub fn registers(&self) -> &Registers {
        &self.registers
    }

    /// Carries out a write of the driver to a register. May wait for the backend, within its deadline. When
    /// this returns, the guest sees the outcome.
    pub(crate) fn write(&mut self, reg: Reg, value: u32) {
        let effect = self.registers.write(reg, value);
        self.count(reg, effect);
        match effect {
            Effect::None | Effect::AckConfig | Effect::WriteConfig => {}
            Effect::Activate => self.activate(),
            Effect::Reset => {
                self.quiesce();
                self.seek();
            }
            Effect::Notify(queue) => self.ring(queue),
            Effect::Refused(refusal) => self.note_refusal(refusal),
        }
        self.show_registers();
    }

    /// Carries out a write of the driver to the configuration space. May wait for the backend, within its
    /// deadline.
    pub fn write_config(&mut self, offset: usize, data: &[u8]) {
        if matches!(self.phase, Phase::Running(_)) {
            self.trapped.config += 1;
        }
        let offered = self.registers.offered();
        match self.registers.write_config(offset, data) {
            Effect::Refused(refusal) => self.note_refusal(refusal),
            _ if !self.device_type.driver_may_write(offered, offset, data.len()) => {
                self.note("the driver wrote a configuration field that can only be read");
            }
            _ if self.device_type.is_settled(self.registers.config(), offset, data) => {}
            _ if self.config_source == ConfigSource::Fixed || !self.phase.has_backend() => {
                self.note("a configuration write goes nowhere");
            }
            _ => match self.device_type.whole_after(self.registers.config(), offset, data) {
                Some(whole) => {
                    self.registers.end_config_change(&whole);
                    self.tell_config(0, &whole);
                    self.show_all();
                }
                None => match u32::try_from(offset) {
                    Ok(offset) => self.tell_config(offset, data),
                    Err(_) => self.note_refusal(Refusal::ConfigBounds),
                },
            },
        }
    }

    /// Tells the backend of a configuration write, and shows the configuration that results. In some device
    /// types, such a write selects which data the configuration shows.
    fn tell_config(&mut self, offset: u32, bytes: &[u8]) {
        match self.backend.config(Some((offset, bytes))) {
            Ok(config) => {
                self.show_config(config);
            }
            Err(BackendError::Refused(_)) => {
                self.note("the backend refused a configuration write, or to show what came of it");
            }
            Err(lost) => self.lose_by(&lost),
        }
    }

    /// Logs, once for each text, something unusual that the driver or the backend did.
    pub fn note(&mut self, what: &'static str) {
        if self.noted.insert(what) {
            log::warn!("{}: {what} (logged once)", self.name);
        }
    }

    /// The backend has reported a change of its configuration: reads the configuration again and interrupts
    /// the driver if it differs. Waits for the backend, within its deadline.
    pub fn config_changed(&mut self) {
        let asked = self.config_source == ConfigSource::Backend && self.phase.has_backend();
        if asked && self.reload_config() {
            self.interrupt_config();
        }
    }

    /// Asks the backend to announce the guest's address to the network (SEND_RARP), as after a migration.
    /// Does nothing when the guest announces itself. Waits for the backend, within its deadline.
    pub fn announce(&mut self) {
        let accepted = self.registers.accepted().filter(|features| !features.has(NET_F_GUEST_ANNOUNCE));
        let mac = accepted.and_then(|features| self.device_type.mac(features, self.registers.config()));
        let Some(mac) = mac.filter(|_| matches!(self.phase, Phase::Running(_))) else { return };
        let announced = self.backend.live().and_then(|live| {
            let can = live.session().protocol().contains(ProtocolFeatures::RARP);
            if can { live.send_rarp(mac).map_err(failed) } else { Ok(()) }
        });
        match announced {
            Ok(()) => {}
            Err(lost @ BackendError::Lost(_)) => self.lose_by(&lost),
            Err(BackendError::Refused(_)) => self.note("the backend refused to announce the guest's address"),
        }
    }

    /// The descriptor of an object that this device's backend shares with other devices. Waits for the
    /// backend, within its deadline.
    ///
    /// # Errors
    /// When there is no such object, or no backend.
    pub fn shared_object(&mut self, uuid: Uuid) -> Result<OwnedFd, Refused> {
        if !self.phase.has_backend() {
            return Err(Refused);
        }
        let found = self.backend.live().and_then(|live| live.shared_object(uuid).map_err(failed));
        found.map_err(|error| {
            if let BackendError::Lost(_) = error {
                self.lose_by(&error);
            }
            Refused
        })
    }

    /// Sets what becomes of the device when its backend is lost.
    pub fn on_loss(&mut self, on_loss: OnLoss) {
        self.on_loss = on_loss;
    }

    /// Tells the listener the present phase: the device has lost its backend, is broken, or has found a
    /// backend again.
    pub(crate) fn tell(&self) {
        if let Some(listener) = &self.listener {
            listener(self.phase());
        }
    }

    /// A connection of the device has ended. The backend is lost, unless the connection belonged to an
    /// earlier backend.
    pub fn connection_ended(&mut self) {
        if self.phase.has_backend() && self.backend.has_hung_up() {
            self.lose("the backend closed the connection".to_owned(), false);
        }
    }

    /// The backend is lost: the device breaks or recovers, as set by [`Device::on_loss`].
    pub fn peer_lost(&mut self, why: &str) {
        self.lose(why.to_owned(), false);
    }

    /// No backend will come, or none that fits: the device breaks.
    pub fn give_up(&mut self, why: &str) {
        self.break_down(why.to_owned());
    }

    /// The machine restarts: the registers are as at power-on, and the backend stops as in a reset by the
    /// guest.
    pub(crate) fn machine_reset(&mut self) {
        self.registers.reset();
        self.quiesce();
        self.show_all();
    }

    /// The machine ends: takes the device off its board and gives its backend up.
    pub(crate) fn end(&mut self) {
        self.unplug();
        self.retired = true;
        self.backend.disconnect();
    }

    /// The phase of the device.
    #[must_use]
    pub fn phase(&self) -> PhaseReport {
        self.phase.report()
    }

    /// The device's counters.
    #[must_use]
    pub fn stats(&self) -> DeviceStats {
        DeviceStats {
            name: self.name.clone(),
            kind: self.device_type.name(),
            phase: self.phase(),
            activations: self.activations,
            resets: self.resets,
            recoveries: self.recoveries,
            config_interrupts: self.config_interrupts,
            trapped: self.trapped,
            backend: self.backend.stats(),
        }
    }

    fn count(&mut self, reg: Reg, effect: Effect) {
        if !matches!(self.phase, Phase::Running(_)) {
            return;
        }
        let counter = match (reg, effect) {
            (Reg::QueueNotify, _) => &mut self.trapped.queue_notify,
            (_, Effect::AckConfig) => &mut self.trapped.config_ack,
            (Reg::InterruptAck, _) => &mut self.trapped.interrupt_ack,
            _ => &mut self.trapped.other,
        };
        *counter += 1;
    }

    fn note_refusal(&mut self, refusal: Refusal) {
        self.note(match refusal {
            Refusal::IllegalStatus => "the driver wrote a status that does not follow from the present one",
            Refusal::UnacceptableFeatures => {
                "the driver took features that were not offered, or no VERSION_1"
            }
            Refusal::DeviceBroken => "a driver tried to start a broken device",
            Refusal::FeaturesLocked => "the driver changed features after they were agreed",
            Refusal::QueueLocked => "the driver set up a queue at a time when that is not possible",
            Refusal::NoSuchQueue => "the driver named a queue that does not exist",
            Refusal::ReadOnly => "the driver wrote a register that can only be read",
            Refusal::ConfigBounds => "the driver wrote beyond the configuration, or with an odd width",
        });
    }

    fn ring(&self, queue: u16) {
        if (self.phase.takes_kicks() || self.refuses(queue))
            && let Err(error) = self.wiring.kick(queue)
        {
            log::warn!("{}: cannot kick queue {queue}: {error}", self.name);
        }
    }

    /// Reads the configuration from the backend and shows it. Returns whether it changed.
    fn reload_config(&mut self) -> bool {
        match self.backend.config(None) {
            Ok(config) => return self.show_config(config),
            Err(BackendError::Refused(_)) => {
                self.note("the backend refused to show its configuration");
            }
            Err(lost) => self.lose_by(&lost),
        }
        false
    }

    /// Shows a configuration that came from the backend. Returns whether it changed.
    pub(crate) fn show_config(&mut self, mut config: Vec<u8>) -> bool {
        // When the new configuration is shorter, the rest of the old one stays.
        let old = self.registers.config();
        config.truncate(old.len());
        config.extend_from_slice(old.get(config.len()..).unwrap_or_default());
        self.device_type.keep_written(old, &mut config);
        let queues = self.registers.queue_count();
        self.device_type.patch(&mut config, self.registers.offered(), queues);
        if config == self.registers.config() {
            return false;
        }
        self.registers.begin_config_change();
        self.show_registers();
        self.registers.end_config_change(&config);
        self.show_all();
        true
    }

    /// Interrupts the driver because the configuration or the status changed, if the driver may be
    /// interrupted.
    pub(crate) fn interrupt_config(&mut self) {
        let may = self.registers.note_config_interrupt();
        self.show_registers();
        if may {
            self.config_interrupts += 1;
            if let Err(error) = self.config_call.ring() {
                log::warn!("{}: cannot interrupt: {error}", self.name);
            }
        }
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("name", &self.name)
            .field("phase", &self.phase())
            .finish_non_exhaustive()
    }
}
