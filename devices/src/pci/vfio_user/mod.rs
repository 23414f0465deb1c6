//! PCI functions that vfio-user servers serve.
//!
//! | module | what it holds |
//! |--|--|
//! | [`function`] | what a server's function is, judged from what the server says |
//! | [`capabilities`] | capability lists that may loop and lie |
//! | [`bars`] | kinds and sizes of BARs, and which pieces of them guests may be shown as memory |
//! | [`overlay`] | the bits of the configuration space that the client answers itself |
//! | [`server`] | what the device asks of whoever serves the function, until that fails |
//! | `session` | the same over vfio-user |
//! | [`survey`] | a server is asked what its function is |
//! | [`interrupts`] | how interrupts reach the guest |
//! | [`pin`] | the guest's ends of the pin's interrupt |
//! | [`device`] | the function, for the machine's whole life |
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
//! One access of the guest waits for one deadline at most, however many messages it takes.
//!
//! A server that is lost leaves a function that reads all ones; [`crate::pci::hotplug`] has the guest let go of it. The device
//! status of a virtio function reads 0 once the driver has reset it: Linux waits for that.
//!
//! Not there: the expansion ROM; virtual functions, resizable BARs and alternative routing ids, whose capabilities are
//! hidden; a server that takes over from a lost one.

pub mod bars;
pub mod capabilities;
pub mod device;
pub mod function;
pub mod interrupts;
pub mod overlay;
pub mod pin;
pub mod server;
mod session;
pub mod survey;
#[cfg(test)]
mod testing;

pub use device::VfioUserDevice;
pub use survey::{OpenError, Surveyed, Wishes, survey};
