//! One vCPU thread: enters the guest, passes each exit to a bus, and counts the exits.
//!
//! The thread waits in three places only: at the gate, in KVM, and inside a device. A wait inside a device
//! lasts for one bounded exchange with a peer at most.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use devices::bus::Bus;
use kvm_ioctls::{VcpuExit, VcpuFd};
use serde::Serialize;
use vmm_sys_util::signal::{Killable, SIGRTMIN};

use crate::host::kvm::port_accesses;
use crate::host::peer_memory::{PeerMemory, Suspects};
use crate::life::crash::describe_registers;
use crate::life::gate::{Lifecycle, Parked, Passage, Request};

/// Exits to userspace of one vCPU, by reason, over the machine's whole life.
#[derive(Debug, Default)]
pub struct VcpuCounters {
    io_in: AtomicU64,
    io_out: AtomicU64,
    mmio_read: AtomicU64,
    mmio_write: AtomicU64,
    interrupted: AtomicU64,
    other: AtomicU64,
    longest_ns: AtomicU64,
    first_entry_us: AtomicU64,
}

/// A reading of [`VcpuCounters`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VcpuStats {
    /// All exits to userspace.
    pub exits: u64,
    /// Port reads.
    pub io_in: u64,
    /// Port writes.
    pub io_out: u64,
    /// Reads of memory that no slot holds.
    pub mmio_read: u64,
    /// Writes to memory that no slot holds, or to a read-only slot.
    pub mmio_write: u64,
    /// Exits because a signal arrived.
    pub interrupted: u64,
    /// Every other reason.
    pub other: u64,
    /// The longest time from an exit to the next entry, in microseconds.
    pub longest_exit_us: u64,
}

impl VcpuCounters {
    /// The counters so far.
    pub fn stats(&self) -> VcpuStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut stats = VcpuStats {
            exits: 0,
            io_in: get(&self.io_in),
            io_out: get(&self.io_out),
            mmio_read: get(&self.mmio_read),
            mmio_write: get(&self.mmio_write),
            interrupted: get(&self.interrupted),
            other: get(&self.other),
            longest_exit_us: get(&self.longest_ns) / 1000,
        };
        stats.exits = [stats.io_in, stats.io_out, stats.mmio_read, stats.mmio_write, stats.interrupted]
            .iter()
            .sum::<u64>()
            .saturating_add(stats.other);
        stats
    }

    /// Microseconds from the start of the build to this vCPU's first entry into the guest; 0 before that
    /// entry.
    pub fn first_entry_us(&self) -> u64 {
        self.first_entry_us.load(Ordering::Relaxed)
    }
}

/// The data of a vCPU thread.
pub struct Vcpu {
    /// The vCPU with its registers set. Its thread holds the lock except while the thread waits at the gate.
    pub fd: Arc<Mutex<VcpuFd>>,
    /// Its number, from 0.
    pub index: u8,
    /// The bus of I/O ports.
    pub pio: Arc<Bus>,
    /// The bus of memory-mapped registers.
    pub mmio: Arc<Bus>,
    /// The gate, which also takes requests.
    pub lifecycle: Arc<Lifecycle>,
    /// The mapped files of peers. They are checked when KVM cannot reach guest memory.
    pub peer_memory: Arc<PeerMemory>,
    /// The counters of this vCPU's exits.
    pub counters: Arc<VcpuCounters>,
    /// The number of entries in a row at which KVM could not reach guest memory.
    pub faults: u8,
    /// The start of the build of the machine.
    pub begun: Instant,
}

/// The result of one entry into the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// The guest's access was answered.
    Answered,
    /// The vCPU left the guest without an access to answer, mostly because of a signal. It has no pending
    /// access.
    Interrupted,
    /// The guest cannot go on.
    Crashed,
}

/// The vCPUs of a board and their threads.
#[derive(Debug)]
pub struct Vcpus {
    lifecycle: Arc<Lifecycle>,
    fds: Vec<Arc<Mutex<VcpuFd>>>,
    threads: Vec<JoinHandle<()>>,
}

/// While this guard lives, the vCPUs are outside the guest and have no pending access.
#[derive(Debug)]
#[must_use = "the vCPUs go on when this is dropped"]
pub struct ParkedVcpus<'v> {
    _parked: Parked,
    fds: &'v [Arc<Mutex<VcpuFd>>],
}

impl ParkedVcpus<'_> {
    /// Calls `act` with each vCPU.
    pub fn each(&self, mut act: impl FnMut(&VcpuFd)) {
        for fd in self.fds {
            act(&fd.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }
}

impl Vcpus {
    /// Keeps the vCPUs. Their threads are started one by one with [`Vcpus::start`].
    pub fn new(lifecycle: Arc<Lifecycle>, fds: impl IntoIterator<Item = VcpuFd>) -> Self {
        let fds = fds.into_iter().map(|fd| Arc::new(Mutex::new(fd))).collect();
        Self { lifecycle, fds, threads: Vec::new() }
    }

    /// The vCPUs themselves. While their threads run, only [`ParkedVcpus::each`] may take these locks.
    pub fn fds(&self) -> &[Arc<Mutex<VcpuFd>>] {
        &self.fds
    }

    /// Starts the thread of a vCPU; it waits at the gate.
    ///
    /// # Errors
    /// When the host refuses another thread.
    pub fn start(&mut self, vcpu: Vcpu) -> std::io::Result<()> {
        self.threads.push(vcpu.spawn()?);
        Ok(())
    }

    /// Interrupts the vCPU threads until all of them wait at the gate. See [`Lifecycle::park`].
    pub fn park(&self, mut meanwhile: impl FnMut()) -> ParkedVcpus<'_> {
        let _parked = self.lifecycle.park(|| {
            for thread in &self.threads {
                // A thread that has just ended cannot be signalled; it need not be.
                if let Err(error) = thread.kill(SIGRTMIN()) {
                    log::trace!("a vCPU's thread has ended already: {error}");
                }
            }
            meanwhile();
        });
        ParkedVcpus { _parked, fds: &self.fds }
    }

    /// Ends the vCPU threads and joins them. Afterwards the guest does not run and calls no device.
    pub fn end(&mut self, meanwhile: impl FnMut()) {
        let parked = self.park(meanwhile);
        self.lifecycle.end();
        drop(parked);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                log::error!("a vCPU thread panicked");
            }
        }
    }
}

impl Vcpu {
    /// Starts the thread `vcpu-N`; it waits at the gate.
    ///
    /// # Errors
    /// When the host refuses another thread.
    fn spawn(self) -> std::io::Result<JoinHandle<()>> {
        interruptible()?;
        let started = self.lifecycle.thread_started();
        std::thread::Builder::new().name(format!("vcpu-{}", self.index)).stack_size(256 << 10).spawn(
            move || {
                let _started = started;
                self.run();
            },
        )
    }

    fn run(mut self) {
        let fd = Arc::clone(&self.fd);
        while self.lifecycle.pass() == Passage::Open {
            if self.counters.first_entry_us.load(Ordering::Relaxed) == 0 {
                let now = u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX);
                self.counters.first_entry_us.store(now, Ordering::Relaxed);
            }
            let mut fd = fd.lock().unwrap_or_else(PoisonError::into_inner);
            while self.lifecycle.is_open() {
                self.step(&mut fd);
            }
            // KVM completes a pending access at the next entry. With `immediate_exit` set, an entry completes
            // the access and does not run the guest. One instruction may make several accesses, so this is
            // repeated until none is pending.
            fd.set_kvm_immediate_exit(1);
            while self.step(&mut fd) == Step::Answered {}
            fd.set_kvm_immediate_exit(0);
        }
    }

    /// One entry into the guest and the answer to its exit.
    fn step(&mut self, fd: &mut VcpuFd) -> Step {
        let add = |counter: &AtomicU64| {
            counter.fetch_add(1, Ordering::Relaxed);
        };
        let counters = &*self.counters;
        let exit = fd.run();
        let exited = Instant::now();
        if exit.is_ok() {
            self.faults = 0;
        }
        let crash = match exit {
            Ok(VcpuExit::IoOut(port, _)) => {
                add(&counters.io_out);
                for data in port_accesses(fd) {
                    self.pio.write(u64::from(port), data);
                }
                None
            }
            Ok(VcpuExit::IoIn(port, _)) => {
                add(&counters.io_in);
                for data in port_accesses(fd) {
                    // Each access may wait for a peer. Once the machine is ending, nobody needs the results
                    // of the remaining accesses.
                    if self.lifecycle.is_open() || !self.lifecycle.is_ending() {
                        self.pio.read(u64::from(port), data);
                    }
                }
                None
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                add(&counters.mmio_write);
                self.peer_memory.missed(address);
                self.mmio.write(address, data);
                None
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                add(&counters.mmio_read);
                self.peer_memory.missed(address);
                self.mmio.read(address, data);
                None
            }
            Ok(VcpuExit::Intr) => {
                add(&counters.interrupted);
                return Step::Interrupted;
            }
            Err(error) if [INTERRUPTED, TRY_AGAIN].contains(&error.errno()) => {
                add(&counters.interrupted);
                return Step::Interrupted;
            }
            Ok(VcpuExit::Shutdown) => Some("the guest took a triple fault".to_owned()),
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                Some(format!("the processor refused to enter the guest (reason {reason:#x} on CPU {cpu})"))
            }
            Ok(VcpuExit::InternalError) => {
                Some("KVM could not emulate an instruction of the guest (internal error)".to_owned())
            }
            Ok(VcpuExit::SystemEvent(kind, _)) => Some(format!("KVM reported system event {kind}")),
            Ok(other) => {
                Some(format!("KVM left the guest for a reason that outboard does not handle: {other:?}"))
            }
            Err(error)
                if error.errno() == BAD_ADDRESS && out_of_reach(&mut self.faults, &self.peer_memory) =>
            {
                add(&counters.other);
                return Step::Answered;
            }
            Err(error) => Some(format!("KVM cannot run the vCPU: {error}")),
        };
        let spent = u64::try_from(exited.elapsed().as_nanos()).unwrap_or(u64::MAX);
        counters.longest_ns.fetch_max(spent, Ordering::Relaxed);
        let Some(what) = crash else { return Step::Answered };
        add(&counters.other);
        let report = format!("{what}\n{}", describe_registers(fd, self.index));
        self.lifecycle.request(Request::Crash(report));
        Step::Crashed
    }
}

/// Called when KVM could not reach guest memory: removes the part of a peer's file that cannot be reached.
/// True when the vCPU may enter the guest again.
///
/// Our own memory is sealed, so only a peer's file can fail.
///
/// 1. First the files that have become too short are removed (`Suspects::Lost`).
/// 2. A file may have its full length again by now. Such a file is found when it fails once more.
/// 3. A file may also fail for another reason. After `FAULTS` failures in a row, each part is asked for its
///    pages (`Suspects::Unreadable`).
fn out_of_reach(faults: &mut u8, peer_memory: &PeerMemory) -> bool {
    *faults = faults.saturating_add(1);
    if peer_memory.remove(Suspects::Lost) > 0 || *faults <= FAULTS {
        return true;
    }
    *faults = 0;
    peer_memory.remove(Suspects::Unreadable) > 0
}

/// Installs an empty handler for the signal that interrupts vCPU threads, so that the signal has no other
/// effect. Done once per process.
fn interruptible() -> std::io::Result<()> {
    static DONE: OnceLock<Result<(), i32>> = OnceLock::new();
    let done = DONE.get_or_init(|| {
        let registered = signal_hook::flag::register(SIGRTMIN(), Arc::default());
        registered.map(|_| ()).map_err(|error| error.raw_os_error().unwrap_or(0))
    });
    done.map_err(std::io::Error::from_raw_os_error)
}

/// The number of failures in a row after which each part of a peer's file is asked for its pages.
const FAULTS: u8 = 8;
const INTERRUPTED: i32 = 4;
const TRY_AGAIN: i32 = 11;
const BAD_ADDRESS: i32 = 14;

#[cfg(test)]
#[path = "vcpu_tests.rs"]
mod tests;
