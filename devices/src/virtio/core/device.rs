//! A virtio device: registers, backend and phase, for every type and every transport. It carries out
//! the effects of register writes; how queues start and stop is in `start`, what happens
//! when a backend takes the place of another in [`crate::virtio::recovery::take_over`]. Must never touch a ring, wait without a bound, or know an offset of
//! a transport.

use std::collections::BTreeSet;
use std::error::Error;
use std::fmt;
use std::io;
use std::os::fd::OwnedFd;

use transport::memory::MemoryMap;
use transport::vhost_user::Refused;
use transport::vhost_user::features::DeviceFeatures;
use transport::vhost_user::message::Uuid;
use transport::vhost_user::vring::Call;

use crate::ports::{Guard, PortError};
use crate::virtio::backend::{Backend, BackendError, Gone};
use crate::virtio::core::queues::Wiring;
use crate::virtio::core::registers::{Effect, Identity, Refusal, Reg, Registers};
use crate::virtio::core::state::{OnLoss, Phase};
use crate::virtio::recovery::revival::Revival;
use crate::virtio::served::Control;
use crate::virtio::transport::Face;
use crate::virtio::types::table::{ConfigSource, DeviceType, Model};

pub use crate::virtio::core::handle::DeviceHandle;
pub use crate::virtio::core::report::{DeviceStats, PhaseReport, Trapped};

/// "OUTB": who made the device, for drivers that ask.
const VENDOR_ID: u32 = u32::from_le_bytes(*b"OUTB");

/// VIRTIO_NET_F_GUEST_ANNOUNCE.
const NET_F_GUEST_ANNOUNCE: u32 = 21;

/// Why the device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NewError {
    /// No eventfd is to be had.
    #[error("cannot make an eventfd")]
    Eventfd(#[source] io::Error),
    /// The machine refused.
    #[error("cannot connect the device to the machine")]
    Port(#[from] PortError),
    /// The transport has no room for it.
    #[error("cannot describe the device to the guest")]
    Describe(#[source] Box<dyn Error + Send + Sync>),
}

/// A device: see the module's page.
pub struct Device {
    pub(crate) name: String,
    device_type: DeviceType,
    pub(crate) config_source: ConfigSource,
    pub(crate) registers: Registers,
    pub(crate) backend: Box<dyn Backend>,
    pub(crate) face: Box<dyn Face>,
    pub(crate) memory: MemoryMap,
    pub(crate) wiring: Wiring,
    config_call: Call,
    _config_route: Guard,
    pub(crate) phase: Phase,
    pub(crate) on_loss: OnLoss,
    pub(crate) revival: Revival,
    /// The queue that we serve.
    pub(crate) control: Option<Control>,
    /// Its backend was given away: no other one may come.
    pub(crate) retired: bool,
    trapped: Trapped,
    pub(crate) activations: u64,
    pub(crate) resets: u64,
    pub(crate) recoveries: u64,
    config_interrupts: u64,
    pub(crate) noted: BTreeSet<&'static str>,
}

/// What a device is made of, but for its transport.
pub struct Parts {
    /// What the user calls it.
    pub name: String,
    /// What the guest sees.
    pub model: Model,
    /// Who serves it.
    pub backend: Box<dyn Backend>,
    /// Guest memory.
    pub memory: MemoryMap,
}

/// The causes of `error`, outermost first, in one line.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

impl Device {
    /// A device at power-on, shown through `face`.
    ///
    /// # Errors
    /// When eventfds run out, or the machine refuses the interrupt.
    pub fn new(parts: Parts, face: Box<dyn Face>) -> Result<Self, NewError> {
        let Parts { name, model, backend, memory } = parts;
        let Model { device_type, features, queues, queue_size, config, config_source, shared_memory } = model;
        let control = Control::of(device_type.service(), queues);
        let wiring = Wiring::new(queues, control.as_ref().map(Control::queue)).map_err(NewError::Eventfd)?;
        let config_call = Call::new().map_err(NewError::Eventfd)?;
        let config_route = face.connect_config(&config_call)?;
        let registers = Registers::new(Identity {
            device_id: device_type.id(),
            vendor_id: VENDOR_ID,
            features,
            queues,
            queue_size,
            config,
            shared_memory,
        });
        face.show_registers(&registers);
        face.show_config(registers.config());
        Ok(Self {
            name,
            device_type,
            config_source,
            registers,
            backend,
            face,
            memory,
            wiring,
            config_call,
            _config_route: config_route,
            phase: Phase::Idle,
            on_loss: OnLoss::default(),
            revival: Revival::default(),
            control,
            retired: false,
            trapped: Trapped::default(),
            activations: 0,
            resets: 0,
            recoveries: 0,
            config_interrupts: 0,
            noted: BTreeSet::new(),
        })
    }

    /// The registers.
    #[must_use]
    pub fn registers(&self) -> &Registers {
        &self.registers
    }

    /// A write of the driver to a register. May wait for the backend, within its deadline; when this
    /// returns, the guest sees the outcome.
    pub fn write(&mut self, reg: Reg, value: u32) {
        if reg == Reg::Status {
            self.await_trial(value);
        }
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
        self.face.show_registers(&self.registers);
    }

    /// A write of the driver to the configuration space. May wait for the backend, within its deadline.
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
                    self.face.show_config(self.registers.config());
                    self.face.show_registers(&self.registers);
                }
                None => match u32::try_from(offset) {
                    Ok(offset) => self.tell_config(offset, data),
                    Err(_) => self.note_refusal(Refusal::ConfigBounds),
                },
            },
        }
    }

    /// Tells the backend of a write, and shows what it makes of it: there are devices whose configuration is a window
    /// that such a write moves.
    fn tell_config(&mut self, offset: u32, bytes: &[u8]) {
        match self.backend.write_config(offset, bytes) {
            Ok(config) => {
                self.show_config(config);
            }
            Err(BackendError::Refused(_)) => {
                self.note("the backend refused a configuration write, or to show what came of it");
            }
            Err(lost) => self.lose_by(&lost),
        }
    }

    /// Notes an access that the transport itself could not make sense of.
    pub fn note(&mut self, what: &'static str) {
        if self.noted.insert(what) {
            log::warn!("{}: {what} (logged once)", self.name);
        }
    }

    /// The backend says that its configuration changed: reads it again and tells the driver. A
    /// configuration that reads as before is no change. Waits for the backend, within its deadline.
    pub fn config_changed(&mut self) {
        let asked = self.config_source == ConfigSource::Backend && self.phase.has_backend();
        if asked && self.reload_config() {
            self.interrupt_config();
        }
    }

    /// Has the network learn where the guest's address is, as after a migration, when the guest does not do
    /// so itself. Waits for the backend, within its deadline.
    pub fn announce(&mut self) {
        let accepted = self.registers.accepted().filter(|features| !features.has(NET_F_GUEST_ANNOUNCE));
        let mac = accepted.and_then(|features| self.device_type.mac(features, self.registers.config()));
        let Some(mac) = mac.filter(|_| matches!(self.phase, Phase::Running(_))) else { return };
        match self.backend.announce(mac) {
            Ok(()) => {}
            Err(lost @ BackendError::Lost(_)) => self.lose_by(&lost),
            Err(BackendError::Refused(_)) => self.note("the backend refused to announce the guest's address"),
        }
    }

    /// The fd of an object that the device's backend shares with other devices. Waits for the backend,
    /// within its deadline.
    ///
    /// # Errors
    /// When there is none.
    pub fn shared_object(&mut self, uuid: Uuid) -> Result<OwnedFd, Refused> {
        if !self.phase.has_backend() {
            return Err(Refused);
        }
        self.backend.shared_object(uuid).map_err(|error| {
            if let BackendError::Lost(_) = error {
                self.lose_by(&error);
            }
            Refused
        })
    }

    /// What is to become of the device when its peer is lost, from now on.
    pub fn on_loss(&mut self, on_loss: OnLoss) {
        self.on_loss = on_loss;
    }

    /// The backend is gone: the device breaks, or recovers, as it was made to.
    pub fn peer_lost(&mut self, why: &str) {
        self.lose(why.to_owned());
    }

    /// No backend will come, or only such as cannot be used: the device breaks.
    pub fn give_up(&mut self, why: &str) {
        self.break_down(why.to_owned());
    }

    /// The machine restarts: as at power-on, and the backend stops as in a reset by the guest.
    pub fn machine_reset(&mut self) {
        self.registers.reset();
        self.quiesce();
        self.face.show_config(self.registers.config());
        self.face.show_registers(&self.registers);
    }

    /// The machine ends: stops the queues, if the backend still lets us, and gives it up.
    pub fn shutdown(&mut self) {
        self.retired = true;
        match std::mem::replace(&mut self.phase, Phase::Broken("the machine has ended".to_owned())) {
            Phase::Running(guards) => {
                drop(guards);
                if let Err(error) = self.backend.stop() {
                    log::warn!("{}: the backend did not stop: {}", self.name, chain(error.cause()));
                }
            }
            // Whoever starts a backend right now finds that nobody waits for it, and hangs up.
            Phase::Idle | Phase::NeedsReset(_) | Phase::Recovering(_) => {}
            broken @ Phase::Broken(_) => self.phase = broken,
        }
        self.backend.disconnect();
        self.registers.mark_broken();
        self.face.show_registers(&self.registers);
    }

    /// Stops the queues and gives the backend away, for another device to be made of it; [`Device::phase`]
    /// still says whether it can be used, or waited for. This device breaks when a driver starts it again.
    #[must_use]
    pub fn take_backend(&mut self) -> Box<dyn Backend> {
        self.machine_reset();
        self.retired = true;
        std::mem::replace(&mut self.backend, Box::new(Gone))
    }

    /// Where the device is.
    #[must_use]
    pub fn phase(&self) -> PhaseReport {
        self.phase.report()
    }

    /// The device as it is now, to make another one of: a successor of the first backend may have
    /// brought other features and another configuration.
    #[must_use]
    pub fn features_and_config(&self) -> (DeviceFeatures, Vec<u8>) {
        (self.registers.offered_next(), self.registers.config().to_vec())
    }

    /// What it did so far.
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

    pub(crate) fn is_broken(&self) -> bool {
        matches!(self.phase, Phase::Broken(_))
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

    /// Reads the configuration from the backend and shows it. Says whether it is another.
    fn reload_config(&mut self) -> bool {
        match self.backend.read_config() {
            Ok(config) => return self.show_config(config),
            Err(BackendError::Refused(_)) => {
                self.note("the backend refused to show its configuration");
            }
            Err(lost) => self.lose_by(&lost),
        }
        false
    }

    /// Shows a configuration of the backend. Says whether it is another.
    pub(crate) fn show_config(&mut self, mut config: Vec<u8>) -> bool {
        // What is no longer there stays as it was.
        let old = self.registers.config();
        config.truncate(old.len());
        config.extend_from_slice(old.get(config.len()..).unwrap_or_default());
        self.device_type.keep_written(old, &mut config);
        let queues = u16::try_from(self.registers.queues().len()).unwrap_or(u16::MAX);
        self.device_type.patch(&mut config, self.registers.offered(), queues);
        if config == self.registers.config() {
            return false;
        }
        self.registers.begin_config_change();
        self.face.show_registers(&self.registers);
        self.registers.end_config_change(&config);
        self.face.show_config(self.registers.config());
        self.face.show_registers(&self.registers);
        true
    }

    /// Tells the driver that the configuration or the status changed, if it is ready to hear that.
    pub(crate) fn interrupt_config(&mut self) {
        let may = self.registers.note_config_interrupt();
        self.face.show_registers(&self.registers);
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
