//! The registers of a vCPU as text, for the report of a guest crash. They help the reader to find out why the
//! guest crashed.

use std::fmt::Write;

use kvm_ioctls::VcpuFd;

/// The registers of a vCPU as a few lines of text.
pub(crate) fn describe_registers(vcpu: &VcpuFd, index: u8) -> String {
    let mut text = format!("vCPU {index}:\n");
    // Writing to a String cannot fail.
    write(&mut text, vcpu).unwrap_or_default();
    text
}

fn write(text: &mut String, vcpu: &VcpuFd) -> std::fmt::Result {
    match vcpu.get_regs() {
        Ok(r) => {
            writeln!(text, "  rip {:016x}  rflags {:08x}  rsp {:016x}", r.rip, r.rflags, r.rsp)?;
            writeln!(
                text,
                "  rax {:016x}  rbx {:016x}  rcx {:016x}  rdx {:016x}",
                r.rax, r.rbx, r.rcx, r.rdx
            )?;
            writeln!(
                text,
                "  rsi {:016x}  rdi {:016x}  rbp {:016x}  r8  {:016x}",
                r.rsi, r.rdi, r.rbp, r.r8
            )?;
            writeln!(
                text,
                "  r9  {:016x}  r10 {:016x}  r11 {:016x}  r12 {:016x}",
                r.r9, r.r10, r.r11, r.r12
            )?;
            writeln!(text, "  r13 {:016x}  r14 {:016x}  r15 {:016x}", r.r13, r.r14, r.r15)?;
        }
        Err(error) => writeln!(text, "  KVM does not tell the registers: {error}")?,
    }
    match vcpu.get_sregs() {
        Ok(s) => {
            writeln!(
                text,
                "  cr0 {:08x}  cr2 {:016x}  cr3 {:016x}  cr4 {:08x}  efer {:x}",
                s.cr0, s.cr2, s.cr3, s.cr4, s.efer
            )?;
            writeln!(
                text,
                "  cs {:04x}  ss {:04x}  tr {:04x}  gdt {:x}+{:x}  idt {:x}+{:x}",
                s.cs.selector, s.ss.selector, s.tr.selector, s.gdt.base, s.gdt.limit, s.idt.base, s.idt.limit
            )
        }
        Err(error) => writeln!(text, "  KVM does not tell the control registers: {error}"),
    }
}
