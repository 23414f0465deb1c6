//! A scripted vfio-user server on a thread: answers as the specification says, notes what it saw and every breach of
//! the client's own rules, and misbehaves where its script says.

mod role;
mod script;
mod server;

pub use role::Seen;
pub use script::{Act, Ask, Doorbell, Offer, RegionOffer, Script};
pub use server::{Answer, ScriptedServer};
