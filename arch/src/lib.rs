//! x86-64: the guest's address space, its RAM, how a kernel is loaded and started, the ACPI tables, the CPUs
//! and the routes of interrupts.
//!
//! This crate knows KVM's data types and ioctls. It knows no device, no peer and no configuration: `vmm`
//! describes the machine to it by a plain [`platform::Platform`]. Guest memory is mapped here only where it
//! consists of huge pages (see [`ram`]). There is no unsafe code.

pub mod acpi;
pub mod boot;
pub mod cpu;
pub mod irq;
pub mod layout;
pub mod platform;
pub mod ram;
pub mod width;
