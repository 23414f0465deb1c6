//! The host: KVM, mappings and memory slots, descriptors.

pub(crate) mod descriptors;
#[doc(hidden)]
pub mod kvm;
pub mod memory;
pub mod peer_memory;
