//! What works in a machine works again after everything that may happen to the machine. A table of checks is
//! done after each row of a table of disruptions, in one stock guest with a disk on virtio-mmio, a disk on
//! virtio-pci, an NVMe controller of a vfio-user server, a network card, and its console. A new way to
//! disturb a machine (a pause, a restore, a migration) is a row here. Needs a KVM that runs stock kernels:
//! this host's, or the lab's.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::time::{Duration, Instant};

use outboard_tests::backends::{Backend, program};
use outboard_tests::daemon::StorageDaemon;
use outboard_tests::guest::Guest;
use outboard_tests::launch::STEP;
use outboard_tests::vfio::{self, Server};
use outboard_tests::{need, place};

const MIB: usize = 1 << 20;
/// One check or one disruption, on a quiet host.
const LIMIT: Duration = Duration::from_secs(60);

/// Shell functions of the checks. Disks are found by their sizes, whatever they are called today. Block n of
/// a disk holds what check n has written; each check looks at the blocks of all checks before it.
const CHECKED: &str = r#"sized() { for d in /sys/block/*; do [ "$(cat $d/size)" = $1 ] && echo /dev/${d##*/} && return; done; return 1; }
block() { dd if=$1 bs=4k skip=$2 count=1 iflag=direct 2>/dev/null | tr -d '\0'; }
disk() {
    wait_for sized $1 >/dev/null; d=$(sized $1); wait_for [ -b $d ]
    for n in $(seq $2); do [ "$(block $d $((n - 1)))" = "check $((n - 1))" ] || { echo "$d has lost check $((n - 1))"; exit 1; }; done
    printf "check $2" | dd of=$d bs=4k seek=$2 conv=sync,notrunc oflag=direct 2>/dev/null || exit 2
    [ "$(block $d $2)" = "check $2" ] || exit 3
    dd if=/dev/urandom of=/tmp/written bs=4k count=50 2>/dev/null
    dd if=/tmp/written of=$d bs=4k seek=100 oflag=direct 2>/dev/null || exit 4
    dd if=$d of=/tmp/read bs=4k skip=100 count=50 iflag=direct 2>/dev/null || exit 5
    cmp /tmp/written /tmp/read || exit 6
}
net() { wait_for [ -e /sys/class/net/eth0 ]; ip link set eth0 up && udhcpc -i eth0 -n -q -t 20 -T 1 -s /bin/true 2>/dev/null || exit 7; }
console() { seq 300; }
"#;

/// What must work, and the shell text that tries it. `$check` counts.
const CHECKS: [(&str, &str); 5] = [
    ("the disk on virtio-mmio", "disk 8192 $check"),
    ("the disk on virtio-pci", "disk 10240 $check"),
    ("the function of a vfio-user server", "disk 12288 $check"),
    ("the network", "[ ! -e /tmp/net ] || net"),
    ("the console", "console"),
];

type Disruption = (&'static str, fn(&mut Life));

/// What happens to a machine.
const DISRUPTIONS: [Disruption; 8] = [
    ("nothing", |_| {}),
    ("a reset of the function by its driver", |life| {
        life.run("echo 1 >/sys/bus/pci/devices/$(function_of 0x0b0e)/reset");
    }),
    ("drivers that are unbound and bound", Life::rebind),
    ("a reboot in place", Life::reboot),
    ("a second reboot", Life::reboot),
    ("backends that are killed and found", Life::kill),
    ("a reboot after that", Life::reboot),
    ("drivers that are unbound and bound after that", Life::rebind),
];

struct Life {
    guest: Guest,
    disks: [StorageDaemon; 2],
    nvme: Server,
    net: Option<Backend>,
    checks: u32,
    boots: u64,
    kills: u64,
}

impl Life {
    fn run(&mut self, command: &str) -> String {
        let done = self.guest.exec(&format!(". /functions; {command}"), LIMIT);
        assert_eq!(done.status, 0, "{command}: {}", done.text);
        done.text
    }

    /// The shell functions, and whether there is a network, are files of the guest until it boots again.
    fn prepare(&mut self) {
        let net = if self.net.is_some() { ": >/tmp/net" } else { "true" };
        self.run(&format!("cat >/tmp/checks <<'END'\n{CHECKED}END\n{net}"));
    }

    fn check_all(&mut self, after: &str) {
        for (what, text) in CHECKS {
            let check = self.checks;
            let done = self.guest.exec(&format!(". /functions; . /tmp/checks; check={check}; {text}"), LIMIT);
            assert_eq!(done.status, 0, "{what} after {after}: {}", done.text);
            if what == "the console" {
                let lines: Vec<_> = done.text.lines().map(|line| line.parse().unwrap_or(0)).collect();
                assert!(lines.into_iter().eq(1..=300), "{what} after {after}: {}", done.text);
            }
        }
        self.checks += 1;
    }

    fn rebind(&mut self) {
        self.run(
            "for driver in virtio_blk virtio_net; do cd /sys/bus/virtio/drivers/$driver; for d in virtio*; do \
             [ ! -e $d ] || { echo $d >unbind && echo $d >bind || exit 1; }; done; done; \
             f=$(function_of 0x0b0e); cd /sys/bus/pci/drivers/nvme; echo $f >unbind && echo $f >bind",
        );
    }

    fn reboot(&mut self) {
        self.guest.last_words("reboot -f");
        self.guest.wait_ready();
        self.boots += 1;
        self.prepare();
    }

    /// The backends die while the guest writes, which waits for them. A vfio-user server that is lost is not
    /// looked for.
    fn kill(&mut self) {
        let load = self.guest.begin(
            ". /tmp/checks; for n in $(seq 3); do for size in 8192 10240; do \
             dd if=/dev/urandom of=$(sized $size) bs=4k seek=200 count=100 oflag=direct 2>/dev/null || exit 1; done; done",
        );
        let started = [0, 1].map(|n| self.guest.vm().starts(&self.disks[n].socket()));
        for disk in &mut self.disks {
            disk.kill();
        }
        if let Some(net) = &mut self.net {
            net.kill_and_restart();
        }
        for (disk, started) in self.disks.iter_mut().zip(started) {
            disk.restart();
            self.guest.vm().expect_starts(&disk.socket(), started + 1);
        }
        let done = self.guest.finish(load, LIMIT);
        assert_eq!(done.status, 0, "{}", done.text);
        self.kills += 1;
    }
}

#[test]
fn disks_functions_network_and_console_work_after_all_that_happens_to_a_machine() {
    need!(place::kvm());
    need!(vfio::guest("", "", None));
    let disks = [4, 5].map(|mib| StorageDaemon::serving(&vec![0; mib * MIB]));
    let [mmio, pci] = disks;
    let disks = [need!(mmio), need!(pci)];
    let nvme = Server::nvme(&vec![0; 6 * MIB], &[]);
    let net = program("passt").map(|passt| Backend::passt(&passt, ""));
    let held = nvme.descriptors();
    let launch = vfio::guest("virtio_net", "", None).unwrap().args(["--cpus", "2"]);
    let launch = launch.disk_with(&disks[0].socket(), "reconnect=0,deadline=20000");
    let launch = launch.disk_with(&disks[1].socket(), "transport=pci,reconnect=0,deadline=20000");
    let launch = launch.arg("--vfio-user").arg(nvme.device(",deadline=20000"));
    let launch = net.iter().fold(launch, |launch, net| {
        launch.arg("--vhost-user").arg(format!("net,socket={},reconnect=0", net.socket().display()))
    });
    let guest = Guest::boot(launch);
    let mut life = Life { guest, disks, nvme, net, checks: 0, boots: 1, kills: 0 };
    life.prepare();
    let rounds = if place::soak() { 10 } else { 1 };
    for (what, disrupt) in DISRUPTIONS.iter().cycle().take(rounds * DISRUPTIONS.len()) {
        let begun = Instant::now();
        disrupt(&mut life);
        println!("{what}: {:?}", begun.elapsed());
        life.check_all(what);
        println!("checked after {:?}", begun.elapsed());
    }
    let Life { mut guest, nvme, boots, kills, .. } = life;
    guest.assert_kernel_is_content();
    guest.last_words("poweroff -f");
    let ended = guest.into_vm().end(STEP).with_code(0);
    let stats = ended.stats();
    assert_eq!((stats.text("/end"), stats.number("/boots")), ("power-off", boots), "{ended}");
    for disk in [0, 1] {
        let of_disk = |what: &str| stats.number(&format!("/devices/{disk}/{what}"));
        assert_eq!((of_disk("requests_through_vmm"), of_disk("recoveries")), (0, kills), "{ended}");
    }
    // The server has seen the boots and holds nothing of them.
    nvme.lets_go(held);
}
