//! Hot-unplug in ACPI (ACPI 6.5 §5.6.9, §6.3): the generic event device, and one PCI slot for each device
//! that can be removed. The guest calls `_EVT` after an interrupt of the event device. The methods read and
//! write the registers of `devices::pci::hotplug`.
//!
//! ```text
//! \_SB.GED._EVT ──▶ \_SB.PCI0.PCNT   reads GONE, and asks for the ejection of what is in it
//! \_SB.PCI0.Snn._STA                 reads PRESENT
//! \_SB.PCI0.Snn._EJ0                 writes EJECT
//! ```
//! A further source of events would add one more call to `_EVT`.

use acpi_tables::Aml;
use acpi_tables::aml::{
    And, Device, Field, FieldAccessType, FieldEntry, FieldLockRule, FieldUpdateRule, If, Interrupt, Local,
    Method, MethodCall, Name, Notify, OpRegion, OpRegionSpace, Path, ResourceTemplate, Return, Store, ZERO,
};

use crate::layout::{EVENT_GSI, PCI_HOTPLUG_PORTS, PCI_HOTPLUG_PORTS_SIZE};
use crate::platform::PciSlots;

/// The argument of `Notify` that asks a guest to eject a device. Linux does not react to "device check" here;
/// `devices::pci::hotplug` gives the reason.
const EJECT_REQUEST: u8 = 3;
/// `_STA` of a device that is present, enabled, shown and working.
const WORKS: u8 = 0xf;

/// The generic event device. Its line is level-triggered, so an event that comes before the driver is not
/// lost.
pub(super) fn event_device(aml: &mut Vec<u8>) {
    Device::new(
        Path::new("GED_"),
        vec![
            &Name::new(Path::new("_HID"), &"ACPI0013"),
            &Name::new(Path::new("_UID"), &ZERO),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![&Interrupt::new(true, false, false, false, EVENT_GSI.0)]),
            ),
            &Method::new(
                Path::new("_EVT"),
                1,
                true,
                vec![&MethodCall::new(Path::new("\\_SB_.PCI0.PCNT"), vec![])],
            ),
        ],
    )
    .to_aml_bytes(aml);
}

/// The nodes below the PCI root: the registers, the method that reads them, and a device for each slot.
pub(super) fn slots(slots: PciSlots) -> Vec<u8> {
    let mut aml = Vec::new();
    let length = u8::try_from(PCI_HOTPLUG_PORTS_SIZE).unwrap_or(u8::MAX);
    OpRegion::new(Path::new("PHPR"), OpRegionSpace::SystemIO, &PCI_HOTPLUG_PORTS, &length)
        .to_aml_bytes(&mut aml);
    let fields = [*b"GONE", *b"PRES", *b"EJCT"].map(|name| FieldEntry::Named(name, 32));
    Field::new(
        Path::new("PHPR"),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        fields.into(),
    )
    .to_aml_bytes(&mut aml);

    let mut requests = Vec::new();
    for number in slots.iter() {
        let (name, bit) = (Path::new(&format!("S{number:02X}_")), 1_u32 << number);
        slot(name, number, bit, &mut aml);
        If::new(
            &And::new(&ZERO, &Local(0), &bit),
            vec![&Notify::new(&Path::new(&format!("S{number:02X}_")), &EJECT_REQUEST)],
        )
        .to_aml_bytes(&mut requests);
    }
    // The read clears the register, so it is read once. A later event causes another interrupt.
    Method::new(
        Path::new("PCNT"),
        0,
        true,
        vec![&Store::new(&Local(0), &Path::new("GONE")), &Bytes(requests)],
    )
    .to_aml_bytes(&mut aml);
    aml
}

fn slot(name: Path, number: u8, bit: u32, aml: &mut Vec<u8>) {
    Device::new(
        name,
        vec![
            &Name::new(Path::new("_ADR"), &(u32::from(number) << 16)),
            &Name::new(Path::new("_SUN"), &number),
            &Method::new(
                Path::new("_STA"),
                0,
                false,
                vec![
                    &If::new(&And::new(&ZERO, &Path::new("PRES"), &bit), vec![&Return::new(&WORKS)]),
                    &Return::new(&ZERO),
                ],
            ),
            &Method::new(Path::new("_EJ0"), 1, false, vec![&Store::new(&Path::new("EJCT"), &bit)]),
        ],
    )
    .to_aml_bytes(aml);
}

/// AML that is already encoded.
pub(super) struct Bytes(pub(super) Vec<u8>);

impl Aml for Bytes {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(haystack: &[u8], needle: &[u8]) -> usize {
        haystack.windows(needle.len()).filter(|window| *window == needle).count()
    }

    #[test]
    fn the_event_device_has_a_level_triggered_line_and_asks_the_root() {
        let mut aml = Vec::new();
        event_device(&mut aml);
        assert_eq!(count(&aml, b"ACPI0013\0"), 1);
        assert_eq!(count(&aml, &[0x89, 6, 0, 0b0001, 1, 9, 0, 0, 0]), 1, "level, high, exclusive, 9");
        // A method of one argument, serialized, that does nothing but call.
        assert_eq!(count(&aml, b"_EVT\x09\\\x2f\x03_SB_PCI0PCNT"), 1, "{aml:x?}");
    }

    #[test]
    fn a_slot_names_its_device_asks_for_its_bit_and_ejects_it() {
        let aml = slots(PciSlots::default().with(2).with(31));
        assert_eq!(count(&aml, b"\x5b\x80PHPR\x01\x0b\x10\x06\x0a\x0c"), 1, "12 ports from 0x610");
        assert_eq!(count(&aml, b"PHPR\x03GONE\x20PRES\x20EJCT\x20"), 1, "dwords, kept as they are");
        // Slot 2: address 2 << 16, number 2.
        assert_eq!(count(&aml, b"S02_\x08_ADR\x0c\0\0\x02\0\x08_SUN\x0a\x02"), 1, "{aml:x?}");
        for (name, bit) in [(b"S02_", [0x0a, 4].as_slice()), (b"S1F_", &[0x0c, 0, 0, 0, 0x80])] {
            let status = [b"\x7bPRES".as_slice(), bit, &[0, 0xa4, 0x0a, 0x0f, 0xa4, 0]].concat();
            let eject = [b"_EJ0\x01\x70".as_slice(), bit, b"EJCT"].concat();
            let request = [&[0x7b, 0x60], bit, &[0, 0x86], name.as_slice(), &[0x0a, 3]].concat();
            for part in [status, eject, request] {
                assert_eq!(count(&aml, &part), 1, "{part:x?} in {aml:x?}");
            }
        }
    }
}
