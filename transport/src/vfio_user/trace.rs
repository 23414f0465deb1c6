//! Watching the messages of a connection: a hook that costs one comparison when nobody watches.

use std::time::Duration;

use super::message::Header;

/// Who sent a traced message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Our command.
    ToServer,
    /// Its reply.
    FromServer,
    /// A command of the server.
    ServerCommand,
    /// Our reply to it.
    OurReply,
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
    /// For replies of the server: how long ago the command was sent. Zero otherwise.
    pub took: Duration,
}

/// Someone who watches messages. Called on whichever thread exchanges them, so it should be quick.
pub trait Trace: Send + Sync {
    /// A message is sent, or was received whole.
    fn message(&self, event: &TraceEvent<'_>);
}
