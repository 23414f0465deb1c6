//! The eventfds of a device's queues, and how the queues are connected for a start. Must never look into a
//! ring that a backend serves, except for the indexes.

use std::io;

use transport::memory::{GuestAddr, MemoryMap};
use transport::vhost_user::features::bit;
use transport::vhost_user::vring::{Call, Kick, Ring, RingBase};

use crate::ports::{Guard, PortError};
use crate::virtio::backend::Backend;
use crate::virtio::core::face::Face;
use crate::virtio::core::registers::Registers;
use crate::virtio::core::state::Begin;
use crate::virtio::ring::address::Space;
use crate::virtio::ring::queue::{QueueError, QueueState};
use crate::virtio::ring::split::{Notes, Orphan, Past, ResumeError, Verdict, judge};

/// Why the queues cannot be connected.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConnectError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error(transparent)]
    Port(#[from] PortError),
}

/// Why no rings can be given to a backend.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RingsError {
    #[error(transparent)]
    Resume(#[from] ResumeError),
    #[error("cannot duplicate an eventfd")]
    Fd(#[from] io::Error),
}

/// What the rings show about a backend that took over.
#[derive(Debug, Default)]
pub(crate) struct Verdicts {
    /// At least one ring has not moved yet.
    pub(crate) unmoved: bool,
    /// A queue whose used index the backend began anew: the queue, the expected index and the actual index.
    pub(crate) anew: Option<(u16, u16, u16)>,
}

struct Pair {
    kick: Kick,
    call: Call,
    past: Past,
}

/// One kick and one call for each queue, for the whole life of the device.
pub(crate) struct Wiring {
    pairs: Vec<Pair>,
    /// The queue that the VMM serves itself; no backend is told of it.
    ours: Option<u16>,
}

/// A ring that borrows nothing from the device, for a start without the device's lock.
#[derive(Debug)]
pub(crate) struct OwnedRing {
    index: u16,
    size: u16,
    desc: GuestAddr,
    driver: GuestAddr,
    device: GuestAddr,
    base: RingBase,
    kick: Kick,
    call: Call,
}

impl OwnedRing {
    /// The ring as a backend is told of it.
    pub(crate) fn as_ring(&self) -> Ring<'_> {
        let Self { index, size, desc, driver, device, base, kick, call } = self;
        Ring {
            index: *index,
            size: *size,
            descriptor: *desc,
            available: *driver,
            used: *device,
            base: *base,
            kick,
            call,
            error: None,
        }
    }
}

/// The translation of the driver's addresses to guest memory.
pub(crate) fn space<'a>(registers: &Registers, memory: &'a MemoryMap, backend: &'a dyn Backend) -> Space<'a> {
    let translated = registers.accepted().is_some_and(|features| features.has(bit::ACCESS_PLATFORM));
    Space { memory, translations: backend.translations().filter(|_| translated) }
}

impl Wiring {
    pub(crate) fn new(queues: u16) -> io::Result<Self> {
        let pair = |_| Ok(Pair { kick: Kick::new()?, call: Call::new()?, past: Past::default() });
        Ok(Self { pairs: (0..queues).map(pair).collect::<io::Result<_>>()?, ours: None })
    }

    /// From now on the VMM serves this queue in place of the backend. Its kicks use the eventfd of the
    /// device's last queue, whichever number the queue has.
    pub(crate) fn set_ours(&mut self, queue: u16) {
        self.ours = Some(queue);
    }

    pub(crate) fn ours(&self) -> Option<u16> {
        self.ours
    }

    /// The last queue.
    pub(crate) fn last(&self) -> u16 {
        u16::try_from(self.pairs.len().saturating_sub(1)).unwrap_or(u16::MAX)
    }

    /// The pair whose eventfd takes the kicks of this queue.
    fn kicked(&self, queue: u16) -> Option<&Pair> {
        if self.ours == Some(queue) { self.pairs.last() } else { self.pairs.get(usize::from(queue)) }
    }

    /// Kicks the queue that the VMM serves.
    pub(crate) fn kick_ours(&self) -> io::Result<()> {
        self.ours.map_or(Ok(()), |queue| self.kick(queue))
    }

    /// The queues that the driver enabled.
    fn enabled<'a>(
        &'a self,
        registers: &'a Registers,
    ) -> impl Iterator<Item = (u16, &'a QueueState, &'a Pair)> {
        let queues = (0_u16..).zip(registers.queues()).zip(&self.pairs);
        queues.filter(|((_, queue), _)| queue.ready).map(|((index, queue), pair)| (index, queue, pair))
    }

    /// Checks every queue that the driver enabled, and connects it to the guest. The connections last until
    /// the guards are dropped.
    pub(crate) fn connect(
        &self,
        registers: &Registers,
        face: &dyn Face,
        space: Space<'_>,
    ) -> Result<Vec<Guard>, ConnectError> {
        let layout = registers.ring_layout();
        for (index, queue, _) in self.enabled(registers) {
            queue.validate(index, layout, space)?;
        }
        let connect = |(index, _, pair): (u16, _, &Pair)| {
            let kicked = self.kicked(index).unwrap_or(pair);
            face.connect(index, &kicked.kick, &pair.call)
        };
        Ok(self.enabled(registers).map(connect).collect::<Result<_, _>>()?)
    }

    /// The rings that the driver enabled, as a backend is told of them.
    pub(crate) fn rings(
        &mut self,
        registers: &Registers,
        begin: &Begin,
        space: Space<'_>,
        notes: Notes,
    ) -> Result<Vec<OwnedRing>, RingsError> {
        let layout = registers.ring_layout();
        let queues = (0_u16..).zip(registers.queues()).zip(&mut self.pairs);
        let ours = self.ours;
        let queues = queues.filter(|((index, queue), _)| queue.ready && ours != Some(*index));
        let mut stood = match begin {
            Begin::Stood(bases) => bases.iter(),
            Begin::Fresh | Begin::CutOff => [].iter(),
        };
        let ring = |((index, queue), pair): ((u16, &QueueState), &mut Pair)| {
            let base = match (begin, stood.next()) {
                (Begin::Fresh, _) => layout.first_base(),
                (_, Some(base)) => *base,
                (_, None) => Orphan::new(index, queue, layout, space)?.resume(notes, &pair.past)?,
            };
            // A packed ring is never resumed, so its origin is not needed.
            let origin = u16::try_from(base.0).unwrap_or(0);
            pair.past = Past { origin, cut: None, handed_over: (*begin == Begin::CutOff).then_some(origin) };
            let QueueState { size, desc, driver, device, .. } = *queue;
            let (kick, call) = (pair.kick.try_clone()?, pair.call.try_clone()?);
            Ok(OwnedRing { index, size, desc, driver, device, base, kick, call })
        };
        queues.map(ring).collect()
    }

    /// The backend is lost: saves the contents of the rings. Requests that the driver makes available after
    /// this are certainly not done.
    pub(crate) fn cut(&mut self, registers: &Registers, space: Space<'_>) {
        let layout = registers.ring_layout();
        for ((index, queue), pair) in (0_u16..).zip(registers.queues()).zip(&mut self.pairs) {
            let orphan = queue.ready.then(|| Orphan::new(index, queue, layout, space).ok()).flatten();
            pair.past.cut = orphan.and_then(|orphan| orphan.contents().ok());
        }
    }

    /// Judges by the rings whether the backend that took over goes on where the last one stopped.
    pub(crate) fn judge(&mut self, registers: &Registers, space: Space<'_>) -> Verdicts {
        let layout = registers.ring_layout();
        let mut verdicts = Verdicts::default();
        for ((index, queue), pair) in (0_u16..).zip(registers.queues()).zip(&mut self.pairs) {
            let Some(base) = pair.past.handed_over.filter(|_| queue.ready) else { continue };
            let orphan = Orphan::new(index, queue, layout, space).ok();
            let Some(now) = orphan.and_then(|ring| ring.indexes().ok()) else { continue };
            match judge(base, now) {
                Verdict::Unmoved => verdicts.unmoved = true,
                Verdict::GoesOn => pair.past.handed_over = None,
                Verdict::BeganAnew => verdicts.anew = Some((index, base, now.used)),
            }
        }
        verdicts
    }

    /// Rings a queue's kick eventfd, for a kick that did not end in the kernel.
    pub(crate) fn kick(&self, queue: u16) -> io::Result<()> {
        self.kicked(queue).map_or(Ok(()), |pair| pair.kick.ring())
    }

    /// Kicks every queue that the driver enabled, as a kick may have been suppressed.
    pub(crate) fn kick_all(&self, registers: &Registers) -> io::Result<()> {
        self.enabled(registers).try_for_each(|(_, _, pair)| pair.kick.ring())
    }

    /// Clears the kick eventfd of a queue whose kicks the VMM reads.
    pub(crate) fn take_kick(&self, queue: u16) -> io::Result<()> {
        self.kicked(queue).map_or(Ok(()), |pair| pair.kick.take().map(drop))
    }

    /// Duplicates of the kick eventfds of the wanted queues.
    pub(crate) fn clone_kicks(&self, wanted: impl Fn(u16) -> bool) -> io::Result<Vec<(u16, Kick)>> {
        let pairs = (0_u16..).zip(&self.pairs).filter(|(queue, _)| wanted(*queue));
        pairs.map(|(queue, pair)| Ok((queue, pair.kick.try_clone()?))).collect()
    }

    /// Duplicates of all call eventfds.
    pub(crate) fn clone_calls(&self) -> io::Result<Vec<Call>> {
        self.pairs.iter().map(|pair| pair.call.try_clone()).collect()
    }

    /// Interrupts the guest for a queue.
    pub(crate) fn call(&self, queue: u16) -> io::Result<()> {
        self.pairs.get(usize::from(queue)).map_or(Ok(()), |pair| pair.call.ring())
    }

    /// Interrupts the guest for every queue that the driver enabled, as there may be used buffers of which
    /// the guest was not told.
    pub(crate) fn call_all(&self, registers: &Registers) -> io::Result<()> {
        self.enabled(registers).try_for_each(|(_, _, pair)| pair.call.ring())
    }

    /// Clears the eventfds, so that the next start begins with nothing pending.
    pub(crate) fn drain(&self) -> io::Result<()> {
        self.pairs.iter().try_for_each(|pair| pair.kick.take().and(pair.call.take()).map(drop))
    }
}
