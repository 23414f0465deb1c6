//! ACPI tables for any machine: each one is reached, sums to zero and is well-formed to its last byte.
#![no_main]

use arch::irq::Gsi;
use arch::layout::{ACPI_TABLES, Gpa, virtio_mmio_slot};
use arch::platform::{Discovery, PciRoot, PciSlots, Platform, SerialPort, VirtioMmio};
use fuzz::input::Input;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let platform = platform(&mut input);
    let _ = platform.device_parameters();
    let bytes = match arch::acpi::tables(&platform) {
        Ok(bytes) => bytes,
        Err(error) => {
            assert!(
                platform.virtio_mmio.iter().any(|device| device.base.0 >> 32 != 0 || device.size >> 32 != 0)
            );
            return drop(error.to_string());
        }
    };
    assert_eq!(&bytes[..8], b"RSD PTR ");
    assert_eq!((sum(&bytes[..20]), sum(&bytes[..36])), (0, 0));
    let xsdt = table(&bytes, u64_at(&bytes, 24), b"XSDT");
    let more = usize::from(platform.pci.is_some());
    assert_eq!(xsdt.len(), 36 + 16 + 8 * more);
    let fadt = table(&bytes, u64_at(xsdt, 36), b"FACP");
    let madt = table(&bytes, u64_at(xsdt, 44), b"APIC");
    assert_eq!(madt.len(), 44 + 8 * usize::from(platform.cpus) + 12);
    let dsdt = table(&bytes, u64_at(fadt, 140), b"DSDT");
    let nodes = aml(&dsdt[36..]);
    let events = usize::from(platform.pci.is_some_and(|root| !root.removable.is_empty()));
    // The port at which a guest tells of its panic is on every machine.
    let always = 1;
    let serial = usize::from(platform.serial.is_some());
    assert_eq!(nodes, always + platform.virtio_mmio.len() + serial + 2 * more + events);
});

fn platform(input: &mut Input) -> Platform {
    let cpus = input.byte().max(1);
    let serial = input.rarely(2).then(|| SerialPort { port: input.u16(), gsi: Gsi(input.u32()) });
    let discovery = if input.rarely(4) { Discovery::Cmdline } else { Discovery::Acpi };
    let count = usize::from(input.byte() % 80);
    let mut device = |n| match virtio_mmio_slot(n) {
        Some(slot) if !input.rarely(16) => slot,
        _ => VirtioMmio { base: Gpa(input.number()), size: input.number(), gsi: Gsi(input.number() as u32) },
    };
    let virtio_mmio = (0..count).map(&mut device).collect();
    let pci = input.rarely(2).then(|| {
        let slots = (0..input.byte() % 32).map(|_| input.byte()).fold(PciSlots::default(), PciSlots::with);
        PciRoot { removable: slots, ..PciRoot::new(input.byte(), Gpa(input.number())) }
    });
    Platform { cpus, virtio_mmio, pci, serial, discovery }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn table<'a>(bytes: &'a [u8], address: u64, signature: &[u8]) -> &'a [u8] {
    let at = usize::try_from(address - ACPI_TABLES.0).expect("in the area");
    let length = u32::from_le_bytes(bytes[at + 4..at + 8].try_into().expect("four bytes"));
    let table = &bytes[at..at + length as usize];
    assert_eq!((&table[..4], sum(table)), (signature, 0));
    table
}

/// The length that a package length says, and the bytes that it takes itself.
fn package_length(aml: &[u8]) -> (usize, usize) {
    let more = usize::from(aml[0] >> 6);
    if more == 0 {
        return (usize::from(aml[0] & 0x3f), 1);
    }
    let high = (0..more).map(|n| usize::from(aml[1 + n]) << (4 + 8 * n)).sum::<usize>();
    (usize::from(aml[0] & 0xf) | high, 1 + more)
}

/// Walks the scope of the system bus and counts its devices; every byte belongs to a term.
fn aml(aml: &[u8]) -> usize {
    // ScopeOp \_SB_
    assert_eq!(aml[0], 0x10);
    let (length, size) = package_length(&aml[1..]);
    let mut inside = &aml[1 + size..1 + length];
    assert!(inside.starts_with(b"\\_SB_"), "{inside:x?}");
    inside = &inside[5..];
    let mut nodes = 0;
    while !inside.is_empty() {
        // DeviceOp
        assert_eq!(inside[..2], [0x5b, 0x82]);
        let (length, _) = package_length(&inside[2..]);
        inside = &inside[2 + length..];
        nodes += 1;
    }
    // NameOp \_S5_ and its package end the table.
    let rest = &aml[1 + length..];
    assert!(rest.starts_with(b"\x08\\_S5_\x12"), "{rest:x?}");
    let (length, _) = package_length(&rest[7..]);
    assert_eq!(rest.len(), 7 + length);
    nodes
}
