//! What a device may ask of the machine: doorbells, interrupts, memory.
//! Implemented by `vmm` on KVM and by a recorder in tests. Must never mention KVM: a device says
//! what it wants, not how it is done.

use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use transport::memory::GuestAddr;

/// Whatever a guard keeps alive.
trait Held: Send {}
impl<T: Send> Held for T {}

/// Runs a closure once, when dropped.
struct OnDrop<F: FnOnce()>(Option<F>);

impl<F: FnOnce()> Drop for OnDrop<F> {
    fn drop(&mut self) {
        if let Some(undo) = self.0.take() {
            undo();
        }
    }
}

/// Something registered with the machine, undone when this is dropped.
#[must_use = "dropping a guard undoes what it stands for"]
pub struct Guard {
    _held: Box<dyn Held>,
}

impl Guard {
    /// Keeps `held` alive; its own `Drop` does the undoing.
    pub fn new(held: impl Send + 'static) -> Self {
        Self { _held: Box::new(held) }
    }

    /// Runs `undo` when dropped.
    pub fn on_drop(undo: impl FnOnce() + Send + 'static) -> Self {
        Self::new(OnDrop(Some(undo)))
    }
}

impl fmt::Debug for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Guard")
    }
}

/// The machine could not do what a device asked for.
#[derive(Debug, thiserror::Error)]
#[error("the machine cannot {action}")]
pub struct PortError {
    action: String,
    source: io::Error,
}

impl PortError {
    /// `action` completes "the machine cannot …", for example `bind a doorbell at 0xd0000050`.
    pub fn new(action: impl Into<String>, source: io::Error) -> Self {
        Self { action: action.into(), source }
    }
}

/// Where the guest writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WriteAddress {
    /// Memory.
    Memory(GuestAddr),
    /// An I/O port.
    Port(u16),
}

impl fmt::Display for WriteAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory(address) => write!(f, "{:#x}", address.0),
            Self::Port(port) => write!(f, "port {port:#x}"),
        }
    }
}

/// How many bytes the guest writes at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WriteWidth {
    /// Any number; the value cannot be matched then. The fastest of all on some processors.
    Any,
    /// One.
    One,
    /// Two.
    Two,
    /// Four.
    Four,
    /// Eight; memory only.
    Eight,
}

/// A write of the guest. Two that overlap in what they match must not be bound at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WriteMatch {
    /// Where it begins.
    pub address: WriteAddress,
    /// How wide it is.
    pub width: WriteWidth,
    /// What is written; `None` matches every value.
    pub value: Option<u64>,
}

impl WriteMatch {
    /// Four bytes with this value, in memory.
    #[must_use]
    pub fn register(address: GuestAddr, value: u32) -> Self {
        let address = WriteAddress::Memory(address);
        Self { address, width: WriteWidth::Four, value: Some(value.into()) }
    }

    /// Anything at this address, in memory.
    #[must_use]
    pub fn anything(address: GuestAddr) -> Self {
        Self { address: WriteAddress::Memory(address), width: WriteWidth::Any, value: None }
    }
}

/// Turns writes of the guest into eventfd signals, without an exit to us (KVM: ioeventfd).
pub trait Doorbells: Send + Sync {
    /// Signals `fd` at every write that matches, until the guard is dropped. The binding keeps no
    /// reference to `fd` itself; the same open file may be bound more than once.
    ///
    /// # Errors
    /// When the machine refuses, for instance as the same match is bound already.
    fn bind(&self, fd: BorrowedFd<'_>, when: WriteMatch) -> Result<Guard, PortError>;
}

/// Where an interrupt goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Route {
    /// An edge on the line with this GSI.
    Pin(u32),
    /// A message: what a PCI function writes where.
    Message {
        /// Address, in the local APICs' range if the guest is sane.
        address: u64,
        /// Data.
        data: u32,
    },
}

/// Turns eventfd signals into guest interrupts, without us (KVM: irqfd).
pub trait Interrupts: Send + Sync {
    /// Interrupts the guest along `route` whenever `call` is signalled, until the guard is dropped.
    /// A count already pending in `call` is delivered at once. One eventfd has one route at a time: drop the
    /// guard before it is attached again. To mask an interrupt, drop the guard: what is signalled meanwhile
    /// stays in `call` and is delivered by the next `attach`.
    ///
    /// # Errors
    /// When the machine refuses, or has no route left.
    fn attach(&self, call: BorrowedFd<'_>, route: Route) -> Result<Guard, PortError>;

    /// Raises the level-triggered line with this GSI whenever `call` is signalled. The guest's end of interrupt
    /// lowers it and signals `resample`, all in the kernel: whoever still has a reason to interrupt then signals
    /// `call` again. Several may share a line.
    ///
    /// # Errors
    /// When the machine refuses.
    fn attach_level(
        &self,
        call: BorrowedFd<'_>,
        gsi: u32,
        resample: BorrowedFd<'_>,
    ) -> Result<Guard, PortError>;
}

/// One page of registers that the guest reads without an exit, while its writes still reach us.
/// Called on vCPU threads and on the control thread; never waits.
pub trait RegisterPage: Send + Sync {
    /// Stores the little-endian `value` at the 4-aligned `offset`, as one access. Offsets outside
    /// the page are ignored.
    fn store(&self, offset: u16, value: u32);

    /// Stores `bytes` from `offset` on, in no particular order. What lies outside the page is cut off.
    fn store_bytes(&self, offset: u16, bytes: &[u8]);
}

/// What the guest may do to memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// Guest writes go to memory.
    ReadWrite,
    /// Guest reads come from memory, writes come to the bus.
    ReadOnly,
}

/// A piece of a peer's file, in bytes.
#[derive(Debug, Clone)]
pub struct FileRange {
    /// The file. Kept open for as long as the piece is mapped.
    pub fd: Arc<OwnedFd>,
    /// Where the piece begins in the file.
    pub offset: u64,
    /// Its length.
    pub size: u64,
}

/// Called when a mapped piece of a file is gone from the guest, as its peer made the file shorter: on a vCPU
/// thread, without any lock held. May take the device's lock, and drop the guard; must not wait.
pub type OnVanished = Arc<dyn Fn() + Send + Sync>;

/// Gives guest-visible memory to devices (KVM: memory slots).
pub trait DeviceMemory: Send + Sync {
    /// Backs the 4 KiB page at `at` with zeroed memory, read-only for the guest. The page lives
    /// until the last reference to it is dropped.
    ///
    /// # Errors
    /// When the machine refuses, for instance as the address is taken or not page-aligned.
    fn register_page(&self, at: GuestAddr) -> Result<Arc<dyn RegisterPage>, PortError>;

    /// Shows the guest a piece of a peer's file at `at`, until the guard is dropped. Nobody in this process
    /// touches it. When the peer makes the file shorter under the running guest, the whole piece vanishes from
    /// the guest (its accesses come to the bus) and `vanished` is called; the guard may then be dropped or kept.
    ///
    /// # Errors
    /// When address, offset or size is not a multiple of the page size, the file is shorter or cannot be mapped,
    /// the address is taken, or no slot is left.
    fn map(
        &self,
        piece: &FileRange,
        at: GuestAddr,
        access: Access,
        vanished: OnVanished,
    ) -> Result<Guard, PortError>;
}

/// The three ports of one machine.
#[derive(Clone)]
pub struct Ports {
    /// Doorbells.
    pub doorbells: Arc<dyn Doorbells>,
    /// Interrupts.
    pub interrupts: Arc<dyn Interrupts>,
    /// Pages of registers, and peers' files.
    pub memory: Arc<dyn DeviceMemory>,
}

impl fmt::Debug for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ports")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[test]
    fn dropped_guard_undoes_exactly_once() {
        let count = Arc::new(AtomicU32::new(0));
        let seen = Arc::clone(&count);
        let guard = Guard::on_drop(move || {
            seen.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(count.load(Ordering::Relaxed), 0);
        drop(Guard::new(guard));
        assert_eq!(count.load(Ordering::Relaxed), 1);
    }
}
