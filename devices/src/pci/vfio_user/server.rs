//! What the device asks of the server of its function: requests independent of the protocol ([`Server`]), and
//! a link that ends once and for good ([`ServerLink`]). Must never take a lock of the device.
//!
//! [`ServerLink::access`] begins one access of the guest. All requests of that access share one deadline,
//! however many requests there are. A server that exceeds the deadline is given up; from then on no access
//! waits for it.

use std::error::Error;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard, OnceLock};
use std::time::Duration;

use transport::peer::deadline::Deadline;

use super::pin::Look;

/// The index of the region that holds the configuration space.
pub const CONFIG_REGION: u8 = 7;

/// A kind of interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Irq {
    /// INTx: the interrupt pin.
    Intx,
    /// MSI.
    Msi,
    /// MSI-X.
    MsiX,
}

/// Why a request to the server failed.
#[derive(Debug)]
pub enum ServerError {
    /// The server refused the request. It can be asked again.
    Refused(Box<dyn Error + Send + Sync>),
    /// The server closed the connection.
    Closed(Box<dyn Error + Send + Sync>),
    /// The server cannot be used any more for another reason.
    Lost(Box<dyn Error + Send + Sync>),
}

/// Traffic with the server, since it was connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ServerStats {
    /// Messages sent to the server.
    pub messages: u64,
    /// Answers that a thread waited for.
    pub waits: u64,
    /// The longest wait.
    pub worst_wait: Duration,
}

/// The server of a function. Called on vCPU threads, several at once, and on the control thread. A call that
/// takes a deadline returns at the deadline at the latest.
///
/// # Errors
/// Each method fails when the server refuses or is lost.
#[allow(clippy::missing_errors_doc)]
pub trait Server: Send + Sync {
    /// How long one access of the guest may wait.
    fn limit(&self) -> Duration;

    /// Waits until no other thread has a request under way, where the server can be asked only one thing at a
    /// time. The turn lasts until the returned guard is dropped.
    fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        None
    }

    /// Reads all of `data` from a region.
    fn read(&self, region: u8, offset: u64, data: &mut [u8], until: &Deadline) -> Result<(), ServerError>;

    /// Writes to a region, and waits for the answer.
    fn write(&self, region: u8, offset: u64, data: &[u8], until: &Deadline) -> Result<(), ServerError>;

    /// Writes to a region without waiting for an answer. The server handles the write before any later
    /// request; whether the write succeeded stays unknown.
    fn post(&self, region: u8, offset: u64, data: &[u8], until: &Deadline) -> Result<(), ServerError>;

    /// Gives the server the eventfds of all interrupts of one kind; the first is for interrupt 0. A server
    /// that refuses may have taken some of them.
    fn arm(&self, kind: Irq, calls: &[BorrowedFd<'_>], until: &Deadline) -> Result<(), ServerError>;

    /// Takes back all eventfds of one kind of interrupt.
    fn disarm(&self, kind: Irq, until: &Deadline) -> Result<(), ServerError>;

    /// Tells the server that the guest has ended the pin's interrupt: the server raises the interrupt again
    /// if the device still has a reason. Does not wait. If the server only reports that the pin is asserted,
    /// `look` gets the report.
    fn unmask_pin(&self, look: Look) -> Result<(), ServerError>;

    /// Resets the device. Its mappings and the eventfds of its interrupts stay.
    fn reset(&self, until: &Deadline) -> Result<(), ServerError>;

    /// Ends the connection. Threads that wait for an answer return at once.
    fn shut_down(&self);

    /// Whether the server's process is alive. It may be alive and have closed the connection.
    fn is_alive(&self) -> bool;

    /// The traffic so far.
    fn stats(&self) -> ServerStats;
}

/// Whether a write of the guest waits for the server's answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writes {
    /// The server answers each write before the guest goes on.
    Answered,
    /// The write is sent, and the guest goes on.
    Posted,
}

/// Whether the server did what it was asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Done {
    /// The server did it.
    Yes,
    /// The server refused, or is gone.
    No,
}

/// Why the device has no server any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gone {
    /// The server failed: the device is broken.
    Broken(String),
    /// Its administrator removed the device.
    Removed,
    /// The server ended together with the machine.
    Ended,
}

/// The connection of a device to its server. Once gone, the server never comes back.
pub struct ServerLink {
    name: String,
    server: Arc<dyn Server>,
    gone: OnceLock<Gone>,
    /// The machine is ending. A server that closes the connection from now on has not failed.
    ending: AtomicBool,
    refused: AtomicU64,
}

impl std::fmt::Debug for ServerLink {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServerLink")
            .field("name", &self.name)
            .field("gone", &self.gone)
            .finish_non_exhaustive()
    }
}

impl ServerLink {
    /// A link to `server` for the device called `name`.
    #[must_use]
    pub fn new(name: String, server: Arc<dyn Server>) -> Self {
        let (ending, refused) = (AtomicBool::new(false), AtomicU64::new(0));
        Self { name, server, gone: OnceLock::new(), ending, refused }
    }

    /// The device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Why the server is gone; `None` while the server is there.
    #[must_use]
    pub fn gone(&self) -> Option<&Gone> {
        self.gone.get()
    }

    /// Whether the server is gone.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.gone.get().is_some()
    }

    /// Gives the server up because it failed; `why` goes into the log. Only the first end of the link counts.
    /// Does not wait.
    pub fn give_up(&self, why: &str) {
        self.end(Gone::Broken(why.to_owned()));
    }

    /// The server closed the connection while no request was under way. There are three cases:
    /// 1. The machine is ending: the server ended with the machine.
    /// 2. The server's process is alive: its administrator removed the device.
    /// 3. The process is dead: the server failed.
    ///
    /// Does not wait.
    pub fn hung_up(&self) {
        match (self.ending.load(Ordering::Acquire), self.is_gone()) {
            (_, true) => {}
            (true, false) => self.end(Gone::Ended),
            (false, false) if self.server.is_alive() => self.end(Gone::Removed),
            (false, false) => self.give_up("the server closed the connection"),
        }
    }

    /// Notes that the machine is ending. Called before the last access.
    pub fn ending(&self) {
        self.ending.store(true, Ordering::Release);
    }

    fn end(&self, gone: Gone) {
        let mut first = false;
        let gone = self.gone.get_or_init(|| {
            first = true;
            gone
        });
        if !first {
            return;
        }
        let name = &self.name;
        match gone {
            Gone::Broken(why) => {
                log::error!(
                    "x-DEVICE_BROKEN device {name}: {why}; the guest sees it gone, the machine goes on"
                );
            }
            Gone::Ended => log::debug!("device {name}: the server ended with the machine"),
            Gone::Removed => {
                log::info!(
                    "device {name} was removed by its server; the guest sees it gone, the machine goes on"
                );
            }
        }
        self.server.shut_down();
    }

    /// Traffic with the server.
    #[must_use]
    pub fn stats(&self) -> ServerStats {
        self.server.stats()
    }

    /// How many requests the server refused.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    fn judge(&self, outcome: Result<(), ServerError>) -> Done {
        match outcome {
            Ok(()) => return Done::Yes,
            Err(ServerError::Refused(error)) => {
                if self.refused.fetch_add(1, Ordering::Relaxed) == 0 {
                    log::warn!("device {}: {}; later refusals are only counted", self.name, chain(&*error));
                }
            }
            Err(ServerError::Closed(_)) if self.ending.load(Ordering::Acquire) => self.end(Gone::Ended),
            Err(ServerError::Closed(error) | ServerError::Lost(error)) => self.give_up(&chain(&*error)),
        }
        Done::No
    }

    /// See [`Server::unmask_pin`].
    pub fn unmask_pin(&self, look: Look) -> Done {
        if self.is_gone() { Done::No } else { self.judge(self.server.unmask_pin(look)) }
    }

    /// Begins an access of the guest. It may wait for another vCPU's access first ([`Server::turn`]). The
    /// deadline counts from the end of that wait.
    #[must_use]
    pub fn access(&self) -> ServerAccess<'_> {
        let _turn = self.server.turn();
        ServerAccess { link: self, until: Deadline::after(self.server.limit()), _turn }
    }
}

/// One access of the guest. All its requests to the server share one deadline.
#[derive(Debug)]
pub struct ServerAccess<'a> {
    link: &'a ServerLink,
    until: Deadline,
    _turn: Option<MutexGuard<'a, ()>>,
}

impl ServerAccess<'_> {
    fn ask(&self, what: impl FnOnce(&dyn Server, &Deadline) -> Result<(), ServerError>) -> Done {
        if self.link.is_gone() {
            return Done::No;
        }
        if self.until.remaining().is_none() {
            let limit = self.until.limit().as_millis();
            self.link.give_up(&format!("the server did not do within {limit} ms what one access takes"));
            return Done::No;
        }
        self.link.judge(what(&*self.link.server, &self.until))
    }

    /// Reads from a region. `data` becomes all ones when the server gives no answer.
    pub fn read(&self, region: u8, offset: u64, data: &mut [u8]) {
        if self.ask(|server, until| server.read(region, offset, data, until)) == Done::No {
            data.fill(0xff);
        }
    }

    /// Writes to a region.
    pub fn write(&self, region: u8, offset: u64, data: &[u8], writes: Writes) -> Done {
        self.ask(|server, until| match writes {
            Writes::Answered => server.write(region, offset, data, until),
            Writes::Posted => server.post(region, offset, data, until),
        })
    }

    /// See [`Server::arm`].
    pub fn arm(&self, kind: Irq, calls: &[BorrowedFd<'_>]) -> Done {
        self.ask(|server, until| server.arm(kind, calls, until))
    }

    /// See [`Server::disarm`].
    pub fn disarm(&self, kind: Irq) -> Done {
        self.ask(|server, until| server.disarm(kind, until))
    }

    /// See [`Server::reset`].
    pub fn reset(&self) -> Done {
        self.ask(|server, until| server.reset(until))
    }
}

/// The error and its causes, on one line.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// The number of guest accesses that came to userspace.
#[derive(Debug, Default)]
pub(super) struct AccessCounter {
    pub(super) reads: AtomicU64,
    pub(super) writes: AtomicU64,
}

/// Counts over the device's whole life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AccessCounts {
    /// Reads and writes that came to userspace: of BARs 0 to 5, then of the configuration space.
    pub regions: [(u64, u64); 7],
    /// Reads and writes of BARs that were passed on to the server.
    pub requests: u64,
}
