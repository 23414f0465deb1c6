//! The few model-specific registers that are set before a vCPU runs. A register that KVM refuses is left as
//! it is.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

const MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const MTRR_ENABLED: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// Sets two registers and returns those that were refused.
///
/// * The default memory type is write-back. Without it Linux disables its page attribute table.
/// * Fast strings are enabled on Intel. Without them Linux avoids `rep movs`.
pub(super) fn set_initial(vcpu: &VcpuFd, intel: bool) -> Vec<u32> {
    let mut wanted = vec![(MTRR_DEFAULT_TYPE, MTRR_ENABLED | MTRR_WRITE_BACK)];
    if intel {
        wanted.push((MISC_ENABLE, read(vcpu, MISC_ENABLE).unwrap_or(0) | MISC_ENABLE_FAST_STRINGS));
    }
    wanted.into_iter().filter(|(index, value)| !write(vcpu, *index, *value)).map(|(index, _)| index).collect()
}

fn read(vcpu: &VcpuFd, index: u32) -> Option<u64> {
    let mut msrs = one(index, 0)?;
    match vcpu.get_msrs(&mut msrs) {
        Ok(1) => msrs.as_slice().first().map(|entry| entry.data),
        _ => None,
    }
}

/// `KVM_SET_MSRS` returns the number of registers that it has set. A refused register is no error of the
/// ioctl.
fn write(vcpu: &VcpuFd, index: u32, value: u64) -> bool {
    one(index, value).is_some_and(|msrs| matches!(vcpu.set_msrs(&msrs), Ok(1)))
}

fn one(index: u32, data: u64) -> Option<Msrs> {
    Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }]).ok()
}
