//! The machine's devices.

pub(crate) mod recovery;
pub(crate) mod vfio;
pub(crate) mod virtio;
pub(crate) mod windows;
