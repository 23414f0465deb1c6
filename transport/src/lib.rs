//! vhost-user and vfio-user on the wire: bytes, fds, deadlines.
//!
//! | module | what it holds |
//! |--|--|
//! | [`peer`] | sockets, deadlines, descriptors and errors, for both protocols |
//! | [`memory`] | guest memory: the files that hold it, and access to it |
//! | [`vhost_user`] | the vhost-user front end |
//! | [`vfio_user`] | the vfio-user client |
//!
//! Must never depend on a guest device or on KVM, and must never contain `unsafe`.

#![forbid(unsafe_code)]

pub mod memory;
pub mod peer;
pub mod vfio_user;
pub mod vhost_user;

#[cfg(feature = "testing")]
pub mod testing;
