//! The DSDT. It has one node for every device that no bus can enumerate, and the S5 state.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, ONE, Package, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::sdt::Sdt;

use super::{Error, OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::layout::{PVPANIC_PORT, S5_SLEEP_TYPE, SERIAL_PORTS};
use crate::platform::{Platform, SerialPort, VirtioMmio};

/// Integers have 64 bits from revision 2 on.
const REVISION: u8 = 2;
const HEADER: u32 = 36;

pub(super) fn table(platform: &Platform) -> Result<Sdt, Error> {
    let mut devices = Vec::new();
    if let Some(serial) = &platform.serial {
        serial_port(serial, &mut devices);
    }
    pvpanic(&mut devices);
    for (n, device) in platform.virtio_mmio.iter().enumerate() {
        let others = platform.virtio_mmio.iter().filter(|other| other.gsi == device.gsi).count();
        virtio_mmio(n, device, others > 1, &mut devices)?;
    }
    if let Some(root) = &platform.pci {
        super::pci::root(root, &mut devices)?;
        if !root.removable.is_empty() {
            super::hotplug::event_device(&mut devices);
        }
    }

    let mut table = Sdt::new(*b"DSDT", HEADER, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let mut aml = Scope::raw(Path::new("\\_SB_"), devices);
    Name::new(Path::new("\\_S5_"), &Package::new(vec![&S5_SLEEP_TYPE, &S5_SLEEP_TYPE, &ZERO, &ZERO]))
        .to_aml_bytes(&mut aml);
    table.append_slice(&aml);
    Ok(table)
}

fn serial_port(serial: &SerialPort, aml: &mut Vec<u8>) {
    let ports = u8::try_from(SERIAL_PORTS).unwrap_or(u8::MAX);
    Device::new(
        Path::new("COM1"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &IO::new(serial.port, serial.port, 1, ports),
                    &Interrupt::new(true, true, false, false, serial.gsi.0),
                ]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

/// The pvpanic device. Linux's driver `pvpanic-mmio` serves a port as well.
fn pvpanic(aml: &mut Vec<u8>) {
    Device::new(
        Path::new("PEVT"),
        vec![
            &Name::new(Path::new("_HID"), &"QEMU0001"),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&IO::new(PVPANIC_PORT, PVPANIC_PORT, 1, 1)]),
            ),
            &Name::new(Path::new("_STA"), &0xf_u8),
        ],
    )
    .to_aml_bytes(aml);
}

/// A virtio-mmio device. Linux's driver looks for `LNRO0005`.
fn virtio_mmio(n: usize, device: &VirtioMmio, shares_pin: bool, aml: &mut Vec<u8>) -> Result<(), Error> {
    let unreachable = || Error::Unreachable { at: device.base };
    let base = u32::try_from(device.base.0).map_err(|_| unreachable())?;
    let size = u32::try_from(device.size).map_err(|_| unreachable())?;
    Device::new(
        Path::new(&format!("V{n:03X}")),
        vec![
            &Name::new(Path::new("_HID"), &"LNRO0005"),
            &Name::new(Path::new("_UID"), &n),
            &Name::new(Path::new("_CCA"), &ONE),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, base, size),
                    &Interrupt::new(true, true, false, shares_pin, device.gsi.0),
                ]),
            ),
        ],
    )
    .to_aml_bytes(aml);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::irq::Gsi;
    use crate::layout::Gpa;
    use crate::platform::{Discovery, PciRoot, PciSlots};

    fn contains(haystack: &[u8], needle: &[u8]) -> bool {
        haystack.windows(needle.len()).any(|window| window == needle)
    }

    #[test]
    fn a_virtio_mmio_node_carries_its_page_and_its_edge_triggered_pin() {
        let device = VirtioMmio { base: Gpa(0xd000_1000), size: 4096, gsi: Gsi(6) };
        let mut aml = Vec::new();
        virtio_mmio(1, &device, false, &mut aml).unwrap();
        assert!(contains(&aml, b"V001") && contains(&aml, b"LNRO0005\0"));
        assert!(contains(&aml, &[0x86, 9, 0, 1, 0x00, 0x10, 0x00, 0xd0, 0x00, 0x10, 0, 0]));
        assert!(contains(&aml, &[0x89, 6, 0, 0b0011, 1, 6, 0, 0, 0]));
        aml.clear();
        virtio_mmio(1, &device, true, &mut aml).unwrap();
        assert!(contains(&aml, &[0x89, 6, 0, 0b1011, 1, 6, 0, 0, 0]));
    }

    /// Disassembles the table with ACPICA's compiler and compiles it again.
    #[test]
    fn acpica_takes_the_table_of_a_machine_with_everything() {
        use std::process::{Command, Stdio};
        let works = Command::new("iasl").arg("-v").stdout(Stdio::null()).status();
        if !works.is_ok_and(|status| status.success()) {
            println!("skipped: there is no iasl (Debian's acpica-tools)");
            return;
        }
        let slots = (1..32).fold(PciSlots::default(), PciSlots::with);
        let platform = Platform {
            cpus: 1,
            virtio_mmio: vec![VirtioMmio { base: Gpa(0xd000_1000), size: 4096, gsi: Gsi(6) }],
            pci: Some(PciRoot { removable: slots, ..PciRoot::new(46, Gpa(1 << 32)) }),
            serial: Some(SerialPort::COM1),
            discovery: Discovery::Acpi,
        };
        let mut bytes = Vec::new();
        table(&platform).unwrap().to_aml_bytes(&mut bytes);
        let folder = std::env::temp_dir().join(format!("outboard-dsdt-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("dsdt.aml"), &bytes).unwrap();
        let run = |arguments: &[&str]| {
            let done = Command::new("iasl").args(arguments).current_dir(&folder).output().unwrap();
            let said = [done.stdout, done.stderr].concat();
            (done.status.success(), String::from_utf8_lossy(&said).into_owned())
        };
        let (apart, together) = (run(&["-d", "dsdt.aml"]), run(&["-we", "-p", "again", "dsdt.dsl"]));
        let source = std::fs::read_to_string(folder.join("dsdt.dsl")).unwrap_or_default();
        std::fs::remove_dir_all(&folder).unwrap();
        assert!(apart.0 && together.0, "{}\n{}\n{source}", apart.1, together.1);
        for part in ["Notify (S1F, 0x03)", "Device (GED)", "Local0 = GONE", "EJCT = 0x80000000", "QEMU0001"] {
            assert!(source.contains(part), "{part} is not in\n{source}");
        }
    }

    #[test]
    fn a_device_above_four_gib_is_refused() {
        let device = VirtioMmio { base: Gpa(1 << 32), size: 4096, gsi: Gsi(6) };
        assert!(matches!(virtio_mmio(0, &device, false, &mut Vec::new()), Err(Error::Unreachable { .. })));
    }
}
