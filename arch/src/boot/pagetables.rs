//! The GDT and the page tables of the boot CPU at its start (Intel SDM vol. 3, chapters 3 and 4). The kernel
//! replaces both with its first instructions.

use crate::layout::{PAGE_SIZE, PAGE_TABLES};

/// Descriptors of the boot GDT in the order of their selectors. The Linux boot protocol requires flat code at
/// 0x10 and flat data at 0x18. PVH requires flat 32-bit code and data, and a TSS.
pub const GDT: [u64; 6] = [
    0,
    0x00cf_9b00_0000_ffff, // 0x08: 32-bit code, flat
    0x00af_9b00_0000_ffff, // 0x10: 64-bit code
    0x00cf_9300_0000_ffff, // 0x18: data, flat
    0x0000_8b00_0000_0067, // 0x20: 32-bit busy TSS
    0,                     // second half of the TSS descriptor in long mode
];

pub(super) fn gdt_bytes() -> Vec<u8> {
    GDT.iter().flat_map(|descriptor| descriptor.to_le_bytes()).collect()
}

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;
const ENTRIES: u64 = 512;
const DIRECTORIES: u64 = 4;

/// Page tables that map the first 4 GiB one to one: a PML4, a PDPT and four page directories. The pages have
/// 2 MiB, because not every CPU supports pages of 1 GiB.
pub(super) fn identity_4gib() -> Vec<u8> {
    let pdpt = PAGE_TABLES.0 + PAGE_SIZE;
    let first_directory = pdpt + PAGE_SIZE;
    let mut tables = Vec::with_capacity(6 * 4096);
    let mut page = |entries: &mut dyn Iterator<Item = u64>| {
        let start = tables.len();
        tables.extend(entries.flat_map(u64::to_le_bytes));
        tables.resize(start + 4096, 0);
    };
    page(&mut std::iter::once(pdpt | PRESENT_WRITABLE));
    page(&mut (0..DIRECTORIES).map(|n| (first_directory + n * PAGE_SIZE) | PRESENT_WRITABLE));
    for directory in 0..DIRECTORIES {
        page(&mut (0..ENTRIES).map(|n| ((directory * ENTRIES + n) << 21) | LARGE | PRESENT_WRITABLE));
    }
    tables
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks the tables as a CPU does.
    fn translate(tables: &[u8], address: u64) -> Option<u64> {
        let entry = |table: u64, index: u64| {
            let at = usize::try_from(table - PAGE_TABLES.0 + index * 8).unwrap();
            let value = u64::from_le_bytes(tables[at..at + 8].try_into().unwrap());
            (value & 1 == 1).then_some(value)
        };
        let base = |value: u64| value & 0x000f_ffff_ffff_f000;
        let pdpt = base(entry(PAGE_TABLES.0, address >> 39 & 511)?);
        let directory = base(entry(pdpt, address >> 30 & 511)?);
        let page = entry(directory, address >> 21 & 511)?;
        assert_eq!(page & LARGE, LARGE);
        Some((base(page) & !0x1f_ffff) | (address & 0x1f_ffff))
    }

    #[test]
    fn the_first_four_gib_are_mapped_one_to_one_and_nothing_else() {
        let tables = identity_4gib();
        assert_eq!(tables.len(), 6 * 4096);
        for address in (0..4 << 30).step_by((2 << 20) - 4096 + 8) {
            assert_eq!(translate(&tables, address), Some(address));
        }
        assert_eq!(translate(&tables, 4 << 30), None);
        assert_eq!(translate(&tables, 1 << 39), None);
    }
}
