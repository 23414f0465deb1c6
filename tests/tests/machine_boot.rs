//! Stock Debian kernels boot: both series, both forms, one to four vCPUs, 128 MiB to 6 GiB. Needs a KVM that
//! runs them: this host's, or the lab's.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::time::Duration;

use outboard_tests::daemon::StorageDaemon;
use outboard_tests::guest::Form::{BzImage, Elf};
use outboard_tests::guest::{COMPLAINTS, Form, Kernel};
use outboard_tests::place::Missing;
use outboard_tests::{need, place};

const MIB: u64 = 1 << 20;
/// From the start to the end of a machine, on a quiet host.
const BOOT: Duration = Duration::from_secs(30);

/// One round trip instead of a command at a time: each character on the console is dear in the lab.
const LOOK_AROUND: &str = r#"
    echo release=$(uname -r) cpus=$(grep -c ^processor /proc/cpuinfo) sectors=$(cat /sys/block/vda/size)
    echo total=$(awk '/^MemTotal/ { print $2 }' /proc/meminfo) device=$(cat /sys/bus/virtio/devices/virtio0/device)
    echo byte=$(dd if=/dev/vda bs=4k count=1 skip=1 iflag=direct 2>/dev/null | od -An -tu1 -N1 -j512 | tr -d ' ')
    grep '^[^ ].*System RAM' /proc/iomem
    echo complaints
    "#;

/// Boots, and checks that the guest has what was asked for and that its disk works.
fn boot(series: &str, form: Form, cpus: u64, mib: u64) -> Result<(), Missing> {
    place::kvm()?;
    let kernel = Kernel::stock(series, form)?;
    let disk = StorageDaemon::start(4 << 20)?;
    let script = format!("{LOOK_AROUND}{COMPLAINTS}; true");
    let launch =
        kernel.script(&script).arg("--memory").arg(format!("{mib}M")).arg("--cpus").arg(cpus.to_string());
    let ended = launch.disk(&disk.socket()).start().end(BOOT).with_code(0);
    let console = ended.console.replace('\r', "");
    println!(
        "{kernel}, {cpus} vCPUs, {mib} MiB: {:?}, {} exits\n{console}",
        ended.took,
        ended.stats().exits()
    );

    assert!(console.contains(&format!("release={series}.")), "{kernel}\n{ended}");
    assert_eq!(ended.field("cpus"), cpus, "{ended}");
    let ranges = console.lines().filter(|line| line.ends_with("System RAM")).map(|line| {
        let (start, end) = line.split_whitespace().next().unwrap().split_once('-').unwrap();
        (u64::from_str_radix(start, 16).unwrap(), u64::from_str_radix(end, 16).unwrap() + 1)
    });
    let ranges: Vec<_> = ranges.collect();
    let usable: u64 = ranges.iter().map(|(start, end)| end - start).sum();
    assert!(mib * MIB - usable < MIB, "{mib} MiB\n{ended}");
    let above = if mib > 3072 { 4096 + mib - 3072 } else { mib };
    assert_eq!(ranges.last().unwrap().1, above * MIB, "{ended}");
    // MemTotal lacks what the kernel took for itself before.
    let total = ended.field("total") / 1024;
    assert!(total <= mib && total > mib * 17 / 20 - 40, "MemTotal is {total} MiB of {mib}");

    // Sector 9, found by ACPI, read by an interrupt that every CPU may take.
    assert_eq!((ended.field("device"), ended.field("sectors"), ended.field("byte")), (2, 8192, 9), "{ended}");
    assert!(console.contains("complaints\n@exit 0"), "{ended}");
    assert_eq!(ended.stats().text("/end"), "power-off");
    assert_eq!(ended.stats().number("/devices/0/requests_through_vmm"), 0);
    assert!(!ended.log.contains("warn: "), "{ended}");
    Ok(())
}

#[test]
fn kernel_6_12_as_elf_on_1_vcpu_with_128_mib() {
    need!(boot("6.12", Elf, 1, 128));
}

#[test]
fn kernel_6_12_as_bzimage_on_2_vcpus_with_6_gib() {
    need!(boot("6.12", BzImage, 2, 6144));
}

#[test]
fn kernel_6_12_as_elf_on_4_vcpus_with_3_gib() {
    need!(boot("6.12", Elf, 4, 3072));
}

#[test]
fn kernel_6_1_as_elf_on_2_vcpus_with_256_mib() {
    need!(boot("6.1", Elf, 2, 256));
}

#[test]
fn kernel_6_1_as_bzimage_on_4_vcpus_with_little_more_than_3_gib() {
    need!(boot("6.1", BzImage, 4, 3074));
}

#[test]
fn kernel_6_1_as_bzimage_on_1_vcpu_with_128_mib() {
    need!(boot("6.1", BzImage, 1, 128));
}

#[test]
fn every_combination() {
    if !place::soak() {
        return Missing::skipped("every_combination", "only with OUTBOARD_SOAK=1");
    }
    for series in ["6.12", "6.1"] {
        for form in [BzImage, Elf] {
            for cpus in [1, 2, 4] {
                for mib in [128, 512, 3072, 6144] {
                    need!(boot(series, form, cpus, mib));
                }
            }
        }
    }
}
