//! NVMe 1.4 §3.1: the controller's registers. Decides when the controller becomes ready; starts and stops
//! nothing itself.

use super::queue::{CompletionQueue, SubmissionQueue};

/// Entries that a queue may have, less one.
pub const MAX_ENTRIES: u16 = 1023;

const CAP: u64 = 0x00;
const VS: u64 = 0x08;
const INTMS: u64 = 0x0c;
const INTMC: u64 = 0x10;
const CC: u64 = 0x14;
const CSTS: u64 = 0x1c;
const AQA: u64 = 0x24;
const ASQ: u64 = 0x28;
const ACQ: u64 = 0x30;

/// Version 1.4.
pub const VERSION: u32 = 0x0001_0400;

const ENABLE: u32 = 1;
const SHUTDOWN: u32 = 3 << 14;
/// Entry sizes, command set and page size that are the only ones: bits 23:16, 6:4 and 10:7.
const FIXED: u32 = 0x00ff_07f0;
const SIXTY_FOUR_AND_SIXTEEN: u32 = 0x0046_0000;

const READY: u32 = 1;
const FATAL: u32 = 2;
const SHUT_DOWN: u32 = 2 << 2;

/// What a write does to the controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Nothing.
    None,
    /// The admin queues begin.
    Enabled,
    /// All queues end.
    Disabled,
}

/// The registers.
#[derive(Clone, Debug, Default)]
pub struct Registers {
    mask: u32,
    control: u32,
    status: u32,
    admin_sizes: u32,
    admin_submission: u64,
    admin_completion: u64,
}

impl Registers {
    /// As after a reset.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn value(&self, register: u64) -> u64 {
        match register {
            // Contiguous queues, ready within 10 s, doorbells 4 bytes apart, the NVM command set, pages of 4
            // KiB.
            CAP => u64::from(MAX_ENTRIES) | 1 << 16 | 20 << 24 | 1 << 37,
            0x04 => self.value(CAP) >> 32,
            VS => u64::from(VERSION),
            INTMS | INTMC => u64::from(self.mask),
            CC => u64::from(self.control),
            CSTS => u64::from(self.status),
            AQA => u64::from(self.admin_sizes),
            ASQ => self.admin_submission,
            0x2c => self.admin_submission >> 32,
            ACQ => self.admin_completion,
            0x34 => self.admin_completion >> 32,
            _ => 0,
        }
    }

    /// Reads 4 bytes, or 8 of a wide register; other widths get the bytes in question.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        // Wide enough for every access that a processor makes.
        let base = offset & !3;
        let words = [base, base + 4, base + 8].map(|at| self.value(at).to_le_bytes());
        let bytes = words.iter().flat_map(|word| word.iter().take(4));
        let skip = usize::try_from(offset - base).unwrap_or(0);
        for (to, from) in data.iter_mut().zip(bytes.skip(skip)) {
            *to = *from;
        }
    }

    /// Writes a register of 4 bytes, or of 8 in one or two pieces; other accesses are undefined (§3.1) and
    /// ignored.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Change {
        let word = |at: usize| {
            data.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_le_bytes)
        };
        match data.len() {
            4 if offset.is_multiple_of(4) => self.write_word(offset, word(0)),
            8 if offset.is_multiple_of(8) => {
                self.write_word(offset, word(0));
                self.write_word(offset + 4, word(4))
            }
            _ => Change::None,
        }
    }

    fn write_word(&mut self, register: u64, value: u32) -> Change {
        let (wide, low) = (u64::from(value), 0xffff_ffff);
        match register {
            INTMS => self.mask |= value,
            INTMC => self.mask &= !value,
            CC => return self.control(value),
            AQA => self.admin_sizes = value & 0x0fff_0fff,
            ASQ => self.admin_submission = self.admin_submission & !low | wide & !0xfff,
            0x2c => self.admin_submission = self.admin_submission & low | wide << 32,
            ACQ => self.admin_completion = self.admin_completion & !low | wide & !0xfff,
            0x34 => self.admin_completion = self.admin_completion & low | wide << 32,
            _ => {}
        }
        Change::None
    }

    fn control(&mut self, value: u32) -> Change {
        let before = self.control;
        self.control = value;
        if value & SHUTDOWN != 0 {
            // Nothing is kept back that a shutdown would have to write.
            self.status |= SHUT_DOWN;
        }
        if before & ENABLE == 0 && value & ENABLE != 0 {
            if value & FIXED != SIXTY_FOUR_AND_SIXTEEN && value & FIXED != 0 {
                log::warn!("enabled with entry sizes or pages that there are not: {value:#x}");
                self.status |= FATAL;
                return Change::None;
            }
            self.status = READY;
            return Change::Enabled;
        }
        if before & ENABLE != 0 && value & ENABLE == 0 {
            self.status &= !(READY | FATAL);
            return Change::Disabled;
        }
        Change::None
    }

    /// The admin queues as they were set up.
    #[must_use]
    pub fn admin_queues(&self) -> (SubmissionQueue, CompletionQueue) {
        let [submission, completion] = [self.admin_sizes & 0xfff, self.admin_sizes >> 16 & 0xfff]
            // At least two entries, or a queue could never hold one.
            .map(|less_one| u16::try_from(less_one + 1).unwrap_or(2).max(2));
        (
            SubmissionQueue::new(self.admin_submission, submission, 0),
            CompletionQueue::new(self.admin_completion, completion, Some(0)),
        )
    }

    /// True while commands are taken.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.status & (READY | FATAL) == READY
    }

    /// A fatal error: nothing more happens until the guest resets the controller.
    pub fn fail(&mut self) {
        self.status |= FATAL;
    }
}
