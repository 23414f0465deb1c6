//! Where a device is in its life. Data only.

use std::sync::Arc;

use crate::ports::Guard;
use crate::virtio::backend::Begin;
use crate::virtio::core::report::PhaseReport;
use crate::virtio::recovery::take_over::Starting;

/// What becomes of a device whose peer is lost.
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
///                 DRIVER_OK, backend started                 peer lost, OnLoss::Recover
///        Idle ─────────────────────────────▶ Running ──────────────────────┐
///        │ ▲ ▲ ◀───────────────────────────── │  ▲                         ▼
///        │ │ │       reset, backend stopped   │  └──────────────────── Recovering
///        │ │ └── reset ── NeedsReset          │    another backend goes on where
///        │ └────────────────▲                 │    the lost one was cut off
///        │   DRIVER_OK with rings that        │
///        │   cannot be: the driver's mistake  │    peer lost, OnLoss::Break; the successor is
///        └──────────▶ Broken ◀────────────────┘    another device; the machine's ports failed
/// ```
/// Only what the peer or the machine did lasts. `NEEDS_RESET` is shown in both cases, to the driver
/// that was at work when it happened (§2.1.2), and goes with its reset: a reset device reads 0, as
/// drivers wait for that. A broken device says so to the next driver by refusing `FEATURES_OK`
/// (§3.1.1, step 6), the earliest point at which a driver takes a no and gives up.
///
/// A recovering device is whole for its driver: it can be reset, and started, at any time and without
/// a wait; what it asks of the backend is done once there is one. Any phase but `Broken` may become
/// `Recovering`, and it leads back to wherever the driver is then.
pub(crate) enum Phase {
    Idle,
    /// The guards are the queues' connections to the guest.
    Running(Vec<Guard>),
    /// The driver asked for what cannot be; the backend is as it was.
    NeedsReset(String),
    Recovering(Absence),
    Broken(String),
}

/// What waits for the next backend.
pub(crate) struct Absence {
    /// How the last one was lost.
    pub(crate) why: String,
    /// What it has to start.
    pub(crate) queues: Option<Waiting>,
    /// A backend that is being started right now, without the device's lock.
    pub(crate) starting: Option<Arc<Starting>>,
}

/// Queues of a driver that is ready: the guest's kicks gather in their eventfds.
pub(crate) struct Waiting {
    pub(crate) guards: Vec<Guard>,
    /// Whether a backend has had them before.
    pub(crate) begin: Begin,
}

impl Absence {
    pub(crate) fn new(why: String, queues: Option<Waiting>) -> Self {
        Self { why, queues, starting: None }
    }
}

impl Phase {
    /// For reports.
    pub(crate) fn report(&self) -> PhaseReport {
        match self {
            Self::Idle => PhaseReport::Idle,
            Self::Running(_) => PhaseReport::Running,
            Self::NeedsReset(why) => PhaseReport::NeedsReset(why.clone()),
            Self::Recovering(absence) => PhaseReport::Recovering(absence.why.clone()),
            Self::Broken(why) => PhaseReport::Broken(why.clone()),
        }
    }

    /// Whether there is a backend to ask.
    pub(crate) fn has_backend(&self) -> bool {
        !matches!(self, Self::Recovering(_) | Self::Broken(_))
    }

    /// Whether the guest's kicks go to a queue's eventfd.
    pub(crate) fn takes_kicks(&self) -> bool {
        match self {
            Self::Running(_) => true,
            Self::Recovering(absence) => absence.queues.is_some(),
            Self::Idle | Self::NeedsReset(_) | Self::Broken(_) => false,
        }
    }
}
