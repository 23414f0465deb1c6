//! `outboard probe`: reports what a peer offers. It connects, asks the questions that need no guest, and
//! disconnects.

use std::path::Path;

use crate::error::{Error, Fault};

pub mod vfio_user;
pub mod vhost_user;

/// The path of the peer's socket. A value in the form that `outboard run` takes is refused with a hint.
///
/// # Errors
/// When it is a list of keys, or names a descriptor.
pub fn socket_path(given: &Path) -> Result<&Path, Error> {
    let text = given.to_string_lossy();
    let keys = text.contains("socket=") || text.starts_with("fd=");
    if !keys || given.exists() {
        return Ok(given);
    }
    Err(Error::usage(format!("{text} is no path of a socket"))
        .hint("probe takes the path alone, without `socket=` and other keys: it connects by itself"))
}

/// The error of a probe. The hint of the failed step is changed to name the options of this command.
fn failed(socket: &Path, hint: Option<&str>) -> Error {
    let here = |hint: &str| {
        hint.replace(", or give reconnect=SECONDS to wait for it", "").replace("deadline=MS", "--deadline MS")
    };
    Error::new(Fault::Peer, format!("cannot probe {}", socket.display())).hints(hint.map(here))
}
