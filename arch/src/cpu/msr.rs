//! Model-specific registers: the very few that are set, and all for a reset. `KVM_SET_MSRS` stops at the first
//! one that it refuses, so that every step here goes on behind it.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

const TSC: u32 = 0x10;
const MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
const MTRR_DEFAULT_TYPE: u32 = 0x2ff;
const MTRR_ENABLED: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;

/// How many registers go into one call.
const BATCH: usize = 128;

/// Write-back memory by default, without which Linux disables its page attribute table; and fast strings, without
/// which it avoids `rep movs` on Intel.
pub(super) fn set_initial(vcpu: &VcpuFd, index: u8, intel: bool) {
    let mut wanted = vec![entry(MTRR_DEFAULT_TYPE, MTRR_ENABLED | MTRR_WRITE_BACK)];
    if intel {
        let now = read_all(vcpu, &[MISC_ENABLE]).first().map_or(0, |entry| entry.data);
        wanted.push(entry(MISC_ENABLE, now | MISC_ENABLE_FAST_STRINGS));
    }
    write_all(vcpu, index, &wanted);
}

/// The registers that can be read. The time stamp counter is left out: it only goes forward.
pub(super) fn read_all(vcpu: &VcpuFd, indices: &[u32]) -> Vec<kvm_msr_entry> {
    let wanted: Vec<_> =
        indices.iter().filter(|index| **index != TSC).map(|index| entry(*index, 0)).collect();
    let mut found = Vec::with_capacity(wanted.len());
    each_accepted(&wanted, |batch| {
        let done = vcpu.get_msrs(batch).unwrap_or(0);
        found.extend(batch.as_slice().iter().take(done).copied());
        done
    });
    found
}

/// Writes what KVM takes and warns of the rest.
pub(super) fn write_all(vcpu: &VcpuFd, index: u8, entries: &[kvm_msr_entry]) {
    let refused = each_accepted(entries, |batch| vcpu.set_msrs(batch).unwrap_or(0));
    if !refused.is_empty() {
        let list: Vec<_> = refused.iter().map(|entry| format!("{:#x}", entry.index)).collect();
        log::warn!("KVM refused to set MSRs of vCPU {index}: {}", list.join(" "));
    }
}

/// Calls `step` for batch after batch; it says how many entries, from the first, were accepted. The one behind
/// those is skipped. Returns the skipped ones.
fn each_accepted(entries: &[kvm_msr_entry], mut step: impl FnMut(&mut Msrs) -> usize) -> Vec<kvm_msr_entry> {
    let mut refused = Vec::new();
    let mut rest = entries;
    while !rest.is_empty() {
        let batch = rest.get(..BATCH).unwrap_or(rest);
        let accepted = match Msrs::from_entries(batch) {
            Ok(mut msrs) => step(&mut msrs).min(batch.len()),
            Err(_) => 0,
        };
        let mut behind = rest.get(accepted..).unwrap_or_default();
        if accepted < batch.len()
            && let Some((skipped, after)) = behind.split_first()
        {
            refused.push(*skipped);
            behind = after;
        }
        rest = behind;
    }
    refused
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_msr_is_tried_although_some_are_refused() {
        let entries: Vec<_> = (0..300).map(|index| entry(index, 0)).collect();
        let refuse = |index: u32| index % 7 == 3 || index == 0 || index == 299;
        let mut accepted: Vec<u32> = Vec::new();
        let refused = each_accepted(&entries, |batch| {
            let good = batch.as_slice().iter().take_while(|entry| !refuse(entry.index));
            let good: Vec<_> = good.map(|entry| entry.index).collect();
            accepted.extend(&good);
            good.len()
        });
        let refused: Vec<_> = refused.iter().map(|entry| entry.index).collect();
        assert_eq!(refused, (0..300).filter(|index| refuse(*index)).collect::<Vec<_>>());
        assert_eq!(accepted, (0..300).filter(|index| !refuse(*index)).collect::<Vec<_>>());
    }
}
