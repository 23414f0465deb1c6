//! Errors of loading an image, and advice for each.

use std::io;

use crate::layout::{Gpa, HOLE_START};
use crate::{acpi, ram};

/// The reason why a guest cannot be loaded. The caller adds the name of the file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The kernel file could not be read.
    #[error("cannot read the kernel")]
    Kernel(#[source] io::Error),
    /// The kernel is a directory, a device or the like.
    #[error("the kernel is not a regular file")]
    NotAFile,
    /// The file has neither of the known formats.
    #[error("the file is not a Linux kernel (neither an ELF vmlinux nor a bzImage)")]
    NotAKernel {
        /// The format that the file seems to have, and advice.
        hint: Option<&'static str>,
    },
    /// An ELF file that is not for this machine.
    #[error("the ELF file is {0}, not a 64-bit x86 executable")]
    WrongElf(&'static str),
    /// The file is shorter than its headers say.
    #[error("the kernel file is cut short: {what} would end at byte {end}, the file has {size}")]
    Truncated {
        /// The part that is cut.
        what: &'static str,
        /// The byte of the file at which the part would end.
        end: u64,
        /// Size of the file.
        size: u64,
    },
    /// The headers contradict themselves.
    #[error("the kernel file is damaged: {0}")]
    Damaged(&'static str),
    /// The entry point is outside the loaded segments.
    #[error("the kernel's entry point {entry} is outside its loaded segments")]
    EntryOutside {
        /// The entry point.
        entry: Gpa,
    },
    /// The kernel must be loaded below 1 MiB, where boot structures are.
    #[error("the kernel wants to be loaded at {start}, below 1 MiB")]
    TooLow {
        /// First address wanted.
        start: Gpa,
    },
    /// The kernel does not fit.
    #[error(
        "the kernel needs memory up to {} MiB, the machine has {} MiB below its 32-bit hole",
        needed.div_ceil(1 << 20), available >> 20
    )]
    TooLarge {
        /// End of the kernel, an address.
        needed: u64,
        /// End of the memory, an address.
        available: u64,
    },
    /// A bzImage from before Linux 3.8.
    #[error("the kernel speaks version {}.{} of the boot protocol, 2.12 is needed", version >> 8, version & 0xff)]
    OldProtocol {
        /// The version, as in the header.
        version: u16,
    },
    /// A bzImage for 32-bit CPUs.
    #[error("the kernel is a 32-bit one")]
    Not64Bit,
    /// The kernel could not be copied to guest memory.
    #[error("cannot load the kernel")]
    KernelCopy(#[source] ram::Error),
    /// The initramfs could not be read.
    #[error("cannot read the initramfs")]
    Initramfs(#[source] io::Error),
    /// The initramfs is a directory, a device or the like.
    #[error("the initramfs is not a regular file")]
    InitramfsNotAFile,
    /// The initramfs has no bytes.
    #[error("the initramfs is empty")]
    InitramfsEmpty,
    /// The initramfs does not fit beside the kernel.
    #[error("the initramfs has {} MiB, beside the kernel {} MiB are free", size.div_ceil(1 << 20), free >> 20)]
    InitramfsTooLarge {
        /// Its size in bytes.
        size: u64,
        /// Room in bytes.
        free: u64,
        /// The free room in bytes on a machine with much memory. It is limited, because kernel and initramfs
        /// must both lie below the 32-bit hole.
        most: u64,
    },
    /// The initramfs could not be copied to guest memory.
    #[error("cannot load the initramfs")]
    InitramfsCopy(#[source] ram::Error),
    /// The command line is longer than the kernel accepts.
    #[error("the kernel command line has {len} characters, this kernel takes {max}")]
    CmdlineTooLong {
        /// Its length.
        len: usize,
        /// The limit.
        max: u64,
    },
    /// The command line cannot be represented.
    #[error("the kernel command line contains a NUL character")]
    CmdlineNul,
    /// The machine cannot be described to the guest.
    #[error("cannot describe the machine to the guest")]
    Acpi(#[from] acpi::Error),
    /// Boot structures could not be written.
    #[error("cannot write the boot parameters")]
    Ram(#[from] ram::Error),
}

impl Error {
    /// Advice for the user.
    pub fn hint(&self) -> Option<&'static str> {
        match self {
            Self::NotAKernel { hint } => *hint,
            Self::WrongElf(_) | Self::Not64Bit => Some("outboard boots x86-64 kernels only"),
            Self::Truncated { .. } => Some("was the file downloaded or copied completely?"),
            Self::TooLarge { needed, .. } if *needed > HOLE_START.0 => {
                Some("a kernel must lie below 3 GiB, whatever the size of memory")
            }
            Self::InitramfsTooLarge { size, most, .. } if size > most => Some(
                "an initramfs lies beside the kernel below 3 GiB, whatever the size of memory: make it smaller, or use a disk",
            ),
            Self::TooLarge { .. } | Self::InitramfsTooLarge { .. } => Some("give the machine more --memory"),
            Self::OldProtocol { .. } => Some("Linux 3.8 and later will do"),
            Self::Ram(error) | Self::KernelCopy(error) | Self::InitramfsCopy(error) => error.hint(),
            _ => None,
        }
    }

    /// Recognises files that users often give instead of a kernel.
    pub(super) fn not_a_kernel(head: &[u8]) -> Self {
        const KNOWN: [(usize, &[u8], &str); 14] = [
            (0, b"\x1f\x8b", "it looks like gzip data: decompress it with gunzip"),
            (0, b"\x28\xb5\x2f\xfd", "it looks like zstd data: decompress it with unzstd"),
            (0, b"\xfd7zXZ", "it looks like xz data: decompress it with unxz"),
            (0, b"\x04\x22\x4d\x18", "it looks like lz4 data: decompress it with unlz4"),
            (0, b"\x02\x21\x4c\x18", "it looks like lz4 data: decompress it with unlz4"),
            (0, b"BZh", "it looks like bzip2 data: decompress it with bunzip2"),
            (4, b"zimg", "it looks like an EFI zboot image: extract the kernel from it"),
            (56, b"ARM\x64", "it looks like a kernel for 64-bit ARM: outboard boots x86-64 kernels only"),
            (0, b"MZ", "it looks like an EFI program without a Linux boot header"),
            (0, b"070701", "it looks like an initramfs: give it with --initramfs"),
            (0, b"!<arch>\n", "it looks like a Debian package: unpack it with dpkg -x"),
            (0, b"QFI\xfb", "it looks like a qcow2 disk image: disks are served by vhost-user backends"),
            (0, b"#!", "it looks like a script"),
            (0, b"BC\xc0\xde", "it looks like LLVM bitcode"),
        ];
        let matches = |(at, magic, _): &&(usize, &[u8], &str)| {
            head.get(*at..).is_some_and(|rest| rest.starts_with(magic))
        };
        let hint = match KNOWN.iter().find(matches) {
            Some((_, _, hint)) => Some(*hint),
            None if head.is_empty() => Some("the file is empty"),
            None => None,
        };
        Self::NotAKernel { hint }
    }
}
