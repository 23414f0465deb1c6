//! NVMe 1.4 §5.15.2: what IDENTIFY answers, 4096 bytes each.

use super::prp::MAX_TRANSFER_PAGES_LOG2;
use super::registers::VERSION;

/// Bytes of every answer.
pub const SIZE: usize = 4096;
/// Outstanding event requests, less one.
pub const EVENTS: u8 = 3;

/// The namespace's identifier. A guest takes one namespace of an identifier, so that of each process is
/// another.
fn guid() -> [u8; 16] {
    let mut guid = *b"outboard-ns-....";
    guid[12..].copy_from_slice(&std::process::id().to_be_bytes());
    guid
}

/// The subsystem's name. A guest takes one controller of a name, so that of each process is another.
fn name() -> String {
    format!("nqn.2014-08.org.nvmexpress:uuid:6f757462-6f61-4264-8000-{:012}", std::process::id())
}

struct Page(Vec<u8>);

impl Page {
    fn new() -> Self {
        Self(vec![0; SIZE])
    }

    fn put(mut self, at: usize, bytes: &[u8]) -> Self {
        for (to, from) in self.0.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
        self
    }

    /// Text fields are padded with spaces.
    fn text(self, at: usize, length: usize, text: &str) -> Self {
        self.put(at, format!("{text:length$}").as_bytes())
    }
}

/// Figure 247: the controller.
#[must_use]
pub fn controller() -> Vec<u8> {
    Page::new()
        .put(0, &super::ID.0.to_le_bytes())
        .put(2, &0x1af4_u16.to_le_bytes())
        .text(4, 20, "outboard0001")
        .text(24, 40, "outboard test NVMe")
        .text(64, 8, "1.0")
        // Most bytes of a transfer.
        .put(77, &[MAX_TRANSFER_PAGES_LOG2])
        .put(78, &1_u16.to_le_bytes())
        .put(80, &VERSION.to_le_bytes())
        // An I/O controller.
        .put(111, &[1])
        // Limits of ABORT and of event requests.
        .put(258, &[3, EVENTS])
        // The smallest and largest entries: 64 and 16 bytes.
        .put(512, &[0x66, 0x44])
        .put(516, &1_u32.to_le_bytes())
        // Write zeroes.
        .put(520, &(1_u16 << 3).to_le_bytes())
        // A volatile write cache: the guest flushes.
        .put(525, &[1])
        .put(768, name().as_bytes())
        .0
}

/// Figure 245: the namespace.
#[must_use]
pub fn namespace(blocks: u64) -> Vec<u8> {
    let size = blocks.to_le_bytes();
    Page::new()
        .put(0, &size)
        .put(8, &size)
        .put(16, &size)
        .put(104, &guid())
        // Format 0: no metadata, blocks of 2^9 bytes.
        .put(130, &[9])
        .0
}

/// Figure 245 for a namespace that there is not.
#[must_use]
pub fn nothing() -> Vec<u8> {
    Page::new().0
}

/// CNS 2: the namespaces above `after`.
#[must_use]
pub fn active(after: u32) -> Vec<u8> {
    if after == 0 { Page::new().put(0, &1_u32.to_le_bytes()).0 } else { nothing() }
}

/// CNS 3: how the namespace is told from others.
#[must_use]
pub fn descriptors() -> Vec<u8> {
    Page::new().put(0, &[2, 16, 0, 0]).put(4, &guid()).0
}
