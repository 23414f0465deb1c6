//! The eventfds of a device's queues, and how they are connected for a start. Must never read a ring.

use std::io;

use transport::memory_map::MemoryMap;
use transport::vhost_user::vring::{Call, Kick, Ring};

use super::face::Face;
use super::queue::QueueError;
use super::registers::Registers;
use crate::ports::{Guard, PortError};

/// Why the queues cannot be connected.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConnectError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error(transparent)]
    Port(#[from] PortError),
}

struct Pair {
    kick: Kick,
    call: Call,
}

/// One kick and one call for each queue, for the whole life of the device.
pub(super) struct Wiring(Vec<Pair>);

impl Wiring {
    pub(super) fn new(queues: u16) -> io::Result<Self> {
        let pair = |_| Ok(Pair { kick: Kick::new()?, call: Call::new()? });
        (0..queues).map(pair).collect::<io::Result<_>>().map(Self)
    }

    /// Checks every queue that the driver enabled, and connects it to the guest: what the backend is to
    /// be told, and what undoes the connections.
    pub(super) fn connect(
        &self,
        registers: &Registers,
        face: &dyn Face,
        memory: &MemoryMap,
    ) -> Result<(Vec<Ring<'_>>, Vec<Guard>), ConnectError> {
        let layout = registers.ring_layout();
        let (mut rings, mut guards) = (Vec::new(), Vec::new());
        for ((index, queue), pair) in (0_u16..).zip(registers.queues()).zip(&self.0) {
            if !queue.ready {
                continue;
            }
            queue.validate(index, layout, memory)?;
            guards.push(face.connect(index, &pair.kick, &pair.call)?);
            rings.push(Ring {
                index,
                size: queue.size,
                descriptor: queue.desc,
                available: queue.driver,
                used: queue.device,
                base: layout.first_base(),
                kick: &pair.kick,
                call: &pair.call,
                error: None,
            });
        }
        Ok((rings, guards))
    }

    /// Passes on a kick that did not end in the kernel.
    pub(super) fn kick(&self, queue: u16) -> io::Result<()> {
        self.0.get(usize::from(queue)).map_or(Ok(()), |pair| pair.kick.ring())
    }

    /// Takes what is left in the eventfds, so that the next start begins with nothing pending.
    pub(super) fn drain(&self) -> io::Result<()> {
        self.0.iter().try_for_each(|pair| pair.kick.take().and(pair.call.take()).map(drop))
    }
}
