//! A few bytes of guest code, loaded and entered by both protocols on this machine's KVM.
//!
//! The guest memory that KVM runs on must be mapped, which `arch` itself never does: hence the unsafe calls here.
#![allow(unsafe_code)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs::File;
use std::io::Write;

use arch::boot::{self, BootImage, Protocol};
use arch::cpu::{self, HostCpu};
use arch::irq::RoutingTable;
use arch::layout::{KVM_IDENTITY_MAP, KVM_TSS, RAM_MIN};
use arch::platform::{Discovery, Platform, SerialPort};
use arch::ram::{Hugepages, Ram};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_memory::{FileOffset, MmapRegion};

const PORT: u16 = 0xf4;
/// More exits than any payload here needs.
const MAX_EXITS: usize = 100;

/// `mov dx, 0xf4; mov eax, [rbx or rsi + offset]; out dx, eax; hlt`.
fn payload(register: u8, offset: u8) -> Vec<u8> {
    vec![0x66, 0xba, 0xf4, 0x00, 0x8b, 0x40 | register, offset, 0xef, 0xf4]
}
const FROM_EBX: u8 = 3;
const FROM_ESI: u8 = 6;

/// An ELF64 executable of one segment at 1 MiB, with a PVH note if asked for.
fn elf(code: &[u8], pvh: Option<u32>) -> Vec<u8> {
    const LOAD_AT: u64 = 0x10_0000;
    let note: Vec<u8> = pvh.map_or(Vec::new(), |entry| {
        let words = [4, 4, 18, u32::from_le_bytes(*b"Xen\0"), entry];
        words.iter().flat_map(|word: &u32| word.to_le_bytes()).collect()
    });
    let headers: u64 = 64 + 2 * 56;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    file.extend(LOAD_AT.to_le_bytes());
    file.extend(64_u64.to_le_bytes());
    file.extend([0; 12]);
    file.extend([64, 0, 56, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    let (code_len, note_len) = (u64::try_from(code.len()).unwrap(), u64::try_from(note.len()).unwrap());
    for (kind, at, len, mem) in
        [(1_u32, headers, code_len, code_len + 4096), (4, headers + code_len, note_len, note_len)]
    {
        file.extend(kind.to_le_bytes());
        file.extend(7_u32.to_le_bytes());
        for word in [at, LOAD_AT, LOAD_AT, len, mem, 4] {
            file.extend(word.to_le_bytes());
        }
    }
    file.extend(code);
    file.extend(note);
    file
}

/// A file of its own, without a name.
fn file_of(bytes: &[u8]) -> File {
    let fd = rustix::fs::memfd_create("payload", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut file = File::from(fd);
    file.write_all(bytes).unwrap();
    file
}

struct Machine {
    vcpu: VcpuFd,
    _vm: VmFd,
    ram: Ram,
    host: HostCpu,
    platform: Platform,
    _mappings: Vec<MmapRegion>,
}

impl Machine {
    /// `None`, with a printed reason, where there is no KVM.
    fn new(discovery: Discovery) -> Option<Self> {
        Self::with_ram(discovery, None)
    }

    fn with_ram(discovery: Discovery, ram: Option<Ram>) -> Option<Self> {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) => {
                println!("skipped: /dev/kvm cannot be used: {error}");
                return None;
            }
        };
        let vm = kvm.create_vm().unwrap();
        if let Err(error) = vm.set_identity_map_address(KVM_IDENTITY_MAP.0) {
            println!("no identity map: {error}");
        }
        if let Err(error) = vm.set_tss_address(usize::try_from(KVM_TSS.0).unwrap()) {
            println!("no TSS: {error}");
        }
        if let Err(error) = vm.create_irq_chip() {
            println!("skipped: no in-kernel irqchip: {error}");
            return None;
        }
        RoutingTable::new(discovery, 4096).apply(&vm).unwrap();
        let ram = ram.unwrap_or_else(|| Ram::allocate(RAM_MIN, Hugepages::Off).unwrap());
        let mut mappings = Vec::new();
        for (slot, region) in (0_u32..).zip(ram.regions()) {
            let file = FileOffset::new(File::from(ram.fd().try_clone().unwrap()), region.offset);
            let mapping: MmapRegion =
                MmapRegion::from_file(file, usize::try_from(region.size).unwrap()).unwrap();
            let memory = kvm_userspace_memory_region {
                slot,
                guest_phys_addr: region.guest.0,
                memory_size: region.size,
                userspace_addr: u64::try_from(mapping.as_ptr().addr()).unwrap(),
                flags: 0,
            };
            // SAFETY: the mapping is as large as the slot and lives as long as the VM, in the same struct.
            unsafe { vm.set_user_memory_region(memory) }.unwrap();
            mappings.push(mapping);
        }
        let vcpu = vm.create_vcpu(0).unwrap();
        let host = HostCpu::probe(&kvm).unwrap();
        let platform = Platform {
            cpus: 1,
            virtio_mmio: Vec::new(),
            pci: None,
            serial: Some(SerialPort::COM1),
            discovery,
        };
        Some(Self { vcpu, _vm: vm, ram, host, platform, _mappings: mappings })
    }

    fn load(&self, kernel: &[u8], initramfs: Option<&[u8]>) -> boot::Entry {
        let kernel = file_of(kernel);
        let initramfs = initramfs.map(file_of);
        let image = BootImage { kernel: &kernel, initramfs: initramfs.as_ref(), cmdline: "quiet" };
        boot::load(&self.ram, &image, &self.platform).unwrap()
    }

    /// Runs until the guest writes to [`PORT`], and says what.
    fn value_from_guest(&mut self) -> u32 {
        for _ in 0..MAX_EXITS {
            match self.vcpu.run().unwrap() {
                VcpuExit::IoOut(PORT, data) => return u32::from_le_bytes(data.try_into().unwrap()),
                VcpuExit::Hlt | VcpuExit::Shutdown => break,
                other => println!("exit: {other:?}"),
            }
        }
        panic!("the guest never wrote: {:?}", self.vcpu.get_regs());
    }
}

#[test]
fn a_payload_with_a_pvh_note_starts_in_protected_mode_with_its_start_info() {
    let Some(mut machine) = Machine::new(Discovery::Acpi) else { return };
    let power_on = cpu::configure(&machine.vcpu, 0, &machine.host, &machine.platform).unwrap();
    let entry = machine.load(&elf(&payload(FROM_EBX, 0), Some(0x10_0000)), None);
    assert_eq!(entry.protocol, Protocol::Pvh);
    power_on.enter(&machine.vcpu, &entry).unwrap();
    assert_eq!(machine.value_from_guest(), 0x336e_c578, "the magic of hvm_start_info");
    let sregs = machine.vcpu.get_sregs().unwrap();
    assert_eq!((sregs.cr0 & 0x8000_0001, sregs.cs.l), (1, 0));
}

#[test]
fn a_payload_without_a_note_starts_in_long_mode_with_its_boot_params() {
    let Some(mut machine) = Machine::new(Discovery::Cmdline) else { return };
    let power_on = cpu::configure(&machine.vcpu, 0, &machine.host, &machine.platform).unwrap();
    // Bytes 0x1f1 + 0x11 of boot_params: "HdrS". An offset of 8 bits does not reach, so RSI is moved first:
    // add rsi, 0x1ff.
    let mut code = vec![0x48, 0x81, 0xc6, 0xff, 0x01, 0x00, 0x00];
    code.extend(payload(FROM_ESI, 3));
    let entry = machine.load(&elf(&code, None), None);
    assert_eq!(entry.protocol, Protocol::Linux64);
    power_on.enter(&machine.vcpu, &entry).unwrap();
    assert_eq!(machine.value_from_guest(), u32::from_le_bytes(*b"HdrS"));
    assert_eq!(machine.vcpu.get_sregs().unwrap().efer & 0x500, 0x500);
}

#[test]
fn memory_that_a_guest_ran_in_boots_again_in_a_new_machine() {
    let long = elf(&payload(FROM_ESI, 0), None);
    let protected = elf(&payload(FROM_EBX, 4), Some(0x10_0000));
    let mut ram = None;
    for (kernel, expected) in [(&long, 0), (&protected, 1), (&long, 0)] {
        let Some(mut machine) = Machine::with_ram(Discovery::Acpi, ram) else { return };
        let power_on = cpu::configure(&machine.vcpu, 0, &machine.host, &machine.platform).unwrap();
        let entry = machine.load(kernel, Some(b"initramfs"));
        power_on.enter(&machine.vcpu, &entry).unwrap();
        assert_eq!(machine.value_from_guest(), expected);
        ram = Some(machine.ram);
    }
}
