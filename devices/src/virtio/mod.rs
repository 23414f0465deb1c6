//! Virtio 1.2 devices whose queues are served by backends in other processes.
//!
//! | chapter | what it holds |
//! |--|--|
//! | [`core`] | the device: registers, status, queues, states; the same for every transport and type |
//! | [`types`] | what distinguishes a disk from a network card: one table row each |
//! | [`transport`] | virtio-mmio and virtio-pci: offsets, pages, capabilities |
//! | [`ring`] | what rings in guest memory tell: addresses, indexes, requests in flight |
//! | [`backend`] | whoever serves the queues, and that over vhost-user |
//! | [`served`] | the control queues that the VMM serves itself |
//! | [`recovery`] | a lost backend, and how the next one takes its place |
//! | [`attendant`] | the thread that waits for the backend on behalf of everybody else |

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
