//! A stock guest whose backends die, hang and come back: under verified writes, at unbind and bind, at a
//! reboot, at a kexec. Needs a KVM that runs stock kernels: this host's, or the lab's.

// Functions beside the tests fail as tests do.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::indexing_slicing)]

use std::env;
use std::fs;
use std::time::{Duration, Instant};

use outboard_tests::backends;
use outboard_tests::daemon::{SECTOR, StorageDaemon};
use outboard_tests::guest::{Guest, Kernel};
use outboard_tests::launch::{STEP, Vm};
use outboard_tests::{need, place, wait};
use rustix::process::Signal;

const MIB: usize = 1 << 20;
const SCRIPT: Duration = Duration::from_secs(90);

/// Four writers at once, each with its own place: random blocks are written past the cache, read back and
/// compared.
const WRITERS: &str = r#"worker() {
    for round in $(seq 6); do
        at=$((($1 * 3 + round % 3) * 60))
        dd if=/dev/urandom of=/tmp/in$1 bs=4k count=60 && dd if=/tmp/in$1 of=/dev/vda bs=4k seek=$at oflag=direct &&
        dd if=/dev/vda of=/tmp/out$1 bs=4k count=60 skip=$at iflag=direct && cmp /tmp/in$1 /tmp/out$1 || return 1
    done
    echo $1 >>/tmp/good
}
for n in 0 1 2 3; do worker $n 2>>/tmp/log & done
wait
[ $(wc -l </tmp/good) = 4 ] || { cat /tmp/log; exit 1; }"#;

fn kill_under_writes(mut disk: StorageDaemon) {
    let kernel = need!(Kernel::usual());
    let kills = if place::soak() { 50 } else { 5 };
    let mut guest = Guest::boot(kernel.guest().disk_with(&disk.socket(), "reconnect=0"));
    let load = guest.begin(WRITERS);
    let started = guest.vm().starts(&disk.socket());
    for killed in 1..=kills {
        std::thread::sleep(Duration::from_millis(300 + killed * 37 % 200));
        disk.kill();
        disk.restart();
        guest.vm().expect_starts(&disk.socket(), started + usize::try_from(killed).unwrap());
    }
    let done = guest.finish(load, SCRIPT);
    assert_eq!(done.status, 0, "{}", done.text);
    guest.assert_kernel_is_content();
    guest.last_words("poweroff -f");
    let ended = guest.into_vm().end(STEP).with_code(0);
    assert_eq!(ended.stats().number("/devices/0/recoveries"), kills, "{ended}");
    assert_eq!(ended.stats().number("/devices/0/requests_through_vmm"), 0, "{ended}");
    println!("{kills} kills under verified writes, {:?}", ended.took);
}

#[test]
fn verified_writes_outlive_the_kills_of_their_backend() {
    need!(place::kvm());
    kill_under_writes(need!(StorageDaemon::start(4 * MIB)));
}

#[test]
fn verified_writes_outlive_the_kills_of_their_backend_with_inflight() {
    need!(place::kvm());
    let Some(disk) = StorageDaemon::with_notes(4 * MIB) else { return };
    kill_under_writes(disk);
}

/// Three disks in trouble, and one that is not: dead for good, hung, and looked for.
struct Trouble {
    dead: StorageDaemon,
    hung: StorageDaemon,
    away: StorageDaemon,
    fine: StorageDaemon,
}

/// The first byte of sector 7 of the one disk of 1 MiB whose sectors are not all 0, whatever its name is now.
const SEVENTH_BYTE: &str = "for d in /sys/block/vd*; do d=${d##*/}; [ $(cat /sys/block/$d/size) = 2048 ] && \
    dd if=/dev/$d bs=512 count=1 skip=7 iflag=direct 2>/dev/null | od -An -tu1 -N1; done | grep 7";

const DEADLINE: Duration = Duration::from_secs(1);

impl Trouble {
    fn new(fine: &[u8]) -> Result<Self, place::Missing> {
        Ok(Self {
            dead: StorageDaemon::start(MIB)?,
            hung: StorageDaemon::start(MIB)?,
            away: StorageDaemon::start(MIB)?,
            fine: StorageDaemon::serving(fine)?,
        })
    }

    fn boot(&self, launch: outboard_tests::launch::Launch) -> Guest {
        let launch = launch.disk_with(&self.dead.socket(), "id=dead,deadline=1000");
        let launch = launch.disk_with(&self.hung.socket(), "id=hung,deadline=1000");
        let launch = launch.disk_with(&self.away.socket(), "id=away,deadline=1000,reconnect=0");
        Guest::boot(launch.disk(&self.fine.socket()))
    }

    fn begin(&mut self, vm: &Vm) {
        let sockets = vm.sockets();
        self.dead.kill();
        self.away.kill();
        self.hung.signal(Signal::STOP);
        vm.expect_lost(sockets, 2);
    }
}

#[test]
fn drivers_are_unbound_and_bound_whatever_their_backends_do() {
    need!(place::kvm());
    let kernel = need!(Kernel::usual());
    let mut disks = need!(Trouble::new(&vec![0; MIB]));
    let mut guest = disks.boot(kernel.guest());
    disks.begin(guest.vm());
    let rebind = |n: usize| {
        format!("cd /sys/bus/virtio/drivers/virtio_blk; echo virtio{n} >unbind; echo virtio{n} >bind; true")
    };
    // The dead one, then the hung one: it is found out here, and broken from then on.
    for (n, name) in [(0, "dead"), (1, "hung"), (1, "hung"), (0, "dead")] {
        let begun = Instant::now();
        let done = guest.exec(&rebind(n), SCRIPT);
        let took = begun.elapsed();
        println!("{name}: unbound and bound in {took:?}");
        assert!(
            took < 3 * DEADLINE + wait::patience(Duration::from_secs(2)),
            "{name} took {took:?}: {}",
            done.text
        );
    }
    // The one that is looked for: its driver waits for the first block until the backend is back.
    let number = guest.begin(&rebind(2));
    std::thread::sleep(Duration::from_millis(500));
    disks.away.restart();
    let done = guest.finish(number, SCRIPT);
    assert_eq!(done.status, 0, "{}", done.text);
    // The first free name is its new one: those of the broken ones.
    let byte = guest.number(
        "dd if=/dev/$(ls /sys/bus/virtio/devices/virtio2/block) bs=512 count=1 skip=7 iflag=direct 2>/dev/null | od -An -tu1 -N1",
    );
    assert_eq!(byte, 7);
    guest.last_words("poweroff -nf");
    let ended = guest.into_vm().end(STEP).with_code(0);
    disks.hung.signal(Signal::CONT);
    let longest = Duration::from_micros(ended.stats().number("/vcpus/0/longest_exit_us"));
    println!("the longest exit took {longest:?}");
    assert!(longest < DEADLINE + wait::patience(Duration::from_millis(300)), "{longest:?}\n{ended}");
}

#[test]
fn a_guest_reboots_whatever_its_backends_do() {
    need!(place::kvm());
    let kernel = need!(Kernel::usual());
    let mut disks = need!(Trouble::new(&vec![0; MIB]));
    let begun = Instant::now();
    let mut guest = disks.boot(kernel.guest());
    let boot = begun.elapsed();
    disks.begin(guest.vm());
    let begun = Instant::now();
    guest.last_words("reboot -nf");
    guest.wait_init();
    let took = begun.elapsed();
    println!("the first boot took {boot:?}; from the reboot to the first process: {took:?}");
    assert!(took < boot + 3 * DEADLINE + wait::patience(Duration::from_secs(2)));
    // Its driver waits for the first block of the one that is looked for.
    disks.away.restart();
    guest.wait_ready();
    println!("until the guest is up again: {:?}", begun.elapsed());
    assert_eq!(guest.number(SEVENTH_BYTE), 7);
    guest.last_words("poweroff -nf");
    let ended = guest.into_vm().end(STEP).with_code(0);
    disks.hung.signal(Signal::CONT);
    assert_eq!(ended.stats().number("/boots"), 2, "{ended}");
    assert_eq!(ended.stats().number("/devices/2/recoveries"), 1, "{ended}");
}

#[test]
fn another_kernel_takes_over_whatever_the_backends_do() {
    need!(place::kvm());
    let variable = |name: &str| env::var_os(name).map(fs::read).and_then(Result::ok);
    let (Some(kernel), Some(initramfs)) =
        (variable("OUTBOARD_KERNEL_6_12_BZIMAGE"), variable("OUTBOARD_GUEST_INITRAMFS_6_12"))
    else {
        return place::Missing::new("no bzImage: run by tests/lab/runner").print("kexec");
    };
    // Both come by the disk that works: one after the other, each from a sector on.
    let sectors = |bytes: &[u8]| bytes.len().div_ceil(SECTOR);
    let mut image = kernel.clone();
    image.resize(sectors(&kernel) * SECTOR, 0);
    image.extend(&initramfs);
    image.resize((image.len() + SECTOR).next_multiple_of(MIB), 0);
    let mut disks = need!(Trouble::new(&image));
    let script = format!(
        "echo ready; read -r go\n\
         dd if=/dev/vdd of=/tmp/kernel bs=512 count={} 2>/dev/null && \
         dd if=/dev/vdd of=/tmp/initrd bs=512 skip={} count={} 2>/dev/null && \
         truncate -s {} /tmp/kernel && truncate -s {} /tmp/initrd && \
         guest kexec /tmp/kernel /tmp/initrd 'console=ttyS0 quiet panic=-1 pci=off outboard.mode=none'",
        sectors(&kernel),
        sectors(&kernel),
        sectors(&initramfs),
        kernel.len(),
        initramfs.len()
    );
    let launch = need!(backends::guest("virtio_blk", &script));
    let launch = launch.disk_with(&disks.dead.socket(), "id=dead,deadline=1000");
    let launch = launch.disk_with(&disks.hung.socket(), "id=hung,deadline=1000");
    let launch = launch.disk_with(&disks.away.socket(), "id=away,deadline=1000,reconnect=0");
    let mut vm = launch.disk(&disks.fine.socket()).start();
    vm.expect("ready");
    disks.begin(&vm);
    vm.send(b"go\n");
    vm.expect("kexec");
    let begun = Instant::now();
    std::thread::sleep(Duration::from_secs(1));
    disks.away.restart();
    let ended = vm.end(SCRIPT).with_code(0);
    disks.hung.signal(Signal::CONT);
    println!("from kexec to the end of the next kernel: {:?}", begun.elapsed());
    // The next kernel's init was there, and the machine was not reset in between.
    assert_eq!(ended.console.matches("@init").count(), 2, "{ended}");
    assert_eq!((ended.stats().number("/boots"), ended.stats().text("/end")), (1, "power-off"), "{ended}");
    assert_eq!(ended.stats().number("/devices/2/recoveries"), 1, "{ended}");
    let longest = Duration::from_micros(ended.stats().number("/vcpus/0/longest_exit_us"));
    println!("the longest exit took {longest:?}");
    assert!(longest < DEADLINE + wait::patience(Duration::from_millis(300)), "{longest:?}\n{ended}");
}
