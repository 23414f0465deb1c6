//! A backend takes the place of a lost one while the guest runs. Its queues start without the device's lock.
//! So neither vCPUs nor the control loop wait for a backend that may be no better than the last one. Must
//! never leave two backends, or a reset driver and a backend, on the same rings.
//!
//! ```text
//!   attendant                             device lock    vCPU
//!   connect, negotiate, read the configuration           FEATURES_OK of a broken device waits for the search
//!   begin: does it fit? which rings?      held
//!   start the rings                                      a reset waits for the start: one deadline at most
//!   finish: it is the backend now         held
//! ```

use std::error::Error;
use std::sync::Arc;
use std::thread::sleep;
use std::time::Duration;

use transport::memory::MemoryMap;
use transport::peer::deadline::Deadline;
use transport::vhost_user::InflightArea;
use transport::vhost_user::features::DriverFeatures;
use transport::vhost_user::vring::Ring;

use crate::chain;
use crate::virtio::backend::{Backend, BackendError, Start};
use crate::virtio::core::device::Device;
use crate::virtio::core::handle::DeviceHandle;
use crate::virtio::core::queues::space;
use crate::virtio::core::queues::{OwnedRing, RingsError};
use crate::virtio::core::state::{Begin, Phase, Vacancy, Work};
use crate::virtio::ring::split::{Notes, ResumeError};
use crate::virtio::types::model::{ConfigSource, Model};

/// A surveyed backend that may fill a vacancy.
pub struct Candidate {
    /// The device that can be made of the backend.
    pub model: Model,
    /// The backend, not started yet.
    pub backend: Box<dyn Backend>,
}

/// How a backend differs from the one that it is to replace.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// The driver uses features that the backend does not have.
    #[error("it lacks the features {0:#x}, which the driver uses")]
    Features(u64),
    /// The device has more queues than the backend serves.
    #[error("it serves {has} queues, the device has {needs}")]
    Queues {
        /// The number of queues that the backend serves.
        has: u16,
        /// The number of queues of the device.
        needs: u16,
    },
    /// One backend uses in-band notifications and the other does not. The thread that passes kicks on cannot
    /// switch.
    #[error("it takes notifications in another way, by messages or by eventfds")]
    Notifications,
    /// The shared memory regions differ from those that the driver knows.
    #[error("its shared memory regions are not those that there were")]
    SharedMemory,
    /// The configuration is smaller than the one that the driver knows.
    #[error("it has {has} bytes of configuration, there were {needs}")]
    Config {
        /// The size of the backend's configuration.
        has: usize,
        /// The size of the lost backend's configuration.
        needs: usize,
    },
}

/// Why a backend does not serve a device that waits for one.
#[derive(Debug, thiserror::Error)]
pub enum FillError {
    /// The backend does not match the lost one; the device is broken now.
    #[error(transparent)]
    Unfit(#[from] Misfit),
    /// The backend cannot be told of these rings or of this memory; the device is broken now.
    #[error("the backend cannot serve what the driver set up")]
    Refused(#[source] Box<dyn Error + Send + Sync>),
    /// The backend failed while it started; another one may succeed.
    #[error("the backend did not start")]
    Failed(#[source] Box<dyn Error + Send + Sync>),
    /// The device waits for no backend, or another backend is being started.
    #[error("the device waits for no backend")]
    NotWanted,
}

/// A start, with nothing borrowed from the device.
struct Job {
    candidate: Candidate,
    features: DriverFeatures,
    memory: MemoryMap,
    rings: Vec<OwnedRing>,
    inflight: Option<Arc<InflightArea>>,
}

/// A candidate that runs the queues, and its inflight area.
type Started = (Candidate, Option<Arc<InflightArea>>);

impl Job {
    fn run(self) -> Result<Started, BackendError> {
        let Self { mut candidate, features, memory, rings, inflight } = self;
        let rings: Vec<Ring<'_>> = rings.iter().map(OwnedRing::as_ring).collect();
        let area = candidate.backend.start(&Start { features, memory: &memory, rings: &rings, inflight })?;
        Ok((candidate, area))
    }
}

/// What happens to a candidate that fits.
enum Begun {
    /// It serves the device, without queues to start.
    Installed,
    /// Its queues have to be started.
    Starts(Job),
    /// The rings do not show yet which requests were in flight.
    InDoubt(Candidate),
}

/// `DOUBT`: how long we wait for a driver whose rings leave a doubt. `LOOK`: the time between two looks at
/// the rings.
///
/// The driver was interrupted when the backend was lost, and so knows of all used buffers. Requests that the
/// driver makes available after the loss are certainly in flight. Once all its requests are of that kind, no
/// doubt is left. Most drivers need no more than to be scheduled once.
const DOUBT: Duration = Duration::from_secs(3);
const LOOK: Duration = Duration::from_millis(2);

/// Ends the work on a vacancy when dropped, even if the thread panics, as other threads wait for the end.
#[must_use]
pub(crate) struct UnderWay<'d>(pub(crate) &'d DeviceHandle);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.with(Device::end_work);
        }
        self.0.wake();
    }
}

impl DeviceHandle {
    /// Makes `candidate` the backend of a device that waits for one. Starts the queues if the driver is
    /// ready. Called on a thread that may wait: up to the peer's deadline, and some seconds more when only
    /// the driver can settle which requests were in flight. The device's lock is not held during these waits.
    ///
    /// # Errors
    /// When the device waits for no backend; when the candidate does not fit (a recovering device is broken
    /// then); when the candidate fails (the device goes on waiting).
    pub fn fill(&self, candidate: Candidate) -> Result<(), FillError> {
        self.fill_within(DOUBT, candidate)
    }

    fn fill_within(&self, doubt: Duration, mut candidate: Candidate) -> Result<(), FillError> {
        let deadline = Deadline::after(doubt);
        let mut waited = false;
        let job = loop {
            match self.with(|device| device.begin_fill(candidate, deadline.remaining()))? {
                Begun::Installed => {
                    self.wake();
                    return Ok(());
                }
                Begun::Starts(job) => break job,
                Begun::InDoubt(again) if again.backend.has_hung_up() => {
                    return Err(FillError::Failed("it hung up before it was started".into()));
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
        let _start = UnderWay(self);
        let started = job.run();
        self.with(|device| device.finish_fill(started))
    }

    /// A search for the backend of a broken device has failed. `silent` is whether the peer failed to answer;
    /// `None` when the search did not show this.
    pub(crate) fn search_failed(&self, error: &(dyn Error + 'static), silent: Option<bool>) {
        self.with(|device| device.search_failed(error, silent));
        self.wake();
    }
}

impl Device {
    /// Begins to install `candidate`. When the rings leave a doubt and `patience` is `None`, the driver has
    /// to reset the device.
    fn begin_fill(&mut self, candidate: Candidate, patience: Option<Duration>) -> Result<Begun, FillError> {
        match &self.phase {
            _ if self.retired => return Err(FillError::NotWanted),
            Phase::Vacant(Vacancy { told: false, work: Work::None, .. }) => {}
            // A broken device takes a backend only when it has asked for one.
            Phase::Vacant(Vacancy { told: true, work: Work::Search, .. }) => {}
            _ => return Err(FillError::NotWanted),
        }
        if let Err(misfit) = self.fits(&candidate.model) {
            // A device that is broken already stays as it is.
            self.break_down(format!("another backend came that does not fit: {misfit}"));
            return Err(misfit.into());
        }
        let Phase::Vacant(vacancy) = &mut self.phase else { return Err(FillError::NotWanted) };
        let begin = vacancy.queues.as_ref().map(|queues| queues.begin.clone());
        let Some((begin, features)) = begin.zip(self.registers.accepted()) else {
            self.install(candidate);
            return Ok(Begun::Installed);
        };
        if begin == Begin::Fresh {
            self.inflight = None;
        }
        // An inflight area that the backend has truncated is useless; then the rings have to show what was in
        // flight.
        let whole = self.inflight.as_ref().is_some_and(|area| area.is_whole());
        let notes = if whole && candidate.backend.takes_inflight() { Notes::Backend } else { Notes::Rings };
        let space = space(&self.registers, &self.memory, candidate.backend.as_ref());
        match self.wiring.rings(&self.registers, &begin, space, notes) {
            Ok(rings) => {
                vacancy.work = Work::Start;
                let (memory, inflight) = (self.memory.clone(), self.inflight.clone());
                Ok(Begun::Starts(Job { candidate, features, memory, rings, inflight }))
            }
            Err(RingsError::Fd(error)) => Err(FillError::Failed(error.into())),
            Err(RingsError::Resume(ResumeError::Doubt { .. })) if patience.is_some() => {
                Ok(Begun::InDoubt(candidate))
            }
            Err(RingsError::Resume(error)) => {
                // The backend is usable, but these rings cannot be resumed.
                vacancy.queues = None;
                self.install(candidate);
                self.need_reset(chain(&error));
                Ok(Begun::Installed)
            }
        }
    }

    fn finish_fill(&mut self, started: Result<Started, BackendError>) -> Result<(), FillError> {
        if !self.is_starting() || self.retired {
            return Err(FillError::NotWanted);
        }
        match started {
            Ok((candidate, area)) => {
                self.inflight = area;
                self.install(candidate);
                Ok(())
            }
            Err(BackendError::Refused(cause)) => {
                self.break_down(format!("another backend came that does not fit: {}", chain(cause.as_ref())));
                Err(FillError::Refused(cause))
            }
            Err(BackendError::Lost(cause)) => {
                self.end_work();
                Err(FillError::Failed(cause))
            }
        }
    }

    /// A search or a start is over without a new backend. A failed start may have served requests before it
    /// failed.
    fn end_work(&mut self) {
        let Phase::Vacant(vacancy) = &mut self.phase else { return };
        if std::mem::replace(&mut vacancy.work, Work::None) == Work::Start {
            vacancy.queues.iter_mut().for_each(|queues| queues.begin = Begin::CutOff);
            self.cut_off();
        }
    }

    fn search_failed(&mut self, error: &(dyn Error + 'static), silent: Option<bool>) {
        let patience = silent.map(|silent| self.patience(silent));
        if let Phase::Vacant(vacancy) = &mut self.phase
            && vacancy.told
        {
            vacancy.patience = patience.unwrap_or(vacancy.patience);
            vacancy.work = Work::None;
            log::warn!("device {} stays broken: {}", self.name, chain(error));
        }
    }

    /// Whether the present driver can go on with a device like `model`.
    fn fits(&self, model: &Model) -> Result<(), Misfit> {
        let used = self.registers.accepted().map_or(0, |features| features.bits());
        let missing = used & !model.features.bits();
        let needs = self.registers.queue_count();
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

    /// Makes `candidate` the backend. It runs the queues already, if there are any.
    fn install(&mut self, candidate: Candidate) {
        let Phase::Vacant(vacancy) = std::mem::replace(&mut self.phase, Phase::Idle) else { return };
        let Candidate { model, backend } = candidate;
        self.backend = backend;
        self.recoveries += 1;
        log::info!("device {} has a backend again", self.name);
        self.registers.mend();
        self.registers.offer_next(model.features);
        if let Some(queues) = vacancy.queues {
            self.phase = Phase::Running(queues.guards);
            self.activations += u64::from(queues.begin == Begin::Fresh);
            self.begin_service();
            if queues.begin == Begin::CutOff {
                self.announce();
            }
            // The lost backend may have used a buffer without calling the guest.
            self.call_all();
        } else if self.registers.needs_reset() {
            self.phase = Phase::NeedsReset(vacancy.why);
        }
        if model.config_source == ConfigSource::Backend && self.show_config(model.config) {
            self.interrupt_config();
        }
        self.service_replaced();
        self.show_registers();
        self.tell();
    }
}

#[cfg(test)]
#[path = "broken_tests.rs"]
mod broken;
#[cfg(test)]
#[path = "vacancy_tests.rs"]
mod tests;
