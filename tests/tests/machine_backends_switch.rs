//! Two machines at one bridge of Open vSwitch with DPDK, which connects to both, is killed and started again. Needs a KVM that
//! runs stock kernels: this host's, or the lab's.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use outboard_tests::backends::{SCRIPT, program};
use outboard_tests::guest::Guest;
use outboard_tests::launch::STEP;
use outboard_tests::scratch::Scratch;
use outboard_tests::switch::{Programs, Switch};
use outboard_tests::{need, place, vfio, wait};

/// Kills of the switch.
const KILLS: u64 = 2;
/// What one sends to the other: 256 KiB.
const SEND: &str = "(for n in $(seq 0 63); do dd if=/tmp/sent bs=4k skip=$n count=1 2>/dev/null; \
     echo part $ROUND-$n. >&2; usleep 50000; done) | nc 10.0.0.2 7; md5sum </tmp/sent";
const RECEIVE: &str =
    "rm -f /tmp/open; mkfifo /tmp/open; exec 9<>/tmp/open; nc -l -p 7 <&9 >/tmp/got; md5sum </tmp/got";

fn boot(switch: &Switch, port: u16) -> Guest {
    let launch = vfio::guest("virtio_net", "", None).unwrap();
    // Nothing is asked of the switch before it has started, which takes long in the lab.
    let device = format!("net,socket={},server=on,reconnect=600,deadline=60000", switch.port(port).display());
    let mut guest = Guest::boot(launch.arg("--vhost-user").arg(device));
    guest.run(&format!("ip addr add 10.0.0.{}/24 dev eth0; ip link set eth0 up", 1 + port));
    guest
}

#[test]
fn two_machines_reach_each_other_by_a_switch_that_is_killed_and_started_again() {
    need!(place::kvm());
    need!(vfio::guest("", "", None));
    let Some(programs) = Programs::find(program) else { return };
    let scratch = Scratch::new();
    let mut switch = Switch::new(programs, scratch.folder(), &[]);
    switch.start();
    let mut left = boot(&switch, 0);
    let mut right = boot(&switch, 1);
    left.run("dd if=/dev/urandom of=/tmp/sent bs=64k count=4 2>/dev/null");
    for round in 0..=KILLS {
        let pings = left.exec(
            ". /functions; wait_for ping -c 1 -W 1 10.0.0.2 >/dev/null; ping -c 20 -i 0.05 -s 1400 10.0.0.2",
            SCRIPT,
        );
        assert!(pings.text.contains("20 packets received"), "round {round}: {}", pings.text);
        let got = right.begin(RECEIVE);
        let sent = left.begin(&format!("ROUND={round}; {SEND}"));
        if round < KILLS {
            left.vm().expect(&format!("part {round}-8."));
            switch.kill();
            let losses = usize::try_from(round + 1).unwrap();
            for guest in [&left, &right] {
                wait::until("the loss is noticed", STEP, || {
                    (guest.vm().log().matches("waits for another backend").count() == losses).then_some(())
                });
            }
            switch.start();
        }
        let (sent, got) = (left.finish(sent, SCRIPT), right.finish(got, SCRIPT));
        assert_eq!((sent.status, got.status), (0, 0), "{}\n{}", sent.text, got.text);
        let sum = |text: &str| text.lines().find(|line| line.ends_with("  -")).map(str::to_owned);
        assert_eq!(sum(&sent.text), sum(&got.text), "round {round}: what came differs from what was sent");
        assert!(sum(&sent.text).is_some());
    }
    for mut guest in [left, right] {
        guest.assert_kernel_is_content();
        guest.last_words("poweroff -f");
        let ended = guest.into_vm().end(STEP).with_code(0);
        assert_eq!(ended.stats().text("/end"), "power-off");
        assert_eq!(ended.stats().number("/devices/0/requests_through_vmm"), 0, "{ended}");
        assert_eq!(ended.stats().number("/devices/0/recoveries"), KILLS, "{ended}");
    }
}
