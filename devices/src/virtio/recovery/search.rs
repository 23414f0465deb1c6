//! Where a backend is found, and one attempt to find it again. Called on the thread of the device's attendant, without
//! the device's lock: neither a vCPU nor the control loop waits for a backend that is away.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use transport::peer::deadline::Deadline;
use transport::peer::socket::Attempts;
use transport::peer::socket::Listener;
use transport::peer::{Error, Limits};
use transport::vhost_user::Connection;

use crate::virtio::attendant::Attendant;
use crate::virtio::backend::requests::OwnChannel;
use crate::virtio::backend::survey::OpenError;
use crate::virtio::core::handle::DeviceHandle;
use crate::virtio::core::vacancy::Effort;
use crate::virtio::recovery::candidate::{Reconnect, ReconnectError};
use crate::virtio::recovery::vacancy::UnderWay;

/// Where a backend is found, again and again.
#[derive(Debug)]
pub enum Meeting {
    /// The backend listens at this path.
    Client(PathBuf),
    /// We listen, and the backend connects.
    Server(Listener),
}

/// How long an attempt waits for a connection before it looks whether the search is to end.
const GLANCE: Duration = Duration::from_millis(200);

/// Longer than any machine lives, and far from where a clock overflows.
const FOREVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

impl Meeting {
    /// One attempt. A path where nobody listens fails at once; a full listen queue of the backend, and our own listener,
    /// are waited for, for `patience` at most.
    fn meet(&self, limits: &Limits, patience: Duration) -> Result<Connection, Error> {
        let deadline = Deadline::after(patience);
        match self {
            Self::Client(path) => Connection::connect_before(path, limits, &deadline),
            Self::Server(listener) => Connection::accept_before(listener, limits, &deadline),
        }
    }

    /// The first meeting, for `patience` at most; a patience of zero has no end, and without one there is one attempt.
    ///
    /// # Errors
    /// When no backend comes.
    pub fn first(&self, limits: &Limits, patience: Option<Duration>) -> Result<Connection, Error> {
        match (self, patience) {
            (Self::Client(path), None) => Connection::connect(path, limits),
            (Self::Client(path), Some(patience)) => {
                Connection::connect_patiently(path, limits, &mut attempts(patience))
            }
            (Self::Server(_), None) => self.meet(limits, limits.deadline()),
            (Self::Server(_), Some(patience)) => {
                self.meet(limits, if patience.is_zero() { FOREVER } else { patience })
            }
        }
    }
}

fn attempts(patience: Duration) -> Attempts {
    Attempts::lasting((!patience.is_zero()).then_some(patience))
}

/// What it takes to find a device's backend again.
pub struct Search {
    /// Where the backend is found.
    pub meeting: Meeting,
    /// For how long a recovering device's backend is searched for; zero: for ever.
    pub patience: Duration,
    /// Deadline and trace of the new connection.
    pub limits: Limits,
    /// What the new backend has to match.
    pub reconnect: Reconnect,
    /// Has the new backend's own channel served.
    pub serve: Box<dyn Fn(OwnChannel) + Send + Sync>,
}

/// A search under way.
pub(crate) struct Quest {
    effort: Effort,
    attempts: Attempts,
    pub(crate) due: Instant,
}

/// What came of an attempt.
pub(crate) enum Attempted {
    Found,
    GivenUp,
    Again,
}

impl Search {
    pub(crate) fn begin(&self, effort: Effort) -> Quest {
        Quest { effort, attempts: attempts(self.patience), due: Instant::now() }
    }

    /// One attempt on behalf of `device`.
    pub(crate) fn attempt(
        &self,
        quest: &mut Quest,
        device: &DeviceHandle,
        attendant: &Attendant,
    ) -> Attempted {
        let _under_way = UnderWay(device);
        let error = match self.try_once(quest.effort, device, attendant) {
            Ok(()) => return Attempted::Found,
            Err(error) => error,
        };
        if quest.effort == Effort::Once {
            // An attempt that we interrupted ourselves does not tell whether the peer answers.
            let silent = (!attendant.was_interrupted()).then(|| error.is_silence());
            device.search_failed(&error, silent);
            return Attempted::GivenUp;
        }
        if error.is_final() {
            log::warn!("no recovery: {error}");
            return Attempted::GivenUp;
        }
        log::debug!("not recovered yet: {error}");
        match quest.attempts.next_pause().and_then(|pause| Instant::now().checked_add(pause)) {
            Some(due) => {
                quest.due = due;
                Attempted::Again
            }
            None => {
                let patience = self.patience.as_secs();
                device.give_up(&format!("no backend came back within {patience} s: {error}"));
                Attempted::GivenUp
            }
        }
    }

    fn try_once(
        &self,
        effort: Effort,
        device: &DeviceHandle,
        attendant: &Attendant,
    ) -> Result<(), ReconnectError> {
        let connection = self.meet(effort, attendant).map_err(OpenError::from)?;
        let _exchange = attendant.interruptible(connection.as_fd());
        self.reconnect.attempt(device, connection, |channel| (self.serve)(channel))
    }

    /// A connection. A recovering device is looked after again soon; a driver waits for that of a broken one, for a
    /// deadline of the peer.
    fn meet(&self, effort: Effort, attendant: &Attendant) -> Result<Connection, Error> {
        let patience = if effort == Effort::Once { self.limits.deadline() } else { GLANCE };
        let deadline = Deadline::after(patience);
        loop {
            let left = deadline.remaining().unwrap_or_default();
            match self.meeting.meet(&self.limits, left.min(GLANCE)) {
                Err(error) if left > GLANCE && error.is_silence() && !attendant.is_ended() => {}
                outcome => return outcome,
            }
        }
    }
}
