//! Virtio 1.2 devices whose queues are served by backends in other processes.
//!
//! | chapter | content |
//! |--|--|
//! | [`core`] | the device: registers, status, queues, states; the same for every transport and type |
//! | [`types`] | the properties that tell a disk from a network card: one table row each |
//! | [`transport`] | virtio-mmio and virtio-pci: offsets, pages, capabilities |
//! | [`ring`] | the rings in guest memory: addresses, indexes, requests in flight |
//! | [`backend`] | the backend that serves the queues: its interface, and vhost-user behind it |
//! | [`served`] | the control queues that the VMM serves itself |
//! | [`recovery`] | the loss of a backend, and how a backend takes its place |
//! | [`attendant`] | the thread that waits for the backend, so that no other thread has to |

pub mod attendant;
pub mod backend;
pub mod core;
pub mod recovery;
pub mod ring;
pub mod served;
pub mod transport;
pub mod types;

pub use self::core::device::Parts;
pub use self::core::handle::DeviceHandle;
pub use self::core::report::{DeviceStats, PhaseReport, Trapped};
pub use self::core::state::OnLoss;
pub use self::recovery::candidate::Reconnect;
pub use self::transport::mmio::MmioDevice;
pub use self::transport::pci::PciDevice;
pub use self::types::model::Wishes;
pub use self::types::table::DeviceType;
