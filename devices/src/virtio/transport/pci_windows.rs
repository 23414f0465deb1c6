//! A backend's memory in the BARs of a virtio-pci function: shared memory regions (virtio 1.2 §4.1.4.7) in a
//! BAR of their own, and pages over the notifications of queues. All of it moves with the BARs. Must never
//! show anything while a BAR is not decoded, nor take a device's lock.

use std::io;
use std::sync::{Arc, Mutex};

use crate::lock;
use crate::pci::{BarIndex, BarKind, BarSpec, Fixture};
use crate::ports::{Access, FileRange, Guard, OnVanished, PortError};
use crate::virtio::backend::outlets::Outlet;
use crate::virtio::transport::pci_state::{PAGE, State, notify_offset};
use crate::virtio::types::model::SharedMemory;

/// VIRTIO_PCI_CAP_SHARED_MEMORY_CFG
const SHARED_MEMORY_CFG: u8 = 8;
/// Bytes of the capability, including the bytes that every capability has.
const CAP64: u8 = 24;
/// A region is aligned to the largest of these sizes that it fills. Guests map pages of these sizes at once.
const ALIGNMENTS: [u64; 3] = [1 << 30, 2 << 20, 1 << 12];

/// The layout of the regions in the BAR.
#[derive(Debug)]
pub(crate) struct Layout {
    /// By id: offset and length.
    regions: Vec<Option<(u64, u64)>>,
    size: u64,
}

impl Layout {
    /// Puts regions of these sizes one after the other; `None` when there is no region, or they are larger
    /// than any BAR.
    pub(crate) fn of(regions: &[Option<SharedMemory>]) -> Option<Self> {
        let mut size = 0_u64;
        let mut place = |length: u64| {
            let align = ALIGNMENTS.into_iter().find(|align| length >= *align).unwrap_or(1 << 12);
            let offset = size.checked_next_multiple_of(align)?;
            size = offset.checked_add(length)?;
            Some((offset, length))
        };
        let mut placed = Vec::new();
        for region in regions {
            placed.push(match region {
                Some(region) => Some(place(region.length)?),
                None => None,
            });
        }
        (size > 0).then_some(Self { regions: placed, size })
    }

    /// The BAR behind the BAR of the structures.
    pub(crate) fn bar() -> Option<BarIndex> {
        BarIndex::new(2)
    }

    pub(crate) fn spec(&self, index: BarIndex) -> BarSpec {
        BarSpec { index, kind: BarKind::Prefetchable64, size: self.size }
    }

    /// The capabilities, without their first two bytes: `virtio_pci_cap64`, one for each region.
    pub(crate) fn capabilities(&self, bar: BarIndex) -> Vec<Vec<u8>> {
        let describe = |(id, place): (usize, &Option<(u64, u64)>)| {
            let (id, (offset, length)) = (u8::try_from(id).ok()?, (*place)?);
            let mut body = vec![CAP64, SHARED_MEMORY_CFG, bar.get(), id, 0, 0];
            // The lower halves of offset and length, then the upper halves.
            for shift in [0, 32] {
                for value in [offset, length] {
                    body.extend(u32::try_from(value >> shift & 0xffff_ffff).unwrap_or(0).to_le_bytes());
                }
            }
            Some(body)
        };
        self.regions.iter().enumerate().filter_map(describe).collect()
    }
}

/// The outlet of a function.
pub(crate) struct BarOutlet {
    pub(crate) state: Arc<Mutex<State>>,
    pub(crate) layout: Option<Layout>,
    pub(crate) queues: u16,
}

fn take_back(state: &Mutex<State>, queue: u16) {
    let mut state = lock(state);
    let id = state.sources.get_mut(usize::from(queue)).and_then(|source| source.notifier.take());
    if let Some(id) = id {
        state.fixtures.remove(id);
    }
}

impl Outlet for BarOutlet {
    fn show(
        &self,
        region: u8,
        at: u64,
        piece: &FileRange,
        access: Access,
        vanished: OnVanished,
    ) -> Result<Guard, PortError> {
        let refuse = || PortError::new("show shared memory there", io::ErrorKind::InvalidInput.into());
        let layout = self.layout.as_ref().ok_or_else(refuse)?;
        let place = layout.regions.get(usize::from(region)).copied().flatten();
        let (offset, length) = place.ok_or_else(refuse)?;
        let fits = at.checked_add(piece.size).is_some_and(|end| end <= length);
        let offset = offset.checked_add(at).filter(|_| fits).ok_or_else(refuse)?;
        let memory = Fixture::Memory { piece: piece.clone(), access, vanished };
        let mut state = lock(&self.state);
        let id = state.windows.as_mut().ok_or_else(refuse)?.add(offset, memory)?;
        drop(state);
        // The function may end before its backend's maps do.
        let state = Arc::downgrade(&self.state);
        Ok(Guard::on_drop(move || {
            if let Some(state) = state.upgrade()
                && let Some(windows) = &mut lock(&state).windows
            {
                windows.remove(id);
            }
        }))
    }

    fn show_notifier(&self, queue: u16, page: FileRange) -> Result<(), PortError> {
        take_back(&self.state, queue);
        let weak = Arc::downgrade(&self.state);
        let vanished = move || weak.upgrade().iter().for_each(|state| take_back(state, queue));
        let mut state = lock(&self.state);
        let source = state.sources.get(usize::from(queue)).filter(|_| queue < self.queues);
        if source.is_none_or(|source| source.call.is_none()) || page.size != PAGE {
            return Err(PortError::new("show a notifier", io::ErrorKind::InvalidInput.into()));
        }
        let memory = Fixture::Memory { piece: page, access: Access::ReadWrite, vanished: Arc::new(vanished) };
        let id = state.fixtures.add(notify_offset(queue), memory)?;
        if let Some(source) = state.sources.get_mut(usize::from(queue)) {
            source.notifier = Some(id);
        }
        Ok(())
    }

    fn take_notifier_back(&self, queue: u16) {
        take_back(&self.state, queue);
    }
}
