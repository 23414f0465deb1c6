//! vfio-user DEVICE_GET_IRQ_INFO and DEVICE_SET_IRQS.
//!
//! Detaching a part of the vectors is reported as done by servers and is not, so arming is all or nothing.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

use zerocopy::IntoBytes;

use super::client::Client;
use super::connection::Expected;
use super::message::{Command, Fault, IrqInfoPayload, SetIrqs, length, parse_front};
use crate::peer::{Cause, Error};

/// The most interrupts that an index may claim: MSI-X has no more.
const COUNT_MOST: u32 = 2048;

/// Messages with fds that may be unanswered at once: the kernel limits fds in flight.
const WINDOW: usize = 16;

const DATA_NONE: u32 = 1;
const DATA_EVENTFD: u32 = 4;
const ACTION_MASK: u32 = 8;
const ACTION_UNMASK: u32 = 16;
const ACTION_TRIGGER: u32 = 32;

/// Which kind of interrupt: as in kernel VFIO PCI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IrqIndex(pub u32);

impl IrqIndex {
    /// The pin.
    pub const INTX: Self = Self(0);
    /// Message-signalled interrupts.
    pub const MSI: Self = Self(1);
    /// MSI-X.
    pub const MSIX: Self = Self(2);
    /// The device found an error.
    pub const ERR: Self = Self(3);
    /// The device should be released.
    pub const REQ: Self = Self(4);
}

/// What an interrupt index is. Some servers say nothing by the flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IrqInfo {
    /// Which.
    pub index: IrqIndex,
    /// Bit 0 eventfd, 1 maskable, 2 automasked, 3 noresize.
    pub flags: u32,
    /// Interrupts, 2048 at most.
    pub count: u32,
}

/// What an eventfd is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqEvent {
    /// The server signals it for an interrupt.
    Trigger,
    /// We signal it when the interrupt is no longer masked (resample). Servers accept it and do nothing.
    Unmask,
}

/// Reads the payload of a DEVICE_GET_IRQ_INFO reply. Pure: for fuzzing, too.
///
/// # Errors
/// When it is about another index, or claims more than 2048 interrupts.
pub fn parse_irq_info(payload: &[u8], index: IrqIndex) -> Result<IrqInfo, Fault> {
    let (info, _) = parse_front::<IrqInfoPayload>(payload)?;
    if info.index != index.0 {
        return Err(Fault::Value { field: "interrupt index", value: u64::from(info.index) });
    }
    if info.count > COUNT_MOST {
        return Err(Fault::Value { field: "interrupt count", value: u64::from(info.count) });
    }
    Ok(IrqInfo { index, flags: info.flags, count: info.count })
}

impl Client {
    /// What interrupt index `index` is.
    ///
    /// # Errors
    /// When the server refuses, fails, or claims more than 2048 interrupts.
    pub fn irq_info(&self, index: IrqIndex) -> Result<IrqInfo, Error> {
        let command = Command::DEVICE_GET_IRQ_INFO;
        let due = length(size_of::<IrqInfoPayload>());
        let ask = IrqInfoPayload { argsz: due, flags: 0, index: index.0, count: 0 };
        let reply = self.ask(command, &[ask.as_bytes()], &[], Expected::bytes(4096))?;
        parse_irq_info(&reply.payload, index).map_err(|fault| self.malformed(command, fault))
    }

    /// Has the server signal `fds` for the interrupts of `index`, from the first on. In as many messages as the
    /// server's limit of fds asks for. What was armed before must be disabled first ([`Client::disable_irqs`]). The
    /// vectors of MSI-X are unmasked besides, as far as the server has masks of its own.
    ///
    /// # Errors
    /// When the server refuses or fails in any of them: then the whole index is disabled again.
    pub fn arm_irqs(&self, index: IrqIndex, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let mut armed = self.set_eventfds(index, 0, fds, IrqEvent::Trigger);
        // QEMU's server asks the table that it keeps, where every vector is masked after a reset. All at once: of a range
        // that does not begin at 0 it takes the count for the end. Who refuses has no such table.
        if armed.is_ok() && index == IrqIndex::MSIX {
            match self.unmask_irqs(index, 0, length(fds.len())) {
                Err(error) if error.is_fatal() => armed = Err(error),
                Err(error) => log::debug!("no masks there: {error}"),
                Ok(()) => {}
            }
        }
        if let Err(error) = &armed
            && !error.is_fatal()
            && let Err(second) = self.disable_irqs(index)
        {
            log::debug!("after {error}: {second}");
        }
        armed
    }

    /// Gives the server eventfds for the interrupts of `index` from number `start` on.
    ///
    /// # Errors
    /// When the server refuses or fails; a part of them may be set then.
    pub fn set_eventfds(
        &self,
        index: IrqIndex,
        start: u32,
        fds: &[BorrowedFd<'_>],
        event: IrqEvent,
    ) -> Result<(), Error> {
        let command = Command::DEVICE_SET_IRQS;
        let batch = self.version().agreed.fds();
        if batch == 0 {
            return Err(self.error(command, Cause::NotNegotiated));
        }
        let action = match event {
            IrqEvent::Trigger => ACTION_TRIGGER,
            IrqEvent::Unmask => ACTION_UNMASK,
        };
        let deadline = self.deadline();
        let mut start = start;
        let mut pending = VecDeque::new();
        for part in fds.chunks(batch) {
            let count = length(part.len());
            let set = set(index, DATA_EVENTFD | action, start, count);
            start = start.saturating_add(count);
            if pending.len() >= WINDOW
                && let Some(oldest) = pending.pop_front()
            {
                super::client::Ticket::wait(oldest)?;
            }
            pending.push_back(self.begin(
                command,
                &[set.as_bytes()],
                part,
                Expected::bytes(0),
                deadline.clone(),
            )?);
        }
        // All are heard, so that none is late; the first refusal counts.
        let outcomes: Vec<_> = pending.into_iter().map(super::client::Ticket::wait).collect();
        outcomes.into_iter().try_for_each(|outcome| outcome.map(drop))
    }

    /// Disables all interrupts of `index`: the server lets go of its eventfds.
    ///
    /// # Errors
    /// When the server refuses or fails.
    pub fn disable_irqs(&self, index: IrqIndex) -> Result<(), Error> {
        self.set_irqs(set(index, DATA_NONE | ACTION_TRIGGER, 0, 0))
    }

    /// Masks `count` interrupts of `index` from number `start` on.
    ///
    /// # Errors
    /// When the server refuses or fails.
    pub fn mask_irqs(&self, index: IrqIndex, start: u32, count: u32) -> Result<(), Error> {
        self.set_irqs(set(index, DATA_NONE | ACTION_MASK, start, count))
    }

    /// Unmasks `count` interrupts of `index` from number `start` on.
    ///
    /// # Errors
    /// When the server refuses or fails.
    pub fn unmask_irqs(&self, index: IrqIndex, start: u32, count: u32) -> Result<(), Error> {
        self.set_irqs(set(index, DATA_NONE | ACTION_UNMASK, start, count))
    }

    /// Unmasks like [`Client::unmask_irqs`], and goes on: neither the room in the socket nor the reply is waited for.
    /// `then` is done when the server has unmasked them, under the terms of [`Client::read_then`].
    ///
    /// # Errors
    /// When the connection ended, or too much is in flight: then nothing was sent.
    pub fn unmask_irqs_then(
        &self,
        index: IrqIndex,
        start: u32,
        count: u32,
        then: impl FnOnce() + Send + 'static,
    ) -> Result<(), Error> {
        let set = set(index, DATA_NONE | ACTION_UNMASK, start, count);
        let then = Box::new(move |_: &[u8]| then());
        self.begin_then(Command::DEVICE_SET_IRQS, &[set.as_bytes()], Expected::bytes(0), then)
    }

    /// Has the server signal `count` interrupts of `index` from number `start` on, as if the device had.
    ///
    /// # Errors
    /// When the server refuses or fails.
    pub fn trigger_irqs(&self, index: IrqIndex, start: u32, count: u32) -> Result<(), Error> {
        self.set_irqs(set(index, DATA_NONE | ACTION_TRIGGER, start, count))
    }

    fn set_irqs(&self, set: SetIrqs) -> Result<(), Error> {
        self.ask(Command::DEVICE_SET_IRQS, &[set.as_bytes()], &[], Expected::bytes(0)).map(drop)
    }
}

fn set(index: IrqIndex, flags: u32, start: u32, count: u32) -> SetIrqs {
    SetIrqs { argsz: length(size_of::<SetIrqs>()), flags, index: index.0, start, count }
}
