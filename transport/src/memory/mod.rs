//! Guest memory: the files that hold it, reading and writing it, and the log of the pages that were written.

pub mod access;
pub mod dirty_log;
pub mod map;

pub use access::MemoryAccess;
pub use dirty_log::{DirtyLog, log_size};
pub use map::{GuestAddr, Iova, MapError, MemoryMap, PAGE, SharedRegion, USER_BIAS, UserAddr};
