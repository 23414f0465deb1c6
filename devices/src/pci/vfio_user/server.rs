//! Whoever serves a function, as the device sees it: requests without a protocol, and a link that breaks for good.
//!
//! [`ServerLink::access`] begins one access of the guest. All requests of the access share one deadline, however many there
//! are; a server that needs longer is given up, and from then on nobody waits for it. Takes no lock of the device.

use std::error::Error;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, MutexGuard, OnceLock};
use std::time::Duration;

use transport::peer::deadline::Deadline;

use super::pin::Look;

/// The region that is the configuration space.
pub const CONFIG_REGION: u8 = 7;

/// A kind of interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Irq {
    /// The pin.
    Intx,
    /// Message signalled.
    Msi,
    /// The same with a table.
    MsiX,
}

/// Why a server did not do what it was asked.
#[derive(Debug)]
pub enum ServerError {
    /// It said no, and can be asked again.
    Refused(Box<dyn Error + Send + Sync>),
    /// It closed the connection.
    Closed(Box<dyn Error + Send + Sync>),
    /// It cannot be used any more for another reason.
    Lost(Box<dyn Error + Send + Sync>),
}

/// Traffic with the server, since it was connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ServerStats {
    /// Messages sent to it.
    pub messages: u64,
    /// Answers that were waited for.
    pub waits: u64,
    /// The longest wait.
    pub worst_wait: Duration,
}

/// Whoever serves a function. Called on vCPU threads, several at once, and on the control thread. A call that takes a
/// deadline ends with it.
///
/// # Errors
/// Each method fails when the server refuses or is lost.
#[allow(clippy::missing_errors_doc)]
pub trait Server: Send + Sync {
    /// For how long one access of the guest may wait.
    fn limit(&self) -> Duration;

    /// Waits until nobody else asks, where the server can be asked one thing at a time.
    fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        None
    }

    /// Reads all of `data` from a region.
    fn read(&self, region: u8, offset: u64, data: &mut [u8], until: &Deadline) -> Result<(), ServerError>;

    /// Writes to a region, and waits for the answer.
    fn write(&self, region: u8, offset: u64, data: &[u8], until: &Deadline) -> Result<(), ServerError>;

    /// Writes to a region, without an answer: before whatever is asked later, but nobody knows whether it was done.
    fn post(&self, region: u8, offset: u64, data: &[u8], until: &Deadline) -> Result<(), ServerError>;

    /// Gives the server the eventfds of all interrupts of one kind, the first for interrupt 0. A server that refuses may
    /// have taken a part of them.
    fn arm(&self, kind: Irq, calls: &[BorrowedFd<'_>], until: &Deadline) -> Result<(), ServerError>;

    /// Takes all of them back.
    fn disarm(&self, kind: Irq, until: &Deadline) -> Result<(), ServerError>;

    /// The guest has served the pin's interrupt: raise it again if there is still a reason. Does not wait. A server that
    /// only says so has `look` told.
    fn unmask_pin(&self, look: Look) -> Result<(), ServerError>;

    /// Resets the device; what was mapped and armed stays.
    fn reset(&self, until: &Deadline) -> Result<(), ServerError>;

    /// Ends the connection: whoever waits for an answer is told at once.
    fn shut_down(&self);

    /// Whether whoever serves the function is there, though it may have closed the connection.
    fn is_alive(&self) -> bool;

    /// What happened so far.
    fn stats(&self) -> ServerStats;
}

/// Writes that nobody waits for, or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writes {
    /// Each is answered before the guest goes on.
    Answered,
    /// They are sent, and the guest goes on.
    Posted,
}

/// Whether the server did it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Done {
    /// Yes.
    Yes,
    /// It said no, or is not there any more.
    No,
}

/// Why there is no server any more.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gone {
    /// It failed: the device is broken.
    Broken(String),
    /// Its administrator removed the device.
    Removed,
    /// It ended with the machine.
    Ended,
}

/// The server, until it fails.
pub struct ServerLink {
    name: String,
    server: Arc<dyn Server>,
    gone: OnceLock<Gone>,
    /// The machine ends: a server that closes the connection now has done nothing wrong.
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
    /// To `server`, for the device called `name`.
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

    /// Why there is no server any more, if so.
    #[must_use]
    pub fn gone(&self) -> Option<&Gone> {
        self.gone.get()
    }

    /// Whether there is no server any more.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.gone.get().is_some()
    }

    /// Gives the server up because it failed. Only the first call counts. Does not wait.
    pub fn give_up(&self, why: &str) {
        self.end(Gone::Broken(why.to_owned()));
    }

    /// The connection was closed while nothing was asked. A server that lives on has been told to serve the device no
    /// longer, one that died has failed. Does not wait.
    pub fn hung_up(&self) {
        match (self.ending.load(Ordering::Acquire), self.is_gone()) {
            (_, true) => {}
            (true, false) => self.end(Gone::Ended),
            (false, false) if self.server.is_alive() => self.end(Gone::Removed),
            (false, false) => self.give_up("the server closed the connection"),
        }
    }

    /// The machine ends. Called before the last access.
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

    /// Requests that the server refused.
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

    /// Begins an access of the guest: its time runs from now on. May wait for the access of another vCPU first.
    #[must_use]
    pub fn access(&self) -> ServerAccess<'_> {
        let _turn = self.server.turn();
        ServerAccess { link: self, until: Deadline::after(self.server.limit()), _turn }
    }
}

/// One access of the guest, and all that it takes of the server.
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

    /// Reads from a region; all ones when there is no answer.
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

/// An error with its causes, on one line.
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

/// Accesses of the guest that came to userspace.
#[derive(Debug, Default)]
pub(super) struct AccessCounter {
    pub(super) reads: AtomicU64,
    pub(super) writes: AtomicU64,
}

/// What was counted over the device's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct AccessCounts {
    /// Reads and writes of BARs 0 to 5, and of the configuration space, that came to userspace.
    pub regions: [(u64, u64); 7],
    /// Reads and writes of BARs that the server was asked for.
    pub requests: u64,
}
