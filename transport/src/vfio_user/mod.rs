//! The vfio-user client: what a virtual machine monitor says to a PCI device in another process.
//!
//! ```text
//!   Client::connect ──VERSION──▶ Client ──▶ device_info, region_info, irq_info      description
//!                                  │   ──▶ dma_map_all, arm_irqs                     memory and interrupts
//!                                  │   ──▶ read, write, post_write                   trapped guest accesses
//!                                  │   ──▶ set_migration_state, start_dma_logging    migration
//!                                  └─▶ receiver() ──▶ Receiver::serve                commands of the server
//! ```
//!
//! Our commands are of three kinds:
//!
//! - *posted*: no reply is asked for (`post_write`);
//! - *answered later*: the call returns a value that waits for the reply (`begin_read`);
//! - all others: the call waits for the reply.
//!
//! A reply is matched to its command by the message id. Replies come in any order, and commands of the server
//! may come between them. A reply that comes after the deadline is recognised and discarded. After a
//! malformed message the connection is shut down and never used again.
//!
//! One socket carries both directions. If the server agrees, its commands have a second socket ("twin
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
