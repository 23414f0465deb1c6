//! The GSI routing table: the IOAPIC pin or the message that each of KVM's interrupt inputs leads to.
//!
//! The table is data until [`RoutingTable::apply`]. KVM always replaces its whole table, so that a VM must
//! have exactly one [`RoutingTable`].

use std::collections::BTreeMap;

use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_entry__bindgen_ty_1,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;

use crate::layout::IOAPIC_PINS;
use crate::platform::Discovery;

/// An interrupt input of the machine, in KVM's numbering: below 24 an IOAPIC pin, above a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gsi(pub u32);

/// A message-signalled interrupt: what is written where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// Address, in the local APICs' range.
    pub address: u64,
    /// Data.
    pub data: u32,
}

/// Errors of this module.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// All GSIs that KVM offers are in use.
    #[error("no interrupt route is free (the host offers {0})")]
    Exhausted(u32),
    /// KVM refused the table.
    #[error("KVM refused the table of {entries} interrupt routes")]
    Apply {
        /// Entries in the refused table.
        entries: usize,
        /// Why.
        source: kvm_ioctls::Error,
    },
}

/// A message route. A route that is not taken stays in the table until its place is needed: when it is taken
/// again with the same message, the table does not change, and KVM is not told.
#[derive(Clone, Copy, Debug)]
struct MessageRoute {
    message: MsiMessage,
    taken: bool,
}

/// Whether KVM has to be told of a change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// It is as it was.
    Same,
    /// It is another: [`RoutingTable::apply`] it.
    Changed,
}

/// All interrupt routes of a machine.
#[derive(Clone, Debug)]
pub struct RoutingTable {
    discovery: Discovery,
    messages: BTreeMap<Gsi, MessageRoute>,
    limit: u32,
}

impl RoutingTable {
    /// Pins only. `limit` is the number of GSIs of the host (`KVM_CAP_IRQ_ROUTING`).
    ///
    /// Each GSI below 24 leads to its IOAPIC pin. Those below 16 lead to the 8259s as well only where the
    /// guest is told of them: a guest of hardware-reduced ACPI never masks the 8259s, which would then inject
    /// vectors that nobody set up.
    pub fn new(discovery: Discovery, limit: u32) -> Self {
        Self { discovery, messages: BTreeMap::new(), limit }
    }

    /// Takes a free GSI for a message: one that led to the same message before, if there is one.
    pub fn allocate(&mut self, message: MsiMessage) -> Result<(Gsi, Table), Error> {
        let same = |(_, route): &(&Gsi, &mut MessageRoute)| !route.taken && route.message == message;
        if let Some((gsi, route)) = self.messages.iter_mut().find(same) {
            route.taken = true;
            return Ok((*gsi, Table::Same));
        }
        let taken = |gsi: &Gsi| self.messages.get(gsi).is_some_and(|route| route.taken);
        let free = (IOAPIC_PINS..self.limit).map(Gsi).find(|gsi| !taken(gsi));
        let gsi = free.ok_or(Error::Exhausted(self.limit))?;
        self.messages.insert(gsi, MessageRoute { message, taken: true });
        Ok((gsi, Table::Changed))
    }

    /// Gives a GSI back; false when it was not allocated. What it leads to stays in the table.
    pub fn free(&mut self, gsi: Gsi) -> bool {
        let route = self.messages.get_mut(&gsi).filter(|route| route.taken);
        route.map(|route| route.taken = false).is_some()
    }

    /// Takes a route out of the table, for instance as KVM refused it.
    pub fn forget(&mut self, gsi: Gsi) {
        self.messages.remove(&gsi);
    }

    /// The table in KVM's form.
    pub fn entries(&self) -> Vec<kvm_irq_routing_entry> {
        let ioapic = (0..IOAPIC_PINS).map(|pin| pin_entry(pin, KVM_IRQCHIP_IOAPIC, pin));
        let pic_lines = match self.discovery {
            Discovery::Acpi => 0,
            Discovery::Cmdline => 16,
        };
        // Line 2 of the master is the slave's output.
        let pic = (0..pic_lines).filter(|line| *line != 2).map(|line| match line {
            0..8 => pin_entry(line, KVM_IRQCHIP_PIC_MASTER, line),
            _ => pin_entry(line, KVM_IRQCHIP_PIC_SLAVE, line - 8),
        });
        let messages = self.messages.iter().map(|(gsi, route)| message_entry(*gsi, route.message));
        ioapic.chain(pic).chain(messages).collect()
    }

    /// Replaces KVM's table by this one.
    pub fn apply(&self, vm: &VmFd) -> Result<(), Error> {
        let entries = self.entries();
        let refused = |errno| Error::Apply { entries: entries.len(), source: kvm_ioctls::Error::new(errno) };
        // More than the wrapper can hold is more than KVM takes (4096).
        let table = KvmIrqRouting::from_entries(&entries).map_err(|_| refused(22 /* EINVAL */))?;
        vm.set_gsi_routing(&table).map_err(|source| Error::Apply { entries: entries.len(), source })
    }
}

fn pin_entry(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        u: kvm_irq_routing_entry__bindgen_ty_1 { irqchip: kvm_irq_routing_irqchip { irqchip, pin } },
        ..Default::default()
    }
}

fn message_entry(gsi: Gsi, message: MsiMessage) -> kvm_irq_routing_entry {
    let [b0, b1, b2, b3, b4, b5, b6, b7] = message.address.to_le_bytes();
    let msi = kvm_irq_routing_msi {
        address_lo: u32::from_le_bytes([b0, b1, b2, b3]),
        address_hi: u32::from_le_bytes([b4, b5, b6, b7]),
        data: message.data,
        ..Default::default()
    };
    kvm_irq_routing_entry {
        gsi: gsi.0,
        type_: KVM_IRQ_ROUTING_MSI,
        u: kvm_irq_routing_entry__bindgen_ty_1 { msi },
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn acpi_machines_route_pins_to_the_ioapic_alone() {
        let entries = RoutingTable::new(Discovery::Acpi, 4096).entries();
        assert_eq!(entries.len(), 24);
        let gsis: Vec<_> = entries.iter().map(|entry| entry.gsi).collect();
        assert_eq!(gsis, (0..24).collect::<Vec<_>>());
    }

    #[test]
    fn machines_without_acpi_route_isa_lines_to_the_8259s_too() {
        let entries = RoutingTable::new(Discovery::Cmdline, 4096).entries();
        assert_eq!(entries.len(), 24 + 15);
    }

    #[test]
    fn messages_take_the_lowest_free_gsi_and_run_out() {
        let mut table = RoutingTable::new(Discovery::Acpi, 26);
        let message = MsiMessage { address: 0xfee0_0000, data: 0x30 };
        assert_eq!(table.allocate(message).unwrap(), (Gsi(24), Table::Changed));
        assert_eq!(table.allocate(message).unwrap(), (Gsi(25), Table::Changed));
        assert!(matches!(table.allocate(message), Err(Error::Exhausted(26))));
        assert!(table.free(Gsi(24)) && !table.free(Gsi(24)));
        assert_eq!(table.entries().len(), 26);
        let other = MsiMessage { data: 0x31, ..message };
        assert_eq!(table.allocate(other).unwrap(), (Gsi(24), Table::Changed));
        assert_eq!(table.entries().len(), 26);
    }

    #[test]
    fn a_route_taken_again_with_the_same_message_changes_nothing() {
        let mut table = RoutingTable::new(Discovery::Acpi, 4096);
        let message = |data| MsiMessage { address: 0xfee0_0000, data };
        let (first, _) = table.allocate(message(1)).unwrap();
        let (second, _) = table.allocate(message(2)).unwrap();
        assert!(table.free(first) && table.free(second));
        assert_eq!(table.allocate(message(2)).unwrap(), (second, Table::Same));
        assert_eq!(table.allocate(message(3)).unwrap(), (first, Table::Changed));
        table.forget(first);
        assert_eq!(table.entries().len(), 25);
    }
}
