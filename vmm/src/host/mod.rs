//! What the machine takes from the host: KVM, mappings and memory slots, descriptors.

pub(crate) mod descriptors;
mod guest_memory;
pub mod kvm;
pub mod mapping;
pub mod peer_memory;
pub mod ports;
pub mod slots;
