//! PCI functions that vfio-user servers serve.
//!
//! | module | what it holds |
//! |--|--|
//! | [`contents`] | what a server's function is, judged from what the server says |
//! | [`chain`] | capability lists that may loop and lie |
//! | [`bars`] | kinds and sizes of BARs |
//! | [`areas`] | which pieces of BARs guests may be shown as memory |
//! | [`overlay`] | the bits of the configuration space that the client answers itself |
//! | [`server`] | what the device asks of whoever serves the function |
//! | [`link`] | the server, until it fails |
//! | [`client`] | that, over vfio-user |
//! | [`remote`] | the function between boards |
//! | [`delivery`] | how interrupts reach the guest |
//! | [`device`] | the function on a board |

pub mod areas;
pub mod bars;
pub mod chain;
pub mod client;
pub mod contents;
pub mod delivery;
pub mod device;
pub mod link;
pub mod overlay;
pub mod remote;
pub mod server;
#[cfg(test)]
mod testing;

pub use client::{OpenError, Opened, Wishes, open};
pub use device::Device;
pub use remote::Remote;
