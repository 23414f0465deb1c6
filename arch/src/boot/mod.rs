//! Loads a kernel, its initramfs, its command line and the description of the machine into guest memory, and
//! gives the entry point of the boot CPU. It follows the Linux x86 boot protocol 2.12 and later
//! (Documentation/arch/x86/boot.rst) and the PVH start of day (Documentation/arch/x86/pvh in Xen's tree,
//! `start_info.h`).
//!
//! [`Ram::copy_from_file`] copies the images. This module parses only headers, and each read of them is
//! bounded.

mod bzimage;
pub mod cmdline;
mod elf;
mod error;
mod mptable;
mod pagetables;
mod params;

use std::fs::File;
use std::os::unix::fs::FileExt;

use linux_loader::bootparam::setup_header;

pub use error::Error;
pub use pagetables::GDT;

use crate::layout::{
    CMDLINE, CMDLINE_MAX, Gpa, HIGH_MEMORY, HOLE_START, PAGE_SIZE, PVH_START_INFO, RESET_PORT, RESET_VALUE,
    RESET_VECTOR, ZERO_PAGE,
};
use crate::platform::{Discovery, Platform};
use crate::ram::Ram;
use crate::width::{to_u64, to_usize};

/// The images and the command line that the user wants to boot.
#[derive(Clone, Copy, Debug)]
pub struct BootImage<'a> {
    /// An ELF `vmlinux` (or another ELF64 payload) or a bzImage.
    pub kernel: &'a File,
    /// A cpio archive, compressed or not. Its contents are not examined.
    pub initramfs: Option<&'a File>,
    /// The complete kernel command line. This module adds nothing to it.
    pub cmdline: &'a str,
}

/// The point at which the boot CPU starts, and the state in which it starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The boot protocol, which determines the state of the CPU.
    pub protocol: Protocol,
    /// The physical address of the first instruction.
    pub start: Gpa,
    /// The address of `hvm_start_info` (passed in EBX) or `boot_params` (passed in RSI).
    pub parameters: Gpa,
}

/// The protocol by which a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    /// PVH: 32-bit protected mode, paging off, flat segments, EBX points to `hvm_start_info`.
    Pvh,
    /// The 64-bit entry of the Linux boot protocol: long mode, the first 4 GiB mapped one to one, RSI points
    /// to `boot_params`.
    Linux64,
}

/// A kernel in guest memory.
struct Kernel {
    protocol: Protocol,
    start: Gpa,
    /// First address above the memory that the kernel and its early boot code need.
    end: Gpa,
    /// The header of a bzImage. It is returned to the kernel in `boot_params`.
    header: Option<setup_header>,
    /// Longest command line, without the final NUL.
    cmdline_max: u64,
    /// First address that the initramfs must not use.
    initramfs_end: u64,
}

/// A range of guest memory that holds a file.
#[derive(Clone, Copy, Debug)]
struct Placed {
    at: Gpa,
    size: u64,
}

/// Loads the images and writes all boot structures. May be called again on the same RAM for another boot of
/// the machine. Memory that is not written here keeps the contents that the guest has left.
pub fn load(ram: &Ram, image: &BootImage<'_>, platform: &Platform) -> Result<Entry, Error> {
    let kernel = load_kernel(ram, image.kernel)?;
    let initramfs = match image.initramfs {
        Some(file) => Some(load_initramfs(ram, file, &kernel)?),
        None => None,
    };
    load_cmdline(ram, image.cmdline, &kernel)?;
    let rsdp = match platform.discovery {
        Discovery::Acpi => Some(crate::acpi::load(ram, platform)?),
        Discovery::Cmdline => {
            mptable::load(ram, platform.cpus)?;
            None
        }
    };

    let map = params::memory_map(ram);
    let parameters = match kernel.protocol {
        Protocol::Pvh => {
            ram.write_at(PVH_START_INFO, &params::start_info(&map, initramfs, rsdp))?;
            PVH_START_INFO
        }
        Protocol::Linux64 => {
            let page = params::boot_params(kernel.header, &map, initramfs, rsdp, image.cmdline.len())?;
            ram.write_at(ZERO_PAGE, &page)?;
            ram.write_at(crate::layout::PAGE_TABLES, &pagetables::identity_4gib())?;
            ZERO_PAGE
        }
    };
    ram.write_at(crate::layout::BOOT_GDT, &pagetables::gdt_bytes())?;
    ram.write_at(RESET_VECTOR, &reset_code())?;
    Ok(Entry { protocol: kernel.protocol, start: kernel.start, parameters })
}

/// The whole BIOS of this machine: `mov dx, port; mov al, value; out dx, al`, then `hlt` for ever.
///
/// Linux on hardware-reduced ACPI tries to reset through EFI, whatever the FADT's reset register says.
/// Without EFI it then resets through the BIOS (`reboot_init` and `machine_real_restart` of
/// arch/x86/kernel/reboot.c), unless `reboot=` on its command line selects another way.
fn reset_code() -> [u8; 9] {
    let [low, high] = RESET_PORT.to_le_bytes();
    [0xba, low, high, 0xb0, RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd]
}

fn load_kernel(ram: &Ram, file: &File) -> Result<Kernel, Error> {
    let size = file_size(file).map_err(Error::Kernel)?.ok_or(Error::NotAFile)?;
    let head = read_head(file, size).map_err(Error::Kernel)?;
    if head.starts_with(b"\x7fELF") {
        elf::load(ram, file, size, &head)
    } else if bzimage::is_bzimage(&head) {
        bzimage::load(ram, file, size, &head)
    } else {
        Err(Error::not_a_kernel(&head))
    }
}

/// Copies the initramfs to the highest address below the hole and below the kernel's limit. There it does not
/// overlap the kernel's memory.
fn load_initramfs(ram: &Ram, file: &File, kernel: &Kernel) -> Result<Placed, Error> {
    let size = file_size(file).map_err(Error::Initramfs)?.ok_or(Error::InitramfsNotAFile)?;
    if size == 0 {
        return Err(Error::InitramfsEmpty);
    }
    let limit = kernel.initramfs_end.min(ram.low_end().0);
    let free = limit.saturating_sub(kernel.end.0);
    let most = kernel.initramfs_end.min(HOLE_START.0).saturating_sub(kernel.end.0);
    let too_large = Error::InitramfsTooLarge { size, free, most };
    let Some(at) = limit.checked_sub(size).map(|at| at & !(PAGE_SIZE - 1)) else {
        return Err(too_large);
    };
    if at < kernel.end.0 {
        return Err(too_large);
    }
    ram.copy_from_file(Gpa(at), file, 0, size).map_err(Error::InitramfsCopy)?;
    Ok(Placed { at: Gpa(at), size })
}

fn load_cmdline(ram: &Ram, cmdline: &str, kernel: &Kernel) -> Result<(), Error> {
    let max = kernel.cmdline_max.min(CMDLINE_MAX - 1);
    if to_u64(cmdline.len()) > max {
        return Err(Error::CmdlineTooLong { len: cmdline.len(), max });
    }
    if cmdline.contains('\0') {
        return Err(Error::CmdlineNul);
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    Ok(ram.write_at(CMDLINE, &bytes)?)
}

/// The size of a regular file. `None` for any other kind of file.
fn file_size(file: &File) -> std::io::Result<Option<u64>> {
    let metadata = file.metadata()?;
    Ok(metadata.is_file().then_some(metadata.len()))
}

/// The first page of a file, or the whole file if it is shorter.
fn read_head(file: &File, size: u64) -> std::io::Result<Vec<u8>> {
    let mut head = vec![0; to_usize(size.min(PAGE_SIZE))];
    file.read_exact_at(&mut head, 0)?;
    Ok(head)
}

/// Checks that a kernel's range is free RAM: from 1 MiB up, and below the hole.
fn check_range(ram: &Ram, start: u64, end: u64) -> Result<(), Error> {
    if start < HIGH_MEMORY.0 {
        return Err(Error::TooLow { start: Gpa(start) });
    }
    if end > ram.low_end().0 {
        return Err(Error::TooLarge { needed: end, available: ram.low_end().0 });
    }
    Ok(())
}
