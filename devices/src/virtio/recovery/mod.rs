//! How a lost backend is found again, or another one takes its place.

pub mod candidate;
pub mod search;
pub mod vacancy;
pub mod watch;
