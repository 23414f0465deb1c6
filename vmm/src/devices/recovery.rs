//! Finding a lost backend again: one thread a device, for as long as it recovers.
//!
//! The thread connects, asks and starts the rings without the device's lock, so neither a vCPU nor the control
//! loop waits for a backend that is away. It ends with a success, with a backend that does not fit, when the
//! user's time is over, or when the board is taken apart.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use devices::virtio::backend::requests::OwnChannel;
use devices::virtio::recovery::revival::Trial;
use devices::virtio::recovery::watch::Standing;
use devices::virtio::{DeviceHandle, Reconnect};
use rustix::net::{Shutdown, shutdown};
use transport::peer::deadline::Deadline;
use transport::peer::socket::Attempts;
use transport::peer::socket::Listener;
use transport::peer::{Error, Limits};
use transport::vhost_user::Connection;

use crate::control::peers::Peers;

/// Where a backend is found, again and again.
#[derive(Debug)]
pub(crate) enum Meeting {
    /// It listens, we connect.
    Client(PathBuf),
    /// We listen, it connects.
    Server(Listener),
}

impl Meeting {
    /// One try: connecting takes no time when nobody is there; a listener without room for us, or our own, is
    /// waited at for `patience`.
    fn meet(&self, limits: &Limits, patience: Duration) -> Result<Connection, Error> {
        match self {
            Meeting::Client(path) => Connection::connect_before(path, limits, &Deadline::after(patience)),
            Meeting::Server(listener) => listen(listener, limits, patience),
        }
    }

    /// The same, but looks now and then whether that should end.
    fn meet_unless(&self, stop: &Stop, limits: &Limits) -> Result<Connection, Error> {
        let deadline = Deadline::after(limits.deadline());
        loop {
            let left = deadline.remaining().unwrap_or_default();
            match self.meet(limits, left.min(GLANCE)) {
                Err(error) if left > GLANCE && error.is_silence() && !stop.is_asked() => {}
                outcome => return outcome,
            }
        }
    }

    /// The first meeting, for `patience` at most.
    pub(crate) fn first(&self, limits: &Limits, patience: Option<Duration>) -> Result<Connection, Error> {
        match (self, patience) {
            (Meeting::Client(path), None) => Connection::connect(path, limits),
            (Meeting::Client(path), Some(patience)) => {
                Connection::connect_patiently(path, limits, &mut attempts(patience))
            }
            (Meeting::Server(listener), patience) => {
                listen(listener, limits, patience.map_or(limits.deadline(), forever_if_zero))
            }
        }
    }
}

fn listen(listener: &Listener, limits: &Limits, patience: Duration) -> Result<Connection, Error> {
    Connection::accept_before(listener, limits, &Deadline::after(patience))
}

/// `reconnect=0` has no end.
fn forever_if_zero(patience: Duration) -> Duration {
    if patience.is_zero() { FOREVER } else { patience }
}

fn attempts(patience: Duration) -> Attempts {
    Attempts::lasting((!patience.is_zero()).then_some(patience))
}

/// Longer than any machine lives, and far from where a clock overflows.
const FOREVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// How long a recovery waits for a connection before it looks whether it should end.
const GLANCE: Duration = Duration::from_millis(200);

/// What recovering one device takes; outlives boards.
pub(crate) struct Plan {
    /// Where the backend is found.
    pub(crate) meeting: Meeting,
    /// For how long a lost one is looked for; zero: for ever. Absent: it is not, and the device breaks.
    pub(crate) patience: Option<Duration>,
    /// Deadline and trace of the new connection.
    pub(crate) limits: Limits,
    /// What the new backend has to match.
    pub(crate) reconnect: Reconnect,
    /// The device's number.
    pub(crate) index: usize,
    /// Who serves the new connection's channel, and is told of a success.
    pub(crate) peers: Arc<Peers>,
}

impl Plan {
    /// Meets the backend once, for a broken device on whose behalf `trial` was begun.
    pub(crate) fn revive(&self, device: &DeviceHandle, trial: Trial, stop: &Stop) -> Option<OwnedFd> {
        let connection = self.meeting.meet_unless(stop, &self.limits);
        let exchange = connection.as_ref().ok().map(|connection| stop.ends(connection.as_fd()));
        let revived = self.reconnect.revive(device, trial, connection, |channel| self.serve(channel));
        drop(exchange);
        match revived {
            Ok(hang_up) => Some(hang_up),
            Err(error) => {
                log::debug!("a broken device stays as it is: {error}");
                None
            }
        }
    }

    fn serve(&self, channel: OwnChannel) {
        if let Err(error) = self.peers.add(self.index, channel) {
            log::error!("the backend's own requests are not answered: {error}");
        }
    }
}

/// Ends a search: its pauses, and an exchange with a backend that may never answer.
#[derive(Debug, Default)]
pub(crate) struct Stop {
    asked: Mutex<Asked>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Asked {
    asked: bool,
    /// The connection that is being tried.
    tried: Option<OwnedFd>,
}

/// While this lives, the end of the search is the end of the connection that is tried.
#[must_use]
struct Exchange<'s>(&'s Stop);

impl Drop for Exchange<'_> {
    fn drop(&mut self) {
        self.0.lock().tried = None;
    }
}

impl Stop {
    fn lock(&self) -> MutexGuard<'_, Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for `pause`, or less when the end is asked for; true when it is.
    fn wait(&self, pause: Duration) -> bool {
        let waited = self.changed.wait_timeout_while(self.lock(), pause, |state| !state.asked);
        waited.unwrap_or_else(PoisonError::into_inner).0.asked
    }

    fn is_asked(&self) -> bool {
        self.lock().asked
    }

    /// Has `connection` end with the search, until what this gives is dropped.
    fn ends(&self, connection: BorrowedFd<'_>) -> Exchange<'_> {
        let mut state = self.lock();
        match connection.try_clone_to_owned() {
            Ok(socket) if state.asked => hang_up(&socket),
            Ok(socket) => state.tried = Some(socket),
            // The deadlines of the exchange are all that ends it then.
            Err(error) => log::debug!("a search for a backend cannot be cut short: {error}"),
        }
        Exchange(self)
    }

    fn ask(&self) {
        let mut state = self.lock();
        state.asked = true;
        state.tried.take().iter().for_each(hang_up);
        drop(state);
        self.changed.notify_all();
    }
}

fn hang_up(socket: &OwnedFd) {
    if let Err(error) = shutdown(socket, Shutdown::Both) {
        log::debug!("the connection that was tried is gone already: {error}");
    }
}

/// A recovery under way; dropping it ends the thread, and whatever it was saying to a backend.
#[derive(Debug)]
pub(crate) struct Recovery {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

impl Recovery {
    /// Starts looking for the lost backend of `device`. A success is left with the peers, as news.
    pub(crate) fn start(device: DeviceHandle, plan: Arc<Plan>) -> std::io::Result<Self> {
        Self::spawn(plan, move |plan, stop| {
            let found = look(&device, plan, stop);
            let resumed = found.is_some();
            found.into_iter().for_each(|hang_up| plan.peers.recovered(plan.index, hang_up));
            if resumed {
                watch_over(&device, stop);
            }
        })
    }

    /// Starts looking for the backend of a broken `device`, once.
    pub(crate) fn revive(device: DeviceHandle, trial: Trial, plan: Arc<Plan>) -> std::io::Result<Self> {
        Self::spawn(plan, move |plan, stop| {
            let found = plan.revive(&device, trial, stop);
            found.into_iter().for_each(|hang_up| plan.peers.recovered(plan.index, hang_up));
        })
    }

    fn spawn(plan: Arc<Plan>, work: impl FnOnce(&Plan, &Stop) + Send + 'static) -> std::io::Result<Self> {
        let stop = Arc::new(Stop::default());
        let watched = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name(format!("recover-{}", plan.index));
        let thread = thread.stack_size(256 << 10).spawn(move || work(&plan, &watched))?;
        Ok(Recovery { stop, thread: Some(thread) })
    }
}

impl Recovery {
    /// Asks the thread to end, and does not wait for it.
    pub(crate) fn stop(&self) {
        self.stop.ask();
    }
}

impl Drop for Recovery {
    fn drop(&mut self) {
        self.stop();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            log::error!("a recovery thread panicked");
        }
    }
}

fn look(device: &DeviceHandle, plan: &Plan, stop: &Stop) -> Option<OwnedFd> {
    let patience = plan.patience.unwrap_or_default();
    let mut attempts = attempts(patience);
    loop {
        let reached =
            plan.meeting.meet(&plan.limits, GLANCE).map_err(|error| (error.is_absent(), error.to_string()));
        let failed = match reached {
            Ok(connection) => {
                let exchange = stop.ends(connection.as_fd());
                let tried = plan.reconnect.attempt(device, connection, |channel| plan.serve(channel));
                drop(exchange);
                match tried {
                    Ok(hang_up) => return Some(hang_up),
                    Err(error) if error.is_final() => {
                        log::warn!("no recovery: {error}");
                        return None;
                    }
                    Err(error) => error.to_string(),
                }
            }
            Err((_, error)) => error,
        };
        log::debug!("not recovered yet: {failed}");
        let Some(pause) = attempts.next_pause() else {
            device.give_up(&format!("no backend came back within {} s: {failed}", patience.as_secs()));
            return None;
        };
        if stop.wait(pause) {
            return None;
        }
    }
}

/// How long a backend that took over is watched, and how often it is looked at.
const PROBATION: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(20);

/// Watches a backend that took over until every ring has moved on as it should.
fn watch_over(device: &DeviceHandle, stop: &Stop) {
    let deadline = Deadline::after(PROBATION);
    while device.judge_successor() == Standing::Unproven && deadline.remaining().is_some() && !stop.wait(LOOK)
    {
    }
}
