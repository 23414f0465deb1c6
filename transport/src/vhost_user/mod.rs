//! The vhost-user front end (vhost-user.rst of the QEMU documentation).
//!
//! We are the *front end*: we own guest memory and tell the *backend* where the rings are; it moves the data.
//!
//! ```text
//!   Connection ──negotiate──▶ Session ──go_live──▶ LiveSession
//!                               ▲                      │
//!                               └────────stop──────────┘      any protocol error ──▶ Lost
//! ```
//!
//! Two sockets: the *main* one, on which we ask ([`Session`], [`request`]), and the *backend channel*, on which
//! the backend asks ([`backend_requests`]); they share nothing and are served by different threads.
//!
//! A ring is stopped or started (SET_VRING_KICK / GET_VRING_BASE), and independently disabled or enabled
//! (SET_VRING_ENABLE; enabled from the start when feature bit 30 was not offered).
//!
//! Blocking: every method that asks the backend blocks for the deadline of its [`crate::peer::Limits`] at most, all its
//! messages together. After a failure that leaves the connection out of step it is shut down and never used again.

pub mod backend_requests;
mod channel;
pub mod config;
pub mod describe;
pub mod extras;
pub mod features;
pub mod inflight;
pub mod iotlb;
mod live;
mod mem_table;
pub mod message;
pub mod migration;
pub mod request;
mod session;
pub mod shmem;
pub mod vring;

pub use backend_requests::{BackendChannel, BackendRequests, NotifierArea, Refused, Served};
pub use features::{DeviceFeatures, DriverFeatures, NotOffered, ProtocolFeatures, UnknownFeature, Wanted};
pub use inflight::InflightArea;
pub use iotlb::{IovaMap, MissAnswers};
pub use live::{LiveSession, Lost, RingSwitch};
pub use migration::postcopy::Postcopy;
pub use session::{Connection, Session};
pub use vring::{Call, Kick, Ring, RingBase, RingError, RingFault};
