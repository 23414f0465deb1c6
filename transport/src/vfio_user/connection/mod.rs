//! vfio-user "Command Concurrency": one connection, used by several threads at once.
//!
//! One of the threads that wait for a reply reads the socket for all of them, and answers the server's own
//! commands ([`waiting`], [`reading`]). While no thread waits, the [`Receiver`] reads.

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
