//! What went wrong with a server: who, at which step, why; and a hint for the common cases.

use std::fmt;
use std::io;
use std::sync::Arc;

use super::message::{Command, Fault};
pub use crate::cause::Cause;
use crate::cause::unreachable_hint;

/// What was being done when a server failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Reaching the server's socket.
    Connect,
    /// A command of ours and its reply.
    Command(Command),
    /// A command of the server.
    ServerCommand(Command),
    /// Nothing in particular: between commands.
    Idle,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect => f.write_str("the connection"),
            Self::Command(command) | Self::ServerCommand(command) => command.fmt(f),
            Self::Idle => f.write_str("a moment when nothing was asked"),
        }
    }
}

/// A failure of one vfio-user server. Cheap to clone: everybody who waits for the server gets it.
#[derive(Clone, Debug)]
pub struct Error(Arc<Parts>);

#[derive(Debug)]
struct Parts {
    peer: Arc<str>,
    step: Step,
    cause: Cause,
}

impl Error {
    pub(crate) fn new(peer: &Arc<str>, step: Step, cause: Cause) -> Self {
        Self(Arc::new(Parts { peer: Arc::clone(peer), step, cause }))
    }

    /// The peer's name: usually the path of its socket.
    pub fn peer(&self) -> &str {
        &self.0.peer
    }

    /// What was being done.
    pub fn step(&self) -> Step {
        self.0.step
    }

    /// Why it failed.
    pub fn cause(&self) -> &Cause {
        &self.0.cause
    }

    /// True when the device should be given up: its connection has ended, or its server is hung. A refusal, a
    /// missing capability and a mistake of ours are not that.
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

    /// True when the server was silent past the deadline. The connection is still in step: a late reply is
    /// recognised and discarded.
    pub fn is_hung(&self) -> bool {
        matches!(self.0.cause, Cause::Silent(_) | Cause::NotReading(_))
    }

    /// True when waiting for the server to (re)start may help: its socket is absent, refuses, or is busy.
    pub fn is_absent(&self) -> bool {
        matches!(&self.0.cause, Cause::Unreachable(source) if matches!(source.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::TimedOut))
    }

    /// What the user may try, for the common cases.
    pub fn hint(&self) -> Option<&'static str> {
        const VERSION: Step = Step::Command(Command::VERSION);
        match (&self.0.cause, self.0.step) {
            (Cause::Unreachable(source), _) => match source.kind() {
                io::ErrorKind::NotFound => Some("start the server first"),
                io::ErrorKind::TimedOut => {
                    Some("the server does not accept connections: is it busy or stopped?")
                }
                _ => unreachable_hint(source, &self.0.peer),
            },
            (Cause::Silent(_), VERSION) => Some("is the server already serving another machine?"),
            (Cause::Silent(_) | Cause::NotReading(_), _) => {
                Some("is the server stopped or overloaded? deadline=MS waits longer")
            }
            (Cause::Closed | Cause::ClosedMidMessage | Cause::Malformed(_), VERSION) => {
                Some("is this a vfio-user socket? the server's own messages may say more")
            }
            (Cause::Closed | Cause::ClosedMidMessage, _) => {
                Some("the server may have refused the command or crashed: its own messages may say more")
            }
            (Cause::Malformed(Fault::FdsTruncated), _) => Some("raise the limit of open files (ulimit -n)"),
            // What does not speak vfio-user answers no command that there is.
            (Cause::Malformed(_), Step::Command(command)) if command.name().is_none() => {
                Some("is this a vfio-user socket? the server's own messages may say more")
            }
            (Cause::Malformed(_), _) => {
                Some("the server breaks the protocol: `--trace -` shows every message")
            }
            _ => None,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Parts { peer, step, cause } = &*self.0;
        let who = format_args!("vfio-user server {peer}");
        match cause {
            Cause::Unreachable(_) => write!(f, "cannot connect to {who}"),
            Cause::Silent(limit) => write!(f, "{who} did not answer {step} within {} ms", limit.as_millis()),
            Cause::NotReading(limit) => {
                write!(f, "{who} did not take {step} within {} ms", limit.as_millis())
            }
            Cause::Closed => write!(f, "{who} closed the connection at {step}"),
            Cause::ClosedMidMessage => {
                write!(f, "{who} closed the connection in the middle of a message at {step}")
            }
            Cause::Io(_) => write!(f, "the connection to {who} failed at {step}"),
            Cause::Malformed(fault) => match step {
                Step::Command(_) => write!(f, "{who} answered {step} {fault}"),
                _ => write!(f, "{who} sent {step} {fault}"),
            },
            Cause::Refused(0) => write!(f, "{who} refused {step}"),
            Cause::Refused(code) => {
                write!(f, "{who} refused {step}: {}", Errno(*code))
            }
            Cause::NotNegotiated => write!(f, "{who} does not offer {step}"),
            Cause::AlreadyLost => write!(f, "{who} is lost, {step} was not sent"),
            Cause::Invalid(what) => write!(f, "{step} was not sent to {who}: {what}"),
            Cause::Local(_) => write!(f, "our side of {step} with {who} failed"),
            Cause::Incompatible(what) => write!(f, "{who} does not fit: {what}"),
        }
    }
}

/// The code of an error reply: an errno of the server, if it is one at all.
struct Errno(u64);

impl fmt::Display for Errno {
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
    use std::time::Duration;

    fn error(step: Step, cause: Cause) -> Error {
        Error::new(&Arc::from("/run/nvme.sock"), step, cause)
    }

    #[test]
    fn errors_are_sentences_with_hints() {
        let silent = error(Step::Command(Command::VERSION), Cause::Silent(Duration::from_millis(2000)));
        assert_eq!(
            silent.to_string(),
            "vfio-user server /run/nvme.sock did not answer VERSION within 2000 ms"
        );
        assert_eq!(silent.hint(), Some("is the server already serving another machine?"));
        assert!(silent.is_fatal() && silent.is_hung());
        let refused = error(Step::Command(Command::DMA_MAP), Cause::Refused(22));
        assert_eq!(
            refused.to_string(),
            "vfio-user server /run/nvme.sock refused DMA_MAP: Invalid argument (os error 22)"
        );
        assert!(!refused.is_fatal());
        let odd = error(Step::Command(Command::DMA_MAP), Cause::Refused(0xffff_ffff));
        assert_eq!(odd.to_string(), "vfio-user server /run/nvme.sock refused DMA_MAP: code 0xffffffff");
        let absent = error(Step::Connect, Cause::Unreachable(io::ErrorKind::NotFound.into()));
        assert!(absent.is_absent());
        assert_eq!(absent.hint(), Some("start the server first"));
        let fault = error(Step::ServerCommand(Command(99)), Cause::Malformed(Fault::Flags(64)));
        assert_eq!(fault.to_string(), "vfio-user server /run/nvme.sock sent command 99 with flags 0x40");
    }
}
