//! vhost-user and vfio-user on the wire: bytes, fds, deadlines.
//!
//! | module | what it holds |
//! |--|--|
//! | [`memory_map`] | guest memory as peers are told of it |
//! | [`scm`] | one message with fds over a unix socket |
//! | [`deadline`] | bounded waits |
//! | [`socket`] | how a peer is reached: connect, listen, inherited |
//! | [`vhost_user`] | the vhost-user front end |
//! | [`vfio_user`] | the vfio-user client |
//!
//! This crate knows no guest device and no KVM, and contains no `unsafe`.

#![forbid(unsafe_code)]

mod cause;
pub mod deadline;
pub mod memory_map;
pub mod scm;
pub mod socket;
pub mod vfio_user;
pub mod vhost_user;
mod wire;

#[cfg(feature = "testing")]
pub mod testing;
