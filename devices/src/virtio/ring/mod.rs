//! What the rings in guest memory tell of a device whose backend was lost.

pub mod address;
pub(crate) mod in_flight;
pub mod queue;
pub(crate) mod split;
