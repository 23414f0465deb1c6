//! The phases of a device, with a drawing at `Phase`. Data only: must never act on a device.

use std::time::Duration;

use transport::vhost_user::vring::RingBase;

use crate::ports::Guard;
use crate::virtio::core::report::PhaseReport;

/// What becomes of a device whose backend is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnLoss {
    /// The device breaks at once, and the driver is told.
    #[default]
    Break,
    /// The device waits for another backend, and the driver is told nothing.
    Recover,
}

/// The phase of a device.
///
/// ```text
///                 DRIVER_OK, backend started                backend lost
///        Idle ─────────────────────────────▶ Running ──────────────────────┐
///        │ ▲ ▲ ◀───────────────────────────── │  ▲                         ▼
///        │ │ │       reset, backend stopped   │  └────────────────────── Vacant: recovering, or broken
///        │ │ └── reset ── NeedsReset          │    another backend goes on   │
///        │ └────────────────▲                 │    where the lost one was    │
///        │   DRIVER_OK with rings that        │    cut off                   │
///        │   cannot be: the driver's mistake  │                              │
///        └──────────────────────────────────────────────────────────────────┘
/// ```
/// What lasts beyond a reset: the loss of the backend, and failures of the machine. The driver's own mistakes
/// do not last.
///
/// `NEEDS_RESET` (§2.1.2) is shown to the driver that was at work at the time of its mistake or of the loss.
/// The bit goes with the driver's reset: a reset device reads 0, as drivers wait for that. A broken device
/// refuses `FEATURES_OK` to the next driver (§3.1.1, step 6), the earliest point at which a driver accepts a
/// refusal and gives up.
///
/// A driver sees no difference between a recovering and a running device: the driver may reset and start it
/// at any time. Requests to the backend are made once there is a backend again.
pub(crate) enum Phase {
    Idle,
    /// The backend serves the queues. The guards hold the queues' connections to the guest.
    Running(Vec<Guard>),
    /// The machine is paused and the queues are stopped. They go on later where they stopped.
    Suspended(Waiting),
    /// The driver asked for something impossible. The backend is not affected.
    NeedsReset(String),
    /// There is no backend.
    Vacant(Vacancy),
}

/// A device without a backend. The lost backend of a *recovering* device is searched for as long as the user
/// allows. The backend of a *broken* device is searched for once at each reset.
pub(crate) struct Vacancy {
    /// How the last backend was lost.
    pub(crate) why: String,
    /// Whether the driver was told of the loss: the device is broken then. Otherwise it is recovering.
    pub(crate) told: bool,
    /// The queues that the next backend has to start.
    pub(crate) queues: Option<Waiting>,
    /// The work under way for which other threads may wait.
    pub(crate) work: Work,
    /// How long a driver may wait for the outcome of a search.
    pub(crate) patience: Duration,
}

/// The work on a vacancy that is done without the device's lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// No work that other threads wait for.
    None,
    /// One search for a broken device's backend: the driver's FEATURES_OK waits for the outcome.
    Search,
    /// A backend is starting the queues: a reset waits until the start ends.
    Start,
}

/// How long a search lasts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effort {
    /// For a recovering device: as long as the user allows.
    Long,
    /// For a broken device: one attempt.
    Once,
}

/// Asks another thread, which may wait, to begin a search soon. Returns false when there is no such thread.
/// Called with the device's lock held; must not wait.
pub type Ask = Box<dyn Fn(Effort) -> bool + Send>;

/// The way in which a device asks for a search for its backend.
pub(crate) struct Seeker {
    /// How long a driver's FEATURES_OK may wait for the outcome of a search.
    pub(crate) limit: Duration,
    pub(crate) ask: Ask,
}

/// Queues that a driver has started while no backend serves them. The guest's kicks gather in their eventfds.
pub(crate) struct Waiting {
    pub(crate) guards: Vec<Guard>,
    pub(crate) begin: Begin,
}

/// The positions at which queues begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Begin {
    /// The first position of queues that the driver has just set up.
    Fresh,
    /// The positions at which a lost backend was cut off, found in the rings and the inflight area.
    CutOff,
    /// These positions, in the order of the queues: the queues were stopped in order.
    Stood(Vec<RingBase>),
}

impl Phase {
    /// The phase as it is reported.
    pub(crate) fn report(&self) -> PhaseReport {
        match self {
            Self::Idle => PhaseReport::Idle,
            Self::Running(_) => PhaseReport::Running,
            Self::Suspended(_) => PhaseReport::Suspended,
            Self::NeedsReset(why) => PhaseReport::NeedsReset(why.clone()),
            Self::Vacant(Vacancy { told: false, why, .. }) => PhaseReport::Recovering(why.clone()),
            Self::Vacant(Vacancy { told: true, why, .. }) => PhaseReport::Broken(why.clone()),
        }
    }

    /// Whether the device has a backend.
    pub(crate) fn has_backend(&self) -> bool {
        !matches!(self, Self::Vacant(_))
    }

    pub(crate) fn is_broken(&self) -> bool {
        matches!(self, Self::Vacant(Vacancy { told: true, .. }))
    }

    /// Whether the guest's kicks go to a queue's eventfd.
    pub(crate) fn takes_kicks(&self) -> bool {
        match self {
            Self::Running(_) | Self::Suspended(_) => true,
            Self::Vacant(vacancy) => vacancy.queues.is_some(),
            Self::Idle | Self::NeedsReset(_) => false,
        }
    }
}
