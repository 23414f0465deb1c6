//! The parts of vhost-user for migration: the dirty log, the backend's own state, and postcopy.

pub mod device_state;
pub mod dirty_log;
pub mod postcopy;
