//! A scripted vfio-user server on a thread. It answers as the specification says, records the commands and
//! each breach of the client's rules, and misbehaves where its script says.

mod role;
mod script;
mod server;

pub use role::Seen;
pub use script::{Act, Ask, Doorbell, Offer, RegionOffer, Script};
pub use server::{Answer, ScriptedServer};
