//! Tools beside the machine: they look at a host or a peer and say what they found.

pub mod check;
mod guest_mode;
pub mod probe;
pub mod trace;
