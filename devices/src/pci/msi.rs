//! MSI (PCI 3.0 §6.8.1): the registers of the capability, and the routes of its vectors. Called under the
//! function's lock; must never wait.

use std::sync::Arc;

use transport::vhost_user::vring::Call;

use super::vectors::Vectors;
use crate::ports::{Interrupts, PortError, Route};

/// The capability's id.
pub const CAPABILITY: u8 = 0x05;
/// The most vectors that a function may have.
pub const MAX_VECTORS: u8 = 32;

/// Bits of the message control register, at offset 2 of the capability.
const ENABLE: u16 = 1;
const MULTIPLE_ENABLE: u16 = 7 << 4;

/// The properties of a function's MSI capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MsiSpec {
    /// The number of vectors: a power of two, 32 at most.
    pub vectors: u8,
    /// Whether addresses have 64 bits.
    pub wide: bool,
    /// Whether vectors can be masked.
    pub maskable: bool,
}

/// The MSI of one function.
pub struct Msi {
    spec: MsiSpec,
    control: u16,
    address: u64,
    data: u16,
    masks: u32,
    vectors: Vectors,
}

/// A dword of the capability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Register {
    Control,
    AddressLow,
    AddressHigh,
    Data,
    Masks,
    Pending,
}

impl Msi {
    /// MSI that is off.
    #[must_use]
    pub fn new(spec: MsiSpec, interrupts: Arc<dyn Interrupts>) -> Self {
        Self { spec, control: 0, address: 0, data: 0, masks: 0, vectors: Vectors::new(interrupts) }
    }

    /// The length of the capability in bytes.
    #[must_use]
    pub fn length(spec: MsiSpec) -> u8 {
        // The two reserved bytes after the data register belong to the capability, too.
        12 + if spec.wide { 4 } else { 0 } + if spec.maskable { 8 } else { 0 }
    }

    /// Whether MSI is on; the function must not raise INTx then.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.control & ENABLE != 0
    }

    /// Connects `call` to `vector`, for good.
    ///
    /// # Errors
    /// When the vector is live and the machine refuses the route. The route is tried again at the vector's
    /// next change.
    pub fn connect(&mut self, vector: u8, call: Arc<Call>) -> Result<(), PortError> {
        let id = self.vectors.connect(None, call, None)?;
        self.vectors.retarget(id, Some(vector.into()), self.route(vector.into()))
    }

    fn register(&self, offset: u8) -> Option<Register> {
        let MsiSpec { wide, maskable, .. } = self.spec;
        match (offset, wide) {
            (0, _) => Some(Register::Control),
            (4, _) => Some(Register::AddressLow),
            (8, true) => Some(Register::AddressHigh),
            (8, false) | (12, true) => Some(Register::Data),
            (12, false) | (16, true) if maskable => Some(Register::Masks),
            (16, false) | (20, true) if maskable => Some(Register::Pending),
            _ => None,
        }
    }

    /// The dword at `offset` of the capability. Of the first dword, only the writable bits of the message
    /// control register.
    #[must_use]
    pub fn read(&self, offset: u8) -> u32 {
        match self.register(offset) {
            Some(Register::Control) => u32::from(self.control) << 16,
            Some(Register::AddressLow) => u32::try_from(self.address & 0xffff_ffff).unwrap_or(0),
            Some(Register::AddressHigh) => u32::try_from(self.address >> 32).unwrap_or(0),
            Some(Register::Data) => self.data.into(),
            Some(Register::Masks) => self.masks,
            Some(Register::Pending) => (0..self.spec.vectors)
                .fold(0, |bits, vector| bits | u32::from(self.vectors.is_pending(vector.into())) << vector),
            None => 0,
        }
    }

    /// The guest writes the whole dword at `offset` of the capability.
    ///
    /// # Errors
    /// When the machine refuses a route. Signals of that vector stay pending.
    pub fn write(&mut self, offset: u8, value: u32) -> Result<(), PortError> {
        let [a, b, c, d] = value.to_le_bytes();
        match self.register(offset) {
            Some(Register::Control) => {
                self.control = u16::from_le_bytes([c, d]) & (ENABLE | MULTIPLE_ENABLE);
            }
            Some(Register::AddressLow) => {
                self.address = self.address & !0xffff_ffff | u64::from(value & !3);
            }
            Some(Register::AddressHigh) => {
                self.address = self.address & 0xffff_ffff | u64::from(value) << 32;
            }
            Some(Register::Data) => self.data = u16::from_le_bytes([a, b]),
            Some(Register::Masks) => self.masks = value,
            Some(Register::Pending) | None => return Ok(()),
        }
        let routes: Vec<_> = (0..u16::from(self.spec.vectors)).map(|vector| self.route(vector)).collect();
        self.vectors.sync(|vector| routes.get(usize::from(vector)).copied().flatten())
    }

    /// The present route of a vector; `None` while the vector is masked or off.
    fn route(&self, vector: u16) -> Option<Route> {
        let wanted = 1_u16 << ((self.control & MULTIPLE_ENABLE) >> 4).min(5);
        let enabled = wanted.min(self.spec.vectors.into());
        let live = self.is_enabled() && vector < enabled && self.masks >> vector & 1 == 0;
        let data = self.data & !(enabled - 1) | vector;
        live.then_some(Route::Message { address: self.address, data: data.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Recorder;

    fn message(data: u32) -> Route {
        Route::Message { address: 0x1_fee0_1000, data }
    }

    #[test]
    fn vectors_follow_what_the_guest_writes() {
        let machine = Recorder::default();
        let spec = MsiSpec { vectors: 4, wide: true, maskable: true };
        let mut msi = Msi::new(spec, machine.ports().interrupts);
        for vector in 0..4 {
            msi.connect(vector, Arc::new(Call::new().unwrap())).unwrap();
        }
        for (offset, value) in [(4, 0xfee0_1003), (8, 1), (12, 0xffff_4043)] {
            msi.write(offset, value).unwrap();
        }
        assert!(machine.routes().is_empty(), "MSI is off");
        msi.write(0, 0x0001_0000).unwrap();
        assert_eq!(machine.routes(), [message(0x4043)], "one vector, and all bits of the data");
        msi.write(0, 0x0021_0000).unwrap();
        assert_eq!(machine.routes(), [0x4040, 0x4041, 0x4042, 0x4043].map(message));
        msi.write(16, 0b0101).unwrap();
        assert_eq!(machine.routes(), [0x4041, 0x4043].map(message));
        msi.write(0, 0x0071_0000).unwrap();
        assert_eq!(machine.routes().len(), 2, "no more than there are");
        assert_eq!(
            (msi.read(0), msi.read(4), msi.read(8), msi.read(12)),
            (0x0071_0000, 0xfee0_1000, 1, 0x4043)
        );
        msi.write(0, 0).unwrap();
        assert!(machine.routes().is_empty());
    }

    #[test]
    fn a_masked_vector_that_was_signalled_is_pending() {
        let machine = Recorder::default();
        let spec = MsiSpec { vectors: 2, wide: false, maskable: true };
        let mut msi = Msi::new(spec, machine.ports().interrupts);
        let call = Arc::new(Call::new().unwrap());
        msi.connect(1, Arc::clone(&call)).unwrap();
        msi.write(12, 2).unwrap();
        msi.write(0, 0x0011_0000).unwrap();
        call.ring().unwrap();
        assert_eq!(msi.read(16), 2);
        msi.write(12, 0).unwrap();
        assert_eq!((msi.read(16), machine.take_interrupts()), (0, 1));
        assert_eq!(Msi::length(spec), 20);
    }
}
