//! vfio-user servers for the tests. The third-party crate `vfio_user` speaks the protocol; what is here is
//! the devices.
//!
//! | module | what it holds |
//! |--|--|
//! | [`options`], [`serve`] | the command line; one client after another |
//! | [`guest_memory`] | what the client mapped for DMA |
//! | [`config_space`] | PCI configuration space with its capabilities |
//! | [`interrupts`] | the client's eventfds, by index and vector |
//! | [`area`] | memory that the client may map |
//! | [`nvme`] | an NVMe controller on a file: stock drivers bind to it |
//! | [`engine`] | a DMA engine with one of everything, for what no stock driver does |
//! | [`front`] | between client and crate: what the crate does not speak |
//!
//! Must never trust a guest: a bad address or queue is an error in the device, not the end of the server.

pub mod area;
pub mod config_space;
pub mod engine;
pub mod front;
pub mod guest_memory;
pub mod interrupts;
pub mod nvme;
pub mod options;
pub mod serve;
