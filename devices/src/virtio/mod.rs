//! Virtio 1.2 devices whose queues are served by other processes.
//!
//! | module | what it holds |
//! |--|--|
//! | [`status`] | the status field and its legal transitions |
//! | [`queue`] | what the driver says of a queue, and the checks |
//! | [`registers`] | the register file, pure, the same for every transport |
//! | [`device_type`] | what distinguishes a disk from a network card: one table row |
//! | [`device`] | the device: registers, backend, phase |
//! | [`backend`] | what the device asks of whoever serves its queues |
//! | [`vhost_user`] | that, over vhost-user |
//! | [`mmio`] | the virtio-mmio transport: offsets, and the page that guests read without an exit |

pub mod backend;
pub mod device;
pub mod device_type;
pub mod mmio;
pub mod queue;
pub mod registers;
pub mod status;
pub mod vhost_user;

pub use device::{DeviceHandle, DeviceStats, Parts, PhaseReport};
pub use device_type::{DeviceType, Wishes};
pub use mmio::MmioDevice;
