//! vCPUs: what the guest sees of its CPUs, the state in which they start, and the return to it.
//!
//! KVM is not always the same KVM: what it does not know is warned of once and left out. No feature MSR is
//! written. Must never make up a CPU feature that KVM did not report.

mod cpuid;
mod msr;
mod registers;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, kvm_cpuid_entry2,
    kvm_debugregs, kvm_fpu, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use crate::boot::Entry;
use crate::platform::{Discovery, Platform};

/// Errors of this module.
#[derive(Debug, thiserror::Error)]
#[error("KVM refused to {action} of vCPU {vcpu}")]
pub struct Error {
    action: &'static str,
    vcpu: u8,
    source: kvm_ioctls::Error,
}

/// KVM cannot say what its CPUs can.
#[derive(Debug, thiserror::Error)]
#[error("KVM does not tell which CPU features it supports")]
pub struct ProbeError(#[source] kvm_ioctls::Error);

/// What the host's KVM offers its vCPUs. The same for all of a machine: asked once.
#[derive(Clone, Debug)]
pub struct HostCpu {
    cpuid: Vec<kvm_cpuid_entry2>,
    tsc_deadline: bool,
    /// Registers that are saved for a reset.
    msrs: Vec<u32>,
}

impl HostCpu {
    /// Asks KVM.
    pub fn probe(kvm: &Kvm) -> Result<Self, ProbeError> {
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(ProbeError)?;
        let msrs = match kvm.get_msr_index_list() {
            Ok(list) => list.as_slice().to_vec(),
            Err(error) => {
                log::warn!("KVM does not list its MSRs, they keep their values over a reset: {error}");
                Vec::new()
            }
        };
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        Ok(Self { cpuid: cpuid.as_slice().to_vec(), tsc_deadline, msrs })
    }

    /// Width of guest-physical addresses in bits: RAM must end below.
    pub fn physical_address_bits(&self) -> u8 {
        cpuid::physical_address_bits(&self.cpuid)
    }
}

/// A vCPU's state at power-on, to start from and to return to.
#[derive(Debug)]
pub struct PowerOn {
    vcpu: u8,
    sregs: kvm_sregs,
    fpu: Option<kvm_fpu>,
    lapic: Option<kvm_lapic_state>,
    events: Option<kvm_vcpu_events>,
    xcrs: Option<kvm_xcrs>,
    debug: Option<kvm_debugregs>,
    msrs: Vec<kvm_msr_entry>,
}

/// Gives a vCPU that never ran its CPUID, its local APIC's pins and its few MSRs, and keeps the state that it then
/// has. Once per vCPU; `index` is its APIC id. Wants the in-kernel irqchip to exist.
pub fn configure(vcpu: &VcpuFd, index: u8, host: &HostCpu, platform: &Platform) -> Result<PowerOn, Error> {
    let entries = cpuid::for_vcpu(&host.cpuid, host.tsc_deadline, index, platform.cpus);
    let set = CpuId::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(7 /* E2BIG */));
    if let Err(error) = set.and_then(|cpuid| vcpu.set_cpuid2(&cpuid)) {
        log::warn!("KVM refused the CPUID of vCPU {index}, the guest sees KVM's default: {error}");
    }
    msr::set_initial(vcpu, index, cpuid::is_intel(&host.cpuid));

    let lapic = or_warn(index, "read the local APIC", vcpu.get_lapic()).map(|mut lapic| {
        registers::set_local_pins(&mut lapic, platform.discovery == Discovery::Cmdline);
        lapic
    });
    if let Some(lapic) = &lapic {
        or_warn(index, "set the local APIC", vcpu.set_lapic(lapic));
    }
    Ok(PowerOn {
        vcpu: index,
        sregs: vcpu.get_sregs().map_err(|source| Error {
            action: "read the registers",
            vcpu: index,
            source,
        })?,
        fpu: or_warn(index, "read the FPU", vcpu.get_fpu()),
        lapic,
        events: or_warn(index, "read pending events", vcpu.get_vcpu_events()),
        xcrs: or_warn(index, "read the extended control registers", vcpu.get_xcrs()),
        debug: or_warn(index, "read the debug registers", vcpu.get_debug_regs()),
        msrs: msr::read_all(vcpu, &host.msrs),
    })
}

impl PowerOn {
    /// Brings a vCPU that ran, and is not running, back to the state at power-on. [`Self::enter`] comes after.
    pub fn reset(&self, vcpu: &VcpuFd) -> Result<(), Error> {
        let failed = |action| move |source| Error { action, vcpu: self.vcpu, source };
        // The mode of the local APIC, in its base register, must be right before the APIC's own state.
        vcpu.set_sregs(&self.sregs).map_err(failed("reset the registers"))?;
        vcpu.set_regs(&kvm_regs { rflags: registers::RFLAGS, ..Default::default() })
            .map_err(failed("reset the registers"))?;
        msr::write_all(vcpu, self.vcpu, &self.msrs);
        self.put("the FPU", self.fpu.as_ref(), |fpu| vcpu.set_fpu(fpu));
        self.put("extended control registers", self.xcrs.as_ref(), |xcrs| vcpu.set_xcrs(xcrs));
        self.put("debug registers", self.debug.as_ref(), |debug| vcpu.set_debug_regs(debug));
        self.put("the local APIC", self.lapic.as_ref(), |lapic| vcpu.set_lapic(lapic));
        self.put("pending events", self.events.as_ref(), |events| vcpu.set_vcpu_events(events));
        Ok(())
    }

    /// Makes the boot CPU (index 0) ready to run at `entry`, and any other wait for its start-up interrupt.
    pub fn enter(&self, vcpu: &VcpuFd, entry: &Entry) -> Result<(), Error> {
        let failed = |action| move |source| Error { action, vcpu: self.vcpu, source };
        let state = if self.vcpu == 0 { KVM_MP_STATE_RUNNABLE } else { KVM_MP_STATE_UNINITIALIZED };
        or_warn(self.vcpu, "set the run state", vcpu.set_mp_state(kvm_mp_state { mp_state: state }));
        if self.vcpu == 0 {
            let sregs = registers::special(self.sregs, entry.protocol);
            vcpu.set_sregs(&sregs).map_err(failed("set the control registers and segments"))?;
            vcpu.set_regs(&registers::general(entry)).map_err(failed("set the registers"))?;
        }
        Ok(())
    }

    fn put<T>(&self, what: &str, value: Option<&T>, set: impl FnOnce(&T) -> Result<(), kvm_ioctls::Error>) {
        if let Some(Err(error)) = value.map(set) {
            log::warn!("cannot reset {what} of vCPU {}: {error}", self.vcpu);
        }
    }
}

fn or_warn<T>(vcpu: u8, action: &str, result: Result<T, kvm_ioctls::Error>) -> Option<T> {
    result.inspect_err(|error| log::warn!("KVM cannot {action} of vCPU {vcpu}: {error}")).ok()
}
