//! The loss of a device's backend, and the request for another one. The search itself is in the chapter
//! `recovery`. Called with the device's lock held; never waits.

use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::chain;
use crate::virtio::backend::BackendError;
use crate::virtio::core::device::Device;
use crate::virtio::core::queues::space;
use crate::virtio::core::state::{Ask, Begin, Effort, OnLoss, Phase, Seeker, Vacancy, Waiting, Work};

/// The longest wait of a driver after a restart of the machine. A backend that answers takes far less.
const GRACE: Duration = Duration::from_millis(200);

impl Device {
    pub(crate) fn search_with(&mut self, limit: Duration, ask: Ask) {
        self.seeker = Some(Seeker { limit, ask });
    }

    /// The driver or the machine has reset the device. A broken device asks for another backend, unless a
    /// search is under way.
    pub(crate) fn seek(&mut self) {
        if let (Some(seeker), Phase::Vacant(vacancy)) = (&self.seeker, &mut self.phase)
            && vacancy.told
            && vacancy.work == Work::None
            && !self.retired
            && (seeker.ask)(Effort::Once)
        {
            vacancy.work = Work::Search;
        }
    }

    /// The machine has restarted: a broken device asks for a search. Its driver may wait a moment, even if
    /// the lost backend was silent, as another backend may have come meanwhile.
    pub(crate) fn seek_anew(&mut self) {
        let grace = GRACE.min(self.search_limit());
        if let Phase::Vacant(vacancy) = &mut self.phase {
            vacancy.patience = grace.max(vacancy.patience);
        }
        self.seek();
    }

    fn search_limit(&self) -> Duration {
        self.seeker.as_ref().map_or(Duration::ZERO, |seeker| seeker.limit)
    }

    /// How long a driver may wait for the next backend. Zero when the last backend was `silent`: a driver
    /// waits only once for a peer that does not answer.
    pub(crate) fn patience(&self, silent: bool) -> Duration {
        if silent { Duration::ZERO } else { self.search_limit() }
    }

    /// How long the driver's FEATURES_OK waits for the outcome of a search; `None` when no search is under
    /// way.
    pub(crate) fn awaits_search(&self) -> Option<Duration> {
        match &self.phase {
            Phase::Vacant(Vacancy { work: Work::Search, patience, .. }) => Some(*patience),
            _ => None,
        }
    }

    /// A driver has waited for a search as long as it may; later drivers do not wait for it.
    pub(crate) fn stop_waiting(&mut self) {
        if let Phase::Vacant(vacancy) = &mut self.phase {
            vacancy.patience = Duration::ZERO;
        }
    }

    /// Whether a backend is starting the queues, without the device's lock.
    pub(crate) fn is_starting(&self) -> bool {
        matches!(&self.phase, Phase::Vacant(Vacancy { work: Work::Start, .. }))
    }

    /// The peer failed in an exchange.
    pub(crate) fn lose_by(&mut self, error: &BackendError) {
        self.lose(chain(error.cause()), error.is_silence());
    }

    /// The backend is lost. The control loop and a vCPU may both report the same loss; the second report is
    /// ignored.
    pub(crate) fn lose(&mut self, why: String, silent: bool) {
        if !self.phase.has_backend() {
            return;
        }
        let queues = match std::mem::replace(&mut self.phase, Phase::Idle) {
            Phase::Running(guards) | Phase::Suspended(Waiting { guards, .. }) => {
                Some(Waiting { guards, begin: Begin::CutOff })
            }
            _ => None,
        };
        let recovers = self.on_loss == OnLoss::Recover && !self.retired;
        let cut_off = queues.is_some() && recovers;
        let patience = self.patience(silent);
        let vacancy = Vacancy { why: why.clone(), told: false, queues, work: Work::None, patience };
        self.phase = Phase::Vacant(vacancy);
        if !recovers {
            return self.break_down(why);
        }
        log::warn!("device {} waits for another backend: {why}", self.name);
        self.tell();
        self.backend.disconnect();
        if cut_off {
            self.cut_off();
        }
        if self.seeker.as_ref().is_some_and(|seeker| !(seeker.ask)(Effort::Long)) {
            self.break_down("no thread can be had to look for the backend".to_owned());
        }
    }

    /// No backend serves the queues any more: saves the contents of the rings, and interrupts the driver for
    /// all used buffers.
    pub(crate) fn cut_off(&mut self) {
        let Self { wiring, registers, memory, backend, .. } = self;
        wiring.cut(registers, space(registers, memory, backend.as_ref()));
        self.call_all();
    }

    /// The device breaks, and the driver is told.
    pub(crate) fn break_down(&mut self, why: String) {
        if self.phase.is_broken() {
            return;
        }
        match self.cut.load(Ordering::Acquire) {
            true => log::debug!("device {} ends with its machine: {why}", self.name),
            false => log::error!("device {} is broken: {why}", self.name),
        }
        let patience = match &self.phase {
            Phase::Vacant(vacancy) => vacancy.patience,
            _ => self.patience(false),
        };
        // This drops the queues' connections to the guest.
        self.phase = Phase::Vacant(Vacancy { why, told: true, queues: None, work: Work::None, patience });
        self.backend.disconnect();
        self.registers.mark_broken();
        self.interrupt_config();
        self.tell();
    }
}
