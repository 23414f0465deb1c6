//! How the function's interrupts reach the guest: the kinds that the function has, the kind that is on, and
//! the eventfds that the server was given for that kind. Called under the device's lock; must never ask the
//! server.

use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex};

use transport::vhost_user::vring::Call;

use super::function::{COMMAND_OURS, FunctionShape, InBar};
use super::pin::Ends;
use super::server::Irq;
use crate::lock;
use crate::pci::bar::Command;
use crate::pci::{BarIndex, Msi, MsiSpec, Msix};
use crate::ports::{Guard, Interrupts, PortError};

/// The eventfds of one function. The server gets the eventfds of a kind when the guest switches that kind on.
/// An interrupt keeps its eventfd for the function's whole life.
#[derive(Debug)]
pub struct Calls {
    pin: Mutex<Vec<Arc<Call>>>,
    msi: Mutex<Vec<Arc<Call>>>,
    msix: Mutex<Vec<Arc<Call>>>,
    served: Arc<Ends>,
}

impl Calls {
    /// No eventfds yet.
    ///
    /// # Errors
    /// When no eventfd can be had.
    pub fn new() -> io::Result<Self> {
        let served = Ends::new()?;
        Ok(Self { pin: Mutex::default(), msi: Mutex::default(), msix: Mutex::default(), served })
    }

    fn list(&self, kind: Irq) -> &Mutex<Vec<Arc<Call>>> {
        match kind {
            Irq::Intx => &self.pin,
            Irq::Msi => &self.msi,
            Irq::MsiX => &self.msix,
        }
    }

    /// The first `count` eventfds of a kind. Missing ones are made now.
    ///
    /// # Errors
    /// When no more descriptors can be had.
    pub fn of(&self, kind: Irq, count: u16) -> io::Result<Vec<Arc<Call>>> {
        let mut calls = lock(self.list(kind));
        while calls.len() < usize::from(count) {
            calls.push(Arc::new(Call::new()?));
        }
        Ok(calls.clone())
    }

    /// Discards the signals of a kind that was switched off: the guest must not get them later.
    pub fn drain(&self, kind: Irq) {
        for call in lock(self.list(kind)).iter() {
            if let Err(error) = call.take() {
                log::debug!("nothing was signalled: {error}");
            }
        }
    }

    /// The guest's ends of the pin's interrupt.
    #[must_use]
    pub fn served(&self) -> &Arc<Ends> {
        &self.served
    }
}

/// Where an access inside a BAR goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Into the MSI-X table, at this offset in the table.
    Table(u64),
    /// Into the pending bits, at this offset in them.
    Pending(u64),
    /// Partly into the table or the pending bits: reads all ones, and a write is dropped.
    Across,
    /// To the server.
    Server,
}

/// The routes of the function's interrupts to the guest.
pub struct Delivery {
    interrupts: Arc<dyn Interrupts>,
    calls: Arc<Calls>,
    msix: Option<(u16, Msix)>,
    msi: Option<(u16, MsiSpec, Msi)>,
    /// The pin's GSI.
    pin: Option<u32>,
    line: Option<Guard>,
    connected_msix: bool,
    connected_msi: bool,
}

impl Delivery {
    /// All kinds off. `pin` is the GSI of the function's pin.
    #[must_use]
    pub fn new(
        shape: &FunctionShape,
        calls: Arc<Calls>,
        interrupts: Arc<dyn Interrupts>,
        pin: Option<u32>,
    ) -> Self {
        let msix =
            shape.msix.map(|shape| (u16::from(shape.at), Msix::new(shape.vectors, Arc::clone(&interrupts))));
        let msi = shape
            .msi
            .map(|shape| (u16::from(shape.at), shape.spec, Msi::new(shape.spec, Arc::clone(&interrupts))));
        let pin = pin.filter(|_| shape.pin.is_some());
        Self { interrupts, calls, msix, msi, pin, line: None, connected_msix: false, connected_msi: false }
    }

    /// The kind of interrupts that is on, and how many interrupts it has.
    #[must_use]
    pub fn on(&self, command: u16) -> Option<(Irq, u16)> {
        let decodes = command & COMMAND_OURS & (Command::IO | Command::MEMORY | Command::MASTER) != 0;
        if let Some((_, msix)) = self.msix.as_ref().filter(|(_, msix)| msix.is_enabled()) {
            return Some((Irq::MsiX, msix.count()));
        }
        if let Some((_, spec, _)) = self.msi.as_ref().filter(|(.., msi)| msi.is_enabled()) {
            return Some((Irq::Msi, spec.vectors.into()));
        }
        let pin = self.pin.is_some() && decodes && command & Command::INTX_DISABLE == 0;
        pin.then_some((Irq::Intx, 1))
    }

    /// Puts the bits of the interrupt registers that change over the dword at `at` of the configuration
    /// space, which holds the constant bits.
    pub fn cover(&self, at: u16, dword: &mut [u8; 4]) {
        let value = u32::from_le_bytes(*dword);
        if let Some((_, msix)) = self.msix.as_ref().filter(|(cap, _)| *cap == at) {
            let control = u32::from(msix.control() & 0xc000) << 16;
            *dword = ((value & 0x3fff_ffff) | control).to_le_bytes();
        }
        if let Some((offset, msi)) = self.in_msi(at) {
            let ours = if offset == 0 { 0x0071_0000 } else { u32::MAX };
            *dword = ((value & !ours) | msi.read(offset)).to_le_bytes();
        }
    }

    fn in_msi(&self, at: u16) -> Option<(u8, &Msi)> {
        let (cap, spec, msi) = self.msi.as_ref()?;
        let offset = u8::try_from(at.checked_sub(*cap)?).ok()?;
        (offset < Msi::length(*spec)).then_some((offset, msi))
    }

    /// Whether the dword at `at` of the configuration space belongs to an interrupt register.
    #[must_use]
    pub fn has(&self, at: u16) -> bool {
        self.msix.as_ref().is_some_and(|(cap, _)| *cap == at) || self.in_msi(at).is_some()
    }

    /// The guest writes the interrupt register at `at`; `value` is the whole new dword.
    ///
    /// # Errors
    /// When the machine refuses a route.
    pub fn write(&mut self, at: u16, value: u32) -> Result<(), PortError> {
        if let Some((_, msix)) = self.msix.as_mut().filter(|(cap, _)| *cap == at) {
            let [.., low, high] = value.to_le_bytes();
            return msix.set_control(u16::from_le_bytes([low, high]));
        }
        if let Some((cap, _, msi)) = &mut self.msi {
            let offset = at.checked_sub(*cap).and_then(|offset| u8::try_from(offset).ok());
            return offset.map_or(Ok(()), |offset| msi.write(offset, value));
        }
        Ok(())
    }

    /// Connects the eventfds that the server was given to their vectors, or to the pin's line.
    ///
    /// # Errors
    /// When the machine refuses a route.
    pub fn connect(&mut self, kind: Irq, calls: &[Arc<Call>]) -> Result<(), PortError> {
        match (kind, &mut self.msix, &mut self.msi, self.pin) {
            // A route that the machine refuses does not keep the other eventfds from their vectors.
            (Irq::MsiX, Some((_, msix)), ..) if !self.connected_msix => {
                self.connected_msix = true;
                let mut done = Ok(());
                for (vector, call) in (0..).zip(calls) {
                    // The eventfd is connected to no vector first, which the machine cannot refuse. A route
                    // that the machine refuses in the second step is tried again at the vector's next change.
                    let known = msix.connect(None, Arc::clone(call));
                    done = done.and(known.and_then(|id| msix.retarget(id, Some(vector))));
                }
                done
            }
            (Irq::Msi, _, Some((.., msi)), _) if !self.connected_msi => {
                self.connected_msi = true;
                let mut done = Ok(());
                for (vector, call) in (0..).zip(calls) {
                    done = done.and(msi.connect(vector, Arc::clone(call)));
                }
                done
            }
            (Irq::Intx, _, _, Some(gsi)) if self.line.is_none() => {
                let Some(call) = calls.first() else { return Ok(()) };
                let line = self.interrupts.attach_level(call.as_fd(), gsi, self.calls.served().as_fd())?;
                self.line = Some(line);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// A kind was switched off. This removes the pin's line; the routes of vectors follow their registers by
    /// themselves.
    pub fn disconnect(&mut self, kind: Irq) {
        if kind == Irq::Intx {
            self.line = None;
        }
    }

    /// Switches all kinds off, as in a new one.
    pub fn reset(&mut self, shape: &FunctionShape) {
        *self = Self::new(shape, Arc::clone(&self.calls), Arc::clone(&self.interrupts), self.pin);
    }

    /// Removes all routes to the guest, for good.
    pub fn cut(&mut self) {
        (self.msix, self.msi, self.pin, self.line) = (None, None, None, None);
    }

    /// The MSI-X of the function.
    pub fn msix(&mut self) -> Option<&mut Msix> {
        self.msix.as_mut().map(|(_, msix)| msix)
    }
}

/// Where an access of `length` bytes at `offset` of `bar` goes.
#[must_use]
pub fn place(shape: &FunctionShape, bar: BarIndex, offset: u64, length: usize) -> Place {
    let Some(msix) = &shape.msix else { return Place::Server };
    let end = offset.saturating_add(u64::try_from(length).unwrap_or(u64::MAX));
    let place = |inside: &InBar, what: fn(u64) -> Place| {
        if inside.bar != bar || end <= inside.offset || inside.end() <= offset {
            return None;
        }
        let whole = inside.offset <= offset && end <= inside.end();
        Some(if whole { what(offset - inside.offset) } else { Place::Across })
    };
    let found = place(&msix.table, Place::Table).or_else(|| place(&msix.pba, Place::Pending));
    found.unwrap_or(Place::Server)
}
