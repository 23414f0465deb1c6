//! What a device may ask of the machine: doorbells, interrupts, memory. `vmm` implements these ports on KVM,
//! and tests implement them by a recorder. Must never mention KVM in an interface: a device says what it
//! wants, and not how the machine does it.

use std::fmt;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

use transport::memory::GuestAddr;

/// A value that a guard keeps alive.
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

/// A registration with the machine. Dropping the guard undoes the registration.
#[must_use = "dropping a guard undoes what it stands for"]
pub struct Guard {
    _held: Box<dyn Held>,
}

impl Guard {
    /// A guard that keeps `held` alive; dropping `held` undoes the registration.
    pub fn new(held: impl Send + 'static) -> Self {
        Self { _held: Box::new(held) }
    }

    /// A guard that runs `undo` when it is dropped.
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

/// The address of a guest's write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WriteAddress {
    /// An address in memory.
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

/// How many bytes a guest's write has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum WriteWidth {
    /// Any number of bytes. The value cannot be matched then. The fastest of all on some processors.
    Any,
    /// One byte.
    One,
    /// Two bytes.
    Two,
    /// Four bytes.
    Four,
    /// Eight bytes; in memory only.
    Eight,
}

/// A set of writes by the guest. Two sets that overlap must not be bound at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WriteMatch {
    /// The address of the first byte.
    pub address: WriteAddress,
    /// The width of the write.
    pub width: WriteWidth,
    /// The value that is written; `None` matches every value.
    pub value: Option<u64>,
}

impl WriteMatch {
    /// A write of four bytes with this value to memory.
    #[must_use]
    pub fn register(address: GuestAddr, value: u32) -> Self {
        let address = WriteAddress::Memory(address);
        Self { address, width: WriteWidth::Four, value: Some(value.into()) }
    }

    /// Any write to this address in memory.
    #[must_use]
    pub fn anything(address: GuestAddr) -> Self {
        Self { address: WriteAddress::Memory(address), width: WriteWidth::Any, value: None }
    }
}

/// Turns the guest's writes into eventfd signals, without an exit to userspace (KVM: ioeventfd).
pub trait Doorbells: Send + Sync {
    /// Signals `fd` at every write that matches, until the guard is dropped. The binding keeps no reference
    /// to `fd` itself. The same open file may be bound more than once.
    ///
    /// # Errors
    /// When the machine refuses, for instance because the same match is bound already.
    fn bind(&self, fd: BorrowedFd<'_>, when: WriteMatch) -> Result<Guard, PortError>;
}

/// Where an interrupt goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Route {
    /// An edge on the line with this GSI.
    Pin(u32),
    /// A message interrupt: a PCI function writes `data` to `address`.
    Message {
        /// The address. A correct guest chooses it in the local APICs' range.
        address: u64,
        /// Data.
        data: u32,
    },
}

/// Turns eventfd signals into guest interrupts, without userspace (KVM: irqfd).
pub trait Interrupts: Send + Sync {
    /// Interrupts the guest along `route` whenever `call` is signalled, until the guard is dropped. A signal
    /// already in `call` is delivered at once.
    ///
    /// One eventfd has one route at a time: drop the guard before attaching the eventfd again. To mask an
    /// interrupt, drop the guard: a signal that comes meanwhile stays in `call`, and the next `attach`
    /// delivers it.
    ///
    /// # Errors
    /// When the machine refuses, or has no route left.
    fn attach(&self, call: BorrowedFd<'_>, route: Route) -> Result<Guard, PortError>;

    /// Raises the level-triggered line with this GSI whenever `call` is signalled. The guest's end of
    /// interrupt lowers the line and signals `resample`, all in the kernel. A source that still has a reason
    /// to interrupt then signals `call` again. Several sources may share a line.
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

/// One page of registers. The guest reads it without an exit; the guest's writes come to userspace. Called on
/// vCPU threads and on the control thread; never waits.
pub trait RegisterPage: Send + Sync {
    /// Stores `value`, little-endian, at the 4-aligned `offset`, as one access. Offsets outside the page are
    /// ignored.
    fn store(&self, offset: u16, value: u32);

    /// Stores `bytes` from `offset` on, in no particular order. Bytes outside the page are ignored.
    fn store_bytes(&self, offset: u16, bytes: &[u8]);
}

/// What the guest may do to memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Access {
    /// Guest reads and writes go to the memory.
    ReadWrite,
    /// Guest reads come from the memory; guest writes come to the bus.
    ReadOnly,
}

/// A piece of a peer's file, in bytes.
#[derive(Debug, Clone)]
pub struct FileRange {
    /// The file. Kept open for as long as the piece is mapped.
    pub fd: Arc<OwnedFd>,
    /// The offset of the piece in the file.
    pub offset: u64,
    /// Its length.
    pub size: u64,
}

/// Called when a mapped piece of a file was removed from the guest because the peer made the file shorter.
/// Called on a vCPU thread or by the control loop, without any lock held. May take the device's lock and drop
/// the guard; must not wait.
pub type OnVanished = Arc<dyn Fn() + Send + Sync>;

/// Gives guest-visible memory to devices (KVM: memory slots).
pub trait DeviceMemory: Send + Sync {
    /// Backs the 4 KiB page at `at` with zeroed memory, read-only for the guest. The page lives until its
    /// last reference is dropped.
    ///
    /// # Errors
    /// When the machine refuses, for instance because the address is taken or not page-aligned.
    fn register_page(&self, at: GuestAddr) -> Result<Arc<dyn RegisterPage>, PortError>;

    /// Shows the guest a piece of a peer's file at `at`, until the guard is dropped. Nothing in this process
    /// touches the piece.
    ///
    /// When the peer makes the file shorter while the guest runs, the whole piece is removed from the guest,
    /// whose accesses then come to the bus, and `vanished` is called. The guard may then be dropped or kept.
    ///
    /// # Errors
    /// - The address, the offset or the size is not a multiple of the page size.
    /// - The file is shorter than the piece, or cannot be mapped.
    /// - The address is taken, or no memory slot is left.
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
    /// Register pages, and pieces of peers' files.
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
