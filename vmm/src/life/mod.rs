//! vCPU threads: how they run, stop and crash.

mod crash;
pub mod gate;
pub(crate) mod reboots;
pub mod signals;
pub mod vcpu;
