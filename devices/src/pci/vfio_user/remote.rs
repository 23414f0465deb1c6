//! A server's function between boards: the connection, what is known of the function, and what outlives a reboot.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::contents::Contents;
use super::link::{Done, Link, Writes};
use super::server::{CONFIG_REGION, Server, ServerStats};
use crate::ports::WriteWidth;

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
}

/// What a device did, over its whole life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Vendor, device and class.
    pub identity: String,
    /// Why it is broken, if it is.
    pub broken: Option<String>,
    /// Traffic with the server.
    pub server: ServerStats,
    /// Requests that the server refused.
    pub refused: u64,
    /// Reads and writes that came to userspace: of BARs 0 to 5, and of the configuration space.
    pub accesses: [(u64, u64); 7],
}

impl Remote {
    /// Another server does not take over: the link is for life.
    #[must_use]
    pub fn new(
        name: String,
        server: Arc<dyn Server>,
        contents: Contents,
        regions: [Region; 6],
        reset: Reset,
    ) -> Self {
        Self { link: Link::new(name, server), contents, regions, reset }
    }

    /// The device as it is after power-on: it accesses no memory, interrupts nobody, and is reset if it can be.
    /// Waits for the server.
    pub fn power_on(&self) {
        const COMMAND: u64 = 4;
        if self.link.write(CONFIG_REGION, COMMAND, &[0, 0], Writes::Answered) == Done::No {
            log::debug!("device {}: the command register could not be cleared", self.link.name());
        }
        if self.reset == Reset::Offered && self.link.reset() == Done::No {
            log::warn!("device {} was not reset", self.link.name());
        }
    }

    /// What it did so far.
    #[must_use]
    pub fn report(&self) -> Report {
        Report {
            identity: self.contents.identity.to_string(),
            broken: self.link.broken().map(str::to_owned),
            server: self.link.stats(),
            refused: self.link.refused(),
            accesses: self.link.accesses(),
        }
    }
}
