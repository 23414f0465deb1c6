//! A virtio device: registers, backend and phase, for every type and every transport. It carries out
//! the effects of register writes. Must never touch a ring, wait without a bound, or know an offset of
//! a transport.

use std::collections::BTreeSet;
use std::error::Error;
use std::fmt;
use std::io;

use transport::memory_map::MemoryMap;
use transport::vhost_user::vring::Call;

use super::backend::{Backend, BackendError, Gone, Start};
use super::device_type::{ConfigSource, DeviceType, Model};
use super::face::Face;
use super::registers::{Effect, Identity, Refusal, Reg, Registers};
use super::wiring::{ConnectError, Wiring};
use crate::ports::{Guard, PortError};

pub use super::handle::DeviceHandle;
pub use super::report::{DeviceStats, PhaseReport, Trapped};

/// "OUTB": who made the device, for drivers that ask.
const VENDOR_ID: u32 = u32::from_le_bytes(*b"OUTB");

/// Where a device is in its life.
///
/// ```text
///                 DRIVER_OK, backend started
///        Idle ─────────────────────────────▶ Running
///        │ ▲ ▲ ◀───────────────────────────── │
///        │ │ │       reset, backend stopped   │
///        │ │ └── reset ── NeedsReset          │
///        │ └────────────────▲                 │
///        │   DRIVER_OK with rings that        │
///        │   cannot be: the driver's mistake  │
///        └──────────▶ Broken ◀────────────────┘   peer lost, or the machine's ports failed
/// ```
/// Only what the peer or the machine did lasts. `NEEDS_RESET` is shown in both cases, to the driver
/// that was at work when it happened (§2.1.2), and goes with its reset: a reset device reads 0, as
/// drivers wait for that. A broken device says so to the next driver by refusing `FEATURES_OK`
/// (§3.1.1, step 6), the earliest point at which a driver takes a no and gives up.
enum Phase {
    Idle,
    /// The guards are the queues' connections to the guest.
    Running(Vec<Guard>),
    /// The driver asked for what cannot be; the backend is as it was.
    NeedsReset(String),
    Broken(String),
}

/// Why the queues did not start.
enum StartError {
    /// The driver's mistake.
    Driver(String),
    /// The peer's failure, or the machine's.
    Lasting(String),
}

impl From<ConnectError> for StartError {
    fn from(error: ConnectError) -> Self {
        match error {
            ConnectError::Queue(_) => Self::Driver(chain(&error)),
            ConnectError::Port(_) => Self::Lasting(chain(&error)),
        }
    }
}

impl From<BackendError> for StartError {
    fn from(error: BackendError) -> Self {
        match error {
            BackendError::Refused(cause) => Self::Driver(chain(cause.as_ref())),
            BackendError::Lost(cause) => Self::Lasting(chain(cause.as_ref())),
        }
    }
}

/// Why the device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum NewError {
    /// No eventfd is to be had.
    #[error("cannot make an eventfd")]
    Eventfd(#[source] io::Error),
    /// The machine refused.
    #[error("cannot connect the device to the machine")]
    Port(#[from] PortError),
}

/// A device: see the module's page.
pub struct Device {
    name: String,
    device_type: DeviceType,
    config_source: ConfigSource,
    registers: Registers,
    backend: Box<dyn Backend>,
    face: Box<dyn Face>,
    memory: MemoryMap,
    wiring: Wiring,
    config_call: Call,
    _config_route: Guard,
    phase: Phase,
    trapped: Trapped,
    activations: u64,
    resets: u64,
    config_interrupts: u64,
    refused: BTreeSet<&'static str>,
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
fn chain(error: &(dyn Error + 'static)) -> String {
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
        let Model { device_type, features, queues, queue_size, config, config_source } = model;
        let wiring = Wiring::new(queues).map_err(NewError::Eventfd)?;
        let config_call = Call::new().map_err(NewError::Eventfd)?;
        let config_route = face.connect_config(&config_call)?;
        let registers = Registers::new(Identity {
            device_id: device_type.id(),
            vendor_id: VENDOR_ID,
            features,
            queues,
            queue_size,
            config,
            shared_memory: Vec::new(),
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
            trapped: Trapped::default(),
            activations: 0,
            resets: 0,
            config_interrupts: 0,
            refused: BTreeSet::new(),
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
        let effect = self.registers.write(reg, value);
        self.count(reg, effect);
        match effect {
            Effect::None | Effect::AckConfig | Effect::WriteConfig => {}
            Effect::Activate => self.activate(),
            Effect::Reset => self.quiesce(),
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
            _ if self.config_source == ConfigSource::Fixed || self.is_broken() => {
                self.note("a configuration write goes nowhere");
            }
            _ => match u32::try_from(offset) {
                // What the backend makes of it is read back: there are devices whose configuration is
                // a window that such a write moves.
                Ok(offset) => match self.backend.write_config(offset, data) {
                    Ok(()) => {
                        self.reload_config();
                    }
                    Err(BackendError::Refused(_)) => self.note("the backend refused a configuration write"),
                    Err(lost) => self.break_down(chain(lost.cause())),
                },
                Err(_) => self.note_refusal(Refusal::ConfigBounds),
            },
        }
    }

    /// Notes an access that the transport itself could not make sense of.
    pub fn note(&mut self, what: &'static str) {
        if self.refused.insert(what) {
            log::warn!("{}: {what} (logged once)", self.name);
        }
    }

    /// The backend says that its configuration changed: reads it again and tells the driver. A
    /// configuration that reads as before is no change. Waits for the backend, within its deadline.
    pub fn config_changed(&mut self) {
        if self.config_source == ConfigSource::Backend && !self.is_broken() && self.reload_config() {
            self.interrupt_config();
        }
    }

    /// The backend is gone: the device is broken from here on.
    pub fn peer_lost(&mut self, why: &str) {
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
        if let Phase::Running(guards) = std::mem::replace(&mut self.phase, Phase::Idle) {
            drop(guards);
            if let Err(error) = self.backend.stop() {
                log::warn!("{}: the backend did not stop: {}", self.name, chain(error.cause()));
            }
        }
        self.backend.disconnect();
        if !self.is_broken() {
            self.phase = Phase::Broken("the machine has ended".to_owned());
            self.registers.mark_broken();
        }
    }

    /// Stops the queues and gives the backend away, for another device to be made of it; [`Device::phase`]
    /// still says whether it can be used. This device breaks when a driver starts it again.
    #[must_use]
    pub fn take_backend(&mut self) -> Box<dyn Backend> {
        self.machine_reset();
        std::mem::replace(&mut self.backend, Box::new(Gone))
    }

    /// Where the device is.
    #[must_use]
    pub fn phase(&self) -> PhaseReport {
        match &self.phase {
            Phase::Idle => PhaseReport::Idle,
            Phase::Running(_) => PhaseReport::Running,
            Phase::NeedsReset(why) => PhaseReport::NeedsReset(why.clone()),
            Phase::Broken(why) => PhaseReport::Broken(why.clone()),
        }
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
            config_interrupts: self.config_interrupts,
            trapped: self.trapped,
            backend: self.backend.stats(),
        }
    }

    fn is_broken(&self) -> bool {
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
        if matches!(self.phase, Phase::Running(_))
            && let Err(error) = self.wiring.kick(queue)
        {
            log::warn!("{}: cannot kick queue {queue}: {error}", self.name);
        }
    }

    /// The driver is ready: connects the queues and starts the backend.
    fn activate(&mut self) {
        if self.is_broken() {
            // The driver went on with a device that broke under its hands: now it may be told.
            return self.interrupt_config();
        }
        match self.start() {
            Ok(guards) => {
                self.activations += 1;
                self.phase = Phase::Running(guards);
            }
            Err(StartError::Driver(why)) => self.need_reset(why),
            Err(StartError::Lasting(why)) => self.break_down(why),
        }
    }

    /// Everything is undone again when this fails: the guards go with the error.
    fn start(&mut self) -> Result<Vec<Guard>, StartError> {
        let Self { registers, wiring, face, memory, backend, .. } = self;
        let (rings, guards) = wiring.connect(registers, face.as_ref(), memory)?;
        let Some(features) = registers.accepted() else {
            return Err(StartError::Driver(
                "the driver was ready before the features were agreed".to_owned(),
            ));
        };
        let start = Start { features, memory, rings: &rings };
        backend.start(&start)?;
        Ok(guards)
    }

    /// Stops what runs; the registers are reset already.
    fn quiesce(&mut self) {
        match std::mem::replace(&mut self.phase, Phase::Idle) {
            Phase::Idle | Phase::NeedsReset(_) => {}
            broken @ Phase::Broken(_) => self.phase = broken,
            Phase::Running(guards) => {
                self.resets += 1;
                // No new kick, no further interrupt, then the backend.
                drop(guards);
                match self.backend.stop() {
                    Ok(()) => {
                        if let Err(error) = self.wiring.drain() {
                            log::warn!("{}: cannot drain an eventfd: {error}", self.name);
                        }
                    }
                    Err(error) => self.break_down(chain(error.cause())),
                }
            }
        }
    }

    /// Reads the configuration from the backend and shows it. Says whether it is another.
    fn reload_config(&mut self) -> bool {
        let mut config = match self.backend.read_config() {
            Ok(config) => config,
            Err(BackendError::Refused(_)) => {
                self.note("the backend refused to show its configuration");
                return false;
            }
            Err(lost) => {
                self.break_down(chain(lost.cause()));
                return false;
            }
        };
        // What is no longer there stays as it was.
        let old = self.registers.config();
        config.truncate(old.len());
        config.extend_from_slice(old.get(config.len()..).unwrap_or_default());
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
    fn interrupt_config(&mut self) {
        let may = self.registers.note_config_interrupt();
        self.face.show_registers(&self.registers);
        if may {
            self.config_interrupts += 1;
            if let Err(error) = self.config_call.ring() {
                log::warn!("{}: cannot interrupt: {error}", self.name);
            }
        }
    }

    /// The driver cannot go on; after its reset it, or another one, may try again.
    fn need_reset(&mut self, why: String) {
        log::warn!("device {} needs a reset: {why}", self.name);
        self.phase = Phase::NeedsReset(why);
        self.registers.need_reset();
        self.interrupt_config();
    }

    /// The device cannot go on.
    fn break_down(&mut self, why: String) {
        if self.is_broken() {
            return;
        }
        log::error!("device {} is broken: {why}", self.name);
        // Drops the connections of the queues, too.
        self.phase = Phase::Broken(why);
        self.backend.disconnect();
        self.registers.mark_broken();
        self.interrupt_config();
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
