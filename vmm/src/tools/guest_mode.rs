//! Runs single instructions in guest mode to find out which instructions a KVM can execute. No capability of
//! KVM says this.
//!
//! A KVM without hardware virtualisation emulates the guest's kernel code, and stops at an instruction that
//! its emulator does not know. Each probe runs in 64-bit mode at privilege level 0, in a VM of its own, and
//! ends with `hlt`.

use std::sync::Arc;

use arch::width::{to_u64, to_usize};
use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use vm_memory::Bytes;

use crate::error::Error;
use crate::host::kvm;
use crate::host::mapping::Mapping;
use crate::host::slots::{Slot, Slots};
use devices::ports::Access;

/// One instruction, or a few, that stock kernels execute.
#[derive(Clone, Copy, Debug)]
pub(super) struct Probe {
    /// The mnemonic.
    pub(super) name: &'static str,
    /// Machine code. When it starts, `rdi` points at 4 KiB of zeroed memory, aligned to 64 bytes.
    code: &'static [u8],
}

/// Instructions that stock distribution kernels use unconditionally on every x86-64 processor.
pub(super) const PROBES: &[Probe] = &[
    Probe { name: "mov", code: &[0x48, 0x8b, 0x07] },
    Probe { name: "push and pop", code: &[0x50, 0x58] },
    Probe { name: "lock cmpxchg", code: &[0xf0, 0x48, 0x0f, 0xb1, 0x0f] },
    Probe { name: "lock cmpxchg16b", code: &[0xf0, 0x48, 0x0f, 0xc7, 0x0f] },
    Probe { name: "xchg", code: &[0x48, 0x87, 0x07] },
    Probe { name: "lock xadd", code: &[0xf0, 0x48, 0x0f, 0xc1, 0x07] },
    Probe { name: "bts", code: &[0x48, 0x0f, 0xba, 0x2f, 0x05] },
    Probe { name: "bsf", code: &[0x48, 0x0f, 0xbc, 0xc7] },
    Probe { name: "imul", code: &[0x48, 0x0f, 0xaf, 0xc7] },
    Probe { name: "div", code: &[0x31, 0xd2, 0x48, 0xf7, 0xf7] },
    Probe { name: "bswap", code: &[0x48, 0x0f, 0xc8] },
    Probe { name: "cmov", code: &[0x48, 0x0f, 0x44, 0xc7] },
    Probe { name: "rep stosq", code: &[0x31, 0xc0, 0xb9, 0x08, 0, 0, 0, 0xf3, 0x48, 0xab] },
    Probe { name: "pause", code: &[0xf3, 0x90] },
    Probe { name: "mfence", code: &[0x0f, 0xae, 0xf0] },
    Probe { name: "lfence", code: &[0x0f, 0xae, 0xe8] },
    Probe { name: "clflush", code: &[0x0f, 0xae, 0x3f] },
    Probe { name: "prefetcht0", code: &[0x0f, 0x18, 0x0f] },
    Probe { name: "movnti", code: &[0x48, 0x0f, 0xc3, 0x07] },
    Probe { name: "cpuid", code: &[0x31, 0xc0, 0x31, 0xc9, 0x0f, 0xa2] },
    Probe { name: "rdtsc", code: &[0x0f, 0x31] },
    Probe { name: "rdmsr", code: &[0xb9, 0x80, 0x00, 0x00, 0xc0, 0x0f, 0x32] },
    Probe { name: "swapgs", code: &[0x0f, 0x01, 0xf8] },
    Probe { name: "mov from cr4", code: &[0x0f, 0x20, 0xe0] },
    Probe { name: "mov to cr3", code: &[0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8] },
    Probe { name: "mov to dr7", code: &[0x31, 0xc0, 0x0f, 0x23, 0xf8] },
    Probe { name: "invlpg", code: &[0x0f, 0x01, 0x3f] },
    Probe { name: "sgdt", code: &[0x0f, 0x01, 0x07] },
    Probe { name: "sidt", code: &[0x0f, 0x01, 0x0f] },
    Probe { name: "str", code: &[0x0f, 0x00, 0xc8] },
    Probe { name: "lldt", code: &[0x31, 0xc0, 0x0f, 0x00, 0xd0] },
    Probe { name: "pushf and popf", code: &[0x9c, 0x9d] },
    Probe { name: "fninit", code: &[0xdb, 0xe3] },
    Probe { name: "fnstsw", code: &[0xdf, 0xe0] },
    Probe { name: "fxsave", code: &[0x48, 0x0f, 0xae, 0x07] },
    Probe { name: "fxrstor", code: &[0x48, 0x0f, 0xae, 0x07, 0x48, 0x0f, 0xae, 0x0f] },
    Probe { name: "ldmxcsr", code: &[0xc7, 0x07, 0x80, 0x1f, 0, 0, 0x0f, 0xae, 0x17] },
    Probe { name: "movdqu", code: &[0xf3, 0x0f, 0x6f, 0x07] },
    Probe { name: "pxor", code: &[0x66, 0x0f, 0xef, 0xc0] },
    Probe { name: "movq to xmm", code: &[0x66, 0x48, 0x0f, 0x6e, 0xc0] },
];

/// How a probe ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It reached its `hlt`.
    Works,
    /// It did not; the text says what KVM reported.
    Fails(String),
}

const CODE: u64 = 0x1000;
const DATA: u64 = 0x2000;
const STACK: u64 = 0x3ff0;
const PML4: u64 = 0x4000;
const PDPT: u64 = 0x5000;
const GDT: u64 = 0x6000;
const PAGE_DIRECTORY: u64 = 0x7000;
const MEMORY: u64 = 0x10000;

/// A VM with one vCPU and 64 KiB.
pub(super) struct Bench {
    vcpu: VcpuFd,
    memory: Mapping,
    clean: kvm_bindings::kvm_sregs,
    _slot: Slot,
}

impl Bench {
    /// Makes the VM.
    ///
    /// # Errors
    /// When KVM refuses any part of it.
    pub(super) fn new(kvm: &Kvm) -> Result<Self, Error> {
        let cannot = |error: kvm_ioctls::Error| Error::host("cannot make a VM for the checks").because(error);
        let vm = Arc::new(kvm.create_vm().map_err(cannot)?);
        let memory = Mapping::anonymous(MEMORY)
            .map_err(|error| Error::host("no memory for the checks").because(error))?;
        let slot = Slots::new(Arc::clone(&vm), kvm::slot_limit(kvm))
            .add(0, memory.clone(), Access::ReadWrite)
            .map_err(|error| Error::host("no memory slot for the checks").because(error))?;
        let vcpu = vm.create_vcpu(0).map_err(cannot)?;
        let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).map_err(cannot)?;
        vcpu.set_cpuid2(&cpuid).map_err(cannot)?;
        let clean = vcpu.get_sregs().map_err(cannot)?;
        Ok(Bench { vcpu, memory, clean, _slot: slot })
    }

    /// Runs one probe.
    pub(super) fn run(&mut self, probe: &Probe) -> Verdict {
        match self.try_run(probe) {
            Ok(()) => Verdict::Works,
            Err(why) => Verdict::Fails(why),
        }
    }

    fn try_run(&mut self, probe: &Probe) -> Result<(), String> {
        let text = |error: kvm_ioctls::Error| error.to_string();
        self.load(probe).map_err(|error| error.to_string())?;
        self.vcpu.set_sregs(&self.long_mode()).map_err(text)?;
        let regs = kvm_regs { rip: CODE, rsp: STACK, rdi: DATA, rflags: 2, ..Default::default() };
        self.vcpu.set_regs(&regs).map_err(text)?;
        match self.vcpu.run().map_err(text)? {
            VcpuExit::Hlt => {}
            VcpuExit::InternalError => return Err("KVM cannot emulate it (internal error)".to_owned()),
            VcpuExit::Shutdown => return Err("it faults".to_owned()),
            other => return Err(format!("{other:?}")),
        }
        let reached = self.vcpu.get_regs().map_err(text)?.rip;
        let expected = CODE + to_u64(probe.code.len()) + 1;
        if reached == expected { Ok(()) } else { Err(format!("it stopped at {reached:#x}")) }
    }

    fn load(&self, probe: &Probe) -> Result<(), vm_memory::VolatileMemoryError> {
        let memory = self.memory.region();
        let at = to_usize;
        memory_write(memory, at(DATA), &[0; 4096])?;
        memory_write(memory, at(CODE), probe.code)?;
        memory_write(memory, at(CODE).saturating_add(probe.code.len()), &[0xf4])?;
        memory_write(memory, at(PML4), &(PDPT | 3).to_le_bytes())?;
        memory_write(memory, at(PDPT), &(PAGE_DIRECTORY | 3).to_le_bytes())?;
        // One 2 MiB page, identity-mapped: present, writable, large.
        memory_write(memory, at(PAGE_DIRECTORY), &0x83_u64.to_le_bytes())?;
        for (index, descriptor) in
            [0, 0, 0x00af_9b00_0000_ffff_u64, 0x00cf_9300_0000_ffff].into_iter().enumerate()
        {
            memory_write(memory, at(GDT).saturating_add(index * 8), &descriptor.to_le_bytes())?;
        }
        Ok(())
    }

    fn long_mode(&self) -> kvm_bindings::kvm_sregs {
        let mut sregs = self.clean;
        let code = kvm_segment {
            limit: 0xffff_ffff,
            selector: 0x10,
            type_: 11,
            present: 1,
            s: 1,
            l: 1,
            g: 1,
            ..Default::default()
        };
        let data = kvm_segment { selector: 0x18, type_: 3, l: 0, db: 1, ..code };
        sregs.cs = code;
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.gdt.base = GDT;
        sregs.gdt.limit = 31;
        sregs.cr3 = PML4;
        sregs.cr4 = 0x620; // PAE, OSFXSR, OSXMMEXCPT
        sregs.cr0 = 0x8005_0033; // PG, AM, WP, NE, ET, MP, PE
        sregs.efer = 0x500; // LME, LMA
        sregs
    }
}

fn memory_write(
    memory: &vm_memory::MmapRegion,
    offset: usize,
    bytes: &[u8],
) -> Result<(), vm_memory::VolatileMemoryError> {
    use vm_memory::VolatileMemory;
    memory.as_volatile_slice().write_slice(bytes, offset)
}
