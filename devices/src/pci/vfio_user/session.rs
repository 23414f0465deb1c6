//! [`Server`] over vfio-user: one connection, and the server's process if it can be seen from here.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt::socket_peercred;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use transport::peer::deadline::Deadline;
use transport::peer::{Cause, Error};
use transport::vfio_user::{Client, ClientStats, IrqIndex, RegionIndex};

use super::pin::Look;
use super::server::{Irq, Server, ServerError, ServerStats};
use crate::lock;
use crate::pci::config_space::offset;

/// Bit of the status register: the device asserts its pin.
const INTERRUPT_STATUS: u8 = 1 << 3;

/// One connection.
pub(super) struct Session {
    client: Client,
    /// Held by the thread that has a request under way. Only for servers to which nothing may be sent while
    /// they owe an answer: such a server may send a request of its own meanwhile, and then takes the next
    /// message from us for the reply.
    turn: Option<Mutex<()>>,
    /// The server's process, if it can be seen from here.
    process: Option<(Pid, OwnedFd)>,
}

impl Session {
    pub(super) fn new(client: &Client) -> io::Result<Self> {
        let socket = client.hang_up().map_err(io::Error::other)?;
        let process = socket_peercred(&socket).ok().map(|who| who.pid);
        let process = process.and_then(|pid| Some((pid, pidfd_open(pid, PidfdFlags::empty()).ok()?)));
        let turn = client.version().must_not_cross().then(Mutex::default);
        Ok(Self { client: client.clone(), turn, process })
    }
}

fn sort(error: Error) -> ServerError {
    match error.cause() {
        Cause::Closed | Cause::ClosedMidMessage => ServerError::Closed(error.into()),
        _ if error.is_fatal() => ServerError::Lost(error.into()),
        _ => ServerError::Refused(error.into()),
    }
}

fn index(kind: Irq) -> IrqIndex {
    match kind {
        Irq::Intx => IrqIndex::INTX,
        Irq::Msi => IrqIndex::MSI,
        Irq::MsiX => IrqIndex::MSIX,
    }
}

/// Whether a process is exiting: the kernel closes its descriptors before its pidfd becomes readable.
fn is_exiting(pid: Pid) -> bool {
    const PF_EXITING: u64 = 4;
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    // The process name may hold anything and is in parentheses; the flags are the seventh field after it.
    let flags = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(6));
    flags.and_then(|flags| flags.parse::<u64>().ok()).is_none_or(|flags| flags & PF_EXITING != 0)
}

impl Server for Session {
    fn limit(&self) -> Duration {
        self.client.limit()
    }

    fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        self.turn.as_ref().map(lock)
    }

    fn read(&self, region: u8, offset: u64, data: &mut [u8], until: &Deadline) -> Result<(), ServerError> {
        self.client.until(until).read(RegionIndex(region.into()), offset, data).map_err(sort)
    }

    fn write(&self, region: u8, offset: u64, data: &[u8], until: &Deadline) -> Result<(), ServerError> {
        self.client.until(until).write(RegionIndex(region.into()), offset, data).map_err(sort)
    }

    fn post(&self, region: u8, offset: u64, data: &[u8], until: &Deadline) -> Result<(), ServerError> {
        self.client.until(until).post_write(RegionIndex(region.into()), offset, data).map_err(sort)
    }

    fn arm(&self, kind: Irq, calls: &[BorrowedFd<'_>], until: &Deadline) -> Result<(), ServerError> {
        self.client.until(until).arm_irqs(index(kind), calls).map_err(sort)
    }

    fn disarm(&self, kind: Irq, until: &Deadline) -> Result<(), ServerError> {
        self.client.until(until).disable_irqs(index(kind)).map_err(sort)
    }

    fn unmask_pin(&self, look: Look) -> Result<(), ServerError> {
        // This call must not wait for a turn. Every server gets the message, whether or not it announces that
        // it masks its pin (no library announces it): a server that masks the pin and gets no message would
        // never raise the pin again.
        let pin = IrqIndex::INTX;
        // Servers of version 0.0 do not use libvfio-user and raise the pin again by themselves. A look would
        // interrupt the guest twice.
        if !self.client.version().is_extended() {
            return self.client.unmask_irqs_then(pin, 0, 1, move || drop(look)).map_err(sort);
        }
        self.client.unmask_irqs_then(pin, 0, 1, || ()).map_err(sort)?;
        // libvfio-user does nothing on this message, and it signals a level once, however long the pin stays
        // asserted. So the status register is read, where the device keeps the pin's state. The read is an
        // aligned dword, because some servers abort on anything else.
        let told = move |dword: &[u8]| {
            if dword.get(2).is_some_and(|status| status & INTERRUPT_STATUS != 0) {
                look.asserted();
            }
        };
        self.client.read_then(RegionIndex::CONFIG, offset::COMMAND.into(), 4, told).map_err(sort)
    }

    fn reset(&self, until: &Deadline) -> Result<(), ServerError> {
        self.client.until(until).reset().map_err(sort)
    }

    fn shut_down(&self) {
        self.client.shut_down();
    }

    fn is_alive(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        self.process.as_ref().is_some_and(|(pid, fd)| {
            let lives = poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&now)).is_ok_and(|ready| ready == 0);
            lives && !is_exiting(*pid)
        })
    }

    fn stats(&self) -> ServerStats {
        let ClientStats { exchanges, posted, .. } = self.client.stats();
        ServerStats {
            messages: exchanges.sent.saturating_add(posted),
            waits: exchanges.answers.saturating_add(exchanges.failures),
            worst_wait: exchanges.worst_wait,
        }
    }
}
