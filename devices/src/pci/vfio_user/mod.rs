//! PCI functions whose device is a vfio-user server: we are the client.
//!
//! | module | what it holds |
//! |--|--|
//! | [`function`] | judges what the server says of its function: what guests are shown |
//! | [`capabilities`] | reads capability lists, which may loop and lie |
//! | [`bars`] | kinds and sizes of BARs, and which parts of BARs are mapped into the guest |
//! | [`overlay`] | the bits of the configuration space that the client answers itself |
//! | [`server`] | the device's requests to the server, until the server fails |
//! | `session` | these requests over vfio-user |
//! | [`survey`] | asks a server what its function is |
//! | [`interrupts`] | how interrupts reach the guest |
//! | [`pin`] | what happens when the guest ends the pin's interrupt |
//! | [`device`] | the function as the guest sees it, for the machine's whole life |
//!
//! # What a guest's access costs
//! | access | cost |
//! |--|--|
//! | memory that the server allows to be mapped; a doorbell for which the server gave an eventfd | nothing: the access stays in the guest, or in KVM |
//! | an interrupt by MSI-X or MSI, and its end | nothing |
//! | the end of an interrupt by the pin | no exit; at most two messages, sent by the thread `peers`: the first asks the server to raise the pin if it has a reason, the second reads the function's status register; one such read is under way at a time |
//! | the MSI-X table and the pending bits | an exit; the server is not asked |
//! | another read of a BAR; a read of the server's part of the configuration space | an exit and one round trip, within the deadline |
//! | another write of a BAR | an exit and one message; a round trip with `posted-writes=off`, or where memory of the BAR is mapped |
//! | switching MSI-X, MSI or the pin on and off | an exit and at least two round trips: the server takes the eventfds in batches |
//!
//! One access of the guest waits for one deadline at most, however many messages the access takes.
//!
//! A function whose server is lost reads all ones; [`crate::pci::hotplug`] makes the guest remove the
//! function. The device status of a lost virtio function reads 0 once the driver has reset the device,
//! because Linux waits for that.
//!
//! Not supported: the expansion ROM; virtual functions, resizable BARs and alternative routing ids, whose
//! capabilities are hidden; replacing a lost server by a new one.

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
