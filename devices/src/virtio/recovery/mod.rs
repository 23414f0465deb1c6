//! A backend is lost, and another one takes its place.

pub mod candidate;
pub mod search;
pub mod vacancy;
pub mod watch;
