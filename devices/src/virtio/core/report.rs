//! What a device reports of itself: its phase and its counters, as plain values.

use crate::virtio::backend::BackendStats;

/// A device's phase, for reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PhaseReport {
    /// No queue runs.
    Idle,
    /// The backend serves the queues.
    Running,
    /// The machine is paused and the queues are stopped.
    Suspended,
    /// The driver made a mistake, described here, and has to reset the device.
    NeedsReset(String),
    /// The backend was lost for this reason, and the device waits for another one.
    Recovering(String),
    /// The device is broken for this reason.
    Broken(String),
}

/// Writes that came to userspace while the queues ran, by register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Trapped {
    /// Kicks. 0 as long as the machine lets every kick end in the kernel.
    pub queue_notify: u64,
    /// Acknowledgements of used buffers and nothing else. 0 as long as these end in the kernel.
    pub interrupt_ack: u64,
    /// Acknowledgements of a configuration change.
    pub config_ack: u64,
    /// Writes to the configuration space.
    pub config: u64,
    /// Everything else.
    pub other: u64,
}

/// The counters of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceStats {
    /// The device's name.
    pub name: String,
    /// Its type's name.
    pub kind: &'static str,
    /// The present phase.
    pub phase: PhaseReport,
    /// How often its queues were started.
    pub activations: u64,
    /// How often it was reset while its queues ran.
    pub resets: u64,
    /// How often another backend took over.
    pub recoveries: u64,
    /// Configuration interrupts sent.
    pub config_interrupts: u64,
    /// The trapped writes while the queues ran.
    pub trapped: Trapped,
    /// Traffic with the peer.
    pub backend: BackendStats,
}
