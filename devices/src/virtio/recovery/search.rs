//! The place where a backend is found, and one attempt to find it again. Called on the thread of the device's
//! attendant, without the device's lock: neither a vCPU nor the control loop waits for an absent backend.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::net::{Shutdown, shutdown};
use transport::peer::deadline::Deadline;
use transport::peer::socket::Attempts;
use transport::peer::socket::Listener;
use transport::peer::{Error, Limits};
use transport::vhost_user::Connection;

use crate::lock;
use crate::virtio::backend::requests::OwnChannel;
use crate::virtio::backend::survey::OpenError;
use crate::virtio::core::handle::DeviceHandle;
use crate::virtio::core::state::Effort;
use crate::virtio::recovery::candidate::{Reconnect, ReconnectError};
use crate::virtio::recovery::vacancy::UnderWay;

/// The place where each backend of a device is found.
#[derive(Debug)]
pub enum Meeting {
    /// The backend listens at this path.
    Client(PathBuf),
    /// We listen, and the backend connects.
    Server(Listener),
}

/// How long an attempt waits for a connection before it checks whether the search is to end.
const GLANCE: Duration = Duration::from_millis(200);

/// Longer than any machine lives, without overflow of the clock.
const FOREVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

impl Meeting {
    /// One attempt to connect. It fails at once when nobody listens at the path. It waits for at most
    /// `patience` when the backend's listen queue is full, or when we listen.
    fn meet(&self, limits: &Limits, patience: Duration) -> Result<Connection, Error> {
        let deadline = Deadline::after(patience);
        match self {
            Self::Client(path) => Connection::connect_before(path, limits, &deadline),
            Self::Server(listener) => Connection::accept_before(listener, limits, &deadline),
        }
    }

    /// The first connection to a backend. `patience` limits the wait; zero means no limit; `None` means one
    /// attempt.
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

/// The parameters of a search for a device's backend.
pub struct Search {
    /// Where the backend is found.
    pub meeting: Meeting,
    /// For how long the backend of a recovering device is searched for; zero means without limit.
    pub patience: Duration,
    /// Deadline and trace of the new connection.
    pub limits: Limits,
    /// Checks that the new backend matches the lost one, and installs it.
    pub reconnect: Reconnect,
    /// Takes the new backend's own channel and has it served.
    pub serve: Box<dyn Fn(OwnChannel) + Send + Sync>,
}

/// The connection of the present attempt, so that other threads can end it.
#[derive(Debug, Default)]
pub(crate) struct Trial(Mutex<Tried>);

#[derive(Debug, Default)]
struct Tried {
    connection: Option<OwnedFd>,
    /// No further attempt may be made.
    ended: bool,
    /// We ended the connection ourselves: the outcome of the attempt says nothing about the peer.
    interrupted: bool,
}

impl Trial {
    /// Lets [`Trial::interrupt`] end `connection`, until the guard is dropped.
    fn of(&self, connection: BorrowedFd<'_>) -> Exchange<'_> {
        let mut tried = lock(&self.0);
        tried.interrupted = false;
        match connection.try_clone_to_owned() {
            Ok(socket) if tried.ended => hang_up(&socket),
            Ok(socket) => tried.connection = Some(socket),
            // Without the duplicate, only the deadlines of the exchange end it.
            Err(error) => log::debug!("a search for a backend cannot be cut short: {error}"),
        }
        Exchange(self)
    }

    /// Ends the attempt that is under way. Does not wait.
    pub(crate) fn interrupt(&self) {
        let mut tried = lock(&self.0);
        if let Some(socket) = tried.connection.take() {
            tried.interrupted = true;
            hang_up(&socket);
        }
    }

    /// Ends the present attempt and every later one. Does not wait.
    pub(crate) fn end(&self) {
        lock(&self.0).ended = true;
        self.interrupt();
    }

    fn was_interrupted(&self) -> bool {
        lock(&self.0).interrupted
    }

    fn is_ended(&self) -> bool {
        lock(&self.0).ended
    }
}

/// While this guard lives, other threads may end the attempt.
#[must_use]
struct Exchange<'t>(&'t Trial);

impl Drop for Exchange<'_> {
    fn drop(&mut self) {
        lock(&self.0.0).connection = None;
    }
}

fn hang_up(socket: &OwnedFd) {
    if let Err(error) = shutdown(socket, Shutdown::Both) {
        log::debug!("the connection that was tried is gone already: {error}");
    }
}

/// A search under way.
pub(crate) struct Quest {
    effort: Effort,
    attempts: Attempts,
    pub(crate) due: Instant,
}

/// The outcome of an attempt.
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
    pub(crate) fn attempt(&self, quest: &mut Quest, device: &DeviceHandle, trial: &Trial) -> Attempted {
        let _under_way = UnderWay(device);
        let error = match self.try_once(quest.effort, device, trial) {
            Ok(()) => return Attempted::Found,
            Err(error) => error,
        };
        if quest.effort == Effort::Once {
            // An attempt that we interrupted does not show whether the peer answers.
            let silent = (!trial.was_interrupted()).then(|| error.is_silence());
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

    fn try_once(&self, effort: Effort, device: &DeviceHandle, trial: &Trial) -> Result<(), ReconnectError> {
        let connection = self.meet(effort, trial).map_err(OpenError::from)?;
        let _exchange = trial.of(connection.as_fd());
        self.reconnect.attempt(device, connection, |channel| (self.serve)(channel))
    }

    /// Connects to a backend. For a recovering device the wait is short, as another attempt follows. For a
    /// broken device, whose driver waits, it is at most one deadline of the peer.
    fn meet(&self, effort: Effort, trial: &Trial) -> Result<Connection, Error> {
        let patience = if effort == Effort::Once { self.limits.deadline() } else { GLANCE };
        let deadline = Deadline::after(patience);
        loop {
            let left = deadline.remaining().unwrap_or_default();
            match self.meeting.meet(&self.limits, left.min(GLANCE)) {
                Err(error) if left > GLANCE && error.is_silence() && !trial.is_ended() => {}
                outcome => return outcome,
            }
        }
    }
}
