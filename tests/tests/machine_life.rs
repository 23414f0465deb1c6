//! How stock guests end, start again and live through the death of their backend. Needs a KVM that runs stock
//! kernels: this host's, or the lab's.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;
use std::time::Duration;

use outboard_tests::daemon::{StorageDaemon, is_listening};
use outboard_tests::guest::{Guest, Kernel};
use outboard_tests::launch::STEP;
use outboard_tests::place::Missing;
use outboard_tests::{need, place, wait};
use rustix::process::Signal;

const MIB: usize = 1 << 20;
const BOOT: Duration = Duration::from_secs(30);

#[test]
fn a_panic_resets_the_machine() {
    need!(place::kvm());
    let kernel = need!(Kernel::usual());
    let launch = kernel.script("echo c >/proc/sysrq-trigger").arg("--no-reboot");
    let ended = launch.start().end(BOOT).with_code(0);
    assert!(ended.console.contains("Kernel panic - not syncing: sysrq triggered crash"), "{ended}");
    assert_eq!(ended.stats().text("/end"), "reset");
}

#[test]
fn every_way_to_reboot_that_linux_knows_resets_the_machine() {
    need!(place::kvm());
    let kernel = need!(Kernel::usual());
    // reboot=triple would be a crash, and is: the guest asks for a triple fault.
    for (way, end, code) in [("acpi", "reset", 0), ("kbd", "reset", 0), ("triple", "crash", 5)] {
        let launch =
            kernel.launch(&format!("reboot={way} outboard.mode=none outboard.end=reboot")).arg("--no-reboot");
        let ended = launch.start().end(BOOT).with_code(code);
        assert_eq!(ended.stats().text("/end"), end, "{way}\n{ended}");
    }
}

#[test]
fn a_guest_outlives_its_backend() {
    need!(place::kvm());
    let kernel = need!(Kernel::usual());
    let (mut disk, other) = (need!(StorageDaemon::start(4 * MIB)), need!(StorageDaemon::start(4 * MIB)));
    let mut guest = Guest::boot(kernel.guest().disk(&disk.socket()).disk(&other.socket()));
    guest.run("(dd if=/dev/vda of=/dev/null bs=4k count=1000000 iflag=direct) >/dev/null 2>&1 </dev/null &");
    let sockets = guest.vm().sockets();
    disk.kill();
    guest.vm().expect_lost(sockets, 1);
    // The rest of the machine goes on.
    assert_eq!(guest.run("echo $((6 * 7))"), "42");
    guest.run("dd if=/dev/vdb of=/dev/null bs=4k count=100 iflag=direct 2>/dev/null");
    // Without a sync, which would wait for the lost disk.
    guest.last_words("poweroff -nf");
    let ended = guest.into_vm().end(STEP).with_code(0);
    assert_eq!(ended.stats().text("/devices/0/state"), "broken", "{ended}");
    assert_eq!(ended.stats().text("/devices/1/state"), "idle", "{ended}");
    assert_eq!(ended.stats().number("/devices/0/requests_through_vmm"), 0);
}

#[test]
fn a_signal_in_the_middle_of_requests_stops_the_queues_in_order() {
    need!(place::kvm());
    let kernel = need!(Kernel::usual());
    let disk = need!(StorageDaemon::start(4 * MIB));
    let mut guest = Guest::boot(kernel.guest().args(["--cpus", "2"]).disk(&disk.socket()));
    guest.begin("while :; do dd if=/dev/vda of=/dev/null bs=4k count=1000 iflag=direct 2>/dev/null; done");
    std::thread::sleep(Duration::from_millis(500));
    guest.vm().signal(Signal::TERM);
    let ended = guest.into_vm().end(STEP).with_code(143);
    assert_eq!(ended.stats().text("/devices/0/state"), "idle", "{ended}");
    wait::until("the daemon listens again", STEP, || is_listening(&disk.socket()).then_some(()));
}

#[test]
fn huge_pages_hold_a_guest_where_they_are_reserved() {
    const RESERVED: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";
    need!(place::kvm());
    let kernel = need!(Kernel::usual());
    // Only in the lab: elsewhere the host's memory is not ours to divide.
    if !place::in_lab() {
        return Missing::skipped("huge pages", "only in the lab");
    }
    fs::write(RESERVED, "96").unwrap();
    let reserved = fs::read_to_string(RESERVED).unwrap();
    let disk = need!(StorageDaemon::start(4 * MIB));
    let script = "dd if=/dev/vda of=/dev/null bs=4k count=500 iflag=direct && echo all read";
    let launch = kernel.script(script).args(["--memory", "192M,hugepages=2M"]).disk(&disk.socket());
    let ended = launch.start().end(BOOT);
    fs::write(RESERVED, "0").unwrap();
    assert_eq!(reserved.trim(), "96", "the lab has the huge pages");
    let ended = ended.with_code(0);
    assert!(ended.console.contains("all read"), "{ended}");
}

#[test]
fn two_guests_run_side_by_side() {
    need!(place::kvm());
    let kernel = need!(Kernel::usual());
    let disks = [need!(StorageDaemon::start(4 * MIB)), need!(StorageDaemon::start(4 * MIB))];
    let script = "dd if=/dev/vda of=/dev/null bs=4k count=1000 iflag=direct && echo all read";
    let vms: Vec<_> = disks.iter().map(|disk| kernel.script(script).disk(&disk.socket()).start()).collect();
    for vm in vms {
        let ended = vm.end(BOOT * 2).with_code(0);
        assert!(ended.console.contains("all read"), "{ended}");
        assert_eq!(ended.stats().number("/devices/0/requests_through_vmm"), 0);
    }
}
