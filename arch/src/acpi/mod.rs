//! ACPI 6.5 tables of a hardware-reduced machine: RSDP, XSDT, FADT, MADT, DSDT, and MCFG with PCI. The tables
//! also say which devices of a PC are absent (8259, PIT, 8042, CMOS clock, VGA), so that a guest does not
//! probe for them.
//!
//! All functions except [`load`] are pure.

mod dsdt;
mod hotplug;
mod pci;

use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};

use crate::layout::{
    ACPI_TABLES, Gpa, HIGH_MEMORY, IOAPIC, LOCAL_APIC, RESET_PORT, RESET_VALUE, SLEEP_CONTROL_PORT,
    SLEEP_STATUS_PORT,
};
use crate::platform::Platform;
use crate::ram::{self, Ram};
use crate::width::to_u64;

const OEM_ID: [u8; 6] = *b"OUTBRD";
const OEM_TABLE_ID: [u8; 8] = *b"OUTBOARD";
const OEM_REVISION: u32 = 1;
/// The alignment of each table in bytes.
const TABLE_ALIGN: usize = 16;

/// IA-PC boot flags of the FADT (ACPI 6.5 §5.2.9.3). The flags for legacy devices and the 8042 stay clear.
const BOOT_NO_VGA: u16 = 1 << 2;
const BOOT_NO_CMOS_CLOCK: u16 = 1 << 5;

/// Errors of this module.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The tables do not fit in their area.
    #[error("the ACPI tables have {size} bytes, {room} are free")]
    TooLarge {
        /// Their size in bytes.
        size: usize,
        /// Size of the area in bytes.
        room: u64,
    },
    /// A device cannot be described.
    #[error("the virtio-mmio device at {at} is not below 4 GiB")]
    Unreachable {
        /// Its register page.
        at: Gpa,
    },
    /// The tables could not be written.
    #[error("cannot write the ACPI tables")]
    Ram(#[from] ram::Error),
}

/// Writes the tables into guest memory and returns the address of the RSDP.
pub fn load(ram: &Ram, platform: &Platform) -> Result<Gpa, Error> {
    let bytes = tables(platform)?;
    let room = HIGH_MEMORY.0 - ACPI_TABLES.0;
    if to_u64(bytes.len()) > room {
        return Err(Error::TooLarge { size: bytes.len(), room });
    }
    ram.write_at(ACPI_TABLES, &bytes)?;
    Ok(ACPI_TABLES)
}

/// All tables as they lie in memory at [`ACPI_TABLES`]. The RSDP comes first.
pub fn tables(platform: &Platform) -> Result<Vec<u8>, Error> {
    let mut area = Area { bytes: vec![0; Rsdp::len()] };
    let dsdt = area.place(&dsdt::table(platform)?);
    let fadt = area.place(&fadt(dsdt));
    let madt = area.place(&madt(platform.cpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let mcfg = platform.pci.as_ref().map(|root| area.place(&pci::mcfg(root)));
    for table in [fadt, madt].into_iter().chain(mcfg) {
        xsdt.add_entry(table);
    }
    let xsdt = area.place(&xsdt);
    area.put_first(&Rsdp::new(OEM_ID, xsdt));
    Ok(area.bytes)
}

/// Tables, one after the other.
struct Area {
    bytes: Vec<u8>,
}

impl AmlSink for Area {
    fn byte(&mut self, byte: u8) {
        self.bytes.push(byte);
    }
}

impl Area {
    /// Appends a table and returns its address.
    fn place(&mut self, table: &dyn Aml) -> u64 {
        let at = self.bytes.len().next_multiple_of(TABLE_ALIGN);
        self.bytes.resize(at, 0);
        table.to_aml_bytes(self);
        ACPI_TABLES.0 + to_u64(at)
    }

    /// Writes a table into the room left at the start.
    fn put_first(&mut self, table: &dyn Aml) {
        let mut first = Vec::new();
        table.to_aml_bytes(&mut first);
        for (slot, byte) in self.bytes.iter_mut().zip(first) {
            *slot = byte;
        }
    }
}

fn fadt(dsdt: u64) -> impl Aml {
    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port));
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::Wbinvd)
        // When PWR_BUTTON, SLP_BUTTON or FIX_RTC is set, the machine has no such fixed feature.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::Headless)
        .flag(Flags::ResetRegSup);
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt.iapc_boot_arch = (BOOT_NO_VGA | BOOT_NO_CMOS_CLOCK).into();
    fadt.finalize()
}

/// The local APICs and one IOAPIC. The flag PCAT_COMPAT is clear and there is no interrupt source override. A
/// GSI is therefore a pin of the IOAPIC, and no pin has the meaning of an ISA line.
fn madt(cpus: u8) -> impl Aml {
    // Both addresses are constants below 4 GiB.
    let address = |at: Gpa| u32::try_from(at.0).unwrap_or(u32::MAX);
    let local = LocalInterruptController::Address(address(LOCAL_APIC));
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, local);
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, address(IOAPIC), 0));
    madt
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::virtio_mmio_slot;
    use crate::platform::{Discovery, PciRoot, PciSlots, SerialPort};

    fn platform(cpus: u8, devices: usize) -> Platform {
        Platform {
            cpus,
            virtio_mmio: (0..devices).map(|n| virtio_mmio_slot(n).unwrap()).collect(),
            pci: None,
            serial: Some(SerialPort::COM1),
            discovery: Discovery::Acpi,
        }
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn table_at(bytes: &[u8], address: u64) -> &[u8] {
        let at = usize::try_from(address - ACPI_TABLES.0).unwrap();
        let len = usize::try_from(u32_at(bytes, at + 4)).unwrap();
        let table = &bytes[at..at + len];
        assert_eq!(sum(table), 0, "checksum of {:?}", &table[..4]);
        table
    }

    #[test]
    fn every_table_is_reached_from_the_rsdp_and_sums_to_zero() {
        let bytes = tables(&platform(4, 3)).unwrap();
        assert_eq!(&bytes[..8], b"RSD PTR ");
        assert_eq!((sum(&bytes[..20]), sum(&bytes[..36]), bytes[15]), (0, 0, 2));
        let xsdt = table_at(&bytes, u64_at(&bytes, 24));
        assert_eq!((&xsdt[..4], xsdt.len()), (b"XSDT".as_slice(), 36 + 16));
        let fadt = table_at(&bytes, u64_at(xsdt, 36));
        assert_eq!((&fadt[..4], fadt.len(), fadt[8]), (b"FACP".as_slice(), 276, 6));
        assert_eq!(&table_at(&bytes, u64_at(fadt, 140))[..4], b"DSDT");
        let madt = table_at(&bytes, u64_at(xsdt, 44));
        assert_eq!((&madt[..4], madt.len()), (b"APIC".as_slice(), 44 + 4 * 8 + 12));
    }

    #[test]
    fn a_pci_root_adds_a_table_with_its_configuration_space() {
        let bytes = tables(&Platform { pci: Some(PciRoot::new(40, HIGH_MEMORY)), ..platform(1, 0) }).unwrap();
        let xsdt = table_at(&bytes, u64_at(&bytes, 24));
        assert_eq!(xsdt.len(), 36 + 24);
        let mcfg = table_at(&bytes, u64_at(xsdt, 52));
        assert_eq!((&mcfg[..4], mcfg.len()), (b"MCFG".as_slice(), 44 + 16));
        assert_eq!((u64_at(mcfg, 44), &mcfg[52..56]), (0xe000_0000, [0; 4].as_slice()));
    }

    #[test]
    fn the_fadt_names_reset_and_sleep_ports_and_denies_legacy_devices() {
        let mut fadt_bytes = Vec::new();
        fadt(0xe_0100).to_aml_bytes(&mut fadt_bytes);
        let flags = u32_at(&fadt_bytes, 112);
        assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
        assert_eq!(&fadt_bytes[109..111], [0b10_0100, 0], "IA-PC boot flags");
        assert_eq!(
            (&fadt_bytes[116..120], u64_at(&fadt_bytes, 120), fadt_bytes[128]),
            ([1, 8, 0, 1].as_slice(), 0x602, 1)
        );
        assert_eq!((u64_at(&fadt_bytes, 248), u64_at(&fadt_bytes, 260)), (0x600, 0x601));
    }

    #[test]
    fn the_largest_machine_still_fits_its_area() {
        let removable = (1..32).fold(PciSlots::default(), PciSlots::with);
        let pci = Some(PciRoot { removable, ..PciRoot::new(46, HIGH_MEMORY) });
        let bytes = tables(&Platform { pci, ..platform(255, crate::layout::VIRTIO_MMIO_MAX) }).unwrap();
        assert!(bytes.len() <= usize::try_from(HIGH_MEMORY.0 - ACPI_TABLES.0).unwrap());
    }
}
