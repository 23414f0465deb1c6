//! The PCI root in ACPI (PCI Firmware 3.3 §4). The MCFG gives its configuration space. The DSDT reserves the
//! configuration space and gives the windows, interrupt lines and slots.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Memory32Fixed, Name, ONE, Package, Path,
    ResourceTemplate, ZERO,
};
use acpi_tables::mcfg::MCFG;

use super::hotplug::{Bytes, slots};
use super::{Error, OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::layout::{
    PCI_CONFIG_PORTS, PCI_CONFIG_PORTS_SIZE, PCI_HOTPLUG_PORTS, PCI_HOTPLUG_PORTS_SIZE, intx_gsi,
};
use crate::platform::{AddressRange, PciRoot};

/// The number of devices on a bus.
const DEVICES: u8 = 32;

/// The MCFG, which gives the address of the configuration space.
pub(super) fn mcfg(root: &PciRoot) -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(root.ecam.base.0, 0, 0, 0);
    mcfg
}

/// The PCI root. It includes a reservation of the configuration space, because Linux does not trust an MCFG
/// without one.
pub(super) fn root(root: &PciRoot, aml: &mut Vec<u8>) -> Result<(), Error> {
    let low = |value: u64| u32::try_from(value).map_err(|_| Error::Unreachable { at: root.ecam.base });
    let last = |range: AddressRange| range.base.0.saturating_add(range.size.saturating_sub(1));
    let ports = u8::try_from(PCI_CONFIG_PORTS_SIZE).unwrap_or(u8::MAX);

    let buses = AddressSpace::new_bus_number(0_u16, 0);
    let config = IO::new(PCI_CONFIG_PORTS, PCI_CONFIG_PORTS, 1, ports);
    let io = AddressSpace::new_io(root.io, root.io.saturating_add(root.io_size.saturating_sub(1)), None);
    let cacheable = AddressSpaceCacheable::NotCacheable;
    let (first, end) = (low(root.memory32.base.0)?, low(last(root.memory32))?);
    let memory32 = AddressSpace::new_memory(cacheable, true, first, end, None);
    let memory64 = root.memory64.map(|range| {
        AddressSpace::new_memory(AddressSpaceCacheable::NotCacheable, true, range.base.0, last(range), None)
    });
    let mut resources: Vec<&dyn Aml> = vec![&buses, &config, &io, &memory32];
    if let Some(memory64) = &memory64 {
        resources.push(memory64);
    }

    let lines = routes();
    let lines: Vec<Package<'_>> =
        lines.iter().map(|(address, pin, gsi)| Package::new(vec![address, pin, &ZERO, gsi])).collect();
    let removable = !root.removable.is_empty();
    let slots = Bytes(if removable { slots(root.removable) } else { Vec::new() });
    Device::new(
        Path::new("PCI0"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0A08")),
            &Name::new(Path::new("_CID"), &EISAName::new("PNP0A03")),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_SEG"), &ZERO),
            &Name::new(Path::new("_BBN"), &ZERO),
            &Name::new(Path::new("_CCA"), &ONE),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(resources)),
            &Name::new(Path::new("_PRT"), &Package::new(lines.iter().map(|line| line as &dyn Aml).collect())),
            &slots,
        ],
    )
    .to_aml_bytes(aml);

    let ecam = Memory32Fixed::new(true, low(root.ecam.base.0)?, low(root.ecam.size)?);
    let ports = u8::try_from(PCI_HOTPLUG_PORTS_SIZE).unwrap_or(u8::MAX);
    let hotplug = IO::new(PCI_HOTPLUG_PORTS, PCI_HOTPLUG_PORTS, 1, ports);
    let mut reserved: Vec<&dyn Aml> = vec![&ecam];
    if removable {
        reserved.push(&hotplug);
    }
    Device::new(
        Path::new("ECAM"),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0C02")),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(Path::new("_CRS"), &ResourceTemplate::new(reserved)),
        ],
    )
    .to_aml_bytes(aml);
    Ok(())
}

/// The interrupt routes: the address of all functions of a device, the pin (0 is INTA here), the GSI.
fn routes() -> Vec<(u32, u8, u32)> {
    let all = (1..DEVICES).flat_map(|device| (0..4_u8).map(move |pin| (device, pin)));
    all.filter_map(|(device, pin)| {
        let gsi = intx_gsi(device, pin + 1)?;
        Some((u32::from(device) << 16 | 0xffff, pin, gsi.0))
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Gpa;
    use crate::platform::PciSlots;

    #[test]
    fn every_device_but_the_bridge_has_four_pins_with_a_line_each() {
        let routes = routes();
        assert_eq!(routes.len(), 31 * 4);
        assert_eq!(routes[0], (0x1_ffff, 0, 21));
        assert_eq!(routes[123], (0x1f_ffff, 3, 22));
    }

    #[test]
    fn slots_are_described_where_a_device_can_go_and_nowhere_else() {
        let aml = |removable| {
            let mut aml = Vec::new();
            root(&PciRoot { removable, ..PciRoot::new(40, Gpa(1 << 32)) }, &mut aml).unwrap();
            aml
        };
        let has = |aml: &[u8], name: &[u8]| aml.windows(name.len()).any(|window| window == name);
        let (none, some) = (aml(PciSlots::default()), aml(PciSlots::default().with(3)));
        for name in [b"PHPR".as_slice(), b"_EJ0", b"PCNT", &[0x47, 1, 0x10, 6, 0x10, 6, 1, 12]] {
            assert!(!has(&none, name) && has(&some, name), "{name:x?}");
        }
        assert!(has(&some, b"S03_") && !has(&some, b"S02_"));
    }

    #[test]
    fn windows_above_four_gib_are_left_out_where_there_are_none() {
        let aml = |bits| {
            let mut aml = Vec::new();
            root(&PciRoot::new(bits, Gpa(1 << 32)), &mut aml).unwrap();
            aml
        };
        let wide = [0x8a, 0x2b, 0, 0, 0x0c, 1];
        let has = |aml: &[u8]| aml.windows(wide.len()).any(|window| window == wide);
        assert!(has(&aml(40)) && !has(&aml(32)));
    }
}
