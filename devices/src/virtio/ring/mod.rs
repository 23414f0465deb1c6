//! The rings of a device in guest memory, and how far a lost backend got in them.

pub mod address;
pub(crate) mod in_flight;
pub mod queue;
pub(crate) mod split;
