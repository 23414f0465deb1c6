//! The device types, one table row each, and the model of a device that the guest sees.

pub mod model;
pub mod table;
