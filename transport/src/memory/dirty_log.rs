//! The log in which peers mark the guest pages that they wrote.
//!
//! The number of a page's bit is the page's guest address / 4096. The log is little-endian and covers address
//! 0 to the highest guest address.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use super::map::{MemoryMap, PAGE};

/// Guest pages that one page of log covers.
const PAGES_PER_LOG_PAGE: u64 = PAGE * 8;

/// Bytes of log that `memory` needs, in whole pages.
pub fn log_size(memory: &MemoryMap) -> u64 {
    memory.end().raw().div_ceil(PAGE).div_ceil(PAGES_PER_LOG_PAGE) * PAGE
}

/// A dirty log in a file.
#[derive(Debug)]
pub struct DirtyLog {
    fd: OwnedFd,
    size: u64,
    offset: u64,
}

impl DirtyLog {
    /// The log in `size` bytes of `fd`, from `offset` on; see [`log_size`].
    pub fn new(fd: OwnedFd, size: u64, offset: u64) -> Self {
        Self { fd, size, offset }
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }
}

impl AsFd for DirtyLog {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::map::{GuestAddr, SharedRegion};
    use std::sync::Arc;

    #[test]
    fn the_log_covers_the_highest_guest_address_in_whole_pages() {
        let size = |end: u64| {
            let fd = Arc::new(std::fs::File::open("/dev/null").unwrap().into());
            log_size(&MemoryMap::new(vec![SharedRegion::new(GuestAddr(0), end, fd, 0)]).unwrap())
        };
        assert_eq!(size(4096), 4096);
        assert_eq!(size(128 << 20), 4096);
        assert_eq!(size((128 << 20) + 4096), 8192);
        assert_eq!(size(4 << 30), 32 * 4096);
    }
}
