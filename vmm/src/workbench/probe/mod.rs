//! `outboard probe`: what does a peer offer? Connects, asks what may be asked without a guest, and leaves.

pub mod vfio_user;
pub mod vhost_user;
