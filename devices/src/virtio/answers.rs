//! What a device does for the requests that its backend makes on its own channel. Called on the thread
//! that serves all such channels: must never wait, nor take a device's lock.

use transport::vhost_user::message::Iotlb;
use transport::vhost_user::{BackendChannel, MissAnswers, Refused};

/// A backend's own channel, and what is answered on it: to be served from now on.
pub struct OwnChannel {
    /// Where it asks.
    pub channel: BackendChannel,
    /// What it is told.
    pub answers: Answers,
}

/// What a device does for its backend. A backend that asks for anything else is refused.
#[derive(Default)]
pub struct Answers {
    pub(super) misses: Option<MissAnswers>,
}

impl Answers {
    /// The backend misses a translation, or was refused an access.
    ///
    /// # Errors
    /// When there is none.
    pub fn iotlb(&self, message: &Iotlb) -> Result<(), Refused> {
        self.misses.as_ref().ok_or(Refused)?.answer(message)
    }
}

#[cfg(test)]
#[path = "answers_tests.rs"]
mod tests;
