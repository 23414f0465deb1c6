//! The vhost-user front end (vhost-user.rst of the QEMU documentation).
//!
//! We are the *front end*: we own guest memory and tell the *backend* where the rings are. The backend moves
//! the data.
//!
//! ```text
//!   Connection ──negotiate──▶ Session ──go_live──▶ LiveSession
//!                               ▲                      │
//!                               └────────stop──────────┘      any protocol error ──▶ Lost
//! ```
//!
//! A backend has two sockets. On the *main* one, we send requests ([`Session`], [`request`]). On the *backend
//! channel*, the backend sends requests ([`backend_requests`]). The two share nothing and are served by
//! different threads.
//!
//! A ring is started by SET_VRING_KICK and stopped by GET_VRING_BASE. Independently of that, SET_VRING_ENABLE
//! enables or disables it. When feature bit 30 was not offered, a ring is enabled from the start.
//!
//! Every method that sends a request blocks for the deadline of its [`crate::peer::Limits`] at most, for all
//! its messages together. After a failure that leaves the connection out of step, the connection is shut down
//! and never used again.

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
