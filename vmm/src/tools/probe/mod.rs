//! `outboard probe`: what does a peer offer? Connects, asks what may be asked without a guest, and leaves.

use std::path::Path;

use crate::error::{Error, Fault};

pub mod vfio_user;
pub mod vhost_user;

/// The path of the peer's socket, for people who give what `outboard run` takes.
///
/// # Errors
/// When it is a list of keys, or a descriptor.
pub fn socket_path(given: &Path) -> Result<&Path, Error> {
    let text = given.to_string_lossy();
    let keys = text.contains("socket=") || text.starts_with("fd=");
    if !keys || given.exists() {
        return Ok(given);
    }
    Err(Error::usage(format!("{text} is no path of a socket"))
        .hint("probe takes the path alone, without `socket=` and other keys: it connects by itself"))
}

/// What could not be done, with the hint of who failed in the words of this command's options.
fn failed(socket: &Path, hint: Option<&str>) -> Error {
    let here = |hint: &str| {
        hint.replace(", or give reconnect=SECONDS to wait for it", "").replace("deadline=MS", "--deadline MS")
    };
    Error::new(Fault::Peer, format!("cannot probe {}", socket.display())).hints(hint.map(here))
}
