//! The registers at the entry of a kernel (Linux boot protocol §64-bit, PVH start of day), and the local
//! interrupt pins. Pure.

use kvm_bindings::{kvm_dtable, kvm_lapic_state, kvm_regs, kvm_segment, kvm_sregs};

use crate::boot::{Entry, GDT, Protocol};
use crate::layout::{BOOT_GDT, BOOT_STACK, PAGE_TABLES};

const CR0_PROTECTED: u64 = 1;
const CR0_EXTENSION: u64 = 1 << 4;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_ENABLED: u64 = 1 << 8;
const EFER_LONG_ACTIVE: u64 = 1 << 10;
/// The bit of RFLAGS that is always set.
pub(super) const RFLAGS: u64 = 2;

const SELECTOR_CODE_32: u16 = 0x08;
const SELECTOR_CODE_64: u16 = 0x10;
const SELECTOR_DATA: u16 = 0x18;
const SELECTOR_TSS: u16 = 0x20;

pub(super) fn general(entry: &Entry) -> kvm_regs {
    let mut regs = kvm_regs { rip: entry.start.0, rsp: BOOT_STACK.0, rflags: RFLAGS, ..Default::default() };
    match entry.protocol {
        Protocol::Pvh => regs.rbx = entry.parameters.0,
        Protocol::Linux64 => regs.rsi = entry.parameters.0,
    }
    regs
}

pub(super) fn special(mut sregs: kvm_sregs, protocol: Protocol) -> kvm_sregs {
    let long = protocol == Protocol::Linux64;
    sregs.cs = code(if long { SELECTOR_CODE_64 } else { SELECTOR_CODE_32 }, long);
    let data = flat(SELECTOR_DATA, 3);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { limit: 0x67, s: 0, g: 0, db: 0, ..flat(SELECTOR_TSS, 11) };
    let limit = u16::try_from(size_of_val(&GDT) - 1).unwrap_or(u16::MAX);
    sregs.gdt = kvm_dtable { base: BOOT_GDT.0, limit, ..Default::default() };
    sregs.idt = kvm_dtable::default();
    sregs.cr0 = CR0_PROTECTED | CR0_EXTENSION;
    (sregs.cr3, sregs.cr4, sregs.efer) = (0, 0, 0);
    if long {
        sregs.cr0 |= CR0_PAGING;
        sregs.cr3 = PAGE_TABLES.0;
        sregs.cr4 = CR4_PAE;
        sregs.efer = EFER_LONG_ENABLED | EFER_LONG_ACTIVE;
    }
    sregs
}

/// A flat segment. The type must have the accessed bit set, because Intel's VM entry requires it.
fn flat(selector: u16, kind: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

fn code(selector: u16, long: bool) -> kvm_segment {
    kvm_segment { l: u8::from(long), db: u8::from(!long), ..flat(selector, 11) }
}

const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const MODE_NMI: u32 = 4 << 8;
const MODE_EXT_INT: u32 = 7 << 8;
const MASKED: u32 = 1 << 16;

/// Sets LINT1 to NMI. LINT0 takes the output of the 8259s; it is masked unless the guest knows of them.
pub(super) fn set_local_pins(lapic: &mut kvm_lapic_state, with_8259: bool) {
    let lint0 = if with_8259 { MODE_EXT_INT } else { MODE_EXT_INT | MASKED };
    for (register, value) in [(LVT_LINT0, lint0), (LVT_LINT1, MODE_NMI)] {
        for (slot, byte) in lapic.regs.iter_mut().skip(register).zip(value.to_le_bytes()) {
            *slot = byte.cast_signed();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Gpa;

    /// The segment register that a CPU would load from the boot GDT for a selector.
    fn from_gdt(selector: u16) -> (u8, u8, u8, u8, u32) {
        let descriptor = GDT[usize::from(selector / 8)];
        let field = |shift: u32, mask: u64| u8::try_from(descriptor >> shift & mask).unwrap();
        let limit = (descriptor & 0xffff) | (descriptor >> 32 & 0xf_0000);
        let limit = if field(55, 1) == 1 { limit << 12 | 0xfff } else { limit };
        (field(40, 15), field(44, 1), field(53, 1), field(54, 1), u32::try_from(limit).unwrap())
    }

    #[test]
    fn segments_are_what_the_boot_gdt_says() {
        for protocol in [Protocol::Pvh, Protocol::Linux64] {
            let sregs = special(kvm_sregs::default(), protocol);
            for segment in [sregs.cs, sregs.ds, sregs.ss, sregs.tr] {
                let loaded = (segment.type_, segment.s, segment.l, segment.db, segment.limit);
                assert_eq!(loaded, from_gdt(segment.selector), "{protocol:?} {:#x}", segment.selector);
            }
        }
    }

    #[test]
    fn pvh_starts_without_paging_and_linux64_in_long_mode() {
        let pvh = special(kvm_sregs::default(), Protocol::Pvh);
        assert_eq!((pvh.cr0, pvh.cr4, pvh.efer, pvh.cs.l), (0x11, 0, 0, 0));
        let long = special(kvm_sregs::default(), Protocol::Linux64);
        assert_eq!((long.cr0, long.cr3, long.cr4, long.efer), (0x8000_0011, 0x9000, 0x20, 0x500));
        let entry = Entry { protocol: Protocol::Pvh, start: Gpa(0x10_0000), parameters: Gpa(0x6000) };
        assert_eq!((general(&entry).rip, general(&entry).rbx), (0x10_0000, 0x6000));
    }

    #[test]
    fn lint0_is_masked_where_the_guest_is_not_told_of_the_8259s() {
        let mut lapic = kvm_lapic_state::default();
        set_local_pins(&mut lapic, false);
        assert_eq!(lapic.regs[0x350..0x354], [0, 7, 1, 0]);
        assert_eq!(lapic.regs[0x360..0x364], [0, 4, 0, 0]);
        set_local_pins(&mut lapic, true);
        assert_eq!(lapic.regs[0x350..0x354], [0, 7, 0, 0]);
    }
}
