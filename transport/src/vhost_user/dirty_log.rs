//! "Migration": the log in which a back-end marks the guest pages that it wrote.
//!
//! Bit = guest address / 4096, little-endian, from address 0 to the highest guest address. Order: SET_LOG_BASE,
//! SET_FEATURES with bit 26, SET_VRING_ADDR with the log flag; stopping goes in reverse. Who mapped the log must
//! keep it mapped until the connection ends: some back-ends go on logging after they were told to stop.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use zerocopy::IntoBytes;

use super::channel::Channel;
use super::error::{Cause, Error};
use super::features::{ProtocolFeatures, bit};
use super::live::{LiveSession, set_features};
use super::message::LogArea;
use super::request::Request;
use super::session::Session;
use crate::deadline::Deadline;
use crate::memory_map::{MemoryMap, PAGE};

/// VHOST_VRING_F_LOG.
const LOG_RING: u32 = 1;

/// Pages that one page of log covers.
const PAGES_PER_LOG_PAGE: u64 = PAGE * 8;

/// Bytes of log that `memory` needs: whole pages.
pub fn log_size(memory: &MemoryMap) -> u64 {
    memory.end().raw().div_ceil(PAGE).div_ceil(PAGES_PER_LOG_PAGE) * PAGE
}

/// The log's file.
#[derive(Debug)]
pub struct DirtyLog {
    fd: OwnedFd,
    area: LogArea,
}

impl DirtyLog {
    /// `size` bytes of `fd` from `offset` on; see [`log_size`].
    pub fn new(fd: OwnedFd, size: u64, offset: u64) -> Self {
        Self { fd, area: LogArea { size, offset } }
    }

    /// Bytes.
    pub fn size(&self) -> u64 {
        self.area.size
    }
}

impl AsFd for DirtyLog {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

pub(super) fn ring_flags(logging: bool) -> u32 {
    if logging { LOG_RING } else { 0 }
}

/// The back-end offered to log.
pub(super) fn permitted(session: &Session) -> Result<(), Error> {
    let offered = session.offered_raw().0.has(bit::LOG_ALL);
    if !offered || !session.protocol().contains(ProtocolFeatures::LOG_SHMFD) {
        return Err(session.channel.error(Request::SET_LOG_BASE, Cause::NotNegotiated));
    }
    Ok(())
}

pub(super) fn set_base(channel: &mut Channel, log: &DirtyLog, deadline: &Deadline) -> Result<(), Error> {
    channel.exchange(Request::SET_LOG_BASE, log.area.as_bytes(), &[log.as_fd()], deadline).map(|_| ())
}

impl Session {
    /// True when the back-end can log its writes.
    pub fn can_log(&self) -> bool {
        permitted(self).is_ok()
    }

    /// Logs from the next [`Session::go_live`] on.
    #[must_use]
    pub fn with_log(mut self, log: Arc<DirtyLog>) -> Self {
        self.log = Some(log);
        self
    }
}

impl LiveSession {
    /// Begins to log. Needs LOG_SHMFD and feature bit 26. Stays on over a stop and a new start.
    pub fn start_log(&mut self, log: Arc<DirtyLog>) -> Result<(), Error> {
        permitted(&self.session)?;
        let deadline = self.session.channel.deadline();
        set_base(&mut self.session.channel, &log, &deadline)?;
        set_features(&mut self.session.channel, self.features, true, &deadline)?;
        self.tell_addresses(LOG_RING, &deadline)?;
        self.session.log = Some(log);
        Ok(())
    }

    /// Ends logging. The log stays mapped in the back-end.
    pub fn stop_log(&mut self) -> Result<(), Error> {
        let deadline = self.session.channel.deadline();
        self.session.log = None;
        self.tell_addresses(0, &deadline)?;
        set_features(&mut self.session.channel, self.features, false, &deadline)
    }

    /// Has `eventfd` signalled when the log changed. Few back-ends do.
    pub fn notify_log(&mut self, eventfd: BorrowedFd<'_>) -> Result<(), Error> {
        permitted(&self.session)?;
        let deadline = self.session.channel.deadline();
        self.session.channel.exchange(Request::SET_LOG_FD, &[], &[eventfd], &deadline).map(|_| ())
    }

    fn tell_addresses(&mut self, flags: u32, deadline: &Deadline) -> Result<(), Error> {
        for address in &mut self.addresses {
            address.flags = flags;
            let channel = &mut self.session.channel;
            channel.exchange(Request::SET_VRING_ADDR, address.as_bytes(), &[], deadline)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory_map::{GuestAddr, SharedRegion};

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
