//! Images of every kind, good and bad, into RAM: what is refused, in which words, and what lies where afterwards.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;

use arch::boot::{self, BootImage, Entry, Protocol};
use arch::layout::{CMDLINE, Gpa, HOLE_END, RAM_MIN, ZERO_PAGE};
use arch::platform::{Discovery, Platform};
use arch::ram::{Hugepages, Ram};

const MIB: u64 = 1 << 20;

fn file_of(bytes: &[u8]) -> File {
    let fd = rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut file = File::from(fd);
    file.write_all(bytes).unwrap();
    file
}

fn load(ram: &Ram, kernel: &[u8], initramfs: Option<&[u8]>, cmdline: &str) -> Result<Entry, boot::Error> {
    let platform = Platform {
        cpus: 1,
        virtio_mmio: Vec::new(),
        pci: None,
        serial: None,
        discovery: Discovery::default(),
    };
    let (kernel, initramfs) = (file_of(kernel), initramfs.map(file_of));
    boot::load(ram, &BootImage { kernel: &kernel, initramfs: initramfs.as_ref(), cmdline }, &platform)
}

fn ram() -> Ram {
    Ram::allocate(RAM_MIN, Hugepages::Off).unwrap()
}

/// The message that a kernel file is refused with, and the hint.
fn refusal(kernel: &[u8]) -> (String, Option<&'static str>) {
    let error = load(&ram(), kernel, None, "").unwrap_err();
    (error.to_string(), error.hint())
}

fn read(ram: &Ram, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0xaa; len];
    let region = ram.regions().iter().rev().find(|region| region.guest.0 <= at).unwrap();
    let memory = File::from(ram.fd().try_clone().unwrap());
    memory.read_exact_at(&mut bytes, at - region.guest.0 + region.offset).unwrap();
    bytes
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// An ELF64 file with one segment of `data` at `paddr`, `extra` bytes longer in memory than in the file.
fn elf(paddr: u64, data: &[u8], extra: u64) -> Vec<u8> {
    let mut file = vec![0; 4096];
    put(&mut file, 0, b"\x7fELF\x02\x01\x01");
    put(&mut file, 16, &[2, 0, 62, 0, 1]);
    put(&mut file, 24, &paddr.to_le_bytes());
    put(&mut file, 32, &64_u64.to_le_bytes());
    put(&mut file, 52, &[64, 0, 56, 0, 1, 0]);
    put(&mut file, 64, &[1, 0, 0, 0, 7]);
    let len = u64::try_from(data.len()).unwrap();
    for (n, word) in [4096, paddr, paddr, len, len + extra, 4096].iter().enumerate() {
        put(&mut file, 72 + 8 * n, &word.to_le_bytes());
    }
    file.extend_from_slice(data);
    file
}

/// A bzImage of one setup sector and `payload`.
fn bzimage(payload: &[u8], pref_address: u64, init_size: u32) -> Vec<u8> {
    let mut file = vec![0; 1024];
    file[0x1f1] = 1;
    put(&mut file, 0x1f4, &u32::try_from(payload.len().div_ceil(16)).unwrap().to_le_bytes());
    put(&mut file, 0x1fe, b"\x55\xaa\xeb\x6aHdrS");
    put(&mut file, 0x206, &0x20f_u16.to_le_bytes());
    put(&mut file, 0x22c, &0x7fff_ffff_u32.to_le_bytes());
    put(&mut file, 0x236, &1_u16.to_le_bytes());
    put(&mut file, 0x238, &2047_u32.to_le_bytes());
    put(&mut file, 0x258, &pref_address.to_le_bytes());
    put(&mut file, 0x260, &init_size.to_le_bytes());
    file.extend_from_slice(payload);
    file
}

#[test]
fn an_elf_segment_lands_where_it_says_and_its_rest_is_cleared_also_on_a_second_boot() {
    let ram = ram();
    let mut data = vec![0; 3 << 20];
    data[..5000].fill(1);
    data[2 << 20..(3 << 20) - 40_000].fill(2);
    for _ in 0..2 {
        let entry = load(&ram, &elf(2 * MIB, &data, 8192), None, "hello").unwrap();
        assert_eq!((entry.protocol, entry.start), (Protocol::Linux64, Gpa(2 * MIB)));
        assert!(read(&ram, 2 * MIB, 3 << 20) == data, "the segment");
        assert_eq!(read(&ram, 5 * MIB, 8192), vec![0; 8192]);
        assert_eq!(read(&ram, CMDLINE.0, 6), b"hello\0");
        // What a guest left behind.
        ram.write_at(Gpa(MIB), &vec![0xee; 8 << 20]).unwrap();
    }
}

#[test]
fn the_place_of_a_section_without_contents_is_cleared_and_not_copied() {
    let ram = ram();
    // Contents, `.bss`, contents; the file has ones everywhere.
    let mut file = elf(2 * MIB, &[1; 0x4000], 0);
    let sections = file.len();
    for (kind, at) in [(1_u32, 2 * MIB), (8, 2 * MIB + 0x1000), (8, 2 * MIB + 0x1800), (1, 2 * MIB + 0x3000)]
    {
        let mut section = vec![0; 64];
        put(&mut section, 4, &kind.to_le_bytes());
        section[8] = 3;
        put(&mut section, 16, &at.to_le_bytes());
        file.extend(section);
    }
    put(&mut file, 40, &u64::try_from(sections).unwrap().to_le_bytes());
    put(&mut file, 58, &[64, 0, 4, 0]);
    for _ in 0..2 {
        load(&ram, &file, None, "").unwrap();
        assert_eq!(read(&ram, 2 * MIB, 0x1000), [1; 0x1000]);
        assert_eq!(read(&ram, 2 * MIB + 0x1000, 0x2000), [0; 0x2000]);
        assert_eq!(read(&ram, 2 * MIB + 0x3000, 0x1000), [1; 0x1000]);
        ram.write_at(Gpa(MIB), &vec![0xee; 8 << 20]).unwrap();
    }
    // Section headers that are not there, or lie elsewhere, change nothing.
    file.truncate(sections);
    load(&ram, &file, None, "").unwrap();
    assert_eq!(read(&ram, 2 * MIB, 0x4000), [1; 0x4000]);
}

#[test]
fn a_bzimage_lands_at_its_preferred_address_with_its_header_in_the_zero_page() {
    let ram = ram();
    let payload: Vec<u8> = (0..40_000_u32).map(|n| n.to_le_bytes()[0]).collect();
    let entry =
        load(&ram, &bzimage(&payload, 16 * MIB, 0x10_0000), Some(b"070701 archive"), "quiet").unwrap();
    assert_eq!((entry.protocol, entry.start), (Protocol::Linux64, Gpa(16 * MIB + 0x200)));
    assert_eq!(entry.parameters, ZERO_PAGE);
    assert_eq!(read(&ram, 16 * MIB, payload.len()), payload);
    let page = read(&ram, ZERO_PAGE.0, 4096);
    assert_eq!(&page[0x202..0x206], b"HdrS");
    assert_eq!(page[0x210], 0xff, "type of loader");
    let word = |at: usize| u64::from(u32::from_le_bytes(page[at..at + 4].try_into().unwrap()));
    assert_eq!((word(0x228), word(0x21c)), (CMDLINE.0, 14));
    let initramfs = word(0x218);
    assert_eq!(initramfs, RAM_MIN - 4096, "as high as it fits");
    assert_eq!(read(&ram, initramfs, 14), b"070701 archive");
    assert_eq!(word(0x70), 0xe_0000, "RSDP");
    assert_eq!(read(&ram, 0xe_0000, 8), b"RSD PTR ");
    // The memory map: conventional memory, EBDA, BIOS area, and the rest.
    assert_eq!(page[0x1e8], 4);
    let entry = |n: usize| {
        let at = 0x2d0 + 20 * n;
        (u64::from_le_bytes(page[at..at + 8].try_into().unwrap()), word(at + 8), page[at + 16])
    };
    let expected = [
        (0, 0x9_fc00, 1),
        (0x9_fc00, 0x400, 2),
        (0xe_0000, 0x2_0000, 2),
        (0x10_0000, RAM_MIN - 0x10_0000, 1),
    ];
    assert_eq!([entry(0), entry(1), entry(2), entry(3)], expected);
}

#[test]
fn what_is_no_kernel_is_told_by_name() {
    let cases: [(&[u8], &str); 5] = [
        (b"", "empty"),
        (b"\x1f\x8b\x08 compressed", "gzip"),
        (b"\x28\xb5\x2f\xfd compressed", "zstd"),
        (b"MZ\0\0zimg and so on", "zboot"),
        (b"070701 archive", "--initramfs"),
    ];
    for (bytes, hint) in cases {
        let (message, found) = refusal(bytes);
        assert_eq!(message, "the file is not a Linux kernel (neither an ELF vmlinux nor a bzImage)");
        assert!(found.unwrap().contains(hint), "{found:?}");
    }
    assert_eq!(refusal(&[0x42; 9000]).1, None);
}

#[test]
fn elf_headers_that_lie_are_refused_before_anything_is_loaded() {
    let good = elf(2 * MIB, b"code", 0);
    let with = |at: usize, value: &[u8]| {
        let mut bad = good.clone();
        put(&mut bad, at, value);
        refusal(&bad).0
    };
    assert_eq!(with(4, &[1]), "the ELF file is a 32-bit one, not a 64-bit x86 executable");
    assert_eq!(with(18, &[0xb7]), "the ELF file is for another kind of CPU, not a 64-bit x86 executable");
    assert_eq!(with(16, &[4]), "the ELF file is an object or a core file, not a 64-bit x86 executable");
    assert_eq!(with(54, &[55]), "the kernel file is damaged: its program headers have an unknown size");
    assert_eq!(with(56, &[0, 0]), "the kernel file is damaged: it has no program headers, or too many");
    assert_eq!(with(56, &[0xff, 0xff]), "the kernel file is damaged: it has no program headers, or too many");
    assert!(with(32, &[0xff; 8]).starts_with("the kernel file is cut short: the program headers"));
    assert!(with(32, &4096_u64.to_le_bytes()).starts_with("the kernel file is cut short"));
    assert!(with(72, &[0xff; 8]).starts_with("the kernel file is cut short: a segment"));
    assert!(with(96, &4096_u64.to_le_bytes()).contains("larger in the file than in memory"));
    assert!(with(104, &[0xff; 8]).contains("a segment's address overflows"));
    assert!(with(64, &[2]).contains("it has no segment to load"));
    assert_eq!(
        with(24, &0x1234_u64.to_le_bytes()),
        "the kernel's entry point 0x1234 is outside its loaded segments"
    );
    assert_eq!(with(88, &0x8000_u64.to_le_bytes()), "the kernel wants to be loaded at 0x8000, below 1 MiB");
    for cut in [5, 20, 63, 64, 100, 4097] {
        let (message, _) = refusal(&good[..cut]);
        assert!(message.contains("cut short") || message.contains("damaged"), "{cut}: {message}");
    }
}

#[test]
fn a_kernel_larger_than_the_memory_is_refused_with_both_sizes() {
    let message = "the kernel needs memory up to 34 MiB, the machine has 32 MiB below its 32-bit hole";
    assert_eq!(refusal(&elf(2 * MIB, b"code", 32 * MIB - 4)).0, message);
    let (found, hint) = refusal(&bzimage(&[0; 4096], 16 * MIB, 18 << 20));
    assert_eq!((found.as_str(), hint), (message, Some("give the machine more --memory")));
}

#[test]
fn bzimage_headers_that_lie_are_refused() {
    let good = bzimage(&[1; 4096], 16 * MIB, 8192);
    let with = |at: usize, value: &[u8]| {
        let mut bad = good.clone();
        put(&mut bad, at, value);
        refusal(&bad).0
    };
    assert_eq!(with(0x206, &[4, 2]), "the kernel speaks version 2.4 of the boot protocol, 2.12 is needed");
    assert_eq!(with(0x236, &[0]), "the kernel is a 32-bit one");
    assert!(with(0x1f4, &[0xff; 4]).contains("cut short"));
    assert!(with(0x1f4, &[0; 4]).contains("cut short"));
    assert!(with(0x258, &[0xff; 8]).contains("preferred address"));
    assert!(with(0x258, &[0; 8]).contains("preferred address"));
    assert!(refusal(&good[..3000]).0.contains("cut short"));
    assert!(refusal(&good[..0x210]).0.contains("cut short"));
}

#[test]
fn initramfs_and_command_line_have_limits() {
    let kernel = elf(2 * MIB, b"code", 0);
    let refused = |initramfs: Option<&[u8]>, cmdline: &str| {
        load(&ram(), &kernel, initramfs, cmdline).unwrap_err().to_string()
    };
    assert_eq!(refused(Some(b""), ""), "the initramfs is empty");
    let large = vec![1; 30 << 20];
    assert_eq!(refused(Some(&large), ""), "the initramfs has 30 MiB, beside the kernel 29 MiB are free");
    assert_eq!(refused(None, "a\0b"), "the kernel command line contains a NUL character");
    assert_eq!(
        refused(None, &"x".repeat(2048)),
        "the kernel command line has 2048 characters, this kernel takes 2047"
    );
    assert!(load(&ram(), &kernel, None, &"x".repeat(2047)).is_ok());
    let directory = File::open("/").unwrap();
    let platform =
        Platform { cpus: 1, virtio_mmio: Vec::new(), pci: None, serial: None, discovery: Discovery::Acpi };
    let image = BootImage { kernel: &directory, initramfs: None, cmdline: "" };
    let error = boot::load(&ram(), &image, &platform).unwrap_err();
    assert_eq!(error.to_string(), "the kernel is not a regular file");
}

#[test]
fn ram_above_three_gib_continues_above_the_hole() {
    let ram = Ram::allocate(6 << 30, Hugepages::Off).unwrap();
    let regions: Vec<_> = ram.regions().iter().map(|r| (r.guest.0, r.size, r.offset)).collect();
    assert_eq!(regions, [(0, 3 << 30, 0), (HOLE_END.0, 3 << 30, 3 << 30)]);
    ram.write_at(Gpa(HOLE_END.0 + 10), b"high").unwrap();
    assert_eq!(read(&ram, HOLE_END.0 + 10, 4), b"high");
    for (at, len) in [((3 << 30) - 2, 4), (3 << 30, 1), (7 << 30, 1), (u64::MAX, 2)] {
        assert!(ram.write_at(Gpa(at), &vec![0; len]).is_err(), "{at:#x}");
    }
}

#[test]
fn odd_sizes_and_missing_huge_pages_are_refused_in_plain_words() {
    let refused = |size: u64, pages: Hugepages| {
        let error = Ram::allocate(size, pages).unwrap_err();
        (error.to_string(), error.hint())
    };
    assert_eq!(
        refused((256 << 20) + 4096, Hugepages::Off).0,
        "a memory size of 268439552 bytes is not a multiple of 2 MiB"
    );
    assert_eq!(
        refused(256 << 20, Hugepages::Size1G).0,
        "a memory size of 268435456 bytes is not a multiple of 1024 MiB"
    );
    assert!(refused(2 << 20, Hugepages::Off).0.contains("at least 32 MiB"));
    // More than any test machine has reserved.
    let (message, hint) = refused(1 << 40, Hugepages::Size2M);
    assert_eq!(message, "the host has not enough huge pages of 2 MiB for 1048576 MiB of memory");
    assert!(hint.unwrap().contains("hugepages-2048kB"));
}

#[test]
fn no_peer_can_resize_the_memory() {
    let ram = ram();
    assert!(rustix::fs::ftruncate(ram.fd(), RAM_MIN / 2).is_err());
    assert!(rustix::fs::ftruncate(ram.fd(), RAM_MIN * 2).is_err());
}

#[test]
fn a_file_that_ends_early_is_an_error_and_offsets_are_honoured() {
    let ram = ram();
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[1]).collect();
    let file = file_of(&bytes);
    ram.copy_from_file(Gpa(MIB + 3), &file, 17, 2_999_983).unwrap();
    assert!(read(&ram, MIB + 3, 2_999_983) == bytes[17..]);
    let error = ram.copy_from_file(Gpa(MIB), &file, 17, 3_000_000).unwrap_err();
    assert_eq!(error.to_string(), "the file ended 17 bytes early");
    // Neither a pipe nor a device is spliced: /dev/zero never ends, and a memory range has an end.
    let zero = File::open("/dev/zero").unwrap();
    ram.copy_from_file(Gpa(MIB), &zero, 0, 100_000).unwrap();
    assert_eq!(read(&ram, MIB, 100_000), vec![0; 100_000]);
    assert!(ram.copy_from_file(Gpa(RAM_MIN - 10), &zero, 0, 11).is_err());
}

#[test]
fn no_single_wrong_byte_in_a_header_is_more_than_an_error() {
    let ram = ram();
    let images = [elf(2 * MIB, &[1; 5000], 4096), bzimage(&[1; 5000], 4 * MIB, 8192)];
    for (image, header) in images.iter().zip([0..128, 0x1f0..0x280]) {
        for at in header {
            for value in [0x00, 0x01, 0x7f, 0x80, 0xff] {
                let mut bad = image.clone();
                bad[at] = value;
                match load(&ram, &bad, Some(b"initramfs"), "quiet") {
                    Ok(entry) => assert!(entry.start.0 >= MIB && entry.start.0 < RAM_MIN, "{at:#x}"),
                    Err(error) => assert!(!error.to_string().is_empty()),
                }
            }
        }
    }
}
