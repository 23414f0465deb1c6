//! vhost-user "Migration": the log in which a backend marks the guest pages that it wrote.
//!
//! The number of a page's bit is the page's guest address / 4096. The log is little-endian and covers address
//! 0 to the highest guest address.
//!
//! Order at the start: SET_LOG_BASE, SET_FEATURES with bit 26, SET_VRING_ADDR with the log flag. Order at the
//! end: the reverse. The caller must keep the log mapped until the connection ends, as some backends go on
//! logging after they were told to stop.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use zerocopy::IntoBytes;

use crate::memory::DirtyLog;
use crate::peer::Error;
use crate::peer::deadline::Deadline;
use crate::vhost_user::live::{LOG_RING, LiveSession, set_features, set_log_base};
use crate::vhost_user::request::Request;

impl LiveSession {
    /// Starts logging. Needs LOG_SHMFD and feature bit 26. Logging stays on when the rings are stopped and
    /// started again.
    pub fn start_log(&mut self, log: Arc<DirtyLog>) -> Result<(), Error> {
        self.session.log_permitted()?;
        let deadline = self.session.channel.deadline();
        set_log_base(&mut self.session.channel, &log, &deadline)?;
        set_features(&mut self.session.channel, self.features, true, &deadline)?;
        self.tell_addresses(LOG_RING, &deadline)?;
        self.session.log = Some(log);
        Ok(())
    }

    /// Ends logging. The backend keeps the log mapped.
    pub fn stop_log(&mut self) -> Result<(), Error> {
        let deadline = self.session.channel.deadline();
        self.session.log = None;
        self.tell_addresses(0, &deadline)?;
        set_features(&mut self.session.channel, self.features, false, &deadline)
    }

    /// Makes the backend signal `eventfd` when the log changed. Few backends do it.
    pub fn notify_log(&mut self, eventfd: BorrowedFd<'_>) -> Result<(), Error> {
        self.session.log_permitted()?;
        self.session.channel.order(Request::SET_LOG_FD, &[], &[eventfd])
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
