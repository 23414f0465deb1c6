//! vfio-user VERSION: our proposal, and the agreement that follows from the server's reply.
//!
//! The reply can only lower what was proposed. Unknown capabilities are ignored, impossible values are
//! refused. The size of the text is limited before it is parsed, its nesting while it is parsed.

use serde_json::{Map, Value};

use super::message::{DmaAccess, Fault, VersionHead, length, parse_front};
use crate::memory::PAGE;
use crate::peer::Cause;
use crate::peer::fds;

/// The version that we speak.
const MAJOR: u16 = 0;
const MINOR: u16 = 1;

/// The largest payload of a VERSION reply.
pub(super) const REPLY_MOST: u32 = 64 << 10;

/// The most fds of a VERSION reply: the twin socket, with room for a server that sends it at another index.
pub(super) const REPLY_FDS: usize = 8;

/// The smallest transfer limit that does not split a register access.
const LEAST_TRANSFER: u64 = 8;

/// The capabilities of one side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// The most fds in one message to this side.
    pub max_msg_fds: u64,
    /// The most bytes of data in one message.
    pub max_data_xfer_size: u64,
    /// The most DMA maps at once.
    pub max_dma_maps: u64,
    /// Page sizes of DMA maps, or'ed together.
    pub pgsizes: u64,
    /// The server's commands have a socket of their own ("twin socket").
    pub twin_socket: bool,
    /// REGION_WRITE_MULTI may be sent.
    pub write_multiple: bool,
}

impl Capabilities {
    /// The capabilities of a side that does not state any.
    pub const DEFAULT: Self = Self {
        max_msg_fds: 1,
        max_data_xfer_size: 1 << 20,
        max_dma_maps: 65535,
        pgsizes: PAGE,
        twin_socket: false,
        write_multiple: false,
    };

    /// The capabilities that we propose.
    pub const OURS: Self = Self {
        max_msg_fds: fds::MAX_FDS as u64,
        max_data_xfer_size: 1 << 20,
        max_dma_maps: 65535,
        pgsizes: PAGE | 2 << 20 | 1 << 30,
        twin_socket: true,
        write_multiple: true,
    };

    /// The smallest of the page sizes.
    pub fn page_size(&self) -> u64 {
        self.pgsizes & self.pgsizes.wrapping_neg()
    }

    /// The most fds in one message, as a `usize`.
    pub fn fds(&self) -> usize {
        usize::try_from(self.max_msg_fds).unwrap_or(usize::MAX)
    }

    /// The lower of both sides for each capability.
    fn lowered(&self, other: &Self) -> Self {
        Self {
            max_msg_fds: self.max_msg_fds.min(other.max_msg_fds),
            max_data_xfer_size: self.max_data_xfer_size.min(other.max_data_xfer_size),
            max_dma_maps: self.max_dma_maps.min(other.max_dma_maps),
            // The server's page sizes hold as they are: each is a multiple of ours.
            pgsizes: other.pgsizes,
            twin_socket: self.twin_socket && other.twin_socket,
            write_multiple: self.write_multiple && other.write_multiple,
        }
    }
}

/// The outcome of the VERSION exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// The server's major and minor version.
    pub server: (u16, u16),
    /// What we proposed.
    pub ours: Capabilities,
    /// What the server stated, with defaults for what it did not state.
    pub theirs: Capabilities,
    /// What both sides keep to.
    pub agreed: Capabilities,
}

impl Version {
    /// True when commands beyond the first form of the protocol may be sent: DEVICE_GET_REGION_IO_FDS,
    /// DEVICE_FEATURE and the commands of migration.
    ///
    /// Some servers of version 0.0 that offer no newer capability (all of those built on the crate
    /// `vfio_user`) refuse an unknown command and then take its payload for the next command.
    pub fn is_extended(&self) -> bool {
        self.server.1 > 0 || self.theirs.write_multiple || self.theirs.twin_socket
    }

    /// True when a command of ours must not be sent while a command of the server is unanswered. A server
    /// that waits for our reply takes any message for that reply. Servers built on libvfio-user do so when
    /// their commands have no socket of their own (libvfio-user had none before REGION_WRITE_MULTI). Servers
    /// of version 0.0 send no commands.
    pub fn must_not_cross(&self) -> bool {
        self.server.1 > 0 && !self.agreed.twin_socket && !self.agreed.write_multiple
    }

    /// The largest payload of a command of the server.
    pub(super) fn largest_server_payload(&self) -> u32 {
        let transfer = u32::try_from(self.ours.max_data_xfer_size).unwrap_or(u32::MAX);
        transfer.saturating_add(length(size_of::<DmaAccess>()))
    }
}

/// The payload that proposes [`Capabilities::OURS`].
pub(super) fn proposal() -> Vec<u8> {
    let ours = Capabilities::OURS;
    // Some servers require the object, the numbers and the final NUL.
    let text = format!(
        "{{\"capabilities\":{{\"max_msg_fds\":{},\"max_data_xfer_size\":{},\"max_dma_maps\":{},\"pgsizes\":{},\
         \"twin_socket\":{{\"supported\":true}},\"write_multiple\":true}}}}\0",
        ours.max_msg_fds, ours.max_data_xfer_size, ours.max_dma_maps, ours.pgsizes
    );
    let mut payload = Vec::new();
    payload.extend_from_slice(&MAJOR.to_ne_bytes());
    payload.extend_from_slice(&MINOR.to_ne_bytes());
    payload.extend_from_slice(text.as_bytes());
    payload
}

/// Reads the VERSION reply: the agreement, and the index of the twin socket among the fds. Pure, so that it
/// can be fuzzed.
///
/// # Errors
/// When a value of the reply is impossible, or the server speaks another major version.
pub fn parse_reply(payload: &[u8]) -> Result<(Version, Option<usize>), Cause> {
    let malformed = Cause::Malformed;
    let (head, text) = parse_front::<VersionHead>(payload).map_err(malformed)?;
    if head.major != MAJOR {
        let what = format!("it speaks version {}.{}, we speak {MAJOR}.{MINOR}", head.major, head.minor);
        return Err(Cause::Incompatible(what));
    }
    if head.minor > MINOR {
        return Err(malformed(Fault::Value { field: "minor version", value: u64::from(head.minor) }));
    }
    let (theirs, twin) = capabilities(text).map_err(malformed)?;
    let ours = Capabilities::OURS;
    let agreed = ours.lowered(&theirs);
    check(&agreed)?;
    Ok((Version { server: (head.major, head.minor), ours, theirs, agreed }, twin))
}

/// Checks that we can work with the agreement.
fn check(agreed: &Capabilities) -> Result<(), Cause> {
    let value = |field, value| Err(Cause::Malformed(Fault::Value { field, value }));
    if agreed.max_data_xfer_size == 0 {
        return value("max_data_xfer_size", 0);
    }
    if agreed.max_data_xfer_size < LEAST_TRANSFER {
        let what = format!("it transfers {} bytes at once, a register has 8", agreed.max_data_xfer_size);
        return Err(Cause::Incompatible(what));
    }
    if agreed.max_dma_maps == 0 {
        return value("max_dma_maps", 0);
    }
    if agreed.page_size() < PAGE {
        return value("pgsizes", agreed.pgsizes);
    }
    Ok(())
}

/// Reads the text of a VERSION message: the capabilities, and the index of the twin socket's fd.
pub fn capabilities(text: &[u8]) -> Result<(Capabilities, Option<usize>), Fault> {
    let mut found = Capabilities::DEFAULT;
    if text.is_empty() {
        return Ok((found, None));
    }
    let text = text.strip_suffix(&[0]).ok_or(Fault::Text("capabilities that do not end with NUL"))?;
    let text = std::str::from_utf8(text).map_err(|_| Fault::Text("capabilities that are not UTF-8"))?;
    // The parser refuses nesting deeper than 128 levels.
    let value: Value =
        serde_json::from_str(text).map_err(|_| Fault::Text("capabilities that are not JSON"))?;
    let Value::Object(top) = value else {
        return Err(Fault::Text("capabilities that are no JSON object"));
    };
    let capabilities = match top.get("capabilities") {
        None => return Ok((found, None)),
        Some(Value::Object(capabilities)) => capabilities,
        Some(_) => return Err(Fault::Text("capabilities that are no JSON object")),
    };
    number(capabilities, "max_msg_fds", &mut found.max_msg_fds)?;
    number(capabilities, "max_data_xfer_size", &mut found.max_data_xfer_size)?;
    number(capabilities, "max_dma_maps", &mut found.max_dma_maps)?;
    number(capabilities, "pgsizes", &mut found.pgsizes)?;
    switch(capabilities, "write_multiple", &mut found.write_multiple)?;
    let twin = match capabilities.get("twin_socket") {
        None => None,
        Some(Value::Object(twin)) => {
            switch(twin, "supported", &mut found.twin_socket)?;
            let mut index = u64::MAX;
            number(twin, "fd_index", &mut index)?;
            found.twin_socket.then_some(usize::try_from(index).unwrap_or(usize::MAX))
        }
        Some(_) => return Err(Fault::Text("a twin_socket that is no JSON object")),
    };
    Ok((found, twin))
}

fn number(from: &Map<String, Value>, name: &str, into: &mut u64) -> Result<(), Fault> {
    if let Some(value) = from.get(name) {
        *into = value.as_u64().ok_or(Fault::Text("a capability that is not a whole number from 0"))?;
    }
    Ok(())
}

fn switch(from: &Map<String, Value>, name: &str, into: &mut bool) -> Result<(), Fault> {
    if let Some(value) = from.get(name) {
        *into = value.as_bool().ok_or(Fault::Text("a capability that is neither true nor false"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(text: &[u8]) -> Result<(Version, Option<usize>), Cause> {
        parse_reply(&[&[0, 0, 1, 0], text].concat())
    }

    fn with(capability: &str) -> Result<Version, Cause> {
        reply(format!("{{\"capabilities\":{{{capability}}}}}\0").as_bytes()).map(|(version, _)| version)
    }

    #[test]
    fn our_own_proposal_reads_as_what_we_propose() {
        let (version, _) = parse_reply(&proposal()).unwrap();
        assert_eq!(version.agreed, Capabilities::OURS);
    }

    #[test]
    fn nothing_said_means_the_defaults_and_unknown_names_mean_nothing() {
        for text in
            [&b""[..], b"{}\0", b"{\"capabilities\":{}}\0", b"{\"capabilities\":{\"x\":[1]},\"y\":2}\0"]
        {
            assert_eq!(reply(text).unwrap().0.agreed, Capabilities::DEFAULT);
        }
    }

    #[test]
    fn a_reply_lowers_and_never_raises() {
        assert_eq!(with("\"max_msg_fds\":4000000000").unwrap().agreed.max_msg_fds, 253);
        assert_eq!(with("\"max_msg_fds\":8").unwrap().agreed.max_msg_fds, 8);
        assert_eq!(with("\"max_data_xfer_size\":4096").unwrap().agreed.max_data_xfer_size, 4096);
        let huge = with("\"max_data_xfer_size\":9223372036854775808").unwrap();
        assert_eq!(huge.agreed.max_data_xfer_size, 1 << 20);
        assert_eq!(with("\"pgsizes\":2097152").unwrap().agreed.page_size(), 2 << 20);
        assert!(with("\"write_multiple\":true").unwrap().agreed.write_multiple);
    }

    #[test]
    fn only_servers_that_ask_where_they_are_asked_must_not_be_crossed() {
        let libvfio_user = "\"max_msg_fds\":8,\"max_data_xfer_size\":1048576";
        assert!(with(libvfio_user).unwrap().must_not_cross(), "that of QEMU 7.2");
        let twin = "\"twin_socket\":{\"supported\":true,\"fd_index\":0}";
        assert!(!with(twin).unwrap().must_not_cross());
        assert!(!with("\"write_multiple\":true").unwrap().must_not_cross());
        let (the_crate, _) = parse_reply(&[0, 0, 0, 0]).unwrap();
        assert!(!the_crate.must_not_cross());
    }

    #[test]
    fn the_twin_sockets_index_counts_only_when_it_is_supported() {
        let twin = |text: &str| {
            reply(format!("{{\"capabilities\":{{\"twin_socket\":{text}}}}}\0").as_bytes())
                .map(|(_, twin)| twin)
        };
        assert_eq!(twin("{\"supported\":true,\"fd_index\":0}").unwrap(), Some(0));
        assert_eq!(twin("{\"supported\":true}").unwrap(), Some(usize::MAX), "no fd has that index");
        assert_eq!(twin("{\"supported\":false,\"fd_index\":0}").unwrap(), None);
        assert_eq!(twin("{}").unwrap(), None);
        assert!(twin("true").is_err());
        assert!(twin("{\"supported\":1}").is_err());
    }

    #[test]
    fn what_cannot_be_meant_is_refused() {
        for capability in [
            "\"max_msg_fds\":-1",
            "\"max_msg_fds\":2.5",
            "\"max_msg_fds\":\"8\"",
            "\"max_data_xfer_size\":0",
            "\"max_data_xfer_size\":7",
            "\"max_dma_maps\":0",
            "\"pgsizes\":0",
            "\"pgsizes\":3",
            "\"pgsizes\":2048",
            "\"write_multiple\":1",
        ] {
            assert!(with(capability).is_err(), "{capability}");
        }
        let deep = [b"[".repeat(60_000), b"\0".to_vec()].concat();
        for text in
            [&b"{}"[..], b"{}\0\0", b"{\0}\0", b"\xff\0", b"[]\0", b"null\0", b"\"x\"\0", b"{\0", &deep]
        {
            assert!(matches!(reply(text), Err(Cause::Malformed(Fault::Text(_)))));
        }
        for len in [0, 1, 3] {
            assert!(matches!(parse_reply(&vec![0; len]), Err(Cause::Malformed(Fault::Size { .. }))));
        }
        assert!(matches!(parse_reply(&[1, 0, 0, 0]), Err(Cause::Incompatible(_))));
        assert!(matches!(parse_reply(&[0, 0, 2, 0]), Err(Cause::Malformed(Fault::Value { .. }))));
    }
}
