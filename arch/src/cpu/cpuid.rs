//! CPUID of a vCPU. The leaves are those that KVM supports, with two changes. The identity of the vCPU and
//! the topology of the machine (one package, one thread for each core) are written in. Features that cannot
//! work are removed. Pure.

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

const LEAF_VENDOR: u32 = 0;
const LEAF_FEATURES: u32 = 1;
const LEAF_CACHES_INTEL: u32 = 4;
const LEAF_EXTENDED_FEATURES: u32 = 7;
const LEAF_PERFORMANCE: u32 = 0xa;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_XSAVE: u32 = 0xd;
const LEAF_SGX: u32 = 0x12;
const LEAF_TRACE: u32 = 0x14;
const LEAF_TSC: u32 = 0x15;
const LEAF_FREQUENCY: u32 = 0x16;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_HYPERVISOR: u32 = 0x4000_0000;
/// A convention among hypervisors: this leaf gives the frequencies of the TSC and of the local APIC's timer,
/// in kHz.
const LEAF_HYPERVISOR_TIMING: u32 = 0x4000_0010;
const LEAF_FEATURES_AMD: u32 = 0x8000_0001;
const LEAF_ADDRESSES: u32 = 0x8000_0008;
const LEAF_SVM: u32 = 0x8000_000a;
const LEAF_CACHES_AMD: u32 = 0x8000_001d;
const LEAF_TOPOLOGY_AMD: u32 = 0x8000_001e;

/// Leaf 1, ECX.
const VMX: u32 = 1 << 5;
const TSC_DEADLINE: u32 = 1 << 24;
const XSAVE: u32 = 1 << 26;
const OSXSAVE: u32 = 1 << 27;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX.
const MULTI_THREADED: u32 = 1 << 28;
/// Leaf 7.0, EBX and ECX.
const SGX: u32 = 1 << 2;
const TRACE: u32 = 1 << 25;
const SGX_LAUNCH: u32 = 1 << 30;
/// Leaf 0x8000_0001, ECX.
const LEGACY_CORES: u32 = 1 << 1;
const SVM: u32 = 1 << 2;

/// Features whose state only XSAVE saves: the leaf and its index, then the bits in EAX, EBX, ECX and EDX.
const NEED_XSAVE: [(u32, u32, [u32; 4]); 4] = [
    // FMA, AVX, F16C.
    (LEAF_FEATURES, 0, [0, 0, 1 << 12 | 1 << 28 | 1 << 29, 0]),
    // EBX: AVX2, MPX, AVX-512. ECX: PKU and OSPKE, shadow stacks, AVX-512, VAES, VPCLMULQDQ. EDX: AVX-512,
    // AMX.
    (LEAF_EXTENDED_FEATURES, 0, [0, 0xdc23_4020, 0x0000_5eda, 0x03c0_010c]),
    // EAX: AVX-VNNI, AVX-512, AMX, AVX-IFMA. EDX: AVX-VNNI-INT8, AVX-NE-CONVERT, AMX, AVX-VNNI-INT16, AVX10,
    // APX.
    (LEAF_EXTENDED_FEATURES, 1, [0x00a0_0030, 0, 0, 0x0028_0530]),
    // XOP, LWP, FMA4.
    (LEAF_FEATURES_AMD, 0, [0, 0, 1 << 11 | 1 << 15 | 1 << 16, 0]),
];
/// Leaves that describe only such features: the XSAVE area, the tiles of AMX, AVX10.
const ONLY_WITH_XSAVE: [u32; 4] = [LEAF_XSAVE, 0x1d, 0x1e, 0x24];

/// The frequency of KVM's local APIC timer, given as the crystal of leaf 0x15.
const CRYSTAL_KHZ: u32 = 1_000_000;

/// The number of address bits of a CPU without leaf 0x8000_0008.
const DEFAULT_ADDRESS_BITS: u8 = 36;

/// The leaves of vCPU `index` of `cpus`.
///
/// Removed:
/// * Nested virtualisation, SGX and processor trace: they need feature MSRs, which are not set.
/// * The architectural performance counters: without them a guest saves their initialisation and its NMI
///   watchdog.
/// * Without XSAVE: AVX and similar features. A KVM that does not offer XSAVE may still offer them.
///
/// KVM's own leaves stay: a guest with KVM's clock calibrates no timer. A guest without it finds the
/// frequency of the TSC in leaves 0x15, 0x16 and 0x4000_0010.
pub(super) fn for_vcpu(
    supported: &[kvm_cpuid_entry2],
    tsc_deadline: bool,
    tsc_khz: Option<u32>,
    index: u8,
    cpus: u8,
) -> Vec<kvm_cpuid_entry2> {
    let absent = [LEAF_SGX, LEAF_TRACE, LEAF_TOPOLOGY, LEAF_TOPOLOGY_V2, LEAF_SVM];
    let mut entries: Vec<_> =
        supported.iter().filter(|entry| !absent.contains(&entry.function)).copied().collect();
    let topology = Topology { id: u32::from(index), cpus: u32::from(cpus), amd: is_amd(supported) };
    for entry in &mut entries {
        edit(entry, &topology, tsc_deadline);
    }
    if highest_leaf(supported) >= LEAF_TOPOLOGY {
        entries.extend(topology.leaves(LEAF_TOPOLOGY));
    }
    if find(supported, LEAF_FEATURES).is_none_or(|entry| entry.ecx & XSAVE == 0) {
        without_xsave(&mut entries);
    }
    if let Some(khz) = tsc_khz {
        tell_frequency(&mut entries, khz);
    }
    entries
}

fn without_xsave(entries: &mut Vec<kvm_cpuid_entry2>) {
    entries.retain(|entry| !ONLY_WITH_XSAVE.contains(&entry.function));
    for entry in entries {
        let bits =
            NEED_XSAVE.iter().find(|(leaf, index, _)| (*leaf, *index) == (entry.function, entry.index));
        if let Some((_, _, [eax, ebx, ecx, edx])) = bits {
            (entry.eax, entry.ebx) = (entry.eax & !eax, entry.ebx & !ebx);
            (entry.ecx, entry.edx) = (entry.ecx & !ecx, entry.edx & !edx);
        }
    }
}

/// Writes the frequency of the TSC into the leaves that report it, unless KVM has filled them.
fn tell_frequency(entries: &mut Vec<kvm_cpuid_entry2>, khz: u32) {
    let (numerator, denominator) = ratio(khz);
    let mhz = khz.div_ceil(1000);
    let leaf = |function, eax, ebx, ecx| kvm_cpuid_entry2 { function, eax, ebx, ecx, ..Default::default() };
    for told in [
        leaf(LEAF_TSC, denominator, numerator, CRYSTAL_KHZ * 1000),
        leaf(LEAF_FREQUENCY, mhz, mhz, 100),
        leaf(LEAF_HYPERVISOR_TIMING, khz, CRYSTAL_KHZ, 0),
    ] {
        match entries.iter_mut().find(|entry| entry.function == told.function) {
            Some(entry) if entry.eax != 0 => {}
            Some(entry) => *entry = told,
            None => entries.push(told),
        }
    }
    for (first, last) in [(LEAF_VENDOR, LEAF_FREQUENCY), (LEAF_HYPERVISOR, LEAF_HYPERVISOR_TIMING)] {
        if let Some(entry) = entries.iter_mut().find(|entry| entry.function == first) {
            entry.eax = entry.eax.max(last);
        }
    }
}

/// The TSC's frequency as a fraction of the crystal's frequency. Its numerator must be small, because Linux
/// multiplies the crystal's kHz by the numerator in 32 bits.
fn ratio(khz: u32) -> (u32, u32) {
    let crystal = u64::from(CRYSTAL_KHZ);
    let candidates = (1..=2000_u64).map(|denominator| {
        let numerator = (u64::from(khz) * denominator + crystal / 2) / crystal;
        let error = (numerator * crystal).abs_diff(u64::from(khz) * denominator) * 2000 / denominator;
        (error, numerator, denominator)
    });
    let (_, numerator, denominator) = candidates
        .filter(|(_, numerator, _)| *numerator <= u64::from(u32::MAX / CRYSTAL_KHZ))
        .min()
        .unwrap_or((0, 0, 0));
    (u32::try_from(numerator).unwrap_or(0), u32::try_from(denominator).unwrap_or(0))
}

/// The width of physical addresses according to leaf 0x8000_0008.
pub(super) fn physical_address_bits(supported: &[kvm_cpuid_entry2]) -> u8 {
    let [bits, ..] = find(supported, LEAF_ADDRESSES).map_or([0; 4], |entry| entry.eax.to_le_bytes());
    if bits == 0 { DEFAULT_ADDRESS_BITS } else { bits }
}

pub(super) fn is_intel(supported: &[kvm_cpuid_entry2]) -> bool {
    vendor(supported) == Some(*b"GenuineIntel")
}

fn is_amd(supported: &[kvm_cpuid_entry2]) -> bool {
    matches!(vendor(supported).as_ref(), Some(b"AuthenticAMD" | b"HygonGenuine"))
}

fn vendor(supported: &[kvm_cpuid_entry2]) -> Option<[u8; 12]> {
    let entry = find(supported, LEAF_VENDOR)?;
    let mut name = [0; 12];
    let bytes = [entry.ebx, entry.edx, entry.ecx].into_iter().flat_map(u32::to_le_bytes);
    for (slot, byte) in name.iter_mut().zip(bytes) {
        *slot = byte;
    }
    Some(name)
}

fn highest_leaf(supported: &[kvm_cpuid_entry2]) -> u32 {
    find(supported, LEAF_VENDOR).map_or(0, |entry| entry.eax)
}

fn find(supported: &[kvm_cpuid_entry2], leaf: u32) -> Option<&kvm_cpuid_entry2> {
    supported.iter().find(|entry| entry.function == leaf)
}

/// The topology: one package, one die, one thread for each core. An APIC id is the number of a core.
struct Topology {
    id: u32,
    cpus: u32,
    amd: bool,
}

impl Topology {
    /// The number of bits of an APIC id that hold the number of the core.
    fn core_bits(&self) -> u32 {
        self.cpus.next_power_of_two().trailing_zeros()
    }

    /// The sub-leaves of leaf 0xb: one for the level of threads, one for the level of cores, and the end.
    fn leaves(&self, function: u32) -> [kvm_cpuid_entry2; 3] {
        const THREADS: u32 = 1;
        const CORES: u32 = 2;
        let level = |index: u32, kind: u32, shift: u32, logical: u32| kvm_cpuid_entry2 {
            function,
            index,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: logical,
            ecx: kind << 8 | index,
            edx: self.id,
            ..Default::default()
        };
        [level(0, THREADS, 0, 1), level(1, CORES, self.core_bits(), self.cpus), level(2, 0, 0, 0)]
    }
}

fn edit(entry: &mut kvm_cpuid_entry2, topology: &Topology, tsc_deadline: bool) {
    match entry.function {
        LEAF_FEATURES => {
            let logical = topology.cpus.next_power_of_two().min(255);
            entry.ebx = (entry.ebx & 0xffff) | logical << 16 | topology.id << 24;
            entry.ecx = (entry.ecx & !(VMX | OSXSAVE)) | HYPERVISOR;
            entry.ecx = with(entry.ecx, TSC_DEADLINE, tsc_deadline);
            entry.edx = with(entry.edx, MULTI_THREADED, topology.cpus > 1);
        }
        LEAF_CACHES_INTEL if entry.eax & 0x1f != 0 => {
            // The number of cores in the package and the number of CPUs that share this cache; both fields
            // hold the number less one.
            let ids = (1 << topology.core_bits()) - 1;
            let sharing = if cache_level(entry) >= 3 { ids } else { 0 };
            entry.eax = (entry.eax & 0x3fff) | sharing << 14 | ids.min(63) << 26;
        }
        LEAF_EXTENDED_FEATURES if entry.index == 0 => {
            entry.ebx &= !(SGX | TRACE);
            entry.ecx &= !SGX_LAUNCH;
        }
        LEAF_PERFORMANCE => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        LEAF_FEATURES_AMD => {
            entry.ecx = with(entry.ecx & !SVM, LEGACY_CORES, topology.amd && topology.cpus > 1);
        }
        LEAF_ADDRESSES if topology.amd => {
            entry.ecx = (entry.ecx & !0xf0ff) | topology.core_bits() << 12 | (topology.cpus - 1);
        }
        LEAF_CACHES_AMD => {
            let sharing = if cache_level(entry) >= 3 { topology.cpus - 1 } else { 0 };
            entry.eax = (entry.eax & !(0xfff << 14)) | sharing << 14;
        }
        LEAF_TOPOLOGY_AMD => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (topology.id, topology.id & 0xff, 0, 0);
        }
        _ => {}
    }
}

fn cache_level(entry: &kvm_cpuid_entry2) -> u32 {
    entry.eax >> 5 & 7
}

fn with(word: u32, bit: u32, set: bool) -> u32 {
    if set { word | bit } else { word & !bit }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, eax: u32, ebx: u32, ecx: u32, edx: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn amd() -> Vec<kvm_cpuid_entry2> {
        let word = |bytes: &[u8; 4]| u32::from_le_bytes(*bytes);
        vec![
            leaf(0, 0x10, word(b"Auth"), word(b"cAMD"), word(b"enti")),
            leaf(1, 0x80_0f12, 0x0700_0800, VMX | OSXSAVE, 0),
            leaf(0xb, 9, 9, 9, 9),
            leaf(0x4000_0001, 0x0100_00ff, 0, 0, 0),
            leaf(0x8000_0001, 0, 0, SVM, 0),
            leaf(0x8000_0008, 0x3030, 0, 0x700f, 0),
            leaf(0x8000_001e, 9, 9, 9, 9),
        ]
    }

    #[test]
    fn a_vcpu_finds_its_own_apic_id_in_every_leaf_that_has_one() {
        for (index, cpus) in [(0, 1), (3, 4), (5, 6), (254, 255)] {
            let entries = for_vcpu(&amd(), true, Some(2_095_078), index, cpus);
            let id = u32::from(index);
            assert_eq!(find(&entries, 1).unwrap().ebx >> 24, id);
            let levels: Vec<_> = entries.iter().filter(|entry| entry.function == 0xb).collect();
            assert_eq!(levels.len(), 3);
            assert!(levels.iter().all(|level| level.edx == id));
            assert!(id >> levels[1].eax == 0 && levels[1].ebx == u32::from(cpus));
            assert_eq!(find(&entries, 0x8000_001e).unwrap().eax, id);
        }
    }

    #[test]
    fn nested_virtualisation_is_taken_out_and_kvms_leaves_stay() {
        let entries = for_vcpu(&amd(), false, None, 0, 2);
        let features = find(&entries, 1).unwrap();
        assert_eq!(features.ecx & (VMX | OSXSAVE | TSC_DEADLINE | HYPERVISOR), HYPERVISOR);
        assert_eq!(find(&entries, 0x8000_0001).unwrap().ecx, LEGACY_CORES);
        assert_eq!(find(&entries, 0x4000_0001).unwrap().eax, 0x0100_00ff);
        assert_eq!(find(&entries, 0x8000_0008).unwrap().ecx & 0xf0ff, 0x1001);
    }

    #[test]
    fn without_xsave_no_feature_is_left_that_needs_it() {
        let everything = |function, index| kvm_cpuid_entry2 { index, ..leaf(function, !0, !0, !0, !0) };
        let mut supported: Vec<_> = [(1, 0), (7, 0), (7, 1), (0xd, 0), (0xd, 1), (0x1d, 0), (0x8000_0001, 0)]
            .map(|(function, index)| everything(function, index))
            .to_vec();
        let with = for_vcpu(&supported, true, None, 0, 1);
        assert_eq!(with.iter().filter(|entry| entry.function == 0xd).count(), 2);
        assert_eq!(find(&with, 1).unwrap().ecx & 0x3000_1000, 0x3000_1000);
        supported[0].ecx &= !XSAVE;
        let without = for_vcpu(&supported, true, None, 0, 1);
        assert!(without.iter().all(|entry| ![0xd, 0x1d].contains(&entry.function)));
        let features = find(&without, 1).unwrap();
        assert_eq!((features.ecx & 0x3000_1000, features.ecx & 1 << 25), (0, 1 << 25), "AES stays");
        let extended: Vec<_> = without.iter().filter(|entry| entry.function == 7).collect();
        assert_eq!(
            (extended[0].ebx & 1 << 5, extended[0].ebx & 1 << 8),
            (0, 1 << 8),
            "AVX2 goes, BMI2 stays"
        );
        assert_eq!(
            (extended[0].ebx & 1 << 16, extended[0].ecx & 1 << 9, extended[1].eax & 1 << 4),
            (0, 0, 0)
        );
    }

    #[test]
    fn the_frequency_of_the_tsc_is_told_to_a_part_in_a_million() {
        for khz in [800_000, 1_999_999, 2_095_078, 3_000_000, 4_200_001] {
            let entries = for_vcpu(&amd(), true, Some(khz), 0, 1);
            let told = find(&entries, 0x15).unwrap();
            assert!(told.ebx <= u32::MAX / 1_000_000, "Linux multiplies in 32 bits");
            let hertz = u64::from(told.ecx) * u64::from(told.ebx) / u64::from(told.eax);
            assert!(hertz.abs_diff(u64::from(khz) * 1000) < u64::from(khz) / 1000, "{khz}: {hertz}");
            assert_eq!(find(&entries, 0x4000_0010).unwrap().eax, khz);
            assert_eq!(find(&entries, 0).unwrap().eax, 0x16);
        }
        let mut supported = amd();
        supported.push(leaf(0x15, 2, 4, 24_000_000, 0));
        assert_eq!(find(&for_vcpu(&supported, true, Some(2_000_000), 0, 1), 0x15).unwrap().ebx, 4);
    }

    #[test]
    fn the_address_width_comes_from_its_leaf_or_is_36_bits() {
        assert_eq!(physical_address_bits(&amd()), 48);
        assert_eq!(physical_address_bits(&[]), 36);
    }
}
