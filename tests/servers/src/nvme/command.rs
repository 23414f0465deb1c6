//! NVMe 1.4 §4.2 and §4.6: submission entries of 64 bytes, completion entries of 16, status codes.

/// Bytes of a submission entry.
pub const SUBMISSION: usize = 64;
/// Bytes of a completion entry.
pub const COMPLETION: usize = 16;

/// Reads 4 bytes; 0 past the end.
#[must_use]
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_le_bytes)
}

/// Reads 8 bytes; 0 past the end.
#[must_use]
pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|word| word.try_into().ok()).map_or(0, u64::from_le_bytes)
}

/// The low half of a double word.
#[must_use]
pub fn low(word: u32) -> u16 {
    let [a, b, _, _] = word.to_le_bytes();
    u16::from_le_bytes([a, b])
}

/// The high half of a double word.
#[must_use]
pub fn high(word: u32) -> u16 {
    let [_, _, a, b] = word.to_le_bytes();
    u16::from_le_bytes([a, b])
}

/// A command.
#[derive(Clone, Copy, Debug)]
pub struct Submission {
    /// What to do.
    pub opcode: u8,
    /// Identifier, unique within its queue.
    pub id: u16,
    /// Namespace.
    pub namespace: u32,
    /// Where the data is, in pages.
    pub prp: [u64; 2],
    /// Command double words 10 to 15.
    pub words: [u32; 6],
}

impl Submission {
    /// From its bytes.
    #[must_use]
    pub fn parse(bytes: &[u8; SUBMISSION]) -> Self {
        let first = u32_at(bytes, 0);
        Self {
            opcode: first.to_le_bytes()[0],
            id: high(first),
            namespace: u32_at(bytes, 4),
            prp: [u64_at(bytes, 24), u64_at(bytes, 32)],
            words: [40, 44, 48, 52, 56, 60].map(|at| u32_at(bytes, at)),
        }
    }
}

/// Status code type and status code: bits 10:8 and 7:0 of the status field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u16);

impl Status {
    /// It worked.
    pub const SUCCESS: Self = Self(0);
    /// No such opcode.
    pub const INVALID_OPCODE: Self = Self(0x01);
    /// A field that makes no sense.
    pub const INVALID_FIELD: Self = Self(0x02);
    /// The data could not be reached.
    pub const DATA_TRANSFER_ERROR: Self = Self(0x04);
    /// The disk failed.
    pub const INTERNAL_ERROR: Self = Self(0x06);
    /// Ended by ABORT.
    pub const ABORT_REQUESTED: Self = Self(0x07);
    /// No such namespace.
    pub const INVALID_NAMESPACE: Self = Self(0x0b);
    /// A PRP offset that is not allowed.
    pub const INVALID_PRP: Self = Self(0x13);
    /// Past the end of the disk.
    pub const LBA_OUT_OF_RANGE: Self = Self(0x80);
    /// The completion queue is not there.
    pub const INVALID_COMPLETION_QUEUE: Self = Self(0x100);
    /// Queue identifier taken, 0, absent or too high.
    pub const INVALID_QUEUE: Self = Self(0x101);
    /// Queue too long or too short.
    pub const INVALID_QUEUE_SIZE: Self = Self(0x102);
    /// More events asked for than the controller takes.
    pub const TOO_MANY_EVENTS: Self = Self(0x105);
    /// No such vector.
    pub const INVALID_VECTOR: Self = Self(0x108);
    /// No such log page.
    pub const INVALID_LOG_PAGE: Self = Self(0x109);
    /// A completion queue that is still in use.
    pub const INVALID_QUEUE_DELETION: Self = Self(0x10c);
}

/// An answer.
#[derive(Clone, Copy, Debug)]
pub struct Completion {
    /// Double word 0.
    pub result: u32,
    /// The submission queue's head.
    pub head: u16,
    /// The submission queue.
    pub queue: u16,
    /// The command's identifier.
    pub command: u16,
    /// How it went.
    pub status: Status,
}

impl Completion {
    /// Its bytes, with the phase tag of this round through the queue.
    #[must_use]
    pub fn bytes(&self, phase: u16) -> [u8; COMPLETION] {
        let fields = self.result.to_le_bytes().into_iter().chain([0; 4]).chain(
            [self.head, self.queue, self.command, self.status.0 << 1 | phase]
                .into_iter()
                .flat_map(u16::to_le_bytes),
        );
        let mut bytes = [0; COMPLETION];
        for (to, from) in bytes.iter_mut().zip(fields) {
            *to = from;
        }
        bytes
    }
}
