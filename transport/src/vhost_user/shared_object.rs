//! GET_SHARED_OBJECT: the fd of an object that this back-end shares with other devices.

use std::os::fd::OwnedFd;

use zerocopy::IntoBytes;

use super::error::{Cause, Error};
use super::live::LiveSession;
use super::message::Uuid;
use super::request::Request;

impl LiveSession {
    /// Asks for the fd of the object `uuid`. Needs SHARED_OBJECT; [`Cause::Refused`] when there is none.
    pub fn shared_object(&mut self, uuid: Uuid) -> Result<OwnedFd, Error> {
        const REQUEST: Request = Request::GET_SHARED_OBJECT;
        let channel = &mut self.session.channel;
        let deadline = channel.deadline();
        let answered = channel.exchange(REQUEST, uuid.as_bytes(), &[], &deadline)?;
        answered.fds.into_iter().next().ok_or_else(|| channel.error(REQUEST, Cause::Refused(0)))
    }
}
