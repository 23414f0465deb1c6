//! Guest-physical addresses, I/O ports and interrupt lines. No other place in the program contains them as
//! numbers.
//!
//! ```text
//! 0000_0000  RAM   GDT, boot parameters, page tables, command line (below 0x9_fc00)
//! 0009_fc00        EBDA, empty                                                (reserved)
//! 000e_0000        RSDP and the other ACPI tables; without ACPI, the MP table (reserved)
//! 0010_0000        kernel from here up; initramfs at the end of low RAM
//! c000_0000  HOLE  PCI: memory BARs below 4 GiB
//! d000_0000        virtio-mmio register pages, one 4 KiB page a device
//! e000_0000        PCI: ECAM of the root bus
//! fec0_0000        IOAPIC
//! fee0_0000        local APICs, MSI
//! fffb_c000        KVM's identity map page and TSS (Intel real mode)
//! 1_0000_0000 RAM  the rest
//! half of all      PCI: memory BARs above 4 GiB ([`pci_memory64`])
//! ```
//!
//! Nothing here depends on a configuration. The values that differ between machines are in
//! [`crate::platform`].

use std::fmt;

use crate::irq::Gsi;
use crate::platform::VirtioMmio;
use crate::width::to_u64;

/// A guest-physical address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Gpa(pub u64);

impl fmt::Display for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Size of a page.
pub const PAGE_SIZE: u64 = 4096;
/// The size and the address of each RAM region are multiples of this. Some vhost-user backends silently
/// ignore other regions.
pub const RAM_ALIGN: u64 = 2 << 20;
/// The least RAM a machine may have.
pub const RAM_MIN: u64 = 32 << 20;

/// First address of the hole below 4 GiB. Low RAM ends here or below.
pub const HOLE_START: Gpa = Gpa(3 << 30);
/// First address above the hole: high RAM begins here.
pub const HOLE_END: Gpa = Gpa(4 << 30);

/// GDT of the boot state.
pub const BOOT_GDT: Gpa = Gpa(0x500);
/// PVH `hvm_start_info`, followed by its modules and memory map.
pub const PVH_START_INFO: Gpa = Gpa(0x6000);
/// `boot_params` (the "zero page") of the Linux boot protocol.
pub const ZERO_PAGE: Gpa = Gpa(0x7000);
/// Initial stack pointer of the boot CPU. The stack grows down within one page that nothing else uses.
pub const BOOT_STACK: Gpa = Gpa(0x8ff0);
/// Page tables for entry in long mode: PML4, PDPT, then four page directories.
pub const PAGE_TABLES: Gpa = Gpa(0x9000);
/// Kernel command line.
pub const CMDLINE: Gpa = Gpa(0x2_0000);
/// The largest size of a command line, including its final NUL.
pub const CMDLINE_MAX: u64 = 0x1_0000;
/// End of conventional memory and start of the EBDA.
pub const EBDA: Gpa = Gpa(0x9_fc00);
/// End of the EBDA, and start of the VGA window, which is unused RAM in this machine.
pub const EBDA_END: Gpa = Gpa(0xa_0000);
/// RSDP, followed by the other ACPI tables. It is inside the range that kernels scan.
pub const ACPI_TABLES: Gpa = Gpa(0xe_0000);
/// A kernel that resets through the BIOS jumps to this address in real mode. It has 16 bytes, inside the ACPI
/// area.
pub const RESET_VECTOR: Gpa = Gpa(0xf_fff0);
/// End of the ACPI area, and start of the RAM that a kernel may use freely.
pub const HIGH_MEMORY: Gpa = Gpa(0x10_0000);

/// First virtio-mmio register page.
pub const VIRTIO_MMIO_BASE: Gpa = Gpa(0xd000_0000);
/// Size and distance of virtio-mmio register pages.
pub const VIRTIO_MMIO_SIZE: u64 = PAGE_SIZE;
/// How many virtio-mmio devices a machine may have.
pub const VIRTIO_MMIO_MAX: usize = 64;
/// First address for 32-bit memory BARs.
pub const PCI_MEMORY32: Gpa = HOLE_START;
/// Size of the range for 32-bit memory BARs.
pub const PCI_MEMORY32_SIZE: u64 = VIRTIO_MMIO_BASE.0 - HOLE_START.0;
/// Configuration space of the root bus: 4 KiB a function.
pub const PCI_ECAM: Gpa = Gpa(0xe000_0000);
/// Size of the configuration space of one bus.
pub const PCI_ECAM_SIZE: u64 = 1 << 20;
/// IOAPIC registers.
pub const IOAPIC: Gpa = Gpa(0xfec0_0000);
/// Local APIC registers.
pub const LOCAL_APIC: Gpa = Gpa(0xfee0_0000);
/// One page for KVM's identity map (`KVM_SET_IDENTITY_MAP_ADDR`).
pub const KVM_IDENTITY_MAP: Gpa = Gpa(0xfffb_c000);
/// Three pages for KVM's TSS (`KVM_SET_TSS_ADDR`).
pub const KVM_TSS: Gpa = Gpa(0xfffb_d000);

/// First port of the first serial port (COM1).
pub const COM1: u16 = 0x3f8;
/// Ports of a 16550.
pub const SERIAL_PORTS: u16 = 8;
/// First of the PCI configuration ports.
pub const PCI_CONFIG_PORTS: u16 = 0xcf8;
/// Number of PCI configuration ports.
pub const PCI_CONFIG_PORTS_SIZE: u16 = 8;
/// First port for I/O BARs.
pub const PCI_IO: u16 = 0x1000;
/// Number of ports for I/O BARs.
pub const PCI_IO_SIZE: u16 = 0xf000;
/// First port of the hot-plug registers for [`crate::platform::PciRoot::removable`]: devices that are gone,
/// devices that are present, devices to eject.
pub const PCI_HOTPLUG_PORTS: u16 = 0x610;
/// Number of ports of the hot-plug registers.
pub const PCI_HOTPLUG_PORTS_SIZE: u16 = 12;
/// The port of the pvpanic device. Other machines have the device at the same port.
pub const PVPANIC_PORT: u16 = 0x505;
/// ACPI sleep control register, one byte. See [`SLEEP_POWER_OFF`].
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// ACPI sleep status register, one byte. The guest writes 0x80 to it; a read may give 0.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI reset register, one byte. See [`RESET_VALUE`].
pub const RESET_PORT: u16 = 0x602;
/// Written to [`RESET_PORT`], this value resets the machine.
pub const RESET_VALUE: u8 = 1;
/// SLP_TYP of S5 (soft off).
pub const S5_SLEEP_TYPE: u8 = 5;
/// Written to [`SLEEP_CONTROL_PORT`], this value powers the machine off: SLP_TYP (bits 2-4) = S5, SLP_EN (bit
/// 5).
pub const SLEEP_POWER_OFF: u8 = (S5_SLEEP_TYPE << 2) | (1 << 5);
/// Command port of the keyboard controller. This machine has only the controller's reset line.
pub const I8042_COMMAND_PORT: u16 = 0x64;

/// Number of pins of the IOAPIC. This is also the first GSI that is not a pin.
pub const IOAPIC_PINS: u32 = 24;
/// Interrupt line of COM1.
pub const COM1_GSI: Gsi = Gsi(4);
/// Interrupt line of the ACPI event device, level-triggered.
pub const EVENT_GSI: Gsi = Gsi(9);

/// Pins for virtio-mmio devices, in the order of use. The last four are also the pins of INTx. These pins are
/// left out:
/// * 0 and 2: timer and cascade of kernels without ACPI.
/// * 4: COM1.
/// * 1, 3, 8, 9, 13: legacy meanings that only a kernel without ACPI would look for; 9 is also [`EVENT_GSI`].
const VIRTIO_MMIO_PINS: [u32; 16] = [5, 6, 7, 10, 11, 12, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23];

/// The lines of INTx, which are level-triggered. On a machine with PCI no virtio-mmio device uses them.
pub const INTX_PINS: [u32; 4] = [20, 21, 22, 23];

/// The line of a PCI device's interrupt pin (1 is INTA, 4 is INTD). The devices are spread over four lines.
pub fn intx_gsi(device: u8, pin: u8) -> Option<Gsi> {
    let turn = usize::from(device).checked_add(usize::from(pin.checked_sub(1).filter(|pin| *pin < 4)?))?;
    INTX_PINS.get(turn % INTX_PINS.len()).copied().map(Gsi)
}

/// First address and size of the range for 64-bit memory BARs. The range is the fifth eighth of the addresses
/// that a processor with `address_bits` can reach, or of those that 46 bits can reach, if that is less: every
/// guest handles 46 bits. `None` when the range would not lie above RAM.
pub fn pci_memory64(address_bits: u8, ram_end: Gpa) -> Option<(Gpa, u64)> {
    let bits = u32::from(address_bits.min(46));
    let base = 1_u64.checked_shl(bits.checked_sub(1)?)?;
    (base >= HOLE_END.0 && ram_end.0 <= base).then_some((Gpa(base), base / 4))
}

/// The `n`th virtio-mmio device (from 0) on a machine with PCI. The first 12 have a pin of their own.
pub fn virtio_mmio_slot_beside_pci(n: usize) -> Option<VirtioMmio> {
    let own = VIRTIO_MMIO_PINS.len() - INTX_PINS.len();
    let pin = VIRTIO_MMIO_PINS.get(n % own)?;
    virtio_mmio_slot(n).map(|slot| VirtioMmio { gsi: Gsi(*pin), ..slot })
}

/// The `n`th virtio-mmio device (from 0). The first 16 have a pin of their own; later devices share pins.
/// Edge-triggered pins can be shared here, because Linux requests them as shared and our InterruptStatus
/// always reads as 1.
pub fn virtio_mmio_slot(n: usize) -> Option<VirtioMmio> {
    if n >= VIRTIO_MMIO_MAX {
        return None;
    }
    let pin = VIRTIO_MMIO_PINS.get(n % VIRTIO_MMIO_PINS.len())?;
    let offset = to_u64(n) * VIRTIO_MMIO_SIZE;
    Some(VirtioMmio { base: Gpa(VIRTIO_MMIO_BASE.0 + offset), size: VIRTIO_MMIO_SIZE, gsi: Gsi(*pin) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_sixteen_virtio_mmio_devices_have_pins_of_their_own() {
        let mut pins: Vec<_> = (0..16).map(|n| virtio_mmio_slot(n).unwrap().gsi.0).collect();
        assert!(pins.iter().all(|pin| *pin < IOAPIC_PINS && ![COM1_GSI.0, EVENT_GSI.0].contains(pin)));
        pins.sort_unstable();
        pins.dedup();
        assert_eq!(pins.len(), 16);
    }

    #[test]
    fn virtio_mmio_pages_never_overlap_and_stay_inside_their_window() {
        for n in 0..VIRTIO_MMIO_MAX {
            let slot = virtio_mmio_slot(n).unwrap();
            assert_eq!(slot.base.0 % PAGE_SIZE, 0);
            assert!(slot.base >= VIRTIO_MMIO_BASE && slot.base.0 + slot.size <= 0xe000_0000);
            if let Some(next) = virtio_mmio_slot(n + 1) {
                assert_eq!(slot.base.0 + slot.size, next.base.0);
            }
        }
        assert_eq!(virtio_mmio_slot(VIRTIO_MMIO_MAX), None);
    }

    #[test]
    fn beside_pci_no_virtio_mmio_device_has_a_line_of_intx() {
        for n in 0..VIRTIO_MMIO_MAX {
            let slot = virtio_mmio_slot_beside_pci(n).unwrap();
            assert!(!INTX_PINS.contains(&slot.gsi.0));
            assert_eq!(slot.base, virtio_mmio_slot(n).unwrap().base);
        }
        for device in 1..32 {
            assert!(INTX_PINS.contains(&intx_gsi(device, 1).unwrap().0));
            assert_ne!(intx_gsi(device, 1), intx_gsi(device + 1, 1));
        }
        assert_eq!((intx_gsi(1, 0), intx_gsi(1, 5)), (None, None));
    }

    #[test]
    fn the_window_above_four_gib_lies_above_ram_and_inside_what_is_addressed() {
        assert_eq!(pci_memory64(40, Gpa(6 << 30)), Some((Gpa(1 << 39), 1 << 37)));
        assert_eq!(pci_memory64(52, HOLE_END), Some((Gpa(1 << 45), 1 << 43)));
        assert_eq!(pci_memory64(36, Gpa(32 << 30)), Some((Gpa(32 << 30), 8 << 30)));
        assert_eq!(pci_memory64(36, Gpa((32 << 30) + 1)), None);
        assert_eq!((pci_memory64(32, Gpa(0)), pci_memory64(0, Gpa(0))), (None, None));
    }

    #[test]
    fn low_memory_structures_follow_each_other_without_overlap() {
        let order = [BOOT_GDT, PVH_START_INFO, ZERO_PAGE, Gpa(0x8000), PAGE_TABLES, CMDLINE];
        assert!(order.is_sorted());
        const { assert!(BOOT_STACK.0 < PAGE_TABLES.0 && PAGE_TABLES.0 + 6 * PAGE_SIZE <= CMDLINE.0) };
        const { assert!(CMDLINE.0 + CMDLINE_MAX <= EBDA.0) };
    }
}
