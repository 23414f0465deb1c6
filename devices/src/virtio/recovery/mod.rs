//! A backend is lost, and another one takes its place.

pub mod candidate;
pub mod revival;
pub mod take_over;
pub mod watch;
