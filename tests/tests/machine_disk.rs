//! What a stock guest does with its disk: no exits, nothing lost, nothing mixed up. Needs a KVM that runs
//! stock kernels: this host's, or the lab's.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs::File;
use std::io::Read;
use std::time::Duration;

use outboard_tests::daemon::{SECTOR, StorageDaemon};
use outboard_tests::disk::MemoryDisk;
use outboard_tests::guest::{COMPLAINTS, Guest, Kernel};
use outboard_tests::launch::{Ended, Launch};
use outboard_tests::proxy::Proxy;
use outboard_tests::{need, place};

const MIB: usize = 1 << 20;
/// From the start to the end of a machine with a script, on a quiet host.
const SCRIPT: Duration = Duration::from_secs(60);

fn finish(launch: Launch) -> Ended {
    // A soak does ten times as much.
    let limit = if place::soak() { SCRIPT * 10 } else { SCRIPT };
    let ended = launch.start().end(limit).with_code(0);
    assert!(ended.console.contains("@exit 0"), "the script failed\n{ended}");
    println!("{:?}, {} exits", ended.took, ended.stats().exits());
    ended
}

#[test]
fn two_thousand_direct_reads_and_as_many_writes_cause_no_exit() {
    need!(place::kvm());
    let kernel = need!(Kernel::usual());
    let disk = need!(StorageDaemon::start(16 * MIB));
    // Both runs print the same number of characters.
    let run = |requests: u32| {
        let script = format!(
            "dd if=/dev/vda of=/dev/null bs=4k count={requests:04} iflag=direct 2>/dev/null && \
             dd if=/dev/zero of=/dev/vda bs=4k count={requests:04} oflag=direct 2>/dev/null && \
             set -- $(cat /sys/block/vda/stat) && echo reads=$1 writes=$5"
        );
        finish(kernel.script(&script).disk(&disk.socket()))
    };
    let (few, many) = (run(1), run(2000));
    assert!(many.field("reads") >= 2000 && many.field("writes") >= 2000, "{many}");
    assert!(few.field("reads") + few.field("writes") < 100, "{few}");
    for ended in [&few, &many] {
        assert_eq!(ended.stats().number("/devices/0/requests_through_vmm"), 0);
        assert_eq!(ended.stats().range("blk0").0, 0, "the register page is read without exits\n{ended}");
    }
    assert_eq!(few.stats().range("blk0"), many.stats().range("blk0"), "exits at the device\n{many}");
    let more = many.stats().exits().saturating_sub(few.stats().exits());
    println!("{more} more exits for 4000 requests");
    // The console's numbers are longer by some digits; an exit or two a digit.
    assert!(more < 200, "{more} more exits for 4000 requests\n{many}");
}

#[test]
fn sixty_four_mib_of_random_data_arrive_as_they_were() {
    need!(place::kvm());
    let kernel = need!(Kernel::usual());
    let mut random = vec![0; 64 * MIB];
    File::open("/dev/urandom").unwrap().read_exact(&mut random).unwrap();
    let (from, to) = (need!(StorageDaemon::serving(&random)), need!(StorageDaemon::start(64 * MIB)));
    // Half of it past the guest's page cache, half through it.
    let script = "dd if=/dev/vda of=/dev/vdb bs=1M count=32 iflag=direct oflag=direct && \
                  dd if=/dev/vda of=/dev/vdb bs=1M skip=32 seek=32 conv=fsync && \
                  echo 3 >/proc/sys/vm/drop_caches && cmp /dev/vda /dev/vdb";
    let launch = kernel.script(script).args(["--memory", "128M"]);
    let ended = finish(launch.disk(&from.socket()).disk(&to.socket()));
    assert!(to.contents() == random, "the image differs from what the guest wrote\n{ended}");
    for device in [0, 1] {
        assert_eq!(ended.stats().number(&format!("/devices/{device}/requests_through_vmm")), 0);
    }
}

/// Four workers at once, each on a place of its own: write a block of patterns, read it back, compare.
fn mixed(requests: usize) -> String {
    const WORKERS: usize = 4;
    const BLOCKS: usize = 250;
    let rounds = requests.div_ceil(WORKERS * BLOCKS * 2);
    format!(
        r#"worker() {{
    for round in $(seq {rounds}); do
        at=$((($1 * 4 + round % 4) * {BLOCKS}))
        dd if=/dev/urandom of=/tmp/in$1 bs=4k count={BLOCKS} &&
        dd if=/tmp/in$1 of=/dev/vda bs=4k seek=$at oflag=direct &&
        dd if=/dev/vda of=/tmp/out$1 bs=4k count={BLOCKS} skip=$at iflag=direct &&
        cmp /tmp/in$1 /tmp/out$1 || return 1
    done
    echo $1 >>/tmp/good
}}
for n in 0 1 2 3; do worker $n 2>>/tmp/log & done
wait
[ $(wc -l </tmp/good) = 4 ] || {{ cat /tmp/log; exit 1; }}
set -- $(cat /sys/block/vda/stat); echo reads=$1 writes=$5
{COMPLAINTS} && exit 1; true"#
    )
}

#[test]
fn mixed_reads_and_writes_several_at_a_time_lose_nothing() {
    need!(place::kvm());
    let kernel = need!(Kernel::usual());
    let requests = if place::soak() { 200_000 } else { 20_000 };
    let disk = need!(StorageDaemon::with_queues(16 * MIB, 2));
    let device = format!("blk,socket={},queues=2", disk.socket().display());
    let launch = kernel.script(&mixed(requests)).args(["--cpus", "2", "--vhost-user", &device]);
    let ended = finish(launch);
    let served = ended.field("reads") + ended.field("writes");
    assert!(served >= u64::try_from(requests).unwrap(), "{served} requests\n{ended}");
    assert_eq!(ended.stats().number("/devices/0/requests_through_vmm"), 0);
    assert_eq!(ended.stats().text("/devices/0/state"), "idle");
}

#[test]
fn a_driver_that_is_unbound_and_bound_again_finds_its_disk() {
    need!(place::kvm());
    let kernel = need!(Kernel::usual());
    let disk = need!(StorageDaemon::start(4 * MIB));
    let rounds = if place::soak() { 200 } else { 20 };
    let script = format!(
        r#"cd /sys/bus/virtio/drivers/virtio_blk
for round in $(seq {rounds}); do
    echo virtio0 >unbind && [ ! -e /sys/block/vda ] && echo virtio0 >bind || exit 1
    byte=$(dd if=/dev/vda bs=4k count=1 skip=$round iflag=direct 2>/dev/null | od -An -tu1 -N1)
    [ $byte = $((round * 8 % 251)) ] || {{ echo round $round: $byte; exit 2; }}
done
{COMPLAINTS} && exit 1; true"#
    );
    let ended = finish(kernel.script(&script).disk(&disk.socket()));
    assert_eq!(ended.stats().number("/devices/0/requests_through_vmm"), 0);
    assert!(!ended.log.contains("warn: "), "{ended}");
}

#[test]
fn a_disk_that_grows_and_shrinks_is_seen_by_the_guest() {
    need!(place::kvm());
    let kernel = need!(Kernel::usual());
    let disk = MemoryDisk::new(4 * MIB);
    let proxy = Proxy::new(&disk.socket());
    let mut guest = Guest::boot(kernel.guest().disk(&proxy.socket()));
    // The guest waits, not we: a poll over its console would cost more than the change.
    let wait_for = |sectors: usize| {
        format!(
            "for n in $(seq 400); do [ $(cat /sys/block/vda/size) = {sectors} ] && exit; usleep 50000; done; false"
        )
    };
    for mib in [64, 2, 16] {
        disk.resize(mib * MIB);
        proxy.change_config();
        let done = guest.exec(&wait_for(mib * MIB / SECTOR), SCRIPT);
        assert_eq!(done.status, 0, "{mib} MiB: the guest sees {}", guest.run("cat /sys/block/vda/size"));
    }
    // The new end can be used, and nothing is beyond it.
    guest.run("echo the end | dd of=/dev/vda bs=4k seek=4095 conv=sync oflag=direct 2>/dev/null");
    assert_ne!(
        guest.exec("dd if=/dev/zero of=/dev/vda bs=4k seek=4096 count=1 oflag=direct", SCRIPT).status,
        0
    );
    guest.power_off();
    assert!(disk.contents()[4095 * 4096..].starts_with(b"the end\n"));
}
