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
//! wait for (`begin_read`, `begin_write`), all others are waited for. Replies are told apart by their id, come in
//! any order, and may be preceded by the server's own commands. After a deadline a late reply is recognised and
//! discarded; after a malformed message the connection is shut down and never used again.
//!
//! One socket carries both directions, or, where the server agrees, its commands have one of their own ("twin
//! socket").

mod client;
mod connection;
mod describe;
mod dma;
mod dma_logging;
mod error;
mod feature;
mod incoming;
mod io_fds;
mod irq;
mod limits;
pub mod message;
mod migration;
mod outgoing;
mod reading;
mod receiver;
mod region;
mod table;
mod trace;
mod version;
mod waiting;

pub use client::{Client, DeviceInfo, parse_device_info};
pub use dma::{DmaMemory, DmaRights, Sharing};
pub use dma_logging::{DirtyPages, DmaRange, parse_logging_start, parse_report};
pub use error::{Cause, Error, Step};
pub use feature::{Feature, FeatureUse, parse_feature};
pub use io_fds::{IoFd, IoFdKind, IoFdPlace, parse_io_fds};
pub use irq::{IrqEvent, IrqIndex, IrqInfo, parse_irq_info};
pub use limits::{Limits, Stats};
pub use migration::{MigrationState, MigrationSupport, parse_migration_data, parse_migration_state};
pub use receiver::{Receiver, Served};
pub use region::{
    Area, PendingRead, PendingWrite, RegionIndex, RegionInfo, RegionReply, SmallWrite, mappable,
    parse_region_info,
};
pub use trace::{Direction, Trace, TraceEvent};
pub use version::{Capabilities, Version, capabilities, parse_reply};
