//! Virtio 1.2 devices whose queues are served by other processes.
//!
//! | module | what it holds |
//! |--|--|
//! | [`status`] | the status field and its legal transitions |
//! | [`queue`] | what the driver says of a queue, and the checks |
//! | [`registers`] | the register file, pure, the same for every transport |
//! | [`device_type`] | what distinguishes a disk from a network card: one table row |
//! | [`device`] | the device: registers, backend, phase |
//! | [`face`] | what the device asks of its transport |
//! | [`phase`], `activation` | where it is in its life, and how it gets there |
//! | [`takeover`] | another backend in the place of a lost one |
//! | [`revival`] | another chance for a broken device when it is reset |
//! | [`probation`] | whether that one goes on where the lost one stopped |
//! | `resume`, `unfinished` | where a ring goes on then, and what was in flight |
//! | [`handle`], [`report`] | the device shared between threads, and what it reports |
//! | [`iommu`] | what the driver's addresses mean |
//! | [`answers`] | what is done for a backend's own requests |
//! | `memory` | guest memory that comes and goes |
//! | [`shared_memory`] | what a backend shows the guest of its own memory |
//! | `control`, `control_queue`, `crypto` | the queue that we serve ourselves |
//! | [`backend`] | what the device asks of whoever serves its queues |
//! | [`order`] | what a user wants of it |
//! | [`opening`] | a backend asked what it is |
//! | [`vhost_user`] | that, over vhost-user |
//! | [`reconnect`] | a vhost-user backend that comes back |
//! | [`mmio`] | the virtio-mmio transport: offsets, and the page that guests read without an exit |
//! | [`pci`], `pci_state` | the virtio-pci transport: a function, its BAR, its capabilities |

mod activation;
pub mod answers;
pub mod backend;
mod control;
mod control_queue;
mod crypto;
pub mod device;
pub mod device_type;
pub mod face;
pub mod handle;
pub mod iommu;
mod memory;
pub mod mmio;
pub mod opening;
pub mod order;
mod pairs;
pub mod pci;
mod pci_state;
mod pci_windows;
pub mod phase;
pub mod probation;
pub mod queue;
pub mod reconnect;
pub mod registers;
pub mod report;
mod resume;
pub mod revival;
pub mod shared_memory;
pub mod status;
pub mod takeover;
mod unfinished;
pub mod vhost_user;
mod wiring;

pub use device::Parts;
pub use device_type::{DeviceType, Wishes};
pub use handle::DeviceHandle;
pub use mmio::MmioDevice;
pub use pci::PciDevice;
pub use phase::OnLoss;
pub use reconnect::Reconnect;
pub use report::{DeviceStats, PhaseReport, Trapped};
