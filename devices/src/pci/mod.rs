//! PCI functions.

pub mod vfio_user;
