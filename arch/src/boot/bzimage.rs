//! bzImage kernels (Documentation/arch/x86/boot.rst). The file consists of setup sectors, which hold a
//! header, and the protected-mode kernel. The kernel is copied to its preferred address and entered at its
//! 64-bit entry. The real-mode code is never run.

use std::fs::File;

use linux_loader::bootparam::{XLF_KERNEL_64, boot_params, setup_header};
use vm_memory::ByteValued;

use super::{Error, Kernel, Protocol, check_range};
use crate::layout::{Gpa, HIGH_MEMORY, PAGE_SIZE};
use crate::ram::Ram;

/// Offset of the header, in the file and in `boot_params`.
const HEADER: usize = 0x1f1;
const BOOT_FLAG: usize = 0x1fe;
/// Second byte of the jump over the header. It gives the end of the header.
const JUMP_DISTANCE: usize = 0x201;
const MAGIC: usize = 0x202;
const SECTOR: u64 = 512;
/// The first version of the protocol that has `xloadflags`.
const VERSION_MIN: u16 = 0x20c;
/// The 64-bit entry, as an offset in the protected-mode kernel.
const ENTRY_64: u64 = 0x200;

pub(super) fn is_bzimage(head: &[u8]) -> bool {
    let has = |at: usize, what: &[u8]| head.get(at..).is_some_and(|rest| rest.starts_with(what));
    has(BOOT_FLAG, b"\x55\xaa") && has(MAGIC, b"HdrS")
}

pub(super) fn load(ram: &Ram, file: &File, size: u64, head: &[u8]) -> Result<Kernel, Error> {
    let header = parse_header(head, size)?;
    if header.version < VERSION_MIN {
        return Err(Error::OldProtocol { version: header.version });
    }
    if header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(Error::Not64Bit);
    }

    // The protocol defines 0 as 4.
    let setup_sectors = if header.setup_sects == 0 { 4 } else { header.setup_sects };
    let offset = (u64::from(setup_sectors) + 1) * SECTOR;
    // The file may be longer than the kernel, by a signature. It may be shorter, if the padding of the last
    // 16 bytes is missing.
    let said = u64::from(header.syssize) * 16;
    let len = size.saturating_sub(offset).min(said);
    if said == 0 || len + 16 <= said {
        return Err(Error::Truncated { what: "the protected-mode kernel", end: offset + said, size });
    }

    let at = header.pref_address;
    if at % PAGE_SIZE != 0 || at < HIGH_MEMORY.0 {
        return Err(Error::Damaged("its preferred address is unusable"));
    }
    let Some(end) = at.checked_add(len.max(u64::from(header.init_size))) else {
        return Err(Error::Damaged("its preferred address overflows"));
    };
    check_range(ram, at, end)?;
    ram.copy_from_file(Gpa(at), file, offset, len).map_err(Error::KernelCopy)?;

    Ok(Kernel {
        protocol: Protocol::Linux64,
        start: Gpa(at + ENTRY_64),
        end: Gpa(end),
        cmdline_max: u64::from(header.cmdline_size),
        initramfs_end: u64::from(header.initrd_addr_max) + 1,
        header: Some(header),
    })
}

fn parse_header(head: &[u8], size: u64) -> Result<setup_header, Error> {
    let jump = head.get(JUMP_DISTANCE).copied().map_or(0, usize::from);
    let end = MAGIC + jump;
    let mut params = boot_params::default();
    let known_end = HEADER + size_of::<setup_header>();
    let end = end.min(known_end);
    let truncated = || Error::Truncated { what: "the setup header", end: 0x280, size };
    let from = head.get(HEADER..end).ok_or_else(truncated)?;
    let to = params.as_mut_slice().get_mut(HEADER..end).ok_or_else(truncated)?;
    to.copy_from_slice(from);
    Ok(params.hdr)
}
