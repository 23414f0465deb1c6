//! The GSI routing table. It says for each interrupt input of KVM whether the input leads to an IOAPIC pin or
//! to a message.
//!
//! The table is plain data until [`RoutingTable::apply`]. KVM always replaces its whole table, so a VM must
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

/// An interrupt input in KVM's numbering. A number below 24 is an IOAPIC pin, a higher number a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gsi(pub u32);

/// A message-signalled interrupt: an address and the data that is written there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiMessage {
    /// The address, which is in the range of the local APICs.
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

/// A route to a message. A freed route stays in the table until its place is needed. If it is taken again
/// with the same message, the table does not change, and KVM need not be told.
#[derive(Clone, Copy, Debug)]
struct MessageRoute {
    message: MsiMessage,
    taken: bool,
}

/// Whether KVM has to be told of a change of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// The table has not changed.
    Same,
    /// The table has changed: call [`RoutingTable::apply`].
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
    /// A table of pins only. `limit` is the number of GSIs of the host (`KVM_CAP_IRQ_ROUTING`).
    ///
    /// Each GSI below 24 leads to its IOAPIC pin. A GSI below 16 also leads to the 8259s, but only if the
    /// guest is told of them. A guest of hardware-reduced ACPI never masks the 8259s; they would inject
    /// vectors that the guest has not set up.
    pub fn new(discovery: Discovery, limit: u32) -> Self {
        Self { discovery, messages: BTreeMap::new(), limit }
    }

    /// Takes a free GSI for a message. A GSI whose last message was the same is preferred.
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

    /// Gives a GSI back. False when it was not allocated. Its route stays in the table.
    pub fn free(&mut self, gsi: Gsi) -> bool {
        let route = self.messages.get_mut(&gsi).filter(|route| route.taken);
        route.map(|route| route.taken = false).is_some()
    }

    /// Removes a route from the table, for instance because KVM refused it.
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
        // Line 2 of the master 8259 takes the slave's output.
        let pic = (0..pic_lines).filter(|line| *line != 2).map(|line| match line {
            0..8 => pin_entry(line, KVM_IRQCHIP_PIC_MASTER, line),
            _ => pin_entry(line, KVM_IRQCHIP_PIC_SLAVE, line - 8),
        });
        let messages = self.messages.iter().map(|(gsi, route)| message_entry(*gsi, route.message));
        ioapic.chain(pic).chain(messages).collect()
    }

    /// Replaces KVM's table with this one.
    pub fn apply(&self, vm: &VmFd) -> Result<(), Error> {
        let entries = self.entries();
        let refused = |errno| Error::Apply { entries: entries.len(), source: kvm_ioctls::Error::new(errno) };
        // The wrapper holds as many entries as KVM accepts (4096), so a longer table is one that KVM would
        // refuse.
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
