//! Virtio 1.2 §2 and §4: the registers of a device, by name, for every transport. Pure: a read has no side
//! effect, and a write returns an [`Effect`] that the device carries out. Must never know an offset of a
//! transport, nor call anyone.

use transport::memory::GuestAddr;
use transport::vhost_user::features::{DeviceFeatures, DriverFeatures, WITHHELD, bit};

use crate::virtio::core::status::{Status, Step, Transition};
use crate::virtio::ring::queue::{QueueState, RingLayout};
use crate::virtio::types::model::SharedMemory;

/// Which half of a 64-bit register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Half {
    /// Bits 0 to 31.
    Low,
    /// Bits 32 to 63.
    High,
}

/// The registers. The transport's map decides which ones can be read and which can be written. A write to a
/// read-only register is refused; a read of a write-only register gives 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reg {
    /// The virtio device id.
    DeviceId,
    /// The vendor id.
    VendorId,
    /// 32 of the features that the device offers.
    DeviceFeatures,
    /// Selects the 32 features.
    DeviceFeaturesSel,
    /// 32 of the features that the driver takes.
    DriverFeatures,
    /// Selects the 32 features.
    DriverFeaturesSel,
    /// The queue to which the queue registers refer.
    QueueSel,
    /// The largest size of the selected queue; 0 when there is no such queue.
    QueueSizeMax,
    /// The size of the selected queue.
    QueueSize,
    /// Whether the selected queue is enabled.
    QueueReady,
    /// A queue number: that queue has new buffers.
    QueueNotify,
    /// The reasons of the device's interrupts.
    InterruptStatus,
    /// The interrupt reasons that the driver acknowledges.
    InterruptAck,
    /// The device status field.
    Status,
    /// Descriptor area of the selected queue.
    QueueDesc(Half),
    /// Driver area of the selected queue.
    QueueDriver(Half),
    /// Device area of the selected queue.
    QueueDevice(Half),
    /// The shared memory region to which the next two registers refer.
    ShmSel,
    /// The length of the selected region; all ones when there is no such region.
    ShmLen(Half),
    /// The guest address of the selected region.
    ShmBase(Half),
    /// Changes with every change of the configuration.
    ConfigGeneration,
}

/// The action that a write requires of the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// No further action.
    None,
    /// The driver is ready: start the queues.
    Activate,
    /// The driver reset the device. The registers are reset already.
    Reset,
    /// The driver kicked this queue.
    Notify(u16),
    /// The driver wrote to the configuration.
    WriteConfig,
    /// The driver has seen the configuration change.
    AckConfig,
    /// The write was not legal and changed nothing.
    Refused(Refusal),
}

/// Why a write changed nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// A status that does not follow from the present one.
    IllegalStatus,
    /// `FEATURES_OK` with features that were not offered, or without `VERSION_1`.
    UnacceptableFeatures,
    /// `FEATURES_OK` on a device that lost its backend.
    DeviceBroken,
    /// Features changed after `FEATURES_OK`.
    FeaturesLocked,
    /// Queue registers written before `FEATURES_OK`, after `DRIVER_OK`, or while the queue is enabled.
    QueueLocked,
    /// No queue has that number.
    NoSuchQueue,
    /// The register cannot be written.
    ReadOnly,
    /// The access is beyond the configuration, or is not 1, 2, 4 or 8 bytes wide.
    ConfigBounds,
}

/// The properties of a device before any driver uses it.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Virtio device id (§5).
    pub device_id: u32,
    /// Vendor id.
    pub vendor_id: u32,
    /// The features offered. [`Registers::new`] removes the features that no transport of ours can carry.
    pub features: DeviceFeatures,
    /// How many queues.
    pub queues: u16,
    /// The largest size of each.
    pub queue_size: u16,
    /// The configuration space.
    pub config: Vec<u8>,
    /// Shared memory regions by id.
    pub shared_memory: Vec<Option<SharedMemory>>,
}

/// The register file.
#[derive(Debug, Clone)]
pub struct Registers {
    device_id: u32,
    vendor_id: u32,
    offered: DeviceFeatures,
    /// The features that are offered from the next reset on.
    next_offer: Option<DeviceFeatures>,
    shared_memory: Vec<Option<SharedMemory>>,
    config: Vec<u8>,
    generation: u32,
    broken: bool,
    // A reset clears the fields from here on.
    status: Status,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    /// The driver set a feature bit above 63.
    features_beyond: bool,
    accepted: Option<DriverFeatures>,
    queue_sel: u32,
    queues: Vec<QueueState>,
    shm_sel: u32,
    config_pending: bool,
}

/// The part of `features` that a driver may be offered: all features that this core can carry. A user's
/// request does not change that.
fn carried(features: DeviceFeatures) -> DeviceFeatures {
    // ACCESS_PLATFORM passes: the user and the backend decide whether addresses are translated.
    let not_carried = WITHHELD.iter().filter(|number| **number != bit::ACCESS_PLATFORM);
    let not_carried = not_carried.fold(0, |bits, number| bits | 1_u64 << number);
    DeviceFeatures::from_bits(features.bits() & !not_carried)
}

/// Bits of the interrupt status (mmio §4.2.2, pci §4.1.4.5).
const USED_BUFFER: u32 = 1;
const CONFIG_CHANGE: u32 = 2;

fn half_of(value: u64, half: Half) -> u32 {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    match half {
        Half::Low => u32::from_le_bytes([a, b, c, d]),
        Half::High => u32::from_le_bytes([e, f, g, h]),
    }
}

fn with_half(old: u64, half: Half, new: u32) -> u64 {
    match half {
        Half::Low => old & !0xffff_ffff | u64::from(new),
        Half::High => old & 0xffff_ffff | u64::from(new) << 32,
    }
}

/// The half of the features that a selector of 0 or 1 means.
fn selected(selector: u32) -> Option<Half> {
    match selector {
        0 => Some(Half::Low),
        1 => Some(Half::High),
        _ => None,
    }
}

impl Registers {
    /// The registers of a device that no driver has touched.
    #[must_use]
    pub fn new(identity: Identity) -> Self {
        let Identity { device_id, vendor_id, features, queues, queue_size, config, shared_memory } = identity;
        Self {
            device_id,
            vendor_id,
            offered: carried(features),
            next_offer: None,
            shared_memory,
            config,
            generation: 0,
            broken: false,
            status: Status::default(),
            device_features_sel: 0,
            driver_features_sel: 0,
            driver_features: 0,
            features_beyond: false,
            accepted: None,
            queue_sel: 0,
            queues: vec![QueueState::new(queue_size); usize::from(queues)],
            shm_sel: 0,
            config_pending: false,
        }
    }

    /// The status field.
    #[must_use]
    pub fn status(&self) -> Status {
        self.status
    }

    /// The features that the driver is offered.
    #[must_use]
    pub fn offered(&self) -> DeviceFeatures {
        self.offered
    }

    /// The features that the next driver is offered.
    #[must_use]
    pub fn offered_next(&self) -> DeviceFeatures {
        self.next_offer.unwrap_or(self.offered)
    }

    /// Offers other features from the next reset on. The present driver keeps the features that it was
    /// offered.
    pub fn offer_next(&mut self, features: DeviceFeatures) {
        let features = carried(features);
        if self.status == Status::default() {
            self.offered = features;
        } else {
            self.next_offer = Some(features);
        }
    }

    /// The features that the driver took, once `FEATURES_OK` is set.
    #[must_use]
    pub fn accepted(&self) -> Option<DriverFeatures> {
        self.accepted
    }

    /// How the rings are laid out.
    #[must_use]
    pub fn ring_layout(&self) -> RingLayout {
        match self.accepted {
            Some(features) if features.has(bit::RING_PACKED) => RingLayout::Packed,
            _ => RingLayout::Split,
        }
    }

    /// All queues, by index.
    #[must_use]
    pub fn queues(&self) -> &[QueueState] {
        &self.queues
    }

    /// The number of queues.
    #[must_use]
    pub fn queue_count(&self) -> u16 {
        u16::try_from(self.queues.len()).unwrap_or(u16::MAX)
    }

    /// The shared memory regions, by id.
    #[must_use]
    pub fn shared_memory(&self) -> &[Option<SharedMemory>] {
        &self.shared_memory
    }

    /// The configuration space.
    #[must_use]
    pub fn config(&self) -> &[u8] {
        &self.config
    }

    /// The value of `reg`; 0 for write-only registers.
    #[must_use]
    pub fn read(&self, reg: Reg) -> u32 {
        let queue = self.selected_queue();
        match reg {
            Reg::DeviceId => self.device_id,
            Reg::VendorId => self.vendor_id,
            Reg::DeviceFeatures => {
                selected(self.device_features_sel).map_or(0, |half| half_of(self.offered.bits(), half))
            }
            Reg::QueueSizeMax => queue.map_or(0, |q| q.max_size.into()),
            Reg::QueueSize => queue.map_or(0, |q| q.size.into()),
            Reg::QueueReady => queue.map_or(0, |q| q.ready.into()),
            // The register always shows the reason "used buffer", as a used buffer is always possible. So the
            // register never has to change on the path of a request.
            Reg::InterruptStatus if self.config_pending => USED_BUFFER | CONFIG_CHANGE,
            Reg::InterruptStatus => USED_BUFFER,
            Reg::Status => self.status.bits().into(),
            Reg::ShmLen(half) => half_of(self.selected_memory().map_or(u64::MAX, |m| m.length), half),
            Reg::ShmBase(half) => half_of(self.selected_memory().map_or(u64::MAX, |m| m.base.0), half),
            Reg::ConfigGeneration => self.generation,
            Reg::QueueDesc(half) => half_of(queue.map_or(0, |q| q.desc.0), half),
            Reg::QueueDriver(half) => half_of(queue.map_or(0, |q| q.driver.0), half),
            Reg::QueueDevice(half) => half_of(queue.map_or(0, |q| q.device.0), half),
            Reg::DeviceFeaturesSel => self.device_features_sel,
            Reg::DriverFeaturesSel => self.driver_features_sel,
            Reg::DriverFeatures => {
                selected(self.driver_features_sel).map_or(0, |half| half_of(self.driver_features, half))
            }
            Reg::QueueSel => self.queue_sel,
            Reg::ShmSel => self.shm_sel,
            Reg::QueueNotify | Reg::InterruptAck => 0,
        }
    }

    /// Takes a write and returns the action that it requires of the device.
    #[must_use]
    pub fn write(&mut self, reg: Reg, value: u32) -> Effect {
        match reg {
            Reg::DeviceFeaturesSel => self.device_features_sel = value,
            Reg::DriverFeaturesSel => self.driver_features_sel = value,
            Reg::QueueSel => self.queue_sel = value,
            Reg::ShmSel => self.shm_sel = value,
            Reg::DriverFeatures => return self.write_features(value),
            Reg::Status => return self.write_status(value),
            Reg::InterruptAck if value & CONFIG_CHANGE != 0 => {
                self.config_pending = false;
                return Effect::AckConfig;
            }
            Reg::InterruptAck => {}
            Reg::QueueNotify => {
                let queue = u16::try_from(value).ok().filter(|q| usize::from(*q) < self.queues.len());
                return queue.map_or(Effect::Refused(Refusal::NoSuchQueue), Effect::Notify);
            }
            Reg::QueueSize | Reg::QueueReady => return self.write_queue(reg, value),
            Reg::QueueDesc(_) | Reg::QueueDriver(_) | Reg::QueueDevice(_) => {
                return self.write_queue(reg, value);
            }
            Reg::DeviceId
            | Reg::VendorId
            | Reg::DeviceFeatures
            | Reg::QueueSizeMax
            | Reg::InterruptStatus
            | Reg::ShmLen(_)
            | Reg::ShmBase(_)
            | Reg::ConfigGeneration => return Effect::Refused(Refusal::ReadOnly),
        }
        Effect::None
    }

    /// Fills `data` from the configuration at `offset`; zeroes beyond its end.
    pub fn read_config(&self, offset: usize, data: &mut [u8]) {
        let rest = self.config.get(offset..).unwrap_or_default();
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = rest.get(index).copied().unwrap_or(0);
        }
    }

    /// Takes a write of the driver to the configuration. The contents here do not change: the backend decides
    /// what results from the write.
    #[must_use]
    pub fn write_config(&mut self, offset: usize, data: &[u8]) -> Effect {
        let end = offset.checked_add(data.len());
        if !matches!(data.len(), 1 | 2 | 4 | 8) || end.is_none_or(|end| end > self.config.len()) {
            return Effect::Refused(Refusal::ConfigBounds);
        }
        Effect::WriteConfig
    }

    /// Begins a change of the configuration. A driver that has read a part of the old one will notice by the
    /// generation.
    pub fn begin_config_change(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    /// Ends the change with the new contents. The size stays: a longer configuration is cut, and a shorter
    /// one leaves the rest unchanged.
    pub fn end_config_change(&mut self, config: &[u8]) {
        for (old, new) in self.config.iter_mut().zip(config) {
            *old = *new;
        }
        self.generation = self.generation.wrapping_add(1);
    }

    /// Records a configuration change in the interrupt status. Returns whether an interrupt may be sent: a
    /// driver that is not ready must not be interrupted (§2.1.2).
    #[must_use]
    pub fn note_config_interrupt(&mut self) -> bool {
        let ready = self.status.has(Status::DRIVER_OK);
        self.config_pending |= ready;
        ready
    }

    /// The device cannot go on with this driver (§2.1.2): sets `NEEDS_RESET`, unless the status is 0. No
    /// driver is at work then, and a driver that waits for its reset must read 0.
    pub fn need_reset(&mut self) {
        if self.status != Status::default() {
            self.status.need_reset();
        }
    }

    /// Whether the driver has to reset the device.
    #[must_use]
    pub fn needs_reset(&self) -> bool {
        self.status.has(Status::NEEDS_RESET)
    }

    /// The device is broken: `NEEDS_RESET` for the present driver, no `FEATURES_OK` for the next one.
    pub fn mark_broken(&mut self) {
        self.broken = true;
        self.need_reset();
    }

    /// The device is not broken any more, from the next driver on.
    pub fn mend(&mut self) {
        self.broken = false;
    }

    /// Resets to the state at power-on, with a status of 0. The identity, the configuration and its
    /// generation stay. A broken device stays broken.
    pub fn reset(&mut self) {
        // Every field is named here, so that a new field cannot be forgotten.
        let Self {
            device_id: _,
            vendor_id: _,
            offered,
            next_offer,
            shared_memory: _,
            config: _,
            generation: _,
            broken: _,
            status,
            device_features_sel,
            driver_features_sel,
            driver_features,
            features_beyond,
            accepted,
            queue_sel,
            queues,
            shm_sel,
            config_pending,
        } = self;
        *offered = next_offer.take().unwrap_or(*offered);
        *status = Status::default();
        *device_features_sel = 0;
        *driver_features_sel = 0;
        *driver_features = 0;
        *features_beyond = false;
        *accepted = None;
        *queue_sel = 0;
        for queue in queues {
            *queue = QueueState::new(queue.max_size);
        }
        *shm_sel = 0;
        *config_pending = false;
    }

    fn selected_queue(&self) -> Option<&QueueState> {
        self.queues.get(usize::try_from(self.queue_sel).ok()?)
    }

    fn selected_memory(&self) -> Option<SharedMemory> {
        *self.shared_memory.get(usize::try_from(self.shm_sel).ok()?)?
    }

    fn write_features(&mut self, value: u32) -> Effect {
        if self.status.has(Status::FEATURES_OK) {
            return Effect::Refused(Refusal::FeaturesLocked);
        }
        match selected(self.driver_features_sel) {
            Some(half) => self.driver_features = with_half(self.driver_features, half, value),
            None => self.features_beyond |= value != 0,
        }
        Effect::None
    }

    fn write_status(&mut self, value: u32) -> Effect {
        // The status field has eight bits: a larger value is invalid.
        let Ok(written) = u8::try_from(value) else {
            return Effect::Refused(Refusal::IllegalStatus);
        };
        match self.status.transition(written) {
            Transition::Reset => {
                self.reset();
                return Effect::Reset;
            }
            Transition::Illegal => return Effect::Refused(Refusal::IllegalStatus),
            Transition::Same => {}
            Transition::GiveUp => self.status.give_up(),
            Transition::Steps(steps) => {
                for step in steps {
                    if *step == Step::FeaturesOk
                        && let Err(refusal) = self.agree_on_features()
                    {
                        return Effect::Refused(refusal);
                    }
                    self.status.take(*step);
                }
                if self.status.has(Status::DRIVER_OK) {
                    return Effect::Activate;
                }
            }
        }
        Effect::None
    }

    /// Accepts the driver's features. On failure `FEATURES_OK` stays clear (§3.1.1, step 6).
    fn agree_on_features(&mut self) -> Result<(), Refusal> {
        if self.broken {
            return Err(Refusal::DeviceBroken);
        }
        match self.offered.accept(self.driver_features) {
            Ok(features) if features.has(bit::VERSION_1) && !self.features_beyond => {
                self.accepted = Some(features);
                Ok(())
            }
            _ => Err(Refusal::UnacceptableFeatures),
        }
    }

    fn write_queue(&mut self, reg: Reg, value: u32) -> Effect {
        let settable = self.status.has(Status::FEATURES_OK)
            && !self.status.has(Status::DRIVER_OK | Status::FAILED | Status::NEEDS_RESET);
        let index = usize::try_from(self.queue_sel).ok();
        let Some(queue) = index.and_then(|index| self.queues.get_mut(index)) else {
            return Effect::Refused(Refusal::NoSuchQueue);
        };
        // Drivers disable a disabled queue to make sure. This is no change.
        if reg == Reg::QueueReady && value == 0 && !queue.ready {
            return Effect::None;
        }
        if !settable || (queue.ready && reg != Reg::QueueReady) {
            return Effect::Refused(Refusal::QueueLocked);
        }
        match reg {
            // A size beyond 16 bits is stored as the invalid size 0. Activation reports the error.
            Reg::QueueSize => queue.size = u16::try_from(value).unwrap_or(0),
            Reg::QueueReady => queue.ready = value & 1 != 0,
            Reg::QueueDesc(half) => queue.desc = GuestAddr(with_half(queue.desc.0, half, value)),
            Reg::QueueDriver(half) => queue.driver = GuestAddr(with_half(queue.driver.0, half, value)),
            Reg::QueueDevice(half) => queue.device = GuestAddr(with_half(queue.device.0, half, value)),
            _ => return Effect::Refused(Refusal::ReadOnly),
        }
        Effect::None
    }
}

#[cfg(test)]
#[path = "registers_tests.rs"]
mod tests;
