//! Kernel images: any file is loaded or refused, and where it is loaded, the machine starts inside it.
#![no_main]

use std::fs::File;
use std::os::unix::fs::FileExt;

use arch::boot::{BootImage, Protocol, load};
use arch::layout::{Gpa, HIGH_MEMORY};
use arch::platform::{Discovery, Platform, SerialPort};
use arch::ram::{Hugepages, Ram};
use fuzz::descriptors::{memory_file, none_left};
use fuzz::input::Input;
use fuzz::seeds::offer;
use libfuzzer_sys::fuzz_target;

const RAM: u64 = 32 << 20;

thread_local! {
    static MEMORY: Ram = Ram::allocate(RAM, Hugepages::Off).expect("32 MiB");
}

fuzz_target!(init: offer(&seeds()), |data: &[u8]| {
    MEMORY.with(|ram| none_left(|| boot(ram, data)));
});

/// An ELF kernel with a PVH note, and a bzImage.
fn seeds() -> Vec<Vec<u8>> {
    let mut elf = vec![0; 3];
    elf.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0");
    elf.extend([0x10_0000u64, 64, 0].map(u64::to_le_bytes).concat());
    elf.extend(b"\0\0\0\0\x40\0\x38\0\x02\0\0\0\0\0\0\0");
    let note_at = 64 + 2 * 56;
    elf.extend([1u32, 7].map(u32::to_le_bytes).concat());
    elf.extend([0u64, 0x10_0000, 0x10_0000, note_at, 0x2000, 0x1000].map(u64::to_le_bytes).concat());
    elf.extend([4u32, 4].map(u32::to_le_bytes).concat());
    elf.extend([note_at, 0, 0, 20, 20, 4].map(u64::to_le_bytes).concat());
    elf.extend(b"\x04\0\0\0\x04\0\0\0\x12\0\0\0Xen\0\0\0\x10\0");

    let mut image = vec![0; 3 + 0x600];
    let mut put = |at: usize, bytes: &[u8]| image[3 + at..3 + at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]);
    put(0x1f4, &0x10u32.to_le_bytes());
    put(0x1fe, b"\x55\xaa\xeb\x66HdrS\x0f\x02");
    put(0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(0x236, &1u16.to_le_bytes());
    put(0x238, &2047u32.to_le_bytes());
    put(0x258, &0x100_0000u64.to_le_bytes());
    put(0x260, &0x10_0000u32.to_le_bytes());
    vec![elf, image]
}

/// A file of these bytes and then zeros: images are large, inputs are not.
fn file(bytes: &[u8], zeros: u64) -> File {
    let file = File::from(memory_file(bytes.len() as u64 + zeros));
    file.write_all_at(bytes, 0).expect("a file in memory");
    file
}

fn boot(ram: &Ram, data: &[u8]) {
    let mut input = Input::new(data);
    let zeros = input.pick(&[0, 0x1000, 0x2_0000, 0x30_0000]);
    let initramfs = input.rarely(4).then(|| file(b"070701", input.number() & 0x3ff_ffff));
    let cmdline = "x".repeat(if input.rarely(8) { usize::from(input.u16()) } else { 20 });
    let kernel = file(&input.rest(), zeros);
    let platform = Platform {
        cpus: 2,
        virtio_mmio: Vec::new(),
        pci: None,
        serial: Some(SerialPort::COM1),
        discovery: Discovery::Acpi,
    };
    let image = BootImage { kernel: &kernel, initramfs: initramfs.as_ref(), cmdline: &cmdline };
    match load(ram, &image, &platform) {
        Ok(entry) => {
            assert!(entry.start >= HIGH_MEMORY && entry.start.0 < RAM, "entry at {}", entry.start);
            assert!(entry.parameters < HIGH_MEMORY);
            // The boot structures are as they should be, whatever was loaded.
            let mut rsdp = [0; 8];
            read(ram, Gpa(0xe_0000), &mut rsdp);
            assert_eq!(&rsdp, b"RSD PTR ");
            if entry.protocol == Protocol::Pvh {
                let mut magic = [0; 4];
                read(ram, entry.parameters, &mut magic);
                assert_eq!(u32::from_le_bytes(magic), 0x336e_c578);
            }
        }
        Err(error) => drop((error.to_string(), error.hint())),
    }
}

/// Reads low memory, which begins at offset 0 of the file.
fn read(ram: &Ram, at: Gpa, bytes: &mut [u8]) {
    let memory = File::from(ram.fd().try_clone().expect("a descriptor"));
    memory.read_exact_at(bytes, at.0).expect("inside");
}
