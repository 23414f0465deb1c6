//! The vfio-user client: what a virtual machine monitor says to a PCI device in another process.
//!
//! ```text
//!   Client::connect ──VERSION──▶ Client ──▶ device_info, region_info, irq_info      what is it?
//!                                  │   ──▶ dma_map_all, arm_irqs                     it may reach memory and interrupt
//!                                  │   ──▶ read, write, post_write                   trapped guest accesses
//!                                  │   ──▶ set_migration_state, start_dma_logging    it moves to another host
//!                                  └─▶ receiver() ──▶ Receiver::serve                the server asks: DMA_READ, DMA_WRITE
//! ```
//!
//! Three kinds of messages: *posted* ones want no reply (`post_write`), *answered later* ones give something to
//! wait for (`begin_read`), all others are waited for. Replies are told apart by their id, come in
//! any order, and may be preceded by the server's own commands. After a deadline a late reply is recognised and
//! discarded; after a malformed message the connection is shut down and never used again.
//!
//! One socket carries both directions, or, where the server agrees, its commands have one of their own ("twin
//! socket").

mod client;
mod connection;
pub mod describe;
mod dma;
mod io_fds;
mod irq;
pub mod message;
pub mod migration;
mod region;
mod version;

pub use client::{Client, DeviceInfo, parse_device_info};
pub use connection::{ClientStats, DmaRights, Receiver, Served};
pub use dma::Sharing;
pub use io_fds::{IoFd, IoFdKind, IoFdPlace, parse_io_fds};
pub use irq::{IrqEvent, IrqIndex, IrqInfo, parse_irq_info};
pub use message::Feature;
pub use region::{
    Area, PendingRead, RegionIndex, RegionInfo, RegionReply, SmallWrite, mappable, parse_region_info,
};
pub use version::{Capabilities, Version, capabilities, parse_reply};
