//! The eventfds of a device's queues, and how they are connected for a start. Must never look into a ring
//! that somebody serves.

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

/// Why there are no rings to give to a backend.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RingsError {
    #[error(transparent)]
    Resume(#[from] ResumeError),
    #[error("cannot duplicate an eventfd")]
    Fd(#[from] io::Error),
}

/// What the rings say of a backend that took over.
#[derive(Debug, Default)]
pub(crate) struct Verdicts {
    /// There is one that has not moved.
    pub(crate) unmoved: bool,
    /// The queue that was begun anew, where it should have gone on, and where it is.
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
    /// The queue that no backend is told of.
    ours: Option<u16>,
}

/// A ring with eventfds of its own, as a start need not hold the device's lock.
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
    /// As it is told to a backend.
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

/// Where the driver's addresses lead.
pub(crate) fn space<'a>(registers: &Registers, memory: &'a MemoryMap, backend: &'a dyn Backend) -> Space<'a> {
    let translated = registers.accepted().is_some_and(|features| features.has(bit::ACCESS_PLATFORM));
    Space { memory, translations: backend.translations().filter(|_| translated) }
}

impl Wiring {
    pub(crate) fn new(queues: u16) -> io::Result<Self> {
        let pair = |_| Ok(Pair { kick: Kick::new()?, call: Call::new()?, past: Past::default() });
        Ok(Self { pairs: (0..queues).map(pair).collect::<io::Result<_>>()?, ours: None })
    }

    /// From now on this queue is served in the place of the backend. It takes its kicks by the eventfd of the last one,
    /// wherever it is.
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

    /// Has the queue of ours looked at.
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

    /// Checks every queue that the driver enabled, and connects it to the guest: what undoes the
    /// connections.
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

    /// What a backend is told of the queues that the driver enabled.
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
            // A packed ring is not resumed: its number is of no interest.
            let origin = u16::try_from(base.0).unwrap_or(0);
            pair.past = Past { origin, cut: None, handed_over: (*begin == Begin::CutOff).then_some(origin) };
            let QueueState { size, desc, driver, device, .. } = *queue;
            let (kick, call) = (pair.kick.try_clone()?, pair.call.try_clone()?);
            Ok(OwnedRing { index, size, desc, driver, device, base, kick, call })
        };
        queues.map(ring).collect()
    }

    /// The backend is lost: remembers how far the queues got, for what the driver does from now on is
    /// certainly not done.
    pub(crate) fn cut(&mut self, registers: &Registers, space: Space<'_>) {
        let layout = registers.ring_layout();
        for ((index, queue), pair) in (0_u16..).zip(registers.queues()).zip(&mut self.pairs) {
            let orphan = queue.ready.then(|| Orphan::new(index, queue, layout, space).ok()).flatten();
            pair.past.cut = orphan.and_then(|orphan| orphan.contents().ok());
        }
    }

    /// Whether the backend that took over goes on where the last one stopped.
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

    /// Passes on a kick that did not end in the kernel.
    pub(crate) fn kick(&self, queue: u16) -> io::Result<()> {
        self.kicked(queue).map_or(Ok(()), |pair| pair.kick.ring())
    }

    /// Has every queue looked at that the driver enabled: a kick may have been suppressed.
    pub(crate) fn kick_all(&self, registers: &Registers) -> io::Result<()> {
        self.enabled(registers).try_for_each(|(_, _, pair)| pair.kick.ring())
    }

    /// Takes the kicks of a queue that is ours.
    pub(crate) fn take_kick(&self, queue: u16) -> io::Result<()> {
        self.kicked(queue).map_or(Ok(()), |pair| pair.kick.take().map(drop))
    }

    /// Descriptors of the kicks of these queues.
    pub(crate) fn clone_kicks(&self, wanted: impl Fn(u16) -> bool) -> io::Result<Vec<(u16, Kick)>> {
        let pairs = (0_u16..).zip(&self.pairs).filter(|(queue, _)| wanted(*queue));
        pairs.map(|(queue, pair)| Ok((queue, pair.kick.try_clone()?))).collect()
    }

    /// Descriptors of all calls.
    pub(crate) fn clone_calls(&self) -> io::Result<Vec<Call>> {
        self.pairs.iter().map(|pair| pair.call.try_clone()).collect()
    }

    /// Interrupts the guest for a queue.
    pub(crate) fn call(&self, queue: u16) -> io::Result<()> {
        self.pairs.get(usize::from(queue)).map_or(Ok(()), |pair| pair.call.ring())
    }

    /// Interrupts the guest for every queue that it enabled: there may be used buffers that nobody
    /// told it of.
    pub(crate) fn call_all(&self, registers: &Registers) -> io::Result<()> {
        self.enabled(registers).try_for_each(|(_, _, pair)| pair.call.ring())
    }

    /// Takes what is left in the eventfds, so that the next start begins with nothing pending.
    pub(crate) fn drain(&self) -> io::Result<()> {
        self.pairs.iter().try_for_each(|pair| pair.kick.take().and(pair.call.take()).map(drop))
    }
}
