//! What a backend does for a migration: logging what it writes, moving its own state, running on memory that is still on its
//! way.

pub mod device_state;
pub mod dirty_log;
pub mod postcopy;
