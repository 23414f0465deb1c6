//! NVMe 1.4 §4.1: queues are rings in the guest's memory. The guest moves the tail of submission queues and
//! the head of completion queues by doorbells; a value beyond the ring is refused.

use std::io::{Error, Result};

use super::command::{COMPLETION, Completion, SUBMISSION};
use crate::guest_memory::GuestMemory;

/// Commands from the guest.
#[derive(Debug)]
pub struct SubmissionQueue {
    /// Where it is.
    pub base: u64,
    /// Entries.
    pub size: u16,
    /// The next to take.
    pub head: u16,
    tail: u16,
    /// Where the answers go.
    pub completion: u16,
}

impl SubmissionQueue {
    /// An empty one.
    #[must_use]
    pub fn new(base: u64, size: u16, completion: u16) -> Self {
        Self { base, size, head: 0, tail: 0, completion }
    }

    /// A new tail; false when there is no such entry.
    pub fn take_tail(&mut self, value: u32) -> bool {
        set(&mut self.tail, value, self.size)
    }

    /// True when there is no command.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.head == self.tail
    }

    /// The next command.
    ///
    /// # Errors
    /// When the queue is not in memory.
    pub fn take(&mut self, memory: &GuestMemory) -> Result<[u8; SUBMISSION]> {
        let mut bytes = [0; SUBMISSION];
        memory.read(entry(self.base, self.head, SUBMISSION)?, &mut bytes)?;
        self.head = (self.head + 1) % self.size;
        Ok(bytes)
    }
}

/// Answers to the guest.
#[derive(Debug)]
pub struct CompletionQueue {
    /// Where it is.
    pub base: u64,
    /// Entries.
    pub size: u16,
    head: u16,
    tail: u16,
    phase: u16,
    /// Which interrupt tells of answers; none when the guest polls.
    pub vector: Option<u16>,
    /// Answers since the last interrupt.
    pub posted: bool,
}

impl CompletionQueue {
    /// An empty one.
    #[must_use]
    pub fn new(base: u64, size: u16, vector: Option<u16>) -> Self {
        Self { base, size, head: 0, tail: 0, phase: 1, vector, posted: false }
    }

    /// A new head; false when there is no such entry.
    pub fn take_head(&mut self, value: u32) -> bool {
        set(&mut self.head, value, self.size)
    }

    /// True when the guest must take answers first.
    #[must_use]
    pub fn is_full(&self) -> bool {
        (self.tail + 1) % self.size == self.head
    }

    /// Adds an answer; its phase tag is in the last bytes that are written.
    ///
    /// # Errors
    /// When the queue is not in memory.
    pub fn post(&mut self, memory: &GuestMemory, completion: &Completion) -> Result<()> {
        let bytes = completion.bytes(self.phase);
        let at = entry(self.base, self.tail, COMPLETION)?;
        // The guest looks at the phase tag, so what it stands for is written before it.
        let (body, tag) = bytes.split_at(COMPLETION - 4);
        memory.write(at, body)?;
        memory.write(at.wrapping_add(body.len() as u64), tag)?;
        self.tail = (self.tail + 1) % self.size;
        if self.tail == 0 {
            self.phase ^= 1;
        }
        self.posted = true;
        Ok(())
    }
}

/// Where an entry is. The guest says where the queue begins, which may be near the end of all addresses.
fn entry(base: u64, number: u16, size: usize) -> Result<u64> {
    let offset = u64::from(number) * u64::try_from(size).map_err(Error::other)?;
    base.checked_add(offset).ok_or_else(|| Error::other("a queue beyond all addresses"))
}

fn set(place: &mut u16, value: u32, size: u16) -> bool {
    match u16::try_from(value) {
        Ok(value) if value < size => {
            *place = value;
            true
        }
        _ => false,
    }
}
