//! `--vfio-user socket=PATH[,key=value…]`: one PCI device that a vfio-user server serves.

use std::time::Duration;

use devices::pci::vfio_user::Wishes;
use devices::pci::vfio_user::link::Writes;

use super::parse::{KeyValues, id};
use super::{DEFAULT_DEADLINE, Socket};
use crate::error::Error;

/// One PCI device that a vfio-user server serves.
#[derive(Debug)]
pub struct VfioUser {
    /// Where the server is.
    pub socket: Socket,
    /// Its name in messages and statistics; `vfio-user` and a number when absent.
    pub id: Option<String>,
    /// How long the server may take over one request.
    pub deadline: Duration,
    /// How its BARs are written, and the like.
    pub wishes: Wishes,
}

impl VfioUser {
    /// The device at `socket`, everything else by default.
    pub fn new(socket: Socket) -> Self {
        VfioUser { socket, id: None, deadline: DEFAULT_DEADLINE, wishes: Wishes::default() }
    }
}

/// The keys of `--vfio-user`.
const KEYS: &[&str] = &["socket", "id", "deadline", "posted-writes"];

/// `--vfio-user socket=PATH[,key=value…]`.
///
/// # Errors
/// When a key is unknown, a value out of range, or the socket is missing.
pub fn parse_vfio_user(text: &str) -> Result<VfioUser, Error> {
    let option = "--vfio-user";
    let (first, mut keys) = KeyValues::split(option, text, KEYS)?;
    let example = "for example --vfio-user socket=/run/nvme.sock";
    if let Some(word) = first.filter(|word| !word.is_empty()) {
        return Err(Error::usage(format!("{option} cannot use `{word}`: everything has a key")).hint(example));
    }
    let socket = match keys.take("socket") {
        Some(path) if !path.is_empty() => Socket::parse(path)?,
        _ => return Err(Error::usage(format!("{option} needs a socket")).hint(example)),
    };
    let mut device = VfioUser::new(socket);
    device.id = id(option, &mut keys)?;
    if let Some(deadline) = keys.take_number("deadline", 1..=3_600_000)? {
        device.deadline = Duration::from_millis(deadline);
    }
    device.wishes.writes = match keys.take("posted-writes") {
        None => None,
        Some("on") => Some(Writes::Posted),
        Some("off") => Some(Writes::Answered),
        Some(other) => {
            return Err(Error::usage(format!("{option} cannot use posted-writes={other}"))
                .hint("write posted-writes=on or posted-writes=off"));
        }
    };
    Ok(device)
}

#[cfg(test)]
mod tests {

    use super::*;

    #[test]
    fn vfio_user_takes_every_key() {
        let device = parse_vfio_user("socket=/s,id=nvme0,deadline=500,posted-writes=off").unwrap();
        assert!(matches!(&device.socket, Socket::Path(path) if path == std::path::Path::new("/s")));
        assert_eq!(device.id.as_deref(), Some("nvme0"));
        assert_eq!(device.deadline, Duration::from_millis(500));
        assert_eq!(device.wishes.writes, Some(Writes::Answered));
        assert_eq!(parse_vfio_user("socket=/s").unwrap().wishes.writes, None);
    }

    #[test]
    fn vfio_user_refuses_what_it_cannot_do() {
        for (text, part) in [
            ("", "needs a socket"),
            ("socket=", "needs a socket"),
            ("nvme,socket=/s", "cannot use `nvme`"),
            ("socket=/s,colour=red", "has no key `colour`"),
            ("socket=/s,posted-writes=maybe", "posted-writes=maybe"),
            ("socket=/s,deadline=0", "deadline=0"),
            ("socket=/s,id=a b", "id=a b"),
            ("socket=fd=x", "no inherited descriptor"),
        ] {
            let error = parse_vfio_user(text).unwrap_err();
            let mut out = Vec::new();
            error.report(&mut out).unwrap();
            let said = String::from_utf8(out).unwrap();
            assert!(said.contains(part), "{text}: {said}");
        }
    }
}
