//! The hardware of a machine as plain data. `vmm` makes it from the configuration. [`crate::boot`],
//! [`crate::acpi`], [`crate::cpu`] and [`crate::irq`] read it.

use crate::irq::Gsi;
use crate::layout::{
    COM1, COM1_GSI, Gpa, INTX_PINS, PCI_ECAM, PCI_ECAM_SIZE, PCI_IO, PCI_IO_SIZE, PCI_MEMORY32,
    PCI_MEMORY32_SIZE, pci_memory64,
};

/// The parts of a machine that its guest is told of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// The number of vCPUs, 1 to 255. Their APIC ids are 0 to `cpus` - 1.
    pub cpus: u8,
    /// virtio-mmio devices, from [`crate::layout::virtio_mmio_slot`].
    pub virtio_mmio: Vec<VirtioMmio>,
    /// The PCI root, if there is one.
    pub pci: Option<PciRoot>,
    /// The serial port, if there is one.
    pub serial: Option<SerialPort>,
    /// The way in which the guest learns of these parts.
    pub discovery: Discovery,
}

/// A virtio-mmio device as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VirtioMmio {
    /// Its register page.
    pub base: Gpa,
    /// Size of the register page in bytes.
    pub size: u64,
    /// Its edge-triggered interrupt.
    pub gsi: Gsi,
}

/// A range of guest-physical addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressRange {
    /// The first address.
    pub base: Gpa,
    /// Bytes.
    pub size: u64,
}

/// A PCI root with one bus, 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciRoot {
    /// Its configuration space.
    pub ecam: AddressRange,
    /// The addresses of 32-bit memory BARs.
    pub memory32: AddressRange,
    /// The addresses of 64-bit memory BARs, above 4 GiB.
    pub memory64: Option<AddressRange>,
    /// The first port of I/O BARs.
    pub io: u16,
    /// The number of ports for I/O BARs.
    pub io_size: u16,
    /// The level-triggered lines. Pin INTA of device n leads to line n modulo 4, INTB to the next line, and
    /// so on.
    pub intx: [Gsi; 4],
    /// The devices that a guest with ACPI can be asked to eject.
    pub removable: PciSlots,
}

/// A set of device numbers on the root bus, each from 1 to 31.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PciSlots(u32);

impl PciSlots {
    /// Adds `number` to the set. A number that no device can have changes nothing.
    #[must_use]
    pub fn with(self, number: u8) -> Self {
        let bit = 1_u32.checked_shl(number.into()).unwrap_or(0) & !1;
        Self(self.0 | bit)
    }

    /// Whether the set is empty.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The numbers in ascending order.
    pub fn iter(self) -> impl Iterator<Item = u8> {
        (1..32).filter(move |number| self.0 & 1 << number != 0)
    }
}

impl PciRoot {
    /// The root of a machine whose processors have `address_bits` bits of physical address and whose RAM ends
    /// at `ram_end`.
    pub fn new(address_bits: u8, ram_end: Gpa) -> Self {
        let memory64 = pci_memory64(address_bits, ram_end);
        Self {
            ecam: AddressRange { base: PCI_ECAM, size: PCI_ECAM_SIZE },
            memory32: AddressRange { base: PCI_MEMORY32, size: PCI_MEMORY32_SIZE },
            memory64: memory64.map(|(base, size)| AddressRange { base, size }),
            io: PCI_IO,
            io_size: PCI_IO_SIZE,
            intx: INTX_PINS.map(Gsi),
            removable: PciSlots::default(),
        }
    }
}

/// A 16550 serial port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SerialPort {
    /// First I/O port.
    pub port: u16,
    /// Its edge-triggered interrupt.
    pub gsi: Gsi,
}

impl SerialPort {
    /// The first serial port of a PC: ttyS0.
    pub const COM1: Self = Self { port: COM1, gsi: COM1_GSI };
}

/// The way in which the guest learns of the machine's hardware.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Discovery {
    /// ACPI tables of a hardware-reduced machine, which has no legacy device. Stock kernels need them.
    #[default]
    Acpi,
    /// An MP table, and [`Platform::device_parameters`] on the command line. It serves kernels without ACPI,
    /// which must be built with `CONFIG_VIRTIO_MMIO_CMDLINE_DEVICES`. Such kernels also need the 8259s and
    /// the PIT.
    Cmdline,
}

impl Platform {
    /// The kernel parameters that describe the virtio-mmio devices, for [`Discovery::Cmdline`]. None for
    /// ACPI.
    pub fn device_parameters(&self) -> Vec<String> {
        match self.discovery {
            Discovery::Acpi => Vec::new(),
            Discovery::Cmdline => self
                .virtio_mmio
                .iter()
                .map(|d| format!("virtio_mmio.device={}K@{:#x}:{}", d.size / 1024, d.base.0, d.gsi.0))
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::virtio_mmio_slot;

    #[test]
    fn slots_are_one_to_thirty_one() {
        let slots = [0, 31, 1, 32, 255, 7, 7].into_iter().fold(PciSlots::default(), PciSlots::with);
        assert_eq!(slots.iter().collect::<Vec<_>>(), [1, 7, 31]);
        assert!(!slots.is_empty() && PciSlots::default().with(0).is_empty());
    }

    #[test]
    fn only_cmdline_discovery_names_devices_in_parameters() {
        let mut platform = Platform {
            cpus: 1,
            virtio_mmio: (0..2).map(|n| virtio_mmio_slot(n).unwrap()).collect(),
            pci: None,
            serial: None,
            discovery: Discovery::Acpi,
        };
        assert!(platform.device_parameters().is_empty());
        platform.discovery = Discovery::Cmdline;
        let expected = ["virtio_mmio.device=4K@0xd0000000:5", "virtio_mmio.device=4K@0xd0001000:6"];
        assert_eq!(platform.device_parameters(), expected);
    }
}
