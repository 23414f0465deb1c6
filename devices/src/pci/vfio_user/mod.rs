//! PCI functions that vfio-user servers serve.
//!
//! | module | what it holds |
//! |--|--|
//! | [`contents`] | what a server's function is, judged from what the server says |
//! | [`chain`] | capability lists that may loop and lie |
//! | [`bars`] | kinds and sizes of BARs |
//! | [`areas`] | which pieces of BARs guests may be shown as memory |
//! | [`overlay`] | the bits of the configuration space that the client answers itself |

pub mod areas;
pub mod bars;
pub mod chain;
pub mod contents;
pub mod overlay;
