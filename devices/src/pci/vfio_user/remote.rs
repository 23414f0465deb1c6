//! A server's function between boards: the connection, what is known of the function, and what outlives a reboot.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use super::contents::Contents;
use super::delivery::Calls;
use super::link::{Done, Link, Writes};
use super::server::{CONFIG_REGION, Irq, Server, ServerStats};
use crate::lock;
use crate::ports::WriteWidth;
use transport::vhost_user::vring::Call;

/// A piece of a region that guests may be shown as memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Where it begins in the region.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
    /// Where it begins in the region's file.
    pub file_offset: u64,
}

/// A write of the guest that the server hears of by an eventfd.
#[derive(Debug)]
pub struct Doorbell {
    /// Where in the region.
    pub offset: u64,
    /// How wide it is.
    pub width: WriteWidth,
    /// What is written; `None` matches every value.
    pub value: Option<u64>,
    /// What is signalled.
    pub fd: OwnedFd,
}

/// What there is behind a BAR.
#[derive(Debug)]
pub struct Region {
    /// Reads are answered.
    pub readable: bool,
    /// Writes are taken.
    pub writable: bool,
    /// The file behind its pieces.
    pub file: Option<Arc<OwnedFd>>,
    /// What of it may be memory of the guest.
    pub pieces: Vec<Piece>,
    /// Its doorbells.
    pub doorbells: Vec<Doorbell>,
    /// How it is written.
    pub writes: Writes,
}

/// Whether DEVICE_RESET may be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reset {
    /// The server announces it.
    Offered,
    /// It does not.
    NotOffered,
}

/// A server's function.
#[derive(Debug)]
pub struct Remote {
    /// The server, until it fails.
    pub link: Link,
    /// What the function is.
    pub contents: Contents,
    /// What is behind its BARs.
    pub regions: [Region; 6],
    /// Whether the device can be reset.
    pub reset: Reset,
    /// What the server signals.
    pub calls: Arc<Calls>,
    /// The kind of interrupts that the server was given eventfds for.
    armed: Mutex<Option<Irq>>,
    /// The server refused the pin's eventfd, and is not asked again.
    pinless: AtomicBool,
    /// The guest of the present board has let go of it.
    ejected: AtomicBool,
}

/// What a device did, over its whole life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Vendor, device and class.
    pub identity: String,
    /// Why it is broken, if it is.
    pub broken: Option<String>,
    /// The guest let go of it, and it has not been put on another board since.
    pub ejected: bool,
    /// Traffic with the server.
    pub server: ServerStats,
    /// Requests that the server refused.
    pub refused: u64,
    /// Reads and writes that came to userspace: of BARs 0 to 5, and of the configuration space.
    pub accesses: [(u64, u64); 7],
}

impl Remote {
    /// Another server does not take over: the link is for life.
    ///
    /// # Errors
    /// When no eventfd can be had.
    pub fn new(
        name: String,
        server: Arc<dyn Server>,
        contents: Contents,
        regions: [Region; 6],
        reset: Reset,
    ) -> io::Result<Self> {
        let calls = Arc::new(Calls::new()?);
        Ok(Self {
            link: Link::new(name, server),
            contents,
            regions,
            reset,
            calls,
            armed: Mutex::new(None),
            pinless: AtomicBool::new(false),
            ejected: AtomicBool::new(false),
        })
    }

    /// Has the server signal so many interrupts of this kind, and none of another. What was armed goes first: some
    /// servers have one list for all kinds. Waits for the server; the eventfds that it has now.
    pub fn arm(&self, wanted: Option<(Irq, u16)>) -> Vec<Arc<Call>> {
        // Only configuration accesses come here, and those come one by one.
        let armed = *lock(&self.armed);
        if armed == wanted.map(|(kind, _)| kind) {
            return Vec::new();
        }
        if let Some(kind) = armed {
            *lock(&self.armed) = None;
            if self.link.disarm(kind) == Done::No {
                log::debug!("device {}: {kind:?} was not taken back", self.link.name());
            }
            self.calls.drain(kind);
        }
        let pinless = self.pinless.load(Ordering::Relaxed);
        let wanted = wanted.filter(|(kind, _)| *kind != Irq::Intx || !pinless);
        let Some((kind, count)) = wanted else { return Vec::new() };
        let calls = match self.calls.of(kind, count) {
            Ok(calls) => calls,
            Err(error) => {
                self.link.give_up(&format!("no eventfds can be had for its {count} interrupts: {error}"));
                return Vec::new();
            }
        };
        let fds: Vec<_> = calls.iter().map(|call| call.as_fd()).collect();
        if self.link.arm(kind, &fds) == Done::Yes {
            *lock(&self.armed) = Some(kind);
            return calls;
        }
        if kind == Irq::Intx {
            self.pinless.store(true, Ordering::Relaxed);
        } else {
            self.link.give_up("the server refused the eventfds of its interrupts");
        }
        Vec::new()
    }

    /// The guest has served the pin's interrupt: the server may raise it again. Called when [`Calls::served`] is
    /// readable, on any thread; does not wait.
    pub fn pin_served(&self) {
        if self.calls.served().take() && *lock(&self.armed) == Some(Irq::Intx) {
            self.unmask_pin();
        }
    }

    /// The server may raise the pin's interrupt, and does if there is a reason. Does not wait.
    pub fn unmask_pin(&self) {
        let call = self.calls.of(Irq::Intx, 1).ok().and_then(|calls| calls.into_iter().next());
        let look = call.and_then(|call| self.calls.served().look(call));
        if look.is_some_and(|look| self.link.unmask_pin(look) == Done::No) {
            log::debug!("device {}: the pin was not unmasked", self.link.name());
        }
    }

    /// The device as it is after power-on: it accesses no memory, interrupts nobody, and is reset if it can be.
    /// Waits for the server, unless that is lost.
    pub fn power_on(&self) {
        if self.link.is_broken() {
            return;
        }
        self.switch_off();
        if self.reset == Reset::Offered && self.link.reset() == Done::No {
            log::warn!("device {} was not reset", self.link.name());
        }
    }

    /// It accesses no memory and interrupts nobody. Said by its registers, too: a server that keeps its configuration over
    /// a reset must not think otherwise of what the guest finds off. Waits for the server.
    pub fn switch_off(&self) {
        const COMMAND: u64 = 4;
        if self.link.write(CONFIG_REGION, COMMAND, &[0, 0], Writes::Answered) == Done::No {
            log::debug!("device {}: the command register could not be cleared", self.link.name());
        }
        let armed = *lock(&self.armed);
        self.arm(None);
        let capability = match armed {
            Some(Irq::MsiX) => self.contents.msix.map(|msix| msix.at),
            Some(Irq::Msi) => self.contents.msi.map(|msi| msi.at),
            Some(Irq::Intx) | None => None,
        };
        if let Some(at) = capability
            && self.link.write(CONFIG_REGION, u64::from(at) + 2, &[0, 0], Writes::Answered) == Done::No
        {
            log::debug!("device {}: {armed:?} could not be switched off", self.link.name());
        }
    }

    /// It is on a board.
    pub(super) fn placed(&self) {
        self.ejected.store(false, Ordering::Relaxed);
    }

    /// The guest has let go of it.
    pub(super) fn ejected(&self) {
        self.ejected.store(true, Ordering::Relaxed);
    }

    /// What it did so far.
    #[must_use]
    pub fn report(&self) -> Report {
        Report {
            identity: self.contents.identity.to_string(),
            broken: self.link.broken().map(str::to_owned),
            ejected: self.ejected.load(Ordering::Relaxed),
            server: self.link.stats(),
            refused: self.link.refused(),
            accesses: self.link.accesses(),
        }
    }
}
