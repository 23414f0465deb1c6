//! vfio-user "Command Concurrency": one connection, used by several threads at once.
//!
//! Whoever waits for a reply ([`waiting`]) reads the socket on behalf of everybody, the server's own commands included
//! ([`reading`]); where nobody waits, the [`Receiver`] does.

mod incoming;
mod link;
mod outgoing;
mod reading;
mod receiver;
mod shared;
mod table;
mod waiting;
mod windows;

pub(crate) use link::Link;
pub(crate) use outgoing::{Join, MULTI_MOST};
pub use receiver::{Receiver, Served};
pub use shared::ClientStats;
pub(crate) use shared::{Shared, Submitted};
pub(crate) use table::{Expected, Reply, Then};
pub use windows::DmaRights;
pub(crate) use windows::Window;
