//! Virtio 1.3 §5.1.6.5.6: how many pairs of queues a network card's driver uses, which it says on a control queue that is ours.
//! The backend's rings of the others are switched off. Decides; sends nothing.

use std::ops::Range;

use transport::vhost_user::RingSwitch;

/// VIRTIO_NET_CTRL_MQ and VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET.
const SET_PAIRS: [u8; 2] = [4, 0];

/// VIRTIO_NET_OK and VIRTIO_NET_ERR.
pub(crate) const OK: u8 = 0;
pub(crate) const ERROR: u8 = 1;

/// The pairs of a card: the first ones are in use.
#[derive(Debug)]
pub(crate) struct Pairs {
    most: u16,
    used: u16,
    /// A backend has started all rings, and was not told yet which are idle.
    all_on: bool,
}

impl Pairs {
    /// Those of a card with so many queues, the control queue among them.
    pub(crate) fn of(queues: u16) -> Self {
        Self { most: queues / 2, used: 1, all_on: false }
    }

    /// As after a reset: the driver uses one.
    pub(crate) fn reset(&mut self) {
        self.used = 1;
    }

    /// How many a request asks for; `None` when that is not to be had.
    pub(crate) fn asked(&self, request: &[u8]) -> Option<u16> {
        let [low, high] = *request.strip_prefix(&SET_PAIRS)?.first_chunk()?;
        Some(u16::from_le_bytes([low, high])).filter(|wanted| (1..=self.most).contains(wanted))
    }

    /// The rings to switch for so many pairs, and how.
    pub(crate) fn step(&self, wanted: u16) -> (Range<u16>, RingSwitch) {
        let switch = if wanted > self.used { RingSwitch::Enabled } else { RingSwitch::Disabled };
        (rings(self.used.min(wanted), self.used.max(wanted)), switch)
    }

    /// The driver uses so many from now on.
    pub(crate) fn use_pairs(&mut self, wanted: u16) {
        self.used = wanted;
    }

    /// A backend has started all rings.
    pub(crate) fn started(&mut self) {
        self.all_on = true;
    }

    /// The rings that are not in use, once after each start.
    pub(crate) fn take_idle(&mut self) -> Option<Range<u16>> {
        std::mem::take(&mut self.all_on).then(|| rings(self.used, self.most))
    }
}

/// The rings of the pairs from one number to another.
fn rings(from: u16, to: u16) -> Range<u16> {
    from.saturating_mul(2)..to.saturating_mul(2)
}

#[cfg(test)]
#[path = "pairs_tests.rs"]
mod tests;
