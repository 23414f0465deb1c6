//! Checks that a backend that took over a live ring goes on where the lost one stopped. Some backends begin
//! their used index at 0 and overwrite entries that the driver has not read yet. Reads indexes in guest
//! memory. Must never judge by anything that a correct backend could cause as well.

use crate::virtio::core::device::Device;
use crate::virtio::core::handle::DeviceHandle;
use crate::virtio::core::queues::space;
use crate::virtio::core::state::Phase;

/// What the rings have shown about a backend that took over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// At least one ring that it took over has not moved yet.
    Unproven,
    /// The watch is over: every ring goes on, or the driver was asked for a reset, or the queues do not run.
    Settled,
}

impl DeviceHandle {
    /// Judges the rings of a device whose backend took over. When the backend began a used index anew, the
    /// ring is lost: the queues are stopped, and the driver is told that the device needs a reset. May wait
    /// for the backend to stop, within its deadline.
    pub fn judge_successor(&self) -> Standing {
        self.with(Device::judge_successor)
    }
}

impl Device {
    fn judge_successor(&mut self) -> Standing {
        if !matches!(self.phase, Phase::Running(_)) {
            return Standing::Settled;
        }
        let Self { wiring, registers, memory, backend, .. } = self;
        let verdicts = wiring.judge(registers, space(registers, memory, backend.as_ref()));
        let Some((queue, base, now)) = verdicts.anew else {
            return if verdicts.unmoved { Standing::Unproven } else { Standing::Settled };
        };
        self.stop_and_need_reset(format!(
            "the backend that took over began queue {queue} anew, at {now} where {base} was due: \
             it cannot take over a ring in use"
        ));
        Standing::Settled
    }
}
