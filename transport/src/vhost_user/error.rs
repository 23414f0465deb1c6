//! What went wrong with a back-end: who, at which step, why; and a hint for the common cases.

use std::fmt;
use std::io;
use std::sync::Arc;

use super::request::Request;
pub use crate::cause::Cause;
use crate::cause::unreachable_hint;
use crate::wire::Fault;

/// What was being done when a peer failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Reaching the peer's socket.
    Connect,
    /// Waiting for the peer to connect to ours.
    Accept,
    /// A front-end request and its answer.
    Request(Request),
    /// A request of the back-end on its own channel.
    BackendRequest(super::backend_req::BackendRequest),
    /// Moving the device's state through a pipe.
    StateTransfer,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect => f.write_str("the connection"),
            Self::Accept => f.write_str("the invitation"),
            Self::Request(request) => request.fmt(f),
            Self::BackendRequest(request) => request.fmt(f),
            Self::StateTransfer => f.write_str("the device state transfer"),
        }
    }
}

/// A failure of one vhost-user back-end.
#[derive(Debug)]
pub struct Error {
    peer: Arc<str>,
    step: Step,
    cause: Cause,
}

impl Error {
    pub(crate) fn new(peer: &Arc<str>, step: Step, cause: Cause) -> Self {
        Self { peer: Arc::clone(peer), step, cause }
    }

    /// The peer's name: usually the path of its socket.
    pub fn peer(&self) -> &str {
        &self.peer
    }

    /// What was being done.
    pub fn step(&self) -> Step {
        self.step
    }

    /// Why it failed.
    pub fn cause(&self) -> &Cause {
        &self.cause
    }

    /// True when the connection cannot be used any more. A refusal, a missing feature and a mistake of ours leave
    /// it in step.
    pub fn is_fatal(&self) -> bool {
        !matches!(
            self.cause,
            Cause::Refused(_)
                | Cause::NotNegotiated
                | Cause::Invalid(_)
                | Cause::Local(_)
                | Cause::Incompatible(_)
        )
    }

    /// True when waiting for the peer to (re)start may help: its socket is absent, refuses, or is busy.
    pub fn is_absent(&self) -> bool {
        matches!(&self.cause, Cause::Unreachable(source) if matches!(source.kind(),
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::TimedOut))
    }

    /// True when the peer did not answer, or read, or take our connection, in time.
    pub fn is_silence(&self) -> bool {
        match &self.cause {
            Cause::Silent(_) | Cause::NotReading(_) => true,
            Cause::Unreachable(source) => source.kind() == io::ErrorKind::TimedOut,
            _ => false,
        }
    }

    /// What the user may try, for the common cases.
    pub fn hint(&self) -> Option<&'static str> {
        match (&self.cause, self.step) {
            (Cause::Unreachable(source), _) => unreachable_hint(source, &self.peer),
            (Cause::Silent(_), Step::Accept) => {
                Some("nobody connected: is the backend told to connect to this socket?")
            }
            (Cause::Silent(_), Step::Request(Request::GET_FEATURES)) => {
                Some("is the backend already serving another machine?")
            }
            (Cause::Silent(_), Step::Request(Request::GET_PROTOCOL_FEATURES)) => {
                Some("is the backend already serving another machine?")
            }
            (Cause::Silent(_) | Cause::NotReading(_), _) => {
                Some("is the backend stopped or overloaded? deadline=MS waits longer")
            }
            (Cause::Closed | Cause::ClosedMidMessage, Step::Request(Request::GET_FEATURES)) => {
                Some("is this a vhost-user socket? the backend's own messages may say more")
            }
            (Cause::Closed | Cause::ClosedMidMessage, _) => {
                Some("the backend may have refused the request or crashed: its own messages may say more")
            }
            (Cause::Malformed(_), Step::Request(Request::GET_FEATURES)) => {
                Some("is this a vhost-user socket?")
            }
            (Cause::Malformed(Fault::FdsTruncated), _) => Some("raise the limit of open files (ulimit -n)"),
            (Cause::Malformed(_), _) => {
                Some("the backend breaks the protocol: `--trace -` shows every message")
            }
            _ => None,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { peer, step, cause } = self;
        let who = format_args!("vhost-user backend {peer}");
        match cause {
            Cause::Unreachable(_) if *step == Step::Accept => {
                write!(f, "cannot listen for a vhost-user backend on {peer}")
            }
            Cause::Unreachable(_) => write!(f, "cannot connect to {who}"),
            Cause::Silent(limit) if *step == Step::Accept => {
                write!(f, "{who} did not connect within {} ms", limit.as_millis())
            }
            Cause::Silent(limit) => {
                write!(f, "{who} did not answer {step} within {} ms", limit.as_millis())
            }
            Cause::NotReading(limit) => {
                write!(f, "{who} did not take {step} within {} ms", limit.as_millis())
            }
            Cause::Closed => write!(f, "{who} closed the connection at {step}"),
            Cause::ClosedMidMessage => {
                write!(f, "{who} closed the connection in the middle of a message at {step}")
            }
            Cause::Io(_) => write!(f, "the connection to {who} failed at {step}"),
            Cause::Malformed(fault) => match step {
                Step::BackendRequest(_) => write!(f, "{who} sent {step} {fault}"),
                _ => write!(f, "{who} answered {step} {fault}"),
            },
            Cause::Refused(code) => write!(f, "{who} refused {step} (code {code:#x})"),
            Cause::NotNegotiated => write!(f, "{who} does not offer {step}"),
            Cause::AlreadyLost => write!(f, "{who} is lost, {step} was not sent"),
            Cause::Invalid(what) => write!(f, "{step} was not sent to {who}: {what}"),
            Cause::Local(_) => write!(f, "our side of {step} with {who} failed"),
            Cause::Incompatible(what) => write!(f, "{who} does not fit: {what}"),
        }
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.cause {
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
        Error::new(&Arc::from("/run/blk.sock"), step, cause)
    }

    #[test]
    fn a_silent_backend_reads_as_the_design_says() {
        let silent =
            error(Step::Request(Request::GET_PROTOCOL_FEATURES), Cause::Silent(Duration::from_millis(2000)));
        assert_eq!(
            silent.to_string(),
            "vhost-user backend /run/blk.sock did not answer GET_PROTOCOL_FEATURES within 2000 ms"
        );
        assert_eq!(silent.hint(), Some("is the backend already serving another machine?"));
        assert!(silent.is_fatal() && !silent.is_absent());
    }

    #[test]
    fn an_absent_socket_has_a_hint_and_does_not_repeat_its_source() {
        let absent = error(Step::Connect, Cause::Unreachable(io::ErrorKind::NotFound.into()));
        assert_eq!(absent.to_string(), "cannot connect to vhost-user backend /run/blk.sock");
        assert!(absent.is_absent());
        assert!(absent.hint().unwrap().starts_with("start the backend first"));
        assert!(std::error::Error::source(&absent).is_some());
    }

    #[test]
    fn a_refusal_is_not_fatal_and_a_malformed_answer_is() {
        let step = Step::Request(Request::SET_FEATURES);
        let refused = error(step, Cause::Refused(1));
        assert_eq!(refused.to_string(), "vhost-user backend /run/blk.sock refused SET_FEATURES (code 0x1)");
        assert!(!refused.is_fatal());
        let fault = Fault::Size { got: 4, least: 8, most: 8 };
        let malformed = error(step, Cause::Malformed(fault));
        assert_eq!(
            malformed.to_string(),
            "vhost-user backend /run/blk.sock answered SET_FEATURES with 4 bytes where 8 are due"
        );
        assert!(malformed.is_fatal());
    }
}
