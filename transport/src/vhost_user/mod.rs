//! The vhost-user front end (vhost-user.rst of the QEMU documentation).
//!
//! We are the *front end*: we own guest memory and tell the *back end* where the rings are; it moves the data.
//!
//! ```text
//!   Connection ──negotiate──▶ Session ──go_live──▶ LiveSession
//!                               ▲                      │
//!                               └────────stop──────────┘      any protocol error ──▶ Lost
//! ```
//!
//! Two sockets: the *main* one, on which we ask ([`Session`], [`request`]), and the *back-end channel*, on which
//! the back end asks ([`backend_req`]); they share nothing and are served by different threads.
//!
//! A ring is stopped or started (SET_VRING_KICK / GET_VRING_BASE), and independently disabled or enabled
//! (SET_VRING_ENABLE; enabled from the start when feature bit 30 was not offered).
//!
//! Blocking: every method that asks the back end blocks for the deadline of its [`Limits`] at most, all its
//! messages together. After a failure that leaves the connection out of step it is shut down and never used again.

pub mod backend_req;
mod channel;
pub mod config;
pub mod crypto;
mod describe;
pub mod device_state;
pub mod dirty_log;
mod error;
pub mod features;
mod gpu;
pub mod inflight;
pub mod iotlb;
mod live;
mod mem_table;
pub mod message;
mod net;
pub mod postcopy;
pub mod reconnect;
pub mod request;
mod session;
mod shared_object;
pub mod shmem;
mod trace;
pub mod vring;

pub use backend_req::{BackendChannel, BackendRequests, NotifierArea, Refused, Served};
pub use channel::{Limits, Stats};
pub use dirty_log::DirtyLog;
pub use error::{Cause, Error, Step};
pub use features::{DeviceFeatures, DriverFeatures, NotOffered, ProtocolFeatures, UnknownFeature, Wanted};
pub use inflight::InflightArea;
pub use iotlb::{IovaMap, MissAnswers};
pub use live::{LiveSession, Lost, RingSwitch};
pub use postcopy::Postcopy;
pub use session::{Connection, Session};
pub use trace::{Direction, Trace, TraceEvent};
pub use vring::{Call, Kick, Ring, RingBase, RingError, RingFault};
