//! What qemu-storage-daemon does for a disk: read, write, discard, zero, resize. Needs a KVM that runs stock
//! kernels: this host's, or the lab's.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use outboard_tests::daemon::{SECTOR, StorageDaemon};
use outboard_tests::guest::{Guest, Kernel};
use outboard_tests::{need, place};
use serde_json::json;

const MIB: usize = 1 << 20;

/// What the image takes of its file system.
fn allocated(disk: &StorageDaemon) -> usize {
    usize::try_from(fs::metadata(disk.image()).unwrap().blocks()).unwrap() * SECTOR
}

#[test]
fn qemu_storage_daemon_reads_writes_and_discards() {
    need!(place::kvm());
    let kernel = need!(Kernel::usual());
    let disk = need!(StorageDaemon::start(8 * MIB));
    let mut guest = Guest::boot(kernel.guest().disk(&disk.socket()));
    guest.run(
        "dd if=/dev/urandom of=/tmp/in bs=64k count=128 2>/dev/null && \
         dd if=/tmp/in of=/dev/vda bs=64k oflag=direct 2>/dev/null && \
         dd if=/dev/vda of=/tmp/out bs=64k iflag=direct 2>/dev/null && cmp /tmp/in /tmp/out && sync",
    );
    let written = disk.contents();
    assert_ne!(guest.number("cat /sys/block/vda/queue/discard_max_bytes"), 0);
    let before = allocated(&disk);
    assert!(before >= 8 * MIB, "{before} bytes");
    // The second, third and fourth MiB are given back; what they hold is 0 from then on.
    guest.run("blkdiscard -o 1048576 -l 3145728 /dev/vda && sync");
    let after = allocated(&disk);
    println!("the image takes {before} bytes before, {after} after the guest's discard of {}", 3 * MIB);
    assert!(after <= before - 3 * MIB, "{before} bytes before, {after} after");
    guest.run(
        "echo 3 >/proc/sys/vm/drop_caches && dd if=/dev/zero of=/tmp/in bs=1M seek=1 count=3 conv=notrunc 2>/dev/null && \
         cmp /tmp/in /dev/vda",
    );
    let ended = guest.power_off();
    assert_eq!(ended.stats().number("/devices/0/requests_through_vmm"), 0);
    let now = disk.contents();
    assert!(now[MIB..4 * MIB].iter().all(|byte| *byte == 0), "what was discarded reads as 0");
    assert!(now[..MIB] == written[..MIB] && now[4 * MIB..] == written[4 * MIB..], "the rest is as it was");
}

#[test]
fn a_disk_that_qemu_storage_daemon_resizes_is_seen_by_the_guest() {
    need!(place::kvm());
    let kernel = need!(Kernel::usual());
    let Some(disk) = StorageDaemon::of_qemu_10(4 * MIB) else { return };
    let mut guest = Guest::boot(kernel.guest().disk(&disk.socket()));
    for mib in [16, 64, 8] {
        // By its own channel: CONFIG_CHANGE_MSG.
        disk.monitor().execute("block_resize", json!({ "node-name": "disk0", "size": mib * MIB }));
        let sectors = mib * MIB / SECTOR;
        let wait = format!(
            "for n in $(seq 400); do [ $(cat /sys/block/vda/size) = {sectors} ] && exit; usleep 50000; done; false"
        );
        let done = guest.exec(&wait, Duration::from_secs(60));
        assert_eq!(done.status, 0, "{mib} MiB: the guest sees {}", guest.run("cat /sys/block/vda/size"));
    }
    guest.run("echo the end | dd of=/dev/vda bs=4k seek=2047 conv=sync oflag=direct 2>/dev/null");
    guest.power_off();
    assert!(disk.contents()[2047 * 4096..].starts_with(b"the end\n"));
}
