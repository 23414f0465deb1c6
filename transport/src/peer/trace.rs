//! The trace of a connection's messages: a hook that costs one comparison when no trace is set.

use std::fmt;
use std::time::Duration;

use super::error::{MessageName, Peer};

/// Who sent a traced message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// We sent a request.
    Request,
    /// The peer answered it.
    Answer,
    /// The peer sent a request of its own.
    PeerRequest,
    /// We answered it.
    OurAnswer,
}

/// One message. Its `Display` is one line for people.
pub struct TraceEvent<'a> {
    /// The peer at the other end.
    pub peer: &'a Peer,
    /// Who sent the message.
    pub direction: Direction,
    /// The message, or the request that it answers.
    pub message: MessageName,
    /// The message's header as it is on the wire.
    pub header: &'a [u8],
    /// The payload as it is on the wire.
    pub payload: &'a [u8],
    /// Header and payload as text: each field after a space.
    pub fields: &'a dyn fmt::Display,
    /// The number of descriptors that travelled with it.
    pub fds: usize,
    /// For answers of the peer: the time since the request was sent. Zero for all others.
    pub took: Duration,
}

impl fmt::Display for TraceEvent<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = match self.direction {
            Direction::Request => ">",
            Direction::Answer => "<",
            Direction::PeerRequest => "<<",
            Direction::OurAnswer => ">>",
        };
        write!(f, "{} {sign} {}{}", self.peer.name(), self.message, self.fields)?;
        if self.fds > 0 {
            write!(f, " fds={}", self.fds)?;
        }
        if self.direction == Direction::Answer {
            write!(f, " ({} us)", self.took.as_micros())?;
        }
        Ok(())
    }
}

/// The receiver of traced messages. Called on any thread that exchanges messages, so it should be quick.
pub trait Trace: Send + Sync {
    /// Called after a message was sent or received completely.
    fn message(&self, event: &TraceEvent<'_>);
}
