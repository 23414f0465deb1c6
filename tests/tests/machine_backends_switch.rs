//! Two machines at one bridge of Open vSwitch with DPDK, which connects to both, is killed and started again.
//! Needs a KVM that runs stock kernels: this host's, or the lab's.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::fs;

use outboard_tests::backends::{SCRIPT, program};
use outboard_tests::guest::Guest;
use outboard_tests::launch::STEP;
use outboard_tests::scratch::Scratch;
use outboard_tests::switch::{Programs, Switch};
use outboard_tests::{need, place, vfio};

/// What one sends to the other: 256 KiB.
const SEND: &str = "(for n in $(seq 0 63); do dd if=/tmp/sent bs=4k skip=$n count=1 2>/dev/null; \
     echo part $ROUND-$n. >&2; usleep 50000; done) | nc 10.0.0.2 7; md5sum </tmp/sent";
const RECEIVE: &str =
    "rm -f /tmp/open; mkfifo /tmp/open; exec 9<>/tmp/open; nc -l -p 7 <&9 >/tmp/got; md5sum </tmp/got";

fn boot(switch: &Switch, port: u16, cpus: u16, keys: &str) -> Guest {
    let launch = vfio::guest("virtio_net", "", None).unwrap().args(["--cpus", &cpus.to_string()]);
    // Nothing is asked of the switch before it has started, which takes long in the lab.
    let path = switch.port(port);
    let device = format!("net,socket={},server=on,reconnect=600,deadline=60000{keys}", path.display());
    let mut guest = Guest::boot(launch.arg("--vhost-user").arg(device));
    guest.run(&format!("ip addr add 10.0.0.{}/24 dev eth0; ip link set eth0 up", 1 + port));
    assert_eq!(
        guest.number("ls -d /sys/class/net/eth0/queues/rx-* | wc -l"),
        u64::from(cpus),
        "pairs of queues"
    );
    guest
}

/// Machines with so many CPUs, and with a pair of queues for each. What a CPU sends goes by its own pair.
/// Their traces.
fn killed_and_started_again(kills: u64, cpus: u16, options: &[&str], keys: [&str; 2]) -> Vec<String> {
    let Some(programs) = Programs::find(program) else { return Vec::new() };
    let scratch = Scratch::new();
    let mut switch = Switch::new(programs, scratch.folder(), options);
    switch.start();
    let mut left = boot(&switch, 0, cpus, keys[0]);
    let mut right = boot(&switch, 1, cpus, keys[1]);
    left.run("dd if=/dev/urandom of=/tmp/sent bs=64k count=4 2>/dev/null");
    for round in 0..=kills {
        for cpu in 0..cpus {
            let pings = left.exec(
                &format!(
                    ". /functions; wait_for ping -c 1 -W 1 10.0.0.2 >/dev/null; \
                     taskset {:x} ping -c 20 -i 0.05 -s 1400 10.0.0.2",
                    1 << cpu
                ),
                SCRIPT,
            );
            assert!(pings.text.contains("20 packets received"), "round {round}, {cpu}: {}", pings.text);
        }
        let got = right.begin(RECEIVE);
        let sent = left.begin(&format!("ROUND={round}; {SEND}"));
        if round < kills {
            left.vm().expect(&format!("part {round}-8."));
            let sockets = [&left, &right].map(|guest| guest.vm().sockets());
            switch.kill();
            for (guest, before) in [&left, &right].into_iter().zip(sockets) {
                guest.vm().expect_lost(before, 1);
            }
            switch.start();
        }
        let (sent, got) = (left.finish(sent, SCRIPT), right.finish(got, SCRIPT));
        assert_eq!((sent.status, got.status), (0, 0), "{}\n{}", sent.text, got.text);
        let sum = |text: &str| text.lines().find(|line| line.ends_with("  -")).map(str::to_owned);
        assert_eq!(sum(&sent.text), sum(&got.text), "round {round}: what came differs from what was sent");
        assert!(sum(&sent.text).is_some());
    }
    let end = |mut guest: Guest| {
        guest.assert_kernel_is_content();
        guest.last_words("poweroff -f");
        let ended = guest.into_vm().end(STEP).with_code(0);
        assert_eq!(ended.stats().text("/end"), "power-off");
        assert_eq!(ended.stats().number("/devices/0/requests_through_vmm"), 0, "{ended}");
        assert_eq!(ended.stats().number("/devices/0/recoveries"), kills, "{ended}");
        fs::read_to_string(ended.files.path("trace")).unwrap()
    };
    [left, right].map(end).into()
}

#[test]
fn two_machines_reach_each_other_by_a_switch_that_is_killed_and_started_again() {
    need!(place::kvm());
    need!(vfio::guest("", "", None));
    killed_and_started_again(2, 1, &[], ["", ""]);
}

#[test]
fn two_pairs_of_queues_and_large_segments_are_used_before_and_after_a_kill() {
    need!(place::kvm());
    need!(vfio::guest("", "", None));
    let keys = [",queues=4", ",queues=4,transport=pci"];
    for trace in killed_and_started_again(1, 2, &["userspace-tso-enable=true"], keys) {
        // VIRTIO_NET_F_HOST_TSO4 and VIRTIO_NET_F_MQ.
        let took = trace.lines().filter(|line| line.contains("> SET_FEATURES"));
        let both = took.filter(|line| line.contains("bit11 ") && line.contains("bit22 "));
        assert_eq!(both.count(), 2, "{trace}");
    }
}
