//! vfio-user DEVICE_GET_IRQ_INFO and DEVICE_SET_IRQS: the interrupts of a device, and the eventfds that
//! signal them.
//!
//! Servers report that they detached the eventfds of a part of the vectors, but do not detach them. Therefore
//! the interrupts of an index are armed and disabled all together.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

use zerocopy::IntoBytes;

use super::client::Client;
use super::connection::Expected;
use super::message::{Command, Fault, IrqInfoPayload, SetIrqs, length, parse_front};
use crate::peer::{Cause, Error};

/// The most interrupts that an index may claim, which is the limit of MSI-X.
const COUNT_MOST: u32 = 2048;

/// The most messages with fds that may be unanswered at once, as the kernel limits fds in flight.
const WINDOW: usize = 16;

const DATA_NONE: u32 = 1;
const DATA_EVENTFD: u32 = 4;
const ACTION_MASK: u32 = 8;
const ACTION_UNMASK: u32 = 16;
const ACTION_TRIGGER: u32 = 32;

/// An interrupt index: the kind of interrupt, as in kernel VFIO PCI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IrqIndex(pub u32);

impl IrqIndex {
    /// The interrupt pin.
    pub const INTX: Self = Self(0);
    /// MSI.
    pub const MSI: Self = Self(1);
    /// MSI-X.
    pub const MSIX: Self = Self(2);
    /// The device found an error.
    pub const ERR: Self = Self(3);
    /// The device should be released.
    pub const REQ: Self = Self(4);
}

/// The description of an interrupt index. The flags of some servers carry no information.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IrqInfo {
    /// The interrupt index.
    pub index: IrqIndex,
    /// Bit 0 eventfd, 1 maskable, 2 automasked, 3 noresize.
    pub flags: u32,
    /// The number of interrupts, at most 2048.
    pub count: u32,
}

/// The purpose of an eventfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IrqEvent {
    /// The server signals it to raise an interrupt.
    Trigger,
    /// We signal it when the interrupt is unmasked (resample). Servers accept it and ignore it.
    Unmask,
}

/// Reads the payload of a DEVICE_GET_IRQ_INFO reply. Pure, so that it can be fuzzed.
///
/// # Errors
/// When the reply is about another index, or claims more than 2048 interrupts.
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
    /// Reads the description of interrupt index `index`.
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

    /// Makes the server signal `fds` for the interrupts of `index`, from interrupt 0 on. Uses as many
    /// messages as the server's limit of fds requires. Eventfds that were armed before must be disabled first
    /// ([`Client::disable_irqs`]). For MSI-X, the vectors are also unmasked if the server has masks of its
    /// own.
    ///
    /// # Errors
    /// When the server refuses or fails at any message. The whole index is disabled again then.
    pub fn arm_irqs(&self, index: IrqIndex, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let mut armed = self.set_eventfds(index, 0, fds, IrqEvent::Trigger);
        // QEMU's server checks the MSI-X table that it keeps itself, in which a reset masks every vector. All
        // vectors are unmasked with one message, as that server misreads a range that does not begin at 0: it
        // takes the count for the end. A server that refuses has no such table.
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

    /// Gives the server eventfds for the interrupts of `index`, from interrupt `start` on.
    ///
    /// # Errors
    /// When the server refuses or fails. Some of the eventfds may be set then.
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
        // Waits for every reply, so that none counts as late. The first refusal is returned.
        let outcomes: Vec<_> = pending.into_iter().map(super::client::Ticket::wait).collect();
        outcomes.into_iter().try_for_each(|outcome| outcome.map(drop))
    }

    /// Disables all interrupts of `index`. The server closes its eventfds.
    ///
    /// # Errors
    /// When the server refuses or fails.
    pub fn disable_irqs(&self, index: IrqIndex) -> Result<(), Error> {
        self.set_irqs(set(index, DATA_NONE | ACTION_TRIGGER, 0, 0))
    }

    /// Masks `count` interrupts of `index`, from interrupt `start` on.
    ///
    /// # Errors
    /// When the server refuses or fails.
    pub fn mask_irqs(&self, index: IrqIndex, start: u32, count: u32) -> Result<(), Error> {
        self.set_irqs(set(index, DATA_NONE | ACTION_MASK, start, count))
    }

    /// Unmasks `count` interrupts of `index`, from interrupt `start` on.
    ///
    /// # Errors
    /// When the server refuses or fails.
    pub fn unmask_irqs(&self, index: IrqIndex, start: u32, count: u32) -> Result<(), Error> {
        self.set_irqs(set(index, DATA_NONE | ACTION_UNMASK, start, count))
    }

    /// Unmasks as [`Client::unmask_irqs`] does, but waits neither for room in the socket nor for the reply.
    /// `then` is called when the server has unmasked the interrupts, under the rules of
    /// [`Client::read_then`].
    ///
    /// # Errors
    /// When the connection has ended, or too much is in flight. Nothing was sent then.
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

    /// Makes the server signal `count` interrupts of `index`, from interrupt `start` on, as if the device had
    /// raised them.
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
