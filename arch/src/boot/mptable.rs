//! The MP table (Intel MultiProcessor Specification 1.4, chapter 4), for kernels without ACPI. It describes
//! the processors, one IOAPIC, and pins with the numbers of the ISA interrupts. A machine with ACPI tables
//! has no MP table.
//!
//! The table does not describe PCI. A kernel without ACPI finds a PCI bus by itself, and the devices on the
//! bus must use message interrupts.

use crate::layout::{Gpa, IOAPIC, IOAPIC_PINS, LOCAL_APIC};
use crate::ram::{Error, Ram};

/// Start of the BIOS area in which kernels search for the floating pointer.
const FLOATING_POINTER: Gpa = Gpa(0xf_0000);
const TABLE: Gpa = Gpa(FLOATING_POINTER.0 + 16);
const SPEC_1_4: u8 = 4;
const APIC_VERSION: u8 = 0x14;
const ISA_BUS: u8 = 0;
const ENABLED: u8 = 1;
const BOOT_CPU: u8 = 2;
const TO_ALL_APICS: u8 = 0xff;

const INTERRUPT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;

pub(super) fn load(ram: &Ram, cpus: u8) -> Result<(), Error> {
    ram.write_at(FLOATING_POINTER, &floating_pointer())?;
    ram.write_at(TABLE, &table(cpus))
}

fn floating_pointer() -> Vec<u8> {
    let mut bytes = b"_MP_".to_vec();
    bytes.extend(address(TABLE));
    bytes.extend([1, SPEC_1_4, 0, 0, 0, 0, 0, 0]);
    checksum(&mut bytes, 10);
    bytes
}

fn table(cpus: u8) -> Vec<u8> {
    // An id that no processor has, as long as one is left.
    let ioapic_id = cpus;
    let mut entries = Vec::new();
    for id in 0..cpus {
        let flags = if id == 0 { ENABLED | BOOT_CPU } else { ENABLED };
        entries.extend([0, id, APIC_VERSION, flags]);
        // Signature and features: family 6, FPU and APIC. Kernels prefer the values of CPUID.
        entries.extend([0, 6, 0, 0, 1, 2, 0, 0]);
        entries.extend([0; 8]);
    }
    entries.extend([1, ISA_BUS]);
    entries.extend(b"ISA   ");
    entries.extend([2, ioapic_id, APIC_VERSION, ENABLED]);
    entries.extend(address(IOAPIC));
    let pins = u8::try_from(IOAPIC_PINS).unwrap_or(u8::MAX);
    for pin in 0..pins {
        // Flags 0: as the bus defines, which is edge-triggered and active high.
        entries.extend([3, INTERRUPT, 0, 0, ISA_BUS, pin, ioapic_id, pin]);
    }
    entries.extend([4, EXT_INT, 0, 0, ISA_BUS, 0, 0, 0]);
    entries.extend([4, NMI, 0, 0, ISA_BUS, 0, TO_ALL_APICS, 1]);

    let count = u16::from(cpus) + 2 + u16::from(pins) + 2;
    let len = u16::try_from(entries.len() + 44).unwrap_or(u16::MAX);
    let mut bytes = b"PCMP".to_vec();
    bytes.extend(len.to_le_bytes());
    bytes.extend([SPEC_1_4, 0]);
    bytes.extend(b"OUTBOARDVIRTUAL VM  ");
    bytes.extend([0; 6]);
    bytes.extend(count.to_le_bytes());
    bytes.extend(address(LOCAL_APIC));
    bytes.extend([0; 4]);
    bytes.extend(entries);
    checksum(&mut bytes, 7);
    bytes
}

/// All addresses here are constants below 4 GiB.
fn address(at: Gpa) -> [u8; 4] {
    u32::try_from(at.0).unwrap_or(u32::MAX).to_le_bytes()
}

fn checksum(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    if let Some(slot) = bytes.get_mut(at) {
        *slot = slot.wrapping_sub(sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    #[test]
    fn pointer_and_table_sum_to_zero_and_entries_fill_the_table() {
        assert_eq!((floating_pointer().len(), sum(&floating_pointer())), (16, 0));
        for cpus in [1, 4, 255] {
            let table = table(cpus);
            assert_eq!(sum(&table), 0);
            assert_eq!(usize::from(u16::from_le_bytes([table[4], table[5]])), table.len());
            let (mut at, mut count) = (44, 0);
            while at < table.len() {
                at += if table[at] == 0 { 20 } else { 8 };
                count += 1;
            }
            assert_eq!((at, count), (table.len(), u16::from_le_bytes([table[34], table[35]])));
            assert!(table.len() < 0x1_0000 - 16);
        }
    }
}
