//! Watching the messages of a connection: a hook that costs one comparison when nobody watches.

use std::fmt;
use std::time::Duration;

use super::error::{MessageName, Peer};

/// Who sent a traced message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// We: a request.
    Request,
    /// The peer: the answer to it.
    Answer,
    /// The peer: a request of its own.
    PeerRequest,
    /// We: the answer to it.
    OurAnswer,
}

/// One message. Its `Display` is one line for people.
pub struct TraceEvent<'a> {
    /// Who is at the other end.
    pub peer: &'a Peer,
    /// Who sent the message.
    pub direction: Direction,
    /// What the message is, or what it answers.
    pub message: MessageName,
    /// The message's header as it is on the wire.
    pub header: &'a [u8],
    /// What follows the header on the wire.
    pub payload: &'a [u8],
    /// Both for people: each field after a space.
    pub fields: &'a dyn fmt::Display,
    /// How many descriptors came or went with it.
    pub fds: usize,
    /// For answers of the peer: the time since the request was sent. Zero otherwise.
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

/// Someone who watches messages. Called on whichever thread exchanges them, so it should be quick.
pub trait Trace: Send + Sync {
    /// A message was sent or received whole.
    fn message(&self, event: &TraceEvent<'_>);
}
