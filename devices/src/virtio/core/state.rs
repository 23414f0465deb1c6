//! Where a device is in its life. Data only.

use std::time::Duration;

use transport::vhost_user::vring::RingBase;

use crate::ports::Guard;
use crate::virtio::core::report::PhaseReport;

/// What becomes of a device whose backend is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnLoss {
    /// It breaks at once, and the driver is told.
    #[default]
    Break,
    /// It waits for another backend; the driver is told nothing.
    Recover,
}

/// Where a device is in its life.
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
/// Only what the backend or the machine did lasts. `NEEDS_RESET` is shown to the driver that was at work when its
/// mistake or the loss happened (§2.1.2), and goes with its reset: a reset device reads 0, as drivers wait for that. A
/// broken device says so to the next driver by refusing `FEATURES_OK` (§3.1.1, step 6), the earliest point at which a
/// driver takes a no and gives up.
///
/// A recovering device is whole for its driver: it can be reset, and started, at any time; what it asks of the backend is
/// done once there is one.
pub(crate) enum Phase {
    Idle,
    /// The guards are the queues' connections to the guest.
    Running(Vec<Guard>),
    /// The queues stand while the machine is paused, and go on where they were.
    Suspended(Waiting),
    /// The driver asked for what cannot be; the backend is as it was.
    NeedsReset(String),
    /// There is no backend.
    Vacant(Vacancy),
}

/// A device without a backend. A *recovering* device has its backend searched for as long as the user allows. A *broken*
/// device has it searched for once at each reset.
pub(crate) struct Vacancy {
    /// How the last backend was lost.
    pub(crate) why: String,
    /// The driver was told: the device is broken. Otherwise it is recovering.
    pub(crate) told: bool,
    /// What the next backend has to start.
    pub(crate) queues: Option<Waiting>,
    /// What others wait for.
    pub(crate) work: Work,
    /// How long a driver may wait for the outcome of a search.
    pub(crate) patience: Duration,
}

/// What is done about a vacancy without the device's lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Work {
    /// Nothing that others wait for.
    None,
    /// A broken device's backend is searched for, once: its driver's FEATURES_OK waits for the outcome.
    Search,
    /// A backend starts the queues: a reset waits until it has.
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

/// Has a search begun soon, on a thread that may wait. False when there is no such thread. Called with the device's lock
/// held; must not wait.
pub type Ask = Box<dyn Fn(Effort) -> bool + Send>;

/// How a device asks for a backend to be searched for.
pub(crate) struct Seeker {
    /// How long a driver's FEATURES_OK may wait for the outcome of a search.
    pub(crate) limit: Duration,
    pub(crate) ask: Ask,
}

/// Queues of a driver that is ready: the guest's kicks gather in their eventfds.
pub(crate) struct Waiting {
    pub(crate) guards: Vec<Guard>,
    pub(crate) begin: Begin,
}

/// Where queues begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Begin {
    /// Where queues begin that the driver has just set up.
    Fresh,
    /// Where a lost backend was cut off, which the rings and the inflight area tell.
    CutOff,
    /// Here, in the order of the queues: they were stopped in order.
    Stood(Vec<RingBase>),
}

impl Phase {
    /// For reports.
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

    /// Whether there is a backend to ask.
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
