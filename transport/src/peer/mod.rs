//! What both protocols need to talk to a process that is not trusted: sockets, deadlines, descriptors,
//! errors.
//!
//! | module | what it holds |
//! |--|--|
//! | [`error`] | the one error type: which peer, at which step, for which cause |
//! | [`limits`] | the deadline of a peer, its trace and its counters |
//! | [`trace`] | the hook that sees each message |
//! | [`socket`] | how a peer is reached: connect, listen, try again |
//! | [`deadline`] | bounded waits |
//! | [`fds`] | one message with descriptors over a unix socket |
//! | `admit` | which descriptors of a peer are kept |
//! | [`eventfd`] | eventfds that are shared with a peer |
//! | [`wire`] | payloads of a fixed size, and what can be wrong with a message |
//!
//! Must never depend on a message of either protocol.

mod admit;
pub mod deadline;
pub mod error;
pub mod eventfd;
pub mod fds;
pub mod limits;
pub mod socket;
pub mod trace;
pub mod wire;

pub(crate) use admit::close_elsewhere;
pub use error::{Cause, Error, MessageName, Peer, Protocol, Step};
pub use limits::{Limits, Stats};
pub use trace::{Direction, Trace, TraceEvent};
pub use wire::Fault;
