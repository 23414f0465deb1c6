//! The error type of both protocols: which peer failed, at which step, for which cause, with a hint for
//! common cases.

use std::fmt;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;

use super::wire::Fault;

/// The protocol that a peer speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Protocol {
    VhostUser,
    VfioUser,
}

/// The process at the other end of a socket, as errors and log lines name it.
#[derive(Clone, Debug)]
pub struct Peer(Arc<(Protocol, String)>);

impl Peer {
    /// Makes a peer; `name` is usually the path of its socket.
    pub fn new(protocol: Protocol, name: impl Into<String>) -> Self {
        Self(Arc::new((protocol, name.into())))
    }

    /// The name without the protocol.
    pub fn name(&self) -> &str {
        &self.0.1
    }

    fn protocol(&self) -> Protocol {
        self.0.0
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.protocol() {
            Protocol::VhostUser => "vhost-user backend",
            Protocol::VfioUser => "vfio-user server",
        };
        write!(f, "{kind} {}", self.name())
    }
}

/// A message code of either protocol and its name in the specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MessageName {
    /// The number in the header.
    pub code: u32,
    /// `Ok` with the name, or `Err` with the kind of number (`request`, `command`) when the specification has
    /// no such code.
    pub name: Result<&'static str, &'static str>,
}

impl fmt::Display for MessageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name {
            Ok(name) => f.write_str(name),
            Err(kind) => write!(f, "{kind} {}", self.code),
        }
    }
}

/// What we did when a peer failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Reaching the peer's socket.
    Connect,
    /// Waiting for the peer to connect to our socket.
    Accept,
    /// Sending one of our requests and waiting for its answer.
    Request(MessageName),
    /// Serving a request of the peer.
    PeerRequest(MessageName),
    /// Moving the device's state through a pipe.
    StateTransfer,
    /// No request was under way.
    Idle,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect => f.write_str("the connection"),
            Self::Accept => f.write_str("the invitation"),
            Self::Request(message) | Self::PeerRequest(message) => message.fmt(f),
            Self::StateTransfer => f.write_str("the device state transfer"),
            Self::Idle => f.write_str("a moment when nothing was asked"),
        }
    }
}

/// Why a step failed.
#[derive(Debug)]
pub enum Cause {
    /// The socket cannot be reached.
    Unreachable(io::Error),
    /// The answer, or a part of it, did not come before the deadline.
    Silent(Duration),
    /// The peer did not read our request before the deadline.
    NotReading(Duration),
    /// The peer closed the connection.
    Closed,
    /// The peer closed the connection in the middle of a message.
    ClosedMidMessage,
    /// The socket failed.
    Io(io::Error),
    /// The message is not a possible answer to this request, or not a possible request.
    Malformed(Fault),
    /// The peer refused, with this code.
    Refused(u64),
    /// The feature was not negotiated, so nothing was sent.
    NotNegotiated,
    /// An earlier failure ended the connection; nothing was sent.
    AlreadyLost,
    /// The request was not possible, so nothing was sent.
    Invalid(&'static str),
    /// Our own side of a transfer failed; the peer did nothing wrong.
    Local(io::Error),
    /// What the peer offers is not compatible; the text says why.
    Incompatible(String),
}

/// A failure of one peer. Cheap to clone, as each thread that waits on the same connection gets a copy.
#[derive(Clone, Debug)]
pub struct Error(Arc<Parts>);

#[derive(Debug)]
struct Parts {
    peer: Peer,
    step: Step,
    cause: Cause,
}

impl Error {
    pub(crate) fn new(peer: &Peer, step: Step, cause: Cause) -> Self {
        Self(Arc::new(Parts { peer: peer.clone(), step, cause }))
    }

    /// The peer's name: usually the path of its socket.
    pub fn peer(&self) -> &str {
        self.0.peer.name()
    }

    /// The step that failed.
    pub fn step(&self) -> Step {
        self.0.step
    }

    /// The cause of the failure.
    pub fn cause(&self) -> &Cause {
        &self.0.cause
    }

    /// True when the device should be given up: its connection has ended, or its peer hangs. After a refusal,
    /// a missing feature or a mistake of ours, the connection can still be used.
    pub fn is_fatal(&self) -> bool {
        !matches!(
            self.0.cause,
            Cause::Refused(_)
                | Cause::NotNegotiated
                | Cause::Invalid(_)
                | Cause::Local(_)
                | Cause::Incompatible(_)
        )
    }

    /// True when waiting for the peer to start (again) may help: its socket is absent, refuses connections,
    /// or is busy.
    pub fn is_absent(&self) -> bool {
        matches!(&self.0.cause, Cause::Unreachable(source) if matches!(source.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::TimedOut))
    }

    /// True when the peer did not answer, did not read, or did not accept our connection in time.
    pub fn is_silence(&self) -> bool {
        match &self.0.cause {
            Cause::Silent(_) | Cause::NotReading(_) => true,
            Cause::Unreachable(source) => source.kind() == io::ErrorKind::TimedOut,
            _ => false,
        }
    }

    /// A suggestion to the user, for the common cases.
    pub fn hint(&self) -> Option<&'static str> {
        let Parts { peer, step, cause } = &*self.0;
        let asked = match step {
            Step::Request(MessageName { name, .. }) => name.ok(),
            _ => None,
        };
        match (peer.protocol(), cause) {
            (protocol, Cause::Unreachable(source)) => unreachable_hint(source, peer.name(), protocol),
            (_, Cause::Malformed(Fault::FdsTruncated)) => Some("raise the limit of open files (ulimit -n)"),
            (Protocol::VhostUser, cause) => vhost_user_hint(*step, asked, cause),
            (Protocol::VfioUser, cause) => vfio_user_hint(*step, asked, cause),
        }
    }
}

fn vhost_user_hint(step: Step, asked: Option<&str>, cause: &Cause) -> Option<&'static str> {
    Some(match (cause, asked) {
        (Cause::Silent(_), None) if step == Step::Accept => {
            "nobody connected: is the backend told to connect to this socket?"
        }
        (Cause::Silent(_), Some("GET_FEATURES" | "GET_PROTOCOL_FEATURES")) => {
            "is the backend already serving another machine?"
        }
        (Cause::Silent(_) | Cause::NotReading(_), _) => {
            "is the backend stopped or overloaded? deadline=MS waits longer"
        }
        (Cause::Closed | Cause::ClosedMidMessage, Some("GET_FEATURES")) => {
            "is this a vhost-user socket? the backend's own messages may say more"
        }
        (Cause::Closed | Cause::ClosedMidMessage, _) => {
            "the backend may have refused the request or crashed: its own messages may say more"
        }
        (Cause::Malformed(_), Some("GET_FEATURES")) => "is this a vhost-user socket?",
        (Cause::Malformed(_), _) => "the backend breaks the protocol: `--trace -` shows every message",
        _ => return None,
    })
}

fn vfio_user_hint(step: Step, asked: Option<&str>, cause: &Cause) -> Option<&'static str> {
    // A program that does not speak vfio-user usually seems to answer with a command code that does not
    // exist.
    let is_unknown = matches!(step, Step::Request(_)) && asked.is_none();
    Some(match (cause, asked) {
        (Cause::Silent(_), Some("VERSION")) => "is the server already serving another machine?",
        (Cause::Silent(_) | Cause::NotReading(_), _) => {
            "is the server stopped or overloaded? deadline=MS waits longer"
        }
        (Cause::Closed | Cause::ClosedMidMessage | Cause::Malformed(_), Some("VERSION")) => {
            "is this a vfio-user socket? the server's own messages may say more"
        }
        (Cause::Closed | Cause::ClosedMidMessage, _) => {
            "the server may have refused the command or crashed: its own messages may say more"
        }
        (Cause::Malformed(_), _) if is_unknown => {
            "is this a vfio-user socket? the server's own messages may say more"
        }
        (Cause::Malformed(_), _) => "the server breaks the protocol: `--trace -` shows every message",
        _ => return None,
    })
}

/// A suggestion to the user when the socket `name` cannot be reached.
fn unreachable_hint(source: &io::Error, name: &str, protocol: Protocol) -> Option<&'static str> {
    if source.raw_os_error() == Some(Errno::PROTOTYPE.raw_os_error()) {
        return Some("it is a socket of another kind: those of backends and servers are stream sockets");
    }
    Some(match (source.kind(), protocol) {
        (io::ErrorKind::NotFound, Protocol::VhostUser) => {
            "start the backend first, or give reconnect=SECONDS to wait for it"
        }
        (io::ErrorKind::NotFound, Protocol::VfioUser) => "start the server first",
        (io::ErrorKind::TimedOut, Protocol::VhostUser) => {
            "the backend does not accept connections: is it busy or stopped?"
        }
        (io::ErrorKind::TimedOut, Protocol::VfioUser) => {
            "the server does not accept connections: is it busy or stopped?"
        }
        (io::ErrorKind::ConnectionRefused, _) => refused_hint(name),
        (io::ErrorKind::NotADirectory, _) => "a part of the path is no directory: is it right?",
        (io::ErrorKind::PermissionDenied, _) => {
            "you may not write to this socket: check its owner, its mode and those of its directory"
        }
        (io::ErrorKind::AddrInUse, _) => {
            "another program listens on this path; remove the file if it is stale"
        }
        (io::ErrorKind::InvalidInput | io::ErrorKind::InvalidFilename, _) => {
            "a socket path has at most 107 bytes: use a shorter one"
        }
        _ => return None,
    })
}

/// The kernel refuses a connection to any path without a listener. The file at the path tells the reason.
fn refused_hint(name: &str) -> &'static str {
    if name.starts_with('@') {
        return "nobody listens on this abstract name: start its owner first, in the same network namespace";
    }
    match std::fs::metadata(name).map(|found| found.file_type()) {
        Ok(found) if found.is_dir() => "it is a directory: give the path of the socket in it",
        Ok(found) if !found.is_socket() => "it is no socket: is the path right?",
        _ => "the socket file is stale: nobody listens on it; start its owner again",
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Parts { peer, step, cause } = &*self.0;
        match cause {
            Cause::Unreachable(_) if *step == Step::Accept => {
                write!(f, "cannot listen for a vhost-user backend on {}", peer.name())
            }
            Cause::Unreachable(_) => write!(f, "cannot connect to {peer}"),
            Cause::Silent(limit) if *step == Step::Accept => {
                write!(f, "{peer} did not connect within {} ms", limit.as_millis())
            }
            Cause::Silent(limit) => {
                write!(f, "{peer} did not answer {step} within {} ms", limit.as_millis())
            }
            Cause::NotReading(limit) => {
                write!(f, "{peer} did not take {step} within {} ms", limit.as_millis())
            }
            Cause::Closed => write!(f, "{peer} closed the connection at {step}"),
            Cause::ClosedMidMessage => {
                write!(f, "{peer} closed the connection in the middle of a message at {step}")
            }
            Cause::Io(_) => write!(f, "the connection to {peer} failed at {step}"),
            Cause::Malformed(fault) => match step {
                Step::PeerRequest(_) | Step::Idle => write!(f, "{peer} sent {step} {fault}"),
                _ => write!(f, "{peer} answered {step} {fault}"),
            },
            Cause::Refused(code) => match peer.protocol() {
                Protocol::VhostUser => write!(f, "{peer} refused {step} (code {code:#x})"),
                Protocol::VfioUser if *code == 0 => write!(f, "{peer} refused {step}"),
                Protocol::VfioUser => write!(f, "{peer} refused {step}: {}", ErrnoOfPeer(*code)),
            },
            Cause::NotNegotiated => write!(f, "{peer} does not offer {step}"),
            Cause::AlreadyLost => write!(f, "{peer} is lost, {step} was not sent"),
            Cause::Invalid(what) => write!(f, "{step} was not sent to {peer}: {what}"),
            Cause::Local(_) => write!(f, "our side of {step} with {peer} failed"),
            Cause::Incompatible(what) => write!(f, "{peer} does not fit: {what}"),
        }
    }
}

/// The code of a vfio-user error reply: an errno of the server, or any other number.
struct ErrnoOfPeer(u64);

impl fmt::Display for ErrnoOfPeer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match i32::try_from(self.0) {
            Ok(errno) if errno < 4096 => io::Error::from_raw_os_error(errno).fmt(f),
            _ => write!(f, "code {:#x}", self.0),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.0.cause {
            Cause::Unreachable(source) | Cause::Io(source) | Cause::Local(source) => Some(source),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &'static str) -> MessageName {
        MessageName { code: 0, name: Ok(name) }
    }

    fn backend(step: Step, cause: Cause) -> Error {
        Error::new(&Peer::new(Protocol::VhostUser, "/run/blk.sock"), step, cause)
    }

    fn server(step: Step, cause: Cause) -> Error {
        Error::new(&Peer::new(Protocol::VfioUser, "/run/nvme.sock"), step, cause)
    }

    #[test]
    fn a_silent_backend_is_named_with_its_step_and_its_limit() {
        let limit = Duration::from_millis(2000);
        let silent = backend(Step::Request(named("GET_PROTOCOL_FEATURES")), Cause::Silent(limit));
        assert_eq!(
            silent.to_string(),
            "vhost-user backend /run/blk.sock did not answer GET_PROTOCOL_FEATURES within 2000 ms"
        );
        assert_eq!(silent.hint(), Some("is the backend already serving another machine?"));
        assert!(silent.is_fatal() && silent.is_silence() && !silent.is_absent());
    }

    #[test]
    fn an_absent_socket_has_a_hint_and_does_not_repeat_its_source() {
        let absent = backend(Step::Connect, Cause::Unreachable(io::ErrorKind::NotFound.into()));
        assert_eq!(absent.to_string(), "cannot connect to vhost-user backend /run/blk.sock");
        assert!(absent.is_absent());
        assert!(absent.hint().unwrap().starts_with("start the backend first"));
        assert!(std::error::Error::source(&absent).is_some());
    }

    #[test]
    fn a_refusal_is_not_fatal_and_a_malformed_answer_is() {
        let step = Step::Request(named("SET_FEATURES"));
        let refused = backend(step, Cause::Refused(1));
        assert_eq!(refused.to_string(), "vhost-user backend /run/blk.sock refused SET_FEATURES (code 0x1)");
        assert!(!refused.is_fatal());
        let fault = Fault::Size { got: 4, least: 8, most: 8 };
        let malformed = backend(step, Cause::Malformed(fault));
        assert_eq!(
            malformed.to_string(),
            "vhost-user backend /run/blk.sock answered SET_FEATURES with 4 bytes where 8 are due"
        );
        assert!(malformed.is_fatal());
    }

    #[test]
    fn errors_of_servers_are_sentences_with_hints() {
        let silent = server(Step::Request(named("VERSION")), Cause::Silent(Duration::from_millis(2000)));
        assert_eq!(
            silent.to_string(),
            "vfio-user server /run/nvme.sock did not answer VERSION within 2000 ms"
        );
        assert_eq!(silent.hint(), Some("is the server already serving another machine?"));
        assert!(silent.is_fatal() && silent.is_silence());
        let map = Step::Request(named("DMA_MAP"));
        let refused = server(map, Cause::Refused(22));
        assert_eq!(
            refused.to_string(),
            "vfio-user server /run/nvme.sock refused DMA_MAP: Invalid argument (os error 22)"
        );
        assert!(!refused.is_fatal());
        let odd = server(map, Cause::Refused(0xffff_ffff));
        assert_eq!(odd.to_string(), "vfio-user server /run/nvme.sock refused DMA_MAP: code 0xffffffff");
        let absent = server(Step::Connect, Cause::Unreachable(io::ErrorKind::NotFound.into()));
        assert!(absent.is_absent());
        assert_eq!(absent.hint(), Some("start the server first"));
        let unknown = Step::PeerRequest(MessageName { code: 99, name: Err("command") });
        let fault = server(unknown, Cause::Malformed(Fault::Flags(64)));
        assert_eq!(fault.to_string(), "vfio-user server /run/nvme.sock sent command 99 with flags 0x40");
    }
}
