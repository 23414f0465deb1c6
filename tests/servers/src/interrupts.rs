//! The eventfds that the client gave with SET_IRQS, by index (INTx, MSI, MSI-X, …) and vector.
//!
//! Masked vectors are the client's business: it holds the MSI-X table. Here a vector has an eventfd or it has
//! not.

use std::fs::File;
use std::io::{Error, ErrorKind, Result, Write};

use vfio_bindings::bindings::vfio::{
    VFIO_IRQ_INFO_EVENTFD, VFIO_IRQ_INFO_NORESIZE, VFIO_IRQ_SET_ACTION_MASK, VFIO_IRQ_SET_ACTION_TRIGGER,
    VFIO_IRQ_SET_ACTION_UNMASK, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_IRQ_SET_DATA_NONE, VFIO_PCI_INTX_IRQ_INDEX,
    VFIO_PCI_MSI_IRQ_INDEX, VFIO_PCI_MSIX_IRQ_INDEX, VFIO_PCI_NUM_IRQS,
};
use vfio_user::IrqInfo;

/// Which kind of interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The pin.
    Intx,
    /// MSI.
    Msi,
    /// MSI-X.
    Msix,
}

impl Kind {
    fn index(self) -> u32 {
        match self {
            Self::Intx => VFIO_PCI_INTX_IRQ_INDEX,
            Self::Msi => VFIO_PCI_MSI_IRQ_INDEX,
            Self::Msix => VFIO_PCI_MSIX_IRQ_INDEX,
        }
    }
}

/// Vectors of each kind, and who listens to them.
#[derive(Debug, Default)]
pub struct Interrupts {
    kinds: Vec<Vec<Option<File>>>,
    masked: bool,
    pending: bool,
    /// Eventfds signalled.
    pub raised: u64,
    /// Interrupts that nobody had armed.
    pub dropped: u64,
}

impl Interrupts {
    /// So many vectors of each kind.
    #[must_use]
    pub fn new(intx: usize, msi: usize, msix: usize) -> Self {
        let kinds = [intx, msi, msix, 0, 0].iter().map(|count| (0..*count).map(|_| None).collect()).collect();
        Self { kinds, ..Self::default() }
    }

    /// What GET_IRQ_INFO answers.
    #[must_use]
    pub fn describe(&self) -> Vec<IrqInfo> {
        (0..VFIO_PCI_NUM_IRQS)
            .zip(&self.kinds)
            .map(|(index, vectors)| IrqInfo {
                index,
                flags: if vectors.is_empty() { 0 } else { VFIO_IRQ_INFO_EVENTFD | VFIO_IRQ_INFO_NORESIZE },
                count: u32::try_from(vectors.len()).unwrap_or(u32::MAX),
            })
            .collect()
    }

    /// SET_IRQS.
    ///
    /// # Errors
    /// Vectors that there are not, and more descriptors than vectors.
    pub fn set(&mut self, index: u32, flags: u32, start: u32, count: u32, fds: Vec<File>) -> Result<()> {
        let invalid =
            || Error::new(ErrorKind::InvalidInput, format!("no interrupts {index}/{start}+{count}"));
        let vectors =
            usize::try_from(index).ok().and_then(|at| self.kinds.get_mut(at)).ok_or_else(invalid)?;
        let [first, number] = [start, count].map(|value| usize::try_from(value).unwrap_or(usize::MAX));
        let end = first.checked_add(number).filter(|end| *end <= vectors.len()).ok_or_else(invalid)?;
        let wanted = vectors.get_mut(first..end).ok_or_else(invalid)?;
        if flags & VFIO_IRQ_SET_ACTION_TRIGGER != 0 {
            if flags & VFIO_IRQ_SET_DATA_EVENTFD != 0 {
                if fds.len() > wanted.len() {
                    return Err(invalid());
                }
                let mut fds = fds.into_iter();
                for vector in wanted {
                    *vector = fds.next();
                }
            } else if flags & VFIO_IRQ_SET_DATA_NONE != 0 && count == 0 {
                vectors.fill_with(|| None);
            } else if flags & VFIO_IRQ_SET_DATA_NONE != 0 {
                for vector in start..end.try_into().unwrap_or(u32::MAX) {
                    self.signal(index, vector);
                }
            }
        } else if flags & VFIO_IRQ_SET_ACTION_MASK != 0 && index == VFIO_PCI_INTX_IRQ_INDEX {
            self.masked = true;
        } else if flags & VFIO_IRQ_SET_ACTION_UNMASK != 0 && index == VFIO_PCI_INTX_IRQ_INDEX {
            // With an eventfd this would arm a resample notification, which nobody here needs: the register
            // tells.
            if flags & VFIO_IRQ_SET_DATA_EVENTFD == 0 {
                self.masked = false;
                if std::mem::take(&mut self.pending) {
                    self.signal(index, 0);
                }
            }
        }
        Ok(())
    }

    /// Signals one vector; one that nobody armed is counted and dropped.
    pub fn raise(&mut self, kind: Kind, vector: u32) {
        if kind == Kind::Intx && self.masked {
            self.pending = true;
            return;
        }
        self.signal(kind.index(), vector);
    }

    fn signal(&mut self, index: u32, vector: u32) {
        let at = |number: u32| usize::try_from(number).unwrap_or(usize::MAX);
        let armed = self.kinds.get(at(index)).and_then(|kind| kind.get(at(vector))).and_then(Option::as_ref);
        // A full counter is one that the guest has not yet looked at.
        match armed.map(|mut fd| fd.write_all(&1u64.to_ne_bytes())) {
            Some(Ok(())) => self.raised += 1,
            Some(Err(error)) => log::warn!("interrupt {index}/{vector}: {error}"),
            None => self.dropped += 1,
        }
    }

    /// Nobody listens any more.
    pub fn clear(&mut self) {
        for kind in &mut self.kinds {
            kind.fill_with(|| None);
        }
        (self.masked, self.pending) = (false, false);
    }

    /// True when a vector of this kind has an eventfd.
    #[must_use]
    pub fn is_armed(&self, kind: Kind) -> bool {
        let index = usize::try_from(kind.index()).unwrap_or(usize::MAX);
        self.kinds.get(index).is_some_and(|vectors| vectors.iter().any(Option::is_some))
    }
}
