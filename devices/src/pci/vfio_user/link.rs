//! The server as long as it is one: a failure makes the device broken, for good, and from then on nobody waits.
//! Takes no lock of the device; must never wait once the link is broken.

use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::pin::Look;
use super::server::{CONFIG_REGION, Irq, Server, ServerError, ServerStats};

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

/// Accesses of one region that came to userspace.
#[derive(Debug, Default)]
pub struct Counter {
    /// Reads.
    pub reads: AtomicU64,
    /// Writes.
    pub writes: AtomicU64,
}

/// The server, until it fails.
pub struct Link {
    name: String,
    server: Arc<dyn Server>,
    broken: OnceLock<String>,
    /// The same, for the hot path.
    is_broken: AtomicBool,
    refused: AtomicU64,
    /// Accesses of regions 0 to 5, and of the configuration space.
    counters: [Counter; 7],
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("name", &self.name).field("broken", &self.broken).finish_non_exhaustive()
    }
}

impl Link {
    /// To `server`, for the device called `name`.
    #[must_use]
    pub fn new(name: String, server: Arc<dyn Server>) -> Self {
        Self {
            name,
            server,
            broken: OnceLock::new(),
            is_broken: AtomicBool::new(false),
            refused: AtomicU64::new(0),
            counters: Default::default(),
        }
    }

    /// The device's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Why there is no server any more, if so.
    #[must_use]
    pub fn broken(&self) -> Option<&str> {
        self.broken.get().map(String::as_str)
    }

    /// Whether there is no server any more.
    #[must_use]
    pub fn is_broken(&self) -> bool {
        self.is_broken.load(Ordering::Acquire)
    }

    /// Gives the server up, the first time it is called.
    pub fn give_up(&self, why: &str) {
        let mut first = false;
        self.broken.get_or_init(|| {
            first = true;
            why.to_owned()
        });
        self.is_broken.store(true, Ordering::Release);
        if first {
            log::error!(
                "x-DEVICE_BROKEN device {}: {why}; the guest sees it gone, the machine goes on",
                self.name
            );
            self.server.shut_down();
        }
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

    /// Accesses that came to userspace: of BARs 0 to 5, and of the configuration space.
    #[must_use]
    pub fn accesses(&self) -> [(u64, u64); 7] {
        self.counters
            .each_ref()
            .map(|counter| (counter.reads.load(Ordering::Relaxed), counter.writes.load(Ordering::Relaxed)))
    }

    /// Accesses of `region`.
    #[must_use]
    pub fn counter(&self, region: u8) -> Option<&Counter> {
        let index = if region == CONFIG_REGION { 6 } else { region };
        self.counters.get(usize::from(index))
    }

    fn judge(&self, outcome: Result<(), ServerError>) -> Done {
        match outcome {
            Ok(()) => Done::Yes,
            Err(ServerError::Refused(error)) => {
                if self.refused.fetch_add(1, Ordering::Relaxed) == 0 {
                    log::warn!("device {}: {}; later refusals are only counted", self.name, chain(&*error));
                }
                Done::No
            }
            Err(ServerError::Lost(error)) => {
                self.give_up(&chain(&*error));
                Done::No
            }
        }
    }

    fn ask(&self, what: impl FnOnce(&dyn Server) -> Result<(), ServerError>) -> Done {
        if self.is_broken() { Done::No } else { self.judge(what(&*self.server)) }
    }

    /// Reads from a region; all ones when there is no answer.
    pub fn read(&self, region: u8, offset: u64, data: &mut [u8]) {
        if self.ask(|server| server.read(region, offset, data)) == Done::No {
            data.fill(0xff);
        }
    }

    /// Writes to a region.
    pub fn write(&self, region: u8, offset: u64, data: &[u8], writes: Writes) -> Done {
        self.ask(|server| match writes {
            Writes::Answered => server.write(region, offset, data),
            Writes::Posted => server.post(region, offset, data),
        })
    }

    /// See [`Server::arm`].
    pub fn arm(&self, kind: Irq, calls: &[BorrowedFd<'_>]) -> Done {
        self.ask(|server| server.arm(kind, calls))
    }

    /// See [`Server::disarm`].
    pub fn disarm(&self, kind: Irq) -> Done {
        self.ask(|server| server.disarm(kind))
    }

    /// See [`Server::unmask_pin`].
    pub fn unmask_pin(&self, look: Look) -> Done {
        self.ask(|server| server.unmask_pin(look))
    }

    /// See [`Server::reset`].
    pub fn reset(&self) -> Done {
        self.ask(|server| server.reset())
    }
}

/// An error with its causes, on one line.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
