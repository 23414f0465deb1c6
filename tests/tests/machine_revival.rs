//! A stock driver that is unbound from a broken device and bound again, its backend being back, away, or
//! silent. Needs a KVM that runs stock kernels: this host's, or the lab's.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use outboard_tests::daemon::StorageDaemon;
use outboard_tests::guest::{Guest, Kernel};
use outboard_tests::launch::STEP;
use outboard_tests::{need, place};
use rustix::process::{Pid, Signal, kill_process};

const MIB: usize = 1 << 20;
const READ: &str = "dd if=/dev/vda of=/dev/null bs=4k count=64 iflag=direct 2>/dev/null && echo fine";
/// The new driver either has a disk or gives up at once.
const REBIND: &str = "cd /sys/bus/virtio/drivers/virtio_blk && echo virtio0 >unbind && \
    { echo virtio0 >bind; } 2>/dev/null; cd /; [ -e /sys/block/vda ] && echo found || echo lost";
const BROKEN: &str =
    "until grep -q 0x0000004f /sys/bus/virtio/devices/virtio0/status; do sleep 0.1; done; echo broken";

#[test]
fn a_driver_that_is_bound_again_has_its_disk_back_as_soon_as_there_is_a_backend() {
    need!(place::kvm());
    let kernel = need!(Kernel::usual());
    let mut disk = need!(StorageDaemon::start(4 * MIB));
    let device = format!("blk,socket={},deadline=1000", disk.socket().display());
    let mut guest = Guest::boot(kernel.guest().arg("--vhost-user").arg(device));
    assert!(guest.run(READ).contains("fine"));
    // Back at once, in time for the very next driver.
    disk.kill();
    disk.restart();
    guest.run(BROKEN);
    assert!(guest.run(REBIND).contains("found"));
    assert!(guest.run(READ).contains("fine"));
    // Stopped: what the driver's own reset asks of it is waited for, once; then it is not waited for at all.
    let daemon = Pid::from_raw(disk.pid().try_into().unwrap()).unwrap();
    kill_process(daemon, Signal::STOP).unwrap();
    assert!(guest.run(REBIND).contains("lost"));
    disk.kill();
    guest.last_words("poweroff -f");
    let ended = guest.into_vm().end(STEP).with_code(0);
    assert_eq!(ended.stats().number("/devices/0/recoveries"), 1, "{ended}");
    assert_eq!(ended.stats().text("/devices/0/state"), "broken", "{ended}");
}
