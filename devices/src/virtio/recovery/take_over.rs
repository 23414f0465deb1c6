//! A backend takes the place of one that was lost, while the guest runs. It is started without the
//! device's lock, so that neither vCPUs nor the control loop wait for a backend that may be no better
//! than the last. Must never leave two backends, or a reset driver and a backend, on the same rings.
//!
//! ```text
//!   helper thread                         device lock    vCPU
//!   negotiate, read the configuration
//!   begin: does it fit? which rings?      held
//!   start the rings                                      a reset here waits for the start to end (one
//!   finish: it is the backend now         held           deadline at most), and stops what it started
//! ```

use std::error::Error;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::sleep;
use std::time::Duration;

use transport::memory::MemoryMap;
use transport::peer::deadline::Deadline;
use transport::vhost_user::features::DriverFeatures;
use transport::vhost_user::vring::Ring;

use crate::lock;
use crate::virtio::backend::{Backend, BackendError, Begin, Start};
use crate::virtio::core::device::{Device, chain};
use crate::virtio::core::handle::DeviceHandle;
use crate::virtio::core::queues::{OwnedRing, RingsError};
use crate::virtio::core::start::space;
use crate::virtio::core::state::{Absence, Phase};
use crate::virtio::ring::resume::{Notes, ResumeError};
use crate::virtio::types::table::{ConfigSource, Model};

/// A backend that was asked what it is.
pub struct Candidate {
    /// The device that could be made of it.
    pub model: Model,
    /// Nothing has started it yet.
    pub backend: Box<dyn Backend>,
}

/// How a backend differs from the one whose place it is to take.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// The driver uses what it does not have.
    #[error("it lacks the features {0:#x}, which the driver uses")]
    Features(u64),
    /// The driver knows of more queues.
    #[error("it serves {has} queues, the device has {needs}")]
    Queues {
        /// What it serves.
        has: u16,
        /// What the device has.
        needs: u16,
    },
    /// Whoever passes kicks on has been told.
    #[error("it takes notifications in another way, by messages or by eventfds")]
    Notifications,
    /// The driver knows of other ones.
    #[error("its shared memory regions are not those that there were")]
    SharedMemory,
    /// The driver knows of more configuration.
    #[error("it has {has} bytes of configuration, there were {needs}")]
    Config {
        /// What it has.
        has: usize,
        /// What the lost one had.
        needs: usize,
    },
}

/// Why a backend did not take over.
#[derive(Debug, thiserror::Error)]
pub enum TakeOverError {
    /// It is another kind of backend; the device is broken now.
    #[error(transparent)]
    Unfit(#[from] Misfit),
    /// It cannot be told of these rings or of this memory; the device is broken now.
    #[error("the backend cannot serve what the driver set up")]
    Refused(#[source] Box<dyn Error + Send + Sync>),
    /// It failed while it started; another one may do better.
    #[error("the backend did not start")]
    Failed(#[source] Box<dyn Error + Send + Sync>),
    /// The device waits for none, or for another one that is being started.
    #[error("the device waits for no backend")]
    NotWanted,
}

/// A start that is under way without the device's lock. Locked only for a moment, after the device's
/// lock or without it.
pub(crate) struct Starting {
    outcome: Mutex<Progress>,
    done: Condvar,
}

enum Progress {
    Busy,
    Done(Box<Result<Candidate, BackendError>>),
    Claimed,
}

impl Starting {
    pub(crate) fn new() -> Arc<Self> {
        Arc::new(Self { outcome: Mutex::new(Progress::Busy), done: Condvar::new() })
    }

    pub(crate) fn complete(&self, result: Result<Candidate, BackendError>) {
        let mut progress = lock(&self.outcome);
        // The first outcome counts.
        if progress.is_busy() {
            *progress = Progress::Done(Box::new(result));
            self.done.notify_all();
        }
    }

    /// Whether there is no outcome yet.
    pub(crate) fn is_busy(&self) -> bool {
        matches!(*lock(&self.outcome), Progress::Busy)
    }

    /// The outcome, unless somebody else has it; waits until there is one.
    pub(crate) fn claim(&self) -> Option<Result<Candidate, BackendError>> {
        let waited = self.done.wait_while(lock(&self.outcome), Progress::is_busy);
        waited.unwrap_or_else(PoisonError::into_inner).take()
    }

    /// The same, but waits for `limit` at most; `None` as well when there is no outcome then.
    pub(crate) fn claim_within(&self, limit: Duration) -> Option<Result<Candidate, BackendError>> {
        let waited = self.done.wait_timeout_while(lock(&self.outcome), limit, Progress::is_busy);
        waited.unwrap_or_else(PoisonError::into_inner).0.take()
    }
}

impl Progress {
    fn is_busy(&mut self) -> bool {
        matches!(self, Self::Busy)
    }

    /// The outcome, once.
    fn take(&mut self) -> Option<Result<Candidate, BackendError>> {
        match std::mem::replace(self, Self::Claimed) {
            Self::Done(result) => Some(*result),
            Self::Claimed => None,
            Self::Busy => {
                *self = Self::Busy;
                None
            }
        }
    }
}

/// Completes a start even if its thread panics, as others may wait for it.
struct Completion(Option<Arc<Starting>>);

impl Completion {
    fn with(mut self, result: Result<Candidate, BackendError>) {
        if let Some(starting) = self.0.take() {
            starting.complete(result);
        }
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        if let Some(starting) = self.0.take() {
            starting.complete(Err(BackendError::gone()));
        }
    }
}

/// What there is to start, with nothing borrowed from the device.
struct Job {
    candidate: Candidate,
    starting: Arc<Starting>,
    features: DriverFeatures,
    memory: MemoryMap,
    rings: Vec<OwnedRing>,
    begin: Begin,
}

impl Job {
    fn run(self) -> Arc<Starting> {
        let Self { mut candidate, starting, features, memory, rings, begin } = self;
        let completion = Completion(Some(Arc::clone(&starting)));
        let rings: Vec<Ring<'_>> = rings.iter().map(OwnedRing::as_ring).collect();
        let start = Start { features, memory: &memory, rings: &rings, begin };
        let result = candidate.backend.start(&start).map(|()| candidate);
        completion.with(result);
        starting
    }
}

/// What comes of a candidate that fits.
enum Begun {
    /// It serves the device; there is nothing to start.
    Installed,
    /// It is to be started.
    Starts(Job),
    /// The rings do not tell yet what was in flight.
    InDoubt(Candidate),
}

/// For how long a driver is waited for whose rings leave a doubt, and how often they are looked at. Its interrupt has told it
/// of all that was used when the backend was lost. What it makes available after that is in flight for certain, and when all its
/// requests are, no doubt is left: most drivers need no more than to be scheduled once.
const DOUBT: Duration = Duration::from_secs(3);
const LOOK: Duration = Duration::from_millis(2);

impl DeviceHandle {
    /// Makes `candidate` the backend of a device that waits for one, and starts the queues there if the
    /// driver is ready. Called on a thread that may wait: up to the peer's deadline, and some seconds when
    /// only the driver can tell what was in flight. The device's lock is not held meanwhile.
    ///
    /// # Errors
    /// When the device waits for none, or the candidate does not fit (the device is broken then), or
    /// fails (the device goes on waiting).
    pub fn take_over(&self, candidate: Candidate) -> Result<(), TakeOverError> {
        self.take_over_within(DOUBT, candidate)
    }

    fn take_over_within(&self, doubt: Duration, mut candidate: Candidate) -> Result<(), TakeOverError> {
        let deadline = Deadline::after(doubt);
        let mut waited = false;
        let job = loop {
            match self.with(|device| device.begin_take_over(candidate, deadline.remaining()))? {
                Begun::Installed => return Ok(()),
                Begun::Starts(job) => break job,
                Begun::InDoubt(again) if again.backend.has_hung_up() => {
                    return Err(TakeOverError::Failed("it hung up before it was started".into()));
                }
                Begun::InDoubt(again) => candidate = again,
            }
            if !std::mem::replace(&mut waited, true) {
                self.with(|device| {
                    log::debug!("device {}: only its driver can end the doubt about its rings", device.name);
                });
            }
            sleep(LOOK);
        };
        let starting = job.run();
        self.with(|device| device.finish_take_over(&starting))
    }
}

impl Device {
    /// Rings that leave a doubt need a reset when there is no more `patience` with their driver.
    fn begin_take_over(
        &mut self,
        candidate: Candidate,
        patience: Option<Duration>,
    ) -> Result<Begun, TakeOverError> {
        match &self.phase {
            Phase::Recovering(Absence { starting: None, .. }) if !self.retired => {}
            _ => return Err(TakeOverError::NotWanted),
        }
        if let Err(misfit) = self.fits(&candidate.model) {
            self.break_down(format!("another backend came that does not fit: {misfit}"));
            return Err(misfit.into());
        }
        let Phase::Recovering(absence) = &mut self.phase else { return Err(TakeOverError::NotWanted) };
        let Some((begin, features)) = absence.queues.as_ref().map(|q| q.begin).zip(self.registers.accepted())
        else {
            self.install(candidate);
            return Ok(Begun::Installed);
        };
        let notes = if candidate.backend.has_notes() { Notes::Backend } else { Notes::Rings };
        let space = space(&self.registers, &self.memory, candidate.backend.as_ref());
        match self.wiring.rings(&self.registers, begin, space, notes) {
            Ok(rings) => {
                let starting = Starting::new();
                absence.starting = Some(Arc::clone(&starting));
                let memory = self.memory.clone();
                Ok(Begun::Starts(Job { candidate, starting, features, memory, rings, begin }))
            }
            Err(RingsError::Fd(error)) => Err(TakeOverError::Failed(error.into())),
            Err(RingsError::Resume(ResumeError::Doubt { .. })) if patience.is_some() => {
                Ok(Begun::InDoubt(candidate))
            }
            Err(RingsError::Resume(error)) => {
                // The backend is fine, only these rings are beyond help.
                absence.queues = None;
                self.install(candidate);
                self.need_reset(chain(&error));
                Ok(Begun::Installed)
            }
        }
    }

    fn finish_take_over(&mut self, starting: &Arc<Starting>) -> Result<(), TakeOverError> {
        let ours = match &self.phase {
            Phase::Recovering(absence) => absence.starting.as_ref().is_some_and(|s| Arc::ptr_eq(s, starting)),
            _ => false,
        };
        match starting.claim() {
            // A reset came between, and took what was started.
            None if self.phase.has_backend() => Ok(()),
            // A reset came between, and what it took had failed: the device waits on.
            None if matches!(self.phase, Phase::Recovering(_)) && !self.retired => {
                Err(TakeOverError::Failed("the driver reset the device while it started".into()))
            }
            None => Err(TakeOverError::NotWanted),
            Some(Ok(candidate)) if ours => {
                self.install(candidate);
                Ok(())
            }
            Some(Ok(_)) => Err(TakeOverError::NotWanted),
            Some(Err(BackendError::Refused(cause))) => {
                if ours {
                    self.break_down(format!(
                        "another backend came that does not fit: {}",
                        chain(cause.as_ref())
                    ));
                }
                Err(TakeOverError::Refused(cause))
            }
            Some(Err(BackendError::Lost(cause))) => {
                if let (true, Phase::Recovering(absence)) = (ours, &mut self.phase) {
                    absence.starting = None;
                    // It may have done something before it failed.
                    absence.queues.iter_mut().for_each(|queues| queues.begin = Begin::Resumed);
                    self.cut_off();
                }
                Err(TakeOverError::Failed(cause))
            }
        }
    }

    /// Whether a driver of the present device can go on with another one.
    pub(crate) fn fits(&self, model: &Model) -> Result<(), Misfit> {
        let used = self.registers.accepted().map_or(0, |features| features.bits());
        let missing = used & !model.features.bits();
        let needs = u16::try_from(self.registers.queues().len()).unwrap_or(u16::MAX);
        let config = |source| if source == ConfigSource::Backend { self.registers.config().len() } else { 0 };
        if missing != 0 {
            return Err(Misfit::Features(missing));
        }
        if model.queues < needs {
            return Err(Misfit::Queues { has: model.queues, needs });
        }
        if config(model.config_source) < config(self.config_source) {
            return Err(Misfit::Config { has: 0, needs: config(self.config_source) });
        }
        Ok(())
    }

    /// The wait is over: `candidate` is the backend, and runs the queues if there are any.
    pub(crate) fn install(&mut self, candidate: Candidate) {
        let Phase::Recovering(absence) = std::mem::replace(&mut self.phase, Phase::Idle) else { return };
        let Candidate { model, backend } = candidate;
        self.backend = backend;
        self.recoveries += 1;
        log::info!("device {} has a backend again", self.name);
        self.registers.offer_next(model.features);
        if let Some(queues) = absence.queues {
            self.phase = Phase::Running(queues.guards);
            self.activations += u64::from(queues.begin == Begin::Fresh);
            self.begin_control();
            if queues.begin == Begin::Resumed {
                self.announce();
            }
            // The lost one may have died between using a buffer and saying so.
            self.call_all();
        } else if self.registers.needs_reset() {
            self.phase = Phase::NeedsReset(absence.why);
        }
        if model.config_source == ConfigSource::Backend && self.show_config(model.config) {
            self.interrupt_config();
        }
        self.forget_sessions();
        self.face.show_registers(&self.registers);
    }

    /// The driver resets, or the machine does, while there is no backend: nothing is waited for but a
    /// start that is under way, as that backend must not have the rings any longer.
    pub(crate) fn quiesce_absent(&mut self, mut absence: Absence) {
        let starting = absence.starting.take();
        // The kicks and interrupts end here.
        self.resets += u64::from(absence.queues.take().is_some());
        self.phase = Phase::Recovering(absence);
        let Some(Ok(mut candidate)) = starting.and_then(|starting| starting.claim()) else {
            return self.drain();
        };
        match candidate.backend.stop() {
            Ok(()) => self.install(candidate),
            Err(error) => log::warn!("device {}: {}", self.name, chain(error.cause())),
        }
        self.drain();
    }
}

#[cfg(test)]
#[path = "take_over_tests.rs"]
mod tests;
