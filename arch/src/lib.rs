//! x86-64: the guest's address space, its RAM, the loading and start of a kernel, the ACPI tables, the CPUs
//! and the interrupt routes.
//!
//! This crate uses KVM's data types and ioctls. It must never depend on a device, a peer or a configuration:
//! `vmm` describes the machine to it in a plain [`platform::Platform`]. It maps guest memory only if that
//! consists of huge pages (see [`ram`]). It contains no unsafe code.

pub mod acpi;
pub mod boot;
pub mod cpu;
pub mod irq;
pub mod layout;
pub mod platform;
pub mod ram;
pub mod width;
