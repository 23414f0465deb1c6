//! The attendant: one thread for each device, for work that may wait for the backend and must not run on a
//! vCPU: the search for a lost backend, configuration changes, lookups of shared objects, and kicks of the
//! control queues that the VMM serves. The thread starts with the first job and ends with the device.

use std::collections::VecDeque;
use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use transport::peer::deadline::Deadline;
use transport::vhost_user::Refused;
use transport::vhost_user::message::Uuid;

use crate::virtio::core::handle::DeviceHandle;
use crate::virtio::core::state::Effort;
use crate::virtio::recovery::search::{Attempted, Quest, Search, Trial};
use crate::virtio::recovery::watch::Standing;

/// A job for an attendant. When a lookup is dropped without an answer, its sender has to refuse the request.
pub enum Job {
    /// Search for a backend.
    Search(Effort),
    /// A connection of the device is gone.
    HungUp,
    /// The backend has reported a change of its configuration.
    Reload,
    /// This queue was kicked, and the VMM serves its kicks or passes them on.
    Kick(u16),
    /// The backend of another device asks for the descriptor of an object that this device's backend shares.
    Lookup(Uuid, Box<dyn FnOnce(Result<OwnedFd, Refused>) + Send>),
}

impl Job {
    /// Whether `other` makes this job superfluous. A peer may repeat a message as often as it likes, and must
    /// not fill the mailbox that way.
    fn is_done_by(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::HungUp, Self::HungUp) | (Self::Reload, Self::Reload) => true,
            (Self::Kick(queue), Self::Kick(other)) => queue == other,
            _ => false,
        }
    }
}

#[derive(Default)]
struct Mailbox {
    jobs: VecDeque<Job>,
    ended: bool,
    thread: Option<JoinHandle<()>>,
}

/// The attendant of a device.
pub struct Attendant {
    name: String,
    device: DeviceHandle,
    search: Option<Search>,
    /// The attempt to reach a backend that is under way.
    trial: Trial,
    mailbox: Mutex<Mailbox>,
    changed: Condvar,
}

impl fmt::Debug for Attendant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attendant").field("name", &self.name).finish_non_exhaustive()
    }
}

enum Next {
    Job(Job),
    /// The deadline of the wait has passed.
    Due,
    End,
}

/// `WATCH`: for how long a backend that took over is watched. `LOOK`: the time between two looks.
const WATCH: Duration = Duration::from_secs(60);
const LOOK: Duration = Duration::from_millis(20);

impl Attendant {
    /// Makes the attendant of `device`. With `search`, the device asks this attendant to search for a lost
    /// backend.
    #[must_use]
    pub fn new(name: String, device: DeviceHandle, search: Option<Search>) -> Arc<Self> {
        let limit = search.as_ref().map(|search| search.limits.deadline());
        let (mailbox, changed) = (Mutex::default(), Condvar::new());
        let attendant = Arc::new(Self { name, device, search, trial: Trial::default(), mailbox, changed });
        if let Some(limit) = limit {
            let weak = Arc::downgrade(&attendant);
            let ask =
                move |effort| weak.upgrade().is_some_and(|attendant| attendant.post(Job::Search(effort)));
            attendant.device.search_with(limit, Box::new(ask));
        }
        attendant
    }

    fn lock(&self) -> MutexGuard<'_, Mailbox> {
        self.mailbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands over a job, which the attendant's thread does soon. Called on any thread, with or without the
    /// device's lock; never waits. Returns false, and drops the job, when the thread cannot be started or the
    /// device has ended.
    pub fn post(self: &Arc<Self>, job: Job) -> bool {
        let mut mailbox = self.lock();
        if mailbox.ended {
            return false;
        }
        if mailbox.thread.is_none() {
            let this = Arc::clone(self);
            let thread = std::thread::Builder::new().name(format!("attend {}", self.name));
            match thread.stack_size(256 << 10).spawn(move || this.run()) {
                Ok(thread) => mailbox.thread = Some(thread),
                Err(error) => {
                    log::error!("device {}: no thread is to be had: {error}", self.name);
                    return false;
                }
            }
        }
        if !mailbox.jobs.iter().any(|waiting| job.is_done_by(waiting)) {
            mailbox.jobs.push_back(job);
        }
        drop(mailbox);
        self.changed.notify_all();
        true
    }

    /// Ends the attempt to reach a backend that is under way. Does not wait.
    pub fn interrupt(&self) {
        self.trial.interrupt();
    }

    /// Tells the thread to end after the present job. Does not wait.
    pub fn stop(&self) {
        let mut mailbox = self.lock();
        mailbox.ended = true;
        self.trial.end();
        let jobs = std::mem::take(&mut mailbox.jobs);
        drop(mailbox);
        drop(jobs);
        self.changed.notify_all();
    }

    /// Ends the thread. Waits for the present job: at most one deadline of the backend.
    pub fn end(&self) {
        self.stop();
        let thread = self.lock().thread.take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            log::error!("the attendant of device {} panicked", self.name);
        }
    }

    /// Waits for a job, until `due` at most.
    fn next(&self, due: Option<Instant>) -> Next {
        let mut mailbox = self.lock();
        loop {
            if mailbox.ended {
                return Next::End;
            }
            if let Some(job) = mailbox.jobs.pop_front() {
                return Next::Job(job);
            }
            mailbox = match due.map(|due| due.saturating_duration_since(Instant::now())) {
                None => self.changed.wait(mailbox).unwrap_or_else(PoisonError::into_inner),
                Some(Duration::ZERO) => return Next::Due,
                Some(left) => {
                    self.changed.wait_timeout(mailbox, left).unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
    }

    fn run(&self) {
        let mut quest: Option<Quest> = None;
        // Set while a backend that took over is watched: the end of the watch, and the time of the next look.
        let mut watch: Option<(Deadline, Instant)> = None;
        loop {
            let due = [quest.as_ref().map(|quest| quest.due), watch.as_ref().map(|(_, due)| *due)];
            match self.next(due.into_iter().flatten().min()) {
                Next::End => return,
                Next::Job(Job::Search(effort)) => {
                    if effort == Effort::Long {
                        log::warn!("device {} lost its backend and looks for it", self.name);
                    }
                    quest = self.search.as_ref().map(|search| search.begin(effort));
                    watch = None;
                    continue;
                }
                Next::Job(Job::HungUp) => self.device.connection_ended(),
                Next::Job(Job::Reload) => self.device.config_changed(),
                Next::Job(Job::Kick(queue)) => self.device.serve_kick(queue),
                Next::Job(Job::Lookup(uuid, answer)) => {
                    answer(self.device.with(|device| device.shared_object(uuid)));
                }
                Next::Due => {}
            }
            let now = Instant::now();
            if let (Some(search), Some(waiting)) =
                (&self.search, quest.as_mut().filter(|quest| quest.due <= now))
            {
                match search.attempt(waiting, &self.device, &self.trial) {
                    Attempted::Again => {}
                    Attempted::GivenUp => quest = None,
                    Attempted::Found => {
                        log::warn!("device {} has its backend again", self.name);
                        quest = None;
                        watch = Some((Deadline::after(WATCH), Instant::now()));
                    }
                }
            }
            if let Some((deadline, _)) = watch.take_if(|(_, due)| *due <= now) {
                let unproven = self.device.judge_successor() == Standing::Unproven;
                let again = unproven && deadline.remaining().is_some();
                watch = again.then(|| Instant::now().checked_add(LOOK)).flatten().map(|due| (deadline, due));
            }
        }
    }
}
