//! x86-64: where things are in the guest's address space, its RAM, how a kernel is started in it, how the
//! machine is described to it (ACPI), what its CPUs are and where its interrupts go.
//!
//! Knows KVM's data types and ioctls, but no device, no peer and no configuration: `vmm` hands down a plain
//! [`platform::Platform`]. Never maps guest memory for itself (huge pages excepted, see [`ram`]) and has no
//! unsafe code.

pub mod acpi;
pub mod boot;
pub mod cpu;
pub mod irq;
pub mod layout;
pub mod platform;
pub mod ram;
pub mod width;
