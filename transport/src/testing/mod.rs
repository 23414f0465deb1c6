//! Scripted peers for tests. Each plays the normal role of a peer, and misbehaves exactly where its script
//! says.
//!
//! For the tests of this crate, of `devices` and of the whole machine. Must never be part of the program.

mod role;
mod script;
mod stream;
pub mod vfio_user;
mod vhost_user;

pub use role::{RingView, Seen};
pub use script::{Act, FdKind, Offer, Script};
pub use vhost_user::ScriptedBackend;
