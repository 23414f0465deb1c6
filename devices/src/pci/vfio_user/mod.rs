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
//!
//! # What a guest's access costs
//! | access | cost |
//! |--|--|
//! | memory that the server lets be mapped; a doorbell that it gave an eventfd for | nothing: it stays in the guest, or in KVM |
//! | an interrupt by MSI-X or MSI, its end | nothing |
//! | the end of an interrupt by the pin | no exit; at most two messages by the thread `peers`, which asks the server to raise it again if it has a reason, and whether its status register shows one; one look at a time |
//! | the MSI-X table and the pending bits | an exit; the server is not asked |
//! | another read of a BAR; the configuration space, as far as it is the server's | an exit and one round trip, within the deadline |
//! | another write of a BAR | an exit and one message; a round trip with `posted-writes=off`, or where memory of the BAR is mapped |
//! | switching MSI-X, MSI or the pin on and off | an exit and two round trips and more: eventfds in batches as the server takes them |
//!
//! A server that is lost leaves a function that reads all ones; [`crate::pci::hotplug`] has the guest let go of it.
//!
//! Not there: the expansion ROM; virtual functions, resizable BARs and alternative routing ids, whose capabilities are
//! hidden; a server that takes over from a lost one.

pub mod areas;
pub mod bars;
pub mod chain;
pub mod client;
pub mod contents;
pub mod delivery;
pub mod device;
pub mod link;
pub mod overlay;
pub mod pin;
pub mod remote;
pub mod server;
#[cfg(test)]
mod testing;

pub use client::{OpenError, Opened, Wishes, open};
pub use device::Device;
pub use remote::Remote;
