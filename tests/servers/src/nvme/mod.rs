//! An NVMe controller (NVM Express 1.4) with one namespace on a file, as a PCI function.
//!
//! | module | what it holds |
//! |--|--|
//! | [`registers`] | §3.1: the registers, and when they enable and disable the controller |
//! | [`queue`] | §4.1: submission and completion queues in the guest's memory |
//! | [`command`] | §4.2, §4.6: the bytes of commands and completions, status codes |
//! | [`prp`] | §4.3: where a command's data is |
//! | [`admin`], [`identify`] | §5: the admin commands |
//! | [`io`] | §6: read, write, flush, write zeroes |
//!
//! BAR 0 is 16 KiB: registers, doorbells on a page of their own, the MSI-X table, its pending bits. With
//! mapped doorbells the guest writes that page without an exit, and the controller looks at it.

pub mod admin;
pub mod command;
pub mod identify;
pub mod io;
pub mod prp;
pub mod queue;
pub mod registers;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Result;
use std::path::Path;

use vfio_bindings::bindings::vfio::{VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX};
use vfio_user::{IrqInfo, ServerRegion};

use crate::area::Area;
use crate::config_space::{self, Bar, ConfigSpace, Decode, Effect, Identity};
use crate::guest_memory::GuestMemory;
use crate::interrupts::{Interrupts, Kind};
use crate::options::Doorbells;
use crate::serve::{Device, Progress};
use command::{Completion, Status, Submission};
use queue::{CompletionQueue, SubmissionQueue};
use registers::{Change, Registers};

/// Vendor and device; drivers bind by class.
pub const ID: (u16, u16) = (0x1234, 0x0b0e);
/// Bytes of a logical block.
pub const BLOCK: u64 = 512;
/// MSI-X vectors, and pairs of I/O queues.
pub const VECTORS: u16 = 16;

const BAR_SIZE: u64 = 0x4000;
const DOORBELLS: u64 = 0x1000;
const MSIX_TABLE: u32 = 0x2000;
const MSIX_PENDING: u32 = 0x3000;
/// Commands taken at a time, so that the registers are never locked for long.
const BATCH: usize = 64;

/// The controller.
#[derive(Debug)]
pub struct Nvme {
    config: ConfigSpace,
    registers: Registers,
    /// BAR 0, of which only the doorbell page is used.
    bar: Area,
    doorbells: Doorbells,
    disk: File,
    blocks: u64,
    memory: GuestMemory,
    interrupts: Interrupts,
    submission: BTreeMap<u16, SubmissionQueue>,
    completion: BTreeMap<u16, CompletionQueue>,
    /// Outstanding ASYNCHRONOUS EVENT REQUESTs: their command identifiers.
    events: Vec<u16>,
    features: BTreeMap<u8, u32>,
}

impl Nvme {
    /// A controller for the disk in this file.
    ///
    /// # Errors
    /// When the file cannot be opened for reading and writing.
    pub fn new(disk: &Path, doorbells: Doorbells) -> Result<Self> {
        let disk = File::options().read(true).write(true).open(disk)?;
        let blocks = disk.metadata()?.len() / BLOCK;
        let mut config = ConfigSpace::new(&Identity {
            id: ID,
            subsystem: (0x1af4, 0x0b0e),
            class: [0x01, 0x08, 0x02],
            pin: 0,
        });
        let bar = Area::new("nvme-bar0", usize::try_from(BAR_SIZE).unwrap_or(0))?;
        config.bar(&Bar { index: 0, size: BAR_SIZE, decode: Decode::Memory64, mapped: None });
        config.msix(VECTORS, 0, MSIX_TABLE, MSIX_PENDING);
        config.express();
        Ok(Self {
            config: config.finish(),
            registers: Registers::new(),
            bar,
            doorbells,
            disk,
            blocks,
            memory: GuestMemory::new(),
            interrupts: Interrupts::new(0, 0, usize::from(VECTORS)),
            submission: BTreeMap::new(),
            completion: BTreeMap::new(),
            events: Vec::new(),
            features: BTreeMap::new(),
        })
    }

    fn doorbell(queue: u16, completion: usize) -> usize {
        0x1000 + (usize::from(queue) * 2 + completion) * 4
    }

    fn enable(&mut self) {
        let (submission, completion) = self.registers.admin_queues();
        self.bar.clear();
        self.completion.insert(0, completion);
        self.submission.insert(0, submission);
    }

    fn disable(&mut self) {
        self.submission.clear();
        self.completion.clear();
        self.events.clear();
        self.features.clear();
        self.bar.clear();
    }

    fn configure(&mut self, offset: u64, data: &[u8]) {
        if self.config.write(offset, data) == Effect::Reset {
            self.function_reset();
        }
    }

    fn function_reset(&mut self) {
        self.disable();
        self.registers = Registers::new();
    }

    /// Executes one command of a queue; false when there is none, or no room for its answer.
    fn step(&mut self, queue: u16) -> bool {
        if !self.registers.is_ready() {
            return false;
        }
        let Some(submission) = self.submission.get_mut(&queue) else { return false };
        let to = submission.completion;
        let Some(completion) = self.completion.get_mut(&to) else { return false };
        if !completion.take_head(self.bar.load(Self::doorbell(to, 1)))
            || !submission.take_tail(self.bar.load(Self::doorbell(queue, 0)))
        {
            // NVMe §5.2, error information: an invalid doorbell value; a real controller reports it by an
            // event.
            log::warn!("queue {queue}: a doorbell beyond the queue");
            self.registers.fail();
            return false;
        }
        if submission.is_empty() || completion.is_full() {
            return false;
        }
        let taken = submission.take(&self.memory);
        let head = submission.head;
        let bytes = match taken {
            Ok(bytes) => bytes,
            Err(error) => {
                log::warn!("queue {queue} cannot be read: {error}");
                self.registers.fail();
                return false;
            }
        };
        let command = Submission::parse(&bytes);
        let answer = if queue == 0 { self.admin(&command) } else { Some(self.io(&command)) };
        if let Some((result, status)) = answer {
            log::trace!("queue {queue}: {command:x?}: {status:?} {result:#x}");
            self.complete(to, &Completion { result, head, queue, command: command.id, status });
        }
        true
    }

    fn complete(&mut self, to: u16, completion: &Completion) {
        let Some(queue) = self.completion.get_mut(&to) else { return };
        if let Err(error) = queue.post(&self.memory, completion) {
            log::warn!("queue {to} cannot be written: {error}");
            self.registers.fail();
        }
    }

    fn interrupt(&mut self) {
        for queue in self.completion.values_mut() {
            if std::mem::take(&mut queue.posted)
                && let Some(vector) = queue.vector
            {
                self.interrupts.raise(Kind::Msix, u32::from(vector));
            }
        }
    }

    fn success(result: u32) -> Option<(u32, Status)> {
        Some((result, Status::SUCCESS))
    }
}

impl Device for Nvme {
    fn regions(&self) -> Vec<ServerRegion> {
        let pieces = [(DOORBELLS, 0x1000)];
        let mapped = (self.doorbells == Doorbells::Mapped).then_some((&self.bar, pieces.as_slice()));
        config_space::regions(&[Bar { index: 0, size: BAR_SIZE, decode: Decode::Memory64, mapped }])
    }

    fn irqs(&self) -> Vec<IrqInfo> {
        self.interrupts.describe()
    }

    fn read(&mut self, region: u32, offset: u64, data: &mut [u8]) -> Result<()> {
        match region {
            VFIO_PCI_CONFIG_REGION_INDEX => self.config.read(offset, data),
            VFIO_PCI_BAR0_REGION_INDEX if offset < DOORBELLS => self.registers.read(offset, data),
            // Doorbells are not for reading, and the client holds the MSI-X table.
            _ => data.fill(0),
        }
        Ok(())
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<()> {
        match region {
            VFIO_PCI_CONFIG_REGION_INDEX => self.configure(offset, data),
            VFIO_PCI_BAR0_REGION_INDEX if offset < DOORBELLS => match self.registers.write(offset, data) {
                Change::None => {}
                Change::Enabled => self.enable(),
                Change::Disabled => self.disable(),
            },
            VFIO_PCI_BAR0_REGION_INDEX if offset < u64::from(MSIX_TABLE) && data.len() == 4 => {
                let value = data.try_into().map_or(0, u32::from_le_bytes);
                self.bar.store(usize::try_from(offset & !3).unwrap_or(0), value);
            }
            _ => {}
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.function_reset();
        self.config.reset();
    }

    fn memory(&mut self) -> &mut GuestMemory {
        &mut self.memory
    }

    fn interrupts(&mut self) -> &mut Interrupts {
        &mut self.interrupts
    }

    fn poll(&mut self) -> Progress {
        if !self.registers.is_ready() {
            return Progress::Asleep;
        }
        let mut done = 0;
        // Queues take turns, a command each, until none has any or it is time for others to look at the
        // registers.
        loop {
            let queues: Vec<u16> = self.submission.keys().copied().collect();
            let taken = queues.into_iter().filter(|queue| self.step(*queue)).count();
            done += taken;
            if taken == 0 || done >= BATCH {
                break;
            }
        }
        self.interrupt();
        match (done, self.doorbells) {
            (0, Doorbells::Mapped) => Progress::Idle,
            (0, Doorbells::Trapped) => Progress::Asleep,
            _ => Progress::Busy,
        }
    }
}
