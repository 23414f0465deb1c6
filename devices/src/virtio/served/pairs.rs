//! Virtio 1.3 §5.1.6.5.6: the number of queue pairs that a network driver uses. The driver sets it on a
//! control queue that the VMM serves. The backend's rings of unused pairs are switched off. Decides only;
//! must never send a message.

use std::ops::Range;

use transport::vhost_user::RingSwitch;

/// VIRTIO_NET_CTRL_MQ and VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET.
const SET_PAIRS: [u8; 2] = [4, 0];

/// VIRTIO_NET_OK and VIRTIO_NET_ERR.
pub(crate) const OK: u8 = 0;
pub(crate) const ERROR: u8 = 1;

/// The queue pairs of a network card. The first `used` pairs are in use.
#[derive(Debug)]
pub(crate) struct Pairs {
    most: u16,
    used: u16,
    /// A backend has started all rings, and has not been told yet which of them are idle.
    all_on: bool,
}

impl Pairs {
    /// The pairs of a card with this number of queues, which includes the control queue.
    pub(crate) fn of(queues: u16) -> Self {
        Self { most: queues / 2, used: 1, all_on: false }
    }

    /// Resets to one pair.
    pub(crate) fn reset(&mut self) {
        self.used = 1;
    }

    /// The number of pairs for which a request asks; `None` when the request is invalid or asks for more
    /// pairs than there are.
    pub(crate) fn asked(&self, request: &[u8]) -> Option<u16> {
        let [low, high] = *request.strip_prefix(&SET_PAIRS)?.first_chunk()?;
        Some(u16::from_le_bytes([low, high])).filter(|wanted| (1..=self.most).contains(wanted))
    }

    /// The rings to switch so that `wanted` pairs are in use, and whether to enable or disable them.
    pub(crate) fn step(&self, wanted: u16) -> (Range<u16>, RingSwitch) {
        let switch = if wanted > self.used { RingSwitch::Enabled } else { RingSwitch::Disabled };
        (rings(self.used.min(wanted), self.used.max(wanted)), switch)
    }

    /// Records that the driver uses `wanted` pairs from now on.
    pub(crate) fn use_pairs(&mut self, wanted: u16) {
        self.used = wanted;
    }

    /// A backend has started all rings.
    pub(crate) fn started(&mut self) {
        self.all_on = true;
    }

    /// The rings that are not in use. Returned once after each start.
    pub(crate) fn take_idle(&mut self) -> Option<Range<u16>> {
        std::mem::take(&mut self.all_on).then(|| rings(self.used, self.most))
    }
}

/// The rings of the pairs `from..to`.
fn rings(from: u16, to: u16) -> Range<u16> {
    from.saturating_mul(2)..to.saturating_mul(2)
}

#[cfg(test)]
#[path = "pairs_tests.rs"]
mod tests;
