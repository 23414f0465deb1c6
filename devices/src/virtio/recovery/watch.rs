//! Whether a backend that took over a live ring really goes on where the lost one stopped: some begin
//! their used index at 0 and write over what the driver has yet to read. Reads indexes in guest memory;
//! must never judge by anything that a backend in order could cause as well.

use crate::virtio::core::device::Device;
use crate::virtio::core::handle::DeviceHandle;
use crate::virtio::core::queues::space;
use crate::virtio::core::state::Phase;

/// What is known of a successor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Not every ring that it took over has moved yet.
    Unproven,
    /// Nothing speaks against it, or there is nothing (more) to judge.
    Settled,
}

impl DeviceHandle {
    /// Looks at the rings of a device whose backend took over. When it wrote its used index anew, the
    /// driver is told that the device needs a reset: its ring cannot be saved. May wait for the backend,
    /// to stop it, within its deadline.
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
