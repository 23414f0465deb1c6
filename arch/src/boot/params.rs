//! The data that a kernel gets at its start: the memory map, and the structure of each protocol that contains
//! it (`boot_params` of Linux, `hvm_start_info` of PVH).

use linux_loader::bootparam::{boot_e820_entry, boot_params as BootParams, setup_header};
use linux_loader::start_info::{
    XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_MEMMAP_TYPE_RESERVED, XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry,
    hvm_modlist_entry, hvm_start_info,
};
use vm_memory::ByteValued;

use super::{Error, Placed};
use crate::layout::{ACPI_TABLES, CMDLINE, EBDA, EBDA_END, Gpa, HIGH_MEMORY, PVH_START_INFO};
use crate::ram::Ram;
use crate::width::to_u64;

/// The types of memory have the same values in E820 and PVH.
const TYPE_RAM: u32 = XEN_HVM_MEMMAP_TYPE_RAM;
const TYPE_RESERVED: u32 = XEN_HVM_MEMMAP_TYPE_RESERVED;

const HEADER_MAGIC: u32 = 0x5372_6448; // "HdrS"
const BOOT_FLAG: u16 = 0xaa55;
const LOADER_UNDEFINED: u8 = 0xff;
const LOADED_HIGH: u8 = 1;
/// The protocol version that is reported when the kernel has brought no header.
const VERSION: u16 = 0x20f;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MapEntry {
    start: u64,
    size: u64,
    kind: u32,
}

/// The memory map: all of RAM, with the EBDA and the ACPI tables reserved. The gap between these two is left
/// out. It is RAM, but kernels expect the VGA window there.
pub(super) fn memory_map(ram: &Ram) -> Vec<MapEntry> {
    let entry = |start: Gpa, end: u64, kind| MapEntry { start: start.0, size: end - start.0, kind };
    let mut map = vec![
        entry(Gpa(0), EBDA.0, TYPE_RAM),
        entry(EBDA, EBDA_END.0, TYPE_RESERVED),
        entry(ACPI_TABLES, HIGH_MEMORY.0, TYPE_RESERVED),
    ];
    for region in ram.regions() {
        let start = region.guest.max(HIGH_MEMORY);
        map.push(entry(start, region.guest.0 + region.size, TYPE_RAM));
    }
    map
}

/// `boot_params`, the "zero page".
pub(super) fn boot_params(
    header: Option<setup_header>,
    map: &[MapEntry],
    initramfs: Option<Placed>,
    rsdp: Option<Gpa>,
    cmdline_len: usize,
) -> Result<Vec<u8>, Error> {
    let mut params = BootParams {
        hdr: header.unwrap_or(setup_header {
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            version: VERSION,
            loadflags: LOADED_HIGH,
            kernel_alignment: 16 << 20,
            cmdline_size: u32::try_from(cmdline_len).unwrap_or(u32::MAX),
            ..Default::default()
        }),
        acpi_rsdp_addr: rsdp.map_or(0, |rsdp| rsdp.0),
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    (params.hdr.cmd_line_ptr, params.ext_cmd_line_ptr) = halves(CMDLINE.0);
    if let Some(initramfs) = initramfs {
        (params.hdr.ramdisk_image, params.ext_ramdisk_image) = halves(initramfs.at.0);
        (params.hdr.ramdisk_size, params.ext_ramdisk_size) = halves(initramfs.size);
    }
    let mut table = params.e820_table;
    let mut count = 0_u8;
    for (slot, entry) in table.iter_mut().zip(map) {
        *slot = boot_e820_entry { addr: entry.start, size: entry.size, r#type: entry.kind };
        count += 1;
    }
    params.e820_table = table;
    params.e820_entries = count;
    Ok(params.as_slice().to_vec())
}

/// `hvm_start_info`, followed by its modules and memory map, as it lies in memory at [`PVH_START_INFO`].
pub(super) fn start_info(map: &[MapEntry], initramfs: Option<Placed>, rsdp: Option<Gpa>) -> Vec<u8> {
    let modules_at = PVH_START_INFO.0 + to_u64(size_of::<hvm_start_info>());
    let modules: Vec<_> = initramfs
        .iter()
        .map(|placed| hvm_modlist_entry { paddr: placed.at.0, size: placed.size, ..Default::default() })
        .collect();
    let map_at = modules_at + to_u64(size_of::<hvm_modlist_entry>() * modules.len());
    let info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        flags: 0,
        nr_modules: u32::try_from(modules.len()).unwrap_or(0),
        modlist_paddr: if modules.is_empty() { 0 } else { modules_at },
        cmdline_paddr: CMDLINE.0,
        rsdp_paddr: rsdp.map_or(0, |rsdp| rsdp.0),
        memmap_paddr: map_at,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        reserved: 0,
    };
    let mut bytes = info.as_slice().to_vec();
    for module in &modules {
        bytes.extend_from_slice(module.as_slice());
    }
    for entry in map {
        let entry =
            hvm_memmap_table_entry { addr: entry.start, size: entry.size, type_: entry.kind, reserved: 0 };
        bytes.extend_from_slice(entry.as_slice());
    }
    bytes
}

fn halves(value: u64) -> (u32, u32) {
    let [b0, b1, b2, b3, b4, b5, b6, b7] = value.to_le_bytes();
    (u32::from_le_bytes([b0, b1, b2, b3]), u32::from_le_bytes([b4, b5, b6, b7]))
}
