//! The transports by which the guest sees a device: virtio-mmio and virtio-pci.

pub mod mmio;
pub mod pci;
mod pci_state;
mod pci_windows;
