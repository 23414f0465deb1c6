//! Watching the messages of a connection: a hook that costs one comparison when nobody watches.

use std::time::Duration;

use super::message::Header;

/// Who sent a traced message, and on which socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Front-end request.
    ToBackend,
    /// Its answer.
    FromBackend,
    /// Request of the back-end on its own channel.
    BackendRequest,
    /// Our answer to it.
    BackendAnswer,
}

/// One message.
#[derive(Clone, Copy, Debug)]
pub struct TraceEvent<'a> {
    /// The peer's name.
    pub peer: &'a str,
    /// Who sent it.
    pub direction: Direction,
    /// Its header.
    pub header: Header,
    /// Its payload.
    pub payload: &'a [u8],
    /// How many fds came or went with it.
    pub fds: usize,
    /// For answers of the back-end: how long they were waited for. Zero otherwise.
    pub took: Duration,
}

/// Someone who watches messages. Called on whichever thread exchanges them, so it should be quick.
pub trait Trace: Send + Sync {
    /// A message was sent or received whole.
    fn message(&self, event: &TraceEvent<'_>);
}
