//! vCPUs: the features that the guest sees, and the state in which a vCPU starts.
//!
//! Not every KVM accepts every setting. A setting that KVM refuses is left out, and one warning is logged. No
//! feature MSR is written. The guest must never see a CPU feature that KVM has not reported.

mod cpuid;
mod msr;
mod registers;

use std::fmt;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED, kvm_cpuid_entry2,
    kvm_mp_state, kvm_sregs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use crate::boot::{Entry, cmdline};
use crate::platform::{Discovery, Platform};

/// Errors of this module.
#[derive(Debug, thiserror::Error)]
#[error("KVM refused to {action} of vCPU {vcpu}")]
pub struct Error {
    action: &'static str,
    vcpu: u8,
    source: kvm_ioctls::Error,
}

/// KVM does not report the features of its CPUs.
#[derive(Debug, thiserror::Error)]
#[error("KVM does not tell which CPU features it supports")]
pub struct ProbeError(#[source] kvm_ioctls::Error);

/// The features that the host's KVM offers. They are the same for all vCPUs of a machine, so KVM is asked
/// once.
#[derive(Clone, Debug)]
pub struct HostCpu {
    cpuid: Vec<kvm_cpuid_entry2>,
    tsc_deadline: bool,
}

impl HostCpu {
    /// Asks KVM for its features.
    pub fn probe(kvm: &Kvm) -> Result<Self, ProbeError> {
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(ProbeError)?;
        let tsc_deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        Ok(Self { cpuid: cpuid.as_slice().to_vec(), tsc_deadline })
    }

    /// Adds the frequency of the TSC to the command line `line` of a kernel that is told not to use KVM's
    /// clock. Linux finds the frequency in CPUID on Intel processors only, and this machine has no timer with
    /// which Linux could measure it.
    #[must_use]
    pub fn with_tsc(kvm: &Kvm, line: String) -> String {
        if !cmdline::has(&line, "no-kvmclock") || cmdline::has(&line, "tsc_early_khz=") {
            return line;
        }
        let vcpu = kvm.create_vm().and_then(|vm| vm.create_vcpu(0));
        match vcpu.and_then(|vcpu| vcpu.get_tsc_khz()) {
            Ok(khz) => cmdline::with_parameters(&line, &[format!("tsc_early_khz={khz}")]),
            Err(error) => {
                log::warn!("KVM does not tell the frequency of the TSC: {error}");
                line
            }
        }
    }

    /// Width of guest-physical addresses in bits. RAM must end below the limit that it sets.
    pub fn physical_address_bits(&self) -> u8 {
        cpuid::physical_address_bits(&self.cpuid)
    }
}

/// A vCPU that is configured and has no start address yet.
#[derive(Debug)]
#[must_use = "a vCPU starts where `enter` says"]
pub struct PowerOn {
    vcpu: u8,
    sregs: kvm_sregs,
}

/// Sets the CPUID, the local APIC's pins and the few MSRs of a vCPU that has never run. Called once for each
/// vCPU; `index` is its APIC id. The in-kernel irqchip must exist already. A machine that reboots gets new
/// vCPUs, because KVM cannot put an old vCPU back into its first state.
pub fn configure(vcpu: &VcpuFd, index: u8, host: &HostCpu, platform: &Platform) -> Result<PowerOn, Error> {
    let tsc_khz = or_warn(index, "tell the frequency of the TSC", vcpu.get_tsc_khz());
    let entries = cpuid::for_vcpu(&host.cpuid, host.tsc_deadline, tsc_khz, index, platform.cpus);
    let set = CpuId::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(7 /* E2BIG */));
    if let Err(error) = set.and_then(|cpuid| vcpu.set_cpuid2(&cpuid)) {
        warn(index, format_args!("KVM refused our CPUID, the guest sees KVM's default: {error}"));
    }
    for register in msr::set_initial(vcpu, cpuid::is_intel(&host.cpuid)) {
        warn(index, format_args!("KVM refused to set MSR {register:#x}"));
    }

    if let Some(mut lapic) = or_warn(index, "read the local APIC", vcpu.get_lapic()) {
        registers::set_local_pins(&mut lapic, platform.discovery == Discovery::Cmdline);
        or_warn(index, "set the local APIC", vcpu.set_lapic(&lapic));
    }
    let sregs = vcpu.get_sregs();
    let sregs = sregs.map_err(|source| Error { action: "read the registers", vcpu: index, source })?;
    Ok(PowerOn { vcpu: index, sregs })
}

impl PowerOn {
    /// Makes the boot CPU (index 0) ready to run at `entry`. Every other vCPU waits for its start-up
    /// interrupt.
    pub fn enter(self, vcpu: &VcpuFd, entry: &Entry) -> Result<(), Error> {
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
}

fn or_warn<T>(vcpu: u8, action: &str, result: Result<T, kvm_ioctls::Error>) -> Option<T> {
    result.inspect_err(|error| warn(vcpu, format_args!("KVM cannot {action}: {error}"))).ok()
}

/// Warns about the first vCPU only, because all vCPUs lack the same setting.
fn warn(vcpu: u8, what: fmt::Arguments<'_>) {
    let level = if vcpu == 0 { log::Level::Warn } else { log::Level::Debug };
    log::log!(level, "vCPU {vcpu}: {what}");
}
