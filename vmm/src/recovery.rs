//! Finding a lost backend again: one thread a device, for as long as it recovers.
//!
//! The thread connects, asks and starts the rings without the device's lock, so neither a vCPU nor the control
//! loop waits for a backend that is away. It ends with a success, with a backend that does not fit, when the
//! user's time is over, or when the board is taken apart.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use devices::virtio::answers::OwnChannel;
use devices::virtio::probation::Standing;
use devices::virtio::revival::Trial;
use devices::virtio::{DeviceHandle, Reconnect};
use transport::deadline::Deadline;
use transport::socket::Listener;
use transport::vhost_user::reconnect::Attempts;
use transport::vhost_user::{Connection, Error, Limits};

use crate::peers::Peers;

/// Where a backend is found, again and again.
#[derive(Debug)]
pub(crate) enum Meeting {
    /// It listens, we connect.
    Client(PathBuf),
    /// We listen, it connects.
    Server(Listener),
}

impl Meeting {
    /// One try: connecting takes no time when nobody is there, listening waits for `patience`.
    fn meet(&self, limits: &Limits, patience: Duration) -> Result<Connection, Error> {
        match self {
            Meeting::Client(path) => Connection::connect(path, limits),
            Meeting::Server(listener) => listen(listener, limits, patience),
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

/// How long a listening recovery waits before it looks whether it should end.
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
    pub(crate) fn revive(&self, device: &DeviceHandle, trial: Trial) -> Option<OwnedFd> {
        let connection = self.meeting.meet(&self.limits, self.limits.deadline());
        match self.reconnect.revive(device, trial, connection, |channel| self.serve(channel)) {
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

#[derive(Debug, Default)]
struct Stop {
    asked: Mutex<bool>,
    changed: Condvar,
}

impl Stop {
    /// Waits for `pause`, or less when the end is asked for; true when it is.
    fn wait(&self, pause: Duration) -> bool {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(asked, pause, |asked| !*asked);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    fn ask(&self) {
        *self.asked.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }
}

/// A recovery under way; dropping it ends the thread, after at most one exchange with a backend.
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
        Self::spawn(plan, move |plan, _| {
            let found = plan.revive(&device, trial);
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
                match plan.reconnect.attempt(device, connection, |channel| plan.serve(channel)) {
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
